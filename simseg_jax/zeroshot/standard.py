"""The field's usual protocol: sliding windows or the whole image, then an argmax at every pixel.

GroupViT and TCL evaluate like this: the shorter side is resized to 448 pixels, and a window of 448
pixels slides over the image in steps of 224. Class values are upsampled bilinearly, averaged where
windows overlap, and resized to the ground truth. These operations are linear and separable. The
host therefore makes one matrix per row and per column of windows; the device does two products per
image, and only labels leave it.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from simseg_jax.masks.pamr import pamr
from simseg_jax.masks.postprocess import label_type
from simseg_jax.models.simseg import bind, l2_normalize
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.sharding import BATCH, to_global_batch
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.paper import classes_in, project
from simseg_jax.zeroshot.settings import SegmentationConfig

# Results are padded to multiples of this side, so that few programs serve images of all sizes.
BUCKET = 64
STEP = 16  # Maps hold every 16th value along a side: all would take 30 MB per image.
MAX_PIXELS = 1 << 26  # Of a resized image; a photograph has less than a hundredth of that.
HIGHEST = jax.lax.Precision.HIGHEST


class Scores(NamedTuple):
    """Scores and similarity maps of B images and C classes, those that are padding included."""

    scores: jax.Array  # [B, C] image-text score, averaged over the windows
    maps: jax.Array | None = None  # [B, C, H / STEP, W / STEP] cosines, where asked for

    def rows(self, index: int | slice) -> "Scores":
        """The scores of one image (without batch axis) or of a slice of images."""
        return jax.tree.map(lambda field: field[index], self)


class StandardProtocol:
    """Same arguments and methods as `paper.PaperProtocol`."""

    after_encoder = ("m_image", "m_text", "background", "background_threshold", "softmax_scale")

    def __init__(
        self,
        model: Model,
        settings: Sequence[SegmentationConfig],
        background: bool = True,
        maps: bool = False,
    ):
        self.graphdef, self.mesh, self.patch = model.graphdef, model.local_mesh, model.patch_size
        self.settings, self.common, self.background = settings, settings[0], background
        self.maps = maps
        self.predict_jit = jax.jit(self._predict)

    def load(self, image: Image.Image, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """n x m windows: uint8 [n * m, h, w, 3]; matrices rows: [n, H, g], columns: [m, W, g].

        rows and columns map the g x g values of a window to its pixels of the H x W result. PIL
        resizes the image with antialiasing (OpenCV has none), whatever its longer side; without
        windows both sides are rounded to multiples of the patch size.
        """
        scale = self.common.resolution / min(image.size)
        unit = 1 if self.common.window else self.patch
        width, height = (max(int(side * scale / unit + 0.5), 1) * unit for side in image.size)
        if width * height > MAX_PIXELS:
            raise UserError(
                f"An image of {image.width}x{image.height} pixels is too narrow for "
                f"protocol=standard, which would resize it to {width}x{height}."
            )
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        # PAMR gives one value per pixel; otherwise a window has one value per patch.
        cell = 1 if self.common.refine == "pamr" else self.patch
        tops, rows = self._along(height, shape[0], cell)
        lefts, columns = self._along(width, shape[1], cell)
        h, w = self.common.window or height, self.common.window or width
        windows = [pixels[top : top + h, left : left + w] for top in tops for left in lefts]
        return {"windows": np.stack(windows), "rows": rows, "columns": columns}

    def restore(self, mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The labels without their padding."""
        return mask[: shape[0], : shape[1]]

    def restore_maps(self, maps: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The maps [C, h, w] of one image without their padding: a value per STEP pixels."""
        height, width = (-(-side // STEP) for side in shape)
        return maps[:, :height, :width]

    def start(self, params, class_embeddings: Mapping[int, Any], batch: dict):
        """Starts work on a batch of arrays from `load`; class_embeddings: M^T -> [C, D]."""
        return self.predict_jit(params, class_embeddings, to_global_batch(batch, self.mesh))

    def compile(self, params, class_embeddings, batch: dict) -> Iterator[tuple[str, Any]]:
        """The one compiled program, as `PaperProtocol.compile` yields several."""
        yield "all steps", self.predict_jit.lower(params, class_embeddings, batch).compile()

    def finish(self, started) -> tuple[np.ndarray, list[Scores]]:
        """(masks [V, B, H, W], scores under each of the V settings) as NumPy arrays."""
        return jax.tree.map(np.asarray, started)

    def _along(self, size: int, target: int, cell: int) -> tuple[list[int], np.ndarray]:
        """(where windows begin along one side, matrices [windows, padded target, cells])."""
        window = self.common.window or size
        # A stride longer than the window would leave gaps. The last window ends with the image.
        stride = min(self.common.stride, window)
        count = -(-max(size - window, 0) // stride) + 1
        begins = [min(i * stride, size - window) for i in range(count)]
        covering = np.zeros(size, np.float32)
        for begin in begins:
            covering[begin : begin + window] += 1
        resized = bilinear(size, target) / covering
        matrices = [resized[:, b : b + window] @ bilinear(window // cell, window) for b in begins]
        return begins, np.pad(np.stack(matrices), ((0, 0), (0, -target % BUCKET), (0, 0)))

    def _predict(self, params, class_embeddings, batch):
        model = bind(self.graphdef, params)
        windows, rows, columns = batch["windows"], batch["rows"], batch["columns"]
        images, count, height, width, _ = windows.shape
        flat = windows.reshape(images * count, height, width, 3)
        tokens = project(model, flat, self.mesh)
        patches = l2_normalize(tokens[:, 1:])
        grid = (height // self.patch, width // self.patch)
        patches = patches.reshape(images, rows.shape[1], columns.shape[1], *grid, -1)
        label = jax.shard_map(
            lambda embeddings, *image: jax.lax.map(
                lambda arguments: self._labels(embeddings, *arguments), image
            ),
            mesh=self.mesh,
            in_specs=(jax.P(), BATCH, BATCH, BATCH, BATCH),
            out_specs=BATCH,
            check_vma=False,
        )
        masks, maps = label(class_embeddings, patches, windows, rows, columns)
        responses = []
        for i, settings in enumerate(self.settings):
            embedding = model.pool_image(tokens, settings.m_image).reshape(images, count, -1)
            classes = class_embeddings[settings.m_text].T
            scores = jnp.matmul(embedding.mean(axis=1), classes, precision=HIGHEST)
            responses.append(
                Scores(scores, maps[settings.m_text] if i == 0 and self.maps else None)
            )
        return masks.swapaxes(0, 1), responses

    def _labels(self, class_embeddings, patches, windows, rows, columns) -> tuple:
        """(labels [V, H, W], M^T -> maps) of one image; patches: [n, m, g, g, D]."""
        values, maps = {}, {}
        for m_text in {settings.m_text for settings in self.settings}:
            cosines = jnp.einsum(
                "ijghd,cd->ijcgh", patches, class_embeddings[m_text], precision=HIGHEST
            )
            if self.common.refine == "pamr":
                cosines = self._refined(cosines, windows)
            tall = jnp.einsum("iyg,ijcgh->jcyh", rows, cosines, precision=HIGHEST)
            cosines = jnp.einsum("jcyh,jxh->cyx", tall, columns, precision=HIGHEST)
            classes = classes_in(class_embeddings[m_text])
            values[m_text] = jnp.where(classes[:, None, None], cosines, -jnp.inf)
            if self.maps:
                maps[m_text] = cosines[:, ::STEP, ::STEP]
        masks = [self._argmax(values[settings.m_text], settings) for settings in self.settings]
        classes = len(class_embeddings[self.common.m_text])
        return jnp.stack(masks).astype(label_type(classes)), maps

    def _refined(self, cosines: jax.Array, windows: jax.Array) -> jax.Array:
        """Refined values of pixels [n, m, C, h, w] from cosines of patches [n, m, C, g, g]."""
        n, m, classes, *grid = cosines.shape
        height, width = windows.shape[1:3]
        up = bilinear(grid[0], height), bilinear(grid[1], width)
        maps = jnp.einsum("yg,ijcgh,xh->ijcyx", up[0], cosines, up[1], precision=HIGHEST)
        options = self.common.pamr
        maps = maps.reshape(n * m, classes, height, width)
        maps = pamr(windows, maps, options.iterations, tuple(options.dilations))
        return maps.reshape(n, m, classes, height, width)

    def _argmax(self, values: jax.Array, settings) -> jax.Array:
        """Labels [H, W] from values [C, H, W]; class 0 is the prompt "background"."""
        if self.background and settings.background == "text":
            return values.argmax(axis=0)
        values = values[1:]
        label = values.argmax(axis=0) + 1
        if not self.background:
            return label
        if settings.softmax_scale:
            values = jax.nn.softmax(settings.softmax_scale * values, axis=0)
        return jnp.where(values.max(axis=0) >= settings.background_threshold, label, 0)


@functools.lru_cache(maxsize=32)  # Up to 7 MB each.
def bilinear(size: int, target: int) -> Float[np.ndarray, "{target} {size}"]:
    """The matrix float32 [target, size] of bilinear interpolation from `size` to `target` values.

    Like PyTorch with align_corners=False: between pixel centres, repeated borders, no antialiasing.
    """
    source = (np.arange(target) + 0.5) * (size / target) - 0.5
    source = source.clip(0, size - 1)
    low = np.floor(source).astype(int)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((target, size), np.float32)
    index = np.arange(target)
    np.add.at(matrix, (index, low), 1 - (source - low))
    np.add.at(matrix, (index, high), source - low)
    return matrix
