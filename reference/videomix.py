"""VideoMix: cut-and-paste augmentation of videos.

Paper: "VideoMix: Rethinking Data Augmentation for Video Classification", S. Yun, S. J. Oh,
B. Heo, D. Han, J. Kim, 2020, arXiv:2012.03457. No official code exists.

Two clips A and B with labels y_A and y_B; a cuboid of B replaces the same cuboid of A, and the
labels are mixed by volume:

    x' = M * x_A + (1 - M) * x_B        M = 0 in [t1, t2) x [h1, h2) x [w1, w2), else 1
    y' = lam y_A + (1 - lam) y_B        lam = 1 - (t2 - t1)(h2 - h1)(w2 - w1) / (T H W)

    S   spatial          all frames of a box: sides sqrt(r) of the image      the paper's choice
    T   temporal         all pixels of r T consecutive frames
    ST  spatio-temporal  r^(1/3) of every axis

with r = 1 - lam0, lam0 ~ Beta(alpha, alpha) (in use: alpha from 0.2 to 8), and a uniform centre.
The box is the same in all frames of a clip: motion stays intact, unlike with a CutMix per frame.
Boxes are cut off at the border, then counted, so A keeps more than half on average (expected
pasted volume for alpha = 1: S 0.32, T 0.42, ST 0.24). With the same call: Mixup, FadeMixup
(weights linear in time), CutMixup, frame-wise CutMix, Cutout; besides, RandAugment with one draw
for all frames. A tuple (slow, fast) of SlowFast's pathways is cut at the same place and time.

A box is `(t1, t2, h1, h2, w1, w2)`, half open; `lam` is the weight of A, the own sample. Mix
sampled clips after normalisation, and re-estimate batch-norm statistics on clean clips before a
test (`torch.optim.swa_utils.update_bn`). To copy: `sample_cuboid`, `apply_cuboid`, `mix_labels`,
or all of it; `videomix_localization.py` finds actions in time.

>>> mix = VideoMix("S", num_classes=3)
>>> clips, labels = torch.rand(4, 3, 8, 32, 32), torch.tensor([0, 1, 2, 0])
>>> result = mix(clips, labels, generator=torch.Generator().manual_seed(0))
>>> result.x.shape, result.target.shape, result.boxes[:2], bool(0 <= result.lam <= 1)
(torch.Size([4, 3, 8, 32, 32]), torch.Size([4, 3]), (0, 8), True)
"""

from __future__ import annotations

import copy
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
VARIANTS = {"S": (1, 2), "T": (0,), "ST": (0, 1, 2)}      # the axes that are cut


def _one_of(name: str, value: Any, accepted: Iterable[str]) -> None:
    if value not in tuple(accepted):
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, not {value!r}")


def _in_unit(name: str, value: float, one: bool = True) -> None:
    if getattr(value, "ndim", 0) or not (0 <= value < 1 or one and value == 1):
        raise ValueError(f"{name} must be in [0, 1{']' if one else ')'}, not {value}")


def _source(generator: torch.Generator | None) -> dict:
    """No argument generator=None: compiled, it would allow one batch size only."""
    return {} if generator is None else {"generator": generator}


def _uniform(generator: torch.Generator | None) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def _betas(alpha: float, count: int, generator: torch.Generator | None) -> list[float]:
    """`count` draws of Beta(alpha, alpha), a ratio of gammas: torch's Beta takes no generator."""
    shape = torch.full((2, count), float(alpha), dtype=torch.float64)
    a, b = torch._standard_gamma(shape, **_source(generator))
    coin = torch.rand(count, dtype=torch.float64, **_source(generator)).round()
    tiny = torch.finfo(torch.float64).tiny                # what torch returns for an underflow
    return torch.where(torch.maximum(a, b) > tiny, a / (a + b), coin).tolist()


# ---------------------------------------------------------------- cuboids

def _check_options(variant: str, rounding: str, placement: str) -> None:
    _one_of("variant", variant, VARIANTS)
    _one_of("rounding", rounding, ("cutmix", "exact"))
    _one_of("placement", placement, ("center", "suffix"))
    if placement == "suffix" and variant != "T":
        raise ValueError(f"placement 'suffix' goes with variant 'T', not {variant!r}")


