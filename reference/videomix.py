"""VideoMix: cut-and-paste augmentation of videos.

Paper: "VideoMix: Rethinking Data Augmentation for Video Classification", S. Yun, S. J. Oh, B. Heo, D. Han, J. Kim, 2020,
arXiv:2012.03457. No official code exists.

Two clips A and B with labels y_A and y_B; a cuboid of B replaces the same cuboid of A, and the labels are mixed by volume:

    x' = M * x_A + (1 - M) * x_B          M = 0 in [t1, t2) x [h1, h2) x [w1, w2), else 1
    y' = lam y_A + (1 - lam) y_B          lam = 1 - (t2 - t1)(h2 - h1)(w2 - w1) / (T H W), after clipping

    S   spatial          all frames of a box: sides sqrt(r) of the image        the paper's choice
    T   temporal         all pixels of r T consecutive frames
    ST  spatio-temporal  r^(1/3) of every axis

with r = 1 - lam0, lam0 ~ Beta(alpha, alpha), and a uniform centre. The box is the same in all frames of a clip: motion
stays intact, unlike with a CutMix per frame. Boxes at the border are cut off, so A keeps more than half on average
(expected pasted volume for alpha = 1: S 0.32, T 0.42, ST 0.24). Here too: Mixup, FadeMixup (weights linear in time),
CutMixup, frame-wise CutMix, Cutout, consistent RandAugment, all with the same call; a tuple (slow, fast) of SlowFast's
pathways is cut at the same place and time. `boxes` are `(t1, t2, h1, h2, w1, w2)`, half open.

To copy: `sample_cuboid`, `apply_cuboid`, `mix_labels`, or all of it:

>>> mix = VideoMix("S", num_classes=3)
>>> result = mix(torch.rand(4, 3, 8, 32, 32), torch.tensor([0, 1, 2, 0]), generator=torch.Generator().manual_seed(0))
>>> result.x.shape, result.target.shape, result.boxes[:2], bool(0 <= result.lam <= 1)
(torch.Size([4, 3, 8, 32, 32]), torch.Size([4, 3]), (0, 8), True)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn

Box = tuple[int, int, int, int, int, int]
VARIANTS = {"S": (1, 2), "T": (0,), "ST": (0, 1, 2)}          # the axes that are cut


def _one_of(name: str, value: Any, accepted: Iterable[str]) -> None:
    if value not in tuple(accepted):
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, not {value!r}")


def _uniform(generator: torch.Generator | None) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def _beta(alpha: float, generator: torch.Generator | None) -> float:
    a, b = torch._standard_gamma(torch.full((2,), float(alpha), dtype=torch.float64), generator=generator).tolist()
    return a / (a + b) if a + b > 0 else float(_uniform(generator) < 0.5)


# ---------------------------------------------------------------- cuboids (section 3.1)

def sample_cuboid(size_thw: Sequence[int], lam: float, variant: str = "S", rounding: str = "cutmix", placement: str = "center",
                  center: Sequence[float] | None = None, generator: torch.Generator | None = None) -> Box:
    """A box `(t1, t2, h1, h2, w1, w2)` that leaves about the fraction `lam` of the clip, before clipping at the borders.

    rounding "cutmix": lengths int(n f), edges c -+ length // 2 around an integer centre (as all public code does: even
    lengths, empty below 2); "exact": real-valued centre and edges, rounded last. placement "suffix" (variant T only):
    frames int(lam T)..T. `center` (ct, ch, cw): drawn if None; entries of uncut axes are ignored. Axes of length 1 are
    never cut: the root counts the others, so a single frame is cut like an image. ValueError if no axis is left.
    """
    _one_of("variant", variant, VARIANTS)
    _one_of("rounding", rounding, ("cutmix", "exact"))
    _one_of("placement", placement, ("center", "suffix"))
    size = [int(n) for n in size_thw]
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"size_thw must be three positive numbers, not {tuple(size_thw)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], not {lam}")
    if placement == "suffix":
        if variant != "T":
            raise ValueError(f"placement 'suffix' goes with variant 'T', not {variant!r}")
        return (int(lam * size[0]), size[0], 0, size[1], 0, size[2])
    axes = [axis for axis in VARIANTS[variant] if size[axis] > 1]
    if variant == "T" and not axes:
        axes = [axis for axis in (1, 2) if size[axis] > 1]
    if not axes:
        raise ValueError(f"variant {variant!r} has no axis to cut in a clip of {tuple(size)}")
    # the root is that of the variant: sqrt for two axes, cube root for three
    count = len(axes)
    share = math.sqrt(1 - lam) if count == 2 else (1 - lam) ** (1 / count)
    edges = [(0, n) for n in size]
    for axis in axes:
        n = size[axis]
        if rounding == "cutmix":
            middle = int(torch.randint(n, (), generator=generator)) if center is None else int(center[axis])
            half = int(n * share) // 2
            edges[axis] = (min(max(middle - half, 0), n), min(max(middle + half, 0), n))
        else:
            middle = n * _uniform(generator) if center is None else float(center[axis])
            low, high = max(0.0, middle - n * share / 2), min(float(n), middle + n * share / 2)
            edges[axis] = (math.floor(low + 0.5), math.floor(high + 0.5))
    return (*edges[0], *edges[1], *edges[2])


def cuboid_lambda(boxes: Box | Tensor, size_thw: Sequence[int]) -> float | Tensor:
    """1 - volume fraction: a float for one box, (B,) float64 for (B, 6)."""
    volume = math.prod(size_thw)
    if isinstance(boxes, Tensor) and boxes.ndim == 2:
        return 1 - (boxes[:, 1::2] - boxes[:, ::2]).double().prod(1) / volume
    t1, t2, h1, h2, w1, w2 = (int(v) for v in boxes)
    return 1 - (t2 - t1) * (h2 - h1) * (w2 - w1) / volume


def _check_clip(x: Tensor, floating: bool = False) -> None:
    if not isinstance(x, Tensor) or x.ndim != 5:
        raise ValueError(f"clips must be (B, C, T, H, W), not {tuple(getattr(x, 'shape', ()))}")
    if floating and not x.is_floating_point():
        raise ValueError(f"blending needs floating-point clips, not {x.dtype}")


def _check_boxes(boxes: Any, x: Tensor) -> list[Box]:
    """One box, or one per sample, inside the clip."""
    many = isinstance(boxes, Tensor) and boxes.ndim == 2
    rows = boxes.tolist() if many else [[int(v) for v in boxes]]
    if any(len(row) != 6 for row in rows) or (many and len(rows) != len(x)):
        raise ValueError(f"boxes must be 6 integers or ({len(x)}, 6), not {tuple(boxes.shape) if isinstance(boxes, Tensor) else boxes}")
    for row in rows:
        for n, lo, hi in zip(x.shape[2:], row[::2], row[1::2]):
            if not 0 <= lo <= hi <= n:
                raise ValueError(f"box {tuple(row)} is inverted or outside the clip {tuple(x.shape[2:])}")
    return [tuple(row) for row in rows]


def _slices(box: Box) -> tuple[slice, slice, slice]:
    return tuple(slice(lo, hi) for lo, hi in zip(box[::2], box[1::2]))


def apply_cuboid(x: Tensor, boxes: Box | Tensor, perm: Tensor, inplace: bool = False) -> Tensor:
    """Paste the cuboid(s) of x[perm] into x `(B, C, T, H, W)`; boxes: one, or (B, 6) int64.

    Only the cuboids of the partners are gathered, not their clips; with `inplace` nothing else is allocated.
    """
    _check_clip(x)
    rows = _check_boxes(boxes, x)
    perm = perm.to(x.device)
    if len(rows) == 1 and not (isinstance(boxes, Tensor) and boxes.ndim == 2):
        t, h, w = _slices(rows[0])
        patch = x[:, :, t, h, w][perm]                        # a copy: safe to write over its source
        out = x if inplace else x.clone()
        out[:, :, t, h, w] = patch
        return out
    patches = [x[(b, slice(None), *_slices(box))] for b, box in zip(perm.tolist(), rows)]
    if inplace:
        patches = [patch.clone() for patch in patches]
    out = x if inplace else x.clone()
    for b, (box, patch) in enumerate(zip(rows, patches)):
        out[(b, slice(None), *_slices(box))] = patch
    return out


# ---------------------------------------------------------------- blends

def _weights(lam: float | Tensor, x: Tensor) -> float | Tensor:
    if isinstance(lam, Tensor) and lam.ndim:
        if lam.shape != (len(x),):
            raise ValueError(f"lam must be a number or ({len(x)},), not {tuple(lam.shape)}")
        low, high, lam = float(lam.min()), float(lam.max()), lam.to(x.device, x.dtype if x.is_floating_point() else torch.float32)
        lam = lam.view(-1, *[1] * (x.ndim - 1))
    else:
        low = high = lam = float(lam)
    if not (0 <= low and high <= 1):
        raise ValueError(f"lam must be in [0, 1], not {low}..{high}")
    return lam


def mixup_clips(x: Tensor, perm: Tensor, lam: float | Tensor) -> Tensor:
    """lam x + (1 - lam) x[perm]; lam a number or (B,)."""
    _check_clip(x, floating=True)
    lam = _weights(lam, x)
    return lam * x + (1 - lam) * x[perm.to(x.device)]


def _fade(lam: float, adj: float, frames: int) -> Tensor:
    return torch.linspace(lam - adj, lam + adj, frames, dtype=torch.float64)


def fade_mixup_clips(x: Tensor, perm: Tensor, lam: float, adj: float) -> Tensor:
    """Mixup whose weight of x at frame t is linspace(lam - adj, lam + adj, T)[t]."""
    _check_clip(x, floating=True)
    return _blend_frames(x, perm, _fade(float(_weights(lam, x)), adj, x.shape[2]))


def _blend_frames(x: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    weights = weights.to(x.device, x.dtype).view(1, 1, -1, 1, 1)
    return weights * x + (1 - weights) * x[perm.to(x.device)]


def cut_mixup_clips(x: Tensor, box: Box, perm: Tensor, lamt: float, u: float) -> tuple[Tensor, float]:
    """CutMixup: mixup with weight `lamt`, and if u < 0.5 one of the two clips pure inside the box (the other for
    lamt < 0.5). Returns the clips and the label weight of the own sample."""
    mixed = mixup_clips(x, perm, lamt)
    (box,) = _check_boxes(box, x)
    if u >= 0.5:
        return mixed, lamt
    outside = cuboid_lambda(box, x.shape[2:])
    t, h, w = _slices(box)
    mixed[:, :, t, h, w] = x[:, :, t, h, w][perm.to(x.device)] if lamt >= 0.5 else x[:, :, t, h, w]
    return mixed, lamt * outside + (0 if lamt >= 0.5 else 1 - outside)


# ---------------------------------------------------------------- labels and losses

def _smoothed(y: Tensor, num_classes: int | None, smoothing: float) -> Tensor:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), not {smoothing}")
    if y.ndim == 1 and not y.is_floating_point():
        if num_classes is None:
            raise ValueError("num_classes is needed with integer labels")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
            raise ValueError(f"labels must be in 0..{num_classes - 1}, found {int(y.min())}..{int(y.max())}")
        y = F.one_hot(y.long(), num_classes).float()
    elif y.ndim != 2 or not y.is_floating_point():
        raise ValueError(f"y must be (B,) integers or (B, K) floating-point, not {y.dtype} {tuple(y.shape)}")
    return (1 - smoothing) * y + smoothing / y.shape[1]


def mix_labels(y: Tensor, perm: Tensor, lam: float | Tensor, num_classes: int | None = None, smoothing: float = 0.0) -> Tensor:
    """(B, K): smoothed labels, then lam y + (1 - lam) y[perm]. y (B,) integers with num_classes, or (B, K) soft."""
    target = _smoothed(y, num_classes, smoothing)
    lam = _weights(lam, target)
    return lam * target + (1 - lam) * target[perm.to(y.device)]


def _frame_lambdas(boxes: Box | Tensor, size_thw: Sequence[int]) -> Tensor:
    """(B or 1, T) float64: share of own pixels in each frame."""
    rows = torch.as_tensor(boxes, dtype=torch.int64).view(-1, 6)
    frames = torch.arange(size_thw[0])
    inside = (frames >= rows[:, :1]) & (frames < rows[:, 1:2])
    area = ((rows[:, 3] - rows[:, 2]) * (rows[:, 5] - rows[:, 4])).double() / (size_thw[1] * size_thw[2])
    return 1 - inside * area.unsqueeze(1)


def _mix_over_time(target: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    weights = weights.to(target.device, target.dtype).unsqueeze(1)                                 # (B or 1, 1, T)
    return weights * target.unsqueeze(2) + (1 - weights) * target[perm.to(target.device)].unsqueeze(2)


def mix_frame_labels(y: Tensor, perm: Tensor, boxes: Box | Tensor, size_thw: Sequence[int], num_classes: int | None = None,
                     smoothing: float = 0.0) -> Tensor:
    """(B, K, T): the label of every frame, mixed by its own area."""
    return _mix_over_time(_smoothed(y, num_classes, smoothing), perm, _frame_lambdas(boxes, size_thw))


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """mean_b(-sum_k target log softmax(logits)); logits and target (B, K)."""
    if logits.shape != target.shape or logits.ndim != 2:
        raise ValueError(f"logits and target must both be (B, K), not {tuple(logits.shape)} and {tuple(target.shape)}")
    return -(target * logits.log_softmax(1)).sum(1).mean()


def mixed_accuracy(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: float | Tensor) -> float:
    """Mean of lam [prediction = y_a] + (1 - lam) [prediction = y_b], in [0, 1]; integer labels."""
    hit = logits.argmax(1)
    lam = lam.to(logits.device).double() if isinstance(lam, Tensor) else lam
    return (lam * (hit == y_a).double() + (1 - lam) * (hit == y_b).double()).mean().item()


# ---------------------------------------------------------------- the augmentations as modules

class MixResult(NamedTuple):
    """x: mixed clip(s). target (B, K). lam: label weight of the own sample (float, or (B,) float64). perm (B,). boxes:
    what was pasted or erased (6 integers; (B, 6) per sample; (T, 6) frame-wise; None). target_a, target_b: the labels
    that came in. frame_target (B, K, T) or None."""

    x: Any
    target: Tensor
    lam: float | Tensor
    perm: Tensor
    boxes: Any
    target_a: Tensor
    target_b: Tensor
    frame_target: Tensor | None = None


class _Mix(nn.Module):
    """What the augmentations share: checks, the probability, pairing, two pathways, labels.

    `_draw(shape, perm, generator)` of a subclass draws once per call and returns (apply, lam, boxes, frame weights):
    apply(clip, stride) changes a clip whose frame j stands for frame j * stride of the fast one.
    """

    single_clip = False                                       # whether a batch of one makes sense

    def __init__(self, alpha: float, prob: float, pairing: str, num_classes: int | None, smoothing: float,
                 frame_labels: bool = False, allow_single: bool = False, per_sample: bool = False):
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, not {alpha}")
        if not 0 <= prob <= 1:
            raise ValueError(f"prob must be in [0, 1], not {prob}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), not {smoothing}")
        _one_of("pairing", pairing, ("perm", "flip"))
        self.alpha, self.prob, self.pairing, self.num_classes, self.smoothing = alpha, prob, pairing, num_classes, smoothing
        self.frame_labels, self.allow_single, self.per_sample = frame_labels, allow_single, per_sample

    def forward(self, x: Tensor | tuple[Tensor, Tensor], y: Tensor, generator: torch.Generator | None = None) -> MixResult:
        """x: clips (B, C, T, H, W), or (slow, fast); y: (B,) integers or (B, K)."""
        slow, fast = x if isinstance(x, (tuple, list)) else (None, x)
        _check_clip(fast)
        stride = self._stride(slow, fast)
        if len(y) != len(fast):
            raise ValueError(f"y has {len(y)} labels for {len(fast)} clips")
        plain = _smoothed(y, self.num_classes, self.smoothing if self.training else 0.0)
        same = torch.arange(len(fast), device=fast.device)
        unchanged = MixResult(x, plain, 1.0, same, None, y, y, _mix_over_time(plain, same, torch.ones(1, fast.shape[2])) if self.frame_labels else None)
        if not self.training:
            return unchanged
        if len(fast) < 2 and not self.single_clip:
            if not self.allow_single:
                raise ValueError("mixing needs at least two clips (allow_single=True passes one unchanged)")
            warnings.warn("a batch of one clip is not mixed", stacklevel=2)
            return unchanged
        if self.prob < 1 and _uniform(generator) >= self.prob:
            return unchanged
        perm = self._pair(len(fast), generator).to(fast.device)
        apply, lam, boxes, frames = self._draw(fast.shape, perm, generator)
        mixed = apply(fast, 1)
        target = mix_labels(y, perm, lam, self.num_classes, self.smoothing)
        frame_target = _mix_over_time(plain, perm, frames) if self.frame_labels else None
        return MixResult(mixed if slow is None else (apply(slow, stride), mixed), target, lam, perm, boxes, y, y[perm.to(y.device)], frame_target)

    def _pair(self, count: int, generator: torch.Generator | None) -> Tensor:
        return torch.arange(count - 1, -1, -1) if self.pairing == "flip" else torch.randperm(count, generator=generator)

    @staticmethod
    def _stride(slow: Tensor | None, fast: Tensor) -> int:
        if slow is None:
            return 1
        _check_clip(slow)
        if len(slow) != len(fast) or slow.shape[3:] != fast.shape[3:] or fast.shape[2] % slow.shape[2]:
            raise ValueError(f"slow {tuple(slow.shape)} and fast {tuple(fast.shape)} must agree in B, H, W, and the fast frames be a multiple of the slow")
        return fast.shape[2] // slow.shape[2]

    def _draw(self, shape: torch.Size, perm: Tensor, generator: torch.Generator | None) -> tuple[Callable, Any, Any, Tensor]:
        raise AssertionError("each augmentation draws in its own way")


def _slower(boxes: Box | Tensor, stride: int) -> Box | Tensor:
    """The box on a pathway that sees every stride-th frame: frames ceil(t1 / stride)..ceil(t2 / stride)."""
    if isinstance(boxes, Tensor):
        return torch.cat([-(-boxes[:, :2] // stride), boxes[:, 2:]], 1)
    return (-(-boxes[0] // stride), -(-boxes[1] // stride), *boxes[2:])


class VideoMix(_Mix):
    """The paper's augmentation. One box per batch, or per clip with `per_sample`."""

    def __init__(self, variant: str = "S", alpha: float = 1.0, prob: float = 1.0, per_sample: bool = False, pairing: str = "perm",
                 num_classes: int | None = None, smoothing: float = 0.0, rounding: str = "cutmix", placement: str = "center",
                 frame_labels: bool = False, allow_single: bool = False, inplace: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, frame_labels, allow_single, per_sample)
        sample_cuboid((8, 8, 8), 0.5, variant, rounding, placement, center=(4, 4, 4))      # checks the options
        self.variant, self.rounding, self.placement, self.inplace = variant, rounding, placement, inplace

    def _boxes(self, shape: torch.Size, generator: torch.Generator | None) -> Box | Tensor:
        draw = lambda: sample_cuboid(shape[2:], _beta(self.alpha, generator), self.variant, self.rounding, self.placement, generator=generator)   # noqa: E731
        return torch.tensor([draw() for _ in range(shape[0])]) if self.per_sample else draw()

    def _draw(self, shape, perm, generator):
        boxes = self._boxes(shape, generator)
        apply = lambda clip, stride: apply_cuboid(clip, _slower(boxes, stride), perm, self.inplace)      # noqa: E731
        return apply, cuboid_lambda(boxes, shape[2:]), boxes, _frame_lambdas(boxes, shape[2:])


