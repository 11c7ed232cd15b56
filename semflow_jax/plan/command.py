"""`semflow plan`: what a config would need and how fast it could be on a slice of a TPU pod that is not there."""

import argparse
import ast
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from semflow_jax.config_file import load_config
from semflow_jax.errors import UserError
from semflow_jax.plan.chips import Slice, make_devices, parse_slice
from semflow_jax.plan.compiling import compile_program
from semflow_jax.plan.costs import read_costs
from semflow_jax.plan.programs import NAMES, find_num_classes, make_programs
from semflow_jax.plan.roofline import Estimate
from semflow_jax.plan.table import describe, find_best, make_table

DAY = 86400
ABOUT = "All figures are the compiler's estimates and upper bounds of speed made of them; nothing was run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=pathlib.Path, required=True, help="a file with get_config(), as main.py's")
    slices = "v4:2x2x1, v5e:8x8, v5p:4x4x4, v6e:16x16"
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help=f"such as {slices}")
    parser.add_argument("--programs", default="train", help=f"of {', '.join(NAMES)}, with commas; default: train")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B", help="each of these values, and each with each other"
    )
    parser.add_argument("--classes", type=int, help="of the data set; default: what is known of it")
    parser.add_argument("--reduced", action="store_true", help="one block per level, to rank a sweep")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=pathlib.Path, metavar="FILE", help="keep the executable of one program")


def run(args: argparse.Namespace) -> None:
    """Raises UserError for what can't be planned."""
    jax.config.update("jax_platforms", "cpu")  # else JAX would look for the chips
    names = args.programs.split(",")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UserError(f"--programs: of {', '.join(NAMES)}, got {', '.join(unknown)}; correct it")
    part = parse_slice(args.topology)
    changes = list(itertools.product(*(_parse(text, many=True) for text in args.sweep)))
    if args.save is not None and (len(names) > 1 or len(changes) > 1):
        num = len(names) * len(changes)
        raise UserError(f"--save: one program expected, got {num}; leave out --sweep, and name one in --programs")
    base = load_config(args.config)
    _update(base, [pair for text in args.set for pair in _parse(text)])
    devices = make_devices(part)
    rows, refused = [], []
    for change in changes:
        try:
            for row in _plan(args, base, change, names, part, devices):
                rows.append(row)
                if not args.json:
                    print(describe(row), flush=True)
        except UserError as error:  # of a sweep, some values may not go with each other
            if len(changes) == 1:
                raise
            refused.append({"change": dict(change), "reason": str(error)})
            print(f"left out: {error}", file=sys.stderr)
    best = find_best(rows)
    if args.json:
        found = {"about": ABOUT, "config": str(args.config), "rows": rows, "refused": refused, "best": best}
        print(json.dumps(found, indent=2))
        return
    if len(changes) > 1:
        print(make_table(rows, best))
    print(ABOUT)


def _parse(text: str, many: bool = False) -> list[tuple[str, Any]]:
    """Text key=a,b -> [(key, a), (key, b)], or [(key, (a, b))] for one value; what is no Python literal is text."""
    key, equals, values = text.partition("=")
    if not equals:
        raise UserError(f"--set, --sweep: key=value expected, got {text!r}; write it so")
    if not many:
        return [(key, _literal(values))]
    whole = _literal(f"({values},)")  # of numbers, tuples and the like; text has no quotes, and is divided by hand
    return [(key, value) for value in (whole if isinstance(whole, tuple) else map(_literal, values.split(",")))]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _update(c: ConfigDict, changes: Any) -> None:
    for key, value in changes:
        try:
            c.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            rule = "a key of the config and a value of its type expected"
            raise UserError(f"--set, --sweep {key}: {rule}, got {value!r}; correct it ({reason})") from None


def _plan(
    args: argparse.Namespace, base: ConfigDict, change: Any, names: list[str], part: Slice, devices: list[jax.Device]
) -> Iterator[dict[str, Any]]:
    """A row for each program of one candidate."""
    c = base.copy_and_resolve_references()
    _update(c, change)
    programs = make_programs(c, devices, args.classes or find_num_classes(c), args.reduced)
    for name in names:
        program = programs[name]()
        compiled = compile_program(program, part, args.save)
        costs = read_costs(compiled.hlo, program.turns or 1) if compiled.hlo else None
        estimate = Estimate(part, program.num_images, compiled.model_flops, compiled.hbm_needed, costs)
        row = {"program": name, "change": dict(change), "reduced": args.reduced} | estimate.to_dict()
        if name == "train" and costs is not None:
            seconds = c.num_steps * estimate.seconds
            row |= {"num_steps": c.num_steps, "days": seconds / DAY, "chip_hours": seconds * part.num_chips / 3600}
        yield row
