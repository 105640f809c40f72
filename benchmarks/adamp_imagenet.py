"""SGD, SGDP, AdamW, AdamP with and without weight decay: accuracy, norms, effective steps.

    python benchmarks/adamp_imagenet.py                    # embedded textures, 3 seeds, 5 minutes
    python benchmarks/adamp_imagenet.py --attack linf      # adversarial training, 5 minutes
    python benchmarks/adamp_imagenet.py --data imagenet100_32 --preset small --classes 20 --seeds 2
    torchrun --nproc_per_node=8 benchmarks/adamp_imagenet.py --data /data/imagenet --preset paper \\
        --amp bf16 --workers 16 --arch resnet18            # 8 runs of 100 epochs, or --methods

Embedded: ten orientations of gratings under strong noise, a small residual network with batch norm.
Expected: without weight decay, momentum SGD makes the weights grow several times more than SGDP,
and its effective step is smaller. Paper, ImageNet top-1 (the authors' project page; its Adam rows
stand beside AdamW here): ResNet-18 SGD 70.28, SGDP 70.73, Adam 70.41, AdamP 70.81, and without
decay 67.94, 70.21, 68.52, 70.50; ResNet-50 76.64, 76.71, 76.65, 76.94.
--attack: every training batch is attacked (PGD, 3 steps here, 10 in the paper) and the network is
judged on clean images and under PGD-10. Paper, Wide-ResNet on CIFAR-10: l_inf Adam 80.12 / 56.58,
AdamP 89.85 / 66.28; l_2 84.14 / 70.33 and 93.46 / 83.59.
"""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import harness
import figures
import numpy as np
import torch
from torch.nn import functional as F

from data_tools import imagenet, synthetic
from reference import adamp, resnet

PAPER = {"resnet18": {"sgd": 70.28, "sgdp": 70.73, "adamw": 70.41, "adamp": 70.81,
                      "sgd-nodecay": 67.94, "sgdp-nodecay": 70.21, "adamw-nodecay": 68.52,
                      "adamp-nodecay": 70.50},
         "resnet50": {"sgd": 76.64, "sgdp": 76.71, "adamw": 76.65, "adamp": 76.94},
         "linf": {"adamw": 80.12, "adamp": 89.85}, "l2": {"adamw": 84.14, "adamp": 93.46}}
PAPER_ATTACKED = {"linf": {"adamw": 56.58, "adamp": 66.28}, "l2": {"adamw": 70.33, "adamp": 83.59}}
ATTACKS = {"linf": 4 / 255, "l2": 80 / 255}                   # sizes, of pixel values in [0, 1]
METHODS = tuple(f"{name}{suffix}" for name in ("sgd", "sgdp", "adamw", "adamp")
                for suffix in ("", "-nodecay"))


class Preset(NamedTuple):
    arch: str
    width: int                           # channels of the first stage of the small networks
    side: int
    epochs: int
    batch: int
    sgd: tuple[float, float]             # learning rate and weight decay of SGD and SGDP
    adam: tuple[float, float]            # ... of AdamW and AdamP
    every: int                           # steps from one measurement to the next


PRESETS = {
    "default": Preset("stem3", 16, 16, 6, 64, (0.1, 5e-4), (1e-2, 0.1), 10),
    "tiny": Preset("stem3", 8, 16, 1, 32, (0.1, 5e-4), (1e-2, 0.1), 2),
    "small": Preset("stem7", 32, 32, 8, 128, (0.1, 5e-4), (2e-3, 0.1), 10),
    "paper": Preset("resnet18", 64, 224, 100, 256, (0.1, 1e-4), (1e-3, 0.1), 1000),
}


