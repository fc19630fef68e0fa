"""Trains what a config file says: pre-trains a 3D medical image encoder with VoCo.

Every setting of the config file can be overridden as --config.section.field=value. The same
command again resumes from the last checkpoint. On TPU pods and SLURM the processes of a run find
each other; elsewhere start each with --coordinator, --processes and --process_id.

Exit status: 0 done, 2 bad input, 3 diverged, 4 another run has this workdir, 75 stopped by SIGTERM
or SIGHUP and saved: run the same command again, 130 interrupted (Ctrl-C) and saved likewise, other:
a crash.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from voco_jax.accelerators import cpu_where_nothing_else_is, silence_compiler
from voco_jax.config.load import command_parser, load, parse_arguments
from voco_jax.errors import InputError
from voco_jax.files import compilation_cache, expand, say
from voco_jax.large_pages import restart_with_large_pages
from voco_jax.training import signals

_PREEMPTED = 75  # EX_TEMPFAIL: launchers start the same command again
_INTERRUPTED = 130  # as of shells: 128 + SIGINT
_CRASHED = (
    "this process has crashed (above). Of a run of several processes the reason may be in another "
    "one's log: when one dies the others lose their connection. The same command resumes from the "
    "newest good checkpoint"
)
_EXAMPLES = """
--config configs/demo.py --workdir runs/demo
--config configs/voco_10k.py --workdir runs/voco_10k --config.batch_size=8
"""


def methods() -> dict[str, Any]:
    """What trains each `task` that a config can name: a `voco_jax.training.task.Method`."""
    # Imported here: worker processes import this module too, and need none of it.
    from voco_jax.finetune import classification, segmentation
    from voco_jax.voco import task as voco

    return {
        "voco": voco.METHOD,
        "segmentation": segmentation.METHOD,
        "classification": classification.METHOD,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags, then the run; the user's mistakes are one line and exit status 2."""
    parser = command_parser("main.py", __doc__, _EXAMPLES)
    add = parser.add_argument
    add("--config", required=True, metavar="PY", help="config file")
    add("--workdir", required=True, metavar="DIR", help="folder for everything that the run writes")
    add("--coordinator", metavar="HOST:PORT", help="of process 0")
    add("--processes", type=int, metavar="N", help="of this run")
    add("--process_id", type=int, metavar="I", help="of this process, from 0")
    faulthandler.enable()  # JAX's client ends a process with a signal: say where it was
    try:
        options, overrides = parse_arguments(parser, arguments)
        if not options.workdir:
            raise InputError("--workdir: found '', expected a folder; is a variable not set?")
        experiment = load(options.config, overrides, options.workdir)
    except InputError as error:
        sys.exit(_fail(error, 2))
    # Compiled programs are kept for the next run. JAX reads this when it is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compilation_cache())
    if cpu_where_nothing_else_is() and not options.coordinator:  # else others' ends are told there
        silence_compiler()
    signals.listen(_leave_early, lambda: _leave(_INTERRUPTED))
    from voco_jax.training import distributed
    from voco_jax.training.loop import DivergedError, PreemptedError, run

    try:
        distributed.start(options.coordinator, options.processes, options.process_id)
        run(experiment, options.workdir, methods()[experiment.task])
        _write_report(options.workdir)
    except InputError as error:
        _leave(_fail(error, error.status))
    except DivergedError as error:
        if not distributed.label():  # others have left by now, and JAX ends who stays
            _write_report(options.workdir)
        _leave(_fail(error, 3))
    except PreemptedError as error:
        signals.ignore()  # more of them must not change the status
        say(error)
        distributed.shutdown()
        status = _status(signals.received())
        # Python waits for its threads, and one may read what never comes.
        leave = threading.Timer(5, _leave, [status])
        leave.daemon = True
        leave.start()
        _write_report(options.workdir)
        sys.exit(status)
    except Exception:
        traceback.print_exc()
        _leave(_fail(_CRASHED, 1))


def _write_report(workdir: str) -> None:
    """Writes WORKDIR/report.html, on process 0; where it cannot be, that is a line of the log."""
    from voco_jax.training.distributed import is_process_0
    from voco_jax.training.metrics import Log

    if not is_process_0():
        return
    folder = expand(workdir)
    try:
        from voco_jax.report.page import REPORT, write_report  # here: no start waits for it

        write_report([folder], folder / REPORT)
        line = f"report: {folder / REPORT}"
    except Exception as error:
        line = f"{folder}: no report was written ({error!r}); the run is none the worse for it"
    with contextlib.suppress(InputError):  # of a full disk
        Log(folder, 0)(line)


def _leave_early(name: str) -> None:
    """While a run starts there is nothing to save."""
    say(f"{signals.describe(name)} before the first step: nothing was lost")
    _leave(_status(name))


def _status(name: str) -> int:
    """The exit status of a run that a signal has stopped; "": of another of its processes."""
    return _INTERRUPTED if name == signals.INTERRUPT else _PREEMPTED


def _leave(status: int) -> NoReturn:
    """Ends this process at once: one of several must not wait for the others, nor they for it."""
    with contextlib.suppress(OSError):  # of a closed terminal
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _fail(error: object, status: int) -> int:
    distributed = sys.modules.get("voco_jax.training.distributed")  # absent: flags are wrong
    print(f"error: {distributed.label() if distributed else ''}{error}", file=sys.stderr)
    return status


def command() -> None:
    """The command as a process of its own: main.py, voco-train, or this module."""
    restart_with_large_pages()
    main()


if __name__ == "__main__":
    command()
