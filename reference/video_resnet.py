"""Residual networks for video: SlowOnly, SlowFast, R(2+1)D and TSM, and inflation of image weights.

Papers: "SlowFast Networks for Video Recognition", C. Feichtenhofer, H. Fan, J. Malik, K. He, ICCV
2019, arXiv:1812.03982 (SlowOnly is its slow pathway alone). "A Closer Look at Spatiotemporal
Convolutions for Action Recognition", D. Tran et al., CVPR 2018, arXiv:1711.11248 (R(2+1)D). "TSM:
Temporal Shift Module for Efficient Video Understanding", J. Lin, C. Gan, S. Han, ICCV 2019,
arXiv:1811.08383. Inflation: "Quo Vadis, Action Recognition?", J. Carreira, A. Zisserman, CVPR 2017.

All take clips (B, 3, T, H, W) and return logits (B, K); `forward_features` returns the last map
(B, C, T', H/32, W/32). How they look at time:

    SlowOnly   few frames, far apart; temporal kernels only in the last two stages
    SlowFast   a fast pathway, alpha times the frames, 1/8 of the channels, feeds the slow one
    R(2+1)D    a 3x3x3 kernel becomes 1x3x3, batch norm, ReLU, 3x1x1, with as many parameters
    TSM        a 2-D network; before a block 1/8 of the channels move a frame back, 1/8 forward

Names of the parameters are those of the published checkpoints, which load with load_state_dict:
PyTorchVideo's slow_r50 and slowfast_r50, torchvision's r2plus1d_18; TSM has those of torchvision's
2-D ResNets (`tsm_names` renames the authors' checkpoints). Parameters at 400 classes as published:
SlowOnly-50 32.45 M, SlowFast-50 34.57 M, R(2+1)D-18 31.5 M, TSM-50 24.3 M.

>>> model, clips = slowonly18(num_classes=5, width=8, small_stem=True), torch.zeros(2, 3, 4, 32, 32)
>>> model(clips).shape, model.forward_features(clips).shape
(torch.Size([2, 5]), torch.Size([2, 64, 4, 4, 4]))
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # residual blocks of the stages


def _conv(inputs: int, outputs: int, kernel: Sequence[int],
          stride: Sequence[int] = (1, 1, 1)) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, kernel, stride, [k // 2 for k in kernel], bias=False)


def _check(depth: int, num_classes: int, width: int) -> None:
    if depth not in LAYERS:
        raise ValueError(f"depth must be one of {', '.join(map(str, LAYERS))}, not {depth}")
    if num_classes < 1 or width < 1:
        raise ValueError(f"num_classes and width must be positive, not {num_classes} and {width}")


def _check_clips(x: Tensor) -> None:
    if x.ndim != 5 or x.shape[1] != 3:
        raise ValueError(f"clips must be (B, 3, T, H, W), not {tuple(x.shape)}")


def _own_draws(generator: torch.Generator | None) -> contextlib.AbstractContextManager:
    """Layers draw weights when they are made: with a generator, torch's own stays as it was."""
    return torch.random.fork_rng(devices=[], enabled=generator is not None)


