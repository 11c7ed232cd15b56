"""data/sources/celebamask_hq.py: parts become one map in the set's order, splits are CelebA's, odd files are named."""

import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from raw_trees import make_celebamask_hq

from semflow_jax.data.examples import fit_pair
from semflow_jax.data.prepare import prepare
from semflow_jax.data.records import count_records, open_records
from semflow_jax.data.sources import celebamask_hq
from semflow_jax.errors import UserError

# face_parsing/README.md of the set: "Mask labels are defined as following".
IDS = {
    "skin": 1,
    "nose": 2,
    "eye_g": 3,
    "l_eye": 4,
    "r_eye": 5,
    "l_brow": 6,
    "r_brow": 7,
    "l_ear": 8,
    "r_ear": 9,
    "mouth": 10,
    "u_lip": 11,
    "l_lip": 12,
    "hair": 13,
    "hat": 14,
    "ear_r": 15,
    "neck_l": 16,
    "neck": 17,
    "cloth": 18,
}


def find(root):
    return celebamask_hq.find({"name": "celebamask_hq", "source": str(root), "size": [512, 512], "seed": 0})


def expected_label(root, number: int) -> np.ndarray:
    """The highest id of the parts that a pixel is in: what painting in the order of the ids comes to."""
    label = np.zeros((512, 512), np.uint8)
    for path in root.glob(f"CelebAMask-HQ-mask-anno/*/{number:05}_*.png"):
        with Image.open(path) as mask:
            label = np.maximum(label, np.where(np.asarray(mask.convert("L")) > 127, IDS[path.stem[6:]], 0))
    return label


