"""Text-supervised semantic segmentation in JAX: train on captions, segment with words."""

__version__ = "0.1.0"
