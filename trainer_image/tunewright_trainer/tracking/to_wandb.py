"""A run of a project of Weights & Biases, by their own client."""

from typing import Any, Final

_PATIENCE_SECONDS: Final = 30.0  # with a server that does not answer; we try again ourselves


class WandbRun:
    """See `tunewright_trainer.tracking.__main__.Run`. The run's id is the job's uid."""

    def begin(self, about: dict[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, init_timeout=_PATIENCE_SECONDS)
        if about["base_url"]:
            settings.base_url = about["base_url"]
        self._run = wandb.init(
            project=about["project"],
            entity=about["entity"] or None,
            id=about["uid"],
            name=about["name"],
            group=about["namespace"],
            resume="allow",
            config=about["spec"],
            dir=about["work"],
            settings=settings,
        )

    def add(self, points: list[dict[str, Any]]) -> None:
        """Of a step that was told before the attempt broke off, the first metrics stay."""
        for one in points:
            self._run.log(one["metrics"], step=one["step"])

    def end(self, *, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)
