#!/usr/bin/env bash
# {{ name }} on {{ target.hosts | length }} hosts, one process each. Ctrl-C saves a checkpoint; the same script continues.
set -euo pipefail

hosts=({{ target.hosts | join(" ") }})
logs=logs/{{ name }}
mkdir -p "$logs"

for host in "${hosts[@]}"; do
  ssh "$host" "mkdir -p {{ target.directory }} && cat > {{ target.directory }}/{{ name }}.yaml" <<'CONFIG'
{{ config -}}
CONFIG
done

# shellcheck disable=SC2329  # called by the trap
stop() {
  echo "stopping all processes; they save a checkpoint" >&2
  for host in "${hosts[@]}"; do
    ssh -n "$host" "kill -TERM \$(cat {{ target.directory }}/{{ name }}.pid)" || true
  done
}
trap stop INT TERM

started=()
for index in "${!hosts[@]}"; do
  # in a group of its own, which Ctrl-C does not reach
  set -m
  # shellcheck disable=SC2029  # the index is of this side
  ssh -n "${hosts[index]}" "cd {{ target.directory }} && {{ (target.setup ~ " && ") if target.setup else "" }}echo \$\$ > {{ name }}.pid && exec {{ target.command }} run {{ name }}.yaml --set distributed.index=$index" \
    > "$logs/$index.log" 2>&1 &
  started+=($!)
  set +m
done
echo "running; logs are in $logs" >&2

# the exit code of all is the first that is not 0
code=0
for index in "${!hosts[@]}"; do
  one=0
  wait "${started[index]}" || one=$?
  while kill -0 "${started[index]}" 2>/dev/null; do
    one=0
    wait "${started[index]}" || one=$?
  done
  ((one == 0)) || {
    echo "${hosts[index]} ended with exit code $one; see $logs/$index.log" >&2
    ((code)) || code=$one
  }
done
exit "$code"
