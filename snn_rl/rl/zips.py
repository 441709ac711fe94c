"""Agents of stable-baselines3 and sb3-contrib from their zips, without running the pickles inside.

``policy.pth`` is a state dict, which PyTorch reads as weights only. The sizes of the layers follow from its shapes, the
spaces are the environment's, and the algorithm follows from the names of the weights. ``data`` is JSON: its plain
fields name the activation and the features extractor. The pickles beside them are left unread, so that neither ``gym``
nor the Python that wrote the file is needed.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.utils import get_device
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from snn_rl.base.weights_file import check_fits
from snn_rl.core.plain import first_line
from snn_rl.rl.spaces import UnsupportedSpaceError, channels_first, in_one_line

MAX_BYTES = 2**31  # of policy.pth, unpacked, and of all its weights
MAX_DATA = 2**28  # of data

# The layout of an algorithm's weights, by which those of one layout cannot be told apart.
ALGORITHMS = {
    "dqn": "dqn",
    "qrdqn": "qrdqn",
    "ppo": "actor-critic",
    "a2c": "actor-critic",
    "trpo": "actor-critic",
    "recurrentppo": "recurrent",
    "sac": "sac",
    "tqc": "tqc",
    "td3": "td3",
    "ddpg": "td3",
    "ars": "ars",
}
# The policy class of each layout: what builds it, and the module that ``data`` must name.
POLICIES = {
    "dqn": "stable_baselines3.dqn.policies.DQNPolicy",
    "qrdqn": "sb3_contrib.qrdqn.policies.QRDQNPolicy",
    "actor-critic": "stable_baselines3.common.policies.ActorCriticPolicy",
    "recurrent": "sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy",
    "sac": "stable_baselines3.sac.policies.SACPolicy",
    "tqc": "sb3_contrib.tqc.policies.TQCPolicy",
    "td3": "stable_baselines3.td3.policies.TD3Policy",
    "ars": "sb3_contrib.ars.policies.ARSPolicy",
}
# Those without weights that need no argument.
ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)
EXTRACTORS = (FlattenExtractor, NatureCNN, CombinedExtractor)

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class ForeignAgent:
    """An agent from a zip: its policy, in evaluation mode, and the name of its algorithm, a key of `ALGORITHMS`.

    ``num_timesteps`` and ``n_updates`` say how long it was trained, where the file does; they are 0 otherwise.
    """

    policy: BasePolicy
    algo: str
    num_timesteps: int = 0
    n_updates: int = 0

    @property
    def observation_space(self) -> spaces.Space:
        """What the policy observes: the environment's space, with the channels of images first."""
        return self.policy.observation_space

    @property
    def action_space(self) -> spaces.Space:
        return self.policy.action_space

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As SB3's: actions (n_envs, ...) for observations (n_envs, ...), and the state for the next call."""
        return self.policy.predict(observation, state, episode_start, deterministic)


def read_zip(
    path: Path | str,
    observation_space: spaces.Space,
    action_space: spaces.Space,
    algo: str | None = None,
    device: torch.device | str = "cpu",
) -> ForeignAgent:
    """Read an agent that ``model.save`` of stable-baselines3 or sb3-contrib wrote.

    Args:
        path: the zip.
        observation_space: the environment's.
        action_space: the environment's.
        algo: a key of `ALGORITHMS`; None derives it. PPO, A2C and TRPO have weights of the same names.
        device: where the policy is to be.

    Raises:
        ValueError: a file that is missing, damaged or of another kind; an algorithm, a policy class, a features
            extractor or an activation that is not known here; an ``algo`` that is not the file's; weights that are not
            finite; spaces that are not those of the agent, with both shapes; or sb3-contrib is needed and not
            installed. One line.
    """
    path = Path(path)
    if algo is not None and algo not in ALGORITHMS:
        raise ValueError(f"algo must be one of {', '.join(sorted(ALGORITHMS))}, got {algo!r}")
    try:
        data, weights = _read(path)
        agent = _Agent(data, _modern(weights), channels_first(observation_space), action_space)
        name = agent.algorithm(algo)
        policy = agent.build()
    except UnsupportedSpaceError as error:
        raise UnsupportedSpaceError(f"{path}: {_one_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    return ForeignAgent(
        policy.to(get_device(device)), name, _count(data.get("num_timesteps")), _count(data.get("_n_updates"))
    )


# --- the file -----------------------------------------------------------------------------------------------------


class _Refusal(ValueError):
    """What is said of a file here, unlike what a library says of a damaged one."""


