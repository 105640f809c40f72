"""Cost of pooled labels: sparse pooling against the dense way, packed store against files.

    python benchmarks/speed_relabel.py           # B = 256, C = 1000, 15 x 15 top-5; a minute
    python benchmarks/speed_relabel.py --batch 1024 --device cuda

Pooling: both ways give the same targets (checked first). The dense way scatters the scores into (B,
1000, 15, 15), calls RoIAlign (torchvision's compiled one when it is installed, else the one of
reference/relabel.py) and a softmax. Two floors: `copies` reads the maps and writes the targets;
`sums` does what sparse pooling cannot do without (classes to integers, scores times weights, one
addition per stored score, one softmax), but finds no weights and checks nothing. Times on one CPU
thread are CPU times of the process, others wall times; calls are interleaved, figures are medians.
Memory is the peak of what torch allocates during a call.

Reading: a batch of maps at random from the packed store, and from one released `.pt` file per
image.
"""

import tempfile
import time
from pathlib import Path

import harness
import timing
import torch

from data_tools.label_maps import LabelMaps, StoreWriter, generate, read_released, unpack
from reference import relabel

try:
    import torchvision
    torchvision.ops.roi_align(torch.zeros(1, 1, 2, 2), torch.zeros(1, 5), 1)
    peer_roi_align, peer = torchvision.ops.roi_align, f"torchvision {torchvision.__version__}"
except Exception:  # not installed, or without its compiled operators
    peer_roi_align, peer = relabel.roi_align, "RoIAlign of relabel.py, no torchvision here"


def dense_pooling(topk: torch.Tensor, coords: torch.Tensor,
                  num_classes: int = 1000) -> torch.Tensor:
    """The released way, axes put right."""
    maps = topk.new_zeros(len(topk), num_classes, *topk.shape[3:])
    maps.scatter_(1, topk[:, 1].long(), topk[:, 0])
    rows, columns = topk.shape[3:]
    top, left, height, width = coords.to(topk.dtype).T
    index = torch.arange(len(topk), dtype=topk.dtype, device=topk.device)
    boxes = torch.stack([index, left * columns, top * rows, (left + width) * columns,
                         (top + height) * rows], 1)
    boxes[:, 1:] -= 0.5
    return peer_roi_align(maps, boxes, (1, 1))[:, :, 0, 0].softmax(1)


def pooling(run: harness.Run, topk, coords, rounds: int) -> tuple[list[dict], dict]:
    """Rows of the table, {threads: ratio of times} and the ratio of memory under "memory"."""
    cells = torch.rand(len(topk), 1, *topk.shape[3:], dtype=torch.float64, device=topk.device)

    def sums():
        out = topk.new_empty(len(topk), 1000)
        for s, c, w, o in zip(*(t.split(43) for t in (topk[:, 0], topk[:, 1], cells, out))):
            values, index = s.double().mul_(w).flatten(1), c.int().long().flatten(1)
            added = values.new_zeros(o.shape).scatter_add_(1, index, values)
            torch.softmax(added, 1, o.dtype, out=o)
        return out
    ways = {"sparse": lambda: relabel.label_pooling(topk, coords),
            "dense": lambda: dense_pooling(topk, coords), "sums": sums,
            "copies": lambda: (topk.clone(), topk.new_ones(len(topk), 1000))}
    table, ratios, every = [], {}, torch.get_num_threads()
    peaks = {name: timing.peak_bytes(function, run.device) for name, function in ways.items()}
    for threads in sorted({1, every}) if run.device.type == "cpu" else (every,):
        torch.set_num_threads(threads)
        times = timing.interleaved(run, ways, rounds, f"pooling, {threads} threads", at_least=0.05)
        table += [{"way": name, "threads": threads, "ms": 1000 * median,
                   "best ms": 1000 * min(times[name]), "peak MB": peaks[name] / 1e6}
                  for name, median in timing.medians(times).items()]
        ratios[threads] = timing.ratio(times, "dense", "sparse")
    torch.set_num_threads(every)
    return table, ratios | {"memory": peaks["dense"] / peaks["sparse"]}


