"""AdamP and SGDP: drop-in replacements of AdamW and SGD for networks with normalisation layers.

Paper: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
B. Heo, S. Chun, S. J. Oh, D. Han, S. Yun, G. Kim, Y. Uh, J.-W. Ha, ICLR 2021, arXiv:2006.08217.

The idea. A weight w that feeds a batch norm is scale invariant: f(cw) = f(w). Only its direction
w / |w| matters, and one step turns it by about lr |u| / |w| (the effective step). Gradients of such
a weight are orthogonal to it, so every step makes it longer; momentum much more so, because an old
step is not orthogonal to the new weight (Lemma 2.2). The effective step decays too early. The cure:
take the part parallel to w out of the update u, wherever w looks scale invariant.

One step for one weight (w, gradient g, moments m and v):

    m = beta1 m + (1 - beta1) g               v = beta2 v + (1 - beta2) g^2
    u = m / (sqrt(v / (1 - beta2^t)) + eps)   SGDP instead: m = momentum m + g, u = m
    for view in (each output channel, the whole layer):       rows w_i, g_i, u_i of n numbers
        if max_i |cos(g_i, w_i)| < delta / sqrt(n):           w looks scale invariant
            u_i = u_i - w^_i <w^_i, u_i>, w^_i = w_i / |w_i|  keep the tangent part
            weight_decay = wd_ratio weight_decay; stop        length is no longer the enemy
    w = (1 - lr weight_decay) w - lr / (1 - beta1^t) u        decoupled, as in torch's AdamW

Biases and batch-norm parameters (ndim <= 1) are never projected. `delta` and `wd_ratio` need no
tuning. A weight_decay good for torch.optim.AdamW is good here (papers that write w = (1 - wd) w
mean lr times ours).

To copy: `projection` into an optimiser of your own, or this file. Its paths agree to rounding:

    foreach=False    the readable one, `_readable_step`: read this
    foreach=True     multi-tensor, branch-free: no host synchronisation, CUDA graphs (capturable)
    default on CUDA  branch-free, with torch's fused kernel for the update
    default on CPU   torch's fused kernel, in blocks that the projection finds in the cache

>>> model = torch.nn.Linear(4, 2)
>>> optimizer = AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
>>> model(torch.ones(1, 4)).sum().backward()
>>> optimizer.step()
>>> optimizer.stats["tested"]
1

`python adamp.py` runs the paper's 2-D toy: momentum makes the weight several times as long and the
search slower; the projection reaches the optimum in a fraction of the steps. NaN gradients give NaN
weights, as everywhere in torch.optim. With GradScaler, gradients are unscaled first, as usual.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from numbers import Real
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.linalg import vector_norm
from torch.optim import Optimizer

BLOCK = 1 << 19       # elements of a block on the CPU: what a step touches of it stays in the cache
GPU_BLOCK = 1 << 25   # on a GPU: large beside the cost of a call
LAYOUTS = 128         # buckets whose rows are remembered
HALF = (torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32 (eps would underflow); everything else as it is."""
    return x.float() if x.dtype in HALF else x


def _clock(step: float, device: torch.device | str = "cpu") -> Tensor:
    """A step count for torch's kernels and CUDA graphs. A default dtype of 16 bits stops at 256."""
    return torch.full((), step, dtype=torch.float32, device=device)


def _is_number(value, top: float = math.inf) -> bool:
    """A number or a tensor of one number, in [0, top]."""
    single = isinstance(value, Real) or isinstance(value, Tensor) and value.numel() == 1
    return single and bool(0 <= value <= top)


def _check_shapes(**tensors: Tensor) -> None:
    if len(shapes := [tuple(x.shape) for x in tensors.values()]) != shapes.count(shapes[0]):
        raise ValueError(f"{' and '.join(tensors)} must have one shape, got "
                         f"{' and '.join(map(str, shapes))}")


# ---------------------------------------------------------------- the test and the projection

def _first_view(dot: Tensor, norm_w: Tensor, norm_g: Tensor, length: int, delta: float, eps: float):
    """The first view whose largest |cos(g, w)| is below delta / sqrt(row length), or None.

    Takes <w, g>, |w|, |g| of every channel; those of the layer follow from them.
    """
    for view, n in (("channel", length), ("layer", length * dot.numel())):
        if view == "layer":
            dot, norm_w, norm_g = dot.sum(), norm_w.norm(), norm_g.norm()
        cosine = dot / (norm_g.clamp_min(eps) * norm_w.clamp_min(eps))
        bound = delta / math.sqrt(n)
        if (vector_norm(cosine, math.inf) < bound if type(cosine) is Tensor else
                (cosine.abs() < bound).sum() == cosine.numel()):  # a rank may hold no channel
            return view
    return None


