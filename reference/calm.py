"""CALM: class activation latent mapping, attribution that is part of the classifier.

Paper: "Keep CALM and Improve Visual Feature Attribution", J. M. Kim, J. Choe, Z. Akata, S. J. Oh,
ICCV 2021, arXiv:2106.07861.

A class activation map is rescaled per image after training: its values have no unit. CALM makes the
location of the recognition cue a latent variable z of the classifier, so that the map is a
probability of the trained model. With location logits f_yz and attention u_z (two 1x1 convolutions
on the last feature map), and a = softplus(u):

    g_yz = p(y | x, z) = softmax_y f_yz,    h_z = p(z | x) = a_z / sum_l a_l
    p(y, z | x) = g_yz h_z             joint map: "the cue is at z and the class is y"
    p(y | x)    = sum_z g_yz h_z       the prediction: the joint map adds up to it
    p(z | x, y) = g_yz h_z / p(y | x)  posterior map: "where is the cue if the class is y"
    p(A, z | x) - p(B, z | x)          counterfactual map: "A but not B"

    marginal likelihood   L_ML = -log sum_z g_yz h_z
    EM                    L_EM = -sum_z q_z (log g_yz + log h_z),   q = p(z | x, y) held fixed

If q (the E-step) comes from the present parameters, both losses have the SAME gradient (Fisher's
identity): L_EM = L_ML + H(q), and for both d L / d f_cz = q_z (g_cz - [c = y]) and
d L / d log a_z = h_z - q_z. EM becomes another algorithm only when the E-step is another one: of an
averaged or older model (`ema` of `train`, `posterior` of `calm_loss`), hard, or with a temperature.

`CALMHead.official` is the released code: ReLU attention and a normaliser without gradient (which
lets u grow for ever: sum_z u_z dL/du_z = -1 for every image); the default is the paper's softplus
with the true gradient.

    model = CALM(backbone, CALMHead(2048, num_classes))       # backbone(x): (B, 2048, H, W)
    for step in train(model, loader, epochs=40): ...
    maps = attribution_map(model(images), labels)             # (B, H, W), probabilities
    maps = counterfactual_map(model(images), a, b)            # signed

Baselines and measures for comparing maps (pixel AP, remove-and-classify) are in `attribution.py`;
the last two sections here serve the paper's bird benchmark and groups of classes from WordNet.

>>> output = CALMHead(4, 3)(torch.rand(2, 4, 5, 5))
>>> bool(torch.allclose(attribution_map(output, 1).sum((1, 2)), output.probs()[:, 1]))
True
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

PRIORS, METHODS = ("softplus", "relu", "exp"), ("em", "ml", "cam")
TINY = 1e-8                                                   # of the released code's log prior
BLOCK = 2**22                                                 # values in one block of a logsumexp


# ---------------------------------------------------------------- the head

class _LogSoftmaxAt(torch.autograd.Function):
    """log softmax over classes of (B, C, L), read at classes (B, n): (B, n, L).

    peak, rest (B, 1, L): the largest logit, and the logsumexp of the logits less it (their sum has
    few digits left for logits of 1e4). Backward writes one gradient: there is no third (B, C, L)
    tensor, which is 200 MB for 64 images, 1000 classes and 28 x 28 locations.
    """

    @staticmethod
    def forward(logits: Tensor, peak: Tensor, rest: Tensor, classes: Tensor) -> Tensor:
        index = classes.unsqueeze(2).expand(-1, -1, logits.shape[2])
        return logits.gather(1, index) - peak - rest

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:                # for torch.func
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, peak, rest, classes = ctx.saved_tensors
        index = classes.unsqueeze(2).expand(-1, -1, logits.shape[2])
        total = grad.sum(1, keepdim=True)
        if torch.is_grad_enabled():                           # create_graph: differentiable again
            at = torch.zeros_like(logits).scatter_add(1, index, grad)
            return at - total * logits.softmax(1), None, None, None
        out = torch.sub(logits, peak).exp_().mul_(-total * (-rest).exp())
        return out.scatter_add_(1, index, grad), None, None, None


def _log_softplus(u: Tensor) -> Tensor:
    """log(log(1 + e^u)), u itself far below zero; the inner where keeps NaN out of the gradient."""
    small = u < -15
    return torch.where(small, u, F.softplus(torch.where(small, 0.0, u)).log())


def _class_index(classes: Any, logits: Tensor, name: str = "classes") -> tuple[Tensor, bool]:
    """Classes as (B, n) int64, and whether there was one per image (an int or (B,))."""
    classes = torch.as_tensor(classes, device=logits.device)
    count, last = len(logits), logits.shape[1] - 1
    if classes.dtype.is_floating_point or classes.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, not {classes.dtype}")
    classes = classes.long().expand(count) if classes.ndim == 0 else classes.long()
    if classes.ndim > 2 or len(classes) != count:
        raise ValueError(f"{name} must be an int, ({count},) or ({count}, n), "
                         f"not {tuple(classes.shape)}")
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) <= last:
        raise ValueError(f"{name} must be in 0..{last}, "
                         f"found {int(classes.min())}..{int(classes.max())}")
    return classes.reshape(count, *classes.shape[1:] or (1,)), classes.ndim == 1


@dataclass(eq=False)                                          # DDP finds the tensors in one
class CALMOutput:
    """What a CALM head says of a batch, computed on demand, in logarithms and in float32 or better.

    logits (B, C, H, W): location logits f. attention (B, 1, H, W): u. Arguments `classes`: an int,
    (B,) or (B, n). An image without positive ReLU attention has a uniform prior. With `epsilons`
    (the released code) the ReLU prior has exact zeros, `log_prior` and `log_joint` add 1e-8 where
    h < 1e-8, and the posterior's denominator is p(y | x) + 1e-10.
    """

    logits: Tensor
    attention: Tensor
    prior_activation: str = "softplus"
    detach_normalizer: bool = False
    epsilons: bool = False

    def __post_init__(self) -> None:
        _check_choice("prior_activation", self.prior_activation, PRIORS)
        logits, attention = self.logits, self.attention
        if logits.ndim != 4 or attention.shape != (len(logits), 1, *logits.shape[2:]):
            raise ValueError(f"logits must be (B, C, H, W) and attention (B, 1, H, W), "
                             f"not {tuple(logits.shape)} and {tuple(attention.shape)}")
        precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self._f = logits.to(precise).flatten(2)                                   # (B, C, L)
        self._u = attention.to(precise).flatten(1)                                # (B, L)

    @cached_property
    @torch.inference_mode(False)                              # kept: a loss may need it later
    def _norm(self) -> tuple[Tensor, Tensor]:
        """`peak` and `rest` of _LogSoftmaxAt, without gradient, in blocks of bounded memory."""
        f = self._f.detach()
        peak, images = f.amax(1, keepdim=True), max(1, BLOCK // max(1, f[:1].numel()))
        return peak, torch.cat([(part - top).exp_().sum(1, keepdim=True).log_()
                                for part, top in zip(f.split(images), peak.split(images))])

    def _log_h(self) -> Tensor:
        """log p(z | x), (B, L); -inf where the released code's prior is zero."""
        if self.prior_activation == "relu":
            a = self._u.relu()
            a = torch.where((a > 0).any(1, keepdim=True), a, 1.0)                 # dead: uniform
            if not self.epsilons:
                a = a + TINY * a.detach().sum(1, keepdim=True)
            alive = a > 0
            log_a = torch.where(alive, torch.where(alive, a, 1.0).log(), -math.inf)
        else:
            log_a = self._u if self.prior_activation == "exp" else _log_softplus(self._u)
        log_a = log_a - log_a.detach().amax(1, keepdim=True)  # -1e4 + 0.1 has few digits left
        norm = log_a.logsumexp(1, keepdim=True)
        return log_a - (norm.detach() if self.detach_normalizer else norm)

    def _log_h_safe(self) -> Tensor:
        """`_log_h` with the released code's epsilon in place of -inf."""
        if not self.epsilons:
            return self._log_h()
        h = self._log_h().exp()
        return torch.where(h < TINY, h + TINY, h).log()

    def _with_prior(self, classes: Any, log_h: Tensor) -> Tensor:
        """log g + log h at `classes` (None: all), in the shapes of `log_joint`."""
        if classes is None:
            log_g, single = self._f.log_softmax(1), False
        else:
            index, single = _class_index(classes, self.logits)
            log_g = _LogSoftmaxAt.apply(self._f, *self._norm, index)
        out = (log_g + log_h.unsqueeze(1)).unflatten(-1, self.logits.shape[2:])
        return out[:, 0] if single else out

    def log_prior(self) -> Tensor:
        """log p(z | x), (B, H, W)."""
        return self._log_h_safe().unflatten(-1, self.logits.shape[2:])

    def prior(self) -> Tensor:
        """p(z | x), (B, H, W); sums to 1."""
        return self._log_h().exp().unflatten(-1, self.logits.shape[2:])

    def log_joint(self, classes: Any = None) -> Tensor:
        """log p(y, z | x): (B, C, H, W), (B, n, H, W) for (B, n), (B, H, W) for an int or (B,)."""
        return self._with_prior(classes, self._log_h_safe())

    def joint(self, classes: Any = None) -> Tensor:
        """p(y, z | x), shapes as `log_joint`: over z it sums to p(y | x), over y to the prior."""
        return self._with_prior(classes, self._log_h()).exp()

    def log_probs(self) -> Tensor:
        """log p(y | x), (B, C)."""
        return (self._f.log_softmax(1) + self._log_h().unsqueeze(1)).logsumexp(2)

    def probs(self) -> Tensor:
        """p(y | x), (B, C)."""
        with torch.autocast(self._f.device.type, enabled=False):                  # not in bfloat16
            return torch.einsum("bcl,bl->bc", self._f.softmax(1), self._log_h().exp())

    def posterior(self, classes: Any) -> Tensor:
        """p(z | x, y): (B, H, W) for an int or (B,), (B, n, H, W) for (B, n); sums to 1 over z."""
        log_joint = self._with_prior(classes, self._log_h())
        if self.epsilons:
            joint = log_joint.exp()
            return joint / (joint.sum((-2, -1), keepdim=True) + 1e-10)
        return log_joint.flatten(-2).softmax(-1).view_as(log_joint)


