#!/usr/bin/env bash
# Serve a model with vLLM, offer it requests, stop it: one run of a client of vllm.toml.
#
#     bash vllm_under_load.sh MODEL REQUESTS
#
# VLLM_PORT (8000) and VLLM_MEMORY (0.35, the part of the card's memory that the server takes, or it
# takes nearly all of it and its neighbors have none) may be set in the environment.
set -euo pipefail

model=$1 requests=$2
port=${VLLM_PORT:-8000}

vllm serve "$model" --host 127.0.0.1 --port "$port" \
    --gpu-memory-utilization "${VLLM_MEMORY:-0.35}" --max-model-len 4096 >&2 &
server=$!
trap 'kill -TERM "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT

until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; do
    kill -0 "$server" 2>/dev/null || { echo "vllm serve ended before it was ready" >&2; exit 1; }
    sleep 1
done

vllm bench serve --backend vllm --model "$model" --host 127.0.0.1 --port "$port" \
    --dataset-name random --random-input-len 512 --random-output-len 128 \
    --num-prompts "$requests" --max-concurrency 8
