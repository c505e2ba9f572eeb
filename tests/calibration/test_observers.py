"""What calibration keeps, against sorting all the values there were."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.calibration.observers import Observer, observe
from octavo.errors import CalibrateError


def values(seed: int, n: int = 400, k: int = 8) -> Tensor:
    """Tails as heavy as activations have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator)
    return x * torch.rand(n, 1, generator=generator).add(0.01).pow(-1)


def rounding_error(x: Tensor, largest: float) -> float:
    """Sum of squares of what int8 under scale largest / 127 loses, in float64: the definition, on every value."""
    step = largest / 127
    codes = (x.double() / step).round().clamp(-127, 127)
    return (codes * step - x.double()).square().sum().item()


def test_absmax_is_exact() -> None:
    x = values(0)
    seen = observe(x, 0, 16)
    assert torch.equal(seen.amax, x.abs().amax(0))
    assert seen.largest() == x.abs().max().item()
    assert seen.tokens == 400


@given(
    st.integers(0, 50),
    st.integers(1, 400),
    st.sampled_from([50.0, 90.0, 99.0, 99.9, 100.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_percentile_is_that_of_all_values_up_to_a_bin(seed: int, n: int, percentile: float, dtype: torch.dtype) -> None:
    x = values(seed, n).to(dtype)
    found = observe(x, 0, 1).largest("percentile", percentile=percentile)
    exact = x.abs().reshape(-1).sort().values[math.ceil(x.numel() * percentile / 100) - 1].item()
    assert exact <= found <= exact * (1 + 1 / 32)


@given(st.integers(0, 30))
def test_mse_is_nearly_the_best_clipping_point(seed: int) -> None:
    x = values(seed)
    top = x.abs().max().item()
    found = observe(x, 0, 1).largest("mse")
    best = min(rounding_error(x, top * 2.0 ** (-i / 16)) for i in range(96))
    assert 0 < found <= top
    assert rounding_error(x, found) <= best * 1.1
    assert rounding_error(x, found) <= rounding_error(x, top) * 1.01


@pytest.mark.parametrize("small", [0.0, 0.5], ids=["normal", "half of them small"])
def test_mse_clips_a_lone_outlier(small: float) -> None:
    """Of half a million values one is 60 times the usual: to hold it would cost all others 3 bits."""
    x = torch.randn(2**16, 8)
    x *= torch.where(torch.rand_like(x) < small, 0.02, 1.0)
    x[7, 1] = 60
    found = observe(x, 0, 1).largest("mse")
    best = min(rounding_error(x, 60 * 2.0 ** (-i / 8)) for i in range(24))
    assert rounding_error(x, found) <= best * 1.02
    assert best < rounding_error(x, 60) / 1.5


@given(st.integers(0, 20), st.lists(st.integers(0, 400), max_size=4))
def test_parts_merge_to_the_whole(seed: int, cuts: list[int]) -> None:
    """However the batches fall to the processes: each batch has a number, and its rows have theirs."""
    x = values(seed)
    edges = [0, *sorted(cuts), 400]
    batches = [x[a:b] for a, b in itertools.pairwise(edges)]
    parts = [observe(batch, i, 32) for i, batch in enumerate(batches)]
    forwards, backwards = parts[0], parts[-1]
    for part in parts[1:]:
        forwards = forwards.merged(part, 32)
    for part in reversed(parts[:-1]):
        backwards = backwards.merged(part, 32)
    for one, other in zip(vars(forwards).values(), vars(backwards).values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert torch.equal(forwards.amax, x.abs().amax(0))
    assert torch.equal(forwards.histogram, observe(x, 0, 1).histogram)
    assert len(forwards.rows) == 32


def test_kept_rows_are_an_even_sample() -> None:
    """The mean index of 256 of 100000 rows is the middle, to four standard errors; all are different."""
    n = 100_000
    seen = observe(torch.arange(n, dtype=torch.float64).unsqueeze(1), 3, 256)
    index = seen.rows.squeeze(1)
    assert len(index.unique()) == 256
    assert abs(index.mean().item() - n / 2) < 4 * n / 12**0.5 / 256**0.5
    other = observe(torch.arange(n, dtype=torch.float64).unsqueeze(1), 4, 256)
    assert len(set(index.tolist()) & set(other.rows.squeeze(1).tolist())) < 10


def test_rows_keep_dtype_and_do_not_alias() -> None:
    x = values(0).bfloat16()
    seen = observe(x, 0, 8)
    assert seen.rows.dtype == torch.bfloat16
    before = seen.rows.clone()
    x.zero_()
    assert torch.equal(seen.rows, before)


def test_divided_ranges_are_those_of_divided_inputs() -> None:
    x, s = values(1), 2.0 ** torch.arange(-4, 4)
    seen, expected = observe(x, 0, 400), observe(x / s, 0, 400)
    seen.divide(s)
    assert torch.equal(seen.amax, expected.amax)
    assert torch.equal(seen.histogram, expected.histogram)
    assert torch.equal(seen.rows, expected.rows)


def test_typical_range_is_the_root_mean_square_of_what_is_divided_by_its_rows_largest() -> None:
    x = values(2, 50).bfloat16()
    x[3] = 0  # padding, say
    exact = torch.stack([row / (row.abs().max() or 1) for row in x.double()]).square().mean(0).sqrt()
    torch.testing.assert_close(observe(x, 0, 50).typical_range().double(), exact, rtol=1e-5, atol=0)


def test_typical_range_is_not_swayed_by_one_huge_token() -> None:
    x = torch.randn(200, 4)
    x[:, 0] *= 10
    before = observe(x, 0, 200).typical_range()
    x[17] = torch.tensor([0.0, 0.0, 0.0, 1e6])
    after = observe(x, 0, 200).typical_range()
    torch.testing.assert_close(after[:3], before[:3], rtol=0.01, atol=0)
    assert after[3] < before[3] + 0.08  # sqrt(1 / 200)


def test_edges() -> None:
    assert observe(torch.zeros(3, 4), 0, 2).largest("mse") == 0
    nothing = observe(torch.zeros(0, 4), 0, 2)
    assert nothing.amax.tolist() == [0, 0, 0, 0] and nothing.largest("percentile") == 0
    assert torch.isnan(observe(torch.tensor([[1.0, torch.nan]]), 0, 1).amax[1])
    assert torch.isinf(observe(torch.tensor([[1.0, torch.inf]]), 0, 1).amax[1])
    assert observe(torch.tensor([[3.0]]), 0, 1).largest("percentile") == 3
    sparse = torch.zeros(100, 400)
    sparse[0, 0] = 3  # of 40,000 values more than 99.99% are 0
    assert observe(sparse, 0, 1).largest("percentile") == 3
    amax_alone = Observer.of_amax(torch.tensor([1.0, 3.0]))
    assert amax_alone.largest() == 3
    for kind in ("percentile", "mse"):
        with pytest.raises(CalibrateError, match=f"observer is '{kind}', .* nothing but the largest .* expected"):
            amax_alone.largest(kind)
    with pytest.raises(CalibrateError, match="observer is 'minmax', expected one of 'absmax', 'percentile', 'mse'"):
        observe(torch.ones(1, 1), 0, 1).largest("minmax")  # type: ignore[arg-type]