class VideoMixup(_Mix):
    """Mixup of whole clips."""

    def __init__(self, alpha: float = 1.0, prob: float = 1.0, per_sample: bool = False, pairing: str = "perm",
                 num_classes: int | None = None, smoothing: float = 0.0, allow_single: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, False, allow_single, per_sample)

    def _draw(self, shape, perm, generator):
        lam = torch.tensor([_beta(self.alpha, generator) for _ in range(shape[0])], dtype=torch.float64) if self.per_sample else _beta(self.alpha, generator)
        return lambda clip, stride: mixup_clips(clip, perm, lam), lam, None, torch.ones(1)


class FadeMixup(_Mix):
    """Mixup whose weight rises or falls linearly over the frames; the label has the mean weight."""

    def __init__(self, alpha: float = 1.0, prob: float = 1.0, pairing: str = "perm", num_classes: int | None = None,
                 smoothing: float = 0.0, frame_labels: bool = False, allow_single: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, frame_labels, allow_single)

    def _draw(self, shape, perm, generator):
        lam = _beta(self.alpha, generator)
        adj = min(lam, 1 - lam) * _uniform(generator) * (1 if _uniform(generator) < 0.5 else -1)
        weights = _fade(lam, adj, shape[2])

        def apply(clip: Tensor, stride: int) -> Tensor:
            _check_clip(clip, floating=True)
            return _blend_frames(clip, perm, weights[::stride])
        return apply, lam, None, weights.unsqueeze(0)


