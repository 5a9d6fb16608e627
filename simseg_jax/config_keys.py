"""Every configuration key: its default, what it means and what it accepts; nothing else knows them.

The upper ends of ranges lie far above sensible values: they keep slips (a digit too many, a value
meant for another key) from taking hours or all of the memory.
"""

from simseg_jax.data.testsets.classes import BENCHMARKS
from simseg_jax.masks.densecrf import PAPER
from simseg_jax.masks.pamr import DILATIONS
from simseg_jax.models.layers import ACTIVATIONS, REMAT
from simseg_jax.models.simseg import POOLS
from simseg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from simseg_jax.runtime.ranges import (
    FLAG,
    RULES,
    SHARE,
    TEXT,
    Accepts,
    Key,
    number,
    one_of,
    pair,
    several,
    whole,
)
from simseg_jax.weights import bounds
from simseg_jax.zeroshot.prompts import TEMPLATES

FEATURES = ("embedding", "cls", "mean")  # See `evaluators.embedding`.
ASPECTS = ("squash", "keep")

SEED = whole(0, 2**32 - 1)  # What both NumPy and JAX take.
BATCH = whole(1, 2**20)
SIDE = whole(1, 4096)
WIDTH = whole(1, 2**16)
DEPTH = whole(1, bounds.BLOCKS)
HEADS = whole(1, 1024)
RESPONSES = whole(1, 256)
THREADS = whole(0, 256)
SCENES = whole(1, 10**8)
EPSILON = number(1e-15, 0.1)
DECAY = number(0, 10)
BELOW_ONE = number(0, 1, below=True)
LEARNING_RATE = number(0, 100, above=True)
COMPATIBILITY = number(0, 1000)
DEVIATION = number(0.01, 1000)
PROMPTS = one_of(*TEMPLATES)
CHANNELS = range(3, 4)

