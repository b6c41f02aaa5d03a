"""Reading guided-diffusion checkpoints: weights only, architecture checked, no key unaccounted for.

Nothing in a file is executed, and what a file declares is held against its size before memory is
spent on it. Damaged values are found where the file has checksums, as ``torch.save``'s zip archives
do; in safetensors files and those from before torch 1.6 only NaN and infinity are noticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import mmap
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbackbone._unpickle import allow_globals, check_weights
from diffbackbone.models.base import DiffusionModel
from diffbackbone.models.gd_config import PRESETS, UNetConfig, read_architecture
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.sources import CheckpointError, find_file, first_line, some_keys

logger = logging.getLogger(__name__)

METADATA_KEY = "unet_config"
"""Metadata of a safetensors file that hold the fields of :class:`UNetConfig` as JSON."""
_FIRST = "input_blocks.0.0.weight"
ANCHOR = "time_embed.0.weight"  # every guided-diffusion model has it, at its root
_WRAPPERS = (  # averaged weights first: they are what samples and features are made from
    *("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model"),
    *("state_dict", "model_state_dict", "model", "module", "unet", "weights"),
)
_MAX_WRAPPERS = 8  # a pickle can hold itself
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ZIP_HEADER = 30 + 2 * 65535  # at most, in front of a part
_CHECKS_WEIGHTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
"""Whether torch itself rejects what :func:`check_weights` rejects."""


@dataclasses.dataclass(frozen=True)
class KeyReport:
    """How each key of a checkpoint was used.

    Attributes:
        source: Path or URL of the file.
        prefix: Prefix in front of guided-diffusion's names.
        loaded: Keys whose values were loaded.
        unused: Keys of the U-Net that were left out: blocks that no tap reaches, the output layer,
            the label embedding of a U-Net used without labels.
        foreign: Keys outside the prefix, which don't belong to the U-Net.
    """

    source: str
    prefix: str
    loaded: tuple[str, ...]
    unused: tuple[str, ...]
    foreign: tuple[str, ...]

    def __str__(self) -> str:
        prefix = f" (prefix {self.prefix!r})" if self.prefix else ""
        return (
            f"{self.source}{prefix}: {len(self.loaded)} tensors loaded, {len(self.unused)} not "
            f"needed by this U-Net, {len(self.foreign)} of other modules"
        )


def load_checkpoint(
    unet: DiffusionModel, source: str | os.PathLike[str], prefix: str | None = None
) -> KeyReport:
    """Load guided-diffusion weights into a U-Net, in place.

    A U-Net of other than three input channels takes RGB weights by :func:`spread_channels`. One
    without output layer takes weights with and without a learned variance. Where the file
    holds the architecture (see :func:`read_unet_config`), what shapes can't tell is checked too.

    Args:
        unet: The U-Net; blocks that it was built without are not loaded. A network of another
            family has ``anchor``, the end of a key at the root of its state dicts, ``full_shapes``,
            the shapes of all weights of its architecture (None for any), and ``convert``, which
            renames a file's weights.
        source: A ``.pt``, ``.pth`` or ``.safetensors`` file, or a URL of one (kept in torch.hub's
            cache). The state dict may be wrapped (``state_dict``, ``model``, ``ema``, ...) and its
            keys prefixed (``module.``, ``backbone.unet.``, ...).
        prefix: Prefix to take where the file holds several U-Nets.

    Raises:
        FileNotFoundError: No such file; the message gives the address of OpenAI's.
        CheckpointError: The file is damaged, holds code or other weights than this network's, or a
            weight is NaN or infinite. The U-Net is not changed then.
    """
    config = getattr(unet, "config", None)
    content = read_checkpoint(source, config if isinstance(config, UNetConfig) else None)
    anchor = getattr(unet, "anchor", ANCHOR)
    weights, prefix, foreign = find_state_dict(content, source, prefix, anchor)
    if hasattr(unet, "convert"):  # a network of another family
        with _named(source):
            weights = unet.convert(weights)
        shapes = unet.full_shapes
    else:
        weights, shapes = _fit_architecture(unet, weights, source)
    own = unet.state_dict()
    problems = [f"missing: {key}" for key in own if key not in weights]
    for key, value in weights.items():
        if key not in shapes:
            problems.append(f"unexpected: {some_keys([key])}")
        elif shapes[key] not in (tuple(value.shape), None):
            problems.append(f"shape of {key}: {tuple(value.shape)}, expected {shapes[key]}")
        elif key in own:
            floats = own[key].is_floating_point()
            if value.dtype not in (WEIGHT_DTYPES if floats else (own[key].dtype,)):
                problems.append(f"type of {key}: {value.dtype} is not a type of weights")
    if problems:
        listed = "\n  ".join([*problems[:10], *(["..."] if len(problems) > 10 else [])])
        raise CheckpointError(f"{source} has {len(problems)} keys that don't fit:\n  {listed}")
    used = {key: weights[key] for key in own}
    check_finite(source, used)
    unet.load_state_dict(used)
    unused = tuple(key for key in weights if key not in own)
    report = KeyReport(str(source), prefix, tuple(own), unused, foreign)
    logger.info("%s", report)
    return report


def _fit_architecture(
    unet: UNet, weights: Mapping[str, Tensor], source: str | os.PathLike[str]
) -> tuple[Mapping[str, Tensor], dict[str, tuple[int, ...]]]:
    """Return weights for a U-Net's channels, and the shapes of all weights of its architecture."""
    config = unet.config
    with _named(source):
        first = weights.get(_FIRST)
        if config.in_channels != 3 and first is not None and first.ndim == 4 and len(first[0]) == 3:
            weights = {**weights, _FIRST: spread_channels(first, config.in_channels)}
        found = read_architecture(weights)
        if config.num_classes is None:  # a conditional model used without labels
            config = config.replace(num_classes=found.get("num_classes"))
        if not hasattr(unet, "out"):
            config = config.replace(out_channels=found.get("out_channels", config.out_channels))
    pairs = {name: (value, getattr(config, name)) for name, value in found.items()}
    stored = stored_config(find_file(source))
    if stored is not None:  # also what shapes don't show but changes the meaning of the weights
        for name in ("use_new_attention_order", "noise_schedule"):
            pairs[name] = getattr(stored, name), getattr(config, name)
        pairs["attention heads"] = _attention_heads(stored), _attention_heads(config)
    differences = [
        f"{name}: the file has {theirs!r}, this U-Net {ours!r}"
        for name, (theirs, ours) in pairs.items()
        if theirs != ours
    ]
    if differences:
        looks = [n for n, p in PRESETS.items() if found and found.items() <= vars(p).items()]
        hint = f"it looks like {' or '.join(looks)}; " if looks else ""
        raise CheckpointError(
            f"{source} is of another architecture than this U-Net ({hint}"
            "UNetConfig.from_state_dict reads it off a file):\n  " + "\n  ".join(differences)
        )
    with torch.device("meta"):
        whole = UNet(config).state_dict()
    return weights, {key: tuple(value.shape) for key, value in whole.items()}


