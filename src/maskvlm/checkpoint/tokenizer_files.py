"""Untrusted tokenizer files, read only by the library `tokenizers`: they name no class and bring no code.

`tokenizer.json` holds everything except the roles of special tokens. Those are in `tokenizer_config.json` or
`special_tokens_map.json`, from which only strings are read. Older models have a word list instead: `vocab.txt` (BERT's
WordPiece) or `vocab.json` and `merges.txt` (RoBERTa's byte-level BPE).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from maskvlm.checkpoint.integrity import first_line
from maskvlm.config.plain_schema import Text
from maskvlm.data.files import load_json
from maskvlm.data.safe_open import content_of
from maskvlm.data.text import MOST_TOKENS, ROLES, plain_backend
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import check_inside

TOKENIZER, NAMED = "tokenizer.json", ("tokenizer_config.json", "special_tokens_map.json")
FILES = (TOKENIZER, *NAMED, "vocab.txt", "vocab.json", "merges.txt")
"""All files of a tokenizer that are read."""
MOST_BYTES = 64_000_000  # the largest vocabularies of public text encoders take about 20 MB
BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
ROBERTA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}
TODO = "Get the folder again, or name another tokenizer"


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a folder; None if there is none.

    Raises:
        UserError: a file is damaged or needs another library (65), cannot be read (74), or is a link out of the folder
            (77).
    """
    # The most complete format first.
    if (folder / TOKENIZER).is_file():
        backend = backend_of(file_text(folder / TOKENIZER), folder / TOKENIZER)
    elif (folder / "vocab.txt").is_file():
        backend = wordpiece(folder)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = byte_level(folder)
    elif any((folder / name).is_file() for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")):
        what = f"holds a SentencePiece model and no {TOKENIZER}"
        todo = f"Let transformers write its {TOKENIZER} once: AutoTokenizer.from_pretrained(A).save_pretrained(B)"
        raise UserError(folder, what, todo, ExitCode.BAD_DATA)
    else:
        return None
    # Checked before the library writes it out, id by id.
    check_token_ids(backend, folder)
    return tokenizer_of(backend, *named_in(folder), folder)


def check_token_ids(backend: Tokenizer, where: object) -> None:
    """Raise UserError (65) if there are no tokens or an id is too large: the library writes a tokenizer id by id,
    whether an id has a token or not."""
    highest = max(backend.get_vocab().values(), default=-1)
    if not 0 <= highest < MOST_TOKENS:
        what = "the tokenizer holds no vocabulary" if highest < 0 else f"its tokens are numbered up to {highest:,}"
        raise UserError(where, what, TODO, ExitCode.BAD_DATA)


def file_text(file: Path) -> str:
    """The content of a text file of bounded size that is not a link out of its folder.

    Raises:
        UserError: it is missing, a folder, a pipe or a device (66), a link out of its folder (77), too large or not
            text (65), or cannot be read (74).
    """
    check_inside(file)
    try:
        return content_of(file, MOST_BYTES, TODO).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(file, f"not UTF-8 text (byte {error.start})", TODO, ExitCode.BAD_DATA) from None


def backend_of(text: str, where: object) -> Tokenizer:
    """The library's tokenizer, from the text of `tokenizer.json`. Raises UserError (65)."""
    content = load_json(text.encode("utf-8", "surrogatepass"), Path(str(where)))  # rejects duplicate keys and the like
    return build_tokenizer(lambda: plain_backend(content), where)


def build_tokenizer(make: Any, where: object) -> Any:
    """What `make` returns. The library raises bare Exceptions, and panics, which are not Exceptions."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    # A panic of the library's Rust code is not an Exception.
    except BaseException as error:
        what = f"the tokenizer cannot be read ({first_line(error)})"
        raise UserError(where, what, TODO, ExitCode.BAD_DATA) from None


def named_in(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The special tokens by role, and further special tokens. If lower-casing is switched off, `do_lower_case`: "no" is
    among the roles. Only strings and this setting are read from the files."""
    roles: dict[str, str] = {}
    more: list[str] = []
    for name in NAMED:
        file = folder / name
        content = load_json(file_text(file).encode(), file) if file.is_file() else {}
        if not isinstance(content, dict):
            raise UserError(file, "holds no mapping", TODO, ExitCode.BAD_DATA)
        for role in ROLES:
            if (token := _token(content.get(role))) is not None:
                # The first file that names a role wins.
                roles.setdefault(role, token)
        for key in ("extra_special_tokens", "additional_special_tokens"):
            listed = content.get(key)
            more += [token for part in listed if (token := _token(part))] if isinstance(listed, list) else []
        if name == NAMED[0] and content.get("do_lower_case") is False:
            roles["do_lower_case"] = "no"
    return roles, list(dict.fromkeys(more))


def _token(value: Any) -> str | None:
    # A token is a string, or a mapping with the string as `content`.
    text = value.get("content") if isinstance(value, dict) else value
    return text if Text(200).fits(text) else None


def tokenizer_of(
    backend: Tokenizer, roles: dict[str, str], more: Iterable[str], where: object
) -> PreTrainedTokenizerFast:
    """A tokenizer with its special tokens: the given ones or, if a file names none, the usual ones. Raises UserError
    (65)."""
    there = backend.get_vocab()
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    # The two families that masked language models come from.
    usual = ROBERTA if "<mask>" in there and "[MASK]" not in there else BERT
    named = {f"{role}_token": token for role, token in usual.items() if token in there}
    named |= {role: token for role, token in roles.items() if role in ROLES and token in there}
    # As an AddedToken if there is one: it says whether the token includes the space before it.
    special = {role: added.get(token, token) for role, token in named.items()}
    # Tokens that the vocabulary lacks would be added to it, but have no embedding.
    extra = [added.get(token, token) for token in more if token in there and token not in named.values()]
    return build_tokenizer(
        lambda: PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **special), where
    )


