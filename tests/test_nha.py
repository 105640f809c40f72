import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reference import nha

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "nha"
F64 = torch.float64


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as z:
        return {k: torch.from_numpy(np.asarray(z[k])) for k in z.files}


def close(a, b, tolerance):
    a, b = (v.detach().double() if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=F64)
            for v in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def parameters_from(module, generator, scale=1.0):
    """Random parameters from an explicit generator."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    / p.shape[-1] ** 0.5)
    return module


class Field(nn.Module):
    def __init__(self, n=2, width=16, dtype=F64):
        super().__init__()
        self.n = nn.Sequential(nn.Linear(n, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                               nn.Linear(width, n)).to(dtype)

    def forward(self, t, y):
        return self.n(y) + 0.1 * t.reshape(-1, 1) * y


def oscillator(mu):
    return lambda t, y: torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)


A = torch.tensor([[-0.1, 2], [-2, -0.1]], dtype=F64)
SYSTEMS = {
    "linear": lambda t, y: y @ A.T,
    "vdp1": oscillator(1.0),
    "lorenz": lambda t, y: torch.stack([10 * (y[:, 1] - y[:, 0]),
                                        y[:, 0] * (28 - y[:, 2]) - y[:, 1],
                                        y[:, 0] * y[:, 1] - 8 / 3 * y[:, 2]], 1),
    "nonautonomous": lambda t, y: torch.cos(t)[:, None] * y - 0.5 * torch.sin(3 * t)[:, None],
    "vdp20": oscillator(20.0),
    "prothero": lambda t, y: -50 * (y - torch.cos(t)[:, None]),
}
NAMES = [p.stem[4:] for p in sorted(GOLDEN.glob("ode_*.npz"))]


# ---- solvers ------------------------------------------------------------------------------------

def test_tableaux():
    z = load("tableaux")
    for method in ("dopri5", "tsit5"):
        tab = nha.METHODS[method]
        close(tab.c[1:], z[f"{method}_c"], 1e-15)
        close(tab.error, z[f"{method}_berr"], 1e-15)
        close(tab.b, z[f"{method}_b"], 1e-15)
        for i in range(2, 8):
            close(tab.a[i - 1], z[f"{method}_a{i}"], 1e-15)
    half = torch.tensor([0.5**p for p in range(1, 5)], dtype=F64)
    close(torch.tensor(nha.METHODS["dopri5"].dense, dtype=F64) @ half, z["dopri5_mid"], 1e-15)


@pytest.mark.parametrize("method", nha.METHODS)
def test_tableaux_are_consistent(method):
    tab = nha.METHODS[method]
    close([sum(row) for row in tab.a], tab.c, 1e-14)
    for power in range(min(tab.order, 4)):                     # quadrature conditions
        close(sum(b * c**power for b, c in zip(tab.b, tab.c)), 1 / (power + 1), 1e-13)
    if tab.dense is not None:
        close([sum(row) for row in tab.dense], tab.b, 1e-13)
        close(sum(tab.error), 0.0, 1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_solutions_and_step_counts(name):
    z, f = load(f"ode_{name}"), SYSTEMS[name]
    limits = dict(rtol=float(z["rtol"]), atol=float(z["atol"]))
    shared = nha.odeint(f, z["y0"], z["t"], per_sample=False, **limits)
    close(shared.ys, z["y_dopri5"], 1e-9)
    assert shared.stats.n_f.tolist() == [int(z["nfe"])] * len(z["y0"])
    assert shared.stats.n_accepted.tolist() == [len(z["accepted"])] * len(z["y0"])
    own = nha.odeint(f, z["y0"], z["t"], **limits)
    close(own.ys, z["y_dopri5_per_sample"], 1e-9)
    assert torch.equal(torch.stack(own.stats[:3], 1), z["per_sample_counts"])
    close(nha.odeint(f, z["y0"], z["t"], method="bosh3", per_sample=False, rtol=1e-4, atol=1e-6).ys,
          z["y_bosh3"], 1e-9)
    scale = 100 * (limits["atol"] + limits["rtol"] * z["y_ref"].abs().amax())
    for controller in ("I", "PI"):
        tsit5 = nha.odeint(f, z["y0"], z["t"], method="tsit5", controller=controller, **limits)
        assert (tsit5.ys - z["y_ref"]).abs().max() < scale
    grid = torch.from_numpy(np.linspace(0, float(z["t_fixed"][-1]), 401))
    for key, method in (("euler", "euler"), ("midpoint", "midpoint"), ("rk4_38", "rk4_38"), ("rk4_classical", "rk4")):
        if f"y_fixed_{key}" in z:
            ys = nha.odeint(f, z["y0"], grid, method=method).ys[::20]
            close(ys, z[f"y_fixed_{key}"], 1e-9 if name == "lorenz" else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_accepted_steps(name):
    z, f = load(f"ode_{name}"), SYSTEMS[name]
    start = torch.zeros(len(z["y0"]), dtype=F64)
    steps = nha._march(f, z["y0"], f(start, z["y0"]), start, start + z["t"][-1], "dopri5",
                       rtol=float(z["rtol"]), atol=float(z["atol"]))
    sample, offset, h = (v[steps.accepted] for v in (steps.sample, steps.offset, steps.h))
    found = torch.cat([torch.stack([offset, h], 1)[sample == i] for i in range(len(start))])
    expected = z["per_sample_steps"]
    first = 10 if name == "lorenz" else len(expected)          # chaos separates later steps
    close(found[:first], expected[:first], 1e-6)


def test_shared_and_per_sample_agree_on_one_sample_and_float32_keeps_its_dtype():
    y0 = torch.tensor([[2.0, 0.0]])
    t = torch.linspace(0, 5, 6)
    own, shared = (nha.odeint(oscillator(1.0), y0, t, per_sample=p, rtol=1e-4, atol=1e-5)
                   for p in (True, False))
    assert own.ys.dtype == torch.float32 and torch.equal(own.ys, shared.ys)


def test_reversed_time():
    for name in ("linear", "nonautonomous"):
        z, f = load(f"ode_{name}"), SYSTEMS[name]
        forward = nha.odeint(f, z["y0"], z["t"], rtol=1e-10, atol=1e-12)
        back = nha.odeint(f, forward.ys[-1], z["t"].flip(0), rtol=1e-10, atol=1e-12)
        close(back.ys.flip(0), forward.ys, 1e-7)
        close(nha.odeint(f, z["y_dopri5"][-1], z["t"].flip(0), rtol=1e-9, atol=1e-11,
                         per_sample=False).ys,
              z["y_reverse"], 1e-6)


def test_own_time_grids_directions_and_padding():
    f = SYSTEMS["nonautonomous"]
    y0 = torch.tensor([[1.0], [0.5], [2.0]], dtype=F64)
    t = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.5, 0.7], [2.0, 0.0, 0.9], [3.0, -1.0, 0.9]],
                     dtype=F64)
    ys = nha.odeint(f, y0, t, rtol=1e-9, atol=1e-11).ys
    for i in range(3):
        alone = nha.odeint(f, y0[i : i + 1], t[: 3 if i == 2 else 4, i], rtol=1e-9, atol=1e-11).ys
        close(ys[: len(alone), i], alone[:, 0], 1e-12)
    assert torch.equal(ys[3, 2], ys[2, 2])
    fixed = nha.odeint(f, y0, t, method="rk4", step_size=0.01).ys
    close(fixed, ys, 1e-7)


@pytest.mark.parametrize("method,order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("rk4_38", 4)])
def test_orders_on_a_nonautonomous_problem(method, order):
    f = lambda t, y: torch.cos(t)[:, None] * y
    y0 = torch.ones(1, 1, dtype=F64)
    errors = [abs(float(nha.odeint(f, y0, torch.linspace(0, 2, n + 1, dtype=F64),
                                   method=method).ys[-1])
                  - math.exp(math.sin(2.0))) for n in (80, 160)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5"])
def test_dense_output(method):
    f, y0 = SYSTEMS["linear"], torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=F64)
    solution = nha.odeint(f, y0, [0.0, 2.0], method=method, rtol=1e-8, atol=1e-10, dense=True)
    for t in (0.0, 0.37, 2.0):
        close(solution.dense(t), y0 @ torch.matrix_exp(A * t).T, 3e-5)
    close(solution.dense(torch.tensor([0.37, 1.0]))[1], y0[1] @ torch.matrix_exp(A).T, 3e-5)
    with pytest.raises(ValueError, match="outside"):
        solution.dense(2.5)


def test_checks_every_few_attempts_change_nothing():
    z, f = load("ode_vdp1"), SYSTEMS["vdp1"]
    start = torch.zeros(3, dtype=F64)
    run = lambda every: nha._march(f, z["y0"], f(start, z["y0"]), start, start + 5, "dopri5",
                                   rtol=1e-6, atol=1e-8, check_every=every)
    once, seldom = run(1), run(8)
    for name in ("sample", "offset", "h", "y"):
        a, b = (getattr(steps, name)[steps.accepted] for steps in (once, seldom))
        assert torch.equal(a, b)


def neural_field():
    z, f = load("neural_ode_grad"), Field()
    f.load_state_dict({k: z["param_" + k.replace(".", "_")] for k in f.state_dict()})
    return z, f


@pytest.mark.parametrize("tag,options", [
    ("backprop", dict()), ("backprop", dict(per_sample=False)), ("adjoint", dict(grad="adjoint")),
    ("rk4_38", dict(method="rk4_38"))])
def test_gradients(tag, options):
    z, f = neural_field()
    y0 = z["y0"].requires_grad_()
    t = z["t_rk4" if tag == "rk4_38" else "t"].requires_grad_()
    ys = nha.odeint(f, y0, t, rtol=1e-9, atol=1e-11, **options).ys
    (ys * z["W_rk4" if tag == "rk4_38" else "W"]).sum().backward()
    tolerance = 1e-12 if tag == "rk4_38" else 1e-6
    close(ys.detach(), z[f"y_{tag}"], tolerance)
    close(y0.grad, z[f"grad_y0_{tag}"], tolerance)
    if tag != "rk4_38":
        close(t.grad[1:], z[f"grad_t_{tag}"][1:], tolerance)
        close(t.grad[:1], z["grad_t_adjoint"][:1], tolerance)
    for name, p in f.named_parameters():
        key = f"grad_{tag}_{name.replace('.', '_')}"
        if key in z:
            close(p.grad, z[key], tolerance)


def test_wide_states_and_batched_jacobians_give_the_same_gradients(monkeypatch):
    _, f = neural_field()
    y0 = torch.randn(6, 2, generator=gen(), dtype=F64)
    t = torch.linspace(0, 2, 5, dtype=F64)
    results = []
    for limit in (8, 0):
        monkeypatch.setattr(nha, "NARROW", limit)
        y, times = y0.clone().requires_grad_(), t.clone().requires_grad_()
        ys = nha.odeint(f, y, times, rtol=1e-5, atol=1e-7).ys
        weights = torch.linspace(0.5, 2, ys.numel(), dtype=F64).view_as(ys)
        results.append([ys, *torch.autograd.grad((ys * weights).sum(), [y, times, *f.parameters()])])
    for a, b in zip(*results):
        close(a, b, 1e-11)


def test_the_rest_of_a_batch_is_unrolled_with_the_same_gradients(monkeypatch):
    """A recorded batch of which one stiff sample is left, against everything recorded; both
    directions of time."""
    f = lambda t, s: torch.cat([torch.tanh(s[:, :2] @ weight.T) * s[:, 2:] * (1 + t[:, None] / 9),
                                0 * s[:, 2:]], 1)
    weight = torch.tensor([[0.3, -1.0], [1.2, 0.1]], dtype=F64, requires_grad=True)
    y0 = torch.cat([torch.randn(6, 2, generator=gen(), dtype=F64), torch.ones(6, 1, dtype=F64)], 1)
    y0[0, 2] = 20.0
    for times in ([0.0, 0.4, 1.0], [1.0, 0.7, 0.2]):
        results = []
        for small in (2, 0):
            monkeypatch.setattr(nha, "FEW", small)
            y, t = y0.clone().requires_grad_(), torch.tensor(times, dtype=F64, requires_grad=True)
            solution = nha.odeint(f, y, t, rtol=1e-6, atol=1e-8)
            loss = (solution.ys * torch.linspace(0.5, 2, solution.ys.numel(), dtype=F64).view_as(solution.ys)).sum()
            results.append([solution.ys, *solution.stats,
                            *torch.autograd.grad(loss, [y, t, weight])])
        for other in results[1:]:
            for a, b in zip(results[0], other):
                close(a, b, 1e-10)
    monkeypatch.setattr(nha, "FEW", 1)
    # the sample left over fails
    y = torch.tensor([[0.5], [40.0]], dtype=F64, requires_grad=True)
    solution = nha.odeint(lambda t, y: y**2, y, [0.0, 0.01, 1.0], on_failure="mask", max_steps=300)
    assert solution.stats.success.tolist() == [True, False] and solution.ys[2, 1].isnan()
    with pytest.raises(
        RuntimeError, match="max_steps=300 exceeded for 1 of 2 samples, first sample 1"):
        nha.odeint(lambda t, y: y**2, y, [0.0, 0.01, 1.0], max_steps=300)


def test_gradient_equals_finite_differences_with_closures_and_failing_neighbours():
    weight = torch.tensor([[0.3, -1.0], [1.2, 0.1]], dtype=F64)

    def final(y0, w, t_end):
        f = lambda t, y: torch.tanh(y @ w.T) * (1 + 0.2 * torch.sin(t)[:, None])
        return nha.odeint(f, y0, torch.stack([torch.zeros_like(t_end), t_end]), rtol=1e-10,
                          atol=1e-12).ys[-1]

    y0 = torch.randn(3, 2, generator=gen(1), dtype=F64)
    end = torch.tensor(1.5, dtype=F64)
    assert torch.autograd.gradcheck(final,
                                    tuple(v.clone().requires_grad_() for v in (y0, weight, end)),
                                    eps=1e-6, atol=1e-6)
    # y' = y^2 blows up at 1 / y0
    y = torch.tensor([[0.5], [40.0]], dtype=F64, requires_grad=True)
    solution = nha.odeint(lambda t, y: y**2, y, [0.0, 0.01, 1.0], on_failure="mask", max_steps=300)
    assert solution.stats.success.tolist() == [True, False]
    assert solution.ys[1].isfinite().all() and solution.ys[2, 0].isfinite() and solution.ys[2, 1].isnan()
    solution.ys[2, 0].sum().backward()
    close(y.grad[0], [1 / (1 - 0.5) ** 2], 1e-5)


def test_nothing_tracks_gradients_unless_asked():
    _, f = neural_field()
    y0 = torch.ones(2, 2, dtype=F64)
    assert nha.odeint(f, y0, [0.0, 1.0]).ys.requires_grad
    assert not nha.odeint(f, y0, [0.0, 1.0], grad="none").ys.requires_grad
    assert not nha.odeint(SYSTEMS["linear"], y0, [0.0, 1.0]).ys.requires_grad
    with torch.no_grad():
        assert not nha.odeint(f, y0, [0.0, 1.0]).ys.requires_grad


def test_scalar_time_functions():
    y0 = torch.tensor([[1.0], [2.0]], dtype=F64)
    t = torch.linspace(0, 2, 5, dtype=F64)

    def f(t, y):
        assert t.dim() == 0
        return torch.cos(t) * y

    for options in (dict(), dict(per_sample=False), dict(method="rk4", step_size=0.05)):
        y = y0.clone().requires_grad_()
        ys = nha.odeint(f, y, t, vector_time=False, **options).ys
        close(ys.detach(), y0 * torch.exp(torch.sin(t))[:, None, None], 1e-5)
        ys[-1].sum().backward()
        close(y.grad, torch.full_like(y0, math.exp(math.sin(2.0))), 1e-5)


def test_one_stiff_sample_does_not_slow_the_others():
    mu = torch.ones(32, 1, dtype=F64)
    mu[0] = 50.0
    f = lambda t, s: torch.stack([s[:, 1], s[:, 2] * (1 - s[:, 0] ** 2) * s[:, 1] - s[:, 0],
                                  torch.zeros_like(s[:, 0])], 1)
    y0 = torch.cat([torch.tensor([[2.0, 0.0]], dtype=F64).expand(32, 2), mu], 1)
    own = nha.odeint(f, y0, [0.0, 5.0], rtol=1e-5, atol=1e-7).stats.n_f
    shared = nha.odeint(f, y0, [0.0, 5.0], rtol=1e-5, atol=1e-7, per_sample=False).stats.n_f
    assert own.sum() < 0.5 * shared.sum()


def test_solver_errors():
    f, y0 = SYSTEMS["linear"], torch.ones(2, 2, dtype=F64)
    raises = lambda error, match: pytest.raises(error, match=match)
    with raises(ValueError, "dopri5"):
        nha.odeint(f, y0, [0.0, 1.0], method="rk5")
    for name in ("grad", "controller", "on_failure"):
        with raises(ValueError, name):
            nha.odeint(f, y0, [0.0, 1.0], **{name: "other"})
    for t in ([0.0, 0.0], [0.0, 2.0, 1.0], [], [0.0, math.nan], torch.zeros(2, 3)):
        with raises(ValueError, "t must"):
            nha.odeint(f, y0, t)
    with raises(TypeError, "y0"):
        nha.odeint(f, torch.ones(2, 2, dtype=torch.long), [0.0, 1.0])
    with raises(ValueError, "y0"):
        nha.odeint(f, torch.ones(2), [0.0, 1.0])
    with raises(ValueError, r"\(2, 1\).*\(2, 2\)"):
        nha.odeint(lambda t, y: y[:, :1], y0, [0.0, 1.0])
    with raises(ValueError, "sample 1"):
        nha.odeint(lambda t, y: torch.tensor([[1.0, 1.0], [math.nan, 1.0]], dtype=F64),
                   y0, [0.0, 1.0])
    with raises(RuntimeError, "max_steps=5"):
        nha.odeint(f, y0, [0.0, 100.0], max_steps=5)
    with raises(ValueError, "rtol"):
        nha.odeint(f, y0, [0.0, 1.0], rtol=0.0)
    with raises(ValueError, "per_sample"):
        nha.odeint(f, y0, torch.tensor([[0.0, 0.0], [1.0, 2.0]]), per_sample=False)
    with raises(ValueError, "adaptive"):
        nha.odeint(f, y0, [0.0, 1.0], method="rk4", grad="adjoint")
    net = Field()
    with raises(ValueError, "params"):
        nha.odeint(lambda t, y: net(t, y), y0, [0.0, 1.0], grad="adjoint")
    assert torch.equal(nha.odeint(f, y0, [0.0]).ys, y0[None])


# ---- events and hybrid systems ------------------------------------------------------------------

def test_event_times_and_their_gradients():
    z = load("events")
    g = float(z["ball_g"])
    fall = lambda t, y: torch.stack([y[:, 1], torch.full_like(y[:, 1], -g)], 1)
    y0 = torch.stack([z["ball_h0"], z["ball_v0"]], 1).requires_grad_()
    found = nha.odeint_event(fall, y0, 0.0, lambda t, y: y[:, 0], t_max=100.0, direction=-1)
    close(found.t_event.detach(), z["ball_impact_times"][0], 1e-9)
    close(found.t_event.detach(), z["ball_tdeq_t"], 1e-6)
    close(found.y_event.detach(), z["ball_tdeq_state"], 1e-6)
    grad, = torch.autograd.grad((found.t_event + 2 * found.y_event[:, 1]).sum(), y0)
    close(grad, z["ball_tdeq_grad_of_t_plus_2v"], 1e-6)
    assert found.fired.all() and found.which.tolist() == [0] * 6


def test_oscillator_pendulum_and_clocks():
    z = load("events")
    swing = lambda t, y: torch.stack([y[:, 1], -y[:, 2] ** 2 * y[:, 0], 0 * y[:, 2], 0 * y[:, 3]], 1)
    zero = torch.zeros(6, dtype=F64)
    y0 = torch.stack([zero + 1, zero, z["osc_w"], z["osc_level"]], 1)
    for direction, key in ((-1, "osc_first_down"), (1, "osc_first_up")):
        found = nha.odeint_event(swing, y0, 0.0, lambda t, y: y[:, 0] - y[:, 3], t_max=1e3,
                                 direction=direction)
        close(found.t_event, z[key], 1e-9)
    crossings = z["pendulum_theta0_and_first3_zero_crossings"]
    y, t = torch.stack([crossings[:, 0], zero], 1), zero
    for i in range(3):
        found = nha.odeint_event(lambda t, y: torch.stack([y[:, 1], -torch.sin(y[:, 0])], 1), y, t,
                                 lambda t, y: y[:, 0], t_max=1e3, rtol=1e-11)
        # starts on the guard: must not fire at once
        y, t = found.y_event, found.t_event
        close(t, crossings[:, i + 1], 1e-9)
    for w0, key, growth in ((zero + 0.693, "clock_t_slowstart", lambda w: 0.3465 * w),
                            (z["clock_w0"], "clock_t_ca", lambda w: 0 * w + 0.5)):
        found = nha.odeint_event(lambda t, y: torch.stack([growth(y[:, 0]), y[:, 0] / 20, 0 * y[:, 2]], 1),
                                 torch.stack([w0, zero, z["clock_s"]], 1),
                                 0.0, lambda t, y: y[:, 1] - y[:, 2],
                                 t_max=1e3, direction=1)
        close(found.t_event, z[key], 2e-9)


def test_several_guards_misses_and_double_crossings():
    f = lambda t, y: torch.ones_like(y)
    y0 = torch.tensor([[0.0], [0.5], [5.0]], dtype=F64)
    guard = lambda t, y: torch.stack([y[:, 0] - 2, y[:, 0] - 1], 1)
    found = nha.odeint_event(f, y0, torch.zeros(3), guard, t_max=3.0, direction=[0, 1])
    close(found.t_event, [1.0, 0.5, 3.0], 1e-12)
    assert found.which.tolist() == [1, 1, -1] and found.fired.tolist() == [True, True, False]
    close(found.y_event[:, 0], [1.0, 1.0, 8.0], 1e-12)
    # y' = 1 takes one long step over both roots of (y - 1)(y - 1.4).
    twice = nha.odeint_event(f, y0[:1], 0.0, lambda t, y: (y[:, 0] - 1) * (y[:, 0] - 1.4),
                             t_max=1.6,
                             first_step=1.6)
    close(twice.t_event, [1.0], 1e-12)
    tie = nha.odeint_event(f, y0[:1], 0.0, lambda t, y: torch.stack([y[:, 0] - 1, y[:, 0] - 1], 1),
                           t_max=2.0)
    assert tie.which.tolist() == [0]


def test_event_errors():
    f, y0 = (lambda t, y: torch.ones_like(y)), torch.zeros(1, 1, dtype=F64)
    guard = lambda t, y: y[:, 0] - 1
    with pytest.raises(ValueError, match="t_max"):
        nha.odeint_event(f, y0, 1.0, guard, t_max=0.0)
    with pytest.raises(ValueError, match="direction"):
        nha.odeint_event(f, y0, 0.0, guard, t_max=1.0, direction=2)
    with pytest.raises(ValueError, match="adaptive"):
        nha.odeint_event(f, y0, 0.0, guard, t_max=1.0, method="rk4")
    y = y0.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="without crossing"):
        nha.odeint_event(f, y, 0.0, lambda t, y: (y[:, 0] - 1) ** 3, t_max=2.5, grazing_tol=1e-3)
    with pytest.raises(ValueError, match="target"):
        nha.HybridSystem([f], [nha.Event(guard, target=1)])
    with pytest.raises(ValueError, match="z0"):
        nha.odeint_hybrid(nha.BouncingBall(), torch.ones(1, 2), 1, [0.0, 1.0])
    with pytest.raises(ValueError, match="increasing"):
        nha.odeint_hybrid(nha.BouncingBall(), torch.ones(1, 2), 0, [1.0, 0.0])


def test_bouncing_balls_in_a_batch_follow_the_analytic_solution():
    z = load("events")
    for i in range(0, 6, 2):
        ball = nha.BouncingBall(float(z["ball_g"]), float(z["ball_e"][i]))
        impacts = z["ball_impact_times"][:, i]
        x0 = torch.stack([z["ball_h0"][i], z["ball_v0"][i]])[None].repeat(2, 1)
        x0[1, 1] += 0.1
        found = nha.odeint_hybrid(ball, x0, 0, [0.0, float(impacts[-1]) + 1e-6])
        close(found.event_times[0, :6], impacts, 1e-9)
        close(found.x_pre[0, :6, 1], z["ball_preimpact_velocity"][:, i], 1e-8)
        assert found.n_events[0] == 6


def test_saltation_by_finite_differences():
    """States after bounces, differentiated through event times and jumps."""
    x0 = torch.tensor([[1.0, 0.5], [2.0, -0.3]], dtype=F64, requires_grad=True)
    states = lambda x: nha.odeint_hybrid(nha.BouncingBall(), x, 0, [0.0, 0.3, 1.0, 2.0]).ys
    assert torch.autograd.gradcheck(states, (x0,), eps=1e-6, atol=1e-5)


def test_sensitivity_grows_with_events_but_not_per_piece():
    """x' = 0 with x+ = 1.5 x at unit times: dx(T)/dx0 = 1.5^K, within a piece it is 1."""
    growth = nha.HybridSystem([lambda t, s: torch.stack([0 * s[:, 0], 0 * s[:, 1] + 1], 1)],
                              [nha.Event(lambda t, s: s[:, 1] - 1, lambda t, s: s
                                         * s.new_tensor([1.5, 0.0]),
                                         direction=1)])
    for events in (1, 3):
        x0 = torch.tensor([[1.0, 0.0]], dtype=F64, requires_grad=True)
        found = nha.odeint_hybrid(growth, x0, 0, [0.0, events + 0.5])
        grad, = torch.autograd.grad(found.ys[-1, 0, 0], x0)
        close(grad[0, 0], 1.5**events, 1e-8)


