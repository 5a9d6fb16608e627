"""The training run, top to bottom: mesh, data, model, state, restore, evaluators, loop."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simseg_jax.config import RunConfig, compute_dtype, model_config, of_checkpoint, run_config
from simseg_jax.data.pipeline import Examples, TrainBatches
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.evaluators.build import entries_of, headlines, make_evaluators
from simseg_jax.models.simseg import SimSegConfig, init_params, make_model
from simseg_jax.reports.visualize import write_contact_sheet
from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.processes import StopSignal, only_run
from simseg_jax.runtime.remote import is_remote
from simseg_jax.runtime.settings import plain, to_json
from simseg_jax.runtime.sharding import make_mesh, place, state_sharding, to_global_batch
from simseg_jax.training import resume
from simseg_jax.training.arrays import with_sharding
from simseg_jax.training.checkpoint import (
    CONFIG,
    TOKENIZER,
    Checkpoints,
    Record,
    checkpoints_folder,
    completed_steps,
    restore_state,
)
from simseg_jax.training.cost import describe_step, step_flops
from simseg_jax.training.optim import OptimConfig, adamw, cosine_schedule, frozen
from simseg_jax.training.report import Profile, Reporter
from simseg_jax.training.step import initial_state, jit_update, make_update
from simseg_jax.weights.init import Pretrained, adopt, keep_architecture
from simseg_jax.zeroshot.model import Model


def make_optimizer(optim: OptimConfig, steps: int, params):
    """(optimiser, learning-rate schedule) for a run of `steps` steps."""
    schedule = cosine_schedule(optim.lr, steps, round(optim.warmup * steps), optim.final_lr)
    return adamw(optim, schedule, params), schedule


def train(
    config: RunConfig | ConfigDict, workdir: str | Path, profile: int = 0
) -> dict[str, float] | None:
    """Trains, checkpoints and evaluates; returns the final numbers, None if a signal stopped it.

    Continues from the newest checkpoint in `workdir`, else from `config.checkpoint.resume`; the
    module `training.resume` defines which settings may have changed since. A second run in the same
    workdir or `config.checkpoint.directory` is refused. profile: the number of steps, after the
    first few, to trace into WORKDIR/profile.
    """
    config, workdir = run_config(config), Path(workdir).expanduser().absolute()
    folder = checkpoints_folder(workdir, config.checkpoint.directory)
    places = {workdir.resolve()}
    if config.checkpoint.directory and not is_remote(config.checkpoint.directory):
        places.add(Path(folder).resolve())
    with contextlib.ExitStack() as locks:
        for own_folder in sorted(places):
            locks.enter_context(only_run(own_folder))
        return _train(config, workdir, folder, profile)


def _train(
    config: RunConfig, workdir: Path, folder: epath.Path, profile: int
) -> dict[str, float] | None:
    # ---- mesh
    mesh = make_mesh(config.mesh.fsdp)
    check_batch(config, mesh.size)

    # ---- what to start from: the run's own checkpoint, another run's, pretrained weights, none
    tokenizer = load_tokenizer(config.data.vocab)
    restorable, own = _newest_checkpoint(folder, config.checkpoint.resume)
    pretrained = Pretrained({}, [])
    saved = None
    if restorable:
        before, saved = of_checkpoint(restorable)
        config = keep_architecture(config, before)
        # Settings added since the checkpoint was written have their defaults.
        saved = dataclasses.replace(saved, config=plain(before))
    else:
        config, pretrained = adopt(config, tokenizer)

    # ---- data
    encoder, examples = open_examples(config, tokenizer)
    data = TrainBatches(
        examples,
        batch_size=config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    identity = resume.identity(tokenizer, examples)
    changed = (
        resume.changes(saved, plain(config), identity, f"The checkpoint {restorable}", own)
        if saved
        else []
    )
    steps = config.steps
    if config.epochs > 0:
        steps = max(1, round(config.epochs * len(examples) / config.batch_size))

    # ---- model, optimiser, state
    setup = set_up(config, len(tokenizer), steps, mesh)

    # ---- evaluators: built before training, so that a missing file is found now
    model = Model(setup.architecture, setup.graphdef, encoder, mesh)
    evaluators = make_evaluators(model, entries_of(config.evals), config.data.cache)

    # ---- restore
    abstract = with_sharding(setup.state_shapes, setup.shardings)
    if restorable and saved:
        state = restore_state(restorable, abstract, saved)
        data.position = saved.position
    else:
        state = jax.jit(setup.init_state, out_shardings=setup.shardings)()
        for name, values in pretrained.params.items():
            state["params"][name] = place(values, abstract["params"][name])
    start = int(state["step"])
    if start > steps:
        raise UserError(
            f"The checkpoint {restorable} is at step {start}, beyond the {steps} configured: "
            "raise steps or epochs, or choose another --workdir."
        )
    # Only now: a run that cannot continue leaves the files of its workdir as they were.
    if jax.process_index() == 0:
        (workdir / CONFIG).write_text(to_json(config) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(workdir / TOKENIZER)

    # ---- loop
    flops = step_flops(setup.architecture, config.batch_size, config.data.max_length)
    results: dict[str, float] = {}
    with (
        jax.set_mesh(mesh),
        Checkpoints(folder, config.checkpoint.keep) as checkpoints,
        Reporter(
            workdir,
            start=start,
            steps=steps,
            batch_size=config.batch_size,
            log_every=config.log_every,
            flops=flops,
        ) as reporter,
        Profile(workdir / "profile", start, profile) as trace,
        StopSignal() as stop,
    ):
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
        reporter.say(
            f"{count:,} parameters, {len(examples):,} examples an epoch, {steps:,} steps of "
            f"{config.batch_size} pairs on {mesh.size} {jax.devices()[0].platform} device(s)"
            + (f", continuing from {restorable}" if restorable else "")
        )
        for line in (*pretrained.notes, *examples.describe()):
            reporter.say(line)
        if changed:
            reporter.say(f"Changed since the checkpoint: {', '.join(changed)}")
        if start < steps:
            began = time.monotonic()
            update = setup.update.lower(state, batch_shapes(config)).compile()
            reporter.say(f"Compiled in {time.monotonic() - began:.1f} s.")
            reporter.say(describe_step(update, flops, mesh.size))
            reporter.restart_clock()
        pending = None  # Metrics of the newest step, which the device may still be computing.
        for step in range(start, steps + 1):
            last, stopping = step == steps, stop.requested(step)
            fresh = step > start or not restorable
            save = fresh and (last or stopping or _hits(step, config.checkpoint.every))
            measure = last or (fresh and _hits(step, config.eval_every))
            if pending and (save or measure):
                # A state after a non-finite update must be neither saved nor evaluated.
                _report(reporter, checkpoints, step, pending, setup.schedule, data)
                pending = None
            if save:
                # Before the next batch, which changes the position in the data; before the
                # evaluation, so that a failure there loses no training.
                checkpoints.save(step, state, Record(plain(config), data.position, identity))
                reporter.restart_clock()
            if measure:
                results = evaluate(evaluators, state["params"], reporter, step)
            if last or stopping:
                break
            trace.before(step, pending, reporter)
            batch = to_global_batch(next(data), mesh)
            state, metrics = update(state, batch)
            if pending:
                _report(reporter, checkpoints, step, pending, setup.schedule, data)
            pending = metrics
        if last and fresh:
            checkpoints.read_back(abstract["params"])
        if not last:
            reporter.say(f"Saved step {step}.")
            return None
        shown = {k: v for k, v in evaluators.items() if k.startswith("seg/")}
        if config.pictures and shown:
            pictures = workdir / "pictures"
            for prefix, evaluator in shown.items():
                path = pictures / f"{prefix.removeprefix('seg/')}.png"
                images = range(min(config.pictures, evaluator.count))
                write_contact_sheet(path, evaluator, state["params"], images)
            reporter.say(f"Pictures: {pictures}")
    return results


def open_examples(config: RunConfig, tokenizer) -> tuple[TextEncoder, Examples]:
    """(encoder of captions, training examples) of a run."""
    encoder = TextEncoder(tokenizer, config.data.max_length, config.data.edit_rate)
    examples = Examples(
        config.data,
        image_size=config.model.image.image_size,
        batch_size=config.batch_size,
        encoder=encoder,
        seed=config.seed,
        groups=config.positives == "caption",
    )
    return encoder, examples


def check_batch(config: RunConfig, devices: int) -> None:
    """Raises a `UserError` unless the batch divides into devices, micro-batches and chunks."""
    if config.batch_size % devices:
        raise UserError(
            f"batch_size={config.batch_size} must be a multiple of the {devices} devices."
        )
    share = config.batch_size // devices
    for key in ("micro_batch", "loss_chunk"):
        size = getattr(config, key)
        if size and share % min(size, share):
            raise UserError(
                f"{key}={size} must divide the {share} pairs of every device (batch_size / "
                "devices)."
            )


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run compiles, without values of parameters or data; `plan` uses it, too."""

    architecture: SimSegConfig
    graphdef: nnx.GraphDef
    schedule: Callable
    init_state: Callable
    state_shapes: dict
    shardings: dict
    frozen: Any
    update: Any


