"""Predictions in files, as the servers of the tasks take them; of tasks without a server, as JSON by the examples' keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advvl.errors import ConfigurationError, DataError
from advvl.experiments.train_options import TrainOptions
from advvl.files import parse_json, write_json
from advvl.tasks.submissions import write_nlvr2_judgements, write_vcr_scores, write_vqa_answers
from advvl.tasks.uniter.ve import VE_LABELS


def write_predictions(options: TrainOptions, predictions: Mapping[str, Any], name: str) -> Path:
    """Write predictions by the examples' keys, and return the file.

    Arguments:
        name: of the split, in the file's name.

    Raises:
        ConfigurationError: a task that predicts nothing; VQA without a table of answers.
        DataError: a table of answers that is none.
    """
    path = Path(options.output) / f"predictions-{name}"
    match options.task:
        case "vqa":
            words = answers_of(options)
            return write_vqa_answers(
                path.with_suffix(".json"), {_number(key): words[found] for key, found in predictions.items()}
            )
        case "ve":
            return write_json(path.with_suffix(".json"), {key: VE_LABELS[found] for key, found in predictions.items()})
        case "nlvr2":
            return write_nlvr2_judgements(path.with_suffix(".csv"), predictions)
        case "vcr":
            return write_vcr_scores(path.with_suffix(".csv"), predictions)
        case "retrieval" | "hard-retrieval" | "referring":
            return write_json(path.with_suffix(".json"), dict(predictions))
    raise ConfigurationError(f"expected a task that predicts, got {options.task}; its scores are in advvl evaluate")


def answers_of(options: TrainOptions) -> list[str]:
    """Read the answers in words by their numbers: a list of them, or their numbers by the words.

    Raises:
        ConfigurationError: no file is named.
        DataError: a file that is none, or of another number of answers than the model's.
    """
    if options.data.answers is None:
        raise ConfigurationError(
            "expected data.answers, a JSON file of answers and their numbers, got none; UNITER's is ans2label.json"
        )
    path = Path(options.data_dir) / options.data.answers
    try:
        found = parse_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"expected answers in JSON at {str(path)!r}, got {error}; check data.answers") from error
    if isinstance(found, dict) and sorted(map(str, found.values())) == sorted(map(str, range(len(found)))):
        found = sorted(found, key=lambda word: found[word])
    words = isinstance(found, list) and all(isinstance(word, str) for word in found)
    if not words or len(found) != options.model.answers:
        raise DataError(
            f"expected {options.model.answers} answers in {str(path)!r}, a list of words or their numbers by the words, got "
            f"{len(found) if words else type(found).__name__}"
        )
    return list(found)


def _number(key: str) -> int | str:
    return int(key) if key.isdecimal() else key
