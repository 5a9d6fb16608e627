"""BERT encoder (post-norm, no pooler), parameter names as in Hugging Face's `BertModel`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from simseg_jax.models.layers import (
    ACTIVATIONS,
    DEPTH,
    EPSILON,
    HEADS,
    INIT,
    WIDTH,
    Keys,
    Linear,
    apply_blocks,
    attention,
    check_heads,
    dense,
    dropout,
    layer_norm,
    linear,
    make_blocks,
)
from simseg_jax.runtime.ranges import BELOW_ONE, one_of, whole
from simseg_jax.runtime.settings import setting
from simseg_jax.runtime.sharding import constrain_batch

PAD = 0  # The id of [PAD] in every BERT vocabulary.


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Architecture of the text encoder; by default the paper's BERT-base."""

    vocab_size: int = setting(
        0, "rows of the word embedding; 0: the size of the vocabulary", whole(0, 2**24)
    )
    max_positions: int = setting(512, "rows of the position embedding", whole(3, 2**16))
    width: int = setting(768, "channels of BERT", WIDTH)
    depth: int = setting(12, "layers of BERT", DEPTH)
    heads: int = setting(12, "attention heads of BERT", HEADS)
    mlp_width: int = setting(3072, "hidden channels of BERT's MLPs", WIDTH)
    dropout: float = setting(0.1, "dropout of embeddings, attention and residuals", BELOW_ONE)
    activation: str = setting("gelu", "activation function of BERT's MLPs", one_of(*ACTIVATIONS))
    norm_eps: float = setting(1e-12, "epsilon of BERT's LayerNorms", EPSILON)

    @classmethod
    def base(cls) -> "BertConfig":
        """BERT-base with its uncased English vocabulary."""
        return cls(vocab_size=30522)

    def check(self, prefix: str) -> None:
        """Raises a `UserError` if fields contradict each other; prefix: precedes their names."""
        check_heads(self.width, self.heads, prefix)


def _init_words(key: jax.Array, shape, dtype) -> jax.Array:
    # As in Hugging Face's BERT, the row of [PAD] starts at zero.
    return INIT(key, shape, dtype).at[PAD].set(0)


class Embeddings(nnx.Module):
    """Sum of word, position and token-type (row 0) embeddings, normalised.

    The sum is float32, and so are the gradients of the tables: the gradient of a frequent word has
    thousands of terms, most of which bfloat16 would lose.
    """

    def __init__(self, config: BertConfig, dtype, rngs: Keys):
        def table(rows: int, init: Any = INIT) -> nnx.Embed:
            return nnx.Embed(
                rows,
                config.width,
                embedding_init=init,
                dtype=jnp.float32,
                rngs=rngs,  # pyright: ignore[reportArgumentType]
            )

        self.word_embeddings = table(config.vocab_size, _init_words)
        self.position_embeddings = table(config.max_positions)
        self.token_type_embeddings = table(2)
        self.LayerNorm = layer_norm(config.width, config.norm_eps, dtype, rngs)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T width"]:
        words = self.word_embeddings(ids)
        # As with PyTorch's padding_idx, the row of [PAD] gets no gradient.
        words = jnp.where((ids == PAD)[:, :, None], jax.lax.stop_gradient(words), words)
        # Rows that all examples share are sliced, not looked up: the gradient of a lookup adds the
        # whole batch to these rows by a scatter, which took half of the step on an H100.
        x = words + self.token_type_embeddings.embedding[...][None, :1]
        x = x + self.position_embeddings.embedding[...][None, : ids.shape[1]]
        return self.LayerNorm(x)


class Layer(nnx.Module):
    """Self-attention and MLP, each followed by its residual and LayerNorm."""

    def __init__(self, config: BertConfig, dtype, rngs: Keys):
        self.heads = config.heads
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation]

        def layer(width_in: int, width_out: int) -> Linear:
            return linear(width_in, width_out, INIT, dtype, rngs)

        self.query = layer(config.width, config.width)
        self.key = layer(config.width, config.width)
        self.value = layer(config.width, config.width)
        self.attention_output = layer(config.width, config.width)
        self.attention_norm = layer_norm(config.width, config.norm_eps, dtype, rngs)
        self.intermediate = layer(config.width, config.mlp_width)
        self.output = layer(config.mlp_width, config.width)
        self.output_norm = layer_norm(config.width, config.norm_eps, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T width"],
        mask: Bool[Array, "B T"],
        keys: Key[Array, " B"] | None,
        index: int | Int[Array, ""],
    ) -> Float[Array, "B T width"]:
        batch, tokens, width = x.shape
        number = 3 * index  # Of the first of this layer's three dropouts.

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, tokens, self.heads, width // self.heads)

        # One product for all three, so that x is read once and its gradient is written once.
        parts: tuple[Any, ...] = (self.query, self.key, self.value)
        kernel = jnp.concatenate([part.kernel[...] for part in parts], axis=1)
        bias = jnp.concatenate([part.bias[...] for part in parts])
        qkv = dense(x, kernel, bias, gradient_dtype=self.query.gradient_dtype)
        q, k, v = map(heads, jnp.split(qkv, 3, axis=2))
        out = attention(q, k, v, mask[:, None, None, :], self.dropout, keys, number)
        out = self.attention_output(out.reshape(batch, tokens, width))
        x = self.attention_norm(x + dropout(out, self.dropout, keys, number + 1))
        out = self.output(self.activation(self.intermediate(x)))
        x = self.output_norm(x + dropout(out, self.dropout, keys, number + 2))
        return constrain_batch(x)


class Bert(nnx.Module):
    """ids [B, T] int, mask [B, T] bool (False = padding) -> tokens [B, T, width].

    keys: a random key per example [B], for dropout; None, as in evaluation, switches it off. No
    token attends to padding, but the outputs of padding are returned, too. remat: as for
    `layers.apply_blocks`.
    """

    def __init__(self, config: BertConfig, dtype, rngs: Keys, remat: str = "none"):
        self.dropout = config.dropout
        self.remat = remat
        self.embeddings = Embeddings(config, dtype, rngs)
        self.layers = make_blocks(lambda rngs: Layer(config, dtype, rngs), config.depth, rngs)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        mask: Shaped[Array, "B T"],
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T width"]:
        mask = mask.astype(bool)
        x = dropout(self.embeddings(ids), self.dropout, keys, 3 * len(self.layers))
        x = constrain_batch(x)

        def apply(layer: Layer, x: jax.Array, index) -> jax.Array:
            return layer(x, mask, keys, index)

        return apply_blocks(apply, self.layers, x, self.remat)
