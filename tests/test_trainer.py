"""DRPOTrainer: what it records, counts, refuses, and what of TRL it stands on."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from drpo import OBJECTIVES, DRPOTrainer
from drpo.rewards import exact_answer
from drpo.rollout.audit import AuditError
from drpo.trainer.batch import RolloutBatch
from drpo.trainer.checkpointed import CheckpointedTrainer
from drpo.trainer.measurements import Mode
from drpo.trainer.refused import REFUSED
from drpo.trainer.scoring import FusedScorer
from support.rollouts import (
    alternating_reward,
    config,
    flat,
    gradient_of_one_update,
    load_model,
    made_up_reward,
    made_up_rollout,
    make_trainer,
    weights,
)


class Watching(DRPOTrainer):
    """Keeps what each update is made of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.updates: list[dict[str, Any]] = []

    def _loss(self, model: Any, batch: RolloutBatch, mode: Mode) -> Tensor:
        kind, seen = type(self.objective), []
        loss = kind.loss
        # What the objective is given, which is not what the rollout brought unless the trainer passes it on.
        with mock.patch.object(kind, "loss", lambda objective, tokens: seen.append(tokens) or loss(objective, tokens)):
            result = super()._loss(model, batch, mode)
        self.updates.append({**batch, "batch": seen[-1]})
        return result


