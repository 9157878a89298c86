"""The Triton kernels against the reference: on a GPU where there is one, else on the CPU under Triton's interpreter.

The interpreter has to be chosen before triton is first imported, which other test files do; so without a GPU these run
in a process of their own, which the first test starts. One by one: `TRITON_INTERPRET=1 pytest tests/ops/test_triton.py`.
The interpreter truncates when it casts to bf16: there that dtype is held to the reference within a unit in the last place,
and to its ball on a GPU only.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.compiled import KERNELS, Compiled, Launch
from torch import Tensor

from advvl import ops
from advvl.errors import ConfigurationError
from advvl.ops import Move, Region, Rows, Stepped, _reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_norm = pytest.mark.parametrize("norm", ["l2", "linf"])
each_per = pytest.mark.parametrize("per", ["sample", "token"])
each_path = pytest.mark.parametrize("triton_ops", ["rows", "blocks"], indirect=True)


# The interpreter's numpy warns of an infinity or NaN where the device just makes one.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRETED, reason="they run in this process")
def test_the_kernels_pass_these_tests_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled")
@pytest.mark.parametrize("longest", [0, 2**14], ids=["blocks", "rows"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_launch_compiles_for_a_gpu(norm: ops.Norm, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows neither types nor scopes as the compiler does."""
    from advvl.ops import _triton

    launches: list[Launch] = []
    for name in KERNELS:
        monkeypatch.setattr(_triton, name, Compiled(getattr(_triton, name), launches))
    monkeypatch.setattr(_triton, "_LONGEST", longest)
    delta = torch.zeros(2, 3, 1600, dtype=torch.float16 if norm == "l2" else torch.bfloat16)
    rows = Rows(norm=norm, mask=torch.ones(2, 3, dtype=torch.bool))
    boxed = Region(radius=1.0, box=(0.0, 1.0), x=delta.double())
    _triton.move([Move(delta=delta, grad=delta.float(), step_size=0.1, rows=rows, region=boxed)], inplace=True)
    one = Move(delta=delta[:1, :1], grad=delta[:1, :1], step_size=0.1, rows=Rows(norm=norm, per="token"), rule="sign")
    _triton.move([one], inplace=False)
    _triton.move([replace(one, rule="plain", region=Region(radius=1.0))], inplace=False)
    _triton.project(delta.float(), Rows(norm=norm, segments=torch.tensor([0, 0])), Region(radius=1.0))
    short = delta[..., :100].float()
    _triton.project(short, Rows(norm=norm, segments=torch.tensor([0, 0])), Region(radius=1.0))
    _triton.norms(delta, rows)
    kernels = {launch.name.removesuffix("_kernel") for launch in launches}
    packed = {"sums", "verdict", "apply"} if norm == "l2" else {"apply"}  # however short the rows are
    assert kernels == packed | ({"rows"} if longest else {"sums", "norms"})


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    if GPU:
        return "cuda"
    if not INTERPRETED:
        pytest.skip("runs in the process with the interpreter, see the first test")
    from triton.runtime.interpreter import InterpretedFunction

    call, known = InterpretedFunction.__call__, {"advvl.ops._kernels"}

    def quick(self: InterpretedFunction, *args: object, **options: object) -> object:
        """Every call of a helper patches what its module sees of triton anew, most of the time taken; once is enough."""
        if self.fn.__module__ in known:
            return self.rewrite()(*args, **options)
        known.add(self.fn.__module__)
        return call(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "__call__", quick)
    return "cpu"


