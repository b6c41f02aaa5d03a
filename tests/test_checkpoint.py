"""Checkpoints: layouts that occur, safety, and one clear error for each way to be wrong."""

from __future__ import annotations

import hashlib
import http.server
import io
import multiprocessing
import os
import threading
import time

import golden
import pytest
import torch

from diffbackbone import CheckpointError, UNet, UNetConfig, load_checkpoint
from diffbackbone.checkpoint import read_checkpoint
from diffbackbone.models.gd_config import PRESETS
from diffbackbone.sources import RELEASED_CHECKPOINTS

SMALL = UNetConfig(32, (1, 1, 2), 1, (4,), num_head_channels=32)


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    return golden.fill(UNet(SMALL)).state_dict()


def check(path, state_dict, **kwargs):
    unet = UNet(SMALL)
    report = load_checkpoint(unet, path, **kwargs)
    for key, value in unet.state_dict().items():
        assert torch.equal(value, state_dict[key].float()), key
    assert set(report.loaded) == set(unet.state_dict())
    return report


def save(tmp_path, content, name="file.pt", **kwargs):
    torch.save(content, tmp_path / name, **kwargs)
    return tmp_path / name


WRAPPINGS = {
    "plain": lambda sd: sd,
    "half": lambda sd: {key: value.half() for key, value in sd.items()},
    "state_dict": lambda sd: {"state_dict": sd, "meta": {"iter": 3}},
    "model": lambda sd: {"model": sd, "optimizer": {}},
    "ema": lambda sd: {"model": {k: v * 0 for k, v in sd.items()}, "ema": sd},
    "twice": lambda sd: {"state_dict": {"model": sd}},
    "module": lambda sd: {"module." + k: v for k, v in sd.items()},
    "backbone": lambda sd: {
        "state_dict": {
            **{"backbone.unet." + k: v for k, v in sd.items()},
            "decode_head.conv_seg.weight": torch.zeros(1),
        }
    },
}


def test_prefix_chooses_between_several(tmp_path, state_dict):
    content = {p + k: v * (p == "b.") for p in ("a.", "b.") for k, v in state_dict.items()}
    check(save(tmp_path, content), state_dict, prefix="b.")
    with pytest.raises(CheckpointError, match=r"prefixes \['a.', 'b.'\].*, got 'c.'"):
        load_checkpoint(UNet(SMALL), tmp_path / "file.pt", prefix="c.")


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_and_prefixed(tmp_path, state_dict, wrapping):
    content = WRAPPINGS[wrapping](state_dict)
    report = check(save(tmp_path, content), content if wrapping == "half" else state_dict)
    if wrapping == "backbone":
        assert report.prefix == "backbone.unet."
        assert report.foreign == ("decode_head.conv_seg.weight",)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves `contents`, each with the length that it announces, to an empty cache."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.served.append(self.path)
            time.sleep(server.seconds)
            if self.path not in server.contents:
                self.send_error(404)
                return
            content, length = server.contents[self.path]
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.contents, server.served, server.seconds = {}, [], 0.0
        server.url = lambda path: f"http://127.0.0.1:{server.server_address[1]}{path}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def serialized(state_dict):
    torch.save(state_dict, file := io.BytesIO())
    return file.getvalue()


def test_urls_are_downloaded_once(server, state_dict):
    other = {key: value + 1 for key, value in state_dict.items()}
    for path, content in {"/weights.pt": state_dict, "/b/weights.pt": other}.items():
        data = serialized(content)
        server.contents[path] = (data, len(data))
    for _ in range(2):
        check(server.url("/weights.pt"), state_dict)
        check(server.url("/b/weights.pt"), other)
    assert server.served == ["/weights.pt", "/b/weights.pt"]


def test_failed_downloads_are_tried_again(server, state_dict, tmp_path):
    data = serialized(state_dict)
    digest = hashlib.sha256(data).hexdigest()[:16]
    long = "/" + "x" * 250 + ".pt"
    failures = {
        "/short.pt": (data[:-1000], len(data)),
        "/empty.pt": (b"", len(data)),
        f"/weights-{digest}.pt": (data[:-1] + b"x", None),
        long: None,  # there is no such file
    }
    for path, failure in failures.items():
        if failure is not None:
            server.contents[path] = failure
        with pytest.raises(CheckpointError, match="could not be downloaded.*give the local path"):
            load_checkpoint(UNet(SMALL), server.url(path))
        server.contents[path] = (data, len(data))
        check(server.url(path), state_dict)
    assert not list((tmp_path / "home").rglob("*.writing"))


def test_released_checkpoints_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "lsun_cat.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(serialized({"a": torch.zeros(1)}))
    assert read_checkpoint(RELEASED_CHECKPOINTS["lsun_cat"]).keys() == {"a"}


def download(url, home):
    os.environ["TORCH_HOME"] = str(home)
    assert read_checkpoint(url).keys() == {"a"}


