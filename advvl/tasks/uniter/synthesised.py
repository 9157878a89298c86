"""Hard negatives for image-text matching: texts with replaced words, and images similar to the true one.

Part of a reconstruction of ViLTA (Wang et al., ICCV 2023) from its abstract: "leverage the current language encoder to
synthesize hard negatives based on the context of language input". Each choice that it leaves open is an option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from advvl.checks import at_least, check_each, check_functions, is_number, shown
from advvl.data.masking import IGNORED, choose
from advvl.data.row_draws import RowDraws
from advvl.data.uniter.batching import Images, Texts, joined
from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.runtime.states import kept_modes

FUNCTION_WORDS: Final = frozenset(
    "a an the and or but nor so of in on at by to from with without for as into onto over under between near than then is "  # noqa: SIM905
    "are was were be been being am do does did has have had it its this that these those there here he she they them his "
    "her their we you i me my your our us who which what not no".split()
)
"""Function words: a text that differs only in one of them may still match."""

_ROUNDING: Final = 1e-5  # of the cosine of two copies in fp32

WordModel = Callable[..., Any]
"""Scores words as `BertTeacher` and `TextAlone` do: from input_ids, txt_lens and txt_labels to an output with logits."""


class Captions(Protocol):
    """Captions and numbered images: a `CaptionSource`, or a `PretrainingSource` of databases or people's own records."""

    @property
    def mask_id(self) -> int:
        """The id of [MASK]."""

    @property
    def image_pools(self) -> Tensor:
        """The number of each image's pool, `(M,)`; a mismatch is drawn from the pool of the true image."""

    def read_texts(self, rows: Tensor, /) -> Texts:
        """Return the captions of rows `(B,)`."""

    def read_images(self, numbers: Tensor, /) -> Images:
        """Return the images of numbers `(B,)`."""

    def mismatches(self, rows: Tensor, draws: RowDraws, /) -> tuple[Tensor, Tensor, Tensor]:
        """Return the numbers of the rows' own images and of those to show, and 1 for a match, `(B,)` each."""


def content_words(vocabulary: Iterable[str]) -> Tensor:
    """Return the mask of the content words of a vocabulary, `(V,)` bool: whole words except function words.

    Arguments:
        vocabulary: the tokens in the order of their ids, special ones first.
    """
    return torch.tensor([token.isalnum() and token.lower() not in FUNCTION_WORDS for token in vocabulary])


def word_endings(vocabulary: Iterable[str]) -> Tensor:
    """Return the mask of the word pieces that continue a word, as in "##s", `(V,)` bool.

    Arguments:
        vocabulary: the tokens in the order of their ids.
    """
    return torch.tensor([token.startswith("##") for token in vocabulary])


def nearest_images(images: Images | Captions, count: int = 8) -> Tensor:
    """Return the `count` images nearest to each, `(M, count)`, by the cosine of their regions' mean features.

    Those of a source are chosen from the image's own pool; each image is read once. Copies of an image, whose cosine is
    1, are left out, because they match its text.

    Raises:
        DataError: no more than `count` images, or of one so many copies, or a pool so small, that fewer are left.
    """
    total = len(images.lengths if isinstance(images, Images) else images.image_pools)
    if total <= count:
        raise DataError(f"expected more than {count} images to choose the nearest {count} from, got {total}")
    if isinstance(images, Images):
        means, pools = _means(images), torch.zeros(total)
    else:
        means = torch.cat([_means(images.read_images(numbers)) for numbers in torch.split(torch.arange(total), 256)])
        pools = images.image_pools
    nearest = []
    for start in range(0, total, 1024):
        block = means[start : start + 1024] @ means.T
        block[pools[start : start + 1024, None] != pools] = -torch.inf
        block[torch.arange(len(block)), start + torch.arange(len(block))] = -torch.inf
        best = block.masked_fill_(block > 1 - _ROUNDING, -torch.inf).topk(count)
        others = best.values.isfinite().sum(1)
        if bool((others < count).any()):
            first = int((others < count).nonzero()[0, 0])
            raise DataError(
                f"expected at least {count} other images for each, got {int(others[first])} for image {start + first}, as "
                "the rest are copies or of other shards; ask for fewer"
            )
        nearest.append(best.indices)
    return torch.cat(nearest)


def _means(images: Images) -> Tensor:
    """The mean features of each image, `(M, F)`, of length 1."""
    return F.normalize(images.features.sum(1) / images.lengths[:, None], dim=1)


