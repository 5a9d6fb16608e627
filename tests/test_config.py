from pathlib import Path

import pytest
from support import tiny_config, tiny_eval

from simseg_jax.config import (
    apply_overrides,
    default_config,
    describe,
    from_dict,
    load_config,
    model_config,
    segmentation_eval,
    to_json,
)
from simseg_jax.config_checks import validate_probe
from simseg_jax.dotted import leaves
from simseg_jax.errors import UserError
from simseg_jax.models.bert import BertConfig
from simseg_jax.models.vit import ViTConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_file_loads_and_documents_itself(path):
    if path.stem == "linear_probe":
        load_config(path, check=validate_probe)
    else:
        config = load_config(path)
        assert from_dict(config.to_dict()) == config
    docstring = path.read_text().split('"""')[1]
    for part in ("python -m simseg_jax.", "Hardware", "Expected"):
        assert part in docstring


def test_defaults_are_the_papers_recipe():
    config = default_config()
    assert (config.optim.lr, config.optim.b2, config.optim.eps) == (3e-4, 0.98, 1e-6)
    assert (config.optim.weight_decay, config.optim.warmup, config.optim.final_lr) == (
        0.2,
        0.025,
        0.1,
    )
    assert (config.model.m_image, config.model.m_text, config.model.mask_padding) == (5, 5, False)
    assert (config.batch_size, config.model.embed_dim, config.data.max_length) == (4096, 512, 25)
    architecture = model_config(config, vocab_size=30522)
    assert (architecture.image, architecture.text) == (ViTConfig.s16(), BertConfig.base())
    protocol = segmentation_eval()
    assert (protocol.resolution, protocol.m_image, protocol.m_text) == (288, 5, 1)
    assert (protocol.top_k, protocol.sigma_weight, protocol.candidates) == (10, 1.0, 5)


def test_overrides_change_typed_keys():
    config = tiny_config()
    config.evals.seg.shapes = tiny_eval()
    apply_overrides(
        config,
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
    assert config.data.train.shapes.path == "some/folder"
    assert config.model.mask_padding is True
    assert config.evals.seg.shapes.top_k == 7
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
        ("--config.data.max_length=99", "must lie between"),
        ("--config.batch_size=0", "at least 1"),
        ("--config.checkpoint.keep=0", "checkpoint.keep must be at least 1"),
        ("--config.steps=0", "steps or epochs"),
        ("--lr=3", "overrides look like"),
    ],
)
def test_bad_overrides_say_what_is_wrong(override, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        apply_overrides(tiny_config(), [override])


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


def test_help_lists_every_key():
    text = describe()
    config = default_config()
    config.evals.seg.voc = segmentation_eval()
    for name, _ in leaves(config):
        assert name.replace(".voc.", ".<name>.") in text
    assert '"seed": 0' in to_json(config)
