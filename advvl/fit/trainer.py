"""Adversarial training in the loop of transformers' `Trainer`."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Trainer

from advvl.adapters.base import Adapter
from advvl.adapters.injection import Batch, Site
from advvl.adapters.outputs import Outputs
from advvl.adapters.registry import adapt
from advvl.errors import ConfigurationError
from advvl.fit.outputs import clean_without_gradients, kept_outputs
from advvl.fit.records import MethodRecord
from advvl.fit.shares import of_part
from advvl.maximizers.free_at import FreeAT
from advvl.maximizers.pgd import PGD
from advvl.runtime.processes import check_agreement
from advvl.runtime.randomness import derive_seed
from advvl.training import AdversarialTraining, StepReport


class AdversarialTrainer(Trainer):
    """A `Trainer` that runs the passes of an adversarial method in each step instead of one forward and backward.

    Each pass calls `compute_loss` once, so label smoothing, `compute_loss_func` and a `compute_loss` of a subclass
    apply, while an adapter's own `call` and `loss` do not. Everything else, such as evaluation, is Trainer's. It logs
    `loss`, the objective, with its parts `task_loss` and `regularization`, the norms of the perturbations as
    `delta_norm_<modality>` (mean over rows or positions that moved) and, with `nonfinite="keep"`,
    `nonfinite_<modality>` (rows), as means over updates. To extend another trainer, put this class before it: `class
    Mine(AdversarialTrainer, Seq2SeqTrainer)`. Checkpoints hold the method's description, and cannot be resumed with
    another method.

    Arguments:
        method: the adversarial method of a step; a callback may replace `trainer.method` between steps, as a schedule.
        sites: where to perturb the model, as in `adapt`; None: at the sites of its registered adapter.
        target: an adapter of the model, instead of `sites`.
        args, kwargs: of Trainer.

    Raises:
        SiteError: a modality of the method that the model lacks; no sites for an unknown model; an adapter of another one.
        ConfigurationError: a method and training arguments that do not work together; see `docs/loops.md`. A class with
            a trainer before this one that does not pass `method` on.
        CheckpointError: in `train`, a checkpoint of another method.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(AdversarialTrainer)]
        other = next((c for c in before if not issubclass(c, AdversarialTrainer) and not _passes_keywords_on(c)), None)
        if other is not None:
            raise ConfigurationError(
                f"expected AdversarialTrainer before {other.__name__}, whose __init__ takes no method, got it after; write "
                f"class {cls.__name__}(AdversarialTrainer, {other.__name__})"
            )

    def __init__(
        self,
        *args: Any,
        method: AdversarialTraining,
        sites: Mapping[str, Site | str] | None = None,
        target: Adapter | None = None,
        **kwargs: Any,
    ) -> None:
        _check_method(method)
        if any(isinstance(given, Adapter) for given in (*args[:1], kwargs.get("model"))):
            raise ConfigurationError("expected a model, got its adapter; pass model=adapter.model, target=adapter")
        if target is not None and (sites is not None or kwargs.get("model_init") is not None):
            raise ConfigurationError(
                "expected a target alone, got sites or model_init beside it; give the sites, or an adapter of the one model"
            )
        self.method, self._sites, self._record = method, sites, MethodRecord(method)
        self._running: Adapter | None = None
        self._counts_seen = False  # whether the loss was checked for the number of items in a window
        self._computed: deque[tuple[Outputs, object]] = deque(maxlen=2)  # of the last passes: outputs and loss
        self._begin()
        super().__init__(*args, **kwargs)
        self.add_callback(self._record)
        _check_loop(self)
        if getattr(self, "model_init", None) is None:  # otherwise every new model is adapted when it is made
            self._adapt(cast("nn.Module", self.model), target)

    def _adapt(self, model: nn.Module, target: Adapter | None = None) -> None:
        """Install the hooks on a model before it is wrapped or compiled."""
        self.target = adapt(model, self._sites) if target is None else target.through(model)
        self.target.check_modalities(self.method.perturber.modalities)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model: nn.Module = super().call_model_init(trial)
        self._adapt(model)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        check_agreement("the method", self.method)
        resume = args[0] if args else kwargs.get("resume_from_checkpoint")
        self._record.check(resume, str(self.args.output_dir))
        self._begin()
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Trainer's own step, whose loss is computed by all passes of the method and already differentiated."""
        with self._computing_by(partial(self._objective, self.compute_loss)):
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | self._means() if "loss" in logs else logs, *args, **kwargs)

    @contextmanager
    def _computing_by(self, compute: Callable[..., Tensor]) -> Iterator[None]:
        """Replace `compute_loss` for a while; on the instance, since subclasses override the method."""
        before = vars(self).get("compute_loss")
        vars(self)["compute_loss"] = compute
        try:
            yield
        finally:
            del vars(self)["compute_loss"]
            if before is not None:
                vars(self)["compute_loss"] = before

    def _objective(
        self, plain: Callable[..., Any], model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the objective on one batch, after its gradient was added to the parameters.

        Trainer expects a mean over the batch, which it divides by the window of gradient accumulation, or this batch's
        part of a mean over all of it. Here both parts of the objective are converted to the former.
        """
        window = self.current_gradient_accumulation_steps
        gives_parts = self._gives_parts(num_items_in_batch)
        parts = window if gives_parts else 1
        counted = num_items_in_batch
        too_large = self._too_large_if_uncounted(parts)
        if too_large and not self._counts_seen and counted is not None:
            counted = torch.as_tensor(counted, dtype=torch.float64).requires_grad_()  # does the loss depend on it?
        self._compute = partial(plain, num_items_in_batch=counted)

        def loss(outputs: Outputs, _: Batch) -> Tensor:
            found = _scalar(next(loss for kept, loss in self._computed if kept is outputs))
            if counted is not num_items_in_batch and not self._counts_seen:
                self._counts_seen = True
                _warn_unless_counted(found, cast("Tensor", counted), too_large)
            return found * parts

        processes = int(self.accelerator.num_processes)
        penalties = self._penalties(inputs, num_items_in_batch) if gives_parts else ()
        report = of_part(self.method, 1 / (window * processes), penalties=penalties).step(
            self._through(model),
            inputs,
            loss=loss,
            backward=lambda total: self.accelerator.backward(total / window),
            generator=self._generator(),
        )
        self._computed.clear()
        self._note(report, window)
        self._batch += 1
        return (report.loss / parts).requires_grad_()  # a leaf: the backward that follows has nothing left to do

    def _penalties(self, inputs: Batch, num_items_in_batch: Tensor | int | None) -> list[float]:
        """Return the weight of each regulariser's mean on this batch, relative to a mean over the batches of the window.

        Of predictions it is their share of the window's items; means over anything else weigh the same.
        """
        positions = self.target.positions(inputs) if self.method.regularizers else None
        if positions is None or num_items_in_batch is None:
            return [1.0] * len(self.method.regularizers)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        share = float(positions.sum()) * processes / max(float(num_items_in_batch), 1.0)
        share *= self.current_gradient_accumulation_steps
        return [share if one.reads is None and one.rows is None else 1.0 for one in self.method.regularizers]

    def _gives_parts(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Return True if `compute_loss` divides by the number of items in the whole window, as Trainer judges it."""
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(counted or self.compute_loss_func is not None)

    def _too_large_if_uncounted(self, parts: int) -> list[str]:
        """Return a message with the factor by which Trainer's gradients are too large if the loss ignores the items."""
        found = ["gradient_accumulation_steps: set trainer.loss_is_scaled_for_ga = False"] if parts > 1 else []
        supposed = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if supposed and self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            found.append("the number of processes: set average_tokens_across_devices=False")
        return found

    def _through(self, model: nn.Module) -> Adapter:
        """Return the adapter, run through the wrapper of the model in training."""
        if self._running is None or self._running.model is not model:
            self._running = self.target.through(model, call=self._call)
        return self._running

    def _call(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run one `compute_loss`; return the model's outputs, and remember the loss."""
        method = self.method
        own_loss = any(one is not None and one.loss is not None for one in (method.climb, method.teach))
        reads_logits = own_loss or any(one.reads is None for one in method.regularizers)
        aside = clean_without_gradients(cast("nn.Module", self.model), self.target.clean)
        with aside, kept_outputs(model, logits=reads_logits) as kept:
            loss = self._compute(model, copy.copy(batch))  # which takes the labels out of it
        self._computed.append((kept[0] if kept else None, loss))
        return self._computed[-1][0]

    def _begin(self) -> None:
        self._batch = self._updates = 0
        self._step = -1
        self._sums: dict[str, Tensor] = {}

    def _generator(self) -> torch.Generator:
        """Return the generator of this batch's random starts, which is the same in a resumed run."""
        if self._step != self.state.global_step:
            self._step, self._batch = self.state.global_step, 0
        seed = derive_seed(self.args.seed, "method", self._step, self._batch, self.args.process_index)
        return torch.Generator().manual_seed(seed)

    def _note(self, report: StepReport, window: int) -> None:
        """Add the report of a step to the next log entry; on the device."""
        parts = {"task_loss": report.task_loss, "regularization": report.regularization}
        seen = {name: part for name, part in parts.items() if part is not None}
        for modality, norms in report.delta_norms.items():
            seen[f"delta_norm_{modality}"] = norms.sum() / (norms > 0).sum().clamp(min=1)
        if self.method.nonfinite == "keep":
            for modality, rows in report.nonfinite.items():
                seen[f"nonfinite_{modality}"] = rows * window  # a sum over the window, where the others are means
        for name, value in seen.items():
            value = value.detach().to(self.args.device, torch.float32) / window
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._updates += bool(self.accelerator.sync_gradients)

    def _means(self) -> dict[str, float]:
        """Return the means since the last call, over updates and processes; every process has to call this."""
        if not self._sums:
            return {}
        total = self.accelerator.reduce(torch.stack(list(self._sums.values())), "mean") / max(self._updates, 1)
        means = dict(zip(self._sums, total.tolist(), strict=True))
        self._sums, self._updates = {}, 0
        return means


# what they make of several passes before one reduction is not known; nor is it of FSDP1
_UNKNOWN = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def _passes_keywords_on(cls: type) -> bool:
    """True unless the class has an `__init__` of its own that takes no further keyword arguments."""
    own = vars(cls).get("__init__")
    kinds = {parameter.kind for parameter in inspect.signature(own).parameters.values()} if own is not None else set()
    return own is None or inspect.Parameter.VAR_KEYWORD in kinds


def _scalar(loss: object) -> Tensor:
    """Return the loss that `compute_loss` gave.

    Raises:
        ConfigurationError: it is no scalar.
    """
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"a loss of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigurationError(
            f"expected compute_loss to give a scalar loss, got {got}; give labels in the batch or compute_loss_func=…"
        )
    return loss


def _warn_unless_counted(loss: Tensor, counted: Tensor, too_large: Sequence[str]) -> None:
    """Warn of a loss that does not divide by the items of the window, although Trainer assumes that it does."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, counted, retain_graph=True, allow_unused=True)
    if found[0] is None:
        warnings.warn(
            "the loss ignores num_items_in_batch, by which Trainer supposes it to be divided: gradients are too large by "
            + "; and by ".join(too_large),
            stacklevel=2,
        )


def _check_method(method: object) -> None:
    if inspect.isfunction(method):
        name = method.__name__
        raise ConfigurationError(
            f"expected method as an AdversarialTraining, got the function {name}; call it: {name}(…)"
        )
    if not isinstance(method, AdversarialTraining):
        raise ConfigurationError(f"expected method as an AdversarialTraining, got {method!r}; make one of its parts")
    maximizer = method.maximizer
    if maximizer.updates > 1 or isinstance(maximizer, FreeAT):
        raise ConfigurationError(
            f"expected a maximiser with one update per step and nothing to carry, got {maximizer!r}; "
            "use FreeLB or PGD, or a loop of your own"
        )
    if isinstance(maximizer, PGD) and (maximizer.early_stop or maximizer.keep == "best"):
        raise ConfigurationError(
            f"expected PGD without early_stop and with keep='last', got {maximizer!r}; compute_loss gives one number for "
            "all rows"
        )


def _check_loop(trainer: AdversarialTrainer) -> None:
    """Refuse settings that would be silently wrong in a step of several passes, or fail far from their cause.

    Raises:
        ConfigurationError: training arguments or an accelerator of that kind.
    """
    args, accelerator = trainer.args, trainer.accelerator
    kind, parallel = accelerator.distributed_type, getattr(accelerator, "parallelism_config", None)
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    refused = {
        "one process per device": (args.n_gpu > 1, f"{args.n_gpu} devices under DataParallel", "start it by torchrun"),
        "one device, DDP or FSDP2": (
            kind in _UNKNOWN or (kind == DistributedType.FSDP and not accelerator.is_fsdp2),
            "FSDP1" if kind == DistributedType.FSDP else kind,
            'start it by torchrun; to shard, give fsdp=True, fsdp_config={"version": 2}',
        ),
        "data parallelism alone": (
            any(getattr(parallel, f"{name}_size", None) not in (None, 1) for name in ("tp", "cp", "sp")),
            f"{parallel}",
            "leave tensor, context and sequence parallelism out",
        ),
        "activation checkpointing without reentry": (
            bool(args.gradient_checkpointing and checkpointing.get("use_reentrant")),
            "use_reentrant=True",
            "pass use_reentrant=False: gradients of perturbations alone need it",
        ),
        "an optimiser that updates once per step": (
            "lomo" in str(args.optim).lower(),
            args.optim,
            "choose another: LOMO updates in every backward",
        ),
        "nonfinite='keep' with fp16": (
            bool(args.fp16) and trainer.method.nonfinite == "raise",
            "nonfinite='raise'",
            "pass dataclasses.replace(method, nonfinite='keep'), or use bf16",
        ),
    }
    for expected, (wrong, got, advice) in refused.items():
        if wrong:
            raise ConfigurationError(f"expected {expected}, got {got}; {advice}")
