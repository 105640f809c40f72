"""What random crops see of the object, and how sure the pooled label is of it (figures 3 and 4).

    python benchmarks/relabel_crops.py                               # exact geometry; 20 seconds
    python benchmarks/relabel_crops.py --data imagenet --metadata metadata/val
    python benchmarks/relabel_crops.py --data imagenet --metadata metadata/train --store maps \\
        --figures pictures

The paper: only 23.5 % of ImageNet's random crops overlap the object's box by an IoU above 0.5, and
the largest probability of the pooled label rises with the IoU. Without --data: a 500 x 375 image
with a box of a given area, and maps of the two-object images (an oracle's scores). With --data and
--metadata (a folder with localization.txt and image_sizes.txt, see data_tools/wsol_data.py): the
first box of each image of that set; --store: the maps of its images (a subset of them will do).
"""

from pathlib import Path

import figures
import harness
import numpy as np
import torch
from relabel_imagenet import oracle_maps

from data_tools import synthetic
from data_tools.label_maps import LabelMaps, image_key
from data_tools.wsol_data import read_boxes
from reference import relabel

# Area of the box relative to the image, whether it is in the centre; P(IoU > .5), P(IoU = 0) and
# mean IoU of 40,000 crops of an independent simulation (+-0.005).
GEOMETRY = ((0.10, True, 0.009, 0.016, 0.191), (0.10, False, 0.009, 0.122, 0.135),
            (0.25, True, 0.152, 0.000, 0.374), (0.25, False, 0.096, 0.025, 0.305),
            (0.50, True, 0.581, 0.0, 0.504), (0.50, False, 0.478, 0.0, 0.461),
            (1.00, True, 0.384, 0.0, 0.433))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of (..., 4) boxes x0, y0, x1, y1."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = np.clip(sides, 0, None).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return overlap / (areas[0] + areas[1] - overlap)


