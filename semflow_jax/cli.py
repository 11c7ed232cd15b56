"""The `semflow` command: prepare and inspect data; plan; segment, synthesize, evaluate; compare; convert."""

import argparse
import logging
import pathlib
import sys
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from semflow_jax import parallel
from semflow_jax.arguments import positive
from semflow_jax.codec import Codec, load_codec
from semflow_jax.data import prepare as data
from semflow_jax.data.examples import FITS
from semflow_jax.data.images import IMAGE_SUFFIXES, read_image, read_label
from semflow_jax.data.inspect import inspect as inspect_data
from semflow_jax.data.sources.folder import load_classes
from semflow_jax.errors import UserError
from semflow_jax.evaluate import compare, study
from semflow_jax.latents import ensure_latents
from semflow_jax.models.build import count_params
from semflow_jax.models.unet_config import DTYPES
from semflow_jax.pipeline import SemFlow, shipped
from semflow_jax.plan import command as plan
from semflow_jax.solve import SOLVERS


def find_inputs(path: pathlib.Path, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    """A file, or the files of a folder, by name.

    Raises:
        UserError: there are none, or two whose results would have one name.
    """
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"--input {path}: a file, or a folder with {', '.join(suffixes)} files, found none; correct it")
    stems: dict[str, pathlib.Path] = {}
    for file in files:
        if stems.setdefault(file.stem, file) != file:
            raise UserError(f"{file}: names must differ in more than the suffix, found {stems[file.stem]}; rename one")
    return files


def _chunks(files: list[pathlib.Path], size: int, title: str) -> Iterator[list[pathlib.Path]]:
    with tqdm(total=len(files), desc=title, unit="img") as bar:
        for start in range(0, len(files), size):
            chunk = files[start : start + size]
            yield chunk
            bar.update(len(chunk))


def _stack(pictures: list[np.ndarray], size: int) -> np.ndarray:
    """A batch of `size`, the last picture repeated where there are fewer: one shape, one compilation."""
    return np.stack(pictures + [pictures[-1]] * (size - len(pictures)))


def segment(args: argparse.Namespace) -> None:
    flow = SemFlow.from_pretrained(args.checkpoint)
    files = find_inputs(args.input, IMAGE_SUFFIXES)
    size = min(args.batch_size, len(files))
    height, width = flow.info.size
    args.out.mkdir(parents=True, exist_ok=True)
    for chunk in _chunks(files, size, "segment"):
        images = [read_image(file) for file in chunk]
        small = [np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)) for image in images]
        labels = flow.segment(_stack(small, size), args.steps, args.solver)
        for file, image, label in zip(chunk, images, labels, strict=False):
            mask = Image.fromarray(label[..., 0]).resize(image.size, Image.Resampling.NEAREST)
            mask.putpalette(flow.code.colours.tobytes())  # class ids for programs, colours for eyes
            mask.save(args.out / f"{file.stem}.png")
    print(f"{len(files)} masks in {args.out}: palette PNGs whose pixel values are class ids")
    for i, name in enumerate(flow.info.class_names):
        print(f"{i:4} {name}")


def synthesize(args: argparse.Namespace) -> None:
    flow = SemFlow.from_pretrained(args.checkpoint)
    files = find_inputs(args.input, (".png",))
    size = min(args.batch_size, len(files))
    height, width = flow.info.size
    args.out.mkdir(parents=True, exist_ok=True)
    for start, chunk in enumerate(_chunks(files, size, "synthesize")):
        labels = [Image.fromarray(read_label(file)).resize((width, height), Image.Resampling.NEAREST) for file in chunk]
        key = jax.random.fold_in(jax.random.key(args.seed), start)
        batch = _stack([np.asarray(label)[..., None] for label in labels], size)
        images = flow.synthesize(batch, key=key, num_samples=args.num_samples, steps=args.steps, solver=args.solver)
        for i, file in enumerate(chunk):
            for k in range(args.num_samples):
                Image.fromarray(images[k, i]).save(args.out / f"{file.stem}-{k}.png")
    print(f"{len(files) * args.num_samples} images in {args.out}")


def convert(args: argparse.Namespace) -> None:
    class_names = None
    if args.classes is not None:
        class_names = load_classes(args.classes).names
    options = {"revision": args.revision, "offline": args.offline}
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(
            f"{args.out}: a new or empty folder expected, found something in it; choose another or empty it"
        )
    flow = SemFlow.from_pretrained(args.source, unet=args.unet, class_names=class_names, **options)
    if args.format == "diffusers":
        flow.save_diffusers(args.out)
    else:
        flow.save_pretrained(args.out, dtype=args.dtype, file_format=args.format)
    print(
        f"{count_params(flow.params):,} parameters in {args.out}, {args.format}; sha256 {parallel.digest(flow.params)}"
    )


