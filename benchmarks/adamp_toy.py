"""AdamP's theory on problems without data: norm growth, two toys, the scale-invariance test.

    python benchmarks/adamp_toy.py --figures figures           # about half a minute

1. Lemmas: for a scale-invariant f, <w, grad f> = 0; gradient descent obeys
   |w'|^2 = |w|^2 + lr^2 |g|^2 (lemma 2.1), heavy ball
   |w'|^2 = |w|^2 + lr^2 |p|^2 + 2 lr^2 sum_k beta^(t-k) |p_k|^2 (lemma 2.2), both to 1e-12; so the
   norm grows 1 + 2 beta / (1 - beta) times as much per squared update length: 19, 39 and 199 times
   at 0.9, 0.95 and 0.99 (corollary 2.3).
2. Minimise -cos(w, w*) in the plane from 150 degrees. Paper (unknown learning rate): with momentum
   the norm goes from 1 to 2.93 (0.9) and 27.87 (0.99), SGDP's stays small and it converges fastest.
3. Rosenbrock's function on a sphere with a redundant radius. Paper, 200 steps, read off its plots:
   momentum ends at radius 3.1 short of the optimum, with weight decay at 0.85 after a peak of 2.5,
   with the projection at 1.1 on the optimum.
4. The test: gradients of a convolution before batch norm always pass it, random ones as often as
   chance has it.
"""

import math

import harness
import figures
import torch
from torch import nn

from reference.adamp import SGDP, scale_invariance

METHODS = {                                   # name -> optimiser of (parameters, lr, momentum)
    "GD": lambda p, lr, momentum: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr, momentum: torch.optim.SGD(p, lr, momentum=momentum),
    "SGDP": lambda p, lr, momentum: SGDP(p, lr, momentum=momentum),
    "SGDP, official buffer": lambda p, lr, momentum: SGDP(p, lr, momentum=momentum,
                                                          project_buffer=True),
}


def descend(loss_fn, start, optimizer, steps):
    """The path (steps + 1, n) of a float64 weight of shape (1, n), and the updates p_t (steps, n)
    before the rate."""
    w = nn.Parameter(start[None].clone())
    optimizer, path, updates = optimizer([w]), [start.clone()], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(w[0]).backward()
        optimizer.step()
        path.append(w.detach()[0].clone())
        updates.append((path[-2] - path[-1]) / optimizer.param_groups[0]["lr"])
    return torch.stack(path), torch.stack(updates)


# ---------------------------------------------------------------- 1. the lemmas

def lemmas(seeds, steps, betas=(0.0, 0.9, 0.95, 0.99), size=20, lr=0.02):
    """One row per momentum: the lemmas' largest relative errors, growth per squared update."""
    rows = []
    for beta in betas:
        worst, cosine, growth = 0.0, 0.0, []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
            start = torch.randn(size, generator=generator, dtype=torch.float64)

            def quotient(w):                                  # Rayleigh's: scale invariant
                return w @ matrix @ w / (w @ w)
            path, p = descend(quotient, start, lambda x: torch.optim.SGD(x, lr, momentum=beta),
                              steps)
            g = p - beta * torch.cat([torch.zeros(1, size, dtype=torch.float64), p[:-1]])
            slopes = (path[:-1] * g).sum(1) / (path[:-1].norm(dim=1) * g.norm(dim=1))
            cosine = max(cosine, slopes[:100].abs().max().item())      # later g is rounding
            squares, past, predicted = p.square().sum(1), 0.0, []
            for t, square in enumerate(squares):
                predicted.append(path[t].square().sum() + lr ** 2 * (square + 2 * past))
                past = beta * (past + square)
            error = path[1:].square().sum(1) / torch.stack(predicted) - 1
            worst = max(worst, error.abs().max().item())
            growth.append(((path[-1].square().sum() - path[0].square().sum())
                           / (lr ** 2 * squares.sum())).item())
        rows.append({"momentum": beta, "lemma": "2.1" if beta == 0 else "2.2",
                     "largest relative error": worst, "largest |cos(w, g)|": cosine,
                     "limit 1 + 2b/(1-b)": 1 + 2 * beta / (1 - beta),
                     "growth of |w|^2 / lr^2 sum |p|^2": sum(growth) / len(growth)})
    return rows


# ---------------------------------------------------------------- 2. the plane

def negative_cosine(w):
    return -w[0] / w.norm()


