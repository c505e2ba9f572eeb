"""Which norms are recognized, by what they compute; and that their stand-ins give the same bits and gradients."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from octavo.fused.norms import FusedRMSNorm, fused_norms
from tests.tiny_models import qwen3_moe

pytest.importorskip("transformers")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
K = 24

RECOGNIZED = [
    "llama.LlamaRMSNorm", "qwen2.Qwen2RMSNorm", "qwen3.Qwen3RMSNorm", "mistral.MistralRMSNorm",
    "mixtral.MixtralRMSNorm", "phi3.Phi3RMSNorm", "deepseek_v3.DeepseekV3RMSNorm", "granite.GraniteRMSNorm",
    "llama4.Llama4TextRMSNorm", "mamba.MambaRMSNorm",
    "t5.T5LayerNorm", "mt5.MT5LayerNorm", "idefics.IdeficsRMSNorm",
    "olmo2.Olmo2RMSNorm", "gpt_oss.GptOssRMSNorm", "gemma3n.Gemma3nRMSNorm",
]  # fmt: skip
every_class = pytest.mark.parametrize("name", RECOGNIZED)


def norm_of(name: str, k: int = K, dtype: torch.dtype = torch.float32) -> Any:
    """A norm of transformers' class `name` with a random weight [k]."""
    folder, _, cls = name.partition(".")
    norm = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), cls)(k, eps=1e-5)
    return with_random_weight(norm).to(dtype)


def with_random_weight(norm: Any) -> Any:
    norm.weight.data = torch.randn_like(norm.weight)
    return norm


