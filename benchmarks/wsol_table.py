"""The main table of weakly supervised localization: six methods, few-shot and centre baseline, equal search budget.

    python benchmarks/wsol_table.py                                   # procedural scenes, ~10 minutes on one CPU core
    python benchmarks/wsol_table.py --preset tiny                     # seconds, shows that it runs
    python benchmarks/wsol_table.py --data DIR --arch small           # 32-pixel images with metadata folders, ~15 minutes
    python benchmarks/wsol_table.py --data DIR --preset paper --dataset CUB --arch resnet50 --weights resnet50.pth

DIR holds the images and metadata/{train,val,test}/*.txt (or metadata/DATASET/{train,val,test}): image_ids.txt,
class_labels.txt, image_sizes.txt, localization.txt. "val" is the tuning split with boxes or masks; without "test", a
part of it (--shots per class) serves for tuning and the rest is the test. "train" is read for its class labels only.

Every method gets the same number of random trials; the best by the tuning split, last checkpoint, is evaluated on test.
The few-shot baseline (FSL) trains on the same tuning images and labels, a fifth held out to choose its learning rate.

Expected with --preset paper (published means over backbones, in percent: MaxBoxAccV2, for OpenImages PxAP):
              CAM   HaS   ACoL  SPG   ADL   CutMix  FSL   centre
    ImageNet  62.4  62.6  61.2  62.2  61.7  62.2    64.0  52.5 (MaxBoxAcc)
    CUB       61.1  60.6  60.0  57.5  61.1  60.8    80.2  59.7 (MaxBoxAcc)
    OpenImages 60.0 57.4  56.3  59.1  56.9  59.4    71.5  45.8
That is 30 trials of 10 (CUB: 50) epochs for each method, days on one GPU; --methods, --trials and --epochs make it less.
"""

import concurrent.futures
import copy
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import figures
from data_tools.synthetic import CLASSES, scenes
from reference import wsol, wsol_evaluation
from reference.resnet import BasicBlock

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
PAPER = {  # published means over three backbones: cam, has, acol, spg, adl, cutmix, few-shot, centre
    "ILSVRC": (62.4, 62.6, 61.2, 62.2, 61.7, 62.2, 64.0, 52.5), "CUB": (61.1, 60.6, 60.0, 57.5, 61.1, 60.8, 80.2, 59.7),
    "OpenImages": (60.0, 57.4, 56.3, 59.1, 56.9, 59.4, 71.5, 45.8), "total": (61.2, 60.2, 59.2, 59.6, 59.9, 60.9, 71.9, 52.3)}
EMBEDDED = {"default": dict(size=64, train=1000, test=500, epochs=5, trials=3, width=16, shots=5),
            "tiny": dict(size=32, train=64, test=24, epochs=1, trials=1, width=4, shots=2)}


# ---------------------------------------------------------------- data

@dataclass
class Split:
    """Images with labels and, where the split has them, boxes or masks; `pixels` in memory or read from `root`."""

    ids: list[str]
    labels: Tensor
    size: int
    pixels: Tensor | None = None
    root: Path | None = None
    boxes: dict = field(default_factory=dict)
    masks: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows) -> "Split":
        rows = torch.as_tensor(rows)
        return Split([self.ids[i] for i in rows], self.labels[rows], self.size,
                     None if self.pixels is None else self.pixels[rows], self.root, self.boxes, self.masks, self.sizes)

    def images(self, rows: Tensor, side: int, pool: concurrent.futures.Executor | None = None) -> Tensor:
        """uint8 (n, 3, side, side); the aspect ratio of files is not kept, as in the paper."""
        if self.pixels is None:
            def read(row):
                with Image.open(self.root / self.ids[row]) as image:
                    return np.asarray(image.convert("RGB").resize((side, side), Image.BILINEAR))
            mapped = pool.map(read, rows.tolist()) if pool else map(read, rows.tolist())
            return torch.from_numpy(np.stack(list(mapped))).permute(0, 3, 1, 2)
        border = (side - self.size) // 2
        return nn.functional.pad(self.pixels[rows], [border] * 4) if border else self.pixels[rows]

    def target(self, row: int, side: int) -> Tensor:
        """What the few-shot baseline learns: the mask or the filled boxes, (side, side)."""
        name = self.ids[row]
        border = 0 if self.pixels is None else (side - self.size) // 2
        if name in self.masks:
            target = torch.from_numpy(np.asarray(self.masks[name], dtype=np.float32))
            if self.pixels is None and side != self.size:
                target = nn.functional.interpolate(target[None, None], size=side)[0, 0]
        else:
            inner = side - 2 * border
            boxes = [wsol_evaluation.resize_bbox(box, self.sizes[name], (inner, inner)) for box in self.boxes[name]]
            target = wsol.few_shot_targets(inner, boxes=boxes)
        return nn.functional.pad(target, [border] * 4)


