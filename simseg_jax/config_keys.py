"""Every configuration key with its default and meaning; nothing else knows a default.

Each leaf is (default, meaning); the default fixes the type.
"""

from simseg_jax.data.classes import BENCHMARKS
from simseg_jax.masks.densecrf import PAPER
from simseg_jax.masks.pamr import DILATIONS
from simseg_jax.models.layers import ACTIVATIONS, REMAT
from simseg_jax.models.simseg import POOLS
from simseg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from simseg_jax.zeroshot.prompts import TEMPLATES

FEATURES = ("embedding", "cls", "mean")  # See `evaluators.embedding`.
FORMATS = ("auto", "csv", "coco", "tfds", "array_record", "webdataset", "parquet", "shapes")

KEYS = {
    "seed": (0, "seeds parameters, data order, augmentation and dropout"),
    "steps": (1000, "training steps; ignored when epochs > 0"),
    "epochs": (0.0, "passes over the images; > 0 sets the number of steps"),
    "batch_size": (4096, "pairs per step over all devices: the contrastive batch"),
    "dtype": ("auto", "compute type: float32, bfloat16 or auto (bfloat16 on accelerators)"),
    "remat": (
        "none",
        "what is computed again for the gradient: none; dots: all but products; full",
    ),
    "micro_batch": (0, "gradient cache: pairs of a device embedded at a time; 0: all at once"),
    "loss_chunk": (0, "images of a device compared with all texts at a time; 0: all at once"),
    "log_every": (10, "steps between two lines of metrics"),
    "eval_every": (0, "steps between evaluations; 0: only after training"),
    "pictures": (8, "images on the contact sheet written after training; 0: none"),
    "model": {
        "image": {
            "image_size": (224, "side of training images in pixels"),
            "patch_size": (16, "side of a patch in pixels"),
            "width": (384, "channels of the ViT"),
            "depth": (12, "blocks of the ViT"),
            "heads": (6, "attention heads of the ViT"),
            "mlp_width": (1536, "hidden channels of its MLPs"),
            "pre_norm": (False, "LayerNorm before the first block, as in CLIP"),
            "activation": ("gelu", f"of its MLPs: {', '.join(ACTIVATIONS)}"),
            "norm_eps": (1e-6, "epsilon of its LayerNorms"),
            "mean": (IMAGENET_MEAN, "of the channels in [0, 1]: what images are normalised with"),
            "std": (IMAGENET_STD, "deviation of the channels"),
        },
        "text": {
            "vocab_size": (0, "rows of the word embedding; 0: the size of the vocabulary"),
            "max_positions": (512, "rows of the position embedding"),
            "width": (768, "channels of BERT"),
            "depth": (12, "layers of BERT"),
            "heads": (12, "attention heads of BERT"),
            "mlp_width": (3072, "hidden channels of its MLPs"),
            "dropout": (0.1, "dropout of embeddings, attention and residuals"),
            "activation": ("gelu", "of its MLPs, as model.image.activation"),
            "norm_eps": (1e-12, "epsilon of its LayerNorms"),
        },
        "embed_dim": (512, "channels of the common embedding"),
        "pool": ("loda", "loda: top-M per channel; mean: dense alignment; cls: CLS tokens"),
        "m_image": (5, "M^I in training: responses per channel over patches"),
        "m_text": (5, "M^T in training: responses per channel over words"),
        "mask_padding": (False, "keep [PAD] out of text pooling in training; the authors do not"),
        "temperature": (0.07, "initial temperature"),
    },
    "init": {
        "model": (
            "",
            "start from a whole model: WORKDIR, converted folder, the authors' .pth, URL or hub id",
        ),
        "image": (
            "",
            "start the ViT from this file, folder, URL or hub id; it decides model.image but for "
            "image_size, to which positions are resized",
        ),
        "text": ("", "start BERT from this; it decides model.text but for dropout"),
    },
    "optim": {
        "lr": (3e-4, "peak learning rate"),
        "warmup": (0.025, "share of the steps with linear warm-up from 0"),
        "final_lr": (0.1, "learning rate at the end of the cosine, as a share of the peak"),
        "b1": (0.9, "AdamW beta 1"),
        "b2": (0.98, "AdamW beta 2"),
        "eps": (1e-6, "AdamW epsilon"),
        "weight_decay": (0.2, "decoupled weight decay"),
        "clip_norm": (0.0, "bound on the global gradient norm; 0: none"),
        "lr_rules": (((".*", 1.0),), "(path pattern, lr multiplier), first match; 0 freezes"),
        "decay_rules": (((".*", 1.0),), "(path pattern, weight-decay multiplier), first match"),
    },
    "data": {
        "train": {},
        "mixture": ("shuffle", "shuffle: all data sets together; debiased: each batch from one"),
        "vocab": ("bert-base-uncased", "vocabulary: hub name, vocab.txt, tokenizer folder, shapes"),
        "max_length": (25, "tokens per caption, [CLS] and [SEP] included"),
        "edit_rate": (0.2, "share of word pieces masked (50 %), replaced (10 %), deleted (40 %)"),
        "crop_area": ((0.6, 1.0), "RandomResizedCrop: range of the area kept"),
        "crop_aspect": ((3 / 4, 4 / 3), "RandomResizedCrop: range of width / height"),
        "autoaugment": (True, "AutoAugment, ImageNet policy"),
        "transform": ("fast", "fast: libjpeg-turbo, AutoAugment on the device; pil: all on hosts"),
        "max_bad": (0.1, "stop when more than this share of the examples is damaged"),
        "max_pixels": (89_478_485, "larger images count as damaged: decompression bombs"),
        "threads": (16, "threads that read and prepare examples, in every worker"),
        "workers": (0, "processes that do so; 0: only this one. One per core feeds most"),
        "prefetch": (512, "examples prepared ahead, by every worker"),
        "cache": ("", "folder for indexes and copies of Parquet; '': ~/.cache/simseg_jax"),
    },
    "mesh": {"fsdp": (1, "devices that share one copy of the parameters; the rest is data")},
    "checkpoint": {
        "every": (1000, "steps between checkpoints; the last step is always saved"),
        "keep": (3, "newest checkpoints kept"),
        "directory": (
            "",
            "folder or URL (gs://) of the checkpoints; '': WORKDIR/checkpoints",
        ),
        "resume": ("", "WORKDIR of another run to start from when this one has no checkpoint"),
    },
    "evals": {"seg": {}, "retrieval": {}, "classification": {}},
}

