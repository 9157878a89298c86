"""Writes docs/benchmarks.md, its plots and its data from what `make bench` measured.

    python benchmarks/report.py

The JSONs of pytest-benchmark in benchmarks/results are reduced to what the page needs, one file a device in docs/benchmarks,
a race that was run again replacing the older; the page is then written from all files there, so that a run on another
machine can be added.
"""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from plots import draw_bars, draw_memory, draw_ops, draw_scaling
from records import Run, collect, load
from tables import attack, methods, ops, plain, scaling, step, table
from targets import targets

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "benchmarks.md"
DATA = PAGE.with_suffix("")

NOTES = {
    "ops": (
        "The update of one perturbation",
        "This is a step along the gradient and back into the ball; ours works in place. Under each time is its "
        "share of the speed of the copy in the last column, which moves as many bytes (1.5 tensors: read the "
        "perturbation and its gradient, write the perturbation; with a box, x is read too, 2 tensors). Every row "
        "ends outside its ball and is projected. torchattacks, foolbox and captum keep x + δ, so they read x as "
        "well and clamp to [0, 1]. On a CPU the definition, which takes seconds, is left out of the largest "
        "shape. *Masked* means that every fourth position is masked.",
    ),
    "step": (
        "One VILLA update",
        "These are updates with K = 3 passes, on UNITER in training mode. *Unavoidable* are the passes of an "
        "exact update with the gradients that they must compute: K+1 forwards and backwards with fresh dropout "
        "masks; with shared masks K of each and a backward to the perturbations alone (in turn: 2K+1, and 2K-1 "
        "with that backward). FreeLB's limit is as many bare passes: K, in turn 2K. *Graphs at once* is the peak "
        "memory beyond that of one pass whose graph is kept, in graphs of one pass, plus one; it includes a "
        "gradient of every parameter, which a backward through two graphs also holds. ",
    ),
    "attack": (
        "Attacks of ten steps",
        "All attacks have equal radius, steps and start. Ours runs without the end pass that gives losses and "
        "verdicts, since the others have none. captum's L2 attack steps along the sign of the gradient, with a "
        "step of equal length.",
    ),
    "methods": (
        "Updates of published methods",
        "A unit is a forward, measured as a third of a forward and backward of the same model in the same run. "
        "*Unavoidable* are as many bare forwards and backwards, of parameters or of the input alone, as the "
        "method has; in its moves LAT needs only those of the layers above its site. Units of operations count "
        "those for which torch has a formula, which a fused attention kernel on a CPU does not have.",
    ),
    "evaluation": (
        "An evaluation of CLIP-base",
        "This times `worst_case` with PGD, a random search and all checks, on transformers' CLIP of its default "
        "sizes, against the same forwards and backwards to the pixels, run bare one after another.",
    ),
    "scaling": (
        "Growth with size",
        "This uses a small UNITER. Operations are counted and their growth is asserted; times are only reported. "
        "At every size an update costs K+1 passes of the model with fresh masks, and K and a third with shared "
        "ones, and its memory does not depend on K.",
    ),
    "trainer": (
        "An update in transformers' Trainer",
        "This compares FreeLB with K = 3 in `AdversarialTrainer` with `Trainer` accumulating gradients over K "
        "batches of the same size: the same number of passes of the model and of updates, in whole trainings of "
        "six updates that log nothing. Trainer collates K batches per update, ours collates one.",
    ),
    "regularizer": (
        "The symmetric divergence",
        "This is the divergence of two tensors of logits, with its gradients to both. Up to a mebibyte per side, "
        "as for 64x3129, ours is the expression in log space; beyond that, it works block by block.",
    ),
}


PLOTS = {
    "ops": "Speed of an update by shape, as a share of the speed of copying the same bytes",
    "step": "Time of a VILLA update by model and modalities, over that of K bare passes",
    "memory": "Peak memory of a VILLA update, in graphs of one pass",
    "attack": "Time of an attack of ten steps, over that of ten bare passes",
    "scaling": "Time of an update against K, rows and words, beside the growth of its operations",
}


def section(slug: str, run: Run, plt: Any) -> str:
    parts = [f"## {run.device}", "### Targets", _targets_table(run)]
    draw = {
        "ops": lambda path: draw_ops(run, path, plt),
        "step": lambda path: draw_bars(
            run,
            "step",
            "time of an update over that of K bare passes, in turn 2K (dashed)",
            path,
            plt,
        ),
        "memory": lambda path: draw_memory(run, path, plt),
        "attack": lambda path: draw_bars(run, "attack", "time over ten bare passes (dashed)", path, plt),
        "scaling": lambda path: draw_scaling(run, path, plt),
    }
    tables = {"ops": ops, "step": step, "attack": attack, "methods": methods, "scaling": scaling}
    suites = dict.fromkeys(row.suite for row in run.rows)
    for suite in [*(name for name in NOTES if name in suites), *(name for name in suites if name not in NOTES)]:
        title, note = NOTES.get(suite, (suite, ""))
        parts += [f"### {title}", note]
        for plot in [suite, "memory"] if suite == "step" else [suite]:
            if plot in draw:
                draw[plot](DATA / f"{slug}-{plot}.png")
                parts.append(f"![{PLOTS[plot]}]({DATA.name}/{slug}-{plot}.png)")
        parts.append(tables.get(suite, plain(suite))(run))
    return "\n\n".join(part for part in parts if part)


def _targets_table(run: Run) -> str:
    word = {True: "yes", False: "**no**"}
    rows = [[t.measure, t.goal, t.measured, word[t.reached] + ", unsure" * t.unsure] for t in targets(run)]
    return table(["measure", "target", "measured", "reached"], rows)


def machine(run: Run) -> str:
    facts = run.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    return f"| {run.device} | {facts['taken']} | {facts['threads']} | {facts['commit']} | {versions} |"


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    collect(RESULTS, DATA)
    runs = load(DATA)
    if not runs:
        raise SystemExit(f"expected measurements in {RESULTS} or {DATA}, got none; run make bench first")
    page = Template((HERE / "report.md").read_text()).substitute(
        machines="\n".join(machine(run) for run in runs.values()),
        sections="\n\n".join(section(slug, run, plt) for slug, run in runs.items()),
    )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
