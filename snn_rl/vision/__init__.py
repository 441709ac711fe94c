"""Images: data sets, networks and training for classification with spiking networks."""

from snn_rl.runs.task import OutOfTimeError as OutOfTimeError
from snn_rl.vision.classifier import Classifier as Classifier
from snn_rl.vision.classifier import load_classifier as load_classifier
from snn_rl.vision.classifier import save_classifier as save_classifier
from snn_rl.vision.data import load_images as load_images
from snn_rl.vision.models import build as build
from snn_rl.vision.recipe import VISION_RECIPES as VISION_RECIPES
from snn_rl.vision.recipe import VisionRecipe as VisionRecipe
from snn_rl.vision.training import run as run
