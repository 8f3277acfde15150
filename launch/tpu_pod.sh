#!/usr/bin/env bash
# A Cloud TPU slice from a queued resource: asks for it, waits, copies this repository to every host, runs, and
# asks for a new slice when the old one is preempted. The run goes on there when this script ends or its connection
# is lost; the same command again follows it. To stop it, delete the slice.
#
#     launch/tpu_pod.sh --name=l14 --zone=us-east5-a --type=v5p-64 --runtime=v2-alpha-tpuv5 --spot -- \
#         --config=configs/vit_l14_sharegpt4v.py --workdir=gs://BUCKET/runs/l14 …
#
#     --name, --zone      of the slice
#     --type, --runtime   accelerator type and software version (cloud.google.com/tpu/docs/runtimes)
#     --spot              cheaper, and may be taken away at any moment
#     --restarts=N        how often to run again after a preemption (default 20)
#     --keep              leave the slice there at the end
#     --dry-run           print the commands
#
# What follows -- goes to clipmoe_jax.main; workdir, data and base must lie in a bucket, the base as safetensors.
# Batches must split over the chips: 800 over the 32 of a v5p-64. gcloud must be logged in.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

name="" zone="" type="" runtime="" restarts=20 spot=() keep=false dry_run=false
while [[ $# -gt 0 ]]; do
    case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --spot) spot=(--spot) ;;
    --keep) keep=true ;;
    --dry-run) dry_run=true ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    *) echo "unknown argument '$1': see $0 --help" >&2 && exit 2 ;;
    esac
    shift
done
for option in name zone type runtime; do
    if [[ -z "${!option}" ]]; then
        echo "--$option is missing: see $0 --help" >&2
        exit 2
    fi
done

do_it() {
    if $dry_run; then
        printf '%q ' "$@" && echo
    else
        "$@"
    fi
}

# Of the slice, NONE if there is none. Without an answer it asks again: a slice that is there must not be taken for gone.
state() {
    if $dry_run; then
        echo ACTIVE
        return
    fi
    until gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' \
        2> "$errors"; do
        if grep -q NOT_FOUND "$errors"; then
            echo NONE
            return
        fi
        echo "no answer about $name, asking again: $(tail -n 1 "$errors")" >&2
        sleep 30
    done
}

create() {
    do_it gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
        --accelerator-type="$type" --runtime-version="$runtime" "${spot[@]}"
    local now
    while now=$(state) && [[ "$now" != ACTIVE ]]; do
        if [[ "$now" == FAILED || "$now" == SUSPENDED || "$now" == NONE ]]; then
            echo "the request for $name is $now" >&2
            return 1
        fi
        echo "$name: $now"
        sleep 30
    done
}

install() {
    do_it tar --exclude-vcs --exclude=./runs --exclude=./data --exclude='./.venv*' -czf "$archive" .
    do_it gcloud compute tpus tpu-vm scp "$archive" "$name:clipmoe.tar.gz" --zone="$zone" --worker=all
    # A Python of its own: that of the system is older than what JAX wants.
    on_all "rm -rf clipmoe && mkdir clipmoe && cd clipmoe && tar -xzf ../clipmoe.tar.gz \
        && pip install --quiet uv && python3 -m uv venv --quiet --python 3.12 .venv \
        && python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]' \
            gcsfs google-cloud-storage"
}

on_all() {
    do_it gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

delete() {
    do_it gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
}

# Beside the repository on every host: run.log, run.pid, and run.status as soon as the run has ended.
start() {
    local run
    run="PYTHON=.venv/bin/python launch/node.sh --platform=tpu -- $(printf '%q ' "$@"); echo \$? > run.status"
    on_all "cd clipmoe && { nohup bash -c $(printf '%q' "$run") > run.log 2>&1 < /dev/null & echo \$! > run.pid; }"
}

# Fails where the run goes on, and without a connection.
has_ended() {
    on_all "! kill -0 \$(cat clipmoe/run.pid) 2> /dev/null"
}

follow() {
    until on_all "cd clipmoe && tail -n 100 -f --pid=\$(cat run.pid) run.log"; do
        if [[ "$(state)" != ACTIVE ]] || has_ended; then
            break
        fi
        echo "the connection to $name was lost; the run goes on there" >&2
        sleep 30
    done
    local code=255 tries
    # ssh's own error is 255: the connection was lost again, unless that is the run's too.
    for ((tries = 0; tries < 20 && code == 255; tries++)); do
        [[ "$(state)" == ACTIVE ]] || return 255
        code=0
        on_all "exit \$(cat clipmoe/run.status)" || code=$?
    done
    return "$code"
}

archive=$(mktemp --suffix=.tar.gz) errors=$(mktemp)
trap 'rm -f "$archive" "$errors"' EXIT
# Whether gcloud is there and logged in is told at once.
$dry_run || gcloud compute tpus queued-resources list --zone="$zone" > /dev/null
code=1
for ((i = 0; i <= restarts; i++)); do
    if ! $dry_run && [[ "$(state)" == ACTIVE ]]; then
        new=false
    else
        if ! $dry_run && [[ "$(state)" != NONE ]]; then
            delete
        fi
        create
        new=true
    fi
    if $new || has_ended; then
        install
        start "$@"
    fi
    code=0
    follow || code=$?
    # An error of the run itself leaves the slice there, and would come again.
    if [[ $code -eq 0 || "$(state)" == ACTIVE ]]; then
        break
    fi
    echo "$name was taken away; asking for another" >&2
done
if ! $keep; then
    delete
fi
exit "$code"
