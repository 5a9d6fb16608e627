"""Where other code bases keep the parameters of the two encoders, and how they lay them out.

A table lists, for every parameter here, the names of the tensors it is made of there. The authors'
checkpoints hold a timm ViT and a Hugging Face BERT, so those two tables also work backwards.
"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import numpy as np

from simseg_jax.models.bert import BertConfig
from simseg_jax.models.vit import ViTConfig

# What a file has, see `kinds`, which decides what its model has; None: all biases, no LayerScale.
Names = Collection[str] | None


class Layout(NamedTuple):
    """How tensors become a parameter, and back where that is possible."""

    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], np.ndarray] | None = None


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _patches_of_convolution(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


def _convolution_of_patches(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[0] / 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout(_same, _same)
# [out, in] of PyTorch <-> [in, out].
LINEAR = Layout(_transpose, _transpose)
# A convolution [width, 3, p, p] <-> the product [p * p * 3, width].
CONVOLUTION = Layout(_patches_of_convolution, _convolution_of_patches)
# Query, key and value side by side, from [out, in] or [out] each.
FUSED_LINEAR = Layout(lambda *parts: np.concatenate([part.T for part in parts], axis=1))
FUSED = Layout(lambda *parts: np.concatenate(parts))
# A scale per output channel (LayerScale) is part of the linear layer before it.
SCALED_LINEAR = Layout(lambda weight, scale: weight.T * scale)
SCALED = Layout(lambda bias, scale: bias * scale)
# Flax's attention has an axis for heads.
FUSED_HEADS = Layout(lambda *parts: np.concatenate([p.reshape(len(p), -1) for p in parts], axis=1))
FUSED_HEADS_BIAS = Layout(lambda *parts: np.concatenate([part.reshape(-1) for part in parts]))
JOINED_HEADS = Layout(lambda x: x.reshape(-1, x.shape[-1]))
FLAX_CONVOLUTION = Layout(lambda x: x.reshape(-1, x.shape[-1]))
# Without the axes of size one.
TOKEN = Layout(lambda x: x.reshape(1, 1, -1))
POSITIONS = Layout(lambda x: x.reshape(1, -1, x.shape[-1]))


class Entry(NamedTuple):
    """One parameter: its path here, its tensors there; without any it is zero."""

    path: str
    names: tuple[str, ...]
    layout: Layout = SAME


def timm_vit(config: ViTConfig, names: Names = None) -> list[Entry]:
    """timm's `VisionTransformer`, with or without biases, LayerScale and the norm of CLIP."""
    table = [
        Entry("cls_token", ("cls_token",)),
        Entry("pos_embed", ("pos_embed",)),
        *_linear("patch_embed/proj", "patch_embed.proj", names, CONVOLUTION),
        *_norm("norm", "norm"),
    ]
    if config.pre_norm:
        table += _norm("norm_pre", "norm_pre")
    for i in range(config.depth):
        block, theirs = f"blocks/{i}", f"blocks.{i}"
        table += [
            *_norm(f"{block}/norm1", f"{theirs}.norm1"),
            *_linear(f"{block}/attn/qkv", f"{theirs}.attn.qkv", names),
            *_scaled(f"{block}/attn/proj", f"{theirs}.attn.proj", f"{theirs}.ls1.gamma", names),
            *_norm(f"{block}/norm2", f"{theirs}.norm2"),
            *_linear(f"{block}/mlp/fc1", f"{theirs}.mlp.fc1", names),
            *_scaled(f"{block}/mlp/fc2", f"{theirs}.mlp.fc2", f"{theirs}.ls2.gamma", names),
        ]
    return table


