"""Permutohedral lattice: fast Gaussian filtering in d feature dimensions (Adams et al., 2010).

Every pixel lies in a simplex of d + 1 lattice vertices. A filter splats the pixel values onto the
vertices with barycentric weights, blurs along the d + 1 lattice directions and slices the result
back. This is the approximation pydensecrf computes, in its order of operations, because the exact
Gaussian would give other masks. The tables and the numbering of vertices here serve the JAX version
(`permutohedral_jax`) too.
"""

import dataclasses
import functools
import threading

import numpy as np
from scipy.sparse import csr_matrix

# Keys below this bound index a table directly; larger ones are sorted. The table is virtual memory,
# only the pages that a lattice touches exist.
MAX_TABLE = 2**27
_scratch = threading.local()


@dataclasses.dataclass(frozen=True)
class Embedding:
    """How the pixels of an image size enter the lattice, and how its vertices are numbered.

    products[i] is coordinate i of the features times its scale, by pixel column (i = 0), row (1)
    or colour level 0..255 (2, 3, 4); multiples[i] is (i + 1) times that. With both looked up the
    elevation is additions only, so that no compiler can fuse a product into them and move a pixel
    to another simplex. A vertex with remainder r and coordinates q (its i-th lattice coordinate is
    (d + 1) q_i + r) has the key r * span + sum_i (q_i - low_i) * strides[i].
    """

    shape: tuple[int, int]
    products: tuple[np.ndarray, ...]
    multiples: tuple[np.ndarray, ...]
    low: tuple[int, ...]
    strides: tuple[int, ...]
    span: int

    @property
    def dims(self) -> int:
        """d, the number of feature dimensions."""
        return len(self.products)

    @property
    def keys(self) -> int:
        """All keys lie in [0, keys), those of possible neighbours included."""
        return self.span * (self.dims + 1)


@functools.lru_cache(maxsize=8)
def embedding(height: int, width: int, sxy: float, srgb: float | None = None) -> Embedding:
    """The embedding of positions / sxy and, unless srgb is None, of colours / srgb."""
    axes = [np.arange(width, dtype=np.float32) / np.float32(sxy)]
    axes.append(np.arange(height, dtype=np.float32) / np.float32(sxy))
    if srgb is not None:
        axes += [np.arange(256, dtype=np.float32) / np.float32(srgb)] * 3
    dims = len(axes)
    # float32 of the product of the double root and the float32 constant, as pydensecrf rounds it.
    unit = float(np.float32(np.sqrt(2 / 3) * (dims + 1)))
    scales = [np.float32(unit / np.sqrt((i + 1.0) * (i + 2.0))) for i in range(dims)]
    products = tuple(axis * scale for axis, scale in zip(axes, scales, strict=True))
    multiples = tuple(axis * np.float32(i + 1) for i, axis in enumerate(products))
    # Elevation i is the sum of products[i:] minus multiples[i - 1]; two cells of margin hold the
    # other vertices of the outermost simplices and their neighbours.
    low, widths = [], []
    for i in range(dims):
        lowest = -float(multiples[i - 1][-1]) if i else 0.0
        highest = sum(float(axis[-1]) for axis in products[i:])
        low.append(int(np.floor(lowest / (dims + 1))) - 2)
        widths.append(int(np.ceil(highest / (dims + 1))) + 3 - low[-1])
    strides = [int(np.prod(widths[i + 1 :], dtype=object)) for i in range(dims)]
    span = strides[0] * widths[0]
    return Embedding((height, width), products, multiples, tuple(low), tuple(strides), span)


def blur_gain(directions: int) -> np.float32:
    """What one blur along all d + 1 directions is multiplied with after slicing."""
    return np.float32(1 / (1 + 2.0 ** (1 - directions)))


