"""Where did the classifier look? The class-activation-map family and the gradient family, batched and without side effects.

Every function takes the model as it is (any mode, any score), images `(B, 3, H, W)` and the classes to explain, and
returns tensors on the same device: signed, not normalised, one map per image and class. Nothing is left behind: no
hook, no `.grad` in a parameter. With A (B, K, h, w) the output of `layer` and G = d score / dA:

    grad_cam      sum_k w_k A_k,  w_k = mean_z G_kz                          Selvaraju et al., arXiv:1610.02391
    grad_cam_pp   w_k = sum_z alpha_kz relu(G_kz),                            Chattopadhay et al., arXiv:1710.11063
                  alpha = G^2 / (2 G^2 + G^3 sum_z A)
    xgrad_cam     w_k = sum_z G_kz A_kz / sum_z A_kz                          Fu et al., arXiv:2008.02312
    layer_cam     sum_k relu(G_k) A_k                                        Jiang et al., TIP 2021
    hires_cam     sum_k G_k A_k                                              Draelos & Carin, arXiv:2011.08891
    score_cam     w = softmax_k(score of the image masked by A_k)            Wang et al., arXiv:1910.01279
    ablation_cam  w_k = (s - s without A_k) / s                              Desai & Ramaswamy, WACV 2020
    input_gradient, smooth_grad (arXiv:1706.03825), smooth_grad_squared, var_grad (arXiv:1810.03307)
    integrated_gradients  (x - x') * integral of the gradient from x' to x   Sundararajan et al., arXiv:1703.01365

`output` says what is explained: "logit" (the score itself), "log_prob" or "prob" (its log-softmax, softmax). Models may
also return an object with the methods pooled(), log_probs() and probs() instead of a (B, C) tensor.

    maps = grad_cam(model, model.layer4, images, labels)              # (B, h, w) for labels (B,)
    maps = grad_cam(model, model.layer4, images, classes)             # (B, n, h, w) for classes (B, n): one forward
    shown = normalize_map(resize_map(maps, 224), "minmax")

>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
>>> grad_cam(model, model[0], torch.ones(2, 3, 8, 8), 1).shape, smooth_grad(model, torch.ones(2, 3, 8, 8), 1).shape
(torch.Size([2, 6, 6]), torch.Size([2, 8, 8]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUTS = ("logit", "log_prob", "prob")
QUADRATURES = ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid")


# ---------------------------------------------------------------- scores, targets, the layer's output

def _score(result: Any, output: str) -> Tensor:
    """(B, C) scores of a model's result."""
    if isinstance(result, Tensor):
        if result.ndim != 2:
            raise ValueError(f"model must return (B, C) scores or an output object, not {tuple(result.shape)}")
        return {"logit": lambda z: z, "log_prob": lambda z: z.log_softmax(1), "prob": lambda z: z.softmax(1)}[output](result)
    name = {"logit": "pooled", "log_prob": "log_probs", "prob": "probs"}[output]
    if not hasattr(result, name):
        raise ValueError(f"output={output!r} needs a model whose result has {name}(); {type(result).__name__} has not")
    return getattr(result, name)()


def _check(images: Tensor, targets: Any, output: str) -> tuple[Tensor, bool]:
    """Targets as (B, n) int64, and whether there was only one per image."""
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, not {output!r}")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating-point (B, C, H, W), not {images.dtype} {tuple(images.shape)}")
    targets = torch.as_tensor(targets, device=images.device)
    if targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, not {targets.dtype}")
    if targets.ndim == 0:
        targets = targets.expand(len(images))
    if targets.ndim > 2 or len(targets) != len(images):
        raise ValueError(f"targets must be an int, ({len(images)},) or ({len(images)}, n), not {tuple(targets.shape)}")
    return targets.long().view(len(images), -1), targets.ndim == 1


