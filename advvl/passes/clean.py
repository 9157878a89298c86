"""The clean branch of a round: one graph, what is asked of it while other passes run, and what it owes at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from advvl.passes.forward import Pass, Passes


class CleanBranch:
    """The clean pass of one round, and the cotangent that waits for its backward."""

    def __init__(self, run: Pass, logits: Tensor | None, *, live: bool) -> None:
        """`logits`: those of the run, where something looks at them."""
        self.run, self.live, self.logits = run, live, logits
        self.reference: Tensor | None = None  # a leaf in the logits' place, which collects their cotangent
        if logits is not None:
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            self.reference = logits.detach().to(wide, copy=True).requires_grad_(live)
        self.task_weight = 0.0
        self._cotangent: Tensor | None = None
        self._served: dict[str, Tensor] | None = None

    def compared(self, *, whole: bool, learns: bool) -> Tensor:
        """What a perturbed pass is compared with: the logits' stand-in, or with `whole` they themselves, in one graph."""
        assert self.logits is not None
        assert self.reference is not None
        if not self.live or not learns:
            return self.reference.detach()
        return self.logits if whole else self.reference

    def collect(self, factor: Tensor | None) -> None:
        """Take the cotangent that a backward left on the reference, freed of the loss scale."""
        if self.reference is not None and self.reference.grad is not None:
            gradient, self.reference.grad = self.reference.grad, None
            gradient = gradient if factor is None else gradient / factor
            self._cotangent = gradient if self._cotangent is None else self._cotangent + gradient

    def gradients(self, passes: Passes) -> dict[str, Tensor]:
        """The gradients at the zero perturbations of the clean pass, by one input-only backward of its graph."""
        if self._served is None:
            self._served = passes.input_gradients(self.run.task, self.run, retain_graph=True)
        return self._served

    @property
    def owes(self) -> bool:
        """Whether the clean graph has a backward to come."""
        return self.live or self.task_weight > 0

    def remainder(self) -> Tensor:
        """What the clean graph still owes the parameters: its task loss and ⟨collected cotangent, clean logits⟩."""
        parts = []
        if self.task_weight:
            parts.append(self.task_weight * self.run.task)
        if self.logits is not None and (self._cotangent is not None or not parts):
            cotangent = torch.zeros_like(self.logits) if self._cotangent is None else self._cotangent
            parts.append((cotangent * self.logits.to(cotangent.dtype)).sum())
        return sum(parts[1:], parts[0])
