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
    default on CPU   blocks that stay in the cache; AdamP lets torch's fused AdamW make the step
                     and takes the parallel part out afterwards, since the step is linear in u

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

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

BLOCK = 1 << 17       # elements of a block on the CPU: what a step touches of it stays in the cache


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32 (eps would underflow); everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---------------------------------------------------------------- the test and the projection

def _first_view(dot: Tensor, norm_w: Tensor, norm_g: Tensor, length: int, delta: float,
                eps: float) -> str | None:
    """The first view whose largest |cos(g, w)| is below delta / sqrt(row length).

    Takes <w, g>, |w|, |g| of every channel; those of the layer follow from them.
    """
    layer = dot.sum()[None], norm_w.norm()[None], norm_g.norm()[None]
    for view, (d, w, g), n in (("channel", (dot, norm_w, norm_g), length),
                               ("layer", layer, length * dot.numel())):
        cosine = d.abs() / (g.clamp_min(eps) * w.clamp_min(eps))
        if cosine.max() < delta / math.sqrt(n):
            return view
    return None


def scale_invariance(p: Tensor, grad: Tensor, delta: float = 0.1, eps: float = 1e-8) -> str | None:
    """Does the weight look scale invariant? "channel", "layer" or None (always None for ndim <= 1).

    A function with f(cw) = f(w) has <w, grad f(w)> = 0, so a cosine far below that of random
    vectors, which is about 1 / sqrt(n), gives such a weight away. Random gradients pass with
    probability 0.08 per row.
    """
    if p.ndim < 2 or p.numel() == 0:
        return None
    w, g = _wide(p.detach()), _wide(grad.detach())
    dims = tuple(range(1, p.ndim))
    return _first_view((w * g).sum(dims), torch.linalg.vector_norm(w, dim=dims),
                       torch.linalg.vector_norm(g, dim=dims), w[0].numel(), delta, eps)


def tangent(p: Tensor, perturb: Tensor, view: str, eps: float) -> Tensor:
    """perturb - w^ <w^, perturb> with w^ = w / (|w| + eps), per channel or of the layer."""
    dims = tuple(range(1 if view == "channel" else 0, p.ndim))
    unit = p / (torch.linalg.vector_norm(p, dim=dims, keepdim=True) + eps)
    return perturb - unit * (unit * perturb).sum(dims, keepdim=True)


def projection(p: Tensor, grad: Tensor, perturb: Tensor, delta: float, wd_ratio: float,
               eps: float) -> tuple[Tensor, float]:
    """(tangent part of perturb, wd_ratio) where p looks scale invariant, else (perturb, 1).

    All tensors have p's shape and stay untouched. Reads a number back from the device.
    """
    view = scale_invariance(p, grad, delta, eps)
    if view is None:
        return perturb, 1
    return tangent(_wide(p.detach()), _wide(perturb), view, eps).to(perturb.dtype), wd_ratio


def effective_step(p_before: Tensor, p_after: Tensor) -> float:
    """How far the direction moved: the norm of p_after / |p_after| - p_before / |p_before|.

    NaN for a zero weight; ValueError for different shapes.
    """
    if p_before.shape != p_after.shape:
        raise ValueError(f"p_before and p_after must have one shape, got {tuple(p_before.shape)} "
                         f"and {tuple(p_after.shape)}")
    before, after = p_before.detach().double(), p_after.detach().double()
    return (after / after.norm() - before / before.norm()).norm().item()


# ---------------------------------------------------------------- what the two optimisers share

