"""Encoder-decoder models: the decoder's own layers on BMC, cross attention on CPU_ATTN.

Both kinds of layers take blocks from one pool, those of cross attention all at once and by the
encoder's length: spare rows of the decoder must never be in their way.
"""

from pathlib import Path

import pytest
from vllm import LLM, SamplingParams

from tests.support.engines import check, engine, flush, free_blocks, scheduler, worker
from tests.support.whisper import make_whisper, noise_prompts

pytestmark = pytest.mark.engine

# With their tokens within one block: nobody grows after admission, so that nobody is preempted.
# Stock vLLM 0.32 itself gives other tokens after a preemption.
SHORT = noise_prompts([4, 6, 3, 5, 8, 2, 7, 4])
LONG = noise_prompts([4, 30, 33, 5, 64, 100, 8, 31])
TOKENS = {"short": 24, "long": 90}
PROMPTS = {"short": SHORT, "long": LONG}
SETTINGS = {"skip_tokenizer_init": False, "max_model_len": 256, "max_num_batched_tokens": 256}
LEAST_BLOCKS = 17
"""What vLLM wants for one request: 8 blocks for the decoder's rows, 8 for the encoder's, and the
null block."""


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("whisper") / "model"
    make_whisper(path)
    return str(path)


def transcribe(llm: LLM, kind: str) -> list[list[int]]:
    params = SamplingParams(
        temperature=0, max_tokens=TOKENS[kind], ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(PROMPTS[kind], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def expected(whisper: str) -> dict[str, list[list[int]]]:
    with engine(whisper, "CPU_ATTN", **SETTINGS) as llm:
        tokens = {kind: transcribe(llm, kind) for kind in PROMPTS}
    assert len({tuple(t) for t in tokens["long"]}) == len(LONG)
    assert all(len(set(t)) > 5 for t in tokens["long"]), "not one repeated token"
    return tokens


@pytest.mark.parametrize(
    ("kind", "num_blocks", "r"),
    [
        ("long", None, 128),
        ("long", 80, 256),
        ("short", LEAST_BLOCKS, 128),
        ("short", 21, 256),
        ("short", 28, 128),
    ],
)
def test_tokens_in_any_pool(
    whisper: str, expected: dict[str, list], kind: str, num_blocks: int | None, r: int
) -> None:
    with engine(
        whisper,
        "BMC",
        num_gpu_blocks_override=num_blocks,
        additional_config={"bmc": {"r": r}},
        **SETTINGS,
    ) as llm:
        layers = worker(llm).compilation_config.static_forward_context
        assert {
            name.rsplit(".", 2)[-2]: layer.attn_backend.get_name() for name, layer in layers.items()
        } == {"self_attn": "BMC", "encoder_attn": "CPU_ATTN"}
        all_free = free_blocks(llm)
        assert transcribe(llm, kind) == expected[kind]
        check(llm)
        flush(llm)
        assert free_blocks(llm) == all_free
        assert scheduler(llm).growth_stats().growths > 0


def test_start_line(whisper: str, vllm_log: list[str]) -> None:
    with engine(whisper, "BMC", **SETTINGS) as llm:
        assert isinstance(llm, LLM)
    (start,) = [line for line in vllm_log if line.startswith("BMC: attention backend")]
    assert "CPU_ATTN for 2 (BMC lacks attention type 'encoder_decoder'); 1 of 2 KV" in start
    assert "of r=128 rows, 1 block by block (cross attention); " in start
