"""Steps of recurrent layers, held to the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo import ops
from octavo.primitives import choose_scale, dequantize, quantize
from tests.ops.native.kernels import FLOATS, WITH_KERNELS, codes, strided

pytestmark = WITH_KERNELS

GATES_OF = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1}


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = choose_scale(x, "per_token")
    return quantize(x, scale), scale


def in_double(
    mode: str,
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: tuple[Tensor, ...],
    backwards: bool,
    int8_inputs: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The formulas of torch's documentation, h rounded to the dtype of p after each step as it is stored."""
    h, *cells = (part.double() for part in state)
    outputs = []
    for x in (reversed if backwards else list)(p.double().unbind()):
        rounded = dequantize(*quantized(h.to(p.dtype))).double() if int8_inputs else h
        q = rounded @ weight.T + (0 if bias is None else bias.double())
        if mode == "LSTM":
            i, f, g, o = (x + q).chunk(4, -1)
            cells = [f.sigmoid() * cells[0] + i.sigmoid() * g.tanh()]
            h = o.sigmoid() * cells[0].tanh()
        elif mode == "GRU":
            (r, z, n), (q_r, q_z, q_n) = x.chunk(3, -1), q.chunk(3, -1)
            n = (n + (r + q_r).sigmoid() * q_n).tanh()
            h = (1 - (z + q_z).sigmoid()) * n + (z + q_z).sigmoid() * h
        else:
            h = (x + q).tanh()
        h = h.to(p.dtype).double()
        outputs.append(h)
    return torch.stack(outputs[::-1] if backwards else outputs), (h, *cells)


@given(
    mode=st.sampled_from(sorted(GATES_OF)),
    steps=st.integers(1, 6),
    batch=st.sampled_from([1, 2, 7, 40]),
    hidden=st.sampled_from([1, 3, 8, 15, 16, 33, 100, 260]),
    groups=st.sampled_from([1, 2]),
    dtype=st.sampled_from(FLOATS),
    how=st.sampled_from(["as it lies", "gaps", "transposed"]),
    size=st.sampled_from([0.1, 2.0, 60.0]),
    has_bias=st.booleans(),
    backwards=st.booleans(),
    int8_inputs=st.booleans(),
)
def test_steps(
    isa: str, mode: str, steps: int, batch: int, hidden: int, groups: int, dtype: torch.dtype, how: str, size: float,
    has_bias: bool, backwards: bool, int8_inputs: bool,
) -> None:  # fmt: skip
    n, groups = GATES_OF[mode] * hidden, groups if hidden % groups == 0 and not int8_inputs else 1
    weight, scale = codes(n, hidden), torch.rand(n, groups) / (127 * hidden**0.5)
    p = (torch.randn(steps, batch, n) * size).to(dtype)
    bias = torch.randn(n).to(dtype) if has_bias else None
    state = tuple(torch.randn(batch, hidden).to(dtype) for _ in range(2 if mode == "LSTM" else 1))
    before = [part.clone() for part in state]
    with torch.no_grad():
        found = ops.recurrent(
            mode, strided(p, how), weight, scale, bias, state, int8_inputs=int8_inputs, backwards=backwards
        )
    assert found is not None and found[0].dtype == dtype and found[0].shape == (steps, batch, hidden)
    exact = weight.double() * scale.double().repeat_interleave(hidden // groups, 1)
    expected = in_double(mode, p, exact, bias, state, backwards, int8_inputs)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    tolerance *= 1 if not int8_inputs or steps == 1 else 300 if dtype == torch.float32 else 2  # a code may be another
    for ours, theirs in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    assert all(map(torch.equal, state, before))


@pytest.mark.parametrize("mode", GATES_OF)
def test_gates_at_the_ends(isa: str, mode: str) -> None:
    """Infinite gates are open or closed, and NaN is that of its own number alone."""
    ends = torch.tensor([torch.inf, 3e38, 100.0, -100.0, -3e38, -torch.inf])
    hidden = len(ends) + 1
    p = torch.cat([ends, torch.tensor([torch.nan])]).repeat(GATES_OF[mode]).view(1, 1, -1)
    state = tuple(torch.full((1, hidden), 0.5) for _ in range(2 if mode == "LSTM" else 1))
    nothing = torch.zeros(p.shape[-1], hidden, dtype=torch.int8), torch.ones(p.shape[-1], 1)
    with torch.no_grad():
        found = ops.recurrent(mode, p, *nothing, None, state, int8_inputs=False, backwards=False)
    assert found is not None
    expected, _ = in_double(mode, p, nothing[0].double(), None, state, False)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=1e-30, equal_nan=True)
    assert found[0][..., -1].isnan().all() and not found[0][..., :-1].isnan().any()


def test_are_left_to_the_formulas_where_somebody_listens(isa: str) -> None:
    p, weight, scale, h = torch.randn(3, 2, 8), codes(8, 8), torch.rand(8, 1), torch.randn(2, 8)

    def called(mode: str = "RNN_TANH", p: Tensor = p, h: Tensor = h) -> bool:
        return ops.recurrent(mode, p, weight, scale, None, (h,), int8_inputs=False, backwards=False) is not None

    assert not called(), "a gradient may be wanted"
    with torch.no_grad():
        assert called()
        assert not called(p=p.double(), h=h.double()) and not called(p=p.bfloat16()) and not called(mode="RNN_RELU")
        assert not called(p=p[:0])


def test_operands_that_do_not_fit_are_refused(isa: str) -> None:
    p, weight, scale, h = torch.randn(3, 2, 32), codes(32, 8), torch.rand(32, 1), torch.randn(2, 8)
    with torch.no_grad():
        for operands, message in (
            ((p[..., :24], weight, scale, None, (h, h)), "must be of one layer"),
            ((p, weight, scale, None, (h[:1], h)), "must be of one layer"),
            ((p, weight, scale, None, (h, h[:1])), "c must be fp32, of the size of h"),
            ((p, weight[:, :7], scale, None, (h, h)), "x must have rows of 7 values"),
        ):
            with pytest.raises(RuntimeError, match=message):
                ops.recurrent("LSTM", *operands, int8_inputs=False, backwards=False)  # type: ignore[arg-type]
