"""The fake `nvidia-smi`: one pretended machine, kept in the folder that FAKE_GPU_STATE names.

Environment variables, failure rules, log, what is verified: see `gpu_machine.py` beside this file.
Answered: no arguments (the table), -L, --query-gpu, --query-compute-apps, compute-policy
(-l, --set-timeslice), mig (-lgip -lgipp -lgi -cgi [-C] -dci -dgi), -mig, -c.
Whatever changes the card needs user id 0.
"""
# ruff: noqa: E501  (the tables are as wide as the driver prints them)

import sys

import gpu_machine as fake

# Exit statuses from the manual page; 6 was seen, the others are UNVERIFIED; 19 and 23 are NVML's
# numbers for in use and insufficient resources.
INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 2, 3, 4, 6
DRIVER_NOT_LOADED, LOST, LIBRARY_MISMATCH, IN_USE, INSUFFICIENT_RESOURCES = 9, 15, 18, 19, 23
COMPUTE_MODES = {"0": "DEFAULT", "2": "PROHIBITED", "3": "EXCLUSIVE_PROCESS"}
TIMESLICES = dict(
    zip("0123", ("Default", "Short", "Medium", "Long"), strict=True)
)  # all but the first UNVERIFIED
CHANGING = {"-c", "-mig", "--set-timeslice", "-cgi", "-dci", "-dgi"}
WITH_VALUE = {"-i", "-c", "-mig", "-cgi", "-gi", "--set-timeslice", "--format"}
FIRST_INSTANCE_ID = {5: 1, 9: 1, 14: 3, 15: 3, 19: 7, 20: 7}
TERMINATED = "Terminating early due to previous errors."
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running.\n"
NOT_WITH_I = (
    "ERROR: Option -i is not valid for this command. Please run 'nvidia-smi -h' for help.\n"
)
# From reports of users, UNVERIFIED.
GPU_IS_LOST = "Unable to determine the device handle for GPU{index}: {bus_id}: GPU is lost.  Reboot the system to recover this GPU"
# Texts from NVIDIA's MIG user guide: the call ends well even when the change is only pending.
PENDING = {
    "in_use": "Warning: MIG mode is in pending {word} state for GPU {bus_id}:In use by another client\n"
    "{bus_id} is currently being used by one or more other processes (e.g. CUDA application or a "
    "monitoring application such as another instance of nvidia-smi). Please first kill all processes "
    "using the device and retry the command or reset the GPU to make MIG mode effective.",
    "reset_not_supported": "Warning: MIG mode is in pending {word} state for GPU {bus_id}:Not Supported\n"
    "Reboot the system or try nvidia-smi --gpu-reset to make MIG mode effective on GPU {bus_id}",
}
TABLE_HEAD = """\
Mon Nov 23 17:52:59 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |
|                                         |                        |               MIG M. |
|=========================================+========================+======================|
"""
TABLE_GPU = """\
| {index:>3}  {name:<26.26}     On  | {bus_id:>18} Off |                    0 |
| N/A   50C    P0            119W /  700W | {used:>22} |      0%   {mode:>10} |
|                                         |                        | {mig:>20} |
+-----------------------------------------+------------------------+----------------------+
"""
TABLE_PROCESSES = """\

+-----------------------------------------------------------------------------------------+
| Processes:                                                                              |
|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |
|        ID   ID                                                               Usage      |
|=========================================================================================|
{}
+-----------------------------------------------------------------------------------------+"""
NO_PROCESSES = (
    "|  No running processes found                                                             |"
)
TABLE_PROCESS = "| {index:>4} {gi:>5}  {ci:>3} {pid:>15}      C   {name:<38} {memory:>8} |"
POLICIES = """\
+-------------------------------------+
| GPU compute policies:               |
| GPU     Name           Value        |
|=====================================|
{}
+-------------------------------------+"""
PROFILES = """\
+-------------------------------------------------------------------------------+
| GPU instance profiles:                                                        |
| GPU   Name               ID    Instances   Memory     P2P    SM    DEC   ENC  |
|                                Free/Total   GiB              CE    JPEG  OFA  |
|===============================================================================|
"""
PROFILE = """\
| {index:>3}  MIG {name:<15} {id:>2}     {free}/{total}        {memory_gib:<5.2f}      No     {multiprocessors:<3}   {decoders:>2}     0   |
|                                                               {second_row}   |
+-------------------------------------------------------------------------------+
"""
# From NVIDIA's MIG user guide, UNVERIFIED on this driver, as the text for none.
INSTANCES = """\
+---------------------------------------------------------+
| GPU instances:                                          |
| GPU   Name               Profile  Instance   Placement  |
|                            ID       ID       Start:Size |
|=========================================================|
"""
INSTANCE = """\
| {index:>3}  MIG {profile:<16} {profile_id:>4}     {gi:>4}          {start}:{size}     |
+---------------------------------------------------------+
"""


