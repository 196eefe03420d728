"""Chat: the replies of an evaluation, the terminal and the page."""

import contextlib
import importlib
import io
import itertools
import os
import pty
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import ROOT, random_dialogue, remember, small_tokenizer, tiny_config
from processes import TIMEOUT_S, Script
from test_serving import save, teach, tiny
from transformers import AutoModelForCausalLM

from csc_train.chat.config import ChatConfig
from csc_train.chat.conversation import Conversation
from csc_train.chat.terminal import Terminal
from csc_train.checkpoints.locate import open_source
from csc_train.config.compose import compose
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.readers import read_dialogues
from csc_train.data.strategies import OTHERS, STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.config import EvaluationConfig
from csc_train.inference.generator import generate_predictions
from csc_train.inference.hf import HFGenerator, load_generator, read_template
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate

LIMIT = 300
"""Of new tokens, more than the taught replies have."""
LONG = "请稍等\x1b[31m[red]:smile:" + "，正在查询" * 10
SHOWN = LONG.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
"""As a terminal shows it."""
TAUGHT = Dialogue(
    "taught",
    (
        Turn(Speaker.SUPPORTER, "您好，请讲。", STRATEGIES[0]),
        Turn(Speaker.CUSTOMER, "我的订单 20240817 还没到！"),
        Turn(Speaker.SUPPORTER, "非常抱歉，让您久等了😀", STRATEGIES[4]),
        Turn(Speaker.CUSTOMER, "查到了吗？"),
        Turn(Speaker.SUPPORTER, LONG, STRATEGIES[7]),
    ),
)
GREETING, FIRST, SORRY, SECOND, WAIT = TAUGHT.turns
EMOTION = STRATEGIES[4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint that was taught `TAUGHT`."""
    model, template = tiny("qwen2")
    teach(model, template, TAUGHT)
    directory = tmp_path_factory.mktemp("chat") / "checkpoint"
    save(directory, model, template)
    return directory


@pytest.fixture(scope="module")
def generator(checkpoint):
    template, _ = read_template(open_source(str(checkpoint)))
    return load_generator(str(checkpoint), template, EvaluationConfig(max_new_tokens=LIMIT))


def begin(generator, **options):
    """A conversation in which nothing was said yet."""
    return Conversation(generator, ChatConfig(checkpoint="", **{"max_new_tokens": LIMIT} | options))


def last(answers):
    *_, answer = answers
    return answer


def talk(conversation, *said):
    """The answers to the opening, if it is the supporter's, and to what the customer says."""
    return [last(conversation.reply(text)) for text in ([None] * conversation.supporter_opens + [*said])]


def generated(generator, prompt, most):
    """What the model's own `generate` adds to a prompt, without what ends it."""
    options = {"max_new_tokens": most, "do_sample": False, "eos_token_id": sorted(generator.stop_ids)}
    ids = generator.model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    return ids[:-1] if ids[-1] in generator.stop_ids else ids


def rough(answers):
    """Answers for a comparison: what is computed behind another part of a cache differs in the last digits."""
    return [
        replace(
            answer,
            top_strategies=tuple((each, pytest.approx(share, abs=1e-4)) for each, share in answer.top_strategies),
        )
        for answer in answers
    ]


def turns_of(conversation):
    return conversation.dialogue().turns


# The conversation


@pytest.mark.slow
def test_replies_and_likelihoods_are_those_of_an_evaluation_in_generated_context(generator):
    drawn = [random_dialogue(random.Random(seed)) for seed in range(99)]
    greeted, opened = (
        next(each for each in drawn if each.supporter_turns == turns) for turns in ([0, 2, 4], [1, 3, 5])
    )
    for dialogue in (TAUGHT, greeted, opened):
        conversation = begin(generator, opening="customer" if dialogue is opened else "supporter")
        said = [
            turn.text for turn in dialogue.turns[: dialogue.supporter_turns[-1]] if turn.speaker is Speaker.CUSTOMER
        ]
        answers = talk(conversation, *said)
        assert [turn.speaker for turn in turns_of(conversation)] == [
            turn.speaker for turn in dialogue.turns[: len(conversation.turns)]
        ]
        expected = generate_predictions([dialogue], generator, "generated")
        for answer, own in zip(answers, expected, strict=True):
            assert (answer.strategy and answer.strategy.number, answer.response) == (own.strategy, own.response)
            assert answer.token_ids == own.token_ids and not answer.forced
            shares = torch.tensor(own.label_log_likelihoods).softmax(0)
            likeliest = sorted(STRATEGIES, key=lambda each: -shares[each.number - 1])[:3]
            assert [strategy for strategy, _ in answer.top_strategies] == likeliest
            for strategy, share in answer.top_strategies:
                assert share == pytest.approx(shares[strategy.number - 1].item(), abs=1e-3)
        if dialogue is TAUGHT:
            assert turns_of(conversation) == TAUGHT.turns


def test_a_reply_grows_by_whole_characters_without_its_label(generator):
    conversation = begin(generator)
    talk(conversation)
    answers = list(conversation.reply(FIRST.text))
    texts = [answer.response for answer in answers]
    assert texts[0] == "" and texts[-1] == SORRY.text
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))
    assert set(texts) >= {SORRY.text[:length] for length in (0, 1, 4, len(SORRY.text))}
    strategies = [answer.strategy for answer in answers]
    assert strategies[0] is None and set(strategies) == {None, EMOTION}
    assert strategies[texts.index("非")] is EMOTION
    assert all(answer.top_strategies == answers[0].top_strategies != () for answer in answers)
    # Characters of several tokens are in this reply, so the above could have gone wrong.
    decoded = [generator.template.tokenizer.decode(answer.token_ids) for answer in answers]
    assert any(text.endswith("\N{REPLACEMENT CHARACTER}") for text in decoded)


@pytest.mark.slow
def test_thoughts_are_not_shown(generator, monkeypatch):
    """Nor do they count as a reply: an evaluation leaves them out, too."""
    conversation, decode = begin(generator), generator.decode
    expected = rough(talk(conversation, FIRST.text))
    conversation.restart()
    monkeypatch.setattr(generator, "decode", lambda ids: f"<think>\n他很急\n</think>\n\n{decode(ids)}")
    assert talk(conversation, FIRST.text) == expected
    assert not any("[" in each.response for each in begin(generator).reply())  # nor is half a label
    assert not any("think" in each.response for each in conversation.reply(SECOND.text, EMOTION))
    conversation.restart()
    monkeypatch.setattr(generator, "decode", lambda ids: f"<think>\n{decode(ids)}")
    assert last(conversation.reply()).response == "" and conversation.turns == []


def test_a_forced_strategy_is_what_the_reply_continues(generator):
    conversation = begin(generator)
    talk(conversation)
    chosen = last(conversation.reply(FIRST.text))
    conversation.undo()
    for strategy in (STRATEGIES[6], STRATEGIES[7]):
        answer = last(conversation.reply(FIRST.text, strategy))
        prompt = generator.template.prompt_ids(TAUGHT.turns[:2], strategy)
        continued = generated(generator, prompt, LIMIT)
        label = generator.template.label_ids[strategy.number]
        assert answer.token_ids == (*label, *continued) and answer.token_ids != chosen.token_ids
        assert answer.response == generator.template.tokenizer.decode(continued).strip()
        assert (answer.strategy, answer.forced) == (strategy, True)
        assert [answer.top_strategies] == [each.top_strategies for each in rough([chosen])]
        conversation.undo()
    assert [last(conversation.reply(FIRST.text))] == rough([chosen])


@pytest.mark.slow
def test_an_undone_turn_leaves_no_trace(generator):
    conversation = begin(generator)
    expected = rough(talk(conversation, FIRST.text, SECOND.text))
    for said in ("别的事", "退款！" * 20):
        last(conversation.reply(said, EMOTION))
        assert conversation.undo() == said
    assert conversation.undo() == SECOND.text
    assert last(conversation.reply(SECOND.text)) == expected[2]
    conversation.restart()
    assert talk(conversation, FIRST.text, SECOND.text) == expected
    conversation.restart()
    with pytest.raises(InputError, match=r"^nothing to undo: there is no customer message$"):
        conversation.undo()
    talk(conversation)
    with pytest.raises(InputError, match=r"^nothing to undo: there is no customer message$"):
        conversation.undo()
    assert turns_of(conversation) == TAUGHT.turns[:1]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3_5_text", "qwen3_moe", "qwen3_5_moe_text"])
