"""The plugin's package is used from the checkout: only vLLM itself needs it installed."""

from __future__ import annotations

import sys
from pathlib import Path

PLUGIN = Path(__file__).resolve().parents[2] / "export" / "vllm"
sys.path.insert(0, str(PLUGIN))
