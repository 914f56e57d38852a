"""`.pt` files read without torch and without unpickling: a zip of one pickle and the numbers of every tensor."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.importing.pickle_reader import Name, read_pickle
from moescope.store.importing.pickled_arrays import PickledArray, number_builders, plain

# Numbers that a tensor may repeat (stride 0): a small file must not fill the memory.
_REPEATED = 1 << 22
_DAMAGE = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RuntimeError, EOFError, zlib.error,
    struct.error,
)  # fmt: skip
# bfloat16 has no type in NumPy: its bits are the upper half of a float32's.
_BFLOAT16 = "bfloat16"
_STORAGES: dict[str, str] = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": _BFLOAT16, "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "b1",
}  # fmt: skip


def read_torch_file(path: Path) -> Any:
    """The containers, numbers, text and tensors (as arrays) that `torch.save` wrote.

    Args:
        path: a file in the zip format of torch 1.6 and later.

    Raises:
        InputError: it holds anything else, is of the older format, or is damaged. Nothing in it was executed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except zipfile.BadZipFile as bad:
        raise InputError(
            f"{path} cannot be read",
            expected="a file of torch.save in its zip format (torch 1.6 and later)",
            found=str(bad),
            fix="save it again with a current torch: torch.save(torch.load(path, weights_only=True), path)",
        ) from bad
    except OSError as refused:
        raise InputError(f"{path} cannot be read", found=refused.strerror or str(refused)) from refused
    except MemoryError as refused:
        raise InputError(
            f"{path} does not fit into memory", found=str(refused) or None, fix="save it in parts, and import each"
        ) from refused
    except _DAMAGE as damage:
        raise InputError(f"{path} is damaged", found=f"{type(damage).__name__}: {damage}") from damage


def _read(path: Path, archive: zipfile.ZipFile) -> Any:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise InputError(
            f"{path} is not a file of torch.save", found=f"a zip with {len(archive.namelist())} other files"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and _entry(archive, f"{folder}byteorder") != b"little":
        raise InputError(f"{path} was written on a big-endian machine, which is not supported")
    storages: dict[str, NDArray[Any]] = {}

    def storage(persistent: Any) -> NDArray[Any]:
        word, kind, key, _, size = persistent
        if word != "storage" or not isinstance(kind, Name) or not str(key).isdigit():
            raise ValueError(f"an unknown persistent id {persistent!r}")
        if key not in storages:
            storages[key] = _numbers(_entry(archive, f"{folder}data/{key}"), _STORAGES[kind.name], int(size))
        return storages[key]

    builders = {
        **number_builders(),
        **{Name("torch", name): _never for name in _STORAGES},
        Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
        Name("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }
    return plain(read_pickle(_entry(archive, pickles[0]), called=str(path), builders=builders, persistent=storage))


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing; a small file must not become a large one
        raise ValueError(f"{name} is compressed, which torch.save never does")
    return archive.read(info)


def _numbers(raw: bytes, code: str, size: int) -> NDArray[Any]:
    if code != _BFLOAT16:
        return np.frombuffer(raw, f"<{code}", count=size)
    return (np.frombuffer(raw, "<u2", count=size).astype(np.uint32) << 16).view(np.float32)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> PickledArray:
    """A view of a storage, its reach checked against the numbers there are."""
    if not isinstance(storage, np.ndarray) or len(size) != len(stride):
        raise ValueError("a tensor without numbers")
    if min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of shape {size} and strides {stride}")
    made = PickledArray()
    if 0 in size:
        made.array = np.empty(size, storage.dtype)
        return made
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= len(storage):
        raise ValueError(f"a tensor reaches to number {last} of {len(storage)}")
    if math.prod(size) > max(len(storage), _REPEATED):
        raise ValueError(f"a tensor of shape {size} from {len(storage)} numbers")
    strides = tuple(step * storage.itemsize for step in stride)
    made.array = np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), strides, writeable=False)
    return made


def _never(*_: Any) -> None:
    raise ValueError("a type that is only named cannot be called")
