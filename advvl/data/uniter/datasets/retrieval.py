"""Image-text retrieval: a match and mismatches of its text and of its image, drawn from the same database.

Source: the published code of Chen et al., "UNITER", ECCV 2020.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from advvl.checks import at_least, choice, flag
from advvl.data.row_draws import RowDraws
from advvl.data.source import checked_rows
from advvl.data.uniter.batching import collate, joined, pad_images, pad_texts
from advvl.data.uniter.datasets.examples import Examples, Shard, number_examples
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import word_pieces
from advvl.errors import DataError

Side = Literal["images", "texts"]
Pair = tuple[str, str]
"""A text's key and an image's name."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """The texts and images of shards, and draws of those that do not match.

    Arguments:
        shards: databases of captions and of images.
        skip_bad: read every example once, and leave out and list those that cannot be used.
        names: of each shard, its images.

    Raises:
        DataError: an example that cannot be used, unless it is skipped; see `number_examples`.
    """

    shards: Sequence[Shard]
    skip_bad: bool = False
    examples: Examples = field(init=False, repr=False)
    names: Sequence[Sequence[str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        flag(self, "skip_bad")
        found = number_examples(self.shards, self._length, self._item, skip_bad=self.skip_bad)
        object.__setattr__(self, "examples", found)
        images, places, matches = [], [], []
        for shard, keys in zip(self.shards, found.keys, strict=True):
            texts: dict[str, list[int]] = {}
            for place, key in enumerate(keys):
                texts.setdefault(shard.image(key), []).append(place)
            matches.append(texts)
            images.append(list(texts))
            places.append({name: place for place, name in enumerate(texts)})
        object.__setattr__(self, "names", images)
        object.__setattr__(self, "_places", places)
        object.__setattr__(self, "_matches", matches)

    def own(self, index: int) -> tuple[int, Pair]:
        """Return the shard's number, and the pair, of an example."""
        number, key = self.examples.at(index)
        return number, (key, self.shards[number].image(key))

    def other_images(self, number: int, pair: Pair, draws: Sequence[float]) -> list[str]:
        """Draw as many images of the shard that are not the pair's, none twice, as there are draws in [0, 1)."""
        pool = self.names[number]
        return [pool[place] for place in drawn(len(pool), [self._places[number][pair[1]]], draws)]  # type: ignore[attr-defined]

    def other_texts(self, number: int, pair: Pair, draws: Sequence[float]) -> list[str]:
        """Draw as many texts of the shard that are not of the pair's image, none twice, as there are draws in [0, 1)."""
        keys = self.examples.keys[number]
        return [keys[place] for place in drawn(len(keys), self._matches[number][pair[1]], draws)]  # type: ignore[attr-defined]

    def texts(self, number: int, keys: Sequence[str]) -> list[list[int]]:
        """Read texts, each between [CLS] and [SEP]."""
        shard = self.shards[number]
        return [shard.within_text(word_pieces(shard.texts[key])) for key in keys]

    def images(self, number: int, names: Sequence[str]) -> list[Regions]:
        """Read images, each once."""
        found = {name: self.shards[number].images.read(name) for name in dict.fromkeys(names)}
        return [found[name] for name in names]

    def _length(self, number: int, key: str) -> int:
        shard = self.shards[number]
        return shard.texts.lengths[key] + 2 + shard.regions(shard.image(key))

    def _item(self, number: int, key: str) -> tuple[list[int], Regions]:
        shard = self.shards[number]
        return shard.within_text(word_pieces(shard.texts[key])), shard.images.read(shard.image(key))


