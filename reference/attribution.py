"""Where did the classifier look? Attribution maps for any network, and measures that compare maps.

MAPS. Every function takes the model as it is (any mode, any score), images `(B, 3, H, W)` and the
classes to explain, and returns tensors on the same device: signed, not normalised, one map per
image and class. Nothing is left behind: no hook, no `.grad` in a parameter. With A (B, K, h, w) the
output of `layer` and G = d score / dA:

    grad_cam      sum_k w_k A_k,  w_k = mean_z G_kz                          arXiv:1610.02391
    grad_cam_pp   w_k = sum_z alpha_kz relu(G_kz),                           arXiv:1710.11063
                  alpha = G^2 / (2 G^2 + G^3 sum_z A + eps)
    xgrad_cam     w_k = sum_z G_kz A_kz / sum_z A_kz                         arXiv:2008.02312
    layer_cam     sum_k relu(G_k) A_k                                        Jiang et al., TIP 2021
    hires_cam     sum_k G_k A_k                                              arXiv:2011.08891
    score_cam     w = softmax_k(score of the image masked by A_k)            arXiv:1910.01279
    ablation_cam  w_k = (s - s without A_k) / s                              Desai et al., WACV 2020
    input_gradient, smooth_grad (arXiv:1706.03825), smooth_grad_squared, var_grad (arXiv:1810.03307)
    integrated_gradients  (x - x') * integral of the gradient from x' to x   arXiv:1703.01365

`output` says what is explained: "logit" (the score itself), "log_prob" or "prob" (its log-softmax,
softmax). Models may also return an object with the methods pooled(), log_probs() and probs()
instead of a (B, C) tensor, as those of `calm.py` do.

MEASURES (section 5 of "Keep CALM and Improve Visual Feature Attribution", arXiv:2106.07861):

    PixelAP              how well one threshold on all maps of a data set finds the true pixels
    remove_and_classify  how fast accuracy falls when the most attributed pixels are erased

    maps = grad_cam(model, model.layer4, images, labels)    # (B, h, w); (B, n, h, w) for (B, n)
    shown = normalize_map(resize_map(maps, 224), "minmax")

>>> conv = torch.nn.Conv2d(3, 4, 3)
>>> model = torch.nn.Sequential(conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
>>> grad_cam(model, conv, torch.ones(2, 3, 8, 8), 1).shape
torch.Size([2, 6, 6])
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUTS = ("logit", "log_prob", "prob")
QUADRATURES = ("gausslegendre", "riemann_left", "riemann_right", "riemann_middle",
               "riemann_trapezoid")
PASS = 64                                                     # images in a forward pass by default


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _found(value: Any) -> str:
    tensor = isinstance(value, Tensor)
    return f"{value.dtype} {tuple(value.shape)}" if tensor else type(value).__name__


# ---------------------------------------------------------------- scores, targets, activations

def _score(result: Any, output: str) -> Tensor:
    """(B, C) scores of a model's result."""
    if isinstance(result, Tensor):
        if result.ndim != 2:
            raise ValueError(f"model must return (B, C) scores or an output object, "
                             f"not {_found(result)}")
        if output == "logit":
            return result
        return result.log_softmax(1) if output == "log_prob" else result.softmax(1)
    name = {"logit": "pooled", "log_prob": "log_probs", "prob": "probs"}[output]
    if not hasattr(result, name):
        raise ValueError(f"output={output!r} needs a model whose result has {name}(); "
                         f"{type(result).__name__} has not")
    return getattr(result, name)()


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating-point (B, C, H, W), not {_found(images)}")


def _check(images: Tensor, targets: Any, output: str, chunk: Any = None) -> tuple[Tensor, bool]:
    """Targets as (B, n) int64, and whether there was only one per image."""
    _check_choice("output", output, OUTPUTS)
    _check_images(images)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    if targets is None:
        raise TypeError("targets must be given: no class is explained by default")
    targets = torch.as_tensor(targets, device=images.device)
    if targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, not {targets.dtype}")
    targets = targets.expand(len(images)) if targets.ndim == 0 else targets
    if targets.ndim > 2 or len(targets) != len(images) or 0 in targets.shape[1:]:
        raise ValueError(f"targets must be an int, ({len(images)},) or ({len(images)}, n), "
                         f"not {tuple(targets.shape)}")
    return targets.long().reshape(len(images), *targets.shape[1:] or (1,)), targets.ndim == 1


