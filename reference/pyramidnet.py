"""PyramidNet (Han, Kim and Kim, "Deep Pyramidal Residual Networks", CVPR 2017, arXiv:1610.02915)
and Wide ResNet (Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146).

PyramidNet widens a little at every residual block instead of doubling at three of them: block i of
N has round(16 + alpha i / N) channels. The shortcut has no weights; it is padded with zero channels
at the end and average-pooled where the resolution halves. Convolutions come after batch norm, and a
branch ends in batch norm without ReLU. With `shakedrop` the branch of block i is followed by
ShakeDrop with probability i / N * shakedrop (Yamada et al. 2019).

State-dict names are those of the CutMix authors' training code, so that its checkpoints load.
Parameters: PyramidNet-200, alpha 240, 100 classes 26,844,952; WRN-28-10, 100 classes 36,536,884.

>>> net = PyramidNet(20, 18, 10, bottleneck=False, shakedrop=0.5)
>>> net(torch.zeros(2, 3, 32, 32)).shape
torch.Size([2, 10])
>>> sum(p.numel() for p in WideResNet(16, 8, 10).parameters())
10961370
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IMAGENET_LAYERS = {
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3),
    101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3),
}


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def initialise(net: nn.Module, generator: torch.Generator | None) -> None:
    """Convolutions N(0, 2 / (k k outputs)), linear layers uniform as torch has them."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out), generator=generator)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            for parameter in (module.weight, module.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


class ShakeDrop(nn.Module):
    """Branch x (b + alpha - b alpha) forward, gradient times (b + beta - b beta): b is one gate per
    pass, 1 with probability 1 - p_drop, alpha ~ U[-1, 1] and beta ~ U[0, 1] per "image", "batch",
    "channel" or "pixel". Nothing waits for the gate on the host."""

    def __init__(self, p_drop: float, level: str = "image"):
        super().__init__()
        if not 0 <= p_drop <= 1 or level not in ("image", "batch", "channel", "pixel"):
            raise ValueError('shakedrop must be in [0, 1] and level "image", "batch", "channel" or '
                             f'"pixel", got {p_drop} and {level!r}')
        self.p_drop, self.level, self.generator = p_drop, level, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * (1 - self.p_drop)  # the mean of alpha is 0
        drawn = {"batch": 0, "image": 1, "channel": 2, "pixel": 4}[self.level]
        shape = (2, *x.shape[:drawn], *[1] * (4 - drawn))
        # No argument generator=None: compiled, it would allow one shape only.
        source = {} if self.generator is None else {"generator": self.generator}
        gate = torch.rand((), device=x.device, **source)
        alpha, beta = torch.rand(shape, device=x.device, **source)
        kept = gate >= self.p_drop
        ahead, back = (torch.where(kept, 1.0, f).to(x.dtype) for f in (2 * alpha - 1, beta))
        return x * back + (x * (ahead - back)).detach()  # value x ahead, gradient back


@contextlib.contextmanager
def throwaway_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms inside record their running statistics in copies that are dropped afterwards."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [norm._buffers for norm in norms]
    for norm in norms:
        norm._buffers = {k: v if v is None else v.clone() for k, v in norm._buffers.items()}
    try:
        yield
    finally:
        for norm, original in zip(norms, buffers):
            norm._buffers = original


def hooked(module: nn.Module) -> bool:
    """Whether something runs before or after the module's forward pass."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


class PyramidBlock(nn.Module):
    """BN-conv3x3-BN-ReLU-conv3x3-BN, or as bottleneck BN-conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1-BN
    with 4 x width outputs, plus the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, p_drop: float,
                 level: str):
        super().__init__()
        self.outputs, self.stride = 4 * width if bottleneck else width, stride
        self.extra = self.outputs - inputs
        self.bn1 = nn.BatchNorm2d(inputs)
        if bottleneck:
            self.conv1, self.conv2 = conv(inputs, width, 1), conv(width, width, 3, stride)
            self.conv3, self.bn3 = conv(width, self.outputs, 1), nn.BatchNorm2d(width)
            self.bn4 = nn.BatchNorm2d(self.outputs)
        else:
            self.conv1, self.conv2 = conv(inputs, width, 3, stride), conv(width, width, 3)
            self.bn3 = nn.BatchNorm2d(width)
        self.bn2 = nn.BatchNorm2d(width)
        self.bottleneck = bottleneck
        self.shake = ShakeDrop(p_drop, level) if p_drop else None

    def branch(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.bn2(self.conv1(self.bn1(x)))))
        return self.bn4(self.conv3(F.relu(self.bn3(x)))) if self.bottleneck else self.bn3(x)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        if recompute and self.training and not any(map(hooked, self.modules())):
            # Only the branch, which draws nothing, is recomputed; its statistics are recorded once,
            # which compiled code sees to itself. Not with a hook inside (manifold mixup): in the
            # backward pass it would run once more, or be gone.
            once = {} if torch.compiler.is_compiling() else {
                "context_fn": lambda: (contextlib.nullcontext(), throwaway_statistics(self))}
            out = checkpoint(self.branch, x, use_reentrant=False, preserve_rng_state=False, **once)
        else:
            out = self.branch(x)
        if self.shake is not None:
            out = self.shake(out)
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, 2, ceil_mode=True)
        return out + (F.pad(x, (0, 0, 0, 0, 0, self.extra)) if self.extra else x)


