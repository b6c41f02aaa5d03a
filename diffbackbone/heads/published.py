"""Weights of the paper's published classification code, under the names of these heads.

The published training script writes ``latest.pth``, a dict with ``optimizer``, ``scheduler``,
``epoch``, the head's state dict as ``model_head`` and, for DifFeed, the feedback layers' as
``model_feedback``. The U-Net is not in it, not even after fine-tuning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffbackbone.heads.attention import AttentionHead
from diffbackbone.heads.difformer import DifFormerHead
from diffbackbone.heads.linear import LinearHead
from diffbackbone.heads.mlp import MLPHead

_TRANSFORMER = "intra_inter_block_attention."
_TOKENIZER_LAYERS = {"1": "norm", "2": "proj"}


def convert_published_head(
    checkpoint: Mapping[str, Any], head: LinearHead | MLPHead | AttentionHead | DifFormerHead
) -> dict[str, Tensor]:
    """Rename the published code's weights for one of these heads.

    | published | here |
    |---|---|
    | ``fcs.0.*`` | ``linear.*`` (LinearHead) |
    | ``fcs.<i>.*`` | ``layers.<2i>.*`` (MLPHead) |
    | ``pre_layer.<b>.1.*`` | ``tokenizer.norm.*``, or ``tokenizers.<b>.norm.*`` (DifFormerHead) |
    | ``pre_layer.<b>.2.*`` | ``tokenizer.proj.*``, or ``tokenizers.<b>.proj.*`` |
    | ``intra_inter_block_attention.cls_token`` | ``transformer.cls_token`` |
    | ``intra_inter_block_attention.layers.<i>.*`` | ``transformer.blocks.<j>.*``, j counts the i |
    | ``….attn.qkv.weight`` | ``….attn.q.weight`` and ``….attn.kv.weight``, cut by rows |
    | ``….mlp.fc1.*``, ``….mlp.fc2.*`` | ``….mlp.0.*``, ``….mlp.2.*`` |
    | ``head.*`` | ``linear.*`` |

    The number of attention heads leaves no trace in the weights: build the head with that of
    ``--fusion_arc`` (8 in the published scripts). DifFormer's timesteps, too, are in their order.

    Args:
        checkpoint: What ``latest.pth`` holds, or its ``model_head`` alone.
        head: The head that the weights are for; it is not changed.

    Returns:
        A state dict for ``head.load_state_dict``.

    Raises:
        ValueError: The weights are those of another head; the message says what they are.
    """
    weights: Mapping[str, Any] = checkpoint.get("model_head", checkpoint)
    if isinstance(head, (LinearHead, MLPHead)):
        return _rename(weights, _fully_connected_names(weights, head), head)
    if isinstance(head, (AttentionHead, DifFormerHead)):
        return _rename(weights, _attention_names(weights, head), head)
    raise ValueError(f"no weights were published for a {type(head).__name__}")


def _rename(
    weights: Mapping[str, Any], names: Mapping[str, tuple[str, ...]], head: nn.Module
) -> dict[str, Tensor]:
    unknown = [key for key in weights if key not in names]
    if unknown or not names:
        raise ValueError(
            f"not the published weights of a {type(head).__name__}: unknown "
            f"{', '.join(map(repr, unknown[:6])) or 'because empty'}"
        )
    renamed: dict[str, Tensor] = {}
    for key, targets in names.items():
        value = weights[key]
        parts = [value]
        if len(targets) == 2:  # rows of q, then those of k and v
            parts = list(value.split([value.shape[0] // 3, value.shape[0] // 3 * 2]))
        renamed.update(zip(targets, parts))
    return renamed


def _fully_connected_names(
    weights: Mapping[str, Any], head: LinearHead | MLPHead
) -> dict[str, tuple[str, ...]]:
    found = [match for key in weights if (match := re.fullmatch(r"fcs\.(\d+)\.(\w+)", key))]
    depth = len({match[1] for match in found})
    if isinstance(head, LinearHead):
        if depth > 1:
            raise ValueError(f"the published weights are those of an MLPHead: {depth} layers")
        return {match[0]: (f"linear.{match[2]}",) for match in found}
    if depth == 1:
        raise ValueError("the published weights are those of a LinearHead: one layer")
    return {match[0]: (f"layers.{2 * int(match[1])}.{match[2]}",) for match in found}


def _attention_names(
    weights: Mapping[str, Any], head: AttentionHead | DifFormerHead
) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    blocks = sorted({int(m[1]) for key in weights if (m := re.match(r"pre_layer\.(\d+)\.", key))})
    if isinstance(head, AttentionHead) and len(blocks) > 1:
        raise ValueError(f"the published weights are those of a DifFormerHead: blocks {blocks}")
    if any(key.endswith(".running_mean") for key in weights):
        raise ValueError(
            "the published weights have a batch norm in the tokenizer (--norm_type batch); the "
            "paper's, and this head's, is a layer norm"
        )
    pattern = re.escape(_TRANSFORMER) + r"layers\.(\d+)\."
    layers = sorted({int(m[1]) for key in weights if (m := re.match(pattern, key))})
    for key in weights:
        parts = key.split(".")
        if match := re.fullmatch(r"pre_layer\.(\d+)\.([12])\.(weight|bias)", key):
            b, layer, rest = match.groups()
            where = f"tokenizers.{b}" if isinstance(head, DifFormerHead) else "tokenizer"
            names[key] = (f"{where}.{_TOKENIZER_LAYERS[layer]}.{rest}",)
        elif key == _TRANSFORMER + "cls_token":
            names[key] = ("transformer.cls_token",)
        elif match := re.match(pattern, key):
            where = f"transformer.blocks.{layers.index(int(match[1]))}."
            rest = key[match.end() :].replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.2.")
            if rest == "attn.qkv.weight":
                names[key] = (where + "attn.q.weight", where + "attn.kv.weight")
            elif parts[3] in ("norm1", "norm2", "attn", "mlp"):
                names[key] = (where + rest,)
        elif parts[0] == "head":
            names[key] = ("linear." + parts[-1],)
    return names
