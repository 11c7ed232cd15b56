"""Reads what `torch.save` wrote, without PyTorch and without running what is in it.

Such a file is an uncompressed zip archive: `NAME/data.pkl`, a pickle of the structure, and `NAME/data/0`, `1`, ..., the
bytes of each storage. A pickle can call any function of any library, so the reader here knows a few harmless names and
refuses a file that asks for more. Tensors are views of the mapped file: memory is used when a tensor is.
"""

import collections
import os
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
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
_LOCAL_HEADER = 30  # bytes of a zip entry before its name; the lengths of name and extra field are its last four


class _Nothing:
    """Stands for an object that is not wanted, and takes what would have made it."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists and tensors; whatever else a pickle asks for is refused."""

    def __init__(self, file, storages: Mapping[str, np.ndarray]):
        super().__init__(file)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _rebuild_tensor if name == "_rebuild_tensor_v2" else _rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return name  # of `_STORAGES`: a pickle can't change a string
        if (module, name) in _BOOKKEEPING:
            return _Nothing
        raise pickle.UnpicklingError(f"{module}.{name} in it, which is not data")

    def persistent_load(self, pid: tuple) -> np.ndarray:
        kind, name, key, _, num = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"a {kind} in it, which is no storage")
        dtype = np.dtype(_STORAGES[name])
        return self.storages[key][: num * dtype.itemsize].view(dtype)


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and not (0 <= offset <= last < len(storage) and min(stride, default=0) >= 0):
        raise pickle.UnpicklingError(f"a tensor of {list(size)} beyond its storage of {len(storage)}")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _rebuild_parameter(tensor: np.ndarray, *_) -> np.ndarray:
    return tensor


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


def load_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict, nested or not (`{'state_dict': {...}}`), by name.

    Raises:
        UserError: the file is missing, cut short, older than PyTorch 1.6's format, or holds more than data.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: must be a file of torch.save, found none: correct the path or download the file")
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            folder = pickled.removesuffix("data.pkl")
            with archive.open(pickled) as file:
                found = _Unpickler(file, _map_storages(path, archive, folder)).load()
    except Exception as error:  # a broken pickle raises many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{path}: must be a whole state dict of torch.save (PyTorch 1.6 or later) with nothing but tensors, found "
            f"{reason}: download it again, or save its state_dict() as safetensors where you trust it"
        ) from error
    while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    items = found.items() if isinstance(found, dict) else ()
    tensors = {key: x for key, x in items if isinstance(key, str) and isinstance(x, np.ndarray)}
    if not tensors:
        raise UserError(f"{path}: must be a state dict, found no tensors by name: save `model.state_dict()`")
    return tensors
