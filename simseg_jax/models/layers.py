"""Pieces both encoders share: attention, dropout with explicit keys, rematerialisation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.ranges import number, whole
from simseg_jax.runtime.sharding import constrain_whole, target_device

REMAT = ("none", "dots", "full")
WIDTH = whole(1, 2**16)
BLOCKS = 128  # At most; the deepest published ViTs have 48.
DEPTH = whole(1, BLOCKS)
HEADS = whole(1, 1024)
EPSILON = number(1e-15, 0.1)
FLASH_WIDTHS = range(8, 129, 8)  # Channels per head that cuDNN's attention takes.
# Of weights and embeddings, as Hugging Face's BERT and timm's ViT. timm truncates at -2 and 2, a
# hundred deviations from the mean, which is to say never.
INIT = nnx.initializers.normal(0.02)


def check_heads(width: int, heads: int, prefix: str) -> None:
    """Raises a `UserError` unless every head gets as many channels; prefix: of their names."""
    if width % heads:
        raise UserError(f"{prefix}width={width} must be a multiple of {prefix}heads={heads}.")


def dropout(
    x: Float[Array, "B ..."],
    rate: float,
    keys: Key[Array, " B"] | None,
    number: int | Int[Array, ""],
) -> Float[Array, "B ..."]:
    """Inverted dropout of x [B, ...]; without keys (evaluation) the identity.

    keys: one random key per example [B], so that an example's draws do not depend on the batch it
    is computed in. number (int or int array []): which dropout of the model this is, as each draws
    anew.
    """
    if keys is None or rate == 0:
        return x

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0).astype(x.dtype)


def apply_blocks(apply: Callable, blocks: nnx.List, x: jax.Array, remat: str) -> jax.Array:
    """x -> apply(block, x, index) for every block in turn; all have the same structure.

    remat: what is kept of a block for its gradient, the rest being computed again. "none": what is
    costly to compute; "dots": results of products with weights; "full": its input.
    The blocks form a loop, so that one of them is compiled. On CPUs without remat they do not: XLA
    optimises products there better outside of loops, and keeps whatever the gradient needs.
    """
    if remat == "none" and target_device().platform == "cpu":
        for index, block in enumerate(blocks):
            x = apply(block, x, index)
        return x
    graphdefs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def body(x, inputs):
        state, index = inputs
        return apply(nnx.merge(graphdefs[0], state), x, index), None

    # XLA does not move work into or out of a loop's body: nothing keeps it from being repeated.
    body = jax.checkpoint(body, policy=_kept(remat), prevent_cse=False)
    return jax.lax.scan(body, x, (stacked, jnp.arange(len(blocks))))[0]


def _kept(remat: str) -> Callable[..., bool]:
    """The policy of `jax.checkpoint` for a `remat`: which operations keep their results."""
    policies = jax.checkpoint_policies
    if remat == "full":
        return policies.nothing_saveable
    products = policies.dots_with_no_batch_dims_saveable
    if remat == "dots":
        return products

    def products_and_attention(primitive, *arguments, **parameters) -> bool:
        # cuDNN's attention keeps one number per row of probabilities beside its result.
        fused = primitive.name.startswith("dot_product_attention_fwd")
        return fused or products(primitive, *arguments, **parameters)

    return products_and_attention


def can_flash(dtype) -> bool:
    """Whether `flash_attention` runs on the target: NVIDIA from Ampere on, in half precision."""
    target = target_device()
    if target.platform != "gpu" or dtype != jnp.bfloat16:
        return False
    here = [device for device in jax.devices() if device.device_kind == target.device_kind]
    # AMD's is no number; of a target that is not here only newer GPUs are known.
    capability = getattr(here[0], "compute_capability", "0") if here else "9.0"
    return capability.replace(".", "").isdigit() and float(capability) >= 8


def flash_attention(
    query: Float[Array, "B N heads width"],
    key: Float[Array, "B N heads width"],
    value: Float[Array, "B N heads width"],
    implementation: Any = "cudnn",
) -> Float[Array, "B N heads width"]:
    """As `attention` without mask and dropout, by cuDNN: probabilities never reach the memory.

    query, key, value: [batch, tokens, heads, width], width one of FLASH_WIDTHS.
    """
    batch, tokens = query.shape[:2]
    # JAX refuses the gradient for an odd number of tokens, and ViTs have 197: one that is masked.
    rows = [(0, 0), (0, tokens % 2), (0, 0), (0, 0)]
    lengths = jnp.full((batch,), tokens, jnp.int32)
    out = jax.nn.dot_product_attention(
        *(jnp.pad(x, rows) for x in (query, key, value)),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return out[:, :tokens]


def attention(
    query: Float[Array, "B N heads width"],
    key: Float[Array, "B N heads width"],
    value: Float[Array, "B N heads width"],
    mask: Bool[Array, "#B #heads #N #N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_keys: Key[Array, " B"] | None = None,
    number: int | Int[Array, ""] = 0,
) -> Float[Array, "B N heads width"]:
    """Scaled dot-product attention, softmax in float32.

    query, key, value: [batch, tokens, heads, width]; mask: boolean, broadcastable to
    [batch, heads, query tokens, key tokens]. dropout_keys, number: as for `dropout`, which acts on
    the probabilities.
    """
    # Heads before tokens: plain batched products, on CPU twice as fast as the interleaved layout.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    logits = product("bhqd,bhkd->bhqk", query * scale, key)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = dropout(weights, dropout_rate, dropout_keys, number).astype(value.dtype)
    out = product("bhqk,bhkd->bhqd", weights, value)
    # Normalised after the product, which has fewer columns than keys.
    return jnp.swapaxes((out / total).astype(value.dtype), 1, 2)


def dense(
    x: Float[Array, "*B c"],
    kernel: Float[Array, "c d"],
    bias: Float[Array, " d"] | None = None,
    dtype: Any = None,
    gradient_dtype: Any = None,
) -> Float[Array, "*B d"]:
    """x @ kernel + bias, multiplied in the type of x; dtype: of the result, if another.

    gradient_dtype: the type in which the gradients of kernel and bias leave their product, and thus
    the one in which they are summed over devices; by default the type of x.
    Where devices share a copy of the parameters, the kernel comes together here, in the type of x:
    XLA might send activations instead.
    """

    def multiply(x, kernel, bias):
        weights = constrain_whole(kernel.astype(x.dtype))
        y = jnp.matmul(x, weights, preferred_element_type=dtype)
        return y if bias is None else y + bias.astype(y.dtype).reshape(*[1] * (y.ndim - 1), -1)

    if x.dtype == jnp.float32:
        return multiply(x, kernel, bias)

    def backward(operands, slope):
        x, kernel, bias = operands
        slope, sums = slope.astype(x.dtype), gradient_dtype or x.dtype
        to_x = slope @ constrain_whole(kernel.astype(x.dtype)).T
        rows = (y.reshape(-1, y.shape[-1]) for y in (x, slope))
        to_kernel = jnp.einsum("nc,nd->cd", *rows, preferred_element_type=sums)
        to_bias = slope.sum(axis=range(slope.ndim - 1), dtype=sums)
        gradients = to_kernel.astype(kernel.dtype), to_bias.astype(kernel.dtype)
        return to_x, gradients[0], None if bias is None else gradients[1]

    apply = jax.custom_vjp(multiply)
    apply.defvjp(lambda *operands: (multiply(*operands), operands), backward)
    return jnp.asarray(apply(x, kernel, bias))


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """jnp.einsum(subscripts, x, y) with a float32 result, whose gradient stays in their type.

    JAX's own gradient multiplies the float32 slope of the result with x and y in float32, which
    tensor cores do not do.
    """

    @jax.custom_vjp
    def multiply(x, y):
        return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)

    def forward(x, y):
        return multiply(x, y), (x, y)

    def backward(operands, slope):
        _, pullback = jax.vjp(lambda x, y: jnp.einsum(subscripts, x, y), *operands)
        return pullback(slope.astype(operands[0].dtype))

    multiply.defvjp(forward, backward)
    return jnp.asarray(multiply(x, y))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU. With erf, as PyTorch; JAX's own takes erfc, several times as slow on CPUs."""
    return x * (0.5 * (1 + jax.lax.erf(x * 0.5**0.5))).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The approximation x * sigmoid(1.702 x) that OpenAI trained CLIP with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
}


