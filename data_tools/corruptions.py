"""The 19 common corruptions of ImageNet-C and CIFAR-C (Hendrycks and Dietterich, ICLR 2019), with numpy and
Pillow alone: no OpenCV, ImageMagick, scipy, scikit-image or numba.

    corrupt(image, "fog", 3, "imagenet", rng=0)          one uint8 (H, W, 3) image
    corrupt_batch(images, "fog", 3, "cifar", seed=0)     many of one size; image i is the same in any batch
    make_cifar_c(images, "CIFAR-100-C", labels)          the published .npy files; goes on where it stopped
    make_imagenet_c("val", "ImageNet-C")                 the published folders; goes on where it stopped

    python -m data_tools.corruptions SRC DST [--names fog snow] [--severity 1 3]
    python -m data_tools.corruptions photo.jpg --sheet sheet.png

Variants are the parameters and conventions of the published codes: "imagenet" and "cifar" of
hendrycks/robustness, "bethge" of imagecorruptions (any size from 32, any aspect). Draws follow the published
order, so that RandomState(seed) gives what the published code gives under np.random.seed(seed). Whatever they
do is kept, down to the final cast that truncates; among it: glass blur copies pixels where a swap was meant,
impulse noise acts on each channel, the sixth frost photograph is never used. The frost photographs themselves
(frost1-3.png, frost4-6.jpg of hendrycks/robustness) are not included: pass them as `textures`, else procedural
ones stand in, which are alike in their statistics only.

Every recipe works on a batch (N, H, W, 3) with one generator per image: the draws are taken image by image,
the arithmetic is done for the batch.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_tools.corruption_filters import (  # noqa: F401  (the public ones belong to this module's names)
    _bilinear, _box_sum, _canny, _clipped_zoom, _disk_spectrum, _distance_5x5, _equalize,
    _fast_length, _gaussian, _grey, _plasma, _reflect, _reflect101, _warp_affine, canny,
    clipped_zoom, disk, distance_5x5, equalize, gaussian_filter, hsv_to_rgb,
    map_coordinates_reflect, motion_blur, plasma, prepare_frost, procedural_frost, rgb_to_hsv,
    solve_affine, warp_affine,
)

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
CORRUPTIONS = tuple(name for names in GROUPS.values() for name in names)
TEST_CORRUPTIONS = CORRUPTIONS[:15]
VARIANTS = ("imagenet", "cifar", "bethge")

# name -> parameters of severities 1..5, of ImageNet (and bethge) and of CIFAR
PARAMETERS = {
    "gaussian_noise": ((.08, .12, .18, .26, .38), (.04, .06, .08, .09, .10)),
    "shot_noise": ((60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": ((.03, .06, .09, .17, .27), (.01, .02, .03, .05, .07)),
    "speckle_noise": ((.15, .2, .35, .45, .6), (.06, .1, .12, .16, .2)),
    "gaussian_blur": ((1, 2, 3, 4, 6), (.4, .6, .7, .8, 1)),
    # sigma, largest offset, iterations
    "glass_blur": (((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
                   ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))),
    # radius, alias blur
    "defocus_blur": (((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),
                     ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))),
    # radius, sigma
    "motion_blur": (((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
                    ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    # stop and step of np.arange(1, stop, step)
    "zoom_blur": (((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)),
                  ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01))),
    # strength, decay of the plasma
    "fog": (((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75))),
    # weights of image and frost
    "frost": (((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)),
              ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45))),
    # mean, deviation, zoom, threshold, motion radius, motion sigma, weight of the image
    "snow": (((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
              (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)),
             ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
              (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8))),
    # mean, deviation, sigma, threshold, strength (water) or sigma (mud), mud
    "spatter": (((.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0),
                 (.65, .3, 1, .65, 1.5, 1), (.67, .4, 1, .65, 1.5, 1)),
                ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
                 (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1))),
    "contrast": ((.4, .3, .2, .1, .05), (.75, .5, .4, .3, .15)),
    "brightness": ((.1, .2, .3, .4, .5), (.05, .1, .15, .2, .3)),
    # factor, offset
    "saturate": (((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)), ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2))),
    "jpeg_compression": ((25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "pixelate": ((.6, .5, .4, .3, .25), (.95, .9, .85, .75, .65)),
    # strength, sigma, largest affine shift of a corner
    "elastic_transform": (
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, .96, .96))),
}
BETHGE_ELASTIC = (12.5, 16.25, 21.25, 25.0, 30.0)


# ---------------------------------------------------------------- recipes: (N, H, W, 3) uint8 -> float in 0..255

def _draws(rngs: Sequence, draw: Callable) -> np.ndarray:
    return np.stack([draw(rng) for rng in rngs])


def _unit(x: np.ndarray) -> np.ndarray:
    return x / 255.0


def _scaled(x: np.ndarray) -> np.ndarray:
    """0..255 from [0, 1], clipped; overwrites x."""
    np.clip(x, 0, 1, out=x)
    x *= 255
    return x


def _gaussian_noise(x, c, rngs, variant, severity, textures):
    return _scaled(_unit(x) + _draws(rngs, lambda rng: rng.normal(size=x.shape[1:], scale=c)))


def _shot_noise(x, c, rngs, variant, severity, textures):
    return _scaled(np.stack([rng.poisson(rate) for rng, rate in zip(rngs, _unit(x) * c)]) / float(c))


def _impulse_noise(x, c, rngs, variant, severity, textures):
    shape = x.shape[1:]
    draws = _draws(rngs, lambda rng: (rng.random(shape), rng.random(shape)))
    return np.where(draws[:, 0] <= c, np.where(draws[:, 1] <= 0.5, np.uint8(255), np.uint8(0)), x)


def _speckle_noise(x, c, rngs, variant, severity, textures):
    x = _unit(x)
    return _scaled(x + x * _draws(rngs, lambda rng: rng.normal(size=x.shape[1:], scale=c)))


def _gaussian_blur(x, c, rngs, variant, severity, textures):
    return _scaled(_gaussian(_unit(x), c))


def _glass_sources(offsets: np.ndarray, height: int, width: int, reach: int) -> np.ndarray:
    """Where each pixel's value comes from (N, H * W, indices into the flat batch) after one pass of
    "pixel (h, w) takes the value of (h + dy, w + dx)" from the last pixel to the first.

    offsets: (N, K, 2) dx, dy in visiting order. A pixel that copies from one visited before gets that one's new
    value ("live"); following the pointers of live pixels, all at once, ends after a few rounds.
    """
    n = len(offsets)
    h, w = np.meshgrid(np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1), indexing="ij")
    visited = (h * width + w).ravel()
    rank = np.full(height * width, len(visited))              # never visited: always an old value
    rank[visited] = np.arange(len(visited))
    source = visited + offsets[..., 1] * width + offsets[..., 0]
    pointer = np.tile(np.arange(height * width), (n, 1))
    pointer[:, visited] = source
    live = np.zeros(pointer.shape, bool)
    live[:, visited] = rank[source] < np.arange(len(visited))
    pointer += (np.arange(n) * (height * width))[:, None]
    flat, live = pointer.reshape(-1), live.reshape(-1)
    active = np.flatnonzero(live)
    while len(active):
        through = flat[active]
        flat[active], still = flat[through], live[through]
        live[active] = still
        active = active[still]
    return flat


def _glass_blur(x, c, rngs, variant, severity, textures):
    sigma, reach, iterations = c
    n, height, width, channels = x.shape
    pixels = (_gaussian(_unit(x), sigma) * 255).astype(np.uint8).reshape(-1, channels)
    count = (height - 2 * reach) * (width - 2 * reach)
    for _ in range(iterations):
        offsets = _draws(rngs, lambda rng: rng.randint(-reach, reach, size=(count, 2)))
        pixels = pixels[_glass_sources(offsets, height, width, reach)]
    return _scaled(_gaussian(_unit(pixels.reshape(x.shape)), sigma))


def _defocus_blur(x, c, rngs, variant, severity, textures):
    reach = 8 if c[0] <= 8 else int(c[0])
    rows, columns = (_reflect101(np.arange(-reach, size + reach), size) for size in x.shape[1:3])
    padded = _unit(x[:, rows][:, :, columns])
    shape = _fast_length(len(rows)), _fast_length(len(columns))
    spectrum = np.fft.rfft2(padded, shape, axes=(1, 2)) * _disk_spectrum(*c, shape)
    blurred = np.fft.irfft2(spectrum, shape, axes=(1, 2))     # the kernel is symmetric: correlation = convolution
    return _scaled(blurred[:, 2 * reach:2 * reach + x.shape[1], 2 * reach:2 * reach + x.shape[2]])


def _motion_blur(x, c, rngs, variant, severity, textures):
    return np.stack([motion_blur(image, *c, rng.uniform(-45, 45), variant) for image, rng in zip(x, rngs)]).clip(0, 255)


def _zoom_blur(x, c, rngs, variant, severity, textures):
    zooms, x = np.arange(1, *c), _unit(x).astype(np.float32)
    total = np.zeros_like(x)
    for zoom in zooms:                                        # float32 sums, as published: whole grey levels survive
        total += _clipped_zoom(x, zoom, variant != "bethge")[:, :x.shape[1], :x.shape[2]]
    return _scaled((x + total) / np.float32(len(zooms) + 1))


def _fog(x, c, rngs, variant, severity, textures):
    strength, decay = c
    height, width = x.shape[1:3]
    smallest = {"imagenet": 256, "cifar": 32, "bethge": 1}[variant]
    size = max(smallest, 1 << (max(height, width) - 1).bit_length())
    dtype = np.float32 if variant == "bethge" else np.float64
    field = _plasma(size, decay, _draws(rngs, lambda rng: rng.random_sample(size * size - 1)), dtype)
    x = _unit(x)
    largest = x.max((1, 2, 3), keepdims=True)
    return _scaled((x + strength * field[:, :height, :width, None]) * largest / (largest + strength))


_PREPARED: dict[tuple, tuple] = {}


def _prepared(texture: np.ndarray, variant: str, height: int, width: int) -> np.ndarray:
    """prepare_frost, remembered for the last ten textures and sizes."""
    key = id(texture), variant, height, width
    if key not in _PREPARED:
        while len(_PREPARED) >= 10:
            _PREPARED.pop(next(iter(_PREPARED)))
        _PREPARED[key] = texture, prepare_frost(texture, variant, height, width)  # holds it: its id stays taken
    return _PREPARED[key][1]


def _frost(x, c, rngs, variant, severity, textures):
    height, width = x.shape[1:3]
    crops = []
    for rng in rngs:
        texture = _prepared(textures[rng.randint(5) % len(textures)], variant, height, width)
        top, left = (rng.randint(0, side - need) for side, need in zip(texture.shape, (height, width)))
        crops.append(texture[top:top + height, left:left + width])
    return np.clip(c[0] * x + c[1] * np.stack(crops), 0, 255)


def _snow(x, c, rngs, variant, severity, textures):
    mean, deviation, zoom, threshold, radius, sigma, weight = c
    height, width = x.shape[1:3]
    layers, angles = [], []
    for rng in rngs:
        layers.append(rng.normal(size=(height, width), loc=mean, scale=deviation))
        angles.append(rng.uniform(-135, -45))
    layer = _clipped_zoom(np.stack(layers)[..., None], zoom, variant != "bethge")[..., 0]
    layer = np.where(layer < threshold, 0, layer).clip(0, 1)
    if variant == "bethge":
        layer = [np.round(motion_blur(one, radius, sigma, angle, variant) * 255).astype(np.uint8)
                 for one, angle in zip(layer, angles)]
    else:
        layer = [motion_blur((one * 255).astype(np.uint8), radius, sigma, angle) for one, angle in zip(layer, angles)]
    layer = (np.stack(layer) / 255.0)[:, :height, :width, None]
    x = x.astype(np.float32) / np.float32(255)
    weight, rest = np.float32(weight), np.float32(1 - weight)
    x = weight * x + rest * np.maximum(x, _grey(x) * np.float32(1.5) + np.float32(0.5))
    return _scaled(x + layer + layer[:, ::-1, ::-1])


def _water(layer: np.ndarray, strength: float) -> np.ndarray:
    """Refraction mask (N, H, W, 1) float32 of a liquid layer (N, H, W)."""
    layer = (layer * 255).astype(np.uint8)
    distance = np.minimum(_distance_5x5(255 - _canny(layer, 50, 150)), np.float32(20))
    blurred = (_box_sum(distance.astype(np.float64)) * (1 / 9)).astype(np.float32).astype(np.uint8)
    padded = _equalize(blurred).astype(np.int32)
    for axis in (1, 2):
        n = padded.shape[axis]
        padded = padded.take(_reflect101(np.arange(-1, n + 1), n), axis)
    height, width = layer.shape[1:]
    at = lambda dy, dx: padded[:, 1 + dy:1 + dy + height, 1 + dx:1 + dx + width]  # noqa: E731
    emboss = (-2 * at(-1, -1) - at(-1, 0) - at(0, -1) + at(0, 0) + at(0, 1) + at(1, 0) + 2 * at(1, 1)).clip(0, 255)
    smooth = np.rint(_box_sum(emboss) / 9).astype(np.float32)
    mask = layer * smooth
    largest = mask.max((1, 2), keepdims=True)                 # no edge anywhere: nothing is added, not NaN
    return (mask / np.where(largest > 0, largest, np.float32(1)) * np.float32(strength))[..., None]


def _spatter(x, c, rngs, variant, severity, textures):
    mean, deviation, sigma, threshold, strength, mud = c
    layer = _gaussian(_draws(rngs, lambda rng: rng.normal(size=x.shape[1:3], loc=mean, scale=deviation)), sigma)
    x = x.astype(np.float32) / np.float32(255)
    if not mud:
        color = np.array([175, 238, 238]) / 255.0
        return _scaled(x + _water(np.where(layer < threshold, 0, layer), strength) * color.astype(np.float32))
    mask = _gaussian((layer > threshold).astype(np.float32), strength)[..., None]
    mask = np.where(mask < 0.8, np.float32(0), mask)
    color = np.array([63, 42, 20]) / 255.0
    return _scaled(x * (1 - mask) + mask * color.astype(np.float64 if variant == "bethge" else np.float32))


def _contrast(x, c, rngs, variant, severity, textures):
    x = _unit(x)
    means = x.mean((1, 2), keepdims=True)
    return _scaled((x - means) * c + means)


def _brightness(x, c, rngs, variant, severity, textures):
    # Through HSV in full, here and below: shorter formulas are equal up to 1e-15, but new values often are whole
    # grey levels, and the final cast truncates.
    hsv = rgb_to_hsv(_unit(x))
    hsv[..., 2] = (hsv[..., 2] + c).clip(0, 1)
    return _scaled(hsv_to_rgb(hsv))


def _saturate(x, c, rngs, variant, severity, textures):
    hsv = rgb_to_hsv(_unit(x))
    hsv[..., 1] = (hsv[..., 1] * c[0] + c[1]).clip(0, 1)      # a grey pixel has hue 0: added saturation makes it red
    return _scaled(hsv_to_rgb(hsv))


def _jpeg_compression(x, c, rngs, variant, severity, textures):
    def recode(image: np.ndarray) -> np.ndarray:
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, "JPEG", quality=c)
            return np.asarray(Image.open(file))
    return np.stack([recode(image) for image in x])


def _pixelate(x, c, rngs, variant, severity, textures):
    height, width = x.shape[1:3]
    small, back = (int(width * c), int(height * c)), Image.NEAREST if variant == "bethge" else Image.BOX
    return np.stack([np.asarray(Image.fromarray(image).resize(small, Image.BOX).resize((width, height), back))
                     for image in x])


def _elastic_transform(x, c, rngs, variant, severity, textures):
    height, width = x.shape[1:3]
    x = x.astype(np.float32) / np.float32(255)
    if variant == "bethge":
        strength, sigma, reach = BETHGE_ELASTIC[severity - 1], np.array([height, width]) * 0.01, height * 0.005
    else:
        strength, sigma, largest = c
        reach = 1
        centre, square = np.float32([height, width]) // 2, min(height, width) // 3
        corners = np.float32([centre + square, [centre[0] + square, centre[1] - square], centre - square])
        moved = corners + _draws(rngs, lambda rng: rng.uniform(-largest, largest, size=(3, 2)).astype(np.float32))
        x = _warp_affine(x, solve_affine(np.broadcast_to(corners, moved.shape), moved))
    if strength == 0:
        return _scaled(x)
    fields = _draws(rngs, lambda rng: rng.uniform(-reach, reach, size=(2, height, width)))
    dx, dy = ((_gaussian(fields[:, k], sigma, "reflect", 3) * strength).astype(np.float32) for k in (0, 1))
    at_y, at_x = np.arange(height)[:, None] + dy, np.arange(width) + dx
    return _scaled(_bilinear(x, at_y, at_x, _reflect).astype(np.float32))


RECIPES = {name: globals()[f"_{name}"] for name in CORRUPTIONS}


def _check_textures(textures) -> Sequence[np.ndarray]:
    if textures is None:
        return procedural_frost()
    if isinstance(textures, (str, Path)):
        files = sorted(f for f in Path(textures).iterdir() if f.name.startswith("frost"))[:5]
        if not files:
            raise ValueError(f"textures: no file frost* in {textures}")
        return [np.asarray(Image.open(file).convert("RGB")) for file in files]
    if not len(textures) or any(t.dtype != np.uint8 or t.ndim != 3 or t.shape[2] != 3 for t in textures):
        raise ValueError("textures must be a folder or a list of uint8 (H, W, 3) RGB arrays")
    return textures


# ---------------------------------------------------------------- one image, a batch

def _check(images: np.ndarray, name: str, severity: int, variant: str) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"image must be uint8, not {images.dtype}")
    if name not in RECIPES:
        raise ValueError(f"unknown corruption {name!r}; the names are {', '.join(CORRUPTIONS)}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, not {severity!r}")
    smallest = 32 if variant == "bethge" else 16
    if min(images.shape[1:3]) < smallest:
        raise ValueError(f"image sides must be at least {smallest} for {variant}, not {images.shape[1:3]}")


def _generator(rng, name: str):
    """The generator a recipe draws from: see `corrupt`."""
    if rng is None or isinstance(rng, (int, np.integer)):
        return np.random.default_rng(rng) if name == "impulse_noise" else np.random.RandomState(rng)
    if isinstance(rng, np.random.RandomState):
        return rng
    if isinstance(rng, np.random.Generator):
        return rng if name == "impulse_noise" else np.random.RandomState(int(rng.integers(2**32)))
    raise TypeError(f"rng must be an int, a RandomState or a Generator, not {type(rng).__name__}")


def _apply(images: np.ndarray, name: str, severity: int, variant: str, rngs: list, textures) -> np.ndarray:
    """(N, H, W, C) uint8 to the same; grey images are replicated to RGB and back, rounded."""
    grey = images.shape[3] == 1
    colour = np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))
    parameters = PARAMETERS[name][variant == "cifar"][severity - 1]
    out = RECIPES[name](colour, parameters, rngs, variant, severity, textures).astype(np.uint8)
    if grey:
        out = np.rint(out @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    return out


def corrupt(image: np.ndarray, name: str, severity: int, variant: str = "imagenet", rng=None, *,
            textures=None) -> np.ndarray:
    """One corrupted uint8 image of the shape of `image`: (H, W, 3), (H, W) or (H, W, 1).

    severity: 1..5. variant: "imagenet", "cifar" or "bethge". rng: an int seed, a RandomState or a Generator. An int s
    means RandomState(s), for impulse noise default_rng(s), whose draws are the published ones; a Generator gives the
    seed of a RandomState. textures: RGB frost textures (list or folder), see the head of this file.
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(f"image must be (H, W), (H, W, 1) or (H, W, 3), not {image.shape}")
    batch = image.reshape(1, *image.shape[:2], -1)
    _check(batch, name, severity, variant)
    textures = _check_textures(textures) if name == "frost" else None
    return _apply(batch, name, severity, variant, [_generator(rng, name)], textures).reshape(image.shape)


