"""Every test set of the paper, and the standard protocol of segmentation; not for training.

python -m simseg_jax.evaluate --checkpoint=runs/vits16 --config=test_sets \
    --test_set=voc,context,coco_object
python -m simseg_jax.evaluate --checkpoint=runs/vits16 --config=test_sets \
    --test_set=flickr30k,coco,imagenet

Without --test_set all fourteen are run. The data are expected under data/ (a link will do; or set
--config.evals.seg.NAME.root), in their usual layouts: VOC2012 as unpacked; PASCAL Context as
PNGs of mmsegmentation, as trainval_merged.json or as .mat files; COCO-Stuff raw or converted;
ADEChallengeData2016; Cityscapes with gtFine labelIds or labelTrainIds; Karpathy's splits of
Flickr30K and COCO as JSON, or the authors' Parquet (--config.evals.retrieval.coco.path); ImageNet
as a folder of synsets or a TFDS folder.

Hardware: any. Hours: not measured with a trained ViT-S; on 2 CPU cores an image takes 0.12 s with
the paper protocol. Expected (paper, ViT-S/16 on CC3M + CC12M): voc 56.6, context 25.8,
coco_object 27.2 mIoU; retrieval RSUM flickr30k 507.7, coco 384.6; imagenet top-1 / top-5 47.1 /
74.6; the paper has no numbers for the others. Not reproduced with this code yet.
"""

from simseg_jax.config import (
    Config,
    classification_eval,
    default_config,
    retrieval_eval,
    segmentation_eval,
)

VOC2012, VOC2010 = "data/VOCdevkit/VOC2012", "data/VOCdevkit/VOC2010"
COCO = "data/coco_stuff164k"


def get_config() -> Config:
    """The paper protocol where it was published, the standard one on everything."""
    config = default_config()
    seg = config.evals.seg
    seg.voc = segmentation_eval(data="voc", root=VOC2012)
    seg.context = segmentation_eval(data="context", root=VOC2010)
    seg.coco_object = segmentation_eval(data="coco_object", root=COCO)
    for data, root in (
        ("voc", VOC2012),
        ("voc20", VOC2012),
        ("context", VOC2010),
        ("context59", VOC2010),
        ("coco_object", COCO),
        ("coco_stuff", COCO),
        ("ade20k", "data/ADEChallengeData2016"),
        ("cityscapes", "data/cityscapes"),
    ):
        seg[f"{data}_standard"] = segmentation_eval(
            data=data, root=root, protocol="standard", resolution=448, refine="none", batch_size=8
        )
    config.evals.retrieval.flickr30k = retrieval_eval(
        path="data/dataset_flickr30k.json", images="flickr30k-images", split="test"
    )
    config.evals.retrieval.coco = retrieval_eval(
        path="data/dataset_coco.json", images="coco", split="test"
    )
    config.evals.classification.imagenet = classification_eval(root="data/imagenet", split="val")
    return config
