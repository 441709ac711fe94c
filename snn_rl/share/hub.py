"""A policy file as a Hugging Face model repository, laid out as huggingface_sb3 does, with safetensors for its zip.

`export` writes the folder and needs no network; `push` uploads what `export` wrote.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from stable_baselines3.common.vec_env import VecEnv

from snn_rl.base.files import atomic, atomic_folder, read_json, write_json
from snn_rl.rl.evaluation import Evaluation, evaluate
from snn_rl.rl.policy_file import FORMAT, LoadedPolicy, load_policy
from snn_rl.runs.recipe import SEEDS_PER_RUN, TEST_SEEDS
from snn_rl.runs.stages import versions

CARD, CONFIG, RESULTS, POLICY, VIDEO = "README.md", "config.json", "results.json", "policy.safetensors", "replay.mp4"
NAMES = (CARD, CONFIG, RESULTS, POLICY, VIDEO)  # all that is ever written or pushed; VIDEO may be missing
FPS = 30


class Builder(Protocol):
    """Builds the environment that a policy was trained in; raises ValueError where there is none for it."""

    def __call__(self, policy: LoadedPolicy, num_envs: int, seed: int, **overrides: Any) -> VecEnv: ...


def export(
    file: Path,
    folder: Path,
    build: Builder,
    *,
    episodes: int = 20,
    video_steps: int = 500,
    protocol: str = "greedy, one episode per seed",
    repo_id: str | None = None,
    by_id: bool = False,
) -> dict[str, Any]:
    """Play the policy in ``file`` and write it with its card, config, results and video into ``folder``, atomically.

    ``video_steps`` of 0 leave the video out, as does a missing writer of mp4. ``repo_id`` is where the card says that
    the policy is to be had. ``by_id``: the card's example builds the environment by its id in gymnasium, not by the
    recipe. Returns what ``results.json`` holds. A folder that `export` wrote is replaced.

    Raises:
        ValueError: numbers out of range, a file that is no policy, a folder with anything else in it.
    """
    _need_client()
    if not 1 <= episodes <= SEEDS_PER_RUN:
        raise ValueError(f"episodes must lie in [1, {SEEDS_PER_RUN}], got {episodes}")
    if video_steps < 0:
        raise ValueError(f"video steps must be >= 0, got {video_steps}")
    folder = folder.resolve()
    _check_ours(folder)
    policy = load_policy(file)
    provenance = policy.metadata["provenance"]
    run_seed = provenance.get("seed", 0)
    if type(run_seed) is not int or not 0 <= run_seed < 100_000:
        raise ValueError(f"the seed in the file's provenance must be an integer in [0, 100000), got {run_seed!r}")
    seed = TEST_SEEDS + run_seed * SEEDS_PER_RUN
    env_id = provenance.get("env_id")
    if not isinstance(env_id, str) or not re.fullmatch(r"[\w./:-]+", env_id):
        raise ValueError(f"the env_id in the file's provenance must be an environment's name, got {env_id!r}")
    with atomic_folder(folder, _check_ours) as temporary:
        with atomic(temporary / POLICY) as path:
            shutil.copyfile(file, path)
        shipped = load_policy(temporary / POLICY)  # what is reported is what the copy returns
        env = build(shipped, episodes, seed)
        try:
            played = evaluate(shipped, env, episodes)
        finally:
            env.close()
        results = {
            "mean_reward": played.mean,
            "std_reward": played.std,
            "is_deterministic": True,
            "n_eval_episodes": episodes,
            "eval_datetime": datetime.now(timezone.utc).isoformat(),
        }
        write_json(temporary / RESULTS, results)
        config = _config(shipped, env_id, temporary / POLICY)
        config["evaluation"] = {"protocol": protocol, "first_seed": seed, "episodes": episodes}
        write_json(temporary / CONFIG, config)
        filmed = bool(video_steps) and _writes_mp4()
        if filmed:
            _film(shipped, build, seed, temporary / VIDEO, video_steps)
        with atomic(temporary / CARD) as path:
            path.write_text(_card(shipped, env_id, played, protocol, repo_id, by_id=by_id), encoding="utf-8")
    return results


def check_push(repo_id: str) -> None:
    """Raises ValueError where nothing could be pushed to ``repo_id``: its name, or a token that is missing."""
    _need_client()
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise ValueError(f"the repository to push to must be OWNER/NAME, got {repo_id!r}")
    validate_repo_id(repo_id)
    if huggingface_hub.get_token() is None:
        raise ValueError("no Hugging Face token: set HF_TOKEN, or run `hf auth login`")


def push(folder: Path, repo_id: str) -> str:
    """Upload what `export` wrote into ``folder``, and nothing else in it; returns the repository's address.

    Raises:
        ValueError: as `check_push`, or a folder that `export` did not write.
        OSError: the upload failed.
    """
    check_push(repo_id)
    import huggingface_hub

    folder = folder.resolve()
    _check_ours(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no exported policy to push")
    try:
        client = huggingface_hub.HfApi()
        address = client.create_repo(repo_id, repo_type="model", exist_ok=True)
        # one commit; of an earlier push, what has no successor goes (a video)
        client.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload a policy of snn_rl",
            allow_patterns=list(NAMES),
            delete_patterns=[name for name in NAMES if not (folder / name).exists()],
        )
    except Exception as error:  # of HTTP, of the storage behind it, of the disk: these share no base class
        reason = " ".join(str(error).split())[:300]
        raise OSError(f"{repo_id} was not pushed, {folder} stands: {type(error).__name__}: {reason}") from error
    return str(address)


def _need_client() -> None:
    if find_spec("huggingface_hub") is None:
        raise ValueError("a model repository needs the package huggingface_hub: pip install 'snn_rl[hub]'")


def _check_ours(folder: Path) -> None:
    """Raises ValueError where something stands at ``folder`` that `export` did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    inside = sorted(folder.iterdir())
    foreign = [entry.name for entry in inside if entry.name not in NAMES or not entry.is_file()]
    if inside and not foreign:
        # a README.md alone may be anyone's
        path = folder / CONFIG
        config = read_json(path) if path.is_file() else None
        if not isinstance(config, dict) or config.get("library_name") != "snn_rl":
            foreign = [entry.name for entry in inside]
    if foreign:
        raise ValueError(f"{folder} holds what is not an earlier export: {', '.join(foreign[:3])}; give another folder")


