"""AutoAugment on the device: batched, jitted, with the results of PIL (see `autoaugment`).

An operation with a level and a sign is a *variant*. Each variant is one row in tables of constants,
and a few *families* of operations share the code that reads these rows. Integer arithmetic stays
integer. Where PIL computes in floating point, the constants are computed on the host: compilers
fuse and reorder operations, which would change results by one grey level.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from simseg_jax.data.autoaugment import GREY, IMAGENET_POLICY
from simseg_jax.data.autoaugment_tables import Variant, autocontrast_exceptions, variant_tables
from simseg_jax.runtime.sharding import target_device

# The variants of the policy, with both signs for every operation. The first one changes nothing.
POLICY_VARIANTS: tuple[Variant, ...] = (
    ("", 0, 1),
    *dict.fromkeys((op, level, s) for p in IMAGENET_POLICY for _, op, level in p for s in (-1, 1)),
)
FILL = GREY[0]
# By platform: a GPU needs many images per kernel; TPU programs take 27 MB for one of 224 pixels.
IMAGES_AT_A_TIME = {"gpu": 128, "tpu": 16}


def draw_keys(seed: int, step, batch_size: int) -> jax.Array:
    """One random key per example of the global batch of a training step."""
    # The second fold_in separates this stream from dropout's, which folds in the step alone.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 1)
    return jax.random.split(key, batch_size)


def augment_batch(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Applies a random sub-policy of the ImageNet policy to every image.

    images: uint8 [B, H, W, 3]. keys: [B]; the draws for an image depend on its key alone.
    """
    policies, signs = jax.vmap(draw)(keys)
    number = {variant: i for i, variant in enumerate(POLICY_VARIANTS)}
    numbers = jnp.array(
        [[[number[op, level, s] for s in (-1, 1)] for _, op, level in p] for p in IMAGENET_POLICY]
    )
    chosen = numbers[policies[:, None], jnp.arange(2)[None], (signs + 1) // 2]
    return apply_variants(images, jnp.where(signs == 0, 0, chosen))


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(number of the sub-policy, int32 [2]: sign of each operation, 0: it is left out)."""
    policy_key, applied_key, sign_key = jax.random.split(key, 3)
    probabilities = jnp.array([[share for share, *_ in policy] for policy in IMAGENET_POLICY])
    policy = jax.random.randint(policy_key, (), 0, len(IMAGENET_POLICY))
    applied = jax.random.uniform(applied_key, (2,)) < probabilities[policy]
    return policy, applied * jax.random.rademacher(sign_key, (2,), jnp.int32)


def apply_variants(
    images: jax.Array,
    chosen: jax.Array,
    variants: Sequence[Variant] = POLICY_VARIANTS,
    one_by_one: bool | None = None,
) -> jax.Array:
    """Applies n variants to every image, one after the other.

    images: uint8 [B, H, W, 3]. chosen: int [B, n], indices of `variants`. one_by_one: a loop over
    the images that runs only what each one needs, which is fast on CPUs (the default there).
    Otherwise all families run on many images at once and each image selects the result it needs,
    which is fast on accelerators.
    """
    platform = target_device().platform
    if one_by_one is None:
        one_by_one = platform == "cpu"
    tables = variant_tables(variants, *images.shape[1:3])
    tables = {name: jnp.asarray(table) for name, table in tables.items()}
    operations = {operation for operation, *_ in variants}
    families = [family for family, members in FAMILIES.items() if operations & set(members)]
    branch_of = jnp.array(
        [next(i for i, f in enumerate(families) if op in FAMILIES[f]) for op, *_ in variants]
    )
    histogram = _histogram_scatter if one_by_one else _histogram_product
    equalize = functools.partial(_equalize, histogram=histogram)
    branches = [equalize if family is _equalize else family for family in families]

    def apply(image: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        row = {name: table[number] for name, table in tables.items()}
        return jax.lax.switch(branch_of[number], branches, image, row), None

    def augment(image: jax.Array, numbers: jax.Array) -> jax.Array:
        # A loop, so that the operations are compiled once.
        return jax.lax.scan(apply, image, numbers)[0]

    size = None if one_by_one else IMAGES_AT_A_TIME.get(platform, 128)
    return jax.lax.map(lambda pair: augment(*pair), (images, chosen), batch_size=size)


# The families: image uint8 [H, W, 3], constants of a variant -> image uint8 [H, W, 3].


def _keep(image: jax.Array, row: dict) -> jax.Array:
    return image


def _look_up(image: jax.Array, table: jax.Array) -> jax.Array:
    """table: uint8 [256], or one per channel [3, 256]."""
    if table.ndim == 1:
        return table[image]
    return table.reshape(-1)[image.astype(jnp.int32) + jnp.arange(0, 768, 256)[None, None]]


def _fixed_table(image: jax.Array, row: dict) -> jax.Array:
    return _look_up(image, row["table"])


def _extremes(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of every channel: int32 [3, 1] each."""
    # First over the rows: a reduction is vectorised along long rows, not along three channels.
    rows = image.reshape(image.shape[0], -1)
    low, high = rows.min(0).reshape(-1, 3).min(0), rows.max(0).reshape(-1, 3).max(0)
    return low.astype(jnp.int32)[:, None], high.astype(jnp.int32)[:, None]


def _autocontrast(image: jax.Array, row: dict) -> jax.Array:
    low, high = _extremes(image)
    value = jnp.arange(256)[None]
    stretched = (value - low) * 255 // jnp.maximum(high - low, 1)
    # PIL computes in float64 and truncates: some results fall just below a whole number.
    short = jnp.asarray(autocontrast_exceptions())
    key = (low * 256 + high) * 256 + value
    place = jnp.minimum(jnp.searchsorted(short, key), len(short) - 1)
    stretched = jnp.clip(stretched - (short[place] == key), 0, 255)
    return _look_up(image, jnp.where(high > low, stretched, value).astype(jnp.uint8))


def _histogram_scatter(image: jax.Array) -> jax.Array:
    """int32 [3, 256] counts."""
    bins = image.reshape(-1, 3).astype(jnp.int32) + jnp.arange(0, 768, 256)[None]
    return jnp.zeros(768, jnp.int32).at[bins].add(1).reshape(3, 256)


def _histogram_product(image: jax.Array) -> jax.Array:
    """The same counts without colliding writes, as a matrix product of one-hot halves of values."""
    values = image.reshape(-1, 3).T
    nibbles = jnp.arange(16, dtype=jnp.uint8)[None, None]
    high = (values[..., None] >> 4 == nibbles).astype(jnp.bfloat16)
    low = (values[..., None] & 15 == nibbles).astype(jnp.bfloat16)
    counts = jnp.einsum("cph,cpl->chl", high, low, preferred_element_type=jnp.float32)
    return counts.reshape(3, 256).astype(jnp.int32)


def _equalize(image: jax.Array, row: dict, histogram: Callable) -> jax.Array:
    counts, value = histogram(image), jnp.arange(256)[None]
    last = jnp.take_along_axis(counts, _extremes(image)[1], axis=1)
    step = (image.shape[0] * image.shape[1] - last) // 255
    before = jnp.cumsum(counts, axis=1) - counts
    table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    return _look_up(image, jnp.where(step > 0, table, value).astype(jnp.uint8))


def _grey(image: jax.Array) -> jax.Array:
    """PIL's conversion to luma: int32 [H, W, 1]."""
    weights = jnp.array([19595, 38470, 7471])[None, None]
    return (jnp.sum(image.astype(jnp.int32) * weights, -1, keepdims=True) + 0x8000) >> 16


def _blend(degenerate: jax.Array, image: jax.Array, products: jax.Array) -> jax.Array:
    """PIL's interpolation or extrapolation from a degenerate image (int32), truncated to uint8."""
    product = products[image.astype(jnp.int32) - degenerate + 255]
    return jnp.clip(degenerate.astype(jnp.float32) + product, 0, 255).astype(jnp.uint8)


def _color(image: jax.Array, row: dict) -> jax.Array:
    return _blend(_grey(image), image, row["products"])


def _contrast(image: jax.Array, row: dict) -> jax.Array:
    count = image.shape[0] * image.shape[1]
    mean = (2 * _grey(image).sum() + count) // (2 * count)
    return _look_up(image, _blend(mean, jnp.arange(256), row["products"]))


def _sharpness(image: jax.Array, row: dict) -> jax.Array:
    x = image.astype(jnp.int32)
    rows = x[:-2] + x[1:-1] + x[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x[1:-1, 1:-1]
    # The rounded mean of 3 x 3 pixels with weight 5 in the middle; the border is not changed.
    smooth = x.at[1:-1, 1:-1].set((2 * total + 13) // 26)
    return _blend(smooth, image, row["products"])


def _nearest(image: jax.Array, row: dict) -> jax.Array:
    """An affine map to the nearest pixel, in PIL's fixed-point arithmetic."""
    height, width, _ = image.shape
    a, b, c, d, e, f = row["matrix"]
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None]
    source_x, source_y = (c + b * y + a * x) >> 16, (f + e * y + d * x) >> 16
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    flat = jnp.where(inside, source_y * width + source_x, 0)
    return jnp.where(inside[..., None], image.reshape(-1, 3)[flat], jnp.uint8(FILL))


def _shear_x(image: jax.Array, row: dict) -> jax.Array:
    """Shears along rows with PIL's cubic filter of four taps."""
    height, width, _ = image.shape
    x = jnp.arange(width)[None]
    shift, d, first, last = (row[k][:height, None] for k in ("shift", "fraction", "first", "last"))
    d = d[..., None]

    def tap(offset: int) -> jax.Array:
        place = jnp.clip(x + shift + offset, 0, width - 1)
        return jnp.take_along_axis(image, place[..., None], axis=1).astype(jnp.float32)

    v1, v2, v3, v4 = (tap(offset) for offset in (-1, 0, 1, 2))
    cubic = v2 + d * (v3 - v1 + d * (2 * (v1 - v2) + v3 - v4 + d * (v2 - v1 + v4 - v3)))
    inside = ((x >= first) & (x <= last))[..., None]
    return jnp.where(inside, jnp.clip(cubic, 0, 255).astype(jnp.uint8), jnp.uint8(FILL))


def _shear_y(image: jax.Array, row: dict) -> jax.Array:
    return _shear_x(image.swapaxes(0, 1), row).swapaxes(0, 1)


FAMILIES: dict[Callable, tuple[str, ...]] = {
    _keep: ("",),
    _fixed_table: ("posterize", "solarize", "invert", "brightness"),
    _autocontrast: ("autocontrast",),
    _equalize: ("equalize",),
    _color: ("color",),
    _contrast: ("contrast",),
    _sharpness: ("sharpness",),
    _nearest: ("rotate", "translateX", "translateY"),
    _shear_x: ("shearX",),
    _shear_y: ("shearY",),
}
