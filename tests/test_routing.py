"""Experts that sampling chose: recorded where they were chosen, compared with the policy's, replayed in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from drpo import DRPOTrainer
from drpo.rollout.decoding import record_log_probs
from drpo.rollout.routing import ExpertReplay, find_routers, recording_experts
from support.mixtures import ARCHITECTURES, make_mixture
from support.rollouts import (
    GradientKeeper,
    completion_lengths,
    flat,
    load_model,
    made_up_reward,
    made_up_rollout,
    make_trainer,
)


def choices(model: Any, **inputs: Any) -> Tensor:
    """Of one pass, [B, T, layers, K]."""
    with torch.no_grad(), recording_experts(model) as chosen:
        model(**inputs, use_cache=False)
    return chosen.take(len(inputs["input_ids"]))


class TestRecording:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_of_a_generation_is_that_of_one_pass_over_what_was_drawn(self, architecture: str) -> None:
        model = make_mixture(architecture).double()
        _, tokenizer = load_model()
        # Two prompts that are equal go through the model once; rows that end leave.
        inputs = tokenizer(["1+2=", "10+34-6=", "1+2=", "7="], return_tensors="pt", padding=True)
        ends = torch.arange(1, 16)
        torch.manual_seed(0)
        with record_log_probs(model, experts=True) as recorder:
            sequences = model.generate(**inputs, do_sample=True, max_new_tokens=12, eos_token_id=ends.tolist())
        width = inputs["input_ids"].shape[1]
        drawn = sequences[:, width:]
        recorded = recorder.experts(width, drawn.shape[1])
        assert recorded is not None
        is_end = torch.isin(drawn, ends)
        ended = (is_end.cumsum(dim=1) - is_end.long()) > 0
        mask = torch.cat([inputs["attention_mask"], (~ended).long()], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        expected = choices(model, input_ids=sequences, attention_mask=mask, position_ids=positions)
        # What was drawn last is not looked at any more.
        counts = mask.bool() & ~torch.cat([torch.zeros_like(inputs["input_ids"]).bool(), is_end], dim=1)
        counts[:, -1] = False
        actual = torch.cat(recorded, dim=1)
        assert (~ended).sum() < drawn.numel(), "no row ended early"
        assert expected[counts].unique().numel() == 8
        torch.testing.assert_close(actual[counts].sort(dim=2).values, expected[counts].sort(dim=2).values)

    def test_is_of_a_model_s_own_choice_while_another_is_replayed(self) -> None:
        model = make_mixture()
        ids = torch.arange(3, 23).view(2, 10)
        own = choices(model, input_ids=ids)
        replay = ExpertReplay(model, takes_recorded=True)
        replay.expect(((own.long() + 1) % 8).flatten(0, 1))
        assert torch.equal(choices(model, input_ids=ids), own)
        assert "forward" in vars(find_routers(model)[0])

    def test_leaves_no_trace(self) -> None:
        model = make_mixture()
        with recording_experts(model):
            pass
        assert not any("forward" in vars(router) for router in find_routers(model))

    def test_a_router_that_chooses_twice_is_not_taken_for_one(self) -> None:
        class TwiceTopKRouter(torch.nn.Module):
            def forward(self, scores: Tensor) -> Any:
                return scores.topk(2).values.topk(1)

        model = torch.nn.Sequential(TwiceTopKRouter())
        with recording_experts(model), pytest.raises(RuntimeError, match="TwiceTopKRouter calls topk 2 times"):
            model(torch.randn(3, 4))


class TestReplay:
    IDS = torch.arange(3, 23).view(2, 10)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_of_a_model_s_own_choice_changes_nothing(self, architecture: str) -> None:
        model = make_mixture(architecture)
        logits = model(input_ids=self.IDS, use_cache=False).logits
        own = choices(model, input_ids=self.IDS)
        replay = ExpertReplay(model, takes_recorded=True)
        replay.expect(own.flatten(0, 1))
        torch.testing.assert_close(model(input_ids=self.IDS, use_cache=False).logits, logits, rtol=0, atol=1e-5)
        differing = replay.differing_at(self.IDS.shape, torch.ones(2, 10, dtype=torch.bool))
        assert differing is not None
        assert differing.shape == (20, 3)
        assert not differing.any()

    def test_weighs_the_recorded_experts_as_the_policy_does(self) -> None:
        model = make_mixture()
        router = find_routers(model)[0]
        states = torch.randn(5, 32)
        recorded = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [1, 7]])
        replay = ExpertReplay(model, takes_recorded=True)
        replay.expect(recorded.unsqueeze(1).to(torch.uint8))
        _, weights, experts = router(states)
        assert torch.equal(experts, recorded)
        probs = torch.nn.functional.linear(states, router.weight).softmax(dim=1).gather(1, recorded)
        # Qwen3-MoE weighs the chosen as if there were no others where its configuration says so.
        expected = probs / probs.sum(dim=1, keepdim=True) if router.norm_topk_prob else probs
        torch.testing.assert_close(weights, expected)
        assert weights.requires_grad

    def test_counts_the_experts_that_differ_whether_or_not_it_takes_them(self) -> None:
        for takes_recorded in (False, True):
            model = make_mixture()
            own = choices(model, input_ids=self.IDS).flatten(0, 1).long()
            recorded = own.clone()
            # One of two at the first token, both at the second, in the first layer.
            recorded[0, 0, 0] = next(e for e in range(8) if e not in own[0, 0])
            recorded[1, 0] = torch.tensor([e for e in range(8) if e not in own[1, 0]][:2])
            replay = ExpertReplay(model, takes_recorded=takes_recorded)
            replay.expect(recorded)
            model(input_ids=self.IDS, use_cache=False)
            differing = replay.differing_at(self.IDS.shape, (torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])))
            assert differing is not None
            assert differing[:, 0].tolist() == [0.5, 1.0, 0.0]

    def test_of_another_number_of_tokens_is_refused(self) -> None:
        model = make_mixture()
        replay = ExpertReplay(model, takes_recorded=True)
        replay.expect(torch.zeros(7, 3, 2, dtype=torch.uint8))
        with pytest.raises(RuntimeError, match=r"\(20, 2\) experts are chosen; \(7, 2\) were recorded"):
            model(input_ids=self.IDS, use_cache=False)


def sample_with_other_routers(prompts: list[str], trainer: DRPOTrainer) -> dict[str, Any]:
    """A rollout function of an engine that chooses a few other experts; it returns those of all tokens but the last."""
    engine = make_mixture(std=0.4)
    engine.load_state_dict(trainer.bare_model.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        for router in find_routers(engine):
            router.weight.add_(0.01 * torch.randn_like(router.weight))
    inputs = trainer.processing_class(prompts, return_tensors="pt", padding=True, padding_side="left")
    with record_log_probs(engine, experts=True) as recorder:
        sequences = engine.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=20)
    lengths, width = completion_lengths(inputs, sequences), inputs["input_ids"].shape[1]
    recorded = recorder.experts(width, sequences.shape[1] - width)
    assert recorded is not None
    prompt_lengths = inputs["attention_mask"].sum(dim=1).tolist()
    of_rows = zip(*recorded, prompt_lengths, lengths, strict=True)
    return {
        "prompt_ids": trainer.processing_class(prompts)["input_ids"],
        "completion_ids": [row[:n].tolist() for row, n in zip(sequences[:, width:], lengths, strict=True)],
        "logprobs": recorder.log_probs(lengths),
        "routed_experts": [torch.cat([p[width - long :], c[: n - 1]]).numpy() for p, c, long, n in of_rows],
    }


class TestTraining:
    def train(self, folder: Path, problems: Dataset, **settings: Any) -> tuple[DRPOTrainer, dict[str, Tensor]]:
        keeper = GradientKeeper()
        one = {"router_aux_loss_coef": 0.0, "max_steps": 1, "updates_per_rollout": 1, "per_device_train_batch_size": 16}
        trainer = make_trainer(
            folder,
            problems,
            model=make_mixture(std=0.4),
            reward_funcs=made_up_reward,
            audit_threshold=100.0,
            callbacks=[keeper, *settings.pop("callbacks", [])],
            **{**one, **settings},
        )
        trainer.train()
        return trainer, keeper.gradient

    def test_without_a_difference_in_precision_sends_tokens_where_sampling_did(
        self, tmp_path: Path, problems: Dataset
    ) -> None:
        trainer, _ = self.train(tmp_path, problems)
        assert trainer.state.log_history[0]["routing/other_tokens"] == 0

    def test_on_the_sampler_s_experts_brings_low_precision_closer(self, tmp_path: Path, problems: Dataset) -> None:
        logs = {}
        for replay in (False, True):
            trainer, _ = self.train(tmp_path / str(replay), problems, rollout_precision="bf16", router_replay=replay)
            logs[replay] = trainer.state.log_history[0]
            share = logs[replay]["routing/other_tokens"]
            assert "; the mean is within" in (audited := str(trainer._audits.first))
            assert audited.endswith(f" {share:.1%} of the tokens go to other experts than they did.")
        assert logs[False]["routing/other_tokens"] > 0.02
        assert 0 < logs[False]["routing/other_experts"] < logs[False]["routing/other_tokens"]
        gaps = [logs[replay]["audit/logp_difference_mean"] for replay in (False, True)]
        assert gaps[1] < 0.8 * gaps[0]

    @pytest.mark.parametrize(
        "settings",
        [
            {"gradient_checkpointing": True},
            {"share_prompts": False},
            {"fused_loss": False},
            {"tokens_per_micro_batch": 60},
        ],
        ids=str,
    )
    def test_has_one_gradient_however_it_is_computed(
        self, tmp_path: Path, problems: Dataset, settings: dict[str, Any]
    ) -> None:
        both = {"rollout_precision": "fp8", "router_replay": True}
        (_, expected), (_, actual), (_, without) = (
            self.train(tmp_path / name, problems, **options)
            for name, options in (
                ("plain", both),
                ("other", both | settings),
                ("own experts", {**both, "router_replay": False}),
            )
        )
        difference, effect = (
            (flat(gradient) - flat(expected)).norm() / flat(expected).norm() for gradient in (actual, without)
        )
        assert difference < 1e-4
        assert effect > 1e-2

    @pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"fused_loss": False}], ids=str)
    @pytest.mark.parametrize("replay", [False, True])
    def test_leaves_what_is_sampled_between_updates_as_it_is(
        self, tmp_path: Path, problems: Dataset, settings: dict[str, Any], replay: bool
    ) -> None:
        class Sampling(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                ids = torch.arange(3, 9).view(2, 3)
                sampled.append(model.generate(ids, max_new_tokens=4, attention_mask=torch.ones_like(ids)))

        sampled: list[Tensor] = []
        several = {"max_steps": 4, "updates_per_rollout": 2, "split_distance": True, "router_replay": replay}
        trainer, _ = self.train(
            tmp_path, problems, rollout_precision="bf16", callbacks=[Sampling()], **several, **settings
        )
        trainer.evaluate(eval_dataset=problems.select(range(8)))
        assert len(sampled) == 4
        assert "routing/other_tokens" in trainer.state.log_history[2]

    def test_takes_the_experts_that_a_rollout_function_returns(self, tmp_path: Path, problems: Dataset) -> None:
        logs = {}
        for replay in (False, True):
            settings = {"rollout_func": sample_with_other_routers, "router_replay": replay}
            trainer, _ = self.train(tmp_path / str(replay), problems, **settings)
            logs[replay] = trainer.state.log_history[0]
        assert logs[False]["routing/other_tokens"] > 0.01
        gaps = [logs[replay]["audit/logp_difference_mean"] for replay in (False, True)]
        assert gaps[1] < 0.8 * gaps[0]

    def test_is_refused_where_no_routers_are_known(self, tmp_path: Path, problems: Dataset) -> None:
        with pytest.raises(
            ValueError, match="does not work with a Qwen3ForCausalLM, which has no routers that are known"
        ):
            make_trainer(tmp_path, problems, router_replay=True)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda experts: None, "returned None as routed_experts; expected a list for each of the 16 prompts"),
            (lambda experts: [experts[0][:2], *experts[1:]], r"routed_experts\[0\] is of 2 tokens; expected the "),
            (
                lambda experts: [rows[:, :2] for rows in experts],
                "experts of 2 layers were recorded; the model has more routers",
            ),
        ],
        ids=["none", "too few tokens", "too few layers"],
    )
    def test_is_refused_of_experts_that_do_not_fit(
        self, tmp_path: Path, problems: Dataset, change: Any, message: str
    ) -> None:
        def rollout(prompts: list[str], trainer: DRPOTrainer) -> dict[str, Any]:
            output = sample_with_other_routers(prompts, trainer)
            return {**output, "routed_experts": change(output["routed_experts"])}

        with pytest.raises((ValueError, RuntimeError), match=message):
            self.train(tmp_path, problems, rollout_func=rollout, router_replay=True)

    def test_compares_nothing_where_another_engine_samples(self, tmp_path: Path, problems: Dataset) -> None:
        trainer, _ = self.train(tmp_path, problems, rollout_func=made_up_rollout)
        assert not any(name.startswith("routing/") for name in trainer.state.log_history[0])
