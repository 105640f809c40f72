"""Weakly supervised object localization: CAM, HaS, ACoL, SPG, ADL, CutMix, and their baselines.

Choe*, Oh*, Chun, Lee, Akata, Shim. "Evaluation for Weakly Supervised Object Localization: Protocol,
Metrics, and Datasets", TPAMI 2022, arXiv:2007.04178 (CVPR 2020 version: arXiv:2001.07437).

A classifier trained from image labels y also yields a score map s in [0, 1]^(H x W); thresholded,
it should show the object. Six ways to the map, all with cross entropy (CE) on the class logits:

    CAM     feature map f (C, h, w), logits = W mean_hw(f) + b;  s = sum_c W[y, c] f[c]
    HaS     CAM, training images with random square cells hidden
    ACoL    heads A and B on f; B sees f erased where A's map of y is >= a threshold;
            CE(A) + CE(B);  s = max(A's map, B's map)
    SPG     CAM with auxiliary maps B1, B2, C, each taught by the confident pixels of another map
    ADL     CAM, feature maps multiplied by their own attention, or with their peak dropped (a coin)
    CutMix  CAM, training images with a box pasted from another image and labels mixed by area

The paper's finding: with the same few fully labelled images for tuning, none of the later five
beats CAM, while a predictor *trained* on those images (`FewShotHead`) beats them all. Below stand
the six methods on VGG16, ResNet50 and InceptionV3 under the published parameter names
(`build_network`), as heads around any backbone (`CAMHead`, `ACoLHead`, `SPGHead`, `ADL`), the
few-shot, centre and gradient baselines, and the training recipe (`train`).

    network = build_network("resnet50", "cam", num_classes=200, large_feature_map=True)
    for row in train(network, loader, {"method": "has", "lr": 1e-3, "epochs": 10}):
        print(row)                                        # {"step": 0., "epoch": 0., "loss": ...}
    logits, maps = network.eval().predict(images, labels)   # one forward: (B, K) and (B, h, w)

Maps are raw: to evaluate, first resize them to the input (bicubic), then min-max normalise.
Bad arguments are ValueErrors that name the argument; labels that are no integers, a TypeError.
`python wsol.py` trains CAM and the few-shot baseline on toy scenes and prints how they localize.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHS = ("vgg16", "resnet50", "inception_v3")
METHODS = ("cam", "has", "acol", "spg", "adl", "cutmix")
SPG_THRESHOLDS = ((0.7, 0.01), (0.5, 0.05), (0.7, 0.1))  # (high, low) for the masks of B2, B1 and C


def _check_unit(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def _check_counts(**values: int) -> None:
    for name, value in values.items():
        if not value >= 1 or value % 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value}")


def _check_images(name: str, x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} must be (B, C, H, W), got shape {tuple(x.shape)}")


def _check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    kind = str(labels.dtype if isinstance(labels, Tensor) else type(labels))
    if not kind.startswith(("torch.int", "torch.uint")):
        raise TypeError(f"labels must be an integer tensor, got {kind}")
    if labels.shape != (batch,):
        raise ValueError(f"labels must have shape ({batch},), got {tuple(labels.shape)}")
    # On a GPU the comparison would stall the queue at every step; the gather kernel asserts there.
    # Compiled, it would break the graph.
    host = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if host and ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {labels.tolist()}")


def _of_label(maps: Tensor, labels: Tensor) -> Tensor:
    """What belongs to each image's label: (B, K, ...), (B,) -> (B, 1, ...)."""
    return maps[torch.arange(maps.shape[0], device=maps.device), labels.long()].unsqueeze(1)


# ---- HaS and CutMix: input augmentations ----