def spread_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt the first convolution (C, 3, h, w) of an RGB network to other channels, as timm does.

    For one channel the weights are summed, so that a gray image gives what it gives as RGB; for
    others they are repeated in turn and scaled by 3 / channels, which keeps the response's size.
    """
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [i % 3 for i in range(channels)]] * (3 / channels)


def _attention_heads(config: UNetConfig) -> list[int]:
    blocks = (block for block in config.blocks.values() if block.attention)
    return [config.heads(block.channels, block.part == "decoder") for block in blocks]


def read_unet_config(
    source: str | os.PathLike[str], prefix: str | None = None, **rest: Any
) -> UNetConfig:
    """Read the architecture of the U-Net in a file; see :func:`load_checkpoint`.

    Args:
        source: Path or URL.
        prefix: Prefix to take where the file holds several U-Nets.
        **rest: What shapes can't tell; see :meth:`UNetConfig.from_state_dict`. A safetensors file
            of ``tools/pretrain.py`` holds it in its metadata.
    """
    state_dict, _, _ = find_state_dict(read_checkpoint(source), source, prefix)
    stored = stored_config(find_file(source))
    with _named(source):
        if stored is None:
            return UNetConfig.from_state_dict(state_dict, **rest)
        return stored.replace(**{**read_architecture(state_dict), **rest})


def check_finite(source: object, weights: Mapping[str, Any]) -> None:
    """Raise a CheckpointError where a weight is NaN or infinite, also once it is float32."""
    broken = []
    for key, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            low, high = torch.aminmax(value.detach().float())  # NaN wins
            if not (math.isfinite(low) and math.isfinite(high)):
                broken.append(key)
    if broken:
        raise CheckpointError(
            f"{source} holds weights that are NaN or infinite, in {len(broken)} of {len(weights)} "
            f"tensors: {some_keys(broken)}"
        )


@contextlib.contextmanager
def _named(source: object) -> Iterator[None]:
    """Turn errors of a damaged file, which can fail in any way, into ones that name it."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{source} is damaged, or not a checkpoint of weights alone (nothing in it was run): "
            f"{first_line(error)}"
        ) from error