def test_output_at_an_event_is_after_the_jump_terminal_and_zeno():
    count = lambda **kw: nha.HybridSystem([lambda t, x: torch.ones_like(x)] * 2,
                                          [nha.Event(lambda t, x: x[:, 0] - 1, lambda t, x: x - 1, 0, 1, **kw)])
    found = nha.odeint_hybrid(count(), torch.zeros(1, 1, dtype=F64), 0, [0.0, 0.5, 1.0, 1.5])
    close(found.ys[:, 0, 0], [0.0, 0.5, 0.0, 0.5], 1e-12)
    assert found.modes[:, 0].tolist() == [0, 0, 1, 1]
    over = nha.odeint_hybrid(count(terminal=True), torch.zeros(1, 1, dtype=F64), 0, [0.0, 0.5, 1.5])
    assert over.ys[2].isnan().all() and over.modes[2, 0] == -1 and over.n_events[0] == 1
    zeno = nha.odeint_hybrid(nha.BouncingBall(e=0.5), torch.tensor([[1.0, 0.0]], dtype=F64),
                             0, [0.0, 3.0],
                             max_events=12)
    assert zeno.n_events[0] == 12 and zeno.ys[-1].isnan().all()
    rest = nha.odeint_hybrid(nha.BouncingBall(e=0.2), torch.tensor([[1.0, 0.0]], dtype=F64),
                             0, [0.0, 3.0])
    assert 5 < rest.n_events[0] < 60 and rest.ys[-1].isnan().all()
    none = nha.odeint_hybrid(nha.WheeledRobot(), torch.zeros(2, 3, dtype=F64),
                             torch.tensor([0, 4]), [0.0, 15.0])
    close(none.ys[-1, :, :2], [[-1.0, 2.0], [1.0, 2.0]], 1e-3)
    assert none.event_times.shape == (2, 0) and none.n_events.tolist() == [0, 0]


