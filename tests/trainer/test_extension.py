"""What a user may add from outside: estimators, divergences, metrics and overrides, without an edit of the package."""

import inspect
import logging
import math
import re
from dataclasses import dataclass
from types import MethodType

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

from tests.support.training import fixed_completions, loss_and_gradients, make_trainer, moved_policy, scored_batch
from trl_grpo_ext import DIVERGENCES, ESTIMATORS, Divergence, Estimator, GRPOExtConfig, GRPOExtTrainer, StepRewards
from trl_grpo_ext.loss import loss_mask


LENGTHS = [3, 5, 4, 6]


def judge(completion_ids, **columns):
    """Two steps per completion, with values that depend on its tokens."""
    return [StepRewards([0, len(ids) - 1], [ids[0] / 10, float(len(ids))]) for ids in completion_ids]


def trainer_of(trainer_class, model, folder, **config):
    rows = fixed_completions(LENGTHS)
    return make_trainer(trainer_class, model, judge, folder, trainer_options={"rollout_func": rows}, **config)


def test_the_constructor_takes_what_trls_takes_by_the_same_names_and_defaults():
    def parameters(trainer_class):
        signature = inspect.signature(trainer_class.__init__)
        return {name: parameter.default for name, parameter in signature.parameters.items()}

    assert parameters(GRPOExtTrainer) == parameters(GRPOTrainer)
    assert list(parameters(GRPOExtTrainer)) == list(parameters(GRPOTrainer))


def test_an_estimator_added_to_the_table_is_trained_on(tiny_model, tmp_path, monkeypatch):
    def twice_the_return(inputs):
        return 2 * inputs.values_NT

    monkeypatch.setitem(ESTIMATORS, "twice", Estimator(twice_the_return))
    trainer = trainer_of(
        GRPOExtTrainer, tiny_model, tmp_path, supervision="process", advantage_estimator="twice", gamma=1.0
    )
    batch = scored_batch(trainer, len(LENGTHS))
    for row, length in enumerate(LENGTHS):
        first = batch["completion_ids"][row, 0].item() / 10
        expected = [2 * (first + length)] + [2.0 * length] * (length - 1)
        torch.testing.assert_close(batch["advantages"][row, :length], torch.tensor(expected))


def test_a_function_is_an_estimator_under_its_import_path(tiny_model, tmp_path):
    trainer = trainer_of(
        GRPOExtTrainer, tiny_model, tmp_path, supervision="process", advantage_estimator=squared_returns, gamma=1.0
    )
    assert trainer.args.advantage_estimator == f"{__name__}:squared_returns"
    assert f'"{__name__}:squared_returns"' in trainer.args.to_json_string()
    # The square of the sum of both rewards, which the sum of their squares is not
    batch = scored_batch(trainer, len(LENGTHS))
    both = batch["completion_ids"][0, 0].item() / 10 + LENGTHS[0]
    assert batch["advantages"][0, 0].item() == pytest.approx(both**2)
    assert batch["advantages"][0, 1].item() == LENGTHS[0] ** 2
    row = ESTIMATORS["step"]
    for estimator in (row, row.function):
        config = GRPOExtConfig(tmp_path, bf16=False, supervision="process", advantage_estimator=estimator)
        assert config.advantage_estimator == "step"


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (lambda inputs: inputs.values_NT, "cannot be found again as .*Define it at the top level of a module"),
        (Estimator(min), "is an Estimator that is not in ESTIMATORS"),
        (f"{__name__}:absent", "advantage_estimator='.*:absent' cannot be imported"),
        ("pooledd", "advantage_estimator must be one of 'position', 'pooled'"),
    ],
)
def test_an_estimator_that_a_saved_config_could_not_name_is_refused(tmp_path, estimator, message):
    with pytest.raises(ValueError, match=message):
        GRPOExtConfig(tmp_path, bf16=False, supervision="process", advantage_estimator=estimator)


def squared_returns(inputs):
    return inputs.values_NT**2


def test_overridden_advantages_are_trained_on_under_both_supervisions(tiny_model, tmp_path):
    class Rows(GRPOExtTrainer):
        def compute_advantages(self, batch):
            rows_N1 = torch.arange(batch.mask_NT.size(0), dtype=torch.float)[:, None]
            return torch.where(batch.mask_NT, rows_N1, 0.0)

    process = scored_batch(trainer_of(Rows, tiny_model, tmp_path, supervision="process"), len(LENGTHS))
    assert process["advantages"].tolist() == [[row * (t < n) for t in range(6)] for row, n in enumerate(LENGTHS)]
    outcome = scored_batch(trainer_of(Rows, tiny_model, tmp_path), len(LENGTHS))
    assert outcome["advantages"].tolist() == [0.0, 1.0, 2.0, 3.0]
    # On one trainer instead of its class
    trainer = trainer_of(GRPOExtTrainer, tiny_model, tmp_path)
    trainer.compute_advantages = MethodType(Rows.compute_advantages, trainer)
    assert scored_batch(trainer, len(LENGTHS))["advantages"].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("estimator", ["k3", "k2", "exact"])
