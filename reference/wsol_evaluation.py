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
times and asks OpenCV for the contours. Here no map is thresholded: `scoremap_boxes` reads the boxes
of all levels from one merge tree, and the time does not depend on the number of thresholds. What is
done per pixel is torch and runs where the maps are (CPU or GPU); the trees, a few kilobytes per
map, are numpy.

Copy this file; it needs torch, numpy and (for files of masks) Pillow. Bad arguments are ValueErrors
that name the argument, wrong types TypeErrors, an unknown image id a KeyError, and a result before
there is anything to count a RuntimeError.

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
import os
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray | Tensor


# ---- Score maps ----

def _maps(name: str, maps: Array, dims: Sequence[int],
          kinds: Sequence[str] = ("float", "int")) -> Tensor:
    """`maps` as float64 on its own device, after a check of type and number of dimensions."""
    if not isinstance(maps, (np.ndarray, Tensor)):
        raise TypeError(f"{name} must be an array or a tensor, not {type(maps).__name__}")
    if maps.ndim not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} dimensions, "
                         f"got shape {tuple(maps.shape)}")
    if 0 in maps.shape[-2:]:
        raise ValueError(f"{name} must not be empty, got shape {tuple(maps.shape)}")
    if not any(kind in getattr(maps.dtype, "name", str(maps.dtype)) for kind in kinds):
        raise TypeError(f"{name} must hold {' or '.join(kinds)} values, got {maps.dtype}")
    if isinstance(maps, np.ndarray):
        maps = torch.from_numpy(maps.astype(np.float64, order="C", copy=not maps.flags.writeable))
    return maps.detach().to(torch.float64)


def _scoremaps(maps: Array, name: str = "scoremaps", dims: Sequence[int] = (2, 3)) -> Tensor:
    """A valid score map, or a batch of them, as a contiguous float64 tensor [B, H, W]."""
    maps = _maps(name, maps, dims, ("float",)).contiguous()
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


def resize_scoremap(cam: Array, size: int | Sequence[int]) -> Array:
    """Cubic resize of maps [..., H, W] to size = (height, width), float64, as OpenCV's INTER_CUBIC.

    Keys' kernel with a = -.75, half-pixel centres, borders repeated. Normalise afterwards:
    overshoot belongs to the range. A constant map stays exactly constant."""
    sides = (size, size) if np.ndim(size) == 0 else tuple(size)
    if len(sides) != 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in sides):
        raise ValueError(f"size must be one or two (height, width) positive integers, got {size!r}")
    height, width = map(int, sides)
    maps = _maps("cam", cam, range(2, 9))

    def weights(inputs: int, outputs: int) -> Tensor:         # [outputs, inputs], of one axis
        one_hot = torch.eye(inputs, dtype=torch.float64, device=maps.device)[None, None]
        return F.interpolate(one_hot, size=(outputs, inputs), mode="bicubic")[0, 0]

    corner = maps[..., :1, :1]
    constant = (maps == corner).all(-1, keepdim=True).all(-2, keepdim=True)
    resized = weights(maps.shape[-2], height) @ maps @ weights(maps.shape[-1], width).T
    return _like(torch.where(constant, corner, resized), cam)


# ---- Boxes of all levels at once ----
#
# The sets {g >= v} of the 8-bit map g, v = 255..1, grow as v falls: components appear at local
# maxima and merge. The tree of these events holds every component of every level.
#
# Cut every row where the score starts to rise again: each run has one top, and {g >= v} is an
# interval of it. A run that touches a higher one at its own top is never a component of its own and
# is made part of the other, which leaves about one node per local maximum. For each pair of
# touching nodes the highest level w at which they touch matters, and of these contacts a maximum
# spanning forest. There a node of peak p that hangs on its parent by an edge of weight w stands for
# one component of {g >= v} at each level w < v <= p, and from v = w on is part of its parent's. The
# tops of runs tell its extents: every row of a component holds one, every column that of a column.
#
# Holes are the components of {255 - g >= u}, pixels touching at sides only, that do not reach a
# frame of one pixel around the map. One box for each component and each hole is what all contours
# give. The largest contour is that of the largest component of the map with its holes filled.

_GREYS = 256
_FRACTION = 23      # int32 pixel values: 8 bits of grey level, and 23 that order equal grey levels


def _where(mask: Tensor) -> np.ndarray:
    """Flat indices of the true entries, on the host."""
    if mask.device.type == "cpu":
        return np.flatnonzero(mask.numpy())                   # three times faster than torch's
    return mask.flatten().nonzero().squeeze(1).cpu().numpy()


def _levels(values: Tensor, index: np.ndarray) -> np.ndarray:
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


