"""The verb `inspect`: what it says of the data is what training does with it."""

import json
import re

import jax
import numpy as np
import pytest
from tiny_runs import NO_PROBLEMS, ROOT, tiny_config

from srft_jax.models.tokenizer import load_tokenizer
from srft_jax.report.data_view import marked
from srft_jax.setup.prepare import prepare
from srft_jax.tasks.inspect import inspect

TOKENIZER = load_tokenizer(ROOT / "assets" / "tokenizer")


@pytest.fixture
def data(tmp_path):
    """Two rows that fit; one with a demonstration too long beside a good one; a prompt too long."""
    rows = [
        dict(prompt="1+1", answer="2", demonstration="<think>1+1</think>2"),
        dict(prompt="say <|end|>", answer="2"),
        dict(prompt="1+3", answer="4", demonstrations=["<think>" + "1" * 30, "<think></think>4"]),
        dict(prompt="1" * 30, answer="2", demonstration="2"),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def arguments(data, *more):
    own = [*NO_PROBLEMS, f"--data.train.files={data}/rows.jsonl"]
    own += ["--data.too_long=drop", "--data.max_prompt_tokens=16", "--data.prompts_per_step=2"]
    return tiny_config(data / "run", *own, *more)


def test_what_is_shown_is_what_is_trained(data, capsys):
    events = []

    def listen(event, *_, **__):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    assert inspect(arguments(data, "--inspect.ids=true")) == 0
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in events if "backend_compile" in event]
    out = capsys.readouterr().out
    shown = [json.loads(line) for line in re.findall(r"^    (\[.*\])$", out, re.MULTILINE)]
    setup = prepare(arguments(data))
    demonstrated = [setup.data.train[index] for index in (0, 2)]
    assert sorted(shown) == sorted(
        [*one.prompt.tolist(), *one.demonstrations[0].tolist()] for one in demonstrated
    )
    assert "    <|user|>1+1<|assistant|>«<think>1+1</think>2<|end|>»\n" in out
    assert "    <|user|>1+3<|assistant|>«<think></think>4<|end|>»\n" in out


def test_what_was_dropped_is_counted(data, capsys):
    inspect(arguments(data))
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["train"] == ["train", "3", "2", "2", "1", "1", "0"]
    assert lines["train, prompts"][2:] == ["5", "11", "13", "13", "16"]


def test_prompts_that_nothing_is_known_to_follow(data, capsys):
    inspect(arguments(data, "--objective.preset=grpo", "--inspect.rows=2"))
    out = capsys.readouterr().out
    row = f"{data}/rows.jsonl, row 2 (final_answer, answer '2')"
    assert f"{row}: a prompt of 13 tokens, to be completed\n" in out
    assert "    <|user|>say <|end|><|assistant|>" in out and "row 3" not in out
    assert "«" not in out


def test_colours_tell_roles_apart():
    """Prompt dim, demonstration green, special tokens bold; a token spelled in data is not."""
    (prompt,) = TOKENIZER.encode_prompts([[("user", "<|end|>")]])
    (completion,) = TOKENIZER.encode_completions(["2\n3"])
    tokens = np.asarray(prompt + completion)
    trained = np.arange(len(tokens)) >= len(prompt)
    text = marked(TOKENIZER, tokens, trained, colours=True)
    dim, dim_bold, green, green_bold = (f"\x1b[{code}m" for code in ("2", "2;1", "32", "32;1"))
    end = "\x1b[0m"
    assert text == (
        f"{dim_bold}<|user|>{end}{dim}<|end|>{end}{dim_bold}<|assistant|>{end}"
        f"{green}2{end}\n{green}3{end}{green_bold}<|end|>{end}"
    )
    plain = marked(TOKENIZER, tokens, trained, colours=False)
    assert plain == "<|user|><|end|><|assistant|>«2\n3<|end|>»"