class CutMixup(_Mix):
    """A box of one clip in the blend of both, or the blend alone, each half of the time."""

    def __init__(self, variant: str = "S", alpha: float = 1.0, prob: float = 1.0, pairing: str = "perm", num_classes: int | None = None,
                 smoothing: float = 0.0, rounding: str = "cutmix", allow_single: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, False, allow_single)
        sample_cuboid((8, 8, 8), 0.5, variant, rounding, center=(4, 4, 4))
        self.variant, self.rounding = variant, rounding

    def _draw(self, shape, perm, generator):
        box = sample_cuboid(shape[2:], _beta(self.alpha, generator), self.variant, self.rounding, generator=generator)
        lamt, u = _beta(2.0, generator), _uniform(generator)
        outside = cuboid_lambda(box, shape[2:])
        lam = lamt if u >= 0.5 else lamt * outside + (0 if lamt >= 0.5 else 1 - outside)
        apply = lambda clip, stride: cut_mixup_clips(clip, _slower(box, stride), perm, lamt, u)[0]      # noqa: E731
        return apply, lam, box if u < 0.5 else None, torch.ones(1)


class FrameCutMix(_Mix):
    """CutMix with a new place in every frame: the ablation of the consistency in time."""

    def __init__(self, alpha: float = 1.0, prob: float = 1.0, pairing: str = "perm", num_classes: int | None = None,
                 smoothing: float = 0.0, rounding: str = "cutmix", allow_single: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, False, allow_single)
        _one_of("rounding", rounding, ("cutmix", "exact"))
        self.rounding = rounding

    def _draw(self, shape, perm, generator):
        lam0, frames = _beta(self.alpha, generator), shape[2]
        boxes = torch.tensor([(t, t + 1, *sample_cuboid((1, *shape[3:]), lam0, "S", self.rounding, generator=generator)[2:]) for t in range(frames)])
        pasted = (boxes[:, 1::2] - boxes[:, ::2]).prod(1).sum().item()

        def apply(clip: Tensor, stride: int) -> Tensor:
            out = clip.clone()
            for t, (_, _, h1, h2, w1, w2) in enumerate(boxes[::stride].tolist()):
                out[:, :, t, h1:h2, w1:w2] = clip[:, :, t, h1:h2, w1:w2][perm]
            return out
        return apply, 1 - pasted / math.prod(shape[2:]), boxes, torch.ones(1)


