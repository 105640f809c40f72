"""Embedded images whose recognition cue is known: small binary glyphs in noise.

    data = glyph_scenes(2000, seed=0)        one glyph of 8 tells the class, three others do not
    data = mini_birds(2000, seed=0)          12 classes of three parts, which differ in one to three

    data["images"]   (N, 3, 32, 32) float32, about unit scale
    data["labels"]   (N,) int64
    data["masks"]    bool boxes: (N, 32, 32) of the class's glyph, or (N, 3, 32, 32) of each part

The glyphs are the same for every seed: a network trained on one set can be tested on another.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIDE, GLYPH, CELL = 32, 7, 8
CLASSES, DISTRACTORS = 8, 6
PART_PLACES = ((0, 0), (0, 11), (11, 5))                      # y, x of the parts within a bird
PART_VARIANTS = (3, 2, 2)


def patterns(count: int, seed: int) -> Tensor:
    """(count, 7, 7) bool: random glyphs, half of the pixels on."""
    return torch.rand(count, GLYPH, GLYPH, generator=torch.Generator().manual_seed(seed)) < 0.5


def _paint(images: Tensor, masks: Tensor, glyphs: Tensor, colors: Tensor, y: Tensor,
           x: Tensor) -> None:
    """Add one glyph (N, 7, 7) in a color (N, 3) to each image at (y, x); mark its box in masks."""
    rows = torch.arange(len(images)).view(-1, 1, 1)
    line = torch.arange(GLYPH)
    ys, xs = y.view(-1, 1, 1) + line.view(1, -1, 1), x.view(-1, 1, 1) + line.view(1, 1, -1)
    images[rows, :, ys, xs] += glyphs.unsqueeze(3) * colors[:, None, None]
    masks[rows, ys, xs] = True


def _check(count: int, labels: Tensor | None, classes: int, generator: torch.Generator) -> Tensor:
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    drawn = torch.randint(classes, (count,), generator=generator)      # keeps what follows the same
    if labels is None:
        return drawn
    labels = torch.as_tensor(labels).clone()                           # not the caller's own
    if (labels.shape != (count,) or labels.dtype != torch.int64
            or (count and not 0 <= labels.min() <= labels.max() < classes)):
        raise ValueError(f"labels must be ({count},) int64 with values in 0..{classes - 1}, "
                         f"not {tuple(labels.shape)} {labels.dtype}")
    return labels


def glyph_scenes(count: int, seed: int = 0, *, noise: float = 0.3,
                 labels: Tensor | None = None) -> dict[str, Tensor]:
    """Four glyphs in random colours in four of the 4 x 4 cells: one of 8 that tell the class, and
    three of 6 others.

    `labels` (N,) fixes the classes. ValueError: a negative count, labels that do not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = _check(count, labels, CLASSES, generator)
    images = noise * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    masks = torch.zeros(2, count, SIDE, SIDE, dtype=torch.bool)        # the class's glyph, others
    cells = torch.rand(count, (SIDE // CELL) ** 2, generator=generator).argsort(1)[:, :4]
    others = torch.rand(count, DISTRACTORS, generator=generator).argsort(1)[:, :3] + CLASSES
    glyphs = patterns(CLASSES + DISTRACTORS, seed=1)
    for number, kind in enumerate((labels, *others.T)):
        y, x = (cells[:, number] // 4) * CELL, (cells[:, number] % 4) * CELL
        colors = 0.6 + 0.8 * torch.rand(count, 3, generator=generator)
        _paint(images, masks[min(number, 1)], glyphs[kind], colors, y, x)
    return {"images": images, "labels": labels, "masks": masks[0]}


def bird_variants() -> Tensor:
    """(12, 3) int64: the variant of each part in each class of `mini_birds`."""
    return torch.cartesian_prod(*map(torch.arange, PART_VARIANTS))


def mini_birds(count: int, seed: int = 0, *, noise: float = 0.4,
               labels: Tensor | None = None) -> dict[str, Tensor]:
    """One object of three parts at fixed offsets, anywhere in the image; a class is a choice of
    variants of the parts.

    `labels` (N,) fixes the classes. ValueError: a negative count, labels that do not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    variants = bird_variants()
    labels = _check(count, labels, len(variants), generator)
    images = noise * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    masks = torch.zeros(3, count, SIDE, SIDE, dtype=torch.bool)
    room = SIDE - GLYPH - 11 + 1
    y, x = torch.randint(room, (2, count), generator=generator)
    glyphs = patterns(sum(PART_VARIANTS), seed=2).split(PART_VARIANTS)
    for part, (dy, dx) in enumerate(PART_PLACES):
        colors = 0.6 + 0.8 * torch.rand(count, 3, generator=generator)
        _paint(images, masks[part], glyphs[part][variants[labels, part]], colors, y + dy, x + dx)
    return {"images": images, "labels": labels, "masks": masks.transpose(0, 1)}
