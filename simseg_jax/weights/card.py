"""The model card of a converted model: what it is, how to use it and where it came from."""

from typing import Any

from simseg_jax.models.simseg import SimSegConfig

HEADER = """---
library_name: simseg_jax
pipeline_tag: image-segmentation
tags: [jax, flax, zero-shot-segmentation, image-text, simseg]
---
# {name}

Segments any image with any words. Two plain encoders were trained with a contrastive loss on the
strongest responses (SimSeg, Yi et al., CVPR 2023), from image-caption pairs without any mask.

| | |
|---|---|
| image encoder | ViT, {image.depth} blocks of width {image.width}, {image.heads} heads, \
patches of {image.patch_size} pixels, trained at {image.image_size} |
| images | RGB in [0, 1], mean {image.mean}, deviation {image.std} |
| text encoder | BERT, {text.depth} layers of width {text.width}, {text.heads} heads, \
{text.vocab_size} tokens |
| embedding | {model.embed_dim} channels, pool = {model.pool} |
"""

FOLDER_USE = """
## Use

With simseg_jax installed (`pip install -e .` in a clone):

```python
from simseg_jax import Segmenter

segmenter = Segmenter.from_pretrained("{name}")
segmenter("photo.jpg", words=["dog", "grass"]).save("photo")
```

```
python -m simseg_jax.segment --checkpoint={name} --words="dog, grass" --output=out photos/
python -m simseg_jax.evaluate --checkpoint={name}
```
"""

PYTORCH_USE = """
`model.safetensors` has the tensor names and layouts of the authors' PyTorch code:
`image_encoder.model.model` is a timm VisionTransformer, `text_encoder.model.model` a transformers
BertModel without pooler.
"""

PROGRAMS_USE = """
## Use

Needs `jax`, `flatbuffers` and an image decoder. Compiled for {platforms}.

```python
import jax
import numpy as np
from jax import export
from PIL import Image

with open("segmenter.stablehlo", "rb") as file:
    segment = jax.jit(export.deserialize(file.read()).call)
classes = np.load("classes.npz")
size = {settings.resolution}
image = Image.open("photo.jpg").convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
masks, scores, thresholds = segment(np.asarray(image)[None], classes["embeddings"])
print({{classes["names"][i] for i in np.unique(masks)}})
```

`masks` uint8 [B, S, S] holds positions in `names`; 0 is the background. S is {settings.resolution}
pixels. The batch size B is free. There may be {least} to 256 classes, the first of which is the
background. Protocol: refine={settings.refine}, sigma_weight={settings.sigma_weight},
M^I={settings.m_image}, M^T={settings.m_text}.

`image_encoder.stablehlo`: uint8 [B, S, S, 3] -> embeddings [B, {width}] and tokens.
`text_encoder.stablehlo`: ids int32 [B, {length}] and mask bool [B, {length}] ([CLS] pieces [SEP],
padded with 0; the vocabulary is in `tokenizer/`) -> embeddings [B, {width}]. The embedding of a
class is the normalised mean over its prompts.
"""

ORIGIN = """
## Origin

{lines}

The training captions decide what words mean to this model: check it on your own images before you
rely on it. No licence is stated here: add those of the weights and data before you publish this.
"""


def model_card(name: str, architecture: SimSegConfig, origin: dict[str, Any], use: str) -> str:
    """The text of README.md. use: one of the *_USE templates above, filled in."""
    header = HEADER.format(
        name=name, model=architecture, image=architecture.image, text=architecture.text
    )
    lines = "\n".join(f"- {key}: {value}" for key, value in _flat(origin))
    return header + use + ORIGIN.format(lines=lines)


def _flat(origin: dict[str, Any], prefix: str = ""):
    for key, value in origin.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value
