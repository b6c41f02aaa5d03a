"""Reading guided-diffusion checkpoints: weights only, architecture checked, no key unaccounted for.

Nothing in a file is executed: pickles are read by torch's weights-only unpickler, safetensors hold
no code.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from diffbackbone.unet import _NOT_IN_SHAPES, PRESETS, UNet, UNetConfig, read_architecture

logger = logging.getLogger(__name__)

_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
RELEASED_CHECKPOINTS: dict[str, str] = {
    "gd64": _OPENAI + "64x64_diffusion.pt",
    "gd128": _OPENAI + "128x128_diffusion.pt",
    "gd256": _OPENAI + "256x256_diffusion.pt",
    "gd256_uncond": _OPENAI + "256x256_diffusion_uncond.pt",
    "gd512": _OPENAI + "512x512_diffusion.pt",
    "lsun_bedroom": _OPENAI + "lsun_bedroom.pt",
    "lsun_cat": _OPENAI + "lsun_cat.pt",
    "lsun_horse": _OPENAI + "lsun_horse.pt",
}
"""Where OpenAI serves the weights of each preset."""

PACKAGED = "diffbackbone://"
"""What the address of weights that come with this package begins with."""
METADATA_KEY = "unet_config"
"""Metadata of a safetensors file that hold the fields of :class:`UNetConfig` as JSON."""
_ANCHOR = "time_embed.0.weight"  # every guided-diffusion model has it, at its root
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


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message says why, and what would fit."""


@dataclasses.dataclass(frozen=True)
class KeyReport:
    """What became of each key of a checkpoint.

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
    unet: UNet, source: str | os.PathLike[str], prefix: str | None = None
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
        What became of each key.

    Raises:
        FileNotFoundError: No such file; the message gives the address of OpenAI's.
        CheckpointError: The file is damaged, holds code, is of another architecture or a
            classifier, or a key is missing, unexpected or of another shape. The U-Net is not
            changed then.
    """
    config = unet.config
    state_dict, prefix, foreign = _find_unet(read_checkpoint(source, config), source, prefix)
    try:
        found = read_architecture(state_dict)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    if config.num_classes is None:  # a conditional model used without labels
        config = config.replace(num_classes=found.get("num_classes"))
    if not hasattr(unet, "out"):
        config = config.replace(out_channels=found.get("out_channels", config.out_channels))
    differences = [
        f"{name}: the file has {value!r}, this U-Net {getattr(config, name)!r}"
        for name, value in found.items()
        if value != getattr(config, name)
    ]
    stored = _stored_config(_find_file(source))
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
    problems += [f"unexpected: {key}" for key in state_dict if key not in whole]
    for key, value in state_dict.items():
        if key in whole and value.shape != whole[key].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(whole[key].shape)}"
            problems.append(f"shape of {key}: {shapes}")
        elif key in own and not value.is_floating_point():
            problems.append(f"type of {key}: {value.dtype}, expected a floating-point type")
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{source} does not fit this U-Net:\n  " + "\n  ".join(problems[:10]) + more
        )
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


def read_unet_config(
    source: str | os.PathLike[str], prefix: str | None = None, **rest: Any
) -> UNetConfig:
    """The architecture of the U-Net in a file.

    Args:
        source: See :func:`load_checkpoint`.
        prefix: See :func:`load_checkpoint`.
        **rest: What shapes can't tell; see :meth:`UNetConfig.from_state_dict`. A safetensors file
            of ``tools/pretrain.py`` holds it in its metadata, and needs nothing here.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: The file is damaged, holds code or no guided-diffusion U-Net.
    """
    state_dict, _, _ = _find_unet(read_checkpoint(source), source, prefix)
    stored = _stored_config(_find_file(source))
    if stored is not None:
        told = {name: getattr(stored, name) for name in (*_NOT_IN_SHAPES, "num_head_channels")}
        rest = {**told, **rest}
    try:
        return UNetConfig.from_state_dict(state_dict, **rest)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def read_checkpoint(source: str | os.PathLike[str], config: UNetConfig | None = None) -> Any:
    """Read a file as weights only, on the CPU.

    Args:
        source: Path or URL.
        config: The architecture wanted, to name OpenAI's address if the file is absent.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: The file is damaged or holds more than weights.
    """
    name = os.fspath(source)
    path = _find_file(source, config)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{name} is truncated or no safetensors file: {error}") from error
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # before torch 1.6
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            reason = "holds more than weights (a pickle with code); nothing in it was run"
        else:
            reason = "is truncated, damaged or no checkpoint"
        raise CheckpointError(f"{name} {reason}: {_first_line(error)}") from error
    except Exception as error:  # a damaged file can fail in the reader in any way
        raise CheckpointError(
            f"{name} is truncated, damaged or no checkpoint: {_first_line(error)}"
        ) from error


