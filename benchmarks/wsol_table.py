"""The main table of weakly supervised localization: six methods, few-shot and centre baseline,
equal search budget.

    python benchmarks/wsol_table.py                    # procedural scenes, 2 minutes a seed
    python benchmarks/wsol_table.py --preset tiny      # seconds: shows that it runs
    python benchmarks/wsol_table.py --data DIR --pretrain 6 --per-class 40 --shots 5     # 32 pixels
    torchrun --nproc_per_node=8 benchmarks/wsol_table.py --data DIR --preset paper --dataset CUB \\
        --arch resnet50 --weights resnet50.pth --workers 8

DIR holds the images and metadata/{train,val,test} (or metadata/DATASET/...) as
data_tools/wsol_data.py describes them. Of "train" only the class labels are used. "val" is the
small full supervision, boxes or masks: every method gets the same number of random trials (the
first with the published defaults but for the learning rate, except with --preset paper), the best
by "val", last checkpoint, is evaluated on "test". Without a "test" folder, --shots images of a
class are the full supervision and the rest of "val" is the test. The few-shot baseline (FSL) trains
on the same fully supervised images, a fifth of them held out to choose its learning rate.

Expected with --preset paper: PAPER below, for 30 trials of 10 (CUB: 50) epochs for each method,
days on one GPU; --methods, --trials and --epochs make it less. Expected of the scenes: no later
method clearly above CAM, few-shot above all, CAM falling to nothing as the background tells the
class.
"""

import math
from dataclasses import replace
from pathlib import Path

import figures
import harness
import numpy as np
import torch

from data_tools.synthetic import CLASSES
from data_tools.wsol_data import Resize
from reference import wsol, wsol_evaluation
from wsol_nets import (Part, Task, centre_map, evaluate, fit, predictor, real_part, restored,
                       scene_parts, score_maps)

# Published means over three backbones, percent (MaxBoxAccV2; OpenImages PxAP; the centre values of
# boxes MaxBoxAcc):
PAPER = {  # cam, has, acol, spg, adl, cutmix, few-shot, centre
    "ILSVRC": (62.4, 62.6, 61.2, 62.2, 61.7, 62.2, 64.0, 52.5),
    "CUB": (61.1, 60.6, 60.0, 57.5, 61.1, 60.8, 80.2, 59.7),
    "OpenImages": (60.0, 57.4, 56.3, 59.1, 56.9, 59.4, 71.5, 45.8),
    "total": (61.2, 60.2, 59.2, 59.6, 59.9, 60.9, 71.9, 52.3)}
EMBEDDED = {"default": dict(size=48, train=1000, test=500, epochs=5, trials=4, width=8, shots=5),
            "tiny": dict(size=32, train=64, test=24, epochs=1, trials=1, width=4, shots=2)}
BASELINES = ("fewshot", "centre")


# ---------------------------------------------------------------- search

