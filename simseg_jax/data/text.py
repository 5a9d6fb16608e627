"""Vocabulary, tokenisation and the caption perturbation of training (supplement A.1)."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simseg_jax.data import shapes
from simseg_jax.errors import UserError
from simseg_jax.models.bert import PAD

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

MASK_SHARE, RANDOM_SHARE = 0.5, 0.1  # of the touched pieces; the remaining 40 % are deleted


def load_tokenizer(vocab: str):
    """A fast BERT tokenizer from "shapes", a vocab.txt, a saved tokenizer folder or a hub name."""
    # Slow to import, and not needed by the model itself.
    from transformers import AutoTokenizer, BertTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    if vocab == "shapes":
        return BertTokenizer(vocab=shapes.vocabulary())
    path = Path(vocab).expanduser()
    if path.is_file():
        tokens = path.read_text(encoding="utf-8").splitlines()
        return BertTokenizer(vocab={t: i for i, t in enumerate(tokens)})
    try:
        return AutoTokenizer.from_pretrained(path if path.is_dir() else vocab)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot load the vocabulary {vocab!r}: it is neither a vocab.txt nor a tokenizer "
            "folder here, and the hub did not provide it (check the name and the network, or "
            "download vocab.txt and set data.vocab to its path)."
        ) from error


class TextEncoder:
    """Captions -> fixed-length token ids; safe to call from many threads at once."""

    def __init__(self, tokenizer, max_length: int, edit_rate: float = 0.0):
        if tokenizer.pad_token_id != PAD:
            raise UserError(f"The vocabulary must have [PAD] as its first token, id {PAD}.")
        # The Rust tokenizer itself: the Python wrapper changes shared state on every call.
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.max_length, self.edit_rate = max_length, edit_rate
        self.vocab_size = len(tokenizer)
        self.cls, self.sep, self.mask = (
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.mask_token_id,
        )

    def __call__(
        self, caption: str, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, mask bool), both [max_length]: [CLS] pieces [SEP] and padding.

        With `rng` the pieces are perturbed first. Long captions are cut.
        """
        pieces = self.backend.encode(caption, add_special_tokens=False).ids
        if rng is not None and self.edit_rate:
            pieces = self.perturb(pieces, rng)
        pieces = [self.cls, *pieces[: self.max_length - 2], self.sep]
        ids = np.full(self.max_length, PAD, np.int32)
        ids[: len(pieces)] = pieces
        return ids, np.arange(self.max_length) < len(pieces)

    def perturb(self, pieces: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Touches each piece with probability `edit_rate`: mask, random token or deletion."""
        touched = rng.random(len(pieces)) < self.edit_rate
        action = rng.random(len(pieces))
        random_ids = rng.integers(self.vocab_size, size=len(pieces))
        result = []
        for index, piece in enumerate(pieces):
            if not touched[index]:
                result.append(piece)
            elif action[index] < MASK_SHARE:
                result.append(self.mask)
            elif action[index] < MASK_SHARE + RANDOM_SHARE:
                result.append(int(random_ids[index]))
        return result

    def batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of several unperturbed texts, each [len(texts), max_length]."""
        ids, masks = zip(*(self(text) for text in texts), strict=True)
        return np.stack(ids), np.stack(masks)