def image_seed(seed: int, name: str, severity: int, index: int | str) -> int:
    """The seed of one image: the same in any batch, order and process."""
    text = f"{seed}/{name}/{severity}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def corrupt_batch(images: np.ndarray, name: str, severity: int, variant: str = "cifar", seed: int = 0, indices=None,
                  textures=None) -> np.ndarray:
    """Corrupted uint8 images (N, H, W, C).

    Image i is corrupt(images[i], ..., rng=image_seed(seed, name, severity, indices[i])).
    indices: numbers or names of the images, by default 0..N-1. Works through blocks of about 65,000 pixels.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images must be (N, H, W, 1) or (N, H, W, 3), not {images.shape}")
    _check(images, name, severity, variant)
    indices = range(len(images)) if indices is None else indices
    if len(indices) != len(images):
        raise ValueError(f"indices must have one entry per image ({len(images)}), not {len(indices)}")
    textures = _check_textures(textures) if name == "frost" else None
    out, block = np.empty_like(images), max(1, 65536 // (images.shape[1] * images.shape[2]))
    for start in range(0, len(images), block):
        part = slice(start, start + block)
        rngs = [_generator(image_seed(seed, name, severity, index), name) for index in indices[part]]
        out[part] = _apply(images[part], name, severity, variant, rngs, textures)
    return out


# ---------------------------------------------------------------- whole data sets

def _settings(folder: Path, settings: dict) -> None:
    """Remember what a folder is made from; refuse to mix two makings in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "corruptions.json"
    if file.exists():
        before = json.loads(file.read_text())
        if before != settings:
            changed = [f"{k} {before.get(k)} -> {settings.get(k)}" for k in {*before, *settings}
                       if before.get(k) != settings.get(k)]
            raise ValueError(f"{folder} was begun with other settings ({', '.join(sorted(changed))}); "
                             "choose another folder")
        return
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(settings))
    os.replace(temporary, file)


