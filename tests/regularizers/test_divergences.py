"""The divergences of row blocks and their gradients are those of the expressions written out, in bounded memory."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import TOLERANCE
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advvl import KL, SymmetricKL
from advvl.regularizers import divergences
from advvl.regularizers.divergences import Head, Kind

pytestmark = pytest.mark.slow

HEADS: list[Head] = ["softmax", "sigmoid"]
KINDS: list[Kind] = ["clean||perturbed", "perturbed||clean", "symmetric"]
each_head = pytest.mark.parametrize("head", HEADS)
each_kind = pytest.mark.parametrize("kind", KINDS)
compute = divergences.divergences


@pytest.fixture(autouse=True)
def _always_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergences, "SMALL", -1)


def written_out(clean: Tensor, perturbed: Tensor, mask: Tensor | None, *, kind: Kind, head: Head) -> Tensor:
    """The rows' divergences as one expression of whole tensors, for autograd to differentiate."""
    wide = torch.promote_types(clean.dtype, torch.float32)
    if mask is not None:
        clean, perturbed = (torch.where(mask.bool()[..., None], x, 0) for x in (clean, perturbed))
    clean, perturbed = clean.to(wide), perturbed.to(wide)
    if head == "softmax":
        outcomes = [(clean.log_softmax(-1), perturbed.log_softmax(-1))]
    else:
        outcomes = [(F.logsigmoid(s * clean), F.logsigmoid(s * perturbed)) for s in (1, -1)]
    rows = torch.zeros((), dtype=wide)
    for c, p in outcomes:
        terms = {
            "clean||perturbed": c.exp() * (c - p),
            "perturbed||clean": p.exp() * (p - c),
            "symmetric": (c.exp() - p.exp()) * (c - p),
        }[kind]
        rows = rows + terms.sum(-1)
    return rows


def logits(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * drawn).to(dtype).requires_grad_()


def with_gradients(compute: Any, *inputs: Any, cotangent: Tensor, **options: Any) -> list[Tensor]:
    value = compute(*inputs, **options)
    return [value.detach(), *torch.autograd.grad(value, inputs[:2], cotangent)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int]:
    """Both sides' logits, a mask, a cotangent of the rows, and the rows of a block."""
    leading = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    shape, seed = (*leading, draw(st.integers(1, 9))), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(leading, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    cotangent = torch.randn(leading, generator=generator, dtype=torch.float64)
    sides = logits(*shape, seed=seed + 1), logits(*shape, seed=seed + 2)
    return *sides, draw(st.sampled_from([None, mask, mask.long()])), cotangent, draw(st.integers(1, 70))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from(KINDS), st.sampled_from(HEADS), st.booleans(), st.booleans())
def test_values_and_gradients_are_those_of_the_expression_written_out(
    case: Any, kind: Kind, head: Head, small: bool, readable: bool
) -> None:
    clean, perturbed, mask, cotangent, at_once = case
    as_small = patch.object(divergences, "SMALL", 2**19) if small else nullcontext()
    on_host = patch.object(divergences, "_readable", lambda _: readable)
    with as_small, on_host, patch.object(divergences, "_rows_at_once", lambda *_: at_once):
        ours = with_gradients(compute, clean, perturbed, mask, cotangent=cotangent, kind=kind, head=head)
    plain = with_gradients(written_out, clean, perturbed, mask, cotangent=cotangent, kind=kind, head=head)
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arrange", [lambda x: x.mT, lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1, -1)])
@each_head
def test_logits_may_lie_in_memory_as_they_like(head: Head, arrange: Any) -> None:
    sides, cotangent = (logits(4, 6, 6, seed=1), logits(4, 6, 6, seed=2)), torch.randn(4, 6, dtype=torch.float64)

    def of(compute: Any) -> list[Tensor]:
        value = compute(*map(arrange, sides), None, kind="symmetric", head=head)
        return [value.detach(), *torch.autograd.grad(value, sides, cotangent[:, : value.shape[1]])]

    for mine, expected in zip(of(compute), of(written_out), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@each_kind
@each_head
def test_gradients_are_those_of_the_value(kind: Kind, head: Head) -> None:
    clean, perturbed = logits(3, 4, seed=1), logits(3, 4, seed=2)
    for sides in ((clean, perturbed), (clean, perturbed.detach()), (clean.detach(), perturbed)):
        assert torch.autograd.gradcheck(lambda c, p: compute(c, p, None, kind=kind, head=head), sides)


@each_kind
@each_head
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 2, ("float16",) * 2, ("float32", "bfloat16")], ids="-".join)
def test_narrow_logits_are_widened_and_get_gradients_of_their_dtype(
    kind: Kind, head: Head, masked: bool, dtypes: tuple[str, str]
) -> None:
    clean, perturbed = (logits(5, 7, seed=i, dtype=getattr(torch, d)) for i, d in enumerate(dtypes))
    mask = torch.tensor([1, 0, 1, 1, 0]) if masked else None
    ours = with_gradients(compute, clean, perturbed, mask, cotangent=torch.ones(5), kind=kind, head=head)
    sides = [x.detach().double().requires_grad_() for x in (clean, perturbed)]
    plain = with_gradients(written_out, *sides, mask, cotangent=torch.ones(5).double(), kind=kind, head=head)
    assert [x.dtype for x in ours] == [torch.float32, clean.dtype, perturbed.dtype]
    for mine, expected in zip(ours, plain, strict=True):
        tolerance = TOLERANCE[mine.dtype]
        torch.testing.assert_close(mine.double(), expected, rtol=tolerance, atol=tolerance * 1e-2)


