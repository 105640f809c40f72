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

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import harness
import numpy as np
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
    """{name: function of the round}."""
    flip = torch.arange(len(x) - 1, -1, -1)
    out = {"in place": lambda i: vm.apply_cuboid(x, boxes[i], flip, inplace=True),
           "in place, box per clip": lambda i: vm.apply_cuboid(x, per_sample, flip, inplace=True),
           "copy": lambda i: vm.apply_cuboid(x, boxes[i], flip),
           "flip-based peer": lambda i: flip_peer(x, boxes[i])}
    if pytorchvideo_mix is not None:
        cutmix = pytorchvideo_mix.CutMix(num_classes=10)
        out["PyTorchVideo CutMix"] = lambda i: cutmix(x, labels)
    if torchvision_transforms is not None:
        roll = torchvision_transforms.CutMix(num_classes=10)
        frames = tv_tensors.Video(x.transpose(1, 2))
        out["torchvision v2.CutMix"] = lambda i: roll(frames, labels)
    return out


def clock(function: Callable, number: int, device: torch.device) -> float:
    """Seconds: of the process's CPU time on one thread (other processes do not count), else of the
    wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else time.perf_counter
    began = now()
    function(number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - began


def mixing(run: harness.Run, batch: int, size: tuple[int, int, int],
           rounds: int) -> tuple[list[dict], list[dict]]:
    generator = torch.Generator().manual_seed(run.seeds[0])
    x = torch.rand(batch, 3, *size, generator=generator).to(run.device)
    labels = torch.randint(10, (batch,), generator=generator).to(run.device)
    lams = torch.rand(rounds + 1, generator=generator, dtype=torch.float64).tolist()
    boxes = [vm.sample_cuboid(size, lam, "S", generator=generator) for lam in lams]
    # of the memory figure
    boxes[0] = vm.sample_cuboid(size, 0.6, "S", center=[side // 2 for side in size])
    per_sample = torch.tensor([vm.sample_cuboid(size, lam, "S", generator=generator)
                               for lam in torch.rand(batch, generator=generator).tolist()])
    table, claims, most = [], [], torch.get_num_threads()
    cuboids = x.numel() * x.element_size() * (1 - vm.cuboid_lambda(boxes[0], size))
    for threads in dict.fromkeys((1, most) if run.device.type == "cpu" else (most,)):
        torch.set_num_threads(threads)
        functions = ways(x, labels, boxes, per_sample)
        times = {name: [] for name in functions}
        for number in run.progress(range(rounds + 1), label=f"{threads} threads"):
            for name, function in functions.items():
                times[name].append(clock(function, number, run.device))
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        for name, function in functions.items():
            memory = harness.peak_bytes(lambda: function(0), run.device)
            table.append({"way": name, "threads": threads, "ms": 1000 * medians[name],
                          "x in place": medians[name] / medians["in place"],
                          "peak MB": memory / 1e6, "peak / cuboids": memory / cuboids})
        ratio = statistics.median(p / o for p,
                                  o in zip(times["flip-based peer"][1:], times["in place"][1:]))
        claims.append({"claim": f"times faster than the flip-based peer, {threads} threads",
                       "paper": None, "this run": ratio, "holds": ratio >= 2 if x.numel() > 1e8
                       else None})
    ours = next(row for row in table if row["way"] == "in place")
    claims.append({"claim": "extra memory in place / cuboids of the batch (at most 1)",
                   "paper": None,
                   "this run": ours["peak / cuboids"], "holds": ours["peak / cuboids"] <= 1})
    torch.set_num_threads(most)
    return table, claims


def python_share(run: harness.Run, size: tuple[int, int, int]) -> dict:
    """Drawing 64 boxes and mixing them, against the copies alone: what the Python loop costs."""
    x, y = torch.zeros(64, 3, *size, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
    mix, generator = vm.VideoMix("S", per_sample=True, num_classes=2,
                                 inplace=True), torch.Generator().manual_seed(0)
    times = {"draw": [], "all": []}
    for number in range(20):
        times["draw"].append(clock(lambda i: mix._draw(64, size, torch.arange(64), generator),
                                   number, torch.device("cpu")))
        times["all"].append(clock(lambda i: mix(x, y, generator), number, torch.device("cpu")))
    draw, everything = (1000 * statistics.median(values) for values in times.values())
    return {"clips": 64, "ms to draw boxes": draw, "ms in all, uint8": everything,
            "share": draw / everything}


def loading(run: harness.Run, videos: int, rounds: int) -> tuple[list[dict], list[dict]]:
    rng, rows = np.random.default_rng(run.seeds[0]), []
    seeded = lambda number: torch.Generator().manual_seed(number)      # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        root = harness.Path(folder)
        for video in range(videos):
            (root / str(video)).mkdir()
            noise = rng.integers(0, 256, (32, 43, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((340, 256), Image.BICUBIC)
            for number in range(64):
                name = root / str(video) / video_frames.FRAME.format(number + 1)
                picture.rotate(number, resample=Image.BILINEAR).save(name, quality=90)
            rows.append((str(video), 64, 0))
        video_frames.write_index(root / "index.txt", rows)
        half = video_frames.ClipTransform(112, True, (128, 160))
        index = root / "index.txt"
        large = video_frames.VideoFolder(index, 8, 8, train=True)
        small = video_frames.VideoFolder(index, 8, 8, train=True, transform=half)
        loader = video_frames.VideoLoader(large, videos)

        def decode(number: int, at_least=None) -> None:
            for video in range(videos):
                (chosen,) = large.indices(64, seeded(number))
                large.open(video).read(chosen, at_least)

        def clips(number: int, dataset: video_frames.VideoFolder) -> None:
            for video in range(videos):
                dataset.clip(dataset.open(video), seeded(number))
        functions = {"decode only, full size": decode,
                     "clips of 224": lambda i: clips(i, large),
                     "clips of 224, VideoLoader": lambda i: [None for _ in loader],
                     "decode only, half size": lambda i: decode(i, lambda w, h: (w // 2, h // 2)),
                     "clips of 112": lambda i: clips(i, small)}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times = {name: [] for name in functions}
        for number in run.progress(range(rounds), label="loading"):
            for name, function in functions.items():
                times[name].append(clock(function, number, torch.device("cpu")))
        torch.set_num_threads(threads)
    rate = {name: videos * 8 / statistics.median(values) for name, values in times.items()}
    floors = {name: rate["decode only, half size" if "112" in name or "half" in name
                         else "decode only, full size"] for name in rate}
    table = [{"way": name, "frames/s per core": rate[name], "ms a frame": 1000 / rate[name],
              "of the decode floor": rate[name] / floors[name]}
             for name in rate]
    reached = rate["clips of 224"] / floors["clips of 224"]
    return table, [{"claim": "clips of 224, share of the decode floor's rate", "paper": None,
                    "this run": reached, "holds": None}]


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
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
