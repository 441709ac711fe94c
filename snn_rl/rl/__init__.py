"""DQN with a spiking, recurrent Q-network, on stable-baselines3."""

from snn_rl.rl.dqn import SpikingDQN as SpikingDQN
from snn_rl.rl.features import ConvExtractor as ConvExtractor
from snn_rl.rl.policy import CnnPolicy as CnnPolicy
from snn_rl.rl.policy import MlpPolicy as MlpPolicy
from snn_rl.rl.policy import SpikingDQNPolicy as SpikingDQNPolicy
from snn_rl.rl.policy import SpikingQNetwork as SpikingQNetwork
from snn_rl.rl.replay import SequenceReplayBuffer as SequenceReplayBuffer
from snn_rl.rl.teacher import StackedTeacher as StackedTeacher
