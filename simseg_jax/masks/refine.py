"""From similarity maps in [0, 1] to masks: p > 0.5, either directly or after dense CRF or PAMR.

`Refiner` works on batches: on the device, or on host threads if the CRF runs in NumPy or C++.
`refine_image` is a traceable function of one image, for exported programs.
"""

import functools
from concurrent.futures import Executor
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from simseg_jax.masks.densecrf import CRF, crf_masks, import_pydensecrf, pydensecrf_masks
from simseg_jax.masks.densecrf_jax import crf_masks as crf_masks_jax
from simseg_jax.masks.densecrf_jax import lattice_size
from simseg_jax.masks.pamr import PAMR, pamr
from simseg_jax.masks.permutohedral_jax import BatchLattice, batch_positions
from simseg_jax.masks.postprocess import upsample
from simseg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from simseg_jax.runtime.sharding import BATCH, make_mesh, replicated, structs


@runtime_checkable
class Refinement(Protocol):
    """The part of `SegmentationConfig` that this file reads."""

    @property
    def refine(self) -> str: ...
    @property
    def crf(self) -> CRF: ...
    @property
    def pamr(self) -> PAMR: ...


class Refiner:
    """Masks bool [B, K, S, S] of batches of images: `start` does not wait for them, `finish` does.

    size: S, the side of the images. mesh: each device refines its own images. pool: host threads.
    """

    def __init__(self, settings: Refinement, size: int, mesh: Mesh, pool: Executor):
        self.settings, self.size, self.mesh, self.pool = settings, size, mesh, pool
        self.on_host = on_host(settings, mesh)
        self.vertices = lattice_size(size, size)
        refine = functools.partial(refine_on_device, settings, mesh=mesh)
        self.refine_jit = jax.jit(refine, static_argnames="vertices")

    def start(
        self,
        images: UInt8[Array, "B S S 3"],
        maps: Float[Array, "B K g g"],
        needed: Bool[Array, "B K"],
    ) -> Any:
        """images: uint8 [B, S, S, 3]; maps: [B, K, g, g]; needed: bool [B, K], the masks that will
        be used.
        """
        if self.on_host:
            return images, maps, needed
        share = len(images) // self.mesh.size
        arguments = images, maps, needed, positions_for(self.settings, self.size, share, self.mesh)
        return arguments, self.refine_jit(*arguments, vertices=self.vertices)

    def compile(self, images, maps, needed) -> Any:
        """The program of `start` on the devices; arguments: shape structs with shardings."""
        positions = None
        if self.settings.refine == "crf":
            share = images.shape[0] // self.mesh.size
            sxy = self.settings.crf.gaussian_sxy
            shapes = jax.eval_shape(lambda: batch_positions(self.size, self.size, sxy, share))
            positions = structs(shapes, replicated(self.mesh))
        lowered = self.refine_jit.lower(images, maps, needed, positions, vertices=self.vertices)
        return lowered.compile()

    def finish(self, started: Any) -> jax.Array | np.ndarray:
        """The masks; started: what `start` returned."""
        if self.on_host:
            images, maps, needed = map(np.asarray, started)
            return refine_on_host(self.settings, images, maps, needed, self.pool)
        arguments, (masks, used) = started
        while int(used) > self.vertices:
            # A rare image, whose colours need more vertices than there is room for: refine again
            # with more. After an overflow of the hash table the number needed is unknown.
            most = 6 * self.size**2
            self.vertices = int(used) if int(used) <= most else min(2 * self.vertices, most)
            masks, used = self.refine_jit(*arguments, vertices=self.vertices)
        return masks


def on_host(settings: Refinement, mesh: Mesh) -> bool:
    """Whether host threads refine the masks, not the devices of the mesh."""
    if settings.refine == "pydensecrf":
        import_pydensecrf()
        return True
    backend = settings.crf.backend
    if backend == "auto":
        backend = "jax" if mesh.devices.flat[0].platform == "gpu" else "numpy"
    return settings.refine == "crf" and backend == "numpy"


def denormalized_uint8(images: UInt8[np.ndarray, "*B 3"]) -> UInt8[np.ndarray, "*B 3"]:
    """The image that the original passes to its CRF: normalised, denormalised and truncated.

    Rounding on the way makes some values one level darker than the input.
    """
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    normalized = (images.astype(np.float32) / np.float32(255) - mean) / std
    return ((normalized * std + mean) * np.float32(255)).astype(np.uint8)


