"""Segmentation of your own labelled images, with both protocols; not for training.

python -m simseg_jax.evaluate --checkpoint=runs/vits16 --config=configs/own_images.py \\
    --test_set=mine --config.evals.seg.mine.root=data/mine

The folder holds images/, masks/ and classes.txt, see docs/guides/evaluation.md. The test set
mine_standard is the standard protocol; without --test_set both are run.

Hardware: any. Hours: on 2 CPU cores a ViT-S takes 0.12 s for an image with the paper protocol.
Expected: depends on the images.
"""

from simseg_jax.config import Config, default_config, segmentation_eval

OWN = {"data": "folder", "root": "data/mine", "split": ""}


def get_config() -> Config:
    """The paper protocol and the standard one on the same folder."""
    config = default_config()
    config.evals.seg.mine = segmentation_eval(**OWN)
    config.evals.seg.mine_standard = segmentation_eval(
        **OWN, protocol="standard", resolution=448, refine="none", batch_size=8
    )
    return config
