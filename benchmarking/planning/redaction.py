"""Secrets of plans and flags stay out of what is recorded and printed: names and salted hashes do.

A secret is the value of an environment variable or a flag whose name says so, and whatever a plan
inherits. What was hidden is given again by the environment when a run goes on (`reveal`).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a word of the name ends with (PGPASSWORD), and what the last word is.
_SECRET_ENDS = (
    "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "APIKEY",
)  # fmt: skip
_SECRET_WORDS = frozenset(("AUTH", "COOKIE"))
# Of a variable's name alone: `--pass backward` and `--pass forward` are two jobs.
_SECRET_IN_VARIABLES = frozenset(("PASS", "PAT"))
_SECRET_KEYS = frozenset(("API", "ACCESS", "PRIVATE", "SECRET", "AUTH", "ENCRYPTION", "SIGNING"))
_PLAIN_KEYS = frozenset(("SORT", "PUBLIC", "PARTITION", "PRIMARY", "GROUP", "CACHE"))
# Secrets within a word: `https://user:PASSWORD@host`, `Authorization: Bearer TOKEN`.
_IN_A_WORD = re.compile(
    r"://[^/\s:@]*:(?P<URL_PASSWORD>[^/\s@]+)@|(?i:Bearer|Authorization\W+Basic) (?P<BEARER>\S+)"
)
_BLANK = re.compile(r"[ \t\r\n]")  # what parts the words of a line
# A flag whose value is the next word; `--no-auth` has none.
_FLAG = re.compile(r"-(?!-no-)[^=]*")
_SHELL_LINE = re.compile(r"-\w*c")  # the flag of a shell's line: `TOKEN=X run` is no one value
# A shorter value cannot be told from other text, and hides nothing worth stealing.
_SHORTEST = 6
_MASK = re.compile(r"hidden:([A-Z0-9_]+):([0-9a-f]{8}):([0-9a-f]{16})")


class NotRevealedError(Exception):
    """A value that was hidden is not in the environment; the message names the variable."""


def looks_secret(name: str) -> bool:
    """Whether a variable or flag of this name holds a secret: `HF_TOKEN`, `--api-key`."""
    words = re.split(r"[^A-Z0-9]+", name.upper().strip("-"))
    if len(words) > 1 and words[-1] in ("KEY", "PWD"):  # alone it is any key, or the folder
        is_variable = name.isupper() and words[-2] not in _PLAIN_KEYS
        return words[-2] in _SECRET_KEYS or is_variable
    if words[-1] in _SECRET_IN_VARIABLES:
        return name.isupper()
    return words[-1] in _SECRET_WORDS or any(word.endswith(_SECRET_ENDS) for word in words)


def secrets_of_words(words: Iterable[str]) -> dict[str, str]:
    """Return the secrets of a command line with names: `--token X`, `--token=X`, `HF_TOKEN=X`.

    Of words that are command lines themselves, too: `sh -c "run --token X"`.
    """
    found: dict[str, str] = {}
    before = ""
    for word in words:
        if word == "=":  # `TOKEN = X`, as Python writes it
            before += " ="
            continue
        if before.endswith(" ="):
            word = f"{before[:-2]}={word}"
        name, has_value, value = word.partition("=")
        while "=" in value and not looks_secret(name) and not _BLANK.search(value):
            name, _, value = value.partition("=")
        is_line = _BLANK.search(name) or (_SHELL_LINE.fullmatch(before) and _BLANK.search(word))
        if has_value and looks_secret(name) and not is_line:
            found[value] = _variable(name)
        elif _FLAG.fullmatch(before) and looks_secret(before) and not word.startswith("--"):
            found[word] = _variable(before)
        else:
            for inner in filter(_BLANK.search, (value, word)):
                found = secrets_of_line(inner) | found
        found = _secrets_within(word) | found
        before = word
    return found


def secrets_of_line(line: str) -> dict[str, str]:
    """Return the secrets of a command line that is one text."""
    within: dict[str, str] = {}
    try:
        words = shlex.split(line)
    except ValueError:  # only a shell can read it, but what stands between blanks is its words
        plain = re.sub("[\"']", "", line)
        words, within = plain.split(), _secrets_within(plain)
    return within | secrets_of_words(word.rstrip(";,)") for word in words)


def _secrets_within(text: str) -> dict[str, str]:
    matches = _IN_A_WORD.finditer(text)
    return {match[str(match.lastgroup)]: str(match.lastgroup) for match in matches}


def hidden_in_command_line(words: Sequence[str]) -> list[str]:
    """Return a command line to record: secrets hidden, in words that are command lines, too."""
    return Secrets(secrets_of_words(words)).hide(list(words))


def _variable(name: str) -> str:
    """A flag's name as the variable from which it is given again: `--api-key` is `API_KEY`."""
    return re.sub(r"[^A-Z0-9]+", "_", name.upper().strip("-"))


def _digest(salt: str, value: str) -> str:
    return hashlib.sha256(f"{salt}{value}".encode()).hexdigest()[:16]


@dataclass
class Secrets:
    """The secrets of one run: names by the values to hide everywhere, and inherited variables."""

    names: Mapping[str, str] = field(default_factory=dict)
    inherited: frozenset[str] = frozenset()
    salt: str = field(default_factory=lambda: secrets.token_hex(4))

    def __or__(self, other: Secrets) -> Secrets:
        """Return the secrets of both."""
        return Secrets({**self.names, **other.names}, self.inherited | other.inherited, self.salt)

    def hide(self, data: Any, *, mask: str = "hidden:{name}:{salt}:{digest}") -> Any:
        """Return plain data, or a text, with a mask in the place of every secret."""
        if isinstance(data, Mapping):
            return {
                key: f"inherited:{key}" if key in self.inherited else self.hide(value, mask=mask)
                for key, value in data.items()
            }
        if isinstance(data, (list, tuple)):
            return type(data)(self.hide(value, mask=mask) for value in data)
        if isinstance(data, str):
            # The longest first, as one may be part of another.
            for value, name in sorted(self.names.items(), key=lambda item: -len(item[0])):
                if len(value) >= _SHORTEST and value in data:
                    digest = _digest(self.salt, value)
                    shown = mask.format(name=name, salt=self.salt, digest=digest)
                    data = data.replace(value, shown)
        return data

    def name(self, text: str) -> str:
        """Return a text that is the same whatever the secrets are: a job's key."""
        # Within a command line that is one word of another.
        quoted = {value.replace("'", "'\"'\"'"): name for value, name in self.names.items()}
        return Secrets({**self.names, **quoted}).hide(text, mask="<{name}>")


def unsalted(text: str) -> str:
    """Return a text with names alone in the place of secrets: what two runs were given alike."""
    return _MASK.sub(r"<\1>", text)


def reveal(data: Any, environment: Mapping[str, str]) -> Any:
    """Return plain data with what `Secrets.hide` took from it, as the environment has it.

    Raises `NotRevealedError` where a variable is missing or has another value than then.
    """
    if isinstance(data, Mapping):
        return {key: reveal(value, environment) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(reveal(value, environment) for value in data)
    return _MASK.sub(lambda m: _value(m, environment), data) if isinstance(data, str) else data


def _value(mask: re.Match[str], environment: Mapping[str, str]) -> str:
    name, salt, digest = mask.groups()
    value = environment.get(name)
    if value is None or _digest(salt, value) != digest:
        raise NotRevealedError(
            f"the value of {name} is not kept with the run: set the variable {name} to what it was"
        )
    return value
