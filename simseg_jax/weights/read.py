"""Reading a model from the weights of any code base: an encoder, or a whole SimSeg model."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from simseg_jax.models.bert import Bert, BertConfig
from simseg_jax.models.layers import Keys
from simseg_jax.models.simseg import SimSeg, SimSegConfig, params_of
from simseg_jax.models.vit import ViT, ViTConfig
from simseg_jax.runtime.errors import UserError, one_line, reading, some
from simseg_jax.runtime.settings import plain, typed
from simseg_jax.weights.choice import choose, prefixes, take, usual_names
from simseg_jax.weights.containers import ARCHITECTURE, META, Tensors, Weights
from simseg_jax.weights.formats import AUTHORS, BERT, FORMATS, IMAGE, TEXT, TIMM
from simseg_jax.weights.table import Format, architecture, shape_of

Architecture = ViTConfig | BertConfig | SimSegConfig
SIDES = {"image": "image encoder (ViT)", "text": "text encoder (BERT)"}
PARTS = {"model": "SimSeg model", **SIDES}
CONVOLUTION = "patch_embed/proj/kernel"
# Patterns of unexpected names -> why the model is not supported.
FOREIGN = (
    (r"reg_token|register_token|storage_token", "register tokens"),
    (r"dist_token|distillation_token", "a distillation token"),
    (r"[qk]_norm", "normalised queries and keys"),
    (r"relative_position|rel_pos|rope", "relative positions"),
    (r"mlp\.(w12|w3|fc1_g|gate)", "gated MLPs"),
    (r"lambda1|ls_1", "a LayerScale of its own kind"),
)


class Found(NamedTuple):
    """The result of `read_model`.

    config: the architecture of the encoder or the whole model. fields: the part of it that the
    files determine; other fields have their defaults. note: a sentence on which tensors were taken
    and which ignored.
    """

    format: str
    config: Architecture
    fields: dict[str, Any]
    params: dict
    note: str


# ---- reading


def parts_in(weights: Weights) -> list[str]:
    """The parts that `read_model` can read: ["model"], else encoders ("image", "text")."""
    tensors = usual_names(weights.tensors)
    parts = dict.fromkeys(form.part for form in FORMATS if prefixes(tensors, form.signature))
    return ["model"] if "model" in parts else list(parts)


def read_model(
    weights: Weights, part: str, image_heads: int | None = None, text_heads: int | None = None
) -> Found:
    """Reads a part of the weights: the whole "model" or an "image" or "text" encoder.

    Some files, those of whole models among them, do not tell the number of attention heads. By
    default heads are as in published models, or else 64 channels wide. All unknown, missing and
    mis-shaped tensors are reported together.
    """
    heads = {"image": image_heads, "text": text_heads}
    with reading("the weights", "Take other weights of the same model."):
        tensors = usual_names(weights.tensors)
        places = [(f, prefix) for f in FORMATS for prefix in prefixes(tensors, f.signature)]
        forms = {prefix: form for form, prefix in places if form.part == part}
        if not forms:
            raise UserError(_lacking(part, tensors, [form.name for form, _ in places]))
        prefix = choose(forms, weights.key, PARTS[part])
        form = forms[prefix]
        # For a whole model the prefixes of its encoders do not count: they are parts of it.
        prefixed = forms if part == "model" else [prefix for _, prefix in places]
        inside, note = take(tensors, prefix, prefixed, form.unused)
        if part == "model":
            described = weights.meta.get(META, {}).get(ARCHITECTURE)
            told, guess = _whole_architecture(inside, described, heads)
            config = _possible(told)
            fields, note = plain(config), note + guess
        else:
            told = architecture(form, inside, weights.settings, heads[part])
            config = getattr(_possible({part: told}), part)
            fields = {key: value for key, value in plain(config).items() if key in told}
        return Found(form.name, config, fields, _assemble(inside, form, config), note)


def _lacking(part: str, tensors: Tensors, found: list[str]) -> str:
    """The message that the weights lack the part; found: the formats in them."""
    formats = some(dict.fromkeys(found)) or "no encoder known here"
    if part == "model":
        return (
            f"Not a SimSeg checkpoint (it has no tensor {AUTHORS.signature}) but {formats}: start "
            "a run from an encoder with --config.init.image or --config.init.text."
        )
    hint = ""
    if part == "text" and any("token_embedding" in name for name in tensors):
        hint = " CLIP's text encoder is causal and cannot take BERT's place."
    names = some(dict.fromkeys(re.split(r"[./]", name)[0] for name in tensors))
    return (
        f"The weights hold {formats}, not one {PARTS[part]}.{hint} Their tensors are under {names}."
    )


def _whole_architecture(
    tensors: Tensors, described: str | None, heads: Mapping[str, int | None]
) -> tuple[dict[str, Any], str]:
    """(fields of a whole model, a sentence if the heads are a guess).

    described: the output of `architecture_json` in the file, if any. It is ignored if the user
    gives heads; then, as without it, the other fields follow from the shapes.
    """
    if described and not any(heads.values()):
        with reading("the description of the architecture beside the weights"):
            fields = json.loads(described)
            sides = {side: fields.pop(side) for side in SIDES}
            return {**sides, **fields}, ""
    image, text = (
        {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        for prefix in (IMAGE, TEXT)
    )
    text_heads = heads["text"] or max(shape_of(text, BERT.signature, 2)[1] // 64, 1)
    fields: dict[str, Any] = {
        "image": architecture(TIMM, image, {}, heads["image"]),
        "text": architecture(BERT, text, {}, text_heads),
        "embed_dim": tensors[AUTHORS.signature].shape[0],
    }
    taken = " and ".join(f"{fields[side]['heads']} ({side})" for side in SIDES)
    guess = (
        f" The file does not tell the attention heads: {taken} were taken, which is one per 64 "
        "channels unless given."
    )
    return fields, "" if all(heads.values()) else guess


def _possible(fields: Mapping[str, Any]) -> SimSegConfig:
    """The architecture with these fields; a `UserError` if they are invalid."""
    try:
        config = typed(SimSegConfig, fields)
        # 0 is valid in a run's configuration, where it stands for the size of the vocabulary.
        if "text" in fields and not config.text.vocab_size:
            raise UserError("vocab_size=0 must be at least 1.")
        return config
    except UserError as error:
        raise UserError(f"The weights describe an impossible model: {one_line(error)}") from error


def fit(tensors: Tensors, config: SimSegConfig) -> dict:
    """The parameters of `config` from tensors with the authors' names."""
    return _assemble(tensors, AUTHORS, config)


