#!/usr/bin/env bash
# Install the package on all workers of all slices, and check that they have the same versions.
#
#   setup.sh --name NAME --package "jax_ordermerge[tpu] @ git+https://github.com/OWNER/jax_ordermerge" --nfs 10.0.0.2:/share
#   setup.sh --name NAME --package dist/jax_ordermerge-0.1.0-py3-none-any.whl
#
#   --name NAME        as given to create.sh
#   --slices N         as given to create.sh; 1 by default
#   --package WHAT     what pip would install, or a wheel of this machine (installed with its extra tpu)
#   --python VERSION   3.12 by default; uv brings it where the TPU VMs do not have it
#   --nfs HOST:/SHARE  file system that all workers mount (Filestore): run directories must be on one
#   --mount DIRECTORY  where; /mnt/shared by default
#   --project, --zone  by default those of `gcloud config`
#   --dry-run          print the gcloud commands only
#
# Everything goes to ~/ordermerge on the workers. It may be called again, with another package too.

# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
package='' python=3.12 nfs='' mount=/mnt/shared
parse 'package python nfs mount' '' "$@"
need package

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
uv pip install --quiet --python venv/bin/python "
if [[ -n $wheel ]]; then install+="\"$package\""; else install+="'$package'"; fi
if [[ -n $nfs ]]; then
  install+="
command -v mount.nfs >/dev/null || { sudo apt-get update -qq && sudo apt-get install -qq -y nfs-common; }
sudo mkdir -p '$mount'
mountpoint -q '$mount' || sudo mount -t nfs '$nfs' '$mount'
sudo chmod a+rwx '$mount'
# copies of what is in buckets, where all workers see them
echo 'export ORDERMERGE_CACHE=$mount/copies' > environment"
fi

versions=$(mktemp -d)
trap 'rm -rf "$versions"' EXIT
for node in $(nodes); do
  say "installing on all workers of $node"
  if [[ -n $wheel ]]; then
    on_workers "$node" 'mkdir -p ~/ordermerge'
    tpus tpu-vm scp "$wheel" "$node:ordermerge/" --worker=all --quiet
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
