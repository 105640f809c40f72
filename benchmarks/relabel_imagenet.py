"""ReLabel against one-hot, smoothed, cleaned, global, single and distilled targets.

    python benchmarks/relabel_imagenet.py                  # embedded: pairs of objects; 4 minutes
    python benchmarks/relabel_imagenet.py --seeds 3        # claims are judged from 3 seeds on
    python benchmarks/relabel_imagenet.py --maps teacher   # not an oracle's: a trained teacher's
    python benchmarks/relabel_imagenet.py --epochs 90 --methods relabel relabel+cutmix --seeds 3
    python benchmarks/relabel_imagenet.py --data imagenet100_32 --preset small --classes 20 \
        --images 200 --teacher-epochs 40 --epochs 40 --seeds 2 --robustness
    torchrun --nproc_per_node=8 benchmarks/relabel_imagenet.py --data /data/imagenet \
        --preset paper --arch resnet50 --store maps --methods one-hot relabel relabel+cutmix \
        --real real.json --sets /data/robustness --amp bf16 --workers 16
    python benchmarks/relabel_imagenet.py --data /data/imagenet --preset paper \
        --sets /data/robustness --checkpoint one-hot.pt relabel.pt      # measures, trains nothing

The maps come from relabel_generate.py (--store), or from a teacher trained here on the single
labels. On embedded data they are an oracle's: a score of 10 in every cell that an object covers.

Embedded claim: a pair of objects has one label, drawn at random. Students are judged on images with
one object (top-1) and on pairs (multi-label top-1: a hit is either of the two). Localised
multi-labels should be the best, both of their halves (localised, multi) should help, and
distillation on the fly should cost more time per step. CutMix needs long training: see the --epochs
line.

Paper, ImageNet top-1 of ResNet-50 after 300 epochs: 77.5 original, 78.0 smoothing, 78.1 cleaning,
78.9 ReLabel, 80.2 with CutMix; --arch resnet18: 71.7, 72.5, 73.2 (original, ReLabel, with CutMix);
resnet101: 78.1, 80.7, 81.6 (tables 5.1 to 5.3). The factors (5.4): localized-multi 78.9,
localized-single 78.4, global-multi 78.5, global-single 77.5.
"""

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import figures
import harness
import relabel_robustness
import timing
import torch
import torch.nn.functional as F
from PIL import ImageEnhance
from relabel_generate import (MEAN_STD, Rows, annotate, build_model, fingerprint,
                              train_teacher)

from data_tools import imagenet, synthetic
from data_tools.label_maps import LabelMaps
from data_tools.loader import sample_seed
from reference import relabel
from reference.adamp import AdamP

# name: (targets, arguments of relabel.train, the paper's ImageNet top-1 of ResNet-50)
METHODS = {
    "one-hot": ("label", {}, 77.5),
    "smoothing": ("label", {"smoothing": 0.1}, 78.0),
    "cleaning": ("clean", {}, 78.1),
    "global-single": ("map", {"variant": "global-single"}, 77.5),
    "global-multi": ("map", {"variant": "global-multi"}, 78.5),
    "localized-single": ("map", {"variant": "localized-single"}, 78.4),
    "relabel": ("map", {}, 78.9),
    "relabel+cutmix": ("map", {"cutmix_prob": 1.0}, 80.2),
    "distillation": ("teacher", {}, None),
}
# the paper's table 5.1, other test sets
PAPER = {"V2": {"one-hot": 79.0, "smoothing": 79.5, "cleaning": 79.1, "relabel": 80.5},
         "ReaL": {"one-hot": 83.6, "smoothing": 84.0, "cleaning": 83.6, "relabel": 85.0},
         "Shankar et al.": {"one-hot": 85.3, "smoothing": 84.7, "cleaning": 85.2, "relabel": 86.1}}