def sample_cuboid(size_thw: Sequence[int], lam: float, variant: str = "S", rounding: str = "cutmix",
                  placement: str = "center", center: Sequence[float] | None = None,
                  generator: torch.Generator | None = None) -> Box:
    """A box that leaves about the fraction `lam` of a clip, before it is clipped at the borders.

    rounding "cutmix": lengths int(n f), edges c -+ length // 2 around an integer centre (as all
    public code does: even lengths, empty below 2); "exact": real-valued centre and edges, rounded
    last. placement "suffix" (variant T only): frames int(lam T)..T. `center` (ct, ch, cw): drawn
    if None; entries of uncut axes are ignored. Axes of length 1 are never cut: the root counts the
    others, so a single frame is cut like an image. ValueError if no axis is left.
    """
    _check_options(variant, rounding, placement)
    size = [int(n) for n in size_thw]
    if len(size) != 3 or min(size) < 1 or size != [*size_thw]:
        raise ValueError(f"size_thw must be three positive integers, not {tuple(size_thw)}")
    if center is not None and len(center) != 3:
        raise ValueError(f"center must be (ct, ch, cw), not {center}")
    _in_unit("lam", lam)
    if placement == "suffix":
        return (int(lam * size[0]), size[0], 0, size[1], 0, size[2])
    cut = VARIANTS["S" if variant == "T" and size[0] == 1 else variant]
    axes = [axis for axis in cut if size[axis] > 1]
    if not axes:
        raise ValueError(f"variant {variant!r} has no axis to cut in a clip of {tuple(size)}")
    share = math.sqrt(1 - lam) if len(axes) == 2 else (1 - lam) ** (1 / len(axes))
    edges = [(0, n) for n in size]
    for axis in axes:
        n, half = size[axis], size[axis] * share / 2
        middle = n * _uniform(generator) if center is None else center[axis]
        if rounding == "cutmix":
            middle, half = math.floor(middle), int(n * share) // 2
        if not 0 <= middle <= n - (rounding == "cutmix"):
            raise ValueError(f"center must lie in the clip {tuple(size)}, not at {tuple(center)}")
        low, high = max(middle - half, 0), min(middle + half, n)
        edges[axis] = (math.floor(low + 0.5), math.floor(high + 0.5))
    return (*edges[0], *edges[1], *edges[2])


def _check_boxes(boxes: Any, size_thw: Sequence[int], count: int | None = None) -> Tensor:
    """(N, 6) int64 on the CPU: one box, or (count, 6) of them, each inside the clip."""
    rows = torch.as_tensor(() if boxes is None else boxes).cpu()
    batch = rows.shape[0] if count is None and rows.ndim == 2 else count
    if rows.dtype.is_floating_point or rows.shape not in ((6,), (batch, 6)):
        raise ValueError(f"boxes must be 6 integers, or ({batch or 'B'}, 6), not {[*rows.shape]}")
    rows = rows.reshape(-1, 6).long()
    low, high = rows[:, ::2], rows[:, 1::2]
    wrong = ((low < 0) | (low > high) | (high > torch.tensor(list(size_thw)))).any(1)
    if wrong.any():
        raise ValueError(f"box {rows[wrong][0].tolist()} is inverted or outside {tuple(size_thw)}")
    return rows


def cuboid_lambda(boxes: Box | Tensor, size_thw: Sequence[int]) -> float | Tensor:
    """1 - volume fraction: a float for one box, (B,) float64 for (B, 6)."""
    rows = _check_boxes(boxes, size_thw)
    lam = 1 - (rows[:, 1::2] - rows[:, ::2]).prod(1).double() / math.prod(size_thw)
    return lam if torch.as_tensor(boxes).ndim == 2 else lam.item()


def _frame_lambdas(boxes: Box | Tensor, size_thw: Sequence[int]) -> Tensor:
    """(B or 1, T) float64: share of own pixels in each frame."""
    rows = _check_boxes(boxes, size_thw)
    frames, area = torch.arange(size_thw[0]), (rows[:, 3::2] - rows[:, 2::2]).prod(1, keepdim=True)
    inside = (frames >= rows[:, :1]) & (frames < rows[:, 1:2])
    return 1 - inside * area.double() / (size_thw[1] * size_thw[2])


def _check_clips(x: Tensor, floating: bool = False) -> None:
    if not isinstance(x, Tensor) or x.ndim != 5 or 0 in x.shape[2:]:
        raise ValueError("clips must be a (B, C, T, H, W) tensor with pixels, not "
                         f"{type(x).__name__} {tuple(getattr(x, 'shape', ()))}")
    if floating and not x.is_floating_point():
        raise ValueError(f"blending needs floating-point clips, not {x.dtype}")


def _order(perm: Tensor, like: Tensor) -> Tensor:
    """`perm` (B,) on the device of `like` (B, ...)."""
    perm, count = torch.as_tensor(perm), len(like)
    fits = perm.shape == (count,) and perm.dtype in (torch.int64, torch.int32)
    if not fits or count and not 0 <= min(order := perm.tolist()) <= max(order) < count:
        raise ValueError(f"perm must be ({count},) integers below {count}, not {perm}")
    return perm.to(like.device)


def _slices(box: Sequence[int]) -> tuple[slice, slice, slice]:
    return tuple(slice(low, high) for low, high in zip(box[::2], box[1::2]))


def _cycles(order: list[int]) -> Iterator[list[int]]:
    """The chains b, order[b], order[order[b]], ... of a permutation."""
    left = set(range(len(order)))
    while left:
        chain = [left.pop()]
        while order[chain[-1]] in left:
            chain.append(order[chain[-1]])
            left.discard(chain[-1])
        yield chain


