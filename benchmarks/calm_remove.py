"""Remove and classify: how fast accuracy falls when the most attributed pixels are erased.

    python benchmarks/calm_remove.py --seeds 2                # embedded glyphs, a minute a seed
    python benchmarks/calm_remove.py --data CUB --weights resnet50-19c8e357.pth --samples 50 \\
        --paper CUB                                           # one GPU; or ILSVRC, OpenImages30k
    python benchmarks/calm_remove.py --data imagenet100_32 --arch small-8 --size 32 --classes 20 \\
        --seeds 2 --models runs/calm_wsol

R_k is the accuracy after erasing the k % most attributed pixels, divided by that after erasing k %
random pixels: lower is better. Gradient baselines explain the pooled classifier ("cam"), as in the
paper. The extension "least first" erases the least attributed pixels: higher is better.

Paper (ResNet-50, read off its figure to +- 0.015): CALM lowest on CUB by a factor of 5 to 10 for
k = 10 .. 50; CALM-EM lowest on OpenImages for k = 10 .. 70; CALM-ML lowest on ImageNet at 10 and
30; no method is best everywhere. Asserted on the glyphs: R_10 of CALM's joint map is below 0.5.
Over seeds it lies between 0.1 and 0.35, and CAM's is lower: a small network that looks at one part
of a glyph finds another part when that is erased.
"""

import statistics
import warnings

import calm_nets
import figures
import harness
import torch

from reference import attribution, calm

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
MAPS = ("gradient", "integrated", "SmoothGrad", "VarGrad", "CAM", "calm-ml", "calm-em")
# The paper's figure: R_k at FRACTIONS of MAPS.
PAPER = {name: dict(zip(MAPS, rows)) for name, rows in {
    "CUB": ((.37, .51, .75, 1.09, 1.31), (.29, .43, .70, 1.10, .90), (.60, .58, .79, 1.12, 1.51),
            (.46, .44, .63, 1.14, 1.50), (.48, .47, .74, 1.05, 1.23), (.05, .04, .12, .28, .35),
            (.05, .05, .16, .40, 1.40)),
    "OpenImages": ((.74, .65, .81, 1.04, 1.70), (.64, .51, .56, .96, 1.24),
                   (1.41, 1.28, 1.03, 1.07, 1.37), (1.14, .81, .63, .87, 1.36),
                   (.90, .71, .77, 1.08, 1.39), (.90, .75, .78, .74, 1.19),
                   (.64, .45, .46, .64, 1.41)),
    "ImageNet": ((.68, .50, .46, .39, .35), (.60, .31, .29, .31, .39), (1.03, .77, .62, .39, .36),
                 (.81, .38, .27, .21, .30), (.66, .39, .29, .30, .50), (.34, .20, .33, .49, 1.17),
                 (.55, .27, .27, .44, .47))}.items()}


def record_curves(run: harness.Run, task: calm_nets.Task, method: str, seed: int) -> None:
    """Record the curves of all maps that a method's network gives."""
    def own(model, images, labels):
        return calm.attribution_map(model(images), labels, calm_nets.class_maps(method)[0])

    wanted = [("CAM" if method == "cam" else method, own, order) for order in ("most", "least")]
    if method == "cam":
        gradients = calm_nets.gradient_maps(run.args.samples, seed)
        wanted += [(name, function, "most") for name, function in gradients.items()]
    for name, function, order in wanted:
        key = f"{name}-{order}-seed{seed}"
        if run.recorded(key) is None:
            model = calm_nets.trained(run, task, method, seed)
            run.log(f"{key} ...")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # such ratios stay empty
                result = attribution.remove_and_classify(
                    model, task.test, lambda images, labels: function(model, images, labels),
                    FRACTIONS, generator=torch.Generator().manual_seed(seed), order=order)
            run.record(key, result)


def main(argv: list[str] | None = None) -> None:
    parser = calm_nets.parser(__doc__, methods=("cam", "calm-em", "calm-ml"))
    parser.add_argument("--samples", type=harness.count, default=10,
                        help="points or copies of the gradient baselines (paper: 50)")
    parser.add_argument("--paper", choices=PAPER, help="whose published curve stands beside")
    run = harness.start(parser, argv)
    task = calm_nets.folder(run) if run.args.data else calm_nets.glyphs(run)
    for seed in run.seeds:
        for method in run.args.methods:
            record_curves(run, task, method, seed)
    finish(run)


def recorded(run: harness.Run, name: str, order: str, key: str) -> list:
    """A figure of a map's curves by seed; empty where a seed is missing."""
    rows = [run.recorded(f"{name}-{order}-seed{seed}") for seed in run.seeds]
    return [row[key] for row in rows] if None not in rows else []


def mean(samples: list) -> float | None:
    return statistics.mean(samples) if None not in samples else None


def finish(run: harness.Run) -> None:
    tables, paper = {"R_k": [], "least first": []}, PAPER.get(run.args.paper, {})
    curves: dict[str, list] = {}                              # R_k, most attributed first
    for title, order in (("R_k", "most"), ("least first", "least")):
        for name in dict.fromkeys([*MAPS, *run.args.methods]):
            if not (seeds := recorded(run, name, order, "ratio")):
                continue
            ratios = [mean(list(column)) for column in zip(*seeds)]
            row = {"map": name, "accuracy": 100 * mean(recorded(run, name, order, "accuracy"))}
            row |= {f"R_{round(100 * k)}": value for k, value in zip(FRACTIONS, ratios)}
            if order == "most":
                curves[name] = ratios
                if paper:
                    row["paper"] = " ".join(f"{v:g}" for v in paper.get(name, ())) or None
            tables[title].append(row)
    if run.figures and run.is_main:
        draw(run, curves)
    run.finish(claims_of(run, curves, paper), tables)


def claims_of(run: harness.Run, curves: dict[str, list], paper: dict) -> list[dict]:
    claims = []
    for name in [n for n in curves if n.startswith("calm")]:
        asserted = run.args.data is None and run.args.preset == "default" and name in MAPS
        first = [row[0] for row in recorded(run, name, "most", "ratio")]
        claims.append({"claim": f"R_10 of {name} below 0.5", "paper": paper.get(name, (None,))[0],
                       "this run": " ".join("-" if v is None else f"{v:.2f}" for v in first),
                       "holds": None not in first and max(first) < 0.5 if asserted else None})
        if "CAM" in curves and None not in (curves[name][0], curves["CAM"][0]):
            claims.append({"claim": f"R_10 of {name} minus CAM's",
                           "paper": paper[name][0] - paper["CAM"][0] if name in paper else None,
                           "this run": curves[name][0] - curves["CAM"][0], "holds": None})
    return claims


def draw(run: harness.Run, curves: dict[str, list]) -> None:
    x = [0, *(100 * k for k in FRACTIONS), 100]
    lines = {name: (x, [1, *(float("nan") if v is None else v for v in row), 1])
             for name, row in curves.items()}
    path = run.figures / f"calm_remove_{'folder' if run.args.data else 'glyphs'}.png"
    figures.line_chart(path, lines, markers=True, xlabel="erased pixels (%)",
                       title="Accuracy without the most attributed pixels",
                       ylabel="relative to random erasing")


if __name__ == "__main__":
    main()
