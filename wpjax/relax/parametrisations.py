"""How numbers that an optimiser moves become gates between 0 and 1.

    nested             m_c = sigmoid((s_c - t) / T), with t such that sum_c w_c m_c = k and k drawn anew each step
                       (Matryoshka Attribution, arXiv 2609.25518)
    hard-concrete      m_c = clip(sigmoid((log u - log(1 - u) + a_c) / beta) (zeta - gamma) + gamma, 0, 1), u uniform,
                       at a price for every gate that is likely open (Louizos et al. 2018, arXiv 1712.01312)
    straight-through   m_c = [a_c > 0], with the slope of sigmoid(a_c), at a price for what is open
                       (Bengio et al. 2013, arXiv 1308.3432)

w_c is a gate's share of the cost (`Gates.share`): budgets and prices count parameters, not components.

A nested mask is learned once for all budgets. The other two need a run a budget, which their price sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from wpjax.errors import WpjaxError
from wpjax.relax.gates import AnyGates


@runtime_checkable
class Parametrisation(Protocol):
    """How C numbers become C gates. To add one, write a class with these three members."""

    def start(self, gates: AnyGates, ranking: Float[Array, " C"]) -> Float[Array, " C"]:
        """The numbers to begin with.

        Args:
            gates: the gates.
            ranking: [C], scores of an earlier ranking, the larger the better; all equal for none.
        """
        ...

    def draw(self, numbers: Float[Array, " C"], gates: AnyGates, key: PRNGKeyArray) -> Float[Array, " C"]:
        """The gates of one step, each from 0 to 1; differentiable in the numbers."""
        ...

    def price(self, numbers: Float[Array, " C"], gates: AnyGates) -> Float[Array, ""]:
        """What is added to the loss for the share of the parameters that is open."""
        ...


def threshold(
    scores: Float[Array, " C"], share: Float[Array, " C"], budget: Float[Array, ""], temperature: float
) -> Float[Array, ""]:
    """The t at which sum_c share_c sigmoid((scores_c - t) / temperature) is the budget.

    t is found by bisection. Its slope is that of the implicit function, with m' the slope of the sigmoid:

        dt / ds_c = share_c m'_c / sum_b share_b m'_b                    (arXiv 2609.25518)

    Args:
        scores: [C].
        share: [C], parts of the parameters that sum to 1.
        budget: between 0 and 1.
        temperature: T, in units of the scores.

    >>> scores, share = jnp.array([1.0, 2.0, 3.0]), jnp.ones(3) / 3
    >>> t = threshold(scores, share, jnp.asarray(1 / 3), 0.1)
    >>> round(float(t), 2)  # between the second and the third
    2.5
    """
    fixed, margin = jax.lax.stop_gradient(scores), 20.0 * temperature

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        is_more = share @ jax.nn.sigmoid((fixed - middle) / temperature) > budget
        return jnp.where(is_more, middle, low), jnp.where(is_more, high, middle)

    low, high = jax.lax.fori_loop(0, 40, halve, (fixed.min() - margin, fixed.max() + margin))
    found = (low + high) / 2
    open_now = jax.nn.sigmoid((scores - found) / temperature)
    slope = jax.lax.stop_gradient(share @ (open_now * (1 - open_now)) / temperature)
    # One step of Newton's method: its value is next to nothing, its slope is the one above.
    return found + (share @ open_now - budget) / jnp.maximum(slope, 1e-12)


def standardised(ranking: Float[Array, " C"], spread: float) -> Float[Array, " C"]:
    """Scores by rank, evenly spaced from -spread to spread; 0 where all are equal.

    Ranks, not values: a ranking's few large scores would hold the others together.
    """
    n = len(ranking)
    ranks = jnp.zeros(n).at[jnp.argsort(ranking, stable=True)].set(jnp.linspace(-1.0, 1.0, n) if n > 1 else jnp.ones(1))
    return jnp.where(ranking.max() > ranking.min(), spread * ranks, 0.0)


@dataclasses.dataclass(frozen=True)
class Nested:
    """One score a gate; each step opens the best within a budget that is drawn anew, softly.

    Attributes:
        temperature: T, how soft the border between open and closed is, in units of the scores.
        smallest: least budget, as a share of the parameters.
        largest: largest budget. Budgets are drawn evenly on a logarithmic scale.
        spread: scores of a ranking to begin with go from -spread to spread.
    """

    temperature: float = 0.5
    smallest: float = 0.005
    largest: float = 0.5
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.smallest <= self.largest <= 1:
            raise WpjaxError(
                f"temperature={self.temperature:g}, budgets from {self.smallest:g} to {self.largest:g}: "
                "the temperature must be above 0, and budgets are shares with 0 < smallest <= largest <= 1"
            )

    def start(self, gates: AnyGates, ranking: Float[Array, " C"]) -> Float[Array, " C"]:
        """The ranking's order, evenly spaced."""
        return standardised(ranking, self.spread)

    def draw(self, numbers: Float[Array, " C"], gates: AnyGates, key: PRNGKeyArray) -> Float[Array, " C"]:
        """The best gates within a budget that `key` draws."""
        low, high = jnp.log(self.smallest), jnp.log(self.largest)
        return self.within(numbers, gates, jnp.exp(jax.random.uniform(key, minval=low, maxval=high)))

    def within(self, numbers: Float[Array, " C"], gates: AnyGates, budget: Float[Array, ""]) -> Float[Array, " C"]:
        """The best gates within a budget."""
        t = threshold(numbers, gates.share, budget, self.temperature)
        return jax.nn.sigmoid((numbers - t) / self.temperature)

    def price(self, numbers: Float[Array, " C"], gates: AnyGates) -> Float[Array, ""]:
        """Nothing: the budget is kept."""
        return jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class Priced:
    """What parametrisations at a price share.

    Attributes:
        weight: price of the whole expert, in units of the loss.
        initial: a_c to begin with: the larger, the more is open.
        spread: how far a ranking to begin with moves a_c up and down.
    """

    weight: float = 1.0
    initial: float = 1.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise WpjaxError(f"weight={self.weight:g}: the price of what is open must not be below 0")

    def start(self, gates: AnyGates, ranking: Float[Array, " C"]) -> Float[Array, " C"]:
        """`initial`, moved by the ranking."""
        return self.initial + standardised(ranking, self.spread)


