"""The embedded videos: what moves, where it is, and which scene it is over."""

import pytest
import torch

from data_tools import synthetic


def test_a_square_moves_in_the_direction_of_its_class():
    data = synthetic.videos(40, 16, 8, seed=1, noise=0.0)
    steps = {0: (2, 0), 1: (0, 2), 2: (-2, 0), 3: (0, -2)}
    assert data["videos"].shape == (40, 3, 8, 16, 16) and data["videos"].dtype == torch.uint8
    for video, mask, boxes, label in zip(*(data[k]
                                           for k in ("videos", "masks", "boxes", "labels"))):
        dx, dy = steps[int(label)]
        for t in range(7):
            assert torch.equal(mask[t].roll((dy, dx), (0, 1)), mask[t + 1])
        x0, y0, x1, y1 = boxes[3].tolist()
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[torch.arange(y0, y1) % 16] = True
        inside &= torch.isin(torch.arange(16), torch.arange(x0, x1) % 16)
        assert torch.equal(inside, mask[3]) and mask[3].sum() == 16
        still = ~mask.any(0)  # the scene under no frame's actor
        assert (video[:, :, still] == video[:, :1, still]).all()
        assert (video[:, 0][:, mask[0]] == video[:, 5][:, mask[5]][:, :1]).all()


def test_scenes():
    own = synthetic.videos(30, seed=2)
    assert (own["scenes"] == -1).all()
    backgrounds = own["videos"].float().median(2).values.flatten(1)
    assert torch.cdist(backgrounds, backgrounds).add(1e9 * torch.eye(30)).min() > 100
    told = synthetic.videos(400, seed=3, rho=1.0)
    assert torch.equal(told["scenes"], told["labels"])
    mixed = synthetic.videos(4000, seed=4, rho=0.6)
    share = (mixed["scenes"] == mixed["labels"]).float().mean().item()
    assert share == pytest.approx(0.6 + 0.4 / 4, abs=0.03)
    a, b = (synthetic.videos(200, seed=seed, rho=0.0, noise=0.0) for seed in (5, 6))
    first, second = (d["videos"].float().median(2).values[d["scenes"] == 2].median(0).values
                     for d in (a, b))
    assert (first - second).abs().max() < 3  # class scenes are the same for every seed


def test_untrimmed_videos_stand_still_outside_the_action():
    data = synthetic.videos(30, 16, 24, seed=7, action_frames=8)
    assert (data["intervals"][:, 1] - data["intervals"][:, 0] == 8).all()
    for mask, (start, end) in zip(data["masks"], data["intervals"].tolist()):
        moved = (mask[1:] != mask[:-1]).flatten(1).any(1)
        assert moved.nonzero().flatten().tolist() == list(range(start, end - 1))
    assert len(data["intervals"][:, 0].unique()) > 5


def test_a_seed_determines_everything_and_bad_input_is_refused():
    a, b = (synthetic.videos(5, seed=9, rho=0.5) for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["videos"], synthetic.videos(5, seed=10, rho=0.5)["videos"])
    assert synthetic.videos(3, labels=torch.tensor([3, 3, 0]))["labels"].tolist() == [3, 3, 0]
    assert (synthetic.videos(0)["videos"].shape[0] == 0
            and synthetic.videos(4, 32, 4, classes=6)["masks"].sum() == 4 * 4 * 64)
    for options in ({"size": 4}, {"classes": 1}, {"action_frames": 9}, {"rho": 1.5}, {"count": -1}):
        with pytest.raises(ValueError):
            synthetic.videos(**{"count": 2, **options})