@pytest.fixture
def triton_ops(device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The back end, on the path asked for: a row to a program, or cut into blocks. What is not written is NaN or true."""
    from advvl.ops import _triton

    if getattr(request, "param", "rows") == "blocks":
        monkeypatch.setattr(_triton, "_LONGEST", 0)
        monkeypatch.setattr(_triton, "_BLOCK", 8)
        monkeypatch.setattr(_triton, "_WAVE", 3)  # fewer programs than blocks judge a row

    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(made: Tensor) -> Tensor:
        return made.fill_(True if made.dtype == torch.bool else math.nan)

    monkeypatch.setattr(torch, "empty", lambda *size, **options: poisoned(empty(*size, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: poisoned(empty_like(like, **options)))
    return _triton


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lengths(delta: Tensor) -> list[float]:
    """The norm of each sample's stored entries, in fp64, without under- or overflow."""
    return [math.hypot(*row) for row in delta.double().flatten(1).tolist()]


def on(one: Move, device: str) -> Move:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    rows = replace(one.rows, mask=moved(one.rows.mask), segments=moved(one.rows.segments))
    region = replace(one.region, x=moved(one.region.x))
    return replace(one, delta=one.delta.to(device), grad=one.grad.to(device), rows=rows, region=region)


def assert_same(got: Stepped, expected: Stepped, size: float = 1.0) -> None:
    """Equal but for one rounding of storage; entries of this size may cancel in fp32."""
    got = Stepped(*(tensor.cpu() for tensor in got))
    eps = torch.finfo(expected.delta.dtype).eps
    torch.testing.assert_close(got.delta, expected.delta, rtol=2 * 2**-23 + (eps > 2**-23) * eps, atol=2**-22 * size)
    torch.testing.assert_close(
        got.grad_norm, expected.grad_norm, rtol=3 * 2**-23, atol=0.0, equal_nan=True, check_dtype=False
    )
    torch.testing.assert_close(got.delta_norm, expected.delta_norm, rtol=3 * 2**-23 + (eps > 2**-23) * eps, atol=1e-45)
    assert torch.equal(got.finite, expected.finite)


def check(triton_ops: ModuleType, device: str, one: Move, size: float = 1.0) -> Stepped:
    """The move of the reference, and the norm of what was stored."""
    (got,) = triton_ops.move([on(one, device)], inplace=False)
    assert_same(got, _reference.move([one], inplace=False)[0], size)
    stored = _reference.norms(got.delta.cpu(), one.rows)
    torch.testing.assert_close(got.delta_norm.cpu(), stored, rtol=3 * 2**-23, atol=1e-45)
    return got


def check_still(triton_ops: ModuleType, device: str, one: Move) -> None:
    """The projection and the norms of the reference, without a move."""
    there = on(one, device)
    projected = triton_ops.project(there.delta, there.rows, there.region).cpu()
    expected = _reference.project(one.delta, one.rows, one.region)
    eps = torch.finfo(one.delta.dtype).eps
    torch.testing.assert_close(projected, expected, rtol=2 * 2**-23 + (eps > 2**-23) * eps, atol=0.0)
    norms = triton_ops.norms(there.delta, there.rows).cpu()
    torch.testing.assert_close(norms, _reference.norms(one.delta, one.rows), rtol=3 * 2**-23, atol=0.0)


# --- the reference, over what there is to choose ---


@each_path
@each_dtype
@each_norm
@each_per
def test_the_kernels_do_what_the_reference_does(
    triton_ops: ModuleType, device: str, dtype: torch.dtype, norm: ops.Norm, per: ops.Per
) -> None:
    shape = (2, 3, 11)
    delta, grad, x = 0.2 * randn(*shape), randn(*shape, seed=1), 0.3 * randn(*shape, seed=2).clamp(-1, 1)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    for poisoned in (delta, grad, x):
        poisoned[~mask] = math.nan
    one = Move(delta=delta.to(dtype), grad=grad.to(dtype), step_size=0.1, rows=Rows(norm=norm, per=per, mask=mask))
    plain = replace(one, delta=one.delta.nan_to_num(), grad=one.grad.nan_to_num(), rows=Rows(norm=norm, per=per))
    ball = Region(radius=0.4 if norm == "l2" else 0.25)
    boxed = replace(one, region=replace(ball, x=x.to(dtype), box=(-0.2, 0.25)))  # x is outside it in places
    check(triton_ops, device, plain)
    check(triton_ops, device, replace(plain, region=ball, rule="sign"))
    check(triton_ops, device, replace(plain, region=ball, rule="plain"))
    check(triton_ops, device, boxed)
    check_still(triton_ops, device, boxed)


@each_path
@pytest.mark.parametrize("leading", [1, 2, 3, 4], ids=lambda n: f"mask{n}d")
@each_per
def test_a_mask_covers_any_leading_axes(triton_ops: ModuleType, device: str, leading: int, per: ops.Per) -> None:
    shape = (2, 3, 2, 5)
    mask = torch.rand(shape[:leading], generator=torch.Generator().manual_seed(leading)) > 0.4
    one = Move(delta=randn(*shape), grad=randn(*shape, seed=1), step_size=0.3, region=Region(radius=1.7))
    got = check(triton_ops, device, replace(one, rows=Rows(per=per, mask=mask)))
    assert not got.delta[~mask].any()
    assert got.delta[mask].all()


@each_path
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (5, 1), (3, 17), (2, 3, 16), (3, 2, 2, 13), (2, 1, 3, 2, 5)], ids=str
)
def test_rows_of_any_size_and_number(triton_ops: ModuleType, device: str, shape: tuple[int, ...]) -> None:
    one = Move(delta=randn(*shape), grad=randn(*shape, seed=1), step_size=0.3, region=Region(radius=1.1))
    check(triton_ops, device, one, size=3.0)
    check_still(triton_ops, device, one)
    check(triton_ops, device, replace(one, rows=Rows(per="token")), size=3.0)


