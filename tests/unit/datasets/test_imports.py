"""The room stays light: the driver reads data without torch, Ray or transformers."""

from __future__ import annotations

import subprocess
import sys


def test_no_heavy_imports():
    code = (
        "import sys, roll_opd.datasets.rows, roll_opd.datasets.prompts, roll_opd.datasets.sampling\n"
        "sys.exit(', '.join(m for m in ('torch', 'ray', 'transformers', 'datasets') if m in sys.modules) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
