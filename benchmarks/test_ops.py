"""The update of one perturbation: a step along its gradient, back into the ball, and for pixels into the box.

Ours by each back end, in place, against what others compute, and against copying as many bytes: an update has to read
the perturbation and its gradient and to write the perturbation (with a box: to read x as well).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import peers
import pytest
import torch
from measures import Extent, device_of, extent_of, launches
from races import Entry, Pace, Race, recorded
from support.published import moved
from torch import Tensor

from advvl.errors import ConfigurationError
from advvl.ops import step_and_project

pytestmark = pytest.mark.benchmark(timer=recorded)

TOKENS = [(64, 20, 768), (64, 36, 2048), (256, 100, 768), (8, 100, 2048), (4096, 20, 768)]
FEW_TOKENS = [TOKENS[0], TOKENS[1], TOKENS[4]]  # in the cache, at its edge, and beyond it
PIXELS, FEW_PIXELS = (64, 3, 224, 224), (4, 3, 224, 224)
STEP_SIZE, RADIUS = 0.3, 1.0  # from a row on the ball along a random gradient: every step ends outside it
LINF_STEP_SIZE, LINF_RADIUS = 0.01, 0.03
REPEATS = 20  # calls in one CUDA graph
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the row's length

Region = Literal["no ball", "L2 ball", "L2 ball and box", "Linf ball and box"]


@dataclass(frozen=True)
class Case:
    """One update.

    Arguments:
        timing: of a call, as a program makes it, or on a GPU of the device alone, from a graph of captured calls.
    """

    shape: tuple[int, ...]
    region: Region
    dtype: torch.dtype = torch.float32
    timing: Literal["call", "device"] = "call"

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.region, str(self.dtype).removeprefix("torch.")]
        return ", ".join(parts + ["device time"] * (self.timing == "device"))

    @property
    def linf(self) -> bool:
        return self.region.startswith("Linf")

    @property
    def boxed(self) -> bool:
        return self.region.endswith("box")


def cases(device: torch.device, extent: Extent) -> list[Case]:
    if extent == "smoke":
        return [Case(TOKENS[0], "no ball"), Case(TOKENS[0], "L2 ball"), Case(FEW_PIXELS, "L2 ball and box")]
    boxed = [Case(PIXELS, "L2 ball and box"), Case(PIXELS, "Linf ball and box")]
    if extent == "usual" and device.type != "cuda":
        return [Case(shape, region) for shape in FEW_TOKENS for region in ("no ball", "L2 ball")] + boxed
    found = [Case(shape, region) for shape in TOKENS for region in ("no ball", "L2 ball")]
    found += [Case(PIXELS, "no ball"), Case(PIXELS, "L2 ball"), *boxed]
    if device.type != "cuda":
        return found
    found += [Case(case.shape, case.region, torch.bfloat16) for case in found if not case.boxed]
    return [Case(c.shape, c.region, c.dtype, timing) for c in found for timing in ("call", "device")]


class Bench:
    """The tensors of a case and the lanes that move them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(0)
        d = torch.randn(case.shape, generator=generator)
        d = d * (LINF_RADIUS / 4 if case.linf else RADIUS / d.flatten(1).norm(dim=1).view(-1, *[1] * (d.ndim - 1)))
        self.delta = d.to(device, case.dtype)
        g = torch.randn(case.shape, generator=generator)
        self.grad = (1e-3 * (g + g.sign())).to(device, case.dtype)  # none below 1e-6, which captum does not step along
        self.x0 = torch.rand(case.shape, generator=generator) if case.boxed else torch.full(case.shape, 0.5)
        self.x0 = self.x0.to(device, case.dtype)
        self.radius = math.inf if case.region == "no ball" else LINF_RADIUS if case.linf else RADIUS
        self.step_size = LINF_STEP_SIZE if case.linf else STEP_SIZE
        self.options: dict[str, Any] = {"step_size": self.step_size, "radius": self.radius}
        if case.linf:
            self.options |= {"norm": "linf", "rule": "sign"}
        if case.boxed:
            self.options |= {"x": self.x0, "box": (0.0, 1.0)}
        self.expected = step_and_project(self.delta, self.grad, **self.options, backend="reference").delta
        self.facts = {
            "shape": list(case.shape),
            "region": case.region,
            "dtype": str(case.dtype).removeprefix("torch."),
            "timing": case.timing,
            "bytes": (4 if case.boxed else 3) * self.delta.numel() * self.delta.element_size(),
        }

    def ours(self, backend: str, *, masked: bool = False) -> Entry:
        """With every fourth position masked, or none."""
        delta, options = self.delta.clone(), dict(self.options)
        if masked:
            positions = math.prod(self.case.shape[:2])
            options["mask"] = (torch.arange(positions, device=self.device) % 4 > 0).view(self.case.shape[:2])

        def call() -> None:
            step_and_project(delta, self.grad, **options, backend=backend, inplace=True)  # type: ignore[arg-type]

        expected = step_and_project(delta, self.grad, **options, backend="reference").delta if masked else self.expected
        try:
            call()
        except ConfigurationError as refusal:
            pytest.skip(str(refusal))
        self._close(delta, expected)

        def inside() -> None:
            norms = delta.abs().flatten(1).amax(1) if self.case.linf else delta.double().flatten(1).norm(dim=1)
            assert norms.isfinite().all()
            assert (norms <= self.radius).all()

        return self._entry(call, inside, "ours")

    def plain(self, update: Callable[..., Tensor] = moved) -> Entry:
        deltas = [self.delta]

        def call() -> None:
            deltas[0] = update(deltas[0], self.grad, self.step_size, "l2", self.radius)

        call()
        self._close(deltas[0], self.expected)
        return self._entry(call, lambda: self._inside(deltas[0]), "peer")

    def compiled(self) -> Entry:
        torch.compiler.reset()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own
                return self.plain(torch.compile(moved, dynamic=False))
        except AssertionError:
            raise
        except Exception as error:  # whatever a compiler says that is not there
            pytest.skip(f"torch.compile cannot here: {str(error).splitlines()[0]}")

    def peer(self, make: Callable[[float, float], peers.Update]) -> Entry:
        update, xs = make(self.step_size, self.radius), [self.x0 + self.delta]

        def call() -> None:
            xs[0] = update(xs[0], self.grad, self.x0)

        call()
        self._close(xs[0] - self.x0, self.expected, of_x=True)
        return self._entry(call, lambda: self._inside(xs[0] - self.x0), "peer")

    def copy(self) -> Entry:
        source, target = self.delta.flatten(), torch.empty_like(self.delta).flatten()
        whole, rest = divmod(self.facts["bytes"], 2 * source.nbytes)
        half = source.numel() // 2

        def call() -> None:
            for _ in range(whole):
                target.copy_(source)
            if rest:
                target[:half].copy_(source[:half])

        call()
        return self._entry(call, lambda: torch.testing.assert_close(target, source, rtol=0, atol=0), "limit")

    def _entry(self, call: Callable[[], object], check: Callable[[], object], role: Any) -> Entry:
        facts = dict(self.facts)
        if self.device.type == "cuda":
            facts["launches"] = launches(call)
        if self.case.timing == "call":
            return Entry(call, check, role, facts)
        try:
            replay = captured(call)
        except RuntimeError as error:
            if role == "ours":
                raise
            pytest.skip(f"cannot be captured in a CUDA graph: {str(error).splitlines()[0]}")
        return Entry(replay, check, role, facts, repeats=REPEATS)

    def _close(self, delta: Tensor, expected: Tensor, *, of_x: bool = False) -> None:
        """The first step is the reference's: relative to the row's length, and to the rounding of x if x is what is kept."""
        error = (delta.float() - expected.float()).flatten(1).norm(dim=1)
        rounding = 0.5 * torch.finfo(self.case.dtype).eps * math.sqrt(self.delta[0].numel()) if of_x else 0.0
        assert (error <= CLOSE[self.case.dtype] * expected.float().flatten(1).norm(dim=1) + rounding).all()

    def _inside(self, delta: Tensor) -> None:
        """Finite, and inside the ball but for rounding, which is what others promise."""
        norms = delta.abs().flatten(1).amax(1) if self.case.linf else delta.float().flatten(1).norm(dim=1)
        assert norms.isfinite().all()
        assert (norms <= self.radius * (1 + CLOSE[self.case.dtype])).all()


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of several calls: its replay costs what the device takes, and no Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    return graph.replay


