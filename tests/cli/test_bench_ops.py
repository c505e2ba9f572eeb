"""`octavo bench --ops`: a table of ops, its figures those of the times that were measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import octavo
from octavo.cli import bench_ops, op_speed
from octavo.cli.bench_ops import Timed


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_speed, "ROTATION_BYTES", 100_000)
    monkeypatch.setattr(op_speed, "SECONDS", 0.0)


def test_json_has_each_op_next_to_its_rival(run: Callable[..., Any]) -> None:
    threads = torch.get_num_threads()
    ran = run("bench", "--ops", "--shapes", "64x128", "33x40", "--rows", "1", "3", "--threads", "1", "--json")
    assert ran.code == 0 and ran.err == "" and torch.get_num_threads() == threads
    linear = [(row["N"], row["K"], row["M"], row["op"]) for row in ran.data["ops"] if row["operations"]]
    assert linear == [
        (N, K, M, op)
        for N, K in ((64, 128), (33, 40))
        for M in (1, 3)
        for op in ("bf16 F.linear", "w8a16", "w8a16, groups of 128", "w8a8")
        if K == 128 or "groups" not in op
    ]
    others = [(row["op"], row["rival"], row["M"]) for row in ran.data["ops"] if not row["operations"]]
    assert (
        others
        == [
            ("quantize_weight", "w.abs().amax(1)", None),
            ("w8a16_embedding", "bf16 F.embedding", 3),
        ]
        * 2
    )
    for row in ran.data["ops"]:
        assert row["seconds"] > 0 and row["ratio"] == pytest.approx(row["rival_seconds"] / row["seconds"])
    serving = {row.op: row.backend for row in octavo.backends() if row.device == "cpu"}
    assert ran.data["served_by"] == serving and ran.data["machine"]["threads"] == 1


def test_people_see_both_tables_and_what_is_left_out(run: Callable[..., Any]) -> None:
    ran = run("bench", "--ops", "--shapes", "33x40", "--rows", "2")
    assert ran.code == 0
    assert "w8a8" in ran.out and "quantize_weight" in ran.out and "octavo ops served by: " in ran.out
    assert "Without groups of 128, which do not divide K: 33x40." in ran.out


def test_a_wrong_result_is_an_error_and_no_row(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_speed.ops, "w8a16_linear", lambda x, *_: x.new_zeros(len(x), 8))
    ran = run("bench", "--ops", "--shapes", "8x8", "--rows", "1")
    assert ran.code == 1 and ran.out == "" and ran.err.startswith("error: w8a16: the result differs from float64")


def test_times_become_figures() -> None:
    layer = op_speed.Layer(50, 40, 1)
    seconds = {op_speed.STREAM: 1e-6, op_speed.BF16: 4e-6, op_speed.W8A16: 2e-6}
    bf16, int8 = bench_ops.linear_rows(layer, 3, seconds)
    assert (bf16.op, bf16.weight_bytes, bf16.ratio) == ("bf16 F.linear", 4000, 1)
    assert (int8.op, int8.weight_bytes, int8.ratio, int8.of_stream) == ("w8a16", 2000, 2, 0.5)
    assert int8.bytes_per_s == pytest.approx(1e9)
    assert int8.operations_per_s == pytest.approx(2 * 3 * 2000 / 2e-6)


def test_few_rows_are_judged_by_bytes_and_many_by_operations() -> None:
    few, many = (Timed("w8a16", 50, 40, M, 2e-6, "bf16", 4e-6, 2000, 0.5, 10**7) for M in (16, 17))
    rows = bench_ops._linear_table([few, many]).rows
    assert [row[3:] for row in rows] == [
        ("2 us", "2.00x", "1.00 GB/s", "50.0%", "-"),
        ("2 us", "2.00x", "-", "-", "5.00 T/s"),
    ]
    other = Timed("quantize_weight", 50, 40, None, 2e-6, "amax", 4e-6, 4000)
    assert bench_ops._linear_table([other]).rows == () and bench_ops._other_table([few, other]).rows == (
        ("50x40", "-", "quantize_weight", "2 us", "2.00 GB/s", "amax", "2.00x"),
    )
