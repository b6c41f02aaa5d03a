"""Every command and snippet of the documentation: commands parse, snippets run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import image_folders
import pytest

pytest.importorskip("tyro", reason="tyro is not installed")

from diffbackbone.__main__ import COMMANDS
from diffbackbone.cli import find_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
OTHER_PROGRAMS = {"make", "pip", "nox", "OMP_NUM_THREADS=1", "MMCV_WITH_OPS=1"}
"""Programs whose commands belong to installing and contributing; CI runs make's targets."""
NOT_RUN = {
    "docs/huggingface.md: import torch": "tests/test_transformers.py runs it",
    "docs/timm.md: import timm": "tests/test_torchvision_detection.py runs it",
    "docs/timm.md: import segmentation_models_pytorch as smp": "the same",
    "docs/timm.md: from collections import OrderedDict": "the same",
    "docs/backbone.md: DiffusionBackbone(": "needs timm's weights from the Hub",
    "docs/models.md: from diffbackbone import DiffusionBackbone": "needs weights from the Hub",
    "docs/models.md: sd = DiffusionBackbone(": "needs weights from the Hub",
    "docs/models.md: from safetensors.torch import save_file": "needs a pipeline's weights",
    "docs/models.md: clean = DiffusionBackbone(": "needs weights from the Hub",
    "docs/models.md: dit = DiffusionBackbone(": "needs weights from the Hub",
}
"""Snippets that this file only compiles, by page and beginning, with the reason."""


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Return (page, text) of the fenced blocks in some languages."""
    pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```"
    return [
        (page.relative_to(ROOT).as_posix(), text)
        for page, content in TEXTS.items()
        for text in re.findall(pattern, content, re.MULTILINE | re.DOTALL)
    ]


def commands() -> list[tuple[str, ...]]:
    """Return (page, words...) of the documented commands of this package, without launchers."""
    found = []
    for page, text in blocks("sh", "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] in OTHER_PROGRAMS:
                continue
            starts = [
                i for i, word in enumerate(words) if re.match(r"(tools/|diffbackbone$)", word)
            ]
            assert starts or "MMDETECTION" in line, f"{page}: unknown program: {line}"
            found += [(page, *words[i:]) for i in starts[:1]]
    return sorted(set(found))


def find_main(words: tuple[str, ...]) -> tuple[types.ModuleType, str, list[str]]:
    """Return the module and function behind a command, and its arguments."""
    if words[0] == "diffbackbone":
        module, function = COMMANDS[words[1]][0].split(":")
        arguments = words[2:]
    else:
        imports = ast.parse((ROOT / words[0]).read_text()).body[1]
        module, function = imports.module.removeprefix("diffbackbone."), imports.names[0].name
        arguments = words[1:]
    return importlib.import_module(f"diffbackbone.{module}"), function, list(arguments)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words, monkeypatch, tmp_path):
    """The command's own parser takes the arguments, and configs exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # mmseg's script sets it
    for folder in ("G", "D", "DIR"):  # checkouts
        for file in ("guided_diffusion/unet.py", "ssl_diff/__init__.py"):
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).touch()
    if words[1].endswith(("train_net.py", "visualize_predictions.py")):
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    module, function, arguments = find_main(words[1:])
    name, seen = module.__name__.removeprefix("diffbackbone."), []
    monkeypatch.setattr(sys, "argv", [words[1], *arguments])
    if name.startswith("openmmlab"):
        mmseg = pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
        assert find_config(arguments[0], ROOT / "configs/mmseg", (".py",))
        if name == "openmmlab.commands":
            script = {"train": "train.py", "evaluate": "test.py"}[function]
            path = Path(mmseg.__file__).parent / ".mim/tools" / script
            spec = importlib.util.spec_from_file_location("mmseg_script", path)
            tool = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(tool)
            tool.parse_args()
            return
        seen.append(arguments)
    elif name.endswith("train_net"):
        from diffbackbone.detectron2 import launch, load_yaml

        monkeypatch.setattr(launch, "launch_processes", lambda *_, args, **__: seen.extend(args))
        getattr(module, function)(arguments)
        if seen[0].config_file.endswith(".yaml"):
            load_yaml(seen[0].config_file, seen[0].opts)
    else:
        if "--suite" in arguments:
            module = importlib.import_module("diffbackbone.benchmark.gpu")
        monkeypatch.setattr(module, "run", lambda *given, **_: seen.append(given) or {})
        monkeypatch.setattr("diffbackbone.benchmark.report.format_table", lambda *_: "")
        getattr(module, function)(arguments)
    assert seen


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A folder with what snippets read; the 256-px model becomes the tiny one."""
    monkeypatch.chdir(tmp_path)
    image_folders.write_weights(tmp_path / "256x256_diffusion_uncond.pt")
    weights = tmp_path / "work_dirs/scenes/unet.safetensors"
    weights.parent.mkdir(parents=True)
    shutil.copy(ROOT / "diffbackbone/weights/tiny.safetensors", weights)
    (tmp_path / "my_mask_rcnn.yaml").write_text("MODEL: {MASK_ON: true}\n")


CLASSIFIER = """
import torch
from diffbackbone.models import build_network, resolve_network
fields = dict(model_channels=32, channel_mult=(1, 1), attention_strides=(2,))
fields |= dict(num_head_channels=32, image_size=32)
SMALL = {"preset": "gd256_classifier", **fields}
torch.save(build_network(resolve_network(SMALL)).state_dict(), "256x256_classifier.pt")
images = torch.zeros(1, 3, 32, 32)
"""


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda x: x.split("\n")[0][:50])
def test_snippets_run(page, code, stand_ins):
    compile(code, page, "exec")
    if any(f"{page}: {code}".startswith(key) for key in NOT_RUN):
        return
    for package in ("detectron2", "timm", "transformers"):
        if re.search(rf"^(from|import) {package}", code, re.MULTILINE):
            pytest.importorskip(package, reason=f"{package} is not installed")
    if "256x256_classifier.pt" in code:
        code = CLASSIFIER + code.replace('"gd256_classifier"', "SMALL")
    code = code.replace('"gd256_uncond"', '"tiny"').replace("1024, 1024", "64, 64")
    exec(compile(code, page, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", TEXTS[page]):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_zoo_lists_every_config():
    zoo = TEXTS[ROOT / "docs/zoo.md"]
    for path in (ROOT / "configs").glob("*/*.*"):
        name = path.name.replace("_160k.py", ".py").removesuffix(".py").removesuffix(".yaml")
        assert f"{name}.yaml" in zoo or f"{name}.py" in zoo, path
