"""Training text of the demo model: the Python standard library that this interpreter runs on.

Promises: nothing is downloaded, and the same interpreter gives the same text in the same order.
Knows nothing about models; the tokenizer is made here because it is a function of the text only.
"""

import ast
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # between documents; also the padding token
END_OF_TURN = "<|end|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (END_OF_TEXT, END_OF_TURN, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>\n{{ message['content'] }}<|end|>\n"
    # There is no system role in the training data: its text is read as the user's.
    "{% else %}<|user|>\n{{ message['content'] }}<|end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Folders whose files are data tables, tests or programs rather than library code.
_SKIPPED = {
    "__pycache__", "site-packages", "test", "tests", "idlelib", "lib2to3", "encodings",
    "pydoc_data", "ensurepip", "turtledemo", "lib-dynload", "idle_test", "tkinter", "msilib",
}  # fmt: skip
_LONGEST_FILE = 120_000  # bytes; a handful of giants would crowd the others out
_LONGEST_FUNCTION = 30  # lines; an answer should end within a chat window


class Corpus(NamedTuple):
    """What is learnt: whole modules, and (request, function) pairs made from them."""

    modules: list[str]
    chats: list[str]


def module_paths() -> list[Path]:
    """Source files of the standard library's pure-Python modules, in a stable order."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(root).parts)
        and path.stat().st_size <= _LONGEST_FILE
    )


def load_corpus(limit_chars: int, seed: int = 0) -> Corpus:
    """Read modules in a seeded order until `limit_chars` characters are together.

    Less text seen several times gives a small model better Python than much text seen once:
    the limit is chosen by the caller to fit its training budget.
    """
    paths = module_paths()
    if not paths:
        raise FileNotFoundError(
            f"no standard library sources under {sysconfig.get_path('stdlib')}: "
            "this Python was installed without its .py files"
        )
    random.Random(seed).shuffle(paths)
    modules: list[str] = []
    total = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the few files that declare another encoding
            continue
        modules.append(text)
        total += len(text)
        if total >= limit_chars:
            break
    return Corpus(modules, [chat for text in modules for chat in chats_of(text)])


def chats_of(source: str) -> Iterator[str]:
    """Conversations made from a module: the docstring asks, the function's source answers."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        docstring = ast.get_docstring(node)
        if not docstring or node.end_lineno - node.lineno >= _LONGEST_FUNCTION:
            continue
        request = " ".join(docstring.split("\n\n")[0].split())
        body = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        yield (
            f"{USER}\nWrite a function {node.name}: {request}{END_OF_TURN}\n"
            f"{ASSISTANT}\n{body}{END_OF_TURN}\n"
        )


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus: any text can be encoded, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Runs of spaces stay whole, so that an indentation is one token.
            pre_tokenizers.Split(_python_words(), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.modules, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> list[int]:
    """One stream of token ids: modules and conversations mixed, each followed by end of text."""
    documents = [text + END_OF_TEXT for text in corpus.modules]
    # A conversation is short: ten of them travel together, or modules would stand in one heap.
    for start in range(0, len(corpus.chats), 10):
        documents.append("".join(chat + END_OF_TEXT for chat in corpus.chats[start : start + 10]))
    random.Random(seed).shuffle(documents)
    encoded = tokenizer.backend_tokenizer.encode_batch(documents)
    return [token for document in encoded for token in document.ids]


def _python_words() -> Regex:
    """Splits text into what a token may not cross: an indentation, a word, up to 3 digits, …"""
    return Regex(r"\n[ \t]*| ?[A-Za-z]+|_+[A-Za-z]*|\d{1,3}| ?[^\s\w]+|\s+|\w+")
