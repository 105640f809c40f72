"""Cost of CALM's loss, of a map, and of the baselines beside pytorch-grad-cam, torchcam and captum.

    python benchmarks/speed_calm.py                           # one thread, then all: 3 minutes
    python benchmarks/speed_calm.py --device cuda --arch resnet50 --side 224 --batch 32
    python benchmarks/speed_calm.py --device cuda --arch resnet50 --side 224 --batch 128 \\
        --tables map training

Three tables, and on a GPU a fourth:
  loss       bytes allocated by loss and gradient at B = 64, C = 1000, 28 x 28, logits given: with
             the logits at most 0.5 GB; beside the released code's way (everything for all classes)
  map        forward pass and map, beside the same network's forward pass and prediction: at most
             1.05; the floor of a map is one forward pass
  baselines  the same map from this project and from each package that is installed, on one network,
             in turns, one package at a time, medians (CPU time on one thread, else wall time);
             `difference`: the largest between the maps, scaled to [0, 1] (packages scale before and
             after enlarging, which moves values a little)
  training   images per second in bf16 and channels_last, beside float32 with the released code's
             loss: at least 2. By torch's default the convolutions of the float32 loop use TF32,
             at half the rate of bf16 and twice its bytes: twice is the most there; so the loop is
             also timed without TF32
"""

import contextlib
import functools
import importlib
import io
import itertools
import statistics
from collections.abc import Callable

import harness
import timing
import torch
from torch import Tensor, nn

from reference import attribution, calm, resnet

TABLES = ("baselines", "map", "loss", "training")


