"""Linear probing of a frozen image encoder (tables 9 and 10 of the paper): LARS, cached features.

python -m simseg_jax.linear_probe --checkpoint=runs/vits16 --config=linear_probe \
    --config.root=imagenet

imagenet/ holds train/SYNSET/*.JPEG and val/SYNSET/*.JPEG, or is a TFDS folder of ArrayRecord files.
The recipe is the authors': LARS without weight decay, learning rate 0.1 x batch / 256, momentum
0.9, 90 epochs, 10 of them warm-up, cosine, on the CLS token (others: --config.feature=embedding or
mean). The paper has a batch of 32,768, the authors' file 16,384, the default here. Images are
squashed to 256 x 256, then cropped to 224 (--config.aspect=keep for the shorter side). Two things
differ: features are computed once, where the authors draw crops and AutoAugment anew in every
epoch; and the encoder gets the mean and deviation that it was trained with, where their file has
0.5. LARS moves the weights by a small share of their length per step: data sets of a few thousand
images need --config.batch_size=256 --config.base_lr=10.

Hardware: any; most of the time goes into embedding 1.28M images, once; not measured. Expected
(paper, ViT-S/16 on CC3M + CC12M, ImageNet top-1 / top-5): 65.2 / 87.5 with LoDA, 64.6 / 87.3
without. Not reproduced with this code yet.
"""

from simseg_jax.config import Config, probe_config


def get_config() -> Config:
    """The defaults of `probe_config` are this recipe."""
    return probe_config()