def test_switching_linear_modes_are_its_regions():
    system = nha.SwitchingLinear()
    x0 = torch.rand(20, 2, generator=gen(1), dtype=F64) * 6 - 3
    found = nha.odeint_hybrid(system, x0, system.region(x0), torch.linspace(0, 3, 61, dtype=F64))
    assert torch.equal(found.modes, system.region(found.ys)) and found.n_events.max() >= 2
    close(system.vector_field(torch.tensor([[3.0, 1.0], [0.0, 1.0], [0.0, -1.0]])),
          torch.tensor([[-1.0, 5.0], [-1.0, -1.0], [1.0, -1.0]]), 0)


def summary(solution):
    d = solution.durations(0.0, 100.0)
    done = ~d["censored"]
    to_off = [float((d["z2"][done & (d["z"] == m)] == 0).double().mean()) for m in (1, 2)]
    return [float(solution.n_events.double().mean()), *to_off,
            *(float(d["tau"][done & (d["z"] == m)].mean()) for m in range(3))]


def test_exact_tcp_sampler_statistics():
    exact = summary(nha.RenoTCP().sample_exact(400, n_points=10, generator=gen()))
    close(exact, [28.2, 0.495, 0.507, 2.86, 4.31, 3.20], 0.06)
    official = summary(nha.RenoTCP(clocks="official").sample_exact(400, n_points=10, generator=gen()))
    close(official, [23.6, 0.543, 0.363, 2.90, 5.24, 4.19], 0.08)


