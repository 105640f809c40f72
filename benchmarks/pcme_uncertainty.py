"""What PCME's uncertainty means: damaged items, caption length, failing queries, the plane.

    python benchmarks/pcme_uncertainty.py --figures figures       # rendered shapes, 3 minutes
    python benchmarks/pcme_uncertainty.py --seeds 3 --figures figures --record
    python benchmarks/pcme_uncertainty.py --data flickr8k_64 --preset small --seeds 2 \\
        --models runs/pcme_coco --figures figures --record flickr8k_64

--models takes the models that pcme_coco.py trained in that folder with the same data and preset;
otherwise they are trained here. The uncertainty of an item is its mean log sigma. Paper (figures):
it grows as more of an image is erased and as more words are removed from a caption, and recall
falls from the most certain tenth of the queries to the least certain.

The plane: some captions of the first model on the two main directions of their means; an ellipse
is the projected Gaussian at ten sigma.
"""

import statistics
from pathlib import Path

import figures
import harness
import numpy as np
import torch
from pcme_coco import (METHODS, PRESETS, Problem, add_data_arguments, build_model, encode,
                       image_batches, load, similarities, train_method)
from torch import nn

from data_tools import captions, loader, synthetic
from reference import pcme

RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8)
WAYS = {"image": "i2t", "caption": "t2i"}
MATCH_STEPS = (1, 2, 4, 10, 30, 100)  # captions by the number of images they fit


def trained(run: harness.Run, problem: Problem, seed: int) -> tuple[pcme.PCME, nn.Module]:
    """The PCME model of a seed and its criterion, from --models or trained here."""
    settings, name = PRESETS[run.args.preset], f"PCME-seed{seed}"
    criterion = METHODS["PCME"][0](settings)
    source = (run.args.models or run.out) / f"{name}-weights.pt"
    if run.args.models or (run.args.resume and source.exists()):
        model = build_model(settings, len(problem.vocabulary), seed)
        harness.load_weights(model, source)
        criterion.load_state_dict(harness.read_tensors(source)["criterion"])
        return model.to(run.device), criterion.to(run.device)
    return train_method(run, name, problem, settings, criterion, True, seed), criterion


def spearman(x, y) -> float:
    """Rank correlation, ties with their mean rank."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1])


@torch.no_grad()
def study(run: harness.Run, model: pcme.PCME, criterion: nn.Module, problem: Problem,
          seed: int) -> dict:
    """All figures of one model on the test set."""
    settings, test, vocabulary = PRESETS[run.args.preset], problem.test, problem.vocabulary
    codes = encode(run, model, test, vocabulary, settings.side)
    u = {kind: pcme.uncertainty(codes[f"{kind}_logsigma"]).cpu().numpy() for kind in WAYS}
    sim = similarities(codes, criterion, settings.samples, seed)["match probability"]
    own = torch.from_numpy(np.arange(len(test))[:, None] == test.owner).to(sim.device)
    bins = {}
    for kind, scores, matches in (("image", sim, own), ("caption", sim.T, own.T)):
        best = scores.masked_fill(~matches, -torch.inf).amax(1, keepdim=True)
        found = ((scores > best).sum(1) < run.args.recall).float().cpu().numpy()
        bins[kind] = pcme.uncertainty_bins(u[kind], found, run.args.bins)

    def sigma(encode, *inputs) -> np.ndarray:
        return pcme.uncertainty(encode(*inputs, num_samples=0)["logsigma"]).cpu().numpy()

    images = torch.cat([x for x, _ in image_batches(run, test.first(1000), settings.side)])
    tokens, lengths = (x.to(run.device) for x in vocabulary(test.captions[:5000]))
    hidden = np.stack([sigma(model.encode_image, pcme.occlude(images, ratio, seed))
                       for ratio in RATIOS])
    dropped = np.stack([sigma(model.encode_text, *pcme.drop_words(tokens, lengths, ratio, seed))
                        for ratio in RATIOS])
    words = np.array([len(vocabulary.ids(caption)) for caption in test.captions])
    share = lambda rows: spearman(np.repeat(RATIOS, rows.shape[1]), rows.ravel())  # noqa: E731
    result = {
        "occlusion": hidden.mean(1),
        "word drop": dropped.mean(1),
        "words": by_value(words, u["caption"]),
        "spearman": {"image, area hidden": share(hidden),
                     "caption, share of words dropped": share(dropped),
                     "caption, number of words": spearman(words, u["caption"])},
        "bins": bins,
        "extremes": {kind: np.argsort(values, kind="stable")[[*range(8), *range(-8, 0)]]
                     for kind, values in u.items()},
    }
    if problem.plausible is not None:
        matches = problem.plausible.sum(0).numpy()
        result["spearman"]["caption, images it fits"] = spearman(matches, u["caption"])
        result["matches"] = by_value(np.digitize(matches, MATCH_STEPS[1:]), u["caption"])
    return result


def by_value(key: np.ndarray, values: np.ndarray) -> dict[int, float]:
    """{key: mean of the values that have it} where there are at least 5."""
    return {int(k): float(values[key == k].mean()) for k in np.unique(key) if (key == k).sum() >= 5}


# ---------------------------------------------------------------- the plane


@torch.no_grad()
def plane(run: harness.Run, model: pcme.PCME,
          vocabulary: captions.Vocabulary) -> dict[str, list[float]]:
    """{caption: [mu x, y, sigma x, y]} on the two main directions of the captions' means."""
    texts = ["a shape", *(f"a {hue} shape" for hue in synthetic.HUES)]
    texts += [f"a {hue} {kind}" for hue in ("red", "blue") for kind in ("disc", "cross")]
    model.eval()
    tokens, lengths = (x.to(run.device) for x in vocabulary(texts))
    out = model.encode_text(tokens, lengths, num_samples=0)
    centred = out["mu"] - out["mu"].mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    sigma = ((2 * out["logsigma"]).exp() @ axes.square().T).sqrt()  # a marginal of the Gaussian
    return {t: [*m, *s] for t, m, s in zip(texts, (centred @ axes.T).tolist(), sigma.tolist())}


