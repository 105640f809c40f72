"""Solvers, events, hybrid systems of reference/nha.py; what learns is in test_nha_learning.py."""

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reference import nha

GOLDEN = Path(__file__).parent / "golden" / "nha"
F64 = torch.float64
double = lambda *values: torch.tensor(values, dtype=F64)    # noqa: E731


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as z:
        return {k: torch.from_numpy(np.asarray(z[k])) for k in z.files}


def close(a, b, tolerance):
    a, b = (v.detach().double() if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=F64)
            for v in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def refused(cases):
    """(error, what its message holds, a call)."""
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=gen(seed), dtype=F64)


def parameters_from(module, generator, scale=1.0):
    """Random parameters from an explicit generator."""
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(scale * noise / p.shape[-1] ** 0.5)
    return module


class Field(nn.Module):
    def __init__(self, n=2, width=16):
        super().__init__()
        self.n = nn.Sequential(nn.Linear(n, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                               nn.Linear(width, n)).double()

    def forward(self, t, y):
        return self.n(y) + 0.1 * t.reshape(-1, 1) * y


def oscillator(mu):
    return lambda t, y: torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)


A = double([-0.1, 2], [-2, -0.1])
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
every_system = pytest.mark.parametrize("name", [p.stem[4:] for p in
                                                sorted(GOLDEN.glob("ode_*.npz"))])
drift = lambda t, y: torch.ones_like(y)                     # noqa: E731


# ---- solvers ------------------------------------------------------------------------------------

def test_tableaux():
    z = load("tableaux")
    for method in ("dopri5", "tsit5"):
        tab = nha.METHODS[method]
        for found, key in ((tab.c[1:], "c"), (tab.error, "berr"), (tab.b, "b"),
                           *((tab.a[i - 1], f"a{i}") for i in range(2, 8))):
            close(found, z[f"{method}_{key}"], 1e-15)
    half = double(*(0.5**p for p in range(1, 5)))
    close(double(*nha.METHODS["dopri5"].dense) @ half, z["dopri5_mid"], 1e-15)


@pytest.mark.parametrize("method", nha._TABLEAUS)
def test_tableaux_are_consistent(method):
    tab = nha._TABLEAUS[method]
    close([sum(row) for row in tab.a], tab.c, 1e-14)
    for power in range(min(tab.order, 4)):                     # quadrature conditions
        close(sum(b * c**power for b, c in zip(tab.b, tab.c)), 1 / (power + 1), 1e-13)
    if tab.dense is not None:
        close([sum(row) for row in tab.dense], tab.b, 1e-13)
        close(sum(tab.error), 0.0, 1e-15)


@every_system
def test_solutions_and_step_counts(name):
    z, f = load(f"ode_{name}"), SYSTEMS[name]
    limits = dict(rtol=float(z["rtol"]), atol=float(z["atol"]))
    solve = lambda t=z["t"], **options: nha.odeint(f, z["y0"], t, **limits | options)
    shared, own = solve(per_sample=False), solve()
    close(shared.ys, z["y_dopri5"], 1e-9)
    assert shared.stats.n_f.tolist() == [int(z["nfe"])] * len(z["y0"])
    assert shared.stats.n_accepted.tolist() == [len(z["accepted"])] * len(z["y0"])
    close(own.ys, z["y_dopri5_per_sample"], 1e-9)
    assert torch.equal(torch.stack(own.stats[:3], 1), z["per_sample_counts"])
    close(solve(method="bosh3", per_sample=False, rtol=1e-4, atol=1e-6).ys, z["y_bosh3"], 1e-9)
    scale = 100 * (limits["atol"] + limits["rtol"] * z["y_ref"].abs().amax())
    for controller in ("I", "PI"):
        tsit5 = solve(method="tsit5", controller=controller)
        assert (tsit5.ys - z["y_ref"]).abs().max() < scale
    grid = torch.from_numpy(np.linspace(0, float(z["t_fixed"][-1]), 401))
    for method in ("euler", "midpoint", "rk4_38", "rk4"):
        key = "y_fixed_" + ("rk4_classical" if method == "rk4" else method)
        if key in z:
            close(solve(grid, method=method).ys[::20], z[key], 1e-9 if name == "lorenz" else 1e-12)


