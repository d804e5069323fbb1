"""Tests of other programs on our checkpoints. They have an environment of their own (`make test-clients`)."""

from boards import boards, budget, data, folder, score_boards  # noqa: F401  their fixtures, for every file here
