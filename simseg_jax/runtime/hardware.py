"""Data sheets of accelerators, and compiling for accelerators that this machine does not have."""

import dataclasses
import importlib.util
import math
import re
from typing import Any

from simseg_jax.runtime.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The data sheet of one device, as JAX counts devices; None: not known here.

    flops: dense bfloat16 FLOP/s of matrix products. memory: bytes. bandwidth: bytes of memory per
    second. links: bytes per second sent to neighbours in one direction over all links (TPU
    interconnect, NVLink). network: bytes per second between slices or machines.
    """

    flops: float
    memory: int | None = None
    bandwidth: float | None = None
    links: float | None = None
    network: float | None = None


# The keys are parts of `jax.Device.device_kind`. Sources: NVIDIA's data sheets;
# cloud.google.com/tpu/docs, with "bidirectional" interconnect figures halved and the data-center
# bandwidth of a pod divided by its chips. An H100 has one 400 Gbit/s adapter, as in a DGX.
CHIPS = {
    "V100": Chip(125e12),
    "A100": Chip(312e12),
    "H100 PCIe": Chip(756e12),
    "H100": Chip(989e12, 84929347584, 3.35e12, 450e9, 50e9),
    "H200": Chip(989e12, 141 * GIB, 4.8e12, 450e9, 50e9),
    "B200": Chip(2250e12),
    "TPU v2": Chip(22.5e12),
    "TPU v3": Chip(61.5e12),
    "TPU v4": Chip(275e12, 32 * GIB, 1.228e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, 200e9, 3.125e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2.765e12, 600e9, 6.25e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.638e12, 400e9, 12.5e9),
    "TPU7x": Chip(1153.5e12),
}


def chip_of(device) -> Chip | None:
    """The data sheet of a `jax.Device`; None if it is not in `CHIPS`."""
    matches = [name for name in CHIPS if name in device.device_kind]
    return CHIPS[max(matches, key=len)] if matches else None


# XLA's description of an H100 (SXM); normally XLA reads it from the device.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Kinds of devices to compile for, with the number of axes of their shapes.
KINDS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "h100": 2, "cpu": 1}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for. shape: TPU chips along each axis, (machines, GPUs) or (CPUs,)."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> "Target":
        """From "v5e:4x8", "h100:8", "h100:4x8" (machines x GPUs) or "cpu:8"; else a `UserError`."""
        kind, _, sizes = text.partition(":")
        if kind not in KINDS or not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", sizes):
            raise UserError(
                f"--devices={text} must be KIND:SHAPE with a KIND of {', '.join(KINDS)}, such as "
                "v5e:4x8, v5p:4x4x4, h100:8, h100:4x8 (machines x GPUs) or cpu:8."
            )
        shape, axes = tuple(map(int, sizes.split("x"))), KINDS[kind]
        if kind == "h100" and len(shape) == 1:
            shape = (1, *shape)
        if len(shape) != axes:
            example = "x".join(["4"] * axes)
            raise UserError(f"--devices={text} must have {axes} axes, such as {kind}:{example}.")
        if slices > 1 and kind in ("h100", "cpu"):
            raise UserError(f"--slices={slices} is for TPUs: write --devices=h100:MACHINESxGPUS.")
        return cls(kind, shape, slices)

    def environment(self) -> dict[str, str]:
        """The environment variables of a process that compiles for these devices only."""
        flags = {
            "cpu": f"--xla_force_host_platform_device_count={math.prod(self.shape)}",
            # Autotuning needs a device. Without autotuning Triton finds no tiles for some products.
            "h100": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        }
        return {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags.get(self.kind, ""),
            # Hide this machine's GPUs and TPUs, and do not query a metadata server.
            "CUDA_VISIBLE_DEVICES": "-1",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            # Other processes may use the TPU compiler, or a TPU of this machine, meanwhile.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }

    def devices(self) -> list:
        """The devices, in a process that runs in `environment`."""
        import jax
        from jax.experimental import topologies

        if self.kind == "cpu":
            return jax.devices()
        shape = "x".join(map(str, self.shape))
        name = f"{self.kind}:{shape}"
        options: dict[str, Any] = {"platform": "tpu", "topology_name": name}
        if self.kind == "h100":
            packages = ("jax_cuda12_plugin", "jax_cuda13_plugin")
            install = "pip install 'simseg-jax[cuda]', which is 3 GB"
            options = {"platform": "cuda", "topology_name": "", "topology": f"1x{shape}"}
            options["target_config"] = H100
        else:
            packages = ("libtpu",)
            install = "pip install 'simseg-jax[tpu]'"
            if self.slices > 1:
                options["num_slices"] = self.slices
            if self.kind == "v4":
                # JAX runs both cores of a chip as one device.
                options["chip_config_name"] = "megacore"
        if not any(map(importlib.util.find_spec, packages)):
            raise UserError(f"Compiling for {self.kind} needs {packages[0]}: {install}.")
        try:
            found = topologies.get_topology_desc(**options)
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"The compiler has no topology {name}: {first}") from error
        return list(found.devices)
