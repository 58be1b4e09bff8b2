"""A run in one process: the learner's own Trainer, and small models that are sampled by plain torch.

What is compared here is how a policy learns, not how fast a machine is: a run of 40 steps takes about a minute of one
core, and many runs are needed for one number. Batches, advantages, losses, optimizers, alarm, tasks and verifiers are
those of `run.py train`; left out are engines, sockets and actors.

    sampler.py   responses of a frozen small model, with the log-probs that the learner would find
    run.py       one run: value pretraining, policy steps on batches of an exact age, evaluations
    jobs.py      many runs on a few cores, each kept as a line of a file as soon as it is done
"""
