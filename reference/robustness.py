"""Robustness and uncertainty measures of a classifier, as used by Chun, Oh, Yun, Han, Choe and Yoo,
"An Empirical Evaluation on Robustness and Uncertainty of Regularization Methods" (ICML 2019
workshop, arXiv:2003.03879).

A classifier that is accurate on clean test data may still break on attacked, occluded or corrupted
input, and be over-confident on what it never saw. This file measures all of it from a model, or
from stored logits; copy it alone into any project.

    attacks      fgsm, pgd         x' = clip(x + eps sign(d CE / dx)); PGD iterates in the eps-ball
    occlusion    occlude           a centred square, or everything but a centred square, blanked
    corruption   corruption_errors, mce, relative_mce
                                   CE_c = sum_s E_cs / sum_s E_cs(AlexNet); mCE = 100 mean_c CE_c
    calibration  expected_calibration_error = sum_m n_m / N |accuracy_m - confidence_m|,
                 classwise_calibration_error, reliability_table, nll, brier, fit_temperature
    out of distribution
                 ood_score, odin; auroc, aupr, fpr_at_tpr, tnr_at_tpr, detection_accuracy

Conventions. Images are float (B, C, H, W) in pixel space; `mean` and `std` are applied on the way
to the model. Errors and rates are fractions, mCE is a percentage. Scores are higher for
in-distribution input, and tied scores are treated exactly: AUROC counts a tie as one half,
precision and rates move only between distinct scores (scikit-learn's rules). Everything is
accumulated in float64.

>>> logits, labels = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0, 1])
>>> round(expected_calibration_error(logits, labels), 4)
0.2992
>>> round(fit_temperature(logits, labels), 3)
1.365
>>> auroc([0.9, 0.8, 0.8], [0.8, 0.1])
0.8333333333333334
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Mean errors of AlexNet over the five severities of ImageNet-C, by name: lists of these numbers
# without names have been combined with corruptions in another order.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}


# ---- running a model -----------------------------------------------------------------------------


@contextlib.contextmanager
def eval_mode(model: Callable) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule is back in the mode it had."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode


def _device(model: Callable) -> torch.device | None:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if parameter is None else parameter.device


def _full(logits: Tensor) -> Tensor:
    """float32, or float64 where they are that."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def predict(model: Callable, loader: Iterable) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 or float64 and labels (N,) of a loader of (x, y), on the CPU."""
    logits, labels = [], []
    with eval_mode(model):
        for x, y, *_ in loader:
            z = _full(model(x.to(_device(model), non_blocking=True)))
            if len(z) != len(y):
                raise ValueError(f"the loader gave {len(y)} labels with {len(z)} logits")
            logits.append(z.to("cpu", copy=True))  # copies: model and loader may reuse a buffer
            labels.append(y.to("cpu", copy=True))
    if not logits:
        raise ValueError("loader is empty; at least one batch is needed")
    return torch.cat(logits), torch.cat(labels)


def evaluate(model: Callable, loader: Iterable) -> dict[str, float]:
    """Error and calibration of a model on a loader: error, nll, ece, brier, confidence, gap.

    `gap` is accuracy minus mean confidence: negative is over-confidence, positive (as label
    smoothing and mixing cause it) is under-confidence.
    """
    return evaluate_logits(*predict(model, loader))