def fused(norm: nn.Module) -> FusedRMSNorm:
    return fused_norms(nn.Sequential(norm))["0"]


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows [..., K] of which some are so small that eps matters."""
    return (torch.randn(shape) * torch.logspace(-4, 2, shape[-2]).unsqueeze(1)).to(dtype)


def same(y: Tensor, other: Tensor) -> bool:
    return y.dtype == other.dtype and torch.equal(y, other)


# -- the same bits ----------------------------------------------------------------------------------------------------


@every_class
def test_the_same_bits_in_every_dtype(name: str) -> None:
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        norm = norm_of(name, dtype=weight_dtype)
        x = rows(3, 7, K, dtype=dtype)
        before = x.clone()
        assert same(fused(norm)(x), norm(x)) and same(x, before)


@every_class
def test_the_same_bits_under_autocast(name: str) -> None:
    for dtype, weight_dtype in itertools.product(DTYPES[:2], DTYPES[:2]):
        norm = norm_of(name, dtype=weight_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            x = rows(3, 7, K, dtype=dtype)
            assert same(fused(norm)(x), norm(x))


@every_class
def test_the_formula(name: str) -> None:
    norm, x = norm_of(name), rows(50, K)
    wide = x.double()
    expected = norm.weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(fused(norm)(x).double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["llama.LlamaRMSNorm", "t5.T5LayerNorm", "olmo2.Olmo2RMSNorm"])
@given(data=st.data())
def test_any_shape_and_strides(name: str, data: st.DataObject) -> None:
    k = data.draw(st.integers(2, 130), label="K")
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3), label="shape")
    step = data.draw(st.integers(1, 3), label="step between columns")
    dtype = data.draw(st.sampled_from(DTYPES))
    order = data.draw(st.permutations(range(len(shape) + 1)), label="order of the axes in memory")
    sizes = [*shape, k * step]
    x = torch.randn([sizes[axis] for axis in order]).to(dtype)
    x = x.permute([order.index(axis) for axis in range(len(order))])[..., ::step]
    norm = norm_of(name, k, dtype)
    assert x.shape == (*shape, k) and same(fused(norm)(x), norm(x))


def test_the_norms_of_queries_and_keys_by_head() -> None:
    model = qwen3_moe()
    found = fused_norms(model)
    names = [name for name, module in model.named_modules() if "RMSNorm" in type(module).__name__]
    assert list(found) == names and any(name.endswith("q_norm") for name in names)
    for name in names:
        norm = with_random_weight(model.get_submodule(name))
        x = torch.randn(2, 4, 9, len(norm.weight)).transpose(1, 2)
        assert same(found[name](x), norm(x))


@every_class
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_the_same_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    norm = norm_of(name, dtype=dtype)
    x = torch.randn(5, K, dtype=dtype, requires_grad=True)
    up = torch.randn(5, K, dtype=dtype)
    ours, theirs = (torch.autograd.grad(layer(x), (x, norm.weight), up) for layer in (fused(norm), norm))
    for grad, expected in zip(ours, theirs, strict=True):
        assert grad.dtype == expected.dtype and (grad - expected).norm() < tolerance * expected.norm()


@every_class
@pytest.mark.parametrize("autocast", [False, True])
def test_where_no_gradient_is_wanted_the_same_but_for_rounding(name: str, autocast: bool) -> None:
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        norm = norm_of(name, dtype=weight_dtype)
        x = rows(3, 7, K, dtype=dtype)
        tolerance = 2 * max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(fused(norm)(x), norm(x), rtol=tolerance, atol=1e-6)


@pytest.mark.gpu
@every_class
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_but_for_rounding(name: str, autocast: bool) -> None:
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        norm = norm_of(name, dtype=weight_dtype).cuda()
        x = rows(3, 7, K, dtype=dtype).cuda()
        tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            for wanted in (True, False):  # a gradient: without it one kernel does all
                with torch.set_grad_enabled(wanted):
                    torch.testing.assert_close(fused(norm)(x), norm(x), rtol=tolerance, atol=1e-6)


# -- look-alikes ------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Llama's norm, to be varied."""

    def __init__(self, k: int = K, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normalized(x.float()).to(x.dtype)

    def normalized(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def test_what_the_look_alikes_vary_is_recognized() -> None:
    assert fused(RMSNorm())._eps_name == "eps"


class Centered(RMSNorm):
    def normalized(self, x: Tensor) -> Tensor:
        return super().normalized(x - x.mean(-1, keepdim=True))


class EpsOutsideTheRoot(RMSNorm):
    def normalized(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class EpsAsALimit(RMSNorm):
    def normalized(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True).clamp(min=self.eps))


class EpsTwice(RMSNorm):
    def normalized(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.eps)


class ClampsLargeValues(RMSNorm):
    def normalized(self, x: Tensor) -> Tensor:
        return super().normalized(x).clamp(-3, 3)


class SumOfSquares(RMSNorm):
    def normalized(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps)


class InGroups(RMSNorm):
    def normalized(self, x: Tensor) -> Tensor:
        return super().normalized(x.unflatten(-1, (2, -1))).flatten(-2)


class OverAllHeads(RMSNorm):
    """Normalizes the last two axes of four together."""

    def normalized(self, x: Tensor) -> Tensor:
        axes = (-2, -1) if x.dim() == 4 else -1
        return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + self.eps)


class ByOnePlusWeight(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * self.normalized(x.float()).to(x.dtype)


class InTheDtypeOfX(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normalized(x)


class AlwaysFloat32(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class NoiseInTraining(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.training * torch.rand_like(x)


class ZeroesItsInput(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.zero_()
        return y


class Counting(RMSNorm):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class OptionalGate(RMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if gate is None else y * gate.sigmoid()


class OptionalInput(RMSNorm):
    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.weight if x is None else super().forward(x)


class ManyInputs(RMSNorm):
    def forward(self, *x: Tensor) -> Any:
        return super().forward(x[0]) if len(x) == 1 else tuple(map(super().forward, x))


class FixedEps(RMSNorm):
    def normalized(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


class Failing(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("not before it is set up")


def with_hook(register: str) -> RMSNorm:
    norm = RMSNorm()
    getattr(norm, register)(lambda *_: None)
    return norm


def with_buffer() -> RMSNorm:
    norm = RMSNorm()
    norm.register_buffer("seen", torch.zeros(1))
    return norm


def with_child() -> RMSNorm:
    norm = RMSNorm()
    norm.inner = RMSNorm()
    return norm


def with_bias() -> RMSNorm:
    norm = RMSNorm()
    norm.bias = nn.Parameter(torch.zeros(K))
    return norm


def with_forward_of_its_own() -> RMSNorm:
    norm = RMSNorm()
    norm.forward = lambda x: RMSNorm.forward(norm, x)  # type: ignore[method-assign]
    return norm


def with_a_list() -> RMSNorm:
    norm = RMSNorm()
    norm.seen = []
    return norm


def with_a_tensor() -> RMSNorm:
    norm = RMSNorm()
    norm.table = torch.ones(K)
    return norm


def gated() -> nn.Module:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    return Qwen3NextRMSNormGated(K)  # type: ignore[no-any-return]


VARIED = (
    Centered, EpsOutsideTheRoot, EpsAsALimit, EpsTwice, ClampsLargeValues, SumOfSquares, InGroups, OverAllHeads,
    ByOnePlusWeight, InTheDtypeOfX, AlwaysFloat32, NoiseInTraining, ZeroesItsInput, Counting, OptionalGate,
    OptionalInput, ManyInputs, FixedEps, Failing,
)  # fmt: skip

LOOK_ALIKES: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: cls for cls in VARIED},
    **{
        name: partial(norm_of, name)
        for name in ("gemma.GemmaRMSNorm", "gemma3.Gemma3RMSNorm", "cohere.CohereLayerNorm")
    },
    "a tiny eps twice": lambda: EpsTwice(eps=1e-9),
    "gated": gated,
    "torch's own": lambda: nn.RMSNorm(K, eps=1e-5),
    "layer norm": lambda: nn.LayerNorm(K),
    "layer norm without bias": lambda: nn.LayerNorm(K, bias=False),
    "prelu": lambda: nn.PReLU(K),
    "forward hook": lambda: with_hook("register_forward_hook"),
    "forward pre-hook": lambda: with_hook("register_forward_pre_hook"),
    "backward hook": lambda: with_hook("register_full_backward_hook"),
    "state dict hook": lambda: with_hook("register_state_dict_post_hook"),
    "buffer": with_buffer,
    "child": with_child,
    "bias": with_bias,
    "forward of the instance": with_forward_of_its_own,
    "a list": with_a_list,
    "a tensor": with_a_tensor,
    "one weight for all columns": lambda: RMSNorm(1),
    "fp64": lambda: RMSNorm().double(),
    "2-D": lambda: RMSNorm((2, K)),  # type: ignore[arg-type]
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm, of some dtypes
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_is_left_alone(name: str) -> None:
    norm = LOOK_ALIKES[name]()
    before = repr(vars(norm))
    # The child of one of them is a norm like any other.
    assert fused_norms(nn.Sequential(norm)).keys() == ({"0.inner"} if name == "child" else set())
    assert repr(vars(norm)) == before


def test_of_several_numbers_eps_is_the_one_that_is_used() -> None:
    norm = RMSNorm()
    norm.init_std, norm.eps, norm.momentum = 1e-5, 1e-3, 0.1
    (norm.eps_of_another,) = (1e-6,)
    assert fused(norm)._eps_name == "eps"


class CenteredIfTold(RMSNorm):
    def __init__(self, centered: bool) -> None:
        super().__init__()
        self.centered = centered

    def normalized(self, x: Tensor) -> Tensor:
        return super().normalized(x - x.mean(-1, keepdim=True) if self.centered else x)


@pytest.mark.parametrize("centered", [[False, True, False], [True, False]])
def test_norms_of_one_class_may_differ(centered: list[bool]) -> None:
    model = nn.ModuleList(map(CenteredIfTold, centered))
    assert list(fused_norms(model)) == [str(i) for i, is_centered in enumerate(centered) if not is_centered]


def test_norms_of_two_classes_may_hold_the_same() -> None:
    assert list(fused_norms(nn.ModuleList([RMSNorm(), Centered()]))) == ["0"]


def test_a_tied_weight_stays_tied() -> None:
    model = nn.ModuleList([RMSNorm(), RMSNorm(eps=1e-2)])
    model[1].weight = model[0].weight
    found = fused_norms(model)
    assert found["0"].weight is found["1"].weight
    x = rows(20, K)
    assert all(same(found[str(i)](x), model[i](x)) for i in range(2))


# -- a stand-in is what the norm was ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_it_has_what_the_norm_had(training: bool) -> None:
    norm = RMSNorm().train(training)
    norm.weight.requires_grad_(False)
    norm.hidden_size, norm.shape, norm.label = K, (K,), None
    found = fused(norm)
    assert found.weight is norm.weight and not found.weight.requires_grad
    assert found.state_dict().keys() == norm.state_dict().keys()
    assert (found.training, found.eps, found.hidden_size, found.shape, found.label) == (training, 1e-5, K, (K,), None)
    assert repr(found) == "FusedRMSNorm(24, eps=1e-05, rounding='x')"


def test_its_argument_may_be_named() -> None:
    norm = norm_of("llama.LlamaRMSNorm")
    x = rows(5, K)
    assert same(fused(norm)(hidden_states=x), norm(hidden_states=x))


def test_on_meta_and_without_a_trace() -> None:
    with torch.device("meta"):
        norm = RMSNorm()
        random = torch.get_rng_state()
        found = fused(norm)
    assert found.weight is norm.weight and found.weight.is_meta
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    norm = RMSNorm()
    torch.set_default_dtype(dtype)
    assert same(fused(norm)(x := rows(5, K)), norm(x))


@pytest.mark.parametrize("name", ["llama.LlamaRMSNorm", "t5.T5LayerNorm", "olmo2.Olmo2RMSNorm"])
class TestOneOfEachRounding:
    def test_copies_and_pickles(self, name: str) -> None:
        found, x = fused(norm_of(name)), rows(5, K)
        for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert same(twin(x), found(x)) and twin.weight is not found.weight and repr(twin) == repr(found)

    def test_compiled(self, name: str) -> None:
        found = fused(norm_of(name, dtype=torch.bfloat16))
        torch._dynamo.reset()
        compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
        x = rows(5, K, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), found(x))

    @pytest.mark.parametrize("strict", [False, True])
    def test_exported(self, name: str, strict: bool) -> None:
        found, x = nn.Sequential(fused(norm_of(name))), rows(5, K)
        exported = torch.export.export(
            found, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=strict
        )
        more = rows(9, K)
        torch.testing.assert_close(exported.module()(more), found(more))
