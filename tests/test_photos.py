"""Part 1: photos and other pictures of digits become pictures like MNIST's, or are refused."""

import numpy as np
import pytest
import torch
from photos import STROKES, photograph, written
from PIL import Image
from sklearn.datasets import load_digits

import part1_mlp_mnist as part1


def prepared(image, path, **settings):  # an Image, or grey levels (H, W)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    image.save(path, **settings)
    return part1.prepare_photo(path).numpy()


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    path = tmp_path_factory.mktemp("clean") / "clean.png"
    return {digit: prepared(written(digit, pen=26), path) for digit in STROKES}


def nearest(clean, picture):
    """The digit whose clean picture is nearest to this one."""
    return min(clean, key=lambda digit: np.linalg.norm(clean[digit] - 1.0 * picture))


@pytest.mark.parametrize("digit", STROKES)
def test_a_photo_becomes_a_picture_like_mnists(digit, clean, tmp_path):
    for seed in range(2):
        page = photograph(written(digit, pen=6 + 20 * seed), np.random.default_rng(seed))
        for shot in (np.asarray(page), 255.0 - np.asarray(page)):  # dark on light, light on dark
            seen = prepared(shot, tmp_path / "photo.jpg")
            rows, columns = np.nonzero(seen > 40)
            centre = (np.indices((28, 28)) * seen).sum((1, 2)) / seen.sum()
            assert seen.shape == (28, 28) and seen.dtype == np.uint8
            assert 18 <= np.ptp(rows) + 1 <= 20 and np.ptp(columns) <= 16  # the shape is kept
            assert abs(centre - 14).max() < 0.8
            assert nearest(clean, seen) == digit


def test_thin_and_thick_pens_give_strokes_of_two_to_three_pixels(tmp_path):
    for pen in (4, 12, 26, 50):
        seen = prepared(written(7, pen), tmp_path / "pen.png")
        stem = seen[20:24].sum(axis=1) / 255  # across the 7's stem
        assert 1.5 < stem.mean() < 3.5, pen


def surroundings(digit):
    """A photo with a strip of the table, on ruled paper, of a small digit on a large page."""
    page = np.asarray(photograph(written(digit, 16), np.random.default_rng(digit)), float)
    strip = page.copy()
    strip[:, :6] = 40
    ruled = page.copy()
    ruled[30::60] = 90
    large = np.full((1000, 1000), 210.0)
    large[600:640, 300:340] -= 0.6 * np.asarray(written(digit, 28).resize((40, 40)))
    return {"strip": strip, "ruled": ruled, "large": large}


@pytest.mark.parametrize("digit", STROKES)
def test_a_table_ruled_lines_and_a_large_page_are_left_out(digit, clean, tmp_path):
    for name, shot in surroundings(digit).items():
        assert nearest(clean, prepared(shot, tmp_path / "photo.png")) == digit, name


def test_every_kind_of_file_gives_the_same_picture(tmp_path):
    ink = written(5, pen=26).resize((56, 56))
    levels = np.asarray(ink, dtype=np.int32)
    dark = Image.fromarray((255 - levels).astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # by 90 degrees
    files = {
        "dark.png": dark,
        "light.png": ink,
        "faint.png": 140 - levels / 5,
        "palette.gif": dark.convert("P"),
        "bits.png": dark.convert("1"),
        "black.png": Image.merge("LA", (Image.new("L", ink.size, 0), ink)),  # transparent
        "white.png": Image.merge("LA", (Image.new("L", ink.size, 255), ink)),
        "cmyk.jpg": dark.convert("CMYK"),
    }
    pictures = {name: prepared(image, tmp_path / name) for name, image in files.items()}
    pictures["turned.jpg"] = prepared(dark.rotate(90), tmp_path / "turned.jpg", exif=turned)
    for name, picture in pictures.items():
        assert np.corrcoef(picture.flat, pictures["dark.png"].flat)[0, 1] > 0.9, name


def test_what_holds_no_digit_or_two_is_refused_and_small_digits_are_not(tmp_path):
    rng = np.random.default_rng(0)
    two = np.concatenate([255.0 - np.asarray(written(digit)) for digit in (3, 5)], axis=1)
    pages = {"white": np.full((48, 64), 255), "black": np.zeros((48, 64)), "two": two}
    pages["shade"] = 160 + 60 * np.linspace(-1, 1, 400) + rng.normal(0, 5, (300, 400))
    for side in (60, 200):
        pages[f"specks {side}"] = 255 * (rng.random((side, side)) < 0.03)
    for name, page in pages.items():
        with pytest.raises(part1.UserError, match=f"{name}.png: no digit is to be seen"):
            prepared(page, tmp_path / f"{name}.png")
    for small in load_digits().images[:50]:  # 8 x 8 pixels
        assert prepared(255 - 15 * small, tmp_path / "8.png").max() > 200


def test_what_is_no_picture_is_told_with_what_to_do(tmp_path):
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    for name in ("photo.heic", "missing.jpg", __file__):
        with pytest.raises(part1.UserError, match=f"cannot read .*{name} .* save it as JPEG"):
            part1.prepare_photo(tmp_path / name)


def test_a_prediction_is_printed_and_drawn_and_an_unlikely_one_is_not_sure(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(part1, "save_figure", lambda figure, path: print(path, len(figure.axes)))
    monkeypatch.chdir(tmp_path)
    photograph(written(7), np.random.default_rng(0)).save("7.jpg")
    model = part1.MLP(())
    torch.nn.init.zeros_(model.layers[0].weight)
    saved = {"hidden": (), "mean": 33.0, "std": 78.0, "dataset": "toy"}
    for bias, answer in ((9.0, "4"), (1.0, "not sure")):
        model.layers[0].bias.data = torch.eye(10)[4] * bias
        torch.save(saved | {"weights": model.state_dict()}, "net.pt")
        results = part1.main(part1.Config(predict=("7.jpg",) * 2, load="net.pt"))
        lines = capsys.readouterr().out.splitlines()
        share = results["probabilities"][0, 4]
        assert lines[1].startswith(f"7.jpg: {answer} (4 {share:.1%}, ")
        assert lines[3] == "images/offline/part1_prediction.png 6"
