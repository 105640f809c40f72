"""The 19 common corruptions of ImageNet-C and CIFAR-C (Hendrycks and Dietterich, ICLR 2019), with
numpy and Pillow alone: no OpenCV, ImageMagick, scipy, scikit-image or numba.

    corrupt(image, "fog", 3, "imagenet", rng=0)       one uint8 (H, W, 3) image
    corrupt_batch(images, "fog", 3, "cifar", seed=0)  many; image i is the same in any batch
    make_cifar_c(images, "CIFAR-100-C", labels)       the published .npy files; resumes
    make_imagenet_c("val", "ImageNet-C")              the published folders; resumes

    python -m data_tools.corruptions SRC DST [--names fog snow] [--severity 1 3]
    python -m data_tools.corruptions photo.jpg --sheet sheet.png

Variants are the parameters and conventions of the published codes: "imagenet" and "cifar" of
hendrycks/robustness, "bethge" of imagecorruptions (any size from 32, any aspect). Draws follow the
published order, so that RandomState(seed) gives what the published code gives under
np.random.seed(seed), down to the final cast that truncates. The recipes are in
corruption_recipes.py, the filters in corruption_filters.py. The frost photographs (frost1-3.png,
frost4-6.jpg of hendrycks/robustness) are not included: pass them as `textures`, else procedural
ones stand in, which are alike in their statistics only.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_tools.corruption_filters import (  # noqa: F401  (offered under this module's name, too)
    VARIANTS, canny, check_variant, clipped_zoom, disk, distance_5x5, equalize, gaussian_filter,
    hsv_to_rgb, map_coordinates_reflect, motion_blur, plasma, rgb_to_hsv, solve_affine, warp_affine,
)
from data_tools.corruption_recipes import (  # noqa: F401
    CORRUPTIONS, GROUPS, PARAMETERS, RECIPES, TEST_CORRUPTIONS, check_textures,
)
from data_tools.files import reading


# ---- one image, a batch --------------------------------------------------------------------------

def _check(images: np.ndarray, name: str, severity: int, variant: str, seed: int = 0) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"image must be uint8, not {images.dtype}")
    if not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an int, not {seed!r}")
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images must be (N, H, W, 1) or (N, H, W, 3), not {images.shape}")
    if name not in RECIPES:
        raise ValueError(f"unknown corruption {name!r}; the names are {', '.join(CORRUPTIONS)}")
    check_variant(variant)
    if not isinstance(severity, (int, np.integer)) or not 1 <= severity <= 5:
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, not {severity!r}")
    smallest = 32 if variant == "bethge" else 1
    if min(images.shape[1:3]) < smallest:
        raise ValueError(f"image sides must be at least {smallest} for {variant}, not "
                         f"{images.shape[1:3]}")


_STATES = threading.local()  # RandomStates to seed again: making one takes 40 times as long


def _generators(seeds: list, name: str) -> list:
    """The generators a recipe draws from, by numbers (None: unpredictable), for use before the next
    call in this thread."""
    if name == "impulse_noise":
        return [np.random.default_rng(seed) for seed in seeds]
    states = _STATES.__dict__.setdefault("states", [])
    states += [np.random.RandomState() for _ in range(len(seeds) - len(states))]
    for state, seed in zip(states, seeds):
        state.seed(seed)
    return states[:len(seeds)]


def _generator(rng, name: str):
    """See `corrupt`."""
    if isinstance(rng, np.random.RandomState):
        return rng
    if isinstance(rng, np.random.Generator):
        if name == "impulse_noise":
            return rng
        rng = int(rng.integers(2**32))
    if rng is None or isinstance(rng, (int, np.integer)):
        return _generators([rng], name)[0]
    raise TypeError(f"rng must be an int, a RandomState or a Generator, not {type(rng).__name__}")


def _apply(images: np.ndarray, name: str, severity: int, variant: str, rngs: list,
           textures) -> np.ndarray:
    """(N, H, W, C) uint8 to the same; grey images are replicated to RGB and back, rounded."""
    grey = images.shape[3] == 1
    colour = np.repeat(images, 3, 3) if grey else np.ascontiguousarray(images)
    parameters = PARAMETERS[name][variant == "cifar"][severity - 1]
    out = RECIPES[name](colour, parameters, rngs, variant, severity, textures)
    out = out.astype(np.uint8, order="C", copy=False)
    if grey:
        out = np.rint(out @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    return out


def corrupt(image: np.ndarray, name: str, severity: int, variant: str = "imagenet", rng=None, *,
            textures=None) -> np.ndarray:
    """One corrupted uint8 image of the shape of `image`: (H, W, 3), (H, W) or (H, W, 1).

    severity: 1..5. variant: "imagenet", "cifar" or "bethge". rng: an int seed, a RandomState or a
    Generator. An int s means RandomState(s), for impulse noise default_rng(s), whose draws are the
    published ones; a Generator gives the seed of a RandomState. textures: RGB frost textures (list
    or folder), see the head of this file; resized ones are remembered, so leave the arrays as they
    are.
    TypeError for an image that is not uint8, ValueError for another shape, name, severity, variant.
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(f"image must be (H, W), (H, W, 1) or (H, W, 3), not {image.shape}")
    batch = image.reshape(1, *image.shape[:2], -1)
    _check(batch, name, severity, variant)
    textures = check_textures(textures) if name == "frost" else None
    out = _apply(batch, name, severity, variant, [_generator(rng, name)], textures)
    return out.reshape(image.shape)


