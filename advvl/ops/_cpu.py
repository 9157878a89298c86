"""The CPU back end: every row goes through the cache once."""

from __future__ import annotations

from advvl.ops._reference import move, norms, project, refusal

__all__ = ["move", "norms", "project", "refusal"]
