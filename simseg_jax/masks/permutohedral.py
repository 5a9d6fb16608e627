"""Permutohedral lattice: fast Gaussian filtering in d feature dimensions (Adams et al., 2010).

The exact filter sums over all pairs of pixels. The lattice approximates it in linear time. A linear
map, the elevation, takes the d features of a pixel to the hyperplane of R^(d+1) where coordinates
sum to zero. The lattice divides this hyperplane into simplices of d + 1 vertices. A filter then has
three steps:

1. splat: add the value of every pixel to the vertices of its simplex, with barycentric weights;
2. blur: along each of d + 1 directions in turn, add half of both neighbours to every vertex;
3. slice: read the value of every pixel from its vertices, with the same weights.

Only vertices of simplices with pixels exist. They are found by a whole number, the key, which is
computed from the coordinates (`Embedding`). The approximation and its order of operations are those
of pydensecrf, because the exact Gaussian would give other masks. `permutohedral_jax` shares the
tables and keys.
"""

import dataclasses
import functools
import threading

import numpy as np
from scipy.sparse import csr_matrix

# Up to this many possible keys, vertices are found in a table indexed by key; otherwise keys are
# sorted. The operating system allocates only the pages of the table that a lattice touches.
MAX_TABLE = 2**27
_scratch = threading.local()


