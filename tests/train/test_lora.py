"""Adapters on a frozen base: against PEFT, alone and in populations, resumed, and in files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.arch import hf_tensors
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.config import Lora, make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.merge.sources import peft_export
from jax_ordermerge.merge.sources.references import open_model
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import llama, lora
from jax_ordermerge.train import batches, loop, members, objective
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.optimizer import make_optimizer, make_schedule
from jax_ordermerge.train.trainable import make_trainable

# PEFT calls what transformers will remove
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
SETTINGS = {"rank": 3, "alpha": 7.0, "targets": ["q", "v_proj", "up", "down"]}
STEPS = 6  # 2 epochs of 3


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory, tiny_base, tiny_model):
    directory = tmp_path_factory.mktemp("lora") / "base"
    convert.export(tiny_base, tiny_model, directory, dtype="float32")
    return directory


@pytest.fixture(scope="session")
def low_train(tiny_train, base_directory):
    """`tiny_train` with adapters."""

    def run(directory, mesh, *, model=None, training=None, **changes):
        sections = {
            "model": {"base": str(base_directory), **(model or {})},
            "training": {"learning_rate": 0.1, **(training or {})},
        }
        return tiny_train(directory, mesh, lora=SETTINGS, **sections, **changes)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, low_train):
    """Two members, uninterrupted."""
    return low_train(tmp_path_factory.mktemp("whole"), make_mesh())


def drawn(model, settings, seed=0):
    """An adapter in which nothing is zero."""
    random = np.random.default_rng(seed)
    return tree.unflatten(
        {
            s.path: 0.3 * random.standard_normal(s.shape, np.float32)
            for s in lora.table(model, settings)
        }
    )


def state_of(run, model, count=2):
    """Adapters, optimizer state and counters of the last checkpoint."""
    parts = make_trainable(run.spec, model, make_mesh())
    tx = make_optimizer(run.spec.training, STEPS, parts.trained)
    state = steps.abstract_state(
        convert.abstract_tensors(parts.trained, make_mesh(), members=count), tx, make_mesh()
    )
    step = orbax.latest(run.file("checkpoints"))
    return orbax.restore(
        run.file("checkpoints"),
        step,
        {"params": state.params, "optimizer": state.opt_state, "step": state.step},
    )


# ---------------------------------------------------------------------- against PEFT


def peft_model(model, params, adapter, settings):
    """The same base and adapter on torch."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    peft = pytest.importorskip("peft", reason="needs the extra parity")
    from tests.train.test_torch import torch_model

    names = sorted({spec.hf_name.split(".")[-2] for spec in lora.targets(model, settings)})
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=names,
        use_rslora=settings.rslora,
    )
    twin = peft.get_peft_model(torch_model(model, params), config)
    flat, parameters = tree.flatten(jax.device_get(adapter)), dict(twin.named_parameters())
    for spec in lora.table(model, settings):
        for name, values in zip(spec.hf_names(), flat[spec.path], strict=True):
            parameters[name.replace(".weight", ".default.weight")].data = torch.tensor(values)
    return twin


def first_batch(examples):
    rows = np.arange(8)
    batch = batches.pack.step_batch(examples, rows, microbatch=8, lengths=(24,))
    return {name: array[0] for name, array in batch.items()}


