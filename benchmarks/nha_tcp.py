"""Mode recovery, event laws and generation on TCP Reno (NHA, section 5).

    python benchmarks/nha_tcp.py                  # 1500 epochs: about 6 minutes on one core
    python benchmarks/nha_tcp.py --preset short   # m = 3 alone, the best fold of 1000 epochs
                                                  # trained to 6000: a minute
    python benchmarks/nha_tcp.py --preset paper   # 8000 epochs: about 25 minutes

The published protocol: 40 trajectories, here from the exact law; a model is trained on each of five
folds of 5, the one with the lowest error on the other folds is kept (no mode label is used), and
tested on the last 15. The sampled labels of the first epochs decide which modes form, and some
folds end in a local optimum: "good folds" counts the validation errors below 0.01. Baselines: NODE
(autonomous, 10 zero dimensions appended), DCNODE (one affine field driven by a code of 10 numbers
per piece), LatentNODE (the code is drawn from a learned normal). "noisy" moves a tenth of the
boundaries by up to 9 samples.

In off mode the state is 0, which slow start's field reproduces too, so reconstruction cannot
separate these two: V is given against {off, slow start}, {avoidance} as well. The first five
samples separate the modes almost by themselves: the epoch-0 column and the k-means rows show how
much. The paper's cells could not be compared one by one; the claims are the exact laws and rates of
the system.
"""

import itertools

import figures
import harness
import torch
from torch import nn

from reference import nha

MODELS = ("NHA m = 3", "NHA m = 5", "NHA m = 10", "NHA m = 3, noisy", "NODE", "DCNODE",
          "LatentNODE")
PRESETS = {
    "default": dict(models=MODELS, epochs=1500, baseline_epochs=1000, folds=5, size=5, test=15,
                    event_runs=300, event_epochs=200),
    "short": dict(models=MODELS[:1], epochs=1000, finish=6000, folds=5, size=5, test=15,
                  event_runs=400, event_epochs=150),
    "tiny": dict(models=MODELS[:1] + MODELS[3:], epochs=6, baseline_epochs=2, folds=2, size=1,
                 test=1, event_runs=10, event_epochs=3),
    "paper": dict(models=MODELS, epochs=8000, baseline_epochs=2000, folds=5, size=5, test=15,
                  event_runs=500, event_epochs=400)}
GOOD = 0.01         # validation error of a fold that found the modes
CODE = 10           # numbers in a baseline's code


class Baseline(nha.NHA):
    """A continuous code instead of modes; trained and evaluated through NHA's interface."""

    def __init__(self, kind: str):
        encoder = nha.ModeEncoder(10, 2 * CODE if kind == "LatentNODE" else CODE)
        if kind == "NODE":
            encoder.layers = nn.ModuleList()
            sizes, activations = (2 + CODE, 32, 32, 32, 32, 2 + CODE), (nn.SELU(), nn.SELU(),
                                                                        nn.Identity(), nn.Tanh())
            layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
            decoder = nn.Sequential(*(part for pair in zip(layers, activations) for part in pair),
                                    layers[-1])
        else:
            layers = [nn.Linear(2 + CODE, 2)]
            decoder = nn.Sequential(layers[0], nn.ZeroPad1d((0, CODE)))
        super().__init__(encoder, decoder)
        self.kind, self.last = kind, layers[-1]

    def encode(self, features, *, mode=None, generator=None):
        if self.kind == "NODE":
            return features.new_zeros(len(features), CODE)
        code = self.encoder.logits(features, generator=generator)
        if self.kind == "DCNODE":
            return code
        mean, spread = code.chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator).to(mean) if self.training else 0.0
        return mean + nn.functional.softplus(spread) * noise

    def decode(self, x0, q, t, *, solver="rk4", steps=10):
        """Classical Runge-Kutta steps over each piece, cubic Hermite at its times."""
        span = (t[:, -1] - t[:, 0]).double()
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64).to(span)[:, None] * span
        field = lambda t, y: self.decoder(y)
        y = nha.odeint(field, torch.cat([x0, q], 1), grid, method="rk4").ys
        slope = self.decoder(y)[..., :2].transpose(0, 1) * (span / steps).to(y)[:, None, None]
        y = y[..., :2].transpose(0, 1)
        at = (t - t[:, :1]) / span[:, None].to(t) * steps
        left = at.floor().clamp(max=steps - 1).long()
        theta = (at - left)[..., None]
        pick = lambda v, shift: v.gather(1, (left + shift)[..., None].expand(-1, -1, 2))
        a, b, da, db = pick(y, 0), pick(y, 1), pick(slope, 0), pick(slope, 1)
        chord = b - a
        return a + theta * (chord + (1 - theta)
                            * ((1 - theta) * (da - chord) - theta * (db - chord)))