def normalized(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN) / STD


class Loader:
    """Shuffled batches (images, labels), or (images, targets): random crops and flips drawn from (seed, epoch, batch)."""

    def __init__(self, split: Split, batch_size: int, seed: int, targets: bool = False, workers: int = 0):
        self.split, self.batch_size, self.seed, self.targets = split, batch_size, seed, targets
        self.pool = concurrent.futures.ThreadPoolExecutor(workers) if workers else None
        self.epoch = self.start = 0
        self.side = split.size * 8 // 7 if split.pixels is None else split.size + 2 * (split.size // 16)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch, self.start = epoch, start_batch

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self):
        seed = self.seed * 1_000_003 + self.epoch
        order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(seed))
        for batch in range(self.start, len(self)):
            rows = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            stack = self.split.images(rows, self.side, self.pool)
            if self.targets:
                target = torch.stack([self.split.target(int(row), self.side) for row in rows]).to(torch.uint8)
                stack = torch.cat([stack, target[:, None]], 1)
            draws = torch.rand(3, len(rows), generator=torch.Generator().manual_seed(seed * 10_007 + batch))
            size, span = self.split.size, self.side - self.split.size + 1
            left, top = (draws[:2] * span).long()
            stack = torch.stack([image[:, y:y + size, x:x + size] for image, x, y in zip(stack, left, top)])
            stack = torch.where((draws[2] < 0.5).view(-1, 1, 1, 1), stack.flip(3), stack)
            yield normalized(stack[:, :3]), stack[:, 3].float() if self.targets else self.split.labels[rows]


def scene_split(count: int, size: int, seed: int, rho: float, labels: Tensor | None = None) -> Split:
    data = scenes(count, size, seed, rho=rho, labels=labels)
    ids = [f"{seed}/{i}" for i in range(count)]
    return Split(ids, data["labels"], size, data["images"], boxes=dict(zip(ids, data["boxes"][:, None].numpy())),
                 masks=dict(zip(ids, data["masks"].to(torch.uint8).numpy())), sizes=dict.fromkeys(ids, (size, size)))


def read_split(folder: Path, root: Path, size: int, classes: list[int] | None = None, memory: bool = False) -> Split:
    """A split of the released metadata; `classes` keeps and renumbers these."""
    fields = lambda name: [line.split(",") for line in (folder / name).read_text().splitlines() if line]   # noqa: E731
    renumber = None if classes is None else {c: i for i, c in enumerate(classes)}
    labels = {name: int(label) for name, label in fields("class_labels.txt")}
    ids = [line for line in (folder / "image_ids.txt").read_text().splitlines() if line]
    ids = [name for name in ids if renumber is None or labels[name] in renumber]
    wanted, boxes, masks = set(ids), defaultdict(list), defaultdict(list)
    for name, *rest in fields("localization.txt"):
        if name in wanted and len(rest) == 4:
            boxes[name].append([int(v) for v in rest])
        elif name in wanted:
            masks[name].append(rest)
    sizes = {name: (int(w), int(h)) for name, w, h in fields("image_sizes.txt")}
    truth = {}
    for name, files in masks.items():
        read = lambda file: np.asarray(Image.open(root / file).convert("L")) / 255.0          # noqa: E731
        ignore = read(files[0][1]) if files[0][1:] and files[0][1] else None
        truth[name] = wsol_evaluation.get_mask([read(file) for file, *_ in files], ignore, size)
    split = Split(ids, torch.tensor([labels[n] if renumber is None else renumber[labels[n]] for n in ids]), size,
                  None, root, dict(boxes), truth, sizes)
    if memory:
        split.pixels = split.images(torch.arange(len(ids)), size)
    return split


