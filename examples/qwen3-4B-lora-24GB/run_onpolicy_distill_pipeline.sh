#!/usr/bin/env bash
# Start Qwen3-4B with LoRA <- Qwen3-32B at a vLLM server. Arguments are passed on: overrides such as max_steps=10, or --plan.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# The YAML's data paths are relative to the repository.
cd "$here/../.."
exec "${PYTHON:-python}" examples/start_onpolicy_distill_pipeline.py \
    --config_path "$here" --config_name onpolicy_distill "$@"
