"""Flows, event module, modes and training of reference/nha.py, and its scripts."""

import importlib
import math

import pytest
import torch
from test_nha import F64, close, double, gen, load, normal, parameters_from, refused

from reference import nha

both_estimators = pytest.mark.parametrize("estimator", ["joint", "race"])


# ---- flows --------------------------------------------------------------------------------------

@pytest.mark.parametrize("tag,bound", [("tb3", 3.0), ("tb1", 1.0)])
def test_splines(tag, bound):
    z = {k.removeprefix(f"{tag}_"): v for k, v in load("rqs").items()}
    x, w, h, d = (z[k].requires_grad_() for k in "xwhd")
    y, logdet = nha.rational_quadratic_spline(x, w, h, d, tail_bound=bound)
    close(y, z["y"], 1e-10)
    close(logdet, z["logabsdet"], 1e-10)
    for key, g in zip("xwhd", torch.autograd.grad((y + 0.7 * logdet).sum(), (x, w, h, d))):
        close(g, z[f"grad_{key}"], 1e-9)
    back, logdet = nha.rational_quadratic_spline(y.detach(), w, h, d, tail_bound=bound,
                                                 inverse=True)
    close(back, z["x_inv"], 1e-8)
    close(logdet, z["logabsdet_inv"], 1e-8)
    y, logdet = nha.rational_quadratic_spline(x, w, h, d, tail_bound=bound, identity_init=True)
    # The published variant's boundary slopes are a little off 1; bins inside agree.
    edges = (2 * bound * (1e-3 + (1 - 8e-3) * w.softmax(-1)).cumsum(-1) - bound).detach()
    inner = (x > edges[:, 0]) & (x < edges[:, -2]) | (x.abs() > bound)
    close(y[inner], z["y_identity_init"][inner], 1e-10)
    close(logdet[inner], z["logabsdet_identity_init"][inner], 1e-10)


def test_spline_on_the_unit_interval_edges_identity_and_errors():
    z, spline = load("rqs"), nha.rational_quadratic_spline
    zeros = lambda n, k: [torch.zeros(n, j, dtype=F64) for j in (k, k, k - 1)]
    x, zero = torch.linspace(-4, 4, 33, dtype=F64), torch.zeros(33, dtype=F64)
    for (y, logdet), expected, tolerance in (
            (spline(z["unit_x"], z["unit_w"], z["unit_h"], z["unit_d"]),
             (z["unit_y"], z["unit_logabsdet"]), 1e-10),
            (spline(z["edge_x"], *zeros(7, 8), tail_bound=3.0),
             (z["edge_y"], z["edge_logabsdet"]), 1e-10),
            (spline(x, *zeros(33, 5), tail_bound=3.0, identity_init=True), (x, zero), 1e-12)):
        close(y, expected[0], tolerance)
        close(logdet, expected[1], tolerance)
    w, h, d = (normal(1, k).expand(33, k) for k in (5, 5, 4))
    y, logdet = spline(x, w, h, d, tail_bound=3.0, identity_init=True)
    back, minus = spline(y, w, h, d, tail_bound=3.0, identity_init=True, inverse=True)
    close(back, x, 1e-10)
    close(minus, -logdet, 1e-10)
    assert (y.diff() > 0).all()
    least = lambda **options: lambda: spline(x, w, h, d, tail_bound=3.0, **options)
    refused([(ValueError, "too large", least(min_bin_width=0.3)),
             (ValueError, "too large", least(min_bin_height=0.3)),
             (ValueError, "K - 1", lambda: spline(x, w, h, w, tail_bound=3.0)),
             (ValueError, "tail_bound", lambda: spline(x, w, h, d, tail_bound=-3.0)),
             (ValueError, "0, 1", lambda: spline(x, w, h, torch.zeros(33, 6, dtype=F64)))])