@each_head
def test_a_loss_scale_keeps_fp16_gradients_from_vanishing(head: Head) -> None:
    clean = logits(2, 9, seed=1, dtype=torch.float16)
    perturbed = (clean.detach() + 2**-8).requires_grad_()
    perturbed.data[:, 0] -= 2**-7
    scale, average = 2.0**16, 1e-4
    ours = with_gradients(
        compute, clean, perturbed, cotangent=torch.full((2,), scale * average), kind="symmetric", head=head
    )
    sides = [x.detach().double().requires_grad_() for x in (clean, perturbed)]
    plain = with_gradients(
        written_out, *sides, None, cotangent=torch.full((2,), average).double(), kind="symmetric", head=head
    )
    for mine, expected in zip(ours[1:], plain[1:], strict=True):
        assert expected.abs().min() < 2**-24  # the least that fp16 holds
        torch.testing.assert_close(mine.double() / scale, expected, rtol=2e-3, atol=expected.abs().max().item() * 1e-3)


@each_kind
@each_head
def test_fp32_is_as_near_to_the_truth_as_the_expression_written_out(kind: Kind, head: Head) -> None:
    clean = logits(4, 5000, seed=1, dtype=torch.float32)
    perturbed = (clean.detach() + 0.1 * logits(4, 5000, seed=2, dtype=torch.float32).detach()).requires_grad_()
    ones = torch.ones(4)
    ours = with_gradients(compute, clean, perturbed, cotangent=ones, kind=kind, head=head)
    plain = with_gradients(written_out, clean, perturbed, None, cotangent=ones, kind=kind, head=head)
    wide = [x.detach().double().requires_grad_() for x in (clean, perturbed)]
    truth = with_gradients(written_out, *wide, None, cotangent=ones.double(), kind=kind, head=head)
    for mine, theirs, expected in zip(ours, plain, truth, strict=True):
        assert (mine - expected).norm() <= 4 * (theirs - expected).norm() + 1e-7 * expected.norm()  # by two bits


@each_kind
def test_sigmoids_near_one_keep_their_digits(kind: Kind) -> None:
    sides = [torch.tensor([[x, -x]], requires_grad=True) for x in (12.0, 12.5)]
    found = with_gradients(compute, *sides, cotangent=torch.ones(1), kind=kind, head="sigmoid")
    wide = [x.detach().double().requires_grad_() for x in sides]
    expected = with_gradients(written_out, *wide, None, cotangent=torch.ones(1).double(), kind=kind, head="sigmoid")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=TOLERANCE[torch.float32], atol=0)


