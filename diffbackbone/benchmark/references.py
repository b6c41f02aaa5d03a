"""What runs in the processes of `tools/benchmark.py`: one implementation each.

A worker answers commands, one JSON object a line, on the standard input and output that it was
started with; whatever the code under test prints goes to the standard error instead. It builds one
implementation, ours or a reference, and from then on runs the same step again and again: a forward
pass, or a forward and a backward pass.

References are run by the path that their own code takes to get features:

* guided-diffusion has none, so its blocks are run in the order of its ``UNetModel.forward``, which
  stops after the last block that is asked for.
* diffssl: ``DiffSSLModelFeedbackFusion.forward``, its whole model, with a head that hands back the
  features. It is given x_t; its own noise would differ from run to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAND_INS = ("mpi4py", "blobfile", "torchinfo", "einops")
"""What the references import and their features don't need; replaced where it is not installed."""


class NotAvailableError(Exception):
    """An implementation can't do what is asked for; the message says why."""


# --------------------------------------------------------------------------------------------------
# memory


def peak_bytes(device: str) -> int:
    """Most bytes that this process held since :func:`reset_peak`, or since it was started.

    On a CPU that is the resident set. Linux tells it under ``VmHWM``; ``getrusage`` is for other
    systems, as its figure on Linux starts at the parent's.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: str) -> None:
    """Hand freed memory back, and begin the peak anew where the system allows it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory")
    )


# --------------------------------------------------------------------------------------------------
# implementations