def scale_invariance(p: Tensor, grad: Tensor, delta: float = 0.1, eps: float = 1e-8) -> str | None:
    """Does the weight look scale invariant? "channel", "layer" or None (always None for ndim <= 1).

    A function with f(cw) = f(w) has <w, grad f(w)> = 0, so a cosine far below that of random
    vectors, which is about 1 / sqrt(n), gives such a weight away. Random gradients pass with
    probability 0.08 per row.
    """
    _check_shapes(p=p, grad=grad)
    if p.ndim < 2 or p.numel() == 0:
        return None
    w, g = _wide(p.detach()), _wide(grad.detach())
    dims = tuple(range(1, p.ndim))
    return _first_view((w * g).sum(dims), vector_norm(w, dim=dims), vector_norm(g, dim=dims),
                       w[0].numel(), delta, eps)


def tangent(p: Tensor, perturb: Tensor, view: str, eps: float) -> Tensor:
    """perturb - w^ <w^, perturb> with w^ = w / (|w| + eps), per channel or of the layer."""
    dims = tuple(range(1 if view == "channel" else 0, p.ndim))
    unit = p / (vector_norm(p, dim=dims, keepdim=True) + eps)
    return perturb - unit * (unit * perturb).sum(dims, keepdim=True)


def projection(p: Tensor, grad: Tensor, perturb: Tensor, delta: float, wd_ratio: float,
               eps: float) -> tuple[Tensor, float]:
    """(tangent part of perturb, wd_ratio) where p looks scale invariant, else (perturb, 1).

    All tensors have p's shape and stay untouched. Reads a number back from the device.
    """
    _check_shapes(p=p, perturb=perturb)
    view = scale_invariance(p, grad, delta, eps)
    if view is None:
        return perturb, 1
    return tangent(_wide(p.detach()), _wide(perturb), view, eps).to(perturb.dtype), wd_ratio


def effective_step(p_before: Tensor, p_after: Tensor) -> float:
    """How far the direction moved: the norm of p_after / |p_after| - p_before / |p_before|.

    NaN for a zero weight; ValueError for different shapes.
    """
    _check_shapes(p_before=p_before, p_after=p_after)
    before, after = p_before.detach().double(), p_after.detach().double()
    return (after / after.norm() - before / before.norm()).norm().item()


# ---------------------------------------------------------------- what the two optimisers share