def test_conditional_flow_is_a_density_with_its_own_inverse():
    flow = parameters_from(nha.ConditionalFlow1d(2, n_layers=2).double(), gen(1), 0.4)
    c, x = normal(3, 1, 2, seed=2), torch.exp(torch.linspace(-12, 12, 20001, dtype=F64))
    close(torch.trapezoid(flow.log_prob(x.expand(3, -1), c).exp(), x), torch.ones(3), 1e-3)
    q = double(0.01, 0.3, 0.999).expand(3, 3)
    at = flow.icdf(q, c)
    close(flow.cdf(at, c), q, 1e-8)
    close(flow.log_survival(at, c).exp(), 1 - q, 1e-8)
    uniform = flow.cdf(flow.sample((3, 4000), c, gen(3)), c).sort(1).values
    assert (uniform - torch.linspace(0, 1, 4000)).abs().max() < 0.03
    plain, x = nha.ConditionalFlow1d(), torch.tensor([1.0, 2.0])
    close(plain.log_prob(x), torch.distributions.LogNormal(0.0, 1.0).log_prob(x), 1e-5)
    half = nha.ConditionalFlow1d().half().log_survival(x.half())
    close(half, (1 - torch.distributions.LogNormal(0.0, 1.0).cdf(x)).log(), 2e-3)
    refused([(ValueError, "positive", lambda: plain.log_prob(torch.tensor([0.0]))),
             (ValueError, "positive", lambda: plain.log_prob(torch.tensor([math.nan]))),
             (ValueError, r"expected c \(\.\.\., 0\), got \(1, 2\)",
              lambda: plain.log_prob(torch.ones(1), torch.ones(1, 2))),
             (ValueError, "expected c", lambda: flow.log_prob(x, c[0, :, :1])),
             (ValueError, "context_dim", lambda: nha.ConditionalFlow1d(-1)),
             (ValueError, "n_bins", lambda: nha.ConditionalFlow1d(n_bins=0))])


@pytest.mark.parametrize("make", [
    lambda: nha.AffineCoupling(3, 2), lambda: nha.AffineCoupling(3, 2, flip=True),
    lambda: nha.MaskedAutoregressiveFlow(3, 2), lambda: nha.MaskedAutoregressiveFlow(1, 2)])
def test_vector_flows_invert_and_count_volume(make):
    flow = parameters_from(make().double(), gen(4), 0.8)
    x, c = normal(5, flow.dim, seed=5), normal(5, 2, seed=6)
    z, logdet = flow(x, c)
    back, minus = flow.inverse(z, c)
    close(back, x, 1e-10)
    close(minus, -logdet, 1e-10)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None], c[i : i + 1])[0][0],
                                                      x[i])
        close(torch.linalg.slogdet(jacobian)[1], logdet[i], 1e-10)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    close(flow.log_prob(x, c), base + logdet, 1e-6)
    assert flow.sample(5, c, gen()).shape == x.shape and not torch.equal(z, x)


def exponential_race(n, seed):
    clocks = -torch.log(torch.rand(n, 2, generator=gen(seed), dtype=F64).clamp(min=1e-12))
    tau, z2 = clocks.min(1)
    return tau.float(), torch.zeros(n, dtype=torch.long), z2


@both_estimators
def test_estimators_fit_a_race_of_two_clocks(estimator):
    tau, z, z2 = exponential_race(3000, 7)
    module = nha.EventModule(2, estimator=estimator)
    rows = list(nha.train_event_module(module, tau, z, z2, epochs=100, lr=3e-2))
    assert rows[-1]["nll"] < rows[0]["nll"]
    drawn, to = module.sample(torch.zeros(20000, dtype=torch.long), generator=gen(1))
    assert abs(float(drawn.mean()) - 0.5) < 0.06 and abs(float(to.double().mean()) - 0.5) < 0.04
    assert (drawn <= 0.35).double().mean().sub(1 - math.exp(-0.7)).abs() < 0.03
    # Racing fits of the observed (minimal) times would halve the mean: `race` does not.
    naive = torch.stack([tau[torch.randint(0, 3000, (20000,), generator=gen(i))]
                         for i in (2, 3)]).min(0).values
    assert abs(float(naive.mean()) - 0.25) < 0.03


@both_estimators
def test_censored_times(estimator):
    tau, z, z2 = exponential_race(3000, 8)
    censored, tau = tau > 0.5, tau.clamp(max=0.5)
    module = nha.EventModule(2, estimator=estimator)
    list(nha.train_event_module(module, tau, z, z2, censored=censored, epochs=80, lr=3e-2))
    alive = module.log_prob(torch.tensor([0.4]), z[:1], z2[:1], censored=torch.tensor([True]))
    assert abs(float(alive.detach().exp()) - math.exp(-0.8)) < 0.04
    unknown = torch.where(censored, 99, z2)                     # z2 is ignored where censored
    close(module.log_prob(tau, z, unknown, censored=censored),
          module.log_prob(tau, z, z2, censored=censored), 0)


