"""The embedded data set."""

from simseg_jax.config import default_config, segmentation_eval


def get_config():
    config = default_config()
    config.batch_size = 64
    config.steps = 800
    config.model.image.update(
        {"image_size": 64, "patch_size": 8, "width": 96, "depth": 3, "heads": 3, "mlp_width": 192}
    )
    config.model.text.update(
        {"max_positions": 64, "width": 64, "depth": 1, "heads": 2, "mlp_width": 128, "dropout": 0.0}
    )
    config.model.embed_dim = 128
    config.optim.lr = 2e-3
    config.data.update(
        {
            "source": "shapes",
            "split": "train",
            "vocab": "shapes",
            "max_length": 21,  # of the longest caption
            "crop_area": (0.3, 1.0),
            "autoaugment": False,
            "threads": 2,
            "prefetch": 256,
            "edit_rate": 0.0,
        }
    )
    config.evals.seg.shapes = segmentation_eval(
        data="shapes", split="val", resolution=128, prompts="shapes", batch_size=64
    )
    return config
