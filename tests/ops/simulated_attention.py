"""Int8 attention simulated in float, by the definition at the head of `octavo.ops.attention`."""

from __future__ import annotations

from torch import Tensor

from octavo.ops import attention
from octavo.ops.reference import in_full_precision

__all__ = ["fake_int8_attention"]


@in_full_precision
def fake_int8_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """What `int8_attention` computes: every operand is rounded to its codes and multiplied back.

    Arguments and result are those of `octavo.ops.int8_attention`; the two agree to the rounding of fp32 sums.
    """
    shared = query.shape[1] // key.shape[1]
    v, v_scale = (part.repeat_interleave(shared, 1) for part in attention.value_codes(value))
    scores = _rounded(query) @ _rounded(key).repeat_interleave(shared, 1).mT * scaling
    weights = _rounded(attention._probabilities(scores, mask, softcap) * v_scale.mT)
    return (weights @ v.float()).to(query.dtype)


def _rounded(x: Tensor) -> Tensor:
    codes, scale = attention._codes(x)
    return codes * scale
