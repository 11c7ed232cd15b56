"""plan/roofline.py and table.py: the equations, and how they are shown."""

import pytest

from semflow_jax.plan.chips import GIB, Chip, Slice
from semflow_jax.plan.costs import Collective, Costs
from semflow_jax.plan.roofline import Estimate, sent_bytes, summarize
from semflow_jax.plan.table import describe, find_best, make_table

CHIP = Chip(flops=100.0, hbm=10 * GIB, hbm_rate=50.0, link_rate=5.0, dims=2, ring=16)
PART = Slice("toy:2x2", CHIP, (2, 2))  # two usable links: 10 bytes/s


def collective(kind: str, num_bytes: int, group: int = 4, count: int = 1, in_loop: bool = False) -> Collective:
    return Collective(kind, num_bytes, group, count, in_loop, "x")


def estimate(flops=0, moved=0, collectives=(), model_flops=400, needed=GIB) -> Estimate:
    return Estimate(PART, 8, model_flops, needed, Costs(flops, moved, collectives))


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("all-reduce", 150), ("collective-permute", 100)],
)
def test_bytes_that_a_chip_sends(kind, sent):
    assert sent_bytes(collective(kind, 100)) == sent
    assert sent_bytes(collective(kind, 100, count=3)) == 3 * sent
    assert sent_bytes(collective(kind, 100, group=1)) == (100 if kind == "collective-permute" else 0)


@pytest.mark.parametrize(
    ("found", "bound", "seconds"),
    [
        (estimate(flops=200, moved=50), "compute", 2),
        (estimate(flops=200, moved=150), "hbm", 3),
        (estimate(flops=200, collectives=(collective("all-gather", 100, count=4),)), "ici", 30),
        (estimate(flops=50), "compute", 1),  # no less than the model's own share
    ],
)
def test_the_largest_time_bounds(found, bound, seconds):
    assert (found.bound, found.seconds) == (bound, pytest.approx(seconds))
    assert found.mfu == pytest.approx(400 / (4 * 100 * seconds))
    assert found.images_per_second == pytest.approx(8 / seconds)


def test_memory_decides_whether_it_fits():
    assert estimate(needed=10 * GIB).fits
    assert not estimate(needed=10 * GIB + 1).fits
    refused = Estimate(PART, 8, 400, GIB, None)
    assert not refused.fits and "seconds" not in refused.to_dict()


def test_collectives_are_grouped():
    outside = (collective("all-gather", 10), collective("all-gather", 30, count=2))
    first, second = summarize((*outside, collective("all-gather", 5, in_loop=True)))
    sizes = {"count": 3, "bytes": 70, "largest_bytes": 30, "sent_bytes": 52.5}
    assert first == {"kind": "all-gather", "group": 4, "in_loop": False} | sizes
    assert (second["in_loop"], second["bytes"]) == (True, 5)


def row(found: Estimate, **changes) -> dict:
    return {"program": "train", "change": {"batch_size": 8}, "reduced": False} | found.to_dict() | changes


def test_the_best_fits_and_is_fastest():
    rows = [
        row(estimate(flops=300)),
        row(estimate(flops=200)),
        row(estimate(flops=100, needed=11 * GIB)),
        row(Estimate(PART, 8, 400, 99 * GIB, None)),
        row(estimate(flops=900), program="segment"),
    ]
    assert find_best(rows) == {"train": 1, "segment": 4}
    assert find_best(rows[2:4]) == {}
    lines = make_table(rows, find_best(rows)).splitlines()
    assert [line.startswith("*") for line in lines] == [False, False, True, False, False, True]
    assert "99.00 too much" in lines[4] and "batch_size=8" in lines[1]


def test_a_candidate_in_words():
    found = estimate(flops=200, collectives=(collective("all-reduce", 2_000_000, in_loop=True),))
    text = describe(row(found, num_steps=10, days=1.5, chip_hours=144.0))
    assert "HBM per chip     1.00 of 10.00 GiB: fits, 9.00 GiB to spare" in text
    assert "all-reduce       once, 4 chips each, 2 MB, the largest 2 MB, in a loop" in text
    assert "bytes between chips / links  <- the bound" in text
    assert "10 steps: 1.5 days, 144 chip-hours" in text
    refused = describe(row(Estimate(PART, 8, 400, 11 * GIB, None)))
    assert "at least 11.00 of 10.00 GiB: does not fit, by 1.00 GiB" in refused and "bound" not in refused