@dataclass(eq=False)
class CAMOutput:
    """Location logits (B, C, H, W) of the pooled classifier: its CAMs, with the bias."""

    logits: Tensor

    def __post_init__(self) -> None:
        if self.logits.ndim != 4:
            raise ValueError(f"logits must be (B, C, H, W), not {tuple(self.logits.shape)}")

    def pooled(self) -> Tensor:
        """The classifier's logits (B, C): the mean over locations, in float32 or better."""
        return self.logits.mean((2, 3), dtype=torch.promote_types(self.logits.dtype, torch.float32))

    def log_probs(self) -> Tensor:
        """log p(y | x), (B, C)."""
        return self.pooled().log_softmax(1)

    def probs(self) -> Tensor:
        """p(y | x), (B, C)."""
        return self.pooled().softmax(1)


class CAMHead(nn.Module):
    """The pooled classifier as a 1x1 convolution before the mean: (B, K, H, W) to CAMOutput."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls = _conv1x1(in_channels, num_classes)

    def forward(self, features: Tensor) -> CAMOutput:
        _check_features(features, self.cls)
        return CAMOutput(self.cls(features))


class CALMHead(nn.Module):
    """Features (B, K, H, W) to CALMOutput.

    prior_activation: "softplus" (paper), "relu" or "exp" (a softmax over locations).
    detach_normalizer: no gradient through sum_l a_l, as in the released code.
    """

    def __init__(self, in_channels: int, num_classes: int, prior_activation: str = "softplus",
                 detach_normalizer: bool = False) -> None:
        super().__init__()
        _check_choice("prior_activation", prior_activation, PRIORS)
        self.cls, self.att = _conv1x1(in_channels, num_classes), _conv1x1(in_channels, 1)
        self.prior_activation, self.detach_normalizer = prior_activation, detach_normalizer
        self.epsilons = False

    @classmethod
    def official(cls, in_channels: int, num_classes: int) -> CALMHead:
        """The released code's head: ReLU attention, detached normaliser, its epsilons."""
        head = cls(in_channels, num_classes, "relu", detach_normalizer=True)
        head.epsilons = True
        return head

    def forward(self, features: Tensor) -> CALMOutput:
        _check_features(features, self.cls)
        if _plain(self.cls) and _plain(self.att):             # as one convolution
            weight = torch.cat([self.cls.weight, self.att.weight])
            bias = torch.cat([self.cls.bias, self.att.bias])
            stacked = F.conv2d(features, weight, bias)
            logits, attention = stacked.split([self.cls.out_channels, 1], 1)
        else:
            logits, attention = self.cls(features), self.att(features)
        return CALMOutput(logits, attention, self.prior_activation, self.detach_normalizer,
                          self.epsilons)


