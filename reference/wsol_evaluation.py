"""Evaluation of weakly supervised object localization: MaxBoxAcc, MaxBoxAccV2, PxAP and the search protocol.

Choe, Oh, Chun, Lee, Akata, Shim: "Evaluation for Weakly Supervised Object Localization: Protocol, Metrics, and
Datasets", TPAMI 2022 (arXiv 2007.04178), the journal version of "Evaluating WSOL Methods Right", CVPR 2020 (2001.07437).

A localization method gives a score map s(X) in [0, 1]^(H x W) for each image; a threshold tau turns it into boxes or a mask.
No operating point is transferable between methods, so every metric is reported over all thresholds:

    BoxAcc(tau, delta) = 100/N sum_n [ max over predicted boxes at tau, max over true boxes, of IoU >= delta ]
    MaxBoxAcc          = max_tau BoxAcc(tau, .5), one predicted box: that of the contour with the largest area
    MaxBoxAccV2        = mean over delta in {.3, .5, .7} of max_tau BoxAcc(tau, delta), the boxes of all contours
    PxAP               = 100 sum_l PxPrec(tau_l) (PxRec(tau_l) - PxRec(tau_(l-1))), pixels of all images pooled, tau falling

Numbers are those of the published evaluator to the last bit, which thresholds each map a thousand times and asks OpenCV for
the contours. Here no map is ever thresholded: the sets {g >= v} of its 8-bit version g, v = 255..1, grow as a tree; the tree
is found once, for a batch of maps, from the basins of attraction of the local maxima, and all boxes of all levels are read
from it (`scoremap_boxes`). Holes are the same tree of 255 - g. The time does not depend on the number of thresholds.
The per-pixel part is torch and runs where the maps are (CPU or GPU); the trees, a few kilobytes per map, are numpy.

Copy this file; it needs torch, numpy and (for files of masks) Pillow.

>>> import numpy as np
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

# --------------------------------------------------------------------------------------------------------------------
# Score maps
# --------------------------------------------------------------------------------------------------------------------


def _like(result: Tensor, example: Array) -> Array:
    return result if isinstance(example, Tensor) else result.cpu().numpy()


def _maps(name: str, maps: Array, dims: tuple[int, ...]) -> Tensor:
    """`maps` as a float64 tensor on its own device, after a check of type and number of dimensions."""
    if not isinstance(maps, (np.ndarray, Tensor)):
        raise TypeError(f"{name} must be a numpy array or a torch tensor, not {type(maps).__name__}")
    if maps.ndim not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} dimensions, got shape {tuple(maps.shape)}")
    if not (maps.is_floating_point() if isinstance(maps, Tensor) else np.issubdtype(maps.dtype, np.floating)):
        raise TypeError(f"{name} must hold floating-point values, got {maps.dtype}")
    tensor = maps if isinstance(maps, Tensor) else torch.from_numpy(maps.astype(np.float64, order="C", copy=False))
    return tensor.detach().to(torch.float64)


def _scoremaps(maps: Array) -> Tensor:
    """A valid score map, or a batch of them, as a contiguous float64 tensor [B, H, W]."""
    maps = _maps("scoremaps", maps, (2, 3)).contiguous()
    if maps.shape[-1] == 0 or maps.shape[-2] == 0:
        raise ValueError(f"score maps must not be empty, got shape {tuple(maps.shape)}")
    if maps.numel():
        low, high = torch.stack(torch.aminmax(maps)).tolist()
        if not (low >= 0 and high <= 1):                                       # also true for a NaN
            raise ValueError(f"score maps must lie in [0, 1] without NaN; their range is [{low}, {high}]")
    return maps.view(-1, *maps.shape[-2:])


def normalize_scoremap(cam: Array) -> Array:
    """Min-max normalisation of each map [..., H, W] in float64; a constant map, or one with a NaN or infinity, becomes 0."""
    maps = _maps("cam", cam, tuple(range(2, 9)))
    low = maps.amin((-2, -1), keepdim=True)
    maps = maps - low
    high = maps.amax((-2, -1), keepdim=True)
    return _like(torch.where(torch.isfinite(high) & (high > 0), maps / high, torch.zeros_like(maps)), cam)


def check_scoremap_validity(scoremap: np.ndarray) -> None:
    """TypeError unless `scoremap` is a float64 array; ValueError unless it is 2-d, without NaN and inside [0, 1]."""
    if not isinstance(scoremap, np.ndarray):
        raise TypeError(f"scoremap must be a numpy array, not {type(scoremap).__name__}")
    if scoremap.dtype != np.float64:
        raise TypeError(f"scoremap must be float64, got {scoremap.dtype}")
    if scoremap.ndim != 2:
        raise ValueError(f"scoremap must be 2-dimensional, got shape {scoremap.shape}")
    if np.isnan(scoremap).any():
        raise ValueError("scoremap contains NaN")
    if (scoremap < 0).any() or (scoremap > 1).any():
        raise ValueError(f"scoremap must lie in [0, 1], got [{scoremap.min()}, {scoremap.max()}]")


def _height_width(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else map(int, size)
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be positive, got {size}")
    return height, width


def _cubic_weights(inputs: int, outputs: int, device: torch.device) -> Tensor:
    """[outputs, inputs] matrix of Keys' cubic kernel, a = -.75, half-pixel centres, border values repeated."""
    a = -0.75
    position = (torch.arange(outputs, dtype=torch.float64, device=device) + 0.5) * (inputs / outputs) - 0.5
    left = position.floor()
    t = position - left
    near, far = lambda d: ((a + 2) * d - (a + 3)) * d * d + 1, lambda d: ((d - 5) * d + 8) * d * a - 4 * a
    taps = torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], 1)
    columns = (left.long()[:, None] + torch.arange(-1, 3, device=device)).clamp(0, inputs - 1)
    return torch.zeros(outputs, inputs, dtype=torch.float64, device=device).scatter_add_(1, columns, taps)


def resize_scoremap(cam: Array, size: int | Sequence[int]) -> Array:
    """Cubic resize of maps [..., H, W] to size = (height, width) in float64, as OpenCV's INTER_CUBIC; normalise afterwards.

    A constant map stays exactly constant, so that normalisation sees it.
    """
    height, width = _height_width("size", size)
    maps = _maps("cam", cam, tuple(range(2, 9)))
    rows = _cubic_weights(maps.shape[-2], height, maps.device)
    columns = _cubic_weights(maps.shape[-1], width, maps.device)
    corner = maps[..., :1, :1]
    constant = (maps == corner).all(-1, keepdim=True).all(-2, keepdim=True)
    return _like(torch.where(constant, corner, rows @ maps @ columns.T), cam)


# --------------------------------------------------------------------------------------------------------------------
# Boxes of all levels at once
#
# A basin is the set of pixels from which steepest ascent ends in the same local maximum. Inside one basin every level set
# {g >= v} is connected, so the connected components of the whole {g >= v} follow from the basins and, for each pair of
# touching basins, the highest level w at which they touch. A maximum spanning forest of these contacts, with the edges
# child -> parent, says it all: a basin with the peak p and the edge of weight w stands for one component at each of the
# levels w < v <= p, and from v = w on it is part of its parent.
# --------------------------------------------------------------------------------------------------------------------

_GREY_SHIFT = 54            # pixel key: 8 bits of grey level, the finer bits of the score, the pixel's index in the lowest bits
_GREYS = 256


def _grey_levels(maps: Tensor) -> Tensor:
    return (maps * 255).to(torch.uint8)                                        # truncates


def _flat_nonzero(mask: Tensor) -> Tensor:
    if mask.is_cuda:
        return mask.flatten().nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))                      # three times faster than torch's


def _segment_max(values: Tensor, starts: Tensor) -> Tensor:
    """Maximum of each stretch of the flat uint8 `values` between two consecutive `starts`."""
    if not values.is_cuda:
        return torch.from_numpy(np.maximum.reduceat(values.numpy(), starts.numpy()))
    ends = torch.cat([starts, starts.new_tensor([len(values)])])
    return torch.segment_reduce(values.float(), "max", offsets=ends, unsafe=True).to(torch.uint8)


def _bincount(values: Tensor, length: int) -> np.ndarray:
    if values.is_cuda:
        return torch.bincount(values.flatten(), minlength=length).cpu().numpy()
    return np.bincount(values.flatten().numpy(), minlength=length)


def _pixel_keys(maps: Tensor) -> tuple[Tensor, int]:
    """Distinct int64 keys [B, H, W] whose order refines that of the grey levels, and the number of bits of the pixel index.

    Scores break ties of grey levels, which leaves far fewer local maxima than ties broken by the index alone.
    """
    pixels = maps[0].numel()
    bits = (pixels - 1).bit_length()
    index = torch.arange(pixels, device=maps.device).view(maps[0].shape)
    keys = (maps * (255.0 * 2.0 ** _GREY_SHIFT)).to(torch.int64)               # the power of two leaves 255 * score as it is
    return keys.bitwise_and_(-1 << bits).bitwise_or_(index), bits


def _basins(keys: Tensor, bits: int, better: Callable, eight: bool) -> tuple[Tensor, Tensor]:
    """(labels int32 [B, H, W], roots): the basin of each pixel and the flat index of each basin's best pixel.

    better: torch.maximum or torch.minimum; eight: 8 neighbours, else 4.
    """
    best = keys.clone()
    better(best[..., 1:], keys[..., :-1], out=best[..., 1:])
    better(best[..., :-1], keys[..., 1:], out=best[..., :-1])
    source, best = (best, best.clone()) if eight else (keys, best)
    better(best[:, 1:], source[:, :-1], out=best[:, 1:])
    better(best[:, :-1], source[:, 1:], out=best[:, :-1])
    offset = torch.arange(len(keys), device=keys.device).view(-1, 1, 1) * keys[0].numel()
    pointer = best.bitwise_and_((1 << bits) - 1).add_(offset).to(torch.int32).flatten()
    while not torch.equal(further := pointer.index_select(0, pointer), pointer):
        pointer = further
    roots = _flat_nonzero(pointer == torch.arange(len(pointer), dtype=torch.int32, device=keys.device))
    rank = torch.empty_like(pointer)
    rank[roots] = torch.arange(len(roots), dtype=torch.int32, device=keys.device)
    return rank.index_select(0, pointer).view(keys.shape), roots