class Refused(Exception):
    """Ends the answer with an exit status and a text."""

    def __init__(self, status, text):
        super().__init__(status, text)


def chosen(machine, arguments):
    """The GPUs that -i names: indices, UUIDs or bus ids, separated by commas."""
    if "-i" not in arguments:
        return machine["gpus"]
    wanted = set(arguments["-i"].split(","))
    gpus = [g for g in machine["gpus"] if {str(g["index"]), g["uuid"], g["bus_id"]} & wanted]
    if not gpus:
        raise Refused(NOT_FOUND, "No devices were found")
    return gpus


def need_root(action):
    # UNVERIFIED text and status (NVIDIA's manual page: 4 is no permission).
    if fake.current_uid() != 0:
        raise Refused(NO_PERMISSION, f"Unable to {action}: Insufficient Permissions\n{TERMINATED}")


# --- questions ------------------------------------------------------------------------------------


def csv_rows(arguments, rows):
    """Rows as --format=csv,noheader[,nounits] prints them."""
    lines = [", ".join(map(str, row)) for row in rows]
    if "nounits" in arguments["--format"]:
        lines = [line.replace(" MiB", "") for line in lines]
    return "\n".join(lines)


def query_gpu(machine, arguments):
    fields = arguments["--query-gpu"].split(",")
    rows, lost = [], []
    for gpu in chosen(machine, arguments):
        known = {
            "index": gpu["index"],
            "uuid": gpu["uuid"],
            "name": gpu["name"],
            "driver_version": "580.159.04",
            "mig.mode.current": gpu["mig_current"],
            "mig.mode.pending": gpu["mig_pending"],
            "compute_mode": gpu["compute_mode"],
            "compute_cap": gpu["compute_capability"],
            "memory.total": f"{gpu['memory_total_mib']} MiB",
        }
        bad = [
            field for field in fields if field not in known or field in machine["unknown_fields"]
        ]
        if gpu["lost"]:
            lost.append(GPU_IS_LOST.format(**gpu))
        elif bad:  # UNVERIFIED text
            raise Refused(INVALID_ARGUMENT, f'Field "{bad[0]}" is not a valid field to query.\n')
        else:
            rows.append([known[field] for field in fields])
    return LOST if lost else 0, "\n".join(filter(None, [*lost, csv_rows(arguments, rows)]))


def query_compute_apps(machine, arguments):
    rows = []
    for gpu in chosen(machine, arguments):
        for process in gpu["processes"]:
            known = {"pid": process["pid"], "process_name": process["name"],
                     "used_memory": f"{process['used_memory_mib']} MiB"}  # fmt: skip
            rows.append([known[field] for field in arguments["--query-compute-apps"].split(",")])
    return 0, csv_rows(arguments, rows)


