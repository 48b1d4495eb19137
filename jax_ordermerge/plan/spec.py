"""What a plan is made from: the sections of a config that decide memory and time."""

import dataclasses
from dataclasses import field

from jax_ordermerge import config
from jax_ordermerge.config.merge import Merge
from jax_ordermerge.json_types import JsonRow
from jax_ordermerge.train.spec import TrainingSpec

# small enough for any device that holds the frozen base; a user chooses rank and alpha later
_ADAPTERS = config.Lora(rank=16, alpha=32.0)


@dataclasses.dataclass(frozen=True)
class PlanSpec(TrainingSpec):
    """Settings of an experiment. `experiment.specs.plan_spec` makes one from a config.

    It is a `TrainingSpec`, so that the planner compiles exactly the training that a run executes.

    Attributes:
        mesh: sizes of the mesh axes.
        merge: merge methods and the dtype of merged models.
        analysis: batch of the loss program.
        evaluation: tasks and the batch of generation.

    Example:
        >>> PlanSpec().change(mesh={"fsdp": 8}, population={"members": 2}).mesh.fsdp
        8
    """

    # the parts of a config that a training does not need
    mesh: config.Mesh = field(default_factory=config.Mesh)
    merge: Merge = field(default_factory=Merge)
    analysis: config.Analysis = field(default_factory=config.Analysis)
    evaluation: config.Evaluation = field(default_factory=config.Evaluation)

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of the compute dtype."""
        return 2 if self.model.compute_dtype == "bfloat16" else 4

    @property
    def merge_bytes(self) -> int:
        """Bytes per element of a merged model."""
        return 4 if self.merge_dtype == "float32" else 2

    @property
    def merge_dtype(self) -> str:
        """Dtype of merged models; bfloat16, as most bases have, where the base is not known."""
        return self.merge.dtype or "bfloat16"

    @property
    def microbatch(self) -> int:
        """Rows per forward pass."""
        return self.training.microbatch or self.training.batch

    @property
    def has_pairs(self) -> bool:
        """Whether the members learn from preference pairs."""
        return self.objective.kind == "dpo"

    def change(self, **sections: JsonRow) -> "PlanSpec":
        """Return a spec with other values for some settings, `{section: {setting: value}}`.

        The values are not validated: the search proposes only values that a config accepts.
        """
        # `model_copy` skips validation, which would cost more than the estimate of an option
        changed = {
            name: getattr(self, name).model_copy(update=dict(settings))
            for name, settings in sections.items()
        }
        return dataclasses.replace(self, **changed)

    def with_adapters(self) -> "PlanSpec":
        """Return a spec that trains low-rank adapters on a frozen base in place of all weights."""
        # a frozen base is only read, so it needs no float32 masters
        return dataclasses.replace(self, lora=_ADAPTERS, base_dtype=self.model.compute_dtype)
