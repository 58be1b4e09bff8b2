"""Policy and critic on their devices: loaded, packed, sharded, written back."""
