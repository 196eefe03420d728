"""Batched decoding with a cache: its tokens equal those without a cache, and cached tokens are not computed again."""

import random

import pytest
import torch
from conftest import remember, sampled, small_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from csc_train.inference import kv_cache
from csc_train.inference.kv_cache import DialogueCache

PREFIX = list(range(300, 312))
MOST = 7
STOPS = set(range(400, 460))


def model_of(architecture, attention="sdpa"):
    torch.manual_seed(3)
    config = tiny_config(architecture, small_tokenizer("qwen2_5"), 0.5)
    return remember(AutoModelForCausalLM.from_config(config, attn_implementation=attention)).eval()


def continued(model, prompt):
    """The greedy reply without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + MOST:
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in STOPS:
            break
        ids.append(token)
    return ids[len(prompt) :]


def ended(model, rounds=12, rows=5, seed=0, **limits):
    """(prompt, reply) pairs of dialogues that grow, are cut back, restart, and have two prompts at a time."""
    rng = random.Random(seed)
    cache = DialogueCache(model, PREFIX, STOPS, MOST, **limits)
    said = {name: list(PREFIX) for name in "abcdefg"}
    asked, found = {}, []

    def draw(most):
        return [rng.randrange(256, 590) for _ in range(rng.randint(1, most))]

    for _ in range(rounds):
        names = rng.choices(sorted(said), k=rows - len(asked))
        prompts = []
        for name in names:
            kept = said[name][: rng.choice([len(PREFIX), len(said[name]), len(said[name])])]
            # Now and then longer than a whole other prompt.
            prompts.append(kept + draw(rng.choice([2, 9, 60])))
        taken = cache.add(names, prompts)
        assert len({*taken, *asked}) == rows
        asked |= zip(taken, zip(names, prompts, strict=True), strict=True)
        for row, ids in cache.step().items():
            name, prompt = asked.pop(row)
            said[name] = prompt + ids
            found.append((prompt, ids))
    return found


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(("attention", "apart"), sampled([("sdpa", ("cpu",)), ("eager", ("cpu",)), ("sdpa", ())], 3))
@pytest.mark.parametrize(
    "architecture", sampled(["llama", "qwen2", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_5_moe_text"], 3)
)
def test_tokens_are_those_without_a_cache(architecture, attention, apart, monkeypatch):
    """With each row's new prompt attended to alone, as on a CPU, and with all padded to one product, as on a GPU."""
    monkeypatch.setattr(kv_cache, "APART", apart)
    model = model_of(architecture, attention)
    found = ended(model)
    assert [ids for _, ids in found] == [continued(model, prompt) for prompt, _ in found]
    # Otherwise the model says the same whatever is asked, or no row waits for another.
    assert len({tuple(ids) for _, ids in found}) > len(found) / 2
    assert len({len(ids) for _, ids in found}) > 3


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3_5_text"])
@pytest.mark.parametrize("width", [7, 1])
def test_a_prompt_may_take_several_forward_passes(architecture, width):
    model = model_of(architecture)
    found = ended(model, rounds=6 if width > 1 else 2, max_width=width)
    assert [ids for _, ids in found] == [continued(model, prompt) for prompt, _ in found] != []


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3_5_text"])
@pytest.mark.parametrize("width", [99, 2])
def test_a_prompt_may_be_the_prefix_alone(architecture, width):
    """Gated delta nets have no state within it, so all its tokens are computed again, and none sees all of it."""
    model = model_of(architecture)
    cache = DialogueCache(model, PREFIX, STOPS, MOST, max_width=width)
    prompts = [PREFIX, [*PREFIX, 500, 501], PREFIX]
    rows, found = cache.add("aba", prompts), {}
    while len(found) < len(rows):
        found |= cache.step()
    assert [found[row] for row in rows] == [continued(model, prompt) for prompt in prompts]


