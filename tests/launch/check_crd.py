"""Check manifests and jobset-v1alpha2.json against the CustomResourceDefinition of JobSet.

    python tests/launch/check_crd.py jobset.x-k8s.io_jobsets.yaml

The file is config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of kubernetes-sigs/jobset
(Apache 2.0). It has 750 kB and is not copied here. The exit code is 1 if something differs.
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
    """Return a structural schema as a JSON schema that refuses unknown fields.

    That is what the server does under strict field validation.
    """
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    schema = {
        key: strict(value)
        for key, value in node.items()
        if not key.startswith("x-kubernetes-") and key != "format"
    }
    if isinstance(node.get("properties"), dict):
        schema["properties"] = {name: strict(value) for name, value in node["properties"].items()}
        if (
            not node.get("x-kubernetes-preserve-unknown-fields")
            and "additionalProperties" not in node
        ):
            schema["additionalProperties"] = False
    return schema


def fields(node: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the fields of a schema with their choices, except those below the spec of a Job."""
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
        version["schema"]["openAPIV3Schema"]
        for version in definition["spec"]["versions"]
        if version["name"] == "v1alpha2"
    )
    wrong = [
        f"{field}: not in both"
        for field in sorted(
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
