import pickle
from typing import Any

import numpy as np
import pytest

from training_framework.data.array_pickle import unpickle_arrays


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_numbers_and_containers_come_back(protocol: int) -> None:
    content = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"n": np.int64(3), b"": [b"x"]}
    read = unpickle_arrays(pickle.dumps(content, protocol=protocol))
    np.testing.assert_array_equal(read.pop(b"data"), np.arange(6).reshape(2, 3))
    assert read == {b"n": 3, b"": [b"x"]}


@pytest.mark.parametrize("callable_", [eval, print, getattr, np.load, np.fromfile, pickle.loads])
def test_everything_else_is_refused(callable_: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        unpickle_arrays(pickle.dumps({b"data": callable_}))


def test_arrays_of_objects_cannot_bring_code_in() -> None:
    hostile = np.array([print], dtype=object)
    with pytest.raises(pickle.UnpicklingError, match="print is not allowed"):
        unpickle_arrays(pickle.dumps(hostile))
