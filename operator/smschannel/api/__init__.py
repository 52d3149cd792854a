"""What the operator, the REST shim and the command line share, and the only part of `smschannel` the shim may import.

    resource      the SmsChannel resource: validation of what users write
    ownership     who owns a channel: REST or somebody in Kubernetes
    reasons       the table of reasons: conditions, REST statuses and remedies
    status        reads a channel's status
    names         names and paths of the Kubernetes objects
    sealing       encrypts tokens to the operator, and the operator's records
    api_keys      API keys of the REST API: format, hashing, lookup
    kube_client   calls the Kubernetes API
    kubeconfig    where the API server is, from a kubeconfig or the pod
    identity      as whom it is called: tokens, login programs, impersonation
    egress        proxies and CA certificates
    causes        why a request got no answer, in words
    errors        every error, as a tree
    text          cleans and judges what people paste
    environment   settings from environment variables: cleaning, help and error messages
    logs          log format

Nothing here imports another part of `smschannel`, and importing it registers no metrics.
"""
