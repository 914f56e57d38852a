"""`.pt` files give what torch wrote, without torch and without unpickling."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.store.importing.torch_file import read_torch_file

torch = pytest.importorskip("torch")


def _saved(value: Any, path: Path) -> Any:
    torch.save(value, path)
    return read_torch_file(path)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_tensors_of_every_type_come_out_as_they_went_in(tmp_path: Path, dtype: str) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    found = _saved({"t": tensor, "rest": [1, 2.5, None, "text", (True, {"a": 3})]}, tmp_path / "a.pt")
    expected = tensor.float() if dtype == "bfloat16" else tensor
    np.testing.assert_array_equal(found["t"], expected.numpy())
    assert found["rest"] == [1, 2.5, None, "text", (True, {"a": 3})]


def test_views_strides_and_shared_storages_come_out_right(tmp_path: Path) -> None:
    whole = torch.arange(40, dtype=torch.int32).reshape(5, 8)
    views = {
        "t": whole.T,
        "row": whole[2],
        "part": whole[1:4, 2::3],
        "scalar": whole[3, 3],
        "none": whole[:0],
        "repeated": whole[0].expand(3, 8),
    }
    found = _saved(views, tmp_path / "a.pt")
    for name, view in views.items():
        np.testing.assert_array_equal(found[name], view.numpy())
    parameter = torch.nn.Parameter(torch.ones(3))
    np.testing.assert_array_equal(_saved([parameter], tmp_path / "p.pt")[0], np.ones(3, np.float32))


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_file_that_holds_more_than_data_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    with pytest.raises(InputError, match="nothing of this one was executed"):
        _saved({"logical_count": torch.zeros(1), "x": _Runs(mark)}, tmp_path / "a.pt")
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists()


def test_a_module_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Linear"):
        _saved(torch.nn.Linear(2, 2), tmp_path / "a.pt")


def _rewritten(source: Path, target: Path, **changes: bytes) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            short = name.partition("/")[2].replace("/", "_").replace(".", "_")
            new.writestr(name, changes.get(short, old.read(name)))
    return target


def test_files_that_are_damaged_or_bent_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.pt"
    torch.save({"t": torch.arange(10)}, good)
    raw = good.read_bytes()
    for number, content in enumerate((b"", raw[:200], raw[: len(raw) // 2], b"PK\x03\x04nonsense")):
        bad = tmp_path / f"bad{number}.pt"
        bad.write_bytes(content)
        with pytest.raises(InputError):
            read_torch_file(bad)
    with pytest.raises(InputError, match="damaged"):
        read_torch_file(_rewritten(good, tmp_path / "short.pt", data_0=b"\0" * 40))
    torch.save({"t": torch.arange(10)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="zip format"):
        read_torch_file(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/data.pkl", pickle.dumps([0] * 100_000))
    with pytest.raises(InputError, match="compressed"):
        read_torch_file(tmp_path / "packed.pt")


def _tensor_pickle(offset: int, size: tuple[int, ...], stride: tuple[int, ...], numel: int = 10) -> bytes:
    """A pickle as torch writes it, of a tensor with any offset, size and stride."""

    class _Storage:
        pass

    class _Writer(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.LongStorage, "0", "cpu", numel) if isinstance(value, _Storage) else None

    class _Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (_Storage(), offset, size, stride, False, {})

    file = io.BytesIO()
    _Writer(file, protocol=2).dump({"t": _Tensor()})
    return file.getvalue()


def _with_pickle(raw: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", raw)
        archive.writestr("a/data/0", np.arange(10, dtype="<i8").tobytes())
    return path


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (11,), (1,)),
        (5, (6,), (1,)),
        (0, (2, 3), (8, 2)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (10**9,), (0,)),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_numbers(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    good = read_torch_file(_with_pickle(_tensor_pickle(2, (2, 4), (4, 1)), tmp_path / "good.pt"))
    np.testing.assert_array_equal(good["t"], np.arange(2, 10).reshape(2, 4))
    with pytest.raises(InputError, match="damaged"):
        read_torch_file(_with_pickle(_tensor_pickle(offset, size, stride), tmp_path / "bad.pt"))
