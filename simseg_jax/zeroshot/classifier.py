"""Class embeddings from prompt templates (method of the paper, section 3.3)."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from simseg_jax.data.text import TextEncoder
from simseg_jax.models.simseg import bind, l2_normalize
from simseg_jax.runtime.errors import some
from simseg_jax.zeroshot.model import Model

CHUNK = 128


class Prompts(NamedTuple):
    """P tokenised prompts of C classes."""

    ids: np.ndarray  # int [P, T]
    mask: np.ndarray  # bool [P, T], False on padding
    classes: np.ndarray  # int [P], the class each belongs to: 0..C-1, none left out


def tokenize_prompts(
    encoder: TextEncoder, names: Sequence[Sequence[str]], templates: Sequence[str]
) -> Prompts:
    """Every template filled with every name of every class; reports names without a known word."""
    unknown = unknown_words(encoder, [name for synonyms in names for name in synonyms])
    if unknown and jax.process_index() == 0:
        tqdm.write(
            f"The vocabulary knows no word of these class names: {some(unknown)}. To the model "
            "they are [UNK]: their scores mean nothing.",
            file=sys.stderr,
        )
    owners = [(name, c) for c, synonyms in enumerate(names) for name in synonyms]
    texts = [template.format(name) for name, _ in owners for template in templates]
    ids, mask = encoder.batch(texts)
    return Prompts(ids, mask, np.repeat([c for _, c in owners], len(templates)))


def unknown_words(encoder: TextEncoder, names: Sequence[str]) -> list[str]:
    """The names that are nothing but [UNK] to the model, or nothing at all."""
    return [name for name in names if encoder.unknown(encoder.pieces(name))]


def class_embedder(model: Model) -> Callable:
    """embed(params, prompts, m_text) -> unit-length class embeddings float32 [C, D].

    Each prompt is embedded as by `text_embedder`; the mean over the prompts of a class is
    normalised again.
    """
    embed_texts = text_embedder(model)

    def embed(params, prompts: Prompts, m_text: int) -> jax.Array:
        embeddings = embed_texts(params, prompts.ids, prompts.mask, m_text)
        counts = np.bincount(prompts.classes).astype(np.float32)
        total = jax.ops.segment_sum(embeddings, prompts.classes, len(counts))
        return l2_normalize(total / counts[:, None])

    return embed


def text_embedder(model: Model) -> Callable:
    """embed(params, ids, mask, m_text) -> unit-length embeddings float32 [P, D] of P texts.

    ids, mask: [P, T]. Each text is pooled over its `m_text` strongest words, padding masked. One
    compiled program serves any number of texts: they pass in chunks.
    """
    graphdef, devices = model.graphdef, model.local_mesh.size
    chunk = -(-CHUNK // devices) * devices

    @functools.partial(jax.jit, static_argnames="m_text")
    def embed_chunk(params, ids, mask, m_text):
        return bind(graphdef, params).encode_text(ids, mask, m=m_text, mask_padding=True)

    def embed(params, ids: np.ndarray, mask: np.ndarray, m_text: int) -> jax.Array:
        parts = []
        for start in range(0, len(ids), chunk):
            part = [x[start : start + chunk] for x in (ids, mask)]
            padding = ((0, chunk - len(part[0])), (0, 0))
            padded = [np.pad(x, padding) for x in part]
            parts.append(embed_chunk(params, padded[0], padded[1].astype(bool), m_text=m_text))
        return jnp.concatenate(parts)[: len(ids)]

    return embed
