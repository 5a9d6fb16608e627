"""The paper's zero-shot protocol: images and class embeddings -> index masks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simseg_jax.data.augment import denormalized_uint8, normalize
from simseg_jax.masks.densecrf import import_pydensecrf, pydensecrf_masks
from simseg_jax.masks.postprocess import (
    adaptive_threshold,
    candidate_classes,
    closing,
    compose,
    min_max,
    upsample,
)
from simseg_jax.models.simseg import SimSeg, l2_normalize
from simseg_jax.sharding import local_rows


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


def respond(model: SimSeg, class_embeddings: jax.Array, images: jax.Array, settings) -> Response:
    """Scores, threshold, candidates and similarity maps of normalised images [B, H, W, 3]."""
    embedding, patches = model.encode_image(images, m=settings.m_image)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.matmul(embedding, class_embeddings.T, precision=highest)
    threshold = adaptive_threshold(scores, settings.top_k, settings.sigma_weight)
    classes, drawn = candidate_classes(scores, threshold, settings.candidates)
    patches = l2_normalize(patches)
    side = model.image_encoder.patch_embed.patch_size
    grid = (images.shape[1] // side, images.shape[2] // side)
    maps = jnp.einsum("bnd,bkd->bkn", patches, class_embeddings[classes], precision=highest)
    own = jnp.einsum("bnd,bd->bn", patches, embedding, precision=highest)
    return Response(
        scores,
        threshold,
        classes,
        drawn,
        maps.reshape(*maps.shape[:2], *grid),
        own.reshape(-1, *grid),
    )


def paper_protocol(graphdef: nnx.GraphDef, settings) -> Callable:
    """predict(params, class_embeddings [C, D], images uint8 [B, S, S, 3]) -> (masks, response).

    settings: an entry of `config.evals.seg`. masks: int32 [B, S, S], 0 where no class is set.
    """

    def answer(params, class_embeddings, images) -> Response:
        model = nnx.merge(graphdef, params)
        return respond(model, class_embeddings, normalize(images), settings)

    def finish(masks: jax.Array, response: Response) -> jax.Array:
        closed = closing(masks, settings.closing)
        return compose(closed, response.scores, response.classes, response.drawn)

    def predict_without_refinement(params, class_embeddings, images):
        response = answer(params, class_embeddings, images)
        factor = images.shape[1] // response.similarity.shape[-1]
        masks = upsample(min_max(response.similarity) > 0.5, factor)
        return finish(masks, response), response

    if settings.refine == "none":
        return jax.jit(predict_without_refinement)
    import_pydensecrf()
    answer_jit, finish_jit = jax.jit(answer), jax.jit(finish)

    def predict_with_crf(params, class_embeddings, images):
        response = answer_jit(params, class_embeddings, images)
        factor = images.shape[1] // response.similarity.shape[-1]
        probabilities = upsample(min_max(response.similarity), factor)
        local = zip(*map(local_rows, (images, probabilities, response.drawn)), strict=True)
        masks = np.stack([_crf_of_drawn(*row) for row in local])
        masks = jax.make_array_from_process_local_data(probabilities.sharding, masks)
        return finish_jit(masks, response), response

    return predict_with_crf


def _crf_of_drawn(image: np.ndarray, probabilities: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    # Candidates below the threshold never show: leave out their CRF, by far the slowest step.
    masks = np.zeros(probabilities.shape, bool)
    masks[drawn] = pydensecrf_masks(denormalized_uint8(image), probabilities[drawn])
    return masks
