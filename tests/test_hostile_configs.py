"""Broken and hostile configs never hang, crash the interpreter or run code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffbackbone import DiffusionBackbone, UNetConfig

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


CONFIG = """
MODEL:
  DIFFUSION: {UNET: tiny, BLOCKS: [24]}
  PIXEL_MEAN: [127.5, 127.5, 127.5]
  PIXEL_STD: [127.5, 127.5, 127.5]
INPUT: {FORMAT: RGB}
VERSION: 2
"""


def by_yaml(folder: Path, content: str | bytes) -> None:
    from detectron2.layers import ShapeSpec

    from diffbackbone.detectron2 import build_diffusion_backbone, load_yaml

    path = folder / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    build_diffusion_backbone(load_yaml(str(path)), ShapeSpec(channels=3))


def arguments(_: Path) -> Iterator[Attempt]:
    for name in [*ARGUMENTS, "timestp"]:
        for value in JUNK:
            yield functools.partial(by_hand, **{name: value})
    for field in (*(f.name for f in dataclasses.fields(UNetConfig)), "", "model_chanels", 3, None):
        for value in JUNK:
            yield functools.partial(by_hand, unet={**UNET, field: value})
    rng = random.Random(3)
    for _ in range(200):
        chosen = {name: rng.choice(JUNK) for name in rng.sample(ARGUMENTS, 3)}
        yield functools.partial(by_hand, **chosen)


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


@pytest.mark.parametrize("make", [arguments, texts], ids=["constructor", "files"])
def test_broken_configs_neither_hang_nor_run_code(make, tmp_path):
    if make is texts:
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
        by_yaml(tmp_path, CONFIG)  # else the others would prove nothing
    refused, attempts = 0, list(make(tmp_path))
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


@pytest.mark.filterwarnings("ignore:.*RANDOM")
def test_a_config_of_these_parts_is_fine():
    by_hand()