def image_for_crf(images: UInt8[Array, "*B 3"]) -> UInt8[Array, "*B 3"]:
    """`denormalized_uint8` as a traceable function."""
    levels = denormalized_uint8(np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1))
    # By table, because fused arithmetic could round to another level.
    channels = [jnp.asarray(levels[:, c])[images[..., c]] for c in range(3)]
    return jnp.stack(channels, axis=-1)


@functools.lru_cache(maxsize=4)
def _positions(size: int, sxy: float, batch: int, mesh: Mesh) -> BatchLattice:
    return jax.device_put(batch_positions(size, size, sxy, batch), replicated(mesh))


def positions_for(settings: Refinement, size: int, images: int, mesh: Mesh) -> BatchLattice | None:
    """The position lattice for `refine_on_device`; images: number per device."""
    if settings.refine != "crf":
        return None
    return _positions(size, settings.crf.gaussian_sxy, images, mesh)


def refine_on_device(
    settings: Refinement,
    images: UInt8[Array, "B S S 3"],
    maps: Float[Array, "B K g g"],
    needed: Bool[Array, "B K"],
    positions: BatchLattice | None,
    vertices: int,
    mesh: Mesh,
) -> tuple[Bool[Array, "B K S S"], Int[Array, ""]]:
    """(masks bool [B, K, S, S], lattice vertices that were needed per image; 0 without CRF).

    images: uint8 [B, S, S, 3]; maps: [B, K, g, g] in [0, 1]; needed: bool [B, K], the masks that
    will be used. positions, vertices: see `densecrf_jax.crf_masks`; the images of one device share
    their room for vertices.
    """
    factor = images.shape[1] // maps.shape[-1]
    if settings.refine == "crf":

        def refine(images, maps, needed, positions):
            masks, count = crf_masks_jax(
                image_for_crf(images),
                upsample(maps, factor),
                positions,
                vertices,
                settings.crf,
                needed.any(axis=0),
            )
            return masks, count[None]

        specs = (BATCH, BATCH, BATCH, jax.P())
        sharded = jax.shard_map(refine, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)
        masks, counts = sharded(images, maps, needed, positions)
        return masks, counts.max()
    if settings.refine == "pamr":
        options = settings.pamr
        maps = pamr(images, upsample(maps, factor), options.iterations, options.dilations)
        return maps > 0.5, jnp.int32(0)
    return upsample(maps > 0.5, factor), jnp.int32(0)


def refine_image(
    settings: Refinement,
    image: UInt8[Array, "S S 3"],
    maps: Float[Array, "K g g"],
    needed: Bool[Array, " K"],
) -> Bool[Array, "K S S"]:
    """Masks bool [K, S, S] of one image, with as many lattice vertices as it needs.

    image: uint8 [S, S, 3]; maps: [K, g, g]; needed: bool [K]. An exported program has no host that
    checks the number of vertices and refines again. It does so itself, with the maximum.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    size = image.shape[0]
    batch = image[None], maps[None], needed[None]
    positions = positions_for(settings, size, 1, mesh)

    def refine(vertices: int) -> tuple[jax.Array, jax.Array]:
        return refine_on_device(settings, *batch, positions, vertices, mesh)

    usual = lattice_size(size, size)
    masks, used = refine(usual)
    if settings.refine == "crf":
        # At most: a pixel lies in a simplex of six vertices.
        masks = jax.lax.cond(used > usual, lambda: refine(6 * size**2)[0], lambda: masks)
    return masks[0]


def refine_on_host(
    settings: Refinement,
    images: UInt8[np.ndarray, "B S S 3"],
    maps: Float[np.ndarray, "B K g g"],
    needed: Bool[np.ndarray, "B K"],
    pool: Executor,
) -> Bool[np.ndarray, "B K S S"]:
    """Masks bool [B, K, S, S]; those not needed stay empty. Images are spread over the threads.

    Threads suffice, because NumPy and SciPy release Python's global lock nearly all of the time.
    """
    masks_of = pydensecrf_masks if settings.refine == "pydensecrf" else crf_masks
    size = images.shape[1]

    def refine(image: np.ndarray, maps: np.ndarray, needed: np.ndarray) -> np.ndarray:
        masks = np.zeros((len(maps), size, size), bool)
        if needed.any():
            factor = size // maps.shape[-1]
            foreground = maps[needed].repeat(factor, axis=1).repeat(factor, axis=2)
            masks[needed] = masks_of(denormalized_uint8(image), foreground, settings.crf)
        return masks

    return np.stack(list(pool.map(refine, images, maps, needed)))