# pairs the paper compares: the first above the second
CLAIMS = [("relabel", "one-hot"), ("relabel", "global-multi"), ("relabel", "localized-single"),
          ("global-multi", "one-hot"), ("localized-single", "one-hot"),
          ("relabel+cutmix", "relabel"), ("relabel", "distillation")]


class Preset(NamedTuple):
    arch: str
    size: int  # side of the students' crops
    whole: int  # side of the squashed images
    teacher: str
    teacher_size: int
    teacher_epochs: int
    epochs: int
    batch: int
    lr: float
    decay: float
    warmup: int
    no_cutmix: int  # last epochs, without CutMix


PRESETS = {
    "default": Preset("small-8", 24, 64, "small-16", 32, 15, 20, 64, 0.1, 5e-4, 1, 2),
    "tiny": Preset("small-4", 16, 32, "small-4", 16, 1, 1, 32, 0.1, 5e-4, 0, 0),
    # the teacher knows more images at 40 pixels than at 64
    "small": Preset("small-8", 24, 40, "small-16", 32, 16, 25, 64, 0.1, 5e-4, 1, 3),
    "paper": Preset("resnet50", 224, 475, "resnet50", 224, 300, 300, 1024, 0.1, 1e-4, 5, 5),
}


# ---------------------------------------------------------------- data


def oracle_maps(data, k=5, cells=8, score=10.0):
    """Maps from the masks: `score` for the objects that cover more than a quarter of a cell."""
    count, kinds = len(data["images"]), len(synthetic.COLORED_CLASSES)
    covered = F.adaptive_avg_pool2d(data["masks"].float(), cells) > 0.25  # (N, 2, cells, cells)
    dense = torch.zeros(count, kinds, cells, cells)
    place = data["classes"].view(count, 2, 1, 1).expand(-1, -1, cells, cells)
    values, classes = dense.scatter_(1, place, score * covered.float()).topk(k, dim=1)
    return torch.stack([values, classes.float()], 1)


def embedded(run):
    """(training set, teacher's training set, maps, test sets, number of classes).

    Test sets: {name: (images, their valid classes, or None for the labels they have)}.
    """
    train, test = (128, 100) if run.args.preset == "tiny" else (2000, 1000)
    def images(data):
        return imagenet.ArrayImages(data["images"], data["labels"], synthetic.COLORED_CLASSES)
    pairs, single = (synthetic.colored_objects(test, count, seed=10 + count) for count in (2, 1))
    valid = torch.zeros(test, len(synthetic.COLORED_CLASSES)).scatter_(1, pairs["classes"], 1)
    train_pairs = synthetic.colored_objects(train, seed=10)
    teach = images(synthetic.colored_objects(train, 1, seed=13))
    maps = oracle_maps(train_pairs) if run.args.maps == "oracle" else None
    return (images(train_pairs), teach, maps,
            {"single": (images(single), None), "pairs": (images(pairs), valid)}, len(valid[0]))


def folder(run, small):
    """The same of an ImageNet tree; small images are decoded once."""
    args = run.args
    train, val = (imagenet.imagenet(args.data, split, classes=args.classes)
                  for split in ("train", "val"))
    if small:
        train, val = (Rows(part, range(len(part)), in_memory=True) for part in (train, val))
    kinds = len(train.classes)
    evaluation = {"val": (val, None)}
    for name, path in (("ReaL", args.real), ("Shankar et al.", args.shankar)):
        if path:
            evaluation[name] = (val, valid_classes(path, val, kinds))
    if args.v2:
        evaluation["V2"] = (imagenet.imagenet_variant(args.v2, "v2", train.classes), None)
    students = train
    if args.images:
        labels = torch.as_tensor(train.labels)
        rows = torch.cat([(labels == c).nonzero()[:args.images, 0] for c in range(kinds)])
        students = Rows(train, rows.numpy())
    return students, train, None, evaluation, kinds


