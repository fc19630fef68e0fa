"""Prepares volumes with many jobs of a SLURM cluster. From the repository's root, on a login node:

    pip install "dask-jobqueue>=0.9"
    python launch/prepare_slurm.py --config configs/voco_10k.py

Arguments are those of `python -m voco_jax.data.prepare`. Data, cache, LOGS and this environment
have to be on file systems that all nodes see (or data and cache in gs:// or s3://). The jobs end
with this command; run it where it can stay (tmux). A job that ends early is replaced.

Other users of the cluster cannot use scheduler and workers: these obey only who has the
certificate of this run, which lies in LOGS as long as it lasts, for its owner alone to read.
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import dask  # noqa: E402
from dask.distributed import Security  # noqa: E402
from dask_jobqueue import SLURMCluster  # noqa: E402

from voco_jax.data.prepare import main  # noqa: E402
from voco_jax.data.workers import NO_PAGES  # noqa: E402

# ---- settings: edit here, or set the variables
JOBS = int(os.environ.get("JOBS", 16))
PROCESSES = int(os.environ.get("PROCESSES", 8))  # of each job; one volume each at a time
MEMORY = os.environ.get("MEMORY", "24GB")  # of each job; 3 GB a process are enough for most
TIME = os.environ.get("TIME", "04:00:00")
PARTITION = os.environ.get("PARTITION")  # None: the cluster's default
INTERFACE = os.environ.get("INTERFACE")  # network that login and compute nodes share, as ib0
LOGS = os.environ.get("LOGS", "slurm_logs")


def tls_settings(folder: str) -> dict[str, Any]:
    """Makes a certificate in a folder; returns Dask's settings with which all show and want it."""
    made = Security.temporary()
    pem = Path(folder).resolve() / "dask.pem"
    pem.write_text(made.tls_worker_key + made.tls_worker_cert)
    roles = ("client", "scheduler", "worker")
    files = ["ca-file", *(f"{role}.{part}" for role in roles for part in ("cert", "key"))]
    return {
        "distributed.comm.require-encryption": True,
        **{f"distributed.comm.tls.{name}": str(pem) for name in files},
    }


def export(name: str, value: object) -> str:
    """The line of a shell script that sets one of Dask's settings."""
    variable = "DASK_" + name.upper().replace(".", "__").replace("-", "_")
    return f"export {variable}={shlex.quote(str(value))}"


if __name__ == "__main__":
    os.makedirs(LOGS, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tls_", dir=LOGS) as folder:
        settings = tls_settings(folder) | NO_PAGES
        with (
            dask.config.set(settings),
            SLURMCluster(
                queue=PARTITION,
                cores=PROCESSES,
                processes=PROCESSES,
                memory=MEMORY,
                walltime=TIME,
                interface=INTERFACE,
                protocol="tls://",
                # Without pages; Dask opens these ports all the same.
                scheduler_options={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                worker_extra_args=[
                    *("--no-dashboard", "--dashboard-address", "127.0.0.1:0"),
                    *("--preload", "voco_jax.data.workers"),  # too much memory is an error
                ],
                python=shlex.quote(sys.executable),
                log_directory=LOGS,
                job_script_prologue=[
                    f"cd {shlex.quote(str(REPOSITORY))} || exit",
                    # dask_jobqueue's own flags for the certificate take no path with spaces.
                    *(export(name, value) for name, value in settings.items()),
                    "export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1",
                    # What glibc finds itself; Dask's value makes it ask the system for each array.
                    "export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=67108864",
                ],
            ) as cluster,
        ):
            cluster.adapt(minimum_jobs=JOBS, maximum_jobs=JOBS)  # replaces jobs that end early
            status = main(["--scheduler", cluster.scheduler_address, *sys.argv[1:]])
    sys.exit(status)