def large(case: Case) -> bool:
    return math.prod(case.shape) > 2**25


def lanes(case: Case, device: torch.device) -> dict[str, Callable[[Bench], Entry]]:
    """Whom a case compares."""
    fast = "triton" if device.type == "cuda" else "cpu"
    backends = (fast,) if device.type == "cpu" and large(case) else ("reference", fast)  # it takes seconds there
    found: dict[str, Callable[[Bench], Entry]] = {
        f"ours, {backend}": partial(Bench.ours, backend=backend) for backend in backends
    }
    if case.shape in TOKENS:
        found[f"ours, {fast}, masked"] = partial(Bench.ours, backend=fast, masked=True)
    if not case.boxed:
        found |= {"published update": Bench.plain, "published update, compiled": Bench.compiled}
    if case.linf:
        foolbox = partial(peers.foolbox_update, "LinfProjectedGradientDescentAttack")
        updates = {"torchattacks": peers.torchattacks_linf, "foolbox": foolbox, "captum": peers.captum_linf}
    elif case.region != "no ball" and case.dtype == torch.float32:
        foolbox = partial(peers.foolbox_update, "L2ProjectedGradientDescentAttack")
        updates = {"torchattacks": peers.torchattacks_l2, "foolbox": foolbox}
    else:
        updates = {}
    found |= {name: partial(Bench.peer, make=make) for name, make in updates.items()}
    return found | {"copy of the same bytes": Bench.copy}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = device_of(metafunc.config)
    pairs = [(case, name) for case in cases(device, extent_of(metafunc.config)) for name in lanes(case, device)]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"{case}-{name}" for case, name in pairs])


def test_update(race: Race, device: torch.device, case: Case, name: str) -> None:
    def build() -> dict[str, Callable[[], Entry]]:
        bench = Bench(case, device)
        return {lane: partial(make, bench) for lane, make in lanes(case, device).items()}

    least = 3 if device.type != "cuda" and large(case) else 5
    shortest = 2e-3 if device.type == "cuda" else 2e-4  # waiting for the device takes a while itself
    race("ops", str(case), name, build, Pace(budget=3.0, least=least, most=60, shortest=shortest))
