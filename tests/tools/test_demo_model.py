"""The demo model, trained for a few seconds: what is written, and when it is written again."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.demo import corpus, train
from tools.demo import model as demo_model

pytestmark = pytest.mark.build
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command itself, as a user would."""
    output = tmp_path_factory.mktemp("demo") / "models"
    command = [sys.executable, str(ROOT / "tools" / "demo" / "model.py")]
    subprocess.run([*command, "--seconds", "3", "--output", str(output)], check=True, timeout=120)
    return output


@pytest.mark.parametrize("name", demo_model.MODELS)
def test_loads_and_generates(made: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / name)
    config = model.config
    assert config.head_dim == 64
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert config.vocab_size >= 10_000  # `vllm bench latency` draws ids below that
    assert config.max_position_embeddings >= 4096
    ids = torch.tensor([[300, 400, 500]])
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 4


def test_both_models_share_the_tokenizer(made: Path) -> None:
    target, draft = (made / name / "tokenizer.json" for name in demo_model.MODELS)
    assert target.read_bytes() == draft.read_bytes()


def test_any_text_survives_the_tokenizer(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "target")
    for text in ("def f(x):\n    return x  # ünïcode ✓ 漢字\n", "\t\x00 \r\n", "  a   b", "12345"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_and_end_tokens(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "target")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nBe brief.<|end|>\n<|user|>\nAdd.<|end|>\n<|assistant|>\n"
    model = AutoModelForCausalLM.from_pretrained(made / "target")
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert model.generation_config.eos_token_id == ends


def test_second_call_is_a_cache_hit(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_training(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(demo_model, "_make", no_training)
    assert demo_model.ensure(made) == made
    with pytest.raises(AssertionError, match="trained again"):
        demo_model.ensure(made, force=True)
    assert demo_model.is_complete(made)  # a failed remake leaves the old models


def fake_make(calls: list[Path]) -> object:
    """Stands in for the training: copies nothing, writes the smallest complete folder."""

    def make(folder: Path, seconds: float) -> None:
        calls.append(folder)
        header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        for name in demo_model.MODELS:
            (folder / name).mkdir()
            for file in demo_model.FILES:
                (folder / name / file).write_text("{}")
            content = len(header).to_bytes(8, "little") + header + bytes(4)
            (folder / name / "model.safetensors").write_bytes(content)

    return make


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("target/config.json", b""),
        ("target/model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
        ("draft/tokenizer.json", b'{"cut": '),
        ("draft/model.safetensors", None),
    ],
)
def test_broken_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes | None
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(demo_model, "_make", fake_make(calls))
    folder = demo_model.ensure(tmp_path / "models")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert not demo_model.is_complete(folder)
    demo_model.ensure(folder)
    assert len(calls) == 2
    assert demo_model.is_complete(folder)


def test_two_at_once_train_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(demo_model, "_make", fake_make(calls))
    threads = [
        threading.Thread(target=demo_model.ensure, args=(tmp_path / "models",)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "models.lock"]


def test_a_folder_of_the_user_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.txt"
    mine.write_text("years of work")
    with pytest.raises(FileExistsError, match="left as it is"):
        demo_model.ensure(tmp_path, force=True)
    assert mine.read_text() == "years of work"


def test_conversations_come_from_docstrings() -> None:
    docstring = '"""The area.\n\n        More."""'
    source = f"class A:\n    def area(self):\n        {docstring}\n        return 1\n"
    (chat,) = corpus.chats_of(source)
    assert chat.startswith("<|user|>\nWrite a function area: The area.<|end|>\n<|assistant|>\ndef ")
    assert chat.endswith("    return 1<|end|>\n")


def test_learning_rate_ends_at_zero() -> None:
    shares = [train.learning_rate_share(step / 100) for step in range(101)]
    assert max(shares) == pytest.approx(1.0)
    assert shares[-1] == 0.0
    assert train.learning_rate_share(1.5) == 0.0  # the one step that begins in time and ends late


def test_written_out_gradient_is_autograd_s() -> None:
    torch.manual_seed(0)
    config = train.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = train.LlamaForCausalLM(config)
    rows = torch.randint(50, (3, 9))
    loss = train._backward(model, rows, autocast=False)
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logits = model(input_ids=rows[:, :-1]).logits.flatten(0, 1)
    reference = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
    reference.backward()
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    for got, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)
