#!/usr/bin/env bash
# What vlmamba does on this machine's GPU, in under eight minutes, without network, data or installation:
#   bash scripts/gpu_check.sh [parity scan layer train decode] [--out DIR]
# Any Python with torch >= 2.11 and transformers will do: VLMAMBA_PYTHON names one, else .venv's, else python3.
# Prints a Markdown table and writes it with all figures to runs/gpu_check. Without a CUDA device it ends with status 2.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "${VLMAMBA_PYTHON:-}" ]; then python="$VLMAMBA_PYTHON"
elif [ -x .venv/bin/python ]; then python=.venv/bin/python
else python="$(command -v python3 || command -v python)"; fi
exec "$python" benchmarks/gpu_check.py "$@"
