"""ReLabel against its comparators: one-hot, smoothed, cleaned, global, single and distilled labels (tables 5.1 to 5.4).

    python benchmarks/relabel_imagenet.py                              # embedded: images with two objects, about 5 minutes
    python benchmarks/relabel_imagenet.py --seeds 3 --record           # the recorded table (paper's claim is judged on this)
    torchrun --nproc_per_node=8 benchmarks/relabel_imagenet.py --data /data/imagenet --preset paper --store maps \\
        --methods one-hot relabel relabel+cutmix --real real.json --amp bf16 --workers 16
    python benchmarks/relabel_imagenet.py --data imagenet100_32 --preset small --classes 20 --seeds 2

The maps come from relabel_generate.py (--store), or from a teacher trained here on the single labels. On embedded data
they are an oracle's: a score of 10 in every cell that an object covers (--maps teacher trains one on single objects).

Embedded claim: a pair of objects has one label, drawn at random. Students are judged on images with one object (top-1)
and on pairs (multi-label top-1: a hit is either of the two). Localised multi-labels should be the best, both of their
halves (localised, multi) should help, distillation on the fly should be close and cost more time per step.

Paper, ResNet-50, 300 epochs: ImageNet top-1 77.5 original, 78.0 smoothing, 78.1 cleaning, 78.9 ReLabel, 80.2 with CutMix.
"""

import json
import statistics
import time

import figures
import harness
import torch
import torch.nn.functional as F
from relabel_generate import MEAN_STD, annotate, build_model, load_weights, train_teacher

from data_tools import imagenet, synthetic
from data_tools.label_maps import LabelMaps
from reference import relabel

# name: (targets, arguments of relabel.train, paper's ImageNet top-1 of ResNet-50)
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
# arch, side of the crops, side of the squashed images, epochs, batch, lr, weight decay, warm-up and CutMix-free epochs
PRESETS = {
    "default": ("small-16", 32, 64, 4, 64, 0.1, 5e-4, 1, 1),
    "tiny": ("small-4", 32, 64, 1, 32, 0.1, 5e-4, 0, 0),
    "small": ("small-16", 32, 64, 10, 64, 0.1, 5e-4, 1, 2),
    "paper": ("resnet50", 224, 475, 300, 1024, 0.1, 1e-4, 5, 5),
}


class Crops:
    """Batches for relabel.train: (images, one-hot), or (images, topk, coords) with the maps from the store.

    `keep` (N,) bool: the images that label cleaning leaves.
    """

    def __init__(self, run, dataset, size, batch_size, seed, num_classes, maps=None, keep=None):
        rows = torch.arange(len(dataset)) if keep is None else keep.nonzero().squeeze(1)
        self.rows, self.maps, self.num_classes = rows, maps, num_classes
        self.labels = torch.as_tensor(dataset.labels)
        numbered = Numbered(dataset, rows)
        self.loader = imagenet.Loader(
            numbered, batch_size // run.world_size, shuffle=True, seed=seed, drop_last=True, device=run.device,
            transform=imagenet.TrainTransform(size, interpolation="bilinear", coords=True), workers=run.args.workers,
            rank=run.rank, world_size=run.world_size, normalize=MEAN_STD)
        self.set_epoch = self.loader.set_epoch

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, rows, coords in self.loader:
            if self.maps is None:
                yield images, F.one_hot(self.labels[rows.cpu()], self.num_classes).float().to(images.device)
            else:
                yield images, self.maps[rows.cpu()], coords


class Numbered:
    """Some rows of a data set, labelled with their row number."""

    def __init__(self, dataset, rows):
        self.dataset, self.labels, self.root = dataset, rows.numpy(), getattr(dataset, "root", None)

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return self.dataset.name(int(self.labels[index]))

    def open(self, index):
        return self.dataset.open(int(self.labels[index]))


def oracle_maps(run, data, k=5, cells=8, score=10.0):
    """Maps from the masks: `score` for the classes of the objects that cover more than a quarter of a cell."""
    count, kinds = len(data["images"]), len(synthetic.COLORED_CLASSES)
    covered = F.adaptive_avg_pool2d(data["masks"].float(), cells) > 0.25                      # (N, 2, cells, cells)
    dense = torch.zeros(count, kinds, cells, cells)
    dense.scatter_(1, data["classes"].view(count, 2, 1, 1).expand(-1, -1, cells, cells), score * covered.float())
    values, classes = dense.topk(k, dim=1)
    return torch.stack([values, classes.float()], 1)


