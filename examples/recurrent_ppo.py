"""A policy with an LSTM that balances a pole without seeing how fast it moves, by PPO, in one file.

    python examples/recurrent_ppo.py                  # until it is solved: half a minute on a CPU
    python examples/recurrent_ppo.py --form loop      # the same, sequences step by step in Python
    python examples/recurrent_ppo.py --quick

A rollout is a block of T steps of N environments in which episodes begin at any step, and there the state of the LSTM must begin
anew. Most programs loop over the steps for it and multiply the states by a mask: `--form loop`. `--form call` hands the LSTM the
whole block and, by `resets`, where episodes begin. At the end both take the same step of an update, one after the other: the
program checks that loss and gradients of the call are as exact as the loop's, and prints the time of both.

The task is CartPole-v1's (Barto, Sutton, Anderson 1983) with positions alone: solved is a mean return of 475 over 100 episodes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq
from fastseq.testing import assert_all_close_to_truth

GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2
EPOCHS, MINIBATCHES = 4, 4
VALUE_WEIGHT, ENTROPY_WEIGHT, LARGEST_GRADIENT = 0.5, 0.005, 0.5
REWARD = 0.02  # of a step, so that the values that are learned stay near 1
SOLVED, EPISODES, LIMIT = 475.0, 100, 500
State = tuple[Tensor, Tensor]


class CartPole:
    """N carts, each with a pole to be balanced by pushes to the left (0) and right (1). What is seen: where cart and pole are."""

    def __init__(self, count: int, generator: torch.Generator):
        self.generator = generator
        self.state = self._begun(count)  # [N, 4]: position, velocity, angle, angular velocity
        self.steps = torch.zeros(count, dtype=torch.long)

    def _begun(self, count: int) -> Tensor:
        return torch.rand(count, 4, generator=self.generator, dtype=torch.float64) * 0.1 - 0.05

    def seen(self) -> Tensor:
        """[N, 2]."""
        return self.state[:, ::2].float()

    def step(self, pushes: Tensor) -> Tensor:
        """Which episodes ended, bool [N]; they have begun anew."""
        self.state = moved(self.state, pushes)
        self.steps += 1
        x, _, angle, _ = self.state.unbind(1)
        ended = (x.abs() > 2.4) | (angle.abs() > math.radians(12)) | (self.steps == LIMIT)
        self.state[ended] = self._begun(int(ended.sum()))
        self.steps[ended] = 0
        return ended


def moved(state: Tensor, pushes: Tensor) -> Tensor:
    """[N, 4] a fiftieth of a second later, by Euler's method. Cart 1 kg, pole 0.1 kg and 1 m, pushes of 10 N."""
    x, v, angle, spin = state.unbind(1)
    gravity, pole, mass, half, tau = 9.8, 0.1, 1.1, 0.5, 0.02
    sin, cos = angle.sin(), angle.cos()
    push = (20.0 * pushes - 10.0 + pole * half * spin.square() * sin) / mass
    turn = (gravity * sin - cos * push) / (half * (4.0 / 3.0 - pole * cos.square() / mass))
    pull = push - pole * half * turn * cos / mass
    return torch.stack((x + tau * v, v + tau * pull, angle + tau * spin, spin + tau * turn), 1)


class Policy(nn.Module):
    """Logits of the two pushes and the value at every step: [T, N, 2] -> [T, N, 2], [T, N]."""

    def __init__(self, hidden: int, form: str):
        super().__init__()
        self.form = form
        self.encoder = nn.Linear(2, hidden)
        self.lstm = fastseq.LSTM(hidden, hidden) if form == "call" else nn.LSTM(hidden, hidden)
        self.actor, self.critic = nn.Linear(hidden, 2), nn.Linear(hidden, 1)
        for layer, gain in ((self.encoder, math.sqrt(2)), (self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, seen: Tensor, state: State, starts: Tensor) -> tuple[Tensor, Tensor, State]:
        """`starts`: bool [T, N], before which steps the state begins anew."""
        x = torch.tanh(self.encoder(seen * 10.0))
        if self.form == "call":
            h, state = self.lstm(x, state, resets=starts)
        else:
            outputs = []
            for step, keep in zip(x, 1.0 - starts.float(), strict=True):
                masked = tuple(keep[None, :, None] * s for s in state)
                output, state = self.lstm(step[None], masked)
                outputs.append(output)
            h = torch.cat(outputs)
        return self.actor(h), self.critic(h).squeeze(-1), state


class Rollout:
    """What N environments and a policy did in T steps: [T, N, ...] each, and the state before the first of them."""

    def __init__(self, policy: Policy, poles: CartPole, state: State, starts: Tensor, steps: int, returns: deque[int]):
        """Goes on from `state` and `starts` [N]; lengths of episodes that end join `returns`."""
        self.before = state
        seen, begun, pushes, likely, values, ended = [], [], [], [], [], []
        with torch.no_grad():
            for _ in range(steps):
                seen.append(poles.seen())
                begun.append(starts)
                logits, value, state = policy(seen[-1][None], state, starts[None])
                push = torch.multinomial(logits[0].softmax(-1), 1, generator=poles.generator).squeeze(1)
                pushes.append(push)
                likely.append(logits[0].log_softmax(-1).gather(1, push[:, None]).squeeze(1))
                values.append(value[0])
                lived = poles.steps + 1
                starts = poles.step(push)
                returns.extend(lived[starts].tolist())
                ended.append(starts)
            _, after, _ = policy(poles.seen()[None], state, starts[None])
        self.state, self.ended = state, starts
        self.seen, self.starts, self.pushes = torch.stack(seen), torch.stack(begun), torch.stack(pushes)
        self.likely, self.values = torch.stack(likely), torch.stack(values)
        self.advantages = advantages(self.values, torch.stack(ended), after[0])

    def of(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Of these environments: seen, starts, pushes, likely, values, advantages, h, c."""
        parts = (self.seen, self.starts, self.pushes, self.likely, self.values, self.advantages, *self.before)
        return tuple(part[:, rows] for part in parts)


def advantages(values: Tensor, ended: Tensor, after: Tensor) -> Tensor:
    """Generalized advantage estimation, [T, N]; `after`: the value of what is seen after the last step."""
    found, advantage = torch.zeros_like(values), torch.zeros_like(after)
    for t in reversed(range(len(values))):
        lives = 1.0 - ended[t].float()
        advantage = REWARD + GAMMA * after * lives - values[t] + GAMMA * LAMBDA * lives * advantage
        found[t], after = advantage, values[t]
    return found


def loss_of(policy: Policy, part: tuple[Tensor, ...]) -> Tensor:
    """PPO's clipped loss (Schulman et al. 2017) of some environments of a rollout."""
    seen, starts, pushes, likely, values, advantage, h, c = part
    logits, found, _ = policy(seen, (h.contiguous(), c.contiguous()), starts)
    logs = logits.log_softmax(-1)
    ratio = (logs.gather(-1, pushes[..., None]).squeeze(-1) - likely).exp()
    scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    gained = torch.min(ratio * scaled, ratio.clamp(1 - CLIP, 1 + CLIP) * scaled).mean()
    entropy = -(logs.exp() * logs).sum(-1).mean()
    return VALUE_WEIGHT * F.mse_loss(found, values + advantage) - gained - ENTROPY_WEIGHT * entropy


def update(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, generator: torch.Generator) -> None:
    """Some epochs over a rollout, some environments at a time."""
    count = rollout.seen.shape[1]
    for _ in range(EPOCHS):
        for rows in torch.randperm(count, generator=generator).chunk(MINIBATCHES):
            optimizer.zero_grad()
            loss_of(policy, rollout.of(rows)).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), LARGEST_GRADIENT)
            optimizer.step()


