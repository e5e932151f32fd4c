"""vLLM's queue of free KV cache blocks, which also knows the chunks that are wholly free.

A chunk is ``chunk_blocks`` blocks that lie side by side: the ``r`` rows by which a cache grows.
`ChunkedFreeQueue` takes the place of a BlockPool's ``free_block_queue``. Promises:

- links, counts and the order of eviction are vLLM's; a caller that names no place gets what
  vLLM's own queue gives;
- a caller that names its place (`ChunkedFreeQueue.placing`) gets the blocks behind its last one,
  then wholly free chunks, side by side where there are some, the least recently used first, and of
  a stretch the end first: blocks behind an evicted one hold prefixes that nobody can find;
- a chunk in which a prefix was found again is spared once more;
- nothing is withheld: the rest of an opened chunk, and the chunks that are kept for the rest of
  a prompt, stay free. Whoever asks for a chunk passes them by; whoever pops the head of the queue
  may get them. So a pool admits, refuses and preempts exactly as with vLLM's queue.

Every operation costs a constant number of steps a block, whatever the size of the pool. Knows
nothing of requests, rows or prefixes: blocks that vLLM puts at the head of its queue are worth
nothing to anyone, those at its end hold something.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from itertools import islice
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

PROBES = 8
"""Chunks, the next to be evicted first, that are looked at for one allocation."""
LONGEST = 32
"""Chunks after which a stretch that is longer than needed is not followed further."""
WINDOW_DIVISOR = 12
"""A neighbor of the oldest chunk goes with it if at most 1/12 of the free blocks were freed between
the two. With none, 80 % of the blocks of a worn pool lie side by side, with 1/16 87 %, with 1/8
89 %, where 1 to 2 % of the prefix hits of long conversations are lost (`benchmarks pool`)."""
SINGLES_DIVISOR = 4
"""Free blocks in chunks that are not wholly free hold prefixes that nobody evicts. When they are
more than 1/4 of the free ones, the next growths use them up first."""


class Place(NamedTuple):
    """Who takes blocks, and where it would like them.

    Attributes:
        owner: whose blocks they are.
        after: id of the owner's last block, behind which it would go on; None: it has none.
        room: blocks that the owner will take soon, those of this call among them.
    """

    owner: Hashable
    after: int | None
    room: int


class ChunkedFreeQueue(FreeKVCacheBlockQueue):
    """See the module docstring.

    Attributes:
        chunk_blocks: blocks of a chunk.
        growths: calls so far for which a chunk was opened, or single blocks were taken for want
            of one.
    """

    def __init__(
        self, queue: FreeKVCacheBlockQueue, blocks: list[KVCacheBlock], chunk_blocks: int
    ) -> None:
        """Takes over the links of ``queue``, which must not be used afterwards.

        Args:
            queue: a queue from which nothing but the null block was taken yet.
            blocks: all blocks of the pool by id; chunks begin at block 1 (0 is the null block).
            chunk_blocks: at least 1.
        """
        self.num_free_blocks = queue.num_free_blocks
        self.fake_free_list_head = queue.fake_free_list_head
        self.fake_free_list_tail = queue.fake_free_list_tail
        self.chunk_blocks = chunk_blocks
        self.growths = 0
        self._blocks = blocks
        self._holds = bytearray(len(blocks))  # by block: whether it was freed to the end
        self._found = bytearray(len(blocks))  # by block: whether its prefix was found again
        self._num_free = [0] * (len(blocks) // chunk_blocks + 1)  # by chunk
        # Wholly free chunks, in order: a plain dict that is emptied from its front becomes slow.
        # Empty ones: the last is the next to be taken. Others: when they became free, in blocks
        # freed until then, the oldest first.
        self._empty: OrderedDict[int, None] = OrderedDict()
        self._held: OrderedDict[int, int] = OrderedDict()
        self._kept: dict[int, Hashable] = {}  # for an owner
        self._keeps: dict[Hashable, list[int]] = {}  # by owner; some may be gone
        # By chunk: the first block behind an owner that has ended.
        self._rests: OrderedDict[int, int] = OrderedDict()
        self._clock = 0
        self._place: Place | None = None
        self._used: set[int] | None = None
        self._discarded: set[int] = set()
        for block in reversed(self.get_all_free_blocks()):
            self._freed(block)

    # What vLLM calls.

    def popleft(self) -> KVCacheBlock:
        block = super().popleft()
        self._taken(block)
        return block

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        if self._place is not None and n:
            return self._take(self._place, n)
        blocks = super().popleft_n(n)
        for block in blocks:
            self._taken(block)
        return blocks

    def remove(self, block: KVCacheBlock) -> None:
        """vLLM calls it when a prefix is found in a free block: it was worth keeping."""
        super().remove(block)
        self._found[block.block_id] = True
        self._taken(block)

    def append(self, block: KVCacheBlock) -> None:
        super().append(block)
        self._holds[block.block_id] = True
        self._freed(block)

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        super().append_n(blocks)
        for block in blocks:
            self._holds[block.block_id] = True
            self._freed(block)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        super().prepend_n(blocks)
        for block in blocks:
            self._holds[block.block_id] = False
            self._freed(block)
        if self._used is not None:
            self._discarded.update(block.block_id for block in blocks)

    # What the managers call.

    def placing(self, place: Place) -> ChunkedFreeQueue:
        """For `with`: what is popped by `popleft_n` inside goes to ``place``."""
        self._place = place
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._place = None

    def release(self, owner: Hashable, last: int | None) -> None:
        """The owner, whose last block is ``last``, ends: nothing is kept for it any longer."""
        if last is not None and self._end_of(last) - last > 2:
            self._rests[(last - 1) // self.chunk_blocks] = last + 1
        for chunk in self._keeps.pop(owner, ()):
            if self._kept.get(chunk) == owner:
                del self._kept[chunk]
                self._empty[chunk] = None  # It was the next to be evicted.

    def remember_discarded(self) -> None:
        """Turns `take_discarded` on, which costs a step a block."""
        self._used = set()

    def take_discarded(
        self, max_runs: int | None = None, max_blocks: int | None = None
    ) -> list[range]:
        """Ids of free blocks that were used and hold nothing any longer, each once.

        Args:
            max_runs: give so many runs of adjacent blocks; the others come with a later call.
            max_blocks: give so many blocks.
        """
        runs: list[range] = []
        left = len(self._discarded) if max_blocks is None else max_blocks
        while self._discarded and left and len(runs) != max_runs:
            first = last = self._discarded.pop()
            while last + 1 in self._discarded and last - first + 1 < left:
                last += 1
                self._discarded.remove(last)
            while first - 1 in self._discarded and last - first + 1 < left:
                first -= 1
                self._discarded.remove(first)
            runs.append(range(first, last + 1))
            left -= len(runs[-1])
        if self._used is not None:
            for run in runs:
                self._used.difference_update(run)
        return runs

    def discard_all(self) -> None:
        """No free block holds anything any longer: the prefix cache was emptied."""
        self._discarded |= {i for i in self._used or () if self._is_free(i)}

    def num_spare(self, owner: Hashable, last: int) -> int:
        """Free blocks that an owner whose last block is ``last`` would grow into."""
        return len(self.free_behind(last)) + len(self._kept_for(owner)) * self.chunk_blocks

    def free_behind(self, last: int) -> range:
        """Ids of the free blocks that follow block ``last`` in its chunk: whoever goes on behind it
        gets them first, and opens no chunk for them."""
        end = last + 1
        while end < self._end_of(last) and self._is_free(end):
            end += 1
        return range(last + 1, end)

    def check(self) -> None:
        """Raises AssertionError where chunks and links contradict each other; visits all."""
        free = [0] * len(self._num_free)
        for block in self.get_all_free_blocks():
            free[(block.block_id - 1) // self.chunk_blocks] += 1
        assert free == self._num_free, "free blocks by chunk are counted wrongly"
        whole = [chunk for chunk, count in enumerate(free) if count == self.chunk_blocks]
        known = [*self._empty, *self._held, *self._kept]
        assert sorted(known) == whole, f"chunks {whole} are wholly free, {known} are known"
        for owner, chunks in self._keeps.items():
            assert len(set(chunks)) == len(chunks), f"{owner} keeps a chunk twice: {chunks}"

    # Which chunks are wholly free.

    def _freed(self, block: KVCacheBlock) -> None:
        self._clock += 1
        chunk = (block.block_id - 1) // self.chunk_blocks
        self._num_free[chunk] += 1
        if self._num_free[chunk] == self.chunk_blocks:
            first = chunk * self.chunk_blocks + 1
            if any(self._holds[first : first + self.chunk_blocks]):
                self._held[chunk] = self._clock
            else:
                self._empty[chunk] = None

    def _taken(self, block: KVCacheBlock) -> None:
        chunk = (block.block_id - 1) // self.chunk_blocks
        rest = self._rests.get(chunk)
        # A new owner of a block in front of the rest goes on there.
        if rest is not None and (block.block_id >= rest or self._place is not None):
            del self._rests[chunk]
        if self._num_free[chunk] == self.chunk_blocks:
            for chunks in (self._held, self._empty, self._kept):
                if chunk in chunks:
                    del chunks[chunk]  # type: ignore[attr-defined]
                    break
        self._num_free[chunk] -= 1
        if self._used is not None:
            self._used.add(block.block_id)
            self._discarded.discard(block.block_id)

    def _is_free(self, block_id: int) -> bool:
        return self._blocks[block_id].prev_free_block is not None

    def _end_of(self, block_id: int) -> int:
        """Id behind the last block of the block's chunk."""
        end = ((block_id - 1) // self.chunk_blocks + 1) * self.chunk_blocks + 1
        return min(end, len(self._blocks))

    def _kept_for(self, owner: Hashable) -> list[int]:
        keeps = self._keeps.get(owner)
        return [chunk for chunk in keeps if self._kept.get(chunk) == owner] if keeps else []

    # Which blocks are taken.

    def _take(self, place: Place, n: int) -> list[KVCacheBlock]:
        """Takes ``n`` blocks for ``place``; ValueError, taking none, if fewer are free."""
        if n > self.num_free_blocks:
            raise ValueError(f"{n} blocks are asked for, {self.num_free_blocks} are free")
        taken: list[KVCacheBlock] = []
        if place.after is not None and place.after + 1 < self._end_of(place.after):
            self._take_behind(place.after, n, taken)
            if len(taken) == n:
                return taken
        self.growths += 1
        if n == 1:
            self._take_rest(taken)
        while len(taken) < n:
            after = taken[-1].block_id if taken else place.after
            chunks = self._find(place, after, n - len(taken), place.room - len(taken))
            if not chunks:
                break
            for chunk in chunks:
                if len(taken) < n:
                    self._take_behind(chunk * self.chunk_blocks, n, taken)
                elif chunk not in self._kept:
                    self._keep(place.owner, chunk)
        if len(taken) < n:
            singles = super().popleft_n(n - len(taken))
            for block in singles:
                self._taken(block)
            taken += sorted(singles, key=lambda block: block.block_id)
        return taken

    def _take_behind(self, after: int, n: int, taken: list[KVCacheBlock]) -> None:
        """Takes the free blocks behind block ``after``, to the end of the chunk that the next
        block is in, until there are ``n``."""
        for block_id in range(after + 1, self._end_of(after + 1)):
            if len(taken) == n or not self._is_free(block_id):
                return
            super().remove(self._blocks[block_id])
            self._found[block_id] = False
            self._taken(self._blocks[block_id])
            taken.append(self._blocks[block_id])

    def _take_rest(self, taken: list[KVCacheBlock]) -> None:
        """Takes the first block behind an owner that has ended, if the rest of its chunk is free.

        Nothing that it holds can be found again.
        """
        for chunk in list(islice(self._rests, PROBES)):
            first = self._rests.pop(chunk)
            if chunk in self._empty:
                continue  # There is nothing in front of the rest to be spared.
            if all(self._is_free(i) for i in range(first, self._end_of(first))):
                self._take_behind(first - 1, 1, taken)
                return

    def _find(self, place: Place, after: int | None, n: int, room: int) -> list[int]:
        """Wholly free chunks for the next ``n`` blocks, those for ``room`` if they lie there."""
        wanted = -(-max(n, room) // self.chunk_blocks)
        kept = self._kept_for(place.owner)
        if kept:
            return kept[:wanted]
        whole = (len(self._empty) + len(self._held) + len(self._kept)) * self.chunk_blocks
        singles = self.num_free_blocks - whole
        if n < self.chunk_blocks and singles > self.num_free_blocks // SINGLES_DIVISOR:
            return []
        self._spare_found()
        newest = next(iter(self._held.values()), 0) + self.num_free_blocks // WINDOW_DIVISOR
        if after is not None and self._end_of(after) == after + 1:
            follows = self._stretch(after // self.chunk_blocks, newest, wanted, both_ways=False)
            if follows:
                return list(follows)
        # A prompt wants the longest stretch; a growth the shortest, so that long ones last.
        best = range(0)
        candidates = reversed(self._empty) if self._empty else iter(self._held)
        if wanted == 1 and self._empty:
            newest = -1  # It needs no chunk that holds something.
        for chunk in islice(candidates, PROBES):
            if chunk in best:
                continue
            limit = wanted if wanted > 1 else LONGEST
            found = self._stretch(chunk, newest, limit, both_ways=True)
            if not best or (len(found) > len(best)) == (wanted > 1):
                best = found
            if len(best) == wanted:
                break
        return list(best[:wanted] if self._empty else best[-wanted:])

    def _spare_found(self) -> None:
        """Chunks with a prefix that was found again since it was last spared go to the end."""
        for chunk in list(islice(self._held, PROBES)):
            first = chunk * self.chunk_blocks + 1
            if any(self._found[first : first + self.chunk_blocks]):
                self._found[first : first + self.chunk_blocks] = bytes(self.chunk_blocks)
                del self._held[chunk]
                self._held[chunk] = self._clock

    def _stretch(self, chunk: int, newest: int, limit: int, both_ways: bool) -> range:
        """Chunks side by side around one, which may be evicted; empty if it may not be."""
        first = last = chunk
        if both_ways:
            last += 1
            while last - first < limit and self._may_go(first - 1, newest):
                first -= 1
        while last - first < limit and self._may_go(last, newest):
            last += 1
        return range(first, last)

    def _may_go(self, chunk: int, newest: int) -> bool:
        return chunk in self._empty or self._held.get(chunk, newest + 1) <= newest

    def _keep(self, owner: Hashable, chunk: int) -> None:
        self._empty.pop(chunk, None)
        self._held.pop(chunk, None)
        self._kept[chunk] = owner
        keeps = self._keeps.setdefault(owner, [])
        if chunk not in keeps:
            keeps.append(chunk)
