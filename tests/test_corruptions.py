"""The corruptions against the published codes, their building blocks against scikit-image, OpenCV and ImageMagick."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools import corruptions as C

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "regularization"


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def picture(seed=0, height=48, width=48):
    rng = np.random.RandomState(seed)
    smooth = C.gaussian_filter(rng.rand(height, width, 3), 3.0)
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * 280 - 10   # some pixels saturate
    return smooth.clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- parity

@pytest.mark.parametrize("variant", C.VARIANTS)
@pytest.mark.parametrize("name", C.CORRUPTIONS)
def test_corruptions_equal_the_published_ones(name, variant):
    data = golden(f"corruptions_{variant}")
    texture = np.ascontiguousarray(data["frost_texture"][..., ::-1])
    for severity in range(1, 6):
        seed = int(data[f"seed_{name}"][severity - 1])
        out = C.corrupt(data["image"], name, severity, variant, rng=seed, textures=[texture])
        difference = np.abs(out.astype(int) - data[f"{name}_s{severity}"])
        if name == "jpeg_compression":                        # depends on the libjpeg that Pillow was built with
            assert difference.mean() <= 1
            continue
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.005, (severity, difference.max(), (difference > 0).mean())
