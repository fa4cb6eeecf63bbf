"""Entry of `tunewright-trainer`."""

from tunewright_trainer.process import set_up_log, watch_for_stop


def main() -> None:
    """Note a request to stop before anything slow, then do the verb."""
    watch_for_stop()
    set_up_log()
    from tunewright_trainer.cli import app

    app()


if __name__ == "__main__":
    main()