def evaluate_logits(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The measures of :func:`evaluate` from stored logits (N, K) and labels (N,)."""
    confidence, correct = _confidence(logits, labels)
    accuracy, confidence = correct.double().mean().item(), confidence.double().mean().item()
    return {
        "error": 1.0 - accuracy,
        "nll": nll(logits, labels),
        "ece": expected_calibration_error(logits, labels),
        "brier": brier(logits, labels),
        "confidence": confidence,
        "gap": accuracy - confidence,
    }


# ---- adversarial and occluded input --------------------------------------------------------------


def _normaliser(x: Tensor, mean, std) -> Callable[[Tensor], Tensor]:
    """x -> (x - mean) / std, with mean and std given per channel or as tensors that broadcast."""

    def channels(name: str, value, default: float) -> Tensor:
        value = torch.as_tensor(default if value is None else value, dtype=x.dtype)
        value = value.reshape(-1, 1, 1) if value.ndim == 1 else value
        if value.ndim > 1 and value.shape[-3:-2] not in ((), (1,), x.shape[1:2]):
            raise ValueError(f"{name} must be one number or one of each of the {x.shape[1]} "
                             f"channels, got {tuple(value.shape)}")
        return value

    if mean is None and std is None:
        return lambda images: images
    shift, scale = channels("mean", mean, 0.0), channels("std", std, 1.0)
    if not (scale > 0).all():
        raise ValueError(f"std must be positive, got {std}")
    shift, scale = shift.to(x.device), scale.to(x.device)
    return lambda images: (images - shift) / scale


def _check_attack(x: Tensor, y: Tensor, eps: float, clip: Sequence[float]) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a float image batch, got {getattr(x, 'dtype', type(x))}; "
                        "divide uint8 images by 255")
    if x.ndim < 2 or len(x) != len(y):
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must agree in the batch size")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be >= 0 and finite, got {eps}")
    if clip is not None and (len(clip) != 2 or not clip[0] <= clip[1]):
        raise ValueError(f"clip must be (low, high) or None, got {clip}")


def _gradient(model: Callable, normalise: Callable, x: Tensor, loss: Callable) -> Tensor:
    """d loss(model(x)) / dx. No parameter's .grad is touched, and no weight gradient is computed:
    autograd.grad with x as the only input skips them."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        # The sum over the batch, not the mean: the same sign, and half precision underflows later.
        return torch.autograd.grad(loss(_full(model(normalise(x)))).sum(), x)[0]


def _cross_entropy(y: Tensor) -> Callable[[Tensor], Tensor]:
    y = y.clone()  # of a batch made in inference mode nothing can be kept for a gradient
    return lambda logits: F.cross_entropy(logits, y, reduction="none")


def _clamp(x: Tensor, clip: Sequence[float] | None) -> Tensor:
    return x if clip is None else x.clamp(*clip)


@torch.inference_mode(False)
def fgsm(model: Callable, x: Tensor, y: Tensor, eps: float, clip: Sequence[float] | None = (0, 1),
         mean=None, std=None) -> Tensor:
    """Fast gradient sign method: clip(x + eps sign(d CE(model(x), y) / dx)), in evaluation mode.

    x: float (B, C, H, W) in pixel space; eps in the same units (8/255 for [0, 1] images).
    mean, std: the model is called on (x - mean) / std. Modes and .grad of the model are left alone.
    TypeError for integer images, ValueError for eps < 0.
    """
    _check_attack(x, y, eps, clip)
    with eval_mode(model):
        grad = _gradient(model, _normaliser(x, mean, std), x, _cross_entropy(y))
    return _clamp(x.detach() + eps * grad.sign(), clip)


@torch.inference_mode(False)
def pgd(model: Callable, x: Tensor, y: Tensor, eps: float, step_size: float, n_steps: int = 10,
        random_start: bool = False, clip: Sequence[float] | None = (0, 1), mean=None, std=None,
        generator: torch.Generator | None = None) -> Tensor:
    """Projected gradient descent: `n_steps` of +step_size sign(gradient), each projected to the
    eps-ball (maximum norm) around the clean x and clipped. Otherwise as :func:`fgsm`."""
    _check_attack(x, y, eps, clip)
    if not step_size >= 0 or n_steps < 0:
        raise ValueError(f"step_size and n_steps must be >= 0, got {step_size} and {n_steps}")
    normalise, clean = _normaliser(x, mean, std), x.detach()
    attacked = clean
    if random_start:
        # No argument generator=None: compiled, it would allow one batch size only.
        source = ({"device": x.device} if generator is None else
                  {"generator": generator, "device": generator.device})
        noise = torch.rand(x.shape, dtype=x.dtype, **source).to(x.device)
        attacked = _clamp(clean + (2 * noise - 1) * eps, clip)
    with eval_mode(model):
        for _ in range(n_steps):
            grad = _gradient(model, normalise, attacked, _cross_entropy(y))
            shift = (attacked + step_size * grad.sign() - clean).clamp(-eps, eps)
            attacked = _clamp(clean + shift, clip)
    return attacked.clone() if attacked is clean else attacked


def occlude(x: Tensor, size: int, kind: str = "center", fill: float = 0.0) -> Tensor:
    """Blank the centred size x size square of (..., H, W) images ("center"), or all but it
    ("boundary"), with `fill` (0 is the data-set mean after normalisation). The square's first row
    is (H - size) // 2. size 0 with "center" returns a copy; a square wider than W covers the row.
    """
    height, width = x.shape[-2:]
    if kind not in ("center", "boundary"):
        raise ValueError(f'kind must be "center" or "boundary", got {kind!r}')
    if not 0 <= size <= height:
        raise ValueError(f"size must be in 0..{height} (the image height), got {size}")
    top, left = (height - size) // 2, max((width - size) // 2, 0)
    square = (..., slice(top, top + size), slice(left, min(left + size, width)))
    out = x.clone() if kind == "center" else torch.full_like(x, fill)
    out[square] = fill if kind == "center" else x[square]
    return out


# ---- common corruptions --------------------------------------------------------------------------


def corruption_errors(model: Callable, loader_of: Callable[[str, int], Iterable],
                      names: Iterable[str], severities: Sequence[int] = (1, 2, 3, 4, 5)
                      ) -> dict[str, list[float]]:
    """Top-1 error per corruption and severity; `loader_of(name, severity)` yields (x, y)."""
    errors = {}
    for name in names:
        results = [predict(model, loader_of(name, severity)) for severity in severities]
        errors[name] = [(z.argmax(1) != y).double().mean().item() for z, y in results]
    return errors


def _mean_errors(errors: Mapping[str, float | Sequence[float]], names: Iterable[str],
                 argument: str) -> Tensor:
    means = []
    for name in names:
        if name not in errors:
            raise KeyError(f"{argument} lacks the corruption {name!r}")
        values = torch.as_tensor(errors[name], dtype=torch.float64).reshape(-1)
        if len(values) not in (1, 5) or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{argument}[{name!r}] must be one error or five (severities 1..5), "
                             f"each a fraction in [0, 1]; got {errors[name]}")
        means.append(values.mean())
    if not means:
        raise ValueError("reference must name at least one corruption")
    return torch.stack(means)