class TestAnchor:
    def test_of_an_old_policy_is_the_trainer_s_own_when_the_rollout_began(
        self, tmp_path: Path, problems: Dataset
    ) -> None:
        made_up = {"rollout_func": made_up_rollout, "reward_funcs": made_up_reward, "audit_threshold": 100.0}
        trainer = make_trainer(
            tmp_path, problems, Watching, objective="ppo", max_steps=4, learning_rate=1e-3, **made_up
        )
        trainer.train()
        for rollout in (trainer.updates[:2], trainer.updates[2:]):
            assert rollout[0]["batch"].log_ratio.abs().max() < 1e-5 < rollout[1]["batch"].log_ratio.abs().max()
            for update in rollout:
                mask, batch = update["completion_mask"].bool(), update["batch"]
                assert torch.equal(batch.anchor_logp.squeeze(0), update["old_per_token_logps"][mask])
                assert torch.equal(batch.behavior_logp.squeeze(0), update["sampling_per_token_logps"][mask])
        # The made-up sampler is another policy, and how far π is from that one is what is measured.
        assert trainer.state.log_history[0]["divergence/mean"] > 0.1

    def test_at_the_only_update_of_a_rollout_is_the_policy_itself(self, tmp_path: Path) -> None:
        gradients = [
            flat(gradient_of_one_update(tmp_path, per_device_train_batch_size=64, **settings))
            for settings in ({"objective": "ppo"}, {"objective": "pg", "anchor": "old"}, {"objective": "pg"})
        ]
        assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()
        assert (gradients[0] - gradients[2]).norm() > 1e-3 * gradients[0].norm()

    def test_with_a_correction_weighs_tokens_by_what_it_and_the_sampler_differ_by(self, tmp_path: Path) -> None:
        gradients = [
            flat(gradient_of_one_update(tmp_path, per_device_train_batch_size=64, **settings))
            for settings in (
                # At r = π_old/π_old = 1, ρ·r is π/μ: a truncation that is never reached makes it the surrogate.
                {"objective": "ppo", "correction": "token_truncate", "correction_kwargs": {"cap": 1e9}},
                {"objective": "pg"},
                {"objective": "ppo", "correction": "token_truncate"},
            )
        ]
        assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()
        assert (gradients[2] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


class TestTopK:
    def test_log_probs_of_sampler_and_trainer_agree_before_an_update(self, tmp_path: Path, problems: Dataset) -> None:
        trainer = make_trainer(
            tmp_path,
            problems,
            Watching,
            objective="drpo_topk",
            objective_kwargs={"top_k": 4, "delta": 0.2},
            learning_rate=1e-3,
        )
        trainer.train()
        first, second = (update["batch"].topk for update in trainer.updates)
        mask = trainer.updates[0]["completion_mask"].bool()
        assert first.logp.shape == (1, mask.sum(), 4)
        assert (first.logp - first.behavior_logp).abs().max() < 1e-4
        # Where the sampled token is among them, its log-prob is the same one.
        assert first.is_sampled.any()
        alone = trainer.updates[0]["sampling_per_token_logps"][mask].view(1, -1, 1).expand_as(first.logp)
        torch.testing.assert_close(first.behavior_logp[first.is_sampled], alone[first.is_sampled], rtol=0, atol=1e-5)
        assert (second.logp - second.behavior_logp).abs().max() > 1e-3

    @pytest.mark.parametrize(
        ("settings", "what"),
        [
            ({"rollout_func": made_up_rollout, "reward_funcs": made_up_reward}, "a rollout_func"),
            ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
        ],
    )
    def test_is_refused_where_it_is_not_recorded(
        self, tmp_path: Path, problems: Dataset, settings: dict[str, Any], what: str
    ) -> None:
        with pytest.raises(ValueError, match=f"objective='pdm' needs log-probs of .* does not work with {what}"):
            make_trainer(tmp_path, problems, objective="pdm", **settings)


class TestAudit:
    def test_of_one_fp32_model_reads_rounding(self, tmp_path: Path, problems: Dataset) -> None:
        trainer = make_trainer(tmp_path, problems)
        trainer.train()
        assert trainer.audit is not None
        assert trainer.audit.maximum < 1e-4
        assert trainer.audit.tokens > 50

    def test_stops_a_sampler_at_another_temperature_and_names_temperature_first(
        self, tmp_path: Path, problems: Dataset
    ) -> None:
        trainer = make_trainer(tmp_path, problems, generation_kwargs={"temperature": 0.7})
        before = weights(trainer)
        with pytest.raises(AuditError) as stopped:
            trainer.train()
        assert _first_cause(stopped.value) == "temperature: tokens are sampled at 0.7 and scored at 1"
        assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())

    def test_is_passed_at_another_temperature_on_both_sides(self, tmp_path: Path, problems: Dataset) -> None:
        trainer = make_trainer(tmp_path, problems, temperature=0.7)
        trainer.train()
        assert trainer.audit is not None
        assert trainer.audit.maximum < 1e-4

    @pytest.mark.parametrize(
        ("setting", "value"), [("top_k", 3), ("top_p", 0.5), ("do_sample", False), ("temperature", 0.9)]
    )
    def test_stops_at_a_setting_that_changes_the_distribution_however_little_it_shows(
        self, tmp_path: Path, problems: Dataset, setting: str, value: float
    ) -> None:
        trainer = make_trainer(tmp_path, problems, audit_threshold=100.0)
        setattr(trainer.generation_config, setting, value)
        with pytest.raises(AuditError) as stopped:
            trainer.train()
        assert f"{setting}={value}" in _first_cause(stopped.value) or setting in _first_cause(stopped.value)

    def test_lists_temperature_first_where_the_sampler_is_not_known(self, tmp_path: Path, problems: Dataset) -> None:
        trainer = make_trainer(tmp_path, problems, rollout_func=made_up_rollout, reward_funcs=made_up_reward)
        with pytest.raises(AuditError) as stopped:
            trainer.train()
        assert _first_cause(stopped.value).startswith("temperature: the trainer scores at 1")

    @pytest.mark.parametrize(("lora", "objective"), [(False, "drpo"), (True, "drpo"), (False, "drpo_topk")])
    def test_is_passed_where_positions_are_absolute(
        self, tmp_path: Path, problems: Dataset, lora: bool, objective: str
    ) -> None:
        peft = pytest.importorskip("peft")
        small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 99}
        without_dropout = {
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "eos_token_id": 1,
            "bos_token_id": 1,
        }
        model = GPT2LMHeadModel(GPT2Config(**small, **without_dropout))
        peft_config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True) if lora else None
        trainer = make_trainer(tmp_path, problems, model=model, peft_config=peft_config, objective=objective)
        trainer.train()
        assert trainer.audit is not None
        assert trainer.audit.maximum < 1e-4

    def test_is_passed_by_a_mixture_of_experts(self, tmp_path: Path, problems: Dataset) -> None:
        trainer = make_trainer(tmp_path, problems, model=mixture_of_experts())
        trainer.train()
        assert trainer.audit is not None
        assert trainer.audit.maximum < 1e-4

    def test_names_dropout_first(self, tmp_path: Path, problems: Dataset) -> None:
        model, _ = load_model()
        model.config.attention_dropout = 0.3
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        with pytest.raises(AuditError) as stopped:
            make_trainer(tmp_path, problems, model=model).train()
        assert "dropout: attention_dropout" in _first_cause(stopped.value)


# Against the made-up sampler, from which the policy is far before it moves.
KL_COV = {"objective": "kl_cov", "objective_kwargs": {"share": 0.2}, "anchor": "sampler"}
P3O = {"objective": "p3o", "anchor": "sampler"}
OF_THE_LOSS = ("objective", "objective_kwargs", "anchor", "aggregation")