# Keys of each entry of data.train: one data set of image-caption pairs.
DATA_SET_KEYS = {
    "path": ("", "file, folder, pattern ({000..331}, *) or URL (gs://, s3://, hf://) of the data"),
    "format": ("auto", f"one of {', '.join(FORMATS)}; auto: told by the files"),
    "split": (
        "",
        "tfds, Karpathy's JSON: name of the split; csv, coco: file listing the images; '': all",
    ),
    "images": ("", "csv, coco: folder of the images, relative to the table's"),
    "image_key": ("", "column or feature with the image; '': the usual names"),
    "caption_key": ("", "column or feature with the caption or captions; '': the usual names"),
    "weight": (1.0, "times an epoch shows this data set; 0.5 shows half of it"),
    "size": (8192, "shapes: number of generated scenes"),
}

# Keys of each entry of evals.seg: one zero-shot segmentation benchmark and how it is evaluated.
# "paper" and "standard" name the protocol a key belongs to; the others belong to both.
SEGMENTATION_KEYS = {
    "data": ("voc", f"one of {', '.join(BENCHMARKS)} (shapes: generated scenes)"),
    "root": ("", "the benchmark's folder, such as VOC2012, VOC2010 or ADEChallengeData2016"),
    "split": ("val", "name of a list or folder of the benchmark; shapes: train, val, test"),
    "names": ("original", "class names in prompts: original (the authors'), synonyms, a text file"),
    "size": (256, "shapes: number of scenes"),
    "limit": (0, "use the first so many images; 0: all"),
    "protocol": ("paper", "paper: class threshold, masks per class; standard: argmax per pixel"),
    "resolution": (288, "paper: side of the square image; standard: shorter side, usually 448"),
    "prompts": ("imagenet", "templates: imagenet (the 80 of CLIP), plain, shapes"),
    "m_image": (5, "M^I: responses per channel over patches"),
    "m_text": (1, "M^T: responses per channel over words, padding masked"),
    "top_k": (10, "paper: class scores that set the threshold; 30 for many classes"),
    "sigma_weight": (1.0, "paper: threshold = mean + sigma_weight * standard deviation of those"),
    "candidates": (5, "paper: classes an image can show at most"),
    "refine": ("crf", "crf: dense CRF; none: p > 0.5; pamr; pydensecrf: crf in C++, extra crf"),
    "closing": (7, "paper: side in pixels of the square that closes small holes; 1: none"),
    "crf": {
        "backend": ("auto", "numpy (threads of the host), jax (device), auto: jax on GPUs only"),
        "gaussian_sxy": (PAPER.gaussian_sxy, "deviation of the position kernel in pixels"),
        "gaussian_compat": (PAPER.gaussian_compat, "weight of that kernel"),
        "bilateral_sxy": (PAPER.bilateral_sxy, "position deviation of the bilateral kernel"),
        "bilateral_srgb": (PAPER.bilateral_srgb, "its colour deviation in levels 0..255"),
        "bilateral_compat": (PAPER.bilateral_compat, "weight of that kernel"),
        "iterations": (PAPER.iterations, "mean-field updates"),
    },
    "pamr": {
        "iterations": (10, "smoothing steps"),
        "dilations": (DILATIONS, "distances of the neighbours in pixels"),
    },
    "window": (448, "standard: side of the sliding window; 0: the whole image at once"),
    "stride": (224, "standard: step of the sliding window"),
    "background": ("threshold", "standard: threshold, or text: the word background competes"),
    "background_threshold": (0.2, "standard: below it is background; depends on the checkpoint"),
    "softmax_scale": (0.0, "standard: values are softmax(scale * cosine); 0: cosines"),
    "batch_size": (32, "images per batch over all devices of a process"),
    "threads": (0, "threads that decode, refine and count; 0: one per core, at most 32"),
}

