#!/usr/bin/env python3
"""A job that goes wrong on purpose, to see what that does to the jobs next to it.

    python3 workloads/custom/fault_client.py --fault oom --after 2

It multiplies matrices for ``--after`` seconds and then

    exit            ends with code 1, the GPU idle
    oom             allocates until its own cap (``--cap-mib``) is reached; the card is not filled
    assert          lets an assertion fail in a kernel (CUDA error 710)
    illegal-access  writes outside of every allocation (CUDA error 700); only with
                    --allow-illegal-access, and never where GPU_SETTINGS_LOCKED=1 or root's file
                    /etc/gpu-sharing-bench/settings-locked says that the card is lent or shared

`benchmarking/blast_radius.py` puts it beside healthy jobs. On the CPU ``exit`` is real, ``oom`` is
only reported, and the others are refused.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.common import cli, client, torch
from workloads.common.device import ComputeDevice, open_device
from workloads.common.errors import MIB, JobFailedError, OutOfGpuMemoryError, UsageError

FAULTS = ("exit", "oom", "assert", "illegal-access")
LOCK_VARIABLE = "GPU_SETTINGS_LOCKED"
LOCK_OF_ROOT = Path("/etc/gpu-sharing-bench/settings-locked")
MATRIX_SIZE = {"cuda": 2048, "cpu": 128}
BLOCK_MIB = 64


def parse_arguments() -> argparse.Namespace:
    """Return the checked flags."""
    parser = cli.workload_parser(__doc__)
    flag = cli.flags(parser, "the fault")
    flag("--fault", None, "what goes wrong, see above", choices=FAULTS, required=True)
    flag("--after", 5.0, "work for so many seconds first", metavar="S")
    cap = "oom: how much it may allocate until memory counts as full"
    flag("--cap-mib", 1024, cap, metavar="N")
    flag("--allow-illegal-access", False, "this card is yours alone")
    args = parser.parse_args()
    if args.fault == "illegal-access":
        locked = os.environ.get(LOCK_VARIABLE) == "1"
        if locked or LOCK_OF_ROOT.exists():
            parser.error(
                f"{f'{LOCK_VARIABLE}=1' if locked else LOCK_OF_ROOT}: this card is lent or shared, "
                "and an illegal access can end other people's work; remove it on a card of your own"
            )
        if not args.allow_illegal_access:
            parser.error("an illegal access can end other people's work: --allow-illegal-access")
    return args


class FaultyJob(client.Workload):
    """Multiplies matrices until it is time to fail."""

    name = "fault_client"
    title = "A job that goes wrong"
    device: ComputeDevice

    def load(self) -> None:
        """Open the device and make the matrices."""
        self.device = open_device(self.args)
        kind = self.device.torch_device.type
        if kind == "cpu" and self.args.fault in ("assert", "illegal-access"):
            raise UsageError(f"--fault {self.args.fault} needs a GPU: there is none")
        size = MATRIX_SIZE[kind]
        self.matrix = torch.randn(size, size, device=self.device.torch_device)
        self.product = torch.empty_like(self.matrix)

    def warm_up(self) -> None:
        """Multiply once, so that the library is loaded."""
        self._multiply()

    def run_job(self, recorder: client.Recorder) -> dict:
        """Work until it is time, then fail.

        Raises:
            StopRequested: The suite asked to stop before it was time.
            JobFailedError: The fault did not end the job.
        """
        end_seconds = time.monotonic() + self.args.after
        while time.monotonic() < end_seconds:
            recorder.check_stop()
            start_seconds = time.monotonic()
            self._multiply()
            recorder.unit("product", start_seconds, time.monotonic())
        recorder.flush()
        getattr(self, f"_{self.args.fault.replace('-', '_')}")()
        raise JobFailedError(f"--fault {self.args.fault} did no harm to the job itself")

    def settings(self) -> dict:
        """Return what it was told to do."""
        return {"fault": self.args.fault, "after_seconds": self.args.after}

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return nothing: it never comes to an end."""
        return []

    def _multiply(self) -> None:
        torch.mm(self.matrix, self.matrix, out=self.product)
        self.device.synchronize()

    def _exit(self) -> None:
        # Without cleaning up, as a crashed process leaves; its GPU work is done.
        self.device.synchronize()
        print("fault_client: ending with code 1, as told", file=sys.stderr, flush=True)
        os._exit(1)

    def _oom(self) -> None:
        if not self.device.is_cuda:
            raise OutOfGpuMemoryError("out of GPU memory, as told (there is no GPU: not real)")
        total = torch.cuda.get_device_properties(0).total_memory
        cap = torch.cuda.memory_reserved() + self.args.cap_mib * MIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
        blocks = []
        while True:
            blocks.append(torch.empty(BLOCK_MIB * MIB, dtype=torch.uint8, device="cuda"))

    def _assert(self) -> None:
        torch._assert_async(torch.zeros((), dtype=torch.bool, device="cuda"))
        torch.cuda.synchronize()

    def _illegal_access(self) -> None:
        from workloads.custom.far_store import store_outside

        store_outside(self.matrix)
        torch.cuda.synchronize()


if __name__ == "__main__":
    cli.run_main(client.main_of(FaultyJob, parse_arguments))
