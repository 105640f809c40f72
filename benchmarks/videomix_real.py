"""The VideoMix tables on real videos; started by `videomix.py --data DIR`: `read` what the table
needs, then `TABLES`."""

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import harness
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from videomix_parts import (METHODS, Results, Setting, augmentation, backbone, claims_of,
                            segments_of, sequence_of, table_of)

from data_tools import video_annotations, video_frames
from reference import relabel, video_resnet
from reference import videomix as vm
from reference import videomix_localization as localization


class Recipe(NamedTuple):
    """How a set is sampled, trained and tested: SGD with 0.1 per 64 clips, warm-up, cosine."""

    mode: str
    frames: int
    stride: int
    size: int
    jitter: tuple[int, int]
    flip: float
    epochs: int
    warmup: int
    views: tuple[int, int]                            # clips and crops of a test video


RECIPES = {                                           # paper: SlowFast's; never a flip for SSv2
    "paper": {"dense": Recipe("dense", 8, 8, 224, (256, 320), 0.5, 196, 34, (10, 3)),
              "segments": Recipe("segments", 8, 1, 224, (256, 320), 0.0, 50, 2, (2, 3))},
    "default": {"dense": Recipe("dense", 8, 8, 112, (128, 160), 0.5, 30, 3, (3, 1)),
                "segments": Recipe("segments", 8, 1, 112, (128, 160), 0.0, 30, 3, (1, 1))},
    "tiny": {"dense": Recipe("dense", 4, 2, 16, (18, 24), 0.5, 1, 0, (2, 1)),
             "segments": Recipe("segments", 4, 1, 16, (18, 24), 0.0, 1, 0, (1, 1))}}
REAL = {"variants": (("slowonly50",), METHODS[:4]),
        "augmentations": (("slowonly50",), METHODS[:-1]),
        "kinetics": (("slowonly50", "slowfast50"), ("none", "S")),
        "ssv2": (("tsm50", "slowonly50"), ("none", "S")),
        "thumos": (("slowonly50",), ("none", "Mixup", "frame CutMix", "S", "T"))}


def read(args: argparse.Namespace) -> tuple:
    """What the table needs of --data, before a folder is opened or a network trained: errors are
    ValueError and OSError."""
    for path in [*([args.init] if args.init else []), *(args.inits or [])]:
        if not isinstance(harness.read_tensors(path), dict):
            raise ValueError(f"{path}: holds no state dict")
    if args.inits and args.table != "ava":
        raise ValueError("--inits goes with --table ava")
    return {"thumos": read_thumos, "ava": read_ava}.get(args.table, read_labels)(args)


