"""The arithmetic of int8, which every kernel, format and test follows.

    scale = amax(|x|) / 127              over the axis of the granularity, in fp32
    code  = clamp(round_half_even(x / scale), -127, 127)
    x'    = code * scale

Codes are computed against the scale that is *stored*: it is first rounded to the tensor's own dtype (bf16 stays bf16).
Readers of a checkpoint hold scales in the model's dtype, and codes computed against a finer scale would lose accuracy
there. In memory a scale is always a fp32 tensor.

    granularity   for                  scale shape
    per_tensor    weight, activation   [1]
    per_channel   weight [N, ...]      [N, 1]
    per_group g   weight [N, K]        [N, K/g]
    per_token     activation [..., K]  [..., 1]

per_channel reduces over everything but dim 0: for an `nn.Linear` weight [N, K] that is over K, one scale for each
output channel. Source: SmoothQuant (Xiao et al., arXiv:2211.10438), section 2, with qmax = 2**(8-1) - 1 = 127.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from octavo.errors import QuantizeError

__all__ = [
    "GRANULARITIES",
    "Granularity",
    "Range",
    "amax",
    "check_finite",
    "check_group_size",
    "choose_scale",
    "dequantize",
    "quantize",
    "quantize_weight",
    "rounded_quotient",
]

Granularity = Literal["per_tensor", "per_channel", "per_group", "per_token"]
GRANULARITIES: tuple[Granularity, ...] = ("per_tensor", "per_channel", "per_group", "per_token")

Range = Literal["narrow", "full"]
"""narrow: scale = amax / 127, codes in [-127, 127] (octavo's own).
full: scale = max(amax / 127.5, 2**-23), codes in [-128, 127], codes fitted to the fp32 scale: gpt-fast's
`dynamically_quantize_per_channel(w, -128, 127, torch.int8)`, for reading and writing its checkpoints bit for bit."""

_DIVISOR = {"narrow": 127.0, "full": 127.5}
_QMIN = {"narrow": -127, "full": -128}
_QMAX = 127
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SAME_WIDTH_INT = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def amax(x: Tensor, granularity: Granularity, *, group_size: int | None = None, name: str = "x") -> Tensor:
    """Largest magnitude of `x` over the axis of the granularity.

    x: any shape as in the module's table, floating point.
    Returns: fp32, of the scale's shape.
    Raises: QuantizeError naming `name` for a dtype that is not floating point, for NaN and inf (fp64: in fp32 too),
        for a shape that the granularity does not fit, and for a K that `group_size` does not divide.
    """
    blocks = _blocks(x, granularity, group_size, name)
    if blocks.shape[-1] == 0:
        largest = torch.zeros(blocks.shape[:-1], dtype=torch.float32, device=x.device)
    else:
        largest = blocks.abs().amax(-1).float()
    if not x.is_meta and not bool(torch.isfinite(largest).all()):
        raise _not_finite(x, name)
    return largest


def check_finite(x: Tensor, name: str = "x") -> None:
    """Raise QuantizeError naming `name` if `x`, of any floating dtype and shape, holds NaN or inf (fp64: in fp32 too).

    It reads `x` once, in a fifth of the time that quantizing it takes.
    """
    if x.numel() and not x.is_meta and not bool(torch.isfinite(torch.stack(x.aminmax()).float()).all()):
        raise _not_finite(x, name)


def _not_finite(x: Tensor, name: str) -> QuantizeError:
    if bool(torch.isfinite(x).all()):
        return QuantizeError(
            f"{name}: holds inf in fp32, in which scales are (up to {x.abs().max().item():.3g} in {x.dtype}), "
            f"expected at most {torch.finfo(torch.float32).max:.3g}; find what produced it or scale it down"
        )
    found = "NaN" if bool(torch.isnan(x).any()) else "inf"
    return QuantizeError(
        f"{name}: holds {found}, expected finite values only; find what produced it, int8 cannot represent it"
    )


def choose_scale(
    x: Tensor,
    granularity: Granularity,
    *,
    group_size: int | None = None,
    value_range: Range = "narrow",
    name: str = "x",
) -> Tensor:
    """Symmetric scale of `x`: amax / 127, rounded to `x.dtype`, held as fp32.

    x: any shape as in the module's table, floating point; not modified.
    group_size: columns per scale, for per_group only; must divide K.
    value_range: "narrow" (default) or "full", see `Range`.
    name: what errors call the tensor.
    Returns: fp32, of the scale's shape. A block of zeros has scale 1 ("full": 2**-23, as gpt-fast has).
    Raises: QuantizeError as `amax` does.
    """
    return _scale_of(amax(x, granularity, group_size=group_size, name=name), x.dtype, value_range)


def _scale_of(largest: Tensor, dtype: torch.dtype, value_range: Range) -> Tensor:
    scale = rounded_quotient(largest, _DIVISOR[value_range])
    if value_range == "full":
        return scale.clamp_(min=torch.finfo(torch.float32).eps)
    stored = dtype if dtype in _SAME_WIDTH_INT else torch.float32
    rounded = scale.to(stored)
    # Near the smallest numbers of a dtype rounding down may cost a large part of the scale (or all of it): the largest
    # values would then clip. One step up of the stored dtype is the nearest scale that holds them.
    clips = largest / rounded.float() > _QMAX + 0.5
    step_up = (rounded.view(_SAME_WIDTH_INT[stored]) + 1).view(stored)
    scale = torch.where(clips, step_up, rounded).float()
    return torch.where(largest == 0, 1.0, scale)


def rounded_quotient(x: Tensor, number: float) -> Tensor:
    """x / number, rounded to the nearest on every device, so that scales have the same bits everywhere.

    x: any shape, floating point. Returns: the same shape and dtype.
    Plain `x / number` is not enough: on CUDA, torch multiplies by the number's reciprocal, and the result is often one
    off in the last place.
    """
    return x / torch.full_like(x, number)


def quantize(x: Tensor, scale: Tensor, *, value_range: Range = "narrow", name: str = "x") -> Tensor:
    """Codes of `x` under `scale`: clamp(round_half_even(x / scale)), computed in fp32.

    x: floating point; not modified.
    scale: fp32, of a shape as in the module's table for `x` (a [N, K/g] scale means groups of g columns).
    Returns: int8, the shape of `x`.
    Raises: QuantizeError if the scale's shape fits no granularity of `x`.
    """
    blocks, per_block = _align(x, scale, name)
    codes = (blocks.float() / per_block).round_().clamp_(_QMIN[value_range], _QMAX)
    return codes.to(torch.int8).reshape(x.shape)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, *, name: str = "codes") -> Tensor:
    """code * scale, computed in fp32 and rounded once to `dtype`.

    codes: int8.
    scale: fp32, of a shape as in the module's table for `codes`.
    Returns: `dtype`, the shape of `codes`.
    Raises: QuantizeError if the scale's shape fits no granularity of `codes`.
    """
    blocks, per_block = _align(codes, scale, name)
    return (blocks.float() * per_block).to(dtype).reshape(codes.shape)


_CHUNK_ELEMENTS = 1 << 19
"""Weights are quantized in blocks of rows of this many elements: the fp32 working copy then stays in the L2 cache,
and no float copy of a whole weight ever exists. Measured on a 8192x2048 bf16 weight, 2 cores: 4.2 s for 1e9 weights
in one piece, 0.8 s in blocks of this size."""


def quantize_weight(
    weight: Tensor,
    granularity: Granularity = "per_channel",
    *,
    group_size: int | None = None,
    value_range: Range = "narrow",
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """`choose_scale` and `quantize` of a weight in one pass over memory, with the same bits as calling the two.

    weight: [N, ...] floating point, rows are output channels; not modified.
    Returns: codes int8 of the weight's shape (contiguous), scale fp32 [N, 1] (per_channel), [N, K/g] (per_group) or
        [1] (per_tensor).
    Raises: QuantizeError as `amax` does.
    """
    _check(weight, granularity, group_size, name)  # of the whole: rows are looked at in chunks
    if weight.is_meta:  # the shapes only
        scale = torch.empty(
            _blocks(weight, granularity, group_size, name).shape[:-1], dtype=torch.float32, device="meta"
        )
        return torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format), scale
    if granularity == "per_token" or weight.dim() < 2 or weight.numel() == 0:
        scale = choose_scale(weight, granularity, group_size=group_size, value_range=value_range, name=name)
        return quantize(weight, scale, value_range=value_range, name=name).contiguous(), scale
    rows = weight.flatten(1)
    n, k = rows.shape
    step = max(1, _CHUNK_ELEMENTS // k)
    codes = torch.empty((n, k), dtype=torch.int8, device=weight.device)
    scales = []
    of_all = None
    if granularity == "per_tensor":
        of_all = torch.stack([amax(chunk, granularity, name=name) for chunk in rows.split(step)]).amax(0)
    for start in range(0, n, step):
        given = rows[start : start + step]
        chunk = given.to(torch.float32, copy=True)
        seen = given if given.dtype == torch.float64 else chunk  # fp64 may be inf in fp32, and the error tells the two
        largest = amax(seen, granularity, group_size=group_size, name=name) if of_all is None else of_all
        scale = _scale_of(largest, weight.dtype, value_range)
        blocks, per_block = _align(chunk, scale, name)
        blocks.div_(per_block).round_().clamp_(_QMIN[value_range], _QMAX)
        codes[start : start + step].copy_(chunk)
        scales.append(scale)
    return codes.view(weight.shape), scale if granularity == "per_tensor" else torch.cat(scales)


def check_group_size(weight: Tensor, group_size: int | None, name: str = "weight") -> int:
    """Returns: the group size. Raises: QuantizeError unless it divides K of weight [N, K]."""
    k = weight.shape[-1] if weight.dim() else 0
    if group_size is None or weight.dim() != 2 or group_size < 1 or not k or k % group_size:
        divisors = [g for g in (256, 128, 96, 64, 48, 32, 16) if k and k % g == 0]
        raise QuantizeError(
            f"{name}: group_size={group_size} does not fit a weight of shape {list(weight.shape)}; per_group needs a "
            f"divisor of K={k}" + (f", such as {divisors[:3]}" if divisors else "")
        )
    return group_size


def _blocks(x: Tensor, granularity: Granularity, group_size: int | None, name: str) -> Tensor:
    """View `x` as [*scale shape, elements that share the scale]."""
    size = _check(x, granularity, group_size, name)
    if granularity == "per_tensor":
        return x.reshape(1, -1)
    if x.dim() == 0:
        raise QuantizeError(f"{name}: a 0-d tensor has no axis for {granularity}, expected at least one dimension")
    if granularity == "per_token":
        return x.unsqueeze(-2)
    if granularity == "per_channel":
        return x.reshape(x.shape[0], 1, -1) if x.numel() else x.new_empty(x.shape[0], 1, 0)
    if granularity == "per_group":
        return x.unflatten(-1, (x.shape[-1] // size, size))
    raise QuantizeError(f"{name}: unknown granularity {granularity!r}, expected one of {list(GRANULARITIES)}")


def _check(x: Tensor, granularity: Granularity, group_size: int | None, name: str) -> int:
    """Returns: the group size for per_group, else 1.

    Raises: QuantizeError for x that is not float, and for a group_size that does not fit.
    """
    if x.dtype not in _FLOAT_DTYPES:
        raise QuantizeError(f"{name}: dtype is {x.dtype}, expected a floating point tensor (fp32, bf16, fp16, fp64)")
    if granularity == "per_group":
        return check_group_size(x, group_size, name)
    if group_size is not None:
        raise QuantizeError(
            f"{name}: group_size is {group_size} with granularity {granularity!r}; a group_size belongs to per_group"
        )
    return 1


def _align(x: Tensor, scale: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """View `x` and its scale so that they broadcast against each other."""
    if scale.numel() == 1:
        return x, scale.reshape(1)
    if scale.dim() == x.dim() and scale.shape == (*x.shape[:-1], 1):
        return x, scale
    if scale.dim() == 2 and scale.shape[0] == x.shape[0]:
        if scale.shape[1] == 1:
            return x.reshape(len(x), x.shape[1:].numel()), scale
        if x.dim() == 2 and scale.shape[1] and x.shape[1] % scale.shape[1] == 0:
            return x.unflatten(-1, (scale.shape[1], -1)), scale.unsqueeze(-1)
    raise QuantizeError(
        f"{name}: a scale of shape {list(scale.shape)} does not fit shape {list(x.shape)}; expected [1] (per_tensor), "
        "[N, 1] (per_channel), [N, K/g] (per_group) or [..., 1] (per_token)"
    )
