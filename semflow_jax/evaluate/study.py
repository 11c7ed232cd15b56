"""`semflow evaluate`: every figure of a model at every setting, under a protocol that is part of the result.

A figure is only worth what is known of how it came about: the protocol names data and split with their checksums,
sizes, filters, sample counts, seed, the weights of every network and the version of this code. Two results can be
compared where their protocols are equal (`semflow compare`). Rows are written as they are done, and batches counted so
far are kept beside them: the same command goes on where it was stopped, and adds what a longer list of steps asks for.
"""

import argparse
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from semflow_jax import parallel
from semflow_jax.arguments import numbers, positive, words
from semflow_jax.config_file import load_config
from semflow_jax.data.prepare import ensure
from semflow_jax.data.records import count_records, final_split, load_info
from semflow_jax.errors import UserError
from semflow_jax.evaluate.external import score_predictions
from semflow_jax.evaluate.features import FEATURE_NETS, LPIPS_NETS, load_features, load_lpips, name_and_file
from semflow_jax.evaluate.judges import Judges
from semflow_jax.evaluate.output import plain, write_json
from semflow_jax.evaluate.runner import Evaluator, Setting
from semflow_jax.evaluate.views import Views
from semflow_jax.pipeline import SemFlow, shipped
from semflow_jax.solve import SOLVERS
from semflow_jax.version import __version__

log = logging.getLogger(__name__)
SECTIONS = ("segmentation", "synthesis", "flow")
SHOWN = {  # of the table that is printed
    "segmentation": (
        "miou",
        "pixel_accuracy",
        "boundary_miou",
        "calibration_error",
        "codec_ceiling_miou",
        "seconds_per_image",
    ),
    "synthesis": ("resegmentation_miou", "diversity", "lpips_real", "lpips_diversity", "seconds_per_image"),
    "flow": ("relative_straightness", "curvature", "round_trip_image", "round_trip_mask_miou"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = ", ".join(shipped())
    parser.add_argument("--checkpoint", required=True, help=f"of a model or a run; these come along: {models}")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=pathlib.Path, metavar="DIR", help="a prepared data set; figures at its resolution")
    data.add_argument("--config", type=pathlib.Path, metavar="FILE", help="the data of a config, prepared if need be")
    parser.add_argument("--split", help="default: test, or val where there is no test")
    parser.add_argument("--limit", type=positive, help="so many examples, evenly over the split; default: all")
    parser.add_argument("--steps", type=numbers(int), metavar="N,N", help="of the ODE solver; default: the model's")
    parser.add_argument("--solver", type=words(SOLVERS), metavar="S,S", help=f"of {', '.join(SOLVERS)}; default: its")
    parser.add_argument("--sections", type=words(SECTIONS), default=list(SECTIONS), metavar="A,B", help="default: all")
    views = "also segment by the mean over views"
    parser.add_argument("--scales", type=numbers(float), metavar="X,X", help=f"{views} of these scales")
    parser.add_argument("--mirror", action="store_true", help=f"{views} mirrored and not")
    nets = ", ".join(FEATURE_NETS)
    what = f"Fréchet and kernel distance, precision and recall on a network's features ({nets}); may be repeated"
    parser.add_argument("--features", action="append", default=[], metavar="NET=FILE", help=what)
    lpips = f"of {', '.join(LPIPS_NETS)}, with the weights of the network and of its channels"
    parser.add_argument("--lpips", metavar="NET=FILE,FILE", help=lpips)
    parser.add_argument("--num-samples", type=int, default=3, metavar="N", help="images of each mask, at least 2")
    parser.add_argument("--seed", type=int, default=0, help="of the perturbation")
    parser.add_argument("--pictures", type=pathlib.Path, metavar="DIR", help="write what is synthesized as PNGs")
    parser.add_argument("--predictions", type=pathlib.Path, metavar="DIR", help="what another segmenter makes of them")
    parser.add_argument("--time", action="store_true", help="measure seconds per image of both directions, too")
    parser.add_argument("--batch-size", type=positive, default=32, help="of all devices together")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("result.json"), help="default: result.json")


