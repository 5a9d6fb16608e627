import dataclasses
import json
import re
from pathlib import Path

import pytest
from support import tiny_config

from simseg_jax.config import (
    RunConfig,
    classification_eval,
    data_set,
    default_config,
    first_segmentation,
    from_file,
    load_config,
    model_config,
    resolved,
    retrieval_eval,
    run_config,
    segmentation_eval,
)
from simseg_jax.data.prepare.shards import Job
from simseg_jax.data.testsets.classes import label_set
from simseg_jax.evaluators.probe import ProbeConfig
from simseg_jax.models.bert import BertConfig
from simseg_jax.models.vit import ViTConfig
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.settings import declared, describe, leaves, overridden, plain, to_json
from simseg_jax.segmenter import words_of

# A class whose fields are settings.
SETTINGS = r"class (\w+).*:\n(?:.+\n|\n    )*?    \w+: .+ = setting\("
PACKAGE = Path(__file__).parents[1] / "simseg_jax"
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_file_loads_and_documents_itself(path):
    if path.stem == "linear_probe":
        load_config(path, kind=ProbeConfig)
    else:
        config = load_config(path)
        assert run_config(json.loads(to_json(config))) == config
    docstring = path.read_text().split('"""')[1]
    for part in ("python -m simseg_jax.", "Hardware", "Expected"):
        assert part in docstring


def test_defaults_are_the_papers_recipe():
    config = run_config(default_config())
    assert (config.optim.lr, config.optim.b2, config.optim.eps) == (3e-4, 0.98, 1e-6)
    assert (config.optim.weight_decay, config.optim.warmup, config.optim.final_lr) == (
        0.2,
        0.025,
        0.1,
    )
    assert (config.model.m_image, config.model.m_text, config.model.mask_padding) == (5, 5, False)
    assert (config.batch_size, config.model.embed_dim, config.data.max_length) == (4096, 512, 25)
    architecture = model_config(config, vocab_size=30522)
    assert (architecture.image, architecture.text) == (ViTConfig(), BertConfig.base())
    protocol = segmentation_eval()
    assert (protocol.resolution, protocol.m_image, protocol.m_text) == (288, 5, 1)
    assert (protocol.sigma_weight, protocol.candidates) == (1.0, 5)


@pytest.mark.parametrize(
    ("data", "expected"), [("voc", 10), ("context", 30), ("coco_object", 10), ("shapes", 10)]
)
def test_the_number_of_scores_for_the_threshold_belongs_to_the_data(data, expected):
    config = default_config()
    config.evals.seg.own = segmentation_eval(data=data)
    config.evals.seg.given = segmentation_eval(data=data, top_k=7)
    # Chosen after the entry was made, as by an override of a checkpoint's test set.
    config.evals.seg.later = segmentation_eval()
    config = overridden(RunConfig, config.to_dict(), [f"--config.evals.seg.later.data={data}"])
    scores = {name: entry.class_scores for name, entry in config.evals.seg.items()}
    assert scores == {"own": expected, "given": 7, "later": expected}
    shown = {name: entry.top_k for name, entry in resolved(config).evals.seg.items()}
    assert shown == {"own": expected, "given": 7, "later": expected}
    # The configuration itself keeps the choice open.
    assert config.evals.seg["own"].top_k == 0
    with pytest.raises(UserError, match="top_k=1 must be 0, for the test set's number, or"):
        overridden(RunConfig, plain(config), ["--config.evals.seg.own.top_k=1"])


@pytest.mark.parametrize(("first", "expected"), [("Background", 10), ("sky", 30), (None, 0)])
def test_a_list_of_classes_decides_the_number_of_scores(tmp_path, first, expected):
    if first:
        (tmp_path / "classes.txt").write_text(f"{first}\nhorse\ncow\n")
    config = default_config()
    config.evals.seg.own = segmentation_eval(data="folder", root=str(tmp_path))
    # Without the file, the evaluator of this test set fails, and no other.
    assert resolved(run_config(config)).evals.seg["own"].top_k == expected


