"""PiT against ViT: image classification, with the spatial grid reduced on the way or not.

    python benchmarks/pit_imagenet.py              embedded shapes, one seed: 1-2 minutes on 2 cores
    python benchmarks/pit_imagenet.py --seeds 5    standard errors: the claim is judged on these
    python benchmarks/pit_imagenet.py --data /data/imagenet100_32 --preset small32 --classes 20 \\
        --seeds 2
    torchrun --nproc_per_node=8 benchmarks/pit_imagenet.py --data /data/imagenet --preset paper \\
        --recipe deit --models pit_s deit_small_patch16_224 --amp bf16 --workers 8
    python benchmarks/pit_imagenet.py --data /data/imagenet --models pit_s \\
        --checkpoint pit_s_809.pth --imagenet-a /data/imagenet-a \\
        --imagenet-v2 /data/imagenetv2-matched-frequency-format-val

Embedded data: PiT, a ViT of equal MACs with the same overlapping patches, and a ViT of three times
the MACs on the same grid, on ten classes of 32-pixel shapes. Expect 52, 48 and 58 % (+-1.4, ten
seeds); the gap of PiT to the ViT of equal MACs is 4.6 +- 1.7 points, so one seed decides nothing.
Equal MACs are not equal parameters: PiT has 5.4 times as many.

--data (an ImageNet-layout folder or a pack of one): preset "paper" (the default there) trains
published models at 224 pixels by one of the four recipes of the paper's main table; "small32" and
"medium32" train a PiT and a ViT of equal MACs and stride on 32-pixel images (CPU minutes, GPU
minutes). Expected top-1 after 300 epochs: PiT-S 73.3 vanilla, 79.0 CutMix, 80.9 DeiT, 81.9
distilled. How the paper trained "vanilla" and "CutMix" is not published in detail; here they are
the DeiT optimiser and schedule with only crops and flips, then with CutMix on every batch.

--checkpoint evaluates instead of training: validation set, hidden centre, FGSM, and the robustness
sets given.
"""

import argparse
import math
from pathlib import Path

import harness
import torch

from data_tools import imagenet
from data_tools.synthetic import CLASSES, Batches, shapes, to_float
from reference import pit, resnet

# One-stage models are ViTs with the given stride; MACs follow from the widths.
TOY = {"PiT": dict(patch_size=8, stride=4, base_dims=(16,) * 3, depth=(1, 2, 1), heads=(2, 4, 8),
                   mlp_ratio=2),
       "ViT": dict(patch_size=8, stride=4, base_dims=(16,), depth=(4,), heads=(2,), mlp_ratio=2),
       "ViT-large": dict(patch_size=8, stride=4, base_dims=(16,), depth=(4,), heads=(4,),
                         mlp_ratio=2)}
MEDIUM = {"PiT": dict(patch_size=4, stride=2, base_dims=(32,) * 3, depth=(2, 6, 4),
                      heads=(2, 4, 8)),
          "ViT": dict(patch_size=4, stride=2, base_dims=(28,), depth=(12,), heads=(2,))}
PRESETS = {
    "default": dict(models=TOY, size=32, epochs=10, batch=64, lr=2e-3, warmup=1, min_lr=0.0,
                    images=(3000, 1000)),
    "tiny": dict(models=TOY, size=32, epochs=2, batch=16, lr=2e-3, warmup=1, min_lr=0.0,
                 images=(48, 50), scale=(0.5, 1.0), crop=1.0),
    "small32": dict(models={k: TOY[k] for k in ("PiT", "ViT")}, size=32, epochs=25, batch=64,
                    lr=2e-3, warmup=1, min_lr=0.0, scale=(0.5, 1.0), crop=1.0),
    "medium32": dict(models=MEDIUM, size=32, epochs=100, batch=512, lr=1e-3, warmup=5, min_lr=1e-5,
                     scale=(0.35, 1.0), crop=1.0),
    "paper": dict(models={}, size=224, epochs=300, batch=1024, lr=None, warmup=5, min_lr=1e-5,
                  scale=(0.08, 1.0), crop=0.9),
}
PAPER_TOP1 = {  # vanilla, +CutMix, +DeiT, +distillation (arXiv:2103.16302, main table)
    "deit_tiny": (68.7, 68.5, 72.2, 74.5), "pit_ti": (71.3, 72.6, 73.0, 74.6),
    "pit_xs": (72.4, 76.8, 78.1, 79.1),
    "deit_small": (68.7, 76.5, 79.8, 81.2), "pit_s": (73.3, 79.0, 80.9, 81.9),
    "deit_base": (69.3, 75.3, 81.8, 83.4), "pit_b": (76.1, 79.9, 82.0, 84.0)}
