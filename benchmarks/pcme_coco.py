"""PCME against deterministic and triplet training: recall, R-Precision, plausible matches (PMRP).

    python benchmarks/pcme_coco.py                             # rendered shapes, 2 minutes a seed
    python benchmarks/pcme_coco.py --seeds 3 --figures figures --record
    python benchmarks/pcme_coco.py --data flickr8k_64 --preset small --seeds 2 --record flickr8k_64
    torchrun --nproc_per_node=8 benchmarks/pcme_coco.py --data /data/coco --preset paper \\
        --ids dataset_coco.json --trunk-weights resnet152.pth --glove glove.840B.300d.txt \\
        --amp bf16 --workers 8 --methods PCME "hard triplet"

--data is COCO (annotations/ and images, with --ids: Karpathy's dataset_coco.json or a folder of id
lists) or Flickr8k. Preset small trains a small residual net from scratch on images of 64 pixels;
preset paper is the published recipe (ResNet-152, 1024 dimensions, 30 + 30 epochs; 46 hours on a
V100).

Rendered shapes: 1 to 3 shapes an image, captions that tell more or less of them, so that all
matches are known exactly ("plausible"); the PMRP analogue compares which colours and shapes two
images hold. Paper, COCO 1K: PCME has the best PMRP (45.0 image to text, 46.0 text to image) with
R@1 68.8 and 54.6; the triplet loss with hard negatives (PVSE K = 1) has 40.3, 41.8 with 66.7, 53.5;
the means of PCME's Gaussians alone 45.0, 45.9 with 68.0, 54.6.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import figures
import harness
import numpy as np
import torch
from torch import nn

from data_tools import captions, loader, synthetic
from reference import pcme, resnet
from reference.adamp import AdamP


class Settings(NamedTuple):
    """One preset. A step takes `batch` captions with their images, or images with k > 1 of them."""

    trunk: str = "tiny"  # or "small-WIDTH", "resnet50", ...
    side: int = 64
    embed_dim: int = 64
    word_dim: int = 64
    batch: int = 64
    k: int = 1
    epochs: tuple[int, ...] = (1,)
    phases: tuple[dict, ...] = ({"lr": 2e-3},)
    shift: float = 15.0  # initial a and b of the match probability
    point_shift: float = 5.0  # the same for points instead of Gaussians
    vib_beta: float = 1e-5
    uniform_lambda: float = 0.0
    log_sigma: float | None = -3.0  # where training from scratch starts; None: as published
    crop: float | None = None  # smallest area of the random crops; None: no crops
    word_drop: float = 0.0
    erasing: float = 0.0
    samples: int = 7


AUGMENTED = {"word_drop": 0.1, "erasing": 0.2}
PRESETS = {
    "default": Settings(k=2, epochs=(10,)),
    "tiny": Settings(side=32, embed_dim=16, word_dim=8, batch=16, k=2, samples=3),
    "small": Settings("small-8", embed_dim=128, word_dim=128, batch=32, k=2, epochs=(20,),
                      shift=5.0, crop=0.7, **AUGMENTED),
    "paper": Settings("resnet152", 224, 1024, 300, 128, **pcme.RECIPES["coco"], log_sigma=None,
                      crop=0.08, **AUGMENTED),
}


def sampled_loss(s: Settings) -> nn.Module:
    return pcme.MCSoftContrastiveLoss(s.shift, s.shift, s.samples, s.uniform_lambda, s.vib_beta)


METHODS = {  # criterion of the settings, and whether it draws samples
    "PCME": (sampled_loss, True),
    "deterministic": (lambda s: pcme.MCSoftContrastiveLoss(s.point_shift, s.point_shift), False),
    "triplet": (lambda s: pcme.TripletLoss(0.2, max_violation=False), False),
    "hard triplet": (lambda s: pcme.TripletLoss(0.2), False),
}
REFERENCE = {  # COCO 1K: PMRP i2t, t2i, R@1 i2t, t2i
    "PCME, match probability": (45.0, 46.0, 68.8, 54.6),
    "PCME, mean only": (45.0, 45.9, 68.0, 54.6),
    "hard triplet, mean only": (40.3, 41.8, 66.7, 53.5),
}


# ---------------------------------------------------------------- data


class Problem(NamedTuple):
    """Data to train and judge on; plausible (Ni, Nc), codes (Ni, K), annotated where known."""

    train: captions.CaptionSet
    test: captions.CaptionSet
    vocabulary: captions.Vocabulary
    plausible: torch.Tensor | None = None
    codes: np.ndarray | torch.Tensor | None = None
    annotated: np.ndarray | None = None


def caption_set(scenes: dict, labels: torch.Tensor | None = None) -> captions.CaptionSet:
    """Embedded scenes as a caption set."""
    rows, numbers = np.arange(len(scenes["images"])), np.arange(len(scenes["captions"]))
    owner = rows.repeat(len(numbers) // len(rows))
    classes = None if labels is None else labels.numpy()
    return captions.CaptionSet(scenes["images"], rows, scenes["captions"], numbers, owner, classes)


def embedded(settings: Settings, tiny: bool) -> Problem:
    """Rendered shapes; all matches of the test set are known."""
    train = synthetic.captioned_shapes(64 if tiny else 3000, settings.side, seed=20)
    test = synthetic.captioned_shapes(25 if tiny else 500, settings.side, seed=21)
    return Problem(caption_set(train), caption_set(test),
                   captions.Vocabulary.of(train["captions"], pcme.tokenize),
                   synthetic.caption_matches(test["objects"], test["mentions"], test["relations"]),
                   synthetic.scene_codes(test["objects"]))


def load(run: harness.Run, settings: Settings) -> Problem:
    """The rendered shapes, or COCO or Flickr8k in --data."""
    if run.args.data is None:
        return embedded(settings, run.args.preset == "tiny")
    root, ids = run.args.data, run.args.ids
    if (root / "annotations").exists():
        if ids is None:
            raise ValueError("COCO needs --ids: Karpathy's dataset_coco.json, or a folder of id "
                             "lists")
        train, test = (captions.coco_captions(root, split, ids) for split in ("train", "test"))
        codes, annotated = pcme.plausible_match_codes(captions.coco_instances(root), test.image_ids)
    else:
        train, test = (captions.flickr8k(root, split) for split in ("train", "test"))
        codes = annotated = None
    if settings.side <= 64:  # small images stay in memory
        train, test = (data.in_memory(loader.EvalTransform(settings.side, 1.0))
                       for data in (train, test))
    return Problem(train, test, vocabulary(run, train), None, codes, annotated)


def vocabulary(run: harness.Run, train: captions.CaptionSet) -> captions.Vocabulary:
    """That of --vocabulary, or the frequent words of the training captions."""
    if run.args.vocabulary:
        return captions.Vocabulary.load(run.args.vocabulary, pcme.tokenize)
    return captions.Vocabulary.of(train.captions, pcme.tokenize)


# ---------------------------------------------------------------- model


def build_model(settings: Settings, words: int, seed: int) -> pcme.PCME:
    """The two towers with weights that follow from the seed (the global generator stays)."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        trunk, width = build_trunk(settings.trunk)
        model = pcme.PCME(pcme.EncoderImage(trunk, width, settings.embed_dim, settings.samples),
                          pcme.EncoderText(words, settings.word_dim, settings.embed_dim,
                                           n_samples_inference=settings.samples))
    if settings.log_sigma is not None:
        for tower in (model.img_enc, model.txt_enc):
            nn.init.constant_(tower.uncertain_net.fc.bias, settings.log_sigma)
    return model


