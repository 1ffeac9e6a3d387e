"""The mistakes that the page warns of, made on purpose: `python tests/mistakes.py`.

Every one is made in a copy of the project; the test above it has to fail there. One row of the
page cannot be made so: a device that is never used (it needs a GPU).
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIP = "        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)\n"
STEP = "        optimizer.step()\n"
BACKWARD = "        loss.backward()\n"
PART1 = {  # the test: what goes wrong, the right text, the wrong one
    "test_part1.py::test_mlp_equals_its_formula": {
        "no ReLU between the layers": ("nn.ReLU(), ", "nn.Identity(), "),
        "softmax before cross_entropy": ("(images.flatten(1))", "(images.flatten(1)).softmax(1)"),
    },
    "test_part1.py::test_every_image_is_predicted_in_order_and_nothing_is_recorded": {
        "metrics of the last batch only": (
            "torch.cat([model(batch) for batch in images.split(1000)])",
            "[model(batch) for batch in images.split(1000)][-1]",
        ),
        "drop_last at test time": (
            "images.split(1000)",
            "images[: len(images) // 1000 * 1000].split(1000)",
        ),
        "no eval() when scoring": ("    model.eval()\n", ""),
        "no no_grad() when scoring": ("@torch.no_grad()\ndef predict", "def predict"),
    },
    "test_part1.py::test_the_splits_share_no_digit_and_are_normalised_by_the_training_split": {
        "the other dataset's normalisation": (
            "mean = training.images[train].float().mean().item()",
            "mean = 0.1307 * 255",
        ),
        "validation images normalised otherwise": (
            "Split(images[val],",
            "Split(images[val] * std,",
        ),
    },
    "test_part1.py::test_an_epoch_takes_every_image_at_most_once_and_in_another_order_each_time": {
        "training data never shuffled": (
            "torch.randperm(n, device=device)",
            "torch.arange(n, device=device)",
        ),
        "no train() after scoring": ("    model.train()\n", ""),
    },
    "test_part1.py::test_training_is_adamw_on_smoothed_labels_at_a_rate_that_rises_and_falls": {
        "no zero_grad": ("        optimizer.zero_grad()\n", ""),
    },
    "test_part1.py::test_the_best_epoch_is_kept_and_of_equals_the_first": {
        "the last epoch kept instead of the best": (
            'if best is None or row["val_accuracy"] > best["val_accuracy"]:',
            "if True:",
        ),
        "the best of many test scores": ("data.val.", "data.test."),
        "a sum that is called accuracy": (
            "(logits.argmax(1) == data.val.labels).float().mean()",
            "(logits.argmax(1) == data.val.labels).float().sum()",
        ),
    },
    "test_scripts.py::test_scores_equal_scikit_learns": {
        "0/0 in F1": ("right / (predicted + true).clip(min=1)", "right / (predicted + true)"),
        "rows and columns of the matrix exchanged": (
            "confusion_matrix(labels.cpu(), predictions.cpu(),",
            "confusion_matrix(predictions.cpu(), labels.cpu(),",
        ),
    },
    "test_faults.py::test_folders_that_cannot_be_made_are_told_before_training": {
        "a folder that cannot be written, told after training": (
            "    config.images_dir.mkdir(parents=True, exist_ok=True)",
            "    pass",
        ),
    },
    "test_photos.py::test_a_photo_becomes_a_picture_like_mnists": {
        "own digits as they are": (
            "    digit = find_digit(open_photo(path))\n",
            "    return torch.tensor(np.asarray(open_photo(path).resize((28, 28))))\n",
        ),
    },
}
PART2 = {
    "test_part2.py::test_states_and_gradients_equal_torchs": {
        "an RNN without W_hh": ("torch.tanh(x_t + W_hh(h))", "torch.tanh(x_t)"),
        "the reset gate before the product": ("x_n + r * h_n", "r * x_n + h_n"),
        "an LSTM that forgets what it should keep": (
            "torch.sigmoid(f) * c +",
            "(1 - torch.sigmoid(f)) * c +",
        ),
    },
    "test_part2.py::test_the_state_is_fresh_for_every_batch": {
        "the state carried to the next batch": (
            "        for x_t in self.W_ih(x):",
            "        h = h + getattr(self, 'kept', 0)\n"
            "        self.kept = x.mean()\n"
            "        for x_t in self.W_ih(x):",
        ),
    },
    "test_part2.py::test_the_net_is_torchs_rnn_between_encoder_and_classifier": {
        "the whole image in one step": ("28 * config.rows_per_step", "28 * 28"),
    },
    "test_part2.py::test_a_long_gradient_is_clipped_and_a_short_one_is_not": {
        "no clipping": (CLIP, ""),
        "clipping before backward": (BACKWARD + CLIP, CLIP + BACKWARD),
        "clipping after the step": (CLIP + STEP, STEP + CLIP),
    },
}
PART3 = {
    "test_part3.py::test_heads_are_cut_within_each_token": {
        "heads cut across tokens": (
            "x.view(B, T, n_head, C // n_head).transpose(1, 2)",
            "x.view(B, n_head, T, C // n_head)",
        ),
    },
    "test_part3.py::test_module_equals_torch_nn_multihead_attention": {
        "heads merged with the wrong transpose": (
            "output.transpose(1, 2).flatten(2)",
            "output.reshape(output.shape[0], output.shape[2], -1)",
        ),
    },
    "test_part3.py::test_values_and_gradients_equal_scaled_dot_product_attention": {
        "no softmax": ("exp / exp.sum(-1, keepdim=True).clamp(min=0.5)", "scores"),
        "no scaling": ("q / math.sqrt(d) if scale is None", "q if scale is None"),
    },
    "test_part3.py::test_modules_equal_attention_written_out_head_by_head": {
        "queries summed and called MQA": (
            "        return q, k, v\n",
            "        return q.sum(1, keepdim=True).expand_as(q), k, v\n",
        ),
    },
    "test_part3.py::test_causal_mask_hides_every_later_token": {
        "mask times a tiny number": (
            "scores.masked_fill(~mask, -math.inf)",
            "scores + ~mask * -1e-9",
        ),
    },
    "test_part3.py::test_padding_changes_no_answer_with_and_without_a_cache": {
        "padding read as data": ("causal if mask is None else causal & mask", "causal"),
    },
    "test_part3.py::test_answers_from_the_cache_equal_those_of_the_whole_sequence": {
        "several cached tokens with the mask of the first ones": (".tril(earlier)", ".tril()"),
        "several cached tokens without a mask": (".tril(earlier)", ""),
    },
    "test_part3.py::test_labels_equal_a_slow_and_obvious_loop_and_what_is_wanted_stands_before": {
        "a label that does not need the lookups' order": ("(1, 2, 3)", "(1, 1, 1)"),
    },
}
MISTAKES = {"part1_mlp_mnist.py": PART1, "part2_rnn_fashion.py": PART2, "part3_attention.py": PART3}


def run_test(folder: str, test: str) -> None:
    """In a process of its own: run a test of the copy in `folder`; the exit status is pytest's."""
    import pytest

    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ.pop("DATA_DIR", None)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"]))