def installed(name: str):
    """The package, or None where it is missing or does not fit this torch."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(name)
    except Exception:
        return None


def released_loss(logits: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
    """EM as the released code computes it: everything for all classes and locations."""
    prior = attention.relu().flatten(2) / attention.relu().flatten(2).sum(2, keepdim=True).detach()
    flat = logits.flatten(2)
    joint = flat.softmax(1) * prior
    posterior = (joint / (joint.sum(2, keepdim=True) + 1e-10)).detach()
    log_prior = torch.where(prior < 1e-8, prior + 1e-8, prior).log()
    return nn.functional.nll_loss((posterior * (flat.log_softmax(1) + log_prior)).sum(2), labels)


def loss_table(run: harness.Run) -> list[dict]:
    batch, classes, side = (4, 20, 7) if run.args.preset == "tiny" else (64, 1000, 28)
    generator = torch.Generator().manual_seed(0)
    logits, attention = (torch.randn(batch, n, side, side, generator=generator).to(run.device)
                         .requires_grad_() for n in (classes, 1))
    labels = torch.randint(classes, (batch,), generator=generator).to(run.device)

    def ours(method: str) -> Callable:
        return lambda: calm.calm_loss(calm.CALMOutput(logits, attention), labels, method)

    ways = {"em": ours("em"), "ml": ours("ml"),
            "released code's way": lambda: released_loss(logits, attention, labels)}
    steps = {name: lambda loss=loss: torch.autograd.grad(loss(), (logits, attention))
             for name, loss in ways.items()}
    times, given = timing.interleaved(run, steps, 2, "loss"), logits.numel() * 4 / 1e9
    table = []
    for name, step in steps.items():
        allocated = timing.peak_bytes(step, run.device) / 1e9
        table.append({"loss": name, "allocated GB": allocated,
                      "with the logits GB": allocated + given, "seconds": min(times[name])})
    return table


def networks(run: harness.Run) -> tuple[nn.Module, dict[str, calm.CALM]]:
    """A classifier, and CAM and CALM heads on its body."""
    width = {"width": 8} if run.args.preset == "tiny" else {}
    generator = torch.Generator().manual_seed(0)
    model = getattr(resnet, run.args.arch)(generator=generator, **width).to(run.device).eval()
    body = Features(model)
    heads = {name: calm.CALM(body, head(model.num_features, 1000).to(run.device)).eval()
             for name, head in (("CAM", calm.CAMHead), ("CALM", calm.CALMHead))}
    return model, heads


class Features(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


@torch.no_grad()
def map_table(run: harness.Run, model: nn.Module, heads: dict, images: Tensor,
              labels: Tensor) -> list[dict]:
    functions = {"classifier, prediction": lambda: model(images).softmax(1)}
    for name, net, kind in (("CAM", heads["CAM"], "cam"), ("CALM", heads["CALM"], "joint")):
        functions[f"{name} prediction"] = lambda net=net: net(images).probs()
        functions[f"{name} map"] = lambda net=net, kind=kind: calm.attribution_map(
            net(images), labels, kind)
    times = timing.interleaved(run, functions, 3 * run.args.repeats, "maps")
    return [{"what": name, "ms": 1000 * median,
             "x its prediction": timing.ratio(times, name, name.replace("map", "prediction")),
             "x classifier": timing.ratio(times, name, "classifier, prediction")}
            for name, median in timing.medians(times).items()]


def scaled(maps: Tensor, side: int) -> Tensor:
    maps = torch.as_tensor(maps).detach().float().cpu()
    return attribution.normalize_map(attribution.resize_map(maps.clamp(min=0), side), "minmax")


def smaller(images: Tensor, labels: Tensor) -> tuple[tuple, tuple]:
    """(images, labels) for the costly baselines: two and one, of half the side."""
    return tuple((images[:n, :, ::2, ::2], labels[:n]) for n in (2, 1))


def ours_of(model: nn.Module, images: Tensor, labels: Tensor, steps: int,
            noise: Tensor) -> dict[str, Callable]:
    """{baseline: function -> maps}."""
    layer, few, one = model.layer4, *smaller(images, labels)
    cams = {"Grad-CAM": attribution.grad_cam, "Grad-CAM++": attribution.grad_cam_pp,
            "Score-CAM": attribution.score_cam, "Ablation-CAM": attribution.ablation_cam}
    work = {name: (lambda f=f, on=(images, labels) if "Grad" in name else one:
                   f(model, layer, *on, relu=True)) for name, f in cams.items()}
    work["integrated gradients"] = lambda: attribution.integrated_gradients(
        model, *few, steps=steps).abs().amax(1)
    work["SmoothGrad"] = lambda: attribution.smooth_grad(model, *few, samples=steps, noise=noise)
    return work


def peers_of(model: nn.Module, images: Tensor, labels: Tensor,
             steps: int) -> dict[tuple[str, str], Callable]:
    """{(baseline, package): function -> maps} of the packages that are installed."""
    layer, few, one = model.layer4, *smaller(images, labels)
    work = {}
    if torchcam := installed("torchcam.methods"):
        def with_torchcam():
            with torchcam.GradCAM(model, layer) as method:
                return method(labels.tolist(), model(images), normalized=False)[0]
        work["Grad-CAM", "torchcam"] = with_torchcam
    if captum := installed("captum.attr"):
        work["Grad-CAM", "captum"] = lambda: captum.LayerGradCam(model, layer).attribute(
            images, labels, relu_attributions=True)[:, 0]
        integrated = captum.IntegratedGradients(model)
        noisy = captum.NoiseTunnel(captum.Saliency(model))
        work["integrated gradients", "captum"] = lambda: integrated.attribute(
            few[0], target=few[1], n_steps=steps).abs().amax(1)
        work["SmoothGrad", "captum"] = lambda: noisy.attribute(
            few[0], nt_type="smoothgrad", nt_samples=steps, stdevs=1.0, target=few[1]).amax(1)
    if package := installed("pytorch_grad_cam"):
        targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")

        def with_grad_cam(kind: str, x: Tensor, y: Tensor):
            with contextlib.redirect_stderr(io.StringIO()):   # its progress bars
                with getattr(package, kind)(model=model, target_layers=[layer]) as method:
                    method.batch_size = 32
                    wanted = [targets.ClassifierOutputTarget(int(label)) for label in y]
                    return method(input_tensor=x, targets=wanted)
        for name, kind in (("Grad-CAM", "GradCAM"), ("Grad-CAM++", "GradCAMPlusPlus"),
                           ("Score-CAM", "ScoreCAM"), ("Ablation-CAM", "AblationCAM")):
            on = (images, labels) if "Grad" in name else one
            work[name, "grad-cam"] = lambda kind=kind, on=on: with_grad_cam(kind, *on)
    return work


def baseline_tables(run: harness.Run, model: nn.Module, images: Tensor,
                    labels: Tensor) -> dict[str, Callable[[], list[dict]]]:
    """{baseline: what measures it}."""
    few, steps = smaller(images, labels)[0][0], 8
    noise = torch.randn(steps, *few.shape, generator=torch.Generator().manual_seed(0))
    peers = peers_of(model, images, labels, steps)

    def measure(name: str, own: Callable) -> list[dict]:
        """One package at a time: what another left on the heap would spare it its page faults."""
        ours, rows, mine = "this project", {"this project": {}}, []
        others = {package: f for (baseline, package), f in peers.items() if baseline == name}
        costly = name in ("Score-CAM", "Ablation-CAM")        # the packages': a pass per channel
        repeats = min(4, run.args.repeats) if costly else 3 * run.args.repeats

        def row(package: str, seconds: list[float], ratio: float, gap: float) -> dict:
            return {"map": name, "package": package, "ms": 1000 * statistics.median(seconds),
                    "x this project": ratio,
                    "difference": None if name == "SmoothGrad" else gap}        # its noise differs

        for package, peer in (others or {ours: own}).items():
            times = timing.interleaved(run, {ours: own, package: peer}, repeats, name)
            gap = scaled(peer(), images.shape[-1]) - scaled(own(), images.shape[-1])
            rows[package] = row(package, times[package], timing.ratio(times, package, ours),
                                float(gap.abs().max()))
            mine += times[ours]
        rows[ours] = row(ours, mine, 1.0, 0.0)
        return [*rows.values()]

    ours = ours_of(model, images, labels, steps, noise.to(images.device))
    return {name: lambda name=name, own=own: measure(name, own) for name, own in ours.items()}


def training_table(run: harness.Run) -> list[dict]:
    """Images per second of training steps on random images."""
    images = torch.randn(run.args.batch, 3, run.args.side, run.args.side, device=run.device)
    labels = torch.arange(run.args.batch, device=run.device)
    table = []
    default = torch.backends.cudnn.allow_tf32
    for name, fast, tf32 in (("float32, released loss", False, default),
                             ("the same without TF32", False, False),
                             ("bf16, channels_last", True, default)):
        body = getattr(resnet, run.args.arch)(layer3_stride=1, layer4_stride=1,
                                              generator=torch.Generator().manual_seed(0))
        model = calm.CALM(Features(body), calm.CALMHead(body.num_features, 1000))
        model = model.to(run.device).train()
        if fast:
            model = model.to(memory_format=torch.channels_last)
            endless = itertools.repeat((images, labels))
            step = functools.partial(next, calm.train(model, endless, 1, amp_dtype=torch.bfloat16))
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True,
                                        weight_decay=1e-4)

            def step():
                output = model(images)
                loss = released_loss(output.logits, output.attention, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                return loss.item()
        torch.backends.cudnn.allow_tf32 = tf32
        times = timing.interleaved(run, {name: step}, run.args.repeats, name)
        torch.backends.cudnn.allow_tf32 = default
        table.append({"step": name, "images/s": run.args.batch / statistics.median(times[name])})
    return table


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, data=False, networks=False, figures=False)
    parser.add_argument("--arch", default="resnet18", choices=("resnet18", "resnet34", "resnet50"))
    parser.add_argument("--batch", type=harness.count, default=8)
    parser.add_argument("--side", type=harness.count, default=128)
    parser.add_argument("--repeats", type=harness.count, default=8)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES,
                        help="only these (default: all; training on a GPU alone)")
    run = harness.start(parser, argv)
    if set(run.args.tables) == {"training"} and run.device.type == "cpu":
        parser.error("--tables training is measured on a GPU only")
    if run.args.preset == "tiny":
        run.args.batch, run.args.side, run.args.repeats = 2, 32, 2
    generator = torch.Generator().manual_seed(run.seeds[0])
    size = (run.args.batch, 3, run.args.side, run.args.side)
    images = torch.randn(size, generator=generator).to(run.device)
    labels = torch.randint(1000, (run.args.batch,), generator=generator).to(run.device)
    model, heads = networks(run)
    on_cpu = run.device.type == "cpu"
    counts = sorted({1, torch.get_num_threads()}) if on_cpu else [torch.get_num_threads()]
    parts = {}
    for count in counts:                                      # the packages on a clean heap: first
        if "baselines" in run.args.tables:
            for baseline, measure in baseline_tables(run, model, images, labels).items():
                parts[f"baselines {baseline}", count] = measure
        parts["map", count] = lambda: map_table(run, model, heads, images, labels)
    parts["loss", None] = lambda: loss_table(run)
    if not on_cpu:
        parts["training", None] = lambda: training_table(run)
    tables: dict[str, list[dict]] = {}
    for (part, count), measure in parts.items():
        if part.split()[0] not in run.args.tables:
            continue
        name = part.replace(" ", "-") + ("" if count is None else f"-{count}-threads")
        if run.recorded(name) is None:
            run.log(f"{name} ...")
            if count is not None:
                torch.set_num_threads(count)
            run.record(name, measure())
        threads = {} if count is None else {"threads": count}
        rows = [{**threads, **row} for row in run.recorded(name)]
        tables.setdefault(part.split()[0], []).extend(rows)
    packages = sorted({row["package"] for row in tables.get("baselines", ())} - {"this project"})
    run.log(f"packages beside this project: {', '.join(packages) or 'none is installed'}")
    run.finish(claims_of(tables), tables, packages=packages)


def claims_of(tables: dict[str, list[dict]]) -> list[dict]:
    claims = []
    if "loss" in tables:
        largest = max(row["with the logits GB"] for row in tables["loss"][:2])
        claims.append(("loss and gradient, logits included, GB (at most 0.5)", largest,
                       largest <= 0.5))
    for row in tables.get("map", ()):
        if row["what"].endswith(" map"):
            ratio = row["x its prediction"]
            claims.append((f"{row['what']} over its prediction, {row['threads']} threads (at most "
                           "1.05)", ratio, ratio <= 1.05))
    baselines = tables.get("baselines", ())
    for key in dict.fromkeys((row["map"], row["threads"]) for row in baselines):
        others = [row for row in baselines
                  if (row["map"], row["threads"]) == key and row["package"] != "this project"]
        if others:
            fastest = min(others, key=lambda row: row["x this project"])
            ratio = fastest["x this project"]
            claims.append((f"{key[0]}, {key[1]} threads: {fastest['package']} over this project "
                           "(at least 1)", ratio, ratio >= 1))
    if "training" in tables:
        *plain, fast = (row["images/s"] for row in tables["training"])
        for name, rate in zip(("float32, convolutions in TF32", "float32"), plain):
            claims.append((f"training, bf16 and channels_last over {name} (at least 2)",
                           fast / rate, fast >= 2 * rate))
    return [{"claim": text, "paper": None, "this run": value, "holds": holds}
            for text, value, holds in claims]


if __name__ == "__main__":
    main()
