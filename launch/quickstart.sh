#!/usr/bin/env bash
# From a fresh clone to a trained model and its report, in one command.
set -euo pipefail
export SEMFLOW_START_TIME=$(date +%s) # so that the report counts the installation too

usage() {
    cat <<'EOF'
usage: bash launch/quickstart.sh [--workdir=DIR] [--config.KEY=VALUE ...]

Makes .venv and installs semflow_jax there, trains configs/quickstart.py and writes DIR/report.html
(DIR is runs/quickstart unless given). Other arguments go to main.py. A second run resumes the first.

environment: PYTHON   the interpreter to make .venv with, 3.11 or later (default: python3)
EOF
}

workdir=runs/quickstart
for arg in "$@"; do
    case "$arg" in
        -h | --help) usage && exit ;;
        --workdir=*) workdir=${arg#*=} ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv
install ""

"$VENV_PYTHON" main.py --config=configs/quickstart.py --workdir="$workdir" "$@"

[[ -f "$workdir/report.html" ]] || fail "$workdir/report.html: must be there after training, found none; see the output above"
echo "report: $(cd "$workdir" && pwd)/report.html"
echo "wall time: $(($(date +%s) - SEMFLOW_START_TIME)) s, installation included"