@each_norm
@each_dtype
def test_packed_rows_move_with_their_sample(
    triton_ops: ModuleType, device: str, norm: ops.Norm, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_ops, "_BLOCK", 4)
    segments = torch.tensor([2, 0, 0, 2, 3])
    delta, grad = 0.2 * randn(5, 7, dtype=dtype), randn(5, 7, seed=1, dtype=dtype)
    mask = torch.tensor([True, True, False, True, True])
    one = Move(delta=delta, grad=grad, step_size=0.2, rows=Rows(norm=norm, segments=segments, mask=mask))
    check(triton_ops, device, replace(one, region=Region(radius=0.3)))
    check_still(triton_ops, device, replace(one, region=Region(radius=0.3)))
    check(triton_ops, device, replace(one, rule="sign"))
    check(triton_ops, device, replace(one, rule="plain", region=Region(radius=0.3)))
    grad[3, 2] = math.nan
    got = check(triton_ops, device, replace(one, region=Region(radius=9.0)))
    assert got.finite.tolist() == [True, True, False, True, True]
    by_token = replace(one, rows=replace(one.rows, per="token"), region=Region(radius=0.3))
    check(triton_ops, device, by_token)


@pytest.mark.parametrize("of_grad", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_delta", [torch.float32, torch.float16], ids=str)
def test_gradient_and_x_may_have_a_dtype_of_their_own(
    triton_ops: ModuleType, device: str, of_grad: torch.dtype, of_delta: torch.dtype
) -> None:
    x = randn(2, 3, 5, seed=2, dtype=of_grad).clamp(-1, 1)
    delta, grad = randn(2, 3, 5, dtype=of_delta), randn(2, 3, 5, seed=1, dtype=of_grad)
    check(triton_ops, device, Move(delta=delta, grad=grad, step_size=0.1, region=Region(box=(-1.0, 1.0), x=x)))


def test_modalities_of_one_call_do_not_meet(triton_ops: ModuleType, device: str) -> None:
    text = Move(delta=randn(2, 3, 7), grad=randn(2, 3, 7, seed=1), step_size=0.1, region=Region(radius=0.9))
    image = replace(text, delta=randn(2, 2, 30, seed=2), grad=randn(2, 2, 30, seed=3), rows=Rows(per="token"))
    pair = triton_ops.move([on(text, device), on(image, device)], inplace=False)
    for got, one in zip(pair, (text, image), strict=True):
        assert_same(got, _reference.move([one], inplace=False)[0])
    assert triton_ops.move([], inplace=False) == []


# --- numbers at the ends of the range, and none at all ---


@each_path
@each_norm
@pytest.mark.parametrize("floor", [0.0, 1e-8], ids=["no-floor", "floor"])
def test_gradients_of_any_size_give_the_step_of_the_reference(
    triton_ops: ModuleType, device: str, norm: ops.Norm, floor: float
) -> None:
    """One row a size; a row whose gradient is zero or not finite does not move."""
    sizes = torch.tensor([1e-44, 1e-30, 1e-9, 1.0, 1e30, 3e37, 0.0, 1.0, 1.0])
    delta, grad = 0.2 * randn(9, 19), randn(9, 19, seed=1).clamp(-9, 9) * sizes.unsqueeze(1)
    grad[7, 3], grad[8, 18] = math.inf, math.nan
    grad[8, 2] = -math.inf
    one = Move(delta=delta, grad=grad, step_size=0.1, rows=Rows(norm=norm), floor=floor, region=Region(radius=0.5))
    for rule in ("normalised", "sign"):
        got = check(triton_ops, device, replace(one, rule=rule))
        still = triton_ops.project(delta.to(device), one.rows, one.region)
        assert torch.equal(got.delta[6:], still[6:])
        assert not torch.equal(got.delta[5], still[5])
    assert got.finite.tolist() == [True] * 7 + [False] * 2


@each_path
@each_norm
@pytest.mark.parametrize("radius", [0.5, math.inf])
def test_a_plain_step_is_of_the_gradients_own_size(
    triton_ops: ModuleType, device: str, norm: ops.Norm, radius: float
) -> None:
    """One row a size; too long a step is not taken."""
    sizes = torch.tensor([1e-44, 1e-30, 1e-9, 1.0, 1e10, 1e30, 1.0, 3e37])
    delta, grad = 0.2 * randn(8, 19), randn(8, 19, seed=1).clamp(-9, 9) * sizes.unsqueeze(1)
    grad[6, 3] = math.nan
    one = Move(delta=delta, grad=grad, step_size=9.0, rows=Rows(norm=norm), rule="plain", region=Region(radius=radius))
    got = check(triton_ops, device, one, size=1e-30)
    still = triton_ops.project(delta.to(device), one.rows, one.region)
    assert torch.equal(got.delta[6:], still[6:])
    assert got.finite.tolist() == [True] * 6 + [False, True]


@each_path
@each_norm
def test_perturbations_and_radii_of_any_size(triton_ops: ModuleType, device: str, norm: ops.Norm) -> None:
    for size, radius in ((3e38, 1.0), (1e38, 1e-30), (1e-30, 1e-32), (1e-42, 1e-43), (1.0, 1e300), (1.0, 0.0)):
        delta = torch.full((2, 20), size)
        grad = randn(2, 20)
        for step_size in (0.0, 0.1 * min(radius, 1.0)):
            one = Move(delta=delta, grad=grad, step_size=step_size, rows=Rows(norm=norm), region=Region(radius=radius))
            expected = _reference.move([one], inplace=False)[0].delta
            got = triton_ops.move([on(one, device)], inplace=False)[0].delta.cpu()
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=3 * 2.0**-149)


