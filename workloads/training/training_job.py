"""What the training jobs share: steps over two splits, epochs, figures and their checks."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workloads.common import client, console, engine, torch
from workloads.common.device import ComputeDevice
from workloads.common.engine import Batches, EpochTotals, Pacer, Pass, TrainState
from workloads.common.errors import DivergedError

if TYPE_CHECKING:
    from workloads.training.images import ImageDataset
    from workloads.training.texts import TextDataset

# A cross-entropy of this size is that of a training that has blown up, finite or not.
BLOWN_UP_LOSS = 1e4


class TrainingJob(client.Workload):
    """Epochs of captured steps, and a pass over the test split where the job wants one.

    A job loads device, dataset, model, batches and totals, and says what is particular to it.

    Attributes:
        samples_name: What is trained on, in the plural.
        short_job: Flags of a shorter job, advised where this one takes hours.
        label_smoothing: Of the training's loss.
        is_training: Whether the job trains, or tests only.
        train: The pass over the training split, prepared by ``warm_up``; ``test`` likewise.
    """

    samples_name: str
    short_job: str
    label_smoothing = 0.0
    is_training = True
    device: ComputeDevice
    dataset: ImageDataset | TextDataset
    model: torch.nn.Module
    totals: EpochTotals
    train_batches: Batches
    test_batches: Batches | None = None
    train: Pass | None = None
    test: Pass | None = None
    epochs: Sequence[dict] = ()

    @abstractmethod
    def make_optimizer(self) -> tuple[torch.optim.Optimizer, Sequence[torch.Tensor]]:
        """Return the optimizer, and what other tensors ``update`` changes."""

    @abstractmethod
    def finish_epoch(self, epoch: dict, pacer: Pacer) -> dict:
        """Do what comes after an epoch; return what is added to its figures."""

    @abstractmethod
    def final_figures(self, last_epoch: dict) -> dict:
        """Return what is added to the figures of all epochs."""

    @abstractmethod
    def describe_epoch(self, epoch: dict) -> str:
        """Return an epoch's figures for people."""

    def update(self) -> None:
        """Update the weights once the gradients are there."""
        self.optimizer.step()

    def forward(self, network: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch, shape (batch, classes)."""
        return network(*inputs)

    def finish(self, pacer: Pacer) -> dict:
        """Do what comes after the last epoch; return its figures."""
        return {}

    def warm_up(self) -> None:
        """Prepare training and test for the engine, and go once through all that a job does."""
        self.optimizer, counters = self.make_optimizer()
        self.state = TrainState([self.model], self.optimizer, (*counters, *self.totals.tensors))
        self.network = engine.compile_module(self.device, self.model)
        shared = (self.reset, engine.step_pool(self.device))
        pacer = Pacer(self.device, client.Recorder())
        if self.test_batches:
            self.model.eval()
            step = functools.partial(self._test_step, self.test_batches)
            self.test = Pass(self.device, "test_step", self.test_batches, step, *shared)
        if self.is_training:
            self.model.train()
            self.train = Pass(
                self.device, "train_step", self.train_batches, self._train_step, *shared
            )
            self.train.rehearse(pacer, self.totals)
        if self.test:
            self.model.eval()
            self.test.rehearse(pacer, self.totals)
        self.reset()
        self.device.synchronize()

    def reset(self) -> None:
        """Put weights, optimizer, counters, random state and the order of the samples back."""
        self.state.restore()
        for batches in filter(None, (self.train_batches, self.test_batches)):
            batches.restart()

    def close(self) -> None:
        """End the threads that decode."""
        for batches in filter(None, (getattr(self, "train_batches", None), self.test_batches)):
            batches.close()

    def run_job(self, recorder: client.Recorder) -> dict:
        """Train for all epochs and return losses, accuracies, durations and throughput."""
        pacer = Pacer(self.device, recorder)
        self.epochs = []
        if self.train is not None:
            advice = None if self.device.is_cuda else self.short_job
            with console.progress(self.steps, "training", advice) as progress:
                for number in range(1, self.args.epochs + 1):
                    self._run_epoch(self.train, number, pacer, progress)
        return (self.partial_figures() or {}) | self.finish(pacer)

    @property
    def steps(self) -> int:
        """How many training steps the job has."""
        batches = self.train_batches
        return self.args.epochs * math.ceil(batches.samples / batches.batch_size)

    def _run_epoch(
        self, train: Pass, number: int, pacer: Pacer, progress: console.Progress
    ) -> None:
        """Train one epoch; this part alone is timed as the epoch."""
        self.model.train()
        loss, accuracy, seconds = train.run(
            pacer, self.totals, number - 1, lambda: progress.advance(detail=f"epoch {number}")
        )
        self.check_loss(loss, f"the training loss in epoch {number}")
        epoch = {
            "epoch": number,
            "train_loss": loss,
            "train_accuracy_percent": accuracy,
            "epoch_seconds": seconds,
        }
        self.epochs = [*self.epochs, epoch | self.finish_epoch(epoch, pacer)]
        self.tell(f"epoch {number}/{self.args.epochs}: {self.describe_epoch(self.epochs[-1])}")

    def check_loss(self, loss: float, when: str) -> None:
        """Warn of a loss that has blown up; one batch of NaN makes the sum of its epoch NaN.

        ``when`` says which loss and of when, such as ``the training loss in epoch 2``.

        Raises:
            DivergedError: It is NaN or infinite.
        """
        lr, precision = self.args.lr, self.device.precision
        if not math.isfinite(loss):
            raise DivergedError(
                f"the training diverged: {when} became {loss} (learning rate {lr:g}, {precision}), "
                f"so no figure of it counts; try --lr {lr / 10:g}"
                + ("" if precision == "fp32" else " or --precision fp32")
            )
        if loss > BLOWN_UP_LOSS:
            self.warn(
                f"the learning rate is too high for {len(self.dataset.train)} {self.samples_name}: "
                f"{when} grew to {loss:.2g} (learning rate {lr:g}), so its accuracy means nothing; "
                f"try --lr {lr / 10:g}"
            )

    def check_unfinished(self) -> None:
        """Look at the losses of the epoch in hand."""
        if self.train is not None:
            loss = self.totals.loss_sum.item() / self.train_batches.samples
            self.check_loss(loss, "the loss of the epoch that was stopped")

    def _train_step(self, count: int) -> None:
        *inputs, labels = self.train_batches.take(count)
        # Without gradients the backward pass writes new ones instead of adding to zeros: a step of
        # ResNet50 10.9 ms instead of 11.3 ms on an H100, of BERT 1.8 GB less memory traffic. In a
        # graph they lie in the graph's own memory.
        self.optimizer.zero_grad(set_to_none=True)
        with self.device.autocast():
            logits = self.forward(self._network_for(count, self.train_batches), *inputs)
            # Outside the model: BERT's own loss first asks what problem this is.
            loss = torch.nn.functional.cross_entropy(
                logits, labels, label_smoothing=self.label_smoothing
            )
        loss.backward()
        self.update()
        self.totals.add(logits.detach(), labels, loss.detach())

    def _test_step(self, batches: Batches, count: int) -> None:
        *inputs, labels = batches.take(count)
        with torch.no_grad(), self.device.autocast():
            logits = self.forward(self._network_for(count, batches), *inputs)
            loss = torch.nn.functional.cross_entropy(logits, labels)
        self.totals.add(logits, labels, loss)

    def _network_for(self, count: int, batches: Batches) -> torch.nn.Module:
        """Return the model; the last, smaller batch is not worth a compilation of its own."""
        return self.network if count == batches.batch_size else self.model

    def partial_figures(self) -> dict | None:
        """Return the figures of the finished epochs."""
        if not self.epochs:
            return None
        training_seconds = sum(epoch["epoch_seconds"] for epoch in self.epochs)
        return {
            "epochs": self.epochs,
            "mean_epoch_seconds": training_seconds / len(self.epochs),
            "samples_per_second": len(self.epochs) * self.train_batches.samples / training_seconds,
            "final_train_loss": self.epochs[-1]["train_loss"],
        } | self.final_figures(self.epochs[-1])

    def settings(self) -> dict:
        """Return what the job was run with."""
        return {
            **{name: getattr(self.args, name) for name in ("epochs", "lr", "seed")},
            "dataset": self.dataset.name,
            "train_samples": len(self.dataset.train),
            "batch_size": self.train_batches.batch_size,
            "engine": self.device.engine,
            "precision": self.device.precision,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def summary(self, figures: dict) -> list[tuple[str, str]]:
        """Return what all trainings say: notes on the data, an epoch a line, speed and memory."""
        rows = [("", note) for note in self.dataset.notes]
        for epoch in figures.get("epochs", ()):
            rows.append((f"Epoch {epoch['epoch']}", self.describe_epoch(epoch)))
        if "samples_per_second" in figures:
            rows.append(("Throughput", f"{figures['samples_per_second']:.1f} samples/s"))
        if figures.get("peak_memory_mib") is not None:
            rows.append(("Peak memory", f"{figures['peak_memory_mib']:.0f} MiB (PyTorch)"))
        return rows
