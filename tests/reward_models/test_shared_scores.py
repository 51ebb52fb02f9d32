"""Scores that reward models over one backbone make for each other, with stand-ins for models."""

import gc

from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.reward_models.rendering import Rendered
from trl_grpo_ext.reward_models.shared_scores import SharedScores


class Member:
    """A reward model with the inputs of all those that have the same key."""

    def __init__(self, number, key):
        self.number = number
        self.key = key

    def inputs_key(self):
        return (self.key,)

    def score(self, solution):
        return [self.number + solution.ids[position] / 100 for position in solution.score_positions]


def solution(ident, steps=1, end=1):
    """The position of the last of the scores is `end`, of ids that tell where they are."""
    return Rendered([0, *range(10 * ident, 10 * ident + 4)], 1, list(range(end + 1 - steps, end + 1)))


class Backbone:
    """Counts what is run."""

    def __init__(self, keys):
        self.members = [Member(number, key) for number, key in enumerate(keys)]
        self.shared = SharedScores()
        for member in self.members:
            self.shared.register(member)
        self.ran = []

    def score(self, number, solutions):
        return self.shared.score(self.members[number], solutions, self.run)

    def run(self, solutions, members):
        self.ran.append([one.ids[1] // 10 for one in solutions])
        return [[member.score(one) for one in solutions] for member in members]


SOLUTIONS = st.builds(solution, ident=st.integers(1, 3), steps=st.integers(0, 2), end=st.integers(2, 3))
CALLS = st.lists(st.tuples(st.integers(0, 3), st.lists(SOLUTIONS, max_size=4)), max_size=12)


@given(keys=st.lists(st.integers(0, 1), min_size=4, max_size=4), calls=CALLS)
def test_in_every_order_of_calls_the_scores_are_ones_own(keys, calls):
    backbone = Backbone(keys)
    for number, solutions in calls:
        expected = [backbone.members[number].score(one) for one in solutions]
        assert backbone.score(number, solutions) == expected


def test_a_batch_is_run_once_for_all_with_the_same_inputs():
    backbone = Backbone(["a", "b", "a", "a"])
    batch = [solution(1), solution(2), solution(1)]
    for number in (2, 0, 1, 3):
        backbone.score(number, batch)
    # Equal solutions once; the second member by itself; processes without a solution to run still take part
    assert backbone.ran == [[1, 2], [], [1, 2], []]


def test_a_batch_that_another_has_begun_does_not_take_scores_from_a_third():
    backbone = Backbone(["a"] * 3)
    backbone.score(0, [solution(1), solution(2)])
    backbone.score(1, [solution(1), solution(3)])
    backbone.score(2, [solution(1), solution(2), solution(3)])
    assert backbone.ran == [[1, 2], [3], []]


def test_scores_of_one_that_never_asks_do_not_pile_up():
    backbone = Backbone(["a", "a"])
    for ident in range(1, 9):
        backbone.score(0, [solution(ident)])
    backbone.score(1, [solution(7), solution(8)])
    assert backbone.ran[-1] == [7]


def test_a_reward_model_that_is_gone_is_not_scored_for():
    backbone = Backbone(["a", "a"])
    del backbone.members[1]
    gc.collect()
    asked = []

    def run(solutions, members):
        asked.append(members)
        return [[member.score(one) for one in solutions] for member in members]

    backbone.shared.score(backbone.members[0], [solution(1)], run)
    assert asked == [[backbone.members[0]]]
