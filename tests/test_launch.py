"""The launchers, run without their platforms: stubs on PATH record or do what they are asked."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import nibabel
import numpy as np
import processes
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"]
# What the scripts take from the environment if it is there.
SETTINGS = {
    name
    for script in LAUNCH.glob("*.sh")
    for name in re.findall(r"^(?:export )?([A-Z0-9_]+)=\$\{\1\b", script.read_text(), re.M)
}
SCHEMA = json.loads((ROOT / "tests" / "jobset_schema.json").read_text("utf-8"))
# What shells, JSON and YAML would each like to read differently.
FLAGS = ["--config", "configs/demo.py", "--config.crops.grid=(2, 1, 1)", '--workdir=it\'s "$HOME"']

RUN = {**processes.SETTINGS, "total_steps": 6, "batch_size": 2}

# A shell cannot trap what its parent ignores, and tests run in the background ignore SIGINT.
BASH = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp("bash", ["bash", *sys.argv[1:]])
"""


class Stubs:
    """A folder of executables that come before all others, and what they recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.started: list[subprocess.Popen] = []
        self.bin.mkdir()
        (folder / "home").mkdir()

    def add(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}")
        path.chmod(0o755)
        return path

    def write(self, name: str, lines: list) -> None:
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, **extra: object) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in SETTINGS and not name.startswith("SLURM_")
        }
        kept |= {"STUBS": str(self.folder), "HOME": str(self.folder / "home")}
        kept["PATH"] = f"{self.bin}:{os.environ['PATH']}"
        return kept | {name: str(value) for name, value in extra.items()}

    def start(self, script: str, *flags: str, **extra: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-IS", "-c", BASH, str(LAUNCH / script), *flags],
            cwd=ROOT,
            env=self.environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, script: str, *flags: str, **extra: object) -> tuple[int, str]:
        process = self.start(script, *flags, **extra)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


@pytest.fixture
def stubs(tmp_path):
    found = Stubs(tmp_path)
    yield found
    for process in found.started:  # and all that a failed test has left of it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# Takes the next line of a file of answers; the last one again and again.
NEXT = """
next() {
  head -n 1 "$STUBS/$1"
  if [ "$(wc -l <"$STUBS/$1")" -gt 1 ]; then sed -i 1d "$STUBS/$1"; fi
}
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("need shellcheck (requirements-dev.txt has it)")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.access(script, os.X_OK)


# ---- local.sh


def _local(stubs, *behaviours):
    """Stub processes: each records its flags, then does as its line says."""
    stubs.write("behaviours", behaviours)
    stubs.add(
        "python",
        """
id=${!#}; id=${id#--process_id=}
printf '%s\\n' "$@" >"$STUBS/flags$id"
echo "$JAX_COMPILATION_CACHE_DIR" >"$STUBS/cache$id"
eval "$(sed -n "$((id + 1))p" "$STUBS/behaviours")"
""",
    )
    return {"PROCESSES": len(behaviours), "GRACE_SECONDS": 60}


LATER = 'until [ -e "$STUBS/ended" ]; do sleep 0.05; done; sleep 0.6'
WAIT = 'touch "$STUBS/ready$id"; while :; do sleep 0.05; done'


def test_local_starts_one_run(stubs):
    settings = _local(stubs, *["exit 0"] * 3)
    assert stubs.run("local.sh", *FLAGS, **settings) == (0, "")
    coordinators = set()
    for process in range(3):
        main, *flags = stubs.lines(f"flags{process}")
        assert Path(main).resolve() == ROOT / "main.py"
        assert flags[: len(FLAGS)] == FLAGS
        coordinator, *rest = flags[len(FLAGS) :]
        coordinators.add(coordinator)
        assert rest == ["--processes=3", f"--process_id={process}"]
        assert stubs.lines(f"cache{process}") != [""]
    assert len(coordinators) == 1
    assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d+", coordinators.pop())