def valid_classes(path, validation, kinds):
    """(N, kinds) valid classes of ImageNet's validation images, from a list of several labels.

    ReaL ("Are we done with ImageNet?", real.json): entry n - 1 is of ILSVRC2012_val_0000000n.
    Shankar et al. ("Evaluating machine accuracy on ImageNet", human_accuracy_*.json): the
    "initial_annots" of 20,000 of them, by name; "correct" and "unclear" wnids are valid, and
    "problematic_images" have none. Classes the students do not know (from `kinds` on) are left out.
    """
    number = {wnid: label for label, wnid in enumerate(validation.classes)}
    try:
        content, listed = json.loads(path.read_text()), {}
        if isinstance(content, list):
            for n, classes in enumerate(content, 1):
                listed[f"ILSVRC2012_val_{n:08d}"] = [c for c in classes if c in range(kinds)]
        else:
            listed = {Path(validation.name(row)).stem: [] for row in range(len(validation))}
            for image, found in content["initial_annots"].items():
                wnids = {*found.get("correct", ()), *found.get("unclear", ())} & number.keys()
                if image not in content["problematic_images"]:
                    listed[image.split(".")[0]] = [number[wnid] for wnid in wnids]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no lists of labels: {error!r}") from None
    valid = torch.zeros(len(validation), kinds)
    for row in range(len(validation)):
        image = Path(validation.name(row)).stem
        if image not in listed:
            raise ValueError(f"{path}: no entry for {validation.name(row)}, "
                             "expected names like ILSVRC2012_val_00000001.JPEG")
        valid[row, listed[image]] = 1
    return valid


class MapsByName:
    """A store's maps in the order of a data set's images; the store may hold more, in any order."""

    def __init__(self, store, dataset):
        self.store = LabelMaps(store)
        try:
            self.rows = [self.store.index(dataset.name(i)) for i in range(len(dataset))]
        except KeyError as error:
            raise ValueError(f"--store: {error.args[0]}") from None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        return self.store[[self.rows[row] for row in rows.tolist()]]


class ColorJitter:
    """Brightness, contrast and saturation by factors in 1 +- strength, in random order."""

    def __init__(self, strength: float = 0.4):
        self.strength, self.generator = strength, None

    def __call__(self, image):
        factors = 1 + self.strength * (2 * torch.rand(3, generator=self.generator) - 1)
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind in torch.randperm(3, generator=self.generator).tolist():
            image = kinds[kind](image).enhance(float(factors[kind]))
        return image


def lighting(images, generator, std=0.1):
    """AlexNet's PCA noise, one colour per image; normalised, since the images are already."""
    values = torch.tensor([0.2175, 0.0188, 0.0045])
    vectors = torch.tensor([(-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140),
                            (-0.5836, -0.6948, 0.4203)])
    shift = (std * torch.randn(len(images), 3, generator=generator) * values) @ vectors.T
    return images + (shift / torch.tensor(MEAN_STD[1])).to(images.device)[:, :, None, None]


class Crops:
    """Batches for relabel.train: (images, one-hot), or (images, topk, coords) with maps."""

    def __init__(self, run, dataset, preset, seed, num_classes, maps=None, keep=None):
        """`keep` (N,) bool: the images that label cleaning leaves."""
        rows = torch.arange(len(dataset)) if keep is None else keep.nonzero().squeeze(1)
        labels = torch.as_tensor(dataset.labels)
        self.targets, self.maps = F.one_hot(labels, num_classes).float(), maps
        self.color, self.seed, self.next_batch = preset.size >= 224, seed, (0, 0)
        transform = imagenet.TrainTransform(preset.size, interpolation="bilinear", coords=True,
                                            augment=ColorJitter() if self.color else None)
        self.loader = imagenet.Loader(
            Rows(dataset, rows, labels=rows), preset.batch // run.world_size, transform=transform,
            shuffle=True, seed=seed, drop_last=True, device=run.device, workers=run.args.workers,
            rank=run.rank, world_size=run.world_size, normalize=MEAN_STD)

    def set_epoch(self, epoch, start_batch=0):
        self.loader.set_epoch(epoch, start_batch)
        self.next_batch = (epoch, start_batch)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        epoch, first = self.next_batch
        for batch, (images, rows, coords) in enumerate(self.loader, first):
            images, rows = images.to(memory_format=torch.channels_last), rows.cpu()
            if self.color:
                seed = sample_seed(self.seed, epoch, batch, self.loader.rank)
                images = lighting(images, torch.Generator().manual_seed(seed))
            if self.maps is None:
                yield images, self.targets[rows]
            else:
                yield images, self.maps[rows], coords