KEYS = {
    "seed": Key(0, "seeds parameters, data order, augmentation and dropout", SEED),
    "steps": Key(1000, "training steps; ignored when epochs > 0", whole(0)),
    "epochs": Key(0.0, "passes over the images; > 0 sets the number of steps", number(0, 1e6)),
    "batch_size": Key(
        4096, "pairs per step over all devices: the contrastive batch", whole(2, 2**20)
    ),
    "dtype": Key(
        "auto",
        "compute type; auto: bfloat16 on accelerators",
        one_of("auto", "float32", "bfloat16"),
    ),
    "remat": Key(
        "none",
        "what is computed again for the gradient: none; dots: all but products; full",
        one_of(*REMAT),
    ),
    "micro_batch": Key(
        0, "gradient cache: pairs of a device embedded at a time; 0: all at once", whole(0)
    ),
    "loss_chunk": Key(
        0, "images of a device compared with all texts at a time; 0: all at once", whole(0)
    ),
    "log_every": Key(10, "steps between two lines of metrics", whole(1)),
    "eval_every": Key(0, "steps between evaluations; 0: only after training", whole(0)),
    "pictures": Key(
        8, "images on the contact sheet written after training; 0: none", whole(0, 1000)
    ),
    "model": {
        "image": {
            "image_size": Key(224, "side of training images in pixels", SIDE),
            "patch_size": Key(16, "side of a patch in pixels", SIDE),
            "width": Key(384, "channels of the ViT", WIDTH),
            "depth": Key(12, "blocks of the ViT", DEPTH),
            "heads": Key(6, "attention heads of the ViT", HEADS),
            "mlp_width": Key(1536, "hidden channels of its MLPs", WIDTH),
            "pre_norm": Key(False, "LayerNorm before the first block, as in CLIP", FLAG),
            "activation": Key("gelu", "of its MLPs", one_of(*ACTIVATIONS)),
            "norm_eps": Key(1e-6, "epsilon of its LayerNorms", EPSILON),
            "mean": Key(
                IMAGENET_MEAN,
                "of the channels in [0, 1]: what images are normalised with",
                several(SHARE, CHANNELS, "three numbers"),
            ),
            "std": Key(
                IMAGENET_STD,
                "deviation of the channels",
                several(number(0.001, 10), CHANNELS, "three numbers"),
            ),
        },
        "text": {
            "vocab_size": Key(
                0, "rows of the word embedding; 0: the size of the vocabulary", whole(0, 2**24)
            ),
            "max_positions": Key(512, "rows of the position embedding", whole(3, 2**16)),
            "width": Key(768, "channels of BERT", WIDTH),
            "depth": Key(12, "layers of BERT", DEPTH),
            "heads": Key(12, "attention heads of BERT", HEADS),
            "mlp_width": Key(3072, "hidden channels of its MLPs", WIDTH),
            "dropout": Key(0.1, "dropout of embeddings, attention and residuals", BELOW_ONE),
            "activation": Key("gelu", "of its MLPs", one_of(*ACTIVATIONS)),
            "norm_eps": Key(1e-12, "epsilon of its LayerNorms", EPSILON),
        },
        "embed_dim": Key(512, "channels of the common embedding", WIDTH),
        "pool": Key(
            "loda",
            "loda: top-M per channel; mean: dense alignment; cls: CLS tokens",
            one_of(*POOLS),
        ),
        "m_image": Key(5, "M^I in training: responses per channel over patches", RESPONSES),
        "m_text": Key(5, "M^T in training: responses per channel over words", RESPONSES),
        "mask_padding": Key(
            False, "keep [PAD] out of text pooling in training; the authors do not", FLAG
        ),
        "temperature": Key(0.07, "initial temperature", number(0.001, 0.5)),
    },
    "init": {
        "model": Key(
            "",
            "start from a whole model: WORKDIR, converted folder, the authors' .pth, URL or hub id",
            TEXT,
        ),
        "image": Key(
            "",
            "start the ViT from this file, folder, URL or hub id; it decides model.image but for "
            "image_size, to which positions are resized",
            TEXT,
        ),
        "text": Key("", "start BERT from this; it decides model.text but for dropout", TEXT),
    },
    "optim": {
        "lr": Key(3e-4, "peak learning rate", LEARNING_RATE),
        "warmup": Key(0.025, "share of the steps with linear warm-up from 0", BELOW_ONE),
        "final_lr": Key(
            0.1, "learning rate at the end of the cosine, as a share of the peak", SHARE
        ),
        "b1": Key(0.9, "AdamW beta 1", BELOW_ONE),
        "b2": Key(0.98, "AdamW beta 2", BELOW_ONE),
        "eps": Key(1e-6, "AdamW epsilon", EPSILON),
        "weight_decay": Key(0.2, "decoupled weight decay", DECAY),
        "clip_norm": Key(0.0, "bound on the global gradient norm; 0: none", number(0, 1e6)),
        "lr_rules": Key(
            ((".*", 1.0),), "(path pattern, lr multiplier), first match; 0 freezes", RULES
        ),
        "decay_rules": Key(
            ((".*", 1.0),), "(path pattern, weight-decay multiplier), first match", RULES
        ),
    },
    "data": {
        "train": {},
        "mixture": Key(
            "shuffle",
            "shuffle: all data sets together; debiased: each batch from one",
            one_of("shuffle", "debiased"),
        ),
        "vocab": Key(
            "bert-base-uncased", "vocabulary: hub name, vocab.txt, tokenizer folder, shapes", TEXT
        ),
        "max_length": Key(25, "tokens per caption, [CLS] and [SEP] included", whole(3, 2**16)),
        "edit_rate": Key(
            0.2, "share of word pieces masked (50 %), replaced (10 %), deleted (40 %)", SHARE
        ),
        "crop_area": Key(
            (0.6, 1.0),
            "RandomResizedCrop: range of the area kept",
            pair(number(0, 1, above=True)),
        ),
        "crop_aspect": Key(
            (3 / 4, 4 / 3),
            "RandomResizedCrop: range of width / height",
            pair(number(0.01, 100)),
        ),
        "autoaugment": Key(True, "AutoAugment, ImageNet policy", FLAG),
        "transform": Key(
            "fast",
            "fast: libjpeg-turbo, AutoAugment on the device; pil: all on hosts",
            one_of("fast", "pil"),
        ),
        "max_bad": Key(0.1, "stop when more than this share of the examples is damaged", SHARE),
        "max_pixels": Key(
            89_478_485, "larger images count as damaged: decompression bombs", whole(1)
        ),
        "threads": Key(
            16, "threads that read and prepare examples, in every worker", whole(1, 256)
        ),
        "workers": Key(
            0, "processes that do so; 0: only this one. One per core feeds most", whole(0, 256)
        ),
        "prefetch": Key(512, "examples prepared ahead, by every worker", whole(1, 2**14)),
        "cache": Key("", "folder for indexes and copies of Parquet; '': ~/.cache/simseg_jax", TEXT),
    },
    "mesh": {
        "fsdp": Key(1, "devices that share one copy of the parameters; the rest is data", whole(1))
    },
    "checkpoint": {
        "every": Key(1000, "steps between checkpoints; the last step is always saved", whole(1)),
        "keep": Key(3, "newest checkpoints kept", whole(1)),
        "directory": Key(
            "", "folder or URL (gs://) of the checkpoints; '': WORKDIR/checkpoints", TEXT
        ),
        "resume": Key(
            "", "WORKDIR of another run to start from when this one has no checkpoint", TEXT
        ),
    },
    "evals": {"seg": {}, "retrieval": {}, "classification": {}},
}

