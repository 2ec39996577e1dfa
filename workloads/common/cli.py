"""Command-line conventions of every workload: flags, argument types, how it ends.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from workloads.common.errors import EXIT_FAILED, EXIT_USAGE, as_known, printable


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and leave with exit code 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _number_type(
    convert: Callable[[str], float], accepts: Callable[[float], bool], wanted: str
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


# More is a slip, and overflows what others keep counts and times in.
MOST = 10**9
positive_int = _number_type(
    int, lambda n: 0 < n <= MOST, f"a whole number of 1 or more, {MOST} at most"
)
non_negative_int = _number_type(
    int, lambda n: 0 <= n <= MOST, f"a whole number of 0 or more, {MOST} at most"
)
seed = _number_type(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
positive_float = _number_type(float, lambda x: 0 < x <= MOST, f"a number above 0, {MOST} at most")
non_negative_float = _number_type(
    float, lambda x: 0 <= x <= MOST, f"a number of 0 or more, {MOST} at most"
)


def some_text(text: str) -> str:
    """Argument type: a text that is not empty, as that of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a value, or leave it out")
    return text


def some_path(text: str) -> Path:
    """Argument type: a path, since an empty one would be the present folder."""
    return Path(some_text(text))


def flags(parser: argparse.ArgumentParser, title: str) -> Callable[..., None]:
    """Return a function that adds a flag to a new group of ``parser``.

    It takes the flag's name, default and help, and further arguments of ``add_argument``. The
    default gives the type where none is named, and ends the help where that does not speak of it.
    """
    group = parser.add_argument_group(title)
    by_default = {int: positive_int, float: positive_float, type(Path()): some_path}

    def flag(name: str, default: object, help_text: str, **how: Any) -> None:
        if default is False:
            how["action"] = "store_true"
        elif "choices" not in how:
            how.setdefault("type", by_default.get(type(default), some_text))
        if default not in (None, False) and "(default: " not in help_text:
            help_text += f" (default: {default})"
        group.add_argument(name, default=default, help=help_text, **how)

    return flag


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
        allow_abbrev=False,  # `--mode mps` is no `--model mps`
    )
    flag = flags(parser, "flags shared by every workload")
    if uses_gpu:
        flag(
            "--device", "auto", "where to run; auto takes a GPU if there is one",
            choices=("auto", "cuda", "cpu"),
        )  # fmt: skip
        flag(
            "--engine", None,
            "how a step is launched: eager; graph, the whole step as one CUDA graph; compile, "
            "torch.compile inside the graph (default: graph on a GPU, eager on the CPU)",
            choices=("eager", "graph", "compile"),
        )  # fmt: skip
        flag(
            "--precision", None,
            "arithmetic of matrix products and convolutions (default: bf16 from compute "
            "capability 8.0 on, else fp32)", choices=("fp32", "tf32", "bf16"),
        )  # fmt: skip
        flag(
            "--gpu", None,
            "which GPU, by nvidia-smi's index or UUID (default: CUDA_VISIBLE_DEVICES, else 0)",
            metavar="INDEX_OR_UUID",
        )  # fmt: skip
    flag("--seed", 42, "fixes data, order, weights and idle times", type=seed)
    flag("--results-dir", Path("results"), "folder of the result file")
    flag = flags(parser, "flags used by the benchmark suite (see CONTRIBUTING.md)")
    flag(
        "--events", None,
        "append the event log (JSON lines) to this file; with --hold it replaces the result file",
        type=some_path, metavar="PATH",
    )  # fmt: skip
    flag(
        "--hold", False,
        "wait for 'warm' and 'go' on standard input, repeat the job until 'stop'",
    )  # fmt: skip
    flag(
        "--client-index", 0,
        "shifts pauses, their beginning and the order of data and operations, so that equal "
        "clients do not move in lockstep; the work stays the same (default: 0)",
        type=non_negative_int, metavar="I",
    )  # fmt: skip
    flag(
        "--resolve", False,
        "find or download data and weights once, print the flags of a run that never downloads "
        "as JSON, and exit",
    )  # fmt: skip
    return parser


def _open_standard_streams() -> None:
    """Put the null device where a stream was closed (``>&-``), and have no letter refused.

    Else the next file or socket would be opened in the place of the closed one.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = os.fdopen(os.open(os.devnull, os.O_RDWR), mode)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


_interrupts: list[int] = []  # the signals that have come


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _interrupts.append(number)
    signal.default_int_handler(number, frame)


def raise_lost_interrupt() -> None:
    """Raise the ``KeyboardInterrupt`` that was dropped: Python does so in callbacks of imports."""
    if _interrupts:
        raise KeyboardInterrupt


def run_main(main: Callable[[], int], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run ``main`` and ``leave`` with its exit code; known errors become one sentence and a code.

    SIGTERM and the end of the terminal (unless ``nohup`` ignores it) are turned into
    ``KeyboardInterrupt``, so that all ways of stopping a script by hand unwind its ``finally``
    blocks.
    """
    _open_standard_streams()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        code = EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        # An import that was cut short fails in odd ways later on.
        known = as_known(KeyboardInterrupt() if _interrupts else error)
        if known is None:
            raise
        code = known.exit_code
        with contextlib.suppress(OSError):  # its own log may be on the disk that is full
            print(f"{Path(sys.argv[0]).name}: error: {printable(known)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try once more at its end, and change the code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    leave(code)
