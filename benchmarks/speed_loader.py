"""Images per second and core: torchvision's pipeline, this project's folder loader, and its packs.

    python benchmarks/speed_loader.py                        # generated photographs, a minute
    python benchmarks/speed_loader.py --data /data/imagenet  # train/ and val/, or class folders
    python benchmarks/speed_loader.py --workers 8 --images 4096      # whole machine, wall time

Every pipeline makes normalised float32 batches of 224 x 224 random resized crops (bicubic, flipped)
out of the same files; torchvision does it per image as its users do (ImageFolder,
RandomResizedCrop, ToTensor, Normalize), the others keep uint8 and normalise the batch. "uint8" is
what a GPU box pays for on the CPU: there the normalisation runs on the GPU. One process without
workers is timed by its CPU time (the files are in the page cache), rounds interleaved; the ratio is
the median over rounds. Expected: folder 1.5 to 2 times torchvision, JPEG pack above 2, raw pack 4
to 5 on files with a short side of 256; from larger originals the folder pays for pixels which the
packs have dropped.
"""

import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import timing
import torch
from PIL import Image

from data_tools import imagenet as data
from data_tools.pack import pack

try:
    from torchvision import datasets, transforms
except Exception:  # not installed
    datasets = None

NORMALIZE = (data.IMAGENET_MEAN, data.IMAGENET_STD)
PIPELINES = ("folder", "folder, uint8", "pack", "pack, uint8", "raw pack", "raw pack, uint8")


def write_photographs(root: Path, count: int, short_side: int, seed: int) -> None:
    """Noise with the 1/f spectrum of photographs, as JPEGs of 4:3, about 0.3 bytes a pixel."""
    rng = np.random.default_rng(seed)
    size = short_side * 4 // 3, short_side
    for i in range(count):
        layers = np.zeros((size[1], size[0], 3), np.float32)
        for octave in range(2, 9):
            noise = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
            layers += (np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32)
                       - 128) * 1.4 * 0.6**octave
        folder = root / f"n{i % 8:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(layers * 2 + 128, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.JPEG", quality=85)


def copy_photographs(source: Path, root: Path, count: int) -> None:
    """count images of the source, drawn at random, repeated if it holds fewer."""
    dataset = data.imagenet(source) if (source / "train").is_dir() else data.ImageFolder(source)
    chosen = random.Random(0).sample(range(len(dataset)), min(count, len(dataset)))
    for i in range(count):
        path = dataset.root / dataset.name(chosen[i % len(chosen)])
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / path.parent.name / f"{i}{path.suffix}")


def loaders(root: Path, scratch: Path, batch_size: int, workers: int) -> dict[str, object]:
    """The pipelines over the same files, by name."""
    sources = {"folder": data.ImageFolder(root)}
    for name, raw in (("pack", False), ("raw pack", True)):
        pack(root, scratch / name, raw=raw, workers=max(1, workers))
        sources[name] = data.imagenet(scratch / name, "val")
    out = {}
    if datasets is not None:
        steps = [
            transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*NORMALIZE),
        ]
        out["torchvision"] = torch.utils.data.DataLoader(
            datasets.ImageFolder(str(root), transforms.Compose(steps)),
            batch_size=batch_size, shuffle=True, num_workers=workers,
            persistent_workers=workers > 0,
        )
    for name in PIPELINES:
        out[name] = data.Loader(
            sources[name.removesuffix(", uint8")], batch_size, transform=data.TrainTransform(224),
            shuffle=True,
            workers=workers, normalize=None if name.endswith("uint8") else NORMALIZE,
        )
    return out


def measure(loader: object, clock) -> float:
    """Images per second of one epoch."""
    began = clock()
    count = sum(len(batch[0]) for batch in loader)
    return count / (clock() - began)


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, networks=False, figures=False)
    parser.add_argument("--images", type=harness.count, default=256, help="files per measurement")
    parser.add_argument("--repeats", type=harness.count, default=11)
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    run = harness.start(parser, argv)
    args = run.args
    torch.set_num_threads(max(1, args.threads))
    images, repeats = (32, 2) if args.preset == "tiny" else (args.images, args.repeats)
    clock = time.perf_counter if args.workers else time.process_time
    run.log("torchvision is not installed: no ratio to it" if datasets is None
            else "beside torchvision's pipeline")
    table, ratios = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if args.data is not None:
            copy_photographs(args.data, scratch / "given", images)
            sets = ["given"]
        else:
            sets = ["256 px", "375 px"]
            for name in sets:
                write_photographs(scratch / name, images, int(name.split()[0]), run.seeds[0])
        for name in sets:
            pipelines = loaders(scratch / name, scratch / f"packs of {name}", 32, args.workers)
            rates = {key: [] for key in pipelines}
            for loader in pipelines.values():
                measure(loader, clock)  # page cache, worker start
            for _ in run.progress(range(repeats), label=name):
                for key, loader in pipelines.items():
                    rates[key].append(measure(loader, clock))
            for key, values in rates.items():
                row = {"files": name, "pipeline": key, "images/s": statistics.median(values)}
                for other in ("torchvision", "folder"):
                    if other in rates:
                        row[f"x {other}"] = timing.ratio(rates, key, other)
                        ratios[name, key, other] = row[f"x {other}"]
                table.append(row)
    rows = []
    bounds = (("folder", "torchvision", 1.0), ("pack", "torchvision", 2.0),
              ("raw pack", "folder", 2.0))
    for name in sets:
        for key, other, bound in bounds:
            if (name, key, other) in ratios:
                ratio = ratios[name, key, other]
                claim = f"{name}: {key} at least {bound:g} x {other}"
                rows.append({"claim": claim, "paper": None, "this run": ratio,
                             "holds": ratio >= bound})
    run.finish(rows, {"loader": table}, images=images, workers=args.workers)


if __name__ == "__main__":
    main()
