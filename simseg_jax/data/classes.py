"""Label sets: index 0 is background, names spelled as the original evaluation spells them."""

from simseg_jax.data.shapes import CATEGORIES

SHAPES = ("background", *CATEGORIES)

VOC = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "plant",
    "sheep",
    "sofa",
    "train",
    "monitor",
)
