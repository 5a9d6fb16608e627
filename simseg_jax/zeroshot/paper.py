"""The paper's zero-shot protocol: images and class embeddings -> index masks.

A protocol turns one decoded image into arrays (`load`), a batch of those into masks (`start`, which
returns at once, and `finish`) and a mask into labels of the image's own pixels (`restore`).
`standard.StandardProtocol` is the other one.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from simseg_jax.data.images import resize
from simseg_jax.masks.densecrf_jax import lattice_size
from simseg_jax.masks.postprocess import (
    adaptive_threshold,
    candidate_classes,
    closing,
    compose,
    min_max,
    resize_nearest,
)
from simseg_jax.masks.refine import (
    on_host,
    positions_for,
    refine_on_device,
    refine_on_host,
    threads_of,
)
from simseg_jax.models.simseg import SimSeg, bind, l2_normalize
from simseg_jax.runtime.sharding import to_global_batch
from simseg_jax.zeroshot.settings import SegmentationConfig

CPU_CHUNK = 4


class Response(NamedTuple):
    """What the model says about a batch of B images, C classes, K candidates, a g x g grid."""

    scores: jax.Array  # [B, C] image-text score of every class
    threshold: jax.Array  # [B]
    classes: jax.Array  # [B, K] candidates in descending order of score
    drawn: jax.Array  # [B, K] above the threshold and not background
    similarity: jax.Array  # [B, K, g, g] cosine of patches and candidate
    self_similarity: jax.Array  # [B, g, g] cosine of patches and the image's own embedding

    def rows(self, index: int | slice) -> "Response":
        """The same of one image (without the batch axis) or of a slice of images."""
        return Response(*(field[index] for field in self))


def project(model: SimSeg, images: jax.Array, mesh: Mesh) -> jax.Array:
    """Projected tokens [B, 1 + N, D] of uint8 images [B, H, W, 3]."""

    def tokens(images: jax.Array) -> jax.Array:
        return model.encode_image(model.normalize(images))[1]

    if mesh.devices.flat[0].platform != "cpu" or mesh.size > 1:
        return tokens(images)
    # Activations of a few images stay in a CPU's caches: one batch of 32 takes 1.6 times as long.
    few = images.reshape(-1, math.gcd(len(images), CPU_CHUNK), *images.shape[1:])
    projected = jax.lax.map(tokens, few)
    return projected.reshape(len(images), *projected.shape[2:])


def respond(
    model: SimSeg,
    tokens: jax.Array,
    class_embeddings: jax.Array,
    settings: SegmentationConfig,
    grid: int,
    background: bool,
) -> Response:
    """Scores, threshold, candidates and similarity maps from projected tokens [B, 1 + g * g, D].

    class_embeddings: [C, D], the first that of the background, which takes part in the scores only
    if `background`. grid: g, patches per side.
    """
    embedding = model.pool_image(tokens, settings.m_image)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.matmul(embedding, class_embeddings.T, precision=highest)
    if not background:
        scores = scores.at[:, 0].set(-jnp.inf)
    count = min(settings.class_scores, scores.shape[1] - (not background))
    threshold = adaptive_threshold(scores, count, settings.sigma_weight)
    classes, drawn = candidate_classes(scores, threshold, settings.candidates)
    patches = l2_normalize(tokens[:, 1:])
    maps = jnp.einsum("bnd,bkd->bkn", patches, class_embeddings[classes], precision=highest)
    own = jnp.einsum("bnd,bd->bn", patches, embedding, precision=highest)
    return Response(
        scores,
        threshold,
        classes,
        drawn,
        maps.reshape(*maps.shape[:2], grid, grid),
        own.reshape(-1, grid, grid),
    )


class PaperProtocol:
    """Method of the paper, section 3.3, with p > 0.5, dense CRF or PAMR as refinement.

    variants: entries of `config.evals.seg` that differ only in `variable` keys; every image passes
    the encoder once for all of them, and masks they have in common are refined once. background:
    whether class 0, "background", takes part in the scores.
    """

    # What follows the encoder.
    variable = ("m_image", "m_text", "top_k", "sigma_weight", "candidates")
    variable += ("refine", "crf", "pamr", "closing")

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        patch_size: int,
        mesh: Mesh,
        variants: Sequence[SegmentationConfig],
        background: bool = True,
    ):
        self.graphdef, self.mesh, self.variants = graphdef, mesh, variants
        self.background, self.size = background, variants[0].resolution
        self.grid = self.size // patch_size
        # Stage: variants refined alike, together. Block: those among them with the same candidates,
        # whose thresholds only say which of the masks are needed.
        stages: dict[tuple, dict[tuple, list[int]]] = {}
        for v, settings in enumerate(variants):
            refinement = (settings.refine, settings.crf, settings.pamr)
            candidates = (settings.m_image, settings.m_text, settings.candidates)
            stages.setdefault(refinement, {}).setdefault(candidates, []).append(v)
        self.stages = [list(blocks.values()) for blocks in stages.values()]
        # Settings of every stage, and whether it leaves the device.
        self.refinements = [variants[blocks[0][0]] for blocks in self.stages]
        self.on_host = [on_host(settings) for settings in self.refinements]
        self.pool = ThreadPoolExecutor(threads_of(variants[0]))
        self.vertices = lattice_size(self.size, self.size)
        self.predict_jit = jax.jit(self._predict, static_argnames="vertices")
        self.finish_jit = jax.jit(self._finish)

    def load(self, image: Image.Image, _shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """The model's input: uint8 [S, S, 3], aspect not kept."""
        return {"image": resize(image, self.size)}

    def restore(self, mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """A mask [S, S] at the size (height, width) of the image."""
        return resize_nearest(mask, *shape)

    def start(self, params, class_embeddings: dict[int, jax.Array], batch: dict):
        """Begins the work on a batch of `load`; class_embeddings: [C, D] by M^T."""
        images = to_global_batch(batch["image"], self.mesh)
        positions = [
            None if host else positions_for(settings, len(images), self.mesh)
            for settings, host in zip(self.refinements, self.on_host, strict=True)
        ]
        arguments = (params, class_embeddings, images, positions)
        return arguments, self.predict_jit(*arguments, vertices=self.vertices)

    def finish(self, started) -> tuple[np.ndarray, list[Response]]:
        """Masks [V, B, S, S] and one response per variant, in NumPy."""
        arguments, (result, responses, used) = started
        while int(used) > self.vertices:
            # Rare images have more colours than there is room for. A full hash table only says
            # that it was too small.
            most = 6 * self.size**2
            self.vertices = int(used) if int(used) <= most else min(2 * self.vertices, most)
            result, responses, used = self.predict_jit(*arguments, vertices=self.vertices)
        if any(self.on_host):
            images, refined = np.asarray(arguments[2]), []
            for settings, host, stage in zip(self.refinements, self.on_host, result, strict=True):
                if host:
                    maps, needed = map(np.asarray, stage)
                    stage = refine_on_host(settings, images, maps, needed, self.pool)
                refined.append(stage)
            result = self.finish_jit(refined, responses)
        return np.asarray(result), jax.tree.map(np.asarray, responses)

    def _predict(self, params, class_embeddings, images, positions, vertices: int):
        """(masks [V, B, S, S], responses, lattice vertices used per image).

        If a stage must continue on the host, instead of the masks what each stage has: masks, or
        maps in [0, 1] and which of them are needed.
        """
        model = bind(self.graphdef, params)
        tokens = project(model, images, self.mesh)
        responses = [
            respond(model, tokens, class_embeddings[v.m_text], v, self.grid, self.background)
            for v in self.variants
        ]
        stages, used = [], [jnp.int32(0)]
        for blocks, settings, host, lattice in zip(
            self.stages, self.refinements, self.on_host, positions, strict=True
        ):
            maps = [min_max(responses[block[0]].similarity) for block in blocks]
            needed = [jnp.any(jnp.stack([responses[v].drawn for v in b]), axis=0) for b in blocks]
            slots = jnp.concatenate(maps, axis=1), jnp.concatenate(needed, axis=1)
            if host:
                stages.append(slots)
            else:
                masks, count = refine_on_device(
                    settings, images, *slots, positions=lattice, vertices=vertices, mesh=self.mesh
                )
                stages.append(masks)
                used.append(count)
        result = stages if any(self.on_host) else self._finish(stages, responses)
        return result, responses, jnp.stack(used).max()

    def _finish(self, refined: list[jax.Array], responses: list[Response]) -> jax.Array:
        """Masks [V, B, S, S] from those of every stage, bool [B, K, S, S]."""
        composed = {}
        for masks, blocks in zip(refined, self.stages, strict=True):
            begin = 0
            for block in blocks:
                end = begin + responses[block[0]].classes.shape[1]
                for v in block:
                    scores, _, classes, drawn, *_ = responses[v]
                    closed = closing(masks[:, begin:end], self.variants[v].closing)
                    composed[v] = compose(closed, scores, classes, drawn)
                begin = end
        return jnp.stack([composed[v] for v in range(len(responses))])
