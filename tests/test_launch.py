"""The files in launch/: scripts and manifests against their checkers (extra `launch`)."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from simseg_jax import segment_dataset
from simseg_jax.config import load_config

LAUNCH = Path(__file__).parents[1] / "launch"
# Fields of a JobSet, from its API reference (jobset.x-k8s.io/v1alpha2).
SPEC = {"replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend"}
SPEC |= {"coordinator", "managedBy", "ttlSecondsAfterFinished"}
# Fields of a RayJob, from its API reference (ray.io/v1).
RAY_JOB = {"entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes", "backoffLimit"}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


def check(program, *arguments):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing: pip install -e '.[launch]'")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["slurm.sh", "slurm_ray.sh", "tpu.sh", "../.ci/run"])
def test_shell(name):
    check("shellcheck", LAUNCH / name)


def stub(folder, name, script):
    """A command of a cluster that is not here; it logs its arguments."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$LOG"\n{script}\n')
    path.chmod(0o755)


def run_script(tmp_path, name, *arguments, **environment):
    """(exit status, logged calls) of a launch script beside the stubs."""
    log = tmp_path / "log"
    log.touch()
    search = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": search, "LOG": str(log), **environment}
    command = [*map(str, (LAUNCH / name, *arguments))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (137, 3, True), (1, 20, False)],
)
def test_slurm_goes_back_to_the_queue(tmp_path, status, restarts, requeued):
    stub(tmp_path / "bin", "srun", f"exit {status}")
    stub(tmp_path / "bin", "scontrol", "")
    (tmp_path / "bin" / "activate").touch()
    returned, calls = run_script(
        tmp_path,
        "slurm.sh",
        "--config=c.py",
        VENV=str(tmp_path),
        SLURM_JOB_ID="7",
        SLURM_RESTART_COUNT=str(restarts),
    )
    expected = "srun --kill-on-bad-exit=1 python -m simseg_jax.main --config=c.py --distributed"
    assert calls[0] == expected
    assert calls[1:] == (["scontrol requeue 7"] if requeued else [])
    assert returned == (0 if requeued else status)


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (1, 0, True), (2, 0, False), (130, 0, True)],
)
def test_slurm_with_ray_goes_back_to_the_queue(tmp_path, status, restarts, requeued):
    stub(tmp_path / "bin", "srun", f"exit {status}")
    stub(tmp_path / "bin", "scontrol", 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; fi')
    (tmp_path / "bin" / "activate").touch()
    settings = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    settings |= {"VENV": str(tmp_path), "SLURM_RESTART_COUNT": str(restarts)}
    returned, calls = run_script(tmp_path, "slurm_ray.sh", "in", "out", "--actors=2", **settings)
    assert calls[0] == "scontrol show hostnames n[1-2]"
    started, command = calls[1].split(" -- ")
    assert started == (
        "srun --kill-on-bad-exit=0 ray symmetric-run --address n1:6379 --min-nodes 2"
    )
    assert command == "python -m simseg_jax.segment_dataset in out --actors=2 --address=auto"
    assert calls[2:] == (["scontrol requeue 7"] if requeued else [])
    assert returned == (0 if requeued else status)


@pytest.mark.parametrize(
    ("statuses", "created", "returned"), [("75 0", 2, 0), ("2 0", 1, 2), ("1 1 1 1", 3, 1)]
)
def test_tpu_slices_are_asked_for_again(tmp_path, statuses, created, returned):
    """Against a gcloud whose slice is there at once and whose hosts end as `statuses` say."""
    gcloud = """
case "$*" in
  *describe*) if [ -e "$LOG.slice" ]; then echo ACTIVE; else exit 1; fi ;;
  *create*) touch "$LOG.slice" ;;
  *delete*) rm "$LOG.slice" ;;
  *"cat simseg_jax/status"*)
    read -r first rest < "$LOG.statuses"; echo "$rest" > "$LOG.statuses"; echo "$first" ;;
esac"""
    stub(tmp_path / "bin", "gcloud", gcloud)
    (tmp_path / "log.statuses").write_text(statuses + "\n")
    settings = {"TPU": "t", "ZONE": "z", "TYPE": "v5litepod-8", "VERSION": "v", "BUCKET": "gs://b"}
    settings |= {"SPOT": "1", "RESTARTS": "2", "REPOSITORY": "r", "COMMIT": "c"}
    code, calls = run_script(tmp_path, "tpu.sh", "--config=a b.py", **settings)
    assert code == returned
    assert sum("create t" in call for call in calls) == created
    assert all("--spot" in call for call in calls if "create t" in call)
    trained = next(call for call in calls if "simseg_jax.main" in call)
    assert "--config=a\\ b.py --workdir=run" in trained
    assert "--config.checkpoint.directory=gs://b/t/checkpoints --distributed" in trained
    assert not (tmp_path / "log.slice").exists()  # Nothing is left to be paid for.


def test_container_file():
    check("hadolint", LAUNCH / "Dockerfile")


def test_container_file_copies_what_exists():
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (LAUNCH.parent / source).exists(), source


@pytest.mark.parametrize("name", ["jobset_gpu.yaml", "jobset_tpu.yaml"])
def test_job_sets(name):
    reason = "kubernetes-validate is missing: pip install -e '.[launch]'"
    kubernetes = pytest.importorskip("kubernetes_validate", reason=reason)
    yaml = pytest.importorskip("yaml", reason=reason)
    manifest = yaml.safe_load((LAUNCH / name).read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    spec = manifest["spec"]
    assert set(spec) <= SPEC
    for rule in spec["failurePolicy"]["rules"]:
        assert rule["action"] in ACTIONS
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (group,) = spec["replicatedJobs"]
    assert set(group) <= {"name", "groupName", "template", "replicas", "dependsOn"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": group["name"]}}
    kubernetes.validate({**job, "spec": group["template"]["spec"]}, "1.33", strict=True)

    job = group["template"]["spec"]
    assert job["completions"] == job["parallelism"]
    (container,) = job["template"]["spec"]["containers"]
    claimed = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert claimed == {mount["name"] for mount in container["volumeMounts"]}
    environment = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
    if environment:
        assert environment["JAX_NUM_PROCESSES"] == str(job["completions"])
        # JobSet names the pods NAME-GROUP-JOB-INDEX and the network NAME.
        host = f"{manifest['metadata']['name']}-{group['name']}-0-0.{manifest['metadata']['name']}"
        assert environment["JAX_COORDINATOR_ADDRESS"].split(":")[0] == host


def test_ray_job(monkeypatch):
    reason = "kubernetes-validate is missing: pip install -e '.[launch]'"
    kubernetes = pytest.importorskip("kubernetes_validate", reason=reason)
    yaml = pytest.importorskip("yaml", reason=reason)
    manifest = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    assert set(spec) <= RAY_JOB
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    (workers,) = cluster["workerGroupSpecs"]
    group = {"rayStartParams", "template"}
    assert set(cluster["headGroupSpec"]) == group
    assert set(workers) == {*group, "groupName", "replicas", "minReplicas", "maxReplicas"}
    for template in (cluster["headGroupSpec"]["template"], workers["template"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
        kubernetes.validate(pod, "1.33", strict=True)
        (container,) = template["spec"]["containers"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in template["spec"]["volumes"]}
    command = shlex.split(spec["entrypoint"])
    assert command[:3] == ["python", "-m", "simseg_jax.segment_dataset"]
    monkeypatch.setattr("sys.argv", command[2:])
    args = segment_dataset.parse()
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert args.actors * args.gpus_per_actor == workers["replicas"] * gpus


@pytest.mark.parametrize("name", ["jobset_gpu.yaml", "jobset_tpu.yaml"])
def test_job_sets_pass_arguments_that_exist(name):
    """Read as text, so that this runs without any checker."""
    lines = (LAUNCH / name).read_text().splitlines()
    overrides = [line.strip().removeprefix("- ") for line in lines if "- --config." in line]
    assert len(overrides) >= 3
    load_config(LAUNCH.parent / "configs" / "vits16.py", overrides)
