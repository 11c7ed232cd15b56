"""How much of a true mask survives a mask code, and noise on its latents: mIoU and calibration error, by code.

python benchmarks/mask_codes.py --data DIR --codec taef2 --weights FILE [--every 5] [--set KEY=VALUE ...]

DIR is a prepared data set, such as `semflow prepare camvid --source DIR --out DIR` makes; a learned code is fitted to
its training split. Noise is Gaussian, in units of the standard deviation of the code's own latents, by channel. KEY is
one of the section `mask_code` of configs/base.py, such as learned.steps.
"""

import argparse
import ast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import base
from semflow_jax import learned_code
from semflow_jax.codec import load_codec
from semflow_jax.data.records import count_records, final_split, load_info, open_records, spread_indices
from semflow_jax.evaluate import calibration, segmentation
from semflow_jax.mask_code import MaskCode, make_mask_code
from semflow_jax.train.fit import NUM_FITTED, NUM_MEASURED

CODES = {
    "colour, grid": {"name": "colour", "palette": "grid"},
    "colour, spread": {"name": "colour", "palette": "spread"},
    "spread, learned decoder": {"name": "learned", "learned": {"encoder": "codec", "noise": 0.7}},
    "learned": {"name": "learned"},
}
NOISE = (0.0, 0.1, 0.2, 0.4, 0.8)


def measure(code: MaskCode, codec_params: dict, label: np.ndarray, batch_size: int = 16) -> tuple[list[str], float]:
    """mIoU and calibration error by level of noise, and the correlation of neighbouring latents."""
    encode, logits = jax.jit(code.encode), jax.jit(code.logits)
    batches = [label[i : i + batch_size] for i in range(0, len(label), batch_size)]
    z1 = [np.asarray(encode(code.params, codec_params, batch, None)) for batch in batches]
    whole = np.concatenate(z1)
    std = whole.std((0, 1, 2))
    correlation = 1 - float(learned_code.roughness(jnp.asarray((whole - whole.mean((0, 1, 2))) / std)))
    cells = []
    for level in NOISE:
        rng = np.random.default_rng(0)
        matrix, counts = 0, []
        for batch, z in zip(batches, z1, strict=True):
            noisy = z + level * std * rng.normal(size=z.shape).astype(np.float32)
            found = logits(code.params, codec_params, noisy)
            decoded = jnp.argmax(found, -1, keepdims=True).astype(jnp.uint8)
            matrix += np.asarray(segmentation.confusion_matrix(jnp.asarray(batch), decoded, len(code.colours)))
            counts.append(calibration.calibration_counts(jax.nn.softmax(found), jnp.asarray(batch)))
        total = calibration.Counts(*(np.sum(x, axis=0) for x in zip(*counts, strict=True)))
        iou = np.nanmean(segmentation.class_iou(matrix))
        cells.append(f"{iou:.3f} ({calibration.expected_calibration_error(total):.3f})")
    return cells, correlation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--codec", default="taef2")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--every", type=int, default=5, help="one of so many images of the held-out split")
    parser.add_argument("--codes", nargs="*", default=list(CODES), choices=list(CODES))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    info, split = load_info(args.data), final_split(count_records(args.data))
    train, test = open_records(args.data, "train"), open_records(args.data, split)
    label = np.stack([test[i]["label"] for i in range(0, len(test), args.every)])
    codec = load_codec(ConfigDict({"name": args.codec, "path": args.weights}))
    print(f"{info.name}, {split}, {len(label)} masks through {codec.name}: mIoU (calibration error)\n")
    print(f"| code | {' | '.join(f'noise {x}' for x in NOISE)} | correlation of neighbours | seconds of the fit |")
    print("|---" * (len(NOISE) + 3) + "|", flush=True)
    for name in args.codes:
        c = base.get_config().mask_code
        with c.unlocked():
            c.update(CODES[name])
            c.update_from_flattened_dict({k: ast.literal_eval(v) for k, v in (x.split("=") for x in args.set)})
        params, seconds = {}, 0.0
        if c.name == "learned":
            labels = [train[i]["label"] for i in spread_indices(len(train), NUM_FITTED)]
            images = (train[i]["image"] for i in spread_indices(len(train), NUM_MEASURED))
            params, seconds = learned_code.fit(labels, images, info.num_classes, codec, c, 123)
        cells, correlation = measure(make_mask_code(c, codec, info.num_classes, params), codec.params, label)
        print(f"| {name} | {' | '.join(cells)} | {correlation:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
