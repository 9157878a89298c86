"""UNITER's tasks compile in one piece: no check of theirs looks at a value there."""

from __future__ import annotations

import pytest
import torch
from support.task_batches import batch_of, model_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", ["nlvr2-paired-attn", "retrieval", "re-rank"])
def test_a_task_compiles_whole(task: str) -> None:
    model, batch = model_of(task, num_hidden_layers=1).eval(), batch_of(task)
    if task == "re-rank":
        batch["negatives"] = torch.tensor([0, 1, 0, 0])
    expected = model(**batch)
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