def run(args: argparse.Namespace) -> None:
    """Raises UserError for whatever does not fit together, before anything long begins."""
    if args.num_samples < 2:
        raise UserError(f"--num-samples: at least 2, got {args.num_samples}; raise it")
    parallel.initialize()
    mesh = parallel.make_mesh()
    parallel.local_batch_size(args.batch_size, mesh, "--batch-size")
    flow = SemFlow.from_pretrained(args.checkpoint)
    data_dir = str(args.data) if args.data else ensure(load_config(args.config).data)
    info = load_info(data_dir)
    if info.class_names != flow.info.class_names:
        raise UserError(
            f"--data {data_dir}: the model's {flow.info.num_classes} classes expected, found {info.num_classes}, or of "
            "other names; prepare the data for this model"
        )
    c = flow.evaluation(args.batch_size, num_samples=args.num_samples)
    c.seed = args.seed
    evaluator = Evaluator(flow.sampler, data_dir, info, mesh, c, flow.info.size, flow.codec.factor * flow.unet.factor)
    judges = Judges([load_features(*name_and_file(text)) for text in args.features], _load_lpips(args.lpips), mesh)
    study = Study(args, flow, evaluator, judges, args.split or final_split(count_records(data_dir)))
    result = study.run(_settings(args, flow))
    if jax.process_index() == 0:
        print(_table(result))
        print(f"result: {args.out}")


def _load_lpips(text: str | None):
    if text is None:
        return None
    name, _, paths = text.partition("=")
    backbone, _, lin = os.path.expandvars(paths).partition(",")
    return load_lpips(name, pathlib.Path(backbone), pathlib.Path(lin))


def _settings(args: argparse.Namespace, flow: SemFlow) -> list[Setting]:
    """One for each solver and number of steps, as the command says, and again for the averaged views."""
    default = flow.config["sampling"]
    averaged = Views(tuple(args.scales or (1.0,)), args.mirror)
    views = [Views()] if averaged == Views() else [Views(), averaged]
    solvers, steps = args.solver or [default["solver"]], args.steps or [default["steps"]]
    return [Setting(*chosen) for chosen in itertools.product(solvers, steps, views)]


