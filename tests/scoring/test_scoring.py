"""Texts as tokens that fit a model; the step of training on them. Scores under every layout are tested with NLI's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tokenizers
import transformers

from megabus.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from megabus.engine.engine import StepResult
from megabus.errors import UserError
from megabus.scoring.encoding import encode
from megabus.scoring.likelihood import Sequence, train_step


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    return Tokenizer(train_tokenizer(["the cat and the dog saw it"] * 3, 275, folder / "a", model_type="bpe"))


def test_what_fits_is_left_as_it_is(tokenizer):
    whole = encode(tokenizer, "the cat saw", " it", 100)
    assert whole.sequence.tokens == tokenizer.encode("the cat saw it")
    assert tokenizer.decode(whole.sequence.tokens[-whole.sequence.n_scored :]) == " it"
    assert (whole.n_cut, whole.beyond) == (0, False)
    assert encode(tokenizer, "the cat saw ", "it", 100) == whole  # white space belongs to the text


def test_expendable_tokens_are_cut_first_then_those_on_the_left(tokenizer):
    context, head, tail = "the dog and the cat saw", "the dog", "the dog and the"
    tokens = tokenizer.encode(context + " it")
    first, last = len(tokenizer.encode(head)), len(tokenizer.encode(tail))
    for n_cut in range(len(tokens) - 3):
        found = encode(tokenizer, context, " it", len(tokens) - 1 - n_cut, (head, tail))
        spare, rest = min(n_cut, last - first), max(0, n_cut - (last - first))
        kept = tokens[:first] + tokens[first + spare :]
        assert found.sequence.tokens == kept[rest:]
        assert (found.n_cut, found.beyond) == (n_cut, rest > 0)
        assert found.sequence.n_inputs == len(tokens) - 1 - n_cut


def test_what_begins_a_text_stands_before_it_and_is_cut_last(tokenizer, tmp_path):
    """As transformers and so lm-evaluation-harness have it of a tokenizer whose post-processor writes a BOS."""
    path = train_tokenizer(["the cat and the dog saw it"] * 3, 265, tmp_path / "tokenizer")
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 265)])
    backend.save(str(path))
    own, theirs = Tokenizer(path), transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for context, text in (("the cat saw", " it"), ("", "it")):
        whole = encode(own, context, text, 100).sequence
        assert whole.tokens == theirs(context + text)["input_ids"]
        assert own.decode(whole.tokens[-whole.n_scored :]) == text
    context, head, tail = "the dog and the cat saw", "the dog", "the dog and the"
    bare = [*own.encode(context), *own.encode(" it")]
    first, last = len(own.encode(head)), len(own.encode(tail))
    order = [*range(first, last), *range(first), *range(last, len(own.encode(context)))]
    for n_cut in range(len(order) + 1):
        found = encode(own, context, " it", len(bare) - n_cut, (head, tail))
        kept = [token for place, token in enumerate(bare) if place not in order[:n_cut]]
        assert found.sequence.tokens == [265, *kept]
        assert (found.n_cut, found.beyond) == (n_cut, n_cut > last - first)
        assert found.sequence.n_inputs == len(bare) - n_cut


def test_texts_that_cannot_be_scored_are_told(tokenizer):
    with pytest.raises(UserError, match=r"text to score = : adds no token of its own to 'the cat'; begin it with a"):
        encode(tokenizer, "the cat", "", 10)
    with pytest.raises(UserError, match=r"max_length = 2: is less than the \d+ tokens of ' the cat saw it'; raise it"):
        encode(tokenizer, "the dog", " the cat saw it", 2)
    with pytest.raises(UserError, match=r"tokenizer = .*a.model: has 275 pieces, the model 99; give the one that made"):
        open_tokenizer(tokenizer.path, 99)


@pytest.mark.parametrize(("loss", "grad_norm", "ends"), [(1.0, 2.0, False), (float("nan"), 1.0, True)])
def test_a_loss_that_is_not_finite_ends_a_training(loss, grad_norm, ends):
    beats, result = [], StepResult(loss, grad_norm)
    engine = SimpleNamespace(needs_data=False, stage=SimpleNamespace(grad_accum=1), train_step=lambda *_: result)
    if ends:
        with pytest.raises(UserError, match=r"lr = 0.5: the loss of step 7 is nan, its gradient's norm 1.0; lower it"):
            train_step(engine, [Sequence([1, 2], 1)], 0.5, 7, lambda: beats.append(1))
    else:
        assert train_step(engine, [Sequence([1, 2], 1)], 0.5, 7, lambda: beats.append(1)) == 1.0
    assert len(beats) == (not ends)