@dataclass(frozen=True, eq=False)
class HardNegatives:
    """Mismatches of image-text matching, for a source of captions: a share of hard ones, the others images drawn from all.

    One share of the mismatches shows an image similar to the true one, another the image of another row of the batch. A
    third share shows the true image and replaces content words of the text: they are masked, scored by `encoder`, and
    drawn from its top k. The original word is never drawn, nor a synonym, which is a word with a probability above
    `threshold` under `teacher`. If nothing can be replaced, the mismatch is an image drawn from all.

    Arguments:
        encoder: the current language encoder, such as `TextAlone(model)` with the model in training.
        content: the words that may be replaced and may replace others, `(V,)` bool, as from `content_words`.
        teacher: as `encoder`; None: the encoder itself.
        synthesised, similar, in_batch: the shares of mismatches, together at most 1.
        words: the share of a text's content words that are replaced, at least one.
        top_k: replacements to draw from, by their probability.
        threshold: of the teacher's probability, above which a word counts as a synonym.
        nearest: images like each one, `(M, n)`, as of `nearest_images`; needed for a share of similar ones.
        endings: the word pieces that continue a word, `(V,)` bool, as from `word_endings`: a word of several pieces is left
            as it is. None: every token is a whole word.

    It runs the model in training, so `fit` needs `workers=0` for its source. Equal draws and weights give equal
    batches. With `in_batch` a mismatch depends on the other rows of its batch, so runs on other numbers of processes
    differ; a batch without another image to show keeps the image drawn from all.

    Raises:
        ConfigurationError: a share outside [0, 1], two of more than 1 together, a top_k below 1, another type.
        ShapeError: in a batch, an encoder or teacher of another vocabulary.
    """

    encoder: WordModel
    content: Tensor
    _: KW_ONLY
    teacher: WordModel | None = None
    synthesised: float = 0.5
    similar: float = 0.0
    in_batch: float = 0.0
    words: float = 0.2
    top_k: int = 20
    threshold: float = 0.1
    nearest: Tensor | None = None
    endings: Tensor | None = None

    def __post_init__(self) -> None:
        check_functions(encoder=self.encoder, teacher=self.teacher)
        check_mismatches(self, "synthesised", "similar", "in_batch")
        check_shares(self, "words", "threshold")
        at_least(1, self, "top_k")
        if self.nearest is not None and not _are_rows(self.nearest):
            raise ConfigurationError(
                f"expected nearest as numbers of images, a whole number for each, (M, n), got {shown(self.nearest)}; see "
                "nearest_images"
            )
        if self.similar and self.nearest is None:
            raise ConfigurationError(
                "expected nearest images for a share of similar ones, got None; see nearest_images"
            )
        for name, words in {"content": self.content, "endings": self.endings}.items():
            if not _are_words(words) and not (words is None and name == "endings"):
                raise ConfigurationError(f"expected {name} as a bool for each word (V,), got {shown(words)}")
        if self.endings is not None and len(self.endings) != len(self.content):
            raise ConfigurationError(
                f"expected endings of {len(self.content)} words as of content, got {len(self.endings)}; make both of one "
                "vocabulary"
            )

    def __call__(self, source: Captions, rows: Tensor, draws: RowDraws) -> dict[str, Any]:
        """Make a batch of pairs and their `targets`: 1 for a match, 0 for a mismatch; the source says how many of each.

        Raises:
            ConfigurationError: it is made by a worker process, which has no model that trains.
            ShapeError: nearest images of another source.
        """
        if get_worker_info() is not None:
            raise ConfigurationError("expected the process that trains to make batches, got a worker; give workers=0")
        own, images, targets = source.mismatches(rows, draws)
        kind = draws.uniform("kind", 1)[:, 0].masked_fill(targets == 1, 1.0)
        if self.nearest is not None and self.similar:
            count = len(source.image_pools)
            if len(self.nearest) != count or int(self.nearest.max()) >= count or int(self.nearest.min()) < 0:
                raise ShapeError(
                    f"expected nearest images of the source's {count}, got {len(self.nearest)} rows of numbers up to "
                    f"{int(self.nearest.max())}; make them by nearest_images(source)"
                )
            near = self.nearest[own]
            drawn = (draws.uniform("similar", 1) * near.shape[1]).long()
            images = torch.where(kind >= 1 - self.similar, near.gather(1, drawn)[:, 0], images)
        beside = (kind >= self.synthesised) & (kind < self.synthesised + self.in_batch)
        images = torch.where(beside, _beside(own, images, source.image_pools[own], draws), images)
        images = torch.where(targets == 1, own, images)
        texts = source.read_texts(rows)
        ids, changed = self._replaced(texts, kind < self.synthesised, source.mask_id, draws)
        shown = source.read_images(torch.where(changed, own, images))
        return {**joined(Texts(ids, texts.lengths), shown), "targets": targets}

    def _replaced(self, given: Texts, wanted: Tensor, mask: int, draws: RowDraws) -> tuple[Tensor, Tensor]:
        """The ids `(B, L)` of texts with words of the `wanted` ones `(B,)` replaced, and which of them changed."""
        ids = given.ids
        allowed = self.content[ids]
        if self.endings is not None:
            allowed[:, :-1] &= ~self.endings[ids[:, 1:]]
        wanted = wanted & allowed.any(1)
        if not bool(wanted.any()):
            return ids, wanted
        draws = RowDraws(draws.keys[wanted.numpy()])
        texts = ids[wanted]
        chosen = choose(allowed[wanted], probability=self.words, draws=draws)
        asked = {
            "input_ids": texts.masked_fill(chosen, mask),
            "txt_lens": given.lengths[wanted],
            "txt_labels": torch.where(chosen, texts, IGNORED),
        }
        logits = self._scores(self.encoder, asked)
        likely = logits if self.teacher is None else self._scores(self.teacher, asked)
        barred = ~self.content | (likely.softmax(1) > self.threshold)
        barred.scatter_(1, texts[chosen][:, None], True)
        words = _drawn(logits.masked_fill(barred, -torch.inf), self.top_k, draws.uniform("word", ids.shape[1])[chosen])
        edited = texts.masked_scatter(chosen, torch.where(words < 0, texts[chosen], words))
        changed = wanted.masked_scatter(wanted, (edited != texts).any(1))
        return ids.masked_scatter(wanted[:, None], edited), changed

    def _scores(self, model: WordModel, asked: Mapping[str, Tensor]) -> Tensor:
        """The model's logits of the masked words, `(N, V)` on the CPU, with the model in eval mode and left as it was."""
        module = model if isinstance(model, nn.Module) else nn.Module()
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        with torch.no_grad(), kept_modes(module):
            module.eval()
            logits: Tensor = model(**{name: value.to(device) for name, value in asked.items()}).logits.float().cpu()
        if logits.shape[-1] != len(self.content):
            raise ShapeError(
                f"expected scores of {len(self.content)} words, got {logits.shape[-1]}; take one of that vocabulary"
            )
        return logits


