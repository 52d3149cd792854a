"""Four benchmarks: speed, scale, fairness and the REST API. Each starts a control plane and a Twilio twin.

Speed measures one batch of channels, from the first create to the last Ready, and its deletion, in four variants:

floor      sends the Kubernetes writes that the operator sends, and does nothing else: no Twilio, no sealed record, no
           queue. Nothing in Python that makes those writes is faster.
idiomatic  does the same work as kopf's documentation recommends (idiomatic.py).
peer       makes the same calls, written in Go with controller-runtime (peer/). It seals and unseals nothing.
ours       is the operator, under its own ServiceAccount, as `make up` runs it.

Each is a process of its own. The load generator creates the channels while they are reconciled, as users would: it
takes CPU time from all alike. The Twilio twin takes CPU time from all but the floor, and that counts against them.

aims       what is aimed at, all in one place, and the table of results
case       what is measured: a variant, with or without the admission policy that adds the finalizer
load       creates, watches and deletes channels
gauges     reads the counters of API server, twin, operator and kernel
run        one measurement of one case, and all of them, interleaved
report     medians and ratios, as a table and as JSON
gopeer     builds the peer
seeding    makes Ready channels without an operator
scale      start, memory, drift checks and latency beside many Ready channels
fairness   how an account whose calls hang slows the others down
neighbours what a hostile namespace costs another one; a program of its own
shim       the REST API, compared with a bare route and with the Kubernetes API
"""
