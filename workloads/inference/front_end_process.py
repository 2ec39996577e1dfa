"""A front end as a process of its own; the inference server starts it, nobody else does.

Its arguments are three open descriptors: a stream of submissions and answers to and from the GPU
process, a channel of packets for everything else, and the shared memory. It never imports torch.
When the GPU process is gone, for whatever reason, so is this one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workloads.inference.allocator import return_large_blocks
from workloads.inference.connections import raise_open_files_limit
from workloads.inference.front_end import FrontEnd, FrontEndSettings
from workloads.inference.front_end_messages import (
    CONNECTION,
    CONTROL_BYTES,
    DRAIN,
    READY,
    STATE,
    WORK_BYTES,
    RecordReader,
    pack_record,
)
from workloads.inference.http_app import ServerState
from workloads.inference.inherited import descriptors
from workloads.inference.shared_block import BlockShape, SharedBlock


class GpuProcess:
    """The other end: takes submissions from any thread, brings answers and connections."""

    def __init__(self, work: socket.socket, control: socket.socket) -> None:
        """Speak over ``work`` and ``control``."""
        self._work = work
        self._control = control
        self._records = RecordReader()

    def submit(self, slot: int, images: int) -> None:
        """Queue the picture in ``slot``, or ``images`` synthetic ones; ABANDON gives it up."""
        try:
            self._work.sendall(pack_record(slot, images))
        except OSError:
            # The GPU process is gone.
            os._exit(1)

    def attach(self, front_end: FrontEnd) -> None:
        """Let ``front_end`` hear what the GPU process says."""
        front_end.loop.add_reader(self._work, self._read_answers, front_end)
        front_end.loop.add_reader(self._control, self._read_control, front_end)
        self._control.send(READY)

    def _read_answers(self, front_end: FrontEnd) -> None:
        try:
            data = self._work.recv(WORK_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            os._exit(1)
        front_end.answered(self._records.read(data))

    def _read_control(self, front_end: FrontEnd) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, CONTROL_BYTES, 1)
        except OSError:
            message, descriptors = b"", []
        kind, content = message[:1], message[1:]
        if not kind:
            os._exit(1)
        if kind == CONNECTION:
            for descriptor in descriptors:
                connection = socket.socket(fileno=descriptor)
                connection.setblocking(False)
                front_end.adopt(connection)
        elif kind == STATE:
            front_end.set_state(ServerState(**json.loads(content)))
        elif kind == DRAIN:
            front_end.begin_drain(json.loads(content))


def main() -> int:
    """Serve until the GPU process says drain, or is gone."""
    numbers = descriptors(sys.argv[1:], 3, "workloads/inference/inference_server.py --frontends N")
    # Ctrl-C reaches the whole group of processes; the GPU process decides what is done about it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    work, control = (socket.socket(fileno=number) for number in numbers[:2])
    return_large_blocks()
    settings = json.loads(control.recv(CONTROL_BYTES))
    raise_open_files_limit(settings["max_connections"])
    block = SharedBlock(BlockShape(**settings["shape"]), numbers[2])
    gpu_process = GpuProcess(work, control)
    limits = FrontEndSettings(**settings["limits"])
    front_end = FrontEnd(settings["index"], block, gpu_process, limits)
    gpu_process.attach(front_end)
    front_end.run()
    # Decoding threads may still be at work on what nobody waits for.
    os._exit(0)


if __name__ == "__main__":
    main()
