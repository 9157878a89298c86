"""The command `advvl report`: a page of measurements and of experiments over seeds, from the files that they wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from advvl.errors import DataError, OutputDirectoryError
from advvl.evaluation.measurement import Measurement
from advvl.evaluation.report import write_report
from advvl.evaluation.seed_runs import SeedRuns
from advvl.experiments.command_line import Parser

RESULTS: Final = "results.json"


def report_tool(arguments: Sequence[str]) -> None:
    """Run `advvl report`.

    Raises:
        ConfigurationError: an unknown option, or one that is missing.
        DataError: files that are neither measurements nor results, or of different tasks, data, settings or versions.
        OutputDirectoryError: the output has a report already.
    """
    parser = Parser(
        prog="advvl report",
        allow_abbrev=False,
        description="Write report.html, report.md, report.json and report.csv of measurements of the same examples: curves "
        "with intervals, comparisons, attacks, flags. Examples are drawn by advvl evaluate alone, which has the pictures. "
        "Results of experiments over seeds stand in a part of their own.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="measurements, results.json of experiments, or folders of either; NAME=FILE or NAME=DIR names them",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--title", default="Robustness", metavar="TEXT", help="of the page")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="X", help="of every interval (default 0.95)")
    parser.add_argument(
        "--chance",
        type=float,
        metavar="X",
        help="accuracy of the best constant answer, drawn as a line; by default as the measurements record it",
    )
    parser.add_argument("--overwrite", action="store_true", help="lose a report that is there")
    given = parser.parse_args(list(arguments))
    files = named(given.files)
    runs = {name: SeedRuns.load(path) for name, path in files.items() if path.suffix == ".json"}
    measurements = {name: Measurement.load(path) for name, path in files.items() if name not in runs}
    page = Path(given.output) / "report.html"
    if page.exists() and not given.overwrite:
        raise OutputDirectoryError(
            f"expected no report at {str(page)!r}, got one; choose another --output or --overwrite"
        )
    said = {"title": given.title, "confidence": given.confidence, "chance": given.chance}
    print(f"written to {write_report(given.output, measurements, runs=runs, **said)}")


def named(given: Sequence[str]) -> dict[str, Path]:
    """The files of measurements and results by name: what stands before "=", or the file's own name; of a folder all in it.

    With a name before it, a folder of several files gives NAME/FILE. Results are named after their folder.

    Raises:
        DataError: a file that is not there, a folder with neither, two of one name.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, _, after = text.partition("=")
        path = Path(after) if name and after and not Path(text).exists() else Path(text)
        files = _files(path)
        if not files or not files[0].is_file():
            raise DataError(
                f"expected a measurement or results.json at {str(path)!r}, got none; give what advvl evaluate --attack or "
                "an experiment wrote"
            )
        for file in files:
            own = file.absolute().parent.name if file.name == RESULTS else file.stem
            label = own if path == Path(text) else name if len(files) == 1 else f"{name}/{own}"
            if label in found:
                raise DataError(f"expected files of different names, got {label!r} twice; give NAME=FILE")
            found[label] = file
    return found


def _files(path: Path) -> list[Path]:
    """The file, or of a folder its measurements and its results."""
    if not path.is_dir():
        return [path]
    here = path / "measurements" if (path / "measurements").is_dir() else path
    results = [path / RESULTS] if (path / RESULTS).is_file() else []
    return [*sorted(here.glob("*.safetensors")), *results]