@pytest.mark.parametrize(
    ("behaviours", "status"),
    [
        (["exit 75", "exit 75"], 75),
        (["exit 0", "exit 75"], 75),
        (["exit 75", "exit 3"], 3),
        ([f"{LATER}; exit 1", 'touch "$STUBS/ended"; exit 2'], 2),
        ([f"{LATER}; exit 75", 'touch "$STUBS/ended"; exit 2'], 2),
        (["kill -KILL $$", "exit 0"], 137),
    ],
)
def test_local_ends_with_the_status_that_tells_most(stubs, behaviours, status):
    settings = _local(stubs, *behaviours)
    assert stubs.run("local.sh", *FLAGS, **settings)[0] == status


def test_local_kills_the_rest_some_time_after_one_has_failed(stubs):
    settings = _local(stubs, f"trap '' TERM; {WAIT}", "exit 1") | {"GRACE_SECONDS": 2}
    start = time.monotonic()
    status, output = stubs.run("local.sh", **settings)
    assert status == 1
    assert "killing the others" in output
    assert time.monotonic() - start > 0.5


def _until(condition, process=None):
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on_as_sigterm(stubs, number):
    settings = _local(stubs, *[f"trap 'exit 75' TERM; {WAIT}"] * 2)
    process = stubs.start("local.sh", **settings)
    _until(lambda: all((stubs.folder / f"ready{k}").exists() for k in range(2)), process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_second_ctrl_c_kills(stubs):
    asked = 'touch "$STUBS/asked$id"'
    settings = _local(stubs, *[f"trap '{asked}' TERM; {WAIT}"] * 2)
    process = stubs.start("local.sh", **settings)
    for name in ("ready", "asked"):
        _until(lambda name=name: all((stubs.folder / f"{name}{k}").exists() for k in range(2)))
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 137


# ---- slurm.sh

# As srun: skips its own options, starts the tasks, ends with the highest status.
SRUN = """
echo "$*" >>"$STUBS/srun"
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1
for ((id = 0; id < SLURM_NTASKS; id++)); do
  SLURM_PROCID=$id SLURM_LOCALID=$id "$@" &
  pids+=($!)
done
echo "${pids[*]}" >"$STUBS/tasks"
highest=0
for pid in "${pids[@]}"; do
  wait "$pid"; status=$?
  if [ "$status" -gt "$highest" ]; then highest=$status; fi
done
exit "$highest"
"""
SCONTROL = """
echo "$*" >>"$STUBS/scontrol"
if [ "$1" = show ]; then echo "   JobState=$(cat "$STUBS/state") Reason=None"; fi
"""


def _slurm(stubs, state="RUNNING", job=123):
    stubs.add("srun", SRUN)
    stubs.add("scontrol", SCONTROL)
    stubs.write("state", [state])
    return {"SLURM_JOB_ID": job, "SLURM_NTASKS": 2, "SLURM_CPUS_PER_TASK": 4, "RETRY_SECONDS": 0}


@pytest.mark.parametrize(
    ("runs", "state", "status", "calls", "requeued"),
    [
        ([0], "RUNNING", 0, 1, False),
        ([2], "RUNNING", 2, 1, False),
        ([3], "RUNNING", 3, 1, False),
        ([75], "RUNNING", 75, 1, True),
        ([75], "COMPLETING", 75, 1, False),  # scancel, or queued again by Slurm itself
        ([1, 134, 0], "RUNNING", 0, 3, False),
        ([1, 75], "RUNNING", 75, 2, True),
        ([1], "RUNNING", 1, 4, False),
        ([4, 4, 0], "RUNNING", 0, 3, False),  # the run before had not quite ended
    ],
)
def test_slurm_restarts_and_requeues(stubs, runs, state, status, calls, requeued):
    settings = _slurm(stubs, state)
    stubs.write("runs", runs)
    stubs.add("python", f'{NEXT}\nif [ "$SLURM_PROCID" = 0 ]; then exit "$(next runs)"; fi\n')
    assert stubs.run("slurm.sh", *FLAGS, **settings)[0] == status
    assert len(stubs.lines("srun")) == calls
    assert ("requeue 123" in stubs.lines("scontrol")) == requeued


def test_slurm_hands_everything_over(stubs):
    settings = _slurm(stubs)
    stubs.add(
        "python",
        """
printf '%s\\n' "$@" >"$STUBS/flags$SLURM_PROCID"
env >"$STUBS/environment$SLURM_PROCID"
""",
    )
    status, output = stubs.run("slurm.sh", *FLAGS, https_proxy="http://proxy:1", **settings)
    assert status == 0, output
    for process in range(2):
        assert stubs.lines(f"flags{process}") == ["main.py", *FLAGS]
        found = dict(e.split("=", 1) for e in stubs.lines(f"environment{process}") if "=" in e)
        assert "https_proxy" not in found
        assert found["SRUN_CPUS_PER_TASK"] == "4"
        assert found["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=true"
        assert found["JAX_COMPILATION_CACHE_DIR"]


def test_sbatch_reads_all_of_its_options():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    first = next(k for k, line in enumerate(lines) if line and not line.startswith("#"))
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines[:first]
        if line.startswith("#SBATCH")
    )
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch stops there
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
    assert re.fullmatch(r"TERM@\d+", options["signal"])
    assert {"requeue", "open-mode"} <= set(options)


def test_two_processes_train_stop_and_one_goes_on(stubs, monkeypatch):
    """Under the stub srun JAX finds its cluster itself.

    One process with two devices, the state split over them, does the rest. Every loss is that of a
    run that nothing happened to: of two processes, started by local.sh.
    """
    # Compiled without LLVM's optimisation a split state rounds differently.
    flags = os.environ["XLA_FLAGS"].replace("optimization_level=0", "optimization_level=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    script = str(ROOT / "tests" / "strided_main.py")  # compiles in seconds
    stubs.add("python", f'shift; exec {shlex.join([sys.executable, script])} "$@"')
    with socket.socket() as server:  # JAX's port under SLURM: 61440 + job id modulo 4096
        for job in range(1, 4096):
            try:
                server.bind(("", 61440 + job))
                break
            except OSError:
                continue
    settings = _slurm(stubs, job=job)
    compiling = (
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        "XLA_FLAGS",
    )
    settings |= {name: os.environ[name] for name in compiling if name in os.environ}
    settings |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": 1, "PYTHONPATH": ROOT}
    workdir, whole = stubs.folder / "run", stubs.folder / "whole"
    flags = [f"--config={script}", f"--workdir={workdir}"]
    flags += [f"--config.{name}={value}" for name, value in RUN.items()]

    process = stubs.start("slurm.sh", *flags, **settings)
    _until(lambda: max(processes.losses(workdir), default=0) >= 2, process)
    for task in stubs.lines("tasks")[0].split():  # as Slurm does with --signal=TERM@300
        os.kill(int(task), signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert f"requeue {job}" in stubs.lines("scontrol")
    assert "2 x cpu" in output
    reached = max(processes.losses(workdir))

    one = subprocess.run(
        [sys.executable, script, *flags, "--config.mesh.fsdp=2"],
        env=stubs.environment(**{**settings, "JAX_NUM_CPU_DEVICES": 2}),
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stdout + one.stderr
    assert f"resuming at step {reached}" in one.stdout

    process = stubs.start("local.sh", *flags, f"--workdir={whole}", PROCESSES=2, **settings)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "2 x cpu" in output
    found, expected = processes.losses(workdir), processes.losses(whole)
    assert sorted(found) == sorted(expected) == list(range(1, RUN["total_steps"] + 1))
    for step, loss in expected.items():
        assert abs(found[step] / loss - 1) < 1e-5


# ---- tpu_pod.sh

# As gcloud: answers with the next state; runs commands on two workers, which are two folders.
GCLOUD = f"""{NEXT}
what="$3 $4"
printf '%q ' "$@" >>"$STUBS/gcloud"; echo >>"$STUBS/gcloud"
case $what in
  "queued-resources describe")
    state=$(next states)
    if [ "$state" = NONE ]; then echo "ERROR: NOT_FOUND: not found" >&2; exit 1; fi
    if [ "$state" = ERROR ]; then echo "ERROR: UNAVAILABLE" >&2; exit 1; fi
    echo "$state" ;;
  "tpu-vm scp")
    for worker in 0 1; do cp "$5" "$STUBS/worker$worker/"; done ;;
  "tpu-vm ssh")
    for flag in "$@"; do
      case $flag in --command=*) command=${{flag#--command=}} ;; esac
    done
    result=0
    for worker in 0 1; do
      (cd "$STUBS/worker$worker" && HOME=$PWD WORKER=$worker bash -c "$command") || result=$?
    done
    exit "$result" ;;
esac
"""
PYTHON_OF_WORKER = f"""{NEXT}
printf '%s\\n' "$@" >"$STUBS/flags$WORKER"
echo "$JAX_COMPILATION_CACHE_DIR" >"$STUBS/cache$WORKER"
if [ "$WORKER" = 1 ]; then exit "$(next runs)"; fi
"""


def _tpu(stubs, states, runs):
    stubs.write("states", states)
    stubs.write("runs", runs)
    stubs.add("gcloud", GCLOUD)
    stubs.add("sudo", 'echo "$*" >>"$STUBS/sudo"')
    stubs.add("mountpoint", "exit 1")
    for worker in range(2):
        (stubs.folder / f"worker{worker}").mkdir()
        home = f"../worker{worker}"
        stubs.add(f"{home}/.local/bin/uv", 'echo "$WORKER $*" >>"$STUBS/uv"')
        stubs.add(f"{home}/voco_env/bin/python", PYTHON_OF_WORKER)
    return {"POLL_SECONDS": 0, "NFS_SHARE": "10.0.0.2:/voco", "NFS_MOUNT": "/mnt/voco"}


def _asked(stubs):
    """The calls of gcloud in words; describe, which is called all the time, left out."""
    calls = []
    for line in stubs.lines("gcloud"):
        words = shlex.split(line)
        assert words[:2] == ["compute", "tpus"]
        assert {"--quiet", "--zone=us-east5-a", "--project=my-project"} <= set(words)
        command = next((w for w in words if w.startswith("--command=")), "")
        name = re.search(r"tpu_worker\.sh (\w+)", command)
        if words[3] != "describe":
            calls.append(name[1] if name else words[3])
    return calls


INSTALL_AND_RUN = ["scp", "install", "run"]


def test_tpu_pod_creates_waits_installs_and_runs(stubs):
    waiting = ["WAITING_FOR_RESOURCES", "PROVISIONING"]
    settings = _tpu(stubs, ["NONE", "ERROR", "ACCEPTED", *waiting, "ACTIVE"], [0])
    status, output = stubs.run("tpu_pod.sh", *FLAGS, **settings)
    assert status == 0, output
    assert _asked(stubs) == ["create", *INSTALL_AND_RUN, "delete"]
    assert "WAITING_FOR_RESOURCES" in output
    create = next(line for line in stubs.lines("gcloud") if " create " in line)
    for flag in ("--node-id=voco", "--accelerator-type=v6e-16", "--spot"):
        assert flag in shlex.split(create)
    for worker in range(2):
        assert stubs.lines(f"flags{worker}") == ["main.py", *FLAGS]
        assert stubs.lines(f"cache{worker}") == ["/mnt/voco/xla_cache"]
        assert (stubs.folder / f"worker{worker}" / "voco_jax" / "voco_jax").is_dir()
    assert "mount -t nfs 10.0.0.2:/voco /mnt/voco" in stubs.lines("sudo")
    assert sum("jax[tpu]" in line for line in stubs.lines("uv")) == 2


def test_tpu_pod_asks_again_after_a_preemption(stubs):
    states = ["ACTIVE", "SUSPENDING", "SUSPENDED", "SUSPENDED", "NONE", "PROVISIONING", "ACTIVE"]
    settings = _tpu(stubs, states, [255, 0])
    status, output = stubs.run("tpu_pod.sh", *FLAGS, MAX_CRASHES=0, **settings)
    assert status == 0, output
    assert _asked(stubs) == [*INSTALL_AND_RUN, "delete", "create", *INSTALL_AND_RUN, "delete"]


@pytest.mark.parametrize(
    ("runs", "status", "times"),
    [([2], 2, 1), ([3], 3, 1), ([75, 75, 75, 75, 75, 0], 0, 6), ([1], 1, 4), ([4, 1, 0], 0, 3)],
)
def test_tpu_pod_restarts_what_is_worth_it(stubs, runs, status, times):
    settings = _tpu(stubs, ["ACTIVE"], runs)
    found, output = stubs.run("tpu_pod.sh", *FLAGS, **settings)
    assert found == status, output
    asked = _asked(stubs)
    assert asked.count("run") == times
    assert ("delete" in asked) == (status == 0)
    assert ("queued-resources delete voco" in output) == (status != 0)  # said: it costs money


def test_tpu_pod_gives_up_on_a_request_that_fails(stubs):
    states = ["FAILED", "reason", "NONE"] * 4
    status, output = stubs.run("tpu_pod.sh", *FLAGS, **_tpu(stubs, states, [0]))
    assert status == 1
    assert "reason" in output
    assert _asked(stubs) == ["delete", "create"] * 3


def test_a_tpu_worker_ends_what_a_lost_connection_left(stubs):
    """A process that holds the lock gets SIGTERM, and its end is waited for."""
    settings = _tpu(stubs, ["ACTIVE"], [0])
    if shutil.which("fuser") is None or shutil.which("flock") is None:
        pytest.skip("need fuser and flock")
    home = stubs.folder / "worker0"
    left = stubs.add(
        "left",
        """
trap 'sleep 0.5; touch "$STUBS/saved"; exit 75' TERM
touch "$STUBS/ready"; while :; do sleep 0.05; done
""",
    )
    old = subprocess.Popen(
        ["flock", home / "voco.lock", left], env=stubs.environment(), start_new_session=True
    )
    stubs.started.append(old)
    _until((stubs.folder / "ready").exists)
    stubs.add("../worker0/voco_env/bin/python", 'test -e "$STUBS/saved"')
    done = subprocess.run(
        ["bash", LAUNCH / "tpu_worker.sh", "run"],
        env=stubs.environment(**settings) | {"HOME": str(home)},
        timeout=60,
    )
    assert done.returncode == 0
    old.wait(timeout=60)


def test_a_tpu_worker_installs_uv_of_one_version(stubs):
    settings = _tpu(stubs, ["ACTIVE"], [0]) | {"NFS_SHARE": ""}
    home = stubs.folder / "worker0"
    uv = home / ".local/bin/uv"
    uv.rename(stubs.folder / "uv_of_pip")
    stubs.add("python3", f'echo "$*" >>"$STUBS/pip"; mv "$STUBS/uv_of_pip" {shlex.quote(str(uv))}')
    for _ in range(2):  # the second time it is there
        done = subprocess.run(
            ["bash", LAUNCH / "tpu_worker.sh", "install"],
            env=stubs.environment(**settings) | {"HOME": str(home), "WORKER": "0"},
            timeout=60,
        )
        assert done.returncode == 0
    (pip,) = stubs.lines("pip")
    assert re.fullmatch(r"-m pip install --quiet --user uv==\d+\.\d+\.\d+", pip)
    assert "0 pip install" in stubs.lines("uv")[-1]


# ---- k8s.sh


def _check(jobset):
    jsonschema.validate(jobset, SCHEMA)
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
        kubernetes_validate.validate(job | replicated["template"], "1.34", strict=True)


def _jobset(stubs, **settings):
    stubs.add("kubectl", 'echo "$*" >>"$STUBS/kubectl"; cat >"$STUBS/manifest"')
    status, output = stubs.run("k8s.sh", *FLAGS, **settings)
    assert status == 0, output
    assert stubs.lines("kubectl") == ["create -f -"]
    return yaml.safe_load((stubs.folder / "manifest").read_text())


def _container(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job, job["template"]["spec"]["containers"][0]


def _seen(argument):
    """What Kubernetes hands over for an argument; $(PROCESS_ID) is 1."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: {None: "$", "PROCESS_ID": "1"}[m[1]], argument)


def test_k8s_on_gpus(stubs):
    jobset = _jobset(stubs, K8S_NODES=3)
    _check(jobset)
    job, container = _container(jobset)
    assert job["completions"] == job["parallelism"] == 3
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert [_seen(argument) for argument in container["args"]] == [
        *FLAGS,
        "--coordinator=voco-workers-0-0.voco:55527",
        "--processes=3",
        "--process_id=1",
    ]
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert environment["JAX_COMPILATION_CACHE_DIR"]
    assert environment["JAX_PLATFORMS"] == "cuda,cpu"
    assert environment["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=true"


def test_k8s_on_gpus_has_no_rights_that_it_does_not_need(stubs):
    """What Kubernetes calls the restricted Pod Security Standard."""
    pod = _container(_jobset(stubs))[0]["template"]["spec"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["containers"][0]["securityContext"] == {
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize(
    "flag", ["--a=one\ntwo\n", "--a= $(B) $$C", '--a=\\n\t"{b: c}" #d', "--a=Ä"]
)
def test_k8s_hands_over_any_text(stubs, flag):
    stubs.add("kubectl", "exit 1")
    status, output = stubs.run("k8s.sh", flag, PRINT=1)
    assert status == 0
    assert _seen(_container(yaml.safe_load(output))[1]["args"][0]) == flag


def test_k8s_on_tpus(stubs):
    jobset = _jobset(stubs, K8S_ACCELERATOR="tpu")
    _check(jobset)
    job, container = _container(jobset)
    assert job["parallelism"] == 4
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert {"name": "JAX_PLATFORMS", "value": "tpu,cpu"} in container["env"]
    assert [_seen(argument) for argument in container["args"]] == FLAGS


def test_k8s_never_restarts_the_hopeless(stubs):
    """The status decides, by the index of the first rule that it matches."""
    jobset = _jobset(stubs)
    pod_rules = _container(jobset)[0]["podFailurePolicy"]["rules"]
    rules = jobset["spec"]["failurePolicy"]["rules"]

    def action(status):
        for index, rule in enumerate(pod_rules):
            if status in rule.get("onExitCodes", {}).get("values", ()):
                assert rule["action"] == "FailJob"
                message = (
                    f"Container main for pod default/voco-workers-0-1 failed with exit code "
                    f"{status} matching FailJob rule at index {index}"
                )
                for found in rules:
                    patterns = found.get("onJobFailureMessagePatterns", [""])
                    if any(re.search(pattern, message) for pattern in patterns):
                        return found["action"]
        return "RestartJobSet"  # JobSet's default, counted by maxRestarts

    assert {status: action(status) for status in (1, 2, 3, 75, 134)} == {
        1: "RestartJobSet",
        2: "FailJobSet",
        3: "FailJobSet",
        75: "RestartJobSetAndIgnoreMaxRestarts",
        134: "RestartJobSet",
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda jobset: jobset["spec"]["failurePolicy"].update(maxRestart=1),
        lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda jobset: _container(jobset)[0].update(parallelism="two"),
        lambda jobset: _container(jobset)[1].update(arg=[]),
    ],
)
def test_the_schemas_would_find_a_mistake(stubs, damage):
    jobset = _jobset(stubs)
    damage(jobset)
    with pytest.raises(jsonschema.ValidationError):
        _check(jobset)


def test_k8s_prints_without_kubectl(stubs):
    stubs.add("kubectl", "exit 1")
    status, output = stubs.run("k8s.sh", *FLAGS, PRINT=1)
    assert status == 0
    _check(yaml.safe_load(output))


@pytest.mark.parametrize(
    "settings", [{"K8S_ACCELERATOR": "tpu", "K8S_NODES": 1}, {"K8S_ACCELERATOR": "abacus"}]
)
def test_k8s_says_what_does_not_fit(stubs, settings):
    status, output = stubs.run("k8s.sh", **settings)
    assert status == 2
    assert len(output.splitlines()) == 1


def test_k8s_says_how_to_remove_the_one_before(stubs):
    stubs.add("kubectl", "cat >/dev/null; exit 1")
    status, output = stubs.run("k8s.sh", *FLAGS)
    assert status == 1
    assert "kubectl delete jobset voco" in output


# ---- Dockerfile


def test_nothing_is_run_as_it_comes_from_the_network():
    """Packages come by version, from where their digests are checked."""
    for path in (path for path in LAUNCH.iterdir() if path.is_file()):
        assert not re.search(r"\b(curl|wget)\b|:latest\b", path.read_text()), path


def test_the_image_has_all_that_main_needs(tmp_path):
    """Its COPY lines, done here; main.py and what it imports later run from the copy."""
    text = (LAUNCH / "Dockerfile").read_text()
    assert re.search(r"^FROM python:\d+\.\d+\.\d+-slim-\w+$", text, re.M)
    assert re.search(r"^USER 1000$", text, re.M)
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1])
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", text, re.M):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / target)
        else:
            shutil.copy(ROOT / source, tmp_path / target)
    assert (tmp_path / "requirements.lock").exists()
    code = "import configs.demo, voco_jax.voco.task"
    for command in ([*entry[1:], "--help"], ["-c", code]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert "xample" in done.stdout or command[0] == "-c"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_locked_versions_are_within_the_ranges(python):
    """Written by `uv pip compile --universal --python-version 3.11 requirements.txt`."""
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = {}
    for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines():
        if line and line[0] not in " #":
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(here):
                assert pins.setdefault(pin.name.lower(), pin) is pin, line
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        if text := line.partition("#")[0].strip():
            wanted = Requirement(text)
            (pinned,) = pins[wanted.name.lower().replace("_", "-")].specifier
            assert pinned.operator == "=="
            assert wanted.specifier.contains(pinned.version), line


# ---- prepare_slurm.py


def test_prepare_slurm_fills_a_cache_with_real_jobs(stubs, tmp_path):
    """Stub sbatch starts the job script here; scancel ends it, once another user has tried to.

    All in a folder whose name a shell would read otherwise, the repository too.
    """
    stubs.add(
        "sbatch",
        """
cp "$1" "$STUBS/job"
setsid bash "$STUBS/job" &>"$STUBS/log" </dev/null &
echo "Submitted batch job $!"
""",
    )
    stubs.add(
        "scancel",
        """
echo "$@" >>"$STUBS/cancelled"
"$PYTHON" "$OTHER_USER" "$STUBS/secret" "$PPID" "$1" &>"$STUBS/attack" # as root only
kill -- -"$1"
""",
    )
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o600)
    here = tmp_path / "it's $HOME"
    (here / "ct").mkdir(parents=True)
    for name in ("configs", "launch", "voco_jax"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
    generator = np.random.default_rng(0)
    for index in range(3):
        hu = generator.integers(-200, 200, (20, 18, 12)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([2, 2, 3, 1])), here / "ct" / f"{index}.nii")
    settings = {"JOBS": 1, "PROCESSES": 1, "MEMORY": "1GB", "INTERFACE": "lo", "PARTITION": "cpu"}
    settings |= {"PYTHON": sys.executable, "OTHER_USER": ROOT / "tests" / "other_user.py"}
    done = subprocess.run(
        [
            *(sys.executable, here / "launch" / "prepare_slurm.py", "--strict"),
            *("--scan", "ct", "--cache", tmp_path / "cache", "--size", "8", "8", "8"),
        ],
        cwd=here,
        env=stubs.environment(**settings),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "3 prepared now, 0 already there, 0 failed" in done.stdout
    assert "warning" not in done.stderr.lower()
    job = (tmp_path / "job").read_text()
    assert "#SBATCH -p cpu" in job
    assert "--nthreads 1" in job
    assert len(stubs.lines("cancelled")) == 1
    assert len((tmp_path / "cache/manifest.jsonl").read_text().splitlines()) == 3
    assert list((here / "slurm_logs").iterdir()) == []  # no certificate is left
    if os.getuid() != 0:
        pytest.skip("need root, to become another user")
    tried = stubs.lines("attack")
    assert len(tried) == 5, tried  # scheduler and worker, each with a web server, and a nanny
    assert all(line.startswith("tried: 127.0.0.1:") for line in tried), tried
