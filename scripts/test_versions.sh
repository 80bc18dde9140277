#!/usr/bin/env bash
# The tests that meet other libraries (model, training, export, integrations) with the lowest and the newest versions
# that pyproject.toml allows:  bash scripts/test_versions.sh [lowest] [newest]   (default: both)
# The newest are those of constraints.txt, so their environment is everybody's, .venv, and what scripts/test.sh has run
# needs no second run. The lowest, in .venv-lowest, are the lower bounds of pyproject.toml (constraints-lowest.txt).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
[ $# -gt 0 ] || set -- lowest newest
for versions in "$@"; do
    case "$versions" in
        lowest) setup dev .venv-lowest constraints-lowest.txt ;;
        newest) setup dev ;;
        *) echo "usage: bash scripts/test_versions.sh [lowest] [newest]" >&2; exit 2 ;;
    esac
    printf '\n== %s versions: ' "$versions"
    python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
    python -m pytest -n "${PYTEST_WORKERS:-2}" -q tests/{models,training,checkpoints,evaluation,integrations,data/test_huggingface.py}
done