def mce(errors: Mapping[str, float | Sequence[float]],
        reference: Mapping[str, float | Sequence[float]] = ALEXNET_ERRORS) -> float:
    """Mean corruption error in percent: 100 mean_c (sum_s E_cs / sum_s E_cs of the reference).

    errors: name -> mean error or the five errors of severities 1..5, fractions. The corruptions are
    those of `reference`; other names are ignored, a missing one is a KeyError.
    """
    means = _mean_errors(errors, reference, "errors")
    return 100 * (means / _mean_errors(reference, reference, "reference")).mean().item()


def relative_mce(errors: Mapping[str, float | Sequence[float]], clean_error: float,
                 reference_clean_error: float,
                 reference: Mapping[str, float | Sequence[float]] = ALEXNET_ERRORS) -> float:
    """Like :func:`mce` for what corruption adds: mean_c of sum_s (E_cs - E_clean) over the same sum
    of the reference, in percent."""
    added = _mean_errors(errors, reference, "errors") - clean_error
    return 100 * (added / (_mean_errors(reference, reference, "reference")
                           - reference_clean_error)).mean().item()


# ---- calibration ---------------------------------------------------------------------------------


def _check_logits(logits: Tensor, labels: Tensor, from_probs: bool = False) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError("logits must be a float tensor, got "
                        f"{getattr(logits, 'dtype', type(logits))}")
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels) or not len(logits):
        raise ValueError(f"logits must be (N, K) and labels (N,) with N >= 1, got "
                         f"{tuple(logits.shape)} and {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must be integers in 0..{logits.shape[1] - 1}")
    if not logits.isfinite().all():
        raise ValueError("logits contain NaN or infinite values")
    if from_probs and (logits.min() < 0 or logits.max() > 1 + 1e-4):
        raise ValueError("with from_probs=True the rows must be probabilities in [0, 1]")


