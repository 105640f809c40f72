"""Cue localisation: do the maps of two classes differ where the classes differ? Accuracy and pixel AP (section 5.1).

    python benchmarks/calm_cub.py --seeds 2                   # embedded toys, 4 minutes a seed on one core
    python benchmarks/calm_cub.py --data CUB_200_2011 --weights resnet50-19c8e357.pth --samples 50     # one GPU

Embedded data (32 pixels, networks from scratch):
  glyphs   one glyph of eight tells the class: AP of a class's own map and of |map of A - map of B|; and one class asked for in
           ALL images with one threshold
  birds    twelve classes of three parts: AP of |map of A - map of B| against the parts in which A and B differ
With --data, CUB-200-2011 as distributed, with attributes and segmentations: 191 pairs of classes that differ in one, two or
three parts, all test images of both classes, maps subtracted before anything is rescaled. A test image passes through the
network once, whatever the number of its class's pairs.

Paper (ResNet-50, ImageNet weights; AP in % at 1 / 2 / 3 differing parts): CAM 24.1 / 28.3 / 32.2, CALM-EM 30.4 / 33.3 / 36.3.
On the toys these hold, and are asserted: CALM is as accurate as CAM; its counterfactual AP is its own AP without any
rescaling; CAM's collapses if the maps are rescaled one by one before the subtraction; the joint map answers queries over all
images several times better than any per-image rescaling; the true gradient of the prior trains faster than the released
code's. NOT on the toys: CAM's own AP is higher (one part of a glyph is cue enough for CALM), and the paper's order of
CALM-EM > CAM > gradients: from scratch and with a receptive field as large as the object, one location anywhere on it suffices.
"""

import statistics
from collections import defaultdict
from functools import partial

import calm_nets
import figures
import harness
import numpy as np
import torch

from data_tools import cub, glyphs
from reference import attribution, calm

PAPER = {"gradient": (10.0, 13.7, 15.3), "integrated": (12.0, 15.1, 17.3), "SmoothGrad": (11.8, 15.5, 18.6), "VarGrad": (16.7, 21.1, 23.1),
         "CAM": (24.1, 28.3, 32.2), "calm-ml": (23.6, 26.7, 28.8), "calm-em": (30.4, 33.3, 36.3)}
PAPER_ACCURACY = {"cam": None, "calm-em": 71.8, "calm-ml": 59.6}
PUBLISHED_PAIRS = {1: 31, 2: 64, 3: 96}


# ---------------------------------------------------------------- glyphs

def glyph_scores(run: harness.Run, task: calm_nets.Task, model: calm.CALM, method: str) -> dict:
    """AP of the label's map, of the difference to the next class, and of the gradient; and the query table."""
    classes = torch.arange(task.classes)
    answers = calm_nets.ask(model, task, method, classes)
    rows, labels = torch.arange(len(task.labels)), task.labels
    maps, minmax = answers.maps[calm_nets.own_kind(method)], partial(attribution.normalize_map, mode="minmax")
    shown = minmax if method == "cam" else lambda m: m        # CALM's values need no rescaling
    own, other = maps[rows, labels], maps[rows, (labels + 1) % task.classes]
    gradients = torch.cat([attribution.input_gradient(model, images, y, output="log_prob").cpu() for images, y in task.test])
    ap = {"own map": shown(own), "A - B": shown((own - other).abs()), "A - B, each rescaled first": (minmax(own) - minmax(other)).abs(),
          "gradient": minmax(gradients)}
    return {"accuracy": answers.accuracy, **{name: calm_nets.exact_ap(values, task.truth) for name, values in ap.items()},
            "query": calm_nets.query_ap(answers, task, method, classes)}


# ---------------------------------------------------------------- pairs of classes

def pair_ap(pairs, rows_of, difference, mask, normalise, exact: bool) -> list[float]:
    """AP (%) of each pair over all images of both classes: |difference| enlarged, then normalised, against the mask.

    rows_of[class]: test rows; difference(row, pair) -> (h, w); mask(row, pair) -> bool array or None (image left out).
    """
    scores = []
    for pair in pairs:
        metric = attribution.PixelAP(thresholds=None if exact else normalise[1])
        for row in [row for c in pair for row in rows_of[c]]:
            truth = mask(row, pair)
            if truth is not None:
                enlarged = attribution.resize_map(difference(row, pair).double(), tuple(truth.shape)).abs()
                metric.update(attribution.normalize_map(enlarged, normalise[0]), truth)
        scores.append(metric.compute()["ap"])
    return scores


