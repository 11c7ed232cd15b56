"""Configs as files of Python, as `main.py --config` takes them."""

import importlib.util
import pathlib
import sys

from ml_collections import ConfigDict

from semflow_jax.errors import UserError


def load_config(path: pathlib.Path) -> ConfigDict:
    """The config of a file, which may import its neighbours as `configs.NAME`; FILE:TEXT is get_config(TEXT) of FILE.

    Raises:
        UserError: no such file, or none with get_config().
    """
    path, argument = pathlib.Path(str(path).partition(":")[0]), str(path).partition(":")[2]
    if not path.is_file():
        raise UserError(f"--config {path}: a file with get_config() expected, found none; correct it")
    sys.path.insert(0, str(path.resolve().parent.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {path}: a function get_config() expected, found none; correct it")
    return module.get_config(argument) if argument else module.get_config()