# ---------------------------------------------------------------- one student


def steps_of(run, method, seed, preset, data, resume=None):
    """(model, its training steps, their number). `data`: what `prepare` returns."""
    kind, options, _ = METHODS[method]
    model = run.wrap(build_model(preset.arch, data["classes"], seed))
    loader = Crops(run, data["train"], preset, seed, data["classes"],
                   maps=data["maps"] if kind == "map" else None,
                   keep=data["keep"] if kind == "clean" else None)
    if preset.arch.startswith("resnet") and "cutmix_prob" in options:  # the paper's recipe
        optimizer = AdamP(model.parameters(), 2e-3, weight_decay=1e-2, nesterov=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), preset.lr, momentum=0.9, nesterov=True,
                                    weight_decay=preset.decay)
    steps = relabel.train(
        model, loader, optimizer, preset.epochs, warmup_epochs=preset.warmup,
        cutmix_off_epochs=preset.no_cutmix, num_classes=data["classes"],
        generator=torch.Generator().manual_seed(seed), resume=resume, amp_dtype=run.amp_dtype,
        teacher=data["teacher"] if kind == "teacher" else None, **options)
    return model, steps, preset.epochs * len(loader)


def accuracies(run, model, data, preset):
    """{name: top-1 in percent} on the test sets, the robustness sets included where asked for."""
    crop = 1.0 if preset.size <= 64 else 0.875
    transform = imagenet.EvalTransform(preset.size, crop, "bilinear")
    results = {}
    for name, (dataset, valid) in data["evaluation"].items():
        every = range(len(dataset))
        loader = imagenet.Loader(Rows(dataset, every, labels=every), 256, transform=transform,
                                 workers=run.args.workers, device=run.device, normalize=MEAN_STD)
        labels = torch.as_tensor(dataset.labels) if valid is None else valid
        batches = ((images, labels[rows.cpu()]) for images, rows, *_ in loader)
        results[name] = relabel.evaluate(model, batches, run.device)["top1"]
    if run.args.robustness or run.args.sets:
        clean = next(iter(data["evaluation"].values()))[0]
        results.update(relabel_robustness.measure(run, model, clean, transform, run.args.sets))
    return results


def cost(run, preset, data, rounds=24):
    """Milliseconds of a step by kind of target, measured in turns."""
    steps = {}
    for method in ("one-hot", "relabel", "relabel+cutmix", "distillation"):
        if method in run.args.methods:
            _, student, count = steps_of(run, method, 0, preset, data)
            steps[method], rounds = partial(next, student), min(rounds, count - 1)
    if rounds < 1:  # the first step warms up
        return {}
    clock = time.perf_counter if run.args.workers else None  # workers have CPU times of their own
    times = timing.interleaved(run, steps, rounds, "time of a step", clock=clock)
    return {method: 1000 * median for method, median in timing.medians(times).items()}


# ---------------------------------------------------------------- the study


