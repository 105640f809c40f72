r"""VideoMix: when mixing cuboids of videos helps a classifier, and when it hurts.

    python benchmarks/videomix.py                        # S, T, ST, p, length: 5 minutes on a core
    python benchmarks/videomix.py --table augmentations  # these and all others: 9 minutes
    python benchmarks/videomix.py --table kinetics       # by backbone: 12 minutes
    python benchmarks/videomix.py --table ssv2           # sampled by segments: 3 minutes
    python benchmarks/videomix.py --table thumos         # actions in time: 5 minutes
    python benchmarks/videomix.py --table ava            # boxes after pretraining: 5 minutes
    torchrun --nproc_per_node=8 benchmarks/videomix.py --table kinetics --data kinetics400 \
        --preset paper --workers 8 --amp bf16

The embedded videos show a square that moves over a still scene; the class is its direction. *Own
scenes*: every clip has another scene, few clips are available, and a network that remembers scenes
fails on new ones. *Class scenes*, the negative control: four in five training clips of a class
share its scene, and the test clips do not. A difference counts as help or harm where the 95 %
interval of the paired differences over the seeds (Student's t) excludes zero. The paper's tables
could not be verified, so its column stays empty.

--data: variants, augmentations, kinetics, ssv2: a folder with train.txt and val.txt, as written by
`python -m data_tools.video_frames`; the trained weights stay in --out. thumos: frames/VIDEO/
(extracted with --fps 10) and annotation/. ava: frames/VIDEO/ (from second 900 on, --fps 30), the
csv files and the action list of v2.2, and --inits with the weights of a kinetics run.
"""

from collections.abc import Callable

import figures
import harness
import numpy as np
import torch
import videomix_real
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from videomix_parts import (CLASSES, METHODS, NETWORKS, ClipNet, Results, Segments, Setting,
                            augmentation, backbone, claims_of, detect, mean_error, sequence_of,
                            table_of, versus)

from data_tools import synthetic, video_frames
from reference import relabel, robustness
from reference import videomix as vm
from reference import videomix_localization as localization

TABLES = ("variants", "augmentations", "kinetics", "ssv2", "thumos", "ava")


# ---------------------------------------------------------------- training and measuring

def fit(run: harness.Run, name: str, model: nn.Module, data: dict[str, Tensor],
        mix: nn.Module | None, epochs: int, seed: int,
        frames: list[int] | None = None) -> nn.Module:
    """Train on embedded videos, through the harness; batch-norm statistics are then those of clean
    clips (of the chosen frames, or all)."""
    wrapped = run.wrap(model)
    loader = synthetic.Batches(data["videos"], data["labels"], batch_size=50 - 50 % run.world_size,
                               seed=seed, transform=synthetic.to_float, rank=run.rank,
                               world_size=run.world_size)
    generator = torch.Generator().manual_seed(seed * run.world_size + run.rank)
    steps = vm.train(wrapped, loader, mix, epochs, generator=generator, amp_dtype=run.amp_dtype,
                     resume=run.resumed(name))
    run.drive(name, steps, total=epochs * len(loader))
    update_bn((x if frames is None else x[:, :, frames] for x, _ in loader), model, run.device)
    return model


