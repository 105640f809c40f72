"""Neural Hybrid Automata: Learning Dynamics with Multiple Modes and Stochastic Transitions
(Poli*, Massaroli*, Scimeca, Oh, Chun, Yamashita, Asama, Park, Garg; NeurIPS 2021,
arXiv:2106.04165).

A stochastic hybrid system follows one of several vector fields, its mode z, and jumps at events:

    dx/dt = F_z(t, x)    between events
    z -> z' when a guard g(t, x) crosses 0, or at random with P(event in dt) = lambda(t, x) dt
    x(t+) = J(t, x(t-))  at the event

NHA learns one from trajectories without knowing the modes, how many there are, or why they switch:

    1. segment the trajectories at events                                    segment, pack_pieces
    2. encoder: piece -> one-hot mode q (straight-through categorical);     ModeEncoder, ModeDecoder
       decoder: dx/dt = sum_j q_j f_j(x); both trained by reconstruction     train_mode_recovery
    3. a normalizing flow per pair of modes for the time to the next event   EventModule,
       p(tau, z' | z), and a jump map; then the model generates              NHA.generate

Before these come the tools: ODE solvers whose steps, time grids, events and failures belong to each
sample of a batch, hybrid simulation, systems with exact laws, spline flows. The part from "ODE
solvers" to "events" can be copied alone.

States are (B, n), solutions (T, B, n), times float64 whatever the state's dtype. Fields, guards,
intensities and jumps are row-wise functions of (t (B,), x (B, n)) and may be called on a subset of
the rows, so constants of a sample belong into its state, with derivative 0.

>>> solution = odeint(lambda t, y: -y, torch.ones(2, 1), [0.0, 1.0, 2.0])
>>> [round(v, 4) for v in solution.ys[:, 0, 0].tolist()]
[1.0, 0.3679, 0.1353]
>>> ball = odeint_hybrid(BouncingBall(), torch.tensor([[1.0, 0.0]]).double(), 0, [0.0, 1.0])
>>> round(float(ball.event_times[0, 0]), 6)                         # sqrt(2 / g)
0.451524

`python nha.py` recovers the modes of a TCP connection: the two growth laws and their rates.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; available: {', '.join(choices)}")


def _check_positive(**values: float | None) -> None:
    """Numbers above 0 (whole ones: at least 1); None stands for "not given"."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")


@lru_cache(maxsize=256)
def _sizes(shapes: str) -> list[list[str]]:
    return [[size for size in re.split(", ?", shape) if size]
            for shape in re.findall(r"\((.*?)\)", shapes)]


def _expect(shapes: str, *values: Tensor | None) -> None:
    """Tensors of shapes such as "x (S, n), q (S, 3)": a letter is one size in all of them, "..."
    any sizes. None is as good as a size of 0."""
    found: dict[str, int] = {}
    for sizes, value in zip(_sizes(shapes), values):
        shape = value.shape if isinstance(value, Tensor) else (0,) if value is None else ()
        if sizes[0] == "...":
            sizes, shape = sizes[1:], shape[1 - len(sizes) :]
        if len(sizes) != len(shape) or any(
                size != found.setdefault(name, int(name) if name.isdigit() else size)
                for name, size in zip(sizes, shape)):
            given = (tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in values)
            raise ValueError(f"expected {shapes}, got {', '.join(map(str, given))}")


def _per_sample(name: str, value, samples: int, device, dtype=None) -> Tensor:
    value = torch.as_tensor(value, device=device, dtype=dtype)
    if value.shape not in ((), (1,), (samples,)):
        raise ValueError(f"{name} must be one number or ({samples},), not {tuple(value.shape)}")
    return value.expand(samples)


def _check_modes(name: str, z: Tensor, n_modes: int) -> Tensor:
    _expect(f"{name} (N,)", z)
    if z.is_floating_point() or bool(((z < 0) | (z >= n_modes)).any()):
        raise ValueError(f"{name} must be modes (integers) in 0..{n_modes - 1}")
    return z.long()


# ---- ODE solvers ---------------------------------------------------------------------------------
class Tableau(NamedTuple):
    """Runge-Kutta: k_i = f(t + c_i h, y + h sum_j a_ij k_j), y(t + h) = y + h sum_i b_i k_i.

    The last stage of an adaptive method is taken at y(t + h), so it is the first of the next step.
    error = b - b_hat; dense output: y(t + theta h) = y + h sum_i k_i sum_p dense_ip theta^p."""
    order: int
    c: list[float]
    a: list[list[float]]
    b: list[float]
    error: list[float] | None = None
    dense: list[list[float]] | None = None


def _adaptive(order, c, a, error, mid=None, quartic=None) -> Tableau:
    """`mid`: weights of y(t + h/2), which with both end points and slopes fix a quartic in theta;
    `quartic`: its coefficients of theta^2..theta^4 where a method has its own."""
    b, first, last = a[-1] + [0], [1] + [0] * (len(c) - 1), [0] * (len(c) - 1) + [1]
    if mid is not None:
        quartic = [[e - 4 * s - 5 * y + 16 * m, 5 * s - 3 * e + 14 * y - 32 * m,
                    2 * e - 2 * s - 8 * y + 16 * m] for s, e, y, m in zip(first, last, b, mid)]
    return Tableau(order, c, a, b, error, [[s, *row] for s, row in zip(first, quartic)])


