"""Photographs on two cores: labels as captions (Tiny-ImageNet) and human captions (Flickr8k).

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
python -m simseg_jax.main --config=photographs --workdir=runs/photographs \
    --config.data.vocab=vocab.txt --config.data.train.tiny.path=tinyimagenet.tar \
    --config.data.train.flickr8k.path=flickr8k/captions.csv \
    --config.evals.seg.voc.root=VOCdevkit/VOC2012 --config.evals.seg.coco.root=coco_stuff164k

tinyimagenet.tar is a WebDataset shard of 50,000 photographs of 64x64 pixels with captions made from
their labels ("a photo of a tabby cat"); flickr8k/ as for configs/flickr8k.py; vocab.txt is BERT's
uncased vocabulary (without data.vocab it is fetched from the hub).

Hardware: 2 CPU cores, about 2 hours for 10,000 steps at 180 pairs/s. Expected: not measured yet. A
first try of 1,450 steps at 48 pixels gave 0.031 mIoU on 100 VOC images, an empty mask 0.034: see
REPRODUCTION.md, 2026-11-27.
"""

from simseg_jax.config import Config, data_set, default_config, segmentation_eval


def get_config() -> Config:
    """ViT of 6 blocks, 64 pixels in patches of 8, half of them seen; BERT of 2; batch 128."""
    config = default_config()
    config.steps = 10_000
    config.batch_size = 128
    config.positives = "caption"
    config.model.image.update(
        {
            "image_size": 64,
            "patch_size": 8,
            "width": 192,
            "depth": 6,
            "heads": 3,
            "mlp_width": 768,
            "keep": 0.5,
        }
    )
    config.model.text.update(
        {
            "max_positions": 64,
            "width": 128,
            "depth": 2,
            "heads": 2,
            "mlp_width": 512,
            "dropout": 0.0,
        }
    )
    config.model.embed_dim = 256
    config.model.mask_padding = True
    config.optim.lr = 1e-3
    config.optim.warmup = 0.05
    config.optim.weight_decay = 0.05
    config.data.update(
        {
            "mixture": "debiased",
            "max_length": 32,  # Has room for four captions made from labels.
            "flip": 0.5,
            "crop_area": (0.4, 1.0),
            "autoaugment": False,
            "edit_rate": 0.0,
            "threads": 2,
        }
    )
    config.data.train.tiny = data_set(
        path="tinyimagenet.tar", caption_key="json.captions", collage=0.5
    )
    config.data.train.flickr8k = data_set(
        path="flickr8k/captions.csv", images="Images", split="train.txt", weight=2.0
    )
    config.checkpoint.every = 200
    # Twice the size in training: things of a photograph are smaller than those of Tiny-ImageNet.
    seen = {"resolution": 128, "names": "synonyms", "batch_size": 32}
    config.evals.seg.voc = segmentation_eval(data="voc", root="VOCdevkit/VOC2012", **seen)
    config.evals.seg.coco = segmentation_eval(data="coco_object", root="coco_stuff164k", **seen)
    return config
