"""The loops of docs/loops.md: how many lines change, and that each leaves the gradients of the plain loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate.state import AcceleratorState
from support.compare import close_gradients
from support.pages import run
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from advvl import AdversarialTraining, adapt, freelb, villa

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*activation_checkpointing.*:FutureWarning"
    ),  # of transformers, by TRL's default
]

PAGE = (Path(__file__).parent.parent / "docs/loops.md").read_text()
DIFFS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
STATED = {name: int(lines) for name, lines in re.findall(r"^\| \[([^]]+)\]\S* \| (\d+) \|$", PAGE, re.MULTILINE)}
WINDOWS = {"Plain PyTorch": 1, "accelerate": 2, "Trainer of transformers": 1}
METHODS = {"freelb": freelb(step_sizes={"text": 0.1}), "villa": villa(step_sizes={"text": 0.1})}
MOST = 5  # lines to change

Gradients = list[dict[str, Tensor]]


class Recorder:
    """The page's names, and the gradients that any optimiser's every step finds in the model made last."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = dict(names)
        make, self.updates, self.dropout = self.names["make_model"], Gradients(), 0.0

        def made() -> nn.Module:
            self.model: nn.Module = make()
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = self.dropout
            return self.model

        self.names["make_model"] = made

    def see(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.updates.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})

    def program(self, text: str) -> Gradients:
        """What running it has found."""
        self.updates.clear()
        exec(compile(text, "a loop of loops.md", "exec"), dict(self.names))
        return list(self.updates)

    def reference(self, method: AdversarialTraining | None, *, window: int, **options: Any) -> Gradients:
        """The plain loop, written out; None: without an adversary."""
        self.updates.clear()
        model = self.names["make_model"]().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = list(torch.utils.data.DataLoader(self.names["rows"], batch_size=2))
        target = adapt(model, **options)
        for number, batch in enumerate(batches, start=1):
            if method is None:
                (model(**batch).loss / window).backward()
            else:
                method.step(target, batch, backward=lambda loss: (loss / window).backward())
            if number % window == 0 or number == len(batches):
                optimizer.step()
                optimizer.zero_grad()
        return list(self.updates)


@contextmanager
def float64_in(folder: Path) -> Iterator[None]:
    """The default, in a folder of one's own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page defines."""
    names: dict[str, Any] = {}
    with float64_in(tmp_path_factory.mktemp("page")):
        run(PAGE, "loops.md", names)
    return names


@pytest.fixture
def recorder(tmp_path: Path, names: dict[str, Any]) -> Iterator[Recorder]:
    recorder = Recorder(names)
    handle = register_optimizer_step_pre_hook(recorder.see)
    AcceleratorState._reset_state(reset_partial_state=True)  # of one precision for a whole process
    with float64_in(tmp_path):
        yield recorder
    AcceleratorState._reset_state(reset_partial_state=True)
    handle.remove()


def side(loop: str, sign: str) -> str:
    """The program before (-) or after (+) the change."""
    lines = DIFFS[loop].splitlines()
    return "\n".join(line[1:] for line in lines if not line or line[0] in (" ", sign))


def test_few_lines_change_and_as_many_as_the_page_says() -> None:
    added = {loop: sum(bool(re.match(r"\+\s*\S", line)) for line in diff.splitlines()) for loop, diff in DIFFS.items()}
    assert list(added.values()) == list(STATED.values())[: len(added)]
    assert added.keys() == WINDOWS.keys()
    assert max(STATED["accelerate"], STATED["plain PyTorch"]) <= MOST


@pytest.mark.parametrize("loop", WINDOWS)
def test_without_the_change_the_loop_is_the_one_without_an_adversary(recorder: Recorder, loop: str) -> None:
    close_gradients(recorder.program(side(loop, "-")), recorder.reference(None, window=WINDOWS[loop]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", WINDOWS)
def test_with_the_change_it_has_the_gradients_of_the_plain_loop(recorder: Recorder, loop: str, method: str) -> None:
    found = recorder.program(side(loop, "+").replace("freelb", method))
    close_gradients(found, recorder.reference(METHODS[method], window=WINDOWS[loop]))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*")
@pytest.mark.parametrize("kind", ["Classifier", "AutomaticClassifier"])
def test_the_modules_of_lightning_have_them_too(recorder: Recorder, kind: str) -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    make = recorder.names[kind].__init__.__globals__  # where the page's class looks its model up
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(make, "make_model", recorder.names["make_model"])
        module = recorder.names[kind]()
        found = Gradients()
        module.on_before_optimizer_step = lambda optimizer: found.append(
            {name: p.grad.clone() for name, p in recorder.model.named_parameters() if p.grad is not None}
        )
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)  # type: ignore[arg-type]
        trainer.fit(module, torch.utils.data.DataLoader(recorder.names["rows"], batch_size=2))
    close_gradients(found, recorder.reference(METHODS["freelb"], window=1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", ["Plain PyTorch", "accelerate"])  # Trainer seeds anew: see test_trainer.py
def test_it_has_them_with_dropout_too(recorder: Recorder, loop: str, method: str) -> None:
    recorder.dropout = 0.5
    found = recorder.program(side(loop, "+").replace("freelb", method))
    close_gradients(found, recorder.reference(METHODS[method], window=WINDOWS[loop]))
    recorder.dropout = 0.0
    with pytest.raises(AssertionError):
        close_gradients(found, recorder.reference(METHODS[method], window=WINDOWS[loop]))


def test_in_accelerate_s_half_precision_it_has_those_of_a_loop_under_autocast(recorder: Recorder) -> None:
    torch.set_default_dtype(torch.float32)

    def call(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**batch)
        outputs.loss, outputs.logits = outputs.loss.float(), outputs.logits.float()
        return outputs

    text = side("accelerate", "+").replace("steps=2)", 'steps=2, mixed_precision="bf16")').replace("freelb", "villa")
    assert "bf16" in text
    found = recorder.program(text)
    close_gradients(found, recorder.reference(METHODS["villa"], window=2, call=call), torch.float32)
    with pytest.raises(AssertionError):
        close_gradients(found, recorder.reference(METHODS["villa"], window=2), torch.float32)
