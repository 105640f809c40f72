"""CALM: class activation latent mapping, attribution that is part of the classifier.

Paper: "Keep CALM and Improve Visual Feature Attribution", J. M. Kim, J. Choe, Z. Akata, S. J. Oh, ICCV 2021,
arXiv:2106.07861.

A class activation map is rescaled per image after training: its values have no unit. CALM makes the location of the
recognition cue a latent variable z of the classifier, so that the map is a probability of the trained model. With
location logits f_yz and attention u_z (two 1x1 convolutions on the last feature map), and a = softplus(u):

    g_yz = p(y | x, z) = softmax_y f_yz,    h_z = p(z | x) = a_z / sum_l a_l
    p(y, z | x) = g_yz h_z                  the joint map: "the cue is at z and the class is y"; sums to the prediction
    p(y | x)    = sum_z g_yz h_z            the prediction
    p(z | x, y) = g_yz h_z / p(y | x)       the posterior map: "where is the cue if the class is y"
    p(A, z | x) - p(B, z | x)               the counterfactual map: "A but not B"

    marginal likelihood   L_ML = -log sum_z g_yz h_z
    EM                    L_EM = -sum_z q_z (log g_yz + log h_z),   q = p(z | x, y) held fixed (the E-step)

If q comes from the present parameters, both losses have the SAME gradient (Fisher's identity): L_EM = L_ML + H(q), and
d L / d f_cz = q_z (g_cz - [c = y]), d L / d log a_z = h_z - q_z for both. EM becomes another algorithm only when the
E-step lags: pass `posterior=` from an older or averaged model (or `hard=True`, `temperature=`).

`CALMHead.official` is the released code: ReLU attention and a normaliser without gradient (which lets u grow forever:
sum_z u_z dL/du_z = -1 for every image); the default is the paper's softplus with the true gradient.

    model = CALM(backbone, CALMHead(2048, num_classes))       # backbone(x): (B, 2048, H, W)
    for step in train(model, loader, epochs=40): ...
    maps = attribution_map(model(images), labels)             # (B, H, W), a probability: no normalisation
    maps = counterfactual_map(model(images), a, b)            # signed

>>> output = CALMHead(4, 3)(torch.rand(2, 4, 5, 5))
>>> bool(torch.allclose(attribution_map(output, 1).sum((1, 2)), output.probs()[:, 1]))
True
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

PRIORS, METHODS = ("softplus", "relu", "exp"), ("em", "ml", "cam")
TINY = 1e-8


# ---------------------------------------------------------------- the head (section 4)

class _LogSoftmaxAt(torch.autograd.Function):
    """log softmax over classes of (B, C, L), read at classes (B, n): (B, n, L), one image at a time.

    Forward keeps the logits and one number per location, backward writes one gradient: no third (B, C, L) tensor.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, classes: Tensor) -> Tensor:
        norm = torch.stack([image.logsumexp(0) for image in logits]) if len(logits) else logits.new_zeros(0, logits.shape[2])
        ctx.save_for_backward(logits, classes, norm)
        return logits.gather(1, classes.unsqueeze(2).expand(-1, -1, logits.shape[2])) - norm.unsqueeze(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits, classes, norm = ctx.saved_tensors
        out, total = torch.empty_like(logits), grad.sum(1)
        for b in range(len(logits)):
            torch.sub(logits[b], norm[b], out=out[b])
            out[b].exp_().mul_(-total[b])
        return out.scatter_add_(1, classes.unsqueeze(2).expand_as(grad), grad), None


def _log_softplus(u: Tensor) -> Tensor:
    """log(log(1 + e^u)), which is u far below zero; the double where keeps the unused branch out of the gradient."""
    small = u < -15
    return torch.where(small, u, F.softplus(torch.where(small, 0.0, u)).log())


class CALMOutput:
    """What a CALM head says of a batch, computed on demand, in float32 or better and in logarithms.

    logits (B, C, H, W): location logits f. attention (B, 1, H, W): u. Arguments `classes`: an int, (B,) or (B, n).
    With `epsilons` (the released code) prior, joint, posterior and probs are of h itself, with exact zeros, and the
    logarithm of the prior adds 1e-8 where h < 1e-8. An image without any positive attention has a uniform prior.
    """

    def __init__(self, logits: Tensor, attention: Tensor, prior_activation: str = "softplus",
                 detach_normalizer: bool = False, epsilons: bool = False) -> None:
        if prior_activation not in PRIORS:
            raise ValueError(f"prior_activation must be one of {', '.join(PRIORS)}, not {prior_activation!r}")
        if logits.ndim != 4 or attention.shape != (len(logits), 1, *logits.shape[2:]):
            raise ValueError(f"logits must be (B, C, H, W) and attention (B, 1, H, W), not {tuple(logits.shape)} and {tuple(attention.shape)}")
        self.logits, self.attention = logits, attention
        self.prior_activation, self.detach_normalizer, self.epsilons = prior_activation, detach_normalizer, epsilons
        precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self._flat = logits.to(precise).flatten(2)                                                 # (B, C, L)
        self._u = attention.to(precise).flatten(1)                                                 # (B, L)

    def _shape(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, self.logits.shape[2:])

    def _log_prior(self, raw: bool = False) -> Tensor:
        """(B, L). `raw`: of the released code, without its epsilon (exact zeros become -inf)."""
        count = self._u.shape[1]
        held = lambda t: t.detach() if self.detach_normalizer else t      # noqa: E731
        if self.prior_activation == "exp" or self.prior_activation == "softplus":
            log_a = self._u if self.prior_activation == "exp" else _log_softplus(self._u)
            return log_a - held(log_a.logsumexp(1, keepdim=True))
        a = self._u.relu()
        alive = (a > 0).any(1, keepdim=True)
        a = torch.where(alive, a, 1.0)                        # uniform, and no gradient, where all attention is dead
        if self.epsilons:
            h = a / held(a.sum(1, keepdim=True))
            return h.log() if raw else torch.where(h < TINY, h + TINY, h).log()
        total = held(a.sum(1, keepdim=True))
        return (a + TINY * total).log() - (total * (1 + count * TINY)).log()

    def log_prior(self) -> Tensor:
        """log p(z | x), (B, H, W)."""
        return self._shape(self._log_prior())

    def prior(self) -> Tensor:
        """p(z | x), (B, H, W); sums to 1."""
        return self._shape(self._h())

    def _h(self) -> Tensor:
        if self.epsilons and self.prior_activation == "relu":
            a = self._u.relu()
            a = torch.where((a > 0).any(1, keepdim=True), a, 1.0)
            total = a.sum(1, keepdim=True)
            return a / (total.detach() if self.detach_normalizer else total)
        return self._log_prior().exp()

    def _classes(self, classes: Any) -> tuple[Tensor, bool]:
        """(B, n) int64 and whether there is one class per image; ValueError outside the classes."""
        classes = torch.as_tensor(classes, device=self.logits.device)
        if classes.dtype.is_floating_point or classes.dtype == torch.bool:
            raise TypeError(f"classes must be integers, not {classes.dtype}")
        classes = classes.long().expand(len(self.logits)) if classes.ndim == 0 else classes.long()
        if classes.ndim > 2 or len(classes) != len(self.logits):
            raise ValueError(f"classes must be an int, ({len(self.logits)},) or ({len(self.logits)}, n), not {tuple(classes.shape)}")
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < self.logits.shape[1]:
            raise ValueError(f"classes must be in 0..{self.logits.shape[1] - 1}, found {int(classes.min())}..{int(classes.max())}")
        return classes.view(len(classes), -1), classes.ndim == 1

    def _log_g(self, classes: Any) -> tuple[Tensor, bool]:
        if classes is None:
            return self._flat.log_softmax(1), False
        index, single = self._classes(classes)
        return _LogSoftmaxAt.apply(self._flat, index), single

    def log_joint(self, classes: Any = None) -> Tensor:
        """log p(y, z | x): (B, C, H, W), or (B, n, H, W) for classes (B, n), or (B, H, W) for an int or (B,)."""
        log_g, single = self._log_g(classes)
        out = self._shape(log_g + self._log_prior().unsqueeze(1))
        return out[:, 0] if single else out

    def joint(self, classes: Any = None) -> Tensor:
        """p(y, z | x), shapes as log_joint; over z it sums to p(y | x), over y to the prior."""
        log_g, single = self._log_g(classes)
        out = self._shape(log_g.exp() * self._h().unsqueeze(1))
        return out[:, 0] if single else out

    def log_probs(self) -> Tensor:
        """log p(y | x), (B, C)."""
        if self.epsilons:
            return self.probs().log()
        return (self._flat.log_softmax(1) + self._log_prior().unsqueeze(1)).logsumexp(2)

    def probs(self) -> Tensor:
        """p(y | x), (B, C)."""
        return torch.einsum("bcl,bl->bc", self._flat.softmax(1), self._h())

    def posterior(self, classes: Any) -> Tensor:
        """p(z | x, y): (B, H, W) for an int or (B,), (B, n, H, W) for (B, n); sums to 1 over z."""
        if self.epsilons:
            joint = self.joint(classes)
            return joint / (joint.sum((-2, -1), keepdim=True) + 1e-10)
        log_joint = self.log_joint(classes)
        return log_joint.flatten(-2).softmax(-1).view_as(log_joint)


class CAMOutput:
    """Location logits (B, C, H, W) of the pooled classifier: the class activation maps, with the bias."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def pooled(self) -> Tensor:
        return self.logits.float().mean((2, 3)) if self.logits.dtype in (torch.float16, torch.bfloat16) else self.logits.mean((2, 3))

    def log_probs(self) -> Tensor:
        return self.pooled().log_softmax(1)

    def probs(self) -> Tensor:
        return self.pooled().softmax(1)


class CAMHead(nn.Module):
    """The pooled classifier as a 1x1 convolution before the mean: features (B, K, H, W) to CAMOutput."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls = _conv1x1(in_channels, num_classes)

    def forward(self, features: Tensor) -> CAMOutput:
        _check_features(features, self.cls.in_channels)
        return CAMOutput(self.cls(features))


class CALMHead(nn.Module):
    """Features (B, K, H, W) to CALMOutput; both branches are one convolution of C + 1 outputs.

    prior_activation: "softplus" (paper), "relu" or "exp" (a softmax over locations). detach_normalizer: no gradient
    through sum_l a_l, as in the released code.
    """

    def __init__(self, in_channels: int, num_classes: int, prior_activation: str = "softplus",
                 detach_normalizer: bool = False) -> None:
        super().__init__()
        if prior_activation not in PRIORS:
            raise ValueError(f"prior_activation must be one of {', '.join(PRIORS)}, not {prior_activation!r}")
        self.cls, self.att = _conv1x1(in_channels, num_classes), _conv1x1(in_channels, 1)
        self.prior_activation, self.detach_normalizer, self.epsilons = prior_activation, detach_normalizer, False

    @classmethod
    def official(cls, in_channels: int, num_classes: int) -> CALMHead:
        """The released code's head: ReLU attention, detached normaliser, its epsilons."""
        head = cls(in_channels, num_classes, "relu", detach_normalizer=True)
        head.epsilons = True
        return head

    def forward(self, features: Tensor) -> CALMOutput:
        _check_features(features, self.cls.in_channels)
        weight, bias = torch.cat([self.cls.weight, self.att.weight]), torch.cat([self.cls.bias, self.att.bias])
        logits, attention = F.conv2d(features, weight, bias).split([self.cls.out_channels, 1], 1)
        return CALMOutput(logits, attention, self.prior_activation, self.detach_normalizer, self.epsilons)


class CALM(nn.Module):
    """A backbone that returns the last feature map, and a head on it."""

    def __init__(self, backbone: nn.Module, head: CALMHead | CAMHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> CALMOutput | CAMOutput:
        return self.head(self.backbone(x))


def _conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    if in_channels < 1 or out_channels < 1:
        raise ValueError(f"in_channels and num_classes must be positive, not {in_channels} and {out_channels}")
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _check_features(features: Tensor, channels: int) -> None:
    if features.ndim != 4 or features.shape[1] != channels:
        raise ValueError(f"features must be (B, {channels}, H, W), not {tuple(features.shape)}")


# ---------------------------------------------------------------- losses

def calm_loss(output: CALMOutput | CAMOutput, labels: Tensor, method: str = "em", posterior: Tensor | None = None,
              hard: bool = False, temperature: float = 1.0, reduction: str = "mean") -> Tensor:
    """EM or marginal-likelihood loss of CALM, or the cross entropy of a CAM output ("cam").

    labels (B,) int64. posterior (B, H, W): the E-step from elsewhere (an older or averaged model); else the output's
    own, detached: q proportional to p(y, z | x)^(1 / temperature), or one-hot at its maximum (hard).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if (method == "cam") != isinstance(output, CAMOutput):
        raise ValueError(f"method {method!r} does not go with {type(output).__name__}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, not {getattr(labels, 'dtype', type(labels).__name__)}")
    batch, classes = output.logits.shape[:2]
    if labels.shape != (batch,) or (batch and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise ValueError(f"labels must be ({batch},) with values in 0..{classes - 1}, not {tuple(labels.shape)}"
                         + (f" with {int(labels.min())}..{int(labels.max())}" if labels.numel() else ""))
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if method == "cam":
        losses = F.cross_entropy(output.pooled(), labels, reduction="none")
    elif method == "ml":
        if output.epsilons:
            losses = -output.joint(labels).sum((1, 2)).log()
        else:
            losses = -output.log_joint(labels).flatten(1).logsumexp(1)
    else:
        log_joint = output.log_joint(labels)
        if posterior is None:
            with torch.no_grad():
                if temperature == 1:
                    q = output.posterior(labels) if output.epsilons else log_joint.flatten(1).softmax(1).view_as(log_joint)
                else:
                    q = (log_joint.flatten(1) / temperature).softmax(1).view_as(log_joint)
                if hard:
                    q = F.one_hot(q.flatten(1).argmax(1), q[0].numel()).to(q.dtype).view_as(q)
        elif posterior.shape != log_joint.shape:
            raise ValueError(f"posterior must be {tuple(log_joint.shape)}, not {tuple(posterior.shape)}")
        else:
            q = posterior.detach()
        losses = -(q * log_joint).sum((1, 2))
    if not torch.isfinite(losses.detach()).all():
        raise ValueError("the loss is not finite: the logits hold NaN or infinite values")
    return {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduction]()


# ---------------------------------------------------------------- maps (section 4.3)

def attribution_map(output: CALMOutput | CAMOutput, classes: Any, kind: str = "joint") -> Tensor:
    """(B, H, W) for classes int or (B,), (B, n, H, W) for (B, n); "prior" ignores the classes.

    "joint" p(y, z | x), "posterior" p(z | x, y), "prior" p(z | x): probabilities of the model, not rescaled.
    "cam": the location logits of the class.
    """
    if kind == "cam":
        index, single = CALMOutput._classes(output, classes)
        maps = output.logits.gather(1, index[:, :, None, None].expand(-1, -1, *output.logits.shape[2:]))
        return maps[:, 0] if single else maps
    if kind not in ("joint", "posterior", "prior"):
        raise ValueError(f"kind must be 'joint', 'posterior', 'prior' or 'cam', not {kind!r}")
    if isinstance(output, CAMOutput):
        raise ValueError(f"kind {kind!r} needs the output of a CALM head; a CAM output has 'cam' only")
    return output.prior() if kind == "prior" else getattr(output, kind)(classes)


def counterfactual_map(output: CALMOutput | CAMOutput, a: Any, b: Any, kind: str = "joint", mode: str = "signed") -> Tensor:
    """Map of class a minus map of class b, (B, H, W): "signed", its "positive" part, or "abs"."""
    if mode not in ("signed", "positive", "abs"):
        raise ValueError(f"mode must be 'signed', 'positive' or 'abs', not {mode!r}")
    difference = attribution_map(output, a, kind) - attribution_map(output, b, kind)
    return {"signed": lambda: difference, "positive": lambda: difference.clamp(min=0), "abs": difference.abs}[mode]()


def superclass_map(output: CALMOutput | CAMOutput, groups: Any, kind: str = "joint", reduce: str = "sum",
                   labels: Tensor | None = None) -> Tensor:
    """The maps of a group of classes together, (B, H, W).

    groups: one list of classes per image, (B, n) int64, or a dict label -> classes with `labels` (B,). kind "joint" (a
    probability: the class is one of the group), "posterior" (a sum of posteriors) or "cam" (each map min-max-normalised
    first). reduce "sum" or "mean".
    """
    if kind not in ("joint", "posterior", "cam") or reduce not in ("sum", "mean"):
        raise ValueError(f"kind must be 'joint', 'posterior' or 'cam', reduce 'sum' or 'mean', not {kind!r} and {reduce!r}")
    if isinstance(groups, dict):
        if labels is None:
            raise ValueError("groups as a dict needs labels")
        groups = [groups[int(label)] for label in labels]
    groups = [list(map(int, group)) for group in (groups.tolist() if isinstance(groups, Tensor) else groups)]
    if len(groups) != len(output.logits) or not all(groups):
        raise ValueError(f"groups must hold a non-empty list of classes for each of the {len(output.logits)} images")
    width = max(map(len, groups))
    index = torch.tensor([group + group[:1] * (width - len(group)) for group in groups], device=output.logits.device)
    used = torch.tensor([[1.0] * len(group) + [0.0] * (width - len(group)) for group in groups], device=output.logits.device)
    maps = attribution_map(output, index, kind)
    maps = normalize_map(maps, "minmax") if kind == "cam" else maps
    total = (maps * used[:, :, None, None]).sum(1)
    return total if reduce == "sum" else total / used.sum(1)[:, None, None]


def normalize_map(maps: Tensor, mode: str) -> Tensor:
    """Each map (..., H, W) on its own: "none", "max" (v / max, clipped to [0, 1]), "minmax" or "clip" (to [0, 1]).

    Constant maps and maps with NaN become 0 (not for "none"), as do maps without a positive value under "max".
    """
    if mode not in ("none", "max", "minmax", "clip"):
        raise ValueError(f"mode must be 'none', 'max', 'minmax' or 'clip', not {mode!r}")
    if mode == "none":
        return maps
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    usable = (high > low) & ((high > 0) | (mode != "max"))
    scaled = maps / high if mode == "max" else (maps - low) / (high - low) if mode == "minmax" else maps
    return torch.where(usable, scaled.clamp(0, 1), torch.zeros((), dtype=maps.dtype, device=maps.device))


def resize_map(maps: Tensor, size: int | tuple[int, int]) -> Tensor:
    """(..., h, w) to (..., H, W), bilinear, corners not aligned. Keeps values, not sums."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size)


# ---------------------------------------------------------------- pixel average precision

def thresholds(kind: str, interval: float = 0.001) -> np.ndarray:
    """Ascending thresholds: "even" 0, d, 2 d, ... < 1, or "log" from 10^-7 to 1, float64."""
    if kind not in ("even", "log") or not 0 < interval < 1:
        raise ValueError(f"kind must be 'even' or 'log' and interval in (0, 1), not {kind!r} and {interval}")
    if kind == "even":
        return np.arange(0, 1, interval)
    # scalar powers: numpy's vectorised ones differ in the last bit, and values fall into bins by these edges
    return np.array([10.0 ** -exponent for exponent in np.arange(0, 7, 7 * interval).tolist()][::-1])


class PixelAP:
    """Average precision of pixels over a whole data set, binned as published or exact.

    thresholds: "even", "log", ascending values, or None for the exact one (a step per distinct value). Mask values: 1
    positive, 0 negative, all others ignored. Values below the lowest threshold are in no bin, as published;
    count_underflow=True counts their positives in the recall.
    """

    def __init__(self, thresholds: str | Sequence[float] | None = "even", interval: float = 0.001, count_underflow: bool = False) -> None:
        if isinstance(thresholds, str):
            thresholds = globals()["thresholds"](thresholds, interval)
        self.edges = None
        if thresholds is not None:
            self.edges = torch.as_tensor(np.append(np.asarray(thresholds, dtype=np.float64), [1.0, 2.0, 3.0]))
            if (self.edges.diff() < 0).any():
                raise ValueError("thresholds must be ascending and at most 1")
            self.histogram = torch.zeros(2, len(self.edges) - 1, dtype=torch.float64)
        self.count_underflow, self.below = count_underflow, 0
        self.values: list[Tensor] = []

    def update(self, maps: Any, masks: Any) -> None:
        """maps (N, H, W) or (H, W) in [0, 1], masks of the same shape."""
        maps, masks = torch.as_tensor(maps), torch.as_tensor(masks)
        if maps.shape != masks.shape or maps.ndim not in (2, 3):
            raise ValueError(f"maps and masks must have one shape (N, H, W) or (H, W), not {tuple(maps.shape)} and {tuple(masks.shape)}")
        if not maps.is_floating_point():
            raise TypeError(f"maps must be floating-point, not {maps.dtype}")
        if not ((maps >= 0) & (maps <= 1)).all():
            raise ValueError(f"maps must be in [0, 1] without NaN, found {float(maps.min())} to {float(maps.max())}")
        for positive in (0, 1):
            values = maps[masks == positive].double()
            if self.edges is None:
                self.values.append(torch.stack([values, torch.full_like(values, positive)]).cpu())
                continue
            place = torch.searchsorted(self.edges.to(values.device), values, right=True) - 1
            self.histogram[positive] += torch.bincount(place[place >= 0], minlength=self.histogram.shape[1]).cpu()
            self.below += int((place < 0).sum()) * positive

    def compute(self) -> dict[str, Any]:
        """{"ap" in percent, "precision", "recall"}: arrays from the highest bin down; 0 / 0 is NaN."""
        if self.edges is None:
            value, positive = torch.cat(self.values, 1) if self.values else torch.zeros(2, 0, dtype=torch.float64)
            distinct, place = value.unique(return_inverse=True)
            histogram = torch.stack([torch.bincount(place[positive == p], minlength=len(distinct)).double() for p in (0, 1)])
        else:
            histogram = self.histogram
        false, true = histogram.flip(1).cumsum(1)
        positives = (true[-1] if len(true) else torch.zeros(())) + (self.below if self.count_underflow else 0)
        precision, recall = true / (true + false), true / positives
        gain = torch.diff(recall, prepend=recall.new_zeros(1))
        used = (true + false) > 0
        return {"ap": 100 * float((precision * gain)[used].sum()), "precision": precision.numpy(), "recall": recall.numpy()}


# ---------------------------------------------------------------- cue localisation on birds (section 5.1)

PART_GROUPS = {1: ("bill", "crown", "eye", "forehead", "head", "nape", "throat"), 2: ("back",), 3: ("belly",), 4: ("breast",),
               5: ("tail",), 6: ("leg",), 7: ("wing",)}
_HEAD_PARTS, _SINGLE_PARTS, _PAIRED_PARTS = (2, 5, 6, 7, 10, 11, 15), ((1, 2), (3, 3), (4, 4), (14, 5)), ((8, 12, 6), (9, 13, 7))


def attribute_part_groups(name: str) -> list[int]:
    """Body parts an attribute's name speaks of, 1 head .. 7 wing, by substring (several may match)."""
    return [group for group, words in PART_GROUPS.items() if any(word in name for word in words)]


def differing_part_groups(attributes_a: Sequence[float], attributes_b: Sequence[float], names: Sequence[str]) -> list[int]:
    """Parts in which two classes differ: attributes in percent, present from 50 on; ascending."""
    if not len(attributes_a) == len(attributes_b) == len(names):
        raise ValueError(f"attributes_a, attributes_b and names must have one length, not {len(attributes_a)}, {len(attributes_b)}, {len(names)}")
    differ = (np.asarray(attributes_a) >= 50) != (np.asarray(attributes_b) >= 50)
    return sorted({group for name, d in zip(names, differ) if d for group in attribute_part_groups(name)})


def merge_cub_parts(part_xyv: Any, width: int, height: int, size: int = 224) -> tuple[Tensor, Tensor]:
    """The 15 annotated parts (15, 3) x, y, visible as points (P, 2) x, y in a size x size image and part groups (P,).

    The visible parts of the head become one point, their mean; legs and wings may be two points each.
    """
    parts = np.asarray(part_xyv, dtype=np.float64)
    if parts.shape != (15, 3):
        raise ValueError(f"part_xyv must be (15, 3), not {parts.shape}")
    place, seen = parts[:, :2] * (size / width, size / height), parts[:, 2] > 0
    points, ids = [], []
    head = [p - 1 for p in _HEAD_PARTS if seen[p - 1]]
    if head:
        points.append(place[head].mean(0)), ids.append(1)
    for part, group in (*_SINGLE_PARTS, *((p, g) for a, b, g in _PAIRED_PARTS for p in (a, b))):
        if seen[part - 1]:
            points.append(place[part - 1]), ids.append(group)
    return torch.from_numpy(np.array(points).reshape(-1, 2).astype(np.int64)), torch.tensor(ids, dtype=torch.int64)


def part_label_map(points: Tensor, point_ids: Tensor, size: int = 224) -> Tensor:
    """(size, size) int64: the group of the nearest point (the first of equally near ones); row = y, column = x."""
    if not len(points):
        raise ValueError("points is empty: no part is visible")
    line = torch.arange(size)
    distance = (line - points[:, :1]).square().unsqueeze(1) + (line - points[:, 1:]).square().unsqueeze(2)
    nearest = (distance == distance.amin(0)).to(torch.uint8).argmax(0)      # argmax of 0/1: the first
    return point_ids[nearest]


def cue_mask(part_labels: Tensor, segmentation: Any, differing_ids: Sequence[int]) -> Tensor:
    """(size, size) bool: the pixels of the bird that belong to the differing parts. segmentation: uint8 (h, w)."""
    size = part_labels.shape[1], part_labels.shape[0]
    picture = segmentation if isinstance(segmentation, Image.Image) else Image.fromarray(np.asarray(segmentation, dtype=np.uint8))
    bird = torch.from_numpy(np.array(picture.convert("L").resize(size, Image.BICUBIC))) > 0
    return torch.isin(part_labels, torch.tensor(list(differing_ids), dtype=torch.int64)) & bird


# ---------------------------------------------------------------- remove and classify (section 5.2)

def erase_masks(maps: Tensor, fractions: Sequence[float], order: str = "most") -> Tensor:
    """(F, B, H, W) bool, False on the int(k H W) most (or "least") attributed pixels; ties by flat index."""
    if maps.ndim != 3:
        raise ValueError(f"maps must be (B, H, W), not {tuple(maps.shape)}")
    if order not in ("most", "least"):
        raise ValueError(f"order must be 'most' or 'least', not {order!r}")
    if not all(0 <= k <= 1 for k in fractions):
        raise ValueError(f"fractions must be in [0, 1], not {list(fractions)}")
    sequence = maps.flatten(1).argsort(dim=1, descending=order == "most", stable=True)
    rank = torch.empty_like(sequence).scatter_(1, sequence, torch.arange(sequence.shape[1], device=maps.device).expand_as(sequence))
    return torch.stack([(rank >= int(k * rank.shape[1])).view_as(maps) for k in fractions])


def fill_baseline(images: Tensor, fill: str) -> Tensor:
    """What erased pixels show: "zero", "mean" (per image and channel) or "blur" (31 x 31 Gaussian, sigma 15, reflected)."""
    if fill == "zero":
        return torch.zeros_like(images)
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    if fill != "blur":
        raise ValueError(f"fill must be 'zero', 'mean' or 'blur', not {fill!r}")
    if min(images.shape[2:]) < 16:
        raise ValueError(f"fill 'blur' needs images of at least 16 pixels, not {tuple(images.shape[2:])}")
    line = torch.exp(-(torch.arange(31, device=images.device, dtype=images.dtype) - 15).square() / (2 * 15**2))
    line = (line / line.sum()).expand(images.shape[1], 1, 1, -1)
    out = F.pad(images, (15, 15, 15, 15), mode="reflect")
    out = F.conv2d(out, line, groups=images.shape[1])
    return F.conv2d(out, line.transpose(2, 3), groups=images.shape[1])


@torch.no_grad()
def remove_and_classify(model: nn.Module, loader: Iterable, map_fn: Callable[[Tensor, Tensor], Tensor], fractions: Sequence[float],
                        fill: str = "zero", generator: torch.Generator | None = None, random_masks: Tensor | None = None) -> dict:
    """Accuracy after erasing the most attributed pixels, against erasing as many random ones (lower ratio: better map).

    loader: (images, labels); map_fn(images, labels) -> (B, h, w), resized to the images. random_masks (F, N, H, W)
    bool, True = keep, in the loader's order; drawn from `generator` if None. Returns {"fractions", "accuracy" (float),
    "accuracy_erased", "accuracy_random", "ratio" (F,) float64}; the ratio is NaN, with a warning, where no randomly
    erased image is recognised.
    """
    counts, whole, total = torch.zeros(2, len(fractions), dtype=torch.float64), 0, 0
    def right(images: Tensor, labels: Tensor) -> Tensor:
        result = model(images)
        return (result if isinstance(result, Tensor) else result.probs()).argmax(1) == labels
    was_training = model.training
    model.eval()
    for images, labels in loader:
        size = images.shape[2:]
        with torch.enable_grad():                             # gradient maps need it
            maps = map_fn(images, labels)
        keep = erase_masks(resize_map(maps.detach().float(), tuple(size)), fractions)
        if random_masks is None:
            noise = torch.rand(len(images), *size, generator=generator, device=generator.device if generator is not None else images.device)
            chance = erase_masks(noise.to(images.device), fractions)
        else:
            chance = random_masks[:, total:total + len(images)].to(images.device)
        base = fill_baseline(images, fill)
        whole += int(right(images, labels).sum())
        for row, masks in enumerate((keep, chance)):          # all fractions of a batch in one forward pass
            erased = torch.where(masks.unsqueeze(2), images, base).flatten(0, 1)
            counts[row] += right(erased, labels.repeat(len(fractions))).view(len(fractions), -1).sum(1).cpu()
        total += len(images)
    model.train(was_training)
    if (counts[1] == 0).any():
        warnings.warn("no randomly erased image is recognised at some fraction: the ratio there is NaN", stacklevel=2)
    ratio = torch.where(counts[1] > 0, counts[0] / counts[1], math.nan)
    return {"fractions": list(fractions), "accuracy": whole / max(total, 1), "accuracy_erased": counts[0] / max(total, 1),
            "accuracy_random": counts[1] / max(total, 1), "ratio": ratio}


# ---------------------------------------------------------------- training (section 5, implementation details)

def param_groups(model: CALM, lr: float, head_ratio: float = 10.0) -> list[dict]:
    """The backbone before `layer4` at `lr`; layer4 (if there is one) and the head at lr * head_ratio."""
    base = [p for name, p in model.backbone.named_parameters() if name.split(".")[0] != "layer4"]
    chosen = {id(p) for p in base}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": base, "lr": lr}, {"params": rest, "lr": lr * head_ratio}]


def train(model: CALM, loader: Iterable, epochs: int, *, method: str = "em", lr: float = 0.01, head_ratio: float = 10.0,
          momentum: float = 0.9, weight_decay: float = 1e-4, lr_decay_epochs: int = 30, lr_decay: float = 0.1,
          device: torch.device | str | None = None, amp_dtype: torch.dtype | None = None,
          resume: dict | None = None) -> Iterator[dict]:
    """SGD with Nesterov momentum; the rate is multiplied by `lr_decay` before every epoch (from 1) divisible by
    `lr_decay_epochs`. Yields {"step", "epoch", "loss", "accuracy", "lr", "posterior_entropy", "prior_entropy"}.

    loader: re-iterable of (images, labels). accuracy in [0, 1] and entropies (nats, NaN for CAM) are the batch's before
    its update. `steps.send("state")` returns a snapshot; `resume=snapshot` goes on from it.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device)
    optimizer = torch.optim.SGD(param_groups(model, lr, head_ratio), lr=lr, momentum=momentum, nesterov=momentum > 0,
                                weight_decay=weight_decay)
    first, skip, step = 0, 0, 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        first, skip, step = resume["epoch"], resume["batch"], resume["step"]
    for epoch in range(first, epochs):
        factor = lr_decay ** sum((e + 1) % lr_decay_epochs == 0 for e in range(epoch + 1))
        for group, base in zip(optimizer.param_groups, (lr, lr * head_ratio)):
            group["lr"] = base * factor
        seekable = hasattr(loader, "set_epoch")
        if seekable:
            loader.set_epoch(epoch, skip)
        model.train()
        for batch, (images, labels, *_) in enumerate(loader, skip if seekable else 0):
            if batch < skip:
                continue
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                output = model(images)
            loss = calm_loss(output, labels, method)
            with torch.no_grad():
                row = {"step": step, "epoch": epoch, "loss": loss.item(), "lr": lr * factor,
                       "accuracy": (output.probs().argmax(1) == labels).float().mean().item()}
                for name in ("posterior", "prior"):
                    p = None if method == "cam" else output.prior() if name == "prior" else output.posterior(labels)
                    row[f"{name}_entropy"] = math.nan if p is None else torch.special.entr(p).sum((1, 2)).mean().item()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if (yield row) == "state":
                yield {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "batch": batch + 1, "step": step}
        skip = 0


# ---------------------------------------------------------------- demonstration

def _demonstrate() -> None:
    """One class query on every image: a map with a unit finds the images that hold the class, a rescaled one does not."""
    generator = torch.Generator().manual_seed(0)
    glyphs = torch.rand(4, 7, 7, generator=generator) < 0.5

    def scenes(count: int) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = 0.3 * torch.randn(count, 3, 16, 16, generator=generator), torch.randint(4, (count,), generator=generator)
        boxes = torch.zeros(count, 16, 16, dtype=torch.bool)
        for n, (y, x) in enumerate(torch.randint(0, 10, (count, 2), generator=generator).tolist()):
            images[n, :, y:y + 7, x:x + 7] += 1.5 * glyphs[labels[n]]
            boxes[n, y:y + 7, x:x + 7] = True
        return images, labels, boxes

    images, labels, _ = scenes(1024)
    test, test_labels, boxes = scenes(200)
    print("accuracy, and pixel AP (%) of the map of one class over ALL test images (mean of 4 classes):")
    for head, kinds in ((CAMHead(32, 4), ("max per image", "raw")), (CALMHead(32, 4), ("joint",))):
        backbone = nn.Sequential(nn.Conv2d(3, 32, 7, padding=3, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        for parameter in (*backbone.parameters(), *head.parameters()):
            if parameter.ndim > 1:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        model = CALM(backbone, head)
        batches = list(zip(images.split(32), labels.split(32)))
        for step in train(model, batches, 4, method="cam" if isinstance(head, CAMHead) else "em", lr=0.05, head_ratio=2):
            pass
        model.eval()
        output = model(test)
        accuracy = (output.probs().argmax(1) == test_labels).float().mean()
        for kind in kinds:
            ap = 0.0
            for query in range(4):
                maps = attribution_map(output, query, "joint" if kind == "joint" else "cam").detach()
                maps = normalize_map(maps, "max") if kind == "max per image" else maps
                maps = (maps - maps.min()) / (maps.max() - maps.min())          # one scale for all images
                metric = PixelAP(thresholds=None)
                metric.update(maps, (boxes & (test_labels == query).view(-1, 1, 1)).long())
                ap += metric.compute()["ap"] / 4
            print(f"  {type(head).__name__:9s} {kind:14s} accuracy {accuracy:.2f}   AP {ap:5.1f}")


if __name__ == "__main__":
    _demonstrate()
