"""Entry of `tunewright-trainer`."""

import os

from tunewright_trainer.process import set_up_log, watch_for_stop


def main() -> None:
    """Note a request to stop before anything slow, then do the verb."""
    watch_for_stop()
    # OpenMP's threads wait for one another by spinning. Where they have to share processors with anybody else, the spinning keeps from work the
    # very thread that is waited for, and training gets ten times slower. Read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    set_up_log()
    from tunewright_trainer.cli import app

    app()


if __name__ == "__main__":
    main()