# Keys of each entry of data.train: one data set of image-caption pairs.
DATA_SET_KEYS = {
    "path": Key(
        "", "file, folder, pattern ({000..331}, *) or URL (gs://, s3://, hf://) of the data", TEXT
    ),
    "format": Key(
        "auto",
        "of the data; auto: told by the files",
        one_of("auto", "csv", "coco", "tfds", "array_record", "webdataset", "parquet", "shapes"),
    ),
    "split": Key(
        "",
        "tfds, Karpathy's JSON: name of the split; csv, coco: file listing the images; '': all",
        TEXT,
    ),
    "images": Key("", "csv, coco: folder of the images, relative to the table's", TEXT),
    "image_key": Key("", "column or feature with the image; '': the usual names", TEXT),
    "caption_key": Key(
        "", "column or feature with the caption or captions; '': the usual names", TEXT
    ),
    "weight": Key(
        1.0,
        "times an epoch shows this data set; 0.5 shows half of it",
        number(1e-6, 1000),
    ),
    "size": Key(8192, "shapes: number of generated scenes", SCENES),
}

# Keys of each entry of evals.seg: one zero-shot segmentation benchmark and how it is evaluated.
# "paper" and "standard" name the protocol a key belongs to; the others belong to both.
SEGMENTATION_KEYS = {
    "data": Key("voc", "the benchmark; shapes: generated scenes", one_of(*BENCHMARKS)),
    "root": Key(
        "", "the benchmark's folder, such as VOC2012, VOC2010 or ADEChallengeData2016", TEXT
    ),
    "split": Key(
        "val", "name of a list or folder of the benchmark; shapes: train, val, test", TEXT
    ),
    "names": Key(
        "original",
        "class names in prompts: original (the authors'), synonyms, a text file",
        TEXT,
    ),
    "size": Key(256, "shapes: number of scenes", SCENES),
    "limit": Key(0, "use the first so many images; 0: all", whole(0)),
    "protocol": Key(
        "paper",
        "paper: class threshold, masks per class; standard: argmax per pixel",
        one_of("paper", "standard"),
    ),
    "resolution": Key(
        288, "paper: side of the square image; standard: shorter side, usually 448", SIDE
    ),
    "prompts": Key("imagenet", "templates: imagenet (the 80 of CLIP), plain, shapes", PROMPTS),
    "m_image": Key(5, "M^I: responses per channel over patches", RESPONSES),
    "m_text": Key(1, "M^T: responses per channel over words, padding masked", RESPONSES),
    "top_k": Key(
        0,
        "paper: class scores that set the threshold; 0: as data has it, 10 for voc, 30 for context",
        # One has no deviation.
        Accepts(
            "0, for what the data set has, or a whole number from 2 to 1,000,000",
            lambda value: value != 1 and whole(0, 10**6).allows(value),
        ),
    ),
    "sigma_weight": Key(
        1.0,
        "paper: threshold = mean + sigma_weight * standard deviation of those",
        number(-100, 100),
    ),
    "candidates": Key(5, "paper: classes an image can show at most", whole(1, 1000)),
    "refine": Key(
        "crf",
        "crf: dense CRF; none: p > 0.5; pamr; pydensecrf: crf in C++, extra crf",
        one_of("none", "crf", "pydensecrf", "pamr"),
    ),
    "closing": Key(
        7,
        "paper: side in pixels of the square that closes small holes; 1: none",
        whole(1, 255),
    ),
    "crf": {
        "backend": Key(
            "auto",
            "numpy (threads of the host), jax (device), auto: jax on GPUs only",
            one_of("auto", "numpy", "jax"),
        ),
        "gaussian_sxy": Key(
            PAPER.gaussian_sxy, "deviation of the position kernel in pixels", DEVIATION
        ),
        "gaussian_compat": Key(PAPER.gaussian_compat, "weight of that kernel", COMPATIBILITY),
        "bilateral_sxy": Key(
            PAPER.bilateral_sxy, "position deviation of the bilateral kernel", DEVIATION
        ),
        "bilateral_srgb": Key(
            PAPER.bilateral_srgb, "its colour deviation in levels 0..255", DEVIATION
        ),
        "bilateral_compat": Key(PAPER.bilateral_compat, "weight of that kernel", COMPATIBILITY),
        "iterations": Key(PAPER.iterations, "mean-field updates", whole(1, 1000)),
    },
    "pamr": {
        "iterations": Key(10, "smoothing steps", whole(1, 1000)),
        "dilations": Key(
            DILATIONS,
            "distances of the neighbours in pixels",
            several(whole(1, 256), range(1, 17), "1 to 16 distances"),
        ),
    },
    "window": Key(
        448, "standard: side of the sliding window; 0: the whole image at once", whole(0, 4096)
    ),
    "stride": Key(224, "standard: step of the sliding window", SIDE),
    "background": Key(
        "threshold",
        "standard: threshold, or text: the word background competes",
        one_of("threshold", "text"),
    ),
    "background_threshold": Key(
        0.2, "standard: below it is background; depends on the checkpoint", number(-1, 1)
    ),
    "softmax_scale": Key(
        0.0, "standard: values are softmax(scale * cosine); 0: cosines", number(0, 1e4)
    ),
    "batch_size": Key(32, "images per batch over all devices of a process", BATCH),
    "threads": Key(
        0, "threads that decode, refine and count; 0: one per core, at most 32", THREADS
    ),
}