class _ProjectedOptimizer(Optimizer):
    """Checks, state dicts, statistics, the choice of a path, and the branch-free projection."""

    def __init__(self, params, defaults: dict):
        self._views: list[str | None | Tensor] = []
        self._rows: dict[tuple, _Rows] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check(self, group: dict) -> None:
        for name in ("lr", "eps", "weight_decay", "delta", "wd_ratio", "momentum"):
            value, top = group.get(name, 0), 1 if name == "wd_ratio" else math.inf
            if not _is_number(value, top):
                raise ValueError(f"{name} must be a number in [0, {top}], got {value!r}")
        if (known := group["scale_invariant"]) not in (None, True, False):
            raise ValueError(f"scale_invariant must be None, True or False, got {known!r}")
        for p in group["params"]:
            self._check_parameter(p)

    def _check_parameter(self, p: Tensor) -> None:
        if p.is_complex():
            raise ValueError(f"params must be real, got a parameter of dtype {p.dtype}")
        if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
            raise ValueError("params must keep their channels, got a flat sharded parameter "
                             "(FSDP); use DDP, or FSDP 2's fully_shard")

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"_views": [], "_rows": {}} | state)
        for group in self.param_groups:          # groups of the official package lack our own keys
            group.update(self.defaults | group)

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, except that the float32 state of half precision parameters stays float32."""
        given = []                               # state_dict as the user's own hooks leave it

        def widen(*_):
            saved = (i for group in given[0]["param_groups"] for i in group["params"])
            ours = (p for group in self.param_groups for p in group["params"])
            for index, p in zip(saved, ours):
                if p.dtype in HALF and index in given[0]["state"]:
                    self.state[p] = {key: value.to(p.device, torch.float32, copy=True)
                                     if isinstance(value, Tensor) else value
                                     for key, value in given[0]["state"][index].items()}

        with (self.register_load_state_dict_pre_hook(lambda _, loaded: given.append(loaded)),
              self.register_load_state_dict_post_hook(widen, prepend=True)):
            super().load_state_dict(state_dict)

    def _new_state(self, p: Tensor, group: dict) -> dict:
        dtype = torch.float32 if p.dtype in HALF else p.dtype
        return {key: torch.zeros_like(p, dtype=dtype) for key in self._moments}

    @property
    def stats(self) -> dict[str, int]:
        """Of the last step: tensors `tested` (ndim > 1, with a gradient) and hits per view;
        `projected` is their sum. Read back from the device only here."""
        hits = [view.tolist() if isinstance(view, Tensor) else (view == "channel", view == "layer")
                for view in self._views]         # tensors come from the branch-free path
        channel, layer = sum(hit[0] for hit in hits), sum(hit[1] for hit in hits)
        return {"tested": len(hits), "channel": channel, "layer": layer,
                "projected": channel + layer}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """One step. The closure runs with gradients on; its loss is returned."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._views.clear()
        for group in self.param_groups:
            paths = defaultdict(list)
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                if p.grad.layout != torch.strided:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients, "
                                       f"got one of shape {tuple(p.shape)}; use sparse=False")
                if not self.state[p]:
                    self._check_parameter(p)     # FSDP may have flattened it since the constructor
                    self.state[p].update(self._new_state(p, group))
                paths[self._path(group, p), p.dtype].append(p)
            for (path, _), params in paths.items():
                path(group, params)
                for p in () if torch.compiler.is_compiling() else params:
                    increment_version(p)     # torch's fused kernels do not: stale graphs must fail
        return loss

    def _path(self, group: dict, p: Tensor) -> Callable:
        """The function that steps this parameter: what the arguments ask for, else the fastest."""
        foreach, fused = group["foreach"], group.get("fused")
        if type(p) is not nn.Parameter and type(p.data) is not Tensor:   # DTensor and the like
            return self._readable_step
        if group.get("capturable") or torch.compiler.is_compiling():
            return self._foreach_step
        if (p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) and not foreach
                and fused is not False and (fused or foreach is None) and self._has_kernel(group)):
            return self._fused_step
        return self._readable_step if foreach is False and not fused else self._foreach_step

    def _readable_step(self, group: dict, params: list[Tensor]) -> None:
        lr, eps = float(group["lr"]), group["eps"]
        for p in params:
            w, g = _wide(p.data), _wide(p.grad)
            if group["maximize"]:
                g = -g
            u, size = self._direction(group, self.state[p], g, lr)
            decay = lr * self._decay(group)
            if w.ndim > 1:
                if view := self._view(group, lambda: scale_invariance(w, g, group["delta"], eps)):
                    u = tangent(w, u, view, eps)
                    decay *= group["wd_ratio"]
                    if self._stores_projection(group):
                        self.state[p]["momentum"].copy_(u)
            w.mul_(1 - decay).add_(u, alpha=-size)
            if w.dtype != p.dtype:
                p.copy_(w)

    def _view(self, group: dict, test: Callable[[], str | None]) -> str | None:
        """What the group's `scale_invariant` says, else the test; kept for `stats`."""
        known = group["scale_invariant"]
        view = test() if known is None else "channel" if known else None
        self._views.append(view)
        return view

    # ------------------------------------------------------------ foreach: branch-free

    def _foreach_step(self, group: dict, params: list[Tensor]) -> None:
        """w -= s (u + (decay - coefficient) w), the projection a blend instead of a branch.

        With coefficient = <w, u> / (|w| + eps)^2 where a view is hit and 0 elsewhere, everything
        that depends on the test is a factor of w, one number per channel; nothing has to be read
        back from the device. Where torch's fused kernel serves, it steps from 0 instead of w, and
        what it leaves is -s u: that is u with s = -1.
        """
        for bucket in self._buckets(group, params):
            w, g = [_wide(p) for p in bucket], [_wide(p.grad) for p in bucket]
            moments = [[self.state[p][key] for p in bucket] for key in self._moments]
            if self._kernel_serves(group, w, g, *moments):
                clock = _clock(max(map(self._count, bucket)), w[0].device)
                if w[0].ndim > 1:
                    room = w[0].new_zeros(sum(x.numel() for x in w))
                    u = _parts(room, w)
                    self._kernel(group, clock, 0.0, u, g, *moments)
                    decay = -float(group["lr"]) * self._decay(group)
                    self._project_all(group, bucket, w, g, room, decay)
                    torch._foreach_add_(w, u)
                else:
                    self._kernel(group, clock, self._decay(group), w, g, *moments)
            else:
                if group["maximize"]:
                    g = torch._foreach_neg(g)
                u, size, decay = self._directions(group, bucket, g)
                if w[0].ndim > 1:
                    room = torch.cat(_vectors(u))
                    self._project_all(group, bucket, w, g, room, decay)
                    u = _parts(room, w)
                elif group["weight_decay"] > 0:
                    torch._foreach_mul_(w, _each(1 - size * decay, len(w)))
                if isinstance(size, Tensor):
                    torch._foreach_add_(w, torch._foreach_mul(u, _each(-size, len(w))))
                else:
                    torch._foreach_add_(w, u, alpha=-size)
            if w[0].dtype != bucket[0].dtype:
                torch._foreach_copy_(bucket, w)

    def _kernel_serves(self, group: dict, *lists: list[Tensor]) -> bool:
        """By default on CUDA, elsewhere if foreach and fused are both asked for: dense tensors,
        those of a parameter all of one dtype and layout."""
        foreach, fused = group["foreach"], group.get("fused")
        default = lists[0][0].device.type == "cuda" and foreach is None and fused is not False
        if (not (default or fused and foreach) or group.get("capturable")
                or torch.compiler.is_compiling() or not self._has_kernel(group)):
            return False
        kinds = [[(x.dtype, x.stride()) for x in tensors] for tensors in lists]
        return (all(other == kinds[0] for other in kinds)
                and all(x.is_contiguous() for x in lists[0]))

    def _count(self, p: Tensor) -> float:
        """Counts the step of a parameter; 0 for an optimiser that counts none."""
        state = self.state[p]
        if "step" not in state:
            return 0.0
        state["step"] = int(state["step"]) + 1
        return float(state["step"])

    def _buckets(self, group: dict, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Matrices or vectors of one device and step count, together no larger than the largest of
        all, or than GPU_BLOCK on an accelerator: twice that is the extra memory."""
        alike = defaultdict(list)
        for p in params:
            step = 0 if group.get("capturable") else int(self.state[p].get("step", 0))
            alike[p.device, p.ndim > 1, step].append(p)
        largest = max(p.numel() for p in params)
        for (device, *_), tensors in alike.items():
            bound = largest if device.type == "cpu" else max(largest, GPU_BLOCK)
            bucket, size = [], 0
            for p in sorted(tensors, key=_row_length):
                if bucket and size + p.numel() > bound:
                    yield bucket
                    bucket, size = [], 0
                bucket.append(p)
                size += p.numel()
            yield bucket

    def _project_all(self, group, params, w, g, u, decay) -> None:
        """The updates of the matrices w, in place: their tangent part, plus the decay in units of
        s. u holds all updates in one vector, so that matrices of one row length share their calls:
        calls are what a step costs on a GPU.
        """
        eps, delta = group["eps"], group["delta"]
        rows, w = self._rows_of(w), _vectors(w)

        def cosine(dot, norm_w, norm_g, root):       # times the square root of its length
            return dot.abs() / (norm_g.clamp_min(eps) * norm_w.clamp_min(eps)) * root

        flat = torch.cat(w)
        norm_w = rows.norms(flat)
        along = rows.sums(flat.mul_(u))
        del flat                                     # before there is the next
        layer_w = layer_along = norm_w.new_zeros(len(w))
        if group["scale_invariant"] is None:
            flat = torch.cat(_vectors(g))
            norm_g = rows.norms(flat)
            torch._foreach_mul_(flat.split(rows.numels), w)
            dot = rows.sums(flat)
            del flat
            missed, layer_dot, layer_w, layer_g, layer_along = rows.per_tensor(torch.stack(
                [(~(cosine(dot, norm_w, norm_g, rows.root) < delta)).to(dot.dtype), dot,
                 norm_w ** 2, norm_g ** 2, along]))
            layer_w = layer_w.sqrt()
            channel = missed == 0
            layer = ~channel & (cosine(layer_dot, layer_w, layer_g.sqrt(), rows.layer_root) < delta)
        else:
            layer = torch.zeros_like(layer_w, dtype=torch.bool)
            channel = torch.full_like(layer, group["scale_invariant"])
        self._views.extend(torch.stack([channel, layer], 1).unbind())

        layer_part = torch.where(layer, layer_along / (layer_w + eps) ** 2, 0)
        decay = decay * (1 + (channel | layer).to(norm_w.dtype) * (group["wd_ratio"] - 1))
        channel_row, layer_row, decay_row = torch.stack(
            [x.to(norm_w.dtype) for x in (channel, layer_part, decay)])[:, rows.tensor]
        part = torch.where(channel_row > 0, along / (norm_w + eps) ** 2, layer_row)
        if self._stores_projection(group):       # the official SGDP: the buffer itself is projected
            rows.add_multiples(u, torch.cat(w), -part)
            torch._foreach_copy_([self.state[p]["momentum"] for p in params], _parts(u, params))
            part = torch.zeros_like(part)
        rows.add_multiples(u, torch.cat(w), decay_row - part)

    def _rows_of(self, matrices: list[Tensor]) -> "_Rows":
        """Made once: a step in a CUDA graph, or without waiting, copies no numbers to the GPU.

        The first layouts stay, for the graphs that hold them; where gradients come and go, later
        ones take turns.
        """
        shapes = tuple((x.size(0), _row_length(x)) for x in matrices)
        if torch.compiler.is_compiling():
            return _Rows(shapes, matrices[0])
        key = shapes, matrices[0].device, matrices[0].dtype
        if key not in self._rows:
            if len(self._rows) >= LAYOUTS:
                self._rows.popitem()
            self._rows[key] = _Rows(shapes, matrices[0])
        return self._rows[key]

    def _stores_projection(self, group: dict) -> bool:
        return group.get("project_buffer", False) and not group["nesterov"]

    def _decay(self, group: dict) -> float:
        """The weight decay in units of lr."""
        return group["weight_decay"]

    # ------------------------------------------------------------ fused: CPU, dense tensors

    def _fused_step(self, group: dict, params: list[Tensor]) -> None:
        """Matrices one by one, vectors together; the foreach path where layouts or types differ."""
        room = params[0].new_empty(min(BLOCK, max(p.numel() for p in params)))
        numbers = torch.arange(max(p.size(0) if p.ndim else 1 for p in params), device="cpu")
        vectors, others, clock = defaultdict(list), [], lru_cache(None)(_clock)
        for p in params:
            rows = _same_rows(p.data, p.grad, *[self.state[p][key] for key in self._moments])
            if rows is None:
                others.append(p)
                continue
            step = self._count(p)
            if p.ndim > 1:
                self._fused_matrix(group, rows, clock(step), room, numbers)
            else:
                vectors[step].append(rows)
        for step, alike in vectors.items():
            self._kernel(group, clock(step), self._decay(group), *map(list, zip(*alike)))
        if others:
            self._foreach_step(group, others)

    def _fused_matrix(self, group: dict, tensors: list[Tensor], clock: Tensor, room: Tensor,
                      numbers: Tensor) -> None:
        """torch's fused kernel makes the step, from 0 instead of w; what it leaves is -s u.

        Then w = (1 - k) w - s u + c w with k = lr decay and c = <w, s u> / (|w| + eps)^2, in blocks
        of rows that stay in the cache; `room` holds -s u of a block. For a hit of the layer view
        the tensor is one row and one block: the extra memory is at most the largest tensor (twice
        that for AdamP with nesterov, which copies m).
        """
        w, g, *_ = tensors                               # and the moments: (rows, n)
        eps, delta, decay, length = group["eps"], group["delta"], self._decay(group), w.shape[1]
        dot, norm_w = _row_dots(w, g, numbers), vector_norm(w, dim=1)

        def test() -> str | None:
            least = vector_norm(g[:, :length // 32 + 1], dim=1)           # of |g|: mostly enough
            if vector_norm(dot / (norm_w * least), math.inf) < delta / math.sqrt(length):
                return "channel"
            return _first_view(dot, norm_w, vector_norm(g, dim=1), length, delta, eps)

        view, height = self._view(group, test), max(1, room.numel() // length)
        if view is None:
            for block in _blocks(tensors, height):
                self._kernel(group, clock, decay, *([x] for x in block))
            return
        if view == "layer":
            tensors, norm_w = [x.view(1, -1) for x in tensors], norm_w.norm()[None]
        keep = 1 - float(group["lr"]) * decay * group["wd_ratio"]
        squares = (norm_w + eps).square_()
        for w, *rest, square in _blocks([*tensors, squares], height):
            if w.numel() > room.numel():
                room.untyped_storage().resize_(0)        # so that both are never there together
                room.resize_(w.numel())
            update = room[:w.numel()].view_as(w).zero_()
            self._kernel(group, clock, 0.0, [update], *([x] for x in rest))
            factor = keep - _row_dots(w, update, numbers).div_(square)
            torch.addcmul(update, w, factor.unsqueeze(1), out=w)


class _Rows:
    """The rows of several matrices, all of whose numbers lie in one vector, matrix after matrix.

    `tensor`: of each row its matrix; `root`, `layer_root`: square roots of the lengths of each row
    and of each matrix."""

    def __init__(self, shapes: tuple[tuple[int, int], ...], like: Tensor):
        self.sizes, self.numels = [count for count, _ in shapes], list(map(math.prod, shapes))
        counts = torch.tensor(self.sizes)
        root = torch.tensor([[length, count * length] for count, length in shapes]).double().sqrt()
        self.counts = counts.to(like.device)
        tensor = torch.arange(len(shapes)).repeat_interleave(counts, output_size=sum(self.sizes))
        self.tensor = tensor.to(like.device)
        root, self.layer_root = root.to(like.device, like.dtype).unbind(1)
        self.root = root[self.tensor]
        spans = {}                                   # equal lengths are neighbours
        for (_, length), numel in zip(shapes, self.numels):
            spans[length] = spans.get(length, 0) + numel
        self.lengths, self.spans = list(spans), list(spans.values())
        self.heights = [span // n for span, n in zip(self.spans, self.lengths)]

    def split(self, flat: Tensor) -> list[Tensor]:
        """(rows, n) views, one for all neighbours of one row length."""
        return [part.view(-1, n) for part, n in zip(flat.split(self.spans), self.lengths)]

    def norms(self, flat: Tensor) -> Tensor:
        return torch.cat([vector_norm(part, dim=1) for part in self.split(flat)])

    def sums(self, flat: Tensor) -> Tensor:
        return torch.cat([part.sum(1) for part in self.split(flat)])

    def per_tensor(self, values: Tensor) -> Tensor:
        """(k, rows) to the sums over the rows of each matrix (k, matrices)."""
        if values.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            sums = torch.segment_reduce(values.flatten(), "sum", unsafe=True,
                                        lengths=self.counts.repeat(len(values)))
            return sums.view(len(values), -1)
        return torch.stack([x.sum(1) for x in values.split(self.sizes, 1)], 1)

    def add_multiples(self, u: Tensor, w: Tensor, factor: Tensor) -> None:
        """u += factor w, with one factor for each row."""
        for a, b, c in zip(self.split(u), self.split(w), factor.split(self.heights)):
            a.addcmul_(b, c.unsqueeze(1))


def _row_length(x: Tensor) -> int:
    return x.numel() // x.size(0) if x.ndim > 1 else 1


def _vectors(tensors: list[Tensor]) -> list[Tensor]:
    return [x.reshape(-1) for x in tensors]


def _parts(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of a vector in the shapes of `like`."""
    return [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in like]), like)]


