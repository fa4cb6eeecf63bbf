"""All tests of Tunewright; `tests.cluster` is the single-machine Kubernetes that they run on."""
