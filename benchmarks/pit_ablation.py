"""What makes PiT work: pooling kind, overlap, class token, spatial dimensions of ViT and ResNet,
and where it looks.

    python benchmarks/pit_ablation.py --figures runs/figures     embedded shapes: about 5 minutes on
                                                                 2 cores per seed
    python benchmarks/pit_ablation.py --seeds 2 --record
    python benchmarks/pit_ablation.py --data /data/imagenet100_32 --classes 20

Three studies, each model trained alike:
  pooling      the depth-wise convolution against pooling without parameters, patches without
               overlap, class tokens repeated instead of passed through a linear layer, and no
               pooling at all (a ViT of equal MACs)
  dimensions   the paper's motivation: ViT and ResNet with a constant grid and width, or with the
               grid reduced and the width raised by stage; training and test accuracy against MACs
  attention    entropy, interaction rate and interaction distance of the trained PiT and ViT, block
               by block
The paper gives curves for the last two, no numbers. Expect differences of a few points, within the
spread of seeds.
"""

import math
import re

import harness
import pit_imagenet as base
import torch
from torch import nn

from reference import pit

PIT, VIT, VIT_LARGE = base.TOY["PiT"], base.TOY["ViT"], base.TOY["ViT-large"]
POOLING = {"convolution (PiT)": PIT, "average": {**PIT, "pool": "avg"},
           "maximum": {**PIT, "pool": "max"},
           "class token repeated": {**PIT, "repeat_tokens": True},
           "patches without overlap": {**PIT, "stride": 8},
           "no pooling (ViT)": VIT}
PIT_LARGE = {**PIT, "base_dims": (28,) * 3}
# ResNets of basic blocks: widths and strides of three stages after a stem of stride 2.
DIMENSIONS = {"ViT, constant": (VIT, VIT_LARGE), "ViT, reduced": (PIT, PIT_LARGE),
              "ResNet, constant": (dict(widths=(11,) * 3, strides=(1,) * 3),
                                   dict(widths=(20,) * 3, strides=(1,) * 3)),
              "ResNet, reduced": (dict(widths=(12, 24, 48), strides=(1, 2, 2)),
                                  dict(widths=(22, 44, 88), strides=(1, 2, 2)))}


class Residual(nn.Module):
    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out))
        same = width == out and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(width, out, 1, stride)

    def forward(self, x):
        return (self.skip(x) + self.body(x)).relu()