def _find_file(source: str | os.PathLike[str], config: UNetConfig | None = None) -> Path:
    """The local file of a path or URL."""
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        return _download(name)
    if name.startswith(PACKAGED):
        return _find_packaged(name)
    path = Path(name).expanduser()
    if path.is_dir():
        raise CheckpointError(f"checkpoint {name} is a folder, expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {name} does not exist. {_where_to_get(config)}")
    return path


def _stored_config(path: Path) -> UNetConfig | None:
    """The architecture in a safetensors file's metadata, if it is there."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return None
    try:
        return UNetConfig(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the metadata {METADATA_KEY!r} describe no U-Net: {error}"
        ) from error


def _differences_beyond_shapes(stored: UNetConfig, config: UNetConfig) -> list[str]:
    """In what U-Nets of the same shapes differ, so that the weights would mean something else."""
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


def _find_unet(
    content: Any, source: object, prefix: str | None
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Unwrap a checkpoint: the U-Net's state dict, its prefix, and the keys that don't belong."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}, expected a state dict")
    candidates = {
        str(key)[: -len(_ANCHOR)]
        for key, value in content.items()
        if str(key).endswith(_ANCHOR) and isinstance(value, Tensor)
    }
    if not candidates:
        for name in _WRAPPERS:
            if isinstance(content.get(name), Mapping):
                logger.info("%s: taking %r out of %s", source, name, sorted(map(str, content)))
                return _find_unet(content[name], source, prefix)
        raise CheckpointError(
            f"{source} holds no guided-diffusion U-Net: no key ends in {_ANCHOR!r} (first keys: "
            f"{', '.join(map(str, list(content)[:4])) or 'none'})"
        )
    if prefix is None and "" in candidates:
        prefix = ""
    if prefix is None and len(candidates) == 1:
        (prefix,) = candidates
    if prefix not in candidates:
        given = "" if prefix is None else f", not {prefix!r}"
        raise CheckpointError(
            f"{source} holds U-Nets under the prefixes {sorted(candidates)}{given}; choose one "
            "with prefix="
        )
    inside = {str(k)[len(prefix) :]: v for k, v in content.items() if str(k).startswith(prefix)}
    wrong = [key for key, value in inside.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(f"{source}: {', '.join(wrong[:4])} are no tensors")
    foreign = tuple(str(key) for key in content if not str(key).startswith(prefix))
    return inside, prefix, foreign


def _fitting_presets(found: Mapping[str, Any]) -> str:
    names = [
        name
        for name, preset in PRESETS.items()
        if all(getattr(preset, field) == value for field, value in found.items())
    ]
    return f"It looks like {' or '.join(names)}; " if names else ""


def _find_packaged(name: str) -> Path:
    """The file of an address such as ``diffbackbone://tiny.safetensors``."""
    folder = Path(__file__).parent / "weights"
    files = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    wanted = name[len(PACKAGED) :]
    if wanted not in files:
        raise FileNotFoundError(
            f"checkpoint {name} does not exist; this package comes with "
            f"{', '.join(PACKAGED + file for file in files) or 'none'}"
        )
    return files[wanted]


def _where_to_get(config: UNetConfig | None) -> str:
    urls = [
        url
        for name, url in RELEASED_CHECKPOINTS.items()
        if config in (PRESETS[name], PRESETS[name].replace(num_classes=None))
    ]
    if urls:
        return f"OpenAI's file is at {' or '.join(urls)}"
    return f"OpenAI's files are at {', '.join(RELEASED_CHECKPOINTS.values())}"


def _download(url: str) -> Path:
    """Fetch a file into torch.hub's cache, with a progress bar; it arrives whole or not at all.

    Of several processes on a machine the first one downloads, the others wait.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url.split("?")[0]).name
    several = distributed.is_available() and distributed.is_initialized()
    first = not several or int(os.environ.get("LOCAL_RANK", distributed.get_rank())) == 0
    if first and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("downloading %s to %s", url, path)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=True)
        except OSError as error:
            raise CheckpointError(
                f"{url} could not be downloaded ({error}); fetch it by other means and give the "
                "local path"
            ) from error
    if several:
        distributed.barrier()
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
