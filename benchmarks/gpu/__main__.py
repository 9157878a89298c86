"""The command: see the package."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.check import Check
from benchmarks.gpu.plan import ROOT, Options, sections
from benchmarks.gpu.record import Record

RESERVE = 15.0  # seconds of the time that are kept for ending processes and for the pages


def main(arguments: list[str] | None = None) -> int:
    """0 if nothing failed, else 1."""
    os.chdir(ROOT)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, one round: does it run? its figures say nothing"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; default: 8")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ROOT / "benchmarks/results/gpu")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections alone")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not has_cuda():
        parser.error("expected a CUDA device that torch can use, got none; without one, try --device cpu --smoke")
    record = Record(Path(given.out).resolve())
    chosen = sections(Options(given.device, given.smoke, record.lines))
    names = [section.name for section in chosen]
    if unknown := sorted(set(given.only or []) - set(names)):
        parser.error(f"expected sections among {names}, got {unknown}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of a section are ended too
    check = Check(
        [section for section in chosen if given.only is None or section.name in given.only],
        record,
        Budget(60 * given.minutes - RESERVE),
    )
    fine = check.run()
    print((record.folder / "results.md").read_text())
    print(f"{record.folder / 'results.json'}, {record.folder / 'results.md'}")
    return 0 if fine else 1


def has_cuda() -> bool:
    """Asked in another process: this one never loads torch, so that it cannot hang or crash with it."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
