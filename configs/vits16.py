"""The paper's main run: ViT-S/16 and BERT-base on CC3M + CC12M, LoDA with M^I = M^T = 5.

python -m simseg_jax.main --config=vits16 --workdir=runs/vits16 \
    --config.data.train.cc3m.path=DATA/cc3m --config.data.train.cc12m.path=DATA/cc12m \
    --config.evals.seg.voc.root=VOCdevkit/VOC2012

DATA/cc3m and DATA/cc12m are written by python -m simseg_jax.data.prepare, or hold the tar shards of
img2dataset; the authors used 15M pairs. Set data.workers to the cores of a host.
Hardware: the paper used 32 V100; here not run yet. Hours: not measured. Planned with python -m
simseg_jax.plan: a slice v5e-32 (--devices=v5e:4x8) and 8 H100 hold the batch as it is (6 and 15 GiB
of a device); one H100 of 80 GB with --config.remat=full (25 GiB). docs/guides/scaling.md has the
options for batches up to 32,768. No run of 20 epochs of 15M pairs can take less than 0.5 hours on
the slice, nor 4.6 on one H100 with remat. Many machines: launch/README.md.
Expected (paper, VOC 2012 val): 56.6 mIoU, 53.8 with refine=none;
19.1 with model.pool=mean. Not reproduced with this code yet.
"""

from simseg_jax.config import Config, data_set, default_config, segmentation_eval


def get_config() -> Config:
    """The defaults of `simseg_jax.config` are this run's recipe."""
    config = default_config()
    config.epochs = 20.0
    config.batch_size = 4096
    config.data.train.cc3m = data_set(path="cc3m")
    config.data.train.cc12m = data_set(path="cc12m")
    config.checkpoint.every = 2000
    config.eval_every = 10_000
    config.evals.seg.voc = segmentation_eval(data="voc", root="VOCdevkit/VOC2012")
    return config
