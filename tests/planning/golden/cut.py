"""Cut a golden snippet out of a compiled program's text: a module that has a few of its lines.

    python tests/planning/golden/cut.py PROGRAM.txt [INSTRUCTION ...] > SNIPPET.txt

The instructions must be of one computation; without any, the whole program is kept. What they call
comes along; other results that they read become parameters. Attributes that planning/hlo does not
read are left out. `benchmarks/compile_sampler.py --hlo FOLDER` writes programs; for any other,
write what `jax.jit(f).lower(...).compile().as_text()` returns.
"""

import pathlib
import re
import sys

from srft_jax.planning.hlo import parser

DROPPED = (
    *("metadata", "backend_config", "frontend_attributes", "output_to_operand_aliasing"),
    *("operand_layout_constraints", "sharding"),
)
# Where planning/hlo reads it: the kernels, and loops whose range the program does not fix.
KEEPS_OP_NAME = re.compile(r"splash_mha| while\(")
CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%([\w.\-]+)")


def without(line, attribute):
    """The line without `attribute={...}`, braces within it included."""
    while (start := line.find(f", {attribute}={{")) >= 0:
        depth = 0
        for end in range(start + len(attribute) + 3, len(line)):
            depth += (line[end] == "{") - (line[end] == "}")
            if not depth:
                break
        line = line[:start] + line[end + 1 :]
    return line


def cleaned(line):
    op_name = re.search(r'op_name="([^"]*)"', line)
    for attribute in DROPPED:
        line = without(line, attribute)
    if op_name and KEEPS_OP_NAME.search(line):
        line += f', metadata={{op_name="{op_name[1]}"}}'
    return line


def cut(text, names):
    """Yield the lines of the snippet."""
    module = parser.parse_hlo(text)
    sources = {}  # computation -> its header, and its lines by the name of their result
    for header, lines in parser._split_computations(text):
        by_name = {line.removeprefix("ROOT ").split(" = ")[0].lstrip("%"): line for line in lines}
        sources[header.removeprefix("ENTRY ").lstrip("%").split()[0]] = header, by_name
    names = names or list(module.entry.instructions)
    home, computation = next(
        (name, one)
        for name, one in module.computations.items()
        if set(names) <= set(one.instructions)
    )
    elements = {  # of the tuples that are passed on from one to the next
        one.name
        for one in computation.instructions.values()
        if one.opcode == "get-tuple-element" and one.operands[0] in names
        if any(user.name in names for user in computation.users[one.name])
    }
    chosen = [name for name in computation.instructions if name in {*names, *elements}]

    called = []

    def visit(line):
        for name in CALLED.findall(line):
            if name not in called:
                for inner in sources[name][1].values():
                    visit(inner)
                called.append(name)

    for name in chosen:
        visit(sources[home][1][name])
    for name in called:
        header, lines = sources[name]
        yield header
        yield from ("  " + cleaned(line) for line in lines.values())
        yield "}\n"
    yield "ENTRY %main () -> () {"
    read = (operand for name in chosen for operand in computation.instructions[name].operands)
    for number, name in enumerate(dict.fromkeys(one for one in read if one not in chosen)):
        shape, _ = parser._split_word(
            sources[home][1][name].removeprefix("ROOT ").split(" = ", 1)[1]
        )
        yield f"  %{name} = {shape} parameter({number})"
    for name in chosen:
        line = cleaned(sources[home][1][name]).removeprefix("ROOT ")
        yield "  " + ("ROOT " if name == chosen[-1] else "") + line
    yield "}"


if __name__ == "__main__":
    path, *instructions = sys.argv[1:]
    print("\n".join(cut(pathlib.Path(path).read_text(), instructions)))
