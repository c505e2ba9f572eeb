"""Observers: what calibration keeps of the inputs of one layer, in little memory for any number of tokens.

    amax        largest magnitude of each input channel                      fp32 [K]
    histogram   how many values have which magnitude, over the whole tensor  int64 [8192]
    rows        whole inputs of a few tokens, drawn evenly from all          [R, K], R <= `rows` of `observe`

A bin of the histogram is a 32nd of an octave: its number is the exponent and the five leading bits of the mantissa of
|x| in fp32. The bins cover all fp32 numbers, so no range has to be known beforehand, and histograms of two runs can be
added.

The kinds of observers are ways to choose the clipping point of a static input: the magnitude that becomes code 127.

    absmax      the largest magnitude seen
    percentile  the smallest that a given share of the values does not exceed; the largest seen if that is 0
    mse         the one with the smallest sum of squared rounding and clipping errors
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from octavo.errors import CalibrateError

__all__ = [
    "OBSERVERS",
    "Observer",
    "ObserverKind",
    "check_observer",
    "observe",
    "pseudo_random",
    "typical_range",
]

ObserverKind = Literal["absmax", "percentile", "mse"]
OBSERVERS: tuple[ObserverKind, ...] = get_args(ObserverKind)

PERCENTILE = 99.99
"""Percentage of the values that the observer `percentile` does not clip."""

_BINS = 8192
_DROPPED_BITS = 18  # of fp32's 31 below the sign: 8 of exponent and 5 of mantissa remain
_QMAX = 127


def check_observer(kind: str) -> None:
    """Raise CalibrateError for an observer that does not exist."""
    if kind not in OBSERVERS:
        raise CalibrateError(f"observer is {kind!r}, expected one of {', '.join(map(repr, OBSERVERS))}")


@dataclasses.dataclass
class Observer:
    """Statistics of the inputs of one layer so far; for amax, histogram and rows see the head of this file.

    tokens: how many rows of [..., K] were seen.
    order: int64 [R], a pseudo-random number for each kept row. The rows with the smallest numbers are kept: an even
        sample, and the same one however the tokens are split into batches.
    """

    amax: Tensor
    histogram: Tensor
    rows: Tensor
    order: Tensor
    tokens: int

    @classmethod
    def of_amax(cls, amax: Tensor) -> Observer:
        """An observer that knows only the amax of each channel, fp32 [K]."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(amax, torch.zeros(_BINS, dtype=torch.int64), amax.new_zeros(0, len(amax)), none, 0)

    def merged(self, other: Observer, rows: int) -> Observer:
        """The observer of the tokens of both, which keeps at most `rows` rows."""
        order = torch.cat([self.order, other.order])
        kept = order.argsort()[:rows]
        return Observer(
            torch.maximum(self.amax, other.amax),  # NaN stays NaN
            self.histogram + other.histogram,
            torch.cat([self.rows, other.rows])[kept],
            order[kept],
            self.tokens + other.tokens,
        )

    def cpu(self) -> Observer:
        """A copy in CPU memory."""
        return Observer(self.amax.cpu(), self.histogram.cpu(), self.rows.cpu(), self.order.cpu(), self.tokens)

    def largest(self, kind: ObserverKind = "absmax", *, percentile: float = PERCENTILE) -> float:
        """The clipping point (the magnitude that becomes code 127) by the observer `kind`; 0 if every input was 0.

        percentile: in percent, for the observer of that name.
        Raises: CalibrateError for an unknown observer, and for any but absmax if only the amax of channels is known.
        """
        check_observer(kind)
        top = self.amax.max().item() if self.amax.numel() else 0.0
        if kind == "absmax" or top == 0:
            return top
        if not bool(self.histogram.any()):
            raise CalibrateError(
                f"observer is {kind!r}, and the statistics hold nothing but the largest value of each channel (as "
                "SmoothQuant's act_scales, or those of rows=0 once smoothed); expected 'absmax', or calibrate anew"
            )
        if kind == "percentile":
            return min(top, self._percentile(percentile) or top)
        return min(top, self._least_squares(top))

    def _percentile(self, percentile: float) -> float:
        seen = self.histogram.cumsum(0)
        wanted = math.ceil(seen[-1].item() * min(max(percentile, 0.0), 100.0) / 100)
        bin_ = int(torch.searchsorted(seen, wanted))
        return _bin_values(torch.tensor([bin_]), upper=True).item() if bin_ else 0.0

    def _least_squares(self, top: float) -> float:
        """The clipping point c with the smallest sum of squared errors, of 32 per octave from top / 64 to top.

        A value v above c is clipped: its error is v - c. Others are rounded to a multiple of the step c / 127: the
            error is v below half a step, and step / sqrt(12) on average above.
        """
        used = self.histogram.nonzero().squeeze(1)
        count, value = self.histogram[used].double(), _bin_values(used)
        points = top * 2.0 ** (-torch.arange(6 * 32, dtype=torch.float64) / 32)
        step = points.unsqueeze(1) / _QMAX
        rounding = torch.where(value < step / 2, value**2, step**2 / 12)
        clipping = (value - points.unsqueeze(1)).clamp_min(0) ** 2
        return points[(count * torch.where(clipping > 0, clipping, rounding)).sum(1).argmin()].item()

    def typical_range(self) -> Tensor:
        """`typical_range` of the kept rows, fp32 [K]."""
        return typical_range(self.rows)

    def divide(self, smooth_scale: Tensor) -> None:
        """Update the statistics for inputs divided by `smooth_scale`, fp32 [K], channel by channel.

        The amax stays exact. The histogram becomes that of the kept rows, since it is not known per channel.
        """
        self.amax = self.amax / smooth_scale
        self.rows = (self.rows.float() / smooth_scale).to(self.rows.dtype)
        self.histogram = _histogram(self.rows.float().abs())


