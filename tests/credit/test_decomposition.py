"""The sums add up to the advantages, and each number in them is what its formula says."""

import numpy as np
import torch
from hypothesis import given, settings

from tests.advantages.batches import batches, every_estimator, every_order, every_scale, every_unit
from tests.advantages.batches import few as dozen
from trl_grpo_ext import Estimator
from trl_grpo_ext.advantages.estimators import find_estimator
from trl_grpo_ext.advantages.returns import plain_discounted_returns
from trl_grpo_ext.advantages.settings import AdvantageSettings
from trl_grpo_ext.credit.decomposition import decompose


few = settings(dozen, max_examples=3)


def decomposed(batch, options):
    tensors = [torch.tensor(values) for values in (batch.rewards, batch.mask, batch.weights)]
    return decompose(*tensors, batch.group_size, AdvantageSettings(**options))


@every_unit
@every_order
@every_scale
@every_estimator
@few
@given(batch=batches)
def test_shares_and_offset_add_up_to_the_advantage(batch, estimator, scale, order, unit):
    # A source of weight 0 is in no sum
    batch.weights[0] *= batch.group_size % 2
    options = batch.options(estimator, scale, order, unit)
    sums = decomposed(batch, options).advantages_NT.numpy()
    np.testing.assert_allclose(sums[batch.mask == 1], batch.run(options)[batch.mask == 1], rtol=0, atol=1e-10)
    assert np.isnan(sums[batch.mask == 0]).all()


@every_unit
@every_order
@every_estimator
@few
@given(batch=batches)
def test_each_share_follows_from_return_mean_divisor_and_weight(batch, estimator, order, unit):
    options = batch.options(estimator, "group", order, unit)
    found = decomposed(batch, options)
    normalizes_returns = find_estimator(options["estimator"]).normalizes == "returns"
    values = found.returns_KNT if normalizes_returns else found.rewards_KNT.nan_to_num()
    normalized_KNT = ((values - found.mean_KNT) / found.divisor_KNT).nan_to_num()
    gammas = options["gamma"] if isinstance(options["gamma"], list) else [options["gamma"]] * len(batch.weights)
    for k, weight in enumerate(batch.weights):
        earned_NT = found.rewards_KNT[k] if normalizes_returns else normalized_KNT[k]
        own_ends_NT = ~found.rewards_KNT[k].isnan()
        any_ends_NT = (~found.rewards_KNT.isnan()).any(0)
        # The sum of step rewards is discounted as one
        summed = not normalizes_returns and order == "sum_then_normalize"
        mask_NT = torch.tensor(batch.mask).bool()
        # A turn ends where the loss mask does
        turn_ends_NT = mask_NT & ~torch.nn.functional.pad(mask_NT[:, 1:], (0, 1))
        ends_NT = {"token": None, "step": any_ends_NT if summed else own_ends_NT, "turn": turn_ends_NT}[unit]
        for n, mask_T in enumerate(batch.mask.astype(bool)):
            # Tokens outside the mask neither discount nor shift
            ends_1T = None if ends_NT is None else ends_NT[n : n + 1, mask_T]
            returns = plain_discounted_returns(earned_NT[n : n + 1, mask_T].nan_to_num(), gammas[k], ends_1T)
            torch.testing.assert_close(found.returns_KNT[k, n, mask_T], returns[0], rtol=0, atol=1e-10)
        shares_NT = weight * (normalized_KNT[k] if normalizes_returns else found.returns_KNT[k]) / found.batch_divisor
        # Without spread over the batch all shares are 0
        stated_NT = shares_NT.nan_to_num().where(found.shares_KNT[k] != 0, 0.0)
        torch.testing.assert_close(found.shares_KNT[k].nan_to_num(), stated_NT, rtol=0, atol=1e-10)


@few
@given(batch=batches)
def test_of_an_estimator_of_the_users_own_only_returns_are_known(batch):
    own = Estimator(lambda inputs: inputs.values_NT)
    options = batch.options("position") | {"estimator": own, "options": {}}
    found, known = decomposed(batch, options), decomposed(batch, batch.options("position"))
    torch.testing.assert_close(found.returns_KNT, known.returns_KNT, equal_nan=True)
    assert found.mean_KNT.isnan().all() and found.divisor_KNT.isnan().all()
    assert found.advantages_NT.isnan().all()