def test_event_module_counts_and_checks():
    module, zero, one = nha.EventModule(3), torch.zeros(1).long(), torch.ones(1)
    module.initialize(torch.arange(1.0, 5.0), torch.zeros(4).long(), torch.tensor([1, 1, 1, 2]))
    close(module.transition_probs(zero)[0], [0.0, 0.75, 0.25], 1e-3)
    race = nha.EventModule(2, estimator="race")
    refused([
        (ValueError, "joint", lambda: race.transition_probs(zero)),
        (ValueError, "estimator", lambda: nha.EventModule(2, estimator="both")),
        (ValueError, "n_modes", lambda: nha.EventModule(0)),
        (ValueError, "tau", lambda: module.log_prob(-one, zero, zero)),
        (ValueError, "z must be modes", lambda: module.log_prob(one, zero + 3, zero)),
        (ValueError, "z2 must be modes", lambda: module.log_prob(one, zero, zero - 1)),
        (ValueError, "z must be modes", lambda: module.sample(zero - 1)),
        (ValueError, "z must be modes", lambda: module.transition_probs(zero + 0.5)),
        (ValueError, "uncensored", lambda: module.initialize(one, zero, zero,
                                                             censored=torch.tensor([True])))])
    close(module.log_prob(one, zero.int(), zero.int() + 1), module.log_prob(one, zero, zero + 1), 0)


@both_estimators
def test_event_module_checks_its_context(estimator):
    module, plain = (nha.EventModule(2, dim, estimator) for dim in (2, 0))
    zero, tau, context = torch.zeros(2).long(), torch.ones(2), torch.ones(2, 2)
    call = lambda m, c: [(ValueError, "context", lambda: m.log_prob(tau, zero, zero, context=c)),
                         (ValueError, "context", lambda: m.initialize(tau, zero, zero, context=c)),
                         (ValueError, "context", lambda: m.sample(zero, c))]
    refused(call(module, None) + call(module, context[:1]) + call(module, context[:, :1])
            + call(plain, context))
    module.initialize(tau[:1], zero[:1], zero[:1], context=context[:1])     # a constant context
    close(module.log_prob(tau, zero, zero, context=context + 0.5),
          module.log_prob(tau, zero, zero, context=context), 1e-5)


@both_estimators
def test_event_module_with_context_normalises_standardises_and_uses_it(estimator):
    module = nha.EventModule(2, context_dim=1, estimator=estimator).double()
    parameters_from(module, gen(9), 0.3)
    tau, zero = torch.exp(torch.linspace(-10, 10, 8001, dtype=F64)), torch.zeros(8001).long()
    c = torch.full((8001, 1), 0.7, dtype=F64)
    p = sum(module.log_prob(tau, zero, zero + j, context=c).exp() for j in range(2))
    close(torch.trapezoid(p, tau), 1.0, 2e-3)
    c = torch.rand(600, 2, generator=gen(1)) * torch.tensor([1.0, 100.0])
    tau = -(0.2 + c[:, 0]) * torch.log(torch.rand(600, generator=gen(2)).clamp(min=1e-6))
    module, zero = nha.EventModule(1, context_dim=2, estimator=estimator), zero[:600]
    rows = list(nha.train_event_module(module, tau, zero, zero, context=c, epochs=25, lr=4e-2))
    close(module.center, c.mean(0), 1e-5)
    assert rows[-1]["nll"] < rows[0]["nll"] - 0.05
    short, long = (module.sample(zero, torch.tensor([[v, 50.0]]).expand(600, 2),
                                 generator=gen(3))[0].mean() for v in (0.1, 0.9))
    assert short < 0.6 * long                                   # the mean is 0.2 + c_0


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
    assert all((packed.t[i, n:] == packed.t[i, n - 1]).all() for i, n in enumerate(packed.lengths))


