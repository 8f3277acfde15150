#!/usr/bin/env bash
# Runs clipmoe_jax.main on this machine with all of its devices, and starts it again when it was preempted.
#
#     launch/node.sh --platform=gpu -- --config=configs/vit_l14_sharegpt4v.py --workdir=runs/l14 …
#
#     --platform=tpu|gpu|cpu   whose XLA flags to set (launch/xla_flags.sh)
#     --restarts=N             how often to start again after exit code 75 (default 100)
#     --dry-run                print what would run
#
# What follows -- goes to clipmoe_jax.main. One process drives all GPUs of a machine. On a TPU slice the same
# command runs on every host (launch/tpu_pod.sh does it), and the processes find each other. Ctrl-C saves and ends
# with code 130, a second one ends at once.
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

platform="" restarts=100 dry_run=false
while [[ $# -gt 0 ]]; do
    case "$1" in
    --platform=*) platform="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --dry-run) dry_run=true ;;
    --help) usage && exit 0 ;;
    --) shift && break ;;
    *) echo "unknown argument '$1': see $0 --help" >&2 && exit 2 ;;
    esac
    shift
done
if [[ -z "$platform" ]]; then
    echo "--platform is missing: see $0 --help" >&2
    exit 2
fi

root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/xla_flags.sh
source "$root/launch/xla_flags.sh"
set_xla_flags "$platform"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
command=("${PYTHON:-python3}" -m clipmoe_jax.main "$@")
if $dry_run; then
    for name in LIBTPU_INIT_ARGS XLA_FLAGS XLA_PYTHON_CLIENT_MEM_FRACTION; do
        [[ -z "${!name:-}" ]] || printf '%s=%q \\\n' "$name" "${!name}"
    done
    printf '%q ' "${command[@]}" && echo
    exit 0
fi

# SIGTERM goes on to the run, which saves and is waited for. This machine is meant then: no other start. So does
# Ctrl-C, as SIGTERM, since a shell's background processes do not hear it.
child="" ended=false stopped=false interrupted=false
pass_on() {
    [[ -z "$child" ]] || kill "-$1" "$child" 2>/dev/null || true
}
trap 'ended=false stopped=true; pass_on TERM' TERM
trap 'ended=false; if $interrupted; then pass_on KILL; else stopped=true interrupted=true; pass_on TERM; fi' INT
for ((i = 0; ; i++)); do
    "${command[@]}" &
    child=$! ended=false
    ! $stopped || pass_on TERM # the signal came while the run was started
    until $ended; do
        ended=true
        wait "$child" && code=0 || code=$? # a signal ends the wait, not the run; an ended run keeps its code
    done
    if $interrupted && [[ $code -eq 75 || $code -eq 137 ]]; then
        exit 130
    fi
    if [[ $code -ne 75 || $i -ge $restarts ]] || $stopped; then
        exit "$code"
    fi
    echo "preempted; starting again" >&2
done
