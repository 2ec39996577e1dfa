"""The fake `nvidia-cuda-mps-control`: control daemons of the machine in FAKE_GPU_STATE.

Environment variables, failure rules and log: see `gpu_machine.py` beside this file. A daemon is an
entry of the state, not a process; its socket files are real and, as with the real one, stay behind
after `quit`. Where CUDA_MPS_PIPE_DIRECTORY is not set, they go below the state folder, never
to /tmp.

Static partitions (`-S`) and all that belongs to them were never seen on a card (UNVERIFIED): the
texts are those of NVIDIA's manual and of public programs that read them.
"""

import base64
import contextlib
import os
import pwd
import socket
import sys

import gpu_machine as fake

NO_DAEMON = "Cannot find MPS control daemon process"


def pipe_directory():
    default = os.path.join(os.environ.get("FAKE_GPU_STATE", "/nonexistent"), "default-mps-pipe")
    return os.path.realpath(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", default))


def inherited_locks():
    """Locks of the caller's that a real daemon would hold as long as it runs."""
    files = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            files.append(os.readlink(f"/proc/self/fd/{number}"))
    return [file for file in files if file.endswith("state/lock")]


def start_daemon(machine):
    pipe, is_static = pipe_directory(), "-S" in sys.argv[1:]
    if is_static and machine["mps_version"] < 13010:
        return 1, "invalid option -- 'S'"
    if pipe in machine["mps"]:
        return 1, "An instance of this daemon is already running"
    os.makedirs(pipe, exist_ok=True)
    for name in ("control", "control_privileged"):
        path = os.path.join(pipe, name)
        if os.path.exists(path):
            os.remove(path)
        # Longer than 107 bytes is refused by the system, as for the real daemon.
        with socket.socket(socket.AF_UNIX) as file:
            file.bind(path)
    log_directory = os.environ.get("CUDA_MPS_LOG_DIRECTORY", pipe)
    os.makedirs(log_directory, exist_ok=True)
    for path in (
        os.path.join(pipe, "control_lock"),
        os.path.join(log_directory, "control.log"),
        os.path.join(log_directory, "server.log"),
    ):
        with open(path, "a", encoding="utf-8"):
            pass
    uid = fake.current_uid()
    machine["mps"][pipe] = {
        "pid": machine["next_pid"],
        "uid": uid,
        "user": pwd.getpwuid(uid).pw_name,
        "percentage": float(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")),
        "log_directory": log_directory,
        "server": None,
        "clients": [],
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "protocol": int(os.environ.get("CUDA_MPS_PROTOCOL_VERSION", "2")),
        "partitions": [] if is_static else None,
        "locks": inherited_locks(),
    }
    machine["next_pid"] += 1
    return 0, ""


def set_percentage(daemon, words):
    try:
        value = float(words[0])
    except (IndexError, ValueError):
        value = 0.0
    if 0 < value <= 100:
        daemon["percentage"] = value
    return f"{daemon['percentage']:.1f}"  # what is out of range is ignored, the old value printed


def client_table(machine, daemon):
    if not daemon["clients"]:
        return "Server not found"
    lines = [
        "PID       ID        SERVER         DEVICE                    NAMESPACE      COMMAND        "  # noqa: E501
    ]
    device = machine["gpus"][0]["uuid"][:22]
    for number, client in enumerate(daemon["clients"], start=2):
        lines.append(
            f"{client['pid']:<10}{number:<10}{daemon['server']:<15}{device:<26}{4026531836:<15}"
            f"{client['name']:<15}"
        )
    return "\n".join(lines)


def multiprocessors_a_chunk(gpu):
    return 8 if float(gpu["compute_capability"]) >= 9 else 4


def free_chunks(daemon, gpu):
    used = sum(one["chunks"] for one in daemon["partitions"] if one["gpu"] == gpu["uuid"])
    return gpu["multiprocessors"] // multiprocessors_a_chunk(gpu) - used


def add_partition(machine, daemon, words):
    _, uuid, chunks = [*words, "", "", ""][:3]
    gpu = next((one for one in machine["gpus"] if one["uuid"] == uuid), None)
    if gpu is None:
        return f"Device {uuid} not found"
    if int(chunks) > free_chunks(daemon, gpu):
        return (
            f"Failed to fulfill the requested SM partition of {chunks} chunks, error "
            "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"
        )
    number = bytes([15, 30 + len(daemon["partitions"])])
    name = base64.b64encode(number + bytes(22)).decode()
    daemon["partitions"].append({"id": f"{uuid}/{name}", "gpu": uuid, "chunks": int(chunks)})
    return f"Partition {uuid}/{name} created"


def partition_table(machine, daemon):
    lines = [
        "GPU                Partition   free   used   free  used  clients",
        "                               chunk  chunk  SM    SM",
    ]
    for gpu in machine["gpus"]:
        size, free = multiprocessors_a_chunk(gpu), free_chunks(daemon, gpu)
        own = [one for one in daemon["partitions"] if one["gpu"] == gpu["uuid"]]
        used = sum(one["chunks"] for one in own)
        shown = gpu["uuid"][:12]
        lines.append(f"{shown:<19}{'-':<12}{free:<7}{used:<7}{free * size:<6}{used * size:<6}-")
        for one in own:
            name, chunks = one["id"].partition("/")[2][:8], one["chunks"]
            taken = any(client.get("partition") == one["id"] for client in daemon["clients"])
            lines.append(
                f"{shown:<19}{name:<12}{'-':<7}{chunks:<7}{'-':<6}{chunks * size:<6}"
                f"{'Yes' if taken else 'No'}"
            )
    return "\n".join(lines)


def is_shut(pipe):
    try:
        os.stat(os.path.join(pipe, "control"))
    except PermissionError:
        return True
    except OSError:
        pass  # a daemon that a test only claims to run
    return False


def obey(machine, command):
    pipe = pipe_directory()
    daemon = machine["mps"].get(pipe)
    # A daemon of somebody else does not answer (UNVERIFIED).
    if daemon is None or is_shut(pipe) or fake.current_uid() not in {daemon["uid"], 0}:
        return 1, NO_DAEMON
    verb, *words = command.split() or [""]
    if daemon["protocol"] >= 3:  # UNVERIFIED: other commands, other words
        return 0, f'Unknown command "{verb}"'
    if verb == "quit":
        del machine["mps"][pipe]
        for gpu in machine["gpus"]:
            gpu["processes"] = [p for p in gpu["processes"] if p["pid"] != daemon["server"]]
        return 0, ""
    if verb == "get_default_active_thread_percentage":
        return 0, f"{daemon['percentage']:.1f}"
    if verb == "set_default_active_thread_percentage":
        return 0, set_percentage(daemon, words)
    if verb == "get_server_list":
        return 0, "" if daemon["server"] is None else str(daemon["server"])
    if verb == "ps":
        return 0, client_table(machine, daemon)
    if verb == "get_client_list":
        if not words or str(daemon["server"]) != words[0]:
            return 0, f"Server {words[0] if words else 0} not found"
        return 0, "\n".join(str(client["pid"]) for client in daemon["clients"])
    if verb in {"lspart", "sm_partition"} and machine["mps_version"] >= 13010:
        if daemon["partitions"] is None:
            return 0, "Static partitioning mode is not enabled"
        if verb == "lspart":
            return 0, partition_table(machine, daemon)
        return 0, add_partition(machine, daemon, words)
    return 0, f'Unknown command "{verb}"'


QUESTIONS = ("get_", "ps", "lspart")


def tell_version(machine):
    version = machine["mps_version"]
    return 0, f"CUDA MPS Control for Linux/Unix/QNX. Binary version: {version}"


def main():
    program = "nvidia-cuda-mps-control"
    if "-d" in sys.argv[1:]:
        flags = " ".join(sys.argv[1:])
        sys.exit(fake.answer(f"{program} {flags}", True, start_daemon))
    if sys.argv[1:] == ["-v"]:
        sys.exit(fake.answer(f"{program} -v", False, tell_version))
    status = 0
    for line in sys.stdin.read().splitlines() or [""]:
        command = line.strip()
        changes = not command.startswith(QUESTIONS)
        status = fake.answer(
            f"{program} < {command}", changes, lambda machine, asked=command: obey(machine, asked)
        )
        if status != 0:
            break
    sys.exit(status)
