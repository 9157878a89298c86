"""Readers and writers of files against a table of bad paths and bad contents: each is refused in words, none is read on."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from transformers import LxmertConfig, LxmertForQuestionAnswering

from advvl.data.lxmert.answers import read_answers, read_pretraining_answers
from advvl.data.lxmert.questions import read_questions, read_statements
from advvl.data.lxmert.regions import open_regions, write_regions
from advvl.data.wordpiece import load_bert_tokenizer, load_tokenizer
from advvl.errors import AdvVLError
from advvl.experiments.config import read_yaml
from advvl.experiments.outputs import claim
from advvl.files import only_writer, read_json, read_torch, remove_temporaries, write_bytes
from advvl.fit.checkpoints import Checkpoints, OneFile, read_checkpoint
from advvl.models.lxmert.answer_head import load_lxmert_answers
from advvl.models.lxmert.checkpoint import load_lxmert_checkpoint
from advvl.models.state_files import read_state
from advvl.models.uniter.checkpoint import load_checkpoint, save_checkpoint
from advvl.models.uniter.config import UniterConfig
from advvl.models.uniter.model import UniterModel

LONGEST = 1500
"""Characters of a message: those of a few names, not of what a file holds."""


def torch_file(value: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as held:
        held.writestr("a/data.pkl", b"junk")
    return stream.getvalue()


CONTENTS = {
    "empty": b"",
    "zeros": bytes(100),
    "noise": bytes(range(256)) * 12,
    "UTF-16": "[1]".encode("utf-16"),
    "deep": b"[" * 100_000,
    "digits": b"9" * 6000,
    "NaN": b"NaN",
    "list": b"[]",
    "list of lists": b"[[1]]",
    "list of objects": b'[{"a": 1}]',
    "twice": b'{"a": 1, "a": 2}',
    "null": b"null",
    "text": b'"x"',
    "tabs": b"\t" * 9 + b"\n",
    "line ends": b"\r\n" * 50,
    "half a surrogate": b'["\\ud800"]',
    "infinite score": b'[{"question_id": 1, "img_id": "a", "sent": "b", "label": {"x": 1e400}}]',
    "lists for texts": b'[{"question_id": [1], "img_id": ["a"], "sent": {}, "uid": [1], "ans": 3}]',
    "pickle": pickle.dumps({"a": 1}, protocol=2),
    "archive": archive(),
    "number": torch_file(3),
    "tensors in a list": torch_file([torch.ones(2)]),
    "nested state": torch_file({"a": {"b": torch.ones(2)}}),
    "number for a name": torch_file({3: torch.ones(2)}),
    "no state": torch_file({}),
    "no name": torch_file({"": torch.ones(2)}),
    "dots": torch_file({"...": torch.ones(2), "module.": torch.ones(1), "module": torch.ones(1)}),
    "scalar vocabulary": torch_file({"uniter.embeddings.word_embeddings.weight": torch.ones(())}),
    "no rows": torch_file({"a.b": torch.ones(0, 3)}),
    "another run": torch_file({"format": 2, "done": "x", "run": {}}),
    "a run of nothing": torch_file({"format": True, "done": 1, "run": 3}),
    "old format": torch_file({"a": torch.ones(3)}, _use_new_zipfile_serialization=False),
    "8 bits": save({"a": torch.ones(2).to(torch.float8_e4m3fn)}),
    "a header of a terabyte": (10**12).to_bytes(8, "little") + b"{}",
}
PATHS = ["", "nul\0byte", "nul\0.safetensors", "x" * 300, "/dev/null", None, 3, 1.5, b"bytes", [], {}]
SUFFIXES = (".json", ".txt", ".tsv", ".pt", ".safetensors")


@cache
def uniter() -> UniterModel:
    return UniterModel(UniterConfig.tiny())


@cache
def lxmert() -> LxmertForQuestionAnswering:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "visual_feat_dim": 4}
    return LxmertForQuestionAnswering(
        LxmertConfig(vocab_size=20, l_layers=1, r_layers=1, x_layers=1, num_qa_labels=2, **sizes)
    )


Call = Callable[[Any], object]
READERS: dict[str, Call] = {
    "load_checkpoint": lambda path: load_checkpoint(uniter(), path),
    "load_lxmert_checkpoint": lambda path: load_lxmert_checkpoint(lxmert(), path, encoder_only=True),
    "load_lxmert_answers": lambda path: load_lxmert_answers(
        lxmert(), path, pretraining_answers=["a"], answers=["a", "b"]
    ),
    "read_state": read_state,
    "read_torch": read_torch,
    "read_json": read_json,
    "read_checkpoint": lambda path: read_checkpoint(path, {"a": 1}),
    "UniterConfig": UniterConfig.from_json_file,
    "open_regions": lambda path: open_regions(path, num_boxes=None),
    "read_questions": read_questions,
    "read_statements": read_statements,
    "read_answers": lambda path: read_answers(path, path),
    "read_pretraining_answers": lambda path: read_pretraining_answers(path, size=None),
    "load_bert_tokenizer": load_bert_tokenizer,
    "load_tokenizer": load_tokenizer,
    "read_yaml": read_yaml,
}
WRITERS: dict[str, Call] = {
    "write_bytes": lambda path: write_bytes(path, b""),
    "write_regions": lambda path: write_regions(path, []),
    "save_checkpoint": lambda path: save_checkpoint(uniter(), path),
    "only_writer": lambda path: only_writer(path).__enter__(),
    "claim": lambda path: claim(path, {}),
    "Checkpoints": lambda path: Checkpoints(directory=path).open(resume=False),
    "OneFile": lambda path: OneFile(Path(path)).open(resume=False),
    "remove_temporaries": lambda path: remove_temporaries(Path(path)),
}


def raw_errors(call: Call, values: list[Any]) -> list[str]:
    """The values that end in an error that is none of ours, or in one as long as a page."""
    found = []
    for value in values:
        try:
            call(value)
        except AdvVLError as error:
            if len(str(error)) > LONGEST:
                found.append(f"{str(value)[-40:]!r}: {len(str(error))} characters")
        except Exception as error:
            found.append(f"{str(value)[-40:]!r}: {type(error).__name__}: {str(error)[:80]}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_bad_file_is_refused_in_words(reader: str, tmp_path: Path) -> None:
    paths = []
    for name, content in CONTENTS.items():
        for suffix in SUFFIXES:
            paths.append(tmp_path / f"{name}{suffix}")
            paths[-1].write_bytes(content)
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = [tmp_path / "folder.pt", tmp_path / "loop", tmp_path / "none" / "x.pt", tmp_path / "empty.json" / "x.pt"]
    assert not raw_errors(READERS[reader], [*paths, *places, *PATHS])


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_cannot_be_written_is_refused_in_words(writer: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    texts = [path for path in PATHS if isinstance(path, str) and path != "/dev/null"]
    wrong = texts if writer in ("OneFile", "remove_temporaries") else [path for path in PATHS if path != "/dev/null"]
    places = [tmp_path / "file" / "x.pt", tmp_path / "file" / "deep" / "x.pt", tmp_path / ("x" * 300)]
    assert not raw_errors(WRITERS[writer], [*places, tmp_path / "loop" / "x.pt", *wrong])
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]
