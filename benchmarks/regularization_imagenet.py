"""Regularisers on ImageNet: ResNet-50 by the recipe of the CutMix authors, measured as in
regularization_cifar100.py.

    python benchmarks/regularization_imagenet.py            # embedded shapes, a small ResNet, 1 min
    torchrun --nproc_per_node=8 benchmarks/regularization_imagenet.py --data /data/imagenet \\
        --preset paper --amp bf16 --workers 16 --corrupted /data/imagenet-c \\
        --methods baseline cutmix                           # about 2 days per row on 8 GPUs

Recipe: 300 epochs, batch 256, SGD 0.1 divided by 10 every 75 epochs, weight decay 1e-4 on
everything; random resized crop, flip, colour jitter 0.4, PCA lighting 0.1. Evaluation: 256 to 224
centre crop. Published top-1 errors of that code are printed beside. --corrupted: the ImageNet-C
folders; without it the corruptions are computed on --images validation images. The temperature is
fitted on every second image and judged on the others.
"""

import harness
import numpy as np
import regularization_cifar100 as study
import torch

from data_tools import corruptions, imagenet, synthetic
from reference import regularization, resnet, robustness

PAPER = {"baseline": 23.68, "cutmix": 21.40, "feature-cutmix": 21.80, "mixup": 22.58,
         "manifold-mixup": 22.50, "cutout": 22.93, "dropblock": 21.87}
# network, side, epochs, batch, methods, images of corruptions and PGD, severities
PRESETS = {
    "default": ("small", 16, 8, 50, ("baseline", "cutmix", "label-smoothing"), 100, (1, 3, 5)),
    "tiny": ("small", 16, 1, 50, ("baseline",), 20, (3,)),
    "paper": ("resnet50", 224, 300, 256, (*PAPER, "label-smoothing"), 5000, (1, 2, 3, 4, 5)),
}
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def jitter(x, generator, strength=0.4, lighting=0.1):
    """Brightness, contrast and saturation by factors 1 + U(-strength, strength), their order drawn
    per batch, then PCA lighting; x (B, 3, H, W) in [0, 1], not clamped, factors per image."""
    grey_of = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
    draws = torch.rand(3, len(x), 1, 1, 1, generator=generator).to(x.device)
    factors = 1 + strength * (2 * draws - 1)
    for kind in torch.randperm(3, generator=generator).tolist():
        grey = (x * grey_of).sum(1, keepdim=True)
        anchor = (0.0, grey.mean((2, 3), keepdim=True), grey)[kind]
        x = anchor + (x - anchor) * factors[kind]
    alpha = lighting * torch.randn(len(x), 3, generator=generator).to(x.device)
    shift = (alpha * alpha.new_tensor(EIGENVALUES)) @ alpha.new_tensor(EIGENVECTORS).T
    return x + shift[:, :, None, None]


class Augmented:
    """A loader of uint8 batches, jittered and normalised; draws depend on (seed, epoch, batch)."""

    def __init__(self, loader, seed, mean, std):
        self.loader, self.seed, self.epoch, self.start = loader, seed, 0, 0
        self.mean, self.std = (torch.as_tensor(v, dtype=torch.float32).view(3, 1, 1)
                               for v in (mean, std))

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch, start_batch=0):
        self.epoch, self.start = epoch, start_batch
        self.loader.set_epoch(epoch, start_batch)

    def __iter__(self):
        for number, (x, y) in enumerate(self.loader, self.start):
            key = (self.seed * 100_003 + self.epoch) * 1_000_003 + number
            generator = torch.Generator().manual_seed(key)
            x = jitter(x.float() / 255, generator)
            yield (x - self.mean.to(x.device)) / self.std.to(x.device), y


