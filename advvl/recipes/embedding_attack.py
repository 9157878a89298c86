"""The embedding attack on language models."""

from __future__ import annotations

from advvl.attacks import Attack
from advvl.maximizers.pgd import PGD
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2
from advvl.perturbers.rules import Adam
from advvl.recipes.answers import forcing
from advvl.recipes.parts import perturber_at


def embedding_attack(
    *,
    radius: float = 1.0,
    step_size: float = 1e-3,
    steps: int = 100,
    modality: str = "text",
) -> Attack:
    """The embedding attack: δ climbs −CE(answer | x + δ) by Adam, in an L2 ball per token, of mean norms of the prompt.

    The answers are in `labels`, and the site's mask is `prompts`: see `advvl.recipes.answers`. Schwinn et al., "Soft
    Prompt Threats", NeurIPS 2024. Radius and steps are in units of the mean norm of each row's own embedded prompt;
    published code uses the mean norm of the whole table.
    """
    ascent = Ascent(L2(radius, per="token", relative=True), step_size=step_size, rule=Adam())
    return Attack(perturber_at(modality, ascent), PGD(steps), loss=forcing)
