#!/usr/bin/env bash
# {{ name }} on {{ target.hosts | length }} hosts, one process each. Ctrl-C saves a checkpoint; the same script continues.
set -euo pipefail

hosts=({{ target.hosts | join(" ") }})
logs=logs/{{ name }}
mkdir -p "$logs"

{% if target.env_file %}
secrets={{ target.env_file | quote }}
# by ls, because the options of stat differ between Linux and macOS
# shellcheck disable=SC2012
if [[ ! -f $secrets || $(ls -ld "$secrets" | cut -c 5-10) != ------ ]]; then
  echo "error: env_file $secrets must exist and be readable by nobody else: chmod 600 $secrets" >&2
  exit 2
fi
{% endif %}

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
{% if target.env_file %}
  # one file per process, which it removes when it has read it: hosts may see one directory
  # shellcheck disable=SC2029  # the index is of this side
  ssh "${hosts[index]}" "umask 077 && cat > {{ target.directory }}/{{ name }}-$index.env" < "$secrets"
{% endif %}
  # in a group of its own, which Ctrl-C does not reach
  set -m
  # shellcheck disable=SC2029  # the index is of this side
  ssh -n "${hosts[index]}" "cd {{ target.directory }} && {% if target.env_file %}{ set -a; . ./{{ name }}-$index.env; set +a; rm -f {{ name }}-$index.env; } && {% endif %}export JAX_PLATFORMS={{ "cuda,cpu" if target.gpus else "cpu" }}{% if "://" in run %} ORDERMERGE_CACHE=\"\${ORDERMERGE_CACHE:-\$PWD/copies}\"{% endif %} && {{ (target.setup ~ " && ") if target.setup else "" }}echo \$\$ > {{ name }}.pid && exec {{ target.command }} run {{ name }}.yaml --set distributed.index=$index" \
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
