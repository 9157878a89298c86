"""The clean branch of a round: one graph that every perturbed pass is compared with, and the gradient it still needs.

Its gradient is exact and costs one backward, however many passes are compared with it: each comparison uses a detached
leaf in place of the clean tensor. The leaf collects the cotangent, which goes through the clean graph at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advvl.passes.backward import input_gradients
from advvl.passes.forward import Pass, Passes
from advvl.passes.objective import checked_penalty, total
from advvl.regularizers.base import Regularizer


class Comparison:
    """One regulariser and the tensor that it compares passes with; a leaf replaces the tensor and collects its cotangent.

    Arguments:
        regularizer: compares.
        value: the tensor of the clean pass, or of another reference.
        live: gradients flow into it.
    """

    def __init__(self, regularizer: Regularizer, value: Tensor, *, live: bool) -> None:
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        self.regularizer, self.live, self._value = regularizer, live, value
        self._leaf = value.detach().to(wide, copy=True).requires_grad_(live)
        self._cotangent: Tensor | None = None

    def penalty(self, tensor: Tensor, mask: Tensor | None, *, learns: bool, in_one_graph: bool) -> Tensor:
        """The penalty of a pass's tensor.

        Arguments:
            mask: the rows that count; None: all.
            learns: the pass teaches parameters, through the reference too if that is live.
            in_one_graph: the pass shares one backward with the clean graph, so it uses the tensor itself.
        """
        reference = self.reference_for(learns=learns, in_one_graph=in_one_graph)
        found = self.regularizer(reference, tensor, mask)
        return checked_penalty(found, self.regularizer)

    def reference_for(self, *, learns: bool, in_one_graph: bool) -> Tensor:
        if not self.live or not learns:
            return self._leaf.detach()
        return self._value if in_one_graph else self._leaf

    def collect(self, factor: Tensor | None) -> None:
        """Take the cotangent that a backward left on the leaf, with the loss scale divided out."""
        if self._leaf.grad is not None:
            gradient, self._leaf.grad = self._leaf.grad, None
            if factor is not None:  # with a scale of 0 nothing is left, and nothing will be needed
                gradient = torch.where(factor == 0, torch.zeros_like(gradient), gradient / factor)
            self._cotangent = gradient if self._cotangent is None else self._cotangent + gradient

    def pending(self, *, even_if_zero: bool) -> Tensor | None:
        """⟨collected cotangent, clean tensor⟩; None if nothing was collected."""
        if not self.live or (self._cotangent is None and not even_if_zero):
            return None
        cotangent = torch.zeros_like(self._value) if self._cotangent is None else self._cotangent
        return (cotangent * self._value.to(cotangent.dtype)).sum()


class CleanBranch:
    """The comparisons of a round, and the clean pass, if one was run.

    Arguments:
        run: the clean pass; None where every reference is another model's and no loss is taken on clean inputs.
        task, losses: its task loss, with its graph, and that per row `(B,)`; None where there is none.
        comparisons: one for each regulariser on perturbed passes.
        penalty: of regularisers on the clean pass itself, with its graph.
    """

    def __init__(
        self,
        run: Pass | None = None,
        *,
        task: Tensor | None = None,
        losses: Tensor | None = None,
        task_weight: float = 0.0,
        comparisons: Sequence[Comparison] = (),
        penalty: Tensor | None = None,
    ) -> None:
        self.run, self.task, self.task_weight, self.penalty = run, task, task_weight, penalty
        self.losses, self.comparisons = losses, comparisons
        self._at_zero: dict[str, Tensor] | None = None

    @property
    def needs_backward(self) -> bool:
        """True if the clean graph still needs a backward."""
        return self.penalty is not None or self.task_weight > 0 or any(one.live for one in self.comparisons)

    def collect(self, factor: Tensor | None) -> None:
        for one in self.comparisons:
            one.collect(factor)

    def pending_loss(self) -> Tensor:
        """The scalar whose gradient the parameters still have to get through the clean graph."""
        parts = [] if self.penalty is None else [self.penalty]
        if self.task is not None and self.task_weight:
            parts.append(self.task_weight * self.task)
        found = [one.pending(even_if_zero=not parts) for one in self.comparisons]
        return total([*parts, *(part for part in found if part is not None)])

    def gradients_at_zero(self, passes: Passes) -> dict[str, Tensor]:
        """The gradients at the zero perturbations of the clean pass, by one input-only backward of its graph."""
        if self._at_zero is None:
            assert self.run is not None
            assert self.task is not None
            self._at_zero = input_gradients(self.task, self.run, passes, retain_graph=True)
        return self._at_zero
