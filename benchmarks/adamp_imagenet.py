"""SGD, SGDP, AdamW and AdamP with and without weight decay: accuracy, weight norms, effective steps.

    python benchmarks/adamp_imagenet.py                        # embedded textures, 3 seeds, about 6 minutes
    python benchmarks/adamp_imagenet.py --data imagenet100_32 --preset small --classes 20 --seeds 2
    torchrun --nproc_per_node=8 benchmarks/adamp_imagenet.py --data /data/imagenet --preset paper --amp bf16 \\
        --workers 16 --arch resnet18                           # 8 runs of 100 epochs; --methods to choose

Embedded: ten orientations of gratings under strong noise, a small residual network with batch norm. Expected: without
weight decay, momentum SGD makes the weights grow several times more than SGDP, and its effective step is smaller.
Paper, ImageNet top-1 (the authors' project page; its Adam rows stand beside AdamW here): ResNet-18 SGD 70.28,
SGDP 70.73, Adam 70.41, AdamP 70.81, and without decay 67.94, 70.21, 68.52, 70.50; ResNet-50 76.64, 76.71, 76.65, 76.94.
"""

import math
import statistics
from pathlib import Path

import harness
import figures
import numpy as np
import torch
from torch import nn

from data_tools import imagenet, synthetic
from reference import adamp, resnet

PAPER = {"resnet18": {"sgd": 70.28, "sgdp": 70.73, "adamw": 70.41, "adamp": 70.81,
                      "sgd-nodecay": 67.94, "sgdp-nodecay": 70.21, "adamw-nodecay": 68.52, "adamp-nodecay": 70.50},
         "resnet50": {"sgd": 76.64, "sgdp": 76.71, "adamw": 76.65, "adamp": 76.94}}
METHODS = tuple(f"{name}{suffix}" for name in ("sgd", "sgdp", "adamw", "adamp") for suffix in ("", "-nodecay"))
# network, side, epochs, batch, lr and decay of SGD and SGDP, lr and decay of AdamW and AdamP, steps per measurement
PRESETS = {
    "default": ("small", 16, 4, 64, (0.1, 5e-4), (2e-3, 0.1), 10),
    "tiny": ("small", 16, 1, 32, (0.1, 5e-4), (2e-3, 0.1), 2),
    "small": ("small", 32, 5, 128, (0.1, 5e-4), (2e-3, 0.1), 10),
    "paper": ("resnet18", 224, 100, 256, (0.1, 1e-4), (1e-3, 0.1), 1000),
}


