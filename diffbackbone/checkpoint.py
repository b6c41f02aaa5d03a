"""Reading guided-diffusion checkpoints: weights only, architecture checked, no key unaccounted for.

Nothing in a file is executed: pickles are read by torch's weights-only unpickler, safetensors hold
no code. What a file declares is held against its size before memory is spent on it.

Damage to the values themselves is found where the file has checksums: the zip archives that
``torch.save`` has written since torch 1.6, unless they were switched off. Files of older versions
and safetensors files have none; of a flipped bit in their values only what makes a weight NaN or
infinite is seen. Checksums guard against accidents, not against somebody who rewrites a file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import mmap
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbackbone._unpickle import allow_globals, check_weights
from diffbackbone.models.base import DiffusionModel
from diffbackbone.models.gd_config import NOT_IN_SHAPES, PRESETS, UNetConfig, read_architecture
from diffbackbone.models.guided_diffusion import UNet
from diffbackbone.sources import (
    CheckpointError,
    find_file,
    first_line,
    some_keys,
)

logger = logging.getLogger(__name__)

METADATA_KEY = "unet_config"
"""Metadata of a safetensors file that hold the fields of :class:`UNetConfig` as JSON."""
ANCHOR = "time_embed.0.weight"  # every guided-diffusion model has it, at its root
_WRAPPERS = (  # averaged weights first: they are what samples and features are made from
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema_model",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "unet",
    "weights",
)
MAX_WRAPPERS = 8  # a pickle can hold itself
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ZIP = b"PK\x03\x04"
_ZIP_HEADER = 30 + 2 * 65535  # at most, in front of a part
# torch's weights-only unpickler allocates a bytearray of any size that a file asks for
_BYTEARRAY = re.compile(rb"\nbytearray\n")


_CHECKS_WEIGHTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
"""Whether torch itself rejects what :func:`check_weights` rejects."""


@dataclasses.dataclass(frozen=True)
class KeyReport:
    """How each key of a checkpoint was used.

    Attributes:
        source: Path or URL of the file.
        prefix: Prefix in front of guided-diffusion's names.
        loaded: Keys whose values were loaded.
        unused: Keys of the U-Net that were left out on purpose: blocks that no tap reaches, the
            output layer, the label embedding of a U-Net used without labels.
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

    A U-Net without output layer takes weights with and without a learned variance. Where the file
    holds the architecture (see :func:`read_unet_config`), what shapes can't tell is checked too.

    Args:
        unet: The U-Net; blocks that it was built without are not loaded.
        source: A ``.pt``, ``.pth`` or ``.safetensors`` file, or a URL of one (kept in torch.hub's
            cache). The state dict may be wrapped (``state_dict``, ``model``, ``ema``, ...) and its
            keys prefixed (``module.``, ``backbone.unet.``, ...).
        prefix: Prefix to take where the file holds several U-Nets.

    Returns:
        How each key was used.

    Raises:
        FileNotFoundError: No such file; the message gives the address of OpenAI's.
        CheckpointError: The file is damaged, holds code, is of another architecture or a
            classifier, or a key is missing, unexpected or of another shape, or a weight is NaN or
            infinite. The U-Net is not changed then.
    """
    if hasattr(unet, "convert"):
        return _load_family(unet, source, prefix)
    config = unet.config
    state_dict, prefix, foreign = find_state_dict(read_checkpoint(source, config), source, prefix)
    try:
        found = read_architecture(state_dict)
        if config.num_classes is None:  # a conditional model used without labels
            config = config.replace(num_classes=found.get("num_classes"))
        if not hasattr(unet, "out"):
            config = config.replace(out_channels=found.get("out_channels", config.out_channels))
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{source}: {first_line(error)}") from error
    differences = [
        f"{name}: the file has {value!r}, this U-Net {getattr(config, name)!r}"
        for name, value in found.items()
        if value != getattr(config, name)
    ]
    stored = stored_config(find_file(source))
    if stored is not None and not differences:
        differences = _differences_beyond_shapes(stored, config)
    if differences:
        raise CheckpointError(
            f"{source} is of another architecture than this U-Net:\n  "
            + "\n  ".join(differences)
            + f"\n{_fitting_presets(found)}UNetConfig.from_state_dict reads the architecture off a "
            "file"
        )
    with torch.device("meta"):
        whole = UNet(config).state_dict()
    own = unet.state_dict()
    problems = [f"missing: {key}" for key in own if key not in state_dict]
    problems += [f"unexpected: {some_keys([key])}" for key in state_dict if key not in whole]
    for key, value in state_dict.items():
        if key in whole and value.shape != whole[key].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(whole[key].shape)}"
            problems.append(f"shape of {key}: {shapes}")
        elif key in own and value.dtype not in WEIGHT_DTYPES:
            types = ", ".join(map(str, WEIGHT_DTYPES))
            problems.append(f"type of {key}: {value.dtype}, expected one of {types}")
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{source} does not fit this U-Net:\n  " + "\n  ".join(problems[:10]) + more
        )
    check_finite(source, {key: state_dict[key] for key in own})
    unet.load_state_dict({key: state_dict[key] for key in own})
    report = KeyReport(
        source=str(source),
        prefix=prefix,
        loaded=tuple(own),
        unused=tuple(key for key in state_dict if key not in own),
        foreign=foreign,
    )
    logger.info("%s", report)
    return report


def _load_family(
    model: DiffusionModel, source: str | os.PathLike[str], prefix: str | None
) -> KeyReport:
    """Load weights into a network of another family; see :func:`load_checkpoint`.

    The network has ``anchor``, the end of a key at the root of its state dicts, ``full_shapes``,
    the shapes of all weights of its architecture (None for any), and ``convert``, which renames a
    file's weights.
    """
    content = read_checkpoint(source)
    weights, prefix, foreign = find_state_dict(content, source, prefix, model.anchor)
    try:
        weights = model.convert(weights)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: {first_line(error)}") from error
    own, shapes = model.state_dict(), model.full_shapes
    problems = [f"missing: {key}" for key in own if key not in weights]
    for key, value in weights.items():
        if key not in shapes:
            problems.append(f"unexpected: {some_keys([key])}")
        elif shapes[key] not in (tuple(value.shape), None):
            problems.append(f"shape of {key}: {tuple(value.shape)}, expected {shapes[key]}")
        elif key in own and value.is_floating_point() != own[key].is_floating_point():
            problems.append(f"type of {key}: {value.dtype}, expected {own[key].dtype}")
    if problems:
        listed = "\n  ".join([*problems[:10], *(["..."] if len(problems) > 10 else [])])
        raise CheckpointError(f"{source} has {len(problems)} keys that don't fit:\n  {listed}")
    used = {key: weights[key] for key in own}
    check_finite(source, used)
    model.load_state_dict(used)
    unused = tuple(key for key in weights if key not in own)
    report = KeyReport(str(source), prefix, tuple(own), unused, foreign)
    logger.info("%s", report)
    return report


def read_unet_config(
    source: str | os.PathLike[str], prefix: str | None = None, **rest: Any
) -> UNetConfig:
    """Read the architecture of the U-Net in a file.

    Args:
        source: See :func:`load_checkpoint`.
        prefix: See :func:`load_checkpoint`.
        **rest: What shapes can't tell; see :meth:`UNetConfig.from_state_dict`. A safetensors file
            of ``tools/pretrain.py`` holds it in its metadata, and needs nothing here.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: The file is damaged, holds code or no guided-diffusion U-Net.
    """
    state_dict, _, _ = find_state_dict(read_checkpoint(source), source, prefix)
    stored = stored_config(find_file(source))
    if stored is not None:
        told = {name: getattr(stored, name) for name in (*NOT_IN_SHAPES, "num_head_channels")}
        rest = {**told, **rest}
    try:
        if stored is not None and not read_architecture(state_dict):
            return stored.replace(**rest)  # a U-Net that ends at its last tap
        return UNetConfig.from_state_dict(state_dict, **rest)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{source}: {first_line(error)}") from error


def check_finite(source: object, weights: Mapping[str, Any]) -> None:
    """Check that no weight is NaN or infinite, also once it is float32.

    Raises:
        CheckpointError: Some are; the message names the first.
    """
    broken = []
    for key, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            low, high = torch.aminmax(value.detach().float())  # NaN wins
            if not math.isfinite(low) or not math.isfinite(high):
                broken.append(key)
    if broken:
        raise CheckpointError(
            f"{source} holds weights that are NaN or infinite, in {len(broken)} of {len(weights)} "
            f"tensors: {some_keys(broken)}"
        )


def read_checkpoint(
    source: str | os.PathLike[str], config: UNetConfig | None = None, mapped: bool = True
) -> Any:
    """Read a file as weights only, on the CPU.

    Args:
        source: Path or URL.
        config: The architecture wanted, to name OpenAI's address if the file is absent.
        mapped: Leave the values in the file until they are used, where its format allows; then the
            file has to stay as long as they are in use.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: The file is damaged or holds more than weights.
    """
    path = find_file(source, config)
    name = os.fspath(source)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        archive = _check_torch_file(path)
        with allow_globals():
            if not _CHECKS_WEIGHTS:
                check_weights(path)
            # files from before torch 1.6 can't be mapped
            mapped = mapped and archive
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CheckpointError(f"{name} can't be read: {first_line(error)}") from error
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            reason = "holds more than weights (a pickle with code); nothing in it was run"
        else:
            reason = "is truncated, damaged or no checkpoint"
        raise CheckpointError(f"{name} {reason}: {first_line(error)}") from error
    except Exception as error:  # a damaged file can fail in the reader in any way
        kind = "safetensors file" if path.suffix == ".safetensors" else "checkpoint"
        raise CheckpointError(
            f"{name} is truncated, damaged or no {kind}: {first_line(error)}"
        ) from error


def _check_torch_file(path: Path) -> bool:
    """Check checksums and declared sizes, which ``torch.load`` doesn't.

    Of a file of 2 GB, from memory, the checksums take 0.6 s and :func:`check_finite` 0.2 s on one
    core, where reading and copying the weights takes 1 s.

    Returns:
        Whether the file is a zip archive.

    Raises:
        pickle.UnpicklingError: Something is wrong.
        zipfile.BadZipFile: The archive can't be read. Other errors are possible, too.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        pickles = [(0, len(content))]
        packed = content[: len(_ZIP)] == _ZIP
        if packed:
            with zipfile.ZipFile(file) as archive:
                _check_archive(archive, len(content))
                pickles = [
                    (part.header_offset, part.header_offset + part.file_size + _ZIP_HEADER)
                    for part in archive.infolist()
                    if part.filename.endswith("data.pkl")
                ]
        if any(_BYTEARRAY.search(content, *span) for span in pickles):
            raise pickle.UnpicklingError("it asks for a bytearray, which weights never need")
    return packed


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    parts = archive.infolist()
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if packed or sum(part.file_size for part in parts) > size:
        raise pickle.UnpicklingError(
            "its parts are compressed or larger than the file; torch never writes such files"
        )
    if any(part.CRC for part in parts):  # torch.save can be told to leave them out
        damaged = archive.testzip()
        if damaged:
            raise pickle.UnpicklingError(f"the checksum of {damaged} is wrong")