def test_a_model_needs_no_list_of_classes_from_elsewhere():
    config = default_config()
    config.evals.seg.own = segmentation_eval(data="folder", root="/nowhere", names="gone")
    config.evals.seg.own.resolution = 96
    settings = first_segmentation(run_config(config))
    assert (settings.resolution, settings.class_scores) == (96, 10)
    assert tuple(words_of(settings)) == label_set("voc")


def test_overrides_change_typed_keys():
    config = tiny_config()
    config.evals.seg.shapes = segmentation_eval()
    config = overridden(
        RunConfig,
        config.to_dict(),
        [
            "--config.optim.lr=1",
            "--config.data.crop_area=(0.5, 1.0)",
            "--config.data.train.shapes.path=some/folder",
            "--config.model.mask_padding=True",
            "--config.evals.seg.shapes.top_k=7",
            '--config.optim.lr_rules=((".*", 0.5),)',
        ],
    )
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.data.crop_area == (0.5, 1.0)
    assert config.data.train["shapes"].path == "some/folder"
    assert config.model.mask_padding is True
    assert config.evals.seg["shapes"].top_k == 7
    assert config.optim.lr_rules == ((".*", 0.5),)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optim.lrr=1", "'optim.lrr'; the nearest is 'optim.lr'"),
        ("--config.evals.seg.voc.root=x", "Unknown configuration key 'evals.seg.voc.root'"),
        ("--config.optim.lr=fast", "not a Python value"),
        ("--config.batch_size=1.5", "must be of type int"),
        ("--config.data.crop_area=5", "must be of type tuple"),
        ("--config.optim=3", "group of keys"),
        ("--config.model.pool=max", "must be one of: loda, mean, cls"),
        ("--config.model.image.patch_size=5", "multiple of model.image.patch_size=5"),
        ("--config.model.text.heads=3", "multiple of model.text.heads"),
        ("--config.data.max_length=99", "must not exceed"),
        ("--config.batch_size=0", "from 2 to 1,048,576"),
        ("--config.checkpoint.keep=0", "checkpoint.keep=0 must be a whole number from 1"),
        ("--config.steps=0", "steps or epochs"),
        ("--lr=3", "overrides look like"),
    ],
)
def test_bad_overrides_say_what_is_wrong(override, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        overridden(RunConfig, tiny_config().to_dict(), [override])


def test_unknown_key_in_a_file_names_the_nearest(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "from simseg_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.optim.weight_dcay = 0.1\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match="'weight_dcay'; the nearest is 'weight_decay'"):
        load_config(path)
    with pytest.raises(UserError, match="No configuration file"):
        load_config(tmp_path / "none.py")
    with pytest.raises(UserError, match="'reslution'; the nearest is 'resolution'"):
        segmentation_eval(reslution=64)


def test_packaged_configurations_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vits16").mkdir()  # A folder is no second reading.
    assert load_config("vits16") == load_config(CONFIGS[0].with_name("vits16.py"))
    names = ", ".join(path.stem for path in CONFIGS)
    for unknown in ("shape", "configs/shapes.py", "./shapes", "shapes.py"):
        with pytest.raises(UserError, match=f"at {unknown}; the packaged ones are {names}"):
            load_config(unknown)


@pytest.mark.parametrize("file", ["shapes", "shapes.py"])
def test_a_name_with_two_readings_is_refused(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    packaged = CONFIGS[0].with_name("shapes.py")
    Path(file).write_text(packaged.read_text() + "\n")
    with pytest.raises(UserError, match=rf"may be \./{file} or the packaged {packaged}: write"):
        load_config("shapes")
    assert load_config(f"./{file}") == load_config(packaged)
    monkeypatch.chdir(packaged.parent)  # There it is the same file.
    assert load_config("shapes") == load_config(packaged)


def test_help_lists_every_key():
    text = describe(RunConfig)
    config = default_config()
    config.evals.seg.voc = segmentation_eval()
    for name, _ in leaves(config.to_dict()):
        assert name.replace(".voc.", ".<name>.") in text
    assert '"seed": 0' in to_json(run_config(config))


def test_every_default_is_accepted_and_every_key_shows_what_it_accepts():
    for kind in (RunConfig, ProbeConfig):
        text = describe(kind)
        for _, field in declared(kind):
            assert field.metadata["accepts"].allows(field.default)
            assert field.metadata["accepts"].text in text


def test_every_class_of_settings_belongs_to_a_configuration():
    """There is no second table of keys: what declares settings is part of a run, probe or job."""
    used = set()

    def visit(kind):
        used.update(kind.__mro__)
        for field in dataclasses.fields(kind):
            inner = field.metadata.get("group") or field.metadata.get("entries")
            if inner:
                visit(inner)

    visit(RunConfig)
    visit(ProbeConfig)
    visit(Job)
    declaring = {
        match for path in PACKAGE.rglob("*.py") for match in re.findall(SETTINGS, path.read_text())
    }
    assert declaring
    assert declaring <= {kind.__name__ for kind in used}


MAKERS = {
    "data.train": data_set,
    "evals.seg": segmentation_eval,
    "evals.retrieval": retrieval_eval,
    "evals.classification": classification_eval,
}
NUMBERS = [
    name.replace("<name>", "one")
    for name, field in declared(RunConfig)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize("text", ["nan", "1e400", "-1e400", "None", "True", "''", "(1,)", "[" * 99])
def test_no_number_takes_what_is_no_finite_number(text):
    config = tiny_config()
    for group, maker in MAKERS.items():
        kind, _, entries = group.partition(".")
        config[kind][entries].one = maker()
    for name in NUMBERS:
        with pytest.raises(UserError, match=re.escape(f"{name}=")):
            overridden(RunConfig, config.to_dict(), [f"--config.{name}={text}"])


@pytest.mark.parametrize(
    "override",
    [
        *(f"seed={value}" for value in (-1, 2**32, 2**64)),
        *(f"steps={value}" for value in (-1, 2**31, 10**21, "-" * 3000 + "1", "1" * 5000)),
        *("batch_size=1", "micro_batch=-1", "loss_chunk=-1", "eval_every=-1", "pictures=-1"),
        *(f"model.image.heads={value}" for value in (0, -1, 2.0, 10**400)),
        *("model.image.patch_size=0", "model.image.width=0", "model.image.mlp_width=-64"),
        *("model.image.depth=0", "model.image.depth=1000000", "model.text.depth=-1"),
        *("model.image.norm_eps=-1", "model.image.norm_eps=1e-300", "model.text.dropout=1"),
        *(f"model.image.mean={value}" for value in ("('a','b','c')", "(0.5,)", "(0,0,nan)", "5")),
        *(f"model.image.std={value}" for value in ("('a',)", "(1e-300,1,1)", "(1,1,0)", "()")),
        *("model.temperature=0", "model.temperature=0.6", "model.m_image=1000", "model.m_text=99"),
        *("optim.lr=-1", "optim.lr=0", "optim.b1=-1", "optim.b1=1", "optim.b2=1.0", "optim.eps=0"),
        *("optim.final_lr=5", "optim.weight_decay=-1", "optim.warmup=1", "optim.clip_norm=-1"),
        *(f"optim.lr_rules={value}" for value in ("()", "(1,)", "('.*',1)", "((1,'.*'),)")),
        *(f"optim.decay_rules={value}" for value in ("(('[',1),)", "(('.*',-1),)", "(('.*',),)")),
        *(
            f"data.crop_area={value}"
            for value in ("(1,)", "(0,1)", "(1,0.5)", "(0.5,2)", "('a',1)")
        ),
        *(f"data.crop_aspect={value}" for value in ("(0,0)", "(-1,1)", "(1,1e400)", "((1,),2)")),
        *("data.edit_rate=2", "data.workers=-1", "data.workers=100000", "data.threads=100000"),
        *("data.prefetch=1000000000", "data.max_bad=-0.1", "data.max_length=2", "mesh.fsdp=0"),
        *("data.train.shapes.weight=1e400", "data.train.shapes.weight=0", "epochs=-1"),
        *("data.train.shapes.size=1000000000000000000000", "data.train.shapes.weight=1e-12"),
        *("evals.seg.shapes.top_k=1", "evals.seg.shapes.crf.gaussian_sxy=0"),
        *("evals.seg.shapes.pamr.dilations=()", "evals.seg.shapes.pamr.dilations=(0,)"),
        *("evals.seg.shapes.closing=100000", "evals.seg.shapes.limit=-1"),
        *("evals.seg.shapes.threads=-1", "evals.seg.shapes.stride=-1", "checkpoint.directory=a\0b"),
    ],
    ids=lambda text: text[:40].replace("\0", "NUL"),
)
def test_what_cannot_work_is_refused_by_name(override):
    config = tiny_config()
    config.evals.seg.shapes = segmentation_eval(resolution=32)
    with pytest.raises(UserError) as refused:
        overridden(RunConfig, config.to_dict(), [f"--config.{override}"])
    message = str(refused.value)
    assert message.startswith(override.partition("=")[0] + "=")
    assert len(message) < 300
    assert "\n" not in message


def test_collages_need_an_even_side():
    odd = ("data.train.shapes.collage=0.5", "model.image.image_size=7", "model.image.patch_size=7")
    changes = [f"--config.{key}" for key in (*odd, "model.m_image=1")]
    with pytest.raises(
        UserError, match=r"data\.train\.shapes\.collage=0\.5 needs an even model\.image"
    ):
        overridden(RunConfig, tiny_config().to_dict(), changes)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def get_config(): return", "returns None"),
        ("def get_config(): return 5", "returns 5"),
        ("def get_config(): return {}", "returns {}"),
        ("get_config = 5", "does not define get_config()"),
        ("", "does not define get_config()"),
        ("def get_config(): return default_config().model", "seed is missing"),
        ("def get_config():\n    1 / 0", "line 3: ZeroDivisionError: division by zero"),
        ("def get_config():\n    raise SystemExit(0)", "line 3: SystemExit: 0"),
        ("import no_such_module", "line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(:", "line 2: SyntaxError: invalid syntax"),
        ("data_set(size='many')", "line 2: size='many' must be of type int"),
        ("def get_config():\n    return get_config()", "RecursionError"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, body, words):
    path = tmp_path / "bad.py"
    path.write_text(f"from simseg_jax.config import data_set, default_config\n{body}\n")
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert str(refused.value).startswith(str(path))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("config.evals = None", "evals must be a group of keys"),
        ("config.evals.seg = None", "evals.seg must be a group of keys"),
        ("config.model.image = None", "model.image must be a group of keys"),
        ("config.steps = None", "steps=None must be of type int"),
        ("config.steps = True", "steps=True must be of type int"),
        ("config.evals.seg.voc = 5", "evals.seg.voc must be a group of keys"),
        ("config.evals.seg['a/b'] = data_set()", "evals.seg: a name has"),
        ("config.data.train.a = default_config()", "data.train.a.path is missing"),
        ("config.unlock()\n    del config.optim", "optim is missing"),
        ("config.unlock()\n    del config.optim.lr", "optim.lr is missing"),
        ("config.unlock()\n    config.stepz = 5", "'stepz'; the nearest is 'steps'"),
    ],
)
def test_a_file_that_takes_a_configuration_apart_is_named(tmp_path, change, words):
    path = tmp_path / "bad.py"
    path.write_text(
        "from simseg_jax.config import data_set, default_config\n"
        f"def get_config():\n    config = default_config()\n    {change}\n    return config\n"
    )
    for overrides in ([], ["--config.seed=1"]):
        with pytest.raises(UserError) as refused:
            load_config(path, overrides)
        assert str(refused.value).startswith(str(path))
        assert words in str(refused.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "bad.py"
    for data in (b"# \xff\xfe\n", b"\0\0", b"PK\3\4" + bytes(99)):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.py"):
            load_config(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"seed": {}},
        {"seed": "0"},
        {"data": []},
        {"evals": {"seg": 5}},
        {"evals": {"seg": {"a.b": {}}}},
        {"evals": {"seg": {"voc": {"resolution": [288]}}}},
        {"model": {"imagf": {}}},
        {"optim": {"lr_rules": [[[[[".*"]]]]]}},
    ],
)
def test_a_damaged_saved_configuration_is_refused_with_its_name(tmp_path, damage):
    saved = default_config().to_dict()
    path = tmp_path / "config.json"
    for wrong in ({**saved, **damage}, {}, [], None, {**saved, "seed": 2**70}):
        with pytest.raises(UserError):
            run_config(wrong)
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"config\.json"):
            from_file(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json"):
        from_file(path)
