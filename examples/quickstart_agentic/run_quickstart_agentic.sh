#!/usr/bin/env bash
# Runs one of the three configurations from anywhere, the teacher alone by default: CONFIG=mixed, rl or onpolicy_distill.
# Further arguments are overrides, for example: seed=2 max_steps=10
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/../.."
config="${CONFIG:-onpolicy_distill}"
launcher=start_agentic_pipeline.py
[ "$config" = onpolicy_distill ] && launcher=start_onpolicy_distill_pipeline.py
exec python "examples/$launcher" --config_path "$here" --config_name "$config" "$@"