def initialize(model: nha.NHA, generator: torch.Generator) -> nha.NHA:
    """torch's default start of linear layers, drawn from the generator; the fields' last layer
    starts at zero."""
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
            for p in layer.parameters():
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1)
                        * layer.in_features**-0.5)
        if isinstance(model, Baseline):
            nn.init.zeros_(model.last.weight), nn.init.zeros_(model.last.bias)
    return model


def simulate(n: int, generator: torch.Generator) -> list[list[nha.Piece]]:
    """The pieces of each of n trajectories."""
    runs, trajectories = nha.RenoTCP().sample_exact(n, generator=generator), []
    t = torch.linspace(0, 100, 2000, dtype=torch.float64)
    for i in range(n):
        at, x, mode = runs.trajectory(t, i)
        trajectories.append(nha.segment(at.float(), x.float(), mode=mode, jump_threshold=0.5))
    return trajectories


def pack(trajectories: list[list[nha.Piece]], device: torch.device | str = "cpu",
         noise: torch.Generator | None = None) -> tuple[nha.PaddedPieces, torch.Tensor]:
    """One batch, and the true modes; `noise` misplaces a tenth of the boundaries."""
    if noise is not None:
        trajectories = [nha.jitter_boundaries(pieces, 0.1, 10, generator=noise)
                        for pieces in trajectories]
    pieces = list(itertools.chain.from_iterable(trajectories))
    batch = nha.PaddedPieces(*(part.to(device) for part in nha.pack_pieces(pieces)))
    return batch, torch.tensor([p.mode for p in pieces], device=device)


@torch.no_grad()
def evaluate(model: nha.NHA, pieces: nha.PaddedPieces, truth: torch.Tensor) -> dict:
    model.eval()
    baseline = isinstance(model, Baseline)
    xhat, q = model.reconstruct(pieces, solver="rk4" if baseline else "exact")
    row = {"mse": float(nha.reconstruction_loss(xhat, pieces.x, pieces.mask)),
           "smape": float(nha.smape(xhat, pieces.x, pieces.mask))}
    return row if baseline else row | scores(truth, q.argmax(-1))


def scores(truth: torch.Tensor, labels: torch.Tensor) -> dict:
    h, _, v = nha.v_measure(truth, labels)
    merged_h, _, merged_v = nha.v_measure(truth == 2, labels)
    return {"h": h, "v": v, "merged h": merged_h, "merged v": merged_v,
            "modes used": len(labels.unique())}


def kmeans(features: torch.Tensor, k: int, generator: torch.Generator,
           steps: int = 50) -> torch.Tensor:
    x = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    centers = x[torch.randperm(len(x), generator=generator)[:k]]
    for _ in range(steps):
        labels = torch.cdist(x, centers).argmin(1)
        centers = torch.stack([x[labels == j].mean(0) if (labels == j).any() else centers[j]
                               for j in range(k)])
    return labels


def fields_of(model: nha.NHA, pieces: nha.PaddedPieces, truth: torch.Tensor) -> dict:
    """w' = a w + b, s' = c w + d: (a, b, c, d) of the modes that most pieces of slow start and of
    avoidance use."""
    labels = model.encode(pieces.features).argmax(-1)
    table = torch.cat([model.decoder.weight[..., 0], model.decoder.bias],
                      1).detach()[:, [0, 2, 1, 3]]
    return {str(mode): table[labels[truth == mode].mode().values].tolist() for mode in (1, 2)
            if (truth == mode).any()}