def residual_network(widths, strides, num_classes: int) -> nn.Sequential:
    """A ResNet whose grid and width per stage are free, one basic block per stage."""
    stages = [Residual(a, b, s) for a, b, s in zip((widths[0], *widths), widths, strides)]
    return nn.Sequential(
        nn.Conv2d(3, widths[0], 3, 2, 1), nn.BatchNorm2d(widths[0]), nn.ReLU(), *stages,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


class RepeatTokens(nn.Module):
    """In place of the class token's linear layer: each channel several times, as in the map."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def forward(self, tokens):
        return tokens.repeat_interleave(self.times, dim=-1)


def build(config: dict, size: int, num_classes: int, seed: int) -> nn.Module:
    config = dict(config)
    if "widths" in config:
        model = residual_network(config["widths"], config["strides"], num_classes)
    else:
        repeat = config.pop("repeat_tokens", False)
        model = pit.PoolingTransformer(size, num_classes=num_classes, **config)
        if repeat:
            for pool in model.pools:
                pool.fc = RepeatTokens(pool.repeats)
    pit.init_weights(model, generator=torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def macs(model: nn.Module, size: int) -> int:
    if isinstance(model, pit.PoolingTransformer):
        return pit.count_macs(model)["total"]
    total, hooks = [], []
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            hooks.append(layer.register_forward_hook(
                lambda layer, _, out: total.append(out.numel() * layer.weight[0].numel())))
    model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(total)


def attention(model: pit.PoolingTransformer, loader, device) -> list[dict]:
    """The statistics of every block, averaged over heads, on one batch."""
    images = next(iter(loader))[0].to(device)
    grids = [grid for grid, blocks in zip(model.grids, model.depth) for _ in range(blocks)]
    stages = [s for s, blocks in enumerate(model.depth) for _ in range(blocks)]
    with torch.no_grad():
        maps = model.attention_maps(images)
    return [{"block": i + 1, "tokens": a.shape[-1],
             "entropy / log N": (pit.attention_entropy(a).mean() / math.log(a.shape[-1])).item(),
             "rate > 1 %": pit.interaction_rate(a, 0.01).mean().item(),
             "rate > 10 %": pit.interaction_rate(a, 0.1).mean().item(),
             "distance, px": (pit.interaction_distance(a, grid).mean().item()
                              * model.stride * 2**stage)}
            for i, (a, grid, stage) in enumerate(zip(maps, grids, stages))]


def fit(run: harness.Run, settings: dict, key: str, config: dict, seed: int) -> dict:
    if (row := run.recorded(key)) is not None:
        return row
    loader, val = (base.real if run.args.data else base.embedded)(run, settings, seed)
    num_classes = len(val.dataset.classes) if run.args.data else len(base.CLASSES)
    model = build(config, settings["size"], num_classes, seed)
    cost = macs(model, settings["size"])
    steps = pit.train(run.wrap(model), loader, epochs=settings["epochs"], lr=settings["lr"],
                      min_lr=settings["min_lr"], warmup_epochs=settings["warmup"],
                      warmup_lr=settings["lr"] / 10, amp_dtype=run.amp_dtype, device=run.device,
                      resume=run.resumed(key))
    run.drive(key, steps, total=settings["epochs"] * len(loader))
    seen = (batch for _, batch in zip(range(max(1000 // settings["batch"], 1)), loader))
    test = pit.evaluate(model, val, device=run.device)
    row = {"test": run.mean(test, test["count"])["top1"],
           "train": pit.evaluate(model, seen, device=run.device)["top1"],
           "MMACs": cost / 1e6, "parameters": sum(p.numel() for p in model.parameters())}
    if isinstance(model, pit.PoolingTransformer):
        row["attention"] = attention(model, val, run.device)
    run.log(f"{key}: {cost / 1e6:.2f} MMACs, train {row['train']:.1f} %, test {row['test']:.1f} %")
    return run.record(key, row)


def draw(folder, curves: dict, statistics: dict, pooling: list[dict]) -> None:
    import figures
    for part in ("train", "test"):
        figures.line_chart(folder / f"pit_dimensions_{part}.png",
                           {name: ([p["MMACs"] for p in points], [p[part] for p in points])
                            for name, points in curves.items()},
                           markers=True, title=f"Spatial dimensions: {part} accuracy",
                           xlabel="MMACs", ylabel="accuracy, %")
    for key, name in (("distance, px", "distance"), ("rate > 1 %", "rate"),
                      ("entropy / log N", "entropy")):
        figures.line_chart(folder / f"pit_attention_{name}.png",
                           {model: ([r["block"] for r in rows], [r[key] for r in rows])
                            for model, rows in statistics.items()},
                           markers=True, title="Attention by block", xlabel="block", ylabel=key)
    heights = [row["test"] for row in pooling], [row["std. error"] or 0 for row in pooling]
    figures.bar_chart(folder / "pit_pooling.png", [row["pooling"] for row in pooling],
                      {"test": heights}, ylabel="top-1, %", size=(900, 420),
                      title="What stands between the stages")


def main(argv: list[str] | None = None) -> None:
    parser = base.training_arguments(__doc__)
    args = parser.parse_args(argv)
    if args.data and args.preset == "default":
        args.preset = "small32"
    settings = base.settings(args)
    if args.epochs is None and settings["preset"] == "default":
        settings["epochs"] = 8
    run = harness.start(parser, argv)
    tiny = settings["preset"] == "tiny"

    def average(rows: list[dict]) -> dict:
        top1, error = base.mean_and_error([row["test"] for row in rows])
        return {"MMACs": rows[0]["MMACs"], "parameters": int(rows[0]["parameters"]),
                "train": base.mean_and_error([row["train"] for row in rows])[0], "test": top1,
                "std. error": error}

    done: dict[str, list[dict]] = {}

    def rows_of(config: dict, name: str = "") -> list[dict]:
        """One row per seed; what two studies share is trained once, under its first name."""
        key = str(sorted(config.items()))
        if key not in done:
            name = re.sub(r"\W+", "-", name).strip("-")
            done[key] = [fit(run, settings, f"{name}-seed{seed}", config, seed)
                         for seed in run.seeds]
        return done[key]

    pooling = [{"pooling": name, **average(rows_of(config, name))}
               for name, config in POOLING.items()]
    curves = {name: [average(rows_of(config, f"{name}-{i}"))
                     for i, config in enumerate(configs[:1 if tiny else 2])]
              for name, configs in DIMENSIONS.items()}
    dimensions = [{"model": name, **point} for name, points in curves.items() for point in points]
    statistics = {name: rows_of(config)[0]["attention"]
                  for name, config in (("PiT", PIT), ("ViT", VIT))}
    if run.figures and run.is_main:
        draw(run.figures, curves, statistics, pooling)

    claims = []
    for claim, a, b in (("reduced above constant dimensions, ViT", PIT, VIT),
                        ("reduced above constant dimensions, ResNet",
                         *(DIMENSIONS[f"ResNet, {k}"][0] for k in ("reduced", "constant"))),
                        ("convolution above average pooling", PIT, POOLING["average"]),
                        ("overlap above none", PIT, POOLING["patches without overlap"])):
        gap, holds = base.difference(*([row["test"] for row in rows_of(c)] for c in (a, b)))
        claims.append({"claim": claim, "paper": "above" if "dimensions" in claim else None,
                       "this run": gap, "holds": holds})
    run.finish(claims, {"pooling": pooling, "dimensions": dimensions,
                        "attention": [{"model": name, **row} for name, rows in statistics.items()
                                      for row in rows]})


if __name__ == "__main__":
    main()
