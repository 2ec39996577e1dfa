"""A command that knows nothing of the client contract, with a process on the scripted card.

    python3 gpu_command.py SECONDS [hidden|without_mps]

Enters the lists in which a driver would show it (see `scripted_client.py`), works for SECONDS.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from scripted_client import Script

if __name__ == "__main__":
    script = Script(None)
    script.settings = {setting: True for setting in sys.argv[2:]}
    script.appear_on_card()
    time.sleep(float(sys.argv[1]))
