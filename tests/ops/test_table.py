"""The table of ops: every op is whole (schema, reference, fake, gradient), and who serves it is told."""

from __future__ import annotations

import collections
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from octavo import ops
from octavo.errors import OctavoError
from octavo.ops import OPS, attention, backends, reference
from octavo.primitives import quantize_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    codes, scale = quantize_weight(torch.randn(5, 12))
    grouped, grouped_scale = quantize_weight(torch.randn(5, 12), "per_group", group_size=4)
    bias = torch.randn(5, dtype=dtype, requires_grad=grad)
    xs = [
        torch.randn(3, 12),
        torch.randn(2, 3, 12),
        torch.randn(12),
        torch.randn(0, 12),
        torch.randn(12, 3).T,
        torch.randn(2, 12, 3).transpose(1, 2),
    ]
    return [
        (x.to(dtype).detach().requires_grad_(grad), *weights)
        for x in xs
        for weights in ((codes, scale, bias), (codes, scale, None), (grouped, grouped_scale, bias))
    ]


def images(dtype: torch.dtype, grad: bool) -> list[Tensor]:
    x = torch.randn(2, 4, 6, 5).to(dtype)
    return [
        image.detach().requires_grad_(grad) for image in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2, 1:])
    ]


def conv(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    bias = torch.randn(6, dtype=dtype, requires_grad=grad)
    samples: list[tuple[Any, ...]] = []
    for groups in (1, 2):
        codes, scale = quantize_weight(torch.randn(6, 4 // groups, 2, 3))
        samples += [(x, codes, scale, bias, [1, 2], [0, 1], [1, 1], groups) for x in images(dtype, grad)]
    depthwise, scale = quantize_weight(torch.randn(4, 1, 3))
    x = torch.randn(1, 4, 7).to(dtype).requires_grad_(grad)
    return [*samples, (x, depthwise, scale, None, [1], [2], [2], 4)]


def conv_transpose(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    bias = torch.randn(6, dtype=dtype, requires_grad=grad)
    samples: list[tuple[Any, ...]] = []
    for groups in (1, 2):
        codes, scale = quantize_weight(torch.randn(6, 4 // groups, 2, 3))
        samples += [(x, codes, scale, bias, [1, 2], [0, 1], [1, 1], [0, 1], groups) for x in images(dtype, grad)]
    return samples


def embedding(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    codes, scale = quantize_weight(torch.randn(11, 6))
    indices = [torch.tensor(3), torch.randint(0, 11, (3, 2)), torch.randint(0, 11, (3, 2)).T, torch.empty(0, 2).long()]
    return [(index, codes, scale, dtype) for index in indices]


def activations(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    """Codes have no gradient: the wrappers hand no input with one to the op."""
    xs = [torch.randn(2, 3, 12), torch.randn(12), torch.randn(0, 12), torch.randn(3, 0), torch.randn(12, 3).T]
    return [(x.to(dtype),) for x in [*xs, torch.randn(1, 12).expand(4, 12), torch.zeros(2, 5)]]


def static_activations(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    return [(x, torch.tensor([0.02])) for (x,) in activations(dtype, grad)]


def weights(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    """Without a gradient: the wrapper detaches them."""
    return [(w.to(dtype),) for w in (torch.randn(5, 12), torch.randn(12, 5).T, torch.randn(3, 1), torch.zeros(2, 4))]


def int8_linear(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    codes, scale = quantize_weight(torch.randn(5, 12))
    bias = torch.randn(5, dtype=dtype, requires_grad=grad)
    samples: list[tuple[Any, ...]] = []
    for x in (torch.randn(3, 12), torch.randn(2, 3, 12), torch.randn(12), torch.randn(0, 12), torch.randn(12, 3).T):
        samples.append((*ops.quantize_per_token(x), codes, scale, bias, dtype))
    return [*samples, (*ops.quantize_per_tensor(torch.randn(2, 3, 12)), codes, scale, None, dtype)]


def stacks() -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of three experts, and the ends of their rows: one has none, and two rows belong to nobody."""
    codes, scale = quantize_weight(torch.randn(3 * 5, 12))
    return codes.view(3, 5, 12), scale.view(3, 5, 1), torch.tensor([3, 3, 4], dtype=torch.int32)


def experts_linear(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    codes, scale, ends = stacks()
    bias = torch.randn(3, 5, dtype=dtype, requires_grad=grad)
    xs = [torch.randn(6, 12), torch.randn(12, 6).T, torch.randn(1, 12).expand(6, 12)]
    samples: list[tuple[Any, ...]] = [
        (x.to(dtype).detach().requires_grad_(grad), ends, codes, scale, b) for x in xs for b in (bias, None)
    ]
    nothing = torch.randn(0, 12, dtype=dtype, requires_grad=grad)
    return [*samples, (nothing, torch.zeros_like(ends), codes, scale, bias)]


def int8_experts_linear(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    codes, scale, ends = stacks()
    bias = torch.randn(3, 5, dtype=dtype, requires_grad=grad)
    some, nothing = (ops.quantize_per_token(torch.randn(rows, 12)) for rows in (6, 0))
    return [
        (*some, ends, codes, scale, bias, dtype),
        (*some, ends, codes, scale, None, dtype),
        (*nothing, torch.zeros_like(ends), codes, scale, bias, dtype),
    ]


def int8_attention(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    """Without a gradient, which is refused."""
    q, k, v = (torch.randn(2, heads, tokens, 8).to(dtype) for heads, tokens in ((4, 3), (2, 5), (2, 5)))
    allowed = torch.rand(2, 1, 3, 5) < 0.7
    return [
        (q, k, v, None, 0.3),
        (q, k, v, allowed, 0.3, 2.0),
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, v[..., :6], torch.randn(1, 4, 1, 5), 0.3),
        (q[:, :, :0], k, v, None, 0.3),
    ]


def float_attention(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
    """Without a gradient, which is refused."""
    q, k, v = (torch.randn(2, heads, tokens, 8).to(dtype) for heads, tokens in ((4, 5), (2, 5), (2, 5)))
    allowed = (torch.rand(2, 1, 5, 5) < 0.7) | torch.eye(5, dtype=torch.bool)
    return [
        (q, k, v, None, 0.3, True),
        (q, k, v, allowed, 0.3, False),
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, v[..., :6], None, 0.3, False),
        (q[:, :, :0], k, v, None, 0.3, False),
    ]


def of_codes(
    samples: Callable[[torch.dtype, bool], list[tuple[Any, ...]]],
) -> Callable[[torch.dtype, bool], list[tuple[Any, ...]]]:
    def quantized(dtype: torch.dtype, grad: bool) -> list[tuple[Any, ...]]:
        return [
            (q, *ops.quantize_per_token(k), *attention.value_codes(v), *rest) for q, k, v, *rest in samples(dtype, grad)
        ]

    return quantized


SAMPLES: dict[str, Callable[[torch.dtype, bool], list[tuple[Any, ...]]]] = {
    "w8a16_linear": linear,
    "w8a16_conv": conv,
    "w8a16_conv_transpose": conv_transpose,
    "w8a16_embedding": embedding,
    "quantize_per_token": activations,
    "quantize_per_tensor": activations,
    "quantize_static": static_activations,
    "quantize_weight": weights,
    "w8a8_linear": int8_linear,
    "w8a16_experts_linear": experts_linear,
    "w8a8_experts_linear": int8_experts_linear,
    "int8_attention": int8_attention,
    "float_attention": float_attention,
    "int8_attention_of_codes": of_codes(int8_attention),
    "float_attention_of_codes": of_codes(float_attention),
}

WITHOUT_GRADIENT = {"quantize_per_token", "quantize_per_tensor", "quantize_static", "quantize_weight"}
"""Their wrappers detach the input; `ops.straight_through` gives it a gradient around them."""


ONLY_WRAPPERS: dict[str, set[str]] = collections.defaultdict(set, quantize_weight={"granularity", "group_size", "name"})
"""Op -> parameters that its wrapper deals with: the granularity is a matter of how the rows are cut."""


def test_every_op_has_samples_here() -> None:
    assert SAMPLES.keys() == OPS.keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from within opcheck itself, in torch 2.15
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(name: str, dtype: torch.dtype, grad: bool) -> None:
    """Schema, fake kernel and gradient say the same as the reference does."""
    op = getattr(torch.ops.octavo, name).default
    for sample in SAMPLES[name](dtype, grad):
        torch.library.opcheck(op, sample, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    # Traced with symbolic sizes, forward and backward: slow, so not for every sample.
    torch.library.opcheck(op, SAMPLES[name](dtype, grad)[0], test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_reference_and_fake_for_every_device(name: str) -> None:
    full = f"octavo::{name}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(full, "Meta")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(full, "Autograd") == (name not in WITHOUT_GRADIENT)
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(full, "CUDA")
    assert callable(getattr(attention if "_attention" in name else reference, name))


@pytest.mark.parametrize("name", OPS)
def test_the_wrapper_is_documented_and_has_the_arguments_of_the_schema(name: str) -> None:
    wrapper = getattr(ops, name)
    schema = getattr(torch.ops.octavo, name).default._schema
    parameters = [p.name for p in inspect.signature(wrapper).parameters.values() if p.name not in ONLY_WRAPPERS[name]]
    assert parameters == [argument.name for argument in schema.arguments]
    assert wrapper.__doc__ and "Returns: " in wrapper.__doc__
    assert name in ops.__all__
    assert name in (ops.__doc__ or ""), "the table at the head of octavo/ops/__init__.py has a line for each op"


def test_no_op_changes_its_arguments_or_returns_one() -> None:
    for name in OPS:
        schema = getattr(torch.ops.octavo, name).default._schema
        assert not schema.is_mutable
        assert all(result.alias_info is None for result in schema.returns)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of torch's own, at its first dual_level
@pytest.mark.parametrize("name", [name for name in OPS if name != "quantize_weight"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_mode_derivative_is_refused_and_not_lost(name: str, grad: bool) -> None:
    """torch takes an op without one for a constant: derivatives behind it would be 0, and nothing would say so."""
    wrapper = getattr(ops, name)
    sample = SAMPLES[name](torch.float32, False)[0]
    floats = [i for i, x in enumerate(sample) if isinstance(x, Tensor) and x.is_floating_point()]
    for i in floats:

        def of(x: Tensor, i: int = i) -> Any:
            with torch.set_grad_enabled(grad):
                return call(wrapper, *sample[:i], x, *sample[i + 1 :])

        with pytest.raises(OctavoError, match="forward-mode"):
            torch.func.jvp(of, (sample[i],), (torch.ones_like(sample[i]),))
        with forward_ad.dual_level(), pytest.raises(OctavoError, match="forward-mode"):
            of(forward_ad.make_dual(sample[i].clone().requires_grad_(), torch.ones_like(sample[i])))
        with forward_ad.dual_level():
            of(sample[i])  # nobody asks for a derivative of this one


def call(wrapper: Callable[..., Any], *args: Any) -> Any:
    """The wrapper of an op with the arguments of its schema, of which it may take the last by name only."""
    parameters = inspect.signature(wrapper).parameters.values()
    named = {p.name: x for p, x in zip(parameters, args, strict=False) if p.kind is p.KEYWORD_ONLY}
    return wrapper(*args[: len(args) - len(named)], **named)


# -- who serves -------------------------------------------------------------------------------------------------------


def test_backends_tells_who_serves_and_why() -> None:
    rows = backends()
    assert [row.op for row in rows if row.device == "cpu"] == list(OPS)
    assert all(row.backend and row.why for row in rows)


def in_a_new_process(**environment: str) -> subprocess.CompletedProcess[str]:
    """What serves is settled when the ops are loaded."""
    code = "import octavo; print({(row.backend, row.why) for row in octavo.backends() if row.device == 'cpu'})"
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_the_reference_can_be_forced() -> None:
    assert in_a_new_process(OCTAVO_BACKEND="reference").stdout == "{('reference', 'forced by OCTAVO_BACKEND')}\n"


def test_an_unknown_backend_is_an_error() -> None:
    found = in_a_new_process(OCTAVO_BACKEND="refrence")
    assert found.returncode and "OCTAVO_BACKEND is 'refrence'; expected 'reference'" in found.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_computes_what_the_cpu_does(name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.octavo, name).default
    for sample in SAMPLES[name](dtype, False):
        on_cpu = op(*sample)
        on_gpu = op(*(value.cuda() if isinstance(value, Tensor) else value for value in sample))
        for there, here in zip(*([y] if isinstance(y, Tensor) else y for y in (on_gpu, on_cpu)), strict=True):
            assert there.is_cuda
            # A value that lies between two codes may fall on either, once the scale is rounded another way.
            atol = 1 if here.dtype == torch.int8 else 1e-4
            torch.testing.assert_close(there.cpu(), here, rtol=2 * torch.finfo(dtype).eps, atol=atol)
