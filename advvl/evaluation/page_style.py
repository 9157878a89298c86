"""The style of the report page: light or dark as the reader's system is, and no wider than a phone."""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --ground: #ffffff; --faint: #d8dce1; --soft: #5a6370; --loud: #fff1e8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --ground: #15181c; --faint: #3a4048; --soft: #a5adb8; --loud: #3d2513; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .4rem; }
h3 { font-size: 1rem; margin: .8rem 0 .2rem; }
p { margin: .4rem 0; }
section > p, header > p { color: var(--soft); max-width: 46rem; }
.flags { border-left: 6px solid #D55E00; background: var(--loud); padding: .6rem .9rem; margin: 1rem 0; }
.flags h2 { margin: 0; }
.flags ul { margin: .4rem 0; padding-left: 1.2rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
svg.curve { display: block; width: 100%; max-width: 36rem; height: auto; }
svg.curve text { fill: var(--ink); font-size: 13px; }
svg.curve .grid { stroke: var(--faint); stroke-width: 1; }
svg.curve line.chance { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 4; }
svg.curve .band { fill-opacity: .18; stroke: none; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .4rem 0; }
.legend svg { vertical-align: middle; }
.table { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--faint);
  overflow-wrap: normal; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); }
tbody th { font-weight: 600; white-space: normal; min-width: 6.5rem; }
.long td { white-space: normal; overflow-wrap: anywhere; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; border: 1px solid var(--faint); border-radius: 6px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
.scene { position: relative; background: #ffffff; border: 1px solid var(--faint); }
.scene img { display: block; width: 100%; height: auto; }
.scene img.pixels { image-rendering: pixelated; }
.scene .blank { aspect-ratio: 4 / 3; }
.scene svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.scene rect { stroke: #1b1f24; stroke-opacity: .55; stroke-width: 1; vector-effect: non-scaling-stroke; }
.words { line-height: 1.9; }
.words span { padding: .1rem .2rem; border-radius: 3px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .4rem 0; }
dt { color: var(--soft); }
dd { margin: 0; }
"""
