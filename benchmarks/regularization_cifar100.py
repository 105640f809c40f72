"""Regularisers compared on accuracy, robustness and uncertainty (Chun et al., arXiv:2003.03879).

    python benchmarks/regularization_cifar100.py                  # embedded shapes, 3 seeds, 4 min
    python benchmarks/regularization_cifar100.py --data imagenet100_32 --preset small --amp bf16
    torchrun --nproc_per_node=2 benchmarks/regularization_cifar100.py --data cifar-100-python \\
        --preset paper --methods all --amp bf16                   # PyramidNet-200, 300 epochs a row

Rows: regularisers and combinations (--methods NAME ..., "all"). Columns: top-1 error; error under
FGSM (mean over eps 1, 2, 4, 8 of 255) and PGD-10, with the centre hidden, under the 15 common
corruptions; ECE, NLL, temperature; detection of out-of-distribution images. The table "effects"
says which measures a method changes beyond the noise of the seeds.
--data: the CIFAR-100 or CIFAR-10 pickles, or train/<class>, val/<class> folders of small images of
one size. The preset small takes 100 images of each of 10 classes spread over the list, few enough
to be learned by heart in a short training (--classes, --per-class, --epochs change that). Presets
other than paper: no crops, the learning rate goes up and down once.
--ood DIR adds out-of-distribution sets, DIR/<name>/**/*.png. Published top-1 errors of the CutMix
authors' code stand beside those of the paper preset; the workshop paper's tables were not at hand.
Expected on the shapes: cutout lowers the error with the centre hidden by a quarter; label
smoothing, mixup and cutmix lower the confidence, so that their ECE gains most from a temperature.
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

# method -> settings of regularization.Regularizer, and of the network (shakedrop, dropblock);
# "fgsm": an adversary attacks half of the loss
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
PAPER = {"baseline": 16.45, "cutmix": 14.23, "shakedrop+cutmix": 13.81, "mixup": 15.63,
         "manifold-mixup": 16.14, "cutout": 16.53, "dropblock": 15.73, "cutout+ls": 15.61,
         "dropblock+ls": 15.16, "cutout+mixup": 15.46}
SHORT = ("baseline", "cutout", "mixup", "cutmix", "manifold-mixup", "label-smoothing", "cutout+ls",
         "fgsm-training")
# network, epochs, batch, lr, weight decay, methods, images of the corruptions (PGD: half of them),
# severities, classes of an image folder and training images of each
PRESETS = {
    "default": ("pyramid-8", 12, 50, 0.1, 5e-4, SHORT, 200, (1, 3, 5), None, None),
    "tiny": ("pyramid-8", 1, 50, 0.1, 5e-4, ("baseline", "cutmix"), 20, (1, 5), None, None),
    "small": ("pyramid-8-half", 24, 32, 0.1, 5e-4, tuple(METHODS), 200, (2, 4), 10, 100),
    "paper": ("pyramid-200", 300, 64, 0.25, 1e-4, tuple(PAPER), 10_000, (1, 2, 3, 4, 5), None,
              None),
}
CIFAR_MEAN, CIFAR_STD = np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255
EPS = (1, 2, 4, 8)
# title -> key, scale of what the tables show, and whether less is better: the measures of "effects"
MEASURES = {
    "error": ("error", 100, True), "FGSM": ("fgsm", 100, True),
    "centre hidden": ("occlusion_center", 100, True), "corruptions": ("corruption", 100, True),
    "ECE": ("ece", 100, True), "NLL": ("nll", 1, True), "NLL after T": ("nll_T", 1, True),
    "OOD AUROC": ("auroc", 100, False),
}
ROBUSTNESS = ("FGSM", "centre hidden", "corruptions")
UNCERTAINTY = ("ECE", "NLL", "NLL after T", "OOD AUROC")


# ---- what is measured (the ImageNet script uses it too) ------------------------------------------

def batches(images, labels=None, size=250):
    """Pixel-space float batches of uint8 (N, H, W, 3) arrays, as a list: it can be read again."""
    labels = np.zeros(len(images), np.int64) if labels is None else np.asarray(labels)
    return [(torch.from_numpy(np.array(images[i:i + size])).permute(0, 3, 1, 2).float() / 255,
             torch.from_numpy(labels[i:i + size])) for i in range(0, len(images), size)]


def measure(net, loader, mean, std, *, occlusion, corrupted=None,
            names=corruptions.TEST_CORRUPTIONS, severities=(1, 2, 3, 4, 5), ood=None,
            sample=None):
    """One row of the study for a network that takes normalised images.

    loader: (x in [0, 1], y) batches. sample (for PGD; default: all), corrupted(name, severity) and
    ood[name] are such loaders, too.
    """
    device = next(net.parameters()).device
    mean, std = (torch.as_tensor(np.asarray(v), dtype=torch.float32, device=device).view(-1, 1, 1)
                 for v in (mean, std))

    def logits(data, change=lambda x, y: x):
        """Logits and labels after change(x, y) of the pixels."""
        moved = ((x.to(device), y.to(device)) for x, y in data)
        return robustness.predict(net, (((change(x, y) - mean) / std, y) for x, y in moved))

    def error(data, change=lambda x, y: x):
        z, y = logits(data, change)
        return (z.argmax(1) != y).double().mean().item()

    def signs():
        """Batches with the sign of the gradient, which serves every eps of FGSM, in front."""
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            yield (robustness.fgsm(net, x, y, 1.0, None, mean, std) - x).sign(), x, y

    z, y = logits(loader)
    row = robustness.evaluate_logits(z, y)
    wrong = dict.fromkeys(EPS, 0)
    for sign, x, target in signs():
        for k in EPS:
            wrong[k] += error([((x + k / 255 * sign).clamp(0, 1), target)]) * len(x)
    row |= {f"fgsm_{k}": count / len(y) for k, count in wrong.items()}
    row["fgsm"] = statistics.mean(wrong.values()) / len(y)
    row["pgd_2"] = error(loader if sample is None else sample, lambda x, y: robustness.pgd(
        net, x, y, 2 / 255, 0.5 / 255, mean=mean, std=std))
    for kind in ("center", "boundary"):
        row[f"occlusion_{kind}"] = error(loader, lambda x, y: robustness.occlude(
            x - mean, occlusion, kind) + mean)  # noqa: B023  (blanked with the data set's mean)
    fit, held = slice(0, None, 2), slice(1, None, 2)  # T is fitted on one half, judged on the other
    T = robustness.fit_temperature(z[fit], y[fit])
    row |= {"T": T, "ece_held": robustness.expected_calibration_error(z[held], y[held]),
            "ece_T": robustness.expected_calibration_error(z[held] / T, y[held]),
            "nll_held": robustness.nll(z[held], y[held]),
            "nll_T": robustness.nll(z[held] / T, y[held])}
    table = robustness.reliability_table(z, y)
    row["reliability"] = {key: table[key].tolist() for key in ("count", "confidence", "accuracy")}
    if corrupted is not None:
        errors = {name: [error(corrupted(name, s)) for s in severities] for name in names}
        mean_error = {name: statistics.mean(values) for name, values in errors.items()}
        row["corruptions"] = errors
        row["corruption"] = statistics.mean(mean_error[n] for n in corruptions.TEST_CORRUPTIONS)
        for group, members in corruptions.GROUPS.items():
            if all(name in errors for name in members):
                row[f"corruption_{group}"] = statistics.mean(mean_error[n] for n in members)
        row["corruption_by_severity"] = [statistics.mean(e) for e in zip(*errors.values())]
    score = lambda z: robustness.ood_score(z.double())  # noqa: E731  (float64: fewer ties at 1)
    row["ood"] = {name: robustness.ood_metrics(score(z), score(logits(data)[0]))
                  for name, data in (ood or {}).items()}
    for key in ("tnr95", "auroc", "detection_accuracy") if ood else ():
        row[key] = statistics.mean(metrics[key] for metrics in row["ood"].values())
    return row


def noise_images(count, size, seed=0):
    """Uniform and Gaussian noise, the synthetic out-of-distribution sets of the ODIN protocol."""
    rng = np.random.RandomState(seed)
    gaussian = (rng.normal(0.5, 1, (count, size, size, 3)).clip(0, 1) * 255).astype(np.uint8)
    uniform = rng.randint(0, 256, (count, size, size, 3)).astype(np.uint8)
    return {"uniform": uniform, "gaussian": gaussian}


def shuffled_pixels(images, seed=0):
    """The images with their pixels in another order, the same for all: colours without shapes."""
    order = np.random.RandomState(seed).permutation(images.shape[1] * images.shape[2])
    return images.reshape(len(images), -1, 3)[:, order].reshape(images.shape)


def image_files(folder):
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in corruptions.EXTENSIONS)


def resized(files, size):
    return np.stack([np.asarray(Image.open(f).convert("RGB").resize((size, size), Image.BILINEAR))
                     for f in files])


# ---- data and networks ---------------------------------------------------------------------------

def bright_shapes(count, seed):
    """Five plain shapes of 16 pixels in light colours on dark ones."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=draw)
    masks = synthetic.shapes(count, 16, seed, labels=2 * labels)["masks"]
    back, front = 0.55 * torch.rand(2, count, 3, 1, 1, generator=draw)
    noise = 0.12 * torch.randn(count, 3, 16, 16, generator=draw)
    images = torch.where(masks[:, None], front + 0.4, back) + noise
    return {"images": synthetic.to_uint8(images), "labels": labels}


