"""Regularisers of image classifiers and one training loop for any combination of them, after
Chun, Oh, Yun, Han, Choe and Yoo, "An Empirical Evaluation on Robustness and Uncertainty of
Regularization Methods" (ICML 2019 workshop, arXiv:2003.03879).

The study trains one network with each regulariser and asks more than accuracy: robustness to
attacks, occlusion and corruption, and honest confidence (measured by `robustness.py`).

    input     cutout          a square of the image is blanked               (DeVries & Taylor 2017)
              mixup           x' = lam x + (1 - lam) x[perm]                 (Zhang et al. 2018)
              cutmix          a box of x[perm] is pasted into x              (Yun et al. 2019)
              gaussian_noise  x + sigma N(0, 1)
    features  manifold_mixup  mixup, or cutmix, of the input of a random layer  (Verma et al. 2019)
    labels    label_smoothing_loss   target (1 - eps) onehot + eps / K       (Szegedy et al. 2016)
    network   ShakeDrop       x (b + alpha - b alpha), back b + beta - b beta  (Yamada et al. 2019)
              DropBlock2d     square blocks of a feature map are dropped     (Ghiasi et al. 2018)
    attacks   adversarial training, logit pairing `alp_loss`                 (Kannan et al. 2018)

All mixing keeps lam as the weight of the image's own label and trains on
lam CE(z, y) + (1 - lam) CE(z, y[perm]) = `mixed_cross_entropy`. Each function draws from the
`generator` it is given, and nothing for what is passed explicitly (`perm`, `lam`, `box`, ...).

>>> x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
>>> regularizer = Regularizer(["cutout", "cutmix"], length=4, label_smoothing=0.1)
>>> mixed = regularizer(x, y, torch.Generator().manual_seed(0))
>>> loss = mixed_cross_entropy(torch.zeros(4, 3), *mixed[1:], label_smoothing=0.1)
>>> round(loss.item(), 4)
1.0986
>>> net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
>>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
>>> [sorted(step) for step in train(net, [(x, y)], optimizer, regularizer=regularizer)][0]
['acc', 'epoch', 'lam', 'loss', 'lr', 'step']
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mixed(NamedTuple):
    """A mixed batch: images, own labels, the partners' labels, and the weight of the own labels."""

    x: Tensor
    y_a: Tensor
    y_b: Tensor
    lam: float | Tensor


# ---- draws and checks ----------------------------------------------------------------------------

