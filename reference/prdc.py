"""Precision, recall, density and coverage of generative models (PRDC), exact at any size.

Paper: "Reliable Fidelity and Diversity Metrics for Generative Models", M. F. Naeem, S. J. Oh, Y. Uh, Y. Choi, J. Yoo,
ICML 2020, arXiv:2002.09797. Precision and recall: T. Kynkaanniemi et al., NeurIPS 2019, arXiv:1904.06991.

Feature vectors X_1..X_N of real and Y_1..Y_M of generated images. Around every real point lies an open ball whose
radius NND_k(X_i) is the distance to its k-th nearest other real point; fake points have balls among fakes likewise.

    precision  share of fakes inside any real ball          fidelity; one real outlier's huge ball spoils it
    recall     share of reals inside any fake ball          diversity; one fake outlier's huge ball spoils it
    density    real balls that contain a fake, mean over fakes, divided by k      fidelity; may exceed 1
    coverage   share of real balls that contain any fake                          diversity, in [0, 1]

For equal distributions E[density] = 1 and E[coverage] = 1 - prod_{i=1..k} (N - i) / (N + M - i), about 1 - 2^-k for
N = M, whatever the distribution: that is how k = 5 is chosen (`select_k`). Precision and recall have no such value.

    result = compute_prdc(real_features, fake_features, nearest_k=5)     # {"precision": ..., ..., "coverage": ...}
    metric = PRDC(nearest_k=5)                                           # or batch by batch
    metric.update(features, real=True); metric.update(features, real=False); metric.compute()

Every decision "distance < radius" is that of float64 differences, while nearly all the work is a float32 matrix
product. With centred points, d^2 = |x|^2 + |y|^2 - 2 x.y. Rounding with unit u = 2^-24 changes a dot product of D terms
by at most D u |x| |y| in any order of summation, and the inputs, norms and sums by a few u more; with
2 |x| |y| <= |x|^2 + |y|^2 the computed value is within

    e = c u (|x|^2 + |y|^2),     c = 1.01 (D + 16) + 3 D 2^-29,      of the float64 value.

So a pair whose computed d^2 is further than e from the squared radius is decided; the rest (at D = 2048 a few in ten
thousand per point) are computed again from the differences in float64. Radii are found the same way: all pairs that can
be the k-th neighbour by these bounds are kept, and the k-th smallest of their exact distances is the radius. Blocks
bound the memory, and the counts are integers: results depend neither on the block size nor on the order of the rows
nor on the number of processes.

>>> g = torch.Generator().manual_seed(0)
>>> result = compute_prdc(torch.randn(1000, 16, generator=g), torch.randn(1000, 16, generator=g), nearest_k=5)
>>> f"density {result['density']:.2f}, coverage {result['coverage']:.2f}, expected {expected_coverage(5, 1000, 1000):.2f}"
'density 1.03, coverage 0.97, expected 0.97'
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

METRICS = ("precision", "recall", "density", "coverage")
TIES, PRECISIONS, ROUNDINGS = ("strict", "inclusive"), ("auto", "float64", "screened", "float32"), ("none", "float32")


# ---------------------------------------------------------------- one set of points, block by block

class _Points:
    """Features as given, read in blocks: centred and scaled for products, as they are for exact differences.

    A common power of two scales both sets so that squares neither overflow nor vanish; it changes no decision.
    """

    def __init__(self, x: Tensor, center: Tensor, scale: float, rows: int):
        self.x, self.center, self.scale, self.group = x, center, scale, None
        self.norms = torch.cat([self.block(slice(a, a + rows), torch.float64).square().sum(1)
                                for a in range(0, len(x), rows)]) if len(x) else x.new_zeros(0, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.x)

    def block(self, part: slice, dtype: torch.dtype) -> Tensor:
        return (self.x[part].to(torch.float64) - self.center).mul_(self.scale).to(dtype)


def _exact_distances(a: _Points, i: Tensor, b: _Points, j: Tensor, rows: int) -> Tensor:
    """Squared distances of the pairs (i, j) by differences in float64, `rows` pairs at a time; 0 for equal points."""
    out = torch.zeros(len(i), dtype=torch.float64, device=a.x.device)
    todo = torch.arange(len(i), device=i.device) if a.group is None else (a.group[i] != b.group[j]).nonzero().squeeze(1)
    for part in todo.split(rows):
        difference = a.x[i[part]].to(torch.float64)
        difference -= b.x[j[part]]
        out[part] = difference.mul_(a.scale).square_().sum(1)
    return out


def _mark_equal_points(sets: list[_Points], rows: int) -> None:
    """Number the groups of equal points (a collapsed generator, copies of real points), if there are any.

    Their distance is 0 without looking; without this, a million equal pairs would be a million close decisions.
    """
    dimension, device = sets[0].x.shape[1], sets[0].x.device
    direction = torch.rand(dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    keys = torch.cat([(p.x[a:a + rows].to(torch.float64) * direction).sum(1) for p in sets for a in range(0, len(p), rows)])
    distinct, group = keys.unique(return_inverse=True)
    if len(distinct) == len(keys):
        return
    # equal keys are not proof: compare with the first point of the group
    order = torch.arange(len(keys), device=device)
    first = torch.full_like(distinct, len(keys), dtype=torch.int64).scatter_reduce_(0, group, order, "amin")
    offsets = [0, len(sets[0])]

    def take(index: Tensor) -> Tensor:
        out = torch.empty(len(index), dimension, dtype=torch.float64, device=device)
        for p, offset in zip(sets, offsets):
            mine = (index >= offset) & (index < offset + len(p))
            out[mine] = p.x[index[mine] - offset].to(torch.float64)
        return out

    for part in order.split(rows):
        same = (take(part) == take(first[group[part]])).all(1)
        group[part] = torch.where(same, group[part], len(distinct) + part)
    for p, offset in zip(sets, offsets):
        p.group = group[offset:offset + len(p)]


# ---------------------------------------------------------------- lower bounds of squared distances, block by block

class _Screen:
    """Computes blocks of lower bounds L of squared distances; L + `gap` is the upper bound. gap = 0: no bounds asked."""

    def __init__(self, dimension: int, device: torch.device, precision: str, budget: int):
        self.dimension, self.exact = dimension, precision != "float32"
        self.dtype = torch.float64 if precision == "float64" or dimension > 100_000 else torch.float32
        # an element of a block costs its value, a mask and, at worst, its two indices; a row its two forms
        per_element, per_row = 36, 2 * 20 * dimension
        share = 0.6 * budget
        self.rows = max(16, int((math.sqrt(per_row**2 + 4 * per_element * share) - per_row) / (2 * per_element)))
        self.pairs = max(16, int(0.3 * budget / (24 * dimension)))
        self.buffer = torch.empty(0, device=device)
        self.set_dtype(self.dtype)

    def set_dtype(self, dtype: torch.dtype) -> None:
        unit, smallest = (2.0**-24, 1e-37) if dtype == torch.float32 else (2.0**-53, 1e-307)
        self.dtype = dtype
        self.relative = (1.01 * (self.dimension + 16) * unit + 3 * self.dimension * 2.0**-53) if self.exact else 0.0
        self.absolute = self.dimension * smallest if self.exact else 0.0

    def parts(self, count: int, start: int = 0) -> list[slice]:
        return [slice(a, min(a + self.rows, count)) for a in range(start, count, self.rows)]

    def lower(self, a: _Points, part_a: slice, b: _Points, part_b: slice, left: Tensor | None = None) -> Tensor:
        """L, shape (rows of a, rows of b), in a buffer that the next call overwrites. `left`: a.block(...), if at hand."""
        left = a.block(part_a, self.dtype) if left is None else left
        right = b.block(part_b, self.dtype)
        if self.buffer.dtype != self.dtype or self.buffer.numel() < len(left) * len(right):
            self.buffer = torch.empty(len(left) * len(right), dtype=self.dtype, device=left.device)
        out = self.buffer[:len(left) * len(right)].view(len(left), len(right))
        shrunk = [((1 - self.relative) * p.norms[s] - self.absolute).to(self.dtype) for p, s in ((a, part_a), (b, part_b))]
        torch.addmm(shrunk[1].unsqueeze(0), left, right.T, alpha=-2, out=out)
        return out.add_(shrunk[0].unsqueeze(1))

    def gap(self, a: _Points, i: Tensor, b: _Points, j: Tensor) -> Tensor:
        """Upper minus lower bound of the pairs (i, j)."""
        return 2 * self.relative * (a.norms[i] + b.norms[j]) + 4 * self.absolute


@contextmanager
def _true_float32(device: torch.device):
    """Matrix products as exact as their type: no TF32, no bfloat16, no autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- pass 1: radii

def _squared_radii(points: _Points, ks: list[int], screen: _Screen, rows: range, stage: str) -> Iterator[dict]:
    """Squared distance to the k-th nearest other point of each of `rows`, (K, len(rows)); yields progress, returns it.

    `limit` is an upper bound of a row's k-th smallest distance: the k-th smallest upper bound seen so far. Pairs whose
    lower bound is above it are dropped, so a few k candidates per row remain. A distance is symmetric: when all rows
    are wanted, a block serves its rows and its columns.
    """
    device, kmax, count = points.x.device, max(ks), len(rows)
    symmetric = count == len(points)
    limit = torch.full((len(points),), -math.inf, dtype=torch.float64, device=device)
    limit[rows.start:rows.stop] = math.inf
    wanted = limit.clone()                                    # as `limit`, but nothing is wanted once k neighbours are at 0
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []   # (row, column, lower bound, upper bound)
    size, enough = 0, max(8 * kmax * count, 2**18)

    def collect(lower: Tensor, mask: Tensor, first_row: int, first_column: int) -> int:
        i, j = mask.nonzero(as_tuple=True)
        least = lower[i, j].to(torch.float64)
        i, j = i + first_row, j + first_column
        found.append((i, j, least, least + screen.gap(points, i, points, j)))
        return len(i)

    def prune() -> None:
        """Tighten the limits by the candidates, drop those above. Masses of equal bounds are told apart exactly."""
        row, column, lower, upper = (torch.cat(parts) for parts in zip(*found))
        for attempt in range(2):
            order, rank = _rank_in_groups(row, upper)
            at = rank == kmax - 1
            limit[row[order[at]]] = torch.minimum(limit[row[order[at]]], upper[order[at]])
            keep = lower <= limit[row]
            row, column, lower, upper = row[keep], column[keep], lower[keep], upper[keep]
            if attempt or len(row) <= enough // 2 or not screen.exact:
                break
            lower = upper = _exact_distances(points, row, points, column, screen.pairs)
            order, rank = _rank_in_groups(row, lower)
            order = order[rank < kmax]                        # of equal exact distances any kmax will do
            row, column, lower, upper = row[order], column[order], lower[order], upper[order]
        wanted.copy_(limit)[limit == 0] = -math.inf
        found[:] = [(row, column, lower, upper)]

    parts = [s for s in screen.parts(len(points)) if s.start < rows.stop and s.stop > rows.start]
    columns = screen.parts(len(points))
    diagonal = [(s, s) for s in parts]
    others = [(a, b) for a in parts for b in columns if (a.start < b.start if symmetric else a != b)]
    total, previous, left = len(diagonal) + len(others), None, None
    for done, (a, b) in enumerate(diagonal + others, 1):
        if a != previous:
            previous, left = a, points.block(a, screen.dtype)
        lower = screen.lower(points, a, points, b, left)
        if a == b:
            lower.fill_diagonal_(math.inf)
            if len(lower) > kmax:                             # limits to begin with, from the row's own block
                values, j = lower.topk(kmax, dim=1, largest=False)
                i = torch.arange(len(lower), device=device).unsqueeze(1).expand_as(j)
                upper = values + screen.gap(points, i + a.start, points, j + b.start)
                limit[a] = wanted[a] = torch.minimum(limit[a], upper.amax(1))
        size += collect(lower, lower <= wanted[a].to(screen.dtype).unsqueeze(1), a.start, b.start)
        if symmetric and a != b:
            size += collect(lower.T, (lower <= wanted[b].to(screen.dtype)).T, b.start, a.start)
        if size > enough:
            prune()
            size = len(found[0][0])
            enough = max(enough, 2 * size)
        if done == len(diagonal) and screen.exact and screen.dtype == torch.float32:
            # points far apart in tight groups: float32 bounds would leave too much to do again
            spread = 2 * screen.relative * points.norms
            wide = (spread > 0.05 * limit) & (limit > -math.inf)
            if wide[rows.start:rows.stop].float().mean() > 0.1:
                prune()
                screen.set_dtype(torch.float64)
                previous = None
        yield {"stage": stage, "done": done, "total": total}
    prune()
    row, column, lower, upper = found[0]
    row = row - rows.start
    value = lower
    if screen.exact:
        # exact distances only of those that may be the k-th: not surely nearer, not surely further
        least, most = (torch.stack([_kth(row, bound, k, count) for k in ks]) for bound in (lower, upper))
        close = ((upper >= least[:, row]) & (lower <= most[:, row])).any(0).nonzero().squeeze(1)
        value = (lower + upper) / 2
        value[close] = _exact_distances(points, row[close] + rows.start, points, column[close], screen.pairs)
    return torch.stack([_kth(row, value, k, count) for k in ks]).clamp_(min=0)


