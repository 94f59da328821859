"""The tokenizers of checkpoints: loaded by transformers, and compared by what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LmcError
from .files import MIB, read_object, require_regular

# one of these makes a tokenizer; without any, transformers would make up an empty one
_MAKES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_FILES = ("*token*", "*vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "config.json")
_BYTES = 512 * MIB
_TEXT = (".json", ".txt", ".model")
_OTHERS = ("config.json", "generation_config.json", "model.safetensors.index.json")  # tell it nothing
_PROBE = """The quick brown fox (aged 12) doesn't jump over 3,456.78 lazy dogs; HTTP://x.org/Path_1?q=%20
  def f(x):\t return x**2  # tabs, runs of   spaces\r\n\n
Ça coûte 5 €: naïve ﬁancée, ÀÉÎ, İstanbul, Straße, Ελλάδα, Москва, שלום, العربية, हिन्दी, 日本語テキスト, 한국어, 中文。
👩‍👩‍👧 🏳️‍🌈 e\u0301 \u00a0\u200b\u2028 ½ ² Ⅷ ｆｕｌｌ <s> [MASK] <|endoftext|> ... ¿? «» “quotes” ‘x’ — –"""
_SAMPLE = 50_000  # tokens of the vocabulary that are spelt out and tokenized again


def has_tokenizer(path: Path) -> bool:
    return any((path / name).exists() for name in _MAKES)


def load_tokenizer(path: Path, remedy: str) -> Any:
    """The tokenizer of a checkpoint directory. Raises LmcError, whose sentence ends in `remedy`."""
    from transformers import AutoTokenizer

    if not has_tokenizer(path):
        raise LmcError(f"{path} has no tokenizer; {remedy}")
    for file in sorted({file for pattern in _FILES for file in path.glob(pattern)}):
        if file.name in _JSON:
            read_object(file, _BYTES, remedy)
        elif not file.is_dir():
            require_regular(file, remedy)
    with tokenizer_errors(f"{path}: the tokenizer does not load", remedy):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


@contextmanager
def tokenizer_errors(what: str, remedy: str) -> Iterator[None]:
    """Whatever a tokenizer raises, as one sentence: many types, and panics of Rust that are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise LmcError(f"{what} ({type(error).__name__}: {error}); {remedy}") from error


@dataclass(frozen=True)
class Comparison:
    """What is known of two tokenizers.

    problem: why the ids do not mean the same, or None. warnings: what could not be compared, or differs harmlessly.
    used: ids in use, counted from 0 up to the largest; None where no tokenizer could be read.
    """

    problem: str | None = None
    warnings: tuple[str, ...] = ()
    used: int | None = None


def compare_tokenizers(a: Path, b: Path) -> Comparison:
    """Do two checkpoints' tokenizers give the same ids to the same text?

    Compared are the tokens that each id stands for, added ones included, and the ids of a fixed text and of the
    vocabulary spelt out; whether a token is in the vocabulary or added does not matter.
    """
    loaded, warnings = [], []
    for path in (a, b):
        try:
            loaded.append(load_tokenizer(path, "whether its ids mean the same is not known"))
        except LmcError as error:
            warnings.append(str(error).replace("\n", " "))
    if len(loaded) < 2:
        if len(warnings) == 2:
            warnings = [
                f"neither {a} nor {b} has a tokenizer that can be read: whether their ids mean the same is not known"
            ]
        return Comparison(None, tuple(warnings), _used(loaded[0].get_vocab()) if loaded else None)
    left, right = (tokenizer.get_vocab() for tokenizer in loaded)
    used = max(_used(left), _used(right))
    if _same_files(a, b):
        return Comparison(used=used)
    with tokenizer_errors(f"the tokenizers of {a} and {b} cannot be compared", "download them again"):
        problem = _conflict(left, right) or _other_ids(loaded[0], loaded[1], left.keys() & right.keys())
    for one, other, path in ((left, right, a), (right, left, b)):
        more = sorted(one.keys() - other.keys(), key=one.__getitem__)
        if more and not problem:
            names = ", ".join(f"{token!r} ({one[token]})" for token in more[:3])
            warnings.append(
                f"only the tokenizer of {path} has {names}" + (f" and {len(more) - 3} more" if len(more) > 3 else "")
            )
    return Comparison(problem, tuple(warnings), used)


def _used(vocabulary: dict[str, int]) -> int:
    return max(vocabulary.values(), default=-1) + 1


def _same_files(a: Path, b: Path) -> bool:
    """Every text file that may tell a tokenizer something is the same in both directories."""
    files = [
        {f.name: f for f in path.iterdir() if f.suffix in _TEXT and f.name not in _OTHERS and f.is_file()}
        for path in (a, b)
    ]
    same = files[0].keys() == files[1].keys()
    return same and all(files[0][name].read_bytes() == files[1][name].read_bytes() for name in files[0])


def _conflict(left: dict[str, int], right: dict[str, int]) -> str | None:
    """A token with two ids, or an id with two tokens."""
    remedy = "align models that share a tokenizer"
    for token in sorted(left.keys() & right.keys(), key=left.__getitem__):
        if left[token] != right[token]:
            return f"their tokenizers give the token {token!r} the ids {left[token]} and {right[token]}; {remedy}"
    tokens = {number: token for token, number in right.items()}
    for token, number in sorted(left.items(), key=lambda item: item[1]):
        if tokens.get(number, token) != token:
            return f"their tokenizers use the id {number} for {token!r} and for {tokens[number]!r}; {remedy}"
    return None


def _other_ids(a: Any, b: Any, shared: set[str]) -> str | None:
    """A text that both cut into other ids."""
    vocabulary = a.get_vocab()
    numbers = sorted(vocabulary[token] for token in shared)
    numbers = numbers[:: 1 + len(numbers) // _SAMPLE]
    words = a.batch_decode([[number] for number in numbers], clean_up_tokenization_spaces=False)
    texts = [_PROBE, "".join(words[:2000]), *words]
    for text in texts:
        ids = [t(text, add_special_tokens=False, verbose=False)["input_ids"] for t in (a, b)]
        if ids[0] != ids[1]:
            shown = text if len(text) < 40 else text[:37] + "..."
            return (
                f"their tokenizers have the same tokens and cut text differently ({shown!r} into {ids[0][:8]} and "
                f"{ids[1][:8]}); align models that share a tokenizer"
            )
    return None
