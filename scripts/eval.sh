#!/usr/bin/env bash
# Measure a checkpoint:  bash scripts/eval.sh CHECKPOINT [TASK ...] [--flag value ...]   (default task: playground)
# One process a GPU of this host, or NPROC; an evaluation that was stopped goes on. Flags are those of `vlmamba eval`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup eval

[ $# -gt 0 ] || { echo "usage: bash scripts/eval.sh CHECKPOINT [TASK ...] [--flag value ...]" >&2; exit 2; }
checkpoint="$1"; shift
tasks=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do tasks+=("$1"); shift; done
[ ${#tasks[@]} -gt 0 ] || tasks=(playground)
exec vlmamba eval "$checkpoint" --tasks "$(IFS=,; echo "${tasks[*]}")" --nproc "${NPROC:-auto}" "$@"