def _probabilities(logits: Tensor, from_probs: bool) -> Tensor:
    logits = _full(logits.detach())
    return logits if from_probs else logits.softmax(1)


def _confidence(logits: Tensor, labels: Tensor, from_probs: bool = False) -> tuple[Tensor, Tensor]:
    """Largest probability and whether its class is the label, both (N,)."""
    _check_logits(logits, labels, from_probs)
    confidence, prediction = _probabilities(logits, from_probs).max(1)
    return confidence, prediction == labels.to(prediction.device)


def _edges(n_bins: int, dtype: torch.dtype) -> Tensor:
    """m / M for m = 0..M; in float32 rounded as the published code has them."""
    if not isinstance(n_bins, (int, np.integer)) or n_bins < 1:
        raise ValueError(f"n_bins must be an integer >= 1, got {n_bins}")
    if dtype == torch.float64:
        return torch.arange(n_bins + 1, dtype=dtype) / n_bins
    return torch.linspace(0, 1, n_bins + 1, dtype=dtype)


def _bins(values: Tensor, n_bins: int) -> Tensor:
    """Index of the bin (m-1)/M < value <= m/M, found by comparison with the edges in the dtype of
    the values: ceil(value * M) differs on the edges."""
    edges = _edges(n_bins, values.dtype).to(values.device)
    return (torch.searchsorted(edges, values) - 1).clamp(0, n_bins - 1)


def _sums(index: Tensor, size: int, *columns: Tensor) -> list[Tensor]:
    """Counts, and the sum of each column, by index (float64)."""
    weights = [None, *(column.double() for column in columns)]
    return [torch.bincount(index, w, minlength=size).double() for w in weights]


def _weighted_gap(count: Tensor, confidence: Tensor, accuracy: Tensor, norm: str) -> float:
    """The norm of |accuracy - confidence| over the bins, from sums over each bin."""
    filled = count > 0
    gap = (accuracy - confidence)[filled].abs() / count[filled]
    share = count[filled] / count.sum()
    if norm == "l1":
        return (share * gap).sum().item()
    return (share * gap.square()).sum().sqrt().item() if norm == "l2" else gap.max().item()


def expected_calibration_error(logits: Tensor, labels: Tensor, n_bins: int = 15, norm: str = "l1",
                               strategy: str = "uniform", from_probs: bool = False) -> float:
    """Calibration error of the predicted class over confidence bins.

    norm: "l1" the expected error ECE, "l2" its root mean square, "max" the largest gap (MCE).
    strategy: "uniform" bins ((m-1)/M, m/M]; "adaptive" bins of equal size in the order of
    confidence, where equally confident samples share their mean accuracy, so that the order given
    cannot matter.
    """
    if norm not in ("l1", "l2", "max"):
        raise ValueError(f'norm must be "l1", "l2" or "max", got {norm!r}')
    if strategy not in ("uniform", "adaptive"):
        raise ValueError(f'strategy must be "uniform" or "adaptive", got {strategy!r}')
    confidence, correct = _confidence(logits, labels, from_probs)
    index, accuracy = _bins(confidence, n_bins), correct.double()
    if strategy == "adaptive":
        order = confidence.argsort()
        confidence, accuracy = confidence[order], accuracy[order]
        _, group, size = confidence.unique_consecutive(return_inverse=True, return_counts=True)
        accuracy = (torch.bincount(group, accuracy) / size)[group]
        sizes = torch.tensor([len(part) for part in order.tensor_split(n_bins)])
        index = torch.arange(n_bins).repeat_interleave(sizes).to(order.device)
    return _weighted_gap(*_sums(index, n_bins, confidence, accuracy), norm)


