"""A pretended machine with NVIDIA GPUs, for tests of everything that talks to the driver's tools.

The programs beside this file (`nvidia-smi`, `nvidia-cuda-mps-control`, `ps`, `sudo`) are the fakes
that a script under test finds first on its PATH. They keep what they know in one folder, named by
`FAKE_GPU_STATE`, so that a change made by one call is seen by the next. A test drives them so:

    from fakes.gpu_machine import FakeMachine

    machine = FakeMachine(tmp_path / "machine", "h100")
    subprocess.run(["./gpu-configs/enable_mps.sh"], env=machine.environment(), ...)
    assert machine.changing_calls() == []

Environment variables
    FAKE_GPU_STATE    the folder (needed). In it: `machine` (the state, only ever rewritten by a
                      call that changes something), `calls` (every call), `rules` (failures); by
                      marshal, since each start of a fake would wait 10 ms for the import of json
    FAKE_GPU_UID      the user id that the programs take themselves to be run by (default: the real
                      one); lets a test without a second account see "no permission"
    FAKE_SUDO_USER    for the fake `sudo`: the invoking account (default `nobody`)

`calls`, a dict a call
    command      the command line, or `nvidia-cuda-mps-control < COMMAND` for what it reads
    changes      true for a call that asks for a change, whether or not it succeeded
    exit         the exit status

`rules`, a list of dicts, the first that matches counts
    match        shell pattern on the command as logged, e.g. "nvidia-smi -i * -mig 1"
    exit         exit status in place of the real one (default 1)
    text         what is printed in place of the real text (default: nothing)
    append       what is printed after the real text, with `exit` (default 14: infoROM damaged)
    after        so many matching calls go through first (default 0)
    times        then so many calls are hit (default: all)
    seconds      sleep first; alone, without `exit` and `text`, the call is only slow

The texts are those of an H100 with driver 580. What a real card was not asked for (changing
commands, MIG switched on, missing permission, other GPUs) follows NVIDIA's manuals and is marked
UNVERIFIED.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import sys
import time

FAKES_FOLDER = os.path.dirname(os.path.abspath(__file__))

# Above the largest pid of Linux, so that no pretended process is a real one's.
FIRST_PID = 2**22 + 900
# Profiles of a MIG card: names with memory in GiB and multiprocessors, on what its card has of a
# profile: id, total, decoders, copy engines with what JPEG and OFA follow, placements, size. The
# H100's tables were seen, the H200's but for the placements; the others are UNVERIFIED.
EIGHTHS = [
    (19, 7, 1, "1     1     0", [0, 1, 2, 3, 4, 5, 6], 1),
    (20, 1, 1, "1     1     1", [0, 1, 2, 3, 4, 5, 6], 1),
    (15, 4, 1, "1     1     0", [0, 2, 4, 6], 2),
    (14, 3, 2, "2     2     0", [0, 2, 4], 2),
    (9, 2, 3, "3     3     0", [0, 4], 4),
    (5, 1, 4, "4     4     0", [0], 4),
    (0, 1, 7, "8     7     1", [0], 8),
]
FOURTHS = {"1g": ([0, 1, 2, 3], 1), "2g": ([0, 2], 2), "4g": ([0], 4)}
HOPPER, AMPERE = (16, 16, 26, 32, 60, 64, 132), (14, 14, 14, 28, 42, 56, 98)


def _eighths(names: str, memory_gib: str, multiprocessors: tuple[int, ...]) -> list[dict]:
    """The seven profiles of a card of eight memory slices."""
    rows = zip(names.split(), map(float, memory_gib.split()), multiprocessors, EIGHTHS, strict=True)
    return [
        {"name": name, "memory_gib": gib, "multiprocessors": count, "id": number, "total": total,
         "decoders": decoders, "second_row": second_row, "starts": starts, "size": size}
        for name, gib, count, (number, total, decoders, second_row, starts, size) in rows
    ]  # fmt: skip


def _fourths(table: str, slice_gib: float, slice_sm: int) -> list[dict]:
    """The profiles of a card of four slices, from `name:id:total` words."""
    profiles = []
    for word in table.split():
        name, number, total = word.split(":")
        starts, size = FOURTHS[name[:2]]
        profiles.append(
            {"name": name, "memory_gib": size * slice_gib, "multiprocessors": size * slice_sm,
             "id": int(number), "total": int(total), "decoders": 1, "starts": starts, "size": size,
             "second_row": "1     1     0"}
        )  # fmt: skip
    return profiles


def _gpu(
    name: str, capability: str, memory_mib: int, multiprocessors: int, profiles: list[dict]
) -> dict:
    mig_mode = "Disabled" if profiles else "[N/A]"
    return {
        "index": 0,
        "uuid": "GPU-00000000-1111-2222-3333-444444444444",
        "name": name,
        "bus_id": "00000000:00:06.0",
        "compute_capability": capability,
        "memory_total_mib": memory_mib,
        "multiprocessors": multiprocessors,
        "mig_current": mig_mode,
        "mig_pending": mig_mode,
        # What `-mig 1` and `-mig 0` do: "ok", "in_use" (pending, other clients) or
        # "reset_not_supported" (pending, as in a virtual machine).
        "mig_switch": "ok",
        "compute_mode": "Default",
        "timeslice": "Default",  # null: compute-policy is not supported
        "profiles": profiles,
        "lost": False,  # nvidia-smi prints an error line in its place
        # {"gi", "ci" (null: none), "profile", "profile_id", "start", "size", "uuid"}
        "instances": [],
        # {"pid", "name", "user", "used_memory_mib", "gi" (null: the whole GPU)}
        "processes": [],
    }


def _second(gpu: dict) -> dict:
    uuid, bus_id = "GPU-55555555-6666-7777-8888-999999999999", "00000000:00:07.0"
    return {**gpu, "index": 1, "uuid": uuid, "bus_id": bus_id}


H100 = _gpu("NVIDIA H100 80GB HBM3", "9.0", 81559, 132, _eighths(
    "1g.10gb 1g.10gb+me 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb",
    "9.75 9.75 19.62 19.62 39.50 39.50 79.25", HOPPER))  # fmt: skip
T4 = _gpu("Tesla T4", "7.5", 15360, 40, [])
MACHINES = {
    "h100": [H100],
    "h100x2": [H100, _second(H100)],
    "a100-40": [_gpu("NVIDIA A100-SXM4-40GB", "8.0", 40960, 108, _eighths(
        "1g.5gb 1g.5gb+me 1g.10gb 2g.10gb 3g.20gb 4g.20gb 7g.40gb",
        "4.75 4.75 9.75 9.75 19.62 19.62 39.38", AMPERE))],
    "h200": [_gpu("NVIDIA H200", "9.0", 143771, 132, _eighths(
        "1g.18gb 1g.18gb+me 1g.35gb 2g.35gb 3g.71gb 4g.71gb 7g.141gb",
        "16.0 16.0 32.5 32.5 69.75 69.75 140.0", HOPPER))],
    "a30": [_gpu("NVIDIA A30", "8.0", 24576, 56, _fourths(
        "1g.6gb:14:4 1g.6gb+me:21:1 2g.12gb:5:2 2g.12gb+me:6:1 4g.24gb:0:1", 5.81, 14))],
    "rtx-pro-6000": [_gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition", "12.0", 97887, 188,
                          _fourths(
        "1g.24gb:14:4 1g.24gb+me:21:1 1g.24gb+gfx:47:4 1g.24gb+me.all:65:1 1g.24gb-me:67:4 "
        "2g.48gb:5:2 2g.48gb+gfx:35:2 2g.48gb+me.all:64:1 4g.96gb:0:1 4g.96gb+gfx:32:1",
        23.6, 46))],
    "geforce": [_gpu("NVIDIA GeForce RTX 4060", "8.9", 8188, 24, [])],
    # CUDA counts the fastest first, nvidia-smi by bus id
    "t4-h100": [T4, _second(H100)],
    "t4": [T4],
    "k40": [{**_gpu("Tesla K40m", "3.0", 11441, 15, []), "timeslice": None}],
    "no-gpu": [],
}  # fmt: skip


def new_machine(kind: str) -> dict:
    """The state of a fresh machine; raises KeyError for a kind that is not in MACHINES."""
    return {
        "mps_version": 13000,  # as `nvidia-cuda-mps-control -v` says it; from 13010 on it has -S
        "driver": "ok",  # or "not-loaded", or what NVML fails with
        "gpus": marshal.loads(marshal.dumps(MACHINES[kind])),
        # pipe directory -> {"pid", "uid", "user", "percentage", "log_directory", "server" (pid or
        # null), "clients": [{"pid", "name"}], "visible_devices", "protocol", "partitions" (null
        # without -S): {"id", "gpu" (UUID), "chunks"}}
        "mps": {},
        # fields that this nvidia-smi is too old to know
        "unknown_fields": [],
        # {"pid", "uid", "user", "comm", "args"} of processes that only ps shows
        "others": [],
        "next_pid": FIRST_PID,
    }


class Store:
    """The state folder, locked for the time of one call or one look by a test."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = os.path.join(folder, "machine")
        self._lock: int | None = None
        self._before: dict | None = None
        self.machine: dict = {}

    def __enter__(self) -> Store:
        self._lock = _open_for_all(os.path.join(self.folder, "lock"), os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            with open(self.path, "rb") as file:
                known = file.read()
            self._before, self.machine = marshal.loads(known), marshal.loads(known)
        except FileNotFoundError:
            pass  # the test is about to say which machine it is
        return self

    def __exit__(self, *_: object) -> None:
        if self.machine != self._before:
            self._replace(self.path, self.machine)
        assert self._lock is not None
        os.close(self._lock)

    def _replace(self, path: str, value: object) -> None:
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "wb") as file:
            marshal.dump(value, file)
        os.chmod(temporary, 0o666)
        os.replace(temporary, path)

    def matching_rule(self, command: str) -> dict | None:
        """The rule that hits this call; counts the call against it."""
        path = os.path.join(self.folder, "rules")
        if not os.path.exists(path):
            return None
        with open(path, "rb") as file:
            rules = marshal.load(file)
        for rule in rules:
            if not _matches(rule["match"], command):
                continue
            rule["seen"] = rule.get("seen", 0) + 1
            self._replace(path, rules)
            if 0 < rule["seen"] - rule.get("after", 0) <= rule.get("times", rule["seen"]):
                return rule
        return None

    def log(self, command: str, changes: bool, exit_status: int) -> None:
        """Append one call to `calls`."""
        line = {"command": command, "changes": changes, "exit": exit_status}
        path = os.path.join(self.folder, "calls")
        descriptor = _open_for_all(path, os.O_APPEND | os.O_WRONLY)
        os.write(descriptor, marshal.dumps(line))
        os.close(descriptor)