def items(source):
    return {item.name: item for split in source.splits.values() for item in split}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two faces of each split, on both sides of every border. Nobody writes to it."""
    return make_celebamask_hq(tmp_path_factory.mktemp("six"), 6)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return make_celebamask_hq(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture
def small(three, tmp_path):
    """A copy of three faces, with parts in the folders 0, 5 and 10, to be spoilt."""
    return shutil.copytree(three, tmp_path / "raw")


def part(root, name: str = "nose"):
    return root / "CelebAMask-HQ-mask-anno" / "0" / f"00000_{name}.png"


def test_parts_become_one_map(root):
    source = find(root)
    read = pickle.loads(pickle.dumps(source.read))
    seen = np.zeros(19, int)
    for name, item in items(source).items():
        image, label = read(item)
        expected = expected_label(root, int(name))
        assert image.size == (1024, 1024)
        np.testing.assert_array_equal(label, np.kron(expected, np.ones((2, 2), np.uint8)))
        seen += np.bincount(expected.ravel(), minlength=19)
    assert seen.all()  # or else a class was not tested


def test_the_size_of_the_parts_gets_them_back(three):
    source = find(three)
    image, label = source.read(items(source)["00000"])
    expected = expected_label(three, 0)
    np.testing.assert_array_equal(fit_pair(image, label, (512, 512), "stretch")[1], expected)
    np.testing.assert_array_equal(fit_pair(image, label, (256, 256), "stretch")[1], expected[1::2, 1::2])


def test_facts(three):
    source = find(three)
    assert list(source.class_names) == ["background", *sorted(IDS, key=IDS.get)]
    assert len(set(source.colours)) == 19
    assert source.colours[IDS["skin"]] == (204, 0, 0) and source.colours[IDS["cloth"]] == (0, 204, 0)
    pairs = {(source.class_names[a], source.class_names[b]) for a, b in source.flip_pairs}
    assert pairs == {("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear")}
    assert source.name == "celebamask_hq" and source.license.startswith("Non-commercial")


def test_splits_are_those_of_celeba(root):
    """By the file numbers of list_eval_partition.txt: 1-162770 train, 162771-182637 val, 182638-202599 test."""
    lines = (root / "CelebA-HQ-to-CelebA-mapping.txt").read_text().split("\n")[1:-1]
    expected = {"train": [], "val": [], "test": []}
    for line in lines:
        number, _, file = line.split()
        split = "train" if file <= "162770.jpg" else "val" if file <= "182637.jpg" else "test"
        expected[split].append(f"{int(number):05}")
    splits = find(root).splits
    assert {split: [item.name for item in found] for split, found in splits.items()} == expected
    assert {split: len(found) for split, found in splits.items()} == {"train": 2, "val": 2, "test": 2}


def test_mapping_without_header(small):
    mapping = small / "CelebA-HQ-to-CelebA-mapping.txt"
    mapping.write_text("\n".join(mapping.read_text().splitlines()[1:]))
    assert len(items(find(small))) == 3


@pytest.mark.parametrize("mode", ["L", "1", "grey of 0 and 1", "palette"])
def test_grey_parts_are_the_same(small, mode):
    expected = expected_label(small, 0)
    for path in part(small).parent.iterdir():
        with Image.open(path) as mask:
            grey = mask.convert("L")
        if mode in ("L", "1"):
            grey.convert(mode).save(path)
        else:
            grey = Image.fromarray(np.asarray(grey) // np.uint8(255))
            if mode == "palette":
                grey.putpalette([0, 0, 0, 255, 255, 255])
            grey.save(path)
    source = find(small)
    _, label = source.read(items(source)["00000"])
    np.testing.assert_array_equal(label[::2, ::2], expected)


def test_reduced_images_and_empty_parts(small):
    path = small / "CelebA-HQ-img" / "0.jpg"
    Image.open(path).resize((512, 512)).save(path)
    Image.new("RGB", (512, 512)).save(part(small))
    source = find(small)
    image, label = source.read(items(source)["00000"])
    assert image.size == (512, 512)
    np.testing.assert_array_equal(label, expected_label(small, 0))
    assert IDS["nose"] not in label


def paint(path, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: paint(part(root), np.eye(512) * 200), r"00000_nose.png: must be black .*found \[200\];"),
        (
            lambda root: paint(part(root), np.indices((512, 512))[0] % 2 * 254 + 1),
            r"must be black .*found \[1\];",
        ),
        (
            lambda root: paint(part(root), np.eye(512)[..., None] * (255, 0, 0)),
            r"must be black .*found \[255, 0, 0\]; download",
        ),
        (lambda root: paint(part(root), np.zeros((512, 256))), "00000_nose.png: must be 512x512, found 512x256"),
        (lambda root: paint(part(root), np.zeros((512, 512, 4))), "00000_nose.png: must be an 8-bit.*mode RGBA"),
        (lambda root: part(root).write_bytes(b"<html>"), "00000_nose.png: must be a whole image file"),
        (lambda root: part(root).write_bytes(part(root).read_bytes()[:400]), "00000_nose.png: must be a whole image"),
        (lambda root: paint(root / "CelebA-HQ-img/0.jpg", np.zeros((900, 1024))), "0.jpg: must be 1024x.*900x1024"),
        (lambda root: (root / "CelebA-HQ-img/0.jpg").unlink(), "CelebA-HQ-img/0.jpg: must be a whole image file"),
        (
            lambda root: [path.unlink() for path in part(root).parent.iterdir()],
            "0.jpg: must have a part in .*found none",
        ),
    ],
)
def test_bad_files_are_named_one_by_one(small, damage, message):
    damage(small)
    source = find(small)
    with pytest.raises(UserError, match=message):
        source.read(items(source)["00000"])
    source.read(items(source)["10000"])


def write_rows(root, *rows):
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "CelebA-HQ-img").rename(root / "img"), "CelebA-HQ-img: must be the folder of the images"),
        (
            lambda root: (root / "CelebAMask-HQ-mask-anno").rename(root / "anno"),
            "anno: must be the folder of the parts",
        ),
        (lambda root: (root / "CelebA-HQ-to-CelebA-mapping.txt").unlink(), "mapping.txt: must list the images"),
        (lambda root: write_rows(root, "0 5 000006.jpg", "1 x 000002.jpg"), "mapping.txt:2: must be a new idx.*'1 x 0"),
        (lambda root: write_rows(root, "0 5 000005.jpg"), "mapping.txt:1: must be a new idx.* found '0 5 000005.jpg'"),
        (lambda root: write_rows(root, "0 5 000006.jpg", "0 6 000007.jpg"), "mapping.txt:2: must be a new idx"),
        (lambda root: write_rows(root, "0 5 000006.jpg"), "CelebA-HQ-img: must hold.*found 10000.jpg, 20000.jpg;"),
        (lambda root: part(root).rename(part(root, "beard")), "0/00000_beard.png: must be called NUMBER_PART.png"),
        (lambda root: part(root).rename(part(root).with_name("0_nose.png")), "0/0_nose.png: must be called"),
        (lambda root: part(root).rename(part(root).with_name("00001_nose.png")), "of an image that.*found image 1;"),
        (lambda root: part(root).rename(part(root).parents[1] / "5/00000_nose.png"), "5/00000_nose.png: .*image 0;"),
    ],
)
def test_a_wrong_tree_is_found_at_once(small, damage, message):
    damage(small)
    with pytest.raises(UserError, match=message):
        find(small)


def test_hidden_files_are_no_matter(small):
    before = find(small)
    for folder in ("CelebA-HQ-img", "CelebAMask-HQ-mask-anno", "CelebAMask-HQ-mask-anno/0"):
        (small / folder / ".DS_Store").touch()
    (small / "CelebAMask-HQ-mask-anno" / ".checkpoints").mkdir()
    (small / "CelebAMask-HQ-mask-anno" / ".checkpoints" / "00000_nose.png").touch()
    assert find(small) == before


def test_records(root, tmp_path):
    """Prepared at the default size, without the image one of whose parts is broken."""
    raw, out = shutil.copytree(root, tmp_path / "raw"), tmp_path / "out"
    part(raw, "hair").write_bytes(b"")
    info = prepare("celebamask_hq", out, source=raw, max_skipped=0.2, progress=False)
    assert info.size == (512, 512) and info.num_classes == 19
    assert info.license.startswith("Non-commercial") and info.colours == celebamask_hq.COLOURS
    assert json.loads((out / "skipped.json").read_text()).keys() == {"00000"}
    assert count_records(out) == {"train": 1, "val": 2, "test": 2}
    for split in ("train", "val", "test"):
        counts = np.zeros(20, int)
        for example in open_records(out, split):
            number = int(example["id"])
            expected = expected_label(raw, number)
            np.testing.assert_array_equal(example["label"][..., 0], expected)
            with Image.open(raw / "CelebA-HQ-img" / f"{number}.jpg") as image:
                np.testing.assert_allclose(example["image"].mean((0, 1)), np.asarray(image).mean((0, 1)), atol=1)
                assert np.abs(example["image"] - np.asarray(image.reduce(2), float)).mean() < 3
            counts += np.bincount(expected.ravel(), minlength=20)
        assert info.pixels[split] == counts.tolist()
