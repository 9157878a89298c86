"""The tasks: their losses, what they refuse, and the optimal-transport distance against a linear programme."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from support.uniter_batches import LENGTHS, uniter_batch, without_lengths
from torch import Tensor
from torch.nn import functional as F

from advvl import adapt
from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.models.uniter.model import UniterConfig, UniterModel
from advvl.tasks.losses import vqa_losses
from advvl.tasks.uniter.itm import match
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.transport import cosine_costs, transport_distance, transport_plan
from advvl.tasks.uniter.vqa import UniterForVQA

TASKS = ("mlm", "itm", "mrfr", "mrc", "mrc-kl")


def pretraining(**options: Any) -> UniterForPretraining:
    torch.manual_seed(0)
    return UniterForPretraining(UniterConfig.tiny(initializer_range=0.2, **options)).double().eval()


def pretraining_batch(task: str, **options: Any) -> dict[str, Any]:
    """One masked word a text, one masked region an image, alternating matches."""
    batch = uniter_batch(**options)
    rows, config = len(batch["input_ids"]), UniterConfig.tiny()
    generator = torch.Generator().manual_seed(7)
    if task == "mlm":
        labels = torch.full_like(batch["input_ids"], -1)
        labels[:, 1] = batch["input_ids"][:, 1]
        return batch | {"txt_labels": labels}
    if task == "itm":
        return batch | {"targets": torch.arange(rows) % 2}
    masks = torch.zeros(batch["img_feat"].shape[:2], dtype=torch.bool)
    places = torch.zeros_like(batch["attn_masks"], dtype=torch.bool)
    masks[:, 0] = True
    places[torch.arange(rows), batch["txt_lens"]] = True
    batch |= {"img_masks": masks, "img_mask_tgt": places, "img_feat": batch["img_feat"] * ~masks[..., None]}
    if task == "mrfr":
        return batch | {"feat_targets": torch.randn(rows, config.img_dim, generator=generator, dtype=torch.float64)}
    scores = torch.randn(rows, config.img_label_dim, generator=generator, dtype=torch.float64)
    return batch | {"label_targets": (3 * scores).softmax(-1)}


def test_the_mean_of_the_vqa_losses_is_the_published_loss() -> None:
    logits, targets = torch.randn(6, 11, dtype=torch.float64), torch.rand(6, 11, dtype=torch.float64)
    published = F.binary_cross_entropy_with_logits(logits, targets) * 11
    losses = vqa_losses(logits, targets)
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.mean(), published, rtol=1e-14, atol=0)


def test_vqa_answers_without_targets_and_has_no_loss_then() -> None:
    model = UniterForVQA(UniterConfig.tiny(), num_answers=5).double().eval()
    output = model(**uniter_batch())
    assert output.logits.shape == (4, 5)
    assert output.loss is None
    targets = torch.rand(4, 5, dtype=torch.float64)
    trained = model(**uniter_batch(), targets=targets)
    assert torch.equal(trained.loss, vqa_losses(output.logits, targets))


def test_low_precision_logits_are_compared_in_float32() -> None:
    logits, targets = torch.randn(3, 50).bfloat16(), torch.rand(3, 50)
    assert torch.equal(vqa_losses(logits, targets), vqa_losses(logits.float(), targets))


@pytest.mark.parametrize(
    ("targets", "error"),
    [(torch.rand(4, 6), ShapeError), (torch.rand(4), ShapeError), (torch.ones(4, 5).long(), DataError)],
    ids=["answers", "no-answers", "classes"],
)
def test_vqa_targets_that_do_not_fit_are_refused(targets: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected targets"):
        UniterForVQA(UniterConfig.tiny(), num_answers=5).double()(**uniter_batch(), targets=targets)


def test_vqa_needs_an_answer() -> None:
    with pytest.raises(ConfigurationError, match="num_answers of 1 or more, got 0"):
        UniterForVQA(UniterConfig.tiny(), num_answers=0)


@pytest.mark.parametrize("task", TASKS)
def test_a_pretraining_loss_is_finite_and_reaches_the_encoder(task: str) -> None:
    model, batch = pretraining(), pretraining_batch(task)
    output = model(task=task, **batch)
    output.loss.backward()
    assert output.loss.ndim == 0
    assert output.loss.isfinite()
    gradient = model.uniter.encoder.layer[0].attention.self.query.weight.grad
    assert gradient is not None
    assert gradient.any()


@pytest.mark.parametrize("task", TASKS)
def test_the_rows_that_a_regulariser_compares_are_those_of_the_logits(task: str) -> None:
    """All of them count; None where there is one an example."""
    model, batch = pretraining(), {"task": task, **pretraining_batch(task)}
    if task == "mlm":
        batch["txt_labels"][0, 2] = 5  # two words of the first text
    positions, logits = adapt(model).positions(batch), model(**batch).logits
    if task in ("itm", "mrfr"):
        assert positions is None
    else:
        assert positions is not None
        assert positions.shape == logits.shape[:-1]
        assert positions.all()
        assert len(positions) == (5 if task == "mlm" else 4)


@pytest.mark.parametrize(
    ("task", "losses", "logits"),
    [
        ("mlm", (4,), (4, 97)),
        ("itm", (4,), (4, 2)),
        ("mrfr", (4, 40), None),
        ("mrc", (4,), (4, 23)),
        ("mrc-kl", (4, 23), (4, 23)),
    ],
)
def test_losses_are_unreduced_and_logits_of_what_was_masked(task: str, losses: Any, logits: Any) -> None:
    output = pretraining(itm_ot_lambda=0.0)(task=task, **pretraining_batch(task))
    assert output.losses.shape == losses
    assert (None if output.logits is None else output.logits.shape) == logits
    assert torch.equal(output.loss, output.losses.mean())


@pytest.mark.parametrize("task", TASKS)
def test_padding_changes_no_pretraining_loss(task: str) -> None:
    model = pretraining()
    expected = model(task=task, **pretraining_batch(task)).loss
    wider = pretraining_batch(task, more_text=4, more_regions=3, more_places=2)
    torch.testing.assert_close(model(task=task, **wider).loss, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("task", "field"),
    [
        ("mlm", "txt_labels"),
        ("itm", "targets"),
        ("mrfr", "img_mask_tgt"),
        ("mrfr", "feat_targets"),
        ("mrc", "img_mask_tgt"),
        ("mrc", "label_targets"),
        ("mrc-kl", "label_targets"),
        ("itm", "img_feat"),
    ],
)
def test_a_task_without_its_field_is_refused(task: str, field: str) -> None:
    batch = pretraining_batch(task)
    batch.pop(field)
    with pytest.raises(DataError, match=f"field '{field}'"):
        pretraining()(task=task, **batch)


Spoil = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("task", "spoil", "error", "message"),
    [
        ("mlm", lambda b: {"txt_labels": torch.full_like(b["txt_labels"], -1)}, DataError, "a masked word"),
        ("mlm", lambda b: {"txt_labels": b["txt_labels"][:3]}, ShapeError, "txt_labels"),
        ("mrfr", lambda b: {"img_mask_tgt": torch.zeros_like(b["img_mask_tgt"])}, DataError, "a masked region"),
        ("mrfr", lambda b: {"img_mask_tgt": b["img_mask_tgt"][:, 1:]}, ShapeError, "img_mask_tgt"),
        ("mrfr", lambda b: {"feat_targets": b["feat_targets"][:2]}, ShapeError, "each of 4 masked regions, got 2"),
        ("mrfr", lambda b: {"feat_targets": b["feat_targets"][:, :9]}, ShapeError, "feat_targets"),
        ("mrc", lambda b: {"label_targets": b["label_targets"].argmax(1)}, ShapeError, "label_targets"),
        ("mrc-kl", lambda b: {"label_targets": b["label_targets"].long()}, DataError, "label_targets"),
        ("itm", lambda b: {"targets": b["targets"][:2]}, ShapeError, "targets"),
        ("itm", lambda b: {"targets": b["targets"].double()}, DataError, "targets"),
    ],
)
def test_targets_that_do_not_fit_are_refused(task: str, spoil: Spoil, error: type[Exception], message: str) -> None:
    batch = pretraining_batch(task)
    with pytest.raises(error, match=message):
        pretraining()(task=task, **batch | spoil(batch))


def test_another_task_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="one of mlm, itm, mrfr, mrc, mrc-kl, got 'vqa'"):
        pretraining()(task="vqa", **uniter_batch())


def test_the_background_is_never_the_class_to_tell() -> None:
    model, batch = pretraining(), pretraining_batch("mrc")
    expected = model(task="mrc", **batch).losses
    background = batch["label_targets"].clone()
    background[:, 0] = 9.0
    assert torch.equal(model(task="mrc", **batch | {"label_targets": background}).losses, expected)


def test_matching_pulls_matches_together_and_mismatches_apart() -> None:
    logits, targets = torch.zeros(3, 2), torch.tensor([1, 0, 1])
    distances = torch.tensor([0.5, 0.2, 0.3])
    output = match(logits, targets, distances, weight=0.1)
    torch.testing.assert_close(output.loss, torch.tensor(np.log(2) + 0.1 * (0.5 - 0.2 + 0.3) / 3).float())
    torch.testing.assert_close(match(logits, targets).loss, torch.tensor(np.log(2)).float())


def test_no_weight_no_distances() -> None:
    batch = pretraining_batch("itm")
    assert pretraining(itm_ot_lambda=0.0)(task="itm", **batch).distances is None
    assert pretraining()(task="itm", **batch).distances.shape == (4,)


def test_distances_do_not_need_the_lengths() -> None:
    model, batch = pretraining(), pretraining_batch("itm")
    expected = model(task="itm", **batch).distances
    assert torch.equal(model(task="itm", **without_lengths(batch)).distances, expected)


def test_distances_are_between_a_rows_tokens_and_its_regions() -> None:
    model, batch = pretraining(), pretraining_batch("itm")
    found = model(task="itm", **batch).distances
    hidden = model.uniter(**uniter_batch()).last_hidden_state
    for row, (tokens, regions) in enumerate(zip(*LENGTHS, strict=True)):
        words, boxes = hidden[row : row + 1, :tokens], hidden[row : row + 1, tokens : tokens + regions]
        alone = transport_distance(words, boxes, _all(words), _all(boxes))
        torch.testing.assert_close(found[row], alone[0], rtol=1e-10, atol=1e-12)


def _all(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def clouds(
    m: int, n: int, *, seed: int, padding: tuple[int, int] = (0, 0), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two clouds of m and n vectors about one direction, and padding of noise behind them."""
    generator = torch.Generator().manual_seed(seed)
    x, y, centre, noise = (
        torch.randn(1, size, 6, generator=generator, dtype=torch.float64) for size in (m, n, 1, sum(padding))
    )
    x = torch.cat([x + centre, noise[:, : padding[0]]], 1).to(dtype)
    y = torch.cat([y + centre, noise[:, padding[0] :]], 1).to(dtype)
    return x, y, torch.arange(m + padding[0])[None] < m, torch.arange(n + padding[1])[None] < n