def _rate(group: dict) -> float | Tensor:
    """The learning rate; if it is a tensor, without reading it back."""
    lr = group["lr"]
    return lr.double().squeeze() if isinstance(lr, Tensor) else float(lr)


def _each(value: float | Tensor, count: int) -> list:
    """One value per tensor: of (count,), or the same for all."""
    return list(value.unbind()) if isinstance(value, Tensor) and value.ndim else [value] * count


def _blocks(tensors: list[Tensor], height: int) -> Iterable:
    """The same `height` rows of every tensor, in turn."""
    return zip(*(x.split(height) for x in tensors)) if tensors[0].size(0) > height else [tensors]


# A gradient of embedding_bag is <a_i, b_i> in half of vecdot's time; torch keeps it private.
_DOTS = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)


def _row_dots(a: Tensor, b: Tensor, numbers: Tensor) -> Tensor:
    """<a_i, b_i> of (rows, n); numbers: 0, 1, ... for at least as many rows."""
    if _DOTS is None:
        return torch.linalg.vecdot(a, b)
    rows = numbers[:a.size(0)]
    return _DOTS.default(a, b, rows, rows, rows, 0)


def _same_rows(*tensors: Tensor) -> list[Tensor] | None:
    """(shape[0], n) views of dense tensors of one dtype and layout, in memory order, else None."""
    first = tensors[0]
    if any(x.dtype != first.dtype for x in tensors):
        return None
    if not all(map(Tensor.is_contiguous, tensors)):
        order = sorted(range(first.ndim), key=lambda d: (d > 0, -first.stride(d)))
        tensors = [x.permute(order) for x in tensors]
        if not all(map(Tensor.is_contiguous, tensors)):
            return None
    return [x.view(first.size(0), -1) for x in tensors] if first.ndim > 1 else list(tensors)


