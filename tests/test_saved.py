"""Parts 1 and 2: trained nets that are kept, and pictures of digits that part 1 reads."""

import contextlib
import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WITH_DATA, small_config
from forked import Forked
from photos import STROKES, photograph, written
from PIL import Image
from sklearn.datasets import load_digits
from test_faults import SHARED, WHOLE, assert_one_line, lay_out, old_figure, run_with_toy

import part1_mlp_mnist as part1


@pytest.fixture(params=WITH_DATA)
def images_part(request, monkeypatch, tmp_path):
    """Part 1 and part 2 as modules, without mirrors, in an empty folder."""
    module = importlib.import_module(request.param)
    monkeypatch.setattr(module, "MIRRORS", [])
    monkeypatch.chdir(tmp_path)
    return module


# ---------------------------------------- saved nets ------------------------------------------ #


def test_a_loaded_net_scores_as_it_did_and_draws_all_but_the_curves(images_part, tmp_path):
    folder, splits = tmp_path / "nets", []
    first = images_part.main(small_config(images_part, save=folder / "net.pt", seed=3))
    drawn = {path.name for path in (tmp_path / "images/offline").iterdir()}
    assert [path.name for path in folder.iterdir()] == ["offline-net.pt"]  # no real net's name
    load_data, file = images_part.load_data, folder / "offline-net.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_part, "load_data", lambda *a: splits.append(a[1]) or load_data(*a))
        config = small_config(images_part, load=file, images_dir=tmp_path / "again")  # seed 0
        again = images_part.main(config)
    assert splits == [3]  # or images that it was trained on would validate it
    for key in ("dataset", "accuracy", "precision", "recall", "f1", "parameters"):
        assert again[key] == first[key]
    assert (again["confusion_matrix"] == first["confusion_matrix"]).all()
    assert (again["epochs_run"], again["train_seconds"]) == (0, 0)
    left = {path.name for path in (tmp_path / "again/offline").iterdir()}
    assert drawn - left == {f"{images_part.__name__[:5]}_training_curves.png"}

    saved = torch.load(file, weights_only=True)
    data = images_part.load_data(tmp_path, 3, torch.device("cpu"))
    assert (saved["mean"], saved["std"]) == (data.mean, data.std)
    assert saved["val_accuracy"] == first["val_accuracy"] and saved["seed"] == 3
    assert saved["class_names"] == data.class_names and saved["dataset"] == data.name
    assert saved["note"] == ""


def test_an_interrupted_net_stays_marked(images_part, monkeypatch, tmp_path, capsys):
    train = images_part.train

    def interrupted(*arguments):
        train(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(images_part, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        images_part.main(small_config(images_part, save=tmp_path / "net.pt"), draw=False)
    capsys.readouterr()
    images_part.main(small_config(images_part, load=tmp_path / "offline-net.pt"), draw=False)
    assert "test set, interrupted after epoch 2" in capsys.readouterr().out


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self):
        return open, ("trapped", "w")


def test_a_file_that_will_not_do_is_refused_and_nothing_is_drawn(images_part, tmp_path):
    good, bad = tmp_path / "offline-good.pt", tmp_path / "bad.pt"
    images_part.main(small_config(images_part, save=tmp_path / "good.pt"), draw=False)
    content = good.read_bytes()
    name = next(name for name in WITH_DATA if name != images_part.__name__)
    other = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other, "MIRRORS", [])
        other.main(small_config(other, save=tmp_path / "other.pt"), draw=False)
    middle = content.find(torch.load(good)["weights"].popitem()[1].numpy().tobytes())
    contents = {
        "is no net that was saved here": [
            b"", b"text", content[:-100], content[:500],
            content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],  # one bit
        ],
        "is a net of": [(tmp_path / "offline-other.pt").read_bytes()],
    }  # fmt: skip
    torch.save({"weights": Trap(), "net": ""}, bad)
    contents["is no net that was saved here"].append(bad.read_bytes())
    whole = torch.load(good)
    for strange in (torch.zeros(3), whole | {"weights": []}, whole | {"weights": {}}, {"net": 1}):
        torch.save(strange, bad)
        contents["is no net that was saved here"].append(bad.read_bytes())
    for told, cases in contents.items():
        for case in cases:
            bad.write_bytes(case)
            with pytest.raises(images_part.UserError, match=f"bad.pt {told}"):
                images_part.main(small_config(images_part, load=bad, images_dir=tmp_path / "no"))
    settings = [{"hidden": (9,)}] if images_part is part1 else [{"hidden_size": 9}, {"context": 1}]
    for setting in settings:
        with pytest.raises(images_part.UserError, match=r"good.pt is a net of .*, the settings"):
            images_part.main(small_config(images_part, load=good, **setting))
    with pytest.raises(images_part.UserError, match=r"missing.pt"):
        images_part.main(small_config(images_part, load=tmp_path / "missing.pt"))
    assert not (tmp_path / "no" / "offline").exists() and not (tmp_path / "trapped").exists()


