"""Where everything lies in a store, and how groups and episodes are named.

The one place that spells keys.
"""

import re
import sys

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

RUNS = "runs/"
EPISODES = "episodes/"

RUN_SCORES = "run"
"""Name of the scores that a run's own verifiers gave; other sets are annotations."""


def check_run_id(run_id: str) -> None:
    """Raise ValueError unless the id can be a folder's name on every store."""
    if not _RUN_ID.fullmatch(run_id):
        raise ValueError(
            f"run id {run_id!r} is not usable: take at most 100 letters, digits, '.', '_' and '-', "
            "with a letter or digit first"
        )


def group_id(run_id: str, draw: int) -> str:
    """The id of the group that is the run's draw number `draw`, counted from 0."""
    # One string, however many facts name the group: a long run has millions of them.
    return sys.intern(f"{run_id}-{draw:08d}")


def episode_id(group: str, sample: int) -> str:
    """The id of a group's sample number `sample`, counted from 0."""
    return f"{group}-{sample:03d}"


def run_folder(run_id: str) -> str:
    check_run_id(run_id)
    return f"{RUNS}{run_id}/"


def config_key(run_id: str) -> str:
    return f"{run_folder(run_id)}config.json"


def run_json_key(run_id: str) -> str:
    return f"{run_folder(run_id)}run.json"


def source_key(run_id: str, sha256: str, name: str) -> str:
    """Where a file of the user's code is kept."""
    return f"{run_folder(run_id)}source/{sha256[:12]}-{name}"


def report_key(run_id: str) -> str:
    return f"{run_folder(run_id)}report.html"


def profiles_folder(run_id: str) -> str:
    """Where traces and snapshots of profiled steps lie."""
    return f"{run_folder(run_id)}profiles/"


def nonfinite_folder(run_id: str) -> str:
    """Where batches lie that could not be trained on."""
    return f"{run_folder(run_id)}nonfinite/"


def estimates_folder(run_id: str) -> str:
    """Where reference logprobs and values of batches lie."""
    return f"{run_folder(run_id)}estimates/"


def incarnations_folder(run_id: str) -> str:
    return f"{run_folder(run_id)}incarnations/"


def incarnation_key(run_id: str, incarnation: int) -> str:
    return f"{incarnations_folder(run_id)}{incarnation:06d}.json"


def log_folder(run_id: str) -> str:
    return f"{run_folder(run_id)}log/"


def entry_prefix(run_id: str, incarnation: int) -> str:
    """What the keys of all entries of an incarnation start with."""
    return f"{log_folder(run_id)}{incarnation:06d}-"


def entry_key(run_id: str, incarnation: int, seq: int) -> str:
    return f"{entry_prefix(run_id, incarnation)}{seq:08d}.json"


def part_name(round: int, replica: int) -> str:
    """Name of what a replica generates in a round, and of its commit."""
    return f"{round:06d}-{replica:03d}"


def generated_prefix(run_id: str, name: str) -> str:
    """Key prefix for `write_part` of episodes that are not scored yet."""
    return f"{run_folder(run_id)}generated/{name}"


def evaluation_prefix(run_id: str, name: str) -> str:
    """Key prefix for `write_part` of the episodes of an evaluation."""
    return f"{run_folder(run_id)}evaluations/{name}"


def checkpoint_folder(run_id: str, step: int) -> str:
    return f"{run_folder(run_id)}checkpoints/{step:08d}/"


def episodes_prefix(run_id: str, commit: str) -> str:
    """Key prefix for the part that the commit named `commit` is about."""
    check_run_id(run_id)
    return f"episodes/data/{run_id}/{commit}"


def commits_folder(run_id: str) -> str:
    check_run_id(run_id)
    return f"episodes/commits/{run_id}/"


def commit_key(run_id: str, commit: str) -> str:
    return f"{commits_folder(run_id)}{commit}.json"


def data_folder(run_id: str) -> str:
    """Where the parts that the run's commits are about lie."""
    check_run_id(run_id)
    return f"{EPISODES}data/{run_id}/"


def compactions_folder(run_id: str) -> str:
    """Where records lie that say which rows of compacted parts are a commit's."""
    check_run_id(run_id)
    return f"{EPISODES}compactions/{run_id}/"


def compaction_key(run_id: str, number: int) -> str:
    return f"{compactions_folder(run_id)}{number:06d}.json"


def compacted_folder(run_id: str) -> str:
    check_run_id(run_id)
    return f"{EPISODES}compacted/{run_id}/"


def compacted_prefix(run_id: str, number: int, attempt: str) -> str:
    """Key prefix for the parts of a compaction; `attempt` keeps two compactors apart."""
    return f"{compacted_folder(run_id)}{number:06d}-{attempt}"


