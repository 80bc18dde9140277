#!/usr/bin/env bash
# Sets up if need be, then lint, types and tests. Arguments go to pytest: bash scripts/test.sh tests/ssm -k packed
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup dev

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
if [ $# -eq 0 ]; then
    ruff check .
    mypy
    python -m pytest -n "${PYTEST_WORKERS:-2}" -q
else
    python -m pytest "$@"
fi
