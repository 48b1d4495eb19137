#!/usr/bin/env bash
# Install the package on all workers of all slices, and check that they have the same versions.
#
#   setup.sh --name NAME --package "jax_ordermerge[tpu] @ git+https://github.com/OWNER/jax_ordermerge" --nfs 10.0.0.2:/share
#   setup.sh --name NAME --package dist/jax_ordermerge-0.2.0-py3-none-any.whl
#
#   --name NAME        as given to create.sh
#   --slices N         as given to create.sh; 1 by default
#   --package WHAT     what pip would install, or a wheel of this machine (installed with its extra tpu)
#   --constraints FILE versions that pip keeps to, such as docker/constraints.txt: all machines have the same
#   --secret NAME      of Secret Manager, read on each worker when a run starts: the token HF_TOKEN for gated models. The service
#                      account of the VMs needs the role Secret Manager Secret Accessor
#   --env-file FILE    NAME=VALUE a line (HF_TOKEN=...), mode 600; copied to the workers, where only the user reads it
#   --python VERSION   3.12 by default; uv brings it where the TPU VMs do not have it
#   --nfs HOST:/SHARE  file system that all workers mount (Filestore): run directories must be on one
#   --mount DIRECTORY  where; /mnt/shared by default
#   --interval SECONDS between two tries to install the client of NFS; 30 by default
#   --internal-ips     as given to create.sh
#   --project, --zone  by default those of `gcloud config`
#   --dry-run          print the gcloud commands only
#
# Everything goes to ~/ordermerge on the workers. It may be called again, with another package too.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
package='' constraints='' secret='' env_file='' python=3.12 nfs='' mount=/mnt/shared interval=30
parse 'package constraints secret env-file python nfs mount interval' '' "$@"
need package
[[ -z $constraints || -f $constraints ]] || die "constraints $constraints not found; give the file, or leave --constraints out"
[[ -z $env_file ]] || check_env_file "$env_file"
[[ -z $secret || $secret =~ ^[A-Za-z0-9_-]+$ ]] || die "--secret '$secret': expected the name of a secret"

wheel=''
if [[ $package == *.whl ]]; then
  [[ -f $package ]] || die "wheel $package not found; build it with: python -m build --wheel"
  # pip takes an extra of a file by its full path
  wheel=$package package="jax_ordermerge[tpu] @ file://\$HOME/ordermerge/$(basename "$package")"
else
  package=${package//\'/\'\\\'\'}
fi

install="set -e; mkdir -p ~/ordermerge; cd ~/ordermerge
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
export PATH=\$PATH:\$HOME/.local/bin
[ -x venv/bin/python ] || uv venv --quiet --python $python venv
uv pip install --quiet --python venv/bin/python ${constraints:+-c constraints.txt }"
if [[ -n $wheel ]]; then install+="\"$package\""; else install+="'$package'"; fi
# What run.sh reads before each run. A TPU that is not found is an error, not a slow run on the CPU.
install+="
echo 'export JAX_PLATFORMS=tpu,cpu' > environment"
if [[ -n $nfs ]]; then
  install+="
# a machine that has just started installs updates of its own, and holds the locks of apt
retry() { for try in 1 2 3 4 5 6 7 8 9 10; do \"\$@\" && return; sleep $interval; done; return 1; }
command -v mount.nfs >/dev/null || { retry sudo apt-get -o DPkg::Lock::Timeout=300 update -qq && retry sudo apt-get -o DPkg::Lock::Timeout=300 install -qq -y nfs-common; }
sudo mkdir -p '$mount'
mountpoint -q '$mount' || sudo mount -t nfs '$nfs' '$mount'
sudo chmod a+rwx '$mount'
# copies of what is in buckets, and of the hub, where all workers see them
echo 'export ORDERMERGE_CACHE=$mount/copies HF_HOME=$mount/huggingface' >> environment"
fi
if [[ -n $secret ]]; then
  # the text of the secret is on no disk and in no log: it is read when a run starts
  install+="
echo 'HF_TOKEN=\$(gcloud secrets versions access latest --secret=$secret${project:+ --project=$project} --quiet) || { echo secret $secret cannot be read by this VM; false; } && export HF_TOKEN' >> environment"
fi

versions=$(mktemp -d)
trap 'rm -rf "$versions"' EXIT
for node in $(nodes); do
  say "installing on all workers of $node"
  on_workers "$node" 'mkdir -p ~/ordermerge && mkdir -p -m 700 ~/ordermerge/private'
  [[ -z $wheel ]] || tpus tpu-vm scp "$wheel" "$node:ordermerge/" --worker=all --quiet
  [[ -z $constraints ]] || tpus tpu-vm scp "$constraints" "$node:ordermerge/constraints.txt" --worker=all --quiet
  if [[ -n $env_file ]]; then
    tpus tpu-vm scp "$env_file" "$node:ordermerge/private/env" --worker=all --quiet
    on_workers "$node" 'chmod 600 ~/ordermerge/private/env'
  fi
  on_workers "$node" "$install"
  mkdir "$versions/$node"
  on_workers "$node" "\$HOME/ordermerge/venv/bin/ordermerge doctor --versions" "--output-directory=$versions/$node"
done
[[ -z $dry_run ]] || exit 0

first=''
for file in "$versions"/*/*.log; do
  [[ -n $first ]] || first=$file
  if ! cmp -s "$first" "$file"; then
    diff "$first" "$file" >&2 || true
    die "worker $(basename "$file" .log) of $(basename "$(dirname "$file")") has other versions than the first; call setup.sh again"
  fi
done
[[ -f $first ]] || die "no worker told its versions"
cat "$first"