class TestGradient:
    """The same 64 sequences, however they are split, padded and ordered (fp32, so equal to rounding)."""

    @pytest.fixture(scope="class")
    @staticmethod
    def whole(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
        return flat(
            gradient_of_one_update(
                tmp_path_factory.mktemp("whole"), per_device_train_batch_size=64, share_prompts=False
            )
        )

    @pytest.mark.parametrize(
        "settings",
        [
            pytest.param({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}, id="4 micro-batches"),
            pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 64}, id="64 micro-batches"),
            pytest.param(
                {"per_device_train_batch_size": 64, "pad_to_multiple_of": 32}, id="more padding on both sides"
            ),
            pytest.param(
                {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "seed": 7}, id="another order"
            ),
            pytest.param(
                {"per_device_train_batch_size": 64, "gradient_checkpointing": True}, id="gradient checkpointing"
            ),
        ],
    )
    def test_is_the_same(self, tmp_path: Path, whole: Tensor, settings: dict[str, Any]) -> None:
        split = flat(gradient_of_one_update(tmp_path, **settings))
        assert (split - whole).norm() <= 1e-6 * whole.norm()

    @pytest.mark.parametrize(
        "aggregation",
        [
            {"aggregation": "seq-mean-token-sum"},
            {"aggregation": "seq-mean-token-mean"},
            {"aggregation": "seq-mean-token-sum-norm", "horizon": 20},
            {"aggregation": "prompt-mean"},
        ],
        ids=lambda a: a["aggregation"],
    )
    def test_is_the_same_for_every_aggregation(self, tmp_path: Path, aggregation: dict[str, Any]) -> None:
        whole = flat(gradient_of_one_update(tmp_path, per_device_train_batch_size=64, **aggregation))
        split = flat(
            gradient_of_one_update(
                tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=16, **aggregation
            )
        )
        assert (split - whole).norm() <= 1e-6 * whole.norm()

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
    )
    @pytest.mark.parametrize(
        "settings",
        [
            pytest.param({}, id="dropped"),
            pytest.param({"tokens_per_micro_batch": 256}, id="dropped and split"),
            pytest.param({"tokens_per_micro_batch": 256, "drop_zero_advantage": False}, id="split"),
            pytest.param({"tokens_per_micro_batch": 256, "objective": "gspo"}, id="of a sequence-level objective"),
            # Told the whole update before its parts.
            pytest.param({"tokens_per_micro_batch": 256, **KL_COV}, id="of an update-level objective"),
            pytest.param(
                {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 16, **P3O},
                id="of an update-level objective under accumulation",
            ),
            pytest.param(
                {"tokens_per_micro_batch": 60, "aggregation": "seq-mean-token-mean"}, id="mean over sequences"
            ),
            pytest.param(
                {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}, id="under accumulation"
            ),
        ],
    )
    def test_is_the_same_without_what_has_none(
        self, tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype, tolerance: float
    ) -> None:
        shared = {name: settings[name] for name in OF_THE_LOSS if name in settings}
        plain = {"drop_zero_advantage": False, "share_prompts": False, "tokens_per_micro_batch": None, **shared}
        size = {"per_device_train_batch_size": 64, "max_steps": 2}
        whole = flat(gradient_of_one_update(tmp_path / "whole", dtype, **size, **plain))
        less = flat(gradient_of_one_update(tmp_path / "less", dtype, **{**size, **settings}))
        assert whole.norm() > 0
        assert (less - whole).norm() <= tolerance * whole.norm()

    def test_differs_between_objectives(self, tmp_path: Path, whole: Tensor) -> None:
        for name in ("ppo", "spo", "dppo_tv", "pg"):
            other = flat(gradient_of_one_update(tmp_path, per_device_train_batch_size=64, objective=name))
            assert (other - whole).norm() > 1e-3 * whole.norm(), name


