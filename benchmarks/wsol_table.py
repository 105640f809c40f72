"""The main table of weakly supervised localization: six methods, few-shot and centre baseline,
equal search budget.

    python benchmarks/wsol_table.py                                # procedural scenes, about 3 minutes a seed
    python benchmarks/wsol_table.py --preset tiny                  # seconds: shows that it runs
    python benchmarks/wsol_table.py --data DIR --pretrain 6 --per-class 40 --shots 5      # small network, 32 pixels
    torchrun --nproc_per_node=8 benchmarks/wsol_table.py --data DIR --preset paper --dataset CUB --arch resnet50 \\
        --weights resnet50.pth --workers 8

DIR holds the images and metadata/{train,val,test} (or metadata/DATASET/...) as
data_tools/wsol_data.py describes them. Of "train" only the class labels are used. "val" is the
small full supervision, boxes or masks: every method gets the same number of random trials (the
first with the published defaults but for the learning rate, except with --preset paper), the best
by "val", last checkpoint, is evaluated on "test". Without a "test" folder,
--shots images of a class are the full supervision and the rest of "val" is the test. The few-shot
baseline (FSL) trains on the same fully supervised images, a fifth of them held out to choose its
learning rate.

Expected with --preset paper: PAPER below, for 30 trials of 10 (CUB: 50) epochs for each method,
days on one GPU;
--methods, --trials and --epochs make it less. Expected of the scenes: no later method clearly above
CAM, few-shot above all, CAM falling to nothing as the background tells the class.
"""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import figures
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

# Published means over three backbones, percent (MaxBoxAccV2; OpenImages PxAP; the centre values of
# boxes MaxBoxAcc):
PAPER = {  # cam, has, acol, spg, adl, cutmix, few-shot, centre
    "ILSVRC": (62.4, 62.6, 61.2, 62.2, 61.7, 62.2, 64.0, 52.5),
    "CUB": (61.1, 60.6, 60.0, 57.5, 61.1, 60.8, 80.2, 59.7),
    "OpenImages": (60.0, 57.4, 56.3, 59.1, 56.9, 59.4, 71.5, 45.8),
    "total": (61.2, 60.2, 59.2, 59.6, 59.9, 60.9, 71.9, 52.3)}
EMBEDDED = {"default": dict(size=48, train=1000, test=500, epochs=5, trials=4, width=8, shots=5),
            "tiny": dict(size=32, train=64, test=24, epochs=1, trials=1, width=4, shots=2)}
BASELINES = ("fewshot", "centre")
# the public code's, for the first of few trials: two bad draws in a row say nothing about a method
DEFAULTS = {
    **{key: value for key, value in wsol.CONFIG.items()
       if key.startswith(("has_", "cutmix_", "spg_"))},
    "acol_drop_threshold": 0.7, "adl_drop_rate": 0.75, "adl_drop_threshold": 0.9}
STATISTICS = (IMAGENET_MEAN, IMAGENET_STD)


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

    def target(self, name: str, side: int) -> Tensor:
        """What the few-shot baseline learns, (side, side): 1 on the object, 255 where it is not
        said."""
        if name in self.masks:
            target = torch.from_numpy(self.masks[name])[None, None].float()
            return nn.functional.interpolate(target, size=side)[0, 0]
        size = self.split.sizes[name]
        boxes = [wsol_evaluation.resize_bbox(box, size, (side, side))
                 for box in self.split.boxes[name]]
        return wsol.few_shot_targets(side, boxes=boxes)


class FewShotBatches:
    """(images, targets) for wsol.train, both cropped and flipped together; the few images lie in
    memory."""

    def __init__(self, part: Part, batch_size: int, seed: int):
        self.batch_size, self.seed, self.size, self.epoch, self.start = batch_size, seed, part.size, 0, 0
        side, names = part.size * 8 // 7, part.split.image_ids
        shrink = Resize(side)
        self.stack = torch.stack([
            torch.cat([shrink(part.images[i][0]), part.target(name, side)[None].to(torch.uint8)])
            for i, name in enumerate(names)])

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
    """Training, tuning (`shots` of each class) and test scenes."""
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
        pixels = torch.stack([Resize(size)(images[i][0]) for i in range(len(images))])
        images = ArrayImages(pixels, images.labels)
    return Part(split, images, size, masks)


