"""Makes ``config_samples`` importable: the tables need it at collection, before any fixture exists."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
