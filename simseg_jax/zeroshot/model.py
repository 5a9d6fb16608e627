"""A model without its parameters: structure, tokenisation of texts and devices."""

import dataclasses

from flax import nnx
from jax.sharding import Mesh

from simseg_jax.data.text import TextEncoder
from simseg_jax.models.simseg import SimSegConfig
from simseg_jax.runtime import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """All that an evaluation needs besides the parameters, which change with every step."""

    architecture: SimSegConfig
    graphdef: nnx.GraphDef
    encoder: TextEncoder
    mesh: Mesh

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.architecture.image.patch_size

    @property
    def local_mesh(self) -> Mesh:
        """The devices of this process only: each process evaluates its own images."""
        return sharding.local_mesh(self.mesh)
