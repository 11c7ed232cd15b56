"""`semflow compare`: two or more results of `semflow evaluate` side by side, after what differs in how they came about.

Rows are joined by solver, steps and views. Figures by class are left to the results themselves.
"""

import argparse
import itertools
import json
import pathlib
import string
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, ScalarFormatter

from semflow_jax.errors import UserError
from semflow_jax.evaluate.output import flatten

SECTIONS = ("segmentation", "synthesis", "flow")
# Keys of a protocol that say which model was evaluated, where and when; what is under them may differ.
HARMLESS = ("command", "date", "machine", "model")
SECONDS = "seconds_per_image"  # the key of a row, where it was measured
FID_NETWORK = "inception_fid"  # the one network whose Fréchet distance is known as FID


class Key(NamedTuple):
    """What rows are joined by."""

    solver: str
    steps: int | None
    views: tuple[str, ...]

    def __str__(self) -> str:
        steps = "" if self.steps is None else f", {self.steps} step{'s' * (self.steps != 1)}"
        return self.solver + steps + (f"; views: {', '.join(self.views)}" if self.views else "")


Table = dict[Key, dict[str, float]]  # of each row of a section the figures, by dotted name


class Run(NamedTuple):
    """A result by its letter."""

    letter: str
    path: pathlib.Path
    protocol: dict[str, Any]
    figures: dict[str, Table]

    @property
    def name(self) -> str:
        return f"{self.letter}: {self.path.resolve().parent.name or self.path.stem}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=pathlib.Path, nargs="+", metavar="RESULT", help="result.json of an evaluation")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="draw plots into this folder, PNGs")


def run(args: argparse.Namespace) -> None:
    """Raises UserError for files that can't be compared."""
    print(compare(args.results, args.out))


def compare(paths: Sequence[pathlib.Path], out: pathlib.Path | None) -> str:
    """What differs in the protocols, and a table of all figures with the differences to the first run's.

    Args:
        paths: files of `semflow evaluate`, two or more.
        out: folder for `miou.png` and one `frechet_NETWORK.png` for every network, and the same against seconds where
            they were measured; None draws nothing.

    Raises:
        UserError: a file is missing, is no JSON, or no result.
    """
    if not 2 <= len(paths) <= len(string.ascii_uppercase):
        raise UserError(f"semflow compare: 2 to {len(string.ascii_uppercase)} results expected, got {len(paths)}")
    runs = [_load(letter, path) for letter, path in zip(string.ascii_uppercase, paths, strict=False)]
    lines = [f"{run.letter} = {run.path}" for run in runs]
    serious, harmless = _differences(runs)
    if serious:
        lines += ["", "WARNING: the protocols differ; figures under different protocols are not comparable.", *serious]
    else:
        lines += ["", "The protocols are the same."]
    if harmless:
        lines += ["", "Differs, as it may:", *harmless]
    lines += ["", *_table(runs)]
    if out is not None:
        lines += ["", *(f"plot: {path}" for path in _plots(runs, out, bool(serious)))]
    return "\n".join(lines)


def _load(letter: str, path: pathlib.Path) -> Run:
    if not path.is_file():
        raise UserError(f"{path}: a result.json of semflow evaluate expected, found no file; correct it")
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: JSON expected, found something else ({reason}); evaluate again") from None
    sections = {name: result.get(name) or [] for name in SECTIONS} if isinstance(result, dict) else {}
    if not sections or not isinstance(result.get("protocol"), dict) or not all(map(_is_section, sections.values())):
        rule = f'"protocol" and rows in {", ".join(SECTIONS)} expected'
        raise UserError(f"{path}: {rule}, found something else; name a result.json of semflow evaluate")
    return Run(letter, path, result["protocol"], {name: _figures(path, name, rows) for name, rows in sections.items()})


