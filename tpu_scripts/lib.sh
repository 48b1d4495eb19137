# Shared by the scripts of this folder; sourced, not run. Works with the bash 3.2 of macOS.
# shellcheck shell=bash
set -euo pipefail

# shellcheck disable=SC2034  # used by those that source this
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name='' project='' zone='' slices=1 dry_run='' internal_ips='' track='' rest=()

# The help of a script is the comment at its top.
show_help() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
}

say() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# parse "OPTIONS WITH A VALUE" "FLAGS" "$@": sets a variable for each option (a dash becomes _), and rest=() to what follows --.
parse() {
  local valued=" name project zone slices $1 " flags=" dry-run internal-ips $2 " option value
  shift 2
  while (($#)); do
    case $1 in
      -h | --help)
        show_help
        exit 0
        ;;
      --)
        shift
        rest=("$@")
        break
        ;;
      --*) option=${1#--} ;;
      *) die "$1 is no option; see $(basename "$0") --help" ;;
    esac
    value=''
    if [[ $option == *=* ]]; then
      value=${option#*=} option=${option%%=*}
    elif [[ $valued == *" $option "* ]]; then
      (($# > 1)) || die "--$option needs a value"
      value=$2
      shift
    fi
    if [[ $flags == *" $option "* ]]; then
      value=yes
    elif [[ $valued != *" $option "* ]]; then
      die "unknown option --$option; see $(basename "$0") --help"
    fi
    printf -v "${option//-/_}" '%s' "$value"
    shift
  done
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "--name '$name': expected lower-case letters, digits and dashes"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices '$slices': expected a positive number"
}

# need OPTION...: refuse to go on where one was not given.
need() {
  local option variable
  for option in "$@"; do
    variable=${option//-/_}
    [[ -n ${!variable} ]] || die "--$option is missing; see $(basename "$0") --help"
  done
}

# A file of secrets: NAME=VALUE a line, such as HF_TOKEN=... Nobody else may read it.
check_env_file() {
  [[ -f $1 ]] || die "env-file $1 not found"
  # by ls, because the options of stat differ between Linux and macOS
  # shellcheck disable=SC2012
  [[ $(ls -ld "$1" | cut -c 5-10) == ------ ]] || die "env-file $1 can be read by others: chmod 600 $1"
}

# tpus COMMAND...: gcloud compute tpus, in the project and zone given, else in those of `gcloud config`. --dry-run prints it.
tpus() {
  local call=(gcloud)
  # gcloud has flex-start, named reservations and ssh through IAP in its alpha commands only
  if [[ -n $track || ($1 == tpu-vm && $2 != describe && -n $internal_ips) ]]; then call+=(alpha); fi
  call+=(compute tpus "$@")
  if [[ $1 == tpu-vm && $2 != describe && -n $internal_ips ]]; then call+=(--tunnel-through-iap); fi
  [[ -z $project ]] || call+=("--project=$project")
  [[ -z $zone ]] || call+=("--zone=$zone")
  if [[ -n $dry_run ]]; then
    printf '%q ' "${call[@]}"
    printf '\n'
  else
    "${call[@]}"
  fi
}

# The names of the slices, one a line: NAME, or NAME-0, NAME-1, ... as `--node-prefix` makes them.
nodes() {
  local index
  if ((slices == 1)); then
    printf '%s\n' "$name"
  else
    for ((index = 0; index < slices; index++)); do printf '%s-%d\n' "$name" "$index"; done
  fi
}

# on_workers NODE COMMAND [gcloud options]: run a command on all workers of a slice.
on_workers() {
  local node=$1 command=$2
  shift 2
  tpus tpu-vm ssh "$node" --worker=all --command="$command" --quiet "$@"
}

# look_up COMMAND...: print the state that gcloud tells, ABSENT where it says that there is no such thing, else UNKNOWN.
look_up() {
  local answer
  if answer=$(tpus "$@" 2>&1); then
    tail -n 1 <<<"$answer"
  elif grep -qi 'not[ _]found' <<<"$answer"; then
    echo ABSENT
  else
    say "$answer"
    echo UNKNOWN
  fi
}

resource_state() { look_up queued-resources describe "$name" '--format=value(state.state)'; }

# True where a slice is gone, preempted or being repaired; not where gcloud itself fails.
slice_lost() {
  local node state
  for node in $(nodes); do
    state=$(look_up tpu-vm describe "$node" '--format=value(state)')
    if [[ $state != READY && $state != UNKNOWN ]]; then
      say "$node is $state"
      return 0
    fi
  done
  return 1
}
