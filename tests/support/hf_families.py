"""Tiny random models of many families of transformers, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from advvl import (
    Adapter,
    adapt,
)

Fields = dict[str, Any]

LAYERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
# a wide initialisation, so that nothing is lost in rounding
WORDS = LAYERS | {
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
PATCHES = LAYERS | {"image_size": 8, "patch_size": 4, "initializer_range": 0.3}  # 4 patches an image
CLASSES = {"num_labels": 3}
IMAGE, VIDEO = 49, 48  # placeholder tokens


@dataclass(frozen=True)
class Family:
    """A model, and a batch of two samples.

    Arguments:
        name: of the family.
        make, batch: the model, in float32, and the fields that it takes.
        loss: in the place of the model's own, where it has none.
        logits: whether its outputs have any.
        embeds: whether the model takes `inputs_embeds` in the place of `input_ids`, alone.
        idle: the words that nothing depends on, by the batch and the mask of real ones.
        coupled: what makes rows depend on each other.
        leaks: modality to why its padding matters all the same.
        notes: what else to know of a modality.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Fields]
    loss: Callable[[Any, Fields], Tensor] | None = None
    logits: bool = True
    embeds: bool = False
    idle: Callable[[Fields, Tensor], Tensor] | None = None
    coupled: str = ""
    leaks: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.make().double().eval()

    def adapter(self) -> Adapter:
        return adapt(self.model(), loss=self.loss)

    def fields(self) -> Fields:
        torch.manual_seed(1)
        return {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.batch().items()
        }


# --- batches ---


def words(**more: Any) -> Fields:
    """Five words and three."""
    ids, mask = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, **more}


def next_words(**more: Any) -> Fields:
    return words(labels=torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, -100, -100]]), **more)


def classed(batch: Callable[..., Fields] = words, **more: Any) -> Fields:
    return batch(labels=torch.tensor([0, 2]), **more)


def pictures(**more: Any) -> Fields:
    return {"pixel_values": torch.rand(2, 3, 8, 8), **more}


def regions(**more: Any) -> Fields:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    return words(visual_embeds=torch.randn(2, 3, 6), visual_attention_mask=mask, **more)


def padded_pictures(**more: Any) -> Fields:
    """The second picture is of half the height."""
    mask = torch.ones(2, 8, 8, dtype=torch.long)
    mask[1, 4:] = 0
    return words(pixel_values=torch.rand(2, 3, 8, 8), pixel_mask=mask, **more)


def with_tokens(each: int, pixels: Tensor, **more: Any) -> Fields:
    """Words around the tokens of one picture and of two."""
    first, second = [1, *[IMAGE] * each, 5, 6, 2], [1, *[IMAGE] * each, 7, *[IMAGE] * each, 8, 2]
    length = max(len(first), len(second))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in (first, second)])
    labels = ids.masked_fill((ids == 0) | (ids == IMAGE), -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels, "pixel_values": pixels} | more


def paligemma() -> Fields:
    batch = with_tokens(4, torch.rand(3, 3, 8, 8))
    return batch | {"token_type_ids": (batch["labels"] != -100).long()}


def several_pictures() -> Fields:
    """One picture and two, filled up with a blank one; the last picture is of half the height."""
    pixels, mask = torch.rand(2, 2, 3, 8, 8), torch.ones(2, 2, 8, 8, dtype=torch.long)
    pixels[0, 1] = 0
    mask[1, 1, 4:] = 0
    return with_tokens(1, pixels, pixel_attention_mask=mask)


def uneven_pictures(**more: Any) -> Fields:
    """Pictures as patches: three by three of them, and two by two, filled up."""
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    patches, shapes = torch.rand(2, 9, 48), torch.tensor([[3, 3], [2, 2]])
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes, **more}


def long_words(length: int, second: int, **more: Any) -> Fields:
    """So many words in either text; the length is no multiple of a window or block."""
    ids = torch.randint(3, 46, (2, length))
    ids[1, second:] = 0
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), **more}


def tiled_pictures() -> Fields:
    """One picture of two tiles and the whole; one of four and one of two; each line of patches ends in a token more."""
    lengths = [4 + 2 * 5], [4 + 4 * 5, 4 + 4 * 3]
    rows = [[1, *(word for n in own for word in [*[IMAGE] * n, 5]), 6, 2] for own in lengths]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill((ids == 0) | (ids == IMAGE), -100),
        "pixel_values": torch.rand(3, 5, 3, 8, 8),  # filled up with tiles that the model leaves out
        "image_sizes": torch.tensor([[8, 16], [16, 16], [16, 8]]),
    }


def chosen(batch: Callable[..., Fields] = words) -> Fields:
    """Two choices, the second the first one's words backwards."""
    fields = {name: torch.stack([value, value.flip(0)], 1) for name, value in batch().items()}
    return fields | {"labels": torch.tensor([0, 1])}


