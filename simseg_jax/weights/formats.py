"""The formats of encoders: how to recognise them and read the architecture from their files.

The names of the tensors tell the format. What their shapes do not say (heads, activation,
normalisation of the images) comes from the JSON files beside the weights.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from simseg_jax.models.layers import BLOCKS
from simseg_jax.runtime.errors import UserError
from simseg_jax.weights import layouts
from simseg_jax.weights.choice import Tensors
from simseg_jax.weights.layouts import Entry

Settings = Mapping[str, dict]

# Published ViTs whose heads are not 64 channels wide: width -> heads.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
INCEPTION = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


class Format(NamedTuple):
    """How one code base stores an encoder."""

    name: str
    side: str
    signature: str  # A tensor that every such file has; what precedes it there is a prefix.
    describe: Callable[[Tensors, Settings, int | None], dict[str, Any]]
    table: Callable[..., list[Entry]]
    unused: str  # Pattern of tensors that the method does not need: heads, poolers, buffers.


def _shape(tensors: Tensors, name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors or tensors[name].ndim != dims or not tensors[name].size:
        found = f"of shape {tensors[name].shape}" if name in tensors else "missing"
        raise UserError(f"The weights cannot be used: {name} is {found}.")
    return tensors[name].shape


def _count(tensors: Tensors, pattern: str) -> int:
    """The number of blocks: one more than the largest that a pattern with one group finds."""
    numbers = [m[1] for m in (re.match(pattern, name) for name in tensors) if m]
    largest = max(numbers, key=lambda number: (len(number), number), default="-1")
    # Checked before anything is built for them.
    if len(largest) > 3 or int(largest) >= BLOCKS:
        raise UserError(f"The weights number a block {largest[:20]}: at most {BLOCKS} are read.")
    return int(largest) + 1


def _part(card: Mapping[str, Any], key: str) -> dict:
    """An object inside the object of a JSON file; empty without it."""
    part = card.get(key) or {}
    if not isinstance(part, dict):
        raise UserError(f"The JSON beside the weights has {key} that is no object.")
    return part


def _vit(
    positions: np.ndarray | None, patch: int, width: int, heads: int | None, **settings
) -> dict[str, Any]:
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    rows = 0 if positions is None or not positions.ndim else positions.size // (width or 1)
    grid = round(max(rows - 1, 0) ** 0.5)
    if not rows or 1 + grid**2 != rows:
        raise UserError(
            f"The ViT cannot be used: its position embedding has {rows} rows, not one for a CLS "
            "token and one for each patch of a square image (as SigLIP and other ViTs without CLS "
            "token, with register tokens or with relative positions)."
        )
    heads = heads or HEADS.get(width, max(width // 64, 1))
    sizes = {"image_size": grid * patch, "patch_size": patch, "width": width, "heads": heads}
    return {**sizes, **settings}


def _timm(tensors: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    width, _, patch, _ = _shape(tensors, "patch_embed.proj.weight", 4)
    card = settings.get("config.json", {})
    card = card if "architecture" in card or "pretrained_cfg" in card else {}
    pretrained = {**card, **_part(card, "pretrained_cfg")}
    known: dict[str, Any] = {k: pretrained[k] for k in ("mean", "std") if k in pretrained}
    if "fc_norm.weight" in tensors:
        raise UserError(
            "The ViT was trained with average pooling: its last LayerNorm, fc_norm, acts on the "
            "mean of the patches and there is none for single patches, which segmentation reads. "
            "Take one with a CLS token, which has norm.weight."
        )
    clip = "norm_pre.weight" in tensors
    quick = "quickgelu" in str(card.get("architecture", ""))
    return _vit(
        tensors.get("pos_embed"),
        patch,
        width,
        heads or _part(card, "model_args").get("num_heads"),
        depth=_count(tensors, r"blocks\.(\d+)\."),
        mlp_width=_shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0],
        pre_norm=clip,
        activation="quick_gelu" if quick else "gelu",
        norm_eps=1e-5 if clip else 1e-6,
        **known,
    )


def _transformers(
    settings: Settings, types: Sequence[str], weights: str, part: str = ""
) -> dict[str, Any]:
    """config.json of transformers, without which heads and activation are unknown."""
    card = settings.get("config.json")
    if card is None:
        raise UserError(
            f"The {weights} needs its config.json beside it (heads and activation leave no trace "
            "in the weights): give the folder that holds both."
        )
    kind = card.get("model_type")
    card = {"model_type": kind, **_part(card, part)} if part else card
    if kind not in types:
        raise UserError(
            f"config.json says model_type={str(kind)[:40]!r}, which cannot be represented, only "
            f"{' or '.join(types)}: take another encoder."
        )
    if str(card.get("hidden_act", "gelu")) not in ACTIVATIONS:
        raise UserError(f"The activation {str(card['hidden_act'])[:40]!r} is not known here.")
    return card


def _processor(settings: Settings, default: dict) -> dict[str, Any]:
    card = settings.get("preprocessor_config.json", {})
    names = {"mean": "image_mean", "std": "image_std"}
    return {key: card.get(name, default[key]) for key, name in names.items()}


def _hugging_face_vit(tensors: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    card = _transformers(settings, ("vit",), "Hugging Face ViT")
    weight = "embeddings.patch_embeddings.projection.weight"
    width, _, patch, _ = _shape(tensors, weight, 4)
    return _vit(
        tensors.get("embeddings.position_embeddings"),
        patch,
        width,
        heads or card.get("num_attention_heads", 12),
        depth=_count(tensors, r"encoder\.layer\.(\d+)\."),
        mlp_width=_shape(tensors, "encoder.layer.0.intermediate.dense.weight", 2)[0],
        activation=ACTIVATIONS[card.get("hidden_act", "gelu")],
        norm_eps=card.get("layer_norm_eps", 1e-12),
        **_processor(settings, INCEPTION),
    )


def _hugging_face_clip(tensors: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    whole = settings.get("config.json", {}).get("model_type") == "clip"
    types = ("clip", "clip_vision_model")
    card = _transformers(settings, types, "CLIP", "vision_config" if whole else "")
    width, _, patch, _ = _shape(tensors, "embeddings.patch_embedding.weight", 4)
    return _vit(
        tensors.get("embeddings.position_embedding.weight"),
        patch,
        width,
        heads or card.get("num_attention_heads", 12),
        depth=_count(tensors, r"encoder\.layers\.(\d+)\."),
        mlp_width=_shape(tensors, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        pre_norm=True,
        activation=ACTIVATIONS[card.get("hidden_act", "quick_gelu")],
        norm_eps=card.get("layer_norm_eps", 1e-5),
        **_processor(settings, CLIP),
    )


def _open_clip(tensors: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    card = settings.get("open_clip_config.json")
    if card is None:
        raise UserError(
            "The CLIP tower needs its open_clip_config.json beside it (OpenAI's CLIP has another "
            "activation than most of open_clip's, which leaves no trace in the weights): give the "
            'folder that holds both, or write {"model_cfg": {"quick_gelu": true}} there.'
        )
    model, images = _part(card, "model_cfg"), _part(card, "preprocess_cfg")
    width, _, patch, _ = _shape(tensors, "conv1.weight", 4)
    per_head = _part(model, "vision_cfg").get("head_width", 64)
    return _vit(
        tensors.get("positional_embedding"),
        patch,
        width,
        heads or width // per_head,
        depth=_count(tensors, r"transformer\.resblocks\.(\d+)\."),
        mlp_width=_shape(tensors, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        pre_norm=True,
        activation="quick_gelu" if model.get("quick_gelu", False) else "gelu",
        norm_eps=1e-5,
        **{key: images.get(key, CLIP[key]) for key in CLIP},
    )


def _big_vision(tensors: Tensors, _settings: Settings, heads: int | None) -> dict[str, Any]:
    patch, _, _, width = _shape(tensors, "embedding/kernel", 4)
    queries = [n for n in tensors if re.search(r"encoderblock_0/.*/query/kernel$", n)]
    hidden = [n for n in tensors if re.search(r"encoderblock_0/.*/Dense_0/kernel$", n)]
    inside = "Transformer/posembed_input/pos_embedding"
    return _vit(
        tensors.get(inside, tensors.get("pos_embedding")),
        patch,
        width,
        heads or _shape(tensors, queries[0] if queries else "query/kernel", 3)[1],
        depth=_count(tensors, r"Transformer/encoderblock_(\d+)/"),
        mlp_width=_shape(tensors, hidden[0] if hidden else "Dense_0/kernel", 2)[1],
        **INCEPTION,
    )


def _bert(tensors: Tensors, settings: Settings, heads: int | None) -> dict[str, Any]:
    card = {} if heads else _transformers(settings, ("bert",), "BERT encoder")
    if card.get("position_embedding_type", "absolute") != "absolute" or card.get("is_decoder"):
        raise UserError("The BERT encoder has relative positions or is a decoder: take another.")
    vocab_size, width = _shape(tensors, "embeddings.word_embeddings.weight", 2)
    return {
        "vocab_size": vocab_size,
        "max_positions": _shape(tensors, "embeddings.position_embeddings.weight", 2)[0],
        "width": width,
        "depth": _count(tensors, r"encoder\.layer\.(\d+)\."),
        "heads": heads or card.get("num_attention_heads", 12),
        "mlp_width": _shape(tensors, "encoder.layer.0.intermediate.dense.weight", 2)[0],
        "activation": ACTIVATIONS[card.get("hidden_act", "gelu")],
        "norm_eps": card.get("layer_norm_eps", 1e-12),
    }


TIMM = Format(
    "timm ViT",
    "image",
    "patch_embed.proj.weight",
    _timm,
    layouts.timm_vit,
    r"(head|head_drop|pre_logits)\..*|mask_token",
)
BERT = Format(
    "Hugging Face BERT",
    "text",
    "embeddings.word_embeddings.weight",
    _bert,
    layouts.hugging_face_bert,
    r"pooler\..*|embeddings\.(position|token_type)_ids",
)
FORMATS = (
    TIMM,
    Format(
        "Hugging Face ViT",
        "image",
        "embeddings.patch_embeddings.projection.weight",
        _hugging_face_vit,
        layouts.hugging_face_vit,
        r"(pooler|classifier)\..*",
    ),
    Format(
        "Hugging Face CLIP",
        "image",
        "embeddings.patch_embedding.weight",
        _hugging_face_clip,
        layouts.hugging_face_clip,
        r"embeddings\.position_ids",
    ),
    Format("open_clip", "image", "ln_pre.weight", _open_clip, layouts.open_clip, r"proj"),
    Format(
        "big_vision ViT",
        "image",
        "embedding/kernel",
        _big_vision,
        layouts.big_vision,
        r"(head|pre_logits)/.*",
    ),
    BERT,
)
