"""Training a vocabulary: order, determinism, use by the tokenizer, errors."""

import subprocess
import sys

import pytest

from simseg_jax.data import shapes
from simseg_jax.data.prepare.vocabulary import SPECIAL, train_vocabulary
from simseg_jax.data.text import load_tokenizer
from simseg_jax.runtime.errors import UserError

CAPTIONS = [shapes.scene(i, "train")[2] for i in range(200)]


def test_frequent_words_become_tokens_and_the_tokenizer_loads_them(tmp_path):
    tokens = train_vocabulary([*CAPTIONS, "Café Ärger, WHEELS!"], 300)
    assert tuple(tokens[:5]) == SPECIAL
    assert len(tokens) == len(set(tokens)) <= 300
    assert {"wheel", "heart", ",", "!"} <= set(tokens)
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.tokenize("A Wheel next to a héart!") == [
        *("a", "wheel", "next", "to", "a", "heart", "!")
    ]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    assert tokenizer.unk_token_id not in tokenizer("cafe wheels").input_ids
    assert len(tokenizer) == len(tokens)


def test_other_processes_train_the_same_vocabulary():
    # Hash maps differ between processes, not within one.
    script = (
        "from simseg_jax.data import shapes; from simseg_jax.data.prepare.vocabulary import *;"
        "print(train_vocabulary([shapes.scene(i, 'train')[2] for i in range(200)], 120))"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert other.stdout.strip() == str(train_vocabulary(iter(CAPTIONS), 120))
    assert len(train_vocabulary(CAPTIONS, 120)) == 120


def test_rare_characters_are_left_out():
    rare = [chr(0x4E00 + i) for i in range(1200)]
    tokens = train_vocabulary(["a bc abc", "a bc abc", *rare], 3000)
    assert {"a", "b", "##b", "##c", "abc"} <= set(tokens)
    assert len([token for token in tokens if len(token) == 1]) == 1000


def test_errors_say_what_is_wrong():
    with pytest.raises(UserError, match="there are none"):
        train_vocabulary(["", " "], 100)
    with pytest.raises(UserError, match=r"20 tokens is too small .* alone are \d\d"):
        train_vocabulary(CAPTIONS, 20)
