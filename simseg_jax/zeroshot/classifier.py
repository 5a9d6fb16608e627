"""Class embeddings from prompt templates (method of the paper, section 3.3)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simseg_jax.data.text import TextEncoder
from simseg_jax.models.simseg import l2_normalize

CHUNK = 128


def tokenize_prompts(
    encoder: TextEncoder, class_names: Sequence[str], templates: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and masks [classes, templates, max_length] of every template filled with every name."""
    texts = [template.format(name) for name in class_names for template in templates]
    ids, mask = encoder.batch(texts)
    shape = (len(class_names), len(templates), -1)
    return ids.reshape(shape), mask.reshape(shape)


def class_embedder(graphdef: nnx.GraphDef, m_text: int, devices: int = 1) -> Callable:
    """embed(params, ids, mask) -> unit-length class embeddings float32 [classes, D].

    ids, mask: [classes, templates, T]. Each prompt is pooled over its `m_text` strongest words
    (padding masked) and normalised; the mean over templates is normalised again. One compiled
    program serves any number of prompts: they pass in chunks.
    """
    chunk = -(-CHUNK // devices) * devices

    @jax.jit
    def embed_chunk(params, ids, mask):
        model = nnx.merge(graphdef, params)
        return model.encode_text(ids, mask, m=m_text, mask_padding=True)

    def embed(params, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        classes, templates, length = ids.shape
        ids, mask = ids.reshape(-1, length), mask.reshape(-1, length).astype(bool)
        parts = []
        for start in range(0, len(ids), chunk):
            rows = slice(start, start + chunk)
            padding = ((0, chunk - len(ids[rows])), (0, 0))
            part = embed_chunk(params, np.pad(ids[rows], padding), np.pad(mask[rows], padding))
            parts.append(part)
        embeddings = jnp.concatenate(parts)[: classes * templates]
        return l2_normalize(embeddings.reshape(classes, templates, -1).mean(axis=1))

    return embed
