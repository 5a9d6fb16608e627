"""Trains a word-piece vocabulary from captions, for data that BERT's vocabulary does not fit."""

from collections import Counter
from collections.abc import Iterable

from simseg_jax.data.text import SPECIAL
from simseg_jax.runtime.errors import UserError

LARGEST_ALPHABET = 1000  # Rarer characters become [UNK].
MIN_COUNT = 2  # A merged piece has to occur twice.


def train_vocabulary(captions: Iterable[str], size: int) -> list[str]:
    """At most `size` tokens of an uncased WordPiece vocabulary for BERT, in the order of their ids.

    These are the special tokens, [PAD] first, the characters that begin words, those that continue
    words (`##x`), and merged pieces that occur at least twice. The same captions give the same
    tokens. A file with one token per line is a vocab.txt for `data.text.load_tokenizer`.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for caption in captions:
        normal = normalizer.normalize_str(caption)
        words.update(word for word, _ in splitter.pre_tokenize_str(normal))
    if not words:
        raise UserError("A vocabulary cannot be trained without captions: there are none.")
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    alphabet = sorted(frequent[:LARGEST_ALPHABET])
    inner = {character for word in words for character in word[1:]}
    first = [*SPECIAL, *alphabet, *(f"##{c}" for c in alphabet if c in inner)]
    if size < len(first):
        raise UserError(
            f"A vocabulary of {size} tokens is too small for these captions: the special tokens "
            f"and the single characters alone are {len(first)}."
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=MIN_COUNT,
        # The trainer would number `##x` in the random order of a hash map and break ties between
        # merges by these numbers. Special tokens keep their order.
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{word} " * words[word] for word in sorted(words)), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)
