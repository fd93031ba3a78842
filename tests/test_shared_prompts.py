"""A prompt that completions share goes through the model once, and nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor

from drpo.trainer.batch import RolloutBatch, left_aligned, lengths, loss_mask, select
from drpo.trainer.micro_batches import split_within
from drpo.trainer.scoring import FusedScorer
from drpo.trainer.shared_prompts import DistinctTokens, add_shared_attention, share_tokens, why_not_shared
from support.fp64 import AllInFP64
from support.rollouts import GradientKeeper, flat, made_up_reward, made_up_rollout, make_trainer

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "experts_implementation": "eager"}
CAPPED = {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 1}

WINDOWS = {**EXPERTS, "use_sliding_window": True, "max_window_layers": 2}

MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama of eager attention": {"attn_implementation": "eager"},
    "Qwen3": {},
    "Gemma2 with a soft-cap": {**CAPPED, "attn_implementation": "eager"},
    "Gemma2 with a window shorter than sequences": {**CAPPED, "attn_implementation": "eager", "sliding_window": 5},
    "Gemma3": {},
    "Mistral with a window shorter than sequences": {"sliding_window": 6},
    "Qwen3Moe": EXPERTS,
}


def make_model(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model of random weights, so large that a token that is seen or not makes a difference."""
    architecture = name.split()[0]
    config = getattr(
        transformers, f"{architecture}TextConfig" if architecture in ("Gemma3", "Qwen3_5") else f"{architecture}Config"
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config(**SMALL, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def make_batch(groups: list[tuple[int, list[int]]], seed: int = 0) -> RolloutBatch:
    """Random tokens for prompts of so many, each with completions of so many; groups are mixed."""
    generator = torch.Generator().manual_seed(seed)
    columns = [max(prompt for prompt, _ in groups), max(max(completions) for _, completions in groups)]
    prompts = [torch.randint(3, 99, (columns[0],), generator=generator) for _ in groups]
    rows = [(group, prompt, completion) for group, (prompt, each) in enumerate(groups) for completion in each]
    rows = [rows[index] for index in torch.randperm(len(rows), generator=generator)]
    prompt_mask = torch.stack([torch.arange(columns[0]) >= columns[0] - prompt for _, prompt, _ in rows]).long()
    completion_mask = torch.stack([torch.arange(columns[1]) < completion for *_, completion in rows]).long()
    return {
        "prompt_ids": torch.stack([prompts[group] for group, *_ in rows]) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, 99, (len(rows), columns[1]), generator=generator) * completion_mask,
        "completion_mask": completion_mask,
    }


def random_groups(seed: int) -> list[tuple[int, list[int]]]:
    """Of prompts and completions of 1 to 40 tokens, short and long beside one another; up to six completions a prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    return [(draw(40), [draw(longest) for _ in range(draw(6))]) for longest in (4, 20, 40)]


def scored_alone(model: Any, batch: RolloutBatch) -> Tensor:
    """The hidden states before the tokens that count."""
    ids, places, _ = left_aligned(batch, int(lengths(batch).max()))
    return model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[places[:, 1:]]


def scored_together(model: Any, batch: RolloutBatch) -> Tensor:
    """The same, of a model with :func:`add_shared_attention`."""
    shared = share_tokens(batch, int(lengths(batch).max()))
    states = model.base_model(**shared.inputs, use_cache=False).last_hidden_state
    return states[0, shared.predicts[loss_mask(batch).bool()]]


def gradient(model: Any) -> Tensor:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return flat(gradients)


class TestTokens:
    def test_of_a_batch_by_hand(self) -> None:
        batch: RolloutBatch = {
            "prompt_ids": torch.tensor([[3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]]),
            "prompt_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 1, 1]]),
            "completion_ids": torch.tensor([[15, 16, 0], [11, 12, 13], [17, 0, 0], [14, 0, 0]]),
            "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0]]),
        }
        shared = share_tokens(batch, longest=5)
        # Prompts, then completions but for their last tokens.
        assert shared.ids.tolist() == [[1, 2, 3, 4, 5, 15, 11, 12]]
        assert shared.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 2, 3]]
        # 15 and 17 come after 5; 11 and 14 after 2.
        assert [row[:n] for row, n in zip(shared.predicts.tolist(), (2, 3, 1, 1), strict=True)] == [
            [4, 5],
            [1, 6, 7],
            [4],
            [1],
        ]
        assert DistinctTokens(batch).positions([0, 1, 2, 3]) == 2 + 3 + 2 + 3 + 1 + 1

    def test_of_long_prompts_are_queries_once(self) -> None:
        """A prompt of 40 and completions of 4, of which 3 are inputs."""
        shared = share_tokens(make_batch([(40, [4] * 8)]), longest=44)
        assert shared.ids.shape == (1, 40 + 8 * 3)
        assert [tuple(rows.queries.shape) for rows in shared.rows] == [(1, 43), (8, 16)]
        assert [tuple(rows.keys.shape) for rows in shared.rows] == [(1, 43), (8, 43)]

    def test_of_long_completions_are_rows_of_similar_lengths(self) -> None:
        shared = share_tokens(make_batch([(4, [100, 90, 30, 5, 1])]), longest=104)
        # 103 and 93 tokens, 33, and 8 and 4; each width a multiple of 16 or that of the longest.
        assert [tuple(rows.queries.shape) for rows in shared.rows] == [(2, 16), (1, 48), (2, 103)]

    def test_of_a_completion_that_is_empty_are_its_prompt_s(self) -> None:
        batch = make_batch([(3, [1, 1])])
        batch["completion_mask"][:] = 0
        shared = share_tokens(batch, longest=3)
        assert shared.position_ids.tolist() == [[0, 1, 2]]
        assert shared.predicts.tolist() == [[2], [2]]
        assert shared.outputs.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradient_are_those_of_sequences_alone(name: str, dtype: torch.dtype, tolerance: float) -> None:
    alone = make_model(name, dtype, **MODELS[name])
    together = copy.deepcopy(alone)
    assert why_not_shared(together) is None
    add_shared_attention(together)
    with AllInFP64() if dtype == torch.float64 else contextlib.nullcontext():
        # Three groups each: with two precisions and eight models, 144.
        for seed in range(3):
            batch = make_batch(random_groups(seed), seed)
            expected, states = scored_alone(alone, batch), scored_together(together, batch)
            weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            assert (states - expected).norm() <= tolerance * expected.norm()
            for scored in (expected, states):
                (scored * weight).sum().backward()
            truth = gradient(alone)
            assert (gradient(together) - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("name", ["Llama", "Gemma2 with a window shorter than sequences"])
def test_states_are_the_same_in_any_micro_batch(name: str) -> None:
    model = make_model(name, **MODELS[name])
    add_shared_attention(model)
    batch = make_batch([(20, [3, 18, 40, 7]), (33, [5, 6])])
    longest = int(lengths(batch).max())
    whole = share_tokens(batch, longest)
    states = model.base_model(**whole.inputs, use_cache=False).last_hidden_state[0]
    for rows in ([0], [1, 2], [0, 2, 3, 5], [5, 4]):
        part = select(batch, torch.tensor(rows))
        own = share_tokens(part, longest)
        counted = loss_mask(part).bool()
        places = whole.predicts[rows][:, : counted.shape[1]][counted]
        again = model.base_model(**own.inputs, use_cache=False).last_hidden_state[0, own.predicts[counted]]
        assert (again - states[places]).abs().max() <= 1e-5 * states.abs().max()


def test_other_calls_of_the_model_stay_as_they_are() -> None:
    model = make_model("Qwen3")
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    generate = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    before = model(ids, attention_mask=mask).logits, model.generate(ids, **generate)
    add_shared_attention(model)
    after = model(ids, attention_mask=mask).logits, model.generate(ids, **generate)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "shared" not in model.config.to_json_string()


def test_a_model_is_shared_in_a_second_trainer_too() -> None:
    model = make_model("Qwen3")
    add_shared_attention(model)
    name = model.config._attn_implementation
    assert why_not_shared(model) is None
    add_shared_attention(model)
    assert model.config._attn_implementation == name


class TestMicroBatches:
    def test_keep_completions_of_a_prompt_together(self) -> None:
        """Positions: 10 + 2 · 3 = 16 of the first prompt, 4 + 3 · 2 = 10 of the second, 3 + 5 = 8 of the third."""
        batch = make_batch([(10, [3, 3]), (4, [2, 2, 2]), (3, [5])])
        layout = DistinctTokens(batch)
        groups = split_within(layout, torch.ones(6, dtype=torch.bool), budget=20)
        assert [layout.positions(rows.tolist()) for rows in groups] == [16, 18]
        assert [batch["prompt_mask"][rows].sum(dim=1).tolist() for rows in groups] == [[10, 10], [3, 4, 4, 4]]

    def test_part_completions_that_are_too_many_together(self) -> None:
        batch = make_batch([(10, [6, 5, 4, 3, 2])])
        groups = split_within(DistinctTokens(batch), torch.ones(5, dtype=torch.bool), budget=22)
        # 10 + 6 + 5 = 21, 10 + 4 + 3 + 2 = 19.
        assert [batch["completion_mask"][rows].sum(dim=1).tolist() for rows in groups] == [[6, 5], [4, 3, 2]]

    @pytest.mark.parametrize("budget", [None, 1, 30, 100])
    def test_have_every_kept_sequence_once_within_the_budget(self, budget: int | None) -> None:
        for seed in range(10):
            batch = make_batch(random_groups(seed), seed)
            keep = torch.rand(len(batch["prompt_ids"]), generator=torch.Generator().manual_seed(seed)) < 0.7
            layout = DistinctTokens(batch)
            groups = [rows.tolist() for rows in split_within(layout, keep, budget)]
            assert sorted(itertools.chain(*groups)) == keep.nonzero().squeeze(1).tolist()
            assert all(budget is None or len(rows) == 1 or layout.positions(rows) <= budget for rows in groups)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("Qwen3_5", {}, "it has layers of linear_attention, in which"),
        ("Bloom", {}, "its body takes no position_ids"),
        ("Qwen3", {"attn_implementation": "flex_attention"}, "its attention is flex_attention, not sdpa or eager"),
        ("FalconH1", {}, "it has layers of hybrid, in which"),
        (
            "Qwen2Moe",
            {**WINDOWS, "sliding_window": 6},
            "times their largest away from those of sequences by themselves",
        ),
        ("Qwen2Moe", {**WINDOWS, "sliding_window": 60}, "its layers do not say over which window they attend"),
    ],
)
def test_is_left_out_where_it_would_change_the_result(name: str, settings: dict[str, Any], reason: str) -> None:
    model = make_model(name, **settings)
    own_name = model.config._attn_implementation
    refusal = why_not_shared(model)
    assert refusal is not None
    assert reason in refusal
    assert model.config._attn_implementation == own_name


class TestTraining:
    @pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
    @pytest.mark.parametrize("objective", ["drpo", "ppo"])
    def test_has_the_same_gradient(
        self, tmp_path: Path, problems: Dataset, lora: bool, checkpointing: bool, objective: str
    ) -> None:
        """In the second update, of which sequences without an advantage are dropped; PPO's needs old log-probs too."""
        gradients, histories = [], []
        for share in (False, True):
            torch.manual_seed(0)
            peft: dict[str, Any] = {}
            if lora:
                config = pytest.importorskip("peft").LoraConfig(
                    r=4, target_modules="all-linear", init_lora_weights=False
                )
                peft = {"peft_config": config}
            keeper = GradientKeeper()
            trainer = make_trainer(
                tmp_path,
                problems,
                objective=objective,
                share_prompts=share,
                gradient_checkpointing=checkpointing,
                per_device_train_batch_size=32,
                num_generations=8,
                learning_rate=0.0,
                rollout_func=made_up_rollout,
                reward_funcs=made_up_reward,
                audit_threshold=100.0,
                callbacks=[keeper],
                **peft,
            )
            trainer.train()
            gradients.append(flat(keeper.gradient))
            histories.append(trainer.state.log_history[:2])
        alone, together = gradients
        assert alone.norm() > 0
        assert (together - alone).norm() <= 1e-6 * alone.norm()
        for before, after in zip(*histories, strict=True):
            assert "work/shared_tokens" not in before
            assert after["work/shared_tokens"] > 0.2
            assert after["work/saved_tokens"] > before["work/saved_tokens"]
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)

    def test_says_in_one_line_where_prompts_are_not_shared(
        self, tmp_path: Path, problems: Dataset, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make_trainer(tmp_path, problems, model=make_model("Qwen3_5"))
        assert (
            caplog.text.count("The prompt of a group is computed once a completion: it has layers of linear_att") == 1
        )
        assert isinstance(trainer._scorer, FusedScorer)
        assert not trainer._scorer.shares_prompts
