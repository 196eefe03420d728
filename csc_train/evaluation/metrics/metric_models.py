"""Load and run the models of BERTScore and BLEURT.

Both take text pairs (reply, reference) and return a score per pair, float [pairs], times 100. A pair with an empty side
scores 0, since neither metric is defined there. The last model of each kind stays loaded.
"""

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RemBertConfig,
    RemBertForSequenceClassification,
)

from csc_train.errors import InputError
from csc_train.files import read_json
from csc_train.invisible import is_blank
from csc_train.progress import ProgressBar

TextPair = tuple[str, str]

BERTSCORE_FILES = (("config.json",), ("tokenizer.json", "vocab.txt"), ("*.safetensors", "*.bin"))
BLEURT_FILES = (("config.json",), ("tokenizer.json",), ("model.safetensors", "pytorch_model.bin"))
"""Groups of file patterns; a model directory needs a file of each group."""
BLEURT_NAMES = {
    r"^(?:\w+\.)?(embeddings|encoder|pooler)\.": r"rembert.\1.",
    r"\.embedding_projection\.": ".embedding_hidden_mapping_in.",
}
"""Names of weights in conversions of BLEURT-20, as patterns, and those of transformers' RemBERT."""
_ADVICE: dict[tuple[str, ...], str] = {
    ("tokenizer.json",): ": with sentencepiece installed, transformers' RemBertTokenizer converts the "
    "SentencePiece model (from_pretrained with vocab_file=..., then save_pretrained)"
}


def check_files(directory: str | os.PathLike, groups: Sequence[tuple[str, ...]]) -> None:
    """Check that a model directory has a file of each group.

    Raises:
        InputError: a group has no file.
    """
    for patterns in groups:
        if not any(any(Path(directory).glob(pattern)) for pattern in patterns):
            raise InputError(f"{directory}: has no {' or '.join(patterns)}{_ADVICE.get(patterns, '')}")


def bertscore(
    pairs: Sequence[TextPair], directory: str | os.PathLike, layers: int = 8, batch_size: int = 64
) -> numpy.ndarray:
    """BERTScore F1 of the bert-score package, not rescaled, without IDF weights.

    `layers` is the compared layer; 8 is the package's choice for bert-base-chinese. Values are high: unrelated Chinese
    replies score about 55.

    Raises:
        InputError: `directory` is not a model directory, lacks weights, or has fewer than `layers` layers.
    """
    if not pairs:
        return numpy.zeros(0)
    # Imported here: it imports matplotlib and pandas, which nothing else needs.
    from bert_score.utils import bert_cos_score_idf

    model, tokenizer = _load_bert(os.fspath(directory), layers)
    weights = defaultdict(lambda: 1.0, dict.fromkeys((tokenizer.cls_token_id, tokenizer.sep_token_id), 0.0))

    def f1(batch: Sequence[TextPair]) -> torch.Tensor:
        replies, references = map(list, zip(*batch, strict=True))
        scores = bert_cos_score_idf(
            model, references, replies, tokenizer, weights, batch_size=batch_size, device=model.device
        )
        return scores[:, 2]

    return _scores(pairs, f1, batch_size, "BERTScore")


def bleurt(pairs: Sequence[TextPair], directory: str | os.PathLike, batch_size: int = 64) -> numpy.ndarray:
    """BLEURT-20: a linear head on the pooled output of a RemBERT encoder that reads reference and reply together.

    `directory` holds a PyTorch conversion: `config.json`, `tokenizer.json`, and `model.safetensors` or
    `pytorch_model.bin`. The encoder has a prefix such as `bleurt.`; the head is `classifier.weight`, [1, hidden], and
    `classifier.bias`, [1]. Written from the published architecture; not yet compared with scores of the real weights.

    Raises:
        InputError: a file is missing, or the weights are not exactly the model's.
    """
    if not pairs:
        return numpy.zeros(0)
    model, tokenizer = _load_bleurt(os.fspath(directory))

    def regress(batch: Sequence[TextPair]) -> torch.Tensor:
        encodings = tokenizer.encode_batch([(reference, reply) for reply, reference in batch])
        logits = model(
            input_ids=torch.tensor([encoding.ids for encoding in encodings], device=model.device),
            attention_mask=torch.tensor([encoding.attention_mask for encoding in encodings], device=model.device),
            token_type_ids=torch.tensor([encoding.type_ids for encoding in encodings], device=model.device),
        ).logits
        return logits.squeeze(-1)

    return _scores(pairs, regress, batch_size, "BLEURT")