def _assemble(tensors: Tensors, form: Format, config: Architecture) -> dict:
    """Nested float32 parameters of a model from the tensors of a file, all of which must be used.

    One `UserError` reports all missing, unexpected and mis-shaped tensors, another all parameters
    with non-finite values.
    """
    shapes = shapes_of(config)
    kinds = {_kind(name) for name in tensors}
    found, used, problems = {}, set(), []
    for path, shape in shapes.items():
        layer, _, leaf = path.rpartition("/")
        names = form.tensors(path)
        linear = f"{layer}/kernel" in shapes
        if leaf == "bias" and linear and form.free_bias and _kind(names[0]) not in kinds:
            found[path] = np.zeros(shape, np.float32)
            continue
        scale = [name for name in form.tensors(f"{layer} *") if _kind(name) in kinds]
        used.update(names + scale)
        missing = [name for name in names + scale if name not in tensors]
        problems += [f"missing {name}" for name in missing]
        if missing:
            continue
        given = {name: tensors[name] for name in names + scale}
        value = _parameter(path, list(given.values()), bool(scale), "/" in names[0], shape)
        if value is None:
            listed = " and ".join(f"{name} {x.dtype}{x.shape}" for name, x in given.items())
            problems.append(f"{listed} cannot become {path} of shape {shape}")
        else:
            found[path] = value
    rest = [name for name in tensors if name not in used]
    problems += [f"unexpected {name}" for name in rest]
    if problems:
        raise UserError(_misfit(problems, rest))
    refuse_infinite(found)
    return unflatten_dict(found, sep="/")


