"""The example, through its real command line; `advvl villa-uniter`; and the configurations beside it."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.spawn import Script
from support.tiny import VALUES

import advvl
from advvl.experiments.cli import main
from advvl.experiments.command_line import add_flags, parse
from advvl.experiments.config import Layer, build, identity, read_yaml
from advvl.experiments.lxmert_options import PRESETS as LXMERT_PRESETS
from advvl.experiments.lxmert_options import LxmertOptions
from advvl.experiments.uniter import PRESETS, UniterOptions

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "villa_uniter.py"
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def until(condition: Callable[[], bool], process: Script | subprocess.Popen[bytes]) -> None:
    """Wait while the process runs."""
    while not condition() and process.poll() is None:
        time.sleep(0.01)
    assert condition()


def bits(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("seed-0/*.safetensors"))}


def scores(output: Path) -> dict[str, object]:
    return {path.name: json.loads(path.read_text()).get("scores") for path in sorted(output.glob("seed-0/*.json"))}


@pytest.mark.slow
def test_killed_outright_and_resumed_it_ends_with_the_bits_of_a_run_never_killed(config: Path, tmp_path: Path) -> None:
    """Killed when the first row is done, two processes at work, and resumed in one; what never was killed ran here."""
    rows = ("--config", str(config), "--methods", "standard,freelb,pre-training")
    assert main(["villa-uniter", *rows, "--output", str(tmp_path / "whole")]) == 0
    output = tmp_path / "parts"
    arguments = (*rows, "--output", output)
    process = Script(EXAMPLE, *arguments, "--jobs", 2, folder=tmp_path)
    until(lambda: any(output.glob("seed-0/standard*.json")), process)
    process.kill()
    assert process.finish()[0] == -signal.SIGKILL
    assert not (output / "results.json").exists()
    done = set(output.glob("seed-0/*.json"))  # how many there are when it dies is the machine's affair
    status, said, complaints = Script(EXAMPLE, *arguments, "--resume", folder=tmp_path).finish()
    assert status == 0, complaints
    assert "Quick demo, one seed: not evidence" in said
    assert re.search(r"this call took \d+ min \d\d s; .* \d+ min \d\d s; everything is in", said)
    assert "\r" not in complaints  # no progress bars in a log
    left = set(output.glob("seed-0/*.json")) - done
    assert len(re.findall(r"^seed 0, .*: done in", complaints, re.MULTILINE)) == len(left)
    assert bits(output) == bits(tmp_path / "whole")
    assert scores(output) == scores(tmp_path / "whole")


class Terminal:
    """A terminal of 120 columns; `end` is what a process writes to, `text()` what it has written."""

    def __enter__(self) -> Terminal:
        self.ours, self.end = os.openpty()
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        self.read = bytearray()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        return self

    def _read(self) -> None:
        with suppress(OSError):  # nobody holds the other end any more
            while some := os.read(self.ours, 4096):
                self.read += some

    def text(self) -> str:
        return self.read.decode(errors="replace")

    def __exit__(self, *exception: object) -> None:
        os.close(self.end)
        self.reader.join()
        os.close(self.ours)


@pytest.mark.slow
def test_on_a_signal_it_saves_and_prints_a_message(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Terminal() as terminal:
        command = [sys.executable, EXAMPLE, "--config", config, "--output", output, "--finetune.epochs", "1000"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=terminal.end)
        until(lambda: "standard, equal compute:  " in terminal.text(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 128 + signal.SIGTERM
    assert re.search(r"standard, equal compute: stopped after update \d+ of \d+", terminal.text())
    assert "%|" in terminal.text()  # a progress bar
    assert (output / "seed-0" / "standard-equal-compute.progress.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "evidense"], "evidence"),
        (
            ["--villa.image_stepp", "1"],
            "--villa.image_stepp 1; the flag nearest to --villa.image_stepp is --villa.image_step",
        ),
        (["--metod=villa"], "the flag nearest to --metod is --method"),
        (["villa"], "unrecognized arguments: villa"),
        (["--seeds", "0"], "--seeds: expected a whole number from 1 to 10000, got '0'"),
        (["--seeds", "two"], "--seeds: expected a whole number from 1 to 10000, got 'two'"),
        (["--seeds", "9999999999"], "--seeds: expected a whole number from 1 to 10000, got '9999999999'"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--villa.image_step", "nan"], "image_step"),
        (["--resume", "--overwrite"], "resume or overwrite"),
        (["--device", "quantum"], "device"),
    ],
    ids=[
        "preset",
        "flag",
        "flag-with-value",
        "no-flag",
        "no-seeds",
        "text-for-seeds",
        "seeds-beyond-memory",
        "config",
        "value",
        "contradiction",
        "device",
    ],
)
def test_bad_input_ends_with_a_message_and_no_traceback(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["villa-uniter", "--output", str(tmp_path / "out"), "--jobs", "1", *arguments])
    except SystemExit as left:
        status = int(left.code or 0)
    assert status == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1, "one line, and not all flags"


def test_the_help_keeps_its_lines_and_shows_what_presets_change(capsys: pytest.CaptureFixture[str]) -> None:
    description = "VILLA, end to end.\n\n    --seeds 5      five of them\n    --seeds 1      one"
    with pytest.raises(SystemExit):
        parse(UniterOptions, ["--help"], presets=PRESETS, description=description)
    said = capsys.readouterr().out
    assert description in said
    words = " ".join(said.split())
    assert "L2 radii of the attacks on the image features, per example." in words
    assert "L2 radii of the attacks on the word embeddings, per example." in words
    assert "None" not in words
    assert "number of seeds, 0 to N-1 (default 1; 5 by preset evidence)" in words
    assert "(default 2000; 400 by preset demo)" in words
    assert "none (null in YAML): all of them. (400 by preset demo; 500 by preset evidence)" in words
    assert "written to configuration.yaml in the output directory" in words


@pytest.mark.parametrize(("options", "presets"), [(UniterOptions, PRESETS), (LxmertOptions, LXMERT_PRESETS)])
def test_every_flag_has_a_description(options: type, presets: Any) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, options, presets=presets)
    described = {
        flag: (action.help or "").partition("(default")[0] for flag, action in parser._option_string_actions.items()
    }
    assert not [flag for flag, text in described.items() if len(text) < 5]
    assert len(described) > 40


def test_a_missing_extra_is_found_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("advvl.experiments.runner.find_spec", lambda name: None)
    assert main(["villa-uniter", "--output", str(tmp_path / "out")]) == 2
    assert "pip install 'advvl[report]'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["villa-uniter", "--output", str(tmp_path / "out")]) == 2
    assert "pip install 'advvl[data]'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_missing_files_are_found_before_the_first_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--{name}=missing" for name in ("regions", "questions", "test_questions", "answers", "tokenizer")]
    assert main(["villa-lxmert", "--output", str(tmp_path / "out"), "--jobs", "2", *given]) == 2
    assert capsys.readouterr().err == "error: expected a file at 'missing', got none; check the paths of the data\n"


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("villa: {image_stepp: 0.1}")
    assert main(["villa-uniter", "--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "'image_step'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 0, "villa-uniter"),
        (["--help"], 0, "villa-lxmert"),
        (["--version"], 0, f"advvl {advvl.__version__}\n"),
        (["trian"], 2, "the nearest is train"),
        (["villa-lxmet"], 2, "the nearest is villa-lxmert"),
    ],
)
def test_the_command_says_what_it_knows(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["advvl", *arguments])
    assert main() == status
    assert said in "".join(capsys.readouterr())


@pytest.mark.slow
def test_help_waits_for_no_command() -> None:
    code = "import sys; from advvl.experiments.cli import main; main(['--help']); print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_beside_the_example_is_read_over_its_preset(path: Path) -> None:
    layer = read_yaml(path)
    assert layer.values["preset"] == path.stem
    options = build(UniterOptions, Layer("preset", PRESETS[path.stem]), layer)
    preset = build(UniterOptions, Layer("preset", PRESETS[path.stem]))
    assert identity(options) == identity(preset)


def test_every_preset_has_its_configuration() -> None:
    assert {path.stem for path in CONFIGS} == set(PRESETS)


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
