"""Traffic and time against numbers worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from simseg_jax.runtime.hardware import Chip
from simseg_jax.training.collectives import Collective
from simseg_jax.training.roofline import bound, traffic


def mesh(machines, platform="gpu"):
    """As much of a mesh as is read; machines: the machine of every device."""
    devices = [SimpleNamespace(platform=platform, process_index=m) for m in machines]
    return SimpleNamespace(devices=np.array(devices))


def test_a_sum_over_machines_crosses_the_network_in_shares():
    everyone = Collective("all-reduce", 800, 4, (0, 1, 2, 3), times=3)
    links, network = traffic([everyone], mesh([0, 0, 1, 1]))
    assert links == 3 * 2 * 800 * 3 / 4
    assert network == 3 * 2 * (800 / 2) * 1 / 2
    assert traffic([everyone], mesh([0, 0, 0, 0]))[1] == 0
    within = Collective("all-gather", 800, 2, (0, 1), times=1)
    assert traffic([within], mesh([0, 0, 1, 1])) == (400, 0)


def test_programs_for_tpus_say_what_crosses_the_network():
    sent = [
        Collective("all-reduce", 800, 2, (0, 1), times=1),
        Collective("all-reduce", 400, 2, None, times=1, network=True),
    ]
    assert traffic(sent, mesh([0, 1, 2, 3], "tpu")) == (800, 400)


def test_the_bound_is_the_slowest_part():
    memory = SimpleNamespace(
        argument_size_in_bytes=10, output_size_in_bytes=20, temp_size_in_bytes=35
    )
    compiled = SimpleNamespace(memory_analysis=lambda: memory)
    sent = [Collective("all-gather", 800, 2, (0, 1), times=1)]
    chip = Chip(flops=100.0, bandwidth=50.0, links=100.0, network=1.0)
    least = bound(chip, compiled, 300.0, sent, mesh([0, 0]))
    assert (least.products, least.memory, least.links, least.network) == (3, 2, 4, None)
    assert (least.seconds, least.limit) == (4, "links")
    least = bound(chip, compiled, 300.0, sent, mesh([0, 1]))
    assert least.network == pytest.approx(800 * 1 / 2)
    assert bound(None, compiled, 300.0, sent, mesh([0, 0])).seconds is None
