"""Three benches, each beside one control plane and one Twilio twin. The first of them, speed, is one batch of channels,
from the first create to the last Ready, in three variants side by side.

floor      the Kubernetes writes that ours makes, made raw by a process that does nothing else: no Twilio, no record
           to seal, no model, no queue. Nothing in Python that makes those writes is faster.
idiomatic  the same work as kopf's documentation would have it done (idiomatic.py).
ours       the operator, under its own ServiceAccount, as `make up` runs it.

Each is a process of its own. The load generator creates the channels while they are being served, which is what a user
sees: it takes CPU from all three alike. The Twilio twin takes CPU from the last two, and that counts against them.

case      what is measured: a variant, with or without the finalizer at birth
load      creates, watches, deletes channels
gauges    what the API server, the twin, the operator and the kernel have counted
run       one measurement of one case; all of them, interleaved
report    medians, ratios, the aims; a table and JSON
drift     what it costs to see that nothing changed
fairness  what other accounts notice of one that hangs
"""
