"""The paper's zero-shot protocol, section 3.3: images and class embeddings -> index masks.

The steps are scores, threshold, candidates, similarity, refinement and composition. `respond` does
the first four, `masks.refine` the fifth, `compose` the last; `PaperProtocol` runs them on batches.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt, UInt8
from PIL import Image

from simseg_jax.data.images import resize
from simseg_jax.masks.postprocess import closing, label_type, resize_nearest
from simseg_jax.masks.refine import Refiner
from simseg_jax.models.simseg import SimSeg, bind, l2_normalize
from simseg_jax.runtime.sharding import batch_sharding, structs, to_global_batch
from simseg_jax.runtime.threads import thread_count
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.settings import SegmentationConfig

CPU_CHUNK = 4


class Response(NamedTuple):
    """The model's output for B images, C classes, K candidate classes and g x g patches.

    Classes that are padding have the score -inf.
    """

    scores: jax.Array  # [B, C] image-text score of every class
    threshold: jax.Array  # [B]
    classes: jax.Array  # [B, K] candidates in descending order of score
    drawn: jax.Array  # bool [B, K] reaches the threshold and is not the background
    similarity: jax.Array  # [B, K, g, g] cosine of patch and class embedding
    self_similarity: jax.Array  # [B, g, g] cosine of patch and the image's pooled embedding
    maps: jax.Array | None = None  # [B, C, g, g] as similarity, for every class, where asked for

    def rows(self, index: int | slice) -> "Response":
        """The response to one image (without batch axis) or to a slice of images."""
        return jax.tree.map(lambda field: field[index], self)


def project(
    model: SimSeg, images: UInt8[Array, "B H W 3"], mesh: Mesh
) -> Float[Array, "B tokens D"]:
    """Projected tokens [B, 1 + N, D] of uint8 images [B, H, W, 3]."""

    def tokens(images: jax.Array) -> jax.Array:
        return model.encode_image(model.normalize(images))[1]

    if mesh.devices.flat[0].platform != "cpu" or mesh.size > 1:
        return tokens(images)
    # Few images at a time, whose activations fit a CPU's caches: all 32 at once take 1.6 times as
    # long.
    few = images.reshape(-1, math.gcd(len(images), CPU_CHUNK), *images.shape[1:])
    projected = jax.lax.map(tokens, few)
    return projected.reshape(len(images), *projected.shape[2:])


def respond(
    model: SimSeg,
    tokens: Float[Array, "B tokens D"],
    class_embeddings: Float[Array, "C D"],
    settings: SegmentationConfig,
    background: bool = True,
    maps: bool = False,
    sigma_weight: float | Float[Array, ""] | None = None,
) -> Response:
    """Scores, threshold, candidates and similarity maps from projected tokens [B, 1 + g * g, D].

    class_embeddings: [C, D]; the first is the background's, which is scored only if `background`.
    Rows of zeros are no classes: they pad C, so that one program serves several numbers of classes.
    maps: whether to return the similarity to all classes, too. sigma_weight: by default that of the
    settings.
    """
    embedding = model.pool_image(tokens, settings.m_image)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.matmul(embedding, class_embeddings.T, precision=highest)
    scored = classes_in(class_embeddings)
    if not background:
        scored = scored.at[0].set(False)
    scores = jnp.where(scored, scores, -jnp.inf)
    weight = settings.sigma_weight if sigma_weight is None else sigma_weight
    threshold = adaptive_threshold(scores, settings.class_scores, weight)
    classes, drawn = candidate_classes(scores, threshold, settings.candidates)
    grid = math.isqrt(tokens.shape[1] - 1)
    patches = l2_normalize(tokens[:, 1:]).reshape(-1, grid, grid, tokens.shape[2])
    chosen = class_embeddings[classes]
    similarity = jnp.einsum("bhwd,bkd->bkhw", patches, chosen, precision=highest)
    own = jnp.einsum("bhwd,bd->bhw", patches, embedding, precision=highest)
    every = None
    if maps:
        every = jnp.einsum("bhwd,cd->bchw", patches, class_embeddings, precision=highest)
    return Response(scores, threshold, classes, drawn, similarity, own, every)


def classes_in(class_embeddings: Float[Array, "C D"]) -> Bool[Array, " C"]:
    """Which rows are classes, not padding of zeros."""
    return jnp.any(class_embeddings != 0, axis=1)


def adaptive_threshold(
    scores: Float[Array, "B C"], top_k: int, sigma_weight: float | Float[Array, ""]
) -> Float[Array, " B"]:
    """Mean + sigma_weight * unbiased standard deviation of the top-k scores: [B, C] -> [B].

    Scores of -inf, which belong to no class, are left out.
    """
    top, _ = jax.lax.top_k(scores, min(top_k, scores.shape[1]))
    real = jnp.isfinite(top)
    mean, deviation = jnp.mean(top, 1, where=real), jnp.std(top, 1, ddof=1, where=real)
    return mean + sigma_weight * deviation


def candidate_classes(
    scores: Float[Array, "B C"], threshold: Float[Array, " B"], count: int
) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
    """(the `count` best classes in order, which of them may be drawn): int32, bool [B, count].

    Class 0, the background, can be among them but is never drawn.
    """
    best, classes = jax.lax.top_k(scores, min(count, scores.shape[1]))
    return classes, (best >= threshold[:, None]) & (classes != 0)


def min_max(maps: Float[Array, "*B h w"]) -> Float[Array, "*B h w"]:
    """Each map [..., h, w] scaled to [0, 1]; a constant map becomes 0."""
    low = maps.min(axis=(-2, -1), keepdims=True)
    spread = maps.max(axis=(-2, -1), keepdims=True) - low
    return jnp.where(spread > 0, (maps - low) / jnp.where(spread > 0, spread, 1), 0)


def compose(masks: Bool[Array, "B K H W"], response: Response) -> UInt[Array, "B H W"]:
    """Index masks [B, H, W] of `label_type` from the candidates' masks [B, K, H, W].

    The original multiplies every mask by its class score and takes the argmax over the classes and
    a background of 0. Candidates are sorted by descending score, so the result is the first
    candidate whose mask is set and whose score is positive.
    """
    scores, classes = response.scores, response.classes
    drawn = response.drawn & (jnp.take_along_axis(scores, classes, axis=1) > 0)
    masks = masks & drawn[:, :, None, None]
    first = jnp.argmax(masks, axis=1)
    label = jnp.take_along_axis(classes[:, :, None, None], first[:, None], axis=1)[:, 0]
    return jnp.where(masks.any(axis=1), label, 0).astype(label_type(scores.shape[1]))


class PaperProtocol:
    """The method on batches of images, under one or several settings.

    A protocol turns one decoded image into arrays (`load`), a batch of those into masks (`start`,
    which does not wait for the device, and `finish`), and a mask into labels of the image's own
    pixels (`restore`). `standard.StandardProtocol` is the other protocol. settings: differ only in
    keys of `after_encoder`, so that the encoder runs once per image for all of them. background:
    whether class 0, the background, is scored. maps: whether responses to the first settings hold
    the similarity to all classes.
    """

    after_encoder = ("m_image", "m_text", "top_k", "sigma_weight", "candidates")
    after_encoder += ("refine", "crf", "pamr", "closing")

    def __init__(
        self,
        model: Model,
        settings: Sequence[SegmentationConfig],
        background: bool = True,
        maps: bool = False,
    ):
        self.graphdef, self.mesh = model.graphdef, model.local_mesh
        self.settings, self.background, self.maps = settings, background, maps
        # An argument of the program, so that it serves every threshold.
        self.sigma_weights = np.array([s.sigma_weight for s in settings], np.float32)
        self.size = settings[0].resolution
        pool = ThreadPoolExecutor(thread_count(settings[0].threads))
        # A stage holds the settings with the same refinement: the CRF's lattice of an image is
        # built once for them. Within it, settings that differ only in threshold and closing form a
        # group, which shares its candidates and their refined masks.
        self.stages = []
        for stage in _grouped(range(len(settings)), settings, "refine", "crf", "pamr"):
            refiner = Refiner(settings[stage[0]], self.size, self.mesh, pool)
            groups = _grouped(stage, settings, "m_image", "m_text", "candidates")
            self.stages.append((refiner, groups))
        self.respond_jit = jax.jit(self._respond)
        self.compose_jit = jax.jit(self._compose)

    def load(self, image: Image.Image, _shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """The model's input: uint8 [S, S, 3], aspect not kept."""
        return {"image": resize(image, self.size)}

    def restore(self, mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """A mask [S, S] resized to the image's (height, width)."""
        return resize_nearest(mask, *shape)

    def restore_maps(self, maps: np.ndarray, _shape: tuple[int, int]) -> np.ndarray:
        """The maps [C, h, w] of one image, as they are: a value per patch."""
        return maps

    def start(self, params, class_embeddings: Mapping[int, Any], batch: dict):
        """Starts work on a batch of arrays from `load`; class_embeddings: M^T -> [C, D]."""
        images = to_global_batch(batch["image"], self.mesh)
        responses, slots = self.respond_jit(params, class_embeddings, images, self.sigma_weights)
        refined = [
            refiner.start(images, *arrays)
            for (refiner, _), arrays in zip(self.stages, slots, strict=True)
        ]
        return responses, refined

    def finish(self, started) -> tuple[np.ndarray, list[Response]]:
        """(masks [V, B, S, S], responses under each of the V settings) as NumPy arrays."""
        responses, refined = started
        masks = [
            refiner.finish(begun) for (refiner, _), begun in zip(self.stages, refined, strict=True)
        ]
        labels = self.compose_jit(masks, responses)
        return np.asarray(labels), jax.tree.map(np.asarray, responses)

    def compile(self, params, class_embeddings, batch: dict) -> Iterator[tuple[str, Any]]:
        """(name, compiled program) of all that `start` and `finish` run on the devices.

        The arguments are those of `start` as shape structs with shardings.
        """
        images, sharding = batch["image"], batch_sharding(self.mesh)
        arguments = params, class_embeddings, images, self.sigma_weights
        encode = self.respond_jit.lower(*arguments).compile()
        yield "encoder and responses", encode
        responses, slots = structs(encode.out_info, sharding)
        masks = []
        for (refiner, _), arrays in zip(self.stages, slots, strict=True):
            shape = (*arrays[1].shape, self.size, self.size)
            masks.append(jax.ShapeDtypeStruct(shape, bool, sharding=sharding))
            if not refiner.on_host:
                yield refiner.settings.refine, refiner.compile(images, *arrays)
        yield "composition", self.compose_jit.lower(masks, responses).compile()

    def _respond(self, params, class_embeddings, images, sigma_weights):
        """(a response per setting, per stage (maps [B, K, g, g] in [0, 1], needed [B, K])).

        K: the candidates of all groups in the stage. needed: those that some setting may draw.
        """
        model = bind(self.graphdef, params)
        tokens = project(model, images, self.mesh)
        responses = [
            respond(
                model,
                tokens,
                class_embeddings[s.m_text],
                s,
                self.background,
                self.maps and i == 0,
                sigma_weights[i],
            )
            for i, s in enumerate(self.settings)
        ]
        slots = []
        for _, groups in self.stages:
            maps = [min_max(responses[first].similarity) for first, *_ in groups]
            drawn = [jnp.stack([responses[i].drawn for i in group]) for group in groups]
            needed = [jnp.any(every, axis=0) for every in drawn]
            slots.append((jnp.concatenate(maps, axis=1), jnp.concatenate(needed, axis=1)))
        return responses, slots

    def _compose(self, masks, responses):
        """Index masks [V, B, S, S] from the refined masks bool [B, K, S, S] of every stage."""
        labels = {}
        for refined, (_, groups) in zip(masks, self.stages, strict=True):
            sizes = [responses[first].classes.shape[1] for first, *_ in groups]
            parts = jnp.split(refined, np.cumsum(sizes)[:-1], axis=1)
            for part, group in zip(parts, groups, strict=True):
                for i in group:
                    closed = closing(part, self.settings[i].closing)
                    labels[i] = compose(closed, responses[i])
        return jnp.stack([labels[i] for i in range(len(responses))])


def _grouped(
    numbers: Iterable[int], settings: Sequence[SegmentationConfig], *keys: str
) -> list[list[int]]:
    """The numbers of settings, grouped by equal values of `keys` in order of appearance."""
    groups: dict[tuple, list[int]] = {}
    for i in numbers:
        groups.setdefault(tuple(getattr(settings[i], key) for key in keys), []).append(i)
    return list(groups.values())
