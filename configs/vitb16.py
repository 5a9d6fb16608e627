"""The paper's larger run: as configs/vits16.py with ViT-B/16.

python -m simseg_jax.main --config=vitb16 --workdir=runs/vitb16 \
    --config.data.train.cc3m.path=DATA/cc3m --config.data.train.cc12m.path=DATA/cc12m \
    --config.evals.seg.voc.root=VOCdevkit/VOC2012

Hardware and hours: not run yet. Planned with python -m simseg_jax.plan: 8 H100 hold the batch of
4096 pairs as it is (27 GiB of each), one H100 of 80 GB with --config.remat=full (47 GiB); the table
in docs/guides/scaling.md has other devices and batches.
Expected (paper, VOC 2012 val): 57.4 mIoU with dense CRF; not reproduced with this code yet.
"""

import dataclasses
import runpy
from pathlib import Path

from simseg_jax.config import Config
from simseg_jax.models.vit import ViTConfig


def get_config() -> Config:
    """configs/vits16.py with the larger image encoder."""
    config = runpy.run_path(str(Path(__file__).with_name("vits16.py")))["get_config"]()
    config.model.image.update(dataclasses.asdict(ViTConfig.b16()))
    return config
