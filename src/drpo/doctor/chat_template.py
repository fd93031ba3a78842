"""Whether a chat template gives the model its prompt, and begins and ends a turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drpo.doctor.findings import Finding
from drpo.doctor.model import Blank
from drpo.recipe import Recipe

_MARK = "seventeen"


def check_chat_template(blank: Blank, recipe: Recipe) -> Iterator[Finding]:
    """Whether the prompt is in the rendered text, a turn is begun and ended, and there is one template only."""
    tokenizer, options = blank.tokenizer, recipe.trainer.get("chat_template_kwargs") or {}
    template = tokenizer.chat_template
    if not template:
        if options:
            yield Finding(
                "warning",
                f"chat template: there is none that could read {', '.join(options)}",
                "no trainer.chat_template_kwargs",
            )
        else:
            yield Finding("ok", "chat template: none; prompts go in as they are")
        return
    problems = [*_differing(blank), *_rendering(blank, options)]
    text = template if isinstance(template, str) else json.dumps(template)
    for name in options:
        if name not in text:
            problems.append(
                Finding(
                    "warning",
                    f"chat template: does not read {name} of trainer.chat_template_kwargs",
                    f"no trainer.chat_template_kwargs.{name}",
                )
            )
    yield from problems or [Finding("ok", "chat template: the tokenizer's, with a turn begun and ended")]


def _differing(blank: Blank) -> Iterator[Finding]:
    """A folder may have its template in two places, and who reads it takes one of them."""
    first, second = (Path(blank.name) / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    if not (first.is_file() and second.is_file()):
        return
    other = json.loads(second.read_text(encoding="utf-8")).get("chat_template")
    if other is not None and other != first.read_text(encoding="utf-8"):
        yield Finding(
            "stop",
            f"chat template: {first.name} and {second.name} in {blank.name} differ, and engines take either",
            f"the template in {first.name} alone",
        )


def _rendering(blank: Blank, options: dict[str, Any]) -> Iterator[Finding]:
    tokenizer, user = blank.tokenizer, {"role": "user", "content": _MARK}

    def rendered(*messages: dict[str, str], begin: bool) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=begin, **options)

    where = f"chat_template in {blank.file}"
    try:
        prompt, without = rendered(user, begin=True), rendered(user, begin=False)
    except Exception as error:  # Jinja's, or what the template itself raises
        yield Finding("stop", f"chat template: fails on a prompt ({type(error).__name__}: {str(error)[:200]})", where)
        return
    if _MARK not in prompt:
        yield Finding("stop", f"chat template: leaves the prompt out ({prompt[:80]!r})", where)
    elif prompt == without:
        yield Finding(
            "warning",
            "chat template: has no generation prompt, so that the model goes on with the user's turn",
            f"{{% if add_generation_prompt %}}...{{% endif %}} in {where}",
        )
    try:
        turn = rendered(user, {"role": "assistant", "content": _MARK + _MARK}, begin=False)
    except Exception:  # not every template takes an answer, and training needs none
        return
    rest = turn.rpartition(_MARK + _MARK)[2]
    after = tokenizer(rest, add_special_tokens=False)["input_ids"][:1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if after and after[0] in special and after[0] not in blank.eos_ids:
        token = tokenizer.convert_ids_to_tokens(after[0])
        yield Finding(
            "warning",
            f"chat template: ends a turn with {token!r}, which ends no completion",
            f"eos_token_id: [{', '.join(map(str, [after[0], *blank.eos_ids]))}] in {blank.file}generation_config.json",
        )