def _is_section(rows: Any) -> bool:
    """Whether these are rows that can be joined with others."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("solver"), str)
        and isinstance(row.get("steps"), int | None)
        and isinstance(row.get("views"), list | None)
        for row in rows
    )


def _figures(path: pathlib.Path, section: str, rows: list[dict[str, Any]]) -> Table:
    found: Table = {}
    for row in rows:
        key = Key(row["solver"], row.get("steps"), tuple(map(str, row.get("views") or ())))
        if key in found:
            raise UserError(f"{path}: {section}: one row of each kind expected, found two of {key}; take one out")
        found[key] = {
            name: float(value)
            for name, value in flatten({name: value for name, value in row.items() if name not in Key._fields})
            if isinstance(value, int | float) and "class_iou" not in name
        }
    return found


def _differences(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """A line for each key of the protocols whose values differ: those that matter, and those that may differ."""
    protocols = [dict(flatten(run.protocol)) for run in runs]
    serious: list[str] = []
    harmless: list[str] = []
    for key in dict.fromkeys(key for protocol in protocols for key in protocol):
        values = [json.dumps(protocol[key], ensure_ascii=False) if key in protocol else "-" for protocol in protocols]
        if len(set(values)) > 1:
            (harmless if key.split(".")[0] in HARMLESS else serious).append(f"  {key}: {' | '.join(values)}")
    return serious, harmless


def _table(runs: Sequence[Run]) -> list[str]:
    """Lines: rows by section and key, a column for each run, beside each but the first what it differs by."""
    first, *others = runs
    titles = ["", first.letter, *(text for run in others for text in (run.letter, f"{run.letter} - {first.letter}"))]
    cells: list[list[str]] = [titles]
    for section in SECTIONS:
        tables = [run.figures[section] for run in runs]
        for key in dict.fromkeys(key for table in tables for key in table):
            cells += [[""], [f"{section}: {key}"]]
            rows = [table.get(key, {}) for table in tables]
            for name in dict.fromkeys(name for row in rows for name in row):
                base, *values = (row.get(name) for row in rows)
                cells.append(["  " + name, _text(base), *(text for x in values for text in (_text(x), _gap(x, base)))])
    widths = [max(len(row[i]) for row in cells if len(row) == len(titles)) for i in range(len(titles))]

    def line(row: list[str]) -> str:
        first, *others = row + [""] * (len(titles) - len(row))
        return "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()

    return [line(row) for row in cells]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:#.4g}"


def _gap(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value - base:+#.3g}"


def _plots(runs: Sequence[Run], out: pathlib.Path, differ: bool) -> Iterator[pathlib.Path]:
    """Draws what there are figures of, against the number of steps and against seconds."""
    out.mkdir(parents=True, exist_ok=True)
    warning = "The runs' protocols differ: not comparable." if differ else ""
    plots = {("segmentation", "miou"): ("miou", "mIoU")}
    for name in dict.fromkeys(name for run in runs for row in run.figures["synthesis"].values() for name in row):
        section, _, rest = name.partition(".")
        network, _, metric = rest.partition(".")
        if section == "distances" and metric == "frechet":  # of one sample per mask, not of all
            kind = "FID" if network == FID_NETWORK else "Fréchet distance"
            plots["synthesis", name] = (f"frechet_{network}", f"{kind} (features of {network})")
    for ((section, name), (stem, title)), timed in itertools.product(plots.items(), (False, True)):
        figure = _draw(runs, section, name, title, warning, timed)
        if figure is not None:
            path = out / f"{stem}{'_seconds' if timed else ''}.png"
            figure.savefig(path, dpi=150, metadata={"Software": None})
            yield path


def _draw(runs: Sequence[Run], section: str, name: str, title: str, warning: str, timed: bool) -> Figure | None:
    """A line for each run, or for each solver and views of it where there are several; colours are the runs'.

    Args: timed: against seconds, not against steps.
    """
    kinds = list(dict.fromkeys((key.solver, key.views) for run in runs for key in run.figures[section]))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ticks: set[float] = set()
    for i, run in enumerate(runs):
        rows = run.figures[section]
        for kind in kinds:
            places = [(row.get(SECONDS) if timed else k.steps, row) for k, row in rows.items() if k[::2] == kind]
            line = sorted((x, row[name]) for x, row in places if x and name in row)
            if line:
                label = run.name if len(kinds) == 1 else f"{run.name}, {Key(kind[0], None, kind[1])}"
                axes.plot(
                    *zip(*line, strict=True), color=f"C{i}", marker="osD^vPX*"[kinds.index(kind) % 8], label=label
                )
                ticks.update(x for x, _ in line)
        for ceiling in {row[f"ceiling.{name}"] for row in rows.values() if f"ceiling.{name}" in row}:
            dashes = (3 * i, (3, 3 * (len(runs) - 1)))  # equal ceilings show all their runs' colours
            label = f"{run.letter}: codec's ceiling"
            axes.axhline(ceiling, color=f"C{i}", linestyle=dashes, linewidth=1.2, label=label)
    if not ticks:
        return None
    axes.set_xscale("log", base=2)
    # Seconds often lie within one octave, which would leave their axis with one number.
    locator = LogLocator(10, subs=(1, 1.2, 1.5, 2, 3, 5, 7)) if timed else FixedLocator(sorted(ticks))
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("seconds per image" if timed else "steps")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, handlelength=4)
    figure.suptitle(warning, color="tab:red", fontsize=9)
    return figure