@every_system
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
    y0, t = torch.tensor([[2.0, 0.0]]), torch.linspace(0, 5, 6)
    own, shared = (nha.odeint(oscillator(1.0), y0, t, per_sample=p, rtol=1e-4, atol=1e-5)
                   for p in (True, False))
    assert own.ys.dtype == torch.float32 and torch.equal(own.ys, shared.ys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    y0 = torch.ones(2, 1, dtype=dtype).requires_grad_()
    ys = nha.odeint(lambda t, y: -y, y0, [0.0, 0.5, 1.0], rtol=1e-2, atol=1e-2).ys
    grad, = torch.autograd.grad(ys[-1].sum(), y0)
    assert ys.dtype == grad.dtype == dtype
    close(ys[-1], torch.full((2, 1), math.exp(-1)), 3e-2)
    close(grad, torch.full((2, 1), math.exp(-1)), 3e-2)


@pytest.mark.parametrize("name", ["linear", "nonautonomous"])
def test_reversed_time(name):
    z, f = load(f"ode_{name}"), SYSTEMS[name]
    forward = nha.odeint(f, z["y0"], z["t"], rtol=1e-10, atol=1e-12)
    back = nha.odeint(f, forward.ys[-1], z["t"].flip(0), rtol=1e-10, atol=1e-12)
    close(back.ys.flip(0), forward.ys, 1e-7)
    shared = nha.odeint(f, z["y_dopri5"][-1], z["t"].flip(0), rtol=1e-9, atol=1e-11,
                        per_sample=False)
    close(shared.ys, z["y_reverse"], 1e-6)


def test_own_time_grids_directions_and_padding():
    f, y0 = SYSTEMS["nonautonomous"], double([1.0], [0.5], [2.0])
    t = double([0.0, 1.0, 0.5], [1.0, 0.5, 0.7], [2.0, 0.0, 0.9], [3.0, -1.0, 0.9])
    ys = nha.odeint(f, y0, t, rtol=1e-9, atol=1e-11).ys
    for i in range(3):
        alone = nha.odeint(f, y0[i : i + 1], t[: 3 if i == 2 else 4, i], rtol=1e-9, atol=1e-11).ys
        close(ys[: len(alone), i], alone[:, 0], 1e-12)
    assert torch.equal(ys[3, 2], ys[2, 2])
    close(nha.odeint(f, y0, t, method="rk4", step_size=0.01).ys, ys, 1e-7)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4", "rk4_38"])
def test_orders_on_a_nonautonomous_problem(method):
    solve = lambda n: nha.odeint(lambda t, y: torch.cos(t)[:, None] * y, double([1.0]),
                                 torch.linspace(0, 2, n + 1, dtype=F64), method=method).ys[-1]
    errors = [abs(float(solve(n)) - math.exp(math.sin(2.0))) for n in (80, 160)]
    order = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "rk4_38": 4}[method]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5"])
def test_dense_output(method):
    f, y0 = SYSTEMS["linear"], double([1.0, 0.0], [0.0, 3.0])
    solution = nha.odeint(f, y0, [0.0, 2.0], method=method, rtol=1e-8, atol=1e-10, dense=True)
    for t in (0.0, 0.37, 2.0):
        close(solution.dense(t), y0 @ torch.matrix_exp(A * t).T, 3e-5)
    close(solution.dense(torch.tensor([0.37, 1.0]))[1], y0[1] @ torch.matrix_exp(A).T, 3e-5)
    refused([(ValueError, "outside", lambda: solution.dense(2.5)),
             (ValueError, "t must", lambda: solution.dense(torch.zeros(3)))])


@pytest.mark.parametrize("t", [double(2.0, 1.5, 0.0), double([0.0, 3.0], [1.0, 2.0], [2.0, 2.0])])
def test_dense_output_and_adjoint_of_a_fixed_step_method(t):
    y0, rate = double([1.0, 0.0], [0.0, 3.0]), torch.tensor(0.7, dtype=F64, requires_grad=True)
    solve = lambda **options: nha.odeint(lambda t, y: torch.sin(t)[:, None] * y @ A.T * rate, y0, t,
                                         method="rk4", step_size=0.01, rtol=1e-9, **options)
    at = double(0.635, 2.5) if t.dim() == 2 else double(0.635, 1.7)
    angle = torch.cos(t[0]).expand(2) - torch.cos(at)
    exact = (torch.matrix_exp(A * rate * angle[:, None, None]) @ y0[:, :, None])[:, :, 0]
    found = solve(dense=True).dense(at)
    close(found, exact, 1e-8)
    close(*(torch.autograd.grad(y.square().sum(), rate)[0] for y in (found, exact)), 1e-7)
    assert not solve(dense=True, grad="none").dense(at).requires_grad
    by_adjoint, by_backprop = (torch.autograd.grad(ys[1:].square().sum(), rate)[0] for ys in
                               (solve(grad="adjoint", params=[rate]).ys, solve().ys))
    close(by_adjoint, by_backprop, 1e-6)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_solution_keeps_its_times_and_states_when_the_caller_reuses_its_own(method):
    y, t = torch.ones(2, 1).double(), torch.linspace(0, 1, 3).double()
    solution = nha.odeint(lambda t, y: -y, y, t, method=method, dense=True)
    before = solution.dense(0.5), solution.dense(0.0)
    y.fill_(9), t.fill_(7)
    assert solution.ts.tolist() == [0, 0.5, 1]
    assert torch.equal(solution.dense(0.5), before[0])
    assert torch.equal(solution.dense(0.0), before[1])


def test_checks_every_few_attempts_change_nothing():
    z, f, start = load("ode_vdp1"), SYSTEMS["vdp1"], torch.zeros(3, dtype=F64)
    once, seldom = (nha._march(f, z["y0"], f(start, z["y0"]), start, start + 5, "dopri5",
                               rtol=1e-6, atol=1e-8, check_every=every) for every in (1, 8))
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
    (z, f), fixed = neural_field(), tag == "rk4_38"
    y0, t = z["y0"].requires_grad_(), z["t_rk4" if fixed else "t"].requires_grad_()
    ys = nha.odeint(f, y0, t, rtol=1e-9, atol=1e-11, **options).ys
    (ys * z["W_rk4" if fixed else "W"]).sum().backward()
    tolerance = 1e-12 if fixed else 1e-6
    close(ys, z[f"y_{tag}"], tolerance)
    close(y0.grad, z[f"grad_y0_{tag}"], tolerance)
    if not fixed:
        close(t.grad[1:], z[f"grad_t_{tag}"][1:], tolerance)
        close(t.grad[:1], z["grad_t_adjoint"][:1], tolerance)
    for name, p in f.named_parameters():
        key = f"grad_{tag}_{name.replace('.', '_')}"
        if key in z:
            close(p.grad, z[key], tolerance)


