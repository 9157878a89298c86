"""The report page and its Markdown, JSON and CSV: figures, escapes, and what a browser makes of it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image
from support.measurements import measurement
from support.pages import blocks

from advvl.errors import ConfigurationError, DataError, OutputDirectoryError
from advvl.evaluation.curves import curves_of
from advvl.evaluation.examples import Damage, Example, grid
from advvl.evaluation.measurement import Flag
from advvl.evaluation.page import page
from advvl.evaluation.page_svg import COLORS, curve_svg
from advvl.evaluation.report import to_csv, to_json, to_markdown, write_report

EVIL = '<script>alert("1")</script><img src=x onerror=alert(1)>'
FLAG = Flag("random search beats gradients", f"3 of 10 {EVIL}")
PLAIN = measurement([{0: 0, 1: 0, 2: 0}, {3: 1, 4: 1}, {5: 0}], about={"seconds": 1.5, "weights": EVIL})
BETTER = measurement([{0: 0}, {1: 1}, {}], flags=(FLAG,), about={"seconds": 2.5})
PICTURE = np.zeros((6, 8, 3), np.uint8)
PICTURE[..., 0] = 230  # the one purely red thing of the page
PICTURE[..., 2] = 40


def draw(damage: Damage) -> Example:
    return Example(
        words=["how", EVIL, "?"],
        word_heat=[0.0, 2.0, 1.0],
        picture=PICTURE,
        regions=grid(1, 2),
        region_heat=[0.0, 0.0],
        before=EVIL,
        after=f"{EVIL} & more",
        truth="yes",
    )


def made(**options) -> str:
    return page({"standard": PLAIN, EVIL: BETTER}, title=EVIL, chance=0.25, draw=draw, **options)


class Reader(HTMLParser):
    """Collects what an HTML page has of tags and attributes, and complains of a tag that is not closed."""

    void = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_well_formed_and_all_text_of_others_is_text() -> None:
    found = Reader(made())
    assert not found.open
    names = {name for name, _ in found.tags}
    assert "script" not in names
    assert not [attrs for _, attrs in found.tags if any(name.startswith("on") for name in attrs)]
    assert "".join(found.texts).count(EVIL) >= 8  # title twice, legend, tables, words, answers


def test_the_page_makes_no_request() -> None:
    text = made()
    sources = [attrs[name] or "" for _, attrs in Reader(text).tags for name in ("src", "href") if name in attrs]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|url\(|@import", text)


def test_the_chance_level_that_measurements_record_is_drawn_unless_another_is_given() -> None:
    known = {"a": measurement(about={"chance": 0.2}), "b": measurement(about={"chance": 0.2})}
    assert page(known) == page(known, chance=0.2) != page(known, chance=0.3)
    assert to_json(known)["chance"] == 0.2
    assert "Chance level: 20.0 %." in to_markdown(known)
    assert to_json({"a": measurement()})["chance"] is None
    with pytest.raises(DataError, match=r"same chance to compare, got 0\.2 of 'a' and 0\.3 of 'b'"):
        page({"a": known["a"], "b": measurement(about={"chance": 0.3})})
    for wrong in (1.5, "<b>"):
        with pytest.raises(DataError, match="expected the chance that measurements record to be in"):
            page({"a": measurement(about={"chance": wrong})})


def test_every_picture_has_words_for_who_does_not_see_it() -> None:
    for name, attrs in Reader(made()).tags:
        if attrs.get("role") == "img":
            assert attrs["aria-label"]
        if name == "img":
            assert "alt" in attrs  # empty: its frame has the words
        if name == "svg":
            assert attrs.get("role") == "img" or attrs.get("aria-hidden") == "true"


def test_flags_stand_above_all_figures() -> None:
    text = made()
    assert text.index("Do not trust these figures yet") < text.index("<h2>Accuracy against radius</h2>")
    assert "random search beats gradients" in text
    assert "Do not trust" not in page({"standard": PLAIN})


def test_checks_that_were_not_made_are_named_with_the_reason() -> None:
    reason = f"no other example {EVIL}"
    made = measurement([{}, {}, {}], about={"checks": {"random outputs": "made", "unlimited attack": "made"}})
    partly = measurement(
        [{}, {}, {}], about={"checks": {"random outputs": "made", "unlimited attack": f"not made: {reason}"}}
    )
    assert "No flag was raised against these figures." in page({"a": made})
    assert "Not checked" not in page({"a": made}) + to_markdown({"a": made})
    shown = page({"a": made, "b": partly})
    assert "No flag was raised by the checks that were made." in shown
    assert f"<li>b: unlimited attack ({escape(reason)})</li>" in shown
    assert "<li>a: " not in shown
    assert "- b: unlimited attack (no other example &lt;script" in to_markdown({"b": partly})
    assert "<li>a: it is not recorded which checks were made</li>" in page({"a": measurement()})
    flagged = page({"a": replace(partly, flags=(FLAG,))})
    assert flagged.index("Do not trust") < flagged.index("Not checked:") < flagged.index("Accuracy against radius")


def test_the_radius_is_to_scale_and_the_band_holds_its_line() -> None:
    (curve, _) = curves_of(measurement([{0: 0}, {1: 0}, {}]))
    root = ElementTree.fromstring(curve_svg({"a": curve}, chance=0.5))
    points = [tuple(map(float, point.split(","))) for point in root.find("polyline").attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x2 - x0 == pytest.approx(2 * (x1 - x0), abs=0.11)  # radii 0.5 and 1; a tenth of a unit is kept
    assert y0 < y1 < y2  # down the page as accuracy falls
    band = [tuple(map(float, p.split(","))) for p in root.find("polygon").attrib["points"].split()]
    upper, lower = band[:3], band[3:][::-1]
    for (x, y), (_, top), (_, bottom) in zip(points, upper, lower, strict=True):
        assert top <= y <= bottom, x
    grid_lines = [float(line.attrib["y1"]) for line in root.findall("line") if line.attrib["class"] == "grid"]
    assert min(grid_lines) <= min(y for _, y in band)  # no interval outside 0 and 100 %
    assert max(y for _, y in band) <= max(grid_lines)
    (chance,) = [line for line in root.findall("line") if line.attrib["class"] == "chance"]
    assert float(chance.attrib["y1"]) == pytest.approx((min(grid_lines) + sorted(grid_lines)[4]) / 2, abs=0.2)


def test_no_two_of_many_models_are_drawn_alike() -> None:
    (curve, _) = curves_of(measurement([{0: 0}, {1: 0}, {}]))
    root = ElementTree.fromstring(curve_svg({str(i): curve for i in range(12)}))
    drawn = [(line.attrib["stroke"], line.attrib["stroke-dasharray"]) for line in root.findall("polyline")]
    assert len(set(drawn)) == 12
    assert len({color for color, _ in drawn[: len(COLORS)]}) == len(COLORS)


def test_no_interval_is_outside_0_and_100_per_cent() -> None:
    extreme = {"a": measurement([{}, {}, {}], wrong=0), "b": measurement([dict.fromkeys(range(8), 0), {}, {}])}
    for low, high in re.findall(r"\[([+-]?[\d.]+), ([+-]?[\d.]+)\]", page(extreme)):
        assert -100 <= float(low) <= float(high) <= 100
    for row in csv.DictReader(io.StringIO(to_csv(extreme))):
        assert 0 <= float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) <= 1


def test_markdown_keeps_the_figures_and_shows_markup_as_text() -> None:
    text = to_markdown({"a|b": PLAIN, "*b*": BETTER}, title="R", chance=0.25)
    assert "](" not in to_markdown({"[a](http://b)": PLAIN})
    assert text.startswith("# R\n\n## Do not trust these figures yet\n\n")
    assert "| perturbation | a\\|b | \\*b\\* |" in text
    assert "| image L2 0.5 | 50.0 [23.7, 76.3] | 70.0 [39.7, 89.2] |" in text
    assert "<script>" not in text


def test_json_and_csv_have_every_budget_of_every_model() -> None:
    found = json.loads(json.dumps(to_json({"a": PLAIN, "b": BETTER}), allow_nan=False))
    assert [row["accuracy"] for row in found["models"]["a"]["accuracy"]] == [0.8, 0.5, 0.3, 0.4]
    assert found["models"]["a"]["wins"] == [
        {"gradients": 3, "search": 0},
        {"gradients": 0, "search": 2},
        {"gradients": 1, "search": 0},
    ]
    assert found["models"]["b"]["flags"][0]["name"] == FLAG.name
    assert [row["perturbation"] for row in found["comparisons"]][1] == "image L2 0.5"
    rows = list(csv.DictReader(io.StringIO(to_csv({"a": PLAIN, "b": BETTER}))))
    assert [(row["model"], row["radius"]) for row in rows][:4] == [("a", r) for r in ("0", "0.5", "1", "0.5 + 0.1")]
    assert (rows[1]["examples"], rows[1]["interval"]) == ("10", "Wilson")


def test_all_formats_are_written_beside_each_other(tmp_path: Path) -> None:
    path = write_report(tmp_path / "new", {"a": PLAIN}, draw=draw)
    assert sorted(one.name for one in path.parent.iterdir()) == [
        "report.csv", "report.html", "report.json", "report.md",
    ]  # fmt: skip
    assert path.read_text(encoding="utf-8") == page({"a": PLAIN}, draw=draw)


def test_no_example_is_shown_that_no_attack_took() -> None:
    text = page({"a": measurement([{}, {}, {}])}, draw=draw)
    assert "No attack cost any model an example." in text
    assert text.count("<figure>") == 0
    assert page({"a": PLAIN}, draw=draw, examples=2).count("<figure>") == 2


def test_an_example_that_the_repeated_attack_did_not_take_says_so() -> None:
    shown = page({"a": PLAIN}, draw=draw, examples=1)
    assert "Measured: score 1 to 0 by gradients within image L2 0.5; length image 0.5" in shown
    assert "did not take this example" not in shown
    missed = page({"a": PLAIN}, draw=lambda damage: replace(draw(damage), taken=False), examples=2)
    assert missed.count("The attack did not take this example when it was made again") == 2
    alike = page({"a": PLAIN}, draw=lambda damage: replace(draw(damage), after=EVIL), examples=1)
    assert "did not take this example" in alike


def test_the_order_of_the_most_damaging_examples_is_the_one_that_the_page_states() -> None:
    found = measurement([{0: 0}, {1: 0}, {}])
    found.scores[0, 0, 0] = 0.5  # lost within the smaller budget, but by less
    shown = page({"a": found}, draw=draw)
    assert "Those whose score fell furthest first" in shown
    assert shown.index("a, example 1<") < shown.index("a, example 0<")
    assert "score 1 to 0.5 by gradients within image L2 0.5" in shown


@pytest.mark.parametrize("place", ["file", "file/report"])
def test_a_report_that_cannot_be_written_is_refused_in_words(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="expected to write"):
        write_report(tmp_path / place, {"a": PLAIN})


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"measurements": {}}, DataError, "one measurement or more"),
        (
            {"measurements": [PLAIN]},
            DataError,
            r"expected \{name: Measurement\}, got \['list'\]; read files by Measurement.load",
        ),
        ({"measurements": {"a": PLAIN, "b": measurement(examples=11)}}, DataError, "same number of examples"),
        ({"chance": 25}, ConfigurationError, r"chance as an accuracy in \[0, 1\]"),
        ({"confidence": 95}, ConfigurationError, "confidence between 0 and 1"),
        ({"confidence": "0.9"}, ConfigurationError, "confidence between 0 and 1"),
        ({"title": None}, ConfigurationError, "a title as text"),
        ({"measurements": {3: PLAIN}}, ConfigurationError, "names of models as text"),
        ({"examples": 0}, ConfigurationError, "1 or more examples"),
        ({"draw": "no"}, ConfigurationError, "draw"),
    ],
)
def test_a_page_of_nonsense_is_refused(given: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        page(**{"measurements": {"a": PLAIN}, **given})


def test_the_documentation_comes_from_a_clip_to_a_page_in_ten_lines() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    _, code = next(found for found in blocks(text) if "write_report" in found[1])
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert all(len(line) <= 100 for line in code.splitlines())


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browser(tmp_path: Path, *arguments: str) -> str:
    """Run the headless browser on a file, and return what it prints."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
    ]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout


