"""Precision, recall, density and coverage of images: do they react as the paper says, in every
embedding?

    python benchmarks/prdc_images.py --figures figures         # procedural glyphs, about a minute
    python benchmarks/prdc_images.py --data imagenet100_32     # ImageNet layout: its val split
    python benchmarks/prdc_images.py --real CelebA/img_align_celeba --fake samples --preset paper \\
        --weights vgg16-397923af.pth
    python benchmarks/prdc_images.py --real-features real.npz --fake-features fake.npz

Embeddings: raw pixels; R64, a randomly initialised VGG-16 with 64 outputs, mean over --seeds
initialisations (the paper's choice for images far from ImageNet); T4096, fc2 of a trained VGG-16
(--weights, torchvision's file; the paper's choice for photographs). --preset paper: 224 pixels,
VGG-16 of full width; otherwise 32 pixels and a quarter of the width.

Without --real and --fake the real images are compared with (a) other real images, (b) images of
half of the classes, (c) other real images blurred, noisy and damaged by JPEG, (d) samples of a
small variational autoencoder trained here, its latents shrunk by psi. Expected: (a) coverage as in
the closed form; (b) coverage halves, density stays; (c) density falls; (d) with smaller psi density
rises and coverage falls. Feature files: .npy or .npz (first array), 2-D features or uint8 NHWC
images. The paper's tables on CelebA, FFHQ and LSUN could not be had, so no figure of them stands
here.
"""

import io
import math
import statistics
from pathlib import Path

import harness
import figures
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

from data_tools import imagenet
from reference import vgg
from reference.prdc import METRICS, PRDC, bootstrap_prdc, expected_coverage

# images per set, side, width and hidden units of the VGG, steps of the autoencoder
PRESETS = {"default": (600, 32, 16, 256, 300), "small": (2000, 32, 16, 256, 400),
           "tiny": (60, 32, 4, 16, 4),
           "paper": (10_000, 224, 64, 4096, 20_000)}
PSI = (1.0, 0.7, 0.4)


# ---------------------------------------------------------------- images, uint8 (N, 3, S, S)

def glyphs(count, seed, classes=10, side=32):
    """The digits 0 .. classes - 1 of Pillow's font, turned, scaled, moved, in two random greys."""
    stamps = torch.zeros(10, 1, 64, 64)
    for digit in range(10):
        picture = Image.new("L", (64, 64))
        ImageDraw.Draw(picture).text((32, 32), str(digit), fill=255, anchor="mm",
                                     font=ImageFont.load_default(60))
        stamps[digit, 0] = torch.from_numpy(np.asarray(picture).copy()) / 255
    generator = torch.Generator().manual_seed(seed)
    digit = torch.randint(classes, (count,), generator=generator)
    angle, size, dx, dy, back, ink = torch.rand(6, count, generator=generator)
    angle, size = (angle - 0.5) * 0.8, 0.9 + 0.5 * size
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    turn = turn * size.view(-1, 1, 1)
    move = torch.stack([dx - 0.5, dy - 0.5], 1).unsqueeze(2) * 0.6
    grid = F.affine_grid(torch.cat([turn, move], 2), (count, 1, side, side), align_corners=False)
    mask = F.grid_sample(stamps[digit], grid, align_corners=False)
    back, ink = (v.view(-1, 1, 1, 1) for v in (0.3 * back, 0.6 + 0.4 * ink))
    return to_uint8((back + (ink - back) * mask).expand(-1, 3, -1, -1))


def to_uint8(images):
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def blurred(images, sigma=1.0):
    x = torch.arange(-3, 4, dtype=torch.float32)
    line = torch.exp(-x ** 2 / (2 * sigma ** 2))
    line = (line / line.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = F.pad(images.float() / 255, (3, 3, 3, 3), mode="reflect")
    return to_uint8(F.conv2d(F.conv2d(padded, line, groups=3), line.transpose(2, 3), groups=3))


def noisy(images, seed, sd=0.15):
    generator = torch.Generator().manual_seed(seed)
    return to_uint8(images.float() / 255 + sd * torch.randn(images.shape, generator=generator))


def jpeg(images, quality=10):
    out = torch.empty_like(images)
    for row, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        out[row] = read(file, images.shape[-1])
    return out


def read(file, side):
    """(3, side, side) uint8: the centre square, reduced with antialiasing."""
    try:
        image = Image.open(file).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file}: not a readable image ({error})") from error
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    if image.size != (side, side):
        image = image.resize((side, side), Image.BICUBIC, (left, top, left + edge, top + edge))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def folder(path, count):
    """The first `count` images below a folder, in the order of their names."""
    files = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in imagenet.EXTENSIONS)
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(imagenet.EXTENSIONS)})")
    return files[:count]