def classwise_calibration_error(logits: Tensor, labels: Tensor, n_bins: int = 15,
                                from_probs: bool = False) -> float:
    """Mean over the classes of sum_m n_m / N |frequency_m - mean p_m| of its probability."""
    _check_logits(logits, labels, from_probs)
    p = _probabilities(logits, from_probs)
    hit = F.one_hot(labels.to(p.device).long(), p.shape[1])
    index = _bins(p.contiguous(), n_bins) + n_bins * torch.arange(p.shape[1], device=p.device)
    sums = _sums(index.flatten(), n_bins * p.shape[1], p.flatten(), hit.flatten())
    return (sums[2] - sums[1]).abs().sum().item() / p.numel()


def reliability_table(logits: Tensor, labels: Tensor, n_bins: int = 15,
                      from_probs: bool = False) -> dict[str, Tensor]:
    """What a reliability diagram shows, as (n_bins,) tensors: lower and upper edge, count, mean
    confidence and accuracy (0 where the bin is empty)."""
    confidence, correct = _confidence(logits, labels, from_probs)
    count, *sums = _sums(_bins(confidence, n_bins), n_bins, confidence, correct)
    edges = _edges(n_bins, torch.float64).to(count.device)
    mean_confidence, accuracy = (s / count.clamp(min=1) for s in sums)
    return {"lower": edges[:-1], "upper": edges[1:], "count": count.long(),
            "confidence": mean_confidence, "accuracy": accuracy}


def brier(logits: Tensor, labels: Tensor, from_probs: bool = False) -> float:
    """Mean over samples of the sum over classes of (p - onehot)^2: 0 is perfect, 2 the worst."""
    _check_logits(logits, labels, from_probs)
    p = _probabilities(logits.double(), from_probs)
    return (p - F.one_hot(labels.to(p.device).long(), p.shape[1])).square().sum(1).mean().item()


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood in nats."""
    _check_logits(logits, labels)
    return F.cross_entropy(logits.double(), labels.to(logits.device).long()).item()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """T that minimises nll(logits / T, labels); fit it on held-out data, never on the test set.

    The NLL is convex in u = 1/T, with slope E_p[z] - z_y and curvature Var_p[z] (means over
    samples): Newton's steps inside a shrinking bracket find the root of the slope. With no minimum
    in 1e-3..1e3 T ends at a cap with a warning: at 1e-3 when every sample is correct, at 1e3 when
    the logits are worse than constant ones. Constant rows say nothing about T and give 1.
    """
    _check_logits(logits, labels)
    z = logits.double() - logits.double().amax(1, keepdim=True)
    target = z.gather(1, labels.to(z.device).long()[:, None])[:, 0]
    if not z.any():
        return 1.0

    def slope_and_curvature(u: float) -> tuple[float, float]:
        p = (u * z).softmax(1)
        expected = (p * z).sum(1)
        variance = (p * (z - expected[:, None]).square()).sum(1)
        return (expected - target).mean().item(), variance.mean().item()

    low, high, u = 1e-3, 1e3, 1.0
    for cap, sign, why in (
            (low, 1, "the logits predict worse than constant ones, the NLL falls as T grows"),
            (high, -1, "the labels have the largest logits, the NLL falls as T -> 0")):
        if sign * slope_and_curvature(cap)[0] >= 0:
            warnings.warn(f"fit_temperature: {why}; T is capped at {1 / cap}", stacklevel=2)
            return 1 / cap
    for _ in range(200):
        slope, curvature = slope_and_curvature(u)
        low, high = (u, high) if slope < 0 else (low, u)
        proposal = u - slope / curvature if curvature > 0 else math.inf
        if not low < proposal < high:
            proposal = math.sqrt(low * high)
        if abs(proposal - u) <= 1e-12 * u:
            break
        u = proposal
    return 1 / u


# ---- out of distribution -------------------------------------------------------------------------


def ood_score(logits: Tensor, kind: str = "msp", temperature: float = 1.0) -> Tensor:
    """In-distribution score (N,) from logits (N, K); higher is more in-distribution.

    kind: "msp" the largest softmax probability (Hendrycks and Gimpel), "max_logit", "entropy" (its
    negative), "energy" T logsumexp(z / T). Saturated "msp" scores tie: float64 logits keep them
    apart.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    z = _full(logits) / temperature
    if kind == "msp":
        return z.softmax(1).amax(1)
    if kind == "max_logit":
        return z.amax(1)
    if kind == "entropy":
        return (z.softmax(1) * z.log_softmax(1)).sum(1)
    if kind == "energy":
        return temperature * z.logsumexp(1)
    raise ValueError(f'kind must be "msp", "max_logit", "entropy" or "energy", got {kind!r}')


