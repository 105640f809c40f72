"""Regularisers compared on accuracy, robustness and uncertainty (Chun et al., arXiv:2003.03879), 32-pixel images.

    python benchmarks/regularization_cifar100.py                              # embedded shapes, 3 seeds, ~12 minutes
    python benchmarks/regularization_cifar100.py --data imagenet100_32 --preset small --classes 20
    torchrun --nproc_per_node=2 benchmarks/regularization_cifar100.py --data cifar-100-python --preset paper \\
        --methods all --amp bf16                                              # PyramidNet-200, 300 epochs per row

Rows: regularisers and combinations (--methods NAME ..., "all"). Columns: top-1 error, error under FGSM and PGD, with
the centre hidden, and under the common corruptions; ECE, NLL, temperature; detection of out-of-distribution images.
--data: the CIFAR-100 or CIFAR-10 pickles, or train/<class>, val/<class> folders of small images of one size.
--ood DIR adds out-of-distribution sets, DIR/<name>/**/*.png. Top-1 errors of the CutMix authors' code, PyramidNet-200
on CIFAR-100, stand beside those of the paper preset; the workshop paper's own tables are not reproduced here.
Expected on the shapes: cutout halves the error with the centre hidden; label smoothing, mixup and cutmix lower the
confidence, so that their ECE gains most from a temperature.
"""

import statistics
from pathlib import Path

import harness
import figures
import numpy as np
import torch
from PIL import Image

from data_tools import corruptions, imagenet, synthetic
from reference import pyramidnet, regularization, robustness

# method -> settings of regularization.Regularizer, and of the network (shakedrop, dropblock); "fgsm": adversary
METHODS = {
    "baseline": {},
    "cutout": {"input": "cutout"},
    "mixup": {"input": "mixup"},
    "cutmix": {"input": "cutmix", "prob": 0.5},
    "manifold-mixup": {"feature": "mixup", "modules": ["", "layer2", "layer3"]},
    "feature-cutmix": {"feature": "cutmix", "modules": ["layer2", "layer3"], "prob": 0.5},
    "label-smoothing": {"label_smoothing": 0.1},
    "noise": {"input": "noise"},
    "shakedrop": {"shakedrop": 0.5},
    "dropblock": {"dropblock": 0.1},
    "cutout+ls": {"input": "cutout", "label_smoothing": 0.1},
    "dropblock+ls": {"dropblock": 0.1, "label_smoothing": 0.1},
    "cutout+mixup": {"input": ["cutout", "mixup"]},
    "shakedrop+cutmix": {"shakedrop": 0.5, "input": "cutmix", "prob": 0.5},
    "fgsm-training": {"fgsm": True},
    "logit-pairing": {"fgsm": True, "pairing": 0.5},
}
PAPER = {"baseline": 16.45, "cutmix": 14.23, "shakedrop+cutmix": 13.81, "mixup": 15.63, "manifold-mixup": 16.14,
         "cutout": 16.53, "dropblock": 15.73, "cutout+ls": 15.61, "dropblock+ls": 15.16, "cutout+mixup": 15.46}
SHORT = ("baseline", "cutout", "mixup", "cutmix", "manifold-mixup", "label-smoothing", "cutout+ls", "fgsm-training")
# network, epochs, batch, lr, weight decay, methods, test images of the corruptions and of PGD, severities
PRESETS = {
    "default": ("pyramid-8", 12, 50, 0.1, 5e-4, SHORT, 100, (1, 3, 5)),
    "tiny": ("pyramid-8", 1, 50, 0.1, 5e-4, ("baseline", "cutmix"), 20, (1, 5)),
    "small": ("wide-10-1", 6, 64, 0.1, 5e-4, ("baseline", "cutout", "mixup", "cutmix", "label-smoothing",
                                            "fgsm-training"), 200, (1, 3, 5)),
    "paper": ("pyramid-200", 300, 64, 0.25, 1e-4, tuple(PAPER), 10_000, (1, 2, 3, 4, 5)),
}
CIFAR_MEAN, CIFAR_STD = np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255
EPS = (1, 2, 4, 8)


# ---------------------------------------------------------------- what is measured (the ImageNet script uses it too)

def batches(images, labels=None, size=250):
    """Pixel-space float batches of uint8 (N, H, W, 3) arrays; a list, so that it can be read again."""
    labels = np.zeros(len(images), np.int64) if labels is None else np.asarray(labels)
    return [(torch.from_numpy(np.array(images[i:i + size])).permute(0, 3, 1, 2).float() / 255,
             torch.from_numpy(labels[i:i + size])) for i in range(0, len(images), size)]