def near(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
    """The number of pixels within 12 of 255 of a colour."""
    return int((np.abs(pixels.astype(int) - color) <= 12).all(axis=2).sum())


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1200, 360], ids=["desktop", "phone"])
def test_a_browser_shows_curves_and_pictures_and_nothing_wider_than_the_screen(width: int, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(made(), encoding="utf-8")
    # A window of a browser has a least width; a frame has none. The frame says how wide its page is.
    (tmp_path / "frame.html").write_text(
        f"""<body style="margin:0"><iframe id="f" src="report.html" style="width:{width}px;height:4000px;border:0"></iframe>
        <script>onload = () => {{ const root = document.getElementById("f").contentDocument.documentElement;
        document.body.setAttribute("data-width", root.scrollWidth);
        document.body.setAttribute("data-curves", root.querySelectorAll("svg.curve polyline").length); }}</script></body>"""
    )
    window = ("--allow-file-access-from-files", f"--window-size={max(width, 500)},4000", "frame.html")
    dumped = browser(tmp_path, "--virtual-time-budget=5000", "--dump-dom", *window)
    assert re.search(r'data-width="(\d+)"', dumped)[1] == str(width)
    assert re.search(r'data-curves="(\d+)"', dumped)[1] == "4"  # of two models, image and both jointly
    browser(tmp_path, f"--screenshot={tmp_path / 'shot.png'}", *window)
    pixels = np.round(255 * image.imread(tmp_path / "shot.png")[:, :width, :3]).astype(np.uint8)
    for color in COLORS[:2]:
        assert near(pixels, tuple(bytes.fromhex(color[1:]))) > 100
    assert near(pixels, (230, 0, 40)) > 5000
    for missing in COLORS[2:4]:
        assert near(pixels, tuple(bytes.fromhex(missing[1:]))) == 0
