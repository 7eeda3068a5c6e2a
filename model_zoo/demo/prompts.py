"""Cut prompts from held-out files: the head of a function or class, up to the end of a statement inside it.

A small model that decodes greedily soon repeats itself, and a loop flatters every draft; so cuts after which the target
loops at once come last.
"""

import ast
import random
import re
from collections.abc import Iterator
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import Source
from .evaluate import complete, loop_start

COUNT = 8
CANDIDATES = 64  # tried, at most
PER_FILE = 12
SHORTEST, LONGEST = 64, 200  # tokens


def is_docstring(node: ast.AST) -> bool:
    """True for a statement that is only a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def cuts(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """(first line, last line) of pieces that open with a top-level definition and stop after a statement inside it."""
    for outer in tree.body:
        if not isinstance(outer, ast.FunctionDef | ast.ClassDef):
            continue
        first = min([outer.lineno, *(decorator.lineno for decorator in outer.decorator_list)])
        for function in ast.walk(outer):
            if not isinstance(function, ast.FunctionDef):
                continue
            code = [statement for statement in function.body if not is_docstring(statement)]
            yield from ((first, statement.end_lineno or 0) for statement in code[1:-1] if statement.end_lineno)


def candidates(sources: list[Source], tokenizer: PreTrainedTokenizerFast, longest: int) -> list[dict[str, Any]]:
    """Up to PER_FILE prompts of each file in a random order, taking turns among the held-out packages."""
    chance = random.Random(0)
    by_package: dict[str, list[dict[str, Any]]] = {}
    for source in chance.sample(sources, len(sources)):
        if "tests" in source.path:
            continue
        lines = source.text.split("\n")
        pieces = list(cuts(ast.parse(source.text)))
        for first, last in chance.sample(pieces, len(pieces))[:PER_FILE]:
            text = "\n".join(lines[first - 1 : last])
            tokens = len(tokenizer(text)["input_ids"])
            if not SHORTEST <= tokens <= longest or "copied from" in text.lower():
                continue
            prompt = {
                "package": source.package,
                "version": source.version,
                "licence": source.licence,
                "file": source.path,
                "lines": [first, last],
                "tokens": tokens,
                "text": text,
            }
            by_package.setdefault(source.package, []).append(prompt)
    turns = max(map(len, by_package.values()))
    return [found[turn] for turn in range(turns) for found in by_package.values() if turn < len(found)]


def cut_prompts(
    sources: list[Source], tokenizer: PreTrainedTokenizerFast, target: LlamaForCausalLM, new_tokens: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """COUNT prompts, from different files where no loop forbids it, and the target's greedy completions of them."""
    longest = min(LONGEST, target.config.max_position_embeddings - new_tokens)
    good: dict[str, tuple[dict[str, Any], str]] = {}
    looping = []
    for prompt in candidates(sources, tokenizer, longest)[:CANDIDATES]:
        if prompt["file"] in good or len(good) == COUNT:
            continue
        completion = complete(target, tokenizer, prompt["text"], new_tokens)
        tokens = tokenizer(re.sub(r"\d+", "0", prompt["text"] + completion))["input_ids"]  # counting is a loop too
        if loop_start(tokens) == len(tokens):
            good[prompt["file"]] = prompt, completion
        else:
            looping.append((prompt, completion))
    chosen = [*good.values(), *looping][:COUNT]
    return [prompt for prompt, _ in chosen], [completion for _, completion in chosen]
