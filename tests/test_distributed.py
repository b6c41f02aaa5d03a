"""Two processes on a batch of two each do what one process does on four (gloo, on a CPU)."""

from __future__ import annotations

import itertools
import os
import socket
import warnings

import golden
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from diffbackbone import DiffusionBackbone, UNetConfig

FEEDBACK = [None, "bottleneck"]
SMALL = UNetConfig(32, (1, 1, 2), 1, (4,), num_head_channels=16)

needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="torch.distributed has no gloo backend",
)


def build(feedback: str | None, recompute: bool) -> DiffusionBackbone:
    warnings.simplefilter("ignore")
    backbone = golden.fill(
        DiffusionBackbone(
            SMALL,
            blocks=(13, 12, 10, 8),
            out_strides=(2, 4, 8, 16),
            feedback=feedback,
            out_channels=32,
            activation_checkpointing=recompute,
        )
    )
    return hold_batch_norm(backbone.train())


def hold_batch_norm(backbone: DiffusionBackbone) -> DiffusionBackbone:
    """Statistics of half a batch differ from the whole's; gradients are compared with them held."""
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return backbone


@pytest.fixture(autouse=True, scope="module")
def as_many_threads_as_the_processes():
    """Another number of threads adds in another order.

    One value of feedback that is zero but for rounding then falls on the other side of a ReLU, and
    changes gradients by some 1e-5 of the largest.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1


def gradients(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    for _ in range(2):  # the second step meets the buckets that the first has built
        model.zero_grad(set_to_none=True)
        loss = sum(x.square().flatten(1).mean(1) for x in model(images)).mean()
        loss.backward()
    return {
        name.removeprefix("module."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def work(rank: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    results = {feedback: [] for feedback in FEEDBACK}
    for feedback, recompute in itertools.product(FEEDBACK, (False, True)):
        model = DistributedDataParallel(build(feedback, recompute), find_unused_parameters=False)
        results[feedback].append(gradients(model, batch()[2 * rank : 2 * rank + 2]))
    if rank == 0:
        torch.save(results, path)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str | None, list[dict[str, torch.Tensor]]]:
    """By feedback, the two processes' gradients without recomputing and with it."""
    path = str(tmp_path_factory.mktemp("two") / "gradients.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, path), nprocs=2)
    return torch.load(path, weights_only=True)


@needs_gloo
@pytest.mark.parametrize("feedback", FEEDBACK)
def test_gradients_equal_one_process_on_the_joint_batch(feedback, together):
    expected = gradients(build(feedback, recompute=False), batch())
    scale = max(grad.abs().max() for grad in expected.values())
    assert scale > 0
    alone = gradients(build(feedback, recompute=True), batch())
    for ours in (*together[feedback], alone):
        assert ours.keys() == expected.keys()
        for name, grad in expected.items():
            assert (ours[name] - grad).abs().max() < 1e-5 * scale, name