class Study:
    """All rows of a result, written as they are done.

    Raises:
        UserError: the file of the result holds one of another protocol.
    """

    def __init__(self, args: argparse.Namespace, flow: SemFlow, evaluator: Evaluator, judges: Judges, split: str):
        self.args, self.flow, self.evaluator, self.judges, self.split = args, flow, evaluator, judges, split
        self.inputs = (
            parallel.everywhere(flow.params, evaluator.mesh),
            parallel.everywhere(flow.frozen, evaluator.mesh),
            split,
            args.limit,
        )
        self.protocol = self._protocol()
        self.partial = args.out.with_name(f"{args.out.name}.partial")
        self.result: dict[str, Any] = {"protocol": self.protocol} | {name: [] for name in SECTIONS}
        if args.out.exists():
            self._take_over()

    def _take_over(self) -> None:
        try:
            found = json.loads(self.args.out.read_text())
            differ = [key for key, x in self.protocol.items() if found["protocol"].get(key) != x]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            rule = "nothing, or a result of semflow evaluate expected"
            raise UserError(f"--out {self.args.out}: {rule}, found something else; name another ({error!r})") from None
        if differ:
            raise UserError(
                f"--out {self.args.out}: it holds a result of another protocol, {', '.join(differ)} differ; "
                "name another file, or delete it"
            )
        self.result = found

    def _protocol(self) -> dict[str, Any]:
        args, flow, info = self.args, self.flow, self.evaluator.info
        sums = sorted((name, digest) for name, digest in info.checksums.items() if f"-{self.split}." in name)
        fits = info.size == self.evaluator.size
        return {
            "data": {
                "name": info.name,
                "split": self.split,
                "split_sha256": hashlib.sha256(json.dumps(sums).encode()).hexdigest(),
                "num_images": self.evaluator.count(self.split, args.limit),
                "num_classes": info.num_classes,
                "fit": info.fit,
                "label_size": list(info.size),
            },
            "model": {
                "checkpoint": args.checkpoint,
                "params_sha256": parallel.digest(flow.params),
                "num_params": sum(x.size for x in flow.params.values()),
                "codec": flow.codec.name,
                "mask_code": flow.code.name,
                "dtype": flow.unet.dtype,
            },
            "size": list(self.evaluator.size),
            "resize": {
                "images": "none" if fits else "lanczos3, antialiased",
                "probabilities": "none" if fits else "bilinear",
                "labels": "none" if fits else "nearest",
            },
            "synthesis": self.judges.protocol() | {"samples_per_mask": args.num_samples, "resegmented": "the first"},
            "seed": args.seed,
            "version": __version__,
        }

    def run(self, settings: list[Setting]) -> dict[str, Any]:
        """All sections at all settings."""
        for setting in settings:
            for section in self.args.sections:
                if section == "segmentation" or setting.views == Views():
                    self._row(section, setting)
        self._external()
        if jax.process_index() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        return self.result

    def _row(self, section: str, setting: Setting) -> None:
        head = {"solver": setting.solver, "steps": setting.steps}
        if section == "segmentation":
            head["views"] = setting.views.names()
        pictures = self.args.pictures and self.args.pictures / _folder(head)
        others = [row for row in self.result[section] if not head.items() <= row.items()]
        known = next((row for row in self.result[section] if head.items() <= row.items()), None)
        if known is None or (section == "synthesis" and pictures and not pictures.is_dir()):
            found = head | self._figures(section, setting, head, pictures)
        else:
            found = known
        timed = self.args.time and section in self.evaluator.timed_fns and setting.views == Views()
        if timed and "seconds_per_image" not in found:
            seconds = self.evaluator.seconds_per_image(section, *self.inputs[:3], setting)
            found = found | {"seconds_per_image": seconds}
        if found is not known:
            self.result[section] = [*others, plain(found)]
            self._write()

    def _figures(
        self, section: str, setting: Setting, head: dict[str, Any], pictures: pathlib.Path | None
    ) -> dict[str, Any]:
        """A row, without its head."""
        title = f"{section}, {setting.solver} {setting.steps}" + (", averaged" if setting.views != Views() else "")
        name = hashlib.sha256(json.dumps([self.protocol, section, head]).encode()).hexdigest()[:32]
        options = {"progress": title, "setting": setting, "keep": self.partial / f"{name}.npz"}
        if section == "segmentation":
            return self.evaluator.segmentation(*self.inputs, **options)
        if section == "flow":
            return self.evaluator.geometry(*self.inputs, **options)
        self.judges.pictures = pictures
        found = self.evaluator.synthesis(*self.inputs, **options, judge=self.judges.look)
        return found | self.judges.figures(found.pop("judged"))

    def _external(self) -> None:
        """What another segmenter made of the pictures of each row."""
        if self.args.predictions is None:
            return
        for row in self.result["synthesis"]:
            folder = self.args.predictions / _folder(row)
            if folder.is_dir():
                e = self.evaluator
                found = score_predictions(folder, e.data_dir, self.split, e.info, e.size, self.args.limit)
                row["external"] = plain({"predictions": str(self.args.predictions)} | found)
        if not any("external" in row for row in self.result["synthesis"]):
            names = ", ".join(_folder(row) for row in self.result["synthesis"])
            raise UserError(f"--predictions {self.args.predictions}: one of {names} expected in it, found none")
        self._write()

    def _write(self) -> None:
        if jax.process_index() == 0:
            write_json(self.args.out, self.result)


def _folder(row: dict[str, Any]) -> str:
    """Of the pictures of a row."""
    return f"{row['solver']}-{row['steps']}"


def _table(result: dict[str, Any]) -> str:
    """The most asked for figures."""
    return "\n".join(line for section in SECTIONS for line in _lines(section, result[section]))


def _lines(section: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        figures = {name: row[name] for name in SHOWN[section] if row.get(name) is not None}
        for net, found in row.get("distances", {}).items():
            figures |= {f"{'FID' if net == 'inception_fid' else f'Fréchet ({net})'}": found["frechet"]}
        if "external" in row:
            figures["external_miou"] = row["external"]["miou"]
        views = "" if len(row.get("views", ())) < 2 else f", {len(row['views'])} views"
        text = ", ".join(f"{name} {x:.4g}" for name, x in figures.items())
        yield f"{section}, {row['solver']} {row['steps']}{views}: {text}"
