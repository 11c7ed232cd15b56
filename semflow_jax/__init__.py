"""SemFlow in JAX: one rectified flow between images and semantic masks.

Public names are imported when they are first used, so that a data worker, which needs none of them, stays light.
"""

import importlib
from typing import Any

from semflow_jax.version import __version__

_PUBLIC = {
    "SemFlow": "semflow_jax.pipeline",
    "UserError": "semflow_jax.errors",
    "UNetConfig": "semflow_jax.models.unet",
    "make_codec": "semflow_jax.codec",
    "make_palette": "semflow_jax.palette",
    "prepare": "semflow_jax.data.prepare",
    "image_to_mask": "semflow_jax.solve",
    "mask_to_image": "semflow_jax.solve",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
