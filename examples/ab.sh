#!/usr/bin/env bash
# Does speculation pay for a model? bash ab.sh MODEL [further flags of specplugin ab]
# Each variant has its own engine; all take turns on the same prompts and seeds.
# The report is written to ab-report/report.md and report.json.
set -euo pipefail
model=${1:?usage: ab.sh MODEL [flags]}
shift
exec "${PYTHON:-python3}" -m vllm_specplugin.cli ab --model "$model" \
    --variant baseline \
    --variant vllm:ngram \
    --variant suffix+exact+goodput \
    --prompts builtin:edits --batch 1 --temperature 0 "$@"