def apply_cuboid(x: Tensor, boxes: Box | Tensor, perm: Tensor, inplace: bool = False) -> Tensor:
    """Paste the cuboid(s) of x[perm] into x `(B, C, T, H, W)`; boxes: one, or (B, 6) int64.

    With `inplace` only cuboids move, straight to their place along the cycles of the permutation;
    one clip's cuboid per cycle is kept aside (on a GPU, one box for all: the cuboids of all, in two
    launches). A mask, or a permuted batch, would read and write all of the clips.
    """
    _check_clips(x)
    perm, rows = _order(perm, x), _check_boxes(boxes, x.shape[2:], len(x)).tolist()
    order = perm.tolist()
    if inplace and sorted(order) != list(range(len(x))):
        raise ValueError(f"perm must be a permutation to mix in place, not {order}")
    if x.device.type != "cpu" and torch.as_tensor(boxes).ndim == 1:
        out, place = x if inplace else x.clone(), (slice(None), slice(None), *_slices(rows[0]))
        out[place] = x[place][perm]
        return out
    places = [(slice(None), *_slices(row)) for row in rows] * (len(x) if len(rows) == 1 else 1)
    if not inplace:
        out = x.clone()
        for b, partner in enumerate(order):
            out[b][places[b]] = x[partner][places[b]]
        return out
    for chain in _cycles(order):
        kept = x[chain[0]][places[chain[-1]]].clone()
        for b in chain[:-1]:
            x[b][places[b]] = x[order[b]][places[b]]
        x[chain[-1]][places[chain[-1]]] = kept
    return x


# ---------------------------------------------------------------- blends

def _weights(lam: float | Tensor, like: Tensor) -> float | Tensor:
    """`lam` as a number, or (B,) as (B, 1, ...) in the dtype of `like` (B, ...)."""
    if not getattr(lam, "ndim", 0):
        _in_unit("lam", float(lam))
        return float(lam)
    lam = torch.as_tensor(lam)
    if lam.shape != (len(like),) or not ((lam >= 0) & (lam <= 1)).all():
        raise ValueError(f"lam must be a number, or ({len(like)},), in [0, 1], not {lam.tolist()}")
    return lam.to(like).view(-1, *[1] * (like.ndim - 1))


def _blend(x: Tensor, perm: Tensor, weight: float | Tensor) -> Tensor:
    _check_clips(x, floating=True)
    return weight * x + (1 - weight) * x[_order(perm, x)]


def mixup_clips(x: Tensor, perm: Tensor, lam: float | Tensor) -> Tensor:
    """lam x + (1 - lam) x[perm] for clips (B, C, T, H, W); lam a number or (B,)."""
    return _blend(x, perm, _weights(lam, x))


def fade_mixup_clips(x: Tensor, perm: Tensor, lam: float, adj: float) -> Tensor:
    """Mixup whose weight of x at frame t is linspace(lam - adj, lam + adj, T)[t]."""
    _check_clips(x, floating=True)
    _in_unit("lam", lam)
    if not abs(adj) <= min(lam, 1 - lam) + 1e-6:
        raise ValueError(f"adj must keep lam +- adj in [0, 1], not {adj} for lam = {lam}")
    weights = torch.linspace(lam - adj, lam + adj, x.shape[2], dtype=torch.float64)
    return _blend(x, perm, weights.view(-1, 1, 1).to(x))


def _cut_mixup_weight(box: Box, size_thw: Sequence[int], lamt: float, u: float) -> float:
    outside = cuboid_lambda(box, size_thw)
    if u >= 0.5:
        return lamt
    return lamt * outside if lamt >= 0.5 else lamt * outside + (1 - outside)


def cut_mixup_clips(x: Tensor, box: Box, perm: Tensor, lamt: float,
                    u: float) -> tuple[Tensor, float]:
    """CutMixup: mixup with weight `lamt`, and if u < 0.5 one of the two clips pure inside the box
    (the partner for lamt >= 0.5, else the own). Returns clips and the label weight of the own."""
    _in_unit("u", u)
    mixed, weight = mixup_clips(x, perm, lamt), _cut_mixup_weight(box, x.shape[2:], lamt, u)
    if u < 0.5:
        place = (slice(None), slice(None), *_slices(box))
        mixed[place] = x[place][_order(perm, x)] if lamt >= 0.5 else x[place]
    return mixed, weight


# ---------------------------------------------------------------- labels and losses

def _check_labels(y: Tensor, num_classes: int) -> None:
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}, not {y.tolist()}")


