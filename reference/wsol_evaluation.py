"""Weakly supervised object localization: the metrics MaxBoxAcc, MaxBoxAccV2, PxAP, and the search.

Choe, Oh, Chun, Lee, Akata, Shim: "Evaluation for Weakly Supervised Object Localization: Protocol,
Metrics, and Datasets", TPAMI 2022 (arXiv 2007.04178), the journal version of "Evaluating WSOL
Methods Right", CVPR 2020 (2001.07437).

A method gives a score map s(X) in [0, 1]^(H x W) for each image; a threshold tau turns it into
boxes or a mask. No threshold carries over from one method to another, so a metric looks at all:

    BoxAcc(tau, delta) = percent of images where some predicted box at tau has an IoU >= delta with
                         some true box
    MaxBoxAcc          = max_tau BoxAcc(tau, .5), one predicted box: of the contour of largest area
    MaxBoxAccV2        = mean over delta in {.3, .5, .7} of max_tau BoxAcc(tau, delta), all contours
    PxAP               = 100 sum_l PxPrec(tau_l) (PxRec(tau_l) - PxRec(tau_(l-1))), tau falling,
                         the pixels of all images pooled

Numbers are those of the published evaluator to the last bit, which thresholds each map a thousand
times and asks OpenCV for the contours. Here no map is thresholded: the sets {g >= v} of its 8-bit
version g, v = 255..1, grow as a tree; the tree is built once, for a batch of maps, and the boxes of
all levels are read from it (`scoremap_boxes`). Holes are the same tree of 255 - g. The time does
not depend on the number of thresholds. What is done per pixel is torch and runs where the maps are
(CPU or GPU); the trees, a few kilobytes per map, are numpy.

Copy this file; it needs torch, numpy and (for files of masks) Pillow.

>>> maps = np.random.default_rng(0).random((4, 7, 7))
>>> maps = normalize_scoremap(resize_scoremap(maps, 224))
>>> truth = {f"{i}.jpg": [[40, 40, 200, 180]] for i in range(4)}
>>> evaluator = BoxEvaluator(truth, {name: (300, 250) for name in truth})
>>> evaluator.accumulate_batch(maps, list(truth))
>>> [round(value) for value in evaluator.compute()]                    # IoU .3, .5, .7
[100, 25, 0]
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor


# ---- Score maps ----

def _maps(name: str, maps: Array, dims: Sequence[int]) -> Tensor:
    """`maps` as float64 on its own device, after a check of type and number of dimensions."""
    if not isinstance(maps, (np.ndarray, Tensor)):
        raise TypeError(f"{name} must be an array or a tensor, not {type(maps).__name__}")
    if maps.ndim not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} dimensions, "
                         f"got shape {tuple(maps.shape)}")
    floating = isinstance(maps, Tensor) or np.issubdtype(maps.dtype, np.floating)
    if not floating or isinstance(maps, Tensor) and not maps.is_floating_point():
        raise TypeError(f"{name} must hold floating-point values, got {maps.dtype}")
    if isinstance(maps, np.ndarray):
        maps = torch.from_numpy(maps.astype(np.float64, order="C", copy=False))
    return maps.detach().to(torch.float64)


def _scoremaps(maps: Array, name: str = "scoremaps", dims: Sequence[int] = (2, 3)) -> Tensor:
    """A valid score map, or a batch of them, as a contiguous float64 tensor [B, H, W]."""
    maps = _maps(name, maps, dims).contiguous()
    if maps.shape[-1] == 0 or maps.shape[-2] == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(maps.shape)}")
    if maps.numel():
        low, high = torch.stack(torch.aminmax(maps)).tolist()
        if not (low >= 0 and high <= 1):                      # also true for a NaN
            raise ValueError(f"{name} must lie in [0, 1] without NaN; the range is [{low}, {high}]")
    return maps.view(-1, *maps.shape[-2:])


def _like(result: Tensor, example: Array) -> Array:
    return result if isinstance(example, Tensor) else result.numpy()


def normalize_scoremap(cam: Array) -> Array:
    """Min-max normalisation of each map [..., H, W] in float64.

    A constant map, or one with a NaN or an infinity, becomes 0."""
    maps = _maps("cam", cam, range(2, 9))
    maps = maps - maps.amin((-2, -1), keepdim=True)
    high = maps.amax((-2, -1), keepdim=True)
    return _like(torch.where(torch.isfinite(high) & (high > 0), maps / high, 0.0), cam)


def check_scoremap_validity(scoremap: np.ndarray) -> None:
    """TypeError unless it is a float64 array; ValueError unless 2-d, without NaN, in [0, 1]."""
    if not isinstance(scoremap, np.ndarray) or scoremap.dtype != np.float64:
        raise TypeError("scoremap must be a float64 numpy array, not "
                        f"{getattr(scoremap, 'dtype', '')} {type(scoremap).__name__}")
    _scoremaps(scoremap, "scoremap", (2,))


def _cubic_weights(inputs: int, outputs: int, device: torch.device) -> Tensor:
    """[outputs, inputs]: Keys' cubic kernel, a = -.75, half-pixel centres, borders repeated."""
    a = -0.75
    position = torch.arange(outputs, dtype=torch.float64, device=device)
    position = (position + 0.5) * (inputs / outputs) - 0.5
    left = position.floor()
    t = position - left
    near = lambda d: ((a + 2) * d - (a + 3)) * d * d + 1      # noqa: E731
    far = lambda d: ((d - 5) * d + 8) * d * a - 4 * a         # noqa: E731
    taps = torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], 1)
    columns = (left.long()[:, None] + torch.arange(-1, 3, device=device)).clamp(0, inputs - 1)
    weights = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
    return weights.scatter_add_(1, columns, taps)


def resize_scoremap(cam: Array, size: int | Sequence[int]) -> Array:
    """Cubic resize of maps [..., H, W] to size = (height, width), float64, as OpenCV's INTER_CUBIC.

    Normalise afterwards: overshoot belongs to the range. A constant map stays exactly constant."""
    height, width = map(int, (size, size) if np.ndim(size) == 0 else size)
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, got {size}")
    maps = _maps("cam", cam, range(2, 9))
    rows = _cubic_weights(maps.shape[-2], height, maps.device)
    columns = _cubic_weights(maps.shape[-1], width, maps.device)
    corner = maps[..., :1, :1]
    constant = (maps == corner).all(-1, keepdim=True).all(-2, keepdim=True)
    return _like(torch.where(constant, corner, rows @ maps @ columns.T), cam)


