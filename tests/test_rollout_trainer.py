"""The half of DRPOTrainer that samples: the log-probs of what was drawn, recorded or returned by a rollout function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig, Qwen3Config

from drpo import DRPOTrainer
from drpo.rollout.decoding import record_log_probs
from support.rollouts import (
    completion_lengths,
    load_model,
    made_up_reward,
    made_up_rollout,
    make_trainer,
    transformers_scores,
    weights,
)


class TestBehaviorLogProbs:
    def test_are_those_of_the_distribution_sampled_from(self) -> None:
        model, tokenizer = load_model()
        inputs = tokenizer(["1+2=", "10+34-6+29-38="], return_tensors="pt", padding=True)
        filters = {"temperature": 0.7, "top_k": 5}
        with record_log_probs(model) as recorder:
            sequences = model.generate(**inputs, **filters, do_sample=True, max_new_tokens=8)
        scores, _ = transformers_scores(model, inputs, sequences, **filters)
        drawn = sequences[:, inputs["input_ids"].shape[1] :]
        expected = scores.log_softmax(dim=2).gather(2, drawn.unsqueeze(2)).squeeze(2)
        lengths = completion_lengths(inputs, sequences)
        assert min(lengths) < max(lengths)
        for row, (length, recorded) in enumerate(zip(lengths, recorder.log_probs(lengths), strict=True)):
            assert recorded == pytest.approx(expected[row, :length].tolist(), abs=1e-5)

    @pytest.mark.parametrize("kind", ["full attention", "sliding window", "recurrent"])
    def test_are_the_same_where_equal_prompts_go_through_the_model_once(self, kind: str) -> None:
        _, tokenizer = load_model()
        torch.manual_seed(0)
        small = {
            "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
        }  # fmt: skip
        if kind == "recurrent":
            linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 1}
            types = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
            config = Qwen3_5TextConfig(**small, **linear, **types)
        else:
            window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
            config = Qwen3Config(**small, **(window if kind == "sliding window" else {}))
        model = AutoModelForCausalLM.from_config(config).double().eval()
        prompts = ["1+2=", "10+34-6+29-38=", "1+2=", "7=", "10+34-6+29-38="]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        widths: list[int] = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        with record_log_probs(model) as recorder:
            sequences = model.generate(**inputs, do_sample=True, max_new_tokens=6)
        hook.remove()
        scores = transformers_scores(model, inputs, sequences)[0].double().log_softmax(dim=2)
        drawn = sequences[:, inputs["input_ids"].shape[1] :].unsqueeze(2)
        recorded = torch.tensor(recorder.log_probs([drawn.shape[1]] * 5))
        torch.testing.assert_close(recorded.double(), scores.gather(2, drawn).squeeze(2), rtol=0, atol=1e-6)
        # Three prompts but for their last token, then the last of all five.
        assert widths[:2] == ([5 * 14, 5] if kind == "recurrent" else [3 * 13, 5])

    def test_come_with_those_of_the_likeliest_tokens_if_asked_for(self) -> None:
        model, tokenizer = load_model()
        inputs = tokenizer(["1+2=", "10+34-6+29-38="], return_tensors="pt", padding=True)
        torch.manual_seed(0)
        with record_log_probs(model, top_k=3) as recorder:
            sequences = model.generate(**inputs, do_sample=True, max_new_tokens=8)
        expected = transformers_scores(model, inputs, sequences)[0].log_softmax(dim=2).topk(3, dim=2)
        steps = expected.values.shape[1]
        likeliest = recorder.likeliest(steps + 2)
        assert likeliest is not None
        ids, log_probs = likeliest
        for row, length in enumerate(completion_lengths(inputs, sequences)):
            assert torch.equal(ids[row, :length], expected.indices[row, :length])
            torch.testing.assert_close(log_probs[row, :length], expected.values[row, :length])
        assert ids.shape == log_probs.shape == (2, steps + 2, 3)
        assert (log_probs[:, steps:] == 0).all()

    def test_leave_the_model_as_it_was(self) -> None:
        model, _ = load_model()
        with record_log_probs(model):
            assert "generate" in vars(model)
        assert "generate" not in vars(model)

    def test_without_them_the_trainer_stops(self, tmp_path: Path, problems: Dataset) -> None:
        def without(prompts: list[str], trainer: DRPOTrainer) -> dict[str, Any]:
            return {**made_up_rollout(prompts, trainer), "logprobs": None}

        trainer = make_trainer(tmp_path, problems, rollout_func=without, reward_funcs=made_up_reward)
        with pytest.raises(ValueError, match="no log-probs, so there is no behaviour policy"):
            trainer.train()

    def test_that_are_nan_stop_the_trainer_before_any_update(self, tmp_path: Path, problems: Dataset) -> None:
        def with_nan(prompts: list[str], trainer: DRPOTrainer) -> dict[str, Any]:
            made_up = made_up_rollout(prompts, trainer)
            made_up["logprobs"][0][0] = float("nan")
            return made_up

        trainer = make_trainer(
            tmp_path, problems, rollout_func=with_nan, reward_funcs=made_up_reward, audit_threshold=100.0
        )
        before = weights(trainer)
        with pytest.raises(ValueError, match="the sampler's log-prob of token 0 of completion 0 is nan"):
            trainer.train()
        assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())

    @pytest.mark.parametrize(
        ("field", "value", "expected"),
        [
            (
                "logprobs",
                lambda rows: [rows[0][:-1], *rows[1:]],
                r"logprobs\[0\] has \d+ values and completion_ids\[0\]",
            ),
            ("logprobs", lambda rows: [*rows[:-1], [*rows[-1], 0.0]], r"logprobs\[15\] has \d+ values"),
            ("logprobs", lambda rows: rows[1:], "as logprobs; expected a list for each of the 16 prompts"),
            ("logprobs", lambda rows: -1.0, "returned -1.0 as logprobs; expected a list for each"),
            ("logprobs", lambda rows: [[[p] for p in row] for row in rows], r"logprobs\[0\] is \[\[.*\]; expected one"),
            ("completion_ids", lambda rows: [[], *rows[1:]], r"completion_ids\[0\] is \[\]; expected token ids"),
            ("completion_ids", lambda rows: [[-1], *rows[1:]], r"completion_ids\[0\] is \[-1\]; expected token ids"),
            ("prompt_ids", lambda rows: [["a"], *rows[1:]], r"prompt_ids\[0\] is \['a'\]; expected token ids"),
            ("env_mask", lambda _: [[1, 0] * 30] * 16, r"env_mask\[0\] has 60 values and completion"),
        ],
    )
    def test_of_a_rollout_function_are_one_a_token(
        self, tmp_path: Path, problems: Dataset, field: str, value: Any, expected: str
    ) -> None:
        def wrong(prompts: list[str], trainer: DRPOTrainer) -> dict[str, Any]:
            made_up = made_up_rollout(prompts, trainer)
            return {**made_up, field: value(made_up.get(field))}

        given = {"reward_funcs": made_up_reward, "audit_threshold": 100.0}
        with pytest.raises(ValueError, match=expected):
            make_trainer(tmp_path, problems, rollout_func=wrong, **given).train()

    def test_of_a_rollout_function_count_or_do_not(self, tmp_path: Path, problems: Dataset) -> None:
        def half(prompts: list[str], trainer: DRPOTrainer) -> dict[str, Any]:
            made_up = made_up_rollout(prompts, trainer)
            return {**made_up, "env_mask": [[0.5] * len(ids) for ids in made_up["completion_ids"]]}

        trainer = make_trainer(tmp_path, problems, rollout_func=half, reward_funcs=made_up_reward)
        with pytest.raises(ValueError, match=r"env_mask\[0\] is \[0\.5.*\]; expected 0 or 1 for each token"):
            trainer.train()
