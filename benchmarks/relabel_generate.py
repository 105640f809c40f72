"""Label maps for your own data: a trained classifier in, a packed store of dense label maps out.

    python benchmarks/relabel_generate.py                 # embedded data and teacher
    python benchmarks/relabel_generate.py --data /data/imagenet --arch resnet50 \\
        --teacher resnet50.pth --store maps --amp bf16 --workers 16
    torchrun --nproc_per_node=8 benchmarks/relabel_generate.py --data ...  # shards shared out

The teacher's pooling is removed, its linear layer is asked at every cell, and the 5 best classes of
each cell are kept. Every image is squashed to a square of --size pixels (475 in the paper, 15 x 15
cells). A killed run goes on with the shards that are missing: give the same command again. Takes
one forward pass per image; the closing table shows the bytes per image (4.5 kB at 15 x 15 top-5),
how much of the time went to anything else than the teacher (the claim: below 10 %, judged on --data
only, since a toy teacher is too fast to be the limit), and that the mean over the cells of a map is
the teacher's own prediction.
"""

import hashlib
import re
import time

import figures
import harness
import numpy as np
import torch
from PIL import Image

from data_tools import imagenet, synthetic
from data_tools.label_maps import LabelMaps, StoreWriter, generate
from data_tools.loader import decode, normalize, to_tensor
from reference import relabel, resnet

MEAN_STD = (imagenet.IMAGENET_MEAN, imagenet.IMAGENET_STD)


class SquashTransform:
    """The whole image resized to size x size, aspect ratio not kept: map and image coordinates are
    proportional."""

    takes_encoded = True

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image) -> torch.Tensor:
        picture, side = decode(image, (self.size, self.size)), (self.size, self.size)
        return to_tensor(picture if picture.size == side else picture.resize(side, Image.BILINEAR))


class Rows:
    """Some rows of a data set, labelled anew if `labels` is given; in_memory decodes them once."""

    def __init__(self, dataset, rows, labels=None, in_memory: bool = False):
        self.dataset, self.rows = dataset, np.asarray(rows)
        self.labels = dataset.labels[self.rows] if labels is None else np.asarray(labels)
        self.root, self.classes = getattr(dataset, "root", None), dataset.classes
        self.pixels = [np.asarray(dataset[int(row)][0]) for row in rows] if in_memory else None

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.rows[index]))

    def open(self, index: int):
        if self.pixels is not None:
            return self.pixels[index]
        return self.dataset.open(int(self.rows[index]))


def build_model(arch: str, num_classes: int, seed: int = 0) -> resnet.ResNet:
    """resnet18 .. resnet152, or "small-W": one block a stage, width W, for 24 to 64 pixels."""
    generator = torch.Generator().manual_seed(seed)
    if re.fullmatch(r"small-[1-9]\d*", arch):
        model = resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=num_classes,
                              width=int(arch[6:]), small_stem=True, generator=generator)
    elif arch in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        model = getattr(resnet, arch)(num_classes, generator=generator)
    else:
        raise SystemExit("an architecture must be resnet18/34/50/101/152 or small-WIDTH, not "
                         f"{arch!r}")
    return model.to(memory_format=torch.channels_last)  # faster, most in half precision