def least_cost(costs: np.ndarray[Any, Any]) -> float:
    """The exact optimum: a linear programme over plans with rows summing to 1/m and columns to 1/n."""
    m, n = costs.shape
    rows = np.kron(np.eye(m), np.ones((1, n)))
    columns = np.kron(np.ones((1, m)), np.eye(n))
    marginals = np.concatenate([np.full(m, 1 / m), np.full(n, 1 / n)])
    return float(linprog(costs.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals).fun)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (0, 2), (4, 5)], ids="padding-{0[0]}-{0[1]}".format)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 5), (5, 5), (7, 3), (9, 13)], ids=str)
@pytest.mark.parametrize(("iterations", "bound"), [(50, 4e-3), (200, 1e-3)], ids=["as-published", "converged"])
def test_the_distance_is_that_of_the_linear_programme(
    m: int, n: int, padding: tuple[int, int], dtype: torch.dtype, iterations: int, bound: float
) -> None:
    for seed in range(5):
        x, y, x_mask, y_mask = clouds(m, n, seed=seed, padding=padding, dtype=dtype)
        found = transport_distance(x, y, x_mask, y_mask, iterations=iterations)
        assert found.dtype == dtype
        exact = least_cost(cosine_costs(x, y)[0, :m, :n].double().numpy())
        assert abs(float(found) - exact) < bound


