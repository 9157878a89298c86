"""Where perturbations start, how they move, and what a perturber refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.draws import generator

from advvl import L2, Ascent, EmbeddingPerturber, Given, Linf, Normal, Place, Start, Uniform, Zero
from advvl.errors import ConfigurationError, ShapeError
from advvl.perturbers.starts import Carried
from advvl.runtime.randomness import on_device

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BALLS = [L2(0.4), Linf(0.4), L2(0.4, per="token"), Linf(0.4, per="token")]
STARTS = [Zero(), Uniform(0.3), Uniform(7.0), Normal(0.1), Normal(9.0)]


def place(*shape: int, dtype: torch.dtype = torch.float64, masked: bool = True) -> Place:
    x = torch.randn(*shape, generator=generator(9), dtype=torch.float64).to(dtype)
    return Place(x, torch.rand(shape[:-1], generator=generator(1)) > 0.3 if masked else None)


@pytest.mark.parametrize("start", STARTS, ids=repr)
@pytest.mark.parametrize("ball", BALLS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_start_is_inside_the_ball_masked_and_kept_in_fp32_at_least(
    start: Start, ball: L2 | Linf, dtype: torch.dtype
) -> None:
    where = place(3, 5, 7, dtype=dtype)
    delta = Ascent(ball, step_size=0.1).begin(start, where, generator())
    assert delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert delta.shape == where.x.shape
    assert not delta[~where.mask].any()
    rows = delta.double() if ball.per == "token" else delta.double().flatten(1)
    norms = rows.norm(dim=-1) if isinstance(ball, L2) else rows.abs().amax(-1)
    assert norms.max() <= 0.4
    assert delta.any() or isinstance(start, Zero)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    magnitude=st.sampled_from([0.0, 1e-3, 0.64, 30.0]),
    shape=st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 2, 5]), st.sampled_from([1, 3, 11])),
    per=st.sampled_from(["sample", "token"]),
)
def test_a_uniform_l2_start_is_never_longer_than_its_magnitude(
    seed: int, magnitude: float, shape: tuple[int, int, int], per: str
) -> None:
    mask = torch.rand(shape[:2], generator=generator(seed)) > 0.4
    delta = Ascent(L2(per=per), step_size=0.1).begin(
        Uniform(magnitude), Place(torch.zeros(shape, dtype=torch.float64), mask), generator(seed)
    )
    rows = delta.flatten(1) if per == "sample" and shape[0] else delta
    assert (rows.norm(dim=-1) <= magnitude * (1 + 1e-12)).all()


def test_a_uniform_l2_start_is_freelbs() -> None:
    """U(−1, 1) · magnitude / √(length · D): the mean square of an entry is magnitude² / (3 · length · D)."""
    x = torch.zeros(400, 6, 11, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 2] * 200)[:, None]
    delta = Ascent(L2(), step_size=0.1).begin(Uniform(0.64), Place(x, mask), generator())
    squares = delta.flatten(1).square().sum(1)
    for length in (0, 1):
        assert squares[length::2].mean().item() == pytest.approx(0.64**2 / 3, rel=0.03)
    assert delta.mean().abs() < 1e-3


def test_a_uniform_linf_start_fills_the_interval() -> None:
    delta = Ascent(Linf(), step_size=0.1).begin(Uniform(0.3), place(50, 7, 11, masked=False), generator())
    assert -0.3 <= delta.min() < -0.299
    assert 0.299 < delta.max() <= 0.3
    assert abs(delta.mean()) < 0.01


def test_a_normal_start_has_its_scale() -> None:
    delta = Ascent(L2(), step_size=0.1).begin(Normal(0.02), place(50, 7, 11, masked=False), generator())
    assert delta.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_magnitude_of_a_start_is_apart_from_the_radius() -> None:
    where = place(5, 7, 11, masked=False)
    free = Ascent(Linf(0.1), step_size=0.1).begin(Uniform(0.05), where, generator())
    assert 0.04 < free.abs().max() <= 0.05
    bounded = Ascent(Linf(0.1), step_size=0.1).begin(Uniform(5.0), where, generator())
    assert (bounded.abs() == torch.tensor(0.1, dtype=torch.float64)).double().mean() > 0.9


def test_a_start_draws_only_from_the_generator_it_is_given() -> None:
    before = torch.get_rng_state()
    for start in (Uniform(0.1), Normal(0.1)):
        one, two = generator(3), generator(3)
        first = start.make(L2(), place(2, 3, 5), one)
        assert torch.equal(first, start.make(L2(), place(2, 3, 5), two))
        assert not torch.equal(first, start.make(L2(), place(2, 3, 5), one))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_serves_its_own_device_as_it_is_and_another_by_a_seed() -> None:
    own = generator(3)
    assert on_device(own, torch.device("cpu")) is own
    assert torch.equal(own.get_state(), generator(3).get_state())
    drawn = Uniform(0.1).make(Linf(), place(2, 3, 5), generator(3))
    assert torch.equal(drawn, (2 * torch.rand(2, 3, 5, generator=generator(3), dtype=torch.float64) - 1) * 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_start_is_drawn_there_and_one_seed_gives_the_same_bits() -> None:
    where = Place(torch.zeros(2, 3, 5, device="cuda"))
    one, two = generator(3), generator(3)
    for start in (Uniform(0.1), Normal(0.1)):
        first = start.make(Linf(), where, one)
        assert torch.equal(first, start.make(Linf(), where, two))
        assert not torch.equal(first, start.make(Linf(), where, one))
        start.make(Linf(), where, two)
    assert torch.equal(one.get_state(), two.get_state())
    assert not torch.equal(one.get_state(), generator(3).get_state())


def test_a_given_start_is_copied_and_projected() -> None:
    given_ = torch.full((2, 3, 5), 3.0, dtype=torch.float64)
    where = place(2, 3, 5)
    made = Given(given_).make(L2(), where, None)
    made.zero_()
    assert given_.all()
    delta = Ascent(Linf(0.25), step_size=0.1).begin(Given(given_), where, None)
    assert torch.equal(delta, torch.where(where.mask.unsqueeze(-1), 0.25, 0.0).double().expand(2, 3, 5))


def test_a_given_start_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected a start of shape \(2, 3, 5\), got \(2, 4, 5\)"):
        Given(torch.zeros(2, 4, 5)).make(L2(), place(2, 3, 5), None)


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 3, 5), (1, 3, 5), (2, 7, 5), (2, 1, 5), (3, 2, 5)], ids=str)
def test_a_carried_start_feeds_row_i_to_row_i_and_is_sliced_or_extended_by_zeros(shape: tuple[int, ...]) -> None:
    carried = torch.arange(1.0, 31.0).reshape(2, 3, 5)
    made = Carried(carried).make(L2(), place(*shape), None)
    rows, length = min(shape[0], 2), min(shape[1], 3)
    assert made.shape == shape
    assert torch.equal(made[:rows, :length], carried[:rows, :length].double())
    assert not made[rows:].any()
    assert not made[:, length:].any()


def test_a_carried_start_of_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected a carried perturbation of 2 axes, got \(2, 3, 5\)"):
        Carried(torch.zeros(2, 3, 5)).make(L2(), place(2, 5), None)


def test_a_boxed_start_keeps_pixels_in_the_box() -> None:
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    delta = Ascent(Linf(0.5), step_size=0.1, box=(0.0, 1.0)).begin(Uniform(0.5), Place(x), generator())
    assert ((x + delta >= 0) & (x + delta <= 1)).all()
    assert ((x + delta == 0) | (x + delta == 1)).any()


def test_an_ascent_moves_by_its_own_step_rule_floor_and_ball() -> None:
    where = Place(torch.zeros(2, 3, 5, dtype=torch.float64))
    grad = torch.randn(2, 3, 5, generator=generator(), dtype=torch.float64) * 1e-9
    zero = torch.zeros_like(where.x)
    size = grad.flatten(1).norm(dim=1).reshape(2, 1, 1)
    close = {"rtol": 1e-12, "atol": 0.0}
    torch.testing.assert_close(Ascent(L2(), step_size=0.1).step(zero, grad, where).delta, 0.1 * grad / size, **close)
    floored = Ascent(L2(), step_size=0.1, floor=1e-6).step(zero, grad, where).delta
    torch.testing.assert_close(floored, 0.1 * grad / 1e-6, **close)
    signed = Ascent(Linf(), step_size=0.1, rule="sign").step(zero, grad, where).delta
    torch.testing.assert_close(signed, 0.1 * grad.sign(), **close)


def test_a_perturber_moves_each_modality_by_its_own_ascent() -> None:
    perturber = EmbeddingPerturber(text=Ascent(L2(), step_size=0.1), image=Ascent(Linf(), step_size=0.2))
    assert perturber.modalities == ("text", "image")
    assert perturber.starts() == {"text": Zero(), "image": Zero()}
    places = {"text": Place(torch.zeros(2, 3, 5)), "image": Place(torch.zeros(2, 4))}
    deltas = {name: torch.zeros_like(where.x) for name, where in places.items()}
    gradients = {name: torch.ones_like(where.x) for name, where in places.items()}
    moved = perturber.move(deltas, gradients, places, {}).deltas
    torch.testing.assert_close(perturber.norms(moved, places)["text"], torch.tensor([0.1, 0.1]))
    torch.testing.assert_close(moved["image"], torch.full((2, 4), 0.2))
    assert set(perturber.move(deltas, {"image": gradients["image"]}, places, {}).deltas) == {"image"}


@pytest.mark.parametrize(
    ("message", "make"),
    [
        pytest.param("expected a finite magnitude of 0 or more, got -0.1", lambda: Uniform(-0.1), id="uniform"),
        pytest.param("expected a finite magnitude of 0 or more, got nan", lambda: Uniform(math.nan), id="uniform-nan"),
        pytest.param("expected a finite scale of 0 or more, got inf", lambda: Normal(math.inf), id="normal"),
        pytest.param(r"expected a ball such as L2\(radius\), got 0.1", lambda: Ascent(0.1, step_size=1.0), id="ball"),
        pytest.param("expected a finite step size above 0, got -1.0", lambda: Ascent(L2(), step_size=-1.0), id="step"),
        pytest.param(
            "expected a finite step size above 0, got inf", lambda: Ascent(L2(), step_size=math.inf), id="inf"
        ),
        pytest.param(
            "expected a finite step size above 0, got nan", lambda: Ascent(L2(), step_size=math.nan), id="nan"
        ),
        pytest.param(
            "expected a step size above 0, got 0, .*allow_zero_step=True",
            lambda: Ascent(L2(), step_size=0.0),
            id="zero",
        ),
        pytest.param(
            r"expected rule to be 'normalised', 'sign', None or a rule such as Momentum\(\), got 'max'",
            lambda: Ascent(L2(), step_size=1.0, rule="max"),
            id="rule",
        ),
        pytest.param(
            "expected a floor of 0 or more, got -1", lambda: Ascent(L2(), step_size=1.0, floor=-1), id="floor"
        ),
        pytest.param(
            r"expected a box \(low, high\) with low < high, got \(1, 0\)",
            lambda: Ascent(L2(), step_size=1.0, box=(1, 0)),
            id="box",
        ),
        pytest.param(
            r"expected a start such as Uniform\(0.1\), got 0.1",
            lambda: Ascent(L2(), step_size=1.0, start=0.1),
            id="start",
        ),
        pytest.param(
            r"expected a box \(low, high\) .*, got 1.0", lambda: Ascent(L2(), step_size=1.0, box=1.0), id="box-number"
        ),
        pytest.param(
            r"expected a box \(low, high\) .*'1'", lambda: Ascent(L2(), step_size=1.0, box=("0", "1")), id="box-text"
        ),
        pytest.param("expected a finite step size .*'0.1'", lambda: Ascent(L2(), step_size="0.1"), id="step-text"),
        pytest.param("expected a finite magnitude .*'0.1'", lambda: Uniform("0.1"), id="uniform-text"),
        pytest.param("expected a radius as a number .*, got '0.5'", lambda: L2("0.5"), id="radius-text"),
        pytest.param("expected a radius as a number .*, got None", lambda: Linf(None), id="radius-none"),
        pytest.param("expected at least one modality, .*, got none", lambda: EmbeddingPerturber(), id="none"),
        pytest.param(
            "expected an Ascent for the modality 'text', got 0.1", lambda: EmbeddingPerturber(text=0.1), id="no-ascent"
        ),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(message: str, make: object) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_step_of_zero_is_allowed_on_request() -> None:
    assert Ascent(L2(), step_size=0.0, allow_zero_step=True).step_size == 0


def test_a_perturber_shows_how_it_was_made() -> None:
    assert repr(EmbeddingPerturber(text=Ascent(L2(1.0), step_size=0.1))).startswith(
        "EmbeddingPerturber(text=Ascent(ball=L2(radius=1.0, per='sample', relative=False), step_size=0.1"
    )


def test_a_subclass_stays_what_it_is_in_an_attack() -> None:
    class Still(EmbeddingPerturber):
        """Moves nothing."""

    ours = Still(image=Ascent(Linf(0.1), step_size=0.05)).for_attack()
    assert isinstance(ours, Still)
    assert ours.ascents["image"].rule == "sign"


def test_a_ball_that_holds_the_whole_box_is_refused() -> None:
    for box in ((0, 1), (-1.0, 0.0)):
        with pytest.raises(ConfigurationError, match=r"at most the width of the box .*; give both in one unit"):
            Ascent(Linf(8), step_size=2, box=box)
        for ball in (Linf(1.0), Linf(), Linf(2.0, relative=True), L2(8)):
            Ascent(ball, step_size=0.1, box=box)