def build_trunk(name: str) -> tuple[nn.Module, int]:
    """A network that gives feature maps, and its channels."""
    if name == "tiny":
        widths = (3, 16, 32, 64, 128)
        layers = ((nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                  for a, b in zip(widths, widths[1:]))
        return nn.Sequential(*(nn.Sequential(*layer) for layer in layers)), widths[-1]
    small = name.startswith("small-")  # 2 x 2 pixels become channels: a 3x3 stem at half the side
    net = (resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), 0, in_chans=12, width=int(name[6:]),
                         small_stem=True) if small else getattr(resnet, name)(num_classes=0))
    net.forward = net.forward_features
    return nn.Sequential(nn.PixelUnshuffle(2), net) if small else net, net.num_features


def load_pretrained(run: harness.Run, model: pcme.PCME, vocabulary: captions.Vocabulary) -> None:
    """ImageNet weights of the trunk and GloVe vectors, where the arguments name them."""
    if run.args.trunk_weights:
        harness.load_weights(model.img_enc.cnn, run.args.trunk_weights, head=False)
    if run.args.glove:
        vectors, missing = captions.read_glove(run.args.glove, vocabulary.word2idx,
                                               model.txt_enc.embed.embedding_dim)
        captions.set_word_vectors(model.txt_enc.embed, vocabulary, vectors)
        run.log(f"word vectors for {len(vectors)} words, none for {len(missing)}")


