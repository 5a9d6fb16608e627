"""The model: for images and texts each an encoder, projection, pooling and L2 normalisation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8

from simseg_jax.models.bert import Bert, BertConfig
from simseg_jax.models.layers import WIDTH, Keys, Linear, dense, torch_linear_init
from simseg_jax.models.pooling import mean_pool, top_m_pool
from simseg_jax.models.vit import ViT, ViTConfig
from simseg_jax.runtime.ranges import FLAG, RESPONSES, number, one_of
from simseg_jax.runtime.settings import group, setting
from simseg_jax.runtime.sharding import constrain_batch

POOLS = ("loda", "mean", "cls")


@dataclasses.dataclass(frozen=True)
class SimSegConfig:
    """Architecture of the whole model."""

    image: ViTConfig = group(ViTConfig)
    text: BertConfig = group(BertConfig)
    embed_dim: int = setting(512, "channels of the common embedding", WIDTH)
    pool: str = setting(
        "loda",
        "pooling; loda: mean of the M largest per channel; mean: of all tokens; cls: only CLS",
        one_of(*POOLS),
    )
    m_image: int = setting(5, "M^I in training: responses per channel over patches", RESPONSES)
    m_text: int = setting(5, "M^T in training: responses per channel over words", RESPONSES)
    mask_padding: bool = setting(
        False, "keep [PAD] out of text pooling in training; the authors do not", FLAG
    )
    temperature: float = setting(0.07, "initial temperature", number(0.001, 0.5))


class Projection(Linear):
    """Linear without bias; multiplies in `dtype`, sums and returns float32 for the pooling."""

    def __init__(self, width: int, embed_dim: int, dtype, rngs: Keys):
        super().__init__(
            width,
            embed_dim,
            use_bias=False,
            kernel_init=torch_linear_init(),
            dtype=dtype,
            rngs=rngs,  # pyright: ignore[reportArgumentType]
        )

    def __call__(self, inputs: Float[Array, "B N width"], out_sharding=None) -> jax.Array:
        inputs = inputs.astype(self.dtype)
        return dense(inputs, self.kernel[...], None, jnp.float32, self.gradient_dtype)


class SimSeg(nnx.Module):
    """Image and text encoders with a common embedding space of D channels."""

    def __init__(
        self,
        config: SimSegConfig,
        dtype,
        rngs: Keys,
        remat: str = "none",
        gradient_dtype: Any = None,
    ):
        self.config = config
        self.image_encoder = ViT(config.image, dtype, rngs, remat)
        self.text_encoder = Bert(config.text, dtype, rngs, remat)
        self.image_projection = Projection(config.image.width, config.embed_dim, dtype, rngs)
        self.text_projection = Projection(config.text.width, config.embed_dim, dtype, rngs)
        self.temperature = nnx.Param(jnp.float32(config.temperature))
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Linear):
                module.gradient_dtype = gradient_dtype

    def normalize(self, images: UInt8[Array, "*B H W 3"]) -> Float[Array, "*B H W 3"]:
        """uint8 [..., 3] -> float32, normalised with the mean and deviation of `ViTConfig`."""
        leading = (None,) * (images.ndim - 1)
        mean, std = (
            jnp.array(values, jnp.float32)[leading]
            for values in (self.config.image.mean, self.config.image.std)
        )
        return (images.astype(jnp.float32) / 255 - mean) / std

    def encode_image(
        self, images: Float[Array, "B H W 3"], keys: Key[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B D"], Float[Array, "B tokens D"]]:
        """Normalised images [B, H, W, 3] -> (embedding [B, D], projected tokens [B, 1 + N, D]).

        The embedding has unit length, the tokens (CLS, then the patches row by row) do not. keys:
        as for `ViT`.
        """
        tokens = constrain_batch(self.image_projection(self.image_encoder(images, keys)))
        return self.pool_image(tokens), tokens

    def pool_image(
        self, tokens: Float[Array, "B N D"], m: int | None = None
    ) -> Float[Array, "B D"]:
        """Unit-length embedding [B, D] of projected tokens; m: M^I, by default that of training."""
        return self._pool(tokens, 1, m or self.config.m_image)

    def encode_text(
        self,
        ids: Int[Array, "B T"],
        mask: Shaped[Array, "B T"],
        m: int | None = None,
        mask_padding: bool | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """Token ids and padding mask [B, T] -> unit-length embeddings [B, D].

        m (M^T) and mask_padding: by default those of training. keys: as for `Bert`.
        """
        tokens = constrain_batch(self.text_projection(self.text_encoder(ids, mask, keys)))
        if mask_padding is None:
            mask_padding = self.config.mask_padding
        return self._pool(tokens, 0, m or self.config.m_text, mask if mask_padding else None)

    def _pool(self, tokens, first: int, m: int, mask=None) -> jax.Array:
        """Unit-length embedding [B, D] of tokens [B, N, D]; those before `first` are not pooled."""
        if self.config.pool == "cls":
            pooled = tokens[:, 0]
        elif self.config.pool == "mean":
            pooled = mean_pool(tokens[:, first:], mask)
        else:
            pooled = top_m_pool(tokens[:, first:], m, mask)
        return constrain_batch(l2_normalize(pooled))


def l2_normalize(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x / (|x| + 1e-8) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)


@functools.cache
def make_model(
    config: SimSegConfig, dtype=jnp.float32, remat: str = "none", gradient_dtype: Any = None
) -> nnx.GraphDef:
    """The model's structure without parameters; `bind(graphdef, params)` makes it callable.

    dtype: of matrix products. remat: as for `layers.apply_blocks`. gradient_dtype: as for
    `layers.dense`.
    """
    abstract = nnx.eval_shape(
        lambda: SimSeg(config, dtype, Keys(jax.random.key(0)), remat, gradient_dtype)
    )
    graphdef, _ = nnx.split(abstract, nnx.Param)
    return graphdef


def bind(graphdef: nnx.GraphDef, params: dict) -> SimSeg:
    """The model with these parameters."""
    # NNX expects the blocks in sorted order, and as strings "10" comes before "2".
    return nnx.merge(graphdef, _with_keys(params, lambda key: int(key) if key.isdigit() else key))


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: SimSegConfig, key: jax.Array) -> dict:
    """Random float32 parameters as a nested dict with string keys."""
    return params_of(SimSeg(config, jnp.float32, Keys(key)))


def params_of(module: nnx.Module) -> dict:
    """The parameters of a module as a nested dict with string keys."""
    _, state = nnx.split(module, nnx.Param)
    # NNX numbers blocks with integers; checkpoints and path rules have strings.
    return _with_keys(nnx.to_pure_dict(state), str)


def path_string(path) -> str:
    """A JAX key path as text, such as "image_encoder/blocks/0/attn/qkv/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _with_keys(tree, convert: Callable):
    if not isinstance(tree, dict):
        return tree
    return {convert(key): _with_keys(value, convert) for key, value in tree.items()}