class Keys:
    """Random keys for initialisation: those of `nnx.Rngs(key)`, counted in Python.

    nnx.Rngs counts in a traced array and compares its sharding at every key, for which JAX lists
    the trace so far: more than half of the time that tracing an initialisation took.
    """

    def __init__(self, key: jax.Array, start: int | jax.Array = 0):
        self.key, self.start, self.drawn = key, start, 0

    def params(self) -> jax.Array:
        """The next key."""
        self.drawn += 1
        return jax.random.fold_in(self.key, self.start + self.drawn - 1)


def make_blocks(make: Callable[[Keys], nnx.Module], depth: int, rngs: Keys) -> nnx.List:
    """[make(rngs), ...], `depth` times: the same parameters from a program of one block's size."""
    trial = Keys(rngs.key)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(trial)))

    def draw(start: jax.Array) -> Any:
        return nnx.split(make(Keys(rngs.key, start)))[1]

    first = rngs.start + rngs.drawn
    # Behind a barrier: otherwise XLA draws the numbers of each block in code of its own.
    states = jax.lax.optimization_barrier(jax.vmap(draw)(first + trial.drawn * jnp.arange(depth)))
    rngs.drawn += depth * trial.drawn
    return nnx.List(
        [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], states)) for i in range(depth)]
    )


