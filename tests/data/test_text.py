import gzip
import json
import os
import runpy
import socket
import time

import huggingface_hub
import numpy as np
import pytest
from scipy import stats

from simseg_jax.data import text
from simseg_jax.data.text import HUB_SECONDS, TextEncoder, load_tokenizer, vocabulary_identity
from simseg_jax.runtime.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Where str.splitlines cuts beside line ends; the second to last is a token of bert-base-chinese.
SEPARATORS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


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
    caption = "a star near the moon"
    plain = TextEncoder(tokenizer, 12)(caption)[0]
    edited = TextEncoder(tokenizer, 12, edit_rate=0.9)
    np.testing.assert_array_equal(edited(caption)[0], plain)
    assert not np.array_equal(edited(caption, np.random.default_rng(0))[0], plain)


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


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_a_token_ends_with_its_line_only(tmp_path, end, mark, last):
    tokens = [*SPECIAL, "dog", *SEPARATORS, "x\u2028y", "\u3000", "cat", "##s"]
    vocab = tmp_path / "vocab.txt"
    vocab.write_bytes((mark + end.join(tokens) + last * end).encode())
    for source in (vocab, tmp_path):
        tokenizer = load_tokenizer(str(source))
        assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tokens)}
        ids, _ = TextEncoder(tokenizer, 6)("cats")
        np.testing.assert_array_equal(ids, [2, tokens.index("cat"), tokens.index("##s"), 3, 0, 0])


def test_ids_are_those_of_transformers(tmp_path):
    from transformers import BertTokenizer

    words = ["dog", "cat", "\u2028", "the", "##s", "é", "中", "."]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf-8")
    ours, theirs = load_tokenizer(str(tmp_path)), BertTokenizer.from_pretrained(str(tmp_path))
    for caption in ("The dogs. 中中", "cats\u2028dog", "Zebra"):
        assert ours(caption)["input_ids"] == theirs(caption)["input_ids"]


@pytest.mark.parametrize(
    ("words", "settings", "dog"),
    [
        (["dog", "Dog"], None, "Dog"),
        (["dog", "[Q]"], None, "dog"),
        (["dog", "Dog"], {"do_lower_case": True}, "dog"),
        (["dog"], {"do_lower_case": False}, "[UNK]"),
        (["dog"], {"do_lower_case": True, "strip_accents": False}, "dog"),
    ],
)
def test_casing_follows_the_settings_or_else_the_tokens(tmp_path, words, settings, dog):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *words]))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for source in (tmp_path / "vocab.txt", tmp_path):
        tokenizer = load_tokenizer(str(source))
        pieces = TextEncoder(tokenizer, 6).pieces("Dog")
        assert tokenizer.convert_ids_to_tokens(pieces)[0] == dog


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"[PAD]\n[UNK]"), "compressed or UTF-16"),
        ("\n".join(SPECIAL).encode("utf-16"), "compressed or UTF-16"),
        ("\n".join(SPECIAL).encode("utf-16-le"), "compressed or UTF-16"),
        ("\n".join([*SPECIAL, "dog", "café"]).encode("latin-1"), "not UTF-8 in line 7"),
        ("\n".join([*SPECIAL, "", "dog"]).encode(), "Line 6 of .* is empty"),
        ("\n".join([*SPECIAL, "dog", "\n"]).encode(), "Line 7 of .* is empty"),
        ("\n".join([*SPECIAL, "dog", "cat", "dog"]).encode(), "Line 8 .* repeats 'dog' of line 6"),
        (b"", "Line 1 of .* is empty"),
        (b"<s>\n<pad>\n</s>\n<unk>\ndog", r"has no \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        (b'{"dog": 0,\n"cat": 1}', r"has no \[PAD\]"),
        (b"\n".join(s.encode() for s in SPECIAL[:-1]), r"has no \[MASK\]: it is not the vocab"),
    ],
    ids=range(11),
)
def test_a_vocab_txt_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    for source in (tmp_path / "vocab.txt", tmp_path):
        with pytest.raises(UserError, match=message) as refused:
            load_tokenizer(str(source))
        assert len(str(refused.value)) < 400


def test_large_files_are_not_read(tmp_path):
    with (tmp_path / "vocab.txt").open("wb") as file:
        file.truncate(10 << 30)
    for source in (tmp_path / "vocab.txt", tmp_path):
        with pytest.raises(UserError, match="larger than 64 MiB"):
            load_tokenizer(str(source))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"[]", b"7", b"{", b"\xff", b"[" * 200_000, b'{"tokenizer_class": 7, "model": {}}'],
    ids=range(6),
)
def test_damaged_tokenizer_folders_are_refused(tmp_path, tokenizer, name, content):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"vocabulary {tmp_path}") as refused:
        load_tokenizer(str(tmp_path))
    assert len(str(refused.value)) < 500


def test_code_in_a_folder_is_not_run(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(UserError, match="custom code"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_tokenizers_of_other_models_are_refused(tmp_path):
    """As of GPT-2: one special token for all purposes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<|end|>": 2}, merges=[]))
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    PreTrainedTokenizerFast(tokenizer_object=plain, **tokens).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no \[PAD\], \[CLS\], \[SEP\], \[MASK\]: it is not"):
        load_tokenizer(str(tmp_path))


def test_identity_is_that_of_tokens_ids_and_normalisation(tmp_path, tokenizer):
    def identity(tokens, **settings):
        (tmp_path / "vocab.txt").write_text("\n".join(tokens))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return vocabulary_identity(load_tokenizer(str(tmp_path / "vocab.txt")))

    tokens = [*SPECIAL, "dog", "cat", "a", "A"]
    first = identity(tokens)
    assert first["tokens"] == 9
    assert identity(tokens) == first
    swapped = [*SPECIAL, "cat", "dog", "a", "A"]
    others = identity(swapped), identity(tokens, do_lower_case=True), identity([*tokens, "x"])
    assert len({other["digest"] for other in others} | {first["digest"]}) == 4
    tokenizer.save_pretrained(tmp_path / "saved")
    assert vocabulary_identity(load_tokenizer(str(tmp_path / "saved"))) == vocabulary_identity(
        tokenizer
    )


@pytest.mark.parametrize("failure", ["at once", "silence"])
def test_without_a_network_the_hub_fails_within_seconds(monkeypatch, failure):
    """Neither retries nor a silent name server make anybody wait."""

    def resolve(*_arguments, **_options):
        if failure == "silence":
            time.sleep(2 * HUB_SECONDS)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    if failure == "silence":
        monkeypatch.setattr("simseg_jax.data.text.HUB_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match="Cannot load the vocabulary 'google/nothing'"):
        load_tokenizer("google/nothing")
    assert time.monotonic() - began < HUB_SECONDS


def test_a_local_copy_of_the_hub_is_enough(tmp_path, monkeypatch, tokenizer):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    tokenizer.save_pretrained(snapshot)
    (snapshot / "config.json").write_text('{"model_type": "bert"}')
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_tokenizer("owner/name").get_vocab() == tokenizer.get_vocab()


def test_unknown_texts(tokenizer):
    encoder = TextEncoder(tokenizer, 8)
    unknown = [
        t for t in ("", "жук", "star", "жук star", "жук 虫") if encoder.unknown(encoder.pieces(t))
    ]
    assert unknown == ["", "жук", "жук 虫"]


def test_importing_changes_no_environment():
    before = dict(os.environ)
    runpy.run_path(text.__file__)
    load_tokenizer("shapes")
    assert dict(os.environ) == before