class TestTraining:
    @pytest.mark.parametrize("objective", list(OBJECTIVES))
    def test_moves_the_policy_several_updates_from_the_sampler(
        self, tmp_path: Path, problems: Dataset, objective: str
    ) -> None:
        trainer = make_trainer(tmp_path, problems, objective=objective, updates_per_rollout=4, max_steps=4)
        trainer.train()
        first, *_, last = [row for row in trainer.state.log_history if "divergence/mean" in row]
        assert first["divergence/mean"] < 1e-5 < last["divergence/mean"]
        assert first["reward"] > 0

    def test_scores_tokens_once_an_update(
        self, tmp_path: Path, problems: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = make_trainer(tmp_path, problems, updates_per_rollout=4, max_steps=8)
        forward, scored = trainer.model.forward, []

        def counted(*args: Any, **kwargs: Any) -> Any:
            scored.append("scored" in kwargs)
            return forward(*args, **kwargs)

        monkeypatch.setattr(trainer.model, "forward", counted)
        trainer.train()
        assert sum(scored) == 8

    def test_leaves_out_groups_of_equal_rewards_from_the_second_update_on(
        self, tmp_path: Path, problems: Dataset
    ) -> None:
        """The first update's audit compares everything that was sampled."""
        trainer = make_trainer(
            tmp_path,
            problems,
            max_steps=4,
            rollout_func=made_up_rollout,
            reward_funcs=made_up_reward,
            audit_threshold=99.0,
        )
        trainer.train()
        first, *others = [row for row in trainer.state.log_history if "reward" in row]
        assert first["work/dropped_sequences"] == 0
        for row in others:
            assert row["work/dropped_sequences"] > 0
            assert row["work/saved_tokens"] > 0

    @pytest.mark.parametrize("objective", ["dro", "drpo_unweighted"])
    def test_leaves_nothing_out_where_the_objective_acts_without_advantage(
        self, tmp_path: Path, problems: Dataset, objective: str
    ) -> None:
        trainer = make_trainer(
            tmp_path, problems, objective=objective, reward_funcs=lambda completions, **_: [1.0] * len(completions)
        )
        trainer.train()
        assert all(row.get("work/dropped_sequences", 0) == 0 for row in trainer.state.log_history)

    def test_goes_on_where_no_group_has_an_advantage(self, tmp_path: Path, problems: Dataset) -> None:
        trainer = make_trainer(tmp_path, problems, reward_funcs=lambda completions, **_: [1.0] * len(completions))
        before = weights(trainer)
        trainer.train()
        assert trainer.state.log_history[1]["work/dropped_sequences"] == 1
        assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())

    def test_logs_nothing_that_does_not_apply(self, tmp_path: Path, problems: Dataset) -> None:
        trainer = make_trainer(tmp_path, problems, reward_funcs=lambda completions, **_: [1.0] * len(completions))
        trainer.train()
        assert not [name for name in trainer.state.log_history[0] if name.startswith("weight/")]

    def test_with_lora_updates_the_adapters_alone(self, tmp_path: Path, problems: Dataset) -> None:
        peft = pytest.importorskip("peft")
        trainer = make_trainer(
            tmp_path,
            problems,
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            gradient_checkpointing=True,
            learning_rate=1e-2,
            max_steps=4,
        )
        before = weights(trainer)
        trainer.train()
        moved = {name for name, after in weights(trainer).items() if not torch.equal(before[name], after)}
        assert moved
        assert all("lora_" in name for name in moved)
        assert trainer.audit is not None
        assert trainer.audit.maximum < 1e-4

    @pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
    def test_with_learned_prompts_updates_them_alone(self, tmp_path: Path, problems: Dataset, kind: str) -> None:
        peft = pytest.importorskip("peft")
        adapters = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
        settings = {"learning_rate": 1e-2, "max_steps": 4, "reward_funcs": alternating_reward}
        trainer = make_trainer(tmp_path, problems, peft_config=adapters, **settings)
        before = weights(trainer)
        trainer.train()
        moved = {name for name, after in weights(trainer).items() if not torch.equal(before[name], after)}
        assert moved
        assert all("prompt_encoder" in name for name in moved)

    @pytest.mark.parametrize("shuffle", [True, False])
    @pytest.mark.parametrize("checkpoint", [2, 6])
    def test_resumed_in_any_epoch_ends_with_the_same_weights(
        self, tmp_path: Path, problems: Dataset, checkpoint: int, shuffle: bool
    ) -> None:
        # A rollout takes 4 of the 8 prompts: an epoch is 4 updates.
        settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "shuffle_dataset": shuffle}
        few = problems.select(range(8))
        whole = make_trainer(tmp_path / "whole", few, **settings)
        whole.train()
        resumed = make_trainer(tmp_path / "resumed", few, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
        expected = weights(whole)
        assert all(torch.equal(expected[name], weight) for name, weight in weights(resumed).items())

    def test_takes_prompts_in_the_order_of_data_seed(self, tmp_path: Path, problems: Dataset) -> None:
        orders = [list(make_trainer(tmp_path, problems, **seeds)._get_train_sampler()) for seeds in SEEDS]
        assert orders[0] == orders[1] != orders[2]

    def test_weighs_a_group_s_baseline_by_length(self, tmp_path: Path, problems: Dataset) -> None:
        made_up = {"rollout_func": made_up_rollout, "reward_funcs": made_up_reward, "audit_threshold": 100.0}
        one = {"num_generations": 8, "updates_per_rollout": 1, "max_steps": 1, "per_device_train_batch_size": 32}
        trainer = make_trainer(tmp_path, problems, Watching, advantage="length-weighted", **one, **made_up)
        trainer.train()
        batch = trainer.updates[0]
        prompts = [tuple(row) for row in batch["prompt_ids"].tolist()]
        for prompt in set(prompts):
            group = torch.tensor([other == prompt for other in prompts])
            rewards, lengths = batch["rewards"][group], batch["completion_mask"][group].sum(dim=1)
            expected = rewards - (rewards * lengths).sum() / lengths.sum()
            torch.testing.assert_close(batch["advantages"][group], expected, atol=1e-6, rtol=1e-6)

    def test_counts_no_token_after_a_stop_of_generation_kwargs(self, tmp_path: Path, problems: Dataset) -> None:
        _, tokenizer = load_model()
        stop = tokenizer("1")["input_ids"][-1]
        trainer = make_trainer(
            tmp_path, problems, Watching, drop_zero_advantage=False, generation_kwargs={"eos_token_id": stop}
        )
        trainer.train()
        rows = trainer.updates[0]
        counted = [ids[mask.bool()] for ids, mask in zip(rows["completion_ids"], rows["completion_mask"], strict=True)]
        assert any(ids[-1] == stop for ids in counted)
        assert not any((ids[:-1] == stop).any() for ids in counted)

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("budget", [64, None])
    def test_weighs_the_load_balancing_loss_by_the_share_of_a_micro_batch(
        self, tmp_path: Path, problems: Dataset, budget: int | None, fused: bool
    ) -> None:
        trainer = make_trainer(
            tmp_path,
            problems,
            model=mixture_of_experts(),
            rollout_func=made_up_rollout,
            reward_funcs=lambda completions, **_: [1.0] * len(completions),
            audit_threshold=100.0,
            tokens_per_micro_batch=budget,
            fused_loss=fused,
        )
        trainer.train()
        assert isinstance(trainer._scorer, FusedScorer) == fused
        # Without advantages it is all of the loss; top-2 routing in balance makes it 2.
        for row in trainer.state.log_history[:2]:
            assert row["loss"] == pytest.approx(2.0, abs=0.2)
            assert row["aux_loss"] == pytest.approx(row["loss"], rel=1e-5)

    def test_of_experts_has_the_same_losses_with_the_fused_loss_and_with_trl_s_head(
        self, tmp_path: Path, problems: Dataset
    ) -> None:
        histories = []
        for fused in (True, False):
            trainer = make_trainer(
                tmp_path,
                problems,
                model=mixture_of_experts(),
                rollout_func=made_up_rollout,
                reward_funcs=made_up_reward,
                audit_threshold=100.0,
                fused_loss=fused,
            )
            trainer.train()
            histories.append(trainer.state.log_history[:2])
        for fused, plain in zip(*histories, strict=True):
            for name in ("loss", "aux_loss", "grad_norm"):
                assert fused[name] == pytest.approx(plain[name], rel=1e-4), name


def mixture_of_experts() -> Qwen3MoeForCausalLM:
    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0}
    experts["output_router_logits"] = True
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**small, **layers, **experts, **tokens))


