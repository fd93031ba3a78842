"""Sampling filters: refused, or replayed so that both policies are over the tokens that could be drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig

from drpo import DRPOTrainer
from drpo.data.problems import builtin_problems
from drpo.rewards import exact_answer
from drpo.rollout.decoding import record_log_probs
from drpo.rollout.recorder import NOT_IN_SUPPORT
from drpo.rollout.sampling import NEUTRAL, sampling_mismatches
from drpo.trainer.batch import RolloutBatch
from drpo.trainer.heldout import evaluate
from drpo.trainer.scoring import PaddedScorer, support_log_probs
from drpo.trainer.token_log import TokenLog
from support.rollouts import completion_lengths, config, load_model, make_trainer, transformers_scores

FILTERS = [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 4, "temperature": 0.7}]


@pytest.fixture(scope="module")
def problems() -> Dataset:
    return Dataset.from_list([vars(problem) for problem in builtin_problems("train", 64, seed=0)])


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_the_recorder_keeps_what_could_be_drawn_and_its_mass(sampling: dict[str, Any]) -> None:
    model, tokenizer = load_model()
    inputs = tokenizer(["1+2=", "10+34-6+29-38="], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    with record_log_probs(model, support=True) as recorder:
        sequences = model.generate(**inputs, **{"top_k": 0, **sampling}, do_sample=True, max_new_tokens=8)
    scores, logits = transformers_scores(model, inputs, sequences, **{"top_k": 0, **sampling})
    reached = torch.arange(scores.shape[1]) < torch.tensor(completion_lengths(inputs, sequences))[:, None]
    steps = scores.shape[1]
    recorded = recorder.support(steps + 2)
    assert recorded is not None
    ids, kept = recorded
    allowed = torch.zeros_like(scores, dtype=torch.bool)
    for row, step, place in (ids[:, :steps] != NOT_IN_SUPPORT).nonzero().tolist():
        allowed[row, step, ids[row, step, place]] = True
    assert torch.equal(allowed[reached], scores.isfinite()[reached])
    assert (allowed.sum(dim=2) > 1).any()
    probs = (logits / sampling.get("temperature", 1.0)).softmax(dim=2)
    mass = torch.where(allowed, probs, 0.0).sum(dim=2)
    torch.testing.assert_close(kept[:, :steps][reached], mass[reached], rtol=1e-4, atol=1e-5)
    assert (ids[:, steps:] == NOT_IN_SUPPORT).all()
    assert (kept[:, steps:] == 1).all()


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_with_replay_the_ratios_of_one_model_are_one(
    tmp_path: Path, problems: Dataset, sampling: dict[str, Any]
) -> None:
    few = {"per_device_train_batch_size": 32, "updates_per_rollout": 2, "max_steps": 2}
    trainer = make_trainer(tmp_path, problems, replay_support=True, **few, **sampling)
    trainer.token_log = TokenLog(trainer.processing_class)
    trainer.train()
    assert trainer.audit is not None
    assert trainer.audit.mean < 1e-5
    assert trainer.audit.maximum < 1e-4
    first, second = [row for row in trainer.state.log_history if "loss" in row]
    assert 0.8 < first["rollout/kept_mass"] < 1
    # That of the rollout that is trained on, whatever is sampled beside.
    mass, tokens = trainer._rollout_sampler.kept_mass.tolist()
    trainer.evaluate(eval_dataset=problems.select(range(8)))
    assert [mass, tokens] == trainer._rollout_sampler.kept_mass.tolist()
    assert second["rollout/kept_mass"] == pytest.approx(mass / tokens)
    # After an update π has moved, over the support as well.
    assert first["divergence/mean"] < 1e-5 < second["divergence/mean"]
    assert max(max(row["behavior_logp"]) for row in trainer.token_log.take()) <= 1e-6


def test_a_log_prob_over_the_support_and_its_gradient_are_those_of_the_filtered_distribution() -> None:
    model, _ = load_model()
    model.requires_grad_(False)
    weight = model.lm_head.weight.requires_grad_()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    completion, support = ids[:, 2:], torch.tensor([[[7, 3, -1], [8, 4, 11], [-1, -1, -1]]])
    batch: RolloutBatch = {"completion_ids": completion, "support_ids": support}
    scores = support_log_probs(model, batch, {"input_ids": ids}, temperature=0.5)
    logits = model(ids).logits[:, 1:-1].float() / 0.5
    by_hand = torch.stack(
        [
            logits[0, 0, 7] - logits[0, 0, [7, 3]].logsumexp(dim=0),
            logits[0, 1, 8] - logits[0, 1, [8, 4, 11]].logsumexp(dim=0),
        ]
    )
    torch.testing.assert_close(scores.logp[0, :2], by_hand)
    filtered = logits[0, 1, [8, 4, 11]].log_softmax(dim=0)
    torch.testing.assert_close(scores.entropy[0, 1], -(filtered.exp() * filtered).sum())
    # The last position is padding: it has no support, and its gradient is left out, not NaN.
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    gradient, expected = (
        torch.autograd.grad(value, weight, retain_graph=True)[0]
        for value in (torch.where(mask.bool(), scores.logp, 0.0).sum(), by_hand.sum())
    )
    torch.testing.assert_close(gradient, expected)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"top_p": 0.9},
            "does not take top_p=0.9: it changes the distribution that is sampled from",
        ),
        ({"top_k": 5}, "or set replay_support=True to score the tokens that it leaves"),
        ({"min_p": 0.1}, "or set replay_support=True to score the tokens that it leaves"),
        ({"repetition_penalty": 1.1, "replay_support": True}, "does not take repetition_penalty=1.1"),
        ({"top_p": 0.9, "replay_support": True, "use_vllm": True}, "which TRL does not take from vLLM"),
        ({"top_p": 0.9, "replay_support": True, "objective": "ppo"}, "objective='ppo' needs π_old too"),
        ({"top_p": 2.0, "replay_support": True}, "top_p is 2.0; expected a number between 0 and 1"),
        ({"top_p": 0.0, "replay_support": True}, "top_p is 0.0; expected a number between 0 and 1"),
        ({"top_k": -5, "replay_support": True}, "top_k is -5; expected a whole number, at least 2"),
        ({"top_k": 1, "replay_support": True}, "top_k is 1; expected a whole number, at least 2"),
        ({"min_p": 1.0, "replay_support": True}, "min_p is 1.0; expected a number between 0 and 1"),
        ({"replay_support": True, "objective": "drpo_topk"}, "objective='drpo_topk' needs the likeliest tokens too"),
    ],
)
def test_a_filter_that_cannot_be_replayed_is_refused(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        config(tmp_path, **settings)


def test_a_filter_that_comes_in_by_the_back_door_stops_the_run(tmp_path: Path, problems: Dataset) -> None:
    trainer = make_trainer(tmp_path, problems)
    trainer.generation_config.top_p = 0.9
    with pytest.raises(RuntimeError, match=r"sampling filters: top_p=0\.9 changes what is sampled from"):
        trainer.train()


def sample_with_mask(prompts: list[Any], trainer: DRPOTrainer) -> dict[str, Any]:
    """A rollout function, which samples with top-p and says which tokens could be drawn."""
    inputs = trainer.processing_class(prompts, return_tensors="pt", padding=True, padding_side="left")
    with record_log_probs(trainer.model, support=True) as recorder:
        sequences = trainer.model.generate(**inputs, do_sample=True, top_k=0, top_p=0.9, max_new_tokens=8)
    lengths = completion_lengths(inputs, sequences)
    support = recorder.support(sequences.shape[1])
    assert support is not None
    of_rows = [row[:length].tolist() for row, length in zip(support[0], lengths, strict=True)]
    completions = sequences[:, inputs["input_ids"].shape[1] :]
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": [row[:length].tolist() for row, length in zip(completions, lengths, strict=True)],
        "logprobs": recorder.log_probs(lengths),
        "sampling_mask": [[[one for one in ids if one != NOT_IN_SUPPORT] for ids in row] for row in of_rows],
    }


def test_a_rollout_function_may_return_what_could_be_drawn(tmp_path: Path, problems: Dataset) -> None:
    seen: list[set[str]] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        seen.append(set(columns))
        return [float(index % 2) for index in range(len(completions))]

    few = {"per_device_train_batch_size": 32, "updates_per_rollout": 2, "max_steps": 4, "dynamic_sampling_rounds": 2}
    replay = {"replay_support": True, "reward_funcs": reward, "rollout_func": sample_with_mask}
    trainer = make_trainer(tmp_path, problems, **few, **replay)
    trainer.train()
    assert trainer.audit is not None
    assert trainer.audit.maximum < 1e-4
    first, second, *_ = [row for row in trainer.state.log_history if "loss" in row]
    assert first["divergence/mean"] < 1e-5 < second["divergence/mean"]
    assert seen
    assert all("sampling_mask" not in columns for columns in seen)
    unaware = make_trainer(tmp_path, problems, **few, **{**replay, "replay_support": False})
    unaware.train()
    assert unaware.audit is not None
    assert unaware.audit.mean > 1e-3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda masks: None, "returned None as sampling_mask; expected a list for each of the 32 prompts"),
        (lambda masks: masks[:5], "as sampling_mask; expected a list for each of the 32 prompts"),
        (lambda masks: [masks[0][:1], *masks[1:]], "sampling_mask[0] has 1 lists and completion_ids[0] "),
        (
            lambda masks: [[[98], *masks[0][1:]], *masks[1:]],
            "sampling_mask[0][0] is [98]; expected the tokens that could",
        ),
    ],
    ids=["none", "too few rows", "too few tokens", "without the token drawn"],
)
def test_a_sampling_mask_that_does_not_fit_is_refused(
    tmp_path: Path, problems: Dataset, change: Any, expected: str
) -> None:
    def rollout(prompts: list[Any], trainer: DRPOTrainer) -> dict[str, Any]:
        output = sample_with_mask(prompts, trainer)
        return {**output, "sampling_mask": change(output["sampling_mask"])}

    few = {"per_device_train_batch_size": 32, "updates_per_rollout": 1, "max_steps": 1}
    trainer = make_trainer(tmp_path, problems, replay_support=True, rollout_func=rollout, **few)
    with pytest.raises(ValueError, match=re.escape(expected)):
        trainer.train()


def test_the_fused_loss_gives_way_to_all_logits(
    tmp_path: Path, problems: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: DRPOTrainer = make_trainer(tmp_path, problems, replay_support=True)
    assert isinstance(trainer._scorer, PaddedScorer)
    assert "No fused loss for this model: log-probs over the sampler's support need all logits" in caplog.text


@pytest.mark.parametrize("sampling", [{"top_p": 0.01}, {"top_k": 2}, {"min_p": 0.9}], ids=str)
def test_held_out_problems_are_sampled_without_the_filters_of_the_rollouts(
    tmp_path: Path, problems: Dataset, sampling: dict[str, Any]
) -> None:
    heldout = builtin_problems("heldout", 4, seed=0)
    filtered = make_trainer(tmp_path, problems, replay_support=True, **sampling)
    measured = [
        evaluate(trainer, heldout, exact_answer, samples=8, seed=0)
        for trainer in (filtered, make_trainer(tmp_path, problems))
    ]
    assert measured[0] == measured[1]
    # Nor those that Transformers takes from the model where TRL leaves them open.
    filtered.model.generation_config.update(**sampling, repetition_penalty=1.5, suppress_tokens=[77])
    assert evaluate(filtered, heldout, exact_answer, samples=8, seed=0) == measured[0]
    # The rollouts go on as they were.
    assert {name: getattr(filtered.generation_config, name) for name in sampling} == sampling


LENGTH_AND_END = {
    "max_length",
    "max_new_tokens",
    "max_time",
    "stop_strings",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
}
BEAMS = {"early_stopping", "length_penalty"}
"""Of beams, which are refused by their number."""
SAME_DISTRIBUTION = {
    *("temperature", "renormalize_logits", "remove_invalid_values", "num_return_sequences", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "prefill_chunk_size", "max_cache_len", "low_memory", "continuous_batching_config"),
    *("compile_config", "disable_compile", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "transformers_version", "_commit_hash", "_from_model_config"),
}  # fmt: skip
"""Temperature is compared by itself."""
SPECULATION = {
    *("use_mtp", "speculation_type", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
}  # fmt: skip
"""It leaves the distribution as it is."""


def test_every_setting_of_transformers_is_known_to_change_the_distribution_or_not_to() -> None:
    harmless = LENGTH_AND_END | BEAMS | SAME_DISTRIBUTION | SPECULATION
    settings = set(vars(GenerationConfig()))
    assert settings == (NEUTRAL.keys() | harmless) & settings
    assert not NEUTRAL.keys() & harmless


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_a_setting_that_changes_the_distribution_is_a_mismatch(name: str) -> None:
    for value in NEUTRAL[name]:
        assert sampling_mismatches(1.0, {name: value}) == ()
    (found,) = sampling_mismatches(1.0, {name: 0.5})
    assert found.startswith(f"sampling filters: {name}=0.5 changes what is sampled from")


@pytest.mark.parametrize(
    "setting",
    [{"exponential_decay_length_penalty": (1, 1.5)}, {"encoder_repetition_penalty": 1.2}, {"top_h": 0.4}],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_the_model_brings_along_stops_the_trainer(
    tmp_path: Path, problems: Dataset, setting: dict[str, Any]
) -> None:
    model, _ = load_model()
    model.generation_config.update(**setting)
    trainer = make_trainer(tmp_path, problems, model=model, audit_threshold=100.0)
    with pytest.raises(RuntimeError, match=f"sampling filters: {next(iter(setting))}="):
        trainer.train()