def fit(run, model_name: str, data: list, settings: dict, seed: int) -> dict:
    """Train on each fold, validate on the others; the figures of the best model (its weights in
    <name>.pt) and of all."""
    size, count = settings["size"], settings["folds"]
    name = model_name.replace(" ", "").replace(",", "-")
    solver = "exact" if model_name.startswith("NHA") else "rk4"
    folds = [data[size * i : size * (i + 1)] for i in range(count)]
    test, rows = pack(data[size * count :], run.device), []

    def train_on(i: int, part: str, epochs: int) -> dict:
        if (row := run.recorded(part)) is not None:
            return row
        g = torch.Generator().manual_seed(100 * seed + i)
        model = initialize(build(model_name), g).to(run.device)
        train = pack(folds[i], run.device, g if "noisy" in model_name else None)
        before = evaluate(model, *test)
        steps = nha.train_mode_recovery(model, train[0], epochs=epochs, solver=solver, generator=g,
                                        resume=run.resumed(part))
        run.drive(part, steps, total=epochs)
        others = pack([trajectory for j, other in enumerate(folds) if j != i
                       for trajectory in other], run.device)
        row = {"train": evaluate(model, *train), "validation": evaluate(model, *others),
               "test": evaluate(model, *test),
               "epoch 0": before, "fields": fields_of(model, *train) if solver == "exact" else {}}
        if all(row["validation"]["mse"] < r["validation"]["mse"] for r in rows):
            run.save(name, model.state_dict())
        return run.record(part, row)

    epochs = settings["epochs" if solver == "exact" else "baseline_epochs"]
    for i in range(count):
        rows.append(train_on(i, f"{name}-fold{i}", epochs))
    i = min(range(count), key=lambda i: rows[i]["validation"]["mse"])
    if "finish" in settings:                    # only the best fold is trained to the end
        rows[i] = train_on(i, f"{name}-fold{i}-finish", settings["finish"])
    return rows[i] | {"mse": rows[i]["test"]["mse"], "folds": [r["test"]["mse"] for r in rows],
                      "good": sum(r["validation"]["mse"] < GOOD for r in rows)}


def exact_nll(tcp: nha.RenoTCP, d: dict) -> float:
    """Mean negative log-likelihood of durations and next modes under the system itself."""
    w, tau = d["x"][:, 0].double(), d["tau"].double()
    growth = torch.where(d["z"] == 1, w * torch.exp(tcp.a * tau), w + tcp.beta * tau)
    # both clocks have this rate
    rate = torch.where(d["z"] == 0, 1 / tcp.tau_off, growth * tcp.drop_rate)
    survival = torch.stack([tcp.survival(tau, z, w) for z in range(3)])
    log_survival = survival.gather(0, d["z"][None])[0].log()
    return float(-(log_survival + torch.where(d["censored"], 0.0, rate.log())).mean())


def fit_flows(run, data: dict, context: bool, epochs: int,
              generator: torch.Generator) -> tuple[nha.EventModule, float]:
    """An event module, with the entering state as `context` or without, and its last nll."""
    module = nha.EventModule(3, context_dim=2 * context)
    if context:
        initialize(module, generator)
        for net in (module.flow.net, module.transition_net):
            nn.init.zeros_(net[-1].weight), nn.init.zeros_(net[-1].bias)
    data = {key: value.to(run.device) for key, value in data.items()}
    steps = nha.train_event_module(module.to(run.device), data["tau"], data["z"], data["z2"],
                                   censored=data["censored"], epochs=epochs, lr=3e-2,
                                   context=data["x"] if context else None)
    row = run.drive(f"events{'-context' * context}", steps, total=epochs)
    return module.cpu(), row["nll"]


@torch.no_grad()
def law_distances(tcp: nha.RenoTCP, data: dict, plain: nha.EventModule,
                  with_context: nha.EventModule) -> tuple[dict, dict]:
    """KS distances of the learned laws of the time to an event from the exact ones; the densities
    (exact, learned) of each case."""
    tau, distances, curves = torch.linspace(0.01, 20, 2000), {}, {}
    entered = data["x"][data["z"] == 2]
    average = torch.stack([tcp.survival(tau, 2, float(w)) for w in entered[::50, 0]]).mean(0)
    cases = {"off": (0, None, tcp.survival(tau, 0)),
             "slow start": (1, None, tcp.survival(tau, 1, 0.693)),
             "avoidance": (2, None, average)}
    cases |= {f"avoidance from w = {w}": (2, w, tcp.survival(tau, 2, float(w))) for w in (1, 2, 4)}
    for name, (mode, w, exact) in cases.items():
        z, module, context = torch.full(tau.shape, mode), plain, None
        if w is not None:
            context = torch.tensor([w, float(entered[:, 1].mean())]).expand(len(tau), 2)
            module = with_context
        learned = module.log_prob(tau, z, z, context=context, censored=torch.ones_like(z)).exp()
        distances[f"ks {name}"] = float((learned - exact).abs().max())
        curves[name] = [(tau[1:800], -v.diff()[:799] / tau.diff()[:799]) for v in (exact, learned)]
    return distances, curves


