"""The whole algorithm on one page: sample, reward, advantage, loss, step. No trainer.

    python examples/loop.py        # the built-in model on the built-in task, about a minute on two CPU cores

`DRPOTrainer` does the same with checkpoints, an audit of the sampler, metrics, several processes and less memory.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo import TokenBatch, aggregate, group_advantage, make_objective
from drpo.data.arithmetic import MODEL_PATH
from drpo.data.problems import builtin_problems
from drpo.rewards import exact_answer

PROMPTS, COMPLETIONS, UPDATES = 16, 8, 4
"""A rollout is 16 prompts × 8 completions = 128 samples, split into 4 updates of 32."""


def log_probs(model, tokens: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
    """log π of the last `completion_length` tokens of each row, [B, T]."""
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # as generation counts them: without the left padding
    logits = model(tokens, attention_mask=attention_mask, position_ids=positions).logits[:, -completion_length - 1 : -1]
    return logits.log_softmax(dim=2).gather(2, tokens[:, -completion_length:].unsqueeze(2)).squeeze(2)


def mask_of(completions: Tensor, eos: int) -> Tensor:
    """True up to and including the first end-of-sequence token of each row, [B, T]."""
    is_end = completions == eos
    return is_end.cumsum(dim=1) - is_end.int() == 0


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sampled tokens after their prompts [B, L], the attention mask [B, L], and of the completions log μ and mask [B, T]."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        **encoded, max_new_tokens=20, do_sample=True, top_k=0, output_logits=True, return_dict_in_generate=True
    )
    completions = output.sequences[:, encoded["input_ids"].shape[1] :]
    mask = mask_of(completions, tokenizer.eos_token_id)
    logits = torch.stack(output.logits, dim=1)
    behavior_logp = logits.log_softmax(dim=2).gather(2, completions.unsqueeze(2)).squeeze(2)
    return output.sequences, torch.cat([encoded["attention_mask"], mask], dim=1), behavior_logp, mask


def accuracy(model, tokenizer, problems) -> float:
    tokens, _, _, mask = sample(model, tokenizer, [problem.prompt for problem in problems])
    texts = tokenizer.batch_decode(tokens[:, -mask.shape[1] :], skip_special_tokens=True)
    return sum(exact_answer(texts, answer=[problem.answer for problem in problems])) / len(problems)


def main(rollouts: int = 60, seed: int = 0) -> tuple[float, float]:
    """Train, and return held-out accuracy before and after."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL_PATH, dtype=torch.float32
    ).eval()  # no dropout: π must be μ at first
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    objective = make_objective("drpo", delta=0.2)
    train, heldout = builtin_problems("train", 5_000, seed), builtin_problems("heldout", 250, 0)
    before = accuracy(model, tokenizer, heldout)

    for rollout in range(1, rollouts + 1):
        group = [problem for problem in rng.sample(train, PROMPTS) for _ in range(COMPLETIONS)]
        tokens, attention_mask, behavior_logp, mask = sample(model, tokenizer, [problem.prompt for problem in group])
        texts = tokenizer.batch_decode(tokens[:, -mask.shape[1] :], skip_special_tokens=True)
        rewards = torch.tensor(exact_answer(texts, answer=[problem.answer for problem in group]))
        advantage = group_advantage(rewards, COMPLETIONS)

        for rows in torch.randperm(len(group)).chunk(UPDATES):
            logp = log_probs(model, tokens[rows], attention_mask[rows], mask.shape[1])
            batch = TokenBatch(logp=logp, behavior_logp=behavior_logp[rows], advantage=advantage[rows], mask=mask[rows])
            loss = aggregate(objective.loss(batch), batch.mask, mode="token-mean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        divergence = (batch.shift.detach().abs() * batch.mask).sum() / batch.mask.sum()
        print(f"rollout {rollout:3}  reward {rewards.mean():.3f}  mean |π − μ| {divergence:.4f}", flush=True)

    after = accuracy(model, tokenizer, heldout)
    print(f"held-out accuracy {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="DRPO without a trainer.")
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
