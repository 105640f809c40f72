"""What the VideoMix scripts share: augmentations by name, small networks, tables with paired
differences, and segments from class activation sequences."""

import math
from collections.abc import Callable
from typing import NamedTuple

import harness  # noqa: F401  (makes `reference` and `data_tools` importable)
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_tools import synthetic, video_frames
from reference import video_resnet
from reference import videomix as vm
from reference import videomix_localization as localization

# two-sided 95 % quantiles of Student's t, by the number of seeds
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
CLASSES = 4                                           # directions of the embedded videos
METHODS = ("none", "S", "T", "ST", "frame CutMix", "Mixup", "FadeMixup", "CutMixup", "Cutout",
           "RandAugment", "RandAugment per frame", "flip")
NETWORKS = ("slowonly18", "slowonly50", "slowfast18", "slowfast50", "r2plus1d18", "tsm18", "tsm50")


# ---------------------------------------------------------------- augmentations and networks

class EachClip(nn.Module):
    """An augmentation of single clips as a mix: `change(clip uint8 (T, H, W, 3), generator)` on
    every clip."""

    def __init__(self, change: Callable, classes: int):
        super().__init__()
        self.change, self.classes = change, classes

    def forward(self, x: Tensor, y: Tensor,
                generator: torch.Generator | None = None) -> vm.MixResult:
        target = F.one_hot(y, self.classes).float()
        pixels = synthetic.to_uint8(x * 0.3 + 0.5).permute(0, 2, 3, 4, 1).cpu().numpy()
        changed = np.stack([self.change(clip, generator) for clip in pixels])
        x = synthetic.to_float(torch.from_numpy(changed).permute(0, 4, 1, 2, 3)).to(x.device)
        return vm.MixResult(x, target, 1.0, torch.arange(len(y)), None, y, y)


