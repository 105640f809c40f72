"""Speed of the corruptions: whole sets, and against the published loops in one run.

    python benchmarks/speed_corruptions.py                    # 200 images a corruption, 1 minute
    python benchmarks/speed_corruptions.py --images 10000     # the whole CIFAR-C set

Set: CPU milliseconds per 32-pixel image and corruption (mean of the severities), and what 10,000
images x 19 corruptions x 5 severities take on two free cores (extrapolated from --images).
Peers, one image, interleaved, medians: the published glass-blur loop (written out here, no package
needed) and, where the package is installed, imagecorruptions at 224 pixels, severity 3.
Floor: one read and write of the batch as float64, what any of the formulas needs at least.
Expected: the set in under ten minutes, glass blur at least twenty times faster than the loop.
"""

import statistics
import time
import warnings

import harness
import numpy as np

from data_tools import corruptions


def clock(function, repeats=1, timer=time.perf_counter):
    """Median seconds."""
    times = []
    for _ in range(repeats):
        began = timer()
        function()
        times.append(timer() - began)
    return statistics.median(times)


def compare(what, peer, ours, theirs, repeats):
    """A row: both in turns, the medians in milliseconds, the median of the ratios."""
    pairs = [(clock(ours), clock(theirs)) for _ in range(repeats)]
    mine, other = (1e3 * statistics.median(column) for column in zip(*pairs))
    return {"what": what, "peer": peer, "ours, ms": mine, "peer, ms": other,
            "ratio": statistics.median(b / a for a, b in pairs)}


def published_glass_blur(image, severity, seed):
    """The pixel loop of hendrycks/robustness; the two Gaussians around it are ours."""
    sigma, reach, iterations = corruptions.PARAMETERS["glass_blur"][0][severity - 1]
    rng, (height, width) = np.random.RandomState(seed), image.shape[:2]
    x = np.uint8(corruptions.gaussian_filter(image / 255.0, sigma) * 255)
    for _ in range(iterations):
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                dx, dy = rng.randint(-reach, reach, size=(2,))
                h_prime, w_prime = h + dy, w + dx
                x[h, w], x[h_prime, w_prime] = x[h_prime, w_prime], x[h, w]
    return np.uint8(np.clip(corruptions.gaussian_filter(x / 255.0, sigma), 0, 1) * 255)


def photograph(size, seed):
    """Smooth random colours with some saturated areas."""
    rng = np.random.RandomState(seed)
    field = np.stack([corruptions.plasma(256, 2, rng) for _ in range(3)], -1)[:size, :size]
    return (field * 300 - 20).clip(0, 255).astype(np.uint8)


def set_rows(run, images, severities):
    rows = []
    for name in run.progress(corruptions.CORRUPTIONS, label="set"):
        corruptions.corrupt_batch(images[:2], name, 1)
        seconds = [clock(lambda: corruptions.corrupt_batch(images, name, severity),  # noqa: B023
                         timer=time.process_time) for severity in severities]
        rows.append({"corruption": name,
                     "CPU ms per image": round(statistics.mean(seconds) / len(images) * 1e3, 3)})
    return rows


def glass_rows(photo, severities, repeats):
    rows = []
    for severity in severities:
        ours = lambda: corruptions.corrupt(photo, "glass_blur", severity, rng=0)  # noqa: B023,E731
        loop = lambda: published_glass_blur(photo, severity, 0)  # noqa: B023,E731
        row = compare(f"glass blur, severity {severity}", "published loop", ours, loop, repeats)
        rows.append({**row, "equal": np.array_equal(ours(), loop())})
    return rows


def package_rows(run, photo, repeats):
    """imagecorruptions beside ours, for those of its corruptions that run with what is there."""
    try:
        from imagecorruptions import corrupt as peer
    except Exception as error:  # it needs OpenCV, scikit-image, pkg_resources
        run.log(f"imagecorruptions is not usable here ({type(error).__name__}: {error}); "
                "only the published loop is timed")
        return []
    rows, left_out = [], []
    for name in run.progress(corruptions.CORRUPTIONS, label="imagecorruptions"):
        ours = lambda: corruptions.corrupt(photo, name, 3, "bethge", 0)  # noqa: B023,E731
        theirs = lambda: peer(photo, corruption_name=name, severity=3)  # noqa: B023,E731
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs(), ours()
            except Exception as error:
                left_out.append(f"{name} ({type(error).__name__})")
                continue
            rows.append(compare(f"{name}, severity 3", "imagecorruptions", ours, theirs, repeats))
    if left_out:
        run.log("imagecorruptions does not run here with the installed libraries: "
                + ", ".join(left_out))
    return rows


def main(argv=None):
    parser = harness.parser(__doc__, presets=("default", "tiny"))
    parser.add_argument("--images", type=int, help="32-pixel images per corruption")
    run = harness.start(parser, argv)
    tiny = run.args.preset == "tiny"
    count = run.args.images or (4 if tiny else 200)
    severities = (3,) if tiny else (1, 2, 3, 4, 5)
    rng = np.random.RandomState(run.args.seed)
    base = np.stack([photograph(32, seed) for seed in range(min(count, 50))])
    images = base[rng.randint(len(base), size=count)]

    sets = set_rows(run, images, severities)
    minutes = sum(row["CPU ms per image"] for row in sets) * 5 * 10_000 / 1e3 / 60
    floor = clock(lambda: (images / 255.0 * 255).astype(np.uint8), 5) / count * 1e3
    run.log(f"floor {floor:.3f} ms per image; 950,000 images: {minutes:.1f} minutes on one core")

    size, repeats = (48, 1) if tiny else (224, 3)
    photo = photograph(size, 1)
    glass = glass_rows(photo, (3,) if tiny else (1, 3, 5), repeats)
    slowest = min(row["ratio"] for row in glass)
    peers = package_rows(run, photo, 3 * repeats)
    run.record("figures", {"minutes_one_core": minutes, "glass_ratio": slowest, "floor_ms": floor,
                           "images": count})
    note = "" if count >= 10_000 else f", from {count} images of each"
    tables = {"set": sets, "glass": glass, "peers": peers}
    run.finish([
        {"claim": f"10,000 images x 19 x 5 in <= 10 minutes on 2 cores{note}", "paper": 10,
         "this run": f"{minutes / 2:.1f} min", "holds": minutes / 2 <= 10},
        {"claim": f"glass blur >= 20x the published loop at {size} pixels, same result",
         "paper": 20, "this run": f"{slowest:.0f}x",
         "holds": slowest >= 20 and all(row["equal"] for row in glass)},
    ], {title: table for title, table in tables.items() if table})


if __name__ == "__main__":
    main()
