"""Detectron2's checkpointer with safe reading, atomic writing and a report of what was loaded.

Detectron2 loads what fits and logs the rest, so that a run on the wrong weights ends in an AP of 0 hours later. Here
every load leaves a `LoadReport`, and the three faults that matter in few-shot work are errors: weights that must fit
and do not, a predictor of another class count, and the same classes in another order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from fsdet.checkpoint.predictor import first_difference, predictor_classes, recorded_classes
from fsdet.checkpoint.safe_io import METADATA_KEY, CheckpointFileError, load_weights, save_atomic
from fsdet.data.files import save_text_atomic

logger = logging.getLogger(__name__)

# Detectron2's own switch in MODEL.WEIGHTS, "file.pth?matching_heuristics=True"; v0.6 does not know it yet.
_HEURISTICS_QUERY = "?matching_heuristics=True"


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of one load.

    Attributes:
        matched: model names that the file filled.
        missing: model names that the file has not; they keep their initial values. Batch-norm buffers that older
            files lack and PyTorch or Detectron2 set themselves are in neither list.
        unexpected: names of the file that the model has not.
        mismatched: (name, shape in the file, shape in the model) of tensors left out for their shape.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def is_full(self) -> bool:
        """True when the file and the model hold the same tensors."""
        return not (self.missing or self.unexpected or self.mismatched)

    def describe(self, limit: int = 12) -> str:
        """Counts, then up to `limit` names of each kind of fault, one per line."""
        lines = [
            f"{len(self.matched)} matched, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.mismatched)} of another shape"
        ]
        shapes = tuple(f"{name}: {in_file} in the file, {in_model} here" for name, in_file, in_model in self.mismatched)
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("other shape", shapes)):
            lines += [f"  {title}: {name}" for name in names[:limit]]
            if len(names) > limit:
                lines.append(f"  {title}: ... and {len(names) - limit} more")
        return "\n".join(lines)


class FewShotCheckpointer(DetectionCheckpointer):
    """Checkpointer of the suite; used like Detectron2's.

    Args:
        model, save_dir, save_to_disk, checkpointables: as Detectron2's.
        strict_heads: refuse a file whose box predictor has other classes than the model. Detectron2 would skip its
            tensors and train from random ones.
        require_full: refuse a file that does not fill the model exactly. A resumed run always requires it.
        metadata: plain values saved with every checkpoint under "fsdet", in particular "classes", the ordered names of
            the predictor's rows: a file that records other classes is refused under `strict_heads`.

    Attributes:
        report: LoadReport of the last load; None before the first one.
        source: file or address of the last load; "" when there was none.
        recorded: what the file of the last load says of itself, as far as it does: "fsdet" (its metadata), "iteration",
            and "seconds" of training (read where the trainer's state is not loaded).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str | os.PathLike[str] = "",
        *,
        save_to_disk: bool | None = None,
        strict_heads: bool = True,
        require_full: bool = False,
        metadata: Mapping[str, Any] | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, os.fspath(save_dir), save_to_disk=save_to_disk, **checkpointables)
        self.strict_heads = strict_heads
        self.require_full = require_full
        self.metadata = dict(metadata or {})
        self.report: LoadReport | None = None
        self.source = ""
        self.recorded: dict[str, Any] = {}
        self._use_heuristics = False
        self._already_read: dict[str, dict[str, Any]] = {}
        self._loading: dict[str, Any] = {}

    # Reading

    def load(self, path: str | os.PathLike[str], checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights and the named checkpointables (all by default); as Detectron2's, and fills `report`.

        Args:
            path: .pth, .pkl or .safetensors, a model-zoo address, or "" to keep the initial weights. A backbone file
                with bare names ("stem.conv1.weight") goes where the model has that backbone.
        Returns: what the file holds beside model and checkpointables.
        Raises: FileNotFoundError, CheckpointFileError, or ValueError when the file does not fit the model.
        """
        path = os.fspath(path or "")
        self._use_heuristics = path.endswith(_HEURISTICS_QUERY)
        path = path.removesuffix(_HEURISTICS_QUERY)
        self.source, self.report, self.recorded = path, None, {}
        if path and "://" not in path and not Path(path).is_file():
            raise FileNotFoundError(f"Checkpoint {path} not found; check MODEL.WEIGHTS")
        try:
            rest = super().load(path, checkpointables)
        finally:
            self._already_read, self._loading = {}, {}
            # Later Detectron2 keeps the parsed address here and would trip over it after a failed load.
            if hasattr(self, "_parsed_url_during_load"):
                self._parsed_url_during_load = None
        # Not the whole rest, which holds an optimizer's state.
        said = {key: rest.get(key) for key in (METADATA_KEY, "iteration")}
        said["seconds"] = rest.get("trainer", {}).get("seconds")
        self.recorded = {key: value for key, value in said.items() if value is not None}
        if self.report is not None:
            logger.info("%s: %s", path, self.report.describe(limit=0).splitlines()[0])
        return rest

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = self._already_read.pop(filename, None) or load_weights(filename)
        if self._use_heuristics or self._has_bare_names(checkpoint["model"]):
            checkpoint["matching_heuristics"] = True
        if self.strict_heads:
            self._check_classes(checkpoint)
        return checkpoint

    def _has_bare_names(self, state_dict: Mapping[str, Any]) -> bool:
        """True when no name is the model's but some are the end of one: a backbone saved on its own."""
        names = self.model.state_dict().keys()
        if any(name in names for name in state_dict):
            return False
        return any(own.endswith("." + name) for name in state_dict for own in names)

    def _top_layers_of_other_shape(self, state_dict: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of a file's last layers that would match a layer of the model by name, but none by shape.

        The classifier of an ImageNet file is "linear", and so are layers of detectors that have nothing to do with it.
        """
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, tensor in self.model.state_dict().items():
            shapes.setdefault(".".join(name.split(".")[-2:]), set()).add(tuple(tensor.shape))
        top = {name: value for name, value in state_dict.items() if name.count(".") == 1 and name in shapes}
        fitting = {name.split(".")[0] for name, value in top.items() if tuple(value.shape) in shapes[name]}
        return tuple(name for name in top if name.split(".")[0] not in fitting)

    def _check_classes(self, checkpoint: Mapping[str, Any]) -> None:
        in_file, in_model = predictor_classes(checkpoint["model"]), predictor_classes(self.model.state_dict())
        if in_file is None or in_model is None:
            return
        remedy = (
            f'Adapt it by class names: "python tools/surgery.py randinit --src {self.source} --output NEW.pth --split '
            '..." keeps the base rows and adds the novel ones, "... remove" drops the predictor.'
        )
        if in_file != in_model:
            raise ValueError(
                f"{self.source} has a predictor of {in_file} classes, the model has {in_model} "
                f"(MODEL.ROI_HEADS.NUM_CLASSES). {remedy}"
            )
        recorded, own = recorded_classes(checkpoint), tuple(self.metadata.get("classes") or ())
        if recorded and own and recorded != own:
            raise ValueError(
                f"{self.source} was trained on other classes or in another order: "
                f"{first_difference(recorded, own)}. {remedy}"
            )

    def _convert_ndarray_to_tensor(self, state_dict: dict[str, Any]) -> None:
        # The parent calls this last with the dictionary that it is about to load, under the names it has matched.
        self._loading = state_dict
        super()._convert_ndarray_to_tensor(state_dict)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        by_heuristics = checkpoint.get("matching_heuristics", False)
        left_out = self._top_layers_of_other_shape(checkpoint["model"]) if by_heuristics else ()
        checkpoint["model"] = {name: value for name, value in checkpoint["model"].items() if name not in left_out}
        incompatible = super()._load_model(checkpoint)
        mismatched = tuple((name, tuple(a), tuple(b)) for name, a, b in incompatible.incorrect_shapes)
        other_shape = {name for name, _, _ in mismatched}
        filled = set(self._loading) - other_shape
        missing = tuple(name for name in incompatible.missing_keys if name not in other_shape)
        self.report = LoadReport(
            matched=tuple(name for name in self.model.state_dict() if name in filled),
            missing=missing,
            unexpected=(*incompatible.unexpected_keys, *left_out),
            mismatched=mismatched,
        )
        if self.require_full and not self.report.is_full:
            raise ValueError(
                f"{self.source} does not fit the model exactly, which is required here: {self.report.describe()}\n"
                "Use the configuration that the file was trained with."
            )
        if self.strict_heads and any("box_predictor." in name for name in other_shape):
            raise ValueError(
                f"{self.source} has a box predictor of another shape: {self.report.describe()}\n"
                "Use the same MODEL.ROI_BOX_HEAD settings, or drop the predictor with tools/surgery.py remove."
            )
        return incompatible

    # Resuming

    def resume_or_load(self, path: str | os.PathLike[str], *, resume: bool = True) -> dict[str, Any]:
        """Resume from the newest complete checkpoint of `save_dir` when there is one, otherwise load weights only.

        A pointer that names a torn or missing file falls back, with a warning, to the complete checkpoint of the
        highest iteration. Raises: CheckpointFileError when a run was saved here but no file of it is complete.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        newest = self._newest_complete()
        require_full, self.require_full = self.require_full, True
        try:
            return self.load(newest)
        finally:
            self.require_full = require_full

    def _newest_complete(self) -> str:
        named = self.get_checkpoint_file()
        try:
            self._already_read = {named: self._read_resumable(named)}
            return named
        except (CheckpointFileError, FileNotFoundError) as error:
            reason = error
        complete = []
        for other in sorted(Path(self.save_dir).glob("*.pth")):
            if str(other) == named:
                continue
            try:
                complete.append((int(self._read_resumable(str(other)).get("iteration", -1)), str(other)))
            except CheckpointFileError as error:
                logger.warning("Passed over: %s", error)
        if not complete:
            raise CheckpointFileError(
                f"No complete checkpoint to resume from in {self.save_dir}: {reason} Start again without --resume, or "
                "in another OUTPUT_DIR."
            )
        newest = max(complete)[1]
        logger.warning("The newest checkpoint cannot be used (%s). Resuming from %s instead", reason, newest)
        return newest

    def _read_resumable(self, path: str) -> dict[str, Any]:
        checkpoint = load_weights(path)
        absent = [key for key in self.checkpointables if key not in checkpoint]
        if absent:
            raise CheckpointFileError(f"{path} holds weights but no state to resume from ({', '.join(absent)}).")
        return checkpoint

    # Writing

    def save(self, name: str, **kwargs: Any) -> None:
        """Write NAME.pth atomically, then the pointer to it; `kwargs` are kept as Detectron2 keeps them."""
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: part.state_dict() for key, part in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **state, **kwargs}
        if self.metadata:
            data[METADATA_KEY] = self.metadata
        folder = Path(self.save_dir)
        for stale in folder.glob(".*.pth.*.tmp"):  # left by a run that was killed while saving
            stale.unlink(missing_ok=True)
        logger.info("Saving checkpoint to %s", folder / f"{name}.pth")
        save_atomic(data, folder / f"{name}.pth")
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest checkpoint in the pointer file, atomically."""
        save_text_atomic(last_filename_basename, Path(self.save_dir) / "last_checkpoint")
