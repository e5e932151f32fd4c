"""Two processes by DeepSpeed's launcher: AutoTP's layers, BMC's cache, the same greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import launching

SCRIPTS = Path(launching.__file__).parent
MODELS = ("llama-gqa", "mistral-window", "opt")
pytestmark = pytest.mark.engine
KV_HEADS_OF_A_RANK = {"llama-gqa": 1, "mistral-window": 1, "opt": 2}


def test_split_models_give_the_same_tokens(tmp_path: Path) -> None:
    ranks = launching.launch(SCRIPTS / "tensor_parallel.py", tmp_path, *MODELS)
    assert ranks[0] == ranks[1]
    for name in MODELS:
        stock, bmc = ranks[0][name]["stock"], ranks[0][name]["bmc"]
        for what in ("plain", "left-padded", "prompt lookup", "assisted", "forward", "layers"):
            assert bmc[what] == stock[what], f"{name}: {what}"
        assert len(set(stock["plain"][0][20:])) > 8, "the tokens would agree by chance"
        # Otherwise it would not be what is tested.
        assert {"LinearLayer", "LinearAllreduce"} <= set(bmc["layers"])
        assert bmc["kv heads"] == stock["kv heads"] == KV_HEADS_OF_A_RANK[name]
        assert (stock["cache"], bmc["cache"]) == ("DynamicCache", "BMCCache")
        assert bmc["store"] == "PackedStore"


def test_a_failed_run_leaves_nothing_in_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    real = launching.shared_buffers

    def shared_buffers(port: int) -> list[Path]:
        found = real(port)
        seen.extend(found)
        return found

    monkeypatch.setattr(launching, "shared_buffers", shared_buffers)
    with pytest.raises(AssertionError, match="this rank fails"):
        launching.launch(SCRIPTS / "failing_rank.py", tmp_path, timeout=120)
    assert len(seen) == 2, "each rank has made one file"
    assert not [path for path in seen if path.exists()]