# ---------------------------------------------------------------- AdamP

class AdamP(_ProjectedOptimizer):
    """AdamW with its update projected onto the tangent plane of scale-invariant weights.

    Args:
        params: parameters or group dicts. A group may set any argument below for itself, and
            ``scale_invariant``: None runs the test, True always projects every output channel,
            False never projects (tensors with ndim > 1 only).
        lr, betas, eps, weight_decay: as in torch.optim.AdamW (w *= 1 - lr weight_decay).
        delta: threshold of the scale-invariance test; 0 never projects, which is AdamW.
        wd_ratio: factor of the weight decay on projected weights, in [0, 1].
        nesterov: look-ahead update (beta1 m + (1 - beta1) g) / denominator; not torch's NAdam.
        foreach, fused: which path; None chooses, False never, True where it serves. On the CPU,
            fused serves float32 and float64, else the step falls back to foreach; both True: the
            branch-free path with the fused kernel, which is the default on CUDA.
        maximize: ascend.
        capturable: step count and bias correction on the device, for CUDA graphs and torch.compile;
            always the branch-free path.

    Half precision parameters keep float32 moments. Parameters without gradient and empty ones are
    skipped. State: ``step``, ``exp_avg``, ``exp_avg_sq``; the official package's state dicts load.
    Raises ValueError for an argument out of range, complex or flat sharded parameters; RuntimeError
    at the step for sparse gradients.
    """

    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Iterable, lr: float | Tensor = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0, delta: float = 0.1, wd_ratio: float = 0.1,
                 nesterov: bool = False, *, foreach: bool | None = None, fused: bool | None = None,
                 maximize: bool = False, capturable: bool = False):
        super().__init__(params, dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio,
            nesterov=nesterov, scale_invariant=None, foreach=foreach, fused=fused,
            maximize=maximize, capturable=capturable))

    def _check(self, group: dict) -> None:
        super()._check(group)
        betas = group["betas"]
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2
                and all(_is_number(beta) and beta < 1 for beta in betas)):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        group["betas"] = tuple(map(float, betas))    # a float32 or float16 would round 1 - beta^t

    def _new_state(self, p: Tensor, group: dict) -> dict:
        step = _clock(0, p.device) if group["capturable"] else 0
        return {"step": step} | super()._new_state(p, group)

    def _direction(self, group: dict, state: dict, g: Tensor, lr: float) -> tuple[Tensor, float]:
        """The update u and its step size, lr with the bias correction of m."""
        m, v, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
        state["step"] = step = int(state["step"]) + 1
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt() / math.sqrt(1 - beta2 ** step) + group["eps"]
        u = (beta1 * m + (1 - beta1) * g if group["nesterov"] else m) / denominator
        return u, lr / (1 - beta1 ** step)

    def _directions(self, group: dict, bucket: list[Tensor], grads: list[Tensor]):
        """Updates u, their step size s = lr / (1 - beta1^t), and the weight decay in units of s."""
        states = [self.state[p] for p in bucket]
        m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        beta1, beta2 = group["betas"]
        if group["capturable"]:
            for p, state in zip(bucket, states):
                if not isinstance(state["step"], Tensor):
                    state["step"] = _clock(state["step"], p.device)
            torch._foreach_add_([s["step"] for s in states], 1)
            step = torch.stack([s["step"] for s in states]).double()       # (T,)
        else:
            step = max(map(self._count, bucket))     # one count for the whole bucket
        correction1, root2 = 1 - beta1 ** step, (1 - beta2 ** step) ** 0.5

        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, grads, alpha=1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        u = torch._foreach_sqrt(v)
        torch._foreach_div_(u, _each(root2, len(u)))
        torch._foreach_add_(u, group["eps"])
        torch._foreach_reciprocal_(u)
        if group["nesterov"]:
            m = torch._foreach_mul(m, beta1)
            torch._foreach_add_(m, grads, alpha=1 - beta1)
        torch._foreach_mul_(u, m)
        return list(u), _rate(group) / correction1, group["weight_decay"] * correction1

    def _has_kernel(self, group: dict) -> bool:
        return hasattr(torch, "_fused_adamw_")

    def _kernel(self, group: dict, step: Tensor, decay: float, w: list, g: list, m: list, v: list):
        """torch's AdamW step, in place; its own average of m and g serves as the look-ahead."""
        beta1, beta2 = group["betas"]
        if group["nesterov"]:
            torch._foreach_mul_(m, beta1)
            torch._foreach_add_(m, g, alpha=(1 - beta1) * (-1 if group["maximize"] else 1))
            m = [x.clone() for x in m]
        torch._fused_adamw_(w, g, m, v, [], [step] * len(w), lr=float(group["lr"]), beta1=beta1,
                            beta2=beta2, weight_decay=decay, eps=group["eps"], amsgrad=False,
                            maximize=group["maximize"])


