"""Models' weights: files of torch.save, torchvision's classifiers, models of the Hugging Face hub.

``load_classifier`` and the half of it that may touch the network, ``resolve_weights``, know four
choices of a classifier's weights:

- ``auto``: torchvision's default ImageNet weights from the local cache, else one bounded download
  into that cache, else random weights, with a warning and recorded;
- ``imagenet``: the same, but an error where they are not available;
- ``none``: random weights from the seed;
- anything else: a file holding a state dict (or a checkpoint with one).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import os
import pickle
import re
import socket
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads.common import console, torch
from workloads.common.errors import DamagedFileError, UsageError, as_out_of_memory, first_line
from workloads.common.files import cache_folder

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

DEFAULT_HUB = "https://huggingface.co"
# The hub's library retries for 23 s where nothing listens and for 82 s where nothing answers
# (huggingface_hub 2.4): one bounded question comes first.
HUB_PROBE_SECONDS = 4.0
# Commits of the models that are used without being named; a name may bring its own, NAME@COMMIT.
HUB_COMMITS = {"bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594"}
HUB_FILES = ("config.json", "model.safetensors")
# A tokenizer needs one of tokenizer.json and vocab.txt; not every model has all three files.
HUB_OPTIONAL_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


class DownloadError(Exception):
    """The download failed or brought something else than what was promised."""


class HubUnreachableError(Exception):
    """The hub does not answer, or a transfer broke off."""


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


# --- the Hugging Face hub -------------------------------------------------------------------------


def hub_endpoint() -> str:
    """Return the hub's address: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_HUB).rstrip("/")


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers within ``HUB_PROBE_SECONDS``; asked once a process.

    Where it does not, HF_HUB_OFFLINE is set, so that hub libraries imported later fail at once.
    """
    offline = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    if any(value.upper() in ("1", "ON", "YES", "TRUE") for value in offline):
        return False
    answers: list[bool] = []

    def probe() -> None:
        try:
            request = urllib.request.Request(hub_endpoint(), method="HEAD")
            with urllib.request.urlopen(request, timeout=HUB_PROBE_SECONDS):
                answers.append(True)
        except urllib.error.HTTPError as error:  # anything but a refusing proxy
            answers.append(error.code < 500 and error.code not in (403, 407))
        except (OSError, ValueError, http.client.HTTPException):
            pass

    # In a thread, because a name lookup knows no timeout.
    prober = threading.Thread(target=probe, daemon=True)
    prober.start()
    prober.join(HUB_PROBE_SECONDS)
    if answers != [True]:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return answers == [True]


def require_hub_cache() -> None:
    """Look for a place: without a home folder the hub's libraries make one named ``~`` right here.

    Raises:
        UsageError: There is none; the message names the variable to set.
    """
    if not os.environ.get("HF_HOME"):
        cache_folder()


def hub_model_folder(model: str) -> Path:
    """Return the local folder of ``owner/model`` or ``owner/model@COMMIT``.

    It is the hub's cache, into which the model is downloaded once.

    Raises:
        HubUnreachableError: It is not in the cache and cannot be downloaded.
        UsageError: The hub has no such model, or it lacks a file that is needed.
    """
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    name, _, commit = model.partition("@")
    revision = commit or HUB_COMMITS.get(name)
    try:
        cached = [try_to_load_from_cache(name, file, revision=revision) for file in HUB_FILES]
    except errors.HFValidationError as error:
        raise UsageError(
            f"{model!r} is neither a folder nor a model's name on the hub; name an existing folder "
            "or a hub model with --model"
        ) from error
    if all(isinstance(path, str) for path in cached):
        return Path(str(cached[0])).parent
    if not hub_answers():
        raise HubUnreachableError(f"{hub_endpoint()} does not answer")
    require_hub_cache()
    console.note(f"{model}: downloading from {hub_endpoint()} once, into the hub's cache")
    get = functools.partial(
        hf_hub_download, name, revision=revision, etag_timeout=HUB_PROBE_SECONDS
    )
    try:
        with console.stage(f"downloading {name}"):
            for file in HUB_FILES:
                folder = Path(get(file)).parent
            for file in HUB_OPTIONAL_FILES:
                with contextlib.suppress(errors.RemoteEntryNotFoundError):
                    get(file)
    except (
        errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
    ) as error:  # fmt: skip
        raise UsageError(
            f"the hub has no model {name!r} with {' and '.join(HUB_FILES)} that is open to you at "
            f"{revision or 'main'}; check the name given with --model"
        ) from error
    except PermissionError as error:
        raise UsageError(
            f"cannot keep {name} in {error.filename} ({error.strerror}); set XDG_CACHE_HOME to a "
            "folder that you may write"
        ) from error
    # What a broken transfer raises depends on the HTTP client of the hub's library.
    except Exception as error:
        raise HubUnreachableError(f"the download of {name} broke off ({error})") from error
    return folder


def load_from_folder(part: Any, folder: Path, fix: str, **how: Any) -> Any:
    """Return what transformers' class ``part`` makes of the files in ``folder``.

    ``fix`` is what to do about files that will not do; ``how`` are further arguments.

    Raises:
        UsageError: They cannot be read.
        DamagedFileError: The weights are cut off or altered.
    """
    try:
        return part.from_pretrained(folder, local_files_only=True, **how)
    # Each of its readers of foreign files raises what it likes.
    except Exception as error:
        if as_out_of_memory(error):
            raise
        if type(error).__name__ == "SafetensorError":
            raise DamagedFileError(
                f"{_damaged_file(folder)} is cut off or damaged; save it again, or {fix}"
            ) from error
        raise UsageError(
            f"{part.__name__} cannot read what lies in {folder} ({first_line(error)}); {fix}"
        ) from error


def _damaged_file(folder: Path) -> Path:
    """Return the first file of weights that cannot be opened; large models have several."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return file
    return folder / "model.safetensors"


def load_pretrained(
    part: Any, folder: Path, fix: str, new_layers: tuple[str, ...] = (), **how: Any
) -> Any:
    """Return the model of class ``part`` in ``folder``, only its ``new_layers`` without weights.

    ``new_layers`` are beginnings of their names; the rest is as in ``load_from_folder``.
    """
    from transformers import logging

    # New layers are reported as missing keys, and loading as a progress bar; both are expected.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, found = load_from_folder(
        part, folder, fix, output_loading_info=True,
        ignore_mismatched_sizes=bool(new_layers), **how,
    )  # fmt: skip
    # What is missing gets random numbers from transformers, and would still be called pretrained.
    names = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    random = sorted(name for name in names if not name.startswith(new_layers))
    if random:
        raise UsageError(
            f"the weights in {folder} are not those of its config.json: {random[0]} and "
            f"{len(random) - 1} more are missing or of another shape; {fix}"
        )
    return model
