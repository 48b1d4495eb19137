"""Models of ten architectures that are not in the tensor table: merged by name, as numpy does.

The models are made by transformers, which also loads every result.
"""

import dataclasses
import math

import numpy as np
import pytest

from jax_ordermerge.merge import engine
from jax_ordermerge.merge.recipe import planner

unlisted_models = pytest.importorskip(
    "tests.merge.unlisted_models", reason="needs the extra parity"
)
pytestmark = pytest.mark.slow
KINDS = [*unlisted_models.CLASSES, "unet"]
STEM = {"unet": "diffusion_pytorch_model"}
PARAMETERS = {
    "linear": {"weight": 1},
    "ties": {"weight": 1, "density": 0.5},
    "dare_linear": {"weight": 1, "density": 0.5, "rescale": "density"},
    "slerp": {"t": 0.3},
    "parameter_selection": {"weight": 1},
    "model_stock": {},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """For each architecture a base KIND and members KIND_1 and KIND_2."""
    directory = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        stem = STEM.get(kind, "model")
        if kind == "unet":
            base_dir = unlisted_models.make_unet(directory / kind)
        else:
            base_dir = unlisted_models.make(directory / kind, kind)
        base = unlisted_models.load(base_dir, stem)
        for number in (1, 2):
            member = unlisted_models.perturb(base, number)
            unlisted_models.save(directory / f"{kind}_{number}", member, like=base_dir, stem=stem)
    return directory


def check_linear(merged, base, members):
    np.testing.assert_allclose(merged, (members[0] + members[1]) / 2, rtol=1e-6, atol=1e-6)


def check_ties(merged, base, members):
    vectors = []
    for member in members:
        vector = member - base
        count = max(1, int(0.5 * vector.size))
        cut = np.sort(np.abs(vector), axis=None)[-count]
        vectors.append(np.where(np.abs(vector) >= cut, vector, 0))
    sign = np.where(sum(vectors) >= 0, 1, -1)
    agree = [np.sign(vector) == sign for vector in vectors]
    divisor = np.maximum(sum(x.astype(int) for x in agree), 1)
    expected = base + sum(v * a for v, a in zip(vectors, agree, strict=True)) / divisor
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=2e-6)


def check_dare(merged, base, members):
    """Each element is one of the four sums of vectors that were kept, divided by the density."""
    first, second = ((member - base) / 0.5 for member in members)
    sums = np.stack([base, base + first, base + second, base + first + second])
    error = np.abs(merged - sums)
    np.testing.assert_allclose(error.min(axis=0), 0, atol=2e-6)


def check_slerp(merged, base, members):
    a, b = base.reshape(-1), members[0].reshape(-1)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b) if a.any() and b.any() else 0
    angle = math.acos(np.clip(cosine, -1, 1))
    if abs(cosine) > 0.9995:
        expected = 0.7 * a + 0.3 * b
    else:
        expected = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    np.testing.assert_allclose(merged.reshape(-1), expected, rtol=1e-6, atol=2e-6)


def check_selection(merged, base, members):
    assert ((merged == members[0]) | (merged == members[1])).all()


def check_model_stock(merged, base, members):
    vectors = [(member - base).reshape(-1) for member in members]
    norms = [np.linalg.norm(vector) for vector in vectors]
    cosine = vectors[0] @ vectors[1] / max(norms[0] * norms[1], 1e-6)
    t = 2 * cosine / (1 + cosine)
    expected = t * (members[0] + members[1]) / 2 + (1 - t) * base
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6 * scale)


CHECKS = dict(
    zip(
        PARAMETERS,
        (check_linear, check_ties, check_dare, check_slerp, check_selection, check_model_stock),
        strict=True,
    )
)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_numpy_and_loads(kind, root, tmp_path):
    """In one merge, in which the tensors take turns in the methods: each shape is compiled once."""
    stem = STEM.get(kind, "model")
    base, *members = (
        unlisted_models.load(root / name, stem) for name in (kind, f"{kind}_1", f"{kind}_2")
    )
    plans = []
    for method, parameters in PARAMETERS.items():
        # slerp goes from the base to one model
        models = [{"model": f"{root}/{kind}_{number}"} for number in (1, 2)]
        recipe = {
            "merge_method": method,
            "models": models[: 1 if method == "slerp" else 2],
            "parameters": parameters,
        }
        if method != "linear":  # a base is one more model there
            recipe["base_model"] = f"{root}/{kind}"
        plans.append(planner.plan_recipe(recipe))
    sources = {source.label: source for plan in plans for source in plan.sources}
    labels = [*sources]
    outputs, methods = [], {}
    for number, name in enumerate(base):
        turn = (number + KINDS.index(kind)) % len(plans)
        plan = plans[turn]
        output = next(output for output in plan.outputs if output.name == name)
        views = [
            view._replace(source=labels.index(plan.sources[view.source].label))
            for view in output.views
        ]
        members_of = tuple(views[: len(output.members)])
        start = None if output.base is None else views[-1]
        outputs.append(dataclasses.replace(output, members=members_of, base=start))
        methods[name] = [*PARAMETERS][turn]
    plan = dataclasses.replace(plans[0], sources=tuple(sources.values()), outputs=tuple(outputs))
    engine.merge_plan(plan, tmp_path / "merged", with_diagnostics=False)
    merged = unlisted_models.load(tmp_path / "merged", stem)
    assert merged.keys() == base.keys()
    assert {*methods.values()} == {*PARAMETERS}
    for name, values in merged.items():
        wide = [x[name].astype(np.float64) for x in (base, *members)]
        assert values.dtype == base[name].dtype
        CHECKS[methods[name]](values.astype(np.float64), wide[0], wide[1:])
    if kind != "unet":
        check_loading(tmp_path / "merged", kind)


def check_loading(directory, kind):
    """No key is missing or unexpected, and the model computes; tied tensors are one tensor."""
    import torch
    import transformers

    name, _ = unlisted_models.CLASSES[kind]
    model, info = getattr(transformers, name).from_pretrained(directory, output_loading_info=True)
    assert not {key: value for key, value in info.items() if value}
    stored = unlisted_models.load(directory)
    state = model.state_dict()
    tied = [*getattr(model, "all_tied_weights_keys", {}).items()]
    for target, source in tied:
        assert state[target].data_ptr() == state[source].data_ptr()
    if kind == "t5":
        shared = torch.from_numpy(stored["shared.weight"])
        assert torch.equal(model.decoder.embed_tokens.weight, shared)
    for tensor in stored.keys() & state.keys():
        assert torch.equal(state[tensor], torch.from_numpy(stored[tensor]))
