"""Which slots hold rows of which beginning of a prompt: a tree of blocks of token ids.

A node stands for all tokens from position 0 to the end of its block. Its children are found by the hash of the next
block's ids, and a hit compares the ids themselves: two blocks of one hash are two children. So a node is reached by
exactly one sequence of tokens, and slots that lead through the same node hold the same tokens up to there.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

Block = bytes
"""Ids of a block. Bytes, because they remember their hash, and nobody outside of the process can foresee it."""


def as_block(tokens: Sequence[int]) -> Block:
    """The block of these ids, which must fit into 32 bits."""
    return array("i", tokens).tobytes()


def blocks_of(tokens: Sequence[int], size: int, first: int, stop: int) -> Iterator[Block]:
    """Blocks number `first` to `stop` - 1 of `tokens`, each of `size` ids."""
    return (as_block(tokens[number * size : (number + 1) * size]) for number in range(first, stop))


@dataclass(eq=False)
class _Node:
    block: Block
    num_slots: int = 0
    """Whose paths lead through it."""
    children: dict[Block, _Node] = field(default_factory=dict)


class PrefixIndex:
    """The path of blocks of each slot. It knows neither which rows are computed nor who may share them."""

    def __init__(self, num_slots: int) -> None:
        self._root = _Node(b"")
        self._paths: list[list[_Node]] = [[] for _ in range(num_slots)]

    def num_blocks(self, slot: int) -> int:
        """Length of the slot's path."""
        return len(self._paths[slot])

    def extend(self, slot: int, blocks: Iterable[Block]) -> None:
        """Put blocks behind those of the slot."""
        path = self._paths[slot]
        node = path[-1] if path else self._root
        for block in blocks:
            if block not in node.children:
                node.children[block] = _Node(block)
            node = node.children[block]
            node.num_slots += 1
            path.append(node)

    def truncate(self, slot: int, num_blocks: int) -> None:
        """Keep the first `num_blocks` blocks of the slot alone."""
        path = self._paths[slot]
        while len(path) > num_blocks:
            node = path.pop()
            node.num_slots -= 1
            if node.num_slots == 0:  # and so it has no children
                del (path[-1] if path else self._root).children[node.block]

    def shared_blocks(self, blocks: Sequence[Block], slots: Iterable[int]) -> dict[int, int]:
        """For each of `slots` the number of its leading blocks that are the first of `blocks`.

        Takes a look-up for each block, and log2(blocks) comparisons for each slot."""
        nodes: list[_Node] = []
        children = self._root.children
        for block in blocks:
            node = children.get(block)
            if node is None:
                break
            nodes.append(node)
            children = node.children
        return {slot: _num_equal(self._paths[slot], nodes) for slot in slots}


def _num_equal(path: list[_Node], other: list[_Node]) -> int:
    """Leading nodes that two paths from the root have in common: once they part they never meet again."""
    return bisect_left(range(min(len(path), len(other))), True, key=lambda index: path[index] is not other[index])
