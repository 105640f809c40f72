"""Mode mixing: a switching system learned with a categorical gate and with a softmax gate (NHA,
appendix).

    python benchmarks/nha_switching.py                  # 3 seeds, 1500 steps: 3 minutes on one core
    python benchmarks/nha_switching.py --preset paper   # 3000 steps; by 1500 the step size is 3e-8

dx/dt = sum_j w_j(x) f_j(x) with four fields for the three regions of nha.SwitchingLinear. w is the
gate's softmax, or a one-hot draw from it at every evaluation of the field (straight-through
gradient). Trained on arcs of length 0.5 that start near the borders. Expected: the softmax gate
fits a little better and mixes fields, the categorical one picks a field, so that each region has
one field that is its own. Errors are those of the argmax gate and of the mixture respectively.
"""

import statistics

import figures
import harness
import torch
from torch import nn
from torch.nn import functional as F

from reference import nha

PRESETS = {"default": dict(steps=1500, decay=300, pool=8192),
           "tiny": dict(steps=4, decay=2, pool=128),
           "paper": dict(steps=3000, decay=300, pool=16384)}
BATCH, MARGIN = 128, 0.5
TIMES = torch.linspace(0, 0.5, 10, dtype=torch.float64)


class GatedFields(nn.Module):
    """Four networks 2-32-32-32-2 (softplus, softplus, tanh), their layers stacked, and a gate
    2-64-64-4."""

    def __init__(self, kind: str, generator: torch.Generator, modes: int = 4):
        super().__init__()
        uniform = lambda *shape: nn.Parameter(
            (2 * torch.rand(shape, generator=generator) - 1) * shape[-2] ** -0.5)
        sizes = (2, 32, 32, 32, 2)
        self.weights = nn.ParameterList(uniform(modes, a, b) for a, b in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(uniform(modes, a, b)[:, :1].detach().requires_grad_()
                                       for a, b in zip(sizes, sizes[1:]))
        self.gate = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.Tanh(),
                                  nn.Linear(64, modes))
        with torch.no_grad():
            for layer in self.gate[::2]:
                for p in layer.parameters():
                    p.copy_((2 * torch.rand(p.shape, generator=generator) - 1)
                            * layer.in_features**-0.5)
        self.kind, self.generator = kind, generator

    def fields(self, x):
        """(m, B, 2): every field at x (B, 2)."""
        h = x.expand(len(self.weights[0]), *x.shape)
        activations = F.softplus, F.softplus, torch.tanh, lambda v: v
        for weight, bias, activation in zip(self.weights, self.biases, activations):
            h = activation(torch.baddbmm(bias, h, weight))
        return h

    def forward(self, t, x):
        logits = self.gate(x)
        if self.kind == "softmax":
            w = logits.softmax(-1)
        elif self.training:
            w = nha.straight_through(logits, generator=self.generator)
        else:
            w = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(x)
        return torch.einsum("bm,mbn->bn", w, self.fields(x))


