"""Our parameters as a PyTorch checkpoint would hold them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from semflow_jax.weights.keys import axes


def to_torch(params: Mapping[str, Any], dtype: str) -> dict[str, np.ndarray]:
    """Our order of axes -> PyTorch's, stored as `dtype`: the inverse of `weights.load.fill`."""
    return {
        path: np.asarray(x).transpose(np.argsort(axes(path, x.ndim))).astype(dtype, order="C")
        for path, x in params.items()
    }
