"""One unit of a fleet: a whole card, looked at and measured, in a folder that a repeat goes on in.

Under the fleet's folder, HOST/UUID/ is what run_experiments.sh writes; next to it lie UUID.json,
the unit's record, UUID.log, all that was said, and UUID.lock. Nothing here knows Ray: a job of
Slurm or of Kubernetes runs a unit as well.

The unit is a process of its own, and the driver's parent. It hears that whoever started it has died
by the end-of-file of its standard input, as clients hear it of their launcher: the kernel closes
the pipe however the other ends. Then it sends the driver SIGTERM, which undoes its mode and
reports.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarking.cli import (
    EXIT_COMPLETE,
    EXIT_INTERRUPTED,
    EXIT_MODE_NOT_IN_FORCE,
    EXIT_NO_GPU,
    EXIT_USAGE,
    RunEnded,
    SuiteError,
)
from benchmarking.drivers import program
from benchmarking.drivers.driver_arguments import PROJECT_ROOT, SAVED_ARGUMENTS
from benchmarking.hardware import nvml
from benchmarking.hardware.visible_devices import VISIBLE, cards_of_nvidia_smi, visible_devices
from benchmarking.measuring import jobs, locks
from benchmarking.measuring.card import look_for_foreign_processes, usable_cores
from benchmarking.measuring.stop_signal import StopSignal
from benchmarking.modes.mode_scripts import ModeScriptError, lock_reason, run_script
from benchmarking.planning.redaction import secrets_of_words
from benchmarking.records.files import NOT_DECODED, read_file
from benchmarking.records.run_folder import utc_now, write_json_atomic
from benchmarking.records.writing import append_text, open_own, take_lock

SCHEMA_VERSION = 1
DRIVER = PROJECT_ROOT / "run_experiments.sh"
HEALTH_CHECK = "benchmarking/hardware/card_health.py"
HEALTH_SECONDS = 180.0  # at most, for 20 s of load: PyTorch takes its time to start
# How long the driver of a worker that was killed may take to undo its mode and to report.
LOCK_SECONDS = 600.0
POLL_SECONDS = 0.2
RECORD_WORD = "record: "
# What makes a repeat the same unit.
IDENTITY = ("plan", "commit")


class Gpu(msgspec.Struct):
    """What a unit's record says of its card, as far as somebody reads it."""

    uuid: str
    name: str | None
    driver_version: str | None


class Health(msgspec.Struct, kw_only=True):
    """What the health check found of a card; null is what it could not read."""

    seconds: float | None = None
    repeats: int | None = None
    copy_bytes_per_second: float | None = None
    matrix_operations_per_second: float | None = None
    sm_clock_mhz: float | None = None
    power_draw_watts: float | None = None
    temperature_celsius_max: float | None = None
    throttle_reasons: list[str] | None = None
    pci_bus_id: str | None = None
    power_limit_watts: float | None = None
    power_default_limit_watts: float | None = None
    sm_clock_max_mhz: float | None = None
    ecc_corrected_errors: float | None = None
    ecc_uncorrected_errors: float | None = None
    xids: list[int] | None = None


class UnitRecord(msgspec.Struct, kw_only=True):
    """A unit's record, as it is read: it may be another host's, or another version's."""

    schema_version: Literal[1] = 1  # SCHEMA_VERSION
    host: str
    gpu: Gpu
    plan: str
    commit: str | None
    host_cores: int | None
    attempts: int = 0
    started_at: str | None = None
    health: Health | None
    health_failure: str | None = None
    exit_code: int | None
    reason: str | None = None


def run_units(options: argparse.Namespace, stop: StopSignal) -> int:
    """Measure one card after another, or go on where that was cut off; return the exit code.

    That is the driver's, of several cards the last that is not 0.

    Args:
        options: `gpu` (an entry of CUDA_VISIBLE_DEVICES; `None`: each visible card), `host`
            (`None`: this one's name), `output`, `flags` for run_experiments.sh, `stop_at_eof`.
        stop: Whether somebody asked to stop.

    Raises:
        SuiteError: There is no card, or its folder is another unit's.
        RunEnded: Somebody asked to stop before a card was begun.
    """
    # Ray blocks SIGINT in its workers, which their children inherit.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if options.stop_at_eof:
        threading.Thread(target=_stop_at_eof, args=[stop], daemon=True).start()
    place = options.output / _host_name(options.host)
    program.make_folder("--output", place)
    code = EXIT_COMPLETE
    for gpu in _find_cards(options.gpu):
        if stop.requested:
            raise RunEnded("interrupted", EXIT_INTERRUPTED)
        code = _run_unit(gpu, place / f"{gpu['uuid']}.json", options.flags, stop) or code
    return code