class VideoCutout(_Mix):
    """A cuboid set to `fill`; labels stay."""

    single_clip = True

    def __init__(self, variant: str = "S", alpha: float = 1.0, prob: float = 1.0, per_sample: bool = False, num_classes: int | None = None,
                 smoothing: float = 0.0, rounding: str = "cutmix", fill: float = 0.0):
        super().__init__(alpha, prob, "perm", num_classes, smoothing, per_sample=per_sample)
        sample_cuboid((8, 8, 8), 0.5, variant, rounding, center=(4, 4, 4))
        self.variant, self.rounding, self.placement, self.fill = variant, rounding, "center", fill

    def _pair(self, count, generator):
        return torch.arange(count)

    def _draw(self, shape, perm, generator):
        boxes = VideoMix._boxes(self, shape, generator)

        def apply(clip: Tensor, stride: int) -> Tensor:
            out, rows = clip.clone(), _check_boxes(_slower(boxes, stride), clip)
            for b, box in enumerate(rows):
                out[(b if self.per_sample else slice(None), slice(None), *_slices(box))] = self.fill
            return out
        return apply, 1.0, boxes, torch.ones(1)


class RandomMix(nn.Module):
    """One of the augmentations per call, with probabilities `probs` (uniform if None)."""

    def __init__(self, mixes: Sequence[nn.Module], probs: Sequence[float] | None = None):
        super().__init__()
        if not len(mixes):
            raise ValueError("mixes must not be empty")
        probs = [1.0] * len(mixes) if probs is None else list(probs)
        if len(probs) != len(mixes) or min(probs) < 0 or not sum(probs) > 0:
            raise ValueError(f"probs must be {len(mixes)} non-negative numbers with a positive sum, not {probs}")
        self.mixes, self.probs = nn.ModuleList(mixes), torch.tensor(probs, dtype=torch.float64)

    def forward(self, x: Any, y: Tensor, generator: torch.Generator | None = None) -> MixResult:
        return self.mixes[int(torch.multinomial(self.probs, 1, generator=generator))](x, y, generator)


