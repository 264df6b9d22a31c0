"""The room stays light: the driver reads data without torch, Ray or transformers."""

from __future__ import annotations

import subprocess
import sys


def test_no_heavy_imports():
    code = (
        "import sys\n"
        "from roll_opd.datasets import contexts, conversation, domains, prompts, rows, sampling, tags\n"
        "heavy = ('torch', 'ray', 'transformers', 'datasets', 'pyarrow', 'pandas')\n"
        "sys.exit(', '.join(m for m in heavy if m in sys.modules) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
