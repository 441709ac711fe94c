"""Networks in the formats of others: NIR for neuromorphic hardware and simulators, ONNX for deployment."""

from snn_rl.share.nir import from_nir as from_nir
from snn_rl.share.nir import read_nir as read_nir
from snn_rl.share.nir import to_nir as to_nir
from snn_rl.share.nir import write_nir as write_nir
from snn_rl.share.onnx import write_onnx as write_onnx