def arcs(n: int, generator: torch.Generator) -> torch.Tensor:
    """(10, n, 2) exact arcs that start near the border of the left regions, or near x = 2."""
    u = torch.rand(2, n // 2, 2, generator=generator, dtype=torch.float64)
    left = torch.stack([-1 + (3 - MARGIN) * u[0, :, 0], MARGIN * (2 * u[0, :, 1] - 1)], 1)
    right = torch.stack([2 + MARGIN * (2 * u[1, :, 0] - 1), 6 * u[1, :, 1] - 3], 1)
    x0, system = torch.cat([left, right]), nha.SwitchingLinear()
    return nha.odeint_hybrid(system, x0, system.region(x0), TIMES).ys.float()


def arc_loss(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    position = (found - truth).abs().sum(-1).mean()
    return position + 0.5 * (found.diff(dim=0) - truth.diff(dim=0)).square().sum(-1).mean()


def train(model: GatedFields, pool: torch.Tensor, steps: int, decay: int,
          resume: dict | None = None):
    optimizer, g, first = torch.optim.AdamW(model.parameters(), lr=3e-3), model.generator, 0
    if resume:
        model.load_state_dict(resume["model"]), optimizer.load_state_dict(resume["optimizer"])
        g.set_state(resume["generator"])
        first = resume["step"]
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * 0.1 ** (step // decay)
        truth = pool[:, torch.randint(0, pool.shape[1], (BATCH,), generator=g)]
        loss = arc_loss(nha.odeint(model, truth[0], TIMES, method="midpoint").ys, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        request = yield {"step": step, "loss": loss.item()}
        while request == "state":
            request = yield {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                             "generator": g.get_state(), "step": step + 1}


@torch.no_grad()
def evaluate(model: GatedFields, test: torch.Tensor) -> dict:
    """Losses, how mixed the gate is on the arcs, and how well its argmax tells the regions
    apart."""
    drawn, row = {"loss": model.kind == "categorical"}, {}
    if model.kind == "categorical":
        drawn["loss, argmax gate"] = False
    for name, draws in drawn.items():
        model.train(draws)
        row[name] = float(arc_loss(nha.odeint(model, test[0], TIMES, method="midpoint").ys, test))
    states, system = test.reshape(-1, 2), nha.SwitchingLinear()
    p, region = model.eval().gate(states).softmax(-1), system.region(states)
    h, _, v = nha.v_measure(region, p.argmax(-1))
    error = (model(None, states) - system.vector_field(states)).norm(dim=-1)
    return row | {"largest weight": float(p.amax(-1).mean()),
                  "gate entropy": float(-torch.special.xlogy(p, p).sum(-1).mean()),
                  "mixed": float((p.amax(-1) < 0.9).float().mean()), "homogeneity": h, "V": v,
                  "median field error": float(error.median())}


@torch.no_grad()
def draw(models: dict[str, GatedFields], path) -> None:
    """Per gate: where each field is used, and the learned mixture (dark, a dot at the tip) over the
    true field (white)."""
    tiles, axis = [], torch.linspace(-3, 3, 121)
    y, x = torch.meshgrid(axis.flip(0), torch.linspace(-1, 3, 81), indexing="ij")
    grid = torch.stack([x.flatten(), y.flatten()], 1)
    colors = torch.tensor([[int(c[i:i + 2], 16) for i in (1, 3, 5)]
                           for c in figures.COLORS[:4]]) / 255
    for model in models.values():
        p = model.eval().gate(grid).softmax(-1)
        chart = figures.Chart((-1, 3), (-3, 3), title=f"{model.kind} gate", xlabel="x", ylabel="y",
                              size=(380, 380))
        left, top, right, bottom = (int(v * figures.ZOOM) for v in chart.box)
        shade = figures.as_image((0.45 + 0.55 * p @ colors).clamp(max=1).view(121, 81, 3))
        image = figures.Image.fromarray(shade).resize((right - left, bottom - top),
                                                      figures.Image.BILINEAR)
        chart.canvas.paste(image, (left, top))
        at = torch.cartesian_prod(torch.linspace(-0.8, 2.8, 10), torch.linspace(-2.7, 2.7, 13))
        for field, color, width in ((nha.SwitchingLinear().vector_field, "#ffffff", 5),
                                    (lambda x: model(None, x), "#111111", 1.6)):
            v = field(at)
            tip = at + 0.3 * v / v.norm(dim=-1, keepdim=True).clamp(min=1)
            for a, b in zip(at.tolist(), tip.tolist()):
                chart.line([a[0], b[0]], [a[1], b[1]], color=color, width=width)
                chart.points([b[0]], [b[1]], color=color, radius=1.2 * width**0.5)
        chart.line([2, 2], [-3, 3], color="#111111", dashed=True)
        chart.line([-1, 2], [0, 0], color="#111111", dashed=True)
        chart.frame()
        tiles.append(chart.canvas.resize(chart.size, figures.Image.LANCZOS))
    figures.image_grid(path, tiles, columns=2, cell=380)


def main(argv=None):
    parser = harness.parser(__doc__, presets=("default", "tiny", "paper"),
                            seeds=3, data=False, networks=False)
    run = harness.start(parser, argv)
    settings, table, models = PRESETS[run.args.preset], [], {}
    test = arcs(settings["pool"] // 4, torch.Generator().manual_seed(999)).to(run.device)
    for seed in run.seeds[:1] if run.args.preset == "tiny" else run.seeds:
        pool = arcs(settings["pool"], torch.Generator().manual_seed(1000 + seed)).to(run.device)
        for kind in ("categorical", "softmax"):
            name = f"{kind}-seed{seed}"
            model = GatedFields(kind, torch.Generator().manual_seed(seed)).to(run.device)
            if (row := run.recorded(name)) is None:
                run.drive(name, train(model, pool, settings["steps"], settings["decay"],
                                      run.resumed(name)), total=settings["steps"])
                run.save(name, model.state_dict())
                row = run.record(name, evaluate(model, test))
            else:
                model.load_state_dict(run.saved(name))
            models[kind, seed] = model
            table.append({"gate": kind, "seed": seed, **row})
    if run.figures:
        draw({kind: models[kind, run.seeds[0]].cpu() for kind in ("categorical", "softmax")},
             run.figures / "nha_switching.png")
    of = lambda kind, key: [r[key] for r in table if r["gate"] == kind]
    rows, full = [], run.args.preset != "tiny"

    def compare(text: str, paper, key: str, holds=None):
        """Means of both gates; `holds`: what must be true of (categorical, softmax) for every
        seed."""
        hard, soft = of("categorical", key), of("softmax", key)
        rows.append({"claim": text, "paper": paper,
                     "this run": f"{statistics.mean(hard):.3g}, {statistics.mean(soft):.3g}",
                     "holds": all(map(holds, hard, soft)) if holds and full else None})

    compare("loss, categorical and softmax; softmax fits better", "0.0456, 0.0342",
            "loss", lambda hard, soft: soft < hard)
    compare("gate entropy; categorical below half of softmax", "-",
            "gate entropy", lambda hard, soft: hard < 0.5 * soft)
    compare("share of states that mix fields (no weight above 0.9)", "-", "mixed")
    compare("median error of the field; categorical below half of softmax", "-",
            "median field error", lambda hard, soft: hard < 0.5 * soft)
    run.finish(rows=rows, tables={"gates": table})


if __name__ == "__main__":
    main()