@torch.inference_mode(False)
def odin(model: Callable, x: Tensor, eps: float = 0.0014, temperature: float = 1000.0, mean=None,
         std=None) -> Tensor:
    """ODIN score (B,): the largest softmax(z / T) after x moved by eps sign(d log S_max / dx).

    x is in pixel space, so that the step needs no division by std (the published code, which works
    on normalised input, divides). No clipping, as published."""
    _check_attack(x, x, eps, None)
    normalise = _normaliser(x, mean, std)
    with eval_mode(model):
        grad = _gradient(model, normalise, x, lambda z: (z / temperature).log_softmax(1).amax(1))
        with torch.no_grad():
            return ood_score(model(normalise(x + eps * grad.sign())), "msp", temperature)


def _tie_groups(scores_in, scores_out, positive: str) -> tuple[Tensor, Tensor]:
    """How many positives and negatives hold each distinct score, from the highest score down
    (float64 whole numbers)."""
    if positive not in ("in", "out"):
        raise ValueError(f'positive must be "in" or "out", got {positive!r}')
    scores = []
    for name, values in (("scores_in", scores_in), ("scores_out", scores_out)):
        values = (values.detach().cpu().double() if isinstance(values, Tensor) else
                  torch.from_numpy(np.array(values, np.float64)))  # a list holds doubles, too
        if values.ndim != 1 or not len(values) or values.isnan().any():
            raise ValueError(f"{name} must be one-dimensional, not empty and free of NaN; got "
                             f"{values.dtype} of shape {tuple(values.shape)}")
        scores.append(values)
    _, group = torch.cat(scores).unique(return_inverse=True)
    size, n_in = int(group.max()) + 1, len(scores[0])
    inside, outside = (torch.bincount(g, minlength=size) for g in (group[:n_in], group[n_in:]))
    counts = (inside.flip(0), outside.flip(0)) if positive == "in" else (outside, inside)
    return counts[0].double(), counts[1].double()


def auroc(scores_in, scores_out) -> float:
    """P(in > out) + P(in = out) / 2 for a random pair: Mann-Whitney, exact under ties. Scores are
    one-dimensional tensors, arrays or lists, here and below; ValueError for none, or NaN."""
    positives, negatives = _tie_groups(scores_in, scores_out, "in")
    above = negatives.sum() - negatives.cumsum(0)  # negatives strictly below each score
    wins = (positives * (2 * above + negatives)).sum()
    return (wins / (2 * positives.sum() * negatives.sum())).item()


def aupr(scores_in, scores_out, positive: str = "in") -> float:
    """Average precision: sum over distinct scores of (recall gained) x (precision there).

    positive="out" asks how well low scores find the out-of-distribution samples."""
    positives, negatives = _tie_groups(scores_in, scores_out, positive)
    true, false = positives.cumsum(0), negatives.cumsum(0)
    return (positives * true / (true + false)).sum().item() / positives.sum().item()


