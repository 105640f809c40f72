"""Speed of the corruptions: whole sets, and against the published loops in one run.

    python benchmarks/speed_corruptions.py --threads 1        # 200 images a corruption, 1 minute
    python benchmarks/speed_corruptions.py --images 10000     # the whole CIFAR-C set
    python benchmarks/speed_corruptions.py --figures DIR      # and all corruptions by severity

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
import timing
import torch

from data_tools import corruptions, synthetic


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
    times = timing.interleaved(run, {
        (name, severity): lambda key=(name, severity): corruptions.corrupt_batch(images, *key)
        for name in corruptions.CORRUPTIONS for severity in severities}, 1, "set",
        clock=time.process_time)
    return [{"corruption": name, "CPU ms per image": round(statistics.mean(
        times[name, severity][0] for severity in severities) / len(images) * 1e3, 3)}
        for name in corruptions.CORRUPTIONS]


def versus(run, what, peer, ours, theirs, rounds):
    """A row: both in turns, the medians in milliseconds, the median of the ratios."""
    times = timing.interleaved(run, {"ours": ours, "peer": theirs}, rounds, what)
    medians = timing.medians(times)
    return {"what": what, "peer": peer, "ours, ms": 1e3 * medians["ours"],
            "peer, ms": 1e3 * medians["peer"], "ratio": timing.ratio(times, "peer", "ours")}


def glass_rows(run, photo, severities, rounds):
    rows = []
    for severity in severities:
        ours = lambda: corruptions.corrupt(photo, "glass_blur", severity, rng=0)  # noqa: B023,E731
        loop = lambda: published_glass_blur(photo, severity, 0)  # noqa: B023,E731
        row = versus(run, f"glass blur, severity {severity}", "published loop", ours, loop, rounds)
        rows.append({**row, "equal": np.array_equal(ours(), loop())})
    return rows


def package_rows(run, photo, rounds):
    """imagecorruptions beside ours, for those of its corruptions that run with what is there."""
    warnings.simplefilter("ignore")       # of its old imports and scikit-image's new names
    try:
        import cv2
        from imagecorruptions import corrupt as peer
    except Exception as error:  # it needs OpenCV, scikit-image, pkg_resources
        run.log(f"imagecorruptions is not usable here ({type(error).__name__}: {error}); "
                "only the published loop is timed")
        return []
    cv2.setNumThreads(torch.get_num_threads())
    rows, left_out = [], []
    for name in corruptions.CORRUPTIONS:
        ours = lambda: corruptions.corrupt(photo, name, 3, "bethge", 0)  # noqa: B023,E731
        theirs = lambda: peer(photo, corruption_name=name, severity=3)  # noqa: B023,E731
        try:
            theirs()
        except Exception as error:
            left_out.append(f"{name} ({type(error).__name__})")
            continue
        rows.append(versus(run, f"{name}, severity 3", "imagecorruptions", ours, theirs, rounds))
    if left_out:
        run.log("imagecorruptions does not run here with the installed libraries: "
                + ", ".join(left_out))
    return rows


def main(argv=None):
    parser = harness.parser(__doc__, data=False, networks=False)
    parser.add_argument("--images", type=harness.count, help="32-pixel images per corruption")
    run = harness.start(parser, argv)
    tiny = run.args.preset == "tiny"
    count = run.args.images or (4 if tiny else 200)
    severities = (3,) if tiny else (1, 2, 3, 4, 5)
    rng = np.random.RandomState(run.args.seed)
    base = np.stack([photograph(32, seed) for seed in range(min(count, 50))])
    images = base[rng.randint(len(base), size=count)]

    sets = set_rows(run, images, severities)
    minutes = sum(row["CPU ms per image"] for row in sets) * 5 * 10_000 / 1e3 / 60
    floor = timing.medians(timing.interleaved(
        run, {"floor": lambda: (images / 255.0 * 255).astype(np.uint8)}, 5))["floor"] / count * 1e3
    run.log(f"floor {floor:.3f} ms per image; 950,000 images: {minutes:.1f} minutes on one core")

    size, rounds = (48, 1) if tiny else (224, 3)
    photo = photograph(size, 1)
    glass = glass_rows(run, photo, (3,) if tiny else (1, 3, 5), rounds)
    slowest = min(row["ratio"] for row in glass)
    peers = package_rows(run, photo, 5 * rounds)
    if run.figures:
        scene = synthetic.colored_objects(2, size=64, seed=4, noise=0.0)["images"][1]
        corruptions.contact_sheet(scene.permute(1, 2, 0).numpy(), run.figures / "corruptions.png",
                                  groups=2)
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
