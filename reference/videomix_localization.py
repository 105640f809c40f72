"""Where and when an action happens, learned from video labels alone, and how well: mAP at an IoU.

The weakly supervised localisation of "VideoMix: Rethinking Data Augmentation for Video
Classification", S. Yun, S. J. Oh, B. Heo, D. Han, J. Kim, 2020, arXiv:2012.03457 (THUMOS'14, AVA).

A classifier that ends in mean pooling and a linear layer tells how much every place of its last
feature map f (C, T, H, W) adds to the logit of class k:

    M_k(t, h, w) = w_k . f(t, h, w) + b_k       class activation map: its mean is the logit
    A_k(t)       = mean_{h, w} M_k(t, h, w)     class activation sequence

`localize_actions` cuts a sequence at many thresholds, scores each run of frames by what is inside
it minus what is beside it, and keeps the best of those that overlap. `detection_ap` compares scored
segments, or boxes, with the true ones. Segments are (start, end), boxes (x0, y0, x1, y1), both in
any unit.

>>> sequence = torch.tensor([0.0, 0, 1, 1, 1, 0, 0, 0])
>>> segments, scores = localize_actions(sequence)
>>> segments.tolist(), scores.tolist()
([[2.0, 5.0]], [1.0])
>>> found = [(segments, torch.tensor([3]), scores)]
>>> detection_ap(found, [(torch.tensor([[2.0, 6.0]]), torch.tensor([3]))], thresholds=(0.5, 0.9))
{'mAP@0.5': 1.0, 'mAP@0.9': 0.0, 'mAP': 0.5}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

THUMOS_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def class_activation_maps(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, K, T, H, W) maps M from features (B, C, T, H, W), weight (K, C) and bias (K,)."""
    if features.ndim != 5 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(f"features must be (B, C, T, H, W) and weight (K, C), "
                         f"not {tuple(features.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},) as weight has rows, "
                         f"not {tuple(bias.shape)}")
    maps = torch.einsum("bcthw,kc->bkthw", features, weight)
    return maps if bias is None else maps + bias.view(-1, 1, 1, 1)


def class_activation_sequence(features: Tensor, weight: Tensor,
                              bias: Tensor | None = None) -> Tensor:
    """(B, K, T) sequences A; arguments as of `class_activation_maps`."""
    return class_activation_maps(features, weight, bias).mean((3, 4))


def interval_iou(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) float64 intersection over union of segments (N, 2), or of boxes (N, 4); 0 if empty."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] not in (2, 4):
        raise ValueError(f"a and b must both be (N, 2) or (N, 4), "
                         f"not {tuple(a.shape)} and {tuple(b.shape)}")
    half, a, b = a.shape[1] // 2, a.double(), b.double()
    low = torch.maximum(a[:, None, :half], b[:, :half])
    high = torch.minimum(a[:, None, half:], b[:, half:])
    shared = (high - low).clamp(min=0).prod(2)
    size_a, size_b = ((v[:, half:] - v[:, :half]).clamp(min=0).prod(1) for v in (a, b))
    union = size_a.unsqueeze(1) + size_b - shared
    return shared / union.masked_fill(union == 0, 1)


def localize_actions(sequence: Tensor, levels: int = 16, nms_iou: float = 0.3,
                     margin: float = 0.25) -> tuple[Tensor, Tensor]:
    """Segments (N, 2) in frames, end exclusive, and scores (N,), from one sequence (T,).

    Candidates are the runs above each of `levels` thresholds from the smallest value on. Score:
    mean inside minus mean of the `margin` of its length on either side (the outer-inner contrast of
    AutoLoc, Shou et al. 2018), so that neither a part of an action nor one with its surroundings
    wins. Of candidates that overlap by an IoU above `nms_iou` the best is kept; scores descend. A
    constant sequence has none.
    """
    if sequence.ndim != 1 or len(sequence) < 1 or not sequence.isfinite().all():
        raise ValueError(f"sequence must be (T,) finite numbers, not {tuple(sequence.shape)}")
    if levels < 1 or not 0 <= nms_iou <= 1 or not 0 <= margin < math.inf:
        raise ValueError(f"levels must be >= 1, nms_iou in [0, 1] and margin finite and >= 0, "
                         f"not {levels}, {nms_iou} and {margin}")
    values, frames = sequence.detach().double().cpu(), len(sequence)
    low, high = values.min(), values.max()
    thresholds = low + (high - low) * torch.arange(levels) / levels
    above = F.pad((values > thresholds.unsqueeze(1)).long(), (1, 1)).diff(dim=1)   # (levels, T + 1)
    start, end = (above == 1).nonzero()[:, 1], (above == -1).nonzero()[:, 1]
    candidates = torch.unique(torch.stack([start, end], 1), dim=0)
    start, end = candidates.T
    total = F.pad(values.cumsum(0), (1, 0))
    reach = ((end - start) * margin).ceil().long()
    left, right = (start - reach).clamp(min=0), (end + reach).clamp(max=frames)
    inside = total[end] - total[start]
    beside = (total[right] - total[left] - inside) / (right - left - end + start).clamp(min=1)
    scores, order = (inside / (end - start) - beside).sort(descending=True, stable=True)
    candidates, kept = candidates[order], []
    apart = torch.ones(len(candidates), dtype=torch.bool)      # from all that are kept
    for row in range(len(candidates)):
        if apart[row]:
            kept.append(row)
            apart &= interval_iou(candidates[row:row + 1], candidates)[0] <= nms_iou
    return candidates[kept].double(), scores[kept]