def test_segmentation_without_labels_jitter_and_errors():
    t = torch.linspace(0, 6, 301)
    x = torch.where(t < 2, t, torch.where(t < 4, 2 - 0.5 * (t - 2), 5 + torch.sin(t)))[:, None]
    close([float(p.t[0]) for p in nha.segment(t, x, changepoint=0.5)], [0.0, 2.0, 4.0], 0.021)
    pieces = nha.segment(t, x, mode=(t >= 2).long() + (t >= 4).long())
    moved = nha.jitter_boundaries(pieces, 1.0, 10, generator=gen(2))
    same = nha.jitter_boundaries(pieces, 0.0, generator=gen())
    assert [p.mode for p in pieces] == [p.mode for p in moved] == [0, 1, 2]
    assert torch.equal(torch.cat([p.t for p in moved]), t)
    lengths = [[len(p.t) for p in some] for some in (pieces, same, moved)]
    assert lengths[0] == lengths[1] != lengths[2]
    assert len(nha.segment(t, x, mode=[0] * 150 + [1] * 151)) == 2
    short, wide = [nha.Piece(t[:1], x[:1], 0, False)], [nha.Piece(t, x.expand(-1, 2), 0, True)]
    refused([(ValueError, "mode, jump_threshold", lambda: nha.segment(t, x)),
             (ValueError, r"x \(T, n\)", lambda: nha.segment(t, x[1:], jump_threshold=0.5)),
             (ValueError, "jump_threshold", lambda: nha.segment(t, x, jump_threshold=0)),
             (ValueError, "changepoint", lambda: nha.segment(t, x, changepoint=-1.0)),
             (ValueError, "t must not", lambda: nha.segment(t.flip(0), x, changepoint=1.0)),
             (ValueError, "pieces", lambda: nha.pack_pieces([])),
             (ValueError, "one n", lambda: nha.pack_pieces(pieces + wide)),
             (ValueError, "one n", lambda: nha.pack_pieces([nha.Piece(t, x[1:], 0, True)])),
             (ValueError, "pieces", lambda: nha.pack_pieces(short))])


def new_model(m=3, seed=0, **options):
    model = nha.NHA(nha.ModeEncoder(10, m, **options), nha.ModeDecoder(2, m))
    parameters_from(model.encoder, gen(seed))
    return model


def set_fields(model, *rows):
    """(a, b, c, d) of each mode: w' = a w + b, s' = c w + d."""
    with torch.no_grad():
        table = torch.tensor(rows).view(-1, 2, 2)
        model.decoder.weight.copy_(table[..., :1]), model.decoder.bias.copy_(table[..., 1])
    return model


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
def test_published_training_step(kind):
    z = load("nha_official")
    m = new_model(kind=kind, dropout=None).double()
    names = {f"dec_{k}": p for k, p in m.decoder.named_parameters()}
    for index, layer in zip((0, 2, 4, 6), m.encoder.layers):
        names |= {f"enc_{index}_{k}": p for k, p in layer.named_parameters()}
    with torch.no_grad():
        for key, p in names.items():
            p.copy_(z[f"{kind}_{key}"])
    lengths = z["seg_len"].tolist()
    packed = nha.pack_pieces([nha.Piece(a, b, None, False) for a, b in zip(
        z["seg_t"].split(lengths), z[f"{kind}_target"].split(lengths))])
    q = m.encode(z["features"])
    close(q, z[f"{kind}_q"], 1e-10)
    xhat = m.decode(z["x0"], q, packed.t)
    lag = torch.arange(xhat.shape[1]).sub(1).clamp(min=0)
    lag[1] = 1
    xhat = xhat[:, lag]                                        # the published output lags
    close(torch.cat([v[:n] for v, n in zip(xhat, lengths)]), z[f"{kind}_sol"], 1e-10)
    loss = nha.reconstruction_loss(xhat, packed.x, packed.mask)
    close(loss, z[f"{kind}_loss"], 1e-10)
    close(nha.smape(xhat, packed.x, packed.mask), z[f"{kind}_smape"], 1e-10)
    for key, g in zip(names, torch.autograd.grad(loss, list(names.values()))):
        close(g, z[f"{kind}_grad_{key}"], 1e-9)


def test_sparsemax_and_straight_through():
    z = load("nha_official")
    for tag, given, function in (
            ("sparsemax", "in", nha.sparsemax),
            ("ste", "logits", lambda x: nha.straight_through(x, sample=z["ste_sample"]))):
        x = z[f"{tag}_{given}"].requires_grad_()
        q = function(x)
        close(q, z[f"{tag}_out"], 1e-12)
        close(torch.autograd.grad((q * z[f"{tag}_w"]).sum(), x)[0], z[f"{tag}_grad"], 1e-12)
    close(nha.sparsemax(z["sparsemax_in"].T, dim=0).T, z["sparsemax_out"], 1e-12)
    logits = torch.tensor([[0.0, math.log(3.0)]]).expand(4000, 2)
    assert abs(float(nha.straight_through(logits, generator=gen())[:, 1].mean()) - 0.75) < 0.03
    refused([(ValueError, "sample", lambda: nha.straight_through(logits, sample=logits[:1]))])
    assert nha.sparsemax(torch.tensor([[math.nan, 1.0]])).isnan().all()


