#!/usr/bin/env bash
# A Cloud TPU slice from a queued resource: asks for it, waits, copies this repository to every host, runs, and
# asks for a new slice when the old one is preempted. The run goes on there when this script ends or its connection
# is lost; the same command again follows it, and until then nobody starts it again or deletes the slice. To stop it,
# delete the slice.
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

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' launch/tpu_pod.sh; }

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

# Of the slice; NONE if there is none. Without an answer it asks again: a slice that is there is not taken for gone.
state() {
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
}

delete() {
    do_it gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
}

# Waits until there is a slice. A request that waits already keeps its place.
get_slice() {
    local now asked=false
    while now=$(state) && [[ "$now" != ACTIVE ]]; do
        if [[ "$now" != NONE && "$now" != FAILED && "$now" != SUSPENDED ]]; then
            echo "$name: $now"
            sleep 30
            continue
        fi
        if $asked; then
            echo "the request for $name is $now" >&2
            return 1
        fi
        if [[ "$now" != NONE ]]; then
            delete
        fi
        create
        asked=true
    done
}

on_all() {
    do_it gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
        --ssh-flag=-oServerAliveInterval=30 --command="$1"
}

# What a command prints on all hosts. gcloud's own errors have codes that a command could have, too, so commands
# print what they find. Tries again while the slice is there, for some ten minutes, and returns 1 then.
ask_all() {
    local tries
    for ((tries = 0; tries < 20; tries++)); do
        if on_all "$1"; then
            return
        fi
        [[ "$(state)" == ACTIVE ]] || return 1
        echo "no connection to $name, trying again" >&2
        sleep 30
    done
    echo "no connection to $name: what runs there goes on, and the same command again follows it" >&2
    return 1
}

install() {
    # No virtual environment, whatever its name: it has gigabytes, and is this machine's.
    do_it tar --exclude-vcs --exclude=./runs --exclude=./data --exclude='./.venv*' \
        --exclude-tag-all=pyvenv.cfg -czf "$archive" . \
        && do_it gcloud compute tpus tpu-vm scp "$archive" "$name:clipmoe.tar.gz" --zone="$zone" --worker=all \
        && on_all "rm -rf clipmoe && mkdir clipmoe && cd clipmoe && tar -xzf ../clipmoe.tar.gz \
            && pip install --quiet uv && python3 -m uv venv --quiet --python 3.12 .venv \
            && python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]' \
                gcsfs google-cloud-storage" # a Python of its own: that of the system is older than what JAX wants
}

# Beside the repository on every host: run.log, run.pid, and run.status as soon as the run has ended. gcloud may
# send a command twice.
start() {
    local run
    run="PYTHON=.venv/bin/python launch/node.sh --platform=tpu -- $(printf '%q ' "$@"); echo \$? > run.status"
    on_all "cd clipmoe && { [[ -e run.pid ]] \
        || { nohup bash -c $(printf '%q' "$run") > run.log 2>&1 < /dev/null & echo \$! > run.pid; }; }"
}

# After something that failed on the hosts: ends this script, unless the slice was taken away.
taken_away() {
    case "$(state)" in
    ACTIVE) exit 1 ;;
    NONE) echo "$name was deleted" >&2 && exit 1 ;;
    esac
}

# Prints the run's log until it has ended, and sets `code` to its exit code: 75 if it was stopped, or its slice
# taken away.
follow() {
    local found
    while :; do
        on_all "tail -n 100 -f --pid=\$(cat clipmoe/run.pid) clipmoe/run.log" || true
        found=$(ask_all "cd clipmoe; if kill -0 \$(cat run.pid); then echo goes on; \
            else echo ended with \$(cat run.status || echo 75); fi 2> /dev/null") || break
        if [[ "$found" != *"goes on"* ]]; then
            code=$(sed -n 's/.*ended with //p' <<< "$found" | sort -n | tail -n 1)
            if grep -q "ended with 75" <<< "$found"; then
                code=75
            fi
            ask_all "rm -f clipmoe/run.pid" || true # what is told is not followed again
            return
        fi
        echo "the connection to $name was lost; the run goes on there" >&2
        sleep 30
    done
    taken_away
    code=75
}

if $dry_run; then
    archive=clipmoe.tar.gz
    create
    install
    start "$@"
    $keep || delete
    exit
fi
archive=$(mktemp --suffix=.tar.gz) errors=$(mktemp)
trap 'rm -f "$archive" "$errors"' EXIT
trap 'exit 130' INT # gcloud takes an interruption for itself
gcloud compute tpus queued-resources list --zone="$zone" > /dev/null # is it there, and logged in?
code=75
for ((i = 0; i <= restarts && code == 75; i++)); do
    if [[ $i -gt 0 ]]; then
        echo "$name: the run was stopped, or its slice taken away; starting again" >&2
    fi
    get_slice
    if ! found=$(ask_all "if [[ -e clipmoe/run.pid ]]; then echo a run is here; fi"); then
        taken_away
        continue
    fi
    if [[ "$found" == *"a run is here"* ]]; then
        echo "following the run that is on $name: its arguments and its code, not these, count" >&2
    elif ! { install && start "$@"; }; then
        echo "nothing was started on $name: the same command tries again" >&2
        taken_away
        continue
    fi
    follow
done
# An error of the run itself would come again.
if ! $keep; then
    delete
fi
exit "$code"
