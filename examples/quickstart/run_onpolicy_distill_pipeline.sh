#!/usr/bin/env bash
# Runs the quickstart from anywhere; further arguments are overrides, for example: seed=2 max_steps=20
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/../.."
exec python examples/start_onpolicy_distill_pipeline.py \
    --config_path "$here" --config_name onpolicy_distill "$@"