def _contacts(labels: Tensor, levels: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
    """(basin, basin, level) for the pairs of neighbouring pixels with the flat indices `first` and `second`."""
    labels, levels = labels.view(-1), levels.view(-1)
    return [labels[first], labels[second], torch.minimum(levels[first], levels[second])]


def _runs(labels: Tensor, levels: Tensor) -> tuple[list[np.ndarray], list[Tensor]]:
    """Cut the lines of the last axis into runs of one basin: ([basin, line, highest level] per run, contacts between runs)."""
    lines, length = labels.shape[-2:]
    first = torch.ones(labels.shape, dtype=torch.bool, device=labels.device)
    torch.ne(labels[..., 1:], labels[..., :-1], out=first[..., 1:])
    starts = _flat_nonzero(first)
    line = starts // length
    inner = starts[starts != line * length]
    runs = labels.view(-1)[starts], line % lines, _segment_max(levels.view(-1), starts)
    return [part.cpu().numpy().astype(np.int64) for part in runs], _contacts(labels, levels, inner - 1, inner)


def _diagonal_contacts(labels: Tensor, levels: Tensor) -> Iterator[list[Tensor]]:
    _, height, width = labels.shape
    for left, right in ((0, 1), (1, 0)):                                       # down to the right, down to the left
        upper = labels[:, :-1, left:width - right]
        differ = _flat_nonzero(upper != labels[:, 1:, right:width - left])
        row = differ // (width - 1)                                            # row counted over all maps
        first = differ + row + left + row // (height - 1) * width
        yield _contacts(labels, levels, first, first + width + right - left)


@dataclass
class _Forest:
    """The merge tree of the level sets of a batch of maps; one node per basin."""
    labels: Tensor                       # int32 [B, H, W], basin of each pixel
    owner: np.ndarray                    # map of each basin
    peak: np.ndarray                     # level of its local maximum
    parent: np.ndarray                   # basin it joins, -1: none
    weight: np.ndarray                   # level at which it joins, 0: never
    runs: list[list[np.ndarray]]         # rows and columns cut into runs: [basin, row (column), highest level]

    def climb(self, node: np.ndarray, level: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Send items (basin, level) up the tree; yields (which items, node, level) where they are part of a node.

        An item of level l is in the node of its own basin for v <= l, and in that of an ancestor for v <= the lowest
        edge in between. The trees are flat (at most log2 of their size), so this ends after a few rounds.
        """
        item = np.arange(len(node))
        while len(item):
            weight = self.weight[node]
            here = level > weight
            yield item[here], node[here], level[here]
            level, node = np.minimum(level, weight), self.parent[node]
            keep = (node >= 0) & (level > 0)
            item, node, level = item[keep], node[keep], level[keep]


def _forest(keys: Tensor, bits: int, levels: Tensor, holes: bool = False) -> _Forest:
    """Merge tree of {levels >= v}: 8-connected maxima of `keys`, or (holes) 4-connected minima joined to the outside."""
    batch, height, width = keys.shape
    labels, roots = _basins(keys, bits, torch.minimum if holes else torch.maximum, not holes)
    count = len(roots)
    row_runs, row_contacts = _runs(labels, levels)
    column_runs, column_contacts = _runs(labels.mT.contiguous(), levels.mT.contiguous())
    contacts = [row_contacts, column_contacts]
    if holes:                                                                  # node count + b is the outside of map b
        outside = count + torch.arange(batch, dtype=torch.int32, device=keys.device)[:, None]
        for side in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
            contacts.append([labels[side].flatten(), outside.expand_as(labels[side]).flatten(), levels[side].flatten()])
    elif height > 1 and width > 1:
        contacts.extend(_diagonal_contacts(labels, levels))
    parent, weight = _spanning_forest(*(torch.cat(part) for part in zip(*contacts)), count, batch if holes else 0)
    return _Forest(labels, (roots // (height * width)).cpu().numpy(), levels.view(-1)[roots].cpu().numpy().astype(np.int64),
                   parent, weight, [row_runs, column_runs])


def _spanning_forest(a: Tensor, b: Tensor, level: Tensor, count: int, outsides: int) -> tuple[np.ndarray, np.ndarray]:
    """Maximum spanning forest of the contacts (a, b, level > 0) by Kruskal's algorithm: (parent, weight) of `count` basins.

    The smaller tree is hung below the root of the larger one, which keeps the trees flat; the outsides stay roots.
    """
    total = count + outsides
    code = (torch.minimum(a, b).long() * total + torch.maximum(a, b)) * _GREYS + level
    code = code[level > 0]
    code = torch.sort(code)[0].cpu().numpy() if code.is_cuda else np.sort(code.numpy())
    pair, level = code // _GREYS, code % _GREYS
    strongest = np.append(pair[1:] != pair[:-1], True)[:len(pair)]             # of each pair
    pair, level = pair[strongest], level[strongest]
    order = np.argsort(-level, kind="stable")
    a, b = np.divmod(pair[order], total)
    above, size = list(range(total)), [1] * count + [total] * outsides
    parent, weight = [-1] * total, [0] * total
    for a, b, level in zip(a.tolist(), b.tolist(), level[order].tolist()):
        while above[a] != a:
            above[a] = a = above[above[a]]
        while above[b] != b:
            above[b] = b = above[above[b]]
        if a == b:
            continue
        if size[a] < size[b]:
            a, b = b, a
        above[b], weight[b] = a, level
        parent[b] = a if a < count else -1
        size[a] += size[b]
    return np.array(parent[:count], dtype=np.int64), np.array(weight[:count], dtype=np.int64)


@dataclass
class _Components:
    """One row for each component of each level set, grouped by node with falling levels."""
    node: np.ndarray
    owner: np.ndarray
    level: np.ndarray                    # v of {levels >= v}
    extent: np.ndarray                   # int64 [4, rows]: first x, first y, last x, last y
    base: np.ndarray                     # row of (node, level) = base[node] - level


def _components(forest: _Forest, height: int, width: int) -> _Components:
    count = forest.peak - forest.weight
    start = np.cumsum(count) - count
    node = np.repeat(np.arange(len(count)), count)
    base = start + forest.peak
    level = base[node] - np.arange(len(node))
    # the running minimum must start afresh at each node: later nodes lie lower by more than any coordinate
    side = max(height, width)
    floor = (len(count) - node) * side
    extent = np.tile(floor + side - 1, (4, 1))
    for axis, (basin, line, top) in ((1, forest.runs[0]), (0, forest.runs[1])):
        for item, at, high in forest.climb(basin, top):
            row = base[at] - high
            np.minimum.at(extent[axis], row, floor[row] + line[item])
            np.minimum.at(extent[axis + 2], row, floor[row] + side - 1 - line[item])
    extent = np.minimum.accumulate(extent, axis=1) - floor
    extent[2:] = side - 1 - extent[2:]
    return _Components(node, forest.owner[node], level, extent, base)


def _boxes(extent: np.ndarray, height: int, width: int, grow: int) -> np.ndarray:
    """Rows (x0, y0, x1, y1): the published convention x1 = last x + 1 clipped to the image; a hole's border is outside it."""
    x0, y0, x1, y1 = extent
    return np.stack([x0 - grow, y0 - grow, np.minimum(x1 + grow + 1, width - 1), np.minimum(y1 + grow + 1, height - 1)], 1)


def _fill_holes(holes: _Forest, keys: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(keys, levels) with every hole of every level set filled: no pixel is lower than its lowest way to the outside."""
    escape, node = holes.weight.copy(), holes.parent.copy()
    while (inside := np.flatnonzero(node >= 0)).size:
        escape[inside] = np.minimum(escape[inside], holes.weight[node[inside]])
        node[inside] = holes.parent[node[inside]]
    fill = torch.from_numpy((_GREYS - 1 - escape).astype(np.uint8)).to(levels.device)
    fill = fill.index_select(0, holes.labels.view(-1)).view(levels.shape)
    index_bits = keys & ((1 << (keys[0].numel() - 1).bit_length()) - 1)
    return torch.maximum(keys, (fill.long() << _GREY_SHIFT) | index_bits), torch.maximum(levels, fill)


def _doubled_areas(forest: _Forest, levels: Tensor, components: _Components) -> np.ndarray:
    """Twice the polygon area of the outer border of each component of a map without holes.

    The polygon through the pixel centres holds all of a 2 x 2 block with four pixels in the component and half of one with
    three: the block counts once from its second lowest level on and once more from its lowest level on.
    """
    area = np.zeros(len(components.node), dtype=np.int64)
    a, b, c, d = levels[:, :-1, :-1], levels[:, :-1, 1:], levels[:, 1:, :-1], levels[:, 1:, 1:]
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    low2, high2 = torch.minimum(c, d), torch.maximum(c, d)
    lowest = torch.minimum(low, low2)
    second = torch.minimum(torch.maximum(low, low2), torch.minimum(high, high2))
    labels = forest.labels[:, :-1]
    cell = torch.where(a >= b, labels[..., :-1], labels[..., 1:]) * _GREYS     # one of a, b is in whenever three are
    counts = sum(_bincount(cell + level, len(forest.peak) * _GREYS) for level in (lowest, second))
    used = np.flatnonzero(counts)
    for item, node, level in forest.climb(*np.divmod(used, _GREYS)):
        np.add.at(area, components.base[node] - level, counts[used[item]])
    total = np.cumsum(area)
    first = (components.base - forest.peak)[components.node]
    return total - total[first] + area[first]


def _largest(forest: _Forest, levels: Tensor, components: _Components) -> np.ndarray:
    """Row of the component with the largest border polygon per (map, level); ties go to the latest first pixel."""
    group = components.owner * _GREYS + components.level
    height, width = levels.shape[1:]

    def winners(rows: np.ndarray, key: np.ndarray) -> np.ndarray:
        best = np.full(len(levels) * _GREYS, -1, dtype=np.int64)
        np.maximum.at(best, group[rows], key)
        return rows[key == best[group[rows]]]

    area = _doubled_areas(forest, levels, components)
    rows = winners(np.arange(len(group)), area * height + components.extent[1])
    if len(rows) == len(np.unique(group[rows])):
        return rows
    # equal area and equal top row: compare the first pixel in that row
    owner, level, top = components.owner[rows], components.level[rows], components.extent[1][rows]
    where = torch.from_numpy(owner * height + top).to(levels.device)
    inside = levels.view(-1, width)[where].cpu().numpy() >= level[:, None]
    node = forest.labels.view(-1, width)[where].cpu().numpy().astype(np.int64)
    while (up := inside & (forest.weight[node] >= level[:, None])).any():
        node[up] = forest.parent[node[up]]
    return winners(rows, (inside & (node == components.node[rows][:, None])).argmax(1))


def _block_boxes(maps: Tensor, multi_contour: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    _, height, width = maps.shape
    keys, bits = _pixel_keys(maps)
    levels = (keys >> _GREY_SHIFT).to(torch.uint8)
    holes = _forest(keys, bits, 255 - levels, holes=True)
    if not multi_contour:
        keys, levels = _fill_holes(holes, keys, levels)
    forest = _forest(keys, bits, levels)
    outer = _components(forest, height, width)
    if not multi_contour:
        rows = _largest(forest, levels, outer)
        return outer.level[rows] - 1, outer.owner[rows], _boxes(outer.extent[:, rows], height, width, 0)
    inner = _components(holes, height, width)
    return (np.concatenate([outer.level - 1, 255 - inner.level]), np.concatenate([outer.owner, inner.owner]),
            np.concatenate([_boxes(outer.extent, height, width, 0), _boxes(inner.extent, height, width, 1)]))


def _all_boxes(maps: Tensor, multi_contour: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`scoremap_boxes` for checked maps, in blocks: of the second-level cache's size on the CPU, of 3 GB on the GPU."""
    step = max((2 ** 26 if maps.is_cuda else 2 ** 18) // maps[0].numel(), 1) if len(maps) else 1
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4), np.int64))]
    for start in range(0, len(maps), step):
        level, owner, boxes = _block_boxes(maps[start:start + step], multi_contour)
        parts.append((level, owner + start, boxes))
    return tuple(np.concatenate(part) for part in zip(*parts))