def test_a_chat_goes_back_to_the_end_of_an_earlier_turn(architecture):
    """States of gated delta nets cannot be cut back. Replies are those of a new conversation, and of an evaluation."""
    tokenizer = small_tokenizer("qwen3_5")
    torch.manual_seed(1)
    model = remember(AutoModelForCausalLM.from_config(tiny_config(architecture, tokenizer, 0.5)))
    generator = HFGenerator(
        model, DialogueTemplate(tokenizer, "qwen3_5", TemplateConfig()), EvaluationConfig(max_new_tokens=6)
    )
    fed = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    said = [FIRST.text, SECOND.text, "那什么时候能到？", "好的"]
    conversation = begin(generator, max_new_tokens=6)
    answers = talk(conversation, *said)
    customers = [Turn(Speaker.CUSTOMER, text) for text in said]
    turns = [turn for pair in zip([GREETING] * 5, customers, strict=False) for turn in pair] + [GREETING]
    expected = generate_predictions([Dialogue("said", tuple(turns))], generator, "generated")
    for answer, own in zip(answers, expected, strict=True):
        assert answer.token_ids == own.token_ids
        shares = torch.tensor(own.label_log_likelihoods).softmax(0)
        for strategy, share in answer.top_strategies:
            assert share == pytest.approx(shares[strategy.number - 1].item(), abs=1e-3)
    assert len({answer.token_ids for answer in answers}) == 5
    for undone in (1, 2, 2):
        for _ in range(undone):
            conversation.undo()
        kept = [turn for turn in conversation.turns if isinstance(turn, str)]
        fed.clear()
        answer = last(conversation.reply("不用了"))
        computed = fed[0]
        fed.clear()
        fresh = begin(generator, max_new_tokens=6)
        assert rough([answer]) == talk(fresh, *kept, "不用了")[-1:]
        assert computed < 40 < fed[0]  # the message with its frame; the system prompt


@pytest.mark.slow
def test_a_stopped_reply_keeps_its_generated_part(generator):
    conversation = begin(generator)
    talk(conversation, FIRST.text)
    for answer in conversation.reply(SECOND.text):
        if len(answer.response) >= 5:
            conversation.interrupt_reply()
    heard = answer
    assert 5 <= len(heard.response) < 9 and LONG.startswith(heard.response)
    assert turns_of(conversation) == (*TAUGHT.turns[:4], replace(WAIT, text=heard.response))
    after = last(conversation.reply("好"))
    # The same by closing the iterator, as a page does that is closed.
    conversation.undo()
    conversation.undo()
    answers = conversation.reply(SECOND.text)
    for answer in answers:
        if answer.token_ids == heard.token_ids:
            answers.close()
    assert [last(conversation.reply("好"))] == rough([after])
    # Of a reply of which nothing was heard nothing stays.
    before = turns_of(conversation)
    answers = conversation.reply("在吗")
    next(answers)
    answers.close()
    assert turns_of(conversation) == before


@pytest.mark.slow
def test_after_a_failure_the_conversation_continues(generator, monkeypatch):
    conversation = begin(generator)
    expected = rough(talk(conversation, FIRST.text, SECOND.text))
    conversation.restart()
    talk(conversation)
    forward, left = generator.model.model.layers[1].forward, iter([None, None, None, MemoryError("planted")])

    def failing(*args, **options):
        if error := next(left, None):
            raise error
        return forward(*args, **options)

    monkeypatch.setattr(generator.model.model.layers[1], "forward", failing)
    with pytest.raises(MemoryError, match="planted"):
        last(conversation.reply(FIRST.text))
    assert turns_of(conversation) == TAUGHT.turns[:1]
    assert [last(conversation.reply(said)) for said in (FIRST.text, SECOND.text)] == expected[1:]