RECIPES = ("vanilla", "cutmix", "deit", "distill")


def training_arguments(description: str) -> argparse.ArgumentParser:
    """What a script takes that trains by these presets (`settings`, `embedded`, `real`)."""
    parser = harness.parser(description, presets=tuple(PRESETS))
    add = parser.add_argument
    add("--image-size", type=harness.count)
    add("--epochs", type=harness.count)
    add("--batch-size", type=harness.count, help="over all processes")
    add("--lr", type=float)
    add = parser.real.add_argument
    add("--classes", type=harness.count, help="only the first K classes")
    add("--on-bad-image", choices=("raise", "skip"), default="raise")
    add("--crop", type=float,
        help="evaluation crop ratio (default 0.9 at 224 pixels; DeiT's script has 0.875)")
    parser.set_defaults(recipe="vanilla", models=None, checkpoint=None)
    return parser


def arguments() -> argparse.ArgumentParser:
    parser = training_arguments(__doc__)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="vanilla",
        help="training recipe of the paper's main table")
    add("--models", nargs="+",
        help="rows to run: names of the preset's table, or of models in reference/pit.py")
    add("--drop-path", type=float,
        help="stochastic depth (default 0.1 with the DeiT recipe, else 0)")
    add("--teacher", nargs=2, metavar=("MODEL", "FILE"),
        help="for --recipe distill: a model of reference/pit.py or resnet.py")
    add("--eps", type=float, nargs="*", default=[1.0, 8.0], help="FGSM steps in 1/255")
    add = parser.real.add_argument
    add("--checkpoint", type=Path, help="evaluate these weights instead of training")
    for name, what in (("a", "A"), ("r", "R"), ("v2", "V2")):
        add(f"--imagenet-{name}", type=Path, help=f"ImageNet-{what} folder")
    add("--sketch", type=Path, help="ImageNet-Sketch folder")
    add("--background", type=Path,
        help="background challenge: the val folder of one variant (mixed_rand, say)")
    add("--in9-map", type=Path, help="in_to_in9.json of the background challenge")
    return parser


def settings(args: argparse.Namespace) -> dict:
    """The preset with the command line's changes."""
    name = "paper" if args.preset == "default" and args.data else args.preset
    if args.data is None and name not in ("default", "tiny"):
        raise SystemExit(f"--preset {name} needs --data (an ImageNet-layout folder)")
    chosen = {"preset": name, **PRESETS[name]}
    given = dict(size=args.image_size, epochs=args.epochs, batch=args.batch_size, lr=args.lr,
                 crop=args.crop)
    chosen.update({key: value for key, value in given.items() if value is not None})
    names = args.models or list(chosen["models"]) or ["pit_s", "deit_small_patch16_224"]
    if args.recipe == "distill":
        names = [distilled_name(name) for name in names]
    unknown = [n for n in names if n not in chosen["models"]
               and not (n.startswith(("pit_", "deit_")) and hasattr(pit, n))]
    if unknown:
        own = ", ".join(chosen["models"]) or "none of its own"
        raise SystemExit(f"--models: no model {unknown[0]!r}; this preset has {own}, and "
                         "reference/pit.py has pit_ti, pit_xs, pit_s, pit_b, "
                         "deit_{tiny,small,base}_patch16_224")
    return {**chosen, "names": names}


def distilled_name(name: str) -> str:
    if "distilled" in name:
        return name
    if name.startswith("deit_"):
        return name.replace("_patch16", "_distilled_patch16")
    return f"{name}_distilled"


def build(config: dict, name: str, num_classes: int, seed: int,
          drop_path: float) -> torch.nn.Module:
    keywords = dict(image_size=config["size"], num_classes=num_classes, drop_path_rate=drop_path)
    if name in config["models"]:
        model = pit.PoolingTransformer(**config["models"][name], **keywords)
    else:
        model = getattr(pit, name)(**keywords)
    init = "deit" if isinstance(model, pit.VisionTransformer) else "official"
    pit.init_weights(model, init, torch.Generator().manual_seed(seed))
    return model


# ---------------------------------------------------------------- data

