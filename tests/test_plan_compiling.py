"""plan/compiling.py: libtpu's compiler, asked once."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from semflow_jax.errors import UserError
from semflow_jax.plan import compiling
from semflow_jax.plan.chips import GIB, make_devices, parse_slice
from semflow_jax.plan.compiling import compile_program
from semflow_jax.plan.costs import read_costs
from semflow_jax.plan.programs import Program

PART = parse_slice("v5e:2x2")


@pytest.fixture
def mesh(tmp_path, monkeypatch) -> Mesh:
    pytest.importorskip("libtpu", reason="libtpu, of the extra tpu")
    monkeypatch.setenv("SEMFLOW_CACHE", str(tmp_path))
    return Mesh(np.array(make_devices(PART)), ("x",))


def make_program(mesh: Mesh, size: int, function=lambda x, w: (x @ w).sum(0)) -> Program:
    """A product of rows that are split over the chips, and the sum over rows."""
    shape = (size, size)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for spec in (P("x"), P()))
    return Program("train", function, (x, w), (), size, None)


def test_a_program_is_compiled_once(mesh, monkeypatch):
    program = make_program(mesh, 1024)
    found = compile_program(program, PART)
    assert found.model_flops == 2 * 1024**3
    costs = read_costs(found.hlo)
    assert costs.flops == found.model_flops / 4
    assert [(c.kind, c.group) for c in costs.collectives] == [("all-reduce", 4)]
    arguments = (1024 // 4 + 1024) * 1024 * 2
    assert arguments < found.hbm_needed < arguments + 16 * 2**20
    monkeypatch.setattr(compiling, "_compile", None)  # calling it would fail
    assert compile_program(make_program(mesh, 1024), PART) == found
    with pytest.raises(TypeError):
        compile_program(make_program(mesh, 512), PART)


def test_a_program_that_is_too_large_is_told_by_how_much(mesh):
    def many(x, w):
        products = [jnp.sin(w @ w * i) for i in range(1, 6)]
        for _ in range(2):
            products = [a @ b for a, b in zip(products, products[1:] + products[:1], strict=True)]
        return sum(products)

    found = compile_program(make_program(mesh, 50_000, many), PART)  # five of 4.66 GiB
    assert found.hlo == "" and found.hbm_needed > 20 * GIB


def test_an_executable_is_kept(mesh, tmp_path):
    path = tmp_path / "program.pickle"
    found = compile_program(make_program(mesh, 256), PART, path)
    payload, in_tree, out_tree = pickle.loads(path.read_bytes())
    assert len(payload) > 1000 and in_tree.num_leaves == 2 and out_tree.num_leaves == 1
    assert compile_program(make_program(mesh, 256), PART) == found


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeds...", 20.5 * GIB),
        ("memory required for HLO temporaries (29.00G) exceeds available HBM (15.75G).", 29 * GIB + 2 * 8 * 4),
        ("INTERNAL: something else", None),
    ],
)
def test_words_of_the_compiler(message, needed):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P()))
    assert compiling._needed(message, (x, {"a": x})) == needed


def test_other_failures_are_errors_of_the_user(mesh, monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing\nmore")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(UserError, match="plan: train can't be compiled: INTERNAL: no such thing$"):
        compile_program(make_program(mesh, 256), PART)
