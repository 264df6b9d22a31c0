#!/usr/bin/env bash
# Start Qwen3-0.6B <- Qwen3-8B on one GPU. Arguments are passed on: overrides such as max_steps=10, or --plan.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$here/../run.sh" onpolicy_distill "$here" onpolicy_distill "$@"
