"""Control tokens: the special tokens that a chat template wrote, and not those in the data.

A special token spelled in data stays text, so that data can neither end a turn nor begin one. The
tokenizer is set to read special tokens as text, and knows a template's tokens by aliases. These are
drawn anew in every process, so that no data spells them:

    In: <|user|>say <|user|><|assistant|>  Out: ALIAS<|user|>say <|user|>ALIAS<|assistant|>

The whole text is then encoded in one call, so that harmless text gets the ids that transformers
gives it, even if a merge joins the template's text and the data's.
"""

import re
import secrets
from collections.abc import Sequence

from transformers import AddedToken, PreTrainedTokenizerFast

from srft_jax.models.chat_template import ChatTemplate, Turn


class ControlTokens:
    """An encoder that takes a template's special tokens as control and the data's as text.

    Attributes:
        aliases: Id of an alias -> id of the special token it stands for.
    """

    def __init__(self, backend: PreTrainedTokenizerFast) -> None:
        self._text = backend.backend_tokenizer
        self._text.no_truncation()  # tokenizer.json may hold either, from the program that saved it
        self._text.no_padding()
        added = backend.added_tokens_decoder
        special = {id: token for id, token in added.items() if token.special}
        spelled = {id: token.content for id, token in special.items()}
        self._ids = {content: id for id, content in spelled.items()}
        self._marker = f"\ue000{secrets.token_hex(8)}\ue000"
        # Longest first, so that a token is not taken for a shorter one that it begins with.
        longest_first = map(re.escape, sorted(self._ids, key=len, reverse=True))
        self._special = re.compile("|".join(longest_first) or "(?!)")
        self._either = re.compile(f"{self._marker}(\\d+){self._marker}|{self._special.pattern}")
        # An alias strips blanks and splits words as its token does, so that ids stay the same.
        self._text.add_tokens(
            [
                AddedToken(
                    self._alias(token.content),
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=False,
                )
                for token in special.values()
            ]
        )
        self._text.encode_special_tokens = True  # as text, that is
        self.aliases = {
            self._text.token_to_id(self._alias(content)): id for id, content in spelled.items()
        }
        self._spelled = spelled

    def render(
        self,
        template: ChatTemplate,
        conversations: Sequence[Sequence[Turn]],
        *,
        to_be_answered: bool = True,
    ) -> list[str]:
        """Write conversations by the template, its special tokens as aliases.

        Special tokens in the data are hidden from the template, and revealed in its text.
        """
        guarded = [
            [(role, self._special.sub(self._hide, content)) for role, content in turns]
            for turns in conversations
        ]
        texts = template.render(guarded, to_be_answered=to_be_answered)
        return [self._either.sub(self._reveal, text) for text in texts]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts that `render` returned."""
        return [[self.aliases.get(id, id) for id in ids] for ids in self.encode_data(texts)]

    def encode_data(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts in which nothing is control, in parallel threads of the tokenizer."""
        encodings = self._text.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of ids."""
        return str(self._text.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens))

    def _alias(self, content: str) -> str:
        return self._marker + content

    def _hide(self, token: re.Match[str]) -> str:
        """A special token in data as its id between markers."""
        return f"{self._marker}{self._ids[token[0]]}{self._marker}"

    def _reveal(self, hidden_or_token: re.Match[str]) -> str:
        """A hidden token as data spelled it; one that the template wrote as its alias."""
        id = hidden_or_token[1]
        return self._spelled[int(id)] if id else self._alias(hidden_or_token[0])