# ---- Boxes of all levels at once ----
#
# Cut every row where the score starts to rise again: each run has one top, and {g >= v} is an
# interval of it. A run that touches a higher one at its own top is never a component of its own
# and is made part of the other, which leaves about one node per local maximum of the map. For each
# pair of touching nodes the highest level w at which they touch matters, and of these contacts a
# maximum spanning forest: a node with the peak p that hangs on its parent by an edge of weight w
# stands for one component of {g >= v} at each level w < v <= p, and from v = w on is part of it.

_GREYS = 256
_FRACTION = 23      # int32 pixel values: 8 bits of grey level, and 23 that order equal grey levels


def _where(mask: Tensor) -> np.ndarray:
    """Flat indices of the true entries, on the host."""
    if mask.is_cuda:
        return mask.flatten().nonzero().squeeze(1).cpu().numpy()
    return np.flatnonzero(mask.numpy())                       # three times faster than torch's


def _levels_at(values: Tensor, index: np.ndarray) -> np.ndarray:
    """Grey levels, int64 on the host, of the pixels with these flat indices."""
    picked = values.flatten()[torch.from_numpy(index).to(values.device)] >> _FRACTION
    return picked.cpu().numpy().astype(np.int64)


def _runs(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(first, top), bool: the first pixel and the top of each run along `dim`."""
    last = values.shape[dim] - 1
    rises = torch.ones(values.shape, dtype=torch.bool, device=values.device)
    before, after = rises.narrow(dim, 0, last), rises.narrow(dim, 1, last)
    torch.gt(values.narrow(dim, 1, last), values.narrow(dim, 0, last), out=after)
    first, top = rises.clone(), rises.clone()
    first.narrow(dim, 1, last).logical_and_(~before)
    top.narrow(dim, 0, last).logical_and_(~after)
    return first, top


@dataclass
class _Forest:
    """The merge tree of the level sets of a batch of maps."""
    peak: np.ndarray              # of each node: level of the local maximum
    owner: np.ndarray             # its map
    parent: np.ndarray            # the node it joins, -1: none, or the outside
    weight: np.ndarray            # the level at which it joins, 0: never
    tops: list[list[np.ndarray]]  # of the runs of rows, of columns: node, flat pixel index, level
    run_node: np.ndarray          # node of each run of a row; len(peak) + b is the outside of map b
    run_length: np.ndarray

    def painted(self, colors: np.ndarray, like: Tensor) -> Tensor:
        """[B, H, W]: each pixel in the color of its node (or outside)."""
        color, length = (torch.from_numpy(part).to(like.device)
                         for part in (colors[self.run_node], self.run_length))
        return color.repeat_interleave(length, output_size=like.numel()).view(like.shape)

    def climb(self, node: np.ndarray, level: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields (which items, node, level) where items (node, level) become part of a node.

        An item of level l is in its own node for v <= l, and in an ancestor for v <= the lowest
        edge on the way. The trees are flat (at most log2 of their size): this takes few rounds."""
        item = np.arange(len(node))
        while len(item):
            weight = self.weight[node]
            here = level > weight
            yield item[here], node[here], level[here]
            level, node = np.minimum(level, weight), self.parent[node]
            keep = (node >= 0) & (level > 0)
            item, node, level = item[keep], node[keep], level[keep]


def _contacts(values: Tensor, start: np.ndarray, holes: bool) -> Iterator[tuple[np.ndarray, ...]]:
    """(run, run, level) where runs touch; holes: no diagonals, but the outsides, after all runs."""
    _, height, width = values.shape
    run_of = lambda pixel: np.searchsorted(start, pixel, side="right") - 1     # noqa: E731
    later = np.flatnonzero(start % width)
    yield later - 1, later, _levels_at(values, start[later] - 1)
    if holes:
        frame = torch.ones(values.shape, dtype=torch.bool, device=values.device)
        frame[:, 1:-1, 1:-1] = False
        border = _where(frame)
        outside = len(start) + border // (height * width)
        yield run_of(border), outside, _levels_at(values, border)
    if height == 1:
        return

    def between_rows(mask: Tensor, levels: Tensor, left: int = 0, right: int = 0) -> tuple:
        index = _where(mask)
        row, column = np.divmod(index, mask.shape[2])
        upper = (row + row // (height - 1)) * width + column   # `mask` has one row less per map
        return run_of(upper + left), run_of(upper + width + right), _levels_at(levels, index)

    upper, lower = values[:, :-1], values[:, 1:]
    both = torch.minimum(upper, lower)
    yield between_rows(_runs(both, 2)[1], both)               # the tops of common stretches suffice
    if holes or width == 1:
        return
    falling, rising = (torch.minimum(upper[..., :-1], lower[..., 1:]),
                       torch.minimum(upper[..., 1:], lower[..., :-1]))
    # a diagonal counts where it lies above both other pixels of its 2 x 2 block
    yield between_rows(falling > torch.maximum(upper[..., 1:], lower[..., :-1]), falling, 0, 1)
    yield between_rows(rising > torch.maximum(upper[..., :-1], lower[..., 1:]), rising, 1, 0)


def _forest(values: Tensor, holes: bool = False) -> _Forest:
    """Tree of {g >= v}, 8-connected; holes: 4-connected, joined to the outside at the border."""
    batch, height, width = values.shape
    outsides = batch if holes else 0
    start, top = map(_where, _runs(values, 2))
    runs, level = len(start), _levels_at(values, top)
    a, b, touch = map(np.concatenate, zip(*_contacts(values, start, holes)))
    peak = np.append(level, np.full(outsides, _GREYS))
    into = np.arange(len(peak))
    rank = peak * len(peak) + into                            # of equal peaks the later is higher
    for low, high in ((a, b), (b, a)):
        part = (touch == peak[low]) & (rank[low] < rank[high])
        into[low[part]] = high[part]
    while not np.array_equal(further := into[into], into):
        into = further
    roots = np.flatnonzero(into == np.arange(len(peak)))
    node = np.searchsorted(roots, into)
    a, b = node[a], node[b]
    apart = (a != b) & (touch > 0)
    nodes = len(roots) - outsides
    parent, weight = _spanning_forest(a[apart], b[apart], touch[apart], nodes, outsides)
    column_top = _where(_runs(values, 1)[1])
    column_node = node[np.searchsorted(start, column_top, side="right") - 1]
    tops = [(node[:runs], top, level), (column_node, column_top, _levels_at(values, column_top))]
    tops = [[part[node < nodes] for part in (node, *rest)] for node, *rest in tops]
    roots = roots[:nodes]
    return _Forest(peak[roots], top[roots] // (height * width), parent, weight, tops, node[:runs],
                   np.diff(start, append=values.numel()))


def _spanning_forest(a: np.ndarray, b: np.ndarray, level: np.ndarray, nodes: int,
                     outsides: int) -> tuple[np.ndarray, np.ndarray]:
    """(parent, weight) of `nodes` by Kruskal's algorithm; the outsides, which follow, stay roots.

    The smaller tree is hung below the root of the larger one, which keeps the trees flat."""
    total = nodes + outsides
    code = np.sort((np.minimum(a, b) * total + np.maximum(a, b)) * _GREYS + level)
    pair, level = np.divmod(code, _GREYS)
    strongest = np.append(pair[1:] != pair[:-1], True)[:len(pair)]              # of each pair
    pair, level = pair[strongest], level[strongest]
    order = np.argsort(-level, kind="stable")
    a, b = np.divmod(pair[order], total)
    above, size = list(range(total)), [1] * nodes + [total] * outsides
    parent, weight = [-1] * total, [0] * total
    for a, b, level in zip(a.tolist(), b.tolist(), level[order].tolist()):
        while above[a] != a:
            above[a] = a = above[above[a]]
        while above[b] != b:
            above[b] = b = above[above[b]]
        if a != b:
            if size[a] < size[b]:
                a, b = b, a
            above[b], weight[b], parent[b] = a, level, a if a < nodes else -1
            size[a] += size[b]
    return np.array(parent[:nodes], dtype=np.int64), np.array(weight[:nodes], dtype=np.int64)


@dataclass
class _Components:
    """One row for each component of each level set, grouped by node with falling levels."""
    node: np.ndarray
    owner: np.ndarray
    level: np.ndarray             # v of {g >= v}
    first: np.ndarray             # y * W + x of the leftmost top in the component's first row
    extent: tuple                 # first x, first y, last x, last y
    base: np.ndarray              # row of (node, level) = base[node] - level


def _components(forest: _Forest, height: int, width: int) -> _Components:
    count = forest.peak - forest.weight
    base = np.cumsum(count) - count + forest.peak
    node = np.repeat(np.arange(len(count)), count)
    pixels = height * width
    # the running minima start afresh at each node: later nodes lie lower by more than any index
    floor = (len(count) - node) * pixels
    least = np.tile(floor + pixels - 1, (4, 1))                # of index, -index; column, -column
    for (forward, backward), span, (item_node, index, top) in zip(
            least.reshape(2, 2, -1), (pixels, width), forest.tops):
        place = index % span
        for item, at, high in forest.climb(item_node, top):
            row = base[at] - high
            np.minimum.at(forward, row, floor[row] + place[item])
            np.minimum.at(backward, row, floor[row] + pixels - 1 - place[item])
    first, last, x0, x1 = np.minimum.accumulate(least, axis=1) - floor
    extent = x0, first // width, pixels - 1 - x1, (pixels - 1 - last) // width
    level = base[node] - np.arange(len(node))
    return _Components(node, forest.owner[node], level, first, extent, base)


def _fill_holes(holes: _Forest, values: Tensor) -> Tensor:
    """Fill the holes of every level set: no pixel is lower than its lowest way to the outside."""
    escape, node = holes.weight.copy(), holes.parent.copy()
    while (inside := np.flatnonzero(node >= 0)).size:
        escape[inside] = np.minimum(escape[inside], holes.weight[node[inside]])
        node[inside] = holes.parent[node[inside]]
    fill = np.append(_GREYS - 1 - escape, np.zeros(len(values), np.int64)).astype(np.int32)
    return torch.maximum(values, holes.painted(fill << _FRACTION, values))


def _doubled_areas(forest: _Forest, values: Tensor, components: _Components) -> np.ndarray:
    """Twice the polygon area of the outer border of each component of a map without holes.

    The polygon through the pixel centres holds all of a 2 x 2 block with four pixels inside and
    half of one with three: a block counts from its second lowest level on and from its lowest."""
    values = (values >> _FRACTION).to(torch.uint8)
    a, b, c, d = values[:, :-1, :-1], values[:, :-1, 1:], values[:, 1:, :-1], values[:, 1:, 1:]
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    low2, high2 = torch.minimum(c, d), torch.maximum(c, d)
    lowest = torch.minimum(low, low2)
    second = torch.minimum(torch.maximum(low, low2), torch.minimum(high, high2))
    label = forest.painted(np.arange(len(forest.peak)), values)[:, :-1]
    cell = torch.where(a >= b, label[..., :-1], label[..., 1:]) * _GREYS   # of three, one is a or b
    cells = torch.cat([(cell + second).flatten(), (cell + lowest).flatten()])
    counts = (torch.bincount(cells).cpu().numpy() if cells.is_cuda else np.bincount(cells.numpy()))
    used = np.flatnonzero(counts)
    area = np.zeros(len(components.node), dtype=np.int64)
    for item, node, level in forest.climb(*np.divmod(used, _GREYS)):
        np.add.at(area, components.base[node] - level, counts[used[item]])
    total, start = np.cumsum(area), (components.base - forest.peak)[components.node]
    return total - total[start] + area[start]


def _block_boxes(maps: Tensor, multi_contour: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(levels, owner, boxes) of maps [B, H, W], as `scoremap_boxes`."""
    _, height, width = maps.shape

    def rows(found: _Components, grow: int, keep: slice | np.ndarray = slice(None)) -> tuple:
        # as published: x1 = last x + 1, cut at the image; the border of a hole lies around it
        x0, y0, x1, y1 = (side[keep] for side in found.extent)
        boxes = (x0 - grow, y0 - grow, np.minimum(x1 + grow + 1, width - 1),
                 np.minimum(y1 + grow + 1, height - 1))
        level = 255 - found.level[keep] if grow else found.level[keep] - 1
        return level, found.owner[keep], np.stack(boxes, 1)

    # the power of two leaves 255 * score as it is rounded: the levels are trunc(255 * score)
    values = (maps * (255.0 * 2.0**_FRACTION)).to(torch.int32)
    holes = _forest(2**31 - 1 - values, holes=True)
    if multi_contour:
        parts = (rows(_components(tree, height, width), grow)
                 for grow, tree in enumerate((_forest(values), holes)))
        return tuple(map(np.concatenate, zip(*parts)))
    values = _fill_holes(holes, values) if len(holes.peak) else values
    forest = _forest(values)
    outer = _components(forest, height, width)
    # the largest area; of equal ones that with the latest first pixel
    key = _doubled_areas(forest, values, outer) * (height * width) + outer.first
    group, best = outer.owner * _GREYS + outer.level, np.full(len(maps) * _GREYS, -1)
    np.maximum.at(best, group, key)
    return rows(outer, 0, key == best[group])


def _all_boxes(maps: Tensor, multi_contour: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_block_boxes` in blocks: of the second-level cache's size on the CPU, of 3 GB on the GPU."""
    step = max((2**26 if maps.is_cuda else 2**18) // maps[0].numel(), 1) if len(maps) else 1
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4), np.int64))]
    for start in range(0, len(maps), step):
        level, owner, boxes = _block_boxes(maps[start:start + step], multi_contour)
        parts.append((level, owner + start, boxes))
    return tuple(map(np.concatenate, zip(*parts)))