def read_checkpoint(
    source: str | os.PathLike[str], config: UNetConfig | None = None, mapped: bool = True
) -> Any:
    """Read a file, given by path or URL, as weights only, on the CPU.

    Args:
        source: Path or URL.
        config: See :func:`find_file`.
        mapped: Leave the values in the file until they are used, where its format allows.
    """
    path = find_file(source, config)
    with _named(source):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        mapped &= _check_torch_file(path)  # files from before torch 1.6 can't be mapped
        with allow_globals():
            if not _CHECKS_WEIGHTS:
                check_weights(path)
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)


def _check_torch_file(path: Path) -> bool:
    """Check checksums and declared sizes, and return whether the file is a zip archive."""
    problem = None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        pickles = [(0, len(content))]
        is_zip = content[:4] == b"PK\x03\x04"
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
                if packed or sum(part.file_size for part in parts) > len(content):
                    problem = "its parts are compressed or larger than the file"
                elif any(part.CRC for part in parts):  # torch.save can be told to leave them out
                    damaged = archive.testzip()
                    problem = damaged and f"the checksum of {damaged} is wrong"
            pickles = [
                (part.header_offset, part.header_offset + part.file_size + _ZIP_HEADER)
                for part in parts
                if part.filename.endswith("data.pkl")
            ]
        # torch's weights-only unpickler allocates a bytearray of any size that a file asks for
        if any(content.find(b"\nbytearray\n", *span) >= 0 for span in pickles):
            problem = "it asks for a bytearray, which weights never need"
    if problem:
        raise pickle.UnpicklingError(problem)
    return is_zip


def stored_config(path: Path) -> UNetConfig | None:
    """Read the architecture from a safetensors file's metadata; None if it holds none."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with _named(path), safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
        return None if text is None else UNetConfig(**json.loads(text))


def unwrap(content: Any, *ends: str) -> tuple[Mapping[Any, Any], set[str]]:
    """Find the state dict in a checkpoint, and the prefixes of its keys with one of some ends."""
    prefixes: set[str] = set()
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(content, Mapping):
            return {}, set()
        keys = [key for key in content if isinstance(key, str)]
        prefixes = {key[: -len(end)] for key in keys for end in ends if key.endswith(end)}
        # MMEngine's EMAHook saves the averaged weights as state_dict, the others as ema_state_dict
        names = ("state_dict",) if "message_hub" in content else _WRAPPERS
        wrappers = [name for name in names if isinstance(content.get(name), Mapping)]
        if prefixes or not wrappers:
            break
        logger.info("taking %r out of %s", wrappers[0], some_keys(content))
        content = content[wrappers[0]]
    return content, prefixes


def find_state_dict(
    content: Any, source: object, prefix: str | None, anchor: str = ANCHOR
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Unwrap a checkpoint: the U-Net's state dict, its prefix, and the keys that don't belong."""
    content, prefixes = unwrap(content, anchor)
    if prefix is None:
        prefix = "" if "" in prefixes else min(prefixes) if len(prefixes) == 1 else None
    if prefix not in prefixes:
        holds = f"U-Nets under the prefixes {sorted(prefixes)[:8]}; choose one with prefix="
        if not prefixes:
            first = some_keys(content) or "none"
            holds = f"no weights of this network: no key ends in {anchor!r} (first keys: {first})"
        raise CheckpointError(f"{source} holds {holds}, got {prefix!r}")
    inside = {str(k)[len(prefix) :]: v for k, v in content.items() if str(k).startswith(prefix)}
    if wrong := [key for key, value in inside.items() if not _is_dense(value)]:
        raise CheckpointError(f"{source}: {some_keys(wrong)} are not dense tensors")
    foreign = tuple(str(key) for key in content if not str(key).startswith(prefix))
    return inside, prefix, foreign


def _is_dense(value: Any) -> bool:
    return (  # neither sparse, nested, quantized nor meta
        type(value) in (Tensor, torch.nn.Parameter)
        and not value.is_nested
        and not value.is_quantized
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )
