"""Tokenizers of every kind behind one face, beside the libraries they come from and a reference of tiktoken's."""

import base64
import itertools
import json
import os
import shutil
from contextlib import nullcontext

import pytest
import regex
import tokenizers
import transformers

os.environ["HF_HUB_OFFLINE"] = "1"

from megabus.data.sources import Sources
from megabus.data.tokenizer import Tokenizer, open_tokenizer, read_tokenizer_files, train_tokenizer
from megabus.data.tokenizer.byte_bpe import CL100K, byte_letters
from megabus.data.tokenizer.odd_text import BASES, differences, odd_lines
from megabus.data.tokenizer.tiktoken import ENCODINGS, R50K, Encoding, of_ranks
from megabus.errors import UserError

TEXT = [f"{base} and {base}, {base.upper()}; the theory of the other there\n" for base in BASES] * 3
N = 700
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A tokenizer.json alone, of byte-level BPE."""
    return train_tokenizer(TEXT, N, tmp_path_factory.mktemp("bare") / "own")


@pytest.fixture(scope="module")
def folder(bare, tmp_path_factory):
    """A directory as transformers saves one: with BOS by a post-processor, a chat's template, a limit of 8 tokens."""
    backend = tokenizers.Tokenizer.from_file(str(bare))
    backend.add_special_tokens(["<bos>", "<|im_start|>", "<pad>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", bos)])
    backend.enable_truncation(8)
    backend.enable_padding(length=9)
    names = {"bos_token": "<bos>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    theirs.chat_template = CHAT
    path = tmp_path_factory.mktemp("hf") / "tokenizer"
    theirs.save_pretrained(path)
    tree = json.loads((path / "tokenizer.json").read_text())
    limits = {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}
    (path / "tokenizer.json").write_text(json.dumps(tree | limits))
    return path


# ---- Hugging Face -----------------------------------------------------------------------------------------


def test_a_directory_of_transformers_gives_its_ids(folder):
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    lines = odd_lines(ours.codec.symbols)
    assert len(lines) > 300
    assert ours.encode_batch(lines) == theirs(lines, add_special_tokens=False)["input_ids"]
    assert [[*ours.prefix, *ids, *ours.suffix] for ids in ours.encode_batch(lines)] == theirs(lines)["input_ids"]
    assert max(map(len, ours.encode_batch(lines))) > 9  # and whole, whatever limits the file has
    assert [ours.decode(ids) for ids in ours.encode_batch(BASES[:18])] == [*BASES[:18]]
    assert (ours.bos, ours.eos, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    assert (ours.prefix, ours.suffix, ours.kind) == ([ours.bos], [], "tokenizers")


def test_a_bare_file_knows_its_end(bare):
    tokenizer = Tokenizer(bare)
    assert (tokenizer.prefix, tokenizer.suffix, tokenizer.bos, tokenizer.vocab_size) == ([], [], None, N)
    assert tokenizer.shown([tokenizer.eod]) == f"<|endoftext|> ({tokenizer.eod})"
    assert tokenizer.encode("a<|endoftext|>b")[1] == tokenizer.eod  # as transformers reads it
    assert tokenizer.start == [tokenizer.eod]


def test_a_tokenizer_is_known_by_what_decides_its_ids(folder, bare, tmp_path):
    """Saved anew by transformers it is the same one; with a token more it is another."""
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
    assert Tokenizer(tmp_path / "again").sha256 == Tokenizer(folder).sha256 != Tokenizer(bare).sha256
    tree = json.loads((folder / "tokenizer.json").read_text())
    assert tree["truncation"]["max_length"] == 8
    tree["truncation"] = tree["padding"] = None
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]  # as older versions wrote them
    (tmp_path / "again/tokenizer.json").write_text(json.dumps(tree, indent=2))
    assert Tokenizer(tmp_path / "again").sha256 == Tokenizer(folder).sha256
    tree["model"]["merges"].pop()
    (tmp_path / "again/tokenizer.json").write_text(json.dumps(tree))
    assert Tokenizer(tmp_path / "again").sha256 != Tokenizer(folder).sha256
    both = shutil.copytree(folder, tmp_path / "both")
    model = train_tokenizer(TEXT, N, tmp_path / "tokenizer", "bpe")
    shutil.copy(model, both)
    assert Tokenizer(both).kind == "tokenizers"  # as transformers reads such a directory
    assert read_tokenizer_files(both).known_as == {Tokenizer(folder).sha256, Tokenizer(model).sha256}


def test_all_that_transformers_reads_is_carried(folder, tmp_path):
    files = read_tokenizer_files(folder)
    assert {path.name for path in files.write(tmp_path)} == set(files.contents) >= {"tokenizer_config.json"}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template([{"content": "x"}], tokenize=False) == "<|im_start|>x"
    assert read_tokenizer_files(tmp_path / "tokenizer.json").contents == files.contents


def saved(bare, folder, *special):
    """The bare tokenizer with special tokens, to be saved in `folder` once it has been changed."""
    folder.mkdir(exist_ok=True)
    backend = tokenizers.Tokenizer.from_file(str(bare))
    backend.add_special_tokens([*special])
    return backend


def test_what_any_post_processor_writes_is_found(bare, tmp_path):
    """What stands before and after a text, and which of the special tokens then are its begin and its end."""
    make, ends, sep = tokenizers.processors, ("</s>", N + 1), ("<s>", N)
    both = make.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", [sep, ends])
    for processor, prefix, suffix, eos in (
        (None, [], [], 0),
        (both, [N], [N + 1], N + 1),
        (make.RobertaProcessing(ends, sep, add_prefix_space=False), [N], [N + 1], N + 1),
        (make.BertProcessing(ends, sep), [N], [N + 1], N + 1),
        (make.Sequence([make.ByteLevel(trim_offsets=False), both]), [N], [N + 1], N + 1),
        (make.Sequence([both, make.ByteLevel(trim_offsets=True)]), [N], [N + 1], N + 1),  # which hides what is text
        (make.TemplateProcessing("$A </s>", "$A $B", [ends]), [], [N + 1], N + 1),
        (make.TemplateProcessing("<s> <s> $A </s> </s>", "$A $B", [sep, ends]), [N] * 2, [N + 1] * 2, 0),
    ):
        backend = saved(bare, tmp_path, "<s>", "</s>")
        if processor is not None:
            backend.post_processor = processor
        backend.save(str(tmp_path / "own.json"))
        ours = Tokenizer(tmp_path / "own.json")
        assert (ours.prefix, ours.suffix, ours.eos) == (prefix, suffix, eos)
        assert [*prefix, *ours.encode("the"), *suffix] == backend.encode("the").ids
    backend.post_processor = make.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 9000)])
    backend.save(str(tmp_path / "own.json"))
    with pytest.raises(UserError, match="its post-processor writes the id 9000 around a text, which is no token of it"):
        Tokenizer(tmp_path / "own.json")
    few = tokenizers.Tokenizer(tokenizers.models.BPE({"x": 0, "y": 1}, []))  # of which no text has an "a"
    few.add_special_tokens(["<s>", "</s>"])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "x": 2}))  # whose text may be "<s>"
    for backend in (few, words):
        begin, end = (backend.token_to_id(token) for token in ("<s>", "</s>"))
        special = [("<s>", begin), ("</s>", end)]
        backend.post_processor = make.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", special)
        backend.save(str(tmp_path / "own.json"))
        ours = Tokenizer(tmp_path / "own.json")
        assert (ours.prefix, ours.suffix) == ([begin], [end])