def test_simulated_tcp_follows_the_same_law_and_the_exact_flow():
    tcp = nha.RenoTCP()
    t = torch.linspace(0, 30, 31, dtype=F64)
    solved = nha.odeint_hybrid(tcp, torch.zeros(40, 2, dtype=F64), 0, t, generator=gen(3))
    k = int(solved.n_events.max())
    ends = torch.cat([torch.zeros(40, 1, dtype=F64), solved.event_times], 1)
    x = torch.cat([torch.zeros(40, 1, 2, dtype=F64), solved.x_post], 1)
    z = torch.cat([torch.zeros(40, 1, dtype=torch.long), solved.mode_post], 1)
    valid = torch.arange(k) < solved.n_events[:, None]
    flowed = tcp._exact_flow(x[:, :-1][valid],
                             z[:, :-1][valid], (ends[:, 1:] - ends[:, :-1])[valid])
    close(flowed, solved.x_pre[valid], 1e-6)
    # uniform if the durations follow the law
    for mode, w in ((1, 0.693), (0, 0.0)):
        taken = valid & (z[:, :-1] == mode) & (ends[:, :-1] < 12)
        survived = tcp.survival((ends[:, 1:] - ends[:, :-1])[taken], mode, w).sort().values
        assert (survived - (torch.arange(len(survived)) + 0.5) / len(survived)).abs().max() < 0.2