def maps_of_pairs(model: calm.CALM, loader, pairs, functions: dict) -> dict[str, dict]:
    """{map: {(row, class): (h, w)}} of the classes each image's own class is paired with; one pass over the images.

    functions: {map: f(model, images, classes (B, n)) -> (B, n, h, w)}.
    """
    partners = defaultdict(set)
    for a, b in pairs:
        partners[a] |= {a, b}
        partners[b] |= {a, b}
    kept, start = {name: {} for name in functions}, 0
    for images, labels, *_ in loader:
        rows = [i for i, label in enumerate(labels.tolist()) if partners[label]]
        wanted = [sorted(partners[int(labels[i])]) for i in rows]
        if rows:
            width = max(map(len, wanted))
            classes = torch.tensor([w + w[:1] * (width - len(w)) for w in wanted], device=images.device)
            for name, function in functions.items():
                maps = function(model, images[rows], classes).detach().float().cpu()
                kept[name] |= {(start + i, c): maps[n, k] for n, (i, w) in enumerate(zip(rows, wanted)) for k, c in enumerate(w)}
        start += len(images)
    return kept


def class_map(kind: str, model: calm.CALM, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return calm.attribution_map(model(images), classes, kind)


def each_class(function, model: calm.CALM, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """A gradient method, class by class."""
    return torch.stack([function(model, images, column) for column in classes.T], 1)


def log_ratio_gradient(model: calm.CALM, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Signed gradients of log p(y | x), (B, n, 3 H, W): their difference is the gradient of log p(A | x) / p(B | x)."""
    gradients = [attribution.input_gradient(model, images, column, output="log_prob", signed=True) for column in classes.T]
    return torch.stack(gradients, 1).flatten(2, 3)


def cue_localisation(model: calm.CALM, method: str, loader, groups: dict, rows_of, mask, samples: int, seed: int,
                     exact: bool) -> dict[str, dict]:
    """{map: {number of differing parts: APs of the pairs}}; without samples, the gradient of log p(A)/p(B) alone."""
    own = "CAM" if method == "cam" else method
    functions = {own: partial(class_map, calm_nets.own_kind(method))}
    if samples and method == "cam":
        functions |= {name: partial(each_class, function) for name, function in calm_nets.gradient_maps(samples, seed).items()}
    elif not samples:
        functions[f"gradient of log p(A)/p(B), {own} net"] = log_ratio_gradient
    kept = maps_of_pairs(model, loader, [pair for pairs in groups.values() for pair in pairs], functions)
    result = {}
    for name, maps in kept.items():
        normalise = ("clip", "log") if name.startswith("calm") else ("minmax", "even")

        def difference(row, pair, maps=maps, name=name):
            values = maps[row, pair[0]] - maps[row, pair[1]]
            return values.unflatten(0, (3, -1)).abs().amax(0) if name.startswith("gradient of") else values
        result[name] = {count: pair_ap(pairs, rows_of, difference, mask, normalise, exact) for count, pairs in groups.items()}
    return result


def bird_pairs(limit: int) -> dict[int, list[tuple[int, int]]]:
    variants = glyphs.bird_variants()
    groups = defaultdict(list)
    for a in range(len(variants)):
        for b in range(a + 1, len(variants)):
            groups[int((variants[a] != variants[b]).sum())].append((a, b))
    return {count: groups[count][:limit] for count in sorted(groups)}


def bird_scores(run: harness.Run, task: calm_nets.Task, model: calm.CALM, method: str, seed: int) -> dict:
    variants, labels = glyphs.bird_variants(), task.labels.tolist()
    rows_of = defaultdict(list)
    for row, label in enumerate(labels):
        rows_of[label].append(row)

    def mask(row, pair):
        return task.truth[row, variants[pair[0]] != variants[pair[1]]].any(0)

    accuracy = calm_nets.ask(model, task, method, torch.tensor([0])).accuracy
    groups = bird_pairs(2 if run.args.preset == "tiny" else 15)
    scores = cue_localisation(model, method, task.test, groups, rows_of, mask, 0, seed, exact=True)
    return {"accuracy": accuracy, "ap": scores}


# ---------------------------------------------------------------- CUB

def real_task(run: harness.Run) -> tuple[calm_nets.Task, cub.CUB]:
    train, test = (cub.CUB(run.args.data, split) for split in ("train", "test"))
    return calm_nets.image_task(run, train, test, len(train.classes)), test


def real_scores(run: harness.Run, task: calm_nets.Task, test: cub.CUB, parts: cub.CUBParts, model: calm.CALM, method: str,
                seed: int) -> dict:
    """Classes count from 0 here, from 1 in `CUBParts`."""
    published = parts.pairs_by_difference()
    groups = {count: [(i - 1, j - 1) for i, j in published.get(count, [])] for count in (1, 2, 3)}
    rows_of = defaultdict(list)
    for row, label in enumerate(test.labels.tolist()):
        rows_of[label].append(row)

    def mask(row, pair):
        return parts.mask(test.names[row], (pair[0] + 1, pair[1] + 1))

    accuracy = calm_nets.ask(model, task, method, torch.tensor([0])).accuracy
    scores = cue_localisation(model, method, task.test, groups, rows_of, mask, run.args.samples, seed, exact=run.args.exact)
    return {"accuracy": accuracy, "ap": scores, "pairs": {count: len(pairs) for count, pairs in groups.items()}}


# ---------------------------------------------------------------- tables

def shown(values: list[float]) -> str:
    values = [v for v in values if v is not None]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {error:.1f}" if values else "-"


def mean_ap(values: list) -> float | None:
    values = [v for v in values if v is not None and v == v]  # pairs without a visible differing part have none
    return statistics.mean(values) if values else None


def pair_table(run: harness.Run, experiment: str) -> tuple[list[dict], dict]:
    table, means = [], {}
    for method in run.args.methods:
        seeds = [run.recorded(f"{method}-seed{seed}-{experiment}") for seed in run.seeds]
        for name in seeds[0]["ap"]:
            per_count = {count: [mean_ap(s["ap"][name][count]) for s in seeds] for count in seeds[0]["ap"][name]}
            everything = [mean_ap([v for values in s["ap"][name].values() for v in values]) for s in seeds]
            means[name] = everything
            row = {"map": name, "accuracy": shown([s["accuracy"] for s in seeds]),
                   **{f"{count} differing": shown(values) for count, values in per_count.items()}, "all pairs": shown(everything)}
            if run.args.data:
                row["paper"] = " / ".join(map(str, PAPER[name])) if name in PAPER else None
            table.append(row)
    return table, means


def toy_tables(run: harness.Run) -> tuple[list[dict], dict]:
    seeds = {m: [run.recorded(f"{m}-seed{seed}-glyphs") for seed in run.seeds] for m in run.args.methods}
    columns = ["accuracy", "own map", "A - B", "A - B, each rescaled first", "gradient"]
    tables = {"glyphs": [{"method": m, **{c: shown([row[c] for row in rows]) for c in columns}} for m, rows in seeds.items()],
              "query": [{"method": m, "what is thresholded": way, "AP": shown([row["query"][way] for row in rows])}
                        for m, rows in seeds.items() for way in rows[0]["query"]]}
    tables["birds"], _ = pair_table(run, "birds")
    sure = run.args.preset == "default"
    claims = []

    def claim(text: str, values: list[float], holds: bool | None, paper=None) -> None:
        claims.append({"claim": text, "paper": paper, "this run": " ".join(f"{v:.1f}" for v in values),
                       "holds": holds if sure else None})

    for m in [m for m in ("calm-em", "calm-ml") if m in seeds]:
        rows = seeds[m]
        gap = [row["A - B"] - row["own map"] for row in rows]
        claim(f"{m}: counterfactual AP minus own AP, within 3 points", gap, max(map(abs, gap)) < 3)
        lead = [row["own map"] - row["gradient"] for row in rows]
        claim(f"{m}: own AP above the gradient's", lead, None)
        if "cam" in seeds:
            lead = [a["accuracy"] - b["accuracy"] for a, b in zip(rows, seeds["cam"])]
            claim(f"{m}: accuracy not below CAM's by more than 2 points", lead, min(lead) > -2)
            for way, factor in (("max per image", 1.5), ("min-max per image", 8)):
                ratio = [a["query"]["joint as it is"] / b["query"][way] for a, b in zip(rows, seeds["cam"])]
                claim(f"{m}: query AP over CAM, {way}, more than {factor} times", ratio, min(ratio) > factor)
    if "cam" in seeds:
        rows = seeds["cam"]
        fall = [row["A - B, each rescaled first"] for row in rows]
        claim("CAM: counterfactual AP, maps rescaled before the subtraction, below 15", fall, max(fall) < 15)
        lead = [row["own map"] - row["gradient"] for row in rows]
        claim("CAM: own AP above the gradient's by more than 30 points", lead, min(lead) > 30)
        if "calm-em" in seeds:
            lead = [a["own map"] - b["own map"] for a, b in zip(seeds["calm-em"], rows)]
            claim("calm-em: own AP above CAM's", lead, None)
    if {"calm-em", "calm-official"} <= seeds.keys():
        lead = [a["accuracy"] - b["accuracy"] for a, b in zip(seeds["calm-em"], seeds["calm-official"])]
        claim("true gradient of the prior: accuracy above the released code's", lead, min(lead) > 0)
    return claims, tables


def draw(run: harness.Run, task: calm_nets.Task, count: int = 4) -> None:
    """Glyphs: image, CAM of A scaled by its maximum, joint maps of A and of B, A but not B."""
    seed = run.seeds[-1]
    models = {m: calm_nets.trained(run, task, m, seed) for m in ("cam", "calm-em")}
    images, labels, *_ = next(iter(task.test))
    images, labels = images[:count], labels[:count]
    cells, titles = [], []
    with torch.no_grad():
        cam, output = models["cam"](images), models["calm-em"](images)
    other = (labels + 1) % task.classes
    maps = {"CAM / its maximum": attribution.normalize_map(calm.attribution_map(cam, labels, "cam"), "max"),
            "CALM joint": output.joint(labels), "joint, next class": output.joint(other),
            "A but not B": calm.counterfactual_map(output, labels, other, mode="positive")}
    for row in range(len(images)):
        cells += [(images[row].cpu() + 0.6) / 2.2, *(figures.heat_colors(m[row].cpu()) for m in maps.values())]
        titles += [f"class {int(labels[row])}", *(f"{name} {m[row].max():.2g}" for name, m in maps.items())]
    figures.image_grid(run.figures / "calm_glyphs.png", cells, titles, columns=5, cell=128)


def main(argv: list[str] | None = None) -> None:
    parser = calm_nets.parser(__doc__, methods=("cam", "calm-em", "calm-ml", "calm-official", "calm-ema", "calm-hard"))
    parser.add_argument("--samples", type=int, default=50, help="points or noisy copies of the gradient baselines on CUB")
    parser.add_argument("--exact", action="store_true", help="exact AP on CUB instead of the published bins")
    run = harness.start(parser, argv)
    if run.args.data:
        task, test = real_task(run)
        parts = cub.CUBParts(run.args.data, run.args.size)
        score = {"cub": (task, lambda model, method, seed: real_scores(run, task, test, parts, model, method, seed))}
    else:
        glyph_task, bird_task = calm_nets.glyphs(run), calm_nets.birds(run)
        score = {"glyphs": (glyph_task, lambda model, method, seed: glyph_scores(run, glyph_task, model, method)),
                 "birds": (bird_task, lambda model, method, seed: bird_scores(run, bird_task, model, method, seed))}
    for seed in run.seeds:
        for experiment, (task, function) in score.items():
            for method in run.args.methods:
                name = f"{method}-seed{seed}-{experiment}"
                if run.recorded(name) is None:
                    run.record(name, function(calm_nets.trained(run, task, method, seed), method, seed))
    if run.args.data:
        table, means = pair_table(run, "cub")
        first = run.recorded(f"{run.args.methods[0]}-seed{run.seeds[0]}-cub")
        pairs = {int(count): n for count, n in first["pairs"].items()}
        claims = [{"claim": "pairs of classes at 1, 2, 3 differences", "paper": "31 64 96", "this run": " ".join(map(str, pairs.values())),
                   "holds": pairs == PUBLISHED_PAIRS}]
        if "calm-em" in means and "CAM" in means:
            gain = [a - b for a, b in zip(means["calm-em"], means["CAM"]) if a is not None and b is not None]
            claims.append({"claim": "calm-em above CAM (AP, all pairs)", "paper": 4.7, "this run": shown(gain), "holds": None})
        claims += [{"claim": f"accuracy of {m}", "paper": paper, "holds": None,
                    "this run": shown([run.recorded(f"{m}-seed{seed}-cub")["accuracy"] for seed in run.seeds])}
                   for m, paper in PAPER_ACCURACY.items() if m in run.args.methods]
        run.finish(claims, {"cue localisation": table})
        return
    if run.figures and run.is_main and {"cam", "calm-em"} <= set(run.args.methods):
        draw(run, score["glyphs"][0])
    claims, tables = toy_tables(run)
    run.finish(claims, tables)


if __name__ == "__main__":
    main()
