#!/usr/bin/env bash
# Run an experiment on all workers of all slices to its end, and gather their logs.
#
#   run.sh --name NAME --config experiment.yaml -- --set output=/mnt/shared/runs/one
#
#   --name NAME        as given to create.sh
#   --slices N         as given to create.sh; 1 by default
#   --config FILE      config of this machine; it is copied to the workers
#   --logs DIRECTORY   gets TIME/SLICE/WORKER.log; logs/NAME by default
#   --interval SECONDS between two looks; 30 by default
#   --internal-ips     as given to create.sh
#   --project, --zone  by default those of `gcloud config`
#   --dry-run          print the gcloud commands only
#   -- ...             more arguments of `ordermerge run`
#
# The workers go on without this script; called again while they run, it waits for them.
# Exit code: 0 done; 143 preempted or a slice was lost, the same command continues at the last checkpoint on another slice;
# 2 bad input; else that of the run.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
config='' logs='' interval=30
parse 'config logs interval' '' "$@"
need config
[[ -f $config ]] || die "config $config not found"
logs=${logs:-logs/$name}/$(date -u +%Y%m%dT%H%M%SZ)

arguments=$(printf '%q ' run config.yaml --set distributed.coordinator=auto ${rest[@]+"${rest[@]}"})
# setsid: the run outlives the connection that starts it
start="cd ~/ordermerge
if [ -f pid ] && kill -0 \$(cat pid) 2>/dev/null; then echo runs already; exit 0; fi
rm -f exit_code
setsid bash -c $(printf '%q' "if { [ ! -f environment ] || . ./environment; } && { [ ! -f private/env ] || { set -a; . private/env; set +a; }; }; then venv/bin/ordermerge $arguments; echo \$? > exit_code; else echo 2 > exit_code; fi") > run.log 2>&1 < /dev/null &
echo \$! > pid"
# shellcheck disable=SC2016  # expanded on the worker
look='cd ~/ordermerge; cat run.log; echo
if [ -f exit_code ]; then echo "ordermerge: exit $(cat exit_code)"
elif kill -0 $(cat pid) 2>/dev/null; then echo "ordermerge: running"
else echo "ordermerge: exit 137"; fi'

for node in $(nodes); do
  tpus tpu-vm scp "$config" "$node:ordermerge/config.yaml" --worker=all --quiet
done
for node in $(nodes); do
  on_workers "$node" "$start"
done

if [[ -n $dry_run ]]; then
  for node in $(nodes); do on_workers "$node" "$look" "--output-directory=$logs/$node"; done
  exit 0
fi

unreachable=0
while :; do
  reached=yes
  for node in $(nodes); do
    mkdir -p "$logs/$node"
    on_workers "$node" "$look" "--output-directory=$logs/$node" || reached=''
  done
  if [[ -z $reached ]]; then
    # a slice that is ready may only be out of reach for a moment
    unreachable=$((unreachable + 1))
    if slice_lost || ((unreachable >= 10)); then
      say "a slice was lost"
      exit 143
    fi
  else
    unreachable=0
    states=$(tail -q -n 1 "$logs"/*/*.log | sed -n 's/^ordermerge: //p' | sort -u)
    [[ $states == *running* ]] || break
  fi
  sleep "$interval"
done

say "logs are in $logs; workers ended with: $(tr '\n' ' ' <<<"$states")"
[[ $states != 'exit 0' ]] || exit 0
if [[ $states == *'exit 143'* ]] || slice_lost; then
  exit 143
fi
tail -n 5 "$logs"/*/*.log >&2
if [[ $states == *'exit 2'$'\n'* || $states == *'exit 2' ]]; then exit 2; fi
exit "$(sed -n 's/^exit //p' <<<"$states" | grep -v '^0$' | head -n 1)"