# ---- flows --------------------------------------------------------------------------------------

@pytest.mark.parametrize("tag,bound", [("tb3", 3.0), ("tb1", 1.0)])
def test_splines(tag, bound):
    z = load("rqs")
    x, w, h, d = (z[f"{tag}_{k}"].requires_grad_() for k in "xwhd")
    y, logdet = nha.rational_quadratic_spline(x, w, h, d, tail_bound=bound)
    close(y.detach(), z[f"{tag}_y"], 1e-10)
    close(logdet.detach(), z[f"{tag}_logabsdet"], 1e-10)
    for v, key, g in zip((x, w, h, d), "xwhd",
                         torch.autograd.grad((y + 0.7 * logdet).sum(), (x, w, h, d))):
        close(g, z[f"{tag}_grad_{key}"], 1e-9)
    back, logdet = nha.rational_quadratic_spline(y.detach(), w, h, d, tail_bound=bound,
                                                 inverse=True)
    close(back.detach(), z[f"{tag}_x_inv"], 1e-8)
    close(logdet.detach(), z[f"{tag}_logabsdet_inv"], 1e-8)
    y, logdet = nha.rational_quadratic_spline(x, w, h, d, tail_bound=bound, identity_init=True)
    # The published variant's boundary slopes are a little off 1; bins inside agree.
    width = 1e-3 + (1 - 8e-3) * w.softmax(-1)
    edges = (2 * bound * width.cumsum(-1) - bound).detach()
    inner = (x > edges[:, 0]) & (x < edges[:, -2]) | (x.abs() > bound)
    close(y[inner].detach(), z[f"{tag}_y_identity_init"][inner], 1e-10)
    close(logdet[inner].detach(), z[f"{tag}_logabsdet_identity_init"][inner], 1e-10)


def test_spline_on_the_unit_interval_edges_identity_and_errors():
    z = load("rqs")
    spline = nha.rational_quadratic_spline
    y, logdet = spline(z["unit_x"], z["unit_w"], z["unit_h"], z["unit_d"])
    close(y, z["unit_y"], 1e-10)
    close(logdet, z["unit_logabsdet"], 1e-10)
    zeros = torch.zeros(7, 8, dtype=F64)
    y, logdet = spline(z["edge_x"], zeros, zeros, zeros[:, :-1], tail_bound=3.0)
    close(y, z["edge_y"], 1e-10)
    close(logdet, z["edge_logabsdet"], 1e-10)
    x = torch.linspace(-4, 4, 33, dtype=F64)
    zeros = torch.zeros(33, 5, dtype=F64)
    y, logdet = spline(x, zeros, zeros, zeros[:, :-1], tail_bound=3.0, identity_init=True)
    close(y, x, 1e-12)
    close(logdet, torch.zeros(33), 1e-12)
    random = [torch.randn(1, k, generator=gen(), dtype=F64).expand(33, k) for k in (5, 5, 4)]
    y, logdet = spline(x, *random, tail_bound=3.0, identity_init=True)
    back, minus = spline(y, *random, tail_bound=3.0, identity_init=True, inverse=True)
    close(back, x, 1e-10)
    close(minus, -logdet, 1e-10)
    assert (y.diff() > 0).all()
    for bad in (dict(min_bin_width=0.3), dict(min_bin_height=0.3)):
        with pytest.raises(ValueError, match="too large"):
            spline(x, *random, tail_bound=3.0, **bad)
    with pytest.raises(ValueError, match="K - 1"):
        spline(x, random[0], random[1], random[0], tail_bound=3.0)
    with pytest.raises(ValueError, match="0, 1"):
        spline(x, random[0], random[1], torch.zeros(33, 6, dtype=F64))


def test_conditional_flow_is_a_density_with_its_own_inverse():
    flow = parameters_from(nha.ConditionalFlow1d(2, n_layers=2).double(), gen(1), 0.4)
    c = torch.randn(3, 1, 2, generator=gen(2), dtype=F64)
    x = torch.exp(torch.linspace(-12, 12, 20001, dtype=F64))
    p = flow.log_prob(x.expand(3, -1), c).exp()
    close(torch.trapezoid(p, x), torch.ones(3), 1e-3)
    q = torch.tensor([0.01, 0.3, 0.999], dtype=F64).expand(3, 3)
    at = flow.icdf(q, c)
    close(flow.cdf(at, c), q, 1e-8)
    close(flow.log_survival(at, c).exp(), 1 - q, 1e-8)
    drawn = flow.sample((3, 4000), c, gen(3)).detach()
    uniform = flow.cdf(drawn, c).sort(1).values
    assert (uniform - torch.linspace(0, 1, 4000)).abs().max() < 0.03
    plain = nha.ConditionalFlow1d()
    close(plain.log_prob(torch.tensor([1.0, 2.0])),
          torch.distributions.LogNormal(0.0, 1.0).log_prob(torch.tensor([1.0, 2.0])), 1e-5)
    with pytest.raises(ValueError, match="positive"):
        plain.log_prob(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="context"):
        plain.log_prob(torch.ones(1), torch.ones(1, 2))
    with pytest.raises(ValueError, match="n_bins"):
        nha.ConditionalFlow1d(n_bins=0)


@pytest.mark.parametrize("make", [
    lambda: nha.AffineCoupling(3, 2), lambda: nha.AffineCoupling(3, 2, flip=True),
    lambda: nha.MaskedAutoregressiveFlow(3, 2), lambda: nha.MaskedAutoregressiveFlow(1, 2)])
def test_vector_flows_invert_and_count_volume(make):
    flow = parameters_from(make().double(), gen(4), 0.8)
    x, c = (torch.randn(5, k, generator=gen(5), dtype=F64) for k in (flow.dim, 2))
    z, logdet = flow(x, c)
    back, minus = flow.inverse(z, c)
    close(back.detach(), x, 1e-10)
    close(minus.detach(), -logdet.detach(), 1e-10)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None], c[i : i + 1])[0][0], x[i])
        close(torch.linalg.slogdet(jacobian)[1], logdet[i].detach(), 1e-10)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    close(flow.log_prob(x, c).detach(), (base + logdet).detach(), 1e-6)
    assert flow.sample(5, c, gen()).shape == x.shape


