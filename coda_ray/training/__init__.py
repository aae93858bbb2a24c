"""The one Ray Train worker loop, its checkpoints and its launch."""