def one_cycle(lr, total):
    """schedule(step): linear to lr over the first quarter of `total` steps, then linear to 0."""
    return lambda step: lr * min((step + 1) / (0.25 * total), (total - step) / (0.75 * total))


def class_arrays(root, split, classes, limit=None):
    """Images (N, H, W, 3) and labels of an image folder's classes, `limit` of each."""
    data = imagenet.imagenet(root, split, classes=classes)
    labels = np.asarray(data.labels)
    keep = np.concatenate([np.flatnonzero(labels == c)[:limit] for c in range(len(classes))])
    images = [np.asarray(data[int(i)][0]) for i in keep]
    if len(sizes := {image.shape[:2] for image in images}) > 1:
        raise SystemExit(f"--data {root}: the images of {split} have {len(sizes)} sizes, not one")
    return np.stack(images), labels[keep]


def cifar_kind(folder):
    """"cifar100" or "cifar10" for a folder with their pickles, else None."""
    return next((kind for kind, names in (("cifar100", ("cifar-100-python", "train")),
                                          ("cifar10", ("cifar-10-batches-py", "data_batch_1")))
                 if (folder / names[0]).is_dir() or (folder / names[1]).is_file()), None)


def load(run, wanted, per_class):
    """(seed -> training loader, test images, labels, classes, mean, std, more OOD images)."""
    args, tiny = run.args, run.args.preset == "tiny"
    batch = PRESETS[args.preset][2] * run.world_size
    share = {"rank": run.rank, "world_size": run.world_size}
    if args.data is None:
        counts = ((200, 100), (60, 101)) if tiny else ((1000, 100), (500, 101))
        train, test = (bright_shapes(count, seed) for count, seed in counts)
        images = test["images"].permute(0, 2, 3, 1).numpy()
        mean, std = np.full(3, 0.5), np.full(3, 0.3)
        return (lambda seed: synthetic.Batches(
            train["images"], train["labels"], batch_size=batch, seed=seed,
            transform=synthetic.to_float, drop_last=True, **share),
            images, test["labels"].numpy(), len(synthetic.SHAPES), mean, std, {})
    folder, extra = args.data, {}
    if kind := cifar_kind(folder):
        train, test = (imagenet.cifar(folder, kind, train=t) for t in (True, False))
        classes = 100 if kind == "cifar100" else 10
        images, labels = test.images, test.labels
    else:
        every = imagenet.class_folders(folder / "train")
        classes = min(wanted or len(every), len(every))
        apart = len(every) // classes
        chosen, others = every[::apart][:classes], every[apart // 2::apart][:classes]
        train = imagenet.ArrayImages(*class_arrays(folder, "train", chosen, per_class))
        images, labels = class_arrays(folder, "val", chosen)
        if apart > 1:
            extra["other classes"] = class_arrays(folder, "val", others)[0]
    transform = imagenet.PadCropTransform(4 if args.preset == "paper" else 0)
    return (lambda seed: imagenet.Loader(
        train, batch // run.world_size, transform=transform, shuffle=True, seed=seed,
        workers=args.workers, drop_last=not kind, device=run.device,
        normalize=(CIFAR_MEAN.tolist(), CIFAR_STD.tolist()), **share),
        images, labels, classes, CIFAR_MEAN, CIFAR_STD, extra)


def build(name, classes, seed, shakedrop=0.0, dropblock=0.0, size=32):
    """PyramidNet "pyramid-DEPTH"; "-half": the first convolution has stride 2, for a third of the
    cost."""
    generator = torch.Generator().manual_seed(seed)
    depth = int(name.split("-")[1])
    deep = depth == 200
    net = pyramidnet.PyramidNet(depth, 240 if deep else 24, classes, bottleneck=deep,
                                shakedrop=shakedrop, generator=generator)
    if name.endswith("half"):
        net.conv1.stride = (2, 2)
    if dropblock:  # blocks of 7 on 32-pixel images, in proportion on smaller ones
        for layer in (net.layer2, net.layer3):
            layer.append(regularization.DropBlock2d(dropblock, max(1, 7 * size // 64) | 1))
    return net.to(memory_format=torch.channels_last)


def regularizer_of(method, size, mean, std):
    """The Regularizer of a row, for normalised images; network settings are left out."""
    settings = {key: value for key, value in METHODS[method].items()
                if key not in ("shakedrop", "dropblock", "fgsm")}
    if METHODS[method].get("fgsm"):
        shift, scale = (torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1)
                        for v in (mean, std))

        def adversary(model, x, y):
            m, s = shift.to(x.device), scale.to(x.device)
            return (robustness.fgsm(model, x * s + m, y, 8 / 255, mean=m, std=s) - m) / s

        settings["adversary"] = adversary
    return regularization.Regularizer(length=size // 2, sigma=0.1 / float(np.mean(std)), clip=None,
                                      **settings)


# ---- tables, claims, pictures --------------------------------------------------------------------

def mean_of(rows, key, scale=1.0):
    return scale * statistics.mean(row[key] for row in rows)


def show(rows, key, scale=100.0, digits=1):
    """Mean and deviation of a key over the seeds' rows."""
    values = [scale * row[key] for row in rows]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(rows) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def margin(results, key):
    """Two standard errors of a difference between two rows of the table; infinite for one seed.

    The variance between seeds is pooled over all rows: two or three seeds say little about it.
    """
    seeds = len(next(iter(results.values())))
    if seeds < 2:
        return float("inf")
    pooled = statistics.mean(statistics.variance(row[key] for row in rows)
                             for rows in results.values())
    return 2 * (2 * pooled / seeds) ** 0.5


def change(results, key, method, than="baseline"):
    """method's mean minus than's, and -1, 0 or 1: lower, not to be told apart, higher."""
    difference = mean_of(results[method], key) - mean_of(results[than], key)
    clear = abs(difference) > margin(results, key)
    return difference, (difference > 0) - (difference < 0) if clear else 0


def decimals(title):
    """Of a difference in this measure: percent have one, nats two."""
    return 1 if MEASURES[title][1] == 100 else 2


def effects_of(results):
    """method -> measure -> (difference to the baseline as shown, 1 better, -1 worse, 0 unclear)."""
    effects = {}
    for method in results:
        if method != "baseline" and "baseline" in results:
            effects[method] = {}
            for title, (key, scale, lower_is_better) in MEASURES.items():
                if key in results[method][0]:
                    difference, sign = change(results, key, method)
                    effects[method][title] = scale * difference, -sign if lower_is_better else sign
    return effects


def tables_of(results, paper=None):
    main, detail, ood = [], [], []
    for method, rows in results.items():
        line = {"method": method, "error": show(rows, "error")}
        if paper is not None:
            line["error, CutMix code"] = paper.get(method, "")
        columns = {"FGSM": "fgsm", "PGD 2/255": "pgd_2", "centre hidden": "occlusion_center",
                   "corruptions": "corruption", "ECE": "ece", "acc - conf": "gap"}
        line |= {title: show(rows, key) for title, key in columns.items() if key in rows[0]}
        line |= {"T": show(rows, "T", 1, 2), "NLL": show(rows, "nll", 1, 3),
                 "NLL after T": show(rows, "nll_T", 1, 3)}
        if "auroc" in rows[0]:
            line |= {"OOD AUROC": show(rows, "auroc"), "TNR95": show(rows, "tnr95")}
        main.append(line)
        groups = {group: f"corruption_{group}" for group in corruptions.GROUPS}
        detail.append({
            "method": method, **{f"FGSM {k}/255": show(rows, f"fgsm_{k}") for k in EPS},
            "border hidden": show(rows, "occlusion_boundary"),
            **{title: show(rows, key) for title, key in groups.items() if key in rows[0]},
            "Brier": show(rows, "brier", 1, 3), "ECE after T": show(rows, "ece_T")})
        for name in rows[0]["ood"]:
            metrics = [row["ood"][name] for row in rows]
            ood.append({"method": method, "set": name, **{k: show(metrics, k) for k in metrics[0]}})
    words = {1: " better", -1: " worse", 0: ""}
    effects = [{"method": method} | {
        title: f"{difference:+.{decimals(title)}f}{words[sign]}"
        for title, (difference, sign) in line.items()}
        for method, line in effects_of(results).items()]
    tables = {"main": main, "effects": effects, "robustness": detail, "ood": ood}
    return {title: table for title, table in tables.items() if table}


def claims_of(results, paper=None):
    """Rows paper | this run | holds; asserted only beyond two standard errors (see `margin`)."""
    rows = [{"claim": f"top-1 error, {method}", "paper": paper.get(method, ""),
             "this run": mean_of(results[method], "error", 100), "holds": None}
            for method in (results if paper else ())]

    def add(claim, key, method, published="", judged=True):
        """`method`'s key is lower than the baseline's."""
        if method in results and "baseline" in results and key in results[method][0]:
            values = [show(results[m], key) for m in (method, "baseline")]
            found = change(results, key, method)[1] if judged else 0
            rows.append({"claim": claim, "paper": published,
                         "this run": f"{values[0]} against {values[1]}",
                         "holds": found < 0 if found else None})

    # published: the CutMix paper's ResNet-50 on ImageNet and PyramidNet-200 on CIFAR-100
    for method, accuracy in (("cutout", 11.5), ("mixup", 24.4), ("cutmix", 31.0)):
        add(f"{method} lowers the FGSM error (mean of four eps)", "fgsm", method,
            f"{100 - accuracy:.1f} against 91.8 (8/255)")
    for method, auroc in (("cutout", 68.7), ("mixup", 49.3), ("cutmix", 94.4)):
        verb = "raises" if method == "cutmix" else "lowers"
        add(f"{method} {verb} the OOD AUROC", "auroc", method, f"{auroc} against 87.3",
            judged=False)  # too erratic on small networks
    for method in ("cutout", "cutmix"):
        add(f"{method} lowers the error with the centre hidden", "occlusion_center", method)
    add("cutmix lowers the error under noise corruptions", "corruption_noise", "cutmix")
    for method in ("label-smoothing", "mixup", "cutmix"):
        add(f"{method} lowers the confidence", "confidence", method)
    if "baseline" in results:
        gains = {method: [{"ece": row["ece_held"] - row["ece_T"]} for row in rows_]
                 for method, rows_ in results.items()}
        gain, width = mean_of(gains["baseline"], "ece"), margin(gains, "ece") / 2**0.5
        values = [show(results["baseline"], key) for key in ("ece_T", "ece_held")]
        rows.append({"claim": "a temperature lowers the ECE of the baseline", "paper": "",
                     "this run": f"{values[0]} against {values[1]}",
                     "holds": gain > 0 if abs(gain) > width else None})
    if len(next(iter(results.values()))[0].get("corruption_by_severity", ())) > 1:
        by = 100 * np.mean([row["corruption_by_severity"]
                            for rows_ in results.values() for row in rows_], 0)
        rows.append({"claim": "the corruption error grows with severity", "paper": "",
                     "this run": " < ".join(f"{v:.1f}" for v in by),
                     "holds": bool((np.diff(by) > 0).all())})
    effects = effects_of(results)
    cheap = {m: line for m, line in effects.items() if "fgsm" not in METHODS[m]}
    if cheap and len(results["baseline"]) > 1:
        def helps(line, titles):
            signs = [line[title][1] for title in titles if title in line]
            return 1 in signs and -1 not in signs

        both = [m for m, line in cheap.items()
                if helps(line, ROBUSTNESS) and helps(line, UNCERTAINTY)]
        rows.append({"claim": "cheap regularisers that gain in robustness and in uncertainty and "
                              "lose in neither", "paper": "some",
                     "this run": ", ".join(both) or "none", "holds": bool(both)})
        for title in ("error", "corruptions", "FGSM") if "fgsm-training" in results else ():
            key = MEASURES[title][0]
            if key in results["fgsm-training"][0]:
                ahead = [m for m in cheap if change(results, key, m, "fgsm-training")[1] < 0]
                rows.append({"claim": f"cheap regularisers ahead of adversarial training, {title}",
                             "paper": "", "this run": ", ".join(ahead) or "none", "holds": None})
    return rows


def draw(folder, results, stem):
    methods = list(results)
    bars = {"clean": "error", "FGSM 2/255": "fgsm_2", "centre hidden": "occlusion_center",
            "corruptions": "corruption"}
    figures.bar_chart(folder / f"{stem}.png", methods, {
        title: tuple(zip(*((mean_of(results[m], key, 100),
                            100 * statistics.stdev([row[key] for row in results[m]])
                            if len(results[m]) > 1 else 0.0) for m in methods)))
        for title, key in bars.items() if key in results[methods[0]][0]},
        title="Error by regulariser", ylabel="error, %", xticks=method_ticks(methods),
        size=(max(640, 90 * len(methods) + 100), 420))
    curves = {}
    for method in methods:
        counts, *parts = (np.array([row["reliability"][key] for row in results[method]])
                          for key in ("count", "confidence", "accuracy"))
        count = counts.sum(0)
        kept = count > 0.01 * count.sum()
        curves[method] = [(counts * part).sum(0)[kept] / count[kept] for part in parts]
    shown = [m for m in methods if m in ("baseline", "cutout", "mixup", "cutmix", "label-smoothing",
                                         "fgsm-training")] or methods[:6]
    figures.line_chart(folder / f"{stem}_reliability.png", {
        "perfect": ([0, 1], [0, 1]), **{method: curves[method] for method in shown}}, markers=True,
        title="Reliability: accuracy of predictions made with a confidence", xlabel="confidence",
        ylabel="accuracy")
    if effects := effects_of(results):
        draw_effects(folder / f"{stem}_effects.png", effects)


def method_ticks(methods):
    return [(i, method.replace("-", "\n", 1).replace("+", "\n+", 1))
            for i, method in enumerate(methods)]


def draw_effects(path, effects):
    """Differences to the baseline by measure and method; green better, red worse, white unclear."""
    titles = list(dict.fromkeys(title for line in effects.values() for title in line))[::-1]
    short = {"centre hidden": "occlusion", "corruptions": "corrupted", "OOD AUROC": "AUROC",
             "NLL after T": "NLL(T)"}
    chart = figures.Chart(
        (-0.5, len(effects) - 0.5), (-0.5, len(titles) - 0.5),
        size=(max(640, 80 * len(effects) + 90), 330),
        title="Change against the baseline (green: better by two standard errors, red: worse)",
        xticks=method_ticks(effects), yticks=[(i, short.get(t, t)) for i, t in enumerate(titles)])
    for x, line in enumerate(effects.values()):
        for title, (difference, sign) in line.items():
            y = titles.index(title)
            color = {1: "#a9d9b0", -1: "#f0b3a8", 0: "#fafafa"}[sign]
            chart.bar(x, y + 0.46, 0.94, color, base=y - 0.46)
            chart.text(x, y, f"{difference:+.{decimals(title)}f}", anchor="mm")
    chart.save(path)


def main(argv=None):
    parser = harness.parser(__doc__, presets=tuple(PRESETS), seeds=3)
    add = parser.add_argument
    add("--methods", nargs="+", choices=(*METHODS, "all"), metavar="NAME",
        help=f'of {", ".join(METHODS)}; or "all"')
    parser.real.add_argument("--classes", type=harness.count,
                             help="so many classes, spread over those of an image folder")
    parser.real.add_argument("--per-class", type=harness.count,
                             help="training images per class of an image folder")
    add("--epochs", type=harness.count)
    add("--ood", type=Path, help="folder of out-of-distribution sets, one subfolder each")
    add("--recompute", action="store_true", help="less memory, a third slower")
    args = parser.parse_args(argv)
    network, epochs, _, lr, decay, methods, few, severities, *subset = PRESETS[args.preset]
    methods = args.methods or list(methods)
    methods = list(METHODS) if "all" in methods else methods
    more_ood = ({f.name: image_files(f) for f in sorted(args.ood.glob("*")) if f.is_dir()}
                if args.ood else {})
    if args.ood and not (more_ood and all(more_ood.values())):
        parser.error(f"--ood {args.ood}: no folder with a subfolder of images for each set")
    if args.data and cifar_kind(args.data) and (args.classes or args.per_class):
        parser.error(f"--classes and --per-class are for image folders, not for {args.data}")
    run = harness.start(parser, argv)
    epochs = args.epochs or epochs
    wanted, per_class = args.classes or subset[0], args.per_class or subset[1]
    loader_of, images, labels, classes, mean, std, extra = load(run, wanted, per_class)
    size = images.shape[1]
    ood = noise_images(min(len(images), 2000), size) | {"shuffled": shuffled_pixels(images)} | extra
    ood |= {name: resized(files, size) for name, files in more_ood.items()}
    ood = {name: batches(data) for name, data in ood.items()}
    chosen = np.random.RandomState(0).permutation(len(images))[:few]
    sample = batches(images[chosen[:few // 2]], labels[chosen[:few // 2]])
    corrupted = {}

    def corrupted_loader(name, severity):  # made once for all rows
        if (name, severity) not in corrupted:
            corrupted[name, severity] = corruptions.corrupt_batch(
                images[chosen], name, severity, "cifar", indices=chosen)
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
                optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True,
                                            weight_decay=decay)
                total = len(loader) * epochs
                if args.preset == "paper":
                    schedule = regularization.step_schedule(lr, (total // 2, total * 3 // 4))
                else:
                    schedule = one_cycle(lr, total)
                run.drive(name, regularization.train(
                    model, loader, optimizer, regularizer=regularizer_of(method, size, mean, std),
                    epochs=epochs, device=run.device, amp=run.amp_dtype or False,
                    schedule=schedule, resume=run.resumed(name),
                    generator=torch.Generator().manual_seed(1000 * seed + run.rank)), total)
                row = run.record(name, measure(
                    net, batches(images, labels), mean, std, occlusion=size // 2, ood=ood,
                    corrupted=corrupted_loader, severities=severities, sample=sample))
            results[method].append(row)
    paper = PAPER if args.preset == "paper" and classes == 100 else None
    if run.figures is not None and run.is_main:
        draw(run.figures, results, run.script)
    run.finish(claims_of(results, paper), tables_of(results, paper))


if __name__ == "__main__":
    main()