def train_method(run: harness.Run, name: str, problem: Problem, settings: Settings,
                 criterion: nn.Module, sampled: bool, seed: int, pairs: str | None = None,
                 adapt: Callable[[nn.Module], None] | None = None) -> pcme.PCME:
    """Train a model of its own (each tower changed by `adapt`), save it as `name`-weights."""
    model = build_model(settings if sampled else settings._replace(samples=0),
                        len(problem.vocabulary), seed)
    for tower in (model.img_enc, model.txt_enc) if adapt else ():
        adapt(tower)
    load_pretrained(run, model, problem.vocabulary)
    model, criterion = model.to(run.device), criterion.to(run.device)
    if run.args.compile:
        model.img_enc.cnn.compile()
    transform = None
    if pairs != "classes" and settings.crop is not None:
        transform = loader.TrainTransform(settings.side, (settings.crop, 1.0),
                                          interpolation="bilinear")
    elif pairs == "classes" and settings.side > 64:  # the published CUB recipe crops nothing
        transform = loader.EvalTransform(settings.side, 0.875, "bilinear")
    batches = captions.PairBatches(
        problem.train, problem.vocabulary, settings.batch, transform=transform,
        word_drop=settings.word_drop, erasing=settings.erasing, seed=seed,
        pairs=pairs or ("images" if settings.k > 1 else "captions"),
        captions_per_image=settings.k, workers=run.args.workers, device=run.device, rank=run.rank,
        world_size=run.world_size)
    steps = pcme.train(model, criterion, batches, epochs=settings.epochs, phases=settings.phases,
                       optimizer=AdamP, amp=run.amp_dtype, seed=seed, resume=run.resumed(name))
    run.drive(name, steps, sum(settings.epochs) * len(batches))
    run.save(f"{name}-weights", {"model": model.state_dict(), "criterion": criterion.state_dict()})
    return model


@torch.no_grad()
def encode(run: harness.Run, model: pcme.PCME, data: captions.CaptionSet,
           vocabulary: captions.Vocabulary, side: int) -> dict:
    """{image,caption}_{mu,logsigma} (N, D) of all images and captions, on the run's device."""
    model.eval()
    out = {"image": [model.encode_image(batch, num_samples=0)
                     for batch, _ in image_batches(run, data, side)]}
    parts = (vocabulary(data.captions[i:i + 512]) for i in range(0, len(data.captions), 512))
    out["caption"] = [model.encode_text(*(x.to(run.device) for x in part), num_samples=0)
                      for part in parts]
    return {f"{kind}_{key}": torch.cat([o[key] for o in batches]).float()
            for kind, batches in out.items() for key in ("mu", "logsigma")}


def image_batches(run: harness.Run, data: captions.CaptionSet, side: int) -> loader.Loader:
    """The images in order, as the models take them; those in memory have their size already."""
    in_memory = isinstance(data.images, torch.Tensor)
    transform = None if in_memory else loader.EvalTransform(side, 0.875, "bilinear")
    return loader.Loader(data, 128, transform=transform, workers=run.args.workers,
                         device=run.device, normalize=(loader.IMAGENET_MEAN, loader.IMAGENET_STD))


def similarities(codes: dict, criterion: nn.Module, samples: int,
                 seed: int) -> dict[str, torch.Tensor]:
    """{score: (Ni, Nc)}: the log match probability for Gaussians, and the cosine of the means."""
    scores = {"mean only": pcme.pairwise_similarity(codes["image_mu"], codes["caption_mu"], "mean")}
    if samples:
        generator = torch.Generator(codes["image_mu"].device).manual_seed(seed)
        drawn = [pcme.sample_gaussian(codes[f"{kind}_mu"], codes[f"{kind}_logsigma"], samples,
                                      generator) for kind in ("image", "caption")]
        probability = pcme.pairwise_similarity(*drawn, "log_matching_prob", **ab(criterion))
        scores = {"match probability": probability, **scores}
    return scores


def ab(criterion: nn.Module) -> dict[str, float]:
    """The learned a and b, as `pairwise_similarity` takes them."""
    return {name: getattr(criterion, name).item() for name in ("shift", "negative_scale")}


def judge(sim: torch.Tensor, problem: Problem, folds: int | None) -> dict[str, float]:
    """All figures of one similarity matrix, in percent."""
    test = problem.test
    recalls = pcme.coco_recalls(sim, test.image_ids, test.caption_image_ids, folds)
    result = {name: value for name, value in recalls.items() if "recall" in name}
    if problem.codes is not None:
        for prefix, parts in (("", None), ("nfold_", folds)) if folds else (("", None),):
            match = pcme.pmrp(sim, problem.codes, test.owner, folds=parts,
                              annotated=problem.annotated)
            result |= {f"{prefix}{way}_pmrp": match[f"{way}_pmrp"] for way in ("i2t", "t2i")}
    if problem.plausible is not None:
        for way, s, p in (("i2t", sim, problem.plausible), ("t2i", sim.T, problem.plausible.T)):
            result |= {f"{way}_rp": 100 * pcme.r_precision(s, p),
                       f"{way}_plausible1": 100 * pcme.recall_at_k(s, p, 1)}
    return result


