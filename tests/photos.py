"""Digits as a phone would take them: `python tests/photos.py FOLDER` writes 3.jpg, 5.jpg, 7.jpg.

Nobody's handwriting: the pen's paths are numbers. The tests photograph dataset digits the same way.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

STROKES = {  # a pen's paths, x and y from 0 to 1
    3: [[(0.28, 0.2), (0.45, 0.1), (0.66, 0.16), (0.68, 0.32), (0.45, 0.46), (0.68, 0.56),
         (0.74, 0.74), (0.56, 0.89), (0.25, 0.82)]],
    5: [[(0.72, 0.12), (0.37, 0.13), (0.32, 0.45), (0.56, 0.42), (0.72, 0.58), (0.66, 0.82),
         (0.46, 0.9), (0.26, 0.82)]],
    7: [[(0.26, 0.14), (0.72, 0.12), (0.5, 0.5), (0.4, 0.9)], [(0.36, 0.52), (0.62, 0.49)]],
}  # fmt: skip


def written(digit: int, pen: int = 9) -> Image.Image:
    """Ink (L, 280 x 280, white on black) of a digit drawn with a pen that is `pen` pixels wide."""
    ink = Image.new("L", (280, 280))
    for stroke in STROKES[digit]:
        x, y = np.array(stroke).T * 280
        corners, fine = np.arange(len(x)), np.linspace(0, len(x) - 1, 200)
        path = np.stack([np.interp(fine, corners, x), np.interp(fine, corners, y)], 1)
        for axis in (0, 1):  # a hand rounds its corners
            path[10:-10, axis] = np.convolve(path[:, axis], np.ones(21) / 21, mode="valid")
        draw = ImageDraw.Draw(ink)
        for px, py in path:
            draw.ellipse((px - pen / 2, py - pen / 2, px + pen / 2, py + pen / 2), fill=255)
    return ink


def photograph(
    ink: Image.Image, rng: np.random.Generator, size: tuple[int, int] = (640, 480)
) -> Image.Image:
    """Dark ink on unevenly lit paper: enlarged, rotated a little, off-centre, with noise."""
    width, height = size
    side = int(rng.integers(180, 400))
    turn = float(rng.uniform(-10, 10))
    big = ink.resize((side, side), Image.Resampling.BICUBIC)
    page = Image.new("L", size)
    place = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
    page.paste(big.rotate(turn, Image.Resampling.BICUBIC), place)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    slope_x, slope_y = rng.uniform(-40, 40, 2)
    light = 200 + slope_x * x + slope_y * y - 15 * (x * x + y * y)
    shot = light * (1 - 0.75 * np.asarray(page) / 255) + rng.normal(0, 4, (height, width))
    return Image.fromarray(shot.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for digit in STROKES:
        photograph(written(digit), np.random.default_rng(digit)).save(folder / f"{digit}.jpg")
        print(folder / f"{digit}.jpg")