class Linear(nnx.Linear):
    """`dense` with float32 parameters; gradient_dtype is set by the model that it is part of."""

    gradient_dtype: Any = None

    def __call__(self, inputs: Float[Array, "*B c"], out_sharding=None) -> Float[Array, "*B d"]:
        bias = None if self.bias is None else self.bias[...]
        inputs = inputs.astype(self.dtype)
        return dense(inputs, self.kernel[...], bias, gradient_dtype=self.gradient_dtype)


def linear(
    width_in: int,
    width_out: int,
    kernel_init,
    dtype,
    rngs: Keys,
    bias_init=nnx.initializers.zeros,
) -> Linear:
    """A linear layer with float32 parameters that computes in `dtype`."""
    return Linear(
        width_in,
        width_out,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        rngs=rngs,  # pyright: ignore[reportArgumentType]
    )


class LayerNorm(nnx.LayerNorm):
    """LayerNorm in float32, gradients included; the result is in `result_dtype`."""

    result_dtype: Any = jnp.float32

    def __call__(
        self, x: Float[Array, "*B d"], *, mask: jax.Array | None = None
    ) -> Float[Array, "*B d"]:
        return super().__call__(x, mask=mask).astype(self.result_dtype)


def layer_norm(width: int, epsilon: float, dtype, rngs: Keys) -> LayerNorm:
    """LayerNorm whose result is in `dtype`."""
    norm = LayerNorm(
        width,
        epsilon=epsilon,
        dtype=jnp.float32,
        rngs=rngs,  # pyright: ignore[reportArgumentType]
    )
    norm.result_dtype = dtype
    return norm


def torch_linear_init():
    """PyTorch's default for linear and convolution weights: uniform within 1/sqrt(fan in)."""
    return nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> Callable:
    """PyTorch's default for the biases of such a layer: uniform within 1/sqrt(fan in)."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape, dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
