"""Visual questions of one's own: what is read of them, what is refused, and batches whose padding changes nothing."""

from __future__ import annotations

import ast
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LxmertConfig

from advvl import adapt, villa
from advvl.data.lxmert.answers import AnswerTable
from advvl.data.lxmert.sources import Sentences
from advvl.data.lxmert.vqa import LxmertCollate
from advvl.data.uniter.vqa import UniterCollate
from advvl.data.vqa import VQAExample, frequent_answers
from advvl.data.wordpiece import build_tokenizer
from advvl.errors import ConfigurationError, DataError
from advvl.models.uniter.config import UniterConfig
from advvl.tasks.lxmert.vqa import LxmertForVQA
from advvl.tasks.uniter.vqa import UniterForVQA

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_vqa.py"
FEATURES = 6
TEXTS = ("is it dark ?", "what is it ?", "where is the old red car of the man ?", "who ?")


def corners(count: int, *, seed: int = 0) -> Tensor:
    """Boxes in parts of an image, (count, 4)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.flatten(1)


def example(number: int = 0, **changes: Any) -> VQAExample:
    """One with number + 1 regions."""
    generator = torch.Generator().manual_seed(number)
    values = {
        "text": TEXTS[number],
        "features": torch.randn(number + 1, FEATURES, generator=generator),
        "boxes": corners(number + 1, seed=number),
        "answers": {"yes": 0.9, "no": 0.3} if number % 2 else "yes",
    }
    return VQAExample(**values | changes)


def uniter() -> tuple[UniterCollate, nn.Module]:
    examples = [example(number) for number in range(4)]
    collate = UniterCollate(build_tokenizer(TEXTS), frequent_answers(examples))
    torch.manual_seed(0)
    config = UniterConfig.tiny(vocab_size=collate.vocab_size, img_dim=FEATURES, initializer_range=0.2)
    return collate, UniterForVQA(config, num_answers=2)


def lxmert() -> tuple[LxmertCollate, nn.Module]:
    tokenizer = build_tokenizer(TEXTS)
    collate = LxmertCollate(Sentences(tokenizer), AnswerTable(("yes", "no")))
    torch.manual_seed(0)
    config = LxmertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=FEATURES,
        num_qa_labels=2,
        initializer_range=0.2,
    )
    return collate, LxmertForVQA(config)


MODELS = {"uniter": uniter, "lxmert": lxmert}


@pytest.mark.parametrize("name", MODELS)
def test_an_example_is_answered_alone_as_in_a_batch(name: str) -> None:
    collate, model = MODELS[name]()
    examples = [example(number) for number in range(4)]
    model.double().eval()

    def logits(rows: list[VQAExample]) -> Tensor:
        batch = {k: v.double() if v.is_floating_point() else v for k, v in collate(rows).items()}
        found: Tensor = model(**batch).logits
        return found

    together = logits(examples)
    for number, one in enumerate(examples):
        torch.testing.assert_close(logits([one])[0], together[number], rtol=1e-9, atol=1e-12)
    assert (together - together[0]).abs().amax(1)[1:].min() > 1e-6  # they differ from each other


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_villa_takes_its_batches(name: str) -> None:
    collate, model = MODELS[name]()
    batch = next(iter(DataLoader([example(n) for n in range(4)], batch_size=4, collate_fn=collate)))  # type: ignore[arg-type]
    assert batch["targets"].tolist() == [pytest.approx([1.0, 0.0]), pytest.approx([0.9, 0.3])] * 2
    report = villa(step_sizes={"text": 0.1, "image": 0.1}).step(adapt(model), batch)
    assert all((norms > 0).all() for norms in report.delta_norms.values())


def test_uniters_boxes_have_their_sizes_and_area() -> None:
    collate, _ = uniter()
    one = example(features=torch.ones(1, FEATURES), boxes=[[64, 48, 320, 240]], size=(640, 480))
    torch.testing.assert_close(collate([one])["img_pos_feat"], torch.tensor([[[0.1, 0.1, 0.5, 0.5, 0.4, 0.4, 0.16]]]))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, np.ndarray.tolist], ids=["numpy", "tensors", "lists"])
def test_arrays_of_any_kind_in_pixels_or_parts_give_the_same(kind: Any) -> None:
    features, boxes = np.random.default_rng(0).random((3, FEATURES)), corners(3).numpy()
    parts = VQAExample("what ?", features, boxes)  # type: ignore[arg-type]
    pixels = VQAExample("what ?", kind(features), kind(boxes * np.array([640, 480] * 2)), size=(640, 480))
    torch.testing.assert_close(pixels.boxes, parts.boxes)
    torch.testing.assert_close(pixels.features, torch.from_numpy(features).float())


def test_ten_peoples_answers_score_as_in_vqa() -> None:
    given = ["yes"] * 5 + ["no"] * 3 + ["maybe", "dark"]
    assert example(answers=given).scores == {"yes": 1.0, "no": 0.9, "maybe": 0.3, "dark": 0.3}


def test_the_table_has_frequent_answers_first_and_leaves_rare_ones_out() -> None:
    examples = [example(answers=answer) for answer in ("no", "b", "a", "no", "yes", "yes", "no")]
    assert frequent_answers(examples).answers == ("no", "yes", "a", "b")
    table = frequent_answers(examples, least=2)
    assert table.answers == ("no", "yes")
    with pytest.raises(DataError, match="an answer of the table's 2, got 'b'"):
        UniterCollate(build_tokenizer(TEXTS), table)(examples)
    found = UniterCollate(build_tokenizer(TEXTS), table, unknown="leave out")(examples)["targets"]
    assert found.sum(1).tolist() == [1, 0, 0, 1, 1, 1, 1]


def test_a_long_text_is_cut_and_a_tokeniser_with_other_numbers_keeps_them() -> None:
    tokenizer = build_tokenizer(TEXTS)
    collate = UniterCollate(tokenizer, AnswerTable(("yes",)), length=4)
    ids = collate([example(2, answers=None)])["input_ids"]
    assert tokenizer.decode(ids[0].tolist(), skip_special_tokens=False).split() == ["[CLS]", "where", "is", "[SEP]"]
    with pytest.raises(ConfigurationError, match="a length of 3 tokens or more"):
        UniterCollate(tokenizer, AnswerTable(("yes",)), length=2)


def test_without_answers_there_are_no_targets_and_with_some_none_is_refused() -> None:
    collate, _ = uniter()
    assert "targets" not in collate([example(answers=None)])
    with pytest.raises(DataError, match="to all questions of a batch or to none, got 1 of 2"):
        collate([example(), example(answers=None)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"text": b"what"}, "a question as a text, got bytes", id="bytes"),
        pytest.param(
            {"features": torch.ones(FEATURES)}, r"features \(R, F\).*got \(6,\)", id="one region without its axis"
        ),
        pytest.param({"features": torch.ones(0, FEATURES), "boxes": torch.ones(0, 4)}, "one region or more", id="none"),
        pytest.param({"features": torch.ones(2, FEATURES)}, r"got \(2, 6\) and \(1, 4\)", id="fewer boxes"),
        pytest.param({"features": torch.full((1, FEATURES), torch.nan)}, "finite features", id="not a number"),
        pytest.param({"features": "abc"}, "features as an array of numbers, got str", id="a text"),
        pytest.param(
            {"boxes": [[0, 0, 320, 240]]}, r"give size=\(width, height\) for pixels", id="pixels without size"
        ),
        pytest.param(
            {"boxes": [[0.5, 0, 0.2, 1]]},
            "x1 <= x2 and y1 <= y2, got .0.5, .*; give corners",
            id="corners the wrong way",
        ),
        pytest.param({"boxes": [[0, 0, 800, 10]], "size": (640, 480)}, "inside the image", id="outside"),
        pytest.param(
            {"boxes": [[0, 0, 0.5, 1]], "size": (640, 480)},
            r"got all in \[0, 1\] .*; leave size out",
            id="parts with size",
        ),
        pytest.param({"size": 640}, r"expected size as \(width, height\) in pixels, got 640", id="one size"),
        pytest.param({"size": (640, 0)}, r"expected size as \(width, height\) in pixels", id="no height"),
    ],
)
def test_what_is_no_example_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        example(**changes)


def test_answers_that_are_neither_one_nor_ten_nor_scores_are_refused() -> None:
    with pytest.raises(DataError, match="one answer, ten people's, or scores by answer, got 2 answers"):
        frequent_answers([example(answers=["yes", "no"])])


def test_the_example_is_of_20_lines_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    source = EXAMPLE.read_text()
    after = ast.parse(source).body[0].end_lineno
    assert len([line for line in source.splitlines()[after:] if line.strip()]) <= 20
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert capsys.readouterr().out.count("StepReport(loss=") == 2


@pytest.mark.parametrize("name", MODELS)
def test_features_of_different_widths_and_answers_that_are_no_table_are_refused(name: str) -> None:
    collate, _ = MODELS[name]()
    with pytest.raises(DataError, match=r"features of one width in a batch, got widths \[6, 7\]"):
        collate([example(), example(features=torch.ones(1, FEATURES + 1))])
    with pytest.raises(
        ConfigurationError, match=r"answers as an AnswerTable, got \['yes'\]; make one by frequent_answers"
    ):
        replace(collate, answers=["yes"])
