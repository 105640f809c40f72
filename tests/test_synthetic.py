import pytest
import torch

from data_tools import synthetic
from data_tools.synthetic import Batches, mask_boxes, shapes, to_float


def test_shapes_are_determined_by_their_seed_and_their_boxes_are_tight():
    data, again, other = shapes(60, seed=3), shapes(60, seed=3), shapes(60, seed=4)
    assert all(torch.equal(data[key], again[key])
               for key in data) and not torch.equal(data["images"], other["images"])
    assert data["images"].shape == (60, 3, 32, 32) and data["images"].dtype == torch.uint8
    assert data["labels"].min() >= 0 and data["labels"].max() < len(synthetic.CLASSES) == 10
    for mask, (x0, y0, x1, y1) in zip(data["masks"], data["boxes"].tolist()):
        assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


def test_chunks_do_not_show_and_sizes_scale(monkeypatch):
    large = shapes(8, size=64, labels=torch.arange(8), noise=0)
    assert large["images"].shape == (8, 3, 64, 64) and torch.equal(large["labels"], torch.arange(8))
    colours = large["images"][0].flatten(1).unique(dim=1)
    # a plain disc: foreground and background, nothing else
    assert colours.shape[1] == 2
    assert shapes(0)["boxes"].shape == (0, 4)
    labels = torch.arange(8)
    shapes(8, labels=labels)["labels"].zero_()
    assert torch.equal(labels, torch.arange(8))               # the caller's are not handed out
    monkeypatch.setattr(synthetic, "CHUNK", 7)
    assert shapes(20)["images"].shape == (20, 3, 32, 32)


def test_shapes_have_their_areas():
    one = torch.ones(5)
    area = synthetic.shape_mask(torch.arange(5), 201, 100 * one, 100 * one,
                                80 * one).flatten(1).float().sum(1) / 80**2
    expected = torch.tensor([torch.pi, 1.6**2, 3 * 3**0.5 / 4, 4 * 0.6 - 0.36, 0.7 * torch.pi])
    assert torch.allclose(area, expected, rtol=0.03)
    turned = synthetic.shape_mask(torch.arange(5), 201, 100 * one, 100 * one, 80 * one, 0.3 * one)
    assert torch.allclose(turned.flatten(1).float().sum(1) / 80**2, expected, rtol=0.03)


def test_colored_objects_are_apart_and_of_different_classes():
    data, again = synthetic.colored_objects(50, seed=1), synthetic.colored_objects(50, seed=1)
    assert all(torch.equal(data[key], again[key]) for key in data)
    assert data["images"].shape == (50, 3, 64,
                                    64) and (data["classes"][:, 0] != data["classes"][:, 1]).all()
    assert (data["labels"].unsqueeze(1) == data["classes"]).any(1).all()
    assert not (data["masks"][:, 0] & data["masks"][:, 1]).any()
    assert data["masks"].flatten(2).any(2).all()
    assert torch.equal(data["boxes"][:, 1], mask_boxes(data["masks"][:, 1]))
    single = synthetic.colored_objects(9, objects=1, size=32)
    assert single["images"].shape == (9, 3, 32, 32) and torch.equal(single["labels"],
                                                                    single["classes"][:, 0])
    mask = single["masks"][0, 0]
    strongest = single["images"][0].float()[:, mask].mean(1)
    expected = torch.tensor(list(synthetic.PALETTE.values())[int(single["labels"][0]) % 4]) * 255
    assert (strongest - expected).abs().max() < 50
    with pytest.raises(ValueError, match="objects must be 1 or 2"):
        synthetic.colored_objects(3, objects=3)


def test_bad_arguments():
    for arguments in ({"count": -1}, {"count": 3, "size": 4},
                      {"count": 2, "labels": torch.tensor([0, 10])},
                      {"count": 3, "labels": torch.tensor([0])}):
        with pytest.raises(ValueError):
            shapes(**arguments)
    for make, classes in ((shapes, 10), (synthetic.scenes, 10), (synthetic.videos, 4),
                          (synthetic.captioned_shapes, 30)):
        for labels in (torch.zeros(3).long(), torch.tensor([0, classes]), torch.tensor([-1, 0])):
            with pytest.raises(ValueError, match=rf"labels must be \(2,\) .* 0..{classes - 1}"):
                make(2, labels=labels)
        with pytest.raises(TypeError, match="labels must be an int64 tensor"):
            make(2, labels=torch.zeros(2))
        with pytest.raises(ValueError, match="count must be >= 0 and size"):
            make(2, 4)
    with pytest.raises(ValueError, match="count must be >= 0 and size"):
        synthetic.colored_objects(-1)
    with pytest.raises(ValueError, match="equal lengths"):
        Batches(torch.zeros(3), torch.zeros(4), batch_size=1)
    with pytest.raises(ValueError, match="batch_size"):
        Batches(torch.zeros(3), batch_size=3, world_size=2)
    for rank, world in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank must be in .*, not {rank} of {world}"):
            Batches(torch.zeros(3), batch_size=2, rank=rank, world_size=world)
    for epoch, start in ((-1, 0), (0, -1), (0, 3)):
        with pytest.raises(ValueError, match="an epoch has 2 batches"):
            Batches(torch.zeros(3), batch_size=2).set_epoch(epoch, start)
    for noise in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="noise must be >= 0"):
            shapes(2, noise=noise)


def test_empty_mask_has_a_zero_box():
    masks = torch.zeros(2, 5, 6, dtype=torch.bool)
    masks[1, 4, 5] = True
    assert mask_boxes(masks).tolist() == [[0, 0, 0, 0], [5, 4, 6, 5]]


def test_batches_resume_in_the_middle_and_share_among_processes():
    rows = torch.arange(23)
    loader = Batches(rows, rows * 2, batch_size=4, seed=1)
    loader.set_epoch(5)
    whole = [a.tolist() for a, b in loader if torch.equal(b, 2 * a)]
    assert len(whole) == len(loader) == 6 and sorted(sum(whole, [])) == list(range(23))
    loader.set_epoch(5, 3)
    assert [a.tolist() for a, _ in loader] == whole[3:]
    # the next epoch has another order, from its start
    assert [a.tolist() for a, _ in loader] != whole
    parts = [Batches(rows, batch_size=4, seed=1, rank=r, world_size=2) for r in range(2)]
    for part in parts:
        part.set_epoch(5)
    assert [sorted(a.tolist() + b.tolist()) for (a,), (b,) in zip(*parts)] == [sorted(batch)
                                                                               for batch in whole]
    assert len(Batches(rows, batch_size=4, drop_last=True)) == 5
    with pytest.raises(ValueError, match=f"{len(rows)} samples do not fill a batch of 64"):
        Batches(rows, batch_size=64, drop_last=True)
    for shuffle, counts in ((True, [4, 4]), (False, [4, 4, 1])):   # nobody trains on an empty batch
        first = Batches(rows[:17], batch_size=8, shuffle=shuffle, world_size=2)
        assert [len(a) for a, in first] == counts and len(first) == len(counts)


def test_to_float():
    assert torch.allclose(to_float(torch.tensor([0, 255], dtype=torch.uint8)),
                          torch.tensor([-0.5, 0.5]) / 0.3)
