"""One step on ResNet-50's parameters beside torch and the public packages: time, traffic, memory.

    python benchmarks/speed_adamp.py --threads 1       # about a minute
    python benchmarks/speed_adamp.py                   # all threads
    python benchmarks/speed_adamp.py --device cuda     # AdamP: at most twice AdamW's foreach path

All optimisers take turns in every round (`adamp` and `timm` where they are installed); the figure
is the median over rounds of the process's CPU time (several threads or a GPU: wall time). Gradients
are orthogonal to the weights and the learning rate is tiny, so that every matrix stays projected.

Floor: AdamW reads w, g, m, v and writes w, m, v, 7 streams of 4 bytes per parameter; SGD 5. The
projection needs 2 more, as no row may change before all rows of w and g have passed the test. The
"floor, ms" of an optimiser is its number of streams at the rate at which torch's fused kernel moves
its own in this run, so of AdamP 9/7 of fused AdamW and of SGDP 7/5 of fused SGD: what one kernel
could reach that makes the sums over rows in registers. torch has none: sums and products are calls
of their own, and "GB in operations" counts what all calls of a step read and write, be it in memory
or in the cache. (torch declares the gradient of its fused kernels as written; it counts twice.)
Beyond AdamW's 7 streams AdamP reads w and g for <w, g>, w for |w| and a part of g to bound |g|;
then per block it clears room for the update (1), lets the kernel fill it, multiplies it with w (2)
and adds it (3): 6 streams that stay in the cache (with nesterov it also steps and copies m once
more). Expected on one thread: AdamP 3 times fused AdamW, with nesterov 4 times, and 3.5 times
faster than the official package or more, whose time depends on where its temporaries come to lie;
SGDP 3.5 to 4 times fused SGD and twice as fast as the official package.
"""

import harness
import timing
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reference import adamp, resnet

STREAMS = {"AdamP": 9, "SGDP": 7, "AdamW": 7, "SGD": 5}
TARGETS = {"AdamP": 3.0, "SGDP": None}                        # times torch's fused kernel


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write while it is on; views are free."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        schema = func._schema
        written = [a for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        if not written and any(r.alias_info for r in schema.returns):
            return result                                     # a view
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            passes = 2 if argument in written and not argument.is_out else 1
            self.bytes += passes * size(value)
        self.bytes += 0 if written else size(result)
        return result


def size(values):
    return sum(x.numel() * x.element_size() for x in tree_leaves(values)
               if isinstance(x, torch.Tensor))


def optimizers(family):
    """{name: function of the parameters}; public packages only where they are installed."""
    sgd = {"lr": 1e-9, "momentum": 0.9, "weight_decay": 1e-4}
    adam = {"lr": 1e-9, "weight_decay": 1e-2}
    if family == "AdamP":
        made = {"AdamW fused": lambda p: torch.optim.AdamW(p, fused=True, **adam),
                "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True, **adam),
                "AdamP": lambda p: adamp.AdamP(p, **adam),
                "AdamP nesterov": lambda p: adamp.AdamP(p, nesterov=True, **adam),
                "AdamP foreach": lambda p: adamp.AdamP(p, foreach=True, **adam),
                "AdamP readable": lambda p: adamp.AdamP(p, foreach=False, **adam)}
    else:
        made = {"SGD fused": lambda p: torch.optim.SGD(p, fused=True, **sgd),
                "SGDP": lambda p: adamp.SGDP(p, **sgd),
                "SGDP foreach": lambda p: adamp.SGDP(p, foreach=True, **sgd),
                "SGDP readable": lambda p: adamp.SGDP(p, foreach=False, **sgd)}
    arguments = adam if family == "AdamP" else sgd
    try:
        import adamp as official_package
        made[f"{family} official"] = lambda p: getattr(official_package, family)(p, **arguments)
    except ImportError:
        pass
    try:
        import timm.optim
        made[f"{family} timm"] = lambda p: getattr(timm.optim, family)(p, **arguments)
    except ImportError:
        pass
    return made


def parameters(model, device):
    """Copies of the model's parameters; each row of a gradient is orthogonal to its weights."""
    generator = torch.Generator().manual_seed(0)
    copies = []
    for p in model.parameters():
        copy = nn.Parameter(p.detach().clone().to(device))
        g = torch.randn(p.shape, generator=generator).to(device) * 1e-2
        if p.ndim > 1:
            w, rows = copy.detach().flatten(1), g.flatten(1)
            g = (rows - w * ((w * rows).sum(1) / (w * w).sum(1))[:, None]).view_as(g)
        copy.grad = g
        copies.append(copy)
    return copies


def main(argv=None):
    parser = harness.parser(__doc__, data=False, networks=False, figures=False)
    parser.add_argument("--rounds", type=harness.count, default=15)
    run = harness.start(parser, argv)
    tiny = run.args.preset == "tiny"
    model = resnet.resnet18(10, width=8) if tiny else resnet.resnet50()
    count = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters()) * 4 / 2 ** 20
    judged = not tiny and run.device.type == "cpu" and torch.get_num_threads() == 1
    claims, tables = [], {}
    for family in TARGETS:
        made = {name: make(parameters(model, run.device))
                for name, make in optimizers(family).items()}
        floor, official = next(iter(made)), f"{family} official"
        if official not in made:
            run.log(f"the package adamp is not installed: no comparison with {official}")
        traffic, memory = {}, {}
        for name, optimizer in made.items():
            optimizer.step()                                  # makes the state
            memory[name] = timing.peak_bytes(optimizer.step, run.device) / 2 ** 20
            with Traffic() as counted:
                optimizer.step()
            traffic[name] = counted.bytes / 1e9
            if not tiny and isinstance(optimizer, (adamp.AdamP, adamp.SGDP)):
                assert optimizer.stats["projected"] == optimizer.stats["tested"], optimizer.stats
        steps = {name: optimizer.step for name, optimizer in made.items()}
        times = timing.interleaved(run, steps, 1 if tiny else run.args.rounds, family)
        seconds, streams = timing.medians(times), {name: STREAMS[name.split()[0]] for name in made}
        least = {name: streams[name] / streams[floor] * seconds[floor] for name in made}
        tables[family] = [{"optimiser": name, "ms": 1e3 * seconds[name],
                           f"/ {floor}": timing.ratio(times, name, floor),
                           "floor, ms": 1e3 * least[name], "GB in operations": traffic[name],
                           "extra MiB": memory[name]} for name in made]
        rate = 4e-9 * count * streams[floor] / seconds[floor]
        run.log(f"{count:,} parameters; {floor}: {streams[floor]} streams at {rate:.1f} GB/s")

        def claim(text, value, target=None, most=True):
            holds = None
            if judged and target:
                holds = value <= target if most else value >= target
            claims.append({"claim": text, "this run": value, "target": target, "holds": holds})

        claim(f"{family} / {floor}", timing.ratio(times, family, floor), TARGETS[family])
        if family == "AdamP" and run.device.type == "cuda":
            ratio = timing.ratio(times, family, "AdamW foreach")
            claims.append({"claim": "AdamP / AdamW foreach", "this run": ratio, "target": 2.0,
                           "holds": None if tiny else ratio <= 2})
        claim(f"floor of {family} / {floor}", least[family] / seconds[floor])
        if official in made:
            claim(f"{official} / {family}", timing.ratio(times, official, family), 5.0, most=False)
            claim(f"{official} / floor of {family}", seconds[official] / least[family])
        claim(f"extra MiB of {family} (at most the largest tensor)", memory[family], largest)
    run.finish(rows=claims, tables=tables)


if __name__ == "__main__":
    main()
