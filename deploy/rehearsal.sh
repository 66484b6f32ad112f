#!/bin/sh
# Plays a cluster on one machine: a head that holds no work, nodes of one CPU that join it, a job
# over two of them, and a node that is taken away while it trains. Nothing of it stays.
#   sh deploy/rehearsal.sh            from the repository's root, its virtual environment on PATH
set -eu
S2FT_HOME=$(mktemp -d); export S2FT_HOME
nodes=
finish() {
    for node in $nodes; do kill "$node" 2>/dev/null || true; done
    s2ft down
    rm -rf "$S2FT_HOME"
}
trap finish EXIT

join() {
    ray start --address="$RAY_ADDRESS" --node-ip-address=127.0.0.1 --num-cpus=1 \
        --object-store-memory=80000000 --block > "$S2FT_HOME/node-$1.log" 2>&1 &
    nodes="$nodes $!"
}

say() { printf '\n$ %s\n' "$*"; "$@"; }

say s2ft up --num-cpus 0
set -a; eval "$(s2ft status --env)"; set +a
join 1; join 2; join 3
say python jobs/finetune.py --config jobs/configs/quickstart.yaml \
    --set "checkpoint.storage_path=file://$S2FT_HOME/runs" --set parallel.num_workers=2 &
job=$!
until cat "$S2FT_HOME"/runs/*/*/*/metrics.jsonl 2>/dev/null | grep -q '"step": 40,'; do
    kill -0 $job  # the job has ended too soon
    sleep 1
done
node=$(python deploy/busy_node.py)
say ray drain-node --address="$RAY_ADDRESS" --node-id="$node" --deadline-remaining-seconds=60 \
    --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message="a rehearsal"
wait $job
