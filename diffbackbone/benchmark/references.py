"""Our backbone and the published implementations, each running the same step.

References are run by the path that their own code takes to features. guided-diffusion has none, so
its blocks are run in the order of ``UNetModel.forward`` up to the last tap. diffssl's is its whole
model, ``DiffSSLModelFeedbackFusion``, with a head that returns the features; it is given x_t, as
its own noise would differ from run to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffbackbone import DiffusionBackbone, Feedback, NoiseSchedule, UNet, UNetConfig
from diffbackbone import load_checkpoint as load_into
from diffbackbone.benchmark import worker

TIMESTEP = 90
CASES: dict[str, tuple[tuple[int, ...], str | None]] = {
    "b24": ((24,), None),
    "taps": ((24, 27, 30, 33), None),
    "bottleneck": ((24,), "bottleneck"),
    "windowed": ((24,), "windowed"),
}
"""Blocks, 1-based, and feedback of each case."""
STAND_INS = ("mpi4py", "blobfile", "torchinfo", "einops")
"""Imported by the references but not needed for features; replaced where not installed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row measures."""

    case: str  # a key of CASES
    size: int  # height and width in pixels
    batch: int
    dtype: str
    mode: str  # forward, or forward and backward: "frozen", "finetuned"
    execution: str  # "eager" or "compiled"
    reference: str | None  # "cpu" is ours in float32 on the CPU, which is compared but not timed

    def __str__(self) -> str:
        text = f"{self.case} {self.size} px x {self.batch} {self.dtype} {self.mode} "
        return text + self.execution + (f" vs {self.reference}" if self.reference else "")


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenNoise:
    """Replaces diffssl's diffusion process: its input is x_t already."""

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return x_start

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t


class _FeatureHead(nn.Module):
    """Replaces diffssl's classification head: returns the features of the only timestep."""

    def forward(self, first_blocks, first, second_blocks, second, t) -> list[Tensor]:
        return [x for features in (*first, *second) for x in features]