def fingerprint(model: torch.nn.Module) -> str:
    """Eight hex digits that change with the weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def annotate(run: harness.Run, dataset, model: resnet.ResNet, folder, *, size: int,
             num_classes: int, arch: str, k: int = 5, batch_size: int = 128,
             shard_size: int = 8192) -> tuple[LabelMaps, dict]:
    """Write (or finish) the store of a data set's maps; a store of another teacher is refused.

    Returns it and {"images", "seconds", "teacher seconds"}: what this call did.
    """
    annotator = relabel.to_dense_classifier(model.forward_features, model.fc).to(run.device).eval()
    with torch.no_grad():
        height, width = annotator(torch.zeros(1, 3, size, size, device=run.device)).shape[2:]
    named = getattr(dataset, "root", None) is not None
    names = [dataset.name(i) if named else f"embedded/{i}" for i in range(len(dataset))]
    writer = StoreWriter(folder, names, k=k, height=height, width=width, num_classes=num_classes,
                         shard_size=shard_size,
                         annotator=f"{arch}, {size} px, weights {fingerprint(model)}")
    rows = [row for start, stop in writer.missing(run.rank, run.world_size)
            for row in range(start, stop)]
    spent = {"images": len(rows), "seconds": 0.0, "teacher seconds": 0.0}
    if rows:
        loader = imagenet.Loader(dataset, batch_size, transform=SquashTransform(size), sampler=rows,
                                 workers=run.args.workers, device=run.device, normalize=MEAN_STD)
        batches, spare = iter(loader), []  # maps of a batch that belong to the next shard
        precision = {"dtype": run.amp_dtype, "enabled": run.amp_dtype is not None}

        def maps_of(wanted: list[int]) -> torch.Tensor:
            while sum(map(len, spare)) < len(wanted):
                images, *_ = next(batches)
                images = images.contiguous(memory_format=torch.channels_last)
                began = time.perf_counter()
                with torch.autocast(run.device.type, **precision):
                    maps = relabel.generate_label_maps(annotator, images, k).cpu()
                spent["teacher seconds"] += time.perf_counter() - began
                spare.append(maps)
            ready = torch.cat(spare)
            spare[:] = [ready[len(wanted):]]
            return ready[:len(wanted)]

        began = time.perf_counter()
        steps = generate(maps_of, writer, batch_size=batch_size, rank=run.rank,
                         world_size=run.world_size)
        for _ in run.progress(steps, -(-len(rows) // batch_size), "label maps"):
            pass
        spent["seconds"] = time.perf_counter() - began
    run.barrier()
    return LabelMaps(folder), spent


def train_teacher(run: harness.Run, name: str, dataset, num_classes: int, *, arch: str, size: int,
                  epochs: int, seed: int, batch_size: int = 64, lr: float = 0.1,
                  scale: tuple[float, float] = (0.25, 1.0)) -> resnet.ResNet:
    """A classifier trained on single labels; kept in the run's folder for a resumed run to find."""
    model = build_model(arch, num_classes, seed)
    path = run.out / f"{name}.pt"
    if run.recorded(name) is not None and path.exists():
        return harness.load_weights(model, path).to(run.device)
    transform = imagenet.TrainTransform(size, scale=scale, interpolation="bilinear")
    loader = OneHot(imagenet.Loader(
        dataset, min(batch_size, len(dataset)) // run.world_size, transform=transform, shuffle=True,
        seed=seed, drop_last=True, workers=run.args.workers, device=run.device, rank=run.rank,
        world_size=run.world_size, normalize=MEAN_STD), num_classes)
    wrapped = run.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)
    steps = relabel.train(wrapped, loader, optimizer, epochs, warmup_epochs=min(1, epochs - 1),
                          num_classes=num_classes, amp_dtype=run.amp_dtype,
                          resume=run.resumed(name))
    last = run.drive(name, steps, epochs * len(loader))
    run.save(name, model.state_dict())
    run.record(name, {"loss": last.get("loss")})
    return harness.load_weights(model, path)  # the same statistics of BatchNorm in every process


class OneHot:
    """A loader's (images, labels, ...) batches as (images, one-hot targets)."""

    def __init__(self, loader: imagenet.Loader, num_classes: int):
        self.loader, self.num_classes = loader, num_classes
        self.set_epoch = loader.set_epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for images, labels, *_ in self.loader:
            yield images, torch.nn.functional.one_hot(labels, self.num_classes).float()