@dataclass(frozen=True, eq=False)
class RetrievalSource:
    """Groups for `advvl.tasks.uniter.retrieval.UniterForRetrieval`: a match, then its text with other images, then other
    texts with its image.

    Arguments:
        pairs: made of shards of captions and images.
        negatives: n, of either kind; a group has 1 + 2n rows.

    Raises:
        ConfigurationError: no negative.
    """

    pairs: Pairs
    negatives: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, "negatives")

    def __len__(self) -> int:
        return len(self.pairs.examples)

    @property
    def examples(self) -> Examples:
        """The matches, with the lengths of groups whose rows are all as long as the match."""
        found = self.pairs.examples
        return replace(found, lengths=(1 + 2 * self.negatives) * found.lengths)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """Groups of the texts at `indices`: UNITER's fields, a row for each pair, and `sample_size`, the rows of a group."""
        rows = checked_rows(indices, len(self))
        draws = RowDraws.of(rows, generator)
        images, texts = (draws.uniform(kind, self.negatives).tolist() for kind in ("image", "text"))
        groups = []
        for place, row in enumerate(rows.tolist()):
            number, pair = self.pairs.own(row)
            group = [pair]
            group += [(pair[0], name) for name in self.pairs.other_images(number, pair, images[place])]
            group += [(key, pair[1]) for key in self.pairs.other_texts(number, pair, texts[place])]
            groups.append((number, group))
        return self.collate(groups)

    def collate(self, groups: Sequence[tuple[int, Sequence[Pair]]]) -> dict[str, Any]:
        """Make the batch of groups of pairs, each with its shard's number."""
        texts, images = [], []
        for number, group in groups:
            texts += self.pairs.texts(number, [key for key, _ in group])
            images += self.pairs.images(number, [name for _, name in group])
        return {**collate(texts, images), "sample_size": len(groups[0][1])}


@dataclass(frozen=True, eq=False)
class HardNegativeSource:
    """One match and many mismatches of its text or of its image, for `advvl.tasks.uniter.retrieval.hardest` to choose from.

    Arguments:
        pairs: made of shards of captions and images.
        side: mismatches are "images" with the text, or "texts" with the image.
        candidates: how many mismatches; 399 as published.
        published: for "texts", lay out the sequences by the length of the last text instead of the longest: if it is
            shorter, regions are left out.

    Raises:
        ConfigurationError: another side, no candidate.
    """

    pairs: Pairs
    side: Side = "images"
    candidates: int = 399
    published: bool = False

    def __post_init__(self) -> None:
        choice(self, "side", Side)
        at_least(1, self, "candidates")
        flag(self, "published")

    def __len__(self) -> int:
        return len(self.pairs.examples)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """The match at the one index and its mismatches: UNITER's fields, of which the shared side has one row.

        Raises:
            DataError: several indices.
        """
        rows = checked_rows(indices, len(self))
        if len(rows) > 1:
            raise DataError(f"expected one example at a time, got {len(rows)}; give batch_size=1 for each micro-batch")
        draws = RowDraws.of(rows, generator).uniform(self.side, self.candidates)[0].tolist()
        number, pair = self.pairs.own(int(rows[0]))
        others = self.pairs.other_images if self.side == "images" else self.pairs.other_texts
        return self.collate(number, pair, others(number, pair, draws))

    def collate(self, number: int, pair: Pair, others: Sequence[str]) -> dict[str, Any]:
        """Make the batch of a pair of a shard, and of other images or texts: to score all of `Pairs.names`, too."""
        keys, names = ([pair[0]], [pair[1], *others]) if self.side == "images" else ([pair[0], *others], [pair[1]])
        texts, images = pad_texts(self.pairs.texts(number, keys)), pad_images(self.pairs.images(number, names))
        batch = joined(texts, images)
        if self.published and self.side == "texts":
            txt_lens, place = batch["txt_lens"], torch.arange(batch["gather_index"].shape[1])
            start = txt_lens[:, None]
            region = (place >= start) & (place < start + batch["num_bbs"][:, None])
            batch["gather_index"] = torch.where(region, place - start + txt_lens[-1], place)
        return batch


def drawn(count: int, excluded: Sequence[int], draws: Sequence[float]) -> list[int]:
    """Draw places below `count`, each equally likely, none twice and none of `excluded`, one for each draw in [0, 1).

    Raises:
        DataError: fewer places than draws.
    """
    taken = sorted(set(excluded))
    if count - len(taken) < len(draws):
        raise DataError(
            f"expected {len(draws)} or more that do not match, got {count - len(taken)}; draw fewer, or join databases"
        )
    found = []
    for draw in draws:
        place = int(draw * (count - len(taken)))
        for other in taken:  # in ascending order: the place among those that are left
            place += place >= other
        found.append(place)
        insort(taken, place)
    return found
