"""The fake `nvidia-smi`: one pretended machine, kept in the folder that FAKE_GPU_STATE names.

Environment variables, failure rules, log, what is verified: see `gpu_machine.py` beside this file.
Answered: no arguments (the table), -L, -q, --query-gpu, --query-compute-apps, compute-policy
(-l, --set-timeslice), mig (-lgip -lgipp -lgi -cgi [-C] -dci -dgi), -mig, -c.
Whatever changes the card needs user id 0.
"""
# ruff: noqa: E501  (the tables are as wide as the driver prints them)

import sys

import gpu_machine as fake

COMPUTE_MODES = {
    "0": "Default",
    "DEFAULT": "Default",
    "2": "Prohibited",
    "PROHIBITED": "Prohibited",
    "3": "Exclusive_Process",
    "EXCLUSIVE_PROCESS": "Exclusive_Process",
}
TIMESLICES = ["Default", "Short", "Medium", "Long"]  # the last three UNVERIFIED
NO_MIG = (0, "No MIG-enabled devices found.")
DONE = "All done."


class Refused(Exception):
    """Ends the answer with an exit status and a text."""

    def __init__(self, status, text):
        super().__init__(status, text)


def chosen(machine, selector):
    """The GPUs that -i names: indices, UUIDs or bus ids, separated by commas."""
    if selector is None:
        return machine["gpus"]
    wanted = selector.split(",")
    gpus = [g for g in machine["gpus"] if {str(g["index"]), g["uuid"], g["bus_id"]} & set(wanted)]
    if not gpus:
        raise Refused(fake.SMI_NOT_FOUND, "No devices were found")
    return gpus


def lost_line(gpu):
    # From reports of users, UNVERIFIED.
    return (
        f"Unable to determine the device handle for GPU{gpu['index']}: {gpu['bus_id']}: "
        "GPU is lost.  Reboot the system to recover this GPU"
    )


def need_root(action):
    # UNVERIFIED text and status (NVIDIA's manual page: 4 is no permission).
    if fake.current_uid() != 0:
        raise Refused(
            fake.SMI_NO_PERMISSION,
            f"Unable to {action}: Insufficient Permissions\n"
            "Terminating early due to previous errors.",
        )


def used_memory(gpu):
    return sum(process["used_memory_mib"] for process in gpu["processes"])


def mib(value):
    return f"{value} MiB"


def gpu_field(machine, gpu, field):
    """One value of --query-gpu with its unit, or None for a field that does not exist."""
    total, used = gpu["memory_total_mib"], used_memory(gpu)
    values = {
        "index": gpu["index"],
        "count": len(machine["gpus"]),
        "uuid": gpu["uuid"],
        "gpu_uuid": gpu["uuid"],
        "name": gpu["name"],
        "gpu_name": gpu["name"],
        "pci.bus_id": gpu["bus_id"],
        "gpu_bus_id": gpu["bus_id"],
        "driver_version": machine["driver_version"],
        "mig.mode.current": gpu["mig_current"],
        "mig.mode.pending": gpu["mig_pending"],
        "compute_mode": gpu["compute_mode"],
        "compute_cap": gpu["compute_capability"],
        "memory.total": mib(total),
        "memory.used": mib(used),
        "memory.free": mib(total - used),
        "persistence_mode": "Enabled",
        "pstate": "P0",
        "utilization.gpu": "0 %",
        "utilization.memory": "0 %",
        "temperature.gpu": "50",
        "power.draw": "119.00 W",
        "power.limit": "700.00 W",
        "clocks.sm": "1980 MHz",
        "clocks.current.sm": "1980 MHz",
        "clocks.max.sm": "1980 MHz",
    }
    return None if field in machine["unknown_fields"] else values.get(field)


HEADER_UNITS = {"MiB": " [MiB]", "%": " [%]", "W": " [W]", "MHz": " [MHz]"}


def csv_table(fields, rows, style):
    """Rows of values with units, as --format=csv[,noheader][,nounits] prints them."""
    plain = "nounits" in style
    lines = []
    if "noheader" not in style:
        units = {
            f: next((str(r[i]).split(" ")[-1] for r in rows), "") for i, f in enumerate(fields)
        }
        lines.append(", ".join(f + HEADER_UNITS.get(units[f], "") for f in fields))
    for row in rows:
        values = [str(value) for value in row]
        if plain:
            values = [
                v.rsplit(" ", 1)[0] if v.split(" ")[-1] in HEADER_UNITS else v for v in values
            ]
        lines.append(", ".join(values))
    return "\n".join(lines)


