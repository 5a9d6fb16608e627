import importlib
import sys

import pytest

COMMANDS = {
    "main --config=x --workdir=x": ["--profile"],
    "ablate --config=x --workdir=x": ["--only"],
    "evaluate --checkpoint=x": ["--pictures", "--step"],
    "segment x --checkpoint=x --words=x --output=x": [
        *("--step", "--resolution", "--batch_size", "--sigma_weight")
    ],
    "convert x": ["--step", "--image_heads", "--text_heads", "--resolution"],
    "figures responses --checkpoint=x --output=x --image=x --caption=x": ["--resolution"],
    "figures gallery --checkpoint=x --output=x": ["--count"],
    "data.inspect --config=x": ["--batch", "--count", "--seconds"],
    "data.prepare x --output=x": [
        *("--short_side", "--quality", "--max_bad", "--max_pixels", "--seed", "--shards"),
        *("--train_vocab", "--processes", "--size"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_that_make_no_sense_are_refused_by_the_parser(monkeypatch, capsys, command):
    name, *arguments = command.split()
    package = ".__main__" if name == "data.prepare" else ""
    module = importlib.import_module(f"simseg_jax.{name}{package}")
    for option in COMMANDS[command]:
        for value in ("abc", "", "-1e9", "nan", "1e400", "9" * 5000):
            monkeypatch.setattr(sys, "argv", [name, *arguments, f"{option}={value}"])
            with pytest.raises(SystemExit) as stop:
                module.main()
            assert stop.value.code == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert f"error: argument {option}: " in line
            assert " must be a " in line
            assert len(line) < 250
