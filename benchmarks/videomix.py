"""VideoMix: when mixing cuboids of videos helps a classifier, and when it hurts.

    python benchmarks/videomix.py                          # S, T, ST over epochs and p; about 15 minutes on one core
    python benchmarks/videomix.py --table augmentations    # every augmentation of the paper's comparison
    python benchmarks/videomix.py --table kinetics         # backbones with and without VideoMix
    python benchmarks/videomix.py --table ssv2             # the same, sampled by segments, and what a flip does
    python benchmarks/videomix.py --table thumos           # actions in time from video labels
    python benchmarks/videomix.py --table ava              # actions of boxes after pretraining
    torchrun --nproc_per_node=8 benchmarks/videomix.py --table kinetics --data kinetics400 --preset paper

The embedded videos show a square that moves over a still scene; the class is its direction. *Own scenes*: every clip
has another scene, few clips are available, and a network that remembers scenes fails on new ones. *Class scenes*, the
negative control: four in five training clips of a class share its scene, and the test clips do not. A
difference counts as help or harm where the 95 % interval of the paired differences over the seeds (Student's t)
excludes zero; the paper's own tables could not be verified, so its column stays empty.

--data: a folder with train.txt and val.txt, written by `python -m data_tools.video_frames` (thumos and ava: see
videomix_localize.py).
"""

import math
from collections.abc import Callable

import figures
import harness
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_tools import synthetic
from reference import robustness
from reference import videomix as vm

TABLES = ("variants", "augmentations", "kinetics", "ssv2", "thumos", "ava")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}     # Student's t, by seeds
CLASSES = 4                                                   # directions of the embedded videos


class EachClip(nn.Module):
    """An augmentation of single clips as a mix: `change(clip uint8 (T, H, W, 3), generator)` on every clip."""

    def __init__(self, change: Callable, classes: int):
        super().__init__()
        self.change, self.classes = change, classes

    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> vm.MixResult:
        target = F.one_hot(y, self.classes).float()
        pixels = ((x * 0.3 + 0.5) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).cpu().numpy()
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
    return {"none": lambda: None, "Mixup": lambda: vm.VideoMixup(**mixing), "FadeMixup": lambda: vm.FadeMixup(**mixing),
            "CutMixup": lambda: vm.CutMixup("S", rounding="exact", **mixing),
            "frame CutMix": lambda: vm.FrameCutMix(rounding="exact", **mixing),
            "Cutout": lambda: vm.VideoCutout("S", rounding="exact", **mixing),
            "RandAugment": lambda: EachClip(vm.RandAugment(2, 5), classes),
            "RandAugment per frame": lambda: EachClip(vm.RandAugment(2, 5, consistent=False), classes),
            "flip": lambda: EachClip(mirror, classes)}[name]()


class ClipNet(nn.Module):
    """Four 3x3x3 convolutions with batch norm, mean pooling and a linear layer: (B, 3, T, H, W) to (B, classes)."""

    def __init__(self, classes: int = CLASSES, strides=((1, 2, 2), (2, 2, 2), (1, 2, 2), 1), seed: int = 0):
        super().__init__()
        widths, layers = (3, 12, 24, 48, 48), []
        for before, after, stride in zip(widths, widths[1:], strides):
            layers += [nn.Conv3d(before, after, 3, stride, 1, bias=False), nn.BatchNorm3d(after), nn.ReLU(inplace=True)]
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(widths[-1], classes)
        generator = torch.Generator().manual_seed(seed)       # the same start for every method
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        nn.init.normal_(self.fc.weight, 0, 0.01, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3, 4)))


# ---------------------------------------------------------------- training and measuring

def fit(run: harness.Run, name: str, model: nn.Module, data: dict[str, Tensor], mix: nn.Module | None, epochs: int, *,
        seed: int, batch_size: int = 50, lr: float = 0.1) -> nn.Module:
    """Train on embedded videos, through the harness."""
    model = run.wrap(model)
    loader = synthetic.Batches(data["videos"], data["labels"], batch_size=batch_size, seed=seed, transform=synthetic.to_float,
                               rank=run.rank, world_size=run.world_size)
    steps = vm.train(model, loader, mix, epochs, lr=lr, generator=torch.Generator().manual_seed(seed * run.world_size + run.rank),
                     amp_dtype=run.amp_dtype, resume=run.resumed(name))
    run.drive(name, steps, total=epochs * len(loader))
    return model