def query_gpu(machine, arguments):
    fields = arguments["--query-gpu"].split(",")
    rows, lost = [], []
    for gpu in chosen(machine, arguments.get("-i")):
        row = [gpu_field(machine, gpu, field) for field in fields]
        if gpu["lost"]:
            lost.append(lost_line(gpu))
            continue
        if None in row:
            bad = fields[row.index(None)]  # UNVERIFIED text
            raise Refused(
                fake.SMI_INVALID_ARGUMENT, f'Field "{bad}" is not a valid field to query.\n'
            )
        rows.append(row)
    text = csv_table(fields, rows, arguments.get("--format", ""))
    return fake.SMI_LOST if lost else 0, "\n".join(filter(None, [*lost, text]))


def query_compute_apps(machine, arguments):
    fields = arguments["--query-compute-apps"].split(",")
    rows = []
    for gpu in chosen(machine, arguments.get("-i")):
        for process in gpu["processes"]:
            values = {
                "pid": process["pid"],
                "process_name": process["name"],
                "name": process["name"],
                "used_memory": mib(process["used_memory_mib"]),
                "used_gpu_memory": mib(process["used_memory_mib"]),
                "gpu_uuid": gpu["uuid"],
                "gpu_name": gpu["name"],
                "gpu_bus_id": gpu["bus_id"],
            }
            rows.append([values[field] for field in fields])
    return 0, csv_table(fields, rows, arguments.get("--format", ""))


def list_gpus(machine):
    lines = []
    for gpu in machine["gpus"]:
        if gpu["lost"]:
            lines.append(lost_line(gpu))
            continue
        lines.append(f"GPU {gpu['index']}: {gpu['name']} (UUID: {gpu['uuid']})")
        # The MIG lines are from NVIDIA's MIG user guide, UNVERIFIED on this driver.
        devices = [i for i in gpu["instances"] if i["ci"] is not None]
        for number, instance in enumerate(sorted(devices, key=lambda i: i["gi"])):
            lines.append(
                f"  MIG {instance['profile']:<12}Device {number:>2}: (UUID: {instance['uuid']})"
            )
    return 0, "\n".join(lines)


def table(machine, selector):
    """The table of a bare `nvidia-smi`; its process part says which GPU instance is in use."""
    bar = "+" + "-" * 89 + "+"
    split = "+" + "-" * 41 + "+" + "-" * 24 + "+" + "-" * 22 + "+"
    lines = [
        "Mon Nov 23 17:52:59 2026       ",
        bar,
        f"| NVIDIA-SMI {machine['driver_version']:<23}Driver Version: "
        f"{machine['driver_version']:<15}CUDA Version: {machine['cuda_version']:<9}|",
        split,
        "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |",
        "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |",
        "|                                         |                        |               MIG M. |",
        "|=========================================+========================+======================|",
    ]
    processes = []
    gpus = chosen(machine, selector)
    for gpu in gpus:
        used = f"{used_memory(gpu)}MiB /  {gpu['memory_total_mib']}MiB"
        mode = "E. Process" if gpu["compute_mode"] == "Exclusive_Process" else gpu["compute_mode"]
        mig = "N/A" if gpu["mig_current"] == "[N/A]" else gpu["mig_current"]
        lines += [
            f"| {gpu['index']:>3}  {gpu['name'][:26]:<26}     On  | {gpu['bus_id']:>18} Off |"
            + "                    0 |",
            f"| N/A   50C    P0            119W /  700W | {used:>22} |      0%   {mode:>10} |",
            f"|                                         |                        | {mig:>20} |",
            split,
        ]
        for process in gpu["processes"]:
            gi = "N/A" if process["gi"] is None else process["gi"]
            ci = "N/A" if process["gi"] is None else 0
            memory = f"{process['used_memory_mib']}MiB"
            processes.append(
                f"| {gpu['index']:>4} {gi:>5}  {ci:>3} {process['pid']:>15}      C   "
                f"{process['name']:<38} {memory:>8} |"
            )
    lines += [
        "",
        bar,
        "| Processes:                                                                              |",
        "|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |",
        "|        ID   ID                                                               Usage      |",
        "|=========================================================================================|",
        *(processes or ["|  No running processes found" + " " * 61 + "|"]),
        bar,
    ]
    return 0, "\n".join(lines)


