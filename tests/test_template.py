"""Token ids and weights, on small tokenizers of our own and on the published ones."""

import json
import random
from importlib import resources

import jinja2
import pytest
from conftest import SMALL_OF, random_dialogue, real_tokenizer, sampled, small_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.languages import LANGUAGES
from csc_train.data.strategies import STRATEGIES, parse_strategy
from csc_train.errors import InputError
from csc_train.template.chat_templates import chat_template_names
from csc_train.template.config import MODES, TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate, TokenType, _literal_encoder
from csc_train.template.reply import Reply, format_reply, parse_reply
from csc_train.template.segments import Layout
from csc_train.template.system_prompt import system_prompt
from csc_train.template.tokenizer_training import TOKENIZER_STYLES

EMPATHY = parse_strategy("情感管理")
GREETING = parse_strategy("礼貌问候")

TOKENIZERS = [
    *(pytest.param("small", name, id=f"small-{name}") for name in SMALL_OF),
    *(
        pytest.param("real", name, id=f"real-{name}", marks=[pytest.mark.real_tokenizer, *slow])
        for name, slow in ((name, [pytest.mark.slow] * (name != "qwen2_5")) for name in chat_template_names())
    ),
]


@pytest.fixture(scope="module")
def tokenizer_of():
    loaded = {}

    def load(kind, name):
        if (kind, name) not in loaded:
            loaded[kind, name] = small_tokenizer(name) if kind == "small" else real_tokenizer(name)
        return loaded[kind, name]

    return load


def hand_written() -> Dialogue:
    return Dialogue(
        "hand",
        (
            Turn(Speaker.SUPPORTER, "您好", GREETING),
            Turn(Speaker.CUSTOMER, "我很着急"),
            Turn(Speaker.SUPPORTER, "请放心", EMPATHY),
        ),
    )


def weighted_tokens(template: DialogueTemplate, dialogue: Dialogue, **options) -> list[tuple[str, float]]:
    """What follows the prefix, as (decoded token, 1.0 where it is trained and 0.0 elsewhere)."""
    example = template.encode(dialogue, **options)
    start = len(template.prefix_ids)
    assert example.turn_offsets[0] == start
    assert not example.trained[:start].any()
    return [
        (template.tokenizer.decode([token]), weight)
        for token, weight in zip(
            example.input_ids[start:].tolist(), example.trained[start:].astype(float).tolist(), strict=True
        )
    ]


QWEN_OPEN, QWEN_CLOSE = "<|im_start|>", "<|im_end|>"


def test_ids_and_weights_of_a_hand_written_dialogue_qwen():
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    assert weighted_tokens(template, hand_written()) == [
        (QWEN_OPEN, 0), ("assistant", 0), ("\n", 0),
        ("[礼貌问候", 1), ("]", 1), ("您好", 1), (QWEN_CLOSE, 1), ("\n", 0),
        (QWEN_OPEN, 0), ("user", 0), ("\n", 0), ("我很着急", 0), (QWEN_CLOSE, 0), ("\n", 0),
        (QWEN_OPEN, 0), ("assistant", 0), ("\n", 0),
        ("[情感管理", 1), ("]", 1), ("请放心", 1), (QWEN_CLOSE, 1), ("\n", 0),
    ]  # fmt: skip
    vocabulary = template.tokenizer.get_vocab()
    control = [vocabulary[token] for token in ("<|endoftext|>", QWEN_OPEN, QWEN_CLOSE, "<tool_call>")]
    example = template.encode(hand_written())
    assert example.input_ids[0] == control[1]
    assert template.end_of_turn_id == control[2]
    assert example.turn_offsets.tolist()[1:] == [
        template.encode(hand_written()).turn_offsets[0] + n for n in (8, 14, 22)
    ]


