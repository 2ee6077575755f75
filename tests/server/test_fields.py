"""Every field of OpenAI's requests is honoured, or refused by its name with what to do instead."""

import typing

import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as response
from pydantic import ValidationError

from longspan.server.chat_fields import ChatRequest
from longspan.server.completion_fields import CompletionRequest
from longspan.server.refusals import ApiError
from longspan.server.response_fields import ResponsesRequest

BODIES = {
    ChatRequest: (chat.CompletionCreateParamsBase, {"model": "m", "messages": [{"role": "user", "content": "a"}]}),
    CompletionRequest: (completion.CompletionCreateParamsBase, {"model": "m", "prompt": "a"}),
    ResponsesRequest: (response.ResponseCreateParamsBase, {"model": "m", "input": "a"}),
}


@pytest.mark.parametrize("body", BODIES)
def test_every_field_is_known(body):
    known = set(typing.get_type_hints(BODIES[body][0])) | {"stream"}
    honoured, refused = set(body.model_fields), set(body.refusals)
    assert known <= honoured | refused
    assert not honoured & refused


@pytest.mark.parametrize("body", BODIES)
def test_refusals_name_the_field_and_what_to_do(body):
    least = BODIES[body][1]
    for field, why in body.refusals.items():
        assert body.model_validate({**least, field: None}), "null is not given"
        for value in body.neutral.get(field, ()):
            assert body.model_validate({**least, field: value})
        with pytest.raises(ApiError) as caught:
            body.model_validate({**least, field: "something"})
        assert caught.value.param == field and why in str(caught.value)
    with pytest.raises(ValidationError):
        body.model_validate({**least, "unheard_of": 1})


def test_true_is_not_one():
    with pytest.raises(ApiError):
        CompletionRequest.model_validate({"model": "m", "prompt": "a", "best_of": True})


def test_drawing_becomes_the_engines():
    body = ChatRequest.model_validate({**BODIES[ChatRequest][1], "top_p": 0, "seed": -1, "stop": "x", "logit_bias": {}})
    params = body.params(5)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.0, 1.0, 5)
    assert params.seed == 2**63 - 1 and params.stop == ("x",)
    assert ChatRequest.model_validate(BODIES[ChatRequest][1]).params(5).temperature == 1.0
