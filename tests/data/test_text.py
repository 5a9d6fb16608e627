import numpy as np
import pytest
from scipy import stats

from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("shapes")


def test_layout_of_ids_and_mask(tokenizer):
    ids, mask = TextEncoder(tokenizer, max_length=8)("a star near the moon")
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    assert tokens == ["[CLS]", "a", "star", "near", "the", "moon", "[SEP]", "[PAD]"]
    np.testing.assert_array_equal(mask, np.arange(8) < 7)
    assert (ids.dtype, mask.dtype) == (np.int32, bool)


def test_equals_the_hugging_face_call(tokenizer):
    texts = ["A star, near the Moon!", "star " * 40, ""]
    expected = tokenizer(texts, padding="max_length", max_length=12, truncation=True)
    ids, mask = TextEncoder(tokenizer, max_length=12).batch(texts)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])


def test_perturbation_statistics(tokenizer):
    encoder = TextEncoder(tokenizer, max_length=25, edit_rate=0.2)
    star = tokenizer.convert_tokens_to_ids("star")
    rng = np.random.default_rng(0)
    count = 100_000
    result = np.array(encoder.perturb([star] * count, rng))
    found = np.bincount(result, minlength=len(tokenizer))
    # One piece in fifty becomes any token of the vocabulary, [MASK] and "star" included.
    expected = np.full(len(tokenizer), count * 0.2 * 0.1 / len(tokenizer))
    expected[tokenizer.mask_token_id] += count * 0.2 * 0.5
    expected[star] += count * 0.8
    deleted = count - len(result)
    chi_square = stats.chisquare([*found, deleted], [*expected, count * 0.2 * 0.4])
    assert chi_square.pvalue > 1e-4


def test_perturbation_needs_a_generator_and_a_rate(tokenizer):
    text = "a star near the moon"
    plain = TextEncoder(tokenizer, 12)(text)[0]
    edited = TextEncoder(tokenizer, 12, edit_rate=0.9)
    np.testing.assert_array_equal(edited(text)[0], plain)
    assert not np.array_equal(edited(text, np.random.default_rng(0))[0], plain)


def test_vocabularies_from_files(tmp_path, tokenizer):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "##s"]))
    ids, _ = TextEncoder(load_tokenizer(str(vocab)), 6)("dogs cat")
    np.testing.assert_array_equal(ids, [2, 5, 6, 1, 3, 0])
    tokenizer.save_pretrained(tmp_path / "saved")
    assert len(load_tokenizer(str(tmp_path / "saved"))) == len(tokenizer)


def test_unusable_vocabularies_are_explained(tmp_path):
    with pytest.raises(UserError, match="Cannot load the vocabulary 'no/such-model'"):
        load_tokenizer("no/such-model")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["dog", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    with pytest.raises(UserError, match=r"\[PAD\] as its first token"):
        TextEncoder(load_tokenizer(str(vocab)), 6)
