"""Tiny files in LXMERT's formats, for the tests of what reads them."""

from __future__ import annotations

import torch

from advvl.data.lxmert.lines import Regions


def regions(image_id: str, count: int = 36, *, feature_dim: int = 5, seed: int = 0) -> Regions:
    """An image of 640 by 480 pixels."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([640.0, 480.0])
    return Regions(
        image_id=image_id,
        height=480,
        width=640,
        object_ids=torch.randint(1600, (count,), generator=generator),
        object_scores=torch.rand(count, generator=generator),
        attribute_ids=torch.randint(400, (count,), generator=generator),
        attribute_scores=torch.rand(count, generator=generator),
        boxes=corners.flatten(1),
        features=torch.randn(count, feature_dim, generator=generator),
    )