def _read(path: Path) -> tuple[dict[str, Any], Weights]:
    """The plain ``data`` and the weights of a zip."""
    if not path.is_file():
        raise ValueError("is a folder; give the zip in it" if path.is_dir() else "there is no such file")
    try:
        with zipfile.ZipFile(path) as file:
            data, policy = (_member(file, name, most) for name, most in (("data", MAX_DATA), ("policy.pth", MAX_BYTES)))
    except _Refusal:
        raise
    except Exception as error:  # zlib's, struct's, the operating system's
        raise ValueError(f"it is not a zip, or it is damaged ({type(error).__name__}: {first_line(error)})") from error
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets, thousands deep
        raise ValueError(f"its data is not JSON: {first_line(error)}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"its data must be a JSON object, got {type(plain).__name__}")
    return plain, _weights(policy)


def _member(file: zipfile.ZipFile, name: str, most: int) -> bytes:
    if name not in file.namelist():
        raise _Refusal(f"it is not an agent that SB3 saved: there is no {name} in it")
    size = file.getinfo(name).file_size  # more than this is not unpacked
    if size > most:
        raise _Refusal(f"its {name} has {size:,} bytes; at most {most:,} are read")
    return file.read(name)


def _weights(raw: bytes) -> Weights:
    """A state dict as float32 tensors that own their memory."""
    try:
        if raw[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(raw)) as file:  # PyTorch would unpack whatever it holds
                unpacked = sum(member.file_size for member in file.infolist())
            if unpacked > MAX_BYTES:
                raise _Refusal(f"its policy.pth unpacks to {unpacked:,} bytes; at most {MAX_BYTES:,} are read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how older versions of PyTorch stored weights
            state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except _Refusal:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"its policy.pth is damaged, or holds more than weights ({reason})") from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"its policy.pth must hold named weights, got {type(state).__name__}")
    for name, weight in state.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise ValueError(f"its policy.pth must hold named weights, got {type(weight).__name__} at {name!r}")
        if weight.layout is not torch.strided or weight.device.type != "cpu" or not weight.is_floating_point():
            raise ValueError(f"its {name} must be a dense tensor of floats, got {weight.dtype} on {weight.device}")
    # An expanded tensor takes no memory in a file, and all of it in a network.
    if (size := sum(4 * weight.numel() for weight in state.values())) > MAX_BYTES:
        raise ValueError(f"its weights have {size:,} bytes; at most {MAX_BYTES:,} are read")
    return {name: weight.detach().float() for name, weight in state.items()}


def _modern(weights: Weights) -> Weights:
    """The weights under the names that today's SB3 gives them.

    Before 1.7 an actor-critic had one features extractor, and before 1.8 its policy and its value could share the first
    layers. Both are now stored twice.
    """
    once = _critic(weights) and not any(name.startswith("pi_features_extractor.") for name in weights)
    shared = [name for name in weights if re.fullmatch(r"mlp_extractor\.shared_net\.\d+\.weight", name)]
    new: Weights = {}
    for name, weight in weights.items():
        if once and name.startswith("features_extractor."):
            new |= {f"{which}{name}": weight for which in ("", "pi_", "vf_")}
        elif shared and (found := re.fullmatch(r"mlp_extractor\.(\w+)\.(\d+)\.(\w+)", name)):
            net, index, parameter = found[1], int(found[2]), found[3]
            if net == "shared_net":
                new |= {f"mlp_extractor.{both}.{index}.{parameter}": weight for both in ("policy_net", "value_net")}
            else:  # behind the shared layers and their activations
                new[f"mlp_extractor.{net}.{index + 2 * len(shared)}.{parameter}"] = weight
        else:
            new[name] = weight
    return new


def _critic(weights: Iterable[str]) -> bool:
    return "value_net.weight" in weights


# --- the agent ----------------------------------------------------------------------------------------------------


