"""Image filters behind the corruptions, with numpy alone: Gaussian, disk, zoom, motion, plasma,
HSV, warps, Canny, distance, equalisation. Each does what scikit-image, scipy, OpenCV or ImageMagick
does, in their order of arithmetic where the last bit can matter. Public functions take one image;
the underscored ones a batch (N, H, W[, C]).
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

VARIANTS = ("imagenet", "cifar", "bethge")


# ---- checks --------------------------------------------------------------------------------------

def check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")


def _plane(u8: np.ndarray) -> np.ndarray:
    """A uint8 image (H, W) as a batch of one."""
    if u8.dtype != np.uint8 or u8.ndim != 2:
        raise (TypeError if u8.dtype != np.uint8 else ValueError)(
            f"the image must be uint8 (H, W), not {u8.dtype} {u8.shape}")
    return u8[None]


# ---- filters -------------------------------------------------------------------------------------

def _reflect(index: np.ndarray, n: int) -> np.ndarray:
    """Half-sample mirror with period 2n (edge repeated)."""
    index = index % (2 * n)
    return np.where(index >= n, 2 * n - 1 - index, index)


def _reflect101(index: np.ndarray, n: int) -> np.ndarray:
    """Mirror with period 2(n - 1) (edge not repeated)."""
    index = index % max(2 * (n - 1), 1)
    return np.where(index >= n, 2 * (n - 1) - index, index)


def _gaussian_axis(x: np.ndarray, sigma: float, axis: int, mode: str,
                   truncate: float) -> np.ndarray:
    if sigma <= 1e-15:
        return x
    n, radius = x.shape[axis], int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
    weights /= weights.sum()
    index = np.arange(-radius, n + radius)
    index = _reflect(index, n) if mode == "reflect" else index.clip(0, n - 1)
    x64 = np.moveaxis(x, axis, 0).astype(np.float64, copy=False)
    if radius >= n:  # fold the taps into an n x n matrix
        matrix = np.zeros((n, n))
        np.add.at(matrix, (np.repeat(np.arange(n), 2 * radius + 1),
                           np.lib.stride_tricks.sliding_window_view(index, 2 * radius + 1).ravel()),
                  np.tile(weights, n))
        # a product for each image: the shape decides how BLAS rounds, the batch must not
        out = np.stack([matrix @ one.reshape(n, -1) for one in x64.swapaxes(0, 1)], 1)
        out = out.reshape(x64.shape)
    else:  # scipy's order of summation, to the last bit
        padded = x64.take(index, 0)
        out = padded[radius:radius + n] * weights[radius]
        pair = np.empty_like(out)
        for k in range(radius, 0, -1):
            before, after = (padded[start:start + n] for start in (radius - k, radius + k))
            np.add(before, after, out=pair)
            pair *= weights[radius - k]
            out += pair
    return np.moveaxis(out, 0, axis).astype(x.dtype, copy=False)


def _gaussian(x: np.ndarray, sigma, mode: str = "nearest", truncate: float = 4.0) -> np.ndarray:
    for axis, sigma in enumerate(np.broadcast_to(sigma, 2), 1):
        x = _gaussian_axis(x, sigma, axis, mode, truncate)
    return x


def gaussian_filter(x: np.ndarray, sigma, mode: str = "nearest",
                    truncate: float = 4.0) -> np.ndarray:
    """Separable Gaussian of (H, W) or (H, W, C), radius int(truncate sigma + .5), cast to x's dtype
    after each axis.

    sigma: a number or (rows, columns). mode: "nearest" repeats the edge, "reflect" mirrors at half
    samples.
    """
    if mode not in ("nearest", "reflect"):
        raise ValueError(f'mode must be "nearest" or "reflect", not {mode!r}')
    if not (np.min(sigma) >= 0 and truncate >= 0):
        raise ValueError(f"sigma and truncate must be >= 0, not {sigma} and {truncate}")
    out = _gaussian(x[None], sigma, mode, truncate)[0]
    return out.copy() if np.may_share_memory(out, x) else out


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
    """Normalised disk kernel, float32: 17 x 17 up to radius 8, smoothed by a small Gaussian of
    sigma alias_blur."""
    reach, taps = (8, 1) if radius <= 8 else (int(radius), 2)
    line = np.arange(-reach, reach + 1)
    kernel = (line**2 + line[:, None] ** 2 <= radius**2).astype(np.float32)
    kernel /= kernel.sum()
    weights = np.exp(-np.arange(taps + 1) ** 2 / (2 * alias_blur**2))
    weights = (weights / (2 * weights.sum() - 1)).astype(np.float32)
    n = len(line)
    index = _reflect101(np.arange(-taps, n + taps), n)
    # OpenCV's order, each product added in one rounding. Whether the kernel adds up to just more or
    # just less than 1 is a grey level in every flat area of an image: the last cast truncates.
    for order in ((1, 0) if taps == 1 else (0, 1, 2), range(taps + 1)):  # rows, then columns
        padded, total = kernel.T[index], np.float32(0)
        for k in order:
            pair = padded[taps - k:][:n] + (padded[taps + k:][:n] if k else 0)
            total = (pair.astype(np.float64) * weights[k] + total).astype(np.float32)
        kernel = total
    return kernel


@lru_cache(maxsize=16)
def _disk_spectrum(radius: float, alias_blur: float, shape: tuple[int, int]) -> np.ndarray:
    kernel = disk(radius, alias_blur).astype(np.float64)
    centred = np.roll(np.pad(kernel, [(0, n - len(kernel)) for n in shape]),
                      [-(len(kernel) // 2)] * 2, (0, 1))
    return np.fft.rfft2(centred).real.copy()  # an even kernel: the imaginary part is 0


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


def _defocus(x: np.ndarray, radius: float, alias_blur: float) -> np.ndarray:
    """Correlation of (N, H, W) uint8 with the disk, 0..255; borders mirrored without the edge."""
    reach, (height, width) = 8 if radius <= 8 else int(radius), x.shape[1:]
    shape = _fast_length(height + 2 * reach), _fast_length(width + 2 * reach)
    for axis, padded, size in zip((1, 2), shape, (height, width)):
        x = x.take(_reflect101(np.arange(-reach, padded - reach), size), axis)
    spectrum = np.fft.rfft(x)
    np.fft.fft(spectrum, axis=1, out=spectrum)
    spectrum *= _disk_spectrum(radius, alias_blur, shape)
    np.fft.ifft(spectrum, axis=1, out=spectrum)
    rows, columns = (slice(reach, reach + size) for size in (height, width))
    return np.fft.irfft(spectrum[:, rows], shape[1])[:, :, columns]


def _zoom_taps(n: int, zoom: float, trim: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per output position of an axis: lower and upper source index, weight of the upper one."""
    crop = int(np.ceil(n / zoom))
    size = round(crop * zoom)
    first, count = ((size - n) // 2, n) if trim else (0, size)
    source = np.arange(first, first + count) * ((crop - 1) / max(size - 1, 1))
    low = np.minimum(source.astype(np.int64), max(crop - 2, 0))
    start = (n - crop) // 2
    return start + low, start + np.minimum(low + 1, crop - 1), source - low


def _clipped_zoom(x: np.ndarray, zoom: float, trim: bool) -> np.ndarray:
    """The middle of (N, H, W, C) enlarged; linear, corners aligned, float64, cast to x's dtype.

    At a few sizes (100 x 150, not 32, 64 or 224) scipy's last coordinate rounds past the edge and
    its last line is black; here it never is."""
    low, high, f = _zoom_taps(x.shape[1], zoom, trim)
    f = f[:, None, None]
    rows = x.take(low, 1) * (1 - f)
    rows += x.take(high, 1) * f
    low, high, f = _zoom_taps(x.shape[2], zoom, trim)
    f = np.repeat(f, x.shape[3])                      # in memory one row: long inner loops
    left, right = (rows.take(side, 2).reshape(*rows.shape[:2], len(f)) for side in (low, high))
    left *= 1 - f
    right *= f
    left += right
    return left.reshape(*rows.shape[:2], len(low), -1).astype(x.dtype, copy=False)


def clipped_zoom(x: np.ndarray, zoom: float, variant: str = "imagenet") -> np.ndarray:
    """The middle 1/zoom of (H, W) or (H, W, C) enlarged back to H x W ("imagenet", "cifar"), or to
    at least that ("bethge"); zoom >= 1."""
    check_variant(variant)
    if not 1 <= zoom < math.inf:
        raise ValueError(f"zoom must be >= 1, not {zoom}")
    out = _clipped_zoom(x.reshape(1, *x.shape[:2], -1), zoom, variant != "bethge")[0]
    return out.reshape(*out.shape[:2], *x.shape[2:])


def motion_blur(x: np.ndarray, radius: float, sigma: float, angle: float,
                variant: str = "imagenet") -> np.ndarray:
    """ImageMagick's one-sided motion blur of (H, W) or (H, W, C) along `angle` degrees, edges
    repeated.

    "imagenet" and "cifar": uint8 to uint8 with ImageMagick's 16-bit intermediate, bit for bit.
    "bethge": the float sums, cut off where the motion leaves the image.
    """
    check_variant(variant)
    if variant != "bethge" and x.dtype != np.uint8:
        raise TypeError(f"x must be uint8 for {variant}, not {x.dtype}")
    if not (0 <= radius < math.inf and sigma > 0 and math.isfinite(angle)):
        raise ValueError(f"radius must be >= 0, sigma > 0 and angle finite, not {radius}, {sigma} "
                         f"and {angle}")
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
    padded = x[rows].take(columns, 1).astype(np.float64, copy=False)
    # a step is one offset in the flat picture; blocks of it stay in the cache
    flat, line, channels = padded.ravel(), padded[0].size, x[0, 0].size
    offsets = (dy - min(dy.min(), 0)) * line + (dx - min(dx.min(), 0)) * channels
    taps = list(zip(weights.tolist(), offsets.tolist()))
    out = np.zeros((height, *padded.shape[1:]))
    sums, term = out.ravel()[:len(flat) - offsets.max()], np.empty(16384)
    for start in range(0, len(sums), len(term)):
        part = sums[start:start + len(term)]
        for weight, offset in taps:
            shifted = flat[start + offset:start + offset + len(part)]
            part += np.multiply(shifted, weight, out=term[:len(part)])
    out = out[:, :breadth]
    if variant == "bethge":
        return out
    out *= 257
    out += 0.5
    np.floor(out, out)
    out /= 257
    return out.astype(np.uint8)


# ---- plasma, colour, geometry --------------------------------------------------------------------

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


def plasma(size: int, decay: float,
           rng: np.random.RandomState | np.random.Generator) -> np.ndarray:
    """Diamond-square fractal (size, size) float64 in [0, 1] on a torus; size is a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"size must be a power of two, not {size}")
    return _plasma(size, decay, rng.uniform(size=size * size - 1)[None])[0]


def rgb_to_hsv(x: np.ndarray) -> np.ndarray:
    """Hexcone HSV of (..., 3) in [0, 1], hue in [0, 1); on ties blue beats green beats red."""
    x = np.asarray(x, np.float64)
    r, g, b = np.moveaxis(x, -1, 0)
    value = x.max(-1)
    delta = value - x.min(-1)
    safe = np.where(delta == 0, 1, delta)
    hue = np.where(g == value, 2 + (b - r) / safe, (g - b) / safe)
    hue = np.where(b == value, 4 + (r - g) / safe, hue) / 6 % 1
    saturation = delta / np.where(value == 0, 1, value)
    return np.stack([np.where(delta == 0, 0, hue), saturation, value], -1)


def hsv_to_rgb(x: np.ndarray) -> np.ndarray:
    """Inverse of rgb_to_hsv."""
    h, s, v = np.moveaxis(np.asarray(x, np.float64), -1, 0)
    sector = np.floor(6 * h)
    f = 6 * h - sector
    p, q, t = v * (1 - s), v * (1 - f * s), v * (1 - (1 - f) * s)
    sector = sector.astype(int) % 6
    channels = (v, q, p, p, t, v), (t, v, v, q, p, p), (p, p, t, v, v, q)
    return np.stack([np.choose(sector, channel) for channel in channels], -1)


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
    take = lambda i, j: flat.take(rows[i] + columns[j], 0)  # noqa: E731
    upper = take(0, 0) * (1 - fx) + take(0, 1) * fx
    return upper * (1 - fy) + (take(1, 0) * (1 - fx) + take(1, 1) * fx) * fy


def map_coordinates_reflect(x: np.ndarray, cy: np.ndarray, cx: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) sampled bilinearly at rows cy and columns cx, borders mirrored at half
    samples."""
    image = x[None] if x.ndim == 3 else x[None, ..., None]
    shape = cy.shape + x.shape[2:]
    cy, cx = (np.asarray(c, np.float64).reshape(1, 1, -1) for c in (cy, cx))
    return _bilinear(image, cy, cx, _reflect).reshape(shape).astype(x.dtype)


def solve_affine(src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """(2, 3) float64 matrix that maps the three (x, y) points src to dst (leading batch dimensions
    allowed)."""
    src, dst = np.asarray(src, np.float64), np.asarray(dst, np.float64)
    system = np.concatenate([src, np.ones_like(src[..., :1])], -1)
    return np.swapaxes(np.linalg.solve(system, dst), -1, -2)


def _warp_affine(x: np.ndarray, M: np.ndarray, quantize: bool = True) -> np.ndarray:
    full = np.concatenate([M, np.broadcast_to([[[0.0, 0.0, 1.0]]], (len(M), 1, 3))], 1)
    inverse = np.linalg.inv(full)[:, :2, :, None, None]
    rows, columns = np.arange(x.shape[1])[:, None], np.arange(x.shape[2])
    at = []
    for a, b, c in np.swapaxes(inverse, 0, 1).swapaxes(1, 2):
        if quantize:
            by_row, by_column = (np.rint(part * 1024).astype(np.int64)
                                 for part in (b * rows + c, a * columns))
            at.append((by_row + 16 + by_column >> 5) / 32)
        else:
            at.append(a * columns + (b * rows + c))
    return _bilinear(x, at[1], at[0], _reflect101).astype(x.dtype)


def warp_affine(x: np.ndarray, M: np.ndarray, quantize: bool = True) -> np.ndarray:
    """(H, W) or (H, W, C) moved by the 2 x 3 matrix M (output (x, y) = M source), bilinear,
    mirrored borders.

    quantize: source coordinates in 1/32 pixel, as OpenCV 3 and 4 (the published data) have them.
    """
    return _warp_affine(x[None], np.asarray(M, np.float64)[None], quantize).reshape(x.shape)


# ---- edges, distance, histogram ------------------------------------------------------------------

def _canny(x: np.ndarray, low: int, high: int) -> np.ndarray:
    p = np.pad(x.astype(np.int16), ((0, 0), (2, 2), (2, 2)), "edge")
    smooth_y = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    smooth_x = p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]
    gx, gy = smooth_y[:, :, 2:] - smooth_y[:, :, :-2], smooth_x[:, 2:] - smooth_x[:, :-2]
    magnitude = np.abs(gx) + np.abs(gy)                     # one pixel more on each side, of 0
    magnitude[:, (0, -1)] = magnitude[:, :, (0, -1)] = 0
    at, line = np.flatnonzero(magnitude > low), magnitude.shape[2]
    here, gx, gy = (values.take(at).astype(np.int32) for values in (magnitude, gx, gy))
    tangent, ay = np.abs(gx) * 13573, np.abs(gy) << 15      # tan(22.5 degrees) in fixed point
    horizontal, vertical = ay < tangent, ay > tangent + (np.abs(gx) << 16)
    step = np.where(horizontal, 1, np.where(vertical, line, line + np.where(gx ^ gy < 0, -1, 1)))
    peak = here > magnitude.take(at - step)
    peak &= here >= magnitude.take(at + step) + ~(horizontal | vertical)
    edges, at, strong = np.zeros(magnitude.shape, np.uint8), at[peak], here[peak] > high
    flat, weak = edges.reshape(-1), at[~strong]
    flat[at[strong]] = 255
    around = np.array([-line - 1, -line, -line + 1, -1, 1, line - 1, line, line + 1])
    while len(weak):                                        # edges grow through weak ones
        touching = flat.take(weak[:, None] + around).any(1)
        if not touching.any():
            break
        flat[weak[touching]] = 255
        weak = weak[~touching]
    return edges[:, 1:-1, 1:-1]


def canny(u8: np.ndarray, low: int = 50, high: int = 150) -> np.ndarray:
    """Canny edges (255) of (H, W) uint8: Sobel 3 x 3, L1 magnitude, hysteresis, as OpenCV."""
    return _canny(_plane(u8), low, high)[0]


@lru_cache(maxsize=4)
def _chamfer(reach: int) -> np.ndarray:
    """(reach + 1, reach + 1) float32: lengths of the shortest ways of unit, diagonal (1.4) and
    knight's (2.1969) steps, summed step by step; 8191 in the last column."""
    steps = (0, 1, 1), (1, 0, 1), (1, 1, 1.4), (1, 2, 2.1969), (2, 1, 2.1969)
    length, before = np.full((reach + 1, reach + 1), 8191, np.float32), None
    length[0, 0] = 0
    while not np.array_equal(length, before):
        before = length.copy()
        for dy, dx, cost in steps:
            longer = before[:reach + 1 - dy, :reach + 1 - dx] + np.float32(cost)
            np.minimum(length[dy:, dx:], longer, out=length[dy:, dx:])
    length[:, -1] = 8191
    return length


def _distance_5x5(x: np.ndarray, reach: int) -> np.ndarray:
    """Exact below `reach`. In each row only the nearest 0 to the left and right can be nearest."""
    columns, far = np.arange(x.shape[2], dtype=np.int32), np.int32(2 * x.shape[2] + reach)
    left = np.maximum.accumulate(np.where(x == 0, columns, -far), 2)
    right = np.minimum.accumulate(np.where(x == 0, columns, far)[:, :, ::-1], 2)[:, :, ::-1]
    gap = np.minimum(columns - left, right - columns).clip(max=reach).astype(np.intp)
    lengths = _chamfer(reach)
    d = lengths[0].take(gap)
    for k in range(1, x.shape[1]):
        if k >= min(reach, d.max()):
            break
        rows = lengths[k].take(gap)
        np.minimum(d[:, k:], rows[:, :-k], out=d[:, k:])
        np.minimum(d[:, :-k], rows[:, k:], out=d[:, :-k])
    return d


def distance_5x5(u8: np.ndarray) -> np.ndarray:
    """Chamfer distance (H, W) float32 to the nearest 0 with steps 1, 1.4 and 2.1969; 8191 where
    there is none."""
    return _distance_5x5(_plane(u8), max(u8.shape))[0]


def _equalize(x: np.ndarray) -> np.ndarray:
    n, pixels = len(x), x[0].size
    level = x.reshape(n, -1) + 256 * np.arange(n)[:, None]
    histogram = np.bincount(level.ravel(), minlength=256 * n).reshape(n, 256)
    first = (histogram > 0).argmax(1)
    at_first = histogram[np.arange(n), first]
    histogram[np.arange(n), first] = 0
    single = at_first == pixels
    scale = np.float32(255) / np.maximum(pixels - at_first, 1).astype(np.float32)
    lut = np.rint(histogram.cumsum(1).astype(np.float32) * scale[:, None])
    lut = lut.clip(0, 255).astype(np.uint8)
    lut[single] = np.arange(256)
    return lut.take(level).reshape(x.shape)


def equalize(u8: np.ndarray) -> np.ndarray:
    """Histogram equalisation of (H, W) uint8 as OpenCV has it; a constant image stays."""
    return _equalize(_plane(u8))[0]


def _resize(image: np.ndarray, height: int, width: int, cubic: bool) -> np.ndarray:
    """OpenCV's bilinear or bicubic (a = -.75) resize of uint8: aliased, edges repeated."""
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
        out = sum(out.take(indices[k], axis) * weight.reshape(shape)
                  for k, weight in weights.items())
    return np.rint(out).clip(0, 255).astype(np.uint8)


# ---- frost ---------------------------------------------------------------------------------------

def prepare_frost(texture: np.ndarray, variant: str, height: int, width: int) -> np.ndarray:
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
    """Five uint8 (512, 512, 3) textures in place of the photographs: ridges of ice over fine
    crystals, bluish white."""
    textures = []
    for seed in range(5):
        rng = np.random.RandomState(seed)
        ridges = (1 - np.abs(2 * plasma(512, 1.7, rng) - 1)) ** 3
        crystals = (plasma(512, 1.3, rng) - 0.5).clip(0) * 1.2
        ice = 0.15 + 0.7 * ridges + crystals
        ice = (ice * (0.42 / ice.mean())).clip(0, 1)[..., None]
        textures.append((ice ** np.array([1.1, 1.0, 0.9]) * 255).astype(np.uint8))
    return tuple(textures)