def _rank_in_groups(group: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """An order that sorts by group, then value, and each sorted entry's rank in its group, from 0."""
    order = value.argsort()
    order = order[group[order].argsort(stable=True)]
    place = torch.arange(len(order), device=group.device)
    sorted_group = group[order]
    starts = torch.ones_like(sorted_group, dtype=torch.bool)
    starts[1:] = sorted_group[1:] != sorted_group[:-1]
    return order, place - torch.where(starts, place, 0).cummax(0).values


def _kth(group: Tensor, value: Tensor, k: int, count: int) -> Tensor:
    """The k-th smallest value of each of the groups 0..count-1; every group has at least k entries."""
    order, rank = _rank_in_groups(group, value)
    chosen = order[rank == k - 1]
    return torch.empty(count, dtype=value.dtype, device=value.device).scatter_(0, group[chosen], value[chosen])


# ---------------------------------------------------------------- pass 2: who is in whose ball

def _counts(real: _Points, fake: _Points, real_r2: Tensor, fake_r2: Tensor | None, screen: _Screen, rows: range,
            ties: str, rounding: str, realism: bool) -> Iterator[dict]:
    """For the reals in `rows` against all fakes; yields progress, returns a dict of integer counts.

    real_r2 (K, N), fake_r2 (K, M) or None. per_fake (K, M): balls of `rows` that contain the fake. per_real (K, rows),
    recalled (K, rows) bool. realism (M): max of r_i^2 / d_ij^2 over `rows` with a radius up to the median.
    """
    device, kinds = real.x.device, len(real_r2)
    slack = 2.0**-21 if rounding == "float32" else 0.0        # float32 roots differ beyond this
    per_fake = torch.zeros(kinds, len(fake), dtype=torch.int64, device=device)
    per_real = torch.zeros(kinds, len(rows), dtype=torch.int64, device=device)
    recalled = torch.zeros(kinds, len(rows), dtype=torch.bool, device=device)

    def reach(r2: Tensor) -> Tensor:
        """Lower bounds up to this may be inside a ball of squared radius r2."""
        return torch.where(r2 > 0, r2 * (1 + slack), -math.inf if ties == "strict" else 0.0).amax(0)

    def inside(i: Tensor, j: Tensor, lower: Tensor, r2: Tensor) -> Tensor:
        """(K, pairs) bool for pairs that may be inside; r2 (K, pairs)."""
        upper = lower + screen.gap(real, i, fake, j)
        sure = upper < r2 * (1 - slack) if ties == "strict" else upper <= r2 * (1 - slack)
        open_ = ~sure & (lower <= r2 * (1 + slack))
        value = upper
        if screen.exact:
            again = open_.any(0).nonzero().squeeze(1)
            value = value.clone()
            value[again] = _exact_distances(real, i[again], fake, j[again], screen.pairs)
        if rounding == "float32":
            value, r2 = _float32_root(value), _float32_root(r2)
        return sure | (open_ & (value < r2 if ties == "strict" else value <= r2))

    best = kept_rows = None
    candidates: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    if realism:                                               # the smallest d^2 / r^2 per fake, bounds first
        middle = real_r2[-1].sort().values
        median = (middle[(len(middle) - 1) // 2].sqrt() + middle[len(middle) // 2].sqrt()) / 2
        kept_rows = (real_r2[-1].sqrt() <= median) & (real_r2[-1] > 0)
        best = torch.full((len(fake),), math.inf, dtype=torch.float64, device=device)

    parts = screen.parts(rows.stop, rows.start)
    columns = screen.parts(len(fake))
    real_reach, fake_reach = reach(real_r2), None if fake_r2 is None else reach(fake_r2)
    for number, a in enumerate(parts):
        left = real.block(a, screen.dtype)
        for at, b in enumerate(columns):
            lower = screen.lower(real, a, fake, b, left)
            i, j = (lower <= real_reach[a].to(screen.dtype).unsqueeze(1)).nonzero(as_tuple=True)
            hit = inside(i + a.start, j + b.start, lower[i, j].to(torch.float64), real_r2[:, i + a.start])
            for kind in range(kinds):
                per_fake[kind, b] += torch.bincount(j[hit[kind]], minlength=b.stop - b.start)
                per_real[kind, a.start - rows.start:a.stop - rows.start] += torch.bincount(i[hit[kind]], minlength=a.stop - a.start)
            if fake_r2 is not None:
                i, j = (lower <= fake_reach[b].to(screen.dtype)).nonzero(as_tuple=True)
                hit = inside(i + a.start, j + b.start, lower[i, j].to(torch.float64), fake_r2[:, j + b.start])
                for kind in range(kinds):
                    recalled[kind, i[hit[kind]] + a.start - rows.start] = True
            if realism and kept_rows[a].any():
                low = lower[kept_rows[a]].to(torch.float64)
                row = kept_rows[a].nonzero().squeeze(1) + a.start
                r2 = real_r2[-1, row].unsqueeze(1)
                gap = 2 * screen.relative * (real.norms[row].unsqueeze(1) + fake.norms[b]) + 4 * screen.absolute
                best[b] = torch.minimum(best[b], ((low + gap) / r2).amin(0))
                i, j = (low / r2 <= best[b]).nonzero(as_tuple=True)
                candidates.append((row[i], j + b.start, (low / r2)[i, j], (low + gap)[i, j]))
            yield {"stage": "counting", "done": number * len(columns) + at + 1, "total": len(parts) * len(columns)}
    out = {"per_fake": per_fake, "per_real": per_real, "recalled": recalled}
    if realism:
        ratio = torch.full((len(fake),), math.inf, dtype=torch.float64, device=device)
        if candidates:
            row, column, low, upper = (torch.cat(c) for c in zip(*candidates))
            keep = low <= best[column]
            row, column, upper = row[keep], column[keep], upper[keep]
            d2 = _exact_distances(real, row, fake, column, screen.pairs) if screen.exact else upper.clamp(min=0)
            ratio.scatter_reduce_(0, column, d2 / real_r2[-1, row], "amin")
        out["realism"] = 1 / ratio
    return out


def _float32_root(squared: Tensor) -> Tensor:
    """The correctly rounded float32 root of the float32 value (torch's own may be off by one unit), as float64."""
    return squared.clamp(min=0).to(torch.float32).to(torch.float64).sqrt().to(torch.float32).to(torch.float64)


# ---------------------------------------------------------------- the public functions

def compute_prdc(real_features: Any, fake_features: Any, nearest_k: int | Sequence[int] = 5, *,
                 metrics: Sequence[str] = METRICS, ties: str = "strict", precision: str = "auto",
                 rounding: str = "none", memory_budget: int | None = None, device: Any = None, group: Any = None,
                 realism: bool = False, details: bool = False) -> dict:
    """Precision, recall, density and coverage (the official package's function, names and keys).

    real_features `(N, D)`, fake_features `(M, D)`: arrays, tensors or nested lists of any real type. Note the order.
    nearest_k: k, or several at once (then every metric is a list, and details have a leading axis).
    metrics: any of "precision", "recall", "density", "coverage", "f_score". Without "recall" and "f_score" the radii of
        the fakes are not computed, which saves a quarter to a third of the time.
    ties: "strict" (`<`, as published and official) or "inclusive" (`<=`, as in most precision/recall code). They differ
        for duplicated or quantised features only.
    precision: "auto" and "screened" (float32 products with bounds, see above) and "float64" (float64 products with
        bounds) are exact and give the same numbers; "float32" is approximate, without bounds.
    rounding: "float32" compares distances rounded to float32, as the official package does for float32 input.
    memory_budget: bytes for temporary blocks; default 256 MiB, on a GPU 2 GiB. The result does not depend on it.
    device: where to compute; default where the tensors are. group: a torch.distributed group in which every process
        passes its own rows (also none); all get the result of all rows.
    realism: adds "realism" (M,), the realism score of each fake (Kynkaanniemi et al., section 5).
    details: adds real_radii (N,), fake_radii (M,), count_per_fake (M,): real balls that contain it, count_per_real (N,):
        fakes in its ball, real_in_fake_manifold (N,) bool (fake_* and the last only with recall) and density_clipped,
        the mean of min(count / k, 1).

    Density above 1 is no error: fakes crowd where the real balls overlap (low-variance samples in high dimension).
    ValueError names what is wrong: shapes, empty sets, too few rows for k, NaN or infinite rows, unknown options.
    """
    for step in iter_prdc(real_features, fake_features, nearest_k, metrics=metrics, ties=ties, precision=precision,
                          rounding=rounding, memory_budget=memory_budget, device=device, group=group, realism=realism,
                          details=details):
        pass
    return step["result"]


def iter_prdc(real_features: Any, fake_features: Any, nearest_k: int | Sequence[int] = 5, *,
              metrics: Sequence[str] = METRICS, ties: str = "strict", precision: str = "auto", rounding: str = "none",
              memory_budget: int | None = None, device: Any = None, group: Any = None, realism: bool = False,
              details: bool = False, real_radii: tuple[Tensor, float] | None = None) -> Iterator[dict]:
    """`compute_prdc` in steps: yields {"stage", "done", "total"} per block; the last one also has the key "result".

    real_radii: squared radii of the reals (K, N) and the scale they are in, as the last dict of an earlier run holds them.
    """
    ks = _check_k(nearest_k)
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    for name, value, accepted in [("ties", ties, TIES), ("precision", precision, PRECISIONS), ("rounding", rounding, ROUNDINGS),
                                  *(("metrics", m, (*METRICS, "f_score")) for m in metrics)]:
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(accepted)}, not {value!r}")
    if memory_budget is not None and not memory_budget > 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, not {memory_budget}")
    real, fake = _features(real_features, "real_features", device), _features(fake_features, "fake_features", device)
    if real.device != fake.device:
        raise ValueError(f"real_features are on {real.device}, fake_features on {fake.device}: pass device=...")
    same_storage = real.data_ptr() == fake.data_ptr() and real.shape == fake.shape and len(real) > 0
    if group is not None:
        real, fake = _gather(real, group), _gather(fake, group)
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    with_recall = bool({"recall", "f_score"} & set(metrics))
    _check_sets(real, fake, max(ks), with_recall)
    if rank == 0:
        _warn(len(real), len(fake), max(ks), same_storage)

    screen = _Screen(real.shape[1], real.device, precision, memory_budget or _default_budget(real.device))
    center, scale = _center_and_scale(real, fake, screen.pairs)
    x, y = (_Points(z, center, scale, screen.pairs) for z in (real, fake))
    _mark_equal_points([x, y], screen.pairs)
    share = lambda count: range(count * rank // world, count * (rank + 1) // world)      # noqa: E731

    with _true_float32(real.device):
        def radii(points: _Points, stage: str) -> Iterator[dict]:
            mine = yield from _squared_radii(points, ks, screen, share(len(points)), stage)
            return mine if group is None else _gather(mine.T.contiguous(), group).T
        if real_radii is not None:
            real_r2 = real_radii[0].to(real.device) * (scale / real_radii[1]) * (scale / real_radii[1])
        else:
            real_r2 = yield from radii(x, "real radii")
        fake_r2 = (yield from radii(y, "fake radii")) if with_recall else None
        counts = yield from _counts(x, y, real_r2, fake_r2, screen, share(len(x)), ties, rounding, realism)
    if group is not None:
        dist.all_reduce(counts["per_fake"], group=group)
        for name in ("per_real", "recalled"):
            counts[name] = _gather(counts[name].T.to(torch.int64).contiguous(), group).T
        if realism:
            dist.all_reduce(counts["realism"], dist.ReduceOp.MAX, group=group)

    per_fake, per_real = counts["per_fake"].cpu(), counts["per_real"].cpu()
    recalled = counts["recalled"].cpu().bool()
    every = {
        "precision": [(c > 0).sum().item() / len(fake) for c in per_fake],
        "recall": [c.sum().item() / len(real) for c in recalled] if with_recall else None,
        "density": [c.sum().item() / (k * len(fake)) for k, c in zip(ks, per_fake)],
        "coverage": [(c > 0).sum().item() / len(real) for c in per_real],
    }
    result: dict[str, Any] = {name: every[name] for name in METRICS if name in metrics}
    if "f_score" in metrics:
        result["f_score"] = [2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(every["precision"], every["recall"])]
    roots = lambda r2: (_float32_root(r2) if rounding == "float32" else r2.sqrt()).cpu() / scale      # noqa: E731
    if details:
        result |= {"real_radii": roots(real_r2), "count_per_fake": per_fake, "count_per_real": per_real,
                   "density_clipped": [(c / k).clamp(max=1).double().mean().item() for k, c in zip(ks, per_fake)]}
        if with_recall:
            result |= {"fake_radii": roots(fake_r2), "real_in_fake_manifold": recalled}
    if not isinstance(nearest_k, (Sequence, np.ndarray, Tensor)):
        result = {name: value[0] for name, value in result.items()}
    if realism:
        result["realism"] = counts["realism"].cpu().sqrt()
    if not details and ties == "strict" and not real_r2.any():
        warnings.warn("every real ball has radius 0 (constant or heavily duplicated features): no point can be inside an "
                      'open ball; ties="inclusive" counts equal points', stacklevel=2)
    yield {"stage": "done", "done": 1, "total": 1, "result": result, "real_radii": (real_r2.cpu(), scale)}


def compute_nearest_neighbour_distances(input_features: Any, nearest_k: int) -> Any:
    """Distance (N,) float64 to the k-th nearest other row (official name). numpy in, numpy out."""
    (k,) = _check_k(nearest_k)
    z = _features(input_features, "input_features", None)
    squared, scale = _radii_alone(z, [k])
    radii = squared[0].sqrt() / scale
    return radii if isinstance(input_features, Tensor) else radii.numpy()


def _radii_alone(z: Tensor, ks: list[int], precision: str = "auto", memory_budget: int | None = None) -> tuple[Tensor, float]:
    """Squared radii (K, N) of one set, and the scale they are in."""
    _check_sets(z, z, max(ks), False)
    budget = memory_budget or _default_budget(z.device)
    screen = _Screen(z.shape[1], z.device, precision, budget)
    points = _Points(z, *_center_and_scale(z, z, screen.pairs), screen.pairs)
    _mark_equal_points([points], screen.pairs)
    with _true_float32(z.device):
        steps = _squared_radii(points, ks, screen, range(len(z)), "radii")
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value, points.scale


def _default_budget(device: torch.device) -> int:
    return 2**28 if device.type == "cpu" else 2**31


def compute_pairwise_distance(data_x: Any, data_y: Any = None) -> Any:
    """Distances (N, M) float64 by differences (official name); for small inputs. numpy in, numpy out."""
    x = _features(data_x, "data_x", None)
    y = x if data_y is None else _features(data_y, "data_y", x.device)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"data_x has {x.shape[1]} features per row, data_y {y.shape[1]}")
    out = torch.empty(len(x), len(y), dtype=torch.float64, device=x.device)
    other = y.double()
    for row, point in enumerate(x.double()):
        out[row] = (point - other).square_().sum(1).sqrt()
    return out if isinstance(data_x, Tensor) else out.numpy()


# ---------------------------------------------------------------- what to expect

def expected_density() -> float:
    """E[density] for equal distributions: exactly 1 (section 3.2)."""
    return 1.0


def expected_coverage(nearest_k: int, num_real: int, num_fake: int) -> float:
    """E[coverage] = 1 - prod_{i=1..k} (N - i) / (N + M - i) for equal continuous distributions (lemma 2)."""
    if not (1 <= nearest_k <= num_real - 1 and num_fake >= 1):
        raise ValueError(f"need 1 <= nearest_k <= num_real - 1 and num_fake >= 1, not nearest_k={nearest_k}, "
                         f"num_real={num_real}, num_fake={num_fake}")
    return -math.expm1(sum(math.log1p(-num_fake / (num_real + num_fake - i)) for i in range(1, nearest_k + 1)))


def ball_count_pmf(nearest_k: int, num_real: int, num_fake: int) -> Tensor:
    """P(c fakes in a real ball), c = 0..M, float64, for equal distributions: a negative hypergeometric law.

    C(c + k - 1, c) C(M - c + N - 1 - k, M - c) / C(N + M - 1, M); mean k M / N; the first entry is 1 - E[coverage].
    """
    expected_coverage(nearest_k, num_real, num_fake)          # checks the arguments
    c = torch.arange(num_fake + 1, dtype=torch.float64)
    log_choose = lambda n, r: torch.lgamma(n + 1) - torch.lgamma(r + 1) - torch.lgamma(n - r + 1)      # noqa: E731
    rest, whole = num_fake - c, torch.tensor(float(num_real + num_fake - 1), dtype=torch.float64)
    return (log_choose(c + nearest_k - 1, c) + log_choose(rest + num_real - 1 - nearest_k, rest)
            - log_choose(whole, torch.tensor(float(num_fake), dtype=torch.float64))).exp()


def select_k(num_real: int, num_fake: int, min_coverage: float = 0.95) -> int:
    """The smallest k whose expected coverage exceeds `min_coverage` (section 3.3); 5 for 10,000 and 10,000."""
    for k in range(1, num_real):
        if expected_coverage(k, num_real, num_fake) > min_coverage:
            return k
    raise ValueError(f"no nearest_k below num_real = {num_real} has an expected coverage above {min_coverage} "
                     f"with num_fake = {num_fake}")


# ---------------------------------------------------------------- batch by batch, error bars

class PRDC:
    """The metric in the usual workflow: features arrive in batches, and one real set serves many generators.

    Options as for `compute_prdc`. `reset(keep_real=True)` drops the fakes and keeps the reals with their radii.
    """

    def __init__(self, nearest_k: int | Sequence[int] = 5, **options: Any):
        _check_k(nearest_k)
        self.nearest_k, self.options = nearest_k, options
        self.reset()

    def update(self, features: Any, real: bool) -> None:
        """Append rows (n, D) to the real or the fake set."""
        rows = _features(features, "features", self.options.get("device"))
        chunks = self._real if real else self._fake
        before = next((c for c in (*self._real, *self._fake)), None)
        if before is not None and before.shape[1] != rows.shape[1]:
            raise ValueError(f"features have {rows.shape[1]} columns, earlier ones {before.shape[1]}")
        chunks.append(rows.clone())
        if real:
            self._radii = None

    def compute(self) -> dict:
        """The result of `compute_prdc` on all rows so far."""
        if self.options.get("group") is None and not (self.num_real and self.num_fake):
            raise ValueError(f"compute() needs rows of both sets; there are {self.num_real} real and {self.num_fake} fake")
        real, fake = self._rows(self._real, self._fake), self._rows(self._fake, self._real)
        for step in iter_prdc(real, fake, self.nearest_k, real_radii=self._radii, **self.options):
            pass
        self._radii = step["real_radii"]
        return step["result"]

    def reset(self, keep_real: bool = False) -> None:
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
        return {"real": self._rows(self._real, self._fake), "fake": self._rows(self._fake, self._real), "radii": self._radii}

    def load_state_dict(self, d: dict) -> None:
        self._real, self._fake = ([d[name]] if len(d[name]) else [] for name in ("real", "fake"))
        self._radii = d["radii"]

    def cache_real(self, path: str | Path) -> None:
        """Load the reals and their radii from `path` (.npz) if it exists; else compute and write them there."""
        path, ks = Path(path), _check_k(self.nearest_k)
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                known = file["nearest_k"].tolist()
                missing = [k for k in ks if k not in known]
                if missing:
                    raise ValueError(f"{path} holds radii for nearest_k {known}, not for {missing}")
                device = self.options.get("device")
                self._real = [_features(file["real_features"], "real_features", device)]
                self._radii = torch.from_numpy(file["squared_radii"][[known.index(k) for k in ks]]), float(file["scale"])
            return
        if not self.num_real:
            raise ValueError("cache_real() of a new file needs real rows: update(features, real=True) first")
        real = self._rows(self._real, self._fake)
        if self._radii is None:
            self._radii = _radii_alone(real, ks, self.options.get("precision", "auto"), self.options.get("memory_budget"))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, real_features=real.cpu().numpy(), squared_radii=self._radii[0].cpu().numpy(),
                         scale=self._radii[1], nearest_k=np.array(ks))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _rows(self, chunks: list[Tensor], others: list[Tensor]) -> Tensor:
        if chunks:
            return torch.cat(chunks)
        return others[0][:0] if others else torch.zeros(0, 0)


def bootstrap_prdc(real_features: Any, fake_features: Any, nearest_k: int = 5, *, num_subsets: int = 10,
                   subset_size: int | None = None, seed: int = 0, **options: Any) -> tuple[dict, dict]:
    """Mean and standard deviation of each metric over random subsets of both sets.

    Subsets are drawn without replacement (drawn with it, duplicates would make radii of 0), by default of half the
    smaller set: an error bar for that size, which is larger than that of the whole.
    """
    if num_subsets < 2:
        raise ValueError(f"num_subsets must be at least 2, not {num_subsets}")
    real, fake = _features(real_features, "real_features", None), _features(fake_features, "fake_features", None)
    size = min(len(real), len(fake)) // 2 if subset_size is None else subset_size
    if not 1 <= size <= min(len(real), len(fake)):
        raise ValueError(f"subset_size must be in 1..{min(len(real), len(fake))}, not {size}")
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(num_subsets):
        rows = [torch.randperm(len(z), generator=generator)[:size].to(z.device) for z in (real, fake)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(compute_prdc(real[rows[0]], fake[rows[1]], nearest_k, **options))
    names = [name for name, value in results[0].items() if isinstance(value, float)]
    samples = {name: torch.tensor([r[name] for r in results], dtype=torch.float64) for name in names}
    return {n: s.mean().item() for n, s in samples.items()}, {n: s.std().item() for n, s in samples.items()}


# ---------------------------------------------------------------- arguments

def _check_k(nearest_k: Any) -> list[int]:
    several = isinstance(nearest_k, (Sequence, np.ndarray, Tensor)) and not isinstance(nearest_k, str)
    ks = list(nearest_k.tolist() if hasattr(nearest_k, "tolist") else nearest_k) if several else [nearest_k]
    if not ks:
        raise ValueError("nearest_k must not be empty")
    for k in ks:
        if isinstance(k, (bool, np.bool_)) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"nearest_k must be a positive integer or a sequence of them, not {nearest_k!r}")
    return [int(k) for k in ks]


def _features(value: Any, name: str, device: Any) -> Tensor:
    if not isinstance(value, Tensor):
        value = np.asarray(value)
        if value.dtype.kind not in "fiub":
            raise ValueError(f"{name} must be real numbers, not {value.dtype}")
        value = torch.from_numpy(value if value.flags.writeable and min(value.strides, default=0) >= 0 else value.copy())
    if value.is_complex():
        raise ValueError(f"{name} must be real numbers, not {value.dtype}")
    if value.ndim != 2:
        raise ValueError(f"{name} must be (rows, features), not {tuple(value.shape)}; use .flatten(1) on maps")
    return value.detach().to(device if device is not None else value.device)


def _check_sets(real: Tensor, fake: Tensor, kmax: int, with_recall: bool) -> None:
    for name, z in (("real_features", real), ("fake_features", fake)):
        if not len(z):
            raise ValueError(f"{name} has no rows")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real_features have {real.shape[1]} columns, fake_features {fake.shape[1]}")
    if not real.shape[1]:
        raise ValueError("features have no columns")
    if len(real) <= kmax:
        raise ValueError(f"nearest_k = {kmax} needs more than {kmax} real rows, there are {len(real)}")
    if with_recall and len(fake) <= kmax:
        raise ValueError(f"recall with nearest_k = {kmax} needs more than {kmax} fake rows, there are {len(fake)}")
    for name, z in (("real_features", real), ("fake_features", fake)):
        bad = sum(int((~part.isfinite()).any(1).sum()) for part in z.split(4096)) if z.is_floating_point() else 0
        if bad:
            raise ValueError(f"{name} has {bad} rows with NaN or infinite values, of {len(z)}")


def _warn(num_real: int, num_fake: int, k: int, same: bool) -> None:
    if same:
        warnings.warn("real_features and fake_features are the same tensor", stacklevel=4)
    elif num_real < 1000 or num_real != num_fake:
        warnings.warn(f"{num_real} real and {num_fake} fake rows: for equal distributions expect a coverage of "
                      f"{expected_coverage(k, num_real, num_fake):.4f} at nearest_k = {k}", stacklevel=4)


def _center_and_scale(real: Tensor, fake: Tensor, rows: int) -> tuple[Tensor, float]:
    """The mean of the reals, and the power of two that brings the largest centred coordinate to about 1."""
    parts = real.split(rows)
    bound = max(float(p.to(torch.float64).abs().max()) for z in (real, fake) for p in z.split(rows))
    shrink = 2.0 ** -max(math.frexp(bound)[1], -1000) if bound else 1.0      # sums of huge values must not overflow
    center = sum((p.to(torch.float64) * shrink).sum(0) for p in parts) / len(real) / shrink
    largest = max(float((p.to(torch.float64) - center).abs().max()) for z in (real, fake) for p in z.split(rows))
    return center, 2.0 ** -max(min(math.frexp(largest)[1], 1000), -1000) if largest else 1.0


def _gather(rows: Tensor, group: Any) -> Tensor:
    """The rows of all processes, in the order of ranks; they may have different numbers, also none."""
    world = dist.get_world_size(group)
    shapes = [torch.zeros(2, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(shapes, torch.tensor([len(rows), rows.shape[1]], device=rows.device), group=group)
    counts, widths = zip(*(shape.tolist() for shape in shapes))
    width = max(widths)
    if any(w != width for w, c in zip(widths, counts) if c):
        raise ValueError(f"the processes have features of different widths: {sorted(set(widths))}")
    padded = rows.new_zeros(max(counts), width)
    padded[:len(rows)] = rows
    everything = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(everything, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(everything, counts)])


# ---------------------------------------------------------------- demonstration

def _demonstrate() -> None:
    """One real outlier against precision and density, one fake outlier against recall and coverage (figure 3)."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(1000, 64, generator=generator), torch.randn(1000, 64, generator=generator)
    print(f"expected for equal distributions: density 1, coverage {expected_coverage(5, 1000, 1000):.3f}\n")
    print("                                    precision  recall  density  coverage")
    for name, shift, outlier in [("equal distributions", 0.0, None), ("fakes shifted by 1", 1.0, None),
                                 ("  with one real outlier there", 1.0, "real"), ("  with one fake outlier among reals", -1.0, "fake")]:
        x, y = real.clone(), fake + shift
        if outlier == "real":
            x[0] = 3.0
        if outlier == "fake":
            y[0] = 3.0
        result = compute_prdc(x, y, 5)
        print(f"{name:36s}{result['precision']:8.3f}{result['recall']:9.3f}{result['density']:9.3f}{result['coverage']:10.3f}")


if __name__ == "__main__":
    _demonstrate()
