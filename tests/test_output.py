"""evaluate/output.py: figures that JSON can hold, and files that are whole or as they were."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from semflow_jax.evaluate import output


def test_figures_become_plain_numbers():
    tree = {"a": np.float32(0.5), 1: (jnp.arange(2), True), "nan": float("nan"), "inf": np.inf, "none": None}
    assert output.plain(tree) == {"a": 0.5, "1": [[0, 1], True], "nan": None, "inf": None, "none": None}


def test_leaves_by_dotted_key():
    tree = {"a": {"b": {"c": 1}, "d": {}}, "e": [2]}
    assert list(output.flatten(tree)) == [("a.b.c", 1), ("a.d", {}), ("e", [2])]


def test_files_are_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "r.json"
    output.write_json(path, {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1}
    with pytest.raises(ValueError, match="Out of range float values"):
        output.write_json(path, {"x": float("nan")})

    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        output.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}


def test_mean_and_spread():
    assert output.mean_and_spread([0.25]) == "0.25"
    assert output.mean_and_spread([1.0, 2.0, 3.0], "{:.1f}") == "2.0 ± 1"
    assert output.mean_and_spread([1.0, float("nan")]) == "-"