def embedded(run: harness.Run, config: dict, seed: int):
    """Training and test batches of the shapes; the training set holds each image and its mirror."""
    train, test = (shapes(count, config["size"], seed=2 * seed + i)
                   for i, count in enumerate(config["images"]))
    images = torch.cat([train["images"], train["images"].flip(-1)])
    labels = train["labels"].repeat(2)
    share = dict(batch_size=config["batch"], transform=to_float, rank=run.rank,
                 world_size=run.world_size)
    return (Batches(images, labels, seed=seed, drop_last=True, **share),
            Batches(test["images"], test["labels"], shuffle=False,
                    **{**share, "batch_size": 100 * run.world_size}))


def real(run: harness.Run, config: dict, seed: int, dataset=None):
    """Training and validation batches by the recipe; `dataset` replaces the validation set."""
    args, size = run.args, config["size"]
    common = dict(workers=args.workers, rank=run.rank, world_size=run.world_size, device=run.device,
                  normalize=(pit.IMAGENET_MEAN, pit.IMAGENET_STD), on_bad_image=args.on_bad_image)
    per_process = max(config["batch"] // run.world_size, 1)
    if dataset is None:
        dataset = imagenet.imagenet(args.data, "val", classes=args.classes)
    val = imagenet.Loader(dataset, min(per_process, 256),
                          transform=imagenet.EvalTransform(size, config["crop"]), **common)
    if args.checkpoint:
        return None, val
    train = imagenet.imagenet(args.data, "train", classes=args.classes)
    full = args.recipe in ("deit", "distill")
    transform = imagenet.TrainTransform(size, scale=config["scale"],
                                        augment=pit.RandAugment() if full else None)
    sampler = pit.RepeatedAugSampler(train, run.world_size, run.rank) if full else None
    return imagenet.Loader(train, per_process, transform=transform, shuffle=True, seed=seed,
                           drop_last=True, sampler=sampler, **common), val


class Mixing:
    """Random erasing, then mixup/CutMix, on the device: what the DeiT recipe does to a batch."""

    def __init__(self, mixup: pit.Mixup, erasing: pit.RandomErasing | None):
        self.mixup, self.erasing, self.generator = mixup, erasing, mixup.generator

    def __call__(self, images, labels):
        return self.mixup(self.erasing(images) if self.erasing else images, labels)


def mixing(recipe: str, num_classes: int, generator: torch.Generator):
    if recipe == "vanilla":
        return None
    if recipe == "cutmix":
        return pit.Mixup(0.0, 1.0, label_smoothing=0.0, num_classes=num_classes,
                         generator=generator)
    return Mixing(pit.Mixup(num_classes=num_classes, generator=generator),
                  pit.RandomErasing(generator=generator))


# ---------------------------------------------------------------- training and evaluation

def attacked(model, loader, eps, mean, std, device):
    """The loader's normalised images after an FGSM step of `eps` in pixel values."""
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        pixels = (images * std + mean).clamp(0, 1)
        adversarial = pit.fgsm(model, pixels, labels, eps, mean.flatten().tolist(),
                               std.flatten().tolist())
        yield (adversarial - mean) / std, labels


def measure(run: harness.Run, model, loader, size: int, epsilons: list[float]) -> dict:
    """Top-1 as it is, with the centre hidden (paper: 112 of 224 pixels), and under FGSM."""
    mean, std = (pit.IMAGENET_MEAN, pit.IMAGENET_STD) if run.args.data else ((0.5,) * 3, (0.3,) * 3)
    plain = pit.evaluate(model, loader, device=run.device)
    hole = size // 2 if run.args.data else size // 4    # shapes: about a quarter of the side wide
    hidden = ((pit.occlude_center(x, hole), y) for x, y in loader)
    occluded = pit.evaluate(model, hidden, device=run.device)
    found = {**plain, f"centre {hole} px hidden": occluded["top1"]}
    for eps in epsilons:
        batches = attacked(model, loader, eps / 255, mean, std, run.device)
        found[f"FGSM {eps:g}/255"] = pit.evaluate(model, batches, device=run.device)["top1"]
    return run.mean(found, plain["count"])


def fit(run: harness.Run, config: dict, name: str, seed: int) -> dict:
    """Train one model (or go on), evaluate it, keep weights and figures."""
    args, key = run.args, f"{name}-seed{seed}"
    if (row := run.recorded(key)) is not None:
        return row
    loader, val = real(run, config, seed) if args.data else embedded(run, config, seed)
    num_classes = len(val.dataset.classes) if args.data else len(CLASSES)
    drop_path = args.drop_path
    if drop_path is None:
        drop_path = 0.1 if args.recipe in ("deit", "distill") else 0.0
    model = build(config, name, num_classes, seed, drop_path)
    parameters = sum(p.numel() for p in model.parameters())
    macs = pit.count_macs(model)["total"]
    run.log(f"{key}: {parameters:,} parameters, {macs / 1e6:,.2f} MMACs, "
            f"{len(loader)} steps per epoch")
    generator = torch.Generator(run.device).manual_seed(1000 * seed + run.rank)
    steps = pit.train(
        run.wrap(model), loader, epochs=config["epochs"], lr=config["lr"],
        warmup_epochs=config["warmup"], min_lr=config["min_lr"],
        warmup_lr=1e-6 if config["lr"] is None else config["lr"] / 10,
        mixup=mixing(args.recipe, num_classes, generator), teacher=teacher(run, num_classes),
        amp_dtype=run.amp_dtype, device=run.device,
        generator=None if args.compile else generator, resume=run.resumed(key))
    last = run.drive(key, steps, total=config["epochs"] * len(loader))
    row = measure(run, model, val, config["size"], args.eps)
    row.update(model=name, seed=seed, classes=num_classes, train_loss=last.get("loss", math.nan),
               macs=macs, parameters=parameters)
    run.save(key, {"model": model.state_dict()})
    run.log(f"{key}: top-1 {row['top1']:.2f} % of {row['count']:.0f} images")
    return run.record(key, row)


def teacher(run: harness.Run, num_classes: int):
    if run.args.recipe != "distill":
        return None
    name, file = run.args.teacher
    make = name.startswith(("pit_", "deit_", "resnet")) and (getattr(pit, name, None)
                                                             or getattr(resnet, name, None))
    if not make:
        raise SystemExit(f"--teacher: no model {name!r} in reference/pit.py or reference/resnet.py")
    model = make(num_classes=num_classes)
    load_fitting(model, pit.load_pit_checkpoint(file),
                 f"--teacher: {file} does not fit {name} with {num_classes} classes")
    return model.to(run.device)


def load_fitting(model: torch.nn.Module, state: dict, otherwise: str) -> None:
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"{otherwise}: {error}") from None


