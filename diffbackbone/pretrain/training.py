"""The training run: options, loop, checkpoints, exports, samples."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributed.checkpoint import state_dict as distributed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffbackbone.checkpoint import load_checkpoint, read_checkpoint
from diffbackbone.cli import run_command
from diffbackbone.diffusion import NoiseSchedule
from diffbackbone.images import check_images
from diffbackbone.models.gd_config import UNetConfig, resolve_config
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.pretrain import data
from diffbackbone.pretrain.objective import DiffusionObjective, average_weights, rate_factor
from diffbackbone.pretrain.sampling import sample_ddim, save_grid
from diffbackbone.saving import guided_diffusion_flags, save_safetensors
from diffbackbone.utils import (
    RandomStream,
    UserError,
    atomic_write,
    changed_settings,
    lost_loss,
    save_figure,
    settings_of,
    write_json,
    write_json_lines,
)

FORMAT = "diffbackbone pretraining 2"
MAY_CHANGE = (
    "data", "out", "resume", "iterations", "lr_decay", "workers", "device", "checkpoint",
    "save_every", "sample_every", "samples", "sample_steps", "log_every", "log_with",
)  # fmt: skip
"""Options that may differ between a run and its continuation."""
FULL = distributed.StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclasses.dataclass
class PretrainConfig:
    """Train a guided-diffusion U-Net on a folder of images without labels.

    Start several processes by torchrun or accelerate launch; --use_fsdp --fsdp_version 2
    --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP of the latter shards the model. The same command
    with --resume continues an interrupted run; on a CPU the weights are those of an uninterrupted
    one to the bit. --out gets the averaged weights, for a backbone at any time of the run: unet.pt
    under guided-diffusion's names, with its flags in unet.json, and unet.safetensors with the
    architecture; samples/, loss.png and metrics.jsonl; and last.pt, the state of the run.
    """

    data: Path
    """Folder of images, searched recursively: of one channel, RGB, or .npy files (H, W, channels),
    whatever the U-Net's in_channels are."""
    out: Path
    """Folder of the run."""
    resume: bool = False
    """Continue the run in --out."""
    unet: str = "tiny"
    """A preset's name (gd64, gd128, gd256_uncond, gd512, tiny, ...) or JSON of UNetConfig's fields,
    which may start from a preset: '{"preset": "tiny", "dropout": 0.1}'."""
    size: int | None = None
    """Side of the crops; None takes the U-Net's."""
    learn_variance: bool = False
    """Learn the variance, as OpenAI's models do; doubles the output channels."""
    checkpoint: str | None = None
    """Weights to start from: a file or a URL."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass; needs less memory."""
    flip: bool = True
    """Mirror half of the crops; not for letters, digits, and where left is not right."""
    shrink: float | None = None
    """Shrink images whose short side is above this factor times the size (1.25 for photographs);
    None crops them as large as they are."""
    value_range: tuple[float, float] | None = None
    """Black and white of images deeper than 8 bits; None takes 0 65535 (integers), 0 1 (floats),
    and the range of the type (integers in .npy files)."""
    workers: int = dataclasses.field(default_factory=lambda: min(4, (os.cpu_count() or 1) - 1))
    """Processes that read images."""
    iterations: int = 100_000
    """Updates of the weights."""
    batch_size: int = 32
    """Images in an update, over all processes."""
    accumulate: int = 1
    """Parts in which each batch is computed, one after the other."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    warmup: int = 500
    """Iterations in which the learning rate rises."""
    lr_decay: int = 0
    """Last iterations, in which the learning rate falls to zero."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 doesn't clip."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights."""
    seed: int = 0
    """Seed of everything that is drawn."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 on a GPU that supports it, else float32."""
    compile: bool = False
    """Compile the U-Net: minutes at the start, faster afterwards."""
    save_every: int = 1000
    """Iterations between checkpoints."""
    sample_every: int = 5000
    """Iterations between samples; 0 samples at the end only."""
    samples: int = 16
    """Number of samples; 0 makes none."""
    sample_steps: int = 50
    """Steps of DDIM."""
    log_every: int = 50
    """Iterations between records of the loss."""
    log_with: Literal["tensorboard", "wandb"] | None = None
    """Experiment tracker that gets the records, too."""

    def __post_init__(self) -> None:
        counts = (
            self.iterations, self.batch_size, self.accumulate, self.save_every, self.log_every
        )  # fmt: skip
        valid = min(counts) >= 1 and 1 <= self.sample_steps <= 1000 and 0 <= self.ema_decay <= 1
        if not valid or (self.shrink or 1) < 1:
            raise UserError(
                "iterations, batch size, accumulate, shrink, save and log intervals must be at "
                "least 1, sample steps 1 to 1000 and the EMA decay 0 to 1"
            )