def test_what_was_stored_for_training_leaves_nothing_to_chance(bare, tmp_path):
    backend = saved(bare, tmp_path)
    backend.model.dropout = 0.5
    backend.save(str(tmp_path / "own.json"))
    text = "the theory of the other there " * 3
    assert [backend.encode(text).ids for _ in range(2)] != [Tokenizer(bare).encode(text)] * 2  # control
    assert [Tokenizer(tmp_path / "own.json").encode(text) for _ in range(2)] == [Tokenizer(bare).encode(text)] * 2


TOKEN = {"content": "<x>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
BESIDE = [
    ({CONFIG: {"pad_token": "<x>"}}, "name as pad_token"),
    ({CONFIG: {"eos_token": TOKEN | {"__type": "AddedToken"}}}, "name as eos_token"),
    ({CONFIG: {"image_token": "<x>"}}, "name as image_token"),
    ({CONFIG: {"extra_special_tokens": ["<x>"]}}, "name as extra_special_tokens"),
    ({CONFIG: {"additional_special_tokens": ["<x>"]}}, "name as additional_special_tokens"),
    ({MAP: {"unk_token": TOKEN}}, "name as unk_token"),
    ({CONFIG: {"added_tokens_decoder": {"705": TOKEN}}}, "add as '705'"),
    ({"added_tokens.json": {"<x>": 700}}, "add as 700"),
    ({CONFIG: {"added_tokens_decoder": {}}, MAP: {"pad_token": "<x>"}}, None),  # of which transformers reads the first
    ({CONFIG: {"pad_token": None, "add_bos_token": True, "extra_special_tokens": {}}}, None),
    ({CONFIG: {"pad_token": "<|endoftext|>", "added_tokens_decoder": {"9": TOKEN | {"content": "the"}}}}, None),
]


@pytest.mark.parametrize(("beside", "told"), BESIDE)
def test_tokens_that_only_the_files_beside_it_have_are_refused(bare, tmp_path, beside, told):
    """transformers gives them ids of their own, by which text that spells them is read."""
    saved(bare, tmp_path / "in").save(str(tmp_path / "in/tokenizer.json"))
    for name, tree in beside.items():
        (tmp_path / "in" / name).write_text(json.dumps(tree))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    assert (theirs("<x>", add_special_tokens=False)["input_ids"] == [N]) == (told is not None)
    if told is None:
        assert Tokenizer(tmp_path / "in").encode("<x>") == theirs("<x>", add_special_tokens=False)["input_ids"]
        return
    with pytest.raises(UserError, match=f"has not '<x>', which the files beside it {told}; make a tokenizer.json of"):
        Tokenizer(tmp_path / "in")
    theirs.save_pretrained(tmp_path / "out")  # as the remedy says
    assert Tokenizer(tmp_path / "out").encode("<x>") == [N]


def test_text_that_cannot_be_spelled_is_told_in_a_line(tmp_path):
    for name, model in {
        "unigram": tokenizers.models.Unigram([("a", -1.0), ("b", -2.0)], None, False),
        "word": tokenizers.models.WordLevel({"a": 0, "b": 1}),
    }.items():
        tokenizers.Tokenizer(model).save(str(tmp_path / name))
        assert Tokenizer(tmp_path / name).encode("b") == [1]
        with pytest.raises(UserError, match=f"tokenizer = {tmp_path / name}: cannot spell a text .*; leave such texts"):
            Tokenizer(tmp_path / name).encode("c")


# ---- tiktoken ---------------------------------------------------------------------------------------------


def reference(ranks, pattern, text):
    """tiktoken's way: of all pairs of neighbours merge the one whose token has the lowest rank, the leftmost first."""
    ids = []
    for piece in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while piece.encode() not in ranks and len(parts) > 1:
            pairs = [(ranks.get(a + b, len(ranks)), at) for at, (a, b) in enumerate(itertools.pairwise(parts))]
            rank, at = min(pairs)
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[piece.encode()]] if piece.encode() in ranks else [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def ranks(bare):
    """Those of the trained one, as tiktoken would number them."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocab = {letters: n for letters, n in Tokenizer(bare).codec.backend.get_vocab().items() if letters[:2] != "<|"}
    tokens = sorted((bytes(byte_of[letter] for letter in letters) for letters in vocab), key=lambda t: (len(t) > 1,))
    return {token: rank for rank, token in enumerate(tokens)}


def test_ranks_give_the_ids_of_tiktokens_algorithm(ranks):
    lines = [line for line in odd_lines() if "<|endoftext|>" not in line]
    for pattern in (CL100K, R50K):
        fast = of_ranks(ranks, Encoding("test", pattern, {"<|endoftext|>": len(ranks) + 3}, "<|endoftext|>"))
        assert fast.encode(lines) == [reference(ranks, pattern, line) for line in lines]
        assert (fast.n_ids, fast.eos, fast.prefix) == (len(ranks) + 4, len(ranks) + 3, [])
        assert fast.encode(["a<|endoftext|>"])[0][-1] == fast.eos
    first, last = sorted(ranks, key=ranks.get)[256:258]  # the control: two tokens change ranks
    other = of_ranks(ranks | {first: ranks[last], last: ranks[first]}, Encoding("test", CL100K, {}, "<|endoftext|>"))
    assert other.encode(lines) != fast.encode(lines)


def rank_lines(n):
    tokens = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    tokens += [bytes([a, b, 32]) for a in range(256) for b in range(256)]
    return [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens[:n])]


def test_llama_3s_rank_file(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"".join(rank_lines(128000)))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("tiktoken", 128256)
    assert (tokenizer.prefix, tokenizer.suffix, tokenizer.eod) == ([128000], [], 128001)
    assert [tokenizer.id_of(f"<|{name}|>") for name in ("start_header_id", "eot_id", "reserved_special_token_250")] == [
        128006,
        128009,
        128255,
    ]
    assert tokenizer.decode(tokenizer.encode("Zürich 漢字")) == "Zürich 漢字"


def test_lines_and_names_that_a_rank_file_may_have(tmp_path, monkeypatch):
    """Empty lines, which tiktoken passes over; another end than the base model's, as a chat model names it; and ids
    that are no token."""
    special = {"<|begin|>": 300, "<|end|>": 303, "<|eot|>": 305}
    monkeypatch.setitem(ENCODINGS, 300, Encoding("small", CL100K, special, "<|end|>", "<|begin|>"))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(rank_lines(300)).replace(b" 99\n", b" 99\n\n") + b"\r\n\n")
    plain = Tokenizer(tmp_path)
    assert (plain.eos, plain.prefix, plain.vocab_size, plain.gaps) == (303, [300], 306, [301, 302, 304])
    assert plain.id_of("<|eot|>") == plain.id_of("305") == 305
    with pytest.raises(UserError, match="token = 304: is neither a token of"):
        plain.id_of("304")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    assert Tokenizer(tmp_path).eos == 305


def test_known_encodings_fit_together():
    for n_ranks, encoding in ENCODINGS.items():
        assert min(encoding.special.values()) >= n_ranks
        assert len(set(encoding.special.values())) == len(encoding.special)
        assert {encoding.eos, encoding.bos} - {None} <= encoding.special.keys()


# ---- what is refused --------------------------------------------------------------------------------------

RANKS = b"".join(rank_lines(300))
BAD = {
    "another size": (RANKS, "tiktoken file of 300 ranks, and how its program splits text is known of r50k_base"),
    "no base64": (RANKS + b"%%% 300\n", "line 301 is no token in base64 and its rank"),
    "no rank": (RANKS + b"QUJD\n", "line 301 is no token in base64 and its rank"),
    "a rank twice": (RANKS + b"QUJD 299\n", "its ranks are not 0, 1, 2, ..., each of one token"),
    "a gap": (
        RANKS + b"QUJD 301\n",
        "without the rank 300: cut, or one such as p50k_base, and known are r50k_base (50256)",
    ),
    "a rank below 0": (RANKS + b"QUJD -1\n", "its ranks are not 0, 1, 2, ..., each of one token"),
    "a token twice": (RANKS + RANKS.splitlines()[-1].replace(b" 299", b" 300"), "each of one token"),
    "no byte 0": (b"".join(rank_lines(300)[1:]).replace(b" 299", b" 0"), "the byte 0 is none of its tokens"),
    "cut JSON": (b'{"model": {"type": "BPE"', "is not JSON (Expecting"),
    "a list": (b"[1]", "holds no keys"),
    "another JSON": (b'{"a": 1}', "is JSON, and no tokenizer.json: it has no model"),
    "tekken": (b'{"config": {}, "vocab": []}', "is a tekken file of mistral-common"),
    "an unknown model": (b'{"model": {"type": "New"}}', "cannot be read by the library tokenizers ("),
    "noise": (b"\xff\xfe\x00noise", "is no tokenizer that is known"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name):
    content, told = BAD[name]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError) as caught:
        Tokenizer(tmp_path / "x")
    assert str(caught.value).startswith(f"tokenizer = {tmp_path / 'x'}: ")
    assert told in str(caught.value)


def test_a_directory_that_cannot_be_read_is_refused(folder, bare, tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json and no tokenizer\.model; give a Hugging"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"make its tokenizer\.json in transformers"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(bare)  # which a stranger's directory has no business with
    with pytest.raises(UserError, match=r"is a link to .*, outside of the directory"):
        Tokenizer(tmp_path)
    with pytest.raises(UserError, match=f"has {N + 3} pieces, the model {N}; give the one that made"):
        open_tokenizer(folder, N)
    assert open_tokenizer(folder, N + 64).vocab_size == N + 3  # of a padded vocabulary


@pytest.mark.parametrize("model_type", ["byte-bpe", "bpe"])
def test_a_file_comes_with_what_lies_beside_it_as_its_directory_does(tmp_path, model_type):
    """A checkpoint names its tokenizer so, and hands it on: nothing is lost on the way."""
    path = train_tokenizer(["the cat sees the dog " * 50], 270, tmp_path / "tokenizer", model_type)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    files = read_tokenizer_files(path)
    assert files.contents == read_tokenizer_files(tmp_path).contents
    assert len(files.contents) == 3


def test_tokens_are_named_or_numbered(folder):
    tokenizer = Tokenizer(folder)
    assert tokenizer.id_of("<bos>") == tokenizer.bos == tokenizer.id_of(str(tokenizer.bos))
    assert tokenizer.id_of("9") == 9 != tokenizer.codec.id_of("9")
    for token in ("<none>", str(tokenizer.vocab_size), "-1"):
        with pytest.raises(UserError, match=r"is neither a token of .* nor an id below 703"):
            tokenizer.id_of(token)


# ---- what data and weights know ---------------------------------------------------------------------------


class _Corpora:
    def __init__(self, **tokenizers):
        self.tokenizers = tokenizers


def test_weights_of_another_tokenizer_are_refused(bare):
    tokenizer, unknown = Tokenizer(bare), _Corpora()
    made = _Corpora(**{tokenizer.sha256: "data/a (made with own.json)"})
    own, told = {tokenizer.sha256}, r"data = data/a \(made with own.json\): belongs to another tokenizer than theirs"
    for sources in (Sources(made, unknown, 1), Sources(made, unknown, 1, tokenizer=tokenizer)):
        sources.check_tokenizer(own, "theirs")
        sources.check_tokenizer(set(), "theirs")
        with pytest.raises(UserError, match=told):
            sources.check_tokenizer({"0" * 64}, "theirs")
    Sources(unknown, unknown, 1).check_tokenizer({"0" * 64}, "theirs")  # as Megatron's own tools leave them
    with pytest.raises(UserError, match=r"data = .*own.json: belongs to another tokenizer"):
        Sources(unknown, unknown, 1, tokenizer=tokenizer).check_tokenizer({"0" * 64}, "theirs")


def test_tokenizers_that_share_no_more_than_a_model_are_others(bare, tmp_path):
    """Directories keep the tokenizer.model that they came with, whatever was added to their tokenizer.json."""
    model = train_tokenizer(TEXT, N, tmp_path / "tokenizer", "bpe")
    found = {"model": Tokenizer(model)}
    for name, token in (("one", "<user>"), ("other", "<pad>")):
        saved(bare, tmp_path / name, token).save(str(tmp_path / name / "tokenizer.json"))
        shutil.copy(model, tmp_path / name)
        found[name] = Tokenizer(tmp_path / name)
    for name, tokenizer in found.items():
        for other, files in ((other, one.files) for other, one in found.items()):
            same = name == other or "model" in (name, other)
            assert tokenizer.files.is_same(files) == same
            for made in (_Corpora(), _Corpora(**{tokenizer.sha256: "data/a"})):
                sources, is_refused = Sources(made, _Corpora(), 1, tokenizer=tokenizer), pytest.raises(UserError)
                for known in (set(), {files.sha256}):
                    with nullcontext() if same else is_refused:
                        sources.check_tokenizer(known, "theirs", files)


def test_differences_are_found(bare, folder):
    lines = ["plain", "<bos>"]
    assert [found.text for found in differences(lines, Tokenizer(bare), Tokenizer(folder).encode_batch)] == ["<bos>"]