def _check_images(x: Tensor, y: Tensor | None = None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("x must be a float image batch, got "
                        f"{getattr(x, 'dtype', type(x))}; convert integers and arrays first")
    if x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
    if y is not None and len(x) != len(y):
        raise ValueError(f"x and y must have equal lengths, got {len(x)} and {len(y)}")


def _check_lam(lam: float | Tensor, count: int | None = None) -> float | Tensor:
    """A number in [0, 1] as float, or a (count,) tensor of such."""
    if not isinstance(lam, Tensor) or not lam.ndim:
        lam = float(lam)
    elif count is not None and lam.shape != (count,):
        raise ValueError(f"lam must be a number or ({count},), got {tuple(lam.shape)}")
    if not (0 <= lam <= 1 if isinstance(lam, float) else ((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    return lam


def _source(generator: torch.Generator | None, device: torch.device | None = None) -> dict:
    """Arguments of a draw. No generator=None: compiled, it would allow one batch size only."""
    if generator is None:
        return {"device": device}
    return {"generator": generator, "device": generator.device}


def _randint(high: int, shape: tuple, generator: torch.Generator | None) -> Tensor:
    return torch.randint(high, shape, **_source(generator))


def _weight(lam: float | Tensor | None, alpha: float, generator: torch.Generator | None,
            count: int | None = None, per_sample: bool = False) -> float | Tensor:
    """The lam given, or Beta(alpha, alpha), or for alpha <= 0 1; if per_sample (count,) float64."""
    if lam is not None:
        lam = _check_lam(lam, count)
    elif alpha <= 0:
        lam = 1.0
    elif not alpha < float("inf"):
        raise ValueError(f"alpha must be finite, got {alpha}")
    else:
        draw = np.random.default_rng(int(_randint(2**62, (), generator)))
        lam = draw.beta(alpha, alpha, count if per_sample else None)
    return torch.as_tensor(lam, dtype=torch.float64).expand(count) if per_sample else lam


def _permutation(perm: Tensor | None, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """The perm given, or a drawn one."""
    if perm is None:
        perm = torch.randperm(len(x), **_source(generator)).to(x.device)
    if len(perm) != len(x):
        raise ValueError(f"perm must have one entry per image ({len(x)}), got {len(perm)}")
    return perm


def _skip(prob: float, generator: torch.Generator | None) -> bool:
    """The coin of `prob`; prob 1 draws nothing."""
    if not 0 <= prob <= 1:
        raise ValueError(f"prob must be in [0, 1], got {prob}")
    return prob < 1 and bool(torch.rand((), **_source(generator)) >= prob)


def _blend(x: Tensor, perm: Tensor, lam: float | Tensor) -> Tensor:
    if isinstance(lam, Tensor):
        lam = lam.to(x).reshape(-1, *[1] * (x.ndim - 1))
    return lam * x + (1 - lam) * x[perm]


def _returned(lam: float | Tensor, x: Tensor) -> float | Tensor:
    """lam as it leaves: a number, or a tensor on x's device, float32 or finer."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return lam.to(x.device, dtype) if isinstance(lam, Tensor) else lam


# ---- input: cutout, mixup, cutmix, noise ---------------------------------------------------------

def _inside(low: Tensor, high: Tensor, size: int) -> Tensor:
    """(..., size) bool: low <= position < high."""
    position = torch.arange(size, device=low.device)
    return (position >= low[..., None]) & (position < high[..., None])


def cutout(x: Tensor, length: int, n_holes: int = 1, fill: float = 0.0,
           centers: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Blank `n_holes` squares per image with `fill`; 0 is the data-set mean after normalisation.

    A hole spans center - length // 2 .. center + length // 2 (end exclusive), so an odd length
    loses a pixel; the centre is uniform over the image, the hole clipped at the border.
    centers: (B, n_holes, 2) integers (row, column) replace the draw. Returns a new tensor.
    """
    _check_images(x)
    for name, value in (("length", length), ("n_holes", n_holes)):
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    height, width = x.shape[-2:]
    if centers is None:
        rows = _randint(height, (len(x), n_holes), generator)
        centers = torch.stack([rows, _randint(width, (len(x), n_holes), generator)], -1)
    elif centers.ndim != 3 or centers.shape[::2] != (len(x), 2):
        raise ValueError(f"centers must be ({len(x)}, n_holes, 2), got {tuple(centers.shape)}")
    low, high = (centers.to(x.device) + shift for shift in (-(length // 2), length // 2))
    rows = _inside(low[..., 0], high[..., 0], height)
    columns = _inside(low[..., 1], high[..., 1], width)
    holes = (rows[..., :, None] & columns[..., None, :]).any(1)
    return x.masked_fill(holes[:, None], fill)


def mixup(x: Tensor, y: Tensor, alpha: float = 1.0, per_sample: bool = False,
          perm: Tensor | None = None, lam: float | Tensor | None = None,
          generator: torch.Generator | None = None) -> Mixed:
    """x' = lam x + (1 - lam) x[perm], lam ~ Beta(alpha, alpha) for the batch or for every image.

    alpha <= 0 means lam = 1. Draw order: lam, perm. x is float (B, C, H, W) and is not modified.
    """
    _check_images(x, y)
    lam = _weight(lam, alpha, generator, len(x), per_sample)
    perm = _permutation(perm, x, generator)
    return Mixed(_blend(x, perm, lam), y, y[perm], _returned(lam, x))


def rand_bbox(h: int, w: int, lam: float, generator: torch.Generator | None = None,
              center: tuple[int, int] | None = None) -> tuple[int, int, int, int]:
    """CutMix's box (y1, x1, y2, x2), ends exclusive, of an h x w image: sides int(h r) and int(w r)
    with r = sqrt(1 - lam) around a uniform centre (row drawn first), clipped at the border.

    An odd side loses a pixel and clipping makes the box smaller: hence the adjusted lam of CutMix.
    """
    return tuple(_boxes(h, w, _check_lam(float(lam)), generator, center).tolist())


def _boxes(h: int, w: int, lam: float | Tensor, generator: torch.Generator | None,
           center: tuple[int, int] | None = None) -> Tensor:
    """One box (4,) for a number lam, (B, 4) for a tensor, on the CPU."""
    lam, size = torch.as_tensor(lam, dtype=torch.float64).cpu(), torch.tensor([h, w])
    if center is None:
        center = torch.stack([_randint(side, lam.shape, generator).cpu() for side in (h, w)], -1)
    center, half = torch.as_tensor(center), (size * (1 - lam)[..., None].sqrt()).long() // 2
    corners = torch.cat([center - half, center + half], -1)
    return torch.minimum(corners.clamp(min=0), size.repeat(2))


def _given_boxes(x: Tensor, box) -> Tensor:
    """The caller's box (4,), or boxes (B, 4), on the CPU."""
    h, w = x.shape[-2:]
    box = torch.as_tensor(box).cpu()
    if (box.shape not in ((4,), (len(x), 4)) or (box[..., :2] > box[..., 2:]).any()
            or (box < 0).any() or (box > torch.tensor([h, w, h, w])).any()):
        raise ValueError(f"box must be (y1, x1, y2, x2), ends exclusive, inside {h} x {w}, one or "
                         f"one per image, got {box.tolist()}")
    return box


def _paste(x: Tensor, perm: Tensor, boxes: Tensor) -> Tensor:
    """x with the boxes of x[perm] pasted in; x itself is never written to."""
    if boxes.ndim == 1:
        y1, x1, y2, x2 = boxes.tolist()
        out = x.clone()
        out[:, :, y1:y2, x1:x2] = x[perm, :, y1:y2, x1:x2]  # indexed by perm: a copy, never a view
        return out
    y1, x1, y2, x2 = boxes.to(x.device).unbind(1)
    inside = _inside(y1, y2, x.shape[2])[:, :, None] & _inside(x1, x2, x.shape[3])[:, None, :]
    return torch.where(inside[:, None], x[perm], x)


def _kept_share(x: Tensor, boxes: Tensor) -> float | Tensor:
    """1 - area / (H W): a float for one box, a tensor for several."""
    y1, x1, y2, x2 = boxes.unbind(-1)
    share = 1 - ((y2 - y1) * (x2 - x1)).double() / (x.shape[2] * x.shape[3])
    return share.item() if boxes.ndim == 1 else _returned(share, x)


def cutmix(x: Tensor, y: Tensor, alpha: float = 1.0, prob: float = 1.0, per_sample: bool = False,
           adjust_lam: bool = True, perm: Tensor | None = None, lam: float | Tensor | None = None,
           box=None, generator: torch.Generator | None = None) -> Mixed:
    """A box of x[perm] pasted into x, labels mixed by the area.

    With probability `prob` (else Mixed(x, y, y, 1.0)): lam ~ Beta(alpha, alpha), a box by
    :func:`rand_bbox`, and, with adjust_lam, lam = 1 - area / (H W) of the clipped box. per_sample
    draws lam and box for every image. box = (y1, x1, y2, x2), or (B, 4), replaces the draw.
    Draw order: coin, lam, perm, box. x is float (B, C, H, W) and is not modified.
    """
    _check_images(x, y)
    if _skip(prob, generator):
        return Mixed(x, y, y, 1.0)
    if lam is not None or box is None or not adjust_lam:
        lam = _weight(lam, alpha, generator, len(x), per_sample)
    perm = _permutation(perm, x, generator)
    boxes = _boxes(*x.shape[2:], lam, generator) if box is None else _given_boxes(x, box)
    boxes = boxes.expand(len(x), 4) if per_sample else boxes
    lam = _kept_share(x, boxes) if adjust_lam else _returned(lam, x)
    return Mixed(_paste(x, perm, boxes), y, y[perm], lam)


def gaussian_noise(x: Tensor, sigma: float, clip: Sequence[float] | None = (0, 1),
                   generator: torch.Generator | None = None) -> Tensor:
    """clip(x + sigma N(0, 1)); clip=None for images that are already normalised."""
    _check_images(x)
    if not sigma >= 0:
        raise ValueError(f"sigma must be >= 0, got {sigma}")
    noise = torch.randn(x.shape, dtype=x.dtype, **_source(generator, x.device))
    x = x + sigma * noise.to(x.device)
    return x if clip is None else x.clamp(*clip)


# ---- losses --------------------------------------------------------------------------------------

def _full(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    return losses.mean() if reduction == "mean" else losses


def mixed_cross_entropy(logits: Tensor, y_a: Tensor, y_b: Tensor, lam: float | Tensor,
                        label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """lam CE(z, y_a) + (1 - lam) CE(z, y_b), both labels smoothed by eps = label_smoothing.

    logits (B, K), labels (B,) int64, lam a number or (B,). Smoothing spreads eps over all K
    classes, the true one included: (1 - eps) CE + eps mean_k(-log p_k). Half-precision logits are
    computed in float32.
    """
    lam = _check_lam(lam, len(logits))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if logits.ndim != 2 or not logits.shape[:1] == y_a.shape == y_b.shape:
        raise ValueError(f"logits must be (B, K), labels (B,), got {tuple(logits.shape)}, "
                         f"{tuple(y_a.shape)} and {tuple(y_b.shape)}")
    log_p = _full(logits).log_softmax(1)
    own = log_p.gather(1, y_a[:, None])[:, 0]
    if y_a is y_b:
        losses = -own
    else:
        weight = lam.to(log_p) if isinstance(lam, Tensor) else lam
        losses = -weight * own - (1 - weight) * log_p.gather(1, y_b[:, None])[:, 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(1)
    return _reduce(losses, reduction)


def label_smoothing_loss(logits: Tensor, y: Tensor, eps: float = 0.1,
                         reduction: str = "mean") -> Tensor:
    """Cross entropy with the target (1 - eps) onehot + eps / K."""
    return mixed_cross_entropy(logits, y, y, 1.0, eps, reduction)


def soft_cross_entropy(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """-sum_k target_k log p_k for targets (B, K)."""
    if logits.shape != target.shape or logits.ndim != 2:
        raise ValueError("logits and target must both be (B, K), got "
                         f"{tuple(logits.shape)} and {tuple(target.shape)}")
    return _reduce(-(target * _full(logits).log_softmax(1)).sum(1), reduction)


def alp_loss(logits_clean: Tensor, logits_adv: Tensor, reduction: str = "mean") -> Tensor:
    """Adversarial logit pairing (z_clean - z_adv)^2: "mean" over all elements, "sum" over the
    classes and mean over the batch."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    if logits_clean.shape != logits_adv.shape:
        raise ValueError(f"logits must have equal shapes, got {tuple(logits_clean.shape)} and "
                         f"{tuple(logits_adv.shape)}")
    squared = (_full(logits_clean) - _full(logits_adv)).square()
    return squared.mean() if reduction == "mean" else squared.sum(1).mean()


# ---- features: manifold mixup --------------------------------------------------------------------

class _FeatureMixing:
    """What :func:`manifold_mixup` yields: lam and perm, and the loss that goes with them."""

    def __init__(self, mode, name, lam, perm, generator):
        self.mode, self.lam, self.perm, self._generator = mode, lam, perm, generator
        self._name, self._box = name, None

    def _hook(self, module: nn.Module, args: tuple) -> tuple:
        x, *others = args
        self.perm = _permutation(self.perm, x, self._generator)
        if self.mode == "mixup":
            return (_blend(x, self.perm, self.lam), *others)
        if x.ndim != 4:
            raise ValueError(f"cutmix needs features (B, C, H, W), got {tuple(x.shape)}")
        if self._box is None:
            self._box = _boxes(*x.shape[2:], self.lam, self._generator)
            self.lam = _kept_share(x, self._box)
        return (_paste(x, self.perm, self._box), *others)

    def loss(self, logits: Tensor, y: Tensor, label_smoothing: float = 0.0,
             reduction: str = "mean") -> Tensor:
        return mixed_cross_entropy(logits, y, self.partner(y), self.lam, label_smoothing, reduction)

    def partner(self, y: Tensor) -> Tensor:
        """The labels that were mixed into the own ones `y`."""
        if self.perm is None:
            raise ValueError(f"module {self._name!r} was not called inside the block")
        return y[self.perm]


@contextlib.contextmanager
def manifold_mixup(model: nn.Module, module_names: Sequence[str], alpha: float = 2.0,
                   perm: Tensor | None = None, lam: float | Tensor | None = None,
                   generator: torch.Generator | None = None, mode: str = "mixup"
                   ) -> Iterator[_FeatureMixing]:
    """Inside the block, the input of one module drawn from `module_names` is mixed in the batch.

    "" names the model itself: mixup of the image. mode "cutmix" pastes a box of the feature map
    instead (lam is then adjusted, known after the forward pass). The hook is gone after the block.
    Mixing comes before the module: the published code for layer 0 convolved the unmixed image.
    Networks under torch.compile run uncompiled inside the block; with activation checkpoints, the
    backward pass belongs inside it, too.

        with manifold_mixup(net, ["", "layer1", "layer2"]) as mixed:
            logits = net(x)
        loss = mixed.loss(logits, y)
    """
    if mode not in ("mixup", "cutmix"):
        raise ValueError(f'mode must be "mixup" or "cutmix", got {mode!r}')
    modules = dict(getattr(model, "_orig_mod", model).named_modules())  # inside torch.compile
    unknown = [name for name in module_names if name not in modules]
    if unknown or not module_names:
        raise ValueError(f"module_names must name submodules of the model, {list(modules)}, got "
                         f"{list(module_names)}")
    name = module_names[int(_randint(len(module_names), (), generator))]
    mixing = _FeatureMixing(mode, name, _weight(lam, alpha, generator), perm, generator)
    handle = modules[name].register_forward_pre_hook(mixing._hook)
    stance = getattr(torch.compiler, "set_stance", contextlib.nullcontext)  # torch >= 2.6
    try:
        with stance("force_eager"):  # a compiled network overlooks new hooks
            yield mixing
    finally:
        handle.remove()


# ---- network: ShakeDrop, DropBlock ---------------------------------------------------------------

class _ShakeDropFunction(torch.autograd.Function):
    """x times one factor forward, the gradient times another backward."""

    @staticmethod
    def forward(x: Tensor, forward_factor: Tensor, backward_factor: Tensor) -> Tensor:
        return x * forward_factor

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.saved_tensors[0], None, None


def shake_drop(x: Tensor, gate, alpha, beta) -> Tensor:
    """x (gate + alpha - gate alpha) forward, gradient times (gate + beta - gate beta) backward.

    gate 0 or 1; each of gate, alpha, beta a number, (B,), or of a shape that broadcasts to x.
    """
    def shaped(value) -> Tensor:
        value = torch.as_tensor(value, device=x.device).to(x.dtype)
        return value.reshape(-1, *[1] * (x.ndim - 1)) if value.shape == (len(x),) else value

    gate, alpha, beta = shaped(gate), shaped(alpha), shaped(beta)
    return _ShakeDropFunction.apply(x, gate + (1 - gate) * alpha, gate + (1 - gate) * beta)


class ShakeDrop(nn.Module):
    """ShakeDrop of a residual branch: after the branch's last batch norm, before the addition.

    Each forward pass draws one gate, 1 with probability 1 - p_drop; where it is 0 the branch is
    scaled by alpha ~ U(alpha) forward and, drawn apart, beta ~ U(beta) backward: one per "image",
    "batch", "channel" (of each image) or "pixel" (every element). Evaluation scales by the mean
    factor. The gate stays on the device, nothing waits for it. `generator` (attribute, default
    torch's own) is where draws come from.
    """

    def __init__(self, p_drop: float = 0.5, alpha: tuple[float, float] = (-1, 1),
                 beta: tuple[float, float] = (0, 1), level: str = "image"):
        super().__init__()
        if not 0 <= p_drop <= 1:
            raise ValueError(f"p_drop must be in [0, 1], got {p_drop}")
        if level not in ("image", "batch", "channel", "pixel"):
            raise ValueError(f'level must be "image", "batch", "channel" or "pixel", got {level!r}')
        for name, (low, high) in {"alpha": alpha, "beta": beta}.items():
            if not low <= high:
                raise ValueError(f"{name} must be (low, high), got {(low, high)}")
        self.p_drop, self.alpha, self.beta, self.level = p_drop, alpha, beta, level
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * (1 - self.p_drop + self.p_drop * sum(self.alpha) / 2)
        kept = {"batch": 0, "image": 1, "channel": 2, "pixel": x.ndim}[self.level]
        shape = [*x.shape[:kept], *[1] * (x.ndim - kept)]
        dtype = torch.promote_types(x.dtype, torch.float32)
        options = _source(self.generator, x.device)
        gate = torch.rand((), **options) >= self.p_drop
        alpha, beta = (low + (high - low) * torch.rand(shape, dtype=dtype, **options)
                       for low, high in (self.alpha, self.beta))
        return shake_drop(x, gate, alpha, beta)


def linear_drop_rates(L: int, p_last: float = 0.5) -> list[float]:
    """Drop probabilities of L residual blocks, l / L p_last for l = 1..L."""
    if L < 0 or not 0 <= p_last <= 1:
        raise ValueError(f"L must be >= 0 and p_last in [0, 1], got {L} and {p_last}")
    return [l / L * p_last for l in range(1, L + 1)]


class DropBlock2d(nn.Module):
    """Drops block_size x block_size squares of a map (B, C, H, W), the same in all channels.

    Block centres appear anywhere with probability gamma = drop_prob / block_size^2, as in the
    common public code; exact_gamma adds the paper's factor H W / ((H - bs + 1) (W - bs + 1)), which
    is for centres off the border only. What is kept is scaled up so that the mean stays.
    warmup_steps > 0 raises the probability linearly from 0 over that many training passes (a buffer
    counts them). Append it to a stage: `model.layer3.append(DropBlock2d())`.
    """

    def __init__(self, drop_prob: float = 0.1, block_size: int = 7, exact_gamma: bool = False,
                 warmup_steps: int = 0):
        super().__init__()
        if not 0 <= drop_prob <= 1 or block_size < 1 or block_size % 1 or warmup_steps < 0:
            raise ValueError("drop_prob must be in [0, 1], block_size a whole number >= 1 and "
                             f"warmup_steps >= 0, got {drop_prob}, {block_size}, {warmup_steps}")
        self.drop_prob, self.block_size = drop_prob, block_size
        self.exact_gamma, self.warmup_steps = exact_gamma, warmup_steps
        self.generator: torch.Generator | None = None
        if warmup_steps:
            self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        if x.ndim != 4:
            raise ValueError(f"x must be (B, C, H, W), got {tuple(x.shape)}")
        (batch, _, height, width), size = x.shape, self.block_size
        gamma = self.drop_prob / size**2
        if self.exact_gamma:
            gamma *= height * width / (max(height - size + 1, 1) * max(width - size + 1, 1))
        if self.warmup_steps:
            gamma = gamma * (self.passes / self.warmup_steps).clamp(max=1)
            self.passes += 1
        draw = torch.rand(batch, 1, height, width, **_source(self.generator, x.device))
        dropped = F.max_pool2d((draw < gamma).to(x.dtype), size, 1, size // 2)[..., :height, :width]
        kept = 1 - dropped
        scale = kept.numel() / kept.sum(dtype=torch.float32).clamp(min=1)  # all dropped: 0, not NaN
        return x * (kept * scale.to(x.dtype))


# ---- any combination -----------------------------------------------------------------------------

_MIXING = {"mixup": mixup, "cutmix": cutmix}


class Regularizer:
    """Input regularisers, smoothing, feature mixing and adversarial training in one object.

    input: None, "noise", "cutout", "mixup", "cutmix" or a list, at most one of the mixing kinds;
        noise and cutout come first. Calling it with (x, y, generator) returns a :class:`Mixed`.
    prob, alpha: how often to mix, and Beta(alpha, alpha). length: side of cutout's hole.
    sigma, clip: of the noise (clip=None for normalised images). label_smoothing: eps of the loss.
    feature, modules: in place of input mixing, "mixup" or "cutmix" of one of these modules' input.
    adversary: (model, x, y) -> attacked x, for instance functools.partial(fgsm, eps=8/255); the
        loss is (1 - adversary_weight) CE(clean) + adversary_weight CE(attacked) + pairing alp_loss.
    """

    def __init__(self, input: str | Sequence[str] | None = None, *, prob: float = 1.0,
                 alpha: float = 1.0, length: int = 16, label_smoothing: float = 0.0,
                 sigma: float = 0.1, clip: Sequence[float] | None = (0, 1),
                 feature: str | None = None, modules: Sequence[str] = (),
                 adversary: Callable | None = None, adversary_weight: float = 0.5,
                 pairing: float = 0.0):
        names = [input] if isinstance(input, str) else input or ()
        if not isinstance(names, Sequence) or not {*names} <= {"noise", "cutout", *_MIXING}:
            raise ValueError(f"input must be of noise, cutout, mixup, cutmix, got {input!r}")
        mixing = [name for name in names if name in _MIXING]
        if len(mixing) + (feature is not None) > 1:
            raise ValueError(f"only one kind of mixing at a time, got {names} and {feature!r}")
        if feature not in (None, "mixup", "cutmix") or (feature is None) != (not modules):
            raise ValueError('feature must be "mixup" or "cutmix" together with modules, got '
                             f"{feature!r} and {list(modules)}")
        shares = {"prob": prob, "label_smoothing": label_smoothing,
                  "adversary_weight": adversary_weight}
        if wrong := {name: value for name, value in shares.items() if not 0 <= value <= 1}:
            raise ValueError(f"must be in [0, 1]: {wrong}")
        self.local = [name for name in names if name not in _MIXING]
        self.mixing = mixing[0] if mixing else None
        self.prob, self.alpha, self.length, self.sigma, self.clip = prob, alpha, length, sigma, clip
        self.label_smoothing, self.feature, self.modules = label_smoothing, feature, list(modules)
        self.adversary, self.adversary_weight, self.pairing = adversary, adversary_weight, pairing

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Mixed:
        for name in self.local:
            x = (gaussian_noise(x, self.sigma, self.clip, generator) if name == "noise" else
                 cutout(x, self.length, generator=generator))
        if self.mixing is None or _skip(self.prob, generator):
            return Mixed(x, y, y, 1.0)
        return _MIXING[self.mixing](x, y, self.alpha, generator=generator)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor,
                generator: torch.Generator | None = None) -> tuple[Tensor, Mixed]:
        """Logits of the regularised batch, and the batch (its labels and lam)."""
        batch = self(x, y, generator)
        if self.feature is None or _skip(self.prob, generator):
            return model(batch.x), batch
        inner = getattr(model, "module", model)  # names inside DistributedDataParallel
        with manifold_mixup(inner, self.modules, self.alpha, generator=generator,
                            mode=self.feature) as mixing:
            logits = model(batch.x)
        return logits, Mixed(batch.x, y, mixing.partner(y), mixing.lam)

    def loss(self, model: nn.Module, logits: Tensor, batch: Mixed) -> Tensor:
        """The training loss; runs the adversary if there is one."""
        loss = mixed_cross_entropy(logits, *batch[1:], self.label_smoothing)
        if self.adversary is None:
            return loss
        attacked = model(self.adversary(model, batch.x, batch.y_a))
        hard = mixed_cross_entropy(attacked, *batch[1:], self.label_smoothing)
        loss = (1 - self.adversary_weight) * loss + self.adversary_weight * hard
        return loss + self.pairing * alp_loss(logits, attacked) if self.pairing else loss


# ---- training ------------------------------------------------------------------------------------

def parameter_groups(model: nn.Module, weight_decay: float, no_decay_norm=False) -> list[dict]:
    """Groups for an optimiser. The recipes decay everything; no_decay_norm spares vectors."""
    decayed, spared = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (spared if no_decay_norm and parameter.ndim <= 1 else decayed).append(parameter)
    return [{"params": group, "weight_decay": decay}
            for group, decay in ((decayed, weight_decay), (spared, 0.0))]


def step_schedule(lr: float, milestones: Sequence[int], gamma: float = 0.1) -> Callable:
    """schedule(step): lr times gamma for each milestone (in steps) that has passed."""
    return lambda step: lr * gamma ** sum(step >= milestone for milestone in milestones)


def train(model: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer, *,
          regularizer: Regularizer | None = None, epochs: int = 1,
          schedule: Callable[[int], float] | None = None, device: torch.device | str | None = None,
          amp: bool | torch.dtype = False, generator: torch.Generator | None = None,
          resume: dict | None = None) -> Iterator[dict[str, float]]:
    """Train and yield {step, epoch, lr, loss, acc, lam} after every step (acc is weighted by lam).

    loader: any re-iterable of (x, y); one with set_epoch(epoch, start_batch) is told its start.
    schedule(step) -> learning rate of all groups (default: as the optimiser has it), step from 0;
    the yielded step counts finished steps, from 1.
    amp: False, a dtype, or True for bfloat16; float16 is loss-scaled.
    generator: source of every draw; ShakeDrop and DropBlock2d layers get their own, seeded by it
    (torch.utils.checkpoint repeats only draws from torch's own: give none, then).
    `steps.send("state")` returns a snapshot; `train(..., resume=snapshot)` goes on to the same
    numbers, also where the loader shuffles: with its own generator or torch's global one.
    ValueError for an epoch without batches, or a resumed one with fewer than were done.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    regularizer = Regularizer() if regularizer is None else regularizer
    if not isinstance(regularizer, Regularizer) or epochs < 0:
        raise ValueError("regularizer must be a Regularizer or None and epochs >= 0, got "
                         f"{regularizer!r} and {epochs}")
    dtype = torch.bfloat16 if amp is True else amp or None
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    model.to(device)
    generators = {"cpu": torch.default_generator}  # all that may be drawn from, for the snapshot
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators["cuda"] = torch.cuda.default_generators[index]
    if isinstance(getattr(loader, "generator", None), torch.Generator):
        generators["loader"] = loader.generator
    stochastic = []
    if generator is not None:
        layers = torch.Generator(device).manual_seed(int(_randint(2**62, (), generator)))
        generators |= {"draws": generator, "layers": layers}
        stochastic = [module for module in model.modules() if hasattr(module, "generator")]
    step, first_epoch, first_batch = 0, 0, 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))  # it keeps what it is given
        scaler.load_state_dict(resume["scaler"])
        step, first_epoch, first_batch = resume["step"], resume["epoch"], resume["batch"]

    try:
        for module in stochastic:
            module.generator = layers
        for epoch in range(first_epoch, epochs):
            skip = first_batch if epoch == first_epoch else 0
            seeks = hasattr(loader, "set_epoch")
            if seeks:
                loader.set_epoch(epoch, skip)
            if resume is not None:  # as when the epoch began: the loader may shuffle with them
                if epoch and getattr(loader, "persistent_workers", False):
                    iter(loader)  # draws once, in the first epoch
                for name in generators.keys() & resume["epoch_draws"].keys():
                    generators[name].set_state(resume["epoch_draws"][name])
            epoch_draws = {name: one.get_state() for name, one in generators.items()}
            batches, done = iter(loader), skip
            if resume is not None:  # only now: what is skipped draws from the generators again
                if not seeks and sum(1 for _ in itertools.islice(batches, skip)) < skip:
                    raise ValueError(f"loader gives fewer than the {skip} batches done before")
                for name in generators.keys() & resume["draws"].keys():
                    generators[name].set_state(resume["draws"][name])
                resume = None
            for done, (x, y, *_) in enumerate(batches, skip + 1):
                model.train()  # every time: the caller may evaluate in between
                lr = schedule(step) if schedule else optimizer.param_groups[0]["lr"]
                for group in optimizer.param_groups if schedule else ():
                    group["lr"] = lr
                x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    logits, batch = regularizer.forward(model, x, y, generator)
                    loss = regularizer.loss(model, logits, batch)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                predicted, lam = logits.detach().argmax(1), batch.lam
                hits = lam * (predicted == batch.y_a) + (1 - lam) * (predicted == batch.y_b)
                means = {"loss": loss.detach(), "acc": hits, "lam": torch.as_tensor(lam)}
                values = torch.stack([m.to(device).float().mean() for m in means.values()])
                step += 1  # and the step's one host sync:
                request = yield {"step": step, "epoch": epoch, "lr": lr,
                                 **dict(zip(means, values.tolist()))}
                while request == "state":
                    request = yield copy.deepcopy({
                        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "scaler": scaler.state_dict(), "step": step, "epoch": epoch,
                        "batch": done, "epoch_draws": epoch_draws,
                        "draws": {name: one.get_state() for name, one in generators.items()}})
            if not done:
                raise ValueError(f"loader gave no batch in epoch {epoch}; an iterator serves one")
    finally:
        for module in stochastic:
            module.generator = None


if __name__ == "__main__":
    # Every class has a pattern, strong in the centre and weak around it: who reads the border, too?
    draw = torch.Generator().manual_seed(0)
    strength = torch.full((12, 12), 0.5)
    strength[3:9, 3:9] = 1.5
    y = torch.randint(8, (2320,), generator=draw)
    x = (strength * torch.randn(8, 1, 12, 12, generator=draw))[y]
    x += 1.5 * torch.randn(x.shape, generator=draw)
    batches = list(zip(x[:320].split(32), y[:320].split(32)))
    x, y = x[320:], y[320:]
    hidden = cutout(x, 6, centers=torch.full((len(x), 1, 2), 6))
    print("                  error  centre hidden  confidence")
    for label, chosen in {"baseline": Regularizer(), "cutout": Regularizer("cutout", length=8),
                          "cutmix": Regularizer("cutmix"),
                          "label smoothing": Regularizer(label_smoothing=0.1)}.items():
        net = nn.Sequential(nn.Flatten(), nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 8))
        for p in net.parameters():
            nn.init.normal_(p, std=0.1, generator=draw)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
        for _ in train(net, batches, optimizer, regularizer=chosen, epochs=60, generator=draw,
                       schedule=step_schedule(0.1, (300, 450))):
            pass
        p, q = net(x).softmax(1), net(hidden)
        errors = [(z.argmax(1) != y).float().mean() for z in (p, q)]
        print(f"{label:16s} {errors[0]:6.3f}  {errors[1]:13.3f}  {p.amax(1).mean():10.3f}")
    print("claim: cutout and cutmix help when the centre is hidden, smoothing lowers confidence")