def _at(scores: Tensor, targets: Tensor) -> Tensor:
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < scores.shape[1]:
        raise ValueError(f"targets must be in 0..{scores.shape[1] - 1}, "
                         f"not {int(targets.min())}..{int(targets.max())}")
    return scores.gather(1, targets.clone())                  # autograd keeps no inference tensor


def _as_written(model: nn.Module) -> Any:
    """A context in which compiled parts run as they are written: compiled, they overlook hooks."""
    parts = model.modules() if isinstance(model, nn.Module) else ()               # a function?
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in parts)
    stance = getattr(torch.compiler, "set_stance", nullcontext)                   # torch >= 2.6
    return stance("force_eager") if compiled else nullcontext()


@contextmanager
def _output_of(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Keeps what `layer` returns (its last call); the network goes on with change(it)."""
    seen: list[Tensor] = []
    caller = threading.get_ident()                            # others may run the model meanwhile

    def hook(module: nn.Module, inputs: Any, result: Any) -> Tensor | None:
        if threading.get_ident() != caller:
            return None
        if not isinstance(result, Tensor) or result.ndim != 4:
            raise ValueError(f"layer must return one (B, K, h, w) tensor, not {_found(result)}")
        seen[:] = [result.detach()]
        return change(seen[0])

    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a module of the model, not {type(layer).__name__}")
    handle = layer.register_forward_hook(hook)
    try:
        yield seen
        if not seen:
            raise ValueError("layer was not used in the model's forward pass")
    finally:
        handle.remove()


@torch.inference_mode(False)                                  # also when the caller is in that mode
def _activations_and_gradients(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any,
                               output: str) -> tuple[Tensor, Tensor, bool]:
    """A (B, K, h, w), G (B, n, K, h, w), one target?: one forward, one backward per column.

    Up to the layer nothing is recorded for the backward pass. The network goes on with a copy of A:
    a ReLU in place behind the layer must not change it.
    """
    def recorded(a: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        return a.requires_grad_().clone()

    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module                                  # whose call prepares no reduction
    targets, single = _check(images, targets, output)
    with torch.no_grad(), _as_written(model), _output_of(layer, recorded) as seen:
        columns = _at(_score(model(images), output), targets).sum(0).unbind()
    if not columns[0].requires_grad:
        raise ValueError("no gradient reaches the layer: the model itself uses no_grad behind it")
    gradients = [torch.autograd.grad(column, seen[0], retain_graph=n + 1 < len(columns))[0]
                 for n, column in enumerate(columns)]
    return seen[0].detach(), torch.stack(gradients, 1), single


def _finish(maps: Tensor, single: bool, relu: bool) -> Tensor:
    return (maps.clamp(min=0) if relu else maps)[:, 0 if single else slice(None)]


def _weighted(weights: Tensor, a: Tensor, single: bool, relu: bool) -> Tensor:
    """sum_k w_k A_k for weights (B, n, K)."""
    return _finish(torch.einsum("bnk,bkhw->bnhw", weights, a), single, relu)


# ---------------------------------------------------------------- the CAM family

def grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *,
             relu: bool = False, output: str = "logit") -> Tensor:
    """Grad-CAM at layer resolution: `(B, h, w)` for targets int or (B,), `(B, n, h, w)` for (B, n).

    For networks that end in global average pooling and a linear layer this is the class activation
    map without bias, divided by h * w. relu: clamp the map at 0. ValueError: targets outside the
    classes, a layer that is not used or does not return (B, K, h, w), images that are not 4-D.
    """
    a, g, single = _activations_and_gradients(model, layer, images, targets, output)
    return _weighted(g.mean((3, 4)), a, single, relu)


def grad_cam_pp(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *,
                relu: bool = False, output: str = "logit", eps: float | None = None) -> Tensor:
    """Grad-CAM++. eps, against division by zero: None for 1e-6 of the image's largest G^2."""
    a, g, single = _activations_and_gradients(model, layer, images, targets, output)
    peak = g.abs().amax((2, 3, 4), keepdim=True)
    guard = eps / g / g if eps is not None else 1e-6 * (peak / g).square()
    alpha = 1 / (2 + a.sum((2, 3))[:, None, :, None, None] * g + guard)           # G^2 underflows
    return _weighted(torch.where(g > 0, alpha * g, 0.0).sum((3, 4)), a, single, relu)


def xgrad_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *,
              relu: bool = False, output: str = "logit") -> Tensor:
    """XGrad-CAM: gradients weighted with the activations; arguments as for `grad_cam`."""
    a, g, single = _activations_and_gradients(model, layer, images, targets, output)
    weights = (g * a.unsqueeze(1)).sum((3, 4)) / (a.sum((2, 3)) + 1e-7).unsqueeze(1)
    return _weighted(weights, a, single, relu)


