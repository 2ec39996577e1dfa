"""A Ray cluster on this machine, as long as standard input lasts: hosts with pretended cards.

pretended_cluster.py HOST=CARDS=NVML_STATE...   prints its address; the first host is the head
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    """Start the hosts, then wait."""
    cluster = Cluster()
    for word in sys.argv[1:]:
        host, cards, state = word.split("=")
        cluster.add_node(
            node_name=host, num_cpus=1, num_gpus=int(cards), object_store_memory=80 * 2**20,
            include_dashboard=False, env_vars={"NVML_STUB_STATE": state},
        )  # fmt: skip
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