def event_laws(run, settings: dict, model_fields: dict, generator: torch.Generator) -> dict:
    """Flows fitted on exact pieces against the exact laws; then generation with the learned
    fields, the flows with context and jump maps by regression."""
    tcp, n = nha.RenoTCP(), settings["event_runs"]
    runs = tcp.sample_exact(n, n_points=201, generator=generator, dtype=torch.float32)
    data = runs.durations(0.0, 100.0)
    data = {k: v[data["tau"] > 1e-6] for k, v in data.items()}
    data["tau"] = data["tau"].float()
    (plain, nll), (with_context, nll_context) = (
        fit_flows(run, data, context, settings["event_epochs"], generator)
        for context in (False, True))
    distances, curves = law_distances(tcp, data, plain, with_context)
    probs = plain.transition_probs(torch.arange(3)).detach()
    out = {"nll of the system": exact_nll(tcp, data), "nll": nll, "nll with context": nll_context,
           **distances, "p(1->0)": float(probs[1, 0]), "p(2->0)": float(probs[2, 0])}
    event = torch.arange(runs.event_times.shape[1]) < runs.n_events[:, None]
    jump = nha.JumpMaps(3, 2).fit(runs.x_pre[event], runs.x_post[event], runs.mode_pre[event],
                                  runs.mode_post[event])
    model = nha.NHA(nha.ModeEncoder(10, 3), nha.ModeDecoder(2, 3), with_context, jump).eval()
    with torch.no_grad():
        for mode, (a, b, c, d) in model_fields.items():
            model.decoder.weight[int(mode), :, 0] = torch.tensor([a, c])
            model.decoder.bias[int(mode)] = torch.tensor([b, d])
    made = model.generate(torch.zeros(n, 2), 0, 100.0, generator=generator)
    out["pieces"] = [float(v.n_events.double().mean()) for v in (made, runs)]
    out["occupancy"] = [[float((v.modes == m).double().mean()) for m in range(3)]
                        for v in (made, runs)]
    if run.figures:
        draw_laws(curves, run.figures / "nha_tcp_densities.png")
    return out


def draw_laws(curves: dict, path) -> None:
    names = ["off", "slow start", "avoidance from w = 1", "avoidance from w = 4"]
    chart = figures.Chart((0, 8), (0, 0.6),
                          title="Time to the next event: exact law (dashed), learned flow",
                          xlabel="seconds", ylabel="density")
    for name, color in zip(names, figures.COLORS):
        exact, learned = curves[name]
        chart.line(*learned, color=color, label=name, width=2.5)
        chart.line(*exact, color=figures.INK, dashed=True, width=1.2)
    chart.save(path)


@torch.no_grad()
def draw_model(model: nha.NHA, pieces: nha.PaddedPieces, truth: torch.Tensor, folder) -> None:
    """One test trajectory with its modes as a strip, and the learned fields."""
    xhat, q = model.eval().reconstruct(pieces, solver="exact")
    labels = q.argmax(-1)
    used, top = labels.unique().tolist(), float(pieces.x[..., 0].max())
    chart = figures.Chart((0, 100), (-0.28 * top, 1.05 * top), xlabel="seconds", ylabel="window w",
                          size=(860, 420),
                          title="TCP: data (grey), reconstruction, learned mode (upper strip), "
                                "true mode (lower strip)")
    for i in range(len(labels)):
        n = int(pieces.lengths[i])
        t, color = pieces.t[i, :n].tolist(), figures.COLORS[used.index(int(labels[i]))]
        chart.line(t, pieces.x[i, :n, 0].tolist(), color="#bbbbbb", width=6)
        chart.line(t, xhat[i, :n, 0].tolist(), color=color, width=2)
        chart.line([t[0], t[-1]], [-0.1 * top] * 2, color=color, width=10)
        chart.line([t[0], t[-1]], [-0.2 * top] * 2,
                   color=("#cccccc", "#888888", "#222222")[int(truth[i])], width=10)
    for j, mode in enumerate(used):
        chart.line([-1, -1], [0, 0], color=figures.COLORS[j], label=f"mode {mode}")
    for name, color in (("off", "#cccccc"), ("slow start", "#888888"), ("avoidance", "#222222")):
        chart.line([-1, -1], [0, 0], color=color, label=name)
    chart.save(folder / "nha_tcp_reconstruction.png")
    w = torch.linspace(0, 10, 50)
    f = model.decoder.fields(torch.stack([w, 0 * w], 1))
    chart = figures.Chart((0, 10), (-0.2, 4), title="Learned fields, exact fields dashed",
                          xlabel="w", ylabel="dw/dt")
    for j, mode in enumerate(used):
        chart.line(w.tolist(), f[:, mode, 0].tolist(), color=figures.COLORS[j],
                   label=f"mode {mode}", width=3)
    chart.line(w.tolist(), (0.3465 * w).tolist(), color=figures.INK, dashed=True)
    chart.line(w.tolist(), [0.5] * 50, color=figures.INK, dashed=True)
    chart.save(folder / "nha_tcp_fields.png")


