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
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

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


# ---------------------------------------------------------------- filters

def _reflect(index: np.ndarray, n: int) -> np.ndarray:
    """Half-sample mirror with period 2n (edge repeated)."""
    index = index % (2 * n)
    return np.where(index >= n, 2 * n - 1 - index, index)


def _reflect101(index: np.ndarray, n: int) -> np.ndarray:
    """Mirror with period 2(n - 1) (edge not repeated)."""
    index = index % max(2 * (n - 1), 1)
    return np.where(index >= n, 2 * (n - 1) - index, index)


def _gaussian_axis(x: np.ndarray, sigma: float, axis: int, mode: str, truncate: float) -> np.ndarray:
    if sigma <= 1e-15:
        return x
    n, radius = x.shape[axis], int(truncate * sigma + 0.5)
    weights = np.exp(-np.arange(-radius, radius + 1) ** 2 / (2 * sigma**2))
    weights /= weights.sum()
    index = np.arange(-radius, n + radius)
    index = _reflect(index, n) if mode == "reflect" else index.clip(0, n - 1)
    x64 = np.moveaxis(x, axis, 0).astype(np.float64, copy=False)
    if radius >= n:                                           # fold the taps into an n x n matrix
        matrix = np.zeros((n, n))
        np.add.at(matrix, (np.repeat(np.arange(n), 2 * radius + 1),
                           np.lib.stride_tricks.sliding_window_view(index, 2 * radius + 1).ravel()),
                  np.tile(weights, n))
        out = (matrix @ x64.reshape(n, -1)).reshape(x64.shape)
    else:                                                     # scipy's order of summation, to the last bit
        padded = x64[index]
        out = padded[radius:radius + n] * weights[radius]
        for k in range(radius, 0, -1):
            pair = padded[radius - k:radius - k + n] + padded[radius + k:radius + k + n]
            pair *= weights[radius - k]
            out += pair
    return np.moveaxis(out, 0, axis).astype(x.dtype, copy=False)


def _gaussian(x: np.ndarray, sigma, mode: str = "nearest", truncate: float = 4.0, axis: int = 1) -> np.ndarray:
    rows, columns = np.broadcast_to(sigma, 2)
    return _gaussian_axis(_gaussian_axis(x, rows, axis, mode, truncate), columns, axis + 1, mode, truncate)


def gaussian_filter(x: np.ndarray, sigma, mode: str = "nearest", truncate: float = 4.0) -> np.ndarray:
    """Separable Gaussian of (H, W) or (H, W, C), radius int(truncate sigma + .5), cast to x's dtype after each axis.

    sigma: a number or (rows, columns). mode: "nearest" repeats the edge, "reflect" mirrors at half samples.
    """
    if mode not in ("nearest", "reflect"):
        raise ValueError(f'mode must be "nearest" or "reflect", not {mode!r}')
    return _gaussian(x, sigma, mode, truncate, axis=0)


def _box_sum(x: np.ndarray) -> np.ndarray:
    """Sums over 3 x 3 neighbourhoods of (N, H, W), borders mirrored without the edge."""
    for axis in (1, 2):
        n = x.shape[axis]
        x = x.take(_reflect101(np.arange(-1, n + 1), n), axis)
        cut = [slice(None)] * 3
        parts = []
        for start in range(3):
            cut[axis] = slice(start, start + n)
            parts.append(x[tuple(cut)])
        x = parts[0] + parts[1] + parts[2]
    return x


def disk(radius: float, alias_blur: float = 0.1) -> np.ndarray:
    """Normalised disk kernel, float32: 17 x 17 up to radius 8, smoothed by a small Gaussian of sigma alias_blur."""
    reach, taps = (8, 1) if radius <= 8 else (int(radius), 2)
    line = np.arange(-reach, reach + 1)
    kernel = (line**2 + line[:, None] ** 2 <= radius**2).astype(np.float32)
    kernel /= kernel.sum()
    weights = np.exp(-np.arange(-taps, taps + 1) ** 2 / (2 * alias_blur**2))
    weights = (weights / weights.sum()).astype(np.float32)
    n = len(line)
    index = _reflect101(np.arange(-taps, n + taps), n)
    for _ in range(2):
        padded = kernel[index]
        kernel = sum(w * padded[k:k + n] for k, w in enumerate(weights)).T
    return kernel.astype(np.float32)


