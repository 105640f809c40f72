"""PiT: Rethinking Spatial Dimensions of Vision Transformers.

B. Heo, S. Yun, D. Han, S. Chun, J. Choe, S. J. Oh. ICCV 2021, arXiv:2103.16302.

A ViT keeps one token grid and one width through all its layers; a CNN shrinks the grid and widens
the channels with depth. PiT cuts a ViT into three stages and puts a pooling layer between them: a
strided depth-wise convolution on the spatial tokens, a linear layer on the class token. The side of
the grid halves, the width doubles (twice the heads, each as wide as before). The attention
matrices, quadratic in the number of tokens, shrink 16-fold per stage:

    stage s    N_s = g_s^2 + T tokens (T class tokens first),  width C_s = base_dims[s] * heads[s]
    block      x = x + Attention(LN(x));  x = x + MLP(LN(x))    12 N C^2 + 2 N^2 C MACs
    pooling    (g, g, C_s) -> (g/2, g/2, C_{s+1}), sides rounded up; token Linear(C_s, C_{s+1})

To copy: `PoolingTransformer` with the blocks above it is the whole model. The second half of the
file is the DeiT training recipe (RandAugment, mixing, erasing, schedule, distillation), then
robustness and attention probes.

    >>> model = pit_s(num_classes=10)
    >>> model(torch.rand(2, 3, 224, 224)).shape
    torch.Size([2, 10])
    >>> maps, tokens = model.forward_intermediates(torch.rand(2, 3, 224, 224))
    >>> [tuple(m.shape[1:]) for m in maps]
    [(144, 27, 27), (288, 14, 14), (576, 7, 7)]

It reproduces the public implementation (logits and gradients, official and timm keys) and the
paper's parameters and MACs: PiT-S 23.5 M and 2.9 G against DeiT-S 22.1 M and 4.6 G. timm measured
81.1 against 79.9 % ImageNet top-1 with the released weights.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from numbers import Integral, Real

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# Building blocks: a plain pre-norm transformer block (also that of ViT/DeiT)

class DropPath(nn.Module):
    """Stochastic depth: drops a whole residual branch for a sample, and rescales what is kept."""

    generator: torch.Generator | None = None                # None: torch's default generator

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        _check_rates(drop_prob=drop_prob)
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        draws = _draw(torch.rand, x.shape[:1] + (1,) * (x.ndim - 1), self.generator, x.device)
        return x * ((draws >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob))


class PatchConv(nn.Conv2d):
    """The convolution of the patch embedding.

    cuDNN is slow with three channels. Where the stride s divides the patch, the same sums are a
    convolution over the pixels of s x s blocks, 3 s^2 channels: 1.14 times faster PiT-S on an H200.
    """

    def forward(self, x: Tensor) -> Tensor:
        on_gpu = x.device.type == "cuda" and self.kernel_size[0] % self.stride[0] == 0
        return self.in_blocks(x) if on_gpu else super().forward(x)

    def in_blocks(self, x: Tensor) -> Tensor:
        (size, _), (s, _) = self.kernel_size, self.stride
        height, width = ((side - size) // s * s + size for side in x.shape[-2:])     # what it sees

        def blocks(x: Tensor) -> Tensor:        # F.pixel_unshuffle, but for empty batches too
            x = x.unflatten(2, (-1, s)).unflatten(4, (-1, s))
            return x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)

        return F.conv2d(blocks(x[..., :height, :width]), blocks(self.weight), self.bias)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v per head."""

    def __init__(self, dim: int, heads: int, attn_drop: float, drop: float, kind: str) -> None:
        super().__init__()
        self.heads, self.attn_drop, self.kind = heads, attn_drop, kind
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """`(B, N, C) -> (B, N, C)`, or `(B, queries, C)`: what the first `queries` tokens read."""
        if queries is None or not _plain(self.qkv, nn.Linear):
            q, k, v = self._split_heads(self.qkv(x), 3)
            q = q[:, :, :queries]
        else:
            dim = x.shape[-1]
            w_q, w_kv = self.qkv.weight.split([dim, 2 * dim])
            b_q, b_kv = self.qkv.bias.split([dim, 2 * dim])
            (q,) = self._split_heads(F.linear(x[:, :queries], w_q, b_q), 1)
            k, v = self._split_heads(F.linear(x, w_kv, b_kv), 2)
        drop = self.attn_drop if self.training else 0.0
        if self.kind == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        else:
            out = F.dropout(_softmax_attention(q, k), drop) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def weights(self, x: Tensor) -> Tensor:
        """The softmax attention `(B, heads, N, N)` itself, without dropout."""
        return _softmax_attention(*self._split_heads(self.qkv(x), 3)[:2])

    def _split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _softmax_attention(q: Tensor, k: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


def _plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nobody replaced the layer or watches it: then a short cut may stand for its call."""
    return type(layer) is kind and not (layer._forward_hooks or layer._forward_pre_hooks)


class MLP(nn.Sequential):
    """Two linear layers, each with dropout after it, and the exact GELU between them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if x.requires_grad or not (_plain(self.fc1, nn.Linear) and _plain(self.act, nn.GELU)):
            x = self.act(x)
        else:                           # in place, which is faster: nobody else holds x
            torch.ops.aten.gelu_(x, approximate=self.act.approximate)
        return self.drop2(self.fc2(self.drop1(x)))


class Block(nn.Module):
    """`x = x + Attention(LN(x)); x = x + MLP(LN(x))`, each branch under stochastic depth."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop: float, attn_drop: float,
                 drop_path: float, attention: str = "sdpa") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, attn_drop, drop, attention)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = MLP(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(),
                                   drop1=nn.Dropout(drop), fc2=nn.Linear(hidden, dim),
                                   drop2=nn.Dropout(drop)))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """With `queries`, only that many first tokens of the output are computed, exactly."""
        x = x[:, :queries] + self.drop_path1(self.attn(self.norm1(x), queries))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """The blocks of one stage on a token sequence `(B, N, C)`."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, queries: int | None = None, checkpointing: bool = False) -> Tensor:
        blocks = [partial(_checkpointed, b) if checkpointing else b for b in self.blocks]
        for block in blocks[:-1]:
            x = block(x)
        return blocks[-1](x, queries)


def _checkpointed(block: Block, x: Tensor, queries: int | None = None) -> Tensor:
    """Runs the block again in the backward pass, with the same stochastic-depth masks."""
    generator = getattr(block.drop_path1, "generator", None)
    if generator is None:                       # torch replays its default generator by itself
        return checkpoint(block, x, queries, use_reentrant=False)
    before = generator.get_state()

    @contextmanager
    def replay():
        now = generator.get_state()
        generator.set_state(before)
        try:
            yield
        finally:                                # torch may stop a recomputation early
            generator.set_state(now)

    return checkpoint(block, x, queries, use_reentrant=False,
                      context_fn=lambda: (nullcontext(), replay()))


# What PiT and ViT share: class tokens in, logits out; replacing heads; loading checkpoints

class _Classifier(nn.Module):
    """`num_tokens` class tokens and as many heads: two in a distilled model (DeiT's training)."""

    num_tokens = 1
    dynamic_image_size = False

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, stride: int,
                 in_chans: int, widths: Sequence[int], depth: Sequence[int], mlp_ratio: float,
                 **rates: float) -> None:
        super().__init__()
        _check_sizes(patch_size=patch_size, stride=stride, in_chans=in_chans)
        _check_rates(**rates)
        if not _is_number(mlp_ratio) or not 1 <= min(widths) * mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must leave hidden units, got {mlp_ratio!r}")
        self.image_size, self.in_chans = _pair("image_size", image_size), in_chans
        self.patch_size, self.stride = patch_size, stride
        self.widths, self.depth, self.mlp_ratio = widths, tuple(depth), mlp_ratio

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `(B, K)`. Distilled: (logits, logits_dist) in train mode, else their mean."""
        tokens = self._class_tokens(x)
        logits = self.head(tokens[:, 0])
        if self.num_tokens == 1:
            return logits
        logits_dist = self.head_dist(tokens[:, 1])
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return self.head if self.num_tokens == 1 else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for `num_classes` (0: features) on the same device, of the same dtype."""
        _check_sizes(0, num_classes=num_classes)
        self.num_classes = num_classes
        for name in ("head", "head_dist")[:self.num_tokens]:
            head = nn.Linear(self.widths[-1], num_classes) if num_classes else nn.Identity()
            setattr(self, name, head.to(self.cls_token).train(self.training))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Accepts official and timm keys, wrappers such as `{"model": ...}`, a `module.` prefix."""
        state_dict = convert_timm_state_dict(_unwrap(state_dict))
        found = state_dict.get("pos_embed")
        if found is not None and found.shape != self.pos_embed.shape:
            raise ValueError(f"the checkpoint's pos_embed is {tuple(found.shape)}, this model's "
                             f"{tuple(self.pos_embed.shape)}: another model, or another image size "
                             "(PiT: load with resize_pos_embed=True, or call set_image_size after)")
        return super().load_state_dict(state_dict, strict, assign)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Cells of the patch embedding; what remains of the image right and below is not seen."""
        if min(height, width) < self.patch_size:
            raise ValueError(f"image {height}x{width} is smaller than a patch of {self.patch_size}")
        return tuple((side - self.patch_size) // self.stride + 1 for side in (height, width))

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Grid (h, w) of every stage at `image_size`; pooling takes a side n to ceil(n/2)."""
        grids = [self._grid(*self.image_size)]
        for _ in self.depth[1:]:
            grids.append(tuple((side + 1) // 2 for side in grids[-1]))
        return grids

    def _check_images(self, x: Tensor) -> None:
        _check_float("images", x)
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images must be (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        if x.shape[-2:] != self.image_size and not self.dynamic_image_size:
            raise ValueError(f"images are {tuple(x.shape[-2:])}, the model wants "
                             f"{self.image_size}: build it with that image_size (PiT: or with "
                             "dynamic_image_size=True, or call set_image_size((H, W)))")


# PiT

class HeadPooling(nn.Module):
    """Halves the grid and widens the tokens; class tokens, off the grid, take a linear layer.

    `"conv"` (the paper's) is a 3x3 convolution of stride 2 with one group per input channel, so
    that channel i makes the outputs 2i and 2i+1. `"avg"`/`"max"` pool without parameters (in the
    average the zero padding counts) and repeat each channel.
    """

    def __init__(self, dim: int, out_dim: int, pool: str) -> None:
        super().__init__()
        self.pool, self.repeats = pool, out_dim // dim
        if pool == "conv":
            self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, groups=dim)
        self.fc = nn.Linear(dim, out_dim)

    def forward(self, spatial: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, h, w), (B, T, C) -> (B, C', ceil(h/2), ceil(w/2)), (B, T, C')`."""
        if self.pool == "conv":
            # Tokens lie channels last. There cuDNN takes the groups one by one, torch's own kernel
            # all at once; and on a CPU bf16 gradients of a map one cell wide are garbage.
            if spatial.device.type == "cuda" or spatial.shape[-1] == 1:
                spatial = spatial.contiguous()
            return self.conv(spatial), self.fc(tokens)
        pool = F.avg_pool2d if self.pool == "avg" else F.max_pool2d
        pooled = pool(spatial, 3, stride=2, padding=1)
        return pooled.repeat_interleave(self.repeats, dim=1), self.fc(tokens)


class PoolingTransformer(_Classifier):
    """The pooling-based vision transformer: `(B, in_chans, H, W) float -> (B, num_classes)` logits.

    Stage s has `depth[s]` blocks of `heads[s]` heads, each `base_dims[s]` wide. One stage
    (`depth=[12]`) is a ViT whose class token has no position. `pool` is "conv", "avg", "max" or
    (one stage) "none"; `init` is "official" (PyTorch's defaults for linear and convolution) or
    "deit"; `drop_path_rule` raises the rate linearly over the blocks, to just below
    `drop_path_rate` ("official") or to it ("timm"); `attention` is fused ("sdpa") or written out
    ("math"). `dynamic_image_size` accepts any image of at least one patch and resizes the position
    map on the fly. `grad_checkpointing` trades time for memory. ValueError for what does not fit.
    """

    def __init__(self, image_size: int | tuple[int, int] = 224, patch_size: int = 16,
                 stride: int = 8, base_dims: Sequence[int] = (48, 48, 48),
                 depth: Sequence[int] = (2, 6, 4), heads: Sequence[int] = (3, 6, 12),
                 mlp_ratio: float = 4.0, num_classes: int = 1000, in_chans: int = 3,
                 attn_drop_rate: float = 0.0, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
                 *, init: str = "official", drop_path_rule: str = "official",
                 attention: str = "sdpa", pool: str = "conv", grad_checkpointing: bool = False,
                 dynamic_image_size: bool = False) -> None:
        if {np.shape(per) for per in (base_dims, depth, heads)} != {(max(np.size(depth), 1),)}:
            raise ValueError("base_dims, depth and heads need one entry per stage, at least one: "
                             f"got {base_dims}, {depth}, {heads}")
        _check_sizes(base_dims=base_dims, depth=depth, heads=heads)
        _check_option("drop_path_rule", drop_path_rule, ("official", "timm"))
        _check_option("attention", attention, ("sdpa", "math"))
        _check_option("pool", pool, ("conv", "avg", "max", "none"))
        if pool == "none" and len(depth) > 1:
            raise ValueError(f"pool='none' is for one stage, got depth={tuple(depth)}")
        widths = [dim * n for dim, n in zip(base_dims, heads)]
        if any(following % width for width, following in itertools.pairwise(widths)):
            raise ValueError("the width base_dims * heads of a stage must be a multiple of the one "
                             f"before, got {widths}")
        super().__init__(image_size, patch_size, stride, in_chans, widths, depth, mlp_ratio,
                         attn_drop_rate=attn_drop_rate, drop_rate=drop_rate,
                         drop_path_rate=drop_path_rate)
        self.grad_checkpointing, self.dynamic_image_size = grad_checkpointing, dynamic_image_size

        self.pos_embed = nn.Parameter(torch.empty(1, widths[0], *self.grids[0]))
        self.cls_token = nn.Parameter(torch.empty(1, self.num_tokens, widths[0]))
        self.patch_embed = nn.Sequential(OrderedDict(
            conv=PatchConv(in_chans, widths[0], patch_size, stride)))
        self.pos_drop = nn.Dropout(drop_rate)
        step = drop_path_rate / max(sum(depth) - (drop_path_rule == "timm"), 1)
        i = itertools.count()                                   # blocks, through all the stages
        self.transformers = nn.ModuleList(
            Transformer(Block(width, n, mlp_ratio, drop_rate, attn_drop_rate, step * next(i),
                              attention) for _ in range(blocks))
            for width, n, blocks in zip(widths, heads, depth))
        self.pools = nn.ModuleList(HeadPooling(width, following, pool)
                                   for width, following in itertools.pairwise(widths))
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.reset_classifier(num_classes)
        init_weights(self, init)

    def forward_features(self, x: Tensor) -> Tensor:
        """The class tokens `(B, T, C_last)` after the final LayerNorm.

        Nothing reads the spatial tokens of the last block, so it computes queries, projection and
        MLP for the class tokens alone: the same numbers and gradients for 5-6 % fewer MACs.
        """
        *_, (tokens, _) = self._stages(x, class_only=True)
        return self.norm(tokens)

    _class_tokens = forward_features

    def forward_intermediates(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Per stage the map `(B, C_s, h, w)` and class tokens `(B, T, C_s)`, before any norm."""
        maps, tokens = zip(*(self._split(x, grid) for x, grid in self._stages(x)))
        return list(maps), list(tokens)

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        """Softmax weights `(B, heads, N, N)` of every block in eval mode, class tokens first."""
        maps: list[Tensor] = []
        with _eval_mode(self):
            for _ in self._stages(x, maps=maps):
                pass
        return maps

    def _stages(self, x: Tensor, class_only: bool = False,
                maps: list[Tensor] | None = None) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Yields tokens `(B, N_s, C_s)` and grid after each stage; `class_only` cuts the last.

        The attention of every block goes to the list `maps`, if given.
        """
        self._check_images(x)
        grid, pos_embed = self._grid(*x.shape[-2:]), self.pos_embed
        if grid != pos_embed.shape[-2:]:
            pos_embed = _resize_map(pos_embed, grid)
        spatial = self.pos_drop(self.patch_embed(x) + pos_embed)
        tokens = self.cls_token.expand(x.shape[0], -1, -1)   # class tokens have no position
        checkpointing = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        for s, stage in enumerate(self.transformers):
            if s:
                spatial, tokens = self.pools[s - 1](*self._split(x, grid))
                grid = spatial.shape[-2:]
            last = s == len(self.transformers) - 1
            x = torch.cat([tokens, spatial.flatten(2).transpose(1, 2)], dim=1)
            if maps is None:
                x = stage(x, self.num_tokens if class_only and last else None, checkpointing)
            else:
                for block in stage.blocks:
                    maps.append(block.attn.weights(block.norm1(x)))
                    x = block(x)
            yield x, grid

    def _split(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The map `(B, C, h, w)`, a view that is channels last in memory, and the class tokens."""
        return x[:, self.num_tokens:].transpose(1, 2).unflatten(2, grid), x[:, :self.num_tokens]

    def set_image_size(self, size: int | tuple[int, int]) -> None:
        """Adapts the model to images of `size`: the position map is resized bicubically.

        An optimiser keeps moments of the old shape once it has stepped: make a new one.
        """
        size = _pair("size", size)
        resized = _resize_map(self.pos_embed.data, self._grid(*size))
        # A graph still alive keeps the shape of gradients, unless the dtype changes in between.
        self.pos_embed.data = resized.new_empty(0, dtype=torch.complex64)
        self.pos_embed.data = resized
        self.pos_embed.grad, self.image_size = None, size


class DistilledPoolingTransformer(PoolingTransformer):
    """With distillation token and head: (logits, logits_dist) in training, else their mean."""

    num_tokens = 2


# The baseline: ViT as DeiT trains it

class VisionTransformer(_Classifier):
    """ViT/DeiT with timm's `deit_*` keys: one grid, one width, positions on class tokens too."""

    def __init__(self, image_size: int | tuple[int, int] = 224, patch_size: int = 16,
                 embed_dim: int = 192, depth: int = 12, heads: int = 3, mlp_ratio: float = 4.0,
                 num_classes: int = 1000, in_chans: int = 3, attn_drop_rate: float = 0.0,
                 drop_rate: float = 0.0, drop_path_rate: float = 0.0, *,
                 distilled: bool = False) -> None:
        _check_sizes(embed_dim=embed_dim, depth=depth, heads=heads)
        if embed_dim % heads:
            raise ValueError(f"embed_dim must be a multiple of heads, got {embed_dim} and {heads}")
        super().__init__(image_size, patch_size, patch_size, in_chans, [embed_dim], [depth],
                         mlp_ratio, attn_drop_rate=attn_drop_rate, drop_rate=drop_rate,
                         drop_path_rate=drop_path_rate)
        self.num_tokens = 2 if distilled else 1

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        length = math.prod(self.grids[0]) + self.num_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, length, embed_dim))
        self.patch_embed = nn.Sequential(OrderedDict(
            proj=PatchConv(in_chans, embed_dim, patch_size, patch_size)))
        self.pos_drop = nn.Dropout(drop_rate)
        step = drop_path_rate / max(depth - 1, 1)
        self.blocks = nn.ModuleList(
            Block(embed_dim, heads, mlp_ratio, drop_rate, attn_drop_rate, step * i)
            for i in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.reset_classifier(num_classes)
        init_weights(self, "deit")

    def forward_features(self, x: Tensor, queries: int | None = None) -> Tensor:
        """The normalised sequence `(B, T + N, C)`, class tokens first; or its first `queries`."""
        self._check_images(x)
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = [self.cls_token, self.dist_token] if self.num_tokens == 2 else [self.cls_token]
        x = torch.cat([token.expand(x.shape[0], -1, -1) for token in tokens] + [patches], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        *first, last = self.blocks
        for block in first:
            x = block(x)
        return self.norm(last(x, queries))

    def _class_tokens(self, x: Tensor) -> Tensor:
        return self.forward_features(x, queries=self.num_tokens)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token"}


@torch.no_grad()
def init_weights(model: nn.Module, init: str = "official",
                 generator: torch.Generator | None = None) -> None:
    """Draws all parameters afresh, from `generator` if given: the way to a reproducible model.

    "official": PyTorch's own uniform +-1/sqrt(fan_in) for linear layers and convolutions; "deit":
    linear weights from a normal of std 0.02, zero biases. Both: position map and class tokens from
    that normal, LayerNorm at (1, 0).
    """
    _check_option("init", init, ("official", "deit"))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
            module.bias.zero_()
        elif isinstance(module, nn.Linear) and init == "deit":
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            module.bias.zero_()
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = module.weight[0].numel() ** -0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            module.bias.uniform_(-bound, bound, generator=generator)
    for name in ("pos_embed", "cls_token", "dist_token"):
        if hasattr(model, name):
            nn.init.trunc_normal_(getattr(model, name), std=0.02, generator=generator)


# The published models and their checkpoints

def _factory(cls: type[nn.Module], name: str, **config) -> Callable[..., nn.Module]:
    def build(pretrained: str | None = None, *, resize_pos_embed: bool = False,
              **kwargs) -> nn.Module:
        if not isinstance(pretrained, (str, os.PathLike, type(None))):
            raise TypeError(f"pretrained must be the path of a checkpoint, got {pretrained!r}")
        model = cls(**{**config, **kwargs})
        if pretrained is not None:
            state_dict = load_pit_checkpoint(pretrained)
            found, grid = state_dict.get("pos_embed"), tuple(model.pos_embed.shape[2:])
            if resize_pos_embed and getattr(found, "ndim", 0) == 4 and found.shape[2:] != grid:
                warnings.warn(f"{pretrained}: position map resized from {tuple(found.shape[2:])} "
                              f"to {grid}")
                state_dict["pos_embed"] = _resize_map(found, grid)
            model.load_state_dict(state_dict)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}; `pretrained`: path of a checkpoint; keywords go to {cls.__name__}."
    return build


_TI = {"base_dims": (32, 32, 32), "heads": (2, 4, 8)}
_XS = {"base_dims": (48, 48, 48), "heads": (2, 4, 8)}
_S = {"base_dims": (48, 48, 48), "heads": (3, 6, 12)}
_B = {"base_dims": (64, 64, 64), "heads": (4, 8, 16), "depth": (3, 6, 4),
      "patch_size": 14, "stride": 7}
pit_ti = pit_ti_224 = _factory(PoolingTransformer, "pit_ti", **_TI)
pit_xs = pit_xs_224 = _factory(PoolingTransformer, "pit_xs", **_XS)
pit_s = pit_s_224 = _factory(PoolingTransformer, "pit_s", **_S)
pit_b = pit_b_224 = _factory(PoolingTransformer, "pit_b", **_B)
_D = DistilledPoolingTransformer
pit_ti_distilled = pit_ti_distilled_224 = _factory(_D, "pit_ti_distilled", **_TI)
pit_xs_distilled = pit_xs_distilled_224 = _factory(_D, "pit_xs_distilled", **_XS)
pit_s_distilled = pit_s_distilled_224 = _factory(_D, "pit_s_distilled", **_S)
pit_b_distilled = pit_b_distilled_224 = _factory(_D, "pit_b_distilled", **_B)


def _deit(size: str, embed_dim: int, heads: int, distilled: bool = False) -> Callable:
    name = f"deit_{size}_{'distilled_' if distilled else ''}patch16_224"
    return _factory(VisionTransformer, name, embed_dim=embed_dim, heads=heads, distilled=distilled)


deit_tiny_patch16_224 = _deit("tiny", 192, 3)
deit_small_patch16_224 = _deit("small", 384, 6)
deit_base_patch16_224 = _deit("base", 768, 12)
deit_tiny_distilled_patch16_224 = _deit("tiny", 192, 3, distilled=True)
deit_small_distilled_patch16_224 = _deit("small", 384, 6, distilled=True)
deit_base_distilled_patch16_224 = _deit("base", 768, 12, distilled=True)


def convert_timm_state_dict(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm keeps pooling in the stage after it: `transformers.{s+1}.pool.X` is `pools.{s}.X`."""
    return {re.sub(r"^transformers\.(\d+)\.pool\.", lambda m: f"pools.{int(m[1]) - 1}.", key): value
            for key, value in sd.items()}


def load_pit_checkpoint(path: str) -> dict[str, Tensor]:
    """A checkpoint file as a plain state_dict with official keys, no wrappers and prefixes."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:                                # how torch reports a torn file varies
        raise ValueError(f"{path} is not a torch.save file of tensors alone") from error
    state_dict = convert_timm_state_dict(_unwrap(content, path))
    if not any(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds no weights, only {', '.join(state_dict) or 'nothing'}")
    return state_dict


def _unwrap(sd: dict, source: str = "the checkpoint") -> dict:
    if not isinstance(sd, dict):
        raise ValueError(f"{source} holds a {type(sd).__name__}, expected a state_dict")
    for wrapper in ("model", "state_dict", "model_ema"):
        if isinstance(sd.get(wrapper), dict):
            sd = sd[wrapper]
            break
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in sd.items()}


def count_macs(model: PoolingTransformer | VisionTransformer) -> dict[str, int | list[int]]:
    """Multiply-accumulates for one image of `model.image_size`; the paper calls them FLOPs.

    Counts both matrix products of attention, and the last block in full. Parameter-free pooling
    counts as the convolution in its place (under 1 % either way).
    """
    T, widths = model.num_tokens, model.widths
    cells = [math.prod(grid) for grid in model.grids]
    stages = []
    for width, blocks, n in zip(widths, model.depth, (cell + T for cell in cells)):
        linear = 4 * width * width + 2 * width * int(width * model.mlp_ratio)
        stages.append(blocks * (n * linear + 2 * n * n * width))
    pools = [9 * n * b + T * a * b for a, b, n in zip(widths, widths[1:], cells[1:])]
    embed = cells[0] * widths[0] * model.in_chans * model.patch_size**2
    head = T * widths[-1] * model.num_classes
    return {"total": embed + sum(stages) + sum(pools) + head, "embed": embed, "stages": stages,
            "pools": pools, "head": head}


# The DeiT training recipe: schedule and weight decay, augmentation of images, mixing of batches

def cosine_lr(epoch: int, lr: float, epochs: int = 300, warmup_epochs: int = 5,
              min_lr: float = 1e-5, warmup_lr: float = 1e-6, *, lag: bool = False) -> float:
    """Learning rate of an epoch: linear warm-up, then a cosine that the warm-up does not shift.

    With `lag`, that of the epoch before, as DeiT's loop has it (epochs 0 and 1 at `warmup_lr`).
    """
    _check_sizes(epochs=epochs)
    _check_range(0, math.inf, epoch=epoch, lr=lr, warmup_epochs=warmup_epochs, min_lr=min_lr,
                 warmup_lr=warmup_lr)
    t = max(epoch - 1, 0) if lag else epoch
    if t < warmup_epochs:
        return warmup_lr + t * (lr - warmup_lr) / warmup_epochs
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(t / epochs, 1)))


def param_groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict]:
    """Two optimiser groups; biases, norms, position maps and class tokens do not decay."""
    _check_range(0, math.inf, weight_decay=weight_decay)
    model = _bare(model)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups: tuple[list, list] = ([], [])
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim > 1 and name not in exempt].append(p)
    return [{"params": p, "weight_decay": decay} for p, decay in zip(groups, (0.0, weight_decay))]


