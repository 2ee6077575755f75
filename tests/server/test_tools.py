"""Calls of tools are told apart from text, however an answer comes in pieces."""

import random

import pytest

from longspan.server import tools
from longspan.server.chat_fields import FunctionDefinition, Tool
from longspan.server.constraint import Vocabulary
from longspan.server.refusals import ApiError

CALL = '<tool_call>\n{"name": "look_up", "arguments": {"place": "</tool_call> }"}}\n</tool_call>'
ANSWERS = [
    ("no call at all < <tool", "no call at all < <tool", 0),
    (f"Let me look.\n\n{CALL}", "Let me look.", 1),
    (f"{CALL}\n{CALL}", "", 2),
    (f"{CALL}\n\nThat was it.", "That was it.", 1),
    ("cut <tool_call>\n{\"name\": \"look", "cut<tool_call>\n{\"name\": \"look", 0),
    ("  spaces stay  ", "  spaces stay  ", 0),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "text", "calls"), ANSWERS)
@pytest.mark.parametrize("seed", range(4))
def test_pieces_make_no_difference(answer, text, calls, seed):
    drawn, reader, shown, found = random.Random(seed), tools.Reader(), "", []
    at = 0
    while at < len(answer):
        size = drawn.choice([1, 2, 7, 100])
        piece, new = reader.push(answer[at : at + size])
        shown, found, at = shown + piece, found + new, at + size
    assert shown + reader.finish() == text
    assert found == [tools.Call("look_up", '{"place": "</tool_call> }"}')] * calls == reader.calls


def allowed(follower, size=320):
    bits = follower.allowed()
    return {at for at in range(size) if int(bits[at // 32]) >> (at % 32) & 1}


def test_auto_takes_text_and_holds_calls_to_their_schema(tiny):
    tool = Tool(type="function", function=FunctionDefinition(name="look_up", parameters={"type": "object"}))
    ends = tiny.end_tokens
    for parallel in (True, False):
        follower = tools.grammar(Vocabulary(tiny), [tool], "auto", parallel)()
        for token in tiny.tokens("Well, "):
            assert token in allowed(follower)
            follower.accept(token)
        assert ends <= allowed(follower)
        for token in tiny.tokens("<tool_call>"):
            follower.accept(token)
        assert not ends & allowed(follower), "a call has begun"
        for token in tiny.tokens('\n{"name": "'):
            assert token in allowed(follower)
            follower.accept(token)
        assert not set(tiny.tokens("x")) & allowed(follower), "no such tool"
        for token in tiny.tokens('look_up", "arguments": {}}\n</tool_call>'):
            follower.accept(token)
        assert (allowed(follower) == ends) is not parallel


def test_a_schema_that_cannot_be_followed_is_refused(tiny):
    tool = Tool(type="function", function=FunctionDefinition(name="f", parameters={"type": "odd"}))
    with pytest.raises(ApiError, match="tools"):
        tools.grammar(Vocabulary(tiny), [tool], "required", True)


def test_definitions_of_a_schema_are_found(tiny):
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"enum": ["x"]}}}
    tool = Tool(type="function", function=FunctionDefinition(name="f", parameters=schema))
    follower = tools.grammar(Vocabulary(tiny), [tool], "required", True)()
    for token in tiny.tokens('<tool_call>\n{"name": "f", "arguments": {"a": "'):
        assert token in allowed(follower)
        follower.accept(token)
    assert not set(tiny.tokens("y")) & allowed(follower)