class Measurements:
    """Loads one implementation of a case and measures it.

    Attributes:
        model: Its weights.
        features: Returns the maps of the taps, in ascending order of the blocks.
        dtype: The type it computes in, as a text.
        autocast: The type under autocast.
        watched: Parameters whose gradients are compared.
    """

    model: nn.Module
    features: Callable[[Tensor], Sequence[Tensor]]
    autocast: torch.dtype | None = None
    baseline = 0

    def prepare(
        self, unet: UNetConfig, checkpoint: str | None, folder: Path, strategies: Sequence[str]
    ) -> None:
        """Write the weights that all implementations load; random ones leave no layer at zero."""
        torch.manual_seed(0)
        model = UNet(unet)
        if checkpoint is not None:
            load_into(model, checkpoint)
        else:
            for module in model.modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and not weight.any():
                    module.reset_parameters()
        torch.save(model.state_dict(), folder / "weights.pt")
        layers: dict[str, dict[int, Any]] = {strategy: {} for strategy in strategies}
        for strategy in strategies:
            for source, layer in Feedback(unet, strategy).items():
                layer[1].running_mean.normal_()
                layer[1].running_var.uniform_(0.5, 1.5)
                layers[strategy][int(source)] = layer.state_dict()
        torch.save(layers, folder / "feedback.pt")

    def machine(self, device: str) -> dict[str, Any]:
        """Describe the machine."""
        return worker.describe_machine(device)

    def matmul_peak(self, device: str, dtype: str, seconds: float) -> float:
        """Return the most FLOP/s of square matrix products that take up to about ``seconds``."""
        from torch.utils.benchmark import Timer  # takes a second

        best, n, least = 0.0, 256, 0.0
        while least < seconds and n <= 16384:
            a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
            timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
            least = min(timer.blocked_autorange(min_run_time=seconds).times)
            best, n = max(best, 2 * n**3 / least), 2 * n
        return best

    def load(
        self,
        name: str,
        case: Case,
        unet: UNetConfig,
        folder: Path,
        device: str,
        checkout: Path | None,
        options: Any,
    ) -> str:
        """Build an implementation; return the type it computes in.

        Weights count as memory in use; loading them does not, nor does the code.

        Args:
            name: ``"ours"``, ``"cpu"`` or a reference.
            case: What is measured.
            unet: Architecture.
            folder: Holds the weights; outputs go there.
            device: ``"cpu"`` or ``"cuda"``.
            checkout: Code of the reference.
            options: The ``BenchmarkConfig``.
        """
        torch.backends.cudnn.benchmark = options.cudnn_benchmark
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        worker.reset_peak(device)
        self.baseline = worker.peak_bytes(device) if device == "cpu" else 0
        self.case, self.unet, self.folder, self.device = case, unet, folder, device
        self.stem, self.blocks, self.dtype = folder / name, CASES[case.case][0], case.dtype
        self.training, self.finetuned = case.mode != "forward", case.mode == "finetuned"
        self.half = None if case.dtype == "float32" else getattr(torch, case.dtype)
        self.watched: dict[str, Tensor] = {}
        strategy = CASES[case.case][1]
        self.feedback = torch.load(folder / "feedback.pt")[strategy] if strategy else {}
        shape = (case.batch, 3, case.size, case.size)
        inputs = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1
        if checkout is None:
            self._build_ours(options.activation_checkpointing)
            if options.channels_last:
                self.model.to(memory_format=torch.channels_last)
                inputs = inputs.contiguous(memory_format=torch.channels_last)
        else:
            inputs = NoiseSchedule(unet.noise_schedule).add_noise(inputs, TIMESTEP, None)
            guided = name == "guided-diffusion"
            build = self._build_guided_diffusion if guided else self._build_diffssl
            build(self._build_reference_unet(checkout))
        self.inputs = inputs.to(device)
        self.scales = [nn.Parameter(torch.ones((), device=device)) for _ in self.blocks]
        self.compiled, self.call = case.execution == "compiled", self.features
        if self.compiled:
            self.call = torch.compile(self.features, dynamic=False)
        return self.dtype + (" (autocast)" if self.autocast else "")

    def _build_ours(self, activation_checkpointing: bool) -> None:
        """Build this project's backbone as users call it, without added noise."""
        self.features = self.model = model = DiffusionBackbone(
            self.unet,
            self.folder / "weights.pt",
            timestep=TIMESTEP,
            blocks=self.blocks,
            feedback=CASES[self.case.case][1],
            out_channels=None,
            out_strides=None,
            noise="none",
            freeze=not self.finetuned,
            activation_checkpointing=activation_checkpointing,
        ).eval()
        if self.finetuned:
            self.watched["first"] = model.unet.input_blocks[0][0].weight
        for source, weights in self.feedback.items():
            layers = model.feedback[str(source)].train(self.training)
            layers.load_state_dict(weights)
            self.watched[str(source)] = layers[0].weight
        model.to(self.device)
        if self.half and not self.finetuned:
            model.unet.to(self.half)
        self.autocast = self.half if self.finetuned or self.feedback else None

    def _build_reference_unet(self, checkout: Path) -> nn.Module:
        """Build the references' U-Net with the weights.

        Half precision on a GPU is float16 by their own conversion, also beside ours in bfloat16,
        which they lack. On a CPU they run under autocast.
        """
        for name in STAND_INS:
            if name not in sys.modules and importlib.util.find_spec(name) is None:
                sys.modules[name] = _StandIn(name)
        sys.path.insert(0, str(checkout))
        from guided_diffusion.unet import UNetModel

        fields = dataclasses.asdict(self.unet)
        del fields["noise_schedule"]
        fields["attention_resolutions"] = fields.pop("attention_strides")
        for name in ("num_head_channels", "num_heads_upsample"):
            fields[name] = -1 if fields[name] is None else fields[name]
        self.converted = self.half is not None and self.device != "cpu"
        if self.converted:
            self.dtype = "float16"
        else:
            self.autocast = self.half
        unet = UNetModel(**fields, use_fp16=self.converted)
        unet.load_state_dict(torch.load(self.folder / "weights.pt", mmap=True))
        if self.finetuned:
            self.watched["first"] = unet.input_blocks[0][0].weight
        return unet

    def _build_guided_diffusion(self, unet: nn.Module) -> None:
        """Build OpenAI's U-Net, stopped after the last tap."""
        from guided_diffusion.nn import timestep_embedding

        self.model = unet.requires_grad_(self.finetuned).eval()
        if self.converted:
            unet.convert_to_fp16()
        unet.to(self.device)
        timesteps = torch.full((self.case.batch,), TIMESTEP, device=self.device)
        blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
        encoder = len(unet.input_blocks)

        def features(x_t: Tensor) -> list[Tensor]:
            emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels))
            taps, skips = [], []
            h = x_t.type(unet.dtype)
            for index, block in enumerate(blocks[: max(self.blocks)], start=1):
                if index > encoder + 1:
                    h = torch.cat([h, skips.pop()], dim=1)
                h = block(h, emb)
                if index <= encoder:
                    skips.append(h)
                if index in self.blocks:
                    taps.append(h)
            return taps

        self.features = features

    def _build_diffssl(self, unet: nn.Module) -> None:
        """Build the authors' model for classification, up to its head."""
        from ssl_diff import DM_FEAT_DIM_DICT, DiffSSLModelFeedbackFusion

        feedback, sources = self.feedback, sorted(self.feedback)
        channels = {b: info.channels for b, info in self.unet.blocks.items()}
        if feedback and channels != dict(DM_FEAT_DIM_DICT):
            text = "diffssl's feedback needs the channels of the 256-px models"
            raise worker.NotAvailableError(text)
        self.model = model = DiffSSLModelFeedbackFusion(
            unet,
            _GivenNoise(),
            _FeatureHead(),
            device=self.device,
            mode="finetune" if self.finetuned else "freeze",
            feedback_arch="C_B_R",
            use_feedback=bool(feedback),
            feedback_b_list=sources,
            first_fw_b_list=[] if feedback else list(self.blocks),
            second_fw_b_list=list(self.blocks) if feedback else [],
        ).eval()
        for source, layers in zip(sources, model.feedback_layers if feedback else ()):
            layers.train(self.training).load_state_dict(feedback[source])
            self.watched[str(source)] = layers[0].weight
        if self.converted:
            model.convert_to_fp16()
        else:
            model.convert_to_fp32()
        model.to(self.device)
        self.features = lambda x_t: model(x_t, [TIMESTEP])

    def run(self, call: Callable, record: Callable[[Sequence[Tensor]], Any] | None = None) -> None:
        """Run one step: ``call`` computes the features, ``record`` receives them."""
        autocast: Any = contextlib.nullcontext()
        if self.autocast:
            autocast = torch.autocast(self.device, self.autocast)
        with autocast, torch.set_grad_enabled(self.training):
            features = call(self.inputs)
            if record:
                record(features)
            if self.training:
                losses = [
                    scale * x.float().square().sum() / x.numel() ** 0.5
                    for scale, x in zip(self.scales, features)
                ]
                del features
                # Under autocast, as the references recompute attention in the backward pass.
                sum(losses).backward()

    def step(self, record: Callable[[Sequence[Tensor]], Any] | None = None) -> float:
        """Run one step as it is timed; return its seconds."""
        self.model.zero_grad(set_to_none=True)
        worker.synchronize(self.device)
        start = time.perf_counter()
        self.run(self.call, record)
        worker.synchronize(self.device)
        return time.perf_counter() - start

    def first(self) -> tuple[int, float]:
        """Run the first step, write outputs and gradients; return its peak bytes and seconds."""

        def record(features: Sequence[Tensor]) -> None:
            torch.save([x.detach().cpu().contiguous() for x in features], f"{self.stem}.outputs.pt")

        if self.compiled:
            self.step()  # the memory that compiling takes does not count
        worker.reset_peak(self.device)
        seconds = self.step(record)
        peak = worker.peak_bytes(self.device) - self.baseline
        found = {name: p.grad for name, p in self.watched.items() if p.grad is not None}
        grads = {name: grad.float().cpu() for name, grad in found.items()}
        torch.save(grads, f"{self.stem}.gradients.pt")
        self._rest()
        return peak, seconds

    def time(self, number: int) -> float:
        """Return the mean seconds of ``number`` steps."""
        seconds = sum(self.step() for _ in range(number))
        self._rest()
        return seconds / number

    def flops(self) -> int:
        """Return the floating-point operations of a step."""
        return worker.count_flops(lambda: self.run(self.features))

    def _rest(self) -> None:
        """Leave the memory to the other implementation."""
        self.model.zero_grad(set_to_none=True)
        if self.device != "cpu":
            torch.cuda.empty_cache()
