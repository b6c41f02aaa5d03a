"""Our backbone and the published implementations, each running the same pass.

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
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from diffbackbone import DiffusionBackbone, Feedback, NoiseSchedule, UNet, UNetConfig
from diffbackbone import load_checkpoint as load_into
from diffbackbone.benchmark.config import PASSES, BenchmarkConfig, Case
from diffbackbone.costs import counting_flops

TIMESTEP = 90
STAND_INS = ("mpi4py", "blobfile", "torchinfo", "einops")
"""Imported by the references but not needed for features; replaced where not installed."""


def write_weights(config: BenchmarkConfig, folder: Path) -> None:
    """Write the weights that all implementations load; random ones leave no layer at zero."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig.from_preset(config.unet).replace(num_classes=None))
    if config.checkpoint is not None:
        load_into(unet, config.checkpoint)
    else:
        for module in unet.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and not weight.any():
                module.reset_parameters()
    torch.save(unet.state_dict(), folder / "weights.pt")
    for strategy in {PASSES[name][1] for name in config.cases if name in PASSES} - {None}:
        layers = Feedback(unet.config, strategy)
        for layer in layers.values():
            layer[1].running_mean.normal_()
            layer[1].running_var.uniform_(0.5, 1.5)
        weights = {int(source): layer.state_dict() for source, layer in layers.items()}
        torch.save(weights, folder / f"{strategy}.pt")


class Pass:
    """One implementation's forward pass, in training also the backward pass.

    Args:
        who: ``"ours"``, ``"cpu"`` (ours in float32 there) or a reference.
        case: What is measured.
        config: The options.
        folder: Holds the weights; outputs and gradients of the first step go there.

    Attributes:
        model: Its weights.
        features: Returns the maps of the taps, in ascending order of the blocks.
        dtype: The type it computes in, as a text.
        watched: Parameters whose gradients are compared.
    """

    model: nn.Module
    features: Callable[[Tensor], Sequence[Tensor]]
    autocast: torch.dtype | None = None

    def __init__(self, who: str, case: Case, config: BenchmarkConfig, folder: Path) -> None:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.device = config.device
        if who == "cpu":
            self.device, case = "cpu", dataclasses.replace(case, dtype="float32", execution="eager")
        self.case, self.config, self.folder, self.dtype = case, config, folder, case.dtype
        self.out, self.watched = folder / f"{who}.pt", {}
        self.unet = UNetConfig.from_preset(config.unet).replace(num_classes=None)
        self.blocks, self.strategy = PASSES[case.name]
        self.feedback = torch.load(folder / f"{self.strategy}.pt") if self.strategy else {}
        self.training, self.finetuned = case.mode != "forward", case.mode == "finetuned"
        self.half = None if case.dtype == "float32" else getattr(torch, case.dtype)
        shape = (case.batch, 3, case.size, case.size)
        inputs = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1
        if who in ("ours", "cpu"):
            self._build_ours()
        else:
            inputs = NoiseSchedule(self.unet.noise_schedule).add_noise(inputs, TIMESTEP, None)
            sys.path.insert(0, str(config.checkouts()[who]))
            unet = self._build_reference_unet()
            (self._build_diffssl if who == "diffssl" else self._build_guided_diffusion)(unet)
        self.inputs = inputs.to(self.device)
        self.compiled = self.features
        if case.execution == "compiled":
            self.compiled = torch.compile(self.features, dynamic=False)
        if self.autocast:
            self.dtype += " (autocast)"

    def _build_ours(self) -> None:
        """Build this project's backbone as users call it, without added noise."""
        self.features = self.model = model = DiffusionBackbone(
            self.unet,
            self.folder / "weights.pt",
            timestep=TIMESTEP,
            blocks=self.blocks,
            feedback=self.strategy,
            out_channels=None,
            out_strides=None,
            noise="none",
            freeze=not self.finetuned,
            activation_checkpointing=bool(self.config.activation_checkpointing),
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

    def _build_reference_unet(self) -> nn.Module:
        """Build the references' U-Net with the weights.

        Half precision on a GPU is float16 by their own conversion, also beside ours in bfloat16,
        which they lack. On a CPU they run under autocast.
        """
        for name in STAND_INS:
            if name not in sys.modules and importlib.util.find_spec(name) is None:
                sys.modules[name] = MagicMock()
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
            raise NotImplementedError("diffssl's feedback needs the channels of the 256-px models")
        given_noise = types.SimpleNamespace(  # its diffusion process: the input is x_t already
            q_sample=lambda x_start, t, noise: x_start, _scale_timesteps=lambda t: t
        )
        self.model = model = DiffSSLModelFeedbackFusion(
            unet,
            given_noise,
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

    def run(self, features: Callable, keep: bool = False) -> list[Tensor]:
        """Run the pass; return copies of the maps where they are kept."""
        autocast: Any = contextlib.nullcontext()
        if self.autocast:
            autocast = torch.autocast(self.device, self.autocast)
        with autocast, torch.set_grad_enabled(self.training):
            maps = features(self.inputs)
            kept = [x.detach().cpu().contiguous() for x in maps] if keep else []
            loss = sum(x.float().square().sum() / x.numel() ** 0.5 for x in maps)
            if loss.requires_grad:
                loss.backward()  # under autocast, as the references recompute attention in it
        return kept

    def first(self) -> int:
        """Run the pass and write outputs and gradients; return the floating-point operations."""
        with counting_flops() as counter:
            outputs = self.run(self.features, keep=True)
        if self.compiled is not self.features:
            self.model.zero_grad(set_to_none=True)
            outputs = self.run(self.compiled, keep=True)
        found = {name: p.grad for name, p in self.watched.items() if p.grad is not None}
        gradients = {name: grad.float().cpu() for name, grad in found.items()}
        torch.save({"outputs": outputs, "gradients": gradients}, self.out)
        self.model.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def step(self) -> dict[str, float]:
        """Run the pass; return its seconds."""
        start = timer()
        self.run(self.compiled)
        seconds = timer() - start
        self.model.zero_grad(set_to_none=True)
        return {"step": seconds}


build = Pass


class _FeatureHead(nn.Module):
    """Replaces diffssl's classification head: returns the features of the only timestep."""

    def forward(self, first_blocks, first, second_blocks, second, t) -> list[Tensor]:
        return [x for features in (*first, *second) for x in features]