def rounds_folder(run_id: str) -> str:
    """Where claims lie to the rounds that other runs collect for this one."""
    return f"{run_folder(run_id)}rounds/"


def round_key(run_id: str, round: int) -> str:
    return f"{rounds_folder(run_id)}{round:06d}.json"


def deleted_key(run_id: str) -> str:
    """What remains of a run that was deleted."""
    return f"{run_folder(run_id)}deleted.json"


def check_score_set(name: str) -> None:
    """Raise ValueError unless a set of scores can have this name."""
    if not _RUN_ID.fullmatch(name):
        raise ValueError(
            f"name {name!r} of a set of scores is not usable: take at most 100 letters, digits, '.', '_' and '-', "
            "with a letter or digit first"
        )
    if name == RUN_SCORES:
        raise ValueError(f"name {name!r} is that of the run's own scores: take another")


def annotations_folder(run_id: str) -> str:
    """Where the sets of scores lie that the run's episodes were given later."""
    check_run_id(run_id)
    return f"{EPISODES}annotations/{run_id}/"


def score_set_folder(run_id: str, name: str) -> str:
    check_score_set(name)
    return f"{annotations_folder(run_id)}{name}/"


def score_set_key(run_id: str, name: str) -> str:
    """What the set is: written before its first scores."""
    return f"{score_set_folder(run_id, name)}set.json"


def score_set_source_key(run_id: str, name: str, sha256: str, file: str) -> str:
    """Where the file of the user's code that scored is kept."""
    return f"{score_set_folder(run_id, name)}source/{sha256[:12]}-{file}"


def scores_prefix(run_id: str, name: str, commit: str) -> str:
    """Key prefix for the part with the scores of the commit named `commit`."""
    return f"{score_set_folder(run_id, name)}{commit}"


def scores_folder(run_id: str, name: str) -> str:
    """Where the records lie that make parts of scores count."""
    return f"{score_set_folder(run_id, name)}commits/"


def scores_key(run_id: str, name: str, commit: str) -> str:
    """The record that makes that part count."""
    return f"{scores_folder(run_id, name)}{commit}.json"


def covered_folder(run_id: str, name: str) -> str:
    """Where records lie that say how much of the run the set covers."""
    return f"{score_set_folder(run_id, name)}complete/"


def covered_key(run_id: str, name: str, num_commits: int) -> str:
    """Written last, when the run's first `num_commits` commits are scored; the largest number is the newest."""
    return f"{covered_folder(run_id, name)}{num_commits:06d}.json"


ENSEMBLES = "ensembles/"
"""Folder of the ensembles of verifiers that were fitted, of whatever runs."""


def check_ensemble(name: str) -> None:
    """Raise ValueError unless an ensemble of verifiers can have this name."""
    if not _RUN_ID.fullmatch(name):
        raise ValueError(
            f"name {name!r} of an ensemble is not usable: take at most 100 letters, digits, '.', '_' and '-', "
            "with a letter or digit first"
        )


def ensemble_folder(name: str) -> str:
    check_ensemble(name)
    return f"{ENSEMBLES}{name}/"


def ensemble_versions(name: str) -> str:
    """What the keys of an ensemble's versions start with."""
    return f"{ensemble_folder(name)}versions/"


def ensemble_key(name: str, version: int) -> str:
    """A fitted ensemble; versions count from 1."""
    return f"{ensemble_versions(name)}{version:06d}.json"


def ensemble_source_key(name: str, sha256: str, file: str) -> str:
    """Where the file of the user's code is kept that one of its verifiers is defined in."""
    return f"{ensemble_folder(name)}source/{sha256[:12]}-{file}"


PROMOTIONS = "promotions/"
"""Folder of the decisions which checkpoints are promoted, by line."""


def check_line(line: str) -> None:
    """Raise ValueError unless a line of promoted checkpoints can have this name."""
    if not _RUN_ID.fullmatch(line):
        raise ValueError(
            f"line {line!r} of promoted checkpoints is not usable: take at most 100 letters, digits, '.', '_' and "
            "'-', with a letter or digit first"
        )


def promotions_folder(line: str) -> str:
    check_line(line)
    return f"{PROMOTIONS}{line}/"


def promotion_key(line: str, number: int) -> str:
    """A decision of a line; they count from 1."""
    return f"{promotions_folder(line)}{number:06d}.json"


def experiment_key(experiment_id: str) -> str:
    """What an experiment was begun with."""
    check_run_id(experiment_id)
    return f"experiments/{experiment_id}.json"
