"""`advvl data`: databases that are converted give the batches of the records that they were made of."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

from advvl.data.feature_files import open_features
from advvl.data.lxmert.answers import AnswerTable
from advvl.data.lxmert.lines import Regions
from advvl.data.lxmert.regions import write_regions
from advvl.data.uniter.datasets.answers import AnswerSource
from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.datasets.nlvr2 import PairSource
from advvl.data.uniter.datasets.pretraining import PretrainingSource
from advvl.data.uniter.datasets.referring import ReferringSource
from advvl.data.uniter.datasets.vcr import ChoiceSource
from advvl.data.uniter.image_db import RegionLimits, open_images
from advvl.data.uniter.own import caption_sources, nlvr2_source, referring_source, vcr_source, ve_source, vqa_source
from advvl.data.uniter.text_db import open_texts
from advvl.data.wordpiece import build_tokenizer, load_tokenizer, save_tokenizer
from advvl.errors import DataError
from advvl.experiments.cli import main

CHOICES = {"answers": ["red", "dog", "two", "it"], "answer": 3, "rationales": ["is", "is", "it", "it"], "rationale": 0}
NAMES = ("park", "sea/boat", "street")

RECORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "vqa": lambda n: {"text": "what is it ?", "answers": ("red", "dog")[n % 2], "image": NAMES[n % 3]},
    "ve": lambda n: {"text": "two dogs", "label": "neutral", "image": NAMES[n % 3]},
    "nlvr2": lambda n: {"text": "two dogs", "left": NAMES[n % 3], "right": NAMES[(n + 1) % 3], "target": n % 2},
    "vcr": lambda n: {"question": "what is it ?", **CHOICES, "image": NAMES[n % 3]},
    "captions": lambda n: {"text": ["two dogs", "it is red"][: 1 + n % 2], "image": NAMES[n % 3], "id": f"c{n}"},
    "referring": lambda n: {"text": "two dogs", "target": n % 2, "image": NAMES[(2 * n) % 3]},
}
SOURCES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "vqa": (
        lambda *given, **o: vqa_source(*given, answers=AnswerTable(("dog", "red")), **o),
        lambda folder, images: AnswerSource([Shard(open_texts(folder), images)], 2),
    ),
    "ve": (ve_source, lambda folder, images: AnswerSource([Shard(open_texts(folder), images)], 3)),
    "nlvr2": (nlvr2_source, lambda folder, images: PairSource([Shard(open_texts(folder), images)])),
    "vcr": (
        vcr_source,
        lambda folder, images: ChoiceSource(
            [Shard(open_texts(folder, lengths="qa"), images)], [Shard(open_texts(folder, lengths="qar"), images)]
        ),
    ),
    "captions": (
        lambda *given, **o: caption_sources(*given, tasks=["mlm"], **o)["mlm"],
        lambda folder, images: PretrainingSource([Shard(open_texts(folder), images)], "mlm"),
    ),
    "referring": (
        lambda *given, **o: referring_source(*given, boxes=True, **o),
        lambda folder, images: ReferringSource([Shard(open_texts(folder), images)], boxes=True),
    ),
}


def arrays(number: int) -> dict[str, Any]:
    generator = np.random.default_rng(number)
    corners = np.sort(generator.random((2 + number, 2, 2)), axis=1).reshape(-1, 4)
    return {
        "features": generator.random((2 + number, 6)).astype("f4"),
        "boxes": corners * [40, 30, 40, 30],
        "size": [40, 30],
    }


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with region features and a tokeniser, in which commands run."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(NAMES):
        path = tmp_path / "regions" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays(number))
    save_tokenizer(build_tokenizer(["what is it ?", "two red dogs"]), tmp_path / "mine" / "tokenizer.json")
    return tmp_path


def write_records(task: str, *changed: Any, count: int = 4) -> Path:
    lines = [json.dumps({**RECORDS[task](n)}) for n in range(count)]
    path = Path(f"{task}.jsonl")
    path.write_text("\n".join([*lines, *map(json.dumps, changed)]))
    return path


def convert(task: str, *more: str) -> int:
    answers = ["--answers", "ans2label.json"] if task == "vqa" else []
    options = ["--task", task, "--tokenizer", "mine/tokenizer.json", "--features", "regions", *answers]
    return main(["data", "convert", f"{task}.jsonl", *options, "--text-db", "x.db", "--image-db", "images", *more])


def limits(task: str) -> RegionLimits:
    return RegionLimits(num_bb=100) if task == "referring" else RegionLimits()


@pytest.mark.parametrize("task", RECORDS)
def test_databases_give_the_batches_of_their_records(task: str, work: Path) -> None:
    path = write_records(task)
    assert convert(task, "--full-precision") == 0
    own, published = SOURCES[task]
    ours = own(path, load_tokenizer("mine/tokenizer.json"), images=open_features("regions"))
    theirs = published(work / "x.db", open_images("images", limits(task)))
    assert theirs.examples.lengths.tolist() == ours.examples.lengths.tolist()
    assert theirs.examples.key(1) == {"captions": "c1.0"}.get(task, "2")
    every = range(len(ours))
    one, two = (source.batch(every, torch.Generator().manual_seed(0)) for source in (ours, theirs))
    assert set(one) == set(two)
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[name], value, rtol=0, atol=0, msg=name)


def test_features_of_other_files_give_the_same(work: Path) -> None:
    write_regions(work / "regions.tsv", [lines(number, name) for number, name in enumerate(NAMES)])
    for number, name in enumerate(NAMES):
        found = arrays(number)
        boxes = np.asarray(found["boxes"] / [40, 30, 40, 30], "f4")
        for folder in ("published", "plain"):
            (work / folder / name).parent.mkdir(parents=True, exist_ok=True)
        sizes = boxes[:, 2:] - boxes[:, :2]
        np.savez(
            work / f"published/{name}.npz", features=found["features"], norm_bb=np.hstack([boxes, sizes]), conf=[[1.0]]
        )
        np.save(work / f"plain/{name}.npy", found["features"])
        np.save(work / f"plain/{name}.boxes.npy", boxes)
    path = write_records("ve")
    tokenizer = load_tokenizer("mine/tokenizer.json")
    expected = ve_source(path, tokenizer, images=open_features("regions")).batch([0, 1, 2])
    for place in ("regions.tsv", "published", "plain"):
        features = open_features(place)
        assert sorted(features) == sorted(NAMES)
        found = ve_source(path, tokenizer, images=features).batch([0, 1, 2])
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def lines(number: int, name: str) -> Regions:
    found = arrays(number)
    count = len(found["boxes"])
    classes, scores = torch.zeros(count, dtype=torch.long), torch.ones(count)
    tensors = [torch.from_numpy(np.asarray(found[key], "f4")) for key in ("boxes", "features")]
    return Regions(name, 30, 40, classes, scores, classes, scores, *tensors)


def test_images_alone_are_those_of_the_whole_folder(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(work / "regions" / "bad.npz", features=np.ones((1, 6)), boxes=[[0, 0, 9, 9]])
    command = ["data", "convert", "--features", "regions", "--image-db", "images", "--compressed"]
    assert main(command) == 2
    assert "image 'bad': expected boxes x1, y1, x2, y2 inside the image" in capsys.readouterr().err
    assert not list(Path().glob("images/*"))
    assert main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "skipped: image 'bad': expected boxes" in said
    assert "images: 3 images, 9 regions" in said
    assert sorted(open_images("images").names) == sorted(NAMES)


def test_nothing_is_overwritten_and_a_bad_record_leaves_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records("ve", {"text": "", "label": "neutral", "image": "park"})
    assert convert("ve") == 2
    assert "ve.jsonl, line 5: text: expected a text of one word or more" in capsys.readouterr().err
    assert not Path("x.db").exists()
    assert not list(Path().glob("images/*"))
    assert convert("ve", "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "skipped: ve.jsonl, line 5: text: expected" in said
    assert "x.db: 4 texts" in said
    assert "skipped: 1\n" in said
    before = {path: path.read_bytes() for path in Path().rglob("*.mdb")}
    assert convert("ve", "--skip-bad") == 2
    assert "expected nothing at 'x.db', got something" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().rglob("*.mdb")} == before


FULL = """
import resource, signal, sys
from advvl.experiments.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("full", ["images", "x.db"])
def test_a_disk_that_fills_is_a_refusal_that_leaves_no_database(full: str, work: Path) -> None:
    """A limit on the size of files gives the error that a full disk gives, in the middle of a write."""
    features, texts = (80_000, 6) if full == "images" else (6, 1000)
    for name in NAMES:
        np.savez(work / "regions" / f"{name}.npz", **{**arrays(0), "features": np.ones((2, features), "f4")})
    write_records("ve", count=texts)
    command = [
        "data",
        "convert",
        "ve.jsonl",
        "--task",
        "ve",
        "--tokenizer",
        "mine/tokenizer.json",
        "--features",
        "regions",
    ]
    command += ["--text-db", "x.db", "--image-db", "images", "--max-length", "1000000"]
    ran = subprocess.run([sys.executable, "-c", FULL, str(1 << 16), *command], capture_output=True, text=True, cwd=work)
    assert ran.returncode == 2, ran.stderr
    assert "Traceback" not in ran.stderr
    assert f"expected to write '{full}" in ran.stderr
    assert "make room, or choose another place" in ran.stderr
    assert not Path("x.db").exists()
    assert not list(work.glob("images/feat_*"))
    assert not list(work.rglob("*.unfinished"))
    assert main(command) == 0


