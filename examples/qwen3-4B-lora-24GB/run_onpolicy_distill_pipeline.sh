#!/usr/bin/env bash
# Start Qwen3-4B with LoRA <- Qwen3-32B at a vLLM server. Arguments are passed on: overrides such as max_steps=10, or --plan.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$here/../run.sh" onpolicy_distill "$here" onpolicy_distill "$@"
