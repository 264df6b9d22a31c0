#!/usr/bin/env bash
# Runs the two teachers from anywhere; CONFIG=self_teacher runs the self-teacher. Further arguments are overrides.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$here/../run.sh" onpolicy_distill "$here" "${CONFIG:-onpolicy_distill}" "$@"
