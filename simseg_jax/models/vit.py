"""Vision Transformer encoder (pre-norm), parameter names as in timm's `VisionTransformer`."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from simseg_jax.models.layers import (
    ACTIVATIONS,
    DEPTH,
    EPSILON,
    FLASH_WIDTHS,
    HEADS,
    INIT,
    WIDTH,
    Keys,
    apply_blocks,
    attention,
    can_flash,
    check_heads,
    flash_attention,
    layer_norm,
    linear,
    make_blocks,
    torch_bias_init,
    torch_linear_init,
)
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.ranges import FLAG, SHARE, SIDE, number, one_of, several
from simseg_jax.runtime.settings import setting
from simseg_jax.runtime.sharding import constrain_batch, map_batch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHANNELS = range(3, 4)
PATCHES = 2**20  # Number of the draw of patches, beyond those of `layers.dropout`.


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture of the image encoder; by default the paper's ViT-S/16 at 224 x 224 pixels."""

    image_size: int = setting(224, "side of training images in pixels", SIDE)
    patch_size: int = setting(16, "side of a patch in pixels", SIDE)
    width: int = setting(384, "channels of the ViT", WIDTH)
    depth: int = setting(12, "blocks of the ViT", DEPTH)
    heads: int = setting(6, "attention heads of the ViT", HEADS)
    mlp_width: int = setting(1536, "hidden channels of the ViT's MLPs", WIDTH)
    keep: float = setting(
        1.0,
        "share of the patches that training looks at, drawn for every image (FLIP: 0.5)",
        number(0, 1, above=True),
    )
    pre_norm: bool = setting(False, "another LayerNorm before the first block, as in CLIP", FLAG)
    activation: str = setting("gelu", "activation function of the ViT's MLPs", one_of(*ACTIVATIONS))
    norm_eps: float = setting(1e-6, "epsilon of the ViT's LayerNorms", EPSILON)
    mean: tuple[float, ...] = setting(
        IMAGENET_MEAN,
        "mean of each colour in [0, 1], subtracted from images",
        several(SHARE, CHANNELS, "three numbers"),
    )
    std: tuple[float, ...] = setting(
        IMAGENET_STD,
        "standard deviation of each colour, which images are divided by",
        several(number(0.001, 10), CHANNELS, "three numbers"),
    )

    @classmethod
    def b16(cls) -> "ViTConfig":
        """ViT-B/16 at 224 x 224 pixels."""
        return cls(width=768, heads=12, mlp_width=3072)

    def kept(self, patches: int) -> int:
        """How many of so many patches training looks at."""
        return max(1, round(self.keep * patches))

    def check(self, prefix: str) -> None:
        """Raises a `UserError` if fields contradict each other; prefix: precedes their names."""
        if self.image_size % self.patch_size:
            raise UserError(
                f"{prefix}image_size={self.image_size} must be a multiple of "
                f"{prefix}patch_size={self.patch_size}."
            )
        check_heads(self.width, self.heads, prefix)


class Attention(nnx.Module):
    """Multi-head self-attention with one product for query, key and value."""

    def __init__(self, config: ViTConfig, dtype, rngs: Keys):
        self.heads = config.heads
        self.qkv = linear(config.width, 3 * config.width, INIT, dtype, rngs)
        self.proj = linear(config.width, config.width, INIT, dtype, rngs)

    def __call__(self, x: Float[Array, "B N width"]) -> Float[Array, "B N width"]:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        flash = width // self.heads in FLASH_WIDTHS and can_flash(qkv.dtype)
        attend = flash_attention if flash else attention
        out = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(out.reshape(batch, tokens, width))


