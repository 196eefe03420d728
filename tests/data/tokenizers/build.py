"""How the small tokenizers in this folder were made; run it again only to replace them."""

from pathlib import Path

from csc_train.data.languages import LANGUAGES
from csc_train.data.strategies import STRATEGIES
from csc_train.template.tokenizer_training import train_tokenizer

WORDS = [
    *("\n\n", "assistant", "user", "system", "您好", "我很着急", "请放心", "手机号码", "已登记", "订单", "客服"),
    *(f"[{strategy.name(language)}]" for strategy in STRATEGIES for language in LANGUAGES),
]

for family in ("qwen2", "qwen3_5", "llama3"):
    # Each word often enough that it becomes one token.
    tokenizer = train_tokenizer((word for word in WORDS for _ in range(50)), 620, family)
    tokenizer.save_pretrained(Path(__file__).parent / family)
