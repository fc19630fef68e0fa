"""Prepares volumes with many jobs of a SLURM cluster. From the repository's root, on a login node:

    pip install "dask-jobqueue>=0.9"
    python launch/prepare_slurm.py --config configs/voco_10k.py

Arguments are those of `python -m voco_jax.data.prepare`. Data, cache and this environment have to
be on file systems that all nodes see (or data and cache in gs:// or s3://). The jobs end with this
command; run it where it can stay (tmux). A job that ends early is replaced.
"""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from dask_jobqueue import SLURMCluster  # noqa: E402

from voco_jax.data.prepare import main  # noqa: E402

# ---- settings: edit here, or set the variables
JOBS = int(os.environ.get("JOBS", 16))
PROCESSES = int(os.environ.get("PROCESSES", 8))  # of each job; one volume each at a time
MEMORY = os.environ.get("MEMORY", "24GB")  # of each job; 3 GB a process are enough for most
TIME = os.environ.get("TIME", "04:00:00")
PARTITION = os.environ.get("PARTITION")  # None: the cluster's default
INTERFACE = os.environ.get("INTERFACE")  # network that login and compute nodes share, as ib0
LOGS = os.environ.get("LOGS", "slurm_logs")

if __name__ == "__main__":
    with SLURMCluster(
        queue=PARTITION,
        cores=PROCESSES,
        processes=PROCESSES,
        memory=MEMORY,
        walltime=TIME,
        interface=INTERFACE,
        log_directory=LOGS,
        worker_extra_args=["--preload", "voco_jax.data.workers"],  # too much memory is an error
        job_script_prologue=[
            f"cd {REPOSITORY}",
            "export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1",
            # What glibc finds by itself; Dask's value makes it ask the system for every array.
            "export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=67108864",
        ],
    ) as cluster:
        cluster.adapt(minimum_jobs=JOBS, maximum_jobs=JOBS)  # replaces jobs that end early
        status = main(["--scheduler", cluster.scheduler_address, *sys.argv[1:]])
    sys.exit(status)