def list_gpus(machine, arguments):
    if "-i" in arguments:
        raise Refused(INVALID_ARGUMENT, NOT_WITH_I)
    lines = []
    for gpu in machine["gpus"]:
        if gpu["lost"]:
            lines.append(GPU_IS_LOST.format(**gpu))
            continue
        lines.append("GPU {index}: {name} (UUID: {uuid})".format(**gpu))
        # The MIG lines are from NVIDIA's MIG user guide, UNVERIFIED on this driver.
        devices = sorted(
            (i for i in gpu["instances"] if i["ci"] is not None), key=lambda i: i["gi"]
        )
        for number, device in enumerate(devices):
            lines.append(
                f"  MIG {device['profile']:<12}Device {number:>2}: (UUID: {device['uuid']})"
            )
    return 0, "\n".join(lines)


def table(machine, arguments):
    """The table of a bare `nvidia-smi`; its process part says which GPU instance is in use."""
    text, processes = TABLE_HEAD, []
    for gpu in chosen(machine, arguments):
        if gpu["lost"]:  # no table at all, as users report
            raise Refused(LOST, GPU_IS_LOST.format(**gpu))
        used = sum(process["used_memory_mib"] for process in gpu["processes"])
        text += TABLE_GPU.format(
            **gpu,
            used=f"{used}MiB /  {gpu['memory_total_mib']}MiB",
            mode=gpu["compute_mode"].replace("Exclusive_Process", "E. Process"),
            mig=gpu["mig_current"].strip("[]"),
        )
        for process in gpu["processes"]:
            ids = {"gi": "N/A", "ci": "N/A"} if process["gi"] is None else {"ci": 0}
            memory = f"{process['used_memory_mib']}MiB"
            row = {**process, **ids, "index": gpu["index"], "memory": memory}
            processes.append(TABLE_PROCESS.format(**row))
    return 0, text + TABLE_PROCESSES.format("\n".join(processes or [NO_PROCESSES]))


# --- settings -------------------------------------------------------------------------------------


def set_compute_mode(machine, arguments):
    mode = COMPUTE_MODES.get(arguments["-c"], arguments["-c"].upper())
    if mode not in COMPUTE_MODES.values():  # UNVERIFIED text
        raise Refused(INVALID_ARGUMENT, f"Invalid compute mode: {arguments['-c']}")
    lines = []
    for gpu in chosen(machine, arguments):
        need_root(f"set the compute mode for GPU {gpu['bus_id']}")
        gpu["compute_mode"] = mode.title()
        # Seen on driver 515 and newer, UNVERIFIED on this one.
        lines.append(f"Set compute mode to {mode} for GPU {gpu['bus_id']}.")
    return 0, "\n".join([*lines, "All done."])


def set_mig_mode(machine, arguments):
    word = "enable" if arguments["-mig"] == "1" else "disable"
    target = f"{word}d".title()
    lines = []
    for gpu in chosen(machine, arguments):
        failed = f"Unable to {word} MIG Mode for GPU {gpu['bus_id']}"
        need_root(failed.removeprefix("Unable to "))
        if gpu["mig_current"] == "[N/A]":
            raise Refused(NOT_SUPPORTED, f"{failed}: Not Supported\n{TERMINATED}")
        if word == "disable" and gpu["instances"]:
            raise Refused(IN_USE, f"{failed}: In use by another client\n{TERMINATED}")
        gpu["mig_pending"] = target
        reason = "in_use" if gpu["processes"] else gpu["mig_switch"]
        if gpu["mig_current"] != target and reason in PENDING:
            lines.append(PENDING[reason].format(word=word, bus_id=gpu["bus_id"]))
        else:
            gpu["mig_current"] = target
            lines.append(f"{target} MIG Mode for GPU {gpu['bus_id']}")
    return 0, "\n".join([*lines, "All done."])


