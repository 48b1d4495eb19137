#!/usr/bin/env bash
# Create one or more TPU slices as a queued resource, and wait until they are there.
#
#   create.sh --name NAME --type v5p-64 --runtime v2-alpha-tpuv5 --spot
#   create.sh --name NAME --type v5litepod-64 --runtime v2-alpha-tpuv5-lite --slices 2 --reserved
#
#   --name NAME        of the queued resource and of its slice (with --slices: NAME-0, NAME-1, ...)
#   --type TYPE        accelerator type, such as v5p-64, v5litepod-64, v6e-64
#   --runtime VERSION  software of the TPU VMs: v2-alpha-tpuv5 (v5p), v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv6e (v6e)
#   --slices N         slices joined by the data-center network; 1 by default
#   --spot             may be taken away at any time, for less money
#   --reserved         from the project's reservation
#   --reservation NAME from this one: its name, or projects/PROJECT/reservations/NAME
#   --flex-start       waits in the queue of flex-start, and runs for --max-duration at most; v5e and v6e
#   --max-duration T   with --flex-start, such as 24h
#                      none of these: on demand
#   --labels K=V,...   of the slices
#   --internal-ips     no external addresses: ssh goes through IAP, and the network needs Cloud NAT for downloads
#   --network NAME, --subnetwork NAME, --service-account EMAIL
#                      by default those of the project
#   --timeout SECONDS  how long to wait for it; 86400 by default
#   --interval SECONDS between two looks; 30 by default
#   --project, --zone  by default those of `gcloud config`
#   --dry-run          print the gcloud commands only
#
# Where it fails, or does not come in time, the queued resource is deleted: nothing is left that costs. Exit code 1 then.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
type='' runtime='' spot='' reserved='' reservation='' flex_start='' max_duration='' labels=''
network='' subnetwork='' service_account='' timeout=86400 interval=30
parse 'type runtime reservation max-duration labels network subnetwork service-account timeout interval' 'spot reserved flex-start' "$@"
need type runtime
chosen=0
for kind in "$spot" "$reserved" "$reservation" "$flex_start"; do [[ -z $kind ]] || chosen=$((chosen + 1)); done
((chosen < 2)) || die "--spot, --reserved, --reservation and --flex-start exclude each other"
[[ -z $flex_start || -n $max_duration ]] || die "--flex-start needs --max-duration, such as 24h (7 days at most)"
[[ -z $max_duration || -n $flex_start ]] || die "--max-duration is of --flex-start"

create_track='' call=(queued-resources create "$name" "--accelerator-type=$type" "--runtime-version=$runtime")
if ((slices == 1)); then call+=("--node-id=$name"); else call+=("--node-count=$slices" "--node-prefix=$name"); fi
[[ -z $spot ]] || call+=(--spot)
[[ -z $reserved ]] || call+=(--reserved)
[[ -z $reservation ]] || call+=("--reservation=$reservation") create_track=alpha
[[ -z $flex_start ]] || call+=(--provisioning-model=flex-start "--max-run-duration=$max_duration") create_track=alpha
[[ -z $labels ]] || call+=("--labels=$labels")
[[ -z $internal_ips ]] || call+=(--internal-ips)
[[ -z $network ]] || call+=("--network=$network")
[[ -z $subnetwork ]] || call+=("--subnetwork=$subnetwork")
[[ -z $service_account ]] || call+=("--service-account=$service_account")

if [[ -n $dry_run ]]; then
  track=$create_track
  tpus "${call[@]}"
  track=''
  tpus queued-resources describe "$name" '--format=value(state.state)'
  exit 0
fi

state=$(resource_state)
[[ $state == ABSENT ]] || die "a queued resource $name may be there (state $state); delete it with delete.sh --name $name, or choose another name"

give_up() {
  local code=$?
  ((code == 0)) || {
    say "deleting $name"
    "$here/delete.sh" --name "$name" --interval "$interval" ${project:+"--project=$project"} ${zone:+"--zone=$zone"} || say "DELETE $name BY HAND: it may cost money"
  }
  exit "$code"
}
trap give_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

track=$create_track
tpus "${call[@]}" || {
  say "gcloud did not create $name"
  exit 1
}
track=''
deadline=$((SECONDS + timeout)) before=''
while :; do
  state=$(resource_state)
  [[ $state == "$before" ]] || say "$name is $state"
  before=$state
  case $state in
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING | ABSENT) exit 1 ;;
  esac
  if ((SECONDS >= deadline)); then
    say "$name is not there after $timeout s"
    exit 1
  fi
  sleep "$interval"
done
