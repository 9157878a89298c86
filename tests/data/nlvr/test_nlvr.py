"""NLVR is read as published, and its pictures become regions; examples here are invented, in the published form."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from advvl.data.nlvr.corpus import FEATURES, statement_source
from advvl.data.nlvr.statements import Item, read_statements
from advvl.data.wordpiece import build_tokenizer
from advvl.errors import DataError


def item(x: Any = 10, y: Any = 20, size: Any = 20, shape: Any = "circle", color: Any = "#0099ff") -> dict[str, Any]:
    return {"x_loc": x, "y_loc": y, "size": size, "type": shape, "color": color}


def example(identifier: str = "1-0", **changes: Any) -> dict[str, Any]:
    boxes = [[item()], [], [item(x=0, color="Yellow", shape="square"), item(y=79, color="Black", shape="triangle")]]
    return {
        "identifier": identifier,
        "sentence": "There is a blue circle.",
        "label": "true",
        "directory": "2",
        "evals": {"r0": "true"},
        "structured_rep": boxes,
        **changes,
    }


def written(folder: Path, *examples: dict[str, Any]) -> Path:
    (folder / "dev.json").write_text("\n".join(map(json.dumps, examples)) + "\n", encoding="utf-8")
    return folder / "dev.json"


def test_an_example_is_read(tmp_path: Path) -> None:
    first, second = read_statements(written(tmp_path, example(), example("1-1", label="false")))
    assert (first.identifier, first.sentence, first.label, first.fold) == ("1-0", "There is a blue circle.", True, "2")
    assert first.boxes[0] == (Item(10, 20, 20, "circle", "blue"),)
    assert [len(box) for box in first.boxes] == [1, 0, 2]
    assert second.label is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "maybe"}, "label 'maybe'"),
        ({"sentence": " "}, "sentence"),
        ({"structured_rep": [[item()], []]}, "structured_rep"),
        ({"structured_rep": [[], [], []]}, "not all empty"),
        ({"structured_rep": [[item()] * 99, [], []]}, "99"),
        ({"structured_rep": [[item(x="7")], [], []]}, "x_loc '7'"),
        ({"structured_rep": [[item(x=float("nan"))], [], []]}, "x_loc nan"),
        ({"structured_rep": [[item(x=90, size=40)], [], []]}, "x_loc 90, y_loc 20, size 40 outside a box"),
        ({"structured_rep": [[item(y=101)], [], []]}, "y_loc 101"),
        ({"structured_rep": [[item(size=0)], [], []]}, "size 0"),
        ({"structured_rep": [[item(color="red")], [], []]}, "color 'red'"),
        ({"structured_rep": [[item(shape="star")], [], []]}, "type 'star'"),
        ({"structured_rep": [[{"x_loc": 1}], [], []]}, "no 'y_loc'"),
        ({"structured_rep": [[3], [], []]}, "line 2"),
    ],
)
def test_a_bad_example_is_refused_with_its_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, example(), example("1-1", **changes))
    with pytest.raises(DataError, match=r"line 2 of .*dev\.json") as caught:
        read_statements(path)
    assert message in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, example(), example())
    with pytest.raises(DataError, match="'1-0' twice"):
        read_statements(path)
    for text, message in (
        ("[1]", "line 1: expected a JSON object"),
        ("{", "line 1: expected JSON"),
        ("", "one example or more"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_statements(path)
    with pytest.raises(DataError, match=r"gone\.json"):
        read_statements(tmp_path / "gone.json")


def test_a_region_is_an_object(tmp_path: Path) -> None:
    statements = read_statements(written(tmp_path, example(), example("1-1", label="false")))
    source = statement_source(statements, build_tokenizer(one.sentence for one in statements))
    batch = source.batch([0, 1])
    assert batch["targets"].tolist() == [1, 0]
    assert batch["img_feat"].shape == (2, 3, FEATURES)
    assert batch["num_bbs"].tolist() == [3, 3]
    first = batch["img_feat"][0, 0]
    assert first.tolist() == pytest.approx([0, 0, 1, 0, 1, 0, 1, 0, 0, 0.1, 0.2, 0.2])
    lying_in = (batch["img_pos_feat"][0, :, 0] * 3).floor()
    assert lying_in.tolist() == [0, 2, 2]
    boxes = batch["img_pos_feat"]
    torch.testing.assert_close(boxes[..., 4] * boxes[..., 5], boxes[..., 6])
    torch.testing.assert_close(boxes[..., 2] - boxes[..., 0], boxes[..., 4])


def test_labels_of_some_alone_are_refused(tmp_path: Path) -> None:
    statements = read_statements(written(tmp_path, example(), example("1-1", label=None)))
    with pytest.raises(DataError, match="1 of 2"):
        statement_source(statements, build_tokenizer(["a"]))
    assert "targets" not in statement_source(statements[1:], build_tokenizer(["a"])).batch([0])


@pytest.mark.skipif("ADVVL_NLVR" not in os.environ, reason="ADVVL_NLVR names no folder of the corpus")
def test_the_published_corpus() -> None:
    """The majority class of the published splits is that of the paper."""
    folder = Path(os.environ["ADVVL_NLVR"])
    for name, count, share in (("dev.json", 989, 55.3), ("test.json", 990, 56.2)):
        statements = read_statements(folder / name)
        assert len(statements) == count
        assert round(100 * sum(one.label is True for one in statements) / count, 1) == share
        source = statement_source(statements, build_tokenizer(one.sentence for one in statements))
        assert source.batch(range(count))["img_feat"].isfinite().all()
