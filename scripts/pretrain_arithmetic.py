"""Make the built-in model: pretrain a small Qwen3 on arithmetic solutions some of whose steps are wrong.

The first part of training uses correct solutions, so the model learns to add; the rest uses
solutions in which a share of the steps is wrong, so that sampling from it is unreliable while
the knowledge stays. Reinforcement learning then only has to sharpen.

    python scripts/pretrain_arithmetic.py --output src/drpo/data/arithmetic_model
"""

from __future__ import annotations

import argparse
import math
import random
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from drpo.data.arithmetic import noisy_totals, sample_prompt, sample_prompts
from drpo.data.split import split_of

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: printable ASCII and newline; anything else is <unk>."""
    characters = [PAD, EOS, UNK, "\n", *(c for c in string.printable if c.isprintable())]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def make_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int, error_rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [B, T] for ``size`` training problems; only the solution is a target."""
    vocabulary = tokenizer.get_vocab()
    rows, prompts = [], []
    while len(rows) < size:
        prompt, totals = sample_prompt(rng)
        if split_of(prompt) != "train":
            continue
        text = prompt + ",".join(map(str, noisy_totals(totals, rng, error_rate)))
        rows.append([vocabulary[c] for c in text] + [tokenizer.eos_token_id])
        prompts.append(len(prompt))
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[:prompt] = -100
    return ids, labels


@torch.no_grad()
def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: int, size: int = 200
) -> tuple[float, float, float]:
    """avg@samples and pass@samples when sampling at temperature 1, and greedy accuracy, on held-out problems."""
    totals_of = sample_prompts("heldout", size, seed=0)
    inputs = tokenizer(list(totals_of), return_tensors="pt", padding=True)
    sampled = model.generate(**inputs, max_new_tokens=20, do_sample=True, top_k=0, num_return_sequences=samples)
    greedy = model.generate(**inputs, max_new_tokens=20, do_sample=False)

    def correct(ids: torch.Tensor, repeats: int) -> torch.Tensor:
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [str(totals[-1]) for totals in totals_of.values() for _ in range(repeats)]
        hits = [float(t.rsplit(",", 1)[-1] == a) for t, a in zip(texts, answers, strict=True)]
        return torch.tensor(hits).view(len(totals_of), repeats)

    hits = correct(sampled, samples)
    return hits.mean().item(), hits.amax(1).mean().item(), correct(greedy, 1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--noisy-share", type=float, default=0.3, help="share of the steps trained on noisy solutions")
    parser.add_argument("--error-rate", type=float, default=0.25, help="share of wrong steps in a noisy solution")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.1, betas=(0.9, 0.95))

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / options.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    clean_steps = round(options.steps * (1 - options.noisy_share))
    bar = tqdm(range(options.steps))
    for step in bar:
        error_rate = 0.0 if step < clean_steps else options.error_rate
        ids, labels = make_batch(tokenizer, rng, options.batch_size, error_rate)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % 250 == 0:
            model.eval()
            sampled, _, greedy = measure(model, tokenizer, samples=1)
            model.train()
            tqdm.write(f"step {step + 1}: loss {loss.item():.4f}, sampled {sampled:.3f}, greedy {greedy:.3f}")

    model.eval()
    average, passed, greedy = measure(model, tokenizer, samples=16, size=500)
    print(f"held-out: avg@16 {average:.3f}, pass@16 {passed:.3f}, greedy {greedy:.3f}")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
