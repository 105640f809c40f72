"""Localised labels for multi-label classification: COCO, or embedded images with two objects.

    python benchmarks/relabel_coco.py --seeds 3            # embedded, 2 minutes a seed
    python benchmarks/relabel_coco.py --data /data/coco --arch resnet50 --size 224 \\
        --init resnet50.pth --epochs 30 --amp bf16 --workers 16
    python benchmarks/relabel_coco.py --data /data/coco --arch resnet101 --size 448 ...

Every image is labelled with all the classes it shows, but a random crop shows some of them.
Students learn from crops with the binary cross-entropy of three kinds of targets, and are judged by
the mean average precision on whole images:

    image     the image's labels, whatever the crop shows
    machine   what an annotator, trained on the image's labels, sees in the crop: its logits' map
    oracle    what the ground-truth masks show in the crop

A class is in the target if LabelPooling of its map over the crop is above 0; there is no softmax.
The whole image is annotated at 4/3 of the crops' side, where objects look as large as in them.
The paper reports that localised labels help on COCO, the oracle's more, with ResNet-50 at 224 and
ResNet-101 at 448 pixels; its numbers could not be read here. Layout of --data: train2017/, val2017/
and annotations/instances_{train,val}2017.json.
"""

import harness
import torch
from relabel_generate import (MEAN_STD, Rows, SquashTransform, annotate, build_model, fingerprint)
from relabel_imagenet import summary

from data_tools import imagenet, synthetic
from data_tools.coco import CocoImages
from data_tools.label_maps import LabelMaps, StoreWriter, generate
from reference import relabel

METHODS = ("image", "machine", "oracle")


class MultiLabelCrops:
    """(images, targets (B, C)) of random crops; without maps the targets are the image's labels."""

    def __init__(self, run, dataset, size, batch, seed, scale=(0.08, 1.0), maps=None):
        self.labels, self.maps = torch.as_tensor(dataset.labels).float(), maps
        rows = range(len(dataset))
        transform = imagenet.TrainTransform(size, scale, interpolation="bilinear", coords=True)
        self.loader = imagenet.Loader(
            Rows(dataset, rows, labels=rows), batch // run.world_size, transform=transform,
            shuffle=True, seed=seed, drop_last=True, device=run.device, workers=run.args.workers,
            rank=run.rank, world_size=run.world_size, normalize=MEAN_STD)
        self.set_epoch = self.loader.set_epoch

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, rows, coords in self.loader:
            targets = self.labels[rows.cpu()]
            if self.maps is not None:
                pooled = relabel.label_pooling(self.maps[rows.cpu()], coords.cpu(),
                                               targets.shape[1], softmax=False)
                targets = (pooled > 0).float()
            yield images.to(memory_format=torch.channels_last), targets


def mean_average_precision(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent; mean over the classes with a positive of the mean precision at their positives.

    scores (N, C), labels (N, C) bool.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = labels.gather(0, order).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, dtype=torch.float64)[:, None]
    positives = hits.sum(0)
    there = positives > 0
    return 100 * float(((precision * hits).sum(0)[there] / positives[there]).mean())


@torch.no_grad()
def evaluate(run, model, dataset, size) -> float:
    rows = range(len(dataset))
    loader = imagenet.Loader(Rows(dataset, rows, labels=rows), 256, transform=SquashTransform(size),
                             workers=run.args.workers, device=run.device, normalize=MEAN_STD)
    with relabel.eval_mode(model):
        scores = torch.cat([model(images).float().cpu() for images, *_ in loader])
    return mean_average_precision(scores, torch.as_tensor(dataset.labels))


def embedded(tiny):
    """Train and test sets of pairs, and the oracle's maps of the training set."""
    def pairs(count, seed):
        data = synthetic.colored_objects(count, seed=seed)
        kinds = len(synthetic.COLORED_CLASSES)
        labels = torch.zeros(count, kinds).scatter_(1, data["classes"], 1).bool().numpy()
        return data, imagenet.ArrayImages(data["images"], labels, synthetic.COLORED_CLASSES)
    data, train = pairs(128 if tiny else 2000, 20)
    _, test = pairs(100 if tiny else 1000, 21)
    covered = torch.nn.functional.adaptive_avg_pool2d(data["masks"].float(), 8) > 0.1
    classes = data["classes"].view(-1, 2, 1, 1).expand(-1, -1, 8, 8)
    return train, test, torch.stack([covered.float(), classes.float()], 1)