def set_compute_mode(machine, arguments):
    mode = COMPUTE_MODES.get(arguments["-c"].upper())
    if mode is None:  # UNVERIFIED text
        raise Refused(fake.SMI_INVALID_ARGUMENT, f"Invalid compute mode: {arguments['-c']}")
    lines = []
    for gpu in chosen(machine, arguments.get("-i")):
        need_root(f"set the compute mode for GPU {gpu['bus_id']}")
        gpu["compute_mode"] = mode
        # Seen on driver 515 and newer, UNVERIFIED on this one.
        lines.append(f"Set compute mode to {mode.upper()} for GPU {gpu['bus_id']}.")
    return 0, "\n".join([*lines, DONE])


def set_mig_mode(machine, arguments):
    """Texts from NVIDIA's MIG user guide: it ends well even when the change is only pending."""
    enable = arguments["-mig"] == "1"
    word, target = ("enable", "Enabled") if enable else ("disable", "Disabled")
    lines = []
    for gpu in chosen(machine, arguments.get("-i")):
        need_root(f"{word} MIG Mode for GPU {gpu['bus_id']}")
        if gpu["mig_current"] == "[N/A]":
            raise Refused(
                fake.SMI_NOT_SUPPORTED,
                f"Unable to {word} MIG Mode for GPU {gpu['bus_id']}: Not Supported\n"
                "Terminating early due to previous errors.",
            )
        if not enable and gpu["instances"]:
            raise Refused(
                fake.SMI_IN_USE,
                f"Unable to disable MIG Mode for GPU {gpu['bus_id']}: In use by another client\n"
                "Terminating early due to previous errors.",
            )
        gpu["mig_pending"] = target
        if gpu["mig_current"] == target:
            lines.append(f"{target} MIG Mode for GPU {gpu['bus_id']}")
        elif gpu["mig_switch"] == "in_use" or gpu["processes"]:
            lines += [
                f"Warning: MIG mode is in pending {word} state for GPU {gpu['bus_id']}:"
                "In use by another client",
                f"{gpu['bus_id']} is currently being used by one or more other processes (e.g. CUDA "
                "application or a monitoring application such as another instance of nvidia-smi). "
                "Please first kill all processes using the device and retry the command or reset "
                "the GPU to make MIG mode effective.",
            ]
        elif gpu["mig_switch"] == "reset_not_supported":
            lines += [
                f"Warning: MIG mode is in pending {word} state for GPU {gpu['bus_id']}:Not Supported",
                "Reboot the system or try nvidia-smi --gpu-reset to make MIG mode effective on "
                f"GPU {gpu['bus_id']}",
            ]
        else:
            gpu["mig_current"] = target
            lines.append(f"{target} MIG Mode for GPU {gpu['bus_id']}")
    return 0, "\n".join([*lines, DONE])


def compute_policy(machine, arguments):
    gpus = chosen(machine, arguments.get("-i"))
    if "--set-timeslice" in arguments:
        for gpu in gpus:
            need_root(f"set timeslice policy for GPU {gpu['bus_id']}")  # UNVERIFIED text
            if gpu["timeslice"] is None:
                raise Refused(
                    fake.SMI_NOT_SUPPORTED, f"Timeslice: Not Supported for GPU {gpu['bus_id']}"
                )
            number = arguments["--set-timeslice"]
            if number not in {"0", "1", "2", "3"}:
                raise Refused(fake.SMI_INVALID_ARGUMENT, f"Invalid timeslice: {number}")
            gpu["timeslice"] = TIMESLICES[int(number)]
        return 0, "Successfully set timeslice policy.\n"
    if all(gpu["timeslice"] is None for gpu in gpus):
        return fake.SMI_NOT_SUPPORTED, "Compute policies: Not Supported"  # UNVERIFIED
    bar = "+-------------------------------------+"
    return 0, "\n".join(
        [
            bar,
            "| GPU compute policies:               |",
            "| GPU     Name           Value        |",
            "|=====================================|",
            *(f"| {g['index']:>3}   Timeslice       {g['timeslice']:<13} |" for g in gpus),
            bar,
        ]
    )


def occupied(gpu):
    return {s for i in gpu["instances"] for s in range(i["start"], i["start"] + i["size"])}


def free_starts(gpu, profile):
    """Where an instance of the profile could go now."""
    taken = occupied(gpu)
    return [
        start
        for start in profile["starts"]
        if not taken & set(range(start, start + profile["size"]))
    ]


def free_count(gpu, profile):
    """How many more instances of the profile fit: free placements, within the total."""
    count, end = 0, -1
    for start in free_starts(gpu, profile):
        if start >= end:
            count, end = count + 1, start + profile["size"]
    used = sum(i["profile_id"] == profile["id"] for i in gpu["instances"])
    return min(count, profile["total"] - used)