@dataclasses.dataclass(frozen=True)
class Embedding:
    """The tables of the elevation and the keys of vertices, for images of one size.

    shape: (height, width) of the images. products[i]: feature i times its scale, by pixel column
    (i = 0), row (1) or colour level 0..255 (2, 3, 4). multiples[i]: (i + 1) * products[i]. With
    these tables the elevation needs additions only. A compiler could fuse a product with an
    addition, round differently and move a pixel to another simplex.

    The d + 1 coordinates of a vertex are whole numbers with the same remainder r modulo d + 1, so
    that coordinate i is (d + 1) * q_i + r. The key of the vertex is

        r * span + sum over i < d of (q_i - low[i]) * strides[i].

    The last coordinate is not needed: the sum of all coordinates is zero.
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
        """All keys lie in [0, keys), including those of possible neighbours."""
        return self.span * (self.dims + 1)


@functools.lru_cache(maxsize=8)
def embedding(height: int, width: int, sxy: float, srgb: float | None = None) -> Embedding:
    """The embedding of the features positions / sxy and, unless srgb is None, colours / srgb."""
    axes = [np.arange(width, dtype=np.float32) / np.float32(sxy)]
    axes.append(np.arange(height, dtype=np.float32) / np.float32(sxy))
    if srgb is not None:
        axes += [np.arange(256, dtype=np.float32) / np.float32(srgb)] * 3
    dims = len(axes)
    # Rounded as in pydensecrf: the product of a double and a float32, as float32.
    unit = float(np.float32(np.sqrt(2 / 3) * (dims + 1)))
    scales = [np.float32(unit / np.sqrt((i + 1.0) * (i + 2.0))) for i in range(dims)]
    products = tuple(axis * scale for axis, scale in zip(axes, scales, strict=True))
    multiples = tuple(axis * np.float32(i + 1) for i, axis in enumerate(products))
    # Coordinate i of an elevated pixel is the sum of products[i:] minus multiples[i - 1]. From its
    # range follows that of q_i, with a margin of two for the other vertices of the outermost
    # simplices and for their neighbours.
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
    """The factor that restores the scale of the values after `directions` = d + 1 blurs."""
    return np.float32(1 / (1 + 2.0 ** (1 - directions)))


class Lattice:
    """The lattice of one image, or of pixel positions alone: a filter for vectors of N pixels.

    vertices: their number M. columns, weights: int32, float32 [N, d + 1], the vertices of every
    pixel's simplex and their barycentric weights. neighbours: (before, after), each int32
    [d + 1, M], the neighbours of every vertex in every direction; M stands for none.
    """

    def __init__(self, space: Embedding, image: np.ndarray | None = None):
        """image: uint8 [H, W, 3], None if the embedding has no colours."""
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
        # One matrix per direction, which sums half of both neighbours of every vertex. A missing
        # neighbour is the extra last column, whose value is always zero.
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
        """The filter of float32 [H * W], normalised symmetrically (before and after)."""
        return self._norm * self._filter(values * self._norm)

    def _filter(self, values: np.ndarray) -> np.ndarray:
        lattice = np.zeros(self.vertices + 1, np.float32)
        lattice[:-1] = self._splat @ values
        for blur in self._blurs:
            lattice[:-1] += blur @ lattice
        return (self._slice @ lattice[:-1]) * blur_gain(len(self._blurs))


@functools.lru_cache(maxsize=8)
def position_lattice(height: int, width: int, sxy: float) -> Lattice:
    """The lattice of pixel positions, which is the same for all images of a size."""
    return Lattice(embedding(height, width, sxy))


def _elevations(space: Embedding, image: np.ndarray | None) -> np.ndarray:
    """The pixels on the hyperplane, float32 [d + 1, N]."""
    height, width = space.shape
    pixels = height * width
    # pydensecrf pads the pixels to a multiple of four with zero features. Padding adds vertices,
    # and blurring passes through them; one such pixel adds the same vertices as several.
    elevations = np.zeros((space.dims + 1, pixels + (pixels % 4 > 0)), np.float32)
    grid = elevations[:, :pixels].reshape(-1, height, width)
    colours = [] if image is None else np.moveaxis(image, 2, 0)
    for j in range(space.dims, 0, -1):  # grid[0] is the sum of products[j:] so far.
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
    """Keys and barycentric weights [N, d + 1] of the vertices of every pixel's simplex.

    A simplex has one vertex of each remainder 0..d. The vertex of remainder 0 is close to the pixel
    rounded to multiples of d + 1; `rest` is what rounding left over. From there, the vertex of
    remainder r is reached by adding r to every coordinate and then subtracting d + 1 from the r
    coordinates with the smallest rests. `rank` is the place of a coordinate when the rests are
    sorted in descending order, so these are the coordinates with rank > d - r.
    """
    dims, pixels = space.dims, elevations.shape[1]
    size = np.float32(dims + 1)
    cell = np.rint(elevations * (1 / size))  # q of the vertex of remainder 0.
    rest = elevations - cell * size
    cell = cell.astype(np.int32)
    # rank[i] counts the coordinates with a larger rest; of equal rests the first comes first.
    rank = np.zeros((dims + 1, pixels), np.int8)
    for i in range(dims):
        below = (rest[i] < rest[i + 1 :]).view(np.int8)
        rank[i] += below.sum(axis=0, dtype=np.int8)
        rank[i + 1 :] += 1 - below
    # Coordinates are rounded independently, so the rounded point may lie off the hyperplane: q sums
    # to some s, not to zero. If s > 0, the s coordinates with the smallest rests were rounded up
    # most and are lowered by one cell; if s < 0, the -s with the largest rests are raised. Adding s
    # to the ranks leaves exactly those out of 0..d; the others then keep their order, and those
    # that were moved continue at the other end.
    rank += cell.sum(axis=0, dtype=np.int32).astype(np.int8)
    wrap = (rank < 0).view(np.int8) - (rank > dims).view(np.int8)
    rank += wrap * np.int8(dims + 1)
    cell += wrap
    weights = np.empty((pixels, dims + 1), np.float32)
    # Barycentric weights are differences of the sorted rests. A bubble sort of these d + 1 arrays
    # orders the rests of all pixels at once.
    inside = list(rest * (1 / size) - wrap)
    for last in range(dims, 0, -1):
        for i in range(last):
            low, high = np.minimum(inside[i], inside[i + 1]), np.maximum(inside[i], inside[i + 1])
            inside[i], inside[i + 1] = low, high
    weights[:, 0] = inside[0] + (1 - inside[dims])
    for i in range(dims):
        np.subtract(inside[i + 1], inside[i], out=weights[:, i + 1])
    # Now the keys. At the vertex of remainder r, q is one lower in the coordinates of rank > d - r.
    wide = np.int32 if space.keys < 2**31 else np.int64
    strides = np.array(space.strides, wide)
    offset = sum(low * stride for low, stride in zip(space.low, space.strides, strict=True))
    base = sum(cell[i] * strides[i] for i in range(dims)) - wide(offset)
    # Any subset of the first d coordinates may be lower: a table of 2^d entries, indexed by one bit
    # per coordinate, has the sum of their strides.
    bits = (1 << np.arange(dims)).astype(np.uint8)[:, None]
    lowered = ((np.arange(2**dims) & bits > 0) * strides[:, None]).sum(axis=0, dtype=wide)
    keys = np.empty((pixels, dims + 1), wide)
    keys[:, 0] = base
    for r in range(1, dims + 1):
        subset = ((rank[:dims] > dims - r).view(np.uint8) * bits).sum(axis=0, dtype=np.uint8)
        keys[:, r] = base - (lowered - wide(r * space.span))[subset]
    return keys, weights


def _number(keys: np.ndarray, space: Embedding):
    """Numbers the vertices 0..M-1: (keys of the M vertices, vertex of every entry of `keys`,
    vertices before and after each vertex [d + 1, M], where M stands for none).
    """
    flat = keys.reshape(-1)
    if space.keys <= MAX_TABLE:
        table = _zeroed_table(space.keys)
        index = flat.astype(np.intp)
        entry = np.arange(1, flat.size + 1, dtype=np.int32)
        # All entries write to the table; of equal keys one entry stays and represents the vertex.
        # Table values are entry or vertex numbers plus one, and 0 means that there is none.
        table[index] = entry
        vertices = index[np.flatnonzero(table[index] == entry)]
        table[vertices] = np.arange(1, len(vertices) + 1, dtype=np.int32)
        columns = table[index] - 1
        found = [np.stack([table[k] for k in side]) - 1 for side in _neighbours(vertices, space)]
        table[vertices] = 0  # For the next lattice.
    else:
        vertices, columns = np.unique(flat, return_inverse=True)
        found = []
        for side in map(np.stack, _neighbours(vertices, space)):
            place = np.minimum(np.searchsorted(vertices, side), len(vertices) - 1)
            found.append(np.where(vertices[place] == side, place, -1))
    before, after = (np.where(f < 0, len(vertices), f).astype(np.int32) for f in found)
    return vertices, columns.astype(np.int32), before, after


def _neighbours(keys: np.ndarray, space: Embedding):
    """Keys of both neighbours in each of the d + 1 directions; keys: of the vertices.

    The vertex before another in direction j has coordinate j higher by d and all others lower by 1.
    Hence its remainder is lower by 1 and q_j is higher by 1. If the remainder was 0, it becomes d,
    and every q_i is first lowered by 1. The vertex after it is the reverse. The last coordinate is
    not part of the key, so its step is 0.
    """
    dims, span, ones = space.dims, space.span, sum(space.strides)
    remainder = keys // span
    before = np.where(remainder > 0, keys - span, keys - ones + dims * span)
    after = np.where(remainder < dims, keys + span, keys + ones - dims * span)
    steps = (*space.strides, 0)
    return [before + step for step in steps], [after - step for step in steps]


def _zeroed_table(size: int) -> np.ndarray:
    """This thread's table of zeros; the caller resets the entries that it writes."""
    table = getattr(_scratch, "table", None)
    if table is None or len(table) < size:
        table = _scratch.table = np.zeros(size, np.int32)
    return table