def textures(count, seed, size=16, classes=10, noise=4.0):
    """Noisy gratings at `classes` orientations: float32 (N, 3, S, S), labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    angle = (labels * (math.pi / classes)).view(-1, 1, 1)
    phase = torch.rand(count, 1, 1, generator=generator) * (2 * math.pi)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    grating = torch.sin(1.1 * (x * angle.cos() + y * angle.sin()) + phase)[:, None]
    return grating + noise * torch.randn(count, 3, size, size, generator=generator), labels


def build_model(name, classes, seed, width):
    """A published ResNet, or one block per stage after a 3x3 ("stem3") or 7x7 stem ("stem7")."""
    options = {"generator": torch.Generator().manual_seed(seed)}
    if not name.startswith("stem"):
        return getattr(resnet, name)(classes, **options)
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), classes, width=width,
                         small_stem=name == "stem3", **options)


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
        train, val = ([t.to(run.device) for t in tensors] for tensors in (train, val))
        return (lambda seed: synthetic.Batches(*train, batch_size=batch, seed=seed, drop_last=True,
                                               **share),
                synthetic.Batches(*val, batch_size=256, shuffle=False), 10)
    train = imagenet.imagenet(run.args.data, "train", classes=run.args.classes)
    val = imagenet.imagenet(run.args.data, "val", classes=run.args.classes)
    classes = len(train.classes)
    options = {"workers": run.args.workers, "device": run.device,
               "normalize": (imagenet.IMAGENET_MEAN, imagenet.IMAGENET_STD)}
    if side == 32:
        train, val = in_memory(train), in_memory(val)
        transform, plain = imagenet.PadCropTransform(), None
    else:
        transform, plain = imagenet.TrainTransform(side), imagenet.EvalTransform(side)
    return (lambda seed: imagenet.Loader(train, batch // run.world_size, transform=transform,
                                         shuffle=True, seed=seed, drop_last=True, rank=run.rank,
                                         world_size=run.world_size, **options),
            imagenet.Loader(val, 256, transform=plain, **options), classes)


class Attacked:
    """A loader whose images are moved by `steps` of PGD against the model as it is by then.

    Steps of 2.5 size / steps along the gradient of the loss (its sign for l_inf, its direction for
    l_2), each followed by the projection on the ball. Sizes are those of ATTACKS, in the units of
    normalised images (1 / std = 4.4).
    """

    def __init__(self, loader, model, kind, steps):
        self.loader, self.model, self.kind, self.steps = loader, model, kind, steps
        self.size = 4.4 * ATTACKS[kind]

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch, start_batch=0):
        self.loader.set_epoch(epoch, start_batch)

    def __iter__(self):
        for images, labels in self.loader:
            yield self.attack(images, labels), labels

    def attack(self, images, labels):
        def length(x):
            return x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)

        self.model.eval()
        move, stride = torch.zeros_like(images), 2.5 * self.size / self.steps
        for _ in range(self.steps):
            with torch.enable_grad():
                move.requires_grad_()
                loss = F.cross_entropy(self.model(images + move), labels)
                gradient, = torch.autograd.grad(loss, move)
            move = move.detach()
            if self.kind == "linf":
                move = (move + stride * gradient.sign()).clamp(-self.size, self.size)
            else:
                move = move + stride * gradient / length(gradient)
                move = move * (self.size / length(move)).clamp(max=1)
        return images + move


@torch.no_grad()
def top1(model, loader):
    hits = count = 0
    for images, labels in loader:
        hits += (model.eval()(images).argmax(1) == labels).sum().item()
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
            self.series.append([values.get(key, 0.0) for key in
                                ("step", "weight_norm", "effective_step", "projected")])
        return values

    def send(self, request):
        return self.steps.send(request) | {"series": self.series}


def main(argv=None):
    parser = harness.parser(__doc__, presets=tuple(PRESETS), seeds=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS,
                        help="default: all; adamw and adamp with --attack")
    parser.real.add_argument("--classes", type=harness.count, help="use the first so many classes")
    parser.add_argument("--arch", choices=("resnet18", "resnet34", "resnet50", "stem3", "stem7"),
                        help="default: the preset's")
    parser.add_argument("--epochs", type=harness.count, help="default: the preset's")
    parser.add_argument("--width", type=harness.count,
                        help="first channels of stem3 and stem7; default: the preset's")
    parser.add_argument("--attack", choices=ATTACKS,
                        help="train on attacked images, judge on clean and attacked ones")
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    if args.amp == "fp16":
        parser.error("--amp fp16 needs loss scaling, which this loop does not do; use bf16")
    if args.data is None and preset.side != 16:
        parser.error(f"--preset {args.preset} needs --data")
    if args.width and not (args.arch or preset.arch).startswith("stem"):
        parser.error("--width: only of stem3 and stem7")
    run = harness.start(parser, argv)
    arch, epochs = args.arch or preset.arch, args.epochs or preset.epochs
    train_loader, val_loader, classes = data(run, preset.side, preset.batch)
    methods = run.args.methods or (("adamw", "adamp") if run.args.attack else METHODS)
    results = {method: [] for method in methods}
    for seed in run.seeds:
        for method in results:
            name = f"{method}-seed{seed}"
            if (row := run.recorded(name)) is None:
                model = run.wrap(build_model(arch, classes, seed, run.args.width or preset.width))
                optimizer = build_optimizer(method, model.parameters(), preset.sgd, preset.adam)
                loader, state = train_loader(seed), run.resumed(name)
                if run.args.attack:
                    loader = Attacked(loader, model, run.args.attack, steps=3)
                steps = adamp.train(model, loader, optimizer, epochs, resume=state,
                                    measure_every=preset.every, autocast=run.amp_dtype)
                watched = Watched(steps, state["series"] if state else [])
                run.drive(name, watched, total=epochs * len(loader))
                series = watched.series
                row = {"top1": top1(model, val_loader), "norm start": series[0][1],
                       "norm end": series[-1][1],
                       "effective step, mid-run": series[len(series) // 2][2],
                       "projected": statistics.mean(s[3] for s in series), "series": series}
                if run.args.attack:
                    attacked = Attacked(val_loader, model, run.args.attack, steps=10)
                    row["attacked"] = top1(model, attacked)
                row = run.record(name, row)
            results[method].append(row)
    finish(run, results, run.args.attack or arch)


def decided(gains):
    """Is the mean of three seeds or more above 0? None within two standard errors of it."""
    if len(gains) < 3:
        return None
    mean, margin = statistics.mean(gains), 2 * statistics.stdev(gains) / math.sqrt(len(gains))
    return None if abs(mean) < margin else mean > 0


def finish(run, results, task):
    """`task`: the attack, or else the architecture: what the paper's figures are listed under."""
    def values(method, key):
        return [row[key] for row in results[method]]

    def spread(x):
        return statistics.stdev(x) if len(x) > 1 else 0.0

    table = []
    for method in results:
        row = {"optimiser": method.removesuffix("-nodecay"),
               "weight decay": "no" if "nodecay" in method else "yes",
               "paper top-1": PAPER.get(task, {}).get(method),
               "top-1": statistics.mean(values(method, "top1")),
               "+-": spread(values(method, "top1"))}
        if run.args.attack:
            row |= {"paper, attacked": PAPER_ATTACKED[task].get(method),
                    "attacked": statistics.mean(values(method, "attacked")),
                    "+- ": spread(values(method, "attacked"))}
        row |= {key: statistics.mean(values(method, key))
                for key in ("norm start", "norm end", "effective step, mid-run")}
        projects = method.startswith(("sgdp", "adamp"))
        row["projected"] = statistics.mean(values(method, "projected")) if projects else None
        table.append(row)

    judged, rows = run.args.preset != "tiny", []
    for plain, ours in (("sgd", "sgdp"), ("adamw", "adamp")):
        a, b = plain + "-nodecay", ours + "-nodecay"
        if {a, b} <= results.keys():
            growth = [[row["norm end"] - row["norm start"] for row in results[method]]
                      for method in (a, b)]
            ratios = [x / max(y, 1e-9) for x, y in zip(*growth)]
            published = {"sgd": (3.8, 3.2)}.get(plain, (None, None))
            steps = [y / x for x, y in zip(*(values(m, "effective step, mid-run") for m in (a, b)))]
            for text, read_off, ratios in (
                    (f"norm growth, {plain} / {ours}", published[0], ratios),
                    (f"effective step mid-run, {ours} / {plain}", published[1], steps)):
                rows.append({"claim": f"{text}, no decay (paper: read off its figure)",
                             "paper": read_off, "this run": statistics.mean(ratios),
                             "holds": decided([r - 1 for r in ratios]) if judged else None})
    accuracies = [("top1", "top-1", PAPER.get(task, PAPER["resnet18"]))]
    if run.args.attack:
        accuracies.append(("attacked", "attacked top-1", PAPER_ATTACKED[task]))
    for key, label, paper in accuracies:
        for plain, ours in (("sgd", "sgdp"), ("adamw", "adamp")):
            for suffix in ("", "-nodecay"):
                a, b = plain + suffix, ours + suffix
                if {a, b} <= results.keys():
                    gains = [y - x for x, y in zip(values(a, key), values(b, key))]
                    decay = ", no decay" if suffix else ""
                    rows.append({"claim": f"{label} gain, {ours} over {plain}{decay}",
                                 "paper": paper[b] - paper[a] if b in paper else None,
                                 "this run": statistics.mean(gains), "+-": spread(gains),
                                 "holds": decided(gains) if judged else None})
    if run.figures is not None and run.is_main:
        draw(Path(run.figures), run.args.preset, results)
    run.finish(rows=rows, tables={"main": table})


def draw(folder, preset, results):
    """Norm and effective step over time, mean and standard deviation over seeds."""
    for index, key in ((1, "norm"), (2, "effective-step")):
        for suffix, words in (("", "with weight decay"), ("-nodecay", "no weight decay")):
            lines = {}
            for name in ("sgd", "sgdp", "adamw", "adamp"):
                if rows := results.get(name + suffix):
                    series = np.array([row["series"] for row in rows])
                    lines[name] = (series[0, :, 0], series[:, :, index].mean(0),
                                   series[:, :, index].std(0))
            if lines:
                label = key.replace("-", " ")
                figures.line_chart(folder / f"adamp-{preset}-{key}{suffix}.png", lines,
                                   title=f"Mean {label} of the convolutions, {words}",
                                   xlabel="step", ylabel=label, logy=index == 2)


if __name__ == "__main__":
    main()
