"""Two processes on a batch of two each do what one process does on four (gloo, on a CPU)."""

from __future__ import annotations

import itertools
import warnings

import golden
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from diffbackbone import DiffusionBackbone, UNetConfig

FEEDBACK = [None, "bottleneck"]
SMALL = UNetConfig(32, (1, 1, 2), 1, (4,), num_head_channels=16)

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="torch.distributed has no gloo backend",
)


def build(feedback: str | None, recompute: bool) -> DiffusionBackbone:
    warnings.simplefilter("ignore")
    backbone = DiffusionBackbone(
        SMALL,
        blocks=(13, 12, 10, 8),
        out_strides=(2, 4, 8, 16),
        feedback=feedback,
        out_channels=32,
        activation_checkpointing=recompute,
    )
    golden.fill(backbone).train()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # statistics of half a batch differ from the whole's
    return backbone


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the processes: another number of threads adds in another order.

    A feedback value that is zero but for rounding then falls on the other side of a ReLU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def gradients(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    for _ in range(2):  # the second step meets the buckets that the first has built
        model.zero_grad(set_to_none=True)
        sum(x.square().flatten(1).mean(1) for x in model(images)).mean().backward()
    return {
        name.removeprefix("module."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results = {feedback: [] for feedback in FEEDBACK}
    for feedback, recompute in itertools.product(FEEDBACK, (False, True)):
        model = DistributedDataParallel(build(feedback, recompute), find_unused_parameters=False)
        results[feedback].append(gradients(model, batch()[2 * rank : 2 * rank + 2]))
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str | None, list[dict[str, torch.Tensor]]]:
    """By feedback, the two processes' gradients without recomputing and with it."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pt", weights_only=True)


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
