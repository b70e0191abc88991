"""The Ray cluster: connecting, putting the full set there once, and finding out what can ever be placed.

with connected(config.cluster):
    full_set_ref = put_once(full_set)
    refuse_unplaceable({"CPU": 1, "GPU": 1}, "subset actors")
"""

from raysubset.cluster import authentication  # before Ray, which reads the mode when it is imported

# isort: split
import ray

from raysubset.cluster.connection import connected, reached, started_ahead
from raysubset.cluster.pulses import Process, forget, kill_processes, processes_at, published, request_stop
from raysubset.cluster.resources import (
    ASK_FOR_LESS,
    WAIT_NOTICE_S,
    NodeType,
    address_of,
    describe,
    draining_nodes,
    free_resources,
    groups_of,
    node_types,
    num_gpus_of,
    num_slots,
    object_store_bytes,
    offered,
    offers,
    own_address,
    refuse_unplaceable,
    remove_groups,
)
from raysubset.cluster.tasks import (
    OUTSIDE_GROUPS,
    STOP_GRACE_S,
    SYSTEM_ERRORS,
    call_on_cluster,
    get_shared,
    preferably_on,
    put_once,
    workplace,
)
