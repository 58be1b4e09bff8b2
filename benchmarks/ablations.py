"""What each part of VAPO does here: the ablation table of the paper (arXiv 2504.05118, section 5) in miniature.

    python benchmarks/ablations.py [--small] [--cores 0 1] [--runs FILE] [--json FILE] [--svg FILE]

The contrary walker (configs/models/contrary_walk) is trained with vanilla PPO, GRPO, DAPO, VAPO, VAPO without each of
its seven parts, and VAPO with each of the switches (two of them, M2 and ESS, are for old batches and have little to do
here, where batches are fresh: benchmarks/age.py is theirs). Settings are those of configs/number_walk.yaml and of the
recipes; only the policy's learning rate is chosen, for every row from the same rates, by the mean accuracy of all
evaluations over tuning seeds, which are not reported. Runs are made in this process (benchmarks/miniature): a minute of
one core each. A run that is done is kept in --runs and not repeated, so that the command can be stopped and given
again. All of it takes about an hour on two cores; --small, without the switches, two seeds a row at the middle rate,
ten minutes.

Value pretraining: each seed has a critic, pretrained once with VAPO's settings, that its rows share (as the paper
shares its own). Three rows do not: "VAPO, its own critic" pretrains in the run itself, and SAO's and AsyPPO's critics
are pretrained as they are trained. Numbers are given without and with what it cost.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.miniature import comparison
from benchmarks.miniature.comparison import Plan, Pretrained, Row

# A move of the walk is a segment, about four tokens; over one of them VAPO's lambda of these lengths comes to 0.85.
SEGMENTS = (
    "algorithm.segment_probability=0.2",
    "algorithm.length_adaptive_alpha=null",
    "algorithm.policy_lambda=0.85",
)
ROWS = (
    Row(name="vanilla PPO", recipes=("ppo",)),
    Row(name="GRPO", recipes=("grpo",)),
    Row(name="DAPO", recipes=("dapo",)),
    Row(name="VAPO", recipes=("vapo",)),
    Row(name="VAPO, its own critic", recipes=("vapo",), critic=Pretrained.run),
    Row(name="without value pretraining", recipes=("vapo", "ablations/no_value_pretraining")),
    Row(name="without decoupled GAE", recipes=("vapo", "ablations/no_decoupled_gae")),
    Row(name="without length-adaptive GAE", recipes=("vapo", "ablations/no_length_adaptive_gae")),
    Row(name="without clip-higher", recipes=("vapo", "ablations/no_clip_higher")),
    Row(name="without token-level loss", recipes=("vapo", "ablations/no_token_level_loss")),
    Row(name="without positive-example LM loss", recipes=("vapo", "ablations/no_positive_lm_loss")),
    Row(name="without group sampling", recipes=("vapo", "ablations/no_group_sampling")),
    Row(name="frozen attention, K = 2 (SAO's critic)", recipes=("vapo", "sao_critic"), critic=Pretrained.row),
    Row(name="two critics, agreement mask (AsyPPO)", recipes=("vapo", "mini_critics"), critic=Pretrained.row),
    Row(name="lambda by segments (SAE)", recipes=("vapo",), settings=SEGMENTS),
    Row(name="M2 mask (M2PO)", recipes=("vapo",), settings=("algorithm.correction=m2",)),
    Row(name="ESS-scaled step (VCPO)", recipes=("vapo",), settings=("algorithm.ess_scaled_step=true",)),
)
PLAN = Plan(
    table="ablations",
    title="Ablations",
    recipe="number_walk",
    settings=("model.path=configs/models/contrary_walk",),
    rows=ROWS,
    reference="VAPO",
    drawn=6,
    rates=(1.5e-4, 3e-4, 6e-4),
    tuning_seeds=(100, 101),
    seeds=(0, 1, 2, 3, 4),
    small_rows=ROWS[:4] + ROWS[5:12],
    small_rates=(3e-4,),
    small_seeds=(0, 1),
    steps=40,
    every=5,
    prompts=256,
    samples=2,
    at_steps=(10, 15, 20, 30, 40),
    at_tokens=(100_000, 200_000),
    at_seconds=(10.0, 20.0),
    goal=0.8,
)


def main(arguments: Sequence[str] | None = None) -> None:
    comparison.main(PLAN, __doc__, Path("benchmarks/results/ablations.jsonl"), arguments)


if __name__ == "__main__":
    main()