def test_save_and_load_by_flags(tmp_path):
    """A net of the bundled digits is none of the dataset; what cannot be written is told first."""
    script = "part2_rnn_fashion"
    status, _, err = run_with_toy(script, tmp_path, [], "--save", "net.pt")
    assert status == 0, err
    path, old = old_figure(tmp_path, script)
    lay_out(script, tmp_path)
    status, out, err = run_with_toy(script, tmp_path, [], "--load", "offline-net.pt")
    assert status == 1 and out == ""
    assert_one_line(err, "net.pt was trained on sklearn-digits, but here is FashionMNIST")
    assert path.read_bytes() == old
    (tmp_path / "closed").mkdir(mode=0o000)
    places = {"images": "is a folder", "/proc/no/net.pt": "cannot write /proc/no"}
    places |= {f"{'x' * 252}.pt": "cannot write"}
    for flag, told in places.items():
        status, out, err = run_with_toy(script, tmp_path, [], "--save", flag)
        assert status == 1 and out == ""
        assert_one_line(err, told)
    status, out, err = run_with_toy(script, tmp_path, [], "--save", "net.pt")
    assert status == 0 and WHOLE in out, err
    status, again, err = run_with_toy(script, tmp_path, [], "--load", "net.pt")
    assert status == 0 and out.split("test set")[1] == again.split("test set")[1], err
    for flags in (["--save", "x.pt"], ["--seeds", "2"]):
        status, _, err = run_with_toy(script, tmp_path, [], "--load", "net.pt", *flags)
        assert status == 2 and "load trains nothing" in err


# ------------------------------------------ pictures ------------------------------------------ #


def looks(picture):
    """Height, width, and centre of mass of a (28, 28) picture's ink."""
    seen = picture > 40
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    weight = picture.double()
    at = torch.arange(28.0, dtype=torch.float64)
    centre = (weight.sum(1) @ at / weight.sum(), weight.sum(0) @ at / weight.sum())
    return (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1, *centre)


@pytest.mark.parametrize("digit", STROKES)
def test_a_photo_becomes_a_picture_like_mnists(digit, tmp_path):
    """Light on dark, 20 pixels at most, the centre of mass in the middle, lines of 2 to 3."""
    path = tmp_path / "photo.jpg"
    photograph(written(digit), np.random.default_rng(digit)).save(path)
    picture = part1.prepare_photo(path)
    assert picture.shape == (28, 28) and picture.dtype == torch.uint8 and picture.max() == 255
    height, width, row, column = looks(picture)
    assert 19 <= height <= 20 and width <= 20
    assert abs(row - 14) <= 0.5 and abs(column - 14) <= 0.5
    edges = picture.double().diff(dim=0).abs().sum() + picture.double().diff(dim=1).abs().sum()
    assert 1.8 < 2.5 * picture.sum() / edges < 3.2
    assert (picture > 250).sum() > 0.3 * (picture > 40).sum()  # most of a line is all white


def test_a_shape_whose_centre_of_mass_is_near_its_rim_still_fits(tmp_path):
    page = np.full((60, 60), 255, dtype=np.uint8)
    page[10:50, 10:13] = page[46:50, 10:50] = page[40:50, 10:25] = 0  # an L with a heavy corner
    Image.fromarray(page).save(tmp_path / "l.png")
    height, width, _, _ = looks(part1.prepare_photo(tmp_path / "l.png"))
    assert height == width == 20


def likeness(one, other):
    return np.corrcoef(one.numpy().ravel(), other.numpy().ravel())[0, 1]


