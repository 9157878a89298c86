"""Options of a training on databases: the model, the databases, and pre-training's mixture of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import Any, Final, Literal

from advvl.checks import at_least, check_each, choice, flag, fraction, instance, is_whole, not_negative, positive
from advvl.data.uniter.image_db import RegionLimits
from advvl.errors import ConfigurationError
from advvl.tasks.uniter.nlvr2 import Variant
from advvl.tasks.uniter.referring import RegionLoss

Size = Literal["base", "large"]

MIXED: Final = ("mlm", "itm", "mrfr", "mrc", "mrc-kl")
"""The tasks of pre-training, in the order in which they are mixed."""

PERTURBED: Final = ("mlm", "itm")
"""The tasks of these that are perturbed; regions are learnt the plain way (Gan et al., NeurIPS 2020, §3.2)."""

SIZES: Final = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "img_dim",
    "img_label_dim",
)
"""The sizes of a `UniterConfig` that options may replace."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A UNITER and its task's head.

    Arguments:
        size: base, 12 layers of width 768, or large, 24 of 1024.
        config: JSON file of sizes, as UNITER's `config/uniter-base.json`, in the place of `size`.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: in the place of those of the size.
        vocab_size: words of pre-training; None: BERT-cased's 28996.
        img_dim, img_label_dim: features of a region and classes of regions; None: 2048 and 1601.
        dropout: probability of dropping a hidden state or an attention weight.
        ot_weight: of word-region alignment in image-text matching; 0: none.
        answers: number of answers, of VQA.
        variant: head of NLVR2.
        head_layers: of the head of referring expressions, 1 or 2.
        loss: of referring expressions: a softmax over regions, or a margin.
        margin: of retrieval, and of the loss "rank".
    """

    size: Size = "base"
    config: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    img_dim: int | None = None
    img_label_dim: int | None = None
    dropout: float = 0.1
    ot_weight: float = 0.1
    answers: int = 3129
    variant: Variant = "paired-attn"
    head_layers: int = 1
    loss: RegionLoss = "cls"
    margin: float = 0.2

    def __post_init__(self) -> None:
        choice(self, "size", Size)
        choice(self, "variant", Variant)
        choice(self, "loss", RegionLoss)
        instance((str, NoneType), self, "config")
        check_each(self, SIZES, lambda value: value is None or (is_whole(value) and value >= 1), "1 or more, or None")
        fraction(self, "dropout")
        not_negative(self, "ot_weight")
        at_least(1, self, "answers", "head_layers")
        positive(self, "margin")


@dataclass(frozen=True, kw_only=True)
class DatabaseOptions:
    """UNITER's databases, by their folders under the data directory.

    Arguments:
        train_texts, val_texts: databases of texts.
        train_images, val_images: the database of images of each of them.
        train_drawn, val_drawn: of VCR, the database of the boxes that people drew, of each of them; own data have none.
        conf_th, max_bb, min_bb: regions of an image: those that the detector was surer of than conf_th, but at most max_bb
            and at least min_bb.
        num_bb: the fixed number in the name of the databases of images, in the place of the other three.
        drawn_bb: the same, of VCR's boxes that people drew.
        detected: of referring expressions, the regions of val_images were detected, and not drawn by people.
        max_text: word pieces of a training text; a longer one is left out; None: none is.
        answers: JSON file of answers in words and their numbers, which predictions of VQA need.
        skip_bad: read every example once before training, and leave out those that cannot be used.
    """

    train_texts: tuple[str, ...] = ()
    train_images: tuple[str, ...] = ()
    train_drawn: tuple[str, ...] = ()
    val_texts: tuple[str, ...] = ()
    val_images: tuple[str, ...] = ()
    val_drawn: tuple[str, ...] = ()
    conf_th: float = 0.2
    max_bb: int = 100
    min_bb: int = 10
    num_bb: int | None = None
    drawn_bb: int = 100
    detected: bool = False
    max_text: int | None = 60
    answers: str | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        names = [f"{part}_{kind}" for part in ("train", "val") for kind in ("texts", "images", "drawn")]
        check_each(self, names, are_names, "a list of folders")
        for part in ("train", "val"):
            texts, images, drawn = (getattr(self, f"{part}_{kind}") for kind in ("texts", "images", "drawn"))
            if len(images) != len(texts) or (drawn and len(drawn) != len(texts)):
                raise ConfigurationError(
                    f"expected a database of images for each of {len(texts)} {part}_texts, got {len(images)} and "
                    f"{len(drawn)} of drawn boxes; name the same one twice if need be"
                )
        _ = self.limits
        at_least(1, self, "drawn_bb", *(() if self.max_text is None else ("max_text",)))
        instance((str, NoneType), self, "answers")
        flag(self, "detected", "skip_bad")

    @property
    def limits(self) -> RegionLimits:
        """The number of regions of an image."""
        return RegionLimits(conf_th=self.conf_th, max_bb=self.max_bb, min_bb=self.min_bb, num_bb=self.num_bb)


@dataclass(frozen=True, kw_only=True)
class MixtureOptions:
    """Pre-training's tasks, by how often each is drawn for the updates of a corpus.

    Arguments:
        corpora: the name of each database's corpus, in the order of train_texts; none: one corpus.
        mlm, itm, mrfr, mrc, mrc_kl: of each corpus, in the order of their first databases; 0: not that task.
    """

    corpora: tuple[str, ...] = ()
    mlm: tuple[int, ...] = ()
    itm: tuple[int, ...] = ()
    mrfr: tuple[int, ...] = ()
    mrc: tuple[int, ...] = ()
    mrc_kl: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_each(self, ("corpora",), are_names, "a list of names")
        count = max(len(set(self.corpora)), 1)
        for task in MIXED:
            ratios = self.ratios(task)
            whole = all(is_whole(ratio) and ratio >= 0 for ratio in ratios)
            if ratios and (len(ratios) != count or not whole):
                raise ConfigurationError(
                    f"expected whole numbers of 0 or more as {task}, one for each of {count} corpora, got {list(ratios)}"
                )

    def ratios(self, task: str) -> tuple[int, ...]:
        """The ratios of a task, one for each corpus; none: the task is not among them."""
        found: tuple[int, ...] = getattr(self, task.replace("-", "_"))
        return found

    def named(self, databases: int) -> dict[str, list[int]]:
        """The places of each corpus's databases.

        Raises:
            ConfigurationError: another number of names than databases.
        """
        names = self.corpora or ("corpus",) * databases
        if len(names) != databases:
            raise ConfigurationError(f"expected a corpus for each of {databases} train_texts, got {len(names)}")
        found: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            found.setdefault(name, []).append(place)
        return found


def are_names(value: Any) -> bool:
    """Return True for a list of texts that are not empty."""
    return isinstance(value, tuple | list) and all(isinstance(name, str) and name for name in value)
