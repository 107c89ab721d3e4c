import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest

from training_framework.data.sources.array_pickle import unpickle_arrays


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
    with pytest.raises(pickle.UnpicklingError, match="an array of 'O8' is not allowed"):
        unpickle_arrays(pickle.dumps(hostile))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=">i4").reshape(2, 3, 4),
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.zeros((0, 3072), np.uint8),
        np.array(True),
        np.array([1.5, -2], dtype=np.float16),
    ],
    ids=str,
)
def test_arrays_come_back_as_numpy_reads_them(protocol: int, array: np.ndarray) -> None:
    dumped = pickle.dumps([array, {"same": array}], protocol=protocol)
    first, second = unpickle_arrays(dumped)
    expected = pickle.loads(dumped)[0]
    assert first.dtype == expected.dtype and first.shape == array.shape
    np.testing.assert_array_equal(first, array)
    assert second["same"] is first
    assert first.flags.writeable


def test_text_of_python_2_is_bytes_and_tuples_constants_and_references_are_read() -> None:
    assert unpickle_arrays(b"(dp0\nS'cafe'\np1\nI7\nsU\x02xyNs.")  == {
        b"cafe": 7, b"xy": None
    }  # fmt: skip
    content = [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), None, True, False, -1.5, 1 << 70, "ü"]
    for protocol in range(6):
        assert unpickle_arrays(pickle.dumps([content, content], protocol)) == [content, content]


def _pickle_of(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param(b"cnumpy\nndarray\n(M\x00\x10tR", "call of NDARRAY", id="an array made"),
        pytest.param(
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R",
            "call of RECONSTRUCT",
            id="a huge array made",
        ),
        pytest.param(b"r\xff\xff\xff\x7f", "damaged", id="a far place in the memo"),
        pytest.param(b"Nr\xff\xff\xff\x7f", "", id="a huge memo"),
        pytest.param(
            b"\x96" + (1 << 40).to_bytes(8, "little") + b"abc", "damaged", id="bytes not there"
        ),
        pytest.param(b"(" * 100_000, "damaged|more memory", id="marks without end"),
        pytest.param(b"}N" + b"\x85" * 100_000 + b"Ns", "a key of type tuple", id="a deep key"),
        pytest.param(
            b"c_codecs\nencode\nq\x00X\x00\x00\x01\x00" + b"a" * 65536
            + b"q\x01X\x06\x00\x00\x00latin1q\x02" + b"h\x00h\x01h\x02\x86R" * 1000,
            "more memory than its size justifies",
            id="one text encoded a thousand times",
        ),
        pytest.param(b"ios\nsystem\n(", "INST", id="an old instance"),
        pytest.param(b"\x82\x01", "EXT1", id="a registered extension"),
        pytest.param(b"Pname\n", "PERSID", id="a reference to elsewhere"),
        pytest.param(b"(cos\nsystem\no", "os.system", id="an instance"),
        pytest.param(b"\x8c\x02os\x8c\x06system\x93", "os.system", id="a name from the stack"),
        pytest.param(b"Nb", "damaged|not allowed", id="a state for nothing"),
        pytest.param(b"", "damaged", id="nothing at all"),
    ],
)  # fmt: skip
def test_hostile_opcodes_are_refused_without_taking_memory(body: bytes, says: str) -> None:
    tracemalloc.start()
    try:
        if body.startswith(b"Nr"):  # a place in the memo costs what is put there, wherever it is
            assert unpickle_arrays(_pickle_of(body)) is None
        else:
            with pytest.raises(pickle.UnpicklingError, match=says):
                unpickle_arrays(_pickle_of(body))
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