def _run_unit(gpu: dict[str, Any], path: Path, flags: Sequence[str], stop: StopSignal) -> int:
    with _held(path.with_suffix(".lock"), stop) as lock:
        record = _begin(path, gpu, flags)
        if record["exit_code"] == EXIT_COMPLETE:
            _say(gpu, "done before")
        else:
            _measure(record, path, flags, lock, stop)
            why = f": {record['reason']}" if record["reason"] else ""
            _say(gpu, f"ended with {record['exit_code']}{why}")
    _say(gpu, f"{RECORD_WORD}{path}")
    return record["exit_code"]


def _stop_at_eof(stop: StopSignal) -> None:
    # Not by sys.stdin, whose lock this thread would hold when the interpreter ends.
    while os.read(0, 4096):
        pass
    stop.request()


def _find_cards(selector: str | None) -> list[dict[str, Any]]:
    """Return the facts of the cards to measure; raises `SuiteError` where one is no whole card."""
    environment = dict(os.environ) | ({VISIBLE: selector} if selector else {})
    # Every program here is told its card by name.
    os.environ.pop(VISIBLE, None)
    uuids = visible_devices(environment, cards_of_nvidia_smi())
    if not uuids:
        restriction = environment.get(VISIBLE)
        why = f", or none named {restriction!r}" if restriction is not None else ""
        cure = f"mend {VISIBLE}" if why else "install the NVIDIA driver"
        raise SuiteError(f"nvidia-smi lists no GPU here{why}: {cure}", EXIT_NO_GPU)
    if uuids[0].startswith("MIG-"):
        raise SuiteError(
            f"{uuids[0]} is a MIG instance, and a unit is a whole card: switch MIG off by "
            "disable_mig.sh, or name the card", EXIT_USAGE,
        )  # fmt: skip
    cards = [card for card in map(nvml.describe_gpu, uuids) if card is not None]
    if len(cards) < len(uuids):
        reason = nvml.unavailable_reason() or "look for Xid in the kernel's log"
        raise SuiteError(f"a GPU of {', '.join(uuids)} cannot be asked: {reason}", EXIT_NO_GPU)
    return cards


def _host_name(name: str | None) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name or socket.gethostname()).strip(".") or "host"


