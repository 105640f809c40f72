"""The centre baseline: one gaussian in the middle of every image, scored from the metadata alone.

    python benchmarks/wsol_center.py                          boxes of 5,000 procedural images;
                                                              about 10 s
    python benchmarks/wsol_center.py --data METADATA          every split with boxes below METADATA,
                                                              no image is read
    python benchmarks/wsol_center.py --data METADATA --masks DIR     also PxAP of splits with masks
                                                                     (OpenImages30k)

METADATA is the folder with CUB/test, ILSVRC/test, ... or any folder with splits in the format of
data_tools/wsol_data.py.

The published table prints 52.5 (ImageNet), 59.7 (CUB) and 45.8 (OpenImages) for this baseline, in a
column of MaxBoxAccV2. Those of the boxes are another metric, carried over from the first version of
the paper: MaxBoxAcc at IoU .5, for ImageNet with the first box of each image only. Expected with
the released metadata:

                                        MaxBoxAcc .3 / .5 / .7        V2
    CUB test                            93.91 / 59.60 / 17.00      56.83
    ILSVRC test, any box                76.81 / 54.06 / 29.28      53.39
    ILSVRC test, first box only         73.47 / 52.50 / 28.64      51.54

One map serves all images, so its few different boxes are compared with all true boxes at once.
"""

from pathlib import Path

import figures
import harness
import numpy as np

from data_tools import synthetic, wsol_data
from reference import wsol, wsol_evaluation

PUBLISHED = {"CUB/test": 59.7, "ILSVRC/test": 52.5}
SIDE, IOUS = 224, (30, 50, 70)


def center_accuracy(boxes: dict, sizes: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(BoxAcc [3, n_tau] in percent, box of each tau, taus) of the centre map."""
    taus = np.arange(0, 1, 0.001)
    predicted = np.concatenate(
        wsol_evaluation.compute_bboxes_from_scoremaps(wsol.center_gaussian(SIDE), taus)[0])
    different, back = np.unique(predicted, axis=0, return_inverse=True)
    truth = np.array([wsol_evaluation.resize_bbox(box, sizes[i], (SIDE, SIDE)) for i in boxes
                      for box in boxes[i]])
    starts = np.cumsum([0] + [len(boxes[i]) for i in boxes])[:-1]
    best = np.maximum.reduceat(wsol_evaluation.calculate_multiple_iou(truth, different), starts)
    return np.stack([(best >= d / 100).mean(0)[back] * 100 for d in IOUS]), predicted, taus


def pick(boxes: dict, which: str) -> dict:
    if which == "first":
        return {i: rows[:1] for i, rows in boxes.items()}
    if which == "largest":
        return {i: rows[np.prod(rows[:, 2:] - rows[:, :2], 1).argmax()][None]
                for i, rows in boxes.items()}
    return boxes


def center_pxap(split: wsol_data.Split, mask_root) -> float:
    images, scoremap = wsol_data.SplitImages(split, mask_root), wsol.center_gaussian(SIDE)
    total = None
    for index, image_id in enumerate(split.image_ids):          # one mask in memory at a time
        one = wsol_evaluation.MaskEvaluator(
            {image_id: wsol_evaluation.get_mask(*images.masks(index, mask_root))})
        one.accumulate(scoremap, image_id)
        total = total.merge(one) if total else one
    return total.compute()


def shortcut_and_evaluator(boxes: dict, sizes: dict) -> tuple[np.ndarray, list[float]]:
    """MaxBoxAcc of the first 200 images by `center_accuracy`, and by BoxEvaluator, which looks at
    one map per image."""
    some = {i: boxes[i] for i in list(boxes)[:200]}
    judge = wsol_evaluation.BoxEvaluator(some, sizes)
    for image_id in some:
        judge.accumulate(wsol.center_gaussian(SIDE), image_id)
    return center_accuracy(some, sizes)[0].max(1), judge.compute()


def box_rows(name: str, split: wsol_data.Split) -> tuple[list[dict], list[dict], dict]:
    """(table rows, claims, curves) of a split with boxes."""
    table, claims, curves = [], [], {}
    several = any(len(boxes) > 1 for boxes in split.boxes.values())

    def claim(text: str, value: float) -> None:
        if name in PUBLISHED:
            claims.append({"claim": f"{name}: the published value is {text}",
                           "paper": PUBLISHED[name], "this run": value,
                           "holds": abs(value - PUBLISHED[name]) < 0.15})

    for which in ("any", "first", "largest") if several else ("any",):
        accuracy, predicted, taus = center_accuracy(pick(split.boxes, which), split.sizes)
        best = accuracy.max(1)
        table.append({"split": name, "boxes": which, "images": len(split.boxes),
                      **{f"IoU {d}": value for d, value in zip(IOUS, best)}, "V2": best.mean(),
                      "best box at IoU 50": predicted[accuracy[1].argmax()].tolist()})
        if which == ("first" if several else "any"):
            claim("MaxBoxAcc at IoU 50", best[1])
        if which == "any":
            claim("V2", best.mean())
            curves = {f"{name}, IoU {d}": (taus, values) for d, values in zip(IOUS, accuracy)}
    short, full = shortcut_and_evaluator(split.boxes, split.sizes)
    claims.append({"claim": f"{name}: V2 of 200 images, shortcut and evaluator", "paper": None,
                   "this run": f"{short.mean():.2f} and {np.mean(full):.2f}",
                   "holds": np.allclose(short, full)})
    return table, claims, curves


def main(argv=None):
    parser = harness.parser(__doc__, networks=False)
    parser.real.add_argument("--masks", type=Path,
                             help="folder of the masks that the metadata name")
    run = harness.start(parser, argv)
    if run.args.data:
        folders = sorted(path.parent for path in run.args.data.rglob("localization.txt"))
        if not folders:
            raise ValueError(f"{run.args.data}: no localization.txt below it")
        splits = {str(path.relative_to(run.args.data)): wsol_data.read_split(path, outside="clip")
                  for path in folders}
    else:
        count = 300 if run.args.preset == "tiny" else 5000
        boxes = synthetic.shapes(count, size=64, seed=run.seeds[0])["boxes"]
        ids = [f"{n}.png" for n in range(count)]
        splits = {"procedural shapes": wsol_data.Split(
            ids, dict.fromkeys(ids, 0), dict.fromkeys(ids, (64, 64)),
            {i: np.asarray(box)[None] for i, box in zip(ids, boxes)})}
    table, rows, curves = [], [], {}
    for name, split in splits.items():
        if split.masks and run.args.masks:
            value = center_pxap(split, run.args.masks)
            table.append({"split": name, "boxes": "masks", "images": len(split.image_ids),
                          "PxAP": value})
            rows.append({"claim": f"centre, {name}: PxAP", "paper": 45.8, "this run": value,
                         "holds": None})
        if split.boxes:
            more_table, more_rows, more_curves = box_rows(name, split)
            table, rows, curves = table + more_table, rows + more_rows, curves | more_curves
    if not table:
        raise ValueError(f"{run.args.data}: no split with boxes; masks need --masks")
    if run.figures:
        figures.line_chart(run.figures / "wsol_center.png", curves, title="Centre baseline",
                           xlabel="threshold", ylabel="BoxAcc (%)")
    run.finish(rows=rows, tables={"center": table})


if __name__ == "__main__":
    main()