def list_profiles(gpus):
    bar = "+" + "-" * 79 + "+"
    lines = [
        bar,
        "| GPU instance profiles:                                                        |",
        "| GPU   Name               ID    Instances   Memory     P2P    SM    DEC   ENC  |",
        "|                                Free/Total   GiB              CE    JPEG  OFA  |",
        "|===============================================================================|",
    ]
    for gpu in gpus:
        for p in gpu["profiles"]:
            engine, jpeg, ofa = p["second_row"].split()
            free = f"{free_count(gpu, p)}/{p['total']}"
            lines += [
                f"| {gpu['index']:>3}  MIG {p['name']:<15} {p['id']:>2}     {free}        "
                f"{p['memory_gib']:<5.2f}      No     {p['multiprocessors']:<3}   "
                f"{p['decoders']:>2}     0   |",
                f"|{'':63}{engine}     {jpeg}     {ofa}   |",
                bar,
            ]
    return 0, "\n".join(lines)


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


def list_gpu_instances(gpus):
    """From NVIDIA's MIG user guide, UNVERIFIED on this driver, as the text for none."""
    rows = [
        f"| {g['index']:>3}  MIG {i['profile']:<16} {i['profile_id']:>4}     {i['gi']:>4}"
        f"          {i['start']}:{i['size']}     |"
        for g in gpus
        for i in sorted(g["instances"], key=lambda i: i["gi"])
    ]
    if not rows:
        return fake.SMI_NOT_FOUND, "No GPU instances found: Not Found"
    bar = "+" + "-" * 57 + "+"
    head = [
        "| GPU instances:                                          |",
        "| GPU   Name               Profile  Instance   Placement  |",
        "|                            ID       ID       Start:Size |",
        "|=========================================================|",
    ]
    return 0, "\n".join([bar, *head, *(line for row in rows for line in (row, bar))])


FIRST_INSTANCE_ID = {0: 0, 5: 1, 9: 1, 14: 3, 15: 3, 19: 7, 20: 7}


def create_instances(machine, gpu, wanted, with_compute_instance):
    """-cgi: one after the other, so that a failure leaves the earlier ones behind."""
    lines = []
    for position, item in enumerate(wanted.split(",")):
        name, _, start = item.removeprefix("MIG ").partition(":")
        profile = next((p for p in gpu["profiles"] if name in {p["name"], str(p["id"])}), None)
        if profile is None:
            raise Refused(
                fake.SMI_INVALID_ARGUMENT,
                "\n".join([*lines, f"Invalid GPU instance profile: {name}"]),
            )
        starts = free_starts(gpu, profile)
        if start:
            starts = [s for s in starts if s == int(start)]
        limit = gpu.get("create_limit")
        if not starts or not free_count(gpu, profile) or (limit is not None and position >= limit):
            lines += [
                f"Unable to create a GPU instance on GPU {gpu['index']:>2} using profile "
                f"{profile['id']}: Insufficient Resources",
                "Failed to create GPU instances: Insufficient Resources",
            ]
            return 23, "\n".join(lines)  # UNVERIFIED: NVML_ERROR_INSUFFICIENT_RESOURCES
        gi = FIRST_INSTANCE_ID.get(profile["id"], 0)
        while gi in {i["gi"] for i in gpu["instances"]}:
            gi += 1
        machine["next_pid"] += 1
        gpu["instances"].append(
            {
                "gi": gi,
                "ci": 0 if with_compute_instance else None,
                "profile": profile["name"],
                "profile_id": profile["id"],
                "start": starts[-1],
                "size": profile["size"],
                "uuid": f"MIG-{machine['next_pid']:08x}-aaaa-5bbb-8ccc-{gpu['index']:012x}",
            }
        )
        lines.append(
            f"Successfully created GPU instance ID {gi:>2} on GPU {gpu['index']:>2} using profile "
            f"MIG {profile['name']} (ID {profile['id']:>2})"
        )
        if with_compute_instance:
            lines.append(
                f"Successfully created compute instance ID  0 on GPU {gpu['index']:>2} GPU instance "
                f"ID {gi:>2} using profile MIG {profile['name']} (ID  0)"
            )
    return 0, "\n".join(lines)