def _soft_labels(y: Tensor, num_classes: int | None, smoothing: float) -> Tensor:
    """(B, K): integer labels one-hot in float32, soft ones as they are; then (1 - e) y + e / K."""
    _in_unit("smoothing", smoothing, one=False)
    kind = (y.ndim, y.is_floating_point()) if isinstance(y, Tensor) else type(y).__name__
    if kind == (1, False):
        if num_classes is None:
            raise ValueError("num_classes is needed with integer labels")
        _check_labels(y, num_classes)
        y = F.one_hot(y.long(), num_classes).float()
    elif kind != (2, True) or num_classes not in (None, y.shape[1]):
        raise ValueError(f"y must be a tensor, (B,) integers or (B, {num_classes or 'K'}) floats,"
                         f" not {getattr(y, 'dtype', kind)} {[*getattr(y, 'shape', ())]}")
    return (1 - smoothing) * y + smoothing / y.shape[1]


def mix_labels(y: Tensor, perm: Tensor, lam: float | Tensor, num_classes: int | None = None,
               smoothing: float = 0.0) -> Tensor:
    """(B, K): smoothed labels, then lam y + (1 - lam) y[perm]. y: (B,) integers with num_classes,
    or (B, K) soft; lam: a number or (B,)."""
    target = _soft_labels(y, num_classes, smoothing)
    lam = _weights(lam, target)
    return lam * target + (1 - lam) * target[_order(perm, target)]


