"""Localising objects with CALM's maps, and what one threshold means: MaxBoxAccV2, PxAP, and queries over all images.

    python benchmarks/calm_wsol.py --seeds 2                  # embedded scenes, 2 minutes a seed on one core
    python benchmarks/calm_wsol.py --data ILSVRC --weights resnet50-0676ba61.pth --wordnet wordnet.is_a.txt \\
        --superclass n00004258                                # one GPU; also CUB and OpenImages30k
    python benchmarks/calm_wsol.py --data imagenet100_32 --arch small-8 --size 32 --classes 20 --pretrain 8 --epochs 3 --seeds 2

The first table is the localisation protocol (maps min-max scaled per image, every threshold tried): CAM against CALM's
joint and posterior maps, the prior (all classes added up), and superclass sums where groups of classes are known (shapes
here; --wordnet and --superclass, a synset or a depth). The published table of CALM's numbers is not at hand: its abstract
claims an improvement over earlier methods, whose mean over three networks is 62.4 (ImageNet), 61.1 (CUB) and 60.0
(OpenImages) for CAM. Nothing about the order is asserted.

The second table asks for one class in ALL images, with one threshold for all of them. CALM's joint map needs nothing done to it;
rescaling each image destroys CAM's map and CALM's alike; unscaled logits of CAM do well here too.
"""

import statistics

import calm_nets
import figures
import harness
import numpy as np
import torch

from reference import calm, wsol_evaluation

QUERIES = 20                                                  # classes asked for, at the most


def superclasses(run: harness.Run, task: calm_nets.Task) -> dict[int, list[int]]:
    if task.name == "scenes":
        return {label: [label & ~1, label | 1] for label in range(task.classes)}
    if run.args.wordnet is None:
        return {}
    synsets = [line.split()[0] for line in (run.args.data / "classes.txt").read_text(encoding="utf-8").splitlines()]
    level = int(run.args.superclass) if run.args.superclass.isdigit() else run.args.superclass
    return calm.wordnet_superclasses(run.args.wordnet.read_text().splitlines(), synsets[:task.classes], level)


@torch.no_grad()
def localise(model: calm.CALM, task: calm_nets.Task, method: str, groups: dict) -> dict[str, dict]:
    """{map: {"MaxBoxAccV2", "MaxBoxAcc", "PxAP"}} in percent, each map scaled to [0, 1] per image, as the protocol says."""
    kinds = [*calm_nets.class_maps(method).values(), *(["superclass"] if groups else [])]
    kinds = [kind for kind in kinds if kind != "superclass" or method != "cam"]
    judges = {kind: {} for kind in kinds}
    for judge in judges.values():
        common = {"resize_length": task.size}
        if task.boxes:
            judge["MaxBoxAccV2"] = wsol_evaluation.BoxEvaluator(task.boxes, task.sizes, **common)
            judge["MaxBoxAcc"] = wsol_evaluation.BoxEvaluator(
                task.boxes, task.sizes, iou_threshold_list=(50,), multi_contour_eval=False, **common)
        if task.masks:
            judge["PxAP"] = wsol_evaluation.MaskEvaluator(task.masks, **common)
    start = 0
    for images, labels, *_ in task.test:
        output, ids = model(images), task.ids[start:start + len(images)]
        start += len(images)
        for kind, judge in judges.items():
            if kind == "superclass":
                maps = calm.superclass_map(output, groups, labels=labels)
            else:
                maps = calm.attribution_map(output, labels, kind)
            maps = wsol_evaluation.normalize_scoremap(wsol_evaluation.resize_scoremap(maps.double(), task.size))
            for evaluator in judge.values():
                evaluator.accumulate_batch(maps, ids)
    return {kind: {name: float(np.mean(evaluator.compute())) for name, evaluator in judge.items()}
            for kind, judge in judges.items()}


