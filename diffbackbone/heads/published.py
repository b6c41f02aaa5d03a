"""Weights of the paper's published classification code, under the names of these heads.

The published training script writes ``latest.pth``, a dict with ``optimizer``, ``scheduler``,
``epoch``, the head's state dict as ``model_head`` and, for DifFeed, the feedback layers' as
``model_feedback``. The U-Net is not in it, not even after fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from diffbackbone.heads.attention import AttentionHead
from diffbackbone.heads.linear import LinearHead


def convert_published_head(checkpoint: Mapping[str, Any], head: nn.Module) -> dict[str, Tensor]:
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
        A state dict for ``head.load_state_dict``, which checks that it is complete.

    Raises:
        ValueError: Some weights are not of this head.
    """
    weights: Mapping[str, Any] = checkpoint.get("model_head", checkpoint)
    split = [key.split(".") for key in weights]
    blocks = {parts[1] for parts in split if parts[0] == "pre_layer"}
    one_block = isinstance(head, AttentionHead) and len(blocks) == 1
    layers = sorted({int(parts[2]) for parts in split if parts[1:2] == ["layers"]})
    own = head.state_dict()
    converted: dict[str, Tensor] = {}
    unknown = []
    for (key, value), parts in zip(weights.items(), split):
        values = [value]
        match parts:
            case ["fcs", index, name]:
                linear = isinstance(head, LinearHead) and index == "0"
                names = [f"linear.{name}" if linear else f"layers.{2 * int(index)}.{name}"]
            case ["pre_layer", b, "1" | "2" as index, name]:
                tokenizer = "tokenizer" if one_block else f"tokenizers.{b}"
                names = [f"{tokenizer}.{'norm' if index == '1' else 'proj'}.{name}"]
            case ["intra_inter_block_attention", "cls_token"]:
                names = ["transformer.cls_token"]
            case ["intra_inter_block_attention", "layers", index, *rest]:
                block = f"transformer.blocks.{layers.index(int(index))}"
                name = ".".join(rest).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
                names = [f"{block}.{name}"]
                if name == "attn.qkv.weight":
                    names = [f"{block}.attn.q.weight", f"{block}.attn.kv.weight"]
                    width = len(value) // 3
                    values = value.split([width, 2 * width])
            case ["head", name]:
                names = [f"linear.{name}"]
            case _:
                names = [key]
        if all(name in own for name in names):
            converted.update(zip(names, values))
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"not weights of a {type(head).__name__}: unknown {', '.join(unknown)}")
    return converted


def convert_published_feedback(
    weights: Mapping[str, Tensor], sources: Iterable[int]
) -> dict[str, Tensor]:
    """Rename the published code's feedback layers ("C_B_R") for :class:`Feedback`.

    Args:
        weights: ``model_feedback`` of ``latest.pth``; the key's first part counts the sources.
        sources: The source blocks; they count in ascending order, as in the published script.

    Returns:
        A state dict for ``Feedback.load_state_dict``, which checks that it is complete.

    Raises:
        ValueError: There are layers of more source blocks.
    """
    names = dict(enumerate(sorted(sources)))
    split = [(key.partition("."), value) for key, value in weights.items()]
    if unknown := {i for (i, _, _), _ in split if not i.isdecimal() or int(i) not in names}:
        raise ValueError(f"feedback layers {', '.join(sorted(unknown))} have no source block")
    return {f"{names[int(i)]}.{name}": value for (i, _, name), value in split}
