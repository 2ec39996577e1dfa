"""Which GPUs CUDA would see: the one reader of CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.

The rules are CUDA's (CUDA C++ Programming Guide, "CUDA Environment Variables"; torch.cuda's
`_parse_visible_devices` reads alike): a list of indices ends at the first entry that is none or
that no GPU has; an index is what `strtoul` makes of an entry; a list of `GPU-` or `MIG-` UUIDs,
each of which may be shortened as long as one device alone begins so, ends likewise; a device named
twice hides all; of MIG devices a process sees one. So empty, `-1`, and any nonsense mean no GPU.
Indices count in CUDA's order: PCI bus ids where CUDA_DEVICE_ORDER says so, else the fastest first.

Standard library alone: the drivers ask it before anything is installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
QUESTION_SECONDS = 60

_LISTED_CARD = re.compile(r"GPU \d+: (?P<name>.*) \(UUID: (?P<uuid>GPU-[0-9A-Za-z-]+)\)")
_LISTED_MIG = re.compile(r"\s+MIG .*\(UUID: (?P<uuid>MIG-[^)]+)\)")
# As `strtoul` reads it: plain digits alone, and so many that no number is in reach.
_LEADING_NUMBER = re.compile(r"\s*([+-]?[0-9]{1,20})", re.ASCII)
# Asks CUDA for its devices in its own order, in a process of its own: the driver reads the
# variables once.
_ASK_CUDA = """
import ctypes, json, uuid
cuda = ctypes.CDLL("libcuda.so.1")
count = ctypes.c_int()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
found = []
for ordinal in range(count.value):
    device, number = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    assert cuda.cuDeviceGet(ctypes.byref(device), ordinal) == 0
    assert cuda.cuDeviceGetUuid(number, device) == 0
    found.append("GPU-" + str(uuid.UUID(bytes=bytes(number))))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Card:
    """One GPU of the machine with the UUIDs of its MIG devices.

    `speed` orders unlike cards where CUDA cannot be asked: compute capability, then MiB.
    """

    uuid: str
    name: str = ""
    mig_uuids: tuple[str, ...] = ()
    speed: tuple[float, ...] = ()


def visible_devices(environment: Mapping[str, str], cards: Sequence[Card]) -> list[str]:
    """Return the UUIDs of the cards or of the MIG device that CUDA would see, in its order.

    Args:
        environment: The variables of the process that would use CUDA.
        cards: The machine's GPUs in the order of their PCI bus ids, as NVML counts them.
    """
    value = environment.get(VISIBLE)
    if names_none(value):
        return []
    if value is None:
        return [card.uuid for card in _in_cuda_order(environment, cards)]
    entries = value.split(",")
    if value.startswith("GPU-"):
        return _distinct(_by_prefix(entries, [card.uuid for card in cards]))
    if value.startswith("MIG-"):
        devices = [uuid for card in cards for uuid in card.mig_uuids]
        return _distinct(_by_prefix(entries, devices))[:1]
    ordered = _in_cuda_order(environment, cards)
    found = []
    for entry in entries:
        index = _index(entry)
        if not 0 <= index < len(ordered):
            break
        found.append(ordered[index].uuid)
    return _distinct(found)


def names_none(value: str | None) -> bool:
    """Whether a value of CUDA_VISIBLE_DEVICES hides every GPU of any machine."""
    if value is None or value.startswith(("GPU-", "MIG-")):
        return False
    return _index(value.split(",")[0]) < 0


def cards_of_nvidia_smi() -> list[Card]:
    """Return the cards that nvidia-smi lists, none where it cannot be asked.

    Lines that are no card are those of GPUs that are lost, and warnings.
    """
    cards: list[Card] = []
    for line in _answer("nvidia-smi", "-L").splitlines():
        card, device = _LISTED_CARD.match(line), _LISTED_MIG.match(line)
        if card:
            cards.append(Card(card["uuid"], card["name"]))
        elif device and cards:
            cards[-1] = replace(cards[-1], mig_uuids=(*cards[-1].mig_uuids, device["uuid"]))
    if len({card.name for card in cards}) > 1:
        speeds = _speeds_of_nvidia_smi()
        cards = [replace(card, speed=speeds.get(card.uuid, ())) for card in cards]
    return cards


def ask_cuda_for_order() -> list[str]:
    """Return the cards' UUIDs in CUDA's own order; empty where CUDA cannot be asked."""
    environment = {name: value for name, value in os.environ.items() if name != VISIBLE}
    answer = _answer(sys.executable, "-I", "-c", _ASK_CUDA, environment=environment)
    try:
        return json.loads(answer)
    except ValueError:
        return []


def _in_cuda_order(environment: Mapping[str, str], cards: Sequence[Card]) -> list[Card]:
    """Return the cards as CUDA counts them; cards of one model stay in the order of the bus."""
    if environment.get(ORDER) == "PCI_BUS_ID" or len({card.name for card in cards}) <= 1:
        return list(cards)
    by_uuid = {card.uuid: card for card in cards}
    order = ask_cuda_for_order()
    if set(order) == set(by_uuid):
        return [by_uuid[uuid] for uuid in order]
    return sorted(cards, key=lambda card: card.speed, reverse=True)


def _index(entry: str) -> int:
    """Return what `strtoul` makes of an entry, -1 where it begins with no number."""
    number = _LEADING_NUMBER.match(entry)
    return int(number[1]) if number else -1


def _by_prefix(entries: Sequence[str], uuids: Sequence[str]) -> list[str]:
    found = []
    for entry in entries:
        meant = [uuid for uuid in uuids if entry and uuid.startswith(entry)]
        if len(meant) != 1 or not entry.startswith(("GPU-", "MIG-")):
            break
        found.append(meant[0])
    return found


def _distinct(uuids: list[str]) -> list[str]:
    return uuids if len(set(uuids)) == len(uuids) else []


def _speeds_of_nvidia_smi() -> dict[str, tuple[float, ...]]:
    question = "--query-gpu=uuid,compute_cap,memory.total", "--format=csv,noheader,nounits"
    speeds = {}
    for line in _answer("nvidia-smi", *question).splitlines():
        uuid, *figures = line.split(", ")
        try:
            speeds[uuid] = tuple(map(float, figures))
        except ValueError:
            continue  # a warning, or a figure that this driver does not tell
    return speeds


def _answer(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Return what a program prints, whatever its exit status; nothing where it does not run."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="utf-8", errors="replace", check=False, timeout=QUESTION_SECONDS,
            env=environment,
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
