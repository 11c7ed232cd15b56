"""train/loop.py: sums; whole runs are in test_main.py and test_distributed.py."""

from semflow_jax.train import loop


def test_summary_counts_resumed_runs():
    rows = [
        {"step": 10, "loss": 1.0, "seconds": 2.0, "images_per_second": 40.0},
        {"step": 10, "val/miou": 0.5},
        {"step": 20, "loss": 1.0, "seconds": 6.0, "images_per_second": 20.0},
    ]
    assert loop.summarize(rows) == {"steps": 20, "seconds": 8.0, "images_per_second": 25.0}
    assert loop.summarize([])["steps"] == 0
