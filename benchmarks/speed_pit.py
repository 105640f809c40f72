"""How fast PiT is: forward, training step, memory and loader, side by side with timm and the 2021
attention.

    python benchmarks/speed_pit.py                           CPU: PiT-S, one thread and all threads,
                                                             about 4 minutes
    python benchmarks/speed_pit.py --models pit_b deit_base --amp bf16 --compile       (GPU)
    python benchmarks/speed_pit.py --data /data/imagenet --workers 8                 also the loader

Models take turns with the same weights, input and precision; medians over the rounds, and the
median ratio peer / ours within a round (above 1: ours is faster). The floor is the time of the MACs
at the speed of a large matrix product. Expected on a CPU: forward 1.05-1.1x timm (the last block
computes class tokens only), training step about 1.03x. timm is compared if installed.

"unfused" is this project's own model with attention written out as in 2021, softmax(q k^T) v; that
is timm's unfused path too, which in float32 keeps one attention matrix per block for the backward
pass. (Scaling and a dropout of 0 keep nothing; autocast on a GPU runs the softmax in float32, and
keeps a half-precision copy as well.) Memory is the peak that forward and backward add to weights
and gradients. On a CPU, PiT-S needs about 0.7 of the unfused peak: what is left are the inputs of
the linear layers, of LayerNorm and of GELU, in both models. "checkpointed" is ours with
grad_checkpointing=True, about 0.15 of it for 1.2 times the time. --compile leaves both out.
"""

import os
import re
import time

import harness
import timing
import torch
import torch.nn.functional as F

from data_tools import imagenet
from reference import pit

try:
    import timm
except ImportError:
    timm = None


def arguments():
    parser = harness.parser(__doc__, presets=("default", "tiny"), figures=False)
    parser.add_argument("--models", nargs="+", default=["pit_s"],
                        help="pit_{ti,xs,s,b}[_distilled], deit_{tiny,small,base}")
    parser.add_argument("--batch-size", type=harness.count, help="default 4 on a CPU, 128 on a GPU")
    parser.add_argument("--rounds", type=harness.count, help="interleaved repetitions (default 11)")
    return parser


def full_name(name: str) -> str:
    """The name in timm, which is one in reference/pit.py too."""
    return name + ("_patch16_224" if name.startswith("deit") else "_224")


def build(name: str, size: int, **keywords) -> torch.nn.Module:
    return getattr(pit, full_name(name))(image_size=size, **keywords)


def timm_twin(name: str, size: int, model: torch.nn.Module) -> torch.nn.Module:
    """timm's model with the same weights: a pooling layer is a part of the stage after it there."""
    twin = timm.create_model(full_name(name), img_size=size)
    twin.load_state_dict({
        re.sub(r"^pools\.(\d+)", lambda m: f"transformers.{int(m[1]) + 1}.pool", key): value
        for key, value in model.state_dict().items()})
    return twin


def logits_of(model, x, run):
    with torch.autocast(run.device.type, run.amp_dtype, enabled=run.amp_dtype is not None):
        out = model(x)
    return sum(out) if isinstance(out, tuple) else out


def matmul_rate(run) -> float:
    """Multiply-accumulates per second of a 1024-cubed matrix product (4096 on a GPU)."""
    n = 4096 if run.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=run.device, dtype=run.amp_dtype or torch.float32)
    times = timing.interleaved(run, {"product": lambda: a @ a}, 9, "matrix product", at_least=0.02)
    return n**3 / timing.medians(times)["product"]


