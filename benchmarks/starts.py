"""Where synthesis loses: Fréchet distance to the photos, by the time t at which it starts.

python benchmarks/starts.py RUN --data DIR --features efficientnet_lite0=FILE --limit 112

It starts from z_t = (1 - t) z_0 + t z_1 of true pairs, so that below t = 1 something of the photo is there already, and
follows the flow to t = 0. What the distance gains from one start to the next is what the flow loses between them.
DIR is the prepared data set of the model in RUN.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from photos import BATCH, moments

from semflow_jax import SemFlow, flow, noise, parallel
from semflow_jax.arguments import numbers
from semflow_jax.data.records import open_records, spread_indices
from semflow_jax.evaluate.distances import frechet_distance
from semflow_jax.evaluate.features import load_features, name_and_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run or a saved model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--features", required=True, metavar="NET=FILE")
    parser.add_argument("--split", default="train")
    parser.add_argument("--steps", type=int, default=8, help="of Euler from t = 1 on; starts lie on their grid")
    parser.add_argument("--starts", type=numbers(int), default=[8, 7, 6, 4, 2], metavar="N,N", help="steps to go")
    parser.add_argument("--limit", type=int, default=112)
    args = parser.parse_args()
    if not all(0 < start <= args.steps for start in args.starts):
        parser.error(f"--starts: of 1..{args.steps} steps each, got {args.starts}")
    parallel.keep_compilations()
    net, model = load_features(*name_and_file(args.features)), SemFlow.from_pretrained(args.model)
    sampler = model.sampler
    records = open_records(args.data, args.split)
    chosen = [records[i] for i in spread_indices(len(records), min(args.limit, len(records)))]
    images, labels = (np.stack([x[kind] for x in chosen]) for kind in ("image", "label"))
    goal = moments(net, images)

    @jax.jit
    def run(params, frozen, image, label, index, start):
        z0 = sampler.encode_image(frozen, image)
        z1 = sampler.encode_mask(frozen, label, noise.example_keys(jax.random.key(0), index))

        def step(i, z):
            t = jnp.full(len(z), (start - i) / args.steps)
            return z - sampler.velocity(params, frozen, z, t) / args.steps

        zt = flow.interpolate(z0, z1, jnp.full(len(z0), start / args.steps))
        return sampler.decode_image(frozen, jax.lax.fori_loop(0, start, step, zt))

    print(f"{len(images)} pairs of {args.split}, {net.name}\n\n| start at t | Fréchet distance |\n|---|---|")
    for start in args.starts:
        made = []
        for begin in range(0, len(images), BATCH):
            places = np.minimum(np.arange(begin, begin + BATCH), len(images) - 1)  # one shape
            found = run(model.params, model.frozen, images[places], labels[places], places, start)
            made.append(np.asarray(found)[: len(images) - begin])
        print(
            f"| {start / args.steps:g} | {frechet_distance(goal, moments(net, np.concatenate(made))):.1f} |", flush=True
        )


if __name__ == "__main__":
    main()
