"""What the localization table trains and scores: data, networks, `fit` and `evaluate`.

    train, val, test = wsol_nets.scene_parts(preset, seed, rho=0.5, shots=5)
    task = wsol_nets.Task(train, val, test, ...)              # of one seed: data, network, recipe
    network = wsol_nets.fit(run, task, "has-seed0", "has", task.trial("has", 0))
    row = wsol_nets.evaluate(wsol_nets.predictor(network), task.test, run)
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator

import harness
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_tools.loader import IMAGENET_MEAN, IMAGENET_STD, ArrayImages, Loader, normalize
from data_tools.synthetic import CLASSES, scenes
from data_tools.wsol_data import Resize, Split, SplitImages, TrainResizeCrop, read_split
from reference import wsol, wsol_evaluation
from reference.resnet import BasicBlock

STATISTICS = (IMAGENET_MEAN, IMAGENET_STD)
# the public code's, for the first of few trials: two bad draws in a row say nothing about a method
DEFAULTS = {"acol_drop_threshold": 0.7, "adl_drop_rate": 0.75, "adl_drop_threshold": 0.9,
            **{key: value for key, value in wsol.CONFIG.items()
               if key.startswith(("has_", "cutmix_", "spg_"))}}


# ---------------------------------------------------------------- data

@dataclass
class Part:
    """A split and its pixels (a data set for Loader); `masks` {id: uint8 (size, size)}: the truth
    where it is masks."""

    split: Split
    images: Any
    size: int
    masks: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.split.image_ids)

    def of(self, ids: list[str]) -> "Part":
        """The part with these images."""
        split = self.split.subset(ids)
        if isinstance(self.images, SplitImages):
            return Part(split, SplitImages(split, self.images.root), self.size, self.masks)
        row = {name: i for i, name in enumerate(self.split.image_ids)}
        rows = np.array([row[name] for name in ids], dtype=np.int64)
        return Part(split, ArrayImages(self.images.images[rows], self.images.labels[rows]),
                    self.size, self.masks)

    def boxes(self, name: str, side: int) -> list[tuple[int, int, int, int]]:
        """The true boxes of an image, in pixels of a square of this side."""
        return [wsol_evaluation.resize_bbox(box, self.split.sizes[name], (side, side))
                for box in self.split.boxes[name]]

    def target(self, name: str, side: int) -> Tensor:
        """What the few-shot baseline learns, (side, side): 1 on the object, 255 where not said."""
        if name not in self.masks:
            return wsol.few_shot_targets(side, boxes=self.boxes(name, side))
        target = torch.from_numpy(self.masks[name])[None, None].float()
        return nn.functional.interpolate(target, size=side)[0, 0]


class FewShotBatches:
    """(images, targets) for wsol.train, cropped and flipped together; the few images stay in
    memory."""

    def __init__(self, part: Part, batch_size: int, seed: int):
        self.batch_size, self.seed, self.size = batch_size, seed, part.size
        self.epoch = self.start = 0
        side = part.size * 8 // 7
        shrink = Resize(side)
        self.stack = torch.stack([
            torch.cat([shrink(part.images[i][0]), part.target(name, side)[None].to(torch.uint8)])
            for i, name in enumerate(part.split.image_ids)])

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def __len__(self) -> int:
        return -(-len(self.stack) // self.batch_size)

    def __iter__(self):
        seed = self.seed * 1_000_003 + self.epoch
        order = torch.randperm(len(self.stack), generator=torch.Generator().manual_seed(seed))
        for batch, rows in list(enumerate(order.split(self.batch_size)))[self.start:]:
            draws = torch.rand(3, len(rows),
                               generator=torch.Generator().manual_seed(seed * 10_007 + batch))
            left, top = (draws[:2] * (self.stack.shape[2] - self.size + 1)).long()
            crops = torch.stack([image[:, y:y + self.size, x:x + self.size]
                                 for image, x, y in zip(self.stack[rows], left, top)])
            crops = torch.where((draws[2] < 0.5).view(-1, 1, 1, 1), crops.flip(3), crops)
            yield normalize(crops[:, :3], *STATISTICS), crops[:, 3].float()


def scene_part(count: int, size: int, seed: int, rho: float, labels: Tensor | None = None) -> Part:
    data = scenes(count, size, seed, rho=rho, labels=labels)
    ids = [f"{seed}/{i}" for i in range(count)]
    split = Split(ids, dict(zip(ids, data["labels"].tolist())), dict.fromkeys(ids, (size, size)),
                  dict(zip(ids, data["boxes"][:, None].numpy())))
    return Part(split, ArrayImages(data["images"], data["labels"]), size,
                dict(zip(ids, data["masks"].to(torch.uint8).numpy())))


def scene_parts(preset: dict, seed: int, rho: float, shots: int) -> tuple[Part, Part, Part]:
    """Training, tuning (`shots` of each class) and test scenes; rho: how often the background tells
    the class."""
    labels = torch.arange(len(CLASSES)).repeat(shots)
    return (scene_part(preset["train"], preset["size"], 3 * seed, rho),
            scene_part(len(labels), preset["size"], 3 * seed + 1, rho, labels),
            scene_part(preset["test"], preset["size"], 3 * seed + 2, rho))


def real_part(folder: Path, root: Path, size: int, classes: list[int] | None, memory: bool) -> Part:
    """A split of the metadata; `classes` keeps and renumbers these, `memory` decodes all images at
    once."""
    split = read_split(folder, outside="clip")
    if classes is not None:
        split = split.subset(name for name in split.image_ids if split.labels[name] in classes)
        split.labels = {name: classes.index(label) for name, label in split.labels.items()}
    images = SplitImages(split, root)
    masks = {name: wsol_evaluation.get_mask(*images.masks(i, root), size)
             for i, name in enumerate(split.image_ids) if name in split.masks}
    if memory:
        shrink = Resize(size)
        pixels = torch.stack([shrink(images[i][0]) for i in range(len(images))])
        images = ArrayImages(pixels, images.labels)
    return Part(split, images, size, masks)


# ---------------------------------------------------------------- networks

def small_backbone(width: int, strides: tuple[int, ...], generator: torch.Generator,
                   adl: Callable[[], nn.Module] = nn.Identity) -> nn.Sequential:
    """A stem and residual blocks that double the channels; strides: of the stem and of each
    block."""
    layers = [nn.Conv2d(3, width, 3, strides[0], 1, bias=False), nn.BatchNorm2d(width),
              nn.ReLU(inplace=True)]
    for stride in strides[1:]:
        shortcut = nn.Sequential(nn.Conv2d(width, 2 * width, 1, stride, bias=False),
                                 nn.BatchNorm2d(2 * width))
        layers += [BasicBlock(width, 2 * width, stride, shortcut), adl()]
        width *= 2
    network = nn.Sequential(*layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu",
                                    generator=generator)
    return network


def initialize_head(head: nn.Module, generator: torch.Generator) -> None:
    """Xavier, as most published heads: without normalisation, He's fan-out rule starts their logits
    at tens."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01, generator=generator)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(module.bias)


