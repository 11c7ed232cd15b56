#!/usr/bin/env bash
# A Cloud TPU slice from its creation to its deletion: every worker runs one process of the same job.
# shellcheck disable=SC2016 # what is in single quotes is for the workers' shells
# shellcheck disable=SC2153 # NAME comes from the environment
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/tpu_vm.sh [--dry-run] COMMAND [ARGUMENTS ...]

create [--spot]      asks for a slice of TYPE as a queued resource
wait                 until the slice is there; fails where it never will be
setup                copies this working tree to all workers and installs it there, with Python 3.12; mounts NFS
run ARGUMENTS        python main.py ARGUMENTS on all workers, in the background; started again after a crash
logs [--worker=N]    follows the output of worker N (default: 0)
stop                 saves and ends the run; `run` with the same arguments goes on with it
ssh [--worker=N] [COMMAND]   a shell on worker N (default: 0), or COMMAND there; N may be "all" with a COMMAND
delete [--yes]       deletes the slice and its disks; asks first

--dry-run prints the gcloud commands and runs none of them.

environment: NAME          of the slice
             ZONE          where it is, such as us-west4-a
             PROJECT       that pays
             TYPE          for create: accelerator type, such as v5litepod-64
             VERSION       for create: runtime (default: the one for TYPE)
             NFS           for setup: HOST:/PATH to mount as /mnt/semflow; a slice of several workers needs a shared workdir
             MAX_RESTARTS  for run: after crashes (default: 20)
TEXT
}

fail() {
    echo "tpu_vm.sh: $*" >&2
    exit 2
}

need() {
    local name
    for name in "$@"; do
        [[ -n "${!name:-}" ]] || fail "$name: must be set; see --help"
    done
}

# Runs a command, or prints it as it could be typed.
run() {
    local word line=
    if [[ -z "$dry_run" ]]; then
        "$@"
        return
    fi
    for word in "$@"; do
        if [[ "$word" =~ ^[A-Za-z0-9_./:=,-]+$ ]]; then
            line+=" $word"
        elif [[ "$word" =~ ^(--[a-z-]+=)(.*)$ ]]; then
            line+=" ${BASH_REMATCH[1]}${BASH_REMATCH[2]@Q}"
        else
            line+=" ${word@Q}"
        fi
    done
    echo "${line# }"
}

tpus() { run gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT"; }

on_worker() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }

default_version() {
    case "$TYPE" in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
        *) fail "TYPE: v6e-N, v5p-N, v5litepod-N, v4-N, v3-N or v2-N, got $TYPE; or set VERSION" ;;
    esac
}

create() {
    need TYPE
    local version=${VERSION:-}
    [[ -n "$version" ]] || version=$(default_version)
    local options=("--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$version" --async)
    [[ -z "$spot" ]] || options+=(--spot)
    tpus queued-resources create "$NAME" "${options[@]}"
}

wait_until_active() {
    local state last=
    while true; do
        if [[ -n "$dry_run" ]]; then
            tpus queued-resources describe "$NAME" --format='value(state.state)'
            return
        fi
        state=$(tpus queued-resources describe "$NAME" --format='value(state.state)')
        [[ "$state" == "$last" ]] || echo "$(date +%T) $NAME: $state"
        last=$state
        case "$state" in
            ACTIVE) return ;;
            FAILED | DELETING | SUSPENDING | SUSPENDED) fail "$NAME: must become ACTIVE, is $state; delete and create it" ;;
        esac
        sleep "${POLL_SECONDS:-30}"
    done
}

# The working tree without what git ignores: no repository has to be public for this.
setup() {
    local archive=semflow_jax.tgz script
    if [[ -z "$dry_run" ]]; then
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        archive=$work/semflow_jax.tgz
        git ls-files -z --cached --others --exclude-standard --deduplicate |
            while IFS= read -r -d '' file; do [[ ! -e "$file" ]] || printf '%s\0' "$file"; done |
            tar --create --gzip --null --files-from=- --file="$archive"
    fi
    script='set -e; mkdir -p semflow_jax; tar -xzf semflow_jax.tgz -C semflow_jax; cd semflow_jax'
    script+='; python3 -m pip install --quiet --user uv; uv="python3 -m uv"' # the runtime's own Python is 3.10
    script+='; [ -e .venv ] || $uv venv --quiet --python 3.12 .venv'
    script+='; $uv pip install --quiet --python .venv/bin/python --editable ".[tpu]"'
    if [[ -n "${NFS:-}" ]]; then
        script+='; sudo apt-get -qq install -y nfs-common; sudo mkdir -p /mnt/semflow'
        script+="; mountpoint -q /mnt/semflow || sudo mount -t nfs $(printf %q "$NFS") /mnt/semflow"
    fi
    tpus tpu-vm scp "$archive" "$NAME:semflow_jax.tgz" --worker=all
    on_worker all "$script"
}

# In a session of its own, so that a lost connection does not end it.
start() {
    local command="bash launch/local.sh 1 --max-restarts ${MAX_RESTARTS:-20} -- .venv/bin/python main.py" script
    (($# == 0)) || command+=$(printf ' %q' "$@")
    script='cd semflow_jax && if [ -e run.pid ] && kill -0 $(cat run.pid) 2>/dev/null'
    script+='; then echo "$(hostname): runs already; stop it first" >&2; exit 2; fi'
    script+="; setsid nohup $command >>run.log 2>&1 </dev/null & echo \$! >run.pid"
    on_worker all "$script"
}

stop() {
    local script='cd semflow_jax && kill $(cat run.pid)'
    script+=' && while kill -0 $(cat run.pid) 2>/dev/null; do sleep 1; done; tail -n 3 run.log'
    on_worker all "$script"
}

shell() {
    if (($#)); then
        on_worker "$worker" "$*"
    else
        tpus tpu-vm ssh "$NAME" --worker="$worker"
    fi
}

delete() {
    local answer
    if [[ -z "$yes" && -z "$dry_run" ]]; then
        read -r -p "delete $NAME in $ZONE, its disks included? [y/N] " answer || true
        [[ "${answer:-}" == [yY]* ]] || fail "delete: not confirmed; answer y or pass --yes"
    fi
    tpus queued-resources delete "$NAME" --force --quiet
}

dry_run="" spot="" yes="" worker=0
if [[ "${1:-}" == --dry-run ]]; then dry_run=1 && shift; fi
case "${1:-}" in
    -h | --help) usage && exit ;;
    "") usage >&2 && exit 2 ;;
esac
command=$1
shift

# `run` and `ssh` pass their arguments on; a flag of this script comes first.
while (($#)); do
    case "$command $1" in
        *" --dry-run") dry_run=1 ;;
        "create --spot") spot=1 ;;
        "delete --yes") yes=1 ;;
        "logs --worker="* | "ssh --worker="*) worker=${1#*=} ;;
        "run "* | "ssh "*) break ;;
        *) fail "$command: found $1, which it does not take; see --help" ;;
    esac
    shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
need NAME ZONE PROJECT
case "$command" in
    create) create ;;
    wait) wait_until_active ;;
    setup) setup ;;
    run) start "$@" ;;
    logs) on_worker "$worker" "tail -n 100 -F semflow_jax/run.log" ;;
    stop) stop ;;
    ssh) shell "$@" ;;
    delete) delete ;;
    *) fail "$command: one of create, wait, setup, run, logs, stop, ssh, delete" ;;
esac
