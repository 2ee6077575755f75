"""The official client, endpoint by endpoint."""

import json

import openai
import pytest

HELLO = [{"role": "user", "content": "The code of the gate is"}]
SHAPE = {
    "type": "object",
    "properties": {"place": {"enum": ["gate", "pier"]}, "open": {"type": "boolean"}},
    "required": ["place", "open"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SHAPE}} for name in ("look_up", "open_gate")
]  # fmt: skip


def chat(live, **how):
    return live.client.chat.completions.create(
        model=live.model, messages=how.pop("messages", HELLO), **{"temperature": 0, "max_tokens": 12, **how}
    )


def together(chunks):
    """The text of a stream's first choice, its reason, and the usage that its last chunk tells."""
    text, reason, usage = "", None, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.index == 0:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
    return text, reason, usage


def test_models_are_listed_and_shown(live):
    listed = live.client.models.list().data
    assert [each.id for each in listed] == [live.model]
    assert live.client.models.retrieve(live.model).id == live.model


def test_a_stream_is_the_whole_answer(live):
    whole = chat(live)
    text, reason, usage = together(chat(live, stream=True, stream_options={"include_usage": True}))
    assert text == whole.choices[0].message.content and reason == whole.choices[0].finish_reason == "length"
    assert usage.completion_tokens == whole.usage.completion_tokens == 12
    assert usage.prompt_tokens == whole.usage.prompt_tokens > 5
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0


def test_temperature_0_is_the_engines_greedy_answer(live):
    model = live.llm.model
    prompt = model.chat(HELLO)
    context = live.llm.new_context(live.llm.attention)
    tokens, logits = [], context.step(model.tokens(prompt))
    for _ in range(12):
        tokens.append(int(logits.argmax()))
        logits = context.step(tokens[-1:])
    assert chat(live).choices[0].message.content == model.decode(tokens)


def test_stop_ends_before_the_string_whatever_the_tokens(live):
    text = chat(live, max_tokens=24).choices[0].message.content
    stop = text[9:13]
    assert len(stop) == 4
    cut = text[: text.index(stop)]
    answer = chat(live, max_tokens=24, stop=[stop, "nowhere in it"])
    assert answer.choices[0].message.content == cut and answer.choices[0].finish_reason == "stop"
    assert together(chat(live, max_tokens=24, stop=stop, stream=True))[0] == cut


def test_a_seed_repeats_and_choices_differ(live):
    first = chat(live, temperature=1, seed=7, n=2)
    again = chat(live, temperature=1, seed=7, n=2)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1] and [choice.index for choice in first.choices] == [0, 1]


def test_logprobs_are_of_the_tokens_that_came(live):
    answer = chat(live, logprobs=True, top_logprobs=3, max_tokens=5).choices[0]
    told = answer.logprobs.content
    assert len(told) == 5 and all(len(each.top_logprobs) == 3 for each in told)
    joined = b"".join(bytes(each.bytes) for each in told).decode("utf-8", "replace")
    assert joined == answer.message.content
    assert all(each.logprob == each.top_logprobs[0].logprob for each in told), "greedy takes the likeliest"


def test_a_bias_decides(live):
    token = live.llm.model.tokens("pier")[0]
    answer = chat(live, logit_bias={str(token): 100}, max_tokens=3)
    assert answer.choices[0].message.content == live.llm.model.decode([token] * 3)


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_followed(live, seed):
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SHAPE, "strict": True}}
    answer = chat(live, response_format=form, temperature=1.5, seed=seed, max_tokens=200).choices[0]
    assert answer.finish_reason == "stop"
    value = json.loads(answer.message.content)
    assert value["place"] in ("gate", "pier") and isinstance(value["open"], bool) and len(value) == 2