@pytest.mark.parametrize("kind", ["ste", "softmax", "sparsemax", "gumbel"])
def test_encoders(kind):
    encoder, small = nha.ModeEncoder(10, 4, kind=kind), nha.ModeEncoder(10, 4, dropout=None)
    counts = [sum(p.numel() for p in net.parameters()) for net in (encoder, small)]
    assert counts == [9024 + 64 * 4, 2464 + 32 * 4]
    features = torch.randn(50, 10, generator=gen())
    q, again, other = (encoder(features, generator=gen(seed)) for seed in (1, 1, 2))
    assert torch.equal(q, again) and not torch.equal(q, other)
    close(q.sum(-1), torch.ones(50), 1e-5)
    encoder.eval()
    if kind in ("ste", "gumbel"):
        assert torch.equal(encoder(features), encoder(features))
        assert torch.equal(encoder(features).argmax(-1), encoder.logits(features).argmax(-1))
    for mode in ("argmax", "sample"):
        close(encoder(features, mode=mode, generator=gen()).amax(-1), torch.ones(50), 1e-6)
    refused([(ValueError, "mode", lambda: encoder(features, mode="best")),
             (ValueError, "kind", lambda: nha.ModeEncoder(10, 4, kind="hard")),
             (ValueError, "n_modes", lambda: nha.ModeEncoder(10, 0))])


def test_decoder_counts_starts_constant_and_the_exact_flow_is_rk4s_limit():
    assert sum(p.numel() for p in nha.ModeDecoder(2, 5).parameters()) == 20
    assert sum(p.numel() for p in nha.ModeDecoder(2, 5, hidden=32).parameters()) == 5 * 130
    model, x0 = new_model().double(), torch.rand(4, 2, generator=gen(), dtype=F64) + 0.1
    t = torch.rand(4, 200, generator=gen(1), dtype=F64).mul(0.03).cumsum(1)
    t[:, 150:] = t[:, 149:150]                                 # padding: dt = 0
    q = torch.eye(3, dtype=F64)[[0, 1, 2, 0]]
    close(model.decode(x0, q, t), x0[:, None].expand(-1, 200, -1), 0)
    set_fields(model, (0.3465, 0, 1, 0), (0, 0.5, 1, 0), (-2, 0.3, 0.5, -0.2))
    exact, rk4 = (model.decode(x0, q, t, solver=s) for s in ("exact", "rk4"))
    close(exact, rk4, 1e-8)
    close(exact[0, 149, 0], x0[0, 0] * torch.exp(0.3465 * (t[0, 149] - t[0, 0])), 1e-7)
    for v in (1e-9, 0.0999, 0.1001, -3.0):
        close(nha._Phi.apply(double(v)[0], 2),
              (math.expm1(v) - v) / v**2 if abs(v) > 1e-3 else 0.5, 1e-9)
    bent = nha.NHA(nha.ModeEncoder(10, 3), nha.ModeDecoder(2, 3, hidden=8))
    refused([(ValueError, "solver", lambda: model.decode(x0, q, t, solver="euler")),
             (ValueError, "affine", lambda: bent.decode(x0, q, t, solver="exact")),
             (ValueError, "expected x0", lambda: model.decode(x0, q, t[:1])),
             (ValueError, "expected x0", lambda: model.decode(x0, q[:3], t, solver="exact")),
             (ValueError, "modes", lambda: nha.NHA(nha.ModeEncoder(10, 3), nha.ModeDecoder(2, 4)))])


def test_losses_refuse_other_shapes():
    x, mask = torch.ones(2, 3, 1), torch.ones(2, 3, dtype=torch.bool)
    for loss in (nha.reconstruction_loss, nha.smape):
        refused([(ValueError, "expected xhat", lambda: loss(x, x.expand(-1, -1, 2), mask)),
                 (ValueError, "expected xhat", lambda: loss(x, x, mask[:1]))])


