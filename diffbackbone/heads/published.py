"""Weights and options of the paper's published classification code, under the names of this one.

The published training script writes ``latest.pth``, a dict with ``optimizer``, ``scheduler``,
``epoch``, the head's state dict as ``model_head`` and, for DifFeed, the feedback layers' as
``model_feedback``. The U-Net is not in it, not even after fine-tuning, and neither are the script's
options, without which the weights can't be used: :func:`published_options` reads them.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from diffbackbone.heads.attention import AttentionHead
from diffbackbone.heads.pooled import LinearHead


def convert_published_head(checkpoint: Mapping[str, Any], head: nn.Module) -> dict[str, Tensor]:
    """Rename the published code's weights for one of these heads.

    ``fcs`` become linear layers, ``pre_layer.<b>`` the tokenizer of block b, the layers of
    ``intra_inter_block_attention`` blocks and dense layers of the transformer, with q, k and v cut
    by rows into ``q`` and ``kv``, and ``head`` the last linear layer.

    A CLS token that the published head has but never inserts is left out.

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
    found = [parts for parts in split if parts[1:2] == ["layers"]]
    layers = sorted({int(parts[2]) for parts in found if len(parts) > 4})
    dense = sorted({int(parts[2]) for parts in found if len(parts) == 4})
    unused_cls = getattr(getattr(head, "transformer", None), "cls_token", 0) is None
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
            case ["intra_inter_block_attention", "cls_token"] if unused_cls:
                continue
            case ["intra_inter_block_attention", "cls_token"]:
                names = ["transformer.cls_token"]
            case ["intra_inter_block_attention", "layers", index, name]:
                names = [f"transformer.dense.{2 * dense.index(int(index))}.{name}"]
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
    """Rename the published code's feedback layers for :class:`~diffbackbone.Feedback`.

    Args:
        weights: ``model_feedback`` of ``latest.pth``; the key's first part counts the sources.
        sources: The source blocks in the order of ``--feedback_b_list``.

    Returns:
        A state dict for ``Feedback.load_state_dict``, which checks that it is complete.

    Raises:
        ValueError: There are layers of more source blocks.
    """
    names = {str(i): b for i, b in enumerate(sources)}
    split = [(key.partition("."), value) for key, value in weights.items()]
    if unknown := sorted({i for (i, _, _), _ in split} - names.keys()):
        raise ValueError(f"feedback layers {', '.join(unknown)} have no source block")
    return {f"{names[i]}.{name}": value for (i, _, name), value in split}


def published_options(flags: str) -> dict[str, Any]:
    """Translate the options of the published ``finetune.py``, as its scripts give them.

    The options mean what the published code does with them. It reads ``--feedback_arch`` letter by
    letter, so that ``Res`` is a ReLU and ``C2`` a C. It assigns layers to encoder blocks by their
    place in ``--feedback_b_list``, which need not ascend.

    Args:
        flags: The command line; options that change neither network nor head are passed over.

    Returns:
        ``head``, ``timesteps``, ``blocks`` and ``first_blocks``, ``feedback`` (a map
        {source: target} in the order of the layers, or None), ``feedback_layers``, ``pool``,
        ``hidden`` and ``head_options``, further arguments of the attention and DifFormer heads.

    Raises:
        ValueError: An option is missing, or asks for what the published code can't build or run.
    """
    parser = _Parser(allow_abbrev=False, add_help=False)
    for name in ("t_list", "first_fw_b_list", "second_fw_b_list", "feedback_b_list"):
        parser.add_argument(f"--{name}", nargs="+", type=int, required=True)
    texts = {"feedback_arch": "C_B_R", "head_type": "attention", "head_arc": "", "norm_type": ""}
    for name, default in {**texts, "fusion_arc": "", "mode": "freeze"}.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--pre_pool_size", type=int, default=16)
    args, _ = parser.parse_known_args(shlex.split(flags))
    first, second, sources = (
        [] if blocks[0] == -1 else blocks
        for blocks in (args.first_fw_b_list, args.second_fw_b_list, args.feedback_b_list)
    )
    if args.mode != "freeze":
        raise ValueError(f"--mode {args.mode}: latest.pth does not hold the U-Net it trained")
    if not second:
        first, second, sources = [], first, []
    if second != sorted(set(second)):
        raise ValueError(f"blocks {second} must ascend: the published code returns them so")
    targets = sorted((38 - b for b in sources), reverse=True)
    options: dict[str, Any] = {
        "timesteps": tuple(args.t_list),
        "blocks": tuple(second),
        "first_blocks": tuple(first),
        "feedback": dict(zip(sources, targets)) or None,
        "feedback_layers": _feedback_layers(args.feedback_arch),
        "pool": args.pre_pool_size,
        "hidden": tuple(int(width) for width in args.head_arc.split("_") if width),
        "head_options": {},
    }
    if args.head_type == "linear":
        return {**options, "head": "mlp" if options["hidden"] else "linear"}
    single = len(args.t_list) == len(first + second) == 1
    options["head_options"] = {
        **_fusion_options(args.fusion_arc),
        "norm": "batch" if args.norm_type == "batch" else "layer",
    }
    return {**options, "hidden": (), "head": "attention" if single else "difformer"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"options of the published code: {message}")


def _feedback_layers(arch: str) -> tuple[str, ...]:
    """Return the layers of a string such as ``"C_B_R"``; a C that comes first is 1x1."""
    kinds = {"C": "depthwise", "B": "batch", "R": "relu", "S": "silu", "G": "group"}
    layers = [kinds[letter] for letter in arch if letter in kinds]
    return ("conv", *layers[1:]) if arch.startswith("C") else tuple(layers)


def _fusion_options(arc: str) -> dict[str, Any]:
    """Return a transformer's arguments from a string such as ``"Use_CLS_Token:True:1024,..."``."""
    options: dict[str, Any] = {"layers": 0, "cls_token": False, "dense": []}
    readouts = {"Extract_CLS_Token": "cls", "FullyPool": "mean", "Flatten": "flatten"}
    for part in arc.split("/")[0].split(","):
        match part.strip().split(":"):
            case ["Use_CLS_Token", _, width] if "width" not in options:
                options["width"] = int(width)
            case ["Insert_CLS_Token"] if not options["layers"]:
                options["cls_token"] = True
            case ["Attention", _, heads, ratio, count] if "readout" not in options:
                given = {"num_heads": int(heads), "mlp_ratio": float(ratio)}
                if any(options.get(name, value) != value for name, value in given.items()):
                    raise ValueError(f"--fusion_arc {arc}: blocks that differ are not supported")
                options.update(given, layers=options["layers"] + int(count))
            case [name] if name in readouts and options["layers"] and "readout" not in options:
                options["readout"] = readouts[name]
            case ["Dense", fan_in, fan_out, activation] if "readout" in options:
                options["dense"].append((int(fan_in), int(fan_out), activation))
            case _:
                raise ValueError(f"--fusion_arc {arc}: {part!r} is not supported there")
    if not {"width", "readout"} <= options.keys():
        raise ValueError(f"--fusion_arc {arc!r} needs Use_CLS_Token first, and a readout")
    return options
