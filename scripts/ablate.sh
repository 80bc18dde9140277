#!/usr/bin/env bash
# A table of comparisons, every row trained, measured and drawn:  bash scripts/ablate.sh TABLE [--recipe playground]
# Without a table: the list of them. What is finished is not run again; --dry-run shows what would be run.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup playground
for i in $(seq $#); do
    [ "${!i}" != --recipe ] || { j=$((i + 1)); recipe="${!j:-}"; }
    case "${!i}" in --recipe=*) recipe="${!i#--recipe=}" ;; esac
done
[ "${recipe:-}" != playground ] || python playground/make_data.py
exec vlmamba ablate "$@"
