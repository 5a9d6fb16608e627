"""The table of plans in docs/guides/scaling.md, whose rows it compiles and checks.

A program must fit, send the minimum (for TPUs at most 10 % more, for several slices anything) and
for H100s call cuDNN's attention. Rows that are in the folder already are not compiled again; one
takes one to ten minutes on two cores. TPUs need the extra tpu, GPUs the extra cuda.

python benchmarks/plans.py --folder=plans
python benchmarks/plans.py --folder=plans --match=h100
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from simseg_jax.runtime.errors import UserError, report_user_errors

ROOT = Path(__file__).parents[1]
FULL, CACHED = "remat=full", "remat=full micro_batch=256 loss_chunk=1024"
# Devices -> options for batches of 4096, 16,384 and 32,768, the least that fits.
VITS16 = {
    "h100:1": (FULL, CACHED, CACHED),
    "h100:8": ("", "", FULL),
    "h100:4x8": ("", "", ""),
    "v5e:4x8": ("", FULL, FULL),
    "v6e:4x8": ("", "", FULL),
    "v4:2x2x4": ("", FULL, FULL),
    "v5p:2x4x4": ("", "", ""),
    "v5e:16x16": ("", "", ""),
}
VITB16 = {
    "h100:1": (FULL, CACHED, CACHED),
    "h100:8": ("", FULL, FULL),
    "h100:4x8": ("", "", ""),
    "v5e:4x8": ("", FULL, CACHED),
    "v6e:4x8": ("", FULL, FULL),
    "v4:2x2x4": ("", FULL, FULL),
    "v5p:2x4x4": ("", "", ""),
    "v5e:16x16": ("", "", ""),
}
BATCHES = (4096, 16384, 32768)
# Not in the table: parameters split over all devices, and two slices.
CHECKS = (
    ("vits16", "h100:8", 4096, "mesh.fsdp=8"),
    ("vits16", "v5e:4x8", 4096, "mesh.fsdp=32"),
    ("vits16", "v5e:4x8 --slices=2", 8192, ""),
)


@report_user_errors
def main() -> None:
    """Compiles the rows that match and are not in the folder yet; prints tables of all there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for a JSON file per row")
    parser.add_argument("--match", default="", help="compile rows that contain this text only")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    wrong = []

    def plan_of(model: str, devices: str, batch: int, options: str) -> dict | None:
        name = f"{model} {devices} {batch} {options}"
        path = args.folder / f"{name.replace(' ', '_')}.json"
        if not path.exists():
            if args.match not in name:
                return None
            compile_row(model, devices, batch, options, path)
        plan = json.loads(path.read_text())["plans"][0]
        wrong.extend(f"{name}: {problem}" for problem in problems(devices, plan))
        return plan

    for model, table in (("vits16", VITS16), ("vitb16", VITB16)):
        print(f"\n| {model} on | {' | '.join(f'{batch:,}' for batch in BATCHES)} |")
        print("|---" * (1 + len(BATCHES)) + "|")
        for devices, several in table.items():
            rows = zip(BATCHES, several, strict=True)
            cells = [cell(o, plan_of(model, devices, batch, o)) for batch, o in rows]
            print(f"| {devices} | {' | '.join(cells)} |", flush=True)
    for model, devices, batch, options in CHECKS:
        plan = plan_of(model, devices, batch, options) or {}
        sent, least = sum(plan.get("sent_bytes", {}).values()), plan.get("least_sent_bytes", 0)
        print(f"{model} {devices} {batch} {options}: sent {sent:,}, minimum {least:,.0f}")
    raise SystemExit("\n".join(wrong) or None)


def compile_row(model: str, devices: str, batch: int, options: str, path: Path) -> None:
    """Writes the plan of one row as JSON."""
    keys = [f"--config.{option}" for option in options.split()]
    command = [sys.executable, "-m", "simseg_jax.plan", f"--config={model}"]
    command += [*f"--devices={devices}".split(), f"--config.batch_size={batch}", *keys]
    command.append(f"--output={path.absolute()}")
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"The plan of {model} on {devices} failed; its own message is above.")


def cell(options: str, plan: dict | None) -> str:
    """Options, memory and the bound on the time of a step."""
    if plan is None:
        return "not compiled"
    if "error" in plan:
        return f"{options}: {plan['error']}"
    needed = sum(plan[f"{part}_bytes"] for part in ("argument", "temporary", "result")) / 2**30
    short = {"": "", FULL: "full, ", CACHED: "cached, "}[options]
    return f"{short}{needed:.1f} GiB, {plan['step_seconds'] * 1e3:,.0f} ms"


def problems(devices: str, plan: dict) -> list[str]:
    """How the plan differs from what is expected."""
    if "error" in plan:
        return [plan["error"]]
    found = [] if plan["fits"] else ["does not fit"]
    tpu = "h100" not in devices
    sent, least = sum(plan.get("sent_bytes", {}).values()), plan["least_sent_bytes"]
    if "communication" in plan:
        found.append(plan["communication"])
    # XLA for some TPUs sums the gradient of the embeddings whole, of which a part would do, and
    # rings that it merges with products take one turn more than they need.
    elif "slices" not in devices and not 0.999 * least <= sent <= (1.1 if tpu else 1.001) * least:
        found.append(f"sends {sent:,}, the minimum is {least:,.0f}")
    # The blocks form loops: a call in the forward pass, one in the backward pass.
    if tpu == (plan["fused_attention_calls"] >= 2):
        found.append(f"calls cuDNN's attention {plan['fused_attention_calls']} times")
    return found


if __name__ == "__main__":
    main()
