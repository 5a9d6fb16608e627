"""Exported programs: serialised StableHLO (`jax.export`) that contains the parameters.

They run wherever JAX runs, without this package: `jax.export.deserialize(data).call(...)`. JAX
guarantees to load them for six months; in practice it does so for longer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from simseg_jax.masks.postprocess import closing
from simseg_jax.masks.refine import refine_image
from simseg_jax.models.simseg import bind, make_model
from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.load import TrainedModel
from simseg_jax.zeroshot.paper import compose, min_max, respond
from simseg_jax.zeroshot.settings import SegmentationConfig

PLATFORMS = ("cpu", "cuda", "tpu")
IMAGE, TEXT, SEGMENTER = "image_encoder", "text_encoder", "segmenter"
SUFFIX = ".stablehlo"
CLASSES = "classes.npz"


def least_classes(settings: SegmentationConfig) -> int:
    """How many classes the segmenter needs at least, including the background."""
    return max(settings.class_scores, settings.candidates)


def write_programs(
    folder: Path,
    model: TrainedModel,
    settings: SegmentationConfig,
    names: Sequence[str],
    class_embeddings: np.ndarray,
    platforms: Sequence[str],
    dtype: Any = np.float32,
) -> None:
    """Writes one file per program, and classes.npz with the names and embeddings of the classes.

    names: of C classes, the background first. class_embeddings: float32 [C, D]. dtype: of the
    stored parameters; computation is in float32. The programs:

    image_encoder: uint8 [B, S, S, 3] -> unit-length embeddings [B, D], projected tokens [B, N, D].
    text_encoder: ids int32 [B, T], mask bool [B, T] -> unit-length embeddings [B, D].
    segmenter: uint8 [B, S, S, 3], class embeddings float32 [C, D] with the background first ->
    masks uint8 [B, S, S] of class numbers, scores [B, C], thresholds [B].

    The batch size B is free; C is from `least_classes` to 256.
    """
    if settings.protocol != "paper" or settings.refine == "pydensecrf":
        raise UserError(
            "The exported segmenter follows the paper protocol in JAX: choose --refine=none, crf "
            "or pamr and a test set with protocol=paper."
        )
    least = least_classes(settings)
    if len(names) < least:
        raise UserError(
            f"The threshold needs {least} classes, including the background: add words."
        )
    if len(names) > 256:
        raise UserError(
            f"Masks of the program hold at most 256 classes, not {len(names):,}: name fewer words."
        )
    unknown = set(platforms) - set(PLATFORMS)
    if unknown or not platforms:
        raise UserError(f"Platforms are {', '.join(PLATFORMS)}, not {', '.join(unknown)}.")
    graphdef = make_model(model.architecture, jnp.float32)
    stored = jax.tree.map(lambda x: np.asarray(x).astype(dtype), model.params)
    size = settings.resolution

    def bound():
        return bind(graphdef, jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), stored))

    def encode_image(images):
        network = bound()
        _, tokens = network.encode_image(network.normalize(images))
        return network.pool_image(tokens, settings.m_image), tokens

    def encode_text(ids, mask):
        return bound().encode_text(ids, mask, m=settings.m_text, mask_padding=True)

    def segment(images, class_embeddings):
        network = bound()
        _, tokens = network.encode_image(network.normalize(images))
        response = respond(network, tokens, class_embeddings, settings)
        maps = min_max(response.similarity)
        # One image after the other, since the lattice of a CRF needs a known batch size.
        masks = jax.lax.map(
            lambda arguments: refine_image(settings, *arguments), (images, maps, response.drawn)
        )
        closed = closing(masks, settings.closing)
        return compose(closed, response), response.scores, response.threshold

    length, width = model.config.data.max_length, model.architecture.embed_dim
    (b,) = export.symbolic_shape("b", constraints=["b >= 1"])
    batch, c = export.symbolic_shape("b, c", constraints=["b >= 1", f"c >= {least}", "c <= 256"])
    image = (size, size, 3)
    programs = {
        IMAGE: (encode_image, [((b, *image), jnp.uint8)]),
        TEXT: (encode_text, [((b, length), jnp.int32), ((b, length), jnp.bool_)]),
        SEGMENTER: (segment, [((batch, *image), jnp.uint8), ((c, width), jnp.float32)]),
    }
    for name, (function, shapes) in programs.items():
        arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        exported = export.export(jax.jit(function), platforms=platforms)(*arguments)
        (folder / f"{name}{SUFFIX}").write_bytes(exported.serialize())
    np.savez(folder / CLASSES, names=np.array(names), embeddings=class_embeddings)
