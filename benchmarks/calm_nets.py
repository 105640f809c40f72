"""What the CALM scripts share: methods, data sets, networks, and `trained`, which trains a network or loads it.

    run = harness.start(calm_nets.parser(__doc__))
    task = calm_nets.glyphs(run)                              # or birds, scenes; folder(run) with --data
    model = calm_nets.trained(run, task, "calm-em", seed)     # in eval mode; weights are kept in --out

--data DIR is a folder of images with metadata/{train,test or val}/ in the format of data_tools.wsol_data (ImageNet,
CUB, OpenImages30k or your own). --models DIR takes the weights that another run left in its --out.
"""

from __future__ import annotations

import argparse
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

# name: (head, arguments of calm.train). EM and ML have the same gradient as long as the E-step is the network's own.
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
    """Data, network and recipe of one experiment; loaders yield (images, labels) on the run's device."""

    name: str
    classes: int
    backbone: Callable[[torch.Generator], nn.Module]
    train: Callable[[int], Iterable]                          # of the seed
    test: Iterable                                            # in the order of `truth`
    recipe: dict[str, Any]
    size: int
    truth: Tensor | None = None                               # (N, size, size) bool: the object
    labels: Tensor | None = None                              # (N,) of the test images
    boxes: dict = field(default_factory=dict)                 # {image id: boxes} in pixels of `sizes`
    masks: dict = field(default_factory=dict)                 # {image id: mask of get_mask}
    sizes: dict = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    mean: tuple = (0.0, 0.0, 0.0)                             # of the normalisation, for pictures
    std: tuple = (1.0, 1.0, 1.0)

    def picture(self, image: Tensor) -> Tensor:
        """A normalised image (3, H, W) in [0, 1] again."""
        shape = (3, 1, 1)
        return (image.cpu() * torch.tensor(self.std).view(shape) + torch.tensor(self.mean).view(shape)).clamp(0, 1)


def parser(description: str, seeds: int = 1, methods: Iterable[str] = ("cam", "calm-em")) -> argparse.ArgumentParser:
    p = harness.parser(description, seeds=seeds)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(methods))
    p.add_argument("--models", type=harness.Path, help="folder with the weights of an earlier run (its --out)")
    real = p.add_argument_group("with --data")
    real.add_argument("--metadata", type=harness.Path, help="folder of train/ and test/ or val/ (default: DATA/metadata)")
    real.add_argument("--classes", type=int, help="only the first N classes")
    real.add_argument("--arch", default="resnet50", help="resnet50 or small-WIDTH")
    real.add_argument("--weights", type=harness.Path, help="pretrained backbone, torchvision's state dict")
    real.add_argument("--pretrain", type=int, default=0, help="epochs of a pooled classifier all methods start from")
    real.add_argument("--size", type=int, default=224, help="side of the crops")
    real.add_argument("--epochs", type=int, default=40)
    real.add_argument("--batch", type=int, default=64)
    real.add_argument("--lr", type=float, default=0.01)
    real.add_argument("--head-ratio", type=float, default=10.0)
    return p


# ---------------------------------------------------------------- networks

def convolutions(*layers: tuple, generator: torch.Generator) -> nn.Sequential:
    """(channels, dilation) or "pool", one after the other; every 3x3 convolution with batch norm and ReLU."""
    parts, channels = [], 3
    for layer in layers:
        if layer == "pool":
            parts.append(nn.MaxPool2d(2))
            continue
        width, dilation = layer
        parts += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
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


def residual(arch: str, weights, generator: torch.Generator) -> nn.Module:
    """ResNet-50 with a 28 x 28 map at 224 pixels, or a narrow ResNet-18 for small images; forward gives the features."""
    if arch.startswith("small-") and arch[6:].isdigit():
        body = resnet.resnet18(num_classes=0, width=int(arch[6:]), small_stem=True, layer4_stride=1, generator=generator)
    elif arch == "resnet50":
        body = resnet.resnet50(num_classes=0, layer3_stride=1, layer4_stride=1, generator=generator)
    else:
        raise ValueError(f"--arch must be resnet50 or small-WIDTH, not {arch!r}")
    if weights is not None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        body.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    body.forward = body.forward_features
    return body


