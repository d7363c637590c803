"""Small tokenizers in the layouts of the families: their pre-tokenizers, tokens and templates."""

import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# Trained on text with the seams of templates in it, so that merges want to cross them.
CORPUS = [
    "user\nWhat is 7 + 5?\n\nassistant\nLet me think.\n\nThe answer is 12.",
    "system\nYou are a helpful assistant.\nuser\n\n\n  Say hello, world!\nmodel\n hello\n\n world",
    "\n\n\n\n <|im_end|> <|im_start|> <|eot_id|> <end_of_turn> [INST] [/INST] </s> <think>\n",
] * 20

GPT_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    '{%- if (message.role == "user") or (message.role == "system" and not loop.first) '
    'or (message.role == "assistant" and not message.tool_calls) %}'
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Qwen3 cuts the thinking from earlier answers, and gives the last one a place to think.
CHATML_THINK = (
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role != 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{%- else %}{%- set reasoning = '' %}{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.last %}{{- '<|im_start|>assistant\\n<think>\\n' + reasoning + "
    "'\\n</think>\\n\\n' + content }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}'
    '{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}'
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}'
    '{{- "Cutting Knowledge Date: December 2023\\n" }}'
    '{{- "Today Date: " + date_string + "\\n\\n" }}'
    '{{- system }}{{- "<|eot_id|>" }}{%- for message in messages %}'
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content']|trim + eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}"
    '{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}\n'
    "{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    '{{ raise_exception("Conversation roles must alternate user/assistant/...") }}{%- endif -%}'
    "{%- if (message['role'] == 'assistant') -%}{%- set role = \"model\" -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}\n"
    "    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else \"\") }}\n"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}\n"
    "    {{ '<end_of_turn>\n' }}{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def byte_level(tokens, normalizer=None, bos=None):
    """Qwen's and Llama 3's kind: special tokens after the vocabulary."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=bos is not None))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    words = pre_tokenizers.Split(Regex(GPT_WORDS), "isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    for content, special in tokens.items():
        tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
    if bos is not None:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, pair)
    return tokenizer


def byte_fallback(tokens, *, metaspace):
    """Mistral's and Gemma's kind: special tokens first in the vocabulary, blanks as ▁."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        blanks = pre_tokenizers.Split(" ", "merged_with_previous")
        # No merge of Gemma's joins a line end and a word, though its pre-tokenizer would let it.
        lines = pre_tokenizers.Split(Regex("\n+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, blanks])
    strip = [decoders.Strip(" ", 1, 0)] if metaspace else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = [AddedToken(content, special=True, normalized=False) for content in tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *fallback], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    if not metaspace:
        content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]
    content["added_tokens"] = content["added_tokens"][: len(special)]  # bytes are not special
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


IM = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True}
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
HEADERS += ["<|start_header_id|>", "<|end_header_id|>"]
TURNS = ["<pad>", "<s>", "<eos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<unused0>"]

# Family -> how its tokenizer is made, the rest of tokenizer_config.json, tokens that stop.
FAMILIES = {
    "qwen2.5": (
        lambda: byte_level(IM | {"<tool_call>": False}, normalizers.NFC()),
        dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML),
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen3": (
        lambda: byte_level(IM | {"<think>": False, "</think>": False}, normalizers.NFC()),
        dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML_THINK),
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "llama3": (
        lambda: byte_level(dict.fromkeys(HEADERS, True), bos=HEADERS[0]),
        dict(bos_token=HEADERS[0], eos_token="<|end_of_text|>", chat_template=LLAMA),
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    ),
    "mistral": (
        lambda: byte_fallback(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], metaspace=True),
        dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=MISTRAL),
        "</s>",
    ),
    "gemma3": (
        lambda: byte_fallback(TURNS, metaspace=False),
        dict(bos_token="<s>", eos_token="<eos>", pad_token="<pad>", chat_template=GEMMA),
        ["<eos>", "<end_of_turn>"],
    ),
}


def write_family(name, path):
    """The directory of a model of the family, without weights."""
    make, config, stops = FAMILIES[name]
    path.mkdir(parents=True)
    tokenizer = make()
    tokenizer.save(str(path / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", **config)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = [tokenizer.token_to_id(s) for s in ([stops] if isinstance(stops, str) else stops)]
    stop_ids = ids[0] if isinstance(stops, str) else ids
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    return path


def prompt_ids(tokenizer, prompt, history=()):
    """Ids of one user turn after `history`, up to where the assistant's text starts."""
    return tokenizer.encode_prompts([[*history, ("user", prompt)]])[0]


def completion_ids(tokenizer, text):
    """Ids of one assistant's text and its EOS."""
    return tokenizer.encode_completions([text])[0]