def measure(net, loader, mean, std, *, occlusion, corrupted=None, names=corruptions.TEST_CORRUPTIONS,
            severities=(1, 2, 3, 4, 5), ood=None, pgd_images=10_000):
    """One row of the study for a network that takes normalised images.

    loader: (x in [0, 1], y) batches. corrupted(name, severity) and ood[name] are such loaders too.
    """
    device = next(net.parameters()).device
    mean, std = (torch.as_tensor(np.asarray(v), dtype=torch.float32, device=device).view(-1, 1, 1) for v in (mean, std))

    def logits(data, change=lambda x, y: (x - mean) / std):
        moved = ((x.to(device), y.to(device)) for x, y in data)
        return robustness.predict(net, ((change(x, y), y) for x, y in moved))

    def attacked(attack, **settings):
        return lambda x, y: (attack(net, x, y, mean=mean, std=std, **settings) - mean) / std

    def error(result):
        return (result[0].argmax(1) != result[1]).double().mean().item()

    z, y = logits(loader)
    row = {key: value for key, value in robustness.evaluate_logits(z, y).items()}
    for k in EPS:
        row[f"fgsm_{k}"] = error(logits(loader, attacked(robustness.fgsm, eps=k / 255)))
    few, count = [], 0
    for batch in loader:
        few.append(tuple(part[:pgd_images - count] for part in batch))
        count += len(few[-1][0])
        if count >= pgd_images:
            break
    row["pgd_8"] = error(logits(few, attacked(robustness.pgd, eps=8 / 255, step_size=2 / 255, n_steps=10)))
    for kind in ("center", "boundary"):
        hidden = logits(loader, lambda x, y: robustness.occlude((x - mean) / std, occlusion, kind))  # noqa: B023
        row[f"occlusion_{kind}"] = error(hidden)
    fit, held = slice(0, None, 2), slice(1, None, 2)          # T is fitted on one half and judged on the other
    T = robustness.fit_temperature(z[fit], y[fit])
    row |= {"T": T, "ece_held": robustness.expected_calibration_error(z[held], y[held]),
            "ece_T": robustness.expected_calibration_error(z[held] / T, y[held]),
            "nll_held": robustness.nll(z[held], y[held]), "nll_T": robustness.nll(z[held] / T, y[held])}
    table = robustness.reliability_table(z, y)
    row["reliability"] = {key: table[key].tolist() for key in ("count", "confidence", "accuracy")}
    if corrupted is not None:
        errors = {name: [error(logits(corrupted(name, s))) for s in severities] for name in names}
        row["corruptions"] = errors
        row["corruption"] = statistics.mean(statistics.mean(errors[n]) for n in corruptions.TEST_CORRUPTIONS)
        for group, members in corruptions.GROUPS.items():
            if all(name in errors for name in members):
                row[f"corruption_{group}"] = statistics.mean(statistics.mean(errors[n]) for n in members)
        row["corruption_by_severity"] = [statistics.mean(column) for column in zip(*errors.values())]
    scores = robustness.ood_score(z.double())
    row["ood"] = {name: robustness.ood_metrics(scores, robustness.ood_score(logits(data)[0].double()))
                  for name, data in (ood or {}).items()}
    for key in ("tnr95", "auroc", "detection_accuracy") if ood else ():
        row[key] = statistics.mean(metrics[key] for metrics in row["ood"].values())
    return row


def noise_images(count, size, seed=0):
    """Uniform and Gaussian noise, the two synthetic out-of-distribution sets of the ODIN protocol."""
    rng = np.random.RandomState(seed)
    gaussian = (rng.normal(0.5, 1, (count, size, size, 3)).clip(0, 1) * 255).astype(np.uint8)
    return {"uniform": rng.randint(0, 256, (count, size, size, 3)).astype(np.uint8), "gaussian": gaussian}


def folder_images(folder, size):
    files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in corruptions.EXTENSIONS)
    if not files:
        raise SystemExit(f"--ood: no images under {folder}")
    return np.stack([np.asarray(Image.open(f).convert("RGB").resize((size, size), Image.BILINEAR)) for f in files])


# ---------------------------------------------------------------- data and networks

