"""The most damaging examples in HTML: the picture with its regions, the words, and how hard each was hit."""

from __future__ import annotations

import base64
import html
import math
import struct
from collections.abc import Sequence
from typing import Final

from advvl.evaluation.examples import Damage, Example, picture_bytes

_HEAT: Final = "213, 94, 0"  # Okabe and Ito's vermilion, whose strength says it all
_MISSED: Final = (
    "The attack did not take this example when it was made again: tint and answer are of an attempt that failed."
)
_SMALL: Final = 128  # pixels: a narrower picture is shown with its pixels as squares


def example_html(damage: Damage, example: Example, how: str) -> str:
    """One example as a figure.

    Arguments:
        how: the budget and the attack in words.
    """
    picture = _scene(example) if example.picture is not None or example.regions else ""
    words = f'<p class="words">{_words(example)}</p>' if example.words else ""
    truth = f"<dt>Truth</dt><dd>{html.escape(example.truth)}</dd>" if example.truth else ""
    norms = ", ".join(f"{modality} {norm:.4g}" for modality, norm in damage.norms.items() if norm == norm)
    measured = f"Measured: score {damage.clean:g} to {damage.worst:g} by {how}" + (f"; length {norms}" if norms else "")
    taken = example.before != example.after if example.taken is None else example.taken
    missed = "" if taken else f"<p><strong>{_MISSED}</strong></p>"
    said = (
        f"<dl><dt>Before</dt><dd>{html.escape(example.before)}</dd><dt>After</dt><dd>{html.escape(example.after)}</dd>"
        f"{truth}</dl>{missed}<p>{html.escape(measured)}</p>"
    )
    caption = f"<figcaption>{html.escape(damage.model)}, example {damage.example}</figcaption>"
    return f"<figure>{caption}{picture}{words}{said}</figure>"


def _words(example: Example) -> str:
    shares = _shares(example.word_heat) or [0.0] * len(example.words)
    return " ".join(
        f'<span style="background: rgba({_HEAT}, {0.8 * share:.2f})"{_title(heat)}>{html.escape(word)}</span>'
        for word, share, heat in zip(
            example.words, shares, example.word_heat or [math.nan] * len(example.words), strict=True
        )
    )


def _title(heat: float) -> str:
    return "" if math.isnan(heat) else f' title="length {heat:.4g}"'


def _scene(example: Example) -> str:
    """The picture, or a blank, under its regions, each tinted by its heat."""
    shares = _shares(example.region_heat)
    boxes = "".join(
        f'<rect x="{100 * left:.2f}" y="{100 * top:.2f}" width="{100 * (right - left):.2f}" '
        f'height="{100 * (bottom - top):.2f}" fill="rgb({_HEAT})" fill-opacity="{0.7 * share:.2f}"/>'
        for (left, top, right, bottom), share in zip(
            example.regions, shares or [0.0] * len(example.regions), strict=True
        )
    )
    hit = ""
    if any(shares):
        hottest = max(range(len(shares)), key=shares.__getitem__)
        hit = f" Region {hottest + 1} of {len(shares)} was perturbed most."
    said = f"Scene of {len(example.regions)} regions" if example.picture is None else "Picture"
    label = html.escape(f"{said}: {' '.join(example.words)}.{hit}", quote=True)
    image = '<div class="blank"></div>' if example.picture is None else _image(example.picture)
    regions = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{boxes}</svg>'
    return f'<div class="scene" role="img" aria-label="{label}">{image}{regions}</div>'


def _image(picture: object) -> str:
    kind, data = picture_bytes(picture)
    small = kind == "image/png" and struct.unpack(">I", data[16:20])[0] < _SMALL
    coarse = ' class="pixels"' if small else ""
    return f'<img alt=""{coarse} src="data:{kind};base64,{base64.b64encode(data).decode()}">'


def _shares(heat: Sequence[float]) -> list[float]:
    most = max(heat, default=0.0)
    return [value / most if most > 0 else 0.0 for value in heat]
