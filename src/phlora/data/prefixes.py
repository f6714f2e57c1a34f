"""Which rows share the computation of their first tokens, and how they lie in one stream.

Legend: `n` rows, `T` stream positions.

Rows that begin alike are a group: the tokens that all of them begin with stand once. Behind these stand the groups of
those rows that go on alike, and then what is left of every other row, its tail. So a system prompt, the examples that
some of its rows go on with, and a question to these stand once each. The outermost group shares nothing; plain packing
is that group alone.

The last common token is not shared: it predicts another token in each row, so whatever stands behind a shared start
begins with its own copy of that token, and every position has one target at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

# A group costs a few small attention calls in each layer; sharing less than this many positions does not pay.
_LEAST_SAVING = 16


@dataclass(frozen=True, eq=False)
class Group:
    """Rows behind the tokens that they share, in one stretch of a stream: shared tokens, groups within, tails.

    Attributes:
        outer: stream positions of the shared tokens of the groups around it, from the first token of the rows on.
        shared: stream positions of its own shared tokens, which stand once for all of its rows; may be empty.
        rows: numbers of the rows that stand in no group within, in the order of their tails.
        tail_lengths: tokens of these rows after the shared ones, longest first, at least 1 each.
        tails_start: stream position of the first tail.
        num_within: groups within, which are the next ones of their stream.
    """

    outer: tuple[range, ...]
    shared: range
    rows: tuple[int, ...]
    tail_lengths: tuple[int, ...]
    tails_start: int
    num_within: int

    @cached_property
    def num_shared(self) -> int:
        """Tokens that each of its rows shares, those of the groups around it too."""
        return sum(map(len, self.outer)) + len(self.shared)

    @property
    def stop(self) -> int:
        """Stream position after the last tail."""
        return self.tails_start + sum(self.tail_lengths)

    def tails(self) -> Iterator[tuple[int, int, int]]:
        """(row, stream position, length) of each tail."""
        start = self.tails_start
        for row, length in zip(self.rows, self.tail_lengths, strict=True):
            yield row, start, length
            start += length


@dataclass(frozen=True, eq=False)
class Segments:
    """How the rows of one forward pass lie in its stream.

    Attributes:
        groups: each before the groups within it; the first holds all others and shares nothing.
    """

    groups: tuple[Group, ...]

    @property
    def num_positions(self) -> int:
        """Positions that are computed."""
        return self.groups[0].stop

    @property
    def longest(self) -> int:
        """Positions of the longest row."""
        return max(group.num_shared + group.tail_lengths[0] for group in self.groups if group.rows)

    @cached_property
    def paths(self) -> dict[int, list[int]]:
        """Row number -> the stream positions of its tokens, first to last."""
        return {
            row: [*chain(*group.outer, group.shared, range(start, start + length))]
            for group in self.groups
            for row, start, length in group.tails()
        }

    def rows_of(self, number: int) -> Iterator[int]:
        """The rows behind the shared tokens of a group, those of the groups within it too."""
        for group in self.groups[number : number + self.groups[number].num_within + 1]:
            yield from group.rows


class _Node:
    """Tokens that stand once, and what goes on behind them; with nothing behind them, the tail of a row.

    Attributes:
        length: of its tokens.
        num_positions: of all tokens from here on.
        num_nodes: from here on, this one counted; those of them that share are `num_groups`.
        num_copied: shared tokens from here on, each once for every node behind it.
    """

    __slots__ = ("length", "nodes", "num_copied", "num_groups", "num_nodes", "num_positions", "row")

    def __init__(self, length: int, nodes: Sequence[_Node] = (), *, row: int = -1) -> None:
        self.length, self.nodes, self.row = length, nodes, row
        self.num_positions: int = length + sum(node.num_positions for node in nodes)
        self.num_groups: int = bool(nodes) + sum(node.num_groups for node in nodes)
        self.num_nodes: int = 1 + sum(node.num_nodes for node in nodes)
        self.num_copied: int = sum(node.num_copied + length * node.num_nodes for node in nodes)

    def behind(self, length: int) -> _Node:
        """The same with `length` more tokens at its start."""
        return _Node(length + self.length, self.nodes, row=self.row)


def share_prefixes(rows: Sequence[Sequence[int]]) -> Segments:
    """Lay rows out so that few positions are computed: in groups, each behind its longest common start.

    Rows with a common start are neighbours once sorted, and what neighbours share makes the tree of all common starts.
    Of its branches those become groups that together save the most, a group counted as 16 positions.
    """
    return _lay_out(_best_tree(rows))


def share_in_passes(
    rows: Sequence[Sequence[int]], *, max_positions: int, copy_cost: float = 0.0
) -> list[Segments]:
    """As `share_prefixes`, in as few streams as best fit finds, each small enough for one forward pass.

    A group that is too large for a pass stands, with its shared tokens, in several.

    Args:
        rows: their numbers are those of the groups in all streams.
        max_positions: of a pass; a row that is longer is a stream of its own.
        copy_cost: what attention that lays the shared keys before each tail takes for one of them, in positions.
    """
    tree = _best_tree(rows)
    if _size(tree, 0, copy_cost) <= max_positions:
        return [_lay_out(tree)]
    sized = [(_size(piece, 0, copy_cost), piece) for piece in _cut(tree, max_positions, copy_cost)]
    passes: list[list[_Node]] = []
    rooms: list[float] = []
    for size, piece in sorted(sized, key=lambda pair: pair[0], reverse=True):
        fitting = [number for number, room in enumerate(rooms) if size <= room]
        if fitting:
            number = min(fitting, key=rooms.__getitem__)
        else:
            number = len(passes)
            passes.append([])
            rooms.append(max_positions)
        passes[number].append(piece)
        rooms[number] -= size
    return [_lay_out(_Node(0, pieces)) for pieces in passes]


def _size(node: _Node, depth: int, copy_cost: float) -> float:
    """What a node behind `depth` shared tokens takes of a pass."""
    return node.num_positions + copy_cost * (node.num_copied + depth * node.num_nodes)


def _cut(tree: _Node, max_positions: int, copy_cost: float) -> list[_Node]:
    """What stands in a tree, in pieces that fit, each behind the tokens that its rows share."""
    nodes = [(tree, 0)]
    for node, depth in nodes:
        nodes += [(below, depth + node.length) for below in node.nodes]
    pieces: dict[_Node, list[_Node]] = {}
    for node, depth in reversed(nodes):
        if not node.nodes or depth + _size(node, depth, copy_cost) <= max_positions:
            pieces[node] = [node]
            continue
        parts: list[list[_Node]] = []
        room = 0.0
        for piece in chain.from_iterable(pieces[below] for below in node.nodes):
            size = _size(piece, depth + node.length, copy_cost)
            if not parts or size > room:
                parts.append([])
                room = max_positions - depth - node.length
            parts[-1].append(piece)
            room -= size
        # What is left alone shares with nobody.
        pieces[node] = [_Node(node.length, p) if len(p) > 1 else p[0].behind(node.length) for p in parts]
    return [piece for node in tree.nodes for piece in pieces[node]]


def _lay_out(tree: _Node) -> Segments:
    """Every node at its place: its own tokens, the groups within, then the tails, longest first."""
    groups = []
    waiting: list[tuple[_Node, int, tuple[range, ...]]] = [(tree, 0, ())]
    while waiting:
        node, start, outer = waiting.pop()
        shared = range(start, start + node.length)
        within = [below for below in node.nodes if below.nodes]
        tails = sorted((below for below in node.nodes if not below.nodes), key=lambda tail: -tail.length)
        start, places = shared.stop, []
        for below in within:
            places.append((below, start, (*outer, shared) if shared else outer))
            start += below.num_positions
        waiting += reversed(places)
        rows, lengths = tuple(tail.row for tail in tails), tuple(tail.length for tail in tails)
        groups.append(Group(outer, shared, rows, lengths, start, node.num_groups - 1))
    return Segments(tuple(groups))


class _Branch:
    """Rows with a common start of `depth` tokens: those that go on alike as `branches`, the others as `rows`.

    Attributes:
        alone: what the nodes behind it take when it is no group, in positions, by how many tokens before them stand in
            each of them.
        home: tokens that its rows share with the group that it is, or else stands in.
        nodes: what it brings to the group that it stands in.
    """

    __slots__ = ("alone", "branches", "depth", "home", "nodes", "parent", "rows")

    def __init__(self, depth: int) -> None:
        self.depth, self.home = depth, 0
        self.parent: _Branch | None = None
        self.branches: list[_Branch] = []
        self.rows: list[int] = []
        self.alone: list[int] = []
        self.nodes: list[_Node] = []


def _best_tree(rows: Sequence[Sequence[int]]) -> _Node:
    """The outermost group: what each branch costs is known from those behind it, which are groups from those before."""
    branches = _branches(rows)
    for branch in branches:
        _weigh(branch)
    for branch in reversed(branches[:-1]):
        _settle(branch)
    for branch in branches:
        nodes = [_Node(len(rows[row]) - branch.home, row=row) for row in branch.rows]
        nodes += [node for below in branch.branches for node in below.nodes]
        if branch.home == branch.depth:
            nodes = [_Node(branch.depth - (branch.parent.home if branch.parent else 0), nodes)]
        branch.nodes = nodes
    return branches[-1].nodes[0]


def _branches(rows: Sequence[Sequence[int]]) -> list[_Branch]:
    """Every common start, after those that go on from it; the last one is empty."""
    order = sorted(range(len(rows)), key=lambda number: list(rows[number]))
    common = [_common_start(rows[left], rows[right]) for left, right in pairwise(order)]
    closed, path = [], [_Branch(0)]
    for row, shared in zip(order, [*common, 0], strict=True):
        depth = max(0, shared - 1)
        if depth > path[-1].depth:
            path.append(_Branch(depth))
        path[-1].rows.append(row)
        while depth < path[-1].depth:
            done = path.pop()
            if depth > path[-1].depth:
                path.append(_Branch(depth))
            done.parent = path[-1]
            path[-1].branches.append(done)
            closed.append(done)
    return [*closed, *path]


def _weigh(branch: _Branch) -> None:
    """Fill `alone`, once those of the branches behind it are known.

    Only up to the price of a group: two nodes or more that begin with as many tokens had better share them.
    """
    alone = [len(branch.rows) * before for before in range(_LEAST_SAVING)]
    for below in branch.branches:
        step, group = below.depth - branch.depth, _LEAST_SAVING + below.alone[0]
        for before in range(_LEAST_SAVING):
            alone[before] += min([group + before + step, *below.alone[before + step : before + step + 1]])
    branch.alone = alone


def _settle(branch: _Branch) -> None:
    """Find `home`, once that of the branch before it is known."""
    assert branch.parent is not None
    branch.home = branch.parent.home
    before = branch.depth - branch.home
    if before >= _LEAST_SAVING or _LEAST_SAVING + before + branch.alone[0] <= branch.alone[before]:
        branch.home = branch.depth


def _common_start(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens are equal. Halving compares slices, which is much faster than token by token."""
    least, most = 0, min(len(left), len(right))
    while least < most:
        middle = (least + most + 1) // 2
        if left[least:middle] == right[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
