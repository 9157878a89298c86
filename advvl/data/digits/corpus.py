"""The demo's corpus: questions and captions about real handwriting, made from a seed and the same everywhere.

Training, validation and test scenes show images that no other part shows; captions show the training images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from advvl.checks import check_each, is_choice
from advvl.data.digits.answers import ANSWERS, certain_target
from advvl.data.digits.captions import KINDS, Caption, describe
from advvl.data.digits.draws import stream
from advvl.data.digits.questions import ALWAYS_ASKABLE, DEFAULT_FAMILIES, FAMILIES, Question, ask
from advvl.data.digits.scans import CLASSES, GREY_LEVELS, PIXELS, DigitImages, load_digit_images, split_images
from advvl.data.digits.scenes import BOX_DIM, MOST, Scene, box, draw_scene, images_by_digit
from advvl.data.digits.sources import CaptionSource, QuestionSource
from advvl.data.targets import soft_targets
from advvl.data.uniter.batching import Images, pad_texts
from advvl.data.uniter.corruption import Task
from advvl.data.uniter.sources import DEFAULT_TASKS, check_share, check_tasks
from advvl.data.wordpiece import build_tokenizer, replacement_range, token_ids
from advvl.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """The size of the corpus, and the seed that it is made from.

    Arguments:
        train_images, validation_images: scans for these parts; the rest of the 1,797 is for test.
        train_questions, validation_questions, test_questions, captions, validation_captions: the examples of each part.
        questions_per_scene: at most as many as there are families that every scene answers.
        captions_per_scene: 1..3.
        families: of questions.
        tasks: of pre-training; one named twice is drawn twice as often.
        word_mask: the share of words that masked language modelling hides: twice the usual, because in captions this
            short and alike the usual share seldom hides a digit's name.

    Raises:
        ConfigurationError: a value makes no sense.
    """

    seed: int = 0
    train_images: int = 300
    validation_images: int = 400
    train_questions: int = 4000
    validation_questions: int = 1000
    test_questions: int = 2000
    captions: int = 4000
    validation_captions: int = 500
    questions_per_scene: int = 4
    captions_per_scene: int = 2
    families: tuple[str, ...] = DEFAULT_FAMILIES
    tasks: tuple[Task, ...] = DEFAULT_TASKS
    word_mask: float = 0.3

    def __post_init__(self) -> None:
        lowest = {"seed": 0, "train_images": CLASSES, "validation_images": CLASSES}
        check_each(self, ("families",), _are_families, f"one or more of {', '.join(FAMILIES)}, each once")
        always = len(set(self.families) & set(ALWAYS_ASKABLE))
        highest = {"questions_per_scene": always, "captions_per_scene": len(KINDS)}
        for name, value in asdict(self).items():
            if name in ("families", "tasks", "word_mask"):
                continue
            low, high = lowest.get(name, 1), highest.get(name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or value < low
                or (high is not None and value > high)
            ):
                bounds = f"in {low}..{high}" if high is not None else f"of {low} or more"
                raise ConfigurationError(f"expected a whole number {bounds} for {name}, got {value!r}")
        # Matching a caption needs a second scene to draw a wrong image from.
        for name in ("captions", "validation_captions"):
            if getattr(self, name) <= self.captions_per_scene:
                raise ConfigurationError(
                    f"expected {name} to be more than captions_per_scene={self.captions_per_scene}, so that there is "
                    f"a second scene, got {getattr(self, name)}"
                )
        check_tasks(self.tasks)
        check_share(self.word_mask)


def _are_families(value: Any) -> bool:
    known = isinstance(value, list | tuple) and all(is_choice(name, tuple(FAMILIES)) for name in value)
    return known and 0 < len(value) == len(set(value))


@dataclass(frozen=True, eq=False)
class DigitsCorpus:
    """Questions for training, validation and test, captions for pre-training, and what they share.

    `answers` is the vocabulary that the columns of `targets` stand for; `tokenizer` knows every word of the corpus.
    """

    train: QuestionSource
    validation: QuestionSource
    test: QuestionSource
    pretrain: CaptionSource
    pretrain_validation: CaptionSource
    tokenizer: Tokenizer
    answers: tuple[str, ...]
    feature_dim: int
    label_dim: int

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return int(self.tokenizer.get_vocab_size())

    @property
    def max_text_length(self) -> int:
        """The tokens of the longest text, [CLS] and [SEP] included."""
        return max(source.texts.ids.shape[1] for source in self._sources())

    @property
    def digest(self) -> str:
        """A SHA-256 of every scene, text, answer, token id and grey level: equal digests, equal corpora."""
        hashed = hashlib.sha256()
        for source in self._sources():
            items = source.questions if isinstance(source, QuestionSource) else source.captions
            levels = (source.images.features * GREY_LEVELS).int().tolist()
            record = [vars(scene) for scene in source.scenes], [vars(item) for item in items], levels
            hashed.update(json.dumps([*record, source.texts.ids.tolist()], sort_keys=True).encode())
        return hashed.hexdigest()

    def _sources(self) -> tuple[QuestionSource | CaptionSource, ...]:
        return self.train, self.validation, self.test, self.pretrain, self.pretrain_validation


def digits_corpus(config: DigitsConfig | None = None) -> DigitsCorpus:
    """Make the corpus, in a second or two.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    config = config or DigitsConfig()
    scans = load_digit_images()
    split = split_images(
        scans.classes, train=config.train_images, validation=config.validation_images, seed=config.seed
    )
    asked = {
        "train": (split.train, config.train_questions),
        "validation": (split.validation, config.validation_questions),
        "test": (split.test, config.test_questions),
    }
    captioned = {"train": (split.train, config.captions), "validation": (split.validation, config.validation_captions)}

    # Streams of their own for each part's scenes and texts: making one larger changes no other, nor its own beginning.
    questions: dict[str, tuple[list[Scene], list[Question]]] = {}
    captions: dict[str, tuple[list[Scene], list[Caption]]] = {}
    for key, (name, (images, count)) in enumerate(asked.items(), start=1):
        per_scene = config.questions_per_scene
        scenes = _scenes(stream(config.seed, key, 0), scans, images, -(-count // per_scene))
        questions[name] = (
            scenes,
            ask(stream(config.seed, key, 1), scenes, per_scene=per_scene, families=config.families)[:count],
        )
    for key, (name, (images, count)) in enumerate(captioned.items(), start=1 + len(asked)):
        per_scene = config.captions_per_scene
        scenes = _scenes(stream(config.seed, key, 0), scans, images, -(-count // per_scene))
        captions[name] = scenes, describe(stream(config.seed, key, 1), scenes, per_scene=per_scene)[:count]

    texts = [question.text for _, made in questions.values() for question in made]
    tokenizer = build_tokenizer(texts + [caption.text for _, made in captions.values() for caption in made])
    vqa = {name: _question_source(*made, scans, tokenizer) for name, made in questions.items()}
    pretraining = {name: _caption_source(*made, scans, tokenizer, config) for name, made in captions.items()}
    return DigitsCorpus(
        train=vqa["train"],
        validation=vqa["validation"],
        test=vqa["test"],
        pretrain=pretraining["train"],
        pretrain_validation=pretraining["validation"],
        tokenizer=tokenizer,
        answers=ANSWERS,
        feature_dim=PIXELS,
        label_dim=CLASSES + 1,
    )


def _question_source(
    scenes: list[Scene], questions: list[Question], scans: DigitImages, tokenizer: Tokenizer
) -> QuestionSource:
    return QuestionSource(
        scenes=scenes,
        questions=questions,
        texts=pad_texts(token_ids(tokenizer, (question.text for question in questions))),
        images=_regions(scenes, scans),
        image_rows=torch.tensor([question.scene for question in questions]),
        labels={"targets": soft_targets([certain_target(one.answer) for one in questions], len(ANSWERS))},
    )


def _caption_source(
    scenes: list[Scene], captions: list[Caption], scans: DigitImages, tokenizer: Tokenizer, config: DigitsConfig
) -> CaptionSource:
    return CaptionSource(
        scenes=scenes,
        captions=captions,
        texts=pad_texts(token_ids(tokenizer, (caption.text for caption in captions))),
        images=_regions(scenes, scans),
        image_rows=torch.tensor([caption.scene for caption in captions]),
        replacements=replacement_range(tokenizer),
        word_mask=config.word_mask,
        tasks=config.tasks,
    )


def _scenes(rng: np.random.Generator, scans: DigitImages, images: NDArray[np.int64], count: int) -> list[Scene]:
    pool = images_by_digit(images, scans.classes)
    return [draw_scene(rng, pool) for _ in range(count)]


def _regions(scenes: Sequence[Scene], scans: DigitImages) -> Images:
    """The regions of each scene in reading order; their digits are certain, and class 0 is the background."""
    features = torch.zeros(len(scenes), MOST, PIXELS)
    boxes = torch.zeros(len(scenes), MOST, BOX_DIM)
    labels = torch.zeros(len(scenes), MOST, CLASSES + 1)
    for row, scene in enumerate(scenes):
        count = len(scene)
        features[row, :count] = torch.from_numpy(scans.features[list(scene.images)])
        boxes[row, :count] = torch.tensor([box(cell) for cell in scene.cells])
        labels[row, range(count), [1 + digit for digit in scene.digits]] = 1.0
    return Images(features, boxes, torch.tensor([len(scene) for scene in scenes]), labels)
