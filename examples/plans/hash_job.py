#!/usr/bin/env python3
"""A job that knows nothing of the suite: hashes so many blocks and exits with 0.

The work is fixed, not the time, so that neighbors can slow it down.
"""

from __future__ import annotations

import argparse
import hashlib
import os


def main() -> int:
    """Hash blocks of BLOCK_MIB mebibytes (default 1)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=400, help="(default: %(default)s)")
    blocks = parser.parse_args().blocks
    block = bytes(int(os.environ.get("BLOCK_MIB", "1")) << 20)
    digest = hashlib.sha256()
    for _ in range(blocks):
        digest.update(block)
    print(f"{blocks} blocks, {digest.hexdigest()[:12]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
