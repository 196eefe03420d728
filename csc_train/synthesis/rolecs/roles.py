"""What each role is asked, by `prompts/<language>/<role>.jinja`, and the form of its answer, by pydantic.

A prompt file is made of blocks (task, scene, rules, history, turn, answer), of which a layout decides the order.
"""

import functools
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, create_model

from csc_train.data.dialogue import Speaker, Turn
from csc_train.data.strategies import STRATEGIES, Strategy, parse_strategy
from csc_train.files import digest
from csc_train.synthesis.rolecs.engine import ROLES as SPEAKING_ROLES
from csc_train.synthesis.rolecs.engine import RoleQuestion
from csc_train.templates import load_template, read_text

ROLES = ("persona", *SPEAKING_ROLES)
"""Whoever writes a part of a dialogue: the five roles of the engine, and the writer of personas before them."""
LANGUAGES = ("zh", "en")
LAYOUTS = {
    "faithful": ((), ("task", "scene", "history", "turn", "rules", "answer")),
    "cache_friendly": (("task", "rules", "answer", "scene"), ("history", "turn")),
}
"""The blocks of the system message and of the user message. faithful: one message, the fields in the paper's order.
cache_friendly: nothing that stays the same comes after the history, so that a server's prefix cache holds all but the
newest utterances."""

_LINES = {"zh": ("客服", "客户", "（{}）"), "en": ("Supporter", "Customer", " ({})")}
_LABEL = re.compile(r"[\[【(（]([^\]】)）]{1,40})[\]】)）][:：\s]*")


def _checked(text: str, longest: int | None = None, spoken: bool = False) -> str:
    """A text as one line and, where it is `spoken`, without a strategy's label, which all would see.

    One line, because a prompt shows an utterance a line: what follows a line break would pass for another's.

    Raises:
        ValueError: nothing is left, it is too long, or it holds half of a surrogate pair, which UTF-8 cannot hold.
    """
    text = " ".join(text.split())
    while spoken and (match := _LABEL.match(text)):
        try:
            parse_strategy(match.group(1))
        except ValueError:
            break
        text = text[match.end() :]
    if not text:
        raise ValueError("the text is empty")
    if longest is not None and len(text) > longest:
        raise ValueError(f"the text has {len(text)} characters, {longest} are the most")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds a lone surrogate") from None
    return text


@functools.cache
def answer_schema(role: str, language: str, compact: bool, spent: Strategy | None = None) -> type[BaseModel]:
    """The form of a role's answer, with lengths in characters.

    The strategy is an enumeration of the names in `language` but that of `spent`, for servers that hold a model to its
    schema. What comes from others is not checked here but by the engine, whose rule for unknown labels is its own.
    """

    def text(longest: int, short: int, spoken: bool = False) -> Any:
        short *= 1 if language == "zh" else 3
        check = functools.partial(_checked, longest=short if compact else longest, spoken=spoken)
        # Only where small models need it: not every server takes a length in a schema.
        hint = [Field(json_schema_extra={"minLength": 1, "maxLength": short})] if compact else []
        return Annotated[str, AfterValidator(check), *hint]

    names = [strategy.name(language) for strategy in STRATEGIES if strategy is not spent]
    fields = {
        "persona": {"description": text(1000, 60)},
        "planner": {"scenario": text(800, 60), "goal": text(300, 30)},
        "supporter_assistant": {"strategy": Annotated[str, Field(json_schema_extra={"enum": names})]},
        "supporter": {"text": text(400, 40, spoken=True)},
        "customer_assistant": {"direction": text(300, 30)},
        "customer": {"text": text(400, 40, spoken=True), "finished": bool},
    }[role]
    name = f"{role.title().replace('_', '')}Answer"
    return create_model(name, **{field: (kind, ...) for field, kind in fields.items()})


class Prompts:
    """The prompts of all roles in one language, layout and profile.

    Attributes:
        language: "zh" or "en", of prompts and dialogues.
        compact: the short profile for small models: fewer rules, one sentence each, short answers.
    """

    def __init__(self, language: str, layout: str, compact: bool):
        self.language = language
        self.compact = compact
        self._parts = LAYOUTS[layout]
        self._shared = {"strategies": STRATEGIES, "compact": compact}
        self._layout = layout

    def messages(self, question: RoleQuestion) -> list[dict[str, str]]:
        """The chat messages of a question.

        Raises:
            jinja2.UndefinedError: the question lacks what its prompt names.
        """
        template = load_template("csc_train.synthesis", f"prompts/{self.language}/{question.role}.jinja")
        fields = self._shared | question.fields
        if "history" in fields:
            fields["history"] = self._history(fields["history"])
        context = template.new_context(fields)
        texts = [
            "\n\n".join(
                "".join(template.blocks[block](context)).strip() for block in blocks if block in template.blocks
            )
            for blocks in self._parts
        ]
        return [{"role": role, "content": text} for role, text in zip(("system", "user"), texts, strict=True) if text]

    def _history(self, turns: tuple[Turn, ...]) -> str:
        """What was said, a line an utterance; the strategy where a turn has one, so where the role may see it."""
        supporter, customer, label = _LINES[self.language]
        lines = []
        for turn in turns:
            speaker = customer if turn.speaker is Speaker.CUSTOMER else supporter
            strategy = label.format(turn.strategy.name(self.language)) if turn.strategy else ""
            lines.append(f"{speaker}{strategy}: {turn.text}")
        return "\n".join(lines)

    def schema(self, question: RoleQuestion) -> type[BaseModel]:
        """The form of the answer to a question."""
        return answer_schema(question.role, self.language, self.compact, question.fields.get("spent"))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the prompts' texts, their layout and profile: what else decides an answer is in the call."""
        names = (*ROLES, "history", "behaviour", "rolecs_check")
        files = [read_text("csc_train.synthesis", f"prompts/{self.language}/{name}.jinja") for name in names]
        definitions = [[strategy.name(self.language), strategy.definition(self.language)] for strategy in STRATEGIES]
        return digest([files, definitions, self._layout, self.compact])