def scoremap_boxes(scoremaps: Array, multi_contour: bool = True) -> tuple[Array, Array, Array]:
    """Boxes of all grey levels of one map [H, W] or a batch [B, H, W]: (levels, owner, boxes).

    One row per box: levels int64 [M]: t in 0..254, the box belongs to {g > t} with g = trunc(255 *
    score); owner int64 [M]: index of the map; boxes int64 [M, 4]: x0, y0, x1, y1 of a contour, with
    multi_contour those of every component and every hole, else that of the contour of largest area.
    A level without foreground has no row. Rows are in no particular order."""
    result = _all_boxes(_scoremaps(scoremaps), multi_contour)
    if isinstance(scoremaps, Tensor):
        return tuple(torch.from_numpy(part).to(scoremaps.device) for part in result)
    return result


def _thresholds(values: Sequence[float] | None, interval: float, name: str) -> np.ndarray:
    if values is None:
        if not 0 < interval <= 1:
            raise ValueError(f"interval must be in (0, 1], got {interval}")
        return np.arange(0, 1, interval)
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{name} must hold at least one threshold, all in [0, 1], got {values}")
    return values


def compute_bboxes_from_scoremaps(scoremap: Array, scoremap_threshold_list: Sequence[float],
                                  multi_contour_eval: bool = False
                                  ) -> tuple[list[np.ndarray], list[int]]:
    """(boxes, counts) of one map: for each threshold an int array [k, 4] (x0, y0, x1, y1), and k.

    A threshold is relative to the map's highest level: foreground is g > int(threshold * max g).
    Rows are sorted. Without foreground the one box is [0, 0, 0, 0], as in the published code."""
    thresholds = _thresholds(scoremap_threshold_list, 1, "scoremap_threshold_list")
    maps = _scoremaps(scoremap, "scoremap", (2,))
    levels, _, boxes = _all_boxes(maps, multi_contour_eval)
    order = np.lexsort((*boxes.T[::-1], levels))
    boxes = boxes[order]
    bounds = np.searchsorted(levels[order], np.arange(_GREYS + 1))
    chosen = (thresholds * int(maps.max() * 255)).astype(int)
    result = [boxes[bounds[t]:bounds[t + 1]] for t in chosen]
    result = [rows if len(rows) else np.zeros((1, 4), dtype=np.int64) for rows in result]
    return result, [len(rows) for rows in result]


