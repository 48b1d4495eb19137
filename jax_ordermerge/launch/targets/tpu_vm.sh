#!/usr/bin/env bash
# {{ name }} on {{ target.slices }} x {{ target.type }}: created, run through preemptions to its end, deleted.
{% for note in notes %}
# {{ note }}
{% endfor %}
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
{% for key in ("spot", "reserved", "flex_start", "internal_ips") if target[key] %}
  --{{ key | replace("_", "-") }} \
{% endfor %}
{% for key in ("reservation", "max_duration", "project", "zone", "network", "subnetwork", "service_account", "secret") if target[key] %}
  --{{ key | replace("_", "-") }} {{ target[key] }} \
{% endfor %}
{% if target.labels %}
  --labels {{ target.labels | map("join", "=") | join(",") }} \
{% endif %}
{% if target.env_file %}
  --env-file {{ target.env_file | quote }} \
{% endif %}
  --package {{ target.package | quote }} \
{% if target.constraints != "none" %}
  --constraints {{ target.constraints | quote }} \
{% endif %}
{% if target.nfs %}
  --nfs {{ target.nfs }} \
  --mount {{ target.mount }} \
{% endif %}
{% if target.fetch or "://" not in run %}
  --fetch {{ (target.fetch or run ~ "/report.html") | quote }} \
{% endif %}
  --config "$config"