@torch.no_grad()
def predict(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """(N, K) logits of embedded videos, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(synthetic.to_float(part.to(device))).float().cpu() for part in data["videos"].split(200)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def measure(model: nn.Module, train: dict, test: dict, biased: dict | None = None) -> dict[str, float]:
    """Accuracies in %, calibration error, and with `biased` clips (scenes as in training) the scene reliance: how often
    the prediction is the scene's class, where that is not the clip's."""
    logits = predict(model, test)
    row = {"train": accuracy(predict(model, train), train["labels"]), "test": accuracy(logits, test["labels"]),
           "ECE": 100 * robustness.expected_calibration_error(logits, test["labels"])}
    if biased is not None:
        conflict = test["scenes"] != test["labels"]
        row["biased test"] = accuracy(predict(model, biased), biased["labels"])
        row["scene reliance"] = accuracy(logits[conflict], test["scenes"][conflict])
    return row


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def versus(values: list[float], base: list[float]) -> tuple[str, str, float]:
    """The paired difference as text, what it amounts to, and its mean."""
    mean, error = mean_error([v - b for v, b in zip(values, base)])
    if len(values) < 2:
        return f"{mean:+.1f}", "one seed", mean
    reach = T95.get(len(values), 2.2) * error
    effect = "helps" if mean > reach else "hurts" if mean < -reach else "undecided"
    return f"{mean:+.1f} ± {error:.1f}", effect, mean


def table_of(results: dict[tuple, list[dict]], keys: tuple[str, ...], columns: tuple[str, ...], main: str = "test") -> list[dict]:
    """One row per setting: its keys, means with standard errors over the seeds, and the paired difference of `main` to
    the same setting without augmentation (`base` in the rows' keys: where the baseline is)."""
    rows = []
    for setting, seeds in results.items():
        base = results.get(("none", *setting[1:])) or results.get(("none", 1.0, *setting[2:]))
        row = dict(zip(keys, setting))
        for column in columns:
            values = [s[column] for s in seeds if column in s]
            row[column] = "{:.1f} ± {:.1f}".format(*mean_error(values)) if values else "-"
        if base is not None and base is not seeds:
            row["to none"], row["effect"], _ = versus([s[main] for s in seeds], [s[main] for s in base])
        rows.append({**row, "paper": None})
    return rows


# ---------------------------------------------------------------- the study on embedded videos

SIZES = {"default": {"count": 600, "tests": 1000, "epochs": 30, "side": 16}, "tiny": {"count": 40, "tests": 40, "epochs": 1, "side": 16},
         "paper": {"count": 5000, "tests": 5000, "epochs": 60, "side": 64}}
# (set, times the epochs, method, p); the class scenes start from half the epochs, the short schedule
VARIANTS = ([("own scenes", times, method, 1.0) for times in (0.5, 1, 4) for method in ("none", "S")]
            + [("own scenes", 1, method, p) for method, p in (("T", 1.0), ("ST", 1.0), ("S", 0.5), ("T", 0.5), ("ST", 0.5))]
            + [("own scenes", 4, "S", 0.5)]
            + [("class scenes", 0.5, method, 1.0) for method in ("none", "S", "T", "ST")] + [("class scenes", 0.5, "S", 0.5)]
            + [("class scenes", 2, method, p) for method, p in (("none", 1.0), ("S", 1.0), ("S", 0.5))])
AUGMENTATIONS = [("own scenes", 1, method, 1.0) for method in (
    "none", "S", "T", "ST", "frame CutMix", "Mixup", "FadeMixup", "CutMixup", "Cutout", "RandAugment", "RandAugment per frame", "flip")]


def scene_sets(kind: str, size: dict, seed: int) -> tuple[dict, dict, dict | None]:
    """Training clips, test clips, and for class scenes also test clips with the scenes of training."""
    rho, decorrelated = (None, None) if kind == "own scenes" else (0.8, 0.0)
    draw = lambda count, offset, rho: synthetic.videos(count, size["side"], seed=10 * seed + offset, rho=rho)      # noqa: E731
    return (draw(size["count"], 0, rho), draw(size["tests"], 1, decorrelated),
            None if rho is None else draw(size["tests"], 2, rho))


def study(run: harness.Run, cells: list[tuple]) -> dict[tuple, list[dict]]:
    """Every cell for every seed: {(method, p, epochs, set): [figures of a seed]}."""
    size, results = SIZES[run.args.preset], {}
    settings = dict.fromkeys((method, prob, max(1, round(times * size["epochs"])), kind) for kind, times, method, prob in cells)
    for seed in run.seeds:
        sets = {}
        for setting in settings:
            method, prob, epochs, kind = setting
            name = f"{kind}-{method}-p{prob}-e{epochs}-seed{seed}".replace(" ", "_")
            if (row := run.recorded(name)) is None:
                if kind not in sets:
                    sets[kind] = scene_sets(kind, size, seed)
                model = fit(run, name, ClipNet(seed=seed), sets[kind][0], augmentation(method, CLASSES, prob), epochs, seed=seed)
                row = run.record(name, measure(model, *sets[kind]))
            results.setdefault(setting, []).append(row)
    return results


def claims_of(results: dict[tuple, list[dict]]) -> list[dict]:
    """What the paper says of S-VideoMix, setting by setting: `holds` where the seeds support it or its opposite."""
    claims = []
    for (method, prob, epochs, kind), seeds in results.items():
        base = results.get(("none", 1.0, epochs, kind))
        if method == "S" and base is not None:
            text, effect, _ = versus([s["test"] for s in seeds], [s["test"] for s in base])
            claims.append({"claim": f"S-VideoMix above none, {kind}, {epochs} epochs, p = {prob:g} (points)", "paper": None,
                           "this run": text, "holds": {"helps": True, "hurts": False}.get(effect)})
    return claims


def run_study(run: harness.Run, cells: list[tuple], title: str) -> None:
    results = study(run, cells)
    columns = ("train", "test", "ECE", "biased test", "scene reliance") if title == "variants" else ("train", "test", "ECE")
    rows = table_of(results, ("augmentation", "p", "epochs", "videos"), columns)
    if run.figures and run.is_main:
        draw_study(run, results, title)
    run.finish(claims_of(results), {title: rows})


def draw_study(run: harness.Run, results: dict[tuple, list[dict]], title: str) -> None:
    """Accuracy over the length of training, or by augmentation; and the mixed clips themselves."""
    if title == "augmentations":
        names = [setting[0] for setting in results]
        means, errors = zip(*(mean_error([s["test"] for s in seeds]) for seeds in results.values()))
        short = [name.replace("RandAugment", "RandAug").replace("Mixup", "mixup") for name in names]
        figures.bar_chart(run.figures / "videomix_augmentations.png", short, {"accuracy": (means, errors)}, size=(900, 360),
                          title="Accuracy on clips with new scenes (mean and standard error)", ylabel="%", ylim=(0, 100))
        draw_mixes(run)
        return
    for kind in ("own scenes", "class scenes"):
        curves = {}
        for method, prob in (("none", 1.0), ("S", 1.0), ("S", 0.5)):
            cells = sorted((epochs, mean_error([s["test"] for s in seeds])) for (m, p, epochs, k), seeds in results.items()
                           if (m, p, k) == (method, prob, kind))
            if len(cells) > 1:
                epochs, (means, errors) = [c[0] for c in cells], zip(*(c[1] for c in cells))
                curves["none" if method == "none" else f"S-VideoMix, p = {prob:g}"] = (epochs, means, errors)
        figures.line_chart(run.figures / f"videomix_{kind.replace(' ', '_')}.png", curves, markers=True, logx=True, ylim=(0, 100),
                           title=f"{kind.capitalize()}: accuracy over the length of training", xlabel="epochs", ylabel="%",
                           size=(520, 360), xticks=[(e, str(e)) for e in sorted({c[2] for c in results})])


def draw_mixes(run: harness.Run) -> None:
    """Frames 1, 3, 5 and 7 of the same two clips under every mix."""
    data = synthetic.videos(2, 64, seed=3)
    x = data["videos"].float() / 255
    tiles, titles = [], []
    for name in ("none", "S", "T", "ST", "frame CutMix", "Mixup", "FadeMixup", "CutMixup", "Cutout"):
        mix = augmentation(name, CLASSES)
        if mix is not None:
            mix.pairing = "flip"
        seed = next(s for s in range(100) if mix is None or 0.3 < _changed(mix, x, data["labels"], s) < 0.6)
        mixed = x if mix is None else mix(x, data["labels"], torch.Generator().manual_seed(seed)).x
        tiles += [mixed[0, :, t] for t in (0, 2, 4, 6)]
        titles += [name, "", "", ""]
    figures.image_grid(run.figures / "videomix_mixes.png", tiles, titles, columns=12, cell=72)


def _changed(mix: nn.Module, x: Tensor, y: Tensor, seed: int) -> float:
    """Share of the first clip that the mix changes (for blends: half, if both weigh about the same)."""
    result = mix(x, y, torch.Generator().manual_seed(seed))
    if result.boxes is None:
        return 1 - result.lam
    return (result.x[0] != x[0]).any(0).double().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, ("default", "tiny", "paper"), seeds=5)
    parser.add_argument("--table", choices=TABLES, default="variants")
    run = harness.start(parser, argv)
    run_study(run, {"variants": VARIANTS, "augmentations": AUGMENTATIONS}[run.args.table], run.args.table)


if __name__ == "__main__":
    main()