def test_v_measure():
    z = load("vmeasure")
    for i in range(sum(k.startswith("true_") for k in z)):
        close(nha.v_measure(z[f"true_{i}"], z[f"pred_{i}"], float(z[f"beta_{i}"])),
              z[f"hcv_{i}"].tolist(), 1e-12)
    assert nha.v_measure([0, 0, 1], [5, 5, 2]) == (1.0, 1.0, 1.0)
    refused([(ValueError, "true and pred", lambda: nha.v_measure([], [])),
             (ValueError, "true and pred", lambda: nha.v_measure([0], [0, 1]))])


# ---- learning -----------------------------------------------------------------------------------

def tcp_pieces(n, seed):
    runs, pieces = nha.RenoTCP().sample_exact(n, 60.0, 600, generator=gen(seed)), []
    for i in range(n):
        t, x, mode = runs.trajectory(torch.linspace(0, 60, 600), i)
        pieces += nha.segment(t.float(), x.float(), mode=mode, jump_threshold=0.5)
    return nha.pack_pieces(pieces), [p.mode for p in pieces]


def resumed(start):
    """start(seed, resume) -> 6 epochs: the same rows without a stop and with one after 3, from
    where another start goes on."""
    first = start(1, None)
    parts = [next(first) for _ in range(3)]
    parts += start(5, first.send("state"))
    assert len(parts) == 6 and parts == list(start(1, None))


def test_training_recovers_tcp_modes_resumes_and_prunes():
    packed, truth = tcp_pieces(3, 0)
    model = new_model(4, 2)
    steps = lambda model: nha.train_mode_recovery(model, packed, generator=gen(2), epochs=3)
    assert [model.eval() and row for row in steps(model)] == list(steps(new_model(4, 2)))
    model = new_model(4, 2, dropout=None)
    rows = list(nha.train_mode_recovery(model, packed, generator=gen(2), epochs=400,
                                        solver="exact", true_modes=truth))
    assert set(rows[0]) == {"epoch", "loss", "smape", "n_used", "v"}
    labels = model.eval().encode(packed.features).argmax(-1)
    error = lambda xhat: float(nha.reconstruction_loss(xhat.detach(), packed.x, packed.mask))
    before = error(model.reconstruct(packed, solver="exact")[0])
    assert before < 0.1 * rows[0]["loss"]
    assert nha.v_measure([int(z == 2) for z in truth], labels)[0] > 0.6
    kept = model.prune(packed)
    merged, q = model.reconstruct(packed, solver="exact")
    assert q.shape[1] == len(kept) == len(model.decoder.bias) <= len(labels.unique())
    assert error(merged) < before + 0.2
    resumed(lambda seed, state: nha.train_mode_recovery(
        new_model(3, seed), packed, epochs=6, generator=gen(seed), resume=state))


def test_decoding_follows_the_time_of_the_field():
    decoder = lambda t, x, q: torch.cos(t)[:, None] * x             # any callable (t, x, q) -> dx
    model, t = nha.NHA(nha.ModeEncoder(5, 1), decoder), torch.linspace(1, 3, 41, dtype=F64)[None]
    xhat = model.decode(torch.ones(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64), t)
    close(xhat[0, :, 0], torch.exp(torch.sin(t[0]) - math.sin(1.0)), 1e-7)


def test_prune_merges_copies_and_drops_unused_modes():
    model, (packed, truth) = new_model(4, 3, dropout=None).eval(), tcp_pieces(1, 1)
    set_fields(model, *[(0.3465, 0, 1, 0)] * 4)
    before, _ = model.reconstruct(packed)
    assert len(model.prune(packed)) == 1
    after, q = model.reconstruct(packed)
    close(after, before, 1e-6)
    close(q, torch.ones(len(truth), 1), 1e-6)
    assert len(new_model(4, 3).eval().prune(packed, eps=1.1)) == 1     # the most used one stays


def test_a_pruned_model_is_loaded_and_goes_on():
    packed, _ = tcp_pieces(1, 1)
    model = new_model(4, 3, dropout=None).eval()
    model.prune(packed)
    fresh = new_model(4, 5, dropout=None).eval()
    fresh.load_state_dict(model.state_dict())
    close(fresh.reconstruct(packed)[0], model.reconstruct(packed)[0], 0)
    train = lambda model, **more: nha.train_mode_recovery(
        model, packed, epochs=4, solver="exact", generator=gen(2), **more)
    whole, half = train(model), train(fresh)
    rows, _ = list(whole), next(half)
    assert rows[1:] == list(train(new_model(4, 6, dropout=None), resume=half.send("state")))
    with pytest.raises(RuntimeError, match="start training anew"):
        for _ in train(wide := new_model(4, 3, dropout=None)):
            wide.prune(packed)


