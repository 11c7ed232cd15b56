"""How much of a true mask survives a colour code: mIoU of masks through a codec and back, by palette.

python benchmarks/palettes.py --data DIR --codec taef2 --weights FILE [--split train] [--num 24]

DIR is a prepared data set, such as `semflow prepare camvid --source DIR --out DIR` makes. Beside the package's palettes
stand two denser packings of the colour cube: the corners of an icosahedron, and cube corners with the face centres.
"""

import argparse
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from semflow_jax import palette
from semflow_jax.codec import load_codec
from semflow_jax.data.records import load_info, open_records, spread_indices
from semflow_jax.evaluate import segmentation


def packings(num_classes: int) -> dict[str, np.ndarray]:
    """Points of [-1, 1]^3 as colours, those far from white first; a packing with too few points is left out."""
    signs = list(itertools.product((-1.0, 1.0), repeat=2))
    golden = (1 + 5**0.5) / 2
    corners = [p for a, b in signs for p in ((0, a / golden, b), (a / golden, b, 0), (b, 0, a / golden))]
    faces = [tuple(side if i == axis else 0.0 for i in range(3)) for axis in range(3) for side in (-1.0, 1.0)]
    found = {"icosahedron": corners, "corners and faces": [*itertools.product((-1.0, 1.0), repeat=3), *faces]}
    colours = {name: np.round((np.array(points) + 1) * 127.5) for name, points in found.items()}
    far = {name: x[np.argsort(-np.linalg.norm(x - 255, axis=1), kind="stable")] for name, x in colours.items()}
    return {name: x[:num_classes].astype(np.uint8) for name, x in far.items() if len(x) >= num_classes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--codec", default="taef2")
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--split", default="train", help="a palette is chosen here, so not by the test split")
    parser.add_argument("--num", type=int, default=24, help="masks, evenly over the split")
    args = parser.parse_args()
    info, records = load_info(args.data), open_records(args.data, args.split)
    label = np.stack([records[i]["label"] for i in spread_indices(len(records), args.num)])
    codec = load_codec(ConfigDict({"name": args.codec, "path": str(args.weights)}))
    there_and_back = jax.jit(lambda params, x: codec.decode(params, codec.encode(params, x, None)))
    palettes = {name: palette.make_palette(name, info.num_classes) for name in palette.PALETTES}
    print(
        f"{info.name}, {args.split}, {len(label)} masks through {codec.name}\n\n| palette | smallest distance | mIoU |"
    )
    print("|---|---|---|")
    for name, colours in (palettes | packings(info.num_classes)).items():
        found = palette.decode(there_and_back(codec.params, palette.colourise(jnp.asarray(label), colours)), colours)
        matrix = segmentation.confusion_matrix(jnp.asarray(label), found, info.num_classes)
        score = segmentation.scores(np.asarray(matrix), info.class_names)["miou"]
        print(f"| {name} | {palette.min_distance(colours):.2f} | {score:.3f} |", flush=True)


if __name__ == "__main__":
    main()
