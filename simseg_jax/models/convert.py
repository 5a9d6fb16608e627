"""The authors' parameter names and layouts -> this package's parameters."""

import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from simseg_jax.errors import UserError
from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import SimSegConfig, init_params
from simseg_jax.models.torch_file import load_tensors
from simseg_jax.models.vit import ViTConfig


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _patch_kernel(x: np.ndarray) -> np.ndarray:
    # [width, 3, p, p] of a convolution -> [p * p * 3, width] of the patch product.
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])


IMAGE = r"image_encoder\.model\.model"
TEXT = r"text_encoder\.model\.model"
LAYER = rf"{TEXT}\.encoder\.layer\.(\d+)"
# (authors' name, our path, layout). The first full match counts; `None` drops the entry.
RULES = [
    (rf"{IMAGE}\.(cls_token|pos_embed)", r"image_encoder/\1", _same),
    (
        rf"{IMAGE}\.patch_embed\.proj\.weight",
        "image_encoder/patch_embed/proj/kernel",
        _patch_kernel,
    ),
    (rf"{IMAGE}\.patch_embed\.proj\.bias", "image_encoder/patch_embed/proj/bias", _same),
    (rf"{IMAGE}\.blocks\.(\d+)\.(norm[12])\.weight", r"image_encoder/blocks/\1/\2/scale", _same),
    (rf"{IMAGE}\.blocks\.(\d+)\.(norm[12])\.bias", r"image_encoder/blocks/\1/\2/bias", _same),
    (
        rf"{IMAGE}\.blocks\.(\d+)\.(attn|mlp)\.(\w+)\.weight",
        r"image_encoder/blocks/\1/\2/\3/kernel",
        _transpose,
    ),
    (
        rf"{IMAGE}\.blocks\.(\d+)\.(attn|mlp)\.(\w+)\.bias",
        r"image_encoder/blocks/\1/\2/\3/bias",
        _same,
    ),
    (rf"{IMAGE}\.norm\.weight", "image_encoder/norm/scale", _same),
    (rf"{IMAGE}\.norm\.bias", "image_encoder/norm/bias", _same),
    (
        rf"{TEXT}\.embeddings\.(\w+_embeddings)\.weight",
        r"text_encoder/embeddings/\1/embedding",
        _same,
    ),
    (
        rf"{TEXT}\.embeddings\.LayerNorm\.weight",
        "text_encoder/embeddings/LayerNorm/scale",
        _same,
    ),
    (rf"{TEXT}\.embeddings\.LayerNorm\.bias", "text_encoder/embeddings/LayerNorm/bias", _same),
    (
        rf"{LAYER}\.attention\.self\.(query|key|value)\.weight",
        r"text_encoder/layers/\1/\2/kernel",
        _transpose,
    ),
    (
        rf"{LAYER}\.attention\.self\.(query|key|value)\.bias",
        r"text_encoder/layers/\1/\2/bias",
        _same,
    ),
    (
        rf"{LAYER}\.attention\.output\.dense\.weight",
        r"text_encoder/layers/\1/attention_output/kernel",
        _transpose,
    ),
    (
        rf"{LAYER}\.attention\.output\.dense\.bias",
        r"text_encoder/layers/\1/attention_output/bias",
        _same,
    ),
    (
        rf"{LAYER}\.attention\.output\.LayerNorm\.weight",
        r"text_encoder/layers/\1/attention_norm/scale",
        _same,
    ),
    (
        rf"{LAYER}\.attention\.output\.LayerNorm\.bias",
        r"text_encoder/layers/\1/attention_norm/bias",
        _same,
    ),
    (
        rf"{LAYER}\.(intermediate|output)\.dense\.weight",
        r"text_encoder/layers/\1/\2/kernel",
        _transpose,
    ),
    (rf"{LAYER}\.(intermediate|output)\.dense\.bias", r"text_encoder/layers/\1/\2/bias", _same),
    (rf"{LAYER}\.output\.LayerNorm\.weight", r"text_encoder/layers/\1/output_norm/scale", _same),
    (rf"{LAYER}\.output\.LayerNorm\.bias", r"text_encoder/layers/\1/output_norm/bias", _same),
    (r"(image|text)_projection\.linear\.weight", r"\1_projection/kernel", _transpose),
    (r"loss\.temperature", "temperature", _same),
    # Unused by the method: BERT's pooler, the position-id buffer, ImageNet heads.
    (rf"{TEXT}\.pooler\..*|{TEXT}\.embeddings\.position_ids|{IMAGE}\.head\..*", None, _same),
]


