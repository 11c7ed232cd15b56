"""plan/command.py: from the command line to a table, without a compiler; and once with it."""

import argparse
import json
import pathlib

import jax
import pytest

from semflow_jax.errors import UserError
from semflow_jax.plan import command
from semflow_jax.plan.chips import GIB
from semflow_jax.plan.compiling import Compiled

REPO = pathlib.Path(__file__).parent.parent
HLO = (REPO / "tests" / "golden" / "plan_fsdp.hlo").read_text()
QUICKSTART = str(REPO / "configs" / "quickstart.py")


def run(*args: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(["--config", QUICKSTART, "--topology", "v5e:2x2", *args]))


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that is always content, but for batches of more than 32; the programs that it is given."""
    seen = []

    def compile_program(program, part, save):
        seen.append(program)
        needed = program.num_images * GIB // 4
        return Compiled(needed, "" if program.num_images > 64 else HLO, 10**12 * program.num_images)

    monkeypatch.setattr(command, "make_devices", lambda part: jax.devices()[:1])
    monkeypatch.setattr(command, "compile_program", compile_program)
    return seen


def test_one_program(compiled, capsys):
    run("--set", "num_steps=86400")
    out = capsys.readouterr().out
    assert "train on v5e:2x2, 4 chips, 16 images a step\n" in out
    assert "HBM per chip     4.00 of 15.75 GiB: fits, 11.75 GiB to spare" in out
    assert "16 TFLOP a step, 1 TFLOP an image" in out
    assert "86400 steps: 0.0203 days, 1.95 chip-hours" in out  # 4 / 197 seconds a step
    assert out.endswith(f"{command.ABOUT}\n")


def test_a_sweep_marks_the_best_that_fits(compiled, capsys):
    run("--sweep", "batch_size=32,128", "--sweep", "model.remat=none,blocks", "--json")
    result = json.loads(capsys.readouterr().out)
    changes = [(b, r) for b in (32, 128) for r in ("none", "blocks")]
    assert [tuple(row["change"].values()) for row in result["rows"]] == changes
    assert [p.num_images for p in compiled] == [32, 32, 128, 128]
    assert [row["fits"] for row in result["rows"]] == [True, True, False, False]
    assert result["about"] == command.ABOUT and result["best"] == {"train": 0}
    assert "seconds" in result["rows"][0] and "seconds" not in result["rows"][2]


def test_a_sweep_ends_in_a_table(compiled, capsys):
    run("--sweep", "batch_size=16,128")
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].startswith("*  train    batch_size=16 ") and "32.00 too much" in table[1]


def test_values_that_do_not_go_together_are_left_out(compiled, capsys):
    run("--sweep", "data.size=(16,16),(18,18)", "--json")
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [row["change"] for row in result["rows"]] == [{"data.size": [16, 16]}]
    assert [row["change"] for row in result["refused"]] == [{"data.size": [18, 18]}]
    assert err.startswith("left out: size: height and width must be multiples of")


def test_programs_are_named(compiled, capsys):
    run("--programs", "segment,synthesize", "--set", "eval.batch_size=8", "--set", "sampling.steps=4")
    assert [(p.name, p.num_images, p.turns) for p in compiled] == [("segment", 8, 4), ("synthesize", 8, 4)]
    assert "days" not in capsys.readouterr().out


def test_values_of_sweeps():
    assert command._parse("a.b=1,2e-3,True", many=True) == [("a.b", 1), ("a.b", 2e-3), ("a.b", True)]
    assert command._parse("size=(8,8),(16,16)", many=True) == [("size", (8, 8)), ("size", (16, 16))]
    assert command._parse("model.remat=none,full", many=True) == [("model.remat", "none"), ("model.remat", "full")]
    assert command._parse("model.attention=(True,False)") == [("model.attention", (True, False))]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--programs", "train,fly"], "--programs: of train, segment, synthesize, got fly"),
        (["--topology", "v1:2x2"], "--topology: a chip of"),
        (["--set", "batch_size"], "--set, --sweep: key=value expected, got 'batch_size'"),
        (["--set", "no.such=1"], "--set, --sweep no.such: a key of the config and a value of its type expected"),
        (["--set", "batch_size=many"], "--set, --sweep batch_size: .*got 'many'"),
        (["--config", "nowhere.py"], "--config nowhere.py: a file with get_config.* expected, found none"),
        (["--config", __file__], "a function get_config.* expected, found none"),
        (["--save", "x", "--programs", "train,segment"], "--save: one program expected, got 2"),
        (["--save", "x", "--sweep", "batch_size=8,16"], "--save: one program expected, got 2"),
    ],
)
def test_bad_arguments(compiled, args, message):
    with pytest.raises(UserError, match=message) as caught:
        run(*args)
    assert "\n" not in str(caught.value) and not compiled


@pytest.mark.slow
def test_with_the_compiler(tmp_path, monkeypatch, capsys):
    """A small step, sharded, in two slices: parameters are gathered before the loop, and not in it."""
    pytest.importorskip("libtpu", reason="libtpu, of the extra tpu")
    monkeypatch.setenv("SEMFLOW_CACHE", str(tmp_path))
    sets = ["optim.flatten=False", "mesh.fsdp=4", "optim.accum_steps=2", "model.block_out_channels=(64,)"]
    sets += ["model.attention=(False,)", "model.num_heads=(4,)", "data.size=(16,16)"]
    run("--json", *(word for text in sets for word in ("--set", text)))
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["fits"] and 0 < row["mfu"] < 1
    gathers = [c for c in row["collectives"] if c["kind"] == "all-gather"]
    assert gathers and not any(c["in_loop"] for c in gathers)