def solution_and_gradients(f, y0, t, inputs, **tolerances):
    y, times = (v.clone().requires_grad_() for v in (y0, t))
    solution = nha.odeint(f, y, times, **tolerances)
    weights = torch.linspace(0.5, 2, solution.ys.numel(), dtype=F64).view_as(solution.ys)
    loss = (solution.ys * weights).sum()
    return [solution.ys, *solution.stats, *torch.autograd.grad(loss, [y, times, *inputs])]


def test_recorded_and_unrolled_solves_give_the_same_gradients(monkeypatch):
    _, f = neural_field()
    results = []
    for limit in (8, 0):
        monkeypatch.setattr(nha, "NARROW", limit)
        results.append(solution_and_gradients(f, normal(6, 2), torch.linspace(0, 2, 5, dtype=F64),
                                              f.parameters(), rtol=1e-5, atol=1e-7))
    for a, b in zip(*results):
        close(a, b, 1e-11)


def test_the_rest_of_a_batch_is_unrolled_with_the_same_gradients(monkeypatch):
    """A recorded batch of which one stiff sample is left, against everything recorded; both
    directions of time."""
    f = lambda t, s: torch.cat([torch.tanh(s[:, :2] @ weight.T) * s[:, 2:] * (1 + t[:, None] / 9),
                                0 * s[:, 2:]], 1)
    weight = double([0.3, -1.0], [1.2, 0.1]).requires_grad_()
    y0 = torch.cat([normal(6, 2), torch.ones(6, 1, dtype=F64)], 1)
    y0[0, 2] = 20.0
    for times in (double(0.0, 0.4, 1.0), double(1.0, 0.7, 0.2)):
        results = []
        for few in (2, 0):
            monkeypatch.setattr(nha, "FEW", few)
            results.append(solution_and_gradients(f, y0, times, [weight], rtol=1e-6, atol=1e-8))
        for a, b in zip(*results):
            close(a, b, 1e-10)
    monkeypatch.setattr(nha, "FEW", 1)
    y = double([0.5], [40.0]).requires_grad_()                  # the sample left over fails
    blow_up = lambda **options: nha.odeint(lambda t, y: y**2, y, [0.0, 0.01, 1.0], max_steps=300,
                                           **options)
    solution = blow_up(on_failure="mask")
    assert solution.stats.success.tolist() == [True, False] and solution.ys[2, 1].isnan()
    refused([(RuntimeError, "max_steps=300 exceeded for 1 of 2 samples, first sample 1", blow_up)])


def test_gradient_equals_finite_differences_with_closures_and_failing_neighbours():
    def final(y0, w, t_end):
        f = lambda t, y: torch.tanh(y @ w.T) * (1 + 0.2 * torch.sin(t)[:, None])
        return nha.odeint(f, y0, torch.stack([torch.zeros_like(t_end), t_end]), rtol=1e-10,
                          atol=1e-12).ys[-1]

    inputs = normal(3, 2, seed=1), double([0.3, -1.0], [1.2, 0.1]), torch.tensor(1.5, dtype=F64)
    assert torch.autograd.gradcheck(final, tuple(v.requires_grad_() for v in inputs),
                                    eps=1e-6, atol=1e-6)
    # y' = y^2 blows up at 1 / y0
    y = double([0.5], [40.0]).requires_grad_()
    solution = nha.odeint(lambda t, y: y**2, y, [0.0, 0.01, 1.0], on_failure="mask", max_steps=300)
    assert solution.stats.success.tolist() == [True, False] and solution.ys[1].isfinite().all()
    assert solution.ys[2, 0].isfinite() and solution.ys[2, 1].isnan()
    by_adjoint = nha.odeint(lambda t, y: y**2, y, [0.0, 0.01, 1.0], on_failure="mask",
                            max_steps=300, grad="adjoint")
    for ys in (solution.ys, by_adjoint.ys):
        close(torch.autograd.grad(ys[2, 0].sum() + ys[1].sum(), y)[0][0],
              [4.0 + 1 / (1 - 0.005) ** 2], 1e-5)
    # not one step is accepted
    lost = nha.odeint(SYSTEMS["vdp20"], inputs[0], [0.0, 9.0], first_step=9.0, max_steps=1,
                      on_failure="mask").ys
    assert lost[1].isnan().all()
    close(torch.autograd.grad(lost[0].sum(), inputs[0])[0], torch.ones(3, 2), 0)


@pytest.mark.parametrize("grad", ["backprop", "adjoint"])
def test_gradients_of_a_sample_that_stays_and_of_one_time(grad):
    w, y0 = torch.eye(2, dtype=F64).requires_grad_(), torch.ones(5, 2, dtype=F64).requires_grad_()
    f = lambda t, y: torch.tanh(y @ w)
    t = double([0.0] * 5, [1.0] * 4 + [0.0]).requires_grad_()       # the last one has no interval
    for times in (t, t[:1]):
        ys = nha.odeint(f, y0, times, grad=grad, params=[w]).ys
        grads = torch.autograd.grad(ys.sum(), [y0, t, w], materialize_grads=True)
        assert all(g.isfinite().all() for g in grads)
        close(grads[0][4], torch.full((2,), len(times)), 0)
    assert not grads[1].any()