class _WithoutMemory(TorchFunctionMode):
    """Lets SB3's policies be built of tensors on the meta device.

    They move each network to the CPU, which tensors without memory cannot follow, and check values that there are not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is Tensor.to:
                return args[0]
            if func is Tensor.__bool__:
                return True
        return func(*args, **(kwargs or {}))


class _Agent:
    def __init__(
        self, data: dict[str, Any], weights: Weights, observation_space: spaces.Space, action_space: spaces.Space
    ) -> None:
        self.data, self.weights = data, weights
        self.observation_space, self.action_space = observation_space, action_space
        kwargs = data.get("policy_kwargs")
        self.kwargs: dict[str, Any] = kwargs if isinstance(kwargs, dict) else {}
        self.policy_class = self._policy_class()
        self.layout = self._layout()

    # What the file says of itself.

    def _policy_class(self) -> tuple[str, str]:
        """Module and name of the policy's class."""
        described = self.data.get("policy_class")
        described = described if isinstance(described, dict) else {}
        module = described.get("__module__")
        if not isinstance(module, str):
            raise ValueError("its data do not name a policy class; it is not an agent that SB3 saved")
        init = re.match(r"<function ([\w.<>]+)\.__init__", str(described.get("__init__", "")))
        return module, init[1] if init else ""

    def _layout(self) -> str:
        """Which of `POLICIES` the weights are those of."""
        module, name = self.policy_class
        if module.partition(".")[0] == "snn_rl":
            raise ValueError("it is a spiking agent already; load it with SpikingDQN.load")
        if module not in {policy.rpartition(".")[0] for policy in POLICIES.values()}:
            raise ValueError(
                f"its policy class is {module}.{name or '?'}, whose code a zip does not hold; known are the policies "
                f"of {', '.join(sorted(ALGORITHMS))}. Load it with SB3, and pass the model itself"
            )
        layout = self._layout_of_weights()
        if layout is None:
            raise ValueError(f"its weights are those of no known algorithm: {sorted(self.weights)[:3]}")
        if POLICIES[layout].rpartition(".")[0] != module:
            raise ValueError(f"its weights are those of {_names(layout)}, but its policy class is of {module}")
        return layout

    def _layout_of_weights(self) -> str | None:
        if self._under("lstm_actor."):
            return "recurrent"
        if self._under("q_net.q_net."):
            return "dqn"
        if self._under("quantile_net.quantile_net."):
            return "qrdqn"
        if self._under("actor.log_std"):  # more than one quantile, or the class that can have one
            several = self._last("critic.qf0.") > 1
            return "tqc" if several or self.policy_class[0] == "sb3_contrib.tqc.policies" else "sac"
        if self._under("actor.mu."):
            return "td3"
        if "action_net.weight" in self.weights and _critic(self.weights):
            return "actor-critic"
        return "ars" if self._under("action_net.") else None

    def algorithm(self, wanted: str | None) -> str:
        """The algorithm's name. Raises ValueError where it cannot be the ``wanted`` one."""
        if wanted is not None:
            if ALGORITHMS[wanted] != self.layout:
                raise ValueError(f"it is an agent of {_names(self.layout)}, not of {wanted}")
            return wanted
        if self.layout == "actor-critic":
            return "ppo" if "clip_range" in self.data else "trpo" if "cg_max_steps" in self.data else "a2c"
        if self.layout == "td3":
            return "td3" if self._count("critic.qf") > 1 else "ddpg"
        return next(name for name, layout in ALGORITHMS.items() if layout == self.layout)

    def build(self) -> BasePolicy:
        """The policy with its weights."""
        self._check_actions()
        arguments = self._arguments()
        self._check_observations()
        make = self._maker(arguments)

        def without_memory() -> nn.Module:
            with _WithoutMemory():
                return make()

        try:
            check_fits(without_memory, self.weights)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:  # SB3's refusals of spaces
            raise ValueError(
                f"its policy cannot be built for observations {in_one_line(self.observation_space)} and actions "
                f"{in_one_line(self.action_space)}: {first_line(error)}"
            ) from error
        policy = make()
        policy.load_state_dict(self.weights)
        policy.set_training_mode(False)
        return policy

    def _maker(self, arguments: dict[str, Any]) -> Callable[[], BasePolicy]:
        module, _, name = POLICIES[self.layout].rpartition(".")
        try:
            policy_class = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ValueError(f"agents of {_names(self.layout)} need sb3-contrib: pip install sb3-contrib") from error
        if self.layout != "ars":
            arguments["lr_schedule"] = _no_schedule
        return lambda: policy_class(self.observation_space, self.action_space, **arguments)

    # Weights by name.

    def _under(self, prefix: str) -> list[str]:
        return [name for name in self.weights if name.startswith(prefix)]

    def _count(self, prefix: str) -> int:
        """How many networks there are whose names are ``prefix`` and a number."""
        return len({name[len(prefix) :].partition(".")[0] for name in self._under(prefix)})

    def _units(self, prefix: str) -> list[int]:
        """Units of the linear layers of the ``Sequential`` at ``prefix``."""
        layers = {
            int(found[1]): len(weight)
            for name, weight in self.weights.items()
            if (found := re.fullmatch(re.escape(prefix) + r"(\d+)\.weight", name)) and weight.dim() == 2
        }
        return [layers[index] for index in sorted(layers)]

    def _last(self, prefix: str) -> int:
        units = self._units(prefix)
        return units[-1] if units else 0

    # What the policy is built from.

    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"activation_fn": self._activation()}
        if self.layout == "ars":
            return arguments | self._ars()
        extractor, extractor_kwargs = self._extractor()
        arguments |= {
            "features_extractor_class": extractor,
            "features_extractor_kwargs": extractor_kwargs,
            "normalize_images": self._flag("normalize_images", True),
        }
        if self.layout in ("dqn", "qrdqn"):
            prefix = "q_net.q_net." if self.layout == "dqn" else "quantile_net.quantile_net."
            *hidden, out = self._units(prefix) or [0]
            arguments["net_arch"] = hidden
            if self.layout == "qrdqn":
                assert isinstance(self.action_space, spaces.Discrete)
                arguments["n_quantiles"] = out // int(self.action_space.n)
        elif self.layout in ("actor-critic", "recurrent"):
            arguments |= self._actor_critic()
        else:
            arguments |= self._off_policy()
        return arguments

    def _actor_critic(self) -> dict[str, Any]:
        log_std = self.weights.get("log_std")
        use_sde = log_std is not None and log_std.dim() == 2
        arguments: dict[str, Any] = {
            "net_arch": {"pi": self._units("mlp_extractor.policy_net."), "vf": self._units("mlp_extractor.value_net.")},
            "ortho_init": False,
            "use_sde": use_sde,
            "share_features_extractor": all(
                torch.equal(self.weights[name], self.weights.get("vf" + name[2:], self.weights[name]))
                for name in self._under("pi_features_extractor.")
            ),
        }
        if use_sde:
            assert log_std is not None
            arguments["full_std"] = log_std.shape[1] == self._outputs()
            arguments["squash_output"] = self._flag("squash_output", False)
        if self.layout == "recurrent":
            if options := self.kwargs.get("lstm_kwargs"):
                raise ValueError(f"its LSTM has options of its own, which are not read: {options}")
            separate = bool(self._under("lstm_critic."))
            arguments |= {
                "lstm_hidden_size": len(self.weights.get("lstm_actor.weight_ih_l0", ())) // 4,
                "n_lstm_layers": self._count("lstm_actor.weight_ih_l"),
                "enable_critic_lstm": separate,
                "shared_lstm": not separate and not self._under("critic."),
            }
        return arguments

    def _off_policy(self) -> dict[str, Any]:
        soft = self.layout in ("sac", "tqc")
        hidden = self._units("actor.latent_pi.") if soft else self._units("actor.mu.")[:-1]
        arguments: dict[str, Any] = {
            "net_arch": {"pi": hidden, "qf": self._units("critic.qf0.")[:-1]},
            "n_critics": self._count("critic.qf"),
            "share_features_extractor": False,  # where they are shared, the file has them twice
        }
        if soft:
            arguments["use_sde"] = use_sde = "actor.log_std" in self.weights
            clipped = "actor.mu.0.weight" in self.weights
            arguments["clip_mean"] = self._number("clip_mean", 2.0) if use_sde and clipped else 0.0
        if self.layout == "tqc":
            arguments["n_quantiles"] = self._last("critic.qf0.")
        return arguments

    def _ars(self) -> dict[str, Any]:
        hidden = self._units("action_net.")[:-1]
        linear = self.policy_class[1] == "ARSLinearPolicy"
        if (
            not self.policy_class[1]
            and "squash_output" not in self.kwargs
            and isinstance(self.action_space, spaces.Box)
        ):
            raise ValueError("its data do not say whether its actions are squashed")
        return {
            "net_arch": hidden,
            "with_bias": "action_net.0.bias" in self.weights,
            "squash_output": self._flag("squash_output", not linear),
        }

    def _flag(self, name: str, default: bool) -> bool:
        value = self.kwargs.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"its {name} must be true or false, got {value!r}")
        return value

    def _number(self, name: str, default: float) -> float:
        value = self.kwargs.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(f"its {name} must be a number, got {value!r}")
        return float(value)

    def _activation(self) -> type[nn.Module]:
        text = self.kwargs.get("activation_fn")
        if text is None:
            return nn.Tanh if self.layout in ("actor-critic", "recurrent") else nn.ReLU
        known = {f"<class '{cls.__module__}.{cls.__name__}'>": cls for cls in ACTIVATIONS}
        if text not in known:
            raise ValueError(f"its activation is {text!r}; known are {', '.join(cls.__name__ for cls in ACTIVATIONS)}")
        return known[text]

    def _extractor(self) -> tuple[type[BaseFeaturesExtractor], dict[str, Any]]:
        text = self.kwargs.get("features_extractor_class")
        known = {f"<class '{cls.__module__}.{cls.__name__}'>": cls for cls in EXTRACTORS}
        if text is not None and text not in known:
            raise ValueError(
                f"its features extractor is {text!r}, whose code a zip does not hold; known are "
                f"{', '.join(cls.__name__ for cls in EXTRACTORS)}. Load it with SB3, and pass the model itself"
            )
        prefix = {
            "dqn": "q_net.features_extractor.",
            "qrdqn": "quantile_net.features_extractor.",
            "actor-critic": "pi_features_extractor.",
            "recurrent": "pi_features_extractor.",
        }.get(self.layout, "actor.features_extractor.")
        own = [name[len(prefix) :] for name in self._under(prefix)]
        options = self.kwargs.get("features_extractor_kwargs")
        normalised = isinstance(options, dict) and options.get("normalized_image") is True
        kwargs: dict[str, Any] = {"normalized_image": True} if normalised else {}
        units = [len(self.weights[prefix + name]) for name in own if name.endswith("linear.0.weight")]
        if "cnn.0.weight" in own:
            return NatureCNN, kwargs | {"features_dim": units[0] if units else 0}
        if any(name.startswith("extractors.") for name in own):
            return CombinedExtractor, kwargs | ({"cnn_output_dim": units[0]} if units else {})
        if own:
            raise ValueError(f"its features extractor is none of SB3's: it has the weights {own[:3]}")
        if isinstance(self.observation_space, spaces.Dict):
            return CombinedExtractor, kwargs
        return FlattenExtractor, {}

    # Whether the spaces are those of the environment.

    def _outputs(self) -> int:
        """How many outputs the policy has for the environment's actions."""
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return int(space.n)
        if isinstance(space, spaces.MultiDiscrete):
            return int(np.sum(space.nvec))
        return int(np.prod(space.shape or ()))

    def _check_actions(self) -> None:
        ours, theirs = self.action_space, self.data.get("action_space")
        kind = _kind(theirs)
        continuous = self.layout in ("sac", "tqc", "td3") or "log_std" in self.weights
        discrete = self.layout in ("dqn", "qrdqn")
        if self.layout in ("actor-critic", "recurrent"):
            discrete = not continuous
        wrong = continuous and not isinstance(ours, spaces.Box)
        wrong |= discrete and isinstance(ours, spaces.Box)
        wrong |= self.layout in ("dqn", "qrdqn") and not isinstance(ours, spaces.Discrete)
        if wrong or (kind is not None and kind != type(ours).__name__):
            what = kind or ("Box" if continuous else "Discrete")
            raise ValueError(f"its actions are {_described(what, theirs)}, the environment's {in_one_line(ours)}")
        out = self._action_units()
        fits = out == self._outputs()
        if self.layout == "qrdqn":
            fits = out > 0 and out % self._outputs() == 0
        number = _number_of_actions(theirs)
        if not fits or (number is not None and number != self._outputs()):
            shape = f"{out} outputs" if number is None else f"{out} outputs for {number}"
            raise ValueError(
                f"its actions are {_described(kind or 'actions', theirs)} ({shape}), the environment's "
                f"{in_one_line(ours)} ({self._outputs()})"
            )
        if isinstance(ours, spaces.Box):
            if not np.isfinite([ours.low, ours.high]).all():
                raise UnsupportedSpaceError(
                    f"actions need finite bounds, got {in_one_line(ours)}; use gymnasium.wrappers.RescaleAction"
                )
            for name in ("low", "high"):
                stored, bound = _numbers(theirs, name, ours.shape), getattr(ours, name)
                if stored is not None and not np.allclose(stored, bound, rtol=1e-3, atol=1e-6):
                    raise ValueError(
                        f"the {name} of its actions is {stored.tolist()}, the environment's {bound.tolist()}"
                    )

    def _action_units(self) -> int:
        """Outputs of the actor, as its weights say."""
        if self.layout == "dqn":
            return self._last("q_net.q_net.")
        if self.layout == "qrdqn":
            return self._last("quantile_net.quantile_net.")
        if self.layout == "ars":
            return self._last("action_net.")
        names = ("action_net.weight", "actor.mu.weight", "actor.mu.0.weight")
        if self.layout == "td3":
            return self._last("actor.mu.")
        return next((len(self.weights[name]) for name in names if name in self.weights), 0)

    def _check_observations(self) -> None:
        ours, theirs = self.observation_space, self.data.get("observation_space")
        kind, shape = _kind(theirs), _shape(theirs)
        if kind is not None and kind != type(ours).__name__:
            raise ValueError(f"its observations are {_described(kind, theirs)}, the environment's {in_one_line(ours)}")
        if isinstance(ours, spaces.Dict) and isinstance(theirs, dict):
            keys, text = list(ours.spaces), str(theirs.get("spaces"))
            order = sorted((key for key in keys if f"'{key}'" in text), key=lambda key: text.index(f"'{key}'"))
            if len(order) == len(keys) and order != keys:  # the same weights would meet other parts
                raise ValueError(f"its observations are of {order} in this order, the environment's of {keys}")
        first = self._first_weight()
        if first is None or isinstance(ours, spaces.Dict):
            return  # `check_fits` compares what the extractor makes of them
        if first.dim() == 2:
            numbers, wanted = first.shape[1], get_flattened_obs_dim(ours)
        else:
            numbers, wanted = first.shape[1], ours.shape[0] if ours.shape else 0
        image_size = first.dim() == 4 and shape is not None and shape != ours.shape
        if numbers != wanted or image_size:
            of = "numbers" if first.dim() == 2 else "channels"
            stored = f"shape {shape}" if shape is not None else f"{numbers} {of}"
            raise ValueError(
                f"its observations have {stored}, the environment's have shape {ours.shape} ({in_one_line(ours)})"
            )

    def _first_weight(self) -> Tensor | None:
        """The weight that observations meet first."""
        prefixes = (
            "pi_features_extractor.cnn.", "actor.features_extractor.cnn.", "q_net.features_extractor.cnn.",
            "quantile_net.features_extractor.cnn.", "lstm_actor.weight_ih_l0", "mlp_extractor.policy_net.",
            "actor.latent_pi.", "actor.mu.", "q_net.q_net.", "quantile_net.quantile_net.", "action_net.",
        )  # fmt: skip
        for prefix in prefixes:
            for name in self._under(prefix):
                if self.weights[name].dim() > 1:
                    return self.weights[name]
        return None


