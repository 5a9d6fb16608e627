"""Class embeddings from prompt templates (section 3.3 of the paper)."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from simseg_jax.data.text import TextEncoder
from simseg_jax.models.simseg import bind
from simseg_jax.runtime.errors import some
from simseg_jax.zeroshot.model import Model

CHUNK = 128  # Texts per call of the compiled program.


class Prompts(NamedTuple):
    """P tokenised prompts of C classes."""

    ids: np.ndarray  # int [P, T]
    mask: np.ndarray  # bool [P, T], False on padding
    classes: np.ndarray  # int [P], the class of each prompt; every class 0..C-1 occurs


def tokenize_prompts(
    encoder: TextEncoder, names: Sequence[Sequence[str]], templates: Sequence[str]
) -> Prompts:
    """Fills every template with every name of every class and tokenises the results.

    Names without any known word are reported on stderr.
    """
    unknown = unknown_words(encoder, [name for synonyms in names for name in synonyms])
    if unknown and jax.process_index() == 0:
        tqdm.write(
            f"The vocabulary knows no word of these class names: {some(unknown)}. The model sees "
            "them as [UNK], so their scores mean nothing.",
            file=sys.stderr,
        )
    owners = [(name, c) for c, synonyms in enumerate(names) for name in synonyms]
    texts = [template.format(name) for name, _ in owners for template in templates]
    ids, mask = encoder.batch(texts)
    return Prompts(ids, mask, np.repeat([c for _, c in owners], len(templates)))


def unknown_words(encoder: TextEncoder, names: Sequence[str]) -> list[str]:
    """The names whose tokens are all [UNK], or that have no tokens."""
    return [name for name in names if encoder.unknown(encoder.pieces(name))]


def class_embedder(model: Model) -> Callable:
    """embed(params, prompts, m_text) -> unit-length class embeddings float32 [C, D].

    `text_embedder` embeds each prompt; a class embedding is the mean over the class's prompts,
    normalised again.
    """
    embed_texts = text_embedder(model)

    def embed(params, prompts: Prompts, m_text: int) -> Float[np.ndarray, "C D"]:
        embeddings = embed_texts(params, prompts.ids, prompts.mask, m_text)
        counts = np.bincount(prompts.classes)
        # On the host: a program would be compiled for every number of classes.
        total = np.zeros((len(counts), embeddings.shape[1]), np.float32)
        np.add.at(total, prompts.classes, embeddings)
        mean = total / counts[:, None].astype(np.float32)
        return mean / (np.linalg.norm(mean, axis=1, keepdims=True) + np.float32(1e-8))

    return embed


def text_embedder(model: Model) -> Callable:
    """embed(params, ids, mask, m_text) -> unit-length embeddings float32 [P, D] of P texts.

    ids, mask: [P, T]. Each channel is pooled over its `m_text` largest values, without padding.
    The texts pass in chunks of fixed size, so that one compiled program serves any number.
    """
    graphdef, devices = model.graphdef, model.local_mesh.size
    chunk = -(-CHUNK // devices) * devices

    @functools.partial(jax.jit, static_argnames="m_text")
    def embed_chunk(params, ids, mask, m_text):
        return bind(graphdef, params).encode_text(ids, mask, m=m_text, mask_padding=True)

    def embed(params, ids: np.ndarray, mask: np.ndarray, m_text: int) -> Float[np.ndarray, "P D"]:
        padding = ((0, -len(ids) % chunk), (0, 0))
        padded_ids, padded_mask = np.pad(ids, padding), np.pad(mask, padding).astype(bool)
        parts = []
        for start in range(0, len(ids), chunk):
            rows = slice(start, start + chunk)
            parts.append(embed_chunk(params, padded_ids[rows], padded_mask[rows], m_text=m_text))
        return np.concatenate([np.asarray(part) for part in parts])[: len(ids)]

    return embed
