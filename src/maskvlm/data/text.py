"""Captions to token ids, and training of a WordPiece tokenizer.

Every text passes through `clean_caption` before it is tokenized, and no text can inject a special token: `[MASK]` or
`</s>` in a caption is split like any other text.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from statistics import mean
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from maskvlm.data.caption_text import clean_caption
from maskvlm.utils.errors import ExitCode, UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Ids 0 to 4 of a tokenizer trained here, in this order."""

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MOST_TOKENS = 2_000_000
MOST_RULES, MOST_GROWTH = 40, 256  # rules of a tokenizer; factor by which they may lengthen a text in total


class CaptionTokens(NamedTuple):
    """Tokens of C captions, padded to the longest of them (T).

    Attributes:
        token_CT: ids, long.
        attention_CT: True for tokens, False for padding.
        special_CT: True for start, end and padding.
        word_CT: index of the word within its caption, long; -1 where special_CT is True. Words are those of the
            tokenizer's own pre-tokenizer: BERT and RoBERTa both split at white space and separate punctuation, RoBERTa
            also separates `'s` and the like.
    """

    token_CT: Tensor
    attention_CT: Tensor
    special_CT: Tensor
    word_CT: Tensor


class Captioner:
    """Turns captions into tensors with any fast Hugging Face tokenizer.

    Args:
        tokenizer: a fast tokenizer with a padding token; copied, so its settings are not changed.
        text_length: maximum number of tokens, including start and end token; longer captions are truncated but keep
            the end token.

    Raises:
        UserError: the tokenizer cannot be used, or text_length leaves no room for a word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text_length: int) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            kind = type(tokenizer).__name__
            raise UserError("tokenizer", f"{kind} is not a fast tokenizer", "Use one with a tokenizer.json")
        if tokenizer.pad_token_id is None:
            raise UserError("tokenizer", "it has no padding token", "Use the tokenizer of a BERT-like model")
        # False: for a single text, not a pair
        if text_length <= backend.num_special_tokens_to_add(False):
            raise UserError("text_length", f"{text_length} leaves no room for a word", "Set it to 3 or more")
        self.tokenizer, self.text_length = tokenizer, text_length
        # a copy, as padding and truncation are set on the object itself
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.enable_truncation(text_length)
        self._backend.encode_special_tokens = True  # the name misleads: special tokens as plain text
        self._pad = int(tokenizer.pad_token_id)
        # the unknown token may stand for words; all other special tokens must never come from a text
        self._forbidden = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._unknown = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else self._pad
        # -1 matches no id: a tokenizer without an unknown token knows every word
        self.unknown: int = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id

    def __reduce__(self) -> tuple[type["Captioner"], tuple[PreTrainedTokenizerFast, int]]:
        """Rebuild the backend in the data worker, as a pickled one loses `encode_special_tokens`."""
        return type(self), (self.tokenizer, self.text_length)

    def __call__(self, captions: list[str]) -> CaptionTokens:
        """Clean and tokenize C captions; an empty one becomes only the start and end token.

        Captions are encoded one by one: a batch is too small for the library's threads, which also do not survive the
        fork of a data worker.
        """
        encodings = [self._backend.encode(clean_caption(caption)[0]) for caption in captions]
        longest = max((len(encoding) for encoding in encodings), default=0)
        for encoding in encodings:
            encoding.pad(longest, pad_id=self._pad)
        # (C, T), even without captions, as a tensor of an empty list has one axis
        shape = (len(encodings), longest)
        token_CT = torch.tensor([e.ids for e in encodings]).long().view(shape)
        special_CT = torch.tensor([e.special_tokens_mask for e in encodings]).bool().view(shape)
        attention_CT = torch.tensor([e.attention_mask for e in encodings]).bool().view(shape)
        # None for start, end and padding
        words = [[-1 if word is None else word for word in e.word_ids] for e in encodings]
        word_CT = torch.tensor(words).long().view(shape).masked_fill(special_CT, -1)
        return CaptionTokens(self._plain(token_CT, special_CT), attention_CT, special_CT, word_CT)

    def unknown_words(self, text: str, most: int | None = None, signs: bool = False) -> list[str]:
        """Words of a text that the tokenizer does not know, as written in the text: a part of the word is the unknown
        token, or the word is spelled: mostly in single characters, or in three or more pieces of less than two
        characters on average. Words, or ends of words, beyond the tokens that the model reads do not count.

        Args:
            most: number of tokens of the text that are read; None: as many as for a single text.
            signs: also name what has neither a letter nor a digit, such as a full stop, if it is the unknown token.
        """
        text = clean_caption(text)[0]
        encoding = self._backend.encode(text)
        read = [place for place, special in enumerate(encoding.special_tokens_mask) if not special][:most]
        words, word_ids = [], encoding.word_ids
        for word in sorted({word for place in read if (word := word_ids[place]) is not None}):
            start, end = encoding.word_to_tokens(word)  # type: ignore[misc]
            end = min(end, read[-1] + 1)
            # WordPiece's "##", and the two other kinds' markers of a space before a word
            pieces = [piece.removeprefix("##").lstrip("\u0120\u2581") for piece in encoding.tokens[start:end]]
            lengths = [len(piece) for piece in pieces]
            spelt = (len(pieces) > 1 and 2 * lengths.count(1) > len(pieces)) or (len(pieces) > 2 and mean(lengths) < 2)
            written = text[slice(*encoding.word_to_chars(word))].strip()  # type: ignore[misc]
            if (spelt or self.unknown in encoding.ids[start:end]) and (signs or any(map(str.isalnum, written))):
                words.append(written)
        return words

    def inner(self, text: str) -> list[int]:
        """Ids of a piece of a text, without start and end token; a space before its first word matters."""
        encoding = self._backend.encode(text)
        ids = [i for i, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if not special]
        # as in `_plain`
        return [self._unknown if i in self._forbidden else i for i in ids]

    def count(self, text: str) -> int:
        """Number of tokens of a piece of a text, without start and end token, beyond the text length too."""
        encoding = self._backend.encode(text)
        # What is cut off is in encodings of its own, each with a start and an end token.
        return sum(each.special_tokens_mask.count(0) for each in (encoding, *encoding.overflowing))

    def _plain(self, token_CT: Tensor, special_CT: Tensor) -> Tensor:
        """Replace special tokens that come from a text by the unknown token: a tokenizer that does not split `[MASK]`
        finds it in its vocabulary."""
        forbidden = torch.tensor(sorted(self._forbidden))
        return token_CT.masked_fill(torch.isin(token_CT, forbidden) & ~special_CT, self._unknown)


def no_words(tokenizer: Any, entries: int) -> list[int]:
    """Ids among `entries` that are never a word: special tokens, and ids beyond the tokenizer that a head may have."""
    return [*(token for token in tokenizer.all_special_ids if token < entries), *range(len(tokenizer), entries)]


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a BERT-style lower-case WordPiece tokenizer with at most vocab_size entries (our choice for small data).

    The same captions give the same tokenizer, whatever their order and the number of threads: the library numbers the
    pieces of its alphabet in the order of a hash table, so they are numbered here in advance.
    """
    # a list, as the texts are read twice, for the alphabet and by the trainer
    texts = [clean_caption(caption)[0] for caption in captions]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, inner = _alphabet(tokenizer, texts, max(1, (vocab_size - len(SPECIAL_TOKENS)) // 4))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # special tokens are numbered in the given order
        special_tokens=[*SPECIAL_TOKENS, *first, *inner],
        # only the characters counted in `_alphabet`
        initial_alphabet=first,
        limit_alphabet=len(first),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer, tokenizer.get_vocab())


def _alphabet(tokenizer: Tokenizer, texts: list[str], limit: int) -> tuple[list[str], list[str]]:
    """The `limit` most frequent characters, and those of them that occur inside words, with WordPiece's `##`."""
    words: Counter[str] = Counter()
    # Both split at every space, so each distinct part between spaces is split once, however often it occurs.
    for part, count in Counter(part for text in texts for part in text.split()).items():
        split = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(part))
        words.update({word: count * times for word, times in Counter(word for word, _ in split).items()})
    counts: Counter[str] = Counter()
    # each distinct word is split once, however often it occurs
    for word, count in words.items():
        counts.update({character: times * count for character, times in Counter(word).items()})
    # the character itself breaks ties, so the order of the captions has no influence
    first = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:limit])
    inner = {character for word in words for character in word[1:]}
    return first, [f"##{character}" for character in first if character in inner]


