#!/usr/bin/env bash
# Train on a Cloud TPU slice: ask for it, install flowjax on every worker, run, stream process 0, give it back.
#
#   bash tools/launch_tpu.sh --name=dit --zone=us-west4-a --type=v5litepod-256 --version=v2-alpha-tpuv5-lite [options] -- \
#       --config=configs/imagenet_dit_xl2.py --workdir=gs://my-bucket/dit
#
# What follows -- goes to experiments.train, which gets --coordinator=auto besides. The workdir must be a bucket that the
# slice's service account may write: checkpoints and metrics outlive the slice there, and the same command goes on from them.
#
#   --project=P      default: gcloud's own
#   --spot           spot capacity: cheaper, may be taken away. A slice that is taken gets SIGTERM, all workers save the same
#                    step, and the next attempt goes on from it
#   --attempts=N     how often a slice is asked for when one is lost (default 1)
#   --setup=COMMAND  run on every worker before training, e.g. to copy or mount the data
#   --keep           do not delete the slice at the end
#   --dry-run        print the commands instead
#
# Not run by us on real hardware: no TPU was at hand. The gcloud commands follow the reference pages of
# `gcloud compute tpus queued-resources` (create, describe, delete) and `gcloud compute tpus tpu-vm` (ssh, scp).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name="" zone="" type="" version="" project="" setup="true" attempts=1 spot=() keep=false dry=false
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --setup=*) setup="${1#*=}" ;;
    --attempts=*) attempts="${1#*=}" ;;
    --spot) spot=(--spot) ;;
    --keep) keep=true ;;
    --dry-run) dry=true ;;
    --) shift; break ;;
    *) echo "error: unknown option $1; see the head of $0" >&2; exit 2 ;;
  esac
  shift
done
for need in name zone type version; do
  [ -n "${!need}" ] || { echo "error: --$need is missing; see the head of $0" >&2; exit 2; }
done
[ $# -gt 0 ] || { echo "error: no flags for experiments.train after --" >&2; exit 2; }
case " $* " in
  *" --workdir=gs://"*) ;;
  *) echo "error: give --workdir=gs://...: the workers' own disks go with the slice" >&2; exit 2 ;;
esac

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")

run() {
  if $dry; then printf '%q ' "$@"; echo; else "$@"; fi
}

on_all() {  # a command on every worker at once; their output is streamed
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value(state.state)" 2>/dev/null || echo GONE
}

create() {
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" --accelerator-type="$type" \
    --runtime-version="$version" "${spot[@]}"
  if $dry; then return; fi
  until [ "$(state)" = ACTIVE ]; do
    case "$(state)" in FAILED | SUSPENDED | SUSPENDING | GONE) echo "error: the request ended as $(state)" >&2; return 1 ;; esac
    sleep 30
  done
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

install() {
  local archive=flowjax.tar.gz
  # The images' own Python is older than 3.11; uv brings one. gcsfs serves the small files of a bucket, tensorstore the arrays.
  run git archive --format=tar.gz --output="/tmp/$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "/tmp/$archive" "$name:$archive" "${where[@]}" --worker=all &&
    on_all "mkdir -p flowjax && tar -xzf $archive -C flowjax && python3 -m pip install --user --quiet uv" &&
    on_all "~/.local/bin/uv venv --quiet --clear --python 3.11 env" &&
    on_all "~/.local/bin/uv pip install --quiet --python env ./flowjax 'jax[tpu]' gcsfs" &&
    on_all "$setup"
}

train() {
  local flags
  flags=$(printf ' %q' "$@")
  # A slice that is taken away ends the run early but in order; 75 tells that from a run that is done.
  on_all "cd flowjax && exec ../env/bin/python -m experiments.train --coordinator=auto --stopped=75$flags"
}

$keep || trap delete EXIT
for attempt in $(seq "$attempts"); do
  if create && install && train "$@"; then exit 0; fi
  echo "attempt $attempt of $attempts ended; the slice is $(state)" >&2
  if [ "$attempt" -lt "$attempts" ]; then delete; fi
done
exit 1
