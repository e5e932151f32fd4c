"""One engine as a server has it: engine core and worker in processes of their own."""

import json
import os
import subprocess
import sys

from tests.support.engines import engine, generate, prompts_of
from tests.support.models import ModelStore

SCRIPT = """
import json, sys, time
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams

def main():
    prompts = [{"prompt_token_ids": p} for p in json.loads(sys.argv[2])]
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)
    llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
              max_model_len=512, kv_cache_memory_bytes=4 << 30, attention_backend="BMC",
              additional_config={"bmc": {"r": 64, "release_free_memory": True}},
              disable_log_stats=False)
    def metrics():
        return {s.name: s.value for m in REGISTRY.collect() if m.name.startswith("bmc:")
                for s in m.samples}
    start = metrics()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    # The engine core runs its last step after it has answered.
    deadline = time.monotonic() + 20
    while not metrics()["bmc:kv_pool_resident_bytes"] and time.monotonic() < deadline:
        time.sleep(0.1)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    print("RESULT " + json.dumps([tokens, start, metrics()]))

if __name__ == "__main__":
    main()
"""


def test_tokens_metrics_and_memory(model_dir: ModelStore, tmp_path) -> None:
    prompts = prompts_of([5, 64, 129])
    with engine(model_dir("llama-gqa"), "CPU_ATTN") as llm:
        expected = generate(llm, prompts)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
    }
    done = subprocess.run(
        [sys.executable, str(script), model_dir("llama-gqa"), json.dumps(prompts)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    tokens, start, end = json.loads(line.removeprefix("RESULT "))
    assert tokens == expected
    assert start["bmc:kv_growths_total"] == 0
    assert 3.9 * 2**30 < start["bmc:kv_pool_bytes"] <= 2**32
    assert start["bmc:kv_pool_resident_bytes"] == 0
    # 5 + 48 rows fit in one chunk, 64 + 48 need two growths, 129 + 48 fit in the first three.
    assert end["bmc:kv_growths_total"] == 4
    assert end["bmc:kv_rows_reserved"] == end["bmc:kv_rows_spare"] == 0
    assert 0 < end["bmc:kv_pool_resident_bytes"] < 64 << 20
    log = done.stdout + done.stderr
    assert log.count("BMC: attention backend BMC") == 1