# ---------------------------------------------------------------- RandAugment on clips

def _affine(image: Image.Image, matrix: tuple) -> Image.Image:
    return image.transform(image.size, Image.AFFINE, matrix, resample=Image.BILINEAR, fillcolor=(124, 116, 104))


# name: op(image, level in [0, 1], sign)
_OPS: dict[str, Callable] = {
    "Identity": lambda im, v, s: im, "AutoContrast": lambda im, v, s: ImageOps.autocontrast(im), "Equalize": lambda im, v, s: ImageOps.equalize(im),
    "Rotate": lambda im, v, s: im.rotate(30 * v * s, resample=Image.BILINEAR, fillcolor=(124, 116, 104)),
    "Posterize": lambda im, v, s: ImageOps.posterize(im, max(1, 8 - int(4 * v))), "Solarize": lambda im, v, s: ImageOps.solarize(im, 256 - int(256 * v)),
    "Color": lambda im, v, s: ImageEnhance.Color(im).enhance(1 + 0.9 * v * s), "Contrast": lambda im, v, s: ImageEnhance.Contrast(im).enhance(1 + 0.9 * v * s),
    "Brightness": lambda im, v, s: ImageEnhance.Brightness(im).enhance(1 + 0.9 * v * s), "Sharpness": lambda im, v, s: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * v * s),
    "ShearX": lambda im, v, s: _affine(im, (1, 0.3 * v * s, 0, 0, 1, 0)), "ShearY": lambda im, v, s: _affine(im, (1, 0, 0, 0.3 * v * s, 1, 0)),
    "TranslateX": lambda im, v, s: _affine(im, (1, 0, 0.45 * v * s * im.width, 0, 1, 0)),
    "TranslateY": lambda im, v, s: _affine(im, (1, 0, 0, 0, 1, 0.45 * v * s * im.height)),
}


