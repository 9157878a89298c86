"""An update's batch, split into parts over processes and micro-batches, and the weights of each part's means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from advvl.errors import ConfigurationError, DataError
from advvl.regularizers.base import Scaled
from advvl.training import AdversarialTraining

Count = Callable[[Mapping[str, Any]], "int | Tensor"]


@dataclass
class Share:
    """One part of an update: its number, examples and batch, and the weights of its means among those of all parts.

    The gradient of a part's objective is multiplied by `weight`; means over anything else than rows are rescaled to
    that.

    Arguments:
        weight: of a mean over its rows.
        whole: `weight` applies to the part's own means, whatever they are over.
        counted: the weight of a mean over the entries that `count` counts; None: there is no `count`.
        compared: for each regulariser, the weight of its mean over rows that count; None: each example has equally
            many.
        empty: the number of parts, over all processes, in which `count` counts nothing.
    """

    number: int
    examples: list[int]
    batch: Mapping[str, Any]
    weight: float
    counted: float | None = None
    compared: Sequence[float | None] = ()
    empty: int = 0
    whole: bool = False

    def weigh(self, loss: Tensor) -> Tensor:
        """Rescale a loss, a scalar or one per row, to the weight of a mean over rows.

        Raises:
            ConfigurationError: a scalar that nothing counts, where there are other parts; losses that are not one per row.
            DataError: a scalar, and a part of any process without an entry.
        """
        rows = len(self.examples)
        if loss.ndim and (len(loss) < rows or (self.weight < 1 and len(loss) % rows)):
            raise ConfigurationError(
                f"expected a scalar loss or one for each of {rows} rows, got {tuple(loss.shape)}; "
                "see what the source gives, or reduce it"
            )
        if self.weight == 1 or loss.ndim or self.whole:
            return loss
        if self.counted is None:
            raise ConfigurationError(
                "expected one loss per row (B,), or count=…, got a scalar and no count; "
                "see docs/training-loop.md#several-processes"
            )
        if self.empty:
            raise DataError(
                f"expected count(batch) of 1 or more in each part of an update, got less in {self.empty}; "
                "use fewer parts, or a larger batch_size"
            )
        return loss * (self.counted / self.weight)


def of_part(method: AdversarialTraining, weight: float, *, penalties: Sequence[float] = ()) -> AdversarialTraining:
    """Return the method that does to a part of a batch what `method` does to the whole.

    Arguments:
        weight: of the part's mean among those of all parts; perturbers treat gradients as those of the whole.
        penalties: the weight of each regulariser's mean on the part, relative to `weight`; none: 1. For a mean over
            nothing it does not matter.
    """
    if weight == 1:
        return method
    method = replace(method, perturber=method.perturber.for_part(weight))
    if all(penalty in (0, 1) for penalty in penalties):
        return method
    each = zip(method.regularizers, penalties, strict=True)
    return replace(method, regularizer=tuple(one if part in (0, 1) else Scaled(one, part) for one, part in each))


def cut(
    parts: Sequence[Sequence[int]],
    batches: Sequence[Mapping[str, Any]],
    *,
    mine: Sequence[int],
    count: Count | None,
    compared: Callable[[Mapping[str, Any]], Sequence[float | None]] | None,
    total: Callable[..., list[float]],
    equal: bool = False,
) -> list[Share]:
    """Weigh the parts of an update that are `mine`.

    Arguments:
        parts: the examples of each part.
        batches: of those that are mine.
        count: from a batch to the number of entries of its mean loss; None: not needed, or there is one loss per row.
        compared: from a batch to the number of rows in each regulariser's mean, None where each example has equally
            many or the regulariser is for other batches; None: there is no regulariser.
        total: sums numbers over the processes.
        equal: parts weigh the same, whatever their numbers of rows and entries.
    """
    shares, rows = [], sum(map(len, parts))
    for part, batch in zip(mine, batches, strict=True):
        own = list(parts[part])
        shares.append(Share(part, own, batch, 1 / len(parts) if equal else len(own) / rows, whole=equal))
    if len(parts) > 1 and not equal and (count is not None or compared is not None):
        counts = [0.0 if count is None else float(count(share.batch)) for share in shares]
        seen = [() if compared is None else compared(share.batch) for share in shares]
        places = [sum(own or 0.0 for own in each) for each in zip(*seen, strict=True)]
        weights = [share.weight for share in shares]
        of_method = [
            sum(weight for weight, own in zip(weights, each, strict=True) if own is not None)
            for each in zip(*seen, strict=True)
        ]
        entries, empty, *sums = total(sum(counts), sum(number < 1 for number in counts), *places, *of_method)
        places, of_method = sums[: len(places)], sums[len(places) :]
        for share, number, rows_compared in zip(shares, counts, seen, strict=True):
            if count is not None:
                share.counted, share.empty = number / max(entries, 1.0), int(empty)
            share.compared = [
                None if own is None or not every else own / every * weight
                for own, every, weight in zip(rows_compared, places, of_method, strict=True)
            ]
    return shares
