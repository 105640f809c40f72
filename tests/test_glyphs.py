"""Embedded glyphs: the same shapes for every seed, each in the box its mask says."""

import pytest
import torch

from data_tools.glyphs import bird_variants, glyph_scenes, mini_birds


@pytest.mark.parametrize("make, classes", [(glyph_scenes, 8), (mini_birds, 12)])
def test_a_class_has_its_glyph_for_every_seed(make, classes):
    seen = set()
    for seed in (1, 2):
        data = make(60, seed, noise=0.0, labels=[3] * 60)
        first = data["masks"] if data["masks"].ndim == 3 else data["masks"][:, 0]
        boxes = torch.stack([i[:, m] for i, m in zip(data["images"], first)])       # (60, 3, 49)
        seen |= {tuple((box.sum(0) > 0).tolist()) for box in boxes}
    assert len(seen) == 1
    drawn = make(40, 3)
    assert drawn["labels"].dtype == torch.int64 and drawn["masks"].dtype == torch.bool
    again, other = make(40, 3), make(40, 4)
    assert all(torch.equal(drawn[key], again[key]) for key in drawn)
    assert not torch.equal(drawn["images"], other["images"])
    given = torch.tensor([1, 0])
    make(2, labels=given)["labels"].zero_()
    assert given.tolist() == [1, 0]                           # the caller's labels stay theirs
    assert make(0)["images"].shape == (0, 3, 32, 32)
    for labels in (torch.zeros(2), torch.zeros(3, dtype=torch.int64), [0, classes], [-1, 0]):
        with pytest.raises(ValueError, match=f"labels must be .2,. int64 .* 0..{classes - 1}"):
            make(2, labels=labels)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        make(-1)


def test_birds_differ_in_one_to_three_parts():
    variants = bird_variants()
    differ = (variants[:, None] != variants).sum(2)
    assert set(differ.flatten().tolist()) == {0, 1, 2, 3} and (differ == 0).sum() == 12