def _beside(own: Tensor, images: Tensor, pools: Tensor, draws: RowDraws) -> Tensor:
    """The image of another row of the same pool for each row, `(B,)`, each equally likely; `images` where there is none."""
    others = (own != own[:, None]) & (pools == pools[:, None])
    place = (draws.uniform("beside", 1)[:, 0] * others.sum(1)).long()
    chosen = (others & (others.cumsum(1) == place[:, None] + 1)).long()
    return torch.where(others.any(1), own[chosen.argmax(1)], images)


def _drawn(logits: Tensor, top_k: int, uniform: Tensor) -> Tensor:
    """A word for each row of logits `(N, V)` by a number in [0, 1), from its top k that are finite; -1 where none is."""
    best = logits.topk(min(top_k, logits.shape[1]), dim=1)
    finite = best.values.isfinite().sum(1)
    shares = torch.where(finite[:, None] > 0, best.values, 0.0).softmax(1).double().cumsum(1)
    place = (shares <= uniform[:, None]).sum(1).minimum((finite - 1).clamp(min=0))
    return torch.where(finite > 0, best.indices.gather(1, place[:, None])[:, 0], -1)


def check_shares(options: object, *names: str) -> None:
    """Raise ConfigurationError unless the named options are shares in [0, 1]."""
    check_each(options, names, _is_share, "a share in [0, 1]")


def check_mismatches(options: object, *kinds: str) -> None:
    """Raise ConfigurationError unless the named options are shares in [0, 1], and at most 1 together."""
    check_shares(options, *kinds)
    shares = {kind: getattr(options, kind) for kind in kinds}
    if math.fsum(shares.values()) > 1:
        given = ", ".join(f"{kind}={share}" for kind, share in shares.items())
        raise ConfigurationError(f"expected shares of at most 1 together, got {given}; lower one of them")


def _are_words(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 1


def _are_rows(nearest: Any) -> bool:
    return isinstance(nearest, Tensor) and nearest.dtype == torch.long and nearest.ndim == 2 and nearest.shape[1] > 0


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1
