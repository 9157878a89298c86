"""The laws of step and projection, over all inputs: sizes 0, 1 and primes, every storage dtype, both norms.

Each is a law of every back end that runs here: `on` is one of them. The kernels for CUDA have a module of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import assume, currently_in_test_context, given, reject, settings
from hypothesis import strategies as st
from support.compare import TOLERANCE
from support.draws import generator, randn
from torch import Tensor

from advvl import ops
from advvl.errors import ConfigurationError, ShapeError
from advvl.ops import _cpu, _reference

DTYPES = list(TOLERANCE)
NORMS = ["l2", "linf"]
PERS = ["sample", "token"]
RULES = ["normalised", "sign", "plain"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_norm = pytest.mark.parametrize("norm", NORMS)
each_per = pytest.mark.parametrize("per", PERS)
# A row's length relative to the radius: deep inside, within a rounding of the surface, outside, far outside.
INSIDE = (0.0, 0.3, 1 - 1e-3, 1 - 2e-6)
RATIOS = (*INSIDE, 1 - 1e-7, 1.0, 1 + 1e-7, 1.004, 3.0, 1e4)
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=150)


@dataclass(frozen=True)
class On:
    """The ops by one back end."""

    name: ops.Backend

    def step_and_project(self, delta: Tensor, grad: Tensor, **options) -> ops.Stepped:
        return self._call(ops.step_and_project, delta, grad, **options)

    def project(self, delta: Tensor, **options) -> Tensor:
        return self._call(ops.project, delta, **options)

    def norms(self, delta: Tensor, **options) -> Tensor:
        return self._call(ops.norms, delta, **options)

    def _call(self, op: Callable, *tensors: Tensor, **options) -> object:
        packed = options.get("segments") is not None and options.get("per") != "token"
        if packed and self.name == "cpu":
            reject() if currently_in_test_context() else pytest.skip("refused: see the tests of refusal")
        return op(*tensors, backend=self.name, **options)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "on" in metafunc.fixturenames:
        metafunc.parametrize("on", [On("reference"), On("cpu")], ids=lambda on: on.name)


@dataclass
class Case:
    """A perturbation, a gradient, and where they live."""

    delta: Tensor
    grad: Tensor
    radius: float
    norm: str
    per: str
    mask: Tensor | None
    segments: Tensor | None
    seed: int

    @property
    def place(self) -> dict:
        return {"norm": self.norm, "per": self.per, "mask": self.mask, "segments": self.segments}

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """To which row each entry belongs, in the order of `flatten()`."""
        owners = []
        for index in torch.cartesian_prod(*[torch.arange(n) for n in self.delta.shape]).reshape(-1, self.delta.ndim):
            position = tuple(index.tolist())
            if self.per == "token":
                owners.append(position[:-1])
            else:
                owners.append((position[0] if self.segments is None else int(self.segments[position[0]]),))
        return owners

    def exact_norms(self, delta: Tensor) -> list[float]:
        """Each row's norm of the stored numbers, in fp64, without under- or overflow."""
        entries: dict[tuple[int, ...], list[float]] = {}
        for owner, entry in zip(self.rows, delta.double().flatten().tolist(), strict=True):
            entries.setdefault(owner, []).append(entry)
        return [math.hypot(*e) if self.norm == "l2" else max(map(abs, e)) for e in entries.values()]


@st.composite
def cases(
    draw: st.DrawFn, *, masked: bool | None = None, smallest: float = 0.0, ratios: tuple[float, ...] = RATIOS
) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.one_of(
            st.tuples(st.sampled_from([0, 1, 2, 3]), st.sampled_from([0, 1, 2, 5]), st.sampled_from([1, 2, 7, 13])),
            st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 11])),
        )
    )
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    norm, per = draw(st.sampled_from(NORMS)), draw(st.sampled_from(PERS))
    stored = torch.finfo(dtype)
    radii = [
        0.0,
        stored.tiny * stored.eps * 1.5,
        stored.tiny * 1.3,
        stored.tiny * 1e3,
        1e-3,
        0.1,
        1.0,
        37.7,
        stored.max,
    ]
    radius = draw(st.sampled_from([r for r in radii if smallest <= r < 1e300]))
    delta = torch.randn(shape, generator=generator, dtype=torch.float64)
    size = draw(st.sampled_from(ratios)) * radius
    flat = delta.flatten(1) if per == "sample" else delta
    length = flat.abs().amax(-1) if norm == "linf" and flat.numel() else torch.linalg.vector_norm(flat, dim=-1)
    delta = delta / length.reshape(*length.shape, *[1] * (delta.ndim - length.ndim)).clamp(min=1e-9) * size
    delta = delta.clamp(-stored.max, stored.max).to(dtype)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-6, 4))
    grad = (grad * (torch.rand(shape[:1], generator=generator) > 0.2).reshape(-1, *[1] * (len(shape) - 1))).to(dtype)
    mask = (
        torch.rand(shape[:-1], generator=generator) > 0.3
        if draw(st.booleans() if masked is None else st.just(masked))
        else None
    )
    segments = torch.randint(0, max(shape[0], 1), shape[:1], generator=generator) if draw(st.booleans()) else None
    return Case(delta, grad, radius, norm, per, mask, segments, seed)


# --- law 1: inside the ball, in the storage dtype ---


@pytest.mark.slow
@repeatable
@given(case=cases())
def test_a_projected_row_is_inside_the_ball_in_its_storage_dtype(on: On, case: Case) -> None:
    projected = on.project(case.delta, radius=case.radius, **case.place)
    assert projected.dtype == case.delta.dtype
    assert projected.shape == case.delta.shape
    assert all(norm <= case.radius for norm in case.exact_norms(projected))


