"""Check the manifests that `launch` writes, and the fields of jobset-v1alpha2.json, against JobSet's own CustomResourceDefinition.

    python tests/launch/check_crd.py jobset.x-k8s.io_jobsets.yaml

The file is config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of kubernetes-sigs/jobset (Apache 2.0), of 750 kB, which is not copied here.
Exit code 1 where something differs, and what.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jax_ordermerge.launch import render
from tests.launch.test_launch import GPU, JOB, JOBSET, TPU, VOLUME


def strict(node: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema that refuses unknown fields, as the server does when it is asked to be strict."""
    if isinstance(node, list):
        return [strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {
        key: strict(value)
        for key, value in node.items()
        if not key.startswith("x-kubernetes-") and key != "format"
    }
    if isinstance(node.get("properties"), dict):
        made["properties"] = {name: strict(value) for name, value in node["properties"].items()}
        if (
            not node.get("x-kubernetes-preserve-unknown-fields")
            and "additionalProperties" not in node
        ):
            made["additionalProperties"] = False
    return made


def fields(node: dict[str, Any], path: str = "") -> Iterator[str]:
    """The fields of a schema with their choices; what is below a Job's spec is Kubernetes' own."""
    for name, below in node.get("properties", {}).items():
        where = f"{path}.{name}"
        item = below.get("items", below)
        yield where + (
            f" of {sorted(item['enum'])}"
            if "enum" in item and "onJobFailureReasons" not in where
            else ""
        )
        if where != ".replicatedJobs.template.spec":
            yield from fields(item, where)


def main() -> int:
    """Print what differs."""
    definition = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
    (theirs,) = (
        one["schema"]["openAPIV3Schema"]
        for one in definition["spec"]["versions"]
        if one["name"] == "v1alpha2"
    )
    wrong = [
        f"{one}: not in both"
        for one in sorted(
            set(fields(theirs["properties"]["spec"])) ^ set(fields(JOBSET["properties"]["spec"]))
        )
    ]
    checker = jsonschema.Draft202012Validator(strict(theirs) | {"required": ["spec"]})
    checker.schema["properties"]["metadata"] = {"type": "object"}
    for options in (TPU, TPU | {"slices": "2"} | VOLUME, GPU, GPU | VOLUME):
        for document in yaml.safe_load_all(render.render(JOB, "gke", options)):
            if document["kind"] == "JobSet":
                wrong += [
                    f"{json.dumps(options)}: {error.json_path}: {error.message[:200]}"
                    for error in checker.iter_errors(document)
                ]
    print("\n".join(wrong) or "all manifests are valid, and all fields are known")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
