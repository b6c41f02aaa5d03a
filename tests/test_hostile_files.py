"""Broken and hostile checkpoints: errors of ours, never code run, a hang or memory filled.

All files are made and read in a process of its own, with bounded memory and a watchdog for each
file; the tests look at its reports. Flipped bits and lengths come from seeded generators.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib.util
import io
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from diffbackbone import CheckpointError, UNet, UNetConfig, load_checkpoint
from diffbackbone.checkpoint import METADATA_KEY

SMALL = UNetConfig(32, (1,), 1, (), num_head_channels=32, resblock_updown=False)
HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
SECONDS = 20  # for one file
MEMORY = 2 << 30  # address space beyond what the libraries take
RESIDENT = 300 << 20  # memory really used beyond that of whole files
CANARY = "canary"  # a file that code in a checkpoint would make
KEY = "middle_block.0.in_layers.2.weight"

Case = tuple[str, Any]
"""Suffix, and what is there: bytes, a function that makes something at a path, or (source,)."""


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: torch.randn_like(value) for key, value in UNet(SMALL).state_dict().items()}


def zipped(content: Any, archive: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def legacy(content: Any) -> bytes:
    return zipped(content, archive=False)


def model_zoo(content: dict[str, Any]) -> bytes:
    values = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in content.items()}
    return pickle.dumps({"model": values, "__author__": "someone"}, protocol=2)


FORMATS: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "zip": (".pt", zipped),
    "legacy": (".pth", legacy),
    "safetensors": (".safetensors", save),
    "pyth": (".pyth", lambda content: zipped({"model_state": content})),
    "pkl": (".pkl", model_zoo),
}


# --------------------------------------------------------------------------------------------------
# kinds of broken files


def whole() -> Iterator[Case]:
    """Nothing is wrong with these: else the others would prove nothing."""
    for suffix, write in FORMATS.values():
        yield suffix, write(weights())
    torch.serialization.set_crc32_options(False)
    yield ".pt", zipped(weights())
    torch.serialization.set_crc32_options(True)


def truncated() -> Iterator[Case]:
    rng = random.Random(1)
    for suffix, write in FORMATS.values():
        whole = write(weights())
        lengths = [len(whole) * tenth // 10 for tenth in range(10)]
        lengths += [1, 4, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(2))]
        for length in lengths:
            yield suffix, whole[:length]


def flipped(name: str, count: int) -> Iterator[Case]:
    rng = random.Random(name)
    suffix, write = FORMATS[name]
    whole = write(weights())
    for index in range(count):  # every third near an end, where the structure is
        size = len(whole)
        at = rng.randrange(size)
        if index % 3 == 0:
            at = rng.randrange(3000) if rng.random() < 0.6 else size - 1 - rng.randrange(3000)
        content, bit = bytearray(whole), rng.randrange(8)
        content[at] ^= 1 << bit
        yield suffix, bytes(content)


class _Call:
    """Pickles as a call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced[0], reduced[1:]

    def __reduce__(self):
        return self.reduced


def dtypes() -> Iterator[Case]:
    for dtype in ("int8", "uint8", "int64", "bool", "complex64", "float8_e4m3fn"):
        some = {**weights(), KEY: weights()[KEY].to(getattr(torch, dtype))}
        every = {key: value.to(getattr(torch, dtype)) for key, value in weights().items()}
        for content in (some, every):
            yield ".pt", zipped(content)
            yield ".pth", legacy(content)