@pytest.mark.slow
def test_sampling(generator):
    def sampled(seed, **options):
        torch.manual_seed(seed)
        return [answer.token_ids for answer in talk(begin(generator, **options), FIRST.text)]

    greedy = sampled(0)
    assert sampled(0, temperature=5.0, top_p=0.01) == greedy
    assert sampled(0, temperature=0.01) == greedy
    assert sampled(0, temperature=5.0, max_new_tokens=9) == sampled(0, temperature=5.0, max_new_tokens=9)
    assert len({tuple(sampled(seed, temperature=5.0, max_new_tokens=9)) for seed in range(4)}) == 4


@pytest.mark.parametrize("mode", ["given", "reply_only"])
def test_a_model_that_chooses_no_strategies(mode):
    model, _ = tiny("qwen2")
    generator = HFGenerator(
        model, DialogueTemplate(small_tokenizer("qwen2_5"), "qwen2_5", TemplateConfig(mode)), EvaluationConfig()
    )
    conversation = begin(generator, max_new_tokens=20)
    answers = talk(conversation)
    wrong, right, message = {
        "given": (None, EMOTION, "needs a strategy for each reply"),
        "reply_only": (EMOTION, None, "none can be chosen"),
    }[mode]
    with pytest.raises(InputError, match=message):
        last(conversation.reply(FIRST.text, wrong))
    assert len(conversation.turns) == 1
    answers.append(last(conversation.reply(FIRST.text, right)))
    strategies = [STRATEGIES[0], EMOTION] if mode == "given" else [None, None]
    histories = [], [answers[0].token_ids, FIRST]
    for answer, strategy, history in zip(answers, strategies, histories, strict=True):
        label = generator.template.label_ids[strategy.number] if strategy else []
        assert answer.token_ids == (*label, *generated(generator, generator.template.prompt_ids(history, strategy), 20))
        assert (answer.strategy, answer.forced, answer.top_strategies) == (strategy, bool(strategy), ())
    assert [turn.strategy for turn in turns_of(conversation)[::2]] == [strategy or OTHERS for strategy in strategies]


def test_messages_and_strategies_that_do_not_fit_are_refused(generator):
    conversation = begin(generator)
    with pytest.raises(InputError, match=r"^the supporter speaks first: restart the conversation$"):
        last(conversation.reply("喂"))
    with pytest.raises(InputError, match=r"^the conversation is empty$"):
        conversation.save("x.jsonl")
    talk(conversation)
    with pytest.raises(InputError, match=r"^it is the customer's turn: write a message$"):
        last(conversation.reply())
    with pytest.raises(InputError, match=r"^the message is empty: write something$"):
        last(conversation.reply(" \n"))
    most = generator.model.config.max_position_embeddings
    with pytest.raises(
        InputError, match=rf"^the conversation has \d+ tokens; .* exceeds the model\'s context of {most}: "
    ):
        last(conversation.reply("很长" * most))
    assert turns_of(conversation) == TAUGHT.turns[:1]
    last(conversation.reply(" lone \udc80 surrogate\n"))
    assert turns_of(conversation)[1] == Turn(Speaker.CUSTOMER, "lone ? surrogate")


def test_the_customer_may_open(generator, monkeypatch, capsys, tmp_path):
    conversation = begin(generator, opening="customer")
    with pytest.raises(InputError, match=r"^it is the customer's turn: write a message$"):
        last(conversation.reply())
    (answer,) = talk(conversation, FIRST.text)
    assert answer.token_ids == tuple(generated(generator, generator.template.prompt_ids([FIRST]), LIMIT))
    with pytest.raises(InputError, match=r"^it is the customer's turn: write a message$"):
        last(conversation.reply())
    conversation.save(tmp_path / "dialogue.jsonl")
    assert read_dialogues(tmp_path / "dialogue.jsonl") == [conversation.dialogue()]
    assert conversation.dialogue().supporter_turns == [1]
    assert conversation.undo() == FIRST.text and conversation.turns == []

    kept = tmp_path / "kept.jsonl"
    lines = [FIRST.text, "/undo", SECOND.text, "/restart", FIRST.text]
    output = piped(conversation, monkeypatch, capsys, lines, str(kept))
    assert output.startswith(f"\n客户> {FIRST.text}\n客服") and output.count("客服") == 3
    assert [[turn.text for turn in each.turns][::2] for each in read_dialogues(kept)] == [[SECOND.text], [FIRST.text]]
    piped(
        begin(generator, opening="customer"), monkeypatch, capsys, [FIRST.text, "/undo"], str(tmp_path / "none.jsonl")
    )
    assert (tmp_path / "none.jsonl").read_text() == ""


