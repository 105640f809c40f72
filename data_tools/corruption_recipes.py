"""The recipes of the 19 common corruptions: their parameters, and a function per corruption for a
batch (N, H, W, 3) uint8 and one generator per image. Draws are taken image by image in the
published order, the arithmetic is done for the batch. `data_tools.corruptions` is the interface.

Whatever the published codes do is kept; among it: glass blur copies pixels where a swap was meant,
impulse noise acts on each channel, the sixth frost photograph is never used.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.corruption_filters import (
    _bilinear, _box_sum, _canny, _clipped_zoom, _defocus, _distance_5x5, _equalize, _gaussian,
    _grey, _plasma, _reflect, _reflect101, _warp_affine, hsv_to_rgb, motion_blur, prepare_frost,
    procedural_frost, rgb_to_hsv, solve_affine,
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
             ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9),
              (.15, .3, 1.75, .55, 10, 4, .9), (.25, .3, 2.25, .6, 12, 6, .85),
              (.3, .3, 1.25, .65, 14, 12, .8))),
    # mean, deviation, sigma, threshold, strength (water) or sigma (mud), mud
    "spatter": (((.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0),
                 (.65, .3, 1, .65, 1.5, 1), (.67, .4, 1, .65, 1.5, 1)),
                ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
                 (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1))),
    "contrast": ((.4, .3, .2, .1, .05), (.75, .5, .4, .3, .15)),
    "brightness": ((.1, .2, .3, .4, .5), (.05, .1, .15, .2, .3)),
    # factor, offset
    "saturate": (((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)),
                 ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2))),
    "jpeg_compression": ((25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "pixelate": ((.6, .5, .4, .3, .25), (.95, .9, .85, .75, .65)),
    # strength, sigma, largest affine shift of a corner
    "elastic_transform": (
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
         (29.28, 2.44, 4.88)),
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, .96, .96))),
}
BETHGE_ELASTIC = (12.5, 16.25, 21.25, 25.0, 30.0)


# ---- recipes: (N, H, W, 3) uint8 -> float in 0..255 ----------------------------------------------

def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    return images[0][None] if len(images) == 1 else np.stack(images)


def _draws(rngs: Sequence, draw: Callable) -> np.ndarray:
    return _stack([draw(rng) for rng in rngs])


def _strips(images: np.ndarray, rngs: Sequence) -> Iterator[tuple]:
    """16 rows of an image at a time, with its generator: no array of draws leaves the cache."""
    for image, rng in zip(images, rngs):
        yield from ((image[start:start + 16], rng) for start in range(0, len(image), 16))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / 255.0


def _scaled(x: np.ndarray) -> np.ndarray:
    """0..255 from [0, 1], clipped; overwrites x."""
    np.clip(x, 0, 1, out=x)
    x *= 255
    return x


def _gaussian_noise(x, c, rngs, variant, severity, textures):
    x = _unit(x)
    for rows, rng in _strips(x, rngs):
        rows += rng.normal(size=rows.shape, scale=c)
    return _scaled(x)


def _shot_noise(x, c, rngs, variant, severity, textures):
    x = _unit(x)
    for rows, rng in _strips(x, rngs):
        np.divide(rng.poisson(rows * c), float(c), out=rows)
    return _scaled(x)


def _impulse_noise(x, c, rngs, variant, severity, textures):
    out = x.copy()
    for image, rng in zip(out, rngs):
        flipped, salted = (rng.random(image.shape) <= share for share in (c, 0.5))
        np.copyto(image, salted.view(np.uint8) * np.uint8(255), where=flipped)
    return out


def _speckle_noise(x, c, rngs, variant, severity, textures):
    x = _unit(x)
    for rows, rng in _strips(x, rngs):
        rows += rows * rng.normal(size=rows.shape, scale=c)
    return _scaled(x)


def _gaussian_blur(x, c, rngs, variant, severity, textures):
    return _scaled(_gaussian(_unit(x), c))


def _glass_sources(offsets: np.ndarray, height: int, width: int, reach: int) -> np.ndarray:
    """Where each pixel's value comes from (N, H * W, indices into the flat batch) after one pass of
    "pixel (h, w) takes the value of (h + dy, w + dx)" from the last pixel to the first.

    offsets: (N, K, 2) dx, dy in visiting order. A pixel that copies from one visited before gets
    that one's new value ("live"); following the pointers of live pixels, all at once, ends after a
    few rounds.
    """
    n = len(offsets)
    rows, columns = (np.arange(side - reach, reach, -1) for side in (height, width))
    visited = (rows[:, None] * width + columns).ravel()
    rank = np.full(height * width, len(visited))  # never visited: always an old value
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
    count = max(height - 2 * reach, 0) * max(width - 2 * reach, 0)
    for _ in range(iterations):
        offsets = _draws(rngs, lambda rng: rng.randint(-reach, reach, size=(count, 2)))
        pixels = pixels[_glass_sources(offsets, height, width, reach)]
    return _scaled(_gaussian(_unit(pixels.reshape(x.shape)), sigma))


def _defocus_blur(x, c, rngs, variant, severity, textures):
    out = np.empty_like(x)
    for channel in range(3):  # one plane at a time stays in the cache
        out[..., channel] = _defocus(x[..., channel], *c).clip(0, 255)
    return out


def _motion_blur(x, c, rngs, variant, severity, textures):
    out = _stack([motion_blur(image, *c, rng.uniform(-45, 45), variant)
                  for image, rng in zip(x, rngs)])
    return np.clip(out, 0, 255, out=out)


def _zoom_blur(x, c, rngs, variant, severity, textures):
    zooms, x = np.arange(1, *c), _unit(x).astype(np.float32)
    total = np.zeros_like(x)
    for zoom in zooms:  # float32 sums, as published: whole grey levels survive
        total += _clipped_zoom(x, zoom, variant != "bethge")[:, :x.shape[1], :x.shape[2]]
    return _scaled((x + total) / np.float32(len(zooms) + 1))


def _fog(x, c, rngs, variant, severity, textures):
    strength, decay = c
    height, width = x.shape[1:3]
    smallest = {"imagenet": 256, "cifar": 32, "bethge": 1}[variant]
    size = max(smallest, 1 << (max(height, width) - 1).bit_length())
    dtype = np.float32 if variant == "bethge" else np.float64
    uniforms = _draws(rngs, lambda rng: rng.random_sample(size * size - 1))
    field = _plasma(size, decay, uniforms, dtype)[:, :height, :width, None]
    x = _unit(x)
    largest = x.max((1, 2, 3), keepdims=True)
    return _scaled((x + strength * field) * largest / (largest + strength))


_PREPARED: dict[tuple, tuple] = {}


def _prepared(texture: np.ndarray, variant: str, height: int, width: int) -> np.ndarray:
    """prepare_frost, remembered for the last ten textures and sizes."""
    key = id(texture), variant, height, width
    if key not in _PREPARED:
        while len(_PREPARED) >= 10:
            _PREPARED.pop(next(iter(_PREPARED)))
        # the texture is held with it: its id stays taken
        _PREPARED[key] = texture, prepare_frost(texture, variant, height, width)
    return _PREPARED[key][1]


def _frost(x, c, rngs, variant, severity, textures):
    height, width = x.shape[1:3]
    crops = []
    for rng in rngs:
        texture = _prepared(textures[rng.randint(5) % len(textures)], variant, height, width)
        top = rng.randint(0, texture.shape[0] - height)
        left = rng.randint(0, texture.shape[1] - width)
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
        layer = [motion_blur((one * 255).astype(np.uint8), radius, sigma, angle)
                 for one, angle in zip(layer, angles)]
    layer = (np.stack(layer) / 255.0)[:, :height, :width, None]
    x = x / np.float32(255)
    weight, rest = np.float32(weight), np.float32(1 - weight)
    x = weight * x + rest * np.maximum(x, _grey(x) * np.float32(1.5) + np.float32(0.5))
    return _scaled(x + layer + layer[:, ::-1, ::-1])


def _water(layer: np.ndarray, strength: float) -> np.ndarray:
    """Refraction mask (N, H, W) float32 of a liquid layer (N, H, W)."""
    layer = (layer * 255).astype(np.uint8)
    distance = np.minimum(_distance_5x5(255 - _canny(layer, 50, 150), 21), np.float32(20))
    blurred = (_box_sum(distance.astype(np.float64)) * (1 / 9)).astype(np.float32).astype(np.uint8)
    padded = _equalize(blurred).astype(np.int16)
    for axis in (1, 2):
        n = padded.shape[axis]
        padded = padded.take(_reflect101(np.arange(-1, n + 1), n), axis)
    height, width = layer.shape[1:]
    emboss = sum(weight * padded[:, row:row + height, column:column + width]
                 for row, weights in enumerate(((-2, -1, 0), (-1, 1, 1), (0, 1, 2)))
                 for column, weight in enumerate(weights) if weight).clip(0, 255)
    smooth = np.rint(_box_sum(emboss) / 9).astype(np.float32)
    mask = layer * smooth
    largest = mask.max((1, 2), keepdims=True)
    largest[largest == 0] = 1  # no edge anywhere: nothing is added, not NaN
    return mask / largest * np.float32(strength)


def _spatter(x, c, rngs, variant, severity, textures):
    mean, deviation, sigma, threshold, strength, mud = c
    fields = _draws(rngs, lambda rng: rng.normal(size=x.shape[1:3], loc=mean, scale=deviation))
    layer = _gaussian(fields, sigma)
    x = x / np.float32(255)
    if not mud:
        color = (np.array([175, 238, 238]) / 255.0).astype(np.float32)
        water = _water(np.where(layer < threshold, 0, layer), strength)
        for channel, value in enumerate(color):
            x[..., channel] += water * value
        return _scaled(x)
    mask = _gaussian((layer > threshold).astype(np.float32), strength)[..., None]
    mask = np.where(mask < 0.8, np.float32(0), mask)
    color = np.array([63, 42, 20]) / 255.0
    color = color.astype(np.float64 if variant == "bethge" else np.float32)
    return _scaled(x * (1 - mask) + mask * color)


def _contrast(x, c, rngs, variant, severity, textures):
    x = _unit(x)
    means = x.mean((1, 2), keepdims=True)
    x -= means
    x *= c
    x += means
    return _scaled(x)


def _brightness(x, c, rngs, variant, severity, textures):
    # Through HSV in full, here and below: shorter formulas are equal up to 1e-15, but new values
    # often are whole grey levels, and the final cast truncates.
    hsv = rgb_to_hsv(_unit(x))
    hsv[..., 2] = (hsv[..., 2] + c).clip(0, 1)
    return _scaled(hsv_to_rgb(hsv))


def _saturate(x, c, rngs, variant, severity, textures):
    hsv = rgb_to_hsv(_unit(x))
    hsv[..., 1] = (hsv[..., 1] * c[0] + c[1]).clip(0, 1)  # grey has hue 0: it may turn red
    return _scaled(hsv_to_rgb(hsv))


def _jpeg_compression(x, c, rngs, variant, severity, textures):
    def recode(image: np.ndarray) -> np.ndarray:
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, "JPEG", quality=c)
            return np.array(Image.open(file, formats=("JPEG",)))
    return _stack([recode(image) for image in x])


def _pixelate(x, c, rngs, variant, severity, textures):
    height, width = x.shape[1:3]
    small = max(int(width * c), 1), max(int(height * c), 1)
    back = Image.NEAREST if variant == "bethge" else Image.BOX
    return _stack([np.array(Image.fromarray(image).resize(small, Image.BOX)
                            .resize((width, height), back)) for image in x])


def _elastic_transform(x, c, rngs, variant, severity, textures):
    height, width = x.shape[1:3]
    x = x / np.float32(255)
    if variant == "bethge":
        strength, reach = BETHGE_ELASTIC[severity - 1], height * 0.005
        sigma = np.array([height, width]) * 0.01
    else:
        strength, sigma, largest = c
        reach = 1
        centre, square = np.float32([height, width]) // 2, max(min(height, width) // 3, 1)
        corners = np.float32([centre + square, [centre[0] + square, centre[1] - square],
                              centre - square])
        shifts = _draws(rngs, lambda rng: rng.uniform(-largest, largest, size=(3, 2)))
        moved = corners + shifts.astype(np.float32)
        x = _warp_affine(x, solve_affine(np.broadcast_to(corners, moved.shape), moved))
    if strength == 0:
        return _scaled(x)
    fields = _draws(rngs, lambda rng: rng.uniform(-reach, reach, size=(2, height, width)))
    dx, dy = ((_gaussian(fields[:, k], sigma, "reflect", 3) * strength).astype(np.float32)
              for k in (0, 1))
    at_y, at_x = np.arange(height)[:, None] + dy, np.arange(width) + dx
    return _scaled(_bilinear(x, at_y, at_x, _reflect).astype(np.float32))


RECIPES = {name: globals()[f"_{name}"] for name in CORRUPTIONS}


def check_textures(textures) -> Sequence[np.ndarray]:
    """The frost textures as arrays: from a list, a folder, or (None) the procedural ones."""
    if textures is None:
        return procedural_frost()
    if isinstance(textures, (str, Path)):
        files = sorted(f for f in Path(textures).iterdir() if f.name.startswith("frost"))[:5]
        if not files:
            raise ValueError(f"textures: no file frost* in {textures}")
        return [np.asarray(Image.open(file).convert("RGB")) for file in files]
    good = [isinstance(t, np.ndarray) and t.dtype == np.uint8 and t.shape[2:] == (3,)
            for t in textures]
    if not good or not all(good):
        raise ValueError("textures must be a folder or a list of uint8 (H, W, 3) RGB arrays")
    return textures
