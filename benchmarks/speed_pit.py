"""How fast PiT is: forward, training step, activation memory and loader, side by side with timm and
the 2021 attention.

    python benchmarks/speed_pit.py                           CPU: PiT-S, one thread and all threads,
                                                             about 4 minutes
    python benchmarks/speed_pit.py --models pit_b deit_base --amp bf16 --compile       (GPU)
    python benchmarks/speed_pit.py --data /data/imagenet --workers 8                   also the loader

Runs are interleaved (ours, peer, ours, peer, ...) with the same weights, input and precision;
medians, and the ratio peer / ours (above 1: ours is faster). The floor is the time of the MACs at
the speed of a large matrix product. Expected on a CPU: forward 1.05-1.25x timm (the last block
computes class tokens only), training step about 1x. timm is compared if installed. "unfused" is
this project's own model with attention written out, as in 2021. Memory is what autograd keeps for
the backward pass (every tensor counted once); on a GPU it is the measured peak, which there also
holds the attention matrices' short-lived copies.
"""

import os
import statistics
import time

import harness
import torch
import torch.nn.functional as F

from data_tools import imagenet
from reference import pit

try:
    import timm
except ImportError:
    timm = None


def arguments():
    parser = harness.parser(__doc__, presets=("default", "tiny"))
    parser.add_argument("--models", nargs="+", default=["pit_s"],
                        help="pit_{ti,xs,s,b}[_distilled], deit_{tiny,small,base}")
    parser.add_argument("--batch-size", type=int, help="default 4 on a CPU, 128 on a GPU")
    parser.add_argument("--rounds", type=int, help="interleaved repetitions (default 11)")
    return parser


def build(name: str, size: int, **keywords) -> torch.nn.Module:
    return getattr(pit, f"{name}_patch16_224" if name.startswith("deit")
                   else name)(image_size=size, **keywords)


def timm_twin(name: str, size: int, model: torch.nn.Module) -> torch.nn.Module:
    """timm's model with the same weights: a pooling layer is a part of the stage after it there."""
    twin = timm.create_model(f"{name}_patch16_224" if name.startswith("deit") else f"{name}_224",
                             img_size=size)
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("pools."):
            _, stage, rest = key.split(".", 2)
            key = f"transformers.{int(stage) + 1}.pool.{rest}"
        state[key] = value
    twin.load_state_dict(state)
    return twin


def interleaved(functions: dict, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function; they take turns, after one call each that is not counted."""
    synchronize = (
        lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            synchronize()
            began = time.perf_counter()
            function()
            synchronize()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def kept_for_backward(model, x, labels, run) -> float:
    """MiB that one training step holds: on a GPU the measured peak, else the tensors autograd
    saves."""
    if run.device.type == "cuda":
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        training_step(model, x, labels, run)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    owned = {p.untyped_storage().data_ptr()
             for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    # holds the storages: an address is not used twice
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(logits_of(model, x, run), labels)
    return sum(storage.nbytes() for storage in kept.values()) / 2**20


def logits_of(model, x, run):
    with torch.autocast(run.device.type, run.amp_dtype, enabled=run.amp_dtype is not None):
        out = model(x)
    return sum(out) if isinstance(out, tuple) else out


def training_step(model, x, labels, run):
    model.zero_grad(set_to_none=True)
    F.cross_entropy(logits_of(model, x, run), labels).backward()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-accumulates per second of a 1024-cubed matrix product (4096 on a GPU)."""
    n = 4096 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    return n**3 / interleaved({"": lambda: a @ a}, 9, device)[""]


def compare(run, name: str, threads: int, batch: int, size: int, rounds: int) -> tuple[list[dict], dict]:
    ours = build(name, size)
    models = {"ours": ours}
    if timm:
        models["timm"] = timm_twin(name, size, ours)
    if name.startswith("pit"):
        models["unfused"] = build(name, size, attention="math")
        models["unfused"].load_state_dict(ours.state_dict())
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
                raise SystemExit(
                    f"{name}: logits of {peer} differ by {off:.1e} of the largest; no comparison")
    floor = pit.count_macs(ours)["total"] * batch / matmul_rate(run.device,
                                                                run.amp_dtype or torch.float32)

    def forward(model):
        with torch.no_grad():
            logits_of(model, x, run)

    seconds = {"forward": interleaved({k: lambda m=m: forward(m) for k, m in models.items()},
                                      rounds, run.device)}
    memory = {}
    for peer, model in models.items():
        model.train()
        memory[peer] = kept_for_backward(model, x, labels, run)
    seconds["training step"] = interleaved({k: lambda m=m: training_step(m, x, labels, run) for k, m in models.items()},
                                           rounds, run.device)
    rows = []
    for what, times in seconds.items():
        row = {"model": name, "pass": what, "threads": threads, "batch": batch,
               "ours, ms": 1e3 * times["ours"],
               "floor, ms": 1e3 * floor * (1 if what == "forward" else 3),
               "img/s": batch / times["ours"]}
        row.update({f"{peer} / ours": times[peer] / times["ours"] for peer in models
                    if peer != "ours"})
        rows.append(row)
    return rows, {"model": name, "batch": batch,
                  **{f"{peer}, MiB": value for peer, value in memory.items()},
                  "ours / unfused": memory["ours"] / memory["unfused"] if "unfused" in memory
                  else None}


def loader_rate(run, size: int = 224) -> list[dict]:
    """Training images per second: our loader, and torchvision's folder and transforms if installed,
    on the same files."""
    dataset = imagenet.imagenet(run.args.data, "train")
    count = min(len(dataset), 64 * 24 * max(run.args.workers, 1))
    chosen = torch.randperm(len(dataset),
                            generator=torch.Generator().manual_seed(0))[:count].tolist()
    loaders = {"ours": imagenet.Loader(dataset, 64, transform=imagenet.TrainTransform(size),
                                       sampler=chosen,
                                       workers=run.args.workers, device=run.device)}
    try:
        from torchvision import datasets, transforms
        chain = transforms.Compose([transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC),
                                    transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
        if (run.args.data / "train").is_dir():
            peer = datasets.ImageFolder(run.args.data / "train", chain)
            loaders["torchvision"] = torch.utils.data.DataLoader(peer, 64, sampler=chosen,
                                                                 num_workers=run.args.workers)
    except ImportError:
        run.log("torchvision is not installed: no peer for the loader")
    seconds = interleaved({k: lambda v=v: [None for _ in v] for k, v in loaders.items()}, 3,
                          run.device)
    return [{"loader": name, "images/s": count / s, "workers": run.args.workers}
            for name, s in seconds.items()]


def main(argv: list[str] | None = None) -> None:
    run = harness.start(arguments(), argv)
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
            claims.append({"claim": f"{row['model']} {row['pass']}, {row['threads'] or 'GPU'} thread(s): {peer} / ours",
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