def destroy_instances(gpu, listed, what):
    """-dci and -dgi. A compute instance in use, or a GPU instance that still has one, stays."""
    ids = {int(n) for n in listed.split(",")} if listed else {i["gi"] for i in gpu["instances"]}
    compute = what == "compute"
    noun = "compute instance" if compute else "GPU instance"
    lines = []
    for instance in [i for i in gpu["instances"] if i["gi"] in ids]:
        where = f"GPU {gpu['index']:>2}"
        if compute:
            if instance["ci"] is None:
                continue
            name = f"{noun} ID {instance['ci']:>2} from {where} GPU instance ID {instance['gi']:>2}"
            busy = any(process["gi"] == instance["gi"] for process in gpu["processes"])
        else:
            name = f"{noun} ID {instance['gi']:>2} from {where}"
            busy = instance["ci"] is not None
        if busy:
            lines += [
                f"Unable to destroy {name}: In use by another client",
                f"Failed to destroy {noun}s: In use by another client",
            ]
            return fake.SMI_IN_USE, "\n".join(lines)
        if compute:
            instance["ci"] = None
        else:
            gpu["instances"].remove(instance)
        lines.append(f"Successfully destroyed {name}")
    if not lines:
        return fake.SMI_NOT_FOUND, f"No {noun}s found: Not Found"
    return 0, "\n".join(lines)


def mig(machine, arguments):
    gpus = chosen(machine, arguments.get("-i"))
    capable = [g for g in gpus if g["mig_current"] != "[N/A]"]
    enabled = [g for g in gpus if g["mig_current"] == "Enabled"]
    if "-lgip" in arguments or "-lgipp" in arguments:
        if not capable:  # UNVERIFIED
            return fake.SMI_NOT_SUPPORTED, "No MIG-supported devices found."
        return list_profiles(capable) if "-lgip" in arguments else list_placements(capable)
    if not enabled:
        return NO_MIG
    if "-lgi" in arguments:
        return list_gpu_instances(enabled)
    need_root("change MIG instances")
    (gpu,) = enabled
    if "-cgi" in arguments:
        return create_instances(machine, gpu, arguments["-cgi"], "-C" in arguments)
    if "-dci" in arguments:
        return destroy_instances(gpu, arguments.get("-gi"), "compute")
    if "-dgi" in arguments:
        return destroy_instances(gpu, arguments.get("-gi"), "gpu")
    raise Refused(fake.SMI_INVALID_ARGUMENT, "ERROR: the fake does not know this mig command.")


WITH_VALUE = {"-i", "-c", "-mig", "-cgi", "-gi", "-ci", "-d", "--set-timeslice", "--format"}


def parse(words):
    """Options and their values; `--name=value` and `--name value` alike."""
    arguments, position = {}, 0
    while position < len(words):
        name, equals, value = words[position].partition("=")
        position += 1
        if not equals:
            value = ""
            takes_value = name in WITH_VALUE or name.startswith("--query-")
            if takes_value and position < len(words):
                value = words[position]
                position += 1
        arguments[name] = value
    return arguments


def answer(machine, words):
    if machine["driver"] == "not-loaded":
        return (
            fake.SMI_DRIVER_NOT_LOADED,
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make "
            "sure that the latest NVIDIA driver is installed and running.\n",
        )
    if machine["driver"] != "ok":
        return 18, f"Failed to initialize NVML: {machine['driver']}"
    if not machine["gpus"]:
        return fake.SMI_NOT_FOUND, "No devices were found"
    verb = words[0] if words and words[0] in {"mig", "compute-policy"} else None
    arguments = parse(words[1:] if verb else words)
    if verb == "mig":
        return mig(machine, arguments)
    if verb == "compute-policy":
        return compute_policy(machine, arguments)
    if "-L" in arguments:
        if "-i" in arguments:
            return (
                fake.SMI_INVALID_ARGUMENT,
                "ERROR: Option -i is not valid for this command. Please run 'nvidia-smi -h' for "
                "help.\n",
            )
        return list_gpus(machine)
    if "--query-gpu" in arguments:
        return query_gpu(machine, arguments)
    if "--query-compute-apps" in arguments:
        return query_compute_apps(machine, arguments)
    if "-mig" in arguments:
        return set_mig_mode(machine, arguments)
    if "-c" in arguments:
        return set_compute_mode(machine, arguments)
    if not set(arguments) - {"-i"}:
        return table(machine, arguments.get("-i"))
    raise Refused(fake.SMI_INVALID_ARGUMENT, "ERROR: the fake does not know this command.")


def act(machine):
    try:
        return answer(machine, sys.argv[1:])
    except Refused as refusal:
        return refusal.args


CHANGING = {"-c", "-mig", "--set-timeslice", "-cgi", "-cci", "-dci", "-dgi", "-r", "--gpu-reset"}


def main():
    words = sys.argv[1:]
    command = " ".join(["nvidia-smi", *words])
    sys.exit(fake.answer(command, bool(CHANGING & set(parse(words))), act))
