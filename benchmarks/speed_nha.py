"""Speed: neural ODEs against torchdiffeq, torchdyn and torchode, and TCP training against the
jagged loop; interleaved.

    python benchmarks/speed_nha.py --threads 1   # a minute; peers not installed are left out

Solver: forward + backward of a batch of tanh networks 2-64-64-2, float32, rtol = atol = 1e-5,
dopri5. "stiff" replaces one sample by a 30 times faster one. Ours takes steps of each sample's own,
or, like torchdiffeq and torchdyn, one step for the batch. A floor is the evaluations of the network
alone, one after the other with the rows that still need them, forward and backward. Training: an
epoch of mode recovery on 5 trajectories, with the closed form of affine modes, against the scheme
of the published code: classical Runge-Kutta, one step per observation, every mode a module, a
Python list per piece. Equal loss: both decode the same modes of the same pieces. Times are medians
(floors least ones), "times faster" the median of the ratios within a round; on one thread,
processor time.
"""

import functools
import importlib

import harness
import nha_tcp
import timing
import torch
from torch import nn

from reference import nha


def installed(name: str):
    try:
        return importlib.import_module(name)
    except Exception:                       # not installed, or without its own dependencies
        return None


SHARED = "ours, shared step"
torchdiffeq, torchdyn, torchode = map(installed, ("torchdiffeq", "torchdyn.numerics", "torchode"))


