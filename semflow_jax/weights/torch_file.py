"""Reads what `torch.save` wrote, without PyTorch and without running what is in it.

Such a file is an uncompressed zip archive: `NAME/data.pkl`, a pickle of the structure, and `NAME/data/0`, `1`, ..., the
bytes of each storage. Before PyTorch 1.6 it was a row of pickles (a number for the format, its version, facts of the
machine, the structure, the names of the storages), and then each storage's length and bytes. A pickle can call any
function of any library, so the reader here knows a few harmless names and refuses a file that asks for more. Tensors
are views of the mapped file: memory is used when a tensor is.
"""

import collections
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from semflow_jax.errors import UserError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What Stable Diffusion's own .ckpt files hold beside the weights; read as nothing.
_BOOKKEEPING = {
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
_OLD_FORMAT = 0x1950A86A20F9469CFC6C, 1001  # what a file from before 2020 begins with
_LOCAL_HEADER = 30  # bytes of a zip entry before its name; the lengths of name and extra field are its last four


class _Nothing:
    """Stands for an object that is not wanted, and takes what would have made it."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


class _Parameter:
    """A parameter as it was written before PyTorch 0.4: its tensor is what it held first."""

    def __setstate__(self, state: tuple):
        self.tensor = state[0]


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists and tensors; whatever else a pickle asks for is refused."""

    def __init__(self, file, storages: Mapping[str, np.ndarray]):
        super().__init__(file)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in _REBUILD:
            return _REBUILD[name]
        if (module, name) == ("torch.nn.parameter", "Parameter"):
            return _Parameter
        if module == "torch" and name in _STORAGES:
            return name  # of `_STORAGES`: a pickle can't change a string
        if (module, name) in _BOOKKEEPING:
            return _Nothing
        raise pickle.UnpicklingError(f"{module}.{name} in it, which is not data")

    def persistent_load(self, pid: tuple) -> Any:
        kind, name, key, _, num, *view = pid
        if kind != "storage" or any(view):
            raise pickle.UnpicklingError(f"a {kind} in it, which is no storage")
        dtype = np.dtype(_STORAGES[name])
        return self.storages[key][: num * dtype.itemsize].view(dtype)


class _Survey(_Unpickler):
    """Learns the types of the storages, which follow the pickle in an old file, and makes no tensor."""

    def __init__(self, file):
        super().__init__(file, {})
        self.itemsizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return _Nothing if found in _REBUILD.values() else found

    def persistent_load(self, pid: tuple) -> Any:
        self.itemsizes[pid[2]] = np.dtype(_STORAGES[pid[1]]).itemsize


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and not (0 <= offset <= last < len(storage) and min(stride, default=0) >= 0):
        raise pickle.UnpicklingError(f"a tensor of {list(size)} beyond its storage of {len(storage)}")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _rebuild_parameter(tensor: np.ndarray, *_) -> np.ndarray:
    return tensor


_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _rebuild_tensor,  # before PyTorch 0.4
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
}


def _map_storages(path: pathlib.Path, archive: zipfile.ZipFile, folder: str) -> dict[str, np.ndarray]:
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    storages = {}
    for entry in archive.infolist():
        if entry.filename.startswith(f"{folder}data/"):
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} compressed")
            header = data[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
            begin = (
                entry.header_offset + _LOCAL_HEADER + int(header[26:28].view("<u2")[0] + header[28:30].view("<u2")[0])
            )
            if begin + entry.file_size > len(data):
                raise ValueError(f"{entry.filename} cut short")
            storages[entry.filename.rsplit("/", 1)[1]] = data[begin : begin + entry.file_size]
    return storages


def _load_archive(path: pathlib.Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        with archive.open(pickled) as file:
            return _Unpickler(file, _map_storages(path, archive, folder)).load()


def _load_old(path: pathlib.Path) -> Any:
    with path.open("rb") as file:
        found = tuple(_Unpickler(file, {}).load() for _ in _OLD_FORMAT)
        if found != _OLD_FORMAT:
            raise ValueError("neither a zip archive nor PyTorch's format from before 1.6")
        if not _Unpickler(file, {}).load()["little_endian"]:
            raise ValueError("bytes in big-endian order")
        structure = file.tell()
        survey = _Survey(file)
        survey.load()
        keys = _Unpickler(file, {}).load()
        data = np.asarray(np.memmap(path, np.uint8, mode="r"))
        begin, storages = file.tell(), {}
        for key in keys:
            size = int(data[begin : begin + 8].view("<i8")[0]) * survey.itemsizes[key]
            begin += 8
            if not 0 <= size <= len(data) - begin:
                raise ValueError(f"storage {key} cut short")
            storages[key] = data[begin : begin + size]
            begin += size
        file.seek(structure)
        return _Unpickler(file, storages).load()


def load_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict, nested or not (`{'state_dict': {...}}`), by name.

    Raises:
        UserError: the file is missing, cut short, or holds more than data.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: must be a file of torch.save, found none: correct the path or download the file")
    try:
        found = _load_archive(path) if zipfile.is_zipfile(path) else _load_old(path)
    except Exception as error:  # a broken pickle raises many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{path}: must be a whole state dict of torch.save with nothing but tensors, found "
            f"{reason}: download it again, or save its state_dict() as safetensors where you trust it"
        ) from error
    while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    items = found.items() if isinstance(found, dict) else ()
    plain = ((key, x.tensor if isinstance(x, _Parameter) else x) for key, x in items)
    tensors = {key: x for key, x in plain if isinstance(key, str) and isinstance(x, np.ndarray)}
    if not tensors:
        raise UserError(f"{path}: must be a state dict, found no tensors by name: save `model.state_dict()`")
    return tensors
