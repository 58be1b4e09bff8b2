"""`run.py eval`: a model or a run on a file of prompts, without a learner.

plan            what is evaluated: model, prompts, settings, folder
runner          one engine, prompts in flight until none is left
votes           which responses give the same answer
transcripts     OUT: what has been sampled, and from where a second call goes on
report          scores, as a table and as JSON
main            the command
"""
