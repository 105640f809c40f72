"""Localising objects with CALM's maps, and asking for a class in all images by one threshold.

    python benchmarks/calm_wsol.py --seeds 2                  # embedded scenes, a minute a seed
    python benchmarks/calm_wsol.py --data ILSVRC --weights resnet50-19c8e357.pth \\
        --wordnet wordnet.is_a.txt --superclass 7             # one GPU; also CUB and OpenImages30k
    python benchmarks/calm_wsol.py --data imagenet100_32 --arch small-8 --size 32 --classes 20 \\
        --pretrain 7 --epochs 2 --lr 0.05 --head-ratio 2 --seeds 2

The first table is the localisation protocol (maps min-max scaled per image, every threshold
tried): CAM against CALM's joint and posterior maps, the prior (all classes added up), and
superclass sums where groups of classes are known (shapes here; --wordnet and --superclass, a
synset or a depth). The published table of CALM's numbers is not at hand; its abstract claims an
improvement over earlier methods, of which CAM has 62.4 (ImageNet), 61.1 (CUB) and 60.0
(OpenImages) over three networks. Nothing about the order is asserted: on the scenes CAM is far
ahead.

The second table asks for one class in ALL images, with one threshold for all of them. CALM's joint
map needs nothing done to it; rescaling each image destroys CAM's map and CALM's alike; unscaled
logits of CAM do well here too.
"""

import calm_nets
import figures
import harness
import numpy as np
import torch
from calm_nets import spread

from reference import calm, wsol_evaluation

QUERIES = 20                                                  # classes asked for, at the most


def superclasses(run: harness.Run, task: calm_nets.Task) -> dict[int, list[int]]:
    """{label: classes of its superclass}; empty where no groups are known."""
    if task.name == "scenes":
        return {label: [label & ~1, label | 1] for label in range(task.classes)}
    if run.args.wordnet is None:
        return {}
    lines = (run.args.data / "classes.txt").read_text(encoding="utf-8").splitlines()
    level = run.args.superclass
    return calm.wordnet_superclasses(run.args.wordnet.read_text(encoding="utf-8").splitlines(),
                                     [line.split()[0] for line in lines[:task.classes]],
                                     int(level) if level.isdigit() else level)


@torch.no_grad()
def localise(model: calm.CALM, task: calm_nets.Task, method: str, groups: dict) -> dict[str, dict]:
    """{map: {"MaxBoxAccV2", "MaxBoxAcc", "PxAP"}} in percent, every map scaled to [0, 1] first."""
    kinds = calm_nets.class_maps(method) + (["superclass"] if groups and method != "cam" else [])
    judges: dict[str, dict] = {kind: {} for kind in kinds}
    for judge in judges.values():
        common = {"resize_length": task.size}
        if task.boxes:
            judge["MaxBoxAccV2"] = wsol_evaluation.BoxEvaluator(task.boxes, task.sizes, **common)
            common |= {"iou_threshold_list": (50,), "multi_contour_eval": False}
            judge["MaxBoxAcc"] = wsol_evaluation.BoxEvaluator(task.boxes, task.sizes, **common)
        if task.masks:
            judge["PxAP"] = wsol_evaluation.MaskEvaluator(task.masks, resize_length=task.size)
    start = 0
    for images, labels, *_ in task.test:
        output, ids = model(images), task.ids[start:start + len(images)]
        start += len(images)
        for kind, judge in judges.items():
            maps = (calm.superclass_map(output, groups, labels=labels) if kind == "superclass"
                    else calm.attribution_map(output, labels, kind))
            maps = wsol_evaluation.resize_scoremap(maps.double(), task.size)
            maps = wsol_evaluation.normalize_scoremap(maps)
            for evaluator in judge.values():
                evaluator.accumulate_batch(maps, ids)
    return {kind: {name: float(np.mean(evaluator.compute())) for name, evaluator in judge.items()}
            for kind, judge in judges.items()}


