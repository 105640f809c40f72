"""What density and coverage are for, on Gaussians: equal sets, outliers, dropped modes, the choice
of k.

    python benchmarks/prdc_toy.py --figures figures        # n = 2,000, about a minute on one core
    python benchmarks/prdc_toy.py --preset paper           # n = 10,000 as in the paper, an hour

1. Equal distributions: precision and recall fall with the dimension and the number of points and
   never reach 1; density is 1 and coverage 1 - prod (N - i) / (N + M - i) in every dimension (means
   over 20 draws, within 4 standard errors).
2. k: coverage follows its closed form, 0.969 at k = 5, the smallest above 0.95 for 10,000 points
   (the paper's choice).
3. A shifted generator and one outlier in R^64: one real outlier gives a generator that is wrong
   everywhere precision 1 but density 1 / k; one fake outlier gives it recall 1 but coverage 0. The
   paper's figure has the same axes; where its outlier lies is not published, so 3 * 1 and the
   milder 1 * 1 are both shown.
4. Ten modes in R^64: when modes are dropped one after another recall and coverage fall; when nine
   lose mass to the first together, recall rises until they are gone while coverage falls.
5. Fakes of lower variance in high dimension gather where the real balls overlap: density far above
   1 (a limit to know).
"""

import math
import re
import statistics

import harness
import figures
import torch

from reference.prdc import METRICS, compute_prdc, expected_coverage, select_k

