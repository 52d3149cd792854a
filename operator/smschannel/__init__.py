"""The SMS channel operator: which module does what.

The data path, top to bottom:

    watch          the informer: events of channels, and by kopf of Secrets
    controller     decides which channels to reconcile, and when: events, resyncs, scheduled requeues
    channel_cache  all channels, by the Secrets that they use and the numbers that they wait for
    orphans        records whose channel is gone: found, and proven before anything is restored
    queue          one key per name, fair between namespaces and accounts, backoff
    reconcile      observe -> plan -> apply -> report, for one name
    observe        what a reconcile reads: records, credentials, numbers
    report         status and Events
    kube_store     what is read and written in Kubernetes; the index of records
    keyring_store  where the private keys are kept, and how changes of them are followed
    rotation       renews the sealing key, and seals records with the newest one
    api/           what the shim imports, too: resource, reasons, status, names, errors, sealing, API keys, client
    core/          pure: plan, record, claims, conditions, shares
    twilio/        client, limits and circuit breakers, account cache

Around it: `leader` elects the one process that works, `__main__` is the process, `wiring` puts the parts together from
`settings`, `metrics` and `health` are what it shows, and `cli/` is `kubectl sms`.
"""
