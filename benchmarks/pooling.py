"""Top-M pooling, value and gradient: this package's kernel against the alternatives.

Prints the time of all of them, interleaved call by call, the temporary memory XLA plans and the
share of the memory bandwidth that is used, 100 % being a copy of the same array: the least traffic
is x read once and its gradient written once.

- package: the package's kernel. On NVIDIA GPUs a Triton kernel that keeps the tokens of 64 channels
  in registers and reads x once, elsewhere maxima.
- maxima: M passes, each with the largest entry after the previous one.
- top_k: `jax.lax.top_k` over tokens, differentiated through its gather.
- reduce: one pass of `jax.lax.reduce` that merges sorted lists of M values and positions.

python benchmarks/pooling.py --batch 64
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from simseg_jax.models import pooling
from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.ranges import whole

Selection = tuple[jax.Array, jax.Array]


def reduce_top_m(x: jax.Array, m: int) -> Selection:
    """As `pooling.top_m`, by a reduction over tokens of sorted lists of (value, token)."""

    def first(a, b):
        (av, at), (bv, bt) = a, b
        return (av > bv) | ((av == bv) & (at < bt))

    def choose(better, a, b):
        return tuple(jnp.where(better, p, q) for p, q in zip(a, b, strict=True))

    def merge(left, right):
        lists = [list(zip(side[:m], side[m:], strict=True)) for side in (left, right)]
        # The larger of a descending and an ascending list are the M largest; then sort those.
        best = [
            choose(first(a, b), a, b) for a, b in zip(lists[0], reversed(lists[1]), strict=True)
        ]
        for start in range(m):
            for i in range(start % 2, m - 1, 2):
                a, b = best[i], best[i + 1]
                best[i], best[i + 1] = choose(first(a, b), a, b), choose(first(a, b), b, a)
        return (*[value for value, _ in best], *[token for _, token in best])

    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    last = jnp.int32(np.iinfo(np.int32).max)
    values = (x, *[jnp.full_like(x, -jnp.inf)] * (m - 1))
    tokens = (token, *[jnp.full_like(token, last)] * (m - 1))
    start = (*[jnp.float32(-jnp.inf)] * m, *[last] * m)
    out = jax.lax.reduce((*values, *tokens), start, merge, (1,))
    return jnp.stack(out[:m], axis=1), jnp.stack(out[m:], axis=1)


def with_selection(select: Callable) -> Callable:
    """The package's pooling and its gradient around another selection."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def pool(x, m):
        return select(x, m)[0].mean(axis=1)

    def forward(x, m):
        values, positions = select(x, m)
        residuals = positions.astype(jnp.uint8), jnp.full((len(x), m), 1 / m), x[:0, :, :0]
        return values.mean(axis=1), residuals

    pool.defvjp(forward, lambda m, *rest: pooling._backward(m, *rest)[:1])
    return pool


def with_top_k(x: jax.Array, m: int) -> jax.Array:
    """The direct way: sort the tokens of every channel, differentiate through the gather."""
    values, _ = jax.lax.top_k(jnp.swapaxes(x, 1, 2), m)
    return values.mean(axis=-1)


def compile_pool(pool: Callable, x: jax.Array, m: int):
    """Compiled value-and-gradient of `pool` and the bytes of its temporaries."""

    def loss(x, weight):
        return (pool(x, m) * weight).sum()

    weight = jnp.ones((x.shape[0], x.shape[2]))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(x, weight).compile()
    memory = compiled.memory_analysis()
    return (lambda: compiled(x, weight)), memory.temp_size_in_bytes if memory else 0


@report_user_errors
def main() -> None:
    """Times all implementations in turn and prints medians and ratios to the package's kernel."""
    parser = argparse.ArgumentParser(description="Top-M pooling against its alternatives.")
    parser.add_argument("--batch", type=accepted(whole(1)), default=256)
    parser.add_argument("--tokens", type=accepted(whole(1)), default=196)
    parser.add_argument("--channels", type=accepted(whole(1)), default=512)
    parser.add_argument("--m", type=accepted(whole(1)), default=5)
    parser.add_argument("--repeats", type=accepted(whole(1)), default=15)
    args = parser.parse_args()
    if args.m > args.tokens:
        parser.error(f"--m={args.m} must not exceed --tokens={args.tokens}")
    shape = (args.batch, args.tokens, args.channels)
    x = jax.random.normal(jax.random.key(0), shape)
    pools = {
        "package": pooling.top_m_pool,
        "maxima": with_selection(pooling.top_m),
        "top_k": with_top_k,
        "reduce": with_selection(reduce_top_m),
    }
    runs, temporaries = {}, {}
    for name, pool in pools.items():
        runs[name], temporaries[name] = compile_pool(pool, x, args.m)
    gradients = {name: run()[1] for name, run in runs.items()}
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    runs["copy"], temporaries["copy"] = lambda: copy(x), 0
    seconds = {name: [] for name in runs}
    for _ in range(args.repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    # The first call of each warms up.
    times = {name: np.array(values[1:]) for name, values in seconds.items()}
    print(f"{jax.devices()[0].device_kind}, {shape}, M = {args.m}")
    print(f"{'':8s}{'median ms':>10s}{'/ package':>10s}{'of copy':>9s}{'temp. MiB':>15s}  gradient")
    for name, values in times.items():
        ratio = np.median(values / times["package"])
        share = np.median(times["copy"] / values)
        line = f"{name:8s}{np.median(values) * 1e3:10.2f}{ratio:9.2f}x{share:9.0%}"
        line += f"{temporaries[name] / 2**20:15.1f}"
        if name in gradients:
            error = jnp.abs(gradients[name] - gradients["package"]).max()
            line += f"  differs by {error:.1e}"
        print(line)


if __name__ == "__main__":
    main()
