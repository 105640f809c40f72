"""ResNet-18/34/50/101/152 for images of any size, in one file.

Paper: "Deep Residual Learning for Image Recognition", K. He, X. Zhang, S. Ren, J. Sun, CVPR 2016,
arXiv:1512.03385.

A residual block computes relu(x + F(x)): the convolutions learn a change of their input, and the
identity path keeps gradients alive through a hundred layers. Two kinds of F:

    BasicBlock  (18, 34)         3x3 -> 3x3
    Bottleneck  (50, 101, 152)   1x1 (reduce) -> 3x3 -> 1x1 (expand by 4), stride in the 3x3

Parameter names, shapes and initialisation are torchvision's, so its checkpoints load unchanged:

    model = resnet50()
    model.load_state_dict(torch.load("resnet50-0676ba61.pth", weights_only=True))

What is added are arguments that vision methods keep asking for; none changes a parameter name:

    layer3_stride=1, layer4_stride=1   a larger last feature map (14x14 or 28x28 at 224 pixels)
    small_stem=True                    3x3 stem without pooling, for 32-pixel images
    width=16                           a narrow network for tests and toys (published: 64)
    num_classes=0                      pooled features instead of logits
    generator=torch.Generator()        reproducible initial weights without touching the global seed

>>> model = resnet18(num_classes=10, small_stem=True, width=16)
>>> model(torch.zeros(2, 3, 32, 32)).shape, model.forward_features(torch.zeros(2, 3, 32, 32)).shape
(torch.Size([2, 10]), torch.Size([2, 128, 4, 4]))
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. ``(B, in_channels, H, W) -> (B, channels, H/stride, W/stride)``."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1,
                 downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1. ``(B, in_channels, H, W) -> (B, 4 * channels, H/stride, W/stride)``."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1,
                 downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global average pooling, linear classifier.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: number of blocks in each of the four stages, e.g. ``(3, 4, 6, 3)``.
        num_classes: size of the classifier; 0 makes the model return pooled features.
        in_chans: channels of the input image.
        width: channels of the first stage (before the block's expansion); each stage doubles it.
        small_stem: 3x3 stride-1 stem without max pooling, for 32-pixel images.
        layer3_stride, layer4_stride: 1 keeps the resolution in that stage (no dilation is added).
        zero_init_residual: start the last batch norm of every block at 0: each block starts as the
            identity.
        generator: source of the initial weights (None: torch's global one, as every torch layer).

    Raises ValueError for a size below its minimum, a stride other than 1 or 2, or ``layers`` not of
    length four.
    """

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], layers: Sequence[int],
                 num_classes: int = 1000, in_chans: int = 3, width: int = 64,
                 small_stem: bool = False, layer3_stride: int = 2, layer4_stride: int = 2,
                 zero_init_residual: bool = False, generator: torch.Generator | None = None):
        super().__init__()
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers must be four positive block counts, got {tuple(layers)}")
        for name, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1),
                                   ("width", width, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, value in (("layer3_stride", layer3_stride), ("layer4_stride", layer4_stride)):
            if value not in (1, 2):
                raise ValueError(f"{name} must be 1 or 2, got {value}")
        before = torch.get_rng_state()         # torch's layers draw weights when they are made
        if small_stem:
            self.conv1 = conv3x3(in_chans, width)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.num_features = width
        self.layer1 = self._stage(block, width, layers[0], stride=1)
        self.layer2 = self._stage(block, 2 * width, layers[1], stride=2)
        self.layer3 = self._stage(block, 4 * width, layers[2], stride=layer3_stride)
        self.layer4 = self._stage(block, 8 * width, layers[3], stride=layer4_stride)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.reset_parameters(zero_init_residual, generator)
        if generator is not None:
            torch.set_rng_state(before)

    def _stage(self, block, channels: int, count: int, stride: int) -> nn.Sequential:
        in_channels, out_channels = self.num_features, channels * block.expansion
        downsample = None
        if stride != 1 or in_channels != out_channels:
            downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride),
                                       nn.BatchNorm2d(out_channels))
        self.num_features = out_channels
        return nn.Sequential(block(in_channels, channels, stride, downsample),
                             *(block(out_channels, channels) for _ in range(count - 1)))

    @torch.no_grad()
    def reset_parameters(self, zero_init_residual: bool = False,
                         generator: torch.Generator | None = None) -> None:
        """Convolutions N(0, 2 / fan_out), batch norm 1 and 0, classifier U(+-1 / sqrt(fan_in))."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu",
                                        generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    last.weight.zero_()

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` to the last map ``(B, num_features, h, w)``; H/32 by default."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` to logits ``(B, num_classes)``; features if num_classes is 0."""
        return self.fc(self.avgpool(self.forward_features(x)).flatten(1))


def resnet18(num_classes: int = 1000, **options) -> ResNet:
    """11,689,512 parameters at 1000 classes. ``options`` are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options) -> ResNet:
    """21,797,672 parameters at 1000 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, **options) -> ResNet:
    """25,557,032 parameters at 1000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnet101(num_classes: int = 1000, **options) -> ResNet:
    """44,549,160 parameters at 1000 classes."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)


def resnet152(num_classes: int = 1000, **options) -> ResNet:
    """60,192,808 parameters at 1000 classes."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, **options)


if __name__ == "__main__":
    published = {resnet18: 11_689_512, resnet34: 21_797_672, resnet50: 25_557_032,
                 resnet101: 44_549_160, resnet152: 60_192_808}
    print(f"{'network':<10} {'parameters':>12} {'published':>12}")
    for factory, expected in published.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in factory().parameters())
        print(f"{factory.__name__:<10} {count:>12,} {expected:>12,}")
    image = torch.zeros(1, 3, 224, 224)
    for strides in ((2, 2), (2, 1), (1, 1)):
        model = resnet18(layer3_stride=strides[0], layer4_stride=strides[1]).eval()
        with torch.no_grad():
            side = model.forward_features(image).shape[-1]
        print(f"resnet18, 224 pixels, layer3_stride {strides[0]}, layer4_stride {strides[1]}: "
              f"{side}x{side} map")
