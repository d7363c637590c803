"""Words in the package: names without riddles, sentences with a subject, one name for one thing.

Read from the source, by ast and tokenize. Each room is a case of its own.
"""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "srft_jax"
ROOMS = sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")})

# An identifier such as of_layer or _of_rows: a verb or a noun is missing.
RIDDLE = re.compile(r"_*of_", re.IGNORECASE)
# Sentences such as "Of a row: its length.", whose subject the reader would have to find.
NO_SUBJECT = re.compile(r"(Of|Those|Likewise|That)\b")
# "name: Description." or "name (type): Description." in a docstring's Args or Attributes.
DESCRIPTION = re.compile(r"\s*[\w*]+(?: \(.*?\))?: (?P<text>.*)")

# Module names that rooms share because both are about the very same thing.
SHARED_MODULES = {
    "lora.py",  # config: the section; models: the adapters
    "metrics.py",  # experience: of rollouts; training: of updates
}


@functools.cache
def sources(room):
    """Path below the package -> source text, for each file of a room."""
    place = PACKAGE / room
    paths = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return {str(path.relative_to(PACKAGE)): path.read_text() for path in paths}


def syntax(room):
    """Path and syntax tree for each file of a room."""
    return ((path, ast.parse(text)) for path, text in sources(room).items())


def defined_names(tree):
    """Yield (name, line) for each function, class, argument, variable, attribute and alias."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.Name(ctx=ast.Store()):
                yield node.id, node.lineno
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node.lineno
            case ast.alias(asname=str(name)):
                yield name, node.lineno


def descriptions(tree):
    """Yield (text, line) for each bare string, and for each described name in it.

    In:  '''Lengths of rows.\n\n    Attributes:\n      used: Of each row: tokens so far.'''
    Out: "Lengths of rows...." and "Of each row: tokens so far."
    """
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield text.strip(), node.lineno
                for line, described in enumerate(map(DESCRIPTION.match, text.split("\n"))):
                    if described:
                        yield described["text"], node.lineno + line


def comments(text):
    """Yield (text, line) for each comment: lines in a column below each other are one."""
    before = None  # line and column where the comment before would go on
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            if (line, column) != before:
                yield token.string.lstrip("#: "), line
            before = (line + 1, column)


@pytest.mark.parametrize("room", ROOMS)
def test_no_name_is_a_riddle(room):
    riddles = [
        f"{path}:{line} {name}"
        for path, tree in syntax(room)
        for name, line in defined_names(tree)
        if RIDDLE.match(name)
    ]
    assert not riddles, "\n".join(riddles)


@pytest.mark.parametrize("room", ROOMS)
def test_sentences_have_subjects(room):
    incomplete = [
        f"{path}:{line} {sentence[:60]!r}"
        for path, text in sources(room).items()
        for sentence, line in [*descriptions(ast.parse(text)), *comments(text)]
        if NO_SUBJECT.match(sentence)
    ]
    assert not incomplete, "\n".join(incomplete)


@functools.cache
def namesakes():
    """Class or module name -> files that have it, over all rooms."""
    places = {}
    for room in ROOMS:
        for path, tree in syntax(room):
            places.setdefault(Path(path).name, []).append(path)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(path)
    return places


@pytest.mark.parametrize("room", ROOMS)
def test_one_name_is_one_thing(room):
    allowed = SHARED_MODULES | {"__init__.py"}
    shared = [
        f"{name}: {', '.join(sorted(paths))}"
        for name, paths in namesakes().items()
        if len(paths) > 1 and name not in allowed and set(paths) & set(sources(room))
    ]
    assert not shared, "\n".join(shared)


def test_a_riddle_and_a_sentence_without_subject_are_seen():
    text = "def of_rows(of_what):\n    '''Rows.\n\n    x: Of rows.'''\n    # Those.\n    # That.\n"
    tree = ast.parse(text)
    assert [name for name, _ in defined_names(tree) if RIDDLE.match(name)] == ["of_rows", "of_what"]
    sentences = [*descriptions(tree), *comments(text)]
    incomplete = [sentence for sentence, _ in sentences if NO_SUBJECT.match(sentence)]
    assert incomplete == ["Of rows.", "Those."]
