"""What a rollout costs to generate with SmolLM2-135M: this library's loop against Transformers' own, by how lengths differ.

The folder of the model is what SMOLLM2 names (``python scripts/smollm2.py FOLDER`` makes one). 8 questions, 4 completions
each, up to 48 tokens: ``flat``, none ends before; ``sampled``, each ends where the model ends it; ``one long``, all but one
end after 8 tokens. ``prompts shared`` is Transformers' loop after equal prompts went through the model once, as this
library had it before; ``Transformers`` is ``generate`` as TRL calls it; both have ``sdpa`` for attention, and this
library its own. All record the log-prob of each token.
"""

from __future__ import annotations

import os
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from benchmarks import measure, tables
from drpo.kernels.attention import use_cpu_sdpa
from drpo.rollout import decoding
from drpo.rollout.decoding import draw_tokens, record_log_probs, share_prompts

PACKAGES = ("torch", "transformers")
ROUNDS = 5
QUESTIONS, COMPLETIONS, TOKENS, SHORT = 8, 4, 48, 8
LENGTHS = ("flat", "sampled", "one long")


class EndAfter(LogitsProcessor):
    """Ends a row after ``SHORT`` tokens, but for the one whose first prompt token is ``long``."""

    def __init__(self, width: int, long: int, end: int) -> None:
        self._width, self._long, self._end = width, long, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        step = input_ids.shape[1] - self._width
        scores[:, self._end] = -torch.inf
        if step == SHORT - 1:
            scores[input_ids[:, 0] != self._long, self._end] = 1e9
        return scores


class Recorder(LogitsProcessor):
    """Records log-probs in Transformers' own loop, as a processor and a stopping criterion."""

    def __init__(self) -> None:
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self._scores = scores
        return scores

    def see(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        drawn = self._scores.gather(1, input_ids[:, -1:]).squeeze(1)
        self.log_probs.append(drawn - self._scores.logsumexp(dim=1))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def transformers_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    shares: bool,
    **model_kwargs: Any,
) -> Any:
    """Transformers' own sampling loop, with log-probs recorded."""
    if shares:
        share_prompts(model, input_ids, generation_config, model_kwargs)
    recorder = Recorder()
    processors = LogitsProcessorList([*logits_processor, recorder])
    criteria = StoppingCriteriaList([*stopping_criteria, recorder.see])
    return model._sample(input_ids, processors, criteria, generation_config, **model_kwargs)


def run(command: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    provenance = tables.provenance(command, PACKAGES)
    folder = os.environ["SMOLLM2"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    questions = [
        [{"role": "user", "content": f"What is {3 + index} plus {25 - index}? Answer briefly."}]
        for index in range(QUESTIONS)
    ]
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in questions]
    inputs = tokenizer([text for text in texts for _ in range(COMPLETIONS)], return_tensors="pt", padding=True)
    # It looks at each row by itself.
    decoding._ROW_BY_ROW = (*decoding._ROW_BY_ROW, EndAfter)
    rows = []
    for lengths in LENGTHS:
        ids = inputs["input_ids"].clone()
        end = tokenizer.eos_token_id
        settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": TOKENS, "pad_token_id": end}
        settings |= {"eos_token_id": None if lengths == "flat" else end}
        if lengths == "one long":
            ids[0, 0] = tokenizer.convert_tokens_to_ids("Once")
            settings["logits_processor"] = LogitsProcessorList([EndAfter(ids.shape[1], ids[0, 0].item(), end)])
        masked = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}

        def ours(masked: Any = masked, settings: Any = settings) -> Tensor:
            use_cpu_sdpa(model)
            with record_log_probs(model):
                return model.generate(**masked, **settings)

        def theirs(shares: bool, masked: Any = masked, settings: Any = settings) -> Tensor:
            model.config._attn_implementation = "sdpa"
            return model.generate(**masked, **settings, custom_generate=partial(transformers_loop, shares=shares))

        torch.manual_seed(0)
        work = {"drpo": ours, "prompts shared": partial(theirs, True), "Transformers": partial(theirs, False)}
        times = measure.seconds(work, rounds)
        torch.manual_seed(0)
        ended = (ours()[:, ids.shape[1] :] != end).sum(dim=1)
        rows += [
            {
                "model": "SmolLM2-135M",
                "lengths": lengths,
                "mean_tokens": f"{ended.float().mean().item():.1f}",
                "what": name,
                "median_seconds": f"{statistics.median(spent):.2f}",
                "times_of_drpo": f"{measure.ratio(spent, times['drpo']):.2f}",
                "rounds": rounds,
            }
            for name, spent in times.items()
        ]
    scores = torch.randn(128, model.config.vocab_size)
    uniforms = torch.rand(128, dtype=torch.float64)
    work = {
        "drpo": lambda: draw_tokens(scores, uniforms),
        "Transformers": lambda: (torch.multinomial(scores.softmax(dim=1), 1), scores.logsumexp(dim=1)),
    }
    times = measure.seconds(work, rounds)
    rows += [
        {
            "model": "128 rows of scores",
            "lengths": "one draw",
            "mean_tokens": "1",
            "what": name,
            "median_seconds": f"{statistics.median(spent):.4f}",
            "times_of_drpo": f"{measure.ratio(spent, times['drpo']):.2f}",
            "rounds": rounds,
        }
        for name, spent in times.items()
    ]
    return [row | provenance for row in rows]