def restricted(classes: torch.Tensor, num_classes: int):
    """Logits with all but `classes` at -inf: how ImageNet-A and -R are scored."""
    barred = torch.full((num_classes,), -math.inf)
    barred[classes] = 0
    return lambda logits: logits + barred.to(logits.device)


def grouped(groups: torch.Tensor):
    """The best logit of each of nine groups, and of the classes in none (column 9, never right)."""
    def transform(logits):
        index = torch.where(groups < 0, 9, groups).to(logits.device).expand_as(logits)
        lowest = logits.new_full((len(logits), 10), -math.inf)
        return lowest.scatter_reduce(1, index, logits, "amax")
    return transform


def robustness(run: harness.Run, config: dict, model, num_classes: int) -> dict:
    args, found = run.args, {}
    for kind, path, title in (("a", args.imagenet_a, "ImageNet-A"),
                              ("r", args.imagenet_r, "ImageNet-R"),
                              ("v2", args.imagenet_v2, "ImageNet-V2"),
                              ("sketch", args.sketch, "ImageNet-SKETCH"),
                              ("9", args.background, "background")):
        if path is None:
            continue
        wnids = imagenet.read_wnids(args.data) if kind in ("a", "r", "sketch") else None
        dataset = imagenet.imagenet_variant(path, kind, wnids)
        transform = None
        if kind in ("a", "r"):
            transform = restricted(torch.as_tensor(dataset.labels).unique(), num_classes)
        if kind == "9":
            transform = grouped(imagenet.imagenet9_groups(args.in9_map, num_classes))
        _, loader = real(run, config, 0, dataset)
        metrics = pit.evaluate(model, run.progress(loader, label=path.name), transform, run.device)
        found[title] = run.mean(metrics, metrics["count"])["top1"]
    return found


def evaluate_checkpoint(run: harness.Run, config: dict) -> None:
    (name,) = config["names"]
    _, loader = real(run, config, 0)
    state = pit.load_pit_checkpoint(run.args.checkpoint)
    head = state.get("head.weight")
    if head is None:
        raise SystemExit(f"{run.args.checkpoint} has no head.weight: not a PiT or DeiT classifier")
    if len(head) != len(loader.dataset.classes):
        raise SystemExit(f"{run.args.checkpoint} knows {len(head)} classes, {run.args.data} has "
                         f"{len(loader.dataset.classes)}")
    model = build(config, name, len(head), 0, 0.0)
    load_fitting(model, state, f"{run.args.checkpoint} does not fit {name} at "
                               f"{config['size']} px")
    model = model.to(run.device)
    row = measure(run, model, loader, config["size"], run.args.eps)
    row.update(robustness(run, config, model, len(head)))
    table = [{"set": key, "value": value} for key, value in row.items()]
    run.finish([{"claim": f"{name} top-1, crop {config['crop']:g}",
                 "paper": published(name) if len(head) == 1000 else None,
                 "this run": row["top1"], "holds": None}], {"evaluation": table})