def _scores(
    pairs: Sequence[TextPair], score_batch: Callable[[Sequence[TextPair]], torch.Tensor], batch_size: int, label: str
) -> numpy.ndarray:
    scores = numpy.zeros(len(pairs))
    scorable = [index for index, pair in enumerate(pairs) if not any(map(is_blank, pair))]
    scorable.sort(key=lambda index: sum(map(len, pairs[index])))  # little padding within a batch
    with torch.inference_mode():
        for start in ProgressBar(range(0, len(scorable), batch_size), desc=label, unit="batch", leave=False):
            batch = scorable[start : start + batch_size]
            scores[batch] = score_batch([pairs[index] for index in batch]).double().cpu().numpy()
    return 100 * scores


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _names(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


@functools.lru_cache(maxsize=1)
def _load_bert(directory: str, layers: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model, report = AutoModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot load the BERTScore model: {str(error).strip().splitlines()[0]}") from error
    # Missing weights are initialized at random; only the pooler is unused here.
    if missing := [key for key in report["missing_keys"] if "pooler" not in key]:
        raise InputError(f"{path}: weights missing for the BERTScore model: {_names(missing)}")
    stack = getattr(getattr(model, "encoder", None), "layer", None)
    if stack is None or not 1 <= layers <= len(stack):
        depth = "no BERT layers" if stack is None else f"{len(stack)} layers"
        raise InputError(f"{path}: BERTScore needs layer {layers}, but the model has {depth}")
    model.encoder.layer = stack[:layers]
    # The package truncates to this length; the default is too large for the tokenizer (OverflowError).
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    return model.float().eval().to(_device()), tokenizer


@functools.lru_cache(maxsize=1)
def _load_bleurt(directory: str) -> tuple[PreTrainedModel, Tokenizer]:
    path = Path(directory)
    check_files(path, BLEURT_FILES)
    values = read_json(path / "config.json")
    values.setdefault("input_embedding_size", values.get("embedding_size"))  # its name in conversions
    if values["input_embedding_size"] is None:
        raise InputError(f"{path}: config.json has no embedding size: give BLEURT-20, which is based on RemBERT")
    config = RemBertConfig.from_dict(values | {"model_type": RemBertConfig.model_type, "num_labels": 1})
    try:
        options = {"config": config, "dtype": torch.float32, "key_mapping": BLEURT_NAMES, "output_loading_info": True}
        loaded: Any = RemBertForSequenceClassification.from_pretrained(path, **options)
    except RuntimeError as error:
        raise InputError(f"{path}: weights do not fit config.json: {' '.join(str(error).split())}") from error
    model, report = loaded
    missing, unexpected = (
        _names(key.removeprefix("rembert.") for key in report[kind] if not key.endswith(".position_ids"))
        for kind in ("missing_keys", "unexpected_keys")
    )  # older versions stored the positions, 0, 1, 2, ...
    if missing or unexpected:
        raise InputError(
            f"{path}: not the weights of BLEURT-20: missing {missing or 'none'}; unexpected {unexpected or 'none'}"
        )
    return model.eval().to(_device()), _bleurt_tokenizer(path, config)


def _bleurt_tokenizer(path: Path, config: RemBertConfig) -> Tokenizer:
    file = path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    markers = [(marker, tokenizer.token_to_id(marker)) for marker in ("[CLS]", "[SEP]")]
    if any(number is None for _, number in markers):
        raise InputError(f"{file}: has no [CLS] and [SEP] tokens")
    # A file converted from a SentencePiece model may have no template for pairs.
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=markers
    )
    tokenizer.enable_truncation(config.max_position_embeddings)
    tokenizer.enable_padding(pad_id=config.pad_token_id)
    return tokenizer