# ---------------------------------------------------------------- networks

def small_backbone(width: int, large: bool, stem_stride: int, generator: torch.Generator, adl=None) -> nn.Sequential:
    """A stem and two residual blocks of `width`, 2 and 4 times `width`; `large`: the last block keeps the resolution."""
    def block(inputs, outputs, stride):
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return BasicBlock(inputs, outputs, stride, shortcut)

    layers = [nn.Conv2d(3, width, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
              block(width, 2 * width, 2), adl() if adl else nn.Identity(),
              block(2 * width, 4 * width, 1 if large else 2), adl() if adl else nn.Identity()]
    network = nn.Sequential(*layers)
    initialize(network, generator)
    return network


def initialize(network: nn.Module, generator: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01, generator=generator)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


@dataclass
class Task:
    """The data of one seed, how to build a network on it, and the recipe all methods share."""

    train: Split
    val: Split
    test: Split
    classes: int
    arch: str
    width: int
    metric: str
    recipe: dict
    lr_range: tuple[float, float]
    trials: int
    seed: int
    weights: dict | None = None              # of the backbone, torchvision's or the pretrained small one
    workers: int = 0

    def network(self, method: str, trial: dict) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        options = {key: value for key, value in trial.items() if key in wsol.NETWORK_KEYS}
        if self.arch != "small":
            network = wsol.build_network(self.arch, "cam" if method == "fewshot" else method, self.classes,
                                         generator=generator, **options)
            if self.weights:
                wsol.load_torchvision(network, self.weights)
            return wsol.FewShotHead(network, network.channels) if method == "fewshot" else network
        adl = (lambda: wsol.ADL(trial["adl_drop_rate"], trial["adl_drop_threshold"])) if method == "adl" else None
        trunk = small_backbone(self.width, trial["large_feature_map"], 2 if self.train.size > 32 else 1, generator, adl)
        if self.weights:
            trunk.load_state_dict(self.weights)
        channels = 4 * self.width
        if method == "acol":
            head = wsol.ACoLHead(None, channels, self.classes, trial["acol_drop_threshold"], width=2 * self.width)
        elif method == "spg":
            head = wsol.SPGHead(None, channels, self.classes, width=2 * self.width)
        elif method == "fewshot":
            head = wsol.FewShotHead(None, channels)
        else:
            head = wsol.CAMHead(None, channels, self.classes)
        initialize(head, generator)
        head.features = trunk
        return head

    def space(self, method: str) -> dict:
        space = wsol_evaluation.search_space("cam" if method == "fewshot" else method)
        space["lr"] = ("loguniform", *self.lr_range)
        if "has_grid_size" in space:                          # the whole image side, as 224 in the paper
            space["has_grid_size"] = ("integer", 1, self.train.size)
        return space


# ---------------------------------------------------------------- training and evaluation

def fit(run: harness.Run, task: Task, name: str, method: str, trial: dict, shots: Split | None = None) -> nn.Module:
    """Train one network; the few-shot baseline takes as many steps as the others."""
    loader = Loader(shots or task.train, task.recipe["batch"], task.seed, shots is not None, task.workers)
    cfg = {key: task.recipe[key] for key in ("epochs", "decay_frequency", "weight_decay", "lr_classifier_ratio")}
    if shots is not None:
        factor = -(-len(task.train) // task.recipe["batch"]) / len(loader)
        cfg["epochs"] = max(1, round(cfg["epochs"] * factor))
        cfg["decay_frequency"] = max(1, round(cfg["decay_frequency"] * factor))
    cfg |= trial | {"method": method, "seed": task.seed, "amp": run.amp_dtype is not None}
    network = task.network(method, trial).to(run.device)
    run.drive(name, wsol.train(network, loader, cfg, resume=run.resumed(name)), total=cfg["epochs"] * len(loader))
    return network.eval()


def score_maps(predict, split: Split, device: torch.device, batch: int = 100):
    """Yields (rows, maps float64 (n, size, size) in [0, 1], correct predictions)."""
    for rows in torch.arange(len(split)).split(batch):
        images = normalized(split.images(rows, split.size)).to(device)
        maps, correct = predict(images, split.labels[rows].to(device))
        maps = wsol_evaluation.resize_scoremap(maps.double(), split.size)
        yield rows, wsol_evaluation.normalize_scoremap(maps), correct


def predictor(network: nn.Module):
    def predict(images, labels):
        if isinstance(network, wsol.FewShotHead):
            return network.predict(images), math.nan
        logits, maps = network.predict(images, labels)
        return maps, int((logits.argmax(1) == labels).sum())
    return predict


def evaluate(predict, split: Split, device: torch.device, full: bool = False) -> dict:
    """{"v2", "v1", "accuracy"} and "pxap" where there are masks; `full` adds confidence half-widths and the curve."""
    common = dict(resize_length=split.size)
    boxes = {name: split.boxes[name] for name in split.ids if name in split.boxes}
    judges = {}
    if boxes:
        judges = {"v2": wsol_evaluation.BoxEvaluator(boxes, split.sizes, **common),
                  "v1": wsol_evaluation.BoxEvaluator(boxes, split.sizes, iou_threshold_list=(50,), multi_contour_eval=False, **common)}
    if split.masks:
        judges["pxap"] = wsol_evaluation.MaskEvaluator({name: split.masks[name] for name in split.ids}, **common)
    right = 0
    for rows, maps, correct in score_maps(predict, split, device):
        right += correct
        for judge in judges.values():
            judge.accumulate_batch(maps, [split.ids[i] for i in rows])
    row = {name: float(np.mean(judge.compute())) for name, judge in judges.items()}
    row["accuracy"] = 100 * right / len(split)
    if full and boxes:
        result = judges["v2"].result()
        row["curve"] = result.curve[1, ::10]
        row["tau"] = float(result.best_threshold[1])
    if full and "pxap" in judges:
        row["low"], row["high"] = map(float, np.ravel(judges["pxap"].confidence_interval(resamples=200)))
    elif full:
        row["low"], row["high"] = interval(judges["v2"])
    return row


def interval(judge, resamples: int = 200) -> tuple[float, float]:
    """95 % bootstrap interval of MaxBoxAccV2."""
    low, high = np.ravel(judge.confidence_interval(resamples=resamples)["v2"])
    return float(low), float(high)


def search(run: harness.Run, task: Task, method: str) -> dict:
    """Random trials judged on the tuning split; the best one's test figures."""
    best, scores = None, []
    tune = task.val
    if method == "fewshot":                                   # every fifth image of a class is held out
        seen, held = defaultdict(int), []
        for label in task.val.labels.tolist():
            held.append(seen[label] % 5 == 4 or (seen[label] == 1 and (task.val.labels == label).sum() < 5))
            seen[label] += 1
        held = torch.tensor(held)
        tune, shots = task.val.part(held.nonzero()[:, 0]), task.val.part((~held).nonzero()[:, 0])
    for number in range(task.trials):
        name = f"{method}-seed{task.seed}-trial{number}"
        trial = wsol_evaluation.sample_trial(task.space(method), np.random.default_rng([task.seed, number]))
        row = run.recorded(name)
        if row is None:
            network = fit(run, task, name, method, trial, shots if method == "fewshot" else None)
            row = evaluate(predictor(network), tune, run.device) | {"trial": trial}
            if best is None or row[task.metric] > best[task.metric]:
                run.save(f"best-{method}-seed{task.seed}", network.state_dict())
            row = run.record(name, row)
        scores.append(row[task.metric])
        if best is None or row[task.metric] > best[task.metric]:
            best = row
    final = f"{method}-seed{task.seed}-test"
    if (row := run.recorded(final)) is None:
        if method == "fewshot":                               # the chosen setting, trained on all tuning images
            network = fit(run, task, final, method, best["trial"], task.val)
            run.save(f"best-{method}-seed{task.seed}", network.state_dict())
        network = restored(run, task, method, best["trial"])
        row = evaluate(predictor(network), task.test, run.device, full=True)
        row = run.record(final, row | {"trial": best["trial"], "tuning": best[task.metric], "trials": scores})
    run.log(f"{final}: {task.metric} {row[task.metric]:.1f}")
    return row


def restored(run: harness.Run, task: Task, method: str, trial: dict) -> nn.Module:
    network = task.network(method, trial)
    state = torch.load(run.out / f"best-{method}-seed{task.seed}.pt", map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    return network.to(run.device).eval()


def centre(task: Task, device: torch.device) -> dict:
    map_ = torch.from_numpy(wsol.center_gaussian(task.test.size))
    return evaluate(lambda images, labels: (map_.expand(len(images), -1, -1), math.nan), task.test, device, full=True)


# ---------------------------------------------------------------- experiments on scenes

def gradients(run: harness.Run, task: Task, trial: dict) -> list[dict]:
    """Saliency baselines on the CAM network."""
    network, rows = restored(run, task, "cam", trial), []
    test = task.test.part(range(min(200, len(task.test))))
    for name, saliency in {
            "gradient": wsol.vanilla_gradient,
            "integrated gradients": lambda m, x, y: wsol.integrated_gradients(m, x, y, steps=10),
            "SmoothGrad": lambda m, x, y: wsol.smooth_grad(m, x, y, n=10, generator=torch.Generator().manual_seed(0))}.items():
        row = evaluate(lambda x, y: (saliency(network, x, y), math.nan), test, run.device)
        rows.append({"map": name, **{key: round(row[key], 1) for key in ("pxap", "v2", "v1")}})
    return rows


def background_sweep(run: harness.Run, task: Task, settings: dict, rhos: tuple, preset: dict) -> list[dict]:
    """CAM and few-shot trained and tested with backgrounds that tell the class more and more."""
    rows = []
    for rho in rhos:
        one = copy.copy(task)
        one.train, one.val, one.test = scene_splits(preset, task.seed, rho, preset["shots"])
        row = {"rho": rho}
        for method in ("cam", "fewshot"):
            name = f"{method}-seed{task.seed}-rho{round(100 * rho)}"
            if (result := run.recorded(name)) is None:
                network = fit(run, one, name, method, settings[method], one.val if method == "fewshot" else None)
                result = run.record(name, evaluate(predictor(network), one.test, run.device, full=True))
            row[method] = round(result["pxap"], 1)
        rows.append(row)
    return rows


def supervision_curve(run: harness.Run, task: Task, trial: dict, shots: tuple, preset: dict) -> list[dict]:
    """Few-shot PxAP against the number of masks per class."""
    rows = []
    for count in shots:
        name = f"fewshot-seed{task.seed}-shots{count}"
        if (result := run.recorded(name)) is None:
            split = scene_splits(preset, task.seed, 0.5, count)[1]
            network = fit(run, task, name, "fewshot", trial, split)
            result = run.record(name, evaluate(predictor(network), task.test, run.device, full=True))
        rows.append({"masks per class": count, "few-shot PxAP": round(result["pxap"], 1)})
    return rows


def scene_splits(preset: dict, seed: int, rho: float, shots: int) -> tuple[Split, Split, Split]:
    labels = torch.arange(len(CLASSES)).repeat(shots)
    return (scene_split(preset["train"], preset["size"], 3 * seed, rho),
            scene_split(len(labels), preset["size"], 3 * seed + 1, rho, labels),
            scene_split(preset["test"], preset["size"], 3 * seed + 2, rho))


def scene_task(args, preset: dict, seed: int) -> Task:
    train, val, test = scene_splits(preset, seed, 0.5, preset["shots"])
    epochs = args.epochs or preset["epochs"]
    recipe = dict(epochs=epochs, decay_frequency=max(2, round(0.7 * epochs)), weight_decay=5e-4,
                  lr_classifier_ratio=1.0, batch=32)
    return Task(train, val, test, len(CLASSES), "small", preset["width"], "pxap", recipe, (0.01, 0.3),
                args.trials or preset["trials"], seed)


# ---------------------------------------------------------------- real data

def real_task(run: harness.Run, args, seed: int) -> Task:
    metadata = args.data / "metadata"
    metadata = metadata / args.dataset if args.dataset else metadata
    if not (metadata / "train").is_dir():
        raise SystemExit(f"{metadata / 'train'}: no such folder; --data needs metadata/[DATASET/]train and val (see --help)")
    paper, size = args.preset == "paper", args.size or (32 if args.arch == "small" else 224)
    small = args.arch == "small"
    top = 1 + max(int(line.rsplit(",", 1)[1]) for line in (metadata / "train/class_labels.txt").read_text().split())
    classes = list(range(0, top, max(1, top // args.classes))) if args.classes else list(range(top))
    read = lambda name, kept=classes: read_split(metadata / name, args.data, size, kept, small)            # noqa: E731
    train, val, rng = read("train"), read("val"), np.random.default_rng(seed)
    if args.per_class:
        train = train.part(per_class(train.labels, args.per_class, rng)[0])
    if (metadata / "test").is_dir():
        test = read("test")
        val = val.part(per_class(val.labels, args.shots, rng)[0]) if args.shots else val
    else:
        few, rest = per_class(val.labels, args.shots or 5, rng)
        val, test = val.part(few), val.part(rest)
    epochs, decay = args.epochs or (50 if args.dataset == "CUB" else 10), {"CUB": 15}.get(args.dataset, 3)
    epochs, decay = (epochs, decay) if paper else (args.epochs or 4, max(2, round(0.7 * (args.epochs or 4))))
    recipe = dict(epochs=epochs, decay_frequency=decay, weight_decay=1e-4 if args.arch in ("resnet50", "small") else 5e-4,
                  lr_classifier_ratio=10.0, batch=32)
    task = Task(train, val, test, len(classes), args.arch, args.width, "pxap" if val.masks else "v2", recipe,
                (1e-5, 1.0) if paper else (1e-3, 0.1), args.trials or (30 if paper else 2), seed, workers=args.workers)
    if args.weights:
        task.weights = torch.load(args.weights, map_location="cpu", weights_only=True)
    elif small and args.pretrain:
        others = [c for c in range(top) if c not in classes]
        task.weights = pretrained(run, task, read("train", others), len(others), args.pretrain)
    return task


def per_class(labels: Tensor, count: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(`count` rows of each class, or all it has; the other rows)."""
    chosen = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0].numpy()
        chosen += rng.permutation(rows)[:count].tolist()
    return sorted(chosen), sorted(set(range(len(labels))) - set(chosen))


def pretrained(run: harness.Run, task: Task, split: Split, classes: int, epochs: int) -> dict:
    """The small backbone trained on the classes that are not in the benchmark, in the place of ImageNet weights."""
    name, path = "pretrain", run.out / "pretrained.pt"
    if run.recorded(name) is None:
        other = copy.copy(task)
        other.classes, other.weights, other.seed = classes, None, 0
        network = other.network("cam", {"large_feature_map": False}).to(run.device)
        cfg = dict(lr=0.1, epochs=epochs, decay_frequency=max(2, round(0.7 * epochs)), lr_classifier_ratio=1.0,
                   weight_decay=5e-4, amp=run.amp_dtype is not None)
        loader = Loader(split, 64, 0, workers=task.workers)
        last = run.drive(name, wsol.train(network, loader, cfg, resume=run.resumed(name)), total=epochs * len(loader))
        run.save("pretrained", network.features.state_dict())
        run.record(name, {"loss": last["loss"], "classes": classes, "images": len(split)})
    return torch.load(path, map_location="cpu", weights_only=True)


# ---------------------------------------------------------------- figures and table

def pictures(run: harness.Run, task: Task, rows: dict, count: int = 6) -> None:
    """For each method: image with map, its boxes at the best threshold (first colour) and the truth (second)."""
    split, panels, titles = task.test.part(range(count)), [], []
    for method, row in rows.items():
        predict = predictor(restored(run, task, method, row["trial"])) if method != "centre" else (
            lambda x, y: (torch.from_numpy(wsol.center_gaussian(split.size)).expand(len(x), -1, -1), 0))
        (_, maps, _), = score_maps(predict, split, run.device)
        for i, map_ in enumerate(maps.cpu()):
            boxes, _ = wsol_evaluation.compute_bboxes_from_scoremaps(map_.numpy(), [row["tau"]], False)
            truth = [wsol_evaluation.resize_bbox(b, split.sizes[split.ids[i]], (split.size,) * 2) for b in split.boxes[split.ids[i]]]
            image = figures.overlay(split.images(torch.tensor([i]), split.size)[0], map_, 0.45)
            scale = max(1, 128 // split.size)
            panel = figures.draw_boxes(image, boxes[0], ["#ff3030"], scale)
            panels.append(figures.draw_boxes(np.repeat(np.repeat(image, scale, 0), scale, 1) if not len(boxes[0]) else panel,
                                             np.array(truth) * scale, ["#ffffff"]))
            titles.append(f"{method} ({row[task.metric]:.0f})" if i == 0 else "")
    figures.image_grid(run.figures / "wsol_maps.png", panels, titles, columns=count, cell=96)
    taus = np.arange(0, 1, 0.01)
    figures.line_chart(run.figures / "wsol_curves.png", {m: (taus, row["curve"]) for m, row in rows.items()},
                       title="BoxAcc at IoU 0.5 against the threshold", xlabel="threshold", ylabel="percent of images")


def main(argv=None):
    parser = harness.parser(__doc__, presets=("default", "tiny", "paper"))
    parser.add_argument("--methods", nargs="+", default=list(wsol.METHODS), choices=wsol.METHODS)
    parser.add_argument("--trials", type=int, help="random settings per method (paper: 30)")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--arch", default="small", choices=("small", *wsol.ARCHS))
    parser.add_argument("--width", type=int, default=16, help="of the small network")
    parser.add_argument("--weights", type=Path, help="torchvision checkpoint of --arch")
    parser.add_argument("--dataset", default="", choices=("", "CUB", "ILSVRC", "OpenImages"), help="metadata sub-folder: CUB, ILSVRC, OpenImages (default: none)")
    parser.add_argument("--size", type=int, help="image side (default 32 for the small network, else 224)")
    parser.add_argument("--classes", type=int, help="keep this many classes, evenly spaced")
    parser.add_argument("--per-class", type=int, help="keep this many training images of a class")
    parser.add_argument("--shots", type=int, help="tuning images per class (paper: ImageNet 10, others 5; default: all)")
    parser.add_argument("--pretrain", type=int, default=0, help="epochs on the classes left out (small network)")
    run = harness.start(parser, argv)
    args = run.args
    if args.preset == "paper" and not args.data:
        parser.error("--preset paper needs --data")
    methods = ["cam"] + [m for m in args.methods if m != "cam"]
    preset = EMBEDDED.get(args.preset, EMBEDDED["default"])
    results, tables = {}, {}
    for seed in run.seeds:
        task = real_task(run, args, seed) if args.data else scene_task(args, preset, seed)
        rows = {method: search(run, task, method) for method in [*methods, "fewshot"]}
        rows["centre"] = run.recorded(f"centre-seed{seed}") or run.record(f"centre-seed{seed}", centre(task, run.device))
        results[seed] = rows
        if seed == run.seeds[0]:
            if run.figures and run.is_main:
                pictures(run, task, rows)
            if not args.data:
                tiny = args.preset == "tiny"
                settings = {method: rows[method]["trial"] for method in ("cam", "fewshot")}
                tables["gradient maps of the CAM network, 200 test images"] = gradients(run, task, settings["cam"])
                tables["background tells the class"] = background_sweep(
                    run, task, settings, (0.0, 1.0) if tiny else (0.0, 0.5, 0.9, 1.0), preset)
                tables["supervision"] = supervision_curve(
                    run, task, settings["fewshot"], (1, 2) if tiny else (1, 2, 5, 10), preset)
    finish(run, task, results, tables)


def finish(run: harness.Run, task: Task, results: dict, tables: dict) -> None:
    metric = task.metric
    published = dict(zip((*wsol.METHODS, "fewshot", "centre"), PAPER[run.args.dataset or ("ILSVRC" if run.args.data else "total")]))
    mean = lambda method, key: float(np.mean([rows[method][key] for rows in results.values()]))            # noqa: E731
    cam, main_table = mean("cam", metric), []
    for method in next(iter(results.values())):
        row = {"method": method, metric: round(mean(method, metric), 1), "to CAM": round(mean(method, metric) - cam, 1)}
        classifies = method not in ("fewshot", "centre")
        row |= {key: round(mean(method, key), 1) if key != "accuracy" or classifies else None
                for key in ("v2", "v1", "accuracy") if key != metric and key in next(iter(results.values()))["cam"]}
        trials = [s for rows in results.values() for s in rows[method].get("trials", [])]
        row["trials, tuning split"] = f"{min(trials):.1f} .. {max(trials):.1f}" if trials else ""
        row["paper"] = published[method]
        main_table.append(row)
    margin = float(np.mean([(rows["cam"]["high"] - rows["cam"]["low"]) / 2 for rows in results.values()])) / math.sqrt(len(results))
    later = [m for m in next(iter(results.values())) if m not in ("cam", "fewshot", "centre")]
    claims = []
    if later:
        gain = max(mean(m, metric) for m in later) - cam
        claims.append({"claim": "best of the later methods minus CAM: nothing beyond the interval of CAM",
                       "paper": round(max(published[m] for m in later) - published["cam"], 1), "this run": round(gain, 1), "margin": round(margin, 1), "holds": gain <= margin})
    few = mean("fewshot", metric) - cam
    best = max(mean(m, metric) for m in [*later, "cam"])
    claims.append({"claim": "few-shot minus CAM", "paper": round(published["fewshot"] - published["cam"], 1), "this run": round(few, 1), "margin": round(margin, 1),
                   "holds": few > margin})
    claims.append({"claim": "few-shot minus the best other method",
                   "paper": round(published["fewshot"] - max(published[m] for m in ("cam", *later)), 1), "this run": round(mean("fewshot", metric) - best, 1),
                   "margin": round(margin, 1), "holds": mean("fewshot", metric) - best > margin})
    above = cam - mean("centre", metric)
    claims.append({"claim": "CAM minus centre", "paper": round(published["cam"] - published["centre"], 1), "this run": round(above, 1), "margin": round(margin, 1),
                   "holds": above > margin})
    if sweep := tables.get("background tells the class"):
        fall = {m: sweep[0][m] - sweep[-1][m] for m in ("cam", "fewshot")}
        claims.append({"claim": f"CAM falls from rho 0 to {sweep[-1]['rho']:g}", "paper": None, "this run": round(fall["cam"], 1),
                       "margin": round(margin, 1), "holds": fall["cam"] > margin})
        claims.append({"claim": "few-shot does not", "paper": None, "this run": round(fall["fewshot"], 1),
                       "margin": round(margin, 1), "holds": fall["fewshot"] <= margin})
    if curve := tables.get("supervision"):
        values = [row["few-shot PxAP"] for row in curve]
        claims.append({"claim": f"few-shot rises from {curve[0]['masks per class']} to {curve[-1]['masks per class']} masks per class",
                       "paper": None, "this run": round(values[-1] - values[0], 1), "margin": round(margin, 1),
                       "holds": values[-1] - values[0] > margin})
        if run.figures and run.is_main:
            x = [row["masks per class"] for row in curve]
            figures.line_chart(run.figures / "wsol_supervision.png",
                               {"few-shot": (x, values), "CAM": (x, [cam] * len(x))}, markers=True, logx=True,
                               title="PxAP against masks per class", xlabel="masks per class", ylabel="PxAP")
    run.finish(rows=claims, tables={"main": main_table, **tables},
               data=f"{len(task.train)} training, {len(task.val)} tuning, {len(task.test)} test images, {task.classes} classes")


if __name__ == "__main__":
    main()
