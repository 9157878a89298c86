"""All errors that advvl defines.

    AdvVLError
    ├── ConfigurationError   a hyper-parameter, option or configuration file that makes no sense
    ├── SiteError            a site that is unknown, did not fire, or holds something that cannot be perturbed
    ├── ShapeError           a mask, start, delta or loss of another shape than the tensor it belongs to
    ├── NonFiniteError       a loss or a gradient that is infinite or not a number
    ├── RandomnessError      randomness that had to be replayed and could not be
    ├── CheckpointError      a checkpoint that is truncated, unsafe, or does not fit the model
    ├── DataError            data that is not what its format says
    ├── MissingExtraError    an optional package that is needed and not installed
    └── OutputDirectoryError an output directory that belongs to something else

Each also derives from the built-in error that a caller would expect (`ValueError`, `RuntimeError`, …). A message is one
sentence, "expected …, got …; what to do"; where that is not enough, it ends with a link made by `more`.
"""

from __future__ import annotations


class AdvVLError(Exception):
    """Root of all errors that advvl defines."""


class ConfigurationError(AdvVLError, ValueError):
    """A hyper-parameter, option or configuration file makes no sense."""


class SiteError(AdvVLError, RuntimeError):
    """A site is unknown, did not fire, or holds something that cannot be perturbed."""


class ShapeError(AdvVLError, ValueError):
    """A mask, start, delta or loss has another shape than the tensor it belongs to."""


class NonFiniteError(AdvVLError, ArithmeticError):
    """A loss or a gradient is infinite or NaN; gradients that were already accumulated are unusable."""


class RandomnessError(AdvVLError, RuntimeError):
    """Randomness that had to be replayed between passes could not be."""


class CheckpointError(AdvVLError, ValueError):
    """A checkpoint is truncated, unsafe to read, or does not fit the model."""


class DataError(AdvVLError, ValueError):
    """Data is not what its format says."""


class MissingExtraError(AdvVLError, ImportError):
    """An optional package is needed and not installed."""


class OutputDirectoryError(AdvVLError, RuntimeError):
    """An output directory belongs to another configuration or cannot be written."""


class WeakAttackWarning(UserWarning):
    """An attack cannot reach the edge of its ball, so an example that it fails to break may not be robust."""


def more(anchor: str) -> str:
    """The end of a message that needs more than one sentence: a link to its section of `docs/errors.md`."""
    return f"; see docs/errors.md#{anchor}"


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """The error to raise when `package`, installed by the extra `extra`, cannot be imported."""
    return MissingExtraError(
        f"expected the package {package!r} to be installed, but it is not; run: pip install 'advvl[{extra}]'"
    )
