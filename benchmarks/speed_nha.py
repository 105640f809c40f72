"""Forward + backward of a batch of neural ODEs: this solver against torchdiffeq, torchdyn and torchode, interleaved.

    python benchmarks/speed_nha.py                        # one thread; a minute; peers that are not installed are left out

A tanh network 2-64-64-2 in float32, rtol = atol = 1e-5, dopri5. "stiff" replaces one sample by a 30 times faster one.
The floor is the number of evaluations of a shared step times one bare forward + backward of the network.
"""

import statistics
import time

import harness
import torch
from torch import nn

from reference import nha

try:
    import torchdiffeq
except Exception:                                             # not installed
    torchdiffeq = None
try:
    import torchdyn.numerics as torchdyn
except Exception:                                             # not installed, or without its own dependencies
    torchdyn = None
try:
    import torchode
except Exception:                                             # not installed
    torchode = None


class Field(nn.Module):
    """dy/dt = speed * net(y); the state is (y, speed), so that a sample can be stiffer than the others."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        with torch.no_grad():
            for layer in self.net[::2]:
                for p in layer.parameters():
                    p.copy_(2 * (2 * torch.rand(p.shape, generator=generator) - 1) * layer.in_features**-0.5)

    def forward(self, t, y, *_):
        return torch.cat([self.net(y[:, :2]) * y[:, 2:], torch.zeros_like(y[:, 2:])], 1)


def main(argv=None):
    parser = harness.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    run = harness.start(parser, argv)
    tiny = run.args.preset == "tiny"
    g = torch.Generator().manual_seed(run.args.seed)
    f = Field(g).to(run.device)
    grads = lambda ys: torch.autograd.grad(ys.square().mean(), f.parameters())
    table, tol = [], dict(rtol=1e-5, atol=1e-5)
    cases = [(8, 1, 2, False), (512, 1, 2, False), (512, 5, 11, False), (512, 1, 2, True)]
    for batch, end, points, stiff in cases[:1] if tiny else cases:
        y0 = torch.cat([torch.randn(batch, 2, generator=g), torch.ones(batch, 1)], 1).to(run.device)
        if stiff:
            y0[0, 2] = 30.0
        t = torch.linspace(0, end, points, device=run.device)
        ways = {"ours": lambda: grads(nha.odeint(f, y0, t, **tol).ys),
                "ours, shared step": lambda: grads(nha.odeint(f, y0, t, per_sample=False, **tol).ys)}
        if torchdiffeq:
            ways["torchdiffeq"] = lambda: grads(torchdiffeq.odeint(f, y0, t, **tol))
        if torchdyn:
            ways["torchdyn"] = lambda: grads(torchdyn.odeint(f, y0, t, solver="dopri5", **tol)[1])
        if torchode:
            term = torchode.ODETerm(f)
            solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term), torchode.IntegralController(1e-5, 1e-5, term=term))
            problem = torchode.InitialValueProblem(y0=y0, t_eval=t.expand(batch, -1))
            ways["torchode"] = lambda: grads(solver.solve(problem).ys)
        times = {name: [] for name in ways}
        for repeat in range(-1, 2 if tiny else run.args.repeats):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if run.device.type == "cuda":
                    torch.cuda.synchronize(run.device)
                if repeat >= 0:
                    times[name].append(time.perf_counter() - began)
        bare = []
        for _ in range(9):
            began = time.perf_counter()
            grads(f(None, y0))
            bare.append(time.perf_counter() - began)
        calls = int(nha.odeint(f, y0, t, per_sample=False, grad="none", **tol).stats.n_f[0])
        row = {"problem": f"B = {batch}, T = {end}, {points} outputs" + (", one stiff" if stiff else "")}
        row |= {f"{name} ms": round(1e3 * statistics.median(v), 2) for name, v in times.items()}
        table.append(row | {"floor ms": round(1e3 * calls * statistics.median(bare), 2)})
    rows = []
    for row in table:
        small, stiff = row["problem"].startswith("B = 8"), row["problem"].endswith("stiff")
        peers = [name for name in ("torchdiffeq", "torchdyn") if f"{name} ms" in row]
        peers = peers[:1] if small else peers
        need = 2.0 if small or stiff else 1.0
        ratio = min((row[f"{p} ms"] for p in peers), default=float("nan")) / row["ours ms"]
        rows.append({"claim": f"{row['problem']}: times faster than the fastest of {', '.join(peers) or 'no peer'}",
                     "paper": f">= {need:g}", "this run": round(ratio, 2) if peers else "no peer",
                     "holds": ratio >= need if peers and not tiny else None})
    run.finish(rows=rows, tables={"milliseconds": table})


if __name__ == "__main__":
    main()