def test_ids_and_weights_of_a_hand_written_dialogue_llama():
    template = DialogueTemplate(small_tokenizer("llama3_1"), "llama3_1", TemplateConfig())
    head, tail, end = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    assert weighted_tokens(template, hand_written()) == [
        (head, 0), ("assistant", 0), (tail, 0), ("\n\n", 0), ("[礼貌问候", 1), ("]", 1), ("您好", 1), (end, 1),
        (head, 0), ("user", 0), (tail, 0), ("\n\n", 0), ("我很着急", 0), (end, 0),
        (head, 0), ("assistant", 0), (tail, 0), ("\n\n", 0), ("[情感管理", 1), ("]", 1), ("请放心", 1), (end, 1),
    ]  # fmt: skip
    assert template.tokenizer.decode(template.prefix_ids).startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n你是一名专业的客服"
    )


def test_qwen3_carries_an_untrained_empty_think_block_in_every_assistant_header():
    template = DialogueTemplate(small_tokenizer("qwen3"), "qwen3", TemplateConfig())
    tokens = weighted_tokens(template, hand_written())
    header = [(QWEN_OPEN, 0), ("assistant", 0), ("\n", 0), ("<think>", 0), ("\n\n", 0), ("</think>", 0), ("\n\n", 0)]
    assert tokens[:7] == header
    assert tokens[7:12] == [("[礼貌问候", 1), ("]", 1), ("您好", 1), (QWEN_CLOSE, 1), ("\n", 0)]
    assert tokens[18:25] == header


@pytest.mark.parametrize(
    ("mode", "trained"),
    [
        ("joint", ["[礼貌问候", "]", "您好", QWEN_CLOSE, "[情感管理", "]", "请放心", QWEN_CLOSE]),
        ("given", ["您好", QWEN_CLOSE, "请放心", QWEN_CLOSE]),
        ("reply_only", ["您好", QWEN_CLOSE, "请放心", QWEN_CLOSE]),
    ],
)
def test_what_is_trained_in_each_mode(mode, trained):
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode=mode))
    tokens = weighted_tokens(template, hand_written())
    assert [token for token, weight in tokens if weight] == trained
    assert ("[礼貌问候" in [token for token, _ in tokens]) == (mode != "reply_only")


def test_only_target_turns_are_trained():
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    trained = [token for token, weight in weighted_tokens(template, hand_written(), targets=[2]) if weight]
    assert trained == ["[情感管理", "]", "请放心", QWEN_CLOSE]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), TOKENIZERS)
def test_a_token_across_the_bracket_belongs_to_the_strategy(kind, name, tokenizer_of):
    """`[情感管理][手机号码]` may hold a token `][`: in mode `given` it is handed in, so it is not trained."""
    tokenizer = tokenizer_of(kind, name)
    template = DialogueTemplate(tokenizer, name, TemplateConfig(mode="given"))
    turns = (Turn(Speaker.SUPPORTER, "[手机号码]已登记", EMPATHY),)
    example = template.encode(Dialogue("d", turns))
    trained = tokenizer.decode(example.input_ids[example.trained].tolist())
    end = tokenizer.decode([template.end_of_turn_id])
    straddles = "][" in tokenizer.get_vocab()
    assert trained == ("手机号码]已登记" if straddles else "[手机号码]已登记") + end
    if kind == "real":
        assert straddles