EMBEDDING_KEYS = {
    "resize": Key(324, "side in pixels to which images are resized", SIDE),
    "crop": Key(288, "side of the central square that the model sees", SIDE),
    "aspect": Key(
        "squash",
        "squash: to a square of resize pixels, as the authors; keep: the shorter side to resize",
        one_of(*ASPECTS),
    ),
    "m_image": Key(5, "M^I: responses per channel over patches", RESPONSES),
    "m_text": Key(1, "M^T: responses per channel over words, padding masked", RESPONSES),
    "limit": Key(0, "use so many images; 0: all", whole(0)),
    "batch_size": Key(32, "images per batch over all devices of a process", BATCH),
    "threads": Key(0, "threads that decode; 0: one per core, at most 32", THREADS),
}

# Keys of each entry of evals.retrieval: images and captions that search each other.
RETRIEVAL_KEYS = {
    **{key: DATA_SET_KEYS[key] for key in DATA_SET_KEYS if key != "weight"},
    "captions": Key(5, "captions used of every image; 0: all", whole(0)),
    **EMBEDDING_KEYS,
}

# Keys of each entry of evals.classification: images with one class each.
CLASSIFICATION_KEYS = {
    "data": Key(
        "folder",
        "folder: ROOT/SPLIT/CLASS/IMAGE or a TFDS folder; shapes: generated",
        one_of("folder", "shapes"),
    ),
    "root": Key("", "folder of the data", TEXT),
    "split": Key("", "subfolder, or split of the TFDS or generated data", TEXT),
    "names": Key(
        "auto", "auto: CLIP's for ImageNet, else the folders'; file of `class: name, name`", TEXT
    ),
    "prompts": Key("imagenet", "templates: imagenet (the 80 of CLIP), plain, shapes", PROMPTS),
    "size": Key(256, "shapes: number of scenes", SCENES),
    **EMBEDDING_KEYS,
}

# Keys of a linear probe (tables 9 and 10): a classifier on the features of a frozen encoder.
PROBE_KEYS = {
    "seed": Key(0, "seeds the classifier and the order of the images", SEED),
    "data": CLASSIFICATION_KEYS["data"],
    "root": CLASSIFICATION_KEYS["root"],
    "train": Key("train", "split to train on", TEXT),
    "val": Key("val", "split to measure on", TEXT),
    "size": Key(2000, "shapes: number of training scenes", SCENES),
    "val_size": Key(500, "shapes: number of validation scenes", SCENES),
    "feature": Key(
        "cls",
        "cls: CLS, as the authors; mean: of the patches; embedding: top-M, projected, unit length",
        one_of(*FEATURES),
    ),
    "resize": EMBEDDING_KEYS["resize"]._replace(default=256),
    "crop": EMBEDDING_KEYS["crop"]._replace(default=224),
    "aspect": EMBEDDING_KEYS["aspect"],
    "m_image": EMBEDDING_KEYS["m_image"],
    "images": Key(32, "images per batch of the encoder over all devices of a process", BATCH),
    "threads": EMBEDDING_KEYS["threads"],
    "standardize": Key(False, "features minus their mean, over their deviation", FLAG),
    "epochs": Key(90, "passes over the features", whole(1, 10**6)),
    "warmup_epochs": Key(10, "of them with a learning rate that rises from 0", whole(0, 10**6)),
    "batch_size": Key(16384, "features per step; never more than there are", whole(1)),
    "base_lr": Key(
        0.1,
        "peak learning rate for 256 features per step; grows with the batch",
        LEARNING_RATE,
    ),
    "momentum": Key(0.9, "of LARS", BELOW_ONE),
    "weight_decay": Key(0.0, "of LARS", DECAY),
}

# Where a configuration names groups of keys of its own, and which keys each of them has.
ENTRIES = {
    "data.train": DATA_SET_KEYS,
    "evals.seg": SEGMENTATION_KEYS,
    "evals.retrieval": RETRIEVAL_KEYS,
    "evals.classification": CLASSIFICATION_KEYS,
}
