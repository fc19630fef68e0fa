"""Several processes: what they agree on, how they end, and that layouts change no loss."""

import time

import numpy as np
import processes
import pytest

from voco_jax.errors import InputError
from voco_jax.training import distributed

SETTINGS = {"batch_size": 4, "total_steps": 6, "checkpoint.every_steps": 2}


def test_one_of_two_dies_and_four_devices_of_one_go_on(tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    (one,) = processes.start(whole, devices=4, settings=SETTINGS)
    processes.finish([one])
    expected = processes.losses(whole)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]

    two = processes.start(
        workdir, processes=2, devices=2, settings={**SETTINGS, "mesh.fsdp": 2, "total_steps": 6}
    )
    while max(processes.losses(workdir), default=0) < 4:
        assert all(process.poll() is None for process in two), processes.finish(two)
        time.sleep(0.05)
    two[1].kill()
    begin = time.monotonic()
    output = processes.finish(two, timeout=200)[0]
    assert time.monotonic() - begin < distributed.HEARTBEAT_TIMEOUT + 60
    assert two[0].returncode not in (0, 75)
    assert "rror" in output.rsplit("step 4/6", 1)[1]  # and not in silence
    before = processes.losses(workdir)

    (one,) = processes.start(workdir, devices=4, settings=SETTINGS)
    (output,) = processes.finish([one])
    assert one.returncode == 0, output
    assert 0 < int(output.split("resuming at step ")[1].split()[0]) <= max(before)
    for found in (before, processes.losses(workdir)):
        np.testing.assert_allclose(
            [found[step] for step in found], [expected[step] for step in found], rtol=1e-5
        )
    assert sorted(processes.losses(workdir)) == sorted(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", 2, None), "give all three"),
        ((None, None, 0), "give all three"),
        (("host:1", 2, 2), "--process_id: found 2, expected 0 to 1"),
    ],
)
def test_contradictory_flags(flags, message):
    with pytest.raises(InputError, match=message):
        distributed.start(*flags)


def test_one_process_agrees_with_itself():
    assert distributed.is_first()
    assert distributed.broadcast("Größe") == "Größe"
    assert distributed.on_first(lambda: "text") == "text"
    np.testing.assert_array_equal(distributed.gather(np.arange(3)), [[0, 1, 2]])
    with pytest.raises(InputError, match="mend it"):
        distributed.everywhere(lambda: (_ for _ in ()).throw(InputError("mend it")))
