"""Time and memory of mixing a batch of clips, and of loading clips from frames.

    python benchmarks/speed_videomix.py                         # batch 16: two minutes
    python benchmarks/speed_videomix.py --batch 64 --threads 1  # 1.2 GB a copy, 4 GB in all
    python benchmarks/speed_videomix.py --batch 64 --device cuda

Mixing: `apply_cuboid` in place and as a copy, against the flip of the whole batch that PyTorchVideo
and PySlowFast use (`x[box] = x.flip(0)[box]`, written out here) and, where installed,
PyTorchVideo's CutMix and torchvision's v2.CutMix themselves. All see the same clips, S boxes of the
same volumes (a third of the clip on average), in turns; medians. Memory is the peak of torch's
allocations during one call, and must not exceed the cuboids of the batch.

Loading: one core's frames a second from JPEG frames (340 x 256) for 8-frame clips of 224 pixels,
against the floor: reading and decoding just the frames needed, at full size and at the size that is
enough.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import timing
import torch
from PIL import Image
from torch import Tensor

from data_tools import video_frames
from reference import videomix as vm

try:
    from torchvision import tv_tensors
    from torchvision.transforms import functional
    from torchvision.transforms import v2 as torchvision_transforms
except Exception:                                     # not installed, or broken
    torchvision_transforms = None
try:
    # PyTorchVideo 0.1.5 asks for this module by the name it had in older torchvision
    sys.modules.setdefault("torchvision.transforms.functional_tensor", functional)
    import pytorchvideo.transforms.mix as pytorchvideo_mix
except Exception:
    pytorchvideo_mix = None


def flip_peer(x: Tensor, box: vm.Box) -> Tensor:
    """What the flip-based packages do, in place: the whole batch is copied, then the box
    written."""
    t1, t2, h1, h2, w1, w2 = box
    x[:, :, t1:t2, h1:h2, w1:w2] = x.flip(0)[:, :, t1:t2, h1:h2, w1:w2]
    return x


def ways(x: Tensor, labels: Tensor, boxes: list[vm.Box], per_sample: Tensor) -> dict[str, Callable]:
    """{name: function}; every call takes the next box, and all ways the same ones in turn."""
    flip = torch.arange(len(x) - 1, -1, -1)

    def with_boxes(function: Callable) -> Callable:
        following = itertools.cycle(boxes)
        return lambda: function(next(following))
    out = {"in place": with_boxes(lambda box: vm.apply_cuboid(x, box, flip, inplace=True)),
           "in place, box per clip": lambda: vm.apply_cuboid(x, per_sample, flip, inplace=True),
           "copy": with_boxes(lambda box: vm.apply_cuboid(x, box, flip)),
           "floor of a copy: x.clone()": x.clone,
           "flip-based peer": with_boxes(lambda box: flip_peer(x, box))}
    if pytorchvideo_mix is not None:
        cutmix = pytorchvideo_mix.CutMix(num_classes=10)
        out["PyTorchVideo CutMix"] = lambda: cutmix(x, labels)
    if torchvision_transforms is not None:
        roll = torchvision_transforms.CutMix(num_classes=10)
        frames = tv_tensors.Video(x.transpose(1, 2))
        out["torchvision v2.CutMix"] = lambda: roll(frames, labels)
    return out


def mixing(run: harness.Run, batch: int, size: tuple[int, int, int],
           rounds: int) -> tuple[list[dict], list[dict]]:
    generator = torch.Generator().manual_seed(run.seeds[0])
    x = torch.rand(batch, 3, *size, generator=generator).to(run.device)
    labels = torch.randint(10, (batch,), generator=generator).to(run.device)
    lams = torch.rand(rounds + 1, generator=generator, dtype=torch.float64).tolist()
    boxes = [vm.sample_cuboid(size, lam, "S", generator=generator) for lam in lams]
    middle = vm.sample_cuboid(size, 0.6, "S", center=[side // 2 for side in size])
    per_sample = torch.tensor([vm.sample_cuboid(size, lam, "S", generator=generator)
                               for lam in torch.rand(batch, generator=generator).tolist()])
    table, claims, most = [], [], torch.get_num_threads()
    cuboids = x.numel() * x.element_size() * (1 - vm.cuboid_lambda(middle, size))
    peaks = {name: timing.peak_bytes(function, run.device)
             for name, function in ways(x, labels, [middle], per_sample).items()}
    for threads in dict.fromkeys((1, most) if run.device.type == "cpu" else (most,)):
        torch.set_num_threads(threads)
        times = timing.interleaved(run, ways(x, labels, boxes, per_sample), rounds,
                                   f"{threads} threads")
        medians = timing.medians(times)
        table += [{"way": name, "threads": threads, "ms": 1000 * medians[name],
                   "x in place": medians[name] / medians["in place"],
                   "peak MB": peaks[name] / 1e6, "peak / cuboids": peaks[name] / cuboids}
                  for name in times]
        ratio = timing.ratio(times, "flip-based peer", "in place")
        claims.append({"claim": f"times faster than the flip-based peer, {threads} threads",
                       "paper": None, "this run": ratio, "holds": ratio >= 2 if x.numel() > 1e8
                       else None})
    share = peaks["in place"] / cuboids
    claims.append({"claim": "extra memory in place / cuboids of the batch (at most 1)",
                   "paper": None, "this run": share, "holds": share <= 1})
    torch.set_num_threads(most)
    return table, claims


def python_share(run: harness.Run, size: tuple[int, int, int]) -> dict:
    """Drawing 64 boxes and mixing them, against the copies alone: what the Python loop costs."""
    x, y = torch.zeros(64, 3, *size, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    mix = vm.VideoMix("S", per_sample=True, num_classes=2, inplace=True)
    medians = timing.medians(timing.interleaved(run, {
        "draw": lambda: mix._draw(64, size, torch.arange(64), generator),
        "all": lambda: mix(x, y, generator)}, 20, "boxes"))
    draw, everything = 1000 * medians["draw"], 1000 * medians["all"]
    return {"clips": 64, "ms to draw boxes": draw, "ms in all, uint8": everything,
            "share": draw / everything}


def write_frames(root: Path, videos: int, seed: int) -> None:
    """Videos of 64 frames of 340 x 256 and their index file."""
    rng, rows = np.random.default_rng(seed), []
    for video in range(videos):
        (root / str(video)).mkdir()
        noise = rng.integers(0, 256, (32, 43, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((340, 256), Image.BICUBIC)
        for number in range(64):
            name = root / str(video) / video_frames.FRAME.format(number + 1)
            picture.rotate(number, resample=Image.BILINEAR).save(name, quality=90)
        rows.append((str(video), 64, 0))
    video_frames.write_index(root / "index.txt", rows)


def loading(run: harness.Run, videos: int, rounds: int) -> tuple[list[dict], list[dict]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_frames(root, videos, run.seeds[0])
        half = video_frames.ClipTransform(112, True, (128, 160))
        large = video_frames.VideoFolder(root / "index.txt", 8, 8, train=True)
        small = video_frames.VideoFolder(root / "index.txt", 8, 8, train=True, transform=half)
        loader = video_frames.VideoLoader(large, videos)

        def decode(at_least: Callable | None = None) -> None:
            for video in range(videos):
                (chosen,) = large.indices(64, torch.Generator().manual_seed(video))
                large.open(video).read(chosen, at_least)

        def clips(dataset: video_frames.VideoFolder) -> None:
            for video in range(videos):
                dataset.clip(dataset.open(video), torch.Generator().manual_seed(video))
        functions = {"decode only, full size": decode,
                     "clips of 224": lambda: clips(large),
                     "clips of 224, VideoLoader": lambda: [None for _ in loader],
                     "decode only, half size": lambda: decode(lambda w, h: (w // 2, h // 2)),
                     "clips of 112": lambda: clips(small)}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times = timing.interleaved(run, functions, rounds, "loading")
        torch.set_num_threads(threads)
    floors = {name: "decode only, half size" if "112" in name or "half" in name
              else "decode only, full size" for name in times}
    table = [{"way": name, "frames/s per core": videos * 8 / seconds,
              "ms a frame": 1000 * seconds / (videos * 8),
              "of the decode floor": timing.ratio(times, floors[name], name)}
             for name, seconds in timing.medians(times).items()]
    reached = timing.ratio(times, "decode only, full size", "clips of 224")
    return table, [{"claim": "clips of 224, share of the decode floor's rate", "paper": None,
                    "this run": reached, "holds": None}]


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, data=False, networks=False, figures=False)
    parser.add_argument("--batch", type=harness.count, default=16)
    parser.add_argument("--rounds", type=harness.count, default=15)
    run = harness.start(parser, argv)
    tiny = run.args.preset == "tiny"
    size = (4, 32, 32) if tiny else (32, 224, 224)
    batch, rounds = (4, 3) if tiny else (run.args.batch, run.args.rounds)
    run.log(f"PyTorchVideo {'timed' if pytorchvideo_mix else 'not installed'}, "
            f"torchvision {'timed' if torchvision_transforms else 'not installed'}")
    table, claims = mixing(run, batch, size, rounds)
    share = python_share(run, (4, 16, 16) if tiny else (8, 112, 112))
    loads, more = loading(run, *((2, 2) if tiny else (8, 7)))
    run.finish(claims + more, {"mixing": table, "per-sample boxes": [share], "loading": loads},
               batch=batch, size_thw=size)


if __name__ == "__main__":
    main()