def stored_config(path: Path) -> UNetConfig | None:
    """Read the architecture from a safetensors file's metadata; None if it holds none."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return None
    try:
        return UNetConfig(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the metadata {METADATA_KEY!r} describe no U-Net: {first_line(error)}"
        ) from error


def _differences_beyond_shapes(stored: UNetConfig, config: UNetConfig) -> list[str]:
    """List settings that shapes don't show but that change the meaning of the weights."""
    differences = [
        f"{name}: the file has {getattr(stored, name)!r}, this U-Net {getattr(config, name)!r}"
        for name in ("use_new_attention_order", "noise_schedule")
        if getattr(stored, name) != getattr(config, name)
    ]
    for block in config.blocks.values():
        decoder = block.name.startswith("output")
        heads = [c.heads(block.channels, decoder) for c in (stored, config)]
        if block.attention and heads[0] != heads[1]:
            differences.append(
                f"attention heads of block {block.index}: the file has {heads[0]}, this U-Net "
                f"{heads[1]} (num_head_channels, num_heads, num_heads_upsample)"
            )
            break
    return differences


def find_state_dict(
    content: Any, source: object, prefix: str | None, anchor: str = ANCHOR
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Unwrap a checkpoint: the U-Net's state dict, its prefix, and the keys that don't belong.

    ``anchor`` is a key that every U-Net of the family has, by which it is found.
    """
    candidates: set[str] = set()
    for _ in range(MAX_WRAPPERS):
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{source} holds a {type(content).__name__}, expected a state dict"
            )
        candidates = {
            key[: -len(anchor)]
            for key, value in content.items()
            if isinstance(key, str) and key.endswith(anchor) and isinstance(value, Tensor)
        }
        wrapper = find_wrapper(content)
        if candidates or wrapper is None:
            break
        logger.info("%s: taking %r out of %s", source, wrapper, some_keys(content))
        content = content[wrapper]
    if not candidates:
        what = "guided-diffusion U-Net" if anchor == ANCHOR else "weights of this network"
        raise CheckpointError(
            f"{source} holds no {what}: no key ends in {anchor!r} (first keys: "
            f"{some_keys(content) or 'none'})"
        )
    if prefix is None and "" in candidates:
        prefix = ""
    if prefix is None and len(candidates) == 1:
        (prefix,) = candidates
    if not isinstance(prefix, str) or prefix not in candidates:
        given = "" if prefix is None else f", not {prefix!r}"
        raise CheckpointError(
            f"{source} holds U-Nets under the prefixes {sorted(candidates)[:8]}{given}; choose one "
            "with prefix="
        )
    inside = {str(k)[len(prefix) :]: v for k, v in content.items() if str(k).startswith(prefix)}
    wrong = [key for key, value in inside.items() if not _is_plain(value)]
    if wrong:
        raise CheckpointError(f"{source}: {some_keys(wrong)} are not dense tensors")
    foreign = tuple(str(key) for key in content if not str(key).startswith(prefix))
    return inside, prefix, foreign


def find_wrapper(content: Mapping[Any, Any]) -> str | None:
    """Return the key of the state dict in a checkpoint; None if it has none."""
    # MMEngine's EMAHook saves the averaged weights as state_dict, the others as ema_state_dict
    names = ("state_dict",) if "message_hub" in content else _WRAPPERS
    return next((name for name in names if isinstance(content.get(name), Mapping)), None)


def _is_plain(value: Any) -> bool:
    """Whether a value is a dense CPU tensor: not sparse, nested, quantized or meta."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and not value.is_nested
        and not value.is_quantized
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _fitting_presets(found: Mapping[str, Any]) -> str:
    names = [
        name
        for name, preset in PRESETS.items()
        if all(getattr(preset, field) == value for field, value in found.items())
    ]
    return f"It looks like {' or '.join(names)}; " if names else ""