def scoremap_boxes(scoremaps: Array, multi_contour: bool = True) -> tuple[Array, Array, Array]:
    """Boxes of all grey levels of one map [H, W] or a batch [B, H, W] at once: (levels, owner, boxes), one row per box.

    levels int64 [M]: t in 0..254, the box belongs to {g > t} with g = trunc(255 * score); owner int64 [M]: index of the map;
    boxes int64 [M, 4]: x0, y0, x1, y1 of a contour, with multi_contour those of every component and every hole, else that of
    the contour with the largest area. A level without foreground has no row. Rows are in no particular order.
    """
    result = _all_boxes(_scoremaps(scoremaps), multi_contour)
    if isinstance(scoremaps, Tensor):
        return tuple(torch.from_numpy(part).to(scoremaps.device) for part in result)
    return result


def _thresholds(values: Sequence[float] | None, interval: float, name: str = "cam_threshold_list") -> np.ndarray:
    if values is None:
        if not 0 < interval <= 1:
            raise ValueError(f"interval must be in (0, 1], got {interval}")
        return np.arange(0, 1, interval)
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must be a list of at least one threshold, got shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{name} must lie in [0, 1], got {values.min()} .. {values.max()}")
    return values


def compute_bboxes_from_scoremaps(scoremap: Array, scoremap_threshold_list: Sequence[float],
                                  multi_contour_eval: bool = False) -> tuple[list[np.ndarray], list[int]]:
    """(boxes, counts) of one map: an int array [k, 4] (x0, y0, x1, y1; sorted rows) and k for each threshold.

    A threshold is relative to the map's highest grey level: foreground is g > int(threshold * max g). A threshold without
    foreground gives the single box [0, 0, 0, 0], as in the published evaluator.
    """
    thresholds = _thresholds(scoremap_threshold_list, 1, "scoremap_threshold_list")
    maps = _scoremaps(_maps("scoremap", scoremap, (2,)))
    levels, _, boxes = _all_boxes(maps, multi_contour_eval)
    order = np.lexsort((*boxes.T[::-1], levels))
    boxes = boxes[order]
    ends = np.searchsorted(levels[order], np.arange(_GREYS), side="right")
    starts = np.append(0, ends[:-1])
    nothing = np.zeros((1, 4), dtype=np.int64)
    chosen = (thresholds * _grey_levels(maps).max().item()).astype(int)
    result = [boxes[starts[t]:ends[t]] if ends[t] > starts[t] else nothing.copy() for t in chosen]
    return result, [len(rows) for rows in result]


# --------------------------------------------------------------------------------------------------------------------
# MaxBoxAcc
# --------------------------------------------------------------------------------------------------------------------


def _valid_boxes(boxes: Sequence | np.ndarray, name: str, error: type[Exception]) -> np.ndarray:
    array = np.asarray(boxes)
    if array.ndim != 2 or array.shape[1] != 4:
        raise error(f"{name} must be boxes [k, 4] (x0, y0, x1, y1), got shape {array.shape}")
    wrong = (array[:, 2:] < array[:, :2]).any(1) | (array < 0).any(1) | ~np.isfinite(array).all(1)
    if wrong.any():
        raise error(f"{name} must have 0 <= x0 <= x1 and 0 <= y0 <= y1, got {array[wrong][0].tolist()}")
    return array


