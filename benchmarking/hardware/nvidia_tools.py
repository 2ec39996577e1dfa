"""What nvidia-smi and nvidia-cuda-mps-control say when they are asked; nothing is changed here.

Standard library alone, since the drivers ask before anything is installed. nvidia-smi ends with 14
and a warning where a GPU's infoROM is damaged, and prints an error line in place of a GPU that is
lost, while what it says of the others is right: so lines are read first, and its exit status
decides only what an empty answer means.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarking.hardware.visible_devices import (
    VISIBLE,
    cards_of_nvidia_smi,
    names_none,
    visible_devices,
)

# Of a line of `nvidia-smi -L`.
A_GPU = re.compile(r"^GPU \d+: .*\(UUID: ", re.MULTILINE)
QUESTION_SECONDS = 60
MPS_QUESTION_SECONDS = 10
# The first control program that has static SM partitions, as gpu-configs/lib/mps.sh says, too.
STATIC_PARTITIONS_VERSION = 13010
# Unknown to older programs.
OPTIONAL_FIELDS = ("mig.mode.current", "compute_cap")
# As in `Gpu`; name last, since it alone could hold a comma.
FIELDS = ("index", "uuid", "compute_mode", *OPTIONAL_FIELDS, "name")


class NoGpuError(Exception):
    """There is no GPU to be used, or it cannot be asked; the message is a sentence with the fix."""

    def __init__(self, sentence: str, exit_code: int = 3) -> None:
        """Keep what a driver says and ends with."""
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Gpu:
    """A GPU and its settings, in nvidia-smi's words."""

    index: str
    uuid: str
    compute_mode: str
    mig_mode: str
    compute_capability: str
    name: str

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"GPU {self.index} ({self.name}, {self.uuid})"

    @property
    def lacks_mig(self) -> bool:
        """Whether the GPU has no MIG, in the words of newer and of older drivers."""
        return self.mig_mode in ("[N/A]", "[Not Supported]")

    @property
    def lacks_mps_limits(self) -> bool:
        """Whether MPS passes over limits of its clients: it has them since Volta (its manual)."""
        return re.fullmatch(r"[1-6]\.\d", self.compute_capability) is not None


def printable(text: str) -> str:
    """Return somebody else's text without what would steer the terminal, or is no text."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", text)


def ask(*words: str) -> tuple[str, int]:
    """Return what nvidia-smi prints and its exit status; a driver that hangs does not answer."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False,
            timeout=QUESTION_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error), 1
    return done.stdout, done.returncode