# ---------------------------------------------------------------- the study


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, presets=tuple(PRESETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:3])
    run, settings = start_study(parser, PRESETS, argv)
    problem = load(run, settings)
    folds = 5 if len(problem.test) == 5000 else None  # COCO's "1K" figures
    for seed in run.seeds:
        for method in run.args.methods:
            name, (make, sampled) = run_name(method, seed), METHODS[method]
            if run.recorded(name) is None:
                criterion = make(settings)
                model = train_method(run, name, problem, settings, criterion, sampled, seed)
                codes = encode(run, model, problem.test, problem.vocabulary, settings.side)
                sims = similarities(codes, criterion, settings.samples * sampled, seed)
                run.record(name, {score: judge(sim, problem, folds) for score, sim in sims.items()})
    finish(run, "nfold_" if folds else "")


def run_name(method: str, seed: int) -> str:
    return f"{method.replace(' ', '-')}-seed{seed}"


def start_study(parser: argparse.ArgumentParser, presets: dict[str, Settings],
                argv: list[str] | None) -> tuple[harness.Run, Settings]:
    """Add the arguments of a training study and start it."""
    parser.add_argument("--epochs", type=harness.count, nargs="+",
                        help="of each phase, not the preset's")
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    settings = presets[args.preset]
    if args.epochs:
        if len(args.epochs) != len(settings.phases):
            parser.error(f"--epochs takes one number per phase, here {len(settings.phases)}")
        settings = settings._replace(epochs=tuple(args.epochs))
    return harness.start(parser, argv), settings


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trunk-weights", type=Path, help="ImageNet checkpoint of the trunk")
    parser.add_argument("--glove", type=Path, help="text file of word vectors")
    add = parser.real.add_argument
    add("--ids", type=Path,
        help="COCO: Karpathy's dataset_coco.json, or a folder of *_ids.npy or .txt")
    add("--vocabulary", type=Path,
        help="JSON {word: id} (default: words that occur 4 times in training)")


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {standard_error(values):.1f}"


def gap(first: list[float], second: list[float]) -> tuple[str, bool | None]:
    """Paired difference of two methods over the seeds, and whether it is above 0.

    Judged from three seeds on, where it is two standard errors away from 0.
    """
    gains = [a - b for a, b in zip(first, second)]
    mean, error = statistics.mean(gains), standard_error(gains)
    clear = len(gains) >= 3 and abs(mean) > 2 * error
    return f"{mean:+.1f} ± {error:.1f}", mean > 0 if clear else None


def finish(run: harness.Run, prefix: str) -> None:
    values: dict[str, dict[str, list[float]]] = {}
    for seed in run.seeds:
        for method in run.args.methods:
            for score, figures_ in run.recorded(run_name(method, seed)).items():
                for name, value in figures_.items():
                    values.setdefault(f"{method}, {score}", {}).setdefault(name, []).append(value)
    titles = {"rp": "R-P", "pmrp": "PMRP", "recall_1": "R@1", "recall_10": "R@10"}
    shown = {f"{prefix}{way}_{name}": f"{way} {title}" for name, title in titles.items()
             for way in ("i2t", "t2i") if f"{prefix}{way}_{name}" in next(iter(values.values()))}
    table = [{"method": row, **{title: spread(v[name]) for name, title in shown.items()},
              "paper, COCO 1K: PMRP, R@1": " ".join(map(str, REFERENCE.get(row, ("-",))))}
             for row, v in values.items()]
    rows, main_row = [], "PCME, match probability"
    for other in [row for row in values if row != main_row] if main_row in values else []:
        published = {}
        if other in REFERENCE:
            gains = [round(x - y, 1) for x, y in zip(REFERENCE[main_row], REFERENCE[other])]
            published = dict(zip(("i2t PMRP", "t2i PMRP", "i2t R@1", "t2i R@1"), gains))
        for name, title in shown.items():
            gain, holds = gap(values[main_row][name], values[other][name])
            claim = f"{main_row}, above {other}: {title} (points)"
            paper = published.get(title)
            rows.append({"claim": claim, "paper": paper, "this run": gain, "holds": holds})
    if run.figures and run.is_main:
        columns = [name for name in shown if not name.endswith("recall_10")]
        bars = {row: ([statistics.mean(v[n]) for n in columns],
                      [statistics.pstdev(v[n]) for n in columns]) for row, v in values.items()}
        figures.bar_chart(
            run.figures / "pcme_retrieval.png", [shown[name] for name in columns], bars,
            ylim=(0, 1.4 * max(max(means) for means, _ in bars.values())),
            title="Retrieval by kind of training", ylabel="percent", size=(820, 400))
    run.finish(rows, {"retrieval": table})


if __name__ == "__main__":
    main()
