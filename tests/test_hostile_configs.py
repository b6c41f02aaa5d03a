"""Broken and hostile configs never hang, crash the interpreter or run code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import math
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffbackbone import DiffusionBackbone, UNetConfig

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
HAS_MMSEG = importlib.util.find_spec("mmseg") is not None
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

Attempt = Callable[[], Any]


class HangError(BaseException):
    """Raised by the watchdog; nothing but the test catches it."""


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
    import diffbackbone.mmseg  # noqa: F401, I001  first
    from mmengine.config import Config
    from mmengine.registry import MODELS

    config = Config({"model": {"type": "DiffusionBackbone", **BASE, **arguments}})
    MODELS.build(config.model).init_weights()


def by_lazy_config(**arguments: Any) -> None:
    from detectron2.config import LazyCall, instantiate

    from diffbackbone.detectron2 import DiffusionBackbone as Wanted

    instantiate(LazyCall(Wanted)(**{**BASE, **arguments}))


def by_yaml(folder: Path, content: str | bytes | dict, builder: str = "backbone") -> None:
    import yaml
    from detectron2.layers import ShapeSpec

    from diffbackbone import detectron2 as adapter

    path = folder / "config.yaml"
    text = yaml.dump(content, allow_unicode=True) if isinstance(content, dict) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    build = getattr(adapter, f"build_diffusion_{builder}")
    build(adapter.load_yaml(str(path), []), ShapeSpec(channels=3))


def yaml_config(node: dict[str, Any], **model: Any) -> dict[str, Any]:
    node = {"UNET": "tiny", "BLOCKS": [24], **node}
    pixels = {"PIXEL_MEAN": [127.5] * 3, "PIXEL_STD": [127.5] * 3}
    return {
        "VERSION": 2, "MODEL": {"DIFFUSION": node, **pixels, **model}, "INPUT": {"FORMAT": "RGB"},
    }  # fmt: skip


def arguments(build: Callable[..., None], *more: str) -> Iterator[Attempt]:
    names = [*ARGUMENTS, *more]
    for name in [*names, "timestp"]:
        for value in JUNK:
            yield functools.partial(build, **{name: value})
    for field in (*(f.name for f in dataclasses.fields(UNetConfig)), "", "model_chanels", 3, None):
        for value in JUNK:
            yield functools.partial(build, unet={**UNET, field: value})
    rng = random.Random(3)
    for _ in range(200):
        chosen = {name: rng.choice(JUNK) for name in rng.sample(names, 3)}
        yield functools.partial(build, **chosen)


def yaml_values(folder: Path) -> Iterator[Attempt]:
    from detectron2.config import get_cfg

    from diffbackbone.detectron2 import add_diffusion_config

    cfg = get_cfg()
    add_diffusion_config(cfg)
    for value in JUNK:
        for key in (*cfg.MODEL.DIFFUSION, "TIMESTP"):
            yield functools.partial(by_yaml, folder, yaml_config({key: value}))
        for key in cfg.MODEL.DIFFUSION.UNET_OPTIONS:
            config = yaml_config({"UNET_OPTIONS": {key: value}})
            yield functools.partial(by_yaml, folder, config)
        for builder, blocks in (("sfp_backbone", [24]), ("fpn_backbone", [30, 27, 24])):
            for node, model in (
                *(({}, {"FPN": {key: value}}) for key in ("NORM", "OUT_CHANNELS", "FUSE_TYPE")),
                *(({key: value}, {}) for key in ("SCALE_FACTORS", "TOP_BLOCK")),
            ):
                config = yaml_config({"BLOCKS": blocks, **node}, **model)
                yield functools.partial(by_yaml, folder, config, builder)


TEXTS = (
    *("MODEL: !!python/object/apply:os.system ['touch {canary}']",
      "MODEL:\n  DIFFUSION:\n    BLOCKS: !!python/object/apply:os.mkdir [{canary}]",
      "a: !!python/object/new:subprocess.Popen [[touch, {canary}]]",
      "MODEL: {{DIFFUSION: {{NOISE: !!python/name:os.system }}}}",
      "MODEL: {{DIFFUSION: {{BLOCKS: \"open('{canary}', 'w')\"}}}}",
      "MODEL: {{MASK_ON: \"__import__('os').mkdir('{canary}')\"}}",
      "_BASE_: !!python/object/apply:os.system ['touch {canary}']",
      "import os\nos.system('touch {canary}')"),
    *("_BASE_: nothing.yaml", "_BASE_: config.yaml", "_BASE_: .", "_BASE_: 3", "_BASE_: [a, b]"),
    *("MODEL: [1, 2", "MODEL:\n\tDIFFUSION: 1", "MODEL: *nothing", "a: 1\n---\nb: 2"),
    *("- 1\n- 2", "abc", "MODEL: 3", "MODEL: {{DIFFUSION: null}}", "3: 4", "? [1]\n: 2"),
    *("MODEL: " + "[" * 3000, "MODEL: " + "{{a: " * 3000, "<html>404: Not Found</html>"),
)  # fmt: skip
BYTES = (
    "MODEL: 1".encode("utf-16"),
    "MODEL: {DIFFUSION: {UNET: \xe9}}".encode("latin-1"),
    bytes(100),
    b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
)
PYTHON = ("model = (", "import no_such_module", "", "model = dict()", "\0\0\0", "(" * 5000)


def texts(folder: Path) -> Iterator[Attempt]:
    from diffbackbone.detectron2.lazyconfig_train_net import load_lazy

    for text in TEXTS:
        yield functools.partial(by_yaml, folder, text.format(canary=folder / "canary"))
    for content in BYTES:
        yield functools.partial(by_yaml, folder, content)
    for index, text in enumerate(PYTHON):
        path = folder / f"config{index}.py"
        path.write_text(text)
        yield functools.partial(load_lazy, str(path), ["train.max_iter=3"])


# how attempts are made, and which part of them is tried
KINDS: dict[str, tuple[Callable[[Path], Iterator[Attempt]], int]] = {
    "constructor": (lambda _: arguments(by_hand), 1)
}
if HAS_MMSEG:
    KINDS["OpenMMLab"] = (lambda _: arguments(by_mmengine, "init_cfg", "pretrained"), 5)
if HAS_DETECTRON2:
    KINDS["LazyConfig"] = (lambda _: arguments(by_lazy_config, "padding"), 5)
    KINDS["YAML values"] = (yaml_values, 5)
    KINDS["texts"] = (texts, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_configs_neither_hang_nor_run_code(kind, tmp_path):
    make, step = KINDS[kind]
    refused, attempts = 0, list(itertools.islice(make(tmp_path), 0, None, step))
    for attempt in attempts:
        try:
            with watched(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt()
        except HangError:
            pytest.fail(f"hangs: {attempt!r:.500}")
        except Exception:
            refused += 1
        assert not (tmp_path / "canary").exists(), f"runs code: {attempt!r:.500}"
    assert refused > 0.8 * len(attempts)


def test_a_config_of_these_parts_is_fine(tmp_path):
    """Else the others would prove nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_hand()
        if HAS_MMSEG:
            by_mmengine()
        if HAS_DETECTRON2:
            by_lazy_config()
            by_yaml(tmp_path, yaml_config({}))
