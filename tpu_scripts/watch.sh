#!/usr/bin/env bash
# From nothing to a finished experiment: create, set up, run; after a preemption create again and continue, until it is done;
# then fetch the results and delete. However it ends, the slices are deleted.
#
#   watch.sh --name NAME --type v5p-64 --runtime v2-alpha-tpuv5 --spot \
#       --package "jax_ordermerge[tpu] @ git+https://github.com/OWNER/jax_ordermerge" --nfs 10.0.0.2:/share \
#       --config experiment.yaml --fetch /mnt/shared/runs/one/report.html -- --set output=/mnt/shared/runs/one
#
#   options of create.sh, setup.sh and run.sh (--project and --zone too), and
#   --fetch PATH       copied from worker 0 at the end, see fetch.sh
#   --to DIRECTORY     where to; results/NAME by default
#   --preemptions N    how many to survive; 100 by default
#   --retries N        how often to try again after another failure with all slices there; 1 by default
#   --setup-tries N    how often setup.sh is tried on a slice before it is deleted; 3 by default
#   --keep             do not delete the slices
#   --dry-run          print the gcloud commands of an experiment without preemption
#   -- ...             more arguments of `ordermerge run`; output must be on a disk that survives the slices
#
# Exit code: 0 done; 2 bad input; 143 more preemptions than allowed; else that of the run.

# shellcheck disable=SC2034  # `step` reads the options by name
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
type='' runtime='' spot='' reserved='' reservation='' flex_start='' max_duration='' labels='' network='' subnetwork=''
service_account='' timeout='' interval='' package='' constraints='' secret='' env_file='' python='' nfs='' mount='' config=''
logs='' fetch='' to='' preemptions=100 retries=1 setup_tries=3 keep=''
parse 'type runtime reservation max-duration labels network subnetwork service-account timeout interval package constraints secret env-file python nfs mount config logs fetch to preemptions retries setup-tries' \
  'spot reserved flex-start keep' "$@"
need type runtime package config
[[ -z $constraints || -f $constraints ]] || die "constraints $constraints not found"
[[ -z $env_file ]] || check_env_file "$env_file"
[[ -f $config ]] || die "config $config not found"

# step SCRIPT OPTION...: call a script of this folder with those of the options that were given.
step() {
  local script=$1 call=("--name=$name") option variable
  shift
  for option in project zone dry-run internal-ips "$@"; do
    variable=${option//-/_}
    case $option in
      dry-run | internal-ips | spot | reserved | flex-start) [[ -z ${!variable} ]] || call+=("--$option") ;;
      *) [[ -z ${!variable} ]] || call+=("--$option=${!variable}") ;;
    esac
  done
  if [[ $script == run.sh ]]; then call+=(-- ${rest[@]+"${rest[@]}"}); fi
  "$here/$script" "${call[@]}"
}

end() {
  local code=$?
  trap - EXIT
  if [[ -n $keep ]]; then
    say "$name is kept, and goes on to cost money until delete.sh --name $name"
  else
    step delete.sh interval || code=1
  fi
  exit "$code"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

lost=0 failed=0 there=''
while :; do
  code=0
  if [[ -z $there ]]; then
    step create.sh slices type runtime spot reserved reservation flex-start max-duration labels network subnetwork service-account timeout interval
    there=yes
    # A slice is hard to come by: a step that fails is tried again on it. Bad input is not mended by that.
    for ((try = 1; ; try++)); do
      code=0
      step setup.sh slices package constraints secret env-file python nfs mount interval || code=$?
      if ((code == 0 || code == 2 || try >= setup_tries)) || slice_lost; then break; fi
      say "setup failed with exit code $code; trying again on the same slice ($try of $setup_tries)"
    done
  fi
  ((code)) || step run.sh slices config logs interval || code=$?
  if ((code == 0)); then break; fi
  if ((code == 143)) || slice_lost; then
    lost=$((lost + 1)) there=''
    say "preempted ($lost of at most $preemptions)"
    ((lost <= preemptions)) || exit 143
    step delete.sh interval
  elif ((code == 2 || failed >= retries)); then
    exit "$code"
  else
    failed=$((failed + 1)) there=''
    say "failed with exit code $code; trying again ($failed of $retries)"
    step delete.sh interval
  fi
done
if [[ -n $fetch ]]; then
  from=$fetch
  step fetch.sh slices from to
fi