def hugging_face_vit(config: ViTConfig, names: Names = None) -> list[Entry]:
    """transformers' `ViTModel`."""
    table = [
        Entry("cls_token", ("embeddings.cls_token",)),
        Entry("pos_embed", ("embeddings.position_embeddings",)),
        *_linear("patch_embed/proj", "embeddings.patch_embeddings.projection", names, CONVOLUTION),
        *_norm("norm", "layernorm"),
    ]
    for i in range(config.depth):
        block, theirs = f"blocks/{i}", f"encoder.layer.{i}"
        parts = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
        table += [
            *_norm(f"{block}/norm1", f"{theirs}.layernorm_before"),
            *_fused(f"{block}/attn/qkv", parts, names),
            *_linear(f"{block}/attn/proj", f"{theirs}.attention.output.dense", names),
            *_norm(f"{block}/norm2", f"{theirs}.layernorm_after"),
            *_linear(f"{block}/mlp/fc1", f"{theirs}.intermediate.dense", names),
            *_linear(f"{block}/mlp/fc2", f"{theirs}.output.dense", names),
        ]
    return table


def hugging_face_clip(config: ViTConfig, names: Names = None) -> list[Entry]:
    """transformers' `CLIPVisionModel`."""
    table = [
        Entry("cls_token", ("embeddings.class_embedding",), TOKEN),
        Entry("pos_embed", ("embeddings.position_embedding.weight",), POSITIONS),
        *_linear("patch_embed/proj", "embeddings.patch_embedding", names, CONVOLUTION),
        *_norm("norm_pre", "pre_layrnorm"),
        *_norm("norm", "post_layernorm"),
    ]
    for i in range(config.depth):
        block, theirs = f"blocks/{i}", f"encoder.layers.{i}"
        parts = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
        table += [
            *_norm(f"{block}/norm1", f"{theirs}.layer_norm1"),
            *_fused(f"{block}/attn/qkv", parts, names),
            *_linear(f"{block}/attn/proj", f"{theirs}.self_attn.out_proj", names),
            *_norm(f"{block}/norm2", f"{theirs}.layer_norm2"),
            *_linear(f"{block}/mlp/fc1", f"{theirs}.mlp.fc1", names),
            *_linear(f"{block}/mlp/fc2", f"{theirs}.mlp.fc2", names),
        ]
    return table


def open_clip(config: ViTConfig, names: Names = None) -> list[Entry]:
    """The `visual` tower of OpenAI's CLIP and of open_clip."""
    table = [
        Entry("cls_token", ("class_embedding",), TOKEN),
        Entry("pos_embed", ("positional_embedding",), POSITIONS),
        *_linear("patch_embed/proj", "conv1", names, CONVOLUTION),
        *_norm("norm_pre", "ln_pre"),
        *_norm("norm", "ln_post"),
    ]
    for i in range(config.depth):
        block, theirs = f"blocks/{i}", f"transformer.resblocks.{i}"
        table += [
            *_norm(f"{block}/norm1", f"{theirs}.ln_1"),
            Entry(f"{block}/attn/qkv/kernel", (f"{theirs}.attn.in_proj_weight",), LINEAR),
            Entry(f"{block}/attn/qkv/bias", (f"{theirs}.attn.in_proj_bias",)),
            *_linear(f"{block}/attn/proj", f"{theirs}.attn.out_proj", names),
            *_norm(f"{block}/norm2", f"{theirs}.ln_2"),
            *_linear(f"{block}/mlp/fc1", f"{theirs}.mlp.c_fc", names),
            *_linear(f"{block}/mlp/fc2", f"{theirs}.mlp.c_proj", names),
        ]
    return table


