#!/usr/bin/env bash
# Runs one of the three configurations from anywhere, the mixed one by default: CONFIG=rlvr, pure_opd or mixed.
# Further arguments are overrides, for example: seed=2 opd_kl_coef=0.1
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
config="${CONFIG:-mixed}"
launcher=rlvr
if [ "$config" = pure_opd ]; then launcher=onpolicy_distill; fi
exec bash "$here/../run.sh" "$launcher" "$here" "$config" "$@"