def test_event_training_resumes():
    resumed(lambda seed, state: nha.train_event_module(
        nha.EventModule(2), *exponential_race(200, 3), epochs=6, resume=state))


def test_generation_with_the_true_modules_matches_the_system():
    """Exact decoder, event flows fitted on exact pieces, jumps by regression."""
    runs = nha.RenoTCP().sample_exact(150, n_points=2, generator=gen(5), dtype=torch.float32)
    k = runs.n_events[:, None] > torch.arange(runs.event_times.shape[1])
    jump = nha.JumpMaps(3, 2).fit(*(v[k] for v in runs[5:]))
    after = jump(torch.tensor([[4.0, 7.0], [0.0, 0.0]]), torch.tensor([1, 0]), torch.tensor([2, 1]))
    close(after, [[2.0, 7.0], [0.693, 0.0]], 1e-3)
    d = runs.durations(0.0, 100.0)
    d = {name: v[d["tau"] > 1e-6] for name, v in d.items()}
    model = new_model()
    model.event_module, model.jump = nha.EventModule(3), jump
    list(nha.train_event_module(model.event_module, d["tau"].float(), d["z"], d["z2"],
                                censored=d["censored"], epochs=60, lr=2e-2))
    set_fields(model, (0, 0, 0, 0), (0.3465, 0, 1, 0), (0, 0.5, 1, 0)).eval()
    made = model.generate(torch.zeros(200, 2), 0, 100.0, generator=gen(6))
    truth = nha.RenoTCP().sample_exact(200, n_points=201, generator=gen(7))
    events = [float(s.n_events.double().mean()) for s in (made, truth)]
    assert abs(events[0] / events[1] - 1) < 0.1
    for mode in range(3):
        share = [(s.modes == mode).double().mean() for s in (made, truth)]
        assert abs(float(share[0] - share[1])) < 0.05
    assert made.ys.isfinite().all() and (made.event_times.diff(dim=1).nan_to_num(1.0) > 0).all()
    refused([(ValueError, "t_end", lambda: model.generate(torch.zeros(1, 2), 0, 0.0)),
             (ValueError, "x0", lambda: model.generate(torch.zeros(0, 2), 0, 1.0)),
             (ValueError, "event_module",
              lambda: new_model().generate(torch.zeros(1, 2), 0, 1.0))])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_trajectory_puts_both_states_at_an_event(dtype):
    runs = nha.RenoTCP().sample_exact(2, 20.0, 41, generator=gen(11), dtype=dtype)
    t, x, mode = runs.trajectory(torch.linspace(0, 20, 41), 0)
    twice, count = (t.diff() == 0).nonzero()[:, 0], int(runs.n_events[0])
    assert (t.diff() >= 0).all() and len(t) == 41 + 2 * count and len(twice) == count
    assert torch.equal(mode[twice], runs.mode_pre[0, :count])
    assert torch.equal(x[twice + 1], runs.x_post[0, :count]) and x.dtype == dtype
    d = runs.durations(0.0, 20.0)
    assert d["censored"].sum() == 2
    close(d["tau"].sum(), 40.0, 1e-9)
    starts = d["x"][d["z"] == 1]
    close(starts, torch.tensor([0.693, 0.0]).expand_as(starts), 1e-6)


@pytest.mark.parametrize("script", ["nha_robot", "nha_solver", "nha_switching", "nha_tcp",
                                    "speed_nha"])
def test_scripts_run(script, tmp_path, capsys):
    figures = [] if script == "speed_nha" else ["--figures", str(tmp_path / "figures")]
    importlib.import_module(script).main(["--preset", "tiny", "--threads", "1",
                                          "--out", str(tmp_path / "out"), *figures])
    assert "holds" in capsys.readouterr().out


