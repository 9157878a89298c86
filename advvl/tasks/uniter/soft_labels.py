"""Teachers of masked words for a UNITER: models whose distributions say which other words would fit.

Part of a reconstruction of ViLTA (Wang et al., ICCV 2023) from its abstract. A third teacher is `advvl.Averaged(model,
0.995)`, a momentum average of the model itself, with the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from advvl.checks import shown
from advvl.data.wordpiece import load_bert_tokenizer
from advvl.errors import CheckpointError, ConfigurationError
from advvl.models.uniter.layout import gather_index
from advvl.models.uniter.model import UniterOutput, given
from advvl.regularizers.references import Reference
from advvl.runtime.names import unwrapped
from advvl.runtime.states import kept_modes
from advvl.tasks.uniter.pretraining import UniterForPretraining


class BertTeacher(nn.Module):
    """A masked-language model of transformers that predicts the masked words of UNITER's batches; pass it as `Frozen(…)`.

    It is frozen as it is made; `train().requires_grad_()` makes it one that `fit` trains on such batches.

    Arguments:
        bert: the model, or the folder of one.
        vocab_size: that of the UNITER; the same ids have to be the same words.
        vocab: the words of the UNITER in the order of their ids, to compare with the folder's `vocab.txt` or
            `tokenizer.json`; None: the number of words is compared alone.

    Raises:
        CheckpointError: a folder that holds no masked-language model, or no words to compare.
        ConfigurationError: another vocabulary, or no such model.
        DataError: words that cannot be read.
    """

    def __init__(self, bert: nn.Module | str | Path, *, vocab_size: int, vocab: Sequence[str] | None = None) -> None:
        super().__init__()
        folder = bert
        if isinstance(bert, str | Path):
            if not Path(bert).is_dir():  # transformers would take it for a name, and look for it
                raise CheckpointError(
                    f"expected the folder of a masked-language model of transformers, got {str(bert)!r}; give a directory"
                )
            try:
                bert = AutoModelForMaskedLM.from_pretrained(bert, local_files_only=True)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"expected the folder of a masked-language model of transformers, got {str(bert)!r}: {error}"
                ) from error
        if not isinstance(bert, nn.Module):
            raise ConfigurationError(f"expected a masked-language model or its folder, got {type(bert).__name__}")
        found = getattr(getattr(bert, "config", None), "vocab_size", None)
        if found != vocab_size:
            raise ConfigurationError(
                f"expected a teacher with the vocabulary of the UNITER, {vocab_size} words, got {found}; take one that was "
                "trained with the same vocab.txt"
            )
        if vocab is not None:
            _check_words(folder, vocab)
        self.bert = bert.eval().requires_grad_(False)

    def forward(
        self, *, input_ids: Tensor, txt_lens: Tensor, txt_labels: Tensor | None = None, **others: Any
    ) -> UniterOutput:
        """Score the words at the N masked places, `(N, V)`, and give the loss of the true ones; pictures are ignored.

        Arguments:
            input_ids: `(B, L)`.
            txt_lens: tokens of each text, `(B,)`.
            txt_labels: `(B, L)`, -1 where no word is to be predicted.

        Raises:
            DataError: a batch without txt_labels.
        """
        del others
        real = torch.arange(input_ids.shape[1], device=input_ids.device) < txt_lens[:, None]
        masked = given("txt_labels", txt_labels) != -1
        logits = self.bert(input_ids=input_ids, attention_mask=real.long()).logits[masked]
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits.to(wide), given("txt_labels", txt_labels)[masked], reduction="none")
        return UniterOutput(loss=losses.mean(), losses=losses, logits=logits)


def _check_words(bert: object, vocab: Sequence[str]) -> None:
    """Check that the words in the folder of a teacher are these, each with the same id."""
    if not isinstance(vocab, list | tuple) or not all(isinstance(word, str) for word in vocab):
        raise ConfigurationError(f"expected vocab as a list of words, got {shown(vocab)}; read them from vocab.txt")
    if not isinstance(bert, str | Path):
        raise ConfigurationError(
            f"expected the folder of a teacher to compare words with vocab, got {type(bert).__name__}; leave out vocab"
        )
    files = [path for name in ("vocab.txt", "tokenizer.json") if (path := Path(bert, name)).is_file()]
    if not files:
        raise CheckpointError(
            f"expected a vocab.txt or tokenizer.json in {str(bert)!r}, got none; save the teacher's tokenizer there"
        )
    found = load_bert_tokenizer(files[0]).get_vocab()
    pairs = enumerate(zip_longest(vocab, sorted(found, key=found.__getitem__)))
    other = next(((place, *pair) for place, pair in pairs if pair[0] != pair[1]), None)
    if other is not None:
        place, expected, got = other
        raise ConfigurationError(
            f"expected the UNITER's word {place}, {expected!r}, in {str(files[0])!r}, got {got!r}; take a teacher that was "
            "trained with the same vocab.txt"
        )


class TextAlone(nn.Module):
    """A UNITER's own masked-word head on texts without their pictures, called as `BertTeacher` is; it holds no copy."""

    def __init__(self, model: UniterForPretraining) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        *,
        input_ids: Tensor,
        txt_lens: Tensor,
        txt_labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> UniterOutput:
        """Score the words at the N masked places, `(N, V)`.

        Raises:
            DataError: a batch without txt_labels.
        """
        del others
        rows, length = len(input_ids), int(txt_lens.max())  # a batch may be padded for texts that are not in it
        regions = torch.zeros_like(txt_lens)
        dtype = self.model.cls.predictions.bias.dtype
        output: UniterOutput = self.model(
            task="mlm",
            input_ids=input_ids[:, :length],
            position_ids=None if position_ids is None else position_ids[:, :length],
            txt_labels=given("txt_labels", txt_labels)[:, :length],
            img_feat=torch.zeros(rows, 0, self.model.config.img_dim, device=input_ids.device, dtype=dtype),
            img_pos_feat=torch.zeros(rows, 0, 7, device=input_ids.device, dtype=dtype),
            attn_masks=(torch.arange(length, device=input_ids.device) < txt_lens[:, None]).long(),
            gather_index=gather_index(txt_lens, regions, length),
            txt_lens=txt_lens,
            num_bbs=regions,
        )
        return output


class LiveText(Reference):
    """The trained UNITER itself, as it is now, in eval mode and on text alone."""

    @contextmanager
    def model(self, model: nn.Module) -> Iterator[nn.Module]:
        plain = unwrapped(model)
        if not isinstance(plain, UniterForPretraining):
            raise ConfigurationError(f"expected a UniterForPretraining for LiveText(), got {type(plain).__name__}")
        with kept_modes(plain):
            plain.eval()
            yield TextAlone(plain)