def published(name: str, recipe: str = "deit") -> float | None:
    column = RECIPES.index("distill" if "distilled" in name else recipe)
    name = name.replace("_distilled", "").removesuffix("_224").removesuffix("_patch16")
    return PAPER_TOP1[name][column] if name in PAPER_TOP1 else None


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    values = torch.tensor(values, dtype=torch.float64)
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error


def difference(above: list[float], below: list[float]) -> tuple[str, bool | None]:
    """The mean of above - below over seeds, in words; its sign, if five seeds or more are clear."""
    gap, error = mean_and_error([a - b for a, b in zip(above, below)])
    text = f"{gap:+.1f}" + (" (one seed)" if error is None else f" +- {error:.1f}")
    return text, gap > 0 if len(above) >= 5 and abs(gap) > 2 * error else None


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    config = settings(args)
    names, distill = config["names"], args.recipe == "distill"
    if args.checkpoint:
        refused = ((len(names) != 1, "--checkpoint needs one --models NAME"),
                   (bool(args.background) != bool(args.in9_map),
                    "--background and --in9-map in_to_in9.json need each other"),
                   (any((args.epochs, args.lr, args.drop_path, args.teacher)),
                    "--checkpoint evaluates: no --epochs, --lr, --drop-path and --teacher"))
    else:
        refused = ((any((args.imagenet_a, args.imagenet_r, args.imagenet_v2, args.sketch,
                         args.background, args.in9_map)),
                    "the robustness sets need --checkpoint: they are for trained weights"),
                   (len(set(names)) < len(names), f"--models names one twice: {' '.join(names)}"),
                   (distill and not args.teacher,
                    "--recipe distill needs --teacher MODEL FILE (the paper's: RegNetY-16GF)"),
                   (args.teacher and not distill, "--teacher is for --recipe distill"))
    for wrong, message in refused:
        if wrong:
            parser.error(message)
    run = harness.start(parser, argv)
    if run.args.checkpoint:
        return evaluate_checkpoint(run, config)
    rows = {name: [fit(run, config, name, seed) for seed in run.seeds] for name in names}

    probes = [key for key in rows[names[0]][0] if "hidden" in key or "FGSM" in key]
    table, bars = [], {}
    for name, results in rows.items():
        top1, *others = (mean_and_error([row[key] for row in results])
                         for key in ("top1", *probes))
        table.append({"model": name, "parameters": int(results[0]["parameters"]),
                      "MMACs": results[0]["macs"] / 1e6, "top-1": top1[0], "std. error": top1[1],
                      **{key: mean for key, (mean, _) in zip(probes, others)}})
        means, errors = zip(top1, *others)
        bars[name] = list(means), [error or 0 for error in errors]

    with torch.device("meta"):
        small = pit.count_macs(pit.pit_s())["total"]
        deit = pit.count_macs(pit.deit_small_patch16_224())["total"]
    claims = [{"claim": "MACs of PiT-S over those of DeiT-S", "paper": round(2.9 / 4.6, 3),
               "this run": small / deit,
               "holds": round(small / 1e9, 1) == 2.9 and round(deit / 1e9, 1) == 4.6}]
    if {"PiT", "ViT"} <= set(rows):
        gap, holds = difference([row["top1"] for row in rows["PiT"]],
                                [row["top1"] for row in rows["ViT"]])
        claims.append({"claim": "PiT minus ViT of equal MACs and stride, top-1",
                       "paper": "PiT above", "this run": gap, "holds": holds})
    else:
        imagenet1k = {row["classes"] for row in rows[names[0]]} == {1000}
        claims += [{"claim": f"{name} top-1, {run.args.recipe}",
                    "paper": published(name, run.args.recipe) if imagenet1k else None,
                    "this run": mean_and_error([row["top1"] for row in results])[0], "holds": None}
                   for name, results in rows.items()]
    if run.figures and run.is_main:
        import figures
        seeds = f"{len(run.seeds)} seed{'s' * (len(run.seeds) > 1)}"
        figures.bar_chart(run.figures / "pit_accuracy.png", ["top-1", *probes], bars,
                          ylabel="accuracy, %", title=f"{seeds}, mean and standard error")
    run.finish(claims, {"models": table})


if __name__ == "__main__":
    main()
