"""Whole models under the authors' names: a timm ViT, a Hugging Face BERT and what joins them."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import numpy as np

from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import SimSegConfig, init_params, path_string
from simseg_jax.models.vit import ViTConfig
from simseg_jax.runtime.errors import UserError, reading
from simseg_jax.weights.choice import Tensors, choose, prefixes, take, usual_names
from simseg_jax.weights.formats import BERT, TIMM
from simseg_jax.weights.layouts import LINEAR, Entry, hugging_face_bert, timm_vit
from simseg_jax.weights.sources import ARCHITECTURE, META, Weights
from simseg_jax.weights.towers import assemble, check_settings, leaves_of

SIGNATURE = "image_projection.linear.weight"
IMAGE, TEXT = "image_encoder.model.model.", "text_encoder.model.model."
UNUSED = rf"{IMAGE}({TIMM.unused})|{TEXT}({BERT.unused})".replace("model.model.", r"model\.model\.")


def table(config: SimSegConfig) -> list[Entry]:
    """Where the authors' checkpoints hold every parameter."""
    return [
        *_below("image_encoder/", IMAGE, timm_vit(config.image)),
        *_below("text_encoder/", TEXT, hugging_face_bert(config.text)),
        Entry("image_projection/kernel", ("image_projection.linear.weight",), LINEAR),
        Entry("text_projection/kernel", ("text_projection.linear.weight",), LINEAR),
        Entry("temperature", ("loss.temperature",)),
    ]


class WholeModel(NamedTuple):
    """A SimSeg model. note: which tensors were taken and which were not, a sentence."""

    config: SimSegConfig
    params: dict
    note: str


def is_whole_model(weights: Weights) -> bool:
    """Whether the weights are those of a SimSeg model and not of one encoder."""
    return bool(prefixes(usual_names(weights.tensors), SIGNATURE))


def read_model(
    weights: Weights, image_heads: int | None = None, text_heads: int | None = None
) -> WholeModel:
    """Architecture and parameters of a checkpoint of the authors, whatever wrapped it.

    The number of heads leaves no trace there: by default heads are 64 channels wide, as in every
    model the authors published. All unknown, missing and mis-shaped names are reported together.
    """
    with reading("the weights", "Take other weights of the same model."):
        tensors = usual_names(weights.tensors)
        found = prefixes(tensors, SIGNATURE)
        if not found:
            raise UserError(
                f"Not a SimSeg checkpoint: it has no entry {SIGNATURE}. The weights of one encoder "
                "serve as config.init.image or config.init.text."
            )
        prefix = choose(found, weights.key, "SimSeg model")
        tensors, note = take(tensors, prefix, found, UNUSED)
        described = weights.meta.get(META, {}).get(ARCHITECTURE)
        if described and not (image_heads or text_heads):
            config = _from_json(described)
        else:
            config = _from_shapes(tensors, image_heads, text_heads)
            if not (image_heads and text_heads):
                note += (
                    f" The file does not tell the attention heads: {config.image.heads} (image) "
                    f"and {config.text.heads} (text) were taken, one per 64 channels unless given."
                )
        return WholeModel(config, fit(tensors, config), note)


def describe(config: SimSegConfig) -> str:
    """What goes beside the tensors, so that `read_model` need not guess."""
    return json.dumps(dataclasses.asdict(config))


def _from_shapes(tensors: Tensors, image_heads: int | None, text_heads: int | None) -> SimSegConfig:
    image, text = (
        {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        for prefix in (IMAGE, TEXT)
    )
    words = text.get(BERT.signature, np.zeros((0, 64)))
    sides = {
        "image": TIMM.describe(image, {}, image_heads),
        "text": BERT.describe(text, {}, text_heads or max(words.shape[-1] // 64, 1)),
    }
    embed_dim = tensors[SIGNATURE].shape[0]
    check_settings(sides, embed_dim=embed_dim)
    return SimSegConfig(ViTConfig(**sides["image"]), BertConfig(**sides["text"]), embed_dim)


def _from_json(text: str) -> SimSegConfig:
    with reading("the description of the architecture beside the weights"):
        fields: dict[str, Any] = json.loads(text)
        image: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.pop("image").items()
        }
        sides = {"image": image, "text": fields.pop("text")}
        check_settings(sides, **fields)
        return SimSegConfig(ViTConfig(**image), BertConfig(**sides["text"]), **fields)


def fit(tensors: dict[str, np.ndarray], config: SimSegConfig) -> dict:
    """The parameters of `config` from tensors with the authors' names."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return assemble(tensors, table(config), leaves_of(shapes))


def state_dict(params: dict, config: SimSegConfig) -> dict[str, np.ndarray]:
    """The parameters under the authors' names in PyTorch's layouts: the inverse of `fit`."""
    values: dict[str, Any] = {
        path_string(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    tensors = {}
    for entry in table(config):
        assert entry.layout.write is not None
        tensors[entry.names[0]] = np.array(entry.layout.write(values[entry.path]), order="C")
    return tensors


def _below(path: str, prefix: str, entries: list[Entry]) -> list[Entry]:
    return [
        Entry(path + e.path, tuple(prefix + name for name in e.names), e.layout) for e in entries
    ]
