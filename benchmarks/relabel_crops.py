"""What random crops see of the object, and how sure the pooled label is of what they see (section 3.2, figures 3 and 4).

    python benchmarks/relabel_crops.py                                            # exact geometry; about 20 seconds
    python benchmarks/relabel_crops.py --data imagenet --metadata metadata/val --split val
    python benchmarks/relabel_crops.py --data imagenet --metadata metadata/train --store maps --figures pictures

The paper: only 23.5 % of ImageNet's random crops overlap the object's box by an IoU above 0.5, and the largest
probability of the pooled label rises with the IoU. Without --data: a 500 x 375 image with a box of a given area, and
maps of the two-object images (an oracle's scores). With --data and --metadata (`localization.txt` with one
`image,x0,y0,x1,y1` per line and `image_sizes.txt` with `image,width,height`): the boxes of that set.
"""

import figures
import harness
import numpy as np
import torch
from relabel_imagenet import oracle_maps

from data_tools import imagenet, synthetic
from data_tools.label_maps import LabelMaps
from reference import relabel

# area of the box relative to the image, whether it is in the centre, and P(IoU > .5), P(IoU = 0), mean IoU of 40,000 crops
# of an independent simulation (+-0.005)
GEOMETRY = ((0.10, True, 0.009, 0.016, 0.191), (0.10, False, 0.009, 0.122, 0.135), (0.25, True, 0.152, 0.000, 0.374),
            (0.25, False, 0.096, 0.025, 0.305), (0.50, True, 0.581, 0.0, 0.504), (0.50, False, 0.478, 0.0, 0.461),
            (1.00, True, 0.384, 0.0, 0.433))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of (..., 4) boxes x0, y0, x1, y1."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = np.clip(sides, 0, None).prod(-1)
    area = lambda box: (box[..., 2:] - box[..., :2]).prod(-1)      # noqa: E731
    return overlap / (area(a) + area(b) - overlap)


