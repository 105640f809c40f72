"""Time and memory of exact PRDC beside the official package and the floor, and how both grow with
the number of points.

    python benchmarks/speed_prdc.py --threads 1            # about 4 minutes
    python benchmarks/speed_prdc.py                        # all threads
    python benchmarks/speed_prdc.py --threads 1 --growth   # 5,000 to 50,000 points, about 3 minutes

Ours and the official package (where `prdc` is installed; on several threads with its default
n_jobs) take turns in every round, on the same features (float32, N = M, k = 5); the figure is the
median over rounds of CPU time on one thread, of wall time otherwise. Floor: the 4 N^2 D
multiplications and additions that symmetry leaves, at the rate of torch's float32 matrix product
measured in the same rounds. Expected on one thread: twice as fast as the official package at
10,000 x 64, 1.3 times at 10,000 x 2,048; on an H200 50,000 x 4,096 in at most 4 s (--device cuda
--sizes 50000x4096). --growth: cost per pair of points in R^64, and the peak of the resident size of
a fresh process (Linux).
"""

import contextlib
import io
import subprocess
import sys
import warnings

import harness
import figures
import timing
import torch

from reference.prdc import compute_prdc

MEMORY = """
import re, sys, torch, warnings
warnings.simplefilter("ignore")
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from reference.prdc import compute_prdc
count, dimension, budget = map(int, sys.argv[2:5])
generator = torch.Generator().manual_seed(0)
real, fake = (torch.randn(count, dimension, generator=generator) for _ in range(2))
compute_prdc(real[:600], fake[:600])
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
compute_prdc(real, fake, memory_budget=budget or None)
print((peak() - before) / 1024)
"""


def official_prdc(run):
    """The official function with as many jobs as threads (its own default is 8), or None."""
    try:
        from prdc import prdc as package
    except ImportError:
        run.log("the package prdc is not installed: no comparison with it")
        return None
    whole = package.sklearn.metrics.pairwise_distances

    def compute(real, fake):
        jobs = 1 if torch.get_num_threads() == 1 else 8
        package.sklearn.metrics.pairwise_distances = lambda *a, **o: whole(*a,
                                                                           **{**o, "n_jobs": jobs})
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return package.compute_prdc(real.numpy(), fake.numpy(), 5)
        finally:
            package.sklearn.metrics.pairwise_distances = whole
    return compute


@contextlib.contextmanager
def one_blas_thread(one):
    """numpy's matrix products on one thread too, where threadpoolctl (a part of scikit-learn) can
    say so."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        threadpool_limits = None
    if not one or threadpool_limits is None:
        yield
    else:
        with threadpool_limits(1):
            yield


def sets(count, dimension, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, dimension, generator=generator).to(device) for _ in range(2)]


def peak_memory(count, dimension, budget=0):
    """MiB that a fresh process's resident size grows by during a call."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(harness.ROOT), str(count),
                           str(dimension), str(budget)],
                          capture_output=True, text=True, check=True)
    return float(done.stdout)


def compare(run, sizes):
    """One row per size: seconds of each, their ratio, the floor, and whether the decisions are the
    same."""
    official, rows = official_prdc(run), []
    for count, dimension in sizes:
        name = f"{count}x{dimension}"
        if (row := run.recorded(name)) is not None:
            rows.append(row)
            continue
        real, fake = sets(count, dimension, run.device)
        block, results = real[:1024], {}
        calls = {"ours": lambda: results.update(ours=compute_prdc(real, fake, 5)),
                 "product": lambda: block @ block.T}
        if official is not None:
            calls["official"] = lambda: results.update(official=official(real.cpu(), fake.cpu()))
        rounds = 1 if run.args.preset == "tiny" else 3 if count ** 2 * dimension < 1e10 else 2
        times = timing.interleaved(run, calls, rounds, f"{count} x {dimension}", at_least=0.05)
        seconds = timing.medians(times)
        row = {"N = M": count, "D": dimension, "ours, s": seconds["ours"]}
        if official is not None:
            row["official, s"] = seconds["official"]
        row["floor, s"] = 2 * (count / len(block)) ** 2 * seconds["product"]
        if official is not None:
            row["official / ours"] = timing.ratio(times, "official", "ours")
            row["largest difference"] = max(abs(float(results["official"][m]) - v)
                                            for m, v in results["ours"].items())
            row["allowed"] = 1 / count                        # five balls, or pairs of one
        rows.append(run.record(name, row))
    return rows


