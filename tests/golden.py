"""Filled weights and inputs of the golden features: everything follows from names and shapes."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffbackbone import UNetConfig

FILE = Path(__file__).parent / "data" / "reference_features.npz"
T = torch.tensor([90, 150])
Y = torch.tensor([3, 7])
CONFIGS = {
    "narrow256": UNetConfig(model_channels=32, num_head_channels=16),
    "classic64": UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 3),
        num_res_blocks=3,
        attention_strides=(2, 4),
        out_channels=3,
        num_head_channels=None,
        num_heads=4,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=True,
        num_classes=10,
        image_size=64,
    ),
}


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers that depend on the name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype("float32")


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of a parameter or buffer by the golden rule."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    z = normal(name, shape)
    if name.endswith("running_var"):
        z = 1 + 0.1 * np.abs(z)
    elif len(shape) >= 2:
        z = z / math.sqrt(math.prod(shape[1:]))
    elif name.endswith(".weight"):
        z = 1 + 0.1 * z
    else:
        z = 0.1 * z
    return torch.from_numpy(np.asarray(z, dtype="float32"))


def fill(module: nn.Module, prefix: str = "") -> nn.Module:
    """Fill a module by the golden rule: freshly built U-Nets have residual branches of zero."""
    state = {name: value(prefix + name, tuple(v.shape)) for name, v in module.state_dict().items()}
    module.load_state_dict(state)
    return module.eval()


def image(arch: str) -> Tensor:
    """The golden input, already noised."""
    return torch.from_numpy(normal(f"{arch}/x", (2, 3, 64, 64)))


def relative_error(tensor: Tensor, golden: np.lib.npyio.NpzFile, key: str) -> float:
    """Largest deviation from the golden sample, relative to the map's largest value."""
    assert list(tensor.shape) == golden[f"{key}/shape"].tolist()
    flat = tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // 256)][:256].numpy()
    expected = golden[f"{key}/sample"]
    mean_std = np.array([flat.double().mean().item(), flat.double().std(unbiased=False).item()])
    scale = np.abs(expected).max()
    return max(
        np.abs(sample - expected).max() / scale,
        np.abs(mean_std - golden[f"{key}/mean_std"]).max() / scale,
    )
