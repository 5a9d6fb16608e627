"""One encoder out of a checkpoint of any code base we know: its architecture and parameters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from simseg_jax.models.bert import Bert, BertConfig
from simseg_jax.models.simseg import SimSegConfig, params_of, path_string
from simseg_jax.models.vit import ViT, ViTConfig
from simseg_jax.runtime.errors import UserError, one_line, reading, some
from simseg_jax.runtime.settings import typed
from simseg_jax.weights.choice import Tensors, choose, prefixes, take, usual_names
from simseg_jax.weights.formats import FORMATS, Format
from simseg_jax.weights.layouts import Entry, kinds
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
    """An encoder.

    settings: what the files say of the architecture, with the names of its class. note: which
    tensors were taken and which were not, a sentence.
    """

    format: str
    settings: dict[str, Any]
    params: dict
    note: str

    @property
    def config(self) -> ViTConfig | BertConfig:
        """The architecture; what the files do not say takes the default."""
        return _config(self.settings)


def find_towers(tensors: Tensors) -> list[tuple[Format, str]]:
    """The encoders in a file: their format and the prefix of their tensors."""
    return [(form, prefix) for form in FORMATS for prefix in prefixes(tensors, form.signature)]


def read_tower(weights: Weights, side: str, heads: int | None = None) -> Tower:
    """The encoder of one side ("image", "text") in some weights, alone or among others.

    heads: for files that do not tell them; by default those of published models.
    """
    with reading("the weights", "Take other weights of the same model."):
        tensors = usual_names(weights.tensors)
        towers = find_towers(tensors)
        forms = {prefix: form for form, prefix in towers if form.side == side}
        if not forms:
            raise UserError(_no_tower(tensors, towers, side))
        prefix = choose(forms, weights.key, SIDES[side])
        form = forms[prefix]
        inside, note = take(tensors, prefix, [p for _, p in towers], form.unused)
        settings = form.describe(inside, weights.settings, heads)
        check_settings({side: settings})
        config = _config(settings)
        params = assemble(inside, form.table(config, kinds(inside)), shapes_of(config))
        return Tower(form.name, settings, params, note)


def _no_tower(tensors: Tensors, towers: Sequence[tuple[Format, str]], side: str) -> str:
    kinds = some(dict.fromkeys(form.name for form, _ in towers)) or "no encoder known here"
    hint = ""
    if side == "text" and any("token_embedding" in name for name in tensors):
        hint = " CLIP's text encoder is causal and cannot take BERT's place."
    names = some(dict.fromkeys(re.split(r"[./]", name)[0] for name in tensors))
    return (
        f"There is not one {SIDES[side]} in the weights: {kinds} in it.{hint} Its tensors are "
        f"under {names}."
    )


def check_settings(sides: Mapping[str, Mapping[str, Any]], **model: Any) -> None:
    """A `UserError` for an architecture of a file that no configuration could have.

    sides: settings by side; model: those of the whole model.
    """
    try:
        # In a configuration 0 stands for a size that is not known yet.
        if sides.get("text", {}).get("vocab_size") == 0:
            raise UserError("vocab_size=0 must be at least 1.")
        typed(SimSegConfig, {**sides, **model})
    except UserError as error:
        raise UserError(f"The weights describe an impossible model: {one_line(error)}") from error


def _config(settings: dict[str, Any]) -> ViTConfig | BertConfig:
    kind = BertConfig if "vocab_size" in settings else ViTConfig
    return kind(**settings)


def shapes_of(config: ViTConfig | BertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of an encoder, by path."""
    kind: Any = ViT if isinstance(config, ViTConfig) else Bert
    return leaves_of(jax.eval_shape(lambda: params_of(kind(config, jnp.float32, nnx.Rngs(0)))))


def leaves_of(params) -> dict[str, tuple[int, ...]]:
    """The shapes of nested parameters by path."""
    return {path_string(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(params)}


def assemble(
    tensors: Tensors, table: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]]
) -> dict:
    """Nested float32 parameters from the tensors that a table names; it has to name all of them.

    One `UserError` reports all missing, unexpected and mis-shaped names, another all parameters
    with values that are not finite.
    """
    found, problems = {}, []
    for entry in table:
        missing = [name for name in entry.names if name not in tensors]
        problems += [f"missing {name}" for name in missing]
        if missing:
            continue
        shape = shapes[entry.path]
        value = _parameter([tensors[name] for name in entry.names], entry, shape)
        if value is None:
            given = " and ".join(f"{n} {tensors[n].dtype}{tensors[n].shape}" for n in entry.names)
            problems.append(f"{given} cannot become {entry.path} of shape {shape}")
        else:
            found[entry.path] = value
    used = {name for entry in table for name in entry.names}
    rest = [name for name in tensors if name not in used]
    problems += [f"unexpected {name}" for name in rest]
    if problems:
        reasons = [why for pattern, why in FOREIGN if any(re.search(pattern, n) for n in rest)]
        reason = f" It has {some(reasons)}, which have no place here." if reasons else ""
        raise UserError(
            f"The weights do not fit the model ({len(problems)} "
            f"problem{'s' * (len(problems) > 1)}).{reason} "
            + some(problem[:70] for problem in problems)
        )
    refuse_infinite(found)
    return nest(found)


def _parameter(parts: list[np.ndarray], entry: Entry, shape: tuple) -> np.ndarray | None:
    """A parameter of its tensors, zero without any; None if they do not fit.

    Whole numbers are quantised weights, whose scale is not known here.
    """
    if any(x.dtype.kind != "f" and x.dtype != ml_dtypes.bfloat16 for x in parts):
        return None
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            parts = [np.asarray(x, np.float32) for x in parts]
            value = entry.layout.read(*parts) if parts else np.zeros(shape, np.float32)
    except (ValueError, IndexError):
        return None
    return value if value.shape == shape else None


def refuse_infinite(params: dict) -> None:
    """A `UserError` if some of these parameters, nested or not, are not finite."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    wrong = [path_string(path) for path, x in leaves if not np.isfinite(x).all()]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(leaves)} parameters hold NaN or infinite values: {some(wrong)}. "
            "The training that wrote them diverged, or the file is damaged: take another one."
        )


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
