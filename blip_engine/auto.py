"""transformers' `Auto*` names: what they resolve to for a BLIP checkpoint.

A checkpoint of another task fails to load with the names of the tensors that do not fit.
"""

from .contrastive import BlipModel
from .models import BlipForQuestionAnswering
from .processor import BlipProcessor
from .tokenizer import BertTokenizer

AutoModel = BlipModel
AutoModelForVisualQuestionAnswering = BlipForQuestionAnswering
AutoProcessor = BlipProcessor
AutoTokenizer = BertTokenizer