def fpr_at_tpr(scores_in, scores_out, tpr: float = 0.95, positive: str = "in") -> float:
    """Smallest false positive rate among the thresholds whose true positive rate is >= tpr."""
    if not 0 <= tpr <= 1:
        raise ValueError(f"tpr must be in [0, 1], got {tpr}")
    positives, negatives = _tie_groups(scores_in, scores_out, positive)
    if tpr == 0:
        return 0.0
    reached = positives.cumsum(0) / positives.sum() >= tpr
    return (negatives.cumsum(0) / negatives.sum())[int(reached.int().argmax())].item()


def tnr_at_tpr(scores_in, scores_out, tpr: float = 0.95, positive: str = "in") -> float:
    """True negative rate at that point: 1 - :func:`fpr_at_tpr`."""
    return 1.0 - fpr_at_tpr(scores_in, scores_out, tpr, positive)


def detection_accuracy(scores_in, scores_out) -> float:
    """Best balanced accuracy over all thresholds: max (TPR + TNR) / 2, at least one half."""
    positives, negatives = _tie_groups(scores_in, scores_out, "in")
    gain = positives.cumsum(0) / positives.sum() - negatives.cumsum(0) / negatives.sum()
    return 0.5 + 0.5 * max(gain.max().item(), 0.0)


def ood_metrics(scores_in, scores_out) -> dict[str, float]:
    """TNR at 95 % TPR, AUROC, detection accuracy and both average precisions in one dict."""
    return {
        "tnr95": tnr_at_tpr(scores_in, scores_out),
        "auroc": auroc(scores_in, scores_out),
        "detection_accuracy": detection_accuracy(scores_in, scores_out),
        "aupr_in": aupr(scores_in, scores_out),
        "aupr_out": aupr(scores_in, scores_out, positive="out"),
    }


if __name__ == "__main__":
    # Ten Gaussian classes and a small network trained until it is over-confident.
    draw = torch.Generator().manual_seed(0)
    centres = 0.5 + 0.15 * torch.randn(10, 1, 6, 6, generator=draw)

    def sample(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(10, (count,), generator=draw)
        return (centres[y] + 0.25 * torch.randn(count, 1, 6, 6, generator=draw)).clamp(0, 1), y

    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 128), nn.ReLU(), nn.Linear(128, 10))
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=draw))
    train_x, train_y = sample(400)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(net(train_x), train_y).backward()
        optimizer.step()

    (val_x, val_y), (x, y) = sample(2000), sample(2000)
    clean = evaluate(net, [(x, y)])
    z = predict(net, [(x, y)])[0]
    T = fit_temperature(*predict(net, [(val_x, val_y)]))
    print(f"clean error {clean['error']:.3f}, accuracy minus confidence {clean['gap']:+.3f}")
    ece_T = expected_calibration_error(z / T, y)
    print(f"ECE {clean['ece']:.3f} -> {ece_T:.3f} after one temperature T = {T:.2f}; "
          f"NLL {clean['nll']:.3f} -> {nll(z / T, y):.3f}")
    for k in (2, 8):
        sign = torch.randn(x.shape, generator=draw).sign()
        attacks = {"random signs": (x + k / 255 * sign).clamp(0, 1),
                   "FGSM": fgsm(net, x, y, k / 255), "PGD-10": pgd(net, x, y, k / 255, k / 1020)}
        errors = {name: evaluate(net, [(a, y)])["error"] for name, a in attacks.items()}
        print(f"error at eps {k}/255:", ", ".join(f"{name} {e:.3f}" for name, e in errors.items()))
    hidden = evaluate(net, [(occlude(x, 3, fill=0.5), y)])
    print(f"centre 3x3 occluded: error {hidden['error']:.3f}")
    noise = torch.rand(x.shape, generator=draw)
    found = ood_metrics(ood_score(z), ood_score(net(noise).detach()))
    print("uniform noise as out-of-distribution:",
          ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    print("claim: signs of the gradient hurt far more than random ones; one number repairs the ECE")