def prepare(run, preset):
    """Everything a student needs: data, label maps, teacher, cleaned rows, number of classes."""
    args = run.args
    small = preset.size <= 64
    train, teach, maps, evaluation, kinds = folder(run, small) if args.data else embedded(run)
    if args.store and not args.checkpoint:
        maps = MapsByName(args.store, train) if args.data else LabelMaps(args.store)
    data = {"train": train, "evaluation": evaluation, "classes": kinds, "teacher": None,
            "maps": maps, "keep": None}
    if args.checkpoint:
        return data
    needs_maps = any(METHODS[m][0] in ("map", "clean") for m in args.methods)
    if "distillation" in args.methods or (needs_maps and data["maps"] is None):
        arch = args.teacher_arch or preset.teacher
        if args.teacher:
            teacher = harness.load_weights(build_model(arch, kinds), args.teacher).to(run.device)
        else:
            teacher = train_teacher(run, "teacher", teach, kinds, arch=arch, seed=100, lr=preset.lr,
                                    size=preset.teacher_size,
                                    epochs=args.teacher_epochs or preset.teacher_epochs)
        teacher.eval().requires_grad_(False)
        shown = accuracies(run, teacher, data, preset._replace(size=preset.teacher_size))
        run.record("teacher-accuracy", shown)
        run.log("teacher:", ", ".join(f"{name} {value:.1f} %" for name, value in shown.items()))
        data["teacher"] = teacher
        if needs_maps and data["maps"] is None:
            store = run.out / f"store-{fingerprint(teacher)}"
            data["maps"], spent = annotate(run, train, teacher, store, size=preset.whole,
                                           num_classes=kinds, arch=arch, k=min(5, kinds))
            if run.recorded("generation") is None:
                run.record("generation", spent)
            run.log(f"label maps: {spent['images']} images in {spent['seconds']:.0f} s")
    if needs_maps and len(data["maps"]) != len(train):
        raise ValueError(f"the store holds {len(data['maps'])} maps, the training set {len(train)} "
                         "images")
    if "cleaning" in args.methods:
        labels = torch.as_tensor(train.labels)
        data["keep"] = torch.cat([relabel.accepted_labels(data["maps"][rows], labels[rows], kinds)
                                  for rows in torch.arange(len(train)).split(1024)])
        run.log(f"label cleaning keeps {data['keep'].float().mean():.1%} of the images")
    return data


def main(argv=None):
    parser = harness.parser(__doc__, presets=tuple(PRESETS))
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, help="kinds of target, one student each",
        default=[m for m in METHODS if m != "global-single"])
    add("--arch", help="of the students, instead of the preset's")
    add("--epochs", type=harness.count, help="instead of the preset's")
    add("--maps", choices=("oracle", "teacher"), default="oracle", help="embedded data: where from")
    add("--store", help="label maps of the training set (relabel_generate.py)")
    add("--teacher", help="checkpoint of the teacher (default: trained on the single labels)")
    add("--teacher-arch", help="its architecture, instead of the preset's")
    add("--teacher-epochs", type=harness.count, help="instead of the preset's")
    add("--robustness", action="store_true", help="measure attacked and corrupted test images too")
    add("--checkpoint", nargs="+", type=harness.Path, help="measure these students, train none")
    add = parser.real.add_argument
    add("--classes", type=harness.count, help="use the first N classes only")
    add("--images", type=harness.count,
        help="students see the first N images of a class, the teacher all")
    add("--real", type=harness.Path, help="real.json: multi-label accuracy on the validation set")
    add("--shankar", type=harness.Path, help="human_accuracy_v3.0.0.json: the same by other labels")
    add("--v2", type=harness.Path, help="folder of ImageNetV2: accuracy there")
    add("--sets", type=harness.Path, help="with --robustness: and the robustness sets found in "
                                          "this folder, named as in relabel_robustness.py")
    run = harness.start(parser, argv)
    preset = PRESETS[run.args.preset]
    preset = preset._replace(arch=run.args.arch or preset.arch,
                             epochs=run.args.epochs or preset.epochs)
    data = prepare(run, preset)
    if run.args.checkpoint:
        rows = [{"checkpoint": path.name, **accuracies(run, harness.load_weights(build_model(
            preset.arch, data["classes"]), path).to(run.device), data, preset)}
            for path in run.args.checkpoint]
        return run.finish([], {"students": rows})
    for seed in run.seeds:
        for method in run.args.methods:
            name = f"{method}-seed{seed}"
            if run.recorded(name) is None:
                model, steps, count = steps_of(run, method, seed, preset, data, run.resumed(name))
                run.drive(name, steps, count)
                run.save(f"{name}-weights", getattr(model, "module", model).state_dict())
                run.record(name, accuracies(run, model, data, preset))
    if run.recorded("cost") is None:
        run.record("cost", cost(run, preset, data))
    finish(run, preset, data)