@torch.no_grad()
def reset_parameters(model: nn.Module, zero_init: Callable[[nn.Module], nn.Module | None],
                     generator: torch.Generator | None = None) -> None:
    """He initialisation of convolutions (fan out), batch norms 1 and 0, linear layers N(0, 0.01);
    `zero_init(module)` returns the last batch norm of a residual block, which starts at 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu",
                                    generator=generator)
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0, 0.01, generator=generator)
            module.bias.zero_()
    for module in model.modules():
        if (norm := zero_init(module)) is not None:
            norm.weight.zero_()


# ---------------------------------------------------------------- SlowOnly

class Branch(nn.Module):
    """F(x) of a residual block: (t x 1 x 1), (1 x 3 x 3), 1 x 1 x 1 for a bottleneck; (t x 3 x 3),
    (1 x 3 x 3) for a basic block (ResNet-18 and 34). Stride in the first 3 x 3."""

    def __init__(self, inputs: int, inner: int, outputs: int, time: int, stride: int,
                 bottleneck: bool):
        super().__init__()
        steps = (1, stride, stride)
        if bottleneck:
            self.conv_a = _conv(inputs, inner, (time, 1, 1))
            self.conv_b = _conv(inner, inner, (1, 3, 3), steps)
            self.conv_c, self.norm_c = _conv(inner, outputs, (1, 1, 1)), nn.BatchNorm3d(outputs)
        else:
            self.conv_a = _conv(inputs, inner, (time, 3, 3), steps)
            self.conv_b = _conv(inner, outputs, (1, 3, 3))
        self.norm_a, self.norm_b = nn.BatchNorm3d(inner), nn.BatchNorm3d(self.conv_b.out_channels)
        self.bottleneck = bottleneck

    @property
    def last_norm(self) -> nn.BatchNorm3d:
        return self.norm_c if self.bottleneck else self.norm_b

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_b(self.conv_b(F.relu(self.norm_a(self.conv_a(x)))))
        return self.norm_c(self.conv_c(F.relu(x))) if self.bottleneck else x


class ResBlock(nn.Module):
    """relu(x + F(x)); a 1 x 1 x 1 convolution of x where the shape changes."""

    def __init__(self, inputs: int, inner: int, outputs: int, time: int, stride: int,
                 bottleneck: bool):
        super().__init__()
        self.branch1_conv = None
        if stride != 1 or inputs != outputs:
            self.branch1_conv = _conv(inputs, outputs, (1, 1, 1), (1, stride, stride))
            self.branch1_norm = nn.BatchNorm3d(outputs)
        self.branch2 = Branch(inputs, inner, outputs, time, stride, bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        same = x if self.branch1_conv is None else self.branch1_norm(self.branch1_conv(x))
        return F.relu(same + self.branch2(x))


class Stage(nn.Module):
    """`count` residual blocks; the first one changes channels and resolution."""

    def __init__(self, inputs: int, inner: int, time: int, stride: int, count: int,
                 bottleneck: bool):
        super().__init__()
        outputs = inner * 4 if bottleneck else inner
        self.res_blocks = nn.ModuleList(
            ResBlock(outputs if i else inputs, inner, outputs, time, 1 if i else stride, bottleneck)
            for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x)
        return x


class Stem(nn.Module):
    """(time x 7 x 7) convolution of stride 2 and max pooling; small: (time x 3 x 3), no stride."""

    def __init__(self, outputs: int, time: int, small: bool):
        super().__init__()
        side, stride = (3, 1) if small else (7, 2)
        self.conv = _conv(3, outputs, (time, side, side), (1, stride, stride))
        self.norm, self.small = nn.BatchNorm3d(outputs), small

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return x if self.small else F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))


class Head(nn.Module):
    """Dropout and the classifier, on pooled features (B, C)."""

    def __init__(self, inputs: int, num_classes: int, dropout: float):
        super().__init__()
        self.dropout, self.proj = nn.Dropout(dropout), nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dropout(x))


SLOW_TIMES, FAST_TIMES = (1, 1, 1, 3, 3), (5, 3, 3, 3, 3)  # temporal kernels of stem and stages


def _pathway(depth: int, width: int, times: Sequence[int], small_stem: bool,
             fused: int = 0) -> list[nn.Module]:
    """Stem and four stages; `fused` / 8 of their channels more come in from the other pathway."""
    bottleneck, channels = depth >= 50, width
    modules: list[nn.Module] = [Stem(width, times[0], small_stem)]
    for number, (count, time) in enumerate(zip(LAYERS[depth], times[1:])):
        inner = width * 2**number
        inputs, stride = channels + channels // 8 * fused, 2 if number else 1
        modules.append(Stage(inputs, inner, time, stride, count, bottleneck))
        channels = inner * 4 if bottleneck else inner
    return modules


class SlowOnly(nn.Module):
    """The slow pathway: a ResNet on frames with temporal kernels in the last two stages.

    depth 18, 34 or 50; width: channels of the stem; small_stem: for inputs of 16 to 64 pixels;
    dropout before the classifier; generator: source of the initial weights (None: torch's own).
    """

    def __init__(self, depth: int = 50, num_classes: int = 400, width: int = 64,
                 small_stem: bool = False, dropout: float = 0.5,
                 generator: torch.Generator | None = None):
        super().__init__()
        _check(depth, num_classes, width)
        self.num_features = width * 8 * (4 if depth >= 50 else 1)
        with _own_draws(generator):
            self.blocks = nn.ModuleList([*_pathway(depth, width, SLOW_TIMES, small_stem),
                                         Head(self.num_features, num_classes, dropout)])
        reset_parameters(self, lambda m: m.last_norm if isinstance(m, Branch) else None, generator)

    @property
    def fc(self) -> nn.Linear:
        return self.blocks[-1].proj

    def __setattr__(self, name: str, value) -> None:
        if name == "fc":                     # nn.Module would keep the new one without using it
            self.blocks[-1].proj = value
        else:
            super().__setattr__(name, value)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) to (B, num_features, T, H/32, W/32)."""
        _check_clips(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[-1](self.forward_features(x).mean((2, 3, 4)))


# ---------------------------------------------------------------- SlowFast

class FuseFastToSlow(nn.Module):
    """Lateral connection: a temporal convolution of stride alpha, to twice the fast channels, joins
    the slow pathway's channels."""

    def __init__(self, channels: int, alpha: int, kernel: int):
        super().__init__()
        self.conv_fast_to_slow = _conv(channels, 2 * channels, (kernel, 1, 1), (alpha, 1, 1))
        self.norm = nn.BatchNorm3d(2 * channels)

    def forward(self, slow: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([slow, F.relu(self.norm(self.conv_fast_to_slow(fast)))], 1), fast


class TwoPathways(nn.Module):
    """One block of each pathway, then the lateral connection, if any."""

    def __init__(self, slow: nn.Module, fast: nn.Module, fusion: nn.Module | None):
        super().__init__()
        self.multipathway_blocks, self.multipathway_fusion = nn.ModuleList([slow, fast]), fusion

    def forward(self, slow: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
        slow, fast = self.multipathway_blocks[0](slow), self.multipathway_blocks[1](fast)
        fusion = self.multipathway_fusion
        return (slow, fast) if fusion is None else fusion(slow, fast)


class SlowFast(nn.Module):
    """Two pathways. Called with (slow, fast), as two arguments or one tuple, or with the fast clip
    alone, of which every alpha-th frame is the slow one.

    alpha: fast frames per slow frame (4 for 8x8, 8 for 4x16); fusion_kernel: temporal size of the
    lateral connections (7, and 5 in the paper); width: a multiple of 8; the others as for SlowOnly.
    """

    def __init__(self, depth: int = 50, num_classes: int = 400, width: int = 64, alpha: int = 4,
                 fusion_kernel: int = 7, small_stem: bool = False, dropout: float = 0.5,
                 generator: torch.Generator | None = None):
        super().__init__()
        _check(depth, num_classes, width)
        if width % 8 or alpha < 1 or fusion_kernel < 1 or fusion_kernel % 2 == 0:
            raise ValueError("width must be a multiple of 8, alpha positive and fusion_kernel odd "
                             f"and positive, not {width}, {alpha} and {fusion_kernel}")
        self.alpha = alpha
        widths = [width // 8, *(width // 8 * 2**i * (4 if depth >= 50 else 1) for i in range(4))]
        self.num_features = widths[-1] * 9
        with _own_draws(generator):
            slow = _pathway(depth, width, SLOW_TIMES, small_stem, fused=2)
            fast = _pathway(depth, width // 8, FAST_TIMES, small_stem)
            fusions = [*(FuseFastToSlow(c, alpha, fusion_kernel) for c in widths[:4]), None]
            self.blocks = nn.ModuleList([*map(TwoPathways, slow, fast, fusions), nn.Identity(),
                                         Head(self.num_features, num_classes, dropout)])
        reset_parameters(self, lambda m: m.last_norm if isinstance(m, Branch) else None, generator)

    def forward_features(self, slow: Tensor | tuple[Tensor, Tensor],
                         fast: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The last maps of both pathways: (B, 8 c, T / alpha, h, w) and (B, c, T, h, w)."""
        if isinstance(slow, (tuple, list)):
            slow, fast = slow
        elif fast is None:
            slow, fast = slow[:, :, ::self.alpha], slow
        for clip in (slow, fast):
            _check_clips(clip)
        batch, channels, frames, *side = slow.shape
        if fast.shape != (batch, channels, frames * self.alpha, *side):
            raise ValueError(f"the fast clip must have {self.alpha} times the frames of the slow "
                             f"one and its other sizes, not {tuple(fast.shape)} and "
                             f"{tuple(slow.shape)}")
        for block in self.blocks[:5]:
            slow, fast = block(slow, fast)
        return slow, fast

    def forward(self, slow: Tensor | tuple[Tensor, Tensor], fast: Tensor | None = None) -> Tensor:
        pooled = [path.mean((2, 3, 4)) for path in self.forward_features(slow, fast)]
        return self.blocks[-1](torch.cat(pooled, 1))


# ---------------------------------------------------------------- R(2+1)D

def _conv2plus1d(inputs: int, outputs: int, middle: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 x 3 convolution, split: space, batch norm, ReLU, time."""
    return nn.Sequential(
        _conv(inputs, middle, (1, 3, 3), (1, stride, stride)), nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True), _conv(middle, outputs, (3, 1, 1), (stride, 1, 1)))


class R2Plus1DBlock(nn.Module):
    """Basic block of split convolutions, each with as many parameters as a full 3 x 3 x 3."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        middle = inputs * outputs * 27 // (inputs * 9 + 3 * outputs)
        self.conv1 = nn.Sequential(_conv2plus1d(inputs, outputs, middle, stride),
                                   nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(_conv2plus1d(outputs, outputs, middle), nn.BatchNorm3d(outputs))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, (1, 1, 1), (stride,) * 3),
                                            nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        same = x if self.downsample is None else self.downsample(x)
        return F.relu(same + self.conv2(self.conv1(x)))


class _Stages(nn.Module):
    """What R(2+1)D and TSM share: layer1..4 and the linear `fc`, under torchvision's names."""

    def _build(self, block: Callable[[int, int, int], nn.Module], counts: Sequence[int],
               width: int, expansion: int, num_classes: int, dropout: float) -> None:
        channels = width
        for number, count in enumerate(counts):
            outputs, stride = width * 2**number * expansion, 2 if number else 1
            blocks = (block(outputs if i else channels, outputs, 1 if i else stride)
                      for i in range(count))
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
            channels = outputs
        self.num_features, self.dropout = channels, nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def _layers(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.forward_features(x).mean((2, 3, 4))))


class R2Plus1D(_Stages):
    """R(2+1)D: halves the frames together with the image in stages 2 to 4. depth 18 or 34."""

    def __init__(self, depth: int = 18, num_classes: int = 400, width: int = 64,
                 small_stem: bool = False, dropout: float = 0.0,
                 generator: torch.Generator | None = None):
        super().__init__()
        _check(depth, num_classes, width)
        if depth >= 50:
            raise ValueError(f"depth must be 18 or 34, not {depth}")
        side, stride, middle = (3, 1, width) if small_stem else (7, 2, 45)
        with _own_draws(generator):
            self.stem = nn.Sequential(
                _conv(3, middle, (1, side, side), (1, stride, stride)), nn.BatchNorm3d(middle),
                nn.ReLU(inplace=True), _conv(middle, width, (3, 1, 1)), nn.BatchNorm3d(width),
                nn.ReLU(inplace=True))
            self._build(R2Plus1DBlock, LAYERS[depth], width, 1, num_classes, dropout)
        reset_parameters(self, lambda m: m.conv2[1] if isinstance(m, R2Plus1DBlock) else None,
                         generator)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) to (B, num_features, T/8, H/16, W/16)."""
        _check_clips(x)
        return self._layers(self.stem(x))


# ---------------------------------------------------------------- TSM

def temporal_shift(x: Tensor, fraction: int = 8) -> Tensor:
    """(B, T, C, H, W): the first C / fraction channels come from the next frame, as many from the
    one before, zeros at the ends; the rest stays."""
    fold, out = x.shape[2] // fraction, torch.zeros_like(x)
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, 1:, fold:2 * fold] = x[:, :-1, fold:2 * fold]
    out[:, :, 2 * fold:] = x[:, :, 2 * fold:]
    return out


class TSMBlock(nn.Module):
    """A 2-D residual block whose branch starts with the shift, on frames (B, T, C, H, W)."""

    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool):
        super().__init__()
        inner = outputs // 4 if bottleneck else outputs
        conv = lambda i, o, k, s=1: nn.Conv2d(i, o, k, s, k // 2, bias=False)      # noqa: E731
        if bottleneck:
            self.conv1, self.conv2 = conv(inputs, inner, 1), conv(inner, inner, 3, stride)
            self.conv3, self.bn3 = conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        else:
            self.conv1, self.conv2 = conv(inputs, inner, 3, stride), conv(inner, inner, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(inner)
        self.downsample, self.bottleneck = None, bottleneck
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride),
                                            nn.BatchNorm2d(outputs))

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3 if self.bottleneck else self.bn2

    def forward(self, x: Tensor) -> Tensor:
        batch, same = x.shape[:2], x.flatten(0, 1)
        same = same if self.downsample is None else self.downsample(same)
        x = F.relu(self.bn1(self.conv1(temporal_shift(x).flatten(0, 1))))
        x = self.bn2(self.conv2(x))
        x = self.bn3(self.conv3(F.relu(x))) if self.bottleneck else x
        return F.relu(same + x).unflatten(0, batch)


class TSM(_Stages):
    """A 2-D ResNet with temporal shifts; the frames' logits are averaged. depth 18, 34 or 50."""

    def __init__(self, depth: int = 50, num_classes: int = 400, width: int = 64,
                 small_stem: bool = False, dropout: float = 0.5,
                 generator: torch.Generator | None = None):
        super().__init__()
        _check(depth, num_classes, width)
        side, stride, bottleneck = (*((3, 1) if small_stem else (7, 2)), depth >= 50)
        with _own_draws(generator):
            self.conv1 = nn.Conv2d(3, width, side, stride, side // 2, bias=False)
            self.bn1, self.small_stem = nn.BatchNorm2d(width), small_stem
            self._build(lambda i, o, s: TSMBlock(i, o, s, bottleneck), LAYERS[depth], width,
                        4 if bottleneck else 1, num_classes, dropout)
        reset_parameters(self, lambda m: m.last_norm if isinstance(m, TSMBlock) else None,
                         generator)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) to (B, num_features, T, H/32, W/32)."""
        _check_clips(x)
        frames = F.relu(self.bn1(self.conv1(x.transpose(1, 2).flatten(0, 1))))
        frames = frames if self.small_stem else F.max_pool2d(frames, 3, 2, 1)
        return self._layers(frames.unflatten(0, (x.shape[0], x.shape[2]))).transpose(1, 2)


# ---------------------------------------------------------------- factories and weights

def slowonly18(num_classes: int = 400, **options) -> SlowOnly:
    """20,229,072 parameters at 400 classes."""
    return SlowOnly(18, num_classes, **options)


def slowonly50(num_classes: int = 400, **options) -> SlowOnly:
    """32,454,096 parameters at 400 classes; 8 frames, 8 apart, in the paper's recipe."""
    return SlowOnly(50, num_classes, **options)


def slowfast18(num_classes: int = 400, **options) -> SlowFast:
    """21,785,336 parameters at 400 classes."""
    return SlowFast(18, num_classes, **options)


def slowfast50(num_classes: int = 400, **options) -> SlowFast:
    """34,566,488 parameters at 400 classes; 32 fast and 8 slow frames with alpha = 4."""
    return SlowFast(50, num_classes, **options)


def r2plus1d18(num_classes: int = 400, **options) -> R2Plus1D:
    """31,505,325 parameters at 400 classes."""
    return R2Plus1D(18, num_classes, **options)


def tsm18(num_classes: int = 400, **options) -> TSM:
    """11,381,712 parameters at 400 classes."""
    return TSM(18, num_classes, **options)


def tsm50(num_classes: int = 400, **options) -> TSM:
    """24,327,632 parameters at 400 classes: those of the 2-D network."""
    return TSM(50, num_classes, **options)


def tsm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The TSM authors' names (module.base_model.layer1.0.conv1.net.weight, module.new_fc.weight) as
    ours (layer1.0.conv1.weight, fc.weight)."""
    plain = {re.sub(r"^(module\.)?(base_model\.)?", "", name): v for name, v in state.items()}
    return {re.sub(r"^new_fc", "fc", name.replace(".net.", ".")): v for name, v in plain.items()}


_IMAGE_NAMES = (
    (r"^conv1\.", "blocks.0.conv."), (r"^bn1\.", "blocks.0.norm."), (r"^fc\.", "blocks.5.proj."),
    (r"^layer(\d)\.(\d+)\.", r"blocks.\1.res_blocks.\2."),
    (r"downsample\.0", "branch1_conv"), (r"downsample\.1", "branch1_norm"),
    *((rf"\.conv{i}\.", f".branch2.conv_{letter}.") for i, letter in enumerate("abc", 1)),
    *((rf"\.bn{i}\.", f".branch2.norm_{letter}.") for i, letter in enumerate("abc", 1)))


@torch.no_grad()
def inflate(model: SlowOnly, state: dict[str, Tensor], mode: str = "mean") -> list[str]:
    """Load a torchvision 2-D ResNet of the same depth and width into a SlowOnly network.

    mode "mean": every frame of a temporal kernel of size t gets weight / t (I3D); "center": the
    middle frame gets all, so that the network starts as the 2-D one on each frame. Returns the
    names that the state does not hold, or in another shape (the classifier of another data set);
    these keep their values. ValueError if no name fits.
    """
    if mode not in ("mean", "center"):
        raise ValueError(f"mode must be mean or center, not {mode!r}")
    source = {}
    for name, value in state.items():
        for pattern, new in _IMAGE_NAMES:
            name = re.sub(pattern, new, name)
        source[name] = value
    left = []
    for name, target in model.state_dict().items():
        value = source.get(name)
        if value is not None and value.ndim == 4 and target.ndim == 5:
            time = target.shape[2]
            value = value.unsqueeze(2)
            if mode == "mean":
                value = value.expand(-1, -1, time, -1, -1) / time
            else:
                value = F.pad(value, (0, 0, 0, 0, time // 2, time // 2))
        if value is None or value.shape != target.shape:
            left.append(name)
        else:
            target.copy_(value)
    if len(left) == len(model.state_dict()):
        raise ValueError(f"no parameter fits; the state holds {', '.join(list(state)[:3])}, ...")
    return left


if __name__ == "__main__":
    published = {slowonly50: 32_454_096, slowfast50: 34_566_488, r2plus1d18: 31_505_325,
                 tsm50: 24_327_632}
    for factory, expected in published.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in factory().parameters())
        print(f"{factory.__name__:10s} {count:12,} parameters, published {expected:12,}")
    clip = torch.zeros(1, 3, 8, 64, 64)
    for factory in (slowonly18, slowfast18, r2plus1d18, tsm18):
        logits = factory(width=16).eval()(clip)
        print(f"{factory.__name__:10s} {tuple(clip.shape)} -> {tuple(logits.shape)}")
