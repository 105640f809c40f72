"""Class activation, segments from sequences, and mean average precision."""

import pytest
import torch

from reference import videomix_localization as vl


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_mean_of_the_maps_is_the_logits():
    features, weight = (torch.randn(2, 5, 4, 3, 6, generator=seeded()).double(),
                        torch.randn(7, 5, generator=seeded(1)).double())
    bias = torch.randn(7, generator=seeded(2)).double()
    logits = features.mean((2, 3, 4)) @ weight.T + bias
    maps, sequence = vl.class_activation_maps(features, weight, bias), vl.class_activation_sequence(
        features, weight, bias
    )
    assert maps.shape == (2, 7, 4, 3, 6) and sequence.shape == (2, 7, 4)
    assert torch.allclose(maps.mean((2, 3, 4)), logits) and torch.allclose(sequence.mean(2), logits)
    assert torch.allclose(vl.class_activation_maps(features, weight), maps - bias.view(-1, 1, 1, 1))


def test_iou_of_segments_and_boxes():
    a, b = torch.tensor([[0.0, 2], [3, 5]]), torch.tensor([[1.0, 3], [3, 5], [9, 9]])
    assert torch.allclose(vl.interval_iou(a, b), torch.tensor([[1 / 3, 0, 0], [0, 1, 0]]).double())
    tiny = 1e-9 * torch.tensor([[1.0, 1, 3, 3], [3, 3, 1, 1]])      # the second is inside out
    assert torch.allclose(vl.interval_iou(tiny, tiny), torch.tensor([[1.0, 0], [0, 0]]).double())
    boxes = vl.interval_iou(torch.tensor([[0, 0, 2, 2]]),
                            torch.tensor([[1, 1, 3, 3], [0, 0, 2, 1], [2, 0, 4, 2]]))
    assert torch.allclose(boxes, torch.tensor([[1 / 7, 1 / 2, 0]]).double())


def test_segments_of_a_sequence():
    sequence = torch.zeros(30)
    sequence[5:12], sequence[20:24] = 2.0, 1.0
    segments, scores = vl.localize_actions(sequence)
    assert segments[:2].tolist() == [[5, 12], [20, 24]] and scores[:2].tolist() == [2.0, 1.0]
    rough = 0.05 * torch.randn(30, generator=seeded(4))
    rough[10:20] += 1
    assert vl.localize_actions(rough)[0][0].tolist() == [10, 20]
    assert len(vl.localize_actions(torch.ones(8))[0]) == 0
    everywhere = torch.ones(8)
    everywhere[0] = 0
    assert vl.localize_actions(everywhere)[0].tolist() == [[1, 8]]
    noisy = torch.rand(50, generator=seeded())
    segments, scores = vl.localize_actions(noisy, nms_iou=0.2)
    overlap = vl.interval_iou(segments, segments) - torch.eye(len(segments))
    assert overlap.max() <= 0.2 and (scores.diff() <= 0).all()


def naive_ap(detections, truths, label, limit, rule):
    """The definition, detection by detection."""
    rows = sorted((-float(score), video, index)
                  for video, (_, labels, scores) in enumerate(detections)
                  for index, (score, k) in enumerate(zip(scores, labels)) if k == label)
    free = {(video, index) for video, (_, labels) in enumerate(truths)
            for index, k in enumerate(labels) if k == label}
    every, precisions, hits = sorted(free), [], []
    for rank, (_, video, index) in enumerate(rows, 1):
        s, e = detections[video][0][index].tolist()
        best, chosen = -1.0, None
        for v, i in every if rule == "ava" else sorted(free):
            if v == video:
                a, b = truths[v][0][i].tolist()
                shared = max(0.0, min(e, b) - max(s, a))
                iou = shared / (e - s + b - a - shared)
                if iou > best:
                    best, chosen = iou, (v, i)
        hits.append(best >= limit and chosen in free)
        if hits[-1]:
            free.discard(chosen)
        precisions.append(sum(hits) / rank)
    if rule == "ava":
        precisions = [max(precisions[i:]) for i in range(len(precisions))]
    return sum(p for p, hit in zip(precisions, hits) if hit) / len(every)


