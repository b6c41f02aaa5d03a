r"""Train a guided-diffusion U-Net on a folder of images without labels.

Images lie anywhere below DIR. ::

    python tools/pretrain.py --data DIR --unet tiny --iterations 20000 --out work_dirs/pretrain
    torchrun --nproc_per_node 8 tools/pretrain.py --data DIR --unet gd256_uncond \
        --learn-variance --batch-size 64 --accumulate 2 --out work_dirs/gd256
    python tools/pretrain.py --list

The same command with ``--resume`` goes on after an interruption.

The objective is the simple loss (Eq. 4); ``--learn-variance`` adds the learned variance of OpenAI's
models, which doubles the output channels. OUT gets

* ``unet.pt``: the averaged weights under guided-diffusion's names, tensors alone. Its own code
  loads them with the flags in ``unet.json``;
* ``unet.safetensors``: the same, in half precision if asked for, with the architecture inside;
* ``samples/``: pictures made by 50 steps of DDIM from the same noise each time;
* ``loss.png``, ``metrics.jsonl``: the loss;
* ``last.pt``, ``previous.pt``: all that ``--resume`` needs.

Weights in OUT can be used at any time as ``checkpoint`` of a backbone. Images, crops, flips,
timesteps and noise follow from the seed and the number of the image in the run alone, so a run that
was killed and resumed ends with the weights of one that was not (on a CPU to the bit).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _classification as common
import _common
import numpy as np
import torch
from _classification import ImageFolder, Processes, ToolError
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from diffbackbone.checkpoint import load_checkpoint, read_checkpoint
from diffbackbone.diffusion import NoiseSchedule
from diffbackbone.images import normalize, resize, to_tensor
from diffbackbone.models.gd_config import PRESETS, UNetConfig, resolve_config
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.pretrain.objective import (
    DiffusionObjective,
    Ema,
    learning_rate,
    sample_ddim,
)
from diffbackbone.saving import guided_diffusion_flags, save_safetensors

FORMAT = "diffbackbone pretraining 1"
EXPORT_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16
}  # fmt: skip
_ORDER, _CROP, _FLIP, _TIMESTEP, _NOISE, _DROPOUT, _SAMPLES = range(7)
_FREE = {  # may differ between a run and its continuation
    "data", "out", "resume", "iterations", "lr_decay", "workers", "device", "save_every",
    "sample_every", "samples", "sample_steps", "log_every", "export_dtype", "checkpoint", "list",
}  # fmt: skip
_DIVERGED = (
    "Nothing was overwritten: last.pt and the weights are those saved last. Try a lower --lr, a "
    "longer --warmup or a lower --clip{precision}, in a new --out"
)


# -------------------------------------------------------------------------------------- arguments


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        ToolError: Options don't go together.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the presets, train nothing")
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DIR", help="folder of images, searched recursively")
    group.add_argument("--size", type=int, help="side of the crops; default: the U-Net's")
    group.add_argument(
        "--no-flip", dest="flip", action="store_false",
        help="don't mirror at random: for letters, digits, and wherever left is not right",
    )  # fmt: skip
    group.add_argument(
        "--shrink", type=float, metavar="F",
        help="shrink images whose short side is above F x size to that (1.25 for photographs); "
        "default: crop them as large as they are",
    )  # fmt: skip
    group.add_argument("--workers", type=int, help="processes that read images")
    common.add_value_range(group)
    group = parser.add_argument_group("U-Net")
    group.add_argument(
        "--unet", default="tiny",
        help="a preset (see --list), or JSON of UNetConfig's fields, which may start from one: "
        '\'{"preset": "tiny", "dropout": 0.1}\'; default: tiny',
    )  # fmt: skip
    group.add_argument(
        "--learn-variance", action="store_true", help="6 output channels, as OpenAI's models"
    )
    group.add_argument("--checkpoint", metavar="FILE", help="weights to start from")
    group.add_argument("--activation-checkpointing", action="store_true", help="save memory")
    group = parser.add_argument_group("training")
    group.add_argument("--iterations", type=int, default=100_000, help="default: 100000")
    group.add_argument("--batch-size", type=int, default=32, help="of all processes; default: 32")
    group.add_argument(
        "--accumulate", type=int, default=1, help="parts that each batch is computed in"
    )
    group.add_argument("--lr", type=float, default=1e-4, help="default: 1e-4")
    group.add_argument("--warmup", type=int, default=500, help="iterations; default: 500")
    group.add_argument(
        "--lr-decay", type=int, default=0, help="last iterations that the rate falls over to zero"
    )
    group.add_argument("--weight-decay", type=float, default=0.0, help="default: 0")
    group.add_argument("--clip", type=float, default=1.0, help="norm of gradients; 0: no clipping")
    group.add_argument("--ema-decay", type=float, default=0.9999, help="default: 0.9999")
    group.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on a GPU that has it, float32 else; bfloat16 works on a CPU, too",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true", help="torch.compile: minutes at the start, faster after"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help="folder of the run")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--save-every", type=int, default=1000, help="default: 1000")
    group.add_argument("--sample-every", type=int, default=5000, help="0: at the end only")
    group.add_argument("--samples", type=int, default=16, help="pictures; 0: none")
    group.add_argument("--sample-steps", type=int, default=50, help="of DDIM; default: 50")
    group.add_argument("--log-every", type=int, default=50, help="default: 50")
    group.add_argument(
        "--export-dtype", choices=sorted(EXPORT_DTYPES), default="float32",
        help="of unet.safetensors; float16 halves it",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not args.list:
        _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    if args.data is None or args.out is None:
        raise ToolError("give --data DIR (images) and --out DIR (the run), or --list")
    for name, least in (
        ("iterations", 1), ("batch_size", 1), ("accumulate", 1), ("warmup", 0), ("lr_decay", 0),
        ("seed", 0), ("save_every", 1), ("sample_every", 0), ("samples", 0), ("log_every", 1),
    ):  # fmt: skip
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            raise ToolError(f"--{option} must be at least {least}, got {getattr(args, name)}")
    for name, low, high in (("lr", 0, math.inf), ("weight_decay", None, math.inf),
                            ("clip", None, math.inf), ("ema_decay", None, 1)):  # fmt: skip
        value = getattr(args, name)
        if not (value < high and (value >= 0 if low is None else value > low)):
            bounds = "above 0" if low == 0 else "at least 0" + (" and below 1" if high == 1 else "")
            raise ToolError(f"--{name.replace('_', '-')} must be {bounds}, got {value}")
    if args.shrink is not None and not 1 <= args.shrink < math.inf:
        raise ToolError(f"--shrink must be at least 1, got {args.shrink}")
    if not 1 <= args.sample_steps <= 1000:
        raise ToolError(f"--sample-steps must lie in 1..1000, got {args.sample_steps}")
    if args.workers is None:
        args.workers = min(4, (os.cpu_count() or 1) - 1)
    if args.workers < 0:
        raise ToolError(f"--workers must be at least 0, got {args.workers}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % (world * args.accumulate):
        raise ToolError(
            f"--batch-size {args.batch_size} is no multiple of {world * args.accumulate} "
            f"({world} processes x --accumulate {args.accumulate})"
        )


def read_unet(text: str, size: int | None, learn_variance: bool) -> UNetConfig:
    """The architecture that ``--unet``, ``--size`` and ``--learn-variance`` describe.

    Raises:
        ToolError: It is unknown, or the size does not fit.
    """
    given: Any = text
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ToolError(f"--unet {text}: not JSON: {error}") from error
    try:
        config = resolve_config(given)
        config = config.replace(
            num_classes=None,
            out_channels=(2 if learn_variance else 1) * config.in_channels,
            image_size=config.image_size if size is None else size,
        )
    except (ValueError, TypeError) as error:
        raise ToolError(f"--unet {text}: {error}") from error
    if config.in_channels != 3:
        raise ToolError(f"--unet {text}: images are RGB, so in_channels must be 3")
    deepest = 2 ** (len(config.channel_mult) - 1)
    if config.image_size < deepest or config.image_size % deepest:
        below = max(config.image_size // deepest, 1) * deepest
        raise ToolError(
            f"--size {config.image_size}: this U-Net needs a multiple of {deepest}, such as "
            f"{below} or {below + deepest}"
        )
    return config


def list_presets() -> str:
    """A table of the presets."""
    lines = [f"{'preset':14} {'size':>5} {'blocks':>7} {'parameters':>11}  schedule"]
    for name, config in PRESETS.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in UNet(config.replace(num_classes=None)).parameters())
        lines.append(
            f"{name:14} {config.image_size:>5} {len(config.blocks):>7} {count / 1e6:>10.1f}M  "
            f"{config.noise_schedule}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- data


def _random(seed: int, kind: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, kind, number])


def _generator_seed(seed: int, kind: int, number: int) -> int:
    state = np.random.SeedSequence([seed, kind, number]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


class Crops(Dataset):
    """Random crops by their number in the run; each image comes once in an epoch.

    Args:
        folder: The images.
        size: Height and width.
        seed: Order, crops and flips follow from it and the number.
        flip: Whether half of the crops are mirrored.
        shrink: Images are shrunk to a short side of ``shrink * size`` at most; None doesn't.
    """

    def __init__(
        self, folder: ImageFolder, size: int, seed: int, flip: bool, shrink: float | None = None
    ) -> None:
        self.folder = folder
        self.size = size
        self.seed = seed
        self.flip = flip
        self.shrink = shrink
        self._order: tuple[int, np.ndarray] | None = None

    def index(self, number: int) -> int:
        """Which image has a number in the run."""
        epoch, position = divmod(number, len(self.folder.listing))
        if self._order is None or self._order[0] != epoch:
            order = _random(self.seed, _ORDER, epoch).permutation(len(self.folder.listing))
            self._order = (epoch, order)
        return int(self._order[1][position])

    def __getitem__(self, number: int) -> Tensor:
        """The crop (3, size, size), uint8 or float32 as in :mod:`diffbackbone.images`."""
        pixels = self.folder.read(self.index(number))
        short = min(pixels.shape[:2])
        wanted = max(short, self.size)
        if self.shrink is not None:
            wanted = min(wanted, round(self.shrink * self.size))
        if wanted != short:
            height, width = (max(wanted, round(side * wanted / short)) for side in pixels.shape[:2])
            pixels = resize(pixels, (width, height))
        random = _random(self.seed, _CROP, number)
        left, top = (int(random.integers(pixels.shape[i] - self.size + 1)) for i in (1, 0))
        pixels = pixels[top : top + self.size, left : left + self.size]
        if self.flip and _random(self.seed, _FLIP, number).random() < 0.5:
            pixels = pixels[:, ::-1]
        return to_tensor(pixels)


def stack(crops: Sequence[Tensor]) -> Tensor:
    """A batch (N, 3, size, size), uint8 if all are."""
    if len({crop.dtype for crop in crops}) > 1:
        crops = [crop if crop.is_floating_point() else crop / 255 for crop in crops]
    return torch.stack(list(crops))


def draw(
    seed: int, numbers: Sequence[int], shape: Sequence[int], num_timesteps: int, device: Any
) -> tuple[Tensor, Tensor]:
    """Timesteps and noise of the images with these numbers in the run.

    Args:
        seed: Of the run.
        numbers: One for each image.
        shape: Of an image.
        num_timesteps: T.
        device: Where to put them.

    Returns:
        0-based timesteps (N,) and noise (N, C, H, W).
    """
    device = torch.device(device)
    t = [int(_random(seed, _TIMESTEP, n).integers(num_timesteps)) for n in numbers]
    noise = torch.empty(len(numbers), *shape, device=device)
    generator = torch.Generator(device)
    for row, number in zip(noise, numbers):
        row.normal_(generator=generator.manual_seed(_generator_seed(seed, _NOISE, number)))
    return torch.tensor(t, device=device), noise


# --------------------------------------------------------------------------------------- training


class Pretraining:
    """A run: model, averages, optimiser, and where it stands.

    Args:
        args: Of :func:`parse`.
        processes: Of the run.
    """

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        self.args = args
        self.processes = processes
        self.out = Path(args.out).expanduser()
        self.device = processes.device
        self.config = read_unet(args.unet, args.size, args.learn_variance)
        self.schedule = NoiseSchedule(self.config.noise_schedule)
        self.folder = common.list_images(Path(args.data).expanduser(), args.value_range)
        self.settings = self._settings()
        self.dtype = self._compute_dtype()
        saved = self._find_run()
        if args.checkpoint and saved is None:
            _common.check_checkpoint(args.checkpoint)
        if processes.first:
            common.check_images(self.folder)
        processes.barrier()

        torch.manual_seed(args.seed)
        self.unet = UNet(self.config, activation_checkpointing=args.activation_checkpointing)
        if args.checkpoint and saved is None:
            load_checkpoint(self.unet, args.checkpoint)
        self.unet.to(self.device)
        self.objective = DiffusionObjective(self.schedule, args.learn_variance)
        self.ema = Ema(self.unet, args.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        self.iteration = 0
        self.history: list[dict[str, float]] = []
        self.sums: dict[str, float] = {}
        if saved is not None:
            self._load(saved)
        self.model: nn.Module = self.unet
        if processes.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.unet, device_ids=ids)
        self.no_sync = getattr(self.model, "no_sync", contextlib.nullcontext)
        if args.compile:
            self.model = torch.compile(self.model)
        self.stopping = False
        self.saved_at = self.iteration if saved is not None else None

    def _settings(self) -> dict[str, Any]:
        """What a continuation has to agree with."""
        settings = {k: v for k, v in vars(self.args).items() if k not in _FREE}
        settings["unet"] = json.loads(json.dumps(dataclasses.asdict(self.config)))
        settings["size"] = self.config.image_size
        listing = self.folder.listing
        names = "\n".join(f"{p}\t{s}" for p, s in zip(listing.paths, listing.sizes))
        digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
        settings["images"] = f"{len(listing)} images, {digest[:16]}"
        return settings

    def _compute_dtype(self) -> torch.dtype | None:
        precision = self.args.precision
        if precision == "auto":
            gpu = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
            precision = "bfloat16" if gpu else "float32"
        return torch.bfloat16 if precision == "bfloat16" else None

    # ------------------------------------------------------------------------------- checkpoints

    def _find_run(self) -> dict[str, Any] | None:
        """The checkpoint to go on from; the one before, where the last is damaged."""
        paths = [path for name in ("last.pt", "previous.pt") if (path := self.out / name).exists()]
        if not self.args.resume:
            if paths or (self.out / "unet.pt").exists():
                raise ToolError(
                    f"{self.out} holds a run already: --resume goes on with it, another --out "
                    "starts anew"
                )
            return None
        if not paths:
            raise ToolError(f"--resume: {self.out} holds no checkpoint (last.pt, previous.pt)")
        problems = []
        for path in paths:
            try:
                saved = read_run(path)
            except ToolError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                self.processes.say(f"warning: {problem}; going on from {path.name}")
            self._check_settings(saved["settings"], path)
            return saved
        raise ToolError("; ".join(problems))

    def _check_settings(self, saved: Mapping[str, Any], path: Path) -> None:
        differences = [
            f"{name}: {saved.get(name)!r} there, {value!r} now"
            for name, value in self.settings.items()
            if saved.get(name) != value
        ]
        if differences:
            raise ToolError(
                f"{path} is of a run with other settings:\n  " + "\n  ".join(differences)
            )

    def _load(self, saved: Mapping[str, Any]) -> None:
        self.unet.load_state_dict(saved["unet"])
        for name, value in self.ema.weights.items():
            value.copy_(saved["ema"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.iteration = saved["iteration"]
        self.history = list(saved["history"])
        self.sums = dict(saved["sums"])
        self.processes.say(f"going on from iteration {self.iteration}")

    def save(self) -> None:
        """Write checkpoint, weights and loss; the last checkpoint becomes the previous one."""
        if self.processes.first and self.saved_at != self.iteration:
            content = {
                "format": FORMAT,
                "settings": self.settings,
                "iteration": self.iteration,
                "unet": self.unet.state_dict(),
                "ema": self.ema.weights,
                "optimizer": self.optimizer.state_dict(),
                "history": self.history,
                "sums": self.sums,
            }
            last, new = self.out / "last.pt", self.out / "new.pt"
            common.write_whole(new, lambda partial: torch.save(content, partial))
            if last.exists():
                os.replace(last, self.out / "previous.pt")
            os.replace(new, last)
            self.saved_at = self.iteration
            self._export()
        self.processes.barrier()

    def _export(self) -> None:
        weights = {name: value.cpu() for name, value in self.ema.weights.items()}
        common.write_whole(self.out / "unet.pt", lambda partial: torch.save(weights, partial))
        dtype = EXPORT_DTYPES[self.args.export_dtype]
        try:
            common.write_whole(
                self.out / "unet.safetensors",
                lambda partial: save_safetensors(partial, weights, self.config, dtype),
            )
        except ToolError:
            raise
        except ValueError as error:
            raise ToolError(f"{error}; take another --export-dtype") from error
        common.write_lines(self.out / "metrics.jsonl", self.history)
        if self.history:
            _write_picture(self.out / "loss.png", draw_loss(self.history))

    # -------------------------------------------------------------------------------------- steps

    def _numbers(self, iteration: int) -> list[list[int]]:
        """Numbers in the run of this process's images, in the parts that a batch is computed in."""
        args, world = self.args, self.processes.world_size
        part = args.batch_size // (world * args.accumulate)
        first = iteration * args.batch_size + self.processes.rank * part * args.accumulate
        return [
            list(range(first + i * part, first + (i + 1) * part)) for i in range(args.accumulate)
        ]

    def _batches(self) -> Iterator[Tensor]:
        crops = Crops(
            self.folder, self.config.image_size, self.args.seed, self.args.flip, self.args.shrink
        )
        parts = _Parts(self._numbers, self.iteration, self.args.iterations, self.args.accumulate)
        loader = DataLoader(
            crops,
            batch_sampler=parts,
            num_workers=self.args.workers,
            collate_fn=stack,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        return iter(loader)

    def step(self, batches: Iterator[Tensor]) -> dict[str, float]:
        """One update of the weights.

        Raises:
            ToolError: The loss or the gradient is not finite; the weights stay as they are.
        """
        args, index = self.args, self.iteration
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, index, args.warmup, args.iterations, args.lr_decay)
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        rank = self.processes.rank
        torch.manual_seed(_generator_seed(args.seed, _DROPOUT, index * 65536 + rank))
        parts = self._numbers(index)
        for number, part in enumerate(parts):
            x_start = normalize(next(batches).to(self.device, non_blocking=True))
            t, noise = draw(
                args.seed, part, x_start.shape[1:], self.schedule.num_timesteps, self.device
            )
            x_t = self.schedule.add_noise(x_start, t, noise)
            with contextlib.nullcontext() if number == len(parts) - 1 else self.no_sync():
                with common.autocast(self.device, self.dtype):
                    output = self.model(x_t, t)
                terms = self.objective(output, x_start, x_t, t, noise)
                (terms["loss"].mean() / len(parts)).backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0) + value.detach().mean() / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(
            self.unet.parameters(), args.clip or math.inf, foreach=True
        )
        values = self.processes.sum(torch.stack(list(totals.values())).double())
        values = dict(zip(totals, (values / self.processes.world_size).tolist()))
        values["grad_norm"] = float(norm)
        for name, value in values.items():
            if not math.isfinite(value):
                precision = " or --precision float32" if self.dtype is not None else ""
                raise ToolError(
                    f"iteration {index + 1}: {name} is {value}. "
                    + _DIVERGED.format(precision=precision)
                )
        self.optimizer.step()
        self.ema.update(self.unet, index)
        self.iteration += 1
        return values

    def train(self) -> dict[str, float]:
        """Train to the end, or until the process is asked to stop.

        Returns:
            The last record of the loss.
        """
        args, processes = self.args, self.processes
        if processes.first:
            self.out.mkdir(parents=True, exist_ok=True)
            common.write_json(self.out / "unet.json", self._description())
        if self.iteration >= args.iterations:
            processes.say(f"{self.out} is at iteration {self.iteration} already")
        self._say_start()
        self.model.train()
        batches = self._batches()
        times: deque[float] = deque([time.perf_counter()], maxlen=51)
        while self.iteration < args.iterations and not self.stopping:
            values = self.step(batches)
            times.append(time.perf_counter())
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.sums["count"] = self.sums.get("count", 0) + 1
            if self.iteration % args.log_every == 0 or self.iteration == args.iterations:
                self._record((times[-1] - times[0]) / (len(times) - 1))
            if self.iteration % args.save_every == 0:
                self.save()
            if args.sample_every and self.iteration % args.sample_every == 0:
                self.sample()
        self.save()
        if self.stopping:
            processes.say(f"stopped at iteration {self.iteration}; --resume goes on from there")
        else:
            self.sample()
            processes.say(f"{self.out}: unet.pt, unet.safetensors, unet.json, loss.png, samples")
        return self.history[-1] if self.history else {}

    def _description(self) -> dict[str, Any]:
        try:
            flags: Any = guided_diffusion_flags(self.config)
        except ValueError as error:
            flags = str(error)
        return {"unet": dataclasses.asdict(self.config), "guided_diffusion": flags}

    def _say_start(self) -> None:
        count = sum(p.numel() for p in self.unet.parameters()) / 1e6
        precision = "float32" if self.dtype is None else "bfloat16"
        self.processes.say(
            f"{len(self.folder.listing)} images, {count:.1f}M parameters, "
            f"{self.config.image_size} px, batches of {self.args.batch_size}, "
            f"{self.processes.world_size} process(es) on {self.device.type}, {precision}"
        )

    def _record(self, seconds: float) -> None:
        """Keep the mean of what was counted since the last record, and say it."""
        count = self.sums.pop("count")
        record: dict[str, float] = {"iteration": self.iteration}
        record.update({name: value / count for name, value in self.sums.items()})
        record["lr"] = self.optimizer.param_groups[0]["lr"]
        record["images_per_second"] = self.args.batch_size / seconds
        self.sums = {}
        self.history.append(record)
        text = f"iteration {self.iteration}/{self.args.iterations}: loss {record['loss']:.4f}"
        if "vlb" in record:
            text += f" (simple {record['simple']:.4f}, vlb {record['vlb']:.2f} bits)"
        left = (self.args.iterations - self.iteration) * seconds
        self.processes.say(
            f"{text}, gradient {record['grad_norm']:.2f}, "
            f"{record['images_per_second']:.1f} images/s, {_duration(left)} left"
        )

    # ------------------------------------------------------------------------------------ samples

    def sample(self) -> None:
        """Write a picture of samples of the averaged weights."""
        path = self.out / "samples" / f"{self.iteration:07d}.png"
        if self.processes.first and self.args.samples and not path.exists():
            unet = copy.deepcopy(self.unet).eval()
            unet.load_state_dict(self.ema.weights)
            _write_picture(path, draw_grid(self._images(unet)))
        self.processes.barrier()

    def _images(self, unet: UNet) -> Tensor:
        """Samples (N, 3, H, W) in [-1, 1], of the same noise in each call."""
        size = self.config.image_size
        generator = torch.Generator().manual_seed(_generator_seed(self.args.seed, _SAMPLES, 0))
        noise = torch.randn(self.args.samples, 3, size, size, generator=generator)
        made = []
        for part in noise.split(max(1, self.args.batch_size // self.processes.world_size)):
            with common.autocast(self.device, self.dtype):
                made.append(
                    sample_ddim(
                        unet, self.schedule, part.to(self.device), self.args.sample_steps
                    ).cpu()
                )
        return torch.cat(made)


class _Parts:
    """Batch sampler: the parts of every batch that is left."""

    def __init__(self, numbers: Any, first: int, last: int, accumulate: int) -> None:
        self.numbers, self.first, self.last, self.accumulate = numbers, first, last, accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in range(self.first, self.last):
            yield from self.numbers(iteration)

    def __len__(self) -> int:
        return max(self.last - self.first, 0) * self.accumulate


def read_run(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run: weights and plain values, no code.

    Raises:
        ToolError: It is damaged or something else.
    """
    try:
        content = read_checkpoint(path, mapped=False)
    except Exception as error:  # a damaged file can fail in the reader in any way
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ToolError(f"{path} is damaged or holds more than weights: {first}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ToolError(f"{path} is no checkpoint of this tool's runs")
    return content


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


# --------------------------------------------------------------------------------------- pictures


def _write_picture(path: Path, picture: Image.Image) -> None:
    common.write_whole(path, lambda partial: picture.save(partial, format="PNG"))


def draw_grid(images: Tensor, margin: int = 2) -> Image.Image:
    """Put images (N, 3, H, W) in [-1, 1] side by side."""
    count, _, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = (columns * (width + margin) + margin, rows * (height + margin) + margin)
    picture = Image.new("RGB", size, "white")
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    for index, one in enumerate(pixels.numpy()):
        row, column = divmod(index, columns)
        place = (margin + column * (width + margin), margin + row * (height + margin))
        picture.paste(Image.fromarray(one), place)
    return picture


def draw_loss(history: Sequence[Mapping[str, float]]) -> Image.Image:
    """Curve of the simple loss over the iterations, both axes logarithmic."""
    width, height, left, top = 640, 360, 70, 40
    x = np.log10([record["iteration"] for record in history])
    y = np.log10([max(record["simple"], 1e-12) for record in history])
    low, high = math.floor(y.min() * 10) / 10, math.ceil(y.max() * 10) / 10
    if high - low < 0.1:
        high = low + 0.1
    first, last = float(x.min()), float(x.max())
    if last - first < 1e-9:
        first -= 1.0
    font = ImageFont.load_default(13)
    picture = Image.new("RGB", (left + width + 30, top + height + 50), "white")
    pen = ImageDraw.Draw(picture)

    def place(a: float, b: float) -> tuple[float, float]:
        return (
            left + width * (a - first) / (last - first),
            top + height * (high - b) / (high - low),
        )

    pen.text((left, 12), "simple loss over iterations (both logarithmic)", fill="black", font=font)
    for share in np.linspace(0, 1, 6):
        value = low + share * (high - low)
        _, row = place(first, value)
        pen.line((left, row, left + width, row), fill=(225, 230, 235))
        text = f"{10**value:.3g}"
        pen.text((left - 8 - font.getlength(text), row - 8), text, fill="black", font=font)
        value = first + share * (last - first)
        column, _ = place(value, low)
        text = f"{10**value:.0f}"
        place_x = column - font.getlength(text) / 2
        pen.text((place_x, top + height + 8), text, fill="black", font=font)
    points = [place(float(a), float(b)) for a, b in zip(x, y)]
    if len(points) > 1:
        pen.line(points, fill=(20, 82, 140), width=2)
    for a, b in points[-1:]:
        pen.ellipse((a - 3, b - 3, a + 3, b + 3), fill=(20, 82, 140))
    pen.rectangle((left, top, left + width, top + height), outline="black")
    return picture


# ------------------------------------------------------------------------------------------- tool


@contextlib.contextmanager
def _stop_kindly(training: Pretraining) -> Iterator[None]:
    """Let the first interruption of a lone process end its iteration and be saved."""
    if training.processes.world_size > 1:
        yield
        return
    before = {}

    def stop(number: int, frame: Any) -> None:
        training.stopping = True
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, stop)
    except ValueError:  # not in the main thread
        before.clear()
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def run(args: argparse.Namespace, processes: Processes | None = None) -> dict[str, float]:
    """Train.

    Returns:
        The last record of the loss.

    Raises:
        ToolError: It cannot be done as given.
    """
    processes = processes or Processes.start(args.device)
    if args.list:
        processes.say(list_presets())
        return {}
    training = Pretraining(args, processes)
    with _stop_kindly(training):
        return training.train()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: It cannot be done as given; the message says why.
    """
    common.run_tool(lambda: parse(argv), run)


if __name__ == "__main__":
    main()
