"""Broken and hostile configs: each ends in a message that says which key it was, none runs code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import math
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffbackbone import DiffusionBackbone, UNetConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
HAS_MMENGINE = importlib.util.find_spec("mmengine") is not None
SECONDS = 10  # for one config
NAN, INF = math.nan, math.inf
UNET = {
    "model_channels": 32,
    "channel_mult": [1],
    "num_res_blocks": 1,
    "attention_strides": [],
    "num_head_channels": 32,
}
BASE = {"unet": UNET, "blocks": [4], "out_channels": None, "out_strides": None}
JUNK: tuple[Any, ...] = (
    *("", "abc", "3", "1e400", "None", "False", "24, 27", "\0", "x" * 5000),
    *(None, True, -1, 0, 2.5, -(10**12), 10**12, 10**30, 10**400, NAN, INF, -INF, 1e-320),
    *([], [[1]], [None], [1, "x"], [NAN], [-1], [10**30], [[[[[]]]]], [True], ["4"], [4.0]),
    *({}, {"a": 1}, {"4": None}, {"a": {"b": []}}, {"5": "one"}, {"5": [1]}, {"5": NAN}),
)
ARGUMENTS = [n for n in inspect.signature(DiffusionBackbone.__init__).parameters if n != "self"]
FLAGS = ("freeze", "first_pass_grad", "activation_checkpointing", "save_frozen")


def allowed(name: str, value: Any) -> bool:
    """Whether a value of ``JUNK`` is none for this argument."""
    if value is None:
        optional = ("checkpoint", "feedback", "out_channels", "out_strides", "class_label")
        return name in (*optional, "activation_budget", "schedule", "init_cfg", "pretrained")
    if name in FLAGS:
        return value is True
    if name == "timestep":
        return type(value) is int and value == 0
    if name == "seed":
        return type(value) is int
    if name == "activation_budget":
        return type(value) in (int, float) and value >= 0
    return (name == "init_cfg" and value == []) or (name == "unet" and value == {})  # defaults


# --------------------------------------------------------------------------------------------------
# what is built, and how


class HangError(BaseException):
    """No error of ours, and none that anything but the test catches."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def by_hand(**arguments: Any) -> None:
    DiffusionBackbone(**{**BASE, **arguments})


def by_mmengine(**arguments: Any) -> None:
    from mmengine.config import Config
    from mmengine.registry import MODELS

    import diffbackbone.mmseg  # noqa: F401

    config = Config({"model": {"type": "DiffusionBackbone", **BASE, **arguments}})
    MODELS.build(config.model).init_weights()


def by_lazy_config(**arguments: Any) -> None:
    from detectron2.config import LazyCall, instantiate

    from diffbackbone.detectron2 import DiffusionBackbone as Wanted

    instantiate(LazyCall(Wanted)(**{**BASE, **arguments}))


