"""Every Python block of the documentation runs, page by page, every test in it passes, and what it names is there."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from support.pages import blocks, run

from advvl import recipes
from advvl.adapters import registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
METHODS = sorted((DOCS / "methods").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *METHODS]
SLOW = {
    "extending.md",
    "language-models.md",
    "lxmert.md",
    "methods.md",
    "training-loop.md",
    "worked-example.md",
}  # to run
HEADINGS = ["Formula", "Code", "When to use it", "Published code", "Parity", "Evidence"]  # of the page of a recipe
RECIPES = [name for name, value in vars(recipes).items() if isinstance(value, FunctionType)]
MENU = re.compile(r"^ +- ([^:\n]+): (methods/[\w-]+\.md)$", re.MULTILINE)
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
PATH = re.compile(r"`((?:advvl|tests|docs|examples|benchmarks)/[\w./-]+)`")


def name(page: Path) -> str:
    return page.relative_to(ROOT if page.name == "README.md" else DOCS).as_posix()


def models_of_methods() -> dict[str, Any]:
    """The models that the first block of docs/methods.md makes for the page of each method."""
    found: dict[str, Any] = {}
    before, code = next(blocks((DOCS / "methods.md").read_text()))
    exec(compile("\n" * before + code, "methods.md", "exec"), found)
    return found


def readme_names() -> dict[str, Any]:
    """The model, loader and optimiser of one's own that the README's example of VILLA takes for given."""
    from advvl.models.uniter.model import UniterConfig, gather_index
    from advvl.tasks.uniter.vqa import UniterForVQA

    torch.manual_seed(0)
    config = UniterConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        img_dim=8,
    )
    model = UniterForVQA(config, num_answers=5)
    words, boxes = torch.tensor([4, 3]), torch.tensor([2, 3])
    inputs = {
        "input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]]),
        "position_ids": torch.arange(4)[None],
        "img_feat": torch.randn(2, 3, 8),
        "img_pos_feat": torch.rand(2, 3, 7),
        "attn_masks": torch.ones(2, 6, dtype=torch.long),
        "gather_index": gather_index(words, boxes, 4),
        "txt_lens": words,
        "num_bbs": boxes,
        "targets": torch.rand(2, 5),
    }
    return {"uniter": model, "loader": [inputs], "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)}


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing.*:FutureWarning")  # of transformers, by TRL's default
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW)) for page in WITH_CODE], ids=name
)
def test_the_code_of_every_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    module = ModuleType("page")  # a module of its own, as the reader's file is
    monkeypatch.setitem(sys.modules, "page", module)
    names = vars(module)
    torch.manual_seed(0)
    names.update(readme_names() if page.name == "README.md" else models_of_methods() if page in METHODS else {})
    torch.manual_seed(0)
    run(page.read_text(), str(page), names)
    for test in [value for name, value in names.items() if name.startswith("test_")]:
        test()


def test_the_first_code_of_the_readme_runs_as_pasted_and_says_something(capsys: pytest.CaptureFixture[str]) -> None:
    _, code = next(blocks((ROOT / "README.md").read_text()))
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("adversarial loss 0.")


def test_a_block_that_fails_is_seen_at_its_line() -> None:
    text = "a page\n\n```python\nx = 1\n```\n\nmore\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run(text, "page.md", {})
    assert caught.traceback[-1].lineno == 9  # counted from 0


@pytest.mark.parametrize(
    "page", ["README.md", "your-model.md", "worked-example.md", "extending.md", "language-models.md"]
)
def test_pages_that_teach_have_code(page: str) -> None:
    assert page in map(name, WITH_CODE)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_page_links_to_what_exists(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    missing = [path for path in PATH.findall(page.read_text()) if not (ROOT / path).exists()]
    assert not missing


def test_the_index_lists_every_page_itself_or_by_its_section() -> None:
    listed = set(LINK.findall((DOCS / "index.md").read_text()))
    assert listed >= {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    methods = set(LINK.findall((DOCS / "methods.md").read_text()))
    assert methods >= {f"methods/{page.name}" for page in METHODS}


def figures(page: Path) -> set[str]:
    """What a page says of accuracies: those with an interval, and percentages with a decimal."""
    text = " ".join(page.read_text().split())
    return set(re.findall(r"\S\d+\.\d \[[^\]]+\]", text)) | set(re.findall(r"\b(\d+\.\d) %", text))


QUOTING = ["index.md", *(f"methods/{method}.md" for method in ("villa", "freelb", "smart", "pgd", "free_at"))]


@pytest.mark.parametrize("page", QUOTING)
def test_figures_of_evidence_are_those_of_its_page(page: str) -> None:
    evidence = " ".join((DOCS / "evidence.md").read_text().split())
    quoted = figures(DOCS / page)
    assert quoted
    assert not {figure for figure in quoted if figure not in evidence}


def pages_of_recipes() -> dict[str, Path]:
    """The page of each recipe, by the names that the menu of the site has for it."""
    found = MENU.findall((ROOT / "mkdocs.yml").read_text())
    return {name: DOCS / page for names, page in found for name in names.split(", ")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_page_in_the_menu_that_says_all_and_calls_it(recipe: str) -> None:
    page = pages_of_recipes()[recipe]
    text = page.read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    assert f"`advvl/recipes/{recipe}.py`" in text
    assert "paper-versus-code.md" in text
    assert re.search(r"^## Parity\n+.*`tests/", text, re.MULTILINE)
    calls = [node.func for _, code in blocks(text) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert recipe in {call.id for call in calls if isinstance(call, ast.Name)}