def _texture_mark(textures) -> int | None:
    return None if textures is None else zlib.crc32(b"".join(t.tobytes() for t in _check_textures(textures)))


def _in_processes(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator:
    """Results of function(*task) in order, computed by `workers` processes (1: in this one)."""
    if workers <= 1:
        yield from (function(*task) for task in tasks)
        return
    with ProcessPoolExecutor(workers) as pool:
        waiting, tasks = [], iter(tasks)
        for task in tasks:                                    # a few tasks ahead, not all: they carry images
            waiting.append(pool.submit(function, *task))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        yield from (future.result() for future in waiting)


def _write_block(part: Path, images: np.ndarray, name: str, severity: int, variant: str, seed: int, start: int,
                 total: int, textures) -> None:
    indices = range(start, start + len(images))
    out = corrupt_batch(images, name, severity, variant, seed, indices, textures)
    store = np.lib.format.open_memmap(part, mode="r+")
    store[(severity - 1) * total + start:(severity - 1) * total + start + len(images)] = out
    store.flush()


def make_cifar_c(images: np.ndarray, out_dir: str | Path, labels=None, *, names: Sequence[str] = CORRUPTIONS,
                 variant: str = "cifar", seed: int = 0, workers: int = 1, textures=None,
                 progress: Callable | None = None) -> None:
    """Write `<name>.npy` uint8 (5N, H, W, C), severities 1..5 one after another, and labels.npy (N,).

    Called again after an interruption it goes on: finished files are left, of an unfinished one only the missing
    blocks of 500 images are computed. progress(done, total) is called after each block.
    """
    images, out_dir, n, block = np.asarray(images), Path(out_dir), len(images), 500
    for name in names:
        _check(images, name, 1, variant)
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels must have one entry per image ({n}), not {len(labels)}")
    _settings(out_dir, {"variant": variant, "seed": seed, "images": list(images.shape),
                        "checksum": zlib.crc32(np.ascontiguousarray(images)), "textures": _texture_mark(textures)})
    if labels is not None:
        np.save(out_dir / "labels.npy", np.asarray(labels))
    blocks = [(severity, start) for severity in range(1, 6) for start in range(0, n, block)]
    done_blocks, total_blocks = 0, len(blocks) * len(names)
    for name in names:
        final, part, marks = (out_dir / f"{stem}" for stem in (f"{name}.npy", f".{name}.part", f".{name}.blocks"))
        if not final.exists():
            if not part.exists():
                marks.write_text("")
                np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(5 * n, *images.shape[1:])).flush()
            lines = [line for line in marks.read_text().splitlines() if line.endswith(".")]
            finished = {tuple(map(int, line[:-1].split())) for line in lines}
            missing = [b for b in blocks if b not in finished]
            done_blocks += len(blocks) - len(missing)
            tasks = ((part, images[start:start + block], name, severity, variant, seed, start, n, textures)
                     for severity, start in missing)
            for (severity, start), _ in zip(missing, _in_processes(_write_block, tasks, workers)):
                with open(marks, "a") as file:
                    file.write(f"{severity} {start}.\n")      # the full stop: a line cut short does not count
                done_blocks += 1
                if progress is not None:
                    progress(done_blocks, total_blocks)
            os.replace(part, final)
            marks.unlink()
        else:
            done_blocks += len(blocks)


