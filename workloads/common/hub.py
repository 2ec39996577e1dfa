"""Models from the Hugging Face hub: asked once, early and briefly, then local files only.

The hub's own libraries retry five times a file with growing pauses where there is no network (a
minute or more before the first error), and a tokenizer then comes back empty instead of failing.
So one bounded question decides, and what is loaded afterwards is always a local folder.
"""

from __future__ import annotations

import functools
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from workloads.common import console
from workloads.common.errors import UsageError

DEFAULT_ENDPOINT = "https://huggingface.co"
PROBE_SECONDS = 4.0
REQUIRED_FILES = ("config.json", "model.safetensors")
# A tokenizer needs one of tokenizer.json and vocab.txt; not every model has all three files.
OPTIONAL_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
TRUE_VALUES = frozenset(("1", "ON", "YES", "TRUE"))


class HubUnreachableError(Exception):
    """The hub does not answer, or a transfer broke off."""


def endpoint() -> str:
    """Return the hub's address: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers within ``PROBE_SECONDS``; asked once a process.

    Where it does not, HF_HUB_OFFLINE is set, so that hub libraries imported later fail at once.
    """
    offline = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    if any(value.upper() in TRUE_VALUES for value in offline):
        return False
    answers: list[bool] = []
    # In a thread, because a name lookup knows no timeout.
    probe = threading.Thread(target=lambda: answers.append(_probe(endpoint())), daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    if answers != [True]:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
    return True


def model_folder(name: str) -> Path:
    """Return the local folder of a hub model: from the hub's cache, else downloaded into it.

    Args:
        name: A hub name such as ``bert-base-uncased`` or ``owner/model``.

    Raises:
        HubUnreachableError: It is not in the cache and cannot be downloaded.
        UsageError: The hub has no such model, or it lacks a file that is needed.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = [try_to_load_from_cache(name, file) for file in REQUIRED_FILES]
    except HFValidationError as error:
        raise UsageError(
            f"{name!r} is neither a folder nor a model's name on the hub; name an existing folder "
            "or a hub model with --model"
        ) from error
    if all(isinstance(path, str) for path in cached):
        return Path(cached[0]).parent
    if not hub_answers():
        raise HubUnreachableError(f"{endpoint()} does not answer")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    console.note(f"{name}: downloading from {endpoint()} once, into the hub's cache")
    folder = None
    for file in (*REQUIRED_FILES, *OPTIONAL_FILES):
        try:
            path = hf_hub_download(name, file, etag_timeout=PROBE_SECONDS)
        except RepositoryNotFoundError as error:
            raise UsageError(
                f"the hub has no model {name!r} that is open to you; check the name given with "
                "--model"
            ) from error
        except LocalEntryNotFoundError as error:
            raise HubUnreachableError(f"{endpoint()} stopped answering") from error
        except EntryNotFoundError as error:
            if file in REQUIRED_FILES:
                raise UsageError(
                    f"the hub's model {name!r} has no {file}; choose another with --model"
                ) from error
            continue
        # What a broken transfer raises depends on the HTTP client of the hub's library.
        except Exception as error:
            raise HubUnreachableError(f"the download of {file} broke off ({error})") from error
        folder = folder or Path(path).parent
    return folder


def _probe(address: str) -> bool:
    """Whether something other than a refusing proxy answers at ``address``."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code not in (403, 407)
    except (OSError, ValueError):
        return False