def read_architecture(config: PretrainConfig) -> UNetConfig:
    """Return the architecture that ``unet``, ``size`` and ``learn_variance`` describe."""
    try:
        unet = resolve_config(config.unet)
        unet = unet.replace(
            num_classes=None,
            out_channels=(2 if config.learn_variance else 1) * unet.in_channels,
            image_size=config.size or unet.image_size,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"--unet {config.unet}: {error}") from error
    stride = 2 ** (len(unet.channel_mult) - 1)
    if unet.image_size % stride:
        raise UserError(f"--size must be a multiple of {stride}, got {unet.image_size}")
    return unet


def start_accelerator(config: PretrainConfig) -> Accelerator:
    """Join the other processes, if any."""
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    gpu = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and gpu)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if bfloat16 else "no",
        gradient_accumulation_steps=config.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        dynamo_backend="inductor" if config.compile else None,
        log_with=config.log_with,
        project_config=ProjectConfiguration(logging_dir=str(config.out / "logs")),
    )
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size} is no multiple of {parts} "
            f"({accelerator.num_processes} processes x --accumulate {config.accumulate})"
        )
    return accelerator


class Pretraining:
    """A run: model, average, optimizer, and the iteration that it has reached."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.accelerator = accelerator = start_accelerator(config)
        self.unet_config = read_architecture(config)
        self.schedule = NoiseSchedule(self.unet_config.noise_schedule)
        self.objective = DiffusionObjective(self.schedule, config.learn_variance)
        paths = data.find_images(config.data)
        self.settings = {
            **settings_of(config),
            "unet": settings_of(self.unet_config),
            "size": self.unet_config.image_size,
            "images": data.describe_images(config.data, paths),
        }
        saved = self._find_run()
        if accelerator.is_main_process:
            check_images(paths, config.value_range, self.unet_config.in_channels)
        accelerator.wait_for_everyone()

        torch.manual_seed(config.seed)
        unet = UNet(self.unet_config, activation_checkpointing=config.activation_checkpointing)
        if config.checkpoint and saved is None:
            load_checkpoint(unet, config.checkpoint)
        unet._no_split_modules = ["Block"]  # FSDP's units
        self.average = average_weights(unet, config.ema_decay).to(accelerator.device)
        optimizer = torch.optim.AdamW(
            [{"params": list(unet.parameters()), "initial_lr": config.lr}],
            lr=config.lr, weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        if accelerator.distributed_type == DistributedType.FSDP:
            unused = torch.optim.SGD(self.average.module.parameters(), lr=0.0)
            self.average.module, _ = accelerator.prepare(self.average.module, unused)
        self.iteration = 0
        self.history: list[dict[str, float]] = []
        self.sums: Counter[str] = Counter()
        if saved is not None:
            self._load(saved)
        schedule = (config.warmup, config.iterations, config.lr_decay)
        factor = functools.partial(rate_factor, schedule=schedule)
        self.scheduler = LambdaLR(self.optimizer.optimizer, factor, self.iteration - 1)
        examples = data.Examples(
            paths, self.unet_config.image_size, self.schedule.num_timesteps, config.seed,
            config.flip, config.shrink, config.value_range, self.unet_config.in_channels,
        )  # fmt: skip
        loader = DataLoader(
            examples,
            batch_size=config.batch_size // config.accumulate,
            sampler=range(*(i * config.batch_size for i in (self.iteration, config.iterations))),
            num_workers=config.workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # its start must not draw from the global one
        )
        self.loader = accelerator.prepare(loader)
        self.interrupted = self.stopping = False

    def _find_run(self) -> dict[str, Any] | None:
        """Return the state of the run to resume; None for a new run."""
        out, path = self.config.out, self.config.out / "last.pt"
        if not self.config.resume:
            if path.exists() or (out / "unet.pt").exists():
                raise UserError(f"{out} contains a run: --resume it, or choose another --out")
            return None
        saved = read_checkpoint(path, mapped=False)
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise UserError(f"{path} is not a pretraining run's checkpoint")
        if changed := changed_settings(saved["settings"], self.settings, MAY_CHANGE):
            raise UserError(f"{path} has other settings:\n  " + "\n  ".join(changed))
        return saved

    def _load(self, saved: Mapping[str, Any]) -> None:
        distributed.set_state_dict(
            self.model, self.optimizer.optimizer, model_state_dict=saved["unet"],
            optim_state_dict=saved["optimizer"], options=FULL,
        )  # fmt: skip
        distributed.set_model_state_dict(self.average.module, saved["average"], options=FULL)
        self.iteration = saved["iteration"]
        self.average.n_averaged.fill_(self.iteration + 1)
        self.history, self.sums = list(saved["history"]), Counter(saved["sums"])
        self.accelerator.print(f"continuing at iteration {self.iteration}")

    def save(self) -> None:
        """Write the state of the run, then export the averaged weights and the loss."""
        unet, state = distributed.get_state_dict(self.model, self.optimizer.optimizer, options=FULL)
        average = distributed.get_model_state_dict(self.average.module, options=FULL)
        if self.accelerator.is_main_process:
            content = {
                "format": FORMAT, "settings": self.settings, "iteration": self.iteration,
                "unet": unet, "average": average, "optimizer": state,
                "history": self.history, "sums": dict(self.sums),
            }  # fmt: skip
            atomic_write(self.config.out / "last.pt", lambda file: torch.save(content, file))
            self._export(dict(average))
        self.accelerator.wait_for_everyone()

    def _export(self, weights: dict[str, Tensor]) -> None:
        out, unet = self.config.out, self.unet_config
        atomic_write(out / "unet.pt", lambda file: torch.save(weights, file))
        atomic_write(out / "unet.safetensors", lambda file: save_safetensors(file, weights, unet))
        try:
            flags: Any = guided_diffusion_flags(unet)
        except ValueError as error:
            flags = str(error)
        write_json(out / "unet.json", {"unet": settings_of(unet), "guided_diffusion": flags})
        write_json_lines(out / "metrics.jsonl", self.history)
        if self.history:
            plot_loss(self.history, out / "loss.png")

    def step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """Update the weights once.

        Returns:
            Means of the losses over the batch, and the norm of the gradient before clipping.

        Raises:
            UserError: One of them is not finite; the weights stay as they are.
        """
        config, accelerator = self.config, self.accelerator
        random = RandomStream.STEP.generator(config.seed, self.iteration, accelerator.process_index)
        torch.manual_seed(int(random.integers(2**63)))  # for dropout
        sums: dict[str, Tensor] = {}
        for _ in range(config.accumulate):
            batch = next(batches)
            x_t = self.schedule.add_noise(batch["x_start"], batch["t"], batch["noise"])
            with accelerator.accumulate(self.model):
                output = self.model(x_t, batch["t"])
                losses = self.objective(output, x_t=x_t, **batch)
                accelerator.backward(losses["loss"].mean())
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().mean() / config.accumulate
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        interrupted = torch.tensor(float(self.interrupted), device=accelerator.device)
        means = accelerator.reduce(torch.stack([*sums.values(), interrupted]), "mean").tolist()
        self.stopping = means.pop() > 0  # all processes stop at the same iteration
        values = {**dict(zip(sums, means)), "grad_norm": float(norm)}
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(lost_loss(f"{name} is {value} in iteration {self.iteration + 1}"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.average.update_parameters(self.model)
        self.iteration += 1
        return values

    def train(self) -> dict[str, float]:
        """Train to the end, or until SIGINT or SIGTERM; return the last record of the loss."""
        config, accelerator = self.config, self.accelerator
        accelerator.init_trackers("pretrain", {k: str(v) for k, v in self.settings.items()})
        self.model.train()
        batches = iter(self.loader)
        self.clock = time.perf_counter()
        bar = tqdm(
            total=config.iterations, initial=self.iteration, unit="iteration",
            disable=None if accelerator.is_main_process else True,
        )  # fmt: skip
        with bar, contextlib.ExitStack() as handlers:
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers.callback(signal.signal, number, signal.signal(number, self._interrupt))
            while self.iteration < config.iterations and not self.stopping:
                rate = self.scheduler.get_last_lr()[0]
                self.sums.update({**self.step(batches), "count": 1})
                bar.update()
                done = self.iteration == config.iterations
                if done or self.iteration % config.log_every == 0:
                    self._record(rate)
                if done or self.stopping or self.iteration % config.save_every == 0:
                    self.save()
                if done or (config.sample_every and self.iteration % config.sample_every == 0):
                    self.sample()
        state = "stopped; --resume continues" if self.stopping else f"done, see {config.out}"
        accelerator.print(f"iteration {self.iteration}: {state}")
        accelerator.end_training()
        return self.history[-1] if self.history else {}

    def _record(self, rate: float) -> None:
        """Record the means since the last record, and the learning rate."""
        count, clock = self.sums.pop("count"), time.perf_counter()
        record = {"iteration": self.iteration, "lr": rate}
        record |= {name: value / count for name, value in self.sums.items()}
        record["images_per_second"] = self.config.batch_size * count / (clock - self.clock)
        self.clock = clock
        self.sums.clear()
        self.history.append(record)
        self.accelerator.log(record, step=self.iteration)
        if self.accelerator.is_main_process:
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in record.items()))

    def _interrupt(self, number: int, frame: Any) -> None:
        """Stop after the current iteration; a second signal ends the process at once."""
        self.interrupted = True
        signal.signal(number, signal.SIG_DFL)

    def sample(self) -> None:
        """Write samples of the averaged weights, of the same noise each time."""
        config, accelerator = self.config, self.accelerator
        if not config.samples:
            return
        share = math.ceil(config.samples / accelerator.num_processes)
        first, unet = accelerator.process_index * share, self.unet_config
        size, channels = unet.image_size, unet.in_channels
        noise = [
            data.draw_noise(RandomStream.SAMPLES, config.seed, number, size, channels)
            for number in range(first, first + share)
        ]
        batch_size = config.batch_size // (accelerator.num_processes * config.accumulate)
        with accelerator.autocast():
            parts = [
                sample_ddim(
                    self.average, self.schedule, x.to(accelerator.device), config.sample_steps
                )
                for x in torch.stack(noise).split(batch_size)
            ]
        images = accelerator.gather(torch.cat(parts))[: config.samples].cpu()
        if accelerator.is_main_process:
            save_grid(images, config.out / "samples" / f"{self.iteration:07d}.png")
        accelerator.wait_for_everyone()


def plot_loss(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot the simple loss over the iterations, both logarithmic."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog([r["iteration"] for r in history], [r["simple"] for r in history], marker=".")
    axes.set(xlabel="iteration", ylabel="simple loss")
    axes.grid(which="both", alpha=0.3)
    save_figure(figure, path)


def run(config: PretrainConfig) -> dict[str, float]:
    """Train, and return the last record of the loss."""
    return Pretraining(config).train()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(PretrainConfig, run, argv)