def _at(scores: Tensor, targets: Tensor) -> Tensor:
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < scores.shape[1]:
        raise ValueError(f"targets must be in 0..{scores.shape[1] - 1}, not {int(targets.min())}..{int(targets.max())}")
    return scores.gather(1, targets)


@contextmanager
def _output_of(layer: nn.Module, change: Callable[[Tensor], Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Records what `layer` returns (its last call), or replaces it by change(output)."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, result: Tensor) -> Tensor | None:
        if change is not None:
            return change(result)
        seen[:] = [result]

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _activations_and_gradients(model: nn.Module, layer: nn.Module, images: Tensor, targets: Tensor,
                               output: str) -> tuple[Tensor, Tensor]:
    """A (B, K, h, w) and G (B, n, K, h, w): one forward, one backward per column of targets."""
    with torch.enable_grad(), _output_of(layer) as seen:
        scores = _at(_score(model(images.detach().requires_grad_()), output), targets)
        if not seen:
            raise ValueError("layer was not used in the model's forward pass")
        gradients = [torch.autograd.grad(scores[:, n].sum(), seen[0], retain_graph=n + 1 < scores.shape[1])[0]
                     for n in range(scores.shape[1])]
    return seen[0].detach(), torch.stack(gradients, 1)


def _finish(maps: Tensor, single: bool, relu: bool) -> Tensor:
    maps = maps.clamp(min=0) if relu else maps
    return maps[:, 0] if single else maps


# ---------------------------------------------------------------- the CAM family

def grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *, relu: bool = False,
             output: str = "logit") -> Tensor:
    """Grad-CAM at layer resolution: `(B, h, w)` for targets int or (B,), `(B, n, h, w)` for (B, n).

    For networks that end in global average pooling and a linear layer this is the class activation map without bias,
    divided by h * w. ValueError: targets outside the classes, a layer that is not used, images that are not 4-D.
    """
    targets, single = _check(images, targets, output)
    a, g = _activations_and_gradients(model, layer, images, targets, output)
    return _finish(torch.einsum("bnk,bkhw->bnhw", g.mean((3, 4)), a), single, relu)


def grad_cam_pp(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *, relu: bool = False,
                output: str = "logit", eps: float | None = None) -> Tensor:
    """Grad-CAM++. `eps` guards the division: None for 1e-6 of the image's largest G^2, a float for an absolute value."""
    targets, single = _check(images, targets, output)
    a, g = _activations_and_gradients(model, layer, images, targets, output)
    guard = 1e-6 * g.square().amax((2, 3, 4), keepdim=True) if eps is None else eps
    alpha = g.square() / (2 * g.square() + a.sum((2, 3))[:, None, :, None, None] * g**3 + guard)
    weights = torch.where(g == 0, 0.0, alpha * g.clamp(min=0)).sum((3, 4))
    return _finish(torch.einsum("bnk,bkhw->bnhw", weights, a), single, relu)


def xgrad_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *, relu: bool = False,
              output: str = "logit") -> Tensor:
    """XGrad-CAM: gradients weighted with the activations."""
    targets, single = _check(images, targets, output)
    a, g = _activations_and_gradients(model, layer, images, targets, output)
    weights = (g * a.unsqueeze(1)).sum((3, 4)) / (a.sum((2, 3)) + 1e-7).unsqueeze(1)
    return _finish(torch.einsum("bnk,bkhw->bnhw", weights, a), single, relu)


def layer_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *, relu: bool = False,
              output: str = "logit") -> Tensor:
    """LayerCAM: every location weighted with its own positive gradient."""
    targets, single = _check(images, targets, output)
    a, g = _activations_and_gradients(model, layer, images, targets, output)
    return _finish((g.clamp(min=0) * a.unsqueeze(1)).sum(2), single, relu)