@pytest.mark.parametrize("parallel", [True, False])
def test_tools_are_called(live, parallel):
    how = dict(tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel, temperature=1, max_tokens=400)
    how["logit_bias"] = {str(each): 4 for each in live.llm.model.end_tokens}  # where a call may be the last
    counts = set()
    for seed in range(2):
        choice = chat(live, seed=seed, **how).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        for call in choice.message.tool_calls:
            assert call.function.name in ("look_up", "open_gate")
            assert set(json.loads(call.function.arguments)) == {"place", "open"}
        counts.add(len(choice.message.tool_calls))
        streamed = [
            (call.index, call.function.name, call.function.arguments)
            for chunk in chat(live, seed=seed, stream=True, **how)
            for call in (chunk.choices[0].delta.tool_calls or ())
        ]
        assert streamed == [
            (at, call.function.name, call.function.arguments) for at, call in enumerate(choice.message.tool_calls)
        ]
    assert counts == {1} if not parallel else counts


def test_a_tools_answer_goes_on(live):
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7315"},
    ]
    named = {"type": "function", "function": {"name": "open_gate"}}
    answer = chat(live, messages=messages, tools=TOOLS, tool_choice=named, max_tokens=200)
    assert answer.choices[0].message.tool_calls[0].function.name == "open_gate"


def test_completions_score_a_prompt(live):
    model = live.llm.model
    tokens = model.tokens("The ferry to Oslo leaves")
    how = dict(model=live.model, max_tokens=1, temperature=0, logprobs=2, echo=True, seed=1)
    one, two = live.client.completions.create(prompt=[tokens, tokens[:4]], **how).choices
    assert one.text.startswith("The ferry to Oslo leaves") and len(one.logprobs.tokens) == len(tokens) + 1
    assert one.logprobs.token_logprobs[0] is None and one.logprobs.top_logprobs[0] is None
    assert one.logprobs.token_logprobs[1:4] == pytest.approx(two.logprobs.token_logprobs[1:4], abs=1e-4)
    context = live.llm.new_context(live.llm.attention)
    row = context.step(tokens[:-1]).log_softmax(-1)
    assert one.logprobs.token_logprobs[len(tokens) - 1] == pytest.approx(float(row[tokens[-1]]), abs=1e-4)
    text = live.client.completions.create(prompt="The ferry to Oslo leaves", **how).choices[0]
    assert text.logprobs.token_logprobs == one.logprobs.token_logprobs
    scored = live.client.completions.create(prompt=tokens, **{**how, "max_tokens": 0})
    assert scored.choices[0].logprobs.token_logprobs == one.logprobs.token_logprobs[:-1]
    assert scored.usage.completion_tokens == 0


def test_completions_stream(live):
    how = dict(model=live.model, prompt=["The gate", "The pier"], temperature=0, max_tokens=6, n=2, echo=True)
    whole = [choice.text for choice in live.client.completions.create(**how).choices]
    texts = [""] * 4
    for chunk in live.client.completions.create(stream=True, **how):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == whole and whole[0] == whole[1] != whole[2]


def test_responses(live):
    how = dict(model=live.model, input="The gate", instructions="Be brief.", temperature=0, max_output_tokens=8)
    whole = live.client.responses.create(**how)
    assert whole.status == "incomplete" and whole.usage.output_tokens == 8
    kinds, text = [], ""
    for event in live.client.responses.create(stream=True, **how):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == whole.output_text and kinds[0] == "response.created" and kinds[-1] == "response.incomplete"
    form = {"format": {"type": "json_schema", "name": "place", "schema": SHAPE}}
    shaped = live.client.responses.create(model=live.model, input="Where?", text=form, max_output_tokens=200)
    assert shaped.status == "completed" and set(json.loads(shaped.output_text)) == {"place", "open"}


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"gate": 1}}, "logit_bias"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
         "response_format"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"citations": True}}, "citations"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused(live, how, field):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(live, **how)
    assert caught.value.param == field and caught.value.type == "invalid_request_error"
    assert "\n" not in caught.value.body["message"]


def test_an_unknown_model_and_a_long_prompt(live):
    with pytest.raises(openai.NotFoundError, match=live.model):
        live.client.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as caught:
        chat(live, messages=[{"role": "user", "content": "gate " * 1500}], stream=True)
    assert caught.value.code == "context_length_exceeded"


def test_neutral_values_are_taken(live):
    answer = chat(live, store=False, service_tier="auto", metadata={}, modalities=["text"], user="somebody")
    assert answer.choices[0].message.content