# ---------------------------------------------------------------- SGDP

class SGDP(_ProjectedOptimizer):
    """SGD with momentum, projected in the same way (Algorithm 1).

    Args:
        params: parameters or group dicts, as in :class:`AdamP`.
        lr, momentum, dampening, nesterov: as in torch.optim.SGD, but dampening counts from the
            first step.
        weight_decay: decoupled, w *= 1 - lr weight_decay / (1 - momentum), which is where torch's
            coupled decay settles; so a value good for torch.optim.SGD is good here.
        eps, delta, wd_ratio, foreach, maximize: as in :class:`AdamP`.
        project_buffer: False keeps the momentum buffer as it is (the paper's Algorithm 1); True
            stores the projected one, as the official package does by aliasing (no difference with
            nesterov).

    State: ``momentum``. Raises like :class:`AdamP`; also ValueError for momentum below 0, nesterov
    without momentum or with dampening, and momentum of 1 or more with weight decay.
    """

    _moments = ("momentum",)

    def __init__(self, params: Iterable, lr: float | Tensor, momentum: float = 0,
                 dampening: float = 0, weight_decay: float = 0, nesterov: bool = False,
                 eps: float = 1e-8, delta: float = 0.1, wd_ratio: float = 0.1, *,
                 project_buffer: bool = False, foreach: bool | None = None, maximize: bool = False):
        super().__init__(params, dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, eps=eps, delta=delta, wd_ratio=wd_ratio, scale_invariant=None,
            project_buffer=project_buffer, foreach=foreach, maximize=maximize))

    def _check(self, group: dict) -> None:
        super()._check(group)
        momentum, dampening = group["momentum"], group["dampening"]
        if not (isinstance(dampening, Real) and math.isfinite(dampening)):
            raise ValueError(f"dampening must be a finite number, got {dampening!r}")
        if momentum >= 1 and group["weight_decay"] > 0:
            raise ValueError("momentum must be below 1 with weight_decay, which is divided by "
                             f"1 - momentum; got {momentum}")
        if group["nesterov"] and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening 0, got momentum "
                             f"{momentum}, dampening {dampening}")

    def _decay(self, group: dict) -> float:
        return group["weight_decay"] / (1 - group["momentum"]) if group["weight_decay"] > 0 else 0.0

    def _direction(self, group: dict, state: dict, g: Tensor, lr: float) -> tuple[Tensor, float]:
        m = state["momentum"]
        m.mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
        return g + group["momentum"] * m if group["nesterov"] else m, lr

    def _directions(self, group: dict, bucket: list[Tensor], grads: list[Tensor]):
        m = [self.state[p]["momentum"] for p in bucket]
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_add_(m, grads, alpha=1 - group["dampening"])
        u = torch._foreach_add(grads, m, alpha=group["momentum"]) if group["nesterov"] else m
        return list(u), _rate(group), self._decay(group)

    def _has_kernel(self, group: dict) -> bool:
        return (group["momentum"] > 0 and not self._stores_projection(group)
                and hasattr(torch, "_fused_sgd_"))

    def _kernel(self, group: dict, step: Tensor, decay: float, w: list, g: list, m: list):
        """torch's SGD step after the decoupled decay, in place."""
        if decay:
            torch._foreach_mul_(w, 1 - float(group["lr"]) * decay)
        torch._fused_sgd_(w, g, m, weight_decay=0.0, momentum=group["momentum"],
                          lr=float(group["lr"]), dampening=group["dampening"],
                          nesterov=group["nesterov"], maximize=group["maximize"],
                          is_first_step=False)