def test_inference_mode_leaves_nothing_behind():
    nha._tensors.cache_clear()
    y, t = double([1.0]).requires_grad_(), double(0.0, 0.5, 1.0).requires_grad_()
    solve = lambda: nha.odeint(lambda t, y: -y, y, t, rtol=1e-9, atol=1e-11).ys
    with torch.inference_mode():
        found = solve()
    close(solve(), found, 0)
    close(torch.autograd.grad(solve()[-1].sum(), [y, t])[1], [math.exp(-1.0), 0.0, -math.exp(-1.0)],
          1e-6)


def test_small_batches_take_compiled_fields_autocast_and_func_transforms():
    """As large ones do, whose steps are recorded; each gradient is that of the plain field."""
    f, y0 = torch.nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), normal(3, 2).float()
    parameters_from(f, gen(3))
    compiled = torch.compile(f, backend="aot_eager")
    solve = lambda f: nha.odeint(lambda t, y: f(y), y0, [0.0, 3.0], rtol=1e-4).ys[-1]
    expected = torch.autograd.grad(solve(f).sum(), list(f.parameters()))
    half = copy.deepcopy(f).bfloat16()                          # slopes of less precision
    for net, autocast, tolerance in ((f, True, 0.1), (compiled, False, 1e-6),
                                     (lambda y: half(y.bfloat16()), False, 0.1)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = solve(net).sum()
        owner = half if tolerance == 0.1 and not autocast else f
        for g, e in zip(torch.autograd.grad(loss, list(owner.parameters())), expected):
            close(g, e, tolerance)
    run = lambda weights: solve(lambda y: torch.func.functional_call(f, weights, (y,))).sum()
    for g, e in zip(torch.func.grad(run)(dict(f.named_parameters())).values(), expected):
        close(g, e, 1e-4)


@pytest.mark.parametrize("grad", ["backprop", "adjoint"])
def test_with_a_shared_step_the_field_sees_the_whole_batch(grad):
    """Coupled rows, noise of one row per sample, a scalar time, derivatives inside the field."""
    noise, w = normal(5, 2, seed=1), torch.tensor(0.7, dtype=F64, requires_grad=True)

    def f(t, y):
        assert t.dim() == 0
        with torch.enable_grad():
            x = y.requires_grad_()
            force = torch.autograd.grad((torch.cos(x) * noise).sum(), x, create_graph=True)[0]
        return w * (y.mean(0) - y) + torch.cos(t) * force

    found = []
    for options in (dict(per_sample=False, rtol=1e-9, atol=1e-11, grad=grad, params=[w]),
                    dict(method="rk4", step_size=0.01)):
        y0, t = normal(5, 2).requires_grad_(), double(0.0, 0.5, 2.0).requires_grad_()
        ys = nha.odeint(f, y0, t, vector_time=False, **options).ys
        found.append([ys, *torch.autograd.grad(ys[-1].square().sum(), [y0, w, t])])
    for a, b in zip(*(v[:3] for v in found)):
        close(a, b, 1e-6)
    close(found[0][3][-1], found[1][3][-1], 1e-6)


def test_times_in_a_list_keep_their_digits_and_gradients():
    end = torch.tensor(0.1, dtype=F64, requires_grad=True)
    for t in ([0.0, 0.1], [0.0, end]):
        ys = nha.odeint(lambda t, y: -y, double([1.0]), t, rtol=1e-12, atol=1e-13).ys
        close(ys[-1], [[math.exp(-0.1)]], 1e-12)
    close(torch.autograd.grad(ys[-1].sum(), end)[0], -math.exp(-0.1), 1e-9)


def test_nothing_tracks_gradients_unless_asked():
    _, f = neural_field()
    y0 = torch.ones(2, 2, dtype=F64)
    assert nha.odeint(f, y0, [0.0, 1.0]).ys.requires_grad
    assert not nha.odeint(f, y0, [0.0, 1.0], grad="none").ys.requires_grad
    assert not nha.odeint(SYSTEMS["linear"], y0, [0.0, 1.0]).ys.requires_grad
    with torch.no_grad():
        assert not nha.odeint(f, y0, [0.0, 1.0]).ys.requires_grad


@pytest.mark.parametrize("options", [dict(), dict(per_sample=False),
                                     dict(method="rk4", step_size=0.05)])
def test_a_field_may_fill_one_buffer_again(options):
    """As CUDA graphs do, and `out=`."""
    buffer = torch.empty(2, 2, dtype=F64)
    field = lambda t, y: torch.cos(t)[:, None] * torch.tanh(y @ A.T * 9)    # attempts are rejected
    again = lambda t, y: buffer[: len(y)].copy_(field(t, y))
    y0, found = normal(2, 2), []
    for f in (field, again):
        s = nha.odeint(f, y0, [0.0, 1.0, 3.0], dense=True, **options)
        found.append([s.ys, s.dense(0.4), *s.stats[:3]])
        if "method" not in options:
            e = nha.odeint_event(f, y0, 0.0, lambda t, y: y[:, 0] - 9, t_max=3.0)
            found[-1] += [e.t_event, e.y_event]
    assert "method" in options or s.stats.n_rejected.min() > 0
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("options", [dict(), dict(per_sample=False),
                                     dict(method="rk4", step_size=0.05)])
def test_scalar_time_functions(options):
    def f(t, y):
        assert t.dim() == 0
        return torch.cos(t) * y

    y, t = double([1.0], [2.0]).requires_grad_(), torch.linspace(0, 2, 5, dtype=F64)
    ys = nha.odeint(f, y, t, vector_time=False, **options).ys
    close(ys, y.detach() * torch.exp(torch.sin(t))[:, None, None], 1e-5)
    ys[-1].sum().backward()
    close(y.grad, torch.full_like(y, math.exp(math.sin(2.0))), 1e-5)


def test_one_stiff_sample_does_not_slow_the_others():
    f = lambda t, s: torch.cat([oscillator(s[:, 2])(t, s), 0 * s[:, 2:]], 1)
    y0 = double([2.0, 0.0, 1.0]).repeat(32, 1)
    y0[0, 2] = 50.0
    own, shared = (nha.odeint(f, y0, [0.0, 5.0], rtol=1e-5, atol=1e-7, per_sample=p).stats.n_f
                   for p in (True, False))
    assert own.sum() < 0.5 * shared.sum()


def test_solver_errors():
    f, y0, net = SYSTEMS["linear"], torch.ones(2, 2, dtype=F64), Field()

    def solve(f=f, y0=y0, t=(0.0, 1.0), **options):
        return lambda: nha.odeint(f, y0, t, **options)

    bad_slope = double([1.0, 1.0], [math.nan, 1.0])
    refused([(ValueError, name, solve(**{name: "other"}))
             for name in ("grad", "controller", "on_failure")])
    refused([(ValueError, "t must", solve(t=t)) for t in
             ([0.0, 0.0], [0.0, 2.0, 1.0], [], [0.0, math.nan], torch.zeros(2, 3))])
    refused([
        (ValueError, "dopri5", solve(method="rk5")),
        (TypeError, "y0", solve(y0=torch.ones(2, 2, dtype=torch.long))),
        (TypeError, "y0 .* not ndarray", solve(y0=torch.ones(2, 2).numpy())),
        (ValueError, "y0", solve(y0=torch.ones(2))),
        (ValueError, r"\(2, 1\).*\(2, 2\)", solve(lambda t, y: y[:, :1])),
        (TypeError, "f returned", solve(lambda t, y: y.double(), y0.float())),
        (ValueError, "sample 1", solve(lambda t, y: bad_slope)),
        (RuntimeError, "max_steps=5", solve(t=[0.0, 100.0], max_steps=5)),
        (ValueError, "rtol", solve(rtol=0.0)),
        (ValueError, "per_sample", solve(t=double([0.0, 0.0], [1.0, 2.0]), per_sample=False)),
        (RuntimeError, "sample 1", solve(lambda t, y: y**3, double([0.1], [99.0]), method="rk4",
                                         step_size=0.2)),
        (ValueError, "params", solve(lambda t, y: net(t, y), grad="adjoint"))])
    assert torch.equal(nha.odeint(f, y0, [0.0]).ys, y0[None])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees():
    _, f = neural_field()
    y0, t, grads = normal(9, 2), torch.linspace(0, 3, 4, dtype=F64), []
    for device in ("cpu", "cuda"):
        y = y0.to(device).requires_grad_()
        ys = nha.odeint(f.to(device), y, t.to(device)).ys
        grads.append(torch.autograd.grad(ys.sum(), y)[0].cpu())
    close(*grads, 1e-9)
    with torch.autocast("cuda"):                        # which does not round the error estimate
        steps = nha.odeint(SYSTEMS["vdp1"], y0.float().cuda(), t).stats.n_accepted
    assert steps.max() < 200


# ---- events and hybrid systems ------------------------------------------------------------------

def test_event_times_and_their_gradients():
    z = load("events")
    fall = nha.BouncingBall(float(z["ball_g"])).fields[0]
    y0 = torch.stack([z["ball_h0"], z["ball_v0"]], 1).requires_grad_()
    found = nha.odeint_event(fall, y0, 0.0, lambda t, y: y[:, 0], t_max=100.0, direction=-1)
    close(found.t_event, z["ball_impact_times"][0], 1e-9)
    close(found.t_event, z["ball_tdeq_t"], 1e-6)
    close(found.y_event, z["ball_tdeq_state"], 1e-6)
    grad, = torch.autograd.grad((found.t_event + 2 * found.y_event[:, 1]).sum(), y0)
    close(grad, z["ball_tdeq_grad_of_t_plus_2v"], 1e-6)
    assert found.fired.all() and found.which.tolist() == [0] * 6


def test_oscillator_pendulum_and_clocks():
    z, zero = load("events"), torch.zeros(6, dtype=F64)
    swing = lambda t, y: torch.stack([y[:, 1], -y[:, 2] ** 2 * y[:, 0], 0 * y[:, 2], 0 * y[:, 3]],
                                     1)
    y0 = torch.stack([zero + 1, zero, z["osc_w"], z["osc_level"]], 1)
    for direction, key in ((-1, "osc_first_down"), (1, "osc_first_up")):
        found = nha.odeint_event(swing, y0, 0.0, lambda t, y: y[:, 0] - y[:, 3], t_max=1e3,
                                 direction=direction)
        close(found.t_event, z[key], 1e-9)
    pendulum = lambda t, y: torch.stack([y[:, 1], -torch.sin(y[:, 0])], 1)
    crossings = z["pendulum_theta0_and_first3_zero_crossings"]
    y, t = torch.stack([crossings[:, 0], zero], 1), zero
    for i in range(3):                      # starts on the guard: must not fire at once
        found = nha.odeint_event(pendulum, y, t, lambda t, y: y[:, 0], t_max=1e3, rtol=1e-11)
        y, t = found.y_event, found.t_event
        close(t, crossings[:, i + 1], 1e-9)
    for w0, key, growth in ((zero + 0.693, "clock_t_slowstart", lambda w: 0.3465 * w),
                            (z["clock_w0"], "clock_t_ca", lambda w: 0 * w + 0.5)):
        clock = lambda t, y: torch.stack([growth(y[:, 0]), y[:, 0] / 20, 0 * y[:, 2]], 1)
        found = nha.odeint_event(clock, torch.stack([w0, zero, z["clock_s"]], 1), 0.0,
                                 lambda t, y: y[:, 1] - y[:, 2], t_max=1e3, direction=1)
        close(found.t_event, z[key], 2e-9)


def test_several_guards_misses_and_double_crossings():
    y0 = double([0.0], [0.5], [5.0])
    guard = lambda t, y: torch.stack([y[:, 0] - 2, y[:, 0] - 1], 1)
    found = nha.odeint_event(drift, y0, torch.zeros(3), guard, t_max=3.0, direction=[0, 1])
    close(found.t_event, [1.0, 0.5, 3.0], 1e-12)
    assert found.which.tolist() == [1, 1, -1] and found.fired.tolist() == [True, True, False]
    close(found.y_event[:, 0], [1.0, 1.0, 8.0], 1e-12)
    # y' = 1 takes one long step over both roots of (y - 1)(y - 1.4).
    twice = nha.odeint_event(drift, y0[:1], 0.0, lambda t, y: (y[:, 0] - 1) * (y[:, 0] - 1.4),
                             t_max=1.6, first_step=1.6)
    close(twice.t_event, [1.0], 1e-12)
    # Down at 0.3, which does not count, then up at 1.2, in the same step.
    up = nha.odeint_event(drift, y0[:1], 0.0, lambda t, y: (y[:, 0] - 0.3) * (y[:, 0] - 1.2),
                          t_max=1.6, first_step=1.6, direction=1)
    close(up.t_event, [1.2], 1e-12)
    tie = nha.odeint_event(drift, y0[:1], 0.0,
                           lambda t, y: torch.stack([y[:, 0] - 1, y[:, 0] - 1], 1), t_max=2.0)
    assert tie.which.tolist() == [0]


def test_event_errors():
    y0, ball = torch.zeros(1, 1, dtype=F64), nha.BouncingBall()

    def find(t0=0.0, y0=y0, guard=lambda t, y: y[:, 0] - 1, t_max=1.0, **options):
        return lambda: nha.odeint_event(drift, y0, t0, guard, t_max=t_max, **options)

    refused([
        (ValueError, "t_max", find(1.0, t_max=0.0)),
        (ValueError, "direction", find(direction=2)),
        (ValueError, "direction", find(direction=[0, 1])),
        (ValueError, "direction", lambda: nha.HybridSystem([drift], [nha.Event(drift,
                                                                               direction=2)])),
        (ValueError, "guard", find(guard=lambda t, y: y[0, 0])),
        (ValueError, "guard", find(guard=lambda t, y: torch.stack([t, t]))),
        (ValueError, "t0", find(double(0.0, 0.0))),
        (ValueError, "z0", lambda: nha.odeint_hybrid(ball, torch.ones(1, 2), [0, 0], [0.0, 1.0])),
        (ValueError, "z0", lambda: nha.odeint_hybrid(ball, torch.ones(1, 2), 0.5, [0.0, 1.0])),
        (ValueError, "adaptive", find(method="rk4")),
        (RuntimeError, "without crossing", find(y0=y0.clone().requires_grad_(), t_max=2.5,
                                                guard=lambda t, y: (y[:, 0] - 1) ** 3,
                                                grazing_tol=1e-3)),
        (ValueError, "target", lambda: nha.HybridSystem([drift], [nha.Event(drift, target=1)])),
        (ValueError, "z0", lambda: nha.odeint_hybrid(ball, torch.ones(1, 2), 1, [0.0, 1.0])),
        *((ValueError, "increasing", lambda t=t: nha.odeint_hybrid(ball, torch.ones(1, 2), 0, t))
          for t in ([1.0, 0.0], [0.0, math.inf], [])),
        *((ValueError, "or jump to return", lambda event=event: nha.odeint_hybrid(
            nha.HybridSystem([drift], [event]), y0, 0, [0.0, 2.0])) for event in (
                nha.Event(lambda t, x: x - 1), nha.StochasticEvent(lambda t, x: 2.0),
                nha.Event(lambda t, x: x[:, 0] - 1, lambda t, x: x[0])))])


@pytest.mark.parametrize("i", [0, 2, 4])
def test_bouncing_balls_in_a_batch_follow_the_analytic_solution(i):
    z = load("events")
    ball = nha.BouncingBall(float(z["ball_g"]), float(z["ball_e"][i]))
    impacts = z["ball_impact_times"][:, i]
    x0 = torch.stack([z["ball_h0"][i], z["ball_v0"][i]])[None].repeat(2, 1)
    x0[1, 1] += 0.1
    found = nha.odeint_hybrid(ball, x0, 0, [0.0, float(impacts[-1]) + 1e-6])
    close(found.event_times[0, :6], impacts, 1e-9)
    close(found.x_pre[0, :6, 1], z["ball_preimpact_velocity"][:, i], 1e-8)
    assert found.n_events[0] == 6


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5"])
def test_every_adaptive_method_finds_the_impacts(method):
    ball = nha.BouncingBall(e=1.0)
    t, first = torch.linspace(0, 2, 9).double(), math.sqrt(0.6 / 9.81)
    s = nha.odeint_hybrid(ball, torch.tensor([[0.3, 0.0]]).double(), 0, t, method=method)
    assert s.event_times[0].tolist() == pytest.approx([first * k for k in (1, 3, 5, 7)], abs=1e-7)
    since = (t + first) % (2 * first) - first
    assert s.ys[:, 0, 0].tolist() == pytest.approx((0.3 - 9.81 * since**2 / 2).tolist(), abs=1e-6)


def test_parameters_of_a_guard_alone_get_gradients():
    level = torch.tensor(0.4, dtype=F64, requires_grad=True)    # y = t reaches it at t = level
    start = torch.zeros(1, 1, dtype=F64)
    found = nha.odeint_event(drift, start, 0.0, lambda t, y: y[:, 0] - level, t_max=2.0)
    close(torch.autograd.grad(found.t_event.sum(), level)[0], 1.0, 1e-12)
    # y jumps from the level to twice that: y(2) = 2 level + (2 - level)
    step = nha.Event(lambda t, y: y[:, 0] - level, lambda t, y: 2 * y, 0, 1)
    ys = nha.odeint_hybrid(nha.HybridSystem([drift, drift], [step]), start, 0, [0.0, 2.0]).ys
    close(torch.autograd.grad(ys[-1].sum(), level)[0], 1.0, 1e-9)


def test_learnable_gravity_restitution_and_end():
    g, e, end = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (9.81, 0.8, 0.3))
    second = nha.odeint_hybrid(nha.BouncingBall(g, e), double([1.0, 0.0]), 0, [0.0, 1.5])
    second, fall = second.event_times[0, 1], math.sqrt(2 / 9.81)
    close(second, fall * 2.6, 1e-8)
    for found, exact in zip(torch.autograd.grad(second, [g, e]), (-fall * 1.3 / 9.81, 2 * fall)):
        close(found, exact, 1e-6)
    late = nha.odeint_event(lambda t, y: -y, double([1.0]), 0.0, lambda t, y: y[:, 0], t_max=end)
    close(torch.autograd.grad(late.y_event.sum(), end)[0], -math.exp(-0.3), 1e-8)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_guards_that_cross_together_all_fire(dtype):
    """Neurons of one network from the same potential; another 1e-10 behind."""
    def spike(i):
        return nha.Event(lambda t, x: x[:, i] - 1, lambda t, x: x.index_fill(
            1, torch.tensor(i), 0.0), direction=1)

    network = nha.HybridSystem([lambda t, x: 1.5 - x], [spike(i) for i in range(3)])
    start = torch.tensor([[0.0, 0.0, -1e-10]], dtype=dtype)
    found = nha.odeint_hybrid(network, start, 0, [0.0, 1.0, 3.0])
    assert found.event_ids[0].sort().values.tolist() == [0, 0, 1, 1, 2, 2]
    close(found.ys[-1, 0], [1.5 - 1.5 * math.exp(-(3 - 2 * math.log(3)))] * 3, 1e-6)
    # of a mode's two ways out only the first is taken, and no jump back over a guard counts
    out = [nha.Event(lambda t, x: x[:, 0] - 1, None, 0, target, 1) for target in (2, 1)]
    assert nha.odeint_hybrid(nha.HybridSystem([drift] * 3, out), start * 0, 0,
                             [0.0, 2.0]).event_ids.tolist() == [[0]]
    log = nha.Event(lambda t, x: x[:, 0], direction=-1)
    ball, x0 = nha.BouncingBall(), torch.tensor([[1.0, 0.0]], dtype=dtype)
    for events, ids in (([log, *ball.events], [0, 1, 0, 1]), ([*ball.events, log], [0, 0])):
        found = nha.odeint_hybrid(nha.HybridSystem(ball.fields, events), x0, 0, [0.0, 1.5])
        assert found.event_ids[0].tolist() == ids
    robot = nha.WheeledRobot(nn.Linear(5, 2))               # a copy has a policy of its own
    twin = pickle.loads(pickle.dumps(copy.deepcopy(robot)))
    nn.init.zeros_(twin.policy.weight), nn.init.zeros_(twin.policy.bias)
    assert not twin.fields[0](torch.zeros(4), torch.ones(4, 3)).any()