def _misfit(problems: list[str], unexpected: list[str]) -> str:
    """The message about all problems; unexpected tensors may reveal the reason for them."""
    reasons = [why for pattern, why in FOREIGN if any(re.search(pattern, n) for n in unexpected)]
    reason = f" It has {some(reasons)}, which have no place here." if reasons else ""
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    listed = some(problem[:70] for problem in problems)
    return f"The weights do not fit the model ({count}).{reason} {listed}"


def _kind(name: str) -> str:
    """The name without the number of its block. All blocks have the same kinds of tensors."""
    return re.sub(r"\d+", "#", name)


def _parameter(
    path: str, tensors: list[np.ndarray], scaled: bool, flax: bool, shape: tuple[int, ...]
) -> np.ndarray | None:
    """One parameter from its tensors; None if they do not fit. scaled: the last is a LayerScale."""
    # Whole numbers would be quantised weights, whose scale is unknown.
    if any(x.dtype.kind != "f" and x.dtype != ml_dtypes.bfloat16 for x in tensors):
        return None
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            parts = [np.asarray(x, np.float32) for x in tensors]
            factor = parts.pop() if scaled else None
            value = _our_layout(path, parts, flax)
            value = value if factor is None else value * factor
    except (ValueError, IndexError):
        return None
    return value if value.shape == shape else None


def _our_layout(path: str, parts: list[np.ndarray], flax: bool) -> np.ndarray:
    """The tensors of PyTorch or Flax in our layout, concatenated along the last axis."""
    leaf = path.rpartition("/")[2]
    if leaf in ("cls_token", "pos_embed"):  # Some have fewer axes, of size one.
        parts = [x.reshape((1,) * (3 - x.ndim) + x.shape) for x in parts]
    elif flax and leaf == "bias":  # [heads, channels] of query, key and value.
        parts = [x.reshape(-1) for x in parts]
    elif flax and leaf == "kernel" and len(parts) > 1:  # Theirs: [in, heads, channels].
        parts = [x.reshape(x.shape[0], -1) for x in parts]
    elif flax and leaf == "kernel":  # [heads, channels, out] of attention, [p, p, 3, width].
        parts = [x.reshape(-1, x.shape[-1]) for x in parts]
    elif path.endswith(CONVOLUTION):  # [width, 3, p, p] -> the product [p * p * 3, width].
        parts = [x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]) for x in parts]
    elif leaf == "kernel":  # [out, in].
        parts = [x.T for x in parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def refuse_infinite(params: dict) -> None:
    """Raises a `UserError` if some of the parameters (nested or by path) are not finite."""
    flat = _by_path(params)
    wrong = [path for path, x in flat.items() if not np.isfinite(x).all()]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(flat)} parameters hold NaN or infinite values: {some(wrong)}. "
            "Their training diverged, or the file is damaged: take another one."
        )


def shapes_of(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of an encoder or a whole model."""
    kind: Any = {ViTConfig: ViT, BertConfig: Bert, SimSegConfig: SimSeg}[type(config)]
    params = jax.eval_shape(lambda: params_of(kind(config, jnp.float32, Keys(jax.random.key(0)))))
    return {path: x.shape for path, x in _by_path(params).items()}


def _by_path(params: dict) -> dict[str, Any]:
    return flatten_dict(params, sep="/")


# ---- writing


def state_dict(params: dict) -> dict[str, np.ndarray]:
    """The parameters under the authors' names in PyTorch's layouts; the inverse of `fit`."""
    tensors = {}
    for path, value in _by_path(params).items():
        x = np.asarray(value)
        if path.endswith(CONVOLUTION):
            patch = round((len(x) / 3) ** 0.5)
            x = x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
        elif path.endswith("/kernel"):
            x = x.T
        (name,) = AUTHORS.tensors(path)
        tensors[name] = np.array(x, order="C")
    return tensors


def architecture_json(config: SimSegConfig) -> str:
    """The architecture as JSON, stored with the tensors so that `read_model` need not guess."""
    return json.dumps(plain(config))
