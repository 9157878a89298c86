"""Options that every experiment has: frozen dataclasses, from which one of its own derives.

`advvl.experiments.config` reads a field's metadata: `help` (one line for the command line), `flags` (further names of its
flag), `parse` (from the flag's text to the value, where that is not the field's own type), `metavar`, and
`identity=False` for a field that does not change what an output directory holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from advvl.checks import at_least, check_each, flag, is_whole, text
from advvl.errors import ConfigurationError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.fit.options import OptimizerOptions

Dropout = Literal["fresh", "shared"]

_MOST_SEEDS: Final = 10_000


def own(help: str, **metadata: Any) -> dict[str, Any]:
    """Return metadata of a field that belongs to one run and not to what an output directory holds."""
    return {"help": help, "identity": False, **metadata}


def first_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds 0..N-1 for the text N, as `--seeds` takes it.

    Raises:
        ValueError: no whole number from 1 to 10000.
    """
    count = int(text)
    if not 1 <= count <= _MOST_SEEDS:
        raise ValueError(text)
    return tuple(range(count))


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """Options of every experiment: seeds, output directory, training, evaluation, and the use of the machine.

    Raises:
        ConfigurationError: a value of another type or out of its range; `resume` with `overwrite`.
    """

    preset: str = field(default="demo", metadata=own("values to start from, over the defaults below"))
    seeds: tuple[int, ...] = field(
        default=(0,),
        metadata=own(
            "number of seeds, 0 to N-1",
            parse=first_seeds,
            metavar="N",
            wanted=f"a whole number from 1 to {_MOST_SEEDS}",
        ),
    )
    output: str = field(default="runs/experiment", metadata=own("directory of results"))
    resume: bool = field(default=False, metadata=own("take up a run where it was killed"))
    overwrite: bool = field(default=False, metadata=own("lose what the output directory holds"))
    jobs: int = field(default=2, metadata=own("processes that share the work, each with its own threads"))
    device: str = field(default="auto", metadata=own("auto, cpu, cuda, cuda:1, ..."))
    threads: int = field(default=1, metadata=own("CPU threads of a process; the same number gives the same bits"))
    finetune: OptimizerOptions = field(default_factory=OptimizerOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        check_each(self, ("seeds",), _are_seeds, "one or more distinct whole numbers of 0 or more")
        text(self, "preset", "output", "device")
        at_least(1, self, "threads", "jobs")
        flag(self, "resume", "overwrite")
        if self.resume and self.overwrite:
            raise ConfigurationError("expected resume or overwrite, got both; one keeps what the other loses")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Numbers of pictures, questions and captions made of the scanned digits; see `advvl.data.digits.corpus`.

    Arguments:
        seed: of the scenes and texts.
        train_images: scans for training; as many digits as the test shows come from other scans.
        train_questions, validation_questions, test_questions: questions of each part.
        captions: captions for pre-training.
    """

    seed: int = 0
    train_images: int = 300
    train_questions: int = 4000
    validation_questions: int = 1000
    test_questions: int = 2000
    captions: int = 4000

    def __post_init__(self) -> None:
        at_least(0, self, "seed")
        at_least(1, self, "train_images", "train_questions", "validation_questions", "test_questions", "captions")


def check_heads(options: Any) -> None:
    """Check that `hidden_size` is a multiple of `num_attention_heads`.

    Raises:
        ConfigurationError: it is not.
    """
    if options.hidden_size % options.num_attention_heads:
        raise ConfigurationError(
            f"expected hidden_size to be a multiple of num_attention_heads={options.num_attention_heads}, "
            f"got {options.hidden_size}"
        )


def _are_seeds(seeds: Any) -> bool:
    return (
        isinstance(seeds, list | tuple)
        and all(is_whole(seed) and seed >= 0 for seed in seeds)
        and 0 < len(seeds) == len(set(seeds))
    )