def test_saltation_by_finite_differences():
    """States after bounces, differentiated through event times and jumps."""
    x0 = double([1.0, 0.5], [2.0, -0.3]).requires_grad_()
    states = lambda x: nha.odeint_hybrid(nha.BouncingBall(), x, 0, [0.0, 0.3, 1.0, 2.0]).ys
    assert torch.autograd.gradcheck(states, (x0,), eps=1e-6, atol=1e-5)


def test_sensitivity_grows_with_events_but_not_per_piece():
    """x' = 0 with x+ = 1.5 x at unit times: dx(T)/dx0 = 1.5^K, within a piece it is 1."""
    growth = nha.HybridSystem(
        [lambda t, s: torch.stack([0 * s[:, 0], 0 * s[:, 1] + 1], 1)],
        [nha.Event(lambda t, s: s[:, 1] - 1, lambda t, s: s * s.new_tensor([1.5, 0.0]),
                   direction=1)])
    for events in (1, 3):
        x0 = double([1.0, 0.0]).requires_grad_()
        found = nha.odeint_hybrid(growth, x0, 0, [0.0, events + 0.5])
        close(torch.autograd.grad(found.ys[-1, 0, 0], x0)[0][0, 0], 1.5**events, 1e-8)


def test_output_at_an_event_is_after_the_jump_terminal_and_zeno():
    def count(t, **options):
        event = nha.Event(lambda t, x: x[:, 0] - 1, lambda t, x: x - 1, 0, 1, **options)
        return nha.odeint_hybrid(nha.HybridSystem([drift] * 2, [event]), double([0.0]), 0, t)

    found, over = count([0.0, 0.5, 1.0, 1.5]), count([0.0, 0.5, 1.5], terminal=True)
    close(found.ys[:, 0, 0], [0.0, 0.5, 0.0, 0.5], 1e-12)
    assert found.modes[:, 0].tolist() == [0, 0, 1, 1]
    assert over.ys[2].isnan().all() and over.modes[2, 0] == -1 and over.n_events[0] == 1
    fill = nha.Event(lambda t, x: x[:, 0] - 1, lambda t, x: x.mul_(3), direction=1)
    filled = nha.odeint_hybrid(nha.HybridSystem([drift], [fill]), double([0.0]), 0, [0.0, 1.5])
    close([*filled.x_pre[0, 0], *filled.x_post[0, 0], *filled.ys[1, 0]], [1.0, 3.0, 3.5], 1e-9)
    bounce = lambda e, **options: nha.odeint_hybrid(nha.BouncingBall(e=e), double([1.0, 0.0]), 0,
                                                    [0.0, 3.0], **options)
    zeno, rest = bounce(0.5, max_events=12), bounce(0.2)
    assert zeno.n_events[0] == 12 and zeno.ys[-1].isnan().all()
    assert 5 < rest.n_events[0] < 60 and rest.ys[-1].isnan().all()
    begin = nha.odeint_hybrid(nha.BouncingBall(), double([1.0, 0.0]), 0, [0.5])   # no interval
    assert begin.ys.tolist() == [[[1.0, 0.0]]] and begin.n_events[0] == begin.modes[0, 0] == 0
    none = nha.odeint_hybrid(nha.WheeledRobot(), torch.zeros(2, 3, dtype=F64),
                             torch.tensor([0, 4]), [0.0, 15.0])
    close(none.ys[-1, :, :2], [[-1.0, 2.0], [1.0, 2.0]], 1e-3)
    assert none.event_times.shape == (2, 0) and none.n_events.tolist() == [0, 0]


