"""What times ops: turns are taken, weights rotate, and nothing wrong is timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.cli import op_speed
from octavo.cli.op_speed import Layer, Way, close_to, race, rotation
from octavo.errors import OctavoError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_speed, "ROTATION_BYTES", 100_000)
    monkeypatch.setattr(op_speed, "SECONDS", 0.0)


def test_ways_take_turns_and_the_first_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    clock = itertools.accumulate([0, 100, 0, 100, 0, 5, 0, 1, 0, 7, 0, 2, 0, 6, 0, 9])
    monkeypatch.setattr(op_speed.time, "perf_counter", lambda: next(clock))
    ways = [Way(name, lambda name=name: called.append(name), itertools.cycle([()]), lambda _: True) for name in "ab"]
    assert race(ways) == {"a": 6, "b": 2}
    assert called == ["a", "b"] * 5  # held to the truth, warmed up, three rounds


def test_what_is_wrong_is_not_timed() -> None:
    way = Way("a wrong one", lambda: 1, itertools.cycle([()]), lambda result: result == 2)
    with pytest.raises(OctavoError, match="a wrong one: the result differs from float64"):
        race([way])


def test_copies_fill_the_rotation_and_come_round() -> None:
    codes, scale = torch.randint(-127, 128, (60, 50), dtype=torch.int8), torch.rand(60, 1)
    turns = rotation(codes, scale)
    count = 100_000 // (60 * 50 + 240) + 1
    taken = [next(turns) for _ in range(count + 1)]
    assert all(torch.equal(one, codes) and torch.equal(other, scale) for one, other in taken)
    places = [one.data_ptr() for one, _ in taken]
    assert len(set(places)) == count and places[-1] == places[0]


def test_close_is_a_rounding_to_bf16_and_not_one_value_more() -> None:
    expected = torch.randn(7, 300, dtype=torch.float64)
    result = expected.float().bfloat16()
    assert close_to(expected)(result)
    for wrong in (0.03, float("nan")):
        other = result.clone()
        other[3, 5] += wrong
        assert not close_to(expected)(other)


@pytest.mark.parametrize(("N", "K", "M"), [(64, 256, 5), (33, 40, 3), (1, 1, 1)])
def test_every_way_is_right_and_would_be_told_if_it_were_not(N: int, K: int, M: int) -> None:
    layer = Layer(N, K, M)
    groups = [op_speed.W8A16_GROUPS] if K % 128 == 0 else []
    ways = layer.ways(M)
    assert [way.name for way in ways] == ["torch.sum", "bf16 F.linear", "w8a16", *groups, "w8a8"]
    assert [way.name for way in layer.ways(1)] == [way.name for way in ways]
    for way in (*ways, *layer.ways(1), *layer.quantizing(), *layer.lookups(4)):
        result = way.call(*next(way.weights))
        assert way.is_right(result), way.name
        if way.name != op_speed.STREAM:
            assert not way.is_right(_off(result)), way.name


def _off(result: Any) -> Any:
    if isinstance(result, tuple):
        return (result[0].clone().fill_(3), result[1])
    return result * 1.02 + 0.02


def test_ways_run_on_the_weights_that_they_are_given() -> None:
    layer = Layer(16, 128, 3)
    by_name: dict[str, Callable[..., Tensor]] = {way.name: way.call for way in layer.ways(3)}
    zeros = torch.zeros(16, 128, dtype=torch.int8)
    for name in (op_speed.W8A16, op_speed.W8A16_GROUPS, op_speed.W8A8):
        assert not by_name[name](zeros, layer.scale, layer.group_scale).any()
    assert torch.equal(by_name[op_speed.BF16](layer.weight), F.linear(layer.x, layer.weight))


def test_the_streaming_read_is_of_as_many_bytes_as_the_int8_weight() -> None:
    layer = Layer(16, 128, 1)
    (read,) = next(layer.ways(1)[0].weights)
    assert read.nbytes == layer.codes.nbytes and read.dtype == torch.float32 and read.isfinite().all()


@pytest.mark.gpu
def test_on_a_gpu_graphs_of_calls_are_timed_and_the_wrong_ones_are_not() -> None:
    layer = Layer(256, 256, 3, "cuda")
    for ways in (layer.ways(3), layer.quantizing(), layer.lookups(3)):
        seconds = race(ways, "cuda")
        assert [*seconds] == [way.name for way in ways] and all(0 < one < 1 for one in seconds.values())
    wrong = Way("a wrong one", lambda weight: weight * 2, rotation(layer.weight), close_to(layer.weight.double()))
    with pytest.raises(OctavoError, match="a wrong one"):
        race([wrong], "cuda")
