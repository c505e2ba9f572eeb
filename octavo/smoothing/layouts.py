"""How the output channels of one layer become the input channels of another.

    all              channel i feeds channel i                                 norm -> q, k, v; fc1 -> relu -> fc2
    second half      one layer computes gate and up; only up is passed on      gate_up -> down
    heads of D       a value head feeds several query heads (grouped queries)  v -> o
    last, heads of D q, k and v are one layer; the values come last            qkv -> o

Which of them holds for two layers is not known from their sizes alone, so `partial_layouts` lists the candidates and
`pairs.py` tries one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["Layout", "numbers_of", "partial_layouts"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a source's output channels become a sink's input channels.

    rows: int64 [S], the output channels that are scaled. channels: int64 [K], for each input channel of the sinks the
    entry of `rows` that feeds it (a grouped key-value head feeds several query heads).
    """

    name: str
    rows: Tensor
    channels: Tensor


def numbers_of(module: nn.Module) -> set[int]:
    """The positive integers that a module and its config hold; the size and the number of heads are among them."""
    places = [vars(module), getattr(getattr(module, "config", None), "__dict__", {})]
    return {v for place in places for v in place.values() if isinstance(v, int) and not isinstance(v, bool) and v > 0}


def partial_layouts(n: int, k: int, numbers: set[int]) -> Iterator[Layout]:
    """The ways in which a linear layer with N outputs may feed one with K inputs other than one to one.

    numbers: candidates for the size or the number of heads.
    """
    if n < k and k % n == 0:  # values of grouped heads
        for head in _head_sizes(n, k, numbers):
            yield Layout(f"heads of {head}", torch.arange(n), _grouped(n, k, head))
    if n == 2 * k:  # gate and up in one
        yield Layout("second half", torch.arange(k, n), torch.arange(k))
        yield Layout("first half", torch.arange(k), torch.arange(k))
        yield Layout("odd", torch.arange(1, n, 2), torch.arange(k))
    values = (n - k) // 2
    if n > k and (n - k) % 2 == 0 and values and k % values == 0:  # q, k and v in one
        for head in [k] if values == k else _head_sizes(values, k, numbers):  # then heads make no difference
            yield Layout(f"last, heads of {head}", torch.arange(n - values, n), _grouped(values, k, head))
        for head in _head_sizes(values, k, numbers):
            group = k // values + 2  # query heads of a key-value head, its key and its value
            rows = torch.arange(n).view(-1, group, head)[:, -1].reshape(-1)
            yield Layout(f"interleaved, heads of {head}", rows, _grouped(values, k, head))


def _head_sizes(values: int, k: int, numbers: set[int]) -> list[int]:
    """Possible head sizes for `values` value channels: each number taken as a size, and as a count of heads in K."""
    sizes = numbers | {k // v for v in numbers if k % v == 0}
    return sorted(size for size in sizes if size > 1 and values % size == 0)


def _grouped(values: int, k: int, head: int) -> Tensor:
    """int64 [K]: for each channel of the query heads the value channel that feeds it. Each value head feeds K / values
    query heads in a row."""
    channel = torch.arange(k)
    return channel // (head * (k // values)) * head + channel % head
