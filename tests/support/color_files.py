"""Colors in Context's files with invented games: the corpus's form, none of its words."""

from __future__ import annotations

import random
from pathlib import Path

CLICKS = (
    "gameid,time,roundNum,condition,clickStatus,clickColH,clickColS,clickColL,clickLocS,clickLocLalt1Status,alt1ColH,"
    "alt1ColS,alt1ColL,alt1LocS,alt1LocLalt2Status,alt2ColH,alt2ColS,alt2ColL,alt2LocS,alt2LocLtargetD1Diff,targetD2Diff,"
    "D1D2Diff,outcome"
)
MESSAGES = "gameid,time,roundNum,sender,contents"
HUES = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "pink": 300}


def game_files(folder: Path, game: str, *, rounds: int = 6, seed: int = 0) -> None:
    """Write the two files of a game whose speaker names the target's hue."""
    rng = random.Random(f"{game}-{seed}")
    clicks, messages, time = [CLICKS], [MESSAGES], 1_000_000
    for number in range(1, rounds + 1):
        names = rng.sample(sorted(HUES), 3)
        status = rng.sample(["target", "distr1", "distr2"], 3)
        places = rng.sample([1, 2, 3], 3)
        time += 1000
        messages.append(f'{game},{time},{number},speaker,"{names[status.index("target")]} please"')
        time += 1000
        patches = [
            f"{status[i]},{HUES[names[i]]},{rng.randint(60, 100)},50,{rng.randint(1, 3)},{places[i]}" for i in range(3)
        ]
        condition = ("further", "equal", "closer")[number % 3]
        outcome = str(status[0] == "target").lower()
        clicks.append(f"{game},{time},{number},{condition},{','.join(patches)},20,47,55,{outcome}")
    for kind, lines in (("clickedObj", clicks), ("message", messages)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{game}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def corpus(folder: Path, *, games: int = 30, rounds: int = 6) -> Path:
    for number in range(games):
        game_files(folder, f"{number:04}-a", rounds=rounds)
    return folder