# ---------------------------------------------------------------- networks

def small_backbone(width: int, strides: tuple[int, ...], generator: torch.Generator,
                   adl=None) -> nn.Sequential:
    """A stem and residual blocks that double the channels; strides: of the stem and of each
    block."""
    layers = [nn.Conv2d(3, width, 3, strides[0], 1, bias=False), nn.BatchNorm2d(width),
              nn.ReLU(inplace=True)]
    for stride in strides[1:]:
        shortcut = nn.Sequential(nn.Conv2d(width, 2 * width, 1, stride, bias=False),
                                 nn.BatchNorm2d(2 * width))
        layers += [BasicBlock(width, 2 * width, stride, shortcut), adl() if adl else nn.Identity()]
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
    val: Part
    test: Part
    classes: int
    arch: str
    width: int
    metric: str
    recipe: dict
    lr_range: tuple[float, float]
    trials: int
    seed: int
    # of torchvision's backbone, or of the pretrained small CAM network
    weights: dict | None = None
    workers: int = 0
    # the first trial draws the learning rate only (paper: all is drawn)
    defaults_first: bool = True

    def network(self, method: str, trial: dict) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        options = {key: value for key, value in trial.items() if key in wsol.NETWORK_KEYS}
        if self.arch != "small":
            network = wsol.build_network(self.arch, "cam" if method == "fewshot" else method,
                                         self.classes,
                                         generator=generator, **options)
            if self.weights:
                wsol.load_torchvision(network, self.weights)
            return wsol.FewShotHead(network, network.channels) if method == "fewshot" else network
        adl = (lambda: wsol.ADL(**options)) if method == "adl" else None
        # maps of a quarter of the side
        strides = (2, 2, 1) if self.train.size > 32 else (1, 2, 2, 1)
        trunk = small_backbone(self.width, strides, generator, adl)
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
        # what fits: the trunk, and CAM's classifier
        if self.weights:
            head.load_state_dict({key: value for key, value in self.weights.items()
                                  if key.startswith("features.") or key in head.state_dict()},
                                 strict=False)
        return head.to(memory_format=torch.channels_last)

    def space(self, method: str) -> dict:
        space = wsol_evaluation.search_space("cam" if method == "fewshot" else method)
        space["lr"] = ("loguniform", *self.lr_range)
        if self.arch == "small":
            # the small network has one resolution
            del space["large_feature_map"]
        # up to the whole image side, as 224 in the paper
        if "has_grid_size" in space:
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
    cfg = {key: recipe[key] for key in ("epochs", "decay_frequency", "weight_decay",
                                        "lr_classifier_ratio")}
    if method == "fewshot":
        loader = FewShotBatches(part, recipe["batch"], task.seed)
        factor = -(-len(task.train) // recipe["batch"]) / len(loader)
        cfg |= {key: max(1, round(cfg[key] * factor)) for key in ("epochs", "decay_frequency")}
    else:
        loader = Loader(part.images, max(1, recipe["batch"] // run.world_size), shuffle=True,
                        seed=task.seed,
                        transform=TrainResizeCrop(crop, crop * 8 // 7), workers=task.workers,
                        rank=run.rank,
                        world_size=run.world_size, device=run.device, normalize=STATISTICS)
    cfg |= trial | {"method": method, "seed": task.seed, "amp": run.amp_dtype is not None}
    network = task.network(method, trial)
    model = run.wrap(network)
    run.drive(name, wsol.train(model, loader, cfg, resume=run.resumed(name)),
              total=cfg["epochs"] * len(loader))
    return network.eval()


def score_maps(predict, part: Part, run: harness.Run, rank: int = 0, world_size: int = 1):
    """Yields (image ids, maps float64 (n, size, size) in [0, 1], number of correct predictions)."""
    loader = Loader(part.images, 100, transform=Resize(part.size), device=run.device,
                    normalize=STATISTICS,
                    rank=rank, world_size=world_size, workers=run.args.workers)
    ids = part.split.image_ids[rank::world_size]
    for images, labels in loader:
        maps, correct = predict(images, labels)
        maps = wsol_evaluation.resize_scoremap(maps.double(), part.size)
        yield ids[:len(maps)], wsol_evaluation.normalize_scoremap(maps), correct
        ids = ids[len(maps):]


def predictor(network: nn.Module):
    def predict(images, labels):
        if isinstance(network, wsol.FewShotHead):
            return network.predict(images), math.nan
        logits, maps = network.predict(images, labels)
        return maps, int((logits.argmax(1) == labels).sum())
    return predict


def centre_map(part: Part):
    scores = torch.from_numpy(wsol.center_gaussian(part.size))
    return lambda images, labels: (scores.to(images.device).expand(len(images), -1, -1), math.nan)


def evaluate(predict, part: Part, run: harness.Run, full: bool = False) -> dict:
    """{"v2", "v1", "accuracy"} and "pxap" where there are masks; `full` adds the interval of the
    metric and the curve.

    The images are shared out over the processes, whose counts are merged.
    """
    truth = part.split.boxes, part.split.sizes
    judges = {}
    if part.split.boxes:
        judges = {"v2": wsol_evaluation.BoxEvaluator(*truth, resize_length=part.size),
                  "v1": wsol_evaluation.BoxEvaluator(*truth, iou_threshold_list=(50,), multi_contour_eval=False,
                                                     resize_length=part.size)}
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
        judges = {key: gathered[0][key] for key in judges}
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


def held_out(part: Part) -> tuple[Part, Part]:
    """(four fifths for training, a fifth of each class, at least one image, to choose the learning
    rate)."""
    groups = {}
    for name in part.split.image_ids:
        groups.setdefault(part.split.labels[name], []).append(name)
    tune = {name for names in groups.values() if len(names) > 1
            for name in names[:max(1, len(names) // 5)]}
    return (part.of([name for name in part.split.image_ids if name not in tune]),
            part.of([name for name in part.split.image_ids if name in tune]))


def search(run: harness.Run, task: Task, method: str) -> dict:
    """Random trials judged on the tuning images; the best one's test figures."""
    best, scores, shots, tune = None, [], None, task.val
    if method == "fewshot":
        shots, tune = held_out(task.val)
    for number in range(task.trials):
        name = f"{method}-seed{task.seed}-trial{number}"
        trial = task.trial(method, number)
        row = run.recorded(name)
        if row is None:
            network = fit(run, task, name, method, trial, shots)
            row = evaluate(predictor(network), tune, run) | {"trial": trial}
            if best is None or row[task.metric] > best[task.metric]:
                run.save(f"best-{method}-seed{task.seed}", network.state_dict())
            row = run.record(name, row)
        scores.append(row[task.metric])
        if best is None or row[task.metric] > best[task.metric]:
            best = row
    final = f"{method}-seed{task.seed}-test"
    if (row := run.recorded(final)) is None:
        # the chosen setting, trained on all tuning images
        if method == "fewshot":
            network = fit(run, task, final, method, best["trial"], task.val)
            run.save(f"best-{method}-seed{task.seed}", network.state_dict())
        row = evaluate(predictor(restored(run, task, method, best["trial"])), task.test, run,
                       full=True)
        row = run.record(final, row | {"trial": best["trial"], "tuning": best[task.metric],
                                       "trials": scores})
    run.log(f"{final}: {task.metric} {row[task.metric]:.1f}")
    return row


def restored(run: harness.Run, task: Task, method: str, trial: dict) -> nn.Module:
    run.barrier()
    network = task.network(method, trial)
    state = torch.load(run.out / f"best-{method}-seed{task.seed}.pt", map_location="cpu",
                       weights_only=True)
    network.load_state_dict(state)
    return network.to(run.device).eval()


# ---------------------------------------------------------------- tasks

def scene_task(args, preset: dict, seed: int) -> Task:
    epochs = args.epochs or preset["epochs"]
    recipe = dict(epochs=epochs, decay_frequency=max(2, round(0.7 * epochs)), weight_decay=5e-4,
                  # nothing is pretrained: one learning rate
                  lr_classifier_ratio=1.0, batch=32)
    return Task(*scene_parts(preset, seed, 0.5, preset["shots"]), len(CLASSES), "small",
                preset["width"], "pxap",
                recipe, (0.003, 0.1), args.trials or preset["trials"], seed)


def real_task(run: harness.Run, args, seed: int) -> Task:
    metadata = args.data / "metadata"
    metadata = metadata / args.dataset if args.dataset else metadata
    if not (metadata / "train").is_dir():
        raise ValueError(
            f"{metadata / 'train'}: no such folder; --data needs metadata/[DATASET/]train and val")
    paper, small = args.preset == "paper", args.arch == "small"
    size = args.size or (32 if small else 224)
    everything = real_part(metadata / "train", args.data, size, None, small)
    top = 1 + max(everything.split.labels.values())
    classes = list(range(0, top, max(1, top // args.classes))) if args.classes else None
    # noqa: E731
    read = lambda name: real_part(metadata / name, args.data, size, classes, small)
    # noqa: E731
    few = lambda part, count: part.of(part.split.per_class(count, seed, "take").image_ids)
    train, val = read("train") if classes else everything, read("val")
    if args.per_class:
        train = few(train, args.per_class)
    if (metadata / "test").is_dir():
        val, test = few(val, args.shots), read("test")
    else:
        tune = few(val, args.shots or 5)
        val, test = tune, val.of([name for name in val.split.image_ids
                                  if name not in tune.split.labels])
    epochs = args.epochs or ((50 if args.dataset == "CUB" else 10) if paper else 3)
    decay = (15 if args.dataset == "CUB" else 3) if paper else max(2, round(0.7 * epochs))
    recipe = dict(epochs=epochs, decay_frequency=decay, lr_classifier_ratio=10.0, batch=32,
                  weight_decay=1e-4 if args.arch in ("resnet50", "small") else 5e-4)
    task = Task(train, val, test, len(classes) if classes else top, args.arch, args.width,
                "pxap" if val.masks else "v2", recipe, (1e-5, 1.0) if paper else (1e-4, 1e-2),
                args.trials or (30 if paper else 3), seed, workers=args.workers,
                defaults_first=not paper)
    if args.weights:
        task.weights = torch.load(args.weights, map_location="cpu", weights_only=True)
    elif small and args.pretrain:
        task.weights = pretrained(run, task, everything, top, args.pretrain, same=not classes)
    return task


def pretrained(run: harness.Run, task: Task, part: Part, classes: int, epochs: int,
               same: bool) -> dict:
    """The small CAM network trained on the labels of all training images, in the place of ImageNet
    weights.

    `same`: the benchmark has these classes too, so the classifier is kept, as published for
    ImageNet.
    """
    name = "pretrained"
    if run.recorded(name) is None:
        other = copy.copy(task)
        other.classes, other.seed, other.train = classes, 0, part
        other.recipe = dict(epochs=epochs, decay_frequency=max(2, round(0.6 * epochs)),
                            weight_decay=5e-4,
                            lr_classifier_ratio=1.0, batch=64)
        network = fit(run, other, name, "cam", {"lr": 0.1})
        run.save("weights", network.state_dict())
        run.record(name, {"classes": classes, "images": len(part)})
    run.barrier()
    weights = torch.load(run.out / "weights.pt", map_location="cpu", weights_only=True)
    return weights if same else {key: value for key, value in weights.items()
                                 if key.startswith("features.")}


# ---------------------------------------------------------------- experiments on scenes

def gradients(run: harness.Run, task: Task, trial: dict) -> list[dict]:
    """Saliency baselines on the CAM network."""
    network, rows = restored(run, task, "cam", trial), []
    test = task.test.of(task.test.split.image_ids[:200])
    for name, saliency in {
            "gradient": wsol.vanilla_gradient,
            "integrated gradients": lambda m, x, y: wsol.integrated_gradients(m, x, y, steps=10),
            "SmoothGrad": lambda m, x, y: wsol.smooth_grad(m, x, y, n=10, generator=torch.Generator().manual_seed(0)),
    }.items():
        row = evaluate(lambda x, y: (saliency(network, x, y), math.nan), test, run)
        rows.append({"map": name, **{key: round(row[key], 1) for key in ("pxap", "v2", "v1")}})
    return rows


def background_sweep(run: harness.Run, task: Task, rows: dict, rhos: tuple, preset: dict) -> dict:
    """PxAP of CAM and few-shot where backgrounds tell the class with probability rho: {method: [per
    rho]}."""
    found = {"cam": [], "fewshot": []}
    for rho in rhos:
        one = copy.copy(task)
        one.train, one.val, one.test = scene_parts(preset, task.seed, rho, preset["shots"])
        for method, values in found.items():
            name = f"{method}-seed{task.seed}-rho{round(100 * rho)}"
            # 0.5 is the main table
            result = rows[method] if rho == 0.5 else run.recorded(name)
            if result is None:
                shots = one.val if method == "fewshot" else None
                network = fit(run, one, name, method, rows[method]["trial"], shots)
                result = run.record(name, evaluate(predictor(network), one.test, run))
            values.append(result["pxap"])
    return found


def supervision_curve(run: harness.Run, task: Task, rows: dict, shots: tuple,
                      preset: dict) -> list[float]:
    """Few-shot PxAP for each number of masks per class."""
    values = []
    for count in shots:
        name = f"fewshot-seed{task.seed}-shots{count}"
        result = rows["fewshot"] if count == preset["shots"] else run.recorded(name)
        if result is None:
            part = scene_parts(preset, task.seed, 0.5, count)[1]
            network = fit(run, task, name, "fewshot", rows["fewshot"]["trial"], part)
            result = run.record(name, evaluate(predictor(network), task.test, run))
        values.append(result["pxap"])
    return values


# ---------------------------------------------------------------- figures and table

def pictures(run: harness.Run, task: Task, rows: dict, count: int = 6) -> None:
    """The images with their true boxes; below, for each method, its map and its box at the best
    threshold (red)."""
    part = task.test.of(task.test.split.image_ids[::max(1, len(task.test) // count)][:count])
    scale = max(1, 128 // part.size)
    pixels = [Resize(part.size)(part.images[i][0]) for i in range(len(part))]
    truth = [[wsol_evaluation.resize_bbox(box, part.split.sizes[name], (part.size,) * 2)
              for box in part.split.boxes[name]] for name in part.split.image_ids]

    def panel(image, i, boxes):
        picture = figures.draw_boxes(image, truth[i], ["#ffffff"] * len(truth[i]), scale)
        return figures.draw_boxes(picture, np.asarray(boxes) * scale, ["#ff3030"])

    panels = [panel(image, i, np.zeros((0, 4))) for i, image in enumerate(pixels)]
    titles = ["image"] + [""] * (len(part) - 1)
    for method, row in rows.items():
        network = None if method == "centre" else restored(run, task, method, row["trial"])
        (_, maps, _), = score_maps(predictor(network) if network else centre_map(part), part, run)
        for i, scores in enumerate(maps.cpu().numpy()):
            boxes, _ = wsol_evaluation.compute_bboxes_from_scoremaps(scores, [row["tau"]])
            panels.append(panel(figures.overlay(pixels[i], scores, 0.45), i, boxes[0]))
            titles.append(f"{method} ({row[task.metric]:.0f})" if i == 0 else "")
    if run.is_main:
        figures.image_grid(run.figures / "wsol_maps.png", panels, titles, columns=len(part), cell=96)
        figures.line_chart(run.figures / "wsol_curves.png",
                           {method: (np.arange(0, 1, 0.01), row["curve"])
                            for method, row in rows.items()},
                           title="BoxAcc at IoU 0.5, largest contour", xlabel="threshold",
                           ylabel="percent of images")


def finish(run: harness.Run, task: Task, results: dict, sweeps: list, curves: list, tables: dict,
           axes: dict) -> None:
    seeds, metric = list(results.values()), task.metric
    key = run.args.dataset or ("ILSVRC" if run.args.data else "total")
    published = dict(zip((*wsol.METHODS, *BASELINES), PAPER[key]))
    # noqa: E731
    of = lambda method, key=metric: np.array([rows[method][key] for rows in seeds], dtype=float)
    later = [method for method in seeds[0] if method not in ("cam", *BASELINES)]
    main_table = []
    for method in seeds[0]:
        trials = [score for rows in seeds for score in rows[method].get("trials", [])]
        others = {key: round(of(method, key).mean(), 1) for key in ("v2", "v1", "accuracy")
                  if key != metric and seeds[0][method].get(key) is not None}
        main_table.append({
            "method": method, metric: round(of(method).mean(), 1),
            "to CAM": round((of(method) - of("cam")).mean(), 1),
            **{key: None for key in ("v2", "v1", "accuracy") if key in seeds[0]["cam"]
               and key != metric}, **others,
            "trials on tuning images": f"{min(trials):.1f} .. {max(trials):.1f}" if trials
            else None,
            "paper": published[method]})
    half_width = (of("cam", "high") - of("cam", "low")).mean() / 2 / math.sqrt(len(seeds))
    claims = []

    def claim(text: str, differences, paper=None, at_most: bool = False) -> None:
        """`text` holds if the mean difference exceeds the margin (at_most: if it does not); one
        seed decides nothing."""
        mean, bound = float(np.mean(differences)), None
        # two standard errors over seeds, at least `half_width`
        if len(differences) > 1:
            bound = max(2 * float(np.std(differences, ddof=1)) / math.sqrt(len(differences)),
                        half_width)
        decided = bound is not None and (at_most or abs(mean) > bound)
        claims.append({"claim": text, "paper": None if paper is None else round(paper, 1),
                       "this run": round(mean, 1),
                       "margin": None if bound is None else round(bound, 1),
                       "holds": bool(mean <= bound if at_most else mean > bound) if decided
                       else None})

    if later:
        best = later[int(np.argmax([of(method).mean() for method in later]))]
        claim(f"best later method ({best}) minus CAM: not clearly above", of(best) - of("cam"),
              max(published[m] for m in later) - published["cam"], at_most=True)
    claim("few-shot minus CAM", of("fewshot") - of("cam"), published["fewshot"] - published["cam"])
    best = max(["cam", *later], key=lambda method: of(method).mean())
    claim(f"few-shot minus the best method ({best})", of("fewshot") - of(best),
          published["fewshot"] - max(published[m] for m in ("cam", *later)))
    claim("CAM minus centre", of("cam") - of("centre"), published["cam"] - published["centre"])
    if sweeps:
        mean = {method: np.mean([sweep[method] for sweep in sweeps], 0) for method in sweeps[0]}
        tables["background tells the class"] = [
            {"rho": rho, **{f"{method} PxAP": round(values[i], 1)
                            for method, values in mean.items()}}
            for i, rho in enumerate(axes["rho"])]
        low, high = axes["rho"][0], axes["rho"][-1]
        claim(f"CAM falls from rho {low:g} to {high:g}", [s["cam"][0] - s["cam"][-1] for s in sweeps])
        claim("few-shot does not fall", [s["fewshot"][0] - s["fewshot"][-1] for s in sweeps],
              at_most=True)
        values = np.array(curves)
        tables["supervision"] = [{"masks per class": count, "few-shot PxAP": round(float(value), 1)}
                                 for count, value in zip(axes["shots"], values.mean(0))]
        claim("few-shot rises from {} to {} masks per class".format(axes["shots"][0], axes["shots"][-1]),
              values[:, -1] - values[:, 0])
        if run.figures and run.is_main:
            x = axes["shots"]
            figures.line_chart(run.figures / "wsol_supervision.png",
                               {"few-shot": (x, values.mean(0)),
                                "CAM": (x, [of("cam").mean()] * len(x))}, markers=True,
                               logx=True, title="PxAP against masks per class",
                               xlabel="masks per class", ylabel="PxAP")
    data = f"{len(task.train)} training, {len(task.val)} tuning, {len(task.test)} test images, {task.classes} classes"
    run.finish(rows=claims, tables={"main": main_table, **tables}, data=data)


def main(argv=None):
    parser = harness.parser(__doc__, presets=("default", "tiny", "paper"))
    add = parser.add_argument
    add("--methods", nargs="+", default=list(wsol.METHODS), choices=wsol.METHODS)
    add("--trials", type=int, help="random settings per method (paper: 30)")
    add("--epochs", type=int)
    add("--arch", default="small", choices=("small", *wsol.ARCHS))
    add("--width", type=int, default=16, help="of the small network")
    add("--weights", type=Path, help="torchvision checkpoint of --arch")
    add("--dataset", default="", choices=("", "CUB", "ILSVRC", "OpenImages"),
        help="folder below metadata/")
    add("--size", type=int, help="image side (default 32 for the small network, else 224)")
    add("--classes", type=int, help="keep this many classes, evenly spaced")
    add("--per-class", type=int, default=0,
        help="keep this many training images of a class (0: all)")
    add("--shots", type=int, default=0,
        help="tuning images per class (paper: ImageNet 10, others 5; 0: all)")
    add("--pretrain", type=int, default=0,
        help="epochs of the small network on all training labels beforehand")
    add("--no-sweeps", action="store_true",
        help="scenes: the main table without the background and supervision sweeps")
    run = harness.start(parser, argv)
    args = run.args
    if args.preset == "paper" and not args.data:
        parser.error("--preset paper needs --data")
    methods = ["cam"] + [method for method in args.methods if method != "cam"]
    tiny = args.preset == "tiny"
    preset = EMBEDDED.get(args.preset, EMBEDDED["default"])
    axes = {"rho": (0.0, 1.0) if tiny else (0.0, 0.5, 0.9, 1.0),
            "shots": (1, 2) if tiny else (1, 2, 5, 10)}
    results, sweeps, curves, tables = {}, [], [], {}
    for seed in run.seeds:
        task = real_task(run, args, seed) if args.data else scene_task(args, preset, seed)
        rows = {method: search(run, task, method) for method in [*methods, "fewshot"]}
        rows["centre"] = run.recorded(f"centre-seed{seed}") or run.record(
            f"centre-seed{seed}", evaluate(centre_map(task.test), task.test, run, full=True))
        results[seed] = rows
        if seed == run.seeds[0] and run.figures and task.test.split.boxes:
            pictures(run, task, rows)
        if seed == run.seeds[0] and not args.data:
            tables["gradient maps of the CAM network, 200 test images"] = gradients(run, task, rows["cam"]["trial"])
        if not args.data and not args.no_sweeps:
            sweeps.append(background_sweep(run, task, rows, axes["rho"], preset))
            curves.append(supervision_curve(run, task, rows, axes["shots"], preset))
    finish(run, task, results, sweeps, curves, tables, axes)


if __name__ == "__main__":
    main()