OVERRIDDEN = {
    "__init__", "_calculate_rewards", "_compute_loss", "_determine_best_metric", "_finalize_training",
    "_generate_and_score_completions", "create_model_card",
    "_generate_single_turn", "_get_grad_norm", "_get_output_dir", "_get_per_token_logps_and_entropies", "_get_train_sampler",
    "_load_optimizer_and_scheduler", "_load_rng_state", "_load_scaler", "_log_metric", "_maybe_log_save_evaluate",
    "_prepare_inputs", "_push_from_checkpoint", "_run_epoch", "_save", "_save_checkpoint", "_save_optimizer_and_scheduler",
    "_save_rng_state", "_save_scaler", "_send_telemetry", "log", "train",
}  # fmt: skip
"""Methods of TRL's and Transformers' trainers that this library's has in their place."""

SEEDS = ({"seed": 1, "data_seed": 3}, {"seed": 2, "data_seed": 3}, {"seed": 1, "data_seed": 4})


class TestTRL:
    """What the trainer leans on: when TRL changes it, these fail before a run goes wrong."""

    @pytest.mark.parametrize(
        ("method", "parameters"),
        [
            (
                "_generate_single_turn",
                ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
            ),
            ("_calculate_rewards", ["inputs", "prompts", "completions", "completion_ids_list"]),
            ("_generate_and_score_completions", ["inputs"]),
            ("_prepare_inputs", ["generation_batch"]),
            ("_compute_loss", ["model", "inputs"]),
            ("log", ["logs", "start_time"]),
            ("_save_optimizer_and_scheduler", ["output_dir"]),
            ("_load_optimizer_and_scheduler", ["checkpoint"]),
        ],
    )
    def test_methods_keep_their_parameters(self, method: str, parameters: list[str]) -> None:
        assert list(inspect.signature(getattr(GRPOTrainer, method)).parameters)[1:] == parameters

    def test_every_method_that_is_overridden_is_there(self) -> None:
        kinds = (DRPOTrainer, CheckpointedTrainer)
        own = {name: method for kind in kinds for name, method in vars(kind).items() if inspect.isfunction(method)}
        assert {name for name in own if hasattr(GRPOTrainer, name)} == OVERRIDDEN
        for name in OVERRIDDEN - {"__init__"}:
            ours, theirs = (
                inspect.signature(method).parameters.values() for method in (own[name], getattr(GRPOTrainer, name))
            )
            named = [parameter.name for parameter in ours if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
            assert [parameter.name for parameter in theirs][: len(named)] == named, name

    def test_head_takes_labels_and_returns_log_probs(self, tmp_path: Path, problems: Dataset) -> None:
        source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
        assert "model(**model_inputs, labels=labels, fused_lm_head=True)" in source
        assert "outputs.log_probs[:, -logits_to_keep:]" in source
        assert "outputs.entropy[:, -logits_to_keep:]" in source

    @pytest.mark.parametrize("named", ["folder", "hub"])
    def test_the_model_card_names_the_model(self, tmp_path: Path, problems: Dataset, named: str) -> None:
        model, tokenizer = load_model()
        (tmp_path / "my-model").mkdir()
        model.config._name_or_path = str(tmp_path / "my-model") if named == "folder" else "someone/my-model"
        trainer = DRPOTrainer(
            model=model,
            reward_funcs=exact_answer,
            args=config(tmp_path / "out"),
            train_dataset=problems,
            processing_class=tokenizer,
        )
        trainer.create_model_card(model_name="out")
        card = (tmp_path / "out" / "README.md").read_text()
        name = "`my-model`" if named == "folder" else "[someone/my-model](https://huggingface.co/someone/my-model)"
        assert f"fine-tuned version of {name}" in card
        assert "None" not in card.partition("## Training procedure")[0]

    def test_options_that_are_refused_exist(self) -> None:
        assert set(REFUSED) <= set(GRPOConfig.__dataclass_fields__)

    def test_attributes_and_inputs_are_there(self, tmp_path: Path, problems: Dataset) -> None:
        seen: dict[str, Any] = {}

        class Looking(DRPOTrainer):
            def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
                seen.update(inputs, micro_batches=len(self._buffered_inputs), step=self._step)
                return super()._compute_loss(model, inputs)

        model, tokenizer = load_model()
        args = config(tmp_path, per_device_train_batch_size=8, num_generations=4, updates_per_rollout=2, max_steps=2)
        trainer = Looking(
            model=model, reward_funcs=exact_answer, args=args, train_dataset=problems, processing_class=tokenizer
        )
        trainer.train()
        assert (seen["micro_batches"], seen["step"]) == (2, 1)
        tensors = (
            "prompt_ids",
            "prompt_mask",
            "completion_ids",
            "completion_mask",
            "advantages",
            "sampling_per_token_logps",
        )
        assert all(isinstance(seen[name], Tensor) for name in tensors)
        assert seen["sampling_per_token_logps"].dtype == torch.float32
        for name in (
            "aux_loss_enabled",
            "router_aux_loss_coef",
            "reward_weights",
            "current_gradient_accumulation_steps",
            "_is_vlm",
            "_logs",
            "_metrics",
            "rollout_func",
            "use_vllm",
        ):
            assert hasattr(trainer, name), name


def _first_cause(error: AuditError) -> str:
    return str(error).split("\n  1. ")[1].split("\n")[0]
