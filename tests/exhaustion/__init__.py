"""What hostile users cost: the REST shim in memory and waiting time of others, the operator in memory.

`python -m tests.exhaustion` attacks a shim on loopback with a fake API server, and an operator on a cluster of its own.
"""