def convert(tensors: Mapping[str, np.ndarray], config: SimSegConfig) -> dict:
    """A state dict with the authors' names -> the nested parameters of `config`, in float32.

    `module.` prefixes are ignored. All unknown, missing and mis-shaped names are reported together.
    """
    expected = {
        path_string(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        )
    }
    found, problems = {}, []
    for name, tensor in tensors.items():
        path, layout = _match(name.removeprefix("module."))
        if path is None:
            continue
        if path not in expected:
            problems.append(f"unexpected {name}")
            continue
        value = layout(np.asarray(tensor, np.float32))
        if value.shape != expected[path]:
            problems.append(f"{name} has shape {value.shape}, not {expected[path]}")
        found[path] = value
    problems += [f"missing {path}" for path in expected if path not in found]
    if problems:
        raise UserError(
            f"The checkpoint does not fit the model ({len(problems)} problems): "
            + "; ".join(problems)
        )
    return _nest(found)


def infer_config(
    tensors: Mapping[str, np.ndarray], image_heads: int | None = None, text_heads: int | None = None
) -> SimSegConfig:
    """Architecture from the shapes of a state dict.

    The number of heads leaves no trace there: by default heads are 64 channels wide, as in every
    published ViT and BERT.
    """
    shapes = {name.removeprefix("module."): tensor.shape for name, tensor in tensors.items()}
    image, text = "image_encoder.model.model.", "text_encoder.model.model."
    try:
        image_width, _, patch, _ = shapes[image + "patch_embed.proj.weight"]
        grid = round((shapes[image + "pos_embed"][1] - 1) ** 0.5)
        vocab_size, text_width = shapes[text + "embeddings.word_embeddings.weight"]
        return SimSegConfig(
            image=ViTConfig(
                image_size=grid * patch,
                patch_size=patch,
                width=image_width,
                depth=_count(shapes, rf"{IMAGE}\.blocks\.(\d+)\.norm1\.weight"),
                heads=image_heads or image_width // 64,
                mlp_width=shapes[image + "blocks.0.mlp.fc1.weight"][0],
            ),
            text=BertConfig(
                vocab_size=vocab_size,
                max_positions=shapes[text + "embeddings.position_embeddings.weight"][0],
                width=text_width,
                depth=_count(shapes, rf"{LAYER}\.output\.dense\.weight"),
                heads=text_heads or text_width // 64,
                mlp_width=shapes[text + "encoder.layer.0.intermediate.dense.weight"][0],
            ),
            embed_dim=shapes["image_projection.linear.weight"][0],
        )
    except KeyError as error:
        raise UserError(f"Not a SimSeg checkpoint: it has no entry {error}.") from error


def load_authors_checkpoint(
    path: str | Path, image_heads: int | None = None, text_heads: int | None = None
) -> tuple[SimSegConfig, dict]:
    """(architecture, parameters) of a checkpoint file of the authors; heads as `infer_config`."""
    content = load_tensors(path)
    tensors = content.get("state_dict", content)
    config = infer_config(tensors, image_heads, text_heads)
    return config, convert(tensors, config)


def path_string(path) -> str:
    """A JAX key path as "image_encoder/blocks/0/attn/qkv/kernel"."""
    return "/".join(str(entry.key) for entry in path)


def _match(name: str):
    for pattern, path, layout in RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return (match.expand(path) if path else None), layout
    return name, _same


def _count(shapes: Mapping, pattern: str) -> int:
    return sum(bool(re.fullmatch(pattern, name)) for name in shapes)


def _nest(flat: Mapping[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
