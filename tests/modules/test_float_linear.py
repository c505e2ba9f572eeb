"""Which linear layers get a stand-in; that it is the same layer, to autograd, compilers, files and the eye."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import octavo
from octavo.formats import load_into
from octavo.modules import QuantLinear, QuantModule
from octavo.modules.float_linear import FloatLinear, float_linears
from octavo.ops import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, K = 512, 520


def linear(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Linear:
    return nn.Linear(K, N, dtype=dtype, **options)


class Model(nn.Module):
    """A block, and a head that shares the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.lm_head = nn.Embedding(N, K), nn.Linear(K, K), nn.Linear(K, N, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.block(self.embed(tokens)))  # type: ignore[no-any-return]


def assert_is_near(y: torch.Tensor, x: torch.Tensor, layer: nn.Linear) -> None:
    bias = None if layer.bias is None else layer.bias.double()
    expected = F.linear(x.double(), layer.weight.double(), bias)
    worst = x.double().abs() @ layer.weight.double().abs().T
    allowed = expected.abs() * torch.finfo(y.dtype).eps + worst * 2.0**-20
    assert y.dtype == x.dtype and ((y.double() - expected).abs() <= allowed).all()


# -- the same values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product(dtype: torch.dtype) -> None:
    for bias, shape in itertools.product((True, False), ((K,), (1, K), (2, 3, K), (100, K))):
        layer, x = linear(dtype, bias=bias), torch.randn(shape).to(dtype)
        with torch.no_grad():
            assert_is_near(FloatLinear.of(layer)(x), x, layer)


def test_torch_computes_what_is_to_be_differentiated() -> None:
    layer, x = linear(), torch.randn(3, K, requires_grad=True)
    y = FloatLinear.of(layer)(x)
    assert torch.equal(y, layer(x))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, torch.autograd.grad(layer(x).square().sum(), x)[0])


def test_autocast_decides_the_dtype() -> None:
    layer, x = linear(), torch.randn(3, K)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = FloatLinear.of(layer)(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x))


def test_a_wrong_input_gets_torchs_error() -> None:
    new = FloatLinear.of(linear())
    with torch.no_grad():
        for wrong in (torch.randn(3, K - 1), torch.randn(3, K).half(), torch.tensor(1.0)):
            with pytest.raises(RuntimeError, match=r"(shape|size|dtype|at least 1D)"):
                new(wrong)