def array(path):
    """The array of a .npy file or the first one of an .npz: features (N, D), or images (N, 3, H, W)
    from uint8 NHWC."""
    try:
        value = np.load(path, allow_pickle=False)
        if isinstance(value, np.lib.npyio.NpzFile):
            with value as file:
                value = file[file.files[0]]
        found = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
    except Exception as error:                                # of many types, if it is damaged
        raise ValueError(f"{path}: not a .npy or .npz file of numbers ({error})") from error
    if value.ndim == 4 and value.dtype == np.uint8 and value.shape[3] == 3:
        return found.permute(0, 3, 1, 2)
    if value.ndim != 2:
        raise ValueError(f"{path}: holds {value.dtype} {value.shape}; expected (N, D) features or "
                         "uint8 (N, H, W, 3) images")
    return found


def photographs(run, count):
    """(real, other real images, images of half of the classes, images to train on) of an
    ImageNet-like folder."""
    rng = np.random.default_rng(0)

    def chosen(dataset, rows):
        return torch.stack([read_array(dataset[i][0]) for i in run.progress(rows, label="reading")])

    def read_array(image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    train, val = (imagenet.imagenet(run.args.data, split) for split in ("train", "val"))
    rows, half = rng.permutation(len(val)), len(val.classes) // 2
    count = min(count, len(val) // 2)
    some = rng.permutation(np.flatnonzero(train.labels < half))[:count]
    return (chosen(val, rows[:count]), chosen(val, rows[count:2 * count]), chosen(train, some),
            chosen(train, rng.permutation(len(train))[:5 * count]))


# ---------------------------------------------------------------- a small generator

class Autoencoder(nn.Module):
    """A convolutional variational autoencoder of 32-pixel images; `sample` draws new ones."""

    def __init__(self, latent=32, width=32):
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * width, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent, 64 * width), nn.ReLU(), nn.Unflatten(1, (4 * width, 4, 4)),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Sigmoid())

    def forward(self, x, noise):
        mean, log_variance = self.encoder(x).chunk(2, 1)
        divergence = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return self.decoder(mean + (0.5 * log_variance).exp() * noise), divergence

    @torch.no_grad()
    def sample(self, count, psi, seed):
        noise = torch.randn(count, self.latent, generator=torch.Generator().manual_seed(seed))
        device = next(self.parameters()).device
        return torch.cat([to_uint8(self.decoder((psi * part).to(device))).cpu()
                          for part in noise.split(500)])


