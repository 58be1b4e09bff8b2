"""How the policy's weights become the next version in every actor, and whether they arrived."""