def build(run: harness.Run, task: Task, method: str, seed: int) -> calm.CALM:
    generator = torch.Generator().manual_seed(seed)
    body = task.backbone(generator)
    head = METHODS[method][0](body.num_features, task.classes)
    initialize(head, generator)
    return calm.CALM(body, head).to(run.device)


def trained(run: harness.Run, task: Task, method: str, seed: int, start: dict | None = None) -> calm.CALM:
    """The network of a method and seed: from --models, from this run's folder, or trained now. `start`: of its backbone."""
    name = f"{task.name}-{method}-seed{seed}"
    model = build(run, task, method, seed)
    if start is None and run.args.pretrain and run.args.models is None and task.name == "folder" and run.recorded(name) is None:
        start = trained(run, pretraining(task, run.args.pretrain), "cam", seed, start={}).backbone.state_dict()
    folder = run.args.models or (run.out if run.recorded(name) is not None else None)
    if folder is not None:
        path = folder / f"{name}.pt"
        if not path.exists():
            raise ValueError(f"{path}: no such file; --models must be the --out of a run with this method and seed")
        model.load_state_dict(torch.load(path, map_location=run.device, weights_only=True))
        return model.eval()
    if start:
        model.backbone.load_state_dict(start)
    loader, recipe = task.train(seed), task.recipe | METHODS[method][1]
    wrapped = run.wrap(model)
    steps = calm.train(wrapped, loader, amp_dtype=run.amp_dtype, resume=run.resumed(name), **recipe)
    last = run.drive(name, steps, recipe["epochs"] * len(loader))
    run.save(name, model.state_dict())
    run.record(name, {key: last.get(key) for key in ("loss", "accuracy", "posterior_entropy", "prior_entropy")})
    return model.eval()


def pretraining(task: Task, epochs: int) -> Task:
    recipe = task.recipe | {"epochs": epochs, "lr_decay_epochs": last_quarter(epochs)}
    return Task("pretrained", task.classes, task.backbone, task.train, task.test, recipe, task.size)


