"""What every evaluation needs of a model besides parameters: structure, text encoder, devices."""

import dataclasses

from flax import nnx
from jax.sharding import Mesh

from simseg_jax.data.text import TextEncoder
from simseg_jax.models.simseg import SimSegConfig
from simseg_jax.runtime import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model without its parameters, which a training run changes with every step."""

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
        """The devices of this process alone: processes evaluate images of their own."""
        return sharding.local_mesh(self.mesh)
