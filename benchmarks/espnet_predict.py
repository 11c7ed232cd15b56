"""What ESPNet, a segmenter from outside, sees in synthesized street scenes: class ids as PNGs, named as the pictures.

semflow evaluate ... --pictures PICTURES
python benchmarks/espnet_predict.py PICTURES/euler-25 OUT/euler-25 --weights espnet_p_2_q_8_camvid.safetensors
semflow evaluate ... --predictions OUT

It was trained at 360 x 480, so pictures are brought to that size, and its probabilities back to the pictures'. With
`--labels`, pictures are photos and the labels of the same names say how well it sees: its own ceiling.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from semflow_jax.data.images import read_image, read_label
from semflow_jax.evaluate.segmentation import confusion_matrix, scores
from semflow_jax.evaluate.views import resize_image
from semflow_jax.models.build import make_fns
from semflow_jax.models.espnet import ESPNet
from semflow_jax.weights.load import fill, load_safetensors

# CamVid's, in the order of its ids; the network's twelfth output is void, which is no answer
CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign_symbol",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
)
SIZE = (360, 480)
BATCH_SIZE = 8


def make_segment_fn(weights: pathlib.Path):
    """segment(params, images of one size [b h w 3]) -> class ids [b h w 1], and the params."""
    abstract, (logits,) = make_fns(lambda rngs: ESPNet(len(CLASSES) + 1, rngs=rngs), "__call__")

    @jax.jit
    def segment(params, images):
        p = jax.nn.softmax(logits(params, resize_image(images, SIZE))[..., : len(CLASSES)])
        p = jax.image.resize(p, (*images.shape[:3], len(CLASSES)), "linear")
        return jnp.argmax(p, -1, keepdims=True).astype(jnp.uint8)

    return segment, fill(abstract, load_safetensors(weights), place=weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--glob", default="*", help="which pictures: '*-0.png' are the first of every mask")
    parser.add_argument("--names", type=pathlib.Path, help="file of stems: these instead, in this order")
    parser.add_argument("--every", type=int, default=1, help="only every so many")
    parser.add_argument("--labels", type=pathlib.Path, help="folder of PNGs to score against")
    args = parser.parse_args()
    segment, params = make_segment_fn(args.weights)
    paths = sorted(args.pictures.glob(args.glob))
    if args.names:
        by_stem = {path.stem: path for path in paths}
        paths = [by_stem[stem] for stem in args.names.read_text().split()]
    paths = paths[:: args.every]
    args.out.mkdir(parents=True, exist_ok=True)
    matrix = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for start in tqdm(range(0, len(paths), BATCH_SIZE), unit="batch"):
        chosen = paths[start : start + BATCH_SIZE]
        images = [np.asarray(read_image(path)) for path in chosen]
        batch = np.stack(images + [images[-1]] * (BATCH_SIZE - len(images)))  # one shape, one compilation
        for path, ids in zip(chosen, np.asarray(segment(params, batch)), strict=False):
            Image.fromarray(ids[..., 0]).save(args.out / f"{path.stem}.png")
            if args.labels:
                label = read_label(args.labels / f"{path.stem}.png")
                matrix += np.asarray(confusion_matrix(jnp.asarray(label)[None, ..., None], ids[None], len(CLASSES)))
    print(f"{len(paths)} pictures -> {args.out}")
    if args.labels:
        found = scores(matrix, CLASSES)
        print(f"mIoU {found['miou']:.4f}, pixel accuracy {found['pixel_accuracy']:.4f}")


if __name__ == "__main__":
    main()