def test_an_overridden_kl_is_the_one_in_loss_gradient_and_log(tiny_model, tmp_path, estimator):
    class Doubled(GRPOExtTrainer):
        def per_token_kl(self, output, inputs):
            return 2 * super().per_token_kl(output, inputs)

    def run(trainer_class, beta):
        trainer = trainer_of(
            trainer_class, moved_policy(tiny_model), tmp_path / f"{trainer_class.__name__}{beta}", beta=beta,
            kl_estimator=estimator,
        )  # fmt: skip
        # The reference is the model on the disk
        trainer.ref_model.load_state_dict(moved_policy(tiny_model, 0.0).state_dict())
        batch = scored_batch(trainer, len(LENGTHS))
        return *loss_and_gradients(trainer, batch), trainer._metrics["eval"]["kl"]

    loss, gradients, logged = run(Doubled, 0.1)
    expected_loss, expected_gradients, single = run(GRPOExtTrainer, 0.2)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert logged[0] == pytest.approx(2 * single[0], rel=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


@dataclass
class PowerConfig(GRPOExtConfig):
    power: float = 3.0


def test_an_estimator_reads_the_fields_of_a_config_of_ones_own(tiny_model, tmp_path, monkeypatch):
    def to_the_power(inputs, *, power=1.0):
        return inputs.values_NT.sign() * inputs.values_NT.abs() ** power

    monkeypatch.setitem(ESTIMATORS, "power", Estimator(to_the_power, options={"power": ()}))

    def advantages_of(power):
        args = PowerConfig(
            tmp_path / str(power), advantage_estimator="power", supervision="process", power=power, bf16=False,
            use_cpu=True, per_device_train_batch_size=4, num_generations=4, report_to="none",
        )  # fmt: skip
        trainer = GRPOExtTrainer(
            tiny_model, judge, args, train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
            rollout_func=fixed_completions(LENGTHS),
        )  # fmt: skip
        return scored_batch(trainer, len(LENGTHS))["advantages"]

    single = advantages_of(1.0)
    assert single.abs().max() > 0.1
    torch.testing.assert_close(advantages_of(3.0), single.sign() * single.abs() ** 3)
    with pytest.raises(ValueError, match="'power' reads the option 'power', and GRPOExtConfig has no such field"):
        GRPOExtConfig(tmp_path, advantage_estimator="power", supervision="process", bf16=False)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda batch: batch.mask_NT[:, :1] * 1.0, ValueError, r"Bad.compute_advantages returned shape \(4, 1\)"),
        (lambda batch: batch.mask_NT / 0, ValueError, "Bad.compute_advantages returned .* completion 0 "),
        (lambda batch: None, TypeError, "Bad.compute_advantages returned a NoneType"),
    ],
)
def test_overridden_advantages_are_checked(tiny_model, tmp_path, returned, error, message):
    class Bad(GRPOExtTrainer):
        def compute_advantages(self, batch):
            return returned(batch)

    with pytest.raises(error, match=message):
        scored_batch(trainer_of(Bad, tiny_model, tmp_path, supervision="process"), len(LENGTHS))


def test_a_metric_that_is_a_tensor_is_logged_as_a_number_and_none_is_named(tiny_model, tmp_path):
    class Measured(GRPOExtTrainer):
        def reward_metrics(self, batch):
            return {"longest": batch.mask_NT.sum(1).max()}

    class Nothing(GRPOExtTrainer):
        def reward_metrics(self, batch):
            return {"longest": None}

    trainer = trainer_of(Measured, tiny_model, tmp_path, supervision="process")
    scored_batch(trainer, len(LENGTHS))
    assert [type(value) for value in trainer._metrics["eval"]["longest"]] == [float]
    with pytest.raises(TypeError, match="the metric 'longest' is None"):
        scored_batch(trainer_of(Nothing, tiny_model, tmp_path, supervision="process"), len(LENGTHS))


def test_an_overridden_metric_is_logged_and_one_without_a_value_is_not(tiny_model, tmp_path):
    class Measured(GRPOExtTrainer):
        def reward_metrics(self, batch):
            longest = batch.mask_NT.sum(1).max().item()
            return {**super().reward_metrics(batch), "completions/longest": longest, "nothing": float("nan")}

    trainer = trainer_of(Measured, tiny_model, tmp_path, supervision="process", max_steps=1)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert entry["completions/longest"] == max(LENGTHS)
    assert entry["rewards/judge/steps"] == 2
    assert "nothing" not in entry