def packed() -> Fields:
    """A picture of 4 patches; one of 8 and one of 4. Two by two patches are a token."""
    ids = torch.tensor([[1, 47, IMAGE, 46, 5, 6, 2, 0, 0], [1, 47, IMAGE, IMAGE, 46, 47, IMAGE, 46, 2]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill((ids == 0) | (ids == IMAGE), -100),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4], [1, 2, 2]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def masked_words(**more: Any) -> Fields:
    labels = torch.tensor([[-100, 5, -100, 7, -100], [-100, 8, -100, -100, -100]])
    return words(labels=labels, **more)


def flava() -> Fields:
    return pictures(
        **words(),
        input_ids_masked=torch.tensor([[1, 3, 6, 7, 2], [1, 3, 2, 0, 0]]),
        mlm_labels=torch.tensor([[-100, 5, -100, -100, -100], [-100, 8, -100, -100, -100]]),
        itm_labels=torch.tensor([1, 1]),
        mim_labels=torch.tensor([[-100, 1, -100, -100], [-100, -100, 2, -100]]),
        bool_masked_pos=torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool),
        return_loss=True,
    )


# --- positions that nothing depends on ---


def last_word(batch: Fields, real: Tensor) -> Tensor:
    """A causal model says nothing of what comes after the last word."""
    ends = batch["attention_mask"].sum(1) - 1
    return torch.arange(real.shape[1]) == ends[:, None]


# --- losses of models that have none ---


def pairing(outputs: Any, batch: Fields) -> Tensor:
    del batch
    return outputs.multimodal_output.pooler_output.square().sum(1)


# --- the families ---


def llava() -> nn.Module:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=WORDS | {"model_type": "llama"},
            vision_config=PATCHES | {"model_type": "clip_vision_model", "num_hidden_layers": 2},
            image_token_id=IMAGE,
        )
    )


def llava_next() -> nn.Module:
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            text_config=WORDS | {"model_type": "llama", "max_position_embeddings": 64},
            vision_config=PATCHES | {"model_type": "clip_vision_model", "num_hidden_layers": 2},
            image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
            image_token_id=IMAGE,
        )
    )


QWEN_VL_TEXT = WORDS | {
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}
QWEN_VL_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 47,
    "vision_end_token_id": 46,
}


def qwen2_vl() -> nn.Module:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=QWEN_VL_TEXT, vision_config=vision, **QWEN_VL_TOKENS)
    )


def qwen2_5_vl() -> nn.Module:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 32,
        "patch_size": 4,
        "out_hidden_size": 16,
        "window_size": 8,
        "fullatt_block_indexes": [],
    }
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=QWEN_VL_TEXT, vision_config=vision, **QWEN_VL_TOKENS)
    )


def blip_config() -> Any:
    text = WORDS | {"encoder_hidden_size": 16, "sep_token_id": 2}
    return hf.BlipConfig(text_config=text, vision_config=PATCHES, projection_dim=16, image_text_hidden_size=16)


def bridgetower_config() -> Any:
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    config = hf.BridgeTowerConfig(
        text_config=WORDS | wide,
        vision_config=PATCHES | wide,
        contrastive_hidden_size=16,
        initializer_range=0.3,
        **wide,
    )
    config.logit_scale_init_value = 1.0  # transformers 5.23 reads it, and drops it where it is given
    return config


def blip2() -> nn.Module:
    text = WORDS | {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16}
    qformer = LAYERS | {"encoder_hidden_size": 16, "vocab_size": 50, "initializer_range": 0.3}
    return hf.Blip2ForConditionalGeneration(
        hf.Blip2Config(
            text_config=text,
            vision_config=PATCHES,
            qformer_config=qformer,
            num_query_tokens=3,
            image_token_index=IMAGE,
            initializer_range=0.3,
        )
    )


def flava_config() -> Any:
    multimodal = LAYERS | {"initializer_range": 0.3}
    return hf.FlavaConfig(
        text_config=WORDS,
        image_config=PATCHES,
        multimodal_config=multimodal,
        image_codebook_config={"num_groups": 1, "hidden_size": 4, "vocab_size": 8, "num_blocks_per_group": 1},
        hidden_size=16,
        projection_dim=16,
        initializer_range=0.3,
    )


T5 = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "initializer_factor": 3.0,
}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BART = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "init_std": 0.3,
}

