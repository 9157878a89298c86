"""VILLA on people's statements: is it true of three boxes of objects (NLVR), in both stages.

Stage one trains a UNITER from scratch on the true statements and their boxes, plainly or by VILLA's adversarial
pre-training; stage two fine-tunes it, with a score for true and one for false.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from advvl.checks import path_of
from advvl.data.nlvr.corpus import NlvrCorpus, nlvr_corpus
from advvl.data.nlvr.statements import read_statements
from advvl.experiments.experiment import Experiment, Setup, Task
from advvl.experiments.nlvr_options import PRESETS, NlvrOptions
from advvl.experiments.outputs import OutputDirectory
from advvl.experiments.uniter_rows import rows_of
from advvl.experiments.villa_stages import stage_of
from advvl.models.uniter.checkpoint import save_checkpoint
from advvl.tasks.uniter.vqa import UniterForVQA

ANSWERS: Final = 2
"""False and true."""

CORPUS_SEED: Final = 0
"""Of the permutations of statements: every seed of the experiment has the same corpus."""


def prepare(options: NlvrOptions, directory: OutputDirectory) -> None:
    """Find out whether the corpus is there before worker processes are started, and say how large it is.

    Raises:
        DataError: it is not, or is malformed.
    """
    del directory
    for name in ("dev.json", "test.json"):
        found = read_statements(path_of(options.data_dir) / name)
        true = sum(one.label is True for one in found)
        print(
            f"{name}: {len(found)} statements, {100 * max(true, len(found) - true) / len(found):.1f} % in the larger class"
        )


def open_corpus(options: NlvrOptions, directory: OutputDirectory) -> NlvrCorpus:
    """Read the corpus; each process reads it for itself."""
    del directory
    return nlvr_corpus(options.data_dir, copies=options.copies, fold=options.fold, seed=CORPUS_SEED)


def set_up(options: NlvrOptions, corpus: NlvrCorpus, task: Task, start: Path | None) -> Setup:
    """Make a UNITER with pre-training's heads, or with one that judges statements and the encoder of `start`."""
    return stage_of(options, corpus, task, start, UniterForVQA, tokens=options.tokens, num_answers=ANSWERS)


NLVR: Final = Experiment(
    NlvrOptions,
    data=open_corpus,
    rows=rows_of,
    set_up=set_up,
    presets=PRESETS,
    prepare=prepare,
    save=save_checkpoint,
)
