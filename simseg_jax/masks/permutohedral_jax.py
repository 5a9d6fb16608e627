"""The lattices of a batch of images, built and applied on an accelerator (see `permutohedral`).

All images share one pool of vertices of a fixed capacity. The number of vertices that were needed
is part of the result: whoever uses a lattice must check `count <= capacity` on the host and build
again with more where it is not. Gathers and scatters are flat and one-dimensional, which XLA
compiles to far faster code than rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simseg_jax.masks.permutohedral import Embedding, blur_gain, position_lattice

BOUNDS = "promise_in_bounds"
# Rounds of probing before a table counts as too full: reached far beyond the load it is made for.
MAX_PROBES = 64


class BatchLattice(NamedTuple):
    """B * N pixels on up to `capacity` vertices."""

    columns: jax.Array  # int32 [d + 1, B * N], the vertices of every pixel
    weights: jax.Array  # float32 [d + 1, B * N], barycentric
    before: jax.Array  # int32 [d + 1, capacity], neighbours along every direction;
    after: jax.Array  # `capacity` where there is none
    count: jax.Array  # int32 [], vertices needed

    @property
    def capacity(self) -> int:
        """Vertices there is room for."""
        return self.before.shape[1]

    def filter(self, values: jax.Array) -> jax.Array:
        """Splat, blur and slice of float32 [B * N], without normalisation."""
        none = jnp.zeros(1, jnp.float32)
        lattice = jnp.zeros(self.capacity + 1, jnp.float32)
        spread = (values[None] * self.weights).reshape(-1)
        lattice = lattice.at[self.columns.reshape(-1)].add(spread, mode=BOUNDS)
        for before, after in zip(self.before, self.after, strict=True):
            both = lattice.at[before].get(mode=BOUNDS) + lattice.at[after].get(mode=BOUNDS)
            lattice = jnp.concatenate([lattice[:-1] + 0.5 * both, none])
        total = jnp.zeros_like(values)
        for column, weight in zip(self.columns, self.weights, strict=True):
            total += lattice.at[column].get(mode=BOUNDS) * weight
        return total * blur_gain(len(self.columns))

    def norm(self) -> jax.Array:
        """1 / sqrt of the filtered ones, float32 [B * N]: multiplies before and after `filter`."""
        return jax.lax.rsqrt(self.filter(jnp.ones(self.columns.shape[1])) + 1e-20)


def batch_positions(height: int, width: int, sxy: float, batch: int) -> BatchLattice:
    """The lattice of pixel positions, built on the host, repeated for `batch` images."""
    lattice = position_lattice(height, width, sxy)
    shift = lattice.vertices * np.arange(batch, dtype=np.int32)[:, None]

    def tiled(vertices: np.ndarray) -> np.ndarray:
        # Missing neighbours of every image point behind all vertices.
        moved = np.where(vertices < lattice.vertices, vertices + shift, lattice.vertices * batch)
        return moved.reshape(-1)

    columns = np.stack([tiled(c) for c in lattice.columns.T])
    before, after = (np.stack([tiled(n) for n in side]) for side in lattice.neighbours)
    weights = np.tile(lattice.weights.T, (1, batch))
    count = np.int32(lattice.vertices * batch)
    return BatchLattice(*map(jnp.asarray, (columns, weights, before, after, count)))


def build_lattice(space: Embedding, images: jax.Array, capacity: int, slots: int) -> BatchLattice:
    """The bilateral lattice of uint8 [B, H, W, 3]; traceable.

    capacity: vertices for the whole batch. slots: size of the hash table of each image, a power of
    two, best four times its vertices.
    """
    keys, weights = _simplices(_elevations(space, images), space)
    batch = images.shape[0]
    # Entry -> where the table of its image begins.
    begin = jnp.repeat(jnp.arange(batch, dtype=jnp.int32) * slots, keys.shape[1] // batch)
    begin = jnp.tile(begin, len(keys))
    table, slot, complete = _insert(keys.reshape(-1), begin, batch, slots)
    used = table >= 0
    number = jnp.cumsum(used.astype(jnp.int32)) - 1
    count = jnp.where(complete, number[-1] + 1, jnp.iinfo(jnp.int32).max)
    room = jnp.minimum(number, capacity - 1)
    columns = room.at[begin + slot].get(mode=BOUNDS).reshape(keys.shape)
    columns, weights = (_without_filling(x, space, batch) for x in (columns, weights))
    # Vertex -> its key and the table it stands in.
    target = jnp.where(used & (number < capacity), number, capacity)
    vertices = jnp.full(capacity + 1, -1, jnp.int32).at[target].set(table, mode=BOUNDS)[:-1]
    place = jnp.arange(batch * slots, dtype=jnp.int32)
    begin = jnp.zeros(capacity + 1, jnp.int32).at[target].set(place - place % slots, mode=BOUNDS)
    number = jnp.where(number < capacity, number, capacity)
    before = _neighbours(vertices, begin[:-1], table, number, capacity, slots, space)
    me = jnp.arange(capacity, dtype=jnp.int32)
    after = [
        jnp.full(capacity + 1, capacity, jnp.int32).at[b].set(me, mode=BOUNDS)[:-1] for b in before
    ]
    return BatchLattice(columns, weights, jnp.stack(before), jnp.stack(after), count)


def _elevations(space: Embedding, images: jax.Array) -> jax.Array:
    """float32 [d + 1, B * N], as on the host with a pixel of zero features per image if N % 4."""
    batch, *size, _ = images.shape

    def look(tables, i: int) -> jax.Array:
        table = jnp.asarray(tables[i])
        if i > 1:
            return table.at[images[..., i - 2].astype(jnp.int32)].get(mode=BOUNDS)
        line = table[None, None, :] if i == 0 else table[None, :, None]
        return jnp.broadcast_to(line, (batch, *size))

    total = jnp.zeros((batch, *size), jnp.float32)
    elevations = []
    for i in reversed(range(space.dims)):
        elevations.insert(0, total - look(space.multiples, i))
        total = total + look(space.products, i)
    stacked = jnp.stack([total, *elevations]).reshape(space.dims + 1, batch, -1)
    filling = stacked.shape[2] % 4 > 0
    return jnp.pad(stacked, ((0, 0), (0, 0), (0, filling))).reshape(space.dims + 1, -1)


def _without_filling(x: jax.Array, space: Embedding, batch: int) -> jax.Array:
    pixels = space.shape[0] * space.shape[1]
    return x.reshape(len(x), batch, -1)[:, :, :pixels].reshape(len(x), -1)


def _simplices(elevations: jax.Array, space: Embedding) -> tuple[jax.Array, jax.Array]:
    """Keys int32 and barycentric weights [d + 1, B * N] of the vertices around every pixel."""
    dims = space.dims
    size = np.float32(dims + 1)
    cell = jnp.round(elevations * (1 / size))
    rest = elevations - cell * size
    cell = cell.astype(jnp.int32)
    rank = []
    for i in range(dims + 1):
        ahead = [
            rest[j] > rest[i] if j > i else rest[j] >= rest[i] for j in range(dims + 1) if j != i
        ]
        rank.append(cell.sum(axis=0) + sum(a.astype(jnp.int32) for a in ahead))
    rank = jnp.stack(rank)
    wrap = (rank < 0).astype(jnp.int32) - (rank > dims).astype(jnp.int32)
    rank, cell = rank + wrap * (dims + 1), cell + wrap
    inside = rest * (1 / size) - wrap.astype(jnp.float32)
    # By descending rank, that is in ascending order.
    inside = [
        sum(jnp.where(rank[i] == r, inside[i], 0) for i in range(dims + 1))
        for r in reversed(range(dims + 1))
    ]
    weights = [inside[0] + (1 - inside[dims])]
    weights += [inside[i + 1] - inside[i] for i in range(dims)]
    base = sum(
        (cell[i] - low) * stride
        for i, (low, stride) in enumerate(zip(space.low, space.strides, strict=True))
    )
    keys = [base]
    for r in range(1, dims + 1):
        lowered = sum(
            jnp.where(rank[i] > dims - r, stride, 0) for i, stride in enumerate(space.strides)
        )
        keys.append(base - lowered + r * space.span)
    return jnp.stack(keys), jnp.stack(weights)


def _hash(keys: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """First slot and odd step of the probing sequence of every key."""
    shift = np.uint32(33 - slots.bit_length())
    mixed = keys.astype(jnp.uint32) * np.uint32(0x9E3779B1)
    again = (keys.astype(jnp.uint32) ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA6B)
    return (mixed >> shift).astype(jnp.int32), (again >> shift).astype(jnp.int32) | 1


def _insert(keys: jax.Array, begin: jax.Array, batch: int, slots: int):
    """A hash table by parallel rounds: (table, slot of every entry, whether all found one).

    Open addressing with double hashing, for all entries at once. In each round every entry looks at
    its slot. If the slot is empty, its key competes for it; many may do so, and the maximum
    decides, which needs no lock and does not depend on the order. An entry whose slot holds its key
    is done; equal keys end in the same slot, so that pixels share vertices. The others step on.
    """
    first, step = _hash(keys, slots)

    def probe(state):
        table, slot, _, rounds = state
        held = table.at[begin + slot].get(mode=BOUNDS)
        # Of the keys that meet in an empty slot the largest stays.
        table = table.at[begin + slot].max(jnp.where(held < 0, keys, -1), mode=BOUNDS)
        placed = table.at[begin + slot].get(mode=BOUNDS) == keys
        slot = jnp.where(placed, slot, (slot + step) & (slots - 1))
        return table, slot, placed.all(), rounds + 1

    def unfinished(state):
        return ~state[2] & (state[3] < MAX_PROBES)

    empty = jnp.full(batch * slots, -1, jnp.int32)
    table, slot, complete, _ = jax.lax.while_loop(unfinished, probe, (empty, first, False, 0))
    return table, slot, complete


def _neighbours(vertices, begin, table, number, capacity: int, slots: int, space: Embedding):
    """The vertex before each vertex along every direction, `capacity` if there is none.

    The key of the neighbour is computed (see `permutohedral`), then looked up along the same
    probing sequence, until its slot holds the key, or is empty: then there is no such vertex.
    """
    dims, span, ones = space.dims, space.span, sum(space.strides)
    lower = jnp.where(vertices // span > 0, vertices - span, vertices - ones + dims * span)
    found = []
    for stride in (*space.strides, 0):
        wanted = jnp.where(vertices < 0, -2, lower + stride)
        first, step = _hash(wanted, slots)

        def probe(state, wanted=wanted, step=step):
            slot, _, rounds = state
            held = table.at[begin + slot].get(mode=BOUNDS)
            ended = (held == wanted) | (held < 0)
            return jnp.where(ended, slot, (slot + step) & (slots - 1)), ended.all(), rounds + 1

        def unfinished(state):
            return ~state[1] & (state[2] < MAX_PROBES)

        slot, _, _ = jax.lax.while_loop(unfinished, probe, (first, False, 0))
        hit = table.at[begin + slot].get(mode=BOUNDS) == wanted
        found.append(jnp.where(hit, number.at[begin + slot].get(mode=BOUNDS), capacity))
    return found
