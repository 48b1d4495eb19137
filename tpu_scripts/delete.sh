#!/usr/bin/env bash
# Delete a queued resource and its slices. What was written on their disks is lost: fetch.sh first.
#
#   delete.sh --name NAME
#
#   --name NAME        as given to create.sh
#   --interval SECONDS between two tries; 30 by default
#   --project, --zone  by default those of `gcloud config`
#   --dry-run          print the gcloud commands only
#
# Tries five times. Exit code 0 where it is gone, or never was there.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
interval=30
parse 'interval' '' "$@"

if [[ -n $dry_run ]]; then
  tpus queued-resources delete "$name" --force --quiet
  exit 0
fi
for try in 1 2 3 4 5; do
  [[ $(resource_state) != ABSENT ]] || exit 0
  if tpus queued-resources delete "$name" --force --quiet; then
    exit 0
  fi
  say "try $try to delete $name failed"
  sleep "$interval"
done
say "$name could not be deleted; it goes on to cost money: see gcloud compute tpus queued-resources list"
exit 1
