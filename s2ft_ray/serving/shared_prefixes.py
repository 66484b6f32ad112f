"""Which pages of the KV cache a prompt may begin with: those of its own tenant and adapter.

transformers' batching shares whole pages between prompts that begin alike. It knows a page by a
64-bit hash of its tokens and those before them, whatever adapter made its keys and values. Here the
chain of hashes begins with who asks and who answers, under a key of this process, in 128 bits.

Invariant: a page is found only by requests of the tenant and the adapter that filled it.
"""

import hashlib
import secrets
from array import array
from collections.abc import Callable, Hashable, Sequence

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import (
    CacheAllocator,
)

OwnerOf = Callable[[str], Hashable | None]
"""Request id -> whose pages it reads and fills; None: nobody's."""
_DIGEST_BYTES = 16


class SharedPrefixes:
    """Takes a cache's search for shared pages over. Used from the batching loop's thread."""

    def __init__(self, cache: PagedAttentionCache, owner_of: OwnerOf) -> None:
        self.cache = cache
        self._owner_of = owner_of
        self._search = cache.search_prefix_match
        self._key = secrets.token_bytes(32)
        self._root: bytes | None = None
        self.num_tokens = 0
        """Prompt tokens that were found in the cache, and not computed again."""
        cache.search_prefix_match = self._search_of_owner
        for allocator in cache.cache_allocators.values():
            _Pages(allocator, self)

    def root_of(self, request_id: str) -> bytes | None:
        """Return what the chain of a request's pages begins with; None where it shares none."""
        owner = self._owner_of(request_id)
        return None if owner is None else self.digest(b"", repr(owner).encode())

    def digest(self, before: bytes, content: bytes) -> bytes:
        """Return the name of a page behind another one."""
        return hashlib.blake2b(before + content, digest_size=_DIGEST_BYTES, key=self._key).digest()

    def root_of_search(self) -> bytes | None:
        """Return the root of the request that is being searched for."""
        return self._root

    def _search_of_owner(self, request_id: str, prompt_ids: list[int]) -> int:
        """Return how many of a new request's tokens are in the cache, and give it their pages."""
        self._root = self.root_of(request_id)
        found = int(self._search(request_id, prompt_ids))
        self.num_tokens += found
        return found


class _Pages:
    """One allocator's pages, named by owner and content. Replaces two methods of its instance."""

    def __init__(self, allocator: CacheAllocator, prefixes: SharedPrefixes) -> None:
        self._allocator = allocator
        self._prefixes = prefixes
        allocator.match_prefix_blocks = self._match
        allocator.mark_complete_blocks = self._mark

    def _match(self, prompt_ids: list[int]) -> list[int]:
        """Return the pages that hold the prompt's beginning, never all of it."""
        name = self._prefixes.root_of_search()
        found: list[int] = []
        if name is None:
            return found
        size = self._allocator.tokens_per_page
        for start in range(0, (len(prompt_ids) - 1) // size * size, size):
            name = self._name(name, prompt_ids[start : start + size])
            page = self._allocator.ledger.hash_to_block.get(name)
            if page is None:
                break
            found.append(page)
        return found

    def _mark(self, request_id: str, token_ids: list[int], num_new: int) -> None:
        """Name the pages that a request's last step has filled; one that exists is used instead."""
        before = self._prefixes.root_of(request_id)
        if before is None:
            return
        ledger, size = self._allocator.ledger, self._allocator.tokens_per_page
        pages = self._allocator.block_table[request_id]
        for place, page in enumerate(pages):
            name = ledger.block_to_hash.get(page)
            if name is None:
                tokens = token_ids[place * size : (place + 1) * size]
                if not num_new or len(tokens) < size:
                    return
                name = self._name(before, tokens)
                num_new -= 1
                same = ledger.register_new_hash(page, name)
                if same is not None:
                    ledger.acquire(same)
                    pages[place] = same
                    if ledger.release(page):
                        self._allocator.pool.free_blocks(self._allocator.index, [page])
            before = name

    def _name(self, before: bytes, tokens: Sequence[int]) -> bytes:
        return self._prefixes.digest(before, array("i", tokens).tobytes())