RANDAUGMENT_OPS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing",
    "SolarizeAdd", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing",
    "SharpnessIncreasing", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_ENHANCEMENTS = RANDAUGMENT_OPS[7:11]
_BICUBIC = {"resample": Image.Resampling.BICUBIC, "fillcolor": (124, 116, 104)}  # ImageNet's mean


def randaugment_argument(name: str, level: float, negative: bool = False) -> float | int | None:
    """What `level` in [0, 10] means for an operation: degrees, bits, a threshold, a factor, ..."""
    _check_option("name", name, RANDAUGMENT_OPS)
    _check_range(0, 10, level=level)
    share = level / 10
    signed = -share if negative else share
    return {"Rotate": signed * 30, "PosterizeIncreasing": 4 - int(share * 4),
            "SolarizeIncreasing": 256 - min(256, int(share * 256)),
            "SolarizeAdd": min(128, int(share * 110)), "ShearX": signed * 0.3,
            "ShearY": signed * 0.3, "TranslateXRel": signed * 0.45, "TranslateYRel": signed * 0.45,
            **dict.fromkeys(_ENHANCEMENTS, max(0.1, 1 + signed * 0.9))}.get(name)


def apply_randaugment_op(image: Image.Image, name: str, level: float,
                         negative: bool = False) -> Image.Image:
    """One RandAugment operation on an RGB image; geometry is bicubic, filled with the mean."""
    arg, image = randaugment_argument(name, level, negative), _check_image(image, "RGB")
    if name in ("AutoContrast", "Equalize", "Invert"):
        return getattr(ImageOps, name.lower())(image)
    if name in _ENHANCEMENTS:
        return getattr(ImageEnhance, name.removesuffix("Increasing"))(image).enhance(arg)
    if name == "Rotate":
        return image.rotate(arg, **_BICUBIC)
    if name == "PosterizeIncreasing":
        return image.point([v & -(1 << 8 - arg) for v in range(256)] * 3)
    if name == "SolarizeIncreasing":
        return ImageOps.solarize(image, arg)
    if name == "SolarizeAdd":                                    # brightens the dark half
        return image.point([min(255, v + arg) if v < 128 else v for v in range(256)] * 3)
    affine = {"ShearX": (1, arg, 0, 0, 1, 0), "ShearY": (1, 0, 0, arg, 1, 0),
              "TranslateXRel": (1, 0, arg * image.width, 0, 1, 0),
              "TranslateYRel": (1, 0, 0, 0, 1, arg * image.height)}[name]
    return image.transform(image.size, Image.Transform.AFFINE, affine, **_BICUBIC)


