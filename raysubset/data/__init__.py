"""The full set: read once into Arrow tables, wherever it is stored, and handed out as tensors on a device.

full_set = load_full_set(*config.learned)
examples = full_set.examples("train", subset.indices, device="cuda", augment=True)
draws = examples.draw(seed=epoch)
inputs, targets = examples.batch(indices, draws=draws)
"""

from raysubset.data.columns import read_image_rows, read_rows
from raysubset.data.contents import file_fingerprint, refuse_changed_files
from raysubset.data.examples import Examples, even_sizes, joined
from raysubset.data.files import text_of
from raysubset.data.full_set import FullSet
from raysubset.data.images import EncodedImages, decode
from raysubset.data.loading import load_full_set
from raysubset.data.split import Split, SplitName
from raysubset.data.streamed import Batches, Reader, StreamedExamples, StreamedSplit, cut_ranges, read_here
