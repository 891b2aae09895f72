"""A tree of sums: weights that can be changed, and drawn by, in logarithmic time (Schaul et al. 2016, appendix B.2.1).

             root = total
            /            \\
         a + b          c + d          every inner node is the sum of its two, made anew when either changes:
         /   \\          /   \\          the same leaves give the same sums to the bit, whatever came before
        a     b        c     d
"""

from __future__ import annotations


class SumTree:
    """Weights by place, from 0; as many places as are asked for."""

    def __init__(self) -> None:
        self._leaves = 1
        self._nodes = [0.0, 0.0]
        """The root is node 1, the two of node n are 2n and 2n + 1; node 0 is unused."""

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return self._nodes[1]

    def __getitem__(self, place: int) -> float:
        """The weight of a place; 0 for one that never had any."""
        return self._nodes[self._leaves + place] if place < self._leaves else 0.0

    def __setitem__(self, place: int, weight: float) -> None:
        """Give a place another weight, 0 or more."""
        while place >= self._leaves:
            self._grow()
        node = self._leaves + place
        nodes = self._nodes
        nodes[node] = weight
        while node > 1:
            node >>= 1
            nodes[node] = nodes[2 * node] + nodes[2 * node + 1]

    def find(self, mass: float) -> int:
        """The place in whose share `mass`, from 0 to below the total, lies; never one without weight.

        Raises ValueError if no place has any.
        """
        nodes, node = self._nodes, 1
        if not nodes[1] > 0.0:
            raise ValueError("no place has a weight: there is nothing to draw")
        while node < self._leaves:
            node *= 2
            # Rounding may carry the mass past the last weight: it is of that one then.
            if mass >= nodes[node] and nodes[node + 1] > 0.0:
                mass -= nodes[node]
                node += 1
        return node - self._leaves

    def _grow(self) -> None:
        """Twice as many places: the old tree is the left half of the new one."""
        wider = [0.0, self._nodes[1]]
        for first in (1 << level for level in range(self._leaves.bit_length())):
            wider += self._nodes[first : 2 * first] + [0.0] * first
        self._leaves *= 2
        self._nodes = wider