class RandAugment:
    """`num_ops` of the 15 operations, drawn with replacement, each applied with probability `prob`.

    Cubuk et al., arXiv:1909.13719; the defaults are timm's `rand-m9-mstd0.5-inc1`. DataLoader's
    workers would each copy a `generator` and draw the same; None is a default generator of each's.
    """

    def __init__(self, num_ops: int = 2, magnitude: float = 9, magnitude_std: float = 0.5,
                 prob: float = 0.5, generator: torch.Generator | None = None) -> None:
        _check_sizes(0, num_ops=num_ops)
        _check_range(0, math.inf, magnitude_std=magnitude_std)
        _check_range(0, 10, magnitude=magnitude)
        _check_range(0, 1, prob=prob)
        self.num_ops, self.magnitude, self.magnitude_std = num_ops, magnitude, magnitude_std
        self.prob, self.generator = prob, generator

    def __call__(self, image: Image.Image) -> Image.Image:
        _check_image(image, "RGB")
        uniform = torch.rand(self.num_ops, 3, generator=self.generator).tolist()
        normal = torch.randn(self.num_ops, generator=self.generator).tolist()
        for (which, apply, sign), z in zip(uniform, normal):
            level = min(max(self.magnitude + self.magnitude_std * z, 0.0), 10.0)
            if apply < self.prob:
                op = RANDAUGMENT_OPS[int(which * len(RANDAUGMENT_OPS))]
                image = apply_randaugment_op(image, op, level, sign < 0.5)
        return image