def exponential_race(n, seed):
    g = gen(seed)
    clocks = -torch.log(torch.rand(n, 2, generator=g, dtype=F64).clamp(min=1e-12))
    tau, z2 = clocks.min(1)
    return tau.float(), torch.zeros(n, dtype=torch.long), z2


@pytest.mark.parametrize("estimator", ["joint", "race"])
def test_estimators_fit_a_race_of_two_clocks(estimator):
    tau, z, z2 = exponential_race(3000, 7)
    module = nha.EventModule(2, estimator=estimator)
    rows = list(nha.train_event_module(module, tau, z, z2, epochs=150, lr=2e-2))
    assert rows[-1]["nll"] < rows[0]["nll"]
    drawn, to = module.sample(torch.zeros(20000, dtype=torch.long), generator=gen(1))
    assert abs(float(drawn.mean()) - 0.5) < 0.06 and abs(float(to.double().mean()) - 0.5) < 0.04
    assert (drawn <= 0.35).double().mean().sub(1 - math.exp(-0.7)).abs() < 0.03
    # Racing fits of the observed (minimal) times would halve the mean: that is not what `race`
    # does.
    naive = torch.stack([tau[torch.randint(0, 3000, (20000,), generator=gen(i))]
                         for i in (2, 3)]).min(0).values
    assert abs(float(naive.mean()) - 0.25) < 0.03


def test_censored_times_and_event_module_checks():
    tau, z, z2 = exponential_race(3000, 8)
    censored = tau > 0.5
    tau = tau.clamp(max=0.5)
    for estimator in ("joint", "race"):
        module = nha.EventModule(2, estimator=estimator)
        list(nha.train_event_module(module, tau, z, z2, censored=censored, epochs=120, lr=2e-2))
        alive = module.log_prob(torch.tensor([0.4]), z[:1], z2[:1],
                                censored=torch.tensor([True])).exp()
        assert abs(float(alive.detach()) - math.exp(-0.8)) < 0.04
        unknown = torch.full_like(z2, 99)
        close(module.log_prob(tau, z, torch.where(censored, unknown, z2),
                              censored=censored).detach(),
              module.log_prob(tau, z, z2, censored=censored).detach(), 0)
    module = nha.EventModule(3)
    module.initialize(torch.ones(4) + torch.arange(4), torch.zeros(4).long(),
                      torch.tensor([1, 1, 1, 2]))
    close(module.transition_probs(torch.tensor([0])).detach()[0], [0.0, 0.75, 0.25], 1e-3)
    with pytest.raises(ValueError, match="joint"):
        nha.EventModule(2, estimator="race").transition_probs(z[:1])
    with pytest.raises(ValueError, match="estimator"):
        nha.EventModule(2, estimator="both")
    with pytest.raises(ValueError, match="n_modes"):
        nha.EventModule(0)
    one = torch.ones(1), torch.zeros(1).long(), torch.zeros(1).long()
    with pytest.raises(ValueError, match="tau"):
        module.log_prob(-one[0], *one[1:])
    with pytest.raises(ValueError, match="modes"):
        module.log_prob(one[0], one[1] + 3, one[2])
    with pytest.raises(ValueError, match="uncensored"):
        module.initialize(*one, censored=torch.tensor([True]))


def test_event_module_with_context_normalises():
    for estimator in ("joint", "race"):
        module = nha.EventModule(2, context_dim=1, estimator=estimator).double()
        parameters_from(module, gen(9), 0.3)
        tau = torch.exp(torch.linspace(-10, 10, 8001, dtype=F64))
        c, zero = torch.full((8001, 1), 0.7, dtype=F64), torch.zeros(8001, dtype=torch.long)
        p = sum(module.log_prob(tau, zero, zero + j, context=c).exp() for j in range(2)).detach()
        close(torch.trapezoid(p, tau), 1.0, 2e-3)


def test_the_context_of_an_event_module_is_standardised_and_used():
    c = torch.rand(600, 2, generator=gen(1)) * torch.tensor([1.0, 100.0])
    # mean 0.2 + c_0
    tau = -(0.2 + c[:, 0]) * torch.log(torch.rand(600, generator=gen(2)).clamp(min=1e-6))
    zero = torch.zeros(600, dtype=torch.long)
    for estimator in ("joint", "race"):
        module = nha.EventModule(1, context_dim=2, estimator=estimator)
        rows = list(nha.train_event_module(module, tau, zero, zero, context=c, epochs=25, lr=4e-2))
        close(module.center, c.mean(0), 1e-5)
        assert rows[-1]["nll"] < rows[0]["nll"] - 0.05
        means = [float(module.sample(zero, torch.tensor([[v, 50.0]]).expand(600, 2),
                                     generator=gen(3))[0].mean())
                 for v in (0.1, 0.9)]
        assert means[0] < 0.6 * means[1]


# ---- segments, encoder, decoder -----------------------------------------------------------------

def test_published_segmentation():
    z = load("tcp_trajectory")
    states = z["state_w_s_q_lambda5"]
    pieces = nha.segment(z["t"], states[:, :2], mode=states[:, 2], jump_threshold=0.5)
    assert pieces[-1].censored and not pieces[0].censored
    pieces = pieces[:-1]
    assert [len(p.t) for p in pieces] == z["segment_lengths"].tolist()
    assert [p.mode for p in pieces] == z["segment_mode"].int().tolist()
    close([float(p.t[0]) for p in pieces], z["segment_t_start"], 0)
    close([float(p.t[-1]) for p in pieces], z["segment_t_end"], 0)
    packed = nha.pack_pieces(pieces)
    assert torch.equal(packed.features, z["encoder_features"])
    assert torch.equal(packed.lengths, z["segment_lengths"])
    assert all((packed.t[i, n:] == packed.t[i, n - 1]).all()
               for i, n in enumerate(packed.lengths.tolist()))


