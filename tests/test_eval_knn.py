"""Nearest neighbors: against brute force, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

import image_folders
from image_folders import CLASSES, write_folder

from diffbackbone import DiffusionBackbone
from diffbackbone.eval import knn
from diffbackbone.eval.data import RowImages, list_folder

weights = image_folders.weights


def brute_force(queries, bank, labels, truth, k, classes, temperature=0.07):
    """Neighbors in float64, one query after the other."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank)]
    correct = np.zeros(2)
    for query, label in zip(unit[0], truth):
        similarity = unit[1] @ query
        votes = np.zeros(classes)
        for i in np.argsort(-similarity)[:k]:
            votes[labels[i]] += np.exp(similarity[i] / temperature)
        ranking = [c for c in sorted(range(classes), key=lambda c: (-votes[c], c)) if votes[c] > 0]
        correct += [label in ranking[:1], label in ranking[:5]]
    return tuple(correct / len(truth))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_neighbors_equal_brute_force(chunk):
    random = np.random.default_rng(0)
    centers = random.normal(size=(9, 12))
    labels, truth = random.integers(0, 9, 83), random.integers(0, 9, 41)
    bank = centers[labels] + 1.5 * random.normal(size=(83, 12))
    queries = centers[truth] + 1.5 * random.normal(size=(41, 12))
    ks = 1, 5, 20, 83
    found = knn.knn_accuracy(
        torch.tensor(bank), labels, torch.tensor(queries), truth, ks, chunk=chunk
    )
    expected = [brute_force(queries, bank, labels, truth, k, 9) for k in ks]
    np.testing.assert_allclose([(found[k]["top1"], found[k]["top5"]) for k in ks], expected)
    assert len(set(expected)) > 2  # the protocols differ here


def test_classes_without_a_vote_are_never_correct():
    bank = torch.tensor([[1.0, 0], [0, 1]])
    found = knn.knn_accuracy(bank, [3, 4], bank, [0, 4], [1])
    assert found[1] == {"top1": 0.5, "top5": 0.5}


def test_ranks_give_nothing_away():
    scores = torch.tensor(
        [[1.0, 2, 3], [0, 0, 0], [0, 0, 0], [float("nan")] * 3, [0, float("inf"), 0]]
    )
    assert knn.true_ranks(scores, torch.tensor([1, 0, 2, 0, 1])).tolist() == [1, 0, 2, 3, 3]


def test_knn_command(tmp_path, weights, capsys):
    data = tmp_path / "data"
    write_folder(data / "train", 6, seed=0, contrast=15)
    write_folder(data / "val", 5, seed=1, contrast=15)
    arguments = [
        "--data", data, "--unet", "tiny", "--image-size", 32, "--checkpoint", weights, "--k", 3, 10,
        "--timesteps", 90, 150, "--blocks", 19, 24, "--workers", 0, "--device", "cpu",
        "--batch-size", 6, "--out", tmp_path / "out",
    ]  # fmt: skip
    knn.main(list(map(str, arguments)))
    assert "| b | t | pool | Top1@3 | Top5@3 | Top1@10 | Top5@10 |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [(row["b"], row["t"], row["k"]) for row in rows] == [
        (b, t, k) for b in (19, 24) for t in (90, 150) for k in (3, 10)
    ]
    backbone = DiffusionBackbone("tiny", weights, 90, (24,), None, None, None, freeze=True)
    vectors, labels = [], []
    for split in ("train", "val"):
        folder = list_folder(data / split)
        images = RowImages(folder, 32)
        batch = torch.stack([images[0, i] for i in range(len(folder))])
        vectors.append(backbone(batch)[0].mean((2, 3)).detach().half().double().numpy())
        labels.append(folder.labels)
    expected = brute_force(*vectors[::-1], *labels, 3, CLASSES)
    row = next(row for row in rows if (row["b"], row["t"], row["k"]) == (24, 90, 3))
    assert (row["top1"], row["top5"]) == pytest.approx(expected)
    assert 0 < row["top1"] < 1
    with pytest.raises(SystemExit, match="there are 18 training images"):
        knn.main(["--data", str(data), "--k", "19"])