def _config(policy: LoadedPolicy, env_id: str, path: Path) -> dict[str, Any]:
    description = {key: value for key, value in policy.metadata.items() if key != "provenance"}
    return {
        "library_name": "snn_rl",
        "format": FORMAT,
        "algorithm": _algorithm(policy),
        "env_id": env_id,
        "timesteps": policy.timesteps,
        "parameters": sum(weight.numel() for weight in policy.network.parameters()),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "policy": _plain(description),
        "provenance": _plain(policy.metadata["provenance"]),
        "versions": versions(),
    }


def _plain(value: Any) -> Any:
    """``value`` without infinities, which Python writes into JSON and other readers refuse; they become words."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _algorithm(policy: LoadedPolicy) -> str:
    return "DQN" if policy.timesteps is None else "SpikingDQN"


def _writes_mp4() -> bool:
    try:
        import imageio
        import imageio_ffmpeg
        import PIL  # noqa: F401

        return bool(imageio and imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):  # RuntimeError: the package is there, but no ffmpeg for this machine
        return False


def _film(policy: LoadedPolicy, build: Builder, seed: int, path: Path, steps: int) -> None:
    from snn_rl.share.watch import record  # only here: the rest needs no video packages

    env = build(policy, 1, seed, render_mode="rgb_array")
    try:
        record(policy, env, path, steps=steps, fps=FPS)
    finally:
        env.close()


def _card(
    policy: LoadedPolicy, env_id: str, played: Evaluation, protocol: str, repo_id: str | None, *, by_id: bool
) -> str:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    value = f"{played.mean:.2f} +/- {played.std:.2f}"
    result = EvalResult(
        task_type="reinforcement-learning",
        task_name="reinforcement-learning",
        dataset_type=env_id,
        dataset_name=env_id,
        metric_type="mean_reward",
        metric_name="mean_reward",
        metric_value=value,
        verified=False,
    )
    spiking = policy.timesteps is not None
    tags = [env_id, "deep-reinforcement-learning", "reinforcement-learning", "snn_rl", "stable-baselines3"]
    data = ModelCardData(
        library_name="snn_rl",
        tags=tags + ["spiking-neural-network"] * spiking,
        model_name=_algorithm(policy),
        eval_results=[result],
    )
    provenance = policy.metadata["provenance"]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {_algorithm(policy)} plays {env_id}",
        "",
        f"A spiking network of leaky integrate-and-fire neurons, T = {policy.timesteps} micro-steps a frame; its "
        "membranes are the state that `predict` takes and returns."
        if spiking
        else "An ordinary network, the one that spiking agents are converted from.",
        "",
        f"Mean reward {value} over {len(played.returns)} episodes ({protocol}).",
    ]
    if played.activity is not None:
        lines += [
            f"Spike rate {played.activity.mean:.3f} per neuron and frame; by the usual energy model an ANN takes "
            f"{played.activity.ann_over_snn:.1f} times the energy.",
        ]
    where = [f'path = "{POLICY}"']
    if repo_id is not None:
        where = [
            "from huggingface_hub import hf_hub_download",
            "",
            f'path = hf_hub_download("{repo_id}", "{POLICY}")',
        ]
    if by_id:
        needs, finds = "With snn_rl installed.", "from snn_rl.runs.registered import registered"
        builds = f"registered({json.dumps(env_id)})(1, seed=0, **kwargs)"
    else:
        needs, finds = "From a checkout of snn_rl, whose recipe builds the environment.", "from agents import RECIPES"
        builds = f"RECIPES[{json.dumps(provenance.get('recipe'))}].build_env(1, 0, **kwargs)"
    lines += [
        "",
        "## Use",
        "",
        f"{needs} Loading runs no code from the file.",
        "",
        "```python",
        *where[:-1],
        "from stable_baselines3.common.evaluation import evaluate_policy",
        *sorted((finds, "from snn_rl import load_policy")),
        "",
        where[-1],
        "policy = load_policy(path)",
        'kwargs = policy.metadata["provenance"]["env_kwargs"]',
        f"env = {builds}",
        "print(evaluate_policy(policy, env, n_eval_episodes=5))",
        "```",
        "",
        f"`{CONFIG}` describes the network and where it comes from, `{RESULTS}` its evaluation.",
    ]
    text = "\n".join(lines) + "\n"
    ModelCard(text)  # refuses metadata that cannot be read back
    return text
