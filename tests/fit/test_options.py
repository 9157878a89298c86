"""Options of the loop: as one object, or single ones by name."""

from __future__ import annotations

import pytest

from advvl.errors import ConfigurationError
from advvl.fit.options import LoopOptions, loop_of


def test_options_of_the_loop_may_be_given_by_name() -> None:
    assert loop_of(None, {"accumulate": 4}) == LoopOptions(accumulate=4)
    assert loop_of(LoopOptions(skip_limit=3, accumulate=2), {"accumulate": 4}) == LoopOptions(
        skip_limit=3, accumulate=4
    )
    with pytest.raises(ConfigurationError, match="got 'acumulate'"):
        loop_of(None, {"acumulate": 4})
    with pytest.raises(ConfigurationError, match="loop as LoopOptions"):
        loop_of(4, {})
