"""Word pieces: the tokeniser that they come from, and those of a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from advvl.checks import is_whole, shown
from advvl.data.uniter.json_files import as_json, read_json
from advvl.errors import ConfigurationError, DataError

_NAMES: Final = ("bert", "tokenizer", "toker")
_NEEDED: Final = ("cls", "sep", "mask")
_SPECIALS: Final[tuple[dict[str, str], ...]] = (
    {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"},
)


@dataclass(frozen=True)
class TextMeta:
    """The tokeniser that a database was made with.

    Arguments:
        cls, sep, mask: ids of the special tokens.
        words: the range [low, high) of the ids that masked language modelling draws wrong words from.
        unk: the id of unknown words, where it is said.
        tokenizer: its name, such as "bert-base-cased", where it is said.
    """

    cls: int
    sep: int
    mask: int
    words: tuple[int, int]
    unk: int | None = None
    tokenizer: str | None = None

    @classmethod
    def of(cls, tokenizer: Any, name: str | None = None) -> TextMeta:
        """Describe a tokeniser of tokenizers or transformers that has BERT's special tokens, or RoBERTa's.

        Raises:
            DataError: it lacks one of them.
            ConfigurationError: it is no tokeniser, or one that pads or cuts.
        """
        _check_tokenizer(tokenizer)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        names = next((names for names in _SPECIALS if names["cls"] in vocabulary), _SPECIALS[0])
        found = {role: getattr(tokenizer, f"{role}_token", None) or names[role] for role in names}
        missing = [token for role, token in found.items() if token not in vocabulary and role in _NEEDED]
        if missing:
            raise DataError(
                f"expected a tokenizer that knows {', '.join(names.values())}, got {name or type(tokenizer).__name__} "
                f"without {', '.join(missing)}; give BERT's"
            )
        ids = {role: vocabulary[token] for role, token in found.items() if token in vocabulary}
        words = _longest_run(ids.values(), max(vocabulary.values()) + 1)
        if "!" in vocabulary and names is _SPECIALS[0]:  # unused tokens and letters of other scripts come before it
            words = (max(words[0], vocabulary["!"]), words[1])
        return cls(ids["cls"], ids["sep"], ids["mask"], words, ids.get("unk"), name)

    @classmethod
    def read(cls, path: Path) -> TextMeta:
        """Read `meta.json`, under whichever of its keys the tokeniser's name is.

        Raises:
            DataError: it is missing or malformed, or lacks an id.
        """
        found = read_json(path, dict, "the ids of special tokens")
        opening, closing, mask = (found.get(name) for name in ("CLS", "SEP", "MASK"))
        words = found.get("v_range")
        if not isinstance(words, list) or len(words) != 2 or not all(map(is_whole, (opening, closing, mask, *words))):
            raise DataError(
                f"expected whole numbers CLS, SEP, MASK and a pair v_range in {str(path)!r}, got {shown(found)}"
            )
        unk, name = found.get("UNK"), next((found[key] for key in _NAMES if isinstance(found.get(key), str)), None)
        return cls(opening, closing, mask, (words[0], words[1]), unk if is_whole(unk) else None, name)

    def as_json(self) -> bytes:
        """The content of `meta.json`; the name stands under each key that a published script looks for."""
        unk = {} if self.unk is None else {"UNK": self.unk}
        named = {} if self.tokenizer is None else dict.fromkeys(_NAMES, self.tokenizer)
        return as_json({"CLS": self.cls, "SEP": self.sep, "MASK": self.mask, "v_range": self.words, **unk, **named})

    def check_same(self, other: TextMeta, where: tuple[object, object]) -> None:
        """Raise DataError unless both were made with one tokeniser; a name that is not said is that of the other."""
        same_ids = (self.cls, self.sep, self.mask, self.words) == (other.cls, other.sep, other.mask, other.words)
        if not same_ids or len({self.tokenizer, other.tokenizer} - {None}) > 1:
            raise DataError(
                f"expected databases of one tokenizer, got {self} in {str(where[0])!r} and {other} in {str(where[1])!r}; "
                "make one of them again"
            )


def word_pieces(record: Mapping[str, Any], name: str = "input_ids") -> list[int]:
    """Return a record's word pieces.

    Raises:
        DataError: there are none, or others than ids.
    """
    found = record.get(name)
    if not _are_ids(found):
        raise DataError(
            f"{name}: expected ids of one word piece or more, got {shown(found)}; leave it out or correct it"
        )
    return found  # type: ignore[return-value]


def word_pieces_of_four(record: Mapping[str, Any], name: str) -> list[list[int]]:
    """Return the word pieces of VCR's four choices.

    Raises:
        DataError: there are not four, or some are no ids.
    """
    found = record.get(name)
    if not isinstance(found, list) or len(found) != 4 or not all(map(_are_ids, found)):
        raise DataError(f"{name}: expected ids of four choices, got {shown(found)}; leave it out or correct it")
    return found


def check_known(record: Mapping[str, Any], vocabulary: int) -> None:
    """Raise DataError where a record has a word piece that a model of so many words does not know."""
    for name in ("input_ids", "input_ids_as", "input_ids_rs"):
        value: Any = record.get(name)
        rows: Any = [value] if _are_ids(value) else value if isinstance(value, list) else []
        highest = max((max(ids) for ids in rows if _are_ids(ids)), default=0)
        if highest >= vocabulary:
            raise DataError(
                f"{name}: expected ids below the model's {vocabulary} words, got {highest}; give model.vocab_size of the "
                "texts' tokenizer, or write them again"
            )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int} and min(value) >= 0


def text_lengths(record: Mapping[str, Any]) -> dict[str, int]:
    """Return the word pieces of an example by the file that has them: of VCR, of a question with its longest choice.

    Raises:
        DataError: as `word_pieces`.
    """
    words = len(word_pieces(record))
    if "input_ids_as" not in record:
        return {"id2len": words}
    answers = word_pieces_of_four(record, "input_ids_as")
    found = {"id2len_qa": words + max(map(len, answers))}
    if "input_ids_rs" in record:
        right = record.get("qa_target", -1)
        # A test set does not say which answer is right: the longest is as long as any.
        answer = len(answers[right]) if right in range(4) else max(map(len, answers))
        found["id2len_qar"] = words + answer + max(map(len, word_pieces_of_four(record, "input_ids_rs")))
    return found


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the word pieces of a text, without special tokens, by a tokeniser of tokenizers or transformers.

    Raises:
        DataError: a text with half of a character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"expected a text of whole characters, got {error}; decode it again") from error
    found = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(found, "ids", found))


def _check_tokenizer(tokenizer: Any) -> None:
    if not callable(getattr(tokenizer, "encode", None)) or not callable(getattr(tokenizer, "get_vocab", None)):
        raise ConfigurationError(f"expected a tokenizer of tokenizers or transformers, got {shown(tokenizer)}")
    # those of transformers pad and cut only in calls that ask for it
    if getattr(tokenizer, "truncation", None) is not None or getattr(tokenizer, "padding", None) is not None:
        raise ConfigurationError(
            "expected a tokenizer that neither pads nor cuts, got one that does; call its no_padding() and no_truncation()"
        )


def _longest_run(special: Iterable[int], size: int) -> tuple[int, int]:
    """Return the longest range [low, high) of ids below `size` that holds no special one."""
    ends = sorted({-1, *special, size})
    return max(((low + 1, high) for low, high in pairwise(ends)), key=lambda run: run[1] - run[0])
