"""What a training step costs: FLOPs, the least communication, and a line about the program."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from simseg_jax.models.bert import BertConfig
from simseg_jax.models.layers import Linear
from simseg_jax.models.simseg import SimSegConfig, bind, path_string
from simseg_jax.models.vit import ViTConfig
from simseg_jax.training.collectives import communication_bytes, ring


def forward_flops(config: SimSegConfig, batch: int, tokens: int) -> int:
    """Floating-point operations of all matrix products of the loss of `batch` pairs.

    tokens: length of the (padded) captions. A multiply-add is two operations, as usual.
    """
    image = config.image
    patches = image.kept((image.image_size // image.patch_size) ** 2)
    per_pair = _patch_flops(config, patches) + _tower_flops(config.text, tokens, config.embed_dim)
    return batch * per_pair + 2 * batch**2 * config.embed_dim


def image_flops(config: SimSegConfig, height: int, width: int) -> int:
    """Operations of the projected tokens of one whole image; height, width: in pixels."""
    patch = config.image.patch_size
    return _patch_flops(config, (height // patch) * (width // patch))


def _patch_flops(config: SimSegConfig, patches: int) -> int:
    image = config.image
    embedding = 2 * patches * 3 * image.patch_size**2 * image.width
    return embedding + _tower_flops(image, patches + 1, config.embed_dim)


def _tower_flops(tower: ViTConfig | BertConfig, length: int, embed_dim: int) -> int:
    weights = 4 * tower.width**2 + 2 * tower.width * tower.mlp_width
    attention = 2 * length * tower.width  # multiply-adds per token
    return 2 * length * ((weights + attention) * tower.depth + tower.width * embed_dim)


def step_flops(config: SimSegConfig, batch: int, tokens: int) -> int:
    """Model FLOPs of a training step: the gradient takes twice the forward pass.

    What is computed again to save memory does not count, so that MFU (these over what the device
    could do) compares runs. Frozen parameters count as if they were trained.
    """
    return 3 * forward_flops(config, batch, tokens)


def computed_flops(
    config: SimSegConfig, batch: int, tokens: int, remat: str, micro_batch: int
) -> int:
    """`step_flops` and the forward passes that a step repeats to save memory."""
    repeated = (remat == "full") + (micro_batch > 0)
    forward = forward_flops(config, batch, tokens)
    return step_flops(config, batch, tokens) + repeated * forward


def least_communication(
    graphdef: nnx.GraphDef,
    params,
    shardings,
    frozen,
    batch: tuple[int, int],
    mesh: Mesh,
    micro_batch: int = 0,
) -> float:
    """Bytes that every device has to send in a step, but for some scalars.

    To compare with the total of `communication_bytes`. The gradient of every parameter is summed
    over the devices once, in the type in which it leaves its product. A parameter split over
    `fsdp` is gathered before the forward pass, a weight again before the backward pass, and its
    gradient is scattered. The embeddings of the texts and their gradients are sent once, and so
    are three numbers per text for the loss over columns.

    params, shardings, frozen: trees of shapes, `NamedSharding`s and bools (no gradient).
    batch: (pairs, tokens of a caption).
    """
    model = bind(graphdef, params)
    layers = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    pairs, tokens = batch
    # Rows of embeddings that no caption uses are not needed.
    rows = {"position_embeddings": tokens, "token_type_embeddings": 1}
    fsdp = mesh.shape["fsdp"]
    # Between slices, too: a ring within each and one between them send as much as one of all.
    total = 2 * ring(4 * pairs * model.config.embed_dim, mesh.size)
    total += 3 * 2 * ring(4 * pairs, mesh.size)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    trees = jax.tree.leaves(shardings), jax.tree.leaves(frozen)
    for (path, leaf), sharding, still in zip(leaves, *trees, strict=True):
        layer = path_string(path).rpartition("/")[0]
        module = layers.get(layer)
        weight, slope, gathers = 4, 4, 1
        if isinstance(module, Linear) and not micro_batch:
            weight = jnp.dtype(module.dtype).itemsize
            slope = jnp.dtype(module.gradient_dtype or module.dtype).itemsize
            gathers = 1 if still else 2
        name = layer.rpartition("/")[2]
        count = rows[name] * leaf.shape[1] if name in rows else leaf.size
        size = slope * count
        if sharding.is_fully_replicated:
            total += 0 if still else 2 * ring(size, mesh.size)
            continue
        there, back = ring(weight * count, fsdp), ring(size, fsdp)
        if isinstance(module, nnx.Embed):
            # Or the rows of the captions' words instead of the table.
            looked_up = ring(4 * pairs // mesh.size * tokens * module.features, fsdp)
            there, back = min(there, looked_up), min(back, looked_up)
        total += gathers * there
        if not still:
            total += back + 2 * ring(size / fsdp, mesh.size // fsdp)
    return total


def describe_step(compiled: Any, flops: int, devices: int) -> str:
    """What a step costs every device, in one line, from the compiled program.

    flops: of the whole step, see `step_flops`; devices: how many share it.
    """
    memory = compiled.memory_analysis()
    line = (
        f"A step takes {flops / devices / 1e12:.3g} TFLOP of every device, "
        f"{memory.argument_size_in_bytes / 2**30:.3g} GiB for state and batch and "
        f"{memory.temp_size_in_bytes / 2**30:.3g} GiB for temporaries"
    )
    if devices == 1:
        return line
    try:
        sent = communication_bytes(compiled.as_text())
    except ValueError as error:  # Another version of XLA may write its programs differently.
        return f"{line}; communication unknown ({error})"
    kinds = ", ".join(f"{kind} {size / 1e6:.3g}" for kind, size in sorted(sent.items()))
    return f"{line}, and sends {sent.total() / 1e6:.3g} MB ({kinds})"
