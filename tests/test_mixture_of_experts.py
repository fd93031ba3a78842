"""A mixture of experts: its load-balancing loss counts once, however a batch is split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from support.rollouts import load_model, make_trainer


@pytest.fixture
def model() -> Qwen3MoeForCausalLM:
    """Two layers of four experts, with the vocabulary of the built-in model."""
    torch.manual_seed(0)
    _, tokenizer = load_model()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def test_the_load_balancing_loss_is_weighed_by_share(
    tmp_path: Path, problems: Dataset, model: Qwen3MoeForCausalLM
) -> None:
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    logged = []
    for budget in (None, 100):
        model.load_state_dict(weights)
        trainer = make_trainer(
            tmp_path / str(budget),
            problems,
            model=model,
            tokens_per_micro_batch=budget,
            # Of 8 equal rewards no sequence has an advantage, and only the load-balancing loss is left.
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            router_aux_loss_coef=1.0,
        )
        trainer.train()
        logged.append([row for row in trainer.state.log_history if "aux_loss" in row])
    for whole, split in zip(*logged, strict=True):
        assert whole["loss"] == pytest.approx(whole["aux_loss"], rel=1e-4)
        # It is a mean over the tokens that go together, not linear in them; eight micro-batches counted eight times it.
        assert split["loss"] == pytest.approx(whole["loss"], rel=0.1)
        assert split["aux_loss"] == pytest.approx(whole["aux_loss"], rel=0.1)
        assert split["work/dropped_sequences"] == 0
