"""The description of a weight format, and the names and sizes of tensors that follow from it."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from simseg_jax.models.layers import BLOCKS
from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.containers import Settings, Tensors

# Published ViTs whose heads are not 64 channels wide: width -> heads.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
# The last part of our paths -> PyTorch's name for it; Flax's names are ours.
PYTORCH = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class Format(NamedTuple):
    """How one code base stores a model.

    Recognition: a file has this format if the name of a tensor ends with `signature`. What comes
    before it is the prefix of all tensors of the model. part: what the format stores, the whole
    "model" or an "image" or "text" encoder.

    Architecture: sizes follow from the shapes of tensors. Heads, activation, epsilon and the
    normalisation of images do not; facts(tensors, settings, heads) reads them from the JSON files
    beside the weights. heads: the user's number, or None.

    Parameters: `names` maps our layers to theirs, one line for all blocks, as in

        "blocks/#/attn/qkv": "encoder.layers.#.self_attn.(q|k|v)_proj."

    "#" is the number of a block. (q|k|v) stands for three tensors, which are concatenated to one
    parameter here. A name that ends with a separator is a layer, to which "weight" or "bias" is
    added; any other name is a tensor. "LAYER *" is a LayerScale, which is multiplied into that
    layer if the file has it. Lookups go from our parameters to tensors, so that the table also
    shows what a file lacks, and serves for writing.

    unused: pattern for tensors that the method does not need (heads, poolers, buffers). free_bias:
    linear layers may lack their bias, which is then zero. A layer lacks it in all blocks or none.
    """

    name: str
    part: str
    signature: str
    facts: Callable[[Tensors, Settings, int | None], dict[str, Any]]
    names: Mapping[str, str]
    unused: str
    free_bias: bool = True

    def tensors(self, path: str) -> list[str]:
        """The names of the tensors that form the parameter `path`; none if the table lacks it."""
        general = re.sub(r"/\d+/", "/#/", path)
        layer, _, leaf = general.rpartition("/")
        name = self.names.get(general) or self.names.get(layer, "")
        if name.endswith("/"):
            name += leaf
        elif name.endswith((".", "_")):
            name += PYTORCH[leaf]
        number = re.search(r"/(\d+)/", path)
        name = name.replace("#", number[1]) if number else name
        several = re.fullmatch(r"(.*)\((.*)\)(.*)", name)
        if several:
            return [several[1] + part + several[3] for part in several[2].split("|")]
        return [name] if name else []


def architecture(
    form: Format, tensors: Tensors, settings: Settings, heads: int | None = None
) -> dict[str, Any]:
    """Fields of `ViTConfig` or `BertConfig`, as far as the files of an encoder determine them."""
    sizes = _vit_sizes if form.part == "image" else _bert_sizes
    facts = form.facts(tensors, settings, heads)  # First: its errors explain best.
    found = {**sizes(form, tensors), **facts}
    if found["heads"] is None:
        found["heads"] = HEADS.get(found["width"], max(found["width"] // 64, 1))
    return found


def _vit_sizes(form: Format, tensors: Tensors) -> dict[str, Any]:
    (kernel,), (hidden,) = map(form.tensors, ("patch_embed/proj/kernel", "blocks/0/mlp/fc1/kernel"))
    if kernel.endswith("/kernel"):  # Flax: [in, out].
        patch, _, _, width = shape_of(tensors, kernel, 4)
        _, mlp_width = shape_of(tensors, hidden, 2)
    else:  # PyTorch: [out, in].
        width, _, patch, _ = shape_of(tensors, kernel, 4)
        mlp_width, _ = shape_of(tensors, hidden, 2)
    positions = tensors.get(form.tensors("pos_embed")[0])
    rows = positions.size // width if positions is not None and positions.ndim else 0
    grid = round(max(rows - 1, 0) ** 0.5)
    if not rows or 1 + grid**2 != rows:
        raise UserError(
            f"The ViT cannot be used: its position embedding has {rows} rows, not one for a CLS "
            "token and one for each patch of a square image (SigLIP and other ViTs without CLS "
            "token, with register tokens or with relative positions are not supported)."
        )
    return {
        "image_size": grid * patch,
        "patch_size": patch,
        "width": width,
        "depth": _depth(tensors, form.names["blocks/#/mlp/fc1"]),
        "mlp_width": mlp_width,
    }


def _bert_sizes(form: Format, tensors: Tensors) -> dict[str, Any]:
    vocab_size, width = shape_of(tensors, form.signature, 2)
    (positions,) = form.tensors("embeddings/position_embeddings/embedding")
    (hidden,) = form.tensors("layers/0/intermediate/kernel")
    return {
        "vocab_size": vocab_size,
        "max_positions": shape_of(tensors, positions, 2)[0],
        "width": width,
        "depth": _depth(tensors, form.names["layers/#/intermediate"]),
        "mlp_width": shape_of(tensors, hidden, 2)[0],
    }


def _depth(tensors: Tensors, layer: str) -> int:
    """The number of blocks: one more than the largest number in names that match `layer`."""
    pattern = re.escape(layer.partition("#")[0]) + r"(\d+)[./]"
    numbers = [m[1] for m in (re.match(pattern, name) for name in tensors) if m]
    largest = max(numbers, key=lambda number: (len(number), number), default="-1")
    # Checked before memory is allocated for the blocks.
    if len(largest) > 3 or int(largest) >= BLOCKS:
        raise UserError(f"The weights have a block {largest[:20]}: at most {BLOCKS} are read.")
    return int(largest) + 1


def shape_of(tensors: Tensors, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor, which must exist, have `dims` axes and not be empty."""
    if name not in tensors or tensors[name].ndim != dims or not tensors[name].size:
        found = f"of shape {tensors[name].shape}" if name in tensors else "missing"
        raise UserError(f"The weights cannot be used: {name} is {found}.")
    return tensors[name].shape


def part_of(config: Mapping[str, Any], key: str) -> dict:
    """An object inside the object of a JSON file; {} if it is missing."""
    part = config.get(key) or {}
    if not isinstance(part, dict):
        raise UserError(f"In the JSON beside the weights {key} is no object.")
    return part
