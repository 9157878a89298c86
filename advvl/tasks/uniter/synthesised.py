"""Hard negatives for image-text matching: texts with replaced words, and images similar to the true one.

Part of a reconstruction of ViLTA (Wang et al., ICCV 2023) from its abstract: "leverage the current language encoder to
synthesize hard negatives based on the context of language input". Each choice that it leaves open is an option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from advvl.checks import at_least, check_each, check_functions, is_number, shown
from advvl.data.masking import IGNORED, choose, mismatch
from advvl.data.row_draws import RowDraws
from advvl.data.uniter.batching import Images, join
from advvl.data.uniter.sources import CaptionSource
from advvl.data.wordpiece import MASK
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


def content_words(vocabulary: Iterable[str]) -> Tensor:
    """Return the mask of the content words of a vocabulary, `(V,)` bool: whole words except function words.

    Arguments:
        vocabulary: the tokens in the order of their ids, special ones first.
    """
    return torch.tensor([token.isalnum() and token not in FUNCTION_WORDS for token in vocabulary])


def nearest_images(images: Images, count: int = 8) -> Tensor:
    """Return the `count` images nearest to each, `(M, count)`, by the cosine of their regions' mean features.

    Copies of an image, whose cosine is 1, are left out, because they match its text.

    Raises:
        DataError: no more than `count` images, or of one so many copies that fewer are left.
    """
    if len(images.lengths) <= count:
        raise DataError(
            f"expected more than {count} images to choose the nearest {count} from, got {len(images.lengths)}"
        )
    means = F.normalize(images.features.sum(1) / images.lengths[:, None], dim=1)
    nearest = []
    for start in range(0, len(means), 1024):
        block = means[start : start + 1024] @ means.T
        block[torch.arange(len(block)), start + torch.arange(len(block))] = -torch.inf
        best = block.masked_fill_(block > 1 - _ROUNDING, -torch.inf).topk(count)
        others = best.values.isfinite().sum(1)
        if bool((others < count).any()):
            first = int((others < count).nonzero()[0, 0])
            raise DataError(
                f"expected at least {count} other images for each, got {int(others[first])} for image {start + first}, as "
                "the rest are copies; ask for fewer"
            )
        nearest.append(best.indices)
    return torch.cat(nearest)


@dataclass(frozen=True, eq=False)
class HardNegatives:
    """Mismatches of image-text matching, for a `CaptionSource`: a share of hard ones, the others images drawn from all.

    One share of the mismatches shows an image similar to the true one. Another share shows the true image and replaces
    content words of the text: they are masked, scored by `encoder`, and drawn from its top k. The original word is
    never drawn, nor a synonym, which is a word with a probability above `threshold` under `teacher`. If nothing can be
    replaced, the mismatch is an image drawn from all.

    Arguments:
        encoder: the current language encoder, such as `TextAlone(model)` with the model in training.
        content: the words that may be replaced and may replace others, `(V,)` bool, as from `content_words`.
        teacher: as `encoder`; None: the encoder itself.
        synthesised, similar: the shares of mismatches, together at most 1.
        words: the share of a text's content words that are replaced, at least one.
        top_k: replacements to draw from, by their probability.
        threshold: of the teacher's probability, above which a word counts as a synonym.
        nearest: images like each one, `(M, n)`, as of `nearest_images`; needed for a share of similar ones.

    It runs the model in training, so `fit` needs `workers=0` for its source. Equal draws and weights give equal
    batches.

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
    words: float = 0.2
    top_k: int = 20
    threshold: float = 0.1
    nearest: Tensor | None = None

    def __post_init__(self) -> None:
        check_functions(encoder=self.encoder, teacher=self.teacher)
        check_mismatches(self, "synthesised", "similar", "words", "threshold")
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
        if not isinstance(self.content, Tensor) or self.content.dtype != torch.bool or self.content.ndim != 1:
            raise ConfigurationError(f"expected content as a bool for each word (V,), got {shown(self.content)}")

    def __call__(self, source: CaptionSource, rows: Tensor, draws: RowDraws) -> dict[str, Any]:
        """Make a batch of pairs and their `targets`: 1 for a match, 0 for a mismatch, half of them each.

        Raises:
            ConfigurationError: it is made by a worker process, which has no model that trains.
            ShapeError: nearest images of another source.
        """
        if get_worker_info() is not None:
            raise ConfigurationError("expected the process that trains to make batches, got a worker; give workers=0")
        own = source.image_rows[rows]
        images, targets = mismatch(own, len(source.images.lengths), draws=draws)
        kind = draws.uniform("kind", 1)[:, 0].masked_fill(targets == 1, 1.0)
        if self.nearest is not None and self.similar:
            count = len(source.images.lengths)
            if len(self.nearest) != count or int(self.nearest.max()) >= count or int(self.nearest.min()) < 0:
                raise ShapeError(
                    f"expected nearest images of the source's {count}, got {len(self.nearest)} rows of numbers up to "
                    f"{int(self.nearest.max())}; make them by nearest_images(source.images)"
                )
            near = self.nearest[own]
            drawn = (draws.uniform("similar", 1) * near.shape[1]).long()
            images = torch.where(kind >= 1 - self.similar, near.gather(1, drawn)[:, 0], images)
            images = torch.where(targets == 1, own, images)
        batch = join(source.texts, rows, source.images, images)
        ids, changed = self._replaced(batch["input_ids"], batch["txt_lens"], kind < self.synthesised, draws)
        batch = join(source.texts, rows, source.images, torch.where(changed, own, images))
        return {**batch, "input_ids": ids, "targets": targets}

    def _replaced(self, ids: Tensor, lengths: Tensor, wanted: Tensor, draws: RowDraws) -> tuple[Tensor, Tensor]:
        """The texts `(B, L)` with words of the `wanted` ones `(B,)` replaced, and which of them changed."""
        allowed = self.content[ids]
        wanted = wanted & allowed.any(1)
        if not bool(wanted.any()):
            return ids, wanted
        draws = RowDraws(draws.keys[wanted.numpy()])
        texts = ids[wanted]
        chosen = choose(allowed[wanted], probability=self.words, draws=draws)
        asked = {
            "input_ids": texts.masked_fill(chosen, MASK),
            "txt_lens": lengths[wanted],
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


def _drawn(logits: Tensor, top_k: int, uniform: Tensor) -> Tensor:
    """A word for each row of logits `(N, V)` by a number in [0, 1), from its top k that are finite; -1 where none is."""
    best = logits.topk(min(top_k, logits.shape[1]), dim=1)
    finite = best.values.isfinite().sum(1)
    shares = torch.where(finite[:, None] > 0, best.values, 0.0).softmax(1).double().cumsum(1)
    place = (shares <= uniform[:, None]).sum(1).minimum((finite - 1).clamp(min=0))
    return torch.where(finite > 0, best.indices.gather(1, place[:, None])[:, 0], -1)


def check_mismatches(options: Any, *shares: str) -> None:
    """Check that the named options are shares in [0, 1], and that those of synthesised and similar ones are at most 1.

    Raises:
        ConfigurationError: they are not.
    """
    check_each(options, shares, _is_share, "a share in [0, 1]")
    if options.synthesised + options.similar > 1:
        raise ConfigurationError(
            f"expected shares of at most 1 together, got synthesised={options.synthesised} and similar={options.similar}"
        )


def _are_rows(nearest: Any) -> bool:
    return isinstance(nearest, Tensor) and nearest.dtype == torch.long and nearest.ndim == 2 and nearest.shape[1] > 0


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1