def build(name: str) -> nha.NHA:
    if not name.startswith("NHA"):
        return Baseline(name)
    modes = int(name.split()[3].rstrip(","))
    return nha.NHA(nha.ModeEncoder(10, modes), nha.ModeDecoder(2, modes))


def main(argv=None):
    parser = harness.parser(__doc__, presets=("default", "short", "tiny", "paper"),
                            data=False, networks=False)
    run = harness.start(parser, argv)
    settings, seed = PRESETS[run.args.preset], run.args.seed
    data = simulate(settings["folds"] * settings["size"] + settings["test"],
                    torch.Generator().manual_seed(1000 + seed))
    test = pack(data[-settings["test"] :])
    clusters = kmeans(test[0].features, 3, torch.Generator().manual_seed(seed))
    first = dict.fromkeys(("test MSE", "worst fold", "good folds", "smape"))
    table, found = [{"model": "k-means of the features, k = 3", **first,
                     **scores(test[1], clusters)}], {}
    for name in settings["models"]:
        row = found[name] = fit(run, name, data, settings, seed)
        table.append({"model": name, "test MSE": row["mse"], "worst fold": max(row["folds"]),
                      "good folds": f"{row['good']}/{settings['folds']}", **row["test"],
                      "epoch-0 v": row["epoch 0"].get("v")})
        del table[-1]["mse"]
    best = found["NHA m = 3"]
    if (laws := run.recorded("laws")) is None:
        g = torch.Generator().manual_seed(seed + 7)
        laws = run.record("laws", event_laws(run, settings, best["fields"], g))
    if run.figures:
        model = build("NHA m = 3")
        model.load_state_dict(run.saved("NHAm=3"))
        draw_model(model, *pack(data[-1:]), run.figures)
    run.finish(rows=claims(found, laws, asserted=run.args.preset != "tiny"),
               tables={"models": table}, laws=laws,
               folds={name: row["folds"] for name, row in found.items()}, fields=best["fields"])


def claims(found: dict, laws: dict, asserted: bool) -> list[dict]:
    rows, best = [], found["NHA m = 3"]

    def claim(text, paper, value, holds):
        rows.append({"claim": text, "paper": paper, "this run": value,
                     "holds": holds if asserted else None})

    for name, row in found.items():
        mse = row["mse"]
        if name.startswith("NHA") and "noisy" not in name:
            claim(f"{name}: test MSE", "< 0.01", mse, mse < 0.01)
        elif "noisy" not in name:
            least = min(row["folds"])
            claim(f"{name}: test MSE of its best fold above 100 x NHA m = 3", "yes", least,
                  least > 100 * best["mse"])
    exact = {"1": (0.3465, 0.0, 1.0, 0.0), "2": (0.0, 0.5, 1.0, 0.0)}
    off = [max(abs(f[0] / e[0] - 1) if e[0] else abs(f[1] / e[1] - 1), abs(f[2] - 1))
           for f, e in ((best["fields"][mode], exact[mode]) for mode in best["fields"])]
    claim("rates (a, c) of slow start and (b, c) of avoidance, largest relative error", "<= 0.02",
          max(off), max(off) <= 0.02)
    h = best["test"]["merged h"]
    claim("homogeneity against {off, slow start}, {avoidance}, m = 3", ">= 0.95", h, h >= 0.95)
    if "NHA m = 3, noisy" in found:
        lost = best["test"]["merged v"] - found["NHA m = 3, noisy"]["test"]["merged v"]
        claim("V (same classes) lost when a tenth of the boundaries is wrong", "< 0.15", lost,
              lost < 0.15)
    for name, value in laws.items():
        if name.startswith("ks "):
            claim(f"event law, {name[3:]}: KS distance", "< 0.03", value, value < 0.03)
    for p in ("p(1->0)", "p(2->0)"):
        claim(f"{p} of the flows", "0.5 +- 0.03", laws[p], abs(laws[p] - 0.5) < 0.03)
    claim("nll above the system's, flows with context", "-",
          laws["nll with context"] - laws["nll of the system"], None)
    ratio, (made, true) = laws["pieces"][0] / laws["pieces"][1], laws["occupancy"]
    shares = max(abs(a / b - 1) for a, b in zip(made, true) if b)
    claim("generated / true pieces per trajectory", "1 +- 0.1", ratio, abs(ratio - 1) < 0.1)
    claim("share of time in a mode, generated against true, largest relative error", "<= 0.1",
          shares, shares <= 0.1)
    return rows


if __name__ == "__main__":
    main()