def test_images_of_several_files_of_records_are_written_once(work: Path) -> None:
    first, second = write_records("referring", count=2), Path("second.jsonl")
    second.write_text("\n".join(json.dumps(RECORDS["referring"](n)) for n in (2, 3)))
    usual = ["data", "convert", "--features", "regions", "--task", "referring"]
    assert main([*usual, "--image-db", "images", "--full-precision"]) == 0
    images, tokenizer = open_images("images", limits("referring")), load_tokenizer("mine/tokenizer.json")
    for path in (first, second):
        assert main([*usual, str(path), "--tokenizer", "mine/tokenizer.json", "--text-db", f"{path.stem}.db"]) == 0
        theirs = SOURCES["referring"][1](f"{path.stem}.db", images).batch([0, 1])
        ours = SOURCES["referring"][0](path, tokenizer, images=open_features("regions")).batch([0, 1])
        for name in ("img_feat", "targets", "region_boxes"):
            torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=0)


def test_an_image_that_records_name_is_skipped_with_its_texts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records("ve")
    assert convert("ve", "--num-bb", "3") == 2
    assert not Path("x.db").exists()
    assert convert("ve", "--num-bb", "3", "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "record 'street': expected at most num_bb = 3 regions, got 4" in said
    assert "its image 'street' was left out" in said
    assert len(open_texts("x.db")) == 3


def test_answers_are_numbered_once_and_then_read(work: Path) -> None:
    write_records("vqa")
    assert convert("vqa") == 0
    assert json.loads(Path("ans2label.json").read_text()) == {"dog": 0, "red": 1}
    Path("ans2label.json").write_text(json.dumps({"red": 0, "dog": 1, "cat": 2}))
    Path("x.db").rename("y.db")
    Path("images").rename("others")
    assert convert("vqa") == 0
    texts = open_texts("x.db")
    assert texts["1"]["target"] == {"labels": [0], "scores": [1.0]}
    assert texts.meta.tokenizer == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected the following arguments|--features"),
        (["--features", "regions"], "expected --text-db or --image-db, got none; see advvl data convert --help"),
        (["--features", "regions", "--text-db", "x"], "expected RECORDS, got none"),
        (["r.jsonl", "--features", "regions", "--text-db", "x"], "expected --task, --tokenizer, got none"),
        (
            ["r.jsonl", "--features", "regions", "--text-db", "x", "--task", "vqa", "--tokenizer", "mine"],
            "expected --answers, got none",
        ),
        (["--features", "gone", "--image-db", "x"], "expected a folder of npz or npy files, or a .tsv file, at 'gone'"),
        (["--features", "mine", "--image-db", "x"], "expected npz or npy files in 'mine', got none"),
        (["--features", "regions", "--image-db", "x", "--skip-bd"], "the flag nearest to --skip-bd is --skip-bad"),
        (
            ["r.jsonl", "--features", "regions", "--text-db", "x", "--task", "ve", "--tokenizer", "regions"],
            "expected a tokenizer of transformers, got 'regions'",
        ),
    ],
)
def test_options_that_are_missing_or_unknown_are_said(
    options: list[str], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "convert", *options]) == 2
    said = capsys.readouterr().err
    assert any(part in said for part in message.split("|"))


