"""One encoder out of a checkpoint of any code base we know: its architecture and parameters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simseg_jax.errors import UserError
from simseg_jax.models.bert import Bert, BertConfig
from simseg_jax.models.simseg import params_of, path_string
from simseg_jax.models.vit import ViT, ViTConfig
from simseg_jax.weights.formats import FORMATS, Format, Tensors
from simseg_jax.weights.layouts import Entry
from simseg_jax.weights.sources import Weights

SIDES = {"image": "image encoder (ViT)", "text": "text encoder (BERT)"}
# Names that tell why a model cannot be represented.
FOREIGN = (
    (r"reg_token|register_token|storage_token", "register tokens"),
    (r"dist_token|distillation_token", "a distillation token"),
    (r"[qk]_norm", "normalised queries and keys"),
    (r"relative_position|rel_pos|rope", "relative positions"),
    (r"mlp\.(w12|w3|fc1_g|gate)", "gated MLPs"),
    (r"lambda1|ls_1", "a LayerScale of its own kind"),
)


class Tower(NamedTuple):
    """An encoder. settings: what the files say of the architecture, with the names of its class."""

    format: str
    settings: dict[str, Any]
    params: dict

    @property
    def config(self) -> ViTConfig | BertConfig:
        """The architecture; what the files do not say takes the default."""
        kind = BertConfig if "vocab_size" in self.settings else ViTConfig
        return kind(**self.settings)


def find_towers(tensors: Tensors) -> Iterator[tuple[Format, str]]:
    """The encoders in a file: their format and the prefix of their tensors."""
    for form in FORMATS:
        for name in tensors:
            prefix = name.removesuffix(form.signature)
            if prefix != name and (not prefix or prefix[-1] in "./"):
                yield form, prefix


def read_tower(weights: Weights, side: str, heads: int | None = None) -> Tower:
    """The encoder of one side ("image", "text") in some weights, alone or among others.

    heads: for files that do not tell them; by default those of published models.
    """
    tensors = usual_names(weights.tensors)
    towers = list(find_towers(tensors))
    fitting = [tower for tower in towers if tower[0].side == side]
    if len(fitting) != 1:
        found = ", ".join(form.name for form, _ in towers) or "no encoder known here"
        hint = ""
        if side == "text" and any("token_embedding" in name for name in tensors):
            hint = " CLIP's text encoder is causal and cannot take BERT's place."
        raise UserError(f"There is not one {SIDES[side]} in the weights: {found} in it.{hint}")
    form, prefix = fitting[0]
    inside = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    settings = form.describe(inside, weights.settings, heads)
    tower = Tower(form.name, settings, {})
    table = form.table(tower.config, inside)
    return tower._replace(params=assemble(inside, table, shapes_of(tower.config), form.unused))


def shapes_of(config: ViTConfig | BertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of an encoder, by path."""
    kind: Any = ViT if isinstance(config, ViTConfig) else Bert
    return leaves_of(jax.eval_shape(lambda: params_of(kind(config, jnp.float32, nnx.Rngs(0)))))


def leaves_of(params) -> dict[str, tuple[int, ...]]:
    """The shapes of nested parameters by path."""
    return {path_string(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(params)}


def assemble(
    tensors: Tensors, table: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]], unused: str
) -> dict:
    """Nested float32 parameters from the tensors that a table names.

    unused: pattern of names to ignore. All missing, unexpected and mis-shaped names are reported
    together.
    """
    found, problems = {}, []
    for entry in table:
        missing = [name for name in entry.names if name not in tensors]
        problems += [f"missing {name}" for name in missing]
        if missing:
            continue
        shape = shapes[entry.path]
        parts = [np.asarray(tensors[name], np.float32) for name in entry.names]
        try:
            value = entry.layout.read(*parts) if parts else np.zeros(shape, np.float32)
        except (ValueError, IndexError):
            value = np.zeros(())
        if value.shape != shape:
            given = " and ".join(f"{n} {tensors[n].shape}" for n in entry.names)
            problems.append(f"{given} cannot become {entry.path} of shape {shape}")
        found[entry.path] = value
    used = {name for entry in table for name in entry.names}
    rest = [name for name in tensors if name not in used and not re.fullmatch(unused, name)]
    problems += [f"unexpected {name}" for name in rest]
    if problems:
        reasons = [why for pattern, why in FOREIGN if any(re.search(pattern, n) for n in rest)]
        reason = f" It has {', '.join(reasons)}, which have no place here." if reasons else ""
        raise UserError(
            f"The weights do not fit the model ({len(problems)} problems).{reason} "
            + "; ".join(problems)
        )
    return nest(found)


def nest(flat: Mapping[str, Any]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def usual_names(tensors: Tensors) -> dict[str, np.ndarray]:
    """Without what differs between releases of the same code base."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        # Old BERTs, converted from TensorFlow.
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        stacked = re.match(r"(.*Transformer/encoderblock)/(.*)", name)
        if stacked:  # big_vision with its blocks in a loop.
            for i, part in enumerate(tensor):
                renamed[f"{stacked[1]}_{i}/{stacked[2]}"] = part
        else:
            renamed[name] = tensor
    return renamed