def _mix_over_time(target: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    """(B, K, T) from targets (B, K) and own weights (B or 1, T)."""
    weights, partner = weights.to(target.device, target.dtype), target[_order(perm, target)]
    return torch.lerp(partner.unsqueeze(2), target.unsqueeze(2), weights.unsqueeze(1))


def mix_frame_labels(y: Tensor, perm: Tensor, boxes: Box | Tensor, size_thw: Sequence[int],
                     num_classes: int | None = None, smoothing: float = 0.0) -> Tensor:
    """(B, K, T): the label of every frame, mixed by its own area; the mean over T is the label."""
    weights = _frame_lambdas(_check_boxes(boxes, size_thw, len(y)), size_thw)
    return _mix_over_time(_soft_labels(y, num_classes, smoothing), perm, weights)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """mean_b(-sum_k target log softmax(logits)); logits and target (B, K)."""
    if logits.shape != target.shape or logits.ndim != 2:
        raise ValueError(f"logits {[*logits.shape]} and target {[*target.shape]} must be (B, K)")
    return -(target * logits.log_softmax(1)).sum(1).mean()


def mixed_accuracy(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: float | Tensor) -> float:
    """Mean of lam [prediction = y_a] + (1 - lam) [prediction = y_b], in [0, 1]: logits (B, K),
    y_a and y_b (B,) integers, lam a number or (B,)."""
    if any(y.shape != logits.shape[:-1] or y.is_floating_point() for y in (y_a, y_b)):
        raise ValueError(f"logits {[*logits.shape]} must be (B, K), y_a and y_b (B,) integers")
    for y in (y_a, y_b):
        _check_labels(y, logits.shape[1])
    hits = [(logits.argmax(1) == y.to(logits.device)).double() for y in (y_a, y_b)]
    lam = _weights(lam, hits[0])
    return (lam * hits[0] + (1 - lam) * hits[1]).mean().item()


# ---------------------------------------------------------------- the augmentations as modules

class MixResult(NamedTuple):
    """What an augmentation returns."""

    x: Any                                # mixed clip, or (slow, fast)
    target: Tensor                        # (B, K)
    lam: float | Tensor                   # label weight of the own sample; (B,) float64 per sample
    perm: Tensor                          # (B,) int64
    boxes: Any                            # 6 integers; (B, 6) per sample; (T, 6) frame-wise; None
    target_a: Tensor                      # the labels that came in
    target_b: Tensor                      # those of the partners
    frame_target: Tensor | None = None    # (B, K, T)


class _Mix(nn.Module):
    """What the augmentations share: checks, the probability, pairing, two pathways, labels.

    `_draw(count, size, perm, generator)` of a subclass draws once per call for `count` clips of
    `size` (T, H, W) and returns (apply, lam, boxes, frame weights or None): apply(clip, stride)
    changes a clip whose frame j stands for frame j * stride of the fast one.
    """

    single_clip = inplace = False         # whether one clip can be augmented; the input overwritten

    def __init__(self, alpha: float, prob: float, pairing: str, num_classes: int | None,
                 smoothing: float, allow_single: bool = False, per_sample: bool = False,
                 frame_labels: bool = False, variant: str = "S", rounding: str = "cutmix",
                 placement: str = "center"):
        super().__init__()
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be positive, not {alpha}")
        if num_classes is not None and (num_classes != int(num_classes) or num_classes < 1):
            raise ValueError(f"num_classes must be a positive integer, not {num_classes!r}")
        _in_unit("prob", prob)
        _in_unit("smoothing", smoothing, one=False)
        _one_of("pairing", pairing, ("perm", "flip"))
        _check_options(variant, rounding, placement)
        self.alpha, self.prob, self.pairing, self.per_sample = alpha, prob, pairing, per_sample
        self.num_classes, self.smoothing, self.allow_single = num_classes, smoothing, allow_single
        self.variant, self.rounding, self.placement = variant, rounding, placement
        self.frame_labels = frame_labels

    def forward(self, x: Tensor | tuple[Tensor, Tensor], y: Tensor,
                generator: torch.Generator | None = None) -> MixResult:
        """x: clips (B, C, T, H, W), or (slow, fast), on any device; y: (B,) integers or (B, K) soft
        labels; generator: on the CPU, where all is drawn (None: torch's default one)."""
        pathways = isinstance(x, (tuple, list))
        slow, fast = x if pathways else (x, x)
        _check_clips(slow), _check_clips(fast)
        count, _, *size = fast.shape
        stride = size[0] // slow.shape[2]
        if slow[:, :, :1].shape != fast[:, :, :1].shape or stride * slow.shape[2] != size[0]:
            raise ValueError(f"slow {[*slow.shape]} and fast {[*fast.shape]} must agree in B, C, H "
                             f"and W, and the fast frames be a multiple of the slow")
        plain = _soft_labels(y, self.num_classes, self.smoothing if self.training else 0.0)
        if len(y) != count:
            raise ValueError(f"y has {len(y)} labels for {count} clips")
        everywhere = plain.unsqueeze(2).repeat(1, 1, size[0]) if self.frame_labels else None
        unchanged = MixResult(x, plain, 1.0, torch.arange(count, device=fast.device), None, y, y,
                              everywhere)
        if not self.training:
            return unchanged
        if count < (1 if self.single_clip else 2):
            if not self.allow_single:
                raise ValueError("mixing needs two clips or more (allow_single=True lets one pass),"
                                 f" erasing needs one, not {count}")
            warnings.warn("a batch of one clip is not mixed", stacklevel=2)
            return unchanged
        if self.prob < 1 and _uniform(generator) >= self.prob:
            return unchanged
        perm = self._pair(count, generator)
        apply, lam, boxes, frames = self._draw(count, size, perm, generator)
        if pathways:                                  # first: it may be a view of the fast one
            shared = slow.untyped_storage().data_ptr() == fast.untyped_storage().data_ptr()
            slow = apply(slow.clone() if self.inplace and shared else slow, stride)
        mixed = apply(fast, 1)
        return MixResult((slow, mixed) if pathways else mixed,
                         mix_labels(y, perm, lam, self.num_classes, self.smoothing), lam,
                         perm.to(fast.device), boxes, y, y[perm.to(y.device)],
                         _mix_over_time(plain, perm, frames) if self.frame_labels else None)

    def _pair(self, count: int, generator: torch.Generator | None) -> Tensor:
        order = torch.randperm(count, **_source(generator))
        return torch.arange(count).flip(0) if self.pairing == "flip" else order

    def _boxes(self, count: int, size: Sequence[int],
               generator: torch.Generator | None) -> Box | Tensor:
        """One box, or (count, 6) with `per_sample`; random numbers are drawn for all at once."""
        rows = count if self.per_sample else 1
        lams, centers = _betas(self.alpha, rows, generator), [None] * rows
        if self.placement == "center":
            uniform = torch.rand(rows, 3, dtype=torch.float64, **_source(generator))
            centers = (uniform * torch.tensor(size)).tolist()
        boxes = [sample_cuboid(size, lam, self.variant, self.rounding, self.placement, center)
                 for lam, center in zip(lams, centers)]
        return torch.tensor(boxes) if self.per_sample else boxes[0]


def _slower(boxes: Box | Tensor, stride: int) -> Box | Tensor:
    """The box on every stride-th frame: frames ceil(t1 / stride)..ceil(t2 / stride)."""
    if isinstance(boxes, Tensor):
        return torch.cat([-(-boxes[:, :2] // stride), boxes[:, 2:]], 1)
    return (-(-boxes[0] // stride), -(-boxes[1] // stride), *boxes[2:])


class VideoMix(_Mix):
    """The paper's augmentation. One box per batch, or per clip with `per_sample`."""

    def __init__(self, variant: str = "S", alpha: float = 1.0, prob: float = 1.0,
                 per_sample: bool = False, pairing: str = "perm", num_classes: int | None = None,
                 smoothing: float = 0.0, rounding: str = "cutmix", placement: str = "center",
                 frame_labels: bool = False, allow_single: bool = False, inplace: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, allow_single, per_sample,
                         frame_labels, variant, rounding, placement)
        self.inplace = inplace

    def _draw(self, count, size, perm, generator):
        boxes = self._boxes(count, size, generator)
        return (lambda clip, stride: apply_cuboid(clip, _slower(boxes, stride), perm, self.inplace),
                cuboid_lambda(boxes, size), boxes, _frame_lambdas(boxes, size))


class VideoMixup(_Mix):
    """Mixup of whole clips."""

    def __init__(self, alpha: float = 1.0, prob: float = 1.0, per_sample: bool = False,
                 pairing: str = "perm", num_classes: int | None = None, smoothing: float = 0.0,
                 allow_single: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, allow_single, per_sample)

    def _draw(self, count, size, perm, generator):
        lams = _betas(self.alpha, count if self.per_sample else 1, generator)
        lam = torch.tensor(lams, dtype=torch.float64) if self.per_sample else lams[0]
        return lambda clip, stride: mixup_clips(clip, perm, lam), lam, None, None


class FadeMixup(_Mix):
    """Mixup whose weight rises or falls linearly over the frames; the label has the mean weight."""

    def __init__(self, alpha: float = 1.0, prob: float = 1.0, pairing: str = "perm",
                 num_classes: int | None = None, smoothing: float = 0.0,
                 frame_labels: bool = False, allow_single: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, allow_single,
                         frame_labels=frame_labels)

    def _draw(self, count, size, perm, generator):
        (lam,) = _betas(self.alpha, 1, generator)
        adj = min(lam, 1 - lam) * (2 * _uniform(generator) - 1) * (size[0] > 1)    # one frame: lam
        weights = torch.linspace(lam - adj, lam + adj, size[0], dtype=torch.float64)
        return (lambda clip, stride: _blend(clip, perm, weights[::stride].view(-1, 1, 1).to(clip)),
                lam, None, weights.unsqueeze(0))


class CutMixup(_Mix):
    """A box of one clip in the blend of both, or the blend alone, each half of the time."""

    def __init__(self, variant: str = "S", alpha: float = 1.0, prob: float = 1.0,
                 pairing: str = "perm", num_classes: int | None = None, smoothing: float = 0.0,
                 rounding: str = "cutmix", allow_single: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, allow_single,
                         variant=variant, rounding=rounding)

    def _draw(self, count, size, perm, generator):
        box = self._boxes(count, size, generator)
        (lamt,), u = _betas(2.0, 1, generator), _uniform(generator)
        return (lambda clip, stride: cut_mixup_clips(clip, _slower(box, stride), perm, lamt, u)[0],
                _cut_mixup_weight(box, size, lamt, u), box if u < 0.5 else None, None)


class FrameCutMix(_Mix):
    """CutMix with a new place in every frame: the ablation of the consistency in time."""

    def __init__(self, alpha: float = 1.0, prob: float = 1.0, pairing: str = "perm",
                 num_classes: int | None = None, smoothing: float = 0.0, rounding: str = "cutmix",
                 allow_single: bool = False):
        super().__init__(alpha, prob, pairing, num_classes, smoothing, allow_single,
                         rounding=rounding)

    def _draw(self, count, size, perm, generator):
        (lam,) = _betas(self.alpha, 1, generator)
        places = [sample_cuboid((1, *size[1:]), lam, "S", self.rounding, generator=generator)
                  for _ in range(size[0])]
        boxes = torch.tensor([(t, t + 1, *place[2:]) for t, place in enumerate(places)])
        pasted = (boxes[:, 1::2] - boxes[:, ::2]).prod(1).sum().item()

        def apply(clip: Tensor, stride: int) -> Tensor:
            out, partners = clip.clone(), perm.to(clip.device)
            for t, (_, _, h1, h2, w1, w2) in enumerate(boxes[::stride].tolist()):
                out[:, :, t, h1:h2, w1:w2] = clip[:, :, t, h1:h2, w1:w2][partners]
            return out
        return apply, 1 - pasted / math.prod(size), boxes, None


class VideoCutout(_Mix):
    """A cuboid set to `fill`; labels stay."""

    single_clip = True

    def __init__(self, variant: str = "S", alpha: float = 1.0, prob: float = 1.0,
                 per_sample: bool = False, num_classes: int | None = None, smoothing: float = 0.0,
                 rounding: str = "cutmix", fill: float = 0.0):
        super().__init__(alpha, prob, "perm", num_classes, smoothing, per_sample=per_sample,
                         variant=variant, rounding=rounding)
        self.fill = fill

    def _pair(self, count, generator):
        return torch.arange(count)

    def _draw(self, count, size, perm, generator):
        boxes = self._boxes(count, size, generator)

        def apply(clip: Tensor, stride: int) -> Tensor:
            out = clip.clone()
            for b, row in enumerate(torch.as_tensor(_slower(boxes, stride)).view(-1, 6).tolist()):
                rows = b if self.per_sample else slice(None)
                out[(rows, slice(None), *_slices(row))] = self.fill
            return out
        return apply, 1.0, boxes, None


class RandomMix(nn.Module):
    """One of the augmentations per call, with probabilities `probs` (uniform if None)."""

    def __init__(self, mixes: Sequence[nn.Module], probs: Sequence[float] | None = None):
        super().__init__()
        if not len(mixes):
            raise ValueError("mixes must not be empty")
        probs = [1.0] * len(mixes) if probs is None else list(probs)
        if len(probs) != len(mixes) or min(probs) < 0 or not 0 < sum(probs) < math.inf:
            raise ValueError(f"probs must be {len(mixes)} numbers >= 0, not all 0, not {probs}")
        self.mixes, self.probs = nn.ModuleList(mixes), torch.tensor(probs, dtype=torch.float64)

    def forward(self, x: Any, y: Tensor, generator: torch.Generator | None = None) -> MixResult:
        chosen = int(torch.multinomial(self.probs, 1, generator=generator)) if self.training else 0
        return self.mixes[chosen](x, y, generator)


# ---------------------------------------------------------------- RandAugment on clips

GREY = (124, 116, 104)                                # fills what a geometric operation uncovers


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR, fillcolor=GREY)


_OPS: list[Callable] = [                  # (image, level in [-1, 1]) -> image
    lambda im, v: im,
    lambda im, v: ImageOps.autocontrast(im),
    lambda im, v: ImageOps.equalize(im),
    lambda im, v: im.rotate(30 * v, resample=Image.BILINEAR, fillcolor=GREY),
    lambda im, v: ImageOps.posterize(im, max(1, 8 - int(4 * abs(v)))),
    lambda im, v: ImageOps.solarize(im, 256 - int(256 * abs(v))),
    lambda im, v: ImageEnhance.Color(im).enhance(1 + 0.9 * v),
    lambda im, v: ImageEnhance.Contrast(im).enhance(1 + 0.9 * v),
    lambda im, v: ImageEnhance.Brightness(im).enhance(1 + 0.9 * v),
    lambda im, v: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * v),
    lambda im, v: _affine(im, 1, 0.3 * v, 0, 0, 1, 0),                    # shear along x
    lambda im, v: _affine(im, 1, 0, 0, 0.3 * v, 1, 0),
    lambda im, v: _affine(im, 1, 0, 0.45 * v * im.width, 0, 1, 0),        # shift along x
    lambda im, v: _affine(im, 1, 0, 0, 0, 1, 0.45 * v * im.height),
]


class RandAugment:
    """RandAugment on a clip, numpy uint8 (T, H, W, 3). consistent: one draw of operations and signs
    for all frames (frame-wise draws destroy the motion)."""

    def __init__(self, num_ops: int = 2, magnitude: float = 9, consistent: bool = True):
        if num_ops < 0 or num_ops != int(num_ops) or not 0 <= magnitude <= 10:
            raise ValueError(f"num_ops must be >= 0, magnitude 0..10, not {num_ops}, {magnitude}")
        self.num_ops, self.magnitude, self.consistent = num_ops, magnitude, consistent

    def __call__(self, clip: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        if not isinstance(clip, np.ndarray) or clip.dtype != np.uint8 or clip.shape[3:] != (3,):
            raise ValueError("clip must be a uint8 array (T, H, W, 3), not "
                             f"{getattr(clip, 'dtype', type(clip).__name__)} {np.shape(clip)}")
        shape = (1 if self.consistent else len(clip), self.num_ops)
        picks = torch.randint(len(_OPS), shape, generator=generator).expand(len(clip), -1).tolist()
        signs = torch.randint(2, shape, generator=generator).expand(len(clip), -1).tolist()
        out = np.empty_like(clip)
        for t, frame in enumerate(clip):
            image = Image.fromarray(np.ascontiguousarray(frame))
            for pick, sign in zip(picks[t], signs[t]):
                image = _OPS[pick](image, self.magnitude / 10 * (2 * sign - 1))
            out[t] = np.asarray(image)
        return out


# ---------------------------------------------------------------- training and evaluation

def _to(x: Any, device: torch.device) -> Any:
    return tuple(part.to(device) for part in x) if isinstance(x, (tuple, list)) else x.to(device)


def _epoch(loader: Iterable, epoch: int, skip: int, states: list[Tensor] | None) -> tuple:
    """The numbered batches of an epoch from `skip` on, what a DataLoader shuffles with, and its
    state as the epoch began; `states`, of a resumed epoch: that one and the one to go on with."""
    order = getattr(loader, "generator", None) or torch.default_generator
    if states:
        if epoch and getattr(loader, "persistent_workers", False):
            iter(loader)                                      # draws once, in the first epoch
        order.set_state(states[0])
    began = order.get_state()
    if seeks := hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch, skip)
    batches = enumerate(loader, skip if seeks else 0)
    if states:
        for _ in zip(range(0 if seeks else skip), batches):   # done before
            pass
        order.set_state(states[1])
    return batches, order, began


def train(model: nn.Module, loader: Iterable, mix: nn.Module | None = None, epochs: int = 1,
          lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-4,
          warmup_epochs: float = 0.0, generator: torch.Generator | None = None,
          amp_dtype: torch.dtype | None = None, resume: dict | None = None) -> Iterator[dict]:
    """SGD with Nesterov momentum, linear warm-up, then a cosine to 0 per step.

    loader: sized and re-iterable, of (clips (B, C, T, H, W) or (slow, fast), labels (B,)); its
    `set_epoch(epoch, first_batch)` is called if it has one. generator: source of the mixing (None:
    a new one with seed 0). Yields {"step", "epoch", "loss", "lr", "acc", "lam"} per step: `acc` is
    the `mixed_accuracy`, `lam` the mean weight of the own label. `steps.send("state")` returns a
    snapshot; `resume=snapshot` goes on from it (also with the same generator state).
    """
    if not all(0 <= value < math.inf for value in (epochs, lr, warmup_epochs)):
        raise ValueError("epochs, lr and warmup_epochs must be >= 0 and finite, not "
                         f"{epochs}, {lr} and {warmup_epochs}")
    device, per_epoch = next(model.parameters()).device, len(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0,
                                weight_decay=weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    first, skip, total, warm = 0, 0, epochs * per_epoch, warmup_epochs * per_epoch
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))    # it keeps what it loads
        scaler.load_state_dict(resume["scaler"])
        generator.set_state(resume["generator"])
        first, skip = resume["epoch"], resume["batch"]
    for epoch in range(first, epochs):
        states = resume["order"] if skip else None
        batches, order, began = _epoch(loader, epoch, skip, states)
        batch, skip = skip - 1, 0                                 # the last one done
        for batch, (x, y, *_) in batches:
            for module in (model, mix) if mix is not None else (model,):
                module.train()                                    # the caller may evaluate between
            step = epoch * per_epoch + batch
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
            rate = lr * (min((step + 1) / warm, 1) if step < warm else cosine)
            optimizer.param_groups[0]["lr"] = rate
            x, y = _to(x, device), y.to(device)
            lam, partner = 1.0, y
            if mix is not None:
                x, target, lam, _, _, _, partner, _ = mix(x, y, generator)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(x).float()
            loss = F.cross_entropy(logits, y) if mix is None else soft_cross_entropy(logits, target)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            acc = mixed_accuracy(logits.detach(), y, partner, lam)
            lam = torch.as_tensor(lam, dtype=torch.float64).mean().item()
            request = yield {"step": step, "epoch": epoch, "loss": loss.item(), "lr": rate,
                             "acc": acc, "lam": lam}
            while request == "state":
                request = yield copy.deepcopy({
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(), "generator": generator.get_state(),
                    "order": [began, order.get_state()], "epoch": epoch, "batch": batch + 1})
        if batch < 0:
            raise ValueError(f"the loader gave no batch in epoch {epoch}: it must not be empty, "
                             "nor an iterator that ends with the first epoch")


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, num_clips: int = 1, num_crops: int = 1) -> dict:
    """{"top1", "top5"} in [0, 1]: softmax averaged over the num_clips * num_crops views of a video.

    loader: of (x, y), x (B, views, C, T, H, W), or (B, C, T, H, W) for one view, or (slow, fast).
    Of equal scores the first class wins."""
    device, views = next(model.parameters()).device, num_clips * num_crops
    modes, top1, top5, count = {m: m.training for m in model.modules()}, 0, 0, 0
    model.eval()
    try:
        for x, y, *_ in loader:
            x, y = _to(x, device), y.to(device)
            parts = [p.unsqueeze(1) if p.ndim == 5 else p
                     for p in (x if isinstance(x, tuple) else (x,))]
            if any(p.ndim != 6 or p.shape[:2] != (*y.shape, views) for p in parts):
                raise ValueError(f"x must be (B, {views}, C, T, H, W) for B = {len(y)} labels, not "
                                 f"{tuple(parts[0].shape)}")
            parts = tuple(p.flatten(0, 1) for p in parts)
            logits = model(parts if len(parts) > 1 else parts[0])
            _check_labels(y, logits.shape[1])
            probs = logits.float().softmax(1).unflatten(0, (-1, views)).mean(1)
            best = probs.argsort(dim=1, descending=True, stable=True)[:, :5] == y.unsqueeze(1)
            top1, top5 = top1 + int(best[:, 0].sum()), top5 + int(best.any(1).sum())
            count += len(y)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise ValueError("the loader is empty: nothing to evaluate")
    return {"top1": top1 / count, "top5": top5 / count}


def _demonstrate() -> None:
    generator, size = torch.Generator().manual_seed(0), (64, 256, 256)
    print("pasted volume for alpha = 1: closed form, and mean of 20,000 boxes")
    for variant, expected in (("S", 0.3208), ("T", 0.4167), ("ST", 0.2437)):
        lams = _betas(1.0, 20_000, generator)
        boxes = torch.tensor([sample_cuboid(size, v, variant, generator=generator) for v in lams])
        print(f"  {variant:3s} {expected:.4f}   {1 - cuboid_lambda(boxes, size).mean():.4f}")
    fast = torch.rand(4, 3, 32, 16, 16, generator=generator)
    slow, fast = VideoMix("ST", num_classes=4)((fast[:, :, ::4], fast), torch.arange(4)).x
    print("mixed slow pathway = every 4th frame of the fast:", torch.equal(slow, fast[:, :, ::4]))


if __name__ == "__main__":
    _demonstrate()
