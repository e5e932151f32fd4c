"""The Python of README and docs runs as it is printed.

Each page's blocks run in order in one process, in a folder that holds `my-model`, a tiny Llama with
a tokenizer, and `my-small-model`, a smaller one: what the pages call `./my-model` and
`./my-small-model`. Nothing else is prepared for them. A comment before a block says what more it
needs:

- `<!-- needs: engine -->` it starts a vLLM engine: it runs alone, as a script;
- `<!-- needs: server -->` it talks to the server of `make serve`. Here it is compiled, and
  tests/server must send the same words to a real one.
"""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import documents
from tests.support.documents import ROOT, Block

PYTHON = [
    (page, block)
    for page in documents.PAGES
    for block in documents.blocks(page)
    if block.language == "python"
]
PLAIN = sorted({page for page, block in PYTHON if not block.needs})
ENGINE, SERVER = (
    [
        pytest.param(page, block, id=f"{documents.name_of(page)}:{block.line}")
        for page, block in PYTHON
        if block.needs == needs
    ]
    for needs in ("engine", "server")
)

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Reader:\n    def read(self): ...\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader types what the pages print."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.support import tiny_decoders

    path = tmp_path_factory.mktemp("reader")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny_decoders.VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(path / "my-model")
    tiny_decoders.make("llama-gqa").save_pretrained(path / "my-model")
    small = tiny_decoders.make("llama-gqa", num_hidden_layers=1)
    small.save_pretrained(path / "my-small-model")
    return path


def run(script: str, folder: Path, name: str) -> None:
    """Runs a script as a reader would; the checkout comes first on the path."""
    path = folder / f"reader_{name}"  # a name that hides no package
    path.write_text(script, encoding="utf-8")
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([inherited] if inherited else [])]),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if "kv_cache_memory_bytes" not in script:
        # vLLM's default, 92 % of the memory, would make the outcome depend on the neighbors.
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    # Set by tests that run an engine in their own process.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with subprocess.Popen(
        [sys.executable, str(path)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=400)
        finally:
            # An engine's processes too, whatever happened.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-6000:]


def at_line(block: Block) -> str:
    """The code where it stands in the page, so that a traceback names the page's line."""
    return "\n" * (block.line - 1) + block.code


def script_of(page: Path) -> str:
    lines: list[str] = []
    for _, block in ((p, b) for p, b in PYTHON if p == page and not b.needs):
        lines += [""] * (block.line - 1 - len(lines))
        lines += block.code.splitlines()
    return "\n".join(lines) + "\n"


def test_pages_have_blocks_of_every_kind() -> None:
    assert {documents.name_of(page) for page in PLAIN} >= {
        "README.md",
        "docs/deepspeed.md",
        "docs/model.md",
        "docs/transformers.md",
    }
    assert ENGINE
    assert SERVER
    assert {block.needs for _, block in PYTHON} == {"", "engine", "server"}


@pytest.mark.engine
@pytest.mark.parametrize("page", PLAIN, ids=documents.name_of)
def test_page_runs(page: Path, folder: Path) -> None:
    run(script_of(page), folder, page.stem + ".py")


@pytest.mark.engine
@pytest.mark.parametrize(("page", "block"), ENGINE)
def test_engine_block_runs(page: Path, block: Block, folder: Path) -> None:
    run(at_line(block), folder, f"{page.stem}_{block.line}.py")


@pytest.mark.parametrize(("page", "block"), SERVER)
def test_server_block_is_what_the_server_tests_send(page: Path, block: Block) -> None:
    tree = ast.parse(block.code, str(page))
    sent = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    assert sent, "no text to look for"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests" / "server").glob("test_*.py"))
    for text in sent:
        assert ast.unparse(ast.Constant(text))[1:-1] in tests