class Implementation:
    """One implementation of one case, ready to run.

    Args:
        job: The case; see ``tools/benchmark.py``.

    Attributes:
        model: Its weights.
        dtype: In what type it computes, in words.
        inputs: What it is given: images for ours, x_t for a reference; (N, 3, H, W).
    """

    model: nn.Module
    dtype: str

    def __init__(self, job: Mapping[str, Any]) -> None:
        from diffbackbone.diffusion import NoiseSchedule
        from diffbackbone.unet import UNetConfig

        self.job = job
        self.device = job["device"]
        self.config = UNetConfig(**job["config"])
        self.half = None if job["dtype"] == "float32" else getattr(torch, job["dtype"])
        self.autocast: torch.dtype | None = None
        self.dtype = job["dtype"]
        generator = torch.Generator().manual_seed(1)
        shape = (job["batch"], 3, job["size"], job["size"])
        images = 2 * torch.rand(shape, generator=generator) - 1
        x_t = NoiseSchedule(self.config.noise_schedule).add_noise(images, job["t"], None)
        self.inputs = (images if job["implementation"] == "ours" else x_t).to(self.device)
        self.build()
        self.scales = [nn.Parameter(torch.ones((), device=self.device)) for _ in job["blocks"]]
        self.call: Callable[[Tensor], Sequence[Tensor]] = self.features
        if job["compiled"]:
            self.call = torch.compile(self.features, dynamic=False)

    @property
    def training(self) -> bool:
        """Whether the step has a backward pass."""
        return self.job["mode"] != "forward"

    @property
    def finetuned(self) -> bool:
        """Whether the U-Net's weights are trained."""
        return self.job["mode"] == "finetuned"

    def build(self) -> None:
        """Build the model and load the weights."""
        raise NotImplementedError

    def features(self, inputs: Tensor) -> Sequence[Tensor]:
        """The maps of ``job["blocks"]``, in ascending order of the blocks."""
        raise NotImplementedError

    def features_without_numbers(self, inputs: Tensor) -> Sequence[Tensor]:
        """The same on the meta device."""
        return self.features(inputs)

    def feedback_weights(self) -> dict[str, dict[str, Tensor]]:
        """The state dicts of the feedback layers, by source block."""
        loaded = torch.load(self.job["feedback_weights"], weights_only=True)
        return loaded[self.job["feedback"]]

    def watched(self) -> dict[str, Tensor]:
        """Parameters whose gradients are compared."""
        raise NotImplementedError

    def run(
        self,
        call: Callable[[Tensor], Sequence[Tensor]],
        inputs: Tensor,
        record: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        """One step.

        Args:
            call: What computes the features.
            inputs: Images or x_t (N, 3, H, W).
            record: Is given the features.
        """
        autocast: Any = contextlib.nullcontext()
        if self.autocast is not None:
            autocast = torch.autocast(self.device, self.autocast)
        with autocast, torch.set_grad_enabled(self.training):
            features = call(inputs)
            if record:
                record(features)
            if self.training:
                losses = [
                    scale * x.float().square().sum() / x.numel() ** 0.5
                    for scale, x in zip(self.scales, features)
                ]
                del features
                # under autocast: the references recompute attention here, with the weights as
                # they are
                sum(losses).backward()

    def step(self, record: Callable[[Sequence[Tensor]], None] | None = None) -> float:
        """One step as it is timed; gives its seconds."""
        self.model.zero_grad(set_to_none=True)
        synchronize(self.device)
        start = time.perf_counter()
        self.run(self.call, self.inputs, record)
        synchronize(self.device)
        return time.perf_counter() - start

    def flops(self) -> int:
        """Floating-point operations of a step, counted without running it; ends the model."""
        from diffbackbone.costs import counting_flops

        self.model.zero_grad(set_to_none=True)
        self.model.to("meta")
        self.scales = [nn.Parameter(scale.to("meta")) for scale in self.scales]
        with counting_flops() as counter:
            # modules are not told apart: the hooks for that break the references' re-entrant
            # activation checkpointing
            counter.mod_tracker.__exit__(None, None, None)
            self.run(self.features_without_numbers, self.inputs.to("meta"))
        return counter.get_total_flops()


class Ours(Implementation):
    """The backbone of this project, as its users call it; the noise policy is ``"none"``."""

    def build(self) -> None:
        from diffbackbone.backbone import DiffusionBackbone

        job = self.job
        self.model = DiffusionBackbone(
            self.config,
            job["weights"],
            timestep=job["t"],
            blocks=job["blocks"],
            feedback=job["feedback"],
            out_channels=None,
            out_strides=None,
            noise="none",
            freeze=not self.finetuned,
            activation_checkpointing=job["activation_checkpointing"],
        ).eval()
        if job["feedback"]:
            for source, weights in self.feedback_weights().items():
                self.model.feedback[source].load_state_dict(weights)
            self.model.feedback.train(self.training)
        self.model.to(self.device)
        if self.half is not None:
            if not self.finetuned:
                self.model.unet.to(self.half)
            if self.finetuned or job["feedback"]:
                self.autocast = self.half
                self.dtype += " (autocast)"
        if job["channels_last"]:
            self.model.to(memory_format=torch.channels_last)
            self.inputs = self.inputs.contiguous(memory_format=torch.channels_last)

    def features(self, inputs: Tensor) -> Sequence[Tensor]:
        return self.model(inputs)

    def features_without_numbers(self, inputs: Tensor) -> Sequence[Tensor]:
        blocks, t, unet = self.job["blocks"], self.job["t"], self.model.float().unet
        if self.model.feedback is not None:
            return list(self.model.feedback(unet, inputs, t, blocks).values())
        with torch.no_grad() if self.model.frozen else contextlib.nullcontext():
            return list(unet.forward_features(inputs, t, blocks).values())

    def watched(self) -> dict[str, Tensor]:
        found = {}
        if self.finetuned:
            found["input_blocks.0.0.weight"] = self.model.unet.input_blocks[0][0].weight
        if self.model.feedback is not None:
            found.update({b: layer[0].weight for b, layer in self.model.feedback.items()})
        return found


class Reference(Implementation):
    """What the two references share: the class of their U-Net.

    Their half precision is float16, by a conversion of their own, on a GPU: it stands against ours
    in bfloat16 too, which they don't have. On a CPU they run in bfloat16 under autocast.
    """

    def build_unet(self) -> nn.Module:
        """Their U-Net with the weights, in their own half precision where that is wanted."""
        stub_missing()
        sys.path.insert(0, self.job["checkout"])
        from guided_diffusion.unet import UNetModel

        config = self.config
        converted = self.half is not None and self.device != "cpu"
        heads_upsample = config.num_heads_upsample
        unet = UNetModel(
            image_size=config.image_size,
            in_channels=config.in_channels,
            model_channels=config.model_channels,
            out_channels=config.out_channels,
            num_res_blocks=config.num_res_blocks,
            attention_resolutions=config.attention_strides,
            dropout=config.dropout,
            channel_mult=config.channel_mult,
            conv_resample=config.conv_resample,
            num_classes=None,
            use_fp16=converted,
            num_heads=config.num_heads,
            num_head_channels=config.num_head_channels or -1,
            num_heads_upsample=-1 if heads_upsample is None else heads_upsample,
            use_scale_shift_norm=config.use_scale_shift_norm,
            resblock_updown=config.resblock_updown,
            use_new_attention_order=config.use_new_attention_order,
        )
        unet.load_state_dict(torch.load(self.job["weights"], mmap=True, weights_only=True))
        if converted:
            self.dtype = "float16"
        elif self.half is not None:
            self.autocast = self.half
            self.dtype += " (autocast)"
        self.converted = converted
        self.timesteps = torch.full((self.job["batch"],), self.job["t"], device=self.device)
        return unet


class GuidedDiffusion(Reference):
    """OpenAI's U-Net, stopped after the last tap."""

    def build(self) -> None:
        if self.job["feedback"]:
            raise NotAvailableError("guided-diffusion has no feedback")
        self.model = self.build_unet().requires_grad_(self.finetuned).eval()
        if self.converted:
            self.model.convert_to_fp16()
        self.model.to(self.device)

    def features(self, inputs: Tensor) -> Sequence[Tensor]:
        from guided_diffusion.nn import timestep_embedding

        unet = self.model
        timesteps = self.timesteps.to(inputs.device)
        emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels))
        blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
        encoder = len(unet.input_blocks)
        taps, skips = [], []
        h = inputs.type(unet.dtype)
        for index, block in enumerate(blocks[: max(self.job["blocks"])], start=1):
            if index > encoder + 1:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb)
            if index <= encoder:
                skips.append(h)
            if index in self.job["blocks"]:
                taps.append(h)
        return taps

    def watched(self) -> dict[str, Tensor]:
        if not self.finetuned:
            return {}
        return {"input_blocks.0.0.weight": self.model.input_blocks[0][0].weight}


