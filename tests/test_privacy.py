"""Private data is found in every written form, and other numbers are not."""

import random

import pytest

from csc_train.synthesis.filters.privacy import find_private_data, is_bank_card_number, is_identity_card_number
from csc_train.synthesis.utterances import PLACEHOLDERS

# Made up; the check digits are right.
CARD, IDENTITY = "6222021234567890128", "11010119900307109X"


def kinds(text):
    return [found.kind for found in find_private_data(text)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("我的手机是13812345678", "phone number"),
        ("打138 1234 5678找我", "phone number"),
        ("打 138-1234-5678。", "phone number"),
        ("+86 13812345678", "phone number"),
        ("008613812345678", "phone number"),
        ("１３８１２３４５６７８", "phone number"),
        ("幺三八一二三四五六七八", "phone number"),
        ("一三八〇零二三四五六七", "phone number"),
        ("2024-08-17 13812345678", "phone number"),
        ("订单号没有，手机13812345678", "phone number"),
        ("[13812345678]", "phone number"),
        ("座机010-62345678", "phone number"),
        ("座机0571 8765432", "phone number"),
        (f"身份证{IDENTITY}", "identity card number"),
        (f"身份证{IDENTITY.lower()}", "identity card number"),
        ("身份证110101 19900307 109X", "identity card number"),
        (f"卡号{CARD}", "bank card number"),
        ("卡号6222 0212 3456 7890 128", "bank card number"),
        ("卡号4111-1111-1111-1111", "bank card number"),
        ("发到zhang.san@example.com.cn吧", "e-mail address"),
        ("发到ｚzhang@example.com", "e-mail address"),
        ("邮箱zhang＠example．com", "e-mail address"),
        ("邮箱zhang\u200b@exa\ufeffmple.com", "e-mail address"),
        ("幺 三 八 一 二 三 四 五 六 七 八", "phone number"),
        ("幺三八\u200b一二三四\u200b五六七八", "phone number"),
    ],
)
def test_private_data_is_found(text, kind):
    assert kinds(text) == [kind]


SEPARATORS = (
    *(" ", "  ", "\t", "\n", "\u00a0", "\u2009", "\u3000", "\u200b", "\u200d", "\ufeff", "\u2060", "\u00ad", "\x00"),
    *(".", "·", "．", "-", " - ", "–", "—", "－", "(", ") ", "）", "】"),
)


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        ("13812345678", "phone number"),
        ("01062345678", "phone number"),
        ("05718765432", "phone number"),
        (CARD, "bank card number"),
        ("4111111111111111", "bank card number"),
        (IDENTITY, "identity card number"),
    ],
)
def test_a_number_is_found_however_its_digits_are_separated(number, kind, separator):
    splits = [(number[:place], number[place:]) for place in range(1, len(number))]
    for parts in [*splits, tuple(number), (number[:3], number[3:7], number[7:])]:
        text = f"我的号码是{separator.join(parts)}，谢谢"
        found = find_private_data(text)
        assert [each.kind for each in found] == [kind], ascii(text)
        assert text[found[0].start : found[0].end] == separator.join(parts)


@pytest.mark.parametrize(
    "text",
    [
        *("2024-08-17 2024-08-18", "1.5 2024-08-17", "从2024.08.17 到2024.12.31", "15 2024-8-7 3"),
        *("服务器是172.16.254.100", "192.168.10.10 - 80", "版本1.3.8.1"),
        *("13812 345678元", "订单号(138)12345678", "订单号138 1234 5678", "1 2 3 4 5 6 7 8 9 10"),
    ],
)
def test_dates_addresses_and_lists_are_not_private(text):
    assert kinds(text) == []


def test_a_card_number_is_found_before_another_number():
    assert kinds("卡号4111111111111111 20 号到期") == kinds("卡号4111111111111111 300") == ["bank card number"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "我的手机是[手机号码]，卡号是[银行卡号]",
        "订单号13812345678",
        "订单号是：13812345678",
        "快递单号 4111111111111111",
        "流水号4111111111111111",
        "订单20240817123456789",
        "金额13812345678元",
        "共13812345678.50",
        "转了13812345678分",
        "拨打400-820-1234或者95588",
        "身份证后四位5678，尾号1234",
        "1381234567",  # ten digits
        "138123456789",  # twelve digits
        "12812345678",  # no mobile number begins so
        f"身份证{IDENTITY[:-1]}1",  # the check digit is wrong
        f"卡号{CARD[:-1]}0",  # the check digit is wrong
        "9月3日下午3点，2024年12月31日",
        "一五一十地说，二十一世纪，三千五百元",
        "@客服 在吗，a@b",
        "https://example.com/?id=20240817",
    ],
)
def test_other_numbers_are_not_private(text):
    assert kinds(text) == []


def test_places_are_those_of_the_text_as_it_is():
    text = "手机１３８１２３４５６７８，邮箱a@b.cn，证件" + IDENTITY
    found = find_private_data(text)
    assert [each.kind for each in found] == ["phone number", "e-mail address", "identity card number"]
    assert [text[each.start : each.end] for each in found] == ["１３８１２３４５６７８", "a@b.cn", IDENTITY]


def test_a_number_is_of_one_kind_only():
    """An identity card number may pass the check of a bank card number, and holds digits like a phone number's."""
    number = next(
        text for n in range(1000, 10_000) if is_identity_card_number(text := f"4101011990030{n:04d}8") and
        is_bank_card_number(text)
    )  # fmt: skip
    assert kinds(number) == ["identity card number"]


def test_placeholders_are_not_private():
    for names in PLACEHOLDERS.values():
        assert kinds("，".join(f"[{name}]" for name in names)) == []


@pytest.mark.parametrize(
    ("number", "right"),
    [
        ("11010519491231002X", True),  # the standard's own example
        ("11010519491231002x", True),
        ("110105194912310021", False),
        ("11010519491331002X", False),  # month 13
        ("11010518491231002X", False),
        ("01010519491231002X", False),
        ("1101051949123100", False),
    ],
)
def test_the_check_digit_of_an_identity_card_number(number, right):
    assert is_identity_card_number(number) is right


@pytest.mark.parametrize(
    ("number", "right"),
    [
        ("4111111111111111", True),
        ("4111111111111112", False),
        ("378282246310005", True),
        ("79927398713", False),  # Luhn's example: right, but too short for a card
        ("1234567812345670", False),  # right by Luhn, but no issuer begins with 1
    ],
)
def test_the_check_digit_of_a_bank_card_number(number, right):
    assert is_bank_card_number(number) is right


def test_every_changed_digit_of_a_card_number_is_noticed():
    for place in range(1, len(CARD)):
        for digit in "0123456789":
            changed = CARD[:place] + digit + CARD[place + 1 :]
            assert is_bank_card_number(changed) is (digit == CARD[place])


@pytest.mark.slow
def test_any_text_is_looked_at_without_an_error_and_what_is_planted_is_found():
    rng = random.Random(0)
    pieces = ["1", "13", "-", " ", "@", ".", "元", "号", "单号", "零", "幺", "Ｘ", "\n", "😀", "[", "]", "\ud83d", "x"]
    for _ in range(2000):
        noise = "".join(rng.choices(pieces, k=rng.randint(0, 30)))
        find_private_data(noise)
        phone = f"1{rng.choice('3456789')}{rng.randrange(10**9):09d}"
        assert "phone number" in kinds(f"{noise}，手机{phone}。{noise}")
