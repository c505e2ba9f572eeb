"""What enters experts' down projections, against loops over tokens and experts in fp64 that are written down here."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import octavo
from octavo import CalibrateError, OctavoWarning
from octavo.calibration.calibrate import calibrate
from octavo.calibration.expert_inputs import ExpertsObserver, rows_of_each
from octavo.calibration.stats import Stats
from tests.calibration.test_calibrate import assert_equal_stats
from tests.outliers import ARCHITECTURES, Architecture

ANY = pytest.mark.filterwarnings("ignore:.*saw no token:octavo.errors.OctavoWarning")
"""Tiny batches need not reach every expert."""

MIXTURES = {
    name: architecture
    for name, architecture in ARCHITECTURES.items()
    if any("experts.gate_up_proj" in sinks for sinks in architecture.pairs.values())
}
every_mixture = pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)

Loops = dict[str, list[list[Tensor]]]
"""Name of a stack of down projections -> for each expert the inputs of its tokens, fp64 [I] each."""


def gated(name: str, layer: Any, x: Tensor, e: int) -> Tensor:
    """The input of expert e's down projection for one token x [H]."""
    weight = layer.gate_up_proj[e].double()
    if "GptOss" in name:
        h = x.double() @ weight + layer.gate_up_proj_bias[e].double()
        gate, up = h[::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (x.double() @ weight if "Llama4" in name else weight @ x.double()).chunk(2)
    return gate * torch.sigmoid(gate) * up


@contextlib.contextmanager
def looped(model: nn.Module, everywhere: bool = False, mask: Tensor | None = None) -> Iterator[Loops]:
    """Fills in what the experts of `model` are fed while this is open. everywhere: every token to every expert."""
    found: Loops = {}

    def hook(name: str) -> Any:
        def note(layer: Any, args: Any, kwargs: Any) -> None:
            x, index = args[0].detach(), next(iter([*args[1:2], *kwargs.values()]), None)
            count = len(layer.down_proj)
            of = found.setdefault(f"{name}.down_proj", [[] for _ in range(count)])
            for t, token in enumerate(x):
                # Llama 4's have no index, but a row of zeros for each expert that a token was not routed to.
                routed = [t * count // len(x)] if bool(token.any()) else []
                chosen = routed if index is None else index[t].tolist()
                if mask is None or bool(mask.flatten()[t % mask.numel()]):
                    for e in range(count) if everywhere and chosen else chosen:
                        of[e].append(gated(type(layer).__name__, layer, token, e))

        return note

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    try:
        with torch.no_grad():
            yield found
    finally:
        for handle in handles:
            handle.remove()


def check(stats: Stats, loops: Loops) -> None:
    assert list(stats.experts) == list(loops) != []
    for name, experts in loops.items():
        seen = stats.experts[name]
        assert seen.tokens.tolist() == [len(inputs) for inputs in experts]
        assert seen.amax.dtype == torch.float32
        for e, inputs in enumerate(experts):
            if not inputs:
                assert not seen.amax[e].any() and not len(seen.rows_of(e)) and e in stats.unrouted[name]
                continue
            truth = torch.stack(inputs)
            torch.testing.assert_close(seen.amax[e].double(), truth.abs().amax(0), rtol=1e-4, atol=1e-6)
            kept = seen.rows_of(e).double()
            assert len(kept) == min(len(truth), rows_of_each(256, len(experts)))
            assert float(torch.cdist(kept, truth).amin(1).max()) < 1e-4, "each is one of the inputs"


@ANY
@every_mixture
@pytest.mark.parametrize("route_all", [False, True])
def test_every_expert_s_inputs(mixture: Architecture, route_all: bool) -> None:
    model = mixture.build()
    batches = [mixture.batch(n) for n in (9, 14)]
    with looped(model, route_all) as loops:
        for batch in batches:
            model(**batch)
    check(calibrate(model, batches, route_all_experts=route_all), loops)


class OneEach(nn.Module):
    """Each token goes to one expert, which its routing says without a dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        h = torch.einsum("...h,...uh->...u", x, self.up[index]).relu()
        return torch.einsum("...u,...hu,...->...h", h, self.down[index], weights)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = OneEach()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.experts(*inputs)  # type: ignore[no-any-return]


@ANY
def test_tokens_of_several_sizes_and_one_expert_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.experts._REGISTERED", {})
    octavo.register_experts(OneEach, up="up", down="down", gate=lambda _, h: h.relu())
    x, index, weights = torch.randn(2, 5, 4), torch.tensor([[0, 2, 2, 0, 0], [2, 0, 2, 2, 0]]), torch.rand(2, 5)
    model = Outer()
    seen = calibrate(model, [(x, index, weights)]).experts["experts.down"]
    assert seen.tokens.tolist() == [5, 0, 5]
    for e in (0, 2):
        truth = (x[index == e] @ model.experts.up[e].detach().T).relu().amax(0)
        torch.testing.assert_close(seen.amax[e], truth)


@ANY
@pytest.mark.parametrize("name", ["mixtral", "llama4"])
@pytest.mark.parametrize("route_all", [False, True])
def test_padding_does_not_count(name: str, route_all: bool) -> None:
    mixture = MIXTURES[name]
    model = mixture.build()
    batch = mixture.batch(9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 6:], mask[1, 8:] = 0, 0
    batch["attention_mask"] = mask
    with looped(model, route_all, mask) as loops:
        model(**batch)
    stats = calibrate(model, [batch], route_all_experts=route_all)
    check(stats, loops)
    for layer, seen in stats.observers.items():
        if layer.endswith("experts"):
            assert seen.tokens == 14 * (4 if name == "llama4" else 1)


@ANY
@every_mixture
def test_the_model_runs_as_its_routers_say(mixture: Architecture) -> None:
    model, batch = mixture.build(), mixture.batch(9)
    results = []
    handle = model.register_forward_hook(lambda module, args, output: results.append(output["logits"]))
    calibrate(model, [batch], route_all_experts=True)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(results[0], model(**batch)["logits"])
    assert not any(module._forward_pre_hooks for module in model.modules())


@ANY
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_whatever_the_implementation(implementation: str) -> None:
    model, batch = MIXTURES["qwen3-moe"].build(), MIXTURES["qwen3-moe"].batch(9)
    with looped(model) as loops:
        model(**batch)
    model.set_experts_implementation(implementation)
    check(calibrate(model, [batch]), loops)


@ANY
@pytest.mark.parametrize(("bad", "found"), [(torch.nan, "NaN"), (torch.inf, "inf")])
def test_what_is_not_finite_is_an_error_that_names_the_expert(bad: float, found: str) -> None:
    model, batch = MIXTURES["mixtral"].build(), MIXTURES["mixtral"].batch(9)
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[2, 48 + 3, 5] = bad
    where = rf"^model\.layers\.0\.mlp\.experts\.down_proj\[2\]: batch 0 holds {found} in its input \(channel 3\)"
    with pytest.raises(CalibrateError, match=where):
        calibrate(model, [batch])


def without_expert_3(model: Any) -> Any:
    """No token reaches expert 3 of the first block."""
    gate = model.model.layers[0].mlp.gate
    return gate.register_forward_hook(lambda module, args, output: (*output[:2], output[2] % 3))


def test_experts_that_were_not_routed_to_are_listed(tmp_path: Path) -> None:
    mixture = MIXTURES["mixtral"]
    model, batches = mixture.build(), [mixture.batch(n) for n in (30, 50)]
    without_expert_3(model)
    with pytest.warns(
        OctavoWarning, match="^1 of 8 experts, in 1 of 2 layers, saw no token of the calibration"
    ) as said:
        stats = calibrate(model, batches)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert stats.unrouted == {"model.layers.0.mlp.experts.down_proj": (3,)}
    everywhere = calibrate(model, batches, route_all_experts=True)  # a warning would be an error
    assert everywhere.unrouted == {}
    assert everywhere.experts["model.layers.0.mlp.experts.down_proj"].tokens.tolist() == [160] * 4
    loaded = Stats.load(stats.save(tmp_path / "stats.safetensors"))
    assert_equal_stats(stats, loaded)
    assert loaded.unrouted == stats.unrouted


def test_all_tokens_to_all_experts_of_a_model_without_any() -> None:
    with pytest.raises(CalibrateError, match="route_all_experts is True, and the model has no stack of experts"):
        calibrate(nn.Sequential(nn.Linear(3, 3)), [torch.ones(1, 3)], route_all_experts=True)


# -- the observer alone -----------------------------------------------------------------------------------------------


def observed(inputs: Tensor, expert: Tensor, order: Tensor, experts: int, rows: int) -> ExpertsObserver:
    """By the definition, expert after expert."""
    amax, tokens, kept = torch.zeros(experts, inputs.shape[1]), torch.zeros(experts, dtype=torch.int64), []
    for e in range(experts):
        mine = (expert == e).nonzero().flatten()
        tokens[e] = len(mine)
        for i in mine.tolist():
            amax[e] = torch.maximum(amax[e], inputs[i].abs())
        kept += sorted(mine.tolist(), key=lambda i: int(order[i]))[:rows]
    return ExpertsObserver(amax, tokens, inputs[kept], expert[kept], order[kept])


@given(st.integers(0, 40), st.integers(1, 5), st.integers(0, 9), st.integers(0, 40), st.integers(0, 2**31))
def test_two_halves_are_the_whole(n: int, experts: int, rows: int, cut: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3, generator=generator)
    expert = torch.randint(0, experts, (n,), generator=generator)
    order = torch.randperm(n, generator=generator)
    parts = [observed(inputs[at], expert[at], order[at], experts, rows) for at in (slice(cut), slice(cut, None))]
    whole, merged = observed(inputs, expert, order, experts, rows), parts[0].merged(parts[1], rows)
    for field, value in vars(whole).items():
        assert torch.equal(getattr(merged, field), value), field


def test_it_follows_what_is_divided() -> None:
    seen = observed(torch.randn(20, 3), torch.arange(20) % 3, torch.arange(20), 4, 5)
    before, s = copy.deepcopy(seen), 2.0 ** torch.randint(-3, 4, (4, 3))
    seen.divide(s)
    assert torch.equal(seen.amax * s, before.amax)
    for e in range(4):
        assert torch.equal(seen.rows_of(e) * s[e], before.rows_of(e))
    assert torch.equal(before.typical_range()[3], torch.zeros(3))
    rows = before.rows_of(1).double()
    expected = (rows / rows.abs().amax(1, keepdim=True)).square().mean(0).sqrt()
    torch.testing.assert_close(before.typical_range()[1].double(), expected)


class Sorted(nn.Module):
    """A linear layer for each expert, which is given how many rows it has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        return torch.cat([rows @ self.weight[e].T for e, rows in enumerate(x.split(sizes))])


@ANY
@pytest.mark.parametrize("route_all", [False, True])
def test_rows_that_are_sorted_by_expert(route_all: bool) -> None:
    """There is no up projection: they are inputs of the down projection themselves. Padding is known no more."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Sorted()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.experts(x.flatten(0, 1), [4, 0, 3])  # type: ignore[no-any-return]

    x, mask = torch.randn(1, 7, 4), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    stats = calibrate(Block(), [{"x": x, "attention_mask": mask}], route_all_experts=route_all)
    seen, rows = stats.experts["experts.weight"], x[0].abs()
    assert seen.tokens.tolist() == ([7, 7, 7] if route_all else [4, 0, 3])
    expected = (
        rows.amax(0).expand(3, 4) if route_all else torch.stack([rows[:4].amax(0), torch.zeros(4), rows[4:].amax(0)])
    )
    assert torch.equal(seen.amax, expected)
    assert torch.equal(stats.observers["experts"].amax, rows.amax(0))
