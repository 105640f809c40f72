"""Cost of CALM's loss, of a CALM map, and of the baselines beside pytorch-grad-cam, torchcam and captum.

    python benchmarks/speed_calm.py                           # one thread, then all: 4 minutes on 2 cores
    python benchmarks/speed_calm.py --device cuda --arch resnet50 --side 224 --batch 32       # adds the training step

Three tables, and on a GPU a fourth:
  loss       peak bytes of loss and gradient at B = 64, C = 1000, 28 x 28, logits given: the logits and one gradient (0.4 GB),
             beside the released code's way (softmax, joint, posterior, log joint of all classes)
  map        forward pass and map, beside the same network's forward pass and prediction: at most 1.05
  baselines  the same map from this project and from each package that is installed, medians of interleaved repetitions on one
             network; the largest difference between the maps (each scaled to [0, 1]) is in the table
  training   images per second in bf16 and channels_last, beside plain float32 with the released code's loss: at least 2
The floor of a map is one forward pass.
"""

import contextlib
import importlib
import io
import itertools
import statistics
import time
from collections.abc import Callable

import harness
import torch
from speed_relabel import peak_bytes
from torch import Tensor, nn

from reference import attribution, calm, resnet


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


def seconds(function: Callable, device: torch.device) -> float:
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def interleaved(functions: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each repetition, all functions in turn, after one call of each."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return times


def loss_table(run: harness.Run) -> list[dict]:
    batch, classes, side = (4, 20, 7) if run.args.preset == "tiny" else (64, 1000, 28)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, side, side, generator=generator).to(run.device).requires_grad_()
    attention = torch.randn(batch, 1, side, side, generator=generator).add(1).to(run.device).requires_grad_()
    labels = torch.randint(classes, (batch,), generator=generator).to(run.device)

    def ours(method: str) -> Callable:
        return lambda: torch.autograd.grad(calm.calm_loss(calm.CALMOutput(logits, attention), labels, method), (logits, attention))

    ways = {"em": ours("em"), "ml": ours("ml"),
            "released code's way": lambda: torch.autograd.grad(released_loss(logits, attention, labels), (logits, attention))}
    given = logits.numel() * 4 / 1e9
    return [{"loss": name, "allocated GB": (extra := peak_bytes(way, run.device) / 1e9), "with the logits GB": extra + given,
             "seconds": min(seconds(way, run.device) for _ in range(2))} for name, way in ways.items()]


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
def map_table(run: harness.Run, model: nn.Module, heads: dict, images: Tensor, labels: Tensor) -> list[dict]:
    functions = {"classifier, prediction": lambda: model(images).softmax(1)}
    for name, net in heads.items():
        functions[f"{name} prediction"] = lambda net=net: net(images).probs()
        functions[f"{name} map"] = lambda net=net, kind="cam" if name == "CAM" else "joint": calm.attribution_map(net(images), labels, kind)
    times = interleaved(functions, run.args.repeats, run.device)
    table = [{"what": name, "ms": 1000 * statistics.median(values)} for name, values in times.items()]
    for row in table:
        own = times[row["what"].replace("map", "prediction")]
        for column, base in (("x its prediction", own), ("x classifier", times["classifier, prediction"])):
            row[column] = statistics.median(a / b for a, b in zip(times[row["what"]], base))
    return table


def scaled(maps: Tensor, side: int) -> Tensor:
    maps = torch.as_tensor(maps).detach().float().cpu()
    return attribution.normalize_map(attribution.resize_map(maps.clamp(min=0), side), "minmax")