class CALM(nn.Module):
    """A backbone whose result is its last feature map (B, K, H, W), and a head on it."""

    def __init__(self, backbone: nn.Module, head: CALMHead | CAMHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> CALMOutput | CAMOutput:
        return self.head(self.backbone(x))


def _conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    if in_channels < 1 or out_channels < 1:
        raise ValueError(f"in_channels and num_classes must be positive, "
                         f"not {in_channels} and {out_channels}")
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _plain(layer: nn.Module) -> bool:
    """Whether nobody replaced the convolution, changes its weights or watches it."""
    return (type(layer) is nn.Conv2d and layer.bias is not None
            and not (layer._forward_hooks or layer._forward_pre_hooks))


def _check_features(features: Tensor, conv: nn.Module) -> None:
    channels = getattr(conv, "in_channels", None)             # not of an adapter around it
    if features.ndim != 4 or channels not in (None, features.shape[1]):
        raise ValueError(f"features must be (B, {channels or 'K'}, H, W), "
                         f"not {tuple(features.shape)}")


def _check_output(output: Any) -> None:
    if not isinstance(output, (CALMOutput, CAMOutput)):
        raise TypeError(f"output must be a CALMOutput or CAMOutput, not {type(output).__name__}")


def _check_finite(name: str, values: Tensor, output: CALMOutput | CAMOutput) -> None:
    """ValueError for NaN and infinity, also those that leave no trace in `values`."""
    parts = [t.detach() for t in (values, output.logits, getattr(output, "attention", values))]
    if not torch.isfinite(sum(part.sum() for part in parts)):  # a finite sum has finite terms
        if not all(torch.isfinite(part).all() for part in parts):
            raise ValueError(f"not finite: {name}, the logits, the attention or a given posterior")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


# ---------------------------------------------------------------- losses

def calm_loss(output: CALMOutput | CAMOutput, labels: Tensor, method: str = "em",
              posterior: Tensor | None = None, hard: bool = False, temperature: float = 1.0,
              reduction: str = "mean") -> Tensor:
    """EM or marginal-likelihood loss of CALM, or the cross entropy of a CAM output ("cam").

    labels (B,) int64. The E-step q of "em", always without gradient: `posterior` (B, H, W) from
    elsewhere (an older or averaged model), or the output's own, proportional to
    p(y, z | x)^(1 / temperature). hard: q becomes one-hot at its (first) maximum.
    reduction "mean", "sum" or "none".

    ValueError: unknown method or reduction, an output that does not fit the method, labels outside
    the classes, a loss that is not finite. TypeError: labels that are not int64.
    """
    _check_choice("method", method, METHODS)
    _check_choice("reduction", reduction, ("mean", "sum", "none"))
    _check_output(output)
    if (method == "cam") != isinstance(output, CAMOutput):
        raise ValueError(f"method {method!r} does not go with {type(output).__name__}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, not {getattr(labels, 'dtype', labels)}")
    if labels.shape != output.logits.shape[:1]:
        raise ValueError(f"labels must be ({len(output.logits)},), not {tuple(labels.shape)}")
    _class_index(labels, output.logits, "labels")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if method == "cam":
        losses = F.cross_entropy(output.pooled(), labels, reduction="none")
    elif method == "ml":
        losses = -output._with_prior(labels, output._log_h()).flatten(1).logsumexp(1)
    else:
        log_joint = output.log_joint(labels).flatten(1)
        if posterior is not None:
            expected = tuple(output.attention[:, 0].shape)
            if posterior.shape != expected or (posterior < 0).any():
                raise ValueError(f"posterior must be {expected} and not negative, "
                                 f"not {tuple(posterior.shape)}")
            q = posterior.detach().flatten(1)
        elif output.epsilons and temperature == 1:
            q = output.posterior(labels).detach().flatten(1)
        else:
            q = (log_joint.detach() / temperature).softmax(1)
        if hard:
            q = F.one_hot(q.argmax(1), q.shape[1]).to(q.dtype)
        losses = -(q * log_joint).sum(1)
    _check_finite("the loss", losses, output)
    return {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduction]()


# ---------------------------------------------------------------- maps

def attribution_map(output: CALMOutput | CAMOutput, classes: Any, kind: str = "joint") -> Tensor:
    """(B, H, W) for classes int or (B,), (B, n, H, W) for (B, n); "prior" ignores the classes.

    "joint" p(y, z | x), "posterior" p(z | x, y), "prior" p(z | x): probabilities of the model, not
    rescaled. "cam": the location logits of the class. ValueError: a kind that is unknown or that
    the output does not have, classes out of range, a map that is not finite.
    """
    _check_output(output)
    _check_choice("kind", kind, ("joint", "posterior", "prior", "cam"))
    if classes is None and kind != "prior":
        raise TypeError(f"classes must be given for kind {kind!r}")
    if kind == "cam":
        index, single = _class_index(classes, output.logits)
        maps = output.logits.take_along_dim(index[:, :, None, None], 1)
        maps = maps[:, 0] if single else maps
    elif isinstance(output, CAMOutput):
        raise ValueError(f"kind {kind!r} needs the output of a CALM head; CAM has only 'cam'")
    else:
        maps = output.prior() if kind == "prior" else getattr(output, kind)(classes)
    _check_finite(f"the {kind} map", maps, output)
    return maps


def counterfactual_map(output: CALMOutput | CAMOutput, a: Any, b: Any, kind: str = "joint",
                       mode: str = "signed") -> Tensor:
    """Map of class a minus map of class b, (B, H, W): "signed", its "positive" part, or "abs".

    Subtract first and rescale later, if at all: maps that were normalised one by one have no common
    unit, and their difference says nothing.
    """
    _check_choice("mode", mode, ("signed", "positive", "abs"))
    difference = attribution_map(output, a, kind) - attribution_map(output, b, kind)
    return {"signed": difference.clone, "positive": difference.relu, "abs": difference.abs}[mode]()


def superclass_map(output: CALMOutput | CAMOutput, groups: Any, kind: str = "joint",
                   reduce: str = "sum", labels: Tensor | None = None) -> Tensor:
    """The maps of a group of classes together, (B, H, W).

    groups: one list of classes per image, (B, n) int64, or a dict label -> classes with `labels`
    (B,). kind "joint" (a probability: the class is one of the group), "posterior" (a sum of
    posteriors) or "cam" (each map min-max-normalised first). reduce "sum" or "mean".
    """
    _check_output(output)
    _check_choice("kind", kind, ("joint", "posterior", "cam"))
    _check_choice("reduce", reduce, ("sum", "mean"))
    if isinstance(groups, dict):
        if labels is None:
            raise ValueError("groups as a dict needs labels")
        keys = torch.as_tensor(labels).tolist()
        if missing := sorted(set(keys) - groups.keys()):
            raise ValueError(f"groups has no entry for label {missing[0]}")
        groups = [groups[key] for key in keys]
    groups = groups.tolist() if isinstance(groups, Tensor) else [list(group) for group in groups]
    if len(groups) != len(output.logits) or not all(isinstance(g, list) and g for g in groups):
        raise ValueError(f"groups must hold a non-empty list of classes for each of the "
                         f"{len(output.logits)} images")
    width, device = max(map(len, groups), default=0), output.logits.device
    index = torch.tensor([g + g[:1] * (width - len(g)) for g in groups], device=device)
    used = torch.tensor([[n < len(g) for n in range(width)] for g in groups], device=device)
    maps = attribution_map(output, index, kind)
    if kind == "cam":
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        maps = torch.where(high > low, (maps - low) / (high - low), 0.0)
    total = (maps * used[:, :, None, None]).sum(1)
    return total if reduce == "sum" else total / used.sum(1)[:, None, None]


# ---------------------------------------------------------------- training

def param_groups(model: CALM, lr: float, head_ratio: float = 10.0) -> list[dict]:
    """The backbone before `layer4` at `lr`; layer4 (if there is one) and head at lr * head_ratio.

    The released code finds these by parts of names, which also puts the stem's batch norm into the
    faster group and layer4's first convolutions into the slower one; here layer4 is one group.
    """
    if not lr >= 0 or not head_ratio >= 0:
        raise ValueError(f"lr and head_ratio must not be negative, not {lr} and {head_ratio}")
    base = [p for name, p in model.backbone.named_parameters() if name.split(".")[0] != "layer4"]
    chosen = {id(p) for p in base}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": base, "lr": lr}, {"params": rest, "lr": lr * head_ratio}]


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


def train(model: CALM, loader: Iterable, epochs: int, *, method: str = "em", lr: float = 0.01,
          head_ratio: float = 10.0, momentum: float = 0.9, weight_decay: float = 1e-4,
          lr_decay_epochs: int = 30, lr_decay: float = 0.1,
          device: torch.device | str | None = None, ema: float = 0.0, hard: bool = False,
          amp_dtype: torch.dtype | None = None, resume: dict | None = None) -> Iterator[dict]:
    """SGD with Nesterov momentum; the rate is multiplied by `lr_decay` before every epoch (counted
    from 1) that `lr_decay_epochs` divides. Yields a dict per step: "step", "epoch", "loss", "lr",
    and "accuracy" in [0, 1], "posterior_entropy" and "prior_entropy" (nats, NaN for CAM) of the
    batch before its update.

    loader: re-iterable of (images, labels). ema > 0: the E-step of "em" comes from an exponential
    moving average of the model with this decay per step; hard: it is one-hot. Both make EM differ
    from ML. amp_dtype: bfloat16 for backbone and head; the loss stays float32.
    `steps.send("state")` returns a snapshot; `resume=snapshot` goes on from it, exactly.
    """
    if not 0 <= ema < 1 or ((ema or hard) and method != "em"):
        raise ValueError(f"ema must be in [0, 1) and, like hard, goes with method 'em'; "
                         f"got ema={ema}, hard={hard}, method={method!r}")
    if epochs < 0 or lr_decay_epochs < 1:
        raise ValueError(f"epochs must be at least 0 and lr_decay_epochs at least 1, "
                         f"not {epochs} and {lr_decay_epochs}")
    if amp_dtype not in (None, torch.bfloat16):
        raise ValueError(f"amp_dtype must be None or torch.bfloat16, not {amp_dtype}")
    bare = getattr(model, "module", model)                    # inside DistributedDataParallel
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device)
    teacher = copy.deepcopy(bare).requires_grad_(False).train() if ema else None
    optimizer = torch.optim.SGD(param_groups(bare, lr, head_ratio), lr=lr, momentum=momentum,
                                nesterov=momentum > 0, weight_decay=weight_decay)
    first, skip, step = 0, 0, 0
    if resume is not None:
        bare.load_state_dict(resume["model"])
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))  # it keeps what it is given
        if teacher is not None:
            teacher.load_state_dict(resume["teacher"])
        first, skip, step = resume["epoch"], resume["batch"], resume["step"]
    for epoch in range(first, epochs):
        factor = lr_decay ** ((epoch + 1) // lr_decay_epochs)
        for group, base in zip(optimizer.param_groups, (lr, lr * head_ratio)):
            group["lr"] = base * factor
        states = resume["order"] if skip else None
        batches, order, began = _epoch(loader, epoch, skip, states)
        batch, skip = skip - 1, 0                             # the last one done
        for batch, (images, labels, *_) in batches:
            model.train()                                     # the caller may evaluate in between
            images, labels = images.to(device), labels.to(device)
            q = None
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                output = model(images)
                if teacher is not None:
                    with torch.no_grad():
                        q = teacher(images).posterior(labels)
            loss = calm_loss(output, labels, method, q, hard)
            row = {"step": step, "epoch": epoch, "lr": lr * factor}
            row |= _statistics(output, labels, loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if teacher is not None:
                for old, new in zip(teacher.state_dict().values(), bare.state_dict().values()):
                    old.lerp_(new, 1 - ema) if old.is_floating_point() else old.copy_(new)
            step += 1
            request = yield row
            while request == "state":
                request = yield copy.deepcopy({
                    "model": bare.state_dict(), "optimizer": optimizer.state_dict(),
                    "teacher": teacher.state_dict() if teacher is not None else {},
                    "order": [began, order.get_state()],
                    "epoch": epoch, "batch": batch + 1, "step": step})
        if batch < 0:
            raise ValueError(f"loader gave no batch in epoch {epoch}: it must start anew each time")


@torch.no_grad()
def _statistics(output: CALMOutput | CAMOutput, labels: Tensor, loss: Tensor) -> dict[str, float]:
    """The batch's figures, fetched from the device in one transfer."""
    values = [loss, (output.probs().argmax(1) == labels).float().mean()]
    if isinstance(output, CAMOutput):
        values += [torch.full_like(loss, math.nan)] * 2
    else:
        values += [torch.special.entr(p).sum((1, 2)).mean()
                   for p in (output.posterior(labels), output.prior())]
    names = ("loss", "accuracy", "posterior_entropy", "prior_entropy")
    return dict(zip(names, torch.stack([v.detach().double() for v in values]).tolist()))


# ---------------------------------------------------------------- cue localisation on birds

PART_GROUPS = {
    1: ("bill", "crown", "eye", "forehead", "head", "nape", "throat"), 2: ("back",), 3: ("belly",),
    4: ("breast",), 5: ("tail",), 6: ("leg",), 7: ("wing",)}
# Annotated parts of CUB, ids from 1, and their groups in the order that decides ties of distance.
_HEAD_PARTS = (2, 5, 6, 7, 10, 11, 15)
_OTHER_PARTS = ((1, 2), (3, 3), (4, 4), (14, 5), (8, 6), (12, 6), (9, 7), (13, 7))


def attribute_part_groups(name: str) -> list[int]:
    """Body parts an attribute's name speaks of, 1 head .. 7 wing: substrings, several may match."""
    return [group for group, words in PART_GROUPS.items() if any(word in name for word in words)]


def differing_part_groups(attributes_a: Sequence[float], attributes_b: Sequence[float],
                          names: Sequence[str]) -> list[int]:
    """Parts in which two classes differ: attributes in percent, present from 50 on; ascending."""
    if not len(attributes_a) == len(attributes_b) == len(names):
        raise ValueError(f"attributes_a, attributes_b and names must have one length, not "
                         f"{len(attributes_a)}, {len(attributes_b)}, {len(names)}")
    differ = (np.asarray(attributes_a) >= 50) != (np.asarray(attributes_b) >= 50)
    groups = [attribute_part_groups(name) for name, d in zip(names, differ) if d]
    return sorted({group for some in groups for group in some})


def merge_cub_parts(part_xyv: Any, width: int, height: int,
                    size: int = 224) -> tuple[Tensor, Tensor]:
    """Points (P, 2) int64 x, y in a size x size image, and their part groups (P,) int64.

    part_xyv (15, 3): x, y, visible of the annotated parts in a width x height image. The visible
    parts of the head become one point, their mean; legs and wings may be two points each.
    """
    parts = np.asarray(part_xyv, dtype=np.float64)
    if parts.shape != (15, 3) or not np.isfinite(parts[parts[:, 2] > 0]).all():
        raise ValueError(f"part_xyv must be (15, 3), finite where visible, not {part_xyv}")
    if min(width, height, size) < 1:
        raise ValueError(f"width, height and size must be positive, not {width}, {height}, {size}")
    place, seen = parts[:, :2] * (size / width, size / height), parts[:, 2] > 0
    merged = [(place[part - 1], group) for part, group in _OTHER_PARTS if seen[part - 1]]
    if head := [part - 1 for part in _HEAD_PARTS if seen[part - 1]]:
        merged.insert(0, (place[head].mean(0), 1))
    points = np.array([point for point, _ in merged]).reshape(-1, 2).astype(np.int64)  # truncates
    return torch.from_numpy(points), torch.tensor([group for _, group in merged]).long()


def part_label_map(points: Tensor, point_ids: Tensor, size: int = 224) -> Tensor:
    """(size, size) int64: the group of the nearest point (the first of equally near ones).

    Rows are y, columns x. ValueError without points: such an image is skipped.
    """
    if not len(points) or points.shape != (len(point_ids), 2) or size < 1:
        raise ValueError(f"points must be (P, 2), not empty, point_ids as many and size positive, "
                         f"not {tuple(points.shape)}, {len(point_ids)} and {size}")
    line = torch.arange(size, device=points.device)
    dx, dy = (line - points[:, :1]).square(), (line - points[:, 1:]).square()
    distance = dx.unsqueeze(1) + dy.unsqueeze(2)
    nearest = (distance == distance.amin(0)).to(torch.uint8).argmax(0)            # the first 1
    return point_ids[nearest]


def cue_mask(part_labels: Tensor, segmentation: Any, differing_ids: Sequence[int]) -> Tensor:
    """(size, size) bool: the pixels of the bird that belong to the differing parts.

    segmentation: uint8 (h, w) or a PIL image of any size; resized bicubically, bird where > 0.
    """
    if not isinstance(segmentation, Image.Image):
        values = np.asarray(segmentation)
        if values.dtype != np.uint8 or values.ndim != 2:
            raise ValueError(f"segmentation must be uint8 (h, w), "
                             f"not {values.dtype} {values.shape}")
        segmentation = Image.fromarray(values)
    size = tuple(part_labels.shape[::-1])
    resized = np.array(segmentation.convert("L").resize(size, Image.Resampling.BICUBIC))
    bird = torch.from_numpy(resized).to(part_labels.device) > 0
    return torch.isin(part_labels, part_labels.new_tensor(list(differing_ids))) & bird


# ---------------------------------------------------------------- superclasses

def wordnet_superclasses(is_a_lines: Iterable[str], class_synsets: Sequence[str],
                         root_or_depth: str | int) -> dict[int, list[int]]:
    """{label: the classes of its superclass, itself included}, the `groups` of `superclass_map`.

    is_a_lines: "parent child" synset ids, as in wordnet.is_a.txt. class_synsets: the synset of each
    label. root_or_depth: a synset (all classes below it are one superclass, any other class stands
    alone), or a depth: classes belong together that share an ancestor (or themselves) at this
    shortest distance from the top; a class above that depth stands alone.

    ValueError: a line that is not two words, a synset that no line names, a negative depth.
    """
    children: dict[str, list[str]] = {}
    inner: set[str] = set()                                   # synsets that have a parent
    for number, line in enumerate(is_a_lines, 1):
        if len(words := line.split()) not in (0, 2):
            raise ValueError(f"is_a_lines: line {number} must be 'parent child', not {line!r}")
        for parent, child in [words] if words else []:
            children.setdefault(parent, []).append(child)
            children.setdefault(child, [])
            inner.add(child)
    by_root = isinstance(root_or_depth, str)
    for synset in (*class_synsets, *([root_or_depth] if by_root else [])):
        if synset not in children:
            raise ValueError(f"no line of is_a_lines names the synset {synset!r}")
    if not by_root and root_or_depth < 0:
        raise ValueError(f"root_or_depth must be a synset or a depth >= 0, not {root_or_depth}")
    level = {root_or_depth} if by_root else children.keys() - inner
    seen = set(level)
    for _ in range(0 if by_root else root_or_depth):
        level = {child for parent in level for child in children[parent]} - seen
        seen |= level
    groups = {label: {label} for label in range(len(class_synsets))}
    for top in level:
        below, stack = {top}, [top]
        while stack:
            fresh = set(children[stack.pop()]) - below
            below |= fresh
            stack.extend(fresh)
        members = {label for label, synset in enumerate(class_synsets) if synset in below}
        for label in members:
            groups[label] |= members
    return {label: sorted(group) for label, group in groups.items()}


# ---------------------------------------------------------------- demonstration

def _demonstrate() -> None:
    """One class query on every image: a map with a unit finds the images that hold the class."""
    generator = torch.Generator().manual_seed(0)
    glyphs = torch.rand(4, 7, 7, generator=generator) < 0.5

    def scenes(count: int) -> tuple[Tensor, Tensor, Tensor]:
        images = 0.3 * torch.randn(count, 3, 16, 16, generator=generator)
        labels = torch.randint(4, (count,), generator=generator)
        boxes = torch.zeros(count, 16, 16, dtype=torch.bool)
        for n, (y, x) in enumerate(torch.randint(0, 10, (count, 2), generator=generator).tolist()):
            images[n, :, y:y + 7, x:x + 7] += 1.5 * glyphs[labels[n]]
            boxes[n, y:y + 7, x:x + 7] = True
        return images, labels, boxes

    batches = list(zip(*(part.split(32) for part in scenes(1024))))
    test, test_labels, boxes = scenes(200)
    print("share of a class's map, over ALL test images, that lies on objects of the class:")
    for head, method, kind in ((CAMHead(32, 4), "cam", "cam"), (CALMHead(32, 4), "em", "joint")):
        backbone = nn.Sequential(nn.Conv2d(3, 32, 7, padding=3), nn.BatchNorm2d(32), nn.ReLU())
        model = CALM(backbone, head)
        for weight in (p for p in model.parameters() if p.ndim > 1):
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
        list(train(model, batches, 4, method=method, lr=0.05, head_ratio=2))
        with torch.no_grad():
            output = model.eval()(test)
        accuracy = (output.probs().argmax(1) == test_labels).float().mean()
        maps = attribution_map(output, torch.arange(4).expand(200, 4), kind).relu()
        truth = boxes.unsqueeze(1) & (test_labels[:, None] == torch.arange(4))[:, :, None, None]
        rescaled = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12)
        for name, shown in (("map / its maximum", rescaled), ("values as they are", maps)):
            share = (shown * truth).sum() / shown.sum()
            print(f"  {method:3s}  accuracy {accuracy:.2f}  {name:20s}{share:.2f}")


if __name__ == "__main__":
    _demonstrate()