@pytest.mark.parametrize(("kind", "name"), TOKENIZERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_strategys_tokens_are_those_that_start_in_its_label(kind, name, language, tokenizer_of):
    """By where each token starts in the text, whether or not the label's own ids are found at the head."""
    template = DialogueTemplate(tokenizer_of(kind, name), name, TemplateConfig(language=language))
    rng = random.Random(7)
    found = 0
    for head in ("", "]", "]]", "](", '"', ")", "]\n", "\u0301", "\u0338", "\u200d", "。", "\u3000x", " x"):
        for strategy in STRATEGIES:
            text = head + random_dialogue(rng).turns[0].text
            label = format_reply(Reply(strategy, ""), language)
            encoding = template._literal.encode(label + text, add_special_tokens=False)
            expected = sum(start < len(label) for start, _ in encoding.offsets)
            example = template.encode(Dialogue("d", (Turn(Speaker.SUPPORTER, text, strategy),)))
            assert example.input_ids[example.trained].tolist() == [*encoding.ids, template.end_of_turn_id]
            assert (example.token_types == TokenType.STRATEGY).sum() == expected, (label, text)
            label_ids = template._literal.encode(label, add_special_tokens=False).ids
            found += encoding.ids[: len(label_ids)] != label_ids
    if kind == "real":
        assert found  # tokens across the bracket


@pytest.mark.parametrize(("kind", "name"), TOKENIZERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("language", sampled(LANGUAGES, 2))
def test_segments_equal_the_jinja_rendering(kind, name, mode, language, tokenizer_of):
    tokenizer = tokenizer_of(kind, name)
    template = DialogueTemplate(tokenizer, name, TemplateConfig(mode, language))
    rng = random.Random(1)
    dialogues = [random_dialogue(rng) for _ in range(40)]
    for dialogue, example in zip(dialogues, template.encode_all(dialogues), strict=True):
        text = template.render(dialogue.turns)
        assert example.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def stock_template(name: str) -> str:
    """A published chat template that TRL carries: for Llama 3.1 the official one with its date lines."""
    return resources.files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


def as_content(dialogue: Dialogue) -> list[dict[str, str]]:
    """The dialogue's messages as anybody without this project would write them: the strategy is part of the content."""
    names = {Speaker.CUSTOMER: "user", Speaker.SUPPORTER: "assistant"}
    labels = [f"[{turn.strategy.zh}]" if turn.strategy else "" for turn in dialogue.turns]
    return [
        {"role": "system", "content": system_prompt("joint", "zh")},
        *(
            {"role": names[turn.speaker], "content": label + turn.text}
            for turn, label in zip(dialogue.turns, labels, strict=True)
        ),
    ]


@pytest.mark.real_tokenizer
@pytest.mark.parametrize(
    ("tokenizer_name", "name", "stock"),
    sampled(
        [
            ("qwen2_5", "qwen2_5", None),
            ("qwen2_5", "qwen2_5", "qwen2_5"),
            ("qwen3", "qwen2_5", "qwen3_instruct_2507"),
            ("llama3_1", "llama3_1", "llama3_1"),
        ],
        4,
    ),
    ids=["qwen2_5-own", "qwen2_5-trl", "qwen3_instruct_2507-trl", "llama3_1-trl"],
)
def test_ids_equal_the_stock_chat_template(tokenizer_name, name, stock, tokenizer_of):
    tokenizer = tokenizer_of("real", tokenizer_name)
    template = DialogueTemplate(tokenizer, name, TemplateConfig())
    rng = random.Random(2)
    dialogues = [random_dialogue(rng) for _ in range(200)]
    for dialogue, example in zip(dialogues, template.encode_all(dialogues), strict=True):
        expected = tokenizer.apply_chat_template(
            as_content(dialogue),
            chat_template=stock_template(stock) if stock else None,
            date_string="26 Jul 2024",
            return_dict=False,
        )
        assert example.input_ids.tolist() == expected


@pytest.mark.slow
@pytest.mark.real_tokenizer
def test_qwen3_equals_stock_without_thinking_turn_by_turn_and_differs_from_it_as_a_whole(tokenizer_of):
    tokenizer = tokenizer_of("real", "qwen3")
    template = DialogueTemplate(tokenizer, "qwen3", TemplateConfig())
    think = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    rng = random.Random(3)
    dialogues = [random_dialogue(rng) for _ in range(200)]
    for dialogue, example in zip(dialogues, template.encode_all(dialogues), strict=True):
        ids, chat = example.input_ids.tolist(), as_content(dialogue)
        for index in dialogue.supporter_turns:
            stock = tokenizer.apply_chat_template(
                chat[index + 1 : index + 2], add_generation_prompt=False, tokenize=False
            )
            # Stock's generation prompt, after a history of the turn before alone, then the reply and the end token.
            before = chat[: 1 + index][-1:]
            prompt = tokenizer.apply_chat_template(
                before, add_generation_prompt=True, enable_thinking=False, tokenize=False
            )
            header = prompt[prompt.rindex("<|im_start|>assistant") :]
            expected = tokenizer(header + chat[index + 1]["content"] + "<|im_end|>\n", add_special_tokens=False)
            start, end = example.turn_offsets[index], example.turn_offsets[index + 1]
            assert ids[start:end] == expected["input_ids"]
            assert stock.endswith(chat[index + 1]["content"] + "<|im_end|>\n")
        whole = tokenizer.apply_chat_template(chat, return_dict=False)
        if len(dialogue.supporter_turns) > 1:
            # Stock writes the block on the last turn alone (none at all where the customer has the last word).
            assert whole != ids
            assert _without(whole, think) == _without(ids, think)


NO_THINK = {
    "qwen3_5_nothink_training": {},
    "qwen3_5_think_training": {},
    "qwen3_6": {"preserve_thinking": True},
    "qwen3_6_training": {},
    "qwen3_8": {"enable_thinking": False},
    "qwen3_8_training": {"enable_thinking": False},
}
"""Templates that TRL carries, with what makes them write an empty think block in every assistant header."""


def spoken_to(seed: int, count: int) -> list[Dialogue]:
    """Dialogues in which the customer speaks, without whom the stock templates of Qwen3.5, 3.6 and 3.8 raise."""
    rng = random.Random(seed)
    dialogues = (random_dialogue(rng) for _ in range(2 * count))
    return [each for each in dialogues if len(each.turns) > 1][:count]


@pytest.mark.slow
@pytest.mark.real_tokenizer
@pytest.mark.parametrize("stock", NO_THINK)
def test_qwen3_5_equals_stock_that_keeps_the_think_blocks(stock, tokenizer_of):
    tokenizer, options = tokenizer_of("real", "qwen3_5"), {"chat_template": stock_template(stock)} | NO_THINK[stock]
    template = DialogueTemplate(tokenizer, "qwen3_5", TemplateConfig())
    dialogues = spoken_to(5, 60)
    for dialogue, example in zip(dialogues, template.encode_all(dialogues), strict=True):
        ids, chat = example.input_ids.tolist(), as_content(dialogue)
        assert tokenizer.apply_chat_template(chat, return_dict=False, **options) == ids
        for index in dialogue.supporter_turns:
            prompt = template.prompt_ids(dialogue.turns[:index])
            assert prompt == ids[: len(prompt)]
            if index:
                asked = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": False} | options
                assert tokenizer.apply_chat_template(chat[: index + 1], **asked) == prompt


@pytest.mark.slow
@pytest.mark.real_tokenizer
@pytest.mark.parametrize("stock", ["qwen3_5_nothink", "qwen3_5_think", "qwen3_6"])
def test_qwen3_5_equals_stock_but_for_the_think_blocks_of_earlier_replies(stock, tokenizer_of):
    tokenizer = tokenizer_of("real", "qwen3_5")
    template = DialogueTemplate(tokenizer, "qwen3_5", TemplateConfig())
    options = {"chat_template": stock_template(stock), "enable_thinking": False, "return_dict": False}
    think = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    for dialogue in spoken_to(6, 60):
        chat = as_content(dialogue)
        for index in dialogue.supporter_turns[dialogue.turns[0].speaker is Speaker.SUPPORTER :]:
            prompt = template.prompt_ids(dialogue.turns[:index])
            asked = tokenizer.apply_chat_template(chat[: index + 1], add_generation_prompt=True, **options)
            assert (asked == prompt) == (index == 1)  # with earlier replies, stock's prompt is no longer ours
            assert _without(asked, think) == _without(prompt, think) and asked[-len(think) :] == think
            # What is behind the customer's last words is the same: header, think block, reply, end of turn.
            replied = tokenizer.apply_chat_template(chat[: index + 2], **options)
            ids = template.encode(Dialogue("so far", dialogue.turns[: index + 1])).input_ids.tolist()
            assert (
                replied[len(asked) - len(template.supporter_header_ids) :]
                == (ids[len(prompt) - len(template.supporter_header_ids) :])
            )


@pytest.mark.parametrize("stock", ["qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"])
def test_where_stock_templates_of_qwen3_5_fail_ours_does_not(stock):
    """As docs/launching.md says of servers with the stock template."""
    tokenizer, source = small_tokenizer("qwen3_5"), stock_template(stock)
    template = DialogueTemplate(tokenizer, "qwen3_5", TemplateConfig())

    def text_of(chat, name=source, **options):
        return tokenizer.apply_chat_template(chat, chat_template=name, tokenize=False, **options)

    ours, chat = template.chat_template, as_content(hand_written())
    # Before the customer speaks.
    for begun in (chat[:1], chat[:2]):
        with pytest.raises(jinja2.TemplateError, match=r"^No user query found in messages\.$"):
            text_of(begun, add_generation_prompt=True)
        assert tokenizer.encode(text_of(begun[:1], ours, add_generation_prompt=True)) == template.prompt_ids([])
    greeting = Layout(user_first=True).arrange(chat[0]["content"], "你好", [])  # as llm.user_first=true asks
    assert text_of(greeting, add_generation_prompt=True, enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    # It thinks, unless told not to: the small models of Qwen3.5 only if told to.
    prompt = text_of(chat[:3], ours, add_generation_prompt=True)
    asked = text_of(chat[:3], add_generation_prompt=True)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert asked.endswith("assistant\n<think>\n") == (stock != "qwen3_5_nothink")
    assert ("Reasoning effort is set to xhigh." in asked) == (stock == "qwen3_8")
    assert text_of(chat[:3], ours, add_generation_prompt=True, enable_thinking=True) == prompt
    # A closing think tag in a reply: 3.5 and 3.6 take what is before it for thoughts.
    chat[1]["content"] = " [礼貌问候]您好</think>请讲\n\n"
    chat[2]["content"] = "\t你好  "
    written = text_of(chat[:3], ours)
    assert (text_of(chat[:3], enable_thinking=False) == written) == (stock == "qwen3_8")
    assert written.endswith(
        "assistant\n<think>\n\n</think>\n\n[礼貌问候]您好</think>请讲<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("stock", "ours"),
    [("qwen3", "qwen3"), *((name, "qwen3_5") for name in ("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"))],
)
def test_a_stock_template_that_does_not_fit_is_refused_with_the_name_of_ours(stock, ours):
    tokenizer = small_tokenizer(ours)
    tokenizer.chat_template = stock_template(stock)
    with pytest.raises(InputError, match=rf"^chat template auto: it.*: choose {ours}, which fits this tokenizer$"):
        DialogueTemplate(tokenizer, "auto", TemplateConfig())


@pytest.mark.slow
@pytest.mark.real_tokenizer
@pytest.mark.parametrize(("name", "style"), SMALL_OF.items())
def test_trained_tokenizers_split_texts_as_published_ones(name, style, tokenizer_of):
    published, ours = json.loads(tokenizer_of("real", name).backend_tokenizer.to_str()), TOKENIZER_STYLES[style]
    assert published["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == ours["pattern"]
    assert (published["normalizer"] or {}).get("type") == ours["normalizer"]
    added = {token["content"]: token["special"] for token in published["added_tokens"]}
    controls = dict.fromkeys(ours["plain"], False) | dict.fromkeys(ours["special"], True)
    assert {token: added.get(token, special) for token, special in controls.items()} == controls


def test_qwen3_5_takes_contents_in_parts_as_servers_of_vision_language_models_pass_them():
    template = DialogueTemplate(small_tokenizer("qwen3_5"), "qwen3_5", TemplateConfig())
    tokenizer, chat = template.tokenizer, template.messages(hand_written().turns)
    tokenizer.chat_template = template.chat_template
    parts = [each | {"content": [{"type": "text", "text": text} for text in each["content"]]} for each in chat]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == template.render(hand_written().turns)
    for part in ({"type": "image", "url": "1.png"}, {"type": "video", "text": "x"}, {"image": "1.png"}):
        parts[2]["content"].append(part)
        with pytest.raises(
            jinja2.TemplateError, match=r"^This model was trained on text: take images, videos and sound out of .*\.$"
        ):
            tokenizer.apply_chat_template(parts, tokenize=False)
        parts[2]["content"].pop()


def _without(ids: list[int], block: list[int]) -> list[int]:
    result, position = [], 0
    while position < len(ids):
        if ids[position : position + len(block)] == block:
            position += len(block)
        else:
            result.append(ids[position])
            position += 1
    return result


@pytest.mark.parametrize(("kind", "name"), TOKENIZERS)
def test_every_control_string_in_a_text_is_encoded_literally(kind, name, tokenizer_of):
    tokenizer = tokenizer_of(kind, name)
    template = DialogueTemplate(tokenizer, name, TemplateConfig())
    controls = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    plain = (
        Turn(Speaker.SUPPORTER, "甲", GREETING),
        Turn(Speaker.CUSTOMER, "乙"),
        Turn(Speaker.SUPPORTER, "丙", EMPATHY),
    )
    expected = [
        token for token in template.encode(Dialogue("p", plain)).input_ids.tolist() if token in controls.values()
    ]
    for control in controls:
        texts = [f"前{control}后", control, f"{control}{control}x"]
        turns = tuple(Turn(turn.speaker, text, turn.strategy) for turn, text in zip(plain, texts, strict=True))
        example = template.encode(Dialogue("c", turns))
        ids = example.input_ids.tolist()
        assert [token for token in ids if token in controls.values()] == expected, control
        for index, (turn, text) in enumerate(zip(turns, texts, strict=True)):
            piece = tokenizer.decode(ids[example.turn_offsets[index] : example.turn_offsets[index + 1]])
            content = text if turn.speaker is Speaker.CUSTOMER else format_reply(Reply(turn.strategy, text), "zh")
            assert content in piece


@pytest.mark.parametrize(("kind", "name"), TOKENIZERS)
def test_ordinary_text_keeps_its_ids(kind, name, tokenizer_of):
    tokenizer = tokenizer_of(kind, name)
    template = DialogueTemplate(tokenizer, name, TemplateConfig())
    for text in ("您好，我的订单20240817还没到！", "Don't worry 😀", "[手机号码]"):
        prompt = template.prompt_ids([Turn(Speaker.CUSTOMER, text)])
        assert (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            == prompt[
                len(template.prefix_ids) + len(template.customer_header_ids) : -len(template.supporter_header_ids)
                - len(template.customer_footer_ids)
            ]
        )


@pytest.mark.parametrize(("kind", "name"), TOKENIZERS)
def test_ids_of_a_turn_do_not_depend_on_later_turns(kind, name, tokenizer_of):
    template = DialogueTemplate(tokenizer_of(kind, name), name, TemplateConfig())
    rng = random.Random(4)
    for _ in range(20):
        dialogue = random_dialogue(rng)
        whole = template.encode(dialogue)
        for length in range(len(dialogue.turns)):
            part = template.encode(Dialogue("part", dialogue.turns[:length]))
            assert part.input_ids.tolist() == whole.input_ids[: whole.turn_offsets[length]].tolist()
            if dialogue.turns[length].speaker is Speaker.SUPPORTER:
                prompt = template.prompt_ids(dialogue.turns[:length])
                assert prompt == whole.input_ids[: len(prompt)].tolist()
                assert whole.trained[len(prompt)]
                assert not whole.trained[len(prompt) - 1]


def test_generated_ids_enter_the_prompt_as_they_are():
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig())
    tokenizer = template.tokenizer
    odd_split = [tokenizer.get_vocab()["["], *tokenizer("礼貌问候", add_special_tokens=False)["input_ids"]]
    prompt = template.prompt_ids([odd_split, Turn(Speaker.CUSTOMER, "我很着急")])
    customer = tokenizer("<|im_start|>user\n我很着急<|im_end|>\n", add_special_tokens=False)["input_ids"]
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    footer = tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert prompt == template.prefix_ids + header + odd_split + footer + customer + header


def test_mode_given_puts_the_strategy_into_the_prompt():
    template = DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode="given"))
    assert template.tokenizer.decode(template.prompt_ids([], EMPATHY)).endswith("<|im_start|>assistant\n[情感管理]")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.code)