def train_transform(image: Image.Image, size: int = 224,
                    augment: Callable[[Image.Image], Image.Image] | None = None,
                    generator: torch.Generator | None = None) -> Tensor:
    """Random resized crop (area 0.08-1, ratio 3/4-4/3, bicubic), flip, `augment`, normalise."""
    _check_sizes(size=size)
    image, (width, height) = _check_image(image).convert("RGB"), image.size
    for area, ratio, x, y in torch.rand(10, 4, generator=generator).tolist():
        area = width * height * (0.08 + 0.92 * area)
        ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            break
    else:                                   # an elongated image: its centre at an allowed ratio
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    if torch.rand((), generator=generator) < 0.5:
        image = ImageOps.mirror(image)
    return _to_tensor(augment(image) if augment else image)


def eval_transform(image: Image.Image, size: int = 224, crop: float = 0.9) -> Tensor:
    """Short side to int(size / crop) (bicubic), centre crop, normalise. DeiT uses crop 0.875."""
    _check_sizes(size=size)
    if not 0 < crop <= 1:
        raise ValueError(f"crop must be in (0, 1], got {crop}")
    image, short = _check_image(image).convert("RGB"), int(size / crop)
    scale = [int(short * side / min(image.size)) for side in image.size]
    image = image.resize(scale, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return _to_tensor(image.crop((left, top, left + size, top + size)))


def _to_tensor(image: Image.Image) -> Tensor:
    return _normalized(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)


class RandomErasing:
    """Fills a random rectangle of a normalised image with normal noise (Zhong et al., 1708.04896).

    `(C, H, W)` or `(B, C, H, W)`; each image for itself, with probability `probability`. A
    rectangle takes `min_area` to `max_area` of the image (shared by `count` rectangles); the
    first of 10 draws that fits is taken.
    """

    def __init__(self, probability: float = 0.25, min_area: float = 0.02, max_area: float = 1 / 3,
                 min_aspect: float = 0.3, count: int = 1,
                 generator: torch.Generator | None = None) -> None:
        _check_range(0, 1, probability=probability, max_area=max_area)
        _check_range(0, max_area, min_area=min_area)
        if not 0 < min_aspect <= 1:
            raise ValueError(f"min_aspect must be in (0, 1], got {min_aspect}")
        _check_sizes(count=count)
        self.probability, self.min_area, self.max_area = probability, min_area, max_area
        self.min_aspect, self.count, self.generator = min_aspect, count, generator

    def __call__(self, x: Tensor) -> Tensor:
        _check_float("x", x)
        if x.ndim not in (3, 4):
            raise ValueError(f"x must be (C, H, W) or (B, C, H, W), got {tuple(x.shape)}")
        out = x.clone() if x.ndim == 4 else x[None].clone()
        (batch, _, height, width), device = out.shape, x.device
        erased = _draw(torch.rand, (batch, 1), self.generator, device) < self.probability
        rows = torch.arange(height, device=device)[:, None]
        columns = torch.arange(width, device=device)
        for _ in range(self.count):
            area, aspect, top, left = _draw(torch.rand, (4, batch, 10), self.generator, device)
            area = (self.min_area + (self.max_area - self.min_area) * area) * height * width
            area, aspect = area / self.count, self.min_aspect ** (1 - 2 * aspect)
            h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
            fits = (h < height) & (w < width) & erased
            top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
            first = fits.float().argmax(1, keepdim=True)
            fits, y, x0, h, w = (v.gather(1, first)[..., None] for v in (fits, top, left, h, w))
            inside = (rows >= y) & (rows < y + h) & (columns >= x0) & (columns < x0 + w) & fits
            noise = _draw(torch.randn, out.shape, self.generator, device).to(out.dtype)
            out = torch.where(inside[:, None], noise, out)
        return out if x.ndim == 4 else out[0]


class RepeatedAugSampler:
    """Each image `num_repeats` times in a row, dealt out over the replicas (arXiv:1901.09335).

    The replicas see differently augmented copies in the same step. An epoch keeps its usual length,
    so that it sees a third of the images.
    """

    def __init__(self, data_source, num_replicas: int = 1, rank: int = 0, shuffle: bool = True,
                 num_repeats: int = 3) -> None:
        self.count = data_source if isinstance(data_source, Integral) else len(data_source)
        _check_sizes(0, data_source=self.count)
        _check_sizes(num_replicas=num_replicas, num_repeats=num_repeats)
        _check_range(0, num_replicas - 1, rank=rank)
        self.num_replicas, self.rank, self.shuffle = num_replicas, rank, shuffle
        self.num_repeats, self.epoch = num_repeats, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = (torch.randperm(self.count, generator=generator) if self.shuffle
                 else torch.arange(self.count)).repeat_interleave(self.num_repeats)
        order = torch.cat([order, order[:-len(order) % self.num_replicas]])
        return iter(order[self.rank::self.num_replicas][:len(self)].tolist())

    def __len__(self) -> int:
        whole = self.count // 256 * 256 or self.count            # DeiT rounds down to 256
        return whole // self.num_replicas


def smooth_one_hot(y: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """`(B,) int64 -> (B, K)` targets: smoothing / K everywhere, 1 - smoothing more at the label."""
    _check_range(0, 1, smoothing=smoothing)
    if y.ndim != 1 or y.dtype != torch.int64:
        raise ValueError(f"y must be (B,) int64, got {tuple(y.shape)} of {y.dtype}")
    if ((y < 0) | (y >= num_classes)).any():
        raise ValueError(f"y must be in 0..{num_classes - 1}, got {y.min()}..{y.max()}")
    return F.one_hot(y, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mixup_batch(x: Tensor, lam: float) -> Tensor:
    """Mixup (arXiv:1710.09412) of a batch with its own reverse."""
    _check_range(0, 1, lam=lam)
    return lam * x + (1 - lam) * x.flip(0)


def cutmix_batch(x: Tensor, lam: float, center: tuple[int, int] | None = None,
                 generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """CutMix (arXiv:1905.04899) with the reversed batch: a box of area 1 - lam changes owner.

    `center` (y, x), drawn if None; clipping at the border makes the box smaller, and the second
    result is the share of the image that was kept.
    """
    _check_range(0, 1, lam=lam)
    sides = x.shape[-2:]
    if center is None:
        uniform = _draw(torch.rand, (2,), generator).tolist()
        center = [int(u * side) for u, side in zip(uniform, sides)]
    if len(center) != 2:
        raise ValueError(f"center must be (y, x), got {center}")
    boxes = []
    for at, side in zip(center, sides):
        _check_range(0, side - 1, center=at)
        cut = int(side * math.sqrt(1 - lam))
        boxes.append((max(int(at) - cut // 2, 0), min(int(at) + (cut + 1) // 2, side)))
    (y0, y1), (x0, x1) = boxes
    mixed = x.clone()
    mixed[..., y0:y1, x0:x1] = x.flip(0)[..., y0:y1, x0:x1]
    return mixed, 1 - (y1 - y0) * (x1 - x0) / math.prod(sides)


class Mixup:
    """Mixup or CutMix of a whole batch with smoothed targets: `(x, y) -> (x', target (B, K))`.

    lam ~ Beta(alpha, alpha); CutMix with probability `switch_prob` (an alpha of 0 disables one).
    """

    def __init__(self, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0, prob: float = 1.0,
                 switch_prob: float = 0.5, label_smoothing: float = 0.1, num_classes: int = 1000,
                 generator: torch.Generator | None = None) -> None:
        _check_range(0, math.inf, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
        _check_range(0, 1, prob=prob, switch_prob=switch_prob)
        _check_rates(label_smoothing=label_smoothing)
        _check_sizes(num_classes=num_classes)
        if mixup_alpha == cutmix_alpha == 0:
            raise ValueError("one of mixup_alpha and cutmix_alpha must be positive, not both 0")
        self.mixup_alpha, self.cutmix_alpha, self.prob = mixup_alpha, cutmix_alpha, prob
        self.switch_prob = 0.0 if cutmix_alpha == 0 else 1.0 if mixup_alpha == 0 else switch_prob
        self.label_smoothing, self.num_classes = label_smoothing, num_classes
        self.generator = generator

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) % 2:
            raise ValueError(f"mixing needs an even batch, got {len(x)} images: drop_last=True")
        if len(x) != len(y):
            raise ValueError(f"x and y must be of one length, got {len(x)} and {len(y)}")
        target = smooth_one_hot(y, self.num_classes, self.label_smoothing)
        mix, switch, seed = _draw(torch.rand, (3,), self.generator).tolist()
        if mix >= self.prob:
            return x, target
        cutmix = switch < self.switch_prob
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        # numpy's, as torch's Beta takes no generator
        lam = float(np.random.default_rng(int(seed * 2**24)).beta(alpha, alpha))
        if cutmix:
            x, lam = cutmix_batch(x, lam, generator=self.generator)
        else:
            x = mixup_batch(x, lam)
        return x, lam * target + (1 - lam) * target.flip(0)


# Losses, training and evaluation

class LabelSmoothingCrossEntropy(nn.Module):
    """(1 - smoothing) * cross entropy + smoothing * mean_k(-log softmax(logits)), batch mean."""

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        _check_rates(smoothing=smoothing)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not isinstance(logits, Tensor):
            raise TypeError("the loss takes one tensor of logits, got a tuple: a distilled model "
                            "in train mode needs a teacher (DistillationLoss)")
        if labels.is_floating_point() and labels.shape != logits.shape:
            raise ValueError(f"target must be {tuple(logits.shape)} as the logits, "
                             f"got {tuple(labels.shape)}")
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)


class SoftTargetCrossEntropy(LabelSmoothingCrossEntropy):
    """mean_b sum_k -target log softmax(logits), for targets `(B, K)` that are probabilities."""

    def __init__(self) -> None:
        super().__init__(0.0)


class DistillationLoss(nn.Module):
    """(1 - alpha) * base(logits, targets) + alpha * distillation(logits_dist, teacher(inputs)).

    DeiT, arXiv:2012.12877: "hard" is the cross entropy with the teacher's decision; "soft" is
    tau^2 KL(teacher || student) at temperature tau, summed and divided by B * K.
    """

    def __init__(self, base_criterion: Callable, teacher: Callable, kind: str = "hard",
                 alpha: float = 0.5, tau: float = 1.0) -> None:
        super().__init__()
        _check_option("kind", kind, ("none", "soft", "hard"))
        _check_range(0, 1, alpha=alpha)
        if not tau > 0 or teacher is None and kind != "none":
            raise ValueError(f"{kind} distillation needs a teacher and tau > 0, got {tau=}, "
                             f"{teacher=}")
        self.base_criterion, self.teacher = base_criterion, teacher
        self.kind, self.alpha, self.tau = kind, alpha, tau

    def forward(self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor],
                targets: Tensor) -> Tensor:
        logits, logits_dist = (outputs, None) if isinstance(outputs, Tensor) else outputs
        base = self.base_criterion(logits, targets)
        if self.kind == "none":
            return base
        if logits_dist is None:
            raise ValueError("distillation needs (logits, logits_dist), got one tensor: use a "
                             "distilled model in train mode")
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval()
        with torch.no_grad():
            wanted = self.teacher(inputs)
        if self.kind == "hard":
            loss = F.cross_entropy(logits_dist, wanted.argmax(1))
        else:
            log_p, log_q = ((z / self.tau).log_softmax(1) for z in (logits_dist, wanted))
            loss = self.tau**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).mean()
        return (1 - self.alpha) * base + self.alpha * loss


class ModelEma:
    """`module` follows a model: w <- decay * w + (1 - decay) * new. Short runs want 0.99."""

    def __init__(self, model: nn.Module, decay: float = 0.99996) -> None:
        _check_range(0, 1, decay=decay)
        self.module = copy.deepcopy(_bare(model)).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        model = _bare(model)
        mine, new = list(self.module.parameters()), list(model.parameters())
        torch._foreach_mul_(mine, self.decay)
        torch._foreach_add_(mine, [p.to(q) for p, q in zip(new, mine)], alpha=1 - self.decay)
        for buffer, value in zip(self.module.buffers(), model.buffers()):
            buffer.copy_(value)


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


def train(model: nn.Module, loader: Iterable, *, epochs: int = 300, lr: float | None = None,
          weight_decay: float = 0.05, warmup_epochs: int = 5, min_lr: float = 1e-5,
          warmup_lr: float = 1e-6, criterion: Callable | None = None, mixup: Mixup | None = None,
          teacher: Callable | None = None, distillation: str = "hard", alpha: float = 0.5,
          tau: float = 1.0, ema: ModelEma | None = None, lag: bool = False,
          amp_dtype: torch.dtype | None = None, device: torch.device | str | None = None,
          generator: torch.Generator | None = None, resume: dict | None = None) -> Iterator[dict]:
    """DeiT's training loop: AdamW, learning rate by epoch, mixing, distillation, EMA.

    `loader` is re-iterable and yields (images, labels); one with `set_epoch(epoch, start_batch)`
    is told where to begin, and a `loader.sampler` with `set_epoch(epoch)`, as RepeatedAugSampler,
    its epoch. `lr` None: 5e-4 * batch / 512 over all processes. `generator` draws the
    stochastic-depth masks. Yields {step, epoch, loss, lr, grad_norm, images_per_s} after every
    step; `send("state")` yields a snapshot, a copy of all that moves, and `resume=snapshot` goes on
    to the same numbers: what a DataLoader shuffles with, its generator or torch's default one, is
    set back. (With dropout they differ where it draws from another.) FloatingPointError for a loss
    of NaN.
    """
    _check_sizes(epochs=epochs)
    bare = _bare(model)
    device = next(model.parameters()).device if device is None else torch.device(device)
    model.to(device)
    if criterion is None:
        criterion = SoftTargetCrossEntropy()                    # of labels: plain cross entropy
    if teacher is not None:
        distill = DistillationLoss(criterion, teacher, distillation, alpha, tau).to(device)
    for module in bare.modules():
        if isinstance(module, DropPath):
            module.generator = generator
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay), lr=lr or 1e-3,
                                  fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    moving = {"model": bare, "optimizer": optimizer, "scaler": scaler}
    if ema is not None:
        moving["ema"] = ema.module
    generators = {"drop_path": generator, "mixup": mixup.generator if mixup else None}
    generators = {name: g for name, g in generators.items() if g is not None}
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    step = first_epoch = skip = 0
    if resume is not None:
        for name, part in moving.items():       # the optimiser would go on in the snapshot itself
            part.load_state_dict(copy.deepcopy(resume[name]) if part is optimizer else resume[name])
        for name, g in generators.items():
            g.set_state(resume["generators"][name])
        step, first_epoch, skip, lr = (resume[k] for k in ("step", "epoch", "batch", "lr"))

    for epoch in range(first_epoch, epochs):
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        states = resume["order"] if skip else None
        batches, order, epoch_order = _epoch(loader, epoch, skip, states)
        batch, skip, began = skip - 1, 0, time.perf_counter()   # batch: the last one done
        for batch, (images, labels) in batches:
            lr = 5e-4 * len(images) * world / 512 if lr is None else lr
            now = cosine_lr(epoch, lr, epochs, warmup_epochs, min_lr, warmup_lr, lag=lag)
            for group in optimizer.param_groups:
                group["lr"] = now
            images, targets = (t.to(device, non_blocking=True) for t in (images, labels))
            if mixup is not None:
                images, targets = mixup(images, targets)
            model.train()                                       # the caller may evaluate in between
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                out = model(images)
                loss = criterion(out, targets) if teacher is None else distill(images, out, targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            gradients = [p.grad for p in bare.parameters() if p.grad is not None]
            grad_norm = torch.stack(torch._foreach_norm(gradients)).norm()
            scaler.step(optimizer)
            scaler.update()
            if ema is not None:
                ema.update(model)
            value, step, previous, began = loss.item(), step + 1, began, time.perf_counter()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}: lower lr={lr:g}")
            request = yield {"step": step, "epoch": epoch, "loss": value, "lr": now,
                             "grad_norm": grad_norm.item(),
                             "images_per_s": len(images) / (began - previous)}
            while request == "state":
                request = yield copy.deepcopy({
                    **{name: part.state_dict() for name, part in moving.items()},
                    "generators": {name: g.get_state() for name, g in generators.items()},
                    "order": [epoch_order, order.get_state()],
                    "step": step, "epoch": epoch, "batch": batch + 1, "lr": lr})
        if batch < 0:
            raise ValueError(f"the loader gave no batch in epoch {epoch}: it must not be empty, "
                             "nor an iterator that ends with the first epoch")


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, transform_logits: Callable | None = None,
             device: torch.device | str | None = None) -> dict[str, float]:
    """Top-1 and top-5 in percent, mean cross entropy and count, in eval mode.

    `transform_logits` maps `(B, K)` to the logits that the labels mean (a subset of classes, say).
    """
    device = device or next((p.device for p in model.parameters()), "cpu")
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    with _eval_mode(model.to(device)):
        for images, labels in loader:
            logits, labels = model(images.to(device, non_blocking=True)), labels.to(device)
            logits = (transform_logits(logits) if transform_logits else logits).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss]).cpu().double()
            count += len(labels)
    if not count:
        raise ValueError("the loader is empty: nothing to evaluate")
    top1, top5, loss = (sums / count).tolist()
    return {"top1": 100 * top1, "top5": 100 * top5, "loss": loss, "count": count}