def test_a_divergence_added_to_the_table_is_in_the_loss(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "again", DIVERGENCES["reverse"])
    assert isinstance(DIVERGENCES["again"], Divergence)

    def loss_of(direction):
        trainer = trainer_of(
            GRPOExtTrainer, moved_policy(tiny_model), tmp_path / direction, beta=1.0, kl_estimator="exact",
            kl_direction=direction,
        )  # fmt: skip
        trainer.ref_model.load_state_dict(moved_policy(tiny_model, 0.0).state_dict())
        return loss_and_gradients(trainer, scored_batch(trainer, len(LENGTHS)))[0]

    assert loss_of("again") == loss_of("reverse") != loss_of("forward")


def test_a_source_that_finds_no_step_says_so_once_by_name(tiny_model, tmp_path, caplog):
    def judge_lines(completion_ids, **columns):
        return [StepRewards([], []) for _ in completion_ids]

    rows = fixed_completions(LENGTHS)
    options = {"rollout_func": rows}
    trainer = make_trainer(
        GRPOExtTrainer, tiny_model, [judge, judge_lines], tmp_path, trainer_options=options, supervision="process",
        max_steps=3,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        trainer.train()
    (message,) = [record.getMessage() for record in caplog.records if "found no step" in record.getMessage()]
    assert "'judge_lines'" in message and "8 completions" in message


def test_the_callers_functions_stay_visible(tiny_model, tmp_path):
    trainer = trainer_of(GRPOExtTrainer, tiny_model, tmp_path, supervision="process", max_steps=1)
    trainer.train()
    assert trainer.reward_funcs == [judge]


def test_the_loss_mask_leaves_out_tool_output():
    mask_BT = torch.tensor([[1, 1, 1, 0]])
    assert loss_mask({"completion_mask": mask_BT}) is mask_BT
    assert loss_mask({"completion_mask": mask_BT, "tool_mask": torch.tensor([[1, 0, 1, 1]])}).tolist() == [
        [1, 0, 1, 0]
    ]


def test_rewards_computed_without_super_train_as_trls_with_defaults_and_are_refused_beyond(tiny_model, tmp_path):
    class Constant(GRPOExtTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            return torch.arange(len(prompts), dtype=torch.float)[:, None]

    batch = scored_batch(trainer_of(Constant, tiny_model, tmp_path), len(LENGTHS))
    torch.testing.assert_close(batch["advantages"], (torch.arange(4.0) - 1.5) / (torch.arange(4.0).std() + 1e-4))
    with pytest.raises(RuntimeError, match=r"Constant\._calculate_rewards does not call super\(\)"):
        scored_batch(trainer_of(Constant, tiny_model, tmp_path, supervision="process"), len(LENGTHS))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "completion_ids"], "train_dataset has a column 'completion_ids', a name under which"),
        (["question"], "train_dataset has no column 'prompt'; it has: question"),
    ],
)
def test_columns_that_would_not_arrive_are_refused(tiny_model, tmp_path, columns, message):
    dataset = Dataset.from_dict({name: ["a"] for name in columns})
    args = GRPOExtConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=message):
        GRPOExtTrainer(tiny_model, judge, args, train_dataset=dataset)


def test_a_class_in_place_of_an_object_is_named(tiny_model, tmp_path):
    class Judge:
        pass

    with pytest.raises(TypeError, match=r"reward_funcs\[0\] is the class Judge; pass an object"):
        make_trainer(GRPOExtTrainer, tiny_model, (Judge,), tmp_path)


def test_steps_under_outcome_supervision_are_named_once_unless_their_reduction_is_chosen(tiny_model, tmp_path, caplog):
    def chosen(completion_ids, **columns):
        return judge(completion_ids)

    chosen.reduce = "min"
    trainer = make_trainer(GRPOExtTrainer, tiny_model, [judge, chosen], tmp_path, max_steps=2)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = [r.getMessage() for r in caplog.records if "returned rewards of steps" in r.getMessage()]
    assert "'judge'" in message and "trains on their sum" in message


@pytest.mark.parametrize("changes", [{"supervision": "process"}, {"kl_estimator": "exact", "beta": 0.1}])
def test_a_loss_of_another_trainer_is_refused_where_it_would_not_read_the_batch(tiny_model, tmp_path, changes):
    class Joint(GRPOExtTrainer, GMPOTrainer):
        pass

    trainer_of(Joint, tiny_model, tmp_path)
    with pytest.raises(ValueError, match="Joint takes its loss from GMPOTrainer"):
        trainer_of(Joint, tiny_model, tmp_path, **changes)