def hires_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *, relu: bool = False,
              output: str = "logit") -> Tensor:
    """HiResCAM: every location weighted with its own gradient."""
    targets, single = _check(images, targets, output)
    a, g = _activations_and_gradients(model, layer, images, targets, output)
    return _finish((g * a.unsqueeze(1)).sum(2), single, relu)


@torch.no_grad()
def score_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *, relu: bool = False,
              output: str = "logit", chunk: int = 32) -> Tensor:
    """Score-CAM: K + 1 forward passes per image, `chunk` images at a time, shared by all targets of an image."""
    targets, single = _check(images, targets, output)
    with _output_of(layer) as seen:
        _at(_score(model(images), output), targets)
    a = seen[0]
    masks = F.interpolate(a, images.shape[2:], mode="bilinear", align_corners=True)
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    masks = (masks - low) / (high - low + 1e-8)
    pairs = torch.cartesian_prod(torch.arange(len(images), device=a.device), torch.arange(a.shape[1], device=a.device))
    scores = torch.cat([_score(model(images[b] * masks[b, k].unsqueeze(1)), output).gather(1, targets[b])
                        for b, k in (part.unbind(1) for part in pairs.split(chunk))])
    weights = scores.view(len(images), a.shape[1], -1).softmax(1)
    return _finish(torch.einsum("bkn,bkhw->bnhw", weights, a), single, relu)


@torch.no_grad()
def ablation_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *, relu: bool = False,
                 output: str = "logit", chunk: int = 32) -> Tensor:
    """Ablation-CAM: the relative drop of the score when one channel of A is set to zero; K + 1 forward passes."""
    targets, single = _check(images, targets, output)
    with _output_of(layer) as seen:
        whole = _at(_score(model(images), output), targets)
    a = seen[0]
    pairs = torch.cartesian_prod(torch.arange(len(images), device=a.device), torch.arange(a.shape[1], device=a.device))
    scores = []
    for b, k in (part.unbind(1) for part in pairs.split(chunk)):
        without = a[b].clone()
        without[torch.arange(len(b), device=a.device), k] = 0
        with _output_of(layer, change=lambda _: without):
            scores.append(_score(model(images[b]), output).gather(1, targets[b]))
    weights = (whole.unsqueeze(1) - torch.cat(scores).view(len(images), a.shape[1], -1)) / whole.unsqueeze(1)
    return _finish(torch.einsum("bkn,bkhw->bnhw", weights, a), single, relu)


# ---------------------------------------------------------------- the gradient family