def _count(value: Any) -> int:
    """A number of steps or updates from the file; 0 where it is none."""
    return value if type(value) is int and 0 <= value < 2**63 else 0


def _one_line(error: Exception) -> str:
    """What an error says, which may quote the file, in one printable line of bounded length."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:2000])


def _no_schedule(_: float) -> float:
    return 0.0


def _names(layout: str) -> str:
    return " or ".join(name for name, of in ALGORITHMS.items() if of == layout)


# A space as `data` describes it beside its pickle.


def _kind(space: Any) -> str | None:
    """The name of its class, in gym or gymnasium."""
    text = space.get(":type:") if isinstance(space, dict) else None
    found = re.fullmatch(r"<class '(?:gym|gymnasium)\.spaces\.(?:\w+\.)*(\w+)'>", str(text))
    return found[1] if found else None


def _shape(space: Any) -> tuple[int, ...] | None:
    shape = space.get("_shape", space.get("shape")) if isinstance(space, dict) else None
    whole = isinstance(shape, list) and all(isinstance(n, int) for n in shape)
    return tuple(shape) if whole and shape is not None else None


def _number_of_actions(space: Any) -> int | None:
    if _kind(space) == "Discrete" and re.fullmatch(r"\d{1,9}", str(space.get("n"))):
        return int(space["n"])
    return None


def _numbers(space: Any, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """An array that is written out as text; None where it is not, or is cut short."""
    text = str(space.get(name, "")) if isinstance(space, dict) else ""
    try:
        values = [float(number) for number in re.sub(r"[\[\],]", " ", text).split()]
        return np.asarray(values).reshape(shape)
    except ValueError:
        return None


def _described(kind: str, space: Any) -> str:
    number, shape = _number_of_actions(space), _shape(space)
    if number is not None:
        return f"{kind}({number})"
    return f"{kind} of shape {shape}" if shape is not None else kind