def test_files_that_are_no_features_are_refused(work: Path) -> None:
    (work / "regions" / "torn.npz").write_bytes((work / "regions" / "park.npz").read_bytes()[:200])
    np.save(work / "regions" / "alone.npy", np.ones((2, 6)))
    np.savez(work / "regions" / "pickled.npz", features=np.array([{}]), boxes=np.ones((1, 4)))
    features = open_features("regions")
    for name in ("torn", "alone", "pickled"):
        with pytest.raises(DataError, match=rf"regions/{name}\.np[yz]: expected arrays of numbers"):
            features[name]
    np.save(work / "regions" / "park.npy", np.ones((2, 6)))
    with pytest.raises(DataError, match="expected one file of the image 'park'"):
        open_features("regions")


def wide(**changed: Any) -> dict[str, Any]:
    """Two regions, changed."""
    return {"features": np.ones((2, 6), "f4"), "boxes": np.array([[0, 0, 0.5, 0.5]] * 2, "f4"), **changed}


BAD_IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "boxes without axes": ({"features": np.ones((2, 6)), "norm_bb": np.ones(12)}, "expected norm_bb (R, 6), got (12,)"),
    "boxes of one number": ({"features": np.ones((2, 6)), "norm_bb": np.float32(1)}, "expected norm_bb (R, 6), got ()"),
    "complex numbers": (wide(features=np.ones((2, 6), complex)), "expected an array of numbers, got one of complex128"),
    "labels without classes": (wide(soft_labels=np.ones(2)), "expected labels (2, C) of 2 regions, got (2,)"),
    "labels of other regions": (wide(soft_labels=np.ones((3, 4))), "expected labels (2, C) of 2 regions, got (3, 4)"),
    "labels above 1": (wide(soft_labels=np.full((2, 4), 2.0)), "expected labels in [0, 1]"),
    "too large for half precision": (wide(features=np.full((2, 6), 1e6)), "features of at most 65504"),
}