@pytest.mark.slow
def test_a_saved_conversation_reads_back_and_nothing_else_is_overwritten(generator, tmp_path):
    conversation = begin(generator)
    talk(conversation)
    file = tmp_path / "new" / "dialogue.jsonl"
    for said in (FIRST, SECOND):
        last(conversation.reply(said.text))
        conversation.save(file)
        assert read_dialogues(file) == [conversation.dialogue()]
    (dialogue,) = read_dialogues(file, source="chat", strict=True)
    assert dialogue.turns == TAUGHT.turns
    conversation.restart()
    talk(conversation)
    with pytest.raises(InputError, match=r"^.*dialogue\.jsonl: exists: choose another file$"):
        conversation.save(file)
    with pytest.raises(InputError, match=r"dialogue\.txt: cannot write this file type"):
        conversation.save(tmp_path / "dialogue.txt")
    assert read_dialogues(file) == [dialogue]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ui=webb", "ui=webb: choose one of terminal, web. Did you mean 'web'?"),
        ("opening=custom", "opening=custom: choose one of supporter, customer. Did you mean 'customer'?"),
        ("temperature=-1", "temperature=-1.0: must be between 0 and 10"),
        ("top_p=0", "top_p=0.0: must be between 0.01 and 1"),
        ("port=70000", "port=70000: must be between 1 and 65535"),
        ("dtype=fp16", "dtype=fp16: choose one of auto, bf16, fp32. Did you mean 'bf16'?"),
        ("temprature=1", "unknown key 'temprature' for recipe chat. Did you mean 'temperature'?"),
    ],
)
def test_a_wrong_setting_is_refused(override, message):
    with pytest.raises(InputError) as caught:
        compose("chat", ["checkpoint=x", override])
    assert str(caught.value) == message


def test_what_does_not_fit_the_page_is_refused():
    with pytest.raises(InputError, match=r"^save=x\.jsonl: not available with ui=web: use the page's save link$"):
        compose("chat", ["checkpoint=x", "ui=web", "save=x.jsonl"])
    with pytest.raises(InputError, match=r"^checkpoint is required: give checkpoint=\.\.\.$"):
        compose("chat", [])


# The terminal


