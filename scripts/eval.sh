#!/usr/bin/env bash
# Measure a checkpoint:  bash scripts/eval.sh CHECKPOINT [TASK ...]   (default task: playground)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup eval

[ $# -gt 0 ] || { echo "usage: bash scripts/eval.sh CHECKPOINT [TASK ...]" >&2; exit 2; }
checkpoint="$1"; shift
[ $# -gt 0 ] || set -- playground
exec vlmamba eval "$checkpoint" --tasks "$(IFS=,; echo "$*")"