@lru_cache(maxsize=16)
def _disk_spectrum(radius: float, alias_blur: float, shape: tuple[int, int]) -> np.ndarray:
    return np.fft.rfft2(disk(radius, alias_blur).astype(np.float64), shape)[None, :, :, None]


def _fast_length(n: int) -> int:
    """The next product of 2, 3 and 5, a length that transforms quickly."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def _zoom_taps(n: int, zoom: float, trim: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per output position along one axis: lower and upper source index and the weight of the upper one."""
    crop = int(np.ceil(n / zoom))
    size = round(crop * zoom)
    first, count = ((size - n) // 2, n) if trim else (0, size)
    source = np.arange(first, first + count) * ((crop - 1) / max(size - 1, 1))
    low = np.minimum(source.astype(np.int64), max(crop - 2, 0))
    start = (n - crop) // 2
    return start + low, start + np.minimum(low + 1, crop - 1), source - low


def _clipped_zoom(x: np.ndarray, zoom: float, trim: bool) -> np.ndarray:
    """The middle of (N, H, W, C) enlarged; linear, corners aligned, in float64, cast to x's dtype."""
    low, high, f = _zoom_taps(x.shape[1], zoom, trim)
    f = f[:, None, None]
    rows = x[:, low] * (1 - f) + x[:, high] * f
    low, high, f = _zoom_taps(x.shape[2], zoom, trim)
    return (rows[:, :, low] * (1 - f[:, None]) + rows[:, :, high] * f[:, None]).astype(x.dtype, copy=False)


def clipped_zoom(x: np.ndarray, zoom: float, variant: str = "imagenet") -> np.ndarray:
    """The middle 1/zoom of (H, W, C) enlarged back to H x W ("imagenet", "cifar"), or to at least that ("bethge")."""
    return _clipped_zoom(x[None], zoom, variant != "bethge")[0]


def motion_blur(x: np.ndarray, radius: float, sigma: float, angle: float, variant: str = "imagenet") -> np.ndarray:
    """ImageMagick's one-sided motion blur of (H, W) or (H, W, C) along `angle` degrees, edges repeated.

    "imagenet" and "cifar": uint8 to uint8 with ImageMagick's 16-bit intermediate, bit for bit. "bethge": the float
    sums, cut off where the motion leaves the image.
    """
    width = 2 * math.ceil(radius) + 1
    steps = np.arange(width)
    weights = np.exp(-steps**2 / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)
    weights /= weights.sum()
    direction = math.radians(angle)
    dx, dy = (np.ceil(steps * f(direction) - 0.5).astype(int) for f in (math.cos, math.sin))
    height, breadth = x.shape[:2]
    if variant == "bethge":
        outside = (np.abs(dy) >= height) | (np.abs(dx) >= breadth)
        width = int(outside.argmax()) if outside.any() else width
    dx, dy = dx[:width], dy[:width]
    rows, columns = (np.arange(min(d.min(), 0), n + max(d.max(), 0)).clip(0, n - 1)
                     for d, n in ((dy, height), (dx, breadth)))
    padded = x[rows][:, columns].astype(np.float64, copy=False)
    top, left = max(-dy.min(), 0), max(-dx.min(), 0)
    out = np.zeros(x.shape)
    for weight, shift_y, shift_x in zip(weights.tolist(), (dy + top).tolist(), (dx + left).tolist()):
        out += weight * padded[shift_y:shift_y + height, shift_x:shift_x + breadth]
    return out if variant == "bethge" else np.floor(np.floor(257 * out + 0.5) / 257).astype(np.uint8)


# ---------------------------------------------------------------- plasma, colour, geometry

def _plasma(size: int, decay: float, uniforms: np.ndarray, dtype=np.float64) -> np.ndarray:
    """Diamond-square maps (N, size, size) in [0, 1] from (N, size^2 - 1) uniform numbers."""
    field = np.zeros((len(uniforms), size, size), dtype)
    step, amplitude, used = size, 100.0, 0

    def displaced(total: np.ndarray) -> np.ndarray:
        nonlocal used
        count = total[0].size
        draw = uniforms[:, used:used + count].reshape(total.shape)
        used += count
        return total / 4 + amplitude * (-amplitude + 2 * amplitude * draw)

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        total = corners + np.roll(corners, -1, 1)
        field[:, half::step, half::step] = displaced(total + np.roll(total, -1, 2))
        centres = field[:, half::step, half::step]
        field[:, ::step, half::step] = displaced(
            (centres + np.roll(centres, 1, 1)) + (corners + np.roll(corners, -1, 2)))
        field[:, half::step, ::step] = displaced(
            (centres + np.roll(centres, 1, 2)) + (corners + np.roll(corners, -1, 1)))
        step //= 2
        amplitude /= decay
    field -= field.min((1, 2), keepdims=True)
    largest = field.max((1, 2), keepdims=True)
    return field / np.where(largest > 0, largest, 1)


def plasma(size: int, decay: float, rng: np.random.RandomState) -> np.ndarray:
    """Diamond-square fractal (size, size) float64 in [0, 1] on a torus; size is a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"size must be a power of two, not {size}")
    return _plasma(size, decay, rng.random_sample(size * size - 1)[None])[0]


def rgb_to_hsv(x: np.ndarray) -> np.ndarray:
    """Hexcone HSV of (..., 3) in [0, 1], hue in [0, 1); on ties blue beats green beats red."""
    x = np.asarray(x, np.float64)
    r, g, b = np.moveaxis(x, -1, 0)
    value = x.max(-1)
    delta = value - x.min(-1)
    safe = np.where(delta == 0, 1, delta)
    hue = np.where(b == value, 4 + (r - g) / safe, np.where(g == value, 2 + (b - r) / safe, (g - b) / safe)) / 6 % 1
    saturation = delta / np.where(value == 0, 1, value)
    return np.stack([np.where(delta == 0, 0, hue), saturation, value], -1)


def hsv_to_rgb(x: np.ndarray) -> np.ndarray:
    """Inverse of rgb_to_hsv."""
    h, s, v = np.moveaxis(np.asarray(x, np.float64), -1, 0)
    sector = np.floor(6 * h)
    f = 6 * h - sector
    p, q, t = v * (1 - s), v * (1 - f * s), v * (1 - (1 - f) * s)
    sector = sector.astype(int) % 6
    return np.stack([np.choose(sector, c) for c in ((v, q, p, p, t, v), (t, v, v, q, p, p), (p, p, t, v, v, q))], -1)


def _grey(x: np.ndarray) -> np.ndarray:
    """Luminance (..., 1) of float32 RGB."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return (x[..., 0] * weights[0] + x[..., 1] * weights[1] + x[..., 2] * weights[2])[..., None]


def _bilinear(x: np.ndarray, y: np.ndarray, x_at: np.ndarray, border: Callable) -> np.ndarray:
    """(N, H, W, C) sampled at (N, h, w) coordinates, in float64."""
    n, height, width = x.shape[:3]
    flat, base = x.reshape(n * height * width, -1), (np.arange(n) * height * width)[:, None, None]
    y0, x0 = np.floor(y), np.floor(x_at)
    fy, fx = (y - y0)[..., None], (x_at - x0)[..., None]
    rows = [border(y0.astype(np.int64) + k, height) * width + base for k in (0, 1)]
    columns = [border(x0.astype(np.int64) + k, width) for k in (0, 1)]
    take = lambda i, j: flat.take(rows[i] + columns[j], 0)    # noqa: E731
    upper = take(0, 0) * (1 - fx) + take(0, 1) * fx
    return upper * (1 - fy) + (take(1, 0) * (1 - fx) + take(1, 1) * fx) * fy


def map_coordinates_reflect(x: np.ndarray, cy: np.ndarray, cx: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) sampled bilinearly at rows cy and columns cx, borders mirrored at half samples."""
    image = x[None] if x.ndim == 3 else x[None, ..., None]
    shape = cy.shape + x.shape[2:]
    cy, cx = (np.asarray(c, np.float64).reshape(1, 1, -1) for c in (cy, cx))
    return _bilinear(image, cy, cx, _reflect).reshape(shape).astype(x.dtype)


def solve_affine(src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """(2, 3) float64 matrix that maps the three (x, y) points src to dst (leading batch dimensions allowed)."""
    src, dst = np.asarray(src, np.float64), np.asarray(dst, np.float64)
    return np.swapaxes(np.linalg.solve(np.concatenate([src, np.ones_like(src[..., :1])], -1), dst), -1, -2)


def _warp_affine(x: np.ndarray, M: np.ndarray, quantize: bool = True) -> np.ndarray:
    full = np.concatenate([M, np.broadcast_to([[[0.0, 0.0, 1.0]]], (len(M), 1, 3))], 1)
    inverse = np.linalg.inv(full)[:, :2, :, None, None]
    rows, columns = np.arange(x.shape[1])[:, None], np.arange(x.shape[2])
    at = []
    for a, b, c in np.swapaxes(inverse, 0, 1).swapaxes(1, 2):
        if quantize:
            fixed = np.rint((b * rows + c) * 1024).astype(np.int64) + 16 + np.rint(a * columns * 1024).astype(np.int64)
            at.append((fixed >> 5) / 32)
        else:
            at.append(a * columns + (b * rows + c))
    return _bilinear(x, at[1], at[0], _reflect101).astype(x.dtype)


def warp_affine(x: np.ndarray, M: np.ndarray, quantize: bool = True) -> np.ndarray:
    """(H, W, C) moved by the 2 x 3 matrix M (output (x, y) = M source), bilinear, mirrored borders.

    quantize: source coordinates in 1/32 pixel, as OpenCV 3 and 4 (the published data) have them.
    """
    return _warp_affine(x[None], np.asarray(M, np.float64)[None], quantize)[0]


# ---------------------------------------------------------------- edges, distance, histogram

def _shift_pad(x: np.ndarray, mode: str = "constant", width: int = 1, **keywords) -> np.ndarray:
    return np.pad(x, ((0, 0), (width, width), (width, width)), mode, **keywords)


def _canny(x: np.ndarray, low: int, high: int) -> np.ndarray:
    p = _shift_pad(x.astype(np.int32), "edge")
    smooth_y = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    gx = smooth_y[:, :, 2:] - smooth_y[:, :, :-2]
    smooth_x = p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]
    gy = smooth_x[:, 2:] - smooth_x[:, :-2]
    m = np.abs(gx) + np.abs(gy)
    around = _shift_pad(m)
    height, width = m.shape[1:]
    at = lambda dy, dx: around[:, 1 + dy:1 + dy + height, 1 + dx:1 + dx + width]  # noqa: E731
    tangent, ay = np.abs(gx) * 13573, np.abs(gy) << 15        # tan(22.5 degrees) in fixed point
    horizontal, vertical = ay < tangent, ay > tangent + (np.abs(gx) << 16)
    peak = np.where(horizontal, (m > at(0, -1)) & (m >= at(0, 1)), np.where(
        vertical, (m > at(-1, 0)) & (m >= at(1, 0)), np.where(
            (gx ^ gy) < 0, (m > at(-1, 1)) & (m > at(1, -1)), (m > at(-1, -1)) & (m > at(1, 1)))))
    weak = peak & (m > low)
    edges = weak & (m > high)
    count = edges.sum()
    while count:                                              # edges grow through weak ones, 8-connected
        grown = _shift_pad(edges)
        grown = grown[:, :-2] | grown[:, 1:-1] | grown[:, 2:]
        edges = (grown[:, :, :-2] | grown[:, :, 1:-1] | grown[:, :, 2:]) & weak
        if edges.sum() == count:
            break
        count = edges.sum()
    return np.where(edges, np.uint8(255), np.uint8(0))


def canny(u8: np.ndarray, low: int = 50, high: int = 150) -> np.ndarray:
    """Canny edges (255) of (H, W) uint8: Sobel 3 x 3, L1 magnitude, hysteresis; OpenCV's arithmetic."""
    return _canny(u8[None], low, high)[0]


def _distance_5x5(x: np.ndarray) -> np.ndarray:
    near, diagonal, knight = np.float32(1), np.float32(1.4), np.float32(2.1969)
    d = np.full((len(x), x.shape[1] + 2, x.shape[2] + 4), 8191, np.float32)
    d[:, 2:, 2:-2][x == 0] = 0
    for forward in (True, False):                             # down and right, then up and left
        if not forward:
            d = np.concatenate([d[:, 2:][:, ::-1, ::-1], np.full_like(d[:, :2], 8191)], 1)
            d = np.roll(d, 2, 1)
        for y in range(2, d.shape[1]):
            above, two_above = d[:, y - 1], d[:, y - 2]
            far = np.minimum(np.minimum(two_above[:, 1:-3], two_above[:, 3:-1]),
                             np.minimum(above[:, :-4], above[:, 4:])) + knight
            row = np.minimum(np.minimum(far, np.minimum(above[:, 1:-3], above[:, 3:-1]) + diagonal),
                             np.minimum(above[:, 2:-2] + near, d[:, y, 2:-2]))
            while True:                                       # along the row, until nothing changes
                nearer = np.minimum(row[:, 1:], row[:, :-1] + near)
                if np.array_equal(nearer, row[:, 1:]):
                    break
                row[:, 1:] = nearer
            d[:, y, 2:-2] = row
    return d[:, 2:, 2:-2][:, ::-1, ::-1]


def distance_5x5(u8: np.ndarray) -> np.ndarray:
    """Chamfer distance (H, W) float32 to the nearest 0 with steps 1, 1.4 and 2.1969; 8191 where there is none."""
    return _distance_5x5(u8[None])[0]


def _equalize(x: np.ndarray) -> np.ndarray:
    n, pixels = len(x), x[0].size
    histogram = np.bincount((x.reshape(n, -1) + 256 * np.arange(n)[:, None]).ravel(), minlength=256 * n).reshape(n, 256)
    first = (histogram > 0).argmax(1)
    at_first = histogram[np.arange(n), first]
    histogram[np.arange(n), first] = 0
    single = at_first == pixels
    scale = (np.float32(255) / np.maximum(pixels - at_first, 1).astype(np.float32)).astype(np.float32)
    lut = np.rint(histogram.cumsum(1).astype(np.float32) * scale[:, None]).clip(0, 255).astype(np.uint8)
    lut[single] = np.arange(256)
    return np.take_along_axis(lut, x.reshape(n, -1).astype(np.int64), 1).reshape(x.shape)


def equalize(u8: np.ndarray) -> np.ndarray:
    """Histogram equalisation of (H, W) uint8 as OpenCV has it; a constant image stays."""
    return _equalize(u8[None])[0]


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


def _frost(x, c, rngs, variant, severity, textures):
    height, width = x.shape[1:3]
    prepared, crops = {}, []
    for rng in rngs:
        index = rng.randint(5) % len(textures)
        if index not in prepared:
            prepared[index] = _prepare_texture(textures[index], variant, height, width)
        texture = prepared[index]
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


# ---------------------------------------------------------------- frost textures

def _resize(image: np.ndarray, height: int, width: int, cubic: bool) -> np.ndarray:
    """OpenCV's bilinear or bicubic (a = -.75) resize of uint8: no filter against aliasing, edges repeated."""
    out = image.astype(np.float64)
    for axis, size in ((1, width), (0, height)):
        source = ((np.arange(size) + 0.5) * (image.shape[axis] / size) - 0.5).astype(np.float32)
        low = np.floor(source)
        f = (source - low).astype(np.float64)
        if cubic:
            outer = lambda t: -0.75 * (((t - 5) * t + 8) * t - 4)  # noqa: E731
            inner = lambda t: (1.25 * t - 2.25) * t * t + 1   # noqa: E731
            weights = {-1: outer(f + 1), 0: inner(f), 1: inner(1 - f), 2: outer(2 - f)}
        else:
            weights = {0: 1 - f, 1: f}
        shape = [1, 1, 1]
        shape[axis] = size
        indices = {k: (low.astype(int) + k).clip(0, image.shape[axis] - 1) for k in weights}
        out = sum(out.take(indices[k], axis) * weight.reshape(shape) for k, weight in weights.items())
    return np.rint(out).clip(0, 255).astype(np.uint8)


def _prepare_texture(texture: np.ndarray, variant: str, height: int, width: int) -> np.ndarray:
    """The texture at the size it is cropped from; larger than the image in both directions."""
    rows, columns = texture.shape[:2]
    if variant == "cifar":
        small = _resize(texture, round(rows * 0.2), round(columns * 0.2), cubic=False)
        if small.shape[0] > height and small.shape[1] > width:
            return small
    if variant == "imagenet" and rows > height and columns > width:
        return texture
    scale = 1.1 * max(1, height / rows, width / columns)
    return _resize(texture, math.ceil(rows * scale), math.ceil(columns * scale), cubic=True)


@lru_cache(maxsize=1)
def procedural_frost() -> tuple[np.ndarray, ...]:
    """Five uint8 (512, 512, 3) textures in place of the photographs: ridges of ice over fine crystals, bluish white."""
    textures = []
    for seed in range(5):
        rng = np.random.RandomState(seed)
        ridges = (1 - np.abs(2 * plasma(512, 1.7, rng) - 1)) ** 3
        crystals = (plasma(512, 1.3, rng) - 0.5).clip(0) * 1.2
        ice = (0.15 + 0.7 * ridges + crystals).clip(0, 1)[..., None]
        textures.append((ice ** np.array([1.1, 1.0, 0.9]) * 255).astype(np.uint8))
    return tuple(textures)


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
