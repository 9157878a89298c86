"""A WordPiece tokeniser made for a corpus: BERT's special tokens first, then pieces, then the corpus's words.

The vocabulary is a sorted list, not the outcome of a trainer, so the same text gives the same ids everywhere. Words
that the corpus lacks fall apart into letters; only what has other characters becomes [UNK].
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from advvl.errors import DataError

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIALS))


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A lower-casing WordPiece tokeniser with a token for every word of `texts`; it adds [CLS] and [SEP]."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    split = pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text))}
    symbols = string.ascii_lowercase + string.digits
    pieces = [*symbols, *("##" + symbol for symbol in symbols), *sorted(words - set(symbols))]
    tokenizer = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate((*SPECIALS, *pieces))}, unk_token=SPECIALS[UNK])
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes the tokeniser as a `tokenizer.json`, which transformers reads too."""
    tokenizer.save(str(path))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`. Raises `DataError` where it is not one, or its special tokens have other ids."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the only class that tokenizers raises
        raise DataError(f"expected a tokenizer.json at {path}, got one that cannot be read: {error}") from error
    ids = tuple(tokenizer.token_to_id(token) for token in SPECIALS)
    if ids != tuple(range(len(SPECIALS))):
        raise DataError(f"expected {SPECIALS} to have the ids 0..{len(SPECIALS) - 1} in {path}, got {ids}")
    return tokenizer


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
