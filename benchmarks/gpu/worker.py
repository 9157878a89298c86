"""One section of the benchmarks, in a process of its own: `python -m benchmarks.gpu.worker JSON`, as `plan` starts it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measures import facts

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.lines import append
from benchmarks.gpu.setting import Setting


def main(text: str) -> None:
    given = json.loads(text)
    budget, device = Budget(given["seconds"]), torch.device(given["device"])
    lines = Path(given["lines"])
    append(lines, "facts", facts(device) | {"taken": time.strftime("%Y-%m-%d"), **_driver(device)})
    setting = Setting(given["section"], device, given["smoke"], budget, lines)
    importlib.import_module(f"benchmarks.gpu.sections.{given['section']}").run(setting)


def _driver(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    total = torch.cuda.get_device_properties(device).total_memory
    return {"driver": said.partition("\n")[0] or "unknown", "cuda": torch.version.cuda, "memory": total}


if __name__ == "__main__":
    main(sys.argv[1])
