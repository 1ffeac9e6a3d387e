"""What several test files need: the three scripts, tiny data, and the real data where it is."""

import importlib
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # nets this small gain nothing from two, and beside a busy process lose

WITH_DATA = ["part1_mlp_mnist", "part2_rnn_fashion"]
PARTS = [*WITH_DATA, "part3_attention"]
SMALL = {  # settings of a run that takes a second
    "part1_mlp_mnist": {"hidden": (8,), "batch_size": 64, "epochs": 2},
    "part2_rnn_fashion": {"hidden_size": 8, "encoder_size": 8, "batch_size": 64, "epochs": 2},
    "part3_attention": {
        "d_model": 16,
        "n_head": 2,
        "n_kv_head": (2, 1),
        "head_dim": 4,
        "value_dim": 4,
        "cache": (8,),
        "steps": 30,
        "batch_size": 16,
    },
}


@pytest.fixture(params=PARTS)
def part(request, monkeypatch, tmp_path):
    """Each script as a module, in an empty folder, with no server to download from."""
    module = importlib.import_module(request.param)
    monkeypatch.chdir(tmp_path)
    if request.param in WITH_DATA:
        monkeypatch.setattr(module.DATASET, "mirrors", ())
    return module


@pytest.fixture
def data_dir():
    """The folder with the real datasets, from DATA_DIR; the test is skipped without it."""
    if "DATA_DIR" not in os.environ:
        pytest.skip("DATA_DIR is not set")
    torch.set_num_threads(os.cpu_count() or 1)  # whole trainings, on a machine that is theirs
    yield Path(os.environ["DATA_DIR"]).resolve()
    torch.set_num_threads(1)


def small_data(module, n_train=256, n_val=64, n_test=64):
    """Ten noisy prototypes: easy to learn, and made in no time."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(10, 28, 28, generator=generator)

    def split(n):
        labels = torch.randint(10, (n,), generator=generator)
        noise = torch.randn(n, 28, 28, generator=generator)
        return module.Split(prototypes[labels] + 0.5 * noise, labels)

    return module.Data(
        name="toy",
        class_names=list("0123456789"),
        mean=0.0,
        std=1.0,
        train=split(n_train),
        val=split(n_val),
        test=split(n_test),
    )


def small_config(module, **settings):
    """A setting that runs in a second, with these changes."""
    return module.Config(**(SMALL[module.__name__] | settings))


def unrendered(part, monkeypatch):
    """Figures are built, but not rendered: that takes seconds. Returns their titles by name."""
    titles = {}

    def save_figure(figure, path):
        name = f"{path.stem} again" if path.stem in titles else path.stem
        titles[name] = figure.get_suptitle()

    monkeypatch.setattr(part, "save_figure", save_figure)
    return titles