def draw_plane(path: Path, ellipses: dict[str, list]) -> None:
    reach = 1.25 * max(abs(v) + 10 * s for x, y, sx, sy in ellipses.values()
                       for v, s in ((x, sx), (y, sy)))
    title = "Captions on two main directions: mean and ten sigma"
    chart = figures.Chart((-reach, reach), (-reach, reach), title=title, size=(560, 560))
    ink = {"red": "#d9301e", "green": "#2f9e44", "blue": "#1f4fd4", "yellow": "#c9a800"}
    ink |= {"purple": "#8e44ad", "white": "#888888"}
    for text, (x, y, sx, sy) in ellipses.items():
        color = ink.get(text.split()[1], figures.INK)
        chart.ellipse(x, y, 10 * sx, 10 * sy, color)
        chart.points([x], [y], color)
        chart.text(x + 0.02 * reach, y, text, color)
    chart.save(path)


# ---------------------------------------------------------------- the script


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, presets=tuple(PRESETS))
    parser.add_argument("--models", type=Path,
                        help="folder of a pcme_coco.py run with PCME-seed*-weights.pt")
    parser.add_argument("--bins", type=harness.count, default=10, help="at least 2")
    parser.add_argument("--recall", type=harness.count, default=1, metavar="K",
                        help="recall@K in the bins")
    add_data_arguments(parser)
    if parser.parse_args(argv).bins < 2:
        parser.error("--bins must be at least 2")
    run = harness.start(parser, argv)
    problem = load(run, PRESETS[run.args.preset])
    if run.args.bins > len(problem.test):
        parser.error(f"--bins must be at most the {len(problem.test)} images of the test set")
    for seed in run.seeds:
        if run.recorded(f"study-seed{seed}") is None:
            model, criterion = trained(run, problem, seed)
            if run.args.data is None and seed == run.seeds[0]:
                run.record("plane", plane(run, model, problem.vocabulary))
            run.record(f"study-seed{seed}", study(run, model, criterion, problem, seed))
    finish(run, problem)


