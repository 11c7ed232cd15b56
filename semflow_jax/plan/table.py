"""A plan for eyes: one candidate in words, and a table of many."""

from typing import Any

from semflow_jax.plan.chips import GIB

BOUNDS = {"compute": "FLOPs / peak", "hbm": "HBM bytes / bandwidth", "ici": "bytes between chips / links"}
Row = dict[str, Any]


def find_best(rows: list[Row]) -> dict[str, int]:
    """The place of the fastest row, of those that fit, of each program."""
    best: dict[str, int] = {}
    for i, row in enumerate(rows):
        name = row["program"]
        if row["fits"] and (name not in best or row["images_per_second"] > rows[best[name]]["images_per_second"]):
            best[name] = i
    return best


def _change(row: Row) -> str:
    return " ".join(f"{key}={value}" for key, value in row["change"].items())


def _short(number: float | int, unit: str) -> str:
    """Three digits and a prefix: 1.23 GB."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number / 1e-6:.3g} u{unit}"


def describe(row: Row) -> str:
    """One candidate, on some ten lines."""
    title = f"{row['program']} on {row['topology']}, {row['num_chips']} chips, {row['images']} images a step"
    needed, limit = row["hbm_needed_bytes"] / GIB, row["hbm_limit_bytes"] / GIB
    spare = limit - needed
    verdict = f"fits, {spare:.2f} GiB to spare" if row["fits"] else f"does not fit, by {-spare:.2f} GiB"
    each = _short(row["model_flops"] / row["images"], "FLOP")
    lines = [
        f"{title} {_change(row)}".rstrip() + (" (reduced network)" if row["reduced"] else ""),
        f"  HBM per chip     {'' if 'seconds' in row else 'at least '}{needed:.2f} of {limit:.2f} GiB: {verdict}",
        f"  model            {_short(row['model_flops'], 'FLOP')} a step, {each} an image",
    ]
    if "seconds" not in row:
        return "\n".join(lines)
    moved = _short(row["hbm_bytes_moved"], "B")
    lines.append(f"  each chip        {_short(row['chip_flops'], 'FLOP')}, {moved} from and to HBM")
    for c in row["collectives"]:
        times = "once" if c["count"] == 1 else f"{c['count']} times"
        sizes = f"{_short(c['bytes'], 'B')}, the largest {_short(c['largest_bytes'], 'B')}"
        lines.append(f"  {c['kind']:<16} {times}, {c['group']} chips each, {sizes}" + ", in a loop" * c["in_loop"])
    for name, seconds in row["seconds_by_bound"].items():
        lines.append(f"  {_short(seconds, 's'):<16} {BOUNDS[name]}" + "  <- the bound" * (name == row["bound"]))
    lines.append(f"  at best          {row['images_per_second']:.1f} images/s, MFU {row['mfu']:.1%}")
    if "days" in row:
        whole = f"{row['days']:.3g} days, {row['chip_hours']:.3g} chip-hours"
        lines.append(f"  the whole run    {row['num_steps']} steps: {whole}")
    if row["unknown_loops"]:
        lines.append(f"  {row['unknown_loops']} loops don't tell their turns: taken to be the solver's steps")
    if row["kernels"]:
        lines.append(f"  {row['kernels']} kernels, whose FLOPs are the model's")
    return "\n".join(lines)


def make_table(rows: list[Row], best: dict[str, int]) -> str:
    """All candidates, a line each; the best of each program is marked."""
    head = ["", "program", "change", "GiB", "bound", "ms", "MFU", "images/s", "days"]
    lines = [head]
    for i, row in enumerate(rows):
        cells = ["*" if best.get(row["program"]) == i else "", row["program"], _change(row)]
        cells.append(f"{row['hbm_needed_bytes'] / GIB:.2f}" + ("" if row["fits"] else " too much"))
        if "seconds" in row:
            cells += [row["bound"], f"{row['seconds'] * 1e3:.3g}"]
            cells += [f"{row['mfu']:.1%}", f"{row['images_per_second']:.1f}"]
            cells.append(f"{row['days']:.3g}" if "days" in row else "")
        lines.append(cells + [""] * (len(head) - len(cells)))
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join("  ".join(f"{cell:<{n}}" for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)