def every_pair_of_rows(*entries: float, dtype: torch.dtype) -> list[Tensor]:
    rows = list(itertools.product(entries, repeat=3))
    return [torch.tensor(x, dtype=dtype).requires_grad_() for x in zip(*itertools.product(rows, rows), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@each_kind
@each_head
def test_the_largest_logits_get_their_true_gradients_and_nan_still_shows(
    kind: Kind, head: Head, dtype: torch.dtype
) -> None:
    """Small logits for the sigmoid head alone: the softmax of the expression written out overflows there."""
    largest, wide = torch.finfo(dtype).max, torch.promote_types(dtype, torch.float32)
    # in fp64, which for fp64 has room at a fraction of the logits alone: there all above 3 grows as they do
    fraction = 2.0**-9 if dtype == torch.float64 else 1.0
    sides = every_pair_of_rows(*(x * fraction for x in (-largest, 0, largest)), dtype=torch.float64)
    ones = torch.ones(len(sides[0]), dtype=torch.float64)
    truth = with_gradients(written_out, *sides, None, cotangent=ones, kind=kind, head=head)
    value, *gradients = (torch.where(x.abs() > 3, x / fraction, x) for x in truth)
    decided = (value / torch.finfo(wide).max - 1).abs() > 1e-2  # not on the brink of overflowing
    for small in (-1, 2**19) if head == "sigmoid" else (-1,):
        sides = every_pair_of_rows(-largest, 0, largest, dtype=dtype)
        with patch.object(divergences, "SMALL", small):
            found = with_gradients(compute, *sides, cotangent=ones.to(wide), kind=kind, head=head)
            spoiled = [x.detach().index_fill(1, torch.tensor(0), torch.nan).requires_grad_() for x in sides]
            of_nan = [
                with_gradients(compute, *pair, cotangent=ones.to(wide), kind=kind, head=head)
                for pair in ((spoiled[0], sides[1]), (sides[0], spoiled[1]))
            ]
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(found[0][decided], value.to(wide)[decided], rtol=tolerance, atol=tolerance)
        for mine, expected in zip(found[1:], gradients, strict=True):
            assert ((mine - expected).abs() <= tolerance * (1 + expected.abs().amax(-1, keepdim=True))).all()
        assert all(x.reshape(len(ones), -1)[:, 0].isnan().all() for x in itertools.chain(*of_nan))


@pytest.mark.parametrize("offset", [100.0, 1e4])
@each_kind
def test_an_offset_of_one_side_costs_no_digits(kind: Any, offset: float) -> None:
    """In fp32, far above the size of the gap: what is lost is what the logits themselves had lost."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(8, 1000, generator=generator).add(offset).requires_grad_()
    perturbed = (clean.detach() - offset + 1e-2 * torch.randn(8, 1000, generator=generator)).requires_grad_()
    found, expected = [], []
    for into, dtype in ((found, torch.float32), (expected, torch.float64)):
        a, b = (x.detach().to(dtype).requires_grad_() for x in (clean, perturbed))
        rows = compute(a, b, kind=kind, head="softmax")
        into += [rows.detach(), *torch.autograd.grad(rows.sum(), [a, b])]
    # a divergence is of second order in the gap, so the terms of one direction all but cancel in its value
    for one, other, allowed in zip(found, expected, (3e-2, 1e-3, 1e-3), strict=True):
        assert (one - other).norm() <= allowed * other.norm()


@each_head
def test_a_side_made_from_the_other_is_differentiated_once_for_each_path(head: Any) -> None:
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def value(x: Tensor) -> Tensor:
        clean = 2 * x
        return compute(clean, 3 * clean.sin(), kind="symmetric", head=head).sum()

    (plain,) = torch.autograd.grad(value(x), x)
    (again,) = torch.autograd.grad(value(x), x, create_graph=True)
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradgradcheck(value, (x[:2].detach().requires_grad_(),))


def test_an_offset_that_both_sides_share_changes_nothing() -> None:
    clean, perturbed = logits(3, 50, seed=1, dtype=torch.float32), logits(3, 50, seed=2, dtype=torch.float32)
    on_a_grid = [(x.detach() * 256).round() / 256 for x in (clean, perturbed)]  # so that adding is exact
    for kind in KINDS:
        at_zero = compute(*on_a_grid, kind=kind, head="softmax")
        torch.testing.assert_close(compute(*(x + 8192 for x in on_a_grid), kind=kind, head="softmax"), at_zero)


def loss_of(kind: Kind, head: Head) -> Callable[..., Tensor]:
    return lambda clean, perturbed, mask=None: compute(clean, perturbed, mask, kind=kind, head=head).square().sum()


def summed(of: Callable[..., Any]) -> Callable[..., Tensor]:
    """A number that has every entry in it, to differentiate once more."""
    return lambda *inputs: sum(x.sin().sum() for x in tree_leaves(of(*inputs)))


@pytest.mark.parametrize("sides", [(0, 1), (0,), (1,)], ids=["both", "clean", "perturbed"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@each_kind
@each_head
def test_functional_gradients_are_those_of_autograd_and_so_are_theirs(
    kind: Kind, head: Head, masked: bool, sides: tuple[int, ...]
) -> None:
    inputs, mask = (logits(3, 4, seed=1), logits(3, 4, seed=2)), torch.tensor([1, 0, 1]) if masked else None
    loss, bare = loss_of(kind, head), [x.detach() for x in inputs]
    expected = torch.autograd.grad(loss(*inputs, mask), [inputs[i] for i in sides])
    once = torch.autograd.grad(loss(*inputs, mask), [inputs[i] for i in sides], create_graph=True)
    twice = torch.autograd.grad(summed(lambda: once)(), inputs)
    torch.testing.assert_close(grad(loss, sides)(*bare, mask), expected, rtol=1e-12, atol=1e-12)
    found = grad(summed(grad(loss, sides)), (0, 1))(*bare, mask)
    torch.testing.assert_close(found, twice, rtol=1e-12, atol=1e-12)
    through = torch.autograd.grad(summed(grad(loss, sides))(*inputs, mask), inputs)  # one inside the other
    torch.testing.assert_close(through, twice, rtol=1e-12, atol=1e-12)


AXES = [(0, 0), (2, -2), (None, 0), (0, None), (0, 0, None), (2, 1, 1), (None, 0, 0), (0, None, None), (None, None, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("axes", AXES, ids=str)
@each_kind
@each_head
def test_vmap_takes_each_example_as_if_alone(kind: Kind, head: Head, axes: tuple[int | None, ...]) -> None:
    """Axes of examples: of the clean logits, the perturbed, and of the mask where there is one."""
    loss = loss_of(kind, head)
    mask = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    stacks = [x.detach() for x in (logits(5, 3, 4, seed=1), logits(5, 3, 4, seed=2), mask)]
    inputs = [x[0] if axis is None else x.movedim(0, axis) for x, axis in zip(stacks, axes, strict=False)]
    alone = [[x[0 if axis is None else i] for x, axis in zip(stacks, axes, strict=False)] for i in range(5)]
    for of in (loss, grad(loss, (0, 1)), grad(summed(grad(loss, (0, 1))), (0, 1))):
        each = zip(*(tree_leaves(of(*example)) for example in alone), strict=True)
        for mine, expected in zip(tree_leaves(vmap(of, axes)(*inputs)), each, strict=True):
            torch.testing.assert_close(mine, torch.stack(expected), rtol=1e-12, atol=1e-12)


@each_kind
@each_head
def test_jacobians_are_those_of_the_expression_written_out(kind: Kind, head: Head) -> None:
    inputs, mask = [logits(3, 4, seed=i).detach() for i in (1, 2)], torch.tensor([True, False, True])
    ours, plain = (partial(f, mask=mask, kind=kind, head=head) for f in (compute, written_out))
    for order in (lambda f: jacrev(f, (0, 1)), lambda f: jacrev(jacrev(f, (0, 1)), (0, 1))):
        torch.testing.assert_close(order(ours)(*inputs), order(plain)(*inputs), rtol=1e-12, atol=1e-12)
    pulls = [vjp(f, *inputs)[1] for f in (ours, plain)]
    cotangent = torch.tensor([1.0, torch.nan, 2.0]).double()
    torch.testing.assert_close(pulls[0](cotangent), pulls[1](cotangent), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on its way to the refusal
@each_head
def test_forward_mode_is_refused_rather_than_wrong(head: Head) -> None:
    x, along = logits(3, 4, seed=1).detach(), logits(3, 4, seed=2).detach()
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda c: compute(c, along, kind="symmetric", head=head), (x,), (along,))
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(grad(lambda c: compute(c, along, kind="symmetric", head=head).sum()), (x,), (along,))


class Watched(TorchDispatchMode):
    """Counts the bytes of storages made inside it while they live, and the rows that softmaxes see."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.rows = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.rows += len(args[0])
        for storage in self._storages(out):
            if id(storage) not in known and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _storages(self, out: Any) -> Iterator[Any]:
        return (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor))

    def _free(self, size: int) -> None:
        self.now -= size


ROWS, CLASSES, AT_ONCE = 128, 512, 4
TEMPORARIES = 10 * AT_ONCE * CLASSES * 4 + 8 * ROWS * 8  # of a block, and vectors of a number a row


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@each_kind
@each_head
def test_only_wanted_gradients_are_of_the_logits_size(
    kind: Kind, head: Head, wanted: tuple[bool, bool], dtype: torch.dtype, masked: bool
) -> None:
    sides = [logits(ROWS, CLASSES, seed=i, dtype=dtype).detach().requires_grad_(w) for i, w in enumerate(wanted)]
    mask = torch.arange(ROWS) % 3 == 0 if masked else None
    with patch.object(divergences, "_rows_at_once", lambda *_: AT_ONCE):
        with Watched() as forward:
            value = compute(*sides, mask, kind=kind, head=head).sum()
        assert forward.peak <= TEMPORARIES
        assert forward.now <= 2 * ROWS * 8  # the rows, and nothing kept for the backward but what was given
        if any(wanted):
            with Watched() as backward:
                gradients = torch.autograd.grad(value, [x for x in sides if x.requires_grad])
            assert backward.peak <= sum(wanted) * sides[0].nbytes + TEMPORARIES
            assert len(gradients) == sum(wanted)


@pytest.mark.slow
@each_kind
@each_head
def test_gradients_that_can_be_differentiated_in_turn_take_no_more_memory(kind: Kind, head: Head) -> None:
    sides, loss = [logits(ROWS, CLASSES, seed=i, dtype=torch.float32) for i in (1, 2)], loss_of(kind, head)
    bare = [x.detach() for x in sides]
    with patch.object(divergences, "_rows_at_once", lambda *_: AT_ONCE):
        for gradients in (
            lambda: torch.autograd.grad(loss(*sides), sides, create_graph=True),
            lambda: grad(loss, (0, 1))(*bare),
            lambda: vmap(grad(loss, (0, 1)))(*(x.view(8, -1, CLASSES) for x in bare)),
        ):
            with Watched() as watched:
                gradients()
            assert 2 * sides[0].nbytes <= watched.peak <= 2 * sides[0].nbytes + TEMPORARIES


def test_the_watch_sees_what_the_expression_written_out_makes() -> None:
    sides = [logits(ROWS, CLASSES, seed=i, dtype=torch.float32) for i in (1, 2)]
    with Watched() as watched:
        value = written_out(*sides, None, kind="symmetric", head="softmax").sum()
        torch.autograd.grad(value, sides)
    assert watched.peak >= 6 * sides[0].nbytes


def test_blocks_are_bounded_in_bytes_but_for_single_rows() -> None:
    limit = divergences.CPU_BLOCK_PER_THREAD * torch.get_num_threads()
    for shape in ((64, 300), (512, 28996), (1, 10**7)):
        for device, most in (("cpu", limit), ("meta", divergences.DEVICE_BLOCK)):
            at_once = divergences._rows_at_once(torch.empty(shape, device=device), 4)
            assert at_once == 1 or at_once * shape[1] * 4 <= most < (at_once + 1) * shape[1] * 4


def test_small_logits_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sides = logits(64, 300, seed=1), logits(64, 300, seed=2)
    assert "Divergences" not in str(compute(*sides, kind="symmetric", head="softmax").grad_fn)
    sides = logits(64, 3129, seed=1), logits(64, 3129, seed=2)
    assert "Divergences" in str(compute(*sides, kind="symmetric", head="softmax").grad_fn)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("readable", [True, False], ids=["host", "device"])
@each_kind
@each_head
def test_rows_that_do_not_count_may_hold_anything_and_on_the_host_are_not_computed(
    kind: Kind, head: Head, readable: bool, junk: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergences, "_readable", lambda _: readable)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    sides = [logits(2, 3, 4, seed=i).detach() for i in (1, 2)]
    for x in sides:
        x[~mask] = junk
        x.requires_grad_()
    cotangent = torch.where(mask, 1.0, torch.nan).double()
    with Watched() as watched:
        value, *gradients = with_gradients(compute, *sides, mask, cotangent=cotangent, kind=kind, head=head)
    computed = 3 if readable else 6
    assert watched.rows == (4 * computed if head == "softmax" else 0)  # two sides, forward and backward
    assert not value[~mask].any()
    assert value[mask].isfinite().all()
    for gradient in gradients:
        assert not gradient[~mask].any()
        assert gradient[mask].isfinite().all()


@each_head
def test_each_side_may_want_no_gradient(head: Head) -> None:
    clean, perturbed = logits(3, 4, seed=1), logits(3, 4, seed=2)
    both = with_gradients(compute, clean, perturbed, cotangent=torch.ones(3).double(), kind="symmetric", head=head)
    for wanted, (c, p) in enumerate([(clean, perturbed.detach()), (clean.detach(), perturbed)]):
        value = compute(c, p, kind="symmetric", head=head).sum()
        gradient = torch.autograd.grad(value, [clean, perturbed][wanted])[0]
        torch.testing.assert_close(gradient, both[1 + wanted], rtol=0, atol=0)
    with torch.no_grad():
        assert not compute(clean, perturbed, kind="symmetric", head=head).requires_grad
    assert not compute(clean.detach(), perturbed.detach(), kind="symmetric", head=head).requires_grad


def test_a_retained_graph_gives_the_same_gradients_again_and_leaves_add_them_up() -> None:
    clean, perturbed = logits(3, 4, seed=1), logits(3, 4, seed=2)
    value = SymmetricKL()(clean, perturbed)
    value.backward(retain_graph=True)
    once = clean.grad.clone()
    (2 * value).backward()
    torch.testing.assert_close(clean.grad, 3 * once, rtol=1e-12, atol=0)


def test_one_tensor_on_both_sides_gets_both_gradients() -> None:
    x = logits(3, 4, seed=1)
    assert not torch.autograd.grad(SymmetricKL()(2 * x, x.detach()) - SymmetricKL()(x.detach(), 2 * x), x)[0].any()
    value = KL()(x, x)
    assert value == 0
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], torch.zeros_like(x), rtol=0, atol=1e-16)


