"""sb3-contrib's recurrent PPO, sequences in one call: what its loop computes, to rounding."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
from torch import nn

import fastseq
from fastseq.testing import assert_all_close_to_truth

if importlib.util.find_spec("sb3_contrib") is None:
    pytest.skip("needs sb3-contrib", allow_module_level=True)

import gymnasium  # noqa: E402
import numpy as np  # noqa: E402
from gymnasium import spaces  # noqa: E402
from sb3_contrib import RecurrentPPO  # noqa: E402
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy  # noqa: E402
from sb3_contrib.ppo_recurrent import policies as stock  # noqa: E402
from stable_baselines3.common.logger import KVWriter, Logger  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv  # noqa: E402

from fastseq.integrations import sb3  # noqa: E402

NAMES = ("MlpLstmPolicy", "CnnLstmPolicy", "MultiInputLstmPolicy")
SIZES = {"lstm_hidden_size": 24, "net_arch": [16]}
SPACES = {
    "MlpLstmPolicy": spaces.Box(-1.0, 1.0, (3,)),
    "CnnLstmPolicy": spaces.Box(0, 255, (1, 36, 36), np.uint8),
    "MultiInputLstmPolicy": spaces.Dict({"place": spaces.Box(-1.0, 1.0, (2,)), "kind": spaces.Discrete(3)}),
}
EPISODE = 7  # steps at most, so that episodes end inside a rollout


class Noise(gymnasium.Env):
    """Observations at random; a reward for guessing whether the last step's first number was positive; ends at random."""

    def __init__(self, space: spaces.Space, seed: int) -> None:
        self.observation_space, self.action_space = copy.deepcopy(space), spaces.Discrete(2)
        self.observation_space.seed(seed)
        self.draws, self.steps = np.random.default_rng(seed), 0

    def reset(self, *, seed=None, options=None):
        self.steps, self.before = 0, 0
        return self._seen(), {}

    def _seen(self):
        seen = self.observation_space.sample()
        self.after = int(np.ravel(seen["place"] if isinstance(seen, dict) else seen)[0] > 0)
        return seen

    def step(self, action):
        reward, self.before = float(action == self.before), self.after
        self.steps += 1
        return self._seen(), reward, bool(self.draws.random() < 0.1), self.steps == EPISODE, {}


class Kept(KVWriter):
    """What is logged at every update."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({name: float(value) for name, value in key_values.items() if name.startswith("train/")})

    def close(self) -> None:
        pass


def ppo(policy, name="MlpLstmPolicy", **options):
    """A model on three environments whose rollouts are as long as two or three episodes."""
    given = {"n_steps": 18, "batch_size": 27, "n_epochs": 2, "seed": 0, "device": "cpu", "policy_kwargs": dict(SIZES)} | options
    return RecurrentPPO(policy, DummyVecEnv([lambda k=k: Noise(SPACES[name], k) for k in range(3)]), **given)


def learned(model, updates=4):
    """Trains for some updates; what each of them logged, which is written before the next one's rollout, and at the end here."""
    kept = Kept()
    model.set_logger(Logger(folder=None, output_formats=[kept]))
    model.learn(updates * model.n_steps * 3)
    model.logger.dump()
    return [row for row in kept.rows if row]


def nudged(model):
    """With every weight one unit of rounding higher or lower."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.policy.parameters():
            sign = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
            weight.mul_(1 + sign * torch.finfo(weight.dtype).eps)
    return model


def are_ours(policy):
    return [type(lstm) is fastseq.LSTM for lstm in (policy.lstm_actor, policy.lstm_critic) if lstm is not None]


@lru_cache
def of_the_loop(name):
    """What the loop logs, and what it logs if every weight is moved by a rounding at the start."""
    policy = getattr(stock, name)
    return learned(ppo(policy, name)), learned(nudged(ppo(policy, name)))


@pytest.mark.parametrize("how", ["class", "patch"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_the_loop(name, how):
    """As far as they drift if the loop's weights are moved by a rounding, and some: ours differ at every step."""
    theirs, drifted = of_the_loop(name)
    model = ppo(getattr(sb3 if how == "class" else stock, name), name)
    if how == "patch":
        sb3.patch(model)
    assert all(are_ours(model.policy)) and isinstance(model.policy, getattr(stock, name))
    ours, drift = learned(model), 0.0
    assert len(ours) == len(theirs) == 4 and {"train/loss", "train/value_loss", "train/entropy_loss"} <= theirs[0].keys()
    for one, other, near in zip(theirs, ours, drifted, strict=True):
        drift = max(drift, *(abs(near[key] - one[key]) for key in one))
        for key, value in one.items():
            assert abs(other[key] - value) <= 16 * (drift + 1.2e-7 * max(1.0, abs(value))), key