def shapes() -> Iterator[Case]:
    value = weights()[KEY]
    for tensor in (
        torch.zeros(1).expand(10**6, 10**6),
        torch.empty(10**6, 10**6, device="meta"),
        torch.empty_like(value, device="meta"),
        torch.zeros(10**5, 10**5, layout=torch.sparse_coo),
        value.to_sparse(),
        torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.tensor(1.0),
        torch.zeros(0),
        value.transpose(0, 2)[:1],
    ):
        for key in (KEY, "time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"):
            yield ".pt", zipped({**weights(), key: tensor})
    far = {**weights(), "input_blocks.99999999999.0.weight": torch.zeros(1)}
    for name in ("zip", "legacy", "safetensors"):
        yield FORMATS[name][0], FORMATS[name][1](far)
    for key in ("input_blocks.\u00b2.0.weight", "input_blocks." + "9" * 5000):
        yield ".pt", zipped({**weights(), key: torch.zeros(1)})
    whole = legacy(weights())
    for old in (value.numel(), weights()["time_embed.2.weight"].numel()):  # BININT2 or BININT
        pattern = b"M" + old.to_bytes(2, "little")
        assert pattern in whole
        yield ".pth", whole.replace(pattern, b"J" + b"\xff\xff\xff\x7f")
    yield ".pt", zipped({"a": _Call(bytearray, 1 << 30)})
    yield ".pth", legacy({"a": _Call(bytearray, 1 << 30)})
    for size in (1 << 33, 1 << 62):
        yield ".pkl", b"\x80\x05\x96" + size.to_bytes(8, "little") + b"."
        yield ".pkl", b"\x80\x04\x8e" + size.to_bytes(8, "little") + b"."
    yield ".pkl", b"\x80\x02}r\xff\xff\xff\x7f."
    yield ".pkl", _pickled(_Call(np.ndarray, (1 << 32,), "O"))
    yield ".pkl", _pickled(_Call(np.ndarray, (1 << 40,), "f8"))
    for code in ("O", "V9", "M8[s]"):
        yield ".pkl", model_zoo({"w": _Call(np.dtype, code)})


def _pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps({"model": {KEY: value}, "__author__": "someone"}, protocol=protocol)


def code() -> Iterator[Case]:
    shell, line = f"touch {CANARY}", f"open({CANARY!r}, 'w').close()"
    inner = _Call(eval, line)
    for payload in (
        _Call(os.system, shell),
        inner,
        _Call(getattr, _Call(__import__, "os"), "system"),
        _Call(torch._utils._rebuild_parameter, inner, True, {}),
        _Call(torch.load, CANARY),
        *(_Call(np.ndarray, (1,), "O", b"12345678"), _Call(np.ndarray, (3,)), _Call(np.dtype, "O")),
        *(_Call(bytes, 1 << 40), np.array([None]), np.zeros(1, "f8,i4"), np.array(["a"])),
    ):
        yield ".pkl", _pickled(payload)
        for content in ({"state_dict": weights(), "author": payload}, payload):
            yield ".pt", zipped(content)
            yield ".pth", legacy(content)
            for suffix, protocol in ((".pkl", 0), (".pyth", 2), (".safetensors", 4)):
                yield suffix, pickle.dumps(content, protocol=protocol)
    for suffix in (".pt", ".pth", ".pkl", ".pyth"):  # by hand: INST, OBJ, STACK_GLOBAL, GLOBAL
        for text in (
            f"(S{shell!r}\nios\nsystem\n.",
            f"(cos\nsystem\nS{shell!r}\no.",
            f"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c{chr(len(shell))}{shell}\x85R.",
            f"cbuiltins\neval\n(S{line!r}\ntR.",
        ):
            yield suffix, text.encode("latin1")


def containers() -> Iterator[Case]:
    loop: dict[str, Any] = {}
    loop["model"] = loop
    deep: Any = {}
    for _ in range(150):
        deep = {"state_dict": deep}
    pickled = (
        *(3, None, "weights", {}, {"a": {"b": {"c": {}}}}, deep, loop, {"model": [1.0]}),
        dict(enumerate(weights().values())),
        {(key, 1): value for key, value in weights().items()},
        {**weights(), 3: torch.zeros(1)},
        {"state_dict": {None: torch.zeros(1)}},
        {key: value.tolist() for key, value in weights().items()},
        {**weights(), KEY: {"a": torch.zeros(1)}},
        {"k" * 10**5: torch.zeros(1)},
        {**weights(), **{f"x{i}": torch.zeros(1) for i in range(200)}},
        {f"{i}.time_embed.0.weight": torch.zeros(32, 32) for i in range(50)},
    )
    for content in ([weights()], torch.zeros(3), *pickled):
        yield ".pt", zipped(content)
        yield ".pth", legacy(content)
    for content in pickled:
        yield ".pkl", pickle.dumps(content, protocol=2)


def non_finite() -> Iterator[Case]:
    for value in (float("nan"), float("inf"), -float("inf")):
        for key in (KEY, "time_embed.0.bias"):
            tensor = weights()[key].clone()
            tensor.view(-1)[-1] = value
            for suffix, write in FORMATS.values():
                yield suffix, write({**weights(), key: tensor})
            half = {k: v.half() for k, v in {**weights(), key: tensor}.items()}
            yield ".pt", zipped(half)
    double = {**weights(), KEY: weights()[KEY].double() * 1e300}  # infinite in float32
    yield ".pt", zipped(double)