def compute_policy(machine, arguments):
    gpus = chosen(machine, arguments)
    if "--set-timeslice" not in arguments:
        rows = [f"| {g['index']:>3}   Timeslice       {g['timeslice']:<13} |"
                for g in gpus if g["timeslice"] is not None]  # fmt: skip
        if not rows:
            raise Refused(NOT_SUPPORTED, "Compute policies: Not Supported")  # UNVERIFIED
        return 0, POLICIES.format("\n".join(rows))
    number = arguments["--set-timeslice"]
    for gpu in gpus:
        need_root(f"set timeslice policy for GPU {gpu['bus_id']}")  # UNVERIFIED text
        if gpu["timeslice"] is None:
            raise Refused(NOT_SUPPORTED, f"Timeslice: Not Supported for GPU {gpu['bus_id']}")
        if number not in TIMESLICES:
            raise Refused(INVALID_ARGUMENT, f"Invalid timeslice: {number}")
        gpu["timeslice"] = TIMESLICES[number]
    return 0, "Successfully set timeslice policy.\n"


# --- MIG ------------------------------------------------------------------------------------------


def free_starts(gpu, profile):
    """Where an instance of the profile could go now."""
    taken = {s for i in gpu["instances"] for s in range(i["start"], i["start"] + i["size"])}
    return [s for s in profile["starts"] if not taken & set(range(s, s + profile["size"]))]


def free_count(gpu, profile):
    """How many more instances of the profile fit: free placements, within the total."""
    count, end = 0, -1
    for start in free_starts(gpu, profile):
        if start >= end:
            count, end = count + 1, start + profile["size"]
    used = sum(i["profile_id"] == profile["id"] for i in gpu["instances"])
    return min(count, profile["total"] - used)


def list_profiles(gpus):
    rows = (
        PROFILE.format(**{"index": gpu["index"], "free": free_count(gpu, profile)}, **profile)
        for gpu in gpus
        for profile in gpu["profiles"]
    )
    return 0, PROFILES + "".join(rows)


def list_placements(gpus):
    lines = []
    for gpu in gpus:
        for p in gpu["profiles"]:
            word = "Placements:" if len(p["starts"]) > 1 else "Placement :"
            starts = ",".join(map(str, p["starts"]))
            lines.append(
                f"GPU {gpu['index']:>2} Profile ID {p['id']:>2} {word} {{{starts}}}:{p['size']}"
            )
    return 0, "\n".join(lines)


def list_instances(gpus):
    rows = [
        INSTANCE.format(index=gpu["index"], **instance)
        for gpu in gpus
        for instance in sorted(gpu["instances"], key=lambda i: i["gi"])
    ]
    if not rows:
        raise Refused(NOT_FOUND, "No GPU instances found: Not Found")
    return 0, INSTANCES + "".join(rows)


def create_instances(machine, gpu, wanted, ci):
    """-cgi: one after the other, so that a failure leaves the earlier ones behind."""
    lines, where = [], f"GPU {gpu['index']:>2}"
    for position, item in enumerate(wanted.split(",")):
        name, _, start = item.removeprefix("MIG ").partition(":")
        profile = next((p for p in gpu["profiles"] if name in {p["name"], str(p["id"])}), None)
        if profile is None:
            lines.append(f"Invalid GPU instance profile: {name}")
            return INVALID_ARGUMENT, "\n".join(lines)
        starts = [s for s in free_starts(gpu, profile) if start in ("", str(s))]
        if not starts or not free_count(gpu, profile) or position >= gpu.get("create_limit", 99):
            lines += [
                f"Unable to create a GPU instance on {where} using profile {profile['id']}: Insufficient Resources",
                "Failed to create GPU instances: Insufficient Resources",
            ]
            return INSUFFICIENT_RESOURCES, "\n".join(lines)
        gi = FIRST_INSTANCE_ID.get(profile["id"], 0)
        while gi in {i["gi"] for i in gpu["instances"]}:
            gi += 1
        machine["next_pid"] += 1
        gpu["instances"].append(
            {"gi": gi, "ci": ci, "profile": profile["name"], "profile_id": profile["id"],
             "start": starts[-1], "size": profile["size"],
             "uuid": f"MIG-{machine['next_pid']:08x}-aaaa-5bbb-8ccc-{gpu['index']:012x}"}
        )  # fmt: skip
        lines.append(
            f"Successfully created GPU instance ID {gi:>2} on {where} using profile MIG {profile['name']} (ID {profile['id']:>2})"
        )
        if ci is not None:
            lines.append(
                f"Successfully created compute instance ID  0 on {where} GPU instance ID {gi:>2} using profile MIG {profile['name']} (ID  0)"
            )
    return 0, "\n".join(lines)