def finish(run: harness.Run, problem: Problem) -> None:
    results, recall = [run.recorded(f"study-seed{seed}") for seed in run.seeds], run.args.recall
    mean = lambda rows: np.mean(rows, 0).tolist()  # noqa: E731
    curves = {name: mean([r[name] for r in results]) for name in ("occlusion", "word drop")}
    parts = {way: mean([r["bins"][kind]["metric"] for r in results]) for kind, way in WAYS.items()}
    ends = results[0]["extremes"]["caption"]
    tables = {
        "uncertainty": [
            {"share hidden or dropped": ratio, "image, mean log sigma": i,
             "caption, mean log sigma": c} for ratio, i, c in zip(RATIOS, *curves.values())],
        "recall by uncertainty": [
            {"part of the queries, from certain to uncertain": f"{part + 1} of {run.args.bins}",
             **{f"{way} R@{recall} (%)": 100 * values[part] for way, values in parts.items()}}
            for part in range(run.args.bins)],
        "captions": [
            {"captions, most certain first": problem.test.captions[certain],
             "most uncertain first": problem.test.captions[uncertain]}
            for certain, uncertain in zip(ends[:8], ends[:-9:-1])],
    }
    if problem.plausible is not None:
        groups = sorted(set.intersection(*(set(r["matches"]) for r in results)), key=int)
        tables["vague captions"] = [
            {"images that the caption fits": f"{MATCH_STEPS[int(group)]} or more",
             "mean log sigma": statistics.mean(r["matches"][group] for r in results)}
            for group in groups]
    claims, enough = [], len(results) >= 3
    for name, title in (("occlusion", "image uncertainty grows with the area hidden"),
                        ("word drop", "caption uncertainty grows with the words dropped")):
        grows = [bool((np.diff(r[name]) > 0).all()) for r in results]
        claims.append({"claim": title, "paper": "grows",
                       "this run": f"at every step in {sum(grows)} of {len(grows)} seeds",
                       "holds": all(grows) if enough else None})
    for name in results[0]["spearman"]:
        claims.append({"claim": f"rank correlation of uncertainty: {name}", "paper": None,
                       "this run": span([r["spearman"][name] for r in results]), "holds": None})
    for kind, way in WAYS.items():
        values = [r["bins"][kind]["correlation"] for r in results]
        claims.append({"claim": f"correlation of {way} R@{recall} with the part of the queries",
                       "paper": "negative", "this run": span(values),
                       "holds": max(values) < -0.5 if enough else None})
    if run.figures and run.is_main:
        draw(run, problem, results, curves, parts)
    run.finish(claims, tables)


def span(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(run: harness.Run, problem: Problem, results: list[dict], curves: dict,
         parts: dict) -> None:
    def chart(name: str, lines: dict, title: str, xlabel: str, ylabel: str = "mean log sigma"):
        figures.line_chart(run.figures / f"{name}.png", lines, markers=True, title=title,
                           xlabel=xlabel, ylabel=ylabel, size=(520, 340))

    errors = {name: np.std([r[name] for r in results], 0) for name in curves}
    names = {"occlusion": "image, area hidden", "word drop": "caption, words dropped"}
    chart("pcme_uncertainty",
          {title: (RATIOS, curves[name], errors[name]) for name, title in names.items()},
          "Uncertainty of damaged items", "share hidden or dropped")
    titles = {"i2t": "image to text", "t2i": "text to image"}
    chart("pcme_recall_by_uncertainty",
          {titles[way]: (np.arange(1, len(values) + 1), 100 * np.array(values))
           for way, values in parts.items()}, f"Recall@{run.args.recall} by uncertainty",
          "part of the queries, certain to uncertain", "percent")
    lengths = sorted(set.intersection(*({int(k) for k in r["words"]} for r in results)))
    sigmas = [statistics.mean(r["words"][str(n)] for r in results) for n in lengths]
    chart("pcme_caption_length", {"captions": (lengths, sigmas)},
          "Uncertainty by length of the caption", "words")
    pictures = [np.asarray(loader.decode(problem.test.open(row)))
                for row in results[0]["extremes"]["image"]]
    figures.image_grid(run.figures / "pcme_extremes.png", pictures,
                       ["certain"] * 8 + ["uncertain"] * 8, columns=8, cell=80)
    if run.recorded("plane") is not None:
        draw_plane(run.figures / "pcme_plane.png", run.recorded("plane"))


if __name__ == "__main__":
    main()