def summary(samples):
    """Mean, its standard error, and both as text."""
    mean = statistics.mean(samples)
    error = statistics.stdev(samples) / len(samples) ** 0.5 if len(samples) > 1 else 0.0
    return mean, error, f"{mean:.1f} ± {error:.1f}"


def finish(run, preset, data):
    """Tables, claims (judged on the multi-label pairs, or the validation set) and the picture."""
    results = {m: [run.recorded(f"{m}-seed{seed}") for seed in run.seeds] for m in run.args.methods}
    columns = list(data["evaluation"])
    extra = [key for key in next(iter(results.values()))[0] if key not in columns]
    def table(keys):
        return [{"targets": m, **{key: summary([row[key] for row in rows])[2] for key in keys}}
                for m, rows in results.items()]
    tables = {"targets": [{**row, "paper, ImageNet top-1": METHODS[row["targets"]][2],
                           **{f"paper, {name}": PAPER[name].get(row["targets"])
                              for name in PAPER if name in columns}} for row in table(columns)]}
    if extra:
        tables["robustness"] = table(extra)
    if teacher := run.recorded("teacher-accuracy"):
        tables["targets"].append({"targets": "(the teacher)",
                                  **{key: f"{teacher[key]:.1f}" for key in columns}})
    step, generation = run.recorded("cost"), run.recorded("generation")
    if "one-hot" in step:
        epoch = len(data["train"]) // preset.batch / 1000
        once = generation["seconds"] or None if generation else None
        tables["cost"] = [{"targets": m, "ms per step": ms, "s per epoch": ms * epoch,
                           "of one-hot's": ms / step["one-hot"],
                           "once, s": once if "relabel" in m else None} for m, ms in step.items()]
    judged, claims = columns[0 if run.args.data else -1], []
    for better, worse in CLAIMS:
        if better in results and worse in results:
            gain, error, shown = summary([a[judged] - b[judged]
                                          for a, b in zip(results[better], results[worse])])
            paper = (METHODS[better][2], METHODS[worse][2])
            clear = len(run.seeds) >= 3 and worse != "distillation"
            claims.append({"claim": f"{better} above {worse} ({judged}, points)",
                           "paper": None if None in paper else round(paper[0] - paper[1], 1),
                           "this run": shown, "holds": bool(gain > 2 * error) if clear else None})
    for method, paper in (("relabel", 0.5), ("distillation", None)):
        if method in step and "one-hot" in step:
            claims.append({"claim": f"time {method} adds to a step (%)", "paper": paper,
                           "this run": 100 * (step[method] / step["one-hot"] - 1), "holds": None})
    if run.figures and run.is_main:
        def bars_of(key):
            return zip(*(summary([row[key] for row in rows])[:2] for rows in results.values()))
        bars = {key: tuple(bars_of(key)) for key in columns}
        name = f"relabel_methods-{run.args.data.name}" if run.args.data else "relabel_methods"
        figures.bar_chart(run.figures / f"{name}.png", list(results), bars, size=(900, 420),
                          title="Accuracy by kind of target", ylabel="top-1 (%)")
    run.finish(claims, tables)


if __name__ == "__main__":
    main()
