"""Cost of LabelPooling: sparse and separable (this project) against the dense map and RoIAlign of the released code.

    python benchmarks/speed_relabel.py                    # one thread, then all; B = 256, C = 1000, 15 x 15 top-5; a minute
    python benchmarks/speed_relabel.py --batch 1024 --device cuda

Both give the same targets (checked first). The dense way scatters the scores into (B, 1000, 15, 15), calls RoIAlign
(torchvision's compiled one when it is installed, else the one of reference/relabel.py) and a softmax. Memory is the
peak of the allocations during one call. The floor is reading the stored maps and writing the targets.
"""

import statistics
import time

import harness
import torch

from reference import relabel

try:
    import torchvision
    torchvision.ops.roi_align(torch.zeros(1, 1, 2, 2), torch.zeros(1, 5), 1)
    compiled_roi_align = torchvision.ops.roi_align
except Exception:                                             # not installed, or without its compiled operators
    compiled_roi_align = None


def dense_pooling(topk: torch.Tensor, coords: torch.Tensor, num_classes: int = 1000) -> torch.Tensor:
    """The released way, axes put right."""
    maps = topk.new_zeros(len(topk), num_classes, *topk.shape[3:])
    maps.scatter_(1, topk[:, 1].long(), topk[:, 0])
    top, left, height, width = coords.to(topk.dtype).T
    index = torch.arange(len(topk), dtype=topk.dtype, device=topk.device)
    boxes = torch.stack([index, left * 15 - 0.5, top * 15 - 0.5, (left + width) * 15 - 0.5, (top + height) * 15 - 0.5], 1)
    return (compiled_roi_align or relabel.roi_align)(maps, boxes, (1, 1))[:, :, 0, 0].softmax(1)


def peak_bytes(function, device: torch.device) -> int:
    """Peak of the bytes allocated by torch during a call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def measure(function, device: torch.device) -> float:
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    run = harness.start(parser, argv)
    batch, repeats = (8, 3) if run.args.preset == "tiny" else (run.args.batch, run.args.repeats)
    generator = torch.Generator().manual_seed(run.seeds[0])
    scores = torch.randn(batch, 5, 15, 15, generator=generator).mul(3).add(8)
    classes = torch.rand(batch, 1000, 15, 15, generator=generator).topk(5, dim=1).indices
    topk = torch.stack([scores.sort(1, descending=True).values, classes.float()], 1).to(run.device)
    crop = relabel.RandomResizedCropWithCoords(224, generator=generator)
    coords = torch.tensor([(i / 375, j / 500, h / 375, w / 500) for i, j, h, w in (crop.choose(500, 375) for _ in range(batch))],
                          dtype=torch.float64, device=run.device)
    sparse, dense = lambda: relabel.label_pooling(topk, coords), lambda: dense_pooling(topk, coords)      # noqa: E731
    # float32 boxes can take one sample row more or less than float64 ones: such rows may differ
    gaps = (sparse() - dense()).abs().amax(1)
    table, ratios = [], {}
    for threads in ([1, torch.get_num_threads()] if run.device.type == "cpu" and torch.get_num_threads() > 1 else [1]):
        torch.set_num_threads(threads)
        times = {"sparse": [], "dense": []}
        for _ in run.progress(range(repeats), label=f"{threads} threads"):
            times["sparse"].append(measure(sparse, run.device))
            times["dense"].append(measure(dense, run.device))
        for name, function in (("sparse", sparse), ("dense", dense)):
            table.append({"way": name, "threads": threads, "ms": 1000 * statistics.median(times[name]),
                          "peak MB": peak_bytes(function, run.device) / 1e6})
        ratios[threads] = statistics.median(d / s for s, d in zip(times["sparse"], times["dense"]))
    floor = batch * (2 * 5 * 225 * 4 + 1000 * 4)
    memory = table[1]["peak MB"] / table[0]["peak MB"]
    peer = "torchvision's compiled RoIAlign" if compiled_roi_align else "no compiled torchvision here: the RoIAlign of relabel.py"
    run.log(f"dense way with {peer}; floor {floor / 1e6:.1f} MB moved; targets agree to 1e-5 in {(gaps < 1e-5).float().mean():.1%} of the rows")
    run.finish([{"claim": f"times faster than dense, {threads} threads", "paper": None, "this run": ratio, "holds": ratio >= 100}
                for threads, ratio in ratios.items()]
               + [{"claim": "times less memory than dense", "paper": None, "this run": memory, "holds": memory >= 100}],
               {"pooling": table}, floor_bytes=floor, peer=peer)


if __name__ == "__main__":
    main()
