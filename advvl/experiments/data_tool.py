"""The command `advvl data`: converts a person's own data to UNITER's databases, and says what a database holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from advvl.experiments.command_line import Parser
from advvl.experiments.data_convert import TASKS, convert
from advvl.experiments.data_inspect import inspect

_EPILOG: Final = """\
Records are JSON objects, one on each line; docs/own-data.md says which keys a task needs. `image` names an image of
--features: the path of its .npz or .npy file in the folder, without the ending, or its id in LXMERT's .tsv file.

  advvl data convert train.jsonl --task vqa --tokenizer bert-base-cased --answers ans2label.json \\
      --features regions/ --text-db train.db --image-db images
  advvl data inspect train.db --images images
"""


def data_tool(arguments: Sequence[str]) -> None:
    """Run `advvl data convert` or `advvl data inspect`.

    Raises:
        ConfigurationError: an unknown option, or one that is missing.
        DataError: data that cannot be used.
        OutputDirectoryError: something that is there already, or a place that cannot be written.
    """
    parser = Parser(
        prog="advvl data",
        description="Convert your own data to UNITER's databases, or say what a database holds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{convert,inspect}")
    _convert_options(commands.add_parser("convert", help="write databases of records and of region features"))
    _inspect_options(commands.add_parser("inspect", help="counts, lengths, fields, regions, and what is wrong"))
    given = parser.parse_args(arguments)
    (convert if given.command == "convert" else inspect)(given)


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a database of texts, of images, or both; nothing is overwritten, and none is left half written."
    )
    parser.add_argument(
        "records", nargs="?", metavar="RECORDS", help="file of JSON lines; none to convert images alone"
    )
    parser.add_argument("--task", choices=TASKS, help="what the records are for")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer.json, or folder or name of a tokenizer of transformers"
    )
    parser.add_argument("--text-db", metavar="FOLDER", help="database of texts to write")
    parser.add_argument(
        "--image-db", metavar="FOLDER", help="database of images to write: of those that RECORDS name, or all"
    )
    parser.add_argument(
        "--features", metavar="PATH", required=True, help="folder of .npz or .npy files, or LXMERT's .tsv file"
    )
    parser.add_argument(
        "--answers", metavar="FILE", help="vqa: answers' numbers; written, of all answers, if not there"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="longest text in word pieces (default: 60, of vcr 220)"
    )
    parser.add_argument(
        "--num-bb",
        type=int,
        metavar="N",
        help="keep up to N regions of each image, as a numbbN database (default of referring: 100, or the most there are)",
    )
    parser.add_argument(
        "--compressed", action="store_true", help="write images as npz: a tenth smaller, slower to read"
    )
    parser.add_argument("--full-precision", action="store_true", help="store images in single precision, not in half")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and list what cannot be used")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say what a database of texts or of images holds, after reading every record."
    parser.add_argument("folder", metavar="FOLDER", help="database of texts, or folder of databases of images")
    parser.add_argument("--images", metavar="FOLDER", help="look up the images of the texts in these databases")
