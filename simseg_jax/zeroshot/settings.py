"""The settings of one zero-shot segmentation: test set, classes, protocol and its parameters."""

import dataclasses

from simseg_jax.data.testsets.classes import TEST_SETS, classes_of
from simseg_jax.masks.densecrf import CRF
from simseg_jax.masks.pamr import PAMR
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.ranges import (
    BATCH,
    RESPONSES,
    SCENES,
    SIDE,
    TEXT,
    THREADS,
    Accepts,
    number,
    one_of,
    whole,
)
from simseg_jax.runtime.settings import group, setting
from simseg_jax.zeroshot.prompts import TEMPLATES


@dataclasses.dataclass(frozen=True)
class SegmentationConfig:
    """One entry of `evals.seg`; the default is the paper protocol on VOC 2012.

    A meaning that begins with "paper:" or "standard:" applies to that protocol only.
    """

    data: str = setting(
        "voc",
        "the test set; shapes: generated scenes; folder: images and masks of your own",
        one_of(*TEST_SETS, "folder"),
    )
    root: str = setting(
        "", "the test set's folder, such as VOC2012, VOC2010 or ADEChallengeData2016", TEXT
    )
    split: str = setting(
        "val",
        "name of the test set's list or folder; shapes: train, val, test; folder: empty for all",
        TEXT,
    )
    classes: str = setting(
        "classes.txt",
        "folder: text file in root, a class per line: `name`, `value name` or `r g b name`",
        TEXT,
    )
    ignore: str = setting(
        "255", "folder: values in masks, or classes, that do not count; comma-separated", TEXT
    )
    names: str = setting(
        "original", "class names in prompts: original (the authors'), synonyms, a text file", TEXT
    )
    size: int = setting(256, "shapes: number of scenes", SCENES)
    limit: int = setting(0, "number of images, the first ones; 0: all", whole(0))
    protocol: str = setting(
        "paper",
        "paper: threshold on class scores, then a mask per class; standard: argmax per pixel",
        one_of("paper", "standard"),
    )
    resolution: int = setting(
        288, "paper: side of the square image; standard: shorter side, usually 448", SIDE
    )
    prompts: str = setting(
        "imagenet", "templates: imagenet (the 80 of CLIP), plain, shapes", one_of(*TEMPLATES)
    )
    m_image: int = setting(5, "M^I: responses per channel over patches", RESPONSES)
    m_text: int = setting(1, "M^T: responses per channel over words, without padding", RESPONSES)
    top_k: int = setting(
        0,
        "paper: how many of the highest class scores set the threshold; 0: the test set's number, "
        "10 for voc, 30 for context; folder: 10 with background, else 30",
        # A single score has no standard deviation.
        Accepts(
            "0, for the test set's number, or a whole number from 2 to 1,000,000",
            lambda value: value != 1 and whole(0, 10**6).allows(value),
        ),
    )
    sigma_weight: float = setting(
        1.0,
        "paper: threshold = mean + sigma_weight * standard deviation of those scores",
        number(-100, 100),
    )
    candidates: int = setting(5, "paper: at most this many classes per image", whole(1, 1000))
    refine: str = setting(
        "crf",
        "crf: dense CRF; none: p > 0.5; pamr; pydensecrf: the same CRF in C++ (extra crf)",
        one_of("none", "crf", "pydensecrf", "pamr"),
    )
    closing: int = setting(
        7, "paper: side in pixels of the square of the closing; 1: no closing", whole(1, 255)
    )
    crf: CRF = group(CRF)
    pamr: PAMR = group(PAMR)
    window: int = setting(
        448, "standard: side of the sliding window in pixels; 0: the whole image", whole(0, 4096)
    )
    stride: int = setting(224, "standard: step of the sliding window in pixels", SIDE)
    background: str = setting(
        "threshold",
        "standard: threshold on pixel values, or text: the prompt background is a class",
        one_of("threshold", "text"),
    )
    background_threshold: float = setting(
        0.2, "standard: pixels below are background; tune per checkpoint", number(-1, 1)
    )
    softmax_scale: float = setting(
        0.0, "standard: pixel values are softmax(scale * cosine); 0: cosines", number(0, 1e4)
    )
    batch_size: int = setting(32, "images per batch over all devices of a process", BATCH)
    threads: int = setting(
        0, "threads that decode, refine and count pixels; 0: one per core, at most 32", THREADS
    )

    def check(self, prefix: str = "") -> None:
        """Raises a `UserError` if fields contradict each other; prefix: precedes their names."""
        if self.protocol == "paper":
            return
        if self.window > self.resolution:
            raise UserError(
                f"{prefix}window={self.window} must not exceed the shorter side of the images, "
                f"{prefix}resolution={self.resolution}; 0 takes the whole image."
            )
        if self.refine not in ("none", "pamr"):
            raise UserError(
                f"{prefix}refine={self.refine!r} belongs to the paper protocol: set "
                f"{prefix}refine to none or pamr."
            )

    def check_patches(self, patch_size: int, prefix: str = "") -> None:
        """Raises a `UserError` unless the patch size divides resolution and window."""
        sizes = {"resolution": self.resolution}
        if self.protocol == "standard":
            sizes["window"] = self.window
        for key, size in sizes.items():
            if size % patch_size:
                raise UserError(
                    f"{prefix}{key}={size} must be a multiple of the patch size, which is "
                    f"{patch_size}."
                )

    @property
    def class_scores(self) -> int:
        """How many class scores set the threshold: `top_k`, or the test set's number."""
        return self.top_k or classes_of(self).top_k