def seen(script: str, test: str, right: str, wrong: str) -> bool:
    """Whether the test fails with the mistake; that it passes without is pytest's business."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder, "tests"))
        for path in (*ROOT.glob("part*.py"), ROOT / "pyproject.toml"):
            shutil.copy(path, folder)
        text = Path(folder, script).read_text(encoding="utf-8")
        if right not in text:
            raise SystemExit(f"{script} does not hold {right!r} any more")
        Path(folder, script).write_text(text.replace(right, wrong), encoding="utf-8")
        process = multiprocessing.get_context("fork").Process(target=run_test, args=(folder, test))
        process.start()
        process.join(120)
        process.kill()
        return process.exitcode == 1  # 1: a test failed; 0: none did; others: none was run


if __name__ == "__main__":
    # What the tests need is imported once; every mistake gets a fork of this process.
    import matplotlib.figure  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    import tyro  # noqa: F401

    torch.set_num_threads(1)
    made = 0
    missed = []
    for script, tests in MISTAKES.items():
        for test, mistakes in tests.items():
            for name, (right, wrong) in mistakes.items():
                made += 1
                if not seen(script, test, right, wrong):
                    missed.append(f"{name} ({test})")
    print(f"mistakes: {made - len(missed)} caught, of {made}")
    for name in missed:
        print(f"  not seen: {name}")
    sys.exit(bool(missed))