def train(run, name, loader, arch, kinds, epochs, lr, seed):
    model = build_model(arch, kinds, seed)
    if run.args.init:
        harness.load_weights(model, run.args.init, head=False)
    wrapped = run.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True,
                                weight_decay=1e-4)
    steps = relabel.train(wrapped, loader, optimizer, epochs, warmup_epochs=min(1, epochs - 1),
                          num_classes=kinds, criterion=torch.nn.BCEWithLogitsLoss(),
                          amp_dtype=run.amp_dtype, resume=run.resumed(name))
    run.drive(name, steps, epochs * len(loader))
    return model


def oracle_maps(run, dataset, cells=15):
    """Store of the ground truth's maps."""
    most = int(dataset.labels.sum(1).max())
    writer = StoreWriter(run.out / "oracle", [dataset.name(i) for i in range(len(dataset))], k=most,
                         height=cells, width=cells, num_classes=dataset.labels.shape[1],
                         annotator="ground truth")
    steps = generate(lambda rows: dataset.label_maps(rows, cells, most), writer, rank=run.rank,
                     world_size=run.world_size)
    for _ in run.progress(steps, -(-len(dataset) // 256), "ground-truth maps"):
        pass
    run.barrier()
    return LabelMaps(run.out / "oracle")


def main(argv=None):
    parser = harness.parser(__doc__, figures=False)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--arch", default="small-8")
    parser.add_argument("--size", type=harness.count,
                        help="side of the crops (default: 24 embedded, 224)")
    parser.add_argument("--init", type=harness.Path, help="first weights, without the last layer")
    parser.add_argument("--epochs", type=harness.count, default=15)
    parser.add_argument("--batch", type=harness.count, default=64)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--top", type=harness.count, default=5,
                        help="classes kept per cell by the annotator")
    run = harness.start(parser, argv)
    args, tiny = run.args, run.args.preset == "tiny"
    epochs, size = 1 if tiny else args.epochs, args.size or (224 if args.data else 24)
    if args.data is None:
        train_set, test_set, oracle = embedded(tiny)
    else:
        train_set, test_set = (CocoImages(args.data / f"{split}2017", args.data / "annotations"
                                          / f"instances_{split}2017.json", keep_empty=False)
                               for split in ("train", "val"))
        oracle = oracle_maps(run, train_set) if "oracle" in args.methods else None
    kinds = train_set.labels.shape[1]
    for seed in run.seeds:
        maps = {"image": None, "oracle": oracle}
        if "machine" in args.methods:
            name, arch = f"annotator-seed{seed}", args.arch
            path = run.out / f"{name}.pt"
            if run.recorded(name) is None:
                loader = MultiLabelCrops(run, train_set, size, args.batch, seed, scale=(0.25, 1.0))
                model = train(run, name, loader, arch, kinds, epochs, args.lr, 1000 + seed)
                run.save(name, model.state_dict())
                run.record(name, {"mAP": evaluate(run, model, test_set, size)})
            annotator = harness.load_weights(build_model(arch, kinds), path).to(run.device)
            store = run.out / f"store-{fingerprint(annotator)}"
            maps["machine"], _ = annotate(run, train_set, annotator, store, size=4 * size // 3,
                                          num_classes=kinds, arch=arch, k=min(args.top, kinds))
        for method in args.methods:
            name = f"{method}-seed{seed}"
            if run.recorded(name) is None:
                loader = MultiLabelCrops(run, train_set, size, args.batch, seed, maps=maps[method])
                model = train(run, name, loader, args.arch, kinds, epochs, args.lr, seed)
                run.save(f"{name}-weights", model.state_dict())
                run.record(name, {"mAP": evaluate(run, model, test_set, size)})
    values = {m: [run.recorded(f"{m}-seed{seed}")["mAP"] for seed in run.seeds]
              for m in args.methods}
    claims = []
    for better, worse in (("machine", "image"), ("oracle", "image"), ("oracle", "machine")):
        if better in values and worse in values:
            gain, error, shown = summary([a - b for a, b in zip(values[better], values[worse])])
            clear = len(run.seeds) >= 3 and not tiny
            claims.append({"claim": f"{better} above {worse} (mAP, points)", "paper": "above",
                           "this run": shown, "holds": bool(gain > 2 * error) if clear else None})
    table = [{"targets": m, "mAP": summary(v)[2], "paper": None} for m, v in values.items()]
    run.finish(claims, {"multi-label": table})


if __name__ == "__main__":
    main()
