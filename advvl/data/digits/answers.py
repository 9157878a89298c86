"""The answers a model chooses from, and VQA's soft targets over them."""

from __future__ import annotations

ANSWERS: tuple[str, ...] = ("no", "yes", *(str(n) for n in range(10)), "first", "second", "third")


def certain_target(answer: str) -> dict[str, list[int] | list[float]]:
    """VQA's target for a question whose one answer is beyond doubt: score 1."""
    return {"labels": [ANSWERS.index(answer)], "scores": [1.0]}
