"""The fifteen views of staleness: what to look at, and what to decide by it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class View:
    name: str
    definition: str
    decision: str


# By number. rho = pi_old / pi_behavior; g = the version gap of a token when it is trained on.
VIEWS: dict[int, View] = {
    1: View(
        name="age heat map",
        definition="share of the tokens over step and g, with the bound",
        decision="the bound, and `weights.publish_every`: tokens crowd at the bound when it holds actors back",
    ),
    2: View(
        name="age budget",
        definition="flight (newest - oldest version of a response), queue (version that trains it - its newest), and "
        "the updates already made on its batch",
        decision="queue: fewer actors; flight: shorter responses; updates: fewer mini-batches",
    ),
    3: View(
        name="ratio band by gap",
        definition="1%, 50% and 99% quantiles of rho",
        decision="where `algorithm.truncation` has to be",
    ),
    4: View(
        name="token ESS by gap",
        definition="(SUM rho)^2 / (n SUM rho^2)",
        decision="the bound belongs below the gap where it falls under 0.5",
    ),
    5: View(
        name="sequence ESS by gap",
        definition="the same with the product of rho over each response",
        decision="masking, and the learning rate: token ESS alone looks well while this has collapsed",
    ),
    6: View(
        name="M2 and TV by gap",
        definition="mean (log rho)^2, and mean abs(pi_old - pi_behavior)",
        decision="whether to mask, because unlike a KL neither cancels",
    ),
    7: View(
        name="mismatch and its floor",
        definition="mean abs(log rho) of responses that the current version drew whole, against the same before the "
        "first update",
        decision="whether it is a fault of the engine or staleness",
    ),
    8: View(
        name="lost advantage by gap and sign",
        definition="SUM abs(A) [clipped, truncated, masked] / SUM abs(A)",
        decision="another correction, or a tighter bound, where it throws the signal away",
    ),
    9: View(
        name="age in nats",
        definition="sum of KL(pi_v, pi_{v+1}) over the versions that went by",
        decision="what one version costs: a bound in versions is worth what this says",
    ),
    10: View(
        name="staleness x learning rate",
        definition="largest g x the policy's learning rate",
        decision="the learning rate: keep the product below where runs of yours fell",
    ),
    11: View(
        name="the critic by gap and position",
        definition="explained variance of the outcome, and mean V - R",
        decision="at or below 0 the critic adds noise: `algorithm.value_gate`, more value updates, a longer warm-up",
    ),
    12: View(
        name="selection bias",
        definition="length and pass rate of what was sampled, trained and dropped",
        decision="a wider bound or `batching: admission_order` when slow prompts starve",
    ),
    13: View(
        name="waste",
        definition="tokens dropped by reason, over tokens generated",
        decision="pacing or dropping: what is dropped as stale was admitted too early",
    ),
    14: View(
        name="idleness and window",
        definition="actors idle, learner waiting, publication, sampled ahead / window",
        decision="how many actors to a learner",
    ),
    15: View(
        name="runs compared",
        definition="accuracy against wall time and against tokens, a curve for each bound",
        decision="the bound",
    ),
}