def by_yaml(folder: Path, content: Any) -> None:
    import _detectron2
    import yaml
    from detectron2.layers import ShapeSpec

    from diffbackbone.detectron2 import build_diffusion_backbone

    path = folder / "config.yaml"
    text = content if isinstance(content, (str, bytes)) else yaml.dump(content, allow_unicode=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    cfg = _detectron2.load_yaml(str(path), [])
    build_diffusion_backbone(cfg, ShapeSpec(channels=3))


def yaml_config(**node: Any) -> dict[str, Any]:
    node = {"UNET": "tiny", "BLOCKS": [24], **node}
    model = {"DIFFUSION": node, "PIXEL_MEAN": [127.5] * 3, "PIXEL_STD": [127.5] * 3}
    return {"VERSION": 2, "MODEL": model, "INPUT": {"FORMAT": "RGB"}}


Case = tuple[str, str, Callable[[], None], str]
"""Name, the key that the message has to have, the attempt, and a part of the message."""


def arguments(build: Callable[..., None], names: list[str]) -> Iterator[Case]:
    for name in names:
        for value in JUNK:
            if not allowed(name, value):
                told = "" if name in ("unet", "checkpoint", "init_cfg", "pretrained") else name
                attempt = functools.partial(build, **{name: value})
                yield f"{name}={str(value)[:40]!r}", told, attempt, ""


def several(build: Callable[..., None], names: list[str], count: int) -> Iterator[Case]:
    """Random values for several arguments at once."""
    rng = random.Random(3)
    for index in range(count):
        chosen = {name: rng.choice(JUNK) for name in rng.sample(names, 3)}
        if not all(allowed(name, value) for name, value in chosen.items()):
            yield f"random {index} {chosen!r:.200}", "", functools.partial(build, **chosen), ""


def fields(build: Callable[..., None]) -> Iterator[Case]:
    for field in dataclasses.fields(UNetConfig):
        for value in JUNK:
            optional = ("num_head_channels", "num_heads_upsample", "num_classes")
            minus = ("num_head_channels", "num_heads_upsample")  # guided-diffusion's None
            fits = [
                value is None and field.name in optional,
                value is True and field.type == "bool",
                value == -1 and field.name in minus,
                value in ([], {}) and field.name == "attention_strides",
                value == [4.0] and field.name == "channel_mult",
                field.name == "dropout" and type(value) in (int, float) and 0 <= value <= 1,
            ]
            if any(fits):
                continue
            attempt = functools.partial(build, unet={**UNET, field.name: value})
            yield f"unet.{field.name}={str(value)[:40]!r}", field.name, attempt, ""
    for key in ("", "model_chanels", 3, None, "preset"):
        yield f"unet[{key!r}]", "", functools.partial(build, unet={**UNET, key: "abc"}), ""


TYPOS = {
    "timestp": "timestep",
    "Blocks": "blocks",
    "feed_back": "feedback",
    "out_chanels": "out_channels",
    "check_point": "checkpoint",
    "activation_checkpoint": "activation_checkpointing",
    "frozen": "freeze",
    "data_type": "dtype",
}


def typos(build: Callable[..., None]) -> Iterator[Case]:
    for wrong, right in TYPOS.items():
        yield f"{wrong} for {right}", wrong, functools.partial(build, **{wrong: 1}), ""


def yaml_values(folder: Path) -> Iterator[Case]:
    from detectron2.config import get_cfg

    from diffbackbone.detectron2 import add_diffusion_config

    cfg = get_cfg()
    add_diffusion_config(cfg)
    for key, default in cfg.MODEL.DIFFUSION.items():
        if key in ("SCALE_FACTORS", "TOP_BLOCK"):  # the pyramids'
            continue
        for value in JUNK:
            if fits_yaml(key, default, value):
                continue
            told = "" if key in ("CHECKPOINT", "FEEDBACK_MAP", "UNET") else key.lower()
            attempt = functools.partial(by_yaml, folder, yaml_config(**{key: value}))
            yield f"{key}: {str(value)[:40]!r}", told, attempt, ""
    for wrong in ("TIMESTP", "timestep", "BLOCK", "FEEDBACKS", "CHECK_POINT"):
        attempt = functools.partial(by_yaml, folder, yaml_config(**{wrong: 1}))
        yield f"{wrong}:", wrong.lower(), attempt, "did you mean MODEL.DIFFUSION."
    for field in dataclasses.fields(UNetConfig):
        for value in ("abc", "x" * 5000, [[1]], [None], {"a": 1}, -(10**12), 10**12, NAN):
            attempt = functools.partial(
                by_yaml, folder, yaml_config(UNET_OPTIONS={field.name: value})
            )
            yield f"UNET_OPTIONS.{field.name}: {str(value)[:40]!r}", field.name, attempt, ""


def fits_yaml(key: str, default: Any, value: Any) -> bool:
    """Whether yacs and the builder may take a value: strings are read as Python's literals."""
    with contextlib.suppress(ValueError, SyntaxError):
        import ast

        value = ast.literal_eval(value) if isinstance(value, str) else value
    if isinstance(default, bool):
        return isinstance(value, bool)
    if key in ("SEED", "CLASS_LABEL"):
        return type(value) is int and (key == "SEED" or value < 0)
    if key == "TIMESTEP":
        return type(value) is int and 0 <= value < 1000
    if key == "OUT_CHANNELS":
        return type(value) is int and 0 <= value < 8192
    if key == "ACTIVATION_BUDGET":
        return isinstance(value, float) and not math.isnan(value) and abs(value) < INF
    if key == "BLOCKS":
        return value == (24, 27)
    if key in ("FEEDBACK", "CHECKPOINT"):
        return value == ""
    return value in ([], {}) and isinstance(default, (tuple, dict)) and type(value) in (list, dict)


TEXTS = {
    "tag apply": "MODEL: !!python/object/apply:os.system ['touch {canary}']",
    "tag in our key": "MODEL:\n  DIFFUSION:\n    BLOCKS: !!python/object/apply:os.mkdir [{canary}]",
    "tag new": "a: !!python/object/new:subprocess.Popen [[touch, {canary}]]",
    "tag eval": "a: !!python/object/apply:builtins.eval [\"open('{canary}', 'w')\"]",
    "tag name": "MODEL: {{DIFFUSION: {{NOISE: !!python/name:os.system }}}}",
    "tag module": "MODEL: {{DIFFUSION: {{NOISE: !!python/module:antigravity }}}}",
    "tag tuple": "MODEL: {{DIFFUSION: {{NOISE: !!python/tuple [1] }}}}",
    "tag unknown": "MODEL: !who {{a: 1}}",
    "code in a string": "MODEL: {{DIFFUSION: {{BLOCKS: \"open('{canary}', 'w')\"}}}}",
    "import in a string": "MODEL: {{MASK_ON: \"__import__('os').mkdir('{canary}')\"}}",
    "base tag": "_BASE_: !!python/object/apply:os.system ['touch {canary}']",
    "base missing": "_BASE_: nothing.yaml",
    "base itself": "_BASE_: config.yaml",
    "base folder": "_BASE_: .",
    "base number": "_BASE_: 3",
    "base list": "_BASE_: [a, b]",
    "open bracket": "MODEL: [1, 2",
    "open quote": "MODEL: 'abc",
    "tab": "MODEL:\n\tDIFFUSION: 1",
    "indent": "MODEL:\n  A: 1\n B: 2",
    "two colons": "MODEL: DIFFUSION: 1",
    "alias": "MODEL: *nothing",
    "percent": "%YAML 9.9\n---\na: 1",
    "two documents": "a: 1\n---\nb: 2",
    "list": "- 1\n- 2",
    "string": "abc",
    "number": "3",
    "section as value": "MODEL: 3",
    "section as list": "MODEL: {{DIFFUSION: [1]}}",
    "section none": "MODEL: {{DIFFUSION: null}}",
    "value as section": "MODEL: {{DIFFUSION: {{BLOCKS: {{a: 1}}}}}}",
    "number as key": "3: 4",
    "list as key": "? [1]\n: 2",
    "none as key": "null: 1",
    "deep list": "MODEL: " + "[" * 3000,
    "deep map": "MODEL: " + "{{a: " * 3000,
    "json": '{{"MODEL": {{"DIFFUSION": {{"BLOCKS": "x"}}}}}}',
    "html": "<html><body>404: Not Found</body></html>",
    "python": "import os\nos.system('touch {canary}')",
}
BYTES = {
    "utf-16": "MODEL: 1".encode("utf-16"),
    "latin-1": "MODEL: {DIFFUSION: {UNET: \xe9}}".encode("latin-1"),
    "zeros": bytes(100),
    "control": b"MODEL: \x01\x02",
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "surrogate": b"MODEL: \xed\xa0\x80",
}
PYTHON = {
    "syntax": "model = (",
    "indent": "model = 1\n  x = 2",
    "tabs": "if True:\n\tx = 1\n        y = 2",
    "missing import": "import there_is_no_such_module",
    "missing relative import": "from .nothing import model",
    "nothing": "",
    "half": "model = dict()",
    "zeros": "\0\0\0",
    "deep": "(" * 5000,
    "encoding": "# -*- coding: nonsense -*-\nmodel = 1",
}


def yaml_texts(folder: Path) -> Iterator[Case]:
    for name, text in {**TEXTS, **BYTES}.items():
        content = text.format(canary=folder / "canary") if isinstance(text, str) else text
        yield name, "config.yaml", functools.partial(by_yaml, folder, content), ""


def python_texts(folder: Path) -> Iterator[Case]:
    import argparse

    import lazyconfig_train_net

    def load(text: str) -> None:
        path = folder / "config.py"
        path.write_text(text)
        lazyconfig_train_net.load(argparse.Namespace(config_file=str(path), opts=[]))

    for name, text in PYTHON.items():
        yield name, "config.py", functools.partial(load, text), ""


def pyramids(folder: Path) -> Iterator[Case]:
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec

    from diffbackbone import detectron2 as adapter

    def build(builder: str, key: str, value: Any) -> None:
        cfg = get_cfg()
        adapter.add_diffusion_config(cfg)
        cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [127.5] * 3
        cfg.INPUT.FORMAT = "RGB"
        cfg.MODEL.DIFFUSION.UNET = "tiny"
        cfg.MODEL.DIFFUSION.BLOCKS = (24,) if "sfp" in builder else (30, 27, 24)
        cfg.MODEL.FPN.NORM = "LN"
        section, _, name = key.rpartition(".")
        node = functools.reduce(lambda node, part: node[part], section.split("."), cfg)
        node[name] = value
        getattr(adapter, builder)(cfg, ShapeSpec(channels=3))

    keys = ("MODEL.FPN.NORM", "MODEL.FPN.OUT_CHANNELS", "MODEL.DIFFUSION.SCALE_FACTORS",
            "MODEL.DIFFUSION.TOP_BLOCK", "MODEL.PIXEL_MEAN", "MODEL.FPN.FUSE_TYPE")  # fmt: skip
    for key in keys:
        for value in ("bn", None, -1, 10**12, NAN, [[1]], [None], ["x"], {"a": 1}, 2.5, "x" * 5000):
            builders = ["build_diffusion_sfp_backbone", "build_diffusion_fpn_backbone"]
            if key.endswith("SCALE_FACTORS"):
                builders = builders[:1]
            if key.endswith("FUSE_TYPE"):
                builders = builders[1:]
            for builder in builders:
                if key.endswith("NORM") and value is None and "fpn" in builder:
                    continue  # no norm
                attempt = functools.partial(build, builder, key, value)
                yield f"{builder} {key}={str(value)[:40]!r}", "", attempt, ""


OPENMMLAB = [*ARGUMENTS, "init_cfg", "pretrained"]
KINDS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "arguments": lambda _: arguments(by_hand, ARGUMENTS),
    "several arguments": lambda _: several(by_hand, ARGUMENTS, 200),
    "fields of the U-Net": lambda _: fields(by_hand),
}
if HAS_MMENGINE:
    KINDS["OpenMMLab arguments"] = lambda _: arguments(by_mmengine, OPENMMLAB)
    KINDS["OpenMMLab typos"] = lambda _: typos(by_mmengine)
    KINDS["OpenMMLab fields"] = lambda _: fields(by_mmengine)
