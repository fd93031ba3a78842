"""The fused loss in place of a model's LM head, and where it is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from drpo.trainer.fused_head import why_not_fused
from drpo.trainer.scoring import FusedScorer
from support.rollouts import flat, load_model, make_trainer


@pytest.mark.parametrize("objective", ["drpo", "drpo_topk", "gspo", "ppo"])
def test_scores_and_gradient_are_those_of_the_plain_path(tmp_path: Path, problems: Dataset, objective: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 12, (4, 9))
    inputs = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(4, 4, dtype=torch.long),
        "completion_ids": ids[:, 4:],
        "completion_mask": torch.ones(4, 5, dtype=torch.long),
        "advantages": torch.tensor([0.5, -1.0, 0.0, 2.0]),
        "sampling_per_token_logps": -3 * torch.rand(4, 5),
        "old_per_token_logps": -3 * torch.rand(4, 5),
        "top_k_ids": torch.randint(3, 12, (4, 5, 2)),
        "top_k_per_token_logps": -3 - torch.rand(4, 5, 2),
    }
    inputs["prompt_mask"][1, :2] = 0
    inputs["completion_mask"][2, 3:] = 0
    counted = inputs["completion_mask"].bool()
    results = []
    for fused in (True, False):
        trainer = make_trainer(tmp_path, problems, objective=objective, temperature=0.8, fused_loss=fused)
        trainer._micro_batches.begin_update([inputs])
        scored = trainer._scorer(trainer.model, inputs, counted / 17, trainer._micro_batches.longest)
        scored.loss.backward()
        tokens = (scored.sampled.logp, scored.gradient_weight, scored.entropy)
        tokens = [t.squeeze(0) if fused else t[counted] for t in tokens]
        gradient = flat({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
        results.append([scored.loss.detach(), *tokens, gradient])
    for fused, plain in zip(*results, strict=True):
        assert (fused - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 is TRL's"),
        ({"head": torch.nn.Sequential()}, "its LM head is a Sequential, not a plain Linear"),
    ],
)
def test_is_left_out_in_one_line_where_the_model_does_not_allow_it(
    tmp_path: Path,
    problems: Dataset,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    reason: str,
) -> None:
    model, _ = load_model()
    if (head := change.pop("head", None)) is not None:
        head.append(model.lm_head)
        head.weight = model.lm_head.weight
        model.get_output_embeddings = lambda: head
    trainer = make_trainer(tmp_path, problems, model=model, **change)
    assert f"No fused loss for this model: {reason}" in caplog.text
    assert "scored" not in str(trainer.model.forward)


def test_reads_what_a_model_does_to_its_logits(tmp_path: Path, problems: Dataset) -> None:
    """A model with a scale, a cap or a bias: the audit of what it sampled is passed."""
    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
    for model in (
        CohereForCausalLM(CohereConfig(**small, logit_scale=0.3, bos_token_id=2)),
        GraniteForCausalLM(GraniteConfig(**small, logits_scaling=3.0)),
        Gemma2ForCausalLM(Gemma2Config(**small, head_dim=16, final_logit_softcapping=0.5, attn_implementation="eager")),
        PhiForCausalLM(PhiConfig(**small | {"num_key_value_heads": 2}, resid_pdrop=0.0)),
    ):
        torch.nn.init.normal_(model.lm_head.weight)
        if model.lm_head.bias is not None:
            torch.nn.init.normal_(model.lm_head.bias)
        trainer = make_trainer(tmp_path, problems, model=model)
        trainer.train()
        assert isinstance(trainer._scorer, FusedScorer)
        assert trainer.audit is not None
        assert trainer.audit.maximum < 1e-4, type(model)


@pytest.mark.parametrize("architecture", ["HyperCLOVAX", "ModernBertDecoder", "RecurrentGemma"])
def test_is_left_out_where_logits_are_not_what_the_config_says(architecture: str) -> None:
    """Of another factor, of a layer between body and head, of a soft-cap under another name."""
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **({"logits_scaling": 3.0} if architecture == "HyperCLOVAX" else {}),
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).train()
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    reason = why_not_fused(model)
    assert reason is not None
    assert "times their largest away from those of its body and LM head" in reason
    assert model.training