def held_out(part: Part) -> tuple[Part, Part]:
    """(four fifths for training, a fifth of each class, at least one image, to choose the learning
    rate)."""
    groups = {}
    for name in part.split.image_ids:
        groups.setdefault(part.split.labels[name], []).append(name)
    tune = {name for names in groups.values() if len(names) > 1
            for name in names[:max(1, len(names) // 5)]}
    return (part.of([name for name in part.split.image_ids if name not in tune]),
            part.of([name for name in part.split.image_ids if name in tune]))


def search(run: harness.Run, task: Task, method: str) -> dict:
    """Random trials judged on the tuning images; the best one's test figures."""
    best, scores, shots, tune = None, [], None, task.val
    if method == "fewshot":
        shots, tune = held_out(task.val)
    for number in range(task.trials):
        name = f"{method}-seed{task.seed}-trial{number}"
        trial = task.trial(method, number)
        row = run.recorded(name)
        if row is None:
            network = fit(run, task, name, method, trial, shots)
            row = evaluate(predictor(network), tune, run) | {"trial": trial}
            if best is None or row[task.metric] > best[task.metric]:
                run.save(f"best-{method}-seed{task.seed}", network.state_dict())
            row = run.record(name, row)
        scores.append(row[task.metric])
        if best is None or row[task.metric] > best[task.metric]:
            best = row
    final = f"{method}-seed{task.seed}-test"
    if (row := run.recorded(final)) is None:
        if method == "fewshot":                # the chosen setting, trained on all tuning images
            network = fit(run, task, final, method, best["trial"], task.val)
            run.save(f"best-{method}-seed{task.seed}", network.state_dict())
        network = restored(run, task, method, best["trial"])
        row = evaluate(predictor(network), task.test, run, full=True)
        row = run.record(final, row | {"trial": best["trial"], "tuning": best[task.metric],
                                       "trials": scores})
    run.log(f"{final}: {task.metric} {row[task.metric]:.1f}")
    return row


# ---------------------------------------------------------------- tasks

def scene_task(args, preset: dict, seed: int) -> Task:
    epochs = args.epochs or preset["epochs"]
    recipe = dict(epochs=epochs, decay_frequency=max(2, round(0.7 * epochs)), weight_decay=5e-4,
                  lr_classifier_ratio=1.0, batch=32)     # nothing is pretrained: one learning rate
    return Task(*scene_parts(preset, seed, 0.5, preset["shots"]), len(CLASSES), "small",
                preset["width"], "pxap", recipe, (0.003, 0.1), args.trials or preset["trials"],
                seed)


def real_task(run: harness.Run, args, seed: int) -> Task:
    metadata = args.data / "metadata" / args.dataset
    if not (metadata / "train").is_dir():
        raise ValueError(
            f"{metadata / 'train'}: no such folder; --data needs metadata/[DATASET/]train and val")
    paper, small = args.preset == "paper", args.arch == "small"
    size = args.size or (32 if small else 224)
    everything = real_part(metadata / "train", args.data, size, None, small)
    top = 1 + max(everything.split.labels.values())
    if args.classes and args.classes > top:
        raise ValueError(f"--classes {args.classes}: {metadata / 'train'} has {top}")
    classes = [k * top // args.classes for k in range(args.classes)] if args.classes else None

    def read(name: str) -> Part:
        return real_part(metadata / name, args.data, size, classes, small)

    def few(part: Part, count: int) -> Part:
        return part.of(part.split.per_class(count, seed, "take").image_ids)

    train, val = read("train") if classes else everything, read("val")
    if args.per_class:
        train = few(train, args.per_class)
    if (metadata / "test").is_dir():
        tune, test = few(val, args.shots), read("test")
    else:
        tune = few(val, args.shots or 5)
        test = val.of([name for name in val.split.image_ids if name not in tune.split.labels])
    if not len(test) or not len(held_out(tune)[1]):
        raise ValueError(f"--shots {args.shots}: {len(tune)} images to tune on and {len(test)} to "
                         "test on; both are needed, and two of one class to tune on")
    epochs = args.epochs or ((50 if args.dataset == "CUB" else 10) if paper else 3)
    decay = (15 if args.dataset == "CUB" else 3) if paper else max(2, round(0.7 * epochs))
    recipe = dict(epochs=epochs, decay_frequency=decay, lr_classifier_ratio=10.0, batch=32,
                  weight_decay=1e-4 if args.arch in ("resnet50", "small") else 5e-4)
    task = Task(train, tune, test, len(classes) if classes else top, args.arch, args.width,
                "pxap" if val.masks else "v2", recipe, (1e-5, 1.0) if paper else (1e-4, 1e-2),
                args.trials or (30 if paper else 3), seed, workers=args.workers,
                defaults_first=not paper)
    if args.weights:
        task.weights = harness.read_tensors(args.weights)
    elif small and args.pretrain:
        task.weights = pretrained(run, task, everything, top, args.pretrain, same=not classes)
    return task


def pretrained(run: harness.Run, task: Task, part: Part, classes: int, epochs: int,
               same: bool) -> dict:
    """The small CAM network trained on the labels of all training images, in the place of ImageNet
    weights.

    `same`: the benchmark has these classes too, so the classifier is kept, as published for
    ImageNet.
    """
    name = "pretrained"
    if run.recorded(name) is None:
        recipe = dict(epochs=epochs, decay_frequency=max(2, round(0.6 * epochs)),
                      weight_decay=5e-4, lr_classifier_ratio=1.0, batch=64)
        other = replace(task, classes=classes, seed=0, train=part, recipe=recipe)
        network = fit(run, other, name, "cam", {"lr": 0.1})
        run.save("weights", network.state_dict())
        run.record(name, {"classes": classes, "images": len(part)})
    run.barrier()
    weights = run.saved("weights")
    return weights if same else {key: value for key, value in weights.items()
                                 if key.startswith("features.")}


# ---------------------------------------------------------------- experiments on scenes

def gradients(run: harness.Run, task: Task, trial: dict) -> list[dict]:
    """Saliency baselines on the CAM network."""
    network, rows = restored(run, task, "cam", trial), []
    test = task.test.of(task.test.split.image_ids[:200])
    generator = torch.Generator()
    for name, saliency in {
            "gradient": wsol.vanilla_gradient,
            "integrated gradients": lambda m, x, y: wsol.integrated_gradients(m, x, y, steps=10),
            "SmoothGrad": lambda m, x, y: wsol.smooth_grad(m, x, y, n=10,
                                                           generator=generator.manual_seed(0)),
    }.items():
        row = evaluate(lambda x, y: (saliency(network, x, y), math.nan), test, run)
        rows.append({"map": name, **{key: round(row[key], 1) for key in ("pxap", "v2", "v1")}})
    return rows


def pxap(run: harness.Run, task: Task, name: str, method: str, trial: dict, shots: Part) -> float:
    """PxAP of one more network, with a setting of the main table."""
    if (result := run.recorded(name)) is None:
        network = fit(run, task, name, method, trial, shots if method == "fewshot" else None)
        result = run.record(name, evaluate(predictor(network), task.test, run))
    return result["pxap"]


def background_sweep(run: harness.Run, task: Task, rows: dict, rhos: tuple, preset: dict) -> dict:
    """PxAP of CAM and few-shot where backgrounds tell the class with probability rho: {method: [per
    rho]}."""
    found = {"cam": [], "fewshot": []}
    for rho in rhos:
        train, val, test = scene_parts(preset, task.seed, rho, preset["shots"])
        one = replace(task, train=train, val=val, test=test)
        for method, values in found.items():
            name = f"{method}-seed{task.seed}-rho{round(100 * rho)}"
            values.append(rows[method]["pxap"] if rho == 0.5 else        # that of the main table
                          pxap(run, one, name, method, rows[method]["trial"], val))
    return found


def supervision_curve(run: harness.Run, task: Task, rows: dict, shots: tuple,
                      preset: dict) -> list[float]:
    """Few-shot PxAP for each number of masks per class."""
    few, values = rows["fewshot"], []
    for count in shots:
        name = f"fewshot-seed{task.seed}-shots{count}"
        part = scene_parts(preset, task.seed, 0.5, count)[1]
        values.append(few["pxap"] if count == preset["shots"] else
                      pxap(run, task, name, "fewshot", few["trial"], part))
    return values


# ---------------------------------------------------------------- figures and table

def pictures(run: harness.Run, task: Task, rows: dict, count: int = 6) -> None:
    """The images with their true boxes; below, for each method, its map and its box at the best
    threshold (red)."""
    part = task.test.of(task.test.split.image_ids[::max(1, len(task.test) // count)][:count])
    scale = max(1, 128 // part.size)
    pixels = [Resize(part.size)(part.images[i][0]) for i in range(len(part))]
    truth = [part.boxes(name, part.size) for name in part.split.image_ids]

    def panel(image, i, boxes):
        picture = figures.draw_boxes(image, truth[i], ["#ffffff"] * len(truth[i]), scale)
        return figures.draw_boxes(picture, np.asarray(boxes) * scale, ["#ff3030"])

    panels = [panel(image, i, np.zeros((0, 4))) for i, image in enumerate(pixels)]
    titles = ["image"] + [""] * (len(part) - 1)
    for method, row in rows.items():
        predict = (centre_map(part) if method == "centre" else
                   predictor(restored(run, task, method, row["trial"])))
        (_, maps, _), = score_maps(predict, part, run)
        for i, scores in enumerate(maps.cpu().numpy()):
            boxes, _ = wsol_evaluation.compute_bboxes_from_scoremaps(scores, [row["tau"]])
            panels.append(panel(figures.overlay(pixels[i], scores, 0.45), i, boxes[0]))
            titles.append(f"{method} ({row[task.metric]:.0f})" if i == 0 else "")
    if run.is_main:
        figures.image_grid(run.figures / "wsol_maps.png", panels, titles, columns=len(part),
                           cell=96)
        curves = {method: (np.arange(0, 1, 0.01), row["curve"]) for method, row in rows.items()}
        figures.line_chart(run.figures / "wsol_curves.png", curves, xlabel="threshold",
                           title="BoxAcc at IoU 0.5, largest contour", ylabel="percent of images")


class Claims:
    """Rows of the closing table. A claim holds if the mean over seeds of a difference exceeds the
    margin (at_most: if it does not): two standard errors, at least `half_width`; one seed decides
    nothing."""

    def __init__(self, half_width: float):
        self.half_width, self.rows = half_width, []

    def add(self, text: str, differences, paper: float | None = None, at_most=False) -> None:
        mean, bound, count = float(np.mean(differences)), None, len(differences)
        if count > 1:
            bound = max(2 * float(np.std(differences, ddof=1)) / math.sqrt(count), self.half_width)
        decided = bound is not None and (at_most or abs(mean) > bound)
        self.rows.append({"claim": text, "paper": None if paper is None else round(paper, 1),
                          "this run": round(mean, 1),
                          "margin": None if bound is None else round(bound, 1),
                          "holds": bool(mean <= bound if at_most else mean > bound) if decided
                          else None})


def of(seeds: list[dict], method: str, key: str) -> np.ndarray:
    """A figure of a method, one per seed."""
    return np.array([rows[method][key] for rows in seeds], dtype=float)


def main_rows(seeds: list[dict], metric: str, published: dict) -> list[dict]:
    columns = [key for key in ("v2", "v1", "accuracy") if key in seeds[0]["cam"] and key != metric]
    table = []
    for method in seeds[0]:
        trials = [score for rows in seeds for score in rows[method].get("trials", [])]
        values = of(seeds, method, metric)
        table.append({
            "method": method, metric: round(values.mean(), 1),
            "to CAM": round((values - of(seeds, "cam", metric)).mean(), 1) + 0.0,       # no -0
            **{key: None if seeds[0][method].get(key) is None
               else round(of(seeds, method, key).mean(), 1) for key in columns},
            "trials on tuning images": f"{min(trials):.1f} .. {max(trials):.1f}" if trials
            else None,
            "paper": published[method]})
    return table


def compare_methods(claims: Claims, seeds: list[dict], metric: str, published: dict) -> None:
    values = {method: of(seeds, method, metric) for method in seeds[0]}
    later = [method for method in values if method not in ("cam", *BASELINES)]
    if later:
        best = max(later, key=lambda method: values[method].mean())
        claims.add(f"best later method ({best}) minus CAM: not clearly above",
                   values[best] - values["cam"],
                   max(published[m] for m in later) - published["cam"], at_most=True)
    claims.add("few-shot minus CAM", values["fewshot"] - values["cam"],
               published["fewshot"] - published["cam"])
    best = max(["cam", *later], key=lambda method: values[method].mean())
    claims.add(f"few-shot minus the best method ({best})", values["fewshot"] - values[best],
               published["fewshot"] - max(published[m] for m in ("cam", *later)))
    claims.add("CAM minus centre", values["cam"] - values["centre"],
               published["cam"] - published["centre"])


def sweep_tables(run: harness.Run, claims: Claims, sweeps: list[dict], curves: list, axes: dict,
                 cam: float) -> dict:
    """Tables, claims and the figure of the two experiments on scenes; `cam`: CAM's mean PxAP."""
    mean = {method: np.mean([sweep[method] for sweep in sweeps], 0) for method in sweeps[0]}
    falls = {method: [sweep[method][0] - sweep[method][-1] for sweep in sweeps] for method in mean}
    rhos, shots, values = axes["rho"], axes["shots"], np.array(curves)
    claims.add(f"CAM falls from rho {rhos[0]:g} to {rhos[-1]:g}", falls["cam"])
    claims.add("few-shot does not fall", falls["fewshot"], at_most=True)
    claims.add(f"few-shot rises from {shots[0]} to {shots[-1]} masks per class",
               values[:, -1] - values[:, 0])
    if run.figures and run.is_main:
        lines = {"few-shot": (shots, values.mean(0)), "CAM": (shots, [cam] * len(shots))}
        figures.line_chart(run.figures / "wsol_supervision.png", lines, markers=True, logx=True,
                           title="PxAP against masks per class", xlabel="masks per class",
                           ylabel="PxAP")
    return {"background tells the class": [
                {"rho": rho, **{f"{m} PxAP": round(value, 1) for m, value in zip(mean, column)}}
                for rho, column in zip(rhos, zip(*mean.values()))],
            "supervision": [{"masks per class": count, "few-shot PxAP": round(float(value), 1)}
                            for count, value in zip(shots, values.mean(0))]}


def finish(run: harness.Run, task: Task, seeds: list[dict], sweeps: list, curves: list,
           tables: dict, axes: dict) -> None:
    """The tables and claims from the rows {method: row} of each seed."""
    key = run.args.dataset or ("ILSVRC" if run.args.data else "total")
    published = dict(zip((*wsol.METHODS, *BASELINES), PAPER[key]))
    width = (of(seeds, "cam", "high") - of(seeds, "cam", "low")).mean() / math.sqrt(len(seeds))
    claims = Claims(width / 2)
    compare_methods(claims, seeds, task.metric, published)
    tables = {"main": main_rows(seeds, task.metric, published), **tables}
    if sweeps:
        cam = of(seeds, "cam", task.metric).mean()
        tables |= sweep_tables(run, claims, sweeps, curves, axes, cam)
    run.finish(rows=claims.rows, tables=tables,
               data=f"{len(task.train)} training, {len(task.val)} tuning, {len(task.test)} test "
                    f"images, {task.classes} classes")


def main(argv=None):
    parser = harness.parser(__doc__, presets=("default", "tiny", "paper"))
    add = parser.add_argument
    add("--methods", nargs="+", default=list(wsol.METHODS), choices=wsol.METHODS)
    add("--trials", type=harness.count, help="random settings per method (paper: 30)")
    add("--epochs", type=harness.count)
    add("--no-sweeps", action="store_true",
        help="scenes: the main table without the background and supervision sweeps")
    add = parser.real.add_argument
    add("--arch", default="small", choices=("small", *wsol.ARCHS))
    add("--width", type=harness.count, default=16, help="of the small network")
    add("--weights", type=Path, help="torchvision checkpoint of --arch")
    add("--dataset", default="", choices=("", "CUB", "ILSVRC", "OpenImages"),
        help="folder below metadata/")
    add("--size", type=harness.count,
        help="image side (default 32 for the small network, else 224)")
    add("--classes", type=harness.count, help="keep this many classes, evenly spaced")
    add("--per-class", type=int, default=0,
        help="keep this many training images of a class (0: all)")
    add("--shots", type=int, default=0,
        help="tuning images per class (paper: ImageNet 10, others 5; 0: all)")
    add("--pretrain", type=int, default=0,
        help="epochs of the small network on all training labels beforehand")
    args = parser.parse_args(argv)
    if args.preset == "paper" and not args.data:
        parser.error("--preset paper needs --data")
    if args.weights and args.arch == "small" or args.pretrain and args.arch != "small":
        parser.error("--weights is for the published networks, --pretrain for --arch small")
    run = harness.start(parser, argv)
    methods = ["cam"] + [method for method in args.methods if method != "cam"]
    tiny = args.preset == "tiny"
    preset = EMBEDDED.get(args.preset, EMBEDDED["default"])
    axes = {"rho": (0.0, 1.0) if tiny else (0.0, 0.5, 0.9, 1.0),
            "shots": (1, 2) if tiny else (1, 2, 5, 10)}
    results, sweeps, curves, tables = [], [], [], {}
    for seed in run.seeds:
        task = real_task(run, args, seed) if args.data else scene_task(args, preset, seed)
        rows = {method: search(run, task, method) for method in [*methods, "fewshot"]}
        rows["centre"] = run.recorded(f"centre-seed{seed}") or run.record(
            f"centre-seed{seed}", evaluate(centre_map(task.test), task.test, run, full=True))
        results.append(rows)
        if seed == run.seeds[0] and run.figures and task.test.split.boxes:
            pictures(run, task, rows)
        if seed == run.seeds[0] and not args.data:
            tables["gradient maps of the CAM network, 200 test images"] = gradients(
                run, task, rows["cam"]["trial"])
        if not args.data and not args.no_sweeps:
            sweeps.append(background_sweep(run, task, rows, axes["rho"], preset))
            curves.append(supervision_curve(run, task, rows, axes["shots"], preset))
    finish(run, task, results, sweeps, curves, tables, axes)


if __name__ == "__main__":
    main()
