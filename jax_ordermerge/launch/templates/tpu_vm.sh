#!/usr/bin/env bash
# {{ name }} on {{ place.slices }} x {{ place.type }}: created, run through preemptions to its end, deleted.
set -euo pipefail

config=$(mktemp)
trap 'rm -f "$config"' EXIT
cat > "$config" <<'CONFIG'
{{ config -}}
CONFIG

{{ place.scripts | quote }}/watch.sh \
  --name {{ name }} \
  --type {{ place.type }} \
  --runtime {{ place.runtime }} \
  --slices {{ place.slices }} \
{% if place.spot %}
  --spot \
{% elif place.reserved %}
  --reserved \
{% endif %}
{% if place.project %}
  --project {{ place.project }} \
{% endif %}
{% if place.zone %}
  --zone {{ place.zone }} \
{% endif %}
  --package {{ place.package | quote }} \
{% if place.nfs %}
  --nfs {{ place.nfs }} \
  --mount {{ place.mount }} \
{% endif %}
{% if place.fetch or "://" not in run %}
  --fetch {{ (place.fetch or run ~ "/report.html") | quote }} \
{% endif %}
  --config "$config"
