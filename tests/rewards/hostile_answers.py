"""Forty answers that a policy, or whoever writes its data, could try on a verifier."""

import os


def payload(canary: str) -> str:
    """Creates a file if it is ever run as code."""
    return f"__import__('os').system('touch {canary}')"


def hostile_answers(canary: str) -> dict[str, str]:
    """By name; whatever is run of them creates `canary`."""
    code = payload(canary)
    tower = "9"
    for _ in range(40):
        tower = f"9^{{{tower}}}"
    nest = "1"
    for _ in range(400):
        nest = f"\\frac{{1}}{{{nest}}}"
    return {
        "power": "10^{1000000000}",
        "power of a power": "10^{10^9}",
        "plain power": "10**10**9",
        "tower": "9^{9^{9^{9}}}",
        "tall tower": tower,
        "negative power": "(1/3)^{-9^{9^{9}}}",
        "root of a power": "\\sqrt[99999]{7^{7^{77777}}}",
        "factorial": "1000000000!",
        "factorial of factorials": "((9!)!)!",
        "binomial": "\\binom{10^{9}}{5 \\cdot 10^{8}}",
        "sum": "\\sum_{n=1}^{10^{12}} \\sin(n^{n})",
        "product": "\\prod_{n=1}^{99999999} (x + n)",
        "integral": "\\int_0^1 \\exp(\\sin(x^{x^{x}})) \\, dx",
        "limit": "\\lim_{n \\to \\infty} (1 + \\frac{1}{n})^{n^{n}}",
        "expansion": "(a + b + c + d + e + f)^{400} - (f + e + d + c + b + a)^{400}",
        "exponent": "1e999999999",
        "exponent in latex": "1 \\times 10^{999999999}",
        "many digits": "9" * 1_000_000,
        "many digits in a ratio": "9" * 200_000 + "/" + "7" * 200_000,
        "not a number": "nan or inf or -inf",
        "parentheses": "(" * 5000 + "1" + ")" * 5000,
        "open parentheses": "(" * 5000,
        "braces": "{" * 5000 + "1" + "}" * 5000,
        "closing braces": "}" * 5000,
        "fractions": nest,
        "square roots": "\\sqrt{" * 120 + "2" + "}" * 120,
        "absolute values": "|" * 400 + "x" + "|" * 400,
        "unterminated box": "\\boxed{" * 600 + "42",
        "box of text": "\\boxed{\\text{" * 300 + "42" + "}}" * 300,
        "dollars": "$" * 4000 + "42",
        "matrix": "\\begin{pmatrix}" + "1 & " * 900 + "1\\end{pmatrix}",
        "power of a matrix": "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{999999}",
        "equations": "x^{99}+y^{98}+z^{97}=1, " * 20,
        "megabyte": "x" * (1 << 20),
        "megabyte of answers": "Answer: " * (1 << 17),
        "code": code,
        "code in latex": f"$\\text{{{code}}}$ or ${code}$",
        "odd characters": "\0\u202e24\u2066\ud800\udfff\ufeff",
        "odd digits": "٤٢ ⁴² ４２ Ⅷ ½",
        "regex": "a" * 40 + "!" + os.sep,
    }