def random_crops(sizes: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """One crop (top, left, height, width) in [0, 1] for each (width, height)."""
    crop = relabel.RandomResizedCropWithCoords(224, generator=generator)
    pixels = np.array([crop.choose(width, height) for width, height in sizes.tolist()], dtype=float)
    return pixels / sizes[:, [1, 0, 1, 0]]


def as_boxes(crops: np.ndarray) -> np.ndarray:
    top, left, height, width = crops.T
    return np.stack([left, top, left + width, top + height], -1)


def geometry(seed: int, count: int) -> list[dict]:
    rows, rng = [], np.random.default_rng(seed)
    sizes = np.tile([[500, 375]], (count, 1))
    crops = as_boxes(random_crops(sizes, torch.Generator().manual_seed(seed)))
    for area, centred, *expected in GEOMETRY:
        side = area**0.5
        corner = (np.full((count, 2), (1 - side) / 2) if centred
                  else rng.uniform(0, 1 - side + 1e-12, (count, 2)))
        found = statistics(box_iou(crops, np.concatenate([corner, corner + side], 1)))
        worst = max(abs(f - e) for f, e in zip(found.values(), expected))
        rows.append({"box area": area, "place": "centre" if centred else "random", **found,
                     "largest difference": worst})
    return rows


def statistics(iou: np.ndarray) -> dict[str, float]:
    return {"P(IoU > .5)": float((iou > 0.5).mean()), "P(IoU = 0)": float((iou == 0).mean()),
            "mean IoU": float(iou.mean())}


def first_boxes(folder: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, first box of each image relative to it (N, 4), sizes (N, 2)."""
    boxes, sizes = read_boxes(folder, outside="clip")
    names = sorted(boxes)
    size = np.array([sizes[name] for name in names])
    return names, np.array([boxes[name][0] for name in names]) / np.tile(size, 2), size


def certainty(maps, rows: np.ndarray, crops: np.ndarray, num_classes: int) -> np.ndarray:
    """Largest probability of the pooled label of each crop; `rows`: its map."""
    parts = np.array_split(np.arange(len(rows)), max(1, len(rows) // 4096))
    pooled = [relabel.label_pooling(maps[rows[part]], torch.from_numpy(crops[part]), num_classes)
              for part in parts]
    return torch.cat(pooled).max(1).values.numpy()


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, networks=False)
    parser.real.add_argument("--metadata", type=Path, help="localization.txt and image_sizes.txt")
    parser.real.add_argument("--store", help="label maps of the images")
    parser.add_argument("--crops", type=harness.count, default=10, help="crops per image")
    args = parser.parse_args(argv)
    if args.data is not None and args.metadata is None:
        parser.error("--data needs --metadata: the folder with the boxes")
    maps = None
    if args.data is not None:
        try:                                                       # before anything opens --out
            names, boxes, sizes = first_boxes(args.metadata)
            maps = LabelMaps(args.store) if args.store else None
        except (OSError, ValueError) as error:
            parser.error(str(error))
    run = harness.start(parser, argv)
    generator = torch.Generator().manual_seed(run.seeds[0])
    claims, tables = [], {}
    if run.args.data is None:
        count = 2000 if run.args.preset == "tiny" else 40_000
        tables["crops of a 500 x 375 image"] = geometry(run.seeds[0], count)
        worst = max(row["largest difference"] for row in tables["crops of a 500 x 375 image"])
        claims.append({"claim": "largest difference from an independent simulation", "paper": None,
                       "this run": worst, "holds": worst < 0.015 if count >= 40_000 else None})
        pairs = synthetic.colored_objects(count // 20, seed=3)
        maps, kinds = oracle_maps(pairs), len(synthetic.COLORED_CLASSES)
        boxes, sizes, shown = pairs["boxes"].numpy() / 64, np.full((len(maps), 2), 64), "pairs"
        at = np.arange(len(maps))
        given = (pairs["classes"] == pairs["labels"][:, None]).int().argmax(1).numpy()
    else:
        if maps is not None:
            there, kinds = set(maps.images), maps.meta["num_classes"]
            kept = [row for row, name in enumerate(names) if image_key(name) in there]
            if not kept:
                parser.error(f"--store {run.args.store} has no map of an image of --metadata")
            names, boxes, sizes = [names[row] for row in kept], boxes[kept], sizes[kept]
            at = np.array([maps.index(name) for name in names])
        boxes, shown, given = boxes[:, None], "images", np.zeros(len(boxes), int)
    rows = np.repeat(np.arange(len(boxes)), run.args.crops)
    crops = random_crops(sizes[rows], generator)
    each = box_iou(as_boxes(crops)[:, None], boxes[rows])
    iou, labelled = each.max(1), each[np.arange(len(rows)), given[rows]]
    tables["overlap"] = [{shown: len(boxes), "crops": len(iou), **statistics(iou),
                          "P(the label's object is absent)": float((labelled == 0).mean())}]
    claims.append({"claim": "share of crops with IoU > 0.5", "paper": 0.235, "holds": None,
                   "this run": tables["overlap"][0]["P(IoU > .5)"]})
    if maps is not None:
        sure = certainty(maps, at[rows], crops, kinds)
        bins = [(low, sure[(iou >= low) & (iou < low + 0.2 + 1e-9)]) for low in np.arange(5) / 5]
        bins = [(low, values) for low, values in bins if len(values) > 20]
        levels = [float(values.mean()) for _, values in bins]
        tables["certainty"] = [{"IoU": f"{low:.1f} to {low + 0.2:.1f}", "crops": len(values),
                                "mean largest probability": level}
                               for (low, values), level in zip(bins, levels)]
        claims.append({"claim": "largest probability rises with the IoU", "paper": "rises",
                       "this run": " ".join(f"{level:.2f}" for level in levels),
                       "holds": bool(all(np.diff(levels) > 0)) if len(levels) > 1 else None})
    if run.figures and run.is_main:
        ordered = np.sort(iou)
        keep = np.linspace(0, len(ordered) - 1, 400).astype(int)
        curve = {"random crops": (ordered[keep], (keep + 1) / len(ordered))}
        figures.line_chart(run.figures / "relabel_crop_iou.png", curve, ylim=(0, 1),
                           title="Overlap of random crops with the object",
                           xlabel="IoU with the box", ylabel="share of crops below")
        if maps is not None:
            middle, spread = [low + 0.1 for low, _ in bins], [values.std() for _, values in bins]
            curve = {"mean and standard deviation": (middle, levels, spread)}
            figures.line_chart(run.figures / "relabel_certainty.png", curve, markers=True,
                               title="How sure the pooled label is",
                               xlabel="IoU of the crop with the object",
                               ylabel="largest probability")
    run.finish(claims, tables)


if __name__ == "__main__":
    main()
