"""The figures that were set beforehand, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from records import Row, Run, bare_passes, copy_of

FEW = 6  # rounds, of which no interval can be told


@dataclass(frozen=True)
class Target:
    """A figure that was set beforehand, and what was measured."""

    measure: str
    goal: str
    measured: str
    reached: bool
    unsure: bool = False  # the goal lies inside the interval of what was measured


def targets(run: Run) -> list[Target]:
    finders = (
        _ops_targets,
        _step_targets,
        _attack_targets,
        _methods_targets,
        _trainer_targets,
        _evaluation_targets,
    )
    return [target for find in finders for target in find(run)]


def _ops_targets(run: Run) -> list[Target]:
    fused, found = "ours, triton" if run.gpu else "ours, cpu", list[Target]()
    cases = run.cases("ops")
    if not run.gpu:
        for region, goal, aim in (("no ball", 0.45, 0.6), ("L2 ball", 0.25, 0.6)):
            lanes = cases.get(f"64x36x2048, {region}, float32")
            if lanes and fused in lanes:
                share = copy_of(lanes).median / lanes[fused].median
                measure = f"update of 64x36x2048, {region}: share of the speed of copying the same bytes"
                found.append(Target(measure, f"{goal:.0%} (aim {aim:.0%})", f"{share:.0%}", share >= goal))
        ratios = _over(cases, fused, "published update", lambda row: True)
        if ratios:
            goal_text = "3x faster (aim 5x)"
            found.append(
                Target("update against the published one", goal_text, _span(ratios), min(ratios.values()) >= 3)
            )
        return found
    large = {
        case: copy_of(lanes).median / lanes[fused].median
        for case, lanes in cases.items()
        if fused in lanes and case.endswith("device time") and copy_of(lanes).facts["bytes"] >= 2**27
    }
    if large:
        measure = "update of large tensors (128 MiB or more to move): share of the copy's bandwidth, device time"
        found.append(Target(measure, "85%", _span(large, "{:.0%}"), min(large.values()) >= 0.85))
    small = {c: lanes for c, lanes in cases.items() if fused in lanes and copy_of(lanes).facts["bytes"] < 2**24}
    once = {case: lanes[fused].facts["launches"] for case, lanes in small.items() if _timing(lanes[fused]) == "call"}
    if once:
        measured = _span({case: float(n) for case, n in once.items()}, "{:.0f}")
        found.append(
            Target(
                "update of small tensors (under 16 MiB to move): kernels a call", "1", measured, max(once.values()) <= 1
            )
        )
    ratios = _over(small, fused, "published update", lambda row: _timing(row) == "call")
    if ratios:
        measure = "update of small tensors against the published one, a call"
        found.append(Target(measure, "5x faster", _span(ratios), min(ratios.values()) >= 5))
    return found


def _step_targets(run: Run) -> list[Target]:
    found, cases = list[Target](), run.cases("step")
    dtype, goal, aim = ("bfloat16", 2.0, 3.0) if run.gpu else ("float32", 1.6, 2.0)
    base = {c: lanes for c, lanes in cases.items() if c.startswith("base") and dtype in c}
    ratios = _over(base, "ours, shared masks", "published loop", lambda row: row.facts["mode"] != "in turn")
    if ratios:
        measure = f"VILLA update against the published loop, UNITER-base, {dtype}, shared masks, text or both"
        found.append(Target(measure, f"{goal}x (aim {aim}x)", _span(ratios), min(ratios.values()) >= goal))
    for masks in ("fresh", "shared"):
        pairs = {
            case: (lanes[f"ours, {masks} masks"], lanes[f"unavoidable, {masks} masks"])
            for case, lanes in cases.items()
            if f"ours, {masks} masks" in lanes and f"unavoidable, {masks} masks" in lanes
        }
        over = {case: ours.median / limit.median for case, (ours, limit) in pairs.items()}
        if over:
            measure = f"VILLA update, {masks} masks, over the passes it cannot avoid"
            measured = _span(over, "{:.3f}", {case: _interval(*rows) for case, rows in pairs.items()})
            unsure = any(_within(1.03, *rows) for rows in pairs.values())
            found.append(Target(measure, "at most 1.03", measured, max(over.values()) <= 1.03, unsure))
    for mode, most in (("text", 2), ("both", 2), ("in turn", 3)):
        graphs = {
            name: max(lanes[name].facts["graphs"] for lanes in cases.values() if name in lanes and _mode(lanes) == mode)
            for name in ("ours, fresh masks", "ours, shared masks", "published loop")
            if any(name in lanes and _mode(lanes) == mode for lanes in cases.values())
        }
        ours = [graphs[name] for name in graphs if name.startswith("ours")]
        if ours:
            measured = f"{max(ours):.2f} (published: {graphs.get('published loop', float('nan')):.2f})"
            measure = f"peak memory of a VILLA update, {mode}: graphs at once"
            found.append(Target(measure, f"at most {most}", measured, max(ours) <= most + 0.05))
    growth = [
        max(peaks) / min(peaks)
        for lanes in run.cases("scaling").values()
        for row in lanes.values()
        if row.facts["axis"] == "K"
        for peaks in [[point["peak_bytes"] for point in row.facts["points"]]]
    ]
    if growth:
        measured = f"{max(growth):.3f} from K=3 to K=12"
        found.append(Target("peak memory, largest K over smallest", "1", measured, max(growth) <= 1.02))
    return found


def _attack_targets(run: Run) -> list[Target]:
    found = list[Target]()
    embedding = {case: lanes for case, lanes in run.cases("attack").items() if "LXMERT" in case}
    for case, lanes in embedding.items():
        ours, bare = lanes.get("ours"), bare_passes(lanes)
        peer = next((row for row in lanes.values() if row.facts["role"] == "peer"), None)
        if ours and peer:
            ratio = ours.median / peer.median
            measured = f"{ratio:.3f}{_interval(ours, peer)}"
            measure = f"attack, {case}: over {peer.name}"
            found.append(Target(measure, "at most 1", measured, ratio <= 1, _within(1, ours, peer)))
            share = ours.facts["share_at_least"]
            measure = f"attack, {case}: examples with a loss at least that of {peer.name}"
            found.append(Target(measure, "95%", f"{share:.1%}", share >= 0.95))
        if ours and bare:
            ratio = ours.median / bare.median
            measure = f"attack, {case}: over ten bare forward and input-only backward passes"
            measured = f"{ratio:.3f}{_interval(ours, bare)}"
            found.append(Target(measure, "at most 1.03", measured, ratio <= 1.03, _within(1.03, ours, bare)))
    return found


def _methods_targets(run: Run) -> list[Target]:
    found = list[Target]()
    for case, lanes in run.cases("methods").items():
        if not {"ours", "unavoidable", "forward and backward"} <= lanes.keys():
            continue
        ours, goal = lanes["ours"], lanes["ours"].facts["goal"]
        limit, scale = (lanes["unavoidable"], 1) if goal is None else (lanes["forward and backward"], 3)
        most = 1.05 if goal is None else goal / scale
        what = "the passes it cannot avoid" if goal is None else "a forward, a third of a forward and backward"
        ratio = ours.median / limit.median
        measured = f"{scale * ratio:.3g}{_interval(ours, limit, scale)}"
        unsure = _within(most, ours, limit)
        found.append(
            Target(f"update, {case}: over {what}", f"at most {scale * most:g}", measured, ratio <= most, unsure)
        )
    return found


def _trainer_targets(run: Run) -> list[Target]:
    found = list[Target]()
    for case, lanes in run.cases("trainer").items():
        ours, plain = lanes.get("AdversarialTrainer, FreeLB"), lanes.get("Trainer, K batches")
        if ours and plain:
            ratio = ours.median / plain.median
            measure = f"AdversarialTrainer, {case}: over Trainer at as many passes of the model"
            measured = f"{ratio:.3f}{_interval(ours, plain)}"
            found.append(Target(measure, "at most 1.03", measured, ratio <= 1.03, _within(1.03, ours, plain)))
    return found


def _evaluation_targets(run: Run) -> list[Target]:
    found = list[Target]()
    for case, lanes in run.cases("evaluation").items():
        ours, bare = lanes.get("ours"), bare_passes(lanes)
        if ours and bare:
            share = bare.median / ours.median
            measure = f"evaluation, {case}: share of its time that the model's own passes take by themselves"
            unsure = _within(1 / 0.95, ours, bare)
            found.append(Target(measure, "95%", f"{share:.1%}", share >= 0.95, unsure))
    return found


def _timing(row: Row) -> str:
    return str(row.facts["timing"])


def _mode(lanes: Mapping[str, Row]) -> str:
    return str(next(iter(lanes.values())).facts["mode"])


def _over(
    cases: Mapping[str, Mapping[str, Row]], ours: str, theirs: str, wanted: Callable[[Row], bool]
) -> dict[str, float]:
    """How many times faster ours is, case by case."""
    return {
        case: lanes[theirs].median / lanes[ours].median
        for case, lanes in cases.items()
        if ours in lanes and theirs in lanes and wanted(lanes[ours])
    }


def _interval(ours: Row, theirs: Row, scale: int = 1) -> str:
    """95 % of the ratio of their medians, times `scale`; nothing of few rounds."""
    low, high = (scale * end for end in ours.facts["over"][theirs.name])
    form = ".3f" if scale == 1 else ".3g"
    return f" [{low:{form}}, {high:{form}}]" if ours.facts["rounds"] >= FEW else ""


def _within(goal: float, ours: Row, theirs: Row) -> bool:
    """Whether more rounds might decide otherwise."""
    low, high = ours.facts["over"][theirs.name]
    return ours.facts["rounds"] < FEW or low <= goal < high


def _span(values: Mapping[str, float], form: str = "{:.2f}x", intervals: Mapping[str, str] | None = None) -> str:
    """The least and the most of these, and where they were seen."""
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    texts = {case: form.format(values[case]) + (intervals or {}).get(case, "") for case in (low, high)}
    if form.format(values[low]) == form.format(values[high]):
        return texts[low]
    return f"{texts[low]} ({low}) to {texts[high]} ({high})"
