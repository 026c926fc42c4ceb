"""The launch scripts, as far as they go without the hardware: what they would run, and what they refuse."""

import os
import pathlib
import shlex
import signal
import subprocess
import time

import pytest

TOOLS = pathlib.Path(__file__).resolve().parent.parent / "tools"
SLICE = ["--name=dit", "--zone=us-west4-a", "--type=v5litepod-256", "--version=v2-alpha-tpuv5-lite"]
TRAIN = ["--config=configs/digits.py", "--workdir=gs://bucket/run", "--config.sample.guidance={'name': 'cfg', 'scale': 2.0}"]


def bash(*arguments, **options):
    return subprocess.run(["bash", *map(str, arguments)], text=True, capture_output=True, timeout=60, **options)


@pytest.mark.parametrize("script", sorted(TOOLS.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_parse(script):
    checked = bash("-n", script)
    assert checked.returncode == 0, checked.stderr


def commands(*options):
    """The commands of a dry run, in words."""
    done = bash(TOOLS / "launch_tpu.sh", "--dry-run", *SLICE, *options, "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_a_tpu_slice_is_made_used_and_deleted():
    create, *middle, delete = commands("--spot", "--project=p", "--setup=ls /data")
    verbs = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create[:6] == [*verbs, "create", "dit"] and delete[:6] == [*verbs, "delete", "dit"] and "--force" in delete
    assert {"--spot", "--node-id=dit", "--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"} < {*create}
    assert all({"--zone=us-west4-a", "--project=p"} < {*c} for c in (create, delete, *middle) if c[0] == "gcloud")
    assert all("--worker=all" in c for c in middle if c[0] == "gcloud")
    train = middle[-1]
    assert "--command=ls /data" in middle[-2]
    # What the remote shell sees is what was given, quotes and all.
    (command,) = (word.removeprefix("--command=") for word in train if word.startswith("--command="))
    assert shlex.split(command)[-3:] == TRAIN and "--coordinator=auto --stopped=75" in command


def test_a_tpu_slice_may_be_kept_and_not_spot():
    lines = commands("--keep")
    assert not any("delete" in c for c in lines) and not any("--spot" in c for c in lines)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (SLICE[1:], "--name is missing"),
        ([*SLICE, "--color=red", "--", *TRAIN], "unknown option --color=red"),
        (SLICE, "no flags for experiments.train"),
        ([*SLICE, "--", "--config=c.py", "--workdir=/tmp/run"], "give --workdir=gs://"),
    ],
)
def test_what_a_tpu_launch_refuses(arguments, said):
    done = bash(TOOLS / "launch_tpu.sh", "--dry-run", *arguments)
    assert done.returncode == 2 and said in done.stderr and not done.stdout


def fake(folder, **programs):
    """Stand-ins on the PATH."""
    for name, body in programs.items():
        file = folder / name
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def test_a_lost_slice_is_asked_for_again(tmp_path):
    """The first attempt's training stops early (75), the second's is done."""
    log = tmp_path / "log"
    gcloud = f"""echo "$*" >> {log}
case "$*" in
  *describe*) echo ACTIVE ;;
  *experiments.train*) [ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; exit 75; }} ;;
esac"""
    done = bash(TOOLS / "launch_tpu.sh", *SLICE, "--attempts=2", "--", *TRAIN, env=fake(tmp_path, gcloud=gcloud))
    assert done.returncode == 0 and "attempt 1 of 2 ended" in done.stderr, done.stderr
    words = log.read_text().split()
    assert [w for w in words if w in ("create", "delete")] == ["create", "delete", "create", "delete"]


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (1, False)])
def test_slurm_puts_a_stopped_job_back_into_the_queue(code, requeued, tmp_path):
    """SIGTERM to the batch script reaches the step; the job is requeued when the step says that it was stopped."""
    log = tmp_path / "log"
    srun = f"""echo "srun $*" >> {log}
trap 'echo stopped >> {log}; exit {code}' TERM
for i in $(seq 300); do sleep 0.1; done"""
    env = fake(tmp_path, srun=srun, scontrol=f'echo "scontrol $*" >> {log}')
    child = subprocess.Popen(["bash", str(TOOLS / "launch_slurm.sh"), *TRAIN], env=env)
    deadline = time.time() + 20
    while not (log.exists() and "srun" in log.read_text()) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # srun's own trap
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == code
    lines = log.read_text().splitlines()
    assert "-m experiments.train --coordinator=auto --stopped=75 --config=configs/digits.py" in lines[0]
    assert lines[1:] == ["stopped", *["scontrol requeue 7"] * requeued]
    assert bash(TOOLS / "launch_slurm.sh").returncode == 2


def test_the_gke_job_covers_its_slice():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((TOOLS / "launch_gke.yaml").read_text())
    (slices,) = job["spec"]["replicatedJobs"]
    pods = slices["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    side, other = map(int, pods["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert pods["parallelism"] == pods["completions"] == side * other // container["resources"]["limits"]["google.com/tpu"]
    assert {"experiments.train", "--coordinator=auto", "--stopped=75"} < {*container["command"]}
    assert (TOOLS.parent / container["command"][5].removeprefix("--config=")).exists()