@each_path
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_perturbation_that_is_not_finite_stays_as_it_is(
    triton_ops: ModuleType, device: str, norm: ops.Norm, dtype: torch.dtype
) -> None:
    delta = randn(3, 7, dtype=dtype)
    delta[0, 3], delta[1, 4] = math.inf, math.nan
    for step_size in (0.0, 0.1):
        one = Move(delta=delta, grad=randn(3, 7, seed=1), step_size=step_size, rows=Rows(norm=norm))
        one = replace(one, region=Region(radius=0.5))
        (got,) = triton_ops.move([on(one, device)], inplace=False)
        expected = _reference.move([one], inplace=False)[0].delta
        torch.testing.assert_close(got.delta.cpu(), expected, rtol=1e-3, atol=0.0, equal_nan=True)


def test_a_half_precision_row_that_the_cast_overflows_is_not_lengthened(triton_ops: ModuleType, device: str) -> None:
    delta, grad = torch.tensor([[6e4, 1.0]], dtype=torch.float16), torch.tensor([[1.0, 0.0]])
    one = Move(delta=delta, grad=grad, step_size=1e4, region=Region(radius=1e5))
    (got,) = triton_ops.move([on(one, device)], inplace=False)
    assert got.delta.tolist() == [[math.inf, 1.0]]


def test_a_row_longer_than_any_factor_can_scale_ends_inside_its_ball(triton_ops: ModuleType, device: str) -> None:
    delta = torch.full((1, 20), 3e38, device=device)
    for radius in (1.1e-42, 1.3e-42, 1.7e-42, 2.3e-42, 3.1e-42):
        assert lengths(triton_ops.project(delta, Rows(), Region(radius=radius)))[0] <= radius


@each_path
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_subnormal_radii_are_kept_to(triton_ops: ModuleType, device: str, norm: ops.Norm, dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    delta = (smallest * torch.tensor([[1.0], [2.0], [3.0], [9.0]], dtype=torch.float64)).repeat(1, 3).to(dtype)
    for multiple in (0.0, 0.5, 1.0, 1.7, 2.3, 5.5, 31.0):
        region = Region(radius=multiple * smallest)
        kept = triton_ops.project(delta.to(device), Rows(norm=norm), region)
        rows = lengths(kept) if norm == "l2" else kept.abs().amax(1).tolist()
        assert max(rows) <= region.radius
        assert torch.equal(triton_ops.project(kept, Rows(norm=norm), region), kept)
        short, zero = region.radius * (1 - 1e-6), torch.zeros_like(kept)  # of the surface, before rounding
        step = Move(delta=zero, grad=randn(4, 3).to(device), step_size=short, rows=Rows(norm=norm), region=region)
        (moved,) = triton_ops.move([step], inplace=False)
        rows = lengths(moved.delta) if norm == "l2" else moved.delta.abs().amax(1).tolist()
        assert max(rows) <= region.radius
        longest = delta[3].double().norm() if norm == "l2" else delta.max().double()
        if longest <= region.radius * (1 - 1e-6):
            assert torch.equal(kept.cpu(), delta)


@each_norm
@each_per
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 5)], ids=str)
def test_an_empty_perturbation_works(
    triton_ops: ModuleType, device: str, norm: ops.Norm, per: ops.Per, shape: tuple[int, ...]
) -> None:
    empty = torch.zeros(shape)
    one = Move(delta=empty, grad=empty, step_size=0.1, rows=Rows(norm=norm, per=per), region=Region(radius=1.0))
    got = check(triton_ops, device, one)
    assert got.delta.shape == shape
    assert triton_ops.move([on(one, device)], inplace=True)[0].delta.shape == shape


