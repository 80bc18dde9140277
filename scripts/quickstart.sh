#!/usr/bin/env bash
# From a fresh clone to a trained, measured Mamba vision-language model on this machine, without GPU or downloads of
# weights:  bash scripts/quickstart.sh [--connector mlp|vss-mlp|vss-l2|qmamba] [--a.b value ...]
# An interrupted one goes on where it stopped; other settings want another folder: --run runs/NAME.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
began=$SECONDS; setup playground; setup_took=$((SECONDS - began))

run=runs/quickstart
for i in $(seq $#); do
    [ "${!i}" != --run ] || { j=$((i + 1)); run="${!j:?--run needs a folder}"; }
    case "${!i}" in --run=*) run="${!i#--run=}" ;; esac
done
step() { printf '\n== %s\n' "$*"; }
step "1/5  Data: scenes of real handwritten digits"
began=$SECONDS; python playground/make_data.py; data_took=$((SECONDS - began))
step "2/5  Stage 1: the connector learns to describe (encoder and language model frozen)"
vlmamba train train/playground.py:pretrain --resume "$@"
step "3/5  Stage 2: connector and language model learn to answer (encoder frozen)"
vlmamba train train/playground.py:finetune --resume "$@"
tasks=playground,vqav2_playground,gqa_playground,pope_playground,mmbench_playground_texts
step "4/5  Held-out questions, some in the layouts of official benchmarks, and once more with the pictures shuffled"
began=$SECONDS; vlmamba eval "$run/finetune" --tasks "$tasks" --shuffle-images --conversations 6; eval_took=$((SECONDS - began))
step "5/5  Report"
vlmamba report "$run" --time "set-up=$setup_took" --time "data=$data_took" --time "evaluation=$eval_took" --time "all=$SECONDS"
echo "talk with it: .venv/bin/vlmamba chat $run/finetune"
