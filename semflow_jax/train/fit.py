"""What is fitted to training data before training begins: the patch codec's spread, and a mask code's arrays.

A learned mask code takes minutes, so it is kept beside the data for the next run with equal settings, seed and codec.
"""

import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from semflow_jax import learned_code, parallel
from semflow_jax.codec import Codec, fit_patch_codec, make_codec
from semflow_jax.data.info import DataInfo
from semflow_jax.data.records import open_healthy, spread_indices
from semflow_jax.data.transforms import crop_centre
from semflow_jax.mask_code import MaskCode, fit_balance, fit_linear_code, make_mask_code
from semflow_jax.models.build import Params
from semflow_jax.weights.load import load_safetensors, save_safetensors

NUM_FITTED = 2000  # training examples that codec and mask code are fitted to
NUM_MEASURED = 64  # training images whose latents a learned or balanced mask code takes its spread from
SECONDS = "seconds"  # of a kept code's steps

log = logging.getLogger(__name__)


def fit_codes(c: ConfigDict, codec: Codec, data_dir: str, info: DataInfo) -> tuple[Codec, MaskCode, float]:
    """Codec and mask code, fitted where they have something to fit, and the seconds of the code's steps."""
    records = open_healthy(data_dir, "train", c.data.max_corrupt)

    def chosen(kind: str, limit: int = NUM_FITTED) -> Iterator[np.ndarray]:
        return (crop_centre(records[i], info.size)[kind] for i in spread_indices(len(records), limit))

    if c.codec.name == "patch" and c.codec.whiten:
        codec = make_codec(codec.config, fit_patch_codec(chosen("image"), c.codec.factor, c.codec.whiten))
    fitted: Params = {}
    if c.mask_code.name == "linear":
        fitted = fit_linear_code(chosen("label"), info.num_classes, codec, c.mask_code.whiten)
    elif c.mask_code.name == "learned":

        def learn() -> tuple[Params, float]:
            images, labels = chosen("image", NUM_MEASURED), list(chosen("label"))
            progress = jax.process_index() == 0
            return learned_code.fit(labels, images, info.num_classes, codec, c.mask_code, c.seed, progress)

        found = _kept(pathlib.Path(data_dir), [c.mask_code.to_dict(), c.seed, parallel.digest(codec.params)], learn)
        fitted = parallel.of_first(found, "every process has learned a mask code")
    elif c.mask_code.balance == "minmax":
        pairs = chosen("label", NUM_MEASURED), chosen("image", NUM_MEASURED)
        found = fit_balance(*pairs, info.num_classes, codec, c.mask_code, c.seed)
        fitted = parallel.of_first(found, "every process has balanced the mask code")
    seconds = float(fitted.pop(SECONDS, 0.0))
    return codec, make_mask_code(c.mask_code, codec, info.num_classes, fitted), seconds


def _kept(data_dir: pathlib.Path, key: list, learn: Callable[[], tuple[Params, float]]) -> Params:
    """The arrays and seconds of `learn`, from a file where it has been called with this key before."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = data_dir / f"mask-code-{name}.safetensors"
    if path.is_file():
        return dict(load_safetensors(path))
    arrays, seconds = learn()
    arrays |= {SECONDS: np.float32(seconds)}
    try:
        save_safetensors(path, arrays)
    except OSError as error:  # a folder that may be read only is no reason to end a run
        log.warning("%s: the learned mask code is not kept for other runs (%s)", path, error)
    return arrays
