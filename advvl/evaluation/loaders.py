"""Attacks of a whole loader: every batch's perturbations, losses and verdicts, gathered on the CPU and kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.adapters.base import Adapter
from advvl.adapters.registry import adapted
from advvl.attacks import Attack, AttackResult
from advvl.checks import check_functions
from advvl.errors import ConfigurationError, DataError
from advvl.files import write_safetensors

_FORMAT: Final = "advvl attacks 1"
_ROWS: Final = ("losses", "correct")
_MAPPINGS: Final = ("deltas", "nonfinite", "unmoved", "moved", "effective", "owners")


@dataclass(frozen=True)
class AttackedLoader:
    """The results of an attack on each batch of a loader, in its order and on the CPU.

    Arguments:
        results: one for each batch; perturbations differ in length as batches do.
    """

    results: tuple[AttackResult, ...]

    @property
    def losses(self) -> Tensor | None:
        """The loss of each example `(N,)`; None where some batch has a single one."""
        return _joined([result.losses for result in self.results])

    @property
    def correct(self) -> Tensor | None:
        """The verdict on each example `(N,)`, bool; None where nothing judged."""
        return _joined([result.correct for result in self.results])

    @property
    def accuracy(self) -> float:
        """The share of examples still classified correctly: an upper bound on robust accuracy.

        Raises:
            DataError: nothing judged, or no example.
        """
        if self.correct is None or not len(self.correct):
            raise DataError("expected verdicts on one example or more, got none; give the Attack correct=…")
        return float(self.correct.double().mean())

    def unmoved(self) -> dict[str, int]:
        """Modality to the number of rows that no gradient moved, whose verdict says nothing about robustness."""
        names = {modality: None for result in self.results for modality in result.unmoved}
        return {
            name: sum(int(one.unmoved[name].sum()) for one in self.results if name in one.unmoved) for name in names
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whole or not at all; `load` reads it."""
        tensors: dict[str, Tensor] = {}
        for batch, result in enumerate(self.results):
            rows = {name: value for name in _ROWS if (value := getattr(result, name)) is not None}
            held = {f"{name}/{m}": x for name in _MAPPINGS for m, x in getattr(result, name).items()}
            tensors |= {f"{batch}/{name}": value for name, value in (rows | held).items()}
        return write_safetensors(path, _unshared(tensors), metadata={"advvl": json.dumps([_FORMAT, len(self.results)])})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttackedLoader:
        """Read what `save` wrote; no code in the file runs.

        Raises:
            DataError: a file that is missing, damaged, or something else.
        """
        try:
            with safe_open(os.fspath(path), "pt") as file:
                found = json.loads((file.metadata() or {}).get("advvl", "null"))
                held = {name: file.get_tensor(name) for name in file.keys()} if _is_ours(found) else None  # noqa: SIM118
        except (OSError, TypeError, RecursionError, SafetensorError, json.JSONDecodeError) as error:
            raise DataError(
                f"expected a whole file of attacks at {str(path)!r}, got {error}; check the path"
            ) from error
        if held is None or found[1] > len(held):
            raise DataError(f"expected a file that AttackedLoader.save wrote, got {str(path)!r}; check the path")
        fields: list[dict[str, Any]] = [{name: {} for name in _MAPPINGS} for _ in range(found[1])]
        for name, tensor in held.items():
            batch, _, field = name.partition("/")
            kind, _, modality = field.partition("/")
            known = batch.isascii() and batch.isdecimal() and len(batch) < 10 and int(batch) < len(fields)
            if not known or kind not in (_MAPPINGS if modality else _ROWS):
                raise DataError(
                    f"expected the fields of an attack in {str(path)!r}, got {name!r}; write the file again"
                )
            if modality:
                fields[int(batch)][kind][modality] = tensor
            else:
                fields[int(batch)][kind] = tensor
        return cls(tuple(AttackResult(**{"losses": None, "correct": None, **field}) for field in fields))


def attack_loader(
    attack: Attack,
    model: Adapter | nn.Module,
    loader: Iterable[Any],
    *,
    place: Callable[[Any], Any] | None = None,
    keep_deltas: bool = True,
    progress: bool = True,
) -> AttackedLoader:
    """Attack every batch of a loader.

        attacked = attack_loader(Attack(perturber, PGD(20), correct=right), model, loader)
        print(attacked.accuracy, attacked.unmoved())

    Arguments:
        attack: made on each batch; its random starts go on from batch to batch.
        model: what `adapt(model)` gave, or a bare model.
        place: moves a batch to the model's device; None: it is there.
        keep_deltas: keep the perturbations, which may be as large as the data.
        progress: show a progress bar.

    Raises:
        SiteError, ShapeError, ConfigurationError: as the attack.
        DataError: something that gives no batches, such as a data set of single rows.
    """
    if not isinstance(attack, Attack):
        raise ConfigurationError(f"expected an Attack(…), got {type(attack).__name__}; it comes before the model")
    check_functions(place=place)
    given: object = loader
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        raise _rows_alone(type(given).__name__)
    if not isinstance(given, Iterable) or isinstance(given, Tensor | Mapping | str):
        raise DataError(f"expected a loader of batches, got {type(given).__name__}; of one batch pass [batch]")
    results = []
    with adapted(model) as adapter:
        for batch in tqdm(loader, desc="attack", unit="batch", disable=progress is not True):
            placed = batch if place is None else place(batch)
            if isinstance(placed, Mapping) and not any(isinstance(value, Tensor) for value in placed.values()):
                raise _rows_alone(f"a {type(placed).__name__} without tensors from a {type(loader).__name__}")
            results.append(_on_cpu(attack(adapter, placed), keep_deltas))
    if not results:
        raise DataError("expected one batch or more to attack, got none; an iterator can be used once only")
    return AttackedLoader(tuple(results))


def _rows_alone(got: str) -> DataError:
    return DataError(f"expected a loader of batches of tensors, got {got}; pass a DataLoader of the rows")


def _on_cpu(result: AttackResult, keep_deltas: bool) -> AttackResult:
    rows = {name: None if (value := getattr(result, name)) is None else value.cpu() for name in _ROWS}
    held = {name: {m: tensor.cpu() for m, tensor in getattr(result, name).items()} for name in _MAPPINGS}
    return AttackResult(**rows, **(held if keep_deltas else held | {"deltas": {}}))  # type: ignore[arg-type]


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with a copy of each tensor whose memory an earlier one has, which the format does not hold."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def _joined(rows: Sequence[Tensor | None]) -> Tensor | None:
    found = [one for one in rows if one is not None]
    return torch.cat(found) if len(found) == len(rows) else None


def _is_ours(found: object) -> bool:
    known = isinstance(found, list) and len(found) == 2 and found[0] == _FORMAT
    return known and type(found[1]) is int and 0 <= found[1] < 10**9  # type: ignore[index]
