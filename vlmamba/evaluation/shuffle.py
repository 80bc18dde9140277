"""The blind baseline: every question with the pictures of another one.

What a model still gets right then, it gets right without seeing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence

from vlmamba.errors import DataError
from vlmamba.evaluation.task import ImageRef, Sample


def shuffle_images(samples: Sequence[Sample], *, seed: int = 0) -> list[Sample]:
    """Deal the pictures out anew, so that no question sees a picture of its own.

    Pictures go from one question to another with as many; every question's pictures are used once. Questions
    that share a picture count as its owners. Text-only questions stay as they are.
    ``metadata["images_from"]`` names the giver.

    Args:
        samples: All questions of a task (not a part: the outcome depends on them).
        seed: Of the deal.

    Raises:
        DataError: There is no picture, or a picture belongs to too many of the questions.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        if sample.images:
            groups[len(sample.images)].append(index)
    if not groups:
        raise DataError("no question has a picture, so there is nothing to shuffle")
    result = list(samples)
    for count, members in sorted(groups.items()):
        owned = [frozenset(_identity(image) for image in samples[i].images) for i in members]
        for to, giver in enumerate(_deal(owned, random.Random(f"{seed}/{count}"), count)):
            sample, other = samples[members[to]], samples[members[giver]]
            metadata = {**sample.metadata, "images_from": other.question_id}
            result[members[to]] = dataclasses.replace(sample, images=other.images, metadata=metadata)
    return result


def _identity(image: ImageRef) -> Hashable:
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return image if not hasattr(image, "tobytes") else hashlib.sha256(image.tobytes()).hexdigest()


def _deal(owned: Sequence[frozenset[Hashable]], rng: random.Random, count: int) -> list[int]:
    """A permutation in which no place receives a set that meets its own.

    Places with the same set are put side by side in random order and the whole is turned by the size of the
    largest such block, which suffices for single pictures; sets that overlap in part are then exchanged until
    none is left.
    """
    blocks: dict[frozenset[Hashable], list[int]] = defaultdict(list)
    for index, pictures in enumerate(owned):
        blocks[pictures].append(index)
    order = list(blocks.values())
    rng.shuffle(order)
    order.sort(key=len, reverse=True)  # a stable sort: equal blocks stay shuffled
    line = [index for block in order for index in block]
    turn = len(order[0])
    dealt = [0] * len(owned)
    for position, index in enumerate(line):
        dealt[index] = line[(position + turn) % len(line)]
    for _ in range(20):
        clashes = [i for i, giver in enumerate(dealt) if owned[i] & owned[giver]]
        if not clashes:
            return dealt
        for i in clashes:
            for j in rng.sample(range(len(owned)), len(owned)):
                if not owned[i] & owned[dealt[j]] and not owned[j] & owned[dealt[i]]:
                    dealt[i], dealt[j] = dealt[j], dealt[i]
                    break
    raise DataError(
        f"the pictures of the {len(owned)} question(s) with {count} picture(s) cannot be dealt out so that "
        f"each gets another's: {len(clashes)} would keep their own, since {turn} question(s) share theirs. "
        "Add questions on other pictures"
    )
