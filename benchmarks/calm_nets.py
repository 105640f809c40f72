"""What the CALM scripts share: methods, data, networks, and `trained`, which trains or loads one.

    run = harness.start(calm_nets.parser(__doc__))
    task = calm_nets.glyphs(run)                              # or birds, scenes; folder with --data
    model = calm_nets.trained(run, task, "calm-em", seed)     # in eval mode

--data DIR is a folder of images with metadata/{train, test or val}/ in the format of
data_tools.wsol_data (ImageNet, CUB, OpenImages30k or your own). --models DIR takes the weights that
another run left in its --out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor, nn

from data_tools import glyphs as glyph_data
from data_tools import synthetic, wsol_data
from data_tools.loader import IMAGENET_MEAN, IMAGENET_STD, Loader
from reference import attribution, calm, resnet, wsol_evaluation

# name: (head, arguments of calm.train). With an online E-step, EM and ML have the same gradient.
METHODS: dict[str, tuple[Callable, dict]] = {
    "cam": (calm.CAMHead, {"method": "cam"}),
    "calm-em": (calm.CALMHead, {"method": "em"}),
    "calm-ml": (calm.CALMHead, {"method": "ml"}),
    "calm-official": (calm.CALMHead.official, {"method": "em"}),
    "calm-ema": (calm.CALMHead, {"method": "em", "ema": 0.95}),
    "calm-hard": (calm.CALMHead, {"method": "em", "hard": True}),
}


@dataclass
class Task:
    """Data, network and recipe of one experiment; loaders yield (images, labels) on the device."""

    name: str
    classes: int
    backbone: Callable[..., nn.Module]                        # of generator=
    train: Callable[[int], Iterable]                          # of the seed
    test: Iterable                                            # in the order of truth, labels, ids
    recipe: dict[str, Any]                                    # arguments of calm.train
    size: int
    labels: Tensor                                            # (N,) of the test images
    truth: Tensor | None = None                               # (N, size, size) bool: the object
    boxes: dict = field(default_factory=dict)                 # {image id: boxes}, pixels of `sizes`
    masks: dict = field(default_factory=dict)                 # {image id: mask of get_mask}
    sizes: dict = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    mean: tuple = (0.0, 0.0, 0.0)                             # of the normalisation, for pictures
    std: tuple = (1.0, 1.0, 1.0)

    def picture(self, image: Tensor) -> Tensor:
        """A normalised image (3, H, W) in [0, 1] again."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (image.cpu() * std + mean).clamp(0, 1)


def parser(description: str, methods: Iterable[str]) -> argparse.ArgumentParser:
    p = harness.parser(description)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(methods))
    p.add_argument("--models", type=harness.Path, help="weights of an earlier run: its --out")
    add = p.real.add_argument
    add("--metadata", type=harness.Path, help="train/ and test/ or val/ (default: DATA/metadata)")
    add("--classes", type=harness.count, help="only the first N classes")
    add("--arch", default="resnet50", help="resnet50 or small-WIDTH")
    add("--weights", type=harness.Path, help="pretrained backbone, torchvision's state dict")
    add("--pretrain", type=int, default=0, help="epochs of a classifier all start from")
    add("--size", type=harness.count, default=224, help="side of the crops")
    add("--epochs", type=harness.count, default=40)
    add("--batch", type=harness.count, default=64)
    add("--lr", type=float, default=0.01)
    add("--head-ratio", type=float, default=10.0)
    return p


# ---------------------------------------------------------------- networks

def convolutions(*layers: tuple | str, generator: torch.Generator) -> nn.Sequential:
    """(width, dilation) or "pool", in turn; 3x3 convolutions with batch norm and ReLU."""
    parts, channels = [], 3
    for layer in layers:
        if layer == "pool":
            parts.append(nn.MaxPool2d(2))
            continue
        width, dilation = layer
        convolution = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=False)
        parts += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    body = nn.Sequential(*parts)
    initialize(body, generator)
    body.num_features = channels
    return body