def mirror(clip: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Left and right exchanged in half of the clips."""
    return clip[:, :, ::-1] if torch.rand((), generator=generator) < 0.5 else clip


def augmentation(name: str, classes: int, prob: float = 1.0) -> nn.Module | None:
    """One of the compared augmentations by its name in the tables."""
    mixing = {"num_classes": classes, "prob": prob}
    if name in ("S", "T", "ST"):
        return vm.VideoMix(name, rounding="exact", **mixing)
    return {"none": lambda: None, "Mixup": lambda: vm.VideoMixup(**mixing),
            "FadeMixup": lambda: vm.FadeMixup(**mixing),
            "CutMixup": lambda: vm.CutMixup("S", rounding="exact", **mixing),
            "frame CutMix": lambda: vm.FrameCutMix(rounding="exact", **mixing),
            "Cutout": lambda: vm.VideoCutout("S", rounding="exact", **mixing),
            "RandAugment": lambda: EachClip(vm.RandAugment(2, 5), classes),
            "RandAugment per frame": lambda: EachClip(vm.RandAugment(2, 5, consistent=False),
                                                      classes),
            "flip": lambda: EachClip(mirror, classes)}[name]()


class Segments(nn.Module):
    """Training on long clips (B, 3, T, H, W): a random frame of each of `count` parts, then the
    mix."""

    def __init__(self, mix: nn.Module | None, count: int, classes: int):
        super().__init__()
        self.mix, self.count, self.classes = mix, count, classes

    def forward(self, x: Tensor, y: Tensor,
                generator: torch.Generator | None = None) -> vm.MixResult:
        frames = [video_frames.segment_indices(x.shape[2], self.count, generator) for _ in y]
        x = torch.stack([clip[:, chosen] for clip, chosen in zip(x, frames)])
        if self.mix is not None:
            return self.mix(x, y, generator)
        return vm.MixResult(x, F.one_hot(y, self.classes).float(), 1.0, torch.arange(len(y)), None,
                            y, y)


class ClipNet(nn.Module):
    """Four 3x3x3 convolutions with batch norm, mean pooling and a linear layer: (B, 3, T, H, W) to
    (B, classes). The features keep half of the frames and 1/8 of the side (1/4 with `fine`)."""

    def __init__(self, classes: int = CLASSES, seed: int = 0, fine: bool = False):
        super().__init__()
        strides = ((1, 2, 2), (2, 2, 2), 1 if fine else (1, 2, 2), 1)
        widths, layers = (3, 12, 24, 48, 48), []
        for before, after, stride in zip(widths, widths[1:], strides):
            layers += [nn.Conv3d(before, after, 3, stride, 1, bias=False), nn.BatchNorm3d(after),
                       nn.ReLU(inplace=True)]
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(widths[-1], classes)
        generator = torch.Generator().manual_seed(seed)   # the same start for every method
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu",
                                        generator=generator)
        nn.init.normal_(self.fc.weight, 0, 0.01, generator=generator)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3, 4)))


def backbone(name: str, classes: int, seed: int, embedded: bool) -> nn.Module:
    """ClipNet (or "ClipNet fine"), or a network of video_resnet.py; on embedded videos with an
    eighth of the channels."""
    if name.startswith("ClipNet"):
        return ClipNet(classes, seed, fine=name.endswith("fine"))
    options = {"width": 8, "dropout": 0.0} if embedded else {}
    generator = torch.Generator().manual_seed(seed)   # the same start for every method
    return getattr(video_resnet, name)(classes, generator=generator, **options)


# ---------------------------------------------------------------- tables

def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    spread = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(spread)


def as_text(values: list[float]) -> str:
    mean, error = mean_error(values) if values else (math.nan, math.nan)
    return "-" if not values else f"{mean:.1f} ± {error:.1f}" if len(values) > 1 else f"{mean:.1f}"


def versus(values: list[float], base: list[float]) -> tuple[str, str]:
    """The paired difference as text, and what it amounts to."""
    mean, error = mean_error([v - b for v, b in zip(values, base)])
    if len(values) < 2:
        return f"{mean:+.1f}", "one seed"
    reach = T95.get(len(values), 2.23) * error
    return (f"{mean:+.1f} ± {error:.1f}",
            "helps" if mean > reach else "hurts" if mean < -reach else "undecided")


class Setting(NamedTuple):
    """One row of a table: how a network is trained."""

    augmentation: str
    p: float
    epochs: int
    videos: str
    backbone: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self)).replace(" ", "_")

    @property
    def base(self) -> "Setting":
        return self._replace(augmentation="none", p=1.0)


Results = dict[Setting, list[dict[str, float]]]       # figures of every seed


def table_of(results: Results, columns: tuple[str, ...], main: str) -> list[dict]:
    """A row per setting: what tells it from the others, means with standard errors over the seeds,
    and the paired difference of `main` to the same setting without augmentation."""
    keys = [key for key in Setting._fields if len({getattr(s, key) for s in results}) > 1]
    rows = []
    for setting, seeds in results.items():
        row = {key: getattr(setting, key) for key in keys}
        for column in columns:
            row[column] = as_text([s[column] for s in seeds if column in s])
        if setting != setting.base and setting.base in results:
            row["to none"], row["effect"] = versus(*([s[main] for s in results[key]]
                                                     for key in (setting, setting.base)))
        rows.append({**row, "paper": None})
    return rows


def claims_of(results: Results, main: str, what: str = "above none") -> list[dict]:
    """What the paper says of VideoMix, setting by setting: `holds` where the seeds support it or
    its opposite."""
    claims = []
    for setting, seeds in results.items():
        if setting.augmentation == "S" and setting.base in results:
            text, effect = versus([s[main] for s in seeds],
                                  [s[main] for s in results[setting.base]])
            where = (f"{setting.backbone}, {setting.videos}, {setting.epochs} epochs, "
                     f"p = {setting.p:g}")
            claims.append({"claim": f"S-VideoMix {what}: {where} (points of {main})", "paper": None,
                           "this run": text, "holds": {"helps": True, "hurts": False}.get(effect)})
    return claims


# ---------------------------------------------------------------- segments

@torch.no_grad()
def sequence_of(model: nn.Module, video: Tensor) -> tuple[Tensor, Tensor]:
    """The class activation sequences (K, T) of a video (3, T, H, W), one value a frame, and its
    class probabilities (K,)."""
    model.eval()
    features = model.forward_features(video.unsqueeze(0).to(next(model.parameters()).device))
    sequence = localization.class_activation_sequence(features, model.fc.weight,
                                                      model.fc.bias).float().cpu()
    frames = F.interpolate(sequence, video.shape[1], mode="linear", align_corners=False)[0]
    return frames, sequence.mean(2).softmax(1)[0]


def detect(model: nn.Module, video: Tensor, least: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Segments, labels and scores, of every class with a probability of `least`."""
    return segments_of(*sequence_of(model, video), least)


def segments_of(sequence: Tensor, probs: Tensor,
                least: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    parts = [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0))]
    for label in (probs >= least).nonzero().flatten().tolist():
        segments, scores = localization.localize_actions(sequence[label])
        parts.append((segments, torch.full((len(segments),), label), scores * probs[label]))
    return tuple(torch.cat(column) for column in zip(*parts))
