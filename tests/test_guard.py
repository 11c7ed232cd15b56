"""train/guard.py: signals, losses that are no number, hangs."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from semflow_jax.data.pipeline import TrainBatches
from semflow_jax.errors import UserError
from semflow_jax.train.guard import NONFINITE, StopSignals, Watchdog, check_finite


def test_signals_are_noted_and_handlers_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert not signals.asked(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked(2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert sorted(signals.received) == [signal.SIGINT, signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def make_batches() -> TrainBatches:
    return mock.Mock(spec=TrainBatches, ids=lambda first, num: [f"example {k}" for k in range(first, first + num)])


@pytest.mark.parametrize("metrics", [{"loss": np.nan, "grad_norm": 1.0}, {"loss": 2.0, "grad_norm": np.inf}])
def test_a_loss_that_is_no_number_names_its_examples(metrics, tmp_path):
    with pytest.raises(UserError, match=rf"^step 7: .*finite, found loss .*{NONFINITE} names .*lower optim.lr"):
        check_finite(metrics, 7, make_batches(), 24, 4, tmp_path)
    found = json.loads((tmp_path / NONFINITE).read_text())
    assert found["step"] == 7 and found["ids"] == [f"example {k}" for k in range(24, 28)]
    assert found["loss"] == str(metrics["loss"])


def test_a_finite_loss_passes(tmp_path):
    check_finite({"loss": 1.0, "grad_norm": 0.0}, 7, make_batches(), 24, 4, tmp_path)
    assert not list(tmp_path.iterdir())


HANG = """
import sys, time
from semflow_jax.train.guard import Watchdog
with Watchdog(float(sys.argv[1])) as dog:
    for _ in range(5):
        time.sleep(0.2)
        dog.alive()
    print("alive", flush=True)
    time.sleep(60)
"""


def test_a_hang_ends_the_process_with_its_stacks():
    start = time.monotonic()
    repo = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-c", HANG, "0.8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=repo)
    assert done.returncode == 1 and time.monotonic() - start < 50
    assert done.stdout == "alive\n"  # five steps of 0.2 s are longer than the watchdog's 0.8 s
    assert (
        "Timeout" in done.stderr
        and "most recent call first" in done.stderr
        and 'File "<string>", line 9' in done.stderr
    )


def test_a_watchdog_of_no_seconds_sleeps():
    with Watchdog(0) as dog:
        dog.alive()