METHODS = {
    "euler": Tableau(1, [0], [[]], [1]),
    "midpoint": Tableau(2, [0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "heun": Tableau(2, [0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "rk4": Tableau(4, [0, 1 / 2, 1 / 2, 1], [[], [1 / 2], [0, 1 / 2], [0, 0, 1]],
                   [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    "rk4_38": Tableau(4, [0, 1 / 3, 2 / 3, 1], [[], [1 / 3], [-1 / 3, 1], [1, -1, 1]],
                      [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
    "bosh3": _adaptive(
        3, c=[0, 1 / 2, 3 / 4, 1], a=[[], [1 / 2], [0, 3 / 4], [2 / 9, 1 / 3, 4 / 9]],
        error=[2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8], mid=[0, 1 / 2, 0, 0]),
    "dopri5": _adaptive(
        5, c=[0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1],
        a=[[], [1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9],
           [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
           [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
           [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]],
        error=[35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720,
               -2187 / 6784 + 12231 / 42400, 11 / 84 - 649 / 6300, -1 / 60],
        mid=[6025192743 / 60171106304, 0, 51252292925 / 130801643196, -2691868925 / 90256659456,
             187940372067 / 3189068634112, -1776094331 / 39487288512, 11237099 / 470086768]),
    "tsit5": _adaptive(
        5, c=[0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1],
        a=[[], [0.161], [-0.008480655492356989, 0.335480655492357],
           [2.897153057105493, -6.359448489975075, 4.362295432869581],
           [5.325864828439257, -11.74888356406283, 7.495539342889836, -0.09249506636175525],
           [5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401,
            -0.028269050394068383],
           [0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081,
            2.324710524099774]],
        error=[0.001780011052225772, 0.0008164344596567469, -0.007880878010261996,
               0.1447110071732629, -0.5823571654525552, 0.4580821059291869, -1 / 66],
        quartic=[[-2.763706197274826, 2.9132554618219126, -1.0530884977290216],
                 [0.1317, -0.2234, 0.1017],
                 [3.9302962368947516, -5.941033872131505, 2.490627285651253],
                 [-12.411077166933676, 30.33818863028232, -16.548102889244902],
                 [37.50931341651104, -88.1789048947664, 47.37952196281928],
                 [-27.896526289197286, 65.09189467479366, -34.87065786149661], [1.5, -4, 2.5]]),
}  # fmt: skip
# torchdiffeq's middle state of bosh3 is of first order: no event can be found on it. The cubic
# through both ends and slopes instead.
_TABLEAUS = METHODS | {"bosh3_cubic": _adaptive(
    3, *METHODS["bosh3"][1:3], METHODS["bosh3"].error, mid=[17 / 72, 1 / 6, 2 / 9, -1 / 8])}


def _with_events(method: str) -> str:
    return "bosh3_cubic" if method == "bosh3" else method


@lru_cache(maxsize=64)
@torch.inference_mode(False)                        # a solve with gradients may use them next
def _tensors(method: str, dtype: torch.dtype, device: torch.device) -> Tableau:
    """The tableau as tensors: a (S, S) and error (S,) in the state's dtype, c (S, 1) and dense
    (S, 4) in float64, since times are."""
    tab = _TABLEAUS[method]
    a = [row + [0] * (len(tab.c) - len(row)) for row in tab.a]
    tensor = lambda v, dtype=torch.float64: torch.tensor(v or [], dtype=dtype).to(device)
    return tab._replace(a=tensor(a, dtype), error=tensor(tab.error, dtype),
                        c=tensor(tab.c)[:, None], dense=tensor(tab.dense))


class Stats(NamedTuple):
    n_accepted: Tensor  # (B,) int64
    n_rejected: Tensor
    n_f: Tensor         # evaluations of f that the sample needed
    success: Tensor     # (B,) bool


class Solution(NamedTuple):
    ys: Tensor          # (T, B, n)
    ts: Tensor
    stats: Stats
    dense: Callable | None


class _Steps(NamedTuple):
    """The attempts of `_march` in N rows: attempt after attempt, one row per sample tried in it."""
    starts: list[int]   # first row of each of the A attempts
    sample: Tensor      # (N,)
    offset: Tensor      # (N,) float64: signed time from the sample's start to the start of the step
    h: Tensor           # (N,) float64, signed
    y: Tensor           # (N, n) state at the start of the step
    hk: Tensor          # (S, N, n) h k_i
    accepted: Tensor    # (M,) the rows that were accepted
    ends: Tensor        # (B, A) |time| that a sample has reached after each attempt
    row: Tensor         # (B, A) its row in each attempt that it took part in
    stats: Stats
    message: str        # why samples failed, "" when none did

    def find(self, distance: Tensor, sample=slice(None)) -> Tensor:
        """Rows (B, K) of the steps in which samples reach distances (B, K), at most their last;
        of distances (Q, K) for the samples `sample` (Q,)."""
        ends = self.ends[sample]
        at = torch.searchsorted(ends, torch.minimum(distance, ends[:, -1:]))
        return self.row[sample].gather(1, at)


def _norm(x: Tensor, shared: bool) -> Tensor:
    """Root mean square of each sample (B,), or that of the whole batch for every sample."""
    norm = torch.linalg.vector_norm(x, dim=None if shared else -1, dtype=torch.float64)
    return (norm / x.numel() ** 0.5).expand(len(x)) if shared else norm / x.shape[1] ** 0.5


def _step(f: Callable, t: Tensor, h: Tensor, y: Tensor, method: str, fy: Tensor | None = None):
    """A step h (B,) from (t, y), where f is fy if that is known: state at the end, slope at the
    last stage, the h k_i. That slope is f's own tensor, which f may fill again when next called."""
    tab, scale, hk = _TABLEAUS[method], h.to(y.dtype)[:, None], []

    def moved(weights):
        state = y
        for weight, change in zip(weights, hk):
            state = torch.add(state, change, alpha=weight) if weight else state
        return state

    times = (t + _tensors(method, y.dtype, y.device).c * h).to(y.dtype).unbind()
    for time, row in zip(times, tab.a):
        end = moved(row)
        slope = f(time, end) if fy is None or hk else fy
        hk.append(slope * scale)
    return moved(tab.b) if tab.error is None else end, slope, hk


def _dense(y: Tensor, hk: Tensor, theta: Tensor, method: str) -> Tensor:
    """States (..., n) at fractions theta (...) of steps from y (..., n) with hk (S, ..., n)."""
    powers = theta.expand(4, *theta.shape).cumprod(0).flatten(1)
    weights = (_tensors(method, y.dtype, y.device).dense @ powers).to(y.dtype)
    return y + (weights.view(len(weights), *theta.shape, 1) * hk).sum(0)


@torch.no_grad()
def _first_step(f, t, y, fy, sign, method, rtol, atol, shared) -> Tensor:
    """Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4."""
    scale = atol + rtol * y.abs()
    d0, d1 = _norm(y / scale, shared), _norm(fy / scale, shared)
    h0 = torch.where(torch.minimum(d0, d1) < 1e-5, 1e-6, 0.01 * d0 / d1)
    step = sign * h0
    f1 = f((t + step).to(y.dtype), torch.addcmul(y, fy, step.to(y.dtype)[:, None]))
    largest = torch.maximum(d1, _norm((f1 - fy) / scale, shared) / h0)
    h1 = (0.01 / largest) ** (1 / _TABLEAUS[method].order)
    return torch.minimum(100 * h0, torch.where(largest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), h1))


def _error_ratio(y, y1, hk, method, rtol, least, shared) -> Tensor:
    """Norm (B,) of the error estimate over the tolerance, inf where it is NaN."""
    weights, kind = _tensors(method, y.dtype, y.device).error, y.device.type
    rounds = torch.is_autocast_enabled(kind)                # it would round the terms on a GPU
    with torch.autocast(kind, enabled=False) if rounds else nullcontext():
        error = torch.mv(hk.detach().view(len(hk), -1).t(), weights).view_as(y)
    largest = torch.maximum(y.detach().abs(), y1.detach().abs())
    tolerance = torch.add(least, largest, alpha=rtol)
    return _norm(error.div_(tolerance), shared).nan_to_num(math.inf)


def _growth(ratio: Tensor, ok: Tensor, order: int, memory: list) -> tuple[Tensor, list]:
    """Factor (B,) of the step size. The PI controller's memory holds the ratio of the last accepted
    step, and the most growth: none after a rejection."""
    if not memory:
        return (0.9 * ratio ** (-1 / order)).clamp(0.2, 10).maximum(ok), memory
    before, most = memory
    factor = (0.9 * ratio ** (-0.7 / order) * before ** (0.4 / order)).clamp(0.2, 10).minimum(most)
    return factor, [torch.where(ok, ratio.clamp(min=1e-4), before), 1 + 9 * ok.double()]


def _march(f, y, fy, start, span, method, *, rtol, atol, shared=False, max_steps=10_000,
           first_step=None, controller="I", watch=None, check_every=None) -> _Steps:
    """Adaptive steps from `start` (B,) over the signed time `span` (B,), every sample at its own
    pace. Finished samples leave the batch at the next check; on a GPU that is every 8 attempts,
    since the check is the only point where the host waits. Steps overshoot the end, except under
    `watch`. Where gradients are enabled, `y` and `hk` carry them; step sizes are constants."""
    tab, every = _TABLEAUS[method], check_every or (1 if y.device.type == "cpu" else 8)
    samples, t, sign, end = len(y), start, torch.ones_like(span).copysign(span), span.abs()
    rows, offset, fy = torch.arange(samples, device=y.device), torch.zeros_like(span), fy.clone()
    h = sign * (first_step or _first_step(f, t, y, fy, sign, method, rtol, atol, shared))
    memory = [torch.ones_like(h), torch.full_like(h, 10.0)] if controller == "PI" else []
    active, failed = end > 0, torch.zeros_like(rows, dtype=torch.bool)
    least, tail = y.new_full((), atol), None
    narrow = (not shared and y.shape[1] <= NARROW and y.itemsize >= 4   # no system solves in half
              and not torch.is_autocast_enabled(y.device.type)
              and not torch._C._are_functorch_transforms_active())
    history, reached, starts = [], [], [0]
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        for attempt in itertools.count():
            if attempt % every == 0 or attempt >= max_steps:
                alive = int(active.sum())
                if alive == 0 or attempt >= max_steps:
                    break
                if alive < 0.75 * len(rows):
                    keep = active.nonzero()[:, 0]
                    rows, t, offset, y, fy, h, end, active, *memory = (
                        v.index_select(0, keep) for v in
                        (rows, t, offset, y, fy, h, end, active, *memory))
                if (narrow and len(rows) <= FEW and torch.is_grad_enabled()
                        and bool(((end - offset.abs()) / h.abs() > MANY).any())):
                    tail = starts[-1], rows, t + offset, y
                    torch.set_grad_enabled(False)               # until the end of this block
            step = h
            if watch:
                left = end - offset.abs()
                step = torch.where(h.abs() < left, h, left.copysign(h))
            y1, f1, hk = _step(f, t + offset, step, y, method, fy)
            hk = torch.stack(hk)
            ratio = _error_ratio(y, y1, hk, method, rtol, least, shared)
            ok = (ratio <= 1) & active
            history.append((rows, offset, step, y, hk, ok, active))
            factor, memory = _growth(ratio, ok, tab.order, memory)
            there = offset + step
            if attempt % 8 == 7:                            # steps that no longer move the time
                stalled = active & (t + there == t + offset) & ~(ok & (there.abs() >= end))
                failed.index_put_((rows,), stalled, accumulate=True)
                active = active & ~stalled
            if watch:
                active = active & ~watch(rows, t.detach() + offset, step, y, hk, ok)
                there = torch.where(step == h, there, end.copysign(h))
                factor = torch.where(ok & (step != h) & (factor > 1), h / step, factor)
            if every == 1 and bool(ok.all()):               # elsewhere asking would cost a wait
                offset, y, fy = there, y1, f1.clone()
            else:
                offset, took = torch.where(ok, there, offset), ok[:, None]
                y, fy = torch.where(took, y1, y), torch.where(took, f1, fy)
            h, distance = step * factor, offset.abs()
            active = active & (distance < end)
            reached.append(distance)
            starts.append(starts[-1] + len(rows))

    if not history:                                         # every span is 0
        history = [(rows, offset, h, y, torch.stack([y] * len(tab.c)), active, active)]
        reached, starts = [offset], [0, samples]
    if alive:
        failed[rows] |= active
    rows, offset, h, y, hk, ok, tried = (torch.cat(v, int(i == 4)) for i, v in
                                         enumerate(zip(*history)))
    accepted, number = ok.nonzero()[:, 0], torch.arange(len(rows), device=y.device)
    attempt = torch.searchsorted(torch.tensor(starts, device=y.device), number, right=True) - 1
    table = lambda v: v.new_zeros(samples, len(starts) - 1).index_put((rows, attempt), v)
    ends, row = table(torch.cat(reached)).cummax(1).values, table(number)
    message = ""
    if bool(failed.any()):
        reason = f"max_steps={max_steps} exceeded" if alive else "the step size underflowed"
        first = int(failed.nonzero()[0, 0])
        message = (f"{reason} for {int(failed.sum())} of {samples} samples, first sample {first}, "
                   f"|t - t0| = {float(ends[first, -1]):.6g}")
    count = lambda samples_of: torch.bincount(samples_of, minlength=samples)
    tries, steps = count(rows[tried]), count(rows[accepted])
    evaluations = 1 + (first_step is None) + (len(tab.c) - 1) * tries
    steps = _Steps(starts[:-1], rows, offset, h, y, hk, accepted, ends, row,
                   Stats(steps, tries - steps, evaluations, ~failed), message)
    return _trace(f, steps, start, *tail, method) if tail else steps


def _interpolate(steps: _Steps, offset: Tensor, y0: Tensor, method: str, sample=slice(None)):
    """States (B, K, n) at signed times `offset` (B, K) from the start, NaN after a failure; with
    `sample` (Q,), those of these samples at times (Q, K)."""
    distance = offset.detach().abs().contiguous()
    row = steps.find(distance, sample).flatten()
    theta = (offset.flatten() - steps.offset[row]) / steps.h[row]
    y = _dense(steps.y.index_select(0, row), steps.hk.index_select(1, row), theta, method)
    y = y.view(*offset.shape, y.shape[1])
    y = torch.where((distance == 0)[..., None], y0[sample][:, None], y)
    if steps.message:
        lost = ~steps.stats.success[sample][:, None] & (distance > steps.ends[sample][:, -1:])
        y = y.masked_fill(lost[..., None], math.nan)
    return y


# Gradients of a solve are those of its accepted steps; a large or wide batch records them as it
# goes. A few samples would spend their time on many small calls: there all stages of all steps are
# evaluated again as one batch, once their inputs are known. n vector products with it give the
# Jacobians J of h f, and the stages of a step solve a triangular system,
#     hk_i = J_i (y + sum_j a_ij hk_j), i > 0,
# so that only one small product per step remains sequential.
NARROW = 4                      # widest state that is unrolled
FEW = 64                        # most samples
MANY = 3                        # a rest of fewer steps is cheaper recorded


class _Unroll(torch.autograd.Function):
    """Identity on the traced rows of (y, hk), whose backward gives gradients to y0, the states
    `samples` are in when the trace begins, and to k, the values of f there and at the stages, in
    all `points`, where its Jacobians are jacobian(points, k)."""

    @staticmethod
    def forward(ctx, k, y0, points, jacobian, steps, kept, begin, samples, method):
        ctx.save_for_backward(points, k)
        ctx.more = jacobian, steps, kept, begin, samples, _tensors(method, y0.dtype, y0.device).a
        return steps.y[begin:], steps.hk[:, begin:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_hk):
        jacobian, steps, kept, begin, samples, a = ctx.more
        (s, _, n), m, new_zeros = grad_hk.shape, len(kept), grad_hk.new_zeros
        jacobian = jacobian(*ctx.saved_tensors)
        unit = torch.eye(n, dtype=grad_hk.dtype, device=grad_hk.device)
        first, h = jacobian[: len(samples)], steps.h[kept].to(unit)[:, None, None]
        later = jacobian[len(samples) :].view(s - 1, m, n, n).transpose(0, 1) * h[..., None]
        jacobian = F.pad(later, (0, 0, 0, 0, 1, 0)).view(m, s, n, 1, n)
        # Cotangents of a step's hk, as rows: what comes from its own outputs, then what comes from
        # each component of the cotangents of its end state and of the slope there.
        g = new_zeros(m, 1 + 2 * n, s, n)
        g[:, 0], g[:, 1 + n :, -1] = grad_hk[:, kept - begin].transpose(0, 1), unit / h
        g[:, 1 : 1 + n] = a[-1][:, None] * unit[:, None]
        system = (jacobian * -a[:, None, :, None]).view(m, s * n, s * n)        # + 1
        g = torch.linalg.solve_triangular(system, g.flatten(2), upper=False, left=False,
                                          unitriangular=True)
        gy = g @ jacobian.view(m, s * n, n)
        gy[:, 0] += grad_y[kept - begin]
        gy[:, 1 : 1 + n] += unit
        # Backwards through the steps: each receives the cotangents of its end state and the slope.
        carried, received = new_zeros(len(steps.row), 1, 2 * n), []
        cuts = torch.searchsorted(kept, kept.new_tensor(steps.starts[1:])).tolist()
        both = torch.cat([gy, g[..., :n] * h], -1).tensor_split(cuts)
        for sample, step in reversed(list(zip(steps.sample[kept].tensor_split(cuts), both))):
            received.append(carried[sample])
            carried[sample] = torch.baddbmm(step[:, :1], received[-1], step[:, 1:])
        end, slope = carried[samples].split(n, -1)
        grad_k = torch.baddbmm(g[:, :1], torch.cat(received[::-1]), g[:, 1:]) * h
        grad_k = grad_k.view(m, s, n)[:, 1:].transpose(0, 1).reshape(-1, n)
        grad_y0 = (end + slope @ first)[:, 0]
        return torch.cat([slope[:, 0], grad_k]), grad_y0, *(None,) * 7


@torch.enable_grad()
def _jacobian(f, times: Tensor, points: Tensor, k: Tensor) -> Tensor:
    """The derivatives (P, n, n) of k = f(times, points) in each of the points (P, n)."""
    n, pull = points.shape[1], partial(torch.autograd.grad, materialize_grads=True)
    unit = torch.eye(n, dtype=k.dtype, device=k.device)
    if not k.requires_grad:                                 # f depends on nothing
        return points.new_zeros(*points.shape, n)
    try:
        rows = [pull(k, points, row.expand_as(k), retain_graph=True)[0] for row in unit]
    except RuntimeError:        # a compiled f allows one product with its graph: of n copies, then
        copies = points.detach().repeat(n, 1).requires_grad_()
        row = unit.repeat_interleave(len(points), 0)
        rows = pull(f(times.repeat(n), copies).to(k.dtype), copies, row)[0].chunk(n)
    return torch.stack(tuple(rows), 1)


def _trace(f, steps: _Steps, start, begin: int, samples, t, y0, method) -> _Steps:
    """Attach the rows from `begin` on, where `samples` were in states y0 at times t, to the graph
    of y0, start, t and everything f uses."""
    kept = steps.accepted[steps.accepted >= begin] if begin else steps.accepted
    if len(kept) == 0:
        return steps
    weights = _tensors(method, y0.dtype, y0.device)
    hk = steps.hk.index_select(1, kept)
    times = start[steps.sample[kept]] + steps.offset[kept] + weights.c[1:] * steps.h[kept]
    points = steps.y[kept] + (weights.a[1:] @ hk.flatten(1)).view_as(hk[1:])
    points = torch.cat([y0, points.flatten(0, 1)]).detach().requires_grad_()
    times = torch.cat([t, times.flatten()]).to(y0.dtype)
    k = f(times, points).to(y0.dtype)
    jacobian = partial(_jacobian, f, times.detach())
    y, hk = _Unroll.apply(k, y0, points, jacobian, steps, kept, begin, samples, method)
    if begin:
        y, hk = torch.cat([steps.y[:begin], y]), torch.cat([steps.hk[:, :begin], hk], 1)
    return steps._replace(y=y, hk=hk)


GAUSS = ((0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5), (5 / 18, 8 / 18, 5 / 18))    # nodes, weights


class _Adjoint(torch.autograd.Function):
    """da/dt = -a^T df/dy backwards with y, restarted from the stored y at every output. Step sizes
    are controlled by (y, a) only ("seminorm"), so the parameters' integral of a^T df/dtheta is a
    quadrature on the dense output of the finished steps, and takes one batched vector product."""

    @staticmethod
    def forward(ctx, f, y0, times, method, options, solved, *params):
        ctx.more = f, method, options
        ctx.save_for_backward(solved, times, *params)
        return solved.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (f, method, options), (ys, times, *params) = ctx.more, ctx.saved_tensors
        _, b, n = ys.shape
        # With a shared step f sees the whole batch at one time here too.
        each = f if not options["shared"] else lambda t, y: torch.cat(
            [f(*part) for part in zip(t.split(b), y.split(b))])
        alive = ys.isfinite().all(-1, keepdim=True)         # rows after a failure are constants
        ys, grad = torch.where(alive, ys, ys[0]), grad.masked_fill(~alive, 0)
        grad_t, grad_p = None, [torch.zeros_like(p) for p in params]

        def augmented(t, s):
            with torch.enable_grad():
                y, pull = s[:, :n].detach().requires_grad_(), None
                k = f(t, y)
                if k.requires_grad:
                    pull = torch.autograd.grad(k, y, s[:, n:], allow_unused=True)[0]
            return torch.cat([k.detach(), torch.zeros_like(y) if pull is None else -pull], 1)

        a = grad[-1]
        for i in range(len(times) - 1, 0, -1):
            s, span = torch.cat([ys[i], a], 1), (times[i - 1] - times[i]) * alive[i, :, 0]
            fs = augmented(times[i].to(s.dtype), s)
            steps = _march(augmented, s, fs, times[i], span, method, **options)
            if steps.message:
                raise RuntimeError(f"adjoint: {steps.message}; grad='backprop' solves only once")
            a = _interpolate(steps, span[:, None], s, method)[:, 0, n:]
            if params:
                rows = steps.accepted
                sample, offset, h = steps.sample[rows], steps.offset[rows], steps.h[rows]
                part = ((span[sample] - offset) / h).clamp(max=1)
                nodes, weights = part.new_tensor(GAUSS)[..., None] * part
                t = (times[i][sample] + offset + nodes * h).flatten().to(s.dtype)
                points = _dense(steps.y[rows], steps.hk[:, None, rows], nodes, method)
                with torch.enable_grad():
                    k = each(t, points[..., :n].reshape(-1, n))
                    pull = (points[..., n:] * (weights * h).to(s.dtype)[..., None]).reshape(-1, n)
                    found = torch.autograd.grad(k, params, pull, allow_unused=True)
                grad_p = [g if d is None else g - d for g, d in zip(grad_p, found)]
            a = a + grad[i - 1]
        if ctx.needs_input_grad[2]:
            slopes = each(times.reshape(-1).to(ys.dtype), ys.reshape(-1, n)).view_as(ys)
            later = torch.cat([grad[:1] - a, grad[1:]])
            grad_t = (slopes * later).sum(-1).to(times.dtype)
        return None, a, grad_t, None, None, None, *grad_p


def _first_slope(f: Callable, t: Tensor, y: Tensor) -> Tensor:
    fy = f(t.to(y.dtype), y)
    if fy.shape != y.shape:
        raise ValueError(f"f returned shape {tuple(fy.shape)}, the state is {tuple(y.shape)}")
    if torch.promote_types(fy.dtype, y.dtype) != y.dtype:
        raise TypeError(f"f returned {fy.dtype}, the state is {y.dtype}")
    finite = fy.detach().isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(f"f(t0, y0) is not finite for sample {row}")
    return fy


def _check_problem(name: str, y0: Tensor, method: str, adaptive: str = "") -> None:
    """`adaptive` names what cannot use a fixed-step method."""
    if not isinstance(y0, Tensor) or not y0.is_floating_point():
        got = f"one of {y0.dtype}" if isinstance(y0, Tensor) else type(y0).__name__
        raise TypeError(f"{name} must be a floating point tensor, not {got}")
    if y0.dim() != 2 or y0.numel() == 0:
        raise ValueError(f"{name} must be (B, n) and not empty, not {tuple(y0.shape)}")
    _check_choice("method", method, tuple(METHODS))
    if adaptive and METHODS[method].error is None:
        raise ValueError(f"{adaptive} needs an adaptive method, not {method!r}")


def _check_times(t, y0: Tensor) -> Tensor:
    """(T, B) float64 times, monotone per sample; a per-sample grid may repeat its last time."""
    t = torch.as_tensor(t, device=y0.device).to(torch.float64)
    if t.dim() not in (1, 2) or t.shape[0] < 1 or (t.dim() == 2 and t.shape[1] != len(y0)):
        raise ValueError(f"t must be (T,) or (T, {len(y0)}) with T >= 1, not {tuple(t.shape)}")
    change = t.detach().diff(dim=0)
    onward = change * change[:1] > 0
    if t.dim() == 2:
        onward |= (change != 0).flip(0).cumsum(0).flip(0) == 0
    if not bool(onward.all() & t.isfinite().all()):
        raise ValueError("t must be finite and strictly increasing or strictly decreasing")
    return t if t.dim() == 2 else t[:, None].expand(-1, len(y0))


def _fixed(f: Callable, y: Tensor, times: Tensor, method: str,
           step_size: float | None = None) -> tuple[Tensor, int]:
    """Through `times` (T, B) in one step per interval, or equal ones no longer than step_size:
    states (T, B, n), number of steps."""
    ys, count = [y], 0
    for t, t1 in itertools.pairwise(times):
        parts = 1
        if step_size is not None:
            parts = max(1, math.ceil(float((t1 - t).detach().abs().max()) / step_size - 1e-9))
        h = (t1 - t) / parts
        for part in range(parts):
            y = _step(f, t + part * h, h, y, method)[0]
        count += parts
        ys.append(y)
    return torch.stack(ys), count


def odeint(f: Callable, y0: Tensor, t, *, method: str = "dopri5", rtol: float = 1e-6,
           atol: float = 1e-8, grad: str = "backprop", per_sample: bool = True,
           step_size: float | None = None, max_steps: int = 10_000, first_step: float | None = None,
           controller: str = "I", dense: bool = False, on_failure: str = "raise",
           params: Sequence[Tensor] | None = None, vector_time: bool = True) -> Solution:
    """Solve dy/dt = f(t, y), y(t[0]) = y0 (B, n) at times t (T,) or (T, B), rising or falling.

    f(t (B,), y (B, n)) -> (B, n); with vector_time=False t is a scalar. Adaptive methods (bosh3,
    dopri5, tsit5) choose steps for each sample, so f sees some rows only, and interpolate at t
    (bosh3 less accurately than it steps, as torchdiffeq); with per_sample=False the batch has one
    step, as in torchdiffeq, and f always sees all of it: it may couple its rows or close over a
    tensor with one row for each. Fixed-step methods (euler, midpoint, heun, rk4, rk4_38) take one
    step per interval of t, or steps of at most `step_size`. `max_steps` counts attempts.
    Gradients (first order): "backprop" of the accepted steps, to y0, t and whatever f uses;
    "adjoint" of a second ODE backwards, with the memory of the outputs only, to y0, t and `params`
    (after a fixed-step method, solved by dopri5).
    on_failure="mask" gives NaN rows from the failure on and stats.success False, not an error.
    With dense=True, Solution.dense(t), t scalar or (B,), is the state at any time in between; a
    fixed-step method steps there from the output before."""
    _check_problem("y0", y0, method)
    fixed = METHODS[method].error is None
    _check_choice("grad", grad, ("backprop", "adjoint", "none"))
    _check_choice("controller", controller, ("I", "PI"))
    _check_choice("on_failure", on_failure, ("raise", "mask"))
    _check_positive(rtol=rtol, atol=atol, step_size=step_size, max_steps=max_steps,
                    first_step=first_step)
    if isinstance(t, (list, tuple)) and t:  # as_tensor would round numbers and detach tensors in it
        t = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=y0.device) for v in t])
    ts = torch.as_tensor(t).clone()                         # a caller may reuse t, and y0
    times, y0 = _check_times(ts, y0), y0.clone() if dense else y0
    if not per_sample and ts.dim() == 2:
        raise ValueError("per_sample=False takes one time grid t (T,), not one per sample")
    field = f
    if not vector_time and ts.dim() == 1 and (not fixed or not dense) and (
            not per_sample or fixed and grad != "adjoint"):
        field = lambda t, y: f(t[0], y)
    elif not vector_time:
        field = lambda t, y: torch.vmap(lambda t, y: f(t, y[None])[0])(t, y)
    tracing = grad != "none" and torch.is_grad_enabled()
    adjoint = tracing and grad == "adjoint"
    with torch.set_grad_enabled(tracing):
        f0 = _first_slope(field, *((times[0].detach(), y0.detach()) if adjoint else (times[0], y0)))
    start, sample = times[0], torch.arange(len(y0), device=y0.device)
    span = (times[-1] - start).detach()
    limits = dict(rtol=rtol, atol=atol, max_steps=max_steps, controller=controller,
                  shared=not per_sample)
    needs = tracing and (y0.requires_grad or times.requires_grad or f0.requires_grad)
    recording = (tracing if fixed else needs) and not adjoint
    with torch.set_grad_enabled(recording):
        if fixed:
            ys, count = _fixed(field, y0, times, method, step_size)
            lost = ~ys.detach().isfinite().all(-1).cummin(0).values
            taken, message = torch.full_like(sample, count), ""
            if bool(lost.any()):
                message = f"no finite state for sample {int(lost[-1].nonzero()[0, 0])}"
                ys = ys.masked_fill(lost[..., None], math.nan)
            stats = Stats(taken, 0 * taken, len(METHODS[method].c) * taken, ~lost[-1])
        else:
            steps = _march(field, y0, f0, start, span, method, first_step=first_step, **limits)
            stats, message = steps.stats, steps.message
            later = _interpolate(steps, (times[1:] - start).T, y0, method)
            ys = torch.cat([y0[None], later.transpose(0, 1)])
    if message and on_failure == "raise":
        raise RuntimeError(f"odeint: {message}")
    if needs and adjoint:
        if params is None:
            params = f.parameters() if isinstance(f, nn.Module) else []
            params = [p for p in params if p.requires_grad]
            if f0.requires_grad and not params:
                raise ValueError("grad='adjoint' needs params= when f is not an nn.Module")
        ys = _Adjoint.apply(field, y0, times, "dopri5" if fixed else method, limits, ys, *params)

    def evaluate(t) -> Tensor:
        at = _per_sample("t", t, len(y0), y0.device, torch.float64) - start
        if bool(((at * span.sign() < -1e-12) | (at.abs() > span.abs() * (1 + 1e-12))).any()):
            raise ValueError("dense(t): t lies outside the solved interval")
        if not fixed:
            return _interpolate(steps, at[:, None], y0, method)[:, 0]
        last = ((times - start).abs() <= at.abs()).sum(0) - 1
        ends = torch.stack([times[last, sample], start + at])
        with torch.set_grad_enabled(recording and torch.is_grad_enabled()):
            return _fixed(field, ys[last, sample], ends, method, step_size)[0][-1]

    return Solution(ys, ts, stats, evaluate if dense else None)


# ---- events --------------------------------------------------------------------------------------
class EventResult(NamedTuple):
    t_event: Tensor     # (B,) float64; t_max where nothing fired
    y_event: Tensor     # (B, n) state at t_event, before any jump
    which: Tensor       # (B,) int64 index of the guard, -1 where nothing fired
    fired: Tensor       # (B,) bool


def _along_flow(guard: Callable, t: Tensor, y: Tensor, fy: Tensor) -> tuple[Tensor, Tensor]:
    """Guards (B, E) and their total time derivatives g_t + g_y f."""
    t = t.to(y.dtype).clone()
    return torch.func.jvp(lambda t, y: guard(t, y).reshape(len(y), -1), (t, y),
                          (torch.ones_like(t), fy))


class _Watch:
    """Looks at guards during `_march`, four times per step. `side` (B, E) are their signs where the
    sample is, and stay as they are before the step in which one crosses 0 (`fired`)."""

    def __init__(self, guard, direction, t, y, fy, method, pending=None):
        self.guard, self.direction, self.method = guard, direction, method
        g, rate = _along_flow(guard, t, y, fy)
        # Right after an event the guard is zero up to rounding: the side it leaves to counts.
        near = g.abs() <= 1e-9 * rate.abs() * t.abs().clamp(min=1.0)[:, None].to(g)
        self.side = torch.where(near, rate, g).sign()
        if pending is not None:                         # crossing together with the last event
            self.side = torch.where(pending != 0, pending, self.side)
        self.fired = torch.zeros(len(y), dtype=torch.bool, device=y.device)

    def signs(self, theta, t, h, y, hk) -> Tensor:
        """(..., B, E) at fractions theta (..., B) of a step."""
        states, times = _dense(y, hk, theta, self.method), (t + theta * h).to(y.dtype)
        g = self.guard(times.reshape(-1), states.reshape(-1, y.shape[1]))
        return g.reshape(*theta.shape, -1).sign()

    def crossed(self, side: Tensor, new: Tensor) -> Tensor:
        """Whether any guard has gone from `side` to `new` in its direction, (B, E)."""
        return (side * new < 0) & ((self.direction == 0) | (self.direction == new))

    def first(self, side, t, h, y, hk):
        """The quarter (B,) of a step in which a guard crosses first, the sides before it, whether
        one crosses at all, and the sides after the step."""
        theta = torch.tensor((0.25, 0.5, 0.75, 1.0), dtype=torch.float64, device=y.device)
        theta = theta[:, None].expand(-1, len(y))
        low, before, fired = torch.zeros_like(h), side, torch.zeros_like(h, dtype=torch.bool)
        for q, new in enumerate(self.signs(theta, t, h, y, hk[:, None])):
            low, before = torch.where(fired, low, q / 4), torch.where(fired[:, None], before, side)
            fired = fired | self.crossed(side, new).any(-1)
            side = torch.where(new == 0, side, new)
        return low, before, fired, side

    @torch.no_grad()
    def __call__(self, rows, t, h, y, hk, ok) -> Tensor:
        _, _, fired, side = self.first(self.side[rows], t, h, y, hk)
        fired = fired & ok
        self.side[rows] = torch.where((ok & ~fired)[:, None], side, self.side[rows])
        self.fired[rows] |= fired
        return fired

    def locate(self, t, h, y, hk) -> tuple[Tensor, Tensor, Tensor]:
        """Bisection on the dense output of the last step: fraction (B,), which guard (B,), the
        sides (B, E) before."""
        low, before, _, _ = self.first(self.side, t, h, y, hk)
        at = lambda theta: self.crossed(before, self.signs(theta, t, h, y, hk))
        width = 0.25
        for _ in range(30):
            width /= 2
            low = torch.where(at(low + width).any(-1), low, low + width)
        which = at(low + width).to(torch.uint8).argmax(1)               # ties: the lowest index
        return low + width, which, before


def _to_event(f, y0, start, t_max, guard, direction, method, grazing_tol, pending=None, **limits):
    """Solve each sample from `start` to its first event or t_max: (EventResult, steps, pending).
    pending (B, E): the sides of guards that cross at the same time too, for the solve from there.

    The root is bracketed on the dense output, then polished by Newton on the true flow (the last
    step is taken again to the event). With t*, y* of that constant-size step attached to the graph,
        t_event = t* - g(t*, y*) / (g_t + g_y f),   y_event = y* + f(y*) (t_event - t*)
    have the right values (g = 0) and, by the implicit function theorem, the right derivatives."""
    begin = start.detach()
    f0, g0 = _first_slope(f, start, y0), guard(begin.to(y0.dtype), y0)
    if g0.dim() not in (1, 2) or len(g0) != len(y0):
        raise ValueError(f"guard returned shape {tuple(g0.shape)}, not ({len(y0)},) or "
                         f"({len(y0)}, E)")
    if direction.dim() and direction.shape != (g0[0].numel(),):
        raise ValueError(f"direction must be one int or a list of {g0[0].numel()}, one per guard")
    needs = torch.is_grad_enabled() and any(v.requires_grad for v in (f0, g0, y0, start, t_max))
    with torch.no_grad():
        watch = _Watch(guard, direction, begin, y0, f0, method, pending)
    with torch.set_grad_enabled(needs):
        steps = _march(f, y0, f0, start, t_max - begin, method, watch=watch, **limits)
    if steps.message:
        raise RuntimeError(f"event search: {steps.message}")
    fired, last = watch.fired, steps.find((t_max - begin)[:, None])[:, 0]
    offset, h, y, hk = steps.offset[last], steps.h[last], steps.y[last], steps.hk[:, last]

    def step_to(size, t):
        """State after a step `size`, slope there, the h k_i, the guard and its rate along f."""
        state, slope, hk1 = _step(f, t, size, y, method, hk[0] / h.to(y.dtype)[:, None])
        g, rate = _along_flow(guard, t + size, state, slope.detach())
        g, rate = (v.gather(1, which[:, None])[:, 0] for v in (g, rate))
        return state, slope.detach(), torch.stack(hk1), g, rate

    with torch.no_grad():
        theta, which, before = watch.locate(begin + offset, h, y, hk)
        best = torch.where(fired, theta, 1.0) * h
        for _ in range(3):
            *_, g, rate = step_to(best, begin + offset)
            shift = torch.where(fired & (rate.abs() > grazing_tol), g.double() / rate.double(), 0.0)
            best = torch.minimum((best - shift.clamp(-0.01 * h, 0.01 * h)).clamp(min=0), h)
        grazing = fired & (rate.abs() <= grazing_tol)
    if needs and bool(grazing.any()):
        row = int(grazing.nonzero()[0, 0])
        raise RuntimeError(f"sample {row} touches guard {int(which[row])} without crossing it: the "
                           "event time has no derivative")
    with torch.set_grad_enabled(needs):
        state, slope, hk, g, rate = step_to(best, start + offset)
        steps = steps._replace(h=steps.h.index_copy(0, last, best),
                               hk=steps.hk.index_copy(1, last, hk))
        reached, rate = start + offset + best, rate.detach()
        moved = reached - torch.where(fired & (rate != 0), g / rate, torch.zeros_like(g))
        t_event = torch.where(fired, moved, t_max)
        y_event = state + slope * (t_event - reached).to(y.dtype)[:, None]
    if before.shape[1] > 1:
        with torch.no_grad():
            g, rate = _along_flow(guard, t_event, y_event, slope)
            soon = g + 1e-9 * t_event.abs().clamp(min=1.0)[:, None].to(g) * rate
            before = before * (watch.crossed(before, soon.sign()) & fired[:, None])
    pending = before.scatter(1, which[:, None], 0.0)
    return EventResult(t_event, y_event, torch.where(fired, which, -1), fired), steps, pending


def odeint_event(f: Callable, y0: Tensor, t0, guard: Callable, *, t_max, direction=0,
                 method="dopri5", rtol=1e-9, atol=1e-12, max_steps=10_000, first_step=None,
                 controller="I", grazing_tol=1e-12) -> EventResult:
    """First zero of guard(t, y) -> (B,) or (B, E) after t0, a float or (B,), for every sample.

    direction: 0 both, +1 upwards, -1 downwards, one int or one per guard. The guard is sampled four
    times per step, so that two crossings within a step are seen. A guard that is 0 at t0 does not
    fire there. A guard that is only touched (slope below grazing_tol) gives no gradient:
    RuntimeError."""
    _check_problem("y0", y0, method, "odeint_event")
    method = _with_events(method)
    _check_choice("controller", controller, ("I", "PI"))
    _check_positive(rtol=rtol, atol=atol, max_steps=max_steps, first_step=first_step)
    start, end = (_per_sample(name, v, len(y0), y0.device, torch.float64)
                  for name, v in (("t0", t0), ("t_max", t_max)))
    if not bool((end > start).all()):
        raise ValueError("t_max must be later than t0")
    direction = torch.as_tensor(direction, device=y0.device).to(y0.dtype)
    if not bool((direction.abs().eq(1) | direction.eq(0)).all()):
        raise ValueError("direction must be -1, 0 or 1")
    return _to_event(f, y0, start, end, guard, direction, method, grazing_tol, rtol=rtol, atol=atol,
                     max_steps=max_steps, first_step=first_step, controller=controller)[0]


# ---- hybrid systems ------------------------------------------------------------------------------
class Event(NamedTuple):
    """Fires when guard(t, x) -> (B,) crosses 0 in `direction` while the mode is `source`."""
    guard: Callable
    jump: Callable | None = None        # jump(t, x) -> x after the event
    source: int | None = None           # None: in every mode
    target: int | None = None           # None: the mode stays
    direction: int = 0
    terminal: bool = False
    name: str | None = None


class StochasticEvent(NamedTuple):
    """Fires at rate intensity(t, x) -> (B,): when the integrated rate reaches a draw of Exp(1)."""
    intensity: Callable
    jump: Callable | None = None
    source: int | None = None
    target: int | None = None
    name: str | None = None
    direction = 1
    terminal = False


def _on_rows(mask: Tensor, function: Callable, t: Tensor, x: Tensor, otherwise: Tensor) -> Tensor:
    """`function` on the rows of `mask` only: it is never evaluated where it does not apply."""
    rows = mask.nonzero()[:, 0]
    if len(rows) == 0:
        return otherwise
    every = len(rows) == len(mask)
    found = function(t, x) if every else function(t[rows], x[rows])
    if not isinstance(found, Tensor) or found.shape != (len(rows), *otherwise.shape[1:]):
        shape = ", ".join(map(str, (len(rows), *otherwise.shape[1:])))
        _expect(f"a field, guard, intensity or jump to return ({shape})", found)
    return found if every else otherwise.index_put((rows,), found)


class HybridSystem:
    """fields[z](t, x) -> dx/dt in mode z; the order of `events` gives ids and decides ties: a later
    one follows at once if its guard still crosses 0 after the jump, in the new mode."""
    keep_thresholds = False     # clocks that lose a race keep their draw: not Markov, see RenoTCP

    def __init__(self, fields: Sequence[Callable], events: Sequence[Event | StochasticEvent]):
        if not fields:
            raise ValueError("fields must hold at least one vector field")
        for event in events:
            if event.direction not in (-1, 0, 1):
                raise ValueError(f"direction {event.direction} of event {event.name!r} is not -1, "
                                 "0 or 1")
            for name, z in (("source", event.source), ("target", event.target)):
                if z is not None and not 0 <= z < len(fields):
                    raise ValueError(f"{name} {z} of event {event.name!r} is not one of "
                                     f"{len(fields)} modes")
        self.fields, self.events = list(fields), list(events)

    def flow(self, t: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """dx/dt (B, n) at times t (B,) and states x (B, n) in modes z (B,)."""
        dx = torch.zeros_like(x)
        for mode, field in enumerate(self.fields):
            dx = _on_rows(z == mode, field, t, x, dx)
        return dx

    def jump(self, which: Tensor, t: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """States and modes after the events `which` (B,)."""
        after, z_after = x, z
        for i, event in enumerate(self.events):
            if event.jump is not None:
                after = _on_rows(which == i, event.jump, t, x, after)
            if event.target is not None:
                z_after = torch.where(which == i, event.target, z_after)
        return after, z_after


class HybridSolution(NamedTuple):
    """States are NaN and modes -1 after a terminal event, after max_events, and where events pile
    up (Zeno: as many as there are kinds, less than 1e-12 apart)."""
    ys: Tensor          # (T, B, n)
    modes: Tensor       # (T, B) int64
    event_times: Tensor  # (B, K) NaN padded
    event_ids: Tensor   # (B, K) int64, -1 padded
    n_events: Tensor    # (B,)
    x_pre: Tensor       # (B, K, n)
    x_post: Tensor      # (B, K, n)
    mode_pre: Tensor    # (B, K)
    mode_post: Tensor   # (B, K)

    def trajectory(self, t: Tensor, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """(t, x, mode) of one sample with the states before and after each event inserted."""
        k = int(self.n_events[row])
        at = self.event_times[row, :k]
        # At an event's own time: the state before, the one after, then outputs (which are after).
        times = torch.cat([at, at, torch.as_tensor(t).to(at)])
        x = torch.cat([self.x_pre[row, :k], self.x_post[row, :k], self.ys[:, row]])
        mode = torch.cat([self.mode_pre[row, :k], self.mode_post[row, :k], self.modes[:, row]])
        order = times.argsort(stable=True)
        return times[order], x[order], mode[order]

    def durations(self, t_start: float, t_end: float) -> dict[str, Tensor]:
        """One row per piece between events: its length tau, mode z, next mode z2, first state x,
        and censored, which the last piece of every sample is."""
        times = F.pad(self.event_times, (1, 1), value=t_end)
        times[:, 0] = t_start
        tau = torch.where(times.isnan(), t_end, times).diff()
        left = self.n_events[:, None] - torch.arange(tau.shape[1], device=tau.device)
        keep = (left >= 0) & (tau > 0)
        z2 = F.pad(self.mode_post, (0, 1), value=-1).clamp(min=0)
        return {"tau": tau[keep], "z": torch.cat([self.modes[:1].T, self.mode_post], 1)[keep],
                "z2": z2[keep], "censored": (left == 0)[keep],
                "x": torch.cat([self.ys[:1].transpose(0, 1), self.x_post], 1)[keep]}


class _Leg(NamedTuple):
    """What happens to some samples from one event to the next."""
    stop: Tensor        # time of the event, inf for none
    which: Tensor       # id of the event
    x_pre: Tensor
    x_post: Tensor
    z_post: Tensor
    state: Callable     # (row, k) -> states of `row` at times t[k] before `stop`


def _simulate(advance: Callable, x0: Tensor, z0, t: Tensor, n_modes: int,
              max_events: int | None = None, terminal: Tensor | None = None) -> HybridSolution:
    """Legs from event to event, all samples at once: advance(rows, start, x, z) -> _Leg."""
    b, device = len(x0), x0.device
    z0 = _check_modes("z0", _per_sample("z0", z0, b, device), n_modes)
    rows, start, x, z = torch.arange(b, device=device), t[:1].expand(b), x0, z0
    outputs, events, pile = [], [], torch.zeros_like(z0)
    while len(rows) and (max_events is None or len(events) < max_events):
        leg = advance(rows, start, x, z)
        at, row = ((t[:, None] >= start) & (t[:, None] < leg.stop)).nonzero(as_tuple=True)
        outputs.append((at, rows[row], leg.state(row, at), z[row]))
        fired = (leg.stop <= t[-1]).nonzero()[:, 0]
        if len(fired) == 0:
            break
        rows, z_pre, before = rows[fired], z[fired], start[fired]
        start, which, x_pre, x, z = (v[fired] for v in leg[:5])
        events.append((rows, start, which, x_pre, x, z_pre, z))
        close = (start - before) <= 1e-12 * start.abs().clamp(min=1)
        pile = torch.where(close, pile[fired] + 1, 0)
        go = pile < (1 if terminal is None else len(terminal))
        if terminal is not None:
            go &= ~terminal[which]
        rows, start, x, z, pile = (v[go] for v in (rows, start, x, z, pile))
    at, row, states, labels = (torch.cat(v) for v in zip(*outputs))
    ys = x0.new_full((len(t), *x0.shape), math.nan).index_put((at, row), states)
    modes = z0.new_full((len(t), b), -1).index_put((at, row), labels)

    def column(i: int, empty: Tensor) -> Tensor:
        filled = [empty.index_put((event[0],), event[i]) for event in events]
        return torch.stack(filled, 1) if filled else empty[:, None][:, :0]

    none, nowhere = torch.full_like(z0, -1), torch.full_like(x0, math.nan)
    n_events = torch.bincount(torch.cat([rows[:0], *(event[0] for event in events)]), minlength=b)
    times = column(1, t.new_full((b,), math.nan))
    return HybridSolution(ys, modes, times, column(2, none), n_events, column(3, nowhere),
                          column(4, nowhere), column(5, none), column(6, none))


def _draw(kind: Callable, shape: Sequence[int], like: Tensor, generator) -> Tensor:
    """kind(shape), of the type and on the device of `like`, drawn where the generator lives: a CPU
    generator serves, with the same numbers, on every device."""
    if generator is None:       # not as an argument: compiled, that allows one shape only
        return kind(shape, dtype=like.dtype, device=like.device)
    drawn = kind(shape, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device)


def _draw_categorical(p: Tensor, generator) -> Tensor:
    """(S,) indices from probabilities (S, m), drawn like `_draw`."""
    source = p.device if generator is None else generator.device
    return torch.multinomial(p.detach().to(source), 1, generator=generator)[:, 0].to(p.device)


class _Clocks:
    """Thresholds s ~ Exp(1) of `count` clocks per sample, drawn anew after every event; with `keep`
    the clocks that did not fire keep theirs."""

    def __init__(self, samples: int, count: int, like: Tensor, keep: bool, generator):
        self.fired = torch.ones(samples, count, dtype=torch.bool, device=like.device)
        self.values, self.keep, self.generator = like.new_zeros(samples, count), keep, generator

    @torch.no_grad()
    def draw(self, rows: Tensor) -> Tensor:
        old = self.values[rows]
        fresh = -torch.log1p(-_draw(torch.rand, old.shape, old, self.generator))
        self.values[rows] = torch.where(self.fired[rows], fresh, old)
        return self.values[rows]

    def record(self, rows: Tensor, fired: Tensor) -> None:
        """`fired` (R, count): which clock fired."""
        self.fired[rows] = fired | (not self.keep)


def odeint_hybrid(system: HybridSystem, x0: Tensor, z0, t, *,
                  generator: torch.Generator | None = None, max_events: int = 1000,
                  method: str = "dopri5", rtol: float = 1e-8,
                  atol: float = 1e-10) -> HybridSolution:
    """Simulate a batch of hybrid systems through all their events; differentiable in x0, the
    fields' parameters and the jumps, event times (hence the saltation matrix) included.

    Random events use the time change: dLambda_i/dt = lambda_i joins the state, and event i is the
    zero of Lambda_i - s_i, s_i ~ Exp(1). At an event's own time `ys` is the state after it."""
    _check_problem("x0", x0, method, "odeint_hybrid")
    method = _with_events(method)
    _check_positive(max_events=max_events, rtol=rtol, atol=atol)
    t = torch.as_tensor(t, dtype=torch.float64, device=x0.device)
    if t.dim() != 1 or len(t) < 1 or not bool((t.diff() > 0).all() & t.isfinite().all()):
        raise ValueError("t must be (T,), T >= 1, finite and strictly increasing")
    (b, n), device = x0.shape, x0.device
    events = system.events or [Event(lambda t, x: torch.ones_like(t))]       # never fires
    ids = [i for i, event in enumerate(events) if isinstance(event, StochasticEvent)]
    c, clocks = len(ids), _Clocks(b, len(ids), x0, system.keep_thresholds, generator)
    direction = torch.tensor([e.direction for e in events], device=device).to(x0.dtype)
    pending = x0.new_zeros(b, len(events))

    def unpack(s):                      # s = [x, integrated rates, thresholds, mode]
        return s[:, :n], s[:, -1].detach().round().long()

    def active(event, z):
        return torch.ones_like(z, dtype=torch.bool) if event.source is None else z == event.source

    def flow(time, s):
        (x, z), zero = unpack(s), torch.zeros_like(s[:, 0])
        rates = [_on_rows(active(events[i], z), events[i].intensity, time, x, zero) for i in ids]
        still = torch.zeros_like(s[:, n + c :])
        return torch.cat([system.flow(time, x, z), *(rate[:, None] for rate in rates), still], 1)

    def guard(time, s):
        (x, z), never = unpack(s), torch.full_like(s[:, 0], -1.0)
        due = dict(zip(ids, (s[:, n : n + c] - s[:, n + c : n + 2 * c]).unbind(1)))
        return torch.stack([
            torch.where(active(event, z), due[i], never) if i in due else
            _on_rows(active(event, z), event.guard, time, x, never)
            for i, event in enumerate(events)], 1)

    def advance(rows, start, x, z) -> _Leg:
        thresholds = clocks.draw(rows)
        s = torch.cat([x, torch.zeros_like(thresholds), thresholds, z[:, None].to(x.dtype)], 1)
        live = torch.stack([active(event, z) for event in events], 1)
        (stop, y, which, fired), steps, pending[rows] = _to_event(
            flow, s, start, t[-1].expand(len(rows)), guard, direction, method, 0.0,
            pending[rows] * live, rtol=rtol, atol=atol)
        clocks.record(rows, which[:, None] == torch.tensor(ids, device=device))
        x_post, z_post = system.jump(which, stop.to(x.dtype), y[:, :n].clone(), z)   # may be filled
        state = lambda row, k: _interpolate(steps, (t[k] - start[row])[:, None], s, method,
                                            row)[:, 0, :n]
        return _Leg(torch.where(fired, stop, math.inf), which, y[:, :n], x_post, z_post, state)

    terminal = torch.tensor([e.terminal for e in events], device=device)
    return _simulate(advance, x0, z0, t, len(system.fields), max_events, terminal)


class RenoTCP(HybridSystem):
    """On-off TCP Reno (Hespanha's model, the paper's constants): x = (window w, packets sent s).

    Modes: 0 off; 1 slow start, w' = 0.693 w / (n_ack rtt); 2 congestion avoidance, w' = 1 / (n_ack
    rtt); s' = w / rtt in 1 and 2. The events, ids 0 to 4, are listed in the constructor; a lost
    packet halves w. clocks="official" keeps the threshold of the clock that lost a race, as the
    published simulator does: no longer a Markov process, with longer pieces."""

    def __init__(self, *, rtt=1.0, n_ack=2.0, w0=0.693, tau_off=3.0, k=20.0, p_drop=0.05,
                 clocks="exact"):
        _check_choice("clocks", clocks, ("exact", "official"))
        _check_positive(rtt=rtt, n_ack=n_ack, w0=w0, tau_off=tau_off, k=k, p_drop=p_drop)
        self.a, self.beta = 0.693 / (n_ack * rtt), 1 / (n_ack * rtt)
        self.rtt, self.tau_off = rtt, tau_off
        self.end_rate, self.drop_rate = 1 / (k * rtt), p_drop / rtt
        self.keep_thresholds = clocks == "official"
        field = lambda growth: lambda t, x: torch.stack([growth(x[:, 0]), x[:, 0] / rtt], 1)
        rate = lambda r: lambda t, x: r * x[:, 0]
        off = lambda t, x: torch.zeros_like(x)
        arrive = lambda t, x: torch.zeros_like(x) + x.new_tensor([w0, 0.0])
        lost = lambda t, x: x * x.new_tensor([0.5, 1.0])
        arrivals = lambda t, x: torch.full_like(x[:, 0], 1 / tau_off)
        fields = [off, field(lambda w: self.a * w), field(lambda w: self.beta * torch.ones_like(w))]
        super().__init__(fields, [
            StochasticEvent(arrivals, arrive, 0, 1, "file arrives"),
            StochasticEvent(rate(self.end_rate), off, 1, 0, "file ends"),
            StochasticEvent(rate(self.drop_rate), lost, 1, 2, "packet lost"),
            StochasticEvent(rate(self.drop_rate), lost, 2, 2, "packet lost"),
            StochasticEvent(rate(self.end_rate), off, 2, 0, "file ends")])

    def sample_exact(self, n: int, t_end: float = 100.0, n_points: int = 2000, *,
                     generator: torch.Generator | None = None,
                     dtype: torch.dtype = torch.float64) -> HybridSolution:
        """n trajectories from x = 0, mode 0, without a solver: the clocks' inverses are known."""
        _check_positive(n=n, t_end=t_end)
        if n_points < 2:
            raise ValueError(f"n_points must be at least 2, not {n_points}")
        t = torch.linspace(0, t_end, n_points, dtype=torch.float64)
        clocks = _Clocks(n, 5, t, self.keep_thresholds, generator)
        race = torch.tensor([[0, 0], [2, 1], [3, 4]])           # a mode's clocks; ties: lost first
        rates = t.new_tensor([1.0, self.end_rate, self.drop_rate, self.drop_rate, self.end_rate])

        def advance(rows, start, x, z) -> _Leg:
            pair, w = race[z], x[:, 0]
            # The clock whose threshold the integral of w reaches first.
            area, winner = (clocks.draw(rows).gather(1, pair) / rates[pair]).min(1)
            which = pair.gather(1, winner[:, None])[:, 0]
            clocks.record(rows, F.one_hot(which, 5).bool())
            grow = torch.log1p(self.a * area / w) / self.a
            climb = (-w + (w * w + 2 * self.beta * area).sqrt()) / self.beta
            tau = torch.where(z == 0, self.tau_off * area, torch.where(z == 1, grow, climb))
            x_pre = self._exact_flow(x, z, tau)
            state = lambda row, k: self._exact_flow(x[row], z[row], t[k] - start[row])
            return _Leg(start + tau, which, x_pre, *self.jump(which, start + tau, x_pre, z), state)

        found = _simulate(advance, t.new_zeros(n, 2), 0, t, 3)
        return found._replace(**{k: getattr(found, k).to(dtype) for k in ("ys", "x_pre", "x_post")})

    def _area(self, tau: Tensor, z: Tensor, w: Tensor) -> Tensor:
        """Integral of the window over tau from w, in modes 1 and 2."""
        climb = w * tau + self.beta * tau.square() / 2
        return torch.where(z == 1, w * torch.expm1(self.a * tau) / self.a, climb)

    def _exact_flow(self, x: Tensor, z: Tensor, tau: Tensor) -> Tensor:
        (w, s), on = x.unbind(-1), z > 0
        new_w = torch.where(z == 1, w * torch.exp(self.a * tau), w + on * self.beta * tau)
        return torch.stack([new_w, s + on * self._area(tau, z, w) / self.rtt], -1)

    def survival(self, tau: Tensor, z: int, w: Tensor | float = 0.0) -> Tensor:
        """Exact P(next event later than tau) in mode z, entered with window w (exact clocks)."""
        tau = torch.as_tensor(tau)
        if z == 0:
            return torch.exp(-tau / self.tau_off)
        area = self._area(tau, torch.tensor(z), torch.as_tensor(w))
        return torch.exp(-(self.end_rate + self.drop_rate) * area)


class BouncingBall(HybridSystem):
    """x = (height, velocity); at the ground the velocity becomes -e times itself."""

    def __init__(self, g: float | Tensor = 9.81, e: float | Tensor = 0.8):
        fall = lambda t, x: torch.stack([x[:, 1], torch.zeros_like(x[:, 1]) - g], 1)
        bounce = lambda t, x: torch.stack([torch.zeros_like(x[:, 0]), -e * x[:, 1]], 1)
        super().__init__([fall], [Event(lambda t, x: x[:, 0], bounce, direction=-1, name="bounce")])


class SwitchingLinear(HybridSystem):
    """Planar system with three regions: for x >= 2 it turns around (-2, 0), for x < 2 it drifts
    down, to the left where y >= 0 and to the right where y < 0."""

    def __init__(self):
        turn = lambda t, x: torch.stack([-x[:, 1], x[:, 0] + 2], 1)
        drift = lambda vx: lambda t, x: torch.zeros_like(x) + x.new_tensor([vx, -1.0])
        right, height = (lambda t, x: x[:, 0] - 2), (lambda t, x: x[:, 1])
        leave = lambda sign: lambda t, x: torch.where(sign * x[:, 1] >= 0, 2 - x[:, 0], -1.0)
        super().__init__([turn, drift(-1.0), drift(1.0)], [
            Event(right, None, 1, 0, 1), Event(right, None, 2, 0, 1),
            Event(leave(1), None, 0, 1, 1), Event(leave(-1), None, 0, 2, 1),
            Event(height, None, 1, 2, -1), Event(height, None, 2, 1, 1)])

    @staticmethod
    def region(x: Tensor) -> Tensor:
        """Mode of states (..., 2)."""
        return torch.where(x[..., 0] >= 2, 0, torch.where(x[..., 1] >= 0, 1, 2))

    def vector_field(self, x: Tensor) -> Tensor:
        return self.flow(x[:, 0], x, self.region(x))


class WheeledRobot(HybridSystem):
    """Unicycle robots x = (px, py, heading); mode z heads for targets[z] by `policy`, a function of
    (px, py, heading, target) (B, 5) -> (speed, turn rate) (B, 2). A planner picks the mode."""
    TARGETS = ((-1.0, 2.0), (-0.5, 2.0), (0.0, 2.0), (0.5, 2.0), (1.0, 2.0))

    def __init__(self, policy: Callable | None = None,
                 targets: Sequence[Sequence[float]] = TARGETS):
        self.policy = policy or self.steer
        super().__init__([partial(self._towards, tuple(target)) for target in targets], [])

    def _towards(self, target: tuple[float, float], t: Tensor, x: Tensor) -> Tensor:
        state = torch.cat([x, x.new_tensor(target).expand(len(x), 2)], 1)
        return self.dynamics(t, state)[:, :3]

    @staticmethod
    def steer(state: Tensor) -> Tensor:
        """A hand-written policy: turn towards the target, drive as far as it lies ahead."""
        px, py, th, tx, ty = state.unbind(-1)
        ahead = torch.cos(th) * (tx - px) + torch.sin(th) * (ty - py)
        aside = torch.cos(th) * (ty - py) - torch.sin(th) * (tx - px)
        return torch.stack([ahead, 4 * torch.atan2(aside, ahead)], -1)

    def dynamics(self, t: Tensor, state: Tensor) -> Tensor:
        """For odeint: state (B, 5) = (px, py, heading, target), the target stays."""
        (speed, turn), th = self.policy(state).unbind(-1), state[:, 2]
        motion = torch.stack([torch.cos(th) * speed, torch.sin(th) * speed, turn], 1)
        return torch.cat([motion, torch.zeros_like(state[:, 3:])], 1)


# ---- normalizing flows ---------------------------------------------------------------------------
def rational_quadratic_spline(x: Tensor, w: Tensor, h: Tensor, d: Tensor, *, inverse: bool = False,
                              tail_bound: float | None = None, identity_init: bool = False,
                              min_bin_width: float = 1e-3, min_bin_height: float = 1e-3,
                              min_derivative: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Monotone spline (Durkan et al., Neural Spline Flows, 2019): (y, log |dy/dx|), x of any shape.

    w, h (..., K) are unnormalised bin widths and heights. tail_bound=B: d (..., K - 1) inner
    slopes, the identity outside [-B, B]; tail_bound=None: [0, 1] onto itself with d (..., K + 1).
    With identity_init, zero parameters are the identity; the slope at the bounds is exactly 1."""
    bins, tails = w.shape[-1], tail_bound is not None
    _check_positive(tail_bound=tail_bound)
    for name, least in (("min_bin_width", min_bin_width), ("min_bin_height", min_bin_height)):
        if least * bins > 1:
            raise ValueError(f"{name} {least} is too large for {bins} bins")
    try:
        shape = torch.broadcast_shapes(x.shape, *(v.shape[:-1] for v in (w, h, d)))
    except RuntimeError:
        shape = None
    if shape is None or h.shape[-1] != bins or d.shape[-1] != (bins - 1 if tails else bins + 1):
        shapes = ", ".join(str(tuple(v.shape)) for v in (x, w, h, d))
        raise ValueError(f"x (...), w, h (..., K) and d (..., {'K - 1' if tails else 'K + 1'}) "
                         f"must agree, not {shapes}")
    low, high = (-tail_bound, tail_bound) if tails else (0.0, 1.0)
    inside = (x >= low) & (x <= high)
    if not tails and not bool(inside.all()):
        raise ValueError("x must lie in [0, 1] when tail_bound is None")

    def knots(raw, least):
        inner = (least + (1 - least * bins) * raw.softmax(-1)).cumsum(-1)[..., :-1]
        edge = torch.ones_like(raw[..., :1])
        return torch.cat([low * edge, low + (high - low) * inner, high * edge], -1)

    beta = math.log(2) / (1 - min_derivative) if identity_init else 1.0
    slopes = min_derivative + F.softplus(d, beta)
    slopes = F.pad(slopes, (1, 1), value=1.0) if tails else slopes
    xs, ys = knots(w, min_bin_width), knots(h, min_bin_height)
    # Outside points are computed at the bound, then replaced: nothing depends on data-sized masks.
    v = x.clamp(low, high).expand(shape)
    edges = (ys if inverse else xs)[..., 1:-1].expand(*shape, bins - 1).contiguous()
    bin_ = torch.searchsorted(edges.detach(), v.detach()[..., None].contiguous(), right=True)
    pick = lambda table, shift=0: table.expand(*shape, table.shape[-1]).gather(
        -1, bin_ + shift)[..., 0]
    x0, y0, width, height = pick(xs), pick(ys), pick(xs.diff(dim=-1)), pick(ys.diff(dim=-1))
    d0, d1, delta = pick(slopes), pick(slopes, 1), height / width
    bend = d0 + d1 - 2 * delta
    if inverse:
        rise = v - y0
        a, b, c = rise * bend + height * (delta - d0), height * d0 - rise * bend, -delta * rise
        theta = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())
    else:
        theta = (v - x0) / width
    mixed = theta * (1 - theta)
    below = delta + bend * mixed
    above = height * (delta * theta * theta + d0 * mixed)
    out = theta * width + x0 if inverse else y0 + above / below
    slope = delta * delta * (d1 * theta * theta + 2 * delta * mixed + d0 * (1 - theta) ** 2)
    logdet = torch.log(slope) - 2 * torch.log(below)
    return torch.where(inside, out, x), torch.where(inside, -logdet if inverse else logdet, 0.0)


def _mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with SiLU between them; the last one starts at zero."""
    pairs = [(nn.Linear(a, b), nn.SiLU()) for a, b in itertools.pairwise(sizes)]
    net = nn.Sequential(*itertools.chain(*pairs))[:-1]
    nn.init.zeros_(net[-1].weight), nn.init.zeros_(net[-1].bias)
    return net


class ConditionalFlow1d(nn.Module):
    """Density of a positive time: u = (log tau - shift) / scale -> spline layers -> standard
    normal, so log p(tau) = log N(g(u)) + log g'(u) - log scale - log tau.

    The parameters are one row per `group` (mode pairs of EventModule), plus a network of the
    context c (..., context_dim). Starts log-normal. Times x, probabilities p and all results are
    (...); x that is not positive and p outside [0, 1] are a ValueError."""
    SPLINE = dict(tail_bound=3.0, identity_init=True)

    def __init__(self, context_dim: int = 0, n_layers: int = 1, n_bins: int = 8, hidden: int = 32,
                 n_groups: int = 1):
        super().__init__()
        _check_positive(n_layers=n_layers, n_bins=n_bins, n_groups=n_groups, hidden=hidden)
        if context_dim < 0:
            raise ValueError(f"context_dim must not be negative, got {context_dim}")
        self.context_dim, self.n_bins, self.n_groups = context_dim, n_bins, n_groups
        size = 2 + n_layers * (3 * n_bins - 1)
        self.raw = nn.Parameter(torch.zeros(n_groups, size))
        self.net = _mlp(context_dim + n_groups, hidden, hidden, size) if context_dim else None

    def _rows(self, shape, c: Tensor | None, group) -> tuple[Tensor, Tensor, list]:
        _expect(f"c (..., {self.context_dim})", c)
        group = torch.as_tensor(group, device=self.raw.device).expand(shape)
        raw, k = self.raw[group], self.n_bins
        if self.net is not None:
            c = c.expand(*shape, self.context_dim)
            raw = raw + self.net(torch.cat([c, F.one_hot(group, self.n_groups).to(c)], -1))
        layers = [p.split((k, k, k - 1), -1) for p in raw[..., 2:].split(3 * k - 1, -1)]
        return raw[..., 0], raw[..., 1], layers

    def _base(self, x: Tensor, c, group) -> tuple[Tensor, Tensor]:
        """The normal variable of x, and log du/dx."""
        if not bool((x > 0).all()):
            raise ValueError("times must be positive")
        shift, log_scale, layers = self._rows(x.shape, c, group)
        log_x = x.to(shift.dtype).log()
        u, logdet = (log_x - shift) * torch.exp(-log_scale), -log_scale - log_x
        for layer in layers:
            u, step = rational_quadratic_spline(u, *layer, **self.SPLINE)
            logdet = logdet + step
        return u, logdet

    def _from_base(self, u: Tensor, c, group) -> Tensor:
        shift, log_scale, layers = self._rows(u.shape, c, group)
        for layer in reversed(layers):
            u, _ = rational_quadratic_spline(u, *layer, inverse=True, **self.SPLINE)
        return torch.exp(u * torch.exp(log_scale) + shift)

    def log_prob(self, x: Tensor, c: Tensor | None = None, *, group=0) -> Tensor:
        u, logdet = self._base(x, c, group)
        return logdet - 0.5 * u * u - 0.5 * math.log(2 * math.pi)

    def sample(self, shape, c: Tensor | None = None, generator: torch.Generator | None = None, *,
               group=0) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        return self._from_base(_draw(torch.randn, shape, self.raw, generator), c, group)

    def cdf(self, x: Tensor, c: Tensor | None = None, *, group=0) -> Tensor:
        return torch.special.ndtr(self._base(x, c, group)[0])

    def log_survival(self, x: Tensor, c: Tensor | None = None, *, group=0) -> Tensor:
        """log P(time > x), exact far into the tail."""
        u = self._base(x, c, group)[0]
        wide = u.to(torch.promote_types(u.dtype, torch.float32))    # torch has no log_ndtr in half
        return torch.special.log_ndtr(-wide).to(u.dtype)

    def icdf(self, p: Tensor, c: Tensor | None = None, *, group=0) -> Tensor:
        if not bool(((p >= 0) & (p <= 1)).all()):
            raise ValueError("p must be probabilities")
        return self._from_base(torch.special.ndtri(p), c, group)


class _AffineFlow(nn.Module):
    """z = (x - shift) exp(-log_scale), where both depend on coordinates of x that come earlier in
    some order: `passes` passes of the inverse find them. Log scales are bounded to (-2, 2).
    forward and inverse of (..., dim) with a context (..., context_dim) also give log |det|."""
    passes = 1

    def _shift_and_log_scale(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        _expect(f"x (..., {self.dim}), c (..., {self.context_dim})", x, c)
        shift, log_scale = self.conditionals(x, c).chunk(2, -1)
        return shift, 2 * torch.tanh(log_scale / 2)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(x, c)
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum(-1)

    def inverse(self, z: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = z
        for _ in range(self.passes):
            shift, log_scale = self._shift_and_log_scale(x, c)
            x = z * torch.exp(log_scale) + shift
        return x, log_scale.sum(-1)

    def log_prob(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        z, logdet = self(x, c)
        return logdet - 0.5 * (z * z).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)

    def sample(self, shape, c: Tensor | None = None,
               generator: torch.Generator | None = None) -> Tensor:
        like, shape = next(self.parameters()), (shape,) if isinstance(shape, int) else shape
        return self.inverse(_draw(torch.randn, (*shape, self.dim), like, generator), c)[0]


class AffineCoupling(_AffineFlow):
    """The first half of x scales and shifts the second (flip: the second the first)."""

    def __init__(self, dim: int, context_dim: int = 0, hidden: int = 32, flip: bool = False):
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim must be at least 2, not {dim}")
        self.dim, self.context_dim = dim, context_dim
        self.register_buffer("kept", (torch.arange(dim) < dim // 2).logical_xor(torch.tensor(flip)))
        self.net = _mlp(dim + context_dim, hidden, hidden, 2 * dim)

    def conditionals(self, x: Tensor, c: Tensor | None) -> Tensor:
        kept = x.masked_fill(~self.kept, 0.0)
        out = self.net(kept if c is None else torch.cat([kept, c], -1))
        return out.masked_fill(self.kept.repeat(2), 0.0)


class MaskedAutoregressiveFlow(_AffineFlow):
    """Shift and scale of x_i are functions of x_1..x_{i-1} (Papamakarios et al., 2017), by one
    masked network (MADE); the inverse takes `dim` passes."""

    def __init__(self, dim: int, context_dim: int = 0, hidden: int = 32):
        super().__init__()
        _check_positive(dim=dim)
        self.dim, self.context_dim, self.passes = dim, context_dim, dim
        inputs, units = torch.arange(1, dim + 1), torch.arange(hidden) % max(dim - 1, 1) + 1
        units = units if dim > 1 else torch.zeros(hidden)        # one dimension: the context alone
        self.register_buffer("mask_in", (units[:, None] >= inputs).float())
        self.register_buffer("mask_out", (inputs.repeat(2)[:, None] > units).float())
        self.first, self.last = nn.Linear(dim, hidden), _mlp(hidden, 2 * dim)[0]
        self.context = nn.Linear(context_dim, hidden) if context_dim else None

    def conditionals(self, x: Tensor, c: Tensor | None) -> Tensor:
        units = F.linear(x, self.first.weight * self.mask_in, self.first.bias)
        units = F.silu(units if c is None else units + self.context(c))
        return F.linear(units, self.last.weight * self.mask_out, self.last.bias)


# ---- event module --------------------------------------------------------------------------------
class EventModule(nn.Module):
    """Law of (time to the next event, next mode) given the mode: a flow of the time per mode pair.

    estimator "joint": p(z'|z, c) p(tau|z, z', c). "race": every target z' has its own clock and the
    earliest wins, so an event contributes log f_{zz'}(tau) + sum_{z'' != z'} log S_{zz''}(tau); the
    observed times are minima already, fitting f alone would make every event come too early.
    Targets that `initialize` never saw from a mode take no part. A context (N, context_dim), say
    the state at the start of the piece, is standardised as `initialize` saw it."""

    def __init__(self, n_modes: int, context_dim: int = 0, estimator: str = "joint",
                 n_layers: int = 1, n_bins: int = 8):
        super().__init__()
        _check_positive(n_modes=n_modes)
        _check_choice("estimator", estimator, ("joint", "race"))
        self.n_modes, self.context_dim, self.estimator = n_modes, context_dim, estimator
        self.flow = ConditionalFlow1d(context_dim, n_layers, n_bins, n_groups=n_modes * n_modes)
        self.transition, self.transition_net = nn.Parameter(torch.zeros(n_modes, n_modes)), None
        if context_dim and estimator == "joint":
            self.transition_net = _mlp(context_dim + n_modes, 32, 32, n_modes)
        self.register_buffer("possible", torch.ones(n_modes, n_modes, dtype=torch.bool))
        self.register_buffer("center", torch.zeros(context_dim))
        self.register_buffer("spread", torch.ones(context_dim))

    @torch.no_grad()
    def initialize(self, tau: Tensor, z: Tensor, z2: Tensor, *, context=None,
                   censored=None) -> None:
        """Counts, mean and spread of log tau of each mode pair; those of the context."""
        tau, z, z2, censored = self._check(tau, z, z2, censored)
        if bool(censored.all()):
            raise ValueError("no uncensored time to start from")
        m, seen = self.n_modes, ~censored
        if self._scaled(z, context) is not None:
            spread = context.std(0, correction=0)
            self.center.copy_(context.mean(0))
            self.spread.copy_(torch.where(spread > 1e-6, spread, 1.0))      # 1: a constant
        pair, log_tau = (z * m + z2)[seen], tau[seen].to(self.transition).log()
        total = torch.bincount(pair, minlength=m * m).to(log_tau)
        average = lambda v: torch.zeros_like(total).index_add_(0, pair, v) / total.clamp(min=1)
        mean = average(log_tau)
        deviation = average((log_tau - mean[pair]) ** 2).sqrt().clamp(min=0.01)
        overall = log_tau.std(correction=0).clamp(min=0.1)
        self.flow.raw[:, 0] = torch.where(total > 0, mean, log_tau.mean())
        self.flow.raw[:, 1] = torch.where(total > 1, deviation, overall).log()
        counts = total.view(m, m)
        self.possible.copy_((counts > 0) | (counts.sum(1, keepdim=True) == 0))
        self.transition.copy_(torch.where(self.possible, (counts + 1e-3).log(), 0.0))

    def _check(self, tau, z, z2, censored):
        _expect("tau (N,), z (N,), z2 (N,), censored (N,)", tau, z, z2,
                z if censored is None else censored)
        censored = torch.zeros_like(z, dtype=torch.bool) if censored is None else censored.bool()
        if not bool(((tau > 0) & tau.isfinite()).all()):
            raise ValueError("tau must be positive and finite")
        z2 = _check_modes("z2", torch.where(censored, 0, z2), self.n_modes)
        return tau, _check_modes("z", z, self.n_modes), z2, censored

    def _scaled(self, z: Tensor, context: Tensor | None) -> Tensor | None:
        """The context standardised, None where there is none."""
        rows = "..." if context is None else "N"
        _expect(f"z (N,), context ({rows}, {self.context_dim})", z, context)
        return None if context is None else (context - self.center) / self.spread

    def _each_target(self, z: Tensor, scaled: Tensor | None) -> dict:
        group = z[:, None] * self.n_modes + torch.arange(self.n_modes, device=z.device)
        c = None if scaled is None else scaled[:, None].expand(-1, self.n_modes, -1)
        return dict(group=group, c=c)

    def _transition_logits(self, z: Tensor, scaled: Tensor | None) -> Tensor:
        logits = self.transition[z]
        if self.transition_net is not None:
            modes = F.one_hot(z, self.n_modes).to(scaled)
            logits = logits + self.transition_net(torch.cat([scaled, modes], 1))
        return logits.masked_fill(~self.possible[z], -math.inf)

    def transition_probs(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """p(z'|z, c) (N, m)."""
        if self.estimator != "joint":
            raise ValueError("transition_probs needs estimator 'joint'; a race has clocks instead")
        z = _check_modes("z", z, self.n_modes)
        return self._transition_logits(z, self._scaled(z, context)).softmax(-1)

    def log_prob(self, tau: Tensor, z: Tensor, z2: Tensor, *, context=None,
                 censored=None) -> Tensor:
        """Log-likelihood (N,) of "next event after tau, to z2"; where censored, "none by tau"."""
        tau, z, z2, censored = self._check(tau, z, z2, censored)
        scaled, possible, m = self._scaled(z, context), self.possible[z], self.n_modes
        survive = self.flow.log_survival(tau[:, None].expand(-1, m), **self._each_target(z, scaled))
        own = self.flow.log_prob(tau, scaled, group=z * m + z2)
        pick = lambda v: v.gather(1, z2[:, None])[:, 0]
        if self.estimator == "joint":
            targets = self._transition_logits(z, scaled).log_softmax(-1)
            joined = torch.where(possible, targets + survive, -math.inf)
            return torch.where(censored, joined.logsumexp(-1), pick(targets) + own)
        survive = torch.where(possible, survive, 0.0)
        total = survive.sum(-1)
        event = torch.where(pick(possible), own - pick(survive) + total, -math.inf)
        return torch.where(censored, total, event)

    @torch.no_grad()
    def sample(self, z: Tensor, context: Tensor | None = None, *,
               generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw (time to the next event, next mode), both (N,)."""
        z = _check_modes("z", z, self.n_modes)
        scaled = self._scaled(z, context)
        if self.estimator == "joint":
            z2 = _draw_categorical(self._transition_logits(z, scaled).softmax(-1), generator)
            return self.flow.sample(z.shape, scaled, generator, group=z * self.n_modes + z2), z2
        each = self._each_target(z, scaled)
        clocks = self.flow.sample((len(z), self.n_modes), generator=generator, **each)
        return clocks.masked_fill(~self.possible[z], math.inf).min(1)


# ---- segments of trajectories --------------------------------------------------------------------
class Piece(NamedTuple):
    t: Tensor           # (L,)
    x: Tensor           # (L, n)
    mode: int | None
    censored: bool      # ends with the recording, not with an event


class PaddedPieces(NamedTuple):
    t: Tensor           # (S, Lmax), padded with the last time
    x: Tensor           # (S, Lmax, n), padded with 0
    mask: Tensor        # (S, Lmax) bool
    features: Tensor    # (S, n_features_steps * n)
    lengths: Tensor     # (S,)


def segment(t: Tensor, x: Tensor, *, mode: Tensor | None = None,
            jump_threshold: float | None = None, changepoint: float | None = None) -> list[Piece]:
    """Cut ONE trajectory, t (T,), x (T, n), where a piece starts at sample i:

    mode             the given labels change
    jump_threshold   |x_i - x_{i-1}| >= threshold * x_{i-1} > 0 in the first coordinate (TCP: 0.5)
    changepoint      neither labels nor a rule: the increment differs from the extrapolated last
                     slope by more than changepoint * (median increment of the 11 around); first of
                     a run of such i
    Pieces with fewer than 2 samples are dropped; the last piece is censored."""
    mode = mode if mode is None else torch.as_tensor(mode, device=x.device)
    _expect("t (T,), x (T, n), mode (T,)", t, x, t if mode is None else mode)
    if not bool((t.diff() >= 0).all()):
        raise ValueError("t must not decrease")
    _check_positive(jump_threshold=jump_threshold, changepoint=changepoint)
    if mode is None and jump_threshold is None and changepoint is None:
        raise ValueError("give mode, jump_threshold or changepoint")
    start = torch.zeros(len(t), dtype=torch.bool, device=x.device)
    if mode is not None:
        start[1:] |= mode[1:] != mode[:-1]
    if jump_threshold is not None:
        u = x[:, 0]
        start[1:] |= (u.diff().abs() >= jump_threshold * u[:-1]) & (u[:-1] > 0)
    if changepoint is not None and len(t) > 2:
        dx, dt = x.diff(dim=0), t.diff()[:, None].to(x)
        slope = torch.where(dt > 0, dx / dt.clamp(min=1e-12), 0.0)
        residual = (dx[1:] - slope[:-1] * dt[1:]).norm(dim=-1)
        around = F.pad(dx.norm(dim=-1)[None, None], (5, 5), mode="replicate")[0, 0].unfold(0, 11, 1)
        off = residual > changepoint * around.median(-1).values[1:] + 1e-9
        start[2:] |= off & ~F.pad(off, (1, -1))
    return _cut(t, x, mode, start.nonzero()[:, 0].tolist(), lambda labels: labels[0], True)


def _cut(t, x, mode, cuts: list[int], label: Callable, censored: bool) -> list[Piece]:
    return [Piece(t[a:b], x[a:b], None if mode is None else int(label(mode[a:b])),
                  censored and b == len(t))
            for a, b in itertools.pairwise([0, *cuts, len(t)]) if b - a >= 2]


def jitter_boundaries(pieces: Sequence[Piece], probability: float = 0.1, width: int = 10, *,
                      generator: torch.Generator | None = None) -> list[Piece]:
    """Badly segmented pieces of one trajectory: each inner boundary moves, with `probability`, by
    up to width - 1 samples either way. A piece's label becomes the most frequent in it."""
    lengths = torch.tensor([len(p.t) for p in pieces])
    t, x, mode = torch.cat([p.t for p in pieces]), torch.cat([p.x for p in pieces]), None
    cuts = lengths.cumsum(0)[:-1]
    move = _draw(partial(torch.randint, 0, width), cuts.shape, cuts, generator)
    uniform = partial(_draw, torch.rand, cuts.shape, cuts.float(), generator)
    move = torch.where(uniform() < 0.5, move, -move)
    move = torch.where(uniform() < probability, move, 0)
    cuts = (cuts + move).clamp(0, len(t)).cummax(0).values.tolist()
    if all(p.mode is not None for p in pieces):
        mode = torch.tensor([p.mode for p in pieces]).repeat_interleave(lengths)
    return _cut(t, x, mode, cuts, lambda labels: labels.mode().values, pieces[-1].censored)


def pack_pieces(pieces: Sequence[Piece], n_features_steps: int = 5) -> PaddedPieces:
    """Pad pieces to one batch; features: the first states of each in time order, 0 if too short."""
    if not pieces or max(len(p.t) for p in pieces) < 2:
        raise ValueError("pieces must hold at least one piece with 2 samples")
    if len({p.x.shape[1:] for p in pieces}) > 1 or any(len(p.t) != len(p.x) for p in pieces):
        raise ValueError("pieces must have t (L,) and x (L, n) of one n")
    _check_positive(n_features_steps=n_features_steps)
    pad = lambda sequences: nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    t, x = pad([p.t for p in pieces]), pad([p.x for p in pieces])
    lengths = torch.tensor([len(p.t) for p in pieces], device=x.device)
    index = torch.arange(x.shape[1], device=x.device)
    t = t.gather(1, index.minimum(lengths[:, None] - 1))
    first = F.pad(x, (0, 0, 0, max(0, n_features_steps - x.shape[1])))[:, :n_features_steps]
    return PaddedPieces(t, x, index < lengths[:, None], first.flatten(1), lengths)


# ---- Neural Hybrid Automata ----------------------------------------------------------------------
def sparsemax(z: Tensor, dim: int = -1) -> Tensor:
    """Euclidean projection of z onto the simplex (Martins and Astudillo, 2016)."""
    z = z.movedim(dim, -1)
    z = z - z.detach().amax(-1, keepdim=True)
    ordered = z.sort(-1, descending=True).values
    total, k = ordered.cumsum(-1), torch.arange(1, z.shape[-1] + 1, device=z.device)
    size = (1 + k * ordered > total).sum(-1, keepdim=True).clamp(min=1)     # of the support
    return torch.relu(z - (total.gather(-1, size - 1) - 1) / size).movedim(-1, dim)


def straight_through(logits: Tensor, *, sample: Tensor | None = None,
                     generator: torch.Generator | None = None) -> Tensor:
    """One-hot draw of Categorical(softmax(logits)) with the gradient of the softmax, (S, m), exact
    up to rounding only. `sample`: the one-hot rows to use instead of a draw."""
    _expect("logits (S, m), sample (S, m)", logits, logits if sample is None else sample)
    p = logits.softmax(-1)
    if sample is None:
        sample = F.one_hot(_draw_categorical(p, generator), p.shape[-1]).to(p)
    return (sample - p).detach() + p


class ModeEncoder(nn.Module):
    """features (S, in_features) -> q (S, n_modes) on the simplex.

    kind "ste": one-hot with the softmax's gradient, a draw in training and the argmax in eval (the
    authors' code draws in both); "gumbel": the same with Gumbel-softmax; "softmax", "sparsemax":
    mixtures. `mode`: "sample" or "argmax" give one-hot rows for every kind. dropout=None: a small
    net."""

    def __init__(self, in_features: int, n_modes: int, kind: str = "ste",
                 dropout: float | None = 0.3, temperature: float = 1.0):
        super().__init__()
        _check_choice("kind", kind, ("ste", "softmax", "sparsemax", "gumbel"))
        _check_positive(n_modes=n_modes, in_features=in_features, temperature=temperature)
        if dropout is not None and not 0 <= dropout < 1:
            raise ValueError(f"dropout must be None or in [0, 1), not {dropout}")
        self.kind, self.n_modes = kind, n_modes
        self.temperature, self.dropout = temperature, dropout
        width = 32 if dropout is None else 64
        self.layers = nn.ModuleList([
            nn.Linear(in_features, width), nn.Linear(width, width), nn.Linear(width, width),
            nn.Linear(width, n_modes, bias=False)])
        self.register_buffer("alive", torch.ones(n_modes, dtype=torch.bool))      # see NHA.prune

    def logits(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        _expect(f"features (S, {self.layers[0].in_features})", features)
        h = features
        for layer, activation in zip(self.layers, (torch.relu, torch.relu, torch.tanh)):
            h = layer(h)
            if self.dropout and self.training:      # drawn from `generator`, as nn.Dropout cannot
                noise = _draw(torch.rand, h.shape, h, generator)
                h = h * (noise >= self.dropout) / (1 - self.dropout)
            h = activation(h)
        return self.layers[-1](h).masked_fill(~self.alive, -math.inf)

    def forward(self, features: Tensor, *, mode: str | None = None,
                generator: torch.Generator | None = None) -> Tensor:
        logits = self.logits(features, generator=generator)
        if mode is None and self.kind in ("softmax", "sparsemax"):
            return logits.softmax(-1) if self.kind == "softmax" else sparsemax(logits)
        mode = ("sample" if self.training else "argmax") if mode is None else mode
        _check_choice("mode", mode, ("sample", "argmax"))
        if mode == "sample" and self.kind != "gumbel":
            return straight_through(logits, generator=generator)
        if mode == "sample":
            noise = _draw(torch.rand, logits.shape, logits, generator)
            logits = (logits - (-noise.clamp(1e-20).log()).log()) / self.temperature
        largest = F.one_hot(logits.argmax(-1), self.n_modes).to(logits)
        return straight_through(logits, sample=largest)


class ModeDecoder(nn.Module):
    """dx/dt = sum_j q_j f_j(x[inputs]): f_j affine (hidden=None) or Linear Tanh Linear, all modes
    in one stacked product. The last layer starts at zero: every mode starts as "constant"."""

    def __init__(self, state_dim: int, n_modes: int, hidden: int | None = None,
                 inputs: slice = slice(0, 1)):
        super().__init__()
        _check_positive(n_modes=n_modes, state_dim=state_dim, hidden=hidden)
        self.state_dim, self.hidden, self.inputs = state_dim, hidden, inputs
        n_in = len(range(state_dim)[inputs])
        if hidden is not None:
            uniform = lambda *shape: nn.Parameter((2 * torch.rand(shape) - 1) / math.sqrt(n_in))
            self.weight_in, self.bias_in = uniform(n_modes, hidden, n_in), uniform(n_modes, hidden)
        self.weight = nn.Parameter(torch.zeros(n_modes, state_dim, hidden or n_in))
        self.bias = nn.Parameter(torch.zeros(n_modes, state_dim))

    @property
    def n_modes(self) -> int:
        return len(self.bias)

    def fields(self, x: Tensor) -> Tensor:
        """Every f_j at x (S, n): (S, m, n)."""
        _expect(f"x (S, {self.state_dim})", x)
        u = x[:, None, self.inputs].expand(-1, self.n_modes, -1)
        if self.hidden is not None:
            u = torch.tanh(torch.einsum("mhi,smi->smh", self.weight_in, u) + self.bias_in)
        return torch.einsum("mni,smi->smn", self.weight, u) + self.bias

    def forward(self, t: Tensor | None, x: Tensor, q: Tensor) -> Tensor:
        _expect(f"x (S, {self.state_dim}), q (S, {self.n_modes})", x, q)
        if self.hidden is None:                                 # mix the maps, not their values
            mixed = torch.einsum("sm,mni->sni", q, self.weight)
            return torch.einsum("sni,si->sn", mixed, x[:, self.inputs]) + q @ self.bias
        return torch.einsum("sm,smn->sn", q, self.fields(x))


class _Phi(torch.autograd.Function):
    """phi_k(z) = sum_j z^j / (j + k)!, that is phi_0 = e^z, phi_k = (phi_{k-1} - 1 / (k-1)!) / z,
    by its series where the quotient cancels; phi_k' = phi_k - k phi_{k+1}."""

    @staticmethod
    def forward(ctx, z: Tensor, k: int) -> Tensor:
        small, series = z.abs() < 0.1, torch.zeros_like(z)
        safe = torch.where(small, 1.0, z)
        for j in range(k + 7, k - 1, -1):
            series.mul_(z).add_(1 / math.factorial(j))
        value = torch.expm1(safe) / safe
        for j in range(1, k):
            value = (value - 1 / math.factorial(j)) / safe
        value = torch.where(small, series, value)
        ctx.save_for_backward(z, value)
        ctx.k = k
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        z, value = ctx.saved_tensors
        return grad * (value - ctx.k * _Phi.apply(z, ctx.k + 1)), None


class JumpMaps(nn.Module):
    """x+ = A_{zz'} x + b_{zz'} by least squares on the states around events (else the identity)."""

    def __init__(self, n_modes: int, state_dim: int):
        super().__init__()
        self.register_buffer("weight", torch.eye(state_dim).repeat(n_modes, n_modes, 1, 1))
        self.register_buffer("bias", torch.zeros(n_modes, n_modes, state_dim))

    @torch.no_grad()
    def fit(self, x_pre: Tensor, x_post: Tensor, z: Tensor, z2: Tensor) -> "JumpMaps":
        """States (N, n) before and after events from modes z to z2 (N,)."""
        n = self.bias.shape[-1]
        _expect(f"x_pre (N, {n}), x_post (N, {n}), z (N,), z2 (N,)", x_pre, x_post, z, z2)
        for a, b in torch.stack([z, z2], 1).unique(dim=0).tolist():
            rows = (z == a) & (z2 == b)
            design = F.pad(x_pre[rows], (0, 1), value=1.0).double()
            found = torch.linalg.pinv(design) @ x_post[rows].double()             # minimum norm
            self.weight[a, b], self.bias[a, b] = found[:-1].T, found[-1]
        return self

    def forward(self, x: Tensor, z: Tensor, z2: Tensor) -> Tensor:
        _expect(f"x (N, {self.bias.shape[-1]}), z (N,), z2 (N,)", x, z, z2)
        return torch.einsum("bij,bj->bi", self.weight[z, z2].to(x), x) + self.bias[z, z2].to(x)


class NHA(nn.Module):
    """Encoder, decoder, and for generation an EventModule and a jump map (x, z, z') -> x+."""

    def __init__(self, encoder: ModeEncoder, decoder: ModeDecoder,
                 event_module: EventModule | None = None, jump: Callable | None = None):
        super().__init__()
        for name, part in (("decoder", decoder), ("event_module", event_module)):
            if (modes := getattr(part, "n_modes", encoder.n_modes)) != encoder.n_modes:
                raise ValueError(f"{name} has {modes} modes, encoder {encoder.n_modes}")
        self.encoder, self.decoder = encoder, decoder
        self.event_module, self.jump = event_module, jump
        # The encoder's modes -> the decoder's, which `prune` reduces.
        self.register_buffer("merged", torch.eye(encoder.n_modes))

    def encode(self, features: Tensor, *, mode: str | None = None,
               generator: torch.Generator | None = None) -> Tensor:
        """q (S, m) of features (S, in_features): m as `prune` left it, `mode` as in ModeEncoder."""
        return self.encoder(features, mode=mode, generator=generator) @ self.merged.to(features)

    def decode(self, x0: Tensor, q: Tensor, t: Tensor, *, solver: str = "rk4") -> Tensor:
        """States (S, L, n) at times t (S, L) (repeats allowed) from x0 (S, n) in modes q (S, m).

        "rk4": classical, one step per interval, all pieces in parallel. "exact": affine modes
        driven by one coordinate u have u' = a u + b, x_i' = c_i u + d_i, so
            x_i = x_i(0) + (c_i u0 + d_i) tau + c_i tau^2 phi_2(a tau) (a u0 + b),
            phi_2(z) = (e^z - 1 - z) / z^2."""
        _check_choice("solver", solver, ("rk4", "exact"))
        _expect("x0 (S, n), q (S, m), t (S, L)", x0, q, t)
        if solver == "rk4":
            ys, _ = _fixed(lambda t, x: self.decoder(t, x, q), x0, t.T, "rk4")
            return ys.transpose(0, 1)
        tau = (t - t[:, :1]).to(x0.dtype)
        row = torch.arange(len(x0), device=x0.device).repeat_interleave(tau.shape[1])
        return self._exact(x0, q, tau.flatten(), row).view(*tau.shape, x0.shape[1])

    def _exact(self, x0: Tensor, q: Tensor, tau: Tensor, row: Tensor) -> Tensor:
        """The closed form (N, n) at times tau (N,) of pieces row (N,)."""
        u, n = range(self.decoder.state_dim)[self.decoder.inputs], x0.shape[1]
        if self.decoder.hidden is not None or len(u) != 1:
            raise ValueError("solver 'exact' needs affine modes (hidden=None) of one coordinate")
        _expect(f"x0 (S, {self.decoder.state_dim}), q (S, {self.decoder.n_modes})", x0, q)
        c, d = torch.einsum("sm,mn->sn", q, self.decoder.weight[..., 0]), q @ self.decoder.bias
        slope, a = c * x0[:, u] + d, c[:, u]
        x0, c, slope, a = torch.cat([x0, c, slope, a], 1)[row].split((n, n, n, 1), -1)
        tau = tau[:, None]
        return x0 + slope * tau + c * (tau.square() * _Phi.apply(a * tau, 2) * slope[:, u])

    def reconstruct(self, pieces: PaddedPieces, *, mode: str | None = None, solver: str = "rk4",
                    generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(xhat (S, L, n), q): each piece decoded from its first state in its encoded mode."""
        q = self.encode(pieces.features, mode=mode, generator=generator)
        return self.decode(pieces.x[:, 0], q, pieces.t, solver=solver), q

    @torch.no_grad()
    def generate(self, x0: Tensor, z0, t_end: float, *, generator: torch.Generator | None = None,
                 n_points: int = 201) -> HybridSolution:
        """Draw (time, next mode), flow until then, jump, repeat; outputs on linspace(0, t_end,
        n_points). The event module's context is the state at the start of the piece."""
        if self.event_module is None:
            raise ValueError("generate needs an event_module")
        m, events = self.decoder.n_modes, self.event_module
        if getattr(events, "n_modes", m) != m:
            raise ValueError(f"event_module has {events.n_modes} modes, decoder {m}")
        _check_problem("x0", x0, "rk4")
        _expect(f"x0 (B, {self.decoder.state_dim})", x0)
        _check_positive(t_end=t_end, n_points=n_points)
        n_in = len(range(x0.shape[1])[self.decoder.inputs])
        solver = "exact" if self.decoder.hidden is None and n_in == 1 else "rk4"
        t = torch.linspace(0, t_end, n_points, dtype=torch.float64, device=x0.device)

        def advance(rows, start, x, z) -> _Leg:
            tau, z2 = events.sample(z, x if events.context_dim else None, generator=generator)
            stop = start + tau.double().clamp(min=1e-9)
            begin, end = start[:, None], stop.clamp(max=2 * t_end)[:, None]
            grid = torch.cat([begin, t.expand(len(rows), -1).clamp(begin, end), end], 1)
            path = self.decode(x, F.one_hot(z, m).to(x), grid, solver=solver)
            x_pre = path[:, -1]
            x_post = x_pre if self.jump is None else self.jump(x_pre, z, z2)
            state = lambda row, k: path[row, k + 1]
            return _Leg(stop, torch.zeros_like(rows), x_pre, x_post, z2, state)

        return _simulate(advance, x0, z0, t, m)

    @torch.no_grad()
    def prune(self, pieces: PaddedPieces, eps: float = 0.01, delta: float = 0.05) -> list[int]:
        """Drop modes that fewer than eps of the pieces use; merge mode j into a more used k when
        the mean of |f_j - f_k| / (|f_j| + |f_k|) over the states of both is below delta. Returns
        the modes kept, labelled 0..len - 1 from now on; fit the event module again."""
        if not (eps >= 0 and delta >= 0):
            raise ValueError(f"eps and delta must not be negative, not {eps}, {delta}")
        labels, m = self.encode(pieces.features, mode="argmax").argmax(-1), self.decoder.n_modes
        usage = torch.bincount(labels, minlength=m) / len(labels)
        f = self.decoder.fields(pieces.x[pieces.mask])
        owner = labels[:, None].expand_as(pieces.mask)[pieces.mask]

        def difference(j: int, k: int) -> Tensor:
            at = (owner == j) | (owner == k)
            scale = f[at, j].norm(dim=-1) + f[at, k].norm(dim=-1)
            return ((f[at, j] - f[at, k]).norm(dim=-1) / scale.clamp(min=1e-12)).mean()

        kept, column = [], torch.full((m,), -1, device=labels.device)
        for j in usage.argsort(descending=True, stable=True).tolist():
            if kept and (usage[j] < eps or usage[j] == 0):          # the most used one stays
                break
            same = [place for place, k in enumerate(kept) if difference(j, k) < delta]
            column[j] = same[0] if same else len(kept)
            if not same:
                kept.append(j)
        merge = F.one_hot(column.clamp(min=0), len(kept)).to(self.merged) * (column >= 0)[:, None]
        self.merged = self.merged @ merge
        self.encoder.alive &= self.merged.sum(1) > 0
        for name, value in list(self.decoder.named_parameters()):
            setattr(self.decoder, name, nn.Parameter(value[kept].clone()))
        return kept

    def _load_from_state_dict(self, state, prefix, *more):
        """The weights of a pruned model fit a new one, which is reduced to as many modes."""
        modes = state.get(f"{prefix}merged", self.merged).shape[1]
        if modes < self.merged.shape[1]:
            self.merged = self.merged[:, :modes].clone()
            for value in self.decoder.parameters():         # which an optimizer may hold
                value.data = value.data[:modes].clone()
        super()._load_from_state_dict(state, prefix, *more)


# ---- losses, measures, training ------------------------------------------------------------------
def _per_piece(error: Callable, xhat: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Sum over state dimensions, mean over a piece's times, mean over pieces."""
    _expect("xhat (S, L, n), x (S, L, n), mask (S, L)", xhat, x, mask)
    errors = error(xhat, x).masked_fill(~mask[..., None], 0.0)
    return (errors.flatten(1).sum(1) / mask.sum(1)).mean()


def _relative(xhat: Tensor, x: Tensor) -> Tensor:
    return 50 * (xhat - x).abs() / (xhat.abs() + x.abs() + 0.01)


def reconstruction_loss(xhat: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Squared error: sum over state dimensions, mean over a piece's times, mean over pieces."""
    return _per_piece(partial(F.mse_loss, reduction="none"), xhat, x, mask)


def smape(xhat: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Percentage error 100 |xhat - x| / (|xhat| + |x| + 0.01) / 2, averaged like the loss."""
    return _per_piece(_relative, xhat, x, mask)


def v_measure(true, pred, beta: float = 1.0) -> tuple[float, float, float]:
    """(homogeneity, completeness, V) of two labelings (Rosenberg and Hirschberg, 2007)."""
    true, pred = (torch.as_tensor(v).detach().cpu().flatten() for v in (true, pred))
    if len(true) != len(pred) or len(true) == 0:
        lengths = f"{len(true)}, {len(pred)}"
        raise ValueError(f"true and pred must have one length above 0, not {lengths}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative, not {beta}")
    joint = torch.stack([v.unique(return_inverse=True)[1] for v in (true, pred)])
    table = torch.zeros(*(joint.amax(1) + 1), dtype=torch.float64)
    table.index_put_(tuple(joint), torch.ones(len(true), dtype=torch.float64), accumulate=True)
    p = table / len(true)
    entropy = lambda q: float(-torch.special.xlogy(q, q).sum())
    classes, clusters, both = entropy(p.sum(1)), entropy(p.sum(0)), entropy(p)
    h = 1.0 if classes == 0 else max(1 - (both - clusters) / classes, 0.0)
    c = 1.0 if clusters == 0 else max(1 - (both - classes) / clusters, 0.0)
    return h, c, (1 + beta) * h * c / (beta * h + c) if beta * h + c > 0 else 0.0


def _descend(model: nn.Module, optimizer, step: Callable, epochs: int,
             generator: torch.Generator | None, resume: dict | None) -> Iterator[dict[str, float]]:
    """step(epoch) -> (loss, what to yield). `send("state")` hands out a snapshot for `resume`."""
    first = 0
    if resume is not None:
        first = resume["epoch"]
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))  # it keeps what it is given
        if generator is not None:
            generator.set_state(resume["generator"])
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for epoch in range(first, epochs):
        if not held <= set(model.parameters()):
            raise RuntimeError("the parameters were replaced, as prune does: start training anew")
        model.train()                                   # the caller may evaluate in between
        loss, row = step(epoch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        request = yield {"epoch": epoch, **{k: float(v) for k, v in row.items()}}
        while request == "state":
            request = yield copy.deepcopy({
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
                "generator": None if generator is None else generator.get_state()})


def train_mode_recovery(model: NHA, pieces: PaddedPieces, *, epochs: int = 8000,
                        enc_lr: float = 3e-4, dec_lr: float = 1e-2, solver: str = "rk4",
                        true_modes=None, generator: torch.Generator | None = None,
                        resume: dict | None = None) -> Iterator[dict[str, float]]:
    """Full-batch training of encoder and decoder; yields {"epoch", "loss", "smape", "n_used"} and,
    with `true_modes`, "v" (of the labels the epoch used). `send("state")` hands out a snapshot for
    `resume`. Dropout and sampled modes draw from `generator`."""
    _check_positive(epochs=epochs, enc_lr=enc_lr, dec_lr=dec_lr)
    groups = [{"params": model.encoder.parameters(), "lr": enc_lr},
              {"params": model.decoder.parameters(), "lr": dec_lr}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    row, column = pieces.mask.nonzero(as_tuple=True)           # the samples that exist, no padding
    x0, target = pieces.x[:, 0], pieces.x[row, column]
    tau = (pieces.t[row, column] - pieces.t[row, 0]).to(x0.dtype)
    weight = (1 / (pieces.lengths.to(x0.dtype) * len(x0)))[row, None]

    def step(epoch: int) -> tuple[Tensor, dict]:
        q = model.encode(pieces.features, generator=generator)
        if solver == "exact":
            xhat = model._exact(x0, q, tau, row)
        else:
            xhat = model.decode(x0, q, pieces.t, solver=solver)[row, column]
        loss, labels = ((xhat - target).square() * weight).sum(), q.detach().argmax(-1)
        out = {"loss": loss.detach(), "smape": (_relative(xhat.detach(), target) * weight).sum(),
               "n_used": len(labels.unique())}
        if true_modes is not None:
            out["v"] = v_measure(true_modes, labels)[2]
        return loss, out

    return _descend(model, optimizer, step, epochs, generator, resume)


def train_event_module(module: EventModule, tau: Tensor, z: Tensor, z2: Tensor, *, context=None,
                       censored=None, epochs: int = 500, lr: float = 1e-2,
                       generator: torch.Generator | None = None,
                       resume: dict | None = None) -> Iterator[dict[str, float]]:
    """Maximum likelihood, full batch, cosine learning rate; yields {"epoch", "nll"}. Calls
    `initialize` first. `send("state")` hands out a snapshot for `resume`."""
    _check_positive(epochs=epochs, lr=lr)
    if resume is None:
        module.initialize(tau, z, z2, context=context, censored=censored)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr, fused=True)

    def step(epoch: int) -> tuple[Tensor, dict]:
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        optimizer.param_groups[0]["lr"] = lr * decay
        nll = -module.log_prob(tau, z, z2, context=context, censored=censored).mean()
        return nll, {"nll": nll.detach()}

    return _descend(module, optimizer, step, epochs, generator, resume)


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(1)
    runs = RenoTCP().sample_exact(5, generator=generator, dtype=torch.float32)
    found = []
    for i in range(5):
        t, x, mode = runs.trajectory(torch.linspace(0, 100, 2000), i)
        found += segment(t.float(), x, mode=mode, jump_threshold=0.5)
    batch, truth = pack_pieces(found), [p.mode for p in found]
    model = NHA(ModeEncoder(10, 3), ModeDecoder(2, 3))
    for p in model.encoder.parameters():
        nn.init.uniform_(p, -p.shape[-1] ** -0.5, p.shape[-1] ** -0.5, generator=generator)
    print(f"{len(found)} pieces of 5 TCP trajectories; 3 modes, none of them labelled")
    for row in train_mode_recovery(model, batch, epochs=2000, solver="exact", generator=generator):
        if row["epoch"] % 400 == 399:
            print(f"epoch {row['epoch'] + 1:5d}  loss {row['loss']:.5f}")
    labels = model.eval().encode(batch.features).argmax(-1)
    print("mode  pieces  dw/dt =  a w + b       (true: 0.3465 w in slow start, 0.5 in avoidance)")
    for j, count in enumerate(labels.bincount(minlength=3).tolist()):
        a, b = model.decoder.weight[j, 0, 0], model.decoder.bias[j, 0]
        print(f"{j:4d} {count:7d}  {a:+.4f} w {b:+.4f}")
    print("homogeneity, completeness, V against {off, slow start}, {avoidance}: "
          + ", ".join(f"{v:.3f}" for v in v_measure([int(z == 2) for z in truth], labels)))