@pytest.mark.parametrize(("given", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
@pytest.mark.parametrize("task", [None, "captions", "referring"])
def test_an_image_that_cannot_be_written_is_left_out_with_its_texts(
    task: str | None, given: dict[str, Any], message: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(work / "regions" / "a.npz", **given)
    if task is None:
        options = ["--features", "regions", "--image-db", "images"]
        assert main(["data", "convert", *options]) == 2
        assert message in capsys.readouterr().err
        assert main(["data", "convert", *options, "--skip-bad"]) == 0
    else:
        write_records(task, {**RECORDS[task](0), "image": "a", "id": "lost"})
        assert convert(task) == 2
        assert message in capsys.readouterr().err
        assert convert(task, "--skip-bad") == 0
        assert "lost" not in " ".join(open_texts("x.db").lengths)
    said = capsys.readouterr().out
    assert message in said
    assert len(open_images("images", limits(task or "captions"))) == 3


def test_an_npy_with_the_name_of_an_npz_is_refused(work: Path) -> None:
    with open(work / "regions" / "park.npz", "wb") as stream:
        np.save(stream, np.ones((2, 6)))
    with pytest.raises(DataError, match=r"regions/park\.npz: expected arrays of numbers"):
        open_features("regions")["park"]


def test_an_image_that_unpacks_to_more_than_any_is_refused_before_it_is_unpacked(work: Path) -> None:
    np.savez_compressed(work / "regions" / "park.npz", features=np.zeros((20_000, 1000), "f4"), boxes=np.zeros((1, 4)))
    with pytest.raises(DataError, match=r"park\.npz: .*at most 67108864 bytes of arrays, got 80000"):
        open_features("regions")["park"]


def test_an_image_that_is_left_out_says_nothing_of_the_width_of_others(work: Path) -> None:
    np.savez(work / "regions" / "a.npz", **wide(features=np.full((2, 9), 1e6)))
    assert main(["data", "convert", "--features", "regions", "--image-db", "images", "--skip-bad"]) == 0
    assert sorted(open_images("images").names) == sorted(NAMES)


def test_labels_of_another_number_of_classes_are_left_out(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, classes in (("a", 3), ("b", 4), ("c", 3)):
        np.savez(work / "regions" / f"{name}.npz", **wide(soft_labels=np.ones((2, classes))))
    assert main(["data", "convert", "--features", "regions", "--image-db", "images", "--skip-bad"]) == 0
    assert "'b': expected 3 classes in labels, as of the images before, got 4" in capsys.readouterr().out
    assert sorted(open_images("images").names) == sorted([*NAMES, "a", "c"])


def test_an_image_with_the_name_of_the_list_of_names_is_left_out(work: Path) -> None:
    np.savez(work / "regions" / "__keys__.npz", **wide())
    assert main(["data", "convert", "--features", "regions", "--image-db", "images", "--skip-bad"]) == 0
    assert sorted(open_images("images").names) == sorted(NAMES)


@pytest.mark.parametrize("changed", [{"id": "x" * 600}, {"text": "\ud800"}, {"id": "\ud800"}])
def test_a_record_that_no_database_holds_is_left_out(
    changed: dict[str, Any], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records("ve", {**RECORDS["ve"](0), **changed})
    assert convert("ve") == 2
    assert "expected" in capsys.readouterr().err
    assert convert("ve", "--skip-bad") == 0
    assert len(open_texts("x.db")) == 4
    assert "skipped: 1" in capsys.readouterr().out


def test_inspect_says_what_databases_hold(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records("captions")
    assert convert("captions") == 0
    capsys.readouterr()
    assert main(["data", "inspect", "x.db", "--images", "images"]) == 0
    said = capsys.readouterr().out
    for part in (
        "x.db: 6 texts",
        "tokenizer   mine; [CLS] 2, [SEP] 3, [MASK] 4, words",
        "word pieces 2 to 3, median 2",
        "fields      img_fname (6), input_ids (6)",
        "images      3, texts of each 1 to 3, median 2",
        "record      'c0'",
        "img_fname: 'park'",
    ):
        assert part in said
    assert main(["data", "inspect", "images"]) == 0
    said = capsys.readouterr().out
    for part in ("feat_th0.2_max100_min10: 3 images", "regions     2 to 4, median 3", "features    6", "scores of 0"):
        assert part in said


def test_inspect_says_what_is_wrong(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records("captions")
    assert convert("captions", "--num-bb", "4") == 0
    for folder, key in (("x.db", b"c2"), ("images/feat_numbb4", b"sea/boat")):
        environment = lmdb.open(folder, map_size=1 << 26)
        with environment.begin(write=True) as transaction:
            transaction.put(key, b"damaged")
        environment.close()
    capsys.readouterr()
    assert main(["data", "inspect", "x.db"]) == 2
    said = capsys.readouterr()
    assert "wrong: x.db, record 'c2': " in said.out
    assert "expected records without faults in 'x.db', got 1; convert them again" in said.err
    assert main(["data", "inspect", "images"]) == 2
    assert "wrong: images/feat_numbb4, record 'sea/boat': " in capsys.readouterr().out
    assert main(["data", "inspect", "regions"]) == 2
    assert "expected a database of texts or of images in 'regions'" in capsys.readouterr().err