class Field(nn.Module):
    """dy/dt = speed * net(y); the state is (y, speed), so that a sample can be stiffer than the
    others."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                                 nn.Linear(64, 2))
        with torch.no_grad():
            for layer in self.net[::2]:
                for p in layer.parameters():
                    p.copy_(2 * (2 * torch.rand(p.shape, generator=generator) - 1)
                            * layer.in_features**-0.5)

    def forward(self, t, y, *_):
        return torch.cat([self.net(y[:, :2]) * y[:, 2:], torch.zeros_like(y[:, 2:])], 1)


def solve(run, case: tuple[int, int, int, bool], f: Field, g: torch.Generator,
          repeats: int) -> tuple[dict, dict]:
    """Milliseconds of every way to solve one problem; how many times faster than each of them ours
    is, {"ours": {way: ratio}, "ours, shared step": {way: ratio}}."""
    batch, end, points, stiff = case
    grads = lambda ys: torch.autograd.grad(ys.square().mean(), f.parameters())
    tol, t = dict(rtol=1e-5, atol=1e-5), torch.linspace(0, end, points, device=run.device)
    y0 = torch.cat([torch.randn(batch, 2, generator=g), torch.ones(batch, 1)], 1).to(run.device)
    if stiff:
        y0[0, 2] = 30.0
    ways = {"ours": lambda: grads(nha.odeint(f, y0, t, **tol).ys),
            SHARED: lambda: grads(nha.odeint(f, y0, t, per_sample=False, **tol).ys)}
    if torchdiffeq:
        ways["torchdiffeq"] = lambda: grads(torchdiffeq.odeint(f, y0, t, **tol))
    if torchdyn:
        ways["torchdyn"] = lambda: grads(torchdyn.odeint(f, y0, t, solver="dopri5", **tol)[1])
    if torchode:
        term = torchode.ODETerm(f)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term),
                                          torchode.IntegralController(1e-5, 1e-5, term=term))
        initial = torchode.InitialValueProblem(y0=y0, t_eval=t.expand(batch, -1))
        ways["torchode"] = lambda: grads(solver.solve(initial).ys)
    problem = f"B = {batch}, T = {end}, {points} outputs" + (", one stiff" if stiff else "")
    timed = functools.partial(timing.interleaved, run, rounds=repeats, at_least=0.05)
    times = timed(ways, label=problem)
    faster = {ours: {name: timing.ratio(times, name, ours) for name in ways}
              for ours in ("ours", SHARED)}

    def evaluations(needed: torch.Tensor):
        """`needed` (B,): how many evaluations each sample needs; those that need fewer leave."""
        y, gone = y0, []
        for call in range(int(needed.max())):
            rows = int((needed > call).sum())
            gone.append(y[rows:])
            y = f(None, y[:rows])
        return grads(torch.cat([*gone, y]))

    needed = {name: nha.odeint(f, y0, t, per_sample=own, grad="none", **tol).stats.n_f
              for name, own in (("floor", True), ("floor, shared step", False))}
    floors = timed({name: functools.partial(evaluations, n) for name, n in needed.items()},
                   label="floor")
    least = {name: min(values) for name, values in floors.items()}
    row = {f"{name} ms": round(1e3 * v, 2) for name, v in (timing.medians(times) | least).items()}
    return {"problem": problem, **row}, faster


class JaggedLoop:
    """An epoch as the published code does it: a list of states per piece, appended to step by
    step."""

    def __init__(self, model: nha.NHA, pieces: nha.PaddedPieces, modes: int):
        self.encoder, self.pieces, self.lengths = model.encoder, pieces, pieces.lengths.tolist()
        self.fields = nn.ModuleList(nn.Linear(1, 2) for _ in range(modes))
        with torch.no_grad():
            for j, field in enumerate(self.fields):
                field.weight.copy_(model.decoder.weight[j]), field.bias.copy_(model.decoder.bias[j])
        self.optimizers = [torch.optim.AdamW(self.encoder.parameters(), lr=3e-4),
                           torch.optim.AdamW(self.fields.parameters(), lr=1e-2)]

    def field(self, s: torch.Tensor) -> torch.Tensor:
        x, q = s[:, :2], s[:, 2:]
        dx = sum(q[:, j : j + 1] * field(x[:, :1]) for j, field in enumerate(self.fields))
        return torch.cat([dx, torch.zeros_like(q)], 1)

    def loss(self, q: torch.Tensor) -> torch.Tensor:
        state = torch.cat([self.pieces.x[:, 0], q], 1)
        paths = [[row[:2]] for row in state]
        for k in range(max(self.lengths) - 1):
            h = torch.stack([t[k + 1] - t[k] if k + 1 < n else t.new_zeros(())
                             for t, n in zip(self.pieces.t, self.lengths)])[:, None]
            k1 = self.field(state)
            k2 = self.field(state + h * k1 / 2)
            k3 = self.field(state + h * k2 / 2)
            k4 = self.field(state + h * k3)
            state = state + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6
            for path, row in zip(paths, state):
                path.append(row[:2])
        errors = [(torch.stack(path[:n]) - x[:n]).square().sum(1).mean()
                  for path, x, n in zip(paths, self.pieces.x, self.lengths)]
        return torch.stack(errors).mean()

    def epoch(self) -> None:
        loss = self.loss(nha.straight_through(self.encoder.logits(self.pieces.features)))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()


def tcp_training(run, tiny: bool) -> dict:
    """Time per epoch of both, after some training, and their losses for the same labels."""
    g = torch.Generator().manual_seed(run.args.seed)
    trajectories = nha_tcp.simulate(1 if tiny else 5, g)
    pieces, _ = nha_tcp.pack([t[:3] for t in trajectories] if tiny else trajectories)
    model = nha_tcp.initialize(nha.NHA(nha.ModeEncoder(10, 3), nha.ModeDecoder(2, 3)), g)
    steps = nha.train_mode_recovery(model, pieces, solver="exact", generator=g)
    for _ in range(3 if tiny else 200):
        next(steps)
    jagged, q = JaggedLoop(model, pieces, 3), model.encode(pieces.features, mode="argmax").detach()
    with torch.no_grad():
        exact = nha.reconstruction_loss(model.decode(pieces.x[:, 0], q, pieces.t, solver="exact"),
                                        pieces.x, pieces.mask)
        looped = jagged.loss(q)
    times = timing.interleaved(run, {"ours": lambda: next(steps), "jagged loop": jagged.epoch},
                               1 if tiny else 3, "TCP epoch", at_least=0.0 if tiny else 0.05)
    return {"pieces": len(pieces.lengths),
            **{f"{name} ms": 1e3 * seconds for name, seconds in timing.medians(times).items()},
            "times faster": timing.ratio(times, "jagged loop", "ours"), "loss": float(exact),
            "loss, jagged loop": float(looped)}


def main(argv=None):
    parser = harness.parser(__doc__, data=False, networks=False, figures=False)
    parser.add_argument("--repeats", type=harness.count, default=9)
    run = harness.start(parser, argv)
    tiny = run.args.preset == "tiny"
    g = torch.Generator().manual_seed(run.args.seed)
    f = Field(g).to(run.device)
    cases = [(8, 1, 2, False), (512, 1, 2, False), (512, 5, 11, False), (512, 1, 2, True)]
    table = [solve(run, case, f, g, 2 if tiny else run.args.repeats)
             for case in (cases[:1] if tiny else cases)]
    rows = []
    for row, faster in table:
        small, stiff = row["problem"].startswith("B = 8"), row["problem"].endswith("stiff")
        peers = [name for name in ("torchdiffeq", "torchdyn")[: 1 if small else 2]
                 if name in faster["ours"]]
        need = 2.0 if small or stiff else 1.0
        for ours in ["ours"] if small or stiff else faster:
            ratio = min((faster[ours][name] for name in peers), default=float("nan"))
            against = f"times faster than the fastest of {', '.join(peers) or 'no peer'}"
            rows.append({"claim": f"{row['problem']}: {ours}, {against}", "paper": f">= {need:g}",
                         "this run": round(ratio, 2) if peers else "no peer",
                         "holds": ratio >= need if peers and not tiny else None})
    training = tcp_training(run, tiny)
    gap = abs(training["loss"] / training["loss, jagged loop"] - 1)
    rows += [{"claim": "TCP epoch: times faster than the jagged loop", "paper": ">= 30",
              "this run": round(training["times faster"], 1),
              "holds": None if tiny else training["times faster"] >= 30},
             {"claim": "TCP epoch: relative difference of the losses", "paper": "<= 1e-3",
              "this run": gap, "holds": gap <= 1e-3}]
    tables = {"milliseconds": [row for row, _ in table], "TCP epoch": [training]}
    run.finish(rows=rows, tables=tables)


if __name__ == "__main__":
    main()
