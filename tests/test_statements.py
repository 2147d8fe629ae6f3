"""The statement of every exercise: short, numbered, with an example that is true; each sentence is one that a check knows."""

import ast
import doctest
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from grader.checks import TOPICS, exercises
from grader.statement import UNSEEN, statements
from grader.variants import variants_of

ROOT = Path(__file__).parents[1]
STATEMENTS = {
    number: statement
    for script in sorted((ROOT / "solutions").glob("*/*.py"))
    for number, statement in statements(script).items()
}
EXERCISES = {number: exercise for topic in TOPICS.values() for number, exercise in exercises(topic).items()}
every_exercise = pytest.mark.parametrize("number", EXERCISES)


def test_every_exercise_has_a_statement_and_every_statement_an_exercise():
    assert set(STATEMENTS) == set(EXERCISES)


@every_exercise
def test_idea_and_sentences_are_short_and_numbered_through(number):
    statement = STATEMENTS[number]
    assert 5 <= len(statement.idea.split()) <= 90
    assert statement.words <= 160
    assert 1 <= len(statement.core) <= 5
    assert list(statement.sentences) == list(range(1, len(statement.sentences) + 1))


@every_exercise
def test_each_sentence_has_experiments_and_subjects_that_break_it(number):
    exercise, statement = EXERCISES[number], STATEMENTS[number]
    assert exercise.core == len(statement.core)
    seen = {place for place, sentence in statement.sentences.items() if UNSEEN not in sentence}
    assert set(chain.from_iterable(experiment.sentences for experiment in exercise.experiments)) == seen
    assert {place for place, subjects in variants_of(exercise).BROKEN.items() if subjects} == seen


@every_exercise
def test_stub_has_types_and_says_what_it_is_about(number):
    statement = STATEMENTS[number]
    named = {node.name: node for node in statement.definitions}
    assert EXERCISES[number].name in named
    for node in statement.definitions:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [argument.arg for argument in arguments if argument.arg != "self" and argument.annotation is None]
            assert not untyped, f"{node.name}: {untyped}"
            assert node.returns is not None or node.name == "__init__", node.name
    assert ast.get_docstring(named[EXERCISES[number].name])


@every_exercise
def test_stub_can_be_defined_and_raises_only_when_it_is_used(number):
    tree = ast.parse(STATEMENTS[number].stub)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not [line for body in (tree, *classes) for line in body.body if isinstance(line, ast.Raise)]


@every_exercise
def test_example_in_the_stub_is_what_the_reference_gives(number):
    exercise, statement = EXERCISES[number], STATEMENTS[number]
    definition = next(node for node in statement.definitions if node.name == exercise.name)
    names = {exercise.name: exercise.reference, "torch": torch, "nn": nn, "F": functional}
    example = doctest.DocTestParser().get_doctest(ast.get_docstring(definition), names, number, None, 0)
    assert any(line.want for line in example.examples), "an example shows an input and its output"
    told = []
    torch.manual_seed(0)
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=told.append)
    assert not told, "".join(told)