FAMILIES = [
    Family("BERT", lambda: hf.BertForSequenceClassification(hf.BertConfig(**WORDS, **CLASSES)), classed, embeds=True),
    Family("BERT", lambda: hf.BertForMaskedLM(hf.BertConfig(**WORDS)), masked_words, embeds=True),
    Family(
        "RoBERTa",
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**WORDS, **CLASSES)),
        classed,
        embeds=True,
    ),
    Family(
        "DeBERTa-v2",
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**WORDS, **CLASSES, relative_attention=True, pos_att_type=["p2c", "c2p"])
        ),
        classed,
        embeds=True,
    ),
    Family(
        "ALBERT",
        lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**WORDS, **CLASSES, embedding_size=8)),
        classed,
        embeds=True,
    ),
    Family(
        "DistilBERT",
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                vocab_size=50, dim=16, hidden_dim=32, n_layers=1, n_heads=2, initializer_range=0.3, **CLASSES
            )
        ),
        classed,
        embeds=True,
    ),
    Family(
        "ELECTRA",
        lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**WORDS, **CLASSES, embedding_size=8)),
        classed,
        embeds=True,
    ),
    Family("BERT", lambda: hf.BertForMultipleChoice(hf.BertConfig(**WORDS)), chosen),
    Family(
        "Longformer",
        lambda: hf.LongformerForSequenceClassification(hf.LongformerConfig(**WORDS, **CLASSES, attention_window=[8])),
        lambda: classed(partial(long_words, 13, 4)),
        notes={"text": "the model pads to windows"},
    ),
    Family(
        "BigBird",
        lambda: hf.BigBirdForSequenceClassification(
            hf.BigBirdConfig(
                **WORDS | {"max_position_embeddings": 64},
                **CLASSES,
                attention_type="block_sparse",
                block_size=4,
                num_random_blocks=1,
            )
        ),
        lambda: classed(partial(long_words, 37, 12)),
        notes={"text": "the model pads to blocks"},
    ),
    Family(
        "LED",
        lambda: hf.LEDForConditionalGeneration(
            hf.LEDConfig(
                **{name: size for name, size in BART.items() if name != "max_position_embeddings"},
                **ENDS,
                decoder_start_token_id=2,
                attention_window=[8],
                max_encoder_position_embeddings=32,
                max_decoder_position_embeddings=32,
            )
        ),
        # a window of padding alone makes its gradients NaN in float64
        lambda: long_words(13, 12, labels=torch.tensor([[1, 5, 6, 2], [1, 8, 2, -100]])),
        notes={"text": "the encoder's words; the model pads to windows"},
    ),
    Family(
        "BigBird-Pegasus",
        lambda: hf.BigBirdPegasusForConditionalGeneration(
            hf.BigBirdPegasusConfig(
                **BART | {"max_position_embeddings": 64},
                **ENDS,
                decoder_start_token_id=2,
                attention_type="block_sparse",
                block_size=4,
                num_random_blocks=1,
            )
        ),
        lambda: long_words(37, 12, labels=torch.tensor([[1, 5, 6, 2], [1, 8, 2, -100]])),
        notes={"text": "the encoder's words; the model pads to blocks"},
    ),
    Family("MPNet", lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**WORDS, **CLASSES)), classed),
    Family("GPT-2", lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, **ENDS)), next_words, embeds=True, idle=last_word),
    Family("Llama", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS)), next_words, embeds=True, idle=last_word),
    Family(
        "Mistral",
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**WORDS, num_key_value_heads=1)),
        next_words,
        embeds=True,
        idle=last_word,
    ),
    Family(
        "Qwen2",
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**WORDS, num_key_value_heads=1)),
        next_words,
        embeds=True,
        idle=last_word,
    ),
    Family(
        "Qwen3",
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WORDS, num_key_value_heads=1, head_dim=8)),
        next_words,
        embeds=True,
        idle=last_word,
    ),
    Family(
        "T5",
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
        next_words,
        embeds=True,
        notes={"text": "the encoder's words"},
    ),
    Family(
        "BART",
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART, **ENDS, decoder_start_token_id=2)),
        next_words,
        notes={"text": "the encoder's words"},
    ),
    Family(
        "BART",
        lambda: hf.BartForCausalLM(hf.BartConfig(**BART, **ENDS)),
        next_words,
    ),
    Family("ViT", lambda: hf.ViTForImageClassification(hf.ViTConfig(**PATCHES, **CLASSES)), lambda: classed(pictures)),
    Family(
        "DeiT", lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**PATCHES, **CLASSES)), lambda: classed(pictures)
    ),
    Family(
        "DINOv2",
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**PATCHES, **CLASSES)),
        lambda: classed(pictures),
    ),
    Family(
        "Swin",
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=8,
                patch_size=2,
                embed_dim=8,
                depths=[1, 1],
                num_heads=[1, 2],
                window_size=2,
                initializer_range=0.3,
                **CLASSES,
            )
        ),
        lambda: classed(pictures),
    ),
    Family(
        "CLIP",
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config=WORDS | {"eos_token_id": 9}, vision_config=PATCHES, projection_dim=16)
        ),
        lambda: pictures(**words(input_ids=torch.tensor([[1, 5, 6, 7, 9], [1, 8, 9, 0, 0]])), return_loss=True),
        coupled="contrastive loss",
    ),
    Family(
        "SigLIP",
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=WORDS, vision_config=PATCHES)),
        lambda: pictures(**words(), return_loss=True),
        coupled="contrastive loss",
        notes={"text": "the last position is always real: the text is read there"},
    ),
    Family(
        "SigLIP 2",
        lambda: hf.Siglip2ForImageClassification(
            hf.Siglip2Config(
                vision_config=LAYERS | {"num_patches": 16, "patch_size": 4}, text_config=WORDS, num_labels=3
            )
        ),
        lambda: classed(uneven_pictures),
    ),
    Family(
        "ViLT",
        lambda: hf.ViltForQuestionAnswering(hf.ViltConfig(**WORDS, image_size=8, patch_size=4, **CLASSES)),
        lambda: padded_pictures(labels=torch.eye(3)[:2]),
        notes={"image": "(B, D, H, W): the model shuffles patches afterwards"},
    ),
    Family(
        "VisualBERT",
        lambda: hf.VisualBertForQuestionAnswering(hf.VisualBertConfig(**WORDS, visual_embedding_dim=6, **CLASSES)),
        lambda: regions(labels=torch.eye(3)[:2]),
        notes={"image": "region features"},
    ),
    Family(
        "VisualBERT",
        lambda: hf.VisualBertForMultipleChoice(hf.VisualBertConfig(**WORDS, visual_embedding_dim=6)),
        lambda: chosen(regions),
        notes={"image": "region features"},
    ),
    Family(
        "FLAVA",
        lambda: hf.FlavaModel(flava_config()),
        lambda: pictures(**words()),
        loss=pairing,
        logits=False,
        notes={"text": "with a loss of one's own"},
    ),
    Family(
        "FLAVA",
        lambda: hf.FlavaForPreTraining(flava_config()),
        flava,
        coupled="contrastive loss",
        notes={"text": "its second forward, on masked inputs"},
    ),
    Family(
        "BridgeTower",
        lambda: hf.BridgeTowerForImageAndTextRetrieval(bridgetower_config()),
        lambda: pictures(**words(), labels=torch.tensor([0, 1])),
    ),
    Family(
        "BridgeTower",
        lambda: hf.BridgeTowerForContrastiveLearning(bridgetower_config()),
        lambda: pictures(**words(), return_loss=True),
        logits=False,
        coupled="contrastive loss",
        notes={"text": "no logits: what it calls so are embeddings"},
    ),
    Family(
        "BLIP", lambda: hf.BlipForConditionalGeneration(blip_config()), lambda: pictures(**next_words()), idle=last_word
    ),
    Family(
        "BLIP",
        lambda: hf.BlipForQuestionAnswering(blip_config()),
        lambda: pictures(
            **next_words(decoder_input_ids=torch.tensor([[1, 5, 6], [1, 7, 2]]))
            | {"labels": torch.tensor([[5, 6, 2], [7, 2, -100]])}
        ),
        logits=False,
        leaks={"text": "answers attend to padded words, whose mask transformers 5.23 drops"},
        notes={"text": "the question's words; no logits"},
    ),
    Family(
        "BLIP",
        lambda: hf.BlipForImageTextRetrieval(blip_config()),
        lambda: pictures(**words()),
        loss=lambda outputs, batch: outputs.itm_score[:, 0],
        notes={"text": "with a loss of one's own"},
    ),
    Family("BLIP-2", blip2, lambda: with_tokens(3, torch.rand(3, 3, 8, 8)), idle=last_word),
    Family("LLaVA", llava, lambda: with_tokens(4, torch.rand(3, 3, 8, 8)), idle=last_word),
    Family("LLaVA-NeXT", llava_next, tiled_pictures, idle=last_word, notes={"image": "rows are tiles of images"}),
    Family(
        "PaliGemma",
        lambda: hf.PaliGemmaForConditionalGeneration(
            hf.PaliGemmaConfig(
                text_config=WORDS | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8},
                vision_config=PATCHES | {"model_type": "siglip_vision_model"},
                projection_dim=16,
                image_token_id=IMAGE,
            )
        ),
        paligemma,
        idle=last_word,
    ),
    Family(
        "Idefics3",
        lambda: hf.Idefics3ForConditionalGeneration(
            hf.Idefics3Config(
                text_config=WORDS | {"model_type": "llama"}, vision_config=PATCHES, scale_factor=2, image_token_id=IMAGE
            )
        ),
        several_pictures,
        idle=last_word,
        leaks={"image": "padded patches go into the image's tokens"},
    ),
    Family("Qwen2-VL", qwen2_vl, packed, idle=last_word),
    Family("Qwen2.5-VL", qwen2_5_vl, packed, idle=last_word),
]
