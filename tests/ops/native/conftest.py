"""`isa`: a test for each instruction set that this machine has kernels for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from octavo.ops import native
from tests.ops.native.kernels import FORCED, ISAS


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels that serve meanwhile."""
    assert native.select(request.param).isa == request.param
    yield request.param
    native.select(FORCED)