class _GivenNoise:
    """Stands in for diffssl's diffusion process: what it noises has its noise already."""

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return x_start

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t


class _FeatureHead(nn.Module):
    """Stands in for a classification head: hands back the features of the only timestep."""

    def forward(
        self,
        first_blocks: Sequence[int],
        first: Sequence[Sequence[Tensor]],
        second_blocks: Sequence[int],
        second: Sequence[Sequence[Tensor]],
        t: Sequence[int],
    ) -> list[Tensor]:
        features = [*first, *second]
        return [x for one in features for x in one]


class DiffSSL(Reference):
    """The authors' model for classification, up to its head."""

    def build(self) -> None:
        job, feedback = self.job, None
        unet = self.build_unet()
        from ssl_diff import DM_FEAT_DIM_DICT, DiffSSLModelFeedbackFusion

        blocks = self.config.blocks
        if job["feedback"]:
            feedback = self.feedback_weights()
            if {b: info.channels for b, info in blocks.items()} != dict(DM_FEAT_DIM_DICT):
                raise NotAvailableError(
                    "diffssl's feedback has the channels of the 256-px models built in"
                )
        self.model = DiffSSLModelFeedbackFusion(
            unet,
            _GivenNoise(),
            _FeatureHead(),
            device=self.device,
            mode="finetune" if self.finetuned else "freeze",
            feedback_arch="C_B_R",
            use_feedback=bool(feedback),
            feedback_b_list=sorted(map(int, feedback or ())),
            first_fw_b_list=[] if feedback else job["blocks"],
            second_fw_b_list=job["blocks"] if feedback else [],
        ).eval()
        if feedback:
            for source, layers in zip(self.model.feedback_b_list, self.model.feedback_layers):
                layers.load_state_dict(feedback[str(source)])
            self.model.feedback_layers.train(self.training)
        if self.converted:
            self.model.convert_to_fp16()
        else:
            self.model.convert_to_fp32()
        self.model.to(self.device)

    def features(self, inputs: Tensor) -> Sequence[Tensor]:
        return self.model(inputs, [self.job["t"]])

    def features_without_numbers(self, inputs: Tensor) -> Sequence[Tensor]:
        self.model.device = "meta"
        return self.features(inputs)

    def watched(self) -> dict[str, Tensor]:
        found = {}
        if self.finetuned:
            found["input_blocks.0.0.weight"] = self.model.encoder.input_blocks[0][0].weight
        if self.job["feedback"]:
            layers = zip(self.model.feedback_b_list, self.model.feedback_layers)
            found.update({str(b): layer[0].weight for b, layer in layers})
        return found


