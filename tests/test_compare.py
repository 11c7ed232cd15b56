"""evaluate/compare.py: tables and plots of made-up results."""

import argparse
import copy
import json
import pathlib
import re

import pytest
from matplotlib.figure import Figure
from PIL import Image

from semflow_jax.errors import UserError
from semflow_jax.evaluate import compare

RESULT = {
    "protocol": {
        "data": {"name": "avatars", "split": "test"},
        "num_images": 400,
        "seeds": [0, 1],
        "model": {"sha256": "abc"},
        "date": "2026-01-01",
    },
    "segmentation": [
        {
            "solver": "euler",
            "steps": steps,
            "views": ["1", "1 mirrored"],
            "miou": miou,
            "pixel_accuracy": None,
            "class_iou": {"sky": 0.123},
            "ceiling": {"miou": 0.985, "class_iou": {"sky": 0.456}},
        }
        for steps, miou in ((1, 0.7), (25, 0.9))
    ],
    "synthesis": [
        {
            "solver": "euler",
            "steps": steps,
            "distances": {
                "efficientnet_lite0": {"frechet": 30 / steps, "kid": 0.1, "all_samples": {"frechet": 1.5}},
                "inception_fid": {"frechet": 20.0},
            },
        }
        for steps in (25, 1)
    ],
    "flow": [{"solver": "tsit5", "steps": None, "straightness": 0.031}],
}


def write(folder: pathlib.Path, *changes) -> pathlib.Path:
    """A result with the leaves at some dotted keys changed, or taken out."""
    result = copy.deepcopy(RESULT)
    for keys, value in changes:
        *parents, last = (int(key) if key.isdigit() else key for key in keys.split("."))
        place = result
        for key in parents:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    folder.mkdir()
    path = folder / "result.json"
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by name of their file."""
    found = {}
    save = Figure.savefig

    def keep(figure, path, **options):
        found[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def rows(text: str) -> dict[str, dict[str, list[str]]]:
    """The table: cells by heading and figure."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        if re.match("(segmentation|synthesis|flow): ", line):
            found[line] = {}
        elif found and line.startswith("  "):
            name, *cells = line.split()
            list(found.values())[-1][name] = cells
    return found


def test_table(base, tmp_path):
    better = write(tmp_path / "better", ("segmentation.1.miou", 0.912), ("synthesis.1.distances.inception_fid", None))
    text = compare.compare([base, better], None)
    assert text.startswith(f"A = {base}\nB = {better}\n\nThe protocols are the same.\n")
    assert "WARNING" not in text and "plot" not in text
    table = rows(text)
    views = "views: 1, 1 mirrored"
    assert table == {
        f"segmentation: euler, 1 step; {views}": {
            "miou": ["0.7000", "0.7000", "+0.00"],
            "ceiling.miou": ["0.9850", "0.9850", "+0.00"],
        },
        f"segmentation: euler, 25 steps; {views}": {
            "miou": ["0.9000", "0.9120", "+0.0120"],
            "ceiling.miou": ["0.9850", "0.9850", "+0.00"],
        },
        "synthesis: euler, 25 steps": {
            "distances.efficientnet_lite0.frechet": ["1.200", "1.200", "+0.00"],
            "distances.efficientnet_lite0.kid": ["0.1000", "0.1000", "+0.00"],
            "distances.efficientnet_lite0.all_samples.frechet": ["1.500", "1.500", "+0.00"],
            "distances.inception_fid.frechet": ["20.00", "20.00", "+0.00"],
        },
        "synthesis: euler, 1 step": {
            "distances.efficientnet_lite0.frechet": ["30.00", "30.00", "+0.00"],
            "distances.efficientnet_lite0.kid": ["0.1000", "0.1000", "+0.00"],
            "distances.efficientnet_lite0.all_samples.frechet": ["1.500", "1.500", "+0.00"],
            "distances.inception_fid.frechet": ["20.00", "-"],
        },
        "flow: tsit5": {"straightness": ["0.03100", "0.03100", "+0.00"]},
    }


def test_columns_are_aligned(base, tmp_path):
    worse = write(tmp_path / "worse", ("segmentation.0.miou", 0.6), ("segmentation.1", None))
    lines = compare.compare([base, worse, base], None).splitlines()
    head = next(line for line in lines if line.split() == ["A", "B", "B", "-", "A", "C", "C", "-", "A"])
    cells = next(line for line in lines if line.split() == ["miou", "0.7000", "0.6000", "-0.100", "0.7000", "+0.00"])
    gone = next(line for line in lines if line.split() == ["miou", "0.9000", "-", "0.9000", "+0.00"])
    assert len(head) == len(cells) == len(gone)
    for title in (" A ", " B ", " B - A ", " C "):
        end = head.index(title) + len(title) - 1
        assert cells[end - 1] != " " and cells[end] == " "


