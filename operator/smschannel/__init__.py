"""The SMS channel operator. What happens to a channel, in ten lines:

watch       kopf's watch events, Secrets, resync and later looks call for a turn of a channel
queue       each channel waits its turn once; accounts take turns; errors back off
reconcile   desired(channel) -> observe -> plan -> apply -> report
plan        pure: what to change, in the safe order, and what to tell
ledger      what is owed to Twilio, remembered (sealed) before Twilio is written
sealing     how tokens come in, and how records are kept
conditions  what the channel's status says, from the one table in reasons
twilio_port, kube_port   the two doors to the world outside
"""