@pytest.mark.parametrize("rule", ["thumos", "ava"])
def test_average_precision_by_definition(rule):
    generator = seeded(3)

    def segments(count):
        start = torch.rand(count, generator=generator) * 8
        return torch.stack([start, start + 0.5 + 3 * torch.rand(count, generator=generator)], 1)

    truths = [(segments(4), torch.randint(2, (4,), generator=generator)) for _ in range(6)]
    detections = [(segments(8), torch.randint(3, (8,), generator=generator),
                   torch.rand(8, generator=generator)) for _ in range(6)]
    detections[0][2][:] = detections[1][2][:] = 0.5                     # ties: in the given order
    found = vl.detection_ap(detections, truths, (0.1, 0.3, 0.5), rule)
    for limit in (0.1, 0.3, 0.5):
        expected = sum(naive_ap(detections, truths, label, limit, rule) for label in (0, 1)) / 2
        assert found[f"mAP@{limit}"] == pytest.approx(expected, abs=1e-12)
    assert found["mAP"] == pytest.approx(sum(found[f"mAP@{t}"] for t in (0.1, 0.3, 0.5)) / 3)


def test_a_second_detection_of_the_same_action_is_wrong():
    one = torch.tensor([0])
    truth = [(torch.tensor([[0.0, 10]]), one)]
    twice = [(torch.tensor([[0.0, 10], [0, 9]]), torch.tensor([0, 0]), torch.tensor([0.5, 0.9]))]
    assert vl.detection_ap(twice, truth, (0.5, 0.95)) == {
        "mAP@0.5": 1.0,
        "mAP@0.95": 0.5,
        "mAP": 0.75,
    }
    both = [(torch.tensor([[0.0, 10], [2, 12]]), torch.tensor([0, 0]))]
    same = [(torch.tensor([[0.0, 10], [0, 10]]), torch.tensor([0, 0]), torch.tensor([0.9, 0.8]))]
    assert vl.detection_ap(same, both, (0.5,))["mAP"] == 1.0
    assert vl.detection_ap(same, both, (0.5,), "ava")["mAP"] == 0.5
    nothing = [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0))]
    assert vl.detection_ap(nothing, truth)["mAP"] == 0
    precision = vl.average_precision(torch.tensor([1.0, 0, 1]), 2).item()
    assert precision == pytest.approx((1 + 2 / 3) / 2)


def test_bad_input():
    one, truth = [(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1))], [(torch.zeros(1, 2), [0])]
    clips = torch.zeros(2, 3, 4, 5, 6)
    for call, words in [
        (lambda: vl.class_activation_maps(torch.zeros(2, 3, 4), torch.zeros(2, 3)), "features"),
        (lambda: vl.class_activation_maps(clips, torch.zeros(2, 4)), "weight"),
        (lambda: vl.class_activation_maps(clips, torch.zeros(2, 3), torch.zeros(1)), "bias"),
        (lambda: vl.interval_iou(torch.zeros(2, 2), torch.zeros(2, 4)), "a and b"),
        (lambda: vl.localize_actions(torch.zeros(2, 3)), "sequence"),
        (lambda: vl.localize_actions(torch.tensor([0.0, float("nan")])), "finite"),
        (lambda: vl.localize_actions(torch.zeros(3), 0), "levels"),
        (lambda: vl.localize_actions(torch.zeros(3), margin=float("inf")), "margin"),
        (lambda: vl.average_precision(torch.zeros(3), 0), "positives"),
        (lambda: vl.detection_ap(one, truth, (0.5, 1.1)), "thresholds"),
        (lambda: vl.detection_ap(one, truth, ()), "thresholds"),
        (lambda: vl.detection_ap(one, truth, rule="coco"), "rule"),
        (lambda: vl.detection_ap([(*one[0][:2], torch.tensor([float("nan")]))], truth), "scores"),
        (lambda: vl.detection_ap([(*one[0][:2], torch.zeros(2))], truth), "2 scores"),
        (lambda: vl.detection_ap(one, []), "1 videos"),
        (lambda: vl.detection_ap([], []), "nothing"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