def compare(run, name: str, threads: int, batch: int, size: int,
            rounds: int) -> tuple[list[dict], dict]:
    """Rows of the time table, and the row of the memory table."""
    ours = build(name, size)
    models = {"ours": ours}
    if timm:
        models["timm"] = timm_twin(name, size, ours)
    if name.startswith("pit") and not run.args.compile:
        for peer, keywords in (("unfused", {"attention": "math"}),
                               ("checkpointed", {"grad_checkpointing": True})):
            models[peer] = build(name, size, **keywords)
            models[peer].load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(run.args.seed)
    x = torch.randn(batch, 3, size, size, generator=generator).to(run.device)
    labels = torch.randint(1000, (batch,), generator=generator).to(run.device)
    for model in models.values():
        model.to(run.device).eval()
        if run.args.compile:
            model.compile()
    with torch.no_grad():
        wanted = logits_of(ours, x, run)
        for peer, model in models.items():
            off = ((logits_of(model, x, run) - wanted).abs().max() / wanted.abs().max()).item()
            if off > (1e-4 if run.amp_dtype is None else 5e-2):
                raise SystemExit(f"{name}: logits of {peer} differ by {off:.1e} of the largest; "
                                 "no comparison")
    floor = pit.count_macs(ours)["total"] * batch / matmul_rate(run)

    def forward(model):
        with torch.no_grad():
            logits_of(model, x, run)

    def step(model, clear=True):
        if clear:
            model.zero_grad(set_to_none=True)
        F.cross_entropy(logits_of(model, x, run), labels).backward()

    def timed(function, label):
        peers = {peer: lambda model=model: function(model) for peer, model in models.items()
                 if peer != "checkpointed" or function is step}
        return timing.interleaved(run, peers, rounds, f"{name} {label}")

    times = {"forward": timed(forward, "forward")}
    for model in models.values():
        model.train()
    times["training step"] = timed(step, "training step")
    memory = {peer: timing.peak_bytes(lambda model=model: step(model, clear=False), run.device)
              / 2**20 for peer, model in models.items()}
    rows = []
    for what, seconds in times.items():
        median = timing.medians(seconds)["ours"]
        rows.append({"model": name, "pass": what, "threads": threads, "batch": batch,
                     "ours, ms": 1e3 * median,
                     "floor, ms": 1e3 * floor * (1 if what == "forward" else 3),
                     "img/s": batch / median,
                     **{f"{peer} / ours": timing.ratio(seconds, peer, "ours") for peer in seconds
                        if peer != "ours"}})
    return rows, {"model": name, "batch": batch,
                  **{f"{peer}, MiB": value for peer, value in memory.items()},
                  "ours / unfused": memory["ours"] / memory["unfused"] if "unfused" in memory
                  else None}


def loader_rate(run, size: int = 224) -> list[dict]:
    """Training images per second: our loader, and torchvision's folder and transforms if installed,
    on the same files."""
    dataset, workers = imagenet.imagenet(run.args.data, "train"), run.args.workers
    count = min(len(dataset), 64 * 24 * max(workers, 1))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    chosen = order[:count].tolist()
    loaders = {"ours": imagenet.Loader(dataset, 64, transform=imagenet.TrainTransform(size),
                                       sampler=chosen, workers=workers, device=run.device)}
    try:
        from torchvision import datasets, transforms as T
        if (run.args.data / "train").is_dir():
            crop = T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC)
            chain = T.Compose([crop, T.RandomHorizontalFlip(), T.PILToTensor()])
            peer = datasets.ImageFolder(run.args.data / "train", chain)
            loaders["torchvision"] = torch.utils.data.DataLoader(peer, 64, sampler=chosen,
                                                                 num_workers=workers)
    except ImportError:
        run.log("torchvision is not installed: no peer for the loader")
    passes = {name: lambda loader=loader: [None for _ in loader]
              for name, loader in loaders.items()}
    seconds = timing.interleaved(run, passes, 3, "loader", clock=time.perf_counter)
    return [{"loader": name, "images/s": count / s, "workers": workers}
            for name, s in timing.medians(seconds).items()]


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    unknown = [name for name in parser.parse_args(argv).models if not hasattr(pit, full_name(name))]
    if unknown:
        parser.error(f"--models: no model {unknown[0]!r}; choose from pit_{{ti,xs,s,b}}[_distilled]"
                     " and deit_{tiny,small,base}")
    run = harness.start(parser, argv)
    tiny, on_gpu = run.args.preset == "tiny", run.device.type == "cuda"
    batch = run.args.batch_size or (2 if tiny else 128 if on_gpu else 4)
    if timm is None:
        run.log("timm is not installed: no comparison with it")
    every = [None] if on_gpu else sorted({run.args.threads} if run.args.threads
                                         else {1, os.cpu_count() or 1})
    rows, memory = [], []
    for threads in every:
        if threads:
            torch.set_num_threads(threads)
        for name in ["pit_ti"] if tiny else run.args.models:
            timed, kept = compare(run, name, threads, batch, 64 if tiny else 224,
                                  run.args.rounds or (2 if tiny else 11))
            rows += timed
            memory += [kept] if threads == every[0] else []
    tables = {"time": rows, "memory": memory}
    if run.args.data:
        tables["loader"] = loader_rate(run)
    claims = []
    for row in rows:
        for peer in ("timm", "unfused"):
            if (ratio := row.get(f"{peer} / ours")) is None:
                continue
            target = (1.05 if row["pass"] == "forward" else 1.0) if peer == "timm" else None
            where = f"{row['threads'] or 'GPU'} thread(s)"
            claims.append({"claim": f"{row['model']} {row['pass']}, {where}: {peer} / ours",
                           "target": f">= {target}" if target else None, "this run": ratio,
                           "holds": ratio >= target if target and not tiny else None})
    claims += [{"claim": f"{m['model']} memory of a training step, ours / unfused",
                "target": "<= 0.5" if on_gpu else None,
                "this run": m["ours / unfused"],
                "holds": m["ours / unfused"] <= 0.5 if on_gpu and not tiny else None}
               for m in memory if m["ours / unfused"] is not None]
    run.finish(claims, tables)


if __name__ == "__main__":
    main()