@torch.no_grad()
def predict(model: nn.Module, data: dict[str, Tensor], frames: list[int] | None = None) -> Tensor:
    """(N, K) logits of embedded videos, on the CPU; of the chosen frames, or all."""
    device = next(model.parameters()).device
    model.eval()
    videos = data["videos"] if frames is None else data["videos"][:, :, frames]
    return torch.cat([model(synthetic.to_float(part.to(device))).float().cpu()
                      for part in videos.split(200)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def measure(model: nn.Module, train: dict, test: dict, biased: dict | None = None,
            frames: list[int] | None = None) -> dict[str, float]:
    """Accuracies in %, calibration error; and with `biased` clips (scenes as in training) the scene
    reliance: how often the prediction is the scene's class, where that is not the clip's."""
    logits = predict(model, test, frames)
    row = {"train": accuracy(predict(model, train, frames), train["labels"]),
           "test": accuracy(logits, test["labels"]),
           "ECE": 100 * robustness.expected_calibration_error(logits, test["labels"])}
    if biased is not None:
        conflict = test["scenes"] != test["labels"]
        row["biased test"] = accuracy(predict(model, biased), biased["labels"])
        row["scene reliance"] = accuracy(logits[conflict], test["scenes"][conflict])
    return row


# ---------------------------------------------------------------- classification of embedded videos

SIZES = {"default": {"count": 600, "tests": 1000, "epochs": 20, "side": 16},
         "tiny": {"count": 40, "tests": 40, "epochs": 1, "side": 16},
         "paper": {"count": 5000, "tests": 5000, "epochs": 60, "side": 64}}
EMBEDDED = ("slowonly18", "slowfast18", "tsm18", "ClipNet")


def settings_of(table: str, epochs: int) -> list[Setting]:
    """What a table compares. variants: S, T, ST, p and the length of training on own scenes, and
    the control, whose class scenes are trained for half the epochs (the short schedule) and twice.
    augmentations: these, and every other augmentation."""
    def cell(method="none", p=1.0, times=1.0, videos="own scenes", network="ClipNet"):
        return Setting(method, p, max(1, round(times * epochs)), videos, network)
    if table == "kinetics":
        return [cell(method, network=network) for network in EMBEDDED for method in ("none", "S")]
    if table == "ssv2":
        return [cell(method, videos="segments", network="ClipNet fine")
                for method in ("none", "S", "flip")]
    variants = [*(cell(method) for method in METHODS[:4]), cell("S", 0.5), cell(times=4),
                cell("S", times=4),
                *(cell(method, times=0.5, videos="class scenes") for method in METHODS[:4]),
                *(cell(method, times=2, videos="class scenes") for method in METHODS[:2])]
    others = [cell(method) for method in METHODS[4:]]
    return variants + others if table == "augmentations" else variants


def scene_sets(kind: str, size: dict, seed: int) -> tuple[dict, dict, dict | None]:
    """Training clips, test clips, and for class scenes also test clips with the scenes of training.
    Segments are chosen from clips of three times the frames at a third of the speed."""
    def draw(count, offset, rho):
        more = {"frames": 24, "speed": 2 / 3} if kind == "segments" else {}
        return synthetic.videos(count, size["side"], seed=10 * seed + offset, rho=rho, **more)
    if kind == "class scenes":
        return draw(size["count"], 0, 0.8), draw(size["tests"], 1, 0.0), draw(size["tests"], 2, 0.8)
    return draw(size["count"], 0, None), draw(size["tests"], 1, None), None


def study(run: harness.Run, settings: list[Setting]) -> Results:
    """Every setting for every seed; all settings of a seed share the data and the first weights."""
    size, results = SIZES[run.args.preset], {}
    for seed in run.seeds:
        sets = {}
        for setting in dict.fromkeys(settings):
            name = f"{setting.name}-seed{seed}"
            if (row := run.recorded(name)) is None:
                kind = setting.videos
                if kind not in sets:
                    sets[kind] = scene_sets(kind, size, seed)
                mix = augmentation(setting.augmentation, CLASSES, setting.p)
                frames = None
                if kind == "segments":
                    mix, frames = Segments(mix, 8, CLASSES), video_frames.segment_indices(24, 8)
                model = backbone(setting.backbone, CLASSES, seed, embedded=True)
                model = fit(run, name, model, sets[kind][0], mix, setting.epochs, seed, frames)
                row = run.record(name, measure(model, *sets[kind], frames=frames))
            results.setdefault(setting, []).append(row)
    return results


def classify(run: harness.Run) -> None:
    """Tables variants, augmentations, kinetics and ssv2 on embedded videos."""
    table, epochs = run.args.table, SIZES[run.args.preset]["epochs"]
    results = study(run, settings_of(table, epochs))
    tables = {table: table_of(results, ("train", "test", "ECE"), "test")}
    if table in ("variants", "augmentations"):        # the second holds the first
        every = {s: seeds for s, seeds in results.items() if s[1:4] == (1.0, epochs, "own scenes")}
        of_variants = {s: results[s] for s in settings_of("variants", epochs)}
        columns = ("train", "test", "ECE", "biased test", "scene reliance")
        tables = {"variants": table_of(of_variants, columns, "test")}
        if table == "augmentations":
            tables["augmentations"] = table_of(every, ("train", "test", "ECE"), "test")
    claims = claims_of(results, "test")
    for setting, seeds in results.items():
        if table == "ssv2" and setting.augmentation == "flip":
            text, effect = versus([s["test"] for s in seeds],
                                  [s["test"] for s in results[setting.base]])
            claims.append({"claim": f"a flip hurts where left and right differ: {setting.backbone}",
                           "paper": None,
                           "this run": text, "holds": {"hurts": True, "helps": False}.get(effect)})
    if run.figures and run.is_main:
        draw_study(run, results)
    run.finish(claims, tables)


def draw_study(run: harness.Run, results: Results) -> None:
    """Accuracy by augmentation and by length of training; and the mixed clips themselves."""
    scores = {setting: mean_error([s["test"] for s in seeds]) for setting, seeds in results.items()}
    epochs, table = SIZES[run.args.preset]["epochs"], run.args.table
    if table == "augmentations":
        cells = {s: score for s, score in scores.items() if s[1:4] == (1.0, epochs, "own scenes")}
        short = [s.augmentation.replace("RandAugment", "RandAug").replace("frame", "fr.")
                 for s in cells]
        figures.bar_chart(run.figures / "videomix_augmentations.png", short,
                          {"accuracy": tuple(zip(*cells.values()))}, ylim=(0, 100),
                          size=(1000, 360), ylabel="%",
                          title="Accuracy on clips with new scenes (mean and standard error)")
        draw_mixes(run)
    if table in ("variants", "augmentations"):
        curves = {}
        for kind in ("own scenes", "class scenes"):
            for method in ("none", "S"):
                cells = sorted((s.epochs, score) for s, score in scores.items()
                               if s[:2] == (method, 1.0) and s.videos == kind)
                lengths, pairs = zip(*cells)
                name = f"{kind}, {'S-VideoMix' if method == 'S' else 'none'}"
                curves[name] = (lengths, *zip(*pairs))
        figures.line_chart(run.figures / "videomix_lengths.png", curves, markers=True, logx=True,
                           ylim=(0, 100),
                           title="Accuracy on new scenes over the length of training",
                           xlabel="epochs",
                           ylabel="%", xticks=[(e, str(e))
                                               for e in sorted({s.epochs for s in scores})])


def draw_mixes(run: harness.Run) -> None:
    """Frames 1, 3, 5 and 7 of the same two clips under every mix."""
    data = synthetic.videos(2, 48, seed=3, noise=0.0)
    x = data["videos"].float() / 255
    tiles, titles = [], []
    for name in METHODS[:9]:
        mix = augmentation(name, CLASSES)
        if mix is not None:
            mix.pairing = "flip"
        seed = next(s for s in range(1000) if mix is None
                    or 0.3 < _changed(mix, x, data["labels"], s) < 0.6)
        mixed = x if mix is None else mix(x, data["labels"], torch.Generator().manual_seed(seed)).x
        tiles += [mixed[0, :, t] for t in (0, 2, 4, 6)]
        titles += [name.replace("frame", "fr."), "", "", ""]
    figures.image_grid(run.figures / "videomix_mixes.png", tiles, titles, columns=12, cell=72)


def _changed(mix: nn.Module, x: Tensor, y: Tensor, seed: int) -> float:
    """Weight of the second clip in a blend, else the share of the first that is pasted over."""
    result = mix(x, y, torch.Generator().manual_seed(seed))
    if isinstance(mix, vm.CutMixup):                      # not its plain blends
        return 0.0 if result.boxes is None else 1 - vm.cuboid_lambda(result.boxes, x.shape[2:])
    if result.boxes is None:
        return 1 - result.lam
    return (result.x[0] != x[0]).any(0).double().mean().item()


# ---------------------------------------------------------------- localisation in embedded videos

LOCALIZERS = ("none", "Mixup", "frame CutMix", "S", "T", "ST")


def localize(run: harness.Run, videos: str, train_and_measure: Callable) -> Results:
    """`train_and_measure(setting, seed, name)` for every augmentation of the localisation
    tables."""
    results = {}
    for seed in run.seeds:
        for method in LOCALIZERS:
            setting = Setting(method, 1.0, SIZES[run.args.preset]["epochs"], videos, "ClipNet")
            name = f"{setting.name}-seed{seed}"
            if (row := run.recorded(name)) is None:
                row = run.record(name, train_and_measure(setting, seed, name))
            results.setdefault(setting, []).append(row)
    return results


def actions_in_time(run: harness.Run) -> None:
    """Table thumos: untrimmed videos of twice the action, trained with the video's label; its class
    activation sequence, cut into segments, against the true interval."""
    size = SIZES[run.args.preset]

    def train_and_measure(setting: Setting, seed: int, name: str) -> dict[str, float]:
        train, test = (synthetic.videos(count, size["side"], 16, 10 * seed + part, action_frames=8)
                       for part, count in enumerate((size["count"], size["tests"] // 2)))
        mix = augmentation(setting.augmentation, CLASSES)
        model = fit(run, name, ClipNet(seed=seed, fine=True), train, mix, setting.epochs, seed)
        found = [detect(model, synthetic.to_float(video)) for video in test["videos"]]
        truths = [(span.unsqueeze(0), label.view(1))
                  for span, label in zip(test["intervals"], test["labels"])]
        shown = setting.augmentation in ("none", "S") and seed == run.seeds[0]
        if run.figures and run.is_main and shown:
            draw_sequences(run, setting.augmentation, model, test)
        scores = localization.detection_ap(found, truths)
        return measure(model, train, test) | {key: 100 * value for key, value in scores.items()}
    results = localize(run, "untrimmed", train_and_measure)
    columns = ("test", "mAP@0.3", "mAP@0.5", "mAP@0.7", "mAP")
    run.finish(claims_of(results, "mAP", "localises above none"),
               {"thumos": table_of(results, columns, "mAP")})


def draw_sequences(run: harness.Run, method: str, model: nn.Module, test: dict) -> None:
    """The class activation sequences of two videos, with the true interval and the best segment."""
    for number in (0, 1):
        sequence, _ = sequence_of(model, synthetic.to_float(test["videos"][number]))
        label, (start, end) = int(test["labels"][number]), test["intervals"][number].tolist()
        low, high, frames = sequence.min().item(), sequence.max().item(), sequence.shape[1]
        chart = figures.Chart((0, frames), (low, high + 0.3 * (high - low)), size=(420, 260),
                              xlabel="frame",
                              title=f"Class activation, trained with {method} (video {number})")
        names = {label: "true class", (label + 1) % CLASSES: "other classes"}
        for k in range(CLASSES):
            color = figures.COLORS[0] if k == label else "#bbbbbb"
            chart.line(np.arange(frames) + 0.5, sequence[k], color, names.get(k, ""))
        segments, _ = localization.localize_actions(sequence[label])
        bars = [("true interval", [start, end], figures.COLORS[2], 0.12)]
        bars += [("found", best.tolist(), figures.COLORS[1], 0.06) for best in segments[:1]]
        for name, ends, color, level in bars:
            chart.line(ends, [high + level * (high - low)] * 2, color, name, width=4)
        chart.save(run.figures / f"videomix_sequence_{method}_{number}.png")


def actions_of_boxes(run: harness.Run) -> None:
    """Table ava: a network is pretrained with or without mixing, its features are kept, and a
    linear layer on those of the actor's box in the key frame learns the actions from few boxes; and
    how much of the class activation map's positive part lies on the actor."""
    size = SIZES[run.args.preset]

    def train_and_measure(setting: Setting, seed: int, name: str) -> dict[str, float]:
        train, test, _ = scene_sets("own scenes", size, seed)
        few = synthetic.videos(max(20, size["count"] // 6), size["side"], seed=10 * seed + 3)
        mix = augmentation(setting.augmentation, CLASSES)
        model = fit(run, name, ClipNet(seed=seed, fine=True), train, mix, setting.epochs, seed)
        return measure(model, train, test) | {"mAP@0.5": 100 * box_map(model, few, test),
                                              "CAM on actor": 100 * energy_on_actor(model, test)}
    results = localize(run, "own scenes", train_and_measure)
    claims = (claims_of(results, "mAP@0.5", "pretrains above none")
              + claims_of(results, "CAM on actor", "looks at the actor above none"))
    run.finish(claims, {"ava": table_of(results, ("test", "mAP@0.5", "CAM on actor"), "mAP@0.5")})


def features_of(model: nn.Module, videos: Tensor) -> Tensor:
    """The last maps (N, C, T', h, w) of embedded videos."""
    return model.forward_features(synthetic.to_float(videos.to(next(model.parameters()).device)))


@torch.no_grad()
def box_features(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """(N, C) RoIAligned features of each clip's actor in the key frame (the middle one)."""
    model.eval()
    maps = torch.cat([features_of(model, part).mean(2) for part in data["videos"].split(200)])
    side, key = data["videos"].shape[-1], data["videos"].shape[2] // 2
    boxes = data["boxes"][:, key].clamp(max=side).to(maps)      # at the border: its first part
    rows = torch.cat([torch.arange(len(maps)).unsqueeze(1).to(maps), boxes], 1)
    return relabel.roi_align(maps, rows, 1, maps.shape[-1] / side, aligned=True).flatten(1)


def box_map(model: nn.Module, few: dict, test: dict) -> float:
    """mAP@0.5 of the boxes of `test`, after logistic regression (sigmoid, L2 of 1e-3) on those of
    `few`."""
    x, target = box_features(model, few), F.one_hot(few["labels"], CLASSES).float()
    mean, std = x.mean(0), x.std(0) + 1e-3
    head = nn.Linear(x.shape[1], CLASSES).to(x.device)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(head((x - mean) / std), target.to(x.device))
        value = value + 1e-3 * head.weight.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    with torch.no_grad():
        scores = head((box_features(model, test) - mean) / std).sigmoid().cpu()
    boxes, every = test["boxes"][:, test["videos"].shape[2] // 2].double(), torch.arange(CLASSES)
    found = [(box.expand(CLASSES, 4), every, score) for box, score in zip(boxes, scores)]
    truths = [(box.unsqueeze(0), label.view(1)) for box, label in zip(boxes, test["labels"])]
    return localization.detection_ap(found, truths, (0.5,), rule="ava")["mAP@0.5"]


@torch.no_grad()
def energy_on_actor(model: nn.Module, data: dict[str, Tensor]) -> float:
    """Share of the positive part of the true class's activation map that lies on the actor (a
    uniform map would have the actor's share of the picture, 1/16)."""
    model.eval()
    shares = []
    for videos, labels, masks in zip(*(data[key].split(200)
                                       for key in ("videos", "labels", "masks"))):
        features = features_of(model, videos)
        maps = localization.class_activation_maps(features, model.fc.weight, model.fc.bias)
        maps = maps[torch.arange(len(labels)), labels].clamp(min=0).cpu()
        maps = F.interpolate(maps.unsqueeze(1), masks.shape[1:], mode="trilinear")[:, 0]
        shares.append((maps * masks).sum((1, 2, 3)) / maps.sum((1, 2, 3)).clamp(min=1e-9))
    return torch.cat(shares).mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, ("default", "tiny", "paper"), seeds=5)
    parser.add_argument("--table", choices=TABLES, default="variants")
    real = parser.real
    real.add_argument("--networks", nargs="+", choices=NETWORKS, help="(default: the table's)")
    real.add_argument("--methods", nargs="+", choices=METHODS[:-1], help="(default: the table's)")
    real.add_argument("--p", type=float, default=1.0, help="how often to mix")
    real.add_argument("--epochs", type=harness.count, help="(default: the preset's)")
    real.add_argument("--batch-size", type=harness.count, default=64,
                      help="clips, of all processes together")
    real.add_argument("--init", type=harness.Path,
                      help="checkpoint to start from; 2-D ones are inflated")
    real.add_argument("--inits", type=harness.Path, nargs="+", help="one checkpoint a method (ava)")
    real.add_argument("--fps", type=float, default=10.0,
                      help="of the extracted frames (thumos, ava)")
    args = parser.parse_args(argv)
    if not args.p <= 1 or args.fps == 0:
        parser.error(f"--p must be at most 1 and --fps positive, not {args.p} and {args.fps}")
    content = None
    if args.data is not None:
        try:
            content = videomix_real.read(args)            # before anything opens --out
        except (OSError, ValueError) as error:
            parser.error(str(error))
    run = harness.start(parser, argv)
    if content is not None:
        videomix_real.TABLES.get(run.args.table, videomix_real.classify)(run, *content)
    else:
        {"thumos": actions_in_time, "ava": actions_of_boxes}.get(run.args.table, classify)(run)


if __name__ == "__main__":
    main()