def set_up(config: RunConfig, vocabulary: int, steps: int, mesh: Mesh) -> Setup:
    """The model, optimiser and jitted step of a run; vocabulary: the tokenizer's size."""
    architecture = model_config(config, vocabulary)
    gradient_dtype = jnp.dtype(jnp.float32) if config.gradient_dtype == "float32" else None
    dtype = compute_dtype(config, mesh)
    graphdef = make_model(architecture, dtype, config.remat, gradient_dtype)
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(lambda: init_params(architecture, key))
    optimizer, schedule = make_optimizer(config.optim, steps, shapes)

    def init_state():
        return initial_state(init_params(architecture, key), optimizer)

    state_shapes = jax.eval_shape(lambda params: initial_state(params, optimizer), shapes)
    shardings = state_sharding(state_shapes, mesh)
    still = frozen(config.optim.lr_rules, shapes)
    update = make_update(
        graphdef,
        optimizer,
        config.seed,
        autoaugment=config.data.autoaugment_on_device,
        micro_batch=config.micro_batch,
        loss_chunk=config.loss_chunk,
        frozen=still,
    )
    return Setup(
        architecture,
        graphdef,
        schedule,
        init_state,
        state_shapes,
        shardings,
        still,
        jit_update(update, shardings, mesh),
    )