# --- inside the ball, in the storage dtype ---


@pytest.mark.parametrize(
    ("triton_ops", "entries"), [("rows", 1), ("rows", 3), ("rows", 61), ("blocks", 31)], indirect=["triton_ops"]
)
@each_dtype
def test_a_row_ends_inside_its_ball(triton_ops: ModuleType, device: str, dtype: torch.dtype, entries: int) -> None:
    """Rows short of, on and beyond the surface, moved outwards and not at all."""
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter truncates bf16")
    half = torch.finfo(dtype).eps
    ratios = torch.tensor([0.3, 1 - half / 2, 1 - 2**-23, 1.0, 1 + 2**-24, 1 + half / 2, 1e4], dtype=torch.float64)
    delta, grad = randn(7, entries, dtype=torch.float64), randn(7, entries, seed=1)
    unit = delta / torch.tensor(lengths(delta), dtype=torch.float64).unsqueeze(1) * ratios.unsqueeze(1)
    for radius in (0.37, 1.9):
        start, rows, region = (radius * unit).to(dtype).to(device), Rows(), Region(radius=radius)
        kept = triton_ops.project(start, rows, region)
        assert max(lengths(kept)) <= radius
        assert torch.equal(triton_ops.project(kept, rows, region), kept)
        assert torch.equal(kept[0], start[0])
        zero = torch.zeros_like(start)
        for one in (
            Move(delta=start, grad=grad.to(device), step_size=0.1 * radius, region=region),
            Move(delta=zero, grad=grad.to(device), step_size=radius * (1 - 0.02 * half), region=region),
        ):
            (got,) = triton_ops.move([one], inplace=False)
            assert max(lengths(got.delta)) <= radius
            assert torch.equal(triton_ops.project(got.delta, rows, region), got.delta)


@each_path
@pytest.mark.parametrize("segments", [None, [0, 0, 2]], ids=["padded", "packed"])
def test_a_step_that_nearly_reverses_the_perturbation_ends_inside_too(
    triton_ops: ModuleType, device: str, segments: list[int] | None
) -> None:
    """What is left of the row is mostly rounding, which no sum over perturbation and gradient knows of."""
    packed = None if segments is None else torch.tensor(segments)
    rows = Rows(segments=packed)
    delta = randn(1, 31).repeat(3, 1)
    length = float(_reference.norms(delta, rows)[0])
    for left in (1e-1, 1e-3, 1e-5, 1e-7):
        grad = left * randn(3, 31, seed=1) - delta
        free = Move(delta=delta, grad=grad, step_size=length, rows=rows)
        radius = 0.5 * float(_reference.move([free], inplace=False)[0].delta_norm[0])
        (got,) = triton_ops.move([on(replace(free, region=Region(radius=radius)), device)], inplace=False)
        inside = _reference.norms(got.delta.cpu().double(), rows)
        assert inside.max() <= radius
        assert inside[0] >= radius * (1 - 1e-5) or left < 1e-5  # nor is it short


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_of_many_blocks_ends_inside_its_ball(triton_ops: ModuleType, device: str, dtype: torch.dtype) -> None:
    delta, grad = randn(2, 140_003, dtype=dtype), randn(2, 140_003, seed=1, dtype=dtype)
    one = Move(delta=delta, grad=grad, step_size=0.3, region=Region(radius=0.37))
    got = check(triton_ops, device, one)
    assert max(lengths(got.delta)) <= 0.37
    assert torch.equal(triton_ops.project(got.delta, one.rows, one.region), got.delta)


# --- the tensors a user may bring ---


