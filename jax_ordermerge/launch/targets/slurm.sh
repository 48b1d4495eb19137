#!/bin/bash
# {{ name }} on {{ target.nodes }} nodes with {{ target.processes }} processes each.
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ target.nodes }}
#SBATCH --ntasks-per-node={{ target.processes }}
{% if target.gpus %}
#SBATCH --gpus-per-node={{ target.gpus }}
{% endif %}
{% if target.cpus %}
#SBATCH --cpus-per-task={{ target.cpus }}
{% endif %}
{% if target.memory %}
#SBATCH --mem={{ target.memory }}
{% endif %}
{% for key in ("partition", "account", "qos", "constraint", "time") if target[key] %}
#SBATCH --{{ key }}={{ target[key] }}
{% endfor %}
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# after a preemption or the loss of a node the job starts again, and the run continues at its last checkpoint
#SBATCH --requeue
# {{ target.signal }} s before the time limit (and at a preemption where the cluster sends it) this script gets SIGTERM
#SBATCH --signal=B:TERM@{{ target.signal }}
set -uo pipefail

config=$PWD/{{ name }}-$SLURM_JOB_ID.yaml
cat > "$config" <<'CONFIG'
{{ config -}}
CONFIG

{% if target.env_file %}
# secrets: in the environment of the processes, in no script and no log
secrets={{ target.env_file if target.env_file.startswith(("/", "~")) else "$PWD/" ~ target.env_file }}
if [[ ! -f $secrets || $(stat -c %a "$secrets") != 600 ]]; then
  echo "error: env_file $secrets must exist with mode 600: chmod 600 $secrets" >&2
  exit 2
fi
set -a
# shellcheck disable=SC1090
. "$secrets"
set +a
{% endif %}
# {{ "a GPU that is not found is an error, and no slow run on the CPU" if target.gpus else "these nodes are meant to have no accelerator" }}
export JAX_PLATFORMS={{ "cuda,cpu" if target.gpus else "cpu" }}
{% if "://" in run %}
# where a run in a bucket keeps its local copy: all nodes see this directory
export ORDERMERGE_CACHE=${ORDERMERGE_CACHE:-$PWD/copies}
{% endif %}
{% if target.cpus %}
# since 22.05 srun does not take over what sbatch was asked for, and gives a process one core
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
{% endif %}
{% if target.setup %}
{{ target.setup }}
{% endif %}
{% if target.gpus > 1 and target.processes == 1 %}
# by default jax takes the one GPU that has the number of the process
export JAX_LOCAL_DEVICE_IDS={{ range(target.gpus) | join(",") }}
{% endif %}
# SIGTERM to all processes: they end their step, save a checkpoint and leave with exit code 143
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# a process that leaves first must not take the others with it: they may be saving
srun --kill-on-bad-exit=0 \
{% if target.image and target.container == "pyxis" %}
  --container-image={{ target.container_image }} --container-workdir="$PWD" \
  --container-mounts="$PWD:$PWD{{ "," ~ target.mounts if target.mounts else "" }}" \
{% endif %}
{% if target.image and target.container == "apptainer" %}
  apptainer exec{{ " --nv" if target.gpus else "" }} --bind "$PWD{{ "," ~ target.mounts if target.mounts else "" }}" --pwd "$PWD" {{ target.container_image }} \
{% endif %}
  {{ target.command }} run "$config" &
step=$!
wait "$step"
code=$?
# a signal ends `wait` before the processes have ended
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  code=$?
done
echo "ordermerge ended with exit code $code"
again=$((code == 143))
{% if target.crashes %}
# a process was lost (134) or killed (137): the count of crashes outlives the job's restarts in a file
crashes=$PWD/{{ name }}-$SLURM_JOB_ID.crashes
if ((code == 134 || code == 137)); then
  echo "$code" >> "$crashes"
  again=$(($(wc -l < "$crashes") <= {{ target.crashes }}))
fi
{% endif %}
if ((again && ${SLURM_RESTART_COUNT:-0} < {{ target.requeues }})); then
  # SLURM ends this script when it takes the job back; one that ends first is taken for a job that failed
  trap - TERM
  scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
exit "$code"
