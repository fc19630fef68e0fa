"""What processes agree on; that several train, stop and go on is in test_launch.py."""

import numpy as np
import pytest

from voco_jax.errors import InputError
from voco_jax.training import distributed


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