def destroy_instances(gpu, listed, noun):
    """-dci and -dgi. A compute instance in use, or a GPU instance that still has one, stays."""
    lines, where = [], f"from GPU {gpu['index']:>2}"
    ids = {int(n) for n in listed.split(",")} if listed else {i["gi"] for i in gpu["instances"]}
    for instance in [i for i in gpu["instances"] if i["gi"] in ids]:
        gi, ci = instance["gi"], instance["ci"]
        name, busy = f"{noun} ID {gi:>2} {where}", ci is not None
        if noun == "compute instance":
            if ci is None:
                continue
            name = f"{noun} ID {ci:>2} {where} GPU instance ID {gi:>2}"
            busy = any(process["gi"] == gi for process in gpu["processes"])
        if busy:
            lines += [
                f"Unable to destroy {name}: In use by another client",
                f"Failed to destroy {noun}s: In use by another client",
            ]
            return IN_USE, "\n".join(lines)
        if noun == "compute instance":
            instance["ci"] = None
        else:
            gpu["instances"].remove(instance)
        lines.append(f"Successfully destroyed {name}")
    return (0, "\n".join(lines)) if lines else (NOT_FOUND, f"No {noun}s found: Not Found")


def mig(machine, arguments):
    capable = [g for g in chosen(machine, arguments) if g["mig_current"] != "[N/A]"]
    enabled = [g for g in capable if g["mig_current"] == "Enabled"]
    if "-lgip" in arguments or "-lgipp" in arguments:
        if not capable:  # UNVERIFIED
            raise Refused(NOT_SUPPORTED, "No MIG-supported devices found.")
        return list_profiles(capable) if "-lgip" in arguments else list_placements(capable)
    if not enabled:
        return 0, "No MIG-enabled devices found."
    if "-lgi" in arguments:
        return list_instances(enabled)
    need_root("change MIG instances")
    (gpu,) = enabled
    if "-cgi" in arguments:
        return create_instances(machine, gpu, arguments["-cgi"], 0 if "-C" in arguments else None)
    noun = "compute instance" if "-dci" in arguments else "GPU instance"
    return destroy_instances(gpu, arguments.get("-gi"), noun)


# --- the program ----------------------------------------------------------------------------------

ANSWERS = {"mig": mig, "compute-policy": compute_policy, "-L": list_gpus, "--query-gpu": query_gpu,
           "--query-compute-apps": query_compute_apps, "-mig": set_mig_mode,
           "-c": set_compute_mode}  # fmt: skip


def parse(words):
    """Options and their values; `--name=value` and `--name value` alike."""
    arguments, rest = {}, list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not equals and rest and (name in WITH_VALUE or name.startswith("--query-")):
            value = rest.pop(0)
        arguments[name] = value
    return arguments


def act(machine):
    arguments = parse(sys.argv[1:])
    if machine["driver"] == "not-loaded":
        return DRIVER_NOT_LOADED, NO_DRIVER
    if machine["driver"] != "ok":
        return LIBRARY_MISMATCH, f"Failed to initialize NVML: {machine['driver']}"
    if not machine["gpus"]:
        return NOT_FOUND, "No devices were found"
    asked = next((answer for word, answer in ANSWERS.items() if word in arguments), None)
    if asked is None and set(arguments) - {"-i"}:
        return INVALID_ARGUMENT, "ERROR: the fake does not know this command."
    try:
        return (asked or table)(machine, arguments)
    except Refused as refusal:
        return refusal.args


def main():
    words = sys.argv[1:]
    command = " ".join(["nvidia-smi", *words])
    sys.exit(fake.answer(command, bool(CHANGING & set(parse(words))), act))