def test_the_parser_inverts_the_format(language, strategy):
    for response in ("请放心", "[手机号码]已登记", "第一行\n第二行", "", "带]的[文字", "策略5"):
        reply = Reply(strategy, response)
        assert parse_reply(format_reply(reply, language)) == reply


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" [情感管理] 请放心 ", Reply(EMPATHY, "请放心")),
        ("[策略5 情感管理]请放心", Reply(EMPATHY, "请放心")),
        ("请放心", Reply(None, "请放心")),
        ("[手机号码]请放心", Reply(None, "[手机号码]请放心")),
        ("好的[情感管理]请放心", Reply(None, "好的[情感管理]请放心")),
        ("[情感管理", Reply(None, "[情感管理")),
        ("[情感管理+礼貌问候]请放心", Reply(None, "[情感管理+礼貌问候]请放心")),
        ("【情感管理】请放心", Reply(None, "【情感管理】请放心")),
        ("", Reply(None, "")),
        *(
            (f"{mark}[情感管理]{mark}请放心", Reply(EMPATHY, f"{mark}请放心"))
            for mark in ("\u200b", "\ufeff", "\u2060\x00")
        ),
        ("\ufeff \u200b[\u200b情感管理\u200b]\n请放心", Reply(EMPATHY, "请放心")),
        ("[情感管理]\u200b\ufeff", Reply(EMPATHY, "")),
        ("\u200b\u3164", Reply(None, "")),
        ("\u200b请放心❤\ufe0f", Reply(None, "\u200b请放心❤\ufe0f")),
    ],
)
def test_what_the_parser_makes_of_a_text(text, expected):
    assert parse_reply(text) == expected


