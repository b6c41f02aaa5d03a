"""What checkpoints may hold beside tensors: MMEngine's are read, attacks refused."""

from __future__ import annotations

import importlib.util
import io
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffbackbone import CheckpointError, UNet, UNetConfig, load_checkpoint
from diffbackbone import checkpoint as reading
from diffbackbone._unpickle import HistoryBuffer, allow_globals, check_weights
from diffbackbone.checkpoint import read_checkpoint

SMALL = UNetConfig(32, (1,), 1, (), num_head_channels=32, resblock_updown=False)
HAS_MMENGINE = importlib.util.find_spec("mmengine") is not None
needs_mmengine = pytest.mark.skipif(not HAS_MMENGINE, reason="mmengine is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The checkpoint of two iterations with averaged weights, and these in `averaged.pt`."""
    from mmengine.hooks import EMAHook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.unet = UNet(SMALL)

        def forward(self, inputs, mode):
            return {"loss": sum((x - 1).pow(2).mean() for x in self.parameters())}

    folder = tmp_path_factory.mktemp("mmengine")
    ema = EMAHook(momentum=0.5)
    Runner(
        Model(),
        str(folder),
        train_dataloader=torch.utils.data.DataLoader([{"inputs": 0}] * 2),
        train_cfg={"by_epoch": False, "max_iters": 2},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 1e-2}},
        param_scheduler={"type": "MultiStepLR", "milestones": [1], "by_epoch": False},
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": 1},
            "checkpoint": {"type": "CheckpointHook", "interval": 2, "by_epoch": False},
        },
        custom_hooks=[ema],
        experiment_name="test_unpickle",
    ).train()
    torch.save(ema.ema_model.module.unet.state_dict(), folder / "averaged.pt")
    return folder


@needs_mmengine
def test_mmengines_checkpoint_is_read_without_mmengine(trained, monkeypatch, no_safe_globals):
    monkeypatch.delitem(sys.modules, "mmengine.logging.history_buffer")
    before = torch.serialization.get_safe_globals()
    hub = read_checkpoint(trained / "iter_2.pth")["message_hub"]
    assert hub["runtime_info"]["iter"] == 1
    assert type(hub["log_scalars"]["train/lr"]) is HistoryBuffer
    assert set(torch.serialization.get_safe_globals()) == set(before)
    with allow_globals():
        check_weights(trained / "iter_2.pth")  # as torch before 2.10 needs it


@needs_mmengine
def test_averaged_weights_are_taken_from_mmengines_checkpoint(trained):
    unet, averaged = UNet(SMALL), torch.load(trained / "averaged.pt")
    load_checkpoint(unet, trained / "iter_2.pth")
    assert all(torch.equal(x, averaged[key]) for key, x in unet.state_dict().items())


@pytest.fixture
def no_safe_globals():
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@needs_mmengine
def test_mmengine_reads_its_checkpoint(trained, no_safe_globals):
    from diffbackbone.openmmlab.repairs import allow_checkpoint_globals

    allow_checkpoint_globals()
    read_checkpoint(trained / "iter_2.pth")  # leaves what is allowed
    data = (trained / "iter_2.pth").read_bytes()
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    history = loaded["message_hub"]["log_scalars"]["train/lr"]
    assert history.statistics("max") == 1e-2
    history.update(1.0)
    torch.save({"history": history}, again := io.BytesIO())
    assert b"_unpickle" not in again.getvalue()
    again.seek(0)
    assert torch.load(again, weights_only=True)["history"].mean() == history.mean()


def saved(tmp_path, content, archive=True):
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    return path


@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_arrays_and_scalars_are_read(tmp_path, core):
    content = {
        "double": np.arange(3.0),
        "short": np.ones((2, 3), np.int16, order="F"),
        "bool": np.array([True]),
        "empty": np.zeros((0, 3)),
        "swapped": np.arange(4, dtype=">i4"),
        "scalar": np.float64(12.5),
    }
    path = saved(tmp_path, content, archive=False)
    data = path.read_bytes()
    for other in (b"numpy._core", b"numpy.core"):  # of another numpy
        data = data.replace(other + b".multiarray", core.encode() + b".multiarray")
    path.write_bytes(data)
    for name, value in read_checkpoint(path).items():
        assert value.dtype == content[name].dtype.newbyteorder("="), name
        np.testing.assert_array_equal(value, content[name])
    assert np.dtype("int32").isnative