def batch_shapes(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a global batch."""
    size, side = config.batch_size, config.model.image.image_size
    words = (size, config.data.max_length)
    shapes = {
        "image": jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8),
        "ids": jax.ShapeDtypeStruct(words, jnp.int32),
        "mask": jax.ShapeDtypeStruct(words, jnp.bool_),
    }
    if config.positives == "caption":
        shapes["groups"] = jax.ShapeDtypeStruct((size, 2), jnp.uint32)
    return shapes


def evaluate(evaluators: dict, params, reporter: Reporter, step: int) -> dict[str, float]:
    """Runs all evaluators; reports and returns their numbers {"seg/NAME/miou": fraction, ...}."""
    results = {}
    for prefix, evaluator in evaluators.items():
        values = evaluator.run(params, lambda images, p=prefix: reporter.progress(images, p))
        numbers = {f"{prefix}/{name}": value for name, value in values}
        reporter.say(f"step {step}: {', '.join(headlines(numbers))}")
        results |= numbers
    if results:
        reporter.write(step, results)
    reporter.restart_clock()
    return results


def _hits(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def _newest_checkpoint(folder: epath.Path, other: str) -> tuple[epath.Path | None, bool]:
    """(checkpoint to continue from, whether it is the run's own); other: `checkpoint.resume`."""
    steps = completed_steps(folder)
    own = bool(steps) or not other
    if not own:
        folder = checkpoints_folder(Path(other).expanduser().absolute())
        steps = completed_steps(folder)
        if not steps:
            raise UserError(f"checkpoint.resume={other!r} holds no finished checkpoint.")
    return (folder / str(steps[-1]) if steps else None), own


def _report(
    reporter: Reporter, checkpoints: Checkpoints, step: int, metrics, schedule, data: TrainBatches
) -> None:
    """Reports the update that led to `step`; stops the run if loss or gradient is not finite."""
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        checkpoints.wait()
        newest = checkpoints.latest
        raise UserError(
            f"At step {step} the loss is {loss} and the gradient norm {norm}. "
            + (
                f"The last good checkpoint is {newest}: run again to continue "
                if newest is not None
                else "There is no checkpoint yet: start again "
            )
            + "from there, with a lower optim.lr or with optim.clip_norm=1.0."
        )
    counts = {"waited": data.waited, "replaced": data.bad, "unknown": data.unknown}
    reporter.train(step, metrics, schedule, **counts)