def recipe_of(args: argparse.Namespace, network: str) -> Recipe:
    """The recipe of the table; SlowFast's fast pathway sees four times the frames."""
    recipe = RECIPES[args.preset]["segments" if args.table == "ssv2" else "dense"]
    if network.startswith("slowfast"):
        recipe = recipe._replace(frames=4 * recipe.frames, stride=max(1, recipe.stride // 4))
    return recipe._replace(epochs=args.epochs or recipe.epochs)


def fit_real(run: harness.Run, setting: Setting, recipe: Recipe, seed: int, classes: int,
             index: harness.Path, root: harness.Path) -> nn.Module:
    """Train on the videos of an index file; batch-norm statistics are then those of clean clips."""
    method, name = setting.augmentation, f"{setting.name}-seed{seed}"
    augment = None
    if method.startswith("RandAugment"):
        augment = vm.RandAugment(consistent="frame" not in method)
    transform = video_frames.ClipTransform(recipe.size, True, recipe.jitter, recipe.flip,
                                           augment=augment)
    videos = video_frames.VideoFolder(index, recipe.frames, recipe.stride, recipe.mode, True,
                                      transform, root=root)
    batch = run.args.batch_size
    loader = video_frames.VideoLoader(
        videos, max(2, batch // run.world_size), shuffle=True, seed=seed, workers=run.args.workers,
        drop_last=len(videos) >= batch, rank=run.rank, world_size=run.world_size, device=run.device)
    model = backbone(setting.backbone, classes, seed, embedded=False)
    if run.args.init is not None:
        state = harness.read_tensors(run.args.init)
        inflating = isinstance(model, video_resnet.SlowOnly) and "conv1.weight" in state
        run.log(f"{run.args.init.name}: not loaded: ",
                video_resnet.inflate(model, state) if inflating else load_fitting(model, state))
    wrapped = run.wrap(model)
    mix = augmentation(method, classes, setting.p) if augment is None else None
    generator = torch.Generator().manual_seed(seed * run.world_size + run.rank)
    steps = vm.train(wrapped, loader, mix, recipe.epochs, lr=0.1 * batch / 64, generator=generator,
                     warmup_epochs=recipe.warmup, amp_dtype=run.amp_dtype, resume=run.resumed(name))
    run.drive(name, steps, total=recipe.epochs * len(loader))
    update_bn(islice(loader, 200), model, run.device)
    run.save(name, model.state_dict())
    return model


def load_fitting(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Load what has the model's names and shapes (a classifier of other classes stays out)."""
    state = video_resnet.tsm_names(state.get("model_state", state.get("state_dict", state)))
    own = model.state_dict()
    fitting = {name: value for name, value in state.items()
               if name in own and own[name].shape == value.shape}
    if not fitting:
        names = ", ".join(list(state)[:3])
        raise ValueError(f"no parameter fits; the checkpoint holds {names}, ...")
    model.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def every_real(run: harness.Run, train_and_measure: Callable) -> Results:
    """`train_and_measure(setting, recipe, seed)` for every network, augmentation and seed."""
    networks, methods = REAL[run.args.table]
    results = {}
    for seed in run.seeds:
        for network in run.args.networks or networks:
            recipe = recipe_of(run.args, network)
            for method in run.args.methods or methods:
                p = 1.0 if method == "none" else run.args.p
                setting = Setting(method, p, recipe.epochs, run.args.data.name, network)
                name = f"{setting.name}-seed{seed}"
                if (row := run.recorded(name)) is None:
                    row = run.record(name, train_and_measure(setting, recipe, seed))
                results.setdefault(setting, []).append(row)
    return results


def read_labels(args: argparse.Namespace) -> tuple[int]:
    """The number of classes in train.txt and val.txt."""
    rows = [video_frames.read_index(args.data / part) for part in ("train.txt", "val.txt")]
    return (1 + max(label for part in rows for *_, label in part),)


def classify(run: harness.Run, classes: int) -> None:
    """Tables variants, augmentations, kinetics and ssv2 on the videos of train.txt and val.txt."""
    data = run.args.data

    def train_and_measure(setting: Setting, recipe: Recipe, seed: int) -> dict[str, float]:
        model = fit_real(run, setting, recipe, seed, classes, data / "train.txt", data)
        clips, crops = recipe.views
        side = recipe.jitter[0]                       # the whole short side: fully convolutional
        videos = video_frames.VideoFolder(
            data / "val.txt", recipe.frames, recipe.stride, recipe.mode, num_clips=clips,
            transform=video_frames.ClipTransform(side, crops=crops))
        loader = video_frames.VideoLoader(
            videos, max(1, run.args.batch_size // (clips * crops)), workers=run.args.workers,
            rank=run.rank, world_size=run.world_size, device=run.device)
        share = len(range(run.rank, len(videos), run.world_size))       # may be empty
        scores = vm.evaluate(model, loader, clips, crops) if share else {"top1": 0, "top5": 0}
        return run.mean({key: 100 * value for key, value in scores.items()}, share)
    results = every_real(run, train_and_measure)
    run.finish(claims_of(results, "top1"),
               {run.args.table: table_of(results, ("top1", "top5"), "top1")})


def read_thumos(args: argparse.Namespace) -> tuple[str, list, int, list[str], list[tuple]]:
    """How much there is; rows of an index of the validation videos, with the commonest class of
    each, and the number of classes; the test videos that have frames, and their actions."""
    data, networks = args.data, args.networks or ()
    if any(network.startswith("slowfast") for network in networks):
        raise ValueError("--table thumos needs networks with one map over time: not slowfast")
    (train, names), (test, others) = (video_annotations.read_thumos14(data / "annotation", part)
                                      for part in ("val", "test"))
    number = {name: i for i, name in enumerate(dict.fromkeys(names + others))}
    labels = [(video, int(np.bincount([a.label for a in actions]).argmax()))
              for video, actions in train.items()]
    rows, _ = video_frames.make_index(data / "frames", labels)
    known = [video for video in test if (data / "frames" / video).is_dir()]
    if not rows or not known:
        raise ValueError(f"{data / 'frames'}: needs frames of videos of both parts")
    truths = [(torch.tensor([[a.start, a.end] for a in test[video]]),
               torch.tensor([number[others[a.label]] for a in test[video]])) for video in known]
    there = (f"{len(rows)} of {len(train)} videos to learn from and {len(known)} of {len(test)} to "
             "localise in have frames")
    return there, rows, len(names), known, truths


def actions_in_time(run: harness.Run, there: str, rows: list[tuple], classes: int,
                    known: list[str], truths: list[tuple]) -> None:
    """Table thumos: random clips of the validation videos with the video's commonest class;
    sequences of consecutive clips of the test videos, against their annotation."""
    data, fps = run.args.data, run.args.fps
    run.log(there)
    if run.is_main:
        video_frames.write_index(run.out / "thumos_train.txt", rows)
    run.barrier()

    def train_and_measure(setting: Setting, recipe: Recipe, seed: int) -> dict[str, float]:
        model = fit_real(run, setting, recipe, seed, classes, run.out / "thumos_train.txt",
                         data / "frames")
        found = []
        for video in run.progress(known, label="localising"):
            sequence = long_sequence(model, video_frames.open_video(data / "frames" / video),
                                     recipe)
            segments, labels, scores = segments_of(sequence, sequence.mean(1).softmax(0))
            found.append((segments / fps, labels, scores))
        return {key: 100 * value for key, value in localization.detection_ap(found, truths).items()}
    results = every_real(run, train_and_measure)
    columns = tuple(f"mAP@0.{tenth}" for tenth in range(1, 10)) + ("mAP",)
    run.finish(claims_of(results, "mAP", "localises above none"),
               {"thumos": table_of(results, columns, "mAP")})


def long_sequence(model: nn.Module, video: video_frames.FrameFolder, recipe: Recipe) -> Tensor:
    """(K, frames) class activation sequences of a long video, clip after clip; every `stride`
    frames are seen by their middle one."""
    span, transform = recipe.frames * recipe.stride, video_frames.ClipTransform(recipe.jitter[0])
    parts = []
    for start in range(0, video.count, span):
        middles = range(start + recipe.stride // 2, start + span, recipe.stride)
        chosen = [min(middle, video.count - 1) for middle in middles]
        (frames,) = transform(lambda size: video.read(chosen, size))
        sequence, _ = sequence_of(model, video_frames.to_clips(torch.from_numpy(frames)))
        parts.append(F.interpolate(sequence.unsqueeze(0), span, mode="linear")[0])
    return torch.cat(parts, 1)[:, :video.count]


# ---------------------------------------------------------------- actions of boxes (AVA)

AVA_START, AVA_ACTIONS = 900, 80                      # first second of the frames; classes, from 1
AVA_NETWORK, AVA_METHODS = ["slowonly50"], ["none", "S"]


class KeyframeClips(torch.utils.data.Dataset):
    """Clips around the key frames of the videos that are in `root`, scaled to side x 4/3 side:
    uint8 (T, H, W, 3), boxes (N, 4) in pixels and targets (N, 80) of the people in the middle."""

    def __init__(self, moments: list[video_annotations.Keyframe], root: harness.Path,
                 recipe: Recipe, fps: float):
        self.counts = {video: video_frames.count_frames(root / video)
                       for video in {m.video for m in moments} if (root / video).is_dir()}
        self.moments = [m for m in moments if self.counts.get(m.video)]
        if not self.moments:
            raise ValueError(f"{root}: holds frames of none of the {len(moments)} key frames")
        self.root, self.recipe, self.fps = root, recipe, fps
        self.size = (round(recipe.jitter[0] * 4 / 3), recipe.jitter[0])

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        moment, recipe = self.moments[number], self.recipe
        video = video_frames.open_video(self.root / moment.video, self.counts[moment.video])
        middle = int((moment.seconds - AVA_START) * self.fps)
        around = middle + (np.arange(recipe.frames) - recipe.frames // 2) * recipe.stride
        chosen = around.clip(0, video.count - 1).tolist()
        images = video.read(chosen, lambda width, height: self.size)
        clip = np.stack([np.asarray(image.resize(self.size)) for image in images])
        boxes = torch.from_numpy(moment.boxes * np.tile(self.size, 2)).float()
        target = torch.zeros(len(boxes), AVA_ACTIONS)
        for row, actions in zip(target, moment.actions):
            row[torch.tensor(actions) - 1] = 1
        return torch.from_numpy(clip), boxes, target


def collate(samples: list[tuple]) -> tuple[Tensor, Tensor, Tensor]:
    """Clips (B, T, H, W, 3); rows (image, x0, y0, x1, y1) and targets of all their boxes."""
    clips, boxes, targets = zip(*samples)
    rows = [torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(boxes)]
    return torch.stack(clips), torch.cat(rows), torch.cat(targets)


class BoxNet(nn.Module):
    """The features under each box (RoIAlign 7 x 7 after the mean over time, largest value), then a
    linear layer: logits (boxes, 80)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.head = network, nn.LazyLinear(AVA_ACTIONS)

    def forward(self, clips: Tensor, rows: Tensor) -> Tensor:
        maps = self.network.forward_features(clips)
        maps = [m.mean(2) for m in (maps if isinstance(maps, tuple) else (maps,))]
        scales = [m.shape[-1] / clips.shape[-1] for m in maps]
        pooled = [relabel.roi_align(m, rows, 7, scale, aligned=True).amax((2, 3))
                  for m, scale in zip(maps, scales)]
        return self.head(torch.cat(pooled, 1))


def train_boxes(model: BoxNet, loader: torch.utils.data.DataLoader, epochs: int, lr: float,
                seed: int, resume: dict | None = None) -> Iterator[dict]:
    """SGD with a cosine on the sigmoid cross-entropy; yields and snapshots like `vm.train`."""
    device, total, step = next(model.network.parameters()).device, epochs * len(loader), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        step = resume["step"]
    for epoch in range(step // len(loader), epochs):
        loader.generator.manual_seed(1000 * seed + epoch)
        for batch, (clips, rows, target) in enumerate(loader):
            if epoch * len(loader) + batch < step:
                continue
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
            logits = model(video_frames.to_clips(clips.to(device)), rows.to(device))
            loss = F.binary_cross_entropy_with_logits(logits, target.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            request = yield {"step": step, "loss": loss.item()}
            while request == "state":
                request = yield {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                 "step": step}


def read_ava(args: argparse.Namespace) -> tuple[str, KeyframeClips, KeyframeClips, list[int]]:
    """How much there is; key frames to train on and to test on, and the numbers of the evaluated
    classes."""
    data, methods = args.data, args.methods or AVA_METHODS
    if len(args.inits or ()) != len(methods):
        raise ValueError(f"--table ava needs --inits: a checkpoint for each of {methods}")
    moments = [video_annotations.read_ava(
        data / f"ava_{part}_v2.2.csv", data / f"ava_{part}_excluded_timestamps_v2.2.csv")
        for part in ("train", "val")]
    actions = data / "ava_action_list_v2.2_for_activitynet_2019.pbtxt"
    known = sorted(video_annotations.read_ava_classes(actions))
    recipe = recipe_of(args, (args.networks or AVA_NETWORK)[0])
    train, test = (KeyframeClips(part, data / "frames", recipe, args.fps) for part in moments)
    there = (f"{len(train)} of {len(moments[0])} key frames to learn from and {len(test)} of "
             f"{len(moments[1])} to test on have frames")
    return there, train, test, known


def actions_of_boxes(run: harness.Run, there: str, train: KeyframeClips, test: KeyframeClips,
                     known: list[int]) -> None:
    """Table ava: a network from each --init (pretrained without and with VideoMix, named by
    --methods) is trained on the annotated boxes and scores those of the validation videos; mAP at
    IoU 0.5 over the classes of the action list."""
    args, results = run.args, {}
    run.log(there)
    (network, *_), methods = args.networks or AVA_NETWORK, args.methods or AVA_METHODS
    recipe = recipe_of(args, network)._replace(epochs=args.epochs or 20)
    for seed in run.seeds:
        for method, checkpoint in zip(methods, args.inits):
            setting = Setting(method, 1.0, recipe.epochs, args.data.name, network)
            name = f"{setting.name}-seed{seed}"
            if (row := run.recorded(name)) is None:
                model = BoxNet(backbone(network, 2, seed, embedded=False)).to(run.device)
                state = harness.read_tensors(checkpoint)
                run.log(f"{checkpoint.name}: not loaded: {load_fitting(model.network, state)}")
                loaders = [torch.utils.data.DataLoader(
                    videos, args.batch_size, shuffle=videos is train, num_workers=args.workers,
                    collate_fn=collate, generator=torch.Generator()) for videos in (train, test)]
                with torch.no_grad():                 # gives the head its size
                    model.eval()(*as_input(next(iter(loaders[1])), run.device))
                    start = torch.empty(model.head.weight.shape)      # drawn on the CPU
                    start.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
                    model.head.weight.copy_(start), model.head.bias.zero_()
                rate = 0.1 * args.batch_size / 64
                steps = train_boxes(model, loaders[0], recipe.epochs, rate, seed, run.resumed(name))
                run.drive(name, steps, total=recipe.epochs * len(loaders[0]))
                row = run.record(name, {"mAP@0.5": 100 * box_map(model, loaders[1], known)})
            results.setdefault(setting, []).append(row)
    run.finish(claims_of(results, "mAP@0.5", "pretrains above none"),
               {"ava": table_of(results, ("mAP@0.5",), "mAP@0.5")})


def as_input(batch: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    return video_frames.to_clips(batch[0].to(device)), batch[1].to(device)


@torch.no_grad()
def box_map(model: BoxNet, loader: torch.utils.data.DataLoader, classes: list[int]) -> float:
    """mAP@0.5 over `classes` (from 1) with the annotated boxes as detections."""
    model.eval()
    device, labels = next(model.parameters()).device, torch.tensor(classes) - 1
    found, truths = [], []
    for batch in loader:
        scores = model(*as_input(batch, device)).sigmoid().cpu()[:, labels]
        for image in range(len(batch[0])):
            mine = batch[1][:, 0] == image
            boxes, (person, action) = batch[1][mine, 1:], batch[2][mine][:, labels].nonzero().T
            found.append((boxes.repeat_interleave(len(labels), 0), labels.repeat(len(boxes)),
                          scores[mine].flatten()))
            truths.append((boxes[person], labels[action]))
    return localization.detection_ap(found, truths, (0.5,), rule="ava")["mAP@0.5"]


TABLES = {"thumos": actions_in_time, "ava": actions_of_boxes}
