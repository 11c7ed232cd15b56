"""Trains a flow: `python main.py --config=configs/NAME.py --workdir=DIR [--config.key=value]`.

Prepares the data where it is not prepared yet, trains (from the last checkpoint, if there is one), evaluates on the
test split, and writes DIR/report.html, DIR/report.json, DIR/gallery.png and the model, DIR/export.
"""

import json
import logging
import os
import pathlib
import platform
import sys
import time
import traceback

import jax
from absl import app, flags
from ml_collections import config_flags

from semflow_jax import parallel
from semflow_jax.errors import UserError
from semflow_jax.evaluate.report import write_report
from semflow_jax.pipeline import CARD, EXPORT, SemFlow, make_card
from semflow_jax.train import loop
from semflow_jax.train.setup import check_unchanged, make_setup
from semflow_jax.train.writer import read_metrics
from semflow_jax.version import __version__

CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, report.")
START = float(os.environ.get("SEMFLOW_START_TIME", time.time()))  # a launcher counts its installation in

log = logging.getLogger("semflow_jax")


def run(workdir: pathlib.Path) -> None:
    c = CONFIG.value
    parallel.use_cpu_devices(c.cpu_devices)
    parallel.initialize()
    main_process = jax.process_index() == 0
    if (workdir / "report.json").exists():
        check_unchanged(c, workdir)
        digest = json.loads((workdir / "report.json").read_text())["params_sha256"]
        if main_process:
            page = workdir / "report.html"
            print(f"params_sha256 {digest}\ndone already: see {page} (delete {workdir} to start over)")
        return
    setup = make_setup(c, workdir)
    state = loop.train(setup, workdir)
    digest = parallel.digest(state["params"])

    params, frozen = state["ema"], parallel.everywhere(setup.sampler.frozen, setup.mesh)
    whole = {path: parallel.to_host(x) for path, x in params.items()}
    if main_process:
        flow = SemFlow(setup.model, whole, setup.sampler.codec, setup.sampler.code, setup.sampler.context)
        flow.save_pretrained(workdir / EXPORT)
    parallel.wait_for_all("the model is saved")
    limit = c.eval.limit_final
    split = setup.final_split
    segmentation = setup.evaluator.segmentation(params, frozen, split, limit, progress="segment")
    synthesis = setup.evaluator.synthesis(params, frozen, split, limit, progress="synthesize")
    gallery = setup.evaluator.gallery(params, frozen, split)
    rows = read_metrics(workdir)
    result = {
        "segmentation": segmentation,
        "synthesis": synthesis,
        "train": loop.summarize(rows) | {"code_seconds": setup.code_seconds},
        "wall_seconds": time.time() - START,
        "params_sha256": digest,
        "num_params": loop.count_params(params),
        "sampling": c.sampling.to_dict(),
        "data": setup.info.to_dict() | {"split": split, "limit": limit},
        "config": json.loads(c.to_json_best_effort()),
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.device_count()} {jax.devices()[0].device_kind}",
        "versions": {"semflow_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
    }
    if not main_process:
        return
    (workdir / EXPORT / CARD).write_text(make_card(result, setup.info))
    write_report(workdir, result, gallery, setup.info, setup.sampler.code.colours, rows)
    print(
        f"{split} mIoU {segmentation['miou']:.3f} (codec's ceiling {segmentation['codec_ceiling_miou']:.3f}), "
        f"pixel accuracy {segmentation['pixel_accuracy']:.4f}, "
        f"re-segmentation mIoU {synthesis['resegmentation_miou']:.3f}, diversity {synthesis['diversity']:.3f}\n"
        f"params_sha256 {digest}\nreport: {workdir / 'report.html'}"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    log.setLevel(logging.INFO)
    parallel.keep_compilations()
    try:
        run(pathlib.Path(WORKDIR.value or ""))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        parallel.leave(parallel.USER_ERROR)
    except Exception:
        traceback.print_exc()
        parallel.leave(1)


def parse_flags(argv: list[str]) -> list[str]:
    """As absl does, but a mistyped file or key of a config is one line."""
    try:
        rest = app.parse_flags_with_usage(argv)
        _ = CONFIG.value.seed  # ml_collections tells of a file that it can't load when it is first used
    except (AttributeError, KeyError, OSError) as error:
        cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
        found = " ".join(" ".join(str(part) for part in cause.args).split())
        print(f"error: --config: a file with get_config(), and its keys, got {found}; correct it", file=sys.stderr)
        sys.exit(2)
    return rest


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