def bright_shapes(count, seed):
    """Five plain shapes of 16 pixels in light colours on dark ones."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=draw)
    masks = synthetic.shapes(count, 16, seed, labels=2 * labels)["masks"]
    back, front = 0.55 * torch.rand(2, count, 3, 1, 1, generator=draw)
    images = torch.where(masks[:, None], front + 0.4, back) + 0.12 * torch.randn(count, 3, 16, 16, generator=draw)
    return {"images": synthetic.to_uint8(images), "labels": labels}


def load(run, per_class):
    """(function of a seed -> training loader, test images and labels, classes, mean, std, more OOD images)."""
    args, tiny = run.args, run.args.preset == "tiny"
    batch, share = PRESETS[args.preset][2] * run.world_size, {"rank": run.rank, "world_size": run.world_size}
    if args.data is None:
        train, test = (bright_shapes(count, seed) for count, seed in ((200 if tiny else 1000, 100), (60 if tiny else 500, 101)))
        images, mean, std = test["images"].permute(0, 2, 3, 1).numpy(), np.full(3, 0.5), np.full(3, 0.3)
        shuffled = images.reshape(len(images), -1, 3)[:, np.random.RandomState(0).permutation(256)]
        return (lambda seed: synthetic.Batches(train["images"], train["labels"], batch_size=batch, seed=seed,
                                               transform=synthetic.to_float, drop_last=True, **share),
                images, test["labels"].numpy(), len(synthetic.SHAPES), mean, std,
                {"shuffled": shuffled.reshape(images.shape)})
    cifar = {"train": "cifar100", "data_batch_1": "cifar10"}
    kind = next((name for file, name in cifar.items() if any(args.data.glob(f"{file}")) and
                 not (args.data / file).is_dir()), None)
    kind = kind or ("cifar100" if (args.data / "cifar-100-python").is_dir() else None)
    extra = {}
    if kind:
        train, test = (imagenet.cifar(args.data, kind, train=t) for t in (True, False))
        classes = 100 if kind == "cifar100" else 10
        test_images, test_labels = test.images, test.labels
    else:
        every = imagenet.class_folders(args.data / "train")
        classes = min(args.classes or len(every), len(every))

        def arrays(split, names, limit=None):
            data = imagenet.imagenet(args.data, split, classes=names)
            labels = np.asarray(data.labels)
            keep = np.concatenate([np.flatnonzero(labels == c)[:limit] for c in range(len(names))])
            return np.stack([np.asarray(data[int(i)][0]) for i in keep]), labels[keep]

        train = imagenet.ArrayImages(*arrays("train", every[:classes], per_class))
        test_images, test_labels = arrays("val", every[:classes])
        if len(every) >= 2 * classes:
            extra["other classes"] = arrays("val", every[classes:2 * classes])[0]
    loader = lambda seed: imagenet.Loader(                    # noqa: E731
        train, batch // run.world_size, transform=imagenet.PadCropTransform(), shuffle=True, seed=seed,
        workers=args.workers, drop_last=not kind, device=run.device, normalize=(CIFAR_MEAN.tolist(), CIFAR_STD.tolist()), **share)
    return loader, test_images, test_labels, classes, CIFAR_MEAN, CIFAR_STD, extra


def build(name, classes, seed, shakedrop=0.0, dropblock=0.0, size=32):
    generator = torch.Generator().manual_seed(seed)
    kind, depth, *width = name.split("-")
    if kind == "wide":
        if shakedrop:
            raise SystemExit(f"ShakeDrop needs a PyramidNet, not {name}")
        net = pyramidnet.WideResNet(int(depth), int(width[0]), classes, generator=generator)
    else:
        deep = int(depth) == 200
        net = pyramidnet.PyramidNet(int(depth), 240 if deep else 24, classes, bottleneck=deep, shakedrop=shakedrop,
                                    generator=generator)
    if dropblock:                                             # blocks of 7 on 32-pixel images, in proportion on smaller
        for layer in (net.layer2, net.layer3):
            layer.append(regularization.DropBlock2d(dropblock, max(1, 7 * size // 64) | 1))
    return net


def regularizer_of(method, size, mean, std):
    """The Regularizer of a row, for normalised images; network settings are left out."""
    settings = {k: v for k, v in METHODS[method].items() if k not in ("shakedrop", "dropblock", "fgsm")}
    if METHODS[method].get("fgsm"):
        shift, scale = (torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

        def adversary(model, x, y):
            m, s = shift.to(x.device), scale.to(x.device)
            return (robustness.fgsm(model, x * s + m, y, 8 / 255, mean=m, std=s) - m) / s

        settings["adversary"] = adversary
    return regularization.Regularizer(length=size // 2, sigma=0.1 / float(np.mean(std)), clip=None, **settings)


# ---------------------------------------------------------------- tables, claims, pictures

def summary(rows, key, scale=100.0):
    """Mean and deviation of a key over the seeds' rows."""
    values = [scale * row[key] for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def show(rows, key, scale=100.0, digits=1):
    mean, deviation = summary(rows, key, scale)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(rows) > 1 else "")


