"""The method's description beside each checkpoint of `AdversarialTrainer`, so that none is resumed with another one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from advvl.errors import CheckpointError
from advvl.files import read_json, write_json
from advvl.runtime.descriptions import described, differing
from advvl.training import AdversarialTraining

FILE: Final = "advvl_method.json"


class MethodRecord(TrainerCallback):
    """Writes the method's description into every checkpoint that Trainer saves, and compares it on resumption.

    Arguments:
        method: described in its current state; some parts change in training.
    """

    def __init__(self, method: AdversarialTraining) -> None:
        self.described = described(method)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        del control, kwargs
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_json(folder / FILE, {"method": self.described})

    def check(self, resume: str | bool | None, output_dir: str) -> None:
        """Check that the checkpoint to resume from, if any, is of this method.

        Arguments:
            resume: as `Trainer.train` takes it: a folder, or True for the latest in `output_dir`.

        Raises:
            CheckpointError: it is of another one.
        """
        folder = resume
        if resume is True:
            folder = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None  # type: ignore[no-untyped-call]
        if not folder:
            return  # nothing to resume from, which Trainer says itself
        path = Path(str(folder)) / FILE
        if not path.is_file():
            warnings.warn(
                f"{str(folder)!r} does not say which method its run had; see that it was this one, or load its weights "
                "without resuming",
                stacklevel=3,
            )
            return
        found, here = read_json(path), self.described
        there = found.get("method") if isinstance(found, dict) else found
        if there != here:
            raise CheckpointError(
                f"expected a checkpoint of this method in {str(folder)!r}, got another in {differing(str(there), here)}; "
                "resume with that, or load its weights alone"
            )
