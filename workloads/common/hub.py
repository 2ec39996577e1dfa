"""Models of the Hugging Face hub: found, downloaded once, and loaded from their folder."""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from workloads.common import console
from workloads.common.errors import DamagedFileError, UsageError, as_out_of_memory, first_line
from workloads.common.files import cache_folder

DEFAULT_HUB = "https://huggingface.co"
# The hub's library retries for 23 s where nothing listens and for 82 s where nothing answers
# (huggingface_hub 2.4): one bounded question comes first.
HUB_PROBE_SECONDS = 4.0
# Commits of the models that are used without being named; a name may bring its own, NAME@COMMIT.
HUB_COMMITS = {"bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594"}
HUB_FILES = ("config.json", "model.safetensors")
# A tokenizer needs one of tokenizer.json and vocab.txt; not every model has all three files.
HUB_OPTIONAL_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


class HubUnreachableError(Exception):
    """The hub does not answer, or a transfer broke off."""


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
        raise HubUnreachableError(
            f"the download of {name} broke off ({first_line(error)})"
        ) from error
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
        part, folder, fix, output_loading_info=True, ignore_mismatched_sizes=True, **how
    )
    # What is missing gets random numbers from transformers, and would still be called pretrained.
    names = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    random = sorted(name for name in names if not name.startswith(new_layers))
    if random:
        raise UsageError(
            f"the weights in {folder} are not those of its config.json: {random[0]} and "
            f"{len(random) - 1} more are missing or of another shape; {fix}"
        )
    return model