def load_cifar_c(dir: str | Path, name: str, severity: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Memory-mapped images and labels of one corruption: N of one severity, or all 5N (labels repeated).

    Reads the published folders too, whose labels.npy already has 5N entries."""
    if severity not in (None, 1, 2, 3, 4, 5):
        raise ValueError(f"severity must be None or 1..5, not {severity!r}")
    file, label_file = Path(dir) / f"{name}.npy", Path(dir) / "labels.npy"
    images, labels = np.load(file, mmap_mode="r"), np.load(label_file)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) % 5:
        raise ValueError(f"{file}: expected uint8 (5N, H, W, C), found {images.dtype} {images.shape}")
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


def _write_image(file: Path, relative: str, missing: list[tuple[str, int, Path]], size: int, quality: int,
                 variant: str, seed: int, textures) -> None:
    image = _open_cropped(file, size)
    for name, severity, target in missing:
        out = corrupt(image, name, severity, variant, image_seed(seed, name, severity, relative), textures=textures)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        Image.fromarray(out).save(temporary, "JPEG", quality=quality)
        os.replace(temporary, target)


def make_imagenet_c(src: str | Path, dst: str | Path, *, names: Sequence[str] = CORRUPTIONS,
                    severities: Sequence[int] = (1, 2, 3, 4, 5), size: int = 224, quality: int = 85,
                    variant: str = "imagenet", seed: int = 0, workers: int = 1, textures=None,
                    progress: Callable | None = None) -> None:
    """Write `<name>/<severity>/<path>.JPEG` for every image under src, resized and centre-cropped to `size`.

    A picture is drawn from (seed, name, severity, its path): alone or among others it comes out the same. Images
    that are there already are left, so that a second call goes on. progress(done, total) counts source images.
    """
    src, dst = Path(src), Path(dst)
    probe = np.zeros((1, size, size, 3), np.uint8)
    for name in names:
        for severity in severities:
            _check(probe, name, severity, variant)
    files = sorted(f for f in src.rglob("*") if f.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"no images under {src}")
    _settings(dst, {"variant": variant, "seed": seed, "size": size, "quality": quality,
                    "textures": _texture_mark(textures)})

    def tasks() -> Iterator[tuple]:
        for file in files:
            relative = file.relative_to(src).with_suffix(".JPEG")
            targets = ((name, s, dst / name / str(s) / relative) for name in names for s in severities)
            missing = [target for target in targets if not target[2].exists()]
            yield file, relative.as_posix(), missing, size, quality, variant, seed, textures

    present = sum(1 for task in tasks() if not task[2])
    wanted = (task for task in tasks() if task[2])
    for done, _ in enumerate(_in_processes(_write_image, wanted, workers), present + 1):
        if progress is not None:
            progress(done, len(files))


def contact_sheet(image: np.ndarray, path: str | Path, names: Sequence[str] = CORRUPTIONS,
                  severities: Sequence[int] = (1, 2, 3, 4, 5), variant: str = "imagenet", seed: int = 0,
                  textures=None, groups: int = 1) -> None:
    """A PNG with one row per corruption and one column per severity, `groups` such tables side by side."""
    height, width = image.shape[:2]
    label, per_group = 130, -(-len(names) // groups)
    block = label + len(severities) * (width + 4)
    sheet = Image.new("RGB", (groups * block, per_group * (height + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        left, top = i // per_group * block, i % per_group * (height + 4)
        draw.text((left + 6, top + height // 2 - 6), name.replace("_", " "), fill="black")
        for j, severity in enumerate(severities):
            out = corrupt(image, name, severity, variant, image_seed(seed, name, severity, 0), textures=textures)
            sheet.paste(Image.fromarray(out), (left + label + j * (width + 4), top))
    sheet.save(path, optimize=True)


# ---------------------------------------------------------------- command line

def _progress_line(label: str) -> Callable[[int, int], None]:
    began, seen = time.monotonic(), []

    def show(done: int, total: int) -> None:
        seen.append(done)
        elapsed = time.monotonic() - began
        left = elapsed / len(seen) * (total - done)
        ending = "\n" if done == total else "\r" if sys.stderr.isatty() else "\n"
        print(f"{label} {done}/{total}, {elapsed:.0f} s, {left:.0f} s left   ", end=ending, file=sys.stderr, flush=True)

    return show


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m data_tools.corruptions", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("src", type=Path, help="folder of images, .npy of uint8 (N, H, W, 3), or the CIFAR pickles' folder")
    add("dst", type=Path, nargs="?", help="folder to write; the same command goes on after an interruption")
    add("--names", nargs="+", choices=CORRUPTIONS, default=list(CORRUPTIONS), metavar="NAME")
    add("--severity", nargs="+", type=int, choices=range(1, 6), default=[1, 2, 3, 4, 5], metavar="1..5")
    add("--variant", choices=VARIANTS, help="default: imagenet for folders, cifar for arrays")
    add("--seed", type=int, default=0)
    add("--size", type=int, default=224, help="side of the centre crop (folders)")
    add("--quality", type=int, default=85, help="of the JPEGs written (folders)")
    add("--workers", type=int, default=os.cpu_count() or 1)
    add("--textures", type=Path, help="folder with the frost photographs frost1.png ...")
    add("--sheet", type=Path, metavar="PNG", help="instead: a contact sheet of the image SRC")
    args = parser.parse_args(argv)
    common = {"names": args.names, "seed": args.seed,
              "textures": None if args.textures is None else _check_textures(args.textures)}
    try:
        if args.sheet:
            contact_sheet(_open_cropped(args.src, min(args.size, 128)), args.sheet, severities=args.severity,
                          variant=args.variant or "imagenet", **common)
            return 0
        if args.dst is None:
            parser.error("DST is missing")
        common |= {"workers": args.workers, "progress": _progress_line(str(args.dst))}
        cifar_name = {"cifar-100-python": "cifar100", "cifar-10-batches-py": "cifar10"}.get(args.src.name)
        if args.src.suffix == ".npy" or cifar_name:
            if sorted(args.severity) != [1, 2, 3, 4, 5]:
                parser.error("--severity: the files of a CIFAR-C folder hold all five severities")
            if cifar_name:
                from data_tools.imagenet import cifar         # the only use of torch

                test = cifar(args.src, cifar_name, train=False)
                images, labels = test.images, test.labels
            else:
                images, labels = np.load(args.src, mmap_mode="r"), None
            make_cifar_c(images, args.dst, labels, variant=args.variant or "cifar", **common)
        else:
            make_imagenet_c(args.src, args.dst, severities=args.severity, size=args.size, quality=args.quality,
                            variant=args.variant or "imagenet", **common)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on from here\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