def test_segmentation_without_labels_jitter_and_errors():
    t = torch.linspace(0, 6, 301)
    x = torch.where(t < 2, t, torch.where(t < 4, 2 - 0.5 * (t - 2), 5 + torch.sin(t)))[:, None]
    starts = [float(p.t[0]) for p in nha.segment(t, x, changepoint=0.5)]
    assert len(starts) == 3
    close(starts, [0.0, 2.0, 4.0], 0.021)
    pieces = nha.segment(t, x, mode=(t >= 2).long() + (t >= 4).long())
    assert [p.mode for p in pieces] == [0, 1, 2]
    moved = nha.jitter_boundaries(pieces, 1.0, 10, generator=gen(2))
    assert torch.equal(torch.cat([p.t for p in moved]), t) and [p.mode for p in moved] == [0, 1, 2]
    assert [len(p.t) for p in moved] != [len(p.t) for p in pieces]
    same = nha.jitter_boundaries(pieces, 0.0, generator=gen())
    assert [len(p.t) for p in same] == [len(p.t) for p in pieces]
    with pytest.raises(ValueError, match="mode, jump_threshold"):
        nha.segment(t, x)
    with pytest.raises(ValueError, match="agree"):
        nha.segment(t, x[1:], jump_threshold=0.5)
    for bad in ([], [nha.Piece(t[:1], x[:1], 0, False)]):
        with pytest.raises(ValueError, match="pieces"):
            nha.pack_pieces(bad)


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
def test_published_training_step(kind):
    z = load("nha_official")
    m = nha.NHA(nha.ModeEncoder(10, 3, kind=kind, dropout=None), nha.ModeDecoder(2, 3)).double()
    linears = [layer for layer in m.encoder.modules() if isinstance(layer, nn.Linear)]
    names = {}
    with torch.no_grad():
        for index, layer in zip((0, 2, 4, 6), linears):
            for what in ("weight", "bias"):
                if getattr(layer, what) is not None:
                    names[f"enc_{index}_{what}"] = getattr(layer, what)
        names |= {"dec_weight": m.decoder.weight, "dec_bias": m.decoder.bias}
        for key, p in names.items():
            p.copy_(z[f"{kind}_{key}"])
    lengths = z["seg_len"].tolist()
    t = [v for v in z["seg_t"].split(lengths)]
    targets = z[f"{kind}_target"].split(lengths)
    packed = nha.pack_pieces([nha.Piece(a, b, None, False) for a, b in zip(t, targets)])
    q = m.encode(z["features"])
    close(q.detach(), z[f"{kind}_q"], 1e-10)
    xhat = m.decode(z["x0"], q, packed.t)
    lag = torch.arange(xhat.shape[1]).sub(1).clamp(min=0)
    lag[1] = 1
    xhat = xhat[:, lag]                                        # the published output lags
    close(torch.cat([v[:n] for v, n in zip(xhat, lengths)]).detach(), z[f"{kind}_sol"], 1e-10)
    loss = nha.reconstruction_loss(xhat, packed.x, packed.mask)
    close(loss.detach(), z[f"{kind}_loss"], 1e-10)
    close(nha.smape(xhat, packed.x, packed.mask).detach(), z[f"{kind}_smape"], 1e-10)
    for (key, p), g in zip(names.items(), torch.autograd.grad(loss, list(names.values()))):
        close(g, z[f"{kind}_grad_{key}"], 1e-9)


def test_sparsemax_and_straight_through():
    z = load("nha_official")
    x = z["sparsemax_in"].requires_grad_()
    p = nha.sparsemax(x)
    close(p.detach(), z["sparsemax_out"], 1e-12)
    close(torch.autograd.grad((p * z["sparsemax_w"]).sum(), x)[0], z["sparsemax_grad"], 1e-12)
    close(nha.sparsemax(x.T, dim=0).T.detach(), p.detach(), 1e-12)
    logits = z["ste_logits"].requires_grad_()
    q = nha.straight_through(logits, sample=z["ste_sample"])
    close(q.detach(), z["ste_out"], 1e-12)
    close(torch.autograd.grad((q * z["ste_w"]).sum(), logits)[0], z["ste_grad"], 1e-12)
    drawn = nha.straight_through(torch.tensor([[0.0, math.log(3.0)]]).expand(4000, 2),
                                 generator=gen())
    assert abs(float(drawn[:, 1].mean()) - 0.75) < 0.03


@pytest.mark.parametrize("kind", ["ste", "softmax", "sparsemax", "gumbel"])
def test_encoders(kind):
    encoder = nha.ModeEncoder(10, 4, kind=kind)
    assert sum(p.numel() for p in encoder.parameters()) == 9024 + 64 * 4
    assert sum(p.numel() for p in nha.ModeEncoder(10, 4, dropout=None).parameters()) == 2464 + 32 * 4
    features = torch.randn(50, 10, generator=gen())
    q = encoder(features, generator=gen(1))
    assert torch.equal(q, encoder(features, generator=gen(1))) and not torch.equal(q, encoder(features, generator=gen(2)))
    close(q.sum(-1).detach(), torch.ones(50), 1e-5)
    encoder.eval()
    if kind in ("ste", "gumbel"):
        assert torch.equal(encoder(features), encoder(features))
        assert torch.equal(encoder(features).argmax(-1), encoder.logits(features).argmax(-1))
    hard = encoder(features, mode="argmax")
    close(hard.amax(-1).detach(), torch.ones(50), 1e-6)
    close(encoder(features, mode="sample", generator=gen()).amax(-1).detach(), torch.ones(50), 1e-6)
    with pytest.raises(ValueError, match="mode"):
        encoder(features, mode="best")
    with pytest.raises(ValueError, match="kind"):
        nha.ModeEncoder(10, 4, kind="hard")
    with pytest.raises(ValueError, match="n_modes"):
        nha.ModeEncoder(10, 0)


def test_decoder_counts_starts_constant_and_the_exact_flow_is_rk4s_limit():
    assert sum(p.numel() for p in nha.ModeDecoder(2, 5).parameters()) == 20
    assert sum(p.numel() for p in nha.ModeDecoder(2, 5, hidden=32).parameters()) == 5 * 130
    model = nha.NHA(nha.ModeEncoder(10, 3), nha.ModeDecoder(2, 3)).double()
    x0 = torch.rand(4, 2, generator=gen(), dtype=F64) + 0.1
    t = torch.rand(4, 200, generator=gen(1), dtype=F64).mul(0.03).cumsum(1)
    t[:, 150:] = t[:, 149:150]                                 # padding: dt = 0
    q = torch.eye(3, dtype=F64)[torch.tensor([0, 1, 2, 0])]
    close(model.decode(x0, q, t).detach(), x0[:, None].expand(-1, 200, -1), 0)
    with torch.no_grad():
        model.decoder.weight.copy_(torch.tensor([[[0.3465], [1.0]], [[0.0], [1.0]], [[-2.0], [0.5]]]))
        model.decoder.bias.copy_(torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.3, -0.2]]))
    exact, rk4 = (model.decode(x0, q, t, solver=s).detach() for s in ("exact", "rk4"))
    close(exact, rk4, 1e-8)
    close(exact[0, 149, 0], x0[0, 0] * torch.exp(0.3465 * (t[0, 149] - t[0, 0])), 1e-7)
    for small in (1e-9, 0.0999, 0.1001, -3.0):
        value = torch.tensor(small, dtype=F64)
        close(nha._Phi2.apply(value), (math.expm1(small) - small) / small**2 if abs(small) > 1e-3
              else 0.5, 1e-9)
    at = torch.tensor([-3.0, -0.1001, -0.0999, 0.0, 1e-6, 0.0999, 0.1001, 2.0], dtype=F64,
                      requires_grad=True)
    assert torch.autograd.gradcheck(nha._Phi2.apply, (at,), eps=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="solver"):
        model.decode(x0, q, t, solver="euler")
    with pytest.raises(ValueError, match="affine"):
        nha.NHA(nha.ModeEncoder(10, 3), nha.ModeDecoder(2, 3, hidden=8)).decode(x0, q, t,
                                                                                solver="exact")


def test_v_measure():
    z = load("vmeasure")
    for i in range(sum(k.startswith("true_") for k in z)):
        close(nha.v_measure(z[f"true_{i}"], z[f"pred_{i}"], float(z[f"beta_{i}"])),
              z[f"hcv_{i}"].tolist(), 1e-12)
    assert nha.v_measure([0, 0, 1], [5, 5, 2]) == (1.0, 1.0, 1.0)
    for bad in (([], []), ([0], [0, 1])):
        with pytest.raises(ValueError, match="true and pred"):
            nha.v_measure(*bad)


# ---- learning -----------------------------------------------------------------------------------

