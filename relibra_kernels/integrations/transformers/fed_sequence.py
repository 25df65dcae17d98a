"""One sequence of a recorded forward or of `generate`: what was fed, where it went, and how long it is."""

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from ...planner.errors import InputError


@dataclass
class FedSequence:
    """What one row of a batch was fed, a part for each forward.

    token_ids: int [n]; None for embeddings
    expert_ids: compact ids [n, L, K]
    known: bool [n], of which tokens the expert ids are known
    """

    sampled: bool  # a token was sampled after the last one that was fed
    perhaps_padding: bool = False  # one token at the end of a packed row
    padding: int = 0  # how many of its tokens may be padding behind it, to a multiple of the packed row
    token_ids: list[np.ndarray | None] = field(default_factory=list)
    expert_ids: list[np.ndarray] = field(default_factory=list)
    known: list[np.ndarray] = field(default_factory=list)

    def add(self, token_ids: np.ndarray | None, expert_ids: np.ndarray, known: np.ndarray) -> None:
        self.token_ids.append(token_ids)
        self.expert_ids.append(expert_ids)
        self.known.append(known)

    def cut(self, rows: int) -> None:
        """Keep the first rows."""
        excess = sum(map(len, self.expert_ids)) - rows
        while excess > 0:
            keep = max(len(self.expert_ids[-1]) - excess, 0)
            excess -= len(self.expert_ids[-1]) - keep
            ids, expert_ids, known = self.token_ids.pop(), self.expert_ids.pop(), self.known.pop()
            if keep:
                self.add(None if ids is None else ids[:keep], expert_ids[:keep], known[:keep])

    def copy(self) -> "FedSequence":
        ids, expert_ids, known = [*self.token_ids], [*self.expert_ids], [*self.known]
        return dataclasses.replace(self, token_ids=ids, expert_ids=expert_ids, known=known)

    def length(self, eos_token_ids: np.ndarray) -> int:
        """How many tokens the sequence has, up to its first sampled end-of-sequence token.

        Without one, they are those that were fed, and one more where the last was sampled.
        """
        fed = sum(map(len, self.expert_ids))
        if not self.sampled:
            return fed
        prompt, ids = len(self.expert_ids[0]), self.ids()
        if ids is not None:
            ended = np.flatnonzero(np.isin(ids[prompt:], eos_token_ids))
            if len(ended):
                return prompt + int(ended[0]) + 1
        return fed + 1

    def ids(self) -> np.ndarray | None:
        """int [tokens fed]; None where a forward was fed embeddings."""
        known = [part for part in self.token_ids if part is not None]
        return np.concatenate(known) if len(known) == len(self.token_ids) else None

    def checked_length(self, index: int, given: np.ndarray) -> int:
        """How many tokens the sequence has, which are said to be `given`.

        Args:
            index: which sequence of the record it is, for messages.
        Raises: InputError where they are not what was fed.
        """
        rows, fed = sum(map(len, self.expert_ids)), self.ids()
        most = rows + 1 if self.sampled else rows
        least = len(self.expert_ids[0]) if self.sampled else rows
        if self.padding and fed is not None and len(given) < rows and len(np.unique(fed[len(given) :])) == 1:
            least = rows - self.padding
        if not least <= len(given) <= most:
            raise InputError(
                f"token_ids of sequence {index} has {len(given)} tokens, but {rows} were fed; it must be {least} to "
                f"{most}"
            )
        shared = min(rows, len(given))
        if fed is not None and (fed[:shared] != given[:shared]).any():
            where = int(np.argmax(fed[:shared] != given[:shared]))
            raise InputError(
                f"token_ids of sequence {index} has {given[where]} at position {where}, but the model was fed "
                f"{fed[where]} there: other sequences, or beams that changed places"
            )
        return len(given)