def tables_of(results, paper=None):
    main, detail, ood = [], [], []
    for method, rows in results.items():
        line = {"method": method, "error": show(rows, "error")}
        if paper is not None:
            line["error, CutMix code"] = paper.get(method, "")
        columns = {"FGSM 8/255": "fgsm_8", "PGD 8/255": "pgd_8", "centre hidden": "occlusion_center",
                   "corruptions": "corruption", "ECE": "ece", "ECE after T": "ece_T"}
        line |= {title: show(rows, key) for title, key in columns.items() if key in rows[0]}
        line |= {"acc - conf": show(rows, "gap"), "T": show(rows, "T", 1, 2), "NLL": show(rows, "nll", 1, 3)}
        if "auroc" in rows[0]:
            line |= {"OOD AUROC": show(rows, "auroc"), "TNR95": show(rows, "tnr95")}
        main.append(line)
        groups = {f"{g}": f"corruption_{g}" for g in corruptions.GROUPS if f"corruption_{g}" in rows[0]}
        detail.append({"method": method, **{f"FGSM {k}/255": show(rows, f"fgsm_{k}") for k in EPS},
                       "border hidden": show(rows, "occlusion_boundary"),
                       **{title: show(rows, key) for title, key in groups.items()}, "Brier": show(rows, "brier", 1, 3),
                       "NLL after T": show(rows, "nll_T", 1, 3)})
        for name in rows[0]["ood"]:
            metrics = [row["ood"][name] for row in rows]
            ood.append({"method": method, "set": name, **{k: show(metrics, k) for k in metrics[0]}})
    return {"main": main, "robustness": detail, **({"ood": ood} if ood else {})}


def compare(results, key, better, than="baseline", factor=1.0):
    """Is `better`'s mean of key below factor x that of `than`? None where the seeds cannot tell (within one deviation)."""
    if better not in results or than not in results:
        return None
    (a, da), (b, db) = summary(results[better], key), summary(results[than], key)
    margin = (da**2 + db**2) ** 0.5
    return None if abs(a - factor * b) < margin else a < factor * b


def claims_of(results, paper=None):
    rows = []
    for method in results if paper else ():
        rows.append({"claim": f"top-1 error, {method}", "paper": paper.get(method, ""),
                     "this run": summary(results[method], "error")[0], "holds": None})

    def add(claim, key, better, than="baseline", factor=1.0):
        if better in results and than in results:
            values = [show(results[m], key) for m in (better, than)]
            rows.append({"claim": claim, "paper": "yes", "this run": f"{values[0]} against {values[1]}",
                         "holds": compare(results, key, better, than, factor)})

    add("cutout lowers the error with the centre hidden", "occlusion_center", "cutout")
    add("cutmix lowers the error with the centre hidden, less than cutout", "occlusion_center", "cutmix")
    add("cutout lowers the FGSM error", "fgsm_8", "cutout")
    add("cutmix lowers the FGSM error", "fgsm_8", "cutmix")
    add("cutmix lowers the error under noise corruptions", "corruption_noise", "cutmix")
    for method in ("label-smoothing", "mixup", "cutmix"):
        add(f"{method} lowers the confidence", "confidence", method)
    for method in results:
        if method in ("label-smoothing", "mixup", "cutmix", "baseline"):
            before, after = summary(results[method], "ece_held")[0], summary(results[method], "ece_T")[0]
            rows.append({"claim": f"a temperature lowers the ECE, {method}", "paper": "yes",
                         "this run": f"{after:.1f} against {before:.1f}", "holds": after < before})
    if "corruption_by_severity" in results["baseline"][0]:
        by = np.mean([row["corruption_by_severity"] for rows_ in results.values() for row in rows_], 0) * 100
        rows.append({"claim": "the corruption error grows with severity", "paper": "yes",
                     "this run": " < ".join(f"{v:.1f}" for v in by), "holds": bool((np.diff(by) > 0).all())})
    if "fgsm-training" in results:
        cheap = [m for m in results if "fgsm" not in METHODS[m] and m != "baseline"]
        for title, key in (("corruptions", "corruption"), ("clean images", "error"), ("FGSM", "fgsm_8")):
            if cheap and key in results["fgsm-training"][0]:
                best = min(cheap, key=lambda m: summary(results[m], key)[0])
                add(f"the best cheap regulariser ({best}) beats adversarial training on {title}", key, best, "fgsm-training")
    return rows


