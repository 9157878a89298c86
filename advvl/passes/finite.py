"""Gradients and losses that are not finite: flags gathered on the device, and read once before an update."""

from __future__ import annotations

import torch
from torch import Tensor

from advvl.errors import NonFiniteError, more
from advvl.maximizers.probes import Feedback


class FiniteCheck:
    """The rows whose gradient was not finite in some pass: modality to bool `(B,)`, in `bad`."""

    def __init__(self) -> None:
        self.bad: dict[str, Tensor] = {}

    def see(self, feedback: Feedback) -> None:
        """Look at the gradients themselves: a perturber of the user's own may change what it moves along."""
        for modality, gradient in feedback.gradients.items():
            finite = gradient.isfinite()
            mask = feedback.places[modality].mask
            if mask is not None:
                finite = finite | ~mask.reshape(*mask.shape, *[1] * (finite.ndim - mask.ndim))
            bad = ~finite.flatten(1).all(1)
            self.bad[modality] = bad if modality not in self.bad else self.bad[modality] | bad

    def check(self, loss: Tensor | None) -> None:
        """Raise NonFiniteError if anything was not finite, naming modality and rows; one read from the device."""
        if loss is None:
            return
        flags = {modality: bad.any() for modality, bad in self.bad.items()}
        broken = torch.stack([~loss.isfinite(), *(flag.to(loss.device) for flag in flags.values())])
        if not broken.any():  # the one read
            return
        rows = {modality: bad.nonzero().flatten().tolist() for modality, bad in self.bad.items() if bad.any()}
        where = "; ".join(f"the gradient of the {m!r} perturbation in rows {_some(r)}" for m, r in rows.items())
        found = [where] if where else []
        found += [] if loss.isfinite() else [f"loss {float(loss)}"]
        raise NonFiniteError(
            f"expected finite losses and gradients, got {'; '.join(found)}; .grad is unusable: zero it, and see that "
            f"the batch is finite{more('not-finite')}"
        )


def _some(rows: list[int]) -> str:
    return f"{rows[:20]}" + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
