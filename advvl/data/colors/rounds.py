"""Rounds of the game: three colours, the words for one of them, and whether the listener found it."""

from __future__ import annotations

import bisect
import colorsys
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from advvl.data.colors.tables import Click, Color, Message, Skipped, read_tables
from advvl.errors import DataError
from advvl.runtime.randomness import derive_seed

Condition = Literal["far", "split", "close"]
Part = Literal["train", "validation", "test"]

# In the files "further" has one colour further off than the other, and "equal" all three equally far apart: their distances
# (CIEDE2000) are 5..19 and above 21, and all above 19.
_CONDITIONS: Final[Mapping[str, Condition]] = {
    "equal": "far",
    "far": "far",
    "further": "split",
    "split": "split",
    "closer": "close",
    "close": "close",
}
_SHARES: Final[Mapping[Part, float]] = {"train": 0.7, "validation": 0.15, "test": 0.15}


@dataclass(frozen=True)
class Round:
    """One round.

    Arguments:
        game: the game of the round; each game has the same two people throughout.
        utterance: what the speaker wrote before the click, messages joined by a space.
        condition: "far": all colours are apart; "split": one is like the target; "close": all are alike.
        colors: red, green and blue in [0, 1], of the three from the listener's left.
        target, clicked: 0, 1 or 2, the described colour and the chosen one.
    """

    game: str
    number: int
    condition: Condition
    utterance: str
    colors: tuple[Color, ...]
    target: int
    clicked: int


@dataclass(frozen=True)
class Rounds:
    """The corpus; `skipped` lists the rows that were left out, with reasons."""

    rounds: tuple[Round, ...]
    skipped: tuple[Skipped, ...]

    def part(self, name: Part) -> tuple[Round, ...]:
        """Return the rounds of the games of one part: 70 % of games for training, 15 % each for the others.

        The part of a game follows from its name alone, so it does not depend on which files are present.
        """
        return tuple(one for one in self.rounds if part_of(one.game) == name)


def part_of(game: str) -> Part:
    """Return the part that a game is in."""
    share, end = derive_seed(0, "colors", game) / 2**63, 0.0
    for name, size in _SHARES.items():
        end += size
        if share < end:
            return name
    return "test"


def read_rounds(path: str | os.PathLike[str]) -> Rounds:
    """Read the corpus from the folder or archive of its CSV files, as `hawkrobe/reference_games` publishes them.

    A message belongs to the first click at or after it, of the same game and round. Rounds without words, or of an unknown
    condition, are skipped.

    Raises:
        DataError: the files are missing, or no round can be made of them.
    """
    tables = read_tables(path)
    skipped, rounds = list(tables.skipped), []
    words = _utterances(tables.clicks, tables.messages)
    for index, click in enumerate(tables.clicks):
        condition, utterance = _CONDITIONS.get(click.condition), " ".join(words[index]).strip()
        if condition is None or not utterance:
            reason = "no message of the speaker" if condition else f"condition {click.condition!r}"
            skipped.append(Skipped(f"game {click.game}", click.round, reason))
            continue
        rounds.append(_round(click, condition, utterance))
    if not rounds:
        raise DataError(f"expected rounds with words in {str(path)!r}, got none; are the files of messages there?")
    return Rounds(tuple(rounds), tuple(skipped))


def _utterances(clicks: Sequence[Click], messages: Sequence[Message]) -> list[list[str]]:
    """The speaker's messages of each click, in the order of their times."""
    times: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for index, click in enumerate(clicks):
        times[click.game, click.round].append((click.time, index))
    for known in times.values():
        known.sort()
    words: list[list[str]] = [[] for _ in clicks]
    for message in sorted(messages, key=lambda message: message.time):
        known = times.get((message.game, message.round), [])
        place = bisect.bisect_left(known, (message.time, -1))
        if message.sender == "speaker" and place < len(known):
            words[known[place][1]].append(message.contents.strip())
    return words


def _round(click: Click, condition: Condition, utterance: str) -> Round:
    order = sorted(range(3), key=lambda patch: click.places[patch])
    return Round(
        game=click.game,
        number=click.round,
        condition=condition,
        utterance=utterance,
        colors=tuple(rgb(*click.colors[patch]) for patch in order),
        target=order.index(click.target),
        clicked=order.index(0),
    )


def rgb(hue: float, saturation: float, lightness: float) -> Color:
    """Return red, green and blue in [0, 1] of a hue in 0..360, a saturation and a lightness in 0..100."""
    return colorsys.hls_to_rgb(hue / 360 % 1, lightness / 100, saturation / 100)
