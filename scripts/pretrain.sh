#!/usr/bin/env bash
# Stage 1, connector alignment:  bash scripts/pretrain.sh [RECIPE] [--a.b value ...]   (default recipe: vl_mamba)
# One process a GPU of this host, or NPROC. Several hosts: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR;
# under SLURM see scripts/slurm/pretrain.sbatch.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup train

recipe=vl_mamba
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then recipe="$1"; shift; fi
case "$recipe" in *:*) ;; *) recipe="$recipe:pretrain" ;; esac
exec vlmamba train "$recipe" --nproc "${NPROC:-auto}" "$@"