@dataclasses.dataclass(frozen=True)
class HardConcrete(Priced):
    """Random gates that are often exactly 0 or 1, at a price.

    Attributes:
        beta: temperature of the random gates.
        gamma: what a gate is stretched down to before it is cut off at 0.
        zeta: what a gate is stretched up to before it is cut off at 1.
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def draw(self, numbers: Float[Array, " C"], gates: AnyGates, key: PRNGKeyArray) -> Float[Array, " C"]:
        """Random gates."""
        noise = jax.random.logistic(key, numbers.shape)  # log u - log(1 - u)
        stretched = jax.nn.sigmoid((noise + numbers) / self.beta) * (self.zeta - self.gamma) + self.gamma
        return jnp.clip(stretched, 0.0, 1.0)

    def price(self, numbers: Float[Array, " C"], gates: AnyGates) -> Float[Array, ""]:
        """The share of the parameters that is expected not to be closed, times `weight`."""
        probability = jax.nn.sigmoid(numbers - self.beta * jnp.log(-self.gamma / self.zeta))
        return self.weight * (gates.share @ probability)


@dataclasses.dataclass(frozen=True)
class StraightThrough(Priced):
    """Gates that are 0 or 1, with the slope of a sigmoid, at a price. A gate is open where a_c is positive."""

    initial: float = 0.5
    spread: float = 0.4

    def draw(self, numbers: Float[Array, " C"], gates: AnyGates, key: PRNGKeyArray) -> Float[Array, " C"]:
        """Which gates are open."""
        soft = jax.nn.sigmoid(numbers)
        return soft + jax.lax.stop_gradient((numbers > 0).astype(soft.dtype) - soft)

    def price(self, numbers: Float[Array, " C"], gates: AnyGates) -> Float[Array, ""]:
        """The share of the parameters that is open, with the slope of the sigmoid, times `weight`."""
        return self.weight * (gates.share @ self.draw(numbers, gates, jax.random.key(0)))


def make_parametrisation(name: str, price: float = 1.0, spread: float | None = None) -> Parametrisation:
    """The parametrisation of a name, with its defaults.

    Args:
        name: "nested", "hard-concrete" or "straight-through".
        price: price of the whole expert, of the last two.
        spread: how far a ranking to begin with sets gates apart; None for the default of each.

    Raises:
        WpjaxError: there is no such parametrisation.

    >>> make_parametrisation("straight-through", price=2.0).weight
    2.0
    """
    makes: dict[str, Callable[[], Nested | HardConcrete | StraightThrough]] = {
        "nested": Nested,
        "hard-concrete": lambda: HardConcrete(price),
        "straight-through": lambda: StraightThrough(price),
    }
    if name not in makes:
        raise WpjaxError(f"unknown parametrisation {name!r}; parametrisations: {', '.join(makes)}")
    made = makes[name]()
    return made if spread is None else dataclasses.replace(made, spread=spread)