@pytest.mark.parametrize(
    "settings",
    [
        Lora(rank=3, alpha=7.0, targets=("q", "v_proj", "up", "down")),
        Lora(rank=4, alpha=2.0, rslora=True),
    ],
    ids=["some", "all, rslora"],
)
def test_logits_and_gradients_are_those_of_peft(tiny_model, tiny_base, tiny_examples, settings):
    adapter = drawn(tiny_model, settings)
    twin = peft_model(tiny_model, tiny_base, adapter, settings)
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    batch = first_batch(tiny_examples)
    logits = twin(
        torch.tensor(batch["tokens"]).long(), attention_mask=torch.tensor(batch["segments"])
    ).logits
    joined = lora.join(tiny_base, adapter, lora.scale(settings))
    ours, _ = jax.jit(
        lambda p: llama.forward(
            tiny_model, p, batch["tokens"], batch["positions"], batch["segments"], dtype="float32"
        )
    )(joined)
    real = batch["segments"] > 0
    np.testing.assert_allclose(ours[real], logits.detach().numpy()[real], rtol=1e-4, atol=1e-5)
    without, _ = llama.forward(
        tiny_model,
        tiny_base,
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        dtype="float32",
    )
    assert np.abs(ours - without)[real].max() > 0.1  # the adapter does something

    each = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.tensor(batch["targets"]).long(), reduction="none"
    )
    (each * torch.tensor(batch["weights"])).sum().backward()
    low = objective.adapted(objective.sft(tiny_model, dtype="float32"), lora.scale(settings))
    grads = tree.flatten(jax.jit(jax.grad(lambda p: low(p, batch, tiny_base)[0]))(adapter))
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert len(theirs) == sum(len(spec.hf_names()) for spec in lora.table(tiny_model, settings))
    for spec in lora.table(tiny_model, settings):
        for name, mine in zip(spec.hf_names(), grads[spec.path], strict=True):
            expected = theirs[name.replace(".weight", ".default.weight")].numpy()
            assert np.linalg.norm(mine - expected) < 1e-4 * np.linalg.norm(expected), name


def test_training_is_that_of_peft(trained, tiny_model, tiny_base, tiny_examples):
    """Losses of all steps of member 0 and its adapter at the end.

    With AdamW, weight decay, clipping and accumulation.
    """
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    settings, training = trained.spec.lora, trained.spec.training
    twin = peft_model(tiny_model, tiny_base, lora.init_params(tiny_model, settings, 0), settings)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    adamw = training.optimizer
    optimizer = torch.optim.AdamW(
        parameters,
        lr=1.0,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.epsilon,
        weight_decay=training.weight_decay,
    )
    plan, losses = batches.make_plan(trained.spec, tiny_examples), []
    rate = make_schedule(training, plan.steps)

    def loss(step):
        batch = {
            name: torch.tensor(array.reshape(-1, *array.shape[2:]))
            for name, array in plan.batch(step, 0).items()
        }
        logits = twin(batch["tokens"].long(), attention_mask=batch["segments"]).logits
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["targets"].long(), reduction="none"
        )
        return (each * batch["weights"]).sum() / batch["weights"].sum()

    for step in range(plan.steps):
        now = loss(step)
        optimizer.zero_grad()
        now.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip_norm)
        optimizer.param_groups[0]["lr"] = float(rate(step))
        optimizer.step()
        losses.append(now.item())
    np.testing.assert_allclose([line["loss"][0] for line in trained.lines()], losses, rtol=1e-5)
    with twin.disable_adapter():
        assert (
            losses[-1] < loss(plan.steps - 1).item() - 0.002
        )  # the adapter does something: 60 times the tolerance
    ours = tree.flatten(jax.device_get(tree.member(state_of(trained, tiny_model)["params"], 0)))
    theirs = dict(twin.named_parameters())
    for spec in lora.table(tiny_model, settings):
        for name, mine in zip(spec.hf_names(), ours[spec.path], strict=True):
            expected = theirs[name.replace(".weight", ".default.weight")].numpy(force=True)
            assert np.linalg.norm(mine - expected) < 1e-4 * np.linalg.norm(expected), name