@dataclass
class Task:
    """The data of one seed, how to build a network on it, and the recipe all methods share."""

    train: Part
    val: Part                                  # the small full supervision
    test: Part
    classes: int
    arch: str                                  # "small" or one of wsol.ARCHS
    width: int                                 # of the small network
    metric: str                                # "pxap" or "v2"
    recipe: dict                               # epochs, decay_frequency, weight_decay, batch, ...
    lr_range: tuple[float, float]
    trials: int
    seed: int
    weights: dict | None = None                # torchvision's, or of the pretrained small network
    workers: int = 0
    defaults_first: bool = True                # the first trial draws the learning rate only

    def network(self, method: str, trial: dict) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        options = {key: value for key, value in trial.items() if key in wsol.NETWORK_KEYS}
        if self.arch != "small":
            network = wsol.build_network(self.arch, "cam" if method == "fewshot" else method,
                                         self.classes, generator=generator, **options)
            if self.weights:
                wsol.load_torchvision(network, self.weights)
            return wsol.FewShotHead(network, network.channels) if method == "fewshot" else network
        strides = (2, 2, 1) if self.train.size > 32 else (1, 2, 2, 1)     # to a quarter of the side
        trunk = small_backbone(self.width, strides, generator,
                               (lambda: wsol.ADL(**options)) if method == "adl" else nn.Identity)
        channels = self.width * 2 ** (len(strides) - 1)
        if method == "acol":
            head = wsol.ACoLHead(None, channels, self.classes, trial["acol_drop_threshold"],
                                 width=2 * self.width)
        elif method == "spg":
            head = wsol.SPGHead(None, channels, self.classes, width=2 * self.width)
        elif method == "fewshot":
            head = wsol.FewShotHead(None, channels)
        else:
            head = wsol.CAMHead(None, channels, self.classes)
        initialize_head(head, generator)
        head.features = trunk
        if self.weights:                       # what fits: the trunk, and CAM's classifier
            head.load_state_dict({key: value for key, value in self.weights.items()
                                  if key.startswith("features.") or key in head.state_dict()},
                                 strict=False)
        return head.to(memory_format=torch.channels_last)

    def space(self, method: str) -> dict:
        space = wsol_evaluation.search_space("cam" if method == "fewshot" else method)
        space["lr"] = ("loguniform", *self.lr_range)
        if self.arch == "small":               # it has one resolution
            del space["large_feature_map"]
        if "has_grid_size" in space:           # up to the whole image side, as 224 in the paper
            space["has_grid_size"] = ("integer", 1, self.train.size)
        return space

    def trial(self, method: str, number: int) -> dict:
        """Trial `number` of the search, which depends on the seed and the number alone."""
        trial = wsol_evaluation.sample_trial(self.space(method),
                                             np.random.default_rng([self.seed, number]))
        if number == 0 and self.defaults_first:
            trial |= {key: DEFAULTS[key] for key in trial if key in DEFAULTS}
        return trial