class Mlp(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: ViTConfig, dtype, rngs: Keys):
        self.fc1 = linear(config.width, config.mlp_width, INIT, dtype, rngs)
        self.fc2 = linear(config.mlp_width, config.width, INIT, dtype, rngs)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Float[Array, "B N width"]) -> Float[Array, "B N width"]:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nnx.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: ViTConfig, dtype, rngs: Keys):
        self.norm1 = layer_norm(config.width, config.norm_eps, dtype, rngs)
        self.attn = Attention(config, dtype, rngs)
        self.norm2 = layer_norm(config.width, config.norm_eps, dtype, rngs)
        self.mlp = Mlp(config, dtype, rngs)

    def __call__(self, x: Float[Array, "B N width"]) -> Float[Array, "B N width"]:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return constrain_batch(x)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches -> tokens: a convolution with stride p, as one matrix product."""

    def __init__(self, config: ViTConfig, dtype, rngs: Keys):
        self.patch_size = config.patch_size
        inputs = 3 * config.patch_size**2
        self.proj = linear(
            inputs, config.width, torch_linear_init(), dtype, rngs, torch_bias_init(inputs)
        )

    def cut(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B N pixels"]:
        """The patches row by row, each with its p * p * 3 values."""
        batch, height, width, channels = images.shape
        p = self.patch_size
        x = images.reshape(batch, height // p, p, width // p, p, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)

    def __call__(self, patches: Float[Array, "B N pixels"]) -> Float[Array, "B N width"]:
        return self.proj(patches)


class ViT(nnx.Module):
    """images [B, H, W, 3] (float, normalised) -> tokens [B, 1 + (H/p)(W/p), width], CLS first.

    H and W may be any multiple of the patch size: the position embedding is resized. remat: as for
    `layers.apply_blocks`. keys: a random key per image [B]; with them only the share `config.keep`
    of its patches becomes tokens (Li et al., "Scaling Language-Image Pre-training via Masking",
    2023). None, as in evaluation: all patches.
    """

    def __init__(self, config: ViTConfig, dtype, rngs: Keys, remat: str = "none"):
        self.config, self.remat = config, remat
        self.patch_embed = PatchEmbed(config, dtype, rngs)
        self.cls_token = nnx.Param(1e-6 * jax.random.normal(rngs.params(), (1, 1, config.width)))
        patches = (config.image_size // config.patch_size) ** 2
        shape = (1, 1 + patches, config.width)
        self.pos_embed = nnx.Param(INIT(rngs.params(), shape, jnp.float32))
        self.norm_pre = (
            layer_norm(config.width, config.norm_eps, dtype, rngs) if config.pre_norm else None
        )
        self.blocks = make_blocks(lambda rngs: Block(config, dtype, rngs), config.depth, rngs)
        self.norm = layer_norm(config.width, config.norm_eps, dtype, rngs)
        self.dtype = dtype

    def __call__(
        self, images: Float[Array, "B H W 3"], keys: Key[Array, " B"] | None = None
    ) -> Float[Array, "B N width"]:
        p = self.patch_embed.patch_size
        grid = (images.shape[1] // p, images.shape[2] // p)
        patches = self.patch_embed.cut(images.astype(self.dtype))
        positions = resize_position_embedding(self.pos_embed[...], grid)
        if keys is not None and self.config.keep < 1:
            patches, positions = map_batch(self._draw, patches, keys, shared=positions)
        x = self.patch_embed(patches)
        # In float32, so that the gradients of both parameters are summed over the batch in it.
        cls = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x.astype(jnp.float32)], axis=1) + positions
        x = constrain_batch(x.astype(self.dtype))
        x = self.norm_pre(x) if self.norm_pre else x
        x = apply_blocks(lambda block, x, _: block(x), self.blocks, x, self.remat)
        return self.norm(x)

    def _draw(self, positions: jax.Array, patches: jax.Array, keys: jax.Array) -> tuple:
        """Some patches of every image [B, K, pixels] in their order, their positions, CLS first."""
        count = patches.shape[1]

        def draw(key: jax.Array) -> jax.Array:
            values = jax.random.uniform(jax.random.fold_in(key, PATCHES), (count,))
            return jnp.sort(jax.lax.top_k(values, self.config.kept(count))[1])

        chosen = jax.vmap(draw)(keys)
        # As a product, exact in float32: the gradient of indexing would be a scatter.
        one_hot = jax.nn.one_hot(chosen, count)
        places = jnp.matmul(one_hot, positions[0, 1:], precision=jax.lax.Precision.HIGHEST)
        cls = jnp.broadcast_to(positions[:, :1], (len(places), 1, places.shape[2]))
        chosen_patches = jnp.take_along_axis(patches, chosen[:, :, None], axis=1)
        return chosen_patches, jnp.concatenate([cls, places], axis=1)


def resize_position_embedding(
    embedding: Float[Array, "1 N width"], grid: tuple[int, int]
) -> Float[Array, "1 M width"]:
    """[1, 1 + g*g, width] -> [1, 1 + grid[0]*grid[1], width]; the first token, CLS, is kept.

    The others are interpolated bicubically as in PyTorch (align_corners=False, no antialiasing).
    """
    side = round((embedding.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return embedding
    width = embedding.shape[2]
    patches = embedding[:, 1:].reshape(1, side, side, width)
    patches = jax.image.resize(
        patches, (1, *grid, width), method="bicubic-pytorch", antialias=False
    )
    return jnp.concatenate([embedding[:, :1], patches.reshape(1, -1, width)], axis=1)