@pytest.mark.slow
@repeatable
@given(
    case=cases(),
    rule=st.sampled_from(RULES),
    relative=st.sampled_from([0.3, 1 - 1e-3, 1 - 1e-4, 1 - 1e-7, 1.0, 1 + 1e-7, 7.0]),
    from_zero=st.booleans(),
)
def test_a_stepped_row_is_inside_the_ball_in_its_storage_dtype(
    on: On, case: Case, rule: str, relative: float, from_zero: bool
) -> None:
    step_size = relative * case.radius
    assume(step_size < 1e30)
    start = torch.zeros_like(case.delta) if from_zero else case.delta
    stepped = on.step_and_project(start, case.grad, step_size=step_size, radius=case.radius, rule=rule, **case.place)
    assert stepped.delta.dtype == case.delta.dtype
    assert all(norm <= case.radius for norm in case.exact_norms(stepped.delta))


@pytest.mark.slow
@repeatable
@given(case=cases(), low=st.sampled_from([0.0, -1.0, -2.117904, -100.0]), width=st.sampled_from([1.0, 2.0, 4.757904]))
def test_a_row_in_a_box_is_inside_the_ball_and_the_box(on: On, case: Case, low: float, width: float) -> None:
    high = low + width
    draw = torch.rand(case.delta.shape, generator=generator(case.seed), dtype=torch.float64)
    x = (low + width * draw).to(case.delta.dtype).clamp(low, high)
    assume(bool((x.double() >= low).all() and (x.double() <= high).all()))
    boxed = on.project(case.delta, radius=case.radius, x=x, box=(low, high), **case.place)
    assert all(norm <= case.radius for norm in case.exact_norms(boxed))
    assert torch.equal(on.project(boxed, radius=case.radius, x=x, box=(low, high), **case.place), boxed)
    margin = torch.finfo(case.delta.dtype).eps * max(abs(low), abs(high), width)
    total = x.double() + boxed.double()
    if case.mask is not None:
        total = total[case.mask]
    assert bool(((total >= low - margin) & (total <= high + margin)).all())


@each_dtype
def test_pixels_stay_between_zero_and_one_to_the_bit(on: On, dtype: torch.dtype) -> None:
    x = torch.rand(4, 3, 17, 17, generator=generator(), dtype=torch.float64).to(dtype)
    delta = randn(4, 3, 17, 17, dtype=dtype)
    stepped = on.step_and_project(
        delta, randn(4, 3, 17, 17, seed=1, dtype=dtype), step_size=0.3, radius=0.9, norm="linf", x=x, box=(0.0, 1.0)
    )
    total = x + stepped.delta
    assert total.min() >= 0
    assert total.max() <= 1
    assert ((total == 0) | (total == 1)).float().mean() > 0.2  # the box was met


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_box_around_a_half_precision_tensor_is_measured_in_the_precision_of_the_delta(
    on: On, stored: torch.dtype
) -> None:
    x = torch.rand(5, 31, generator=generator(3)).to(stored)
    radius = 0.7
    delta = on.project(randn(5, 31, seed=4, dtype=torch.float32), radius=radius, norm="linf", x=x, box=(0.0, 1.0))
    total = x.double() + delta.double()
    assert total.min() >= 0
    assert total.max() <= 1
    assert delta.abs().max() <= radius


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("entries", [1, 2, 7, 5003, 100_003, 100_352], ids=lambda n: f"D{n}")
def test_a_row_outside_by_less_than_its_norm_can_show_is_projected_inside(
    on: On, dtype: torch.dtype, entries: int
) -> None:
    for seed in range(30 if entries < 1000 else 6):
        delta = randn(1, entries, seed=seed, dtype=dtype)
        exact = math.hypot(*delta.double().flatten().tolist())
        for radius in (math.nextafter(exact, 0), exact * (1 - 3e-9), exact * (1 - 2e-8)):
            projected = on.project(delta, radius=radius)
            assert math.hypot(*projected.double().flatten().tolist()) <= radius