def last_quarter(epochs: int) -> int:
    """The epoch (from 1) before which the rate drops: the last quarter; 30 of 40, as published."""
    return 30 if epochs == 40 else max(2, 3 * epochs // 4 + 1)


# ---------------------------------------------------------------- data

class Fresh:
    """Batches of 32 images drawn anew for every epoch: draw(count, seed) gives images and labels."""

    def __init__(self, run: harness.Run, draw: Callable[[int, int], dict], batches: int, seed: int) -> None:
        self.run, self.draw, self.batches, self.seed = run, draw, batches, seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.draw(32 * self.batches, 1000 * (self.seed + 1) + self.epoch)
        rank, world = self.run.rank, self.run.world_size
        for batch in range(self.start, self.batches):
            rows = torch.arange(32 * batch, 32 * (batch + 1))[rank::world]
            yield data["images"][rows].to(self.run.device), data["labels"][rows].to(self.run.device)


def drawn(run: harness.Run, name: str, draw: Callable[[int, int], dict], test: dict, layers: tuple, classes: int,
          steps: int, **more: Any) -> Task:
    """Four epochs of new images, the rate lowered in the last; the tiny preset takes two steps."""
    tiny = run.args.preset == "tiny"
    recipe = {"epochs": 1 if tiny else 4, "lr": 0.05, "head_ratio": 2.0, "lr_decay_epochs": 4}
    tests = [(images.to(run.device), labels.to(run.device))
             for images, labels in zip(test["images"].split(128), test["labels"].split(128))]
    return Task(name, classes, lambda generator: convolutions(*layers, generator=generator),
                lambda seed: Fresh(run, draw, 2 if tiny else steps // 4, seed), tests, recipe,
                test["images"].shape[-1], test["masks"], test["labels"], **more)


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
    """Objects on backgrounds, 10 classes (five shapes, plain or striped), with masks and boxes; 400 steps."""
    def draw(count: int, seed: int) -> dict:
        data = synthetic.scenes(count, 32, seed, rho=0.0)
        return data | {"images": synthetic.to_float(data["images"])}

    test = draw(24 if run.args.preset == "tiny" else 300, 1)
    ids = [str(row) for row in range(len(test["labels"]))]
    layers = ((24, 1), "pool", (48, 1), "pool", (96, 1), (96, 1))
    return drawn(run, "scenes", draw, test, layers, len(synthetic.CLASSES), 400, ids=ids, boxes=dict(zip(ids, test["boxes"][:, None].numpy())),
                     masks=dict(zip(ids, test["masks"].to(torch.uint8).numpy())), sizes=dict.fromkeys(ids, (32, 32)),
                     class_names=list(synthetic.CLASSES), mean=(0.5,) * 3, std=(0.3,) * 3)


def folder(run: harness.Run) -> Task:
    """The images of --data with their metadata."""
    args = run.args
    metadata = args.metadata or args.data / "metadata"
    names = [name for name in ("test", "val") if (metadata / name).is_dir()]
    if not names:
        raise ValueError(f"{metadata}: neither test/ nor val/; the metadata of data_tools.wsol_data are needed")
    train, test = (wsol_data.read_split(metadata / name) for name in ("train", names[0]))
    if args.classes:
        train, test = (s.subset(i for i in s.image_ids if s.labels[i] < args.classes) for s in (train, test))
    train_images, images = (wsol_data.SplitImages(split, args.data) for split in (train, test))
    class_file = args.data / "classes.txt"
    lines = class_file.read_text(encoding="utf-8").splitlines() if class_file.exists() else []
    truth = filled_boxes(test, args.size) if test.boxes else None
    masks = {name: wsol_evaluation.get_mask(*images.masks(row, args.data), args.size)
             for row, name in enumerate(test.image_ids) if test.masks}
    return image_task(run, train_images, images, int(images.labels.max()) + 1, truth=truth, boxes=test.boxes, masks=masks,
                      sizes=test.sizes, ids=test.image_ids,
                      class_names=[line.split(maxsplit=1)[-1].split(",")[0] for line in lines])


def image_task(run: harness.Run, train: Any, test: Any, classes: int, **more: Any) -> Task:
    """Image files with the paper's augmentation: both sides to 8/7 of the size, random crop, flip; squashed for the test."""
    args = run.args
    common = {"device": run.device, "normalize": (IMAGENET_MEAN, IMAGENET_STD), "workers": args.workers}

    def loader(seed: int) -> Loader:
        return Loader(train, args.batch // run.world_size, shuffle=True, seed=seed, drop_last=True, rank=run.rank,
                      transform=wsol_data.TrainResizeCrop(args.size, args.size * 8 // 7), world_size=run.world_size, **common)

    recipe = {"epochs": args.epochs, "lr": args.lr, "head_ratio": args.head_ratio, "lr_decay_epochs": last_quarter(args.epochs)}
    return Task("folder", classes, partial(residual, args.arch, args.weights), loader,
                Loader(test, 128, transform=wsol_data.Resize(args.size), **common), recipe, args.size,
                labels=torch.from_numpy(test.labels), mean=IMAGENET_MEAN, std=IMAGENET_STD, **more)


def filled_boxes(split: wsol_data.Split, size: int) -> Tensor:
    """(N, size, size) bool: the union of an image's boxes."""
    masks = np.zeros((len(split.image_ids), size, size), dtype=bool)
    for mask, name in zip(masks, split.image_ids):
        scale = size / np.array([*split.sizes[name]] * 2)
        for x0, y0, x1, y1 in (split.boxes[name] * scale).round().astype(int):
            mask[y0:y1, x0:x1] = True
    return torch.from_numpy(masks)


# ---------------------------------------------------------------- maps

def class_maps(method: str) -> dict[str, str]:
    """{name: kind of attribution_map} of a method; the first is the method's own map."""
    return {"CAM": "cam"} if method == "cam" else {"joint": "joint", "posterior": "posterior", "prior": "prior"}


def own_kind(method: str) -> str:
    return next(iter(class_maps(method).values()))


def gradient_maps(samples: int, seed: int) -> dict[str, Callable]:
    """{name: function(model, images, labels) -> (B, H, W)}: the paper's baselines, made on the pooled classifier."""
    noisy = [partial(function, samples=samples, generator=torch.Generator().manual_seed(seed))
             for function in (attribution.smooth_grad, attribution.var_grad)]
    return {"gradient": attribution.input_gradient,
            "integrated": partial(attribution.integrated_gradients, variant="calm", steps=samples),
            "SmoothGrad": noisy[0], "VarGrad": noisy[1]}


def exact_ap(maps: Tensor, masks: Tensor) -> float:
    """Pixel AP in percent of maps (N, h, w) of any range: only the order of the values counts."""
    maps = attribution.resize_map(maps.float(), tuple(masks.shape[-2:]))
    low, high = maps.min(), maps.max()
    metric = attribution.PixelAP(thresholds=None)
    metric.update(((maps - low) / (high - low).clamp(min=1e-30)).clamp(0, 1), masks)
    return metric.compute()["ap"]


@dataclass
class Queries:
    """Low-resolution maps (N, Q, h, w) by kind, p(y | x) (N, Q), and the accuracy in percent, on the CPU."""

    maps: dict[str, Tensor]
    probs: Tensor
    accuracy: float


@torch.no_grad()
def ask(model: calm.CALM, task: Task, method: str, classes: Tensor) -> Queries:
    """The maps of the same `classes` (Q,) on every test image, one forward pass per image."""
    maps, probs, right, total = {kind: [] for kind in class_maps(method).values()}, [], 0, 0
    for images, labels, *_ in task.test:
        output = model(images)
        p = output.probs()
        for kind, parts in maps.items():
            part = calm.attribution_map(output, classes.to(images.device).expand(len(images), -1), kind)
            parts.append((part.unsqueeze(1).expand(-1, len(classes), -1, -1) if kind == "prior" else part).float().cpu())
        probs.append(p[:, classes.to(p.device)].cpu())
        right, total = right + int((p.argmax(1) == labels).sum()), total + len(images)
    return Queries({kind: torch.cat(parts) for kind, parts in maps.items()}, torch.cat(probs), 100 * right / total)


def query_ap(answers: Queries, task: Task, method: str, classes: Tensor) -> dict[str, float]:
    """AP (%) of finding a class's objects among all test images by one threshold on its map; mean over the classes."""
    minmax, top = (partial(attribution.normalize_map, mode=mode) for mode in ("minmax", "max"))
    p = answers.probs[:, :, None, None]
    if method == "cam":
        maps = answers.maps["cam"]
        ways = {"min-max per image": minmax(maps), "max per image": top(maps), "logits as they are": maps,
                "min-max times p(y|x)": minmax(maps) * p}
    else:
        ways = {"joint as it is": answers.maps["joint"], "posterior": answers.maps["posterior"],
                "prior": answers.maps["prior"], "joint, min-max per image": minmax(answers.maps["joint"])}
    wanted = task.labels[:, None] == classes
    present = wanted.any(0).nonzero()[:, 0].tolist()
    return {way: float(np.mean([exact_ap(maps[:, q], task.truth & wanted[:, q, None, None]) for q in present]))
            for way, maps in ways.items()}
