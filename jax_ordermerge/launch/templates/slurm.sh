#!/bin/bash
# {{ name }} on {{ place.nodes }} nodes with {{ place.processes }} processes each.
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ place.nodes }}
#SBATCH --ntasks-per-node={{ place.processes }}
{% if place.gpus %}
#SBATCH --gpus-per-node={{ place.gpus }}
{% endif %}
{% if place.cpus %}
#SBATCH --cpus-per-task={{ place.cpus }}
{% endif %}
{% if place.memory %}
#SBATCH --mem={{ place.memory }}
{% endif %}
{% for key in ("partition", "account", "qos", "constraint", "time") if place[key] %}
#SBATCH --{{ key }}={{ place[key] }}
{% endfor %}
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# after a preemption or the loss of a node the job starts again, and the run continues at its last checkpoint
#SBATCH --requeue
# {{ place.signal }} s before the time limit (and at a preemption where the cluster sends it) this script gets SIGTERM
#SBATCH --signal=B:TERM@{{ place.signal }}
set -uo pipefail

config=$PWD/{{ name }}-$SLURM_JOB_ID.yaml
cat > "$config" <<'CONFIG'
{{ config -}}
CONFIG

{% if place.setup %}
{{ place.setup }}
{% endif %}
{% if place.gpus > 1 and place.processes == 1 %}
# by default jax takes the one GPU that has the number of the process
export JAX_LOCAL_DEVICE_IDS={{ range(place.gpus) | join(",") }}
{% endif %}
# SIGTERM to all processes: they end their step, save a checkpoint and leave with exit code 143
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# a process that leaves first must not take the others with it: they may be saving
srun --kill-on-bad-exit=0 \
{% if place.image and place.container == "pyxis" %}
  --container-image={{ place.image }} --container-workdir="$PWD" \
  --container-mounts="$PWD:$PWD{{ "," ~ place.mounts if place.mounts else "" }}" \
{% endif %}
{% if place.image and place.container == "apptainer" %}
  apptainer exec{{ " --nv" if place.gpus else "" }} --bind "$PWD{{ "," ~ place.mounts if place.mounts else "" }}" --pwd "$PWD" {{ place.image }} \
{% endif %}
  {{ place.command }} run "$config" &
step=$!
wait "$step"
code=$?
# a signal ends `wait` before the processes have ended
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  code=$?
done
echo "ordermerge ended with exit code $code"
if ((code == 143 && ${SLURM_RESTART_COUNT:-0} < {{ place.requeues }})); then
  # SLURM ends this script when it takes the job back; one that ends first is taken for a job that failed
  trap - TERM
  scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
exit "$code"
