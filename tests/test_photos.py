"""Part 1: photos and other pictures of digits become pictures like MNIST's, or are refused."""

import numpy as np
import pytest
from photos import STROKES, photograph, written
from PIL import Image
from sklearn.datasets import load_digits

import part1_mlp_mnist as part1


def prepared(image, path, **settings):  # an Image, or grey levels (H, W)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    image.save(path, **settings)
    return part1.prepare_photo(path).numpy()


@pytest.mark.parametrize("digit", STROKES)
def test_a_photo_becomes_a_picture_like_mnists(digit, tmp_path):
    clean = {d: prepared(written(d, pen=26), tmp_path / "clean.png") for d in STROKES}
    for seed in range(4):
        page = np.asarray(photograph(written(digit, 3 + 7 * seed), np.random.default_rng(seed)))
        for shot in (page, 255.0 - page, np.where(np.arange(640) < 99 * seed, 1, 0.7) * page):
            seen = prepared(shot, tmp_path / "photo.jpg")
            assert seen.shape == (28, 28) and seen.dtype == np.uint8
            rows, columns = np.nonzero(seen > 40)
            assert 19 <= np.ptp(rows) + 1 <= 20 and np.ptp(columns) <= 15  # the shape is kept
            assert abs((np.indices((28, 28)) * seen).sum((1, 2)) / seen.sum() - 14).max() < 0.7
            assert min(clean, key=lambda d: np.linalg.norm(clean[d] - 1.0 * seen)) == digit
            assert 0.6 < seen.mean() / clean[digit].mean() < 1.15  # thin lines are thickened


def test_every_kind_of_file_gives_the_same_picture(tmp_path):
    ink = written(5, pen=26).resize((56, 56))
    levels, page = np.asarray(ink, dtype=np.int32), np.full((3000, 4000), 180)  # 12 megapixels
    page[2080:2976, 3050:3946] -= np.kron(levels, np.ones((16, 16), int)) // 2
    dark, turned = Image.fromarray((255 - levels).astype(np.uint8)), Image.Exif()
    turned[0x0112] = 6  # by 90 degrees
    black, white = (Image.merge("LA", (Image.new("L", ink.size, v), ink)) for v in (0, 255))
    files = {
        "dark.png": dark, "light.png": ink, "faint.png": 140 - levels / 5, "corner.jpg": page,
        "palette.gif": dark.convert("P"), "bits.png": dark.convert("1"), "black.png": black,
        "white.png": white, "colour.jpg": dark.convert("RGB"), "cmyk.jpg": dark.convert("CMYK"),
        "16.png": Image.fromarray((65535 - 257 * levels).astype(np.uint16)),
        "32.tif": Image.fromarray(4000 - 15 * levels), "float.tif": Image.fromarray(levels / 255),
    }  # fmt: skip
    pictures = {name: prepared(image, tmp_path / name) for name, image in files.items()}
    pictures["turned.jpg"] = prepared(dark.rotate(90), tmp_path / "turned.jpg", exif=turned)
    assert part1.open_photo(tmp_path / "corner.jpg").size == (160, 120)
    for name, picture in pictures.items():
        assert np.corrcoef(picture.flat, pictures["dark.png"].flat)[0, 1] > 0.93, name


def test_what_holds_no_digit_is_refused_and_small_digits_are_not(tmp_path):
    rng, pages = np.random.default_rng(0), {"white": np.full((48, 64), 255)}
    pages["shade"] = 160 + 60 * np.linspace(-1, 1, 400) + rng.normal(0, 5, (300, 400))
    blotches = Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8)).resize((120, 90))
    pages |= {"black": np.zeros((48, 64)), "blotches": 200 + np.asarray(blotches) / 20}
    for side in (28, 60, 200, 500):
        pages[f"noise {side}"] = rng.integers(0, 256, (side, side))
        pages[f"grain {side}"] = 200 + rng.normal(0, 20, (side, side))
        pages[f"specks {side}"] = 255 * (rng.random((side, side)) < 0.03)
    for name, page in pages.items():
        with pytest.raises(part1.UserError, match=f"{name}.png: no digit is to be seen"):
            prepared(page, tmp_path / f"{name}.png")
    for small in load_digits().images[:100]:  # 8 x 8 pixels
        assert prepared(255 - 15 * small, tmp_path / "8.png").max() > 200


def test_what_is_no_picture_is_told(monkeypatch, tmp_path):
    damaged = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x01\x1a\0\x02"
    Image.new("L", (9, 9)).save(tmp_path / "exif.jpg", exif=damaged + b"\0\0\0\x0372" + bytes(6))
    Image.new("L", (99, 99)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 999)
    for name in ("exif.jpg", "bomb.png", "missing.jpg", __file__):
        with pytest.raises(part1.UserError, match=f"cannot read .*{name} as a picture"):
            part1.prepare_photo(tmp_path / name)


def test_predictions_are_printed_and_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(part1, "save_figure", lambda figure, path: print(path, len(figure.axes)))
    monkeypatch.chdir(tmp_path)
    photograph(written(7), np.random.default_rng(0)).save("7.jpg")
    saved = {"mean": 33, "std": 78, "class_names": "0123456789", "dataset": "toy", "note": ""}
    config = part1.Config(predict=(part1.Path("7.jpg"),) * 9, load="net.pt")
    row = part1.predict_photos(part1.MLP((8,)), saved, config)["probabilities"][0]
    lines, best = capsys.readouterr().out.splitlines(), row.argmax()
    assert len(lines) == 10 and lines[0].startswith(f"7.jpg: {best} ({best} {row[best]:.1%}, ")
    assert lines[9] == "images/offline/part1_prediction.png 24" and abs(row.sum() - 1) < 1e-5