def peers_of(run: harness.Run, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, Callable]]:
    """{baseline: {package: function -> maps}}; this project's first."""
    layer, few, few_labels = model.layer4, images[:2], labels[:2]
    steps = 8
    noise = torch.randn(steps, *few.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    work = {
        "Grad-CAM": {"this project": lambda: attribution.grad_cam(model, layer, images, labels, relu=True)},
        "Grad-CAM++": {"this project": lambda: attribution.grad_cam_pp(model, layer, images, labels, relu=True)},
        "Score-CAM": {"this project": lambda: attribution.score_cam(model, layer, few[:1, :, ::2, ::2], labels[:1], relu=True)},
        "Ablation-CAM": {"this project": lambda: attribution.ablation_cam(model, layer, few[:1, :, ::2, ::2], labels[:1], relu=True)},
        "integrated gradients": {"this project": lambda: attribution.integrated_gradients(model, few, few_labels, steps=steps).abs().amax(1)},
        "SmoothGrad": {"this project": lambda: attribution.smooth_grad(model, few, few_labels, samples=steps, noise=noise)},
    }
    if grad_cam := installed("pytorch_grad_cam"):
        target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
        for name, kind, x in (("Grad-CAM", "GradCAM", images), ("Grad-CAM++", "GradCAMPlusPlus", images),
                              ("Score-CAM", "ScoreCAM", few[:1, :, ::2, ::2]), ("Ablation-CAM", "AblationCAM", few[:1, :, ::2, ::2])):
            def call(kind=kind, x=x):
                with contextlib.redirect_stderr(io.StringIO()), getattr(grad_cam, kind)(model=model, target_layers=[layer]) as method:
                    if hasattr(method, "batch_size"):
                        method.batch_size = 32
                    return method(input_tensor=x, targets=[target(int(c)) for c in labels[:len(x)]])
            work[name]["grad-cam"] = call
    if torchcam := installed("torchcam.methods"):
        def call():
            with torchcam.GradCAM(model, layer) as method:
                return method(labels.tolist(), model(images.detach().requires_grad_()), normalized=False)[0]
        work["Grad-CAM"]["torchcam"] = call
    if captum := installed("captum.attr"):
        work["Grad-CAM"]["captum"] = lambda: captum.LayerGradCam(model, layer).attribute(images, labels, relu_attributions=True)[:, 0]
        work["integrated gradients"]["captum"] = lambda: captum.IntegratedGradients(model).attribute(
            few, target=few_labels, n_steps=steps).abs().amax(1)
        work["SmoothGrad"]["captum"] = lambda: captum.NoiseTunnel(captum.Saliency(model)).attribute(
            few, nt_type="smoothgrad", nt_samples=steps, stdevs=1.0, target=few_labels).amax(1)
    return work


def baseline_table(run: harness.Run, model: nn.Module, images: Tensor, labels: Tensor) -> list[dict]:
    table = []
    for name, functions in peers_of(run, model, images, labels).items():
        results = {package: scaled(function(), images.shape[-1]) for package, function in functions.items()}
        times = interleaved(functions, run.args.repeats, run.device)
        for package, values in times.items():
            ratios = [other / own for own, other in zip(times["this project"], values)]
            difference = float((results[package] - results["this project"]).abs().max()) if name != "SmoothGrad" else None
            table.append({"map": name, "package": package, "ms": 1000 * statistics.median(values),
                          "x this project": statistics.median(ratios), "difference": difference})
    return table


def training_table(run: harness.Run) -> list[dict]:
    """Images per second of training steps on random images."""
    images = torch.randn(run.args.batch, 3, run.args.side, run.args.side, device=run.device)
    labels = torch.arange(run.args.batch, device=run.device)
    table = []
    for name, fast in (("float32, released loss", False), ("bf16, channels_last", True)):
        body = getattr(resnet, run.args.arch)(layer3_stride=1, layer4_stride=1, generator=torch.Generator().manual_seed(0))
        model = calm.CALM(Features(body), calm.CALMHead(body.num_features, 1000)).to(run.device).train()
        if fast:
            model = model.to(memory_format=torch.channels_last)
            steps = calm.train(model, itertools.repeat((images, labels)), 1, amp_dtype=torch.bfloat16)
            step = lambda: next(steps)                        # noqa: E731
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)

            def step():
                output = model(images)
                loss = released_loss(output.logits, output.attention, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                return loss.item()
        values = interleaved({name: step}, run.args.repeats, run.device)[name]
        table.append({"step": name, "images/s": run.args.batch / statistics.median(values)})
    return table


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--arch", default="resnet18", choices=("resnet18", "resnet34", "resnet50"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    run = harness.start(parser, argv)
    if run.args.preset == "tiny":
        run.args.batch, run.args.side, run.args.repeats = 2, 32, 2
    generator = torch.Generator().manual_seed(run.seeds[0])
    images = torch.randn(run.args.batch, 3, run.args.side, run.args.side, generator=generator).to(run.device)
    labels = torch.randint(1000, (run.args.batch,), generator=generator).to(run.device)
    model, heads = networks(run)
    tables = {"loss": loss_table(run)}
    threads = sorted({1, torch.get_num_threads()}) if run.device.type == "cpu" else [torch.get_num_threads()]
    tables |= {"map": [], "baselines": []}
    for count in threads:
        torch.set_num_threads(count)
        run.log(f"{count} threads: maps ...")
        tables["map"] += [{"threads": count, **row} for row in map_table(run, model, heads, images, labels)]
        run.log(f"{count} threads: baselines ...")
        tables["baselines"] += [{"threads": count, **row} for row in baseline_table(run, model, images, labels)]
    packages = sorted({row["package"] for row in tables["baselines"]} - {"this project"})
    run.log(f"packages beside this project: {', '.join(packages) or 'none is installed'}")
    largest = max(row["with the logits GB"] for row in tables["loss"][:2])
    claims = [{"claim": "loss and gradient, logits included (GB, at most 0.5)", "paper": None, "this run": largest, "holds": largest <= 0.5}]
    for row in tables["map"]:
        if row["what"].endswith(" map"):
            claims.append({"claim": f"{row['what']} over its prediction, {row['threads']} threads (at most 1.05)", "paper": None,
                           "this run": row["x its prediction"], "holds": row["x its prediction"] <= 1.05})
    for name, count in dict.fromkeys((row["map"], row["threads"]) for row in tables["baselines"]):
        others = [row for row in tables["baselines"] if (row["map"], row["threads"]) == (name, count) and row["package"] != "this project"]
        if others:
            fastest = min(others, key=lambda row: row["x this project"])
            claims.append({"claim": f"{name}: fastest package ({fastest['package']}) over this project, {count} threads (at least 1)",
                           "paper": None, "this run": fastest["x this project"], "holds": fastest["x this project"] >= 1})
    if run.device.type == "cuda":
        tables["training"] = training_table(run)
        gain = tables["training"][1]["images/s"] / tables["training"][0]["images/s"]
        claims.append({"claim": "training, bf16 and channels_last over float32 (at least 2)", "paper": None, "this run": gain, "holds": gain >= 2})
    run.finish(claims, tables, packages=packages)


if __name__ == "__main__":
    main()