def test_the_system_prompt_names_every_strategy_with_its_definition():
    for language in LANGUAGES:
        prompt = system_prompt("joint", language)
        for strategy in STRATEGIES:
            assert f"{strategy.number}. {strategy.name(language)}" in prompt
            assert strategy.definition(language) in prompt
        assert prompt == prompt.strip()
        assert STRATEGIES[4].name(language) not in system_prompt("reply_only", language)


def test_a_tokenizer_of_another_family_is_refused():
    with pytest.raises(InputError, match="no control token"):
        DialogueTemplate(small_tokenizer("llama3_1"), "qwen2_5", TemplateConfig())


def test_the_fingerprint_tells_modes_languages_and_templates_apart():
    tokenizer = small_tokenizer("qwen2_5")
    configs = [TemplateConfig(mode, language) for mode in MODES for language in LANGUAGES]
    prints = {
        DialogueTemplate(tokenizer, name, config).fingerprint for config in configs for name in ("qwen2_5", "qwen3")
    }
    assert len(prints) == 12


@pytest.mark.parametrize("system", ["", "Be brief."], ids=["no-system", "own-system"])
@pytest.mark.parametrize("kind, name", TOKENIZERS)
def test_a_chat_has_no_label_and_no_prompt_of_ours(tokenizer_of, kind, name, system):
    template = DialogueTemplate(tokenizer_of(kind, name), name, TemplateConfig())
    texts = ("2+2?", "4", "And (3) more? é", "It is 7.")
    turns = tuple(Turn((Speaker.CUSTOMER, Speaker.SUPPORTER)[i % 2], text) for i, text in enumerate(texts))
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    whole = template._render([{"role": "system", "content": system}] * bool(system) + messages)
    example = template.encode(Dialogue("chat", turns, kind="chat", system=system))
    ids = example.input_ids.tolist()
    assert ids == template.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert set(example.token_types.tolist()) == {TokenType.CONTEXT, TokenType.REPLY}
    assert not example.strategies.any() and template.end_of_turn_id in example.input_ids[example.trained]
    assert system_prompt("joint", "zh")[:20] not in whole
    written = Turn(Speaker.CUSTOMER, template.tokenizer.decode([template.end_of_turn_id]))
    literal = template.encode(Dialogue("chat", (written, turns[1]), kind="chat", system=system))
    ends = (literal.input_ids[literal.turn_offsets[0] :] == template.end_of_turn_id).sum()
    assert ends == 2  # of the two turns; the one in the text is plain characters


@pytest.mark.parametrize("nested", [False, True])
def test_a_content_gets_no_space_of_a_text_s_start_and_the_tokenizer_keeps_its_rule(nested):
    rule = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend = Tokenizer(models.WordLevel({"▁a": 0, "a": 1, "▁b": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([rule]) if nested else rule
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert _literal_encoder(tokenizer).encode("a b").ids == [1, 2]
    assert tokenizer("a b")["input_ids"] == [0, 2]
