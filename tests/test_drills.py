import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import damage
import drill_cases
import drills

from simseg_jax.runtime.errors import UserError


def test_verdicts(tmp_path):
    def verdict(error: BaseException | None) -> str:
        def case(_rng, _place) -> None:
            if error:
                raise error

        return drills.judged(case, np.random.default_rng(0), tmp_path)[0]

    assert verdict(None) == "right"
    assert verdict(UserError("one line")) == "refused"
    assert verdict(UserError("two\nlines")) == "traceback"
    assert verdict(ValueError("x")) == "traceback"
    assert verdict(drill_cases.WrongError("x")) == "wrong"
    refused = UserError("too large")
    refused.__cause__ = MemoryError()
    assert verdict(refused) == "memory"


def test_damage_repeats_itself_and_damages():
    data = bytes(range(256)) * 8
    results = [damage.damaged(data, np.random.default_rng(seed)) for seed in range(50)]
    assert results == [damage.damaged(data, np.random.default_rng(seed)) for seed in range(50)]
    assert sum(result != data for result in results) > 40
    assert all(len(result) <= 2 * len(data) for result in results)


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("captions", (1, 2, 4, 6, 9, 11)),
        ("settings", (0, 1, 3)),
        ("weights", range(12)),
        pytest.param("settings", (2, 4, 5), marks=pytest.mark.slow),
    ],
)
def test_a_few_cases_of_a_kind(tmp_path, name, seeds):
    (tmp_path / "config.py").write_text(drill_cases.CONFIG)
    case = drills.KINDS[name].prepare(tmp_path)
    for seed in seeds:
        place = tmp_path / str(seed)
        place.mkdir()
        verdict, report = drills.judged(case, np.random.default_rng(seed), place)
        assert verdict in ("right", "refused"), report


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["drills.py", "--only=captions", "--rounds=4"])
    drills.main()
    assert capsys.readouterr().out.startswith("captions: 4 cases, ")
