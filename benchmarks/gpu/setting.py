"""What a section is given: the device, the size of it all, the time that is left, and where its rows go."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from races import interval

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.lines import Row, append_row
from benchmarks.gpu.timing import Calls, Pace, quartiles, race

SMOKE = Pace(budget=0.0, least=1, most=1, shortest=0.0)


class Skipped(Exception):
    """A case that cannot be run here, with the reason."""


@dataclass(frozen=True)
class Setting:
    section: str
    device: torch.device
    smoke: bool
    budget: Budget
    lines: Path

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def free_bytes(self) -> int:
        """Memory that is free on the device; on a CPU enough for a smoke run."""
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else 2**30

    def add(self, row: Row) -> None:
        append_row(self.lines, row)

    def row(self, case: str, measure: str, **values: Any) -> Row:
        return Row(self.section, case, measure, **values)

    def measure(self, case: str, work: Callable[[], object]) -> None:
        """Run the work of a case, which adds its rows; a case without time left, refused or failed is a row as well."""
        if self.budget.left <= 0:
            self.add(self.row(case, "", status="not run", note="out of time"))
            return
        torch.manual_seed(0)
        try:
            work()
        except Skipped as reason:
            self.add(self.row(case, "", status="skipped", note=str(reason)))
        except Exception as error:
            traceback.print_exc()
            note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            self.add(self.row(case, "", status="failed", note=note))
        if self.cuda:
            torch.cuda.empty_cache()

    def times(self, calls: Calls, pace: Pace) -> dict[str, list[float]]:
        """Rounds of each way, fewer of them as time runs out."""
        left = replace(pace, budget=min(pace.budget, self.budget.left / 2))
        return race(calls, self.device, SMOKE if self.smoke else left)

    def ratio(
        self,
        case: str,
        measure: str,
        times: Mapping[str, list[float]],
        *,
        of: str,
        over: str,
        goal: str = "",
        least: float | None = None,
        most: float | None = None,
        note: str = "",
        **facts: Any,
    ) -> None:
        """Add the ratio of the medians of two ways, with 95 % of it, and the times of all.

        `least` and `most` are the goal as numbers.
        """
        _, above, _ = quartiles(times[of])
        _, below, _ = quartiles(times[over])
        value = above / below
        reached = None
        if least is not None or most is not None:
            reached = (least is None or value >= least) and (most is None or value <= most)
        self.add(
            self.row(
                case,
                measure,
                value=value,
                unit="x",
                interval=interval(times[of], times[over]),
                goal=goal,
                reached=reached,
                seconds={name: quartiles(times[name]) for name in (of, over)},
                note=note,
                facts={"rounds": len(times[of]), **facts},
            )
        )
