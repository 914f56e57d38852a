"""Pickles are read without being unpickled: data comes out as it went in, and nothing in them ever runs."""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.errors import InputError
from moescope.store.importing.import_trace import import_trace
from moescope.store.importing.pickle_reader import read_pickle
from moescope.store.importing.pickled_arrays import number_builders, plain
from moescope.store.store import Store

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
_KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.integers())
_DATA = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(_KEYS, inner) | st.sets(st.integers()),
    max_leaves=20,
)


def _read(raw: bytes) -> Any:
    return plain(read_pickle(raw, called="a.pkl", builders=number_builders()))


@given(value=_DATA, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_containers_numbers_and_text_come_out_as_they_went_in(value: Any, protocol: int) -> None:
    assert _read(pickle.dumps(value, protocol=protocol)) == value


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with contextlib.suppress(InputError, ValueError):
        _read(raw)


@given(value=_DATA, place=st.floats(0, 1), byte=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(value: Any, place: float, byte: int) -> None:
    raw = bytearray(pickle.dumps([value, np.arange(3), collections.Counter("ab")]))
    raw[int(place * (len(raw) - 1))] = byte
    with contextlib.suppress(InputError, ValueError):
        _read(bytes(raw))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["int64", "int16", "uint8", "float32", "float16", "bool", ">i4"])
def test_arrays_and_their_scalars_come_out_as_they_went_in(protocol: int, dtype: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    scalar = array[1, 2]
    found = _read(
        pickle.dumps({"a": array, "f": np.asfortranarray(array), "s": scalar, "same": [array, array]}, protocol)
    )
    np.testing.assert_array_equal(found["a"], array)
    np.testing.assert_array_equal(found["f"], array)
    assert found["a"].dtype == array.dtype
    assert found["s"] == scalar
    assert found["same"][0] is found["same"][1]


def test_counters_and_default_dicts_become_dicts() -> None:
    nested: Any = collections.defaultdict(collections.Counter)
    nested[np.int64(3)][7] += 2
    found = _read(pickle.dumps([collections.Counter({np.int64(5): 4}), nested, collections.OrderedDict(a=1)]))
    assert found == [{5: 4}, {3: {7: 2}}, {"a": 1}]


class _Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _touch(path: Path) -> Any:
    return _Runs(Path.touch, path)


def _by_global(path: Path) -> bytes:
    """Protocol 0, as by hand: `os.system("touch path")`."""
    return f"cos\nsystem\n(S'touch {path}'\ntR.".encode()


def _by_inst(path: Path) -> bytes:
    return f"(S'touch {path}'\nios\nsystem\n.".encode()


def _by_object(path: Path) -> bytes:
    return f"(cos\nsystem\nS'touch {path}'\no.".encode()


def _by_eval(path: Path) -> bytes:
    return f"c__builtin__\neval\n(S'open({str(path)!r}, \"w\").close()'\ntR.".encode()


def _in_an_array(path: Path) -> bytes:
    return pickle.dumps(np.array([_touch(path), 2], dtype=object))


def _by_state(path: Path) -> bytes:
    """`collections.Counter` given a state that sets an attribute."""
    return b"ccollections\nCounter\n)R}S'x'\nI1\nsb."


def _by_dtype(path: Path) -> bytes:
    return b"cnumpy\ndtype\n(S'O'\ntR."


def _by_file(path: Path) -> bytes:
    return f"cnumpy\nfromfile\n(S'{path}'\ntR.".encode()


def _by_extension(path: Path) -> bytes:
    return b"\x80\x02\x82\x01."


def _by_persistent_id(path: Path) -> bytes:
    return b"Pabc\n."


ATTACKS = {
    "reduce": lambda path: pickle.dumps([1, _touch(path)]),
    "reduce in a dict": lambda path: pickle.dumps({"exp_ids": _touch(path)}, protocol=2),
    "global": _by_global,
    "inst": _by_inst,
    "obj": _by_object,
    "eval": _by_eval,
    "object array": _in_an_array,
    "state": _by_state,
    "object dtype": _by_dtype,
    "numpy.fromfile": _by_file,
    "extension": _by_extension,
    "persistent id": _by_persistent_id,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pickle_that_holds_more_than_data_is_refused_and_runs_nothing(
    attack: str, store: Store, tmp_path: Path
) -> None:
    mark = tmp_path / "it-ran"
    raw = ATTACKS[attack](mark)
    path = tmp_path / "trace.pkl"
    path.write_bytes(raw)
    with pytest.raises(InputError) as refused:
        import_trace(store, path, name="trace")
    assert not mark.exists()
    assert store.runs() == []
    if attack in ("reduce", "global", "inst", "obj", "eval", "numpy.fromfile"):
        assert "nothing of this one was executed" in str(refused.value)


def test_the_attacks_do_run_where_they_are_unpickled(tmp_path: Path) -> None:
    """Otherwise the test above would hold whatever the reader does."""
    for attack in ("reduce", "global", "inst", "obj", "eval", "object array"):
        mark = tmp_path / attack.replace(" ", "-")
        pickle.loads(ATTACKS[attack](mark))
        assert mark.exists(), attack


def test_what_was_named_is_told(store: Store, tmp_path: Path) -> None:
    (tmp_path / "trace.pkl").write_bytes(_by_global(tmp_path / "x"))
    with pytest.raises(InputError, match=r"Found: os\.system"):
        import_trace(store, tmp_path / "trace.pkl", name="trace")


def test_a_container_that_holds_itself_is_refused() -> None:
    inner: list[Any] = []
    inner.append(inner)
    with pytest.raises(ValueError, match="holds itself"):
        _read(pickle.dumps(inner))


def test_a_small_pickle_cannot_fill_the_memory() -> None:
    shared: Any = [0] * 10
    for _ in range(60):
        shared = [shared] * 10  # 10^60 numbers if it were written out
    found = _read(pickle.dumps(shared))
    assert found[0] is found[9]


def test_every_opcode_is_known() -> None:
    """A later Python's opcodes must be refused, not skipped."""
    data = io.BytesIO()
    pickle.Pickler(data, protocol=5).dump(bytearray(b"x"))
    names = {opcode.name for opcode in pickletools.opcodes}
    assert len(names) == 68
    assert _read(data.getvalue()) == b"x"