EMBEDDING_KEYS = {
    "resize": (324, "shorter side in pixels to which images are resized"),
    "crop": (288, "side of the central square that the model sees"),
    "m_image": (5, "M^I: responses per channel over patches"),
    "m_text": (1, "M^T: responses per channel over words, padding masked"),
    "limit": (0, "use so many images; 0: all"),
    "batch_size": (32, "images per batch over all devices of a process"),
    "threads": (0, "threads that decode; 0: one per core, at most 32"),
}

# Keys of each entry of evals.retrieval: images and captions that search each other.
RETRIEVAL_KEYS = {
    **{key: DATA_SET_KEYS[key] for key in DATA_SET_KEYS if key != "weight"},
    "captions": (5, "captions used of every image; 0: all"),
    **EMBEDDING_KEYS,
}

# Keys of each entry of evals.classification: images with one class each.
CLASSIFICATION_KEYS = {
    "data": ("folder", "folder: ROOT/SPLIT/CLASS/IMAGE or a TFDS folder; shapes: generated"),
    "root": ("", "folder of the data"),
    "split": ("", "subfolder, or split of the TFDS or generated data"),
    "names": ("auto", "auto: CLIP's for ImageNet, else the folders'; file of `class: name, name`"),
    "prompts": ("imagenet", "templates: imagenet (the 80 of CLIP), plain, shapes"),
    "size": (256, "shapes: number of scenes"),
    **EMBEDDING_KEYS,
}

# Keys of a linear probe (tables 9 and 10): a classifier on the features of a frozen encoder.
PROBE_KEYS = {
    "seed": (0, "seeds the classifier and the order of the images"),
    "data": CLASSIFICATION_KEYS["data"],
    "root": CLASSIFICATION_KEYS["root"],
    "train": ("train", "split to train on"),
    "val": ("val", "split to measure on"),
    "size": (2000, "shapes: number of training scenes"),
    "val_size": (500, "shapes: number of validation scenes"),
    "feature": ("mean", "embedding: top-M, projected, unit length; cls: CLS; mean: of the patches"),
    "resize": (256, EMBEDDING_KEYS["resize"][1]),
    "crop": (224, EMBEDDING_KEYS["crop"][1]),
    "m_image": EMBEDDING_KEYS["m_image"],
    "images": (32, "images per batch of the encoder over all devices of a process"),
    "threads": EMBEDDING_KEYS["threads"],
    "standardize": (False, "features minus their mean, over their deviation"),
    "epochs": (90, "passes over the features"),
    "warmup_epochs": (10, "of them with a learning rate that rises from 0"),
    "batch_size": (16384, "features per step; never more than there are"),
    "base_lr": (0.1, "peak learning rate for 256 features per step; grows with the batch"),
    "momentum": (0.9, "of LARS"),
    "weight_decay": (0.0, "of LARS"),
}

CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "remat": REMAT,
    "model.pool": POOLS,
    "model.image.activation": tuple(ACTIVATIONS),
    "model.text.activation": tuple(ACTIVATIONS),
    "data.mixture": ("shuffle", "debiased"),
    "data.transform": ("fast", "pil"),
}

DATA_SET_CHOICES = {"format": FORMATS}

PROBE_CHOICES = {"data": ("folder", "shapes"), "feature": FEATURES}

CLASSIFICATION_CHOICES = {"data": ("folder", "shapes"), "prompts": tuple(TEMPLATES)}

SEGMENTATION_CHOICES = {
    "data": tuple(BENCHMARKS),
    "protocol": ("paper", "standard"),
    "prompts": tuple(TEMPLATES),
    "refine": ("none", "crf", "pydensecrf", "pamr"),
    "crf.backend": ("auto", "numpy", "jax"),
    "background": ("threshold", "text"),
}

# fmt: off
AT_LEAST_ONE = (
    "batch_size", "log_every", "model.embed_dim", "model.m_image", "model.m_text",
    "data.threads", "data.prefetch", "data.max_pixels", "checkpoint.every", "checkpoint.keep",
)
DATA_SET_AT_LEAST_ONE = ("size",)
SEGMENTATION_AT_LEAST_ONE = (
    "size", "resolution", "m_image", "m_text", "candidates", "closing", "crf.iterations",
    "pamr.iterations", "stride", "batch_size",
)
EMBEDDING_AT_LEAST_ONE = ("size", "resize", "crop", "m_image", "m_text", "batch_size")
PROBE_AT_LEAST_ONE = ("resize", "crop", "m_image", "images", "epochs", "batch_size")
# fmt: on
