"""The same training in torch: weights, batches, optimizer and hyperparameters; float32."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_ordermerge import config as schema
from jax_ordermerge import tree
from jax_ordermerge.arch import hf_tensors
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.data import pack
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import llama
from jax_ordermerge.train import batches, objective
from jax_ordermerge.train.optimizer import make_schedule

torch = pytest.importorskip("torch", reason="needs the extra parity")
SETTINGS = {
    "population": {"members": 1},
    "data": {"buckets": []},
    "training": {
        "epochs": 7,
        "batch": 8,
        "microbatch": None,
        "warmup": 4,
        "weight_decay": 0.1,
        "learning_rate": 1e-2,
    },
}


def torch_model(model, params):
    from transformers import LlamaConfig, LlamaForCausalLM

    flat = tree.flatten(jax.device_get(params))
    twin = LlamaForCausalLM(LlamaConfig(**model.to_hf("float32"), attn_implementation="eager"))
    weights = {
        name: torch.tensor(flat[spec.path] if layer is None else flat[spec.path][layer])
        for name, spec, layer in hf_tensors(model)
    }
    twin.load_state_dict(weights, strict=True)
    return twin.float().train()


def torch_training(twin, plan, training):
    """Return the losses; optimizer, clipping and schedule as torch users write them."""
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    vectors = [p for p in twin.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    settings = training.optimizer
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(
            groups, lr=1.0, betas=(settings.beta1, settings.beta2), eps=settings.epsilon
        ),
        "sgd": lambda: torch.optim.SGD(
            groups, lr=1.0, momentum=settings.momentum, nesterov=settings.nesterov
        ),
        "adafactor": lambda: torch.optim.Adafactor(
            groups,
            lr=1.0,
            beta2_decay=-settings.decay_rate,
            eps=(settings.epsilon**0.5, 1e-3),  # torch squares the first
        ),
    }[settings.kind]()
    rate = make_schedule(training, plan.steps)
    losses = []
    for step in range(20):
        batch = {name: torch.tensor(array[0]) for name, array in plan.batch(step, 0).items()}
        logits = twin(batch["tokens"].long(), attention_mask=batch["segments"]).logits
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["targets"].long(), reduction="none"
        )
        loss = (each * batch["weights"]).sum() / batch["weights"].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), training.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"kind": "adamw", "beta2": 0.95}},
        {
            "optimizer": {"kind": "sgd", "momentum": 0.8, "nesterov": True},
            "learning_rate": 0.3,
            "weight_decay": 0.01,
        },
        {
            "optimizer": {"kind": "adafactor", "min_dim_size_to_factor": 1},
            "learning_rate": 0.3,
        },
    ],
    ids=["adamw", "sgd", "adafactor"],
)
def test_twenty_steps_are_those_of_torch(
    tmp_path, tiny_train, tiny_model, tiny_base, tiny_examples, changes
):
    # 21 steps are planned: the schedule does not end at the 20 compared
    run = tiny_train(
        tmp_path,
        make_mesh(),
        **SETTINGS | {"training": SETTINGS["training"] | changes | {"checkpoint_every": 20}},
    )
    plan = batches.make_plan(run.spec, tiny_examples)
    twin = torch_model(tiny_model, tiny_base)
    expected = torch_training(twin, plan, run.spec.training)
    losses = np.array([line["loss"][0] for line in run.lines()])[:20]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert expected[-1] < expected[0] - 0.2
    ours = tree.flatten(
        jax.device_get(
            orbax.restore(tmp_path / "checkpoints", 20, wanted(run, tiny_model))["params"]
        )
    )
    theirs = {name: value.numpy(force=True) for name, value in twin.state_dict().items()}
    for name, spec, layer in hf_tensors(tiny_model):
        mine = ours[spec.path][0] if layer is None else ours[spec.path][0, layer]
        assert np.linalg.norm(mine - theirs[name]) < 1e-4 * np.linalg.norm(theirs[name]), name


def wanted(run, model):
    return {"params": convert.abstract_params(model, make_mesh(), members=1)}


# ---------------------------------------------------------------------- preference pairs


def torch_pairs(twin, batch, settings):
    """Return losses and scores of pairs as users of torch write them."""
    flat = {name: torch.tensor(batch[name]).flatten(0, 1) for name in pack.SEQUENCES}
    logits = twin(flat["tokens"].long(), attention_mask=flat["segments"]).logits.log_softmax(-1)
    each = logits.gather(2, flat["targets"].long()[:, :, None])[:, :, 0] * flat["weights"]
    chosen, rejected = each.sum(1).view(-1, 2).unbind(1)
    tokens = flat["weights"].sum(1).view(-1, 2)
    up, down = (
        chosen - torch.tensor(batch["reference"][:, 0]),
        rejected - torch.tensor(batch["reference"][:, 1]),
    )
    margins = settings.beta * (up - down)
    if settings.loss == "ipo":
        losses = (up / tokens[:, 0] - down / tokens[:, 1] - 1 / (2 * settings.beta)) ** 2
    else:
        losses = -(1 - settings.label_smoothing) * torch.nn.functional.logsigmoid(margins)
        losses = losses - settings.label_smoothing * torch.nn.functional.logsigmoid(-margins)
    return losses, {
        "rewards/chosen": settings.beta * up,
        "rewards/rejected": settings.beta * down,
        "rewards/margins": margins,
    }


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"loss": "ipo", "beta": 0.5}])
def test_pairs_are_those_of_torch(tiny_model, tiny_examples, settings):
    settings = schema.Dpo(**settings)
    params = llama.init_params(tiny_model, 1)
    reference = np.random.default_rng(0).normal(-40, 20, (21, 2)).astype(np.float32)
    pairs = dataclasses.replace(
        tiny_examples, rejected=tiny_examples.take(np.roll(np.arange(21), 1)), reference=reference
    )
    batch = pack.collate(pairs, np.arange(8), 24)
    (_, sums), ours = jax.value_and_grad(
        objective.dpo(tiny_model, settings, dtype="float32"), has_aux=True
    )(params, batch)
    twin = torch_model(tiny_model, params)
    losses, scores = torch_pairs(twin, batch, settings)
    losses.sum().backward()
    np.testing.assert_allclose(sums.losses, losses.numpy(force=True), rtol=1e-4)
    for name, expected in scores.items():
        np.testing.assert_allclose(
            sums.scores[name], expected.numpy(force=True), rtol=1e-4, atol=1e-5
        )
    flat, theirs = tree.flatten(ours), dict(twin.named_parameters())
    for name, spec, layer in hf_tensors(tiny_model):
        mine, expected = (
            flat[spec.path] if layer is None else flat[spec.path][layer],
            theirs[name].grad.numpy(),
        )
        assert np.linalg.norm(mine - expected) < 1e-4 * np.linalg.norm(expected), name
