"""`advvl evaluate` and `advvl predict` in two processes: they share the batches, and one of them says and writes it all."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.spawn import results
from support.task_databases import options_of, values, write_databases

from advvl.experiments import task_commands
from advvl.experiments.cli import main
from advvl.experiments.train_setup import model_of
from advvl.models.uniter.checkpoint import save_checkpoint

pytestmark = pytest.mark.slow  # several processes

TASKS = ("ve", "retrieval")


def configured(task: str, root: Path) -> str:
    options = options_of(task, root)
    write_databases(options, root)
    save_checkpoint(model_of(options), root / "model.safetensors")
    path = root / f"{task}.yaml"
    path.write_text(yaml.safe_dump(values(task, root, checkpoint=str(root / "model.safetensors"))))
    return str(path)


def said(config: str, out: Path) -> dict[str, Any]:
    """Score and predict, and return what was printed, and how often something was written."""
    written = 0

    def counting(name: str) -> Any:
        write = getattr(task_commands, name)

        def write_and_count(*given: Any) -> Any:
            nonlocal written
            written += 1
            return write(*given)

        return write_and_count

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name in ("write_json", "write_predictions"):
            patch.setattr(task_commands, name, counting(name))
        status = [main([command, config, "--output", str(out)]) for command in ("evaluate", "predict")]
    return {"status": status, "printed": printed.getvalue().replace(str(out), "OUT"), "written": written}


def worker(rank: int, folder: Path) -> dict[str, Any]:
    del rank
    return {task: said(str(folder / f"{task}.yaml"), folder / f"shared-{task}") for task in TASKS}


def test_two_processes_find_what_one_does_and_the_main_one_alone_says_it(tmp_path: Path) -> None:
    alone = {}
    for task in TASKS:
        root = tmp_path / task
        root.mkdir()
        config = configured(task, root)
        alone[task] = said(config, tmp_path / f"alone-{task}")
        (tmp_path / f"{task}.yaml").write_text(Path(config).read_text())
    first, second = results("experiments.test_shared_scores:worker", 2, tmp_path)
    for task in TASKS:
        assert first[task] == alone[task]
        assert alone[task]["written"] == 2
        assert second[task] == {"status": [0, 0], "printed": "", "written": 0}
        names = sorted(path.name for path in (tmp_path / f"alone-{task}").iterdir())
        assert names == ["predictions-val.json", "scores-val.json"]
        for name in names:
            shared = (tmp_path / f"shared-{task}" / name).read_text()
            assert shared == (tmp_path / f"alone-{task}" / name).read_text()
