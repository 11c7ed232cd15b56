"""plan/chips.py: slices by name."""

import math

import pytest

from semflow_jax.errors import UserError
from semflow_jax.plan import chips
from semflow_jax.plan.chips import CHIPS, make_devices, parse_slice


@pytest.mark.parametrize(
    ("name", "num_chips", "rings", "links"),
    [
        ("v5e:1x1", 1, (False, False), 0),
        ("v5e:2x2", 4, (False, False), 2),
        ("v5e:8x16", 128, (False, True), 3),
        ("v6e:16x16", 256, (True, True), 4),
        ("v4:2x2x1", 4, (False,) * 3, 2),
        ("v5p:2x2x4", 16, (False,) * 3, 3),
        ("v5p:4x4x8", 128, (True,) * 3, 6),
    ],
)
def test_slices(name, num_chips, rings, links):
    part = parse_slice(name)
    assert (part.num_chips, part.rings) == (num_chips, rings)
    assert part.ici_rate == links * part.chip.link_rate


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "a chip of v4, v5e, v5p, v6e and the slice's shape, got 'v9:2x2'"),
        ("v5e", "got 'v5e'"),
        ("v5e:", "got 'v5e:'"),
        ("v5e:0x2", "got 'v5e:0x2'"),
        ("v5e:2x2x2", "v5e has slices of 2 dimensions, got 'v5e:2x2x2'"),
        ("v5p:4x4", "v5p has slices of 3 dimensions, got 'v5p:4x4'"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_slice(name)
    assert str(caught.value).startswith("--topology: ") and "\n" not in str(caught.value)


def test_published_ratios():
    """v6e doubles the memory of v5e and its bandwidths; v5p has some four times the links' of v5e, and six of them."""
    v5e, v5p, v6e = (CHIPS[name] for name in ("v5e", "v5p", "v6e"))
    assert v6e.hbm / v5e.hbm == pytest.approx(2, rel=0.01) and v6e.hbm_rate / v5e.hbm_rate == pytest.approx(2, rel=0.03)
    assert v6e.link_rate == v5p.link_rate == 2 * v5e.link_rate
    assert {2 * chip.dims for chip in (v5e, v6e)} == {4} and v5p.dims == 3


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.*found none; run pip install 'semflow_jax\[tpu\]'"):
        make_devices(parse_slice("v5e:2x2"))


@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:8x8", "v6e:16x16", "v4:2x2x1", "v4:4x4x4", "v5p:4x4x8"])
def test_devices(name):
    pytest.importorskip("libtpu", reason="libtpu, of the extra tpu")
    part = parse_slice(name)
    devices = make_devices(part)
    assert len(devices) == math.prod(part.shape)
    assert max(device.coords for device in devices)[: len(part.shape)] == [n - 1 for n in part.shape]


def test_a_slice_that_libtpu_does_not_know():
    pytest.importorskip("libtpu", reason="libtpu, of the extra tpu")
    with pytest.raises(UserError, match="a slice that libtpu knows, got v5e:3x3; choose another"):
        make_devices(parse_slice("v5e:3x3"))