@each_path
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t.transpose(1, 2), id="transposed"),
        pytest.param(lambda t: t[:, ::2], id="sliced"),
        pytest.param(lambda t: t[:1].expand(4, -1, -1), id="expanded"),
        pytest.param(lambda t: t.requires_grad_(), id="requires-grad"),
    ],
)
def test_a_view_moves_like_its_copy(triton_ops: ModuleType, device: str, view: object) -> None:
    delta, grad = view(randn(2, 4, 6).to(device)), view(randn(2, 4, 6, seed=1).to(device))
    one = Move(delta=delta, grad=grad.detach(), step_size=0.1, region=Region(radius=0.9))
    copy = replace(one, delta=delta.detach().clone(), grad=grad.detach().clone())
    with torch.no_grad():
        (expected,) = triton_ops.move([copy], inplace=False)
        (got,) = triton_ops.move([one], inplace=False)
        assert torch.equal(got.delta, expected.delta)
        assert torch.equal(triton_ops.norms(delta, one.rows), triton_ops.norms(copy.delta, one.rows))
        if 0 not in delta.stride():
            triton_ops.move([one], inplace=True)
            assert torch.equal(delta, expected.delta)


@each_path
def test_in_place_writes_into_the_perturbation_it_was_given(triton_ops: ModuleType, device: str) -> None:
    delta = randn(2, 3, 7).to(device)
    one = Move(delta=delta, grad=randn(2, 3, 7, seed=1).to(device), step_size=0.1, region=Region(radius=0.9))
    (fresh,) = triton_ops.move([one], inplace=False)
    assert fresh.delta.data_ptr() != delta.data_ptr()
    version = delta._version
    (got,) = triton_ops.move([one], inplace=True)
    assert got.delta is delta
    assert torch.equal(delta, fresh.delta)
    assert delta._version > version  # a graph that has kept the old one finds out


def test_what_it_cannot_do_is_refused_with_the_reason(triton_ops: ModuleType, device: str) -> None:
    delta = torch.zeros(2, 3, device=device)
    elsewhere = torch.ones(2, dtype=torch.bool, device="meta")
    assert triton_ops.refusal(delta, Rows()) is None
    for dtype in DTYPES:
        assert triton_ops.refusal(delta.to(dtype), Rows()) is None
    assert "float16" in triton_ops.refusal(delta.double(), Rows())
    assert "meta" in triton_ops.refusal(delta.to("meta"), Rows())
    assert "the mask is on meta" in triton_ops.refusal(delta, Rows(mask=elsewhere))
    assert "the segments is on meta" in triton_ops.refusal(delta, Rows(segments=elsewhere.long()))
    assert "units of their own" in triton_ops.refusal(delta, Rows(unit=torch.ones(2, device=device)))
    with pytest.raises(ConfigurationError, match=r"'triton': it computes in fp32.*float64; available: \['reference'"):
        ops.norms(delta.double(), backend="triton")
    assert torch.equal(ops.norms(delta + 1, norm="linf", backend="triton"), torch.ones(2, device=device))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_a_cpu_tensor_is_refused_without_the_interpreter() -> None:
    with pytest.raises(ConfigurationError, match="'triton': it needs a CUDA tensor, not one on cpu; available"):
        ops.norms(torch.zeros(2, 3), backend="triton")


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@each_path
def test_a_move_can_be_captured_in_a_graph_and_never_waits_for_the_host(triton_ops: ModuleType, device: str) -> None:
    delta, grad = randn(4, 3, 50).to(device), randn(4, 3, 50, seed=1).to(device)
    one = Move(delta=delta, grad=grad, step_size=0.1, region=Region(radius=0.9))
    (expected,) = triton_ops.move([one], inplace=False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_ops.move([one], inplace=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (got,) = triton_ops.move([one], inplace=False)
    for tensor in got:
        tensor.zero_()
    graph.replay()
    for replayed, eager in zip(got, expected, strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("longest", [0, 2**14], ids=["blocks", "rows"])
def test_offsets_beyond_two_to_the_31_are_reached(
    triton_ops: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    monkeypatch.setattr(triton_ops, "_LONGEST", longest)
    rows, size = 2**18 + 1, 2**13
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    delta = torch.zeros(rows, size, dtype=torch.bfloat16, device=device)
    grad = torch.zeros_like(delta)
    grad[-1] = 1
    (got,) = triton_ops.move([Move(delta=delta, grad=grad, step_size=1.0)], inplace=True)
    assert not got.delta[:-1].any()
    torch.testing.assert_close(got.delta[-1].float(), torch.full((size,), size**-0.5, device=device), rtol=1e-2, atol=0)