def random_crops(sizes: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """One crop (top, left, height, width) in [0, 1] for each (width, height)."""
    crop = relabel.RandomResizedCropWithCoords(224, generator=generator)
    out = np.empty((len(sizes), 4))
    for row, (width, height) in enumerate(sizes.tolist()):
        i, j, h, w = crop.choose(width, height)
        out[row] = i / height, j / width, h / height, w / width
    return out


def as_boxes(crops: np.ndarray) -> np.ndarray:
    top, left, height, width = crops.T
    return np.stack([left, top, left + width, top + height], -1)


def geometry(run: harness.Run, count: int) -> list[dict]:
    rows, rng = [], np.random.default_rng(run.seeds[0])
    crops = as_boxes(random_crops(np.tile([[500, 375]], (count, 1)), torch.Generator().manual_seed(run.seeds[0])))
    for area, centred, *expected in GEOMETRY:
        side = area**0.5
        corner = np.full((count, 2), (1 - side) / 2) if centred else rng.uniform(0, 1 - side + 1e-12, (count, 2))
        iou = box_iou(crops, np.concatenate([corner, corner + side], 1))
        found = (float((iou > 0.5).mean()), float((iou == 0).mean()), float(iou.mean()))
        rows.append({"box area": area, "place": "centre" if centred else "random",
                     **{f"{name}": value for name, value in zip(("P(IoU > .5)", "P(IoU = 0)", "mean IoU"), found)},
                     "largest difference": max(abs(f - e) for f, e in zip(found, expected))})
    return rows


def read_boxes(folder) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, boxes relative to the image (N, 4), sizes (N, 2) of a metadata folder; ValueError names file and line."""
    def table(name, columns):
        out = {}
        for number, line in enumerate((folder / name).read_text().splitlines(), 1):
            try:
                image, *numbers = line.split(",")
                out.setdefault(image, []).append([float(v) for v in numbers])
                if len(numbers) != columns:
                    raise ValueError
            except ValueError:
                raise ValueError(f"{folder / name}, line {number}: expected a name and {columns} numbers, found {line!r}") from None
        return out
    boxes, sizes = table("localization.txt", 4), table("image_sizes.txt", 2)
    names = sorted(boxes)
    size = np.array([sizes[name][0] for name in names])
    return names, np.array([boxes[name][0] for name in names]) / np.tile(size, 2), size.astype(int)


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--metadata", type=harness.Path, help="folder with localization.txt and image_sizes.txt")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--store", help="label maps of the split's images")
    parser.add_argument("--crops", type=int, default=10, help="crops per image")
    run = harness.start(parser, argv)
    generator = torch.Generator().manual_seed(run.seeds[0])
    claims, tables, sure = [], {}, None
    if run.args.data is None:
        count = 2000 if run.args.preset == "tiny" else 40_000
        tables["crops of a 500 x 375 image"] = rows = geometry(run, count)
        worst = max(row["largest difference"] for row in rows)
        claims.append({"claim": "largest difference from an independent simulation", "paper": None, "this run": worst,
                       "holds": worst < 0.015 if count >= 40_000 else None})
        pairs = synthetic.colored_objects(count // 20, seed=3)
        maps, boxes = oracle_maps(run, pairs), pairs["boxes"].numpy() / 64
        rows = np.repeat(np.arange(len(boxes)), run.args.crops)
        crops = random_crops(np.full((len(rows), 2), 64), generator)
        iou = box_iou(as_boxes(crops)[:, None], boxes[rows]).max(1)
        sure = relabel.label_pooling(maps[rows], torch.from_numpy(crops), len(synthetic.COLORED_CLASSES)).max(1).values.numpy()
    else:
        if run.args.metadata is None:
            parser.error("--data needs --metadata: the folder with the boxes")
        names, boxes, sizes = read_boxes(run.args.metadata)
        rows = np.repeat(np.arange(len(names)), run.args.crops)
        crops = random_crops(sizes[rows], generator)
        iou = box_iou(as_boxes(crops), boxes[rows])
        if run.args.store:
            store = LabelMaps(run.args.store)
            at = np.array([store.index(name) for name in names])[rows]
            sure = np.concatenate([relabel.label_pooling(store[at[part]], torch.from_numpy(crops[part]), store.meta["num_classes"]).max(1).values
                                   for part in np.array_split(np.arange(len(rows)), max(1, len(rows) // 4096))])
    share = float((iou > 0.5).mean())
    tables["overlap"] = [{"crops": len(iou), "P(IoU > .5)": share, "P(IoU = 0)": float((iou == 0).mean()), "mean IoU": float(iou.mean())}]
    claims.append({"claim": "share of crops with IoU > 0.5", "paper": 0.235, "this run": share, "holds": None})
    if sure is not None:
        edges = np.linspace(0, 1, 6)
        bins = [(low, high, sure[(iou >= low) & (iou < high + 1e-9)]) for low, high in zip(edges, edges[1:])]
        tables["certainty"] = [{"IoU": f"{low:.1f} to {high:.1f}", "crops": len(v), "mean largest probability": float(v.mean())}
                               for low, high, v in bins if len(v) > 20]
        levels = [row["mean largest probability"] for row in tables["certainty"]]
        claims.append({"claim": "largest probability rises with the IoU", "paper": "rises",
                       "this run": " ".join(f"{level:.2f}" for level in levels), "holds": all(np.diff(levels) > -0.02) and levels[-1] > levels[0]})
    if run.figures and run.is_main:
        ordered = np.sort(iou)
        keep = np.linspace(0, len(ordered) - 1, 400).astype(int)
        figures.line_chart(run.figures / "relabel_crop_iou.png", {"random crops": (ordered[keep], (keep + 1) / len(ordered))},
                           title="Overlap of random crops with the object", xlabel="IoU with the box", ylabel="share of crops below", ylim=(0, 1))
        if sure is not None:
            middle = [(low + high) / 2 for low, high, v in bins if len(v) > 20]
            error = [float(v.std()) for _, _, v in bins if len(v) > 20]
            figures.line_chart(run.figures / "relabel_certainty.png", {"mean and standard deviation": (middle, levels, error)}, markers=True,
                               title="How sure the pooled label is", xlabel="IoU of the crop with the object", ylabel="largest probability")
    run.finish(claims, tables)


if __name__ == "__main__":
    main()
