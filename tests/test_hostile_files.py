"""Broken and hostile checkpoints: always an error of ours, never code run, a hang or memory filled.

All files are made and read in a process of its own, with bounded memory and a watchdog for each
file; the tests look at its reports. Flipped bits and lengths come from seeded generators.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import hashlib
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

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_strides=(),
    resblock_updown=False,
    num_head_channels=32,
)
HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
SECONDS = 20  # for one file
MEMORY = 2 << 30  # address space beyond what the libraries take
RESIDENT = 300 << 20  # memory really used beyond that
KEY = "middle_block.0.in_layers.2.weight"

Case = tuple[str, str, Any]
"""Name, suffix, and the file's content: bytes, or a function that makes something at a path."""


# --------------------------------------------------------------------------------------------------
# whole files


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: torch.randn_like(value) for key, value in UNet(SMALL).state_dict().items()}


def zipped(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def can_be_saved(tensor: torch.Tensor) -> bool:
    try:
        zipped(tensor)
    except (KeyError, RuntimeError):  # torch 2.1 has no file format for float8 and nested tensors
        return False
    return True


def legacy(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


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
    for name, (suffix, write) in FORMATS.items():
        yield name, suffix, write(weights())
    if not hasattr(torch.serialization, "set_crc32_options"):  # before torch 2.6
        return
    unchecked = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    torch.save(weights(), unchecked)
    torch.serialization.set_crc32_options(True)
    yield "zip without checksums", ".pt", unchecked.getvalue()


def truncated() -> Iterator[Case]:
    rng = random.Random(1)
    for name, (suffix, write) in FORMATS.items():
        whole = write(weights())
        lengths = [len(whole) * tenth // 10 for tenth in range(10)]
        lengths += [1, 4, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(2))]
        for length in lengths:
            yield f"{name} cut to {length}", suffix, whole[:length]


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
        yield f"{name} byte {at} bit {bit}", suffix, bytes(content)


def dtypes() -> Iterator[Case]:
    for dtype in ("int8", "uint8", "int64", "bool", "complex64", "float8_e4m3fn"):
        if not can_be_saved(torch.zeros(1).to(getattr(torch, dtype))):
            continue
        some = {**weights(), KEY: weights()[KEY].to(getattr(torch, dtype))}
        every = {key: value.to(getattr(torch, dtype)) for key, value in weights().items()}
        for name in ("zip", "legacy"):
            yield f"one {dtype} {name}", FORMATS[name][0], FORMATS[name][1](some)
            yield f"all {dtype} {name}", FORMATS[name][0], FORMATS[name][1](every)


def shapes() -> Iterator[Case]:
    value = weights()[KEY]
    huge = torch.zeros(1).expand(10**6, 10**6)
    wrong = {
        "expanded": huge,
        "meta": torch.empty(10**6, 10**6, device="meta"),
        "meta of the right shape": torch.empty_like(value, device="meta"),
        "sparse": torch.zeros(10**5, 10**5, layout=torch.sparse_coo),
        "sparse of the right shape": value.to_sparse(),
        "quantized": torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0),
        "transposed": value.transpose(0, 2)[:1],
    }
    for name, tensor in wrong.items():
        if not can_be_saved(tensor):
            continue
        for key in (KEY, "time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"):
            yield f"{name} {key}", ".pt", zipped({**weights(), key: tensor})
    far = {**weights(), "input_blocks.99999999999.0.weight": torch.zeros(1)}
    for name in ("zip", "legacy", "safetensors"):
        yield f"far block {name}", FORMATS[name][0], FORMATS[name][1](far)
    yield "digit", ".pt", zipped({**weights(), "input_blocks.\u00b2.0.weight": torch.zeros(1)})
    digits = "input_blocks." + "9" * 5000
    yield "digits", ".pt", zipped({**weights(), digits: torch.zeros(1)})
    whole = legacy(weights())
    for old in (value.numel(), weights()["time_embed.2.weight"].numel()):  # BININT2 or BININT
        pattern = b"M" + old.to_bytes(2, "little")
        assert pattern in whole
        yield f"storage {old}", ".pth", whole.replace(pattern, b"J" + b"\xff\xff\xff\x7f")
    yield "bytearray", ".pt", zipped({"a": _Call(bytearray, 1 << 30)})
    yield "bytearray legacy", ".pth", legacy({"a": _Call(bytearray, 1 << 30)})
    for size in (1 << 33, 1 << 62):
        yield f"BYTEARRAY8 {size}", ".pkl", b"\x80\x05\x96" + size.to_bytes(8, "little") + b"."
        yield f"BINBYTES8 {size}", ".pkl", b"\x80\x04\x8e" + size.to_bytes(8, "little") + b"."
    yield "memo", ".pkl", b"\x80\x02}r\xff\xff\xff\x7f."
    yield "objects", ".pkl", _pickled(_Call(np.ndarray, (1 << 32,), "O"))
    yield "array", ".pkl", _pickled(_Call(np.ndarray, (1 << 40,), "f8"))
    for code in ("O", "V9", "M8[s]"):
        yield f"dtype {code}", ".pkl", model_zoo({"w": _Call(np.dtype, code)})


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def _pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps({"model": {KEY: value}, "__author__": "someone"}, protocol=protocol)


def code(canary: str) -> Iterator[Case]:
    shell, line = f"touch {canary}", f"open({canary!r}, 'w').close()"
    inner = _Call(eval, line)
    payloads = {
        "os.system": _Call(os.system, shell),
        "eval": inner,
        "exec": _Call(exec, line),
        "open": _Call(open, canary, "w"),
        "Popen": _Call(subprocess.Popen, ("touch", canary)),
        "nested": _Call(list, [[_Call(map, eval, (line,))]]),
        "nested reduce": _Call(getattr, _Call(__import__, "os"), "system"),
        "as an argument": _Call(torch._utils._rebuild_parameter, inner, True, {}),
        "numpy": _Call(np.load, canary),
        "torch.load": _Call(torch.load, canary),
    }
    for name, payload in payloads.items():
        contents = {
            "value": {**weights(), KEY: payload},
            "metadata": {"state_dict": weights(), "author": payload},
            "whole": payload,
        }
        for where, content in contents.items():
            yield f"{name} {where} zip", ".pt", zipped(content)
            yield f"{name} {where} legacy", ".pth", legacy(content)
            for protocol in (0, 2, 4):
                suffix = (".pkl", ".pyth", ".safetensors")[protocol // 2]
                raw = pickle.dumps(content, protocol=protocol)
                yield f"{name} {where} pickle {protocol}", suffix, raw
        yield f"{name} model zoo", ".pkl", _pickled(payload)
    for number, suffix in enumerate((".pt", ".pth", ".pkl", ".pyth")):  # by hand: INST, OBJ, STACK_
        texts = (
            f"(S{shell!r}\nios\nsystem\n.",
            f"(cos\nsystem\nS{shell!r}\no.",
            f"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c{chr(len(shell))}{shell}\x85R.",
            f"cbuiltins\neval\n(S{line!r}\ntR.",
        )
        for index, text in enumerate(texts):
            yield f"by hand {number}.{index}", suffix, text.encode("latin1")


def containers() -> Iterator[Case]:
    loop: dict[str, Any] = {}
    loop["model"] = loop
    deep: Any = {}
    for _ in range(150):
        deep = {"state_dict": deep}
    contents = {
        "list": [weights()],
        "tensor": torch.zeros(3),
        "int": 3,
        "none": None,
        "string": "weights",
        "empty": {},
        "of dicts": {"a": {"b": {"c": {}}}},
        "deep": deep,
        "itself": loop,
        "ints as keys": dict(enumerate(weights().values())),
        "tuples as keys": {(key, 1): value for key, value in weights().items()},
        "an int as key": {**weights(), 3: torch.zeros(1)},
        "none as key": {"state_dict": {None: torch.zeros(1)}},
        "lists as values": {key: value.tolist() for key, value in weights().items()},
        "a dict as value": {**weights(), KEY: {"a": torch.zeros(1)}},
        "model list": {"model": [1.0]},
        "long key": {"k" * 10**5: torch.zeros(1)},
        "many keys": {**weights(), **{f"x{i}": torch.zeros(1) for i in range(2000)}},
        "many U-Nets": {f"{i}.time_embed.0.weight": torch.zeros(32, 32) for i in range(500)},
    }
    for name, content in contents.items():
        yield f"{name} zip", ".pt", zipped(content)
        yield f"{name} legacy", ".pth", legacy(content)
        if name not in ("list", "tensor"):
            yield f"{name} pickle", ".pkl", pickle.dumps(content, protocol=2)


def non_finite() -> Iterator[Case]:
    for value in (float("nan"), float("inf"), -float("inf")):
        for key in (KEY, "time_embed.0.bias"):
            tensor = weights()[key].clone()
            tensor.view(-1)[-1] = value
            for name, (suffix, write) in FORMATS.items():
                yield f"{value} {key} {name}", suffix, write({**weights(), key: tensor})
            half = {k: v.half() for k, v in {**weights(), key: tensor}.items()}
            yield f"{value} {key} half", ".pt", zipped(half)
    double = {**weights(), KEY: weights()[KEY].double() * 1e300}  # infinite in float32
    yield "double", ".pt", zipped(double)


def archives() -> Iterator[Case]:
    def archive(**parts: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in parts.items():
                file.writestr(name, content)
        return buffer.getvalue()

    zeros = bytes(200 << 20)
    yield "packed pickle", ".pt", archive(**{"a/data.pkl": zeros, "a/version": b"3\n"})
    yield "packed values", ".pt", archive(**{"a/data.pkl": b"\x80\x02}.", "a/data/0": zeros})
    yield "packed", ".pt", _repacked(zipped(weights()), zipfile.ZIP_DEFLATED)
    yield "no pickle", ".pt", archive(readme=b"hello")
    yield "empty", ".pt", archive()
    yield "torchscript", ".pt", _repacked(zipped(weights()), zipfile.ZIP_STORED, "constants.pkl")
    whole = zipped(weights())
    for size in (1 << 31, (1 << 32) - 2):  # sizes far beyond the file, where they are declared
        for offset in (20, 24):
            content, at = bytearray(whole), whole.rfind(b"PK\x01\x02", 0, whole.rfind(b"PK\1\2"))
            content[at + offset : at + offset + 4] = size.to_bytes(4, "little")
            yield f"declares {size} at {offset}", ".pt", bytes(content)
    start = whole.find(b"PK\x05\x06")
    for offset in range(4, 22, 2):
        content = bytearray(whole)
        content[start + offset : start + offset + 2] = b"\xff\x7f"
        yield f"directory {offset}", ".pt", bytes(content)


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
    suffix = ".safetensors"

    def changed(change: Any, key: str = KEY) -> bytes:
        new = {**header, key: {**header.get(key, {}), **change}} if key else change
        text = json.dumps(new).encode()
        return len(text).to_bytes(8, "little") + text + values

    for length in (0, 1, size - 1, size + 1, len(whole), 100_000_001, 1 << 40, (1 << 64) - 1):
        yield f"length {length}", suffix, length.to_bytes(8, "little") + whole[8:]
    begin, end = header[KEY]["data_offsets"]
    for offsets in (
        *([0, 0], [0, end], [end, begin], [begin, end + 4], [begin - 4, end], [begin, 1 << 62]),
        *([-1, end], [begin], [], "0", None, [0.5, 1], [begin, end, end], [1 << 70, 1 << 71]),
    ):
        yield f"offsets {offsets}", suffix, changed({"data_offsets": offsets})
    for dtype in ("F33", "f32", "", None, 3, "I8", "F64", "BF16", "U64", "F8_E8M0", "F4", "O"):
        yield f"dtype {dtype}", suffix, changed({"dtype": dtype})
    for shape in ([], [1 << 62, 4], [1 << 40], [-1], ["3"], None, [0], [1e3], [[3]], [2**64]):
        yield f"shape {shape}", suffix, changed({"shape": shape})
    for text in (
        *(b"", b"{", b"[]", b"null", b"3", b'{"a": 3}', b"\xff\xfe", b"{" * 10**5, b"[" * 10**5),
        *(b'{"__metadata__": 3}', b'{"__metadata__": {"a": 3}}', b'{"a": {}}', b"\x00" * 100),
    ):
        content = len(text).to_bytes(8, "little") + text + values
        yield f"JSON {text[:20]!r} ({len(text)})", suffix, content
    for text in (
        *("", "{", "[]", "3", "null", '{"a": 3}', '{"channel_mult": [Infinity]}', "[" * 10**5),
        *('{"model_channels": "32"}', '{"num_heads": NaN}', '{"channel_mult": 3}', '"tiny"'),
        *('{"num_res_blocks": 1e9}', '{"model_channels": 100000000000}', '{"unknown": 1}'),
    ):
        yield f"metadata {text[:30]}", suffix, save(weights(), metadata={METADATA_KEY: text})


def garbage() -> Iterator[Case]:
    rng = random.Random(2)
    starts = (
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        b"\x7fELF",
    )
    for suffix, _ in FORMATS.values():
        for start in starts:
            yield f"{start!r} random", suffix, start + rng.randbytes(rng.randrange(1, 5000))
        yield "zeros", suffix, bytes(1000)
        yield "text", suffix, b"<html>404 Not Found</html>"
        yield "LFS", suffix, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


def paths() -> Iterator[Case]:
    for suffix in (".pt", ".safetensors", ".pkl"):
        yield "empty", suffix, b""
        yield "folder", suffix, lambda path: path.mkdir()
        yield "pipe", suffix, lambda path: os.mkfifo(path)
        yield "loop of links", suffix, lambda path: path.symlink_to(path)
        yield "link to nothing", suffix, lambda path: path.symlink_to("nothing")
        yield "link to a device", suffix, lambda path: path.symlink_to("/dev/zero")
        if os.geteuid():  # root reads everything
            yield "no permission", suffix, _unreadable
    for name, source in {
        "nul": "a\0b.pt",
        "long": "a" * 5000,
        "below a file": f"{__file__}/weights.pt",
        "user": "~no-such-user/weights.pt",
        "nothing": "",
        "none": None,
        "int": 3,
        "list": ["weights.pt"],
        "bytes": b"weights.pt",
        "address": "http://[",
        "no host": "http:///weights.pt",
        "not in the package": "diffbackbone://../checkpoint.py",
    }.items():
        yield f"source {name}", "", (source,)


def _unreadable(path: Path) -> None:
    path.write_bytes(zipped(weights()))
    path.chmod(0)


KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "whole": whole,
    "truncated": truncated,
    "flipped zip": lambda: flipped("zip", 120),
    "flipped legacy": lambda: flipped("legacy", 60),
    "flipped safetensors": lambda: flipped("safetensors", 60),
    "flipped pyth": lambda: flipped("pyth", 40),
    "flipped pkl": lambda: flipped("pkl", 40),
    "dtypes": dtypes,
    "shapes": shapes,
    "code": lambda: code(CANARY),
    "containers": containers,
    "non-finite": non_finite,
    "archives": archives,
    "headers": headers,
    "garbage": garbage,
    "paths": paths,
}
WITHOUT_CHECKSUM = ("flipped legacy", "flipped safetensors", "flipped pkl")
"""Kinds where a flipped bit may change a weight unseen."""
UNNOTICED = ("whole", "flipped zip", "flipped pyth", *WITHOUT_CHECKSUM)
"""Kinds that may be read: there is a bit here and there that nothing depends on."""
CANARY = "canary"


# --------------------------------------------------------------------------------------------------
# the process that reads them


def readers(source: Any) -> dict[str, Callable[[], Any]]:
    """What reads such a file; each is a case."""
    suffix = source.suffix if isinstance(source, Path) else ""
    found = {}
    if suffix not in (".pkl", ".pyth"):
        found["U-Net"] = lambda: load_checkpoint(unet(), source)
    if isinstance(source, Path) and suffix != ".safetensors" and HAS_DETECTRON2:
        found["Detectron2"] = lambda: checkpointer().load(str(source))
    return found


@functools.cache
def unet() -> UNet:
    return UNet(SMALL)


@functools.cache
def checkpointer() -> Any:
    from diffbackbone.detectron2.engine import Checkpointer

    return Checkpointer(UNet(SMALL), strict=True)


def digest(module: torch.nn.Module) -> str:
    state = hashlib.sha256()
    for value in module.state_dict().values():
        state.update(value.numpy().tobytes())
    return state.hexdigest()


def report(folder: Path) -> None:
    """Read every broken file, and print what came of it, one line of JSON for each."""
    right = UNet(SMALL)
    right.load_state_dict(weights())
    wanted = digest(right)
    if HAS_DETECTRON2:
        checkpointer()
    with open("/proc/self/statm") as file:
        pages, resident = map(int, file.read().split()[:2])
    page = resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages * page + MEMORY, resource.RLIM_INFINITY))
    for kind, make in KINDS.items():
        for number, (name, suffix, content) in enumerate(make()):
            path = folder / f"weights{number}{suffix}"
            source: Any = path
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, tuple):
                (source,) = content
            else:
                content(path)
            del content
            for reader, read in readers(source).items():
                module = checkpointer().model if reader == "Detectron2" else unet()
                module.load_state_dict({k: torch.zeros_like(v) for k, v in weights().items()})
                before = digest(module)
                line = {"kind": kind, "name": f"{name}: {reader}", "error": None, "message": ""}
                print(json.dumps({"starts": line["name"]}), flush=True)
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                try:
                    read()
                except Exception as error:
                    line["error"] = type(error).__name__
                    line["ours"] = isinstance(error, (CheckpointError, FileNotFoundError))
                    line["message"] = str(error)
                faulthandler.cancel_dump_traceback_later()
                after = digest(module)
                line["unchanged"], line["right"] = before == after, after == wanted
                with open("/proc/self/statm") as file:
                    now = int(file.read().split()[1])
                line["memory"] = (now - resident) * page
                line["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                line["source"] = str(path) if source is path else ""
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
    with open(folder / "out", "w+b") as out, open(folder / "err", "w+b") as err:
        code = subprocess.run(
            [sys.executable, __file__, str(folder)],
            stdout=out,
            stderr=err,
            cwd=folder,
            env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "TORCH_HOME": str(folder)},
            timeout=300,
        ).returncode
    lines = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    assert code == 0, f"{lines[-1:]}\n{(folder / 'err').read_text()[-3000:]}"  # crash or hang
    assert not (folder / CANARY).exists()
    return [line for line in lines if "kind" in line]


def test_there_are_enough(reports):
    unread = set() if HAS_DETECTRON2 else {"flipped pyth", "flipped pkl"}  # its formats alone
    assert {line["kind"] for line in reports} == set(KINDS) - unread
    assert len(reports) >= (1200 if HAS_DETECTRON2 else 600)
    assert sum(line["error"] is not None for line in reports) >= 500


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_refused(reports, kind):
    for line in (line for line in reports if line["kind"] == kind):
        assert not line["ran"], line
        assert line["memory"] < RESIDENT, line
        assert line["peak"] < reports[0]["peak"] + RESIDENT, line
        if line["error"] is None:
            # a zip archive says some things twice, and of others torch reads neither
            assert kind in UNNOTICED or line["name"].startswith("directory"), line
            assert line["right"] or kind in WITHOUT_CHECKSUM, line
            continue
        assert kind != "whole", line
        assert line["ours"], line
        assert line["unchanged"] or "Detectron2" in line["name"], line  # which loads what fits
        first = line["message"].splitlines()[0]
        assert 10 < len(first.replace(line["source"], "")) < 500, line
        assert len(line["message"]) < 2500, line


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with contextlib.suppress(BrokenPipeError):
        report(Path(sys.argv[1]))
