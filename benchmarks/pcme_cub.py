"""PCME on CUB Captions: R-Precision on unseen classes, all scores, ablation of the training.

    python benchmarks/pcme_cub.py                                 # rendered shapes, about 5 minutes
    python benchmarks/pcme_cub.py --seeds 3 --figures figures --record
    python benchmarks/pcme_cub.py --data /data/cub --preset paper \\
        --lists /data/cub/lists --trunk-weights resnet50.pth --glove glove.840B.300d.txt \\
        --vocabulary cub_vocab.json --amp bf16 --workers 8

Every step takes one image and one of its captions of each training class; all items of a class
match. Models are judged on classes they never saw. Rendered analogue: a class is a colour and a
shape (20 seen, 10 unseen), an image holds one object, and its ten captions tell more or less of its
size, colour, shape and place.

Paper, unseen CUB classes, R-Precision image to text / text to image: PCME 26.3 / 26.8, its means
alone 24.7 / 25.6, triplet without mining (VSE0) 22.4 / 22.6, hardest negatives (PVSE K = 1) 22.3 /
20.5; one sigma for all dimensions 25.7 / -. The paper's ablation of uniformity, KL and the
uncertainty head has the rows printed here.
"""

import statistics
from pathlib import Path

import figures
import harness
import torch
from pcme_coco import (
    AUGMENTED,
    METHODS,
    Problem,
    Settings,
    caption_set,
    encode,
    gap,
    run_name,
    spread,
    start_study,
    train_method,
)
from torch import nn

from data_tools import captions, synthetic
from reference import pcme

TERMS = {"shift": 5.0, "vib_beta": 1e-3, "uniform_lambda": 10.0}
PRESETS = {
    "default": Settings(batch=20, **TERMS),
    "tiny": Settings(side=32, embed_dim=16, word_dim=8, batch=20, samples=3, **TERMS),
    "paper": Settings(
        "resnet50", 224, 512, 300, 150, **pcme.RECIPES["cub"], log_sigma=None, **TERMS, **AUGMENTED
    ),
}


class NoAttention(nn.Module):
    """Takes the place of attention pooling: nothing local is read."""

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_zeros(len(x), x.shape[2]), x.new_zeros(*x.shape[:2], 1)


def without_attention(tower: nn.Module) -> None:
    tower.pie_net.attention = tower.uncertain_net.attention = NoAttention()


def bounded_sigma(tower: nn.Module) -> None:
    """The uncertainty head with what the paper leaves out, a sigmoid and a LayerNorm as in the
    mean's head.
    """
    head = tower.uncertain_net
    head.layer_norm = nn.LayerNorm(head.fc.out_features)
    nn.init.constant_(head.layer_norm.bias, head.fc.bias[0].item())
    head.fc = nn.Sequential(head.fc, nn.Sigmoid())
    head.register_forward_hook(lambda m, _, out: {**out, "logsigma": m.layer_norm(out["logsigma"])})


def scalar_sigma(tower: nn.Module) -> None:
    tower.uncertain_net.register_forward_hook(
        lambda m, _, out: {
            **out,
            "logsigma": out["logsigma"].mean(1, keepdim=True).expand_as(out["logsigma"]),
        }
    )


# name: (method of pcme_coco, changed settings, change of a tower, paper's R-Precision i2t, t2i)
VARIANTS = {
    "PCME": ("PCME", {}, None, "26.3 26.8"),
    "one sigma for all dimensions": ("PCME", {}, scalar_sigma, "25.7 -"),
    "without uniformity": ("PCME", {"uniform_lambda": 0.0}, None, None),
    "without KL": ("PCME", {"vib_beta": 0.0}, None, None),
    "sigmoid and LayerNorm on sigma": ("PCME", {}, bounded_sigma, None),
    "without local attention": ("PCME", {}, without_attention, None),
    "deterministic": ("deterministic", {}, None, None),
    "triplet": ("triplet", {}, None, "22.4 22.6"),
    "hard triplet": ("hard triplet", {}, None, "22.3 20.5"),
}
SPACE = {
    **dict.fromkeys(pcme.POINTS, "N"),
    **dict.fromkeys(pcme.GAUSSIANS, "2 N"),
    **dict.fromkeys(pcme.SAMPLED, "J N"),
    "matmul": "N",
}