def test_switching_linear_modes_are_its_regions():
    system, x0 = nha.SwitchingLinear(), torch.rand(20, 2, generator=gen(1), dtype=F64) * 6 - 3
    found = nha.odeint_hybrid(system, x0, system.region(x0), torch.linspace(0, 3, 61, dtype=F64))
    assert torch.equal(found.modes, system.region(found.ys)) and found.n_events.max() >= 2
    close(system.vector_field(double([3.0, 1.0], [0.0, 1.0], [0.0, -1.0])),
          [[-1.0, 5.0], [-1.0, -1.0], [1.0, -1.0]], 0)


@pytest.mark.parametrize("clocks,expected,tolerance", [
    ("exact", [28.2, 0.495, 0.507, 2.86, 4.31, 3.20], 0.06),
    ("official", [23.6, 0.543, 0.363, 2.90, 5.24, 4.19], 0.08)])
def test_exact_tcp_sampler_statistics(clocks, expected, tolerance):
    solution = nha.RenoTCP(clocks=clocks).sample_exact(400, n_points=10, generator=gen())
    d = solution.durations(0.0, 100.0)
    done = ~d["censored"]
    to_off = [float((d["z2"][done & (d["z"] == m)] == 0).double().mean()) for m in (1, 2)]
    means = [float(d["tau"][done & (d["z"] == m)].mean()) for m in range(3)]
    close([float(solution.n_events.double().mean()), *to_off, *means], expected, tolerance)