def wordpiece(folder: Path) -> Tokenizer:
    """BERT's tokenizer, from a `vocab.txt` with one word per line; a word's id is its line number, counted from 0."""
    words = file_text(folder / "vocab.txt").split("\n")
    # Blank lines count.
    vocab = {word.rstrip("\r"): number for number, word in enumerate(words) if word.strip()}
    lower = "do_lower_case" not in named_in(folder)[0]
    backend = build_tokenizer(lambda: Tokenizer(models.WordPiece(vocab, unk_token=BERT["unk"])), folder)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if "[SEP]" in vocab and "[CLS]" in vocab:
        backend.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    backend.add_special_tokens([token for token in BERT.values() if token in vocab])
    return backend


def byte_level(folder: Path) -> Tokenizer:
    """RoBERTa's tokenizer, from a `vocab.json` and a `merges.txt`."""
    file = folder / "vocab.json"
    vocab = load_json(file_text(file).encode(), file)
    lines = [line for line in file_text(folder / "merges.txt").split("\n") if line and not line.startswith("#version")]
    merges: Any = [tuple(line.rstrip("\r").split(" ")) for line in lines]
    if not isinstance(vocab, dict) or not all(type(number) is int and 0 <= number < 2**31 for number in vocab.values()):
        raise UserError(file, "expected tokens with their numbers", TODO, ExitCode.BAD_DATA)
    backend = build_tokenizer(lambda: Tokenizer(models.BPE(vocab, merges)), folder)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if "</s>" in vocab and "<s>" in vocab:
        ends = ("</s>", vocab["</s>"]), ("<s>", vocab["<s>"])
        backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    plain = [token for token in dict.fromkeys(ROBERTA.values()) if token in vocab and token != "<mask>"]
    # RoBERTa's mask token includes the space before it.
    mask = [AddedToken("<mask>", lstrip=True, special=True)] if "<mask>" in vocab else []
    backend.add_special_tokens([*plain, *mask])
    return backend
