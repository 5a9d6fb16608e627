"""Vocabulary, tokenisation, and the perturbation of captions in training (supplement A.1)."""

import functools
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simseg_jax.data import shapes
from simseg_jax.models.bert import PAD
from simseg_jax.runtime.errors import UserError, reading
from simseg_jax.runtime.files import read_json

MASK_SHARE, RANDOM_SHARE = 0.5, 0.1  # Of the perturbed pieces; the other 40 % are deleted.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LARGEST = 64 << 20  # Most bytes of a vocabulary file; real ones have a tenth of that.
HUB_SECONDS = 5  # The longest wait for an answer of the hub.
# Upper case, accents, Chinese and punctuation: tokenizers that normalise text in different ways
# split this text differently.
PROBE = "A Photo of the Café, 中文 dogs' Été!"


def load_tokenizer(vocab: str):
    """A fast BERT tokenizer from "shapes", a vocab.txt, a saved tokenizer folder or a hub name.

    A vocab.txt is UTF-8 with one token per line; only \\n and \\r\\n end lines. do_lower_case in a
    tokenizer_config.json beside it says whether it is cased; without that file it is cased if any
    token has a capital letter. The hub's local cache is used before the network.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # On import, transformers warns that there is no PyTorch.
    try:  # Imported here: the import is slow, and the model does not need it.
        from transformers import AutoTokenizer, BertTokenizer
        from transformers.utils import logging as transformers_logging
    finally:
        logging.disable(disabled)
    transformers_logging.set_verbosity_error()
    if vocab == "shapes":
        return BertTokenizer(vocab=shapes.vocabulary())
    path = Path(vocab).expanduser()
    load = functools.partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
    with reading(
        f"the vocabulary {vocab}",
        "Set data.vocab to a vocab.txt, a tokenizer folder or the hub name of a BERT.",
    ):
        if path.is_file():
            return _read_vocabulary(path)
        if not path.is_dir():
            return _complete(vocab, _from_hub(vocab, load))
        for file in (*path.glob("*.json"), *path.glob("*.txt")):
            _refuse_large(file)
        plain = path / "vocab.txt"
        whole = (path / "tokenizer.json").is_file() or "tokenizer_class" in _settings(path)
        if plain.is_file() and not whole:
            return _read_vocabulary(plain)
        return _complete(vocab, load(path))


def vocabulary_identity(tokenizer) -> dict[str, Any]:
    """{"tokens": count, "digest": 16 hexadecimal digits}, equal for the same ids of all texts."""
    probe = tokenizer.backend_tokenizer.encode(PROBE, add_special_tokens=False).ids
    content = [sorted(tokenizer.get_vocab().items()), probe]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"tokens": len(tokenizer), "digest": digest[:16]}


def _read_vocabulary(path: Path):
    """A BERT tokenizer from a vocab.txt."""
    from transformers import BertTokenizer

    ids = _token_ids(path)
    missing = [token for token in SPECIAL if token not in ids]
    if missing:
        raise UserError(
            f"The vocabulary {path} has no {', '.join(missing)}: it is not the vocab.txt of a "
            "BERT with one token per line."
        )
    settings = _settings(path.parent)
    options = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    known = {key: settings[key] for key in options if isinstance(settings.get(key), bool)}
    words = (token for token in ids if not (token.startswith("[") and token.endswith("]")))
    cased = any(word != word.lower() for word in words)
    return BertTokenizer(vocab=ids, **{"do_lower_case": not cased, **known})


def _token_ids(path: Path) -> dict[str, int]:
    _refuse_large(path)
    data = path.read_bytes()
    if b"\0" in data or data[:2] in (b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is compressed or UTF-16: save it as plain text in UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8 in line {line}: save it as UTF-8.") from error
    # splitlines() also splits at U+2028 and seven others, which are tokens of real vocabularies.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    ids: dict[str, int] = {}
    for number, token in enumerate(lines):
        if not token or token in ids:
            what = f"repeats {token!r} of line {ids[token] + 1}" if token else "is empty"
            raise UserError(
                f"Line {number + 1} of the vocabulary {path} {what}, so the ids are ambiguous: "
                "correct the file."
            )
        ids[token] = number
    return ids


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _refuse_large(file: Path) -> None:
    if file.stat().st_size > LARGEST:
        raise UserError(f"{file} is larger than {LARGEST >> 20} MiB: it is not a vocabulary.")


def _complete(vocab: str, tokenizer):
    """`tokenizer`, after a check that it has everything that a BERT needs."""
    kinds = ("pad", "unk", "cls", "sep", "mask")
    ids = [getattr(tokenizer, f"{kind}_token_id", None) for kind in kinds]
    missing = [token for token, id_ in zip(SPECIAL, ids, strict=True) if id_ is None]
    if missing or not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"The vocabulary {vocab} has no {', '.join(missing) or 'fast tokenizer'}: it is not a "
            "BERT's. Set data.vocab to the vocabulary of a BERT, such as bert-base-uncased."
        )
    return tokenizer


def _from_hub(name: str, load: Callable):
    try:
        return load(name, local_files_only=True)
    except (OSError, ValueError):
        pass  # It is not in the hub's local cache.
    problem = _hub_problem(name)
    if problem is not None:
        raise UserError(
            f"Cannot load the vocabulary {name!r}: it is neither a vocab.txt nor a tokenizer "
            "folder here, and the hub did not provide it (check the name and the network, or "
            "download vocab.txt and set data.vocab to its path)."
        ) from problem
    return load(name)


def _hub_problem(name: str) -> Exception | None:
    """Why the hub cannot provide a repository, None if it can; answers within HUB_SECONDS."""
    from huggingface_hub import HfApi

    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=HUB_SECONDS)
            answers.append(None)
        except Exception as error:
            answers.append(error)

    # In a thread: the timeout covers neither name resolution nor several addresses of a host.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers[0] if answers else TimeoutError(f"no answer in {HUB_SECONDS} s")


class TextEncoder:
    """Captions -> token ids of fixed length; many threads may call it at once."""

    def __init__(self, tokenizer, max_length: int, edit_rate: float = 0.0):
        if tokenizer.pad_token_id != PAD:
            raise UserError(f"The vocabulary must have [PAD] as its first token, id {PAD}.")
        # The Rust tokenizer itself: its Python wrapper changes shared state in every call.
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.max_length, self.edit_rate = max_length, edit_rate
        self.vocab_size = len(tokenizer)
        self.unk, self.mask = tokenizer.unk_token_id, tokenizer.mask_token_id
        self.cls, self.sep = tokenizer.cls_token_id, tokenizer.sep_token_id

    def __call__(
        self, caption: str, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, mask bool), both [max_length]: [CLS], word pieces, [SEP] and padding.

        With `rng` the pieces are perturbed first. Long captions are cut.
        """
        return self.layout(self.pieces(caption), rng)

    def pieces(self, text: str) -> list[int]:
        """The ids of all word pieces of a text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def unknown(self, pieces: Sequence[int]) -> bool:
        """Whether no word of a text is known: all its pieces are [UNK], or it has none."""
        return all(piece == self.unk for piece in pieces)

    def layout(
        self, pieces: Sequence[int], rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a call returns, from the pieces of a text."""
        if rng is not None and self.edit_rate:
            pieces = self.perturb(pieces, rng)
        pieces = [self.cls, *pieces[: self.max_length - 2], self.sep]
        ids = np.full(self.max_length, PAD, np.int32)
        ids[: len(pieces)] = pieces
        return ids, np.arange(self.max_length) < len(pieces)

    def perturb(self, pieces: Sequence[int], rng: np.random.Generator) -> list[int]:
        """Masks, replaces or deletes each piece with probability `edit_rate`."""
        perturbed = rng.random(len(pieces)) < self.edit_rate
        action = rng.random(len(pieces))
        random_ids = rng.integers(self.vocab_size, size=len(pieces))
        result = []
        for index, piece in enumerate(pieces):
            if not perturbed[index]:
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
