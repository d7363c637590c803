"""Conversations to text, by the Jinja template that comes with a tokenizer.

The text depends on the conversation alone: a template that asks for today's date is always told the
same day, or two runs of a seed would differ.
"""

import dataclasses
import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jinja2
from transformers import PreTrainedTokenizerFast

from srft_jax.config import UsageError

Turn = tuple[str, str]  # role (system, user or assistant) and content

# The day that Llama 3's templates write if they have no clock.
_DAY = datetime.date(2024, 7, 26)
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, as made by `read_chat_template`.

    Attributes:
        text: Jinja source, as the user has it.
        name: Name of the template in messages.
    """

    text: str
    name: str
    _backend: PreTrainedTokenizerFast = dataclasses.field(repr=False)

    def render(
        self, conversations: Sequence[Sequence[Turn]], *, to_be_answered: bool = True
    ) -> list[str]:
        """Write each conversation as text.

        Args:
            conversations: The turns of each, in order.
            to_be_answered: Whether the text goes on to where the assistant's next turn starts.

        Raises:
            UsageError: the template is not Jinja, refuses the conversation or drops a part of it.
        """
        messages = [
            [{"role": role, "content": content} for role, content in turns]
            for turns in conversations
        ]
        try:
            texts = self._backend.apply_chat_template(
                messages,
                chat_template=_CLOCK.sub(_fixed_day, self.text),
                tokenize=False,
                add_generation_prompt=to_be_answered,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"{self.name} is not valid Jinja: line {error.lineno}, {error.message}"
            ) from error
        except (jinja2.TemplateError, TypeError) as error:  # a template's own is the first
            roles = ", ".join(dict.fromkeys(role for turns in conversations for role, _ in turns))
            raise UsageError(
                f"{self.name} refuses a conversation with the roles {roles}: {error}; leave the "
                "role out of the data (data.system_prompt is a system turn) or set "
                "model.chat_template"
            ) from error
        rendered = cast(list[str], texts)
        if to_be_answered:
            for turns, text in zip(conversations, rendered, strict=True):
                self._check_complete(turns, text)
        return rendered

    def _check_complete(self, turns: Sequence[Turn], text: str) -> None:
        """Raise if a turn is missing; earlier answers may be, as thinking models' templates cut
        the thoughts from them."""
        for role, content in turns:
            if role != "assistant" and content.strip() not in text:
                raise UsageError(
                    f"{self.name} drops the {role} turn {content.strip()[:60]!r}; set "
                    "model.chat_template to one that writes every turn"
                )


def read_chat_template(
    backend: PreTrainedTokenizerFast, source: Path, file: str | None
) -> ChatTemplate:
    """Return the file's template, or else the tokenizer's; among several, the one named `default`.

    Raises:
        UsageError: there is none.
    """
    if file is not None:
        try:
            return ChatTemplate(Path(file).read_text(), f"the chat template {file}", backend)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"model.chat_template = {file} cannot be read: {error}") from error
    text = backend.chat_template
    if isinstance(text, dict):
        if "default" not in text:
            raise UsageError(
                f"the tokenizer in {source} has the chat templates {', '.join(sorted(text))}, but "
                "none called default; set model.chat_template to a file with the one to be used"
            )
        text = text["default"]
    if text is None:
        raise UsageError(
            f"the tokenizer in {source} has no chat template, so prompts have no form; set "
            "model.chat_template to a Jinja file"
        )
    return ChatTemplate(text, f"the chat template of {source}", backend)


def _fixed_day(call: re.Match[str]) -> str:
    """In: strftime_now("%d %b %Y").  Out: '26 Jul 2024', quotes included."""
    return repr(_DAY.strftime(call[2]))