@pytest.mark.slow
def test_wrong_masks_and_copies_change_the_tokens(monkeypatch):
    """Negative control: unmasked leftovers in a row, and a missing copy, change the tokens."""
    model = model_of("qwen2")

    def wrong(found):
        return sum(ids != continued(model, prompt) for prompt, ids in found)

    assert wrong(ended(model)) == 0

    def unmasked(module, args, facts):
        for each in facts["cache_layout"].attended if "cache_layout" in facts else ():
            each.mask.zero_()

    with monkeypatch.context() as patch:
        patch.setattr(kv_cache._RowsLayer, "copy", lambda *_: None)
        assert wrong(ended(model, rounds=40)) > 0
    hook = model.register_forward_pre_hook(unmasked, with_kwargs=True)
    found = ended(model)
    hook.remove()
    assert wrong(found) > 0
    # The same for the sums by which the shared prefix and a row's own columns are weighed.
    usual = kv_cache._attention_and_sums
    with monkeypatch.context() as patch:
        patch.setattr(
            kv_cache,
            "_attention_and_sums",
            lambda *args, **named: (usual(*args, **named)[0], usual(*args, **named)[1] + args[1].shape[2]),
        )
        assert wrong(ended(model)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_float32_attends_to_the_prefix_apart(dtype, monkeypatch):
    """In half precision two parts would each be rounded before they are combined, so every row reads its own prefix."""
    columns, parts = [], []
    usual, attention = kv_cache._attention_and_sums, kv_cache._attention
    monkeypatch.setattr(
        kv_cache, "_attention_and_sums", lambda *args, **named: parts.append(1) or usual(*args, **named)
    )

    def counted(queries, key, *args, **named):
        columns.append(key.shape[2])
        return attention(queries, key, *args, **named)

    monkeypatch.setattr(kv_cache, "_attention", counted)
    assert ended(model_of("qwen2").to(dtype), rounds=3)
    apart = dtype == torch.float32
    assert (len(parts) == len(columns)) is apart and (len(parts) > 0) is apart
    assert (len(PREFIX) - 1 in columns) is apart and (min(columns) <= len(PREFIX)) is apart


def test_half_precision_fills_tokens_up_to_a_multiple(monkeypatch):
    """Few numbers of tokens, and the same replies; filling that is cached changes them."""
    model, fed = model_of("qwen2").to(torch.bfloat16), []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: fed.append(len(args[0][0])))
    usual, tokens = ended(model, rows=20), fed.copy()
    fed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "MULTIPLE", 1)
        assert ended(model, rows=20) == usual and len(fed) == len(tokens)
    assert set(tokens) == {-(-count // 16) * 16 if count > 16 else count for count in fed} and tokens != fed
    hook.remove()
    with monkeypatch.context() as patch:
        update = kv_cache._RowsLayer.update

        def with_filling(layer, *states, **named):
            """The filling replaces the keys and values of the first tokens."""
            found = update(layer, *states, **named)
            if not hasattr(layer, "layout"):  # the prefix
                return found
            count = len(layer.layout.rows)
            rows, columns = (each[: states[0].shape[2] - count] for each in layer.layout[:2])
            for buffer, new in zip(layer._buffers, states[:2], strict=True):
                buffer[rows, :, columns] = new[0].transpose(0, 1)[count:][: len(rows)]
            return found

        patch.setattr(kv_cache._RowsLayer, "update", with_filling)
        assert ended(model, rows=20) != usual


def test_wrong_states_change_the_tokens(monkeypatch):
    """Negative control: a state without a part of it changes the tokens."""
    model = model_of("qwen3_5_text")
    end = kv_cache._StatesLayer.end
    for part in ("recurrent", "inputs"):

        def without(layer, states, part=part):
            end(layer, states._replace(**{part: torch.zeros_like(getattr(states, part))}))

        with monkeypatch.context() as patch:
            patch.setattr(kv_cache._StatesLayer, "end", without)
            assert any(ids != continued(model, prompt) for prompt, ids in ended(model))


def test_a_prompt_continues_the_longest_state_that_it_begins_with(monkeypatch):
    """Behind the reply, at the end of the prompt (whatever was replied), or behind the prefix."""
    model = model_of("qwen3_5_text")
    fed = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    cache = DialogueCache(model, PREFIX, STOPS, MOST)

    def replies(names, prompts):
        rows, found = cache.add(names, prompts), {}
        fed.clear()
        while len(found) < len(rows):
            found |= cache.step()
        return [found[row] for row in rows]

    def computed(*prompts):
        """How many tokens the first forward pass computes; the replies are right."""
        assert replies("a", prompts) == [continued(model, prompt) for prompt in prompts]
        return fed[0]

    first = [*PREFIX, 500, 501, 502]
    assert computed(first) == 3
    reply = continued(model, first)
    assert computed([*first, *reply, 503]) == 1 + (len(reply) == MOST)  # its last token was not computed yet
    second = [*first, 510, 511, 512]
    assert computed(second) == 6  # the state at the end of the first prompt is gone
    assert computed([*second, 520, 521]) == 2
    assert computed([*second, 530]) == 7
    # A second row of the dialogue copies the state; another dialogue begins behind the prefix.
    prompts = [[*second, 530, 540], [*second, 530, 541, 542], [*PREFIX, 550]]
    expected = [continued(model, prompt) for prompt in prompts]
    assert replies("aab", prompts) == expected and fed[0] == 4
    hook.remove()
    cache = DialogueCache(model, PREFIX, STOPS, MOST)
    replies("a", [[*second, 530]])
    monkeypatch.setattr(kv_cache._StatesLayer, "copy_slot", lambda *_: None)
    assert replies("aab", prompts) != expected


def test_cached_tokens_are_not_computed_again():
    """Each token is computed once, in any row, and the prefix once for all rows."""
    model = model_of("qwen2")
    fed = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(tuple(args[0].shape)))
    cache = DialogueCache(model, PREFIX, [], max_new_tokens=1)
    a, b, c = [*PREFIX, 500, 501, 502], [*PREFIX, 510, 511], [*PREFIX, 520, 521, 522, 523]
    rows = cache.add("ab", [a, b])
    first = cache.step()
    assert sorted(first) == sorted(rows) == [0, 1]
    # The answers, which are not cached yet, and what comes after them; a new dialogue in a row that is new.
    a += first[0] + [503, 504]
    b += first[1] + [512]
    assert cache.add("bca", [b, c, a]) == [1, 2, 0]
    cache.step()
    # Asked twice, once at an earlier place: what the one row has is copied to the other one.
    assert cache.add("aa", [[*a, 505], a[:-2]]) == [0, 1]
    cache.step()
    hook.remove()
    #      the prefix  a, b of 3, 2  2, 4, 3  1, and the last one
    assert fed == [(1, 12), (1, 5), (1, 9), (1, 2)]


def test_new_prompts_share_a_forward_pass_with_replies_in_progress():
    """Each new prompt is attended to apart, so that no reply is padded to its width."""
    model = model_of("qwen2")
    prompts = {"a": [*PREFIX, 500], "b": [*PREFIX, 510], "c": [*PREFIX, 520, 521, 522]}
    first = {name: int(model(torch.tensor([ids])).logits[0, -1].argmax()) for name, ids in prompts.items()}
    assert len(set(first.values())) == 3
    cache = DialogueCache(model, PREFIX, [first["b"]], max_new_tokens=3)
    assert cache.add("ab", [prompts["a"], prompts["b"]]) == [0, 1]
    assert cache.step() == {1: []}
    fed = []

    def note(module, args, named):
        fed.append([part.tokens.stop - part.tokens.start for part in named["cache_layout"].attended])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    assert cache.add("c", [prompts["c"]]) == [1]
    found = cache.step()
    hook.remove()
    assert fed[0] == [3, 1] and fed[1:] == [[2]] * (len(fed) - 1)
    assert 0 in found and found[0][0] == first["a"]


def test_rows_of_like_lengths_share_an_attention_call(monkeypatch):
    """Neither a far row nor a far longer one joins a group; the tokens are those without a cache."""
    spans = [range(length - 1, length) for length in (50, 60, 50, 900, 880, 50)]
    monkeypatch.setattr(kv_cache, "CALL_COLUMNS", 500)
    assert kv_cache._groups([0, 1, 2, 3, 4, 30], spans, 0) == [0, 3, 5]
    assert kv_cache._groups([0, 1, 2, 3, 4, 30], spans, 4) == [4, 5]
    assert kv_cache._groups([7], spans[:1], 1) == []
    # A group is as wide as its longest row so far.
    assert kv_cache._groups([0, 1, 2], [range(length - 1, length) for length in (50, 300, 400)], 0) == [0]
    monkeypatch.setattr(kv_cache, "CALL_COLUMNS", 20)
    model, groups = model_of("qwen2"), set()
    hook = model.register_forward_pre_hook(
        lambda _, args, named: groups.update(len(each.mask) for each in named["cache_layout"].attended)
        if "cache_layout" in named else None, with_kwargs=True,
    )  # fmt: skip
    found = ended(model, rows=9)
    hook.remove()
    assert [ids for _, ids in found] == [continued(model, prompt) for prompt, _ in found] and len(groups) > 3


def test_few_active_rows_are_computed_without_the_others():
    model = model_of("qwen2")
    cache = DialogueCache(model, PREFIX, [], max_new_tokens=30)
    cache.add(range(8), [[*PREFIX, 500 + row] for row in range(8)])
    assert len(cache.step()) == 8
    assert cache.add([6, 3], [[*PREFIX, 506], [*PREFIX, 503]]) == [6, 3]
    fed = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(tuple(args[0].shape)))
    assert sorted(cache.step()) == [3, 6]
    hook.remove()
    assert fed == [(1, 2)] * 30


def test_no_more_memory_is_held_than_the_buffers():
    """A kept view would hold the memory of a layer's old buffers."""
    model = model_of("qwen2")
    cache = DialogueCache(model, PREFIX, [], max_new_tokens=2)

    def held(tensors):
        found = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        return {place: size for place, size in found.items() if size}

    def check():
        for layer in cache._cache.layers:
            tensors = [each for each in vars(layer).values() if isinstance(each, torch.Tensor)]
            assert held(layer._buffers) == held([*layer._buffers, *tensors]) != {}

    for names, length in ((range(8), 1), ([3, 6], 2), ([8], 400)):  # all rows, few of them, one that makes all grow
        cache.add(names, [[*PREFIX, *range(100, 100 + length)] for _ in names])
        check()
        cache.step()
        check()
