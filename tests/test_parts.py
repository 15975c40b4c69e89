"""Work in parts: every row once, in its place, and what did not fit is not tried again."""

import jax
import numpy as np
import pytest

from wpjax.runtime.batching import map_batches


class Device:
    """Squares numbers, as many at a time as it holds at the n-th try."""

    def __init__(self, *holds: int):
        self.holds = holds
        self.tried: list[int] = []

    def __call__(self, rows):
        self.tried.append(len(rows))
        if len(rows) > self.holds[min(len(self.tried), len(self.holds)) - 1]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return {"square": rows[None] ** 2}


def squares(n, at_once, device, fits=None):
    return map_batches(n, at_once, device, axis=1, what="numbers", fits=fits)["square"][0]


def test_parts_are_of_one_size():
    device = Device(4)
    np.testing.assert_array_equal(squares(10, 4, device), np.arange(10) ** 2)
    assert device.tried == [4, 4, 4]


def test_finished_parts_are_kept_when_memory_runs_out():
    """The third part of 8 does not fit any more, nor 4 at a time."""
    device = Device(8, 8, 3)
    with pytest.warns(UserWarning, match="out of memory: numbers go on . at a time"):
        got = squares(29, 8, device)
    np.testing.assert_array_equal(got, np.arange(29) ** 2)
    assert device.tried == [8, 8, 8, 4, *[2] * 7]


def test_what_fitted_is_remembered_for_the_next_call():
    fits: dict[str, int] = {}
    with pytest.warns(UserWarning, match="out of memory"):
        squares(8, 8, Device(5), fits)
    assert fits == {"numbers": 4}
    device = Device(5)
    np.testing.assert_array_equal(squares(8, 8, device, fits), np.arange(8) ** 2)
    assert device.tried == [4, 4]
    nothing = pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED")
    with nothing, pytest.warns(UserWarning, match="out of memory"):
        squares(8, 8, Device(0), fits)