def lists_a_gpu() -> bool:
    """Whether nvidia-smi names any GPU, in whatever place: one that is lost hides no other.

    Raises:
        NoGpuError: A driver is there and does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        if Path("/proc/driver/nvidia/version").exists():
            raise NoGpuError(
                "an NVIDIA driver is loaded but nvidia-smi was not found; add it to the PATH, or "
                "choose --device cpu"
            )
        return False
    text, _ = ask("-L")
    if A_GPU.search(text):
        return True
    if not text.strip() or "No devices" in text:
        return False
    raise NoGpuError(
        f"nvidia-smi does not answer ({_first_line(text)}); mend the driver, or choose --device cpu"
    )


def find_gpu(device: str, selector: str | None, say: Callable[[str], None]) -> Gpu | None:
    """Return the GPU to use, `None` for the demonstration on the CPU; `say` gets lines about it.

    Args:
        device: auto, cuda or cpu; only a machine without a GPU gets the demonstration unasked.
        selector: An index or a UUID; else the first GPU that CUDA would see is taken.

    Raises:
        NoGpuError: A GPU was asked for or is there, but cannot be used.
    """
    if device == "cpu":
        say("CPU demonstration, as asked for (--device cpu).")
        return None
    restricting = None if selector else os.environ.get(VISIBLE)
    is_hidden = names_none(restricting)
    if not (is_hidden and device == "auto") and not lists_a_gpu():
        if device == "cuda" or selector:
            raise NoGpuError(
                "no NVIDIA GPU was found; without --device cuda and --gpu the CPU demonstration "
                "runs"
            )
        say("No NVIDIA GPU was found: this is the CPU demonstration, no sharing mode is in force.")
        return None
    if restricting is not None:
        visible = [] if is_hidden else visible_devices(os.environ, cards_of_nvidia_smi())
        if not visible and device == "auto":
            say("CPU demonstration: CUDA_VISIBLE_DEVICES hides every GPU.")
            return None
        selector = _whole_card(visible, restricting)
    gpu = select(selector, say)
    say(gpu.title)
    return gpu


def select(selector: str | None, say: Callable[[str], None]) -> Gpu:
    """Return the GPU of an index or a UUID, else the first; raises `NoGpuError`."""
    gpus, rest, status = _query()
    if not gpus:  # one GPU that is lost can make the question to all fail
        gpus = [gpu for card in cards_of_nvidia_smi() for gpu in _query("-i", card.uuid)[0]]
    if not gpus:
        said = (rest or ["nothing"])[0]
        raise NoGpuError(
            f"nvidia-smi names no GPU that can be used (it ended with {status}): {said}"
        )
    for line in rest:
        say(f"warning: nvidia-smi says: {line}")
    if not selector and len(gpus) > 1:
        say(f"Taking GPU {gpus[0].index} of {len(gpus)}; --gpu chooses another.")
    chosen = [gpu for gpu in gpus if not selector or selector in (gpu.index, gpu.uuid)]
    if chosen:
        return chosen[0]
    for gpu in gpus:
        say(f"  {gpu.title}")
    raise NoGpuError(f"there is no GPU '{printable(str(selector))}'; those above are there")


def refresh(gpu: Gpu) -> Gpu:
    """Return the GPU with its present settings; raises `NoGpuError` where it is gone."""
    gpus, rest, _ = _query("-i", gpu.uuid)
    if len(gpus) != 1:
        raise NoGpuError(f"GPU {gpu.uuid} no longer answers: {(rest or ['nothing was said'])[0]}")
    return gpus[0]


def mig_instances(gpu: Gpu) -> list[str]:
    """Return the profile of each MIG device of a GPU; raises `NoGpuError`."""
    text, _ = ask("-L")
    for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        if f"(UUID: {gpu.uuid})" in block.partition("\n")[0]:
            return re.findall(r"^\s+MIG (\S+)", block, re.MULTILINE)
    raise NoGpuError(f"its MIG devices could not be asked: {_first_line(text)}")


def mig_profiles(gpu: Gpu) -> list[str]:
    """Return the names of the MIG profiles that a GPU has; raises `NoGpuError`."""
    text, _ = ask("mig", "-lgip")
    row = rf"^\|\s+{gpu.index}\s+MIG (\S+)\s+\d+\s+\d+/\d+\s"
    names = re.findall(row, text, re.MULTILINE)
    if names:
        return names
    is_table = "| GPU instance profiles" in text and "Failed to" not in text
    if is_table or "No MIG-supported devices" in text:
        raise NoGpuError(f"nvidia-smi lists no MIG profiles for {gpu.title}")
    said = re.search("Failed to .*", text)  # behind the table's head
    raise NoGpuError(
        f"the MIG profiles of {gpu.title} could not be asked; nvidia-smi said: "
        f"{_first_line(said[0] if said else text)}"
    )


def time_slice(gpu: Mapping[str, Any]) -> str | None:
    """Return Default, Short, Medium or Long for the GPU with these facts, `None` where unknown.

    The driver alone is asked: a script's record may be older than a reload of the driver.
    """
    # A line of the table for each GPU: `|   0   Timeslice       Default       |`
    row = rf"^\|\s+{gpu.get('index')}\s+Timeslice\s+([A-Za-z]+)\b"
    # The exit status says nothing: a damaged infoROM changes it, and the table is right.
    found = re.search(row, ask("compute-policy", "-l")[0], re.MULTILINE)
    return found[1] if found else None


def ask_mps_control(pipe_directory: str, command: str) -> str | None:
    """Return what the MPS control daemon of a pipe directory answers, `None` when none does."""
    return _run_mps_control([], f"{command}\n", CUDA_MPS_PIPE_DIRECTORY=pipe_directory)


def why_no_static_partitions() -> str | None:
    """Return why MPS has no static SM partitions on this machine, `None` where it has."""
    found = re.search(r"version: *(\d+)", _run_mps_control(["-v"]) or "")
    if found and int(found[1]) >= STATIC_PARTITIONS_VERSION:
        return None
    return (
        f"static SM partitions need nvidia-cuda-mps-control {STATIC_PARTITIONS_VERSION} "
        f"(CUDA 13.1); this one is {found[1] if found else 'of unknown version'}"
    )


def _run_mps_control(flags: Sequence[str], text: str = "", **variables: str) -> str | None:
    # What the caller set for their own programs, such as CUDA_MPS_PROTOCOL_VERSION, stays away.
    without_cuda = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    try:
        answer = subprocess.run(
            ["nvidia-cuda-mps-control", *flags], input=text, capture_output=True, check=False,
            encoding="utf-8", errors="replace", env={**without_cuda, **variables},
            timeout=MPS_QUESTION_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def is_own_pipe_directory(folder: Path) -> bool:
    """Whether this user started the daemon there, which else takes no client of ours.

    Anybody can take a folder's name first, with a link in it to where a daemon of their own
    listens.
    """
    try:
        socket, folder_owner = (folder / "control").lstat(), folder.stat().st_uid
    except OSError:
        return False
    own = os.geteuid()
    return socket.st_uid == own and not stat.S_ISLNK(socket.st_mode) and folder_owner in (0, own)


def _query(*selection: str, fields: tuple[str, ...] = FIELDS) -> tuple[list[Gpu], list[str], int]:
    """Return the GPUs that it can tell about, what else it said, and its exit status.

    Index and UUID become parts of file names, so a line with others is no GPU.
    """
    text, status = ask(*selection, f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    for field in OPTIONAL_FIELDS:
        if f'"{field}" is not a valid field' in text and field in fields:
            return _query(*selection, fields=tuple(one for one in fields if one != field))
    gpus, rest = [], []
    for line in filter(str.strip, text.split("\n")):
        values = line.split(", ", len(fields) - 1)
        if re.match(r"\d{1,4}, GPU-[0-9A-Za-z-]+, ", line) and len(values) == len(fields):
            known = dict(zip(fields, map(printable, values), strict=True))
            gpus.append(Gpu(*(known.get(field, "[N/A]") for field in FIELDS)))
        else:
            rest.append(printable(line))
    return gpus, rest, status


def _whole_card(visible: Sequence[str], restricting: str) -> str:
    """Return the first of the visible devices, which has to be a whole card."""
    if not visible:
        raise NoGpuError(
            f"CUDA_VISIBLE_DEVICES='{printable(restricting)}' hides every GPU; unset it, name a "
            "GPU by --gpu, or choose --device cpu"
        )
    if visible[0].startswith("MIG-"):
        raise NoGpuError(
            f"CUDA_VISIBLE_DEVICES names the MIG device {visible[0]}, which is not the whole card: "
            "name the card with --gpu, each client gets an instance of it",
            exit_code=2,
        )
    return visible[0]


def _first_line(text: str) -> str:
    return printable(text.partition("\n")[0])
