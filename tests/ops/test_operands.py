"""Scales and biases of another layer are refused, whoever serves the op: kernels read what the shapes promise."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from octavo import ops
from octavo.errors import QuantizeError
from octavo.ops import reference

N, K, E = 8, 64, 2
WRONG_SCALES = [(N,), (1, 1), (N - 1, 1), (N, 3), (N, 0), (1, N, 1)]
WRONG_BIASES = [(1,), (N - 1,), (N, 1), (2 * N,)]

pytestmark = pytest.mark.parametrize("served_by", [ops, reference], ids=["ops", "reference"])


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", WRONG_SCALES)
def test_a_scale_of_another_layer(served_by: ModuleType, shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizeError, match=r"weight_scale: shape is .* expected \[8, 1\]"):
        served_by.w8a16_linear(torch.randn(2, K), codes(N, K), torch.ones(shape), None)
    with pytest.raises(QuantizeError, match=r"weight_scale: shape is .* expected \[8, 1\]"):
        served_by.w8a8_linear(codes(2, K), torch.ones(2, 1), codes(N, K), torch.ones(shape), None, torch.float32)


@pytest.mark.parametrize("shape", WRONG_SCALES)
def test_a_scale_of_another_table(served_by: ModuleType, shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizeError, match=r"weight_scale: shape is .* expected \[8, 1\] for an int8 table"):
        served_by.w8a16_embedding(torch.tensor([0, 1]), codes(N, K), torch.ones(shape), torch.float32)


def test_groups_of_an_int8_input(served_by: ModuleType) -> None:
    with pytest.raises(QuantizeError, match=r"weight_scale: shape is \[8, 2\], expected \[8, 1\]"):
        served_by.w8a8_linear(codes(2, K), torch.ones(2, 1), codes(N, K), torch.ones(N, 2), None, torch.float32)


@pytest.mark.parametrize("shape", WRONG_BIASES)
def test_a_bias_of_another_layer(served_by: ModuleType, shape: tuple[int, ...]) -> None:
    bias, scale = torch.ones(shape), torch.ones(N, 1)
    with pytest.raises(QuantizeError, match=r"bias: shape is .* expected \[8\]"):
        served_by.w8a16_linear(torch.randn(2, K), codes(N, K), scale, bias)
    with pytest.raises(QuantizeError, match=r"bias: shape is .* expected \[8\]"):
        served_by.w8a8_linear(codes(2, K), torch.ones(2, 1), codes(N, K), scale, bias, torch.float32)


@pytest.mark.parametrize("shape", [(N,), (1, N), (E, 1), (E * N,)])
def test_a_bias_of_other_experts(served_by: ModuleType, shape: tuple[int, ...]) -> None:
    ends, scale, bias = torch.tensor([1, 2], dtype=torch.int32), torch.ones(E, N, 1), torch.ones(shape)
    with pytest.raises(QuantizeError, match=r"bias: shape is .* expected \[2, 8\]"):
        served_by.w8a16_experts_linear(torch.randn(2, K), ends, codes(E, N, K), scale, bias)
    with pytest.raises(QuantizeError, match=r"bias: shape is .* expected \[2, 8\]"):
        served_by.w8a8_experts_linear(codes(2, K), torch.ones(2, 1), ends, codes(E, N, K), scale, bias, torch.float32)


def test_a_weight_of_experts_in_a_linear_layer(served_by: ModuleType) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        served_by.w8a16_linear(torch.randn(2, K), codes(E, N, K), torch.ones(E, N, 1), None)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64])
def test_an_input_that_no_layer_has(served_by: ModuleType, dtype: torch.dtype) -> None:
    x = torch.ones(2, K).to(dtype)
    with pytest.raises(QuantizeError, match=f"x: dtype is {dtype}, expected bf16, fp16 or fp32"):
        served_by.w8a16_linear(x, codes(N, K), torch.ones(N, 1), None)
    with pytest.raises(QuantizeError, match=f"x: dtype is {dtype}, expected bf16, fp16 or fp32"):
        served_by.quantize_per_token(x)


SPARSE = {
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.strided),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of torch's own making
@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("grad", [False, True])
def test_an_input_that_does_not_lie_in_memory_as_a_tensor_does(served_by: ModuleType, layout: str, grad: bool) -> None:
    x = SPARSE[layout](torch.ones(2, K))
    with torch.set_grad_enabled(grad), pytest.raises(QuantizeError, match=r"x: layout is .* expected torch.strided"):
        served_by.w8a16_linear(x, codes(N, K), torch.ones(N, 1), None)
    with torch.set_grad_enabled(grad), pytest.raises(QuantizeError, match=r"x: layout is .* expected torch.strided"):
        served_by.quantize_per_token(x)
