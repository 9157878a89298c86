"""Configuration: layers over defaults, YAML, the command line, the canonical form."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from advvl.errors import ConfigurationError
from advvl.evaluation.protocol import EvaluationOptions
from advvl.experiments import plain_yaml
from advvl.experiments.command_line import parse
from advvl.experiments.config import Layer, build, identity, leaves, read_yaml
from advvl.experiments.options import DataOptions
from advvl.experiments.uniter import PRESETS, UniterOptions
from advvl.experiments.villa_options import UniterSize, VillaAdversary
from advvl.files import fingerprint
from advvl.fit.options import OptimizerOptions


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    pair: tuple[float, float] = (0.0, 1.0)
    limit: int | None = None
    on: bool = False

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigurationError(f"expected rate to be 0 or more, got {self.rate!r}")


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    count: int = 1
    where: str = field(default="here", metadata={"identity": False})
    inner: Inner = field(default_factory=Inner)
    other: Inner = field(default_factory=lambda: Inner(rate=0.7))


@dataclass(frozen=True)
class Needy:
    needed: int
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Chosen:
    preset: str = "small"
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_later_layers_win_over_earlier_ones_key_by_key() -> None:
    config = build(
        Outer, Layer("a", {"inner": {"rate": 1, "on": True}, "count": 2}), Layer("b", {"inner": {"rate": 3}})
    )
    assert config == Outer(count=2, inner=Inner(rate=3.0, on=True))


def test_what_a_layer_leaves_out_keeps_the_default_of_the_enclosing_dataclass() -> None:
    assert build(Outer, Layer("a", {"other": {"on": True}})).other == Inner(rate=0.7, on=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"inner": {"rte": 1}}, "expected an option of 'inner', got 'rte' in FILE; .* is 'rate'", id="key"),
        pytest.param({"coutn": 1}, "got 'coutn' in FILE; the nearest known one is 'count'", id="top-level-key"),
        pytest.param(
            {"count": "3"}, r"expected count to be a whole number, got '3' \(str\) in FILE", id="text-for-int"
        ),
        pytest.param({"count": 3.0}, r"expected count to be a whole number, got 3.0 \(float\)", id="float-for-int"),
        pytest.param({"count": True}, r"expected count to be a whole number, got True \(bool\)", id="bool-for-int"),
        pytest.param({"name": 3}, r"expected name to be a text, got 3 \(int\)", id="int-for-text"),
        pytest.param(
            {"inner": {"rate": "fast"}}, r"expected inner.rate to be a number, got 'fast'", id="text-for-float"
        ),
        pytest.param({"inner": {"rate": True}}, r"expected inner.rate to be a number, got True", id="bool-for-float"),
        pytest.param({"inner": {"rate": None}}, r"expected inner.rate to be a number, got None", id="null-for-float"),
        pytest.param({"inner": {"on": 1}}, r"expected inner.on to be true or false, got 1", id="int-for-bool"),
        pytest.param({"inner": {"kinds": "ab"}}, r"expected inner.kinds to be a list, got 'ab'", id="text-for-list"),
        pytest.param({"inner": {"kinds": ["a", "c"]}}, r"inner.kinds\[1\] to be one of a, b, got 'c'", id="choice"),
        pytest.param({"inner": {"kinds": [["a"]]}}, r"inner.kinds\[0\] to be one of a, b", id="unhashable-choice"),
        pytest.param({"inner": {"pair": [1]}}, r"expected inner.pair to be a list of 2, got \[1\]", id="length"),
        pytest.param({"inner": None}, r"expected inner to be a mapping of options, got None", id="null-section"),
        pytest.param(
            {"inner": {"rate": -1}}, r"inner: expected rate to be 0 or more, got -1.0 \(set by FILE\)", id="value"
        ),
        pytest.param({1: 2}, r"expected an option, got 1 in FILE; the nearest", id="number-for-key"),
    ],
)
def test_a_mistake_is_named_with_its_place_what_was_expected_and_what_was_got(
    values: dict[Any, Any], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, yaml.safe_dump(values))
    with pytest.raises(ConfigurationError, match=message.replace("FILE", path)):
        build(Outer, read_yaml(path))


def test_a_value_that_has_no_default_must_be_given() -> None:
    with pytest.raises(ConfigurationError, match=r"expected a value for needed, got none; .* --needed"):
        build(Needy)
    assert build(Needy, Layer("a", {"needed": 1})).needed == 1


@pytest.mark.parametrize(
    ("text", "rate"),
    [("2e-3", 0.002), ("2.5E2", 250.0), ("1", 1.0), ("0.5", 0.5), (".inf", math.inf)],
)
def test_numbers_are_read_as_people_write_them(text: str, rate: float, tmp_path: Path) -> None:
    assert build(Outer, read_yaml(written(tmp_path, f"inner: {{rate: {text}}}"))).inner.rate == rate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("inner: [", "expected YAML in", id="broken"),
        pytest.param("- 1", "expected a mapping of options", id="list"),
        pytest.param("name: !!python/object/apply:os.getcwd []", "expected YAML in", id="code"),
    ],
)
def test_a_file_that_is_not_plain_yaml_options_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_yaml(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.yaml"):
        read_yaml(tmp_path / "absent.yaml")


BOMB = "[&a [x,x],&b [*a,*a],&c [*b,*b]]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(f"inner: {{kinds: {BOMB}}}", "found an alias", id="aliases"),
        pytest.param(f"- {BOMB}", "found an alias", id="aliases-in-a-list"),
        pytest.param("inner: &i {<<: *i}", "found an alias", id="itself"),
        pytest.param("count: 1\ncount: 2", "found 'count' more than once", id="twice"),
        pytest.param(
            "inner: {rate: 1}\nname: x\ninner: {on: true}", "found 'inner' more than once", id="section-twice"
        ),
        pytest.param("inner: {rate: 1, rate: 2}", "found 'rate' more than once", id="twice-inside"),
        pytest.param("count: 010", r"expected count to be a whole number, got '010' \(str\)", id="octal"),
        pytest.param("count: 0x10", "got '0x10'", id="hexadecimal"),
        pytest.param("count: 0b10", "got '0b10'", id="binary"),
        pytest.param("count: 1:30", r"got '1:30' \(str\)", id="sexagesimal"),
        pytest.param(
            "inner: {rate: 1:30.5}", "expected inner.rate to be a number, got '1:30.5'", id="sexagesimal-float"
        ),
        pytest.param("count: 1_000", "got '1_000'", id="underscore"),
        pytest.param("count: 2026-01-01", r"got '2026-01-01' \(str\)", id="date"),
        pytest.param("inner: {on: yes}", r"expected inner.on to be true or false, got 'yes' \(str\)", id="yes"),
        pytest.param("inner: {on: off}", "got 'off'", id="off"),
        pytest.param("count: " + "9" * 5000, "got '999.*9'", id="digits"),
        pytest.param("count: !!int abc", "a tag that does not fit", id="tag"),
        pytest.param("[" * 5000, "nested too deep", id="deep"),
        pytest.param("{[1, 2]: 3}", "expected YAML in", id="list-as-key"),
    ],
)
def test_yaml_that_means_something_else_than_it_seems_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        build(Outer, read_yaml(written(tmp_path, text)))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["010", "1:30", "yes", "no", "2026-01-01", "0x10", "~x", "1_000", "+"])
def test_a_text_without_quotes_stays_a_text(text: str, tmp_path: Path) -> None:
    assert build(Outer, read_yaml(written(tmp_path, f"name: {text}"))).name == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("-3", -3), ("0", 0), ("+7", 7)),
        *(("1e3", 1000.0), ("-.5", -0.5), ("1.", 1.0), (".inf", math.inf), ("-.INF", -math.inf), ("2E-3", 0.002)),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object, tmp_path: Path) -> None:
    found = read_yaml(written(tmp_path, f"x: {text}")).values["x"]
    assert (type(found), found) == (type(value), value)


def test_a_file_without_an_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigurationError, match="at most 1048576 bytes in '/dev/zero', got more"):
        read_yaml("/dev/zero")


def test_what_is_written_is_read_back_here_and_by_readers_of_yaml_1_1(tmp_path: Path) -> None:
    values = {
        "a": "010",
        "b": "yes",
        "c": "1:30",
        "d": 0.002,
        "e": 1e-7,
        "f": math.inf,
        "g": None,
        "h": "",
        "i": "2e-3",
    }
    values |= {"j": "~", "k": [1, -2], "l": True, "m": "2026-01-01", "n": "<<", "o": "é: [", "p": 1e22}
    text = plain_yaml.dump(values | {"q": [values["k"], values["k"]]})
    assert read_yaml(written(tmp_path, text)).values == yaml.safe_load(text) == values | {"q": [[1, -2], [1, -2]]}


def test_a_list_is_no_preset(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a preset, got \['small'\]"):
        parse(Chosen, ["--config", written(tmp_path, "preset: [small]")], presets={"small": {}})


@dataclass(frozen=True)
class Described:
    """A dataclass whose docstring says what its fields are.

    Arguments:
        first, second: of two,
            on two lines: and a colon.
        third: alone.

    Raises:
        ConfigurationError: never.
    """

    first: int = 1
    second: int = 2
    third: int = field(default=3, metadata={"help": "of its own"})
    fourth: int = 4


def test_a_field_is_described_by_its_metadata_or_by_the_docstring() -> None:
    said = {leaf.name: leaf.metadata.get("help") for leaf in leaves(Described)}
    both = "of two, on two lines: and a colon."
    assert said == {"first": both, "second": both, "third": "of its own", "fourth": None}


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert build(Outer, read_yaml(written(tmp_path, "# nothing\n"))) == Outer()


def test_flags_win_over_the_file_the_file_over_the_preset_the_preset_over_the_defaults(tmp_path: Path) -> None:
    presets = {"small": {"a": 1, "b": 1, "c": 1}, "large": {"a": 10, "b": 10, "c": 10}}
    file = written(tmp_path, "b: 2\nc: 2")
    assert parse(Chosen, ["--config", file, "--c", "3"], presets=presets) == Chosen(a=1, b=2, c=3)
    large = parse(Chosen, ["--config", file, "--preset", "large"], presets=presets)
    assert large == Chosen(preset="large", a=10, b=2, c=2)
    chosen_in_file = written(tmp_path, "preset: large")
    assert parse(Chosen, ["--config", chosen_in_file], presets=presets).a == 10
    assert parse(Chosen, ["--config", chosen_in_file, "--preset", "small"], presets=presets).a == 1
    with pytest.raises(ConfigurationError, match="got 'smal' in the flags; the nearest known one is 'small'"):
        parse(Chosen, ["--preset", "smal"], presets=presets)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["--inner.rate", "2e-3"], Outer(inner=Inner(rate=0.002)), id="float"),
        pytest.param(["--inner.rate", "inf"], Outer(inner=Inner(rate=math.inf)), id="infinity"),
        pytest.param(["--inner.kinds", "a,b"], Outer(inner=Inner(kinds=("a", "b"))), id="commas"),
        pytest.param(["--inner.kinds", "b", "--inner.kinds", "a"], Outer(inner=Inner(kinds=("b", "a"))), id="repeated"),
        pytest.param(["--inner.limit", "3"], Outer(inner=Inner(limit=3)), id="optional"),
        pytest.param(["--inner.limit", "none"], Outer(), id="none"),
        pytest.param(["--inner.on"], Outer(inner=Inner(on=True)), id="bool"),
        pytest.param(["--no-inner.on"], Outer(), id="no-bool"),
        pytest.param(["--other.on"], Outer(other=Inner(rate=0.7, on=True)), id="one-flag-leaves-its-section"),
    ],
)
def test_every_kind_of_field_has_a_flag(arguments: list[str], expected: Outer) -> None:
    assert parse(Outer, arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--inner.kinds", "a,c"], "expected {a,b}, got 'c'", id="choice"),
        pytest.param(["--count", "1.5"], "expected N, got '1.5'", id="type"),
        pytest.param(["--coun", "1"], "unrecognized arguments: --coun", id="abbreviation"),
    ],
)
def test_a_malformed_flag_is_refused_by_its_name(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        parse(Outer, arguments)


def as_flags(values: dict[str, Any], path: str = "") -> list[str]:
    flags = []
    for key, value in values.items():
        if isinstance(value, dict):
            flags += as_flags(value, f"{path}{key}.")
        elif isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{path}{key}")
        elif isinstance(value, tuple):
            flags += [f"--{path}{key}", ",".join(map(str, value))]
        else:
            flags += [f"--{path}{key}", "none" if value is None else str(value)]
    return flags


@pytest.fixture
def unusual() -> UniterOptions:
    """No field of it, but for those that have their own flags, is what it is by default."""
    adversary = VillaAdversary(
        steps=5, modalities="together", text_step=0.2, image_step=0.1, text_radius=1, image_radius=2.5, kl_weight=0,
        clean_weight=0, dropout="shared",
    )  # fmt: skip
    optimizer = OptimizerOptions(
        epochs=3, batch_size=8, learning_rate=1, weight_decay=0, schedule="linear", warmup=0, clip=math.inf,
        betas=(0.5, 0.75),
    )  # fmt: skip
    return UniterOptions(
        preset="evidence", stage="finetune", methods=("villa",), seeds=(0, 1, 2), output="out", checkpoint="c.pt",
        resume=True, device="cpu", threads=1,
        model=UniterSize(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, dropout=0.0
        ),
        data=DataOptions(
            seed=5, train_images=1, train_questions=2, validation_questions=3, test_questions=4, captions=5
        ),
        pretrain=optimizer, finetune=optimizer, pretrain_adversary=adversary, villa=adversary,
        freelb=VillaAdversary(kl_weight=0.25),
        evaluation=EvaluationOptions(
            radii=(1,), text_radii=(2, 3), steps=1, step_fraction=1, restarts=1, objectives=("margin",), examples=7,
            batch_size=1,
        ),
    )  # fmt: skip


def test_the_experiment_round_trips_through_yaml(unusual: UniterOptions, tmp_path: Path) -> None:
    assert build(UniterOptions, read_yaml(written(tmp_path, plain_yaml.dump(asdict(unusual))))) == unusual


def test_the_experiment_round_trips_through_flags(unusual: UniterOptions) -> None:
    values = asdict(unusual) | {"seeds": 3}
    assert parse(UniterOptions, as_flags(values), presets=PRESETS) == unusual


def test_the_short_flags_of_the_experiment() -> None:
    arguments = ["--seeds", "3", "--method", "villa", "--method", "standard,freelb", "--resume", "--stage", "finetune"]
    options = parse(UniterOptions, arguments)
    assert options.seeds == (0, 1, 2)
    assert options.methods == ("villa", "standard", "freelb")
    assert options.resume
    assert options.stage == "finetune"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_configuration(name: str) -> None:
    assert parse(UniterOptions, ["--preset", name], presets=PRESETS).preset == name


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: UniterSize(hidden_size=10, num_attention_heads=4), id="heads"),
        pytest.param(lambda: UniterSize(dropout=1.0), id="dropout"),
        pytest.param(lambda: DataOptions(captions=0), id="no-captions"),
        pytest.param(lambda: OptimizerOptions(epochs=0), id="no-epochs"),
        pytest.param(lambda: OptimizerOptions(learning_rate=math.nan), id="nan-rate"),
        pytest.param(lambda: OptimizerOptions(clip=0), id="clip-of-zero"),
        pytest.param(lambda: OptimizerOptions(betas=(0.9, 1.0)), id="beta-of-one"),
        pytest.param(lambda: OptimizerOptions(schedule="cosine"), id="schedule"),  # type: ignore[arg-type]
        pytest.param(lambda: VillaAdversary(text_step=0), id="zero-step"),
        pytest.param(lambda: VillaAdversary(steps=1), id="one-step"),
        pytest.param(lambda: VillaAdversary(image_radius=-1), id="radius"),
        pytest.param(lambda: EvaluationOptions(radii=(1.0, 0.5)), id="descending-radii"),
        pytest.param(lambda: EvaluationOptions(objectives=()), id="no-objective"),
        pytest.param(lambda: EvaluationOptions(examples=0), id="no-examples"),
        pytest.param(lambda: UniterOptions(methods=("villa", "villa")), id="method-twice"),
        pytest.param(lambda: UniterOptions(methods=("both-stages",), checkpoint="c.pt"), id="no-row-of-a-checkpoint"),
        pytest.param(lambda: UniterOptions(seeds=()), id="no-seed"),
        pytest.param(lambda: UniterOptions(output=""), id="no-output"),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"expected .*, got "):
        make()


def mark(config: Any) -> str:
    return fingerprint(identity(config))


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_another_process_and_whatever_the_order_of_keys(tmp_path: Path) -> None:
    values = asdict(UniterOptions())
    reordered = {key: values[key] for key in sorted(values, reverse=True)}
    here = mark(UniterOptions())
    assert mark(build(UniterOptions, Layer("a", json.loads(json.dumps(reordered))))) == here
    modules = "advvl.experiments.config", "advvl.experiments.uniter", "advvl.files"
    code = "; ".join(
        [*(f"from {module} import *" for module in modules), "print(fingerprint(identity(UniterOptions())))"]
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_the_fingerprint_takes_a_whole_number_for_the_float_it_equals() -> None:
    assert mark(Outer(inner=Inner(rate=1))) == mark(Outer(inner=Inner(rate=1.0)))


def test_the_fingerprint_changes_with_every_field_that_is_part_of_the_identity() -> None:
    base = mark(Outer())
    changed = [Outer(name="y"), Outer(count=2), Outer(inner=Inner(on=True)), Outer(other=Inner())]
    assert len({base, *map(mark, changed)}) == len(changed) + 1
    assert mark(Outer(where="there")) == base
    assert "where" not in identity(Outer())


def test_a_run_in_another_place_or_of_more_seeds_has_the_same_identity(unusual: UniterOptions) -> None:
    kept = {item.name: getattr(unusual, item.name) for item in fields(unusual) if item.metadata.get("identity", True)}
    assert mark(UniterOptions(**kept)) == mark(unusual)
    assert set(identity(unusual)) == set(kept) >= {"model", "data", "finetune", "evaluation", "checkpoint"}


def test_leaves_carry_the_default_that_the_enclosing_dataclass_gives() -> None:
    defaults = {leaf.name: leaf.default for leaf in leaves(Outer)}
    assert defaults["inner.rate"] == 0.1
    assert defaults["other.rate"] == 0.7


def test_options_are_values() -> None:
    with pytest.raises(FrozenInstanceError):
        UniterOptions().threads = 3  # type: ignore[misc]