def tcp_pieces(n, seed):
    runs, grid, pieces = nha.RenoTCP().sample_exact(n, 60.0, 600, generator=gen(seed)), torch.linspace(0, 60, 600), []
    for i in range(n):
        t, x, mode = runs.trajectory(grid, i)
        pieces += nha.segment(t, x, mode=mode, jump_threshold=0.5)
    return runs, [p._replace(t=p.t.float(), x=p.x.float()) for p in pieces]


def new_model(seed, m=3, **options):
    model = nha.NHA(nha.ModeEncoder(10, m, **options), nha.ModeDecoder(2, m))
    parameters_from(model.encoder, gen(seed))
    return model


def test_training_recovers_tcp_modes_resumes_and_prunes():
    _, pieces = tcp_pieces(3, 0)
    packed, truth = nha.pack_pieces(pieces), [p.mode for p in pieces]
    options = dict(epochs=500, solver="exact", true_modes=truth)
    model = new_model(2, m=4, dropout=None)
    rows = [row for row in nha.train_mode_recovery(model, packed, generator=gen(2), **options)]
    assert set(rows[0]) == {"epoch", "loss", "smape", "n_used", "v"}
    model.eval()
    labels = model.encode(packed.features).argmax(-1)
    xhat, _ = model.reconstruct(packed, solver="exact")
    before = float(nha.reconstruction_loss(xhat.detach(), packed.x, packed.mask))
    assert before < 0.1 * rows[0]["loss"]
    assert nha.v_measure([int(z == 2) for z in truth], labels)[0] > 0.8
    kept = model.prune(packed)
    assert len(kept) == len(model.decoder.bias) <= len(labels.unique())
    merged, q = model.reconstruct(packed, solver="exact")
    assert q.shape[1] == len(kept)
    assert float(nha.reconstruction_loss(merged.detach(), packed.x, packed.mask)) < before + 0.2

    def run(stop):
        model, g = new_model(1, m=3), gen(2)
        steps = nha.train_mode_recovery(model, packed, epochs=8, solver="rk4", generator=g)
        losses = []
        for row in steps:
            losses.append(row["loss"])
            if len(losses) == stop:
                state = steps.send("state")
                model, g = new_model(5, m=3), gen(6)
                losses += [r["loss"] for r in nha.train_mode_recovery(model, packed, epochs=8, solver="rk4",
                                                                      generator=g, resume=state)]
                break
        return losses

    assert run(3) == run(None)


def test_prune_merges_copies_and_drops_unused_modes():
    model = new_model(3, m=4, dropout=None).eval()
    _, pieces = tcp_pieces(1, 1)
    packed = nha.pack_pieces(pieces)
    with torch.no_grad():
        model.decoder.weight.copy_(torch.tensor([[[0.3465], [1.0]]]).expand(4, 2, 1))
        model.decoder.bias.zero_()
    before, _ = model.reconstruct(packed)
    assert len(model.prune(packed)) == 1
    after, q = model.reconstruct(packed)
    close(after.detach(), before.detach(), 1e-6)
    close(q.detach(), torch.ones(len(pieces), 1), 1e-6)


def test_event_training_resumes():
    tau, z, z2 = exponential_race(200, 3)
    a = [r["nll"] for r in nha.train_event_module(nha.EventModule(2), tau, z, z2, epochs=6)]
    first = nha.train_event_module(nha.EventModule(2), tau, z, z2, epochs=6)
    b = [next(first)["nll"] for _ in range(3)]
    state = first.send("state")
    b += [r["nll"] for r in nha.train_event_module(nha.EventModule(2), tau, z, z2, epochs=6, resume=state)]
    assert a == b


def test_generation_with_the_true_modules_matches_the_system():
    """Exact decoder, event flows fitted on exact pieces, jumps by regression."""
    runs = nha.RenoTCP().sample_exact(150, n_points=2, generator=gen(5), dtype=torch.float32)
    k = runs.n_events[:, None] > torch.arange(runs.event_times.shape[1])
    jump = nha.JumpMaps(3, 2).fit(runs.x_pre[k], runs.x_post[k], runs.mode_pre[k],
                                  runs.mode_post[k])
    close(jump(torch.tensor([[4.0, 7.0]]), torch.tensor([1]), torch.tensor([2])), [[2.0, 7.0]], 1e-3)
    close(jump(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), torch.tensor([1])), [[0.693, 0.0]], 1e-3)
    d = runs.durations(0.0, 100.0)
    keep = d["tau"] > 1e-6
    d = {name: v[keep] for name, v in d.items()}
    events = nha.EventModule(3)
    list(nha.train_event_module(events, d["tau"].float(), d["z"], d["z2"], censored=d["censored"],
                                epochs=60, lr=2e-2))
    model = nha.NHA(nha.ModeEncoder(10, 3), nha.ModeDecoder(2, 3), events, jump).eval()
    with torch.no_grad():
        model.decoder.weight.copy_(torch.tensor([[[0.0], [0.0]], [[0.3465], [1.0]], [[0.0], [1.0]]]))
        model.decoder.bias.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.0]]))
    made = model.generate(torch.zeros(200, 2), 0, 100.0, generator=gen(6))
    truth = nha.RenoTCP().sample_exact(200, n_points=201, generator=gen(7))
    assert abs(float(made.n_events.double().mean()) / float(truth.n_events.double().mean())
               - 1) < 0.1
    for mode in range(3):
        share = [(s.modes == mode).double().mean() for s in (made, truth)]
        assert abs(float(share[0] - share[1])) < 0.05
    assert made.ys.isfinite().all() and (made.event_times.diff(dim=1).nan_to_num(1.0) > 0).all()
    with pytest.raises(ValueError, match="event_module"):
        nha.NHA(nha.ModeEncoder(10, 3), nha.ModeDecoder(2, 3)).generate(torch.zeros(1, 2), 0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_trajectory_puts_both_states_at_an_event(dtype):
    runs = nha.RenoTCP().sample_exact(2, 20.0, 41, generator=gen(11), dtype=dtype)
    t, x, mode = runs.trajectory(torch.linspace(0, 20, 41), 0)
    assert (t.diff() >= 0).all() and len(t) == 41 + 2 * int(runs.n_events[0])
    twice = (t.diff() == 0).nonzero()[:, 0]
    assert len(twice) == int(runs.n_events[0])
    assert torch.equal(mode[twice], runs.mode_pre[0, : len(twice)])
    assert torch.equal(x[twice + 1], runs.x_post[0, : len(twice)]) and x.dtype == dtype
    d = runs.durations(0.0, 20.0)
    assert d["censored"].sum() == 2
    starts = d["x"][d["z"] == 1]
    close(starts, torch.tensor([0.693, 0.0]).expand_as(starts), 1e-6)
    close(d["tau"].sum(), 40.0, 1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees():
    _, f = neural_field()
    y0, t = torch.randn(9, 2, generator=gen(), dtype=F64), torch.linspace(0, 3, 4, dtype=F64)
    grads = []
    for device in ("cpu", "cuda"):
        y = y0.to(device).requires_grad_()
        ys = nha.odeint(f.to(device), y, t.to(device)).ys
        grads.append(torch.autograd.grad(ys.sum(), y)[0].cpu())
    close(*grads, 1e-9)


# ---- scripts ------------------------------------------------------------------------------------

SCRIPTS = [p.name for p in sorted((ROOT / "benchmarks").glob("*nha*.py"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run(script, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--preset", "tiny",
                           "--threads", "1",
                           "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "holds" in done.stdout
