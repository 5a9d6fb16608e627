"""Metrics of a run: progress bar, metrics.jsonl and TensorBoard. Only process 0 writes."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from simseg_jax.runtime.errors import writing
from simseg_jax.runtime.files import appearing
from simseg_jax.runtime.hardware import chip_of


class Reporter:
    """Writes WORKDIR/metrics.jsonl (one object per line) and WORKDIR/tensorboard.

    A context manager. A resumed run drops the lines beyond the restored step, so that the file is
    as if the run had never been interrupted. flops: of a step on all devices, for the FLOP/s and,
    if the peak of the devices is known, their utilisation (MFU).
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start: int,
        steps: int,
        batch_size: int,
        log_every: int,
        flops: int,
    ):
        self.enabled = jax.process_index() == 0
        self.steps, self.batch_size, self.log_every = steps, batch_size, log_every
        self.flops = flops / jax.device_count()
        chip = chip_of(jax.devices()[0])
        self.peak = chip and chip.flops
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not self.enabled,
            smoothing=0.1,
            # A log file should not get a line for every step.
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        self.waited = 0.0
        self.restart_clock()
        if not self.enabled:
            return
        # Imported late: reading a configuration or segmenting images never needs it.
        from tensorboardX.event_file_writer import EventsWriter

        self.path = workdir / "metrics.jsonl"
        with self._writing():
            _keep_until(self.path, start)
            self.file = self.path.open("a", encoding="utf-8")
            (workdir / "tensorboard").mkdir(exist_ok=True)
            # Written at once. `SummaryWriter` writes in a thread, where a full disk goes unnoticed.
            self.tensorboard = EventsWriter(str(workdir / "tensorboard" / "events"))
            self._event(start, session_log={"status": "START"})

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_exception) -> None:
        self.bar.close()
        if self.enabled:
            for file in (self.file, self.tensorboard):
                with contextlib.suppress(OSError):  # `write` has raised it already.
                    file.close()

    def train(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        schedule: optax.Schedule,
        *,
        waited: float,
        replaced: int,
        unknown: int,
    ) -> None:
        """Moves the bar; every `log_every` steps, logs metrics of the update that led to `step`.

        waited: seconds that this process has waited for data since it started. replaced: damaged
        examples that it has replaced. unknown: captions in which the vocabulary knows no word.
        """
        self.waited = waited
        self.bar.update(step - self.bar.n)
        if not self.enabled or (step % self.log_every and step < self.steps):
            return
        values = {name: float(value) for name, value in metrics.items()}
        # Only for logged steps, because an accelerator finishes the step in progress first.
        values["lr"] = float(jnp.asarray(schedule(step - 1)))
        # Averages since the clock was restarted: a step is reported after the next one has been
        # dispatched, so the time between two reports is not that of a step.
        seconds = max(time.monotonic() - self.clock_time, 1e-9)
        steps = max(step - self.clock_step, 1)
        speed = steps * self.batch_size / seconds
        waited -= self.clock_waited
        values |= {"pairs_per_second": speed, "data_wait_seconds": waited / steps}
        values |= {"data_replaced": replaced, "data_unknown": unknown}
        flops = self.flops * steps / seconds
        values["tflops_per_device"] = flops / 1e12
        used = ""
        if self.peak:
            values["mfu"] = flops / self.peak
            used = f", MFU {values['mfu']:.1%}"
        self.write(step, values)
        self.bar.set_postfix_str(
            f"loss {values['loss']:.3f} (chance {math.log(self.batch_size):.2f}), "
            f"temperature {values['temperature']:.4f}, {speed:,.0f} pairs/s{used}, "
            f"waiting for data {min(1, waited / seconds):.0%}",
            refresh=False,
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and writes the same numbers for TensorBoard."""
        if not self.enabled:
            return
        values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        with self._writing():
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
            self._event(step, summary={"value": values})

    def _event(self, step: int, **content) -> None:
        from tensorboardX.proto import event_pb2

        event = event_pb2.Event(wall_time=time.time(), step=step, **content)  # type: ignore[reportAttributeAccessIssue]
        self.tensorboard.write_event(event)
        self.tensorboard.flush()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        advice = "Checkpoints are kept: make room or repair the folder, then run again."
        return writing(f"the metrics in {self.path.parent}", lambda: advice)

    def restart_clock(self) -> None:
        """Excludes what was done until now from the speed and the waiting times to be reported."""
        self.clock_step, self.clock_time = int(self.bar.n), time.monotonic()
        self.clock_waited = self.waited

    def progress(self, images: Iterable, name: str) -> Iterable:
        """Wraps `images` in a second bar, which vanishes at their end."""
        return tqdm(images, desc=name, unit="image", leave=False, disable=not self.enabled or None)

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if self.enabled:
            tqdm.write(message)


class Profile:
    """Traces `steps` training steps of process 0 into `folder`; 0: none. A context manager.

    The first steps after `start` are not traced, because the data pipeline is still filling.
    """

    WARM_UP = 3

    def __init__(self, folder: Path, start: int, steps: int):
        self.folder = folder
        self.first = start + self.WARM_UP if steps and jax.process_index() == 0 else -1
        self.last = self.first + steps
        self.running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_exception) -> None:
        if self.running:  # The run was shorter.
            jax.profiler.stop_trace()

    def before(self, step: int, pending, reporter: Reporter) -> None:
        """Starts or ends the trace if it is time; call this before every step.

        pending: results of the previous step, which the trace must include.
        """
        if step == self.first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Tracing Python would slow down what is measured.
            jax.profiler.start_trace(
                str(self.folder), create_perfetto_trace=True, profiler_options=options
            )
            self.running = True
        elif self.running and step == self.last:
            jax.block_until_ready(pending)
            jax.profiler.stop_trace()
            self.running = False
            reporter.say(f"Trace of steps {self.first + 1} to {step}: {self.folder}")
            reporter.restart_clock()


def _keep_until(path: Path, step: int) -> None:
    """Drops lines of a metrics file that are beyond `step`, damaged or out of order."""
    if not path.is_file():
        return
    kept, newest = [], -1
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            at = json.loads(line)["step"]
            if newest <= at <= step and line.endswith(b"\n"):
                kept.append(line)
                newest = at
        # A killed process may have left half a line.
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    with appearing(path) as partial:
        partial.write_bytes(b"".join(kept))