class _ProjectedOptimizer(Optimizer):
    """Checks, state dicts, statistics, the choice of a path, and the branch-free projection."""

    def __init__(self, params, defaults: dict):
        self._views: list[str | None | Tensor] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check(self, group: dict) -> None:
        for name in ("lr", "eps", "weight_decay", "delta"):
            if not group[name] >= 0:
                raise ValueError(f"{name} must not be negative, got {group[name]}")
        if not 0 <= group["wd_ratio"] <= 1:
            raise ValueError(f"wd_ratio must be in [0, 1], got {group['wd_ratio']}")
        if group["scale_invariant"] not in (None, True, False):
            raise ValueError("scale_invariant must be None, True or False, got "
                             f"{group['scale_invariant']!r}")
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(f"params must be real, got a parameter of dtype {p.dtype}")
            if getattr(p, "_is_flat_param", False):
                raise ValueError("params must keep their shape, got a flat sharded parameter (FSDP) "
                                 "whose channels are lost; use DDP, or fully_shard of FSDP 2")

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_views", [])
        for group in self.param_groups:          # groups of the official package lack our own keys
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, except that the float32 state of half precision parameters stays float32."""
        super().load_state_dict(state_dict)
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        ours = (p for group in self.param_groups for p in group["params"])
        for index, p in zip(saved, ours):
            if p.dtype in (torch.float16, torch.bfloat16) and index in state_dict["state"]:
                self.state[p] = {key: value.to(p.device, torch.float32, copy=True)
                                 if isinstance(value, Tensor) else value
                                 for key, value in state_dict["state"][index].items()}

    @property
    def stats(self) -> dict[str, int]:
        """Of the last step: tensors `tested` (ndim > 1, with a gradient) and hits per view;
        `projected` is their sum. Read back from the device only here."""
        counts = {"tested": len(self._views), "channel": 0, "layer": 0}
        for view in self._views:
            if isinstance(view, Tensor):         # (channel hit, layer hit) of the branch-free path
                channel, layer = view.tolist()
                counts["channel"] += int(channel)
                counts["layer"] += int(layer)
            elif view is not None:
                counts[view] += 1
        return counts | {"projected": counts["channel"] + counts["layer"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """One step. The closure runs with gradients on; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._views.clear()
        for group in self.param_groups:
            paths = defaultdict(list)
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not support sparse gradients, got "
                                       f"one of shape {tuple(p.shape)}; use sparse=False")
                if not self.state[p]:
                    self.state[p].update(self._new_state(p, group))
                paths[self._path(group, p)].append(p)
            for path, params in paths.items():
                path(group, params)
        return loss

    def _path(self, group: dict, p: Tensor) -> Callable:
        """The function that steps this parameter: what the arguments ask for, else the fastest."""
        foreach, fused = group["foreach"], group.get("fused")
        if type(p.data) is not Tensor:           # DTensor and other subclasses: plain operations only
            return self._readable_step
        if group.get("capturable") or torch.compiler.is_compiling():
            return self._foreach_step
        if (fused or fused is None and foreach is None) and self._blocks_serve(group, p):
            return self._blocked_step
        return self._readable_step if foreach is False and not fused else self._foreach_step

    def _blocks_serve(self, group: dict, p: Tensor) -> bool:
        moments = (self.state[p][key] for key in self._moments)
        return (p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64)
                and _same_rows(p, p.grad, *moments) is not None)

    def _project(self, group: dict, w: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, float]:
        """`projection` with the group's override and the statistics."""
        if w.ndim < 2:
            return u, 1
        view = group["scale_invariant"]
        if view is None:
            view = scale_invariance(w, g, group["delta"], group["eps"])
        else:
            view = "channel" if view else None
        self._views.append(view)
        if view is None:
            return u, 1
        return tangent(w, u, view, group["eps"]), group["wd_ratio"]

    # ------------------------------------------------------------ foreach: branch-free

    def _foreach_step(self, group: dict, params: list[Tensor]) -> None:
        """w -= s (u + (decay - coefficient) w), the projection a blend instead of a branch.

        With coefficient = <w, u> / (|w| + eps)^2 where a view is hit and 0 elsewhere, everything
        that depends on the test is a factor of w, one number per channel; nothing has to be read
        back from the device.
        """
        for bucket in self._buckets(group, params):
            weights, grads = [_wide(p.data) for p in bucket], [_wide(p.grad) for p in bucket]
            if group["maximize"]:
                grads = torch._foreach_neg(grads)
            updates, size, decay = self._directions(group, bucket, grads)
            matrices = [i for i, w in enumerate(weights) if w.ndim > 1]
            if matrices:
                def pick(x):
                    if isinstance(x, Tensor) and x.ndim:     # an index list would synchronise
                        return torch.stack([x[i] for i in matrices])
                    return x
                self._project_all(group, [bucket[i] for i in matrices], matrices, weights, grads,
                                  updates, pick(decay))
            vectors = [i for i, w in enumerate(weights) if w.ndim <= 1]
            if vectors and group["weight_decay"] > 0:
                keep = 1 - size * decay
                if isinstance(keep, Tensor):
                    keep = [keep[i] if keep.ndim else keep for i in vectors]
                torch._foreach_mul_([weights[i] for i in vectors], keep)
            if isinstance(size, Tensor):
                sizes = [-size] * len(updates) if size.ndim == 0 else list((-size).unbind())
                torch._foreach_add_(weights, torch._foreach_mul(updates, sizes))
            else:
                torch._foreach_add_(weights, updates, alpha=-size)
            halves = [i for i, p in enumerate(bucket) if weights[i].dtype != p.dtype]
            if halves:
                torch._foreach_copy_([bucket[i] for i in halves], [weights[i] for i in halves])

    def _buckets(self, group: dict, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Tensors of one device, dtype and step count, together no larger than the largest of all
        (on an accelerator a quarter of all, for fewer kernels): the bound of the extra memory."""
        alike = defaultdict(list)
        for p in params:
            step = None if group.get("capturable") else self.state[p].get("step")
            alike[p.device, p.dtype, None if step is None else int(step)].append(p)
        for (device, _, _), tensors in alike.items():
            bound = max(p.numel() for p in tensors)
            if device.type != "cpu":
                bound = max(bound, sum(p.numel() for p in tensors) // 4)
            bucket, size = [], 0
            for p in tensors:
                if size + p.numel() > bound:
                    yield bucket
                    bucket, size = [], 0
                bucket.append(p)
                size += p.numel()
            yield bucket

    def _project_all(self, group, params, index, weights, grads, updates, decay) -> None:
        """updates[i] of the matrices `index`: the tangent part, plus the decay in units of s."""
        eps, delta = group["eps"], group["delta"]
        w, g, u = ([x[i] for i in index] for x in (weights, grads, updates))
        dims = [tuple(range(1, x.ndim)) for x in w]
        counts = [x.shape[0] for x in w]

        def rows(tensors):
            return torch.cat([x.flatten() for x in tensors])

        def per_row(values):                         # (k, T) to (k, total rows)
            return torch.cat([values[:, i:i + 1].expand(-1, n) for i, n in enumerate(counts)], 1)

        def per_tensor(values):                      # (k, total rows) to sums (k, T)
            return torch.stack([x.sum(1) for x in values.split(counts, 1)], 1)

        norm_w = rows([torch.linalg.vector_norm(x, dim=d) for x, d in zip(w, dims)])
        along = rows([(x * y).sum(d) for x, y, d in zip(w, u, dims)])
        if group["scale_invariant"] is None:
            norm_g = rows([torch.linalg.vector_norm(x, dim=d) for x, d in zip(g, dims)])
            dot = rows([(x * y).sum(d) for x, y, d in zip(w, g, dims)])
            cosine = dot.abs() / (norm_g.clamp_min(eps) * norm_w.clamp_min(eps))
            torch._foreach_mul_(list(cosine.split(counts)), [math.sqrt(x[0].numel()) for x in w])
            missed = (~(cosine < delta)).to(dot.dtype)
            missed, layer_dot, layer_w, layer_g, layer_along = per_tensor(
                torch.stack([missed, dot, norm_w * norm_w, norm_g * norm_g, along]))
            layer_w, layer_g = layer_w.sqrt(), layer_g.sqrt()
            cosine = layer_dot.abs() / (layer_g.clamp_min(eps) * layer_w.clamp_min(eps))
            torch._foreach_mul_(list(cosine.unbind()), [math.sqrt(x.numel()) for x in w])
            channel = missed == 0
            layer = ~channel & (cosine < delta)
        else:
            layer_w = layer_along = norm_w.new_zeros(len(w))
            layer = torch.zeros_like(layer_w, dtype=torch.bool)
            channel = torch.full_like(layer, group["scale_invariant"])
        self._views.extend(torch.stack([channel, layer], 1).unbind())

        layer_part = torch.where(layer, layer_along / (layer_w + eps) ** 2, 0)
        factor = 1 + (channel | layer).to(norm_w.dtype) * (group["wd_ratio"] - 1)
        channel_row, layer_row, decay_row = per_row(torch.stack(
            [channel.to(norm_w.dtype), layer_part, (factor * decay).to(norm_w.dtype)]))
        part = torch.where(channel_row > 0, along / (norm_w + eps) ** 2, layer_row)

        def shaped(values):
            return [x.view(-1, *[1] * len(d)) for x, d in zip(values.split(counts), dims)]

        if self._stores_projection(group):       # the official SGDP: the buffer itself is projected
            torch._foreach_addcmul_(u, w, shaped(-part))
            for p, x in zip(params, u):
                self.state[p]["momentum"].copy_(x)
            part = torch.zeros_like(part)
        for i, x, y, c in zip(index, u, w, shaped(decay_row - part)):
            updates[i] = torch.addcmul(x, y, c)

    def _stores_projection(self, group: dict) -> bool:
        return False

    # ------------------------------------------------------------ blocks: CPU, dense tensors

    def _blocked_view(self, group: dict, w: Tensor, g: Tensor) -> tuple[str | None, Tensor]:
        """The test for (R, n) matrices block by block, and |w| of every row."""
        norm = torch.linalg.vector_norm
        statistics = [((x * y).sum(1), norm(x, dim=1), norm(y, dim=1))
                      for x, y in zip(_blocks(w), _blocks(g))]
        dot, norm_w, norm_g = (torch.cat(x) for x in zip(*statistics))
        view = group["scale_invariant"]
        if view is None:
            view = _first_view(dot, norm_w, norm_g, w.shape[1], group["delta"], group["eps"])
        else:
            view = "channel" if view else None
        self._views.append(view)
        return view, norm_w


def _same_rows(*tensors: Tensor) -> list[Tensor] | None:
    """(shape[0], n) views of equally laid out dense tensors, in memory order, else None."""
    first = tensors[0]
    if not all(x.is_contiguous() for x in tensors):
        order = sorted(range(first.ndim), key=lambda d: (d > 0, -first.stride(d)))
        tensors = [x.permute(order) for x in tensors]
        if not all(x.is_contiguous() for x in tensors):
            return None
    return [x.view(first.shape[0], -1) for x in tensors] if first.ndim > 1 else list(tensors)


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, BLOCK // rows.shape[1]))


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
        foreach, fused: which path; None chooses, False never, True where it serves. fused serves
            float32 and float64 on the CPU without nesterov, else the step falls back to foreach.
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
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")

    def _new_state(self, p: Tensor, group: dict) -> dict:
        step = torch.zeros((), device=p.device) if group["capturable"] else 0
        dtype = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
        return {"step": step, "exp_avg": torch.zeros_like(p, dtype=dtype),
                "exp_avg_sq": torch.zeros_like(p, dtype=dtype)}

    def _readable_step(self, group: dict, params: list[Tensor]) -> None:
        lr, (beta1, beta2), eps = float(group["lr"]), group["betas"], group["eps"]
        for p in params:
            state = self.state[p]
            w, g = _wide(p.data), _wide(p.grad)
            if group["maximize"]:
                g = -g
            m, v = state["exp_avg"], state["exp_avg_sq"]
            state["step"] = step = int(state["step"]) + 1

            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = v.sqrt() / math.sqrt(1 - beta2 ** step) + eps
            u = (beta1 * m + (1 - beta1) * g if group["nesterov"] else m) / denominator

            u, decay_factor = self._project(group, w, g, u)
            if group["weight_decay"] > 0:
                w.mul_(1 - lr * group["weight_decay"] * decay_factor)
            w.add_(u, alpha=-lr / (1 - beta1 ** step))
            if w.dtype != p.dtype:
                p.copy_(w)

    def _directions(self, group: dict, bucket: list[Tensor], grads: list[Tensor]):
        """Updates u, their step size s = lr / (1 - beta1^t), and the weight decay in units of s."""
        states = [self.state[p] for p in bucket]
        m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        beta1, beta2 = group["betas"]
        if group["capturable"]:
            for p, state in zip(bucket, states):
                if not isinstance(state["step"], Tensor):
                    state["step"] = torch.full((), float(state["step"]), device=p.device)
            torch._foreach_add_([s["step"] for s in states], 1)
            step = torch.stack([s["step"] for s in states]).double()       # (T,)
            correction1, root2 = 1 - beta1 ** step, (1 - beta2 ** step).sqrt()
            lr, root2 = group["lr"], list(root2.unbind())
        else:
            step = int(states[0]["step"]) + 1        # one count for the whole bucket
            for state in states:
                state["step"] = step
            correction1, root2 = 1 - beta1 ** step, math.sqrt(1 - beta2 ** step)
            lr = float(group["lr"])

        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, grads, alpha=1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        u = torch._foreach_sqrt(v)
        torch._foreach_div_(u, root2)
        torch._foreach_add_(u, group["eps"])
        torch._foreach_reciprocal_(u)
        if group["nesterov"]:
            ahead = torch._foreach_mul(m, beta1)
            torch._foreach_add_(ahead, grads, alpha=1 - beta1)
            m = ahead
        torch._foreach_mul_(u, m)
        return list(u), lr / correction1, group["weight_decay"] * correction1

    def _blocks_serve(self, group: dict, p: Tensor) -> bool:
        return (not group["nesterov"] and hasattr(torch, "_fused_adamw_")
                and super()._blocks_serve(group, p))

    def _blocked_step(self, group: dict, params: list[Tensor]) -> None:
        """torch's fused AdamW makes w_f = (1 - k) w - s u. The step is linear in u, so the projection
        changes it by a multiple of the old weight: w_f + s <w, u> / (|w| + eps)^2 w, where
        s <w, u> = <w, w - w_f> - k |w|^2. Only a block of the old w is kept; all of it for a hit of
        the layer view.
        """
        lr, (beta1, beta2), eps = float(group["lr"]), group["betas"], group["eps"]
        vectors = defaultdict(list)

        def adamw(tensors, step, decay):
            w, g, m, v = zip(*tensors)
            torch._fused_adamw_(w, g, m, v, [], [torch.tensor(float(step))] * len(w), lr=lr,
                                beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
                                amsgrad=False, maximize=group["maximize"])

        for p in params:
            state = self.state[p]
            state["step"] = step = int(state["step"]) + 1
            rows = _same_rows(p.data, p.grad, state["exp_avg"], state["exp_avg_sq"])
            if p.ndim < 2:
                vectors[step].append(rows)
                continue
            view, norm_w = self._blocked_view(group, rows[0], rows[1])
            if view is None:
                adamw([rows], step, group["weight_decay"])
                continue
            decay = group["weight_decay"] * group["wd_ratio"]
            whole = rows[0].clone() if view == "layer" else None
            if view == "layer":
                adamw([rows], step, decay)
            blocks = list(zip(*map(_blocks, rows), _blocks(rows[0] if whole is None else whole)))
            old, along = torch.empty_like(blocks[0][0]), []
            done = 0
            for w, g, m, v, before in blocks:
                norm = norm_w[done:done + len(w)]
                done += len(w)
                if view == "channel":
                    before = old[:len(w)].copy_(w)
                    adamw([(w, g, m, v)], step, decay)
                part = ((before - w).mul_(before).sum(1) - lr * decay * norm ** 2)
                if view == "channel":
                    w.addcmul_(before, (part / (norm + eps) ** 2)[:, None])
                along.append(part)
            if view == "layer":
                coefficient = torch.cat(along).sum() / (norm_w.norm() + eps) ** 2
                rows[0].addcmul_(whole, coefficient)
        for step, tensors in vectors.items():
            adamw(tensors, step, group["weight_decay"])


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
        momentum = group["momentum"]
        if not momentum >= 0:
            raise ValueError(f"momentum must not be negative, got {momentum}")
        if momentum >= 1 and group["weight_decay"] > 0:
            raise ValueError("momentum must be below 1 with weight_decay, which is divided by "
                             f"1 - momentum; got {momentum}")
        if group["nesterov"] and (momentum <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening 0, got momentum "
                             f"{momentum}, dampening {group['dampening']}")

    def _new_state(self, p: Tensor, group: dict) -> dict:
        dtype = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
        return {"momentum": torch.zeros_like(p, dtype=dtype)}

    def _stores_projection(self, group: dict) -> bool:
        return group["project_buffer"] and not group["nesterov"]

    @staticmethod
    def _decay(group: dict) -> float:
        """The weight decay in units of lr."""
        return group["weight_decay"] / (1 - group["momentum"]) if group["weight_decay"] > 0 else 0.0

    def _readable_step(self, group: dict, params: list[Tensor]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        for p in params:
            w, g = _wide(p.data), _wide(p.grad)
            if group["maximize"]:
                g = -g
            m = self.state[p]["momentum"]
            m.mul_(momentum).add_(g, alpha=1 - group["dampening"])
            u = g + momentum * m if group["nesterov"] else m

            u, decay_factor = self._project(group, w, g, u)
            if self._stores_projection(group):
                m.copy_(u)
            if group["weight_decay"] > 0:
                w.mul_(1 - lr * self._decay(group) * decay_factor)
            w.add_(u, alpha=-lr)
            if w.dtype != p.dtype:
                p.copy_(w)

    def _directions(self, group: dict, bucket: list[Tensor], grads: list[Tensor]):
        m = [self.state[p]["momentum"] for p in bucket]
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_add_(m, grads, alpha=1 - group["dampening"])
        u = torch._foreach_add(grads, m, alpha=group["momentum"]) if group["nesterov"] else m
        return list(u), group["lr"], self._decay(group)

    def _blocks_serve(self, group: dict, p: Tensor) -> bool:
        return p.ndim > 1 and super()._blocks_serve(group, p)

    def _blocked_step(self, group: dict, params: list[Tensor]) -> None:
        lr, momentum, eps = float(group["lr"]), group["momentum"], group["eps"]

        def advance(g, m):
            m.mul_(momentum).add_(g, alpha=1 - group["dampening"])

        def direction(g, m):
            return torch.add(g, m, alpha=momentum) if group["nesterov"] else m

        def apply(w, u, coefficient):
            if coefficient is None:
                w.add_(torch.add(u, w, alpha=decay) if decay else u, alpha=-lr)
            elif self._stores_projection(group):
                u.addcmul_(w, -coefficient)
                w.add_(torch.add(u, w, alpha=decay) if decay else u, alpha=-lr)
            else:
                w.add_(torch.addcmul(u, w, decay - coefficient), alpha=-lr)

        for p in params:
            grad = -p.grad if group["maximize"] else p.grad
            rows = _same_rows(p.data, grad, self.state[p]["momentum"])
            view, norm_w = self._blocked_view(group, rows[0], rows[1])
            decay = self._decay(group) * (group["wd_ratio"] if view else 1)
            blocks = list(zip(*map(_blocks, rows), norm_w.split(len(_blocks(rows[0])[0]))))
            along = 0.0
            for w, g, m, norm in blocks:
                advance(g, m)
                if view == "layer":
                    along = along + (w * direction(g, m)).sum()
                elif view == "channel":
                    u = direction(g, m)
                    apply(w, u, ((w * u).sum(1) / (norm + eps) ** 2)[:, None])
                else:
                    apply(w, direction(g, m), None)
            if view == "layer":
                coefficient = along / (norm_w.norm() + eps) ** 2
                for w, g, m, _ in blocks:
                    apply(w, direction(g, m), coefficient)


# ---------------------------------------------------------------- training, watched

def train(model: nn.Module, loader: Iterable, optimizer: Optimizer, epochs: int = 1, *,
          loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
          schedule: Callable[[float], float] | None = None, measure_every: int = 10,
          autocast: torch.dtype | None = None, resume: dict | None = None) -> Iterator[dict[str, float]]:
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
    if schedule is None:
        def schedule(done: float) -> float:
            return 0.5 * (1 + math.cos(math.pi * done))
    parameters = list(model.parameters())
    watched = ([p for p in parameters if p.ndim > 2] or [p for p in parameters if p.ndim > 1])
    base_rates = [float(group["lr"]) for group in optimizer.param_groups]
    start_epoch = start_batch = 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        base_rates = resume["base_rates"]
        start_epoch, start_batch = resume["epoch"], resume["batch"]
    total = epochs * len(loader)
    for epoch in range(start_epoch, epochs):
        skip = start_batch if epoch == start_epoch else 0
        places = hasattr(loader, "set_epoch")            # such a loader begins at `skip` by itself
        if places:
            loader.set_epoch(epoch, skip)
        for batch, (x, target) in enumerate(loader, skip if places else 0):
            if batch < skip:
                continue
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
            values = {"step": step, "epoch": epoch, "loss": loss.item(),
                      "lr": base_rates[0] * factor}
            if measure and watched:
                count = len(watched)
                values["weight_norm"] = sum(p.norm().item() for p in watched) / count
                values["effective_step"] = sum(map(effective_step, before, watched)) / count
                if isinstance(optimizer, _ProjectedOptimizer):
                    stats = optimizer.stats
                    values["projected"] = stats["projected"] / max(stats["tested"], 1)
            if (yield values) == "state":
                yield {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                       "base_rates": base_rates, "epoch": epoch, "batch": batch + 1}


def _cosine_toy(make: Callable, steps: int = 1000) -> tuple[float, int]:
    """Minimise -cos(w, (1, 0)) from 150 degrees: final |w|, first step with 1 - cos < 1e-4."""
    angle = math.radians(150)
    w = nn.Parameter(torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64))
    optimizer, reached = make([w]), steps
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = -w[0, 0] / w.norm()
        loss.backward()
        optimizer.step()
        if reached == steps and 1 - w[0, 0].item() / w.norm().item() < 1e-4:
            reached = step
    return w.norm().item(), reached


if __name__ == "__main__":
    print("Minimise -cos(w, w*) for w in R^2, lr 0.1, 1000 steps:\n")
    print(f"{'optimiser':<24} {'final |w|':>9} {'steps to the optimum':>21}")
    for name, make in {
            "SGD": lambda p: torch.optim.SGD(p, 0.1),
            "SGD, momentum 0.9": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
            "SGDP, momentum 0.9": lambda p: SGDP(p, 0.1, momentum=0.9),
            "SGD, momentum 0.99": lambda p: torch.optim.SGD(p, 0.1, momentum=0.99),
            "SGDP, momentum 0.99": lambda p: SGDP(p, 0.1, momentum=0.99)}.items():
        norm, reached = _cosine_toy(make)
        print(f"{name:<24} {norm:>9.3f} {reached:>21}")
