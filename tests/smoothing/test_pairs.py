"""Pairs are found as a person would list them, and what is no pair is told apart, with a reason."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from octavo.smoothing.layouts import Layout
from octavo.smoothing.pairs import Pair, find_pairs
from tests.outliers import ARCHITECTURES, EVERY_ARCHITECTURE, Architecture, multiply_experts, outputs


def listed(pairs: list[Pair]) -> dict[str, tuple[str, ...]]:
    return {pair.source: tuple(sink.param for sink in pair.sinks) for pair in pairs if pair.reason is None}


def reason(model: nn.Module, batch: Any, source: str) -> str:
    (pair,) = (pair for pair in find_pairs(model, batch) if pair.source == source)
    assert not pair.sinks
    assert pair.reason is not None
    return pair.reason


def fold(model: nn.Module, pair: Pair, one_plus: bool) -> None:
    """Powers of two into the source, and back out of the sinks."""
    if pair.experts is not None:
        down = model.get_parameter(pair.sinks[0].param)
        multiply_experts(model, pair.source, 2.0 ** torch.randint(-3, 4, (len(down), down.shape[pair.sinks[0].axis])))
        return
    layout, source = pair.layout, model.get_submodule(pair.source)
    assert layout is not None
    weight = source.weight
    transposed = type(source).__name__ == "Conv1D"
    factors = torch.ones(weight.shape[1 if transposed else 0])
    factors[layout.rows] = 2.0 ** torch.randint(-3, 4, layout.rows.shape)
    if one_plus and weight.dim() == 1:
        weight.data = (1 + weight.data) * factors - 1
    else:
        weight.data *= factors if weight.dim() == 1 or transposed else factors.unsqueeze(1)
    if getattr(source, "bias", None) is not None:
        source.bias.data *= factors
    for sink in pair.sinks:
        columns = model.get_parameter(sink.param)
        shape = [1] * columns.dim()
        shape[sink.axis] = -1
        columns.data /= factors[layout.rows][layout.channels].view(shape)


# -- architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_pairs_are_those_that_a_person_would_list(architecture: Architecture) -> None:
    assert listed(find_pairs(architecture.build(), architecture.batch(9))) == architecture.expected()


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_channels_are_those_that_feed_each_other(architecture: Architecture) -> None:
    model = architecture.build()
    pairs = [pair for pair in find_pairs(model, architecture.batch(9)) if pair.reason is None]
    other = architecture.batch(12)
    before = outputs(model, other)
    for pair in pairs:
        fold(model, pair, architecture.one_plus)
    if architecture.one_plus:  # 1 + weight is rounded
        torch.testing.assert_close(outputs(model, other), before, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(outputs(model, other), before)


def test_nothing_is_left_changed() -> None:
    model = Net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_pairs(model, X)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_progress_counts_families() -> None:
    seen: list[tuple[int, int]] = []
    find_pairs(Net(), X, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, len(seen)) for i in range(1, len(seen) + 1)]


# -- a model of one's own ---------------------------------------------------------------------------------------------

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """norm -> a -> through(...) -> b, with a residual around it, and a norm and a head at the end."""

    def __init__(self, through: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 4)
        self.through = through

    def forward(self, x: Tensor) -> Any:
        return self.head(self.last(x + self.b(self.through(self.a(self.norm(x))))))


WHOLE = {"norm": ("a.weight",), "a": ("b.weight",), "last": ("head.weight",)}


def test_a_module_that_no_library_knows() -> None:
    assert listed(find_pairs(Net(), X)) == WHOLE


class Noisy(Net):
    """As speech synthesis and variational autoencoders are."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + torch.randn_like(x)) + torch.rand(())


def test_a_model_that_draws_random_numbers() -> None:
    net = Noisy()
    state = torch.get_rng_state()
    assert listed(find_pairs(net, X)) == WHOLE
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_every_dtype(dtype: torch.dtype) -> None:
    assert listed(find_pairs(Net().to(dtype), X.to(dtype))) == WHOLE


@pytest.mark.parametrize(
    "through",
    [
        torch.nn.functional.gelu,
        torch.tanh,
        torch.square,
        lambda x: x.softmax(-1),
        lambda x: F.relu6(x * 0.01),  # linear for all that this example has
        lambda x: x.clamp(-100, 100),
        lambda x: x.flip(-1),
    ],
)
def test_what_is_not_linear_channel_by_channel_is_no_way_through(through: Callable[[Tensor], Tensor]) -> None:
    assert listed(find_pairs(Net(through), X)) == {name: WHOLE[name] for name in ("norm", "last")}


@pytest.mark.parametrize(
    "through", [F.leaky_relu, lambda x: x * x.detach().sign() * 0.5, lambda x: x.transpose(0, 1).mT.mT.transpose(0, 1)]
)
def test_what_is_linear_channel_by_channel_is(through: Callable[[Tensor], Tensor]) -> None:
    assert listed(find_pairs(Net(through), X))["norm"] == ("a.weight",)


@dataclasses.dataclass
class Answer:
    features: Tensor
    result: Tensor


