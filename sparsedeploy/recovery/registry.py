"""The recovery methods, by name."""

from __future__ import annotations

from typing import Any

from sparsedeploy.registry import Registry

# Called as function(job, options) -> Recovered; traits: starts_from ("dense" or "pruned"), trains, calibrates.
RECOVERIES: Registry[Any] = Registry("recovery method")
