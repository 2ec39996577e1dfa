"""Image classifiers of torchvision with their weights: from a file, the local cache or a download.

``load_classifier`` is what a workload calls; ``resolve_weights`` is the half of it that may touch
the network, for the one place in a suite run that may (``--resolve``). Both know four choices:

- ``auto``: torchvision's default ImageNet weights from the local cache, else one bounded download
  into that cache, else random weights, said loudly and recorded;
- ``imagenet``: the same, but an error where they cannot be had;
- ``none``: random weights from the seed;
- anything else: a file holding a state dict (or a checkpoint with one).
"""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from workloads.common import console
from workloads.common.checkpoints import read_checkpoint
from workloads.common.errors import UsageError
from workloads.common.whole_files import written_whole

if TYPE_CHECKING:
    from torch import Tensor, nn

# Bounds a socket that says nothing, not a slow download: 100 MB may take minutes on a thin line.
DOWNLOAD_SILENCE_SECONDS = 10.0
STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model_state", "model")
FINAL_LAYER_KEYS = ("fc.weight", "classifier.6.weight")


@dataclass(frozen=True)
class LoadedWeights:
    """Where the weights of a classifier come from, and what its outputs mean.

    Attributes:
        kind: ``imagenet``, ``file`` or ``random``, as recorded in results.
        source: The file, or the seed of random weights, for people.
        class_names: One name an output.
    """

    kind: str
    source: str
    class_names: tuple[str, ...]


class DownloadError(Exception):
    """The download failed or brought something else than what its name promises."""


def load_classifier(
    name: str, weights: str = "auto", seed: int = 42
) -> tuple[nn.Module, LoadedWeights]:
    """Build a torchvision classifier in evaluation mode on the CPU, in fp32.

    Args:
        name: A torchvision model name, such as ``resnet50``.
        weights: ``auto``, ``imagenet``, ``none`` or a file (see the module's text).
        seed: Fixes random weights; the caller's random state is left alone.

    Raises:
        UsageError: Weights that were asked for cannot be had, read, or do not fit the model.
        DamagedFileError: Their file is empty, cut off or altered.
    """
    path, kind = resolve_weights(name, weights)
    if path is None:
        return _random_classifier(name, seed)
    import torch
    from torchvision import models

    content = read_checkpoint(path, "name another weights file with --weights")
    content = content if isinstance(content, Mapping) else {}
    state = _state_dict(path, content)
    classes = next((len(state[key]) for key in FINAL_LAYER_KEYS if key in state), 1000)
    # On the meta device nothing is allocated or initialized: the file's tensors become the
    # parameters, which saves a second of start-up for VGG16.
    with torch.device("meta"):
        model = models.get_model(name, weights=None, num_classes=classes)
    try:
        model.load_state_dict(state, assign=True)
    except (RuntimeError, KeyError) as error:
        raise UsageError(
            f"the weights in {path} do not fit {name}; name a file saved from that model with "
            "--weights, or use --weights none"
        ) from error
    names = _class_names(content, classes)
    return model.float().eval().requires_grad_(False), LoadedWeights(kind, str(path), names)


def resolve_weights(name: str, weights: str) -> tuple[Path | None, str]:
    """Return (absolute path of the weights file or None for random weights, kind).

    May download once; the file then lies in torchvision's own cache for every later run.

    Raises:
        UsageError: ``imagenet`` cannot be had, or the named file does not exist.
    """
    if weights == "none":
        return None, "random"
    if weights not in ("auto", "imagenet"):
        path = Path(weights).expanduser().resolve()
        if not path.is_file():
            raise UsageError(
                f"no weights file {weights}; name an existing file with --weights, or use "
                "--weights auto"
            )
        known = {url.rpartition("/")[2] for url in _published_urls(name)}
        return path, "imagenet" if path.name in known else "file"
    url = _published_urls(name)[0]
    cached = _cache_folder() / url.rpartition("/")[2]
    if not cached.is_file():
        console.note(f"weights of {name}: downloading {url} once to {cached}")
        try:
            download(url, cached)
        except DownloadError as error:
            return _without_download(name, weights, cached, error)
    return cached.resolve(), "imagenet"


def download(url: str, target: Path) -> None:
    """Fetch ``url`` into ``target``, which appears whole or not at all.

    A name such as ``resnet50-11ad3fa6.pth`` carries the first digits of the file's SHA-256, which
    are checked (PyTorch's naming of published weights).

    Raises:
        DownloadError: No answer, a broken transfer, the wrong content, or nowhere to put it.
    """
    promised = re.search(r"-([0-9a-f]{8,})\.", target.name)
    try:
        with (
            urllib.request.urlopen(url, timeout=DOWNLOAD_SILENCE_SECONDS) as response,
            written_whole(target) as file,
        ):
            shutil.copyfileobj(response, file, 1 << 20)
            if response.length:
                raise DownloadError(f"the transfer stopped {response.length} bytes early")
            file.seek(0)
            if promised and not _sha256(file).startswith(promised[1]):
                raise DownloadError("its checksum is not the one in its name")
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(str(error)) from error


def _without_download(
    name: str, weights: str, cached: Path, error: DownloadError
) -> tuple[None, str]:
    if weights == "imagenet":
        raise UsageError(
            f"cannot download the ImageNet weights of {name} ({error}); put the file at {cached}, "
            "or use --weights none"
        ) from error
    console.loud_warning(
        f"no pretrained weights for {name} ({error}): going on with RANDOM weights. Speed is the "
        f"same, predictions mean nothing. To use real ones put the file at {cached}"
    )
    return None, "random"


def _random_classifier(name: str, seed: int) -> tuple[nn.Module, LoadedWeights]:
    import torch
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.get_model(name, weights=None)
    names = _class_names({}, 1000)
    return model.eval().requires_grad_(False), LoadedWeights("random", f"seed {seed}", names)


def _state_dict(path: Path, content: Mapping) -> Mapping[str, Tensor]:
    import torch

    nested = next((content[key] for key in STATE_DICT_KEYS if key in content), content)
    if not isinstance(nested, Mapping) or not any(
        isinstance(value, torch.Tensor) for value in nested.values()
    ):
        raise UsageError(f"{path} holds no state dict; save model.state_dict() with torch.save")
    return nested


def _class_names(content: Mapping, classes: int) -> tuple[str, ...]:
    stored = content.get("classes")
    if isinstance(stored, Sequence) and len(stored) == classes:
        return tuple(str(name) for name in stored)
    if classes == 1000:
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return tuple(f"class {index}" for index in range(classes))


def _published_urls(name: str) -> list[str]:
    """Return the addresses of a model's published weights, the default ones first."""
    from torchvision.models import get_model_weights

    published = get_model_weights(name)
    return [published.DEFAULT.url, *(entry.url for entry in published)]


def _cache_folder() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