def has(image: Tensor, grid_size: int, drop_rate: float,
        generator: torch.Generator | None = None, draws: Tensor | None = None) -> Tensor:
    """Hide-and-Seek (Singh and Lee, ICCV 2017): sets square cells of `grid_size` *pixels* a side
    (0: none) of `image` (B, C, H, W) to 0, the mean of normalised images, with probability
    `drop_rate`: where uniform `draws` (B, ceil(H/g), ceil(W/g)) are <= `drop_rate`."""
    _check_images("image", image)
    if not grid_size >= 0 or grid_size % 1:
        raise ValueError(f"grid_size must be a whole number of pixels >= 0, got {grid_size}")
    _check_unit(drop_rate=drop_rate)
    if grid_size == 0:
        return image
    (batch, _, height, width), grid = image.shape, int(grid_size)
    cells = (batch, -(-height // grid), -(-width // grid))
    if draws is None:
        draws = torch.rand(cells, **_source(generator))
    elif tuple(draws.shape) != cells:
        raise ValueError(f"draws must have shape {cells}, got {tuple(draws.shape)}")
    hidden = (torch.as_tensor(draws) <= drop_rate).to(image.device)
    hidden = hidden.repeat_interleave(grid, 1).repeat_interleave(grid, 2)[:, :height, :width]
    return image.masked_fill(hidden.unsqueeze(1), 0)


def _source(generator: torch.Generator | None) -> dict:
    """Arguments of a draw. No generator=None: compiled, it would allow one shape only."""
    if generator is None:
        return {"device": torch.device("cpu")}
    return {"generator": generator, "device": generator.device}


def _randint(high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(high, (), **_source(generator)))


def rand_bbox(size: Sequence[int], lam: float, cx: int | None = None, cy: int | None = None,
              generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
    """The CutMix box (x1, y1, x2, y2), exclusive ends, of relative area 1 - `lam` before clipping,
    for images of `size` (B, C, size2, size3): x on axis 2, y on axis 3. Default: random centre."""
    _check_unit(lam=lam)
    if len(size) != 4 or not min(size[2:]) > 0:
        raise ValueError(f"size must be (B, C, size2, size3) with pixels, got {tuple(size)}")
    ratio = math.sqrt(1.0 - lam)
    cx = _randint(size[2], generator) if cx is None else int(cx)
    cy = _randint(size[3], generator) if cy is None else int(cy)
    half_x, half_y = int(size[2] * ratio) // 2, int(size[3] * ratio) // 2
    inside = lambda value, end: min(max(value, 0), end)                        # noqa: E731
    return (inside(cx - half_x, size[2]), inside(cy - half_y, size[3]),
            inside(cx + half_x, size[2]), inside(cy + half_y, size[3]))


def cutmix(x: Tensor, target: Tensor, beta: float, generator: torch.Generator | None = None,
           draws: tuple | None = None) -> tuple[Tensor, Tensor, Tensor, float]:
    """CutMix (Yun et al., ICCV 2019): pastes a box of a shuffled batch into `x` (B, C, H, W).

    lam ~ Beta(beta, beta) sets the box area. Returns (mixed x, target_a, target_b, lam) with lam
    recomputed from the clipped box; the loss is lam CE(., target_a) + (1 - lam) CE(., target_b).
    `draws` = (lam, permutation, cx, cy) replaces the random numbers."""
    _check_images("x", x)
    if len(target) != len(x):
        raise ValueError(f"target must hold {len(x)} labels, got {len(target)}")
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if draws is None:
        # torch's Beta takes no generator; numpy's does, seeded by one draw of ours.
        lam = float(np.random.default_rng(_randint(2**63 - 1, generator)).beta(beta, beta))
        order = torch.randperm(len(x), **_source(generator))
        cx = cy = None
    else:
        lam, order, cx, cy = draws
    order = torch.as_tensor(order, device=x.device)
    if order.shape != (len(x),):
        raise ValueError(f"the permutation in draws must have shape ({len(x)},), "
                         f"got {tuple(order.shape)}")
    x1, y1, x2, y2 = rand_bbox(x.shape, float(lam), cx, cy, generator)
    mixed = x.clone()
    mixed[:, :, x1:x2, y1:y2] = x[order, :, x1:x2, y1:y2]
    lam = 1.0 - (x2 - x1) * (y2 - y1) / (x.shape[2] * x.shape[3])
    return mixed, target, target[order.to(target.device)], lam


# ---- ADL: a layer ----

class ADL(nn.Module):
    """Attention-based dropout layer (Choe and Shim, CVPR 2019), identity in eval mode.

    With a = mean over channels of x (B, C, H, W): the importance map is sigmoid(a), the drop mask 1
    where a < `adl_drop_threshold` * max(a), else 0. One coin for the batch multiplies x by the drop
    mask with probability `adl_drop_rate`, else by the importance map, which has a gradient."""

    def __init__(self, adl_drop_rate: float = 0.75, adl_drop_threshold: float = 0.9,
                 generator: torch.Generator | None = None):
        super().__init__()
        _check_unit(adl_drop_rate=adl_drop_rate, adl_drop_threshold=adl_drop_threshold)
        self.adl_drop_rate, self.adl_drop_threshold = adl_drop_rate, adl_drop_threshold
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        _check_images("x", x)
        if not self.training:
            return x
        attention = x.mean(1, keepdim=True)
        coin = torch.rand((), **_source(self.generator))
        if coin + self.adl_drop_rate >= 1.0:  # floor(U + rate) of the public code
            peak = attention.amax((1, 2, 3), keepdim=True)
            return x * (attention < self.adl_drop_threshold * peak)
        return x * attention.sigmoid()


# ---- ACoL: adversarial complementary learning (Zhang et al., CVPR 2018) ----

def normalize_tensor(x: Tensor) -> Tensor:
    """Min-max over the pixels of each (image, channel) of `x` (B, C, H, W).

    A constant channel is 0/0 = NaN, as published: every comparison with it is false (nothing is
    erased, nothing supervised), and the evaluation turns a NaN map into an empty one."""
    _check_images("x", x)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low) / (high - low)


def acol_attention(feat_map: Tensor, labels: Tensor) -> Tensor:
    """Detached min-max map of the label, (B, 1, H, W), from class maps `feat_map` (B, K, H, W)."""
    _check_labels(labels, *feat_map.shape[:2])
    return normalize_tensor(_of_label(feat_map, labels)).detach()


def erase_attention(feature: Tensor, attention: Tensor, threshold: float) -> Tensor:
    """`feature` (B, C, H, W) with 0 where `attention` (B, 1, H, W) >= `threshold`."""
    _check_unit(threshold=threshold)
    return feature * ~(attention >= threshold)


def acol_loss(out: dict, target: Tensor) -> Tensor:
    """CE of both branches; `out` holds "logits" and "logit_b"."""
    return F.cross_entropy(out["logits"], target) + F.cross_entropy(out["logit_b"], target)


# ---- SPG: self-produced guidance (Zhang et al., ECCV 2018) ----

def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def spg_attention(feat_map: Tensor, labels: Tensor, logits_b1: Tensor, logits_b2: Tensor,
                  size: tuple[int, int] = (224, 224)) -> tuple[Tensor, Tensor]:
    """(attention, fused), each detached (B, 1, h, w) at `size`: the label's class map upsampled and
    min-max normalised, and the mean of the two sigmoid B maps upsampled."""
    _check_labels(labels, *feat_map.shape[:2])
    attention = normalize_tensor(_upsample(_of_label(feat_map, labels), size)).detach()
    fused = (_upsample(logits_b1, size).sigmoid() + _upsample(logits_b2, size).sigmoid()) / 2
    return attention, fused.detach()


def spg_mask(attention: Tensor, high: float, low: float) -> Tensor:
    """Labels from a map (B, 1, h, w): 1 above `high`, 0 below `low` (which wins), 255 (ignore)
    between. An image with fewer than 30 pixels above `high` takes those above 0.7 of its peak."""
    _check_images("attention", attention)
    _check_unit(high=high, low=low)
    foreground = attention > high
    few = foreground.sum((1, 2, 3), keepdim=True) < 30
    peak = attention.amax((1, 2, 3), keepdim=True)
    foreground = torch.where(few, attention > 0.7 * peak, foreground)
    mask = torch.full_like(attention, 255).masked_fill(foreground, 1)
    return mask.masked_fill(attention < low, 0)


def _masked_bce(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean BCE over the pixels of the batch whose mask is not 255; 0 if there are none."""
    dtype, valid = torch.promote_types(logits.dtype, torch.float32), mask != 255
    logits, mask = _upsample(logits, mask.shape[2:]).to(dtype), mask.to(dtype).clamp(max=1)
    loss = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def spg_loss(out: dict, target: Tensor,
             thresholds: Sequence[tuple[float, float]] = SPG_THRESHOLDS) -> Tensor:
    """CE(logits) + BCE(B2, mask of attention) + BCE(B1, mask of B2) + BCE(C, mask of fused map).

    `out` holds "logits", "logits_b1", "logits_b2", "logits_c" (B, 1, h, w before upsampling),
    "attention", "fused_attention" (B, 1, H, W, the size of the masks); `thresholds` the three
    (high, low) pairs in this order."""
    (high_1, low_1), (high_2, low_2), (high_3, low_3) = thresholds
    size = out["attention"].shape[2:]
    guide_b1 = _upsample(out["logits_b2"].detach(), size).sigmoid()
    return (F.cross_entropy(out["logits"], target)
            + _masked_bce(out["logits_b2"], spg_mask(out["attention"], high_1, low_1))
            + _masked_bce(out["logits_b1"], spg_mask(guide_b1, high_2, low_2))
            + _masked_bce(out["logits_c"], spg_mask(out["fused_attention"], high_3, low_3)))


# ---- Networks: what all share, and heads around any backbone ----

class Localizer(nn.Module):
    """A subclass defines `taps(x)` -> (map for B1, map for B2, last map), each (B, C, h, w); the
    first two matter to SPG alone. The last is classified by `fc` (CAM), `classifier_A` and `_B`
    (ACoL), or a 1x1 convolution `SPG_A_4` / `SPG_A4` (SPG, and Inception's CAM).

    forward(x (B, 3, H, W), labels (B,) or None) -> dict of training outputs, with "logits" (B, K);
    with `return_cam=True` the map of the label, (B, h, w), unnormalised, without a graph."""

    arch = ""

    def outputs(self, x: Tensor, labels: Tensor | None, guide: bool = True) -> dict:
        """All that losses and maps need; `guide=False` leaves out what SPG's losses alone do."""
        *guides, last = self.taps(x)
        if hasattr(self, "fc"):
            return {"logits": self.fc(last.mean((2, 3))), "feature": last}
        if hasattr(self, "classifier_A"):
            map_a = self.classifier_A(last)
            logits = map_a.mean((2, 3))
            attention = (normalize_tensor(_of_label(map_a, logits.argmax(1))).detach()
                         if labels is None else acol_attention(map_a, labels))
            map_b = self.classifier_B(erase_attention(last, attention, self.drop_threshold))
            return {"logits": logits, "logit_b": map_b.mean((2, 3)),
                    "feat_map_a": map_a, "feat_map_b": map_b}
        class_maps = (self.SPG_A_4 if hasattr(self, "SPG_A_4") else self.SPG_A4)(last)
        out = {"logits": class_maps.mean((2, 3)), "class_maps": class_maps}
        if guide and hasattr(self, "SPG_C"):
            out["logits_b1"] = self.SPG_B_shared(self.SPG_B_1a(guides[0]))
            out["logits_b2"] = self.SPG_B_shared(self.SPG_B_2a(guides[1]))
            out["logits_c"] = self.SPG_C(last)
            if labels is not None:
                out["attention"], out["fused_attention"] = spg_attention(
                    class_maps, labels, out["logits_b1"], out["logits_b2"], x.shape[2:])
        return out

    def label_map(self, out: dict, labels: Tensor) -> Tensor:
        """The map (B, h, w) of each label, from `outputs`."""
        _check_labels(labels, *out["logits"].shape)
        if "feature" in out:  # mean, not sum, over channels and no bias, as published
            weight = self.fc.weight[labels.long()] / self.fc.in_features
            return torch.einsum("bc,bchw->bhw", weight, out["feature"])
        if "feat_map_a" in out:
            maps = (normalize_tensor(_of_label(out[f"feat_map_{k}"], labels)) for k in "ab")
            return torch.maximum(*maps).squeeze(1)
        return _of_label(out["class_maps"], labels).squeeze(1)

    def forward(self, x: Tensor, labels: Tensor | None = None, return_cam: bool = False):
        if return_cam and labels is None:
            raise ValueError("return_cam=True needs labels: the map is that of a class")
        if return_cam:
            with torch.no_grad():
                return self.label_map(self.outputs(x, labels, guide=False), labels)
        out = self.outputs(x, labels)
        return {key: out[key] for key in out if key not in ("feature", "class_maps")}

    @torch.inference_mode()
    def predict(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (B, K), map of the label (B, h, w)): one forward, no graph. Call in eval mode."""
        out = self.outputs(x, labels, guide=False)
        return out["logits"], self.label_map(out, labels)


def _convs(*widths: int) -> nn.Sequential:
    """3x3 convolutions widths[0] -> widths[1] -> ..., each with ReLU."""
    pairs = zip(widths, widths[1:])
    return nn.Sequential(*(layer for i, o in pairs for layer in
                           (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True))))


def _add_acol(net: nn.Module, channels: int, num_classes: int, width: int = 1024) -> None:
    for branch in "AB":
        layers = (*_convs(channels, width, width), nn.Conv2d(width, num_classes, 1))
        net.add_module(f"classifier_{branch}", nn.Sequential(*layers))


def _add_spg(net: nn.Module, b1: int, b2: int, last: int, shared: int = 512, width: int = 512):
    """The branches; `b1`, `b2`, `last`: channels of the three `taps`."""
    net.SPG_B_1a, net.SPG_B_2a = _convs(b1, shared), _convs(b2, shared)
    net.SPG_B_shared = nn.Sequential(*_convs(shared, shared), nn.Conv2d(shared, 1, 1))
    net.SPG_C = nn.Sequential(*_convs(last, width), nn.Conv2d(width, 1, 1))


class _Head(Localizer):
    """`features`: a module from images to (B, channels, h, w), or None: the input is that map."""

    def __init__(self, features: nn.Module | None, channels: int, num_classes: int):
        super().__init__()
        _check_counts(channels=channels, num_classes=num_classes)
        self.features = nn.Identity() if features is None else features

    def taps(self, x: Tensor) -> tuple:
        return None, None, self.features(x)


class CAMHead(_Head):
    """Class activation maps (Zhou et al., CVPR 2016)."""

    def __init__(self, features: nn.Module | None, channels: int, num_classes: int):
        super().__init__(features, channels, num_classes)
        self.fc = nn.Linear(channels, num_classes)


class ACoLHead(_Head):
    """Two branches of three convolutions; B sees the feature map with A's attention erased."""

    def __init__(self, features: nn.Module | None, channels: int, num_classes: int,
                 drop_threshold: float = 0.7, width: int = 1024):
        super().__init__(features, channels, num_classes)
        _check_unit(drop_threshold=drop_threshold)
        self.drop_threshold = drop_threshold
        _add_acol(self, channels, num_classes, width)


class SPGHead(_Head):
    """SPG on one feature map, which feeds A, B1 and B2; C reads the last layer of A."""

    def __init__(self, features: nn.Module | None, channels: int, num_classes: int,
                 width: int = 512):
        super().__init__(features, channels, num_classes)
        self.SPG_A_3 = _convs(channels, width, width)
        self.SPG_A_4 = nn.Conv2d(width, num_classes, 1)
        _add_spg(self, channels, channels, width, width, width)

    def taps(self, x: Tensor) -> tuple:
        feature = self.features(x)
        return feature, feature, self.SPG_A_3(feature)


# ---- The published networks ----

_NEW_LAYERS = ("conv6", "fc.", "SPG_A3", "SPG_A4", "SPG_A_3", "SPG_A_4", "SPG_B", "SPG_C", "class")

# Numbers: 3x3 convolution + ReLU. M: 2x2 max-pool, m: the same, left out for the large map.
# P: 3x3 max-pool with stride 2, p: with 1 for the large map, S: with 1. A: ADL.
_VGG_PLANS = {
    "cam": "64 64 M 128 128 M 256 256 256 M 512 512 512 m 512 512 512",
    "acol": "64 64 P 128 128 P 256 256 256 P 512 512 512 p 512 512 512 S",
    "spg": "64 64 M 128 128 M 256 256 256 M",
    "adl": "64 64 M 128 128 M 256 256 256 M A 512 512 512 A m 512 512 512 A",
}


class VGG16(Localizer):
    """`_VGG_PLANS` without batch normalisation; of SPG, conv4 and 5 are `SPG_A_1` and `SPG_A_2`."""

    arch, channels = "vgg16", 1024

    def __init__(self, method: str, num_classes: int, large: bool, adl: Callable[[], ADL]):
        super().__init__()
        self.method, layers, inputs = method, [], 3
        for token in _VGG_PLANS[method].split():
            if token.isdigit():
                layers += _convs(inputs, int(token))
                inputs = int(token)
            elif token == "A":
                layers.append(adl())
            elif token in "PpS":
                stride = 1 if token == "S" or token == "p" and large else 2
                layers.append(nn.MaxPool2d(3, stride, padding=1))
            elif token == "M" or not large:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        if method == "acol":
            _add_acol(self, 512, num_classes)
        elif method == "spg":
            self.SPG_A_1 = _convs(256, 512, 512, 512)
            self.pool = nn.Identity() if large else nn.MaxPool2d(3, stride=2, padding=1)
            self.SPG_A_2 = _convs(512, 512, 512, 512)
            self.SPG_A_3 = _convs(512, 512, 512)
            self.SPG_A_4 = nn.Conv2d(512, num_classes, 1)
            _add_spg(self, 512, 512, 512)
        else:
            self.conv6 = nn.Conv2d(512, 1024, 3, padding=1)
            self.fc = nn.Linear(1024, num_classes)

    def taps(self, x: Tensor) -> tuple:
        feature = self.features(x)
        if self.method == "acol":
            return None, None, F.avg_pool2d(feature, 3, stride=1, padding=1)
        if self.method == "spg":
            first = self.pool(self.SPG_A_1(feature))
            second = self.SPG_A_2(first)
            return first, second, self.SPG_A_3(second)
        return None, None, F.relu(self.conv6(feature))


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None if stride == 1 and inputs == 4 * planes else nn.Sequential(
            nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)), inplace=True)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet50(Localizer):
    """layer4 always keeps stride 1; the large map gives layer3 stride 1 as well."""

    arch, channels = "resnet50", 2048

    def __init__(self, method: str, num_classes: int, large: bool, adl: Callable[[], ADL]):
        super().__init__()

        def stage(inputs: int, planes: int, blocks: int, stride: int) -> list[nn.Module]:
            return [_Bottleneck(4 * planes if i else inputs, planes, 1 if i else stride)
                    for i in range(blocks)]

        self.method = method
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(*stage(64, 64, 3, 1))
        self.layer2 = nn.Sequential(*stage(256, 128, 4, 2))
        third, fourth = stage(512, 256, 6, 1 if large else 2), stage(1024, 512, 3, 1)
        if method == "adl":  # as entries of the stages, so later blocks move up by one
            third.insert(1, adl())
            fourth = [fourth[0], adl(), *fourth[1:], adl()]
        if method == "spg":
            self.SPG_A1, self.SPG_A2 = nn.Sequential(third[0]), nn.Sequential(*third[1:])
        else:
            self.layer3 = nn.Sequential(*third)
        self.layer4 = nn.Sequential(*fourth)
        if method == "acol":
            _add_acol(self, 2048, num_classes)
        elif method == "spg":
            self.SPG_A4 = nn.Conv2d(2048, num_classes, 1)
            _add_spg(self, 1024, 1024, 2048, shared=1024)
        else:
            self.fc = nn.Linear(2048, num_classes)

    def taps(self, x: Tensor) -> tuple:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer2(self.layer1(F.max_pool2d(x, 3, stride=2, padding=1)))
        if self.method == "spg":
            first = self.SPG_A1(x)
            second = self.SPG_A2(first)
            return first, second, self.layer4(second)
        return None, None, self.layer4(self.layer3(x))


class _ConvBN(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """An inception block: parallel chains of `_ConvBN`, concatenated. `branches`: {name: [(outputs,
    kernel), ...]}, padded to keep the size; longer chains have layers named name_1, name_2, ..."""

    def __init__(self, inputs: int, branches: dict):
        super().__init__()
        self.chains = []
        for name, layers in branches.items():
            chain, width = [], inputs
            for number, (outputs, kernel) in enumerate(layers, 1):
                chain.append(name if len(layers) == 1 else f"{name}_{number}")
                self.add_module(chain[-1], _ConvBN(width, outputs, kernel, padding="same"))
                width = outputs
            self.chains.append(chain)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            out = F.avg_pool2d(x, 3, 1, 1) if chain == ["branch_pool"] else x
            for name in chain:
                out = getattr(self, name)(out)
            outputs.append(out)
        if len(self.chains) == 2:  # Mixed_6a, whose pooled branch has no convolution
            outputs.append(F.max_pool2d(x, 3, 1, 1))
        return torch.cat(outputs, 1)


def _inception_a(inputs: int, pool: int) -> _Mixed:
    return _Mixed(inputs, {
        "branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pool, 1)]})


def _inception_c(c7: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    return _Mixed(768, {
        "branch1x1": [(192, 1)], "branch7x7": [(c7, 1), (c7, row), (192, column)],
        "branch7x7dbl": [(c7, 1), (c7, column), (c7, row), (c7, column), (192, row)],
        "branch_pool": [(192, 1)]})


class _Dropout(nn.Module):
    """Dropout with a generator of its own, so that `train` resumes to the same numbers."""

    rate, generator = 0.5, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.generator is None:
            return F.dropout(x, self.rate)
        keep = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class InceptionV3(Localizer):
    """InceptionV3 up to Mixed_6e; Mixed_6a keeps stride 1. CAM and SPG drop out, ADL does not."""

    arch, channels = "inception_v3", 1024

    def __init__(self, method: str, num_classes: int, large: bool, adl: Callable[[], ADL]):
        super().__init__()
        self.method, self.large = method, large
        self.Conv2d_1a_3x3 = _ConvBN(3, 32, 3, stride=2, padding=1)
        self.Conv2d_2a_3x3 = _ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = _ConvBN(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = _ConvBN(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = _inception_a(192, 32), _inception_a(256, 64)
        self.Mixed_5d = _inception_a(288, 64)
        double = [(64, 1), (96, 3), (96, 3)]
        self.Mixed_6a = _Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": double})
        self.Mixed_6b, self.Mixed_6c = _inception_c(128), _inception_c(160)
        self.Mixed_6d, self.Mixed_6e = _inception_c(160), _inception_c(192)
        self.adl_5d, self.adl_6e, self.adl_a3 = (
            adl() if method == "adl" else nn.Identity() for _ in range(3))
        self.dropout = nn.Identity() if method == "adl" else _Dropout()
        if method == "acol":
            _add_acol(self, 768, num_classes)
            return
        self.SPG_A3_1b, self.SPG_A3_2b = _convs(768, 1024), _convs(1024, 1024)
        self.SPG_A4 = nn.Conv2d(1024, num_classes, 1)
        if method == "spg":
            _add_spg(self, 288, 768, 1024)

    def taps(self, x: Tensor) -> tuple:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
        first = self.adl_5d(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        if not self.large:
            first = F.max_pool2d(first, 3, stride=2, ceil_mode=True)
        second = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(first))))
        x = self.adl_6e(self.Mixed_6e(second))  # B2 reads 6d, not 6e, as published
        if self.method != "acol":
            x = self.SPG_A3_2b(self.dropout(self.SPG_A3_1b(self.dropout(x))))
            x = self.dropout(self.adl_a3(x))
        return first, second, x


def build_network(arch: str, method: str, num_classes: int = 1000, large_feature_map: bool = False,
                  adl_drop_rate: float = 0.75, adl_drop_threshold: float = 0.9,
                  acol_drop_threshold: float = 0.7,
                  generator: torch.Generator | None = None) -> Localizer:
    """A published network, freshly initialised; released checkpoints (`state_dict`) load unchanged.

    `arch`: "vgg16", "resnet50" or "inception_v3"; `method`: "cam" ("has" and "cutmix" are the same
    network), "acol", "spg" or "adl". `large_feature_map`: 224 pixels give maps of 28 x 28, not 14.
    `load_torchvision` fills in ImageNet weights."""
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {ARCHS}, got {arch!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    _check_counts(num_classes=num_classes)
    _check_unit(acol_drop_threshold=acol_drop_threshold)
    adl = partial(ADL, adl_drop_rate, adl_drop_threshold)
    adl()  # bad values are an error whatever the method
    method = "cam" if method in ("has", "cutmix") else method
    build = {"vgg16": VGG16, "resnet50": ResNet50, "inception_v3": InceptionV3}[arch]
    with torch.random.fork_rng(devices=[], enabled=generator is not None):     # torch draws too
        network = build(method, num_classes, large_feature_map, adl)
    network.drop_threshold = acol_drop_threshold
    initialize = nn.init.xavier_uniform_
    if (arch, method) in (("vgg16", "cam"), ("vgg16", "adl"), ("resnet50", "acol")):
        initialize = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            initialize(module.weight, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01, generator=generator)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return network


def load_torchvision(network: Localizer, state: dict[str, Tensor]) -> list[str]:
    """Copies torchvision's ImageNet weights into a network of `build_network`, layer by layer in
    order because the indices differ, and `fc` where its shape fits; returns the names of what keeps
    its initialisation (the new layers)."""
    own = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    ours = [name for name in own if not name.startswith(_NEW_LAYERS)]
    left_out = ("classifier.", "fc.", "Mixed_7", "AuxLogits")
    theirs = [name for name in state if not name.startswith(left_out) and "num_batches" not in name]
    pairs = dict(zip(ours, theirs))
    if len(ours) != len(theirs) or any(own[a].shape != state[b].shape for a, b in pairs.items()):
        raise ValueError(f"state is not torchvision's {network.arch}: {list(state)[:2]}, ...")
    if "fc.bias" in own and "fc.bias" in state and own["fc.bias"].shape == state["fc.bias"].shape:
        pairs |= {"fc.weight": "fc.weight", "fc.bias": "fc.bias"}
    network.load_state_dict({a: state[b] for a, b in pairs.items()}, strict=False)
    return [name for name in own if name not in pairs]


# ---- Baselines: few-shot, centre, gradients ----

class FewShotHead(nn.Module):
    """The paper's few-shot baseline: a 1x1 convolution to one class-agnostic saliency map, trained
    by per-pixel BCE on the images that the other methods use for tuning.

    forward(x) -> logits (B, 1, h, w). `features` as in `CAMHead`, or a network of
    `build_network(arch, "cam")` with `channels=network.channels`: its classifier is left out."""

    def __init__(self, features: nn.Module | None, channels: int):
        super().__init__()
        _check_counts(channels=channels)
        self.features = nn.Identity() if features is None else features
        self.saliency = nn.Conv2d(channels, 1, 1)
        if isinstance(features, Localizer):
            (features.fc if hasattr(features, "fc") else features.SPG_A4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        published = isinstance(self.features, Localizer)
        return self.saliency(self.features.taps(x)[-1] if published else self.features(x))

    @torch.inference_mode()
    def predict(self, x: Tensor) -> Tensor:
        """Saliency maps (B, h, w) in (0, 1). Call in eval mode."""
        return self(x).sigmoid().squeeze(1)


def few_shot_targets(size: int, boxes: Sequence | None = None,
                     masks: Sequence | None = None) -> Tensor:
    """A float32 target (size, size), 1 on objects: the union of the filled `boxes` [k, 4] (x0, y0,
    x1, y1 inclusive, already scaled to `size`), or of the instance `masks`, a list of 2-d arrays
    (foreground > 0.5) of any size."""
    _check_counts(size=size)
    if (boxes is None) == (masks is None):
        raise ValueError("either boxes or masks must be given, not both")
    target = torch.zeros(size, size)
    for box in [] if boxes is None else np.asarray(boxes).tolist():
        if np.shape(box) != (4,) or not (0 <= box[0] <= box[2] and 0 <= box[1] <= box[3]):
            raise ValueError(f"boxes need x0, y0, x1, y1, 0 <= x0 <= x1, 0 <= y0 <= y1, got {box}")
        x0, y0, x1, y1 = map(int, box)
        target[y0:y1 + 1, x0:x1 + 1] = 1
    single = isinstance(masks, (np.ndarray, Tensor)) and masks.ndim == 2
    for mask in map(np.asarray, [] if masks is None else [masks] if single else masks):
        if mask.ndim != 2 or mask.size == 0:
            raise ValueError(f"masks must be non-empty 2-d arrays, got shape {mask.shape}")
        # the evaluation's nearest neighbour: floor(dst * scale), the scale rounded like OpenCV's
        rows, columns = (np.minimum((np.arange(size) * (1.0 / (size / n))).astype(int), n - 1)
                         for n in mask.shape)
        target[torch.from_numpy(mask[rows][:, columns] > 0.5)] = 1
    return target


def few_shot_loss(logits: Tensor, target: Tensor) -> Tensor:
    """BCE of logits (B, 1, h, w), upsampled bilinearly, to the target (B, H, W); 255 is ignored."""
    return _masked_bce(logits, target.unsqueeze(1))


def center_gaussian(size: int | tuple[int, int], sigma: float = 1.0) -> np.ndarray:
    """A gaussian at the centre, float64 (h, w), min-max normalised; `sigma` in half image sides."""
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")
    height, width = (size, size) if np.ndim(size) == 0 else size
    for side in (height, width):
        _check_counts(size=side)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    scores = np.exp(-(x**2 + y**2) / (2 * sigma**2))
    span = np.ptp(scores)
    return (scores - scores.min()) / span if span > 0 else np.zeros_like(scores)


def _mean_gradient(model: Callable, inputs: Iterable[Tensor], y: Tensor) -> Tensor:
    """Mean over the inputs, each (B, C, H, W), of d logit_y / d input."""
    total = 0.0
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode
        for count, x in enumerate(inputs, 1):
            x = x.detach().clone().requires_grad_()
            logits = model(x)
            logits = logits["logits"] if isinstance(logits, dict) else logits
            _check_labels(y, *logits.shape)
            total = total + torch.autograd.grad(_of_label(logits, y.clone()).sum(), x)[0]
    return total / count


def _reduce(attribution: Tensor, reduce: str | None) -> Tensor:
    if reduce not in ("max", "mean", None):
        raise ValueError(f"reduce must be 'max', 'mean' or None, got {reduce!r}")
    if reduce is None:
        return attribution
    return attribution.abs().amax(1) if reduce == "max" else attribution.abs().mean(1)


def vanilla_gradient(model: Callable, x: Tensor, y: Tensor, reduce: str | None = "max") -> Tensor:
    """d logit_y / dx (Simonyan et al. 2014). `model(x)`, in eval mode, returns logits (B, K) or a
    dict with "logits". `reduce` "max" | "mean": of the absolute values over channels, (B, H, W);
    None: signed, (B, C, H, W)."""
    return _reduce(_mean_gradient(model, [x], y), reduce)


def integrated_gradients(model: Callable, x: Tensor, y: Tensor, steps: int = 50,
                         baseline: Tensor | None = None, reduce: str | None = "max") -> Tensor:
    """(x - x0) times the mean gradient on the line from x0 to x (Sundararajan et al. 2017; midpoint
    rule): the signed values sum to logit(x) - logit(x0). x0 = `baseline`, default 0, the mean."""
    _check_counts(steps=steps)
    start = torch.zeros_like(x) if baseline is None else torch.as_tensor(baseline).to(x)
    line = (start + (k + 0.5) / steps * (x - start) for k in range(steps))
    return _reduce((x - start) * _mean_gradient(model, line, y), reduce)


def smooth_grad(model: Callable, x: Tensor, y: Tensor, n: int = 50, sigma: float = 0.15,
                reduce: str | None = "max", generator: torch.Generator | None = None) -> Tensor:
    """Mean gradient of `n` noisy copies (Smilkov et al. 2017), noise `sigma` * (max - min) of x."""
    _check_counts(n=n)
    if not sigma >= 0:
        raise ValueError(f"sigma must be >= 0, got {sigma}")
    scale = sigma * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    noisy = (x + scale * torch.randn(x.shape, **_source(generator)).to(x) for _ in range(n))
    return _reduce(_mean_gradient(model, noisy, y), reduce)


# ---- Training ----

CONFIG = {  # what `train` reads, with the published defaults; a trial of the random search fits in
    "method": "cam", "lr": 0.01, "epochs": 10, "decay_frequency": 3, "momentum": 0.9, "amp": False,
    "weight_decay": 5e-4, "lr_classifier_ratio": 10.0, "official_groups": True, "seed": 0,
    "has_grid_size": 4, "has_drop_rate": 0.5, "cutmix_beta": 1.0, "cutmix_prob": 1.0,
    "spg_threshold_1h": 0.7, "spg_threshold_1l": 0.01, "spg_threshold_2h": 0.5,
    "spg_threshold_2l": 0.05, "spg_threshold_3h": 0.7, "spg_threshold_3l": 0.1,
}
NETWORK_KEYS = ("large_feature_map", "acol_drop_threshold", "adl_drop_rate", "adl_drop_threshold")


def parameter_groups(model: nn.Module, lr: float, lr_classifier_ratio: float = 10.0,
                     official_groups: bool = True) -> list[dict]:
    """Two groups: the backbone at `lr`, the classifier at `lr_classifier_ratio` * `lr`.

    `official_groups` sorts the networks of `build_network` by the published substrings: VGG-SPG's
    pretrained conv4/5 and ResNet's layer4 are high, ResNet's new ACoL and SPG heads low. False:
    what is new is high. Of heads around a backbone, all but `features` is."""
    for wrapper in ("_orig_mod", "module", "_orig_mod"):  # torch.compile, DistributedDataParallel
        model = getattr(model, wrapper, model)
    nested = isinstance(model, FewShotHead) and isinstance(model.features, Localizer)
    arch = model.features.arch if nested else getattr(model, "arch", "")

    def is_high(name: str) -> bool:
        name = name.removeprefix("features.") if nested else name
        if not arch or name.startswith("saliency"):
            return not name.startswith("features.")
        if not official_groups:
            return name.startswith(_NEW_LAYERS)
        return {"vgg16": "features." not in name, "resnet50": "layer4." in name or "fc." in name,
                "inception_v3": not name.startswith(("Mixed", "Conv2d_"))}[arch]

    names = dict(model.named_parameters())
    return [{"params": [p for name, p in names.items() if is_high(name) == high],
             "lr": lr * lr_classifier_ratio if high else lr} for high in (False, True)]


def _step_loss(model, x: Tensor, y: Tensor, cfg: dict, generator: torch.Generator) -> Tensor:
    method, ce = cfg["method"], F.cross_entropy
    if method == "fewshot":
        return few_shot_loss(model(x), y)
    if method == "has":
        x = has(x, cfg["has_grid_size"], cfg["has_drop_rate"], generator)
    beta = cfg["cutmix_beta"] if method == "cutmix" else 0.0
    if beta > 0 and float(torch.rand((), generator=generator)) < cfg["cutmix_prob"]:
        x, target_a, target_b, lam = cutmix(x, y, beta, generator)
        logits = model(x)["logits"]
        return lam * ce(logits, target_a) + (1 - lam) * ce(logits, target_b)
    out = model(x, y)
    if method == "acol":
        return acol_loss(out, y)
    if method == "spg":
        return spg_loss(out, y, [[cfg[f"spg_threshold_{i}{end}"] for end in "hl"] for i in "123"])
    return ce(out["logits"], y)


def train(model: nn.Module, loader: Iterable, cfg: dict | None = None,
          resume: dict | None = None) -> Iterator[dict]:
    """The published recipe, one dict of floats per step: SGD with Nesterov momentum, two learning
    rates (`parameter_groups`), both divided by 10 at the *start* of every epoch, counted from 1,
    that is a multiple of `decay_frequency`.

    `loader` yields (images (B, 3, H, W), labels (B,)), for the method "fewshot" (images, targets
    (B, H, W)), anew in every epoch; further entries are ignored. `cfg` overrides `CONFIG`; the keys
    in `NETWORK_KEYS`, which belong to `build_network`, may be in it. `amp` computes in bfloat16.
    Each process of a distributed run draws its own random numbers. `send("state")` returns a
    snapshot, a copy; `resume=snapshot` goes on from it to the same numbers. Published: batches of
    32; epochs / decay_frequency 10 / 3, on CUB 50 / 15; weight decay 5e-4, for ResNet 1e-4."""
    if unknown := set(cfg or {}) - set(CONFIG) - set(NETWORK_KEYS):
        raise ValueError(f"cfg has unknown keys {sorted(unknown)}; accepted are {sorted(CONFIG)}")
    cfg = CONFIG | (cfg or {})
    if cfg["method"] not in (*METHODS, "fewshot"):
        raise ValueError(f"method must be one of {(*METHODS, 'fewshot')}, got {cfg['method']!r}")
    for name, low in (("lr", 0), ("lr_classifier_ratio", 0), ("weight_decay", 0), ("epochs", 0),
                      ("decay_frequency", 1), ("has_grid_size", 0), ("cutmix_beta", 0)):
        whole = isinstance(CONFIG[name], int)
        if not cfg[name] >= low or whole and cfg[name] % 1:
            raise ValueError(f"{name} must be {'whole and ' * whole}>= {low}, got {cfg[name]}")
    _check_unit(**{name: cfg[name] for name in CONFIG
                   if name in ("has_drop_rate", "cutmix_prob") or name.startswith("spg_")})
    return _train_steps(model, loader, cfg, resume)


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


def _train_steps(model: nn.Module, loader: Iterable, cfg: dict, resume: dict | None):
    device = next(model.parameters()).device
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    seed = cfg["seed"] + 1_000_003 * (torch.distributed.get_rank() if several else 0)
    generators = {"host": torch.Generator().manual_seed(seed),
                  "device": torch.Generator(device).manual_seed(seed)}
    for module in model.modules():
        if isinstance(module, (ADL, _Dropout)):
            module.generator = generators["host" if isinstance(module, ADL) else "device"]
    groups = parameter_groups(model, cfg["lr"], cfg["lr_classifier_ratio"], cfg["official_groups"])
    base_lrs = [group["lr"] for group in groups]
    optimizer = torch.optim.SGD(groups, lr=cfg["lr"], momentum=cfg["momentum"],
                                weight_decay=cfg["weight_decay"], nesterov=True)
    step = first_epoch = skip = 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))  # it keeps what it is given
        step, first_epoch, skip = resume["step"], resume["epoch"], resume["batch"]
        for name, generator in generators.items():
            generator.set_state(resume[name].cpu())
    for epoch in range(first_epoch, cfg["epochs"]):
        decay = 0.1 ** ((epoch + 1) // cfg["decay_frequency"])
        for group, lr in zip(optimizer.param_groups, base_lrs):
            group["lr"] = lr * decay
        states = resume["order"] if skip else None
        batches, order, began = _epoch(loader, epoch, skip, states)
        batch, skip = skip - 1, 0  # the last one done
        for batch, (x, y, *_) in batches:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            model.train()  # every time: the caller may evaluate in between
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg["amp"]):
                loss = _step_loss(model, x, y, cfg, generators["host"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            row = {"step": float(step), "epoch": float(epoch), "loss": loss.item(),
                   "lr": cfg["lr"] * decay}
            step += 1
            request = yield row
            while request == "state":
                draws = {name: generator.get_state() for name, generator in generators.items()}
                request = yield copy.deepcopy({
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "step": step, "epoch": epoch, "batch": batch + 1,
                    "order": [began, order.get_state()], **draws})
        if batch < 0:
            raise ValueError(f"loader gave no batch in epoch {epoch}; an iterator serves one")


# ---- Demonstration ----

def _toy_scenes(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, 32, 32), labels, masks: a grey square with one corner in its class's colour."""
    rng = np.random.default_rng(0)
    labels, (x, y) = rng.integers(0, 3, count), rng.uniform(8, 24, (2, count, 1, 1))
    column, row = np.arange(32), np.arange(32)[:, None]
    masks = (abs(column - x) < 7) & (abs(row - y) < 7)
    corner = masks & (column < x) & (row < y)
    images = rng.normal(0, 0.3, (count, 3, 32, 32)) + 1.5 * masks[:, None]
    images += 2 * corner[:, None] * np.eye(3)[labels][:, :, None, None]
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels), torch.tensor(masks)


def main() -> None:
    images, labels, masks = _toy_scenes(500)
    backbone = nn.Sequential(*_convs(3, 16), nn.MaxPool2d(2), *_convs(16, 32, 32))
    cam, few = CAMHead(backbone, 32, 3), FewShotHead(copy.deepcopy(backbone), 32)
    generator = torch.Generator().manual_seed(0)
    for parameter in (*cam.parameters(), *few.parameters()):
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    recipe = {"lr": 0.01, "epochs": 4, "lr_classifier_ratio": 1.0}
    list(train(cam, list(zip(images[:384].split(32), labels[:384].split(32))), recipe))
    few_shots = [(images[:15], masks[:15].float())] * 12
    list(train(few, few_shots, recipe | {"method": "fewshot"}))
    images, labels, truth = images[400:], labels[400:], masks[400:].flatten()
    logits, maps = cam.eval().predict(images, labels)
    print(f"CAM classifies {int((logits.argmax(1) == labels).sum())} of 100 test images right. "
          "Pixel average precision of")
    centre = torch.from_numpy(center_gaussian(32)).expand(100, 32, 32)
    for name, scores in (("CAM from 384 labels", maps), ("centre, no training", centre),
                         ("few-shot from 15 masks", few.eval().predict(images))):
        scores = F.interpolate(scores[:, None].double(), size=(32, 32), mode="bicubic")
        hits = truth[normalize_tensor(scores).flatten().argsort(descending=True)]
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        print(f"  {name:24s}{100 * precision[hits].mean():5.1f} %")
    print("Image labels find the part that tells the class; a few masks find the object.")


if __name__ == "__main__":
    main()