@pytest.mark.slow
@each_kind
@each_head
def test_gradients_can_be_differentiated_in_turn(kind: Kind, head: Head) -> None:
    clean, perturbed, mask = logits(3, 4, seed=1), logits(3, 4, seed=2), torch.tensor([True, False, True])
    for sides in ((clean, perturbed), (clean, perturbed.detach()), (clean.detach(), perturbed)):
        assert torch.autograd.gradgradcheck(lambda c, p: compute(c, p, mask, kind=kind, head=head), sides)
    assert torch.autograd.gradgradcheck(lambda x: compute(x, x, kind=kind, head=head), (clean,), atol=1e-9)


@each_kind
@each_head
def test_autocast_narrows_nothing(kind: Kind, head: Head) -> None:
    clean, perturbed = logits(3, 40, seed=1, dtype=torch.float32), logits(3, 40, seed=2, dtype=torch.float32)
    options: Any = {"cotangent": torch.ones(3), "kind": kind, "head": head}
    outside = with_gradients(compute, clean, perturbed, **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradients(compute, clean, perturbed, **options)
    for mine, expected in zip(inside, outside, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


@pytest.mark.slow
@each_head
def test_it_compiles_into_one_graph(head: Head) -> None:
    torch.compiler.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    mask, sides = torch.tensor([True, False, True]), [logits(3, 4, seed=i).detach() for i in (1, 2)]
    sides[0][1] = torch.nan
    inputs, cotangent = [x.requires_grad_() for x in sides], torch.tensor([1.0, torch.nan, 2.0]).double()
    options: Any = {"cotangent": cotangent, "kind": "symmetric", "head": head}
    inside = with_gradients(compiled, *inputs, mask, **options)
    outside = with_gradients(compute, *inputs, mask, **options)
    for mine, expected in zip(inside, outside, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