def average_precision(hits: Tensor, positives: int, interpolated: bool = False) -> Tensor:
    """(...,) from hits (..., N), 1 or 0 in descending order of score: the sum over the hits of the
    precision there, divided by the number of true ones (as for THUMOS'14). interpolated: of the
    largest precision there or later (as for PASCAL VOC and AVA)."""
    if positives < 1:
        raise ValueError(f"positives must be at least 1, not {positives}")
    precision = hits.cumsum(-1) / torch.arange(1, hits.shape[-1] + 1, device=hits.device)
    if interpolated:
        precision = precision.flip(-1).cummax(-1).values.flip(-1)
    return (hits * precision).sum(-1) / positives


def _ranked(k: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """Rows of class k in descending order of score."""
    rows = (labels == k).nonzero().flatten()
    return rows[scores[rows].argsort(descending=True, stable=True)]


def _hits(overlap: Tensor, limits: Tensor, only_free: bool) -> Tensor:
    """(L, N) bool at the limits (L,): which detections of one class and video are right, from
    their IoU (N, M) with the true ones. Those above choose first."""
    free = torch.ones(len(limits), overlap.shape[1], dtype=torch.bool)
    hits = torch.zeros(len(limits), len(overlap), dtype=torch.bool)
    every = torch.arange(len(limits))
    for rank, row in enumerate(overlap):
        best = torch.where(free, row, -1.0 if only_free else row).max(1)
        hits[:, rank] = (best.values >= limits) & free[every, best.indices]
        free[every, best.indices] &= ~hits[:, rank]
    return hits


def detection_ap(detections: Sequence[tuple], truths: Sequence[tuple],
                 thresholds: Sequence[float] = THUMOS_THRESHOLDS,
                 rule: str = "thumos") -> dict[str, float]:
    """Mean over classes of the AP at each IoU threshold: {"mAP@0.5": ..., "mAP": mean of these}.

    detections: one (segments (N, 2) or boxes (N, 4), labels (N,), scores (N,)) per video or key
    frame; truths: one (segments or boxes, labels) for each. In descending order of score, over all
    videos, a detection is compared with the true one of its class and video that it overlaps most;
    it is a hit, and takes that one, if their IoU reaches the threshold. rule "thumos": only those
    still free are compared. "ava" (PASCAL VOC's): all are, so that a detection of one that is taken
    is wrong, and the precision is interpolated. Classes without a true one do not count.
    """
    if len(detections) != len(truths):
        raise ValueError(f"detections are of {len(detections)} videos, truths of {len(truths)}")
    if rule not in ("thumos", "ava"):
        raise ValueError(f"rule must be thumos or ava, not {rule!r}")
    limits = torch.tensor(list(thresholds), dtype=torch.float64)
    if not len(limits) or not ((limits > 0) & (limits <= 1)).all():
        raise ValueError(f"thresholds must be numbers in (0, 1], not {thresholds}")
    detections, truths = (
        [[torch.as_tensor(part).detach().cpu() for part in video] for video in videos]
        for videos in (detections, truths))
    if not any(len(of) for _, of in truths):
        raise ValueError("truths hold nothing to find")
    hits = []
    for number, ((places, labels, scores), (true, of)) in enumerate(zip(detections, truths)):
        if not len(places) == len(labels) == len(scores) or len(true) != len(of):
            raise ValueError(f"video {number}: detections are {len(places)} places, {len(labels)} "
                             f"labels and {len(scores)} scores, truths {len(true)} places and "
                             f"{len(of)} labels")
        if scores.isnan().any():
            raise ValueError(f"video {number}: scores of detections must be numbers, not NaN")
        hits.append(torch.zeros(len(limits), len(labels), dtype=torch.bool))
        for k in of.unique():
            rows = _ranked(k, labels, scores)
            overlap = interval_iou(places[rows], true[of == k])
            hits[-1][:, rows] = _hits(overlap, limits, rule == "thumos")
    hits, table = torch.cat(hits, 1).double(), []
    labels, scores, of = (torch.cat(parts) for parts in (
        [labels for _, labels, _ in detections], [scores.double() for *_, scores in detections],
        [of for _, of in truths]))
    for k, positives in zip(*of.unique(return_counts=True)):
        rows = _ranked(k, labels, scores)
        table.append(average_precision(hits[:, rows], int(positives), rule == "ava"))
    mean = torch.stack(table).mean(0)
    named = {f"mAP@{limit:g}": value for limit, value in zip(limits.tolist(), mean.tolist())}
    return {**named, "mAP": mean.mean().item()}


def _demonstrate() -> None:
    """Actions in noisy sequences, found and scored."""
    generator, one = torch.Generator().manual_seed(0), torch.zeros(1, dtype=torch.int64)
    for noise in (0.1, 0.25, 0.4):
        found, truths = [], []
        for _ in range(100):
            start, length = torch.randint(8, 24, (2,), generator=generator).tolist()
            sequence = noise * torch.randn(48, generator=generator)
            sequence[start:start + length] += 1
            segments, scores = localize_actions(sequence)
            found.append((segments, one.expand(len(segments)), scores))
            truths.append((torch.tensor([[start, start + length]]), one))
        figures = detection_ap(found, truths, (0.3, 0.5, 0.7)).items()
        print(f"noise {noise:4.2f}   " + "   ".join(f"{key} {value:.2f}" for key, value in figures))


if __name__ == "__main__":
    _demonstrate()
