"""The REST API of SMS channels, for clients that know nothing of Kubernetes.

A request's way, one module a step:

    edge      an id, a time limit, an answer in JSON for everything that can happen; counted and logged
    routes    who are you (401) -> path (422) -> may you (403) -> media type (415) -> body (422)
    auth      X-Api-Key against a Secret of hashes; bearer tokens by TokenReview and SubjectAccessReview
    clients   which client it is, and whether it was wrong too often (429)
    schemas   what comes in and goes out, as pydantic models; `Refusal`, every answer that is not a success
    channels  the channel in Kubernetes: read, sealed and applied, deleted; refused where somebody else owns it
    waiting   `Prefer: wait=N`: one watch for all who wait

Around them: `app` puts it together and ends it, `tls` serves certificates that change, `openapi` describes it and
`docs` shows that, `metrics` counts, `merging` asks equal questions once, `keys` is `kubectl sms key`.

It holds public sealing keys only: it cannot read the tokens that it stored.
"""
