"""The walk of a perturbation: how often one training step carries a delta from one file of advvl into another.

The step is VILLA's: text and image, FreeLB with three passes, a symmetric KL to a clean pass, the toy model. A change
of file is a call or a return by which control passes from a frame in one file of advvl to a frame in another that holds
a perturbation; frames outside advvl (torch's, the tests') are passed through. A frame holds a perturbation if an
argument or a local variable is one, or has one at most three levels down in mappings, sequences or attributes. A
perturbation is a start, or a tensor with the values of one of the step's deltas.

`PYTHONPATH=tests python -m support.walk` prints the number of changes and the files in the order of first visit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import advvl
from support.toy import toy, toy_batch

ROOT = str(Path(advvl.__file__).parent)
LEVELS = 3


class Walk:
    """Follows perturbations through everything that runs inside it.

    Arguments:
        deltas: the values that a perturbation may have.

    Attributes:
        visits: the files that a perturbation came to from another, in order.
    """

    def __init__(self, deltas: list[Tensor]) -> None:
        self.deltas = deltas
        self.visits: list[str] = []
        self._here = ""  # the file that control is in

    def __enter__(self) -> Walk:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, argument: object) -> None:
        del argument
        if event not in ("call", "return") or not _ours(frame):
            return
        into = frame if event == "call" else _caller(frame)
        file = "" if into is None else into.f_code.co_filename
        if into is not None and file != self._here:
            sys.setprofile(None)  # not to follow the search itself
            if any(self._holds(value, LEVELS) for value in into.f_locals.values()):
                self.visits.append(file)
            sys.setprofile(self._event)
        self._here = file

    def _holds(self, value: Any, levels: int) -> bool:
        if isinstance(value, Tensor):
            return any(value.shape == delta.shape and torch.equal(value, delta) for delta in self.deltas)
        if isinstance(value, advvl.Start):
            return True
        return levels > 0 and any(self._holds(part, levels - 1) for part in _parts(value))


def _ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(ROOT)


def _caller(frame: FrameType) -> FrameType | None:
    """The nearest caller in advvl."""
    back = frame.f_back
    while back is not None and not _ours(back):
        back = back.f_back
    return back


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if type(value).__module__.partition(".")[0] != "advvl" or isinstance(value, nn.Module):
        return []
    return list(getattr(value, "__dict__", {}).values())


def walk() -> Walk:
    """The walk of the perturbations of one step."""
    method = advvl.villa(step_sizes={"text": 0.3, "image": 0.5})
    passes: list[advvl.PassTrace] = []
    method.step(toy(), toy_batch(), trace=passes.append)  # to know the values of the deltas
    target, batch = toy(), toy_batch()
    with Walk([delta for seen in passes for delta in seen.deltas.values()]) as followed:
        method.step(target, batch)
    return followed


if __name__ == "__main__":
    visits = walk().visits
    files = list(dict.fromkeys(visits))
    print(f"{len(visits)} changes of file over {len(files)} files")
    for file in files:
        print(f"{visits.count(file):4d}  {Path(file).relative_to(ROOT)}")
