"""Facts about single classes of transformers that their accessors do not give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from advvl.adapters.injection import Batch
from advvl.models.huggingface import fields


@dataclass(frozen=True)
class Known:
    """Facts about a class.

    Arguments:
        image: the module, below the model of this class, where an image is perturbed, and whether at its output or input.
        mask: from that module and the batch to its mask of real positions.
        words: from the batch, and tokens whose embedding is replaced, to the mask of real words.
        lengthened: from the model and the number of words to the number that it embeds, with its own padding at the
            end.
        firing: the call of its parts that counts, if there are several.
        no_logits: the meaning of its `logits`, which are not logits.
        refused: why its words cannot be perturbed.
        for_each_image: it runs its parts once for each image of a text.
    """

    image: str = ""
    at: Literal["output", "input"] = "output"
    mask: Callable[[nn.Module, Batch], Tensor] | None = None
    words: Callable[..., Tensor] | None = None
    lengthened: Callable[[Any, int], int] | None = None
    firing: int | None = None
    no_logits: str = ""
    refused: str = ""
    for_each_image: bool = False


def known(part: nn.Module) -> Known:
    """The facts about the class of a model, or the nearest that it inherits from."""
    return next((_KNOWN[cls.__name__] for cls in type(part).__mro__ if cls.__name__ in _KNOWN), Known())


def lengthened(
    mask: Callable[..., Tensor], part: nn.Module, of: Callable[[Any, int], int]
) -> Callable[[Batch], Tensor]:
    """The mask of words, with the padding that a part adds left out."""

    def padded(batch: Batch) -> Tensor:
        real = mask(batch)
        return F.pad(real, (0, of(part, real.shape[1]) - real.shape[1]))

    return padded


def _up_to(multiple: int, length: int) -> int:
    return -(-length // multiple) * multiple


def _windows(model: Any, length: int) -> int:
    window = model.config.attention_window
    return _up_to(window if isinstance(window, int) else max(window), length)


def _blocks(model: Any, length: int) -> int:
    """BigBird falls back to full attention, for good, on the first batch that is too short for blocks."""
    config = model.config
    sparse = model.attention_type == "block_sparse" and length > (5 + 2 * config.num_random_blocks) * config.block_size
    return _up_to(config.block_size, length) if sparse else length


_KNOWN = {
    "BridgeTowerVisionModel": Known("visual.embeddings"),
    # it shuffles its patches after embedding them: only before that is a position always the same patch
    "ViltModel": Known("embeddings.patch_embeddings", mask=fields.patch_mask),
    "ViltForImagesAndTextClassification": Known(for_each_image=True),
    "XLNetModel": Known(refused="embeds words as (T, B, D), whose rows are no samples"),
    "VisualBertModel": Known("embeddings.visual_projection", at="input", mask=fields.region_mask),
    "SiglipTextModel": Known(words=fields.text_mask_to_the_end),
    "Siglip2TextModel": Known(words=fields.text_mask_to_the_end),
    "BridgeTowerForContrastiveLearning": Known(no_logits="embeddings of text, image and both"),
    # all losses except the contrastive one come from the second forward, on masked inputs
    "FlavaForPreTraining": Known(firing=1),
    "LongformerModel": Known(lengthened=_windows),
    "BigBirdModel": Known(lengthened=_blocks),
    # in a second call they embed their own padding
    "LEDEncoder": Known(firing=0),
    "BigBirdPegasusEncoder": Known(firing=0),
}
