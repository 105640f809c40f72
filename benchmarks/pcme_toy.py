"""PCME where all is known: items with attributes, captions that name some of them.

    python benchmarks/pcme_toy.py                             # 5 seeds, 4 minutes
    python benchmarks/pcme_toy.py --figures figures --record

Neither pictures nor words: an item has 6 attributes of 6 values. Its image is their one-hot code
under a fixed random matrix, with noise, and half of the images lose a random share (up to 60 %) of
their entries; its captions name 1 to 6 of the attributes. Training knows the own pairs only, as on
COCO; the test set (500 images, 2,500 captions) knows every caption that fits an image
("plausible"), which R-Precision is measured on. Two-layer towers, 600 steps of 128 pairs.

Rows: one PCME model under several scores, the deterministic loss (the same loss of sigma = 0, from
two starting points) and the triplet loss with the hardest negative. Paper: sigma grows as more of
an image is hidden and as a caption says less, recall falls with it, PCME is above both baselines in
R-Precision. Expected here: all of that; but the means of PCME's Gaussians alone rank better than
the match probability, which nears them as J grows.
"""

import math
import statistics
from collections.abc import Iterator

import figures
import harness
import numpy as np
import torch
from pcme_coco import ab, gap, run_name, spread
from pcme_uncertainty import RATIOS, span, spearman
from torch import nn

from reference import pcme

ATTRIBUTES, VALUES, WIDTH = 6, 6, 64
SAMPLES = (1, 3, 7, 15)
METHODS = {  # criterion, and the samples it draws in training
    "PCME": (lambda: pcme.MCSoftContrastiveLoss(15, 15, vib_beta=1e-5), 7),
    "deterministic a=b=5": (lambda: pcme.MCSoftContrastiveLoss(5, 5), 0),
    "deterministic a=b=15": (lambda: pcme.MCSoftContrastiveLoss(15, 15), 0),
    "triplet": (lambda: pcme.TripletLoss(0.2), 0),
}
SHOWN = {f"{way}_{name}": f"{way} {title}" for name, title in
         (("rp", "R-P"), ("plausible1", "plausible@1")) for way in ("i2t", "t2i")}
MATCH = {j: f"PCME, match probability, J = {j}" for j in SAMPLES}
MAIN = MATCH[7]
COMPARED = ("PCME, mean only", "deterministic a=b=5, mean only", "triplet, mean only")


# ---------------------------------------------------------------- the world

class World:
    """Draws items; the random matrix of the images follows from the seed."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(ATTRIBUTES * VALUES, WIDTH, generator=generator)
        self.mix /= math.sqrt(ATTRIBUTES)

    def draw(self, count: int, captions: int, generator: torch.Generator, most_hidden: float = 0.6):
        """Images (N, 64), captions (N * captions, 36), hidden share (N,), codes (N, 36)."""
        values = torch.randint(VALUES, (count, ATTRIBUTES), generator=generator)
        codes = nn.functional.one_hot(values, VALUES).float()
        noise = 0.1 * torch.randn(count, WIDTH, generator=generator)
        share = most_hidden * torch.rand(count, generator=generator)
        share *= torch.rand(count, generator=generator) < 0.5
        images = hide(codes.flatten(1) @ self.mix + noise, share, generator)
        order = torch.rand(count * captions, ATTRIBUTES, generator=generator).argsort(1)
        number = torch.randint(1, ATTRIBUTES + 1, (len(order), 1), generator=generator)
        texts = codes.repeat_interleave(captions, 0) * (order < number).unsqueeze(2)
        return images, texts.flatten(1), share, codes.flatten(1)


def hide(images: torch.Tensor, share: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images with about a share (N,) of their entries zero."""
    return images * (torch.rand(images.shape, generator=generator) >= share.unsqueeze(1))


class Batches:
    """Batches of fresh pairs; each follows from its number, so that a run resumes anywhere."""

    def __init__(self, world: World, steps: int, batch: int, seed: int):
        self.world, self.steps, self.batch, self.seed = world, steps, batch, seed
        self.set_epoch(0, 0)

    def set_epoch(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple]:
        for step in range(self.start, self.steps):
            number = (self.seed * 1_000 + self.epoch) * self.steps + step + 1
            images, texts, *_ = self.world.draw(self.batch, 1,
                                                torch.Generator().manual_seed(number))
            yield images, texts, None


