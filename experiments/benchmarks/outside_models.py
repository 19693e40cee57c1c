"""Trains a model of RecTools or RecBole and scores the targets; run by `outside_anchors` with an interpreter not ours.

python outside_models.py folder: reads settings.json and log.npz there, writes scores.npy and about.json; or, where the
settings ask for `timed_epochs`, about.json alone, with the seconds of each (for `packed_step`).
"""

import copy
import json
import pathlib
import sys
import time
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np

# Users whose lists of the whole catalogue a data frame holds at once.
_USERS_AT_ONCE = 500


def ndcg_at_10(ranks: np.ndarray) -> float:
    """Mean of 1 / log2(rank + 1) within the first ten, by which the epoch is chosen on validation."""
    return float(np.where(ranks <= 10, 1 / np.log2(ranks + 1.0), 0.0).mean())


class Events:
    """The log as columns, one row per event: users, items from 1, exact seconds, and places in the user's history."""

    def __init__(self, log: Any) -> None:
        self.offsets, self.num_items = log["offsets"], int(log["num_items"])
        self.lengths = np.diff(self.offsets)
        self.users = np.repeat(np.arange(len(self.lengths)), self.lengths)
        self.items, self.seconds = log["items"], log["timestamps"]
        self.places = np.arange(len(self.users)) - np.repeat(self.offsets[:-1], self.lengths)
        self.left = np.repeat(self.lengths, self.lengths) - self.places

    def before(self, held_out: int) -> np.ndarray:
        """Returns which events are not among the last `held_out` of their user."""
        return self.left > held_out

    def targets(self, held_out: int) -> np.ndarray:
        """Returns the item that is the last but `held_out` - 1 of each user, and its seconds."""
        return self.offsets[1:] - held_out


class OfRecTools:
    """A transformer of RecTools, its settings the library's but for width and layers."""

    packages = ("rectools", "torch", "pytorch-lightning", "numpy", "pandas")

    def __init__(self, name: str, events: Events, settings: dict[str, Any]) -> None:
        from pytorch_lightning import seed_everything
        from rectools.models import HSTUModel, SASRecModel

        seed_everything(settings["seed"], workers=True, verbose=False)
        kind = {"rectools_sasrec": SASRecModel, "rectools_hstu": HSTUModel}[name]
        self.options = {"n_factors": settings["d_model"], "n_blocks": settings["num_layers"], "deterministic": True}
        if "max_len" in settings:
            self.options["session_max_len"] = settings["max_len"]
        self.model, self.events = kind(**self.options), events
        self.training = self._dataset(events.before(2))

    def _frame(self, rows: np.ndarray) -> Any:
        import pandas as pd

        events = self.events
        # Equal seconds keep the order of the log; whole seconds, which the model reads, are exact.
        times = pd.to_datetime(events.seconds[rows] * 1_000_000 + events.places[rows], unit="us")
        columns = {"user_id": events.users[rows], "item_id": events.items[rows], "weight": 1.0, "datetime": times}
        return pd.DataFrame(columns)

    def _dataset(self, rows: np.ndarray) -> Any:
        from rectools.dataset import Dataset

        return Dataset.construct(self._frame(rows))

    def _lists(self, held_out: int, users: np.ndarray, k: int) -> Any:
        """Recommends from what comes before the last `held_out` events of the users; all items are candidates."""
        events = self.events
        rows = events.before(held_out) & np.isin(events.users, users)
        context = None
        if self.model.require_recommend_context:
            # As in training, where each event's time is known before its item is.
            context = self._frame(events.targets(held_out)[users]).drop(columns="item_id")
        return self.model.recommend(users, self._dataset(rows), k=k, filter_viewed=False, context=context)

    def epoch(self) -> float:
        """Trains for one epoch; returns ndcg@10 of validation."""
        self.model.fit_partial(self.training, min_epochs=1, max_epochs=1)
        events = self.events
        target = events.items[events.targets(2)]
        found = self._lists(2, np.arange(len(target)), 10)
        hits = found[found["item_id"].to_numpy() == target[found["user_id"].to_numpy()]]
        ranks = np.full(len(target), 11)
        ranks[hits["user_id"]] = hits["rank"]
        return ndcg_at_10(ranks)

    def epoch_seconds(self, epochs: int) -> list[float]:
        """Trains for some epochs; returns the seconds of each, validation and what comes before training left out."""
        from pytorch_lightning import Callback, Trainer

        class Clock(Callback):
            def __init__(self) -> None:
                self.began, self.seconds = 0.0, []

            def on_train_epoch_start(self, *_: Any) -> None:
                self.began = time.perf_counter()

            def on_train_epoch_end(self, *_: Any) -> None:
                self.seconds.append(time.perf_counter() - self.began)

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        self.model = type(self.model)(
            **self.options,
            get_trainer_func=lambda: Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[Clock()], **quiet),
        )
        self.model.fit(self.training)
        # The library trains with a copy of its trainer.
        return next(one for one in self.model.fit_trainer.callbacks if isinstance(one, Clock)).seconds

    def targets_per_epoch(self) -> int:
        """Returns how many events of the training part are predicted: those of a user's last session but its first."""
        longest = self.model.get_config(simple_types=True)["session_max_len"]
        return int(np.minimum(self.events.lengths - 3, longest).clip(0).sum())

    def state(self) -> Any:
        """Returns the parameters as they are now."""
        return copy.deepcopy(self.model.lightning_model.state_dict())

    def scores(self, state: Any) -> np.ndarray:
        """Returns the scores [users, items + 1] of the last events; -inf where an item is not known."""
        self.model.lightning_model.load_state_dict(state)
        events = self.events
        scores = np.full((len(events.lengths), events.num_items + 1), -np.inf, np.float32)
        for first in range(0, len(scores), _USERS_AT_ONCE):
            users = np.arange(first, min(first + _USERS_AT_ONCE, len(scores)))
            found = self._lists(1, users, events.num_items)
            scores[found["user_id"], found["item_id"]] = found["score"]
        return scores

    def about(self) -> dict[str, Any]:
        """Returns all settings of the model."""
        return self.model.get_config(simple_types=True)