def _open_for_all(path: str, flags: int) -> int:
    """Open a file that other users may write too, since scripts may go on as another one."""
    previous = os.umask(0)
    try:
        return os.open(path, os.O_CREAT | flags, 0o666)
    finally:
        os.umask(previous)


def _matches(pattern: str, text: str) -> bool:
    """A shell pattern where only `*` is special (command lines are full of brackets)."""
    import re  # here, since it takes longer than the rest of a call

    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None


def current_uid() -> int:
    """The caller's user id, or the one that the test pretends."""
    return int(os.environ.get("FAKE_GPU_UID", os.geteuid()))


def answer(command: str, changes: bool, act) -> int:
    """Answer one call by a rule, else by `act(machine) -> (exit status, text)`, and log it."""
    folder = os.environ.get("FAKE_GPU_STATE")
    if not folder:
        print("fake: FAKE_GPU_STATE names no folder", file=sys.stderr)
        return 255
    store = Store(folder)
    with store:
        rule = store.matching_rule(command) or {}
    # A slow call sleeps without the lock and before it changes anything, as a real one would.
    time.sleep(rule.get("seconds", 0))
    appends = "append" in rule
    fails = ("exit" in rule or "text" in rule) and not appends
    with store:
        status, text = rule.get("exit", 1), rule.get("text", "")
        if not fails:
            status, text = act(store.machine)
        if appends:
            status = rule.get("exit", 14)
            text = "\n".join(filter(None, [text.rstrip("\n"), rule["append"]]))
        store.log(command, changes, status)
    if text:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
    return status