def test_every_kind_of_file_gives_the_same_picture(tmp_path):
    ink = np.asarray(written(5, pen=26).resize((56, 56)))
    dark = Image.fromarray(255 - ink)
    see_through = Image.merge("LA", (Image.new("L", dark.size), Image.fromarray(ink)))
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees to the right to see it upright"
    page = Image.new("L", (4000, 3000), 180)  # 12 megapixels, the digit small and in a corner
    page.paste(Image.fromarray((180 - 0.6 * ink).astype(np.uint8)).resize((900, 900)), (3050, 2080))
    clear = Image.merge("LA", (Image.new("L", dark.size, 255), Image.fromarray(ink)))
    deep = Image.fromarray((4000 - 15 * ink.astype(np.int32)).astype(np.int32))
    files = {
        "clear.png": clear, "deep.tif": deep, "float.tif": Image.fromarray(np.float32(ink) / 255),
        "dark.png": dark, "light.png": Image.fromarray(ink), "see_through.png": see_through,
        "palette.gif": dark.convert("P"), "bits.png": dark.convert("1"),
        "cmyk.jpg": dark.convert("RGB").convert("CMYK"), "colour.jpg": dark.convert("RGB"),
        "16.png": Image.fromarray((65535 - 257 * ink.astype(np.int32)).astype(np.uint16)),
        "phone.jpg": page, "grey.png": Image.fromarray((140 - 0.2 * ink).astype(np.uint8)),
    }  # fmt: skip
    for name, image in files.items():
        image.save(tmp_path / name)
    dark.rotate(90, expand=True).save(tmp_path / "exif.jpg", exif=turned)
    expected = part1.prepare_photo(tmp_path / "dark.png")
    for name in [*files, "exif.jpg"]:
        assert likeness(part1.prepare_photo(tmp_path / name), expected) > 0.93, name


def test_most_pictures_of_8_x_8_pixels_can_be_read(tmp_path):
    """No more than 8 x 8 is not much to tell a digit from noise by; scikit-learn's are as small."""
    read = 0
    for small in load_digits().images[:100]:
        Image.fromarray((255 - 15 * small).astype(np.uint8)).save(tmp_path / "8.png")
        with contextlib.suppress(part1.UserError):
            read += part1.prepare_photo(tmp_path / "8.png").shape == (28, 28)
    assert read >= 85


def test_where_there_is_no_digit_none_is_guessed(tmp_path):
    rng = np.random.default_rng(0)
    pages = {"white.png": np.full((48, 64), 255), "black.png": np.zeros((48, 64))}
    shade = 160 + 60 * np.linspace(-1, 1, 300)[:, None] * np.ones(400)
    pages["shade.jpg"] = shade + rng.normal(0, 5, shade.shape)  # empty paper in uneven light
    for side in (8, 28, 500):
        pages[f"noise{side}.png"] = rng.integers(0, 256, (side, side))
        pages[f"grain{side}.jpg"] = 200 + rng.normal(0, 20, (side, side))
        pages[f"specks{side}.png"] = 255 * (rng.random((side, side)) < 0.03)
        pages[f"coins{side}.png"] = 255 * (rng.random((side, side)) < 0.5)
    blotches = Image.fromarray(rng.integers(0, 256, (9, 12)).astype(np.uint8)).resize((120, 90))
    pages["blotches.png"] = 200 + np.asarray(blotches.convert("L")) / 20  # smooth, but faint
    for name, page in pages.items():
        Image.fromarray(page.clip(0, 255).astype(np.uint8)).save(tmp_path / name)
        with pytest.raises(part1.UserError, match=f"{name}: no digit is to be seen"):
            part1.prepare_photo(tmp_path / name)


