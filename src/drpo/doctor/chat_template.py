"""Whether a chat template gives the model its prompt, and begins and ends a turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drpo.doctor.findings import Finding
from drpo.doctor.model import Blank

_MARK = "seventeen"
_ANSWER = _MARK + _MARK


def check_chat_template(blank: Blank) -> Iterator[Finding]:
    """Whether the prompt is in the rendered text, a turn is begun and ended, and there is one template only."""
    template, options = blank.tokenizer.chat_template, blank.template_options
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
    problems = [*_differing(blank), *_rendering(blank)]
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
    other = _default(json.loads(second.read_text(encoding="utf-8")).get("chat_template"))
    # Jinja leaves out one line break at the end.
    if other is not None and other.removesuffix("\n") != first.read_text(encoding="utf-8").removesuffix("\n"):
        yield Finding(
            "stop",
            f"chat template: {first.name} and {second.name} in {blank.name} differ, and engines take either",
            f"the template in {first.name} alone, and no chat_template in {second.name}",
        )


def _default(template: Any) -> str | None:
    """The template of this setting of a tokenizer, which may be a list of named ones."""
    if isinstance(template, list):
        template = {named.get("name"): named.get("template") for named in template if isinstance(named, dict)}
    found = template.get("default") if isinstance(template, dict) else template
    return found if isinstance(found, str) else None


def _rendering(blank: Blank) -> Iterator[Finding]:
    tokenizer, user = blank.tokenizer, {"role": "user", "content": _MARK}

    def rendered(*messages: dict[str, str], begin: bool) -> str:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=begin, **blank.template_options
        )

    where = f"chat_template in {blank.file}"
    try:
        prompt, without = rendered(user, begin=True), rendered(user, begin=False)
    except Exception as error:  # Jinja's, or what the template itself raises
        yield Finding(
            "stop",
            f"chat template: fails on a prompt ({type(error).__name__}: {str(error)[:200]})",
            f"a {where} that takes one message, of the user",
        )
        return
    if _MARK not in prompt:
        yield Finding(
            "stop",
            f"chat template: leaves the prompt out ({prompt[:80]!r})",
            f"{{{{ message['content'] }}}} of every message in {where}",
        )
    elif prompt == without:
        yield Finding(
            "warning",
            "chat template: has no generation prompt, so that the model goes on with the user's turn",
            f"{{% if add_generation_prompt %}}...{{% endif %}} in {where}",
        )
    try:
        turn = rendered(user, {"role": "assistant", "content": _ANSWER}, begin=False)
    except Exception:  # not every template takes an answer, and training needs none
        return
    if _ANSWER in turn:
        yield from _ending(blank, turn.rpartition(_ANSWER)[2], where)


def _ending(blank: Blank, rest: str, where: str) -> Iterator[Finding]:
    """Whether what follows an answer is what ends a completion."""
    tokenizer = blank.tokenizer
    after = tokenizer(rest, add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if after and after[0] in special and after[0] not in blank.eos_ids:
        token = tokenizer.convert_ids_to_tokens(after[0])
        yield Finding(
            "warning",
            f"chat template: ends a turn with {token!r}, which ends no completion",
            f"eos_token_id: [{', '.join(map(str, [after[0], *blank.eos_ids]))}] in {blank.file}generation_config.json",
        )
    elif blank.eos_ids and not set(after) & set(blank.eos_ids):
        token = tokenizer.convert_ids_to_tokens(blank.eos_ids[0])
        yield Finding(
            "warning",
            f"chat template: ends an answer with {rest!r}, without {token!r}, which ends a completion"
            if rest
            else f"chat template: ends no turn; {token!r} ends a completion, and follows no answer",
            f"{{{{ eos_token }}}} after the content of an assistant's message in {where}",
        )
