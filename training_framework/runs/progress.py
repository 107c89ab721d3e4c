"""The progress of a run, and its result."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["TTA_COLUMN", "EpochRecord", "Progress", "TrainResult"]

TTA_COLUMN = "val/acc1_tta"


@dataclass(kw_only=True)
class EpochRecord:
    """One epoch, for results and reports.

    Attributes:
        epoch: Counted from 0.
        seconds: Wall time, evaluation included.
        evaluation_seconds: The part of it that evaluations took.
        val_acc1: Top-1 accuracy in percent of its last evaluation; None without one.
        sample_digest: Digest of the samples that this process trained on, in order and by batch
            (`data.sample_digest`): equal for two runs that saw the same samples.
    """

    epoch: int
    seconds: float
    evaluation_seconds: float
    val_acc1: float | None = None
    sample_digest: str = ""


@dataclass(kw_only=True)
class Progress:
    """The progress of a run; part of every checkpoint.

    Attributes:
        step: Optimizer steps made.
        epoch: Current epoch, from 0.
        batch: Batches of this epoch that are done.
        sample_digest: Digest of the samples of these batches; for a user's own loader only their
            number is known.
        epoch_seconds: Wall time of this epoch so far, including time before a resumption.
        epoch_evaluation_seconds: The part that evaluations took.
        train_seconds: Wall time of all training steps, without evaluation and saving.
        images: Images of those steps, over all processes.
        best_acc1, best_acc5: Best top-1 accuracy in percent, and top-5 of the same evaluation.
        last: Values of the latest evaluation by their logged names.
        epochs: Records of the finished epochs.
        unlogged: Values of `step` if its row is not written yet, because its evaluation was not
            finished or the log could not be written; None: all rows are written.
        micro_batch_size: Maximum images of a forward pass since memory was short; None: it never
            was.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    sample_digest: str = ""
    epoch_seconds: float = 0.0
    epoch_evaluation_seconds: float = 0.0
    train_seconds: float = 0.0
    images: int = 0
    best_acc1: float | None = None
    best_acc5: float | None = None
    last: dict[str, float] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    unlogged: dict[str, float] | None = None
    micro_batch_size: int | None = None

    @property
    def logged_step(self) -> int:
        """The step up to which all rows are written."""
        return self.step if self.unlogged is None else self.step - 1

    def end_epoch(self, sample_digest: str) -> None:
        """Record the current epoch and start the next one.

        Args:
            sample_digest: Digest of all samples of this process in the epoch.
        """
        record = EpochRecord(
            epoch=self.epoch,
            seconds=self.epoch_seconds,
            evaluation_seconds=self.epoch_evaluation_seconds,
            val_acc1=self.last.get("val/acc1"),
            sample_digest=sample_digest,
        )
        self.epochs.append(asdict(record))
        self.epoch += 1
        self.batch = 0
        self.sample_digest = ""
        self.epoch_seconds = self.epoch_evaluation_seconds = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a run.

    Attributes:
        best_acc1: Best top-1 accuracy on the validation set in percent; None without one.
        best_acc5: Top-5 accuracy of the same evaluation.
        last_acc1: Top-1 accuracy of the last evaluation.
        last_acc5: Top-5 accuracy of the last evaluation.
        last_acc1_tta: Top-1 accuracy of the last evaluation with test-time augmentation; None
            without it.
        train_loss: Mean training loss of the last logged steps.
        val_loss: Loss of the last evaluation.
        epoch_seconds: Wall time of each epoch, evaluation included; the last one may be a part.
        images_per_second: Training images over the time of the training steps, all processes.
        steps: Optimizer steps made.
        run_directory: Where everything was written; None on processes that do not write.
        stopped_by: Why the run ended early: `SIGINT`, `SIGTERM` or `stop_after_steps`; empty if it
            did not.
        bad_images: Images that could not be decoded and were skipped.
    """

    best_acc1: float | None
    best_acc5: float | None
    last_acc1: float | None
    last_acc5: float | None
    train_loss: float | None
    val_loss: float | None
    epoch_seconds: tuple[float, ...]
    images_per_second: float
    steps: int
    run_directory: Path | None
    stopped_by: str = ""
    bad_images: int = 0
    last_acc1_tta: float | None = None

    @classmethod
    def of(
        cls,
        progress: Progress,
        *,
        train_loss: float | None,
        run_directory: Path | None,
        stopped_by: str,
    ) -> "TrainResult":
        """The result of a run with this progress."""
        seconds = [record["seconds"] for record in progress.epochs]
        if progress.batch and not stopped_by:  # the run ends within an epoch
            seconds.append(progress.epoch_seconds)
        return cls(
            best_acc1=progress.best_acc1,
            best_acc5=progress.best_acc5,
            last_acc1=progress.last.get("val/acc1"),
            last_acc5=progress.last.get("val/acc5"),
            last_acc1_tta=progress.last.get(TTA_COLUMN),
            train_loss=train_loss,
            val_loss=progress.last.get("val/loss"),
            epoch_seconds=tuple(seconds),
            images_per_second=progress.images / max(progress.train_seconds, 1e-9),
            steps=progress.step,
            run_directory=run_directory,
            stopped_by=stopped_by,
        )
