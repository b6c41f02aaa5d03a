"""Nearest neighbors: against brute force, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from image_folders import CLASSES, write_folder, write_weights

from diffbackbone import DiffusionBackbone
from diffbackbone.eval import knn
from diffbackbone.eval.data import RowImages, list_folder
from diffbackbone.utils import UserError

ROOT = Path(__file__).resolve().parents[1]


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
    ks = (1, 5, 20, 83)

    def accuracy(truth, queries):
        return knn.knn_accuracy(
            lambda a, b: torch.tensor(bank[a:b]), labels,
            lambda a, b: torch.tensor(queries[a:b]), truth, ks, 9, chunk=chunk,
        )  # fmt: skip

    found, scores = accuracy(truth, queries), set()
    for k in ks:
        expected = brute_force(queries, bank, labels, truth, k, 9)
        assert (found[k]["top1"], found[k]["top5"]) == pytest.approx(expected)
        scores.add(expected)
    assert len(scores) > 2  # the protocols differ here
    with pytest.raises(UserError, match="83 training images"):
        knn.knn_accuracy(None, labels, None, truth, (84,), 9)


def test_most_similar_rows_come_first():
    bank = torch.tensor([[0.0, 2], [1, 1], [-1, 0], [3, 0.1]])
    similarities, rows = knn.nearest(torch.tensor([[5.0, 0]]), lambda a, b: bank[a:b], 4, 3, 2)
    assert rows.tolist() == [[3, 1, 0]]
    assert similarities.tolist() == [pytest.approx([0.99944, 0.70711, 0], abs=1e-5)]


def test_votes_are_weighted_by_temperature():
    similarities, labels = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[2, 1, 1]])
    assert knn.vote(similarities, labels, 4, 0.07).argmax() == 2
    assert knn.vote(similarities, labels, 4, 1.0).argmax() == 1
    scores = knn.vote(similarities, labels, 4, 0.07)[0]
    assert scores[1] / scores[2] == pytest.approx(2 * np.exp(-0.1 / 0.07))
    assert scores[[0, 3]].tolist() == [0, 0]


def test_classes_without_a_vote_are_never_correct():
    bank = torch.tensor([[1.0, 0], [0, 1]])
    found = knn.knn_accuracy(
        lambda a, b: bank[a:b], [3, 4], lambda a, b: bank[a:b], [0, 4], [1], 5, chunk=10
    )
    assert found[1] == {"top1": 0.5, "top5": 0.5}


def test_ranks_give_nothing_away():
    scores = torch.tensor(
        [[1.0, 2, 3], [0, 0, 0], [0, 0, 0], [float("nan")] * 3, [0, float("inf"), 0]]
    )
    assert knn.true_ranks(scores, torch.tensor([1, 0, 2, 0, 1])).tolist() == [1, 0, 2, 3, 3]


@pytest.mark.parametrize("processes", [1, 2])
def test_knn_command(tmp_path, processes, capfd):
    data, weights = tmp_path / "data", write_weights(tmp_path / "tiny.pt")
    write_folder(data / "train", 6, seed=0, contrast=15)
    write_folder(data / "val", 5, seed=1, contrast=15)
    arguments = [
        "--data", data, "--unet", "tiny", "--image-size", 32,
        "--checkpoint", weights, "--k", 3, 10, "--timesteps", 90, 150, "--blocks", 19, 24,
        "--workers", 0, "--device", "cpu", "--chunk", 4, "--batch-size", 6,
        "--cache", tmp_path / "cache", "--out", tmp_path / "knn.json",
    ]  # fmt: skip
    arguments = list(map(str, arguments))
    if processes == 1:
        knn.main(arguments)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([sys.executable, *launcher, ROOT / "tools/knn.py", *arguments], check=True)
    assert capfd.readouterr().out.count("| b | t | pool | Top1@3 | Top5@3 | Top1@10 | Top5@1") == 1
    rows = json.loads((tmp_path / "knn.json").read_text())["rows"]
    assert [(row["b"], row["t"], row["k"]) for row in rows] == [
        (b, t, k) for b in (19, 24) for t in (90, 150) for k in (3, 10)
    ]
    folders = [list_folder(data / split) for split in ("train", "val")]
    backbone = DiffusionBackbone("tiny", weights, 90, (24,), None, None, None, freeze=True)
    vectors = []
    for folder in folders:
        images = RowImages(folder, 32)
        batch = torch.stack([images[0, i] for i in range(len(folder))])
        vectors.append(backbone(batch)[0].mean((2, 3)).detach().half().double().numpy())
    labels = [folder.labels for folder in folders]
    expected = brute_force(vectors[1], vectors[0], *labels, 3, CLASSES)
    row = next(row for row in rows if (row["b"], row["t"], row["k"]) == (24, 90, 3))
    assert (row["top1"], row["top5"]) == pytest.approx(expected)
    assert 0 < row["top1"] < 1


def test_mirrored_copies_are_no_neighbors(tmp_path):
    """A reader of a cache with two copies gives the first one's rows."""
    from test_eval_features import ALONE, LISTING, SHAPES, values

    from diffbackbone.eval.features import write_cache

    cache = write_cache(
        tmp_path,
        {"dtype": "float16", "copies": 2},
        LISTING,
        SHAPES,
        lambda b: map(values, b),
        ALONE,
    )
    read = knn.cache_reader(cache, (50, 19), 1)
    assert torch.equal(read(2, 5), values([2, 3, 4])[50, 19].flatten(1).float())
