"""Compiles a program for chips that are not there, once: what the compiler says is kept in $SEMFLOW_CACHE/plan.

JAX's own cache of compilations can't be read without the chips. The key is the program, the slice and the compiler.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import pickle
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import serialize_executable
from tqdm import tqdm

from semflow_jax.data.info import cache_dir
from semflow_jax.errors import UserError
from semflow_jax.plan.chips import Slice
from semflow_jax.plan.flops import count_jaxpr
from semflow_jax.plan.programs import Program

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Attributes:
    hbm_needed: bytes of a chip; where the compiler refused the program, at least.
    hlo: the text of the optimised program; empty where it was refused.
    model_flops: of `flops`, on all chips.
    """

    hbm_needed: int
    hlo: str
    model_flops: int


def compile_program(program: Program, part: Slice, save: pathlib.Path | None = None) -> Compiled:
    """Compiles a program, or finds it in the cache.

    Args: save: where the executable goes, for `jax.experimental.serialize_executable`; the cache does not keep it.

    Raises:
        UserError: the compiler fails for another reason than memory.
    """
    with _elapsed(f"{program.name}: trace"):
        traced = program.trace()
        flops = count_jaxpr(traced.jaxpr.jaxpr, program.turns)
        lowered = traced.lower()
        versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
        key = hashlib.sha256("\n".join((lowered.as_text(), part.name, *versions)).encode()).hexdigest()
    path = cache_dir() / "plan" / f"{key[:32]}.json.gz"
    if path.is_file() and save is None:
        needed, hlo = json.loads(gzip.decompress(path.read_bytes()))
        return Compiled(needed, hlo, flops)
    with _elapsed(f"{program.name}: compile for {part.name}"):
        needed, hlo = _compile(lowered, program, save)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(gzip.compress(json.dumps([needed, hlo]).encode(), compresslevel=3))
    partial.replace(path)
    return Compiled(needed, hlo, flops)


def _compile(lowered: jax.stages.Lowered, program: Program, save: pathlib.Path | None) -> tuple[int, str]:
    """Bytes of HBM needed, and the optimised program."""
    try:
        with _without_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error), program.args)
        if needed is None:
            raise UserError(f"plan: {program.name} can't be compiled: {str(error).splitlines()[0]}") from error
        return needed, ""
    if save is not None:
        save.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    memory: Any = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return needed, compiled.as_text() or ""


def _needed(message: str, args: Any) -> int | None:
    """Bytes of HBM that a refused program needs, by the compiler's words; None where that was not the reason."""
    whole = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    if whole:
        return int(float(whole[1]) * UNITS[whole[2]])
    temporary = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    if temporary is None:
        return None
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(args))
    return int(float(temporary[1]) * UNITS[temporary[2]]) + held


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@contextlib.contextmanager
def _elapsed(text: str) -> Iterator[None]:
    """A line with the time that has passed, for what can't tell how far it is."""
    done = threading.Event()
    interval = 1 if sys.stderr.isatty() else 60
    with tqdm(desc=text, bar_format="{desc} {elapsed}", leave=False) as bar:

        def tick() -> None:
            while not done.wait(interval):
                bar.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
