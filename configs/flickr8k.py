"""A small real run: Flickr8k's 6,000 training images, five captions each, small encoders.

python -m simseg_jax.main --config=configs/flickr8k.py --workdir=runs/flickr8k \
    --config.data.root=flickr8k --config.data.vocab=vocab.txt

flickr8k/ holds Images/, captions.csv (header `image,caption`) and train.txt; vocab.txt is BERT's
uncased vocabulary (or leave data.vocab out to fetch it from the hub).
"""

from simseg_jax.config import Config, default_config


def get_config() -> Config:
    """ViT of 6 blocks at 128 pixels, BERT of 4 layers, batch 64."""
    config = default_config()
    config.epochs = 5.0
    config.batch_size = 64
    config.model.image.update(
        {"image_size": 128, "width": 256, "depth": 6, "heads": 4, "mlp_width": 1024}
    )
    config.model.text.update(
        {"max_positions": 64, "width": 256, "depth": 4, "heads": 4, "mlp_width": 1024}
    )
    config.model.embed_dim = 256
    config.checkpoint.every = 200
    return config
