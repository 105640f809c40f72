"""Precision, recall, density and coverage of generative models (PRDC), exact at any size.

Paper: "Reliable Fidelity and Diversity Metrics for Generative Models", M. F. Naeem, S. J. Oh,
Y. Uh, Y. Choi, J. Yoo, ICML 2020, arXiv:2002.09797. Precision and recall: T. Kynkaanniemi et al.,
NeurIPS 2019, arXiv:1904.06991.

Feature vectors X_1..X_N of real and Y_1..Y_M of generated images. Around every real point lies an
open ball whose radius NND_k(X_i) is the distance to its k-th nearest other real point; fake points
have balls among fakes likewise.

    precision   share of fakes inside any real ball     fidelity; but an outlier's ball is huge
    recall      share of reals inside any fake ball     diversity; likewise
    density     real balls around a fake, mean / k      fidelity; may exceed 1
    coverage    share of real balls with any fake       diversity, in [0, 1]

For equal distributions E[density] = 1 and E[coverage] = 1 - prod_{i=1..k} (N - i) / (N + M - i),
about 1 - 2^-k for N = M, whatever the distribution: that is how k = 5 is chosen (`select_k`).
Precision and recall have no such value.

    result = compute_prdc(real_features, fake_features, nearest_k=5)    # {"precision": ..., ...}
    metric = PRDC(nearest_k=5)                                          # or batch by batch
    metric.update(features, real=True); metric.update(features, real=False); metric.compute()

Every decision "distance < radius" is that of float64 differences, summed in one fixed order, while
nearly all the work is a float32 matrix product. With centred points, d^2 = |x|^2 + |y|^2 - 2 x.y.
With unit u = 2^-24 a dot product of D terms is wrong by at most 1.01 D u |x| |y| in any order of
summation; rounding the points, the norms and the two sums adds less than 16 u (|x|^2 + |y|^2), and
the float64 norms and differences err by 3 D 2^-53 of it. As 2 |x| |y| <= |x|^2 + |y|^2, the
computed value is within

    e = c u (|x|^2 + |y|^2),     c = 1.01 (D + 16) + 3 D 2^-29,      of the float64 value.

A pair whose computed d^2 is further than e from the squared radius is decided; the rest (at D =
2048 a few in ten thousand) are computed again from the differences. Radii are found the same way:
all pairs that can be the k-th neighbour by these bounds are kept, and the k-th smallest of their
exact distances is the radius. Blocks bound the memory and counts are integers:
results depend neither on the block size nor on the order of rows nor on the number of processes.
The code follows the text: points, bounds (`_Screen`), pass 1 radii, pass 2 counts.

>>> g = torch.Generator().manual_seed(0)
>>> real, fake = torch.randn(1000, 16, generator=g), torch.randn(1000, 16, generator=g)
>>> result = compute_prdc(real, fake, nearest_k=5)
>>> f"coverage {result['coverage']:.2f}, expected {expected_coverage(5, 1000, 1000):.2f}"
'coverage 0.97, expected 0.97'
"""

from __future__ import annotations

import copy
import math
import os
import threading
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, islice
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

METRICS = ("precision", "recall", "density", "coverage")
CHOICES = {"ties": ("strict", "inclusive"), "precision": ("screened", "float64", "float32"),
           "rounding": ("none", "float32"), "realism": (False, True), "details": (False, True)}
NARROW = (torch.float32, torch.float16, torch.bfloat16)
NATIVE = (*NARROW, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SETTING = threading.Lock()


# ---------------------------------------------------------------- a set of points, block by block

class _Points:
    """Features as given, read in blocks: centred and scaled for products, else for differences.

    One centre and one power of two serve both sets, so that squares neither overflow nor vanish (of
    values down to 1e-150 of the largest); they change no decision. `group` numbers equal points, if
    there are any.
    """

    def __init__(self, x: Tensor, center: Tensor, scale: float, rows: int):
        self.x, self.center, self.scale, self.group = x, center, scale, None
        self.norms, self.keys = x.new_zeros(2, len(x), dtype=torch.float64)
        direction = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(0),
                               dtype=torch.float64, device="cpu").to(x.device)
        for a in range(0, len(x), rows):
            part = slice(a, a + rows)
            block = self.block(part, torch.float64)
            self.keys[part] = (block * direction).sum(1)      # equal points have equal keys
            self.norms[part] = block.square_().sum(1)

    def __len__(self) -> int:
        return len(self.x)

    def block(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Centred and scaled rows; the difference is rounded once, also that of narrow types."""
        narrow = self.x.dtype in NARROW and 2.0**-100 < self.scale < 2.0**100
        work = dtype if narrow else torch.float64             # that has the scale among its numbers
        rows = torch.mul(self.x[part].to(work), self.scale)
        return rows.sub_(self.center.to(work)).to(dtype)


def _scale(sets: Sequence[Tensor], rows: int) -> float:
    """The power of two that brings the largest value to about 1."""
    largest = max(float(part.to(torch.float64).abs().max())
                  for z in sets for part in z.split(rows) if len(part))
    return 2.0 ** -max(math.frexp(largest)[1], -1000) if largest else 1.0


def _exact_distances(a: _Points, i: Tensor, b: _Points, j: Tensor, rows: int) -> Tensor:
    """Squared distances of the pairs (i, j) by float64 differences, `rows` pairs at a time."""
    out = torch.zeros(len(i), dtype=torch.float64, device=a.x.device)
    todo = torch.arange(len(i), device=i.device)
    if a.group is not None:
        todo = todo[a.group[i] != b.group[j]]                 # equal points: 0 without looking
    for part in todo.split(rows):
        square = a.x[i[part]].to(torch.float64).mul_(a.scale)
        square.sub_(b.x[j[part]], alpha=a.scale).square_()
        # longer sums would depend on the numbers of threads and of pairs
        out[part] = sum(piece.sum(1) for piece in square.split(2**14, 1))
    return out


def _number_equal_points(sets: list[_Points], rows: int) -> None:
    """Number the groups of equal points (copies of real points, a collapsed generator), if any.

    Their distance is 0 without looking; a million equal pairs would be a million close decisions.
    """
    keys, sizes = torch.cat([p.keys for p in sets]), [len(p) for p in sets]
    order = keys.argsort(stable=True)
    same = keys[order[1:]] == keys[order[:-1]]                # not proof: compare the neighbours

    def take(index: Tensor) -> Tensor:
        out = keys.new_empty(len(index), sets[0].x.shape[1])
        for p, mine, shift in zip(sets, (index < sizes[0], index >= sizes[0]), (0, sizes[0])):
            out[mine] = p.x[index[mine] - shift].to(torch.float64)
        return out

    for part in same.nonzero().squeeze(1).split(rows):
        same[part] = (take(order[part]) == take(order[part + 1])).all(1)
    if same.any():
        group = torch.zeros_like(order)
        group[order[1:]] = (~same).cumsum(0)
        for p, numbers in zip(sets, group.split(sizes)):
            p.group = numbers


# ---------------------------------------------------------------- bounds of squared distances

class _Screen:
    """Computes blocks of lower bounds L of squared distances; L + `gap` is the upper bound.

    precision "float32" asks for no bounds: L is the computed value and the gap 0.
    """

    def __init__(self, dimension: int, device: torch.device, precision: str, budget: int | None):
        budget = budget or (2**28 if device.type == "cpu" else 2**31)
        self.dimension, self.exact = dimension, precision != "float32"
        # an element of a block costs its value, a mask and, at worst, its two indices; a row its
        # two forms. Small blocks waste less on the diagonal and stay in a CPU's cache.
        per_element, per_row = 36, 2 * 20 * dimension
        root = math.sqrt(per_row**2 + 4 * per_element * 0.6 * budget)
        largest = 512 if device.type == "cpu" else 2**14
        self.rows = min(max(16, int((root - per_row) / (2 * per_element))), largest)
        self.pairs = max(16, int(0.3 * min(budget, 2**24 if device.type == "cpu" else budget)
                                 / (24 * dimension)))
        self.candidates = budget // 800                       # sorting them takes several copies
        self.buffer = torch.empty(0, device=device)
        wide = precision == "float64" or dimension > 100_000
        self.set_dtype(torch.float64 if wide else torch.float32)

    def set_dtype(self, dtype: torch.dtype) -> None:
        unit, smallest = (2.0**-24, 1e-37) if dtype == torch.float32 else (2.0**-53, 1e-307)
        self.dtype = dtype
        self.relative = 1.01 * (self.dimension + 16) * unit + 3 * self.dimension * 2.0**-53
        self.absolute = self.dimension * smallest
        if not self.exact:
            self.relative = self.absolute = 0.0

    def parts(self, count: int, start: int = 0) -> list[slice]:
        return [slice(a, min(a + self.rows, count)) for a in range(start, count, self.rows)]

    def lower(self, a: _Points, part_a: slice, left: Tensor, b: _Points, part_b: slice) -> Tensor:
        """L (rows of a, rows of b), in a buffer that the next call overwrites. left: a's block."""
        right = b.block(part_b, self.dtype)
        if self.buffer.dtype != self.dtype or self.buffer.numel() < len(left) * len(right):
            self.buffer = left.new_empty(len(left) * len(right))
        out = self.buffer[:len(left) * len(right)].view(len(left), len(right))
        rows, columns = (((1 - self.relative) * p.norms[s] - self.absolute).to(self.dtype)
                         for p, s in ((a, part_a), (b, part_b)))
        with _full_float32():
            torch.addmm(out, left, right.T, beta=0, alpha=-2, out=out)
        return out.add_(columns).add_(rows.unsqueeze(1))      # norms come last, each added once

    def gap(self, a: _Points, i: Tensor, b: _Points, j: Tensor) -> Tensor:
        """Upper minus lower bound of the pairs (i, j)."""
        return 2 * self.relative * (a.norms[i] + b.norms[j]) + 4 * self.absolute


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products without TF32 and bfloat16, whatever torch is set to, which all threads share.

    Since torch 2.9 each backend has a setting; reading the old common one fails where they differ.
    """
    with SETTING, ExitStack() as undo:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            for products in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
                undo.callback(setattr, products, "fp32_precision", products.fp32_precision)
                products.fp32_precision = "ieee"
        else:
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


# ---------------------------------------------------------------- pass 1: radii

class _Candidates:
    """Pairs (row, column) with bounds of their distance, of which the k-th smallest per row counts.

    `limit` is an upper bound of a row's largest wanted distance: the kmax-th smallest upper bound
    seen so far. Pairs whose lower bound is above it are dropped, so a few kmax per row remain.
    """

    def __init__(self, points: _Points, screen: _Screen, kmax: int, limit: Tensor):
        self.points, self.screen, self.kmax, self.limit = points, screen, kmax, limit
        self.found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []      # row, column, bounds
        self.size, self.enough = 0, max(2 * kmax * len(limit), screen.candidates)

    def add(self, lower: Tensor, first_row: int, first_column: int) -> None:
        """Those of a block that may count."""
        limit = self.limit[first_row:first_row + len(lower)].to(lower.dtype)
        limit = limit.clamp(max=torch.finfo(lower.dtype).max)             # no row is its neighbour
        i, j = (lower <= limit.unsqueeze(1)).nonzero(as_tuple=True)
        least = lower[i, j].to(torch.float64)
        i, j = i + first_row, j + first_column
        most = least + self.screen.gap(self.points, i, self.points, j)
        self.found.append((i, j, least, most))
        self.size += len(i)
        if self.size > self.enough:
            self.prune()
            self.enough = max(self.enough, 2 * self.size)

    def prune(self) -> None:
        """Tighten the limits, drop what is above; many equal bounds are told apart exactly."""
        row, column, lower, upper = (torch.cat(parts) for parts in zip(*self.found))
        order, rank = _rank_in_groups(row, upper)
        last = order[rank == self.kmax - 1]
        self.limit[row[last]] = torch.minimum(self.limit[row[last]], upper[last])
        keep = lower <= self.limit[row]
        row, column, lower, upper = row[keep], column[keep], lower[keep], upper[keep]
        if len(row) > self.enough // 2 and self.screen.exact:
            lower = _exact_distances(self.points, row, self.points, column, self.screen.pairs)
            order, rank = _rank_in_groups(row, lower)
            order = order[rank < self.kmax]                   # of equal distances any will do
            row, column, lower = row[order], column[order], lower[order]
            upper = lower
        self.found, self.size = [(row, column, lower, upper)], len(row)

    def kth(self, ks: list[int]) -> Tensor:
        """The k-th smallest distances (K, rows); exact ones only of those that may be the k-th."""
        self.prune()
        row, column, lower, upper = self.found[0]
        count, value = len(self.limit), (lower + upper) / 2
        if self.screen.exact:
            least, most = _kth(row, lower, ks, count), _kth(row, upper, ks, count)
            close = ((upper >= least[:, row]) & (lower <= most[:, row])).any(0).nonzero().squeeze(1)
            value[close] = _exact_distances(self.points, row[close], self.points, column[close],
                                            self.screen.pairs)
        return _kth(row, value, ks, count).clamp_(min=0)


def _squared_radii(points: _Points, ks: list[int], screen: _Screen, rows: range,
                   stage: str) -> Iterator[dict]:
    """Squared distance to the k-th nearest other point of each of `rows`, (K, len(rows)).

    Yields progress, returns the radii. A distance is symmetric: when all rows are wanted, a block
    serves its rows and its columns.
    """
    kmax, symmetric = max(ks), len(rows) == len(points)
    limit = torch.full((len(points),), -math.inf, dtype=torch.float64, device=points.x.device)
    limit[rows.start:rows.stop] = math.inf
    if points.group is not None:                              # kmax equal others: the radius is 0
        limit[points.group.bincount()[points.group] > kmax] = -math.inf
    searched = limit > 0
    candidates = _Candidates(points, screen, kmax, limit)

    parts = screen.parts(len(points))
    mine = [s for s in parts if s.start < rows.stop and s.stop > rows.start]
    diagonal = [(s, s) for s in mine]
    others = [(a, b) for a in mine for b in parts if (a.start < b.start if symmetric else a != b)]
    previous = left = None
    for done, (a, b) in enumerate(diagonal + others, 1):
        if a != previous:
            previous, left = a, points.block(a, screen.dtype)
        lower = screen.lower(points, a, left, points, b)
        if a == b:
            lower.fill_diagonal_(math.inf)                    # by index: duplicates are neighbours
            if len(lower) > kmax:                             # limits to begin with
                values, j = lower.topk(kmax, dim=1, largest=False)
                i = torch.arange(len(lower), device=j.device).unsqueeze(1).expand_as(j)
                upper = values + screen.gap(points, i + a.start, points, j + b.start)
                limit[a] = torch.minimum(limit[a], upper.amax(1))
        candidates.add(lower, a.start, b.start)
        if symmetric and a != b:
            candidates.add(lower.T, b.start, a.start)
        if done == len(diagonal) and screen.exact and screen.dtype == torch.float32:
            # points far apart in tight groups: float32 bounds would leave too much to do again
            spread = 2 * screen.relative * points.norms + 2 * screen.absolute
            if (spread > 0.05 * limit)[searched].float().mean() > 0.1:
                candidates.prune()
                screen.set_dtype(torch.float64)
                previous = None
        yield {"stage": stage, "done": done, "total": len(diagonal) + len(others)}
    return candidates.kth(ks)[:, rows.start:rows.stop]


def _rank_in_groups(group: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """An order that sorts by group, then value, and each sorted entry's rank in its group."""
    order = value.argsort()
    order = order[group[order].argsort(stable=True)]
    sizes = group.bincount()
    starts = sizes.cumsum(0) - sizes
    return order, torch.arange(len(order), device=group.device) - starts[group[order]]


def _kth(group: Tensor, value: Tensor, ks: list[int], count: int) -> Tensor:
    """The k-th smallest values (K, count) of groups 0..count-1; 0 for a group without entries."""
    order, rank = _rank_in_groups(group, value)
    out = value.new_zeros(len(ks), count)
    for row, k in zip(out, ks):
        chosen = order[rank == k - 1]
        row[group[chosen]] = value[chosen]
    return out


# ---------------------------------------------------------------- pass 2: who is in whose ball

def _counts(real: _Points, fake: _Points, real_r2: Tensor, fake_r2: Tensor | None, screen: _Screen,
            rows: range, strict: bool, rounded: bool, with_realism: bool) -> Iterator[dict]:
    """For the reals in `rows` against all fakes; yields progress, returns a dict of counts.

    real_r2 (K, N), fake_r2 (K, M) or None. per_fake (K, M): balls of `rows` that contain the fake.
    per_real (K, rows): fakes in the ball. recalled (K, rows) bool. realism (K, M): the largest
    r_i / d_ij over the reals in `rows` with a radius up to the median, else 0.
    """
    device, kinds = real.x.device, len(real_r2)
    slack = 2.0**-21 if rounded else 0.0                      # float32 roots differ beyond this
    per_fake = torch.zeros(kinds, len(fake), dtype=torch.int64, device=device)
    per_real = torch.zeros(kinds, len(rows), dtype=torch.int64, device=device)
    recalled = torch.zeros(kinds, len(rows), dtype=torch.bool, device=device)
    nearest = torch.full((kinds, len(fake)), math.inf, dtype=torch.float64, device=device)
    middle = real_r2.sqrt().sort(1).values[:, [(len(real) - 1) // 2, len(real) // 2]].mean(1)
    kept = (real_r2.sqrt() <= middle.unsqueeze(1)) & (real_r2 > 0) & with_realism

    def inside(lower: Tensor, a: slice, b: slice, r2: Tensor,
               by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs (i, j) numbered within the block, and (K, pairs): is the pair inside the ball?

        All pairs that may be inside the largest ball of their row (or column).
        """
        reach = r2[:, a if by_row else b]
        reach = torch.where(reach > 0, reach * (1 + slack), -math.inf if strict else 0.0).amax(0)
        i, j = (lower <= reach.to(lower.dtype).unsqueeze(1 if by_row else 0)).nonzero(as_tuple=True)
        low = lower[i, j].to(torch.float64)
        high = low + screen.gap(real, i + a.start, fake, j + b.start)
        radius = r2[:, i + a.start] if by_row else r2[:, j + b.start]
        compare = torch.lt if strict else torch.le
        sure = compare(high, radius * (1 - slack))
        close = (~sure & (low <= radius * (1 + slack))).any(0)
        value = high
        if screen.exact:
            again = close.nonzero().squeeze(1)
            value[again] = _exact_distances(real, i[again] + a.start, fake, j[again] + b.start,
                                            screen.pairs)
        if rounded:
            value, radius = _float32_root(value), _float32_root(radius)
        return i, j, sure | (close & compare(value, radius))

    def approach(lower: Tensor, a: slice, b: slice, row: Tensor, r2: Tensor, best: Tensor) -> None:
        """Lower `best`, the smallest d^2 / r^2 of each fake; only what may be it is exact."""
        square, low = r2[a][row].unsqueeze(1), lower[row].to(torch.float64)
        column = torch.arange(b.start, b.stop, device=device)
        high = low + screen.gap(real, row.unsqueeze(1) + a.start, fake, column)
        limit = torch.minimum(best[b], (high / square).amin(0))
        i, j = (low / square <= limit).nonzero(as_tuple=True)
        d2 = high[i, j].clamp(min=0)
        i, j = row[i] + a.start, j + b.start
        if screen.exact:
            d2 = _exact_distances(real, i, fake, j, screen.pairs)
        best.scatter_reduce_(0, j, d2 / r2[i], "amin")

    parts, columns = screen.parts(rows.stop, rows.start), screen.parts(len(fake))
    for number, (a, b) in enumerate(((a, b) for a in parts for b in columns), 1):
        if b is columns[0]:
            left = real.block(a, screen.dtype)
        lower = screen.lower(real, a, left, fake, b)
        i, j, hit = inside(lower, a, b, real_r2, by_row=True)
        for kind in range(kinds):
            per_fake[kind] += torch.bincount(j[hit[kind]] + b.start, minlength=len(fake))
            per_real[kind] += torch.bincount(i[hit[kind]] + a.start - rows.start,
                                             minlength=len(rows))
            if len(row := kept[kind, a].nonzero().squeeze(1)):
                approach(lower, a, b, row, real_r2[kind], nearest[kind])
        if fake_r2 is not None:
            i, j, hit = inside(lower, a, b, fake_r2, by_row=False)
            for kind in range(kinds):
                recalled[kind, i[hit[kind]] + a.start - rows.start] = True
        yield {"stage": "counting", "done": number, "total": len(parts) * len(columns)}
    return {"per_fake": per_fake, "per_real": per_real, "recalled": recalled,
            "realism": (1 / nearest).sqrt()}


def _float32_root(squared: Tensor) -> Tensor:
    """The correctly rounded float32 root (torch's own may be one unit off) of the float32 value."""
    return squared.clamp(min=0).float().double().sqrt().float().double()


# ---------------------------------------------------------------- the public functions

def compute_prdc(real_features: Any, fake_features: Any, nearest_k: int | Sequence[int] = 5, *,
                 metrics: Sequence[str] = METRICS, ties: str = "strict",
                 precision: str = "screened", rounding: str = "none",
                 memory_budget: int | None = None, device: Any = None, group: Any = None,
                 realism: bool = False, details: bool = False) -> dict:
    """Precision, recall, density and coverage (the official package's function, names and keys).

    Args:
        real_features, fake_features: `(N, D)` and `(M, D)` arrays, tensors or nested lists of any
            real type, in this order.
        nearest_k: k, or several at once: then every metric is a list, and details and realism
            have a leading axis.
        metrics: any of "precision", "recall", "density", "coverage", "f_score". Without "recall"
            and "f_score" the radii of the fakes are not computed: a quarter less work or more.
        ties: "strict" (`<`, as published and official) or "inclusive" (`<=`, as in most
            precision/recall code). They differ for duplicated or quantised features only.
        precision: "screened" (float32 products with bounds, see above) and "float64" (float64
            products with bounds) are exact and give the same numbers; "float32" is approximate.
        rounding: "float32" compares distances rounded to float32, as the official package does
            for float32 input.
        memory_budget: bytes for temporary blocks; default 256 MiB, on a GPU 2 GiB. The result
            does not depend on it.
        device: where to compute; default where the tensors are.
        group: a torch.distributed group in which every process passes its own rows (also none);
            all get the result of all rows.
        realism: adds "realism" (M,): for each fake the largest r_i / d(X_i, Y_j) over reals with
            a radius up to the median (Kynkaanniemi et al., section 5).
        details: adds real_radii (N,), fake_radii (M,), count_per_fake (M,): real balls that
            contain it, count_per_real (N,): fakes in its ball, real_in_fake_manifold (N,) bool
            (fake_radii and the last only with recall) and density_clipped, the mean of
            min(count / k, 1).

    Density above 1 is no error: fakes crowd where the real balls overlap (low-variance samples in
    high dimension). ValueError names what is wrong: shapes, empty sets, too few rows for k, NaN or
    infinite rows, unknown options.
    """
    for step in iter_prdc(real_features, fake_features, nearest_k, metrics=metrics, ties=ties,
                          precision=precision, rounding=rounding, memory_budget=memory_budget,
                          device=device, group=group, realism=realism, details=details):
        pass
    return step["result"]


def iter_prdc(real_features: Any, fake_features: Any, nearest_k: int | Sequence[int] = 5, *,
              real_radii: tuple[Tensor, float] | None = None, quiet: bool = False,
              **options: Any) -> Iterator[dict]:
    """`compute_prdc` in steps: yields {"stage", "done", "total"} per block.

    The last dict also has "result", and "real_radii": squared radii of the reals (K, N) and the
    scale they are in, to be passed again with the same reals. quiet: no warnings.
    """
    (ks, several), options = _check_k(nearest_k), _check_options(options)
    device, group, metrics = options["device"], options["group"], options["metrics"]
    real = _features(real_features, "real_features", device)
    fake = _features(fake_features, "fake_features", device)
    if real.device != fake.device:
        raise ValueError(f"real_features are on {real.device}, fake_features on {fake.device}: "
                         "pass device=...")
    same = real.data_ptr() == fake.data_ptr() and real.shape == fake.shape and len(real) > 0
    rank, world = 0, 1
    if group is not None:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        real, fake = _gather(real, group), _gather(fake, group)
    with_recall = bool({"recall", "f_score"} & set(metrics))
    _check_sets(real, fake, max(ks), with_recall)
    n, m, k = len(real), len(fake), max(ks)
    if same and rank == 0 and not quiet:
        warnings.warn("real_features and fake_features are the same tensor", stacklevel=3)
    elif (n < 1000 or n != m) and rank == 0 and not quiet:
        warnings.warn(f"{n} real and {m} fake rows: for equal distributions expect a coverage of "
                      f"{expected_coverage(k, n, m):.4f} at nearest_k = {k}", stacklevel=3)

    screen = _Screen(real.shape[1], real.device, options["precision"], options["memory_budget"])
    scale = _scale((real, fake), screen.pairs)
    center = sum((part.to(torch.float64) * scale).sum(0) for part in real.split(screen.pairs)) / n
    center = center.to(torch.float32).to(torch.float64)       # one difference serves both types
    x, y = (_Points(z, center, scale, screen.pairs) for z in (real, fake))
    _number_equal_points([x, y], screen.pairs)

    def share(count: int) -> range:
        return range(count * rank // world, count * (rank + 1) // world)

    def radii(points: _Points, stage: str) -> Iterator[dict]:
        mine = yield from _squared_radii(points, ks, screen, share(len(points)), stage)
        return mine if group is None else _gather(mine.T.contiguous(), group).T

    # other scales would lose digits; in a group, one process may have added rows
    reuse = (real_radii is not None and real_radii[0].shape[1] == n
             and 2.0**-100 < scale / real_radii[1] < 2.0**100)
    if group is not None:
        flag = torch.tensor(int(reuse), device=real.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
        reuse = bool(flag)
    if reuse:
        real_r2 = real_radii[0].to(real.device) * (scale / real_radii[1]) ** 2
    else:
        real_r2 = yield from radii(x, "real radii")
    fake_r2 = (yield from radii(y, "fake radii")) if with_recall else None
    counts = yield from _counts(x, y, real_r2, fake_r2, screen, share(len(x)),
                                options["ties"] == "strict", options["rounding"] == "float32",
                                options["realism"])
    if group is not None:
        dist.all_reduce(counts["per_fake"], group=group)
        for name in ("per_real", "recalled"):
            own = counts[name]
            counts[name] = _gather(own.T.to(torch.int64).contiguous(), group).T.to(own.dtype)
        dist.all_reduce(counts["realism"], dist.ReduceOp.MAX, group=group)
    if options["ties"] == "strict" and not real_r2.any() and not quiet:
        warnings.warn("every real ball has radius 0 (constant or heavily duplicated features): no "
                      'point is inside an open ball; ties="inclusive" counts equal points',
                      stacklevel=3)

    result = _result(counts, real_r2, fake_r2, scale, ks, options)
    if not several:
        result = {name: value[0] for name, value in result.items()}
    yield {"stage": "done", "done": 1, "total": 1, "result": result,
           "real_radii": (real_r2.cpu(), scale)}


def _result(counts: dict[str, Tensor], real_r2: Tensor, fake_r2: Tensor | None, scale: float,
            ks: list[int], options: dict) -> dict[str, Any]:
    """The metrics and details asked for, each with a leading axis of the several k."""
    per_fake, per_real, recalled = (counts[name].cpu()
                                    for name in ("per_fake", "per_real", "recalled"))
    n, m = per_real.shape[1], per_fake.shape[1]
    every = {"precision": [(c > 0).sum().item() / m for c in per_fake],
             "recall": [c.sum().item() / n for c in recalled],
             "density": [c.sum().item() / (k * m) for k, c in zip(ks, per_fake)],
             "coverage": [(c > 0).sum().item() / n for c in per_real]}
    every["f_score"] = [2 * p * r / (p + r) if p + r else 0.0
                        for p, r in zip(every["precision"], every["recall"])]
    result: dict[str, Any] = {name: value for name, value in every.items()
                              if name in options["metrics"]}
    if options["details"]:
        root = _float32_root if options["rounding"] == "float32" else torch.sqrt
        result |= {"real_radii": root(real_r2).cpu() / scale,
                   "count_per_fake": per_fake, "count_per_real": per_real,
                   "density_clipped": [c.clamp(max=k).sum().item() / (k * m)
                                       for k, c in zip(ks, per_fake)]}
        if fake_r2 is not None:
            result |= {"fake_radii": root(fake_r2).cpu() / scale,
                       "real_in_fake_manifold": recalled}
    if options["realism"]:
        result["realism"] = counts["realism"].cpu()
    return result


def compute_nearest_neighbour_distances(input_features: Any, nearest_k: int) -> Any:
    """Distance (N,) float64 to the k-th nearest other row (official name). numpy in, numpy out."""
    _check_k(nearest_k, one=True)
    z = _features(input_features, "input_features", None)
    squared, scale = _radii_alone(z, nearest_k)
    radii = squared[0].sqrt().to(z.device) / scale
    return radii if isinstance(input_features, Tensor) else radii.numpy()


def _radii_alone(z: Tensor, nearest_k: Any, **options: Any) -> tuple[Tensor, float]:
    """Squared radii (K, N) of one set, and the scale they are in."""
    for step in iter_prdc(z, z[:1], nearest_k, quiet=True, metrics="density", **options):
        pass
    return step["real_radii"]


def compute_pairwise_distance(data_x: Any, data_y: Any = None) -> Any:
    """Distances (N, M) float64 by differences (official name); small inputs. numpy in and out."""
    x = _features(data_x, "data_x", None)
    y = x if data_y is None else _features(data_y, "data_y", x.device)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"data_x has {x.shape[1]} features per row, data_y {y.shape[1]}")
    _check_finite(data_x=x, data_y=y)
    scale = _scale((x, y), 1024) if len(x) and len(y) else 1.0
    out = torch.cdist(x.double() * scale, y.double() * scale,
                      compute_mode="donot_use_mm_for_euclid_dist") / scale
    return out if isinstance(data_x, Tensor) else out.numpy()


# ---------------------------------------------------------------- what to expect

def expected_density() -> float:
    """E[density] for equal distributions: exactly 1 (section 3.2)."""
    return 1.0


def expected_coverage(nearest_k: int, num_real: int, num_fake: int) -> float:
    """E[coverage] = 1 - prod_{i=1..k} (N - i) / (N + M - i) for equal continuous distributions.

    A real ball is empty iff the k nearest of the N + M - 1 other points are all real (lemma 2).
    """
    _check_integers(nearest_k=nearest_k, num_real=num_real, num_fake=num_fake)
    if not (1 <= nearest_k <= num_real - 1 and num_fake >= 1):
        raise ValueError("need 1 <= nearest_k <= num_real - 1 and num_fake >= 1, not nearest_k="
                         f"{nearest_k}, num_real={num_real}, num_fake={num_fake}")
    return -math.expm1(next(islice(_log_empty(num_real, num_fake), nearest_k - 1, None)))


def _log_empty(num_real: int, num_fake: int) -> Iterator[float]:
    """log(1 - E[coverage]) of k = 1, 2, ..., num_real - 1."""
    return accumulate(math.log1p(-num_fake / (num_real + num_fake - i)) for i in range(1, num_real))


def ball_count_pmf(nearest_k: int, num_real: int, num_fake: int) -> Tensor:
    """P(c fakes in a real ball), c = 0..M, float64, for equal distributions.

    Negative hypergeometric: C(c + k - 1, c) C(M - c + N - 1 - k, M - c) / C(N + M - 1, M), of mean
    k M / N. The first entry is 1 - E[coverage], the next follow from the ratios of neighbours.
    """
    expected_coverage(nearest_k, num_real, num_fake)          # checks the arguments
    first = next(islice(_log_empty(num_real, num_fake), nearest_k - 1, None))
    c = torch.arange(num_fake, dtype=torch.float64)
    rest = num_fake - c
    ratio = (c + nearest_k) * rest / ((c + 1) * (rest + num_real - 1 - nearest_k))
    return torch.cat([c.new_tensor([first]), ratio.log()]).cumsum(0).exp()


def select_k(num_real: int, num_fake: int, min_coverage: float = 0.95) -> int:
    """The smallest k whose expected coverage exceeds `min_coverage` (section 3.3)."""
    _check_integers(num_real=num_real, num_fake=num_fake)
    if not isinstance(min_coverage, Real):
        raise TypeError(f"min_coverage must be a number, not {min_coverage!r}")
    if num_fake >= 1 and min_coverage < 1:
        for k, log_empty in enumerate(_log_empty(num_real, num_fake), 1):
            if -math.expm1(log_empty) > min_coverage:
                return k
    raise ValueError(f"no nearest_k below num_real = {num_real} has an expected coverage above "
                     f"{min_coverage} with num_fake = {num_fake}")


# ---------------------------------------------------------------- batch by batch, error bars

class PRDC:
    """The metric in the usual workflow: features come in batches, one real set serves many models.

    Options as for `compute_prdc`. `reset(keep_real=True)` drops the fakes and keeps the reals with
    their radii.
    """

    def __init__(self, nearest_k: int | Sequence[int] = 5, **options: Any):
        self.nearest_k, self.options = copy.deepcopy(nearest_k), _check_options(options)
        self._radii_of = [*_check_k(nearest_k)[0], self.options["precision"] == "float32"]
        self.reset()

    def update(self, features: Any, real: bool) -> None:
        """Append rows (n, D) to the real or the fake set; after an error the sets are as before."""
        if not isinstance(real, (bool, np.bool_)):
            raise TypeError(f"real must be True or False, not {real!r}")
        name = "real_features" if real else "fake_features"
        rows = _features(features, name, self.options["device"])
        _check_finite(**{name: rows})
        before = next((c for c in (*self._real, *self._fake)), rows)
        if before.shape[1] != rows.shape[1]:
            raise ValueError(f"{name} have {rows.shape[1]} columns, earlier features "
                             f"{before.shape[1]}")
        (self._real if real else self._fake).append(rows.clone())
        if real:
            self._radii = None

    def compute(self) -> dict:
        """The result of `compute_prdc` on all rows so far."""
        if self.options["group"] is None and not (self.num_real and self.num_fake):
            raise ValueError(f"compute() needs rows of both sets; there are {self.num_real} real "
                             f"and {self.num_fake} fake")
        state = self.state_dict()
        for step in iter_prdc(state["real"], state["fake"], self.nearest_k,
                              real_radii=self._radii, **self.options):
            pass
        self._radii = step["real_radii"]
        return step["result"]

    def reset(self, keep_real: bool = False) -> None:
        """Drop all rows, or only the fakes."""
        self._fake: list[Tensor] = []
        if not keep_real:
            self._real: list[Tensor] = []
            self._radii: tuple[Tensor, float] | None = None

    @property
    def num_real(self) -> int:
        return sum(map(len, self._real))

    @property
    def num_fake(self) -> int:
        return sum(map(len, self._fake))

    def state_dict(self) -> dict:
        """Tensors, numbers and None; torch.load(..., weights_only=True) reads it back."""
        chunks = {"real": self._real, "fake": self._fake}
        empty = next((c[:0] for c in (*self._real, *self._fake)), torch.zeros(0, 0))
        return {name: _joined(rows) if rows else empty for name, rows in chunks.items()} | {
            "radii": copy.deepcopy(self._radii), "radii_of": list(self._radii_of)}

    def load_state_dict(self, d: dict) -> None:
        """Take over what `state_dict` returned; radii for another nearest_k are computed anew."""
        names = ("real", "fake", "radii", "radii_of")
        if not isinstance(d, dict) or not d.keys() >= set(names):
            raise ValueError(f"load_state_dict needs a dict with {', '.join(names)}, not {d!r:.80}")
        real, fake = (_features(d[name], name, self.options["device"]) for name in names[:2])
        self._real, self._fake = ([rows.clone()] if len(rows) else [] for rows in (real, fake))
        self._radii = copy.deepcopy(d["radii"]) if d["radii_of"] == self._radii_of else None

    def cache_real(self, path: str | Path) -> None:
        """Load the reals and their radii from `path` (.npz) if it exists; else write them there.

        In a group the file holds the rows of all processes, and each takes its share.
        """
        path, ks, rank, world = Path(path), _check_k(self.nearest_k)[0], 0, 1
        group, real, found = self.options["group"], self.state_dict()["real"], path.exists()
        if group is not None:                                 # one process may not see it yet
            rank, world = dist.get_rank(group), dist.get_world_size(group)
            flag = torch.tensor(int(found), device=self.options["device"] or real.device)
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
            found = bool(flag)
        if found:
            try:
                with np.load(path, allow_pickle=False) as file:
                    kept = {name: file[name] for name in file.files}
                known, scale = kept["nearest_k"].tolist(), float(kept["scale"])
                rows = _features(kept["real_features"], "real_features", self.options["device"])
                _check_finite(real_features=rows)
                squared = torch.from_numpy(kept["squared_radii"])
                if squared.shape[:-1] != (len(known),) or not (squared / scale).isfinite().all():
                    raise ValueError("its radii are not finite numbers, one row for each nearest_k")
            except Exception as error:
                raise ValueError(f"{path} was not written by cache_real: {error}") from error
            if missing := [k for k in ks if k not in known]:
                raise ValueError(f"{path} holds radii for nearest_k {known}, not for {missing}")
            rows = rows[len(rows) * rank // world:len(rows) * (rank + 1) // world]
            self._real = [rows] if len(rows) else []
            self._radii = squared[[known.index(k) for k in ks]], scale
            return
        if group is None and not self.num_real:
            raise ValueError("cache_real() of a new file needs real rows: "
                             "update(features, real=True) first")
        # exact in the file, and in a group some processes may have radii where others have none
        if group is not None or self._radii is None or self.options["precision"] == "float32":
            self._radii = _radii_alone(real, ks, memory_budget=self.options["memory_budget"],
                                       group=group)
        real = real if group is None else _gather(real, group)
        rows = real.cpu().float() if real.dtype == torch.bfloat16 else real.cpu()
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, real_features=rows.numpy(), scale=self._radii[1],
                         squared_radii=self._radii[0].cpu().numpy(), nearest_k=np.array(ks))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def bootstrap_prdc(real_features: Any, fake_features: Any, nearest_k: int = 5, *,
                   num_subsets: int = 10, subset_size: int | None = None, seed: int = 0,
                   **options: Any) -> tuple[dict, dict]:
    """Mean and standard deviation of each metric over random subsets of both sets.

    Subsets are drawn without replacement (with it, duplicates would make radii of 0), by default of
    half the smaller set: an error bar for that size, which is larger than that of the whole.
    """
    ((k,), _), options = _check_k(nearest_k, one=True), _check_options(options)
    _check_integers(num_subsets=num_subsets, seed=seed,
                    **{} if subset_size is None else {"subset_size": subset_size})
    if num_subsets < 2:
        raise ValueError(f"num_subsets must be at least 2, not {num_subsets}")
    real = _features(real_features, "real_features", options["device"])
    fake = _features(fake_features, "fake_features", options["device"])
    rank, world, group = 0, 1, options["group"]
    if group is not None:                                     # each takes its share of every subset
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        real, fake = _gather(real, group), _gather(fake, group)
    _check_sets(real, fake, k, with_recall=True)
    smaller = min(len(real), len(fake))
    size = smaller // 2 if subset_size is None else subset_size
    if not k < size <= smaller:
        raise ValueError(f"subset_size must be in {k + 1}..{smaller} for nearest_k={k}, not {size}")
    generator = torch.Generator().manual_seed(int(seed))
    results = []
    for _ in range(num_subsets):
        x, y = (z[torch.randperm(len(z), generator=generator, device="cpu")[rank:size:world]
                  .to(z.device)] for z in (real, fake))
        for step in iter_prdc(x, y, k, quiet=True, **options):
            pass
        results.append(step["result"])
    samples = {name: torch.tensor([r[name] for r in results], dtype=torch.float64, device="cpu")
               for name, value in results[0].items() if isinstance(value, float)}
    return tuple({name: f(values).item() for name, values in samples.items()}
                 for f in (torch.mean, torch.std))


# ---------------------------------------------------------------- arguments

def _check_k(nearest_k: Any, one: bool = False) -> tuple[list[int], bool]:
    """All k, and whether they came as a sequence."""
    values = nearest_k.tolist() if hasattr(nearest_k, "tolist") else nearest_k
    several = isinstance(values, Sequence) and not isinstance(values, str)
    ks = list(values) if several else [values]
    if not ks:
        raise ValueError("nearest_k must not be empty")
    if one and several or not all(isinstance(k, (int, np.integer)) and not isinstance(k, bool)
                                  and k > 0 for k in ks):
        wanted = "one positive integer here" if one else "a positive integer or a sequence of them"
        raise ValueError(f"nearest_k must be {wanted}, not {nearest_k!r}")
    return [int(k) for k in ks], several


def _check_integers(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, not {value!r}")


def _check_options(options: dict) -> dict:
    """All options of `compute_prdc`, the given and the default ones, checked."""
    if unknown := sorted(set(options) - set(compute_prdc.__kwdefaults__)):
        raise TypeError(f"unknown option {unknown[0]!r}; there are "
                        f"{', '.join(compute_prdc.__kwdefaults__)}")
    options = compute_prdc.__kwdefaults__ | options
    if isinstance(options["metrics"], str):
        options["metrics"] = [options["metrics"]]
    if not isinstance(options["metrics"], Iterable):
        raise TypeError(f"metrics must be names, not {options['metrics']!r}")
    options["metrics"] = tuple(options["metrics"])
    chosen = [(name, options[name], accepted) for name, accepted in CHOICES.items()]
    for name, value, accepted in chosen + [("metrics", m, (*METRICS, "f_score"))
                                           for m in options["metrics"]]:
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(map(str, accepted))}, "
                             f"not {value!r}")
    budget = options["memory_budget"]
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, Real)
                               or not budget >= 1):
        raise ValueError(f"memory_budget must be a positive number of bytes, not {budget!r}")
    return options


def _features(value: Any, name: str, device: Any) -> Tensor:
    """A detached tensor (rows, features) of one of the NATIVE types."""
    if not isinstance(value, Tensor):
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must be an array of rows of one length: {error}") from error
        if value.dtype.kind not in "fiub":
            raise ValueError(f"{name} must be real numbers, not {value.dtype}")
        kind = value.dtype.newbyteorder("=") if value.dtype.itemsize <= 8 else np.float64
        value = torch.from_numpy(np.require(value, kind, ["C", "W"]))
    if value.is_complex() or value.layout != torch.strided:
        raise ValueError(f"{name} must be dense real numbers, not {value.dtype} {value.layout}")
    if value.ndim != 2:
        raise ValueError(f"{name} must be (rows, features), not {tuple(value.shape)}; "
                         "use .flatten(1) on maps")
    value = value.detach().to(device=value.device if device is None else device)
    return value if value.dtype in NATIVE else value.to(torch.float64)


def _joined(rows: list[Tensor]) -> Tensor:
    """One tensor of all rows; integers beside fractions become float64, not the narrower type."""
    mixed = len({part.is_floating_point() for part in rows}) > 1
    return torch.cat([part.to(torch.float64) for part in rows] if mixed else rows)


def _check_sets(real: Tensor, fake: Tensor, kmax: int, with_recall: bool) -> None:
    (n, width), (m, other) = real.shape, fake.shape
    for wrong, text in (
            (not n, "real_features has 0 rows"), (not m, "fake_features has 0 rows"),
            (width != other, f"real_features have {width} columns, fake_features {other}"),
            (not width, "features have no columns"),
            (n <= kmax, f"nearest_k = {kmax} needs more than {kmax} real rows, there are {n}"),
            (with_recall and m <= kmax, f"recall with nearest_k = {kmax} needs more than {kmax} "
                                        f"fake rows, there are {m}")):
        if wrong:
            raise ValueError(text)
    _check_finite(real_features=real, fake_features=fake)


def _check_finite(**sets: Tensor) -> None:
    for name, z in sets.items():
        bad = sum(int((~part.isfinite()).any(1).sum()) for part in z.split(1024))
        if bad:
            raise ValueError(f"{name} has {bad} rows with NaN or infinite values, of {len(z)}")


def _gather(rows: Tensor, group: Any) -> Tensor:
    """The rows of all processes in the order of ranks, of any number each, as float32 or float64.

    A process without rows may have any width and type.
    """
    own = torch.tensor([*rows.shape, rows.dtype not in NARROW and len(rows) > 0],
                       device=rows.device)
    shapes = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, own, group=group)
    counts, widths, wide = zip(*(shape.tolist() for shape in shapes))
    filled = {width for width, count in zip(widths, counts) if count} or set(widths)
    if len(filled) > 1:
        raise ValueError(f"the processes have features of different widths: {sorted(filled)}")
    dtype = torch.float64 if any(wide) else torch.float32
    padded = torch.zeros(max(counts), filled.pop(), dtype=dtype, device=rows.device)
    if len(rows):
        padded[:len(rows)] = rows
    everything = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everything, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(everything, counts)])


# ---------------------------------------------------------------- demonstration

if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(1000, 64, generator=generator) for _ in range(2))
    print("expected for equal distributions: density 1, coverage "
          f"{expected_coverage(5, 1000, 1000):.3f}\n")
    print("                                    precision  recall  density  coverage")
    outlier = torch.full((1, 64), 3.0)
    for name, x, y in (
            ("equal distributions", real, fake),
            ("fakes shifted by 1", real, fake + 1),
            ("  with one real outlier there", torch.cat([outlier, real[1:]]), fake + 1),
            ("  with one fake outlier among reals", real, torch.cat([outlier, fake[1:] - 1]))):
        values = compute_prdc(x, y, 5).values()
        print(f"{name:36s}" + "".join(f"{value:9.3f}" for value in values))
