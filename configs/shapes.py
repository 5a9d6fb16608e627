"""The embedded demo: generated scenes of 64x64 pixels, captions only; nothing to download.

python -m simseg_jax.main --config=shapes --workdir=runs/shapes

Hardware: 2 CPU cores, 2 to 4 minutes in all. Expected seg/shapes/miou of 256 scenes, seed 0, and
the same with evals.seg.shapes.refine=none (all background would be 0.076):
    0.726   0.615   model.pool=loda, the default
    0.041   0.043   model.pool=mean, of an earlier version
    0.057   0.059   model.pool=cls, of an earlier version
Runs on one machine are equal; another machine, which rounds sums differently, gave 0.744 and 0.620.
benchmarks/shapes_limit.py shows what limits the score without refinement: labels on the patch grid
reach 0.804 at most; given the right classes, the maps of an earlier version reach 0.645.
"""

from simseg_jax.config import (
    Config,
    classification_eval,
    data_set,
    default_config,
    retrieval_eval,
    segmentation_eval,
)


def get_config() -> Config:
    """ViT of 3 blocks with 8-pixel patches, BERT of 1 layer, batch 64."""
    config = default_config()
    config.steps = 700
    config.batch_size = 64
    config.model.image.update(
        {"image_size": 64, "patch_size": 8, "width": 96, "depth": 3, "heads": 3, "mlp_width": 192}
    )
    config.model.text.update(
        {
            "max_positions": 64,
            "width": 64,
            "depth": 1,
            "heads": 2,
            "mlp_width": 128,
            "dropout": 0.0,
        }
    )
    config.model.embed_dim = 128
    config.optim.lr = 2e-3
    config.data.train.shapes = data_set(format="shapes", split="train", size=8192)
    config.data.update(
        {
            "vocab": "shapes",
            "max_length": 21,  # of the longest caption
            "crop_area": (0.3, 1.0),  # shows objects at up to 1.8 times their size
            "autoaugment": False,
            "threads": 2,
            "prefetch": 256,
            "edit_rate": 0.0,
        }
    )
    # Twice the training resolution: a grid of 16x16 instead of 8x8, with the same patches.
    config.evals.seg.shapes = segmentation_eval(
        data="shapes", split="val", resolution=128, prompts="shapes", batch_size=64
    )
    seen = {"resize": 128, "crop": 128, "batch_size": 64}
    config.evals.retrieval.shapes = retrieval_eval(format="shapes", split="val", size=256, **seen)
    config.evals.classification.shapes = classification_eval(
        data="shapes", split="val", size=256, prompts="shapes", **seen
    )
    return config
