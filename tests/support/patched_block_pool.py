"""Run with a patched or a plain vLLM: which blocks a pool and a manager hand out.

Prints one line of JSON.
"""

import inspect
import json
from pathlib import Path

import vllm
from vllm.v1.core.block_pool import BlockPool

from tests.support.managers import BLOCK, add_request, held, make_manager


def ids(blocks: list) -> list[int]:
    return [block.block_id for block in blocks]


def near() -> list[int] | None:
    """Four blocks behind block 4, where block 7 holds a prefix; None where nobody can ask."""
    if "near" not in inspect.signature(BlockPool.get_new_blocks).parameters:
        return None
    pool = BlockPool(num_gpu_blocks=20, enable_caching=True, hash_block_size=BLOCK)
    pool.blocks[7].set_block_hash(b"hash")
    return ids(pool.get_new_blocks(4, near=4))


def grown() -> list[int]:
    """Blocks of a request that grows after its neighbours have ended."""
    manager = make_manager("full", 20, r=None, caching=False)
    requests = [add_request(manager, name, [1] * 2 * BLOCK) for name in "abc"]
    for request in requests:
        assert manager.allocate_slots(request, 2 * BLOCK) is not None
        request.num_computed_tokens = 2 * BLOCK
    for request in requests[1:]:
        manager.free(request)
    requests[0].append_output_token_ids([1] * 2 * BLOCK)
    assert manager.allocate_slots(requests[0], 2 * BLOCK) is not None
    return held(manager, requests[0])


def main() -> None:
    plain = BlockPool(num_gpu_blocks=20, enable_caching=True, hash_block_size=BLOCK)
    result = {
        "package": str(Path(vllm.__file__).parent),
        "nowhere": ids(plain.get_new_blocks(2)),
        "near": near(),
        "request": grown(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
