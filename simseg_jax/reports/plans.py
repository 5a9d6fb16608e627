"""The figures of `plan` as text: what a compiled program takes of every device, and advice."""

from collections.abc import Sequence
from typing import Any


def describe(row: dict[str, Any]) -> str:
    """The figures of one program in a few lines."""
    options = ", ".join(f"{key}={value}" for key, value in row["options"].items() if value)
    title = f"{row['program']}: {options}"
    if "error" in row:
        verdict = "does not fit" if row.get("fits") is False else "not possible"
        return f"{title}\n  {verdict}: {row['error']}"
    parts = {
        "memory": _memory(row),
        "products": f"{row['flops'] / 1e12:.3g} TFLOP of the model" if row["flops"] else "",
        "sent": _sent(row),
        "attention": f"{row['fused_attention_calls']} calls of cuDNN in the program"
        if row["fused_attention_calls"]
        else "",
        "compiled": f"in {row['seconds_to_compile']:.0f} s here",
        "at best": _speed(row),
    }
    return "\n".join([title, *(f"  {name:<11} {text}" for name, text in parts.items() if text)])


def recommendation(rows: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> str:
    """The options of the first plan that fits, as flags; defaults: those of the configuration."""
    fitting = [row for row in rows if row.get("fits")]
    if not fitting:
        if any("error" not in row and row["fits"] is None for row in rows):
            return "The memory of these devices is not known here: nothing can be recommended."
        return "Nothing fits: take more devices or a smaller batch."
    changed = {k: v for k, v in fitting[0]["options"].items() if v != defaults[k]}
    flags = " ".join(f"--config.{key}={value}" for key, value in changed.items())
    return f"Recommended: {flags or 'the configuration as it is'}"


def _memory(row: dict[str, Any]) -> str:
    needed = row["argument_bytes"] + row["temporary_bytes"] + row["result_bytes"]
    inputs = f"{_size(row['argument_bytes'])} inputs"
    if "state_bytes" in row:
        batch = row["argument_bytes"] - row["state_bytes"]
        inputs = f"{_size(row['state_bytes'])} state, {_size(batch)} batch"
    parts = [inputs, f"{_size(row['temporary_bytes'])} temporaries"]
    if row["result_bytes"] > 2**16:
        parts.append(f"{_size(row['result_bytes'])} results")
    text = f"{', '.join(parts)}: {_size(needed)} in all"
    if "memory_bytes" not in row:
        return text
    free, there = row["memory_bytes"] - needed, _size(row["memory_bytes"])
    if free < 0:
        return f"{text}, {_size(-free)} more than the {there} of the device: does not fit"
    text += f", of {there} on the device: fits with {_size(free)} to spare"
    if row["gpu"] and needed > 0.75 * row["memory_bytes"]:
        text += ", if XLA_PYTHON_CLIENT_MEM_FRACTION=.95 lets JAX take it"
    return text


def _sent(row: dict[str, Any]) -> str:
    if "communication" in row:
        return row["communication"]
    sent = row["sent_bytes"]
    if not sent:
        return ""
    text = f"{_megabytes(sum(sent.values()))} ({_list(sent)})"
    if len(row["sent_by_axis"]) > 1:
        text += f", over {_list(row['sent_by_axis'])}"
    if row["network_bytes"] and "network" not in row["sent_by_axis"]:
        text += f", {_megabytes(row['network_bytes'])} of it over the network"
    if row.get("least_sent_bytes"):
        text += f"; {_megabytes(row['least_sent_bytes'])} is the minimum"
    return text


def _speed(row: dict[str, Any]) -> str:
    seconds = row.get("step_seconds")
    if not seconds:
        return ""
    parts = ", ".join(f"{k} {v * 1e3:.3g}" for k, v in row["seconds"].items() if v is not None)
    speed = row["options"]["batch_size"] / seconds
    text = f"{seconds * 1e3:.3g} ms ({parts}), {speed:,.0f} {row['unit']}/s"
    if "hours" in row:
        text += f", {row['hours']:.3g} hours for {row['steps']:,} steps"
    return f"{text}; a bound, not a measurement"


def _list(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / 1e6:.4g}" for name, size in sorted(sizes.items()))


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.4g} MB"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"
