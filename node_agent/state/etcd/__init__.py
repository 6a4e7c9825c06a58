"""The distributed state store: a cluster of etcd servers (v3 API), for clusters of several hosts.

store.py    EtcdStore: the port's calls as etcd transactions
client.py   one call, to whichever member answers: failing over, bounded, honest about outcomes
watch.py    one watch's stream, resumed at the next member
"""

from node_agent.state.etcd.client import EtcdSettings
from node_agent.state.etcd.store import EtcdStore

__all__ = ["EtcdSettings", "EtcdStore"]
