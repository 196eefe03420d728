"""The taxonomy as published, and which labels name a strategy."""

import pytest

from csc_train.data.strategies import CLOSURE, GREETING, OTHERS, STRATEGIES, Stage, parse_strategy

PUBLISHED = [
    (1, "礼貌问候", "Greeting", "GT", Stage.CONNECTING),
    (2, "确认身份", "Identity Verification", "IV", Stage.CONNECTING),
    (3, "重述或转述", "Restatement or Paraphrasing", "RP", Stage.IDENTIFYING),
    (4, "细化问题", "Problem Refinement", "PR", Stage.IDENTIFYING),
    (5, "情感管理", "Emotional Management", "EM", Stage.IDENTIFYING),
    (6, "提供建议", "Providing Suggestions", "PS", Stage.EXPLORING),
    (7, "信息传达", "Information Delivery", "ID", Stage.EXPLORING),
    (8, "解决实施", "Resolution Implementation", "RI", Stage.RESOLVING),
    (9, "反馈请求", "Feedback Request", "FR", Stage.RESOLVING),
    (10, "关系延续", "Relationship Continuation", "RC", Stage.MAINTAINING),
    (11, "感谢与告别", "Appreciation and Closure", "AC", Stage.MAINTAINING),
    (12, "其它", "Others", "OT", None),
]
FORMS = [
    "策略{number} {zh}",
    "策略{number}  {zh}",
    "策略{number}\u3000{zh}",
    "策略{number}: {zh}",
    "策略{number}:{zh}",
    "策略{number}：{zh}",
    "策略{number} ： {zh}",
    "策略{number} {en}",
    "策略{number}",
    "{number}",
    "{zh}",
    "{en}",
    "{code}",
    "  策略{number} {zh}\n",
    "\u3000{zh}\u3000",
    " {number}\t",
    "\ufeff策略{number} {zh}",
    "\u200b{en}\u200b\n",
    "\x00{code}\u2060",
]
TYPOS = [
    "礼貌问侯",
    "确认身分",
    "重述和转述",
    "细化问題",
    "情感管理者",
    "提供 建议",
    "信息传递",
    "解决事实",
    "反馈要求",
    "关系延绪",
    "感谢与告別",
    "其他",
]
REFUSED = [
    # Numbers out of range, in other digits, or with leading zeros.
    *("策略0", "策略13", "策略120", "0", "13", "-1", "策略-1", "05", "策略05", "策略05 情感管理", "012", "策略012"),
    *("\uff15", "策略\uff15", "策略\uff15 情感管理", "策略1\uff12", "五", "策略五", "⑤", "策略⑤", "٥", "V"),
    # A number inside other text.
    *("第5步", "5个", "1.5", "5.0", "5.", "5,", "No. 5", "5 6", "策略5步", "策略 5", "5 情感管理", "5: 情感管理", "#5"),
    # A number that contradicts its name, or a name that is not one.
    *(
        "策略5 提供建议",
        "策略6: 情感管理",
        "策略1 感谢与告别",
        "策略5 EM PS",
        "策略5 情感",
        "策略5 策略5",
        "策略13 其它",
    ),
    # Half a label, or one with more around it.
    *(
        "策略",
        "策略5:",
        "策略5 :",
        "策略5情感管理",
        "策略5-情感管理",
        "策略5、情感管理",
        "[情感管理]",
        "策略5 情感管理。",
    ),
    # Two strategies.
    *("策略5 情感管理+策略6 提供建议", "策略5+策略6", "5+6", "情感管理＋提供建议", "策略5 ＋ 6", "+", "5+", "＋5"),
    *("情感管理、提供建议", "情感管理 提供建议", "情感管理/提供建议", "策略5 情感管理\n策略6 提供建议"),
    *("", " ", "None", "null", "em", "EMOTIONAL MANAGEMENT", "Emotional  Management", "Emotional", "Stage 1"),
    *TYPOS,
]


def test_the_taxonomy_is_the_published_one():
    assert [(s.number, s.zh, s.en, s.code, s.stage) for s in STRATEGIES] == PUBLISHED
    assert (GREETING.number, CLOSURE.number, OTHERS.number) == (1, 11, 12)
    assert [stage.title("zh") for stage in Stage] == [
        "欢迎和建立联系",
        "理解和识别问题",
        "寻求解决方案",
        "解决和确认",
        "结束和保持关系",
    ]


def test_no_two_strategies_share_a_name_or_a_definition():
    for values in zip(*((s.zh, s.en, s.code, s.definition("zh"), s.definition("en")) for s in STRATEGIES), strict=True):
        assert len(set(values)) == len(STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.code)
def test_every_label_form_names_its_strategy(strategy):
    for form in FORMS:
        label = form.format(number=strategy.number, zh=strategy.zh, en=strategy.en, code=strategy.code)
        assert parse_strategy(label) is strategy, label
    assert parse_strategy(strategy.label) is strategy
    assert strategy.name("zh") == strategy.zh and strategy.name("en") == strategy.en


@pytest.mark.parametrize("label", REFUSED)
def test_anything_else_is_refused_by_name(label):
    with pytest.raises(ValueError) as refusal:
        parse_strategy(label)
    assert repr(label) in str(refusal.value)


@pytest.mark.parametrize("number", range(1, 13))
def test_a_number_never_takes_the_name_of_another_strategy(number):
    for other in STRATEGIES:
        if other.number != number:
            for name in (other.zh, other.en, other.code):
                with pytest.raises(ValueError):
                    parse_strategy(f"策略{number} {name}")