def batch(policy, sequences=4, steps=9, seed=0):
    """Arguments of evaluate_actions: episodes start at the first step and inside."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(sequences * steps, 3, generator=generator) * 2 - 1
    actions = torch.randint(0, 2, (sequences * steps,), generator=generator)
    starts = (torch.rand(sequences * steps, generator=generator) < 0.3).float()
    shape = (policy.lstm_actor.num_layers, sequences, policy.lstm_actor.hidden_size)
    pairs = [tuple(torch.rand(shape, generator=generator) for _ in range(2)) for _ in range(2)]
    return seen, actions, pairs, starts


def evaluated(policy, dtype=torch.float32):
    """Values, log-probabilities, entropies and every gradient."""
    seen, actions, pairs, starts = batch(policy)
    states = sb3.policies.RNNStates(*(tuple(s.to(dtype) for s in pair) for pair in pairs))
    values, logs, entropy = policy.evaluate_actions(seen.to(dtype), actions, states, starts.to(dtype))
    weights = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    loss = (values.flatten() * logs).sum() + entropy.sum()
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    named = {name: g for name, g in zip(weights, gradients, strict=True) if g is not None}
    return {"values": values.detach(), "logs": logs.detach(), "entropy": entropy.detach(), **named}


def doubled(policy):
    """In fp64, whatever sb3 makes of observations."""
    exact = copy.deepcopy(policy).double()
    exact.extract_features = lambda seen, *given: seen
    return exact


SHAPES = {
    "separate": {},
    "two layers": {"n_lstm_layers": 2},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "actor alone": {"enable_critic_lstm": False},
    "no bias": {"lstm_kwargs": {"bias": False}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_exact_as_the_loops(shape):
    policy = ppo(stock.MlpLstmPolicy, policy_kwargs=SIZES | SHAPES[shape]).policy
    truth, theirs = evaluated(doubled(policy), torch.float64), evaluated(policy)
    sb3.patch(policy)
    assert_all_close_to_truth(evaluated(policy), theirs, truth)


def test_a_start_that_is_late_is_seen():
    """Resets a step later than they are told are other values: the comparison can fail."""
    policy = ppo(stock.MlpLstmPolicy).policy
    truth, theirs = evaluated(doubled(policy), torch.float64), evaluated(policy)
    sb3.patch(policy)
    policy._process_sequence = lambda x, states, starts, lstm: sb3.process_sequence(x, states, starts.roll(1), lstm)
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_all_close_to_truth(evaluated(policy), theirs, truth)


def test_a_state_that_is_not_finite_ends_with_its_episode():
    policy = sb3.MlpLstmPolicy(SPACES["MlpLstmPolicy"], spaces.Discrete(2), lambda _: 1e-3, **SIZES)
    states = tuple(torch.full((1, 2, 24), torch.nan) for _ in range(2))
    output, after = sb3.process_sequence(torch.rand(2 * 5, 3), states, torch.tensor([1.0, 0, 0, 1, 0] * 2), policy.lstm_actor)
    assert output.shape == (10, 24) and output.isfinite().all() and all(s.isfinite().all() for s in after)


def test_patching_keeps_parameters_and_is_taken_back():
    model = ppo(stock.MlpLstmPolicy)
    before, state = list(model.policy.parameters()), {k: v.clone() for k, v in model.policy.state_dict().items()}
    sb3.patch(model)
    sb3.patch(model.policy)  # changes nothing
    assert [id(p) for p in model.policy.parameters()] == [id(p) for p in before]
    assert model.policy.state_dict().keys() == state.keys() and type(model.policy) is stock.MlpLstmPolicy
    copied = copy.deepcopy(model.policy)
    assert copied._process_sequence is sb3.process_sequence and all(are_ours(copied))
    sb3.unpatch(model)
    assert model.policy._process_sequence is RecurrentActorCriticPolicy._process_sequence and not any(are_ours(model.policy))
    assert type(model.policy.lstm_actor) is nn.LSTM
    with pytest.raises(ValueError, match="MlpLstmPolicy|RecurrentActorCriticPolicy is not patched"):
        sb3.unpatch(model)


def test_convert_says_what_to_do():
    policy = ppo(stock.MlpLstmPolicy).policy
    (row,) = fastseq.convert(policy).skipped
    assert row.names == ("",) and not row.unsupported and "fastseq.integrations.sb3.patch" in row.reason
    with pytest.warns(UserWarning, match="nothing to convert"):
        assert ("",) not in [row.names for row in fastseq.convert(policy, "GRU").skipped]
    sb3.patch(policy)
    assert not [row for row in fastseq.convert(policy).skipped if row.names == ("",)]
    assert not [row for row in fastseq.convert(ppo(sb3.MlpLstmPolicy).policy).skipped if row.names == ("",)]


@pytest.mark.parametrize("saved, loaded", [(stock, sb3), (sb3, stock), (sb3, sb3)], ids=["to ours", "to theirs", "ours"])
@pytest.mark.parametrize("name", NAMES)
def test_files_are_of_both(tmp_path, name, saved, loaded):
    model = ppo(getattr(saved, name), name, n_steps=9, n_epochs=1)
    model.learn(27)
    model.save(tmp_path / "model")
    custom = {"policy_class": getattr(loaded, name)} if saved is not loaded else None
    again = RecurrentPPO.load(tmp_path / "model", env=model.get_env(), custom_objects=custom)
    assert type(again.policy) is getattr(loaded, name) and set(are_ours(again.policy)) == {loaded is sb3}
    assert all(torch.equal(value, again.policy.state_dict()[key]) for key, value in model.policy.state_dict().items())
    seen = model.get_env().reset()
    actions, states = model.predict(seen, episode_start=np.ones(3), deterministic=True)
    same, other = again.predict(seen, episode_start=np.ones(3), deterministic=True)
    assert np.array_equal(actions, same) and all(np.allclose(a, b, atol=1e-6) for a, b in zip(states, other, strict=True))
    again.learn(27)


def test_a_patched_model_is_saved_as_one_of_theirs(tmp_path):
    model = ppo(stock.MlpLstmPolicy, n_steps=9, n_epochs=1)
    sb3.patch(model)
    model.learn(27)
    model.save(tmp_path / "model")
    code = (
        "import sys; from sb3_contrib import RecurrentPPO; "
        f"model = RecurrentPPO.load({str(tmp_path / 'model')!r}, device='cpu'); assert 'fastseq' not in sys.modules; "
        "print(type(model.policy.lstm_actor).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.nn.modules.rnn", done.stderr


def test_a_policy_goes_through_its_own_file(tmp_path):
    policy = sb3.MlpLstmPolicy(SPACES["MlpLstmPolicy"], spaces.Discrete(2), lambda _: 1e-3)
    policy.save(tmp_path / "policy")
    again = sb3.MlpLstmPolicy.load(tmp_path / "policy", device="cpu")
    assert all(are_ours(again)) and torch.equal(again.lstm_actor.weight_hh_l0, policy.lstm_actor.weight_hh_l0)


class Own(stock.MlpLstmPolicy):
    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        raise NotImplementedError


class Other(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


def test_what_cannot_be_patched_says_so():
    with pytest.raises(TypeError, match="expected a RecurrentPPO of sb3-contrib, or a RecurrentActorCriticPolicy, got Linear"):
        sb3.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got int"):
        sb3.unpatch(3)
    with pytest.raises(ValueError, match="Own has a _process_sequence of its own"):
        sb3.patch(Own(SPACES["MlpLstmPolicy"], spaces.Discrete(2), lambda _: 1e-3))
    with pytest.raises(ValueError, match="is not patched"):
        sb3.unpatch(sb3.MlpLstmPolicy(SPACES["MlpLstmPolicy"], spaces.Discrete(2), lambda _: 1e-3))
    with pytest.raises(ValueError, match="batch_first"):
        sb3.MlpLstmPolicy(SPACES["MlpLstmPolicy"], spaces.Discrete(2), lambda _: 1e-3, lstm_kwargs={"batch_first": True})
    model = ppo(stock.MlpLstmPolicy)
    model.policy.lstm_critic = Other(3, 24)
    with pytest.raises(NotImplementedError, match="lstm_critic"):
        sb3.patch(model)
    assert not any(are_ours(model.policy)) and model.policy._process_sequence is RecurrentActorCriticPolicy._process_sequence


def test_without_the_package_the_import_says_what_to_install():
    code = "import sys; sys.modules['sb3_contrib'] = None; import fastseq.integrations.sb3"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs sb3-contrib and stable-baselines3 (pip install sb3-contrib)" in done.stderr