# ---- MaxBoxAcc ----

def _valid_boxes(boxes: Sequence | np.ndarray, name: str, error: type[Exception]) -> np.ndarray:
    array = np.asarray(boxes)
    if array.ndim != 2 or array.shape[1] != 4:
        raise error(f"{name} must be boxes [k, 4] (x0, y0, x1, y1), got shape {array.shape}")
    good = (array[:, 2:] >= array[:, :2]).all(1) & (array >= 0).all(1) & np.isfinite(array).all(1)
    if not good.all():
        raise error(f"{name} must have 0 <= x0 <= x1 and 0 <= y0 <= y1, "
                    f"got {array[~good][0].tolist()}")
    return array


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes with inclusive pixel coordinates, over the leading dimensions."""
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1
    overlap = np.maximum(overlap, 0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (a, b)]
    return overlap / (sum(areas) - overlap)


def calculate_multiple_iou(box_a: np.ndarray, box_b: np.ndarray) -> np.ndarray:
    """IoU float64 [A, B] of boxes [A, 4] and [B, 4] (x0, y0, x1, y1), all coordinates inclusive.

    RuntimeError for boxes with x1 < x0, y1 < y0 or a negative coordinate."""
    a = _valid_boxes(box_a, "box_a", RuntimeError).astype(np.float64)
    b = _valid_boxes(box_b, "box_b", RuntimeError).astype(np.float64)
    return _iou(a[:, None], b[None])


def resize_bbox(box: Sequence[float], image_size: Sequence[int],
                resize_size: Sequence[int]) -> tuple[int, int, int, int]:
    """Scale (x0, y0, x1, y1) from image_size = (width, height) to resize_size, each truncated."""
    x0, y0, x1, y1 = _valid_boxes([box], "box", RuntimeError)[0]
    (width, height), (new_width, new_height) = image_size, resize_size
    return (int(x0 * new_width / width), int(y0 * new_height / height),
            int(x1 * new_width / width), int(y1 * new_height / height))


class _Evaluator:
    """What both evaluators do: check and count images, keep a row for each, merge, bootstrap.

    Subclasses have `_measure(maps, image_ids)`, which adds to the arrays of `_counts()` and returns
    arrays with one row per image; `_rows` has those of all images in the order of `image_ids`."""

    _same: tuple[str, ...] = ()                    # attributes that must agree for a merge

    def _start(self, known: Mapping, thresholds: Sequence[float] | None, interval: float,
               resize_length: int, allow_repeat: bool) -> None:
        self.cam_threshold_list = _thresholds(thresholds, interval, "cam_threshold_list")
        if resize_length < 1:
            raise ValueError(f"resize_length must be positive, got {resize_length}")
        if not known:
            raise ValueError("the ground truth is empty: no image to evaluate")
        self.known, self.resize_length, self.allow_repeat = known, resize_length, allow_repeat
        self.image_ids: list[str] = []               # in the order of accumulation
        self._seen: set[str] = set()
        self._batches: list[tuple[np.ndarray, ...]] = []

    @property
    def cnt(self) -> int:
        """Number of accumulated maps."""
        return len(self.image_ids)

    def accumulate(self, scoremap: Array, image_id: str) -> None:
        """Add one map [L, L]."""
        self.accumulate_batch(_maps("scoremap", scoremap, (2,))[None], [image_id])

    def accumulate_batch(self, scoremaps: Array, image_ids: Sequence[str]) -> None:
        """Add maps [B, L, L] (numpy, or torch of any float type and device) of these images."""
        maps, ids = _scoremaps(scoremaps, dims=(3,)), list(image_ids)
        side = self.resize_length
        if len(ids) != len(maps):
            raise ValueError(f"{len(maps)} score maps came with {len(ids)} image ids")
        if maps.shape[1:] != (side, side):
            raise ValueError(f"score maps must be {side} x {side}, got {tuple(maps.shape[1:])}; "
                             "resize_scoremap brings them to size")
        for image_id in ids:
            if image_id not in self.known:
                raise KeyError(f"unknown image id {image_id!r}")
        self._refuse_repeats(ids)
        if ids:
            self._batches.append(self._measure(maps, ids))
            self._record(ids)

    def _refuse_repeats(self, ids: Sequence[str]) -> None:
        if not self.allow_repeat and (self._seen.intersection(ids) or len(set(ids)) < len(ids)):
            repeated = next(i for i in ids if i in self._seen or ids.count(i) > 1)
            raise ValueError(f"image id {repeated!r} accumulated twice; "
                             "pass allow_repeat=True if that is meant")

    def _record(self, ids: Sequence[str]) -> None:
        self.image_ids.extend(ids)
        self._seen.update(ids)

    def _ready(self, strict: bool = False) -> None:
        if self.cnt == 0:
            raise RuntimeError("nothing to compute: no score map was accumulated")
        if strict and len(self._seen) < len(self.known):
            missing = [image_id for image_id in self.known if image_id not in self._seen]
            raise ValueError(f"{len(missing)} of {len(self.known)} images were never accumulated, "
                             f"first {missing[0]!r}")

    def merge(self, other: "_Evaluator") -> "_Evaluator":
        """Add what another evaluator of the same ground truth and thresholds has counted."""
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        for name in ("cam_threshold_list", "resize_length", *self._same):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"cannot merge evaluators with different {name}")
        self._refuse_repeats(other.image_ids)
        for mine, theirs in zip(self._counts(), other._counts()):
            mine += theirs
        self._batches.extend(other._batches)
        self._record(other.image_ids)
        return self

    def _rows(self) -> Iterator[np.ndarray]:
        self._ready()
        return map(np.concatenate, zip(*self._batches))

    def _bootstrap(self, statistic: Callable, level: float, resamples: int,
                   seed: int) -> np.ndarray:
        """[2, ...]: interval of statistic(weights float64 [resamples, n]) -> [resamples, ...]."""
        self._ready()
        if resamples < 1 or not 0 < level < 1:
            raise ValueError("resamples must be positive and level in (0, 1), "
                             f"got {resamples} and {level}")
        draws = np.random.default_rng(seed).integers(self.cnt, size=(resamples, self.cnt))
        draws += np.arange(resamples)[:, None] * self.cnt
        weights = np.bincount(draws.ravel(), minlength=resamples * self.cnt).astype(np.float64)
        return np.quantile(statistic(weights.reshape(resamples, self.cnt)),
                           [(1 - level) / 2, (1 + level) / 2], axis=0)


@dataclass
class BoxResult:
    """What `BoxEvaluator.result` gives; n_iou and n_tau are the numbers of thresholds."""
    max_box_acc: list[float]                       # percent, per IoU threshold
    v2: float                                      # their mean
    curve: np.ndarray                              # [n_iou, n_tau]: BoxAcc in percent
    best_threshold: np.ndarray                     # [n_iou]: the first maximising tau
    n: int                                         # number of maps


class BoxEvaluator(_Evaluator):
    """MaxBoxAcc (multi_contour_eval=False, IoU 50), MaxBoxAccV2 (the mean over the default IoUs).

    gt_boxes: {image id: [k, 4] boxes in pixels of the original image}; image_sizes: {image id:
    (width, height)}; cam_threshold_list, or arange(0, 1, interval); iou_threshold_list in percent.
    Maps are resize_length on each side. In a distributed evaluation each process fills an evaluator
    of its own; gather them as objects and `merge`."""

    _same = ("iou_threshold_list", "multi_contour_eval")

    def __init__(self, gt_boxes: Mapping[str, Sequence], image_sizes: Mapping[str, Sequence[int]],
                 cam_threshold_list: Sequence[float] | None = None, interval: float = 0.001,
                 iou_threshold_list: Sequence[float] = (30, 50, 70),
                 multi_contour_eval: bool = True, resize_length: int = 224,
                 allow_repeat: bool = False) -> None:
        self.iou_threshold_list = ious = tuple(iou_threshold_list)
        if not ious or not all(0 < iou <= 100 for iou in ious):
            raise ValueError(f"iou_threshold_list must hold percentages in (0, 100], got {ious}")
        self.multi_contour_eval = bool(multi_contour_eval)
        self._start(gt_boxes, cam_threshold_list, interval, resize_length, allow_repeat)
        self.gt_boxes: dict[str, np.ndarray] = {}    # in pixels of the map
        for image_id, boxes in gt_boxes.items():
            if len(boxes) == 0:
                raise ValueError(f"gt_boxes has no box for image {image_id!r}")
            if image_id not in image_sizes:
                raise ValueError(f"image_sizes has no entry for image {image_id!r}")
            width, height = map(int, image_sizes[image_id])
            if width < 1 or height < 1:
                raise ValueError(f"image_sizes of {image_id!r} must be positive, "
                                 f"got {(width, height)}")
            boxes = _valid_boxes(boxes, f"gt_boxes of {image_id!r}", ValueError)
            sides = np.array([width, height, width, height])
            self.gt_boxes[image_id] = (boxes * resize_length / sides).astype(np.int64)
        taus = len(self.cam_threshold_list)
        self.num_correct = {iou: np.zeros(taus, np.int64) for iou in ious}

    def _counts(self) -> list[np.ndarray]:
        return list(self.num_correct.values())

    def _measure(self, maps: Tensor, image_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(best IoU float64 [B, 256] per grey level, grey level uint8 [B, n_tau] of each tau)."""
        best = self._best_iou(maps, image_ids)
        peak = (maps.amax((1, 2)) * 255).to(torch.uint8).cpu().numpy()
        chosen = (self.cam_threshold_list * peak[:, None]).astype(np.uint8)
        at_threshold = np.take_along_axis(best, chosen.astype(np.int64), 1)
        for iou, correct in self.num_correct.items():
            correct += (at_threshold >= iou / 100).sum(0)
        return best, chosen

    def _best_iou(self, maps: Tensor, image_ids: Sequence[str]) -> np.ndarray:
        truth = [self.gt_boxes[image_id] for image_id in image_ids]
        levels, owner, boxes = _all_boxes(maps, self.multi_contour_eval)
        cell, empty = owner * _GREYS + levels, np.ones(len(truth) * _GREYS, dtype=bool)
        empty[cell] = False                          # an empty foreground predicts [0, 0, 0, 0]
        cell = np.concatenate([cell, np.flatnonzero(empty)])
        boxes = np.concatenate([boxes, np.zeros((empty.sum(), 4), np.int64)])
        # one row for each pair of a predicted and a true box
        count = np.array([len(boxes) for boxes in truth])
        repeat = count[cell // _GREYS]
        row = np.repeat(np.arange(len(cell)), repeat)
        partner = np.arange(len(row)) + np.repeat(
            (np.cumsum(count) - count)[cell // _GREYS] - np.cumsum(repeat) + repeat, repeat)
        best = np.zeros(len(truth) * _GREYS)
        np.maximum.at(best, cell[row], _iou(boxes[row], np.concatenate(truth)[partner]))
        return best.reshape(-1, _GREYS)

    def compute(self, strict: bool = False) -> list[float]:
        """Percent correct at the best threshold, one per IoU; strict: every image must be in."""
        self._ready(strict)
        return [float((correct * 100.0 / self.cnt).max()) for correct in self._counts()]

    def result(self) -> BoxResult:
        accuracy = self.compute()
        curve = np.stack(self._counts()) * 100.0 / self.cnt
        best = self.cam_threshold_list[curve.argmax(1)]
        return BoxResult(accuracy, float(np.mean(accuracy)), curve, best, self.cnt)

    def per_image(self) -> dict[str, np.ndarray]:
        """{"iou" float64, "correct" bool}, each [n, n_iou], at the best threshold of each IoU."""
        best, chosen = self._rows()
        chosen = chosen[:, np.stack(self._counts()).argmax(1)].astype(np.int64)
        iou = np.take_along_axis(best, chosen, 1)
        return {"iou": iou, "correct": iou >= np.array(self.iou_threshold_list) / 100}

    def confidence_interval(self, level: float = 0.95, resamples: int = 1000,
                            seed: int = 0) -> dict[str, np.ndarray]:
        """Bootstrap over images, thresholds chosen anew: {"max_box_acc": [2, n_iou], "v2": [2]}."""
        def accuracy(weights: np.ndarray) -> np.ndarray:
            samples = np.zeros((len(weights), len(self.iou_threshold_list) + 1))
            for column, iou in enumerate(self.iou_threshold_list):
                total, start = 0.0, 0
                for best, chosen in self._batches:
                    correct = np.take_along_axis(best, chosen.astype(np.int64), 1) >= iou / 100
                    total += weights[:, start:start + len(best)] @ correct.astype(np.float64)
                    start += len(best)
                samples[:, column] = total.max(1) * 100 / self.cnt
            samples[:, -1] = samples[:, :-1].mean(1)
            return samples

        interval = self._bootstrap(accuracy, level, resamples, seed)
        return {"max_box_acc": interval[:, :-1], "v2": interval[:, -1]}


class TopOneLoc(BoxEvaluator):
    """Top-k localization: correct when a predicted class is the true one and the box fits.

    It mixes classification into the measure, which is why the protocol avoids it; earlier papers
    report it. gt_labels: {image id: int}; the other arguments are those of BoxEvaluator. The score
    map should be that of the predicted class."""

    def __init__(self, gt_boxes: Mapping[str, Sequence], image_sizes: Mapping[str, Sequence[int]],
                 gt_labels: Mapping[str, int], *args, **options) -> None:
        super().__init__(gt_boxes, image_sizes, *args, **options)
        if missing := [image_id for image_id in self.gt_boxes if image_id not in gt_labels]:
            raise ValueError(f"gt_labels has no entry for image {missing[0]!r}")
        self.gt_labels = gt_labels

    def accumulate(self, scoremap: Array, image_id: str, predicted: int | Sequence[int]) -> None:
        """predicted: the class, or the k best classes, of the image."""
        self.accumulate_batch(_maps("scoremap", scoremap, (2,))[None], [image_id], [predicted])

    def accumulate_batch(self, scoremaps: Array, image_ids: Sequence[str], predicted) -> None:
        """predicted: [B] classes or [B, k] best classes."""
        predicted = np.asarray(predicted.cpu() if isinstance(predicted, Tensor) else predicted)
        if len(predicted) != len(image_ids) or not np.issubdtype(predicted.dtype, np.integer):
            raise ValueError(f"predicted must be integer classes [{len(image_ids)}] or "
                             f"[{len(image_ids)}, k], got {predicted.dtype} {predicted.shape}")
        self._predicted = predicted.reshape(len(predicted), -1)
        super().accumulate_batch(scoremaps, image_ids)

    def _best_iou(self, maps: Tensor, image_ids: Sequence[str]) -> np.ndarray:
        labels = np.array([self.gt_labels[image_id] for image_id in image_ids])
        hit = (self._predicted == labels[:, None]).any(1)
        return np.where(hit[:, None], super()._best_iou(maps, image_ids), -1.0)


# ---- PxAP ----

def _nearest(mask: np.ndarray, size: int) -> np.ndarray:
    """[size, size] by OpenCV's INTER_NEAREST: no half pixel, and its rounding of 1 / (size / n)."""
    rows, columns = (np.minimum((np.arange(size) * (1.0 / (size / n))).astype(int), n - 1)
                     for n in mask.shape)
    return mask[rows[:, None], columns]


def get_mask(instance_masks: Sequence[np.ndarray], ignore_mask: np.ndarray | None = None,
             size: int = 224) -> np.ndarray:
    """uint8 [size, size]: 1 in an instance mask (> .5), else 255 in the ignore mask, else 0."""
    masks = [np.asarray(mask) for mask in instance_masks]
    if not masks:
        raise ValueError("instance_masks must hold at least one mask")
    ignore = np.zeros((1, 1)) if ignore_mask is None else np.asarray(ignore_mask)
    for mask in (*masks, ignore):
        if mask.ndim != 2 or mask.size == 0:
            raise ValueError(f"masks must be non-empty 2-d arrays, got shape {mask.shape}")
    inside = np.any([_nearest(mask, size) > 0.5 for mask in masks], axis=0)
    ignored = _nearest(ignore, size) > 0.5
    return np.where(inside, 1, np.where(ignored, 255, 0)).astype(np.uint8)


def _pxap(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """PxAP in percent from histograms [..., bins] of the scores of positive and negative pixels."""
    tp, fp = (np.cumsum(counts[..., ::-1], -1).astype(np.float64) for counts in (true, false))
    precision = tp / np.maximum(tp + fp, 1)
    recall = tp / np.maximum(tp[..., -1:], 1)
    return 100 * (precision[..., 1:] * np.diff(recall, axis=-1)).sum(-1)


class MaskEvaluator(_Evaluator):
    """PxAP: average precision over the pixels of all images together; pixels of label 255 left out.

    gt_masks: {image id: uint8 [L, L] of 0, 1, 255, as get_mask returns}; L = resize_length."""

    def __init__(self, gt_masks: Mapping[str, np.ndarray],
                 cam_threshold_list: Sequence[float] | None = None, interval: float = 0.001,
                 resize_length: int = 224, allow_repeat: bool = False) -> None:
        self._start(gt_masks, cam_threshold_list, interval, resize_length, allow_repeat)
        if (np.diff(self.cam_threshold_list) <= 0).any():
            raise ValueError("cam_threshold_list must rise strictly")
        for image_id, mask in gt_masks.items():
            if np.shape(mask) != (resize_length, resize_length):
                raise ValueError(f"gt_masks of {image_id!r} must be {resize_length} x "
                                 f"{resize_length}, got {np.shape(mask)}")
            if np.setdiff1d(mask, (0, 1, 255)).size:
                raise ValueError(f"gt_masks of {image_id!r} must hold 0, 1 and 255, "
                                 f"got {np.unique(mask)[:6].tolist()}")
        self._edges = np.append(self.cam_threshold_list, [1.0, 2.0, 3.0])
        bins = len(self._edges) - 1
        self.gt_true_score_hist, self.gt_false_score_hist = np.zeros((2, bins), np.int64)

    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        return self.gt_false_score_hist, self.gt_true_score_hist

    def _measure(self, maps: Tensor, image_ids: Sequence[str]) -> tuple[np.ndarray]:
        """Histograms int32 [B, 2, bins] of the scores of negative and of positive pixels."""
        truth = np.stack([np.asarray(self.known[i]).astype(np.uint8) for i in image_ids])
        truth, bins = torch.from_numpy(truth).to(maps.device), len(self._edges) - 1
        index = self._bin(maps)
        counted = (truth != 255) & (index >= 0)
        cell = torch.where(counted, index + truth.long() * bins, 2 * bins)
        cell += torch.arange(len(maps), device=maps.device).view(-1, 1, 1) * (3 * bins)
        hist = torch.bincount(cell.flatten(), minlength=len(maps) * 3 * bins)
        hist = hist.view(len(maps), 3, bins)[:, :2].cpu().numpy().astype(np.int32)
        for total, part in zip(self._counts(), hist.sum(0)):
            total += part
        return (hist,)

    def _bin(self, maps: Tensor) -> Tensor:
        """Index of the bin [edge, next edge) of each score, -1 below the first edge.

        Equal spacing gives a guess, which the edges themselves set right."""
        edges = torch.from_numpy(self._edges).to(maps.device)
        taus = self.cam_threshold_list
        count, last = len(taus), taus[-1]
        if last == 0 or not np.allclose(taus, np.linspace(0, last, count), rtol=0, atol=1e-9):
            return torch.searchsorted(edges, maps, right=True) - 1
        guess = (maps * ((count - 1) / last)).long().clamp_(max=count)
        guess += maps >= edges[guess + 1]
        return guess.sub_((maps < edges[guess]).long())

    def compute(self, strict: bool = False) -> float:
        """PxAP in percent; strict: every image must have been seen."""
        self._ready(strict)
        if not self.gt_true_score_hist.any():
            raise RuntimeError("no positive pixel in the ground truth of the accumulated images")
        return float(_pxap(self.gt_true_score_hist, self.gt_false_score_hist))

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(precision, recall, thresholds) at the falling thresholds that add pixels;
        100 * sum(precision * diff([0] + recall)) is PxAP."""
        self.compute()
        fp, tp = (np.cumsum(hist[::-1]) for hist in self._counts())
        filled = np.diff(tp + fp, prepend=0) > 0
        tp, fp = tp[filled], fp[filled]
        return tp / (tp + fp), tp / tp[-1], self._edges[:-1][::-1][filled]

    def per_image(self) -> np.ndarray:
        """PxAP of each image alone, in the order of `image_ids`; NaN without a positive pixel."""
        hist, = self._rows()
        return np.where(hist[:, 1].any(1), _pxap(hist[:, 1], hist[:, 0]), np.nan)

    def confidence_interval(self, level: float = 0.95, resamples: int = 1000,
                            seed: int = 0) -> np.ndarray:
        """[2]: bootstrap interval of PxAP over images."""
        false, true = (np.float64(part) for part in np.moveaxis(next(self._rows()), 1, 0))
        return self._bootstrap(lambda weights: _pxap(weights @ true, weights @ false),
                               level, resamples, seed)


# ---- Evaluation of files ----

def _table(path: Path, fields: int) -> Iterator[list[str]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            row = line.strip().split(",")
            if len(row) != fields:
                raise ValueError(f"{path}:{number}: {fields} fields expected, got {line!r}")
            yield row


def _read_grey(path: Path) -> np.ndarray:
    from PIL import Image
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def _load_scoremap(root: Path, image_id: str) -> np.ndarray:
    for path in (root / f"{image_id}.npy", (root / image_id).with_suffix(".npy")):
        if path.is_file():
            scoremap = np.load(path, allow_pickle=False)
            check_scoremap_validity(scoremap)
            return scoremap
    raise FileNotFoundError(f"no score map {image_id}.npy below {root}")


def evaluate_wsol(scoremap_root: str | Path, metadata_root: str | Path,
                  mask_root: str | Path | None, dataset_name: str, split: str,
                  multi_contour_eval: bool = True, multi_iou_eval: bool = True,
                  iou_threshold_list: Sequence[int] = (30, 50, 70),
                  cam_curve_interval: float = 0.001) -> float:
    """Score in percent of the maps scoremap_root/<image id>.npy.

    Reads metadata_root/<dataset_name>/<split>/*.txt. CUB and ILSVRC have boxes: the mean over
    iou_threshold_list, or with multi_iou_eval=False the value at IoU 50. OpenImages has masks,
    below mask_root/OpenImages: PxAP."""
    if dataset_name not in ("CUB", "ILSVRC", "OpenImages"):
        raise ValueError(f"dataset_name must be CUB, ILSVRC or OpenImages, got {dataset_name!r}")
    folder, maps = Path(metadata_root) / dataset_name / split, Path(scoremap_root)
    ids = [row[0] for row in _table(folder / "image_ids.txt", 1)]
    found: dict[str, list] = {}
    if dataset_name == "OpenImages":
        if mask_root is None:
            raise ValueError("mask_root is needed for OpenImages")
        ignore: dict[str, np.ndarray] = {}
        for image_id, mask, ignored in _table(folder / "localization.txt", 3):
            found.setdefault(image_id, []).append(_read_grey(Path(mask_root) / dataset_name / mask))
            if ignored:
                ignore[image_id] = _read_grey(Path(mask_root) / dataset_name / ignored)
        truth = {i: get_mask(masks, ignore.get(i)) for i, masks in found.items()}
        evaluator = MaskEvaluator(truth, interval=cam_curve_interval)
    else:
        if not multi_iou_eval and 50 not in iou_threshold_list:
            raise ValueError("multi_iou_eval=False needs 50 in iou_threshold_list, "
                             f"got {list(iou_threshold_list)}")
        for image_id, *box in _table(folder / "localization.txt", 5):
            found.setdefault(image_id, []).append([int(float(value)) for value in box])
        sizes = {i: (int(w), int(h)) for i, w, h in _table(folder / "image_sizes.txt", 3)}
        evaluator = BoxEvaluator(found, sizes, None, cam_curve_interval, iou_threshold_list,
                                 multi_contour_eval)
    for batch in (ids[start:start + 64] for start in range(0, len(ids), 64)):
        evaluator.accumulate_batch(np.stack([_load_scoremap(maps, i) for i in batch]), batch)
    value = evaluator.compute(strict=True)
    if dataset_name == "OpenImages":
        return value
    return float(np.mean(value)) if multi_iou_eval else value[list(iou_threshold_list).index(50)]


# ---- Search: the same number of random trials and the same full supervision for every method ----

_METHOD_SPACES = {
    "cam": {},
    "has": {"has_drop_rate": ("uniform", 0.0, 1.0), "has_grid_size": ("integer", 1, 224)},
    "acol": {"acol_drop_threshold": ("uniform", 0.0, 1.0)},
    "spg": {f"spg_threshold_{n}{end}": ("uniform", low and f"spg_threshold_{n}l", 1.0)
            for n in (1, 2, 3) for end, low in (("l", 0.0), ("h", True))},
    "adl": {"adl_drop_rate": ("uniform", 0.0, 1.0), "adl_drop_threshold": ("uniform", 0.0, 1.0)},
    "cutmix": {"cutmix_beta": ("inverse", 0.0, 2.0), "cutmix_prob": ("uniform", 0.0, 1.0)},
}


def search_space(method: str) -> dict[str, tuple]:
    """Distribution of each hyper-parameter of cam, has, acol, spg, adl or cutmix, to be changed.

    The paper draws 30 trials per method, backbone and data set; these ranges follow its description
    and could not be verified: there is no published search code. Entries: ("loguniform" |
    "uniform", low, high), ("integer", low, high) with both ends, ("choice", options), ("inverse",
    low, high) for 1/u - 1/2, u uniform in (low, high]. A bound may name an earlier entry."""
    if method not in _METHOD_SPACES:
        raise ValueError(f"method must be one of {', '.join(_METHOD_SPACES)}, got {method!r}")
    return {"lr": ("loguniform", 1e-5, 1.0), "large_feature_map": ("choice", (False, True)),
            **_METHOD_SPACES[method]}


def sample_trial(space: Mapping[str, tuple], rng: np.random.Generator) -> dict:
    """One value per entry of a search space, drawn in the order of the entries; plain numbers."""
    trial = {}
    for name, (kind, *bounds) in space.items():
        if kind == "choice":
            trial[name] = bounds[0][int(rng.integers(len(bounds[0])))]
            continue
        low, high = (trial[bound] if isinstance(bound, str) else bound for bound in bounds)
        if kind == "uniform":
            trial[name] = float(rng.uniform(low, high))
        elif kind == "loguniform":
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
            trial[name] = min(max(value, low), high)
        elif kind == "integer":
            trial[name] = int(rng.integers(low, high, endpoint=True))
        elif kind == "inverse":
            trial[name] = 1.0 / (high - (high - low) * float(rng.random())) - 0.5
        else:
            raise ValueError(f"unknown distribution {kind!r} of {name}")
    return trial


def random_search(evaluate: Callable[[dict], float], space: Mapping[str, tuple], path: str | Path,
                  trials: int = 30, seed: int = 0) -> list[dict]:
    """Score random settings; a finished trial is one JSON line of `path`, where a new call goes on.

    evaluate(trial) -> score, higher is better. Trial n depends on (seed, n) alone. Returns the
    records {"trial", "seed", "config", "score"}, best first; a score that is not finite (training
    diverged) is null and comes last."""
    path, done = Path(path), {}
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):             # cut off by an interruption
            lines.pop()
            path.write_text("".join(lines))
        for number, line in enumerate(lines, 1):
            record = json.loads(line)
            if record["seed"] != seed:
                raise ValueError(f"{path}:{number}: a search with seed {record['seed']}, "
                                 f"not {seed}, was written here")
            done[record["trial"]] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(trials):
        config = sample_trial(space, np.random.default_rng([seed, number]))
        if number in done:
            if done[number]["config"] != json.loads(json.dumps(config)):
                raise ValueError(f"{path}: trial {number} was drawn from another search space")
            continue
        score = float(evaluate(config))
        done[number] = {"trial": number, "seed": seed, "config": config,
                        "score": score if math.isfinite(score) else None}
        with path.open("a") as stream:
            stream.write(json.dumps(done[number]) + "\n")
    return sorted((done[number] for number in range(trials)), reverse=True,
                  key=lambda record: -math.inf if record["score"] is None else record["score"])


def _demonstration() -> None:
    """One method, three calibrations: fixed thresholds rank them at will, MaxBoxAcc does not."""
    rng, count, size = np.random.default_rng(0), 100, 112
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    (cx, cy), (wx, wy) = (rng.uniform(low, 0.5, (2, count, 1, 1)) for low in (-0.5, 0.15))
    maps = normalize_scoremap(np.exp(-((x - cx) / wx)**2 - ((y - cy) / wy)**2))
    boxes = {str(n): compute_bboxes_from_scoremaps(m, [0.35])[0][0] for n, m in enumerate(maps)}
    print("score     BoxAcc(.2)  BoxAcc(.5)  MaxBoxAcc  best tau   (IoU .7)")
    for name, power in (("sqrt(s)", 0.5), ("s", 1.0), ("s^2", 2.0)):
        evaluator = BoxEvaluator(boxes, dict.fromkeys(boxes, (size, size)),
                                 iou_threshold_list=(70,), resize_length=size)
        evaluator.accumulate_batch(maps**power, list(boxes))
        result = evaluator.result()
        print(f"{name:8s}{result.curve[0, 200]:11.1f}{result.curve[0, 500]:12.1f}"
              f"{result.max_box_acc[0]:11.1f}{result.best_threshold[0]:10.3f}")


if __name__ == "__main__":
    _demonstration()
