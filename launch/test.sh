#!/usr/bin/env bash
# Every check of the repository: ruff, mypy, pytest.
set -euo pipefail
TORCH=2.13.0
JUDGES=(torch-fidelity==0.4.0 lpips==0.1.4 efficientnet-lite-pytorch==0.1.0)

usage() {
    cat <<'EOF'
usage: bash launch/test.sh [PYTEST ARGUMENTS ...]

Makes .venv, installs semflow_jax there with its test tools, and runs ruff, mypy and pytest.

environment: PYTHON            the interpreter to make .venv with, 3.11 or later (default: python3)
             ALL=1             run the slow tests too
             CI                run them, but for the long ones that others stand for
             SEMFLOW_TORCH=1   install diffusers, transformers and a CPU build of torch, where there is one, for the
                               parity tests (CI implies it)
             SEMFLOW_SHARED    folder of real data and weights (default: ../shared); its tests are skipped without it
EOF
}

# The parity tests compare with torch. A CUDA build would bring gigabytes that no test uses.
install_parity() {
    if "$VENV_PYTHON" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "diffusers", "transformers", "torch_fidelity", "lpips"))))'; then
        echo "torch, diffusers, transformers, torch-fidelity, lpips: installed"
    elif [[ -z "${CI:-}" && "${SEMFLOW_TORCH:-}" != 1 ]]; then
        echo "torch: not installed, its parity tests are skipped (SEMFLOW_TORCH=1 installs it)"
    elif [[ "$(python_version "$VENV_PYTHON")" != 3.11.* ]]; then
        echo "torch: only installed on Python 3.11, its parity tests are skipped"
    elif ! "$VENV_PYTHON" -m pip install --quiet --dry-run --report - "torch==$TORCH" 2>/dev/null | is_cpu_only; then
        echo "torch: found no CPU build of $TORCH, its parity tests are skipped"
    else
        echo "torch: installing the CPU build of $TORCH, diffusers and transformers"
        "$VENV_PYTHON" -m pip install --quiet --editable ".[parity]" "torch==$TORCH"
        # They ask for torchvision, which would bring its own torch, and the tests don't.
        "$VENV_PYTHON" -m pip install --quiet --no-deps "${JUDGES[@]}"
    fi
}

# Reads pip's report of what it would install.
is_cpu_only() {
    "$VENV_PYTHON" -c '
import json, sys
names = [item["metadata"]["name"].lower() for item in json.load(sys.stdin)["install"]]
sys.exit(any(name.startswith(("nvidia", "cuda", "triton")) for name in names))' 2>/dev/null
}

for arg in "$@"; do
    if [[ "$arg" == -h || "$arg" == --help ]]; then usage && exit; fi
done

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv
install "test,tensorboard${CI:+,beam}"

# Nothing that they look at needs torch, so they run while it is installed.
lint() {
    "$VENV_PYTHON" -m ruff check && "$VENV_PYTHON" -m ruff format --check && "$VENV_PYTHON" -m mypy semflow_jax main.py
}
lint &
LINT=$!
install_parity
wait "$LINT"

if [[ "${ALL:-}" == 1 ]]; then
    chosen="slow or not slow"
elif [[ -n "${CI:-}" ]]; then
    chosen="not long"
else
    chosen="not slow"
fi
echo "pytest: tests that are ${chosen} (ALL=1 runs all)"
"$VENV_PYTHON" -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "$chosen" "$@"
