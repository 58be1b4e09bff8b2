"""Seeds from what they are for."""

import hashlib


def hashed(text: str) -> int:
    """31 bits. Neighbouring texts must not get neighbouring seeds: an engine may add the sample's index."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1


def eval_seed(seed: int, prompt_uid: str) -> int:
    """Of the responses to one prompt in every evaluation, so that two of them differ by their weights alone."""
    return hashed(f"{seed}/eval/{prompt_uid}")