# ---------------------------------------------------------------- training, watched

def _epoch(loader: Iterable, epoch: int, skip: int, states: list[Tensor] | None) -> tuple:
    """The numbered batches of an epoch from `skip` on, what a DataLoader shuffles with, and its
    state as the epoch began; `states`, of a resumed epoch: that one and the one to go on with."""
    order = getattr(loader, "generator", None) or torch.default_generator
    if states:
        if epoch and getattr(loader, "persistent_workers", False):
            iter(loader)                                      # draws once, in the first epoch
        order.set_state(states[0])
    began = order.get_state()
    if seeks := hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch, skip)
    batches = enumerate(loader, skip if seeks else 0)
    if states:
        for _ in zip(range(0 if seeks else skip), batches):   # done before
            pass
        order.set_state(states[1])
    return batches, order, began


def train(model: nn.Module, loader: Iterable, optimizer: Optimizer, epochs: int = 1, *,
          loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
          schedule: Callable[[float], float] | None = None, measure_every: int = 10,
          autocast: torch.dtype | None = None, resume: dict | None = None) -> Iterator[dict]:
    """A training loop that watches what the paper is about. Yields one dict of floats per step.

    Args:
        loader: re-iterable with a length, of (input, target) batches on the model's device.
        optimizer: any; the share of projected tensors needs AdamP or SGDP.
        schedule: share of training done, in [0, 1), to a factor of lr (None: cosine to 0).
        measure_every: every so many steps the dict also has `weight_norm` (mean Frobenius norm),
            `effective_step` (mean distance the direction moved) over all convolutions (all matrices
            if there are none) and, for AdamP and SGDP, `projected` (share of the tensors tested).
        autocast: dtype of mixed precision (torch.bfloat16) or None.
        resume: a snapshot from `steps.send("state")`; training goes on from it to the same numbers.
    """
    if measure_every < 1:
        raise ValueError(f"measure_every must be at least 1, got {measure_every}")
    schedule = schedule or (lambda done: 0.5 * (1 + math.cos(math.pi * done)))
    watched = ([p for p in model.parameters() if p.ndim > 2]
               or [p for p in model.parameters() if p.ndim > 1])
    base_rates = [float(group["lr"]) for group in optimizer.param_groups]
    start_epoch = start_batch = 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(copy.deepcopy(resume["optimizer"]))  # it keeps what it is given
        base_rates = resume["base_rates"]
        start_epoch, start_batch = resume["epoch"], resume["batch"]
    total = epochs * len(loader)
    for epoch in range(start_epoch, epochs):
        skip = start_batch if epoch == start_epoch else 0
        batches, order, began = _epoch(loader, epoch, skip, resume["order"] if skip else None)
        for batch, (x, target) in batches:
            step = epoch * len(loader) + batch
            factor = schedule(step / total)
            for group, rate in zip(optimizer.param_groups, base_rates):
                group["lr"] = rate * factor
            model.train()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
                loss = loss_fn(model(x), target)
            loss.backward()
            measure = step % measure_every == 0
            before = [p.detach().clone() for p in watched] if measure else []
            optimizer.step()
            values = dict(step=step, epoch=epoch, loss=loss.item(), lr=base_rates[0] * factor)
            if measure and watched:
                values["weight_norm"] = fmean(p.norm().item() for p in watched)
                values["effective_step"] = fmean(map(effective_step, before, watched))
                if stats := getattr(optimizer, "stats", None):
                    values["projected"] = stats["projected"] / max(stats["tested"], 1)
            request = yield values
            while request == "state":
                request = yield copy.deepcopy({
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "base_rates": base_rates, "order": [began, order.get_state()],
                    "epoch": epoch, "batch": batch + 1})


if __name__ == "__main__":
    print("Minimise -cos(w, w*) for w in R^2 from 150 degrees, lr 0.1, 1000 steps:\n")
    print(f"{'optimiser':<24} {'final |w|':>9} {'steps to 1 - cos < 1e-4':>24}")
    for momentum, make in ((0.0, torch.optim.SGD), (0.9, torch.optim.SGD), (0.9, SGDP),
                           (0.99, torch.optim.SGD), (0.99, SGDP)):
        w = nn.Parameter(torch.tensor([[-0.75 ** 0.5, 0.5]], dtype=torch.float64))
        optimizer, reached = make([w], lr=0.1, momentum=momentum), None
        for step in range(1, 1001):
            optimizer.zero_grad()
            (-w[0, 0] / w.norm()).backward()
            optimizer.step()
            if reached is None and 1 - w[0, 0] / w.norm() < 1e-4:
                reached = step
        name = f"{make.__name__}, momentum {momentum}"
        print(f"{name:<24} {w.norm().item():>9.3f} {reached:>24}")