@pytest.mark.slow
@each_dtype
def test_a_long_packed_sample_is_inside_too(on: On, dtype: torch.dtype) -> None:
    """Its squares are summed one row after another, which rounds more than any other sum."""
    segments = torch.zeros(100_003, dtype=torch.long)
    for seed in range(3):
        delta = randn(100_003, 1, seed=seed, dtype=dtype)
        exact = math.hypot(*delta.double().flatten().tolist())
        for radius in (math.nextafter(exact, 0), 0.37):
            projected = on.project(delta, radius=radius, segments=segments)
            assert math.hypot(*projected.double().flatten().tolist()) <= radius
            assert torch.equal(on.project(projected, radius=radius, segments=segments), projected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("entries", [1, 2, 3, 17])
def test_a_step_that_storage_would_round_out_of_the_ball_stays_inside(on: On, dtype: torch.dtype, entries: int) -> None:
    short = torch.finfo(dtype).eps
    for seed in range(50):
        grad = randn(1, entries, seed=seed, dtype=dtype)
        for shorter in (0.1 * short, 0.2 * short, 0.4 * short):
            radius = 0.37 * (1 + 1e-2 * seed)
            stepped = on.step_and_project(
                torch.zeros(1, entries, dtype=dtype), grad, step_size=radius * (1 - shorter), radius=radius
            )
            assert math.hypot(*stepped.delta.double().flatten().tolist()) <= radius


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("kept", DTYPES, ids=str)
def test_a_box_only_ever_shortens(on: On, stored: torch.dtype, kept: torch.dtype) -> None:
    x = (2 * torch.rand(1, 500, generator=generator(), dtype=torch.float64) - 1).to(stored)
    beyond = torch.cat([(1 - x.double()), -1 - x.double()]) + 1e-12 * torch.tensor([[1.0], [-1.0]])
    delta = beyond.to(kept)
    boxed = on.project(delta, radius=math.inf, x=x.expand(2, 500), box=(-1.0, 1.0))
    assert (boxed.abs() <= delta.abs()).all()
    torch.testing.assert_close(boxed.double(), beyond, rtol=0.0, atol=TOLERANCE[kept] + 2e-7)


def test_a_box_around_a_double_is_measured_in_double(on: On) -> None:
    x = torch.tensor([[0.9999999, 1e-8]], dtype=torch.float64)
    boxed = on.project(torch.tensor([[0.5, -0.5]]), radius=math.inf, x=x, box=(0.0, 1.0))
    torch.testing.assert_close(x + boxed.double(), torch.tensor([[1.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("padding", [(-9.0, 9.0), (math.nan, math.inf)], ids=str)
def test_padding_outside_the_box_is_left_alone(on: On, padding: tuple[float, float]) -> None:
    x = torch.tensor([[[0.5, 0.2], padding]])
    mask = torch.tensor([[True, False]])
    boxed = on.project(torch.ones(1, 2, 2), radius=9.0, mask=mask, x=x, box=(0.0, 1.0))
    torch.testing.assert_close(boxed, torch.tensor([[[0.5, 0.8], [0.0, 0.0]]]))
    assert not boxed[0, 1].any()


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("entries", [5003, 200_003, 200_192], ids=lambda n: f"D{n}")
def test_long_rows_are_inside_too(on: On, dtype: torch.dtype, entries: int) -> None:
    for seed in range(4):
        delta = randn(1, entries, seed=seed, dtype=dtype)
        for radius in (0.37, 1.0, 11.3):
            projected = on.project(delta, radius=radius)
            assert math.hypot(*projected.double().flatten().tolist()) <= radius
            assert torch.equal(on.project(projected, radius=radius), projected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e20, 1e37])
def test_long_rows_whose_squares_fp32_does_not_hold_are_inside_too(on: On, dtype: torch.dtype, scale: float) -> None:
    delta = randn(2, 65_536) * scale
    for radius in (10 * scale, 1000 * scale):
        projected = on.project(delta.to(dtype), radius=radius).double()
        assert all(math.hypot(*row) <= radius for row in projected.tolist())
        expected = delta.to(dtype).double() * min(1.0, radius / (256 * scale))
        torch.testing.assert_close(projected, expected, rtol=0.02, atol=0.0)


@each_dtype
def test_subnormal_radii_are_kept_to(on: On, dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for multiple, entries, length, norm in product((0.5, 1.0, 1.4, 1.7, 2.3, 5.5, 31.0), (1, 2, 5, 7), (1, 2), NORMS):
        radius = multiple * smallest
        delta = torch.full((1, entries), length * smallest, dtype=torch.float64).to(dtype)
        kept = [entry / smallest for entry in on.project(delta, radius=radius, norm=norm).double().flatten().tolist()]
        assert (math.hypot(*kept) if norm == "l2" else max(kept)) <= radius / smallest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_norms_do_not_overflow(on: On, dtype: torch.dtype) -> None:
    big = torch.full((2, 3, 1000), 6e4, dtype=dtype)
    expected = big.double()[0].norm().float()
    torch.testing.assert_close(on.norms(big), expected.expand(2), rtol=1e-6, atol=0.0)
    stepped = on.step_and_project(torch.zeros_like(big), big, step_size=1.0)
    torch.testing.assert_close(stepped.grad_norm, expected.expand(2), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(on.norms(stepped.delta), torch.ones(2), rtol=1e-2, atol=0.0)
    projected = on.project(big, radius=1.0)
    torch.testing.assert_close(on.norms(projected), torch.ones(2), rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_huge_perturbation_keeps_its_direction_when_projected(on: On, dtype: torch.dtype) -> None:
    delta = 3e38 * (1 - torch.arange(100.0) / 200).reshape(1, 100).to(dtype)
    for radius in (1.0, 1e-6):
        projected = on.project(delta, radius=radius).double()
        direction = delta.double() / delta.double().norm()
        torch.testing.assert_close(projected, radius * direction, rtol=TOLERANCE[dtype], atol=0.0)
        assert math.hypot(*projected.flatten().tolist()) <= radius


@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
def test_a_row_that_is_not_finite_keeps_no_other_out_of_its_ball(on: On, bad: float) -> None:
    delta = randn(3, 40, dtype=torch.float32)
    delta[1, 7] = bad
    projected = on.project(delta, radius=0.5)
    torch.testing.assert_close(projected[1], delta[1], rtol=0.0, atol=0.0, equal_nan=True)
    torch.testing.assert_close(projected[[0, 2]], on.project(delta[[0, 2]], radius=0.5), rtol=3e-7, atol=0.0)


@each_norm
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_the_direction_of_a_step_does_not_depend_on_the_size_of_the_gradient(
    on: On, norm: str, dtype: torch.dtype
) -> None:
    grad = randn(3, 5, 7)
    steps = [
        on.step_and_project(
            torch.zeros(3, 5, 7, dtype=torch.float64), (grad * scale).to(dtype), step_size=0.1, norm=norm
        ).delta
        for scale in (1e-30, 1e-8, 1.0, 1e8, 1e30)
    ]
    for step in steps:
        torch.testing.assert_close(step, steps[2], rtol=2 * TOLERANCE[dtype], atol=1e-8)


@each_norm
@pytest.mark.parametrize("scale", [1e-40, 8e-40, 1e37])
@pytest.mark.parametrize("step_size", [1e-9, 1e-4, 1e4])
def test_no_gradient_is_too_small_or_too_large_to_step_along(on: On, norm: str, scale: float, step_size: float) -> None:
    grad = (randn(3, 5, 7) * scale).float()
    wide = grad.double().flatten(1)
    length = wide.norm(dim=1) if norm == "l2" else wide.abs().amax(1)
    stepped = on.step_and_project(torch.zeros_like(grad), grad, step_size=step_size, norm=norm)
    expected = step_size * wide / length[:, None]
    torch.testing.assert_close(stepped.delta.flatten(1).double(), expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(stepped.grad_norm.double(), length, rtol=1e-5, atol=1e-44)


# --- law 2: zeros, infinities, nothing at all ---


@each_norm
@each_per
@each_dtype
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("floor", [0.0, 1e-8], ids=["no-floor", "floor"])
def test_a_zero_gradient_does_not_move(
    on: On, norm: str, per: str, dtype: torch.dtype, rule: str, floor: float
) -> None:
    delta = randn(2, 3, 5, dtype=dtype)
    stepped = on.step_and_project(
        delta, torch.zeros_like(delta), step_size=0.1, norm=norm, per=per, rule=rule, floor=floor
    )
    assert torch.equal(stepped.delta, delta)
    assert not stepped.grad_norm.any()
    assert stepped.finite.all()


@each_norm
@each_per
@each_dtype
@pytest.mark.parametrize("radius", [0.0, 1e-30, 1.0, math.inf])
def test_a_zero_perturbation_stays_zero(on: On, norm: str, per: str, dtype: torch.dtype, radius: float) -> None:
    zero = torch.zeros(2, 3, 5, dtype=dtype)
    assert torch.equal(on.project(zero, radius=radius, norm=norm, per=per), zero)


@pytest.mark.slow
@repeatable
@given(case=cases())
def test_without_a_radius_nothing_is_projected(on: On, case: Case) -> None:
    projected = on.project(case.delta, radius=math.inf, norm=case.norm, per=case.per)
    assert torch.equal(projected, case.delta)


@pytest.mark.slow
@repeatable
@given(case=cases())
def test_a_radius_of_zero_leaves_exactly_zero(on: On, case: Case) -> None:
    stepped = on.step_and_project(case.delta, case.grad, step_size=0.5, radius=0.0, **case.place)
    assert not stepped.delta.any()


@each_norm
@each_dtype
def test_a_radius_of_zero_takes_even_the_smallest_number(on: On, norm: str, dtype: torch.dtype) -> None:
    smallest = torch.full((1, 1), torch.finfo(dtype).tiny * torch.finfo(dtype).eps, dtype=torch.float64).to(dtype)
    assert smallest.item() > 0
    assert on.project(smallest, radius=0.0, norm=norm).item() == 0


@each_norm
@each_per
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 5)], ids=str)
def test_an_empty_perturbation_works(on: On, norm: str, per: str, shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    stepped = on.step_and_project(empty, empty, step_size=0.1, radius=1.0, norm=norm, per=per)
    rows = shape[:1] if per == "sample" else shape[:-1]
    assert stepped.delta.shape == shape
    assert stepped.grad_norm.shape == stepped.delta_norm.shape == stepped.finite.shape == rows
    assert stepped.finite.all()
    assert on.norms(empty, norm=norm, per=per).shape == rows
    assert on.project(empty, radius=1.0, norm=norm, per=per).shape == shape


@each_norm
@each_per
def test_a_masked_out_sample_does_not_move(on: On, norm: str, per: str) -> None:
    mask = torch.tensor([[True, True], [False, False]])
    stepped = on.step_and_project(
        randn(2, 2, 3), randn(2, 2, 3, seed=1), step_size=0.1, radius=1.0, norm=norm, per=per, mask=mask
    )
    assert not stepped.delta[1].any()
    assert stepped.delta[0].all()
    assert stepped.finite.all()


@each_norm
@each_per
def test_the_floor_is_the_published_one(on: On, norm: str, per: str) -> None:
    """Step · g / max(|g|, floor), for gradients above, at and below the floor."""
    floor = 1e-8
    for scale in (1e-30, 1e-12, 1e-9, 1e-8, 1.0):
        grad = randn(3, 4, 5) * scale
        rows = grad.flatten(1) if per == "sample" else grad
        size = rows.norm(dim=-1) if norm == "l2" else rows.abs().amax(-1)
        size = size.reshape(*size.shape, *[1] * (3 - size.ndim))
        stepped = on.step_and_project(torch.zeros_like(grad), grad, step_size=0.1, norm=norm, per=per, floor=floor)
        torch.testing.assert_close(stepped.delta, 0.1 * grad / size.clamp(min=floor), rtol=1e-12, atol=0.0)


@each_norm
def test_without_a_floor_a_tiny_gradient_steps_as_far_as_a_large_one(on: On, norm: str) -> None:
    for scale in (1e-30, 1.0):
        grad = (randn(3, 4, 5) * scale).float()
        stepped = on.step_and_project(torch.zeros_like(grad), grad, step_size=0.1, norm=norm)
        torch.testing.assert_close(stepped.delta_norm, torch.full((3,), 0.1), rtol=1e-6, atol=0.0)


# --- law 3: masks, padding, and no coupling of samples ---


@pytest.mark.slow
@repeatable
@given(case=cases(masked=True), rule=st.sampled_from(RULES))
def test_a_masked_position_is_exactly_zero_whatever_its_gradient(on: On, case: Case, rule: str) -> None:
    grad = case.grad.clone()
    grad[~case.mask] = math.nan
    stepped = on.step_and_project(case.delta, grad, step_size=0.1, radius=case.radius, rule=rule, **case.place)
    clean = on.step_and_project(case.delta, case.grad, step_size=0.1, radius=case.radius, rule=rule, **case.place)
    assert not stepped.delta[~case.mask].any()
    assert stepped.finite.all()
    for got, expected in zip(stepped, clean, strict=True):
        assert torch.equal(got, expected)


@each_norm
@each_per
@each_dtype
def test_padding_changes_nothing(on: On, norm: str, per: str, dtype: torch.dtype) -> None:
    delta, grad = randn(3, 5, 7, dtype=dtype), randn(3, 5, 7, seed=1, dtype=dtype)
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    options = {"step_size": 0.1, "radius": 0.9, "norm": norm, "per": per}
    short = on.step_and_project(delta, grad, mask=mask, **options)
    pad = torch.full((3, 6, 7), 7.0, dtype=dtype)
    long_mask = torch.cat([mask, torch.zeros(3, 6, dtype=torch.bool)], 1)
    long = on.step_and_project(torch.cat([delta, pad], 1), torch.cat([grad, pad], 1), mask=long_mask, **options)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(long.delta[:, :5], short.delta, **tolerance)
    rows = (slice(None), slice(5)) if per == "token" else (slice(None),)
    torch.testing.assert_close(long.grad_norm[rows], short.grad_norm, **tolerance)
    torch.testing.assert_close(long.delta_norm[rows], short.delta_norm, **tolerance)


@each_norm
@each_per
@each_dtype
def test_samples_do_not_see_one_another(on: On, norm: str, per: str, dtype: torch.dtype) -> None:
    delta, grad = randn(5, 3, 7, dtype=dtype), randn(5, 3, 7, seed=1, dtype=dtype)
    grad[1] *= 1000
    options = {"step_size": 0.1, "radius": 0.9, "norm": norm, "per": per}
    together = on.step_and_project(delta, grad, **options)
    order = torch.tensor([3, 0, 4, 2, 1])
    for got, expected in zip(on.step_and_project(delta[order], grad[order], **options), together, strict=True):
        assert torch.equal(got, expected[order])
    for i in range(5):
        alone = on.step_and_project(delta[i : i + 1], grad[i : i + 1], **options)
        torch.testing.assert_close(alone.delta[0], together.delta[i], rtol=2 * torch.finfo(dtype).eps, atol=0.0)


@each_norm
@each_dtype
def test_packed_rows_move_like_the_padded_ones_they_are(on: On, norm: str, dtype: torch.dtype) -> None:
    lengths = [4, 0, 1, 3]
    delta, grad = randn(4, 4, 7, dtype=dtype), randn(4, 4, 7, seed=1, dtype=dtype)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    options = {"step_size": 0.1, "radius": 0.9, "norm": norm}
    padded = on.step_and_project(delta, grad, mask=mask, **options)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    packed = on.step_and_project(delta[mask], grad[mask], segments=segments, **options)
    tolerance = {"rtol": max(2 * torch.finfo(dtype).eps, 1e-13), "atol": 0.0}
    torch.testing.assert_close(packed.delta, padded.delta[mask], **tolerance)
    assert packed.grad_norm.shape == (8,)
    torch.testing.assert_close(packed.grad_norm[:4], padded.grad_norm, **tolerance)
    torch.testing.assert_close(packed.delta_norm[:4], padded.delta_norm, **tolerance)
    assert not packed.grad_norm[4:].any()


# --- law 4: what a projection is ---


@pytest.mark.slow
@repeatable
@given(case=cases())
def test_projecting_twice_is_projecting_once_to_the_bit(on: On, case: Case) -> None:
    once = on.project(case.delta, radius=case.radius, **case.place)
    assert torch.equal(on.project(once, radius=case.radius, **case.place), once)


@pytest.mark.slow
@repeatable
@given(case=cases(ratios=INSIDE))
def test_inside_the_ball_less_its_margin_nothing_changes(on: On, case: Case) -> None:
    """The margin: 19 units in the last place of fp32 (fp64 for fp64), and less than a subnormal number."""
    wide = torch.float64 if case.delta.dtype == torch.float64 else torch.float32
    edge = case.radius * (1 - 19 * torch.finfo(wide).eps)
    assume(all(norm <= edge for norm in case.exact_norms(case.delta)))
    mask = torch.ones_like(case.delta, dtype=torch.bool)
    if case.mask is not None:
        mask = case.mask.unsqueeze(-1).expand_as(case.delta)
    projected = on.project(case.delta, radius=case.radius, **case.place)
    assert torch.equal(projected, torch.where(mask, case.delta, 0))


@pytest.mark.slow
@repeatable
@given(case=cases(masked=False, smallest=1e-3), scale=st.sampled_from([0.1, 0.99, 1.0, 1.5]))
def test_projection_brings_no_two_points_further_apart(on: On, case: Case, scale: float) -> None:
    noise = torch.randn(case.delta.shape, generator=generator(case.seed + 1), dtype=torch.float64)
    other = (case.delta.double() * scale + case.radius * 0.3 * noise).clamp(-6e4, 6e4).to(case.delta.dtype)
    a = on.project(case.delta, radius=case.radius, **case.place).double()
    b = on.project(other, radius=case.radius, **case.place).double()
    before, after = case.exact_norms(case.delta.double() - other.double()), case.exact_norms(a - b)
    margin = 4 * torch.finfo(case.delta.dtype).eps * case.radius * (1 + math.sqrt(case.delta.numel()))
    assert all(y <= x + margin for x, y in zip(before, after, strict=True))


@each_dtype
@each_per
@pytest.mark.parametrize("radius", [0.1, 1.0, 2.5])
def test_projection_is_the_plain_formula(on: On, dtype: torch.dtype, per: str, radius: float) -> None:
    delta = randn(5, 3, 7, dtype=dtype) * torch.tensor([0.01, 0.5, 1.0, 2.0, 9.0], dtype=dtype).reshape(5, 1, 1)
    wide = delta.double()
    length = wide.flatten(1).norm(dim=1).reshape(5, 1, 1) if per == "sample" else wide.norm(dim=2, keepdim=True)
    torch.testing.assert_close(
        on.project(delta, radius=radius, per=per).double(),
        wide * (radius / length).clamp(max=1),
        rtol=TOLERANCE[dtype],
        atol=0.0,
    )
    torch.testing.assert_close(
        on.project(delta, radius=radius, per=per, norm="linf").double(),
        wide.clamp(-radius, radius),
        rtol=TOLERANCE[dtype],
        atol=0.0,
    )


@each_norm
@each_per
def test_a_step_is_the_plain_formula(on: On, norm: str, per: str) -> None:
    delta, grad, step_size, radius = randn(3, 4, 5), randn(3, 4, 5, seed=1), 0.7, 2.0

    def size(values: Tensor) -> Tensor:
        rows = values.flatten(1) if per == "sample" else values
        lengths = rows.norm(dim=-1) if norm == "l2" else rows.abs().amax(-1)
        return lengths.reshape(*lengths.shape, *[1] * (3 - lengths.ndim))

    def into(values: Tensor) -> Tensor:
        return values * (radius / size(values)).clamp(max=1) if norm == "l2" else values.clamp(-radius, radius)

    options = {"step_size": step_size, "radius": radius, "norm": norm, "per": per}
    stepped = on.step_and_project(delta, grad, **options)
    torch.testing.assert_close(stepped.delta, into(delta + step_size * grad / size(grad)), rtol=1e-12, atol=0.0)
    rows = (3,) if per == "sample" else (3, 4)
    torch.testing.assert_close(stepped.grad_norm, size(grad).reshape(rows), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(stepped.delta_norm, size(stepped.delta).reshape(rows), rtol=1e-12, atol=0.0)
    signed = on.step_and_project(delta, grad, rule="sign", **options)
    torch.testing.assert_close(signed.delta, into(delta + step_size * grad.sign()), rtol=1e-12, atol=0.0)
    plain = on.step_and_project(delta, grad, rule="plain", **options)
    torch.testing.assert_close(plain.delta, into(delta + step_size * grad), rtol=1e-12, atol=0.0)


@each_norm
@each_per
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_a_plain_step_too_long_to_be_stored_is_not_taken(on: On, norm: str, per: str, dtype: torch.dtype) -> None:
    delta = randn(2, 3, 5, dtype=dtype)
    grad = torch.ones_like(delta)
    grad[0] = torch.finfo(dtype).max / 20
    for radius in (1e3, math.inf):
        stepped = on.step_and_project(delta, grad, step_size=9.0, norm=norm, per=per, rule="plain", radius=radius)
        assert torch.equal(stepped.delta[0], delta[0])
        torch.testing.assert_close(stepped.delta[1], delta[1] + 9, rtol=1e-6, atol=0.0)
        assert stepped.finite.all()


# --- rows with units of their own ---


@each_norm
@each_per
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("radius", [0.05, 0.4, math.inf])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_step_size_and_radius_are_in_the_unit_of_each_row(
    norm: str, per: str, rule: str, radius: float, packed: bool
) -> None:
    """Each row comes out as it does with the two numbers multiplied by its unit."""
    delta, grad, mask = 0.2 * randn(4, 3, 5), randn(4, 3, 5, seed=1), torch.rand(4, 3, generator=generator()) > 0.3
    owners = torch.tensor([1, 0, 1, 3]) if packed else torch.arange(4)
    units = torch.tensor([0.0, 0.5, 1.0, 7.0], dtype=torch.float64)
    place = {"norm": norm, "per": per, "rule": rule, "mask": mask, "segments": owners if packed else None}
    unit = units if per == "sample" else units[owners][:, None].expand(4, 3)
    got = ops.step_and_project(delta, grad, step_size=0.1, radius=radius, unit=unit, **place)
    del place["rule"]
    still = ops.project(delta, radius=radius, unit=unit, **place)
    for sample, factor in enumerate(units.tolist()):
        bound = radius * factor if math.isfinite(radius) else radius
        rows = owners == sample
        alone = ops.step_and_project(delta, grad, step_size=0.1 * factor, radius=bound, rule=rule, **place)
        torch.testing.assert_close(got.delta[rows], alone.delta[rows], rtol=1e-12, atol=1e-15)
        kept = ops.project(delta, radius=bound, **place)
        torch.testing.assert_close(still[rows], kept[rows], rtol=1e-12, atol=0.0)


@pytest.mark.slow
@repeatable
@given(case=cases(), rule=st.sampled_from(RULES), seed=st.integers(0, 99))
def test_a_row_is_inside_the_ball_of_its_own_unit_in_its_storage_dtype(case: Case, rule: str, seed: int) -> None:
    rows = case.delta.shape[:-1] if case.per == "token" else case.delta.shape[:1]
    unit = 3 * torch.rand(rows, generator=generator(seed), dtype=torch.float64)
    stepped = ops.step_and_project(
        case.delta, case.grad, step_size=0.3, radius=case.radius, unit=unit, rule=rule, **case.place
    )
    order: dict[tuple[int, ...], None] = dict.fromkeys(case.rows)
    for norm, row in zip(case.exact_norms(stepped.delta), order, strict=True):
        assert norm <= case.radius * unit[row].item()
    again = ops.project(stepped.delta, radius=case.radius, unit=unit, **case.place)
    assert torch.equal(again, stepped.delta)


def test_a_unit_is_one_number_for_each_row() -> None:
    delta = torch.ones(2, 3, 5)
    with pytest.raises(ShapeError, match=r"expected a unit for each row of \(2, 3, 5\) per token, got \(2,\)"):
        ops.project(delta, radius=1.0, per="token", unit=torch.ones(2))
    with pytest.raises(ConfigurationError, match="'cpu': its rows have units of their own"):
        ops.project(delta, radius=1.0, unit=torch.ones(2), backend="cpu")


# --- law 5: gradients that are not finite ---


@each_norm
@each_per
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_row_with_a_gradient_that_is_not_finite_keeps_its_delta(
    on: On, norm: str, per: str, rule: str, bad: float, packed: bool
) -> None:
    delta, grad = randn(4, 3, 5), randn(4, 3, 5, seed=1)
    segments = torch.tensor([0, 1, 1, 2]) if packed else None
    options = {"step_size": 0.1, "norm": norm, "per": per, "rule": rule, "segments": segments}
    good = on.step_and_project(delta, grad, **options)
    grad[1, 2, 0] = bad
    stepped = on.step_and_project(delta, grad, **options)
    kept = torch.zeros(4, 3, dtype=torch.bool)
    if per == "token":
        kept[1, 2] = True
        assert torch.equal(~stepped.finite, kept)
    else:
        kept[torch.tensor([False, True, packed, False])] = True
        assert stepped.finite.tolist() == [True, False, True, True]
    assert torch.equal(stepped.delta[kept], delta[kept])
    assert torch.equal(stepped.delta[~kept], good.delta[~kept])


# --- the call itself ---


def test_in_place_writes_into_the_perturbation_it_was_given(on: On) -> None:
    delta, grad = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    fresh = on.step_and_project(delta, grad, step_size=0.1, radius=1.0)
    before = delta.clone()
    assert fresh.delta.data_ptr() != delta.data_ptr()
    stepped = on.step_and_project(delta, grad, step_size=0.1, radius=1.0, inplace=True)
    assert stepped.delta.data_ptr() == delta.data_ptr()
    assert torch.equal(delta, fresh.delta)
    assert not torch.equal(delta, before)


def test_an_op_leaves_its_arguments_alone_and_builds_no_graph(on: On) -> None:
    delta, grad = randn(2, 3, 5).requires_grad_(), randn(2, 3, 5, seed=1)
    kept = delta.detach().clone(), grad.clone()
    stepped = on.step_and_project(delta, grad, step_size=0.1, radius=0.5)
    assert not stepped.delta.requires_grad
    assert not on.project(delta, radius=0.5).requires_grad
    assert torch.equal(delta, kept[0])
    assert torch.equal(grad, kept[1])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        pytest.param(
            ShapeError,
            r"expected a gradient of shape \(2, 3, 5\), got \(2, 3\)",
            lambda d: ops.step_and_project(d, d[..., 0], step_size=0.1),
            id="gradient",
        ),
        pytest.param(
            ShapeError,
            "expected a floating-point perturbation, got torch.int64",
            lambda d: ops.norms(d.long()),
            id="int",
        ),
        pytest.param(
            ShapeError,
            r"expected a perturbation of two axes or more.*got \(30,\)",
            lambda d: ops.norms(d.flatten()),
            id="1d",
        ),
        pytest.param(
            ShapeError,
            r"expected a boolean mask over the leading axes of \(2, 3, 5\), got torch.bool of \(2, 4\)",
            lambda d: ops.norms(d, mask=torch.ones(2, 4, dtype=torch.bool)),
            id="mask-shape",
        ),
        pytest.param(
            ShapeError,
            r"expected a boolean mask .*, got torch.int64 of \(2, 3\)",
            lambda d: ops.norms(d, mask=torch.ones(2, 3, dtype=torch.long)),
            id="mask-dtype",
        ),
        pytest.param(
            ShapeError,
            r"expected segments of shape \(2,\), got \(3,\)",
            lambda d: ops.norms(d, segments=torch.zeros(3, dtype=torch.long)),
            id="segments",
        ),
        pytest.param(
            ShapeError,
            r"expected x of shape \(2, 3, 5\), got \(2, 3\)",
            lambda d: ops.project(d, radius=1.0, x=d[..., 0], box=(0.0, 1.0)),
            id="x",
        ),
        pytest.param(
            ConfigurationError,
            "expected x beside a box, got None",
            lambda d: ops.project(d, radius=1.0, box=(0.0, 1.0)),
            id="box-alone",
        ),
        *(
            pytest.param(
                ConfigurationError,
                f"expected a radius of 0 or more, math.inf for none, got {radius}",
                lambda d, radius=radius: ops.project(d, radius=radius),
                id=f"radius-{radius}",
            )
            for radius in (-1.0, math.nan)
        ),
        pytest.param(
            ConfigurationError,
            r"expected a box as \(low, high\), got \(1.0, 0.0\)",
            lambda d: ops.project(d, radius=1.0, x=d, box=(1.0, 0.0)),
            id="box-turned",
        ),
        *(
            pytest.param(
                ConfigurationError,
                f"expected a finite step_size and a finite floor of 0 or more, got {step_size} and {floor}",
                lambda d, step_size=step_size, floor=floor: ops.step_and_project(
                    d, d, step_size=step_size, floor=floor
                ),
                id=f"step-{step_size}-floor-{floor}",
            )
            for step_size, floor in ((math.inf, 0.0), (math.nan, 0.0), (0.1, -1.0), (0.1, math.nan))
        ),
        pytest.param(
            ConfigurationError,
            r"expected a back end among \['auto', 'reference'.*\], got 'cuda'",
            lambda d: ops.norms(d, backend="cuda"),
            id="backend",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_named(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 5))


def test_a_named_back_end_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, ran = randn(2, 3, 5), []
    for module, name in ((_reference, "reference"), (_cpu, "cpu")):
        monkeypatch.setattr(module, "norms", lambda delta, rows, name=name: ran.append(name) or delta)
    for backend in ("reference", "cpu", "auto"):
        ops.norms(delta, backend=backend)
    assert ran == ["reference", "cpu", "cpu"]


@pytest.mark.parametrize(
    ("delta", "options", "reason"),
    [
        pytest.param(randn(4, 5, 2).mT, {}, "it is not contiguous", id="transposed"),
        pytest.param(randn(4, 1, 5).expand(4, 3, 5), {}, "it is not contiguous", id="expanded"),
        pytest.param(randn(4, 3, 5), {"segments": torch.tensor([0, 2, 0, 1])}, "it is packed", id="packed"),
        pytest.param(randn(4, 3, 5).to(torch.float8_e5m2), {}, "it is of torch.float8_e5m2", id="fp8"),
        pytest.param(torch.empty(4, 3, 5, device="meta"), {}, "it is on meta", id="meta"),
    ],
)
def test_what_the_blocks_of_the_cpu_cannot_do_is_refused_by_name_and_left_to_the_reference(
    delta: Tensor, options: dict, reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"got 'cpu': {reason}.*available: .*'reference'"):
        ops.norms(delta, backend="cpu", **options)
    if delta.dtype == torch.float64:
        stepped = ops.step_and_project(delta, delta, step_size=0.1, radius=1.0, **options)
        defined = ops.step_and_project(delta, delta, step_size=0.1, radius=1.0, backend="reference", **options)
        assert all(torch.equal(*pair) for pair in zip(stepped, defined, strict=True))


# --- the back ends agree ---


def assert_agree(got: ops.Stepped, expected: ops.Stepped, *, reach: float) -> None:
    """Norms to some units in the last place of fp32; entries to the dtype's tolerance of what is added up in them."""
    dtype = expected.delta.dtype
    torch.testing.assert_close(got.delta, expected.delta, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * reach)
    for name in ("grad_norm", "delta_norm"):
        a, b = getattr(got, name), getattr(expected, name)
        rounded = 0.0 if name == "grad_norm" or dtype in (torch.float32, torch.float64) else TOLERANCE[dtype]
        tolerance = max(rounded, 1e-6 if a.dtype == torch.float32 else 1e-12)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0.0, equal_nan=True)
    assert torch.equal(got.finite, expected.finite)


@pytest.mark.slow
@repeatable
@given(
    case=cases(),
    rule=st.sampled_from(RULES),
    relative=st.sampled_from([0.3, 1.0, 7.0]),
    floor=st.sampled_from([0.0, 1e-8, 1.0]),
)
def test_the_cpu_steps_as_defined(case: Case, rule: str, relative: float, floor: float) -> None:
    assume(case.segments is None or case.per == "token")
    assume(1e-30 < case.radius * relative < 1e30)
    options = {"step_size": case.radius * relative, "radius": case.radius, "rule": rule, "floor": floor, **case.place}
    got, expected = (On(name).step_and_project(case.delta, case.grad, **options) for name in ("cpu", "reference"))
    assert_agree(got, expected, reach=case.radius)


@pytest.mark.slow
@each_norm
@each_per
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("radius", [math.inf, 30.0, 1e3], ids=["no-ball", "outside", "inside"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("boxed", [False, True], ids=["no-box", "box"])
def test_many_blocks_are_stepped_as_defined(
    norm: str, per: str, dtype: torch.dtype, radius: float, masked: bool, boxed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of two rows, of which some are zero, not finite, huge, tiny or masked as a whole."""
    monkeypatch.setattr(_cpu, "_BYTES", 8 * 2 * 8 * 768 if per == "sample" else 8 * 7 * 768)
    monkeypatch.setattr(_cpu, "_MANY", 1)
    delta, grad = randn(9, 8, 768, dtype=dtype), randn(9, 8, 768, seed=1, dtype=dtype)
    delta[0] = 0.0
    delta[1, 0] = delta[2] = 1e-24
    delta[5, 1] *= 1000
    grad[2] = 0.0
    grad[3, 7, 5] = math.nan
    grad[4] *= torch.finfo(dtype).tiny
    grad[5] *= 1e4
    grad[7, 3] = 0.0
    mask = torch.arange(8) < torch.tensor([8, 1, 8, 8, 5, 8, 2, 8, 0])[:, None] if masked else None
    if mask is not None:
        grad[~mask] = math.nan
    x = torch.rand(9, 8, 768, generator=generator(2)).to(dtype)
    region = {"x": x, "box": (0.0, 1.0)} if boxed else {}
    place = {"norm": norm, "per": per, "mask": mask, "radius": radius / 8 if per == "token" else radius, **region}
    moved, defined = (On(name).step_and_project(delta, grad, step_size=3.0, **place) for name in ("cpu", "reference"))
    assert_agree(moved, defined, reach=1.0)
    projected = On("cpu").project(delta, **place)
    torch.testing.assert_close(projected, On("reference").project(delta, **place), rtol=TOLERANCE[dtype], atol=0.0)
    assert torch.equal(On("cpu").project(projected, **place), projected)
    lengths = (On(name).norms(projected, norm=norm, per=per, mask=mask) for name in ("cpu", "reference"))
    torch.testing.assert_close(*lengths, rtol=1e-6, atol=0.0)


def test_a_gradient_may_lie_in_memory_as_it_likes() -> None:
    delta = randn(6, 4, 10, dtype=torch.float32)
    for grad in (delta[:1].expand(6, 4, 10), randn(6, 10, 4).mT, randn(12, 4, 10)[::2], delta.double(), delta.half()):
        same = grad.clone(memory_format=torch.contiguous_format)
        moved, expected = (On("cpu").step_and_project(delta, g, step_size=0.1, radius=1.0) for g in (grad, same))
        assert torch.equal(moved.delta, expected.delta)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_ball_wins_over_a_box_that_x_is_outside_of(on: On, norm: ops.Norm) -> None:
    x = torch.tensor([[1.5, -0.5, 0.5, 1.01]])
    delta = torch.tensor([[0.03, -0.02, 0.01, -0.005]])
    boxed = on.project(delta, radius=8 / 255, norm=norm, x=x, box=(0.0, 1.0))
    kept = on.project(delta, radius=8 / 255, norm=norm)
    torch.testing.assert_close(boxed, kept * torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    assert on.norms(boxed, norm=norm) <= 8 / 255
    assert torch.equal(on.project(boxed, radius=8 / 255, norm=norm, x=x, box=(0.0, 1.0)), boxed)
