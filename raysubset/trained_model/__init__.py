"""The trained model of a run: saving and loading it, exporting it, and predicting with it.

model = load_model("~/ray_results/digits-1a2b3c4d")
labels = [model.class_names[i] for i in model(images).argmax(1)]        # images uint8 [N, C, H, W]
"""

from raysubset.trained_model.model import ModelRecord, TrainedModel, leave_samples, load_model, save_model
