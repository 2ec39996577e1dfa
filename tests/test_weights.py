"""Weights of classifiers: cache, download from a stand-in, own files, fallback to random."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from functools import partial

import pytest
import torch
from torchvision import models

from workloads.common import hub, weights
from workloads.common.errors import UsageError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def small_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return models.resnet18(weights=None).state_dict()


@pytest.fixture
def file_server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()

    class Server(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if "short" in self.path:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"only this")
            elif "chunk" in self.path:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"5\r\non")
            elif "ssh" in self.path:
                self.wfile.write(b"SSH-2.0\r\n")
            else:
                super().do_GET()

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Server, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def serve_state(file_server, state) -> str:
    """Put a state dict on the stand-in server under a name with its checksum; return its URL."""
    folder, address = file_server
    plain = folder / "plain.pth"
    torch.save(state, plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    plain.rename(folder / f"resnet18-{digest[:8]}.pth")
    return f"{address}/resnet18-{digest[:8]}.pth"


def test_auto_downloads_once_into_torchvisions_cache(cache, file_server, small_state, monkeypatch):
    url = serve_state(file_server, small_state)
    monkeypatch.setattr(weights, "_published_urls", lambda name: [url])
    model, loaded = weights.load_classifier("resnet18", "auto")
    assert loaded.kind == "imagenet"
    assert len(loaded.class_names) == 1000 and loaded.class_names[0] == "tench"
    assert torch.equal(model.fc.weight, small_state["fc.weight"])
    (cached,) = cache.iterdir()
    assert loaded.source == str(cached)

    def no_download(url, target):
        raise AssertionError("downloaded twice")

    monkeypatch.setattr(weights, "download", no_download)
    assert weights.resolve_weights("resnet18", "auto") == (cached, "imagenet")
    assert weights.resolve_weights("resnet18", str(cached)) == (cached, "imagenet")


@pytest.mark.parametrize(
    "broken",
    ["short-12345678.pth", "wrong-00000000.pth", "missing.pth", "chunk.pth", "ssh.pth"],
)
def test_a_failed_download_leaves_nothing_behind(broken, cache, file_server):
    folder, address = file_server
    (folder / "wrong-00000000.pth").write_bytes(b"something else")
    with pytest.raises(weights.DownloadError):
        weights.download(f"{address}/{broken}", cache / broken)
    assert list(cache.glob("*")) == list(cache.glob(".*")) == []


@pytest.mark.parametrize("endpoint", ["no-address", "http://exa mple", "http://[::1", "{}/ssh"])
def test_a_hub_that_is_none_does_not_answer(endpoint, file_server, monkeypatch):
    surprises = []
    monkeypatch.setattr(threading, "excepthook", surprises.append)
    monkeypatch.setenv("HF_ENDPOINT", endpoint.format(file_server[1]))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "")
    assert not hub.hub_answers.__wrapped__()
    assert not surprises


def test_auto_falls_back_to_random_weights_and_says_so(cache, monkeypatch, capsys):
    monkeypatch.setattr(weights, "_published_urls", lambda name: ["http://127.0.0.1:9/x.pth"])
    before = torch.get_rng_state()
    model, loaded = weights.load_classifier("resnet18", "auto", seed=3)
    assert loaded.kind == "random" and loaded.source == "seed 3"
    assert "RANDOM weights" in capsys.readouterr().err
    assert torch.equal(before, torch.get_rng_state())
    again, _ = weights.load_classifier("resnet18", "none", seed=3)
    assert torch.equal(model.conv1.weight, again.conv1.weight)
    with pytest.raises(UsageError, match="use --weights none"):
        weights.load_classifier("resnet18", "imagenet")


def test_a_file_of_ones_own_is_loaded_with_its_number_of_classes(tmp_path):
    own = models.resnet18(weights=None, num_classes=3)
    path = tmp_path / "own.pt"
    torch.save({"state_dict": own.state_dict(), "classes": ["cat", "dog", "frog"]}, path)
    model, loaded = weights.load_classifier("resnet18", str(path))
    assert loaded.kind == "file" and loaded.class_names == ("cat", "dog", "frog")
    picture = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(picture), own.eval()(picture))


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t", "regnet_y_400mf", "mobilenet_v3_small"])
def test_a_file_of_any_family_has_the_classes_of_its_last_layer(tmp_path, name):
    own = models.get_model(name, weights=None, num_classes=3).eval()
    # In the order of their names, as what comes from a safetensors file.
    torch.save(dict(sorted(own.state_dict().items())), tmp_path / "own.pt")
    model, loaded = weights.load_classifier(name, str(tmp_path / "own.pt"))
    assert loaded.class_names == ("class 0", "class 1", "class 2")
    picture = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(picture), own(picture))


def test_published_weights_are_loaded_as_torchvision_loads_them(tmp_path, monkeypatch):
    # The published file names its layers in a way that modules may no longer be named.
    state = models.densenet121(weights=None).state_dict()
    old = {
        re.sub(r"(layer\d+\.(?:norm|conv))(?=[12]\.)", r"\1.", key): x for key, x in state.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pth")
    model, _ = weights.load_classifier("densenet121", str(tmp_path / "densenet.pth"))
    assert torch.equal(model.classifier.weight, state["classifier.weight"])

    published = tmp_path / "inception.pth"
    torch.save(models.inception_v3(weights=None, init_weights=False).state_dict(), published)
    monkeypatch.setattr(weights, "_published_urls", lambda name: ["http://nowhere/inception.pth"])
    model, loaded = weights.load_classifier("inception_v3", str(published))
    assert (loaded.kind, model.transform_input) == ("imagenet", True)


def test_unusable_weights_files_are_one_sentence(tmp_path, small_state):
    foreign = tmp_path / "foreign.pth"
    foreign.write_text("no weights")
    empty = tmp_path / "empty.pth"
    torch.save({"epoch": 3}, empty)
    other, scalar, numbered = (tmp_path / f"{name}.pth" for name in ("other", "scalar", "numbered"))
    torch.save(models.squeezenet1_0(weights=None).state_dict(), other)
    torch.save(small_state | {"fc.weight": torch.tensor(1.0)}, scalar)
    torch.save(dict(enumerate(small_state.values())), numbered)
    for path, sentence in (
        (foreign, "cannot be read as a PyTorch file"), (empty, "no state dict"),
        (other, "do not fit resnet18"), (scalar, "do not fit"), (numbered, "do not fit"),
        (tmp_path / "nowhere.pth", "no weights file"), ("~nobody-here/x.pth", "no weights file"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=sentence):
            weights.load_classifier("resnet18", str(path))
