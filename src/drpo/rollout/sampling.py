"""Which sampling settings change the distribution that is sampled from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "diversity_penalty": (None, 0.0),
    "penalty_alpha": (None, 0.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "force_words_ids": (None,),
    "constraints": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "dola_layers": (None,),
    "token_healing": (None, False),
    "do_sample": (None, True),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "assistant_ensemble_weight": (None,),
}
"""Generation settings that change the distribution sampled from, and the values at which they do not."""


@contextmanager
def neutral_sampling(*configs: GenerationConfig) -> Iterator[None]:
    """Set everything in :data:`NEUTRAL` to a neutral value within this context.

    ``generate`` takes a setting that is None from the model's own configuration, and what that leaves open from
    defaults such as ``top_k=50``. So the model's configuration belongs among these, and a value other than None
    is taken where there is one.
    """
    before = [dict(vars(config)) for config in configs]
    for config in configs:
        vars(config).update({name: values[min(1, len(values) - 1)] for name, values in NEUTRAL.items()})
    try:
        yield
    finally:
        for config, settings in zip(configs, before, strict=True):
            vars(config).update(settings)


FILTERS = ("top_p", "top_k", "min_p")
"""Those of them that leave the kept tokens' probabilities in proportion, so that the trainer can score the same ones."""


def sampling_mismatches(
    scoring_temperature: float, sampling: Mapping[str, Any], replays_support: bool = False
) -> tuple[str, ...]:
    """What the generation settings alone say: temperature first, then filters and other changes of the distribution.

    Args:
        scoring_temperature: what the trainer divides its logits by.
        sampling: the generation settings, by Transformers' names.
        replays_support: whether the trainer scores over the tokens that :data:`FILTERS` left.
    """
    mismatches = []
    temperature = sampling.get("temperature")
    if temperature not in (None, scoring_temperature):
        mismatches.append(f"temperature: tokens are sampled at {temperature:g} and scored at {scoring_temperature:g}")
    changed = [
        f"{name}={sampling[name]}"
        for name, neutral in NEUTRAL.items()
        if sampling.get(name) not in neutral and not (replays_support and name in FILTERS)
    ]
    if changed:
        mismatches.append(
            f"sampling filters: {', '.join(changed)} changes what is sampled from; the trainer scores the full distribution"
        )
    return tuple(mismatches)