# ---------------------------------------------------------------- training and evaluation

def fit(run: harness.Run, task: Task, name: str, method: str, trial: dict,
        part: Part | None = None) -> nn.Module:
    """Train one network; the few-shot baseline, on `part`, takes as many steps as the others."""
    part, recipe, crop = part or task.train, task.recipe, task.train.size
    cfg = {key: value for key, value in recipe.items() if key != "batch"}
    if method == "fewshot":
        loader = FewShotBatches(part, recipe["batch"], task.seed)
        factor = -(-len(task.train) // recipe["batch"]) / len(loader)
        cfg |= {key: max(1, round(cfg[key] * factor)) for key in ("epochs", "decay_frequency")}
    else:
        loader = Loader(part.images, max(1, recipe["batch"] // run.world_size), shuffle=True,
                        seed=task.seed, transform=TrainResizeCrop(crop, crop * 8 // 7),
                        workers=task.workers, rank=run.rank, world_size=run.world_size,
                        device=run.device, normalize=STATISTICS)
    cfg |= trial | {"method": method, "seed": task.seed, "amp": run.amp_dtype is not None}
    network = task.network(method, trial)
    model = run.wrap(network)
    run.drive(name, wsol.train(model, loader, cfg, resume=run.resumed(name)),
              total=cfg["epochs"] * len(loader))
    return network.eval()


def restored(run: harness.Run, task: Task, method: str, trial: dict) -> nn.Module:
    """The network of the best trial, from its file."""
    run.barrier()
    network = task.network(method, trial)
    network.load_state_dict(run.saved(f"best-{method}-seed{task.seed}"))
    return network.to(run.device).eval()


def predictor(network: nn.Module) -> Callable:
    """(images, labels) -> (maps of the labels, number of correct predictions), for `evaluate`."""
    def predict(images, labels):
        if isinstance(network, wsol.FewShotHead):
            return network.predict(images), math.nan
        logits, maps = network.predict(images, labels)
        return maps, int((logits.argmax(1) == labels).sum())
    return predict


def centre_map(part: Part) -> Callable:
    scores = torch.from_numpy(wsol.center_gaussian(part.size))
    return lambda images, labels: (scores.to(images.device).expand(len(images), -1, -1), math.nan)


def score_maps(predict: Callable, part: Part, run: harness.Run, rank: int = 0,
               world_size: int = 1) -> Iterator[tuple]:
    """Yields (image ids, maps float64 (n, size, size) in [0, 1], number of correct predictions)."""
    loader = Loader(part.images, 100, transform=Resize(part.size), device=run.device, rank=rank,
                    normalize=STATISTICS, world_size=world_size, workers=run.args.workers)
    ids = part.split.image_ids[rank::world_size]
    for images, labels in loader:
        maps, correct = predict(images, labels)
        maps = wsol_evaluation.resize_scoremap(maps.double(), part.size)
        yield ids[:len(maps)], wsol_evaluation.normalize_scoremap(maps), correct
        ids = ids[len(maps):]


def evaluate(predict: Callable, part: Part, run: harness.Run, full: bool = False) -> dict:
    """{"v2", "v1", "accuracy"} and "pxap" where there are masks; `full` adds the interval of the
    metric and the curve.

    The images are shared out over the processes, whose counts are merged.
    """
    judges = {}
    if part.split.boxes:
        for name, options in (("v2", {}), ("v1", {"iou_threshold_list": (50,),
                                                  "multi_contour_eval": False})):
            judges[name] = wsol_evaluation.BoxEvaluator(part.split.boxes, part.split.sizes,
                                                        resize_length=part.size, **options)
    if part.masks:
        masks = {name: part.masks[name] for name in part.split.image_ids}
        judges["pxap"] = wsol_evaluation.MaskEvaluator(masks, resize_length=part.size)
    right = torch.zeros(1, dtype=torch.float64, device=run.device)
    for ids, maps, correct in score_maps(predict, part, run, run.rank, run.world_size):
        right += correct
        for judge in judges.values():
            judge.accumulate_batch(maps, ids)
    if run.world_size > 1:
        gathered = [None] * run.world_size
        dist.all_gather_object(gathered, judges)
        judges = gathered[0]
        for other in gathered[1:]:
            for key, judge in judges.items():
                judge.merge(other[key])
    row = {name: float(np.mean(judge.compute(strict=True))) for name, judge in judges.items()}
    row["accuracy"] = 100 * float(run.sum(right)) / len(part)
    if full and "v1" in judges:
        result = judges["v1"].result()
        row |= {"curve": result.curve[0, ::10], "tau": float(result.best_threshold[0])}
    if full:
        interval = judges["pxap" if part.masks else "v2"].confidence_interval(resamples=200)
        row["low"], row["high"] = map(float, interval if part.masks else interval["v2"])
    return row
