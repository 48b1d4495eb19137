"""The public API in a few lines: train two members on two orders, and load the merge.

    python examples/public_api.py

Nothing is downloaded. Two CPU cores, about a minute. `.ci/lint` checks its types.
"""

import math
import pathlib

import jax_ordermerge as jom


def train(output: pathlib.Path) -> pathlib.Path:
    """Run the quickstart with two members for one epoch, and return the run directory."""
    changes = ["population.members=2", "training.epochs=1", f"output={output}"]
    config: jom.Config = jom.load_config("quickstart", changes)
    return jom.run(config, through="merge")


def count_parameters(model: pathlib.Path) -> int:
    """Load a merge, which is a Hugging Face directory, and count its parameters."""
    config, params = jom.load_params(model, jom.make_mesh())
    assert params
    names: list[str] = [spec.hf_name for spec in jom.tensor_table(config)]
    print(f"{len(names)} kinds of tensors")
    return sum(math.prod(spec.shape) for spec in jom.tensor_table(config))


if __name__ == "__main__":
    try:
        run = train(pathlib.Path("runs/two"))
        print(f"{count_parameters(run / 'merged' / 'average'):,} parameters")
    except jom.UserError as error:
        raise SystemExit(f"error: {error}") from error
