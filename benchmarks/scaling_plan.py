"""A plan on paper: VILLA pre-training of UNITER-large on 16 to 512 GPUs, from first principles.

`python benchmarks/scaling_plan.py` writes its tables into docs/scaling.md. Nothing here is measured but ACTIVATION.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tables import table

from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.pretraining import UniterForPretraining

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
GPUS = (16, 32, 64, 128, 256, 512)
GB = 1e9

# What was published: UNITER-large on all data, 16 GPUs.
TOKENS_A_GPU, ACCUMULATED, PUBLISHED_GPUS = 6144, 4, 16
TOKENS = TOKENS_A_GPU * ACCUMULATED * PUBLISHED_GPUS  # an update
STEPS = 3  # K

# Assumptions.
WORDS, REGIONS = 20, 40  # of an example
MASKED = 0.15  # of the words; they alone are scored against the vocabulary
PEAK, UTILISATION = 989e12, 0.35  # an H100 SXM in bf16, and the share of it that is reached
LINKS = {"400 Gb/s": 50e9, "100 Gb/s": 12.5e9, "25 Gb/s": 3.125e9}  # bytes a second into and out of each GPU
REACHED = 0.8  # of a link
ACTIVATION = 61  # bytes a token, layer and unit of width that a graph keeps; measured under bf16 autocast, dropout 0.1


@dataclass(frozen=True)
class Method:
    """An update of VILLA as advvl makes it: forwards, whole backwards, and backwards towards perturbations alone."""

    name: str
    forwards: int
    backwards: int
    input_only: int
    graphs: int  # alive at once
    gathers: int  # of all weights under FSDP2: one for each forward and each backward that is run, of whatever rows

    @property
    def units(self) -> int:
        """In forwards, of which a backward costs two; a plain update costs three."""
        return self.forwards + 2 * self.backwards + self.input_only


K = STEPS
METHODS = {
    "fresh": Method("VILLA in turn, fresh masks (the paper's)", 2 * K + 1, 2 * K + 1, 0, 3, 2 * (K + 1)),
    "shared": Method("VILLA in turn, shared masks", 2 * K - 1, 2 * K - 1, 1, 2, 2 * (2 * K - 1) + 1),
    "together": Method("VILLA together, fresh masks (as released)", K + 1, K + 1, 0, 2, 2 * (K + 1)),
    "together, shared": Method("VILLA together, shared masks", K, K, 1, 2, 2 * K + 1),
    "freelb": Method("FreeLB together", K, K, 0, 1, 2 * K),
    "plain": Method("plain training", 1, 1, 0, 1, 2),
}
PLANNED = METHODS["fresh"]
REDUCTIONS = K + 1  # of the planned update if every backward reduced: both modalities' passes are run as one batch


def sizes() -> tuple[UniterConfig, int]:
    """UNITER-large and the number of its parameters with the heads of pre-training."""
    config = UniterConfig.large()
    with torch.device("meta"):
        model = UniterForPretraining(config)
    return config, sum(p.numel() for p in model.parameters())


def block(config: UniterConfig) -> int:
    """Weights of one layer."""
    return 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size


def forward_flops(config: UniterConfig) -> float:
    """Of one example, in matrix products: the layers, their attention, the regions' projection, the masked words' scores."""
    length, width = WORDS + REGIONS, config.hidden_size
    layers = config.num_hidden_layers * (2 * length * block(config) + 4 * length**2 * width)
    scores = MASKED * WORDS * 2 * width * (config.vocab_size + width)
    return layers + REGIONS * 2 * config.img_dim * width + scores


def compute_seconds(config: UniterConfig, method: Method, gpus: int) -> float:
    examples = TOKENS / (WORDS + REGIONS)
    return examples * method.units * forward_flops(config) / (gpus * PEAK * UTILISATION)


def hiding(method: Method) -> float:
    """The share of an update's compute that a reduction can hide behind: the backward of the last graph.

    Under DDP the clean graph's, since a gradient is complete only when both graphs of the last backward have given theirs.
    """
    return 2 / method.units


def ring_bytes(parameters: int, gpus: int) -> float:
    """What each GPU sends, and receives, in an all-reduce of fp32 gradients."""
    return 2 * (gpus - 1) / gpus * 4 * parameters


def update_seconds(compute: float, sent: float, rate: float, reductions: int, hidden: float) -> float:
    """Compute, and what of the reductions does not hide behind the backward that makes their gradients."""
    reduction = sent / (REACHED * rate)
    return compute + reductions * max(0.0, reduction - hidden)


def ddp_memory(parameters: int) -> float:
    """Weights, gradients, buckets and AdamW's two moments in fp32, and autocast's bf16 weights."""
    return float(parameters * (4 + 4 + 4 + 2 * 4 + 2))


def fsdp_memory(config: UniterConfig, parameters: int, gpus: int, *, held: bool) -> float:
    """Weights, gradients and moments in shards; two layers and the rest gathered in bf16; whole gradients held in fp32."""
    rest = parameters - config.num_hidden_layers * block(config)
    gathered = 2 * (2 * block(config) + rest)
    return 16 * parameters / gpus + gathered + (4 * parameters if held else 0)


def activations(config: UniterConfig, tokens: int, graphs: int, *, checkpointed: bool) -> float:
    """What the graphs keep; checkpointed, each layer's input in fp32, and one layer's insides."""
    one = ACTIVATION * config.hidden_size * tokens
    inputs = 4 * config.hidden_size * tokens * config.num_hidden_layers
    return graphs * inputs + one if checkpointed else graphs * one * config.num_hidden_layers


def fsdp_traffic(parameters: int, gpus: int, method: Method) -> float:
    """What each GPU receives: bf16 weights for every forward and backward, fp32 gradients once."""
    return (gpus - 1) / gpus * parameters * (2 * method.gathers + 4)


def memory_table() -> str:
    config, parameters = sizes()
    lines = []
    for gpus in GPUS:
        share = TOKENS // gpus
        tokens = min(share, TOKENS_A_GPU)
        kept = [activations(config, tokens, PLANNED.graphs, checkpointed=c) for c in (False, True)]
        fixed = [ddp_memory(parameters), *(fsdp_memory(config, parameters, gpus, held=h) for h in (True, False))]
        totals = [fixed[0] + kept[0], fixed[0] + kept[1], fixed[1] + kept[0]]
        cells = [f"{value / GB:.1f}" for value in (*fixed, *kept, *totals)]
        lines.append([str(gpus), f"{share:,}", f"{tokens:,} x {math.ceil(share / tokens)}", *cells])
    heads = ["GPUs", "tokens per GPU", "in batches of", "DDP", "FSDP2", "FSDP2, one reduction per pass", "graphs"]
    heads += ["graphs, checkpointed", "DDP in all", "DDP, checkpointed", "FSDP2 in all"]
    return table(heads, lines)


def time_table() -> str:
    config, parameters = sizes()
    lines = []
    for gpus in GPUS:
        compute, sent = compute_seconds(config, PLANNED, gpus), ring_bytes(parameters, gpus)
        row = [str(gpus), f"{1e3 * compute:.0f} ms", f"{sent / GB:.2f} GB"]
        hidden = hiding(PLANNED) * compute / math.ceil(TOKENS / gpus / TOKENS_A_GPU)  # of the last batch alone
        fast = LINKS["400 Gb/s"]
        ways = [
            (fast, 1, hidden),
            *((rate, reductions, 0.0) for rate in LINKS.values() for reductions in (1, REDUCTIONS)),
        ]
        for rate, reductions, behind in ways:
            seconds = update_seconds(compute, sent, rate, reductions, behind)
            row.append(f"{1e3 * seconds:.0f} ms, {compute / seconds:.0%}")
        hours = 1e4 * update_seconds(compute, sent, fast, 1, 0.0) / 3600
        lines.append([*row, f"{hours:.2f} h"])
    each = [f"{name}: {kind}" for name in LINKS for kind in ("one", f"{REDUCTIONS}")]
    return table(["GPUs", "compute", "all-reduce", "400 Gb/s: one, hidden", *each, "10,000 updates"], lines)


def method_table(gpus: int = 64) -> str:
    config, parameters = sizes()
    tokens = min(TOKENS // gpus, TOKENS_A_GPU)
    lines = []
    for method in METHODS.values():
        compute = compute_seconds(config, method, gpus)
        kept = activations(config, tokens, method.graphs, checkpointed=False)
        lines.append(
            [
                method.name,
                str(method.units),
                str(method.graphs),
                f"{1e3 * compute:.0f} ms",
                f"{kept / GB:.1f} GB",
                f"{ring_bytes(parameters, gpus) / GB:.1f} GB",
                f"{fsdp_traffic(parameters, gpus, method) / GB:.1f} GB",
            ]
        )
    heads = ["update", "forwards (a backward is two)", "graphs at once", "compute", "kept by graphs"]
    return table([*heads, "DDP sends", "FSDP2 receives"], lines)


def tables() -> dict[str, str]:
    return {"memory": memory_table(), "time": time_table(), "methods": method_table()}


def written(page: str) -> str:
    """The page with the tables in the places that are marked for them."""
    for name, text in tables().items():
        place = re.compile(rf"(<!-- plan: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = place.subn(lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"expected one place for the table {name!r} in {PAGE.name}, got {count}")
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