def embedded(run):
    """Train set, maps, {name: (test set, labels)} of the two-object experiment, and the number of classes."""
    tiny = run.args.preset == "tiny"
    pairs = synthetic.colored_objects(128 if tiny else 4000, seed=10)
    test = {"single": synthetic.colored_objects(100 if tiny else 1000, 1, seed=11),
            "pairs": synthetic.colored_objects(100 if tiny else 1000, seed=12)}
    dataset = imagenet.ArrayImages(pairs["images"], pairs["labels"])
    kinds = len(synthetic.COLORED_CLASSES)
    evaluation = {"single": (imagenet.ArrayImages(test["single"]["images"], test["single"]["labels"]), None),
                  "pairs": (imagenet.ArrayImages(test["pairs"]["images"], test["pairs"]["labels"]),
                            torch.zeros(len(test["pairs"]["classes"]), kinds).scatter_(1, test["pairs"]["classes"], 1))}
    return dataset, oracle_maps(run, pairs), evaluation, kinds


def folder(run):
    dataset = imagenet.imagenet(run.args.data, "train", classes=run.args.classes)
    validation = imagenet.imagenet(run.args.data, "val", classes=run.args.classes)
    evaluation, kinds = {"val": (validation, None)}, len(dataset.classes)
    if run.args.real:
        valid = torch.zeros(len(validation), kinds)
        for row, classes in enumerate(json.loads(run.args.real.read_text())):
            valid[row, classes] = 1
        evaluation["ReaL"] = (validation, valid)
    if run.args.v2:
        evaluation["V2"] = (imagenet.imagenet_variant(run.args.v2, "v2", dataset.classes), None)
    return dataset, None, evaluation, kinds


def evaluate(run, model, evaluation, size, crop):
    results = {}
    for name, (dataset, valid) in evaluation.items():
        loader = imagenet.Loader(dataset, 256, transform=imagenet.EvalTransform(size, crop, "bilinear"), workers=run.args.workers,
                                 device=run.device, normalize=MEAN_STD)
        batches = loader if valid is None else (
            (images, valid[i * 256:(i + 1) * 256].to(run.device)) for i, (images, *_) in enumerate(loader))
        results[name] = relabel.evaluate(model, batches, run.device)["top1"]
    return results


def train_method(run, name, method, seed, dataset, maps, teacher, keep, kinds):
    arch, size, _, epochs, batch, lr, decay, warmup, off = PRESETS[run.args.preset]
    epochs = run.args.epochs or epochs
    kind, options, _ = METHODS[method]
    model = run.wrap(build_model(arch, kinds, seed))
    loader = Crops(run, dataset, size, batch, seed, kinds, maps if kind == "map" else None, keep if kind == "clean" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=decay)
    resume = run.resumed(name)
    steps = relabel.train(model, loader, optimizer, epochs, warmup_epochs=warmup, cutmix_off_epochs=off, num_classes=kinds,
                          generator=torch.Generator().manual_seed(seed), teacher=teacher if kind == "teacher" else None,
                          amp_dtype=run.amp_dtype, resume=resume, **options)
    done = resume["epoch"] * len(loader) + resume["batch"] if resume else 0
    began = time.perf_counter()
    run.drive(name, steps, epochs * len(loader))
    return model, 1000 * (time.perf_counter() - began) / max(epochs * len(loader) - done, 1)