def test_one_process_per_machine_downloads(server, tmp_path):
    """Without a process group or environment variables that tell; a machine has its own cache."""
    data = serialized({"a": torch.zeros(1)})
    server.contents["/a.pt"] = (data, len(data))
    server.seconds = 1.0
    context = multiprocessing.get_context("fork")

    def start(home):
        process = context.Process(target=download, args=(server.url("/a.pt"), tmp_path / home))
        process.start()
        return process

    def finish(process):
        process.join(60)
        return process.exitcode

    assert [finish(p) for p in [start(home) for home in ("first", "first", "other")]] == [0] * 3
    assert len(server.served) == 2

    server.seconds = 1000.0  # killed while it downloads
    killed = start("third")
    while len(server.served) < 3:
        time.sleep(0.05)
    killed.kill()
    killed.join()
    server.seconds = 0.0
    assert finish(start("third")) == 0


def test_blocks_that_are_not_built_are_not_loaded(tmp_path, state_dict):
    unet = UNet(SMALL, last_block=8)
    report = load_checkpoint(unet, save(tmp_path, state_dict))
    assert set(report.loaded) | set(report.unused) == set(state_dict)
    assert "out.0.weight" in report.unused
    again = save(tmp_path, unet.state_dict(), "partial.pt")  # as a training run would leave it
    twin = UNet(SMALL, last_block=8)
    load_checkpoint(twin, again)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in unet.state_dict().items())


def test_rgb_weights_are_spread_over_other_channels(tmp_path, state_dict):
    path, first = save(tmp_path, state_dict), "input_blocks.0.0.weight"
    rgb, grey = UNet(SMALL, 5), UNet(SMALL.replace(in_channels=1), 5)
    load_checkpoint(rgb, path)
    load_checkpoint(grey, path)
    image = torch.rand(1, 1, 64, 64) * 2 - 1
    with torch.no_grad():  # a grey image gives what it gives as RGB
        theirs = rgb.forward_features(image.expand(1, 3, -1, -1), 0, [5])[5]
        assert torch.allclose(grey.forward_features(image, 0, [5])[5], theirs, atol=1e-4)
    many = UNet(SMALL.replace(in_channels=5), 5)
    load_checkpoint(many, path)
    expected = 0.6 * state_dict[first][:, [0, 1, 2, 0, 1]]
    assert torch.allclose(many.state_dict()[first], expected)
    with pytest.raises(CheckpointError, match="expected .32, 3, 3, 3."):
        load_checkpoint(rgb, save(tmp_path, grey.state_dict(), "grey.pt"))


def test_label_embedding_is_left_out_without_labels(tmp_path):
    config = SMALL.replace(num_classes=7)
    path = save(tmp_path, golden.fill(UNet(config)).state_dict())
    report = load_checkpoint(UNet(SMALL), path)
    assert report.unused == ("label_emb.weight",)
    assert not load_checkpoint(UNet(config), path).unused
    with pytest.raises(CheckpointError, match="num_classes: the file has 7, this U-Net 8"):
        load_checkpoint(UNet(SMALL.replace(num_classes=8)), path)


def broken(state_dict):
    norm, zero = "middle_block.1.norm.weight", torch.zeros(1)
    without = {k: v for k, v in state_dict.items() if k != norm}
    encoder = {k: v for k, v in state_dict.items() if not k.startswith("output_blocks")}
    return {
        r"channel_mult: the file has \(1, 2, 2\), this U-Net \(1, 1, 2\)": UNet(
            SMALL.replace(channel_mult=(1, 2, 2))
        ).state_dict(),
        "num_res_blocks: .* 2, .* 1": UNet(SMALL.replace(num_res_blocks=2)).state_dict(),
        "this is a classifier": encoder,
        f"missing: {norm}": without,
        "unexpected: middle_block.3.weight": {**state_dict, "middle_block.3.weight": zero},
        rf"shape of {norm}: \(3,\), expected \(64,\)": {**state_dict, norm: torch.zeros(3)},
        "type of out.0.weight: torch.int8": {**state_dict, "out.0.weight": torch.zeros(32).char()},
        "no weights of this network.*conv1.weight": {"conv1.weight": zero},
        "no weights of this network.*none": zero,
        "out.0.weight are not dense tensors": {**state_dict, "out.0.weight": 3},
        "it looks like tiny": {k: torch.zeros(v.shape) for k, v in tiny().items()},
    }


def tiny():
    with torch.device("meta"):
        return UNet(UNetConfig.from_preset("tiny")).state_dict()


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, state_dict):
    unet = UNet(SMALL)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    for message, content in broken(state_dict).items():
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(unet, save(tmp_path, content))
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items())


def test_absent_file_tells_where_to_get_it(tmp_path):
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_preset("gd256_uncond"), 24)
    with pytest.raises(FileNotFoundError, match="OpenAI's.*256x256_diffusion_uncond.pt"):
        load_checkpoint(unet, tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match="lsun_cat.pt"):
        load_checkpoint(UNet(SMALL), tmp_path / "gone.pt")
    assert set(RELEASED_CHECKPOINTS) == set(PRESETS) - {"tiny"}