def draw(folder, results, stem):
    methods = list(results)
    bars = {"clean": "error", "FGSM 8/255": "fgsm_8", "centre hidden": "occlusion_center", "corruptions": "corruption"}
    bars = {title: key for title, key in bars.items() if key in results[methods[0]][0]}
    figures.bar_chart(folder / f"{stem}.png", methods, {
        title: tuple(zip(*(summary(results[m], key) for m in methods))) for title, key in bars.items()},
        title="Error by regulariser", ylabel="error, %", size=(1000, 420))
    curves = {}
    for method in methods:
        total = {k: np.sum([np.multiply(row["reliability"][k], row["reliability"]["count"]) for row in results[method]], 0)
                 for k in ("confidence", "accuracy")}
        count = np.sum([row["reliability"]["count"] for row in results[method]], 0)
        kept = count > 0.005 * count.sum()
        curves[method] = (total["confidence"][kept] / count[kept], total["accuracy"][kept] / count[kept])
    figures.line_chart(folder / f"{stem}_reliability.png", {"perfect": ([0, 1], [0, 1]), **curves}, markers=True,
                       title="Reliability: accuracy of predictions made with a confidence", xlabel="confidence",
                       ylabel="accuracy")


def main(argv=None):
    parser = harness.parser(__doc__, presets=tuple(PRESETS), seeds=3)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f'of {", ".join(METHODS)}; or "all"')
    parser.add_argument("--classes", type=int, help="first so many classes of an image folder")
    parser.add_argument("--per-class", type=int, help="training images per class of an image folder")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--ood", type=Path, help="folder of out-of-distribution sets, one subfolder each")
    parser.add_argument("--recompute", action="store_true", help="PyramidNet: less memory, a third slower")
    run = harness.start(parser, argv)
    args = run.args
    network, epochs, batch, lr, decay, methods, few, severities = PRESETS[args.preset]
    methods = list(METHODS) if args.methods == ["all"] else args.methods or list(methods)
    if unknown := [m for m in methods if m not in METHODS]:
        parser.error(f"--methods: unknown {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    epochs = args.epochs or epochs
    loader_of, images, labels, classes, mean, std, extra = load(run, args.per_class)
    size = images.shape[1]
    ood = noise_images(min(len(images), 2000), size) | extra
    if args.ood:
        ood |= {f.name: folder_images(f, size) for f in sorted(args.ood.iterdir()) if f.is_dir()}
    ood = {name: batches(data) for name, data in ood.items()}
    chosen = np.random.RandomState(0).permutation(len(images))[:few]
    corrupted = {}

    def corrupted_loader(name, severity):                     # made once for all rows
        if (name, severity) not in corrupted:
            damaged = corruptions.corrupt_batch(images[chosen], name, severity, "cifar", indices=chosen)
            corrupted[name, severity] = damaged
        return batches(corrupted[name, severity], labels[chosen])

    results = {method: [] for method in methods}
    for seed in run.seeds:
        for method in methods:
            name = f"{method}-seed{seed}"
            if (row := run.recorded(name)) is None:
                net = build(network, classes, seed, METHODS[method].get("shakedrop", 0),
                            METHODS[method].get("dropblock", 0), size)
                net.recompute = args.recompute
                model, loader = run.wrap(net), loader_of(seed)
                optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=decay)
                total = len(loader) * epochs
                schedule = regularization.step_schedule(lr, (total // 2, total * 3 // 4))
                run.drive(name, regularization.train(
                    model, loader, optimizer, regularizer=regularizer_of(method, size, mean, std), epochs=epochs,
                    schedule=schedule, device=run.device, amp=run.amp_dtype or False,
                    generator=torch.Generator().manual_seed(1000 * seed + run.rank), resume=run.resumed(name)), total)
                row = run.record(name, measure(
                    net, batches(images, labels), mean, std, occlusion=size // 2, corrupted=corrupted_loader,
                    severities=severities, ood=ood, pgd_images=few))
            results[method].append(row)
    paper = PAPER if args.preset == "paper" and network == "pyramid-200" and classes == 100 else None
    if run.figures is not None and run.is_main:
        draw(run.figures, results, "regularization")
    run.finish(claims_of(results, paper), tables_of(results, paper))


if __name__ == "__main__":
    main()
