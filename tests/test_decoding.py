"""Drawing tokens and decoding rows: each completion depends on its prompt's distribution and its own random numbers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList

from drpo.rollout import decoding
from drpo.rollout.decoding import BLOCK, draw_tokens, record_log_probs
from support.rollouts import completion_lengths, load_model

PROMPTS = [f"{first}+{second}-{third}=" for first, second, third in ((1, 2, 1), (10, 34, 6), (5, 5, 5))] * 8


class TestDrawing:
    @given(st.integers(1, 4 * BLOCK + 1), st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32]))
    def test_finds_where_the_distribution_function_passes_the_uniform_number(
        self, size: int, seed: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        scores = 8 * torch.randn(5, size, generator=generator)
        scores[:, 1:][torch.rand(5, size - 1, generator=generator) < 0.3] = -torch.inf
        uniforms = torch.rand(5, generator=generator, dtype=dtype)
        tokens, log_total = draw_tokens(scores, uniforms)
        cumulated = scores.double().softmax(dim=1).cumsum(dim=1)
        after = cumulated.gather(1, tokens[:, None]).squeeze(1)
        probs = scores.double().softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
        assert (probs > 0).all()
        assert (after - probs <= uniforms + 1e-6).all()
        assert (uniforms <= after + 1e-6).all()
        torch.testing.assert_close(log_total.double(), scores.double().logsumexp(dim=1), rtol=0, atol=1e-5)

    def test_is_from_the_softmax_of_the_scores(self) -> None:
        scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -4.0]])
        expected = scores.double().softmax(dim=1)[0]
        uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        frequency = torch.bincount(draw_tokens(scores.expand(20_000, 5), uniforms)[0], minlength=5) / 20_000
        # Five standard deviations of a binomial share.
        assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()

    def test_gives_a_token_its_probability_however_small(self) -> None:
        # Of 1,000 tokens after a sure one, each has a billionth: one cumulated sum in fp32 would pass them all at once.
        scores = torch.zeros(1, 1001)
        scores[0, 1:] = torch.tensor(1e-9).log()
        edge = 1 / (1 + 1e-6)
        among = edge + (1 - edge) * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        tokens, _ = draw_tokens(scores.expand(1000, -1), among)
        assert tokens.tolist() == list(range(1, 1001))

    @pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
    def test_never_takes_what_cannot_be_drawn(self, uniform: float) -> None:
        scores = torch.full((1, 3 * BLOCK), -torch.inf)
        scores[0, [BLOCK + 3, BLOCK + 7]] = 0.0
        token, _ = draw_tokens(scores, torch.tensor([uniform], dtype=torch.float64))
        assert token.item() == (BLOCK + 3 if uniform == 0 else BLOCK + 7)

    def test_tells_of_a_row_without_probabilities_by_a_log_that_is_nan(self) -> None:
        scores = torch.tensor([[0.0, torch.nan], [torch.inf, 0.0], [0.0, 0.0]])
        tokens, log_total = draw_tokens(scores, torch.full((3,), 0.6, dtype=torch.float64))
        assert log_total.isnan().tolist() == [True, True, False]
        assert ((tokens >= 0) & (tokens < 2)).all()


class TestDecoding:
    def test_rows_that_have_ended_leave_and_the_others_go_on_as_they_would_have(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, tokenizer = load_model(torch.float64)
        inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        rows: list[int] = []
        model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
        drawn: dict[bool, Any] = {}
        for leave in (False, True):
            monkeypatch.setattr(decoding, "LEAVE_AT", 1 / 8 if leave else 2.0)
            torch.manual_seed(0)
            rows.clear()
            with record_log_probs(model, top_k=3, support=True) as recorder:
                sequences = model.generate(**inputs, do_sample=True, max_new_tokens=20, top_k=10)
            lengths = completion_lengths(inputs, sequences)
            drawn[leave] = sequences, recorder.log_probs(lengths), recorder.likeliest(20), recorder.support(20), lengths
            assert (min(rows[2:]) < len(PROMPTS)) is leave
        assert torch.equal(drawn[True][0], drawn[False][0])
        lengths = drawn[True][-1]
        for left, stayed in zip(drawn[True][1], drawn[False][1], strict=True):
            assert left == pytest.approx(stayed, abs=1e-9)
        reached = torch.arange(20) < torch.tensor(lengths)[:, None]
        for kind in (2, 3):
            for left, stayed in zip(drawn[True][kind], drawn[False][kind], strict=True):
                torch.testing.assert_close(left[reached], stayed[reached])

    def test_rows_stay_where_a_processor_may_look_at_all_of_them(self) -> None:
        class Custom(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                assert len(scores) == len(PROMPTS)
                return scores

        model, tokenizer = load_model()
        inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        with record_log_probs(model):
            processors = LogitsProcessorList([Custom()])
            sequences = model.generate(**inputs, do_sample=True, max_new_tokens=20, logits_processor=processors)
        lengths = completion_lengths(inputs, sequences)
        assert min(lengths) < max(lengths)
        for row, length in enumerate(lengths):
            assert (sequences[row, inputs["input_ids"].shape[1] + length :] == tokenizer.pad_token_id).all()

    def test_a_row_with_a_seed_of_its_own_is_the_same_whatever_is_beside_it(self) -> None:
        model, tokenizer = load_model(torch.float64)
        completions: list[list[int]] = []
        for places in (slice(None), slice(4, 9)):
            inputs = tokenizer(PROMPTS[places], return_tensors="pt", padding=True)
            with record_log_probs(model, seeds=list(range(len(PROMPTS)))[places]):
                sequences = model.generate(**inputs, do_sample=True, max_new_tokens=20)
            lengths = completion_lengths(inputs, sequences)
            width = inputs["input_ids"].shape[1]
            completions.append(
                [row[width : width + length].tolist() for row, length in zip(sequences, lengths, strict=True)]
            )
        assert completions[0][4:9] == completions[1]

    def test_what_is_not_sampled_is_the_likeliest(self) -> None:
        model, tokenizer = load_model()
        inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=20)
        with record_log_probs(model):
            assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=20), expected)