def test_simulated_tcp_follows_the_same_law_and_the_exact_flow():
    tcp, origin = nha.RenoTCP(), torch.zeros(40, 1, dtype=F64)
    solved = nha.odeint_hybrid(tcp, torch.zeros(40, 2, dtype=F64), 0,
                               torch.linspace(0, 30, 31, dtype=F64), generator=gen(3))
    began = torch.cat([origin, solved.event_times], 1)
    x = torch.cat([torch.zeros(40, 1, 2, dtype=F64), solved.x_post], 1)[:, :-1]
    z = torch.cat([origin.long(), solved.mode_post], 1)[:, :-1]
    valid = torch.arange(int(solved.n_events.max())) < solved.n_events[:, None]
    tau = began.diff()
    close(tcp._exact_flow(x[valid], z[valid], tau[valid]), solved.x_pre[valid], 1e-6)
    for mode, w in ((1, 0.693), (0, 0.0)):      # uniform if the durations follow the law
        survived = tcp.survival(tau[valid & (z == mode) & (began[:, :-1] < 12)], mode, w)
        middle = (torch.arange(len(survived)) + 0.5) / len(survived)
        assert (survived.sort().values - middle).abs().max() < 0.2


def test_the_closed_form_has_two_derivatives():
    z = double(0, 1e-9, -1e-3, 0.0999, 0.1001, 0.5, -4, 30).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda z: nha._Phi.apply(z, 2), z)