K, DIMENSION = 5, 64
SIZES = {"default": 2000, "tiny": 150, "paper": 10_000}
KS = (1, 2, 3, 5, 10, 20, 50)
SHIFTS = (-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1)
REACTING = {"real": ("precision", "density"), "fake": ("recall", "coverage")}    # to an outlier
DROPPED, SHRUNK = (0, 2, 4, 6, 8, 9), (0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(seed, n, dimension):
    """Two independent sets of standard normal points."""
    both = normal(seed, 2, n, dimension)
    return both[0], both[1]


def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def recorded(run, name, sets, k):
    """The metrics of the pair of sets that `sets()` gives, once per name."""
    name = re.sub(r"[^\w.-]+", "_", name)
    return run.recorded(name) or run.record(name, compute_prdc(*sets(), k))


def measured(run, label, seeds, cells):
    """{key: mean and standard error of each metric} of `cells` {key: function that gives the (real,
    fake) of a seed}."""
    results = {key: [] for key in cells}
    work = [(key, seed) for key in cells for seed in seeds]
    for key, seed in run.progress(work, label=label):
        results[key].append(recorded(run, f"{label} {key} {seed}", lambda: cells[key](seed), K))
    summary = {}
    for key, rows in results.items():
        values = {name: [row[name] for row in rows] for name in METRICS}
        summary[key] = {name: statistics.mean(v) for name, v in values.items()} | {
            f"{name} s.e.": standard_error(v) for name, v in values.items()}
    return summary


# ---------------------------------------------------------------- the four experiments

def equal_sets(run, n):
    """By dimension at n points, then by the number of points in R^64."""
    shapes = [(n, d) for d in (1, 2, 8, 64, 256)] + [(n // 4, DIMENSION), (n // 2, DIMENSION)]
    return measured(run, "equal sets", run.seeds, {
        shape: lambda seed, shape=shape: pair(seed, *shape) for shape in shapes})


def by_k(run, n):
    ks = [k for k in KS if k < n]
    rows = [recorded(run, f"k {seed}", lambda: pair(1000 + seed, n, DIMENSION), ks)
            for seed in run.progress(run.seeds, label="k")]
    table = []
    for at, k in enumerate(ks):
        table.append({"k": k} | {name: statistics.mean(row[name][at] for row in rows)
                                 for name in METRICS}
                     | {"expected coverage": expected_coverage(k, n, n),
                        "coverage s.e.": standard_error([row["coverage"][at] for row in rows])})
    return table


def outliers(run, n, seeds):
    """{(outlier, position, shift): metrics}; outlier None, "real" or "fake"."""
    def sets(seed, shift, outlier, position):
        real, fake = pair(2000 + seed, n, DIMENSION)
        fake = fake + shift
        if outlier:
            (real if outlier == "real" else fake)[0] = position
        return real, fake
    kinds = [(None, 0.0)] + [(outlier, position) for position in (3.0, 1.0)
                             for outlier in ("real", "fake")]
    return measured(run, "outliers", seeds, {
        (*kind, shift): lambda seed, kind=kind, shift=shift: sets(seed, shift, *kind)
        for kind in kinds for shift in SHIFTS})


def modes(run, n, seeds):
    """{("sequential", dropped) or ("simultaneous", share of nine modes' mass moved to the first):
    metrics}."""
    def sets(seed, weights):
        centres = 2 * normal(3000, 10, DIMENSION)
        generator = torch.Generator().manual_seed(3001 + seed)
        real_mode = torch.randint(10, (n,), generator=generator)
        fake_mode = torch.multinomial(weights, n, replacement=True, generator=generator)
        real, fake = (torch.randn(n, DIMENSION, generator=generator) for _ in range(2))
        return real + centres[real_mode], fake + centres[fake_mode]
    cells = {}
    for dropped in DROPPED:
        cells["sequential", dropped] = torch.tensor([1.0] * (10 - dropped) + [0.0] * dropped)
    for share in SHRUNK:
        cells["simultaneous", share] = torch.tensor([1.0 + 9 * share] + [1.0 - share] * 9)
    return measured(run, "modes", seeds, {
        key: lambda seed, weights=weights: sets(seed, weights) for key, weights in cells.items()})


# ---------------------------------------------------------------- together

def main(argv=None):
    run = harness.start(harness.parser(__doc__, presets=tuple(SIZES),
                                       seeds=20, data=False, networks=False), argv)
    n = SIZES[run.args.preset]
    few = run.seeds[:3]
    equal, k_rows = equal_sets(run, n), by_k(run, n)
    shifted, dropped = outliers(run, n, few), modes(run, n, few)

    def scaled(seed, scale):
        real, fake = pair(4000 + seed, n, 256)
        return real.relu(), scale * fake.relu()

    narrow = measured(run, "variance", few, {
        scale: lambda seed, scale=scale: scaled(seed, scale) for scale in (1.0, 0.95, 0.9)})
    tables = {
        "equal sets": [{"points": size, "dimension": d} | row
                       | {"expected coverage": expected_coverage(K, size, size)}
                       for (size, d), row in equal.items()],
        "k": k_rows,
        "outliers": [{"shift": shift} | {f"clean {name}": shifted[None, 0.0, shift][name]
                                         for name in METRICS} | {
            f"{outlier} outlier at {position:g}, {name}": shifted[outlier, position, shift][name]
            for outlier, names in REACTING.items()
            for position in (3.0, 1.0) for name in names} for shift in SHIFTS],
        "modes": [{"how": how, "dropped": amount} | {name: row[name] for name in METRICS}
                  for (how, amount), row in dropped.items()],
        "variance": [{"fakes scaled by": scale} | {name: row[name] for name in METRICS}
                     for scale, row in narrow.items()]}
    if run.figures is not None and run.is_main:
        draw(run.figures, tables)
    run.finish(rows=claims(n, equal, k_rows, shifted, dropped, narrow,
                           judged=run.args.preset != "tiny" and len(run.seeds) > 4),
               tables=tables)


def claims(n, equal, k_rows, shifted, dropped, narrow, judged):
    rows = []

    def claim(text, paper, value, holds):
        rows.append({"claim": text, "paper": paper, "this run": value,
                     "holds": holds if judged else None})

    for (size, d), row in equal.items():
        if size == n:
            for name, expected in (("density", 1.0), ("coverage", expected_coverage(K, n, n))):
                claim(f"{name} of equal sets, dimension {d}", expected, row[name],
                      abs(row[name] - expected) < 4 * row[f"{name} s.e."])
    claim("precision of equal sets falls: dimension 256 less dimension 1", None,
          equal[n, 256]["precision"] - equal[n, 1]["precision"],
          equal[n, 256]["precision"] < equal[n, 1]["precision"] - 0.2)
    many, fewer = equal[n, 64], equal[n // 4, 64]
    claim(f"... and with points: {n} less {n // 4} in R^64", None,
          many["precision"] - fewer["precision"],
          many["precision"] < fewer["precision"] - 2 * fewer["precision s.e."])
    claim("k chosen for 10,000 and 10,000 points", 5, select_k(10_000, 10_000),
          select_k(10_000, 10_000) == 5)
    worst = max(abs(row["coverage"] - row["expected coverage"])
                / (row["coverage s.e."] or math.inf) for row in k_rows)
    claim("coverage over k: largest distance to the closed form, in standard errors", None, worst,
          worst < 4)
    real, fake = shifted["real", 3.0, 1], shifted["fake", 3.0, -1]
    claim("precision of a wrong generator, one real outlier", None, real["precision"],
          real["precision"] > 0.99)
    claim("density of it (1 / k: one ball holds every fake)", None, real["density"],
          0.2 <= real["density"] <= 0.25)
    claim("recall of a wrong generator, one fake outlier", None, fake["recall"],
          fake["recall"] > 0.99)
    claim("coverage of it", None, fake["coverage"], fake["coverage"] < 0.02)
    drop = shifted[None, 0.0, 0]["coverage"] - max(shifted[None, 0.0, m]["coverage"]
                                                   for m in (-0.5, 0.5))
    claim("coverage lost by a shift of 0.5", None, drop, drop > 0.5)
    late, start = dropped["simultaneous", 0.95], dropped["simultaneous", 0]
    claim("simultaneous: recall at 95 % less recall at 0", None, late["recall"] - start["recall"],
          late["recall"] - start["recall"] > 2 * (late["recall s.e."] + start["recall s.e."]))
    claim("simultaneous: coverage at 95 %", None, late["coverage"], late["coverage"] < 0.4)
    for how, amounts in (("sequential", DROPPED), ("simultaneous", SHRUNK)):
        falls = [dropped[how, b]["coverage"] - dropped[how, a]["coverage"]
                 for a, b in zip(amounts, amounts[1:])]
        claim(f"{how}: largest change of coverage from step to step", None, max(falls),
              max(falls) < 0)
    claim("density of fakes scaled by 0.9 in R^256 (a known limit)", None, narrow[0.9]["density"],
          narrow[0.9]["density"] > 2)
    return rows


def draw(folder, tables):
    def chart(name, rows, x, lines, **axes):
        series = {label: ([row[x] for row in rows], [row[key] for row in rows])
                  for label, key in lines.items()}
        figures.line_chart(folder / f"prdc-{name}.png", series, markers=True, **axes)

    plain = {name: name for name in METRICS}
    first = tables["equal sets"][0]["points"]
    chart("equal", [row for row in tables["equal sets"] if row["points"] == first], "dimension",
          plain | {"expected coverage": "expected coverage"}, logx=True,
          title="Equal distributions: only density and coverage know",
          xlabel="dimension", ylim=(0, 1.2))
    chart("k", tables["k"], "k", {"recall": "recall", "coverage": "coverage",
                                  "expected coverage": "expected coverage"},
          logx=True, title="Equal distributions in R^64", xlabel="k", ylim=(0, 1.05))
    for outlier, names in REACTING.items():
        lines = {f"{name}, {label}": key for name in names
                 for label, key in (("clean", f"clean {name}"),
                                    (f"one {outlier} outlier", f"{outlier} outlier at 3, {name}"))}
        chart(f"{outlier}-outlier", tables["outliers"], "shift", lines,
              title=f"One {outlier} outlier at 3, fakes shifted in R^64",
              xlabel="shift of the fakes")
    for how in ("sequential", "simultaneous"):
        chart(how, [row for row in tables["modes"] if row["how"] == how], "dropped", plain,
              title=f"Ten modes, dropped {'one by one' if how == 'sequential' else 'together'}",
              ylim=(0, 1.2),
              xlabel="modes dropped" if how == "sequential"
              else "share of the mass of nine modes moved to the first")


if __name__ == "__main__":
    main()
