"""Spiking agents on stable-baselines3: actors, teachers, students, and DQN with a spiking Q-network."""

from snn_rl.rl.actor import Actor as Actor
from snn_rl.rl.actor import actor_of as actor_of
from snn_rl.rl.dqn import SpikingDQN as SpikingDQN
from snn_rl.rl.features import ConvExtractor as ConvExtractor
from snn_rl.rl.policy import AgentPolicy as AgentPolicy
from snn_rl.rl.policy import CnnPolicy as CnnPolicy
from snn_rl.rl.policy import MlpPolicy as MlpPolicy
from snn_rl.rl.policy import SpikingDQNPolicy as SpikingDQNPolicy
from snn_rl.rl.policy import SpikingQNetwork as SpikingQNetwork
from snn_rl.rl.replay import SequenceReplayBuffer as SequenceReplayBuffer
from snn_rl.rl.student import Student as Student
from snn_rl.rl.teacher import StackedTeacher as StackedTeacher
from snn_rl.rl.teacher import Teacher as Teacher
from snn_rl.rl.teacher import teacher_of as teacher_of
