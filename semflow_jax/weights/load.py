"""Strict loading: every tensor of a file finds its parameter and every parameter its tensor, or nothing is loaded."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from semflow_jax.errors import UserError
from semflow_jax.weights import keys

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a safetensors file as read-only views of the mapped file: a tensor costs memory only when it is used.

    Raises:
        UserError: no such file, or one that is cut short or of another format.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: must be a safetensors file, found none: correct the path or download the file")
    try:
        return _map_tensors(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: must be a whole safetensors file, found {error}: download it again") from error


def _map_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Format: 8 bytes n (little endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 + header_size:
            raise ValueError(f"{size} bytes where the header alone needs {8 + header_size}")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    whole = 8 + header_size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != whole:
        raise ValueError(f"{size} bytes instead of {whole}")
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))[8 + header_size :]
    return {name: _view(name, data, **entry) for name, entry in header.items()}


def _view(name: str, data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype not in _DTYPES:
        raise ValueError(f"{name} of unknown type {dtype}")
    begin, end = data_offsets
    if not 0 <= begin <= end or end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ValueError(f"{name} with shape {shape} in {end - begin} bytes of {dtype}")
    return data[begin:end].view(_DTYPES[dtype]).reshape(shape)


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file beside its final name and renames it when it is whole."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # The format stores bytes as they lie in memory, so a transposed view has to be copied first.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        safetensors.numpy.save_file(contiguous, part, metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def prefixed(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """{group: {name: array}} -> {'group.name': array}."""
    return {f"{group}.{name}": np.asarray(x) for group, arrays in groups.items() for name, x in arrays.items()}


def split_prefixed(tensors: dict[str, np.ndarray], groups: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """The inverse of `prefixed`; takes the tensors it finds out of `tensors`."""
    found: dict[str, dict[str, np.ndarray]] = {group: {} for group in groups}
    for key in list(tensors):
        group, _, name = key.partition(".")
        if group in found:
            found[group][name] = tensors.pop(key)
    return found


def fill(
    params_abstract: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    table: keys.Table = (),
    place: str | os.PathLike[str] = "tensors",
    put: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """Gives every parameter its tensor, in the parameter's layout and type.

    Args:
        params_abstract: {path: anything with `shape` and `dtype`}.
        tensors: {checkpoint key: array in PyTorch's layout}.
        table: what differs between keys and paths.
        place: where the tensors come from, for the error message.
        put: where each tensor goes before the next is read, `jax.numpy.asarray` for a device: of what is mapped from a
            file, no more than one tensor at a time is in memory twice.

    Raises:
        UserError: lists every key without a parameter, every parameter without a tensor, every wrong shape.
    """
    filled: dict[str, Any] = {}
    unmapped, repeated, misshaped = [], [], []
    unfilled = dict.fromkeys(params_abstract)
    for key, tensor in tensors.items():
        path = keys.rename(key, table)
        if path is None:
            continue
        if path not in params_abstract:
            unmapped.append(key)
            continue
        if path not in unfilled:
            repeated.append(key)
            continue
        del unfilled[path]
        target = params_abstract[path]
        tensor = tensor.transpose(keys.axes(path, tensor.ndim))
        if tensor.ndim == 4 and len(target.shape) == 2 and tensor.shape[:2] == (1, 1):
            tensor = tensor[0, 0]  # a 1 x 1 convolution is a linear map, and some files store one as the other
        if tensor.shape != tuple(target.shape):
            misshaped.append(f"{key} {list(tensor.shape)} instead of {list(target.shape)}")
            continue
        filled[path] = put(tensor.astype(target.dtype, order="C"))
    found = {
        "keys without a parameter": unmapped,
        "keys for a parameter that has one": repeated,
        "parameters without a key": list(unfilled),
        "wrong shapes, axes as in memory": misshaped,
    }
    if any(found.values()):
        listing = "; ".join(f"{len(names)} {what} ({', '.join(names)})" for what, names in found.items() if names)
        raise UserError(
            f"{place}: keys and parameters must match one to one, found {listing}: "
            "choose the config that belongs to this file, or the file that belongs to this config"
        )
    return filled
