#!/usr/bin/env bash
# Copy results from worker 0 of the first slice to this machine.
#
#   fetch.sh --name NAME --from /mnt/shared/runs/one/report.html --to results
#
#   --name NAME        as given to create.sh
#   --slices N         as given to create.sh; 1 by default
#   --from PATH        file or directory on the worker, such as RUN/merged/average
#   --to DIRECTORY     results/NAME by default
#   --internal-ips     as given to create.sh
#   --project, --zone  by default those of `gcloud config`
#   --dry-run          print the gcloud commands only

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
from='' to=''
parse 'from to' '' "$@"
need from
to=${to:-results/$name}

[[ -n $dry_run ]] || mkdir -p "$to"
tpus tpu-vm scp --recurse "$(nodes | sed -n 1p):$from" "$to" --worker=0 --quiet
