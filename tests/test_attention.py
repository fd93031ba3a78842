"""Attention on a CPU gives Transformers' numbers, forward bit for bit, and gradients no further from float64's."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from drpo.data.arithmetic import MODEL_PATH
from drpo.kernels.attention import CPU_SDPA, FP32_BACKWARD_TO, attend_on_cpu, use_cpu_sdpa

LAYER = SimpleNamespace(num_key_value_groups=3, is_causal=True)
KEYS = 21


def states(queries: int, dtype: torch.dtype, keys: int = KEYS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(4, 6, queries, 16), (4, 2, keys, 16), (4, 2, keys, 16)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def padded(queries: int, kind: str, dtype: torch.dtype) -> torch.Tensor | None:
    """A causal mask whose rows have up to three places of padding on the left; the first row of one sees nothing."""
    if kind == "none":
        return None
    places = torch.arange(KEYS)
    seen = places <= places[KEYS - queries :, None]
    mask = (seen & (places >= torch.arange(4)[:, None, None])).unsqueeze(1)
    return mask if kind == "boolean" else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -1e4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, KEYS])
@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_outputs_are_those_of_transformers_bit_for_bit(
    dtype: torch.dtype, queries: int, kind: str, with_gradient: bool
) -> None:
    of_layer = states(queries, dtype)
    with torch.set_grad_enabled(with_gradient):
        ours, _ = attend_on_cpu(LAYER, *of_layer, padded(queries, kind, dtype), scaling=0.3)
    theirs, _ = sdpa_attention_forward(LAYER, *of_layer, padded(queries, kind, dtype), scaling=0.3)
    assert ours.equal(theirs)


def gradients(attend: Any, of_layer: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    output = attend(LAYER, *of_layer, padded(KEYS, kind, of_layer[0].dtype))[0]
    return list(torch.autograd.grad((output.double() * output.double().detach()).sum(), of_layer))


@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
def test_gradients_in_half_precision_are_no_further_from_float64_than_those_of_transformers(kind: str) -> None:
    of_layer = states(KEYS, torch.bfloat16)
    exact = gradients(attend_on_cpu, [state.detach().double().requires_grad_() for state in of_layer], kind)
    ours, theirs = (gradients(attend, of_layer, kind) for attend in (attend_on_cpu, sdpa_attention_forward))
    for our, their, reference in zip(ours, theirs, exact, strict=True):
        assert our.isfinite().all()
        assert (our - reference).abs().mean() <= (their - reference).abs().mean()


@pytest.mark.parametrize("keys", [FP32_BACKWARD_TO, FP32_BACKWARD_TO + 1])
def test_the_gradient_is_computed_in_fp32_up_to_the_length_that_is_faster_so(keys: int) -> None:
    output, _ = attend_on_cpu(LAYER, *states(keys, torch.bfloat16, keys), None)
    graph = [output.grad_fn]
    names = []
    while graph:
        node = graph.pop()
        names.append(node.name())
        graph += [before for before, _ in node.next_functions if before is not None]
    assert ("_BackwardInFp32Backward" in names) == (keys == FP32_BACKWARD_TO)


def test_under_autocast_attention_is_in_its_dtype() -> None:
    of_layer = states(KEYS, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (attend(LAYER, *of_layer, None)[0] for attend in (attend_on_cpu, sdpa_attention_forward))
    assert ours.dtype == torch.bfloat16
    assert ours.equal(theirs)


def test_a_model_samples_the_same_and_its_config_on_disk_says_nothing_of_it(tmp_path: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    ids = torch.arange(12).view(3, 4) + 5
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    completions = []
    for _ in range(2):
        torch.manual_seed(0)
        options = GenerationConfig(max_new_tokens=8, do_sample=True, pad_token_id=0)
        completions.append(model.generate(ids, attention_mask=mask, generation_config=options))
        use_cpu_sdpa(model)
    assert model.config._attn_implementation == CPU_SDPA
    assert completions[0].equal(completions[1])
    model.save_pretrained(tmp_path)
    assert CPU_SDPA not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_other_attention_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8, n_positions=8))
    model.set_attn_implementation("eager")
    use_cpu_sdpa(model)
    assert model.config._attn_implementation == "eager"
    called = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", lambda *args, **kwargs: called.append(kwargs))
    attend_on_cpu(LAYER, *(state.to("meta") for state in states(1, torch.float32)), None, sliding_window=4)
    assert called == [{"dropout": 0.0, "scaling": None, "is_causal": None, "sliding_window": 4}]