@dataclasses.dataclass(slots=True)
class SlottedAnswer:
    features: Tensor
    result: Tensor


class Namespace(types.SimpleNamespace):
    """One that holds itself, the model and a library, too, as results of a task may."""

    def __init__(self, model: nn.Module, **parts: Any) -> None:
        super().__init__(parts=[parts], model=model, library=torch, me=self)


class TapsCache:
    """What a model keeps of the normed value for its next call."""

    def __init__(self, normed: Tensor) -> None:
        self.normed = normed


class Taps(Net):
    """The normed value goes another way, too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        z = y if self.how == "residual" else x
        result = self.head(self.last(z + self.b(torch.relu(self.a(y)))))
        returned = {
            "tuple": (result, [y]),
            "dict": {"features": y, "result": result},
            "dataclass": Answer(y, result),
            "slots": SlottedAnswer(y, result),
            "namespace": Namespace(self, features=y, result=result),
            "distribution": torch.distributions.Normal(y, result.square().mean() + 1, validate_args=False),
            "cache": (result, TapsCache(y)),
        }
        return returned.get(self.how, result)


def test_a_residual_that_taps_the_normed_value() -> None:
    assert reason(Taps("residual"), X, "norm") == "also reaches last on another way (a residual?)"


@pytest.mark.parametrize("how", ["tuple", "dict", "dataclass", "slots", "namespace", "distribution"])
def test_a_normed_value_that_is_returned(how: str) -> None:
    model = Taps(how)
    assert reason(model, X, "norm") == "reaches the model's output"
    assert listed(find_pairs(model, X)).keys() == {"a", "last"}


def test_a_cache_is_the_models_own() -> None:
    assert listed(find_pairs(Taps("cache"), X)) == WHOLE


class Codes(Net):
    """What it decides by the normed value is returned, as whole numbers or booleans."""

    def __init__(self, decide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decide = decide

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.head(self.last(x + self.b(torch.relu(self.a(y))))), {"codes": self.decide(y)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "decide",
    [lambda y: y.argmax(-1), lambda y: y > 0.5, lambda y: (y > 0.5).nonzero(), lambda y: torch.fft.fft(y.float())],
)
def test_what_is_decided_by_the_normed_value_and_returned(
    decide: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    assert reason(Codes(decide).to(dtype), X.to(dtype), "norm") == "reaches the model's output"


def test_what_is_decided_by_signs_is_no_obstacle() -> None:
    """Factors are positive."""
    assert listed(find_pairs(Codes(lambda y: y > 0), X))["norm"] == ("a.weight",)


class Router(Net):
    """How much of the result counts is decided from the normed value, with no weight that a factor could go to."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head(self.last(x + y.mean(-1, keepdim=True).sigmoid() * self.b(torch.relu(self.a(y)))))


def test_a_router_left_out() -> None:
    assert "norm" not in listed(find_pairs(Router(), X))
    assert "last" in listed(find_pairs(Router(), X))


class BranchesOnIt(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if y.abs().max() > 50:
            return self.head(y)
        return self.head(self.last(x + self.b(torch.relu(self.a(y)))))


def test_a_model_that_branches_on_the_normed_value() -> None:
    assert "norm" not in listed(find_pairs(BranchesOnIt(), X))


class RefusesIt(Net):
    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if y.abs().max() > 50:
            raise self.error("too large")
        return self.head(self.last(x + self.b(torch.relu(self.a(y)))))


@pytest.mark.parametrize("error", [ValueError, OverflowError, TypeError, StopIteration])
def test_a_model_that_refuses_the_scaled_value(error: type[Exception]) -> None:
    assert reason(RefusesIt(error), X, "norm") == "the model fails without it: too large"
    assert listed(find_pairs(RefusesIt(error), X)) == {name: WHOLE[name] for name in ("a", "last")}


# -- weights of several owners ----------------------------------------------------------------------------------------


def test_a_tied_sink() -> None:
    model = Net()
    model.tied = nn.Linear(16, 4)
    model.tied.weight = model.head.weight
    assert reason(model, X, "last") == "head.weight is also tied.weight"


def test_a_tied_source() -> None:
    model = Net()
    model.last.weight = model.norm.weight
    assert reason(model, X, "norm") == "norm.weight is also last.weight"
    assert listed(find_pairs(model, X)) == {"a": ("b.weight",)}


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.b(torch.relu(self.a(self.norm(x))))
        return self.head(self.last(x))


def test_a_module_that_is_called_twice() -> None:
    assert listed(find_pairs(Twice(), X)) == WHOLE


def test_a_module_under_two_names() -> None:
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    assert listed(find_pairs(nn.Sequential(block, block), X)) == {"0.0": ("0.1.weight",)}


class FedTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            self.last(self.b(torch.relu(self.a(self.norm(x))) + torch.relu(self.a(x)))) + self.a(x)[..., :16]
        )


def test_a_sink_that_is_fed_something_else_too() -> None:
    assert reason(FedTwice(), X, "norm") == "a is fed by other layers too"


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))


def test_a_weight_takes_the_factors_of_one_layer_only() -> None:
    assert listed(find_pairs(Bilinear(), X)) == {"gate": ("down.weight",)}