# Robustness probes and attention statistics

def occlude_center(x: Tensor, size: int = 112) -> Tensor:
    """A copy of the normalised images with the central square zero, that is of the mean colour."""
    height, width = x.shape[-2:]
    if not 0 <= size <= min(height, width):
        raise ValueError(f"size must be in 0..{min(height, width)}, got {size}")
    top, left, x = (height - size) // 2, (width - size) // 2, x.clone()
    x[..., top:top + size, left:left + size] = 0
    return x


def fgsm(model: nn.Module, x: Tensor, labels: Tensor, eps: float,
         mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """The fast gradient sign attack (arXiv:1412.6572) on images `x` in [0, 1], in eval mode.

    clip(x + eps * sign(d CE(model((x - mean) / std), labels) / dx), 0, 1)
    """
    _check_float("x", x)
    _check_range(0, math.inf, eps=eps)
    with _eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        x, labels = x.detach().clone().requires_grad_(True), labels.clone()
        loss = F.cross_entropy(model(_normalized(x, mean, std)), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    return (x + eps * gradient.sign()).clamp(0, 1).detach()


def attention_entropy(attn: Tensor) -> Tensor:
    """`(B, heads, N, N) -> (heads,)`: mean entropy of a query's attention in nats (<= log N)."""
    attn = _spatial(attn, 0)
    return -torch.xlogy(attn, attn).sum(-1).mean((0, 2))


def interaction_rate(attn: Tensor, tau: float = 0.01, num_tokens: int = 1) -> Tensor:
    """Share of the spatial query-key pairs with attention above `tau`, per head."""
    _check_range(0, 1, tau=tau)
    return (_spatial(attn, num_tokens) > tau).double().mean((0, 2, 3))


def interaction_distance(attn: Tensor, grid: int | tuple[int, int] | None = None,
                         num_tokens: int = 1) -> Tensor:
    """Expected distance from a query to what it attends to, per head, in cells of the stage.

    Over spatial tokens, their attention renormalised; times stride * 2^s it is in pixels.
    """
    spatial = _spatial(attn, num_tokens)
    height, width = _pair("grid", math.isqrt(spatial.shape[-1]) if grid is None else grid)
    if height * width != spatial.shape[-1]:
        raise ValueError(f"{spatial.shape[-1]} spatial tokens are no grid of {height}x{width}: "
                         "give grid=(H, W)")
    cells = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(spatial)
    spatial = spatial / spatial.sum(-1, keepdim=True)
    return (spatial * torch.cdist(cells, cells)).sum(-1).mean((0, 2))


def _spatial(attn: Tensor, num_tokens: int) -> Tensor:
    """The attention among the tokens after the first `num_tokens`, in double precision."""
    _check_float("attn", attn)
    if attn.ndim != 4 or attn.shape[2] != attn.shape[3]:
        raise ValueError(f"attn must be (B, heads, N, N), got {tuple(attn.shape)}")
    _check_range(0, attn.shape[3] - 1, num_tokens=num_tokens)
    return attn[:, :, num_tokens:, num_tokens:].double()


# Small helpers

@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_sizes(least: int = 1, **sizes: int | Sequence[int]) -> None:
    for name, size in sizes.items():
        if np.asarray(size).dtype.kind not in "iu" or np.min(size) < least:
            raise ValueError(f"{name} must be whole and at least {least}, got {size!r}")


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not _is_number(rate) or not 0 <= rate < 1:
            raise ValueError(f"{name} must be in [0, 1), got {rate!r}")


def _check_range(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not _is_number(value) or not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {value!r}")


def _is_number(value) -> bool:
    return isinstance(value, Real) or isinstance(value, Tensor) and value.numel() == 1


def _check_image(image: Image.Image, mode: str | None = None) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got {type(image).__name__}")
    if mode not in (None, image.mode):
        raise ValueError(f"image must be {mode}, got mode {image.mode}: convert it first")
    return image


def _check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = f"one of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a float tensor, got {found}")


def _check_option(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")


def _pair(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if np.ndim(size) == 0 else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a positive int or (H, W), got {size}")
    _check_sizes(**{name: pair})
    return pair


def _resize_map(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(pos_embed, grid, mode="bicubic", align_corners=False)


def _normalized(x: Tensor, mean: Sequence[float] | None = None,
                std: Sequence[float] | None = None) -> Tensor:
    """(x - mean) / std per channel, ImageNet's by default."""
    mean, std = (
        torch.as_tensor(default if given is None else given, dtype=x.dtype, device=x.device)
        for given, default in ((mean, IMAGENET_MEAN), (std, IMAGENET_STD)))
    return (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def _draw(kind: Callable, shape: Sequence[int], generator: torch.Generator | None,
          device: torch.device | str = "cpu") -> Tensor:
    """torch.rand or torch.randn on the generator's device, brought to `device`."""
    if generator is None:               # not as an argument: compiled, that allows one shape only
        return kind(shape, device=device)
    return kind(shape, generator=generator, device=generator.device).to(device)


def _bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile wrappers."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return getattr(model, "_orig_mod", model)


def _demo() -> None:
    with torch.device("meta"):
        models = {"PiT-S": pit_s(), "DeiT-S": deit_small_patch16_224()}
    macs = {name: count_macs(model)["total"] for name, model in models.items()}
    for name, model in models.items():
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name:>6}: {millions:.1f} M parameters, {macs[name] / 1e9:.2f} GMACs, "
              f"grids {model.grids}")
    print(f"claim: PiT-S needs 38 % fewer MACs; here {1 - macs['PiT-S'] / macs['DeiT-S']:.0%}")

    generator = torch.Generator().manual_seed(0)
    model = PoolingTransformer(32, 8, 4, (16,) * 3, (1, 2, 1), (2, 4, 8), 2, num_classes=2)
    init_weights(model, generator=generator)
    x, y = torch.rand(64, 3, 32, 32, generator=generator), torch.arange(64) % 2
    x[y == 1, :, :16] += 0.5                    # class 1: the upper half is brighter
    for log in train(model, [(x, y)], epochs=20, lr=2e-3):
        if log["step"] % 5 == 0:
            print(f"step {log['step']:2d}  loss {log['loss']:.3f}")
    _, tokens = model.eval().forward_intermediates(x)
    off = (model(x) - model.head(model.norm(tokens[-1]))[:, 0]).abs().max()
    print(f"top-1 {evaluate(model, [(x, y)])['top1']:.0f} %; "
          f"last block on class tokens alone: logits differ by {off:.1e}")


if __name__ == "__main__":
    _demo()
