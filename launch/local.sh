#!/usr/bin/env bash
# Several processes on one machine, or one that is started again after a crash; see local.py.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/local.py" "$@"