def image_seed(seed: int, name: str, severity: int, index: int | str) -> int:
    """The seed of one image: the same in any batch, order and process."""
    text = f"{seed}/{name}/{severity}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def corrupt_batch(images: np.ndarray, name: str, severity: int, variant: str = "cifar",
                  seed: int = 0, indices=None, textures=None) -> np.ndarray:
    """Corrupted uint8 images (N, H, W, C).

    Image i is corrupt(images[i], ..., rng=image_seed(seed, name, severity, indices[i])).
    indices: numbers or names of the images, by default 0..N-1.
    Works through blocks of about 65,000 pixels.
    """
    images = np.asarray(images)
    _check(images, name, severity, variant, seed)
    indices = range(len(images)) if indices is None else indices
    if len(indices) != len(images):
        raise ValueError(f"indices must have one entry per image ({len(images)}), not "
                         f"{len(indices)}")
    textures = check_textures(textures) if name == "frost" else None
    out, block = np.empty_like(images), max(1, 65536 // (images.shape[1] * images.shape[2]))
    for start in range(0, len(images), block):
        part = slice(start, start + block)
        rngs = _generators([image_seed(seed, name, severity, i) for i in indices[part]], name)
        out[part] = _apply(images[part], name, severity, variant, rngs, textures)
    return out


# ---- whole data sets -----------------------------------------------------------------------------

@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to; the file takes the name `path` when it is whole. What a kill
    leaves there is written over by the next attempt."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _settings(folder: Path, settings: dict) -> None:
    """Remember what a folder is made from; refuse to mix two makings in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "corruptions.json"
    if file.exists():
        before = json.loads(file.read_text())
        if before != settings:
            changed = [f"{k} {before.get(k)} -> {settings.get(k)}" for k in {*before, *settings}
                       if before.get(k) != settings.get(k)]
            raise ValueError(f"{folder} was begun with other settings "
                             f"({', '.join(sorted(changed))}); choose another folder")
        return
    with _whole(file) as temporary:
        temporary.write_text(json.dumps(settings))


def _texture_mark(textures) -> int | None:
    if textures is None:
        return None
    return zlib.crc32(b"".join(t.tobytes() for t in check_textures(textures)))


def _in_processes(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator:
    """Results of function(*task) in order, computed by `workers` processes (1: in this one)."""
    if workers <= 1:
        yield from (function(*task) for task in tasks)
        return
    with ProcessPoolExecutor(workers) as pool:
        waiting, tasks = [], iter(tasks)
        for task in tasks:  # a few tasks ahead, not all: they carry images
            waiting.append(pool.submit(function, *task))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        yield from (future.result() for future in waiting)


def _write_block(part: Path, images: np.ndarray, name: str, severity: int, variant: str, seed: int,
                 start: int, total: int, textures) -> None:
    indices = range(start, start + len(images))
    out = corrupt_batch(images, name, severity, variant, seed, indices, textures)
    store = np.lib.format.open_memmap(part, mode="r+")
    first = (severity - 1) * total + start
    store[first:first + len(images)] = out
    store.flush()


def make_cifar_c(images: np.ndarray, out_dir: str | Path, labels=None, *,
                 names: Sequence[str] = CORRUPTIONS, variant: str = "cifar", seed: int = 0,
                 workers: int = 1, textures=None, progress: Callable | None = None) -> None:
    """Write `<name>.npy` uint8 (5N, H, W, C), severities 1..5 in order, and labels.npy (N,).

    Called again after an interruption it goes on: finished files are left, of an unfinished one
    only the missing blocks of 500 images are computed. progress(done, total) follows each block.
    """
    images, out_dir, n, block = np.asarray(images), Path(out_dir), len(images), 500
    for name in names:
        _check(images, name, 1, variant, seed)
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels must have one entry per image ({n}), not {len(labels)}")
    _settings(out_dir, {"variant": variant, "seed": int(seed), "images": list(images.shape),
                        "checksum": zlib.crc32(np.ascontiguousarray(images)),
                        "textures": _texture_mark(textures)})
    if labels is not None:
        with _whole(out_dir / "labels.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, np.asarray(labels))
    blocks = [(severity, start) for severity in range(1, 6) for start in range(0, n, block)]
    done_blocks, total_blocks = 0, len(blocks) * len(names)
    for name in names:
        final, part, marks = (out_dir / f"{stem}" for stem in (f"{name}.npy", f".{name}.part",
                                                               f".{name}.blocks"))
        if final.exists():
            done_blocks += len(blocks)
            continue
        if not part.exists():
            marks.write_text("")
            shape = (5 * n, *images.shape[1:])
            with _whole(part) as temporary:
                np.lib.format.open_memmap(temporary, "w+", np.uint8, shape).flush()
        lines = [line for line in marks.read_text().splitlines() if line.endswith(".")]
        finished = {tuple(map(int, line[:-1].split())) for line in lines}
        missing = [b for b in blocks if b not in finished]
        done_blocks += len(blocks) - len(missing)
        tasks = ((part, images[start:start + block], name, severity, variant, seed, start, n,
                  textures) for severity, start in missing)
        for (severity, start), _ in zip(missing, _in_processes(_write_block, tasks, workers)):
            with open(marks, "a") as file:
                file.write(f"{severity} {start}.\n")  # the full stop: no line cut short counts
            done_blocks += 1
            if progress is not None:
                progress(done_blocks, total_blocks)
        os.replace(part, final)
        marks.unlink()


def _array(file: Path) -> np.ndarray:
    with reading(file, "a whole .npy file"):
        return np.load(file, mmap_mode="r", allow_pickle=False)


def load_cifar_c(dir: str | Path, name: str,
                 severity: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Memory-mapped images and labels of one corruption: N of one severity, or all 5N (labels
    repeated). Reads the published folders too, whose labels.npy already has 5N entries."""
    if severity not in (None, 1, 2, 3, 4, 5):
        raise ValueError(f"severity must be None or 1..5, not {severity!r}")
    file, label_file = Path(dir) / f"{name}.npy", Path(dir) / "labels.npy"
    images, labels = _array(file), np.array(_array(label_file))
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) % 5:
        raise ValueError(f"{file}: expected uint8 (5N, H, W, C), found "
                         f"{images.dtype} {images.shape}")
    n = len(images) // 5
    if len(labels) not in (n, 5 * n):
        raise ValueError(f"{label_file}: expected {n} or {5 * n} labels, found {len(labels)}")
    labels = labels if len(labels) == 5 * n else np.tile(labels, 5)
    part = slice(None) if severity is None else slice((severity - 1) * n, severity * n)
    return images[part], labels[part]


EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


def _open_cropped(file: Path, size: int) -> np.ndarray:
    """RGB, shorter side to size * 256 / 224, centre crop of size x size."""
    try:
        image = Image.open(file).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file}: cannot be read as an image ({error})") from error
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(short, int(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _write_image(file: Path, relative: str, missing: list[tuple[str, int, Path]], size: int,
                 quality: int, variant: str, seed: int, textures) -> None:
    image = _open_cropped(file, size)
    for name, severity, target in missing:
        rng = image_seed(seed, name, severity, relative)
        out = corrupt(image, name, severity, variant, rng, textures=textures)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _whole(target) as temporary:
            Image.fromarray(out).save(temporary, "JPEG", quality=quality)


def make_imagenet_c(src: str | Path, dst: str | Path, *, names: Sequence[str] = CORRUPTIONS,
                    severities: Sequence[int] = (1, 2, 3, 4, 5), size: int = 224, quality: int = 85,
                    variant: str = "imagenet", seed: int = 0, workers: int = 1, textures=None,
                    progress: Callable | None = None) -> None:
    """Write `<name>/<severity>/<path>.JPEG` for every image under src, resized and centre-cropped.

    A picture is drawn from (seed, name, severity, its path): alone or among others it comes out the
    same. Images that are there already are left, so that a second call goes on.
    progress(done, total) counts source images.
    """
    src, dst = Path(src), Path(dst)
    if dst.resolve().is_relative_to(src.resolve()):  # a second call would take these for sources
        raise ValueError(f"{dst} must not lie in {src}")
    if size < 1 or not 1 <= quality <= 100:
        raise ValueError(f"size must be >= 1 and quality 1..100, not {size} and {quality}")
    probe = np.zeros((1, size, size, 3), np.uint8)
    for name in names:
        for severity in severities:
            _check(probe, name, severity, variant, seed)
    files = sorted(f for f in src.rglob("*") if f.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"no images under {src}")
    if twice := {a for a, b in zip(files, files[1:]) if a.with_suffix("") == b.with_suffix("")}:
        raise ValueError(f"images that differ in the suffix only would get one name: {min(twice)}")
    _settings(dst, {"variant": variant, "seed": int(seed), "size": size, "quality": quality,
                    "textures": _texture_mark(textures)})

    def tasks() -> Iterator[tuple]:
        for file in files:
            relative = file.relative_to(src).with_suffix(".JPEG")
            targets = ((name, s, dst / name / str(s) / relative)
                       for name in names for s in severities)
            missing = [target for target in targets if not target[2].exists()]
            yield file, relative.as_posix(), missing, size, quality, variant, seed, textures

    present = sum(1 for task in tasks() if not task[2])
    wanted = (task for task in tasks() if task[2])
    for done, _ in enumerate(_in_processes(_write_image, wanted, workers), present + 1):
        if progress is not None:
            progress(done, len(files))


def contact_sheet(image: np.ndarray, path: str | Path, names: Sequence[str] = CORRUPTIONS,
                  severities: Sequence[int] = (1, 2, 3, 4, 5), variant: str = "imagenet",
                  seed: int = 0, textures=None, groups: int = 1) -> None:
    """A PNG (256 colours) with one row per corruption and one column per severity, in `groups`
    tables side by side."""
    height, width = image.shape[:2]
    label, per_group = 130, -(-len(names) // groups)
    block = label + len(severities) * (width + 4)
    sheet = Image.new("RGB", (groups * block, per_group * (height + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        left, top = i // per_group * block, i % per_group * (height + 4)
        draw.text((left + 6, top + height // 2 - 6), name.replace("_", " "), fill="black")
        for j, severity in enumerate(severities):
            rng = image_seed(seed, name, severity, 0)
            out = corrupt(image, name, severity, variant, rng, textures=textures)
            sheet.paste(Image.fromarray(out), (left + label + j * (width + 4), top))
    with _whole(Path(path)) as temporary:
        sheet.quantize(256, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)


# ---- command line --------------------------------------------------------------------------------

def _progress_line(label: str) -> Callable[[int, int], None]:
    began, seen = time.monotonic(), []

    def show(done: int, total: int) -> None:
        seen.append(done)
        elapsed = time.monotonic() - began
        left = elapsed / len(seen) * (total - done)
        ending = "\n" if done == total else "\r" if sys.stderr.isatty() else "\n"
        print(f"{label} {done}/{total}, {elapsed:.0f} s, {left:.0f} s left   ", end=ending,
              file=sys.stderr, flush=True)

    return show


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m data_tools.corruptions", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("src", type=Path,
        help="folder of images, .npy of uint8 (N, H, W, 3), or the CIFAR pickles' folder")
    add("dst", type=Path, nargs="?",
        help="folder to write; the same command goes on after an interruption")
    add("--names", nargs="+", choices=CORRUPTIONS, default=list(CORRUPTIONS), metavar="NAME")
    add("--severity", nargs="+", type=int, choices=range(1, 6), default=[1, 2, 3, 4, 5],
        metavar="1..5")
    add("--variant", choices=VARIANTS, help="default: imagenet for folders, cifar for arrays")
    add("--seed", type=int, default=0)
    add("--size", type=int, default=224, help="side of the centre crop (folders)")
    add("--quality", type=int, default=85, help="of the JPEGs written (folders)")
    add("--workers", type=int, default=os.cpu_count() or 1)
    add("--textures", type=Path, help="folder with the frost photographs frost1.png ...")
    add("--sheet", type=Path, metavar="PNG", help="instead: a contact sheet of the image SRC")
    args = parser.parse_args(argv)
    try:
        common = {"names": args.names, "seed": args.seed,
                  "textures": None if args.textures is None else check_textures(args.textures)}
        if args.sheet:
            contact_sheet(_open_cropped(args.src, min(args.size, 128)), args.sheet,
                          severities=args.severity, variant=args.variant or "imagenet", **common)
            return 0
        if args.dst is None:
            parser.error("DST is missing")
        common |= {"workers": args.workers, "progress": _progress_line(str(args.dst))}
        cifar_name = {"cifar-100-python": "cifar100",
                      "cifar-10-batches-py": "cifar10"}.get(args.src.name)
        if args.src.suffix == ".npy" or cifar_name:
            if sorted(args.severity) != [1, 2, 3, 4, 5]:
                parser.error("--severity: the files of a CIFAR-C folder hold all five severities")
            if cifar_name:
                from data_tools.imagenet import cifar  # the only use of torch

                test = cifar(args.src, cifar_name, train=False)
                images, labels = test.images, test.labels
            else:
                images, labels = _array(args.src), None
            make_cifar_c(images, args.dst, labels, variant=args.variant or "cifar", **common)
        else:
            make_imagenet_c(args.src, args.dst, severities=args.severity, size=args.size,
                            quality=args.quality, variant=args.variant or "imagenet", **common)
    except (TypeError, ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on from here\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