class Lattice:
    """The lattice of one image, or of pixel positions alone: an operator on vectors of pixels.

    vertices: their number M. columns, weights: int32, float32 [N, d + 1], the vertices around every
    pixel and their barycentric weights. neighbours: two int32 [d + 1, M], M where there is none.
    """

    def __init__(self, space: Embedding, image: np.ndarray | None = None):
        """image: uint8 [H, W, 3] of the embedding's size if that has colours."""
        dims, (height, width) = space.dims, space.shape
        keys, weights = _simplices(_elevations(space, image), space)
        vertices, columns, before, after = _number(keys, space)
        self.vertices = len(vertices)
        pixels = height * width
        rows = np.arange(0, (dims + 1) * pixels + 1, dims + 1, dtype=np.int32)
        self.columns = columns.reshape(-1, dims + 1)[:pixels]
        self.weights, self.neighbours = weights[:pixels], (before, after)
        entries = self.weights.reshape(-1), self.columns.reshape(-1), rows
        self._slice = csr_matrix(entries, (pixels, self.vertices))
        self._splat = self._slice.T
        # One matrix per direction with the two neighbours of every vertex; a missing one is the
        # extra column, whose value stays zero.
        halves = np.full(2 * self.vertices, 0.5, np.float32)
        pairs = np.arange(0, 2 * self.vertices + 1, 2, dtype=np.int32)
        shape = (self.vertices, self.vertices + 1)
        self._blurs = [
            csr_matrix((halves, np.stack(both, axis=1).ravel(), pairs), shape)
            for both in zip(before, after, strict=True)
        ]
        ones = np.ones(pixels, np.float32)
        self._norm = 1 / np.sqrt(self._filter(ones) + np.float32(1e-20))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Symmetrically normalised filter of float32 [H * W]."""
        return self._norm * self._filter(values * self._norm)

    def _filter(self, values: np.ndarray) -> np.ndarray:
        lattice = np.zeros(self.vertices + 1, np.float32)
        lattice[:-1] = self._splat @ values
        for blur in self._blurs:
            lattice[:-1] += blur @ lattice
        return (self._slice @ lattice[:-1]) * blur_gain(len(self._blurs))


@functools.lru_cache(maxsize=8)
def position_lattice(height: int, width: int, sxy: float) -> Lattice:
    """The lattice of the Gaussian kernel, which is the same for all images of a size."""
    return Lattice(embedding(height, width, sxy))


def _elevations(space: Embedding, image: np.ndarray | None) -> np.ndarray:
    """float32 [d + 1, N]: the features on the hyperplane where coordinates sum to zero."""
    height, width = space.shape
    pixels = height * width
    # pydensecrf fills up to a multiple of four with pixels of zero features, whose vertices exist
    # and pass values on; one such pixel creates the same vertices.
    elevations = np.zeros((space.dims + 1, pixels + (pixels % 4 > 0)), np.float32)
    grid = elevations[:, :pixels].reshape(-1, height, width)
    colours = [] if image is None else np.moveaxis(image, 2, 0)
    for j in range(space.dims, 0, -1):
        if j > 2:
            levels = colours[j - 3]
            product, multiple = space.products[j - 1][levels], space.multiples[j - 1][levels]
        else:
            axis = (None, slice(None)) if j == 1 else (slice(None), None)
            product, multiple = space.products[j - 1][axis], space.multiples[j - 1][axis]
        np.subtract(grid[0], multiple, out=grid[j])
        grid[0] += product
    return elevations


def _simplices(elevations: np.ndarray, space: Embedding) -> tuple[np.ndarray, np.ndarray]:
    """Keys and barycentric weights [N, d + 1] of the vertices around every pixel.

    The d + 1 coordinates of a vertex leave the same remainder when divided by d + 1, and a simplex
    has one vertex of each remainder 0..d. Its vertex of remainder 0 is the pixel rounded to
    multiples of d + 1. From there the vertex of remainder r is reached by adding r to every
    coordinate and taking d + 1 away from the r coordinates that were rounded up most, or down
    least: those that come last when the rests are sorted in descending order (`rank`).
    """
    dims, pixels = space.dims, elevations.shape[1]
    size = np.float32(dims + 1)
    cell = np.rint(elevations * (1 / size))
    rest = elevations - cell * size
    cell = cell.astype(np.int32)
    rank = np.zeros((dims + 1, pixels), np.int8)
    for i in range(dims):
        below = (rest[i] < rest[i + 1 :]).view(np.int8)
        rank[i] += below.sum(axis=0, dtype=np.int8)
        rank[i + 1 :] += 1 - below
    # Rounding each coordinate on its own may leave the hyperplane by a few cells: walk back, with
    # the coordinates whose rests come first or last.
    rank += cell.sum(axis=0, dtype=np.int32).astype(np.int8)
    wrap = (rank < 0).view(np.int8) - (rank > dims).view(np.int8)
    rank += wrap * np.int8(dims + 1)
    cell += wrap
    weights = np.empty((pixels, dims + 1), np.float32)
    # Barycentric weights are differences of the sorted rests. So few are sorted by exchanges, which
    # work on whole arrays.
    inside = list(rest * (1 / size) - wrap)
    for last in range(dims, 0, -1):
        for i in range(last):
            low, high = np.minimum(inside[i], inside[i + 1]), np.maximum(inside[i], inside[i + 1])
            inside[i], inside[i + 1] = low, high
    weights[:, 0] = inside[0] + (1 - inside[dims])
    for i in range(dims):
        np.subtract(inside[i + 1], inside[i], out=weights[:, i + 1])
    # The coordinates of rank > d - r are one cell lower at the vertex of remainder r.
    wide = np.int32 if space.keys < 2**31 else np.int64
    strides = np.array(space.strides, wide)
    offset = sum(low * stride for low, stride in zip(space.low, space.strides, strict=True))
    base = sum(cell[i] * strides[i] for i in range(dims)) - wide(offset)
    # There are 2^d sets of coordinates that can be lower: the sum of their strides is looked up.
    bits = (1 << np.arange(dims)).astype(np.uint8)[:, None]
    lowered = ((np.arange(2**dims) & bits > 0) * strides[:, None]).sum(axis=0, dtype=wide)
    keys = np.empty((pixels, dims + 1), wide)
    keys[:, 0] = base
    for r in range(1, dims + 1):
        subset = ((rank[:dims] > dims - r).view(np.uint8) * bits).sum(axis=0, dtype=np.uint8)
        keys[:, r] = base - (lowered - wide(r * space.span))[subset]
    return keys, weights


def _number(keys: np.ndarray, space: Embedding):
    """(M distinct keys, vertex of every key, neighbours before and after [d + 1, M], M if none)."""
    flat = keys.reshape(-1)
    if space.keys <= MAX_TABLE:
        table = _zeroed_table(space.keys)
        index = flat.astype(np.intp)
        entry = np.arange(1, flat.size + 1, dtype=np.int32)
        # Of equal keys the last entry stays and stands for the vertex.
        table[index] = entry
        vertices = index[np.flatnonzero(table[index] == entry)]
        table[vertices] = np.arange(1, len(vertices) + 1, dtype=np.int32)
        columns = table[index] - 1
        found = [np.stack([table[k] for k in side]) - 1 for side in _neighbours(vertices, space)]
        table[vertices] = 0
    else:
        vertices, columns = np.unique(flat, return_inverse=True)
        found = []
        for side in map(np.stack, _neighbours(vertices, space)):
            place = np.minimum(np.searchsorted(vertices, side), len(vertices) - 1)
            found.append(np.where(vertices[place] == side, place, -1))
    before, after = (np.where(f < 0, len(vertices), f).astype(np.int32) for f in found)
    return vertices, columns.astype(np.int32), before, after


def _neighbours(vertices: np.ndarray, space: Embedding):
    """Keys of the two neighbours along each of the d + 1 directions.

    Direction j leads from a vertex to the one whose coordinates are 1 less, but j's, which is d
    more. So its remainder is one less and cell j one higher; from remainder 0 it goes to remainder
    d, with all cells one lower first. The last coordinate follows from the others and is not in the
    key.
    """
    dims, span, ones = space.dims, space.span, sum(space.strides)
    remainder = vertices // span
    before = np.where(remainder > 0, vertices - span, vertices - ones + dims * span)
    after = np.where(remainder < dims, vertices + span, vertices + ones - dims * span)
    steps = (*space.strides, 0)
    return [before + step for step in steps], [after - step for step in steps]


def _zeroed_table(size: int) -> np.ndarray:
    """A table of zeros of this thread; whoever writes to it sets it back to zero."""
    table = getattr(_scratch, "table", None)
    if table is None or len(table) < size:
        table = _scratch.table = np.zeros(size, np.int32)
    return table
