"""Samples while training: they are of the members at that step, and training is unchanged."""

import dataclasses
import json
import shutil

import jax
import pytest

from jax_ordermerge.arch import Rope
from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import generation
from jax_ordermerge.experiment import pipeline, sample_generations
from jax_ordermerge.experiment.context import open_run
from jax_ordermerge.report import run_report
from jax_ordermerge.report.document import Chapter
from jax_ordermerge.report.run import read_run
from jax_ordermerge.train import members
from jax_ordermerge.tree import member

ASKS = ["samples.every=3", "samples.max_new_tokens=4"]


def trained(folder, directory, *overrides):
    pipeline.run(
        load_config(folder / "tiny.yaml", [f"output={directory}", *overrides]),
        through="train",
        log=lambda line: None,
    )
    return directory


def lines(directory, name):
    return [
        json.loads(line)
        for line in (directory / "metrics" / f"{name}.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def both(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("sampling")
    return trained(folder, path / "silent"), trained(folder, path / "sampled", *ASKS)


def weights(folder, directory):
    ctx = open_run(load_config(folder / "tiny.yaml", [f"output={directory}"]), lambda line: None)
    return ctx, members.restore_members(ctx.training, ctx.model, ctx.mesh, ctx.layout)


def test_members_are_bitwise_the_same_with_and_without(both, folder):
    silent, sampled = both
    for a, b in zip(
        *(jax.tree.leaves(weights(folder, directory)[1]) for directory in both), strict=True
    ):
        assert jax.device_get(a).tobytes() == jax.device_get(b).tobytes()
    assert (silent / "losses" / "train.npz").read_bytes() == (
        sampled / "losses" / "train.npz"
    ).read_bytes()
    assert not (silent / "metrics" / "samples.jsonl").exists()
    metrics = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in lines(a, "train")]
        for a in both
    ]
    assert metrics[0] == metrics[1]


def test_the_last_answers_are_those_of_the_trained_members(both, folder):
    _, sampled = both
    samples = lines(sampled, "samples")
    assert [line["step"] for line in samples] == [3, 6, 9, 10]
    ctx, population = weights(folder, sampled)
    validation = ctx.splits["validation"]
    assert all(
        line["prompts"] == validation.prompts and line["members"] == [0, 1] for line in samples
    )
    for number in (0, 1):
        generate = generation.make_generator(
            ctx.model, member(population, number), ctx.tokenizer, batch=4, dtype="float32"
        )
        assert samples[-1]["texts"][number] == generate(
            [validation.prompt(row).tolist() for row in range(len(validation))], 4
        )
    assert (
        samples[0]["texts"] != samples[-1]["texts"]
    )  # else nothing was learned between, and this would show little


def test_the_report_shows_them(both):
    _, sampled = both
    samples = lines(sampled, "samples")
    blocks = run_report.build(read_run(sampled))
    table = next(
        block
        for chapter in blocks
        if isinstance(chapter, Chapter)
        for block in chapter.blocks
        if getattr(block, "caption", "").startswith("Answers while training")
    )
    assert table.rows == [
        [str(line["step"]), line["texts"][0][0], line["texts"][1][0]] for line in samples
    ]
    assert table.caption.endswith(samples[0]["prompts"][0])


def test_what_a_lost_process_wrote_is_written_again(both, folder, tmp_path):
    _, sampled = both
    shutil.copytree(sampled, tmp_path / "run")
    (tmp_path / "run" / "metrics" / "state.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    (tmp_path / "run" / "config.yaml").unlink()
    trained(folder, tmp_path / "run", *ASKS)
    assert lines(tmp_path / "run", "samples") == lines(sampled, "samples")


def test_prompts_of_ones_own_are_put_in_the_template(folder, tmp_path):
    ctx = open_run(
        load_config(
            folder / "tiny.yaml", [f"output={tmp_path}", *ASKS, 'samples.prompts=["a plus b is ?"]']
        ),
        print,
    )
    tokens = sample_generations.read_prompts(
        ctx.config, ctx.model, ctx.tokenizer, ctx.splits
    ).tokens
    split = next(part for part in ctx.splits.values() if "a plus b is ?" in part.prompts)
    assert tokens == [split.prompt(split.prompts.index("a plus b is ?")).tolist()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.test=null", "data.validation_examples=0", "evaluation.tasks=[]"],
            "there are no prompts: give samples.prompts",
        ),
        (
            ["samples.max_new_tokens=30"],
            "samples.max_new_tokens: prompt 0 of .* and 30 new ones exceed the context of 32",
        ),
    ],
)
def test_unusable_prompts_are_refused_before_anything_is_written(
    folder, tmp_path, overrides, message
):
    with pytest.raises(UserError, match=message):
        trained(folder, tmp_path / "run", *ASKS, *overrides)
    assert not (tmp_path / "run").exists()


def test_samples_that_cross_the_length_of_longrope_are_refused_before_training(folder, tmp_path):
    ctx = open_run(load_config(folder / "tiny.yaml", [f"output={tmp_path}", *ASKS]), print)
    inputs = ctx.config, ctx.model, ctx.tokenizer, ctx.splits
    longest = max(map(len, sample_generations.read_prompts(*inputs).tokens))
    factors = (1.0,) * (ctx.model.head_dim // 2)
    rope = Rope(
        kind="longrope",
        original_max_position_embeddings=longest,
        short_factor=factors,
        long_factor=factors,
    )
    inputs = ctx.config, dataclasses.replace(ctx.model, rope=rope), *inputs[2:]
    with pytest.raises(UserError, match=r"max_new_tokens: prompt .* cross the length of"):
        sample_generations.read_prompts(*inputs)
