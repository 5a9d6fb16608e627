"""Top-M pooling, value and gradient: this package's kernel against `jax.lax.top_k`.

Prints the time of both, interleaved call by call, and the temporary memory XLA plans for them.

python benchmarks/pooling.py --batch 256 --tokens 196 --channels 512 --m 5
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from simseg_jax.models.pooling import top_m_pool


def with_top_k(x: jax.Array, m: int) -> jax.Array:
    """The direct way: sort the tokens of every channel, differentiate through the gather."""
    values, _ = jax.lax.top_k(jnp.swapaxes(x, 1, 2), m)
    return values.mean(axis=-1)


def compile_pair(pool: Callable, x: jax.Array, m: int):
    """Compiled value-and-gradient of `pool` and the bytes of its temporaries."""

    def loss(x, weight):
        return (pool(x, m) * weight).sum()

    weight = jnp.ones((x.shape[0], x.shape[2]))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(x, weight).compile()
    memory = compiled.memory_analysis()
    return (lambda: compiled(x, weight)), memory.temp_size_in_bytes if memory else 0


def main() -> None:
    """Times both implementations in turn and prints medians and their ratio."""
    parser = argparse.ArgumentParser(description="Top-M pooling against jax.lax.top_k.")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=196)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--m", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    shape = (args.batch, args.tokens, args.channels)
    x = jax.random.normal(jax.random.key(0), shape)
    kernel, kernel_memory = compile_pair(top_m_pool, x, args.m)
    peer, peer_memory = compile_pair(with_top_k, x, args.m)
    difference = jnp.abs(kernel()[1] - peer()[1]).max()
    seconds = {"kernel": [], "lax.top_k": []}
    for _ in range(args.repeats):
        for name, function in (("kernel", kernel), ("lax.top_k", peer)):
            began = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - began)
    ours, theirs = (np.array(seconds[name]) for name in seconds)
    print(
        f"{jax.devices()[0].device_kind}, {shape}, M = {args.m}, gradients differ by {difference}"
    )
    print(f"{'':12s}{'median ms':>12s}{'temporary MiB':>16s}")
    print(f"{'kernel':12s}{np.median(ours) * 1e3:12.1f}{kernel_memory / 2**20:16.1f}")
    print(f"{'lax.top_k':12s}{np.median(theirs) * 1e3:12.1f}{peer_memory / 2**20:16.1f}")
    print(f"lax.top_k / kernel, median of the pairs: {np.median(theirs / ours):.2f}x time")


if __name__ == "__main__":
    main()
