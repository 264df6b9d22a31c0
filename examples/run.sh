#!/usr/bin/env bash
# What the examples' scripts share: run.sh LAUNCHER FOLDER CONFIG [arguments of the launcher ...]
# Runs $PYTHON; else the Python of the active virtual environment, else of .venv (`make install`), else python3.
set -euo pipefail
launcher="$1" folder="$2" config="$3"
shift 3
# The YAML's data paths are relative to the repository.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        PYTHON="$VIRTUAL_ENV/bin/python"
    elif [ -x .venv/bin/python ]; then
        PYTHON=.venv/bin/python
    fi
fi
exec "$PYTHON" "examples/start_${launcher}_pipeline.py" --config_path "$folder" --config_name "$config" "$@"