def layer_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *,
              relu: bool = False, output: str = "logit") -> Tensor:
    """LayerCAM: every location weighted with its own positive gradient."""
    a, g, single = _activations_and_gradients(model, layer, images, targets, output)
    return _finish((g.clamp(min=0) * a.unsqueeze(1)).sum(2), single, relu)


def hires_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *,
              relu: bool = False, output: str = "logit") -> Tensor:
    """HiResCAM: every location weighted with its own gradient."""
    a, g, single = _activations_and_gradients(model, layer, images, targets, output)
    return _finish((g * a.unsqueeze(1)).sum(2), single, relu)


def _chunks(live: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Image and channel indices of `live` (B, K), `chunk` at a time; never none."""
    return (part.unbind(1) for part in live.nonzero().split(chunk) if len(part))


@torch.no_grad()
def score_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *,
              relu: bool = False, output: str = "logit", chunk: int = 32) -> Tensor:
    """Score-CAM: at most K + 2 forward passes per image, `chunk` at a time, for all its targets.

    The mask of a constant channel (dead after a ReLU, say) is 0: these share one black image.
    """
    targets, single = _check(images, targets, output, chunk)
    with _as_written(model), _output_of(layer, Tensor.clone) as seen:
        _at(_score(model(images), output), targets)
    a = seen[0]
    black = _score(model(torch.zeros_like(images)), output).gather(1, targets)
    scores = black.unsqueeze(1).repeat(1, a.shape[1], 1)                          # (B, K, n)
    for row, image in enumerate(images):                      # no masks of a whole batch: gigabytes
        masks = F.interpolate(a[row, None], image.shape[1:], mode="bilinear", align_corners=True)
        low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
        masks = ((masks - low) / (high - low + 1e-8)).transpose(0, 1)
        for _, k in _chunks((high != low)[:, :, 0, 0], chunk):
            scores[row, k] = _score(model(image * masks[k]), output)[:, targets[row]]
    return _weighted(scores.softmax(1).transpose(1, 2), a, single, relu)


@contextmanager
def _forwards(changed: dict[nn.Module, Callable]) -> Iterator[None]:
    """Modules compute changed[module] in place of their own forward."""
    own = {module: vars(module).get("forward") for module in changed}
    try:
        for module, forward in changed.items():
            module.forward = forward
        yield
    finally:
        for module, forward in own.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _replay(module: nn.Module, results: list[Tensor | None], rows: Tensor) -> Callable:
    """A forward that gives the `rows` of its earlier results, in turn, and computes later ones."""
    own, earlier = module.forward, iter(results)

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = next(earlier, None)
        return own(*args, **kwargs) if result is None else result[rows]

    return forward


def _beside(model: nn.Module, layer: nn.Module) -> set[nn.Module]:
    """The outermost modules of `model` that neither hold the layer nor are part of it."""
    path = {module for module in model.modules() if layer in module.modules()}
    outer = {child for parent in path - {layer} for child in parent.children()} - path
    inner = {part for module in (*outer, layer) for part in module.modules() if part is not module}
    return outer - inner


@torch.no_grad()
def ablation_cam(model: nn.Module, layer: nn.Module, images: Tensor, targets: Any, *,
                 relu: bool = False, output: str = "logit", chunk: int = 32) -> Tensor:
    """Ablation-CAM: relative drop of the score without one channel of A.

    K passes per image, `chunk` at a time, through what lies above the layer: modules that were done
    before it give their first results again. Channels that are 0 everywhere are left out; where the
    score is exactly 0 the map is 0. No other thread may run the model meanwhile.
    """
    targets, single = _check(images, targets, output, chunk)

    def keep(module: nn.Module, inputs: Any, result: Any) -> None:
        if not seen:
            known = isinstance(result, Tensor) and result.ndim == 4 and len(result) == len(images)
            below[module].append(result.clone() if known else None)

    with _as_written(model), _output_of(layer, Tensor.clone) as seen, ExitStack() as hooks:
        below = {module: [] for module in _beside(model, layer)}
        for module in below:
            hooks.enter_context(module.register_forward_hook(keep))
        score = _at(_score(model(images), output), targets)
    a = seen[0]
    drops = torch.zeros_like(score).unsqueeze(1).repeat(1, a.shape[1], 1)         # (B, K, n)
    for b, k in _chunks((a != 0).any(3).any(2), chunk):
        without = a[b]
        without[torch.arange(len(b), device=a.device), k] = 0
        replays = {module: _replay(module, results, b) for module, results in below.items()}
        with _as_written(model), _forwards({**replays, layer: lambda *_, **__: without}):
            without_k = _score(model(images[b]), output).gather(1, targets[b])
        drops[b, k] = torch.where(score[b] == 0, 0.0, (score[b] - without_k) / score[b])
    return _weighted(drops.transpose(1, 2), a, single, relu)


# ---------------------------------------------------------------- the gradient family

@torch.inference_mode(False)                                  # gradients on, in whatever mode
def _input_gradients(model: nn.Module, images: Tensor, targets: Tensor, output: str) -> Tensor:
    """d score / d image, like images; `targets` (B, 1)."""
    images = (images.clone() if images.is_inference() else images.detach()).requires_grad_()
    scores = _at(_score(model(images), output), targets)
    return torch.autograd.grad(scores.sum(), images)[0]


def _one_target(images: Tensor, targets: Any, output: str, chunk: int | None = None) -> Tensor:
    targets, single = _check(images, targets, output, chunk)
    if not single:
        raise ValueError(f"targets must be an int or ({len(images)},): one class per image")
    return targets


def _passes(count: int, images: Tensor, chunk: int | None) -> list[slice]:
    """Slices of `chunk` out of `count` copies of the batch (default: about PASS images a pass)."""
    chunk = chunk or max(1, PASS // max(1, len(images)))
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def _copies_gradients(model: nn.Module, copies: Tensor, targets: Tensor, output: str) -> Tensor:
    """Gradients of a stack of changed batches (n, B, 3, H, W), in float32 or better to be added."""
    repeated = targets.repeat(len(copies), 1)
    gradients = _input_gradients(model, copies.flatten(0, 1), repeated, output).view_as(copies)
    return gradients.to(torch.promote_types(copies.dtype, torch.float32))


def input_gradient(model: nn.Module, images: Tensor, targets: Any, *, output: str = "logit",
                   signed: bool = False) -> Tensor:
    """Largest |gradient| of the colours, `(B, H, W)`; signed: the gradient, `(B, 3, H, W)`."""
    gradient = _input_gradients(model, images, _one_target(images, targets, output), output)
    return gradient if signed else gradient.abs().amax(1)


def _quadrature(method: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights on [0, 1]; the trapezoid's weights add up to (steps - 1) / steps."""
    points, weights = np.arange(steps) / steps, np.full(steps, 1 / steps)
    if method == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return (nodes + 1) / 2, weights / 2
    if method == "riemann_trapezoid":
        weights[[0, -1]] /= 2
        return np.arange(steps) / (steps - 1), weights
    shift = {"riemann_left": 0.0, "riemann_right": 1.0, "riemann_middle": 0.5}[method]
    return points + shift / steps, weights


@torch.no_grad()
def integrated_gradients(model: nn.Module, images: Tensor, targets: Any, *,
                         baseline: Tensor | None = None, steps: int = 50,
                         method: str = "gausslegendre", variant: str = "standard",
                         output: str = "logit", chunk: int | None = None) -> Tensor:
    """The mean gradient on the line from `baseline` (zero if None) to the image, times x - x'.

    Returns `(B, 3, H, W)`, signed, with the sum f(x) - f(baseline) up to the quadrature's error.
    chunk: points per forward pass (default: about 64 images a pass). variant="calm": the mean of
    max_c |gradient| at 0, 1/n, ..., 1 (n + 1 points, divided by n), `(B, H, W)`, as the CALM
    paper's code computes it; it does not sum to the difference.
    """
    targets = _one_target(images, targets, output, chunk)
    _check_choice("method", method, QUADRATURES)
    _check_choice("variant", variant, ("standard", "calm"))
    if steps < 1 or (method == "riemann_trapezoid" and steps < 2):
        raise ValueError(f"steps must be at least 1 (2 for the trapezoid), not {steps}")
    points, weights = _quadrature(method, steps) if variant == "standard" else (
        np.arange(steps + 1) / steps, np.full(steps + 1, 1 / steps))
    try:
        base = torch.zeros_like(images) if baseline is None else baseline.expand_as(images)
    except (RuntimeError, AttributeError):
        raise ValueError(f"baseline must expand to the images' {tuple(images.shape)}, "
                         f"not {_found(baseline)}") from None
    points, weights = (torch.as_tensor(values).to(images).view(-1, 1, 1, 1, 1)
                       for values in (points, weights))
    total = 0
    for rows in _passes(len(points), images, chunk):
        copies = base + points[rows] * (images - base)
        gradient = _copies_gradients(model, copies, targets, output)
        if variant == "calm":
            gradient = gradient.abs().amax(2, keepdim=True)
        total = total + (weights[rows] * gradient).sum(0)
    return (total[:, 0] if variant == "calm" else (images - base) * total).to(images.dtype)


def _noisy_moments(model: nn.Module, images: Tensor, targets: Any, samples: int,
                   sigma_divisor: float, noise: Tensor | None, output: str, chunk: int | None,
                   generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Mean and mean square over the samples of the input-gradient maps of noisy images."""
    targets = _one_target(images, targets, output, chunk)
    if samples < 1 or not sigma_divisor > 0:
        raise ValueError(f"samples and sigma_divisor must be positive, "
                         f"not {samples} and {sigma_divisor}")
    if noise is not None and noise.shape != (samples, *images.shape):
        raise ValueError(f"noise must be {(samples, *images.shape)}, not {_found(noise)}")
    source = {"device": images.device}          # no generator=None: compiled, it allows one shape
    if generator is not None:
        source = {"generator": generator, "device": generator.device}
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    sigma = (high - low) / sigma_divisor
    mean = square = 0
    for rows in _passes(samples, images, chunk):
        unit = noise[rows] if noise is not None else torch.stack([                # any chunk: alike
            torch.randn(images.shape, dtype=images.dtype, **source)
            for _ in range(rows.start, rows.stop)])
        copies = images + sigma * unit.to(images.device)
        maps = _copies_gradients(model, copies, targets, output).abs().amax(2)
        mean, square = mean + maps.sum(0) / samples, square + maps.square().sum(0) / samples
    return mean, square


def smooth_grad(model: nn.Module, images: Tensor, targets: Any, *, samples: int = 50,
                sigma_divisor: float = 4.0, noise: Tensor | None = None, output: str = "logit",
                chunk: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """SmoothGrad `(B, H, W)`: the mean input-gradient map of noisy copies.

    The noise's deviation is each image's range / `sigma_divisor`; `noise` (samples, B, 3, H, W)
    unit normal, drawn if None. chunk: copies per forward pass (default: about 64 images a pass).
    """
    return _noisy_moments(model, images, targets, samples, sigma_divisor, noise, output, chunk,
                          generator)[0].to(images.dtype)


def smooth_grad_squared(model: nn.Module, images: Tensor, targets: Any, *, samples: int = 50,
                        sigma_divisor: float = 4.0, noise: Tensor | None = None,
                        output: str = "logit", chunk: int | None = None,
                        generator: torch.Generator | None = None) -> Tensor:
    """The mean of the squared maps; arguments as for `smooth_grad`."""
    return _noisy_moments(model, images, targets, samples, sigma_divisor, noise, output, chunk,
                          generator)[1].to(images.dtype)


def var_grad(model: nn.Module, images: Tensor, targets: Any, *, samples: int = 50,
             sigma_divisor: float = 4.0, noise: Tensor | None = None, output: str = "logit",
             chunk: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """VarGrad: the variance of the maps over the copies; arguments as for `smooth_grad`."""
    mean, square = _noisy_moments(model, images, targets, samples, sigma_divisor, noise, output,
                                  chunk, generator)
    return (square - mean.square()).clamp(min=0).to(images.dtype)


# ---------------------------------------------------------------- showing maps

def resize_map(maps: Tensor, size: int | tuple[int, int]) -> Tensor:
    """`(..., h, w)` to `(..., H, W)`, bilinear, corners not aligned. Keeps values, not sums."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    if not isinstance(maps, Tensor) or maps.ndim < 2 or len(size) != 2 or min(size) < 1:
        raise ValueError(f"maps must be (..., h, w) and size one or two positive numbers, "
                         f"not {_found(maps)} and {size}")
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear").view(*maps.shape[:-2], *size)


def normalize_map(maps: Tensor, mode: str) -> Tensor:
    """Each map `(..., H, W)` on its own: "none", "max" (v / max, cut to [0, 1]), "minmax", "clip".

    "clip" only cuts values to [0, 1]: the one that keeps the unit. Constant maps and maps that are
    not finite become 0 (not for "none"), as do maps without a positive value under "max".
    """
    _check_choice("mode", mode, ("none", "max", "minmax", "clip"))
    if not isinstance(maps, Tensor) or maps.ndim < 2:
        raise ValueError(f"maps must be (..., H, W), not {_found(maps)}")
    if mode == "none":
        return maps.clone()
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    usable = (high > low) & torch.isfinite(high - low) & ((high > 0) | (mode != "max"))
    if mode != "clip":
        maps = maps / high if mode == "max" else (maps - low) / (high - low)
    return torch.where(usable, maps.clamp(0, 1), torch.zeros_like(maps))


# ---------------------------------------------------------------- pixel average precision

def thresholds(kind: str, interval: float = 0.001) -> np.ndarray:
    """Ascending float64: "even" 0, d, 2 d, ... below 1, or "log" from above 10^-7 to 1."""
    _check_choice("kind", kind, ("even", "log"))
    if not 0 < interval < 1:
        raise ValueError(f"interval must be in (0, 1), not {interval}")
    if kind == "even":
        return np.arange(0, 1, interval)
    # scalar powers: numpy's vectorised ones differ in the last bit, and values fall by these edges
    exponents = np.arange(0, 7, 7 * interval).tolist()
    return np.array([10.0 ** -exponent for exponent in reversed(exponents)])


_thresholds = thresholds  # PixelAP's argument has the same name


class PixelAP:
    """Average precision of pixels over a whole data set, binned as published or exact.

    thresholds: "even", "log", ascending values, or None for the exact one (a step per distinct
    value). Mask values: 1 positive, 0 negative, all others ignored. Values below the lowest
    threshold are in no bin, as published, and with them their positives are not counted either;
    count_underflow=True counts these in the recall.
    """

    def __init__(self, thresholds: str | Sequence[float] | None = "even", interval: float = 0.001,
                 count_underflow: bool = False) -> None:
        if isinstance(thresholds, str):
            _check_choice("thresholds", thresholds, ("even", "log"))
            thresholds = _thresholds(thresholds, interval)
        self.edges = None
        if thresholds is not None:
            values = np.asarray(thresholds, dtype=np.float64)
            edges = np.append(values, [1.0, 2.0, 3.0])
            if values.ndim != 1 or not (np.diff(edges) >= 0).all():
                raise ValueError(f"thresholds must be 1-D, ascending and at most 1, not {values}")
            self.edges = torch.from_numpy(edges)
            self.histogram = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
        self.count_underflow, self.below = count_underflow, 0  # positives below all thresholds
        self.values: list[Tensor] = []

    def update(self, maps: Any, masks: Any) -> None:
        """maps (N, H, W) or (H, W) in [0, 1], masks of the same shape."""
        maps = torch.as_tensor(maps)
        masks = torch.as_tensor(masks, device=maps.device)
        if maps.shape != masks.shape or maps.ndim not in (2, 3):
            raise ValueError(f"maps and masks must have one shape (N, H, W) or (H, W), "
                             f"not {tuple(maps.shape)} and {tuple(masks.shape)}")
        if not maps.is_floating_point():
            raise TypeError(f"maps must be floating-point, not {maps.dtype}")
        if not ((maps >= 0) & (maps <= 1)).all():
            raise ValueError(f"maps must be in [0, 1] without NaN, "
                             f"found {float(maps.min())} to {float(maps.max())}")
        for positive in (0, 1):
            values = maps[masks == positive].double()
            if self.edges is None:
                self.values.append(torch.stack([values, torch.full_like(values, positive)]))
                continue
            place = torch.searchsorted(self.edges.to(maps.device), values, right=True)
            counts = torch.bincount(place, minlength=len(self.edges) + 1).cpu()   # first: below all
            self.histogram[positive] += counts[1:-1]
            self.below += positive * int(counts[0])

    def compute(self) -> dict[str, Any]:
        """{"ap" in percent (NaN if none is positive), "precision", "recall" (bins,) downwards}."""
        histogram = self._exact() if self.edges is None else self.histogram
        false, true = histogram.flip(1).cumsum(1).cpu()
        positives = histogram[1].sum().cpu() + (self.below if self.count_underflow else 0)
        precision, recall = true / (true + false), true / positives
        gain = torch.diff(recall, prepend=recall.new_zeros(1))
        ap = 100 * float((precision * gain)[true + false > 0].sum()) if positives else math.nan
        return {"ap": ap, "precision": precision, "recall": recall}

    def _exact(self) -> Tensor:
        """Counts (2, number of distinct values)."""
        empty = torch.zeros(2, 0, dtype=torch.float64)
        value, positive = torch.cat(self.values, 1) if self.values else empty
        distinct, place = value.unique(return_inverse=True)
        rows = [torch.bincount(place[positive == p], minlength=len(distinct)) for p in (0, 1)]
        return torch.stack(rows).double()


# ---------------------------------------------------------------- remove and classify

def erase_masks(maps: Tensor, fractions: Sequence[float], order: str = "most") -> Tensor:
    """(F, B, H, W) bool, False on the int(k H W) most (or "least") attributed pixels.

    Of equal values the one with the lower flat index goes first.
    """
    if not isinstance(maps, Tensor) or maps.ndim != 3 or maps.isnan().any():
        raise ValueError(f"maps must be (B, H, W) without NaN, not {_found(maps)}")
    _check_choice("order", order, ("most", "least"))
    if not all(0 <= k <= 1 for k in fractions):
        raise ValueError(f"fractions must be in [0, 1], not {list(fractions)}")
    sequence = maps.flatten(1).argsort(dim=1, descending=order == "most", stable=True)
    count = sequence.shape[1]
    place = torch.arange(count, device=maps.device).expand_as(sequence)
    rank = torch.empty_like(sequence).scatter_(1, sequence, place).view_as(maps)   # for all k
    erased = torch.tensor([int(k * count) for k in fractions], device=maps.device)
    return rank >= erased.view(-1, 1, 1, 1)


def fill_baseline(images: Tensor, fill: str) -> Tensor:
    """What erased pixels show: "zero", "mean" (of the channel) or "blur" (31 x 31, sigma 15)."""
    _check_choice("fill", fill, ("zero", "mean", "blur"))
    _check_images(images)
    if fill == "zero":
        return torch.zeros_like(images)
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images).contiguous()
    if min(images.shape[2:]) < 16:
        raise ValueError(f"fill 'blur' needs images of at least 16 pixels, not {_found(images)}")
    offset = torch.arange(-15, 16, device=images.device, dtype=images.dtype)
    line = torch.exp(-offset.square() / (2 * 15**2))
    line = (line / line.sum()).expand(images.shape[1], 1, 1, -1)
    out = F.pad(images, (15, 15, 15, 15), mode="reflect")
    out = F.conv2d(out, line, groups=images.shape[1])
    return F.conv2d(out, line.transpose(2, 3), groups=images.shape[1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """eval() on the whole model, and every part back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def remove_and_classify(model: Callable, loader: Iterable,
                        map_fn: Callable[[Tensor, Tensor], Tensor], fractions: Sequence[float],
                        fill: str = "zero", generator: torch.Generator | None = None,
                        random_masks: Tensor | None = None, order: str = "most") -> dict[str, Any]:
    """Accuracy after erasing the most attributed pixels, against erasing as many random ones.

    loader: (images, labels); map_fn(images, labels) -> (B, h, w), resized to the images.
    random_masks (F, N, H, W) bool, True = keep, in the loader's order; drawn from `generator` if
    None. The lower the ratio, the better the map; with order="least" the least attributed pixels go
    first, and higher is better. The model is in eval mode meanwhile.

    Returns {"fractions", "accuracy" (float), "accuracy_erased", "accuracy_random", "ratio" (F,)
    float64}; the ratio is NaN, with a warning, where no randomly erased image is recognised.
    """
    def right(images: Tensor, labels: Tensor) -> Tensor:
        result = model(images)
        scores = _score(result, "logit" if isinstance(result, Tensor) else "prob")
        return scores.argmax(1) == labels

    counts, whole, total = torch.zeros(2, len(fractions), dtype=torch.float64), 0, 0
    with _evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        for images, labels, *_ in loader:
            if images.ndim != 4 or labels.shape != images.shape[:1] or labels.is_floating_point():
                raise ValueError(f"loader must give images (B, C, H, W) and integer labels (B,), "
                                 f"not {_found(images)} and {_found(labels)}")
            size, count = tuple(images.shape[2:]), len(images)
            with torch.enable_grad():                         # gradient maps need it
                maps = map_fn(images, labels)
            if not isinstance(maps, Tensor) or maps.ndim != 3 or len(maps) != count:
                raise ValueError(f"map_fn must return ({count}, h, w), not {_found(maps)}")
            maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
            keep = erase_masks(resize_map(maps, size), fractions, order)
            if random_masks is None:
                source = images.device if generator is None else generator.device
                chance = torch.rand(count, *size, generator=generator, device=source)
                chance = erase_masks(chance.to(images.device), fractions)
            else:
                chance = random_masks[:, total:total + count].to(images.device)
                if chance.shape != keep.shape or chance.dtype != torch.bool:
                    raise ValueError(f"random_masks must be bool (F, N, H, W) for the loader's "
                                     f"images, not {_found(random_masks)}")
            base = fill_baseline(images, fill)
            whole += int(right(images, labels).sum())
            for row, masks in enumerate((keep, chance)):      # all fractions in one forward pass
                erased = torch.where(masks.unsqueeze(2), images, base).flatten(0, 1)
                hits = right(erased, labels.repeat(len(fractions))).view(len(fractions), -1)
                counts[row] += hits.sum(1).cpu()
            total += count
    if not total:
        raise ValueError("loader is empty")
    if random_masks is not None and random_masks.shape[1] != total:
        raise ValueError(f"random_masks must be for {total} images, not {_found(random_masks)}")
    if (counts[1] == 0).any():
        warnings.warn("no randomly erased image is recognised at some fraction: its ratio is NaN",
                      stacklevel=3)
    return {"fractions": list(fractions), "accuracy": whole / total,
            "accuracy_erased": counts[0] / total, "accuracy_random": counts[1] / total,
            "ratio": torch.where(counts[1] > 0, counts[0] / counts[1], math.nan)}


# ---------------------------------------------------------------- demonstration

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
    cams = (grad_cam, grad_cam_pp, xgrad_cam, layer_cam, hires_cam, score_cam, ablation_cam)
    maps = {f.__name__: f(model, model[1], images, labels, relu=True) for f in cams}
    maps["input_gradient"] = input_gradient(model, images, labels)
    maps["smooth_grad"] = smooth_grad(model, images, labels, generator=generator)
    maps["integrated, positive"] = integrated_gradients(model, images, labels).clamp(min=0).sum(1)
    print("share of each map on the spot (2 % of the image), and AP of its pixels after min-max:")
    for name, values in maps.items():
        metric = PixelAP(thresholds=None)
        metric.update(normalize_map(values, "minmax"), spots)
        share = ((values * spots).sum((1, 2)) / values.sum((1, 2))).mean()
        print(f"  {name:22s}{share:.2f}  {metric.compute()['ap']:5.1f}")


if __name__ == "__main__":
    _demonstrate()