def big_vision(config: ViTConfig, names: Names = None) -> list[Entry]:
    """The `.npz` files of big_vision and, numbered differently, of AugReg and the first ViT."""
    names = names or ()
    old = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel" in names
    attention, norm2, mlp = (1, 2, 3) if old else (0, 1, 0)
    inside = "Transformer/posembed_input/pos_embedding"
    table = [
        Entry("cls_token", ("cls",), TOKEN),
        Entry("pos_embed", (inside if inside in names else "pos_embedding",), POSITIONS),
        Entry("patch_embed/proj/kernel", ("embedding/kernel",), FLAX_CONVOLUTION),
        Entry("patch_embed/proj/bias", ("embedding/bias",)),
        *_flax("norm", "Transformer/encoder_norm", "scale"),
    ]
    for i in range(config.depth):
        block, theirs = f"blocks/{i}", f"Transformer/encoderblock_{i}"
        heads = f"{theirs}/MultiHeadDotProductAttention_{attention}"
        parts = [f"{heads}/{part}" for part in ("query", "key", "value")]
        table += [
            *_flax(f"{block}/norm1", f"{theirs}/LayerNorm_0", "scale"),
            Entry(f"{block}/attn/qkv/kernel", tuple(f"{p}/kernel" for p in parts), FUSED_HEADS),
            Entry(f"{block}/attn/qkv/bias", tuple(f"{p}/bias" for p in parts), FUSED_HEADS_BIAS),
            Entry(f"{block}/attn/proj/kernel", (f"{heads}/out/kernel",), JOINED_HEADS),
            Entry(f"{block}/attn/proj/bias", (f"{heads}/out/bias",)),
            *_flax(f"{block}/norm2", f"{theirs}/LayerNorm_{norm2}", "scale"),
            *_flax(f"{block}/mlp/fc1", f"{theirs}/MlpBlock_{mlp}/Dense_0", "kernel"),
            *_flax(f"{block}/mlp/fc2", f"{theirs}/MlpBlock_{mlp}/Dense_1", "kernel"),
        ]
    return table


def hugging_face_bert(config: BertConfig, names: Names = None) -> list[Entry]:
    """transformers' `BertModel` without its pooler."""
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    table = [
        *(Entry(f"embeddings/{t}/embedding", (f"embeddings.{t}.weight",)) for t in tables),
        *_norm("embeddings/LayerNorm", "embeddings.LayerNorm"),
    ]
    for i in range(config.depth):
        layer, theirs = f"layers/{i}", f"encoder.layer.{i}"
        table += [
            *_linear(f"{layer}/query", f"{theirs}.attention.self.query", names),
            *_linear(f"{layer}/key", f"{theirs}.attention.self.key", names),
            *_linear(f"{layer}/value", f"{theirs}.attention.self.value", names),
            *_linear(f"{layer}/attention_output", f"{theirs}.attention.output.dense", names),
            *_norm(f"{layer}/attention_norm", f"{theirs}.attention.output.LayerNorm"),
            *_linear(f"{layer}/intermediate", f"{theirs}.intermediate.dense", names),
            *_linear(f"{layer}/output", f"{theirs}.output.dense", names),
            *_norm(f"{layer}/output_norm", f"{theirs}.output.LayerNorm"),
        ]
    return table


def _norm(path: str, name: str) -> list[Entry]:
    return [Entry(f"{path}/scale", (f"{name}.weight",)), Entry(f"{path}/bias", (f"{name}.bias",))]


def _flax(path: str, name: str, weight: str) -> list[Entry]:
    return [
        Entry(f"{path}/{weight}", (f"{name}/{weight}",)),
        Entry(f"{path}/bias", (f"{name}/bias",)),
    ]


def _linear(path: str, name: str, names: Names, layout: Layout = LINEAR) -> list[Entry]:
    bias = (f"{name}.bias",) if _has(f"{name}.bias", names) else ()
    return [Entry(f"{path}/kernel", (f"{name}.weight",), layout), Entry(f"{path}/bias", bias)]


def _fused(path: str, parts: list[str], names: Names) -> list[Entry]:
    weights, biases = (tuple(f"{part}.{x}" for part in parts) for x in ("weight", "bias"))
    biases = biases if _has(biases[0], names) else ()
    return [
        Entry(f"{path}/kernel", weights, FUSED_LINEAR),
        Entry(f"{path}/bias", biases, FUSED),
    ]


def _scaled(path: str, name: str, scale: str, names: Names) -> list[Entry]:
    if names is None or not _has(scale, names):
        return _linear(path, name, names)
    return [
        Entry(f"{path}/kernel", (f"{name}.weight", scale), SCALED_LINEAR),
        Entry(f"{path}/bias", (f"{name}.bias", scale), SCALED),
    ]


def _has(name: str, names: Names) -> bool:
    """Whether a model has this kind of tensor: in any block, so that a lost one is noticed."""
    return names is None or _kind(name) in names


def kinds(names: Iterable[str]) -> frozenset[str]:
    """The names of tensors, and once more with "#" for the numbers of their blocks."""
    names = list(names)
    return frozenset(names) | frozenset(map(_kind, names))


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)
