"""The lattices of a batch of images, built and applied on an accelerator (see `permutohedral`).

XLA needs fixed shapes, so all images share one pool of vertices of fixed capacity. `count` is the
number of vertices that were needed. The caller must check `count <= capacity` on the host, and
otherwise build the lattice again with more room. Every image has its own hash table from keys to
vertices. Gathers and scatters are one-dimensional, because XLA compiles them to far faster code
than those of rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simseg_jax.masks.permutohedral import Embedding, blur_gain, position_lattice

BOUNDS = "promise_in_bounds"
# After so many rounds of probing a hash table counts as too full. At its intended load (a quarter)
# far fewer are needed.
MAX_PROBES = 64


class BatchLattice(NamedTuple):
    """The vertices of B images of N pixels, at most `capacity` of them."""

    columns: jax.Array  # int32 [d + 1, B * N], the vertices of every pixel
    weights: jax.Array  # float32 [d + 1, B * N], their barycentric weights
    before: jax.Array  # int32 [d + 1, capacity], neighbours in every direction;
    after: jax.Array  # `capacity` stands for none
    count: jax.Array  # int32 [], vertices needed

    @property
    def capacity(self) -> int:
        """The number of vertices that there is room for."""
        return self.before.shape[1]

    def filter(self, values: jax.Array) -> jax.Array:
        """Splat, blur and slice of float32 [B * N], without normalisation."""
        # A missing neighbour is the extra last vertex, whose value is always zero.
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
        """float32 [B * N], 1 / sqrt of filtered ones: the factor before and after `filter`."""
        return jax.lax.rsqrt(self.filter(jnp.ones(self.columns.shape[1])) + 1e-20)


def batch_positions(height: int, width: int, sxy: float, batch: int) -> BatchLattice:
    """The lattice of pixel positions, built on the host and repeated for `batch` images."""
    lattice = position_lattice(height, width, sxy)
    shift = lattice.vertices * np.arange(batch, dtype=np.int32)[:, None]

    def tiled(vertices: np.ndarray) -> np.ndarray:
        # A missing neighbour points behind the vertices of all images.
        moved = np.where(vertices < lattice.vertices, vertices + shift, lattice.vertices * batch)
        return moved.reshape(-1)

    columns = np.stack([tiled(c) for c in lattice.columns.T])
    before, after = (np.stack([tiled(n) for n in side]) for side in lattice.neighbours)
    weights = np.tile(lattice.weights.T, (1, batch))
    count = np.int32(lattice.vertices * batch)
    return BatchLattice(*map(jnp.asarray, (columns, weights, before, after, count)))


def build_lattice(space: Embedding, images: jax.Array, capacity: int, slots: int) -> BatchLattice:
    """The bilateral lattice of uint8 [B, H, W, 3]; traceable.

    capacity: vertices for the whole batch. slots: size of each image's hash table, a power of two,
    ideally four times its vertices.
    """
    keys, weights = _simplices(_elevations(space, images), space)
    batch = images.shape[0]
    # The tables of all images lie in one array. For every entry (a pixel and one of its d + 1
    # vertices) begin is where the table of its image starts.
    begin = jnp.repeat(jnp.arange(batch, dtype=jnp.int32) * slots, keys.shape[1] // batch)
    begin = jnp.tile(begin, len(keys))
    table, slot, complete = _insert(keys.reshape(-1), begin, batch, slots)
    # Used slots are vertices, numbered in their order. There is no room for numbers from `capacity`
    # on: the lattice is wrong then, but all indices stay within bounds.
    used = table >= 0
    number = jnp.cumsum(used.astype(jnp.int32)) - 1
    count = jnp.where(complete, number[-1] + 1, jnp.iinfo(jnp.int32).max)
    room = jnp.minimum(number, capacity - 1)
    columns = room.at[begin + slot].get(mode=BOUNDS).reshape(keys.shape)
    columns, weights = (_without_filling(x, space, batch) for x in (columns, weights))
    # The inverse, from vertex to slot: the key of every vertex, and where its table starts.
    target = jnp.where(used & (number < capacity), number, capacity)
    vertices = jnp.full(capacity + 1, -1, jnp.int32).at[target].set(table, mode=BOUNDS)[:-1]
    place = jnp.arange(batch * slots, dtype=jnp.int32)
    begin = jnp.zeros(capacity + 1, jnp.int32).at[target].set(place - place % slots, mode=BOUNDS)
    number = jnp.where(number < capacity, number, capacity)
    before = _neighbours(vertices, begin[:-1], table, number, capacity, slots, space)
    # The vertex after b is the one that b comes before.
    me = jnp.arange(capacity, dtype=jnp.int32)
    after = [
        jnp.full(capacity + 1, capacity, jnp.int32).at[b].set(me, mode=BOUNDS)[:-1] for b in before
    ]
    return BatchLattice(columns, weights, jnp.stack(before), jnp.stack(after), count)


def _elevations(space: Embedding, images: jax.Array) -> jax.Array:
    """The pixels on the hyperplane, float32 [d + 1, B * N].

    If four does not divide N, every image has one more pixel of zero features, as on the host.
    """
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
    """[d + 1, B * N] without the pixels that `_elevations` added."""
    pixels = space.shape[0] * space.shape[1]
    return x.reshape(len(x), batch, -1)[:, :, :pixels].reshape(len(x), -1)


def _simplices(elevations: jax.Array, space: Embedding) -> tuple[jax.Array, jax.Array]:
    """Keys int32 and barycentric weights [d + 1, B * N] of the vertices of every pixel's simplex.

    `permutohedral._simplices` explains the steps.
    """
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
    # Sorted in ascending order, which is by descending rank.
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
    """First slot and step of the probing sequence of every key.

    The step is odd, so that the sequence visits all slots of a table whose size is a power of two.
    """
    shift = np.uint32(33 - slots.bit_length())
    mixed = keys.astype(jnp.uint32) * np.uint32(0x9E3779B1)
    again = (keys.astype(jnp.uint32) ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA6B)
    return (mixed >> shift).astype(jnp.int32), (again >> shift).astype(jnp.int32) | 1


def _insert(keys: jax.Array, begin: jax.Array, batch: int, slots: int):
    """Inserts all keys into hash tables: (tables, slot of every entry, whether all found one).

    This is open addressing with double hashing: a key is tried at its first slot, then again and
    again one step further, until it meets an empty slot or itself. Here all entries proceed
    together, in rounds:

    1. Every entry looks at its current slot. If that is empty (-1), the entry writes its key there.
    2. Several keys may be written to one slot. The scatter keeps the maximum, which needs no locks
       and does not depend on the order.
    3. An entry whose slot now holds its key is done. The others move one step further.

    A slot never changes once it holds a key. Entries with equal keys take the same path and end in
    the same slot, so that pixels share their vertices.
    """
    first, step = _hash(keys, slots)

    def probe(state):
        table, slot, _, rounds = state
        held = table.at[begin + slot].get(mode=BOUNDS)
        # -1 changes nothing. Of the keys that meet in an empty slot the largest stays.
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
    """The vertex before each vertex, for every direction; `capacity` if there is none.

    The key of the neighbour is computed as in `permutohedral._neighbours`. It is then looked up
    along its probing sequence until a slot holds it, or is empty, which means that there is no such
    vertex.

    vertices: keys of the vertices, -1 for unused ones. begin: where their tables start. table,
    number: key and vertex of every slot.
    """
    dims, span, ones = space.dims, space.span, sum(space.strides)
    lower = jnp.where(vertices // span > 0, vertices - span, vertices - ones + dims * span)
    found = []
    for stride in (*space.strides, 0):
        wanted = jnp.where(vertices < 0, -2, lower + stride)  # No slot holds -2.
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
