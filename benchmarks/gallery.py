"""What several models make of the same held-out photos and masks, as one picture:

python benchmarks/gallery.py runs/a runs/b --data DIR --steps 4 --out gallery.png

DIR is the prepared data set that they learned from; models are named by their folders.
"""

import argparse
import pathlib

import jax
import numpy as np

from semflow_jax import SemFlow
from semflow_jax.data.records import count_records, final_split, load_info, open_records, spread_indices
from semflow_jax.evaluate.report import contact_sheet, paint
from semflow_jax.palette import make_palette


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="runs or saved models")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=4, help="of Euler")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    split = final_split(count_records(args.data))
    records = open_records(args.data, split)
    chosen = [records[i] for i in spread_indices(len(records), args.rows)]
    image, label = (np.stack([x[kind] for x in chosen]) for kind in ("image", "label"))
    colours = make_palette("spread", load_info(args.data).num_classes)
    masks, samples = {}, {}
    for path in args.models:
        flow, name = SemFlow.from_pretrained(path), pathlib.Path(path).name
        masks[f"{name}: mask"] = paint(flow.segment(image, args.steps, "euler"), colours)
        made = flow.synthesize(label, key=jax.random.key(0), steps=args.steps, solver="euler")
        samples[f"{name}: image"] = made[0]
    contact_sheet({"image": image, "true mask": paint(label, colours)} | masks | samples).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