def picture(path, images: torch.Tensor, topk: torch.Tensor, names, num_classes: int) -> None:
    """Images (N, 3, S, S) uint8, each followed by its two strongest classes' maps."""
    dense = relabel.get_labelmaps(topk, num_classes)
    pictures, titles = [], []
    for image, scores in zip(images, dense):
        best = scores.amax((1, 2)).topk(min(2, num_classes)).indices.tolist()
        pictures += [image, *(figures.overlay(image, scores[c], 0.7) for c in best)]
        titles += ["image", *(str(names[c]) for c in best)]
    figures.image_grid(path, pictures, titles, columns=2 * (1 + len(best)), cell=70)


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, presets=("default", "tiny"))
    parser.add_argument("--store", help="folder of the label maps (default: in --out)")
    parser.add_argument("--top", type=harness.count, default=5, help="classes kept per cell")
    parser.add_argument("--batch", type=harness.count, default=128)
    add = parser.real.add_argument
    add("--teacher", help="checkpoint of the teacher (a state dict)")
    add("--arch", default="resnet50", help="of the teacher")
    add("--size", type=harness.count, default=475, help="side of the squashed images")
    args = parser.parse_args(argv)
    if args.data is not None and args.teacher is None:
        parser.error("--data needs --teacher CHECKPOINT: the classifier that annotates")
    run, tiny = harness.start(parser, argv), args.preset == "tiny"
    if args.data is None:
        single = synthetic.colored_objects(200 if tiny else 3000, 1, seed=1)
        single = imagenet.ArrayImages(single["images"], single["labels"])
        pairs = synthetic.colored_objects(64 if tiny else 2000, seed=2)
        dataset = imagenet.ArrayImages(pairs["images"], pairs["labels"])
        arch, size, num_classes = "small-16", 64, len(synthetic.COLORED_CLASSES)
        model = train_teacher(run, "teacher", single, num_classes, arch=arch, size=32,
                              epochs=1 if tiny else 5, seed=run.seeds[0])
    else:
        dataset, arch, size = imagenet.imagenet(args.data, "train"), args.arch, args.size
        num_classes = len(dataset.classes)
        model = harness.load_weights(build_model(arch, num_classes), args.teacher).to(run.device)
    store = args.store or run.out / f"store-{fingerprint(model)}"
    maps, spent = annotate(run, dataset, model, store, size=size, num_classes=num_classes,
                           arch=arch, k=args.top, batch_size=args.batch)

    rows = list(range(0, len(maps), max(1, len(maps) // 16)))
    images = torch.stack([SquashTransform(size)(dataset.open(row)) for row in rows]).to(run.device)
    dense = relabel.to_dense_classifier(model.forward_features, model.fc).to(run.device).eval()
    with torch.no_grad():
        pixels = normalize(images, *MEAN_STD)
        gap = float((dense(pixels).mean((2, 3)) - model.eval()(pixels)).abs().max())
    if run.figures and run.is_main:
        classes = getattr(dataset, "classes", None) or synthetic.COLORED_CLASSES
        picture(run.figures / "relabel_maps.png", images[:4].cpu(), maps[rows[:4]], classes,
                num_classes)
    seconds = spent["seconds"]
    other = 1 - spent["teacher seconds"] / seconds if seconds else None
    table = [{"images": len(maps), "teacher": f"{arch}, {size} px", "top": maps.meta["k"],
              "cells": f"{maps.meta['height']} x {maps.meta['width']}",
              "bytes per image": sum(f.stat().st_size for f in maps.folder.iterdir()) / len(maps),
              "images/s": spent["images"] / seconds if seconds else None,
              "time outside the teacher": other}]
    run.finish([
        {"claim": "largest |mean of the dense scores - teacher's logits|", "paper": 0.0,
         "this run": gap, "holds": gap < 1e-3},
        {"claim": "share of time outside the teacher below 10 %", "paper": None, "this run": other,
         "holds": None if other is None or args.data is None else other < 0.1}], {"store": table})


if __name__ == "__main__":
    main()