class PyramidNet(nn.Module):
    """PyramidNet with additive widening. x (B, 3, H, W) -> logits (B, num_classes).

    depth: 9 n + 2 with bottlenecks, 6 n + 2 without (CIFAR), or a ResNet depth (ImageNet).
    shakedrop: drop probability of the last block, linear from the first; level: see ShakeDrop.
    generator: source of the initial weights.
    recompute (attribute, False): keep only the input of each block for the backward pass and run
    the branch again there: the same gradients and statistics from far less memory, a third slower.
    """

    def __init__(self, depth: int, alpha: float, num_classes: int, bottleneck: bool = True,
                 dataset: str = "cifar", shakedrop: float = 0.0, level: str = "image",
                 generator: torch.Generator | None = None):
        super().__init__()
        if dataset not in ("cifar", "imagenet"):
            raise ValueError(f'dataset must be "cifar" or "imagenet", got {dataset!r}')
        self.imagenet, self.recompute = dataset == "imagenet", False
        per_block = 9 if bottleneck else 6
        if self.imagenet:
            if depth not in IMAGENET_LAYERS or (depth > 34) != bottleneck:
                raise ValueError(f"depth must be one of {list(IMAGENET_LAYERS)}, bottleneck=False "
                                 f"for 18 and 34, else True, got {depth} and {bottleneck}")
            layers, width = IMAGENET_LAYERS[depth], 64
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        else:
            if depth < per_block + 2 or (depth - 2) % per_block:
                raise ValueError(f"depth must be {per_block} n + 2 with bottleneck={bottleneck}, "
                                 f"got {depth}")
            layers, width = ((depth - 2) // per_block,) * 3, 16
            self.conv1 = conv(3, width, 3)
        if alpha < 0 or num_classes < 1:
            raise ValueError("alpha must be >= 0 and num_classes >= 1, got "
                             f"{alpha} and {num_classes}")
        self.bn1 = nn.BatchNorm2d(width)
        total, index, channels, exact_width = sum(layers), 0, width, float(width)
        for stage, blocks in enumerate(layers):
            layer = nn.Sequential()
            for block in range(blocks):
                index += 1
                exact_width += alpha / total  # accumulated, as the published widths are
                stride = 2 if stage and not block else 1
                layer.append(PyramidBlock(channels, round(exact_width), stride, bottleneck,
                                          index / total * shakedrop, level))
                channels = layer[-1].outputs
            self.add_module(f"layer{stage + 1}", layer)
        self.stages = [f"layer{stage + 1}" for stage in range(len(layers))]
        self.bn_final = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))  # CIFAR: no ReLU here
        if self.imagenet:
            x = F.max_pool2d(F.relu(x), 3, 2, 1)
        for stage in self.stages:
            layer = getattr(self, stage)
            if self.recompute and not hooked(layer):
                for block in layer:
                    x = block(x, True) if isinstance(block, PyramidBlock) else block(x)
            else:
                x = layer(x)
        return self.fc(F.relu(self.bn_final(x)).mean((2, 3)))


class WideBlock(nn.Module):
    """BN-ReLU-conv3x3-[dropout]-BN-ReLU-conv3x3; a changed shape goes through a 1x1 convolution of
    the BN-ReLU output."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        self.dropout = nn.Dropout(dropout)
        changed = inputs != outputs or stride != 1
        self.shortcut = conv(inputs, outputs, 1, stride) if changed else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(activated)))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-widen for 32-pixel images, pre-activated: x (B, 3, H, W) -> (B, num_classes).

    depth = 6 n + 4; dropout inside the blocks; generator: source of the initial weights."""

    def __init__(self, depth: int, widen: int, num_classes: int, dropout: float = 0.0,
                 generator: torch.Generator | None = None):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, got {depth}")
        if widen < 1 or num_classes < 1:
            raise ValueError(f"widen and num_classes must be >= 1, got {widen} and {num_classes}")
        self.conv1 = conv(3, 16, 3)
        channels = 16
        for stage in range(3):
            layer = nn.Sequential()
            for block in range((depth - 4) // 6):
                stride = 2 if stage and not block else 1
                layer.append(WideBlock(channels, 16 * widen << stage, stride, dropout))
                channels = 16 * widen << stage
            self.add_module(f"layer{stage + 1}", layer)
        self.bn_final = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn_final(x)).mean((2, 3)))


if __name__ == "__main__":
    published = {(110, 270, False): 28_511_307, (164, 270, True): 27_319_071,
                 (200, 240, True): 26_844_952}
    with torch.device("meta"):
        for (depth, alpha, bottleneck), parameters in published.items():
            count = sum(p.numel() for p in PyramidNet(depth, alpha, 100, bottleneck).parameters())
            print(f"PyramidNet-{depth} alpha {alpha}: {count:,} parameters, "
                  f"published {parameters:,}")
        count = sum(p.numel() for p in WideResNet(28, 10, 100).parameters())
        print(f"WRN-28-10: {count:,} parameters, published 36,536,884")

    net = PyramidNet(47, 60, 10, shakedrop=0.5)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    results = {}
    for net.recompute in (False, True):
        kept = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        for module in net.modules():
            if isinstance(module, ShakeDrop):
                module.generator = torch.Generator().manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = net(images).square().mean()
        results[net.recompute] = torch.autograd.grad(loss, net.conv1.weight)[0]
        print(f"recompute={net.recompute}: {sum(kept.values()) / 2**20:.1f} MiB kept for backward")
    print(f"claim: equal gradients ({torch.equal(*results.values())}) from a part of the memory")
