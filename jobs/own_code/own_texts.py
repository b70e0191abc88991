"""Classes of texts: each text is cut or padded to a row of tokens, here its bytes. Is a paragraph prose or Python code?

Command:    cd jobs/own_code && raysubset run --data.name own_texts:paragraphs --minimize.optimizer adamw
Result:     test accuracy 91.98 ± 1.23 % of 486, 12.8 passes, the named transformer (n = 1, two CPU cores)
"""

import argparse
import inspect
import pydoc_data.topics

import numpy as np

LENGTH = 96


def tokens(text):
    """A tokenizer of your own goes here; 0 is the padding."""
    return np.frombuffer(text.encode()[:LENGTH].ljust(LENGTH, b"\0"), np.uint8)


def paragraphs():
    prose = [part for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n")]
    code = [part for module in (argparse, inspect) for part in inspect.getsource(module).split("\n\n")]
    texts = [(" ".join(part.split()), kind) for kind, parts in enumerate((prose, code)) for part in parts]
    rows = [(tokens(text), kind) for text, kind in dict.fromkeys(texts) if len(text) > 40]
    inputs, classes = zip(*rows, strict=True)
    return np.stack(inputs), np.array(classes)
