"""
Observation statistics from unequal workers
===========================================

For reinforcement learning with several workers. Each worker keeps the exact mean and variance of what it has seen, and
``merge`` gives the statistics of all observations, however unequal the workers are.

The observations are those of a cart with a pole (Barto, Sutton and Anderson, 1983): position, speed, angle and turning
speed. Each worker starts at another place and pushes with another force. So their episodes differ in length.
"""

from functools import reduce

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

import anynorm

NAMES = ("position", "speed", "angle", "turning speed")
rng = np.random.default_rng(0)


def episode(force: float, start: float) -> NDArray[np.float32]:
    """Observations, (steps, 4): the worker pushes to the side where the pole falls."""
    state = np.array([start, 0.0, *rng.normal(0, 0.05, 2)])
    seen: list[NDArray[np.float32]] = []
    while abs(state[2]) < 0.21 and len(seen) < 500:
        seen.append(state.astype(np.float32))
        _, speed, angle, turning = state
        push = force * np.sign(angle + 0.3 * turning + rng.normal(0, 0.1))
        thrust = (push + 0.05 * turning**2 * np.sin(angle)) / 1.1
        inertia = 0.5 * (4 / 3 - 0.1 * np.cos(angle) ** 2 / 1.1)
        fall = (9.8 * np.sin(angle) - np.cos(angle) * thrust) / inertia
        drive = thrust - 0.05 * fall * np.cos(angle) / 1.1
        state = state + 0.02 * np.array([speed, drive, turning, fall])
    return np.array(seen)


# %%
# Each worker: one line for each episode
# --------------------------------------
# ``momentum=None`` means that nothing is forgotten. The state is a mean, a variance and a count. The observations
# themselves are kept here only for the check below.

workers, kept = [], []
for force, start, episodes in ((10, 0, 20), (5, 6, 4), (1, -3, 40)):
    running = anynorm.RunningStats.init(4, like=np.zeros(4, np.float32), momentum=None)
    for _ in range(episodes):
        observations = episode(force, start)
        running = running.update(anynorm.moments(observations, axis=0))
        kept.append(observations)
    workers.append(running)
    print(f"force {force:2}: {running.count:5} seen, mean position {running.mean[0]:6.3f}")

# %%
# All workers: merge, then normalize
# ----------------------------------
# Workers in other processes send their state as any Python object, or as a file: ``running.save("worker-1.npz")``.

merged = reduce(anynorm.RunningStats.merge, workers)
print(f"together: {merged.count} seen, mean position {merged.mean[0]:6.3f}")

policy_input = anynorm.normalize(kept[-1], axis=0, moments=merged).clip(-10, 10)

# %%
# Check
# -----
# The merged statistics are those of all observations, computed by NumPy in float64. The last column is what an average
# over the workers gives. It is wrong in two ways: a worker with few observations counts as much as one with many, and
# the differences between the workers are left out of the variance.

everything = np.concatenate(kept, dtype=np.float64)
np.testing.assert_allclose(merged.mean, everything.mean(axis=0), rtol=1e-5, atol=1e-7)
np.testing.assert_allclose(merged.var, everything.var(axis=0), rtol=1e-5)

averaged = anynorm.Moments(
    np.mean([worker.mean for worker in workers], axis=0),
    np.mean([worker.var for worker in workers], axis=0),
    merged.count,
)
print("std                  all    merged  averaged")
for i, name in enumerate(NAMES):
    variances = everything.var(axis=0)[i], merged.var[i], averaged.var[i]
    print(f"{name:15}", *(f"{np.sqrt(var):9.4f}" for var in variances))

# %%
# Normalized observations should have mean 0 and standard deviation 1, the grey lines. A point is a mean, and its line
# goes one standard deviation up and down.

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
for line in (-1, 0, 1):
    axes.axhline(line, color="0.8", zorder=0)
for shift, name, moments in ((-0.1, "merged", merged), (0.1, "averaged", averaged)):
    y = anynorm.normalize(everything, axis=0, moments=moments)
    place = np.arange(4) + shift
    axes.errorbar(place, y.mean(axis=0), y.std(axis=0), fmt="o", label=name)
axes.set(xticks=range(4), xticklabels=NAMES, ylabel="normalized")
axes.legend()
plt.show()