def test_differences_of_protocol_come_first(base, tmp_path):
    changes = (
        ("protocol.num_images", 200),
        ("protocol.data.split", "val"),
        ("protocol.seeds", None),
        ("protocol.model.sha256", "def"),
        ("protocol.date", "2026-01-02"),
    )
    text = compare.compare([base, write(tmp_path / "other", *changes), base], None)
    warning, serious = text.index("WARNING"), text.index("\nDiffers, as it may:")
    for line in (
        '  data.split: "test" | "val" | "test"',
        "  num_images: 400 | 200 | 400",
        "  seeds: [0, 1] | - | [0, 1]",
    ):
        assert warning < text.index(line) < serious
    assert "not comparable" in text and "data.name" not in text
    for line in ('  model.sha256: "abc" | "def" | "abc"', '  date: "2026-01-01" | "2026-01-02" | "2026-01-01"'):
        assert serious < text.index(line) < text.index("segmentation:")


def test_the_model_may_differ(base, tmp_path):
    text = compare.compare([base, write(tmp_path / "other", ("protocol.model.sha256", "def"))], None)
    assert "WARNING" not in text and "Differs, as it may:\n  model.sha256" in text


def test_plots(base, tmp_path, figures):
    better = write(tmp_path / "better", ("segmentation.1.miou", 0.912), ("segmentation.0.miou", None))
    out = tmp_path / "new" / "plots"
    text = compare.compare([base, better], out)
    names = ["miou.png", "frechet_efficientnet_lite0.png", "frechet_inception_fid.png"]
    assert list(figures) == names
    assert re.findall("plot: (.*)", text) == [str(out / name) for name in names]
    for name in names:
        with Image.open(out / name) as picture:
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(10**6)) > 9
    axes = figures["miou.png"].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["A: base", "A: codec's ceiling", "B: better", "B: codec's ceiling"]
    assert lines["A: base"].get_xydata().tolist() == [[1, 0.7], [25, 0.9]]
    assert lines["B: better"].get_xydata().tolist() == [[25, 0.912]]
    assert set(lines["A: codec's ceiling"].get_ydata()) == {0.985} and lines["A: codec's ceiling"].is_dashed()
    own, fid = (figures[name].axes[0] for name in names[1:])
    assert own.get_title() == "Fréchet distance (features of efficientnet_lite0)"
    assert fid.get_title() == "FID (features of inception_fid)"
    assert own.lines[0].get_xydata().tolist() == [[1, 30], [25, 1.2]]  # by steps, whatever the order of rows
    assert figures["miou.png"].get_suptitle() == ""


def test_plots_against_seconds_where_they_were_measured(base, tmp_path, figures):
    timed = write(
        tmp_path / "timed", ("segmentation.0.seconds_per_image", 0.25), ("segmentation.1.seconds_per_image", 2.0)
    )
    compare.compare([base, timed], tmp_path / "out")
    assert "frechet_inception_fid_seconds.png" not in figures
    axes = figures["miou_seconds.png"].axes[0]
    assert axes.get_xlabel() == "seconds per image"
    (line,) = (line for line in axes.lines if line.get_label() == "B: timed")
    assert line.get_xydata().tolist() == [[0.25, 0.7], [2.0, 0.9]]


def test_seconds_within_an_octave_have_more_than_one_number(base, tmp_path, figures):
    timed = write(
        tmp_path / "timed", ("segmentation.0.seconds_per_image", 0.11), ("segmentation.1.seconds_per_image", 0.2)
    )
    compare.compare([base, timed], tmp_path / "out")
    axes = figures["miou_seconds.png"].axes[0]
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 3


def test_plots_tell_solvers_apart_and_that_protocols_differ(base, tmp_path, figures):
    other = write(tmp_path / "other", ("segmentation.1.solver", "heun"), ("protocol.num_images", 1))
    compare.compare([base, other], tmp_path / "out")
    labels = [line.get_label() for line in figures["miou.png"].axes[0].lines]
    assert [x for x in labels if "ceiling" not in x] == [
        "A: base, euler; views: 1, 1 mirrored",
        "B: other, euler; views: 1, 1 mirrored",
        "B: other, heun; views: 1, 1 mirrored",
    ]
    assert "not comparable" in figures["miou.png"].get_suptitle()


def test_nothing_to_draw(tmp_path):
    paths = [write(tmp_path / name, ("segmentation", None), ("synthesis", None)) for name in "ab"]
    assert "plot" not in compare.compare(paths, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_command(base, capsys):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    compare.run(parser.parse_args([str(base), str(base)]))
    assert capsys.readouterr().out == compare.compare([base, base], None) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\xff",
        "[]",
        "3",
        "{}",
        '{"protocol": []}',
        '{"protocol": {}, "flow": {"solver": "euler"}}',
        '{"protocol": {}, "flow": [3]}',
        '{"protocol": {}, "flow": [{"steps": 3}]}',
        '{"protocol": {}, "flow": [{"solver": "euler", "steps": "3"}]}',
        '{"protocol": {}, "flow": [{"solver": "euler", "steps": 3, "views": "plain"}]}',
        '{"protocol": {}, "flow": [{"solver": "euler", "steps": 3}, {"solver": "euler", "steps": 3}]}',
    ],
)
def test_what_is_no_result(base, tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        compare.compare([base, path], tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_is_not_there(base, tmp_path):
    with pytest.raises(UserError, match="found no file"):
        compare.compare([base, tmp_path / "nowhere.json"], None)
    with pytest.raises(UserError, match="2 to 26 results expected, got 1"):
        compare.compare([base], None)