def _finish(trained: Tokenizer, vocab: dict[str, int]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with only the five special tokens, as the alphabet was passed as special tokens too."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    # ids as in SPECIAL_TOKENS
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL_TOKENS, strict=True)))


def tokenizer_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """A fast tokenizer as text, for storing in a checkpoint; without padding and truncation."""
    # a copy, as in `Captioner`
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    # special tokens without a role
    extra = [token for token in tokenizer.all_special_tokens if token not in special.values()]
    content = {
        "special": dict(sorted(special.items())),
        "extra": extra,
        "tokenizer": json.loads(backend.to_str()),
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def tokenizer_from_json(text: str) -> PreTrainedTokenizerFast:
    """The inverse of `tokenizer_json`.

    Raises:
        UserError: the text was not written by tokenizer_json.
    """
    try:
        content: dict[str, Any] = json.loads(text)
        backend = plain_backend(content["tokenizer"])
        if not content["special"].keys() <= set(ROLES):
            raise ValueError(f"of roles it knows {', '.join(ROLES)}")
        if max(backend.get_vocab().values(), default=0) >= MOST_TOKENS:  # it is written id by id, even without tokens
            raise ValueError("numbers of tokens without end")
        added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        # the token object with its own settings (such as how it strips spaces), not only the text
        special = {name: added[token] for name, token in content["special"].items()}
        extra = [added[token] for token in content["extra"]]
        backend.encode("a b")  # rules that refer to something missing only panic now
        return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **special)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exceptions, and panics, which are not Exceptions
        what = f"the stored tokenizer cannot be read ({' '.join(str(error).split())[:100]})"
        raise UserError("tokenizer", what, "Store it again with this version", ExitCode.BAD_DATA) from None


