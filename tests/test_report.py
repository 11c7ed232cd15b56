"""evaluate/report.py: a page that needs nothing else, strict JSON, and pictures that show what they should."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from semflow_jax.data.info import VOID, DataInfo
from semflow_jax.evaluate import report
from semflow_jax.evaluate.report import Gallery, write_report

NAMES = ("sky", "<b>road & co</b>", "tree")
COLOURS = np.array([(10, 20, 30), (200, 0, 0), (0, 200, 0)], np.uint8)
G, S, F, P = 3, 2, 4, 2
INFO = DataInfo(
    "<script>alert(1)</script>",
    NAMES,
    (6, 8),
    license="CC0, https://example.org/cc0",
    attribution='A "quoted" painter',
)
RESULT = {
    "segmentation": {
        "miou": np.float32(0.5),
        "pixel_accuracy": 0.75,
        "codec_ceiling_miou": 0.875,
        "class_iou": {"sky": 0.25, NAMES[1]: float("nan"), "tree": 0.75},
        "ceiling": {"class_iou": {"sky": 0.5, NAMES[1]: None, "tree": 1.0}},
    },
    "synthesis": {
        "resegmentation_miou": 0.375,
        "resegmentation_class_iou": dict.fromkeys(NAMES, 0.5),
        "diversity": float("inf"),
    },
    "train": {"steps": 2000, "images_per_second": 12.5, "seconds": 65.0},
    "wall_seconds": 3725.0,
    "params_sha256": "abc123",
    "num_params": 1_500_000,
    "config": {"optim": {"lr": 1e-4, "note": "<i>x</i>"}, "size": (6, 8)},
    "sampling": {"solver": "euler", "steps": 25},
}
METRICS = [{"step": i, "loss": 1 / i if i % 7 else float("nan")} for i in range(1, 50)] + [
    {"step": i, "val/miou": i / 100, "val/pixel_accuracy": 0.5} for i in (10, 20, 30)
]


def make_gallery(h: int = 6, w: int = 8) -> Gallery:
    rng = np.random.default_rng(0)

    def rgb(*shape):
        return rng.integers(0, 256, (*shape, h, w, 3), np.uint8)

    label = rng.integers(0, 3, (G, h, w, 1)).astype(np.uint8)
    label[0, 0, 0] = VOID
    return Gallery(rgb(G), label, label[::-1].copy(), rgb(S, G), rgb(F, P))


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside != "style":
            self.text += data

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs[name] for t, attrs in self.tags if t == tag]


def read_uri(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("report") / "made" / "here"
    write_report(out_dir, RESULT, make_gallery(), INFO, COLOURS, METRICS)
    return out_dir


@pytest.fixture(scope="module")
def text(out_dir) -> str:
    return (out_dir / "report.html").read_text(encoding="utf-8")


def test_page_needs_nothing_else(text):
    outside = []
    for tag, attrs in Page(text).tags:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            if not attrs.get(name, "#").startswith(("#", "data:")):
                outside.append((tag, attrs[name]))
    assert outside == [("a", "https://example.org/cc0")]
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_pictures_are_the_gallery(text):
    gallery, pictures = make_gallery(), [read_uri(uri) for uri in Page(text).attributes("img", "src")]
    assert len(pictures) == G * (3 + S) + P * F
    for i in range(G):
        image, label, prediction, *samples = pictures[i * (3 + S) : (i + 1) * (3 + S)]
        np.testing.assert_array_equal(image, gallery.image[i])
        np.testing.assert_array_equal(prediction[1:], COLOURS[gallery.prediction[i, 1:, :, 0]])
        np.testing.assert_array_equal(label[1:], COLOURS[gallery.label[i, 1:, :, 0]])
        np.testing.assert_array_equal(samples, gallery.samples[:, i])
    assert pictures[1][0, 0].tolist() == [255, 255, 255]  # void
    paths = np.stack(pictures[G * (3 + S) :]).reshape(P, F, 6, 8, 3)
    np.testing.assert_array_equal(paths.swapaxes(0, 1), gallery.frames)


def test_names_are_escaped(text):
    page = Page(text)
    for raw in ("<script>", "<b>road", "<i>x"):
        assert raw not in text
        assert raw in page.text


def test_figures_are_shown(text):
    shown = " ".join(Page(text).text.split())
    for figure in (
        "mIoU 50.0% image → mask; codec ceiling 87.5 %",
        "pixel accuracy 75.0%",
        "re-segmentation mIoU 37.5%",
        "12.5images/s 2,000 steps in 1 min 05 s",
        "1 h 02 min",
        "1.5 M parameters",
        "25 sampling steps (euler)",
        "t = 0 t = 0.333 t = 0.667 t = 1",
        "last 30.0, best 30.0",
        "optim.lr",
        "abc123",
        'A "quoted" painter',
    ):
        assert figure in shown, figure
    assert "diversity RMS" not in shown  # not finite
    assert Page(text).tags.count(("tr", {})) >= 1 + len(NAMES)
    assert text.count("<svg") == 2
    assert not re.search(r"\bnan\b|\binf\b|#0[1-4]0[1-4]0[1-4]", text)


def test_json_is_strict(out_dir):
    def refuse(constant):
        raise AssertionError(constant)

    loaded = json.loads((out_dir / "report.json").read_text(), parse_constant=refuse)
    assert loaded["segmentation"]["miou"] == 0.5
    assert loaded["segmentation"]["class_iou"] == {"sky": 0.25, NAMES[1]: None, "tree": 0.75}
    assert loaded["synthesis"]["diversity"] is None
    assert loaded["config"] == {"optim": {"lr": 1e-4, "note": "<i>x</i>"}, "size": [6, 8]}


def test_gallery_picture_has_a_cell_per_picture(out_dir):
    sheet = np.asarray(Image.open(out_dir / "gallery.png"))
    gallery, zoom = make_gallery(), 128 // 8
    assert sheet.shape == (24 + G * (6 * zoom + 8), 8 + (3 + S) * (8 * zoom + 8), 3)
    cell = sheet[24 : 24 + 6 * zoom, 8 : 8 + 8 * zoom]
    np.testing.assert_array_equal(cell[zoom // 2 :: zoom, zoom // 2 :: zoom], gallery.image[0])


def test_files_appear_whole(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    (tmp_path / "report.json").write_text("the last run's")
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_report(tmp_path, RESULT, make_gallery(), INFO, COLOURS, METRICS)
    assert (tmp_path / "report.json").read_text() == "the last run's"
    write_report(tmp_path, RESULT, make_gallery(), INFO, COLOURS, METRICS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.png", "report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["wall_seconds"] == 3725.0


def test_same_run_same_page(out_dir, tmp_path):
    write_report(tmp_path, RESULT, make_gallery(), INFO, COLOURS, METRICS)
    for path in out_dir.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_segmentation_alone_is_enough(tmp_path):
    result = {"segmentation": {"miou": float("nan"), "pixel_accuracy": 0.5}}
    write_report(tmp_path, result, make_gallery(), INFO, COLOURS, [{"step": 1, "loss": 1.0}])
    text = (tmp_path / "report.html").read_text()
    assert text.count('class="card"') == 1
    assert "<svg" not in text
    assert "IoU by class" not in text


def test_large_pictures_are_reduced_alike(tmp_path):
    write_report(tmp_path, RESULT, make_gallery(301, 451), INFO, COLOURS, [])
    pictures = [read_uri(uri) for uri in Page((tmp_path / "report.html").read_text()).attributes("img", "src")]
    assert {picture.shape for picture in pictures} == {(101, 151, 3)}


@pytest.mark.parametrize("num", [2, 3, 50, 2500])
def test_smoothing_keeps_constants_and_averages_noise(num):
    np.testing.assert_allclose(report._smooth(np.full(num, 0.3)), 0.3)
    steps, y = report._thin(np.stack([np.arange(num), np.full(num, 0.3)]).astype(float))
    assert len(steps) == len(y) <= 1000
    np.testing.assert_allclose(y, 0.3)
    noise = np.random.default_rng(0).normal(size=num)
    assert report._smooth(noise).std() <= noise.std()
