"""VILLA on visual questions of your own, from texts, region features, boxes and answers, in 20 lines.

Put your data in place of the made-up examples, transformers' tokeniser of "bert-base-cased" in place of one made for them,
and a checkpoint's weights into the model: `advvl.models.uniter.checkpoint.load_pretrained(model, "uniter-base.pt")`.
"""

import torch
from torch.utils.data import DataLoader

from advvl import adapt, villa
from advvl.data.uniter.vqa import UniterCollate
from advvl.data.vqa import VQAExample, frequent_answers
from advvl.data.wordpiece import build_tokenizer
from advvl.models.uniter.config import UniterConfig
from advvl.tasks.uniter.vqa import UniterForVQA

examples = [
    VQAExample("what is it ?", torch.randn(2, 2048), [[0, 0, 320, 480], [80, 60, 400, 300]], name, size=(640, 480))
    for name in ("dog", "cat", "horse", "cow")
]  # a text, region features, boxes x1, y1, x2, y2 in pixels, the answer, the image's width and height
collate = UniterCollate(build_tokenizer(example.text for example in examples), frequent_answers(examples))
model = UniterForVQA(UniterConfig.tiny(vocab_size=collate.vocab_size, img_dim=2048), num_answers=len(collate.answers))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
target, method = adapt(model), villa(step_sizes={"text": 1e-3, "image": 1e-3})
for batch in DataLoader(examples, batch_size=2, shuffle=True, collate_fn=collate):
    print(method.step(target, batch))
    optimizer.step()
    optimizer.zero_grad()
