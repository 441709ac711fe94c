"""DQN with a spiking, recurrent Q-network, on stable-baselines3."""

from snn_rl.dqn.algorithm import SpikingDQN as SpikingDQN
from snn_rl.dqn.features import ConvExtractor as ConvExtractor
from snn_rl.dqn.policy import CnnPolicy as CnnPolicy
from snn_rl.dqn.policy import MlpPolicy as MlpPolicy
from snn_rl.dqn.policy import SpikingDQNPolicy as SpikingDQNPolicy
from snn_rl.dqn.policy import SpikingQNetwork as SpikingQNetwork
from snn_rl.dqn.replay import SequenceReplayBuffer as SequenceReplayBuffer
from snn_rl.dqn.teacher import StackedTeacher as StackedTeacher
