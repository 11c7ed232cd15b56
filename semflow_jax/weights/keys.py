"""Tables: how the names and axes of a checkpoint become those of the modules.

Parameter paths are the checkpoint's keys, so a table holds only what differs: rules (pattern, replacement), applied in
order by `re.sub`. A replacement of None drops the tensor on purpose. Keys that no rule matches stay as they are.
"""

import re
from collections.abc import Callable, Sequence

Table = Sequence[tuple[str, str | Callable[[re.Match[str]], str] | None]]

# The original files count the decoder's leading clamp as a layer; diffusers, whose keys hold `.layers.`, does not.
TINY_VAE: Table = (
    (r"^encoder\.(?=\d)", "encoder.layers."),
    (r"^decoder\.(\d+)", lambda match: f"decoder.layers.{int(match[1]) - 1}"),
)


def rename(key: str, table: Table) -> str | None:
    """Returns the parameter path of a checkpoint's key, None where the table drops it."""
    for pattern, replacement in table:
        if replacement is None:
            if re.search(pattern, key):
                return None
        else:
            key = re.sub(pattern, replacement, key)
    return key


def axes(path: str, ndim: int) -> tuple[int, ...]:
    """Returns the order of PyTorch's axes in memory: OIHW -> HWIO, [out, in] -> [in, out]; embeddings stay."""
    if ndim == 4:
        return 2, 3, 1, 0
    if ndim == 2 and not path.endswith("embedding.weight"):
        return 1, 0
    return tuple(range(ndim))