def _paired_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes with inclusive pixel coordinates, over the leading dimensions."""
    overlap = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1, 0).prod(-1)
    union = (a[..., 2:] - a[..., :2] + 1).prod(-1) + (b[..., 2:] - b[..., :2] + 1).prod(-1) - overlap
    return overlap / union


def calculate_multiple_iou(box_a: np.ndarray, box_b: np.ndarray) -> np.ndarray:
    """IoU float64 [A, B] between boxes [A, 4] and [B, 4] (x0, y0, x1, y1), all four coordinates inclusive."""
    a, b = _valid_boxes(box_a, "box_a", RuntimeError), _valid_boxes(box_b, "box_b", RuntimeError)
    return _paired_iou(a[:, None].astype(np.float64), b[None].astype(np.float64))


def resize_bbox(box: Sequence[float], image_size: Sequence[int], resize_size: Sequence[int]) -> tuple[int, int, int, int]:
    """Scale (x0, y0, x1, y1) from image_size = (width, height) to resize_size, truncating each coordinate on its own."""
    x0, y0, x1, y1 = _valid_boxes([box], "box", RuntimeError)[0]
    (width, height), (new_width, new_height) = image_size, resize_size
    return (int(x0 * new_width / width), int(y0 * new_height / height),
            int(x1 * new_width / width), int(y1 * new_height / height))


@dataclass
class BoxResult:
    """max_box_acc: percent per IoU threshold; v2: their mean; curve [n_iou, n_tau]: BoxAcc in percent;
    best_threshold [n_iou]: the first maximising tau; n: number of maps."""
    max_box_acc: list[float]
    v2: float
    curve: np.ndarray
    best_threshold: np.ndarray
    n: int


class _Evaluator:
    """Bookkeeping of the two evaluators: which images were seen, bootstrap, merge."""

    def _start(self, known: Mapping, resize_length: int, allow_repeat: bool) -> None:
        if resize_length < 1:
            raise ValueError(f"resize_length must be positive, got {resize_length}")
        if not known:
            raise ValueError("the ground truth is empty: no image to evaluate")
        self.known, self.resize_length, self.allow_repeat = known, resize_length, allow_repeat
        self.cnt = 0
        self.image_ids: list[str] = []               # in the order of accumulation
        self._seen: set[str] = set()

    def _admit(self, scoremaps: Array, image_ids: Sequence[str], dims: tuple[int, ...] = (3,)) -> Tensor:
        maps = _scoremaps(_maps("scoremaps", scoremaps, dims))
        ids = list(image_ids)
        if len(ids) != len(maps):
            raise ValueError(f"{len(maps)} score maps came with {len(ids)} image ids")
        if maps.shape[1:] != (self.resize_length, self.resize_length):
            raise ValueError(f"score maps must be {self.resize_length} x {self.resize_length}, got {tuple(maps.shape[1:])}; "
                             "resize_scoremap brings them to size")
        for image_id in ids:
            if image_id not in self.known:
                raise KeyError(f"unknown image id {image_id!r}")
        if not self.allow_repeat:
            self._refuse_repeats(ids)
        return maps

    def _refuse_repeats(self, ids: Sequence[str]) -> None:
        if self._seen.intersection(ids) or len(set(ids)) < len(ids):
            repeated = next(i for i in ids if i in self._seen or ids.count(i) > 1)
            raise ValueError(f"image id {repeated!r} accumulated twice; pass allow_repeat=True if that is meant")

    def _record(self, ids: Sequence[str]) -> None:
        self.cnt += len(ids)
        self.image_ids.extend(ids)
        self._seen.update(ids)

    def accumulate(self, scoremap: Array, image_id: str) -> None:
        """Add one map [L, L]."""
        self.accumulate_batch(self._one(scoremap), [image_id])

    @staticmethod
    def _one(scoremap: Array) -> Array:
        return _maps("scoremap", scoremap, (2,))[None]

    def _ready(self, strict: bool = False) -> None:
        if self.cnt == 0:
            raise RuntimeError("nothing to compute: no score map was accumulated")
        if strict and len(self._seen) < len(self.known):
            missing = [image_id for image_id in self.known if image_id not in self._seen]
            raise ValueError(f"{len(missing)} of {len(self.known)} images were never accumulated, first {missing[0]!r}")

    def _check_merge(self, other: "_Evaluator", same: Sequence[str]) -> None:
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        for name in (*same, "cam_threshold_list", "resize_length"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"cannot merge evaluators with different {name}")
        if not self.allow_repeat:
            self._refuse_repeats([*other.image_ids])

    def _bootstrap(self, resamples: int, seed: int) -> np.ndarray:
        """float64 [resamples, n]: how often each image is drawn in each resample."""
        self._ready()
        if resamples < 1:
            raise ValueError(f"resamples must be positive, got {resamples}")
        draws = np.random.default_rng(seed).integers(self.cnt, size=(resamples, self.cnt))
        draws += np.arange(resamples)[:, None] * self.cnt
        return np.bincount(draws.ravel(), minlength=resamples * self.cnt).reshape(resamples, self.cnt).astype(np.float64)


def _interval(samples: np.ndarray, level: float) -> np.ndarray:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    return np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)


class BoxEvaluator(_Evaluator):
    """MaxBoxAcc (multi_contour_eval=False, IoU 50) and MaxBoxAccV2 (the mean over the default IoU thresholds).

    gt_boxes: {image id: [k, 4] boxes in pixels of the original image}; image_sizes: {image id: (width, height)};
    cam_threshold_list, or arange(0, 1, interval); iou_threshold_list in percent. Maps are resize_length on each side.
    Each process of a distributed evaluation fills its own evaluator; gather them as objects and `merge`.
    """

    def __init__(self, gt_boxes: Mapping[str, Sequence], image_sizes: Mapping[str, Sequence[int]],
                 cam_threshold_list: Sequence[float] | None = None, interval: float = 0.001,
                 iou_threshold_list: Sequence[float] = (30, 50, 70), multi_contour_eval: bool = True,
                 resize_length: int = 224, allow_repeat: bool = False) -> None:
        self.cam_threshold_list = _thresholds(cam_threshold_list, interval)
        self.iou_threshold_list = tuple(iou_threshold_list)
        if not self.iou_threshold_list or not all(0 < value <= 100 for value in self.iou_threshold_list):
            raise ValueError(f"iou_threshold_list must hold percentages in (0, 100], got {self.iou_threshold_list}")
        self.multi_contour_eval = bool(multi_contour_eval)
        self.gt_boxes: dict[str, np.ndarray] = {}
        for image_id, boxes in gt_boxes.items():
            if len(boxes) == 0:
                raise ValueError(f"gt_boxes has no box for image {image_id!r}")
            if image_id not in image_sizes:
                raise ValueError(f"image_sizes has no entry for image {image_id!r}")
            width, height = map(int, image_sizes[image_id])
            if width < 1 or height < 1:
                raise ValueError(f"image_sizes of {image_id!r} must be positive (width, height), got {(width, height)}")
            boxes = _valid_boxes(boxes, f"gt_boxes of {image_id!r}", ValueError)
            self.gt_boxes[image_id] = (boxes * resize_length / np.array([width, height] * 2)).astype(np.int64)
        self._start(self.gt_boxes, resize_length, allow_repeat)
        self.num_correct = {iou: np.zeros(len(self.cam_threshold_list), np.int64) for iou in self.iou_threshold_list}
        self._best: list[np.ndarray] = []            # per batch: best IoU float64 [B, 256] by grey level
        self._chosen: list[np.ndarray] = []          # per batch: grey level of each threshold, uint8 [B, n_tau]

    def accumulate_batch(self, scoremaps: Array, image_ids: Sequence[str]) -> None:
        """Add maps [B, L, L] (float64 numpy, or torch of any float type and device) of the images `image_ids`."""
        maps = self._admit(scoremaps, image_ids)
        self._count(maps, list(image_ids), self._best_iou(maps, image_ids))

    def _best_iou(self, maps: Tensor, image_ids: Sequence[str]) -> np.ndarray:
        """[B, 256]: the best IoU of any predicted with any true box at each grey level."""
        truth = [self.gt_boxes[image_id] for image_id in image_ids]
        count = np.array([len(boxes) for boxes in truth], dtype=np.int64)
        first = np.cumsum(count) - count
        levels, owner, boxes = _all_boxes(maps, self.multi_contour_eval)
        # an empty foreground predicts the box [0, 0, 0, 0]
        empty = np.setdiff1d(np.arange(len(truth) * _GREYS), owner * _GREYS + levels)
        cell = np.concatenate([owner * _GREYS + levels, empty])
        boxes = np.concatenate([boxes, np.zeros((len(empty), 4), np.int64)])
        repeat = count[cell // _GREYS]                                         # one pair per predicted and true box
        row = np.repeat(np.arange(len(cell)), repeat)
        within = np.arange(len(row)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
        pairs = _paired_iou(boxes[row], np.concatenate([*truth, boxes[:0]])[first[cell[row] // _GREYS] + within])
        best = np.zeros(len(truth) * _GREYS)
        np.maximum.at(best, cell[row], pairs)
        return best.reshape(-1, _GREYS)

    def _count(self, maps: Tensor, image_ids: list[str], best: np.ndarray) -> None:
        peak = _grey_levels(maps).amax((1, 2)).cpu().numpy()
        chosen = (self.cam_threshold_list * peak[:, None]).astype(np.uint8)
        at_threshold = np.take_along_axis(best, chosen.astype(np.int64), 1)
        for iou, correct in self.num_correct.items():
            correct += (at_threshold >= iou / 100).sum(0)
        self._best.append(best)
        self._chosen.append(chosen)
        self._record(image_ids)

    def compute(self, strict: bool = False) -> list[float]:
        """Accuracy in percent at the best threshold, one per IoU threshold; strict: every image must have been seen."""
        self._ready(strict)
        return [float((correct * 100.0 / self.cnt).max()) for correct in self.num_correct.values()]

    def result(self) -> BoxResult:
        accuracy = self.compute()
        curve = np.stack([correct * 100.0 / self.cnt for correct in self.num_correct.values()])
        return BoxResult(accuracy, float(np.mean(accuracy)), curve, self.cam_threshold_list[curve.argmax(1)], self.cnt)

    def per_image(self) -> dict[str, np.ndarray]:
        """{"iou" float64, "correct" bool}, each [n, n_iou] in the order of `image_ids`: at the best threshold of each IoU."""
        self._ready()
        index = np.stack([correct.argmax() for correct in self.num_correct.values()])
        chosen = np.concatenate([chosen[:, index] for chosen in self._chosen]).astype(np.int64)
        iou = np.take_along_axis(np.concatenate(self._best), chosen, 1)
        return {"iou": iou, "correct": iou >= np.array(self.iou_threshold_list) / 100}

    def confidence_interval(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
        """Bootstrap over images, the threshold chosen anew in each resample: {"max_box_acc": [2, n_iou], "v2": [2]}."""
        draws = self._bootstrap(resamples, seed)
        samples = np.zeros((len(self.iou_threshold_list), resamples))
        for row, iou in enumerate(self.iou_threshold_list):
            total, start = np.zeros((resamples, len(self.cam_threshold_list))), 0
            for best, chosen in zip(self._best, self._chosen):
                correct = np.take_along_axis(best, chosen.astype(np.int64), 1) >= iou / 100
                total += draws[:, start:start + len(best)] @ correct.astype(np.float64)
                start += len(best)
            samples[row] = total.max(1) * 100 / self.cnt
        return {"max_box_acc": _interval(samples.T, level), "v2": _interval(samples.mean(0), level)}

    def merge(self, other: "BoxEvaluator") -> "BoxEvaluator":
        """Add what another evaluator of the same ground truth and thresholds has counted."""
        self._check_merge(other, ("iou_threshold_list", "multi_contour_eval"))
        for iou in self.num_correct:
            self.num_correct[iou] += other.num_correct[iou]
        self._best.extend(other._best)
        self._chosen.extend(other._chosen)
        self._record(other.image_ids)
        return self


class TopOneLoc(BoxEvaluator):
    """Top-k localization: correct when a predicted class is the true one and the box fits.

    It mixes classification into the measure, which is why the protocol avoids it; earlier papers report it. The arguments
    are those of BoxEvaluator and gt_labels {image id: int}. The score map should be that of the predicted class.
    """

    def __init__(self, gt_boxes: Mapping[str, Sequence], image_sizes: Mapping[str, Sequence[int]],
                 gt_labels: Mapping[str, int], *args, **options) -> None:
        super().__init__(gt_boxes, image_sizes, *args, **options)
        for image_id in self.gt_boxes:
            if image_id not in gt_labels:
                raise ValueError(f"gt_labels has no entry for image {image_id!r}")
        self.gt_labels = gt_labels

    def accumulate(self, scoremap: Array, image_id: str, predicted: int | Sequence[int]) -> None:
        """predicted: the class, or the k best classes, of the image."""
        self.accumulate_batch(self._one(scoremap), [image_id], [predicted])

    def accumulate_batch(self, scoremaps: Array, image_ids: Sequence[str], predicted: Sequence) -> None:
        """predicted: [B] classes or [B, k] best classes."""
        maps = self._admit(scoremaps, image_ids)
        predicted = np.asarray(predicted.cpu() if isinstance(predicted, Tensor) else predicted).reshape(len(predicted), -1)
        if len(predicted) != len(maps) or not np.issubdtype(predicted.dtype, np.integer):
            raise ValueError(f"predicted must be integer classes [{len(maps)}] or [{len(maps)}, k], "
                             f"got {predicted.dtype} {predicted.shape}")
        hit = (predicted == np.array([[self.gt_labels[image_id]] for image_id in image_ids])).any(1)
        self._count(maps, list(image_ids), np.where(hit[:, None], self._best_iou(maps, image_ids), -1.0))


# --------------------------------------------------------------------------------------------------------------------
# PxAP
# --------------------------------------------------------------------------------------------------------------------


def _nearest(mask: np.ndarray, size: int) -> np.ndarray:
    """[size, size] by OpenCV's INTER_NEAREST: no half pixel, and its rounding of the scale 1 / (size / n)."""
    rows, columns = (np.minimum((np.arange(size) * (1.0 / (size / n))).astype(int), n - 1) for n in mask.shape)
    return mask[rows[:, None], columns]


