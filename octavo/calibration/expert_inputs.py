"""Observe the inputs of experts' down projections, expert by expert. No hook sees them, because they are computed and
used inside one `forward`.

They are computed a second time from the arguments of the call, with the layer's own weights and gate:

    down input of expert e = gate(x[tokens of e] up[e]^T + up_bias[e])       [S_e, H] -> [S_e, I]

The layer itself runs as always. So statistics can be taken of every token in every expert while the model computes what
its router decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.observers import pseudo_random, typical_range
from octavo.experts import ExpertsSpec, chosen_experts

__all__ = ["ExpertsObserver", "observe_experts", "rows_of_each"]

_FEWEST = 8
"""At least so many rows are kept for each expert (if a layer keeps so many at all)."""


def rows_of_each(rows: int, experts: int) -> int:
    """How many rows are kept for each of `experts` experts, where a linear layer keeps `rows`."""
    return min(rows, max(_FEWEST, rows // experts))


@dataclasses.dataclass
class ExpertsObserver:
    """Statistics of the inputs of the down projections of a stack of experts so far.

    amax: fp32 [E, I], largest magnitude of each channel; 0 for an expert that no token was routed to.
    tokens: int64 [E], how many tokens each expert saw.
    rows: [R, I], whole inputs of a few tokens of each expert, sampled evenly from all of its tokens.
    expert, order: int64 [R], for each kept row its expert, and its pseudo-random number as in `Observer`.
    """

    amax: Tensor
    tokens: Tensor
    rows: Tensor
    expert: Tensor
    order: Tensor

    @property
    def unrouted(self) -> tuple[int, ...]:
        """The experts that saw no token."""
        return tuple((self.tokens == 0).nonzero().flatten().tolist())

    def rows_of(self, expert: int) -> Tensor:
        """The kept rows of one expert, [r, I]."""
        return self.rows[self.expert == expert]

    def merged(self, other: ExpertsObserver, rows: int) -> ExpertsObserver:
        """The observer of the tokens of both, which keeps at most `rows` rows of each expert."""
        order, expert = torch.cat([self.order, other.order]), torch.cat([self.expert, other.expert])
        by_order = order.argsort()
        kept = by_order[expert[by_order].argsort(stable=True)]  # by expert, and by order among an expert's
        start = torch.searchsorted(expert[kept], expert[kept])
        kept = kept[torch.arange(len(kept), device=kept.device) - start < rows]
        return ExpertsObserver(
            torch.maximum(self.amax, other.amax),  # NaN stays NaN
            self.tokens + other.tokens,
            torch.cat([self.rows, other.rows])[kept],
            expert[kept],
            order[kept],
        )

    def cpu(self) -> ExpertsObserver:
        """A copy in CPU memory."""
        return ExpertsObserver(**{field: value.cpu() for field, value in vars(self).items()})

    def typical_range(self) -> Tensor:
        """`typical_range` of the kept rows of each expert: fp32 [E, I], 0 for an expert without rows."""
        ranges = torch.zeros_like(self.amax)
        for e in self.expert.unique().tolist():
            ranges[e] = typical_range(self.rows_of(e))
        return ranges

    def divide(self, smooth_scale: Tensor) -> None:
        """Update the statistics for inputs divided by `smooth_scale`, fp32 [E, I], channel by channel of each
        expert."""
        self.amax = self.amax / smooth_scale
        self.rows = (self.rows.float() / smooth_scale[self.expert]).to(self.rows.dtype)


def observe_experts(
    layer: nn.Module,
    spec: ExpertsSpec,
    x: Tensor,
    routing: Sequence[Any],
    counts: Tensor | None,
    *,
    seed: int,
    rows: int,
    route_all: bool,
) -> ExpertsObserver:
    """The observer of one call of a float stack of experts.

    x: [..., H] of T tokens. routing: the arguments after x. counts: bool [T], False for padding; None if all count.
    seed: different for every call of a layer. rows: keep at most so many rows of each expert.
    route_all: take statistics of every token in every expert.
    """
    experts, width = spec.stack(layer, spec.down).shape[::2]
    shown = _tokens_of_each(layer, spec, x, routing, counts, experts, route_all)
    x = x.reshape(-1, x.shape[-1])
    order = pseudo_random(len(x), seed, x.device)
    amax = torch.zeros(experts, width, device=x.device)
    tokens = torch.zeros(experts, dtype=torch.int64)
    kept_rows, kept_order = [], []
    for e, token in enumerate(shown):
        seen = spec.down_input(layer, x[token], e)
        if len(token):
            amax[e] = seen.abs().amax(0).float()
        tokens[e] = len(token)
        drawn = order[token].argsort()[:rows]
        kept_rows.append(seen[drawn])
        kept_order.append(order[token[drawn]])
    expert = torch.arange(experts).repeat_interleave(torch.tensor([len(kept) for kept in kept_order]))
    return ExpertsObserver(amax, tokens.to(x.device), torch.cat(kept_rows), expert.to(x.device), torch.cat(kept_order))


def _tokens_of_each(
    layer: nn.Module,
    spec: ExpertsSpec,
    x: Tensor,
    routing: Sequence[Any],
    counts: Tensor | None,
    experts: int,
    route_all: bool,
) -> Iterator[Tensor]:
    """For each expert the indices of the tokens that its statistics are taken of, int64 [S]."""
    counts = torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device) if counts is None else counts
    if spec.routing == "sorted":  # every expert has a row for every token; zeros if the token was not routed to it
        counts = counts & x.any(-1).flatten()
        chosen = torch.arange(experts, device=x.device).repeat_interleave(len(counts) // experts).unsqueeze(1)
    elif spec.routing == "split":
        chosen = torch.arange(experts).repeat_interleave(torch.as_tensor(routing[0]).cpu()).to(x.device).unsqueeze(1)
    else:
        chosen = chosen_experts(type(layer), spec, x, routing)
    for e in range(experts):
        yield (counts if route_all else counts & (chosen == e).any(-1)).nonzero().squeeze(1)
