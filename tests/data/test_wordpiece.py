"""The tokeniser: ids that never move, words whole, and a file that transformers reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import BertTokenizer

from advvl.data.wordpiece import (
    CLS,
    MASK,
    PAD,
    SEP,
    SPECIALS,
    UNK,
    build_tokenizer,
    load_bert_tokenizer,
    load_tokenizer,
    replacement_range,
    save_tokenizer,
    token_ids,
)
from advvl.errors import DataError

TEXTS = ["is there a seven", "two Sevens : a one , and ; it"]


def test_special_tokens_come_first() -> None:
    tokenizer = build_tokenizer(TEXTS)
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [PAD, UNK, CLS, SEP, MASK] == [0, 1, 2, 3, 4]


def test_each_word_of_the_corpus_is_one_token_and_text_lies_between_cls_and_sep() -> None:
    tokenizer = build_tokenizer(TEXTS)
    for text in TEXTS:
        assert tokenizer.encode(text).tokens == ["[CLS]", *text.lower().split(), "[SEP]"]
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True).split() == text.lower().split()


def test_a_word_the_corpus_lacks_falls_into_letters_and_a_foreign_sign_is_unknown() -> None:
    tokenizer = build_tokenizer(TEXTS)
    assert tokenizer.encode("cat ★").tokens == ["[CLS]", "c", "##a", "##t", "[UNK]", "[SEP]"]


def test_the_vocabulary_depends_on_the_words_alone() -> None:
    assert build_tokenizer(TEXTS).to_str() == build_tokenizer([*reversed(TEXTS), "a one"]).to_str()


def test_wrong_words_are_drawn_from_every_token_that_is_not_special() -> None:
    tokenizer = build_tokenizer(TEXTS)
    low, high = replacement_range(tokenizer)
    assert {tokenizer.id_to_token(i) for i in range(low, high)} == set(tokenizer.get_vocab()) - set(SPECIALS)


def test_a_saved_tokeniser_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TEXTS)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    assert token_ids(load_tokenizer(tmp_path / "tokenizer.json"), TEXTS) == token_ids(tokenizer, TEXTS)


@pytest.mark.parametrize("content", ["", "{}", "not json"], ids=["empty", "object", "text"])
def test_a_file_that_is_no_tokeniser_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_a_tokeniser_with_other_special_ids_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordPiece({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(DataError, match=r"ids 0\.\.4"):
        load_tokenizer(path)


def test_berts_own_vocabulary_gives_the_ids_that_transformers_gives(tmp_path: Path) -> None:
    """Of a `vocab.txt` in which the special tokens are not first, and of the `tokenizer.json` made of it."""
    words = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "cafe", "##s", "'", "?", "un", "##it"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    theirs = BertTokenizer(str(tmp_path / "vocab.txt"))
    ours = load_bert_tokenizer(tmp_path / "vocab.txt")
    save_tokenizer(ours, tmp_path / "tokenizer.json")
    texts = ["What's cafés?", "UNITS un its", "what\tis\u00a0[SEP] 中", ""]
    expected = [theirs(text)["input_ids"] for text in texts]
    assert token_ids(ours, texts) == expected
    assert token_ids(load_bert_tokenizer(tmp_path / "tokenizer.json"), texts) == expected


@pytest.mark.parametrize(
    ("name", "content"), [("vocab.txt", "[PAD]\nword"), ("tokenizer.json", "{}"), ("vocab.txt", None)]
)
def test_what_is_not_berts_vocabulary_is_refused(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(name)):
        load_bert_tokenizer(tmp_path / name)


WORDS = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\nb\n"


def test_a_word_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    """The model would have fewer rows than the largest id asks for."""
    (tmp_path / "vocab.txt").write_text(WORDS)
    with pytest.raises(DataError, match=r"7 tokens with the ids 0\.\.6 .*none with id 5; is line 6 there twice"):
        load_bert_tokenizer(tmp_path / "vocab.txt")
    vocabulary = {token: number for number, token in enumerate(WORDS.split())}
    Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    for load in (load_bert_tokenizer, load_tokenizer):
        with pytest.raises(DataError, match="none with id 5"):
            load(tmp_path / "tokenizer.json")
