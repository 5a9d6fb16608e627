"""Device mesh, batch sharding and the two parameter rules (replicate, FSDP).

The mesh has two axes, `data` and `fsdp`. The batch is split over both; with fsdp > 1 every large
parameter (and its optimiser moments) is also split over `fsdp`. XLA inserts the communication into
programs under plain `jax.jit`; only `gather_batch` asks for one explicitly.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.settings import setting

BATCH = P(("data", "fsdp"))
# Smaller parameters are kept whole: gathering them costs more than their memory.
MIN_SHARDED_SIZE = 2**14


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    fsdp: int = setting(
        1, "devices that share one copy of the parameters; the other axis is data", whole(1)
    )


def make_mesh(fsdp: int = 1, devices: Sequence | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices, `fsdp` of them sharing one copy of the parameters.

    With several TPU slices, each holds whole copies, so that only gradients and embeddings cross
    the network between slices.
    """
    devices = devices or jax.devices()
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(
            f"mesh.fsdp={fsdp} must divide the number of devices, which is {len(devices)}."
        )
    # Explicit axes, JAX's default, require sharding annotations in every module.
    auto = (AxisType.Auto, AxisType.Auto)
    shape, names = (len(devices) // fsdp, fsdp), ("data", "fsdp")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, names, axis_types=auto, devices=devices)
    if shape[0] % slices:
        raise UserError(
            f"mesh.fsdp={fsdp} must divide the {len(devices) // slices} devices of a slice."
        )
    within = (shape[0] // slices, fsdp)
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, (slices, 1), devices), names, auto)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading axis is split over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def state_sharding(state, mesh: Mesh):
    """A `NamedSharding` per leaf of `state` (arrays or shape structs).

    With fsdp > 1 the longest dimension that fsdp divides is split; small or indivisible leaves are
    replicated. Optimiser moments have their parameter's shape, hence its sharding.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(leaf) -> NamedSharding:
        divisible = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
        if fsdp == 1 or leaf.size < MIN_SHARDED_SIZE or not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, P(*(["fsdp" if i == axis else None for i in range(leaf.ndim)])))

    return jax.tree.map(rule, state)


def place(values, shapes):
    """Host arrays as JAX arrays; each process copies the parts of its devices.

    shapes: shape structs with the wanted shardings and types.
    """

    def put(value, shape) -> jax.Array:
        value = np.asarray(value).astype(shape.dtype)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda i: value[i])

    return jax.tree.map(put, values, shapes)


def structs(tree, sharding: NamedSharding):
    """Shape structs of a tree of arrays or structs, all with one sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Pins the leading axis of an activation to the batch axes of the mesh in context, if any.

    Without it XLA may split the channels of activations as it splits FSDP parameters.
    """
    if device_count() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def constrain_whole(x: jax.Array) -> jax.Array:
    """Pins a parameter, or its gradient, to be whole on every device of the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    if device_count() == 1 or mesh.shape["fsdp"] == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P())


def device_count() -> int:
    """The number of devices over which the batch is split: those of the mesh in context.

    1 without a mesh and inside `map_batch`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or AxisType.Manual in mesh.axis_types else mesh.size


def target_device() -> Any:
    """The device that a program is traced for: of the mesh in context, else JAX's default.

    It has `platform` ("cpu", "gpu", "tpu") and `device_kind`. Kernels are chosen by them, so that a
    program compiled here for other hardware equals the one compiled there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0] if mesh.empty else mesh.abstract_device


def map_batch(function: Callable, *arrays, shared=None):
    """function(*arrays) on every device's own part of the batch, without communication.

    arrays, results: pytrees of arrays [B, ...]. shared: if given, a pytree that is whole on every
    device and precedes the arrays as argument. For work on single examples: XLA alone would gather
    the whole batch for a loop over it, or sum gradients over devices in every iteration.
    """
    first = () if shared is None else (shared,)
    if device_count() == 1:
        return function(*first, *arrays)
    specs = (*(P() for _ in first), *(BATCH for _ in arrays))
    # Unchecked: the gradient with respect to `shared` must not be summed over devices inside.
    mapped = jax.shard_map(function, in_specs=specs, out_specs=BATCH, check_vma=False)
    return mapped(*first, *arrays)


def gather_batch(x: jax.Array) -> jax.Array:
    """[B, ...] split over devices -> [devices, B, ...], where every device holds the whole batch.

    Its gradient is a reduce-scatter, which sends half as much as what XLA on CPUs makes of a
    sharding constraint.
    """
    if device_count() == 1:
        return x[None]

    def gather(part: jax.Array) -> jax.Array:
        return jax.lax.all_gather(part, BATCH[0], tiled=True)[None]

    return jax.shard_map(gather, in_specs=BATCH, out_specs=BATCH)(x)


def to_global_batch(batch, mesh: Mesh):
    """This process's part of a batch (a dict of NumPy arrays) -> arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def local_mesh(mesh: Mesh) -> Mesh:
    """A mesh for programs of this process alone; the same mesh if there is only one process."""
    processes = jax.process_count()
    if processes == 1:
        return mesh
    return make_mesh(devices=own_devices(jax.local_devices(), processes))


def own_devices(local: Sequence, processes: int) -> Sequence:
    """Which of a process's devices a program that is not shared with other processes can use.

    On v5e and v6e with several processes a single one. For the four of one host XLA refuses
    programs on some slices ("device assignment should include all slice devices" on v5e 4x8), and
    crashes at collectives on others (v5e and v6e 4x4).
    """
    return local[:1] if processes > 1 and "lite" in local[0].device_kind else local


def local_params(params, mesh: Mesh):
    """Parameters for `mesh`, which is a `local_mesh`.

    If they are spread over several processes, all must call this together, and every device of the
    mesh gets a whole copy. Otherwise they are returned as they are.
    """
    leaves = jax.tree.leaves(params)
    if all(leaf.is_fully_addressable for leaf in leaves):
        return params
    params = jax.jit(lambda x: x, out_shardings=replicated(leaves[0].sharding.mesh))(params)

    def localize(leaf: jax.Array) -> jax.Array:
        used = set(mesh.devices.flat)
        parts = [shard.data for shard in leaf.addressable_shards if shard.device in used]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), parts)

    return jax.tree.map(localize, params)


def gather_bytes(data: bytes) -> list[bytes]:
    """The data of all processes, in their order. All processes must call this together."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.array([len(data)]))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
