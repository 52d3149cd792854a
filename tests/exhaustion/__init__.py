"""What hostile clients of the REST shim cost, in memory and in the waiting time of others.

`python -m tests.exhaustion` starts a shim of its own on loopback, with a fake API server, and attacks it in three ways.
"""