def test_a_trace_follows_its_input() -> None:
    new, x, other = FloatLinear.of(linear()), torch.randn(3, K), torch.randn(90, K)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.trace(_method)?` is deprecated")
        for traced in (torch.jit.trace(new, x, check_trace=False), make_fx(new)(x)):
            assert torch.equal(traced(other), F.linear(other, new.weight, new.bias))


def called_in(graph: Any) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_an_exported_graph_has_torchs_linear_layer() -> None:
    new, x = FloatLinear.of(linear()), torch.randn(3, K)
    with torch.no_grad():
        assert called_in(torch.export.export(nn.Sequential(new), (x,)).graph) == [torch.ops.aten.linear.default]


def test_a_compiled_graph_has_the_op_for_any_number_of_rows() -> None:
    new, graphs = FloatLinear.of(linear()), []

    def keep(module: Any, inputs: Any) -> Any:
        graphs.append(called_in(module.graph))
        return module.forward

    compiled = torch.compile(new, fullgraph=True, dynamic=True, backend=keep)
    with torch.no_grad():
        for rows in (3, 400, 7):
            x = torch.randn(rows, K)
            assert_is_near(compiled(x), x, new)
    ours, torchs = torch.ops.octavo.float_linear.default, torch._C._nn.linear
    # torch 2.10 tells all that it compiles that it is exported.
    has_kernel = dispatch.native_kernels.multiplies_in.get(torch.float32) and torch.__version__ >= "2.13"
    assert graphs == [[ours if has_kernel else torchs]]
    x = torch.randn(3, K, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None and graphs[1:] == [[torchs]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, when inductor is imported
def test_inductor_calls_it() -> None:
    new, x = FloatLinear.of(linear(torch.bfloat16)), torch.randn(3, K).bfloat16()
    with torch.no_grad():
        assert_is_near(torch.compile(new, fullgraph=True)(x), x, new)


# -- the same layer --------------------------------------------------------------------------------------------------


def test_it_is_the_layer_that_it_stands_for() -> None:
    layer = linear()
    layer.mark = "kept"  # type: ignore[assignment]
    new = FloatLinear.of(layer.eval())
    assert isinstance(new, nn.Linear) and new.weight is layer.weight and new.bias is layer.bias
    assert (new.in_features, new.out_features, new.mark, new.training) == (K, N, "kept", False)
    assert new.state_dict().keys() == layer.state_dict().keys()
    x = torch.randn(2, K)
    with torch.no_grad():
        for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
            assert type(other) is FloatLinear and torch.equal(other(x), new(x))
        assert_is_near(new.half()(x.half()), x.half(), new)


def test_which_layers_get_one() -> None:
    class Own(nn.Linear):
        pass

    class Packed(nn.Parameter):
        """As of those who quantize it their own way."""

    bound = linear()
    bound.forward = lambda x: x  # type: ignore[method-assign]
    packed, masked, adapted, scaled = (linear() for _ in range(4))
    packed.weight = Packed(packed.weight.data)
    masked.register_buffer("mask", torch.ones(N, K))
    adapted.add_module("adapter", nn.Identity())
    scaled.register_parameter("factor", nn.Parameter(torch.ones(N)))
    with torch.device("meta"):
        empty = linear()
    model = nn.ModuleDict(
        {
            "plain": linear(), "without_bias": linear(bias=False), "bf16": linear(torch.bfloat16), "meta": empty,
            "fp64": linear(torch.float64), "small": nn.Linear(8, 8), "derived": Own(K, N), "bound": bound,
            "normed": nn.utils.parametrizations.weight_norm(linear()),
            "attention": nn.MultiheadAttention(K, 4),
            "packed": packed, "masked": masked, "adapted": adapted, "scaled": scaled,
        }
    )  # fmt: skip
    assert list(float_linears(model)) == ["plain", "without_bias", "bf16", "meta"]


# -- in a model ------------------------------------------------------------------------------------------------------


def test_layers_that_stay_float_get_one() -> None:
    model = Model()
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    float_block = copy.deepcopy(model.block)
    report = octavo.quantize(model, "w8a16", ignore=["block"])
    assert type(model.block) is FloatLinear and type(model.lm_head) is FloatLinear
    assert model.lm_head.weight is model.embed.weight
    rows = {row.name: row for row in report.rows}
    assert rows["block.weight"].reason == "ignored by 'block'" and rows["lm_head.weight"].scheme is None
    x = torch.randn(2, K)
    with torch.no_grad():
        assert_is_near(model.block(x), x, float_block)
        model(torch.tensor([[1, 2, 3]]))
    assert seen == [(1, 3, N)]


def test_coverage_calls_them_what_they_were() -> None:
    model = Model()
    before = {row.name: row.kind for row in octavo.coverage(model).rows}
    octavo.quantize(model, "w8a16", ignore=["block"])
    assert {row.name: row.kind for row in octavo.coverage(model).rows} == before
    assert before["block.weight"] == "Linear"


def test_they_can_be_quantized_yet() -> None:
    model = Model()
    octavo.quantize(model, "w8a16", ignore=["block"])
    assert type(model.block) is FloatLinear and not any(isinstance(m, QuantModule) for m in model.modules())
    assert octavo.quantize(model, "w8a16").quantized_fraction > 0
    assert isinstance(model.block, QuantLinear)


def test_a_float_model_keeps_its_own() -> None:
    model = Model()
    octavo.coverage(model)
    assert type(model.lm_head) is nn.Linear


def test_loading_gives_one_too(tmp_path: Any) -> None:
    model = Model()
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "int8")
    loaded = load_into(tmp_path / "int8", Model())
    assert type(loaded.lm_head) is FloatLinear and loaded.lm_head.weight is loaded.embed.weight
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.skipif(
    not dispatch.native_kernels.multiplies_in.get(torch.bfloat16), reason="this processor has no kernel of octavo's"
)
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.10, of any use of it
def test_the_kernel_is_what_runs() -> None:
    new, x = FloatLinear.of(linear(torch.bfloat16)), torch.randn(1, K).bfloat16()
    with torch.no_grad(), torch.profiler.profile() as profile:
        new(x)
    called = {event.key for event in profile.key_averages()}
    assert "octavo::float_linear" in called and "aten::linear" not in called