@contextlib.contextmanager
def _held(path: Path, stop: StopSignal) -> Iterator[int]:
    """Hold the unit's lock inside the block, once the driver of an earlier attempt has ended.

    That driver has the lock, too, so that it stays held where the unit's own process is killed.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while not take_lock(descriptor):
            if stop.requested:
                raise RunEnded("interrupted", EXIT_INTERRUPTED)
            if time.monotonic() > deadline:
                raise SuiteError(
                    f"another unit is at work on the card and holds {path}: wait for its end",
                    EXIT_MODE_NOT_IN_FORCE,
                )
            time.sleep(POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _begin(path: Path, gpu: dict[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """Return the record of an earlier attempt at the same unit, or a new one.

    Raises `SuiteError` where the folder holds the unit of another plan or commit.
    """
    wanted = {"plan": _plan_hash(flags), "commit": _commit()}
    if not path.exists():
        return {
            "schema_version": SCHEMA_VERSION, "host": path.parent.name, "gpu": gpu, **wanted,
            "host_cores": usable_cores(), "attempts": 0, "health": None, "exit_code": None,
        }  # fmt: skip
    try:
        earlier = json.loads(read_file(path))
        msgspec.convert(earlier, UnitRecord)
    except (OSError, ValueError, *NOT_DECODED) as error:
        raise SuiteError(f"{path} cannot be read: remove it ({error})", EXIT_USAGE) from error
    for name in IDENTITY:
        if earlier.get(name) != wanted[name]:
            raise SuiteError(
                f"{path} is of another {name} ({earlier.get(name)}, now {wanted[name]}): name "
                "another folder by --output", EXIT_USAGE,
            )  # fmt: skip
    return earlier


def _plan_hash(flags: Sequence[str]) -> str:
    """Return what stands for the flags and for what the plan file among them says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", type=Path)
    digest = hashlib.sha256("\0".join(flags).encode(errors="surrogateescape"))
    plan = parser.parse_known_args(flags)[0].plan
    if plan is not None:
        try:
            digest.update(plan.read_bytes())
        except OSError as error:
            raise SuiteError(f"--plan {plan}: {error.strerror}", EXIT_USAGE) from error
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """Return the project's commit, with -dirty where it was changed; `None` outside a checkout."""
    if not (PROJECT_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--abbrev=40",
               "--exclude=*", "--dirty"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _measure(
    record: dict[str, Any], path: Path, flags: Sequence[str], lock: int, stop: StopSignal
) -> None:
    """Look at the card, then run the driver on it; the record says how that ended."""
    gpu = record["gpu"]
    record |= {
        "attempts": record["attempts"] + 1, "started_at": utc_now(), "health_failure": None,
        "notes": [], "exit_code": None, "reason": None,
    }  # fmt: skip
    write_json_atomic(path, record)
    try:
        is_allowed = bool({"--allow-contention", "--beside-others"}.intersection(flags))
        with locks.hold_or_note(gpu["uuid"], is_refused=not is_allowed):
            _undo_what_was_left(record, path)
            look_for_foreign_processes(gpu["uuid"], allowed=is_allowed)
            record["health"] = _look_at_health(record, stop)
        write_json_atomic(path, record)
        record["exit_code"], record["reason"] = _drive(gpu, path, flags, lock, stop)
    except SuiteError as error:
        record["exit_code"], record["reason"] = error.exit_code, str(error)
    except RunEnded as end:
        record["exit_code"], record["reason"] = end.exit_code, str(end)
    record["ended_at"] = utc_now()
    write_json_atomic(path, record)


def _undo_what_was_left(record: dict[str, Any], path: Path) -> None:
    """Undo what mode scripts have left on the card; where it must not be changed, only look.

    Raises `SuiteError` where something could not be undone.
    """
    locked = lock_reason(os.environ)
    words = ["gpu_status.sh"] if locked else ["gpu_status.sh", "--restore"]
    try:
        said = run_script(words, record["gpu"]["uuid"], path.parent)
    except ModeScriptError as error:
        if not locked:
            raise SuiteError(str(error), EXIT_MODE_NOT_IN_FORCE) from error
        record["notes"].append(str(error))
        return
    append_text(path.with_suffix(".log"), "\n".join(said))


def _look_at_health(record: dict[str, Any], stop: StopSignal) -> dict[str, Any] | None:
    """Return what the health check found, `None` where it failed; the record says why."""
    _say(record["gpu"], "health check")
    command = [sys.executable, str(PROJECT_ROOT / HEALTH_CHECK), "--gpu", record["gpu"]["uuid"]]
    try:
        return json.loads(jobs.run_script(command, os.environ, stop, HEALTH_SECONDS))
    except (jobs.ScriptFailedError, ValueError) as error:
        record["health_failure"] = f"the health check failed: {error}"
        return None


def _drive(
    gpu: dict[str, Any], path: Path, flags: Sequence[str], lock: int, stop: StopSignal
) -> tuple[int, str | None]:
    """Run the driver, or the rest of what it did; return its exit code, and its last error.

    It is asked to end as often as this process is.
    """
    folder, log = path.with_suffix(""), path.with_suffix(".log")
    words = [*flags, "--gpu", gpu["uuid"], "--output", str(folder)]
    environment = {"PYTHON": sys.executable, **os.environ}
    if (folder / SAVED_ARGUMENTS).is_file():
        words = ["--resume", str(folder)]
        # What was saved there has no secrets: they are given by the environment.
        environment |= {name: value for value, name in secrets_of_words(flags).items()}
        _say(gpu, "goes on where it was cut off")
    # Their owner's alone: the driver's words hold those of the user's own jobs.
    with os.fdopen(open_own(log), "ab") as said, log.open("rb") as heard:
        heard.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [str(DRIVER), *words], stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            start_new_session=True, pass_fds=[lock], env=environment,
        )  # fmt: skip
        reason, asked, is_over = None, 0, False
        while not is_over:
            is_over = process.poll() is not None  # before the last lines are read
            for line in heard.read().decode(errors="replace").splitlines():
                if line.startswith("Phase "):
                    _say(gpu, line)
                reason = line.removeprefix("error: ") if line.startswith("error: ") else reason
            if stop.count > asked:
                asked = stop.count
                process.terminate()
            time.sleep(0 if is_over else POLL_SECONDS)
    code = process.returncode
    return (code if code >= 0 else 128 - code), (reason if code else None)


def _say(gpu: dict[str, Any], text: str) -> None:
    """Print a line, though nobody may be there any more to read it."""
    with contextlib.suppress(OSError):
        os.write(1, f"{gpu['uuid']}: {text}\n".encode(errors="backslashreplace"))
