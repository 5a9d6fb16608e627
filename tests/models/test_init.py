"""Parameters of a model from scratch: the distributions of timm's ViT and Hugging Face's BERT."""

import jax
import numpy as np
import pytest

from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import SimSegConfig, init_params, path_string
from simseg_jax.models.vit import ViTConfig

CONFIG = SimSegConfig(
    image=ViTConfig(image_size=64, patch_size=16, width=384, depth=1, heads=6, mlp_width=768),
    text=BertConfig(vocab_size=500, max_positions=40, width=256, depth=1, heads=4, mlp_width=512),
    embed_dim=128,
)


@pytest.fixture(scope="module")
def params():
    tree = init_params(CONFIG, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_string(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def uniform_within(values, bound):
    """Of a uniform distribution: the whole range is used and nothing beyond it."""
    assert bound * (1 - 20 / values.size) <= np.abs(values).max() <= bound
    assert values.std() == pytest.approx(bound / 3**0.5, rel=3 / values.size**0.5)


def test_weights_and_embeddings_have_a_deviation_of_2_per_cent(params):
    """Not truncated: 0.0200, where a cut at two deviations would leave 0.0176."""
    drawn = 0
    for name, values in params.items():
        kernel = name.endswith(("kernel", "embedding", "pos_embed"))
        if not kernel or name.endswith("projection/kernel") or "patch_embed" in name:
            continue
        if "word_embeddings" in name:
            assert not values[0].any()  # of [PAD]
            values = values[1:]
        # Four deviations of the estimate from so many values, which is to say hardly ever.
        assert values.std() == pytest.approx(0.02, rel=4 / (2 * values.size) ** 0.5), name
        assert abs(values.mean()) < 4 * 0.02 / values.size**0.5, name
        if values.size > 10_000:
            assert np.abs(values).max() > 0.06, name
        drawn += 1
    # ViT: positions and 4 kernels of a block; BERT: 3 tables and 6 kernels of a layer.
    assert drawn == 1 + 4 + 3 + 6


def test_patches_and_projections_are_pytorchs_uniform(params):
    uniform_within(params["image_encoder/patch_embed/proj/kernel"], (3 * 16**2) ** -0.5)
    uniform_within(params["image_encoder/patch_embed/proj/bias"], (3 * 16**2) ** -0.5)
    uniform_within(params["image_projection/kernel"], 384**-0.5)
    uniform_within(params["text_projection/kernel"], 256**-0.5)


def test_biases_norms_and_the_cls_token(params):
    for name, values in params.items():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not values.any(), name
        elif name.endswith("scale"):
            assert (values == 1).all(), name
    cls = params["image_encoder/cls_token"]
    assert cls.std() == pytest.approx(1e-6, rel=4 / (2 * cls.size) ** 0.5)
    assert params["temperature"] == pytest.approx(0.07)