def observe(x: Tensor, seed: int, rows: int) -> Observer:
    """The observer of one input.

    x: [n, K] float. seed: different for every input of a layer. rows: keep at most so many rows.
    """
    magnitude = x.detach().float().abs()
    order = pseudo_random(len(x), seed, x.device)
    kept = order.argsort()[:rows]
    largest = magnitude.amax(0) if len(x) else magnitude.new_zeros(x.shape[1])
    return Observer(largest, _histogram(magnitude), x.detach()[kept].clone(), order[kept], len(x))


def _histogram(magnitude: Tensor) -> Tensor:
    bins = magnitude.contiguous().view(torch.int32).reshape(-1) >> _DROPPED_BITS
    return torch.bincount(bins, minlength=_BINS)


def _bin_values(bins: Tensor, upper: bool = False) -> Tensor:
    """The middle (or the upper end) of bins, fp64."""
    bits = bins.to(torch.int32)
    low = (bits << _DROPPED_BITS).view(torch.float32).double()
    high = ((bits + 1) << _DROPPED_BITS).view(torch.float32).double()
    return high if upper else (low + high) / 2


def typical_range(rows: Tensor) -> Tensor:
    """Root mean square of each channel over rows [R, K], each row divided by its largest magnitude: fp32 [K].

    This says how large a channel usually is relative to the largest one of the token, which sets a scale per token.
    """
    rows = rows.float()
    rows = rows / rows.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return rows.square().mean(0).sqrt()


def pseudo_random(n: int, seed: int, device: torch.device) -> Tensor:
    """Pseudo-random int64 [n] on `device`: SplitMix64 (Steele et al., 2014) of the seed and the index of each row."""
    z = torch.arange(n, device=device) + seed * 0x632BE59B % (1 << 40) * (1 << 20)
    z = (z ^ (z >> 30)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27)) * -0x6B2FB644ECCEEE15
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF
