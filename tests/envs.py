"""Environments for the tests, as a user would bring their own: tests.envs:Name-v0."""

from typing import ClassVar

import gymnasium as gym
import numpy as np


class Toy(gym.Env):
    """Two actions, or real ones with box (pairs of bounds), a flat observation, no end of its own;
    subclasses change one thing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space: gym.Space = gym.spaces.Discrete(2)

    def __init__(self, box=None, dtype="float32"):
        if box:
            real = np.dtype(dtype).type
            low, high = np.array(box, real).T
            self.action_space = gym.spaces.Box(low, high, dtype=real)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), self.reward(action), False, False, {}

    def observe(self):
        return np.ones(2, np.float32)

    def reward(self, action):
        return 1.0


class Noisy(Toy):
    """Observations that differ in scale, random ends: for normalisation and termination."""

    def observe(self):
        return (self.np_random.normal(size=2) * [1.0, 50.0]).astype(np.float32)

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward * 100, bool(self.np_random.random() < 0.1), truncated, info


class NanObservation(Toy):
    def observe(self):
        return np.full(2, np.nan if self.steps > 40 else 0.0, np.float32)


class NanReward(Toy):
    def reward(self, action):
        return np.inf if self.steps == 41 else 0.0


class StartsAtOne(Toy):
    action_space = gym.spaces.Discrete(2, start=1)


class ManyActions(Toy):
    action_space = gym.spaces.MultiDiscrete([2, 2])


class Continuous(Toy):
    action_space = gym.spaces.Box(-1, 1, (1,))


class Matrix(Toy):
    action_space = gym.spaces.Box(-1, 1, (2, 2))


class Integers(Toy):
    action_space = gym.spaces.Box(0, 9, (2,), np.int64)


class Bounded(Toy):
    """Refuses an action outside its bounds, and remembers those that it took."""

    taken: ClassVar[list] = []

    def reward(self, action):
        assert self.action_space.contains(action), action
        self.taken.append(action)
        return 1.0


class Image(Toy):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Dictionary(Toy):
    observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (2,))})


class Later(Toy):
    """Pays 0 for ten steps and 1 for ever after; the observation says which."""

    def observe(self):
        return np.full(2, self.steps >= 10, np.float32)

    def reward(self, action):
        return float(self.steps > 10)


class InPlace(Later):
    """Returns the same array every time, as careless environments do; its infos have odd keys."""

    memory = np.zeros(2, np.float32)

    def observe(self):
        self.memory[:] = self.steps >= 10
        return self.memory

    def step(self, action):
        return *super().step(action)[:4], {"final_obs": "mine", "speed": 1.0}


class RaisesInStep(Noisy):
    played = 0  # in all environments together, made anew at a checkpoint or not

    def step(self, action):
        RaisesInStep.played += 1
        if self.played > 1500:
            raise RuntimeError("the arm fell off")
        return super().step(action)


class RaisesInReset(Noisy):
    episodes = 0

    def reset(self, *, seed=None, options=None):
        RaisesInReset.episodes += 1
        if self.episodes > 150:
            raise RuntimeError("the arm is missing")
        return super().reset(seed=seed)


class InfObservation(Toy):
    def observe(self):
        return np.full(2, -np.inf if self.steps > 40 else 0.0, np.float32)


class NoReward(Toy):
    def reward(self, action):
        return None if self.steps == 41 else 0.0


class WrongShape(Toy):
    def observe(self):
        return np.ones(3 if self.steps > 40 else 2, np.float32)


class WrongLastShape(Toy):
    """Only where an episode ends, in the one observation that no batch is made of."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        ended = self.steps > 20
        return obs[:1] if ended else obs, reward, ended, False, {}


class WrongDtype(Toy):
    def observe(self):
        return np.array(["a", "b"]) if self.steps > 40 else np.ones(2, np.float32)


class EndsAtOnce(Noisy):
    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, True, truncated, info


class Short(Noisy):
    """Episodes of five steps, of any actions."""

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self.steps >= 5, truncated, info


class Scaled(Short):
    """Rewards as large or small as one likes."""

    def __init__(self, scale=1.0, box=None):
        super().__init__(box)
        self.scale = scale

    def reward(self, action):
        return self.scale * float(self.np_random.normal())


class HalfConstant(Short):
    def observe(self):
        return np.array([self.np_random.normal(), 3.0], np.float32)


class NeverEnds(Toy):
    pass


for env in [*Toy.__subclasses__(), *Noisy.__subclasses__(), *Short.__subclasses__(), Toy]:
    limit = None if env is NeverEnds else 100
    gym.register(f"{env.__name__}-v0", f"tests.envs:{env.__name__}", max_episode_steps=limit)
gym.register("Constant-v0", "tests.envs:Toy", max_episode_steps=20)
gym.register("ConstantInPlace-v0", "tests.envs:InPlace", max_episode_steps=20)
gym.register("ConstantLater-v0", "tests.envs:Later", max_episode_steps=20)