def _input_gradients(model: nn.Module, images: Tensor, targets: Tensor, output: str) -> Tensor:
    """d score / d image, like images; `targets` (B, 1)."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        scores = _at(_score(model(images), output), targets)
        return torch.autograd.grad(scores.sum(), images)[0]


def _one_target(images: Tensor, targets: Any, output: str) -> Tensor:
    targets, single = _check(images, targets, output)
    if not single:
        raise ValueError(f"targets must be an int or ({len(images)},): one class per image")
    return targets


def _many_gradients(model: nn.Module, batches: Iterator[Tensor], targets: Tensor, output: str) -> Iterator[Tensor]:
    """Gradients (n, B, 3, H, W) of stacks of changed images (n, B, 3, H, W)."""
    for stack in batches:
        gradients = _input_gradients(model, stack.flatten(0, 1), targets.repeat(len(stack), 1), output)
        yield gradients.view_as(stack)


def input_gradient(model: nn.Module, images: Tensor, targets: Any, *, output: str = "logit", signed: bool = False) -> Tensor:
    """Largest |gradient| of the three colours, `(B, H, W)`; signed=True: the gradient itself, `(B, 3, H, W)`."""
    gradient = _input_gradients(model, images, _one_target(images, targets, output), output)
    return gradient if signed else gradient.abs().amax(1)


def integrated_gradients(model: nn.Module, images: Tensor, targets: Any, *, baseline: Tensor | None = None, steps: int = 50,
                         method: str = "gausslegendre", variant: str = "standard", output: str = "logit",
                         chunk: int | None = None) -> Tensor:
    """The gradient averaged on the line from `baseline` (default zero) to the image, times the difference.

    Returns `(B, 3, H, W)`, signed, with sum f(x) - f(baseline) up to the error of the quadrature. `chunk`: points per
    forward pass (default: all). variant="calm": the mean of max_c |gradient| at 0, 1/n, ..., 1 (sum over n + 1 points,
    divided by n), `(B, H, W)`, as the CALM paper's code computes it; it does not sum to the difference.
    """
    targets = _one_target(images, targets, output)
    if steps < 1 or (method == "riemann_trapezoid" and steps < 2):
        raise ValueError(f"steps must be at least 1 (2 for the trapezoid), not {steps}")
    if method not in QUADRATURES:
        raise ValueError(f"method must be one of {', '.join(QUADRATURES)}, not {method!r}")
    if variant not in ("standard", "calm"):
        raise ValueError(f"variant must be 'standard' or 'calm', not {variant!r}")
    n = np.arange(steps)
    weights = np.full(steps, 1 / steps)
    if variant == "calm":
        points, weights = np.arange(steps + 1) / steps, np.full(steps + 1, 1 / steps)
    elif method == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        points, weights = (nodes + 1) / 2, weights / 2
    elif method == "riemann_trapezoid":
        points = n / (steps - 1)
        weights[[0, -1]] /= 2
    else:
        points = (n + {"riemann_left": 0.0, "riemann_right": 1.0, "riemann_middle": 0.5}[method]) / steps
    base = torch.zeros_like(images) if baseline is None else baseline.expand_as(images)
    at, weight = (torch.as_tensor(v, dtype=images.dtype, device=images.device).view(-1, 1, 1, 1, 1) for v in (points, weights))
    chunk = chunk or len(points)
    total = 0
    stacks = (base + part * (images - base) for part in at.split(chunk))
    for gradient, part in zip(_many_gradients(model, stacks, targets, output), weight.split(chunk)):
        value = gradient.abs().amax(2, keepdim=True) if variant == "calm" else gradient
        total = total + (part * value).sum(0)
    return total[:, 0] if variant == "calm" else (images - base) * total


def _noisy_moments(model: nn.Module, images: Tensor, targets: Any, samples: int, sigma_divisor: float, noise: Tensor | None,
                   output: str, chunk: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Mean and mean square over the samples of the input-gradient maps of noisy images."""
    targets = _one_target(images, targets, output)
    if samples < 1 or not sigma_divisor > 0:
        raise ValueError(f"samples and sigma_divisor must be positive, not {samples} and {sigma_divisor}")
    if noise is None:
        noise = torch.randn(samples, *images.shape, generator=generator, dtype=images.dtype,
                            device=generator.device if generator is not None else images.device).to(images.device)
    elif noise.shape != (samples, *images.shape):
        raise ValueError(f"noise must be {(samples, *images.shape)}, not {tuple(noise.shape)}")
    sigma = (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)) / sigma_divisor
    mean = square = 0
    for gradient in _many_gradients(model, (images + sigma * part for part in noise.split(chunk or samples)), targets, output):
        maps = gradient.abs().amax(2)
        mean, square = mean + maps.sum(0) / samples, square + maps.square().sum(0) / samples
    return mean, square


def smooth_grad(model: nn.Module, images: Tensor, targets: Any, *, samples: int = 50, sigma_divisor: float = 4.0,
                noise: Tensor | None = None, output: str = "logit", chunk: int | None = None,
                generator: torch.Generator | None = None) -> Tensor:
    """SmoothGrad `(B, H, W)`: the mean input-gradient map of noisy copies.

    The noise's deviation is the image's range / `sigma_divisor`; `noise` (samples, B, 3, H, W) unit normal, drawn if
    None. `chunk`: copies per forward pass (default: all).
    """
    return _noisy_moments(model, images, targets, samples, sigma_divisor, noise, output, chunk, generator)[0]