def compare_forms(policy: Policy, hidden: int, rollout: Rollout, repeats: int) -> None:
    """Both forms on the same step of an update, in turn: raises unless the call is as exact as the loop; prints both times."""
    part = rollout.of(torch.arange(rollout.seen.shape[1]).chunk(MINIBATCHES)[0])
    twins = {"loop": Policy(hidden, "loop"), "call": Policy(hidden, "call"), "exact": Policy(hidden, "loop").double()}
    seconds: dict[str, list[float]] = {name: [] for name in twins}
    results: dict[str, dict[str, Tensor]] = {}
    for twin in twins.values():
        twin.load_state_dict(policy.state_dict())
    for _ in range(repeats):
        for name, twin in twins.items():
            given = tuple(t.double() if t.is_floating_point() and name == "exact" else t for t in part)
            start = time.perf_counter()
            loss = loss_of(twin, given)
            gradients = torch.autograd.grad(loss, list(twin.parameters()))
            seconds[name].append(time.perf_counter() - start)
            names = (key for key, _ in twin.named_parameters())
            results[name] = {"loss": loss.detach()} | dict(zip(names, gradients, strict=True))
    assert_all_close_to_truth(results["call"], results["loop"], results["exact"])
    loop, call = (1e3 * statistics.median(seconds[form]) for form in ("loop", "call"))
    T, N = part[1].shape
    print(f"both forms agree: loss {results['loop']['loss']:.6f} and {results['call']['loss']:.6f}")
    print(f"a step of an update, T={T}, {N} environments: loop {loop:.2f} ms, one call {call:.2f} ms, ratio {loop / call:.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=("call", "loop"), default="call", help="how sequences are evaluated while it learns")
    parser.add_argument("--updates", type=int, help="at most (default 200, quick 8)")
    parser.add_argument("--environments", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a few updates: some seconds")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    hidden, steps, updates = 64, 128, options.updates or (8 if options.quick else 200)

    policy = Policy(hidden, options.form)
    optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5)
    poles = CartPole(options.environments, generator)
    state: State = (torch.zeros(1, options.environments, hidden), torch.zeros(1, options.environments, hidden))
    starts = torch.ones(options.environments, dtype=torch.bool)
    returns: deque[int] = deque(maxlen=EPISODES)
    first, seconds = math.nan, {"rollouts": 0.0, "updates": 0.0}
    for number in range(1, updates + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2.5e-3 * (1 - (number - 1) / updates)
        begin = time.perf_counter()
        rollout = Rollout(policy, poles, state, starts, steps, returns)
        between = time.perf_counter()
        update(policy, optimizer, rollout, generator)
        seconds["rollouts"] += between - begin
        seconds["updates"] += time.perf_counter() - between
        state, starts = rollout.state, rollout.ended
        mean = statistics.fmean(returns) if returns else math.nan
        first = mean if number == 1 else first
        solved = len(returns) == EPISODES and mean >= SOLVED
        taken = number * steps * options.environments
        if solved or number % 10 == 0 or number == updates:
            print(f"update {number}, step {taken}: mean return of the last episodes {mean:.1f}", flush=True)
        if solved:
            print(f"solved after {taken} steps")
            break
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(f"mean return {first:.1f} after the first rollout, {mean:.1f} at the end; {times} ({options.form})")
    assert mean > first, "training did not help"
    compare_forms(policy, hidden, rollout, 5 if options.quick else 20)


if __name__ == "__main__":
    main()