def _contacts(values: Tensor, first: np.ndarray, corners: bool) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields (run, run, level at which they touch); first: flat index of each run's first pixel."""
    _, height, width = values.shape
    run_of = lambda pixel: np.searchsorted(first, pixel, side="right") - 1     # noqa: E731
    later = np.flatnonzero(first % width)
    yield later - 1, later, _levels(values, first[later] - 1)

    def between_rows(mask: Tensor, levels: Tensor, left: int, right: int) -> tuple:
        index = _where(mask)
        row, column = np.divmod(index, mask.shape[2])
        upper = (row + row // (height - 1)) * width + column   # `mask` has one row less per map
        return run_of(upper + left), run_of(upper + width + right), _levels(levels, index)

    upper, lower = values[:, :-1], values[:, 1:]
    both = torch.minimum(upper, lower)
    yield between_rows(_runs(both, 2)[1], both, 0, 0)         # the tops of common stretches suffice
    part = lambda rows, start: rows[..., start:start + width - 1]              # noqa: E731
    for left, right in ((0, 1), (1, 0)) if corners else ():
        both = torch.minimum(part(upper, left), part(lower, right))
        others = torch.maximum(part(upper, right), part(lower, left))
        yield between_rows(both > others, both, left, right)  # else they touch at sides as well


def _spanning_forest(a: np.ndarray, b: np.ndarray, level: np.ndarray,
                     size: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(parent, -1: none; weight) of the len(size) nodes by Kruskal's algorithm.

    The smaller tree is hung below the root of the larger one, which keeps the trees flat."""
    nodes = len(size)
    code = np.sort((np.minimum(a, b) * nodes + np.maximum(a, b)) * _GREYS + level)
    code = code[np.append(np.diff(code // _GREYS) > 0, True)[:len(code)]]      # highest of a pair
    code = code[np.argsort(-(code % _GREYS), kind="stable")]
    above, parent, weight = list(range(nodes)), [-1] * nodes, [0] * nodes
    for pair, level in zip((code // _GREYS).tolist(), (code % _GREYS).tolist()):
        a, b = divmod(pair, nodes)
        while above[a] != a:
            above[a] = a = above[above[a]]
        while above[b] != b:
            above[b] = b = above[above[b]]
        if a != b:
            if size[a] < size[b]:
                a, b = b, a
            above[b], parent[b], weight[b] = a, a, level
            size[a] += size[b]
    return np.array(parent, dtype=np.int64), np.array(weight, dtype=np.int64)


class _Tree:
    """Merge trees of a batch of maps. Of each node: `peak`, its map `owner`, `parent`, `weight`.

    It has a row for each component of each level set, grouped by node with falling levels: `node`,
    `level` (v of {g >= v}); row base[n] - v is that of node n at level v. With `holes` the map has
    a frame of the highest value, whose own component is left out."""

    def __init__(self, values: Tensor, holes: bool = False) -> None:
        self.shape = batch, height, width = values.shape
        first, top = map(_where, _runs(values, 2))
        level = _levels(values, top)
        a, b, touch = map(np.concatenate, zip(*_contacts(values, first, not holes)))
        # nodes: a run becomes part of a higher one that it touches at its own top
        into = np.arange(len(first))
        rank = level * len(level) + into                      # of equal tops the later is higher
        for low, high in ((a, b), (b, a)):
            joins = (touch == level[low]) & (rank[low] < rank[high])
            into[low[joins]] = high[joins]
        while not np.array_equal(further := into[into], into):
            into = further
        roots = np.flatnonzero(into == np.arange(len(into)))
        self.peak, self.owner = level[roots], top[roots] // (height * width)
        self.run_node = node = np.searchsorted(roots, into)
        self.run_length = np.diff(first, append=values.numel())
        node_of = lambda pixel: node[np.searchsorted(first, pixel, "right") - 1]   # noqa: E731
        # edges, and the tree
        a, b, size = node[a], node[b], np.ones(len(roots), dtype=np.int64)
        apart = (a != b) & (touch > 0)
        if holes:                                             # the last pixel of a map is frame
            frames = node_of(np.arange(1, batch + 1) * (height * width) - 1)
            size[frames] += len(roots)                        # as the largest they stay roots
        self.parent, self.weight = _spanning_forest(a[apart], b[apart], touch[apart], size.tolist())
        if holes:
            self.weight[frames] = _GREYS - 1                  # and have no level of their own
        # tops of the runs along rows, and along columns
        column_top = _where(_runs(values, 1)[1])
        self.tops = ((node, top, level),
                     (node_of(column_top), column_top, _levels(values, column_top)))
        # rows
        count = self.peak - self.weight
        self.node = np.repeat(np.arange(len(count)), count)
        self.base = np.cumsum(count) - count + self.peak
        self.level = self.base[self.node] - np.arange(len(self.node))

    def painted(self, colors: np.ndarray, like: Tensor) -> Tensor:
        """[B, H, W]: each pixel in the color of its node."""
        color, length = (torch.from_numpy(part).to(like.device)
                         for part in (colors[self.run_node], self.run_length))
        return color.repeat_interleave(length, output_size=math.prod(self.shape)).view(self.shape)

    def climb(self, node: np.ndarray, level: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields (which items, row) where items, pixels of `level` in `node`, enter a component.

        An item of level l is in its own node for v <= l, and in an ancestor for v <= the lowest
        edge on the way. The trees are flat (at most log2 of their size): this takes few rounds."""
        item = np.arange(len(node))
        while len(item):
            weight = self.weight[node]
            here = level > weight
            yield item[here], self.base[node[here]] - level[here]
            level, node = np.minimum(level, weight), self.parent[node]
            keep = (node >= 0) & (level > 0)
            item, node, level = item[keep], node[keep], level[keep]

    def extents(self) -> tuple[np.ndarray, ...]:
        """(first, x0, y0, x1, y1), inclusive, of each row; first: the leftmost top of the first
        line of pixels, as y * W + x."""
        _, height, width = self.shape
        pixels = height * width
        # the running minima start afresh at each node: later nodes lie lower by more than any index
        floor = (len(self.peak) - self.node) * pixels
        least = np.tile(floor + pixels - 1, (4, 1))           # of index, -index; column, -column
        for (forward, backward), span, (node, index, level) in zip(
                least.reshape(2, 2, -1), (pixels, width), self.tops):
            place = index % span
            for item, row in self.climb(node, level):
                np.minimum.at(forward, row, floor[row] + place[item])
                np.minimum.at(backward, row, floor[row] + pixels - 1 - place[item])
        first, last, x0, x1 = np.minimum.accumulate(least, axis=1) - floor
        return first, x0, first // width, pixels - 1 - x1, (pixels - 1 - last) // width

    def doubled_areas(self, values: Tensor) -> np.ndarray:
        """Twice the area in each row's outer border, a polygon through pixel centres, of a map
        without holes.

        The polygon holds all of a 2 x 2 block with four pixels inside and half of one with three: a
        block counts from its second lowest level on and once more from its lowest."""
        values = (values >> _FRACTION).to(torch.uint8)
        a, b, c, d = values[:, :-1, :-1], values[:, :-1, 1:], values[:, 1:, :-1], values[:, 1:, 1:]
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        low2, high2 = torch.minimum(c, d), torch.maximum(c, d)
        lowest = torch.minimum(low, low2)
        second = torch.minimum(torch.maximum(low, low2), torch.minimum(high, high2))
        cells = len(self.peak) * _GREYS                       # int32 halves the time
        label = np.arange(0, cells, _GREYS, dtype=np.int32 if cells < 2**31 else np.int64)
        label = self.painted(label, values)[:, :-1]
        label = torch.where(a >= b, label[..., :-1], label[..., 1:])   # of three, one is a or b
        counts = sum(torch.bincount((label + level).flatten(), minlength=cells)
                     for level in (lowest, second)).cpu().numpy()
        used = np.flatnonzero(counts)
        area = np.zeros(len(self.node), dtype=np.int64)
        for item, row in self.climb(*np.divmod(used, _GREYS)):
            np.add.at(area, row, counts[used[item]])
        total, start = np.cumsum(area), (self.base - self.peak)[self.node]
        return total - total[start] + area[start]


def _fill_holes(holes: _Tree, values: Tensor) -> Tensor:
    """Fill the holes of every level set: no pixel is lower than its lowest way to the frame."""
    escape, node = holes.weight.copy(), holes.parent.copy()
    while (inside := np.flatnonzero(node >= 0)).size:
        escape[inside] = np.minimum(escape[inside], holes.weight[node[inside]])
        node[inside] = holes.parent[node[inside]]
    fill = (_GREYS - 1 - escape).astype(np.int32) << _FRACTION
    return torch.maximum(values, holes.painted(fill, values)[:, 1:-1, 1:-1])


def _block_boxes(maps: Tensor, multi_contour: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(levels, owner, boxes) of maps [B, H, W], as `scoremap_boxes`."""
    _, height, width = maps.shape

    def rows(tree: _Tree, level: np.ndarray, before: int) -> tuple[np.ndarray, ...]:
        first, x0, y0, x1, y1 = tree.extents()
        x1, y1 = np.minimum(x1 + 1, width - 1), np.minimum(y1 + 1, height - 1)   # as published
        boxes = np.stack([x0 - before, y0 - before, x1, y1], 1)
        return level, tree.owner[tree.node], boxes, first

    # the power of two leaves 255 * score as it is rounded: the levels are trunc(255 * score)
    values = (maps * (255.0 * 2.0**_FRACTION)).to(torch.int32)
    holes = _Tree(F.pad(2**31 - 1 - values, (1, 1, 1, 1), value=2**31 - 1), holes=True)
    if multi_contour:
        tree = _Tree(values)
        # the border of a hole lies around it: one pixel before, and one for the frame
        parts = rows(tree, tree.level - 1, 0), rows(holes, _GREYS - 1 - holes.level, 2)
        return tuple(map(np.concatenate, list(zip(*parts))[:3]))
    values = _fill_holes(holes, values) if len(holes.node) else values
    tree = _Tree(values)
    level, owner, boxes, first = rows(tree, tree.level - 1, 0)
    # the largest area; of equal ones that with the latest first pixel
    key = tree.doubled_areas(values) * (height * width) + first
    group, best = owner * _GREYS + level, np.full(len(maps) * _GREYS, -1)
    np.maximum.at(best, group, key)
    won = key == best[group]
    return level[won], owner[won], boxes[won]


def _all_boxes(maps: Tensor, multi_contour: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_block_boxes` in blocks: of the second-level cache's size on the CPU, of 3 GB on the GPU."""
    step = max((2**18 if maps.device.type == "cpu" else 2**26) // math.prod(maps.shape[1:]), 1)
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
    values = np.asarray(values, dtype=np.float64).copy()      # the caller's own may change
    if values.ndim != 1 or len(values) == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{name} must hold at least one threshold, all in [0, 1], got {values}")
    return values


def _check_side(name: str, value: int) -> None:
    if not value >= 1 or value % 1:
        raise ValueError(f"{name} must be a positive whole number, got {value}")


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
    return array.astype(np.float64)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes with inclusive pixel coordinates, over the leading dimensions."""
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1
    overlap = np.maximum(overlap, 0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (a, b)]
    return overlap / (sum(areas) - overlap)


def calculate_multiple_iou(box_a: np.ndarray, box_b: np.ndarray) -> np.ndarray:
    """IoU float64 [A, B] of boxes [A, 4] and [B, 4] (x0, y0, x1, y1), all coordinates inclusive.

    RuntimeError for boxes with x1 < x0, y1 < y0 or a negative coordinate."""
    a = _valid_boxes(box_a, "box_a", RuntimeError)
    b = _valid_boxes(box_b, "box_b", RuntimeError)
    return _iou(a[:, None], b[None])


def resize_bbox(box: Sequence[float], image_size: Sequence[int],
                resize_size: Sequence[int]) -> tuple[int, int, int, int]:
    """Scale (x0, y0, x1, y1) from image_size = (width, height) to resize_size, each truncated.

    RuntimeError for boxes as in `calculate_multiple_iou`."""
    corners = _valid_boxes([box], "box", RuntimeError)[0].tolist()
    for name, size in (("image_size", image_size), ("resize_size", resize_size)):
        if len(size) != 2 or not min(size) > 0:
            raise ValueError(f"{name} must be a positive (width, height), got {tuple(size)}")
    return tuple(int(x * new / old) for x, new, old in
                 zip(corners, (*resize_size, *resize_size), (*image_size, *image_size)))


class _Evaluator:
    """What both evaluators do: check and count images, keep a row for each, merge, bootstrap.

    Subclasses have `_counts()`, arrays that add up over images; and `_measure(maps, image_ids)`,
    which returns what to add to them and a tuple of arrays with one row per image."""

    _same: tuple[str, ...] = ()                    # attributes that must agree for a merge

    def __init__(self, known: Mapping, cam_threshold_list: Sequence[float] | None, interval: float,
                 resize_length: int, allow_repeat: bool) -> None:
        self.cam_threshold_list = _thresholds(cam_threshold_list, interval, "cam_threshold_list")
        _check_side("resize_length", resize_length)
        if not known:
            raise ValueError("the ground truth is empty: no image to evaluate")
        self.known: dict[str, object] = dict(known)
        self.resize_length, self.allow_repeat = resize_length, allow_repeat
        self.image_ids: list[str] = []               # in the order of accumulation
        self._seen: set[str] = set()
        self._batches: list[tuple[np.ndarray, ...]] = []

    @property
    def cnt(self) -> int:
        """Number of accumulated maps."""
        return len(self.image_ids)

    def accumulate(self, scoremap: Array, image_id: str, *rest) -> None:
        """Add one map [L, L]."""
        maps = _maps("scoremap", scoremap, (2,), ("float",))[None]
        self.accumulate_batch(maps, [image_id], *([one] for one in rest))

    def accumulate_batch(self, scoremaps: Array, image_ids: Sequence[str]) -> None:
        """Add maps [B, L, L] (numpy, or torch of any float type and device) of these images."""
        maps = _scoremaps(scoremaps, dims=(3,))
        ids = image_ids.tolist() if isinstance(image_ids, Tensor) else list(image_ids)
        side = self.resize_length
        if len(ids) != len(maps):
            raise ValueError(f"{len(maps)} score maps came with {len(ids)} image ids")
        if maps.shape[1:] != (side, side):
            raise ValueError(f"score maps must be {side} x {side}, got {tuple(maps.shape[1:])}; "
                             "resize_scoremap brings them to size")
        if unknown := [image_id for image_id in ids if image_id not in self.known]:
            raise KeyError(f"unknown image id {unknown[0]!r}")
        if ids:
            counts, rows = self._measure(maps, ids)
            self._add(ids, counts, [rows])

    def _add(self, ids: Sequence[str], counts: Sequence[np.ndarray], batches: list) -> None:
        if not self.allow_repeat and (self._seen.intersection(ids) or len(set(ids)) < len(ids)):
            repeated = next(i for i in ids if i in self._seen or ids.count(i) > 1)
            raise ValueError(f"image id {repeated!r} accumulated twice; "
                             "pass allow_repeat=True if that is meant")
        for total, part in zip(self._counts(), counts):
            total += part
        self._batches.extend(batches)
        self.image_ids.extend(ids)
        self._seen.update(ids)

    def merge(self, other: "_Evaluator") -> "_Evaluator":
        """Add what another evaluator of the same ground truth and thresholds has counted."""
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        for name in ("cam_threshold_list", "resize_length", *self._same):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"cannot merge evaluators with different {name}")
        self._add(other.image_ids, other._counts(), other._batches)
        return self

    def _ready(self, strict: bool = False) -> None:
        if self.cnt == 0:
            raise RuntimeError("nothing to compute: no score map was accumulated")
        if strict and (missing := [known for known in self.known if known not in self._seen]):
            raise ValueError(f"{len(missing)} of {len(self.known)} images were never accumulated, "
                             f"first {missing[0]!r}")

    def _rows(self) -> Iterator[np.ndarray]:
        """The arrays of `_measure` for all images, in the order of `image_ids`."""
        self._ready()
        return map(np.concatenate, zip(*self._batches))

    def _bootstrap(self, level: float, resamples: int, seed: int,
                   statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[2, ...]: interval of statistic(weights float64 [resamples, n]) -> [resamples, ...]."""
        if resamples < 1 or not 0 < level < 1:
            raise ValueError("resamples must be positive and level in (0, 1), "
                             f"got {resamples} and {level}")
        draws = np.random.default_rng(seed).integers(self.cnt, size=(resamples, self.cnt))
        draws += np.arange(resamples)[:, None] * self.cnt
        weights = np.bincount(draws.ravel(), minlength=resamples * self.cnt).astype(np.float64)
        return np.quantile(statistic(weights.reshape(resamples, self.cnt)),
                           [(1 - level) / 2, (1 + level) / 2], axis=0)


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
        super().__init__(gt_boxes, cam_threshold_list, interval, resize_length, allow_repeat)
        self.iou_threshold_list = ious = tuple(iou_threshold_list)
        if not ious or len(set(ious)) < len(ious) or not all(0 < iou <= 100 for iou in ious):
            raise ValueError("iou_threshold_list must hold distinct percentages in (0, 100], "
                             f"got {ious}")
        self.multi_contour_eval = bool(multi_contour_eval)
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
            scaled = boxes * float(resize_length) / np.array([width, height] * 2)
            self.gt_boxes[image_id] = scaled.astype(np.int64)
        self.num_correct = {iou: np.zeros(len(self.cam_threshold_list), np.int64) for iou in ious}

    def _counts(self) -> list[np.ndarray]:
        return list(self.num_correct.values())

    def _measure(self, maps: Tensor, image_ids: Sequence[str]) -> tuple[list, tuple]:
        """Rows: best IoU float64 [B, 256] of a grey level, grey level uint8 [B, n_tau] of a tau."""
        best = self._best_iou(maps, image_ids)
        peak = (maps.amax((1, 2)) * 255).to(torch.uint8).cpu().numpy()
        chosen = (self.cam_threshold_list * peak[:, None]).astype(np.uint8)
        at_threshold = np.take_along_axis(best, chosen, 1)
        return [(at_threshold >= iou / 100).sum(0) for iou in self.num_correct], (best, chosen)

    def _best_iou(self, maps: Tensor, image_ids: Sequence[str]) -> np.ndarray:
        truth = [self.gt_boxes[image_id] for image_id in image_ids]
        most = max(map(len, truth))                  # [most, B, 4]: those of an image are repeated
        truth = np.stack([np.resize(boxes, (most, 4)) for boxes in truth], 1)
        levels, owner, boxes = _all_boxes(maps, self.multi_contour_eval)
        found = reduce(np.maximum, (_iou(boxes, others[owner]) for others in truth))
        # without foreground the predicted box is [0, 0, 0, 0]
        best = np.repeat(_iou(np.zeros(4), truth).max(0), _GREYS)
        cell = owner * _GREYS + levels
        best[cell] = 0
        np.maximum.at(best, cell, found)
        return best.reshape(-1, _GREYS)

    def compute(self, strict: bool = False) -> list[float]:
        """Percent correct at the best threshold, one per IoU; strict: every image must be in."""
        self._ready(strict)
        return [float((correct * 100.0 / self.cnt).max()) for correct in self._counts()]

    def result(self) -> SimpleNamespace:
        """Attributes in percent: max_box_acc, list of n_iou; v2, their mean; curve [n_iou, n_tau].
        best_threshold [n_iou]: the first maximising tau; n: number of maps."""
        accuracy, curve = self.compute(), np.stack(self._counts()) * 100.0 / self.cnt
        return SimpleNamespace(max_box_acc=accuracy, v2=float(np.mean(accuracy)), curve=curve,
                               best_threshold=self.cam_threshold_list[curve.argmax(1)], n=self.cnt)

    def per_image(self) -> dict[str, np.ndarray]:
        """{"iou" float64, "correct" bool}, each [n, n_iou], at the best threshold of each IoU."""
        best, chosen = self._rows()
        iou = np.take_along_axis(best, chosen[:, np.stack(self._counts()).argmax(1)], 1)
        return {"iou": iou, "correct": iou >= np.array(self.iou_threshold_list) / 100}

    def confidence_interval(self, level: float = 0.95, resamples: int = 1000,
                            seed: int = 0) -> dict[str, np.ndarray]:
        """Bootstrap over images, thresholds chosen anew: {"max_box_acc": [2, n_iou], "v2": [2]}."""
        best, chosen = self._rows()

        def accuracy(weights: np.ndarray) -> np.ndarray:
            correct = (np.take_along_axis(best >= iou / 100, chosen, 1).astype(np.float64)
                       for iou in self.iou_threshold_list)
            samples = np.stack([(weights @ one).max(1) * 100 / self.cnt for one in correct], 1)
            return np.column_stack([samples, samples.mean(1)])

        interval = self._bootstrap(level, resamples, seed, accuracy)
        return {"max_box_acc": interval[:, :-1], "v2": interval[:, -1]}


class TopOneLoc(BoxEvaluator):
    """Top-1 (or top-k) localization: correct when the box fits and the class was predicted.

    It mixes classification into the measure, which is why the protocol avoids it; earlier papers
    report it. `accumulate` takes one argument more: predicted, whether the image's class is the
    predicted one (or among the k best); `accumulate_batch`: bool [B]. The score map should be that
    of the predicted class."""

    def accumulate_batch(self, scoremaps: Array, image_ids: Sequence[str], predicted) -> None:
        predicted = torch.as_tensor(predicted).cpu().numpy()
        if predicted.shape != (len(image_ids),) or predicted.dtype != bool:
            raise ValueError(f"predicted must be bool [{len(image_ids)}], "
                             f"got {predicted.dtype} {list(predicted.shape)}")
        self._predicted = predicted
        super().accumulate_batch(scoremaps, image_ids)

    def _best_iou(self, maps: Tensor, image_ids: Sequence[str]) -> np.ndarray:
        return np.where(self._predicted[:, None], super()._best_iou(maps, image_ids), -1.0)


# ---- PxAP ----

def get_mask(instance_masks: Sequence[np.ndarray], ignore_mask: np.ndarray | None = None,
             size: int = 224) -> np.ndarray:
    """uint8 [size, size]: 1 in an instance mask (> .5), else 255 in the ignore mask, else 0.

    Each mask is resized as by OpenCV's INTER_NEAREST: no half pixel, its rounding of the scale."""
    if len(instance_masks) == 0:
        raise ValueError("instance_masks must hold at least one mask")
    _check_side("size", size)

    def inside(mask: np.ndarray) -> np.ndarray:
        mask = np.asarray(mask)
        if mask.ndim != 2 or mask.size == 0:
            raise ValueError(f"masks must be non-empty 2-d arrays, got shape {mask.shape}")
        rows, columns = (np.minimum((np.arange(size) * (1.0 / (size / n))).astype(int), n - 1)
                         for n in mask.shape)
        return mask[rows[:, None], columns] > 0.5

    ignored = ignore_mask is not None and inside(ignore_mask)
    return np.where(reduce(np.logical_or, map(inside, instance_masks)), 1,
                    np.where(ignored, 255, 0)).astype(np.uint8)


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
        super().__init__(gt_masks, cam_threshold_list, interval, resize_length, allow_repeat)
        if (np.diff(self.cam_threshold_list) <= 0).any():
            raise ValueError("cam_threshold_list must rise strictly")
        for image_id, mask in gt_masks.items():
            if np.shape(mask) != (resize_length, resize_length):
                raise ValueError(f"gt_masks of {image_id!r} must be {resize_length} x "
                                 f"{resize_length}, got {np.shape(mask)}")
            if np.setdiff1d(mask, (0, 1, 255)).size:
                raise ValueError(f"gt_masks of {image_id!r} must hold 0, 1 and 255, "
                                 f"got {np.unique(mask)[:6].tolist()}")
            self.known[image_id] = np.asarray(mask).astype(np.uint8)
        self._edges = np.append(self.cam_threshold_list, [1.0, 2.0, 3.0])
        self.gt_true_score_hist, self.gt_false_score_hist = np.zeros((2, len(self._edges) - 1),
                                                                     np.int64)

    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        return self.gt_false_score_hist, self.gt_true_score_hist

    def _measure(self, maps: Tensor, image_ids: Sequence[str]) -> tuple[np.ndarray, tuple]:
        """Rows: histograms int32 [B, 2, bins] of the scores of negative and positive pixels."""
        truth = np.stack([self.known[image_id] for image_id in image_ids])
        truth, bins = torch.from_numpy(truth).to(maps.device), len(self._edges) - 1
        index = self._bin(maps)
        counted = (truth != 255) & (index >= 0)
        cell = torch.where(counted, index + truth.int() * bins, 2 * bins)
        cell += torch.arange(len(maps), device=maps.device).view(-1, 1, 1).int() * (3 * bins)
        hist = torch.bincount(cell.flatten(), minlength=len(maps) * 3 * bins)
        hist = hist.view(len(maps), 3, bins)[:, :2].cpu().numpy().astype(np.int32)
        return hist.sum(0), (hist,)

    def _bin(self, maps: Tensor) -> Tensor:
        """Index int32 of the bin [edge, next edge) of each score, -1 below the first edge.

        Equal spacing gives a guess, which the edges themselves set right."""
        edges = torch.from_numpy(self._edges).to(maps.device)
        taus = self.cam_threshold_list
        count, last = len(taus), taus[-1]
        if last == 0 or not np.allclose(taus, np.linspace(0, last, count), rtol=0, atol=1e-9):
            return torch.searchsorted(edges, maps, right=True, out_int32=True) - 1
        edge = lambda index: edges.index_select(0, index.flatten()).view_as(maps)  # noqa: E731
        guess = (maps * ((count - 1) / last)).int().clamp_(max=count)
        guess += maps >= edge(guess + 1)
        return guess - (maps < edge(guess)).int()

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
        self.compute()
        hist, = self._rows()
        false, true = np.float64(hist[:, 0]), np.float64(hist[:, 1])
        return self._bootstrap(level, resamples, seed,
                               lambda weights: _pxap(weights @ true, weights @ false))


# ---- Evaluation of files ----

def _table(path: Path, fields: int, numbers: bool = False) -> Iterator[list]:
    """Rows [image id, ...] of a metadata file; numbers: what follows the id is whole numbers."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            image_id, *rest = map(str.strip, line.split(","))
            try:
                rest = [int(float(value)) for value in rest] if numbers else rest
            except (OverflowError, ValueError):
                raise ValueError(f"{path}:{number}: numbers expected, got {line!r}") from None
            if len(rest) != fields - 1:
                raise ValueError(f"{path}:{number}: {fields} fields expected, got {line!r}")
            yield [image_id, *rest]


def _read_grey(path: Path) -> np.ndarray:
    from PIL import Image
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def _load_scoremap(root: Path, image_id: str) -> np.ndarray:
    for path in (root / f"{image_id}.npy", (root / image_id).with_suffix(".npy")):
        if path.is_file():
            try:
                scoremap = np.load(path, allow_pickle=False)
                check_scoremap_validity(scoremap)
                if scoremap.shape != (224, 224):
                    raise ValueError(f"score map must be 224 x 224, got {scoremap.shape}")
            except (EOFError, TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{path}: {error}") from error
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
    folder, found = Path(metadata_root) / dataset_name / split, {}
    if dataset_name == "OpenImages":
        if mask_root is None:
            raise ValueError("mask_root is needed for OpenImages")
        ignore: dict[str, np.ndarray] = {}
        for image_id, mask, ignored in _table(folder / "localization.txt", 3):
            if ignored and image_id in found:
                raise ValueError(f"{folder / 'localization.txt'}: only the first line of "
                                 f"{image_id!r} may name an ignore mask")
            found.setdefault(image_id, []).append(_read_grey(Path(mask_root) / dataset_name / mask))
            if ignored:
                ignore[image_id] = _read_grey(Path(mask_root) / dataset_name / ignored)
        evaluator = MaskEvaluator({i: get_mask(masks, ignore.get(i)) for i, masks in found.items()},
                                  interval=cam_curve_interval)
    else:
        if not multi_iou_eval and 50 not in iou_threshold_list:
            raise ValueError("multi_iou_eval=False needs 50 in iou_threshold_list, "
                             f"got {list(iou_threshold_list)}")
        for image_id, *box in _table(folder / "localization.txt", 5, numbers=True):
            found.setdefault(image_id, []).append(box)
        sizes = {i: size for i, *size in _table(folder / "image_sizes.txt", 3, numbers=True)}
        evaluator = BoxEvaluator(found, sizes, None, cam_curve_interval, iou_threshold_list,
                                 multi_contour_eval)
    ids = [row[0] for row in _table(folder / "image_ids.txt", 1)]
    for batch in (ids[start:start + 64] for start in range(0, len(ids), 64)):
        maps = [_load_scoremap(Path(scoremap_root), image_id) for image_id in batch]
        evaluator.accumulate_batch(np.stack(maps), batch)
    value = evaluator.compute(strict=True)
    if dataset_name == "OpenImages":
        return value
    return float(np.mean(value)) if multi_iou_eval else value[list(iou_threshold_list).index(50)]


# ---- Search: the same number of random trials and the same full supervision for every method ----

_UNIT = ("uniform", 0.0, 1.0)
_METHOD_SPACES = {
    "cam": {},
    "has": {"has_drop_rate": _UNIT, "has_grid_size": ("integer", 1, 224)},
    "acol": {"acol_drop_threshold": _UNIT},
    "spg": {f"spg_threshold_{n}{end}": space for n in "123" for end, space in (
        ("l", _UNIT), ("h", ("uniform", f"spg_threshold_{n}l", 1.0)))},
    "adl": {"adl_drop_rate": _UNIT, "adl_drop_threshold": _UNIT},
    "cutmix": {"cutmix_beta": ("inverse", 0.0, 2.0), "cutmix_prob": _UNIT},
}
_DRAWS = {
    "uniform": lambda rng, low, high: float(rng.uniform(low, high)),
    "loguniform": lambda rng, low, high: min(max(math.exp(
        rng.uniform(math.log(low), math.log(high))), low), high),
    "integer": lambda rng, low, high: int(rng.integers(low, high, endpoint=True)),
    "inverse": lambda rng, low, high: 1.0 / (high - (high - low) * float(rng.random())) - 0.5,
    "choice": lambda rng, options: options[int(rng.integers(len(options)))],
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
    for name, entry in space.items():
        try:
            kind, *bounds = entry
            bounds = [trial[bound] if isinstance(bound, str) else bound for bound in bounds]
            trial[name] = _DRAWS[kind](rng, *bounds)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"space has no distribution of {name} that search_space describes, "
                             f"got {entry!r}") from error
    return trial


def random_search(evaluate: Callable[[dict], float], space: Mapping[str, tuple], path: str | Path,
                  trials: int = 30, seed: int = 0) -> list[dict]:
    """Score random settings; a finished trial is one JSON line of `path`, where a new call goes on.

    evaluate(trial) -> score, higher is better. Trial n depends on (seed, n) alone. Returns the
    records {"trial", "seed", "config", "score"}, best first; a score that is not finite (training
    diverged) is null and comes last."""
    path, records = Path(path), []
    path.parent.mkdir(parents=True, exist_ok=True)
    *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if rest:                                                   # cut off by an interruption
        os.truncate(path, path.stat().st_size - len(rest))
    for number in range(trials):
        config = sample_trial(space, np.random.default_rng([seed, number]))
        record = json.loads(json.dumps({"trial": number, "seed": seed, "config": config}))
        if number < len(lines):
            try:
                done = json.loads(lines[number])
                same = done == record | {"score": done["score"] and float(done["score"])}
                came = f"trial {done['trial']} of seed {done['seed']}"
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path}:{number + 1}: not the record of a trial, "
                                 f"got {lines[number]!r}") from None
            if not same:
                raise ValueError(f"{path}:{number + 1}: {came} is not what seed {seed} and "
                                 "this space draw")
            records.append(done)
            continue
        score = float(evaluate(config))
        records.append(record | {"score": score if math.isfinite(score) else None})
        with path.open("a") as stream:
            stream.write(json.dumps(records[-1]) + "\n")
    return sorted(records, reverse=True,
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