def test_what_is_no_picture_is_told(tmp_path):
    (tmp_path / "text.png").write_text("I am no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("L", (200, 200), 128).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    (tmp_path / "folder").mkdir()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # 400 megapixels in 50 kB
    damaged = (
        b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    )  # turned, and
    damaged += b"\x01\x1a\0\x02\0\0\0\x0372\0\0" + bytes(4)  # a text where a number should be
    Image.new("L", (50, 50)).save(tmp_path / "exif.jpg", exif=damaged)
    for name in (
        "exif.jpg",
        "text.png",
        "empty.jpg",
        "half.png",
        "folder",
        "bomb.png",
        "missing.jpg",
    ):
        with pytest.raises(part1.UserError, match=f"cannot read .*{name} as a picture"):
            part1.prepare_photo(tmp_path / name)


def test_predict_by_flags(monkeypatch, tmp_path):
    """The commands of the page, with the bundled digits; every problem is one line."""
    flags = ["--hidden", "64", "--epochs", "20", "--batch-size", "64"]
    saved = Forked(SHARED, tmp_path, *flags, "--save", "mlp.pt", changes={"MIRRORS": []}).end()
    assert saved[0] == 0, saved[2]
    photograph(written(7), np.random.default_rng(7)).save(tmp_path / "seven.jpg")
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    load = ["--hidden", "64", "--load", "offline-mlp.pt", "--predict"]
    status, out, err = Forked(SHARED, tmp_path, *load, "seven.jpg", "seven.jpg").end()
    assert status == 0 and err == "", err
    lines = out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith("seven.jpg: ")
    assert (tmp_path / "images/offline/part1_prediction.png").stat().st_size < 300_000
    (tmp_path / "images/offline/part1_prediction.png").unlink()
    for name, told in (
        ("empty.png", "no digit"),
        ("offline-mlp.pt", "as a picture"),
        ("no", "cannot"),
    ):
        status, out, err = Forked(SHARED, tmp_path, *load, "seven.jpg", name).end()
        assert status == 1 and out == ""
        assert_one_line(err, name, told)
    assert not list((tmp_path / "images").rglob("*prediction.png"))
    status, _, err = Forked(SHARED, tmp_path, "--predict", "seven.jpg").end()
    assert status == 2 and "predict needs a trained net" in err

    monkeypatch.chdir(tmp_path)
    names = ("seven.jpg", "seven.jpg")
    config = part1.Config(
        hidden=(64,), load="offline-mlp.pt", predict=tuple(map(part1.Path, names))
    )
    found = part1.main(config)
    assert set(found) == {"predictions", "probabilities"}
    assert found["probabilities"].shape == (2, 10)
    assert np.allclose(found["probabilities"].sum(1), 1, atol=1e-5)
    assert found["predictions"] == found["probabilities"].argmax(1).tolist()
    assert lines[0].startswith(f"seven.jpg: {found['predictions'][0]} ")


def prepared(images, folder, rng=None):
    """What `prepare_photo` makes of digits (N, 28, 28), as files or photographed."""
    pictures = []
    for image in images:
        page = Image.fromarray(image.numpy())
        path = folder / ("photo.jpg" if rng else "digit.png")
        (photograph(page, rng) if rng else page).save(path)
        pictures.append(part1.prepare_photo(path))
    return torch.stack(pictures)


def test_photos_of_bundled_digits_are_read_as_the_digits_are(monkeypatch, tmp_path):
    """A net trained on prepared digits answers for their photos as for the digits themselves."""
    torch.manual_seed(0)
    monkeypatch.setattr(part1, "MIRRORS", [])
    _, names, images, labels, test_images, _ = part1.read_dataset(tmp_path)
    images, test_images = (F.pad(x, (6, 6, 6, 6)) for x in (images, test_images))  # a margin
    images = prepared(images[:800], tmp_path)
    test_images, photos = (
        prepared(test_images[:100], tmp_path, rng) for rng in (None, np.random.default_rng(0))
    )
    mean, std = images.float().mean(), images.float().std()
    splits = [(x - mean) / std for x in (images, images[:100], images[:100])]
    rows = [x for split in splits for x in (split, labels[: len(split)])]
    data, model = part1.Data("digits", names, mean, std, *rows), part1.MLP((256,))
    part1.train(model, data, part1.Config(epochs=25, batch_size=32, augment=0.5), [])
    answers = [part1.predict(model, (x - mean) / std).argmax(1) for x in (test_images, photos)]
    assert (answers[0] == answers[1]).float().mean() >= 0.9


# ------------------------------------- with the real MNIST ------------------------------------ #


def test_gate_photos_of_mnist_are_read_as_mnist_is(data_dir, tmp_path):
    """97 % of 500 photographed test digits get the original's answer; preparation costs < 0.5."""
    file, paths = tmp_path / "mlp.pt", {"data_dir": data_dir, "images_dir": tmp_path}
    results = part1.main(part1.Config(save=file, **paths), draw=False)
    saved, model = torch.load(file, weights_only=True), part1.MLP((512, 512))
    model.load_state_dict(saved["weights"])
    _, _, _, _, images, labels = part1.read_dataset(data_dir)

    def answers(pictures):
        return part1.predict(model, (pictures - saved["mean"]) / saved["std"]).argmax(1)

    as_they_are = answers(images)
    assert (as_they_are == labels).float().mean().item() == pytest.approx(results["accuracy"])
    photos = prepared(images[:500], tmp_path, np.random.default_rng(0))
    agreement = (answers(photos) == as_they_are[:500]).float().mean().item()
    right = (answers(prepared(images, tmp_path)) == labels).float().mean().item()
    print(f"photos: {agreement:.2%} agree; {results['accuracy']:.2%} before, {right:.2%} prepared")
    assert agreement >= 0.97 and right > results["accuracy"] - 0.005
