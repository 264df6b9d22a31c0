#!/usr/bin/env bash
# Runs the quickstart from anywhere; further arguments are overrides, for example: seed=2 max_steps=20
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$here/../run.sh" onpolicy_distill "$here" onpolicy_distill "$@"
