"""Speed of the corruptions: whole sets, and against the published loops in one run.

    python benchmarks/speed_corruptions.py                    # 200 images per corruption, about a minute
    python benchmarks/speed_corruptions.py --images 10000     # the whole CIFAR-C set, nothing extrapolated

Set: CPU milliseconds per 32-pixel image and corruption (mean of severities 1, 3, 5), and what 10,000 images x 19
corruptions x 5 severities take on two free cores. Peers, one image, interleaved, medians: the published glass-blur loop (written
out here, no package needed) and, where the package is installed, imagecorruptions at 224 pixels. Floor: one read and
write of the batch as float64, what any of the formulas needs at least. Expected: the set in under ten minutes, glass
blur at least twenty times faster than the loop.
"""

import statistics
import time
import warnings

import harness
import numpy as np

from data_tools import corruptions


def clock(function, repeats, timer=time.perf_counter):
    """Median seconds."""
    times = []
    for _ in range(repeats):
        began = timer()
        function()
        times.append(timer() - began)
    return statistics.median(times)


def interleaved(ours, theirs, repeats):
    """Median seconds of both and the median of the ratios theirs / ours, A and B by turns."""
    pairs = [(clock(ours, 1), clock(theirs, 1)) for _ in range(repeats)]
    return (*(statistics.median(column) for column in zip(*pairs)), statistics.median(b / a for a, b in pairs))


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


def main(argv=None):
    parser = harness.parser(__doc__, presets=("default", "tiny"))
    parser.add_argument("--images", type=int, help="32-pixel images per corruption")
    run = harness.start(parser, argv)
    tiny = run.args.preset == "tiny"
    count = run.args.images or (4 if tiny else 200)
    severities = (3,) if tiny else (1, 3, 5)
    rng = np.random.RandomState(run.args.seed)
    base = np.stack([photograph(32, seed) for seed in range(min(count, 50))])
    images = base[rng.randint(len(base), size=count)]

    sets, total = [], 0.0
    for name in run.progress(corruptions.CORRUPTIONS, label="set"):
        corruptions.corrupt_batch(images[:2], name, 1)
        each = [clock(lambda: corruptions.corrupt_batch(images, name, s), 1, time.process_time) / count * 1e3
                for s in severities]  # noqa: B023
        sets.append({"corruption": name, "CPU ms per image": round(statistics.mean(each), 3)})
        total += statistics.mean(each)
    whole = total * 5 * 10_000 / 1e3 / 60
    floor = clock(lambda: (images / 255.0 * 255).astype(np.uint8), 5) / count * 1e3
    run.log(f"floor {floor:.3f} ms per image; 950,000 images: {whole:.1f} minutes on one core")

    size, repeats = (48, 1) if tiny else (224, 3)
    photo, peers = photograph(size, 1), []
    for severity in (3,) if tiny else (1, 3, 5):
        ours, loop, ratio = interleaved(lambda: corruptions.corrupt(photo, "glass_blur", severity, rng=0),  # noqa: B023
                                        lambda: published_glass_blur(photo, severity, 0), repeats)          # noqa: B023
        equal = np.array_equal(corruptions.corrupt(photo, "glass_blur", severity, rng=0),
                               published_glass_blur(photo, severity, 0))
        peers.append({"what": f"glass blur, severity {severity}", "peer": "published loop", "ours, ms": ours * 1e3,
                      "peer, ms": loop * 1e3, "ratio": ratio, "equal": equal})
    glass = min(row["ratio"] for row in peers)
    peers += package_rows(run, photo, repeats)
    run.record("figures", {"minutes_one_core": whole, "glass_ratio": glass, "floor_ms": floor, "images": count})
    note = "" if count >= 10_000 else f", from {count} images x {len(severities)} severities"
    run.finish([
        {"claim": f"10,000 images x 19 x 5 in <= 10 minutes on 2 cores{note}", "paper": 10,
         "this run": f"{whole / 2:.1f} min", "holds": whole / 2 <= 10},
        {"claim": f"glass blur >= 20x the published loop at {size} pixels, same result", "paper": 20,
         "this run": f"{glass:.0f}x", "holds": glass >= 20 and all(r["equal"] for r in peers if r["peer"] == "published loop")},
    ], {"set": sets, "peers": peers})


def package_rows(run, photo, repeats):
    """imagecorruptions beside ours at severity 3, for the corruptions of it that run with the libraries installed."""
    try:
        from imagecorruptions import corrupt as peer
    except Exception as error:                                # the package needs OpenCV, numba, scikit-image, pkg_resources
        run.log(f"imagecorruptions is not usable here ({type(error).__name__}: {error}); only the published loop is timed")
        return []
    rows, left_out = [], []
    for name in corruptions.CORRUPTIONS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peer(photo, corruption_name=name, severity=3)             # compiles, where numba is used
                ours, theirs, ratio = interleaved(lambda: corruptions.corrupt(photo, name, 3, "bethge", 0),  # noqa: B023
                                                  lambda: peer(photo, corruption_name=name, severity=3), repeats)  # noqa: B023
        except Exception as error:
            left_out.append(f"{name} ({type(error).__name__})")
            continue
        rows.append({"what": f"{name}, severity 3", "peer": "imagecorruptions", "ours, ms": ours * 1e3,
                     "peer, ms": theirs * 1e3, "ratio": ratio, "equal": ""})
    if left_out:
        run.log(f"imagecorruptions does not run here with the installed libraries: {', '.join(left_out)}")
    return rows


if __name__ == "__main__":
    main()
