"""Our heads' weights under the names of the paper's published code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ATTENTION = "intra_inter_block_attention."


def published_names(head: nn.Module, block: int = 24) -> dict[str, Tensor]:
    """Rename a transformer head's weights; ``block`` is that of an attention head."""
    state, found = head.state_dict(), {}
    first = int(head.transformer.cls_token is not None)  # module 0 inserts the CLS token
    readout = first + len(head.transformer.blocks)
    for key, value in state.items():
        parts = key.split(".")
        match parts:
            case ["tokenizer", kind, name]:
                key = f"pre_layer.{block}.{1 + (kind == 'proj')}.{name}"
            case ["tokenizers", b, kind, name]:
                key = f"pre_layer.{b}.{1 + (kind == 'proj')}.{name}"
            case ["transformer", "blocks", _, "attn", "q", _]:
                continue
            case ["transformer", "blocks", i, *rest]:
                if rest[:2] == ["attn", "kv"]:
                    value = torch.cat([state[key.replace("kv", "q")], value])
                name = ".".join(rest).replace("attn.kv", "attn.qkv")
                name = name.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")
                key = f"{ATTENTION}layers.{first + int(i)}.{name}"
            case ["transformer", "dense", i, name]:
                key = f"{ATTENTION}layers.{readout + 1 + int(i)}.{name}"
            case ["transformer", "cls_token"]:
                key = ATTENTION + "cls_token"
            case ["linear", name]:
                key = f"head.{name}"
        found[key] = value
    width = len(head.transformer.blocks[0].norm1.weight)
    found.setdefault(f"{ATTENTION}cls_token", torch.zeros(1, 1, width))  # it has one in any case
    return found
