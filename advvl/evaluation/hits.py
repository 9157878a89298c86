"""The place where an attack hits an example: the length of its perturbation at each position, and the answers.

Legend: A answers, T positions, n rows that one example has at a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from advvl.adapters.base import Adapter, Outputs
from advvl.adapters.registry import adapted
from advvl.errors import DataError
from advvl.evaluation.attempts import check_eval, searched
from advvl.evaluation.examples import position_norms
from advvl.evaluation.measurement import Budget
from advvl.evaluation.named_attacks import AnyAttack
from advvl.evaluation.scoring import Batch, Targets, answer_score, fresh, own_targets
from advvl.evaluation.verification import verify
from advvl.ops import Box
from advvl.perturbers.pixels import Normalised
from advvl.runtime.randomness import derive_seed


@dataclass(frozen=True, eq=False)
class Hit:
    """An attack on one example.

    Arguments:
        heat: modality to the L2 norm of its perturbation at each position, `(n, T)` fp64; of pixels `(n, H, W)`.
        before, after: logits `(A,)` fp64 without and with the perturbation.
        taken: the perturbation lowers the example's score.
    """

    heat: Mapping[str, Tensor]
    before: Tensor
    after: Tensor
    taken: bool


def hit(
    model: Adapter | nn.Module,
    batch: Batch,
    budget: Budget,
    attack: AnyAttack,
    *,
    targets: Targets | None = None,
    boxes: Mapping[str, Box] | None = None,
    pixels: Mapping[str, Normalised] | None = None,
    seed: int = 0,
    tries: int = 10,
) -> Hit:
    """Make an attack on one example, and say where it hit; of several restarts the one that leaves the least score.

    Random starts differ from those of a measurement, so that more of them may be needed to take the example again; `taken`
    says if one did.

    Arguments:
        model: in eval mode, on the device of the batch; or its adapter.
        batch: of one example.
        targets, boxes, pixels: as `worst_case` takes them.
        seed: of the random starts.
        tries: further restarts, as long as the example's score holds.

    Raises:
        DataError: a batch of several examples.
        ConfigurationError, SiteError: as `worst_case`; a model in training mode is refused.
    """
    with adapted(model) as adapter:
        made_on = attack.surrogate or adapter
        for attacked in (adapter, made_on):
            check_eval(attacked.model)
        asked, seen = targets or own_targets, list[Tensor]()
        judge = answer_score(adapter, asked)

        def score(outputs: Outputs, batch: Batch) -> Tensor:
            seen.append(adapter.logits(outputs).detach().double().cpu())
            return judge(outputs, batch)

        settings: Any = {"name": attack.name, "seed": seed}
        with fresh(adapter.model, seed), adapter.clean():
            clean = score(adapter.forward(batch), batch)
        before = seen.pop()
        if len(before) != 1:
            raise DataError(f"expected a batch of one example, got {len(before)}; take its row")
        found: list[tuple[float, Tensor, Mapping[str, Tensor]]] = []
        for restart in range(attack.restarts + tries):
            if restart >= attack.restarts and min(left for left, *_ in found) < float(clean[0]):
                break
            ascents = attack.ascents(budget, restart, boxes or {}, pixels or {})
            drawn = derive_seed(seed, attack.name, restart)
            worst = searched(attack, made_on, batch, ascents, asked, answer_score(made_on, asked), seed=drawn).worst
            left = float(verify(adapter, batch, ascents, worst, score, **settings).scores[0])
            found.append((left, seen.pop(), worst))
        least, after, deltas = min(found, key=lambda one: one[0])
        heat = {modality: position_norms(delta) for modality, delta in deltas.items()}
        return Hit(heat, before[0], after[0], least < float(clean[0]))