def reading(run: harness.Run, topk, rounds: int) -> list[dict]:
    """Store and files of the same maps in a temporary folder."""
    names = [f"n{row % 10:08d}/n{row % 10:08d}_{row}.JPEG" for row in range(len(topk))]
    with tempfile.TemporaryDirectory() as folder:
        store, tree = Path(folder, "store"), Path(folder, "tree")
        k, height, width = topk.shape[2:]
        writer = StoreWriter(store, names, k=k, height=height, width=width, num_classes=1000)
        maps = topk.cpu().half().float()
        for done in (generate(lambda rows: maps[rows], writer), unpack(store, tree)):
            for _ in done:
                pass
        packed, files = LabelMaps(store), sorted(tree.glob("*/*.pt"))
        order = torch.randperm(len(topk), generator=torch.Generator().manual_seed(0)).tolist()
        ways = {"packed store": lambda: packed[order],
                "one file per image": lambda: torch.stack([read_released(files[i]) for i in order])}
        times = timing.interleaved(run, ways, rounds, "reading", at_least=0.05,
                                   clock=time.perf_counter)
        size = {"packed store": store.rglob("*"), "one file per image": files}
        return [{"maps": name, "ms per batch": 1000 * median,
                 "bytes per image": sum(f.stat().st_size for f in size[name]) / len(topk)}
                for name, median in timing.medians(times).items()]


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, data=False, networks=False)
    parser.add_argument("--batch", type=harness.count, default=256)
    parser.add_argument("--repeats", type=harness.count, default=31)
    run = harness.start(parser, argv)
    tiny = run.args.preset == "tiny"
    batch, repeats = (8, 3) if tiny else (run.args.batch, run.args.repeats)
    generator = torch.Generator().manual_seed(run.seeds[0])
    scores = torch.randn(batch, 5, 15, 15, generator=generator).mul(3).add(8)
    classes = torch.rand(batch, 1000, 15, 15, generator=generator).topk(5, dim=1).indices
    topk = torch.stack([scores.sort(1, descending=True).values, classes.float()], 1).to(run.device)
    crop = relabel.RandomResizedCropWithCoords(224, generator=generator)
    coords = torch.tensor([crop.choose(500, 375) for _ in range(batch)], dtype=torch.float64)
    coords = (coords / torch.tensor([375, 500, 375, 500])).to(run.device)
    # float32 boxes can take one row of samples more or less than float64 ones: such rows may differ
    gaps = (relabel.label_pooling(topk, coords) - dense_pooling(topk, coords)).abs().amax(1)
    agree = float((gaps < 1e-5).float().mean())
    table, ratios = pooling(run, topk, coords, repeats)
    files = reading(run, topk, min(repeats, 5))
    claims = [{"claim": "share of targets that agree to 1e-5", "paper": None, "this run": agree,
               "holds": agree > 0.8}]
    claims += [{"claim": f"times less memory than dense ({peer})" if what == "memory"
                else f"times faster than dense, {what} threads ({peer})", "paper": None,
                "this run": ratio, "holds": None if tiny else ratio >= 100}
               for what, ratio in ratios.items()]
    size = files[0]["bytes per image"] / 1000
    claims += [{"claim": "times faster to read than files", "paper": None, "holds": None,
                "this run": files[1]["ms per batch"] / files[0]["ms per batch"]},
               {"claim": "kB per image (15 x 15, top-5), at most 4.6", "paper": 9.4,
                "this run": size, "holds": None if tiny else size <= 4.6}]
    run.finish(claims, {"pooling": table, "reading": files}, peer=peer,
               floor_bytes=batch * (2 * 5 * 225 * 4 + 1000 * 4))


if __name__ == "__main__":
    main()