IMPLEMENTATIONS: dict[str, type[Implementation]] = {
    "ours": Ours,
    "guided-diffusion": GuidedDiffusion,
    "diffssl": DiffSSL,
}


def stub_missing() -> None:
    """Put empty modules where the references import what is not installed and not needed here."""
    for name in STAND_INS:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = _StandIn(name)


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


# --------------------------------------------------------------------------------------------------
# the machine


def machine(device: str) -> dict[str, Any]:
    """Names and numbers of the machine."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), cpu)
    found = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }
    with contextlib.suppress(OSError, AttributeError):
        found["load"] = os.getloadavg()[0]
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


def peaks(device: str, dtype: str, seconds: float) -> dict[str, float]:
    """The most FLOP/s that plain matrix products and 3x3 convolutions reach here.

    Args:
        device: Where.
        dtype: In what type.
        seconds: How long one product may take; larger ones are not tried.
    """
    kind = getattr(torch, dtype)

    def matmul(scale: int) -> tuple[Callable[[], Tensor], int]:
        n = 256 * scale
        a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
        return lambda: a @ b, 2 * n**3

    def convolution(scale: int) -> tuple[Callable[[], Tensor], int]:
        x = torch.randn(scale, 256, 32, 32, device=device).to(kind)
        weight = torch.randn(256, 256, 3, 3, device=device).to(kind)
        if device != "cpu":
            x = x.to(memory_format=torch.channels_last)
            weight = weight.to(memory_format=torch.channels_last)
        return lambda: F.conv2d(x, weight, padding=1), 2 * scale * 256 * 256 * 9 * 32 * 32

    def best(make: Callable[[int], tuple[Callable[[], Tensor], int]]) -> float:
        highest, scale, took = 0.0, 1, 0.0
        while took < seconds and scale <= 64:
            call, flops = make(scale)
            call()
            took, spent = float("inf"), 0.0
            while spent < 2 * seconds:
                synchronize(device)
                start = time.perf_counter()
                call()
                synchronize(device)
                once = time.perf_counter() - start
                took, spent = min(took, once), spent + max(once, seconds / 10)
            highest = max(highest, flops / took)
            scale *= 2
        return highest

    with torch.no_grad():
        return {"matmul": best(matmul), "convolution": best(convolution)}


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was asked for."""
    if device != "cpu":
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------
# commands


def prepare(
    config: Mapping[str, Any],
    checkpoint: str | None,
    weights: str,
    feedback: Sequence[str],
    feedback_weights: str,
) -> None:
    """Write the weights that all implementations load.

    Args:
        config: The architecture.
        checkpoint: Where they come from; None for random ones, with no layer left at zero.
        weights: File for the U-Net's.
        feedback: Strategies whose layers get random weights.
        feedback_weights: File for theirs.
    """
    from diffbackbone.checkpoint import load_checkpoint
    from diffbackbone.feedback import Feedback
    from diffbackbone.unet import UNet, UNetConfig

    architecture = UNetConfig(**config)
    torch.manual_seed(0)
    unet = UNet(architecture)
    if checkpoint is not None:
        load_checkpoint(unet, checkpoint)
    else:
        for module in unet.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and not weight.any():
                module.reset_parameters()
    torch.save(unet.state_dict(), weights)
    layers: dict[str, dict[str, Any]] = {}
    for strategy in feedback:
        layers[strategy] = {}
        for source, layer in Feedback(architecture, strategy).items():
            layer[1].running_mean.normal_()
            layer[1].running_var.uniform_(0.5, 1.5)
            layers[strategy][source] = layer.state_dict()
    torch.save(layers, feedback_weights)