def build_model(samples: int, seed: int) -> pcme.PCME:
    """Two towers of two hidden layers; 0 samples: points (the global generator stays)."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        model = pcme.PCME(*(nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 256),
                                          nn.ReLU(), pcme.GaussianHead(256, 32, -2.0))
                            for width in (WIDTH, ATTRIBUTES * VALUES)))
    model.img_enc.n_samples_inference = samples
    return model


# ---------------------------------------------------------------- one model

@torch.no_grad()
def scores(model: pcme.PCME, criterion: nn.Module, images: torch.Tensor, texts: torch.Tensor,
           sampled: bool, seed: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """{score: (Ni, Nc)}, and log sigma of images and captions."""
    (m1, l1), (m2, l2) = codes = model.img_enc(images), model.txt_enc(texts)
    result = {"mean only": pcme.pairwise_similarity(m1, m2, "mean")}
    if sampled:
        generator = torch.Generator(m1.device).manual_seed(seed)
        for j in SAMPLES:
            drawn = [pcme.sample_gaussian(*code, j, generator) for code in codes]
            result[f"match probability, J = {j}"] = pcme.pairwise_similarity(
                *drawn, "log_matching_prob", **ab(criterion))
        result["match probability, J to infinity"] = pcme.pairwise_similarity(
            m1, m2, "match_prob_moment", l1, l2, **ab(criterion))
        result["expected distance"] = pcme.pairwise_similarity(m1, m2, "csd", l1, l2)
    return result, [l1, l2]


def judge(sim: torch.Tensor, plausible: torch.Tensor) -> dict[str, float]:
    return {f"{way}_{name}": 100 * value for way, s, p in
            (("i2t", sim, plausible), ("t2i", sim.T, plausible.T)) for name, value in
            (("rp", pcme.r_precision(s, p)), ("plausible1", pcme.recall_at_k(s, p, 1)))}


@torch.no_grad()
def uncertainty(run: harness.Run, model: pcme.PCME, sim: torch.Tensor, logsigmas: list,
                images: torch.Tensor, texts: torch.Tensor, share: torch.Tensor, seed: int) -> dict:
    """How sigma follows what is hidden and what is left unsaid, and recall follows sigma."""
    u_image, u_text = (pcme.uncertainty(logsigma).cpu() for logsigma in logsigmas)
    named = texts.sum(1).long().cpu()
    generator = torch.Generator().manual_seed(seed + 1)
    whole = images[share == 0]
    hidden = [hide(whole, torch.full((len(whole),), ratio), generator) for ratio in RATIOS]
    owner = torch.arange(len(images)).repeat_interleave(len(texts) // len(images))
    found = (sim.argmax(0).cpu() == owner).float()
    return {
        "hidden": [pcme.uncertainty(model.img_enc(x.to(run.device))[1]).mean().item()
                   for x in hidden],
        "named": [u_text[named == m].mean().item() for m in range(1, ATTRIBUTES + 1)],
        "spearman": {"image, share hidden": spearman(share, u_image),
                     "caption, attributes named": spearman(named, u_text)},
        "bins": pcme.uncertainty_bins(u_text, found)}


def study(run: harness.Run, method: str, seed: int, tiny: bool) -> dict:
    """Train one model and measure it."""
    make, samples = METHODS[method]
    world, criterion = World(seed), make()
    model = build_model(samples, seed).to(run.device)
    epochs, steps = (2, 5) if tiny else (20, 30)
    training = pcme.train(model, criterion.to(run.device), Batches(world, steps, 128, seed),
                          epochs=epochs, phases=({"lr": 1e-3},), clip=None, seed=seed,
                          resume=run.resumed(run_name(method, seed)))
    run.drive(run_name(method, seed), training, epochs * steps)
    test = torch.Generator().manual_seed(2**40 + seed)
    images, texts, share, codes = world.draw(50 if tiny else 500, 5, test)
    plausible = (codes @ texts.T == texts.sum(1)).to(run.device)
    sims, logsigmas = scores(model.eval(), criterion, images.to(run.device), texts.to(run.device),
                             samples > 0, seed)
    result = {"scores": {score: judge(sim, plausible) for score, sim in sims.items()}}
    if samples:
        result["uncertainty"] = uncertainty(run, model, sims["match probability, J = 7"],
                                            logsigmas, images, texts, share, seed)
    return result


# ---------------------------------------------------------------- the script

def main(argv: list[str] | None = None) -> None:
    run = harness.start(harness.parser(__doc__, seeds=5, data=False, networks=False), argv)
    for seed in run.seeds:
        for method in METHODS:
            if run.recorded(run_name(method, seed)) is None:
                run.record(run_name(method, seed),
                           study(run, method, seed, run.args.preset == "tiny"))
    finish(run)


def finish(run: harness.Run) -> None:
    results = {method: [run.recorded(run_name(method, seed)) for seed in run.seeds]
               for method in METHODS}
    values = {f"{method}, {score}": {name: [r["scores"][score][name] for r in rows]
                                     for name in SHOWN}
              for method, rows in results.items() for score in rows[0]["scores"]}
    sure = [r["uncertainty"] for r in results["PCME"]]
    tables = {"retrieval": [{"method": row, **{title: spread(v[name])
                                               for name, title in SHOWN.items()}}
                            for row, v in values.items()],
              "uncertainty": [
                  {"attributes that a caption names": m + 1, "caption, mean log sigma": text}
                  | ({"share of an image hidden": RATIOS[m], "image, mean log sigma": image}
                     if m < len(RATIOS) else {})
                  for m, (text, image) in enumerate(zip(mean_of(sure, "named"),
                                                        [*mean_of(sure, "hidden"), None]))]}
    claims, enough = [], len(run.seeds) >= 3
    for other in COMPARED:
        for way in ("i2t", "t2i"):
            gain, holds = gap(values[MAIN][f"{way}_rp"], values[other][f"{way}_rp"])
            claims.append({"claim": f"{MAIN}, above {other}: {way} R-P (points)", "paper": "above",
                           "this run": gain, "holds": holds})
    for way in ("i2t", "t2i"):
        rising = [all(a <= b + 1 for a, b in zip(steps, steps[1:])) for steps in
                  zip(*(values[MATCH[j]][f"{way}_rp"] for j in SAMPLES))]
        claims.append({"claim": f"{way} R-P does not fall with J by more than a point",
                       "paper": "rises", **in_seeds(rising, enough)})
    for key, sign, title, paper in (
            ("hidden", 1, "image uncertainty grows with the share hidden", "grows"),
            ("named", -1, "caption uncertainty falls with the attributes named", "falls")):
        steady = [bool((sign * np.diff(u[key]) > 0).all()) for u in sure]
        claims.append({"claim": title, "paper": paper, **in_seeds(steady, enough)})
    for name, least, sign in (("image, share hidden", 0.5, 1),
                              ("caption, attributes named", 0.9, -1)):
        found = [u["spearman"][name] for u in sure]
        claims.append({"claim": f"rank correlation of uncertainty: {name}", "paper": None,
                       "this run": span(found),
                       "holds": min(sign * x for x in found) > least if enough else None})
    found = [u["bins"]["correlation"] for u in sure]
    claims.append({"claim": "correlation of t2i R@1 with the tenth of the captions",
                   "paper": "negative", "this run": span(found),
                   "holds": max(found) < -0.9 if enough else None})
    if run.figures and run.is_main:
        draw(run, values, sure)
    run.finish(claims, tables)


def mean_of(rows: list[dict], key: str) -> list[float]:
    return np.mean([row[key] for row in rows], 0).tolist()


def in_seeds(held: list[bool], enough: bool) -> dict:
    return {"this run": f"in {sum(held)} of {len(held)} seeds",
            "holds": all(held) if enough else None}


def draw(run: harness.Run, values: dict, sure: list[dict]) -> None:
    bars = {row: ([statistics.mean(values[row][name]) for name in SHOWN],
                  [statistics.pstdev(values[row][name]) for name in SHOWN])
            for row in (MAIN, *COMPARED)}
    figures.bar_chart(run.figures / "pcme_toy_retrieval.png", list(SHOWN.values()), bars,
                      ylim=(0, 140), title="Retrieval by kind of training", ylabel="percent",
                      size=(820, 400))
    tenths = 100 * np.array([u["bins"]["metric"] for u in sure])
    for name, lines, title, xlabel, ylabel in (
            ("named", {"captions": (range(1, ATTRIBUTES + 1), mean_of(sure, "named"))},
             "Uncertainty of captions", "attributes named", "mean log sigma"),
            ("hidden", {"images": (RATIOS, mean_of(sure, "hidden"))},
             "Uncertainty of images", "share hidden", "mean log sigma"),
            ("recall", {"captions": (range(1, 11), tenths.mean(0), tenths.std(0))},
             "Text to image recall@1 by uncertainty", "tenth of the captions, certain to uncertain",
             "percent")):
        figures.line_chart(run.figures / f"pcme_toy_{name}.png", lines, markers=True, title=title,
                           xlabel=xlabel, ylabel=ylabel, size=(400, 300))


if __name__ == "__main__":
    main()
