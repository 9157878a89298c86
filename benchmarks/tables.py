"""The report's tables, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from records import Row, Run, bare_passes, is_copy


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ops_table(cases: Mapping[str, Mapping[str, Row]]) -> str:
    """One row a shape, one column a way; under each time its share of the copy's speed."""
    names = list(dict.fromkeys(name for lanes in cases.values() for name in lanes if not is_copy(name)))
    rows = []
    for lanes in cases.values():
        limit = next(row for name, row in lanes.items() if is_copy(name))
        cells = [_ops_cell(lanes[n], limit) if n in lanes else "" for n in names]
        rows.append(["x".join(map(str, limit.facts["shape"])), *cells, limit.time])
    return table(["shape", *names, "copy"], rows)


def _ops_cell(row: Row, limit: Row) -> str:
    launches = row.facts.get("launches") if row.facts["timing"] == "call" else None
    kernels = "" if launches is None else f", {launches} kernel{'s' if launches != 1 else ''}"
    return f"{row.time}<br>{percent(limit.median / row.median)}{kernels}"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def ops(run: Run) -> str:
    parts, grouped = [], dict[str, dict[str, dict[str, Row]]]()
    for case, lanes in run.cases("ops").items():
        grouped.setdefault(case.partition(", ")[2], {})[case] = lanes
    for title, cases in grouped.items():
        parts += [f"**{title[0].upper()}{title[1:]}**", ops_table(cases)]
    return "\n\n".join(parts)


def step(run: Run) -> str:
    parts = []
    for case, lanes in run.cases("step").items():
        bare, loop = bare_passes(lanes), lanes.get("published loop")
        rows = [
            [
                row.name,
                row.time,
                f"{row.median / bare.median:.2f}" if bare else "",
                f"{loop.median / row.median:.2f}" if loop else "",
                f"{row.facts['flops'] / 1e9:.4g}",
                f"{row.facts['peak_bytes'] / 2**20:.0f}",
                f"{row.facts['graphs']:.2f}",
                str(row.facts["rounds"]),
            ]
            for row in lanes.values()
        ]
        heads = [
            "way",
            "time",
            "over bare passes",
            "published loop over it",
            "GFLOP",
            "peak MiB",
            "graphs at once",
            "rounds",
        ]
        parts += [f"**UNITER {case}**", table(heads, rows)]
    return "\n\n".join(parts)


def attack(run: Run) -> str:
    parts = []
    for case, lanes in run.cases("attack").items():
        bare = bare_passes(lanes)
        rows = [
            [
                row.name,
                row.time,
                f"{row.median / bare.median:.3f}" if bare else "",
                f"{row.facts['flops'] / 1e9:.4g}",
                f"{row.facts['loss_before']:.3f} → {row.facts['loss']:.3f}" if "loss" in row.facts else "",
                f"{row.facts['share_at_least']:.1%}" if "share_at_least" in row.facts else "",
                str(row.facts["rounds"]),
            ]
            for row in lanes.values()
        ]
        heads = ["way", "time", "over ten bare passes", "GFLOP", "mean loss", "loss at least the peer's", "rounds"]
        parts += [f"**{case}**", table(heads, rows)]
    return "\n\n".join(parts)


def methods(run: Run) -> str:
    """A row a method: its time, in units of a forward and over the passes that it cannot do without."""
    rows = []
    for case, lanes in run.cases("methods").items():
        ours, limit, unit = (lanes.get(name) for name in ("ours", "unavoidable", "forward and backward"))
        if ours and limit and unit:
            units = [f"{3 * row.median / unit.median:.1f}" for row in (ours, limit)]
            operations = [f"{3 * row.facts['flops'] / unit.facts['flops']:.1f}" for row in (ours, limit)]
            over = f"{ours.median / limit.median:.3f}"
            rows.append([case, ours.time, *units, *operations, over, str(ours.facts["rounds"])])
    heads = [
        "method",
        "time",
        "units",
        "unavoidable",
        "units of operations",
        "unavoidable",
        "over unavoidable",
        "rounds",
    ]
    return table(heads, rows) if rows else ""


def scaling(run: Run) -> str:
    rows = []
    for lanes in run.cases("scaling").values():
        for row in lanes.values():
            facts = row.facts
            least, most = min(facts["passes"]), max(facts["passes"])
            passes = f"{least:.2f}" if most - least < 0.005 else f"{least:.2f} to {most:.2f}"
            if "passes_per_K" in facts:
                passes = f"{facts['passes_per_K']:.2f} K + {facts['passes_besides']:.2f}"
            peaks = [point["peak_bytes"] for point in facts["points"]]
            values = [str(point["x"]) for point in facts["points"]]
            rows.append(
                [
                    f"{facts['axis']} = {', '.join(values)}",
                    facts["masks"],
                    passes,
                    f"{facts['flops_slope']:.2f}",
                    f"{facts['time_slope']:.2f}",
                    f"{peaks[-1] / peaks[0]:.2f}",
                ]
            )
    heads = [
        "size",
        "masks",
        "costs, in passes of the model",
        "exponent of FLOPs",
        "of time",
        "memory, last over first",
    ]
    return table(heads, rows) if rows else ""


def plain(suite: str) -> Callable[[Run], str]:
    """Tables for a suite of which nothing special is known: times, over the limit's."""

    def tables(run: Run) -> str:
        parts = []
        for case, lanes in run.cases(suite).items():
            limit = next((row for row in lanes.values() if row.facts.get("role") == "limit"), None)
            rows = [
                [
                    row.name,
                    row.time,
                    f"{row.median / limit.median:.2f}" if limit else "",
                    f"{row.facts['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row.facts else "",
                ]
                for row in lanes.values()
            ]
            head = f"over {limit.name}" if limit else "over the limit"
            parts += [f"**{case}**", table(["way", "time", head, "peak MiB"], rows)]
        return "\n\n".join(parts)

    return tables
