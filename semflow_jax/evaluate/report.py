"""What a run leaves to look at: `report.html`, one page that needs nothing else, `report.json`, and `gallery.png`."""

import base64
import dataclasses
import io
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont

from semflow_jax.data.info import DataInfo
from semflow_jax.evaluate.output import flatten, plain, write, write_json
from semflow_jax.palette import VOID_COLOUR

TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")
MAX_SIDE = 224  # pixels of a picture in the report: twice what the page shows, for dense screens
# Colours matplotlib draws with, and the page's own, which follow light and dark mode, in their place.
THEME = {"#010101": "var(--muted)", "#020202": "var(--line)", "#030303": "var(--accent)", "#040404": "var(--second)"}
MUTED, LINE, ACCENT, SECOND = THEME


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Pictures of a report.

    Attributes:
        image: held-out images.
        label: their true class ids; ids without a colour (void) are drawn white.
        prediction: class ids segmented from `image`.
        samples: images synthesized from `label`, with s perturbation seeds.
        frames: decoded states of the ODE at f evenly spaced times, from images (t = 0) to their masks (t = 1), p rows.
    """

    image: UInt8[np.ndarray, "g h w 3"]
    label: UInt8[np.ndarray, "g h w 1"]
    prediction: UInt8[np.ndarray, "g h w 1"]
    samples: UInt8[np.ndarray, "s g h w 3"]
    frames: UInt8[np.ndarray, "f p h w 3"]


def write_report(
    out_dir: pathlib.Path,
    result: dict[str, Any],
    gallery: Gallery,
    info: DataInfo,
    colours: UInt8[np.ndarray, "n 3"],
    metrics: list[dict[str, Any]],
) -> None:
    """Writes `report.html`, `report.json` and `gallery.png`; each appears when it is whole.

    Args:
        out_dir: made where it does not exist.
        result: figures by name, nested, with "segmentation" as `evaluate.segmentation.scores` gives it. Of "synthesis",
            "train", "config" and the like the page shows what is there. Figures that are not finite become null.
        gallery: the pictures.
        info: the data set's names, licence and attribution.
        colours: of the classes.
        metrics: rows of `metrics.jsonl`.
    """
    result = plain(result)
    columns = _columns(gallery, colours)
    occurring = np.union1d(gallery.label, gallery.prediction)
    h, w = gallery.image.shape[1:3]
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        info=info,
        subtitle=_subtitle(result, info),
        cards=_cards(result),
        titles=list(columns),
        rows=[[_data_uri(picture) for picture in row] for row in zip(*columns.values(), strict=True)],
        legend=[(name, _hex(c)) for i, (name, c) in enumerate(_named(info, colours)) if i in occurring],
        void=_hex(VOID_COLOUR) if occurring.size and occurring.max() >= len(colours) else None,
        times=[f"{t:.3g}" for t in np.linspace(0, 1, len(gallery.frames))],
        paths=[[_data_uri(frame) for frame in path] for path in _shrink(gallery.frames.swapaxes(0, 1))],
        cell=round(112 * math.sqrt(w / h)),  # equal areas, whatever the shape
        crisp=max(h, w) <= 112,
        curves=_curves(plain(metrics), _find(result, "segmentation", "codec_ceiling_miou")),
        **_class_table(result, info, colours),
        config=_leaves(result.get("config") or {}),
        run=[(k, v) for k, v in _leaves({k: v for k, v in result.items() if k != "config"}) if "class_iou" not in k],
        sha256=result.get("params_sha256"),
    )
    picture = io.BytesIO()
    contact_sheet(columns).save(picture, "png", optimize=True)
    write_json(out_dir / "report.json", result)
    write(out_dir / "gallery.png", picture.getvalue())
    write(out_dir / "report.html", page.encode())


def _find(tree: Any, *keys: str) -> Any:
    """The value under `keys`, None where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _leaves(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """By dotted key, as they are shown."""
    return [(key, "" if x is None else x) for key, x in flatten(tree) if x != {}]


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h} h {m:02} min" if h else f"{m} min {s:02} s" if m else f"{s} s"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _subtitle(result: dict[str, Any], info: DataInfo) -> str:
    num_params, steps, sampling = result.get("num_params"), _find(result, "train", "steps"), result.get("sampling")
    facts = [f"{info.size[0]} x {info.size[1]} pixels", f"{info.num_classes} classes"]
    if num_params:
        facts.append(f"{num_params / 1e6:.1f} M parameters")
    if steps:
        facts.append(f"{steps:,} training steps")
    if sampling:
        facts.append(f"{sampling['steps']} sampling steps ({sampling['solver']})")
    return " · ".join(facts)