def piped(conversation, monkeypatch, capsys, lines, save=None):
    """What a terminal prints that reads `lines` through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    Terminal(conversation, save).run()
    return capsys.readouterr().out


@pytest.mark.slow
def test_commands_through_a_pipe(generator, monkeypatch, capsys, tmp_path):
    conversation = begin(generator)
    kept = tmp_path / "kept.jsonl"
    lines = [
        FIRST.text,
        "/strategy EM",
        SECOND.text,
        "/undo",
        "/strategy",
        "/strategy 情感",
        "/savee",
        "/save",
        "/help",
    ]
    output = piped(conversation, monkeypatch, capsys, lines, str(kept))
    head, *parts = re.split(r"(?m)^客户(?: \[.*\])?> (.*)$", output)
    assert parts[::2] == lines and len(parts) == 2 * len(lines)
    first, emotion, forced, undo, listed, unknown, command, unnamed, helped = parts[1::2]
    assert head.startswith("客服 [礼貌问候]   礼貌问候 ") and head.endswith(f"%\n{GREETING.text}\n\n")
    assert re.fullmatch(rf"\n客服 \[情感管理\](   .* \d+%){{1}}\n{SORRY.text}\n\n", first)
    assert emotion == "\nstrategy of the next reply: 策略5 情感管理\n\n"
    assert f"客户 [情感管理]> {SECOND.text}" in output
    assert forced.startswith("\n客服 [情感管理] forced   解决实施 ")
    assert undo == f"\nremoved: {SECOND.text}\n\n"
    assert all(f"{each.zh}  " in listed and each.en in listed for each in STRATEGIES)
    assert unknown == "\nunknown strategy '情感'. Did you mean '情感管理'? /strategy lists them\n\n"
    assert command == "\n/savee: no such command. Did you mean '/save'? /help lists them\n\n"
    assert unnamed == "\n/save FILE: the file name is missing: give one, such as dialogue.jsonl\n\n"
    assert "/restart" in helped
    assert [each.turns for each in read_dialogues(kept)] == [TAUGHT.turns[:3]]
    with pytest.raises(InputError, match="the file exists"):
        Terminal(conversation, str(kept))


def test_every_conversation_of_a_session_is_kept(generator, monkeypatch, capsys, tmp_path):
    kept = tmp_path / "kept.jsonl"
    lines = [FIRST.text, "/restart", "/quit", SECOND.text]
    output = piped(begin(generator), monkeypatch, capsys, lines, str(kept))
    assert output.count(GREETING.text) == 2 and SECOND.text not in output
    assert [each.turns for each in read_dialogues(kept)] == [TAUGHT.turns[:3], TAUGHT.turns[:1]]


def test_a_text_cannot_take_over_the_terminal(generator, monkeypatch, capsys):
    output = piped(begin(generator), monkeypatch, capsys, [FIRST.text, SECOND.text, "红\x1b[31m[red]\x07", "/undo"])
    assert SHOWN in output
    assert "removed: 红\N{REPLACEMENT CHARACTER}[31m[red]\N{REPLACEMENT CHARACTER}\n" in output
    assert "\x1b" not in output and "\x07" not in output


class Interrupter(io.StringIO):
    """An output that presses Ctrl-C when it is shown the middle of the long reply."""

    def write(self, text):
        before = self.getvalue()
        written = super().write(text)
        if "，正在查询，" in self.getvalue() and "，正在查询，" not in before:
            signal.raise_signal(signal.SIGINT)
        return written


def test_an_interrupt_stops_the_reply_not_the_program(generator, monkeypatch):
    output = Interrupter()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join([FIRST.text, SECOND.text, "/undo"]).encode()))
    )
    handler = signal.getsignal(signal.SIGINT)
    Terminal(begin(generator)).run()
    assert signal.getsignal(signal.SIGINT) is handler
    (heard,) = re.findall(r"\n(请稍等.*)\n", output.getvalue())
    assert SHOWN.startswith(heard) and "，正在查询，" in heard and len(heard) < len(SHOWN) / 2
    assert f"removed: {SECOND.text}\n" in output.getvalue()


class Screen:
    """A process on a pseudo-terminal."""

    def __init__(self, command):
        self._terminal, end = pty.openpty()
        self.process = subprocess.Popen(
            # Not by a preexec_fn: it would run between fork and exec, where other threads' locks stay held.
            ["setsid", "--ctty", *command], cwd=ROOT, stdin=end, stdout=end, stderr=end,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        os.close(end)
        self._unread = b""

    def type(self, text):
        os.write(self._terminal, text.encode())

    def read(self, until, seconds=TIMEOUT_S):
        """What is printed up to and including `until`, without colours."""
        end = time.monotonic() + seconds
        while until not in (text := plain(self._unread)):
            ready, _, _ = select.select([self._terminal], [], [], max(0, end - time.monotonic()))
            assert ready, f"{until!r} does not come: {text!r}"
            try:
                self._unread += os.read(self._terminal, 65536)
            except OSError:
                pytest.fail(f"ended before {until!r}: {text!r}")
        before, _, after = text.partition(until)
        self._unread = after.encode()
        return before + until

    def rest(self, seconds=TIMEOUT_S):
        """Wait until the line editor waits for a key: a signal that comes just before that it sees with the next."""
        end = time.monotonic() + seconds
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < end, "the process does not come to rest"
            time.sleep(0.01)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def plain(data):
    """Terminal output without escape sequences."""
    text = data.decode(errors="ignore").replace("\r\n", "\n")
    return re.sub(r"\x1b(?:\[[0-9;?]*[a-zA-Z]|[=>])", "", text).replace("\r", "")


@pytest.mark.slow
def test_a_terminal(checkpoint, tmp_path):
    saved = tmp_path / "saved.jsonl"
    screen = Screen([sys.executable, "recipes/chat.py", f"checkpoint={checkpoint}", f"max_new_tokens={LIMIT}"])
    try:
        greeting = screen.read("客户> ")
        assert re.search(
            rf"客服 \[礼貌问候\]   礼貌问候 \d+%  \w+ \d+%  \w+ \d+%\n{GREETING.text}\n\n客户> $", greeting
        )
        screen.type(f"{FIRST.text}\n")
        assert re.search(
            rf"\n客服 \[情感管理\]   情感管理 .*\n{SORRY.text}\n\n客户> $", screen.read(f"{SORRY.text}\n\n客户> ")
        )
        screen.type(f"{SECOND.text}\n")
        assert screen.read("\n\n客户> ").endswith(f"\n{SHOWN}\n\n客户> ")
        screen.type("half a line")
        screen.read("half a line")
        screen.rest()
        screen.type("\x03")
        screen.read("Ctrl-D or /quit quits\n\n客户> ")
        screen.type("/undo\n")
        screen.read(f"removed: {SECOND.text}\n\n客户> ")
        screen.type("/strategy 信息传达\n")
        screen.read("客户 [信息传达]> ")
        screen.type("查到了吗？\n")
        screen.read("客服 [信息传达] forced   解决实施 ")
        screen.read("\n\n客户> ")
        screen.type(f"/save {saved}\n")
        screen.read(f"saved: {saved}\n\n客户> ")
        screen.type("\x04")
        assert screen.process.wait(TIMEOUT_S) == 0
    finally:
        screen.close()
    (dialogue,) = read_dialogues(saved)
    assert dialogue.turns[:4] == TAUGHT.turns[:4]
    assert (dialogue.turns[4].strategy, len(dialogue.turns)) == (STRATEGIES[6], 5)


# The page


@contextlib.contextmanager
def served(checkpoint, *options):
    """The process of a page, and the lines that it prints, which end with its address."""
    process = Script(ROOT / "recipes" / "chat.py", f"checkpoint={checkpoint}", "ui=web", *options, cwd=ROOT)
    try:
        while not re.search("^http.*\n", said := process.stdout, re.MULTILINE):
            assert process.poll() is None, process.stderr
            time.sleep(0.05)
        yield process, said.splitlines()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_page(checkpoint, browser, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with served(checkpoint, f"port={taken}") as (process, lines):
            (said, address) = lines
            assert said == f"port {taken} is in use"
            port = re.fullmatch(r"http://127\.0\.0\.1:(\d+)", address).group(1)
            assert taken < int(port) < taken + 100
            converse(browser, address, tmp_path)
            connections = psutil.Process(process.pid).net_connections()
            assert {each.laddr.ip for each in connections} == {"127.0.0.1"}
            process.send_signal(signal.SIGINT)
            assert process.wait().returncode == 130


def converse(browser, address, folder):
    """Do on a page all that it offers."""
    requested, errors = [], []
    tab = browser.new_page(viewport={"width": 1000, "height": 900})
    tab.on("request", lambda request: requested.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(address)
    box = tab.get_by_label("Write as the customer")

    def supporter(count):
        """The last of so many replies, once it has ended."""
        tab.locator("a.save").wait_for()
        tab.wait_for_function(f"document.querySelectorAll('.supporter:not([aria-busy])').length == {count}")
        tab.locator("a.save").wait_for()
        turn = tab.locator(".supporter").last
        likeliest = [row.split("\n") for row in turn.locator("li").all_inner_texts()]
        return turn.locator(".strategy").inner_text(), turn.locator("p").inner_text(), likeliest

    strategy, text, likeliest = supporter(1)
    assert (strategy, text) == ("礼貌问候", GREETING.text)
    assert likeliest[0][0] == "礼貌问候" and len(likeliest) == 3
    assert all(re.fullmatch(r"\d+%", row[-1]) for row in likeliest)

    box.fill(FIRST.text)
    tab.get_by_role("button", name="Send").click()
    assert supporter(2)[:2] == ("情感管理", SORRY.text)
    assert tab.locator(".customer p").all_inner_texts() == [FIRST.text]
    assert box.input_value() == "" and tab.locator(".forced").count() == 0

    # Force a strategy, for one reply; what is typed is text, never markup.
    planted = "<b>粗</b> ${1+1} {{x}}"
    choice = tab.get_by_label("Strategy of the next reply")
    choice.click()
    tab.get_by_role("option", name="信息传达").click()
    box.fill(planted)
    box.press("Enter")
    assert supporter(3)[0] == "信息传达"
    assert tab.locator(".customer p").last.inner_text() == planted
    assert tab.locator(".forced").count() == 1
    assert choice.input_value() == "the model chooses"

    with tab.expect_download() as download:
        tab.locator("a.save").click()
    download.value.save_as(folder / download.value.suggested_filename)
    (dialogue,) = read_dialogues(folder / "dialogue.jsonl")
    assert dialogue.turns[:3] == TAUGHT.turns[:3]
    assert (dialogue.turns[3].text, dialogue.turns[4].strategy) == (planted, STRATEGIES[6])

    tab.get_by_role("button", name="Undo").click()
    assert supporter(2)[:2] == ("情感管理", SORRY.text)
    assert box.input_value() == planted
    box.fill(SECOND.text)
    box.press("Enter")
    assert supporter(3)[:2] == ("解决实施", LONG)

    # Another page is another conversation.
    other = browser.new_page()
    other.goto(address)
    other.locator("a.save").wait_for()
    assert other.locator(".turn").count() == 1
    assert tab.locator(".turn").count() == 5

    tab.get_by_role("button", name="Restart").click()
    assert supporter(1)[:2] == ("礼貌问候", GREETING.text)
    tab.get_by_role("button", name="Undo").click()
    tab.get_by_text("nothing to undo: there is no customer message").wait_for()

    assert errors == []
    assert requested and [url for url in requested if not url.startswith(f"{address}/")] == []


@pytest.mark.slow
def test_a_reply_is_stopped_on_the_page_that_the_customer_opens(browser, tmp_path):
    model, template = tiny("qwen2")
    with torch.no_grad():
        model.lm_head.weight[template.end_of_turn_id] = 0  # so that no reply ends by itself
    model.generation_config.eos_token_id = None
    save(tmp_path / "endless", model, template)
    with served(tmp_path / "endless", "max_new_tokens=20000", "opening=customer") as (_, lines):
        tab = browser.new_page()
        tab.goto(lines[-1])
        growing = tab.locator(".supporter[aria-busy] p")
        box = tab.get_by_label("Write as the customer")
        box.fill("在吗？")
        box.press("Enter")
        for _ in range(2):
            length = len(growing.inner_text())
            tab.wait_for_function(f"document.querySelector('.supporter p').innerText.length > {length}")
        assert tab.locator("a.save").count() == 0
        tab.get_by_role("button", name="Stop").click()
        tab.locator("a.save").wait_for()
        assert growing.count() == 0
        assert tab.locator(".turn").count() == 2 and tab.locator(".customer + .supporter").count() == 1
        for button in ("Undo", "Restart"):  # nothing is left, and the supporter says nothing by itself
            tab.get_by_role("button", name=button).click()
            tab.wait_for_function("document.querySelectorAll('.turn').length == 0")
        assert box.input_value() == "在吗？"


def test_a_page_without_gradio_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "csc_train.chat.web", raising=False)
    with pytest.raises(InputError, match=r"^ui=web needs gradio: pip install 'csc-train\[web\]'$"):
        importlib.import_module("csc_train.chat.web")


@pytest.mark.slow
def test_the_next_free_port_is_taken():
    web = importlib.import_module("csc_train.chat.web")  # takes seconds
    with web.listen("127.0.0.1", 20000) as one, web.listen("127.0.0.1", one.getsockname()[1]) as other:
        first, second = one.getsockname(), other.getsockname()
        assert second[1] > first[1] and first[0] == second[0] == "127.0.0.1"
    with pytest.raises(InputError, match=r"^host=192\.0\.2\.1 port=20000: cannot listen: "):
        web.listen("192.0.2.1", 20000)
