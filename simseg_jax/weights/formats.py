"""The weight formats of other code bases: all that is specific to one of them.

Each section has a function that reads the architecture from the JSON files beside the weights, as
far as they tell it, and a `Format` with the signature and the table of names. `table.Format`
explains the notation.
"""

import re
from collections.abc import Mapping
from typing import Any

from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.containers import Settings, Tensors
from simseg_jax.weights.table import Format, part_of, shape_of

INCEPTION = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
# Other names of the same tensors: pattern -> replacement, which gives the name in the tables below.
VARIANTS = {
    # Wrappers of training code.
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.": "",
    # BERTs converted from TensorFlow.
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
    # AugReg and the first ViTs number the modules of a block consecutively, not by kind.
    r"Transformer/posembed_input/pos_embedding$": "pos_embedding",
    r"(/encoderblock\w*)/MultiHeadDotProductAttention_1/": r"\1/MultiHeadDotProductAttention_0/",
    r"(/encoderblock\w*)/LayerNorm_2/": r"\1/LayerNorm_1/",
    r"(/encoderblock\w*)/MlpBlock_3/": r"\1/MlpBlock_0/",
}


# ---- timm's VisionTransformer, including CLIP's


def _timm(tensors: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    config = settings.get("config.json", {})
    config = config if "architecture" in config or "pretrained_cfg" in config else {}
    pretrained = {**config, **part_of(config, "pretrained_cfg")}
    if "fc_norm.weight" in tensors:
        raise UserError(
            "The ViT was trained with average pooling: its last LayerNorm, fc_norm, acts on the "
            "mean of the patches. Segmentation needs a LayerNorm of single patches: take a ViT "
            "with norm.weight, which those with a CLS token have."
        )
    clip = "norm_pre.weight" in tensors
    quick = "quickgelu" in str(config.get("architecture", ""))
    return {
        "heads": heads or part_of(config, "model_args").get("num_heads"),
        "pre_norm": clip,
        "activation": "quick_gelu" if quick else "gelu",
        "norm_eps": 1e-5 if clip else 1e-6,
        **{key: pretrained[key] for key in ("mean", "std") if key in pretrained},
    }


TIMM = Format(
    name="timm ViT",
    part="image",
    signature="patch_embed.proj.weight",
    facts=_timm,
    names={
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed/proj": "patch_embed.proj.",
        "norm_pre": "norm_pre.",
        "blocks/#/norm1": "blocks.#.norm1.",
        "blocks/#/attn/qkv": "blocks.#.attn.qkv.",
        "blocks/#/attn/proj": "blocks.#.attn.proj.",
        "blocks/#/attn/proj *": "blocks.#.ls1.gamma",
        "blocks/#/norm2": "blocks.#.norm2.",
        "blocks/#/mlp/fc1": "blocks.#.mlp.fc1.",
        "blocks/#/mlp/fc2": "blocks.#.mlp.fc2.",
        "blocks/#/mlp/fc2 *": "blocks.#.ls2.gamma",
        "norm": "norm.",
    },
    unused=r"(head|head_drop|pre_logits)\..*|mask_token",
)


# ---- transformers' ViTModel, CLIPVisionModel and BertModel (without its pooler)


def _transformers(
    settings: Settings,
    heads: int | None,
    types: tuple[str, ...],
    activation: str = "gelu",
    norm_eps: float = 1e-12,
    part: str = "",
) -> dict[str, Any]:
    """Heads, activation and epsilon from config.json, which is required.

    types: the accepted values of model_type. activation, norm_eps: defaults for keys that the file
    lacks. part: the object in the file that describes the encoder; by default the whole file.
    """
    config = settings.get("config.json")
    if config is None:
        raise UserError(
            f"A {types[0]} of transformers needs its config.json beside it (weights do not tell "
            "heads and activation): give the folder that holds both."
        )
    kind = config.get("model_type")
    if kind not in types:
        raise UserError(
            f"config.json says model_type={str(kind)[:40]!r}, which is not supported, only "
            f"{' or '.join(types)}: take another encoder."
        )
    config = part_of(config, part) if part else config
    activation = str(config.get("hidden_act", activation))
    if activation not in ACTIVATIONS:
        raise UserError(f"The activation {activation[:40]!r} is not supported.")
    return {
        "heads": heads or config.get("num_attention_heads", 12),
        "activation": ACTIVATIONS[activation],
        "norm_eps": config.get("layer_norm_eps", norm_eps),
    }


def _normalisation(config: Mapping[str, Any], default: dict, prefix: str = "") -> dict[str, Any]:
    return {key: config.get(prefix + key, default[key]) for key in default}


def _hugging_face_vit(_: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    images = settings.get("preprocessor_config.json", {})
    facts = _transformers(settings, heads, ("vit",))
    return {**facts, **_normalisation(images, INCEPTION, "image_")}


HUGGING_FACE_VIT = Format(
    name="Hugging Face ViT",
    part="image",
    signature="embeddings.patch_embeddings.projection.weight",
    facts=_hugging_face_vit,
    names={
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed/proj": "embeddings.patch_embeddings.projection.",
        "blocks/#/norm1": "encoder.layer.#.layernorm_before.",
        "blocks/#/attn/qkv": "encoder.layer.#.attention.attention.(query|key|value).",
        "blocks/#/attn/proj": "encoder.layer.#.attention.output.dense.",
        "blocks/#/norm2": "encoder.layer.#.layernorm_after.",
        "blocks/#/mlp/fc1": "encoder.layer.#.intermediate.dense.",
        "blocks/#/mlp/fc2": "encoder.layer.#.output.dense.",
        "norm": "layernorm.",
    },
    unused=r"(pooler|classifier)\..*",
)


def _hugging_face_clip(_: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    images = settings.get("preprocessor_config.json", {})
    # The file of a model with both towers describes them in separate objects.
    both = settings.get("config.json", {}).get("model_type") == "clip"
    part = "vision_config" if both else ""
    facts = _transformers(settings, heads, ("clip", "clip_vision_model"), "quick_gelu", 1e-5, part)
    return {**facts, "pre_norm": True, **_normalisation(images, CLIP, "image_")}


HUGGING_FACE_CLIP = Format(
    name="Hugging Face CLIP",
    part="image",
    signature="embeddings.patch_embedding.weight",
    facts=_hugging_face_clip,
    names={
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed/proj": "embeddings.patch_embedding.",
        "norm_pre": "pre_layrnorm.",
        "blocks/#/norm1": "encoder.layers.#.layer_norm1.",
        "blocks/#/attn/qkv": "encoder.layers.#.self_attn.(q|k|v)_proj.",
        "blocks/#/attn/proj": "encoder.layers.#.self_attn.out_proj.",
        "blocks/#/norm2": "encoder.layers.#.layer_norm2.",
        "blocks/#/mlp/fc1": "encoder.layers.#.mlp.fc1.",
        "blocks/#/mlp/fc2": "encoder.layers.#.mlp.fc2.",
        "norm": "post_layernorm.",
    },
    unused=r"embeddings\.position_ids",
)


def _bert(_: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    # With heads from the user no file is needed: the rest is the same in all published BERTs.
    settings = {"config.json": {"model_type": "bert"}} if heads else settings
    facts = _transformers(settings, heads, ("bert",))
    config = settings["config.json"]
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        raise UserError("The BERT has relative positions or is a decoder: take another encoder.")
    return facts


BERT = Format(
    name="Hugging Face BERT",
    part="text",
    signature="embeddings.word_embeddings.weight",
    facts=_bert,
    names={
        "embeddings/word_embeddings": "embeddings.word_embeddings.",
        "embeddings/position_embeddings": "embeddings.position_embeddings.",
        "embeddings/token_type_embeddings": "embeddings.token_type_embeddings.",
        "embeddings/LayerNorm": "embeddings.LayerNorm.",
        "layers/#/query": "encoder.layer.#.attention.self.query.",
        "layers/#/key": "encoder.layer.#.attention.self.key.",
        "layers/#/value": "encoder.layer.#.attention.self.value.",
        "layers/#/attention_output": "encoder.layer.#.attention.output.dense.",
        "layers/#/attention_norm": "encoder.layer.#.attention.output.LayerNorm.",
        "layers/#/intermediate": "encoder.layer.#.intermediate.dense.",
        "layers/#/output": "encoder.layer.#.output.dense.",
        "layers/#/output_norm": "encoder.layer.#.output.LayerNorm.",
    },
    unused=r"pooler\..*|embeddings\.(position|token_type)_ids",
)


# ---- the image towers of OpenAI's CLIP and of open_clip


def _open_clip(tensors: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    config = settings.get("open_clip_config.json")
    if config is None:
        raise UserError(
            "The CLIP tower needs its open_clip_config.json beside it (the weights do not tell the "
            "activation; OpenAI's CLIP has another than most models of open_clip): give the folder "
            'that holds both. For OpenAI\'s write {"model_cfg": {"quick_gelu": true}} into it.'
        )
    model, images = part_of(config, "model_cfg"), part_of(config, "preprocess_cfg")
    width = shape_of(tensors, "conv1.weight", 4)[0]
    return {
        "heads": heads or max(width // part_of(model, "vision_cfg").get("head_width", 64), 1),
        "pre_norm": True,
        "activation": "quick_gelu" if model.get("quick_gelu", False) else "gelu",
        "norm_eps": 1e-5,
        **_normalisation(images, CLIP),
    }


OPEN_CLIP = Format(
    name="open_clip",
    part="image",
    signature="ln_pre.weight",
    facts=_open_clip,
    names={
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed/proj": "conv1.",
        "norm_pre": "ln_pre.",
        "blocks/#/norm1": "transformer.resblocks.#.ln_1.",
        "blocks/#/attn/qkv": "transformer.resblocks.#.attn.in_proj_",
        "blocks/#/attn/proj": "transformer.resblocks.#.attn.out_proj.",
        "blocks/#/norm2": "transformer.resblocks.#.ln_2.",
        "blocks/#/mlp/fc1": "transformer.resblocks.#.mlp.c_fc.",
        "blocks/#/mlp/fc2": "transformer.resblocks.#.mlp.c_proj.",
        "norm": "ln_post.",
    },
    unused=r"proj",
)


# ---- big_vision's .npz; with VARIANTS also those of AugReg and the first ViTs

ATTENTION = "Transformer/encoderblock_#/MultiHeadDotProductAttention_0/"


def _big_vision(tensors: Tensors, _: Settings, heads: int | None) -> dict[str, Any]:
    query = ATTENTION.replace("#", "0") + "query/kernel"  # [width, heads, width / heads]
    return {"heads": heads or shape_of(tensors, query, 3)[1], **INCEPTION}


BIG_VISION = Format(
    name="big_vision ViT",
    part="image",
    signature="embedding/kernel",
    facts=_big_vision,
    names={
        "cls_token": "cls",
        "pos_embed": "pos_embedding",
        "patch_embed/proj": "embedding/",
        "blocks/#/norm1": "Transformer/encoderblock_#/LayerNorm_0/",
        "blocks/#/attn/qkv": f"{ATTENTION}(query|key|value)/",
        "blocks/#/attn/proj": f"{ATTENTION}out/",
        "blocks/#/norm2": "Transformer/encoderblock_#/LayerNorm_1/",
        "blocks/#/mlp/fc1": "Transformer/encoderblock_#/MlpBlock_0/Dense_0/",
        "blocks/#/mlp/fc2": "Transformer/encoderblock_#/MlpBlock_0/Dense_1/",
        "norm": "Transformer/encoder_norm/",
    },
    unused=r"(head|pre_logits)/.*",
    free_bias=False,
)

# ---- the authors' .pth of whole models: timm's ViT, transformers' BERT, projections, temperature

IMAGE, TEXT = "image_encoder.model.model.", "text_encoder.model.model."


AUTHORS = Format(
    name="authors' checkpoint",
    part="model",
    signature="image_projection.linear.weight",
    facts=lambda *_: {},  # There are no JSON files.
    names={
        **{f"image_encoder/{here}": IMAGE + there for here, there in TIMM.names.items()},
        **{f"text_encoder/{here}": TEXT + there for here, there in BERT.names.items()},
        "image_projection": "image_projection.linear.",
        "text_projection": "text_projection.linear.",
        "temperature": "loss.temperature",
    },
    unused=rf"{re.escape(IMAGE)}({TIMM.unused})|{re.escape(TEXT)}({BERT.unused})",
    free_bias=False,
)

FORMATS = (AUTHORS, TIMM, HUGGING_FACE_VIT, HUGGING_FACE_CLIP, OPEN_CLIP, BIG_VISION, BERT)
