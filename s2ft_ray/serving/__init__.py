"""Many adapters served from one copy of their base, behind OpenAI's endpoints on Ray Serve.

    app          the deployments and how they are bound; glue to Serve, as are replica, handles,
                 metrics and exposition
    boundary, access, limits, api, service      a request from the socket to a replica
    schemas, prompts, templates, generation, answers, detokenizer, stops, bodies   from text to text
    watcher, catalog, adapter_reader, canary, routes      from the registry to traffic
    requests, engine, ...                       tokens: the engine

Invariant: nothing is answered by another model version than the one that was named.
"""