def smooth_grad_squared(model: nn.Module, images: Tensor, targets: Any, *, samples: int = 50, sigma_divisor: float = 4.0,
                        noise: Tensor | None = None, output: str = "logit", chunk: int | None = None,
                        generator: torch.Generator | None = None) -> Tensor:
    """The mean of the squared maps; arguments as for `smooth_grad`."""
    return _noisy_moments(model, images, targets, samples, sigma_divisor, noise, output, chunk, generator)[1]


def var_grad(model: nn.Module, images: Tensor, targets: Any, *, samples: int = 50, sigma_divisor: float = 4.0,
             noise: Tensor | None = None, output: str = "logit", chunk: int | None = None,
             generator: torch.Generator | None = None) -> Tensor:
    """VarGrad: the variance of the maps over the copies; arguments as for `smooth_grad`."""
    mean, square = _noisy_moments(model, images, targets, samples, sigma_divisor, noise, output, chunk, generator)
    return square - mean.square()


# ---------------------------------------------------------------- showing and comparing maps

def resize_map(maps: Tensor, size: int | tuple[int, int]) -> Tensor:
    """`(..., h, w)` to `(..., H, W)`, bilinear, corners not aligned. Keeps values, not sums."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size)


def normalize_map(maps: Tensor, mode: str) -> Tensor:
    """Each map `(..., H, W)` on its own: "none", "max" (v / max, clipped to [0, 1]), "minmax", "clip" (to [0, 1]).

    Constant maps and maps with NaN become 0 (not for "none"), as do maps without a positive value under "max".
    """
    if mode not in ("none", "max", "minmax", "clip"):
        raise ValueError(f"mode must be 'none', 'max', 'minmax' or 'clip', not {mode!r}")
    if mode == "none":
        return maps
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    usable = (high > low) & ((high > 0) | (mode != "max"))
    out = {"max": lambda: (maps / high).clamp(0, 1), "minmax": lambda: (maps - low) / (high - low), "clip": lambda: maps.clamp(0, 1)}[mode]()
    return torch.where(usable, out, torch.zeros((), dtype=maps.dtype, device=maps.device))


def _demonstrate() -> None:
    """A network that sees one thing, a bright spot: how much of each map lies on it."""
    generator = torch.Generator().manual_seed(0)
    images, labels = 0.1 * torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 3
    spots = torch.zeros(16, 32, 32, dtype=torch.bool)
    for n, (y, x) in enumerate(torch.randint(4, 24, (16, 2), generator=generator).tolist()):
        spots[n, y:y + 5, x:x + 5] = True
        images[n, labels[n], y:y + 5, x:x + 5] += 1.0         # the class is the colour of the spot
    conv = nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False)
    nn.init.constant_(conv.weight, 0.04)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    print("share of each map's positive mass on the spot (2 % of the image):")
    for function in (grad_cam, grad_cam_pp, xgrad_cam, layer_cam, hires_cam, score_cam, ablation_cam):
        maps = function(model, model[1], images, labels, relu=True)
        print(f"  {function.__name__:22s}{((maps * spots).sum((1, 2)) / maps.sum((1, 2))).mean():.2f}")
    for function in (input_gradient, smooth_grad, var_grad):
        maps = function(model, images, labels, **({} if function is input_gradient else {"generator": generator}))
        print(f"  {function.__name__:22s}{((maps * spots).sum((1, 2)) / maps.sum((1, 2))).mean():.2f}")
    maps = integrated_gradients(model, images, labels)
    gap = (maps.sum((1, 2, 3)) - (model(images) - model(0 * images)).gather(1, labels[:, None])[:, 0]).abs().max()
    print(f"integrated gradients add up to f(x) - f(0): largest error {gap.item():.1e}")


if __name__ == "__main__":
    _demonstrate()
