"""A WordPiece tokeniser made for a corpus: BERT's special tokens first, then pieces, then the corpus's words.

The vocabulary is a sorted list, not the outcome of a trainer, so the same text gives the same ids everywhere. Words
that the corpus lacks are split into letters; only what has other characters becomes [UNK].
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from advvl.checks import path_of
from advvl.errors import DataError
from advvl.files import write_text

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIALS))

_NORMALIZER = normalizers.BertNormalizer(lowercase=True)
_SPLIT = pre_tokenizers.BertPreTokenizer()


def build_tokenizer(texts: Iterable[str], *, least: int = 1) -> Tokenizer:
    """Build a lower-casing WordPiece tokeniser with a token for the words of `texts`; it adds [CLS] and [SEP].

    Arguments:
        least: times that a word has to stand there; rarer ones are split into letters, as unknown ones are.
    """
    counts = Counter(word for text in texts for word, _ in _SPLIT.pre_tokenize_str(_NORMALIZER.normalize_str(text)))
    words = {word for word, count in counts.items() if count >= least}
    symbols = string.ascii_lowercase + string.digits
    pieces = [*symbols, *("##" + symbol for symbol in symbols), *sorted(words - set(symbols))]
    return _tokenizer({token: i for i, token in enumerate((*SPECIALS, *pieces))})


def load_bert_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokeniser of an uncased BERT: its `vocab.txt`, or the `tokenizer.json` made of it.

    Raises:
        DataError: it cannot be read, lacks one of the special tokens, or has a line twice, so that an id has no token.
    """
    path = path_of(path)
    try:
        tokenizer = None if path.suffix == ".txt" else Tokenizer.from_file(str(path))
        vocabulary = tokenizer.get_vocab() if tokenizer else models.WordPiece.read_file(str(path))
    except Exception as error:  # the only class that tokenizers raises
        raise DataError(
            f"expected a vocab.txt or tokenizer.json at {path}, got one that cannot be read: {error}"
        ) from error
    missing = [token for token in SPECIALS if token not in vocabulary]
    if missing:
        raise DataError(f"expected BERT's special tokens in {path}, got none of {', '.join(missing)}; is it BERT's?")
    _check_ids(vocabulary, path)
    return tokenizer or _tokenizer(vocabulary)


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIALS[UNK]))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.normalizer = _NORMALIZER
    tokenizer.pre_tokenizer = _SPLIT
    opening, closing = SPECIALS[CLS], SPECIALS[SEP]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A {closing}",
        special_tokens=[(opening, vocabulary[opening]), (closing, vocabulary[closing])],
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write the tokeniser as a `tokenizer.json`, which transformers reads too, whole or not at all."""
    write_text(path, tokenizer.to_str(pretty=True))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        DataError: it is not one, its special tokens have other ids, or some id has no token.
    """
    path = path_of(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the only class that tokenizers raises
        raise DataError(f"expected a tokenizer.json at {path}, got one that cannot be read: {error}") from error
    ids = tuple(tokenizer.token_to_id(token) for token in SPECIALS)
    if ids != tuple(range(len(SPECIALS))):
        raise DataError(f"expected {SPECIALS} to have the ids 0..{len(SPECIALS) - 1} in {path}, got {ids}")
    _check_ids(tokenizer.get_vocab(), path)
    return tokenizer


def _check_ids(vocabulary: dict[str, int], path: str | Path) -> None:
    """Raise DataError unless the ids are 0..n-1: a model has a row for each of n tokens, and none for an id beyond."""
    free = next((number for number, token in enumerate(sorted(vocabulary.values())) if number != token), None)
    if free is not None:
        raise DataError(
            f"expected {len(vocabulary)} tokens with the ids 0..{len(vocabulary) - 1} in {path}, got none with id {free}; "
            f"is line {free + 1} there twice?"
        )


def token_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """The ids of each text, from [CLS] to [SEP]."""
    known: dict[str, list[int]] = {}
    rows: list[list[int]] = []
    for text in texts:
        if text not in known:
            known[text] = tokenizer.encode(text).ids
        rows.append(known[text])
    return rows


def replacement_range(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids [low, high) from which masked language modelling draws a wrong word: all but the special tokens."""
    return len(SPECIALS), tokenizer.get_vocab_size()
