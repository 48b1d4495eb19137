#!/usr/bin/env bash
# {{ name }} on {{ target.slices }} x {{ target.type }}: created, run through preemptions to its end, deleted.
set -euo pipefail

config=$(mktemp)
trap 'rm -f "$config"' EXIT
cat > "$config" <<'CONFIG'
{{ config -}}
CONFIG

{{ target.scripts | quote }}/watch.sh \
  --name {{ name }} \
  --type {{ target.type }} \
  --runtime {{ target.runtime }} \
  --slices {{ target.slices }} \
{% if target.spot %}
  --spot \
{% elif target.reserved %}
  --reserved \
{% endif %}
{% if target.project %}
  --project {{ target.project }} \
{% endif %}
{% if target.zone %}
  --zone {{ target.zone }} \
{% endif %}
  --package {{ target.package | quote }} \
{% if target.nfs %}
  --nfs {{ target.nfs }} \
  --mount {{ target.mount }} \
{% endif %}
{% if target.fetch or "://" not in run %}
  --fetch {{ (target.fetch or run ~ "/report.html") | quote }} \
{% endif %}
  --config "$config"