@torch.no_grad()
def draw(run: harness.Run, task: calm_nets.Task, models: dict[str, calm.CALM], count: int = 6) -> None:
    """Counterfactual pairs: the image, the map of its class A, that of the likeliest other class B, and A but not B."""
    images, labels, *_ = next(iter(task.test))
    method = next((m for m in models if m != "cam"), None)
    if method is None:
        return
    output = models[method](images)
    p = output.probs()
    other = p.scatter(1, labels[:, None], -1).argmax(1)
    both = torch.minimum(p.gather(1, labels[:, None]), p.gather(1, other[:, None]))[:, 0]
    rows = both.topk(min(count, len(both))).indices           # where the network itself wavers between the two
    cells, titles = [], []
    for row in rows.tolist():
        a, b = int(labels[row]), int(other[row])
        one = calm.CALMOutput(output.logits[row:row + 1], output.attention[row:row + 1], output.prior_activation,
                              output.detach_normalizer, output.epsilons)
        maps = [one.joint(a)[0], one.joint(b)[0], calm.counterfactual_map(one, a, b, mode="positive")[0],
                calm.counterfactual_map(one, b, a, mode="positive")[0]]
        picture = task.picture(images[row])
        name = [(task.class_names[c] if c < len(task.class_names) else f"class {c}") for c in (a, b)]
        cells += [figures.draw_boxes(picture, task.boxes.get(task.ids[row], np.zeros((0, 4)))
                                     * (task.size / task.sizes[task.ids[row]][0]), scale=4)]
        cells += [figures.overlay(picture, heat.cpu(), 0.6) for heat in maps]
        titles += [f"A {name[0]}", f"A: p {p[row, a]:.2f}", f"B {name[1]} {p[row, b]:.2f}", "A but not B", "B but not A"]
    figures.image_grid(run.figures / f"calm_counterfactual_{task.name}.png", cells, titles, columns=5, cell=112)


def main(argv: list[str] | None = None) -> None:
    parser = calm_nets.parser(__doc__, methods=("cam", "calm-em", "calm-ml"))
    parser.add_argument("--wordnet", type=harness.Path, help="wordnet.is_a.txt: lines 'parent child'")
    parser.add_argument("--superclass", default="6", help="synset or depth of the superclasses (with --wordnet)")
    run = harness.start(parser, argv)
    task = calm_nets.folder(run) if run.args.data else calm_nets.scenes(run)
    groups = superclasses(run, task)
    asked = torch.linspace(0, task.classes - 1, min(QUERIES, task.classes)).round().long()
    models = {}
    for seed in run.seeds:
        for method in run.args.methods:
            name = f"{method}-seed{seed}-evaluation"
            if run.recorded(name) is None:
                models[method] = calm_nets.trained(run, task, method, seed)
                answers = calm_nets.ask(models[method], task, method, asked)
                row = {"accuracy": answers.accuracy, "localisation": localise(models[method], task, method, groups)}
                if task.truth is not None:
                    row["query"] = calm_nets.query_ap(answers, task, method, asked)
                run.record(name, row)
    if run.figures and run.is_main:
        draw(run, task, {m: calm_nets.trained(run, task, m, run.seeds[-1]) for m in run.args.methods if m == "calm-em"})
    finish(run)


def finish(run: harness.Run) -> None:
    rows = {method: [run.recorded(f"{method}-seed{seed}-evaluation") for seed in run.seeds] for method in run.args.methods}
    spread = lambda values: statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0      # noqa: E731
    shown = lambda values: f"{statistics.mean(values):.1f} ± {spread(values):.1f}"                         # noqa: E731
    localisation, query, best = [], [], {}
    for method, seeds in rows.items():
        for kind, figures_of in seeds[0]["localisation"].items():
            localisation.append({"method": method, "map": kind, "accuracy": shown([s["accuracy"] for s in seeds]),
                                 **{name: shown([s["localisation"][kind][name] for s in seeds]) for name in figures_of}})
        for way in seeds[0].get("query", {}):
            values = [s["query"][way] for s in seeds]
            query.append({"method": method, "what is thresholded": way, "AP": shown(values)})
            best[method, way] = values
    claims = []
    for method in [m for m in rows if m != "cam" and "cam" in rows]:
        first = next(iter(rows["cam"][0]["localisation"]["cam"]))
        for kind in rows[method][0]["localisation"]:
            gains = [a["localisation"][kind][first] - b["localisation"]["cam"][first] for a, b in zip(rows[method], rows["cam"])]
            claims.append({"claim": f"{method} {kind} above CAM ({first}, points)", "paper": "improves", "this run": shown(gains), "holds": None})
        if best:
            joint = best[method, "joint as it is"]
            for way, factor in (("max per image", 2), ("min-max per image", 8)):
                ratios = [a / b for a, b in zip(joint, best["cam", way])]
                sure = run.args.data is None and run.args.preset == "default"
                claims.append({"claim": f"query AP of {method}'s joint over CAM, {way}: > {factor}x", "paper": "one meaning everywhere",
                               "this run": shown(ratios), "holds": min(ratios) > factor if sure else None})
    run.finish(claims, {"localisation": localisation, "query": query})


if __name__ == "__main__":
    main()
