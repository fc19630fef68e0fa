"""Pre-trains a 3D medical image encoder with VoCo.

Examples:
  python main.py --config configs/demo.py --workdir runs/demo
  python main.py --config configs/voco_10k.py --workdir runs/voco_10k --config.batch_size=8

Every setting of the config file can be overridden as --config.section.field=value. The same
command again resumes from the last checkpoint. On TPU pods and SLURM the processes of a run find
each other; elsewhere start each with --coordinator, --processes and --process_id.

Exit status: 0 done, 2 bad input, 3 diverged, 75 preempted and saved: run the same command again,
130 interrupted, other: a crash.
"""

import os
import signal
import sys
import threading
import traceback
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from voco_jax.config import check_field
from voco_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes of this run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_COMPILED = "~/.cache/voco_jax/xla"  # as in launch/
_PREEMPTED = 75  # EX_TEMPFAIL: launchers start the same command again
_CRASHED = (
    "this process has crashed (above). Of a run of several processes the reason may be in another "
    "one's log: when one dies the others lose their connection. The same command resumes from the "
    "newest good checkpoint"
)


def main(arguments: list[str]) -> None:
    """Flags, then the run; the user's mistakes are one line and exit status 2."""
    # Compiled programs are kept for the next run. JAX reads this when it is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser(_COMPILED))
    _leave_on_sigterm()
    # Imported here: worker processes import this file too, and need none of it.
    from voco_jax.training import distributed
    from voco_jax.training.pretrain import DivergedError, PreemptedError, run

    try:
        if len(arguments) > 1:
            raise InputError(f"arguments: found {arguments[1:]}, expected only flags (see --help)")
        if _CONFIG.value is None or _WORKDIR.value is None:
            raise InputError("--config and --workdir: give both, see --help for an example")
        try:
            config = _CONFIG.value.to_dict()
        except OSError as error:  # config_flags tells only now that the file did not load
            raise InputError(f"--config: {' '.join(str(error).split())}") from error
        distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
        run(config, _WORKDIR.value)
    except InputError as error:
        _leave(_fail(error, 2))
    except DivergedError as error:
        _leave(_fail(error, 3))
    except PreemptedError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # more of them must not change the status
        print(error, flush=True)
        sys.exit(_PREEMPTED)
    except KeyboardInterrupt:
        _leave(130)
    except Exception:
        traceback.print_exc()
        _leave(_fail(_CRASHED, 1))


def _leave_on_sigterm() -> None:
    """While a run starts there is nothing to save; then JAX takes the signal.

    A thread reads it: Python's own handlers wait for what the main thread does, as compiling. And
    process 1 of a container, which a launcher's may be, does not end of a signal by itself.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def read() -> None:
        while os.read(reading, 1)[0] != signal.SIGTERM:
            pass
        print("preempted (SIGTERM) before the first step: nothing was lost", flush=True)
        _leave(_PREEMPTED)

    threading.Thread(target=read, daemon=True).start()


def _leave(status: int) -> NoReturn:
    """Ends this process at once: one of several must not wait for the others, nor they for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parse_flags(arguments: list[str]) -> list[str]:
    """Absl's parser; a wrong flag or config field is one line."""
    try:
        for argument in arguments[1:]:
            if argument.startswith("--config."):
                check_field(argument.removeprefix("--config.").split("=")[0])
        return flags.FLAGS(arguments)
    except InputError as error:
        sys.exit(_fail(error, 2))
    except (flags.Error, LookupError, OSError, TypeError, ValueError) as error:
        message = str(error)
        if "Error whilst parsing config file" in message:  # and its whole traceback
            message = message.strip().splitlines()[-1].removeprefix("voco_jax.errors.InputError: ")
        sys.exit(_fail(f"flags: {message} (see --help)", 2))


def _fail(error: object, status: int) -> int:
    distributed = sys.modules.get("voco_jax.training.distributed")  # absent: flags are wrong
    print(f"error: {distributed.label() if distributed else ''}{error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
