#!/usr/bin/env bash
# Runs one of the three configurations from anywhere, the teacher alone by default: CONFIG=mixed, rl or onpolicy_distill.
# Further arguments are overrides, for example: seed=2 max_steps=10
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
config="${CONFIG:-onpolicy_distill}"
launcher=agentic
if [ "$config" = onpolicy_distill ]; then launcher=onpolicy_distill; fi
exec bash "$here/../run.sh" "$launcher" "$here" "$config" "$@"
