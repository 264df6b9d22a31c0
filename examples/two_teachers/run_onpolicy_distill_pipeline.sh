#!/usr/bin/env bash
# Runs the two teachers from anywhere; CONFIG=self_teacher runs the self-teacher. Further arguments are overrides.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$here/../.."
exec python examples/start_onpolicy_distill_pipeline.py \
    --config_path "$here" --config_name "${CONFIG:-onpolicy_distill}" "$@"
