"""A framework's training step, timed in parts.

Model, optimizer and the step itself are the framework's own, built from this project's configs;
the batch is always the same, so nothing waits for data.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from diffbackbone import DiffusionBackbone
from diffbackbone.costs import counting_flops


class TrainingStep:
    """A step and its parts; a GPU is waited for between them.

    ``forward`` is the U-Net's forward pass: from the noised images to the taps, DifFeed included.
    ``backward`` lasts from the first tap's gradient to the end, recomputed blocks included.
    ``optimizer`` is its step. The rest are heads, losses, projections and preprocessing.

    Args:
        model: Holds the backbone.
        optimizer: Of the model.
        update: Runs a step, as the framework does it.
        dtype: The type it computes in.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        update: Callable[[], Any],
        dtype: str,
    ) -> None:
        self.model, self.update, self.dtype = model, update, dtype
        self.marks: dict[str, list[float]] = collections.defaultdict(list)
        backbone = next(m for m in model.modules() if isinstance(m, DiffusionBackbone))
        # Either is called once for a batch of images of one size.
        owner, name = backbone.unet, "forward_features"
        if backbone.feedback is not None:
            owner, name = backbone.feedback, "forward"
        setattr(owner, name, self._timed(getattr(owner, name)))
        optimizer.register_step_pre_hook(lambda *_: self._mark("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._mark("optimizer"))

    def _mark(self, part: str) -> None:
        self.marks[part].append(timer())

    def _timed(self, function: Callable[..., dict[int, Tensor]]) -> Any:
        def call(*args: Any, **kwargs: Any) -> dict[int, Tensor]:
            self._mark("forward")
            taps = function(*args, **kwargs)
            self._mark("forward")
            for tap in taps.values():
                if tap.requires_grad:
                    tap.register_hook(self._start_backward)
            return taps

        return call

    def _start_backward(self, _: Tensor) -> None:
        # Autograd runs last what ran first, so heads and projections are done by now.
        if not self.marks["backward"]:
            self._mark("backward")
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._mark("backward"))  # at the end of backward

    def first(self) -> int:
        """Run a step; return its floating-point operations."""
        with counting_flops() as counter:
            self.update()
        return counter.get_total_flops()

    def step(self) -> dict[str, float]:
        """Return the seconds of a ``step``, and of ``forward``, ``backward``, ``optimizer``."""
        self.marks.clear()
        self._mark("step")
        self.update()
        self._mark("step")
        seconds = {}
        for part in ("step", "forward", "backward", "optimizer"):
            marks = self.marks[part]
            seconds[part] = sum(end - start for start, end in zip(marks[::2], marks[1::2]))
        return seconds


def random_image(size: int, random: torch.Generator) -> Tensor:
    """Return pixels (3, size, size) of 0 to 255."""
    return torch.randint(0, 256, (3, size, size), generator=random, dtype=torch.uint8)
