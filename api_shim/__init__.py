"""The REST API of SMS channels, for clients that do not use Kubernetes.

A request passes through these modules:

    connections    limits connections in number, time and memory, before anybody is authenticated
    server         gives it an ID, a time limit and a JSON answer for every error; counts it, and logs writes
    routes         checks authentication (401), path (422), authorization (403), media type (415) and body (422)
    auth           X-Api-Key against a Secret of hashes; bearer tokens by TokenReview and SubjectAccessReview
    clients        the client's address, its share of the service, and the limit of its authentication failures (429)
    schemas        the bodies as pydantic models; `HttpError`, every answer with status 400 or above
    channels       reads the SmsChannel, seals the token and applies, deletes; refuses channels that others own (409)
    waiting        `Prefer: wait=N`: one watch for all requests that wait

Around them: `app` builds and shuts down the service, `settings` are its environment variables, `tls` loads the
certificate, `openapi` describes the API and `docs` shows that, `metrics` counts, `single_flight` shares equal calls.

Of the operator, it imports `smschannel.api` only. It has the public sealing key only, and cannot read the tokens that
it stored.
"""