@torch.no_grad()
def draw(run: harness.Run, task: calm_nets.Task, model: calm.CALM, count: int = 6) -> None:
    """Images where the network wavers between their class A and another B: maps and differences."""
    images, labels, *_ = next(iter(task.test))
    output = model(images)
    p = output.probs()
    others = p.scatter(1, labels[:, None], -1).argmax(1)
    pairs = p.gather(1, torch.stack([labels, others], 1))
    maps = {"A": output.joint(labels), "B": output.joint(others),
            "A but not B": calm.counterfactual_map(output, labels, others, mode="positive"),
            "B but not A": calm.counterfactual_map(output, others, labels, mode="positive")}
    cells, titles = [], []
    for row in pairs.amin(1).topk(min(count, len(images))).indices.tolist():
        picture, name = task.picture(images[row]), task.ids[row]
        boxes = np.asarray(task.boxes.get(name, np.zeros((0, 4))), dtype=float)
        if len(boxes):
            boxes = boxes * (task.size / np.array([*task.sizes[name]] * 2))
        names = [task.class_names[c] if c < len(task.class_names) else f"class {c}"
                 for c in (int(labels[row]), int(others[row]))]
        cells += [figures.draw_boxes(picture, boxes, scale=4),
                  *(figures.overlay(picture, values[row].cpu(), 0.6) for values in maps.values())]
        titles += [f"A: {names[0]}", f"A, p {pairs[row, 0]:.2f}",
                   f"B: {names[1]} {pairs[row, 1]:.2f}", "A but not B", "B but not A"]
    path = run.figures / f"calm_counterfactual_{task.name}.png"
    figures.image_grid(path, cells, titles, columns=5, cell=112)


def main(argv: list[str] | None = None) -> None:
    parser = calm_nets.parser(__doc__, methods=("cam", "calm-em", "calm-ml"))
    add = parser.real.add_argument
    add("--wordnet", type=harness.Path, help="wordnet.is_a.txt: 'parent child'")
    add("--superclass", default="7", help="with --wordnet: a synset or a depth")
    run = harness.start(parser, argv)
    task = calm_nets.folder(run) if run.args.data else calm_nets.scenes(run)
    groups = superclasses(run, task)
    asked = torch.linspace(0, task.classes - 1, min(QUERIES, task.classes)).round().long()
    for seed in run.seeds:
        for method in run.args.methods:
            name = f"{method}-seed{seed}-evaluation"
            if run.recorded(name) is None:
                model = calm_nets.trained(run, task, method, seed)
                answers = calm_nets.ask(model, task, method, asked)
                row = {"accuracy": answers.accuracy,
                       "localisation": localise(model, task, method, groups)}
                if task.truth is not None:
                    row["query"] = calm_nets.query_ap(answers, task, method, asked)
                run.record(name, row)
    drawable = [method for method in run.args.methods if method != "cam"]
    if run.figures and run.is_main and drawable:
        draw(run, task, calm_nets.trained(run, task, drawable[0], run.seeds[-1]))
    finish(run)


def finish(run: harness.Run) -> None:
    results = {method: [run.recorded(f"{method}-seed{seed}-evaluation") for seed in run.seeds]
               for method in run.args.methods}
    localisation, query, claims = [], [], []
    for method, seeds in results.items():
        for kind, measures in seeds[0]["localisation"].items():
            values = {name: [s["localisation"][kind][name] for s in seeds] for name in measures}
            localisation.append({"method": method, "map": kind,
                                 "accuracy": spread([s["accuracy"] for s in seeds]),
                                 **{name: spread(v) for name, v in values.items()}})
            measure = next(iter(measures))
            if method != "cam" and "cam" in results:
                gains = [v - s["localisation"]["cam"][measure]
                         for v, s in zip(values[measure], results["cam"])]
                claims.append({"claim": f"{method} {kind} minus CAM ({measure})",
                               "paper": "above 0", "this run": spread(gains), "holds": None})
        for way in seeds[0].get("query", {}):
            query.append({"method": method, "what is thresholded": way,
                          "AP": spread([s["query"][way] for s in seeds])})
        if method != "cam" and "cam" in results and query:
            asserted = run.args.data is None and run.args.preset == "default"
            for way, factor in (("max per image", 2), ("min-max per image", 8)):
                ratios = [a["query"]["joint as it is"] / b["query"][way]
                          for a, b in zip(seeds, results["cam"])]
                claims.append({"claim": f"{method} query AP over CAM, {way}: > {factor}",
                               "paper": "one unit", "this run": spread(ratios),
                               "holds": min(ratios) > factor if asserted else None})
    run.finish(claims, {"localisation": localisation, "query": query})


if __name__ == "__main__":
    main()