def train_autoencoder(model, images, steps, seed, resume=None, batch=64):
    """Yields the loss (squared error / 0.02 + divergence, per image) of every step."""
    optimizer, first = torch.optim.Adam(model.parameters(), 1e-3), 0
    generator = torch.Generator().manual_seed(seed)
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        generator.set_state(resume["generator"])
        first = resume["step"]
    device = next(model.parameters()).device
    for step in range(first, steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = images[rows].to(device).float() / 255
        noise = torch.randn(batch, model.latent, generator=generator).to(device)
        output, divergence = model(x, noise)
        loss = (output - x).square().sum((1, 2, 3)).mean() / 0.02 + divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        request = yield {"step": step, "loss": loss.item()}
        while request == "state":
            request = yield {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                             "generator": generator.get_state(), "step": step + 1}


def trained_autoencoder(run, images, steps):
    model = Autoencoder().to(run.device)
    with torch.no_grad():
        initial = torch.Generator().manual_seed(6)
        for p in model.parameters():
            fan = p[0].numel() if p.ndim > 1 else 0
            p.copy_(torch.randn(p.shape, generator=initial) * math.sqrt(1.5 / fan) if fan
                    else torch.zeros_like(p))
    if run.recorded("autoencoder") is None:
        state = run.resumed("autoencoder")
        run.drive("autoencoder", train_autoencoder(model, images, steps, seed=7, resume=state),
                  total=steps)
        run.save("autoencoder", model.state_dict())
        run.record("autoencoder", {"steps": steps})
    model.load_state_dict(run.saved("autoencoder"))
    return model


# ---------------------------------------------------------------- embeddings and the comparison

def is_features(given):
    return isinstance(given, torch.Tensor) and given.ndim == 2


def embeddings(run, side, width, hidden):
    """{name: [functions of (B, 3, H, W) uint8 that give features], one per seed of R64}."""
    found = {"pixels": [lambda images: images.float().flatten(1) / 255],
             "R64": [vgg.r64(seed, side, width=width, hidden=hidden).to(run.device)
                     for seed in run.seeds]}
    if run.args.weights:
        model = harness.load_weights(vgg.vgg16(), run.args.weights)
        found["T4096"] = [vgg.Embedding(model).to(run.device)]
    return found


def embed(images, embedding, side, batch=100):
    """Features (N, D) of a tensor of images, of image files read `batch` at a time, or the features
    given."""
    if is_features(images):
        return images
    parts = []
    for start in range(0, len(images), batch):
        part = images[start:start + batch]
        if not isinstance(part, torch.Tensor):
            part = torch.stack([read(path, side) for path in part])
        parts.append(embedding(part).cpu())
    return torch.cat(parts)


def compare(run, real, fakes, found, side, k):
    """Rows: embedding, fakes, the four metrics (mean over the embedding's seeds), spread of density
    and coverage."""
    rows = []
    for name, functions in found.items():
        results = {label: [] for label in fakes}
        for number, function in enumerate(functions):
            metric = PRDC(k, device=run.device)
            metric.update(embed(real, function, side), real=True)
            for label in run.progress(fakes, label=f"{name} {number}"):
                key = f"{name}-{number}-{label}".replace(" ", "_")
                if (result := run.recorded(key)) is None:
                    metric.reset(keep_real=True)
                    features = embed(fakes[label], function, side)
                    metric.update(features, real=False)
                    result = metric.compute()
                    if number == 0:
                        spread = bootstrap_prdc(metric.state_dict()["real"], features, k,
                                                num_subsets=4, device=run.device)[1]
                        result |= {f"{m} +-": spread[m] for m in ("density", "coverage")}
                    result = run.record(key, result)
                results[label].append(result)
        for label, found_rows in results.items():
            row = {"embedding": name, "fakes": label} | {
                m: statistics.mean(r[m] for r in found_rows) for m in METRICS}
            for m in ("density", "coverage"):                 # of half the points, or over seeds
                values = [r[m] for r in found_rows]
                row[f"{m} +-"] = max(found_rows[0][f"{m} +-"],
                                     statistics.stdev(values) if len(values) > 1 else 0.0)
            rows.append(row | {"paper": None})
    return rows


def claims(rows, expected, judged):
    """What each change of the images should do; asserted where the difference is twice its
    spread."""
    at = {(row["embedding"], row["fakes"]): row for row in rows}
    found = []

    def change(embedding, metric, a, b, sign, text):
        first, second = at[embedding, a], at[embedding, b]
        gap = second[metric] - first[metric]
        margin = 2 * math.hypot(first[f"{metric} +-"], second[f"{metric} +-"])
        found.append({"claim": f"{embedding}: {text}", "paper": None, "this run": gap,
                      "holds": (gap > 0) == (sign > 0) if judged and abs(gap) > margin else None})

    for name in dict.fromkeys(row["embedding"] for row in rows):
        same = at[name, "other reals"]
        found.append({"claim": f"{name}: coverage of other real images", "paper": expected,
                      "this run": same["coverage"],
                      "holds": abs(same["coverage"] - expected) < 0.02 if judged else None})
        change(name, "coverage", "other reals", "half of the classes", -1,
               "half of the classes: change of coverage")
        for label in ("blurred", "noisy", "JPEG"):
            change(name, "density", "other reals", label, -1, f"{label}: change of density")
            change(name, "coverage", "other reals", label, -1, f"{label}: change of coverage")
        if (name, f"psi {PSI[0]}") in at:
            change(name, "density", f"psi {PSI[0]}", f"psi {PSI[-1]}", 1,
                   f"psi {PSI[0]} to {PSI[-1]}: change of density")
            change(name, "coverage", f"psi {PSI[0]}", f"psi {PSI[-1]}", -1,
                   f"psi {PSI[0]} to {PSI[-1]}: change of coverage")
    return found


def main(argv=None):
    parser = harness.parser(__doc__, presets=tuple(PRESETS), seeds=3, networks=False)
    for side in ("real", "fake"):
        parser.add_argument(f"--{side}", type=Path, help=f"folder of {side} images (recursive)")
        parser.add_argument(f"--{side}-features", type=Path,
                            help=f".npy or .npz of {side} features or uint8 images")
    parser.add_argument("--weights", type=Path, help="VGG-16 checkpoint of torchvision, for T4096")
    parser.add_argument("--count", type=harness.count, help="images per set, or rows of a file; "
                        "default: the preset's, all of a file")
    parser.add_argument("--nearest-k", type=harness.count, default=5)
    args = parser.parse_args(argv)
    count, side, width, hidden, steps = PRESETS[args.preset]
    count = args.count or count
    if count < 2:
        parser.error("--count must be at least 2, not 1")
    if (args.real and args.real_features) or (args.fake and args.fake_features):
        parser.error("a set is given once: --real or --real-features, --fake or --fake-features")
    given = [args.real_features or args.real, args.fake_features or args.fake]
    if any(given) and args.data is not None:
        parser.error("--data has sets of its own: leave out --real and --fake")
    if any(given) and not all(given):
        parser.error("a comparison needs both sets: --real or --real-features, and --fake or "
                     "--fake-features")
    run = harness.start(parser, argv)
    if all(given):
        real, fake = (array(path)[:args.count] if path.is_file() else folder(path, count)
                      for path in given)
        if is_features(real) != is_features(fake):
            raise ValueError("one set is of features, the other of images: "
                             + " and ".join(map(str, given)))
        if is_features(real) and args.weights:
            raise ValueError("--weights makes features of images, and the sets are features")
        fakes = {"given": fake}
    else:
        if run.args.data is not None:
            real, other, half, training = photographs(run, count)
        else:
            real, other, half = glyphs(count, 1), glyphs(count, 2), glyphs(count, 3, classes=5)
            training = glyphs(5 * count, 4)
        fakes = {"other reals": other, "half of the classes": half, "blurred": blurred(other),
                 "noisy": noisy(other, 5), "JPEG": jpeg(other)}
    k, smallest = run.args.nearest_k, min(map(len, (real, *fakes.values())))
    if smallest < 2 * k + 2:
        raise ValueError(f"--nearest-k {k} needs sets of at least {2 * k + 2} (spreads are those "
                         f"of half a set), the smallest has {smallest}")
    found = {"features": [None]} if is_features(real) else embeddings(run, side, width, hidden)
    if not any(given) and real.shape[-1] == 32:
        model = trained_autoencoder(run, training, steps)
        fakes |= {f"psi {psi}": model.sample(len(real), psi, seed=8) for psi in PSI}
    images = None if any(given) else {"real": real} | fakes
    rows = compare(run, real, fakes, found, side, k)
    expected = expected_coverage(k, len(real), len(next(iter(fakes.values()))))
    if run.figures is not None and run.is_main and images is not None:
        figures.image_grid(run.figures / "prdc-images.png",
                           [image for batch in images.values() for image in batch[:8]],
                           titles=[name if i == 0 else "" for name in images for i in range(8)],
                           columns=8, cell=64)
        for name in found:
            chosen = [row for row in rows if row["embedding"] == name]
            figures.bar_chart(run.figures / f"prdc-images-{name.lower()}.png",
                              [row["fakes"] for row in chosen],
                              {m: [row[m] for row in chosen] for m in METRICS},
                              title=f"Embedding: {name}", size=(900, 420))
    judged = images is not None and run.args.preset != "tiny"
    run.finish(rows=claims(rows, expected, judged) if images is not None else
               [{"claim": f"expected coverage of equal sets, k = {k}",
                 "paper": expected, "this run": rows[0]["coverage"], "holds": None}],
               tables={"images": rows})


if __name__ == "__main__":
    main()