def get_mask(instance_masks: Sequence[np.ndarray], ignore_mask: np.ndarray | None = None, size: int = 224) -> np.ndarray:
    """uint8 [size, size]: 1 inside any instance mask (> .5), 255 inside the ignore mask elsewhere, 0 on the rest."""
    masks = [np.asarray(mask) for mask in instance_masks]
    if not masks:
        raise ValueError("instance_masks must hold at least one mask")
    for mask in (*masks, *([] if ignore_mask is None else [np.asarray(ignore_mask)])):
        if mask.ndim != 2 or mask.size == 0:
            raise ValueError(f"masks must be non-empty 2-d arrays, got shape {mask.shape}")
    inside = np.any([_nearest(mask, size) > 0.5 for mask in masks], axis=0)
    result = inside.astype(np.uint8)
    if ignore_mask is not None:
        result[(_nearest(np.asarray(ignore_mask), size) > 0.5) & ~inside] = 255
    return result


def _pxap(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """PxAP in percent from histograms [..., bins] of the scores of positive and negative pixels."""
    tp, fp = (np.cumsum(counts[..., ::-1], -1).astype(np.float64) for counts in (true, false))
    precision = tp / np.maximum(tp + fp, 1)
    recall = tp / np.maximum(tp[..., -1:], 1)
    return 100 * (precision[..., 1:] * np.diff(recall, axis=-1)).sum(-1)


class MaskEvaluator(_Evaluator):
    """PxAP: average precision over the pixels of all images together; pixels with the label 255 are left out.

    gt_masks: {image id: uint8 [L, L] of 0, 1, 255, as get_mask returns}; L = resize_length.
    """

    def __init__(self, gt_masks: Mapping[str, np.ndarray], cam_threshold_list: Sequence[float] | None = None,
                 interval: float = 0.001, resize_length: int = 224, allow_repeat: bool = False) -> None:
        self.cam_threshold_list = _thresholds(cam_threshold_list, interval)
        if (np.diff(self.cam_threshold_list) <= 0).any():
            raise ValueError("cam_threshold_list must rise strictly")
        self._start(gt_masks, resize_length, allow_repeat)
        for image_id, mask in gt_masks.items():
            if np.shape(mask) != (resize_length, resize_length):
                raise ValueError(f"gt_masks of {image_id!r} must be {resize_length} x {resize_length}, got {np.shape(mask)}")
            if np.setdiff1d(mask, (0, 1, 255)).size:
                raise ValueError(f"gt_masks of {image_id!r} must hold 0, 1 and 255, got {np.unique(mask)[:6].tolist()}")
        self._edges = np.append(self.cam_threshold_list, [1.0, 2.0, 3.0])
        self.gt_true_score_hist = np.zeros(len(self._edges) - 1, np.int64)
        self.gt_false_score_hist = np.zeros(len(self._edges) - 1, np.int64)
        self._hist: list[np.ndarray] = []            # per batch: int32 [B, 2, bins], negative and positive pixels

    def accumulate_batch(self, scoremaps: Array, image_ids: Sequence[str]) -> None:
        """Add maps [B, L, L] (float64 numpy, or torch of any float type and device) of the images `image_ids`."""
        maps = self._admit(scoremaps, image_ids)
        if not len(maps):
            return
        truth = torch.from_numpy(np.stack([np.asarray(self.known[i]).astype(np.uint8) for i in image_ids])).to(maps.device)
        bins = len(self._edges) - 1
        index = self._bin(maps)
        counted = (truth != 255) & (index >= 0)
        cell = torch.where(counted, index + truth.long() * bins, 2 * bins)
        cell += torch.arange(len(maps), device=maps.device).view(-1, 1, 1) * (3 * bins)
        hist = torch.bincount(cell.flatten(), minlength=len(maps) * 3 * bins)
        hist = hist.view(len(maps), 3, bins)[:, :2].cpu().numpy().astype(np.int32)
        self.gt_false_score_hist += hist[:, 0].sum(0)
        self.gt_true_score_hist += hist[:, 1].sum(0)
        self._hist.append(hist)
        self._record(list(image_ids))

    def _bin(self, maps: Tensor) -> Tensor:
        """Index of each score's bin [edge, next edge): a guess from the spacing, set right by the edges themselves."""
        edges = torch.from_numpy(self._edges).to(maps.device)
        count, last = len(self.cam_threshold_list), self.cam_threshold_list[-1]
        if last == 0 or not np.allclose(self.cam_threshold_list, np.linspace(0, last, count), rtol=0, atol=1e-9):
            return torch.searchsorted(edges, maps, right=True) - 1             # -1 below the first edge: not counted
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
        """(precision, recall, thresholds) at falling thresholds, where a threshold adds pixels;
        100 * sum(precision * diff([0] + recall)) is PxAP."""
        self.compute()
        tp, fp = np.cumsum(self.gt_true_score_hist[::-1]), np.cumsum(self.gt_false_score_hist[::-1])
        filled = (self.gt_true_score_hist + self.gt_false_score_hist)[::-1] > 0
        tp, fp = tp[filled], fp[filled]
        return tp / (tp + fp), tp / tp[-1], self._edges[:-1][::-1][filled]

    def per_image(self) -> np.ndarray:
        """PxAP of each image alone, in the order of `image_ids`; NaN where an image has no positive pixel."""
        self._ready()
        hist = np.concatenate(self._hist)
        return np.where(hist[:, 1].any(1), _pxap(hist[:, 1], hist[:, 0]), np.nan)

    def confidence_interval(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> np.ndarray:
        """[2]: bootstrap interval of PxAP over images."""
        draws, hist = self._bootstrap(resamples, seed), np.concatenate(self._hist).astype(np.float64)
        true, false = draws @ hist[:, 1], draws @ hist[:, 0]
        return _interval(_pxap(true, false), level)

    def merge(self, other: "MaskEvaluator") -> "MaskEvaluator":
        """Add what another evaluator of the same ground truth and thresholds has counted."""
        self._check_merge(other, ())
        self.gt_true_score_hist += other.gt_true_score_hist
        self.gt_false_score_hist += other.gt_false_score_hist
        self._hist.extend(other._hist)
        self._record(other.image_ids)
        return self


# --------------------------------------------------------------------------------------------------------------------
# Evaluation of files
# --------------------------------------------------------------------------------------------------------------------


def _rows(path: Path, fields: int) -> Iterator[list[str]]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            row = line.strip().split(",")
            if len(row) != fields:
                raise ValueError(f"{path}:{number}: {fields} fields expected, got {len(row)}: {line!r}")
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


def evaluate_wsol(scoremap_root: str | Path, metadata_root: str | Path, mask_root: str | Path | None, dataset_name: str,
                  split: str, multi_contour_eval: bool = True, multi_iou_eval: bool = True,
                  iou_threshold_list: Sequence[int] = (30, 50, 70), cam_curve_interval: float = 0.001) -> float:
    """Score of the maps scoremap_root/<image id>.npy on CUB or ILSVRC (boxes) or OpenImages (PxAP).

    Reads metadata_root/<dataset_name>/<split>/*.txt; the masks of OpenImages lie below mask_root/OpenImages. For boxes the
    result is the mean over iou_threshold_list, or with multi_iou_eval=False the value at IoU 50.
    """
    if dataset_name not in ("CUB", "ILSVRC", "OpenImages"):
        raise ValueError(f"dataset_name must be CUB, ILSVRC or OpenImages, got {dataset_name!r}")
    folder = Path(metadata_root) / dataset_name / split
    image_ids = [row[0] for row in _rows(folder / "image_ids.txt", 1)]
    if dataset_name == "OpenImages":
        if mask_root is None:
            raise ValueError("mask_root is needed for OpenImages")
        masks, ignore = {}, {}
        for image_id, mask, ignored in _rows(folder / "localization.txt", 3):
            masks.setdefault(image_id, []).append(_read_grey(Path(mask_root) / dataset_name / mask))
            if ignored:
                ignore[image_id] = _read_grey(Path(mask_root) / dataset_name / ignored)
        evaluator = MaskEvaluator({i: get_mask(masks[i], ignore.get(i)) for i in masks}, interval=cam_curve_interval)
    else:
        if not multi_iou_eval and 50 not in iou_threshold_list:
            raise ValueError(f"multi_iou_eval=False needs 50 in iou_threshold_list, got {list(iou_threshold_list)}")
        boxes = {}
        for image_id, *box in _rows(folder / "localization.txt", 5):
            boxes.setdefault(image_id, []).append([int(float(value)) for value in box])
        sizes = {i: (int(w), int(h)) for i, w, h in _rows(folder / "image_sizes.txt", 3)}
        evaluator = BoxEvaluator(boxes, sizes, interval=cam_curve_interval, iou_threshold_list=iou_threshold_list,
                                 multi_contour_eval=multi_contour_eval)
    for start in range(0, len(image_ids), 64):
        batch = image_ids[start:start + 64]
        evaluator.accumulate_batch(np.stack([_load_scoremap(Path(scoremap_root), i) for i in batch]), batch)
    value = evaluator.compute(strict=True)
    if dataset_name == "OpenImages":
        return value
    return float(np.mean(value)) if multi_iou_eval else value[list(iou_threshold_list).index(50)]


# --------------------------------------------------------------------------------------------------------------------
# Hyper-parameter search: the same number of random trials and the same full supervision for every method
# --------------------------------------------------------------------------------------------------------------------

_METHOD_SPACES = {
    "cam": {},
    "has": {"has_drop_rate": ("uniform", 0.0, 1.0), "has_grid_size": ("integer", 1, 224)},
    "acol": {"acol_drop_threshold": ("uniform", 0.0, 1.0)},
    "spg": {f"spg_threshold_{n}{end}": ("uniform", 0.0 if end == "l" else f"spg_threshold_{n}l", 1.0)
            for n in (1, 2, 3) for end in "lh"},
    "adl": {"adl_drop_rate": ("uniform", 0.0, 1.0), "adl_drop_threshold": ("uniform", 0.0, 1.0)},
    "cutmix": {"cutmix_beta": ("inverse", 0.0, 2.0), "cutmix_prob": ("uniform", 0.0, 1.0)},
}


def search_space(method: str) -> dict[str, tuple]:
    """Distribution of each hyper-parameter of cam, has, acol, spg, adl or cutmix, to be changed at will.

    The paper draws 30 trials per method, backbone and data set; these ranges follow its description but could not be
    compared with published code, of which there is none. Entries: ("loguniform" | "uniform", low, high),
    ("integer", low, high) with both ends, ("choice", options), ("inverse", low, high) for 1/u - 1/2 with u uniform in
    (low, high]. A bound may be the name of an earlier entry.
    """
    if method not in _METHOD_SPACES:
        raise ValueError(f"method must be one of {', '.join(_METHOD_SPACES)}, got {method!r}")
    return {"lr": ("loguniform", 1e-5, 1.0), "large_feature_map": ("choice", (False, True)), **_METHOD_SPACES[method]}


def sample_trial(space: Mapping[str, tuple], rng: np.random.Generator) -> dict:
    """Draw one value per entry of a search space, in the order of the entries; plain Python numbers."""
    trial = {}
    for name, (kind, *bounds) in space.items():
        if kind == "choice":
            trial[name] = bounds[0][int(rng.integers(len(bounds[0])))]
            continue
        low, high = (trial[bound] if isinstance(bound, str) else bound for bound in bounds)
        if kind == "uniform":
            trial[name] = float(rng.uniform(low, high))
        elif kind == "loguniform":
            trial[name] = min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)
        elif kind == "integer":
            trial[name] = int(rng.integers(low, high, endpoint=True))
        elif kind == "inverse":
            trial[name] = 1.0 / (high - (high - low) * float(rng.random())) - 0.5
        else:
            raise ValueError(f"unknown distribution {kind!r} of {name}")
    return trial


def random_search(evaluate: Callable[[dict], float], space: Mapping[str, tuple], path: str | Path, trials: int = 30,
                  seed: int = 0) -> list[dict]:
    """Score `trials` random settings; every finished trial is one JSON line of `path`, and a second call goes on from there.

    evaluate(trial) -> score, higher is better. Trial n depends on (seed, n) alone. Returns the records
    {"trial", "seed", "config", "score"}, best first; a score that is not finite (training diverged) is null and comes last.
    """
    path, done = Path(path), {}
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):                             # cut off by an interruption
            lines.pop()
            path.write_text("".join(lines))
        for number, line in enumerate(lines, 1):
            record = json.loads(line)
            if record["seed"] != seed:
                raise ValueError(f"{path}:{number}: a search with seed {record['seed']}, not {seed}, was written here")
            done[record["trial"]] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(trials):
        config = sample_trial(space, np.random.default_rng([seed, number]))
        if number in done:
            if done[number]["config"] != json.loads(json.dumps(config)):
                raise ValueError(f"{path}: trial {number} was drawn from another search space")
            continue
        score = float(evaluate(config))
        done[number] = {"trial": number, "seed": seed, "config": config, "score": score if math.isfinite(score) else None}
        with path.open("a") as stream:
            stream.write(json.dumps(done[number]) + "\n")
    records = [done[number] for number in range(trials)]
    return sorted(records, key=lambda record: -math.inf if record["score"] is None else record["score"], reverse=True)