# -- many of a kind ---------------------------------------------------------------------------------------------------


class FirstAllThenAll(nn.Module):
    """The sinks run in another order than their sources."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(16, 24) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(24, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = [up(x).relu() for up in self.ups]
        return sum(down(y) for down, y in zip(self.downs, hidden, strict=True))


def test_members_of_a_family_are_told_apart() -> None:
    assert listed(find_pairs(FirstAllThenAll(), X)) == {f"ups.{i}": (f"downs.{i}.weight",) for i in range(3)}


class ReturnsOne(nn.Module):
    def __init__(self, returned: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.returned = returned

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(norm(x))
            x = x + layer(features[-1]).tanh()
        return x, features[self.returned]


@pytest.mark.parametrize("returned", range(3))
def test_the_member_that_reaches_the_output_is_found(returned: int) -> None:
    found = listed(find_pairs(ReturnsOne(returned), X))
    assert found == {f"norms.{i}": (f"layers.{i}.weight",) for i in range(3) if i != returned}


def test_members_of_different_widths() -> None:
    widths = (8, 24, 16)
    layers = [m for w in widths for m in (nn.Linear(16, w), nn.ReLU(), nn.Linear(w, 16), nn.Tanh())]
    expected = {f"{4 * i}": (f"{4 * i + 2}.weight",) for i in range(3)}
    assert listed(find_pairs(nn.Sequential(*layers), X)) == expected


class Experts(nn.Module):
    """A mixture of experts that are modules; `routed` says who runs."""

    def __init__(self, routed: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4))
        self.routed = routed

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + sum(self.experts[i](y) for i in self.routed)


def test_an_expert_that_no_token_reached_is_folded_like_the_others() -> None:
    model = Experts((0, 2, 3))
    pairs = [pair for pair in find_pairs(model, X) if pair.reason is None]
    assert set(listed(pairs)["norm"]) == {f"experts.{i}.0.weight" for i in range(4)}
    assert "experts.1.0" not in listed(pairs)
    model.routed = (1, 3)
    before = model(X)
    for pair in pairs:
        fold(model, pair, one_plus=False)
    assert torch.equal(model(X), before)


def test_a_weight_that_was_not_reached_and_may_be_an_expert_or_another_block() -> None:
    why = reason(Experts((2,)), X, "norm")
    assert why == "experts.0.0.weight, which the example did not reach, may be fed by it like experts.2.0.weight"


# -- ways to call -----------------------------------------------------------------------------------------------------


class OwnNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * F.rms_norm(hidden_states, hidden_states.shape[-1:])


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(OwnNorm(16) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            y = norm(hidden_states=x)
            x = (y if i == 0 else x) + layer(y).tanh()  # the first norm leaks
        return x.argmax(-1)


def test_norms_that_are_called_by_keyword() -> None:
    assert reason(ByKeyword(), X, "norms.0") == "also reaches norms.1 on another way (a residual?)"
    assert listed(find_pairs(ByKeyword(), X)) == {f"norms.{i}": (f"layers.{i}.weight",) for i in (1, 2)}


def test_norms_without_a_weight() -> None:
    model = nn.Sequential(nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 4))
    assert reason(model, X, "0") == "has no weight to fold into"


def test_a_norm_over_more_than_the_channels() -> None:
    model = nn.Sequential(nn.LayerNorm(X.shape[1:]), nn.Linear(16, 4))
    assert reason(model, X, "0") == "does not scale the channels of its output"


def test_a_weight_that_is_computed_has_nothing_to_fold_into() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(16, 24)), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    assert listed(find_pairs(model, X)) == {"2": ("4.weight",)}


def test_torch_encoder_layers_are_seen_through() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True)
    expected = {"norm1": ("self_attn.in_proj_weight",), "norm2": ("linear1.weight",), "linear1": ("linear2.weight",)}
    assert listed(find_pairs(model, X)) == expected


def test_batches_of_every_kind() -> None:
    assert listed(find_pairs(Net(), (X,))) == WHOLE
    assert listed(find_pairs(Net(), {"x": X})) == WHOLE


def test_padding() -> None:
    llama = ARCHITECTURES["llama"]
    model, batch = llama.build(), llama.batch(9)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, 6:] = 0
    assert listed(find_pairs(model, batch)) == llama.expected()


# -- parts ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Nothing that it holds tells how many heads there are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_values_of_heads_that_are_told_nowhere() -> None:
    assert listed(find_pairs(Attention(), X)) == {"qkv": ("out.weight",)}


def test_a_layout_says_who_feeds_whom() -> None:
    llama = ARCHITECTURES["llama"]
    (values,) = (p for p in find_pairs(llama.build(), llama.batch(9)) if p.source == "model.layers.1.self_attn.v_proj")
    assert isinstance(values.layout, Layout)
    first, second = list(range(8)), list(range(8, 16))  # two key-value heads of 8 channels feed two query heads each
    assert values.layout.channels.tolist() == first + first + second + second
    assert values.layout.rows.tolist() == first + second