class Pixels:
    """A loader's uint8 images as floats in [0, 1]; can be read again."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return ((x.float() / 255, y) for x, y in self.loader)


def main(argv=None):
    parser = harness.parser(__doc__, presets=tuple(PRESETS))
    add = parser.add_argument
    usable = [m for m in study.METHODS if "shakedrop" not in study.METHODS[m]]
    add("--methods", nargs="+", choices=usable, metavar="NAME", help=f"of {', '.join(usable)}")
    add("--arch", choices=("small", *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))))
    add("--epochs", type=harness.count)
    parser.real.add_argument("--corrupted", type=study.Path,
                             help="ImageNet-C: <corruption>/<severity>/<class>/*.JPEG")
    add("--images", type=harness.count, help="validation images for computed corruptions and PGD")
    args = parser.parse_args(argv)
    arch, size, epochs, batch, methods, few, severities = PRESETS[args.preset]
    arch, epochs = args.arch or arch, args.epochs or epochs
    few, methods = args.images or few, args.methods or methods
    for folder in (args.corrupted / name / str(s) for name in corruptions.TEST_CORRUPTIONS
                   for s in severities) if args.corrupted else ():
        if not folder.is_dir():
            parser.error(f"--corrupted: no folder {folder}")
    run = harness.start(parser, argv)
    if batch % run.world_size:
        parser.error(f"the batch of {batch} does not divide among {run.world_size} processes")
    mean, std = imagenet.IMAGENET_MEAN, imagenet.IMAGENET_STD
    share = {"rank": run.rank, "world_size": run.world_size}

    if args.data is None:
        count = 200 if args.preset == "tiny" else 1000
        train, test = (study.bright_shapes(count, seed) for seed in (100, 101))
        classes, few_images = 5, test["images"][:few].permute(0, 2, 3, 1).numpy()
        few_labels = test["labels"][:few].numpy()
        val = Pixels(synthetic.Batches(test["images"], test["labels"], batch_size=250,
                                       shuffle=False))

        def loader_of(seed):
            return Augmented(synthetic.Batches(
                train["images"], train["labels"], batch_size=batch, seed=seed, drop_last=True,
                **share), seed, mean, std)
    else:
        data, held = (imagenet.imagenet(args.data, split) for split in ("train", "val"))
        classes, view = len(data.classes), imagenet.EvalTransform(size, 0.875, "bilinear")
        common = {"workers": args.workers, "device": run.device}
        val = Pixels(imagenet.Loader(held, 256, transform=view, **common))
        chosen = np.random.RandomState(0).permutation(len(held))[:few]
        few_images = np.stack([view(held[int(i)][0]).permute(1, 2, 0).numpy()
                               for i in run.progress(chosen, label="images")])
        few_labels = np.asarray(held.labels)[chosen]

        def loader_of(seed):
            transform = imagenet.TrainTransform(size, interpolation="bilinear")
            return Augmented(imagenet.Loader(
                data, batch // run.world_size, transform=transform, shuffle=True, seed=seed,
                drop_last=True, **common, **share), seed, mean, std)

    def corrupted(name, severity):
        if args.corrupted is None:
            damaged = corruptions.corrupt_batch(few_images, name, severity, "imagenet")
            return study.batches(damaged, few_labels)
        folder = imagenet.ImageFolder(args.corrupted / name / str(severity), classes=data.classes)
        stored = imagenet.EvalTransform(size, 1.0, "bilinear")  # the files are 224 x 224 already
        return Pixels(imagenet.Loader(folder, 256, transform=stored, workers=args.workers,
                                      device=run.device))

    ood = {name: study.batches(images)
           for name, images in study.noise_images(min(few, 2000), size).items()}
    results = {method: [] for method in methods}
    for seed in run.seeds:
        for method in methods:
            name = f"{method}-seed{seed}"
            if (row := run.recorded(name)) is None:
                generator = torch.Generator().manual_seed(seed)
                if arch == "small":
                    net = resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), classes, width=16,
                                        small_stem=True, generator=generator)
                else:
                    net = getattr(resnet, arch)(classes, generator=generator)
                if rate := study.METHODS[method].get("dropblock"):
                    for layer in (net.layer3, net.layer4):
                        layer.append(regularization.DropBlock2d(rate, 7))
                model, loader = run.wrap(net), loader_of(seed)
                optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True,
                                            weight_decay=1e-4)
                total = len(loader) * epochs
                quarters = [total // 4, total // 2, total * 3 // 4]
                regularizer = study.regularizer_of(method, size, mean, std)
                regularizer.prob = 1.0  # ImageNet: every batch is mixed
                run.drive(name, regularization.train(
                    model, loader, optimizer, regularizer=regularizer, epochs=epochs,
                    schedule=regularization.step_schedule(0.1, quarters),
                    device=run.device, amp=run.amp_dtype or False, resume=run.resumed(name),
                    generator=torch.Generator().manual_seed(1000 * seed + run.rank)), total)
                row = study.measure(net, val, mean, std, occlusion=size // 2, ood=ood,
                                    corrupted=corrupted, severities=severities,
                                    sample=study.batches(few_images, few_labels))
                errors = {n: float(np.mean(e)) for n, e in row["corruptions"].items()}
                row["mce"] = robustness.mce(errors) / 100
                row = run.record(name, row)
            results[method].append(row)
    paper = PAPER if arch == "resnet50" and args.data is not None else None
    tables = study.tables_of(results, paper)
    for line in tables["main"]:
        line["mCE"] = study.show(results[line["method"]], "mce")
    if run.figures is not None and run.is_main:
        study.draw(run.figures, results, "regularization_imagenet")
    run.finish(study.claims_of(results, paper), tables)


if __name__ == "__main__":
    main()