def _process(
    pid: int, name: str = "python3", user: str = "alice", used_memory_mib: int = 512,
    gi: int | None = None,
) -> dict:  # fmt: skip
    return {"pid": pid, "name": name, "user": user, "used_memory_mib": used_memory_mib, "gi": gi}


class FakeMachine:
    """A test's side of the pretended machine."""

    def __init__(self, folder: str | os.PathLike[str], kind: str = "h100") -> None:
        self.folder = os.fspath(folder)
        os.makedirs(self.folder, exist_ok=True)
        os.chmod(self.folder, 0o777)  # scripts under test may go on as another user
        with Store(self.folder) as store:
            store.machine = new_machine(kind)

    def environment(self, **extra: str) -> dict[str, str]:
        """The caller's environment, fakes first on the PATH, no GPU settings inherited."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CUDA_", "FAKE_", "SUDO_", "GPU_SH", "GPU_SETTINGS", "XDG_"))
        }
        # The interpreter's own folder first: a version manager's wrapper would slow every call.
        path = [FAKES_FOLDER, os.path.dirname(sys.executable), inherited.get("PATH", "")]
        return {
            **inherited,
            "PATH": os.pathsep.join(path),
            "FAKE_GPU_STATE": self.folder,
            **extra,
        }

    def state(self) -> dict:
        """A copy of the machine's state; see `new_machine` and `_gpu` for its fields."""
        with open(os.path.join(self.folder, "machine"), "rb") as file:
            return marshal.load(file)

    def change(self, **fields: object) -> None:
        """Set top-level fields of the state, e.g. `driver="not-loaded"`."""
        with Store(self.folder) as store:
            store.machine.update(fields)

    def change_gpu(self, index: int = 0, **fields: object) -> None:
        """Set fields of one GPU, e.g. `compute_mode="Exclusive_Process"`."""
        with Store(self.folder) as store:
            store.machine["gpus"][index].update(fields)

    def add_process(self, pid: int = 4242, index: int = 0, **fields: object) -> None:
        """Put a process on a GPU, by `gi` on its GPU instance."""
        with Store(self.folder) as store:
            store.machine["gpus"][index]["processes"].append(_process(pid, **fields))

    def add_mps_daemon(
        self, pipe_directory: str, uid: int = 1000, user: str = "alice", protocol: int = 2
    ) -> None:
        """Let a control daemon of somebody run that no script of ours started."""
        with Store(self.folder) as store:
            store.machine["mps"][os.path.realpath(pipe_directory)] = {
                "pid": FIRST_PID - 1, "uid": uid, "user": user, "percentage": 100.0,
                "log_directory": "",
                "server": None, "clients": [], "visible_devices": None, "protocol": protocol,
                "partitions": None,
            }  # fmt: skip

    def add_mps_client(self, pid: int, name: str = "python3", index: int = 0) -> None:
        """Attach a client to the only running daemon, whose server starts if need be."""
        with Store(self.folder) as store:
            machine = store.machine
            (daemon,) = machine["mps"].values()
            processes = machine["gpus"][index]["processes"]
            if daemon["server"] is None:
                daemon["server"] = machine["next_pid"]
                machine["next_pid"] += 1
                server = _process(daemon["server"], "nvidia-cuda-mps-server", daemon["user"], 66)
                processes.append(server)
            daemon["clients"].append({"pid": pid, "name": name})
            processes.append(_process(pid, name, daemon["user"], 2228))

    def remove_process(self, pid: int) -> None:
        """Let a process end: it leaves every GPU and every MPS daemon."""
        with Store(self.folder) as store:
            for gpu in store.machine["gpus"]:
                gpu["processes"] = [p for p in gpu["processes"] if p["pid"] != pid]
            for daemon in store.machine["mps"].values():
                daemon["clients"] = [c for c in daemon["clients"] if c["pid"] != pid]

    def fail(self, match: str, **rule: object) -> None:
        """Add a rule; see the module's text for its fields."""
        path = os.path.join(self.folder, "rules")
        rules = []
        if os.path.exists(path):
            with open(path, "rb") as file:
                rules = marshal.load(file)
        with open(path, "wb") as file:
            marshal.dump([*rules, {"match": match, **rule}], file)
        os.chmod(path, 0o666)

    def forget_rules(self) -> None:
        """Drop every rule."""
        path = os.path.join(self.folder, "rules")
        if os.path.exists(path):
            os.remove(path)

    def calls(self) -> list[dict]:
        """Every call so far, oldest first."""
        path, calls = os.path.join(self.folder, "calls"), []
        if os.path.exists(path):
            with open(path, "rb") as file:
                while file.peek(1):
                    calls.append(marshal.load(file))
        return calls

    def changing_calls(self) -> list[str]:
        """The command lines that asked for a change, oldest first."""
        return [call["command"] for call in self.calls() if call["changes"]]

    def forget_calls(self) -> None:
        """Start the list of calls anew."""
        path = os.path.join(self.folder, "calls")
        if os.path.exists(path):
            os.remove(path)
