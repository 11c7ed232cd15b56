"""config_file.py: a config by its file, with what stands behind a colon."""

import pathlib

import pytest

from semflow_jax.config_file import load_config
from semflow_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def test_what_stands_behind_a_colon_is_handed_on():
    plain, other = (load_config(CONFIGS / f"semflow_plus.py{rest}") for rest in ("", ":ccp_fashion"))
    assert plain.data.name == "camvid" and other.data.source.endswith("ccp_fashion")
    assert plain.mask_code == other.mask_code


@pytest.mark.parametrize("name", ["nothing.py", "nothing.py:camvid"])
def test_no_such_file(name):
    with pytest.raises(UserError, match=r"--config .*nothing.py: a file with get_config\(\) expected, found none"):
        load_config(CONFIGS / name)