class Reduce:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class Owner:
    """Pickles as MMEngine's HistoryBuffer."""


Owner.__module__ = "mmengine.logging.history_buffer"
Owner.__qualname__ = Owner.__name__ = "HistoryBuffer"


def number(*state):
    """A data type of numbers with a state of its own."""
    return Reduce(np.dtype, ("f8", False, True), (3, "<", *state))


def array_of(dtype, content):
    return Reduce(
        np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (2,), dtype, False, content)
    )


@pytest.mark.parametrize(
    "attack",
    [
        Reduce(getattr, (Owner, "__init__")),
        Reduce(getattr, (np.ndarray, "mean")),
        Reduce(getattr, (np.dtype("float64"), "str")),
        array_of(number(None, None, None, -1, -1, 63), [1.0, None]),
    ],
)
@pytest.mark.parametrize("is_imported", [True, False])
def test_attacks_are_refused(tmp_path, monkeypatch, no_safe_globals, attack, is_imported):
    """Those of files are in test_hostile_files.py; these are of what MMEngine needs."""
    module = type(sys)("history_buffer")
    module.HistoryBuffer = Owner
    monkeypatch.setitem(sys.modules, Owner.__module__, module)
    if importlib.util.find_spec("mmengine") is None:  # pickle imports it, too
        monkeypatch.setitem(sys.modules, "mmengine", type(sys)("mmengine"))
    path = saved(tmp_path, attack)
    if not is_imported:
        monkeypatch.delitem(sys.modules, Owner.__module__)
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "state",
    [(None, None, None, -1, -1, 63), (None, ("a",), {"a": (np.dtype("f8"), 1 << 20)}, 8, 8, 0)],
    ids=["objects", "fields beyond the end"],
)
def test_numbers_stay_numbers(tmp_path, state):
    """The state of a data type could turn its numbers into pointers."""
    array = read_checkpoint(saved(tmp_path, [array_of(number(*state), b"A" * 16)]))[0]
    assert array.dtype.names is None
    assert not array.dtype.hasobject
    assert array.tolist() == np.frombuffer(b"A" * 16).tolist()


@pytest.mark.parametrize("archive", [True, False])
def test_weights_pass(tmp_path, archive):
    linear = nn.Linear(3, 2).half()
    content = {
        "state_dict": linear.state_dict(),
        "optimizer": {"lr": 0.1, "betas": (0.9, 0.99), "steps": [1, 2**40, None, True]},
        "twice": [linear.bias, linear.bias[1:], linear.weight.shape, torch.arange(3)],
    }
    check_weights(saved(tmp_path, content, archive))


# opcodes of pickles, by hand: torch writes none of this
STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"
)
ATTACKS = {
    "an item of a storage": STORAGE % 3 + b"M\xff\xffK\x05s.",
    "items of a storage": STORAGE % 3 + b"(M\xff\xffK\x05u.",
    "items of a new storage": b"ctorch.storage\nUntypedStorage\nK\x03\x85RM\xff\xffK\x05s.",
    "more values than there are": STORAGE % 4 + b".",
    "a call": b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
    "another operation": b"(ios\nsystem\n.",
    "a list of a storage": STORAGE % 3 + b"K\x05a.",
    "a bytearray": b"\x96" + (1 << 40).to_bytes(8, "little") + b".",
}


REFUSED = (pickle.UnpicklingError, TypeError, KeyError, AttributeError)


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_older_torch_would_let_in_is_refused(tmp_path, attack):
    code, path = ATTACKS[attack], tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + code)
        file.writestr("a/data/0", bytes(12))
        file.writestr("a/version", b"3\n")
    with pytest.raises(REFUSED):
        check_weights(path)
    if attack != "more values than there are":  # the values of other files stand behind
        header = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
        pickles = [pickle.dumps(value, protocol=2) for value in header]
        path.write_bytes(b"".join([*pickles, b"\x80\x02" + code]))
        with pytest.raises(REFUSED):
            check_weights(path)


@pytest.mark.parametrize("is_needed", [True, False])
def test_checkpoints_are_checked_where_torch_needs_it(tmp_path, monkeypatch, is_needed):
    path, checked = saved(tmp_path, {"a": torch.zeros(1)}), []
    monkeypatch.setattr(reading, "check_weights", checked.append)
    monkeypatch.setattr(reading, "_CHECKS_WEIGHTS", not is_needed)
    assert read_checkpoint(path).keys() == {"a"}
    assert checked == [path] * is_needed