@pytest.mark.parametrize(
    ("trainer_class", "fields", "warned"),
    [
        (GRPOTrainer, {"supervision": "process", "gamma": 0.9}, ["supervision, gamma"]),
        (GRPOTrainer, {}, []),
        (GRPOExtTrainer, {"supervision": "process", "gamma": 0.9}, []),
    ],
)
def test_another_trainer_with_this_config_is_told_that_it_ignores_fields(
    tiny_model, tmp_path, recwarn, trainer_class, fields, warned
):
    def reward(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    options = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1}
    args = GRPOExtConfig(str(tmp_path), num_generations=4, max_completion_length=8, **options, **fields)
    dataset = Dataset.from_dict({"prompt": ["1+2="] * 8})
    trainer_class(tiny_model, [reward], args, train_dataset=dataset).train()
    found = [re.match(r"the trainer of this GRPOExtConfig does not read (.*?)\.", str(w.message)) for w in recwarn]
    assert [match[1] for match in found if match] == warned


def test_a_joint_class_with_defaults_trains_as_the_other_trainer(tiny_model, tmp_path):
    class Joint(GRPOExtTrainer, GMPOTrainer):
        pass

    def run(trainer_class):
        trainer = make_trainer(
            trainer_class, tiny_model, [lengths], tmp_path / trainer_class.__name__, max_steps=2, learning_rate=0.1,
            trainer_options={"rollout_func": fixed_completions([3, 5, 4, 6])}, beta=0.1,
        )  # fmt: skip
        trainer.train()
        return trainer

    gmpo, joint = run(GMPOTrainer), run(Joint)
    assert [entry.get("loss") for entry in joint.state.log_history] == [e.get("loss") for e in gmpo.state.log_history]
    for name, value in gmpo.model.state_dict().items():
        assert torch.equal(joint.model.state_dict()[name], value)


def lengths(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def constant(completion_ids, **columns):
    return [1.0 for _ in completion_ids]


def test_what_is_logged_beside_trls_is_what_can_vary(tiny_model, tmp_path):
    """Not the number of steps of an outcome source, and no correlation with one that never varies."""

    def keys(trainer_class, **config):
        rows = fixed_completions([3, 5, 4, 6])
        trainer = make_trainer(
            trainer_class, tiny_model, [judge if config else lengths, lengths, constant], tmp_path, max_steps=1,
            trainer_options={"rollout_func": rows}, **config,
        )  # fmt: skip
        trainer.train()
        entry = trainer.state.log_history[0]
        # TensorBoard complains of a value that is None
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in entry.values())
        return set(entry)

    of_trl = keys(GRPOTrainer)
    unjudged = {f"rewards/{name}/unjudged" for name in ("lengths", "constant")}
    by_default = unjudged | {"policy_loss", "advantages/positive_share"}
    assert keys(GRPOExtTrainer) - of_trl == by_default
    steps = {"mean", "std", "step_mean", "step_std", "steps", "tokens_per_step", "unjudged", "unscored", "masked"}
    added = {f"rewards/judge/{name}" for name in [*steps, "corr/lengths"]}
    added |= {"kl", "kl_loss", "kl/k1", "kl/k3", "kl/second_pass_share"}
    found = keys(GRPOExtTrainer, supervision="process", beta=0.1, kl_estimator="exact")
    assert found - of_trl == by_default | added


class Negated(GRPOExtTrainer):
    def _calculate_rewards(self, *args):
        return -super()._calculate_rewards(*args)


@pytest.mark.parametrize("eps", [1e-4, 0.1])
def test_rewards_that_a_subclass_changes_are_those_of_outcome_supervision(tiny_model, tmp_path, eps):
    own = scored_batch(trainer_of(GRPOExtTrainer, tiny_model, tmp_path / "own", advantage_eps=eps), len(LENGTHS))
    changed = scored_batch(trainer_of(Negated, tiny_model, tmp_path / "changed", advantage_eps=eps), len(LENGTHS))
    assert own["advantages"].abs().max() > 0.1
    torch.testing.assert_close(changed["advantages"], -own["advantages"])


def test_rewards_that_a_subclass_changes_are_refused_under_process_supervision(tiny_model, tmp_path):
    with pytest.raises(RuntimeError, match="Negated._calculate_rewards changes .* override compute_advantages"):
        scored_batch(trainer_of(Negated, tiny_model, tmp_path, supervision="process"), len(LENGTHS))
