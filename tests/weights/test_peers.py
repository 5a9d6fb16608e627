"""Full-size encoders against timm and transformers, where those are installed.

pip install torch torchvision timm; random weights, so that no value hides a mistake.
"""

import jax
import numpy as np
import pytest
from support import assert_close

from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import bind, make_model
from simseg_jax.models.vit import ViTConfig
from simseg_jax.weights.containers import Weights
from simseg_jax.weights.formats import IMAGE, TEXT
from simseg_jax.weights.read import read_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "image"),
    [("vit_small_patch16_224", ViTConfig()), ("vit_base_patch16_224", ViTConfig.b16())],
)
def test_the_authors_encoders_at_full_size(name, image):
    torch = pytest.importorskip("torch", reason="the peer: pip install torch torchvision timm")
    timm = pytest.importorskip("timm", reason="the peer: pip install torch torchvision timm")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0).eval()
    bert = transformers.BertModel(transformers.BertConfig()).eval()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*vit.parameters(), *bert.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    rng = np.random.default_rng(0)
    tensors = {
        "image_projection.linear.weight": rng.normal(size=(512, image.width)),
        "text_projection.linear.weight": rng.normal(size=(512, 768)),
        "loss.temperature": np.asarray(0.07),
    }
    for prefix, module in ((IMAGE, vit), (TEXT, bert)):
        tensors |= {f"{prefix}{key}": x.numpy() for key, x in module.state_dict().items()}
    _, config, _, params, _ = read_model(Weights(tensors, {}, {}, {}), "model")
    assert (config.image, config.text) == (image, BertConfig.base())
    images = rng.normal(size=(2, 224, 224, 3)).astype(np.float32)
    ids = rng.integers(1, 30522, (2, 25))
    mask = np.arange(25) < np.array([[25], [9]])
    with torch.no_grad():
        expected_image = vit.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2))
        expected_text = bert(torch.from_numpy(ids), torch.from_numpy(mask).long())
    model = bind(make_model(config), params)
    assert_close(jax.jit(model.image_encoder)(images), expected_image)
    found = jax.jit(model.text_encoder)(ids.astype(np.int32), mask)
    assert_close(found, expected_text.last_hidden_state)