class RandAugment:
    """RandAugment on a clip, numpy uint8 (T, H, W, 3). consistent: one draw of operations, levels and signs for all frames
    (frame-wise draws destroy the motion)."""

    def __init__(self, num_ops: int = 2, magnitude: float = 9, consistent: bool = True):
        if num_ops < 0 or not 0 <= magnitude <= 10:
            raise ValueError(f"num_ops must be >= 0 and magnitude in [0, 10], not {num_ops} and {magnitude}")
        self.num_ops, self.magnitude, self.consistent = num_ops, magnitude, consistent

    def __call__(self, clip: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        if clip.ndim != 4 or clip.shape[3] != 3 or clip.dtype != np.uint8:
            raise ValueError(f"clip must be uint8 (T, H, W, 3), not {clip.dtype} {clip.shape}")
        names = list(_OPS)

        def draw() -> list[tuple[str, int]]:
            picks = torch.randint(len(names), (self.num_ops,), generator=generator).tolist()
            signs = torch.randint(2, (self.num_ops,), generator=generator).tolist()
            return [(names[p], 2 * s - 1) for p, s in zip(picks, signs)]
        plan, out = draw(), np.empty_like(clip)
        for t, frame in enumerate(clip):
            image = Image.fromarray(np.ascontiguousarray(frame))
            for name, sign in plan if self.consistent or t == 0 else draw():
                image = _OPS[name](image, self.magnitude / 10, sign)
            out[t] = np.asarray(image)
        return out


# ---------------------------------------------------------------- training and evaluation

def train(model: nn.Module, loader: Iterable, mix: nn.Module | None = None, epochs: int = 1, lr: float = 0.1, momentum: float = 0.9,
          weight_decay: float = 1e-4, warmup_epochs: float = 0.0, generator: torch.Generator | None = None,
          amp_dtype: torch.dtype | None = None, resume: dict | None = None) -> Iterator[dict]:
    """SGD with Nesterov momentum, linear warm-up, then a cosine to 0 per step; yields {"step", "epoch", "loss", "lr", "acc", "lam"}.

    loader: sized, of (clips (B, C, T, H, W), labels (B,)). `steps.send("state")` returns a snapshot; `resume=snapshot`
    goes on from it (also with the same generator state).
    """
    device, per_epoch = next(model.parameters()).device, len(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    first, skip, total, warm = 0, 0, epochs * per_epoch, warmup_epochs * per_epoch
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        generator.set_state(resume["generator"])
        first, skip = resume["epoch"], resume["batch"]
    for epoch in range(first, epochs):
        seekable = hasattr(loader, "set_epoch")
        if seekable:
            loader.set_epoch(epoch, skip)
        model.train()
        if mix is not None:
            mix.train()
        for batch, (x, y, *_) in enumerate(loader, skip if seekable else 0):
            if batch < skip:
                continue
            step = epoch * per_epoch + batch
            rate = lr * (step + 1) / warm if step < warm else lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            x = tuple(part.to(device) for part in x) if isinstance(x, (tuple, list)) else x.to(device)
            y = y.to(device)
            mixed = mix(x, y, generator) if mix is not None else None
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(mixed.x if mixed else x)
            loss = soft_cross_entropy(logits.float(), mixed.target.to(logits.device)) if mixed else F.cross_entropy(logits.float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            lam = mixed.lam if mixed else 1.0
            acc = mixed_accuracy(logits.detach(), y, mixed.target_b if mixed else y, lam)
            row = {"step": step, "epoch": epoch, "loss": loss.item(), "lr": rate, "acc": acc, "lam": float(torch.as_tensor(lam).mean())}
            if (yield row) == "state":
                yield {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
                       "epoch": epoch, "batch": batch + 1}
        skip = 0


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, num_clips: int = 1, num_crops: int = 1) -> dict:
    """{"top1", "top5"} in [0, 1]: softmax averaged over the num_clips * num_crops views of (B, views, C, T, H, W)."""
    device, views = next(model.parameters()).device, num_clips * num_crops
    was_training, top1, top5, count = model.training, 0, 0, 0
    model.eval()
    for x, y, *_ in loader:
        x, y = x.to(device), y.to(device)
        if views > 1:
            if x.ndim != 6 or x.shape[1] != views:
                raise ValueError(f"x must be (B, {views}, C, T, H, W), not {tuple(x.shape)}")
            probs = model(x.flatten(0, 1)).float().softmax(1).unflatten(0, (-1, views)).mean(1)
        else:
            probs = model(x.flatten(0, 1) if x.ndim == 6 else x).float().softmax(1)
        best = probs.topk(min(5, probs.shape[1]), dim=1).indices == y.unsqueeze(1)
        top1, top5, count = top1 + int(best[:, 0].sum()), top5 + int(best.any(1).sum()), count + len(y)
    model.train(was_training)
    return {"top1": top1 / max(count, 1), "top5": top5 / max(count, 1)}


def _demonstrate() -> None:
    """How much of a clip is pasted on average, against the closed forms; and that a pathway of every 4th frame agrees."""
    generator = torch.Generator().manual_seed(0)
    print("expected pasted volume for alpha = 1 (closed form), mean of 20,000 boxes in a 64 x 256 x 256 clip:")
    for variant, expected in (("S", 0.3208), ("T", 0.4167), ("ST", 0.2437)):
        boxes = torch.tensor([sample_cuboid((64, 256, 256), _uniform(generator), variant, generator=generator) for _ in range(20_000)])
        print(f"  {variant:3s} {expected:.4f}   {1 - cuboid_lambda(boxes, (64, 256, 256)).mean():.4f}")
    fast = torch.rand(4, 3, 32, 16, 16, generator=generator)
    result = VideoMix("ST", num_classes=4)((fast[:, :, ::4].clone(), fast), torch.arange(4), generator)
    print("slow pathway equals every 4th frame of the mixed fast one:", torch.equal(result.x[0], result.x[1][:, :, ::4]))


if __name__ == "__main__":
    _demonstrate()
