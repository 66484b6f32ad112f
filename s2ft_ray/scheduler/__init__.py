"""The queue: many tenants' fine-tunes on one cluster, fairly, durably, with reasons.

    submit ──> queued ──admit──> starting ──first step──> running ──> succeeded
                 ^ ^                 │                       │  │
                 │ │                 └───────── stop ────────┤  └────> failed
                 │ └─ retry (worker, node or driver lost) ───┤           ^
                 │                                           v           │
                 └── stopped: preempted, paused ─────── preempting ──────┘
                                                             │
    queued, preempting ── cancel ────────────────────────────┴───────> cancelled

A job that starts or runs is cancelled by way of preempting. One that is resized goes from there
to starting, one whose time in the queue is over from queued to failed.

    views, policy   what is decided, from plain values: no clock, no I/O
    policy_process  the policy in a process of its own
    models          a job, its states, why it ended, when it is tried again
    store           the only writer of jobs, attempts and events
    transitions     what its writes are made of
    live_jobs       the jobs that haven't ended, in memory beside the store
    tick, drivers   observe, decide, apply; launch, look for, give up
    service         what drivers and people ask; the actor gives it to them
    launcher        the way to Ray Jobs
    client          what drivers and the command line ask the actor

Invariants
- Every change of state is one transaction with its event. Nothing of the state lives in Ray alone.
- `attempt` rises with every admission and is the fencing token: whoever reports for another attempt
  than the job's is refused, so a driver that was given up can't change anything any more.
- The ledger is the jobs' own num_workers: held from the admission to the end of the attempt, on the
  nodes that the policy chose, then on those where Ray put the workers.
- A job ends once. An ended job never changes, but that people queue a failed one again.
"""
