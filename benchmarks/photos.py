"""How near to held-out photos others are by Fréchet distance, for scale: those of the training split, and themselves
through an image codec and back.

python benchmarks/photos.py --data DIR --features efficientnet_lite0=FILE --codec taef2 --weights FILE --limit 64

DIR is a prepared data set; `--limit` takes so many photos of each split, evenly.
"""

import argparse
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from semflow_jax.codec import load_codec
from semflow_jax.data.records import count_records, final_split, open_records, spread_indices
from semflow_jax.evaluate.distances import Moments, frechet_distance
from semflow_jax.evaluate.features import FeatureNet, load_features, name_and_file
from semflow_jax.sampling import to_float, to_uint8

BATCH = 16


def moments(net: FeatureNet, images: np.ndarray) -> Moments:
    """Of the features; the last batch is filled up, so that one program does all."""
    features = jax.jit(net.features)
    found = Moments.empty(net.dim)
    for begin in range(0, len(images), BATCH):
        some = images[begin : begin + BATCH]
        padded = np.concatenate([some, np.repeat(some[-1:], BATCH - len(some), 0)])
        found = found.add(np.asarray(features(net.params, padded))[: len(some)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--features", required=True, metavar="NET=FILE")
    parser.add_argument("--codec", default="taef2")
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--limit", type=int, help="default: as many as the test split has")
    args = parser.parse_args()
    net = load_features(*name_and_file(args.features))
    codec = load_codec(ConfigDict({"name": args.codec, "path": str(args.weights)}))
    last = open_records(args.data, final_split(count_records(args.data)))
    train = open_records(args.data, "train")
    num = min(args.limit or len(last), len(last), len(train))
    held_out, others = (np.stack([x[i]["image"] for i in spread_indices(len(x), num)]) for x in (last, train))
    there_and_back = jax.jit(lambda params, x: to_uint8(codec.decode(params, codec.encode(params, to_float(x), None))))
    again = np.concatenate([np.asarray(there_and_back(codec.params, x[None])) for x in held_out])
    goal = moments(net, held_out)
    print(f"{num} photos, {net.name}\n\n| to held-out photos from | Fréchet distance |\n|---|---|")
    print(f"| training photos | {frechet_distance(goal, moments(net, others)):.1f} |")
    print(f"| themselves through {codec.name} | {frechet_distance(goal, moments(net, again)):.1f} |")


if __name__ == "__main__":
    main()