def plain_backend(content: Any) -> Tokenizer:
    """The library's tokenizer from the mapping in its `tokenizer.json`, without padding and truncation.

    The rules before and after the vocabulary are bounded by how much they can lengthen a text in total.

    Raises:
        ValueError: it is not a mapping, or has rules that turn short texts into long ones.
        Exception: the library rejects it; it may also panic, which is a BaseException.
    """
    if not isinstance(content, dict):
        raise ValueError("expected a mapping")
    for parts in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
        # a traversal without recursion, as the mapping may be nested to any depth
        rules, growth, todo = 0, 1, [content.get(key) for key in parts]
        while todo:
            one = todo.pop()
            if isinstance(one, dict):
                # each rule is an object with a type; rules run in sequence, so their growths multiply
                rules += "type" in one
                growth *= _growth(one)
                if rules > MOST_RULES or growth > MOST_GROWTH:
                    raise ValueError("its rules make long texts of short ones")
                todo += one.values()
            elif isinstance(one, list):
                todo += one
    return Tokenizer.from_str(json.dumps(content | {"padding": None, "truncation": None}))


def _growth(rule: dict[str, Any]) -> int:
    """Maximum factor by which a rule lengthens a text.

    Raises:
        ValueError: a table of characters (sentencepiece's `Precompiled`) is damaged.
    """
    growth = 1
    for key in ("content", "prepend", "replacement"):
        # added at each character, which a zero-width pattern keeps
        growth *= 1 + len(rule[key]) if isinstance(rule.get(key), str) else 1
    if isinstance(table := rule.get("precompiled_charsmap"), str):
        # the size of a trie, the trie, and the texts to which it points, each followed by a zero
        content = base64.b64decode(table, validate=True)
        texts = content[4 + int.from_bytes(content[:4], "little") :]
        growth *= max(1, *map(len, texts.split(b"\0")))
    return growth


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of a tokenizer, 16 hexadecimal digits: equal exactly when the stored texts are."""
    return hashlib.blake2b(tokenizer_json(tokenizer).encode(), digest_size=8).hexdigest()
