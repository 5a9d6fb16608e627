"""Class embeddings from prompt templates (method of the paper, section 3.3)."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simseg_jax.data.text import TextEncoder
from simseg_jax.models.simseg import bind, l2_normalize

CHUNK = 128


class Prompts(NamedTuple):
    """P tokenised prompts of C classes."""

    ids: np.ndarray  # int [P, T]
    mask: np.ndarray  # bool [P, T], False on padding
    classes: np.ndarray  # int [P], the class each belongs to: 0..C-1, none left out


def tokenize_prompts(
    encoder: TextEncoder, names: Sequence[Sequence[str]], templates: Sequence[str]
) -> Prompts:
    """Every template filled with every name of every class."""
    owners = [(name, c) for c, synonyms in enumerate(names) for name in synonyms]
    texts = [template.format(name) for name, _ in owners for template in templates]
    ids, mask = encoder.batch(texts)
    return Prompts(ids, mask, np.repeat([c for _, c in owners], len(templates)))


def class_embedder(graphdef: nnx.GraphDef, devices: int = 1) -> Callable:
    """embed(params, prompts, m_text) -> unit-length class embeddings float32 [C, D].

    Each prompt is pooled over its `m_text` strongest words (padding masked) and normalised; the
    mean over the prompts of a class is normalised again. One compiled program serves any number of
    prompts: they pass in chunks.
    """
    chunk = -(-CHUNK // devices) * devices

    @functools.partial(jax.jit, static_argnames="m_text")
    def embed_chunk(params, ids, mask, m_text):
        model = bind(graphdef, params)
        return model.encode_text(ids, mask, m=m_text, mask_padding=True)

    def embed(params, prompts: Prompts, m_text: int) -> jax.Array:
        parts = []
        for start in range(0, len(prompts.ids), chunk):
            rows = slice(start, start + chunk)
            padding = ((0, chunk - len(prompts.ids[rows])), (0, 0))
            ids, mask = (np.pad(x[rows], padding) for x in (prompts.ids, prompts.mask))
            parts.append(embed_chunk(params, ids, mask.astype(bool), m_text=m_text))
        embeddings = jnp.concatenate(parts)[: len(prompts.ids)]
        counts = np.bincount(prompts.classes).astype(np.float32)
        total = jax.ops.segment_sum(embeddings, prompts.classes, len(counts))
        return l2_normalize(total / counts[:, None])

    return embed
