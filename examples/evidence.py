"""What does adversarial training in embedding space gain? Every row of the project's evidence, by one command.

The studies, each of models trained from several seeds and attacked, with intervals over the seeds:

    digits        standard training, at equal updates and equal compute, and six adversarial methods; 10 seeds
    ingredients   VILLA with one ingredient changed: one modality, no KL, no clean loss, more or other steps; 3 seeds
    stage-one     500 questions instead of 2,000: what adversarial pre-training buys where data are few; 5 seeds
    colors        people's words for colours, from your copy of Colors in Context (--data-dir); 5 seeds

    python examples/evidence.py --study digits --seeds 5                 one study, fewer seeds
    python examples/evidence.py --data-dir colors.tar.xz --output runs/evidence-all

Each study is an experiment of `advvl villa-uniter` or `advvl colors`, and takes their other flags. After a kill, the
same command continues; with more seeds it adds them. The tables are in OUTPUT/evidence.md, with the numbers and the plot of
each study beside it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advvl.experiments.cli import exit_status
from advvl.experiments.colors import COLORS
from advvl.experiments.command_line import parse
from advvl.experiments.experiment import Experiment
from advvl.experiments.options import first_seeds
from advvl.experiments.runner import run
from advvl.experiments.uniter import UNITER
from advvl.files import write_text


@dataclass(frozen=True)
class Study:
    """An experiment with its rows.

    Arguments:
        question: that the study answers.
        experiment: which runs it.
        seeds: how many, unless the command line says.
        methods: rows; the first is what others are compared with.
        flags: of the experiment, beside.
        folder: of models, below the output directory; studies of one configuration share one.
    """

    question: str
    experiment: Experiment[Any, Any]
    seeds: int
    methods: str
    flags: str
    folder: str


STUDIES = {
    "digits": Study(
        "Does adversarial training raise clean accuracy, and is it robustness or compute that it buys?",
        UNITER,
        10,
        "standard,equal-compute,freelb,pgd,free-at,smart,villa,pre-training,both-stages",
        "--preset demo",
        "digits",
    ),
    "ingredients": Study(
        "What does each ingredient of VILLA buy?",
        UNITER,
        3,
        "standard,villa,villa-text,villa-image,villa-together,villa-no-kl,villa-no-clean,villa-more-steps,villa-near,"
        "villa-far",
        "--preset demo",
        "digits",
    ),
    "stage-one": Study(
        "What does adversarial pre-training buy where there are few questions to fine-tune on?",
        UNITER,
        5,
        "standard,pre-training,villa,both-stages",
        "--preset demo --data.train_questions 500 --finetune.epochs 100 --pretrain.epochs 12",
        "stage-one",
    ),
    "colors": Study(
        "Does it hold on people's words?",
        COLORS,
        5,
        "standard,equal-compute,freelb,villa,both-stages",
        "--preset evidence",
        "colors",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--study", action="append", choices=STUDIES, help="studies to run (default: all); may be repeated"
    )
    parser.add_argument("--seeds", type=first_seeds, help="number of seeds, 0 to N-1, instead of each study's own")
    parser.add_argument("--data-dir", help="folder or archive of Colors in Context; without it, colors is left out")
    parser.add_argument("--output", default="runs/evidence-all", help="directory of results (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that share the work (default: %(default)s)")
    given, rest = parser.parse_known_args(arguments)
    chosen = given.study or [name for name in STUDIES if name != "colors" or given.data_dir]
    output = Path(given.output)
    for name in chosen:
        study = STUDIES[name]
        print(f"\n== {name}: {study.question}\n", flush=True)
        run(study.experiment, options_of(study, given, rest))
        for file in ("results.json", "results.md", "accuracy_against_radius.png"):
            shutil.copyfile(output / study.folder / file, output / file.replace(".", f"-{name}.", 1))
        write_text(output / "evidence.md", page_of(output))
    print(f"\nThe tables are in {output / 'evidence.md'}.")


def page_of(output: Path) -> str:
    """Return the tables of all studies that have been run into this directory, now or before."""
    parts = ["# Evidence"]
    for name, study in STUDIES.items():
        table = output / f"results-{name}.md"
        if table.is_file():
            plot = f"![Accuracy against the radius](accuracy_against_radius-{name}.png)"
            parts += [f"## {name}", study.question, table.read_text(encoding="utf-8").strip(), plot]
    return "\n\n".join(parts) + "\n"


def options_of(study: Study, given: argparse.Namespace, rest: Sequence[str]) -> Any:
    """Return the options of the study's experiment; `rest` are flags of its own, which win."""
    seeds = study.seeds if given.seeds is None else len(given.seeds)
    flags = ["--methods", study.methods, "--seeds", str(seeds), "--jobs", str(given.jobs), "--resume"]
    if study.experiment is COLORS and given.data_dir:
        flags += ["--data-dir", given.data_dir]
    flags += ["--output", str(Path(given.output) / study.folder), *study.flags.split(), *rest]
    return parse(study.experiment.options, flags, presets=study.experiment.presets)


if __name__ == "__main__":
    sys.exit(exit_status(main))