if HAS_DETECTRON2:
    detectron2_arguments = [*(n for n in ARGUMENTS if n != "schedule"), "padding"]
    KINDS["LazyConfig arguments"] = lambda _: arguments(by_lazy_config, detectron2_arguments)
    KINDS["LazyConfig typos"] = lambda _: typos(by_lazy_config)
    KINDS["YAML values"] = yaml_values
    KINDS["YAML texts"] = yaml_texts
    KINDS["Python texts"] = python_texts
    KINDS["pyramids"] = pyramids
LEAST = {"arguments": 450, "several arguments": 150, "fields of the U-Net": 400, "YAML values": 500,
         "OpenMMLab arguments": 500, "LazyConfig arguments": 450, "YAML texts": 45}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_broken_configs_are_refused(kind, tmp_path):
    problems, count = [], 0
    for name, told, attempt, hint in KINDS[kind](tmp_path):
        count += 1
        message = None
        try:
            with watched(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt()
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        except HangError:
            problems.append(f"{name}: hangs")
            continue
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if message is None:
            problems.append(f"{name}: taken")
        elif told.lower() not in message.lower() or hint not in message:
            problems.append(f"{name}: says neither {told!r} nor {hint!r}: {message[:300]}")
        elif len(message) > 2500 or not 10 < len(message.splitlines()[0]) < 1000:
            problems.append(f"{name}: {len(message)} characters: {message[:100]}")
        if (tmp_path / "canary").exists():
            problems.append(f"{name}: ran code")
            os.rename(tmp_path / "canary", tmp_path / f"canary{count}")
    assert not problems, f"{len(problems)} of {count}\n" + "\n".join(problems[:14])
    assert count >= LEAST.get(kind, 5)


def test_a_config_of_these_parts_is_fine(tmp_path):
    """Else the others would prove nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_hand()
        if HAS_MMENGINE:
            by_mmengine()
        if HAS_DETECTRON2:
            by_lazy_config()
            by_yaml(tmp_path, yaml_config())