def main(argv=None):
    parser = harness.parser(__doc__, presets=tuple(PRESETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if m != "global-single"])
    parser.add_argument("--store", help="label maps of the training set (relabel_generate.py); default: a teacher trained here")
    parser.add_argument("--teacher", help="checkpoint of the teacher for cleaning, maps and distillation")
    parser.add_argument("--teacher-arch", help="its architecture (default: twice as wide as the students, or resnet50)")
    parser.add_argument("--maps", choices=("oracle", "teacher"), default="oracle", help="embedded data: where the maps come from")
    parser.add_argument("--classes", type=int, help="use the first N classes only")
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--teacher-epochs", type=int, help="default: the students' epochs")
    parser.add_argument("--real", type=harness.Path, help="real.json: evaluate with multi-labels too")
    parser.add_argument("--v2", type=harness.Path, help="folder of ImageNetV2: evaluate there too")
    run = harness.start(parser, argv)
    args = run.args
    arch, size, whole, epochs, batch, lr, *_ = PRESETS[args.preset]
    epochs = args.epochs or epochs
    dataset, maps, evaluation, kinds = folder(run) if args.data else embedded(run)
    crop = 1.0 if size <= 64 else 0.875

    teacher = None
    needs_teacher = "distillation" in args.methods or (args.data and not args.store) or (args.data is None and args.maps == "teacher")
    if needs_teacher:
        teacher_arch = args.teacher_arch or (f"small-{2 * int(arch[6:])}" if arch.startswith("small-") else arch)
        if args.teacher:
            teacher = load_weights(build_model(teacher_arch, kinds), args.teacher).to(run.device)
        else:
            single = None if args.data else synthetic.colored_objects(len(dataset), 1, seed=13)
            source = dataset if args.data else imagenet.ArrayImages(single["images"], single["labels"])
            teacher = train_teacher(run, "teacher", source, kinds, arch=teacher_arch, size=size, lr=lr, seed=100,
                                    epochs=args.teacher_epochs or epochs)
        teacher.eval().requires_grad_(False)
        accuracy = evaluate(run, teacher, evaluation, size, crop)
        run.log("teacher:", ", ".join(f"{name} {value:.1f} %" for name, value in accuracy.items()))
    if args.store:
        maps = LabelMaps(args.store)
    elif args.data or args.maps == "teacher":
        maps, spent = annotate(run, dataset, teacher, run.out / "store", size=whole, num_classes=kinds, k=min(5, kinds))
        run.log(f"label maps: {spent['images']} images in {spent['seconds']:.0f} s")
    if len(maps) != len(dataset):
        raise ValueError(f"the store holds {len(maps)} maps, the training set {len(dataset)} images")
    keep = None
    if "cleaning" in args.methods:
        labels = torch.as_tensor(dataset.labels)
        keep = torch.cat([relabel.accepted_labels(maps[rows.tolist()] if isinstance(maps, LabelMaps) else maps[rows], labels[rows], kinds)
                          for rows in torch.arange(len(dataset)).split(1024)])
        run.log(f"label cleaning keeps {keep.float().mean():.1%} of the images")

    for seed in run.seeds:
        for method in args.methods:
            name = f"{method}-seed{seed}"
            if run.recorded(name) is None:
                model, milliseconds = train_method(run, name, method, seed, dataset, maps, teacher, keep, kinds)
                run.save(f"{name}-weights", model.state_dict())
                run.record(name, {**evaluate(run, model, evaluation, size, crop), "ms per step": milliseconds})
    finish(run, list(evaluation))


def finish(run, columns):
    values = {method: {c: [run.recorded(f"{method}-seed{seed}")[c] for seed in run.seeds] for c in [*columns, "ms per step"]}
              for method in run.args.methods}
    def spread(samples):
        return statistics.stdev(samples) / len(samples) ** 0.5 if len(samples) > 1 else 0.0
    table = [{"targets": method, **{c: f"{statistics.mean(v[c]):.1f} ± {spread(v[c]):.1f}" for c in columns},
              "ms per step": f"{statistics.median(v['ms per step']):.0f}", "paper, ImageNet top-1": METHODS[method][2]}
             for method, v in values.items()]
    judged = columns[-1] if run.args.data is None else columns[0]
    rows = []
    for better, worse in [("relabel", "one-hot"), ("relabel", "global-multi"), ("relabel", "localized-single"),
                          ("global-multi", "one-hot"), ("localized-single", "one-hot"), ("relabel+cutmix", "relabel"),
                          ("relabel", "distillation")]:
        if better in values and worse in values:
            pairs = [a - b for a, b in zip(values[better][judged], values[worse][judged])]
            gain, error = statistics.mean(pairs), spread(pairs)
            paper = None if None in (METHODS[better][2], METHODS[worse][2]) else METHODS[better][2] - METHODS[worse][2]
            clear = len(pairs) >= 3 and worse != "distillation"
            rows.append({"claim": f"{better} above {worse} ({judged}, points)", "paper": paper,
                         "this run": f"{gain:+.1f} ± {error:.1f}", "holds": (gain > 2 * error and gain > 0) if clear else None})
    if run.figures and run.is_main:
        figures.bar_chart(run.figures / "relabel_methods.png", list(values), {
            c: ([statistics.mean(v[c]) for v in values.values()], [spread(v[c]) for v in values.values()]) for c in columns},
            title="Accuracy by kind of target", ylabel="top-1 (%)", size=(900, 420))
    run.finish(rows, {"targets": table})


if __name__ == "__main__":
    main()