def plane(rates, momenta, steps):
    """Rows of final norms and first steps with 1 - cos < 1e-4; paths by (lr, momentum, method)."""
    angle = math.radians(150)
    start = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    rows, paths = [], {}
    for lr in rates:
        for momentum in momenta:
            row = {"lr": lr, "momentum": momentum}
            for name, make in METHODS.items():
                path, _ = descend(negative_cosine, start, lambda p: make(p, lr, momentum), steps)
                near = (1 - path[:, 0] / path.norm(dim=1) < 1e-4).nonzero()
                paths[lr, momentum, name] = path
                row |= {f"{name}: norm": path[-1].norm().item(),
                        f"{name}: steps": near[0].item() if len(near) else None}
            rows.append(row)
    return rows, paths


# ---------------------------------------------------------------- 3. the sphere

def angles(w):
    """psi and phi of (..., 3) points: longitude, and latitude plus 1, in units of 45 degrees."""
    x, y, z = w.unbind(-1)
    scale = 4 / math.pi
    return scale * torch.atan2(y, x), 1 + scale * torch.asin(z / w.norm(dim=-1))


def rosenbrock(w):
    psi, phi = angles(w)
    return (1 - psi) ** 2 + 300 * (phi - psi ** 2) ** 2


def sphere(rates, lengths, momentum=0.9):
    """Rows of final values h and radii; the paths of the longest run by (rate, method)."""
    longitude, latitude = -1.95 * math.pi / 4, math.pi / 4    # psi = -1.95, phi = 2, radius 1
    start = torch.tensor([math.cos(latitude) * math.cos(longitude),
                          math.cos(latitude) * math.sin(longitude),
                          math.sin(latitude)], dtype=torch.float64)

    def decayed(p, lr, m):                                    # delta 0: never projects
        return SGDP(p, lr, momentum=m, weight_decay=10, delta=0)

    rows, paths = [], {}
    for lr in rates:
        for name, make in {**METHODS, "momentum, decay": decayed}.items():
            path, _ = descend(rosenbrock, start, lambda p: make(p, lr, momentum), max(lengths))
            paths[lr, name] = path
            for steps in lengths:
                rows.append({"lr": lr, "steps": steps, "optimiser": name,
                             "h": rosenbrock(path[steps]).item(),
                             "radius": path[steps].norm().item(),
                             "largest radius": path[:steps + 1].norm(dim=1).max().item()})
    return rows, paths


# ---------------------------------------------------------------- 4. the test