def initialize(module: nn.Module, generator: torch.Generator) -> None:
    """torch's default for convolutions, from the generator."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_uniform_(part.weight, a=5**0.5, generator=generator)


def residual(arch: str, weights: harness.Path | None, generator: torch.Generator) -> nn.Module:
    """ResNet-50 with a 28 x 28 map at 224 pixels, or a narrow ResNet-18 for small images.

    Called, it gives its last feature map.
    """
    if re.fullmatch(r"small-[1-9]\d*", arch):
        body = resnet.resnet18(num_classes=0, width=int(arch[6:]), small_stem=True, layer4_stride=1,
                               generator=generator)
    elif arch == "resnet50":
        body = resnet.resnet50(num_classes=0, layer3_stride=1, layer4_stride=1, generator=generator)
    else:
        raise ValueError(f"--arch must be resnet50 or small-WIDTH, not {arch!r}")
    if weights is not None:
        harness.load_weights(body, weights, head=False)
    body.forward = body.forward_features
    return body


def trained(run: harness.Run, task: Task, method: str, seed: int,
            start: dict | None = None) -> calm.CALM:
    """The network of a method and seed: from --models, from this run's folder, or trained now.

    start: weights of its backbone (default: those of --pretrain, if any).
    """
    name = f"{task.name}-{method}-seed{seed}"
    generator = torch.Generator().manual_seed(seed)
    body = task.backbone(generator=generator)
    head, options = METHODS[method]
    head = head(body.num_features, task.classes)
    initialize(head, generator)
    model = calm.CALM(body, head).to(run.device)
    folder = run.args.models or (run.out if run.recorded(name) is not None else None)
    if folder is not None:
        path = folder / f"{name}.pt"
        if not path.exists():
            raise ValueError(f"{path}: no such file; --models must be the --out of a run with this "
                             "method and seed")
        return harness.load_weights(model, path).eval()
    if start is None and run.args.data and run.args.pretrain:
        start = trained(run, pretraining(task, run.args.pretrain), "cam", seed, start={})
        start = start.backbone.state_dict()
    if start:
        model.backbone.load_state_dict(start)
    loader, recipe = task.train(seed), task.recipe | options
    steps = calm.train(run.wrap(model), loader, amp_dtype=run.amp_dtype, resume=run.resumed(name),
                       **recipe)
    last = run.drive(name, steps, recipe["epochs"] * len(loader))
    run.save(name, model.state_dict())
    figures = ("loss", "accuracy", "posterior_entropy", "prior_entropy")
    run.record(name, {figure: last.get(figure) for figure in figures})
    return model.eval()


def pretraining(task: Task, epochs: int) -> Task:
    recipe = task.recipe | {"epochs": epochs, "lr_decay_epochs": last_quarter(epochs)}
    return Task("pretrained", task.classes, task.backbone, task.train, task.test, recipe, task.size,
                task.labels)


def last_quarter(epochs: int) -> int:
    """The epoch (from 1) before which the rate drops: the last quarter; 30 of 40, as published."""
    return 30 if epochs == 40 else max(2, 3 * epochs // 4 + 1)


# ---------------------------------------------------------------- embedded data

class Fresh:
    """Batches of 32 images, new ones in every epoch: draw(count, seed) gives images and labels."""

    def __init__(self, run: harness.Run, draw: Callable[[int, int], dict], batches: int,
                 seed: int) -> None:
        self.run, self.draw, self.batches, self.seed = run, draw, batches, seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.draw(32 * self.batches, 1000 * (self.seed + 1) + self.epoch)
        for batch in range(self.start, self.batches):
            rows = torch.arange(32 * batch, 32 * (batch + 1))[self.run.rank::self.run.world_size]
            yield data["images"][rows].to(self.run.device), data["labels"][rows].to(self.run.device)


def drawn(run: harness.Run, name: str, draw: Callable[[int, int], dict], test: dict, layers: tuple,
          classes: int, steps: int, **more: Any) -> Task:
    """Four epochs of new images, the rate lowered in the last; the tiny preset takes two steps."""
    tiny = run.args.preset == "tiny"
    tests = [(images.to(run.device), labels.to(run.device))
             for images, labels in zip(test["images"].split(128), test["labels"].split(128))]
    return Task(name, classes, partial(convolutions, *layers),
                lambda seed: Fresh(run, draw, 2 if tiny else steps // 4, seed), tests,
                {"epochs": 1 if tiny else 4, "lr": 0.05, "head_ratio": 2.0, "lr_decay_epochs": 4},
                test["images"].shape[-1], test["labels"], test["masks"], **more)


def glyphs(run: harness.Run) -> Task:
    """One glyph of eight tells the class; 152 steps, 256 test images."""
    test = glyph_data.glyph_scenes(24 if run.args.preset == "tiny" else 256, 1)
    layers = ((24, 1), "pool", (48, 1), (48, 1))
    return drawn(run, "glyphs", glyph_data.glyph_scenes, test, layers, glyph_data.CLASSES, 152)


def birds(run: harness.Run) -> Task:
    """Twelve classes of three parts; 160 steps, ten test images per class."""
    labels = torch.arange(12).repeat_interleave(2 if run.args.preset == "tiny" else 10)
    test = glyph_data.mini_birds(len(labels), 1, labels=labels)
    layers = ((24, 1), "pool", (48, 1), (48, 2), (48, 3))
    return drawn(run, "birds", glyph_data.mini_birds, test, layers, 12, 160)


def scenes(run: harness.Run) -> Task:
    """Objects of 10 classes on backgrounds that say nothing, with masks and boxes; 400 steps."""
    def draw(count: int, seed: int) -> dict:
        data = synthetic.scenes(count, 32, seed, rho=0.0)
        return data | {"images": synthetic.to_float(data["images"])}

    test = draw(24 if run.args.preset == "tiny" else 300, 1)
    ids = [str(row) for row in range(len(test["labels"]))]
    return drawn(run, "scenes", draw, test, ((24, 1), "pool", (48, 1), "pool", (96, 1), (96, 1)),
                 len(synthetic.CLASSES), 400, ids=ids, sizes=dict.fromkeys(ids, (32, 32)),
                 boxes=dict(zip(ids, test["boxes"][:, None].numpy())),
                 masks=dict(zip(ids, test["masks"].to(torch.uint8).numpy())),
                 class_names=list(synthetic.CLASSES), mean=(0.5,) * 3, std=(0.3,) * 3)


# ---------------------------------------------------------------- image files

def folder(run: harness.Run) -> Task:
    """The images of --data with their metadata."""
    args = run.args
    metadata = args.metadata or args.data / "metadata"
    names = [name for name in ("test", "val") if (metadata / name).is_dir()]
    if not names:
        raise ValueError(f"{metadata}: neither test/ nor val/; data_tools.wsol_data makes them")
    splits = [wsol_data.read_split(metadata / name) for name in ("train", names[0])]
    if args.classes:
        splits = [split.subset(i for i in split.image_ids if split.labels[i] < args.classes)
                  for split in splits]
    train, test = (wsol_data.SplitImages(split, args.data) for split in splits)
    split = test.split
    masks = {name: wsol_evaluation.get_mask(*test.masks(row, args.data), args.size)
             for row, name in enumerate(split.image_ids) if split.masks}
    lines = []
    if (args.data / "classes.txt").exists():
        lines = (args.data / "classes.txt").read_text(encoding="utf-8").splitlines()
    return image_task(run, train, test, int(test.labels.max()) + 1, boxes=split.boxes, masks=masks,
                      truth=filled_boxes(split, args.size) if split.boxes else None,
                      sizes=split.sizes, ids=split.image_ids,
                      class_names=[line.split(maxsplit=1)[-1].split(",")[0] for line in lines])


def image_task(run: harness.Run, train: Any, test: Any, classes: int, **more: Any) -> Task:
    """The paper's augmentation: squash to 8/7 of the size, crop, flip; only squash for the test."""
    args = run.args
    common = {"device": run.device, "normalize": (IMAGENET_MEAN, IMAGENET_STD),
              "workers": args.workers}

    def loader(seed: int) -> Loader:
        return Loader(train, args.batch // run.world_size, shuffle=True, seed=seed, drop_last=True,
                      transform=wsol_data.TrainResizeCrop(args.size, args.size * 8 // 7),
                      rank=run.rank, world_size=run.world_size, **common)

    return Task("folder", classes, partial(residual, args.arch, args.weights), loader,
                Loader(test, 128, transform=wsol_data.Resize(args.size), **common),
                {"epochs": args.epochs, "lr": args.lr, "head_ratio": args.head_ratio,
                 "lr_decay_epochs": last_quarter(args.epochs)},
                args.size, torch.from_numpy(test.labels), mean=IMAGENET_MEAN, std=IMAGENET_STD,
                **more)


def filled_boxes(split: wsol_data.Split, size: int) -> Tensor:
    """(N, size, size) bool: the union of an image's boxes."""
    masks = np.zeros((len(split.image_ids), size, size), dtype=bool)
    for mask, name in zip(masks, split.image_ids):
        scale = size / np.array([*split.sizes[name]] * 2)
        for x0, y0, x1, y1 in (split.boxes[name] * scale).round().astype(int):
            mask[y0:y1, x0:x1] = True
    return torch.from_numpy(masks)


# ---------------------------------------------------------------- maps

def class_maps(method: str) -> list[str]:
    """Kinds of `attribution_map` of a method; the first is the method's own map."""
    return ["cam"] if method == "cam" else ["joint", "posterior", "prior"]


def gradient_maps(samples: int, seed: int) -> dict[str, Callable]:
    """{name: function(model, images, labels) -> (B, H, W)}: the paper's baselines."""
    smooth, var = (partial(function, samples=samples, generator=torch.Generator().manual_seed(seed))
                   for function in (attribution.smooth_grad, attribution.var_grad))
    integrated = partial(attribution.integrated_gradients, variant="calm", steps=samples)
    return {"gradient": attribution.input_gradient, "integrated": integrated, "SmoothGrad": smooth,
            "VarGrad": var}


def exact_ap(maps: Tensor, masks: Tensor) -> float:
    """Pixel AP in percent of maps (N, h, w) of any range: only the order of the values counts."""
    maps = attribution.resize_map(maps.float(), tuple(masks.shape[-2:]))
    low, high = maps.min(), maps.max()
    metric = attribution.PixelAP(thresholds=None)
    metric.update(((maps - low) / (high - low).clamp(min=1e-30)).clamp(0, 1), masks)
    return metric.compute()["ap"]


@dataclass
class Answers:
    """Small maps (N, Q, h, w) by kind, p(y | x) (N, Q), and the accuracy in percent, on the CPU."""

    maps: dict[str, Tensor]
    probs: Tensor
    accuracy: float


@torch.no_grad()
def ask(model: calm.CALM, task: Task, method: str, classes: Tensor) -> Answers:
    """The maps of the same `classes` (Q,) on every test image, one forward pass per image."""
    maps, probs, right = {kind: [] for kind in class_maps(method)}, [], 0
    for images, labels, *_ in task.test:
        output = model(images)
        wanted = classes.to(images.device).expand(len(images), -1)
        for kind, parts in maps.items():
            part = calm.attribution_map(output, wanted, kind)
            part = part.unsqueeze(1).expand(-1, len(classes), -1, -1) if kind == "prior" else part
            parts.append(part.float().cpu())
        p = output.probs()
        probs.append(p.gather(1, wanted).cpu())
        right += int((p.argmax(1) == labels).sum())
    return Answers({kind: torch.cat(parts) for kind, parts in maps.items()}, torch.cat(probs),
                   100 * right / len(task.labels))


def query_ap(answers: Answers, task: Task, method: str, classes: Tensor) -> dict[str, float]:
    """AP (%) of finding a class's objects among ALL test images by one threshold on its map.

    The mean over the classes that occur.
    """
    minmax = partial(attribution.normalize_map, mode="minmax")
    if method == "cam":
        maps = answers.maps["cam"]
        ways = {"min-max per image": minmax(maps),
                "max per image": attribution.normalize_map(maps, "max"), "logits as they are": maps,
                "min-max times p(y)": minmax(maps) * answers.probs[:, :, None, None]}
    else:
        joint = answers.maps["joint"]
        ways = {"joint as it is": joint, "posterior": answers.maps["posterior"],
                "prior": answers.maps["prior"], "joint, min-max per image": minmax(joint)}
    wanted = task.labels[:, None] == classes
    present = wanted.any(0).nonzero()[:, 0].tolist()
    truth = [task.truth & wanted[:, q, None, None] for q in present]
    return {way: float(np.mean([exact_ap(maps[:, q], t) for q, t in zip(present, truth)]))
            for way, maps in ways.items()}


def spread(values: list[float | None], digits: int = 1) -> str:
    """Mean and, of several seeds, standard error."""
    values = [v for v in values if v is not None]
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"