class Worker:
    """Answers commands; see the methods.

    Args:
        threads: Threads that torch may use; None leaves its choice.
        cudnn_benchmark: Let cuDNN try out its kernels.
    """

    def __init__(self, threads: int | None, cudnn_benchmark: bool) -> None:
        if threads:
            torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = cudnn_benchmark
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
        torch.backends.cuda.matmul.allow_tf32 = False
        self.implementation: Implementation | None = None
        self.baseline = 0

    def machine(self, device: str) -> dict[str, Any]:
        """See :func:`machine`."""
        return machine(device)

    def peaks(self, device: str, dtype: str, seconds: float) -> dict[str, float]:
        """See :func:`peaks`."""
        return peaks(device, dtype, seconds)

    def prepare(self, **arguments: Any) -> None:
        """See :func:`prepare`."""
        prepare(**arguments)

    def begin(self, device: str) -> None:
        """What this process holds by now, its code, is no part of what is measured."""
        reset_peak(device)
        self.baseline = peak_bytes(device) if device == "cpu" else 0

    def load(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Build the implementation; the memory to load it does not count, its weights do."""
        import diffbackbone.backbone  # noqa: F401  the code is no part of what is measured

        self.begin(job["device"])
        self.implementation = IMPLEMENTATIONS[job["implementation"]](job)
        return {"dtype": self.implementation.dtype}

    def first(self, outputs: str, gradients: str) -> dict[str, Any]:
        """Run the first step, and write what came out.

        Args:
            outputs: File for the features.
            gradients: File for some gradients.
        """
        model = self.implementation

        def record(features: Sequence[Tensor]) -> None:
            torch.save([x.detach().cpu().contiguous() for x in features], outputs)

        if model.job["compiled"]:  # compiling takes memory too, which does not count
            model.step()
        reset_peak(model.device)
        seconds = model.step(record)
        peak = peak_bytes(model.device) - self.baseline
        found = {name: p.grad for name, p in model.watched().items() if p.grad is not None}
        torch.save({name: grad.float().cpu() for name, grad in found.items()}, gradients)
        self._rest()
        return {"peak_bytes": peak, "seconds": seconds}

    def time(self, number: int) -> float:
        """Seconds a step, over ``number`` steps."""
        seconds = [self.implementation.step() for _ in range(number)]
        self._rest()
        return sum(seconds) / number

    def flops(self) -> int:
        """Floating-point operations of a step; the last command for an implementation."""
        return self.implementation.flops()

    def _rest(self) -> None:
        """Leave the memory to the other implementation while that one works."""
        self.implementation.model.zero_grad(set_to_none=True)
        if self.implementation.device != "cpu":
            torch.cuda.empty_cache()


def answers(worker: Worker, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Run commands.

    Args:
        worker: Runs them.
        lines: ``{"command": name, ...}`` each.

    Yields:
        ``{"result": ...}``, or ``{"error": kind, "message": ...}`` with the kind ``"skipped"``,
        ``"out of memory"`` or ``"error"``.
    """
    for line in lines:
        arguments = json.loads(line)
        try:
            yield {"result": getattr(worker, arguments.pop("command"))(**arguments)}
        except NotAvailableError as error:
            yield {"error": "skipped", "message": str(error)}
        except Exception as error:
            traceback.print_exc()
            kind = "out of memory" if out_of_memory(error) else "error"
            first = (str(error).strip().splitlines() or [""])[0]
            yield {"error": kind, "message": f"{type(error).__name__}: {first}".rstrip(": ")}


def main(kind: type[Worker] = Worker) -> None:
    """Answer commands until there are no more."""
    with contextlib.suppress(OSError):  # where memory runs out, it shall be this process that ends
        Path("/proc/self/oom_score_adj").write_text("1000")
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)  # what the code under test prints is no answer
        settings = json.loads(sys.stdin.readline())
        for answer in answers(kind(**settings), iter(sys.stdin.readline, "")):
            channel.write(json.dumps(answer) + "\n")
            channel.flush()


if __name__ == "__main__":
    main()