def _card(title: str, value: str, unit: str, note: str, share: float | None = None, mark: float | None = None) -> dict:
    """A headline figure; `share` of 1 is drawn as a bar, with a mark on it."""
    return {"title": title, "value": value, "unit": unit, "note": note, "share": share, "mark": mark}


def _cards(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The headline figures that are there."""
    cards = []
    ceiling = _find(result, "segmentation", "codec_ceiling_miou")
    for title, keys, mark, note in (
        ("mIoU", ("segmentation", "miou"), ceiling, "image → mask"),
        ("pixel accuracy", ("segmentation", "pixel_accuracy"), None, "image → mask"),
        ("re-segmentation mIoU", ("synthesis", "resegmentation_miou"), ceiling, "mask → image → mask"),
    ):
        share = _find(result, *keys)
        if share is not None:
            note += "" if mark is None else f"; codec ceiling {_percent(mark)} %"
            cards.append(_card(title, _percent(share), "%", note, share, mark))
    diversity = _find(result, "synthesis", "diversity")
    if diversity is not None:
        cards.append(_card("diversity", f"{diversity:.3f}", "", "RMS between two images of a mask, 0 to 1"))
    speed, steps, seconds = (_find(result, "train", key) for key in ("images_per_second", "steps", "seconds"))
    if speed is not None:
        note = "" if None in (steps, seconds) else f"{steps:,} steps in {_duration(seconds)}"
        cards.append(_card("training speed", f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}", "images/s", note))
    if result.get("wall_seconds") is not None:
        cards.append(_card("wall time", _duration(result["wall_seconds"]), "", "the whole run"))
    return cards


def _named(info: DataInfo, colours: UInt8[np.ndarray, "n 3"]) -> Iterator[tuple[str, np.ndarray]]:
    return zip(info.class_names, colours, strict=True)


def _class_table(result: dict[str, Any], info: DataInfo, colours: UInt8[np.ndarray, "n 3"]) -> dict[str, Any]:
    """Template variables `iou_titles`, and `iou_rows`: name, colour, IoU by column or None where a class is absent."""
    columns = {
        "predicted": _find(result, "segmentation", "class_iou"),
        "codec ceiling": _find(result, "segmentation", "ceiling", "class_iou"),
        "re-segmentation": _find(result, "synthesis", "resegmentation_class_iou"),
    }
    columns = {title: column for title, column in columns.items() if column}
    rows = [(name, _hex(c), [column.get(name) for column in columns.values()]) for name, c in _named(info, colours)]
    return {"iou_titles": list(columns), "iou_rows": rows if columns else []}


def _hex(colour: Any) -> str:
    return "#" + bytes(int(x) for x in colour).hex()


def _factor(h: int, w: int) -> int:
    return -(-max(h, w) // MAX_SIDE)


def _shrink(images: UInt8[np.ndarray, "*b h w 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    """By a whole factor, means of blocks."""
    *b, h, w, _ = images.shape
    small = [np.asarray(Image.fromarray(x).reduce(_factor(h, w))) for x in images.reshape(-1, h, w, 3)]
    return np.stack(small).reshape(*b, *small[0].shape) if small else images


def paint(label: UInt8[np.ndarray, "g h w 1"], colours: UInt8[np.ndarray, "n 3"]) -> UInt8[np.ndarray, "g H W 3"]:
    """Class ids in colours, void in white, in the size that reports show."""
    table = np.array([VOID_COLOUR] * 256, np.uint8)
    table[: len(colours)] = colours
    factor = _factor(*label.shape[1:3])
    return table[label[:, ::factor, ::factor, 0]]


def _columns(gallery: Gallery, colours: UInt8[np.ndarray, "n 3"]) -> dict[str, UInt8[np.ndarray, "g H W 3"]]:
    """The gallery's columns by title, as pictures."""
    return {
        "image": _shrink(gallery.image),
        "true mask": paint(gallery.label, colours),
        "predicted mask": paint(gallery.prediction, colours),
        **{f"synthesis, seed {i}": x for i, x in enumerate(_shrink(gallery.samples), start=1)},
    }


def _data_uri(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def contact_sheet(columns: dict[str, UInt8[np.ndarray, "g h w 3"]], gap: int = 8, header: int = 24) -> Image.Image:
    """The gallery as one picture on white, titles above the columns."""
    g, h, w, _ = next(iter(columns.values())).shape
    zoom = max(1, round(128 / w))
    h, w = h * zoom, w * zoom
    sheet = Image.new("RGB", (gap + len(columns) * (w + gap), header + g * (h + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for i, (title, pictures) in enumerate(columns.items()):
        x = gap + i * (w + gap)
        draw.text((x + w / 2, header / 2), title, fill="#444", font=font, anchor="mm")
        for j, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture).resize((w, h), Image.Resampling.NEAREST), (x, header + j * (h + gap)))
    return sheet


def _series(metrics: list[dict[str, Any]], name: str) -> Float[np.ndarray, "2 n"]:
    """Steps and values of the rows that have a finite `name`."""
    return np.array([(row["step"], row[name]) for row in metrics if row.get(name) is not None], float).reshape(-1, 2).T


def _thin(series: Float[np.ndarray, "2 n"], limit: int = 1000) -> Float[np.ndarray, "2 m"]:
    """Means of as many neighbours as leave at most `limit` points; a remainder is left out, at the start."""
    every = -(-series.shape[1] // limit)
    return series[:, series.shape[1] % every :].reshape(2, -1, every).mean(2)


def _smooth(y: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Means under a centred Gaussian whose sigma is a fiftieth of the series."""
    sigma = len(y) / 50
    reach = math.ceil(3 * sigma)
    weight = np.exp(-((np.arange(-reach, reach + 1) / sigma) ** 2) / 2)

    def total(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return np.convolve(np.pad(values, reach), weight, "valid")

    return total(y) / total(np.ones_like(y))


def _curves(metrics: list[dict[str, Any]], ceiling: float | None) -> list[tuple[str, str]]:
    """(caption, SVG) of the loss and of the validation mIoU, each where there is more than one point."""
    curves = []
    loss, miou = _series(metrics, "loss"), _series(metrics, "val/miou")
    if loss.shape[1] > 1:
        steps, y = _thin(loss)
        smooth = _smooth(y)
        figure, axes = _figure()
        axes.plot(steps, y, color=ACCENT, alpha=0.3, linewidth=0.8)
        axes.plot(steps, smooth, color=ACCENT, linewidth=1.6)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        curves.append((f"Training loss, smoothed; last {smooth[-1]:.3g}", _svg(figure, "loss")))
    if miou.shape[1] > 1:
        steps, y = miou
        figure, axes = _figure()
        axes.plot(steps, 100 * y, color=ACCENT, linewidth=1.6, marker="o", markersize=3)
        if ceiling is not None:
            axes.axhline(100 * ceiling, color=SECOND, linewidth=1.2, linestyle=(0, (4, 3)))
            left = axes.get_yaxis_transform()
            axes.text(0, 100 * ceiling - 2, "codec ceiling", color=SECOND, fontsize=9, va="top", transform=left)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        curves.append((f"Validation mIoU in %; last {_percent(y[-1])}, best {_percent(y.max())}", _svg(figure, "miou")))
    return curves


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(5, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("step", color=MUTED, fontsize=9)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """Inline SVG: text stays text, ids are the name's own, colours are the page's."""
    data = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(data, format="svg", transparent=True, metadata=nothing)
    svg = data.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, shown in THEME.items():
        svg = svg.replace(drawn, shown)
    return svg