def test_thresholds_weights_and_states_out_of_range_are_named():
    model = nha.NHA(nha.ModeEncoder(10, 2), nha.ModeDecoder(2, 2), nha.EventModule(2))
    pieces = nha.pack_pieces([nha.Piece(torch.arange(3.0), torch.rand(3, 2), None, False)])
    for bad in ({"eps": -0.1}, {"delta": -1.0}, {"delta": math.nan}):
        with pytest.raises(ValueError, match="eps and delta"):
            model.prune(pieces, **bad)
    for beta in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta must be finite"):
            nha.v_measure([0, 1], [0, 1], beta)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="epochs must be positive"):
            nha.train_mode_recovery(model, pieces, epochs=bad)
        with pytest.raises(ValueError, match="epochs must be positive"):
            nha.train_event_module(model.event_module, *exponential_race(9, 0), epochs=bad)
    for rate in ("enc_lr", "dec_lr"):
        with pytest.raises(ValueError, match=rate):
            nha.train_mode_recovery(model, pieces, **{rate: -1.0})
    for end in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="t_end must be positive and finite"):
            model.generate(torch.ones(1, 2), 0, end)


def test_wrong_widths_and_numbers_of_modes_are_named():
    model = nha.NHA(nha.ModeEncoder(10, 2), nha.ModeDecoder(2, 2), nha.EventModule(2))
    x, q, t, wide = torch.ones(3, 2), torch.eye(2)[[0, 1, 0]], torch.ones(3, 4), torch.ones(3, 3)
    spline, flow = nha.rational_quadratic_spline, nha.MaskedAutoregressiveFlow(2, 1)
    modes, jumps, z = "event_module has 3 modes, {} 2".format, nha.JumpMaps(2, 2), q[:, 1].long()
    refused([
        (ValueError, r"features \(S, 10\), got \(3, 3\)", lambda: model.encode(wide)),
        (ValueError, "features", lambda: model.encoder.logits(torch.ones(10))),
        (ValueError, r"x \(S, 2\), q \(S, 2\), got \(3, 3\)", lambda: model.decoder(None, wide, q)),
        (ValueError, r"got \(2, 2\), \(3, 2\)", lambda: model.decoder(None, x[:2], q)),
        (ValueError, r"x \(S, 2\)", lambda: model.decoder.fields(wide)),
        (ValueError, r"q \(S, 2\), got \(3, 2\), \(3, 3\)", lambda: model.decode(x, wide, t)),
        (ValueError, r"x \(S, 2\), .*, got \(3, 3\)", lambda: model.decode(wide, q, t)),
        (ValueError, r"x0 \(S, 2\)", lambda: model.decode(wide, q, t, solver="exact")),
        (ValueError, r"got \(3, 2\), list, \(3, 4\)", lambda: model.decode(x, [0, 1], t)),
        (ValueError, r"x0 \(B, 2\)", lambda: model.generate(wide, 0, 1.0)),
        (ValueError, "x_post", lambda: jumps.fit(x, wide, z, z)),
        (ValueError, r"x \(N, 2\)", lambda: jumps(wide, z, z)),
        (ValueError, r"expected z \(N,\), got list", lambda: model.event_module.sample([0, 1])),
        (ValueError, r"z2 \(N,\), censored", lambda: model.event_module.log_prob(t[0], z, z)),
        (ValueError, r"x \(\.\.\., 2\)", lambda: flow(wide, wide[:, :1])),
        (ValueError, r"c \(\.\.\., 1\), got \(3, 2\), NoneType", lambda: flow.inverse(x)),
        (ValueError, r"x \(\.\.\., 2\)", lambda: nha.AffineCoupling(2)(wide)),
        (ValueError, "must agree", lambda: spline(x[:, 0], wide, x, x, tail_bound=1.0)),
        (ValueError, "must agree", lambda: spline(x[:2, 0], wide, wide, x, tail_bound=1.0)),
        (ValueError, modes("encoder"),
         lambda: nha.NHA(model.encoder, model.decoder, nha.EventModule(3)))])
    model.event_module = nha.EventModule(3)
    refused([(ValueError, modes("decoder"), lambda: model.generate(x, 0, 1.0))])
    pieces = nha.pack_pieces([nha.Piece(torch.arange(4.0), torch.rand(4, 3), 0, False)])
    model = nha.NHA(nha.ModeEncoder(15, 2), nha.ModeDecoder(2, 2))
    for solver in ("rk4", "exact"):
        with pytest.raises(ValueError, match=r"q \(S, 2\), got \(1, 3\)"):
            next(nha.train_mode_recovery(model, pieces, solver=solver))
    assert nha.ConditionalFlow1d().log_prob(x[:, 0], x[:, :0]).shape == (3,)    # a context of none