def archives() -> Iterator[Case]:
    def archive(**parts: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in parts.items():
                file.writestr(name, content)
        return buffer.getvalue()

    zeros = bytes(200 << 20)
    yield ".pt", archive(**{"a/data.pkl": zeros, "a/version": b"3\n"})
    yield ".pt", archive(**{"a/data.pkl": b"\x80\x02}.", "a/data/0": zeros})
    yield ".pt", _repacked(zipped(weights()), zipfile.ZIP_DEFLATED)
    yield ".pt", archive(readme=b"hello")
    yield ".pt", archive()
    yield ".pt", _repacked(zipped(weights()), zipfile.ZIP_STORED, "constants.pkl")
    whole = zipped(weights())
    for size in (1 << 31, (1 << 32) - 2):  # sizes far beyond the file, where they are declared
        for offset in (20, 24):
            content, at = bytearray(whole), whole.rfind(b"PK\x01\x02", 0, whole.rfind(b"PK\1\2"))
            content[at + offset : at + offset + 4] = size.to_bytes(4, "little")
            yield ".pt", bytes(content)


def _repacked(whole: bytes, compression: int, extra: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(whole)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
        if extra:
            new.writestr(f"{old.namelist()[0].split('/')[0]}/{extra}", b"\x80\x02).")
    return buffer.getvalue()


def headers() -> Iterator[Case]:
    whole = save(weights())
    size = int.from_bytes(whole[:8], "little")
    header, values = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    begin, end = header[KEY]["data_offsets"]
    changes = [{"data_offsets": x} for x in ([0, 0], [0, end], [begin, 1 << 62], [begin], None)]
    changes += [{"dtype": x} for x in ("F33", None, "I8", "F64", "F8_E8M0")]
    changes += [{"shape": x} for x in ([], [1 << 62, 4], [-1], [0], [2**64])]
    texts = [json.dumps({**header, KEY: {**header[KEY], **change}}).encode() for change in changes]
    texts += [b"", b"[]", b'{"a": 3}', b"\xff\xfe", b"{" * 10**5, b'{"__metadata__": 3}']
    for text in texts:
        yield ".safetensors", len(text).to_bytes(8, "little") + text + values
    for length in (0, size - 1, size + 1, len(whole), 1 << 40, (1 << 64) - 1):
        yield ".safetensors", length.to_bytes(8, "little") + whole[8:]
    for text in (
        *("", "{", "[]", "3", "null", '{"a": 3}', '{"channel_mult": [Infinity]}', "[" * 10**5),
        *('{"model_channels": "32"}', '{"num_heads": NaN}', '{"channel_mult": 3}', '"tiny"'),
        *('{"num_res_blocks": 1e9}', '{"model_channels": 100000000000}', '{"unknown": 1}'),
    ):
        yield ".safetensors", save(weights(), metadata={METADATA_KEY: text})


def garbage() -> Iterator[Case]:
    rng = random.Random(2)
    torch_magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    starts = (b"", b"PK\x03\x04", b"\x80\x02", torch_magic, b"\x7fELF")
    for suffix, _ in FORMATS.values():
        for start in starts:
            yield suffix, start + rng.randbytes(rng.randrange(1, 5000))
        yield suffix, bytes(1000)
        yield suffix, b"<html>404 Not Found</html>"
        yield suffix, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


def paths() -> Iterator[Case]:
    for suffix in (".pt", ".safetensors", ".pkl"):
        yield suffix, b""
        yield suffix, lambda path: path.mkdir()
        yield suffix, lambda path: os.mkfifo(path)
        yield suffix, lambda path: path.symlink_to(path)
        yield suffix, lambda path: path.symlink_to("nothing")
        yield suffix, lambda path: path.symlink_to("/dev/zero")
    for source in (
        *("a\0b.pt", "a" * 5000, f"{__file__}/weights.pt", "~no-such-user/weights.pt", ""),
        *("http://[", "http:///weights.pt", "diffbackbone://../checkpoint.py"),
    ):
        yield "", (source,)


MAKERS = (whole, truncated, dtypes, shapes, code, containers, non_finite, archives, headers,
          garbage, paths)  # fmt: skip
FLIPS = {"zip": 60, "legacy": 30, "safetensors": 30, "pyth": 20, "pkl": 30}
KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    **{make.__name__: make for make in MAKERS},
    **{f"flipped {name}": functools.partial(flipped, name, n) for name, n in FLIPS.items()},
}
WITHOUT_CHECKSUM = ("flipped legacy", "flipped safetensors", "flipped pkl")
"""Kinds where a flipped bit may change a weight unseen."""
UNNOTICED = ("whole", "flipped zip", "flipped pyth", *WITHOUT_CHECKSUM)
"""Kinds that may be read: there is a bit here and there that nothing depends on."""


# --------------------------------------------------------------------------------------------------
# the process that reads them


def readers(source: Any, model: UNet, checkpointer: Any) -> dict[str, Callable[[], Any]]:
    """What reads such a file into the model; each is a case."""
    suffix = source.suffix if isinstance(source, Path) else ""
    found: dict[str, Callable[[], Any]] = {}
    if suffix not in (".pkl", ".pyth"):
        found["U-Net"] = lambda: load_checkpoint(model, source)
    if isinstance(source, Path) and suffix != ".safetensors" and HAS_DETECTRON2:
        found["Detectron2"] = lambda: checkpointer.load(str(source))
    return found


def report(folder: Path) -> None:
    """Read every broken file, and print what came of it, one line of JSON for each."""
    wanted = torch.cat([value.flatten() for value in weights().values()])
    model, checkpointer = UNet(SMALL), None
    if HAS_DETECTRON2:
        from diffbackbone.detectron2.checkpoint import Checkpointer

        checkpointer = Checkpointer(model, strict=True)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MEMORY, resource.RLIM_INFINITY))
    for kind, make in KINDS.items():
        for number, (suffix, content) in enumerate(make()):
            path = folder / f"weights{number}{suffix}"
            source: Any = path
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, tuple):
                (source,) = content
            else:
                content(path)
            del content
            for reader, read in readers(source, model, checkpointer).items():
                for parameter in model.parameters():
                    parameter.data.zero_()
                line = {"kind": kind, "name": f"{number}{suffix}: {reader}", "error": None}
                print(json.dumps({"starts": line["name"]}), flush=True)
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                try:
                    read()
                except Exception as error:
                    kinds = (OSError, ValueError) if kind == "paths" else CheckpointError
                    ours = isinstance(error, kinds)
                    line.update(error=f"{type(error).__name__}: {error}"[:300], ours=ours)
                faulthandler.cancel_dump_traceback_later()
                after = torch.cat([value.flatten() for value in model.state_dict().values()])
                line.update(unchanged=not after.any(), right=torch.equal(after, wanted))
                line["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                line["ran"] = Path(CANARY).exists()
                print(json.dumps(line), flush=True)
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# the tests


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "TORCH_HOME": str(folder), "PYTHONPATH": paths}
    with open(folder / "out", "w+b") as out, open(folder / "err", "w+b") as err:
        code = subprocess.run(
            [sys.executable, __file__, str(folder)],
            stdout=out, stderr=err, cwd=folder, env={**os.environ, **env}, timeout=300,
        ).returncode  # fmt: skip
    lines = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    assert code == 0, f"{lines[-1:]}\n{(folder / 'err').read_text()[-3000:]}"  # crash or hang
    assert not (folder / CANARY).exists()
    return [line for line in lines if "kind" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_refused(reports, kind):
    assert len(reports) >= (700 if HAS_DETECTRON2 else 350)
    lines = [line for line in reports if line["kind"] == kind]
    assert lines or not HAS_DETECTRON2  # two kinds have formats of Detectron2 alone
    for line in lines:
        assert not line["ran"], line
        assert line["peak"] < reports[0]["peak"] + RESIDENT, line
        if line["error"] is None:
            assert kind in UNNOTICED, line
            assert line["right"] or kind in WITHOUT_CHECKSUM, line
            continue
        assert kind != "whole", line
        assert line["ours"], line
        assert line["unchanged"] or "Detectron2" in line["name"], line  # which loads what fits


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with contextlib.suppress(BrokenPipeError):
        report(Path(sys.argv[1]))
