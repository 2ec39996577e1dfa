"""Whether memory that a server has freed goes back to the system: real processes, glibc."""

from __future__ import annotations

import subprocess
import sys

from conftest import PROJECT_ROOT

# Blocks as decoded pictures are, each with a small one behind it that stays.
SCRIPT = """
import ctypes, sys
from workloads.inference.allocator import return_large_blocks
if sys.argv[1] == "set":
    return_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def resident_mib():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
def block(mib):
    address = libc.malloc(mib << 20)
    ctypes.memset(address, 1, mib << 20)
    return address
libc.free(block(16))
before = resident_mib()
large, small = [], []
for _ in range(16):
    large.append(block(8))
    small.append(libc.malloc(64 << 10))
for address in large:
    libc.free(address)
print(resident_mib() - before)
"""


def kept_mib(how: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], cwd=PROJECT_ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return float(done.stdout)


def test_freed_pictures_go_back_to_the_system_which_they_do_not_by_themselves() -> None:
    assert kept_mib("unset") > 64
    assert kept_mib("set") < 8
