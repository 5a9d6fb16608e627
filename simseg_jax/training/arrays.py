"""Arrays in Orbax folders: reading them, their checksums and shapes."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from simseg_jax.models.simseg import path_string
from simseg_jax.runtime.errors import UserError, one_line

# Characters that the libraries below Orbax cannot read in a path.
UNUSABLE = set("[]*?\\\0")


def with_sharding(shapes, shardings):
    """Shape structs with shardings, as the functions that restore arrays take them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def load_arrays(path: epath.Path, abstract: dict) -> dict:
    """The trees of arrays {"params": ...} in an Orbax folder, with the shardings of `abstract`."""
    refuse_unusable(str(path))
    try:
        with first_error_only():
            return ocp.load_checkpointables(str(path), abstract)
    except Exception as error:  # Orbax and TensorStore raise errors of many types.
        raise UserError(damaged(path, error)) from error


@contextlib.contextmanager
def first_error_only() -> Iterator[None]:
    """Silences asyncio's log, for good if there is an error.

    Orbax then reads on in the background, and further errors in the log would hide the first one.
    """
    log = logging.getLogger("asyncio")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


def refuse_unusable(path: str) -> None:
    """Raises a `UserError` for a path below which Orbax cannot read what it writes."""
    if UNUSABLE & set(path):
        raise UserError(
            f"Checkpoints cannot be kept under {path!r}: the library that reads them takes [ ] * ? "
            "and \\ for wildcards. Choose a path without these characters."
        )


def damaged(path: epath.Path, error: Exception) -> str:
    """The message about a checkpoint that cannot be read."""
    return (
        f"The checkpoint {path} cannot be read ({type(error).__name__}: {one_line(error, 100)}). "
        "If it is damaged or incomplete, move it away: the next older one is used then."
    )


def checksums(trees) -> dict[str, str]:
    """A checksum of every array by its path, as hexadecimal digits.

    It depends only on the bits of the array, not on how it is split over devices and processes; all
    processes must call this together. One changed element always changes it, several do with a
    probability of 1 - 2^-32.
    """
    sums = jax.device_get({name: _checksum(leaf) for name, leaf in _by_path(trees).items()})
    return {name: f"{int(value):08x}" for name, value in sums.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """uint32 []: the sum of all elements, each hashed together with its index."""
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    words ^= place * jnp.uint32(0x9E3779B1)
    # The finaliser of MurmurHash3: one to one, so that one changed word always changes the sum.
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


def shapes(trees) -> dict[str, list[int]]:
    """The shape of every array, or shape struct, by its path."""
    return {name: list(leaf.shape) for name, leaf in _by_path(trees).items()}


def _by_path(tree) -> dict[str, Any]:
    """The leaves by names such as "params/image_encoder/pos_embed"."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
