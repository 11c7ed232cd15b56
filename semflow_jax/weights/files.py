"""Where weights lie: files of three formats, the folders of diffusers and transformers, the Hugging Face hub."""

import itertools
import json
import os
import pathlib
from collections.abc import Sequence

import huggingface_hub
import numpy as np

from semflow_jax.errors import UserError
from semflow_jax.weights.load import load_safetensors
from semflow_jax.weights.torch_file import load_torch

# What diffusers and transformers call the file of a network, preferred first.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = ("safetensors", "bin")
VARIANTS = ("fp16", "bf16", "non_ema")
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def load_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file, by its suffix; views of the mapped file.

    Raises:
        UserError: missing, broken, or of no known suffix.
    """
    suffix = pathlib.Path(path).suffix
    if suffix == ".safetensors":
        return load_safetensors(path)
    if suffix in TORCH_SUFFIXES:
        return load_torch(path)
    raise UserError(f"{path}: weights end in .safetensors or {', '.join(TORCH_SUFFIXES)}, got {suffix!r}; convert it")


def find_network(folder: pathlib.Path, variant: str | None = None) -> list[pathlib.Path]:
    """The file of a network in a diffusers or transformers folder, or its shards.

    Args: variant: 'fp16' and the like, of `diffusion_pytorch_model.fp16.safetensors`; None takes the plain one first,
        and whichever there is where there is none.

    Raises:
        UserError: there is no such file, or a shard is missing.
    """
    for v, suffix, stem in itertools.product((variant,) if variant else ("", *VARIANTS), SUFFIXES, STEMS):
        file = folder / ".".join(part for part in (stem, v, suffix) if part)
        if file.is_file():
            return [file]
        index = folder / ".".join(part for part in (stem, suffix, "index", v, "json") if part)
        if index.is_file():
            return _find_shards(index)
    wanted = ".".join(part for part in (STEMS[0], variant, SUFFIXES[0]) if part)
    raise UserError(f"{folder}: weights such as {wanted} expected, found none; download them")


def _find_shards(index: pathlib.Path) -> list[pathlib.Path]:
    try:
        paths = set(json.loads(index.read_text())["weight_map"].values())
        names = sorted(pathlib.PurePath(path).name for path in paths)  # none outside the folder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: an index of shards expected, found {error!r}; download it again") from error
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index}: all of its shards expected beside it, missing {', '.join(missing)}; download them")
    return files


def load_all(paths: Sequence[pathlib.Path]) -> dict[str, np.ndarray]:
    """The tensors of several files, such as `find_network` finds."""
    tensors: dict[str, np.ndarray] = {}
    for path in paths:
        tensors |= load_tensors(path)
    return tensors


def load_json(path: pathlib.Path) -> dict:
    """A config.json.

    Raises:
        UserError: missing, or no JSON object.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: a JSON file expected, found {error}; download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON object expected, found a {type(found).__name__}; download it again")
    return found


def download(
    repo_id: str,
    patterns: Sequence[str],
    revision: str | None = None,
    token: str | bool | None = None,
    offline: bool = False,
) -> pathlib.Path:
    """The files of a hub repository that match, in the hub's own cache; resumes what was interrupted.

    Args:
        revision: branch, tag or commit; None is the main branch.
        token: of a gated or private repository; None takes that of `hf auth login`.
        offline: only what was downloaded before.

    Raises:
        UserError: no such repository, no access, or no network.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, allow_patterns=list(patterns), revision=revision, token=token, local_files_only=offline
        )
    except Exception as error:  # the hub's own kinds, and those of whatever it transfers with
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{repo_id}: a folder, or a repository of the Hugging Face hub{f' at {revision}' if revision else ''}, "
            f"expected, found neither ({reason}); correct it, check the network, or log in with `hf auth login`"
        ) from error
    return pathlib.Path(folder)
