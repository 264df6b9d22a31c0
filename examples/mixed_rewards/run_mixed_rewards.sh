#!/usr/bin/env bash
# Runs one of the three configurations from anywhere, the mixed one by default: CONFIG=rlvr, pure_opd or mixed.
# Further arguments are overrides, for example: seed=2 opd_kl_coef=0.1
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/../.."
config="${CONFIG:-mixed}"
launcher=rlvr
if [ "$config" = pure_opd ]; then launcher=onpolicy_distill; fi
exec python "examples/start_${launcher}_pipeline.py" --config_path "$here" --config_name "$config" "$@"