def textures(count, seed, size=16, classes=10, noise=2.5):
    """Gratings of random phase at `classes` orientations, with noise: float32 (N, 3, S, S), labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    angle = (labels * (math.pi / classes)).view(-1, 1, 1)
    phase = torch.rand(count, 1, 1, generator=generator) * (2 * math.pi)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    grating = torch.sin(1.1 * (x * angle.cos() + y * angle.sin()) + phase)[:, None]
    return grating + noise * torch.randn(count, 3, size, size, generator=generator), labels


def build_model(name, classes, seed, width):
    options = {"generator": torch.Generator().manual_seed(seed)}
    if name != "small":
        return getattr(resnet, name)(classes, **options)
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), classes, width=width, small_stem=True, **options)


def build_optimizer(method, params, sgd, adam):
    (lr, decay), kind = (sgd if "sgd" in method else adam), method.removesuffix("-nodecay")
    decay = 0.0 if method.endswith("-nodecay") else decay
    if kind == "sgd":
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=decay)
    if kind == "sgdp":
        return adamp.SGDP(params, lr, momentum=0.9, weight_decay=decay)
    return (torch.optim.AdamW if kind == "adamw" else adamp.AdamP)(params, lr, weight_decay=decay)


def in_memory(dataset):
    """Small images decoded once; they must have one size."""
    images = np.stack([np.asarray(dataset[i][0]) for i in range(len(dataset))])
    return imagenet.ArrayImages(images.transpose(0, 3, 1, 2), dataset.labels)


def data(run, side, batch):
    """(function of a seed that gives the training loader, validation loader, number of classes)."""
    if run.args.data is None:
        tiny = run.args.preset == "tiny"
        train, val = textures(256 if tiny else 3000, 100), textures(200 if tiny else 2000, 101)
        share = {"rank": run.rank, "world_size": run.world_size}
        return (lambda seed: synthetic.Batches(*(t.to(run.device) for t in train), batch_size=batch, seed=seed,
                                               drop_last=True, **share),
                synthetic.Batches(*(t.to(run.device) for t in val), batch_size=256, shuffle=False), 10)
    train = imagenet.imagenet(run.args.data, "train", classes=run.args.classes)
    val = imagenet.imagenet(run.args.data, "val", classes=run.args.classes)
    classes = len(train.classes)
    options = {"workers": run.args.workers, "device": run.device,
               "normalize": (imagenet.IMAGENET_MEAN, imagenet.IMAGENET_STD)}
    if side == 32:
        train, val, transform, plain = in_memory(train), in_memory(val), imagenet.PadCropTransform(), None
    else:
        transform, plain = imagenet.TrainTransform(side), imagenet.EvalTransform(side)
    return (lambda seed: imagenet.Loader(train, batch // run.world_size, transform=transform, shuffle=True, seed=seed,
                                         drop_last=True, rank=run.rank, world_size=run.world_size, **options),
            imagenet.Loader(val, 256, transform=plain, **options), classes)


@torch.no_grad()
def top1(model, loader):
    model.eval()
    hits = count = 0
    for images, labels in loader:
        hits += (model(images).argmax(1) == labels).sum().item()
        count += len(labels)
    return 100 * hits / count


class Watched:
    """Passes a training generator on and keeps the measured norms, also over an interruption."""

    def __init__(self, steps, before):
        self.steps, self.series = steps, before

    def __iter__(self):
        return self

    def __next__(self):
        values = next(self.steps)
        if "weight_norm" in values:
            row = [values[k] for k in ("step", "weight_norm", "effective_step")] + [values.get("projected", 0.0)]
            self.series.append(row)
        return values

    def send(self, request):
        return self.steps.send(request) | {"series": self.series}


def main(argv=None):
    parser = harness.parser(__doc__, presets=tuple(PRESETS), seeds=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--classes", type=int, help="use the first so many classes of --data")
    parser.add_argument("--arch", choices=("resnet18", "resnet34", "resnet50", "small"), help="default: the preset's")
    parser.add_argument("--epochs", type=int, help="default: the preset's")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage of --arch small")
    run = harness.start(parser, argv)
    arch, side, epochs, batch, sgd, adam, every = PRESETS[run.args.preset]
    arch, epochs = run.args.arch or arch, run.args.epochs or epochs
    if run.args.amp == "fp16":
        parser.error("--amp fp16 needs loss scaling, which this loop does not do; use bf16")
    if run.args.data is None and side != 16:
        parser.error(f"--preset {run.args.preset} needs --data")
    train_loader, val_loader, classes = data(run, side, batch)
    results = {method: [] for method in run.args.methods}
    for seed in run.seeds:
        for method in results:
            name = f"{method}-seed{seed}"
            if (row := run.recorded(name)) is None:
                model = run.wrap(build_model(arch, classes, seed, run.args.width))
                optimizer = build_optimizer(method, model.parameters(), sgd, adam)
                loader, state = train_loader(seed), run.resumed(name)
                steps = adamp.train(model, loader, optimizer, epochs, measure_every=every, autocast=run.amp_dtype,
                                    resume=state)
                watched = Watched(steps, state["series"] if state else [])
                run.drive(name, watched, total=epochs * len(loader))
                series = watched.series
                row = run.record(name, {
                    "top1": top1(model, val_loader), "norm start": series[0][1], "norm end": series[-1][1],
                    "effective step, mid-run": series[len(series) // 2][2],
                    "projected": statistics.mean(s[3] for s in series), "series": series})
            results[method].append(row)
    finish(run, results, arch)


def finish(run, results, arch):
    def values(method, key):
        return [row[key] for row in results[method]]

    def growth(method):
        return [row["norm end"] - row["norm start"] for row in results[method]]

    spread = (lambda x: statistics.stdev(x)) if len(run.seeds) > 1 else (lambda x: 0.0)
    table = [{"optimiser": method.removesuffix("-nodecay"), "weight decay": "no" if "nodecay" in method else "yes",
              "paper top-1": PAPER.get(arch, {}).get(method), "top-1": statistics.mean(values(method, "top1")),
              "+-": spread(values(method, "top1")), "norm, start": statistics.mean(values(method, "norm start")),
              "norm, end": statistics.mean(values(method, "norm end")),
              "effective step, mid-run": statistics.mean(values(method, "effective step, mid-run")),
              "projected": statistics.mean(values(method, "projected")) if method.startswith(("sgdp", "adamp")) else None}
             for method in results]
    judged, rows = run.args.preset in ("default", "small") and len(run.seeds) > 1, []
    if {"sgd-nodecay", "sgdp-nodecay"} <= results.keys():
        ratios = [a / max(b, 1e-9) for a, b in zip(growth("sgd-nodecay"), growth("sgdp-nodecay"))]
        rows.append({"claim": "norm growth, SGD / SGDP, no decay (paper: read off its figure)", "paper": 3.8,
                     "this run": statistics.mean(ratios), "holds": min(ratios) > 2 if judged else None})
        key = "effective step, mid-run"
        ratios = [b / a for a, b in zip(values("sgd-nodecay", key), values("sgdp-nodecay", key))]
        rows.append({"claim": "effective step, SGDP / SGD, no decay (paper: read off its figure)", "paper": 3.2,
                     "this run": statistics.mean(ratios), "holds": min(ratios) > 1 if judged else None})
    for plain, ours in (("sgd", "sgdp"), ("adamw", "adamp")):
        for suffix in ("", "-nodecay"):
            if {plain + suffix, ours + suffix} <= results.keys():
                paper = PAPER.get(arch, PAPER["resnet18"])
                known = ours + suffix in paper
                gains = [b - a for a, b in zip(values(plain + suffix, "top1"), values(ours + suffix, "top1"))]
                rows.append({"claim": f"top-1 gain, {ours} over {plain}{', no decay' if suffix else ''}",
                             "paper": paper[ours + suffix] - paper[plain + suffix] if known else None,
                             "this run": statistics.mean(gains), "holds": None})
    if run.figures is not None and run.is_main:
        draw(Path(run.figures), run.args.preset, results)
    run.finish(rows=rows, tables={"main": table})


def draw(folder, preset, results):
    for index, key in ((1, "norm"), (2, "effective-step")):
        for suffix, words in (("", "with weight decay"), ("-nodecay", "no weight decay")):
            lines = {}
            for name in ("sgd", "sgdp", "adamw", "adamp"):
                if rows := results.get(name + suffix):
                    series = np.array([row["series"] for row in rows])
                    lines[name] = (series[0, :, 0], series[:, :, index].mean(0), series[:, :, index].std(0))
            if lines:
                figures.line_chart(folder / f"adamp-{preset}-{key}{suffix}.png", lines, xlabel="step",
                                   title=f"Mean {key.replace('-', ' ')} of the convolutions, {words}",
                                   ylabel=key.replace("-", " "), logy=index == 2)


if __name__ == "__main__":
    main()
