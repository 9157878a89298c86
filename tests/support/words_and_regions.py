"""A small ReLU network of words and regions in fp64, whose outputs can be bounded: untrained, and trained to answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WordsAndRegions(nn.Module):
    """A question of word embeddings `(B, T, 4)` about regions `(B, R, 3)`, pooled and joined: logits `(B, 3)`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words, self.regions, self.relu = nn.Identity(), nn.Identity(), nn.ReLU()
        self.text, self.image = nn.Linear(4, width), nn.Linear(3, width)
        self.joint, self.head = nn.Linear(2 * width, width), nn.Linear(width, 3)

    def forward(self, text: Tensor, image: Tensor, text_mask: Tensor) -> Tensor:
        real = text_mask.unsqueeze(-1).double()
        words = (F.relu(self.text(self.words(text))) * real).sum(1) / real.sum(1)
        regions = self.relu(self.image(self.regions(image))).mean(dim=1)
        joint = self.relu(self.joint(torch.cat([words, regions], dim=-1)))
        return self.head(joint + words - 0.5 * regions)


def drawn(seed: int, *, examples: int = 3) -> tuple[WordsAndRegions, dict[str, Tensor]]:
    torch.manual_seed(seed)
    mask = torch.arange(5) < torch.randint(1, 6, (examples, 1))
    inputs = {"text": torch.randn(examples, 5, 4), "image": torch.randn(examples, 2, 3), "text_mask": mask}
    return WordsAndRegions().double(), {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def trained(seed: int = 0) -> tuple[WordsAndRegions, dict[str, Tensor]]:
    """A network that answers by words and regions, and 40 examples of each answer that it was trained on."""
    network, inputs = drawn(seed, examples=120)
    targets = torch.arange(120) % 3
    inputs["text"] = inputs["text"] * 0.3 + F.one_hot(targets, 4)[:, None]
    inputs["image"] = inputs["image"] * 0.3 + F.one_hot(targets, 3)[:, None]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(**inputs), targets).backward()
        optimizer.step()
    return network.eval(), inputs | {"targets": targets}
