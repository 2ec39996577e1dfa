"""Command-line conventions of every workload: shared flags, argument types, how it ends.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from workloads.common.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    CannotWriteError,
    WorkloadError,
    as_out_of_memory,
    printable,
)

# What becomes of writing where the disk is full or broken, or may only be read.
_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and leave with exit code 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _number_type(
    convert: Callable[[str], float], accepts: Callable[[float], bool], wanted: str
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


positive_int = _number_type(int, lambda n: n > 0, "a whole number of 1 or more")
non_negative_int = _number_type(int, lambda n: n >= 0, "a whole number of 0 or more")
seed = _number_type(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
positive_float = _number_type(float, lambda x: 0 < x < float("inf"), "a number above 0")
non_negative_float = _number_type(float, lambda x: 0 <= x < float("inf"), "a number of 0 or more")


def workload_parser(
    description: str, epilog: str | None = None, *, uses_gpu: bool = True
) -> OneLineParser:
    """Return a parser holding the flags that every workload shares.

    Args:
        description: What the script does, shown by ``--help``.
        epilog: Examples, shown below the flags as they are.
        uses_gpu: Whether to add the flags that choose device, engine and precision.
    """
    parser = OneLineParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = parser.add_argument_group("flags shared by every workload")
    if uses_gpu:
        shared.add_argument(
            "--device", choices=("auto", "cuda", "cpu"), default="auto",
            help="where to run; auto takes a GPU if there is one (default: auto)",
        )  # fmt: skip
        shared.add_argument(
            "--engine", choices=("eager", "graph", "compile"), default=None,
            help="how a step is launched: eager; graph, the whole step as one CUDA graph; compile, "
            "torch.compile inside the graph (default: graph on a GPU, eager on the CPU)",
        )  # fmt: skip
        shared.add_argument(
            "--precision", choices=("fp32", "tf32", "bf16"), default=None,
            help="arithmetic of matrix products and convolutions (default: bf16 from compute "
            "capability 8.0 on, else fp32)",
        )  # fmt: skip
        shared.add_argument(
            "--gpu", metavar="INDEX_OR_UUID", default=None,
            help="which GPU, by nvidia-smi's index or UUID (default: CUDA_VISIBLE_DEVICES, else 0)",
        )  # fmt: skip
    shared.add_argument(
        "--seed", type=seed, default=42,
        help="fixes data, order, weights and idle times (default: 42)",
    )  # fmt: skip
    shared.add_argument(
        "--results-dir", type=Path, default=Path("results"),
        help="folder of the result file (default: results)",
    )  # fmt: skip
    suite = parser.add_argument_group("flags used by the benchmark suite (see CONTRIBUTING.md)")
    suite.add_argument(
        "--events", type=Path, default=None, metavar="PATH",
        help="append the event log (JSON lines) to this file instead of writing a result file",
    )  # fmt: skip
    suite.add_argument(
        "--hold", action="store_true",
        help="wait for 'warm' and 'go' on standard input, repeat the job until 'stop'",
    )  # fmt: skip
    suite.add_argument(
        "--client-index", type=non_negative_int, default=0, metavar="I",
        help="shifts pauses, their beginning and the order of data and operations, so that equal "
        "clients do not move in lockstep; the work stays the same (default: 0)",
    )  # fmt: skip
    suite.add_argument(
        "--resolve", action="store_true",
        help="find or download data and weights once, print the flags of a run that never "
        "downloads as JSON, and exit",
    )  # fmt: skip
    return parser


def run_main(main: Callable[[], int], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run ``main`` and ``leave`` with its exit code; known errors become one sentence and a code.

    SIGTERM is turned into ``KeyboardInterrupt``, so that both ways of stopping a script by hand
    unwind its ``finally`` blocks.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    program = Path(sys.argv[0]).name
    try:
        code = main()
        sys.stdout.flush()
    except WorkloadError as error:
        code = _complain(program, error, error.exit_code)
    except KeyboardInterrupt:
        code = _complain(program, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        code = EXIT_FAILED
    except Exception as error:
        known = as_out_of_memory(error)
        if known is None and isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            known = CannotWriteError(error.filename or "the output", error)
        if known is None:
            raise
        code = _complain(program, known, known.exit_code)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try once more at its end, and change the code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    leave(code)


def _complain(program: str, message: object, code: int) -> int:
    with contextlib.suppress(OSError):  # its own log may be on the disk that is full
        print(f"{program}: error: {printable(message)}", file=sys.stderr)
    return code
