"""Shared fixtures. jaxtyping shapes are checked at run time here, and only here."""

import os
import pathlib

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # most of the tests' time is compilation
install_import_hook("semflow_jax", "beartype.beartype")

REPO = pathlib.Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: what is left at the end is short, and no process waits long for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def shared_dir() -> pathlib.Path:
    """Folder with real data and weights; tests that need it are skipped where it is absent."""
    path = (REPO / os.environ.get("SEMFLOW_SHARED", "../shared")).resolve()
    if not path.is_dir():
        pytest.skip(f"SEMFLOW_SHARED: no folder at {path}")
    return path


@pytest.fixture(scope="session")
def flow():
    """An untrained flow with every kind of array."""
    from test_pipeline_model import make_tiny_flow

    return make_tiny_flow()


@pytest.fixture(scope="session")
def saved(flow, tmp_path_factory) -> pathlib.Path:
    """The folder it was saved to, in one that looks like a run's."""
    folder = tmp_path_factory.mktemp("flow") / "export"
    flow.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """Stable Diffusion 1.5 in small, see `stable_diffusion_folder.py`."""
    import stable_diffusion_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield stable_diffusion_folder.write(tmp_path_factory.mktemp("stable-diffusion"))


@pytest.fixture(scope="session")
def sd_flow(sd):
    """The same as a flow of ours."""
    from semflow_jax.pipeline import SemFlow

    return SemFlow.from_pretrained(sd.path)