def embedded(settings: Settings, tiny: bool) -> Problem:
    """20 classes to train on; the other 10, another colour for every shape and each colour at
    least once, to test.
    """
    shapes, hues = len(synthetic.SHAPES), len(synthetic.HUES)
    unseen = torch.tensor(
        [
            hue * shapes + kind
            for hue in range(hues)
            for kind in range(shapes)
            if (hue - kind) % 3 == 0
        ]
    )
    seen = torch.tensor([c for c in range(hues * shapes) if c not in unseen.tolist()])
    sets = []
    for seed, classes, each in ((30, seen, 2 if tiny else 30), (31, unseen, 2 if tiny else 20)):
        labels = classes.repeat(each)
        scenes = synthetic.captioned_shapes(
            len(labels), settings.side, seed, captions=10, objects=1, labels=labels
        )
        sets.append(caption_set(scenes, labels))
    return Problem(*sets, captions.Vocabulary.of(sets[0].captions, pcme.tokenize))


def folder(run: harness.Run) -> Problem:
    root, lists = run.args.data, run.args.lists
    omit = captions.seen_test_images(lists) if lists else ()
    train = captions.cub_captions(root, captions.cub_classes("trainval", lists), omit=omit)
    test = captions.cub_captions(root, captions.cub_classes("test", lists))
    words = run.args.vocabulary
    return Problem(
        train,
        test,
        (
            captions.Vocabulary.load(words, pcme.tokenize)
            if words
            else captions.Vocabulary.of(train.captions, pcme.tokenize)
        ),
    )


def scores(codes: dict, criterion: nn.Module, method: str, samples: int, seed: int) -> torch.Tensor:
    """(Ni, Nc) by any inference score."""
    generator = torch.Generator(codes["image_mu"].device).manual_seed(seed)
    mus, sigmas = (
        [codes[f"{kind}_{key}"] for kind in ("image", "caption")] for key in ("mu", "logsigma")
    )
    if method in pcme.SAMPLED or method == "matmul":
        return pcme.pairwise_similarity(
            *(pcme.sample_gaussian(m, l, samples, generator) for m, l in zip(mus, sigmas)),
            method,
            shift=criterion.shift.item(),
            negative_scale=criterion.negative_scale.item(),
        )
    if method in pcme.POINTS:
        return pcme.pairwise_similarity(*mus, method)
    return pcme.pairwise_similarity(
        *mus,
        method,
        *sigmas,
        shift=criterion.shift.item(),
        negative_scale=criterion.negative_scale.item(),
    )


def judge(sim: torch.Tensor, test: captions.CaptionSet) -> dict[str, float]:
    ways = {
        "i2t": (sim, test.classes, test.classes[test.owner]),
        "t2i": (sim.T, test.classes[test.owner], test.classes),
    }
    return {
        f"{way}_{name}": value
        for way, arguments in ways.items()
        for name, value in pcme.cub_metrics(*arguments, percent=True).items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, presets=tuple(PRESETS))
    parser.add_argument(
        "--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows of the table"
    )
    parser.add_argument("--lists", type=Path, help="folder of the published lists")
    run, settings = start_study(parser, PRESETS, argv)
    problem = folder(run) if run.args.data else embedded(settings, run.args.preset == "tiny")
    for seed in run.seeds:
        for variant in run.args.methods:
            name, (method, changes, adapt, _) = run_name(variant, seed), VARIANTS[variant]
            if run.recorded(name) is not None:
                continue
            make, sampled = METHODS[method]
            own = settings._replace(**changes)
            criterion = make(own)
            model = train_method(
                run, name, problem, own, criterion, sampled, seed, pairs="classes", adapt=adapt
            )
            codes = encode(run, model, problem.test, problem.vocabulary, own.side)
            result = judge(
                scores(
                    codes, criterion, "log_matching_prob" if sampled else "mean", own.samples, seed
                ),
                problem.test,
            )
            for kind in ("image", "caption"):
                result[f"{kind} log sigma"] = (
                    codes[f"{kind}_logsigma"].mean().item() if sampled else None
                )
            if variant == "PCME":
                judged = lambda *choice: judge(
                    scores(codes, criterion, *choice, seed), problem.test
                )  # noqa: E731
                result["scores"] = {m: judged(m, own.samples) for m in pcme.METHODS}
                result["samples"] = {j: judged("log_matching_prob", j) for j in (1, 3, 7, 15)}
            run.record(name, result)
    finish(run)