class OfRecBole:
    """RecBole's SASRec, its settings the library's."""

    packages = ("recbole", "torch", "numpy", "pandas")

    def __init__(self, name: str, events: Events, settings: dict[str, Any]) -> None:
        import torch

        if not hasattr(np, "float_"):
            raise SystemExit("RecBole 1.2 needs numpy<2")
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_trainer, init_seed

        self.folder, self.events = pathlib.Path(settings["folder"]) / "log", events
        self.folder.mkdir()
        rows = zip(events.users, events.items, events.places, strict=True)
        # Times are only ordered by, in float32: places in the history are exact.
        text = "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(f"{u}\t{i}\t{p}\n" for u, i, p in rows)
        (self.folder / "log.inter").write_text(text)
        self.options = {
            "data_path": str(self.folder.parent),
            "checkpoint_dir": str(self.folder / "saved"),
            "hidden_size": settings["d_model"],
            "n_layers": settings["num_layers"],
            "seed": settings["seed"],
            "epochs": 1,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
            "train_neg_sample_args": None,
            "metrics": ["NDCG"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "use_gpu": False,
            "show_progress": False,
        }
        arguments, sys.argv = sys.argv, sys.argv[:1]  # RecBole reads the command line.
        self.config = Config(model="SASRec", dataset="log", config_dict=self.options)
        sys.argv = arguments
        init_seed(settings["seed"], True)
        torch.set_num_threads(1)
        from recbole.model.sequential_recommender import SASRec

        dataset = create_dataset(self.config)
        self.training, self.validation, self.test = data_preparation(self.config, dataset)
        self.model = SASRec(self.config, self.training.dataset)
        self.trainer = get_trainer(self.config["MODEL_TYPE"], "SASRec")(self.config, self.model)
        self.number = 0

    def epoch(self) -> float:
        """Trains for one epoch; returns ndcg@10 of validation."""
        self.trainer._train_epoch(self.training, self.number, show_progress=False)
        self.number += 1
        found = self.trainer.evaluate(self.validation, load_best_model=False, show_progress=False)
        return float(found["ndcg@10"])

    def state(self) -> Any:
        """Returns the parameters as they are now."""
        return copy.deepcopy(self.model.state_dict())

    def scores(self, state: Any) -> np.ndarray:
        """Returns the scores [users, items + 1] of the last events."""
        from recbole.utils.case_study import full_sort_scores

        self.model.load_state_dict(state)
        dataset, events = self.test.dataset, self.events
        columns = np.array([0, *(dataset.token2id("item_id", str(i)) for i in range(1, events.num_items + 1))])
        scores = np.full((len(events.lengths), events.num_items + 1), -np.inf, np.float32)
        for user in range(len(scores)):
            found = full_sort_scores(dataset.token2id("user_id", [str(user)]), self.model, self.test)
            scores[user] = found.numpy()[0, columns]
        return scores

    def about(self) -> dict[str, Any]:
        """Returns the settings that decide what is trained."""
        names = ("hidden_size", "inner_size", "n_layers", "n_heads", "hidden_dropout_prob", "attn_dropout_prob")
        names += ("loss_type", "learning_rate", "train_batch_size", "MAX_ITEM_LIST_LENGTH", "weight_decay", "learner")
        return {name: self.config[name] for name in names}


def main(folder: pathlib.Path) -> None:
    """Trains until validation does not improve, and writes the scores of the best epoch."""
    import torch

    warnings.filterwarnings("ignore")
    settings = json.loads((folder / "settings.json").read_text()) | {"folder": str(folder)}
    events = Events(np.load(folder / "log.npz"))
    if "timed_epochs" in settings:
        timed = OfRecTools(settings["anchor"], events, settings)
        about = {
            "versions": {name: version(name) for name in OfRecTools.packages},
            "settings": timed.options,
            "seconds": timed.epoch_seconds(settings["timed_epochs"]),
            "targets_per_epoch": timed.targets_per_epoch(),
            "threads": torch.get_num_threads(),
        }
        (folder / "about.json").write_text(json.dumps(about, default=str))
        return
    torch.set_num_threads(1)
    kind = OfRecBole if settings["anchor"].startswith("recbole") else OfRecTools
    model, validations, best, seconds = kind(settings["anchor"], events, settings), [], None, []
    while len(validations) < settings["epochs"]:
        started = time.perf_counter()
        validations.append(model.epoch())
        seconds.append(time.perf_counter() - started)
        print(f"epoch {len(validations)}: ndcg@10 {validations[-1]:.4f}, {seconds[-1]:.1f} s", flush=True)
        if validations[-1] == max(validations):
            best = len(validations), model.state()
        if best is not None and len(validations) - best[0] >= settings["patience"]:
            break
    assert best is not None
    np.save(folder / "scores.npy", model.scores(best[1]))
    about = {
        "versions": {name: version(name) for name in kind.packages},
        "settings": model.about(),
        "best_epoch": best[0],
        "epochs": len(validations),
        "valid_ndcg@10": validations,
        "seconds": sum(seconds),
        "device": "cpu, one thread",
    }
    (folder / "about.json").write_text(json.dumps(about, default=str))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
