"""A Ray cluster on this machine, as long as standard input lasts: hosts with pretended cards.

pretended_cluster.py HOST=CARDS=NVML_STATE...   prints its address
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


def main() -> None:
    """Start a head without cards and the hosts, then wait."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    for word in sys.argv[1:]:
        host, cards, state = word.split("=")
        cluster.add_node(node_name=host, num_cpus=1, num_gpus=int(cards),
                         env_vars={"NVML_STUB_STATE": state}, **SMALL)  # fmt: skip
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