def growth(run, counts, dimension):
    """One row per number of points: seconds, their share per pair, and memory up to 20,000."""
    rows = []
    for count in counts:
        if (row := run.recorded(f"growth-{count}")) is None:
            real, fake = sets(count, dimension, run.device)
            times = timing.interleaved(run, {"ours": lambda: compute_prdc(real, fake, 5)},
                                       3 if count <= 10_000 else 1, f"{count} x {dimension}")
            seconds = timing.medians(times)["ours"]
            row = run.record(f"growth-{count}", {
                "N = M": count, "D": dimension, "s": seconds,
                "ns per pair": 1e9 * seconds / (3 * count ** 2),
                "extra MiB": peak_memory(count, dimension) if count <= 20_000 else None,
                "official's matrices, MiB (12 N^2 bytes)": 12 * count ** 2 / 2 ** 20})
        rows.append(row)
    return rows


def main(argv=None):
    parser = harness.parser(__doc__, data=False, networks=False)
    parser.add_argument("--sizes", nargs="+", metavar="NxD",
                        help="default: 2000, 5000 and 10000 times 64 and 2048; "
                        "with --growth only N counts, by default 5000, 10000, 20000 and 50000")
    parser.add_argument("--growth", action="store_true",
                        help="cost per pair and memory instead of the comparison")
    given = parser.parse_args(argv).sizes or []
    try:
        sizes = [(int(n), int(d)) for n, d in (size.split("x") for size in given)]
        if any(n < 7 or d < 1 for n, d in sizes):
            raise ValueError
    except ValueError:
        parser.error(f"--sizes must be like 5000x64, of at least 7x1, not {' '.join(given)}")
    run = harness.start(parser, argv)
    warnings.simplefilter("ignore")
    tiny, one_thread = run.args.preset == "tiny", torch.get_num_threads() == 1
    if run.args.growth:
        counts = sorted({n for n, _ in sizes}) or ([200, 400] if tiny
                                                   else [5000, 10_000, 20_000, 50_000])
        rows = growth(run, counts, 64)
        costs = [row["ns per pair"] for row in rows]
        claims = [{"claim": "cost per pair, largest N / smallest N", "target": 1.2,
                   "this run": costs[-1] / costs[0],
                   "holds": None if tiny else costs[-1] / costs[0] <= 1.2}]
        if 20_000 in counts:
            extra = rows[counts.index(20_000)]["extra MiB"]
            claims.append({"claim": "extra memory at 20,000 x 64, MiB", "target": 300,
                           "this run": extra, "holds": extra < 300})
            for budget in (2 ** 26, 2 ** 28):
                extra = peak_memory(20_000, 64, budget)
                claims.append({"claim": f"the same with memory_budget = {budget >> 20} MiB",
                               "target": 1.1 * budget / 2 ** 20,
                               "this run": extra, "holds": extra <= 1.1 * budget / 2 ** 20})
        if run.figures is not None:
            counts = [row["N = M"] for row in rows]
            threads = torch.get_num_threads()
            figures.line_chart(run.figures / "prdc-cost-per-pair.png",
                               {f"exact PRDC, D = 64, {threads} thread(s)": (counts, costs)},
                               markers=True, title="Cost per pair of points", xlabel="N = M",
                               ylabel="ns", ylim=(0, 1.3 * max(costs)))
        return run.finish(rows=claims, tables={"growth": rows})
    sizes = sizes or ([(200, 16)] if tiny
                      else [(n, d) for d in (64, 2048) for n in (2000, 5000, 10_000)])
    with one_blas_thread(one_thread):
        rows = compare(run, sizes)
    claims = []
    for row in rows:
        if "official / ours" in row:
            size = row["N = M"], row["D"]
            target = {(10_000, 64): 2.0, (10_000, 2048): 1.3}.get(size, 1.0)
            claims.append({"claim": f"{size[0]} x {size[1]}: official / ours", "target": target,
                           "this run": row["official / ours"],
                           "holds": None if tiny else row["official / ours"] >= target})
            claims.append({"claim": f"{size[0]} x {size[1]}: difference to the official figures",
                           "target": row["allowed"],
                           "this run": row["largest difference"],
                           "holds": row["largest difference"] <= row["allowed"]})
    run.finish(rows=claims, tables={"speed": rows})


if __name__ == "__main__":
    main()
