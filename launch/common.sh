# shellcheck shell=bash
# Sourced by the scripts beside it: finds Python, makes .venv in the repository, installs the package there.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV_PYTHON=.venv/bin/python

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python_version() { "$1" -c 'import sys; print("{}.{}.{}".format(*sys.version_info))' 2>/dev/null || echo missing; }

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_new_enough "$PYTHON" || fail "PYTHON: must be 3.11 or later, found $(python_version "$PYTHON") at $PYTHON"
        return
    fi
    for candidate in python3 python python3.13 python3.12 python3.11; do
        if is_new_enough "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    fail "Python: must be 3.11 or later, found $(python_version python3); install one or set PYTHON=/path/to/python3"
}

# Makes .venv, or takes the one that is there.
make_venv() {
    if [[ -e .venv ]]; then
        is_new_enough "$VENV_PYTHON" || fail ".venv: must have Python 3.11 or later, found $(python_version "$VENV_PYTHON"); delete .venv"
        if [[ -n "${PYTHON:-}" && "$(python_version "$PYTHON")" != "$(python_version "$VENV_PYTHON")" ]]; then
            fail ".venv: must be of PYTHON, $(python_version "$PYTHON"), found $(python_version "$VENV_PYTHON"); delete .venv or unset PYTHON"
        fi
        echo "environment: .venv, Python $(python_version "$VENV_PYTHON"), reused"
        return
    fi
    find_python
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python: must have the venv module, $PYTHON has none; install it (Debian, Ubuntu: apt install python3-venv)"
    echo "environment: .venv, Python $(python_version "$PYTHON"), made now"
    "$PYTHON" -m venv .venv
}

# install EXTRAS: the package, editable, with the extras named ("" or "test,tensorboard"); once for a given setup.py.
install() {
    local target=".${1:+[$1]}" stamp=".venv/installed-${1:-core}"
    if [[ "$stamp" -nt setup.py && "$stamp" -nt pyproject.toml ]]; then
        echo "packages: $target is installed"
    elif command -v uv >/dev/null; then
        echo "packages: installing $target with uv"
        uv pip install --quiet --python "$VENV_PYTHON" --editable "$target"
    else
        echo "packages: installing $target with pip, some minutes where nothing is cached"
        "$VENV_PYTHON" -m pip install --quiet --editable "$target"
    fi
    touch "$stamp"
}
