"""Models' weights: files of torch.save, and torchvision's classifiers (the hub's models: hub.py).

``load_classifier`` and the half of it that may touch the network, ``resolve_weights``, know four
choices of a classifier's weights:

- ``auto``: torchvision's default ImageNet weights from the local cache, else one bounded download
  into that cache, else random weights, with a warning and recorded;
- ``imagenet``: the same, but an error where they are not available;
- ``none``: random weights from the seed;
- anything else: a file holding a state dict (or a checkpoint with one).
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import pickle
import re
import socket
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads.common import console, torch
from workloads.common.errors import DamagedFileError, UsageError, as_out_of_memory

# Bounds a socket that says nothing, not a slow download: 100 MB may take minutes on a thin line.
DOWNLOAD_SILENCE_SECONDS = 10.0
ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80"
STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model_state", "model")
# Beginnings of the names of a classifier's last layers, the very last of which has the classes.
HEADS = ("fc.", "classifier.", "head.", "heads.")
# DenseNets were published before PyTorch forbade dots in the names of modules.
DOTTED_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
# SHA-256 of the published files; their names carry the first eight digits only.
PUBLISHED_SHA256 = {
    "resnet18-f37072fd.pth": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    "resnet50-11ad3fa6.pth": "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
    "vgg16-397923af.pth": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
}


class DownloadError(Exception):
    """The download failed or brought something else than what was promised."""


# --- files of torch.save --------------------------------------------------------------------------


def read_checkpoint(path: Path, fix: str, *, check_sums: bool = False) -> Any:
    """Return what ``torch.save`` put into ``path``, its tensors on the CPU.

    Args:
        path: The file.
        fix: What to do about a file that will not do, for the end of the sentence.
        check_sums: Whether to hold the content against its CRC-32 first (0.1 s for 100 MB). PyTorch
            does not: a flipped bit becomes another weight. Some programs write no such sums.

    Raises:
        DamagedFileError: The file is empty, cut off or altered.
        UsageError: It is none of torch.save's, or holds Python objects besides tensors.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(ZIP_MAGIC))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); {fix}") from error
    if not start:
        raise DamagedFileError(f"{path} is empty; {fix}")
    is_archive = start == ZIP_MAGIC
    damaged = DamagedFileError(
        f"{path} is cut off or damaged ({path.stat().st_size} bytes); delete it, and {fix}"
    )

    def require_intact() -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise damaged from error
        if broken is not None:
            raise DamagedFileError(f"{path} is damaged: {broken} in it fails its checksum; {fix}")

    if check_sums and is_archive:
        require_intact()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # What a truncated or foreign file raises depends on where it ends: zip, pickle, storage sizes.
    except Exception as error:
        if as_out_of_memory(error):
            raise
        if is_archive:
            require_intact()
        if is_archive and isinstance(error, pickle.UnpicklingError):
            raise UsageError(
                f"{path} holds Python objects instead of weights alone, which are not loaded; "
                f"save model.state_dict() with torch.save, or {fix}"
            ) from error
        if start.startswith(PICKLE_MAGIC):
            # The format before PyTorch 1.6, which has no sums: nothing tells more.
            raise damaged from error
        raise UsageError(f"{path} cannot be read as a PyTorch file; {fix}") from error


# --- torchvision's classifiers --------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedWeights:
    """Where the weights of a classifier come from, and what its outputs mean."""

    kind: str  # `imagenet`, `file` or `random`, as recorded in results
    source: str  # the file, or the seed of random weights, for people
    class_names: tuple[str, ...]  # one an output


def load_classifier(
    name: str, weights: str = "auto", seed: int = 42
) -> tuple[torch.nn.Module, LoadedWeights]:
    """Build a torchvision classifier in evaluation mode on the CPU, in fp32.

    ``seed`` fixes random weights; the caller's random state is left alone.

    Raises:
        UsageError: Weights that were asked for are not available, or do not fit the model.
        DamagedFileError: Their file is empty, cut off or altered.
    """
    path, kind = resolve_weights(name, weights)
    from torchvision import models

    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = models.get_model(name, weights=None)
        loaded = LoadedWeights(kind, f"seed {seed}", _class_names({}, 1000))
        return model.eval().requires_grad_(False), loaded
    content = read_checkpoint(path, "name another weights file with --weights")
    content = content if isinstance(content, Mapping) else {}
    state = next((content[key] for key in STATE_DICT_KEYS if key in content), content)
    values = state.values() if isinstance(state, Mapping) else ()
    if not any(isinstance(value, torch.Tensor) for value in values):
        raise UsageError(f"{path} holds no state dict; save model.state_dict() with torch.save")
    try:
        state = {DOTTED_NAME.sub(r"\1", name): value for name, value in state.items()}
        head = max((name for name in state if name.startswith(HEADS)), default=None)
        classes = 1000 if head is None else len(state[head])
        # On the meta device nothing is allocated or initialized: the file's tensors become the
        # parameters, which saves a second of start-up for VGG16.
        build = functools.partial(models.get_model, name, weights=None, num_classes=classes)
        try:
            with torch.device("meta"):
                model = build()
        except NotImplementedError:  # RegNets work out their sizes with tensors
            model = build()
        model.load_state_dict(state, assign=True)
        if kind == "imagenet" and hasattr(model, "transform_input"):
            model.transform_input = True  # Inception's were trained on inputs of another scale
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"the weights in {path} do not fit {name}; name a file saved from that model with "
            "--weights, or use --weights none"
        ) from error
    loaded = LoadedWeights(kind, str(path), _class_names(content, classes))
    return model.float().eval().requires_grad_(False), loaded