def finish(run: harness.Run) -> None:
    rows_of = {
        variant: [run.recorded(run_name(variant, seed)) for seed in run.seeds]
        for variant in run.args.methods
    }
    column = lambda rows, name: [row[name] for row in rows]  # noqa: E731
    shown = {
        "i2t_r_precision": "i2t R-P",
        "t2i_r_precision": "t2i R-P",
        "i2t_recall_1": "i2t R@1",
        "t2i_recall_1": "t2i R@1",
    }
    sigma = lambda rows, kind: (
        "-" if rows[0][kind] is None else f"{statistics.mean(column(rows, kind)):.2f}"
    )  # noqa: E731
    tables = {
        "training": [
            {
                "training": variant,
                **{title: spread(column(rows, name)) for name, title in shown.items()},
                "image log sigma": sigma(rows, "image log sigma"),
                "caption log sigma": sigma(rows, "caption log sigma"),
                "paper, CUB R-P": VARIANTS[variant][3] or "-",
            }
            for variant, rows in rows_of.items()
        ]
    }
    claims, ours = [], rows_of.get("PCME")
    for other in [v for v in rows_of if v != "PCME"] if ours else []:
        for name in ("i2t_r_precision", "t2i_r_precision"):
            gain, holds = gap(column(ours, name), column(rows_of[other], name))
            claims.append(
                {
                    "claim": f"PCME above {other}, {shown[name]} (points)",
                    "paper": difference(other, name.startswith("t2i")),
                    "this run": gain,
                    "holds": holds,
                }
            )
    if ours:
        score_rows = {m: [row["scores"][m] for row in ours] for m in pcme.METHODS}
        tables["scores of PCME"] = [
            {
                "score": m,
                "numbers kept (D)": SPACE[m],
                **{title: spread(column(rows, name)) for name, title in shown.items()},
            }
            for m, rows in score_rows.items()
        ]
        for name in ("i2t_r_precision", "t2i_r_precision"):
            gain, holds = gap(
                column(score_rows["log_matching_prob"], name), column(score_rows["mean"], name)
            )
            claims.append(
                {
                    "claim": f"match probability above means only, {shown[name]} (points)",
                    "paper": 1.6 if name[0] == "i" else 1.2,
                    "this run": gain,
                    "holds": holds,
                }
            )
    if run.figures and run.is_main:
        names = ("i2t_r_precision", "t2i_r_precision")
        bars = {
            shown[n]: (
                [statistics.mean(column(rows, n)) for rows in rows_of.values()],
                [statistics.pstdev(column(rows, n)) for rows in rows_of.values()],
            )
            for n in names
        }
        figures.bar_chart(
            run.figures / "pcme_cub_training.png",
            list(rows_of),
            bars,
            title="R-Precision on unseen classes",
            ylabel="percent",
            size=(1180, 380),
        )
        if ours:
            counts = list(ours[0]["samples"])
            figures.line_chart(
                run.figures / "pcme_cub_samples.png",
                {
                    shown[n]: (
                        [int(j) for j in counts],
                        [statistics.mean(row["samples"][j][n] for row in ours) for j in counts],
                    )
                    for n in names
                },
                markers=True,
                title="R-Precision by number of samples J",
                xlabel="J",
                ylabel="percent",
                size=(460, 320),
            )
    run.finish(claims, tables)


def difference(other: str, which: int) -> float | None:
    """Published PCME minus another published row."""
    values = (VARIANTS[other][3] or "- -").split()
    return (
        None
        if values[which] == "-"
        else round(float(VARIANTS["PCME"][3].split()[which]) - float(values[which]), 1)
    )


if __name__ == "__main__":
    main()