def _demonstration() -> None:
    """The same maps under three calibrations: a fixed threshold ranks them arbitrarily, MaxBoxAcc does not."""
    rng = np.random.default_rng(0)
    count, size = 100, 112
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    centre, width = rng.uniform(-0.5, 0.5, (2, count, 1, 1)), rng.uniform(0.15, 0.5, (2, count, 1, 1))
    maps = normalize_scoremap(np.exp(-((x - centre[0]) / width[0]) ** 2 - ((y - centre[1]) / width[1]) ** 2))
    boxes = {str(n): compute_bboxes_from_scoremaps(m, [0.35])[0][0] for n, m in enumerate(maps)}
    print("score     BoxAcc(.2)  BoxAcc(.5)  MaxBoxAcc  best tau   (IoU .7)")
    for name, power in (("sqrt(s)", 0.5), ("s", 1.0), ("s^2", 2.0)):
        evaluator = BoxEvaluator(boxes, dict.fromkeys(boxes, (size, size)), iou_threshold_list=(70,), resize_length=size)
        evaluator.accumulate_batch(maps ** power, list(boxes))
        result = evaluator.result()
        print(f"{name:8s}{result.curve[0, 200]:11.1f}{result.curve[0, 500]:12.1f}{result.max_box_acc[0]:11.1f}"
              f"{result.best_threshold[0]:10.3f}")


if __name__ == "__main__":
    _demonstration()