def test_padding_changes_no_distance_and_gets_no_gradient() -> None:
    x, y, x_mask, y_mask = clouds(6, 4, seed=0, padding=(3, 2))
    x.requires_grad_()
    found = transport_distance(x, y, x_mask, y_mask)
    bare = transport_distance(x[:, :6], y[:, :4], x_mask[:, :6], y_mask[:, :4])
    torch.testing.assert_close(found, bare, rtol=1e-13, atol=1e-13)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad[:, :6].any()
    assert not x.grad[:, 6:].any()


def test_the_plan_moves_all_mass_and_none_of_the_padding() -> None:
    x, y, x_mask, y_mask = clouds(6, 4, seed=0, padding=(3, 2))
    plan = transport_plan(cosine_costs(x, y), x_mask, y_mask, beta=0.5, iterations=50)
    torch.testing.assert_close(plan.sum(2)[x_mask], torch.full((6,), 1 / 6).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(plan.sum(1)[y_mask], torch.full((4,), 1 / 4).double(), rtol=0, atol=1e-3)
    assert not plan[:, 6:].any()
    assert not plan[:, :, 4:].any()


def test_gradients_flow_through_the_costs_and_not_through_the_plan() -> None:
    x, y, x_mask, y_mask = clouds(5, 4, seed=1)
    x.requires_grad_()
    (found,) = torch.autograd.grad(transport_distance(x, y, x_mask, y_mask).sum(), x)
    plan = transport_plan(cosine_costs(x, y).detach(), x_mask, y_mask, beta=0.5, iterations=50)
    (expected,) = torch.autograd.grad((cosine_costs(x, y) * plan).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_distance_of_low_precision_vectors_is_taken_in_float32() -> None:
    x, y, x_mask, y_mask = clouds(5, 4, seed=1, dtype=torch.bfloat16)
    found = transport_distance(x, y, x_mask, y_mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, transport_distance(x.float(), y.float(), x_mask, y_mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transport_distance(x.float(), y.float(), x_mask, y_mask), found)


def test_masks_of_another_shape_are_refused() -> None:
    x, y, x_mask, y_mask = clouds(5, 4, seed=1)
    with pytest.raises(ShapeError, match="expected masks of shape"):
        transport_distance(x, y, y_mask, x_mask)


@pytest.mark.parametrize("kind", [UniterModel, UniterForVQA, UniterForPretraining], ids=lambda kind: kind.__name__)
def test_a_model_says_which_fields_it_takes(kind: Any) -> None:
    named = {
        name
        for cls in (UniterModel, kind)
        for name, parameter in inspect.signature(cls.forward).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert kind.fields == named - ({"img_masks"} if kind is UniterForVQA else set())


@pytest.mark.parametrize(("words", "boxes"), [(0, 3), (2, 0), (0, 0)])
def test_an_empty_set_is_at_no_distance_and_leaves_the_other_rows_alone(words: int, boxes: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 8).double().requires_grad_(), torch.randn(2, 3, 8).double()
    x_mask, y_mask = torch.ones(2, 4).bool(), torch.ones(2, 3).bool()
    x_mask[1, words:], y_mask[1, boxes:] = False, False
    found = transport_distance(x, y, x_mask, y_mask)
    torch.testing.assert_close(found[0], transport_distance(x[:1], y[:1], x_mask[:1], y_mask[:1])[0])
    assert found[1] == 0
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient[0].any()
    assert not gradient[1].any()