def _class_names(content: Mapping, classes: int) -> tuple[str, ...]:
    stored = content.get("classes")
    if isinstance(stored, Sequence) and len(stored) == classes:
        return tuple(str(name) for name in stored)
    if classes == 1000:
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return tuple(f"class {index}" for index in range(classes))


def resolve_weights(name: str, weights: str) -> tuple[Path | None, str]:
    """Return (absolute path of the weights file or None for random weights, kind).

    May download once; the file then lies in torchvision's own cache for every later run. What is
    called ImageNet's has the published checksum, wherever it lies.

    Raises:
        UsageError: ``imagenet`` is not available, or the named file does not exist.
    """
    if weights == "none":
        return None, "random"
    if weights not in ("auto", "imagenet"):
        path = Path(os.path.expanduser(weights)).resolve()
        if not path.is_file():
            raise UsageError(
                f"no weights file {weights}; name an existing file with --weights, or use "
                "--weights auto"
            )
        known = any(url.endswith(f"/{path.name}") for url in _published_urls(name))
        return path, "imagenet" if known and _is_published(path) else "file"
    url = _published_urls(name)[0]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if cached.is_file() and _is_published(cached):
        return cached.resolve(), "imagenet"
    console.note(f"weights of {name}: downloading {url} once to {cached}")
    try:
        download(url, cached)
    except DownloadError as error:
        if weights == "imagenet":
            raise UsageError(
                f"cannot download the ImageNet weights of {name} ({error}); put the file at "
                f"{cached}, or use --weights none"
            ) from error
        console.loud_warning(
            f"no pretrained weights for {name} ({error}): going on with RANDOM weights. Speed is "
            f"the same, predictions mean nothing. To use real ones put the file at {cached}"
        )
        return None, "random"
    return cached.resolve(), "imagenet"


def _published_urls(name: str) -> list[str]:
    """Return the addresses of a model's published weights, the default ones first."""
    from torchvision.models import get_model_weights

    published = get_model_weights(name)
    return [published.DEFAULT.url, *(entry.url for entry in published)]


def _is_published(path: Path) -> bool:
    """Whether the file has the checksum that belongs to its name; true of a name without one."""
    with path.open("rb") as file:
        digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest().startswith(_promised_sha256(path.name))


def _promised_sha256(file_name: str) -> str:
    """Return the whole checksum of a published file, else the digits that its name carries."""
    in_name = re.search(r"-([0-9a-f]{8,})\.", file_name)
    return PUBLISHED_SHA256.get(file_name) or (in_name[1] if in_name else "")


def download(url: str, target: Path) -> None:
    """Fetch ``url`` into ``target``, which appears whole and with the right checksum or not at all.

    Raises:
        DownloadError: No answer, a broken transfer, the wrong content, or nowhere to put it.
    """
    default_timeout = socket.getdefaulttimeout()
    try:
        if not target.is_absolute():  # torch takes ~ for a name where there is no home folder
            raise PermissionError("there is no home folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Behind a firewall that drops packets, torch would wait forever.
        socket.setdefaulttimeout(DOWNLOAD_SILENCE_SECONDS)
        with console.stage(f"downloading {target.name}"):
            torch.hub.download_url_to_file(
                url, str(target), hash_prefix=_promised_sha256(target.name) or None, progress=False
            )
    except PermissionError as error:
        raise DownloadError(
            f"{target.parent}: {error.strerror or error}; set XDG_CACHE_HOME to a folder that you "
            "may write"
        ) from error
    # An address without a scheme is a ValueError, a wrong checksum a RuntimeError, and what answers
    # in another protocol or breaks off inside a chunk an HTTPException.
    except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise DownloadError(str(reason)) from error
    finally:
        socket.setdefaulttimeout(default_timeout)