def test_an_exported_adapter_is_the_member_in_peft(trained, tiny_model, base_directory, tmp_path):
    """PEFT loads the directory, and its logits are those of the dense member."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    peft = pytest.importorskip("peft", reason="needs the extra parity")
    from transformers import AutoModelForCausalLM

    adapter = members.restore_adapter(trained.spec, tiny_model, trained.layout, 1)
    peft_export.write_adapter(
        tmp_path / "adapter", adapter, tiny_model, trained.spec.lora, base=str(base_directory)
    )
    twin = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(
            base_directory, dtype=torch.float32, attn_implementation="eager"
        ),
        tmp_path / "adapter",
    )
    tokens = np.random.default_rng(0).integers(1, tiny_model.vocab_size, (3, 12))
    expected = twin(torch.tensor(tokens)).logits.detach().numpy()
    dense = members.restore_member(trained.spec, tiny_model, make_mesh(), trained.layout, 1)
    where = np.broadcast_to(np.arange(12), tokens.shape)
    logits, _ = llama.forward(
        tiny_model, dense, jnp.asarray(tokens), where, np.ones_like(where), dtype="float32"
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- populations, resuming


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, marks=() if sizes == (1, 1) else pytest.mark.slow)
        for sizes in ((1, 1), (2, 1), (1, 2), (2, 2))
    ],
)
def test_member_alone_is_the_member_of_a_population(
    low_train, tiny_model, same_bits, tmp_path, sizes
):
    order, fsdp = sizes
    sections = {
        "training": {"epochs": 1},
        "model": {"compute_dtype": "bfloat16" if fsdp > 1 else "float32"},
    }
    population = {"population": {"members": 4 if order > 1 else 2}}
    population_run = low_train(
        tmp_path / "company", make_mesh(order, fsdp), **sections, **population
    )
    single = low_train(
        tmp_path / "alone", make_mesh(1, fsdp), members=(1,), **sections, **population
    )
    count = population_run.spec.population.members
    population_state, single_state = (
        state_of(population_run, tiny_model, count),
        state_of(single, tiny_model, 1),
    )
    assert same_bits(tree.member(population_state, 1), tree.member(single_state, 0))
    assert not same_bits(tree.member(population_state, 1), tree.member(population_state, 0))
    np.testing.assert_array_equal(population_run.losses()[1], single.losses()[0])


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(trained, tmp_path, low_train, tiny_model, same_bits):
    changes = {"training": {"checkpoint_every": 2, "log_every": 3}}
    with pytest.raises(KeyboardInterrupt):
        low_train(tmp_path, make_mesh(), stop_at=3, **changes)
    assert orbax.latest(tmp_path / "checkpoints") == 2
    resumed = low_train(tmp_path, make_mesh(), **changes)
    assert same_bits(state_of(resumed, tiny_model), state_of(trained, tiny_model))
    np.testing.assert_array_equal(resumed.losses(), trained.losses())


def test_a_checkpoint_holds_adapters_alone_and_says_which(trained, tiny_model):
    metadata = orbax.metadata(trained.file("checkpoints"), STEPS)
    assert metadata["lora"] == {
        "rank": 3,
        "alpha": 7.0,
        "rslora": False,
        "targets": ["q", "v_proj", "up", "down"],
    }
    weights = {"params": {"embed": {"weight": jax.ShapeDtypeStruct((2, 32, 8), jnp.float32)}}}
    with pytest.raises(UserError, match="has no array params/embed/weight"):
        orbax.restore(trained.file("checkpoints"), STEPS, weights)
    size = sum(
        file.stat().st_size
        for file in trained.file(f"checkpoints/{STEPS}").rglob("*")
        if file.is_file()
    )
    assert (
        size
        < 3 * 2 * 4 * sum(np.prod(s.shape) for s in lora.table(tiny_model, trained.spec.lora))
        + 60_000
    )


@pytest.mark.parametrize(
    "change", [{"rank": 2}, {"alpha": 8.0}, {"targets": ["q"]}, {"base_dtype": "bfloat16"}, None]
)
def test_another_adapter_is_another_training(trained, tiny_model, tiny_examples, change):
    settings = None if change is None else SETTINGS | change
    raw = dict(trained.spec.tracking.resolved_config) | {"lora": settings}
    changed = training_spec(make_config(raw))
    differs = "config" if change == {"base_dtype": "bfloat16"} else "lora"
    with pytest.raises(UserError, match=rf"is of another training \({differs} differs\)"):
        loop.train(changed, tiny_model, dict, tiny_examples, make_mesh(), trained.layout)


# ---------------------------------------------------------------------- dense members


def test_members_are_base_plus_scaled_product(trained, tiny_model, tiny_base):
    """Against float64 by hand; what has no adapter is the base to the bit."""
    trained_adapters = tree.flatten(jax.device_get(state_of(trained, tiny_model)["params"]))
    dense = tree.flatten(
        jax.device_get(
            members.restore_members(trained.spec, tiny_model, make_mesh(), trained.layout)
        )
    )
    touched = {spec.path for spec in lora.targets(tiny_model, trained.spec.lora)}
    for path, weight in tree.flatten(jax.device_get(tiny_base)).items():
        if path not in touched:
            np.testing.assert_array_equal(dense[path], np.stack([weight, weight]))
            continue
        a, b = (
            trained_adapters[path.replace("weight", name)].astype(np.float64)
            for name in ("lora_a", "lora_b")
        )
        np.testing.assert_allclose(dense[path], weight + 7 / 3 * (b @ a), rtol=1e-6, atol=1e-8)
        assert (dense[path][0] != dense[path][1]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_member_has_the_same_bits_in_files_and_in_memory(
    trained, tiny_model, same_bits, tmp_path, dtype
):
    trained.layout.config.write_text(json.dumps(trained.spec.tracking.resolved_config))
    population = members.restore_members(
        trained.spec, tiny_model, make_mesh(2, 2, 2), trained.layout, dtype=dtype
    )
    member = members.restore_member(
        trained.spec, tiny_model, make_mesh(1, 2, 1), trained.layout, 1, dtype=dtype
    )
    assert same_bits(tree.member(population, 1), member)
    source = open_model(f"{trained.directory}/member_1")
    flat = tree.flatten(jax.device_get(member))
    for name, spec, layer in hf_tensors(tiny_model):
        out = np.empty(spec.hf_shape, source.info(name).dtype)
        source.read_into(name, 0, out)
        expected = flat[spec.path] if layer is None else flat[spec.path][layer]
        assert out.astype(dtype).tobytes() == expected.tobytes(), name
    adapter = members.restore_adapter(trained.spec, tiny_model, trained.layout, 1)
    peft_export.write_adapter(
        tmp_path / "adapter", adapter, tiny_model, trained.spec.lora, base=trained.spec.model.base
    )
    read = open_model(f"{trained.spec.model.base}+{tmp_path / 'adapter'}")
    for name, spec, _ in hf_tensors(tiny_model):
        out, again = (np.empty(spec.hf_shape, np.float32) for _ in range(2))
        source.read_into(name, 0, out)
        read.read_into(name, 0, again)
        assert out.tobytes() == again.tobytes(), name


def test_members_that_are_not_there(trained, tiny_model, tiny_spec):
    with pytest.raises(UserError, match=r"member 2 is not in .*; it has the members 0, 1"):
        members.restore_member(trained.spec, tiny_model, make_mesh(), trained.layout, 2)
    with pytest.raises(UserError, match=r"has no adapters: it was trained with lora: null"):
        members.restore_adapter(tiny_spec(), tiny_model, trained.layout, 0)


# ---------------------------------------------------------------------- the dtype of the base


def spec_of(raw):
    return training_spec(make_config(raw))


def test_the_base_is_held_in_the_dtype_of_the_products(tmp_path, low_train):
    config = make_config({"lora": {}})
    assert config.base_dtype == "bfloat16"
    assert make_config({"lora": {"base_dtype": "float32"}}).base_dtype == "float32"
    assert make_config({}).base_dtype == "float32"
    dtypes = []

    def compile_step(step, mesh, state, batch, frozen, options, *, fused):
        dtypes.append({x.dtype.name for x in jax.tree.leaves(frozen)})
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "compile_step", compile_step)
        with pytest.raises(KeyboardInterrupt):
            low_train(tmp_path, make_mesh(), model={"compute_dtype": "bfloat16"})
    assert dtypes == [{"bfloat16"}]
