"""A small real run: Flickr8k's 6,000 training images, five captions each, small encoders.

python -m simseg_jax.main --config=flickr8k --workdir=runs/flickr8k \
    --config.data.train.flickr8k.path=flickr8k/captions.csv --config.data.vocab=vocab.txt

flickr8k/ holds Images/, captions.csv (header `image,caption`) and train.txt; vocab.txt is BERT's
uncased vocabulary (without data.vocab it is fetched from the hub).

Hardware: 2 CPU cores, 9 minutes (54 pairs/s). Expected: the loss falls from 4.2 to about 3.5
(chance is 4.16). That shows that real pairs train; it is far too short for useful masks: 100 VOC
images give 0.020 mIoU without CRF, an empty prediction 0.034. More epochs and a larger model need a
GPU; not measured.
"""

from simseg_jax.config import Config, data_set, default_config


def get_config() -> Config:
    """ViT of 4 blocks at 128 pixels, BERT of 3 layers, batch 64."""
    config = default_config()
    config.epochs = 5.0
    config.batch_size = 64
    config.model.image.update(
        {"image_size": 128, "width": 256, "depth": 4, "heads": 4, "mlp_width": 1024}
    )
    config.model.text.update(
        {"max_positions": 64, "width": 256, "depth": 3, "heads": 4, "mlp_width": 1024}
    )
    config.model.embed_dim = 256
    config.optim.lr = 5e-4
    # So short a run sees every image a few times only: strong distortion would slow it down.
    config.data.autoaugment = False
    config.data.train.flickr8k = data_set(
        path="flickr8k/captions.csv", images="Images", split="train.txt"
    )
    config.data.threads = 2
    config.checkpoint.every = 100
    return config
