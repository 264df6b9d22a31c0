#!/usr/bin/env bash
# Start Qwen3-8B <- Qwen3-32B. Arguments are passed on: overrides such as max_steps=10, or --plan.
# CONFIG_NAME=multi_teacher_onpolicy_distill_config chooses the run with two teachers.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$here/../run.sh" onpolicy_distill "$here" "${CONFIG_NAME:-onpolicy_distill_config}" "$@"
