"""sb3-contrib's RecurrentPPO with one call for a sequence, in place of one for each of its steps.

>>> from fastseq.integrations.sb3 import MlpLstmPolicy, patch
>>> model = RecurrentPPO(MlpLstmPolicy, env)  # as CnnLstmPolicy and MultiInputLstmPolicy, sb3-contrib's by name and arguments
>>> patch(another)  # a model or a policy that is there already

sb3-contrib goes step by step in Python as soon as an episode starts within a batch, which in training is always: the states of
that row become zeros before that step. Here the LSTM is told where, by its `resets`.

Parameters keep their names, values and, under `patch`, their identity: the optimizer and state dicts do not notice, and a file
that either kind of policy saved can be loaded by the other (``RecurrentPPO.load(file, custom_objects={"policy_class": ...})``; a
patched model is saved as one of sb3-contrib's).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._convert import convert, revert
from ..modules import LSTM

try:
    from sb3_contrib.common.recurrent import policies
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
except ImportError as error:
    raise ImportError(
        "fastseq.integrations.sb3 needs sb3-contrib and stable-baselines3 (pip install sb3-contrib): " + str(error)
    ) from error

__all__ = ["CnnLstmPolicy", "MlpLstmPolicy", "MultiInputLstmPolicy", "patch", "process_sequence", "unpatch"]

LSTMS = ("lstm_actor", "lstm_critic")  # the second is None without a critic of its own


def process_sequence(
    features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: nn.Module
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What sb3-contrib's policies call ``_process_sequence``.

    N sequences of T steps, L layers. Unlike sb3-contrib's: states that are reset are zeros even if they were not finite, and
    dropout between layers, if ``lstm_kwargs`` ask for it, is drawn for whole sequences, so that other elements are zeroed.

    Args:
        features: ``[N*T, I]``, one sequence after the other.
        lstm_states: h and c, ``[L, N, H]`` each, before the first step.
        episode_starts: ``[N*T]``, not zero where an episode starts: h and c are zeros before that step.
        lstm: a ``fastseq.LSTM``.

    Returns:
        ``[N*T, H]``, and h and c after the last step.
    """
    sequences = lstm_states[0].shape[1]
    x, starts = (t.reshape(sequences, -1, *t.shape[1:]).transpose(0, 1) for t in (features, episode_starts.flatten()))
    output, states = lstm(x, tuple(lstm_states), resets=starts != 0)
    return output.transpose(0, 1).flatten(0, 1), states


def patch(model: Any) -> None:
    """Make a policy evaluate a sequence in one call, and its LSTMs ``fastseq.LSTM``, in place. Again: changes nothing.

    Args:
        model: a RecurrentPPO, or a policy of it.

    Raises:
        TypeError: if it is neither.
        ValueError: if the class of the policy processes sequences in a way of its own, or an LSTM is batch_first.
        NotImplementedError: if an LSTM cannot be converted, for a reason that is then given. The policy is as it was.
    """
    policy = _policy_of(model)
    if policy._process_sequence is process_sequence:
        return
    if policy._process_sequence is not RecurrentActorCriticPolicy._process_sequence:
        raise ValueError(f"{type(policy).__name__} has a _process_sequence of its own, which a patch would replace")
    _convert(policy)
    policy._process_sequence = process_sequence


def unpatch(model: Any) -> None:
    """Take ``patch`` back: sb3-contrib's loop, and ``torch.nn.LSTM``.

    Args:
        model: what was patched.

    Raises:
        TypeError: if it is neither a RecurrentPPO nor a policy of it.
        ValueError: if it is not patched; a policy of this module's classes is not.
    """
    policy = _policy_of(model)
    if "_process_sequence" not in vars(policy):
        raise ValueError(f"{type(policy).__name__} is not patched")
    del policy._process_sequence
    for lstm in _lstms(policy):
        revert(lstm)


def _policy_of(model: Any) -> Any:
    policy = model if isinstance(model, nn.Module) else getattr(model, "policy", None)
    if not isinstance(policy, RecurrentActorCriticPolicy):
        raise TypeError(f"expected a RecurrentPPO of sb3-contrib, or a RecurrentActorCriticPolicy, got {type(model).__name__}")
    return policy


def _lstms(policy: Any) -> list[Any]:
    return [lstm for name in LSTMS if (lstm := getattr(policy, name)) is not None]


def _convert(policy: Any) -> None:
    """Whatever is the faster LSTM for a call without resets: only fastseq's takes them."""
    if any(lstm.batch_first for lstm in _lstms(policy)):
        raise ValueError("lstm_kwargs must leave batch_first alone: sequences are [T, N, I]")
    for name in LSTMS:
        lstm = getattr(policy, name)
        if lstm is not None and type(lstm).forward not in (nn.LSTM.forward, LSTM.forward):
            raise NotImplementedError(f"{name} ({type(lstm).__name__}) has a forward of its own, which may not take resets")
    convert(policy, filter_fn=lambda _, name: name in LSTMS, on_unsupported="raise", even_if_slower=True)


class _OneCall:
    """Of a policy class: sequences in one call."""

    _process_sequence = staticmethod(process_sequence)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _convert(self)


class MlpLstmPolicy(_OneCall, policies.RecurrentActorCriticPolicy):
    """sb3-contrib's MlpLstmPolicy, by its arguments and parameters, on ``fastseq.LSTM``: a sequence is one call."""


class CnnLstmPolicy(_OneCall, policies.RecurrentActorCriticCnnPolicy):
    """sb3-contrib's CnnLstmPolicy, by its arguments and parameters, on ``fastseq.LSTM``: a sequence is one call."""


class MultiInputLstmPolicy(_OneCall, policies.RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's MultiInputLstmPolicy, by its arguments and parameters, on ``fastseq.LSTM``: a sequence is one call."""