def prepare(args: argparse.Namespace) -> None:
    size = None if args.size is None else tuple(args.size) if len(args.size) == 2 else args.size[0]
    counts = {"num_train": args.num_train, "num_val": args.num_val, "seed": args.seed}
    work = {"max_skipped": 0.0 if args.strict else args.max_skipped, "num_workers": args.num_workers}
    work |= {"engine": args.engine, "beam_options": args.beam_options}
    codec = _latent_codec(args.latents) if args.latents else None
    data.prepare(args.name, args.out, source=args.source, size=size, fit=args.fit, **counts, **work)
    if codec is not None:
        print(f"latents: {ensure_latents(str(args.out), codec)}")


def _latent_codec(text: str) -> Codec:
    name, _, path = text.partition("=")
    if name == "patch" or not path:
        raise UserError(f"--latents: CODEC=WEIGHTS, a codec that has weights, got {text!r}; see docs/data.md")
    return load_codec(ConfigDict({"name": name, "path": path}))


def inspect(args: argparse.Namespace) -> None:
    inspect_data(args.data, args.sheet, args.verify)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semflow", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function, text: str, name: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name or function.__name__, help=text, description=text)
        command.set_defaults(function=function)
        return command

    def add_sampling(command: argparse.ArgumentParser) -> None:
        command.add_argument("--steps", type=positive, help="of the ODE solver; default: the model's")
        command.add_argument("--solver", choices=SOLVERS, help="default: the model's")

    c = add(prepare, "make a prepared data set")
    c.add_argument("name", choices=sorted(data.FIND))
    c.add_argument("--source", type=pathlib.Path, help="folder of the raw files, as they are downloaded")
    c.add_argument("--out", type=pathlib.Path, required=True)
    c.add_argument("--size", type=int, nargs="+", metavar="N", help="height and width, or the side of a square")
    fits = "stretch it, crop its middle, or keep all of it, so that training crops at random"
    c.add_argument("--fit", choices=FITS, default="stretch", help=f"an image of another shape: {fits}")
    c.add_argument("--num-train", type=positive)
    c.add_argument("--num-val", type=positive)
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--latents", metavar="CODEC=WEIGHTS", help="also encode the training images, e.g. kl=FOLDER")
    c.add_argument("--num-workers", type=positive, help="processes; default: one for every core")
    c.add_argument("--engine", choices=data.ENGINES, default="pool", help="processes, or workers of Apache Beam")
    c.add_argument("--beam-options", default="", metavar="TEXT", help='as in --beam-options="--runner=DirectRunner"')
    c.add_argument("--max-skipped", type=float, default=data.MAX_SKIPPED, help="share of bad files that is left out")
    c.add_argument("--strict", action="store_true", help="the same as --max-skipped 0")

    c = add(inspect, "print what a prepared data set holds")
    c.add_argument("data", type=pathlib.Path)
    c.add_argument("--sheet", type=pathlib.Path, help="write a contact sheet, a PNG")
    c.add_argument("--verify", action="store_true", help="compare every file with its checksum")

    checkpoint = f"folder of a model or of a run, or a shipped model: {', '.join(shipped())}"
    for function, text, what in (
        (segment, "images -> masks", "images"),
        (synthesize, "masks -> images", "PNGs of class ids"),
    ):
        c = add(function, text)
        c.add_argument("--checkpoint", required=True, help=checkpoint)
        c.add_argument("--input", type=pathlib.Path, required=True, help=f"{what}: a file or a folder")
        c.add_argument("--out", type=pathlib.Path, required=True)
        add_sampling(c)
        c.add_argument("--batch-size", type=positive, default=16)
        if function is synthesize:
            c.add_argument("--num-samples", type=positive, default=1, help="images of each mask")
            c.add_argument("--seed", type=int, default=0)

    c = add(convert, "weights from one format to another: Stable Diffusion, SemFlow, Orbax, diffusers")
    c.add_argument(
        "source", metavar="SRC", help=f"{checkpoint}, Stable Diffusion's folder or file, or a hub repository"
    )
    c.add_argument("out", metavar="DST", type=pathlib.Path, help="a new folder")
    c.add_argument("--format", choices=("safetensors", "orbax", "diffusers"), default="safetensors")
    c.add_argument("--dtype", choices=DTYPES, default="float32", help="of the velocity network in safetensors")
    c.add_argument("--unet", type=pathlib.Path, help="a UNet that replaces Stable Diffusion's, e.g. the authors' file")
    c.add_argument("--classes", type=pathlib.Path, help="classes.json with the names of the class ids, for --unet")
    c.add_argument("--revision", help="branch, tag or commit of a hub repository")
    c.add_argument("--offline", action="store_true", help="only what was downloaded before")

    c = add(plan.run, "memory and speed of a config on TPUs that are not there", name="plan")
    plan.add_arguments(c)

    c = add(study.run, "figures of a model on a prepared data set, under a protocol", name="evaluate")
    study.add_arguments(c)

    c = add(compare.run, "two or more results of evaluate, side by side", name="compare")
    compare.add_arguments(c)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point; bad input is one line on stderr and exit code 2."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parallel.keep_compilations()
    try:
        args.function(args)
    except (UserError, OSError) as error:  # OSError: an output that can't be written; it names the file
        print(f"semflow: {error}", file=sys.stderr)
        parallel.leave(parallel.USER_ERROR)


if __name__ == "__main__":
    main()
