"""The names of `snn_rl`."""

from snn_rl.core.activity import Activity as Activity
from snn_rl.core.activity import activity as activity
from snn_rl.core.activity import count_spikes as count_spikes
from snn_rl.core.convert import to_spiking as to_spiking
from snn_rl.core.network import SpikingNetwork as SpikingNetwork
from snn_rl.core.neuron import LIF as LIF
from snn_rl.core.prune import prune_timesteps as prune_timesteps
from snn_rl.rl import SpikingDQN as SpikingDQN
from snn_rl.rl import Student as Student
from snn_rl.rl.dead_units import without_dead_units as without_dead_units
from snn_rl.rl.policy_file import LoadedPolicy as LoadedPolicy
from snn_rl.rl.policy_file import load_policy as load_policy
from snn_rl.rl.policy_file import save_policy as save_policy
from snn_rl.runs.distil import distil as distil
from snn_rl.runs.recipe import Recipe as Recipe