def detection(draws, deltas=(0.01, 0.03, 0.1, 0.3, 1.0)):
    """Shares of gradients that pass: of a convolution before batch norm, of random matrices."""
    generator = torch.Generator().manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
    pairs = {"before batch norm": [], "random 10 x 64": []}
    for _ in range(draws // 10):
        with torch.no_grad():
            conv.weight.normal_(generator=generator)
        conv.zero_grad()
        images = torch.randn(4, 3, 8, 8, generator=generator)
        direction = torch.randn(8, 1, 1, generator=generator)
        (norm(conv(images)).tanh() * direction).square().sum().backward()
        pairs["before batch norm"].append((conv.weight.detach().clone(), conv.weight.grad.clone()))
    pairs["random 10 x 64"] = [tuple(torch.randn(2, 10, 64, generator=generator))
                               for _ in range(draws)]
    rows = []
    for delta in deltas:
        row = {"delta": delta, "chance, one row": math.erf(delta / math.sqrt(2))}
        for name, tests in pairs.items():
            views = [scale_invariance(w, g, delta) for w, g in tests]
            row |= {f"{name}: {view}": views.count(view) / len(views)
                    for view in ("channel", "layer")}
        rows.append(row)
    return rows


# ---------------------------------------------------------------- together

def main(argv=None):
    run = harness.start(harness.parser(__doc__, seeds=3, data=False, networks=False), argv)
    tiny = run.args.preset == "tiny"
    lemma_rows = lemmas(run.seeds, 100 if tiny else 2000)
    if tiny:
        plane_rows, plane_paths = plane((0.05,), (0.9, 0.99), steps=400)
        sphere_rows, sphere_paths = sphere((1e-4,), lengths=(50,))
    else:
        plane_rows, plane_paths = plane((0.05, 0.1), (0.9, 0.95, 0.99), steps=1000)
        sphere_rows, sphere_paths = sphere((5e-5, 1e-4), lengths=(200, 1000))
    test_rows = detection(200 if tiny else 5000)

    claims = [{"claim": f"lemma {row['lemma']}, momentum {row['momentum']}: largest relative error",
               "paper": 0.0, "this run": row["largest relative error"],
               "holds": row["largest relative error"] < 1e-12} for row in lemma_rows]
    if not tiny:
        for row in lemma_rows[1:]:
            growth, limit = row["growth of |w|^2 / lr^2 sum |p|^2"], row["limit 1 + 2b/(1-b)"]
            claims.append({"claim": f"norm growth per squared update, momentum {row['momentum']}",
                           "paper": limit, "this run": growth,
                           "holds": 0.8 < growth / limit < 1.001})
    for row in plane_rows:
        where = f"plane, lr {row['lr']}, momentum {row['momentum']}"
        paper = {0.9: 2.93, 0.99: 27.87}.get(row["momentum"])
        claims.append({"claim": f"{where}: norm with momentum", "paper": paper,
                       "this run": row["momentum: norm"],
                       "holds": row["momentum: norm"] > 3 * row["SGDP: norm"]})
        claims.append({"claim": f"{where}: steps of SGDP / of momentum", "paper": None,
                       "this run": row["SGDP: steps"] / row["momentum: steps"],
                       "holds": row["SGDP: steps"] < 0.5 * row["momentum: steps"]})
    last = {row["optimiser"]: row for row in sphere_rows if row["lr"] == 1e-4}  # longest runs
    for name, paper in (("momentum", 3.1), ("SGDP", 1.1)):
        claims.append({"claim": f"sphere, lr 1e-4: radius of {name}", "paper": paper,
                       "this run": last[name]["radius"],
                       "holds": (last[name]["radius"] > 3) == (name == "momentum")})
    surge = last["momentum, decay"]["largest radius"]
    claims.append({"claim": "sphere: decay's largest radius (the first surge is not stopped)",
                   "paper": 2.5, "this run": surge,
                   "holds": surge > 2 * last["SGDP"]["largest radius"]})
    ratio = last["SGDP"]["h"] / last["momentum"]["h"]
    claims.append({"claim": "sphere: h of SGDP / h of momentum", "paper": None,
                   "this run": ratio, "holds": None if tiny else ratio < 0.5})
    share = next(row for row in test_rows if row["delta"] == 0.1)["before batch norm: channel"]
    claims.append({"claim": "weights before batch norm recognised", "paper": 1.0,
                   "this run": share, "holds": share == 1})
    if run.figures is not None and run.is_main:
        draw(run.figures, plane_paths, sphere_paths)
    run.finish(rows=claims, tables={"lemmas": lemma_rows, "plane": plane_rows,
                                    "sphere": sphere_rows, "test": test_rows})


def draw(folder, plane_paths, sphere_paths):
    lr = max(rate for rate, *_ in plane_paths)
    lines = {f"{name}, {momentum}" if name != "GD" else name: (range(len(path)), path.norm(dim=1))
             for (rate, momentum, name), path in plane_paths.items()
             if rate == lr and name in ("GD", "momentum", "SGDP") and (momentum in (0.9, 0.99))}
    figures.line_chart(folder / "adamp-toy-norm.png", lines, logy=True,
                       title=f"|w| while minimising -cos(w, w*), lr {lr}",
                       xlabel="step", ylabel="norm")
    chart = figures.Chart((-1.5, 6.5), (-1.2, 2.8),
                          title=f"Paths in the plane, momentum 0.9, lr {lr}", xlabel="w1",
                          ylabel="w2")
    for color, name in zip(figures.COLORS, METHODS):
        path = plane_paths[lr, 0.9, name]
        chart.line(path[:, 0], path[:, 1], color, name)
        chart.points(path[1:61:4, 0], path[1:61:4, 1], color, radius=2)
    chart.text(2.2, -0.3, "optimum: the direction of w1")
    chart.save(folder / "adamp-toy-plane.png")

    lr = max(rate for rate, _ in sphere_paths)
    paths = {name: path for (rate, name), path in sphere_paths.items() if rate == lr}
    chart = figures.Chart((-2.1, 2.1), (-1, 3.1),
                          title="Rosenbrock's valley on the sphere, 200 steps", xlabel="psi",
                          ylabel="phi")
    valley = torch.linspace(-1.75, 1.75, 100)
    chart.line(valley, valley ** 2, "#bbbbbb", "valley", width=4)
    for color, (name, path) in zip(figures.COLORS, paths.items()):
        psi, phi = angles(path[:201])
        chart.line(psi, phi, color, name)
        chart.points(psi[-1:], phi[-1:], color, radius=5)
    chart.points([1.0], [1.0], figures.INK, radius=4)
    chart.text(1.0, 1.0, "  optimum")
    chart.save(folder / "adamp-toy-sphere.png")
    radii = {name: path[:201].norm(dim=1) for name, path in paths.items()}
    figures.line_chart(folder / "adamp-toy-radius.png",
                       {name: (range(len(r)), r) for name, r in radii.items()},
                       title="Radius on the sphere", xlabel="step", ylabel="radius")


if __name__ == "__main__":
    main()
